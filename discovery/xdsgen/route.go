package xdsgen

import (
	"cmp"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hanse-mesh/hanse/discovery"
)

// Routing is what happens to requests to one authority from one namespace.
type Routing struct {
	// Attached is false where no route has the service as its parent; then Rules has the one default rule. Where it is
	// true, a request that no rule matches is answered with 404.
	Attached bool   `json:"attached"`
	Rules    []Rule `json:"rules"` // in order of precedence
}

// Rule is one match of one rule of a route, and what follows.
type Rule struct {
	Name    string               `json:"name"` // "HTTPRoute shop/payments rule 2"; "default" without a route
	Match   discovery.RouteMatch `json:"match"`
	SNI     []string             `json:"sni,omitempty"` // of a TLSRoute: connections to one of these names, of which one may begin with "*."
	Filters discovery.Filters    `json:"filters,omitzero"`
	Targets []Target             `json:"targets,omitempty"`
	Request time.Duration        `json:"requestTimeout,omitempty"` // 0: none
	Try     time.Duration        `json:"backendTimeout,omitempty"` // of each try; 0: none
	Retry   *discovery.Retry     `json:"retry,omitempty"`          // nil: only what never reached an application, twice

	grpc bool // of a GRPCRoute
}

// Target is a weighted backend.
type Target struct {
	Authority string            `json:"authority,omitempty"`
	Weight    uint32            `json:"weight"`
	Filters   discovery.Filters `json:"filters,omitzero"`
	Invalid   string            `json:"invalid,omitempty"` // why its share of requests gets 500
}

// Routes says how a viewer's requests to an authority are routed: the producer's routes, which live in the service's namespace,
// or, where the viewer's own namespace has routes for it, those alone (GEP-1294 "consumer route"). GRPCRoutes hide
// HTTPRoutes of the same parent; ports that are carried as tcp have TLSRoutes, and a TCPRoute for the rest. The error says why there is nothing to call.
func (v *View) Routes(viewer *Viewer, authority string) (*Routing, error) {
	c, err := v.lookup(authority)
	if err != nil {
		return nil, err
	}
	return v.routing(viewer, c), nil
}

// Request is what a route matches on.
type Request struct {
	Method  string              `json:"method"`
	Path    string              `json:"path"`              // without query
	Headers map[string][]string `json:"headers,omitempty"` // lower-case names
	Query   map[string][]string `json:"query,omitempty"`
	SNI     string              `json:"sni,omitempty"` // of a connection: the server name that its client sends, if it speaks TLS
}

// Match returns the first rule that a request meets, or nil: it is answered with 404.
func (r *Routing) Match(req *Request) *Rule {
	for i := range r.Rules {
		if matchesSNI(r.Rules[i].SNI, req.SNI) && matchesRequest(&r.Rules[i].Match, req) {
			return &r.Rules[i]
		}
	}
	return nil
}

func matchesSNI(names []string, name string) bool {
	return len(names) == 0 || name != "" && slices.ContainsFunc(names, func(n string) bool {
		suffix, wild := strings.CutPrefix(n, "*")
		return n == name || wild && len(name) > len(suffix) && strings.HasSuffix(name, suffix)
	})
}

func matchesRequest(m *discovery.RouteMatch, req *Request) bool {
	if p := m.Path; p != nil {
		switch p.Type {
		case discovery.MatchExact:
			if req.Path != p.Value {
				return false
			}
		case discovery.MatchRegex:
			if !wholeMatch(p.Value, req.Path) {
				return false
			}
		default:
			prefix := strings.TrimRight(p.Value, "/")
			rest, ok := strings.CutPrefix(req.Path, prefix)
			if !ok || rest != "" && rest[0] != '/' {
				return false
			}
		}
	}
	return (m.Method == "" || m.Method == req.Method) &&
		valuesMatch(m.Headers, req.Headers, strings.ToLower) &&
		valuesMatch(m.Query, req.Query, func(s string) string { return s })
}

func valuesMatch(want []discovery.ValueMatch, have map[string][]string, key func(string) string) bool {
	for _, w := range want {
		got := have[key(w.Name)]
		if len(got) == 0 {
			return false
		}
		value := strings.Join(got, ",")
		if w.Type == discovery.MatchRegex && !wholeMatch(w.Value, value) || w.Type != discovery.MatchRegex && w.Value != value {
			return false
		}
	}
	return true
}

func wholeMatch(pattern, s string) bool {
	re, err := regexp.Compile("^(?:" + pattern + ")$")
	return err == nil && re.MatchString(s)
}

func (v *View) routing(viewer *Viewer, c *callee) *Routing {
	attached := v.attached(viewer.Namespace, c)
	if len(attached) == 0 {
		return &Routing{Rules: []Rule{{
			Name:    "default",
			Targets: []Target{{Authority: c.authority, Weight: 1}},
			Request: c.policy.Timeout,
		}}}
	}
	if !c.port.Protocol.IsHTTP() {
		return v.tcpRouting(c, attached)
	}
	type keyed struct {
		Rule
		route        *discovery.Route
		rule, number int
	}
	var all []keyed
	for _, r := range attached {
		for i, rule := range r.Rules {
			made := v.rule(c, r, i, rule)
			for j, m := range rule.Matches {
				made.Match = m
				all = append(all, keyed{made, r, i, j})
			}
			if len(rule.Matches) == 0 {
				all = append(all, keyed{made, r, i, 0})
			}
		}
	}
	slices.SortStableFunc(all, func(a, b keyed) int {
		return cmp.Or(
			comparePrecedence(&a.Match, &b.Match),
			a.route.Created.Compare(b.route.Created),
			a.route.Name.Compare(b.route.Name),
			cmp.Compare(a.rule, b.rule),
			cmp.Compare(a.number, b.number),
		)
	})
	out := &Routing{Attached: true, Rules: make([]Rule, len(all))}
	for i := range all {
		out.Rules[i] = all[i].Rule
	}
	return out
}

// tcpRouting: of the TLSRoutes for a name the one whose name is longest counts, an exact name before any pattern, then the oldest; of the TCPRoutes the oldest. A connection that
// none of them is for is refused, as a request is.
func (v *View) tcpRouting(c *callee, attached []*discovery.Route) *Routing {
	out := &Routing{Attached: true}
	attached = slices.SortedStableFunc(slices.Values(attached), func(a, b *discovery.Route) int {
		return cmp.Or(a.Created.Compare(b.Created), a.Name.Compare(b.Name))
	})
	for _, r := range attached {
		for i, rule := range r.Rules {
			for _, name := range r.SNI {
				made := v.rule(c, r, i, rule)
				made.SNI = []string{name}
				out.Rules = append(out.Rules, made)
			}
		}
	}
	slices.SortStableFunc(out.Rules, func(a, b Rule) int {
		wild := func(r *Rule) bool { return r.SNI[0][0] == '*' }
		return cmp.Or(cmpBool(wild(&a), wild(&b)), cmp.Compare(len(b.SNI[0]), len(a.SNI[0])))
	})
	out.Rules = slices.CompactFunc(out.Rules, func(a, b Rule) bool { return a.SNI[0] == b.SNI[0] })
	for _, r := range attached {
		if r.Kind == "TCPRoute" {
			for i, rule := range r.Rules {
				out.Rules = append(out.Rules, v.rule(c, r, i, rule))
			}
			break
		}
	}
	return out
}

// attached are the routes that apply to callers in a namespace.
func (v *View) attached(namespace string, c *callee) []*discovery.Route {
	var producer, consumer []*discovery.Route
	for _, r := range v.routes[c.name] {
		if overTCP := r.Kind == "TLSRoute" || r.Kind == "TCPRoute"; overTCP == c.port.Protocol.IsHTTP() {
			continue
		}
		if !slices.ContainsFunc(r.Parents, func(p discovery.RouteRef) bool {
			return p.Service == c.name && (p.Port == 0 || p.Port == c.port.Number) &&
				(!p.Import || !c.local && v.Set.Imports.Get(c.name) != nil) // GEP-1748: what is called as the clusterset's
		}) {
			continue
		}
		switch r.Namespace {
		case c.name.Namespace:
			producer = append(producer, r)
		case namespace:
			consumer = append(consumer, r)
		}
	}
	if len(consumer) > 0 {
		producer = consumer
	}
	if grpc := slices.DeleteFunc(slices.Clone(producer), func(r *discovery.Route) bool { return r.Kind != "GRPCRoute" }); len(grpc) > 0 {
		return grpc
	}
	return producer
}

// comparePrecedence orders matches as HTTPRouteRule.matches says: exact path, longest prefix, method, most headers, most query
// parameters. A regular expression, whose place is left to implementations, comes between exact and prefix.
func comparePrecedence(a, b *discovery.RouteMatch) int {
	kind := func(m *discovery.RouteMatch) (rank, length int) {
		switch {
		case m.Path == nil:
			return 0, 1
		case m.Path.Type == discovery.MatchExact:
			return 2, 0
		case m.Path.Type == discovery.MatchRegex:
			return 1, len(m.Path.Value)
		}
		return 0, max(1, len(strings.TrimRight(m.Path.Value, "/")))
	}
	ak, al := kind(a)
	bk, bl := kind(b)
	return cmp.Or(
		cmp.Compare(bk, ak),
		cmp.Compare(bl, al),
		cmpBool(a.Method == "", b.Method == ""),
		cmp.Compare(len(b.Headers), len(a.Headers)),
		cmp.Compare(len(b.Query), len(a.Query)),
	)
}

func (v *View) rule(c *callee, r *discovery.Route, index int, rule *discovery.RouteRule) Rule {
	out := Rule{
		Name:    fmt.Sprintf("%s %s rule %s", r.Kind, r.Name, cmp.Or(rule.Name, strconv.Itoa(index+1))),
		Filters: rule.Filters,
		Request: cmp.Or(rule.RequestTimeout, c.policy.Timeout),
		Try:     rule.BackendTimeout,
		Retry:   rule.Retry,
		grpc:    r.Kind == "GRPCRoute",
	}
	if rule.Filters.Redirect != nil {
		return out
	}
	for i := range rule.Backends {
		out.Targets = append(out.Targets, v.target(c, &rule.Backends[i]))
	}
	if len(rule.Backends) == 0 {
		out.Targets = []Target{{Weight: 1, Invalid: "the rule has no backendRefs"}}
	}
	return out
}

// target resolves a backendRef. Callers of …svc.cluster.local stay within this cluster where it has the backend, unless that is a ServiceImport.
func (v *View) target(c *callee, b *discovery.Backend) Target {
	t := Target{Weight: b.Weight, Filters: b.Filters, Invalid: b.Invalid}
	if t.Invalid != "" {
		return t
	}
	if b.Filters.Redirect != nil || b.Filters.Mirror != nil || rewritesPath(b.Filters.Rewrite) {
		t.Invalid = "a backendRef may only edit headers and rewrite the host"
		return t
	}
	local := c.local && !b.Import && v.Set.Local.Services.Get(b.Service) != nil
	port := b.Port
	if port == 0 {
		port = c.port.Number
	}
	authority := authorityOf(b.Service, port, local)
	if _, err := v.lookup(authority); err != nil {
		t.Invalid = err.Error()
		return t
	}
	t.Authority = authority
	return t
}

func rewritesPath(r *discovery.Rewrite) bool {
	return r != nil && (r.ReplacePath != nil || r.ReplacePrefix != nil)
}
