package xdsclient

import (
	"testing"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/hanse-mesh/hanse/discovery/xdspb"
)

const (
	payments = "payments.shop.svc.clusterset.local:8080"
	canary   = "payments-canary.shop.svc.clusterset.local:8080"
)

func packed(t testing.TB, m proto.Message) *anypb.Any {
	t.Helper()
	a, err := anypb.New(m)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func metadata(t testing.TB, m proto.Message) *corev3.Metadata {
	return &corev3.Metadata{TypedFilterMetadata: map[string]*anypb.Any{metadataKey: packed(t, m)}}
}

// httpListener has the given routes.
func httpListener(t testing.TB, name string, routes ...*routev3.Route) *listenerv3.Listener {
	return &listenerv3.Listener{Name: name, ApiListener: &listenerv3.ApiListener{ApiListener: packed(t, &hcmv3.HttpConnectionManager{
		RouteSpecifier: &hcmv3.HttpConnectionManager_RouteConfig{RouteConfig: &routev3.RouteConfiguration{
			Name: name, VirtualHosts: []*routev3.VirtualHost{{Name: name, Domains: []string{"*"}, Routes: routes}},
		}},
	})}}
}

// to is the route of everything to clusters, with equal weights.
func to(clusters ...string) *routev3.Route {
	w := &routev3.WeightedCluster{}
	for _, c := range clusters {
		w.Clusters = append(w.Clusters, &routev3.WeightedCluster_ClusterWeight{Name: c, Weight: wrapperspb.UInt32(1)})
	}
	return &routev3.Route{
		Match:  &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: "/"}},
		Action: &routev3.Route_Route{Route: &routev3.RouteAction{ClusterSpecifier: &routev3.RouteAction_WeightedClusters{WeightedClusters: w}}},
	}
}

func tcpListener(t testing.TB, name string) *listenerv3.Listener {
	return &listenerv3.Listener{Name: name, ApiListener: &listenerv3.ApiListener{ApiListener: packed(t, &tcpv3.TcpProxy{
		StatPrefix: name, ClusterSpecifier: &tcpv3.TcpProxy_Cluster{Cluster: name},
	})}}
}

func edsCluster(t testing.TB, name string) *clusterv3.Cluster {
	return &clusterv3.Cluster{
		Name:                 name,
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_EDS},
		ConnectTimeout:       durationpb.New(500 * time.Millisecond),
		LbPolicy:             clusterv3.Cluster_LEAST_REQUEST,
		CircuitBreakers: &clusterv3.CircuitBreakers{Thresholds: []*clusterv3.CircuitBreakers_Thresholds{{
			MaxRequests: wrapperspb.UInt32(77),
			RetryBudget: &clusterv3.CircuitBreakers_Thresholds_RetryBudget{BudgetPercent: &typev3.Percent{Value: 25}, MinRetryConcurrency: wrapperspb.UInt32(5)},
		}}},
		OutlierDetection: &clusterv3.OutlierDetection{
			ConsecutiveGatewayFailure: wrapperspb.UInt32(4), Interval: durationpb.New(time.Second), BaseEjectionTime: durationpb.New(2 * time.Second),
			MaxEjectionTime: durationpb.New(time.Minute), MaxEjectionPercent: wrapperspb.UInt32(100),
		},
		CommonLbConfig: &clusterv3.Cluster_CommonLbConfig{HealthyPanicThreshold: &typev3.Percent{Value: 40}},
		Metadata:       metadata(t, &xdspb.ServiceMeta{Service: "shop/payments", Protocol: "grpc", HashHeader: "X-User"}),
	}
}

func socketAddress(ip string, port uint32) *corev3.Address {
	return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
		Address: ip, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: port}}}}
}

func lbEndpoint(t testing.TB, id, ip string, change ...func(*xdspb.EndpointMeta)) *endpointv3.LbEndpoint {
	m := &xdspb.EndpointMeta{Id: id, Cluster: "west", SpiffeId: "spiffe://west.test/ns/shop/sa/payments", Transport: "hop", Reason: "same zone"}
	for _, c := range change {
		c(m)
	}
	return &endpointv3.LbEndpoint{
		HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{Address: socketAddress(ip, 15008)}},
		HealthStatus:   corev3.HealthStatus_HEALTHY, Metadata: metadata(t, m), LoadBalancingWeight: wrapperspb.UInt32(3),
	}
}

func loadAssignment(name string, levels ...[]*endpointv3.LbEndpoint) *endpointv3.ClusterLoadAssignment {
	out := &endpointv3.ClusterLoadAssignment{
		ClusterName: name, Policy: &endpointv3.ClusterLoadAssignment_Policy{OverprovisioningFactor: wrapperspb.UInt32(140)},
	}
	for i, l := range levels {
		out.Endpoints = append(out.Endpoints, &endpointv3.LocalityLbEndpoints{
			Locality: &corev3.Locality{Region: "eu", Zone: "a", SubZone: "west"}, Priority: uint32(i), LbEndpoints: l, LoadBalancingWeight: wrapperspb.UInt32(1),
		})
	}
	return out
}

func inboundListener(t testing.TB, ip string, ports map[uint32]*xdspb.InboundMeta) *listenerv3.Listener {
	l := &listenerv3.Listener{Name: inboundPrefix + ip, Address: socketAddress(ip, 15008)}
	for port, m := range ports {
		l.FilterChains = append(l.FilterChains, &listenerv3.FilterChain{
			FilterChainMatch: &listenerv3.FilterChainMatch{DestinationPort: wrapperspb.UInt32(port)}, Metadata: metadata(t, m),
		})
	}
	return l
}

func inboundMeta() *xdspb.InboundMeta {
	return &xdspb.InboundMeta{
		Services: []string{payments}, Protocol: "http", TrustDomain: "west.test", DefaultAllow: true,
		Deny:  []*xdspb.AccessRule{{Policy: "AccessPolicy shop/no", From: []string{"spiffe://west.test/ns/bad/**"}, Methods: []string{"DELETE"}, Paths: []string{"/admin/*"}}},
		Allow: []*xdspb.AccessRule{{Policy: "AccessPolicy shop/yes", From: []string{"spiffe://east.test/ns/shop/sa/*"}, Foreign: true}},
	}
}

// fullRoute uses everything that a route can say.
func fullRoute(t testing.TB) *routev3.Route {
	exact := func(s string) *matcherv3.StringMatcher {
		return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Exact{Exact: s}}
	}
	regex := func(s string) *matcherv3.StringMatcher {
		return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_SafeRegex{SafeRegex: &matcherv3.RegexMatcher{Regex: s}}}
	}
	edit := func(k, v string, a corev3.HeaderValueOption_HeaderAppendAction) *corev3.HeaderValueOption {
		return &corev3.HeaderValueOption{Header: &corev3.HeaderValue{Key: k, Value: v}, AppendAction: a, KeepEmptyValue: true}
	}
	return &routev3.Route{
		Match: &routev3.RouteMatch{
			PathSpecifier: &routev3.RouteMatch_PathSeparatedPrefix{PathSeparatedPrefix: "/api"},
			Headers: []*routev3.HeaderMatcher{
				{Name: ":method", HeaderMatchSpecifier: &routev3.HeaderMatcher_StringMatch{StringMatch: exact("POST")}},
				{Name: "X-Version", HeaderMatchSpecifier: &routev3.HeaderMatcher_StringMatch{StringMatch: regex("v[0-9]+")}},
			},
			QueryParameters: []*routev3.QueryParameterMatcher{
				{Name: "user", QueryParameterMatchSpecifier: &routev3.QueryParameterMatcher_StringMatch{StringMatch: exact("me")}},
			},
		},
		Action: &routev3.Route_Route{Route: &routev3.RouteAction{
			ClusterSpecifier: &routev3.RouteAction_WeightedClusters{WeightedClusters: &routev3.WeightedCluster{Clusters: []*routev3.WeightedCluster_ClusterWeight{
				{Name: payments, Weight: wrapperspb.UInt32(90), RequestHeadersToAdd: []*corev3.HeaderValueOption{edit("x-to", "a", corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD)}},
				{Name: canary, Weight: wrapperspb.UInt32(9), HostRewriteSpecifier: &routev3.WeightedCluster_ClusterWeight_HostRewriteLiteral{HostRewriteLiteral: "canary"}},
				{Name: invalidCluster, Weight: wrapperspb.UInt32(1)},
			}}},
			PrefixRewrite: "/v2",
			Timeout:       durationpb.New(3 * time.Second),
			RetryPolicy: &routev3.RetryPolicy{
				RetryOn: "connect-failure,refused-stream,reset-before-request,retriable-status-codes", NumRetries: wrapperspb.UInt32(2),
				PerTryTimeout: durationpb.New(time.Second), RetriableStatusCodes: []uint32{503},
				RetryBackOff: &routev3.RetryPolicy_RetryBackOff{BaseInterval: durationpb.New(25 * time.Millisecond)},
			},
			RequestMirrorPolicies: []*routev3.RouteAction_RequestMirrorPolicy{{Cluster: canary}},
		}},
		RequestHeadersToAdd:     []*corev3.HeaderValueOption{edit("x-set", "1", corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD), edit("x-add", "2", corev3.HeaderValueOption_APPEND_IF_EXISTS_OR_ADD)},
		ResponseHeadersToRemove: []string{"server"},
		Metadata:                metadata(t, &xdspb.RouteMeta{Name: "HTTPRoute shop/payments rule 2", RetryGrpc: []uint32{14}}),
	}
}
