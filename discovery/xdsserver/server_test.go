package xdsserver

import (
	"context"
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	loadv3 "github.com/envoyproxy/go-control-plane/envoy/service/load_stats/v3"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/discovery/xdsgen"
	"github.com/hanse-mesh/hanse/discovery/xdspb"
)

const frontend = "/ns/shop/sa/frontend"

func TestDeltaOnDemand(t *testing.T) {
	h := start(t)
	set := shop{services: map[string][]*discovery.Endpoint{
		"payments": {endpoint("a", "10.0.0.1", "payments")},
		"catalog":  {endpoint("b", "10.0.0.2", "catalog")},
	}}
	h.view(set.set())
	c := h.delta(h.dial(h.own, frontend), node("frontend-1", "hanse-proxy", nil))

	c.subscribe(xdsgen.ListenerType, name("payments"), name("nobody"))
	c.expect(xdsgen.ListenerType, []string{name("payments")}, []string{name("nobody")})
	c.subscribe(xdsgen.ClusterType, name("payments"))
	c.expect(xdsgen.ClusterType, []string{name("payments")}, nil)
	c.subscribe(xdsgen.EndpointType, name("payments"))
	first := c.expect(xdsgen.EndpointType, []string{name("payments")}, nil)

	// Equal content made of new objects is not sent, a change of what nobody asked for neither.
	set.services["catalog"] = nil
	h.view(set.set())
	// An endpoint's change is sent, and nothing else.
	set.services["payments"] = append(set.services["payments"], endpoint("c", "10.0.0.3", "payments"))
	h.view(set.set())
	second := c.expect(xdsgen.EndpointType, []string{name("payments")}, nil)
	if first.Resources[0].Version == second.Resources[0].Version {
		t.Error("another content has the same version")
	}
	// A name that was unknown comes when it appears, and goes when it goes.
	set.services["nobody"] = []*discovery.Endpoint{endpoint("d", "10.0.0.4", "nobody")}
	h.view(set.set())
	c.expect(xdsgen.ListenerType, []string{name("nobody")}, nil)
	delete(set.services, "nobody")
	h.view(set.set())
	c.expect(xdsgen.ListenerType, nil, []string{name("nobody")})

	// Asking again is answered again; what is unsubscribed is not sent any more.
	c.subscribe(xdsgen.ListenerType, name("payments"))
	c.expect(xdsgen.ListenerType, []string{name("payments")}, nil)
	c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: xdsgen.EndpointType, ResourceNamesUnsubscribe: []string{name("payments")}})
	c.subscribe("type.googleapis.com/nothing.of.Ours", "x")
	c.expect("type.googleapis.com/nothing.of.Ours", nil, []string{"x"})
	set.services["payments"] = nil
	h.view(set.set())
	c.expect(xdsgen.ClusterType, []string{name("payments")}, nil) // its SANs went with the endpoints

	// A reconnecting client says what it has, and gets what differs.
	c2 := h.delta(h.dial(h.own, frontend), node("frontend-1", "hanse-proxy", nil))
	last := c.resend(xdsgen.ListenerType, name("payments"))
	c2.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: xdsgen.ListenerType,
		ResourceNamesSubscribe:  []string{name("payments"), name("gone")},
		InitialResourceVersions: map[string]string{name("payments"): last, name("gone"): "x"}})
	c2.expect(xdsgen.ListenerType, nil, []string{name("gone")})
}

// resend asks for a resource again and returns its version.
func (c *deltaClient) resend(typeURL, name string) string {
	c.t.Helper()
	c.subscribe(typeURL, name)
	return c.expect(typeURL, []string{name}, nil).Resources[0].Version
}

func TestNothingBeforeTheFirstView(t *testing.T) {
	h := start(t)
	c := h.delta(h.dial(h.own, frontend), node("frontend-1", "hanse-proxy", nil))
	c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: xdsgen.ListenerType, ResourceNamesSubscribe: []string{name("payments")},
		InitialResourceVersions: map[string]string{name("payments"): "from before"}})
	select {
	case resp := <-c.got:
		t.Fatalf("answered without a view: %v", resp)
	case <-time.After(50 * time.Millisecond):
	}
	h.view(shop{services: map[string][]*discovery.Endpoint{"payments": nil}}.set())
	c.expect(xdsgen.ListenerType, []string{name("payments")}, nil)
}

func TestDependenciesComeWithTheListener(t *testing.T) {
	h := start(t)
	set := shop{services: map[string][]*discovery.Endpoint{
		"payments":    {endpoint("a", "10.0.0.1", "payments")},
		"payments-v2": {endpoint("b", "10.0.0.2", "payments-v2")},
	}}
	h.view(set.set())
	c := h.delta(h.dial(h.own, frontend), node("frontend-1", "hanse-proxy", map[string]any{"push_dependencies": true}))
	c.subscribe(xdsgen.ListenerType, name("payments"))
	c.expect(xdsgen.ClusterType, []string{name("payments")}, nil)
	c.expect(xdsgen.EndpointType, []string{name("payments")}, nil)
	c.expect(xdsgen.ListenerType, []string{name("payments")}, nil)

	// The first subscription of what came by itself is not answered again; a new backend comes before the route to it.
	c.subscribe(xdsgen.ClusterType, name("payments"))
	set.routes = []*discovery.Route{{
		Name: discovery.Name{Namespace: "shop", Name: "r"}, Kind: "HTTPRoute",
		Parents: []discovery.RouteRef{{Service: discovery.Name{Namespace: "shop", Name: "payments"}}},
		Rules:   []*discovery.RouteRule{{Backends: []discovery.Backend{{Service: discovery.Name{Namespace: "shop", Name: "payments-v2"}, Port: 8080, Weight: 1}}}},
	}}
	h.view(set.set())
	c.expect(xdsgen.ClusterType, []string{name("payments-v2")}, nil)
	c.expect(xdsgen.EndpointType, []string{name("payments-v2")}, nil)
	c.expect(xdsgen.ListenerType, []string{name("payments")}, nil)
	// And its later changes come too.
	set.services["payments-v2"] = append(set.services["payments-v2"], endpoint("c", "10.0.0.3", "payments-v2"))
	h.view(set.set())
	c.expect(xdsgen.EndpointType, []string{name("payments-v2")}, nil)
}

func TestOnlyOwnConfiguration(t *testing.T) {
	h := start(t)
	h.view(shop{exported: true, services: map[string][]*discovery.Endpoint{"payments": {endpoint("a", "10.0.0.1", "payments")}}}.set())

	in := xdsgen.InboundPrefix + "10.0.0.1"
	h.delta(h.dial(h.own, "/ns/shop/sa/payments"), node("p", "hanse-proxy", nil)).with(xdsgen.ListenerType, in, true)
	h.delta(h.dial(h.own, frontend), node("p", "hanse-proxy", nil)).with(xdsgen.ListenerType, in, false)

	// Claiming a role gives nothing: the SVID decides.
	c := h.delta(h.dial(h.own, frontend), node("p", "hanse-proxy", map[string]any{"role": "gateway"}))
	c.subscribe(xdsgen.EndpointType)
	c.expect(xdsgen.EndpointType, nil, nil)
	g := h.delta(h.dial(h.own, "/hanse/gateway"), node("g", "hanse-proxy", map[string]any{"role": "gateway"}))
	g.subscribe(xdsgen.EndpointType)
	g.expect(xdsgen.EndpointType, []string{"8080.payments.shop.svc.clusterset.local", "a.endpoint.hanse", "payments.shop.svc.clusterset.local"}, nil)

	// Another trust domain is refused, federated or not.
	east := newAuthority(t, "east.demo")
	for _, trusted := range []bool{false, true} {
		if trusted {
			h.src.SetBundles(bundles(h.own, east))
		}
		stream, err := discoveryv3.NewAggregatedDiscoveryServiceClient(h.dial(east, frontend)).DeltaAggregatedResources(t.Context())
		if err == nil {
			_, err = stream.Recv()
		}
		if status.Code(err) != codes.Unavailable { // by the handshake
			t.Errorf("federated %v: %v", trusted, err)
		}
	}
}

// with subscribes to a name and checks whether it exists for this client.
func (c *deltaClient) with(typeURL, name string, exists bool) {
	c.t.Helper()
	c.subscribe(typeURL, name)
	if exists {
		c.expect(typeURL, []string{name}, nil)
	} else {
		c.expect(typeURL, nil, []string{name})
	}
}

func TestGatewayTable(t *testing.T) {
	h := start(t)
	set := shop{exported: true, services: map[string][]*discovery.Endpoint{}}
	const n = 1000
	for i := range n {
		set.services["bulk"] = append(set.services["bulk"], endpoint(fmt.Sprintf("%032x", i), fmt.Sprintf("10.%d.%d.%d", i>>16, i>>8&255, i&255), "bulk"))
	}
	set.services["one"] = []*discovery.Endpoint{endpoint("x", "10.99.0.1", "one")}
	set.services["two"] = []*discovery.Endpoint{endpoint("x", "10.99.0.1", "two")} // the same workload behind another service
	h.view(set.set())
	c := h.delta(h.dial(h.own, "/hanse/gateway"), node("g", "hanse-proxy", nil))
	c.subscribe(xdsgen.EndpointType, "*")
	have := make(map[string]string)
	responses := 0
	for len(have) < n+7 {
		for _, r := range c.recv().Resources {
			have[r.Name] = r.Version
		}
		responses++
	}
	if responses < 2 {
		t.Error("a large table came in one response")
	}
	delete(set.services, "one")
	h.view(set.set())
	c.expect(xdsgen.EndpointType, nil, []string{"8080.one.shop.svc.clusterset.local", "one.shop.svc.clusterset.local"})
	delete(set.services, "two")
	h.view(set.set())
	c.expect(xdsgen.EndpointType, nil, []string{"8080.two.shop.svc.clusterset.local", "two.shop.svc.clusterset.local", "x.endpoint.hanse"})

	// After a reconnect only what differs is sent.
	set.services["three"] = []*discovery.Endpoint{endpoint("y", "10.99.0.2", "three")}
	h.view(set.set())
	c2 := h.delta(h.dial(h.own, "/hanse/gateway"), node("g", "hanse-proxy", nil))
	c2.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: xdsgen.EndpointType, ResourceNamesSubscribe: []string{"*"}, InitialResourceVersions: have})
	c2.expect(xdsgen.EndpointType, []string{"8080.three.shop.svc.clusterset.local", "three.shop.svc.clusterset.local", "y.endpoint.hanse"},
		[]string{"8080.one.shop.svc.clusterset.local", "8080.two.shop.svc.clusterset.local", "one.shop.svc.clusterset.local", "two.shop.svc.clusterset.local", "x.endpoint.hanse"})
}

// TestExpected: after a start nothing new counts as loaded before the proxies of before are back and have loaded it, are seen elsewhere, or
// have been waited for for ProxyBack.
func TestExpected(t *testing.T) {
	var passed atomic.Int64
	begin := time.Now()
	h := start(t, func(c *Config) { c.Now = func() time.Time { return begin.Add(time.Duration(passed.Load())) } })
	before := map[string]uint64{"west.demo": 3, "east.demo": 5}
	h.Expect([]string{"a", "b", "c"})
	if got := h.TrustAcked(before); !maps.Equal(got, before) {
		t.Errorf("nothing is announced: %v", got)
	}
	h.SetTrust(map[string]uint64{"west.demo": 3, "east.demo": 6, "new.demo": 1}, 1, nil)
	passed.Add(int64(time.Hour)) // nobody can connect yet
	held := map[string]uint64{"west.demo": 3, "east.demo": 5, "new.demo": 0}
	check := func(when string, want map[string]uint64, lacking ...Lacking) {
		t.Helper()
		if got := h.TrustAcked(before); !maps.Equal(got, want) {
			t.Errorf("%s: acknowledged is %v, want %v", when, got, want)
		}
		if got := h.TrustLacking("east.demo", 6, before); !slices.Equal(got, lacking) {
			t.Errorf("%s: lacking is %v, want %v", when, got, lacking)
		}
		if got := h.TrustLacking("east.demo", 5, before); len(got) > 0 {
			t.Errorf("%s: what was acknowledged before is lacked by %v", when, got)
		}
		var ids []string
		for _, x := range lacking {
			ids = append(ids, x.ID)
		}
		if behind, _ := h.TrustBehind(); !slices.Equal(behind, ids) {
			t.Errorf("%s: behind are %v, want %v", when, behind, ids)
		}
	}
	check("before a view", held, Lacking{ID: "a"}, Lacking{ID: "b"}, Lacking{ID: "c"})
	h.view(shop{}.set())
	<-h.ready
	until := begin.Add(time.Hour + ProxyBack)
	check("with a view", held, Lacking{"a", until}, Lacking{"b", until}, Lacking{"c", until})

	var conn *grpc.ClientConn
	connect := func(id string) (ack func()) {
		conn = h.dial(h.own, frontend)
		c := h.delta(conn, node(id, "hanse-proxy", nil))
		c.subscribe(xdsgen.TrustType, "trust")
		resp := c.next()
		return func() {
			c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: resp.TypeUrl, ResponseNonce: resp.Nonce})
			eventually(t, func() bool {
				return slices.ContainsFunc(h.Proxies(), func(p ProxyStatus) bool { return p.Viewer.ID == id && p.Trust != nil })
			})
		}
	}
	ack := connect("a")
	check("one is back and loads", held, Lacking{ID: "a"}, Lacking{"b", until}, Lacking{"c", until})
	ack()
	check("one is back", held, Lacking{"b", until}, Lacking{"c", until})
	if got := h.Roster(); !slices.Equal(got, []string{"a", "b", "c"}) {
		t.Errorf("the roster is %v", got)
	}
	h.Moved([]string{"b"})
	check("one is elsewhere", held, Lacking{"c", until})
	passed.Add(int64(ProxyBack - time.Second))
	check("almost", held, Lacking{"c", until})
	passed.Add(int64(time.Second))
	all := map[string]uint64{"west.demo": 3, "east.demo": 6, "new.demo": 1}
	check("long enough", all)
	if got := h.Roster(); !slices.Equal(got, []string{"a"}) {
		t.Errorf("the roster is %v", got)
	}

	h.Expect([]string{"a"})
	check("a proxy that is here is not expected", all)
	if got := h.Roster(); !slices.Equal(got, []string{"a"}) { // kept for those that ask while nobody comes
		t.Errorf("the roster is %v", got)
	}
	ack = connect("new")
	check("one that was never here loads", held, Lacking{ID: "new"})
	ack()
	check("it has", all)
	if got := h.Roster(); !slices.Equal(got, []string{"a", "new"}) {
		t.Errorf("the roster is %v", got)
	}
	_ = conn.Close()
	eventually(t, func() bool { return slices.Equal(h.Roster(), []string{"a"}) })
}

func TestAcknowledgements(t *testing.T) {
	now := time.Now()
	h := start(t, func(c *Config) { c.Now = func() time.Time { return now } })
	h.view(shop{services: map[string][]*discovery.Endpoint{"payments": {endpoint("a", "10.0.0.1", "payments")}}}.set())
	h.SetTrust(map[string]uint64{"west.demo": 3, "east.demo": 5}, 1, nil)
	if got := h.TrustAcked(nil); got["west.demo"] != 3 || got["east.demo"] != 5 {
		t.Errorf("without proxies: %v", got)
	}
	c := h.delta(h.dial(h.own, frontend), node("frontend-1", "hanse-proxy", map[string]any{"role": "sidecar", "version": "v1"}))
	c.subscribe(xdsgen.TrustType, "trust")
	resp := c.next()
	var trust xdspb.Trust
	must(t, resp.Resources[0].Resource.UnmarshalTo(&trust))
	if trust.Sequences["east.demo"] != 5 {
		t.Errorf("trust is %v", &trust)
	}
	ack := func(resp *discoveryv3.DeltaDiscoveryResponse) {
		c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: resp.TypeUrl, ResponseNonce: resp.Nonce})
	}
	ack(resp)
	eventually(t, func() bool { return h.Proxies()[0].Trust["west.demo"] == 3 })
	h.SetTrust(map[string]uint64{"west.demo": 4, "east.demo": 5}, 1, nil)
	resp = c.next()
	if got := h.TrustAcked(nil); got["west.demo"] != 3 || got["east.demo"] != 5 {
		t.Errorf("before the ACK: %v", got)
	}
	ack(resp)
	eventually(t, func() bool { return h.TrustAcked(nil)["west.demo"] == 4 })

	c.subscribe(xdsgen.ListenerType, name("payments"))
	resp = c.next()
	c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: resp.TypeUrl, ResponseNonce: resp.Nonce,
		ErrorDetail: &rpcstatus.Status{Code: 3, Message: "cannot decode " + name("payments")}})
	find := func() TypeStatus {
		for _, ty := range h.Proxies()[0].Types {
			if ty.TypeURL == xdsgen.ListenerType {
				return ty
			}
		}
		return TypeStatus{}
	}
	eventually(t, func() bool { return find().NACK != "" })
	if s := find(); s.Acked != "" || s.Sent == "" || s.Names != 1 {
		t.Errorf("after the NACK: %+v", s)
	}
	if n := counter(t, h.metrics.nacks.WithLabelValues("Listener")); n != 1 {
		t.Errorf("NACKs counted: %v", n)
	}
	if p := h.Proxies()[0]; p.Viewer.ID != "frontend-1" || p.Viewer.SPIFFEID != "spiffe://west.demo/ns/shop/sa/frontend" || p.Role != "sidecar" || p.Version != "v1" {
		t.Errorf("status is %+v", p)
	}
}

func counter(t *testing.T, c prometheus.Counter) float64 {
	t.Helper()
	var m dto.Metric
	must(t, c.Write(&m))
	return m.GetCounter().GetValue()
}

func TestFaults(t *testing.T) {
	h := start(t)
	h.view(shop{}.set())
	<-h.ready
	c := h.delta(h.dial(h.own, "/ns/shop/sa/payments"), node("p", "hanse-proxy", map[string]any{"workload_ips": []any{"10.0.0.1", "nonsense"}}))
	c.subscribe(xdsgen.FaultsType, "faults")
	c.expect(xdsgen.FaultsType, []string{"faults"}, nil)
	renewal := uint64(0)
	h.SetFaults(func(v xdsgen.Viewer) *xdspb.Faults {
		if len(v.WorkloadIPs) != 1 || v.WorkloadIPs[0].String() != "10.0.0.1" {
			t.Errorf("viewer is %+v", v)
		}
		renewal++
		return &xdspb.Faults{Faults: []*xdspb.Fault{{Drill: "d", Mode: "drain", End: durationpb.New(time.Minute), Renewal: renewal}}}
	})
	for want := uint64(1); want <= 3; want++ {
		var f xdspb.Faults
		must(t, c.recv().Resources[0].Resource.UnmarshalTo(&f))
		if f.Faults[0].Renewal != want {
			t.Errorf("renewal %d, want %d", f.Faults[0].Renewal, want)
		}
		h.SetTrust(map[string]uint64{"west.demo": want}, 1, nil) // wakes the stream, but is no reason to ask again
		h.FaultsChanged()
	}
}

func TestStreamEndsWithItsTrust(t *testing.T) {
	h := start(t)
	h.view(shop{}.set())
	<-h.ready
	c := h.delta(h.dial(h.own, frontend), node("p", "hanse-proxy", nil))
	c.subscribe(xdsgen.ListenerType, "x")
	c.recv()
	other := newAuthority(t, "west.demo")
	h.src.SetBundles(bundles(other))
	if err := c.ended(); status.Code(err) != codes.Unauthenticated {
		t.Errorf("ended with %v", err)
	}
}

func TestBounds(t *testing.T) {
	h := start(t)
	h.view(shop{services: map[string][]*discovery.Endpoint{"payments": nil}}.set())
	c := h.delta(h.dial(h.own, frontend), node(strings.Repeat("x", 1000), "hanse-proxy", nil))
	var names []string
	for i := range maxNames {
		names = append(names, fmt.Sprintf("s%d", i))
	}
	c.subscribe(xdsgen.ListenerType, names...)
	if got := len(c.recv().RemovedResources); got != maxNames {
		t.Errorf("%d names answered", got)
	}
	c.with(xdsgen.ListenerType, name("payments"), false) // one too many
	c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: xdsgen.ListenerType, ResourceNamesUnsubscribe: names[:1]})
	c.with(xdsgen.ListenerType, name("payments"), true)
	if id := h.Proxies()[0].Viewer.ID; len(id) != maxNodeString {
		t.Errorf("the node ID has %d bytes", len(id))
	}
	for i := range maxTypes {
		if err := c.stream.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: fmt.Sprintf("t%d", i)}); err != nil {
			break
		}
	}
	if err := c.ended(); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("too many types: %v", err)
	}
}

func TestSlowReaderBlocksNobody(t *testing.T) {
	h := start(t)
	set := shop{services: map[string][]*discovery.Endpoint{}, exported: true}
	h.view(set.set())
	// A gateway that never reads, while its table grows beyond every window.
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	slow, err := discoveryv3.NewAggregatedDiscoveryServiceClient(h.dial(h.own, "/hanse/gateway")).DeltaAggregatedResources(ctx)
	must(t, err)
	must(t, slow.Send(&discoveryv3.DeltaDiscoveryRequest{Node: node("slow", "hanse-proxy", nil), TypeUrl: xdsgen.EndpointType}))
	fast := h.delta(h.dial(h.own, frontend), node("fast", "hanse-proxy", nil))
	fast.with(xdsgen.EndpointType, name("payments"), false)
	for round := range 5 {
		var bulk []*discovery.Endpoint
		for i := range 2000 {
			bulk = append(bulk, endpoint(fmt.Sprintf("%d-%d", round, i), fmt.Sprintf("10.%d.%d.%d", round, i>>8, i&255), "bulk"))
		}
		set.services["bulk"] = bulk
		set.services["payments"] = []*discovery.Endpoint{endpoint("p", fmt.Sprintf("10.77.0.%d", round), "payments")}
		h.view(set.set())
		fast.expect(xdsgen.EndpointType, []string{name("payments")}, nil)
	}
}

func TestStateOfTheWorld(t *testing.T) {
	h := start(t)
	set := shop{services: map[string][]*discovery.Endpoint{
		"payments": {endpoint("a", "10.0.0.1", "payments")},
		"catalog":  {endpoint("b", "10.0.0.2", "catalog")},
	}}
	h.view(set.set())
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	stream, err := discoveryv3.NewAggregatedDiscoveryServiceClient(h.dial(h.own, frontend)).StreamAggregatedResources(ctx)
	must(t, err)
	send := func(typeURL, nonce string, names ...string) {
		t.Helper()
		must(t, stream.Send(&discoveryv3.DiscoveryRequest{Node: node("g", "gRPC Go", nil), TypeUrl: typeURL, ResponseNonce: nonce, ResourceNames: names}))
	}
	recv := func(typeURL string, want ...string) *discoveryv3.DiscoveryResponse {
		t.Helper()
		resp, err := stream.Recv()
		must(t, err)
		var got []string
		for _, a := range resp.Resources {
			m, err := a.UnmarshalNew()
			must(t, err)
			switch m := m.(type) {
			case interface{ GetClusterName() string }:
				got = append(got, m.GetClusterName())
			case interface{ GetName() string }:
				got = append(got, m.GetName())
			}
		}
		if resp.TypeUrl != typeURL || !slices.Equal(got, want) {
			t.Fatalf("got %s %q, want %s %q", shortType(resp.TypeUrl), got, shortType(typeURL), want)
		}
		return resp
	}
	send(xdsgen.ListenerType, "", name("payments"), "nobody")
	first := recv(xdsgen.ListenerType, name("payments"))
	send(xdsgen.ListenerType, first.Nonce, name("payments"), "nobody") // ACK
	// A further name: Listeners come all together.
	send(xdsgen.ListenerType, first.Nonce, name("payments"), "nobody", name("catalog"))
	second := recv(xdsgen.ListenerType, name("catalog"), name("payments"))
	send(xdsgen.ListenerType, first.Nonce, name("payments")) // stale: ignored
	send(xdsgen.ListenerType, second.Nonce, name("payments"), "nobody", name("catalog"))
	send(xdsgen.EndpointType, "", name("payments"))
	eds := recv(xdsgen.EndpointType, name("payments"))
	send(xdsgen.EndpointType, eds.Nonce, name("payments"), name("catalog")) // only what is new
	eds = recv(xdsgen.EndpointType, name("catalog"))
	send(xdsgen.EndpointType, eds.Nonce, name("payments"), name("catalog"))
	// A change sends the changed endpoints, and the Listeners whole when one disappears.
	set.services["payments"] = append(set.services["payments"], endpoint("c", "10.0.0.3", "payments"))
	delete(set.services, "catalog")
	h.view(set.set())
	recv(xdsgen.EndpointType, name("payments"))
	recv(xdsgen.ListenerType, name("catalog"), name("payments")) // the first fails all calls now
	eventually(t, func() bool { return h.Proxies()[0].Types[0].Acked != "" })
}

func TestLoadReports(t *testing.T) {
	reports := make(chan Report, 1)
	h := start(t, func(c *Config) { c.OnReport = func(r Report) { reports <- r } })
	h.view(shop{}.set())
	<-h.ready
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	stream, err := loadv3.NewLoadReportingServiceClient(h.dial(h.own, frontend)).StreamLoadStats(ctx)
	must(t, err)
	must(t, stream.Send(&loadv3.LoadStatsRequest{Node: node("frontend-1", "hanse-proxy", nil)}))
	every := func(want time.Duration) {
		t.Helper()
		resp, err := stream.Recv()
		must(t, err)
		if !resp.SendAllClusters || !resp.ReportEndpointGranularity || resp.LoadReportingInterval.AsDuration() != want {
			t.Errorf("asked for %v, want every %v", resp, want)
		}
	}
	every(5 * time.Second)
	h.SetReportInterval(time.Second)
	every(time.Second)
	h.SetReportInterval(0)
	every(5 * time.Second)
	meta, err := structpb.NewStruct(map[string]any{
		"id": "e1", "health": "ejected", "reason": "5 errors", "health_since_ms": 1000.0, "p50_ms": 1.5, "p99_ms": 20.0, "retried": 2.0,
		"events": []any{map[string]any{"time_ms": 2000.0, "kind": "ejected", "detail": "x"}},
	})
	must(t, err)
	must(t, stream.Send(&loadv3.LoadStatsRequest{ClusterStats: []*endpointv3.ClusterStats{{
		ClusterName: name("payments"), LoadReportInterval: durationpb.New(5 * time.Second), TotalDroppedRequests: 1,
		UpstreamLocalityStats: []*endpointv3.UpstreamLocalityStats{
			{Locality: &corev3.Locality{Region: "eu-1", Zone: "eu-1a", SubZone: "east"}, Priority: 2,
				UpstreamEndpointStats: []*endpointv3.UpstreamEndpointStats{{
					Address:                 &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{Address: "10.0.0.1", PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: 15008}}}},
					TotalSuccessfulRequests: 10, TotalErrorRequests: 3, TotalIssuedRequests: 14, TotalRequestsInProgress: 1, Metadata: meta}}},
			{Locality: &corev3.Locality{SubZone: "north"}, TotalSuccessfulRequests: 4},
		},
	}}}))
	r := <-reports
	if r.Viewer.ID != "frontend-1" || len(r.Clusters) != 1 || r.Clusters[0].Service.Name != "payments" || r.Clusters[0].Dropped != 1 {
		t.Fatalf("report is %+v", r)
	}
	e := r.Clusters[0].Endpoints
	want := EndpointReport{
		ID: "e1", Address: "10.0.0.1:15008", Locality: discovery.Locality{Cluster: "east", Region: "eu-1", Zone: "eu-1a"}, Level: 2,
		Issued: 14, Succeeded: 10, Failed: 3, InProgress: 1, Retried: 2, P50: 1500 * time.Microsecond, P99: 20 * time.Millisecond,
		Health: "ejected", Reason: "5 errors", HealthSince: time.UnixMilli(1000),
		Events: []Event{{Time: time.UnixMilli(2000), Kind: "ejected", Detail: "x"}},
	}
	if len(e) != 2 || fmt.Sprint(e[0]) != fmt.Sprint(want) || e[1].Locality.Cluster != "north" || e[1].Succeeded != 4 {
		t.Errorf("endpoints are %+v", e)
	}
}

func TestCallersAreCounted(t *testing.T) {
	h := start(t)
	h.view(shop{services: map[string][]*discovery.Endpoint{"payments": nil}}.set())
	conn := h.dial(h.own, frontend)
	c := h.delta(conn, node("a", "hanse-proxy", nil))
	c.with(xdsgen.EndpointType, name("payments"), true)
	h.delta(conn, node("b", "hanse-proxy", nil)).with(xdsgen.EndpointType, name("payments"), true)
	payments := discovery.Name{Namespace: "shop", Name: "payments"}
	at := discovery.Locality{Cluster: "west", Region: "eu-1", Zone: "eu-1a"}
	if got, ok := h.freshCallers(); !ok || got[payments][at] != 2 {
		t.Errorf("callers are %v", got)
	}
	if _, ok := h.freshCallers(); ok {
		t.Error("nothing changed, and it is told again")
	}
	if len(h.Proxies()) != 2 {
		t.Errorf("proxies: %+v", h.Proxies())
	}
	must(t, conn.Close())
	eventually(t, func() bool { return len(h.Proxies()) == 0 })
	eventually(t, func() bool { got, ok := h.freshCallers(); return ok && len(got) == 0 })
}

func TestWithoutTLS(t *testing.T) {
	h := start(t)
	g := grpc.NewServer()
	h.Register(g)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	go g.Serve(ln)
	t.Cleanup(g.Stop)
	conn, err := grpc.NewClient(ln.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	stream, err := discoveryv3.NewAggregatedDiscoveryServiceClient(conn).StreamAggregatedResources(t.Context())
	must(t, err)
	if _, err := stream.Recv(); status.Code(err) != codes.Unauthenticated {
		t.Errorf("got %v", err)
	}
	reports, err := loadv3.NewLoadReportingServiceClient(conn).StreamLoadStats(t.Context())
	must(t, err)
	if _, err := reports.Recv(); status.Code(err) != codes.Unauthenticated {
		t.Errorf("got %v", err)
	}
}

// TestCacheKeepsWhatDidNotChange: a resource is made once for all viewers of a class, and again only after a change of it.
func TestCacheKeepsWhatDidNotChange(t *testing.T) {
	c := newCache()
	set := shop{services: map[string][]*discovery.Endpoint{"a": {endpoint("1", "10.0.0.1", "a")}, "b": {endpoint("2", "10.0.0.2", "b")}}}
	first := set.set()
	now := time.Now()
	c.apply(first, nil, now)
	viewer := &xdsgen.Viewer{ID: "v", Cluster: "west", Network: "west", Kind: xdsgen.Sidecar, SPIFFEID: "spiffe://west.demo/ns/shop/sa/a"}
	get := func(typeURL, name string) *xdsgen.Resource {
		t.Helper()
		r, err := c.get(viewer, typeURL, name, now)
		must(t, err)
		return r
	}
	a, b, in := get(xdsgen.EndpointType, name("a")), get(xdsgen.EndpointType, name("b")), get(xdsgen.ListenerType, xdsgen.InboundPrefix+"10.0.0.1")
	other := *viewer
	other.ID = "w"
	if r, _ := c.get(&other, xdsgen.EndpointType, name("a"), now); r != a {
		t.Error("made again for another viewer of the class")
	}
	second := *first
	local := *first.Local
	for n, s := range first.Local.Services.All() {
		if n.Name == "b" {
			copied := *s
			copied.Endpoints = nil
			s = &copied
		}
		local.Services = local.Services.Put(n, s)
	}
	second.Local = &local
	if !c.apply(&second, nil, now) {
		t.Fatal("no change seen")
	}
	if get(xdsgen.EndpointType, name("a")) != a || get(xdsgen.ListenerType, xdsgen.InboundPrefix+"10.0.0.1") != in {
		t.Error("made again without a change")
	}
	if get(xdsgen.EndpointType, name("b")) == b {
		t.Error("kept over a change")
	}
	stale := get(xdsgen.EndpointType, name("b"))
	c.apply(first, nil, now)
	c.sweep(now) // what changed is forgotten, and what is stale by it
	if len(c.service)+len(c.host) != 0 {
		t.Errorf("%d changes of services and %d of addresses are remembered for nobody", len(c.service), len(c.host))
	}
	if get(xdsgen.EndpointType, name("a")) != a || get(xdsgen.ListenerType, xdsgen.InboundPrefix+"10.0.0.1") != in {
		t.Error("made again after a sweep")
	}
	again := get(xdsgen.EndpointType, name("b"))
	c.apply(&second, nil, now)
	if again == stale || get(xdsgen.EndpointType, name("b")) == again {
		t.Error("kept over a change before or after a sweep")
	}
	if _, _, _, complete := c.since(0); !complete {
		t.Error("two changes are not remembered")
	}
	for range logLength + 1 {
		third := second
		third.Local = &discovery.Snapshot{Self: local.Self, Services: discovery.NewByName(map[discovery.Name]*discovery.Service{{Namespace: "x", Name: "x"}: {}})}
		c.apply(&third, nil, now)
	}
	if ch, _, _, complete := c.since(0); complete || len(ch) > logLength {
		t.Error("more is remembered than allowed")
	}
	c.sweep(now.Add(2 * idleEntry))
	if len(c.entries) != 0 {
		t.Errorf("%d entries outlive their use", len(c.entries))
	}
}
