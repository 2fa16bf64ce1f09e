package dns

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/hanse-mesh/hanse/proxy"
)

// fake is a control plane's client.
type fake struct {
	mu       sync.Mutex
	services map[string]*proxy.Service
	at       map[netip.Addr]*proxy.Service
	down     bool
}

func (f *fake) Service(ctx context.Context, host string) (*proxy.Service, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch s := f.services[host]; {
	case s != nil:
		return s, nil
	case f.down:
		return nil, errors.New("no answer from the control plane")
	}
	return nil, fmt.Errorf("%s: %w", host, proxy.ErrUnknown)
}

func (f *fake) ServiceAt(ctx context.Context, a netip.Addr) (*proxy.Service, error) {
	if s := f.at[a]; s != nil {
		return s, nil
	}
	return nil, proxy.ErrUnknown
}

const (
	payments = "payments.shop.svc.clusterset.local"
	db       = "db.shop.svc.clusterset.local"
)

var real = netip.MustParseAddr("10.1.0.1")

func newFake() *fake {
	http := []proxy.ServicePort{{Number: 80, Name: "http", Protocol: proxy.HTTP}, {Number: 7070, Name: "grpc", Protocol: proxy.GRPC}}
	return &fake{
		services: map[string]*proxy.Service{
			payments: {Host: payments, Ports: http},
			db: {Host: db, Headless: true, Ports: []proxy.ServicePort{{Number: 5432, Name: "sql", Protocol: proxy.TCP}}, Endpoints: []proxy.ServiceEndpoint{
				{ID: "e1", Hostname: "db-0", Cluster: "west", Address: real, Flat: true, Targets: map[string]uint16{"sql": 15432}},
				{ID: "e2", Hostname: "db-0", Cluster: "east", Address: real, Targets: map[string]uint16{"sql": 15433}},
				{ID: "e3", Cluster: "east", Address: netip.MustParseAddr("10.1.0.3"), Targets: map[string]uint16{}},
			}},
			"empty.shop.svc.clusterset.local": {Host: "empty.shop.svc.clusterset.local", Headless: true, Ports: http},
		},
		at: map[netip.Addr]*proxy.Service{netip.MustParseAddr("10.43.0.7"): {Host: "own.shop.svc.cluster.local"}},
	}
}

func newPool(t testing.TB) *Pool {
	t.Helper()
	p, err := NewPool(netip.MustParsePrefix("240.0.0.0/4"), netip.MustParsePrefix("fd68:616e:7365::/64"), time.Now)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// started is a Server on loopback.
type started struct {
	*Server
	t    *testing.T
	addr string
	pool *Pool
	stop func()
}

func start(t *testing.T, control Control, change ...func(*Config)) *started {
	t.Helper()
	tcp, udp := listen(t)
	cfg := Config{UDP: []net.PacketConn{udp}, TCP: []net.Listener{tcp}, Control: control, Pool: newPool(t), Timeout: 300 * time.Millisecond, Registerer: prometheus.NewPedanticRegistry()}
	for _, f := range change {
		f(&cfg)
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	s.route6.Store(true) // whatever this machine has
	s.route6At.Store(1 << 60)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	stop := sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(stop)
	return &started{s, t, udp.LocalAddr().String(), cfg.Pool, stop}
}

// listen opens both at one port.
func listen(t *testing.T) (net.Listener, net.PacketConn) {
	t.Helper()
	for range 20 {
		tcp, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		udp, err := net.ListenPacket("udp", tcp.Addr().String())
		if err == nil {
			return tcp, udp
		}
		_ = tcp.Close()
	}
	t.Fatal("no port is free for both")
	return nil, nil
}

func (s *started) ask(name string, qtype uint16, change ...func(*dns.Msg)) *dns.Msg {
	s.t.Helper()
	return s.askBy("udp", name, qtype, change...)
}

func (s *started) askBy(network, name string, qtype uint16, change ...func(*dns.Msg)) *dns.Msg {
	s.t.Helper()
	m := new(dns.Msg)
	m.SetQuestion(name, qtype)
	for _, f := range change {
		f(m)
	}
	back, _, err := (&dns.Client{Net: network, Timeout: 5 * time.Second}).Exchange(m, s.addr)
	if err != nil {
		s.t.Fatalf("%s %s: %v", dns.TypeToString[qtype], name, err)
	}
	return back
}

// said is an answer in a line: the code, then the data of each record.
func said(m *dns.Msg) string {
	out := []string{dns.RcodeToString[m.Rcode]}
	for _, rr := range m.Answer {
		out = append(out, strings.TrimPrefix(rr.String(), rr.Header().String()))
	}
	slices.Sort(out[1:])
	if len(m.Ns) == 1 {
		if soa, ok := m.Ns[0].(*dns.SOA); ok {
			out = append(out, "SOA "+soa.Hdr.Name)
		}
	}
	return strings.Join(out, " | ")
}

func TestNames(t *testing.T) {
	s := start(t, newFake(), func(c *Config) { c.Namespace = "shop" })
	for _, c := range []struct {
		qtype      uint16
		name, want string
	}{
		{dns.TypeA, payments + ".", "NOERROR | 240.0.0.1"},
		{dns.TypeAAAA, payments + ".", "NOERROR | fd68:616e:7365::1"},
		{dns.TypeA, "PayMents.SHOP.svc.ClusterSet.local.", "NOERROR | 240.0.0.1"},
		{dns.TypeMX, payments + ".", "NOERROR | SOA clusterset.local."},
		{dns.TypeTXT, db + ".", "NOERROR | SOA clusterset.local."},
		{dns.TypeSRV, "_http._tcp." + payments + ".", "NOERROR | 0 100 80 payments.shop.svc.clusterset.local."},
		{dns.TypeSRV, "_GRPC._TCP." + payments + ".", "NOERROR | 0 100 7070 payments.shop.svc.clusterset.local."},
		{dns.TypeA, "_http._tcp." + payments + ".", "NOERROR | SOA clusterset.local."},
		{dns.TypeA, "_tcp." + payments + ".", "NOERROR | SOA clusterset.local."},
		{dns.TypeSRV, "_https._tcp." + payments + ".", "NXDOMAIN | SOA clusterset.local."},
		{dns.TypeSRV, "_http._udp." + payments + ".", "NXDOMAIN | SOA clusterset.local."},
		{dns.TypeSRV, "__tcp." + payments + ".", "NXDOMAIN | SOA clusterset.local."},
		{dns.TypeA, "nobody.shop.svc.clusterset.local.", "NXDOMAIN | SOA clusterset.local."},
		{dns.TypeA, "no_body.shop.svc.clusterset.local.", "NXDOMAIN | SOA clusterset.local."},
		{dns.TypeA, "shop.clusterset.local.", "NXDOMAIN | SOA clusterset.local."},
		{dns.TypeA, "shop.svc.clusterset.local.", "NOERROR | SOA clusterset.local."},
		{dns.TypeA, "svc.clusterset.local.", "NOERROR | SOA clusterset.local."},
		{dns.TypeA, "clusterset.local.", "NOERROR | SOA clusterset.local."},
		{dns.TypeA, "dns-version.clusterset.local.", "NOERROR | SOA clusterset.local."},
		{dns.TypeA, "x.db-0.west." + db + ".", "NXDOMAIN | SOA clusterset.local."},

		{dns.TypeA, db + ".", "NOERROR | 10.1.0.1 | 240.0.0.2 | 240.0.0.3"},
		{dns.TypeAAAA, db + ".", "NOERROR | fd68:616e:7365::2 | fd68:616e:7365::3"},
		{dns.TypeA, "db-0.west." + db + ".", "NOERROR | 10.1.0.1"},
		{dns.TypeAAAA, "db-0.west." + db + ".", "NOERROR | SOA clusterset.local."},
		{dns.TypeA, "10-1-0-3.east." + db + ".", "NOERROR | 240.0.0.3"},
		{dns.TypeA, "db-1.west." + db + ".", "NXDOMAIN | SOA clusterset.local."},
		{dns.TypeA, "db-0.north." + db + ".", "NXDOMAIN | SOA clusterset.local."},
		{dns.TypeA, "west." + db + ".", "NOERROR | SOA clusterset.local."},
		{dns.TypeA, "north." + db + ".", "NXDOMAIN | SOA clusterset.local."},
		{dns.TypeSRV, "_sql._tcp." + db + ".", "NOERROR | 0 100 15432 db-0.west.db.shop.svc.clusterset.local. | 0 100 15433 db-0.east.db.shop.svc.clusterset.local."},
		{dns.TypeA, "empty.shop.svc.clusterset.local.", "NXDOMAIN | SOA clusterset.local."},
		{dns.TypeSRV, "_http._tcp.empty.shop.svc.clusterset.local.", "NOERROR | SOA clusterset.local."},

		{dns.TypeA, "payments.", "NOERROR | 240.0.0.1"},
		{dns.TypeA, "payments.shop.", "NOERROR | 240.0.0.1"},
		{dns.TypeA, "payments.shop.svc.", "NOERROR | 240.0.0.1"},
		{dns.TypeMX, "payments.shop.", "NOERROR | SOA payments.shop."},
		{dns.TypeA, "nobody.shop.", "SERVFAIL"}, // another's, and there is no upstream
		{dns.TypeA, "payments.shop.svc.cluster.local.", "SERVFAIL"},

		{dns.TypePTR, "1.0.0.240.in-addr.arpa.", "NOERROR | payments.shop.svc.clusterset.local."},
		{dns.TypeA, "1.0.0.240.in-addr.arpa.", "NOERROR | SOA 1.0.0.240.in-addr.arpa."},
		{dns.TypePTR, "9.0.0.240.in-addr.arpa.", "NXDOMAIN | SOA 9.0.0.240.in-addr.arpa."},
		{dns.TypePTR, "1." + strings.Repeat("0.", 19) + "5.6.3.7.e.6.1.6.8.6.d.f.ip6.arpa.", "NOERROR | payments.shop.svc.clusterset.local."},
		{dns.TypePTR, "1.0.0.127.in-addr.arpa.", "SERVFAIL"},
	} {
		// Endpoints of the headless service are drawn in random order: give them their numbers first.
		s.pool.Assign(key{host: payments})
		s.pool.Assign(key{db, "e2"})
		s.pool.Assign(key{db, "e3"})
		m := s.ask(c.name, c.qtype)
		if got := said(m); got != c.want {
			t.Errorf("%s %s: %s, want %s", dns.TypeToString[c.qtype], c.name, got, c.want)
		}
		if m.Question[0].Name != c.name {
			t.Errorf("the question came back as %s", m.Question[0].Name)
		}
		for _, rr := range m.Answer {
			if rr.Header().Name != c.name || rr.Header().Ttl > 30 || rr.Header().Ttl == 0 {
				t.Errorf("record %s", rr)
			}
		}
		if n := len(m.Ns); n == 1 && m.Ns[0].Header().Ttl != ttlNegative {
			t.Errorf("%s", m.Ns[0])
		}
	}
	m := s.ask("dns-version.clusterset.local.", dns.TypeTXT)
	if len(m.Answer) != 1 || m.Answer[0].(*dns.TXT).Txt[0] != "1.0.0" || m.Answer[0].Header().Ttl != 28_800 {
		t.Errorf("the schema's version: %v", m.Answer)
	}
	m = s.ask("_http._tcp."+payments+".", dns.TypeSRV)
	if len(m.Extra) != 2 || m.Extra[0].(*dns.A).A.String() != "240.0.0.1" {
		t.Errorf("a SRV record comes without the addresses of its target: %v", m.Extra)
	}
	if got := testutil.ToFloat64(s.metrics.queries.WithLabelValues("mesh", "NXDOMAIN")); got < 5 {
		t.Errorf("%v queries counted as NXDOMAIN", got)
	}
}

func TestShortNamesOnlyOutsideKubernetes(t *testing.T) {
	s := start(t, newFake())
	for _, name := range []string{"payments.", "payments.shop.", "payments.shop.svc."} {
		if got := said(s.ask(name, dns.TypeA)); got != "SERVFAIL" {
			t.Errorf("%s: %s, want it to be none of ours", name, got)
		}
	}
}

func TestControlPlaneDown(t *testing.T) {
	up := newUpstream(t)
	f := newFake()
	f.down = true
	s := start(t, f, func(c *Config) { c.Namespace, c.Upstreams = "shop", []netip.AddrPort{up.addr} })
	if got := said(s.ask(payments+".", dns.TypeA)); got != "NOERROR | 240.0.0.1" {
		t.Errorf("what is known: %s", got)
	}
	if got := said(s.ask("nobody.shop.svc.clusterset.local.", dns.TypeA)); got != "SERVFAIL" {
		t.Errorf("what is not known must not be denied: %s", got)
	}
	if got := said(s.ask("example.com.", dns.TypeA)); got != "NOERROR | 192.0.2.1" {
		t.Errorf("what may be a short name: %s", got)
	}
}

func TestWithoutCapture(t *testing.T) {
	f := newFake()
	f.services["fixed.shop.svc.clusterset.local"] = &proxy.Service{Host: "fixed.shop.svc.clusterset.local"}
	s := start(t, f, func(c *Config) {
		c.NoAssign = true
		c.Fixed = map[string][]netip.Addr{"fixed.shop.svc.clusterset.local": {netip.MustParseAddr("127.0.0.2")}}
	})
	for name, want := range map[string]string{
		"fixed.shop.svc.clusterset.local.": "NOERROR | 127.0.0.2",
		payments + ".":                     "NOERROR | SOA clusterset.local.",
		db + ".":                           "NOERROR | 10.1.0.1",
	} {
		if got := said(s.ask(name, dns.TypeA)); got != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
	}
}

func TestMessages(t *testing.T) {
	s := start(t, newFake())
	for _, c := range []struct {
		name   string
		change func(*dns.Msg)
		want   int
	}{
		{"chaos", func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassCHAOS }, dns.RcodeRefused},
		{"transfer", func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeAXFR }, dns.RcodeRefused},
		{"update", func(m *dns.Msg) { m.Opcode = dns.OpcodeUpdate }, dns.RcodeNotImplemented},
		{"notify", func(m *dns.Msg) { m.Opcode = dns.OpcodeNotify }, dns.RcodeNotImplemented},
		{"two questions", func(m *dns.Msg) { m.Question = append(m.Question, m.Question[0]) }, dns.RcodeFormatError},
		{"none", func(m *dns.Msg) { m.Question = nil }, dns.RcodeFormatError},
		{"EDNS 1", func(m *dns.Msg) { m.SetEdns0(1232, false); m.IsEdns0().SetVersion(1) }, dns.RcodeBadVers},
		{"two OPT", func(m *dns.Msg) { m.SetEdns0(1232, false); m.SetEdns0(1232, false) }, dns.RcodeFormatError},
		{"EDNS", func(m *dns.Msg) { m.SetEdns0(1232, true) }, dns.RcodeSuccess},
	} {
		m := s.ask(payments+".", dns.TypeA, c.change)
		if m.Rcode != c.want {
			t.Errorf("%s: %s", c.name, dns.RcodeToString[m.Rcode])
		}
		if opt := m.IsEdns0(); strings.HasPrefix(c.name, "EDNS") && (opt == nil || opt.UDPSize() != advertisedUDP || opt.Version() != 0) {
			t.Errorf("%s: OPT %v", c.name, opt)
		} else if !strings.HasPrefix(c.name, "EDNS") && c.name != "two OPT" && opt != nil {
			t.Errorf("%s: an OPT that was not asked for", c.name)
		}
	}
	// A response is nothing to answer: two servers would talk for ever.
	c, err := net.Dial("udp", s.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	m := new(dns.Msg)
	m.SetQuestion(payments+".", dns.TypeA)
	m.Response = true
	raw, _ := m.Pack()
	_, _ = c.Write(raw)
	_, _ = c.Write([]byte("no DNS at all"))
	_ = c.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
	if n, err := c.Read(make([]byte, 100)); err == nil && n > headerSize {
		t.Errorf("%d bytes came back", n)
	}
}

func TestTruncation(t *testing.T) {
	f := newFake()
	big := &proxy.Service{Host: "big.shop.svc.clusterset.local", Headless: true}
	for i := range 400 {
		big.Endpoints = append(big.Endpoints, proxy.ServiceEndpoint{ID: fmt.Sprint(i), Cluster: "east", Address: netip.AddrFrom4([4]byte{10, 2, byte(i >> 8), byte(i)})})
	}
	f.services[big.Host] = big
	s := start(t, f)
	size := func(m *dns.Msg) int { m.Compress = true; return m.Len() }
	small := s.ask(big.Host+".", dns.TypeA)
	if !small.Truncated || size(small) > dns.MinMsgSize {
		t.Errorf("without EDNS: %d bytes, truncated %v", size(small), small.Truncated)
	}
	edns := s.ask(big.Host+".", dns.TypeA, func(m *dns.Msg) { m.SetEdns0(1232, false) })
	if !edns.Truncated || size(edns) > 1232 || len(edns.Answer) <= len(small.Answer) {
		t.Errorf("with EDNS: %d bytes, %d records, truncated %v", size(edns), len(edns.Answer), edns.Truncated)
	}
	tcp := s.askBy("tcp", big.Host+".", dns.TypeA)
	if tcp.Truncated || len(tcp.Answer) != maxRecords {
		t.Errorf("over TCP: %d records, truncated %v", len(tcp.Answer), tcp.Truncated)
	}
}

func TestServiceAt(t *testing.T) {
	f := newFake()
	s := start(t, f)
	a := Addresses{Pool: s.pool, Control: f}
	at := func(addr string) string {
		svc, err := a.ServiceAt(t.Context(), netip.MustParseAddr(addr))
		switch {
		case errors.Is(err, proxy.ErrUnknown):
			return "unknown"
		case err != nil:
			return err.Error()
		}
		out := svc.Host + " " + svc.Endpoint
		for _, p := range svc.Ports {
			out += fmt.Sprintf(" %d->%d", p.Number, p.Target)
		}
		return out
	}
	s.ask(payments+".", dns.TypeA)
	s.ask("db-0.east."+db+".", dns.TypeA)
	if got := at("10.1.0.1"); got != "unknown" {
		t.Errorf("an address that DNS has not told of: %s", got)
	}
	s.ask("db-0.west."+db+".", dns.TypeA)
	for addr, want := range map[string]string{
		"240.0.0.1":            payments + "  80->0 7070->0",
		"fd68:616e:7365::1":    payments + "  80->0 7070->0",
		"::ffff:240.0.0.1":     payments + "  80->0 7070->0",
		"240.0.0.2":            db + " e2 5432->15433",
		"10.1.0.1":             db + " e1 5432->15432",
		"10.43.0.7":            "own.shop.svc.cluster.local ",
		"192.0.2.1":            "unknown",
		"240.0.0.9":            "address 240.0.0.9 is not in use: look the name up again",
		"255.255.255.255":      "address 255.255.255.255 is not in use: look the name up again",
		"fd68:616e:7365:0:1::": "address fd68:616e:7365:0:1:: is not in use: look the name up again",
	} {
		if got := at(addr); got != want {
			t.Errorf("%s: %s, want %s", addr, got, want)
		}
	}
	f.mu.Lock()
	delete(f.services, payments)
	f.services[db] = &proxy.Service{Host: db, Headless: true, Ports: f.services[db].Ports}
	f.mu.Unlock()
	for addr, want := range map[string]string{
		"240.0.0.1": "address 240.0.0.1 was " + payments + ", which is gone",
		"240.0.0.2": db + " e2 5432->0", // whom to call is still certain
		"10.1.0.1":  "unknown",          // somebody else's now, perhaps
	} {
		if got := at(addr); got != want {
			t.Errorf("gone: %s: %s, want %s", addr, got, want)
		}
	}
}

func TestAddressesStayOverARestart(t *testing.T) {
	file := filepath.Join(t.TempDir(), "dns.json")
	keep := func(c *Config) { c.StateFile = file }
	names := []string{payments + ".", "db-0.east." + db + ".", "db-0.west." + db + "."}
	s := start(t, newFake(), keep)
	first := map[string]string{}
	for _, n := range names {
		first[n] = said(s.ask(n, dns.TypeA))
	}
	killed := s.pool.snapshot() // as a sidecar that is killed leaves it: without what comes now
	lost := said(s.ask("10-1-0-3.east."+db+".", dns.TypeA))
	s.stop()
	s = start(t, newFake(), keep)
	if got := said(s.ask("10-1-0-3.east."+db+".", dns.TypeA)); got != lost {
		t.Errorf("%s, before %s", got, lost)
	}
	s.stop()
	if killed == nil { // the Server was faster
		killed = &poolFile{Version: poolVersion, Next: s.pool.next}
		for _, n := range names[:2] {
			k := map[string]key{names[0]: {host: payments}, names[1]: {db, "e2"}}[n]
			killed.Entries = append(killed.Entries, poolEntry{Host: k.host, Endpoint: k.endpoint, Number: s.pool.keys[k].number, Used: 1})
		}
		killed.Next = killed.Entries[1].Number + 1
		killed.Entries = append(killed.Entries, poolEntry{Host: db, Endpoint: "e1", Address: real.String(), Used: 1})
	}
	b, err := json.Marshal(killed)
	if err == nil {
		err = os.WriteFile(file, b, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	s = start(t, newFake(), keep)
	for _, n := range names {
		if got := said(s.ask(n, dns.TypeA)); got != first[n] {
			t.Errorf("%s: %s, before %s", n, got, first[n])
		}
	}
	if k, known, _ := s.pool.At(real); !known || k != (key{db, "e1"}) {
		t.Errorf("%s is %v", real, k)
	}
	s.pool.Assign(key{host: "empty.shop.svc.clusterset.local"})
	if k, known, _ := s.pool.At(netip.MustParseAddr(strings.TrimPrefix(lost, "NOERROR | "))); known {
		t.Errorf("an address that was handed out and not kept is %v now", k)
	}
	s.stop()
	if err := os.WriteFile(file, []byte(`{"version":1,"entries":[{"host":"x","number":1,"used":1}]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	var log strings.Builder
	s = start(t, newFake(), keep, func(c *Config) { c.Log = slog.New(slog.NewTextHandler(&log, nil)) })
	if !strings.Contains(log.String(), "are not used") {
		t.Errorf("a damaged file is not told of: %s", log.String())
	}
	if got := said(s.ask(payments+".", dns.TypeA)); got == first[payments+"."] || !strings.HasPrefix(got, "NOERROR | 240.") {
		t.Errorf("after a damaged file: %s, before %s", got, first[payments+"."])
	}
}

func TestPoolForgetsWhatWasUsedLongestAgo(t *testing.T) {
	now := time.Unix(1000, 0)
	p, err := NewPool(netip.MustParsePrefix("240.0.0.0/24"), netip.Prefix{}, func() time.Time { return now })
	if err != nil {
		t.Fatal(err)
	}
	host := func(i int) key { return key{host: fmt.Sprintf("s%d.shop.svc.clusterset.local", i)} }
	busy, _ := p.Assign(host(0))
	seen := map[netip.Addr]int{}
	for i := range 2000 {
		now = now.Add(time.Second)
		a, _ := p.Assign(host(i))
		if k, known, ours := p.At(a); !known || !ours || k != host(i) {
			t.Fatalf("%s is %v", a, k)
		}
		if last, was := seen[a]; was && i-last < p.limit {
			t.Errorf("%s has another meaning after %d others", a, i-last)
		}
		seen[a] = i
		if n, _ := p.Size(); n > p.limit {
			t.Fatalf("%d entries, at most %d are kept", n, p.limit)
		}
		if at, _, _ := p.At(busy); at != host(0) {
			t.Fatalf("an address in use was given to %v", at)
		}
		if a.As4()[3] == 0 || a.As4()[3] == 255 {
			t.Errorf("%s was handed out", a)
		}
	}
	if _, n := p.Size(); n == 0 {
		t.Error("nothing was forgotten")
	}
}

func TestPoolRanges(t *testing.T) {
	for _, c := range []struct{ v4, v6 string }{{"240.0.0.0/25", ""}, {"240.0.0.1/24", ""}, {"fd00::/64", ""}, {"240.0.0.0/4", "fd00::/97"}, {"240.0.0.0/4", "10.0.0.0/8"}} {
		v6 := netip.Prefix{}
		if c.v6 != "" {
			v6 = netip.MustParsePrefix(c.v6)
		}
		if _, err := NewPool(netip.MustParsePrefix(c.v4), v6, time.Now); err == nil {
			t.Errorf("%v is accepted", c)
		}
	}
}

// upstreamServer is a resolver that knows example.com.
type upstreamServer struct {
	addr    netip.AddrPort
	mu      sync.Mutex
	queries int    // guarded by mu
	mode    string // guarded by mu: "", silent, refused, forged, truncated
}

func (u *upstreamServer) set(mode string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.mode = mode
}

func (u *upstreamServer) count() int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.queries
}

func newUpstream(t *testing.T) *upstreamServer {
	t.Helper()
	tcp, udp := listen(t)
	u := &upstreamServer{addr: netip.MustParseAddrPort(udp.LocalAddr().String())}
	handler := dns.HandlerFunc(func(w dns.ResponseWriter, r *dns.Msg) {
		u.mu.Lock()
		u.queries++
		mode := u.mode
		u.mu.Unlock()
		m := new(dns.Msg)
		m.SetReply(r)
		m.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: r.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 60}, A: net.IPv4(192, 0, 2, 1)}}
		switch mode {
		case "silent":
			return
		case "refused":
			m.Answer, m.Rcode = nil, dns.RcodeRefused
		case "truncated":
			if _, ok := w.RemoteAddr().(*net.UDPAddr); ok {
				m.Answer, m.Truncated = nil, true
			}
		case "forged":
			forged := m.Copy()
			forged.Answer[0].(*dns.A).A = net.IPv4(203, 0, 113, 66)
			forged.Id++
			_ = w.WriteMsg(forged)
			forged.Id--
			forged.Question[0].Name = "other.example."
			_ = w.WriteMsg(forged)
		}
		_ = w.WriteMsg(m)
	})
	for _, srv := range []*dns.Server{{Listener: tcp, Handler: handler}, {PacketConn: udp, Handler: handler}} {
		ready := make(chan struct{})
		srv.NotifyStartedFunc = func() { close(ready) }
		go func() { _ = srv.ActivateAndServe() }()
		<-ready
		t.Cleanup(func() { _ = srv.Shutdown() })
	}
	return u
}

func TestUpstreams(t *testing.T) {
	a, b := newUpstream(t), newUpstream(t)
	s := start(t, newFake(), func(c *Config) { c.Upstreams = []netip.AddrPort{a.addr, b.addr} })
	example := func(network string) string {
		m := s.askBy(network, "Example.com.", dns.TypeA)
		if m.Question[0].Name != "Example.com." {
			t.Errorf("the question came back as %s", m.Question[0].Name)
		}
		return said(m)
	}
	const good = "NOERROR | 192.0.2.1"
	for _, network := range []string{"udp", "tcp"} {
		if got := example(network); got != good {
			t.Errorf("%s: %s", network, got)
		}
	}
	a.set("forged")
	if got := example("udp"); got != good {
		t.Errorf("a forged answer: %s", got)
	}
	a.set("truncated")
	if m := s.ask("example.com.", dns.TypeA); !m.Truncated {
		t.Error("a truncated answer came without saying so")
	}
	if got := example("tcp"); got != good {
		t.Errorf("then over TCP: %s", got)
	}
	if n := b.count(); n != 0 {
		t.Errorf("the second upstream was asked %d times while the first answers", n)
	}
	a.set("refused")
	if got := example("udp"); got != good || b.count() != 1 {
		t.Errorf("an upstream that refuses: %s", got)
	}
	a.set("silent")
	if got := example("udp"); got != good {
		t.Errorf("an upstream that is down: %s", got)
	}
	before := a.count()
	for range 20 {
		if got := example("udp"); got != good {
			t.Errorf("after it was noticed: %s", got)
		}
	}
	if n := a.count() - before; n > 4 {
		t.Errorf("an upstream that is down was asked %d times by 20 queries", n)
	}
	b.set("silent")
	example("udp")
	for range 20 { // mesh names are answered, others fail, and both at once
		began := time.Now()
		if got := said(s.ask(payments+".", dns.TypeA)); got != "NOERROR | 240.0.0.1" {
			t.Errorf("without upstreams: %s", got)
		}
		if got := example("udp"); got != "SERVFAIL" {
			t.Errorf("without upstreams: %s", got)
		}
		if d := time.Since(began); d > 3*time.Second {
			t.Errorf("it took %s", d)
		}
	}
	a.set("")
	deadline := time.Now().Add(3 * maxPause)
	for example("udp") != good {
		if time.Now().After(deadline) {
			t.Fatal("an upstream that is back is not asked")
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func TestUpstreamsChange(t *testing.T) {
	a, b := netip.MustParseAddrPort("192.0.2.1:53"), netip.MustParseAddrPort("192.0.2.2:53")
	f := newForwarder(&Config{Upstreams: []netip.AddrPort{a}}, slog.New(slog.DiscardHandler), nil)
	first := (*f.upstreams.Load())[0]
	if f.set([]netip.AddrPort{a}) {
		t.Error("the same is a change")
	}
	if !f.set([]netip.AddrPort{b, a}) || len(*f.upstreams.Load()) != 2 || (*f.upstreams.Load())[1] != first {
		t.Error("one that stays is not what it was")
	}
	if !f.set(nil) || len(*f.upstreams.Load()) != 0 {
		t.Error("none is no change")
	}
	synctest.Test(t, func(t *testing.T) {
		var fails atomic.Bool
		f := newForwarder(&Config{Upstreams: []netip.AddrPort{a}, Resolvers: func() ([]netip.AddrPort, error) {
			if fails.Load() {
				return nil, errors.New("permission denied")
			}
			return []netip.AddrPort{b}, nil
		}}, slog.New(slog.DiscardHandler), nil)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go f.watch(ctx)
		time.Sleep(watchEvery + 1)
		synctest.Wait()
		if u := *f.upstreams.Load(); len(u) != 1 || u[0].address != b {
			t.Errorf("upstreams %v", u)
		}
		fails.Store(true)
		time.Sleep(watchEvery)
		synctest.Wait()
		if u := *f.upstreams.Load(); len(u) != 1 {
			t.Errorf("an error has changed them to %v", u)
		}
	})
}

func TestNoLoop(t *testing.T) {
	tcp, udp := listen(t)
	self := netip.MustParseAddrPort(udp.LocalAddr().String())
	s := start(t, newFake(), func(c *Config) {
		c.UDP, c.TCP, c.Upstreams = []net.PacketConn{udp}, []net.Listener{tcp}, []netip.AddrPort{self}
	})
	s.addr = self.String()
	for _, network := range []string{"udp", "tcp"} {
		if m := s.askBy(network, "example.com.", dns.TypeA); m.Rcode != dns.RcodeRefused && m.Rcode != dns.RcodeServerFailure {
			t.Errorf("%s: %s", network, said(m))
		}
	}
	if n := testutil.ToFloat64(s.metrics.dropped.WithLabelValues("loop")); n < 1 || n > 4 {
		t.Errorf("%v queries of our own were counted", n)
	}
}

// recorder is the other end of a query.
type recorder struct {
	dns.ResponseWriter
	tcp bool
	got [][]byte
}

func (r *recorder) RemoteAddr() net.Addr {
	if r.tcp {
		return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1}
	}
	return &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1}
}

func (r *recorder) Write(b []byte) (int, error) {
	r.got = append(r.got, b)
	return len(b), nil
}

func (r *recorder) WriteMsg(m *dns.Msg) error {
	b, err := m.Pack()
	if err != nil {
		return err
	}
	_, err = r.Write(b)
	return err
}

// FuzzServe feeds queries as they come from an application: each that can be read gets one answer, to its own question, and no longer than it may be.
func FuzzServe(f *testing.F) {
	for _, name := range []string{payments + ".", "_sql._tcp." + db + ".", "db-0.west." + db + ".", "payments.", "example.com.", "1.0.0.240.in-addr.arpa."} {
		m := new(dns.Msg)
		m.SetQuestion(name, dns.TypeA)
		raw, err := m.Pack()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw, false)
		m.SetEdns0(1232, true)
		m.Question[0].Qtype = dns.TypeSRV
		raw, _ = m.Pack()
		f.Add(raw, true)
	}
	s, err := New(Config{Control: newFake(), Pool: newPool(f), Namespace: "shop"})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, raw []byte, tcp bool) {
		m := new(dns.Msg)
		if m.Unpack(raw) != nil || m.Response || len(m.Question) != 1 {
			return // the server has dealt with these
		}
		w := &recorder{tcp: tcp}
		s.serve(t.Context(), w, m)
		if len(w.got) != 1 {
			t.Fatalf("%d answers", len(w.got))
		}
		limit := dns.MinMsgSize
		if opt := m.IsEdns0(); opt != nil {
			limit = min(max(limit, int(opt.UDPSize())), maxUDP)
		}
		if tcp {
			limit = dns.MaxMsgSize
		}
		back := new(dns.Msg)
		if err := back.Unpack(w.got[0]); err != nil || back.Id != m.Id || !back.Response || len(w.got[0]) > limit {
			t.Fatalf("answer of %d bytes, at most %d: %v %v", len(w.got[0]), limit, back, err)
		}
		if len(back.Question) != 1 || back.Question[0] != m.Question[0] {
			t.Errorf("question %v, asked %v", back.Question, m.Question)
		}
	})
}

func BenchmarkService(b *testing.B) {
	s, err := New(Config{Control: newFake(), Pool: newPool(b)})
	if err != nil {
		b.Fatal(err)
	}
	m := new(dns.Msg)
	m.SetQuestion(payments+".", dns.TypeA)
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			s.serve(b.Context(), &recorder{}, m)
		}
	})
}

func BenchmarkServiceAt(b *testing.B) {
	a := Addresses{Pool: newPool(b), Control: newFake()}
	v4, _ := a.Pool.Assign(key{host: payments})
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := a.ServiceAt(b.Context(), v4); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func FuzzName(f *testing.F) {
	for _, s := range []string{payments + ".", "_http._tcp." + payments + ".", "db-0.west." + db + ".", "payments.", "a.b.", "1.0.0.240.in-addr.arpa.", ".", "svc.clusterset.local.", "a..svc.clusterset.local."} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, name string) {
		q := parse(strings.ToLower(name), "shop")
		if a, ok := reverse(name); ok && !a.IsValid() {
			t.Error("no address")
		}
		if q.kind <= between {
			return
		}
		host, ok := strings.CutSuffix(q.host, "."+strings.TrimSuffix(services, "."))
		svc, ns, dot := strings.Cut(host, ".")
		if !ok || !dot || !isLabel(svc) || !isLabel(ns) {
			t.Errorf("%q is of %q", name, q.host)
		}
		if !q.short && !strings.HasSuffix(strings.ToLower(name), q.host+".") {
			t.Errorf("%q is of %q", name, q.host)
		}
	})
}

func FuzzPoolFile(f *testing.F) {
	f.Add([]byte(`{"version":1,"next":3,"entries":[{"host":"payments.shop.svc.clusterset.local","number":1,"used":5},{"host":"db.shop.svc.clusterset.local","endpoint":"e1","address":"10.0.0.1","used":5}]}`))
	f.Add([]byte(`{"version":1,"next":3,"entries":[{"host":"x","number":4294967295,"used":-5}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		file, err := decodePool(b)
		if err != nil {
			return
		}
		p := newPool(t)
		if p.restore(file) != nil {
			if n, _ := p.Size(); n != 0 {
				t.Error("half of a bad file is in use")
			}
			return
		}
		a, _ := p.Assign(key{host: "new.shop.svc.clusterset.local"})
		if k, known, ours := p.At(a); !known || !ours || k.host != "new.shop.svc.clusterset.local" {
			t.Errorf("%s is %v", a, k)
		}
	})
}

func FuzzAnswers(f *testing.F) {
	m := new(dns.Msg)
	m.SetQuestion("example.com.", dns.TypeA)
	query, _ := m.Pack()
	m.Response = true
	back, _ := m.Pack()
	f.Add(query, back)
	f.Add(query, query)
	f.Fuzz(func(t *testing.T, query, back []byte) {
		if len(query) < headerSize {
			return
		}
		if answers(query, back) && (query[0] != back[0] || back[2]&0x80 == 0) {
			t.Error("another's answer was taken")
		}
	})
}
