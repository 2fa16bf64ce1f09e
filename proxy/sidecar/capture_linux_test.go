package sidecar_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/hanse-mesh/hanse/proxy"
	"github.com/hanse-mesh/hanse/proxy/balance"
	"github.com/hanse-mesh/hanse/proxy/capture"
	"github.com/hanse-mesh/hanse/proxy/hop"
	"github.com/hanse-mesh/hanse/proxy/proxytest"
	"github.com/hanse-mesh/hanse/proxy/sidecar"
	"github.com/hanse-mesh/hanse/test/netns"
)

const mark = 1503

// pod is a sidecar in a namespace whose rules lead connections to it.
type pod struct {
	*node
	ns    *netns.NS
	rules *capture.Config
	reg   *prometheus.Registry
}

func listenIn(t *testing.T, ns *netns.NS, address string) net.Listener {
	t.Helper()
	ln, err := ns.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	return ln
}

// newPod starts a sidecar at an address of a namespace, before whose application at 127.0.0.1:8080 it stands.
func newPod(t *testing.T, ns *netns.NS, address string, d *proxytest.Domain, path string, trusted *proxytest.Domain, mesh proxy.Addresses, change ...func(*sidecar.Config)) *pod {
	t.Helper()
	p := &pod{ns: ns, reg: prometheus.NewRegistry(), node: &node{t: t, control: newControl(), src: d.Source(path, trusted), log: &lines{}}}
	own := &net.Dialer{Timeout: 5 * time.Second, Control: capture.Control(mark)}
	dial := func(ctx context.Context, network, address string) (net.Conn, error) {
		return ns.Dial(ctx, own, network, address)
	}
	p.client = hop.NewClient(hop.ClientConfig{Source: p.src, Dial: dial, ConnectTimeout: 5 * time.Second})
	p.hop = netip.AddrPortFrom(netip.MustParseAddr(address), 15008)
	cfg := sidecar.Config{
		Source: p.src, Control: p.control, Hop: p.client, Balancer: balance.New(balance.Config{Ramp: -1}), Namespace: "shop",
		Locality: proxy.Locality{Cluster: "west"}, Workload: p.hop.Addr(), Apps: map[uint16]string{8080: "127.0.0.1:8080"}, DrainTimeout: time.Second,
		AccessLog: p.log, Metrics: p.reg, Dial: dial, Inbound: listenIn(t, ns, p.hop.String()),
		Capture: sidecar.Capture{
			Original: capture.Original, Addresses: mesh,
			Outbound: []net.Listener{listenIn(t, ns, "127.0.0.1:15002"), listenIn(t, ns, "[::1]:15002")}, Inbound: []net.Listener{listenIn(t, ns, ":15006")},
		},
	}
	for _, f := range change {
		f(&cfg)
	}
	s, err := sidecar.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	p.stop = run(t, s.Run)
	p.rules = &capture.Config{Table: "hanse", OutboundPort: 15002, InboundPort: 15006, Mark: mark, OwnPorts: []uint16{15008}}
	if _, err := capture.In(ns.Path()).Install(p.rules); err != nil {
		t.Fatal(err)
	}
	return p
}

// curl is an application that knows nothing of a mesh.
func (p *pod) curl(args ...string) string {
	p.t.Helper()
	cmd := exec.CommandContext(p.t.Context(), "curl", append([]string{"--silent", "--show-error", "--max-time", "10", "--noproxy", "*"}, args...)...)
	out, err := p.ns.Output(cmd)
	if err != nil {
		return fmt.Sprintf("%s(%v)", out, err)
	}
	return out
}

// web serves an application in a namespace, HTTP/1.1 and HTTP/2.
func web(t *testing.T, ln net.Listener, h http.Handler) {
	srv := httptest.NewUnstartedServer(h)
	srv.Listener = ln
	srv.Config.Protocols = new(http.Protocols)
	srv.Config.Protocols.SetHTTP1(true)
	srv.Config.Protocols.SetUnencryptedHTTP2(true)
	srv.Start()
	t.Cleanup(srv.CloseClientConnections)
	t.Cleanup(srv.Close)
}

// TestTransparentCapture: unchanged programs call through two sidecars of two trust domains, by the kernel's rules alone.
func TestTransparentCapture(t *testing.T) {
	if _, err := exec.LookPath("curl"); err != nil {
		t.Fatal("curl is needed: apt-get install curl")
	}
	netns.Test(t, func(t *testing.T) {
		a, b, world := netns.New(t), netns.New(t), netns.New(t)
		netns.Join(t, a, b, "10.0.0.1/24,fd00::1/64", "10.0.0.2/24,fd00::2/64")
		netns.Join(t, a, world, "10.0.9.1/24,fd09::1/64", "10.0.9.2/24,fd09::2/64")
		a.Route(t, "default", "10.0.9.2") // the mesh's addresses lead nowhere, but must lead somewhere
		a.Route(t, "default", "fd09::2")
		tcp := func(host string) *proxy.Service {
			return &proxy.Service{Host: host, Ports: []proxy.ServicePort{{Number: 25, Protocol: proxy.TCP}}}
		}
		const mail = "mail.shop.svc.clusterset.local:25"
		mesh := &addresses{at: map[string]*proxy.Service{"240.0.0.7": service(proxy.HTTP), "fd77::7": service(proxy.HTTP), "240.0.0.8": tcp("mail.shop.svc.clusterset.local")}}
		west, east := proxytest.NewDomain(t, "west.test"), proxytest.NewDomain(t, "east.test")

		web(t, listenIn(t, b, "127.0.0.1:8080"), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			body, _ := io.ReadAll(r.Body)
			fmt.Fprintf(w, "%s %s %s %s %s", r.Method, r.Host, r.URL, body, r.Header.Get("X-Forwarded-Client-Cert"))
		}))
		smtp := listenIn(t, b, "127.0.0.1:2525")
		t.Cleanup(func() { _ = smtp.Close() })
		go func() {
			for {
				c, err := smtp.Accept()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					fmt.Fprint(c, "220 mail ESMTP\r\n")
					line, _ := bufio.NewReader(c).ReadString('\n')
					fmt.Fprintf(c, "250 %s", line)
				}()
			}
		}()
		web(t, listenIn(t, world, ":80"), says("the world"))

		pay := newPod(t, b, "10.0.0.2", east, "/ns/shop/sa/payments", west, nil, func(c *sidecar.Config) { c.Apps[25] = "127.0.0.1:2525" })
		pay.serves(proxy.HTTP, authority)
		pay.control.change(func(t *proxy.Table) {
			in := *t.Inbound
			in.Address = netip.MustParseAddr("10.0.0.2")
			in.Ports = append([]proxy.InboundPort{{Services: []string{mail}, Port: 25, Protocol: proxy.TCP, Access: in.Ports[0].Access}}, in.Ports...)
			t.Inbound = &in
		})
		front := newPod(t, a, "10.0.0.1", west, "/ns/shop/sa/frontend", east, mesh)
		front.calls(proxy.HTTP, authority, []*proxy.Endpoint{pay.endpoint("e1")})
		front.calls(proxy.TCP, mail, []*proxy.Endpoint{pay.endpoint("e1")})

		const want = "POST pay.example:8080 /x?y=1 body URI=spiffe://west.test/ns/shop/sa/frontend"
		for _, version := range []string{"--http1.1", "--http2-prior-knowledge"} {
			for _, to := range []string{"240.0.0.7", "[fd77::7]"} {
				if got := front.curl(version, "--connect-to", "::"+to+":8080", "--data", "body", "http://pay.example:8080/x?y=1"); got != want {
					t.Errorf("curl %s to %s: %s\nwant %s", version, to, got, want)
				}
			}
		}
		// A server that speaks first.
		for range 3 {
			start := time.Now()
			c, err := a.Dial(t.Context(), nil, "tcp", "240.0.0.8:25")
			if err != nil {
				t.Fatal(err)
			}
			_ = c.SetDeadline(time.Now().Add(10 * time.Second))
			r := bufio.NewReader(c)
			greeting, err := r.ReadString('\n')
			t.Logf("greeted after %s", time.Since(start))
			fmt.Fprint(c, "EHLO me\r\n")
			answer, _ := r.ReadString('\n')
			if greeting != "220 mail ESMTP\r\n" || answer != "250 EHLO me\r\n" {
				t.Errorf("%q, %q, %v", greeting, answer, err)
			}
			_ = c.Close()
		}
		// What is none of the mesh's, and what is nobody's.
		for _, to := range []string{"10.0.9.2", "[fd09::2]"} {
			if got := front.curl("http://" + to + "/"); got != "the world" {
				t.Errorf("curl %s: %s", to, got)
			}
		}
		if got := front.curl("http://10.0.9.2:81/"); !strings.Contains(got, "exit status") {
			t.Errorf("nobody there: %s", got)
		}
		if got := front.curl("http://240.0.0.7:8081/"); !strings.Contains(got, "exit status") {
			t.Errorf("a port that is not declared: %s", got)
		}
		// Without mutual TLS nobody comes in, not even past the sidecar to the application's own port.
		for _, to := range []string{"10.0.0.2:8080", "[fd00::2]:8080", "10.0.0.2:2525", "10.0.0.2:15006"} {
			cmd := exec.Command("curl", "--silent", "--show-error", "--max-time", "10", "http://"+to+"/")
			if out, err := world.Output(cmd); err == nil {
				t.Errorf("world to %s without a route: %s", to, out)
			}
			if c, err := a.Dial(t.Context(), &net.Dialer{Timeout: 5 * time.Second, Control: capture.Control(mark)}, "tcp", to); err == nil {
				_ = c.SetDeadline(time.Now().Add(10 * time.Second))
				if err := isReset(c); err != nil {
					t.Errorf("%s in plaintext: %v", to, err)
				}
				_ = c.Close()
			} else if !strings.Contains(err.Error(), "reset") {
				t.Errorf("%s: %v", to, err)
			}
		}
		if got := counted(t, pay.reg, "hanse_plaintext_inbound_total", "decision", "refused"); got != 3 {
			t.Errorf("%v plaintext calls counted", got)
		}
		if got := counted(t, front.reg, "hanse_outside_connections_total", "decision", "allowed"); got != 3 {
			t.Errorf("%v connections to the outside counted", got)
		}
		// On the pod's own loopback, and by its own address, things are as ever.
		web(t, listenIn(t, a, ":9000"), says("neighbour"))
		for _, to := range []string{"127.0.0.1", "[::1]", "10.0.0.1", "[fd00::1]"} {
			if got := front.curl("http://" + to + ":9000/"); got != "neighbour" {
				t.Errorf("curl %s: %s", to, got)
			}
		}
		// Without rules the address leads nowhere.
		if _, err := capture.In(a.Path()).Remove("hanse"); err != nil {
			t.Fatal(err)
		}
		if got := front.curl("--max-time", "1", "http://240.0.0.7:8080/"); !strings.Contains(got, "exit status") {
			t.Errorf("without rules: %s", got)
		}
	})
}

// TestTransparentPermissive: plaintext comes in where that is asked for, by the kernel's rules, and to exempt ports in any case.
func TestTransparentPermissive(t *testing.T) {
	netns.Test(t, func(t *testing.T) {
		west := proxytest.NewDomain(t, "west.test")
		for _, permissive := range []bool{true, false} {
			a, b := netns.New(t), netns.New(t)
			netns.Join(t, a, b, "10.0.0.1/24,fd00::1/64", "10.0.0.2/24,fd00::2/64")
			web(t, listenIn(t, b, "127.0.0.1:8080"), says("ok"))
			web(t, listenIn(t, b, ":9090"), says("metrics"))
			pay := newPod(t, b, "10.0.0.2", west, "/ns/shop/sa/payments", west, nil, func(c *sidecar.Config) {
				c.Capture.Permissive, c.Capture.Exempt = permissive, []uint16{9090}
			})
			pay.serves(proxy.HTTP, authority)
			pay.control.change(func(t *proxy.Table) { t.Inbound.Ports[0].Access = proxy.Access{DefaultAllow: true} })
			caller := &pod{ns: a, node: &node{t: t}}
			for _, to := range []string{"10.0.0.2", "[fd00::2]"} {
				if got := caller.curl("http://" + to + ":9090/metrics"); got != "metrics" {
					t.Errorf("exempt: %s", got)
				}
				got := caller.curl("--http1.1", "http://"+to+":8080/path")
				if (got == "ok") != permissive {
					t.Errorf("permissive %t: %s", permissive, got)
				}
			}
			decision, from := "refused", `"peer":"10.0.0.1:`
			if permissive {
				decision = "permitted"
			}
			eventually(t, "calls named and counted", func() bool {
				return counted(t, pay.reg, "hanse_plaintext_inbound_total", "source", "10.0.0.1", "port", "8080", "decision", decision) == 1 &&
					counted(t, pay.reg, "hanse_plaintext_inbound_total", "port", "8080", "decision", decision) == 2 &&
					counted(t, pay.reg, "hanse_plaintext_inbound_total", "port", "9090", "decision", "exempt") == 2 &&
					strings.Contains(pay.log.String(), from) && strings.Contains(pay.log.String(), `"path":"/path"`) == permissive
			})
		}
	})
}

// TestTransparentLoop: a sidecar whose own connections are captured says so, and does not go round.
func TestTransparentLoop(t *testing.T) {
	netns.Test(t, func(t *testing.T) {
		a, world := netns.New(t), netns.New(t)
		netns.Join(t, a, world, "10.0.0.1/24", "10.0.0.2/24")
		web(t, listenIn(t, world, ":80"), says("the world"))
		west := proxytest.NewDomain(t, "west.test")
		front := newPod(t, a, "10.0.0.1", west, "/ns/shop/sa/frontend", west, &addresses{})
		front.rules.Mark++ // another than the sidecar sets
		if _, err := capture.In(a.Path()).Install(front.rules); err != nil {
			t.Fatal(err)
		}
		if got := front.curl("http://10.0.0.2/"); !strings.Contains(got, "exit status") {
			t.Errorf("curl: %s", got)
		}
		if got := counted(t, front.reg, "hanse_outside_connections_total"); got < 1 || got > 20 {
			t.Errorf("went round %v times", got)
		}
		if _, err := capture.In(a.Path()).Install(&capture.Config{Table: "hanse", OutboundPort: 15002, Mark: mark}); err != nil {
			t.Fatal(err)
		}
		if got := front.curl("http://10.0.0.2/"); got != "the world" {
			t.Errorf("mended: %s", got)
		}
	})
}
