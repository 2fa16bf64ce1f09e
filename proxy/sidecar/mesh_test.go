package sidecar_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/proxy"
	"github.com/hanse-mesh/hanse/proxy/balance"
	"github.com/hanse-mesh/hanse/proxy/gateway"
	"github.com/hanse-mesh/hanse/proxy/hop"
	"github.com/hanse-mesh/hanse/proxy/proxytest"
	"github.com/hanse-mesh/hanse/proxy/sidecar"
	"github.com/hanse-mesh/hanse/proxy/xdsclient"
)

// control is a control plane of Tables that the test sets.
type control struct {
	mu      sync.Mutex
	table   *proxy.Table
	changed chan struct{}
}

func newControl() *control {
	return &control{table: &proxy.Table{Version: 1}, changed: make(chan struct{})}
}

func (c *control) Table() *proxy.Table {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.table
}

func (c *control) Changed() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.changed
}

func (c *control) Resolve(_ context.Context, authority string) (*proxy.Listener, error) {
	if l := c.Table().Listeners[authority]; l != nil {
		return l, nil
	}
	return nil, xdsclient.ErrUnknown
}

// change publishes a copy of the Table that f has altered.
func (c *control) change(f func(*proxy.Table)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	next := *c.table
	next.Version++
	f(&next)
	c.table = &next
	close(c.changed)
	c.changed = make(chan struct{})
}

// node is one sidecar.
type node struct {
	t        testing.TB
	control  *control
	src      *identity.Source
	client   *hop.Client
	outbound string // 127.0.0.1:port
	hop      netip.AddrPort
	log      *lines
	stop     func()
}

// lines keeps access log lines.
type lines struct {
	mu  sync.Mutex
	buf strings.Builder
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

func listen(t testing.TB) net.Listener {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return ln
}

// accept has serve work on each connection, which ends with it, until the test ends.
func accept(t testing.TB, ln net.Listener, serve func(net.Conn)) {
	t.Cleanup(func() { _ = ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				serve(c)
			}()
		}
	}()
}

func run(t testing.TB, f func(context.Context) error) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := f(ctx); err != nil {
			t.Errorf("run: %v", err)
		}
	}()
	var once sync.Once
	stop = func() { once.Do(func() { cancel(); <-done }) }
	t.Cleanup(stop)
	return stop
}

func start(t testing.TB, src *identity.Source, change ...func(*sidecar.Config)) *node {
	t.Helper()
	n := &node{t: t, control: newControl(), src: src, log: &lines{}}
	n.client = hop.NewClient(hop.ClientConfig{Source: src, ConnectTimeout: 5 * time.Second, PingAfter: 500 * time.Millisecond, DeadAfter: 2 * time.Second})
	health := sidecar.NewHealth(n.client, nil)
	b := balance.New(balance.Config{Ramp: -1, Probe: health.Probe, SuspectGateway: health.Suspect})
	out, in := listen(t), listen(t)
	cfg := sidecar.Config{
		Source: src, Control: n.control, Hop: n.client, Balancer: b, Namespace: "shop",
		Locality: proxy.Locality{Cluster: "west", Region: "eu", Zone: "a"}, Outbound: out, Inbound: in, Workload: netip.MustParseAddr("127.0.0.1"),
		Apps: map[uint16]string{}, DrainTimeout: 3 * time.Second, AccessLog: n.log,
	}
	for _, f := range change {
		f(&cfg)
	}
	n.outbound, n.hop = out.Addr().String(), netip.MustParseAddrPort(in.Addr().String())
	s, err := sidecar.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	n.stop = run(t, s.Run)
	run(t, func(ctx context.Context) error { return health.Run(ctx, b) })
	return n
}

const authority = "payments.shop.svc.clusterset.local:8080"

// serves declares one port, open to everybody whom the test lets in.
func (n *node) serves(protocol proxy.Protocol, authorities ...string) {
	svid, _ := n.src.GetX509SVID()
	n.control.change(func(t *proxy.Table) {
		t.Inbound = &proxy.Inbound{Address: netip.MustParseAddr("127.0.0.1"), Ports: []proxy.InboundPort{{
			Services: authorities, Port: 8080, Protocol: protocol,
			Access: proxy.Access{TrustDomain: svid.ID.TrustDomain().Name(), Allow: []proxy.AccessRule{{Policy: "AccessPolicy shop/test", From: []string{"spiffe://*/ns/shop/sa/frontend"}, Foreign: true}}},
		}}}
	})
}

func (n *node) endpoint(id string) *proxy.Endpoint {
	svid, _ := n.src.GetX509SVID()
	return &proxy.Endpoint{ID: id, Address: n.hop, SNI: id + ".endpoint.hanse", SPIFFEID: svid.ID.String(), Transport: proxy.TransportHop, Weight: 1,
		Locality: proxy.Locality{Cluster: "east", Region: "eu", Zone: "a"}}
}

// calls gives the node a service with one level of endpoints for each argument.
func (n *node) calls(protocol proxy.Protocol, authority string, levels ...[]*proxy.Endpoint) {
	c := &proxy.Cluster{Name: authority, Service: "shop/payments", Protocol: protocol, EndpointsReceived: true, ConnectTimeout: time.Second}
	for _, endpoints := range levels {
		c.Levels = append(c.Levels, proxy.Level{Localities: []proxy.LocalityEndpoints{{Locality: endpoints[0].Locality, Weight: 1, Endpoints: endpoints}}})
	}
	l := &proxy.Listener{Authority: authority, Protocol: protocol}
	if protocol == proxy.TCP {
		l.Cluster = authority
	} else {
		l.Routes = []*proxy.Route{{Name: "default", Backends: []proxy.Backend{{Cluster: authority, Weight: 1}}}}
	}
	n.control.change(func(t *proxy.Table) {
		listeners, clusters := map[string]*proxy.Listener{authority: l}, map[string]*proxy.Cluster{authority: c}
		for k, v := range t.Listeners {
			if k != authority {
				listeners[k] = v
			}
		}
		for k, v := range t.Clusters {
			if k != authority {
				clusters[k] = v
			}
		}
		t.Listeners, t.Clusters = listeners, clusters
	})
}

// route changes the only route of the service.
func (n *node) route(f func(*proxy.Route)) {
	n.control.change(func(t *proxy.Table) {
		l := *t.Listeners[authority]
		r := *l.Routes[0]
		r.Backends = append([]proxy.Backend(nil), r.Backends...)
		f(&r)
		l.Routes = []*proxy.Route{&r}
		t.Listeners = map[string]*proxy.Listener{authority: &l}
	})
}

// http returns a client of the explicit proxy.
func (n *node) http() *http.Client {
	tr := &http.Transport{Proxy: http.ProxyURL(&url.URL{Scheme: "http", Host: n.outbound}), DisableCompression: true}
	n.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

// app starts an application on a Unix socket and returns its address for Config.Apps.
func app(t testing.TB, h http.Handler) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "app.sock")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	srv := httptest.NewUnstartedServer(h)
	srv.Listener = ln
	srv.Config.Protocols = protocols
	srv.Start()
	t.Cleanup(srv.CloseClientConnections)
	t.Cleanup(srv.Close)
	return "unix:" + path
}

func text(t testing.TB, resp *http.Response, err error) string {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// withGateway puts a gateway before a node's endpoints, and tees what it carries.
func withGateway(t testing.TB, d *proxytest.Domain, endpoints ...*proxy.Endpoint) (netip.AddrPort, *gateway.Gateway, func()) {
	t.Helper()
	control := newControl()
	control.table.SNI = map[string][]proxy.Target{}
	for _, e := range endpoints {
		control.table.SNI[e.SNI] = []proxy.Target{{ID: e.ID, Address: e.Address, Weight: 1}}
	}
	ln := listen(t)
	g := gateway.New(gateway.Config{Source: d.Source("/hanse/gateway"), Control: control, DrainIdle: 20 * time.Millisecond})
	stop := run(t, func(ctx context.Context) error { return g.Serve(ctx, ln) })
	addr := netip.MustParseAddrPort(ln.Addr().String())
	for _, e := range endpoints {
		e.Gateways = []netip.AddrPort{addr}
	}
	return addr, g, stop
}

// pair is a frontend in west that calls payments in east through east's gateway.
func pair(t testing.TB, protocol proxy.Protocol, h http.Handler) (front, pay *node) {
	t.Helper()
	return pairWith(t, protocol, app(t, h))
}

func pairWith(t testing.TB, protocol proxy.Protocol, appAddress string, changeFront ...func(*sidecar.Config)) (front, pay *node) {
	t.Helper()
	west, east := proxytest.NewDomain(t, "west.test"), proxytest.NewDomain(t, "east.test")
	pay = start(t, east.Source("/ns/shop/sa/payments", west), func(c *sidecar.Config) { c.Apps[8080] = appAddress })
	pay.serves(protocol, authority)
	front = start(t, west.Source("/ns/shop/sa/frontend", east), changeFront...)
	e := pay.endpoint("e1")
	withGateway(t, east, e)
	front.calls(protocol, authority, []*proxy.Endpoint{e})
	return front, pay
}

func TestHTTPThroughGateway(t *testing.T) {
	front, pay := pair(t, proxy.HTTP, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Trailer", "X-Sum")
		b, _ := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%s %s host=%s cert=%s body=%s forged=%q own=%q", r.Method, r.URL.RequestURI(), r.Host, r.Header.Get("X-Forwarded-Client-Cert"), b, r.Header.Get("Hanse-Peer-Address"), r.Header.Get("Hanse-Target"))
		w.Header().Set("X-Sum", "42")
	}))
	req, _ := http.NewRequestWithContext(t.Context(), "POST", "http://payments.shop:8080/pay%2Fme?x=1", strings.NewReader("hello"))
	req.Header.Set("X-Forwarded-Client-Cert", "URI=spiffe://evil")
	req.Header.Set("Hanse-Peer-Address", "1.2.3.4")
	resp, err := front.http().Do(req)
	got := text(t, resp, err)
	want := `POST /pay%2Fme?x=1 host=payments.shop:8080 cert=URI=spiffe://west.test/ns/shop/sa/frontend body=hello forged="" own=""`
	if got != want || resp.StatusCode != 200 {
		t.Errorf("%d %s\nwant %s", resp.StatusCode, got, want)
	}
	if resp.Trailer.Get("X-Sum") != "42" {
		t.Errorf("trailers %v", resp.Trailer)
	}
	if _, ok := resp.Header["Content-Type"]; !ok || resp.Header.Get("Hanse-Error") != "" {
		t.Errorf("header %v", resp.Header)
	}
	for n, reporter := range map[*node]string{front: "source", pay: "destination"} {
		eventually(t, "an access log", func() bool { return n.log.String() != "" }) // lines wait for company
		if l := n.log.String(); !strings.Contains(l, `"reporter":"`+reporter+`"`) || !strings.Contains(l, `"source":"spiffe://west.test/ns/shop/sa/frontend"`) || !strings.Contains(l, `"traceId"`) {
			t.Errorf("access log of %s: %s", reporter, l)
		}
	}
}
