package xdsserver

import (
	"context"
	"testing"

	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	loadv3 "github.com/envoyproxy/go-control-plane/envoy/service/load_stats/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/discovery/xdsgen"
	"github.com/hanse-mesh/hanse/identity"
)

// fuzzServer has a view and no network.
func fuzzServer(f *testing.F) *Server {
	f.Helper()
	s, err := New(Config{Source: identity.NewSource(), TrustDomain: spiffeid.RequireTrustDomainFromString("west.demo")})
	must(f, err)
	s.cache.apply(shop{exported: true, services: map[string][]*discovery.Endpoint{"payments": {endpoint("a", "10.0.0.1", "payments")}}}.set(), nil, s.now())
	s.SetTrust(map[string]uint64{"west.demo": 1}, 1, nil)
	return s
}

// fuzzSession is a stream of its own, of a gateway or of a workload.
func fuzzSession(s *Server, gateway bool) *session {
	id := spiffeid.RequireFromString("spiffe://west.demo/ns/shop/sa/payments")
	if gateway {
		id = identity.GatewayID(s.cfg.TrustDomain)
	}
	_, end := context.WithCancelCause(context.Background())
	return &session{s: s, peer: &peer{id: id}, end: end, types: make(map[string]*subscriptions),
		subjects: make(map[subject]map[key]struct{}), status: make(map[string]*TypeStatus)}
}

// FuzzRequests feeds a stream two requests in either variant, with a change of the view between them.
func FuzzRequests(f *testing.F) {
	s := fuzzServer(f)
	for _, typeURL := range sendOrder {
		for _, names := range [][]string{nil, {"*"}, {name("payments"), xdsgen.InboundPrefix + "10.0.0.1", "trust", "faults"}} {
			d, err := proto.Marshal(&discoveryv3.DeltaDiscoveryRequest{Node: node("n", "hanse-proxy", map[string]any{"push_dependencies": true, "workload_ips": []any{"10.0.0.1"}}),
				TypeUrl: typeURL, ResourceNamesSubscribe: names, InitialResourceVersions: map[string]string{"x": "1"}})
			must(f, err)
			w, err := proto.Marshal(&discoveryv3.DiscoveryRequest{Node: node("n", "gRPC Go", nil), TypeUrl: typeURL, ResourceNames: names})
			must(f, err)
			f.Add(d, w, false)
			f.Add(d, d, true)
			f.Add(w, w, false)
		}
	}
	f.Fuzz(func(t *testing.T, first, second []byte, gateway bool) {
		var a, b discoveryv3.DeltaDiscoveryRequest
		if proto.Unmarshal(first, &a) == nil && proto.Unmarshal(second, &b) == nil {
			sent := 0
			d := &delta{session: fuzzSession(s, gateway), send: func(r *discoveryv3.DeltaDiscoveryResponse) error { sent++; return nil }}
			for _, req := range []*discoveryv3.DeltaDiscoveryRequest{&a, &b} {
				if d.request(req) != nil {
					break
				}
				d.seq = 0
				if err := d.refresh(); err != nil {
					t.Fatal(err)
				}
			}
			if d.names > maxNames || len(d.types) > maxTypes {
				t.Fatalf("%d names, %d types", d.names, len(d.types))
			}
		}
		var c, e discoveryv3.DiscoveryRequest
		if proto.Unmarshal(first, &c) == nil && proto.Unmarshal(second, &e) == nil {
			w := &sotw{session: fuzzSession(s, gateway), send: func(*discoveryv3.DiscoveryResponse) error { return nil }}
			for _, req := range []*discoveryv3.DiscoveryRequest{&c, &e} {
				if w.request(req) != nil {
					break
				}
				w.seq = 0
				if err := w.refresh(); err != nil {
					t.Fatal(err)
				}
			}
		}
	})
}

func FuzzLoadReport(f *testing.F) {
	s := fuzzServer(f)
	meta, err := structpb.NewStruct(map[string]any{"id": "e", "p50_ms": 1e300, "retried": -1.0, "health_since_ms": 5.0,
		"events": []any{map[string]any{"time_ms": 1.0, "kind": "ejected"}, "x"}})
	must(f, err)
	seed, err := proto.Marshal(&loadv3.LoadStatsRequest{Node: node("n", "hanse-proxy", nil), ClusterStats: []*endpointv3.ClusterStats{{
		ClusterName: name("payments"), UpstreamLocalityStats: []*endpointv3.UpstreamLocalityStats{{
			UpstreamEndpointStats: []*endpointv3.UpstreamEndpointStats{{Metadata: meta}}}}}}})
	must(f, err)
	f.Add(seed)
	f.Fuzz(func(t *testing.T, b []byte) {
		var req loadv3.LoadStatsRequest
		if proto.Unmarshal(b, &req) != nil {
			return
		}
		v, _ := s.describe(spiffeid.RequireFromString("spiffe://west.demo/ns/shop/sa/x"), req.GetNode())
		if len(v.ID) > maxNodeString || len(v.WorkloadIPs) > maxWorkloadIPs || v.SPIFFEID != "spiffe://west.demo/ns/shop/sa/x" || v.Namespace != "shop" {
			t.Fatalf("viewer is %+v", v)
		}
		for _, c := range s.report(&v, req.GetClusterStats()).Clusters {
			for _, e := range c.Endpoints {
				if len(e.Events) > maxEvents || e.P50 < 0 || e.P99 < 0 || len(e.Reason) > maxNodeString {
					t.Fatalf("report is %+v", e)
				}
			}
		}
	})
}
