package capture_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"github.com/hanse-mesh/hanse/proxy/capture"
	"github.com/hanse-mesh/hanse/test/netns"
)

const mark = 1503

func config() *capture.Config {
	return &capture.Config{
		Table: "hanse", OutboundPort: 15002, InboundPort: 15006, DNSPort: 15053, Mark: mark, UIDs: []uint32{1503}, OwnPorts: []uint16{15008, 15020},
		Outbound: capture.Selection{ExcludePorts: []capture.PortRange{{First: 25, Last: 25}, {First: 9000, Last: 9010}}, Exclude: prefixes("192.0.2.0/24", "2001:db8:1::/48")},
		Inbound:  capture.Selection{ExcludePorts: []capture.PortRange{{First: 22, Last: 22}}, Exclude: prefixes("10.9.0.9/32")},
	}
}

func prefixes(list ...string) (out []netip.Prefix) {
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

// ruleset is everything that nftables has in a namespace.
func ruleset(t *testing.T, ns *netns.NS) (out []string) {
	t.Helper()
	err := ns.Do(func() error {
		c, err := nftables.New()
		if err != nil {
			return err
		}
		tables, err := c.ListTables()
		if err != nil {
			return err
		}
		for _, table := range tables {
			out = append(out, fmt.Sprint("table ", table.Family, " ", table.Name))
			sets, err := c.GetSets(table)
			if err != nil {
				return err
			}
			for _, s := range sets {
				out = append(out, "set "+s.Name)
			}
		}
		chains, err := c.ListChains()
		if err != nil {
			return err
		}
		for _, ch := range chains {
			rules, err := c.GetRules(ch.Table, ch)
			if err != nil {
				return err
			}
			out = append(out, fmt.Sprintf("chain %s %s, %d rules", ch.Table.Name, ch.Name, len(rules)))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestInstall(t *testing.T) {
	netns.Test(t, func(t *testing.T) {
		ns := netns.New(t)
		// Somebody else's table stays out of it.
		if err := ns.Do(func() error {
			c, err := nftables.New()
			if err != nil {
				return err
			}
			table := c.AddTable(&nftables.Table{Name: "other", Family: nftables.TableFamilyINet})
			ch := c.AddChain(&nftables.Chain{Name: "output", Table: table})
			c.AddRule(&nftables.Rule{Table: table, Chain: ch, Exprs: []expr.Any{&expr.Verdict{Kind: expr.VerdictReturn}}})
			return c.Flush()
		}); err != nil {
			t.Fatal(err)
		}
		before := ruleset(t, ns)
		rules := capture.In(ns.Path())
		show := func(cfg *capture.Config) *capture.State {
			t.Helper()
			s, err := rules.Show(cfg)
			if err != nil {
				t.Fatal(err)
			}
			return s
		}
		install := func(cfg *capture.Config, want bool) {
			t.Helper()
			if changed, err := rules.Install(cfg); err != nil || changed != want {
				t.Fatalf("install: changed %t, %v; want %t", changed, err, want)
			}
			if s := show(cfg); !s.Installed || !s.Matches || len(s.Missing)+len(s.Surplus) > 0 {
				t.Fatalf("installed, but shown as %+v", s)
			}
		}
		if s := show(config()); s.Installed || s.Matches || len(s.Missing) == 0 {
			t.Errorf("before: %+v", s)
		}
		install(config(), true)
		first := ruleset(t, ns)
		install(config(), false)
		if d := cmp.Diff(first, ruleset(t, ns)); d != "" {
			t.Error("the second install changed something: " + d)
		}

		other := config()
		other.Outbound = capture.Selection{IncludePorts: []capture.PortRange{{First: 80, Last: 80}, {First: 443, Last: 444}}, Include: prefixes("10.0.0.0/8", "fd00::/8")}
		other.Always = prefixes("240.0.0.0/4", "fd77::/64")
		other.Inbound.Include = prefixes("10.0.0.0/8")
		other.OnlyUIDs = []uint32{1000}
		if s := show(other); s.Matches || len(s.Missing) == 0 || len(s.Surplus) == 0 {
			t.Errorf("of another configuration: %+v", s)
		}
		install(other, true)
		install(other, false)

		large := config()
		for i := range capture.MaxEntries {
			large.Outbound.ExcludePorts = append(large.Outbound.ExcludePorts[:i:i], capture.PortRange{First: uint16(i + 1), Last: uint16(i + 2)})
			large.Outbound.Exclude = append(large.Outbound.Exclude[:i:i], netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i), 0, 0}), 16))
			large.Inbound.Exclude = append(large.Inbound.Exclude[:i:i], netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfd, byte(i)}), 128))
		}
		install(large, true)
		install(config(), true)

		// What somebody tampers with is seen, and mended.
		if err := ns.Do(func() error {
			c, err := nftables.New()
			if err != nil {
				return err
			}
			table := &nftables.Table{Name: "hanse", Family: nftables.TableFamilyINet}
			c.InsertRule(&nftables.Rule{Table: table, Chain: &nftables.Chain{Name: "app", Table: table}, Exprs: []expr.Any{&expr.Verdict{Kind: expr.VerdictReturn}}})
			return c.Flush()
		}); err != nil {
			t.Fatal(err)
		}
		if s := show(config()); s.Matches || !cmp.Equal(s.Surplus, []capture.Line{{Chain: "app", Text: "return"}}) || len(s.Missing) > 0 {
			t.Errorf("tampered: %+v", s)
		}
		install(config(), true)

		for _, want := range []bool{true, false} {
			if removed, err := rules.Remove("hanse"); err != nil || removed != want {
				t.Errorf("remove: %t, %v; want %t", removed, err, want)
			}
		}
		if d := cmp.Diff(before, ruleset(t, ns)); d != "" {
			t.Error("left behind: " + d)
		}
	})
}

// TestPlan: a golden of the whole table, in the words of nft.
func TestPlan(t *testing.T) {
	cfg := config()
	cfg.Outbound.Include = prefixes("10.0.0.0/8")
	cfg.Outbound.IncludePorts = []capture.PortRange{{First: 80, Last: 80}}
	cfg.Always = prefixes("240.0.0.0/4", "fd77::/64")
	var b strings.Builder
	for _, c := range capture.Plan(cfg).Chains {
		b.WriteString(strings.TrimSpace("chain "+c.Name+" { "+c.Hook) + "\n")
		for _, r := range c.Rules {
			fmt.Fprintf(&b, "\t%s\n", r.Text)
		}
	}
	want, err := os.ReadFile("testdata/plan.nft")
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), b.String()); d != "" {
		t.Error(d)
	}
}

func TestPermission(t *testing.T) {
	netns.Test(t, func(t *testing.T) {
		exe, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		if os.Getenv("HANSE_NO_CAPABILITIES") == "" {
			cmd := exec.Command(exe, "-test.run=^TestPermission$", "-test.v")
			cmd.Env = append(os.Environ(), "HANSE_NO_CAPABILITIES=1")
			cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER} // a namespace that owns no network
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			return
		}
		if _, err := capture.In("").Install(config()); !errors.Is(err, capture.ErrPermission) {
			t.Errorf("install without CAP_NET_ADMIN: %v", err)
		}
		if err := capture.Exempt(&capture.Config{Mark: mark, UIDs: []uint32{7}}); err == nil || !strings.Contains(err.Error(), "can set no mark") {
			t.Errorf("no mark and another user: %v", err)
		}
		if err := capture.Exempt(&capture.Config{Mark: mark, UIDs: []uint32{uint32(os.Geteuid())}}); err != nil {
			t.Errorf("the user is exempt: %v", err)
		}
	})
}

// pod is a namespace with addresses, a server elsewhere, and listeners that say what was captured.
type pod struct {
	t         *testing.T
	ns, world *netns.NS
}

func newPod(t *testing.T, cfg *capture.Config) *pod {
	t.Helper()
	p := &pod{t, netns.New(t), netns.New(t)}
	netns.Join(t, p.ns, p.world, "10.0.0.1/24,fd00::1/64", "10.0.0.2/24,fd00::2/64")
	p.ns.Route(t, "default", "10.0.0.2")
	p.ns.Route(t, "default", "fd00::2")
	for _, at := range []string{"127.0.0.1:15002", "[::1]:15002", ":15006"} {
		p.serve(p.ns, at, func(c net.Conn) string {
			original, err := capture.Original(c)
			if err != nil {
				return err.Error()
			}
			if original.String() == c.LocalAddr().String() {
				return "itself"
			}
			return "captured " + original.String()
		})
	}
	for _, at := range []string{"127.0.0.1:15053", "[::1]:15053"} {
		p.serve(p.ns, at, func(net.Conn) string { return "dns" })
		pc, err := p.ns.ListenPacket("udp", at)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = pc.Close() })
		go func() {
			buf := make([]byte, 512)
			for {
				_, from, err := pc.ReadFrom(buf)
				if err != nil {
					return
				}
				_, _ = pc.WriteTo([]byte("dns"), from)
			}
		}()
	}
	for _, port := range []string{"80", "25", "9005", "15008", "22", "53"} {
		p.serve(p.ns, ":"+port, func(net.Conn) string { return "pod" })
		p.serve(p.world, ":"+port, func(net.Conn) string { return "world" })
	}
	if _, err := capture.In(p.ns.Path()).Install(cfg); err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *pod) serve(ns *netns.NS, at string, say func(net.Conn) string) {
	p.t.Helper()
	ln, err := ns.Listen("tcp", at)
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { _ = ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			fmt.Fprintln(c, say(c))
			_ = c.Close()
		}
	}()
}

func ask(ns *netns.NS, d *net.Dialer, to string) string {
	if d == nil {
		d = &net.Dialer{}
	}
	d.Timeout = 2 * time.Second
	c, err := ns.Dial(context.Background(), d, "tcp", to)
	if err != nil {
		return "no connection: " + err.Error()
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return "nothing: " + err.Error()
	}
	return strings.TrimSpace(line)
}

func TestRedirect(t *testing.T) {
	netns.Test(t, func(t *testing.T) {
		p := newPod(t, config())
		own := &net.Dialer{Control: capture.Control(mark)}
		for _, tc := range []struct {
			what string
			from *netns.NS
			d    *net.Dialer
			to   string
			want string
		}{
			{"outbound", p.ns, nil, "10.0.0.2:80", "captured 10.0.0.2:80"},
			{"outbound, an address that nobody has", p.ns, nil, "240.0.0.7:8080", "captured 240.0.0.7:8080"},
			{"outbound IPv6", p.ns, nil, "[fd00::2]:80", "captured [fd00::2]:80"},
			{"outbound to a port that others' hops have", p.ns, nil, "10.0.0.2:15008", "captured 10.0.0.2:15008"},
			{"own mark", p.ns, own, "10.0.0.2:80", "world"},
			{"own mark, IPv6", p.ns, own, "[fd00::2]:80", "world"},
			{"excluded port", p.ns, nil, "10.0.0.2:25", "world"},
			{"excluded range of ports", p.ns, nil, "10.0.0.2:9005", "world"},
			{"loopback", p.ns, nil, "127.0.0.1:80", "pod"},
			{"loopback IPv6", p.ns, nil, "[::1]:80", "pod"},
			{"its own address", p.ns, nil, "10.0.0.1:80", "pod"},
			{"its own address, IPv6", p.ns, nil, "[fd00::1]:80", "pod"},
			{"the listener itself", p.ns, nil, "127.0.0.1:15002", "itself"},
			{"DNS over TCP", p.ns, nil, "10.0.0.2:53", "dns"},
			{"DNS over TCP to loopback", p.ns, nil, "127.0.0.53:53", "dns"},
			{"DNS of its own", p.ns, own, "10.0.0.2:53", "world"},
			{"inbound", p.world, nil, "10.0.0.1:80", "captured 10.0.0.1:80"},
			{"inbound IPv6", p.world, nil, "[fd00::1]:80", "captured [fd00::1]:80"},
			{"inbound, nobody listens", p.world, nil, "10.0.0.1:81", "captured 10.0.0.1:81"},
			{"inbound to port 53", p.world, nil, "10.0.0.1:53", "captured 10.0.0.1:53"},
			{"the hop", p.world, nil, "10.0.0.1:15008", "pod"},
			{"inbound, excluded port", p.world, nil, "10.0.0.1:22", "pod"},
			{"the inbound listener itself", p.world, nil, "10.0.0.1:15006", "itself"},
		} {
			if got := ask(tc.from, tc.d, tc.to); got != tc.want {
				t.Errorf("%s: %s: %q, want %q", tc.what, tc.to, got, tc.want)
			}
		}
		for _, to := range []string{"10.0.0.2:53", "[fd00::2]:53", "127.0.0.53:53"} {
			c, err := p.ns.Dial(t.Context(), nil, "udp", to)
			if err != nil {
				t.Fatal(err)
			}
			_ = c.SetDeadline(time.Now().Add(2 * time.Second))
			_, _ = c.Write([]byte("?"))
			buf := make([]byte, 10)
			if n, err := c.Read(buf); string(buf[:n]) != "dns" {
				t.Errorf("DNS over UDP to %s: %q, %v", to, buf[:n], err)
			}
			_ = c.Close()
		}
		s, err := capture.In(p.ns.Path()).Show(config())
		if err != nil || !s.Matches {
			t.Fatalf("%+v, %v", s, err)
		}
		counted := uint64(0)
		for _, c := range s.Chains {
			for _, r := range c.Rules {
				if r.Packets != nil {
					counted += *r.Packets
				}
			}
		}
		if counted != 13 {
			t.Errorf("%d connections counted", counted)
		}
	})
}

// TestInclusions: only what is listed is captured, and the mesh's own addresses always.
func TestInclusions(t *testing.T) {
	netns.Test(t, func(t *testing.T) {
		cfg := config()
		cfg.UIDs = nil
		cfg.OnlyUIDs = []uint32{0} // in this namespace
		cfg.Outbound = capture.Selection{Include: prefixes("10.0.0.0/24"), IncludePorts: []capture.PortRange{{First: 80, Last: 81}}}
		cfg.Always = prefixes("240.0.0.0/4", "fd77::/64")
		cfg.Inbound = capture.Selection{IncludePorts: []capture.PortRange{{First: 80, Last: 80}}, Exclude: prefixes("fd00::2/128")}
		p := newPod(t, cfg)
		for _, tc := range []struct {
			from     *netns.NS
			to, want string
		}{
			{p.ns, "10.0.0.2:80", "captured 10.0.0.2:80"},
			{p.ns, "10.0.0.2:22", "world"},
			{p.ns, "[fd00::2]:80", "world"},
			{p.ns, "240.0.0.1:5432", "captured 240.0.0.1:5432"},
			{p.ns, "[fd77::1]:5432", "captured [fd77::1]:5432"},
			{p.world, "10.0.0.1:80", "captured 10.0.0.1:80"},
			{p.world, "10.0.0.1:9005", "pod"},
			{p.world, "[fd00::1]:80", "pod"},
		} {
			if got := ask(tc.from, nil, tc.to); got != tc.want {
				t.Errorf("%s: %q, want %q", tc.to, got, tc.want)
			}
		}
		cfg.OnlyUIDs, cfg.UIDs = nil, []uint32{0}
		if _, err := capture.In(p.ns.Path()).Install(cfg); err != nil {
			t.Fatal(err)
		}
		if got := ask(p.ns, nil, "10.0.0.2:80"); got != "world" {
			t.Errorf("of an exempt user: %q", got)
		}
		cfg.OnlyUIDs, cfg.UIDs = []uint32{1000}, nil
		if _, err := capture.In(p.ns.Path()).Install(cfg); err != nil {
			t.Fatal(err)
		}
		if got := ask(p.ns, nil, "10.0.0.2:80"); got != "world" {
			t.Errorf("of a user who is not captured: %q", got)
		}
	})
}

// TestOlderConnections: what was open before goes on untouched.
func TestOlderConnections(t *testing.T) {
	netns.Test(t, func(t *testing.T) {
		a, b := netns.New(t), netns.New(t)
		netns.Join(t, a, b, "10.0.0.1/24", "10.0.0.2/24")
		ln, err := b.Listen("tcp", "10.0.0.2:80")
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		c, err := a.Dial(t.Context(), nil, "tcp", "10.0.0.2:80")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		s, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		talk := func(when string) {
			t.Helper()
			buf := make([]byte, 1)
			for _, d := range [][2]net.Conn{{c, s}, {s, c}} {
				_ = d[1].SetReadDeadline(time.Now().Add(3 * time.Second))
				if _, err := d[0].Write([]byte("x")); err != nil {
					t.Fatalf("%s: %v", when, err)
				}
				if _, err := io.ReadFull(d[1], buf); err != nil {
					t.Fatalf("%s: %v", when, err)
				}
			}
		}
		talk("before")
		rules := capture.In(a.Path())
		if _, err := rules.Install(config()); err != nil {
			t.Fatal(err)
		}
		talk("installed")
		if _, err := rules.Remove("hanse"); err != nil {
			t.Fatal(err)
		}
		talk("removed")
	})
}

// TestReplace: captured connections go on while the rules are changed, and end when they are removed.
func TestReplace(t *testing.T) {
	netns.Test(t, func(t *testing.T) {
		a, b := netns.New(t), netns.New(t)
		netns.Join(t, a, b, "10.0.0.1/24", "10.0.0.2/24")
		ln, err := a.Listen("tcp", "127.0.0.1:15002")
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		rules, cfg := capture.In(a.Path()), config()
		if _, err := rules.Install(cfg); err != nil {
			t.Fatal(err)
		}
		c, err := a.Dial(t.Context(), nil, "tcp", "10.0.0.2:80")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		s, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		talk := func() error {
			_ = s.SetReadDeadline(time.Now().Add(3 * time.Second))
			if _, err := c.Write([]byte("x")); err != nil {
				return err
			}
			_, err := io.ReadFull(s, make([]byte, 1))
			return err
		}
		for i := range 5 {
			if err := talk(); err != nil {
				t.Fatalf("after %d changes: %v", i, err)
			}
			cfg.DNSPort = uint16(15053 + i)
			if changed, err := rules.Install(cfg); err != nil || changed != (i > 0) {
				t.Fatalf("install: %t, %v", changed, err)
			}
		}
		if _, err := rules.Remove("hanse"); err != nil {
			t.Fatal(err)
		}
		if talk() == nil {
			t.Error("it goes on without rules: docs/capture.md says otherwise")
		}
	})
}
