package xdsclient

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"

	"github.com/hanse-mesh/hanse/discovery/xdspb"
	"github.com/hanse-mesh/hanse/proxy"
)

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
