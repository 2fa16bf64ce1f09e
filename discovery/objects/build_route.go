package objects

import (
	"cmp"
	"fmt"
	"regexp"
	"slices"
	"strings"

	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/hanse-mesh/hanse/discovery"
)

// defaultAttempts of a retry that names none.
const defaultAttempts = 2

// routes returns the routes oldest first, ties by namespace and name: the Gateway API's precedence between routes whose
// matches tie.
func (b *builder) routes(services discovery.ByName[*discovery.Service]) []*discovery.Route {
	r := &routeBuilder{builder: b, services: services}
	all(b, "ReferenceGrant", func(_ Object, g *gatewayv1.ReferenceGrant) { r.grants = append(r.grants, g) })
	all(b, "HTTPRoute", func(o Object, v *gatewayv1.HTTPRoute) {
		r.route(o, v.Spec.ParentRefs, len(v.Spec.Rules), func(i int) *discovery.RouteRule { return r.httpRule(i, &v.Spec.Rules[i]) })
	})
	all(b, "GRPCRoute", func(o Object, v *gatewayv1.GRPCRoute) {
		r.route(o, v.Spec.ParentRefs, len(v.Spec.Rules), func(i int) *discovery.RouteRule { return r.grpcRule(i, &v.Spec.Rules[i]) })
	})
	all(b, "TLSRoute", func(o Object, v *gatewayv1.TLSRoute) {
		r.route(o, v.Spec.ParentRefs, len(v.Spec.Rules), func(i int) *discovery.RouteRule {
			return r.tcpRule(i, v.Spec.Rules[i].Name, v.Spec.Rules[i].BackendRefs)
		})
	})
	all(b, "TCPRoute", func(o Object, v *gatewayv1.TCPRoute) {
		r.route(o, v.Spec.ParentRefs, len(v.Spec.Rules), func(i int) *discovery.RouteRule {
			return r.tcpRule(i, v.Spec.Rules[i].Name, v.Spec.Rules[i].BackendRefs)
		})
	})
	slices.SortStableFunc(r.out, func(x, y *discovery.Route) int {
		return cmp.Or(x.Created.Compare(y.Created), x.Name.Compare(y.Name), cmp.Compare(x.Kind, y.Kind))
	})
	return r.out
}

type routeBuilder struct {
	*builder
	services discovery.ByName[*discovery.Service]
	grants   []*gatewayv1.ReferenceGrant
	out      []*discovery.Route

	// of the route at hand
	object  Object
	parents []discovery.RouteRef
}

func (r *routeBuilder) route(o Object, parents []gatewayv1.ParentReference, rules int, rule func(int) *discovery.RouteRule) {
	r.object, r.parents = o, nil
	for i, p := range parents {
		if !isServiceRef(string(deref(p.Group, groupGateway)), string(deref(p.Kind, "Gateway"))) {
			continue // an ingress parent: another controller's
		}
		if ref, ok := r.parent(i, p); ok && !slices.Contains(r.parents, ref) {
			r.parents = append(r.parents, ref)
		}
	}
	if len(r.parents) == 0 {
		return
	}
	out := &discovery.Route{Name: o.Name(), Kind: o.Kind, Created: r.created(o), Parents: r.parents, SNI: sni(o)}
	for i := range rules {
		out.Rules = append(out.Rules, rule(i))
	}
	if rules == 0 { // the CRD's default: one rule that matches everything and has no backend
		out.Rules = []*discovery.RouteRule{{Backends: []discovery.Backend{}}}
	}
	r.out = append(r.out, out)
}

func (r *routeBuilder) parent(i int, p gatewayv1.ParentReference) (discovery.RouteRef, bool) {
	field := fmt.Sprintf("spec.parentRefs[%d]", i)
	ref := discovery.RouteRef{
		Service: discovery.Name{Namespace: string(deref(p.Namespace, gatewayv1.Namespace(r.object.Value.GetNamespace()))), Name: string(p.Name)},
		Port:    uint16(deref(p.Port, 0)),
		Import:  deref(p.Kind, "") == "ServiceImport",
	}
	svc := r.services.Get(ref.Service)
	if p.SectionName != nil {
		i := -1
		if svc != nil {
			i = slices.IndexFunc(svc.Ports, func(port discovery.Port) bool {
				return port.Name == string(*p.SectionName) && (ref.Port == 0 || ref.Port == port.Number)
			})
		}
		if i < 0 {
			r.pending(r.object, field+".sectionName", *p.SectionName, "Service %s has no port of this name here; give its number in port", ref.Service)
			return ref, false
		}
		ref.Port = svc.Ports[i].Number
	}
	switch {
	case svc != nil && svc.Headless: // GEP-1294 "Allowed service types"
		r.pending(r.object, field, ref.Service, "is headless, and has no address of its own that callers could mean; routes are for Services with a cluster IP")
		return ref, false
	case svc == nil: // it may be another cluster's, and so may the port
	case ref.Port != 0 && svc.Port(ref.Port) == nil:
		r.pending(r.object, field+".port", ref.Port, "Service %s has no such port here; it has %s", ref.Service, portNames(svc.Ports))
	case overTCP(r.object.Kind) && !carries(svc, ref.Port, false):
		r.pending(r.object, field, ref.Service, "has no port here that is carried as tcp; an HTTPRoute or GRPCRoute is for ports that speak HTTP")
	case !overTCP(r.object.Kind) && !speaksHTTP(svc, ref.Port):
		r.pending(r.object, field, ref.Service, "is carried as tcp, without routes; %s", sayProtocol)
	}
	return ref, true
}

// overTCP reports whether routes of a kind are for connections, not requests.
func overTCP(kind string) bool { return kind == "TLSRoute" || kind == "TCPRoute" }

// sni returns the names that a TLSRoute is for.
func sni(o Object) []string {
	v, ok := o.Value.(*gatewayv1.TLSRoute)
	if !ok {
		return nil
	}
	var out []string
	for _, h := range v.Spec.Hostnames {
		out = append(out, strings.ToLower(string(h)))
	}
	return out
}

// tcpRule is the rule of a TLSRoute or TCPRoute.
func (r *routeBuilder) tcpRule(i int, name *gatewayv1.SectionName, refs []gatewayv1.BackendRef) *discovery.RouteRule {
	out := &discovery.RouteRule{Name: string(deref(name, "")), Backends: []discovery.Backend{}}
	for j, ref := range refs {
		out.Backends = append(out.Backends, r.backend(fmt.Sprintf("spec.rules[%d].backendRefs[%d]", i, j), ref, nil))
	}
	return out
}

func (r *routeBuilder) httpRule(i int, rule *gatewayv1.HTTPRouteRule) *discovery.RouteRule {
	field := fmt.Sprintf("spec.rules[%d]", i)
	out := &discovery.RouteRule{
		Name:     string(deref(rule.Name, "")),
		Filters:  r.filters(field+".filters", rule.Filters),
		Backends: []discovery.Backend{},
	}
	for _, m := range rule.Matches {
		var match discovery.RouteMatch
		if m.Path != nil {
			match.Path = &discovery.PathMatch{Type: discovery.MatchType(deref(m.Path.Type, gatewayv1.PathMatchPathPrefix)), Value: deref(m.Path.Value, "/")}
		}
		match.Method = string(deref(m.Method, ""))
		for _, h := range m.Headers {
			match.Headers = append(match.Headers, discovery.ValueMatch{Type: discovery.MatchType(deref(h.Type, gatewayv1.HeaderMatchExact)), Name: string(h.Name), Value: h.Value})
		}
		for _, q := range m.QueryParams {
			match.Query = append(match.Query, discovery.ValueMatch{Type: discovery.MatchType(deref(q.Type, gatewayv1.QueryParamMatchExact)), Name: string(q.Name), Value: q.Value})
		}
		out.Matches = append(out.Matches, match)
	}
	for j := range rule.BackendRefs {
		at := fmt.Sprintf("%s.backendRefs[%d]", field, j)
		out.Backends = append(out.Backends, r.backend(at, rule.BackendRefs[j].BackendRef, rule.BackendRefs[j].Filters))
	}
	if t := rule.Timeouts; t != nil {
		out.RequestTimeout, out.BackendTimeout = validDuration(t.Request), validDuration(t.BackendRequest)
	}
	if rule.Retry != nil {
		out.Retry = &discovery.Retry{Attempts: deref(rule.Retry.Attempts, defaultAttempts), Backoff: validDuration(rule.Retry.Backoff)}
		for _, code := range rule.Retry.Codes {
			out.Retry.Codes = append(out.Retry.Codes, int(code))
		}
	}
	return out
}

func (r *routeBuilder) grpcRule(i int, rule *gatewayv1.GRPCRouteRule) *discovery.RouteRule {
	field := fmt.Sprintf("spec.rules[%d]", i)
	out := &discovery.RouteRule{
		Name:     string(deref(rule.Name, "")),
		Filters:  r.filters(field+".filters", asHTTPFilters(rule.Filters)),
		Backends: []discovery.Backend{},
	}
	for _, m := range rule.Matches {
		match := discovery.RouteMatch{Path: grpcPath(m.Method)}
		for _, h := range m.Headers {
			match.Headers = append(match.Headers, discovery.ValueMatch{Type: discovery.MatchType(deref(h.Type, gatewayv1.GRPCHeaderMatchExact)), Name: string(h.Name), Value: h.Value})
		}
		out.Matches = append(out.Matches, match)
	}
	for j := range rule.BackendRefs {
		at := fmt.Sprintf("%s.backendRefs[%d]", field, j)
		out.Backends = append(out.Backends, r.backend(at, rule.BackendRefs[j].BackendRef, asHTTPFilters(rule.BackendRefs[j].Filters)))
	}
	return out
}

// grpcPath turns a method match into one on the path "/service/method". A missing part matches any.
func grpcPath(m *gatewayv1.GRPCMethodMatch) *discovery.PathMatch {
	if m == nil {
		return nil
	}
	service, method := deref(m.Service, ""), deref(m.Method, "")
	if deref(m.Type, gatewayv1.GRPCMethodMatchExact) == gatewayv1.GRPCMethodMatchExact {
		switch {
		case service != "" && method != "":
			return &discovery.PathMatch{Type: discovery.MatchExact, Value: "/" + service + "/" + method}
		case service != "":
			return &discovery.PathMatch{Type: discovery.MatchPrefix, Value: "/" + service}
		}
		return &discovery.PathMatch{Type: discovery.MatchRegex, Value: "/[^/]+/" + regexp.QuoteMeta(method)}
	}
	part := func(expr string) string {
		if expr == "" {
			return "[^/]+"
		}
		return "(?:" + expr + ")"
	}
	return &discovery.PathMatch{Type: discovery.MatchRegex, Value: "/" + part(service) + "/" + part(method)}
}

// filters turns the filters that Validate accepted into one value.
func (r *routeBuilder) filters(field string, filters []gatewayv1.HTTPRouteFilter) discovery.Filters {
	var out discovery.Filters
	for i, f := range filters {
		switch {
		case f.RequestHeaderModifier != nil:
			out.Request = headerEdits(f.RequestHeaderModifier)
		case f.ResponseHeaderModifier != nil:
			out.Response = headerEdits(f.ResponseHeaderModifier)
		case f.RequestRedirect != nil:
			v := f.RequestRedirect
			out.Redirect = &discovery.Redirect{
				Scheme: deref(v.Scheme, ""),
				Host:   string(deref(v.Hostname, "")),
				Port:   uint16(deref(v.Port, 0)),
				Status: deref(v.StatusCode, 302),
			}
			if v.Path != nil {
				out.Redirect.ReplacePath, out.Redirect.ReplacePrefix = v.Path.ReplaceFullPath, v.Path.ReplacePrefixMatch
			}
		case f.URLRewrite != nil:
			out.Rewrite = &discovery.Rewrite{Host: string(deref(f.URLRewrite.Hostname, ""))}
			if p := f.URLRewrite.Path; p != nil {
				out.Rewrite.ReplacePath, out.Rewrite.ReplacePrefix = p.ReplaceFullPath, p.ReplacePrefixMatch
			}
		case f.RequestMirror != nil:
			percent := float64(100)
			if f.RequestMirror.Percent != nil {
				percent = float64(*f.RequestMirror.Percent)
			} else if fr := f.RequestMirror.Fraction; fr != nil {
				percent = 100 * float64(fr.Numerator) / float64(deref(fr.Denominator, 100))
			}
			if percent == 0 {
				continue
			}
			at := fmt.Sprintf("%s[%d].requestMirror.backendRef", field, i)
			mirror := r.backend(at, gatewayv1.BackendRef{BackendObjectReference: f.RequestMirror.BackendRef}, nil)
			out.Mirror = &mirror
			if percent < 100 {
				out.MirrorPercent = percent
			}
		}
	}
	return out
}

func headerEdits(h *gatewayv1.HTTPHeaderFilter) discovery.HeaderEdits {
	out := discovery.HeaderEdits{Remove: h.Remove}
	for _, v := range h.Set {
		out.Set = append(out.Set, discovery.Header{Name: string(v.Name), Value: v.Value})
	}
	for _, v := range h.Add {
		out.Add = append(out.Add, discovery.Header{Name: string(v.Name), Value: v.Value})
	}
	return out
}

// backend resolves what can be resolved from one cluster: kind, permission, and the port where the Service is known here.
// Whether the Service exists anywhere is known only where all clusters' exports meet.
func (r *routeBuilder) backend(field string, ref gatewayv1.BackendRef, filters []gatewayv1.HTTPRouteFilter) discovery.Backend {
	b := discovery.Backend{
		Service: discovery.Name{Namespace: string(deref(ref.Namespace, gatewayv1.Namespace(r.object.Value.GetNamespace()))), Name: string(ref.Name)},
		Port:    uint16(deref(ref.Port, 0)),
		Weight:  uint32(deref(ref.Weight, 1)),
		Filters: r.filters(field+".filters", filters),
	}
	group, kind := string(deref(ref.Group, "")), string(deref(ref.Kind, "Service"))
	b.Import = kind == "ServiceImport"
	switch {
	case !isServiceRef(group, kind):
		b.Invalid = fmt.Sprintf("InvalidKind: %s of group %q is neither Service nor ServiceImport", kind, group)
		r.fault(r.object, field+".kind", kind, "must be Service (group \"\") or ServiceImport (group %s); its share fails (HTTP: 500)", groupMCS)
	case !r.permitted(group, kind, b.Service):
		b.Invalid = fmt.Sprintf("RefNotPermitted: no ReferenceGrant in %s lets %s refer to it", b.Service.Namespace, r.object.Key())
		r.pending(r.object, field+".namespace", b.Service.Namespace,
			"a ReferenceGrant in that namespace must permit this; until then its share fails (HTTP: 500)")
	}
	return b
}

// permitted reports whether the route may send to a service: its own namespace's, that of a Service it is attached to
// (GAMMA consumer routes), or by a ReferenceGrant.
func (r *routeBuilder) permitted(group, kind string, to discovery.Name) bool {
	from := r.object.Value.GetNamespace()
	if to.Namespace == from || slices.ContainsFunc(r.parents, func(p discovery.RouteRef) bool { return p.Service.Namespace == to.Namespace }) {
		return true
	}
	return slices.ContainsFunc(r.grants, func(g *gatewayv1.ReferenceGrant) bool {
		return g.Namespace == to.Namespace &&
			slices.ContainsFunc(g.Spec.From, func(f gatewayv1.ReferenceGrantFrom) bool {
				return string(f.Group) == groupGateway && string(f.Kind) == r.object.Kind && string(f.Namespace) == from
			}) &&
			slices.ContainsFunc(g.Spec.To, func(t gatewayv1.ReferenceGrantTo) bool {
				return string(t.Group) == group && string(t.Kind) == kind && (t.Name == nil || string(*t.Name) == to.Name)
			})
	})
}
