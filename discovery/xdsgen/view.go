package xdsgen

import (
	"maps"
	"net/netip"
	"reflect"
	"slices"

	"github.com/hanse-mesh/hanse/discovery"
)

// Kind is what a viewer is able to read.
type Kind string

// Kinds.
const (
	Sidecar Kind = "sidecar"
	Gateway Kind = "gateway"
	GRPC    Kind = "grpc" // a gRPC library: the subset of gRFC A27 and after
)

// Viewer is who looks at the mesh: everything that a resource may depend on beside the View. Identity is verified by the
// server, the locality and network are what the viewer claims.
type Viewer struct {
	ID          string       `json:"id"` // unique; chooses the subset of endpoints
	Cluster     string       `json:"cluster"`
	Namespace   string       `json:"namespace"` // of its SPIFFE ID
	Region      string       `json:"region,omitempty"`
	Zone        string       `json:"zone,omitempty"`
	Network     string       `json:"network,omitempty"`
	Kind        Kind         `json:"kind"`
	SPIFFEID    string       `json:"spiffeID"`
	WorkloadIPs []netip.Addr `json:"workloadIPs,omitempty"`
}

// Callers counts the proxies that call a service, by where they are. A service that is missing here has unknown callers.
type Callers map[discovery.Name]map[discovery.Locality]int

// View is a Clusterset with the indexes that resources are made from.
type View struct {
	Set     *discovery.Clusterset
	Callers Callers // may be nil

	routes  map[discovery.Name][]*discovery.Route // by parent
	parents map[discovery.Name][]discovery.Name   // parents of the routes that name this service as a backend
	hosts   hosts                                 // own services by address of an endpoint or their own
}

// NewView indexes a Clusterset.
func NewView(set *discovery.Clusterset, callers Callers) *View {
	v, _ := (&View{Set: &discovery.Clusterset{Local: &discovery.Snapshot{}}}).Next(set, callers)
	return v
}

// Changes says what a View may show differently from the one before. It may name more than what changed, never less.
type Changes struct {
	All      bool                        // members, trust or this cluster itself
	Access   bool                        // access policies
	Services map[discovery.Name]struct{} // whose ports, endpoints, routes or policy changed, or whose routes lead to such
	Hosts    map[netip.Addr]struct{}     // whose own endpoints, or the service with that ClusterIP, changed
}

// Next returns the View of set, and how it differs from v. Services, imports and callers are taken as
// unchanged exactly if they are the same pointer; the fewer routes and policies are compared.
func (v *View) Next(set *discovery.Clusterset, callers Callers) (*View, *Changes) {
	old := v.Set
	ch := &Changes{
		All: !reflect.DeepEqual(old.Local.Self, set.Local.Self) || !sameMembers(old.Members, set.Members) || !sameKeys(old.Trusted, set.Trusted) ||
			!reflect.DeepEqual(allows(old.Local), allows(set.Local)),
		Access:   !slices.EqualFunc(old.Local.Access, set.Local.Access, same),
		Services: make(map[discovery.Name]struct{}),
		Hosts:    make(map[netip.Addr]struct{}),
	}
	mark := func(n discovery.Name) { ch.Services[n] = struct{}{} }
	var moved []discovery.Name // own services whose endpoints may have changed
	discovery.Diff(old.Local.Services, set.Local.Services, func(n discovery.Name, _, _ *discovery.Service) { mark(n); moved = append(moved, n) })
	imports := make(map[discovery.Name]struct{})
	discovery.Diff(old.Imports, set.Imports, func(n discovery.Name, _, _ *discovery.Import) { mark(n); imports[n] = struct{}{} })
	diff(old.Local.TrafficPolicy, set.Local.TrafficPolicy, func(n discovery.Name) {
		if !same(old.Local.TrafficPolicy[n], set.Local.TrafficPolicy[n]) {
			mark(n)
		}
	})
	if reflect.ValueOf(callers).Pointer() != reflect.ValueOf(v.Callers).Pointer() {
		for n := range callers {
			if !maps.Equal(callers[n], v.Callers[n]) {
				mark(n)
			}
		}
		for n := range v.Callers {
			if callers[n] == nil {
				mark(n)
			}
		}
	}
	next := &View{Set: set, Callers: callers, routes: v.routes, parents: v.parents, hosts: v.hosts}
	if !slices.EqualFunc(old.Local.Routes, set.Local.Routes, same) || next.routes == nil {
		next.indexRoutes()
		diffRoutes(old.Local.Routes, set.Local.Routes, mark)
	}
	for n := range maps.Clone(ch.Services) {
		for _, p := range next.parents[n] {
			mark(p)
		}
	}
	touch := func(a netip.Addr) { ch.Hosts[a] = struct{}{} }
	if ch.All { // what else changed need not be known, nor kept: at first it is everything
		ch.Services, ch.Hosts = nil, nil
		touch = func(netip.Addr) {}
	}
	next.indexHosts(old.Local.Services, moved, touch)
	next.standIns(imports, old.Local.ClustersetIPs, touch)
	return next, ch
}

// allows returns the rules of each foreign trust domain that has any.
func allows(s *discovery.Snapshot) map[string][]discovery.Allow {
	rules := map[string][]discovery.Allow{}
	for _, t := range s.TrustDomains {
		if len(t.Allow) > 0 {
			rules[t.TrustDomain] = t.Allow
		}
	}
	return rules
}

// diff calls changed for every key whose value differs.
func diff[K comparable, V comparable](old, next map[K]V, changed func(K)) {
	for k, n := range next {
		if o, ok := old[k]; !ok || o != n {
			changed(k)
		}
	}
	for k := range old {
		if _, ok := next[k]; !ok {
			changed(k)
		}
	}
}

// same reports whether two objects are equal.
func same[T any](a, b *T) bool { return a == b || reflect.DeepEqual(a, b) }

// diffRoutes calls changed for the parents of the routes that are in one list only.
func diffRoutes(old, next []*discovery.Route, changed func(discovery.Name)) {
	type id struct {
		kind string
		discovery.Name
	}
	was := make(map[id]*discovery.Route, len(old))
	for _, r := range old {
		was[id{r.Kind, r.Name}] = r
	}
	parents := func(r *discovery.Route) {
		for _, p := range r.Parents {
			changed(p.Service)
		}
	}
	for _, r := range next {
		k := id{r.Kind, r.Name}
		o := was[k]
		delete(was, k)
		if o == nil || !same(o, r) {
			parents(r)
			if o != nil {
				parents(o)
			}
		}
	}
	for _, r := range was {
		parents(r)
	}
}

// sameMembers ignores since when a state lasts, and addresses that only control planes use.
func sameMembers(a, b map[string]*discovery.Member) bool {
	return maps.EqualFunc(a, b, func(x, y *discovery.Member) bool {
		return x == y || x.State == y.State && x.Network == y.Network && x.Region == y.Region &&
			x.TrustDomain == y.TrustDomain && slices.Equal(x.Gateways, y.Gateways)
	})
}

func sameKeys(a, b map[string]uint64) bool {
	return maps.EqualFunc(a, b, func(uint64, uint64) bool { return true })
}

func (v *View) indexRoutes() {
	v.routes = make(map[discovery.Name][]*discovery.Route)
	v.parents = make(map[discovery.Name][]discovery.Name)
	for _, r := range v.Set.Local.Routes {
		for _, p := range r.Parents {
			if !slices.Contains(v.routes[p.Service], r) {
				v.routes[p.Service] = append(v.routes[p.Service], r)
			}
			for _, rule := range r.Rules {
				for _, b := range rule.Backends {
					if !slices.Contains(v.parents[b.Service], p.Service) {
						v.parents[b.Service] = append(v.parents[b.Service], p.Service)
					}
				}
			}
		}
	}
}
