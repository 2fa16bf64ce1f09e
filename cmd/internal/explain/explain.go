package explain

import (
	"cmp"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hanse-mesh/hanse/cmd/internal/admin"
	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/discovery/xdsgen"
	"github.com/hanse-mesh/hanse/discovery/xdspb"
	"github.com/hanse-mesh/hanse/identity"
)

// Caller is a proxy that may be the origin of the call.
type Caller struct {
	Viewer  xdsgen.Viewer
	Config  string // "version 118 (current), acknowledged 3s ago"
	Problem string // what its stream says is wrong: a NACK, or not connected
}

// Health is what a caller's proxy, or failing that any proxy, reports of an endpoint.
type Health struct {
	State  string // healthy, ejected, dead; empty: nobody has reported it
	Reason string
}

// Input is all that Explain looks at.
type Input struct {
	View    *xdsgen.View
	Request admin.ExplainRequest
	Callers []Caller
	Health  func(proxyID, authority, endpointID string) Health // as that proxy sees it, else the worst that any does
	Gateway func(addr string) (state string)                   // "up", "down" or "" for unknown
	Now     time.Time
}

// overprovisioning is Envoy's factor: a level with 72 % of its endpoints healthy still takes all traffic.
const overprovisioning = 1.4

// Explain follows the call. It fails only where the request itself makes no sense.
func Explain(in Input) (admin.Explanation, error) {
	caller, err := findCaller(in)
	if err != nil {
		return admin.Explanation{}, err
	}
	e := &explainer{in: in, caller: caller, viewer: &caller.Viewer}
	e.out.From = e.viewer.SPIFFEID
	if err := e.name(); err != nil {
		return admin.Explanation{}, err
	}
	if e.service == nil {
		return e.out, nil
	}
	target := e.route()
	if target != "" {
		e.levels(target)
		e.trust()
		e.policy()
	}
	e.config()
	if e.out.Summary == "" {
		e.out.OK = true
		e.out.Summary = e.success()
	}
	return e.out, nil
}

type explainer struct {
	in      Input
	caller  *Caller
	viewer  *xdsgen.Viewer
	service *discovery.Name
	port    discovery.Port
	ranked  *xdsgen.Levels
	rule    *xdsgen.Rule
	out     admin.Explanation
}

// fail records the first reason of failure; what follows is still explained.
func (e *explainer) fail(remedy, format string, args ...any) {
	if e.out.Summary == "" {
		e.out.Summary = "FAILS: " + fmt.Sprintf(format, args...)
		e.out.Remedy = remedy
	}
}

// findCaller finds the proxy of the workload that is named: by service account, else by a service that it serves.
func findCaller(in Input) (*Caller, error) {
	ns, name := split(in.Request.From)
	var found []Caller
	spaces := map[string]bool{}
	for _, c := range in.Callers {
		id, err := spiffeid.FromString(c.Viewer.SPIFFEID)
		if err != nil {
			continue
		}
		cns, sa, ok := identity.ParseWorkloadID(id)
		if ok && sa == name && (ns == "" || ns == cns) {
			found = append(found, c)
			spaces[cns] = true
		}
	}
	if len(found) == 0 {
		// No sidecar of that name is connected: explain for a workload at an unknown place of this cluster, as far as it can be done.
		self := in.View.Set.Local.Self
		if ns == "" {
			for n := range in.View.Set.Local.Services.All() {
				if n.Name == name {
					spaces[n.Namespace] = true
				}
			}
			if len(spaces) != 1 {
				return nil, admin.NotFound("hanse proxies lists who is connected; name it as namespace/serviceaccount",
					"no sidecar of a workload %q is connected to this control plane", in.Request.From)
			}
			for s := range spaces {
				ns = s
			}
		}
		td, err := spiffeid.TrustDomainFromString(self.TrustDomain)
		if err != nil {
			return nil, err
		}
		id, err := identity.WorkloadID(td, ns, name)
		if err != nil {
			return nil, admin.Invalid("name it as namespace/serviceaccount", "%q names no workload: %v", in.Request.From, err)
		}
		return &Caller{Viewer: xdsgen.Viewer{ID: id.String(), Cluster: self.Cluster, Namespace: ns, Region: self.Region, Network: self.Network,
			Kind: xdsgen.Sidecar, SPIFFEID: id.String()}, Problem: "no sidecar of this workload is connected to this control plane"}, nil
	}
	if len(spaces) > 1 {
		return nil, admin.Invalid("name it as namespace/serviceaccount", "%q is a workload of several namespaces: %s", in.Request.From, strings.Join(sorted(spaces), ", "))
	}
	slices.SortFunc(found, func(a, b Caller) int { return cmp.Compare(a.Viewer.ID, b.Viewer.ID) })
	return &found[0], nil
}

// name finds the service and port.
func (e *explainer) name() error {
	set := e.in.View.Set
	host, port := e.in.Request.To, ""
	if h, p, ok := strings.Cut(host, ":"); ok {
		host, port = h, ":"+p
	}
	if ns, n, ok := strings.Cut(host, "/"); ok {
		host = n + "." + ns
	}
	if !strings.Contains(host, ".") {
		spaces := map[string]bool{}
		for n := range set.Imports.All() {
			if n.Name == host {
				spaces[n.Namespace] = true
			}
		}
		for n := range set.Local.Services.All() {
			if n.Name == host {
				spaces[n.Namespace] = true
			}
		}
		switch {
		case spaces[e.viewer.Namespace] || len(spaces) == 0:
			host += "." + e.viewer.Namespace
		case len(spaces) == 1:
			host += "." + sorted(spaces)[0]
		default:
			return admin.Invalid("name it as service.namespace", "%q is a service of several namespaces: %s", host, strings.Join(sorted(spaces), ", "))
		}
	}
	name, number, local, ok := discovery.ParseAuthority(host + port)
	if !ok {
		return admin.Invalid("name it as service.namespace or service.namespace:port", "%q is not the name of a service", e.in.Request.To)
	}
	e.out.To = name.Authority(number)
	var ports []discovery.Port
	imp, svc := set.Imports.Get(name), set.Local.Services.Get(name)
	var from []string
	switch {
	case imp != nil && !local:
		ports = imp.Ports
		for _, f := range imp.From {
			from = append(from, f.Member)
		}
		e.out.Name = fmt.Sprintf("%s → exported by %s", name.Host(), strings.Join(from, ", "))
		for _, c := range imp.Conflicts {
			e.out.Name += fmt.Sprintf("; %s at %s: %s", c.Reason, c.Member, c.Message)
		}
		if svc != nil && !slices.Contains(from, set.Local.Self.Cluster) {
			e.out.Name += fmt.Sprintf("; %s has a service of that name that is not exported", set.Local.Self.Cluster)
		}
	case svc != nil:
		ports = svc.Ports
		e.out.Name = fmt.Sprintf("%s → this cluster's own service, not exported", name.Host())
		if local {
			e.out.Name = fmt.Sprintf("%s → this cluster's own endpoints only (svc.cluster.local)", name)
		}
	default:
		e.out.Name = name.Host() + " → unknown"
		e.fail(fmt.Sprintf("check the name: hanse services. If it is right: in the cluster that has it, hanse apply -f a ServiceExport %s", name),
			"no cluster exports %s, and %s has no service of that name.", name, set.Local.Self.Cluster)
		return nil
	}
	if number == 0 && len(ports) > 0 {
		number = ports[0].Number
		for _, p := range ports {
			if p.Protocol.IsHTTP() {
				number = p.Number
				break
			}
		}
	}
	e.service = &name
	e.out.To = name.Authority(number)
	if local {
		e.out.To = strings.Replace(e.out.To, discovery.ClustersetDomain, discovery.ClusterDomain, 1)
	}
	for _, p := range ports {
		if p.Number == number {
			e.port = p
			return nil
		}
	}
	e.fail("hanse services shows its ports", "%s has no port %d.", name, number)
	e.service = nil
	return nil
}

// route says which rule takes the request, and returns the authority that most of it goes to.
func (e *explainer) route() string {
	routing, err := e.in.View.Routes(e.viewer, e.out.To)
	if err != nil {
		e.fail("hanse services", "%v.", err)
		return ""
	}
	path, query, _ := strings.Cut(cmp.Or(e.in.Request.Path, "/"), "?")
	values, err := url.ParseQuery(query)
	if err != nil {
		values = nil
	}
	req := &xdsgen.Request{Method: cmp.Or(e.in.Request.Method, "GET"), Path: path, Query: values, Headers: headers(e.in.Request.Headers)}
	e.rule = routing.Match(req)
	switch {
	case e.rule == nil && !e.port.Protocol.IsHTTP():
		e.out.Route = "TLSRoutes by server name, and no TCPRoute"
		e.fail("hanse get tlsroutes", "TLSRoutes are attached to %s and no TCPRoute: a connection that names none of their hosts is refused.", e.service)
		return ""
	case e.rule == nil:
		e.out.Route = fmt.Sprintf("no rule matches %s %s", req.Method, path)
		e.fail("hanse get httproutes", "routes are attached to %s and none matches %s %s: the caller's sidecar answers 404.", e.service, req.Method, path)
		return ""
	case !routing.Attached && !e.port.Protocol.IsHTTP():
		e.out.Route = "TCP: no route attached"
	case !routing.Attached:
		e.out.Route = "no route attached: every request goes to the service itself"
	default:
		e.out.Route = ruleText(e.rule)
	}
	if r := e.rule.Filters.Redirect; r != nil {
		e.out.Route += fmt.Sprintf("; answered with a redirect (%d)", r.Status)
		return ""
	}
	best := ""
	var weight uint32
	for _, t := range e.rule.Targets {
		if t.Invalid != "" {
			e.fail("correct the backendRef", "%s sends a share of the requests to a backend that does not resolve: %s.", e.rule.Name, t.Invalid)
		} else if t.Weight > weight {
			best, weight = t.Authority, t.Weight
		}
	}
	if best == "" {
		e.fail("give the rule a backendRef that resolves", "%s has no valid backend: the caller's sidecar answers 500.", e.rule.Name)
	}
	return best
}

func ruleText(r *xdsgen.Rule) string {
	var to []string
	var sum uint32
	for _, t := range r.Targets {
		sum += t.Weight
	}
	for _, t := range r.Targets {
		where := cmp.Or(t.Authority, "nowhere: "+t.Invalid)
		if len(r.Targets) == 1 || sum == 0 {
			to = append(to, where)
		} else {
			to = append(to, fmt.Sprintf("%.0f%% %s", 100*float64(t.Weight)/float64(sum), where))
		}
	}
	s := r.Name
	if len(to) > 0 {
		s += ": " + strings.Join(to, ", ")
	}
	if r.Request > 0 {
		s += fmt.Sprintf("; timeout %s", r.Request)
	}
	if r.Retry != nil && r.Retry.Attempts > 0 {
		s += fmt.Sprintf("; %d retries", r.Retry.Attempts)
	}
	return s
}

// levels lists the endpoints as the caller's sidecar has them, and what share each level takes.
func (e *explainer) levels(target string) {
	ranked, err := e.in.View.Levels(e.viewer, target)
	if err != nil {
		e.fail("hanse services", "%v.", err)
		return
	}
	e.ranked = ranked
	left, sum := 1.0, 0.0
	var counts []float64
	for _, l := range ranked.Levels {
		healthy := 0
		for _, r := range l.Endpoints {
			if e.healthy(target, r) {
				healthy++
			}
		}
		h := 0.0
		if len(l.Endpoints) > 0 {
			h = min(1, overprovisioning*float64(healthy)/float64(len(l.Endpoints)))
		}
		counts = append(counts, h)
		sum += h
	}
	for i, l := range ranked.Levels {
		share := 0.0
		if sum > 0 {
			share = min(left, counts[i])
			if sum < 1 {
				share = counts[i] / sum
			}
			left -= share
		}
		e.level(target, i, l, share)
	}
	for _, o := range ranked.Omitted {
		e.out.Levels = append(e.out.Levels, admin.ExplainLevel{Level: -1, Cluster: o.Cluster, Note: "not used: " + o.Reason})
	}
	healthy := 0
	for _, l := range e.out.Levels {
		healthy += l.Healthy
	}
	switch {
	case len(ranked.Levels) == 0 && len(ranked.Omitted) > 0:
		o := ranked.Omitted[0]
		e.fail(remedyFor(o.Reason), "%s has no endpoint that %s can use: cluster %s: %s.", e.service, e.viewer.Cluster, o.Cluster, o.Reason)
	case len(ranked.Levels) == 0:
		e.fail("hanse endpoints "+e.service.String(), "%s has no endpoint.", e.service)
	case healthy == 0:
		e.fail("hanse endpoints "+e.service.String(), "none of the endpoints of %s is healthy.", e.service)
	}
}

func remedyFor(reason string) string {
	switch {
	case strings.Contains(reason, "is not trusted"):
		return "hanse trust list; hanse trust add TRUST-DOMAIN"
	case strings.Contains(reason, "may not serve"):
		return "hanse trust show TRUST-DOMAIN; hanse get clusterfederatedtrustdomains; hanse get peers"
	case strings.Contains(reason, "no gateway"):
		return "give that cluster a gateway (gateways: in hansed's configuration), or declare both clusters one network"
	case strings.Contains(reason, "withdrawn"):
		return "hanse clusters: neither its control plane nor its gateways answer"
	}
	return "hanse endpoints shows all of them"
}

// level splits one level by place, as people think of it.
func (e *explainer) level(target string, number int, l xdsgen.Level, share float64) {
	var rows []*admin.ExplainLevel
	total := 0
	for _, r := range l.Endpoints {
		i := slices.IndexFunc(rows, func(x *admin.ExplainLevel) bool {
			return x.Cluster == r.Locality.Cluster && x.Region == r.Locality.Region && x.Zone == r.Locality.Zone
		})
		if i < 0 {
			rows = append(rows, &admin.ExplainLevel{Level: number, Cluster: r.Locality.Cluster, Region: r.Locality.Region, Zone: r.Locality.Zone, Note: e.note(r)})
			i = len(rows) - 1
		}
		h := e.in.Health(e.viewer.ID, target, r.ID)
		ep := admin.ExplainEndpoint{ID: r.ID, Address: r.Address.String(), Health: cmp.Or(h.State, "unknown"), Reason: cmp.Or(h.Reason, r.Reason)}
		switch {
		case !r.Ready:
			ep.Health, ep.Reason = "not ready", "its cluster says that it is not ready"
		case r.Draining:
			ep.Health, ep.Reason = "draining", "it is terminating; only a last resort"
		}
		rows[i].Endpoints = append(rows[i].Endpoints, ep)
		rows[i].Total++
		if e.healthy(target, r) {
			rows[i].Healthy++
		}
		total++
	}
	healthy := 0
	for _, row := range rows {
		healthy += row.Healthy
	}
	for _, row := range rows {
		if healthy > 0 {
			row.Share = share * float64(row.Healthy) / float64(healthy)
		}
		e.out.Levels = append(e.out.Levels, *row)
	}
}

func (e *explainer) healthy(target string, r xdsgen.Ranked) bool {
	s := e.in.Health(e.viewer.ID, target, r.ID).State
	return r.Ready && !r.Draining && (s == "" || s == "healthy")
}

func (e *explainer) note(r xdsgen.Ranked) string {
	var parts []string
	if len(r.Gateways) > 0 {
		var gws []string
		for _, g := range r.Gateways {
			s := g.String()
			if state := e.in.Gateway(s); state != "" {
				s += " (" + state + ")"
			}
			gws = append(gws, s)
		}
		parts = append(parts, fmt.Sprintf("through %s's gateways %s", r.Locality.Cluster, strings.Join(gws, ", ")))
	}
	if m := e.in.View.Set.Members[r.Locality.Cluster]; r.Suspect && m != nil {
		parts = append(parts, fmt.Sprintf("suspect for %s, demoted below fresh", e.in.Now.Sub(m.Since).Round(time.Second)))
	}
	return strings.Join(parts, "; ")
}

// trust says who must be whom.
func (e *explainer) trust() {
	e.out.Trust = append(e.out.Trust, "caller is "+e.viewer.SPIFFEID)
	ids := map[string]bool{}
	domains := map[string]bool{}
	for _, l := range levelsOf(e.ranked) {
		for _, r := range l.Endpoints {
			if r.SPIFFEID != "" {
				ids[r.SPIFFEID] = true
				td, _, _ := strings.Cut(strings.TrimPrefix(r.SPIFFEID, "spiffe://"), "/")
				domains[td] = true
			}
		}
	}
	for _, id := range sorted(ids) {
		e.out.Trust = append(e.out.Trust, "server must be "+id)
	}
	for _, td := range sorted(domains) {
		seq, ok := e.in.View.Set.Trusted[td]
		if !ok && len(e.in.View.Set.Trusted) > 0 {
			e.fail("hanse trust add "+td, "this cluster does not trust %s.", td)
			continue
		}
		e.out.Trust = append(e.out.Trust, fmt.Sprintf("bundle of %s has sequence %d here", td, seq))
	}
}

// policy says what is known of the server's decision: all of it for this cluster's endpoints, nothing for another's.
func (e *explainer) policy() {
	set := e.in.View.Set
	id, err := spiffeid.FromString(e.viewer.SPIFFEID)
	if err != nil {
		return
	}
	name, number, _, ok := discovery.ParseAuthority(authorityOf(e.ranked, e.out.To))
	if !ok {
		return
	}
	others := map[string]bool{}
	own := false
	for _, l := range levelsOf(e.ranked) {
		for _, r := range l.Endpoints {
			if r.Locality.Cluster == set.Local.Self.Cluster {
				own = true
			} else {
				others[r.Locality.Cluster] = true
			}
		}
	}
	if own {
		meta := e.in.View.Access(name, number)
		text, allowed := decide(meta, id, cmp.Or(e.in.Request.Method, "GET"), e.in.Request.Path, e.port.Protocol.IsHTTP())
		e.out.Policy = append(e.out.Policy, fmt.Sprintf("%s: %s", set.Local.Self.Cluster, text))
		if !allowed {
			e.fail(fmt.Sprintf("add a rule that names %s to an AccessPolicy of %s", e.viewer.SPIFFEID, name), "%s refuses this caller: %s.", set.Local.Self.Cluster, text)
		}
	}
	for _, c := range sorted(others) {
		e.out.Policy = append(e.out.Policy, fmt.Sprintf("%s: its own AccessPolicy decides; it must name %s (ask there: hanse --context %s get accesspolicies)", c, e.viewer.SPIFFEID, c))
	}
}

// decide reads the rules as a sidecar does: deny first, then allow, then the default of the own trust domain.
func decide(meta *xdspb.InboundMeta, caller spiffeid.ID, method, path string, http bool) (string, bool) {
	if meta == nil {
		return "the port is not served here", false
	}
	foreign := caller.TrustDomain().Name() != meta.TrustDomain
	matches := func(r *xdspb.AccessRule) bool {
		if foreign && !r.Foreign {
			return false
		}
		from := len(r.From) == 0 && !foreign
		for _, p := range r.From {
			from = from || identity.MatchPattern(p, caller)
		}
		if !from {
			return false
		}
		if len(r.Methods) > 0 && (!http || !slices.Contains(r.Methods, method)) {
			return false
		}
		if len(r.Paths) == 0 {
			return true
		}
		p, _, _ := strings.Cut(cmp.Or(path, "/"), "?")
		return http && slices.ContainsFunc(r.Paths, func(want string) bool {
			prefix, wild := strings.CutSuffix(want, "*")
			return p == want || wild && strings.HasPrefix(p, prefix)
		})
	}
	for _, r := range meta.Deny {
		if matches(r) {
			return r.Policy + " denies it", false
		}
	}
	for _, r := range meta.Allow {
		if matches(r) {
			return r.Policy + " allows it", true
		}
	}
	switch {
	case meta.DefaultAllow && !foreign:
		return "no AccessPolicy selects the service; callers of the own trust domain are allowed", true
	case foreign:
		return "no AccessPolicy allows this caller of another trust domain", false
	}
	return "an AccessPolicy selects the service and none of its rules allows this caller", false
}

func (e *explainer) config() {
	if e.caller.Config != "" {
		e.out.Config = append(e.out.Config, "caller's sidecar has "+e.caller.Config)
	}
	if e.caller.Problem != "" {
		e.out.Config = append(e.out.Config, e.caller.Problem)
	}
}

func (e *explainer) success() string {
	for _, l := range e.out.Levels {
		if l.Share > 0 {
			where := l.Cluster
			if l.Zone != "" {
				where += ", zone " + l.Zone
			}
			return fmt.Sprintf("OK: a call from %s to %s goes to %s, %d of %d endpoints healthy.", strings.TrimPrefix(e.viewer.SPIFFEID, "spiffe://"), e.out.To, where, l.Healthy, l.Total)
		}
	}
	return fmt.Sprintf("OK: a call from %s to %s is answered by the caller's sidecar: %s.", strings.TrimPrefix(e.viewer.SPIFFEID, "spiffe://"), e.out.To, e.out.Route)
}

func split(workload string) (namespace, name string) {
	if ns, n, ok := strings.Cut(workload, "/"); ok {
		return ns, n
	}
	if n, ns, ok := strings.Cut(workload, "."); ok {
		return ns, n
	}
	return "", workload
}

func headers(in map[string]string) map[string][]string {
	out := make(map[string][]string, len(in))
	for k, v := range in {
		out[strings.ToLower(k)] = append(out[strings.ToLower(k)], v)
	}
	return out
}

func sorted(set map[string]bool) []string {
	out := make([]string, 0, len(set))
	for s := range set {
		out = append(out, s)
	}
	slices.Sort(out)
	return out
}

func levelsOf(l *xdsgen.Levels) []xdsgen.Level {
	if l == nil {
		return nil
	}
	return l.Levels
}

func authorityOf(l *xdsgen.Levels, otherwise string) string {
	if l == nil {
		return otherwise
	}
	return l.Authority
}
