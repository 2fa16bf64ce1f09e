package xdsclient

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"math"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/hanse-mesh/hanse/discovery/xdspb"
	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/proxy"
)

// Type URLs.
const (
	listenerType = "type.googleapis.com/envoy.config.listener.v3.Listener"
	clusterType  = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
	endpointType = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
	serviceType  = "type.googleapis.com/hanse.xds.v1.Service"
	trustType    = "type.googleapis.com/hanse.xds.v1.Trust"
	faultsType   = "type.googleapis.com/hanse.xds.v1.Faults"
)

// Names with a meaning.
const (
	inboundPrefix  = "hanse/inbound/" // + workload IP
	addressPrefix  = "hanse/address/" // + IP that is called
	invalidCluster = "hanse.invalid"  // where an invalid backend's share goes: status 500
	trustName      = "trust"
	faultsName     = "faults"
	metadataKey    = "hanse.mesh" // in typed_filter_metadata
)

// Bounds of what one resource may hold.
const (
	maxName      = 512 // bytes
	maxResource  = 8 << 20
	maxRoutes    = 1024
	maxChains    = 16_384 // one for each name of TLSRoutes
	maxMatchers  = 64     // headers or query parameters of a route
	maxBackends  = 256
	maxEdits     = 64 // header edits of one kind
	maxRegex     = 4096
	maxValue     = 8192 // bytes of a header, path or reason
	maxEndpoints = 100_000
	maxLevels    = 64
	maxGateways  = 64
	maxPorts     = 1024
	maxRules     = 1024 // access rules of one kind on one port
	maxPatterns  = 256  // of one rule
	maxFaults    = 64
	maxDomains   = 4096
	maxDigest    = 64   // bytes
	maxHosts     = 4096 // endpoints of a headless service
)

// outbound is a decoded outbound Listener and the xDS clusters that it leads to.
type outbound struct {
	listener *proxy.Listener
	clusters []string // sorted
}

// assignment is a decoded ClusterLoadAssignment.
type assignment struct {
	overprovisioning uint32
	levels           []proxy.Level
}

// decode makes what the Table holds out of a resource: *outbound, *proxy.Inbound, *proxy.Cluster (without levels), *assignment,
// []proxy.Target, *proxy.Service, map[string]uint64 or []proxy.Fault. Errors name the field.
func decode(typeURL, name string, a *anypb.Any, gateway bool) (any, error) {
	switch {
	case a == nil:
		return nil, errors.New("resource is missing")
	case a.TypeUrl != typeURL:
		return nil, fmt.Errorf("type_url is %q", shorten(a.TypeUrl))
	case len(a.Value) > maxResource:
		return nil, fmt.Errorf("resource has %d bytes, at most %d are read", len(a.Value), maxResource)
	case len(name) > maxName:
		return nil, fmt.Errorf("name has %d bytes, at most %d are read", len(name), maxName)
	}
	switch typeURL {
	case listenerType:
		return as(a, func(m *listenerv3.Listener) (any, error) { return decodeListener(name, m) })
	case clusterType:
		return as(a, func(m *clusterv3.Cluster) (any, error) { return decodeCluster(name, m) })
	case endpointType:
		return as(a, func(m *endpointv3.ClusterLoadAssignment) (any, error) {
			if m.ClusterName != name {
				return nil, fmt.Errorf("cluster_name is %q", shorten(m.ClusterName))
			}
			if gateway {
				return decodeTargets(m)
			}
			return decodeAssignment(m)
		})
	case serviceType:
		return as(a, decodeService)
	case trustType:
		return as(a, decodeTrust)
	case faultsType:
		return as(a, decodeFaults)
	}
	return nil, fmt.Errorf("type %q is not known", shorten(typeURL))
}

// as unpacks an Any of a known type.
func as[M any, P interface {
	*M
	proto.Message
}](a *anypb.Any, f func(P) (any, error)) (any, error) {
	m := P(new(M))
	if err := unpack(a, m); err != nil {
		return nil, err
	}
	return f(m)
}

func unpack(a *anypb.Any, m proto.Message) error {
	if want := m.ProtoReflect().Descriptor().FullName(); a.MessageName() != want {
		return fmt.Errorf("type_url is %q, want %s", shorten(a.GetTypeUrl()), want)
	}
	if err := proto.Unmarshal(a.Value, m); err != nil {
		return fmt.Errorf("decode %s: %w", m.ProtoReflect().Descriptor().Name(), err)
	}
	return nil
}

// only refuses a message in which a field beside those named is set: to ignore it would change what the message means.
func only(m proto.Message, fields ...protoreflect.Name) error {
	r := m.ProtoReflect()
	if len(r.GetUnknown()) > 0 {
		return errors.New("holds a field that this version does not know")
	}
	var err error
	r.Range(func(fd protoreflect.FieldDescriptor, _ protoreflect.Value) bool {
		if !slices.Contains(fields, fd.Name()) {
			err = fmt.Errorf("%s is not supported", fd.Name())
		}
		return err == nil
	})
	return err
}

// meta reads typed_filter_metadata["hanse.mesh"]; it reports whether there is any.
func meta(md *corev3.Metadata, m proto.Message) (bool, error) {
	a := md.GetTypedFilterMetadata()[metadataKey]
	if a == nil {
		return false, nil
	}
	if err := unpack(a, m); err != nil {
		return false, fmt.Errorf("metadata.typed_filter_metadata[%s]: %w", metadataKey, err)
	}
	return true, nil
}

func decodeListener(name string, m *listenerv3.Listener) (any, error) {
	if m.Name != name {
		return nil, fmt.Errorf("name is %q", shorten(m.Name))
	}
	if ip, ok := strings.CutPrefix(name, inboundPrefix); ok {
		in, err := decodeInbound(ip, m)
		if err != nil {
			return nil, err
		}
		return in, nil
	}
	api := m.GetApiListener().GetApiListener()
	if api == nil {
		l, err := decodeChains(name, m)
		if err != nil {
			return nil, err
		}
		return newOutbound(l), nil
	}
	switch api.MessageName() {
	case "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager":
		var hcm hcmv3.HttpConnectionManager
		if err := unpack(api, &hcm); err != nil {
			return nil, fmt.Errorf("api_listener: %w", err)
		}
		routes, err := decodeRoutes(hcm.GetRouteConfig())
		if err != nil {
			return nil, fmt.Errorf("api_listener.route_config: %w", err)
		}
		return newOutbound(&proxy.Listener{Authority: name, Protocol: proxy.HTTP, Routes: routes}), nil
	case "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy":
		var tcp tcpv3.TcpProxy
		if err := unpack(api, &tcp); err != nil {
			return nil, fmt.Errorf("api_listener: %w", err)
		}
		l, err := decodeTCP(name, &tcp)
		if err != nil {
			return nil, fmt.Errorf("api_listener: %w", err)
		}
		return newOutbound(l), nil
	}
	return nil, fmt.Errorf("api_listener is a %q, want HttpConnectionManager or TcpProxy", shorten(string(api.MessageName())))
}

func newOutbound(l *proxy.Listener) *outbound {
	names := map[string]struct{}{}
	add := func(b *proxy.Backend) {
		if b.DirectStatus == 0 {
			names[b.Cluster] = struct{}{}
		}
	}
	for _, r := range l.Routes {
		for i := range r.Backends {
			add(&r.Backends[i])
		}
		if r.Mirror != nil {
			add(r.Mirror)
		}
	}
	for i := range l.Split {
		add(&l.Split[i])
	}
	for _, r := range l.SNI {
		for i := range r.Split {
			add(&r.Split[i])
		}
	}
	if l.Cluster != "" {
		names[l.Cluster] = struct{}{}
	}
	return &outbound{listener: l, clusters: slices.Sorted(maps.Keys(names))}
}

// decodeChains reads a Listener that parts TCP connections by server name.
func decodeChains(name string, m *listenerv3.Listener) (*proxy.Listener, error) {
	if len(m.FilterChains) == 0 && m.DefaultFilterChain == nil {
		return nil, errors.New("neither api_listener nor filter_chains is set")
	}
	if err := only(m, "name", "filter_chains", "default_filter_chain"); err != nil {
		return nil, err
	}
	if err := bounded("filter_chains", len(m.FilterChains), maxChains); err != nil {
		return nil, err
	}
	chain := func(c *listenerv3.FilterChain) (*proxy.Listener, error) {
		if len(c.Filters) != 1 {
			return nil, fmt.Errorf("%d filters, want 1", len(c.Filters))
		}
		var tcp tcpv3.TcpProxy
		if err := unpack(c.Filters[0].GetTypedConfig(), &tcp); err != nil {
			return nil, fmt.Errorf("filters[0]: %w", err)
		}
		return decodeTCP(name, &tcp)
	}
	out := &proxy.Listener{Authority: name, Protocol: proxy.TCP}
	if m.DefaultFilterChain != nil {
		l, err := chain(m.DefaultFilterChain)
		if err != nil {
			return nil, fmt.Errorf("default_filter_chain: %w", err)
		}
		out = l
	}
	for i, c := range m.FilterChains {
		l, err := chain(c)
		if err == nil && c.FilterChainMatch != nil {
			err = only(c.FilterChainMatch, "server_names")
		}
		names := c.GetFilterChainMatch().GetServerNames()
		if err == nil && len(names) == 0 {
			err = errors.New("filter_chain_match.server_names is empty")
		}
		if err == nil {
			err = bounded("filter_chain_match.server_names", len(names), maxRoutes)
		}
		if err != nil {
			return nil, fmt.Errorf("filter_chains[%d]: %w", i, err)
		}
		if len(l.Split) == 0 {
			l.Split = []proxy.Backend{{Cluster: l.Cluster, Weight: 1}}
		}
		out.SNI = append(out.SNI, proxy.SNIRoute{Name: c.Name, Hosts: names, Split: l.Split})
	}
	return out, nil
}

func decodeTCP(name string, m *tcpv3.TcpProxy) (*proxy.Listener, error) {
	l := &proxy.Listener{Authority: name, Protocol: proxy.TCP}
	switch c := m.ClusterSpecifier.(type) {
	case *tcpv3.TcpProxy_Cluster:
		if err := clusterName(c.Cluster); err != nil {
			return nil, fmt.Errorf("cluster: %w", err)
		}
		l.Cluster = c.Cluster
	case *tcpv3.TcpProxy_WeightedClusters:
		if err := bounded("weighted_clusters", len(c.WeightedClusters.Clusters), maxBackends); err != nil {
			return nil, err
		}
		for i, w := range c.WeightedClusters.Clusters {
			if err := clusterName(w.Name); err != nil {
				return nil, fmt.Errorf("weighted_clusters[%d].name: %w", i, err)
			}
			b := proxy.Backend{Cluster: w.Name, Weight: w.Weight}
			if w.Name == invalidCluster {
				b.DirectStatus = 500
			}
			l.Split = append(l.Split, b)
		}
	default:
		return nil, errors.New("neither cluster nor weighted_clusters is set")
	}
	return l, nil
}

func decodeRoutes(m *routev3.RouteConfiguration) ([]*proxy.Route, error) {
	if m == nil {
		return nil, errors.New("is missing: routes must be inline")
	}
	if err := only(m, "name", "virtual_hosts"); err != nil {
		return nil, err
	}
	if len(m.VirtualHosts) != 1 {
		return nil, fmt.Errorf("%d virtual_hosts, want 1", len(m.VirtualHosts))
	}
	vh := m.VirtualHosts[0]
	if err := only(vh, "name", "domains", "routes"); err != nil {
		return nil, fmt.Errorf("virtual_hosts[0]: %w", err)
	}
	if err := bounded("virtual_hosts[0].routes", len(vh.Routes), maxRoutes); err != nil {
		return nil, err
	}
	routes := make([]*proxy.Route, len(vh.Routes))
	for i, r := range vh.Routes {
		var err error
		if routes[i], err = decodeRoute(r); err != nil {
			return nil, fmt.Errorf("virtual_hosts[0].routes[%d].%w", i, err)
		}
	}
	return routes, nil
}

// decodeRoute's errors begin with a field.
func decodeRoute(m *routev3.Route) (*proxy.Route, error) {
	err := only(m, "name", "match", "route", "redirect", "direct_response", "metadata",
		"request_headers_to_add", "request_headers_to_remove", "response_headers_to_add", "response_headers_to_remove")
	if err != nil {
		return nil, err
	}
	var md xdspb.RouteMeta
	if _, err := meta(m.Metadata, &md); err != nil {
		return nil, err
	}
	r := &proxy.Route{Name: shorten(cmp.Or(md.Name, m.Name))}
	for _, code := range md.RetryGrpc {
		if code > 16 || len(r.Retry.GRPC) > 16 {
			return nil, fmt.Errorf("metadata.retry_grpc: %d is no gRPC status", code)
		}
		r.Retry.GRPC = append(r.Retry.GRPC, int(code))
	}
	if r.Match, err = decodeMatch(m.Match); err != nil {
		return nil, fmt.Errorf("match.%w", err)
	}
	if r.Request, err = decodeEdits("request_headers", m.RequestHeadersToAdd, m.RequestHeadersToRemove); err != nil {
		return nil, err
	}
	if r.Response, err = decodeEdits("response_headers", m.ResponseHeadersToAdd, m.ResponseHeadersToRemove); err != nil {
		return nil, err
	}
	switch a := m.Action.(type) {
	case *routev3.Route_Route:
		if err = decodeAction(r, a.Route); err != nil {
			return nil, fmt.Errorf("route.%w", err)
		}
	case *routev3.Route_Redirect:
		if r.Redirect, err = decodeRedirect(a.Redirect); err != nil {
			return nil, fmt.Errorf("redirect.%w", err)
		}
	case *routev3.Route_DirectResponse:
		if s := a.DirectResponse.GetStatus(); s < 200 || s > 599 {
			return nil, fmt.Errorf("direct_response.status is %d", s)
		}
		r.DirectStatus = int(a.DirectResponse.GetStatus())
	default:
		return nil, errors.New("action is missing")
	}
	return r, nil
}

func decodeMatch(m *routev3.RouteMatch) (out proxy.Match, err error) {
	if m == nil {
		return out, errors.New("is missing")
	}
	if err := only(m, "prefix", "path", "path_separated_prefix", "safe_regex", "headers", "query_parameters", "case_sensitive"); err != nil {
		return out, err
	}
	if c := m.CaseSensitive; c != nil && !c.Value {
		return out, errors.New("case_sensitive must be true")
	}
	switch p := m.PathSpecifier.(type) {
	case *routev3.RouteMatch_Prefix:
		if p.Prefix != "/" && p.Prefix != "" {
			return out, fmt.Errorf("prefix %q: only / and path_separated_prefix are supported", shorten(p.Prefix))
		}
	case *routev3.RouteMatch_Path:
		if out.PathExact, err = pathValue(p.Path); err != nil {
			return out, fmt.Errorf("path: %w", err)
		}
	case *routev3.RouteMatch_PathSeparatedPrefix:
		if out.PathPrefix, err = pathValue(p.PathSeparatedPrefix); err != nil {
			return out, fmt.Errorf("path_separated_prefix: %w", err)
		}
	case *routev3.RouteMatch_SafeRegex:
		var v proxy.ValueMatch
		if v, err = regex(p.SafeRegex); err != nil {
			return out, fmt.Errorf("safe_regex: %w", err)
		}
		out.PathRegex = v.Regex
	default:
		return out, errors.New("path_specifier is missing")
	}
	if err := bounded("headers", len(m.Headers), maxMatchers); err != nil {
		return out, err
	}
	for i, h := range m.Headers {
		if err := only(h, "name", "string_match"); err != nil {
			return out, fmt.Errorf("headers[%d]: %w", i, err)
		}
		v, err := stringMatch(h.Name, h.GetStringMatch())
		if err != nil {
			return out, fmt.Errorf("headers[%d].%w", i, err)
		}
		v.Name = strings.ToLower(v.Name)
		switch {
		case v.Name == ":method" && (v.Regex != nil || v.Exact == "" || out.Method != ""):
			return out, fmt.Errorf("headers[%d]: one exact :method is supported", i)
		case v.Name == ":method":
			out.Method = v.Exact
		case v.Name == ":authority":
			v.Name = "host"
			out.Headers = append(out.Headers, v)
		case strings.HasPrefix(v.Name, ":"):
			return out, fmt.Errorf("headers[%d].name %q is not supported", i, shorten(v.Name))
		default:
			out.Headers = append(out.Headers, v)
		}
	}
	if err := bounded("query_parameters", len(m.QueryParameters), maxMatchers); err != nil {
		return out, err
	}
	for i, q := range m.QueryParameters {
		if err := only(q, "name", "string_match"); err != nil {
			return out, fmt.Errorf("query_parameters[%d]: %w", i, err)
		}
		v, err := stringMatch(q.Name, q.GetStringMatch())
		if err != nil {
			return out, fmt.Errorf("query_parameters[%d].%w", i, err)
		}
		out.Query = append(out.Query, v)
	}
	return out, nil
}

func stringMatch(name string, m *matcherv3.StringMatcher) (v proxy.ValueMatch, err error) {
	if name == "" || len(name) > maxName {
		return v, errors.New("name is empty or too long")
	}
	if m == nil {
		return v, errors.New("string_match is missing")
	}
	if err := only(m, "exact", "safe_regex"); err != nil {
		return v, fmt.Errorf("string_match: %w", err)
	}
	switch p := m.MatchPattern.(type) {
	case *matcherv3.StringMatcher_Exact:
		if len(p.Exact) > maxValue {
			return v, errors.New("string_match.exact is too long")
		}
		v.Exact = p.Exact
	case *matcherv3.StringMatcher_SafeRegex:
		if v, err = regex(p.SafeRegex); err != nil {
			return v, fmt.Errorf("string_match.safe_regex: %w", err)
		}
	default:
		return v, errors.New("string_match is empty")
	}
	v.Name = name
	return v, nil
}

func regex(m *matcherv3.RegexMatcher) (v proxy.ValueMatch, err error) {
	if m.GetRegex() == "" || len(m.GetRegex()) > maxRegex {
		return v, errors.New("regex is empty or too long")
	}
	if v.Regex, err = proxy.CompileWhole(m.Regex); err != nil {
		return v, err
	}
	return v, nil
}

func pathValue(p string) (string, error) {
	if !strings.HasPrefix(p, "/") || len(p) > maxValue {
		return "", fmt.Errorf("%q does not begin with / or is too long", shorten(p))
	}
	return p, nil
}

func decodeEdits(field string, add []*corev3.HeaderValueOption, remove []string) (e proxy.HeaderEdits, err error) {
	if err := bounded(field+"_to_add", len(add), maxEdits); err != nil {
		return e, err
	}
	if err := bounded(field+"_to_remove", len(remove), maxEdits); err != nil {
		return e, err
	}
	for i, o := range add {
		h := proxy.Header{Name: o.GetHeader().GetKey(), Value: o.GetHeader().GetValue()}
		if !fieldName(h.Name) || !fieldValue(h.Value) {
			return e, fmt.Errorf("%s_to_add[%d].header: %q is no valid header field", field, i, shorten(h.Name+": "+h.Value))
		}
		switch o.AppendAction {
		case corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD:
			e.Set = append(e.Set, h)
		case corev3.HeaderValueOption_APPEND_IF_EXISTS_OR_ADD:
			e.Add = append(e.Add, h)
		default:
			return e, fmt.Errorf("%s_to_add[%d].append_action %s is not supported", field, i, o.AppendAction)
		}
	}
	for i, name := range remove {
		if !fieldName(name) {
			return e, fmt.Errorf("%s_to_remove[%d]: %q is no valid header name", field, i, shorten(name))
		}
	}
	e.Remove = slices.Clone(remove)
	return e, nil
}

// fieldName is RFC 9110 §5.6.2's token.
func fieldName(s string) bool {
	if s == "" || len(s) > maxName {
		return false
	}
	for _, c := range []byte(s) {
		if c <= ' ' || c >= 0x7f || strings.IndexByte(`"(),/:;<=>?@[\]{}`, c) >= 0 {
			return false
		}
	}
	return true
}

// fieldValue is RFC 9110 §5.5's, without control characters.
func fieldValue(s string) bool {
	for _, c := range []byte(s) {
		if c < ' ' && c != '\t' || c == 0x7f {
			return false
		}
	}
	return len(s) <= maxValue
}

func decodeAction(r *proxy.Route, m *routev3.RouteAction) (err error) {
	err = only(m, "cluster", "weighted_clusters", "cluster_not_found_response_code", "prefix_rewrite", "regex_rewrite", "host_rewrite_literal",
		"timeout", "retry_policy", "request_mirror_policies", "hash_policy", "max_stream_duration")
	if err != nil {
		return err
	}
	switch c := m.ClusterSpecifier.(type) {
	case *routev3.RouteAction_Cluster:
		if err := clusterName(c.Cluster); err != nil {
			return fmt.Errorf("cluster: %w", err)
		}
		r.Backends = []proxy.Backend{{Cluster: c.Cluster, Weight: 1}}
	case *routev3.RouteAction_WeightedClusters:
		if r.Backends, err = decodeBackends(c.WeightedClusters); err != nil {
			return fmt.Errorf("weighted_clusters.%w", err)
		}
	default:
		return errors.New("cluster_specifier is missing")
	}
	if h, ok := m.HostRewriteSpecifier.(*routev3.RouteAction_HostRewriteLiteral); ok {
		if r.Rewrite.Host = h.HostRewriteLiteral; !fieldValue(r.Rewrite.Host) {
			return errors.New("host_rewrite_literal is no valid host")
		}
	}
	switch {
	case m.RegexRewrite != nil:
		path, err := wholeRewrite(m.RegexRewrite)
		if err != nil {
			return fmt.Errorf("regex_rewrite: %w", err)
		}
		r.Rewrite.ReplacePath = &path
	case m.PrefixRewrite != "":
		prefix, err := pathValue(m.PrefixRewrite)
		if err != nil {
			return fmt.Errorf("prefix_rewrite: %w", err)
		}
		r.Rewrite.ReplacePrefix = &prefix
	}
	if r.RequestTimeout, err = duration(m.Timeout); err != nil {
		return fmt.Errorf("timeout: %w", err)
	}
	if err := decodeRetry(r, m.RetryPolicy); err != nil {
		return fmt.Errorf("retry_policy.%w", err)
	}
	return decodeMirror(r, m.RequestMirrorPolicies)
}

// wholeRewrite reads the regex_rewrite that stands for "replace the whole path".
func wholeRewrite(m *matcherv3.RegexMatchAndSubstitute) (string, error) {
	if p := m.GetPattern().GetRegex(); p != "^.*$" {
		return "", fmt.Errorf("pattern %q: only the whole path, ^.*$, is supported", shorten(p))
	}
	var b strings.Builder
	for s := m.Substitution; s != ""; s = s[1:] {
		if s[0] == '\\' {
			if len(s) < 2 || s[1] != '\\' {
				return "", errors.New("substitution refers to a group")
			}
			s = s[1:]
		}
		b.WriteByte(s[0])
	}
	return pathValue(b.String())
}

func decodeBackends(m *routev3.WeightedCluster) ([]proxy.Backend, error) {
	if err := only(m, "clusters", "total_weight"); err != nil {
		return nil, err
	}
	if err := bounded("clusters", len(m.Clusters), maxBackends); err != nil {
		return nil, err
	}
	out := make([]proxy.Backend, len(m.Clusters))
	for i, w := range m.Clusters {
		err := only(w, "name", "weight", "host_rewrite_literal",
			"request_headers_to_add", "request_headers_to_remove", "response_headers_to_add", "response_headers_to_remove")
		if err != nil {
			return nil, fmt.Errorf("clusters[%d]: %w", i, err)
		}
		if err := clusterName(w.Name); err != nil {
			return nil, fmt.Errorf("clusters[%d].name: %w", i, err)
		}
		b := proxy.Backend{Cluster: w.Name, Weight: w.GetWeight().GetValue()}
		if w.Name == invalidCluster {
			b.DirectStatus = 500
		}
		if b.Request, err = decodeEdits("request_headers", w.RequestHeadersToAdd, w.RequestHeadersToRemove); err != nil {
			return nil, fmt.Errorf("clusters[%d].%w", i, err)
		}
		if b.Response, err = decodeEdits("response_headers", w.ResponseHeadersToAdd, w.ResponseHeadersToRemove); err != nil {
			return nil, fmt.Errorf("clusters[%d].%w", i, err)
		}
		if b.Rewrite.Host = w.GetHostRewriteLiteral(); !fieldValue(b.Rewrite.Host) {
			return nil, fmt.Errorf("clusters[%d].host_rewrite_literal is no valid host", i)
		}
		out[i] = b
	}
	return out, nil
}

func decodeRetry(r *proxy.Route, m *routev3.RetryPolicy) (err error) {
	if m == nil {
		return nil
	}
	r.Retry.Attempts = 1
	if n := m.NumRetries; n != nil {
		r.Retry.Attempts = int(min(n.Value, 100))
	}
	if r.TryTimeout, err = duration(m.PerTryTimeout); err != nil {
		return fmt.Errorf("per_try_timeout: %w", err)
	}
	if r.Retry.Backoff, err = duration(m.GetRetryBackOff().GetBaseInterval()); err != nil {
		return fmt.Errorf("retry_back_off.base_interval: %w", err)
	}
	if err := bounded("retriable_status_codes", len(m.RetriableStatusCodes), 512); err != nil {
		return err
	}
	for on := range strings.SplitSeq(m.RetryOn, ",") {
		switch on {
		case "connect-failure", "refused-stream", "reset-before-request", "": // always
		case "retriable-status-codes":
			for _, code := range m.RetriableStatusCodes {
				if code < 100 || code > 599 {
					return fmt.Errorf("retriable_status_codes: %d is no HTTP status", code)
				}
				r.Retry.Codes = append(r.Retry.Codes, int(code))
			}
		default:
			return fmt.Errorf("retry_on %q is not supported", shorten(on))
		}
	}
	return nil
}

func decodeMirror(r *proxy.Route, ms []*routev3.RouteAction_RequestMirrorPolicy) error {
	switch len(ms) {
	case 0:
		return nil
	case 1:
	default:
		return fmt.Errorf("request_mirror_policies: %d, one is supported", len(ms))
	}
	m := ms[0]
	if err := clusterName(m.Cluster); err != nil {
		return fmt.Errorf("request_mirror_policies[0].cluster: %w", err)
	}
	r.Mirror = &proxy.Backend{Cluster: m.Cluster, Weight: 100}
	if f := m.GetRuntimeFraction().GetDefaultValue(); f != nil {
		of := []uint64{100, 10_000, 1_000_000}
		if int(f.Denominator) >= len(of) || f.Denominator < 0 {
			return errors.New("request_mirror_policies[0].runtime_fraction: unknown denominator")
		}
		r.Mirror.Weight = uint32(min(100, uint64(f.Numerator)*100/of[f.Denominator]))
		if f.Numerator > 0 {
			r.Mirror.Weight = max(1, r.Mirror.Weight)
		}
	}
	return nil
}

func decodeRedirect(m *routev3.RedirectAction) (*proxy.Redirect, error) {
	if err := only(m, "scheme_redirect", "https_redirect", "host_redirect", "port_redirect", "path_redirect", "prefix_rewrite", "response_code"); err != nil {
		return nil, err
	}
	d := &proxy.Redirect{Scheme: m.GetSchemeRedirect(), Host: m.HostRedirect}
	if m.GetHttpsRedirect() {
		d.Scheme = "https"
	}
	if d.Scheme != "" && d.Scheme != "http" && d.Scheme != "https" {
		return nil, fmt.Errorf("scheme_redirect %q is not supported", shorten(d.Scheme))
	}
	if !fieldValue(d.Host) || m.PortRedirect > math.MaxUint16 {
		return nil, errors.New("host_redirect or port_redirect is not valid")
	}
	d.Port = uint16(m.PortRedirect)
	var path string
	switch p := m.PathRewriteSpecifier.(type) {
	case *routev3.RedirectAction_PathRedirect:
		path, d.ReplacePath = p.PathRedirect, &p.PathRedirect
	case *routev3.RedirectAction_PrefixRewrite:
		path, d.ReplacePrefix = p.PrefixRewrite, &p.PrefixRewrite
	}
	if !fieldValue(path) {
		return nil, errors.New("path holds a control character or is too long")
	}
	statuses := map[routev3.RedirectAction_RedirectResponseCode]int{
		routev3.RedirectAction_MOVED_PERMANENTLY: 301, routev3.RedirectAction_FOUND: 302, routev3.RedirectAction_SEE_OTHER: 303,
		routev3.RedirectAction_TEMPORARY_REDIRECT: 307, routev3.RedirectAction_PERMANENT_REDIRECT: 308,
	}
	if d.Status = statuses[m.ResponseCode]; d.Status == 0 {
		return nil, fmt.Errorf("response_code %d is not known", m.ResponseCode)
	}
	return d, nil
}

func decodeCluster(name string, m *clusterv3.Cluster) (any, error) {
	if m.Name != name {
		return nil, fmt.Errorf("name is %q", shorten(m.Name))
	}
	if m.GetType() != clusterv3.Cluster_EDS {
		return nil, fmt.Errorf("type is %s, want EDS", m.GetType())
	}
	if s := m.GetEdsClusterConfig().GetServiceName(); s != "" && s != name {
		return nil, fmt.Errorf("eds_cluster_config.service_name is %q, want the cluster's name", shorten(s))
	}
	var md xdspb.ServiceMeta
	if _, err := meta(m.Metadata, &md); err != nil {
		return nil, err
	}
	protocol, err := decodeProtocol(md.Protocol)
	if err != nil {
		return nil, fmt.Errorf("metadata.protocol: %w", err)
	}
	c := &proxy.Cluster{
		Name: name, Service: shorten(md.Service), Protocol: protocol, HashHeader: strings.ToLower(shorten(md.HashHeader)),
		Overprovisioning: 140, PanicThreshold: 50,
		WeightedLocality: m.GetCommonLbConfig().GetLocalityWeightedLbConfig() != nil,
	}
	switch m.LbPolicy {
	case clusterv3.Cluster_LEAST_REQUEST:
		c.Policy = "least_request"
	case clusterv3.Cluster_ROUND_ROBIN:
		c.Policy = "round_robin"
	case clusterv3.Cluster_RING_HASH:
		c.Policy = "ring_hash"
	default:
		return nil, fmt.Errorf("lb_policy %s is not supported", m.LbPolicy)
	}
	if c.ConnectTimeout, err = duration(m.ConnectTimeout); err != nil {
		return nil, fmt.Errorf("connect_timeout: %w", err)
	}
	if p := m.GetCommonLbConfig().GetHealthyPanicThreshold(); p != nil {
		if c.PanicThreshold, err = percent(p.Value); err != nil {
			return nil, fmt.Errorf("common_lb_config.healthy_panic_threshold: %w", err)
		}
	}
	for _, t := range m.GetCircuitBreakers().GetThresholds() {
		if t.Priority != corev3.RoutingPriority_DEFAULT {
			continue
		}
		c.MaxRequests = t.GetMaxRequests().GetValue()
		if b := t.RetryBudget; b != nil {
			if c.RetryBudget.Percent, err = percent(b.GetBudgetPercent().GetValue()); err != nil {
				return nil, fmt.Errorf("circuit_breakers.thresholds.retry_budget.budget_percent: %w", err)
			}
			c.RetryBudget.MinConcurrency = b.GetMinRetryConcurrency().GetValue()
		}
	}
	if err := decodeOutlier(&c.Outlier, m.OutlierDetection); err != nil {
		return nil, fmt.Errorf("outlier_detection.%w", err)
	}
	return c, nil
}

func decodeOutlier(o *proxy.Outlier, m *clusterv3.OutlierDetection) (err error) {
	o.ConsecutiveErrors = firstSet(m.GetConsecutiveGatewayFailure(), m.GetConsecutive_5Xx())
	o.MaxPercent = m.GetMaxEjectionPercent().GetValue()
	if o.MaxPercent > 100 {
		return fmt.Errorf("max_ejection_percent is %d", o.MaxPercent)
	}
	if o.Interval, err = duration(m.GetInterval()); err != nil {
		return fmt.Errorf("interval: %w", err)
	}
	if o.BaseEjection, err = duration(m.GetBaseEjectionTime()); err != nil {
		return fmt.Errorf("base_ejection_time: %w", err)
	}
	if o.MaxEjection, err = duration(m.GetMaxEjectionTime()); err != nil {
		return fmt.Errorf("max_ejection_time: %w", err)
	}
	return nil
}

func decodeAssignment(m *endpointv3.ClusterLoadAssignment) (any, error) {
	out := &assignment{}
	if f := m.GetPolicy().GetOverprovisioningFactor(); f != nil {
		if out.overprovisioning = f.Value; f.Value < 100 || f.Value > 10_000 {
			return nil, fmt.Errorf("policy.overprovisioning_factor is %d", f.Value)
		}
	}
	ids := map[string]struct{}{}
	for i, l := range m.Endpoints {
		if l.Priority >= maxLevels {
			return nil, fmt.Errorf("endpoints[%d].priority is %d, at most %d levels are read", i, l.Priority, maxLevels)
		}
		for uint32(len(out.levels)) <= l.Priority {
			out.levels = append(out.levels, proxy.Level{})
		}
		at := proxy.LocalityEndpoints{
			Locality: proxy.Locality{
				Cluster: shorten(l.GetLocality().GetSubZone()), Region: shorten(l.GetLocality().GetRegion()), Zone: shorten(l.GetLocality().GetZone()),
			},
			Weight: l.GetLoadBalancingWeight().GetValue(),
		}
		if err := bounded("endpoints", len(ids)+len(l.LbEndpoints), maxEndpoints); err != nil {
			return nil, err
		}
		for j, le := range l.LbEndpoints {
			e, err := decodeEndpoint(le, at.Locality)
			if err != nil {
				return nil, fmt.Errorf("endpoints[%d].lb_endpoints[%d].%w", i, j, err)
			}
			if _, twice := ids[e.ID]; twice {
				return nil, fmt.Errorf("endpoints[%d].lb_endpoints[%d].metadata.id %s is there twice", i, j, e.ID)
			}
			ids[e.ID] = struct{}{}
			at.Endpoints = append(at.Endpoints, e)
		}
		level := &out.levels[l.Priority]
		level.Localities = append(level.Localities, at)
	}
	for i, l := range out.levels {
		if len(l.Localities) == 0 {
			return nil, fmt.Errorf("priorities have a gap: nothing has %d", i)
		}
	}
	return out, nil
}

func decodeEndpoint(m *endpointv3.LbEndpoint, at proxy.Locality) (*proxy.Endpoint, error) {
	var md xdspb.EndpointMeta
	found, err := meta(m.Metadata, &md)
	if err != nil {
		return nil, err
	}
	if !found || md.Id == "" {
		return nil, errors.New("metadata: no endpoint ID")
	}
	e := &proxy.Endpoint{
		ID: md.Id, SNI: md.Sni, SPIFFEID: md.SpiffeId, Transport: proxy.Transport(md.Transport), Locality: at, Weight: 1,
		Suspect: md.Suspect, Draining: md.Draining, Reason: shorten(md.Reason),
	}
	if len(e.ID) > maxName || len(e.SNI) > maxName || len(e.SPIFFEID) > 2048 {
		return nil, errors.New("metadata: a name is too long")
	}
	if e.Address, err = address(m.GetEndpoint().GetAddress()); err != nil {
		return nil, fmt.Errorf("endpoint.address: %w", err)
	}
	switch e.Transport {
	case proxy.TransportHop, proxy.TransportTLS:
		if !strings.HasPrefix(e.SPIFFEID, "spiffe://") {
			return nil, fmt.Errorf("metadata.spiffe_id %q: transport %s needs one", shorten(e.SPIFFEID), e.Transport)
		}
	case proxy.TransportPlaintext:
	default:
		return nil, fmt.Errorf("metadata.transport %q is not known", shorten(md.Transport))
	}
	if err := bounded("metadata.gateways", len(md.Gateways), maxGateways); err != nil {
		return nil, err
	}
	for _, g := range md.Gateways {
		ap, err := netip.ParseAddrPort(g)
		if err != nil || ap.Port() == 0 {
			return nil, fmt.Errorf("metadata.gateways: %q is not ip:port", shorten(g))
		}
		e.Gateways = append(e.Gateways, ap)
	}
	if len(e.Gateways) > 0 && (e.SNI == "" || e.Transport == proxy.TransportPlaintext) {
		return nil, errors.New("metadata: an endpoint behind a gateway needs an SNI and mutual TLS")
	}
	if w := m.LoadBalancingWeight; w != nil {
		if e.Weight = w.Value; w.Value == 0 || w.Value > 1<<20 {
			return nil, fmt.Errorf("load_balancing_weight is %d", w.Value)
		}
	}
	switch m.HealthStatus {
	case corev3.HealthStatus_UNKNOWN, corev3.HealthStatus_HEALTHY:
	case corev3.HealthStatus_DRAINING:
		e.Draining = true
	default:
		e.Unhealthy = true
	}
	return e, nil
}

// decodeTargets reads one line of a gateway's table. Endpoints that drain are used only where no other is.
func decodeTargets(m *endpointv3.ClusterLoadAssignment) (any, error) {
	var ready, draining []proxy.Target
	for i, l := range m.Endpoints {
		if err := bounded("endpoints", len(ready)+len(draining)+len(l.LbEndpoints), maxEndpoints); err != nil {
			return nil, err
		}
		for j, le := range l.LbEndpoints {
			var md xdspb.EndpointMeta
			if _, err := meta(le.Metadata, &md); err != nil {
				return nil, fmt.Errorf("endpoints[%d].lb_endpoints[%d].%w", i, j, err)
			}
			addr, err := address(le.GetEndpoint().GetAddress())
			if err != nil {
				return nil, fmt.Errorf("endpoints[%d].lb_endpoints[%d].endpoint.address: %w", i, j, err)
			}
			if md.Id == "" || len(md.Id) > maxName {
				return nil, fmt.Errorf("endpoints[%d].lb_endpoints[%d].metadata.id %q is not valid", i, j, shorten(md.Id))
			}
			t := proxy.Target{ID: md.Id, Address: addr, Weight: 1}
			if w := le.LoadBalancingWeight; w != nil {
				t.Weight = w.Value
			}
			switch le.HealthStatus {
			case corev3.HealthStatus_UNKNOWN, corev3.HealthStatus_HEALTHY:
				ready = append(ready, t)
			case corev3.HealthStatus_DRAINING:
				draining = append(draining, t)
			}
		}
	}
	if len(ready) == 0 {
		return draining, nil
	}
	return ready, nil
}

func decodeInbound(ip string, m *listenerv3.Listener) (*proxy.Inbound, error) {
	addr, err := netip.ParseAddr(ip)
	if err != nil {
		return nil, fmt.Errorf("name: %w", err)
	}
	in := &proxy.Inbound{Address: addr}
	if err := bounded("filter_chains", len(m.FilterChains), maxPorts); err != nil {
		return nil, err
	}
	seen := map[uint16]bool{}
	for i, fc := range m.FilterChains {
		p, err := decodePort(fc)
		if err != nil {
			return nil, fmt.Errorf("filter_chains[%d].%w", i, err)
		}
		if seen[p.Port] {
			return nil, fmt.Errorf("filter_chains[%d].filter_chain_match.destination_port %d is there twice", i, p.Port)
		}
		seen[p.Port] = true
		in.Ports = append(in.Ports, *p)
	}
	return in, nil
}

func decodePort(m *listenerv3.FilterChain) (*proxy.InboundPort, error) {
	match := m.GetFilterChainMatch()
	if match == nil {
		return nil, errors.New("filter_chain_match is missing")
	}
	if err := only(match, "destination_port"); err != nil {
		return nil, fmt.Errorf("filter_chain_match: %w", err)
	}
	port := match.GetDestinationPort().GetValue()
	if port == 0 || port > math.MaxUint16 {
		return nil, fmt.Errorf("filter_chain_match.destination_port is %d", port)
	}
	var md xdspb.InboundMeta
	found, err := meta(m.Metadata, &md)
	if err != nil {
		return nil, err
	}
	if !found {
		return nil, errors.New("metadata: no access rules")
	}
	if err := only(&md, "services", "protocol", "trust_domain", "default_allow", "deny", "allow", "audit_deny", "audit_allow"); err != nil {
		return nil, fmt.Errorf("metadata: %w", err)
	}
	p := &proxy.InboundPort{Port: uint16(port), Services: md.Services}
	if p.Protocol, err = decodeProtocol(md.Protocol); err != nil {
		return nil, fmt.Errorf("metadata.protocol: %w", err)
	}
	if md.TrustDomain == "" {
		return nil, errors.New("metadata.trust_domain is missing")
	}
	p.Access = proxy.Access{TrustDomain: md.TrustDomain, DefaultAllow: md.DefaultAllow}
	for _, part := range []struct {
		field string
		from  []*xdspb.AccessRule
		to    *[]proxy.AccessRule
	}{
		{"deny", md.Deny, &p.Access.Deny}, {"allow", md.Allow, &p.Access.Allow},
		{"audit_deny", md.AuditDeny, &p.Access.AuditDeny}, {"audit_allow", md.AuditAllow, &p.Access.AuditAllow},
	} {
		if err := bounded("metadata."+part.field, len(part.from), maxRules); err != nil {
			return nil, err
		}
		for i, r := range part.from {
			rule, err := decodeRule(r)
			if err != nil {
				return nil, fmt.Errorf("metadata.%s[%d].%w", part.field, i, err)
			}
			*part.to = append(*part.to, rule)
		}
	}
	return p, nil
}

func decodeRule(m *xdspb.AccessRule) (out proxy.AccessRule, err error) {
	if err := only(m, "policy", "from", "foreign", "methods", "paths"); err != nil {
		return out, err
	}
	if max(len(m.From), len(m.Methods), len(m.Paths)) > maxPatterns {
		return out, fmt.Errorf("from, methods or paths: more than %d", maxPatterns)
	}
	for i, p := range m.From {
		if err := identity.ValidatePattern(p); err != nil {
			return out, fmt.Errorf("from[%d]: %w", i, err)
		}
	}
	for i, p := range m.Paths {
		if !strings.HasPrefix(p, "/") && p != "*" || strings.Contains(strings.TrimSuffix(p, "*"), "*") {
			return out, fmt.Errorf("paths[%d]: %q begins with / and may end in *", i, shorten(p))
		}
	}
	for i, method := range m.Methods {
		if !fieldName(method) {
			return out, fmt.Errorf("methods[%d]: %q is no method", i, shorten(method))
		}
	}
	return proxy.AccessRule{Policy: shorten(m.Policy), From: m.From, Foreign: m.Foreign, Methods: m.Methods, Paths: m.Paths}, nil
}

func decodeService(m *xdspb.Service) (any, error) {
	if m.Host == "" || len(m.Host) > maxName || len(m.Endpoint) > maxName {
		return nil, fmt.Errorf("host: %q is empty or too long, or endpoint is", shorten(m.Host))
	}
	if err := errors.Join(bounded("ports", len(m.Ports), maxPorts), bounded("endpoints", len(m.Endpoints), maxHosts)); err != nil {
		return nil, err
	}
	s := &proxy.Service{Host: m.Host, Headless: m.Headless, Endpoint: m.Endpoint}
	for i, p := range m.Ports {
		switch {
		case p.Port == 0 || p.Port > math.MaxUint16:
			return nil, fmt.Errorf("ports[%d].port: %d is no port", i, p.Port)
		case p.Target > math.MaxUint16:
			return nil, fmt.Errorf("ports[%d].target: %d is no port", i, p.Target)
		case len(p.Name) > maxName:
			return nil, fmt.Errorf("ports[%d].name: %q is too long", i, shorten(p.Name))
		}
		protocol := proxy.Protocol(p.Protocol)
		switch protocol {
		case proxy.HTTP, proxy.HTTP2, proxy.GRPC, proxy.TCP:
		default:
			return nil, fmt.Errorf("ports[%d].protocol: %q is not known", i, shorten(p.Protocol))
		}
		s.Ports = append(s.Ports, proxy.ServicePort{Number: uint16(p.Port), Name: p.Name, Protocol: protocol, Target: uint16(p.Target)})
	}
	for i, e := range m.Endpoints {
		out := proxy.ServiceEndpoint{ID: e.Id, Hostname: e.Hostname, Cluster: e.Cluster, Flat: e.Flat, Targets: map[string]uint16{}}
		var err error
		if out.Address, err = netip.ParseAddr(e.Address); err != nil {
			return nil, fmt.Errorf("endpoints[%d].address: %q is no IP address", i, shorten(e.Address))
		}
		if e.Id == "" || max(len(e.Id), len(e.Hostname), len(e.Cluster)) > maxName {
			return nil, fmt.Errorf("endpoints[%d]: id is empty, or id, hostname or cluster is too long", i)
		}
		if err := bounded(fmt.Sprintf("endpoints[%d].targets", i), len(e.Targets), maxPorts); err != nil {
			return nil, err
		}
		for name, target := range e.Targets {
			if target == 0 || target > math.MaxUint16 {
				return nil, fmt.Errorf("endpoints[%d].targets[%s]: %d is no port", i, shorten(name), target)
			}
			out.Targets[name] = uint16(target)
		}
		s.Endpoints = append(s.Endpoints, out)
	}
	return s, nil
}

func decodeTrust(m *xdspb.Trust) (any, error) {
	if err := bounded("sequences", len(m.Sequences), maxDomains); err != nil {
		return nil, err
	}
	if err := bounded("authorities", len(m.Authorities), maxDomains); err != nil {
		return nil, err
	}
	for td, d := range m.Authorities {
		if err := bounded("authorities."+shorten(td), len(d), maxDigest); err != nil {
			return nil, err
		}
	}
	return Trust{Sequences: maps.Clone(m.Sequences), Authorities: maps.Clone(m.Authorities)}, nil
}

func decodeFaults(m *xdspb.Faults) (any, error) {
	if err := bounded("faults", len(m.Faults), maxFaults); err != nil {
		return nil, err
	}
	out := make([]proxy.Fault, len(m.Faults))
	for i, f := range m.Faults {
		var err error
		if out[i], err = decodeFault(f); err != nil {
			return nil, fmt.Errorf("faults[%d].%w", i, err)
		}
	}
	return out, nil
}

func decodeFault(m *xdspb.Fault) (f proxy.Fault, err error) {
	if err := only(m, "drill", "mode", "share", "latency", "status", "ports", "end", "lease", "report", "renewal", "root"); err != nil {
		return f, err
	}
	f = proxy.Fault{Drill: shorten(m.Drill), Mode: proxy.FaultMode(m.Mode), Share: m.Share, Status: int(m.Status), Renewal: m.Renewal}
	switch f.Mode {
	case proxy.FaultErrors:
		if f.Status < 200 || f.Status > 599 {
			return f, fmt.Errorf("status is %d", f.Status)
		}
	case proxy.FaultDistrust:
		f.Root = m.Root
		td, _, _ := strings.Cut(m.Root, "/")
		if _, err := spiffeid.TrustDomainFromString(td); err != nil || len(m.Root) > 512 {
			return f, fmt.Errorf("root is %q", shorten(m.Root))
		}
	case proxy.FaultDrain, proxy.FaultBlackhole, proxy.FaultSlow, proxy.FaultObserve, proxy.FaultExpire:
	default:
		return f, fmt.Errorf("mode %q is not known", shorten(m.Mode))
	}
	if f.Share > 100 || f.Share == 0 && f.Mode != proxy.FaultObserve {
		return f, fmt.Errorf("share is %d", f.Share)
	}
	if err := bounded("ports", len(m.Ports), maxPorts); err != nil {
		return f, err
	}
	for _, p := range m.Ports {
		if p == 0 || p > math.MaxUint16 {
			return f, fmt.Errorf("ports: %d", p)
		}
		f.Ports = append(f.Ports, uint16(p))
	}
	for _, d := range []struct {
		field string
		from  *durationpb.Duration
		to    *time.Duration
	}{{"latency", m.Latency, &f.Latency}, {"end", m.End, &f.End}, {"lease", m.Lease, &f.Lease}, {"report", m.Report, &f.Report}} {
		if *d.to, err = duration(d.from); err != nil {
			return f, fmt.Errorf("%s: %w", d.field, err)
		}
	}
	return f, nil
}

func decodeProtocol(s string) (proxy.Protocol, error) {
	switch p := proxy.Protocol(s); p {
	case proxy.HTTP, proxy.HTTP2, proxy.GRPC, proxy.TCP:
		return p, nil
	}
	return "", fmt.Errorf("%q is not known", shorten(s))
}

func address(m *corev3.Address) (netip.AddrPort, error) {
	sa := m.GetSocketAddress()
	addr, err := netip.ParseAddr(sa.GetAddress())
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("%q is no IP address", shorten(sa.GetAddress()))
	}
	port := sa.GetPortValue()
	if port == 0 || port > math.MaxUint16 {
		return netip.AddrPort{}, fmt.Errorf("port_value is %d", port)
	}
	return netip.AddrPortFrom(addr.Unmap(), uint16(port)), nil
}

func clusterName(s string) error {
	if s == "" || len(s) > maxName {
		return fmt.Errorf("%q is empty or too long", shorten(s))
	}
	return nil
}

func bounded(field string, n, limit int) error {
	if n > limit {
		return fmt.Errorf("%s: %d entries, at most %d are read", field, n, limit)
	}
	return nil
}

// duration reads a duration that is not negative; nil is 0.
func duration(d *durationpb.Duration) (time.Duration, error) {
	if d == nil {
		return 0, nil
	}
	if err := d.CheckValid(); err != nil {
		return 0, err
	}
	if v := d.AsDuration(); v < 0 {
		return 0, fmt.Errorf("%s is negative", v)
	}
	return d.AsDuration(), nil
}

func percent(v float64) (uint32, error) {
	if !(v >= 0 && v <= 100) {
		return 0, errors.New(strconv.FormatFloat(v, 'g', -1, 64) + " is no percentage")
	}
	return uint32(math.Round(v)), nil
}

func firstSet(values ...*wrapperspb.UInt32Value) uint32 {
	for _, v := range values {
		if v != nil {
			return v.Value
		}
	}
	return 0
}

// shorten keeps foreign text in errors and tables small.
func shorten(s string) string {
	const limit = 256
	if len(s) <= limit {
		return s
	}
	return strings.ToValidUTF8(s[:limit], "") + "…"
}
