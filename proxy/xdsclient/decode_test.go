package xdsclient

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/hanse-mesh/hanse/discovery/xdspb"
	"github.com/hanse-mesh/hanse/proxy"
)

// sample is a good resource.
type sample struct {
	typeURL, name string
	m             proto.Message
}

func samples(t testing.TB) []sample {
	redirect := to(payments)
	redirect.Action = &routev3.Route_Redirect{Redirect: &routev3.RedirectAction{
		SchemeRewriteSpecifier: &routev3.RedirectAction_SchemeRedirect{SchemeRedirect: "https"}, HostRedirect: "example.org", PortRedirect: 8443,
		PathRewriteSpecifier: &routev3.RedirectAction_PrefixRewrite{PrefixRewrite: "/new"}, ResponseCode: routev3.RedirectAction_PERMANENT_REDIRECT,
	}}
	direct := to(payments)
	direct.Action = &routev3.Route_DirectResponse{DirectResponse: &routev3.DirectResponseAction{Status: 500}}
	whole := to(payments)
	whole.GetRoute().RegexRewrite = &matcherv3.RegexMatchAndSubstitute{Pattern: &matcherv3.RegexMatcher{Regex: "^.*$"}, Substitution: `/a\\b`}
	far := func(m *xdspb.EndpointMeta) {
		m.Gateways, m.Sni, m.Suspect = []string{"192.0.2.1:15443", "[2001:db8::1]:15443"}, "e2.endpoint.hanse", true
	}
	return []sample{
		{listenerType, payments, httpListener(t, payments, fullRoute(t), redirect, direct, whole)},
		{listenerType, payments, tcpListener(t, payments)},
		{listenerType, inboundPrefix + "10.0.0.1", inboundListener(t, "10.0.0.1", map[uint32]*xdspb.InboundMeta{8080: inboundMeta()})},
		{clusterType, payments, edsCluster(t, payments)},
		{endpointType, payments, loadAssignment(payments, []*endpointv3.LbEndpoint{lbEndpoint(t, "e1", "10.0.0.2")}, []*endpointv3.LbEndpoint{lbEndpoint(t, "e2", "2001:db8::2", far)})},
		{trustType, trustName, &xdspb.Trust{Sequences: map[string]uint64{"west.test": 3}}},
		{faultsType, faultsName, &xdspb.Faults{Faults: []*xdspb.Fault{{
			Drill: "d1", Mode: "errors", Share: 30, Status: 503, Ports: []uint32{8080}, End: durationpb.New(time.Minute), Lease: durationpb.New(15 * time.Second), Renewal: 4}}}},
	}
}

func TestDecodeListener(t *testing.T) {
	s := samples(t)[0]
	v, err := decode(s.typeURL, s.name, packed(t, s.m), false)
	if err != nil {
		t.Fatal(err)
	}
	p := func(s string) *string { return &s }
	re, _ := proxy.CompileWhole("v[0-9]+")
	retry := proxy.Retry{Attempts: 2, Codes: []int{503}, GRPC: []int{14}, Backoff: 25 * time.Millisecond}
	want := &outbound{
		clusters: []string{canary, payments},
		listener: &proxy.Listener{Authority: payments, Protocol: proxy.HTTP, Routes: []*proxy.Route{
			{
				Name: "HTTPRoute shop/payments rule 2",
				Match: proxy.Match{PathPrefix: "/api", Method: "POST", Headers: []proxy.ValueMatch{{Name: "x-version", Regex: re}},
					Query: []proxy.ValueMatch{{Name: "user", Exact: "me"}}},
				Request:  proxy.HeaderEdits{Set: []proxy.Header{{Name: "x-set", Value: "1"}}, Add: []proxy.Header{{Name: "x-add", Value: "2"}}},
				Response: proxy.HeaderEdits{Remove: []string{"server"}},
				Rewrite:  proxy.Rewrite{ReplacePrefix: p("/v2")},
				Backends: []proxy.Backend{
					{Cluster: payments, Weight: 90, Request: proxy.HeaderEdits{Set: []proxy.Header{{Name: "x-to", Value: "a"}}}},
					{Cluster: canary, Weight: 9, Rewrite: proxy.Rewrite{Host: "canary"}},
					{Cluster: invalidCluster, Weight: 1, DirectStatus: 500},
				},
				Mirror: &proxy.Backend{Cluster: canary, Weight: 100}, RequestTimeout: 3 * time.Second, TryTimeout: time.Second, Retry: retry,
			},
			{Redirect: &proxy.Redirect{Scheme: "https", Host: "example.org", Port: 8443, Status: 308, ReplacePrefix: p("/new")}},
			{DirectStatus: 500},
			{Rewrite: proxy.Rewrite{ReplacePath: p(`/a\b`)}, Backends: []proxy.Backend{{Cluster: payments, Weight: 1}}},
		}},
	}
	regexes := cmp.Comparer(func(a, b proxy.ValueMatch) bool {
		return a.Name == b.Name && a.Exact == b.Exact && (a.Regex == nil) == (b.Regex == nil) && (a.Regex == nil || a.Regex.String() == b.Regex.String())
	})
	if d := cmp.Diff(want, v, cmp.AllowUnexported(outbound{}), regexes, cmpopts.EquateEmpty()); d != "" {
		t.Error(d)
	}
}

func TestDecodeOthers(t *testing.T) {
	get := func(i int) any {
		s := samples(t)[i]
		v, err := decode(s.typeURL, s.name, packed(t, s.m), false)
		if err != nil {
			t.Fatalf("%s: %v", s.typeURL, err)
		}
		return v
	}
	if o := get(1).(*outbound); o.listener.Protocol != proxy.TCP || o.listener.Cluster != payments || !slices.Equal(o.clusters, []string{payments}) {
		t.Errorf("TCP listener %+v", o)
	}
	in := get(2).(*proxy.Inbound)
	if d := in.Ports[0].Access.Check("spiffe://east.test/ns/shop/sa/x", "GET", "/"); !d.Allow {
		t.Errorf("inbound %+v: %+v", in, d)
	}
	if d := in.Ports[0].Access.Check("spiffe://west.test/ns/bad/sa/x", "DELETE", "/admin/x"); d.Allow {
		t.Errorf("inbound %+v: %+v", in, d)
	}
	want := &proxy.Cluster{
		Name: payments, Service: "shop/payments", Protocol: proxy.GRPC, ConnectTimeout: 500 * time.Millisecond, Policy: "least_request", HashHeader: "x-user",
		MaxRequests: 77, RetryBudget: proxy.Budget{Percent: 25, MinConcurrency: 5}, Overprovisioning: 140, PanicThreshold: 40,
		Outlier: proxy.Outlier{ConsecutiveErrors: 4, Interval: time.Second, BaseEjection: 2 * time.Second, MaxEjection: time.Minute, MaxPercent: 100},
	}
	if d := cmp.Diff(want, get(3)); d != "" {
		t.Error(d)
	}
	a := get(4).(*assignment)
	e := a.levels[1].Localities[0].Endpoints[0]
	if len(a.levels) != 2 || len(e.Gateways) != 2 || !e.Suspect || e.Weight != 3 || e.Locality.Cluster != "west" || e.Address.String() != "[2001:db8::2]:15008" {
		t.Errorf("assignment %+v", e)
	}
	fs := get(6).([]proxy.Fault)
	if fs[0].Mode != proxy.FaultErrors || fs[0].Status != 503 || fs[0].End != time.Minute || fs[0].Renewal != 4 {
		t.Errorf("faults %+v", fs)
	}
}

// TestDecodeRejects changes one thing of a good resource; the error must name it.
func TestDecodeRejects(t *testing.T) {
	route := func(change func(*routev3.Route)) proto.Message {
		r := fullRoute(t)
		change(r)
		return httpListener(t, payments, r)
	}
	cluster := func(change func(*clusterv3.Cluster)) proto.Message {
		c := edsCluster(t, payments)
		change(c)
		return c
	}
	endpoint := func(change func(*xdspb.EndpointMeta)) proto.Message {
		return loadAssignment(payments, []*endpointv3.LbEndpoint{lbEndpoint(t, "e1", "10.0.0.2", change)})
	}
	inbound := func(change func(*xdspb.InboundMeta)) proto.Message {
		m := inboundMeta()
		change(m)
		return inboundListener(t, "10.0.0.1", map[uint32]*xdspb.InboundMeta{8080: m})
	}
	fault := func(f *xdspb.Fault) proto.Message { return &xdspb.Faults{Faults: []*xdspb.Fault{f}} }
	in := inboundPrefix + "10.0.0.1"
	for _, c := range []struct {
		typeURL, name string
		m             proto.Message
		want          string
	}{
		{listenerType, "other", httpListener(t, payments), "name is"},
		{listenerType, payments, &listenerv3.Listener{Name: payments}, "neither api_listener nor filter_chains is set"},
		{listenerType, payments, &listenerv3.Listener{Name: payments, ApiListener: &listenerv3.ApiListener{ApiListener: packed(t, &xdspb.Trust{})}}, "api_listener is a"},
		{listenerType, payments, route(func(r *routev3.Route) { r.Match.PathSpecifier = &routev3.RouteMatch_Prefix{Prefix: "/a"} }), "routes[0].match.prefix"},
		{listenerType, payments, route(func(r *routev3.Route) { r.Match.Grpc = &routev3.RouteMatch_GrpcRouteMatchOptions{} }), "routes[0].match.grpc"},
		{listenerType, payments, route(func(r *routev3.Route) {
			r.Match.RuntimeFraction = &corev3.RuntimeFractionalPercent{DefaultValue: &typev3.FractionalPercent{}}
		}), "match.runtime_fraction"},
		{listenerType, payments, route(func(r *routev3.Route) { r.Match.Headers[1].InvertMatch = true }), "match.headers[1]: invert_match"},
		{listenerType, payments, route(func(r *routev3.Route) { r.Match.Headers[1].GetStringMatch().GetSafeRegex().Regex = "(" }), "match.headers[1].string_match.safe_regex"},
		{listenerType, payments, route(func(r *routev3.Route) { r.Match.Headers[0].GetStringMatch().IgnoreCase = true }), "match.headers[0].string_match: ignore_case"},
		{listenerType, payments, route(func(r *routev3.Route) { r.Match.Headers[0].Name = ":path" }), "match.headers[0].name"},
		{listenerType, payments, route(func(r *routev3.Route) { r.Action = &routev3.Route_NonForwardingAction{} }), "non_forwarding_action"},
		{listenerType, payments, route(func(r *routev3.Route) { r.Action = nil }), "action is missing"},
		{listenerType, payments, route(func(r *routev3.Route) { r.GetRoute().RetryPolicy.RetryOn = "5xx" }), "route.retry_policy.retry_on"},
		{listenerType, payments, route(func(r *routev3.Route) { r.GetRoute().Timeout = durationpb.New(-1) }), "route.timeout"},
		{listenerType, payments, route(func(r *routev3.Route) { r.GetRoute().GetWeightedClusters().Clusters[1].Name = "" }), "weighted_clusters.clusters[1].name"},
		{listenerType, payments, route(func(r *routev3.Route) { r.RequestHeadersToAdd[0].Header.Value = "a\r\nb" }), "request_headers_to_add[0].header"},
		{listenerType, payments, route(func(r *routev3.Route) { r.ResponseHeadersToRemove[0] = "a b" }), "response_headers_to_remove[0]"},
		{listenerType, payments, route(func(r *routev3.Route) {
			r.GetRoute().RegexRewrite = &matcherv3.RegexMatchAndSubstitute{Pattern: &matcherv3.RegexMatcher{Regex: "^/a"}, Substitution: "/b"}
		}), "route.regex_rewrite"},
		{listenerType, payments, route(func(r *routev3.Route) {
			r.Match.ProtoReflect().SetUnknown([]byte{0xf8, 0x7f, 0x01})
		}), "does not know"},
		{listenerType, payments, httpListener(t, payments, slices.Repeat([]*routev3.Route{to(payments)}, maxRoutes+1)...), "virtual_hosts[0].routes"},
		{listenerType, in, &listenerv3.Listener{Name: in, FilterChains: []*listenerv3.FilterChain{{}}}, "filter_chains[0].filter_chain_match"},
		{listenerType, in, inbound(func(m *xdspb.InboundMeta) { m.TrustDomain = "" }), "metadata.trust_domain"},
		{listenerType, in, inbound(func(m *xdspb.InboundMeta) { m.Protocol = "smtp" }), "metadata.protocol"},
		{listenerType, in, inbound(func(m *xdspb.InboundMeta) { m.Deny[0].From[0] = "west/*" }), "metadata.deny[0].from[0]"},
		{listenerType, in, inbound(func(m *xdspb.InboundMeta) { m.Deny[0].Paths[0] = "/a*b" }), "metadata.deny[0].paths[0]"},
		{listenerType, in, inbound(func(m *xdspb.InboundMeta) { m.Allow[0].ProtoReflect().SetUnknown([]byte{0xf8, 0x7f, 0x01}) }), "metadata.allow[0]"},
		{clusterType, payments, cluster(func(c *clusterv3.Cluster) { c.ClusterDiscoveryType = nil }), "type is"},
		{clusterType, payments, cluster(func(c *clusterv3.Cluster) { c.LbPolicy = clusterv3.Cluster_MAGLEV }), "lb_policy"},
		{clusterType, payments, cluster(func(c *clusterv3.Cluster) { c.OutlierDetection.MaxEjectionPercent = wrapperspb.UInt32(101) }), "outlier_detection.max_ejection_percent"},
		{clusterType, payments, cluster(func(c *clusterv3.Cluster) { c.CommonLbConfig.HealthyPanicThreshold.Value = -1 }), "healthy_panic_threshold"},
		{endpointType, "other", loadAssignment(payments), "cluster_name"},
		{endpointType, payments, endpoint(func(m *xdspb.EndpointMeta) { m.Id = "" }), "lb_endpoints[0].metadata: no endpoint ID"},
		{endpointType, payments, endpoint(func(m *xdspb.EndpointMeta) { m.SpiffeId = "" }), "metadata.spiffe_id"},
		{endpointType, payments, endpoint(func(m *xdspb.EndpointMeta) { m.Transport = "pigeon" }), "metadata.transport"},
		{endpointType, payments, endpoint(func(m *xdspb.EndpointMeta) { m.Gateways, m.Sni = []string{"gw.example"}, "x" }), "metadata.gateways"},
		{endpointType, payments, endpoint(func(m *xdspb.EndpointMeta) { m.Gateways = []string{"192.0.2.1:1"} }), "needs an SNI"},
		{endpointType, payments, loadAssignment(payments, []*endpointv3.LbEndpoint{lbEndpoint(t, "e1", "x.example")}), "lb_endpoints[0].endpoint.address"},
		{endpointType, payments, loadAssignment(payments, []*endpointv3.LbEndpoint{lbEndpoint(t, "e1", "10.0.0.2"), lbEndpoint(t, "e1", "10.0.0.3")}), "is there twice"},
		{faultsType, faultsName, fault(&xdspb.Fault{Mode: "fire", Share: 1}), "faults[0].mode"},
		{faultsType, faultsName, fault(&xdspb.Fault{Mode: "drain", Share: 101}), "faults[0].share"},
		{faultsType, faultsName, fault(&xdspb.Fault{Mode: "errors", Share: 1}), "faults[0].status"},
		{faultsType, faultsName, fault(&xdspb.Fault{Mode: "drain", Share: 1, Ports: []uint32{70_000}}), "faults[0].ports"},
	} {
		_, err := decode(c.typeURL, c.name, packed(t, c.m), false)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("want an error on %s, got %v", c.want, err)
		}
	}
	if _, err := decode(listenerType, payments, nil, false); err == nil {
		t.Error("decoded nothing")
	}
	if _, err := decode(listenerType, payments, &anypb.Any{TypeUrl: listenerType, Value: []byte{0xff}}, false); err == nil {
		t.Error("decoded garbage")
	}
	if _, err := decode(listenerType, payments, &anypb.Any{TypeUrl: listenerType, Value: make([]byte, maxResource+1)}, false); err == nil {
		t.Error("decoded too much")
	}
}

func TestOverlongErrorsAreCut(t *testing.T) {
	m := ack(&discoveryv3.DeltaDiscoveryResponse{}, errors.New(strings.Repeat("ä", 20_000)))
	if len(m.ErrorDetail.Message) > 9<<10 {
		t.Errorf("NACK of %d bytes", len(m.ErrorDetail.Message))
	}
	if _, err := proto.Marshal(ack(&discoveryv3.DeltaDiscoveryResponse{}, errors.New("bad \xff byte"))); err != nil {
		t.Errorf("NACK cannot be sent: %v", err)
	}
}

// FuzzDecode feeds the decoder with what a control plane may send. The seeds are the samples and the goldens of xdsgen.
func FuzzDecode(f *testing.F) {
	seeds := 0
	for _, s := range samples(f) {
		a := packed(f, s.m)
		f.Add(a.TypeUrl, s.name, a.Value, false)
		f.Add(a.TypeUrl, s.name, a.Value, true)
		seeds++
	}
	for _, g := range goldens(f) {
		f.Add(g.typeURL, g.name, packed(f, g.m).Value, g.gateway)
		seeds++
	}
	if seeds == 0 {
		f.Fatal("no seeds")
	}
	f.Fuzz(func(t *testing.T, typeURL, name string, value []byte, gateway bool) {
		v, err := decode(typeURL, name, &anypb.Any{TypeUrl: typeURL, Value: value}, gateway)
		if err != nil && (v != nil || err.Error() == "") {
			t.Errorf("value %v beside error %v", v, err)
		}
		if o, ok := v.(*outbound); ok {
			o.listener.Match(&proxy.Request{Method: "GET", Path: "/"})
		}
	})
}

func FuzzState(f *testing.F) {
	s := newStore(false, nil)
	s.want(payments)
	s.subscribe()
	for _, smp := range samples(f) {
		if k := s.byURL[smp.typeURL]; smp.name == payments {
			if err := s.take(k, smp.name, "v1", packed(f, smp.m), time.Time{}); err != nil {
				f.Fatal(err)
			}
		}
	}
	dir := f.TempDir()
	messages := s.snapshot("me")
	if messages == nil {
		f.Fatal("no seed")
	}
	if _, err := save(dir, messages); err != nil {
		f.Fatal(err)
	}
	raw, err := os.ReadFile(filepath.Join(dir, stateFile))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw)
	f.Add(raw[:len(raw)/2])
	f.Fuzz(func(t *testing.T, raw []byte) {
		kept, err := parseState(raw, "me")
		if err != nil && kept != nil {
			t.Error("value beside error")
		}
		_ = newStore(false, nil).restore(kept, time.Time{})
		if err == nil && !bytes.HasPrefix(raw, []byte(stateMagic)) {
			t.Error("accepted without its magic")
		}
	})
}
