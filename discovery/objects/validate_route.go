package objects

import (
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/util/validation"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
)

// Groups of what a route may refer to.
const (
	groupMCS     = "multicluster.x-k8s.io"
	groupGateway = "gateway.networking.k8s.io"
)

// Bounds of the Gateway API's CRDs.
const (
	maxRules    = 16
	maxMatches  = 64
	maxFilters  = 16
	maxBackends = 16
	maxRegex    = 1024

	maxHostnames = 1024
)

func deref[T any](p *T, otherwise T) T {
	if p == nil {
		return otherwise
	}
	return *p
}

// isServiceRef reports whether group and kind name a Service (core) or a ServiceImport (GEP-1748).
func isServiceRef(group, kind string) bool {
	return kind == "Service" && group == "" || kind == "ServiceImport" && group == groupMCS
}

func (c *checker) parents(refs []gatewayv1.ParentReference) {
	if len(refs) == 0 {
		c.add("spec.parentRefs", nil, "must name the Service whose callers this route is for")
	}
	for i, r := range refs {
		field := fmt.Sprintf("spec.parentRefs[%d]", i)
		group, kind := string(deref(r.Group, groupGateway)), string(deref(r.Kind, "Gateway"))
		if !isServiceRef(group, kind) {
			c.add(field+".kind", kind, "must be a Service: write kind: Service and group: \"\" (the default is a Gateway)")
			c.faults[len(c.faults)-1].Foreign = true
		}
		c.problems(field+".name", string(r.Name), validation.IsDNS1123Label(string(r.Name)))
		if r.Namespace != nil {
			c.problems(field+".namespace", string(*r.Namespace), validation.IsDNS1123Label(string(*r.Namespace)))
		}
		if r.Port != nil {
			c.port(field+".port", *r.Port)
		}
	}
}

// ruleNames checks count and names of the rules.
func (c *checker) ruleNames(names []*gatewayv1.SectionName) {
	if len(names) > maxRules {
		c.add("spec.rules", nil, "%d rules; at most %d are allowed", len(names), maxRules)
	}
	seen := map[gatewayv1.SectionName]bool{}
	for i, n := range names {
		if n == nil {
			continue
		}
		field := fmt.Sprintf("spec.rules[%d].name", i)
		c.problems(field, string(*n), validation.IsDNS1123Subdomain(string(*n)))
		if seen[*n] {
			c.add(field, *n, "is the name of another rule too")
		}
		seen[*n] = true
	}
}

func (c *checker) httpRoute(r *gatewayv1.HTTPRoute) {
	c.parents(r.Spec.ParentRefs)
	var names []*gatewayv1.SectionName
	for i := range r.Spec.Rules {
		names = append(names, r.Spec.Rules[i].Name)
		c.httpRule(fmt.Sprintf("spec.rules[%d]", i), &r.Spec.Rules[i])
	}
	c.ruleNames(names)
}

func (c *checker) httpRule(field string, r *gatewayv1.HTTPRouteRule) {
	if len(r.Matches) > maxMatches {
		c.add(field+".matches", nil, "%d matches; at most %d are allowed", len(r.Matches), maxMatches)
	}
	onlyPrefix := true
	for i, m := range r.Matches {
		at := fmt.Sprintf("%s.matches[%d]", field, i)
		if m.Path != nil {
			c.path(at+".path", string(deref(m.Path.Type, gatewayv1.PathMatchPathPrefix)), deref(m.Path.Value, "/"))
			onlyPrefix = onlyPrefix && deref(m.Path.Type, gatewayv1.PathMatchPathPrefix) == gatewayv1.PathMatchPathPrefix
		}
		if m.Method != nil {
			c.oneOf(at+".method", string(*m.Method), "GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH")
		}
		seen := map[string]bool{}
		for j, h := range m.Headers {
			c.valueMatch(fmt.Sprintf("%s.headers[%d]", at, j), string(deref(h.Type, gatewayv1.HeaderMatchExact)),
				strings.ToLower(string(h.Name)), h.Value, seen)
		}
		seen = map[string]bool{}
		for j, q := range m.QueryParams {
			c.valueMatch(fmt.Sprintf("%s.queryParams[%d]", at, j), string(deref(q.Type, gatewayv1.QueryParamMatchExact)),
				string(q.Name), q.Value, seen)
		}
	}
	redirects := c.httpFilters(field+".filters", r.Filters, onlyPrefix)
	c.backendCount(field, len(r.BackendRefs))
	for i := range r.BackendRefs {
		at := fmt.Sprintf("%s.backendRefs[%d]", field, i)
		c.backend(at, &r.BackendRefs[i].BackendRef)
		if c.httpFilters(at+".filters", r.BackendRefs[i].Filters, onlyPrefix) {
			c.add(at+".filters", nil, "a RequestRedirect belongs to the rule, not to a backend")
		}
	}
	if redirects && len(r.BackendRefs) > 0 {
		c.add(field+".backendRefs", nil, "a rule that redirects has no backends; remove them or the RequestRedirect")
		c.incompatible()
	}
	if r.Timeouts != nil {
		request := c.duration(field+".timeouts.request", r.Timeouts.Request)
		backend := c.duration(field+".timeouts.backendRequest", r.Timeouts.BackendRequest)
		if request > 0 && backend > request {
			c.add(field+".timeouts.backendRequest", *r.Timeouts.BackendRequest, "must not be longer than timeouts.request %s", request)
		}
	}
	if r.Retry != nil {
		if n := r.Retry.Attempts; n != nil && (*n < 1 || *n > 10) {
			c.add(field+".retry.attempts", *n, "must be from 1 to 10")
		}
		for i, code := range r.Retry.Codes {
			if code < 400 || code > 599 {
				c.add(fmt.Sprintf("%s.retry.codes[%d]", field, i), code, "must be from 400 to 599")
			}
		}
		c.positive(field+".retry.backoff", r.Retry.Backoff)
	}
	if r.SessionPersistence != nil {
		c.add(field+".sessionPersistence", nil, "is not supported; a TrafficPolicy with loadBalancer RingHash keeps callers at one endpoint")
	}
}

func (c *checker) grpcRoute(r *gatewayv1.GRPCRoute) {
	c.parents(r.Spec.ParentRefs)
	var names []*gatewayv1.SectionName
	for i := range r.Spec.Rules {
		rule := &r.Spec.Rules[i]
		names = append(names, rule.Name)
		field := fmt.Sprintf("spec.rules[%d]", i)
		if len(rule.Matches) > maxMatches {
			c.add(field+".matches", nil, "%d matches; at most %d are allowed", len(rule.Matches), maxMatches)
		}
		for j, m := range rule.Matches {
			at := fmt.Sprintf("%s.matches[%d]", field, j)
			if m.Method != nil {
				c.grpcMethod(at+".method", m.Method)
			}
			seen := map[string]bool{}
			for k, h := range m.Headers {
				c.valueMatch(fmt.Sprintf("%s.headers[%d]", at, k), string(deref(h.Type, gatewayv1.GRPCHeaderMatchExact)),
					strings.ToLower(string(h.Name)), h.Value, seen)
			}
		}
		c.httpFilters(field+".filters", asHTTPFilters(rule.Filters), false)
		c.backendCount(field, len(rule.BackendRefs))
		for j := range rule.BackendRefs {
			at := fmt.Sprintf("%s.backendRefs[%d]", field, j)
			c.backend(at, &rule.BackendRefs[j].BackendRef)
			c.httpFilters(at+".filters", asHTTPFilters(rule.BackendRefs[j].Filters), false)
		}
		if rule.SessionPersistence != nil {
			c.add(field+".sessionPersistence", nil, "is not supported; a TrafficPolicy with loadBalancer RingHash keeps callers at one endpoint")
		}
	}
	c.ruleNames(names)
}

func (c *checker) tlsRoute(r *gatewayv1.TLSRoute) {
	c.parents(r.Spec.ParentRefs)
	if n := len(r.Spec.Hostnames); n == 0 || n > maxHostnames {
		c.add("spec.hostnames", nil, "%d names; give from 1 to %d, as clients send them (SNI)", n, maxHostnames)
	}
	for i, h := range r.Spec.Hostnames {
		field, name := fmt.Sprintf("spec.hostnames[%d]", i), strings.ToLower(string(h))
		if _, err := netip.ParseAddr(name); err == nil {
			c.add(field, h, "is an address; clients send none (RFC 6066 §3)")
			continue
		}
		c.problems(field, string(h), validation.IsDNS1123Subdomain(strings.TrimPrefix(name, "*.")))
	}
	c.oneRule(len(r.Spec.Rules))
	for i := range r.Spec.Rules {
		c.backends(fmt.Sprintf("spec.rules[%d]", i), r.Spec.Rules[i].BackendRefs)
	}
}

func (c *checker) tcpRoute(r *gatewayv1.TCPRoute) {
	c.parents(r.Spec.ParentRefs)
	c.oneRule(len(r.Spec.Rules))
	for i := range r.Spec.Rules {
		c.backends(fmt.Sprintf("spec.rules[%d]", i), r.Spec.Rules[i].BackendRefs)
	}
}

// oneRule: a connection meets any rule of these kinds, so that more than one means nothing.
func (c *checker) oneRule(n int) {
	if n != 1 {
		c.add("spec.rules", nil, "%d rules; there must be one: put all backends into it", n)
	}
}

func (c *checker) backends(field string, refs []gatewayv1.BackendRef) {
	if len(refs) == 0 {
		c.add(field+".backendRefs", nil, "must name a backend")
	}
	c.backendCount(field, len(refs))
	for i := range refs {
		c.backend(fmt.Sprintf("%s.backendRefs[%d]", field, i), &refs[i])
	}
}

// asHTTPFilters gives GRPCRoute filters the shape of HTTPRoute's, of which they are a subset.
func asHTTPFilters(filters []gatewayv1.GRPCRouteFilter) []gatewayv1.HTTPRouteFilter {
	var out []gatewayv1.HTTPRouteFilter
	for _, f := range filters {
		out = append(out, gatewayv1.HTTPRouteFilter{Type: gatewayv1.HTTPRouteFilterType(f.Type),
			RequestHeaderModifier: f.RequestHeaderModifier, ResponseHeaderModifier: f.ResponseHeaderModifier,
			RequestMirror: f.RequestMirror, ExtensionRef: f.ExtensionRef})
	}
	return out
}

var (
	grpcServiceName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*$`)
	grpcMethodName  = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)
)

func (c *checker) grpcMethod(field string, m *gatewayv1.GRPCMethodMatch) {
	kind := deref(m.Type, gatewayv1.GRPCMethodMatchExact)
	c.oneOf(field+".type", string(kind), "Exact", "RegularExpression")
	service, method := deref(m.Service, ""), deref(m.Method, "")
	if service == "" && method == "" {
		c.add(field, nil, "must name a service, a method or both")
	}
	if kind == gatewayv1.GRPCMethodMatchRegularExpression {
		c.regex(field+".service", service)
		c.regex(field+".method", method)
		return
	}
	if service != "" && !grpcServiceName.MatchString(service) {
		c.add(field+".service", service, "must be a full gRPC service name such as shop.v1.Payments")
	}
	if method != "" && !grpcMethodName.MatchString(method) {
		c.add(field+".method", method, "must be a gRPC method name such as Charge")
	}
}

func (c *checker) regex(field, expr string) {
	if len(expr) > maxRegex {
		c.add(field, expr, "longer than %d bytes", maxRegex)
		return
	}
	if _, err := regexp.Compile(expr); err != nil {
		c.add(field, expr, "not a regular expression in RE2 syntax: %s", strings.TrimPrefix(err.Error(), "error parsing regexp: "))
	}
}

func (c *checker) path(field, kind, value string) {
	c.oneOf(field+".type", kind, "Exact", "PathPrefix", "RegularExpression")
	if kind == "RegularExpression" {
		c.regex(field+".value", value)
		return
	}
	c.literalPath(field+".value", value)
}

// literalPath holds a path to the Gateway API's rules: absolute, normal, no query.
func (c *checker) literalPath(field, value string) {
	if !strings.HasPrefix(value, "/") {
		c.add(field, value, "must begin with /")
		return
	}
	for _, bad := range []string{"//", "/./", "/../", "%2f", "%2F", "#", "?"} {
		if strings.Contains(value, bad) {
			c.add(field, value, "must not contain %s", bad)
			return
		}
	}
	if strings.HasSuffix(value, "/.") || strings.HasSuffix(value, "/..") || strings.ContainsFunc(value, func(r rune) bool { return r <= ' ' || r == 0x7f }) {
		c.add(field, value, "must be a normal path: no . or .. at the end, no spaces or control characters")
	}
}

// valueMatch checks a match on a header or query parameter; seen holds the names so far.
func (c *checker) valueMatch(field, kind, name, value string, seen map[string]bool) {
	c.oneOf(field+".type", kind, "Exact", "RegularExpression")
	c.headerName(field+".name", name)
	if kind == "RegularExpression" {
		c.regex(field+".value", value)
	} else {
		c.headerValue(field+".value", value)
	}
	if seen[name] {
		c.add(field+".name", name, "is matched twice; only one match for each name is allowed")
	}
	seen[name] = true
}

var headerToken = regexp.MustCompile("^[A-Za-z0-9!#$%&'*+\\-.^_`|~]{1,256}$")

func (c *checker) headerName(field, name string) {
	if !headerToken.MatchString(name) {
		c.add(field, name, "must be a header name (RFC 9110 §5.1): letters, digits and - without spaces")
	}
}

func (c *checker) headerValue(field, value string) {
	if len(value) > 4096 || strings.ContainsAny(value, "\r\n\x00") {
		c.add(field, value, "must be one line of at most 4096 bytes")
	}
}

// framing are headers that only proxies themselves may write: they frame or route a message.
var framing = []string{"connection", "content-length", "host", "keep-alive", "proxy-connection", "te", "trailer",
	"transfer-encoding", "upgrade", "hanse-target"}

func (c *checker) headerEdits(field string, h *gatewayv1.HTTPHeaderFilter) {
	if h == nil {
		return
	}
	seen := map[string]bool{}
	name := func(at, name string) {
		c.headerName(at, name)
		lower := strings.ToLower(name)
		if lower == "host" {
			c.add(at, name, "cannot be edited; use a URLRewrite filter with hostname")
		} else if slices.Contains(framing, lower) {
			c.add(at, name, "cannot be edited: proxies write it")
		}
		if seen[lower] {
			c.add(at, name, "is edited twice in one filter")
		}
		seen[lower] = true
	}
	for i, v := range h.Set {
		name(fmt.Sprintf("%s.set[%d].name", field, i), string(v.Name))
		c.headerValue(fmt.Sprintf("%s.set[%d].value", field, i), v.Value)
	}
	for i, v := range h.Add {
		name(fmt.Sprintf("%s.add[%d].name", field, i), string(v.Name))
		c.headerValue(fmt.Sprintf("%s.add[%d].value", field, i), v.Value)
	}
	for i, v := range h.Remove {
		name(fmt.Sprintf("%s.remove[%d]", field, i), v)
	}
}

// httpFilters checks a list of filters and reports whether one of them redirects.
func (c *checker) httpFilters(field string, filters []gatewayv1.HTTPRouteFilter, onlyPrefix bool) (redirects bool) {
	if len(filters) > maxFilters {
		c.add(field, nil, "%d filters; at most %d are allowed", len(filters), maxFilters)
	}
	seen := map[gatewayv1.HTTPRouteFilterType]bool{}
	for i := range filters {
		f := &filters[i]
		at := fmt.Sprintf("%s[%d]", field, i)
		if seen[f.Type] {
			c.add(at+".type", f.Type, "is given twice; put everything into one filter of a type")
		}
		seen[f.Type] = true
		settings := map[gatewayv1.HTTPRouteFilterType]bool{
			gatewayv1.HTTPRouteFilterRequestHeaderModifier:  f.RequestHeaderModifier != nil,
			gatewayv1.HTTPRouteFilterResponseHeaderModifier: f.ResponseHeaderModifier != nil,
			gatewayv1.HTTPRouteFilterRequestRedirect:        f.RequestRedirect != nil,
			gatewayv1.HTTPRouteFilterURLRewrite:             f.URLRewrite != nil,
			gatewayv1.HTTPRouteFilterRequestMirror:          f.RequestMirror != nil,
		}
		given, supported := settings[f.Type]
		if !supported {
			c.add(at+".type", f.Type, "is not supported; supported are RequestHeaderModifier, ResponseHeaderModifier, RequestRedirect, URLRewrite and RequestMirror")
			continue
		}
		delete(settings, f.Type)
		for _, other := range settings {
			given = given && !other
		}
		if !given {
			c.add(at, nil, "must hold the settings of its type %s, and no others", f.Type)
			continue
		}
		c.headerEdits(at+".requestHeaderModifier", f.RequestHeaderModifier)
		c.headerEdits(at+".responseHeaderModifier", f.ResponseHeaderModifier)
		switch {
		case f.RequestRedirect != nil:
			c.redirect(at+".requestRedirect", f.RequestRedirect, onlyPrefix)
		case f.URLRewrite != nil:
			c.hostname(at+".urlRewrite.hostname", f.URLRewrite.Hostname)
			c.pathModifier(at+".urlRewrite.path", f.URLRewrite.Path, onlyPrefix)
		case f.RequestMirror != nil:
			c.mirror(at+".requestMirror", f.RequestMirror)
		}
	}
	redirects = seen[gatewayv1.HTTPRouteFilterRequestRedirect]
	if redirects && seen[gatewayv1.HTTPRouteFilterURLRewrite] {
		c.add(field, nil, "RequestRedirect and URLRewrite exclude each other")
		c.incompatible()
	}
	return redirects
}

// incompatible says of the last fault that it is between filters.
func (c *checker) incompatible() {
	c.faults[len(c.faults)-1].Condition = string(gatewayv1.RouteReasonIncompatibleFilters)
}

func (c *checker) mirror(field string, m *gatewayv1.HTTPRequestMirrorFilter) {
	c.backend(field+".backendRef", &gatewayv1.BackendRef{BackendObjectReference: m.BackendRef})
	c.intRange(field+".percent", m.Percent, 0, 100)
	if f := m.Fraction; f != nil {
		if d := deref(f.Denominator, 100); d < 1 || f.Numerator < 0 || f.Numerator > d {
			c.add(field+".fraction", nil, "numerator must be from 0 to the denominator, which is 100 by default")
		}
		if m.Percent != nil {
			c.add(field+".fraction", nil, "excludes percent; remove one of the two")
		}
	}
}

func (c *checker) redirect(field string, r *gatewayv1.HTTPRequestRedirectFilter, onlyPrefix bool) {
	if r.Scheme != nil {
		c.oneOf(field+".scheme", *r.Scheme, "http", "https")
	}
	if r.Port != nil {
		c.port(field+".port", *r.Port)
	}
	if s := r.StatusCode; s != nil && !slices.Contains([]int{301, 302, 303, 307, 308}, *s) {
		c.add(field+".statusCode", *s, "must be 301, 302, 303, 307 or 308")
	}
	c.hostname(field+".hostname", r.Hostname)
	c.pathModifier(field+".path", r.Path, onlyPrefix)
}

func (c *checker) hostname(field string, h *gatewayv1.PreciseHostname) {
	if h != nil {
		c.problems(field, string(*h), validation.IsDNS1123Subdomain(string(*h)))
	}
}

func (c *checker) pathModifier(field string, m *gatewayv1.HTTPPathModifier, onlyPrefix bool) {
	if m == nil {
		return
	}
	c.oneOf(field+".type", string(m.Type), "ReplaceFullPath", "ReplacePrefixMatch")
	full, prefix := m.ReplaceFullPath, m.ReplacePrefixMatch
	switch m.Type {
	case gatewayv1.FullPathHTTPPathModifier:
		if full == nil || prefix != nil {
			c.add(field, nil, "type ReplaceFullPath needs replaceFullPath, and only that")
			return
		}
		c.literalPath(field+".replaceFullPath", *full)
	case gatewayv1.PrefixMatchHTTPPathModifier:
		if prefix == nil || full != nil {
			c.add(field, nil, "type ReplacePrefixMatch needs replacePrefixMatch, and only that")
			return
		}
		if !onlyPrefix {
			c.add(field+".type", m.Type, "needs every match of the rule to be on a PathPrefix")
		}
		if *prefix != "" {
			c.literalPath(field+".replacePrefixMatch", *prefix)
		}
	}
}

func (c *checker) backendCount(field string, n int) {
	if n > maxBackends {
		c.add(field+".backendRefs", nil, "%d backends; at most %d are allowed", n, maxBackends)
	}
}

// backend checks what is wrong with a reference whatever it refers to; a kind that is no Service makes an invalid backend
// in Build (Gateway API ResolvedRefs), not a fault of the route.
func (c *checker) backend(field string, b *gatewayv1.BackendRef) {
	if b.Name == "" {
		c.add(field+".name", nil, "must be given")
	}
	if isServiceRef(string(deref(b.Group, "")), string(deref(b.Kind, "Service"))) {
		if b.Port == nil {
			c.add(field+".port", nil, "must be given for a Service")
		} else {
			c.port(field+".port", *b.Port)
		}
	}
	c.intRange(field+".weight", b.Weight, 0, 1_000_000)
}

func (c *checker) referenceGrant(g *gatewayv1.ReferenceGrant) {
	if len(g.Spec.From) == 0 {
		c.add("spec.from", nil, "must say who may refer")
	}
	if len(g.Spec.To) == 0 {
		c.add("spec.to", nil, "must say what may be referred to")
	}
	for i, f := range g.Spec.From {
		field := fmt.Sprintf("spec.from[%d]", i)
		if f.Kind == "" {
			c.add(field+".kind", nil, "must be given, such as HTTPRoute")
		}
		c.problems(field+".namespace", string(f.Namespace), validation.IsDNS1123Label(string(f.Namespace)))
	}
	for i, t := range g.Spec.To {
		if t.Kind == "" {
			c.add(fmt.Sprintf("spec.to[%d].kind", i), nil, "must be given, such as Service")
		}
	}
}
