package sidecar_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/hanse-mesh/hanse/proxy"
	"github.com/hanse-mesh/hanse/proxy/proxytest"
	"github.com/hanse-mesh/hanse/proxy/sidecar"
)

// addresses are the services of a test's mesh by address.
type addresses struct {
	mu   sync.Mutex
	at   map[string]*proxy.Service
	down bool // no control plane answers
}

func (a *addresses) ServiceAt(_ context.Context, address netip.Addr) (*proxy.Service, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if s := a.at[address.String()]; s != nil {
		return s, nil
	}
	if a.down {
		return nil, errors.New("no control plane answers")
	}
	return nil, proxy.ErrUnknown
}

// kernel stands for what the rules of the kernel do: connections that an application made to an address arrive at a listener.
type kernel struct {
	t    testing.TB
	ln   net.Listener
	made sync.Map // by the application's end: where it was connected to
}

func newKernel(t testing.TB) *kernel { return &kernel{t: t, ln: listen(t)} }

func (k *kernel) original(c net.Conn) (netip.AddrPort, error) {
	for range 2000 { // the connection may arrive before connect knows its own end
		if to, ok := k.made.Load(c.RemoteAddr().String()); ok {
			return to.(netip.AddrPort), nil
		}
		time.Sleep(time.Millisecond)
	}
	return netip.ParseAddrPort(c.LocalAddr().String())
}

// connect is the application's connect.
func (k *kernel) connect(to string) net.Conn {
	k.t.Helper()
	c, err := net.Dial("tcp", k.ln.Addr().String())
	if err != nil {
		k.t.Fatal(err)
	}
	k.made.Store(c.LocalAddr().String(), netip.MustParseAddrPort(to))
	k.t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	return c
}

// http is an application that resolves every name to an address.
func (k *kernel) http(to string, h2 bool) *http.Client {
	p := new(http.Protocols)
	p.SetHTTP1(!h2)
	p.SetUnencryptedHTTP2(h2)
	tr := &http.Transport{Protocols: p, DisableCompression: true, DialContext: func(context.Context, string, string) (net.Conn, error) { return k.connect(to), nil }}
	k.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

func (k *kernel) outbound(a proxy.Addresses, change ...func(*sidecar.Capture)) func(*sidecar.Config) {
	return func(c *sidecar.Config) {
		c.Capture = sidecar.Capture{Outbound: []net.Listener{k.ln}, Original: k.original, Addresses: a, Sniff: time.Second}
		for _, f := range change {
			f(&c.Capture)
		}
	}
}

func (k *kernel) inbound(change ...func(*sidecar.Capture)) func(*sidecar.Config) {
	return func(c *sidecar.Config) {
		c.Capture = sidecar.Capture{Inbound: []net.Listener{k.ln}, Original: k.original, Sniff: time.Second}
		for _, f := range change {
			f(&c.Capture)
		}
	}
}

func service(protocol proxy.Protocol) *proxy.Service {
	return &proxy.Service{Host: "payments.shop.svc.clusterset.local", Ports: []proxy.ServicePort{{Number: 8080, Protocol: protocol}}}
}

// isReset reports whether the other end refused.
func isReset(c net.Conn) error {
	_, err := c.Read(make([]byte, 1))
	if !errors.Is(err, syscall.ECONNRESET) {
		return fmt.Errorf("want a reset, got %v", err)
	}
	return nil
}

func counted(t testing.TB, reg *prometheus.Registry, name string, labels ...string) float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	total := 0.0
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			found := 0
			for _, l := range m.GetLabel() {
				for i := 0; i < len(labels); i += 2 {
					if l.GetName() == labels[i] && l.GetValue() == labels[i+1] {
						found++
					}
				}
			}
			if 2*found == len(labels) {
				total += m.GetCounter().GetValue()
			}
		}
	}
	return total
}

// TestCapturedHTTP: the address says which service is called, whatever host the application names, and that host arrives.
func TestCapturedHTTP(t *testing.T) {
	k := newKernel(t)
	mesh := &addresses{at: map[string]*proxy.Service{"240.0.0.7": service(proxy.HTTP)}}
	front, _ := pairWith(t, proxy.HTTP, app(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%s %s %s", r.Host, r.URL, r.Header.Get("X-Forwarded-Client-Cert"))
	})), k.outbound(mesh))
	for _, h2 := range []bool{false, true} {
		resp, err := k.http("240.0.0.7:8080", h2).Get("http://pay.example:8080/x?y=1")
		want := "pay.example:8080 /x?y=1 URI=spiffe://west.test/ns/shop/sa/frontend"
		if got := text(t, resp, err); got != want || (resp.ProtoMajor == 2) != h2 {
			t.Errorf("HTTP/2 %t: %s by %s; want %s", h2, got, resp.Proto, want)
		}
	}
	c := k.connect("240.0.0.7:8080")
	fmt.Fprint(c, "CONNECT elsewhere:80 HTTP/1.1\r\nHost: elsewhere:80\r\n\r\n")
	if resp, err := http.ReadResponse(bufio.NewReader(c), nil); err != nil || resp.StatusCode != 400 {
		t.Errorf("CONNECT to an application: %v, %v", resp, err)
	}
	eventually(t, "an access log", func() bool { return strings.Contains(front.log.String(), `"path":"/x"`) })
	if err := isReset(k.connect("240.0.0.7:8081")); err != nil {
		t.Errorf("a port that is not declared: %v", err)
	}
}

// TestCapturedTCP: a server that speaks first is not waited for, nor made to wait.
func TestCapturedTCP(t *testing.T) {
	mesh := &addresses{at: map[string]*proxy.Service{"240.0.0.7": service(proxy.TCP), "240.0.0.8": service("")}}
	for to, sniff := range map[string]time.Duration{"240.0.0.7:8080": time.Hour, "240.0.0.8:8080": 200 * time.Millisecond} {
		k := newKernel(t)
		_, _ = pairWith(t, proxy.TCP, tcpApp(t), k.outbound(mesh, func(c *sidecar.Capture) { c.Sniff = sniff }))
		start := time.Now()
		c := k.connect(to)
		if line, err := bufio.NewReader(c).ReadString('\n'); err != nil || line != "hello\n" {
			t.Fatalf("%s: %q, %v", to, line, err)
		}
		if took := time.Since(start); took < sniff && sniff != time.Hour { // with sniffing it would not have come in an hour
			t.Errorf("%s: the banner came after %s, before the caller was listened to for %s", to, took, sniff)
		}
		_, _ = io.WriteString(c, "data")
		_ = c.(*net.TCPConn).CloseWrite()
		if b, err := io.ReadAll(c); err != nil || string(b) != "data" {
			t.Errorf("%s: %q, %v", to, b, err)
		}
	}
}

// TestSniffedHTTP: what speaks HTTP on a port without a declared protocol is served as HTTP.
func TestSniffedHTTP(t *testing.T) {
	k := newKernel(t)
	mesh := &addresses{at: map[string]*proxy.Service{"240.0.0.7": service("")}}
	front, _ := pairWith(t, proxy.HTTP, app(t, says("ok")), k.outbound(mesh))
	for _, h2 := range []bool{false, true} {
		resp, err := k.http("240.0.0.7:8080", h2).Get("http://payments/x")
		if got := text(t, resp, err); got != "ok" {
			t.Errorf("HTTP/2 %t: %s", h2, got)
		}
	}
	eventually(t, "two exchanges in the access log", func() bool { return strings.Count(front.log.String(), `"method":"GET"`) == 2 })
}

// TestCapturedEndpoint: an endpoint's own address means that one, without the service's routes.
func TestCapturedEndpoint(t *testing.T) {
	for _, protocol := range []proxy.Protocol{proxy.HTTP, proxy.TCP} {
		west := proxytest.NewDomain(t, "west.test")
		k := newKernel(t)
		mesh := &addresses{at: map[string]*proxy.Service{}}
		front := start(t, west.Source("/ns/shop/sa/frontend"), k.outbound(mesh))
		var endpoints []*proxy.Endpoint
		for i := range 4 {
			name := fmt.Sprintf("e%d", i)
			address := app(t, says(name))
			if protocol == proxy.TCP {
				address = banner(t, name)
			}
			pay := start(t, west.Source("/ns/shop/sa/payments"), func(c *sidecar.Config) { c.Apps[8080] = address })
			pay.serves(protocol, authority)
			endpoints = append(endpoints, pay.endpoint(name))
			s := service(protocol)
			s.Headless, s.Endpoint = true, name
			mesh.at[fmt.Sprintf("10.0.0.%d", i)] = s
		}
		front.calls(protocol, authority, endpoints)
		if protocol == proxy.HTTP {
			front.route(func(r *proxy.Route) { r.DirectStatus = 418 })
		}
		for i := range 8 {
			name, to := fmt.Sprintf("e%d", i%4), fmt.Sprintf("10.0.0.%d:8080", i%4)
			got := ""
			if protocol == proxy.TCP {
				got, _ = bufio.NewReader(k.connect(to)).ReadString('\n')
			} else {
				resp, err := k.http(to, false).Get("http://payments/")
				got = text(t, resp, err)
			}
			if strings.TrimSpace(got) != name {
				t.Errorf("%s: %s is answered by %q", protocol, to, got)
			}
		}
	}
}

// banner is a server that says one line.
func banner(t testing.TB, line string) string {
	ln := listen(t)
	t.Cleanup(func() { _ = ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			fmt.Fprintln(c, line)
			go func() {
				_, _ = io.Copy(io.Discard, c)
				_ = c.Close()
			}()
		}
	}()
	return ln.Addr().String()
}

func TestOutside(t *testing.T) {
	for _, deny := range []bool{false, true} {
		t.Run(fmt.Sprintf("deny %t", deny), func(t *testing.T) {
			k, reg := newKernel(t), prometheus.NewRegistry()
			to := banner(t, "outside")
			gone := listen(t)
			_ = gone.Close()
			mesh := &addresses{}
			west := proxytest.NewDomain(t, "west.test")
			front := start(t, west.Source("/ns/shop/sa/frontend"), k.outbound(mesh, func(c *sidecar.Capture) { c.DenyOutside = deny }), func(c *sidecar.Config) { c.Metrics = reg })
			c := k.connect(to)
			if deny {
				if err := isReset(c); err != nil {
					t.Error(err)
				}
				eventually(t, "a denied connection", func() bool {
					return counted(t, reg, "hanse_outside_connections_total", "destination", to, "decision", "denied") == 1 && strings.Contains(front.log.String(), to)
				})
				return
			}
			if line, err := bufio.NewReader(c).ReadString('\n'); err != nil || line != "outside\n" {
				t.Errorf("%q, %v", line, err)
			}
			if err := isReset(k.connect(gone.Addr().String())); err != nil {
				t.Errorf("nobody there: %v", err)
			}
			_ = c.Close()
			eventually(t, "an allowed connection", func() bool {
				return counted(t, reg, "hanse_outside_connections_total", "destination", to, "decision", "allowed") == 1 && strings.Contains(front.log.String(), `"endpoint":"`+to+`"`)
			})
			// Without a control plane, what was known to be outside stays so; of what was not, nobody can say.
			mesh.mu.Lock()
			mesh.down = true
			mesh.mu.Unlock()
			if line, err := bufio.NewReader(k.connect(to)).ReadString('\n'); err != nil || line != "outside\n" {
				t.Errorf("without a control plane: %q, %v", line, err)
			}
			if err := isReset(k.connect("127.0.0.9:80")); err != nil {
				t.Errorf("without a control plane, to an unknown address: %v", err)
			}
			eventually(t, "the reason", func() bool { return strings.Contains(front.log.String(), "control_plane_unavailable") })
		})
	}
}

// TestLoops: neither a connection to the listener itself nor one of the sidecar's own is served.
func TestLoops(t *testing.T) {
	a, b := listen(t), listen(t)
	var turns atomic.Int32
	west := proxytest.NewDomain(t, "west.test")
	start(t, west.Source("/ns/shop/sa/frontend"), func(c *sidecar.Config) {
		// Each listener's connections are said to be made to the other: what is passed on comes back.
		c.Capture = sidecar.Capture{Outbound: []net.Listener{a, b}, Original: func(c net.Conn) (netip.AddrPort, error) {
			if turns.Add(1) > 50 {
				t.Error("it goes round and round")
				return netip.AddrPort{}, errors.New("enough")
			}
			if c.LocalAddr().String() == a.Addr().String() {
				return netip.MustParseAddrPort(b.Addr().String()), nil
			}
			return netip.MustParseAddrPort(a.Addr().String()), nil
		}}
	})
	c, err := net.Dial("tcp", a.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a loop gives %v", err)
	}
	k := newKernel(t)
	start(t, west.Source("/ns/shop/sa/frontend"), k.outbound(nil))
	itself := k.connect(k.ln.Addr().String())
	if err := isReset(itself); err != nil {
		t.Errorf("to the listener itself: %v", err)
	}
}

// plaintextNode is a payments whose callers are captured.
func plaintextNode(t *testing.T, k *kernel, appAddress string, protocol proxy.Protocol, change func(*sidecar.Capture)) (*node, *prometheus.Registry) {
	reg := prometheus.NewRegistry()
	west := proxytest.NewDomain(t, "west.test")
	n := start(t, west.Source("/ns/shop/sa/payments"), k.inbound(change), func(c *sidecar.Config) {
		c.Metrics = reg
		c.Apps[8080] = appAddress
	})
	n.serves(protocol, authority)
	n.control.change(func(t *proxy.Table) {
		t.Inbound.Ports[0].Access = proxy.Access{TrustDomain: "west.test", DefaultAllow: true}
	})
	return n, reg
}

func TestPlaintextIsRefused(t *testing.T) {
	k := newKernel(t)
	n, reg := plaintextNode(t, k, app(t, says("ok")), proxy.HTTP, func(c *sidecar.Capture) { c.Exempt = []uint16{9090} })
	c := k.connect("10.0.0.1:8080")
	if err := isReset(c); err != nil {
		t.Error(err)
	}
	eventually(t, "that it is counted and named", func() bool {
		return counted(t, reg, "hanse_plaintext_inbound_total", "source", "127.0.0.1", "port", "8080", "decision", "refused") == 1 &&
			strings.Contains(n.log.String(), `"peer":"`+c.LocalAddr().String()+`"`) && strings.Contains(n.log.String(), `"error":"plaintext_refused"`)
	})
}

func TestPlaintextExempt(t *testing.T) {
	k := newKernel(t)
	n, reg := plaintextNode(t, k, app(t, says("ok")), proxy.HTTP, func(c *sidecar.Capture) { c.Exempt = []uint16{8080} })
	n.control.change(func(t *proxy.Table) { t.Inbound.Ports[0].Access = proxy.Access{TrustDomain: "west.test"} })
	resp, err := k.http("10.0.0.1:8080", false).Get("http://10.0.0.1:8080/healthz")
	if got := text(t, resp, err); got != "ok" || resp.StatusCode != 200 {
		t.Errorf("%d %s", resp.StatusCode, got)
	}
	eventually(t, "that it is counted", func() bool {
		return counted(t, reg, "hanse_plaintext_inbound_total", "port", "8080", "decision", "exempt") == 1
	})
	if err := isReset(k.connect("10.0.0.1:8081")); err != nil {
		t.Errorf("another port: %v", err)
	}
}

func TestPlaintextIsPermitted(t *testing.T) {
	k := newKernel(t)
	n, reg := plaintextNode(t, k, app(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%s %s %s", r.Host, r.URL.Path, r.Header.Get("X-Forwarded-Client-Cert"))
	})), proxy.HTTP, func(c *sidecar.Capture) { c.Permissive = true })
	ask := func(h2 bool) (int, string) {
		req, _ := http.NewRequestWithContext(t.Context(), "GET", "http://pay.example/secret?key=1", nil)
		req.Header.Set("X-Forwarded-Client-Cert", "URI=spiffe://evil")
		resp, err := k.http("10.0.0.1:8080", h2).Do(req)
		return resp.StatusCode, text(t, resp, err)
	}
	for i, h2 := range []bool{false, true} {
		if status, got := ask(h2); status != 200 || got != "pay.example /secret " {
			t.Errorf("%d %q", status, got)
		}
		eventually(t, "that it is counted and named", func() bool {
			return counted(t, reg, "hanse_plaintext_inbound_total", "source", "127.0.0.1", "port", "8080", "decision", "permitted") == float64(i+1) &&
				strings.Count(n.log.String(), `"path":"/secret"`) == i+1 && strings.Count(n.log.String(), `"policy":"plaintext permitted"`) == i+1
		})
	}
	if strings.Contains(n.log.String(), "key=1") {
		t.Error("a query is in the access log")
	}
	// A policy that asks who calls is not answered by plaintext.
	n.control.change(func(t *proxy.Table) {
		in := *t.Inbound
		in.Ports = append([]proxy.InboundPort(nil), in.Ports...)
		in.Ports[0].Access = proxy.Access{TrustDomain: "west.test", Allow: []proxy.AccessRule{{Policy: "p"}}}
		t.Inbound = &in
	})
	if status, got := ask(false); status != 403 || !strings.Contains(got, "plaintext_refused") {
		t.Errorf("with a policy: %d %s", status, got)
	}
	if got := counted(t, reg, "hanse_plaintext_inbound_total", "decision", "refused"); got != 1 {
		t.Errorf("%v refused", got)
	}
}

func TestPlaintextTCP(t *testing.T) {
	k := newKernel(t)
	other := banner(t, "other")
	_, reg := plaintextNode(t, k, banner(t, "first"), proxy.TCP, func(c *sidecar.Capture) { c.Permissive = true })
	for to, want := range map[string]string{"10.0.0.1:8080": "first\n", other: "other\n"} { // the second is declared nowhere
		if line, err := bufio.NewReader(k.connect(to)).ReadString('\n'); err != nil || line != want {
			t.Errorf("%s: %q, %v", to, line, err)
		}
	}
	if got := counted(t, reg, "hanse_plaintext_inbound_total", "decision", "permitted"); got != 2 {
		t.Errorf("%v counted", got)
	}
}

// TestDialIsUsed: connections of our own are opened by what exempts them.
func TestDialIsUsed(t *testing.T) {
	k := newKernel(t)
	to := banner(t, "outside")
	var marked sync.Map
	west := proxytest.NewDomain(t, "west.test")
	start(t, west.Source("/ns/shop/sa/frontend"), k.outbound(&addresses{}), func(c *sidecar.Config) {
		c.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
			marked.Store(address, true)
			return (&net.Dialer{}).DialContext(ctx, network, address)
		}
	})
	_, _ = bufio.NewReader(k.connect(to)).ReadString('\n')
	if _, ok := marked.Load(to); !ok {
		t.Error("a connection to the outside is not marked")
	}
}
