package xdsgen

import (
	"reflect"
	"regexp"
	"slices"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/discovery/xdspb"
)

// Retries of what never reached an application, where a route says nothing.
const (
	unreachedRetries = 2
	retryUnreached   = "connect-failure,refused-stream,reset-before-request"
)

// listener is the outbound Listener of an authority, with its routes inline.
func (v *View) listener(viewer *Viewer, c *callee) (proto.Message, error) {
	if !c.port.Protocol.IsHTTP() && viewer.Kind != GRPC {
		return tcpListener(c.authority, v.routing(viewer, c).Rules)
	}
	routes, err := v.routeConfiguration(viewer, c)
	if err != nil {
		return nil, err
	}
	return httpListener(c.authority, routes)
}

// tcpListener has an API listener where all connections go one way, and filter chains by server name where TLSRoutes part them. Without a default chain, the others are refused.
func tcpListener(authority string, rules []Rule) (proto.Message, error) {
	if len(rules) == 1 && len(rules[0].SNI) == 0 {
		return apiListener(authority, tcpProxy(authority, &rules[0]))
	}
	out := &listenerv3.Listener{Name: authority}
	for i := range rules {
		config, err := packed(tcpProxy(authority, &rules[i]))
		if err != nil {
			return nil, err
		}
		chain := &listenerv3.FilterChain{Name: rules[i].Name, Filters: []*listenerv3.Filter{{Name: "envoy.filters.network.tcp_proxy", ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: config}}}}
		if len(rules[i].SNI) == 0 {
			out.DefaultFilterChain = chain
			continue
		}
		chain.FilterChainMatch = &listenerv3.FilterChainMatch{ServerNames: rules[i].SNI}
		out.FilterChains = append(out.FilterChains, chain)
	}
	return out, nil
}

func tcpProxy(authority string, r *Rule) *tcpv3.TcpProxy {
	out := &tcpv3.TcpProxy{StatPrefix: authority}
	if len(r.Targets) == 1 && r.Targets[0].Invalid == "" && r.Targets[0].Weight > 0 {
		out.ClusterSpecifier = &tcpv3.TcpProxy_Cluster{Cluster: r.Targets[0].Authority}
		return out
	}
	split := &tcpv3.TcpProxy_WeightedCluster{}
	for _, t := range r.Targets {
		if t.Weight == 0 {
			continue
		}
		name := t.Authority
		if t.Invalid != "" {
			name = InvalidCluster
		}
		split.Clusters = append(split.Clusters, &tcpv3.TcpProxy_WeightedCluster_ClusterWeight{Name: name, Weight: t.Weight})
	}
	if len(split.Clusters) == 0 { // all connections are refused
		split.Clusters = append(split.Clusters, &tcpv3.TcpProxy_WeightedCluster_ClusterWeight{Name: InvalidCluster, Weight: 1})
	}
	out.ClusterSpecifier = &tcpv3.TcpProxy_WeightedClusters{WeightedClusters: split}
	return out
}

func httpListener(name string, routes *routev3.RouteConfiguration) (proto.Message, error) {
	router, err := httpFilter("envoy.filters.http.router", &routerv3.Router{})
	if err != nil {
		return nil, err
	}
	return apiListener(name, &hcmv3.HttpConnectionManager{
		StatPrefix:     name,
		RouteSpecifier: &hcmv3.HttpConnectionManager_RouteConfig{RouteConfig: routes},
		HttpFilters:    []*hcmv3.HttpFilter{router},
	})
}

func apiListener(name string, config proto.Message) (proto.Message, error) {
	api, err := packed(config)
	if err != nil {
		return nil, err
	}
	return &listenerv3.Listener{Name: name, ApiListener: &listenerv3.ApiListener{ApiListener: api}}, nil
}

// failingListener lets calls to an unknown name fail at once: of what is absent from a state-of-the-world response a gRPC client
// waits 15 s for.
func failingListener(name, why string) (proto.Message, error) {
	return httpListener(name, &routev3.RouteConfiguration{Name: name, VirtualHosts: []*routev3.VirtualHost{{
		Name: name, Domains: []string{"*"}, Routes: []*routev3.Route{{
			Match:  &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: "/"}},
			Action: directResponse(404, why),
		}},
	}}})
}

func httpFilter(name string, m proto.Message) (*hcmv3.HttpFilter, error) {
	config, err := packed(m)
	if err != nil {
		return nil, err
	}
	return &hcmv3.HttpFilter{Name: name, ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: config}}, nil
}

func (v *View) routeConfiguration(viewer *Viewer, c *callee) (*routev3.RouteConfiguration, error) {
	vh := &routev3.VirtualHost{Name: c.authority, Domains: []string{"*"}}
	routing := v.routing(viewer, c)
	for i := range routing.Rules {
		r := &routing.Rules[i]
		if len(r.SNI) > 0 { // no gRPC client's connections are of that kind
			continue
		}
		var route *routev3.Route
		if viewer.Kind == GRPC {
			route = grpcRoute(c, r)
		} else {
			route = &routev3.Route{Match: envoyMatch(&r.Match)}
			envoyAction(c, r, route)
		}
		if route == nil {
			continue // no gRPC call can match
		}
		meta, err := metadata(&xdspb.RouteMeta{Name: r.Name})
		if err != nil {
			return nil, err
		}
		route.Metadata = meta
		vh.Routes = append(vh.Routes, route)
	}
	return &routev3.RouteConfiguration{Name: c.authority, VirtualHosts: []*routev3.VirtualHost{vh}}, nil
}

func envoyMatch(m *discovery.RouteMatch) *routev3.RouteMatch {
	out := &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: "/"}}
	if p := m.Path; p != nil {
		switch p.Type {
		case discovery.MatchExact:
			out.PathSpecifier = &routev3.RouteMatch_Path{Path: p.Value}
		case discovery.MatchRegex:
			out.PathSpecifier = &routev3.RouteMatch_SafeRegex{SafeRegex: safeRegex(p.Value)}
		default:
			if prefix := strings.TrimRight(p.Value, "/"); prefix != "" {
				out.PathSpecifier = &routev3.RouteMatch_PathSeparatedPrefix{PathSeparatedPrefix: prefix}
			}
		}
	}
	if m.Method != "" {
		out.Headers = append(out.Headers, headerMatcher(discovery.ValueMatch{Type: discovery.MatchExact, Name: ":method", Value: m.Method}))
	}
	for _, h := range m.Headers {
		out.Headers = append(out.Headers, headerMatcher(h))
	}
	for _, q := range m.Query {
		out.QueryParameters = append(out.QueryParameters, &routev3.QueryParameterMatcher{
			Name:                         q.Name,
			QueryParameterMatchSpecifier: &routev3.QueryParameterMatcher_StringMatch{StringMatch: stringMatcher(q)},
		})
	}
	return out
}

func headerMatcher(h discovery.ValueMatch) *routev3.HeaderMatcher {
	return &routev3.HeaderMatcher{
		Name:                 strings.ToLower(h.Name),
		HeaderMatchSpecifier: &routev3.HeaderMatcher_StringMatch{StringMatch: stringMatcher(h)},
	}
}

func stringMatcher(v discovery.ValueMatch) *matcherv3.StringMatcher {
	if v.Type == discovery.MatchRegex {
		return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_SafeRegex{SafeRegex: safeRegex(v.Value)}}
	}
	return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Exact{Exact: v.Value}}
}

// safeRegex matches the whole value.
func safeRegex(re string) *matcherv3.RegexMatcher { return &matcherv3.RegexMatcher{Regex: re} }

// envoyAction fills a Route with all that the rule does.
func envoyAction(c *callee, r *Rule, route *routev3.Route) {
	route.RequestHeadersToAdd, route.RequestHeadersToRemove = headerEdits(r.Filters.Request)
	route.ResponseHeadersToAdd, route.ResponseHeadersToRemove = headerEdits(r.Filters.Response)
	if r.Filters.Redirect != nil {
		route.Action = &routev3.Route_Redirect{Redirect: redirect(r.Filters.Redirect)}
		return
	}
	if !slices.ContainsFunc(r.Targets, func(t Target) bool { return t.Invalid == "" && t.Weight > 0 }) {
		route.Action = directResponse(500, "no valid backend")
		return
	}
	a := &routev3.RouteAction{
		Timeout:                     durationpb.New(r.Request), // 0 turns Envoy's default of 15 s off
		RetryPolicy:                 retryPolicy(r),
		ClusterNotFoundResponseCode: routev3.RouteAction_INTERNAL_SERVER_ERROR,
		HashPolicy:                  hashPolicy(c),
	}
	if w := r.Filters.Rewrite; w != nil {
		if w.Host != "" {
			a.HostRewriteSpecifier = &routev3.RouteAction_HostRewriteLiteral{HostRewriteLiteral: w.Host}
		}
		switch {
		case w.ReplacePath != nil:
			a.RegexRewrite = &matcherv3.RegexMatchAndSubstitute{
				Pattern:      safeRegex("^.*$"),
				Substitution: strings.ReplaceAll(*w.ReplacePath, `\`, `\\`),
			}
		case w.ReplacePrefix != nil:
			a.PrefixRewrite = *w.ReplacePrefix
			if a.PrefixRewrite == "" {
				a.PrefixRewrite = "/"
			}
		}
	}
	if m := r.Filters.Mirror; m != nil && m.Invalid == "" {
		a.RequestMirrorPolicies = []*routev3.RouteAction_RequestMirrorPolicy{{
			Cluster: authorityOf(m.Service, m.Port, false),
		}}
		if p := r.Filters.MirrorPercent; p > 0 {
			a.RequestMirrorPolicies[0].RuntimeFraction = &corev3.RuntimeFractionalPercent{
				DefaultValue: &typev3.FractionalPercent{Numerator: uint32(p * 10_000), Denominator: typev3.FractionalPercent_MILLION},
			}
		}
	}
	if len(r.Targets) == 1 && reflect.ValueOf(r.Targets[0].Filters).IsZero() {
		a.ClusterSpecifier = &routev3.RouteAction_Cluster{Cluster: r.Targets[0].Authority}
	} else {
		a.ClusterSpecifier = &routev3.RouteAction_WeightedClusters{WeightedClusters: weighted(r.Targets)}
	}
	route.Action = &routev3.Route_Route{Route: a}
}

func weighted(targets []Target) *routev3.WeightedCluster {
	out := &routev3.WeightedCluster{}
	for _, t := range targets {
		if t.Weight == 0 {
			continue
		}
		w := &routev3.WeightedCluster_ClusterWeight{Name: t.Authority, Weight: u32(t.Weight)}
		if t.Invalid != "" {
			w.Name = InvalidCluster
		} else {
			w.RequestHeadersToAdd, w.RequestHeadersToRemove = headerEdits(t.Filters.Request)
			w.ResponseHeadersToAdd, w.ResponseHeadersToRemove = headerEdits(t.Filters.Response)
			if rw := t.Filters.Rewrite; rw != nil && rw.Host != "" {
				w.HostRewriteSpecifier = &routev3.WeightedCluster_ClusterWeight_HostRewriteLiteral{HostRewriteLiteral: rw.Host}
			}
		}
		out.Clusters = append(out.Clusters, w)
	}
	return out
}

func directResponse(status uint32, body string) *routev3.Route_DirectResponse {
	return &routev3.Route_DirectResponse{DirectResponse: &routev3.DirectResponseAction{
		Status: status,
		Body:   &corev3.DataSource{Specifier: &corev3.DataSource_InlineString{InlineString: body}},
	}}
}

func headerEdits(e discovery.HeaderEdits) (add []*corev3.HeaderValueOption, remove []string) {
	edit := func(of []discovery.Header, action corev3.HeaderValueOption_HeaderAppendAction) {
		for _, h := range of {
			add = append(add, &corev3.HeaderValueOption{
				Header:         &corev3.HeaderValue{Key: h.Name, Value: h.Value},
				AppendAction:   action,
				KeepEmptyValue: true,
			})
		}
	}
	edit(e.Set, corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD)
	edit(e.Add, corev3.HeaderValueOption_APPEND_IF_EXISTS_OR_ADD)
	return add, e.Remove
}

func redirect(r *discovery.Redirect) *routev3.RedirectAction {
	out := &routev3.RedirectAction{HostRedirect: r.Host, PortRedirect: uint32(r.Port)}
	if r.Scheme != "" {
		out.SchemeRewriteSpecifier = &routev3.RedirectAction_SchemeRedirect{SchemeRedirect: r.Scheme}
	}
	switch {
	case r.ReplacePath != nil:
		out.PathRewriteSpecifier = &routev3.RedirectAction_PathRedirect{PathRedirect: *r.ReplacePath}
	case r.ReplacePrefix != nil:
		out.PathRewriteSpecifier = &routev3.RedirectAction_PrefixRewrite{PrefixRewrite: *r.ReplacePrefix}
	}
	switch r.Status {
	case 301:
		out.ResponseCode = routev3.RedirectAction_MOVED_PERMANENTLY
	case 303:
		out.ResponseCode = routev3.RedirectAction_SEE_OTHER
	case 307:
		out.ResponseCode = routev3.RedirectAction_TEMPORARY_REDIRECT
	case 308:
		out.ResponseCode = routev3.RedirectAction_PERMANENT_REDIRECT
	default:
		out.ResponseCode = routev3.RedirectAction_FOUND
	}
	return out
}

func retryPolicy(r *Rule) *routev3.RetryPolicy {
	out := &routev3.RetryPolicy{RetryOn: retryUnreached, NumRetries: u32(unreachedRetries), PerTryTimeout: duration(r.Try)}
	if r.Retry == nil {
		return out
	}
	out.NumRetries = u32(uint32(max(r.Retry.Attempts, 0)))
	if len(r.Retry.Codes) > 0 {
		out.RetryOn += ",retriable-status-codes"
		for _, code := range r.Retry.Codes {
			out.RetriableStatusCodes = append(out.RetriableStatusCodes, uint32(code))
		}
	}
	if r.Retry.Backoff > 0 {
		out.RetryBackOff = &routev3.RetryPolicy_RetryBackOff{BaseInterval: durationpb.New(r.Retry.Backoff)}
	}
	return out
}

func hashPolicy(c *callee) []*routev3.RouteAction_HashPolicy {
	switch {
	case !hashes(c):
		return nil
	case c.policy.HashHeader != "":
		return []*routev3.RouteAction_HashPolicy{{PolicySpecifier: &routev3.RouteAction_HashPolicy_Header_{
			Header: &routev3.RouteAction_HashPolicy_Header{HeaderName: strings.ToLower(c.policy.HashHeader)}}}}
	}
	return []*routev3.RouteAction_HashPolicy{{PolicySpecifier: &routev3.RouteAction_HashPolicy_ConnectionProperties_{
		ConnectionProperties: &routev3.RouteAction_HashPolicy_ConnectionProperties{SourceIp: true}}}}
}

// grpcRoute is what a gRPC client reads of a rule (gRFC A28, A31, A44). What it cannot do becomes an action that it
// does not support either, so that calls fail with an error instead of taking another route; the reason is the body.
// It is nil where no gRPC call can match: they are all POST.
func grpcRoute(c *callee, r *Rule) *routev3.Route {
	m := r.Match
	if m.Method != "" && m.Method != "POST" {
		return nil
	}
	m.Method, m.Query = "", nil
	match := envoyMatch(&m)
	if p, ok := match.PathSpecifier.(*routev3.RouteMatch_PathSeparatedPrefix); ok { // gRPC refuses the whole resource for it
		match.PathSpecifier = &routev3.RouteMatch_SafeRegex{SafeRegex: safeRegex(regexp.QuoteMeta(p.PathSeparatedPrefix) + "(/.*)?")}
	}
	out := &routev3.Route{Match: match}
	if why := beyondGRPC(r); why != "" {
		out.Action = directResponse(500, r.Name+": gRPC clients cannot "+why)
		return out
	}
	if !slices.ContainsFunc(r.Targets, func(t Target) bool { return t.Invalid == "" && t.Weight > 0 }) {
		out.Action = directResponse(500, r.Name+": no valid backend")
		return out
	}
	a := &routev3.RouteAction{
		ClusterSpecifier: &routev3.RouteAction_WeightedClusters{WeightedClusters: weighted(r.Targets)},
		HashPolicy:       grpcHashPolicy(c),
		RetryPolicy:      grpcRetryPolicy(r.Retry),
	}
	if r.Request > 0 {
		a.MaxStreamDuration = &routev3.RouteAction_MaxStreamDuration{GrpcTimeoutHeaderMax: durationpb.New(r.Request), MaxStreamDuration: durationpb.New(r.Request)}
	}
	out.Action = &routev3.Route_Route{Route: a}
	return out
}

// beyondGRPC says what a rule asks that a gRPC client does not do, or "".
func beyondGRPC(r *Rule) string {
	edits := func(f *discovery.Filters) bool {
		return len(f.Request.Set)+len(f.Request.Add)+len(f.Request.Remove)+len(f.Response.Set)+len(f.Response.Add)+len(f.Response.Remove) > 0
	}
	switch {
	case len(r.Match.Query) > 0:
		return "match query parameters"
	case r.Filters.Redirect != nil:
		return "follow redirects"
	case r.Filters.Rewrite != nil:
		return "rewrite requests"
	case r.Filters.Mirror != nil:
		return "mirror requests"
	case edits(&r.Filters):
		return "edit headers"
	case r.Try > 0:
		return "limit the time of each try"
	}
	for i := range r.Targets {
		if t := &r.Targets[i]; t.Invalid == "" && (edits(&t.Filters) || t.Filters.Rewrite != nil) {
			return "edit requests for one backend"
		}
	}
	return ""
}

// grpcHashPolicy hashes by header, or by channel where a service has session affinity (gRFC A42).
func grpcHashPolicy(c *callee) []*routev3.RouteAction_HashPolicy {
	if hashes(c) && c.policy.HashHeader == "" {
		return []*routev3.RouteAction_HashPolicy{{PolicySpecifier: &routev3.RouteAction_HashPolicy_FilterState_{
			FilterState: &routev3.RouteAction_HashPolicy_FilterState{Key: "io.grpc.channel_id"}}}}
	}
	return hashPolicy(c)
}

// grpcRetryPolicy says "unavailable" for the HTTP codes that gRPC maps to it; other codes have no gRPC counterpart that is safe
// to retry.
func grpcRetryPolicy(r *discovery.Retry) *routev3.RetryPolicy {
	if r == nil || r.Attempts < 1 || !slices.ContainsFunc(r.Codes, func(code int) bool {
		return code == 429 || code == 502 || code == 503 || code == 504
	}) {
		return nil // gRPC retries by itself what never reached a server
	}
	out := &routev3.RetryPolicy{RetryOn: "unavailable", NumRetries: u32(uint32(r.Attempts))}
	if r.Backoff > 0 {
		out.RetryBackOff = &routev3.RetryPolicy_RetryBackOff{BaseInterval: durationpb.New(r.Backoff)}
	}
	return out
}
