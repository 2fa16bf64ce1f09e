package xdsclient_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/discovery/xdsgen"
	"github.com/hanse-mesh/hanse/discovery/xdspb"
	"github.com/hanse-mesh/hanse/discovery/xdsserver"
	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/proxy"
	"github.com/hanse-mesh/hanse/proxy/balance"
	"github.com/hanse-mesh/hanse/proxy/proxytest"
	"github.com/hanse-mesh/hanse/proxy/xdsclient"
)

const paymentsAuthority = "payments.shop.svc.clusterset.local:8080"

var (
	payments = discovery.Name{Namespace: "shop", Name: "payments"}
	ledger   = discovery.Name{Namespace: "shop", Name: "ledger"}
)

// hansed is the real xDS server on loopback.
type hansed struct {
	*xdsserver.Server
	domain  *proxytest.Domain
	addr    string
	reports chan xdsserver.Report
}

func serve(t testing.TB) *hansed {
	t.Helper()
	h := &hansed{domain: proxytest.NewDomain(t, "west.test"), reports: make(chan xdsserver.Report, 100)}
	var err error
	h.Server, err = xdsserver.New(xdsserver.Config{
		Source: h.domain.Source("/hanse/control-plane"), TrustDomain: h.domain.TD, Debounce: time.Millisecond,
		OnReport: func(r xdsserver.Report) {
			select {
			case h.reports <- r:
			default:
			}
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	h.addr = ln.Addr().String()
	g := grpc.NewServer(h.ServerOptions()...)
	h.Register(g)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 2)
	go func() { ended <- g.Serve(ln) }()
	go func() { ended <- h.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		g.Stop()
		for range 2 {
			if err := <-ended; err != nil {
				t.Errorf("control plane: %v", err)
			}
		}
	})
	return h
}

// follow runs a client of h as the workload of a SPIFFE ID path.
func (h *hansed) follow(t testing.TB, path, role string, change func(*xdsclient.Config)) *xdsclient.Client {
	t.Helper()
	cfg := xdsclient.Config{
		Addrs: []string{h.addr}, Source: h.domain.Source(path), ServerID: identity.ControlPlaneID(h.domain.TD),
		Node: xdsclient.Node{ID: "test-" + role, Cluster: "west", Network: "west", Region: "eu", Zone: "a", Namespace: "shop", Role: role,
			WorkloadIPs: []netip.Addr{netip.MustParseAddr("10.0.0.1")}},
	}
	if change != nil {
		change(&cfg)
	}
	c, err := xdsclient.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- c.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("client: %v", err)
		}
	})
	return c
}

// until waits for a Table.
func until(t testing.TB, c *xdsclient.Client, what string, ok func(*proxy.Table) bool) {
	t.Helper()
	deadline := time.After(10 * time.Second)
	for {
		changed := c.Changed()
		if ok(c.Table()) {
			return
		}
		select {
		case <-changed:
		case <-deadline:
			t.Fatalf("%s: did not happen; table %+v, status %+v", what, c.Table(), c.Status())
		}
	}
}

func endpoint(id int, cluster, zone, ip string) *discovery.Endpoint {
	return &discovery.Endpoint{
		ID:      fmt.Sprintf("%032x", id),
		Address: netip.MustParseAddr(ip),
		Profile: &discovery.Profile{Ports: map[string]uint16{"http": 9090, "tcp": 5432}, Transport: discovery.Hop, SPIFFEID: "spiffe://" + cluster + ".test/ns/shop/sa/payments", Locality: discovery.Locality{Cluster: cluster, Region: "eu", Zone: zone}, Network: cluster},
		Ready:   true,
	}
}

// mesh is west, which shares payments with east.
func mesh(routes []*discovery.Route, local ...*discovery.Endpoint) *discovery.Clusterset {
	ports := []discovery.Port{{Name: "http", Number: 8080, Protocol: discovery.HTTP}}
	exported := time.Unix(1, 0)
	service := &discovery.Service{Name: payments, Ports: ports, Endpoints: local, Export: &discovery.Export{Created: exported}}
	return &discovery.Clusterset{
		Local: &discovery.Snapshot{
			Self: discovery.Self{Cluster: "west", TrustDomain: "west.test", Network: "west", Region: "eu"}, Complete: true, Routes: routes,
			Services: discovery.NewByName(map[discovery.Name]*discovery.Service{
				payments: service,
				ledger: {Name: ledger, Ports: []discovery.Port{{Name: "tcp", Number: 5432, Protocol: discovery.TCP}},
					Endpoints: []*discovery.Endpoint{endpoint(50, "west", "a", "10.0.0.50")}},
			}),
			Access: []*discovery.AccessPolicy{{
				Name: payments, Services: []discovery.Name{payments},
				Rules: []discovery.AccessRule{{From: []string{"spiffe://east.test/ns/shop/sa/*"}, Methods: []string{"GET"}}},
			}},
		},
		Imports: discovery.NewByName(map[discovery.Name]*discovery.Import{payments: {Name: payments, Ports: ports, From: []discovery.ImportedFrom{
			{Member: "west", Ports: ports, Exported: exported, Endpoints: local},
			{Member: "east", Ports: ports, Exported: exported, Endpoints: []*discovery.Endpoint{endpoint(100, "east", "x", "10.9.0.1")}},
		}}}),
		Members: map[string]*discovery.Member{"east": {
			ID: "m-east", Name: "east", TrustDomain: "east.test", Network: "east", Region: "eu", State: discovery.Fresh,
			Gateways: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:15443")},
		}},
		Trusted: map[string]uint64{"west.test": 1, "east.test": 1},
	}
}

func TestWithTheRealControlPlane(t *testing.T) {
	h := serve(t)
	near, other := endpoint(1, "west", "a", "10.0.0.1"), endpoint(2, "west", "b", "10.0.0.2")
	b := balance.New(balance.Config{})
	c := h.follow(t, "/ns/shop/sa/payments", "sidecar", func(cfg *xdsclient.Config) {
		cfg.OnTable, cfg.Load, cfg.StateDir = b.Update, b, t.TempDir()
	})
	h.SetReportInterval(200 * time.Millisecond)
	h.SetView(mesh(nil, near, other))
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()

	l, err := c.Resolve(ctx, paymentsAuthority)
	if err != nil {
		t.Fatal(err)
	}
	if l.Protocol != proxy.HTTP || len(l.Routes) != 1 || l.Routes[0].Backends[0].Cluster != paymentsAuthority {
		t.Errorf("listener %+v", l)
	}
	cl := c.Table().Clusters[paymentsAuthority]
	if cl.Service != "shop/payments" || len(cl.Levels) != 3 {
		t.Fatalf("cluster %+v, want zone, region and the other cluster", cl)
	}
	far := cl.Levels[2].Localities[0].Endpoints[0]
	if far.Locality.Cluster != "east" || len(far.Gateways) != 1 || far.SNI != far.ID+".endpoint.hanse" || far.SPIFFEID != "spiffe://east.test/ns/shop/sa/payments" || far.Reason == "" {
		t.Errorf("far endpoint %+v", far)
	}
	if tcp, err := c.Resolve(ctx, ledger.Authority(5432)); err != nil || tcp.Protocol != proxy.TCP || tcp.Cluster != ledger.Authority(5432) {
		t.Errorf("TCP listener %+v, %v", tcp, err)
	}
	if _, err := c.Resolve(ctx, "nobody.shop.svc.clusterset.local:1"); !errors.Is(err, xdsclient.ErrUnknown) {
		t.Errorf("nobody: %v", err)
	}

	until(t, c, "inbound", func(tab *proxy.Table) bool { return tab.Inbound != nil })
	in := c.Table().Inbound.Ports[0]
	for caller, want := range map[string]bool{"spiffe://east.test/ns/shop/sa/x": true, "spiffe://east.test/ns/evil/sa/x": false, "spiffe://west.test/ns/shop/sa/x": false} {
		if d := in.Access.Check(caller, "GET", "/"); d.Allow != want {
			t.Errorf("%s: %+v", caller, d)
		}
	}
	if in.Port != 9090 || !slices.Contains(in.Services, paymentsAuthority) {
		t.Errorf("inbound %+v", in)
	}

	p, err := b.Pick(paymentsAuthority, balance.PickInfo{})
	if err != nil || p.Endpoint.ID != near.ID {
		t.Fatalf("picked %+v, %v", p.Endpoint, err)
	}
	p.Done(balance.Result{Outcome: balance.ConnectFailed, Reason: "refused"})
	for r := range h.reports {
		i := slices.IndexFunc(r.Clusters, func(c xdsserver.ClusterReport) bool { return c.Authority == paymentsAuthority })
		if i < 0 {
			continue
		}
		e := r.Clusters[i].Endpoints[0]
		if e.ID != near.ID || e.Health != "dead" || e.Failed != 1 || e.Locality.Cluster != "west" || len(e.Events) == 0 || e.Events[0].Kind != "first_failure" {
			t.Errorf("report %+v", e)
		}
		break
	}

	h.SetView(mesh(nil, near, other, endpoint(3, "west", "a", "10.0.0.3")))
	until(t, c, "a new endpoint", func(tab *proxy.Table) bool {
		return len(tab.Clusters[paymentsAuthority].Levels[0].Localities[0].Endpoints) == 2
	})
	h.SetTrust(map[string]uint64{"west.test": 7}, 1, nil)
	until(t, c, "trust", func(tab *proxy.Table) bool { return tab.Trust["west.test"] == 7 })
	h.SetFaults(func(xdsgen.Viewer) *xdspb.Faults {
		return &xdspb.Faults{Faults: []*xdspb.Fault{{Drill: "d", Mode: "blackhole", Share: 100, End: durationpb.New(time.Minute), Renewal: 1}}}
	})
	until(t, c, "a drill", func(tab *proxy.Table) bool { return len(tab.Faults) == 1 && tab.Faults[0].Mode == proxy.FaultBlackhole })
	if s := c.Status(); !s.Connected || len(s.Rejected) != 0 {
		t.Errorf("status %+v", s)
	}
}

func TestGatewayWithTheRealControlPlane(t *testing.T) {
	h := serve(t)
	near := endpoint(1, "west", "a", "10.0.0.1")
	c := h.follow(t, "/hanse/gateway", "gateway", nil)
	h.SetView(mesh(nil, near))
	until(t, c, "the table", func(tab *proxy.Table) bool { return tab.SNI[near.ID+".endpoint.hanse"] != nil })
	at := c.Table().SNI[near.ID+".endpoint.hanse"]
	if len(at) != 1 || at[0].Address != netip.MustParseAddrPort("10.0.0.1:15008") || at[0].ID != near.ID {
		t.Errorf("target %+v", at)
	}
	if c.Table().SNI[payments.Host()] == nil || c.Table().SNI[ledger.Host()] != nil {
		t.Errorf("names %v", slices.Sorted(maps.Keys(c.Table().SNI)))
	}
	h.SetView(mesh(nil))
	until(t, c, "an empty table", func(tab *proxy.Table) bool { return len(tab.SNI) == 0 })
}

// TestRoutesAgree sends random requests through the routes as the control plane explains them, and as the proxy obeys them.
func TestRoutesAgree(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	one := func(of ...string) string { return of[r.IntN(len(of))] }
	match := func() (m discovery.RouteMatch) {
		switch r.IntN(5) {
		case 0:
			m.Path = &discovery.PathMatch{Type: discovery.MatchExact, Value: one("/a", "/a/b", "/")}
		case 1:
			m.Path = &discovery.PathMatch{Type: discovery.MatchRegex, Value: one("/a.*", "/[ab]|/ab", "/a/(b|c)/?")}
		case 2, 3:
			m.Path = &discovery.PathMatch{Type: discovery.MatchPrefix, Value: one("/", "/a", "/a/", "/a/b", "/ab")}
		}
		if r.IntN(3) == 0 {
			m.Method = one("GET", "POST")
		}
		if r.IntN(3) == 0 {
			m.Headers = append(m.Headers, discovery.ValueMatch{Type: discovery.MatchType(one("Exact", "RegularExpression")), Name: one("X-A", "x-b"), Value: one("1", "2", "[12]")})
		}
		if r.IntN(4) == 0 {
			m.Query = append(m.Query, discovery.ValueMatch{Type: discovery.MatchExact, Name: one("q", "p"), Value: one("1", "2")})
		}
		return m
	}
	h := serve(t)
	near := endpoint(1, "west", "a", "10.0.0.1")
	c := h.follow(t, "/ns/shop/sa/frontend", "sidecar", nil)
	h.SetView(mesh(nil, near))
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if _, err := c.Resolve(ctx, paymentsAuthority); err != nil {
		t.Fatal(err)
	}
	viewer := &xdsgen.Viewer{ID: "v", Cluster: "west", Namespace: "shop", Region: "eu", Zone: "a", Network: "west", Kind: xdsgen.Sidecar}
	hits := 0
	for round := range 10 {
		var routes []*discovery.Route
		for i := range 3 {
			route := &discovery.Route{Name: discovery.Name{Namespace: "shop", Name: fmt.Sprintf("r%d-%d", round, i)}, Kind: "HTTPRoute", Created: time.Unix(int64(i), 0),
				Parents: []discovery.RouteRef{{Service: payments}}}
			for range 4 {
				route.Rules = append(route.Rules, &discovery.RouteRule{Matches: []discovery.RouteMatch{match(), match()}, Backends: []discovery.Backend{{Service: payments, Port: 8080, Weight: 1}}})
			}
			routes = append(routes, route)
		}
		h.SetView(mesh(routes, near))
		until(t, c, "routes", func(tab *proxy.Table) bool {
			return strings.Contains(tab.Listeners[paymentsAuthority].Routes[0].Name, fmt.Sprintf("/r%d-", round))
		})
		routing, err := h.View().Routes(viewer, paymentsAuthority)
		if err != nil {
			t.Fatal(err)
		}
		l := c.Table().Listeners[paymentsAuthority]
		for range 500 {
			method, path := one("GET", "POST", "PUT"), one("/", "/a", "/a/", "/a/b", "/ab", "/a/b/c", "/b", "/a/c/")
			headers, query := map[string][]string{}, map[string][]string{}
			raw := ""
			if r.IntN(2) == 0 {
				headers[one("x-a", "x-b")] = []string{one("1", "2", "3")}
			}
			if r.IntN(2) == 0 {
				k, v := one("q", "p"), one("1", "2")
				query[k], raw = []string{v}, k+"="+v
			}
			want, got := "none", "none"
			if rule := routing.Match(&xdsgen.Request{Method: method, Path: path, Headers: headers, Query: query}); rule != nil {
				want = rule.Name
				hits++
			}
			route := l.Match(&proxy.Request{Method: method, Path: path, RawQuery: raw, Header: func(n string) (string, bool) {
				v := headers[n]
				return strings.Join(v, ", "), len(v) > 0
			}})
			if route != nil {
				got = route.Name
			}
			if got != want {
				t.Fatalf("%s %s?%s %v: the proxy takes %s, the control plane explains %s", method, path, raw, headers, got, want)
			}
		}
	}
	if hits < 1000 {
		t.Errorf("only %d requests matched", hits)
	}
}

// BenchmarkFirstResolve is a service never called before, over loopback and mutual TLS.
func BenchmarkFirstResolve(b *testing.B) {
	h := serve(b)
	set := mesh(nil, endpoint(1, "west", "a", "10.0.0.1"))
	const services = 4000
	for i := range services {
		n := discovery.Name{Namespace: "shop", Name: fmt.Sprint("s", i)}
		set.Local.Services = set.Local.Services.Put(n, &discovery.Service{Name: n, Ports: []discovery.Port{{Name: "http", Number: 80, Protocol: discovery.HTTP}},
			Endpoints: []*discovery.Endpoint{endpoint(1000+i, "west", "a", "10.1.0.1")}})
	}
	h.SetView(set)
	c := h.follow(b, "/ns/shop/sa/frontend", "sidecar", nil)
	ctx := b.Context()
	if _, err := c.Resolve(ctx, paymentsAuthority); err != nil {
		b.Fatal(err)
	}
	i := 0
	for b.Loop() {
		if i == services {
			b.Skipf("more than %d services", services)
		}
		n := discovery.Name{Namespace: "shop", Name: fmt.Sprint("s", i)}
		if _, err := c.Resolve(ctx, n.Authority(80)); err != nil {
			b.Fatal(err)
		}
		i++
	}
}
