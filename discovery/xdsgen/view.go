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

// hosts lists, sorted, the own services with an endpoint at an address, or with that ClusterIP. It is split, so that the next View copies little of it.
type hosts [512]map[netip.Addr]*[]discovery.Name // all addresses of a service that are nobody else's share one list

func shard(a netip.Addr) int {
	b := a.As16()
	return int(b[15])<<1&511 ^ int(b[14])&1
}

// at returns the services of an address.
func (h *hosts) at(a netip.Addr) []discovery.Name {
	if names := h[shard(a)][a]; names != nil {
		return *names
	}
	return nil
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
	diff(old.Local.Services, set.Local.Services, func(n discovery.Name) { mark(n); moved = append(moved, n) })
	imports := make(map[discovery.Name]struct{})
	diff(old.Imports, set.Imports, func(n discovery.Name) { mark(n); imports[n] = struct{}{} })
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
	next.indexHosts(old.Local.Services, moved, ch.Hosts)
	next.standIns(imports, old.Local.ClustersetIPs, ch.Hosts)
	if ch.All { // what else changed need not be known, nor kept: at first it is everything
		ch.Services, ch.Hosts = nil, nil
	}
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

// indexHosts brings hosts up to date for the services that moved, and notes the addresses concerned.
func (v *View) indexHosts(old map[discovery.Name]*discovery.Service, moved []discovery.Name, touched map[netip.Addr]struct{}) {
	var own [len(v.hosts)]bool // shards that are copies already
	edit := func(a netip.Addr) map[netip.Addr]*[]discovery.Name {
		i := shard(a)
		if !own[i] {
			m := make(map[netip.Addr]*[]discovery.Name, len(v.hosts[i])+1)
			maps.Copy(m, v.hosts[i])
			v.hosts[i], own[i] = m, true
		}
		return v.hosts[i]
	}
	for _, n := range moved {
		alone := &[]discovery.Name{n}
		before, after := addresses(old[n]), addresses(v.Set.Local.Services[n])
		for a := range before {
			touched[a] = struct{}{}
			if _, stays := after[a]; stays {
				continue
			}
			m := edit(a)
			var rest []discovery.Name
			if names := m[a]; names != nil {
				rest = slices.DeleteFunc(slices.Clone(*names), func(o discovery.Name) bool { return o == n })
			}
			if len(rest) > 0 {
				m[a] = &rest
			} else {
				delete(m, a)
			}
		}
		for a := range after {
			touched[a] = struct{}{}
			if _, was := before[a]; was {
				continue
			}
			m := edit(a)
			if m[a] == nil {
				m[a] = alone
			} else if i, found := slices.BinarySearchFunc(*m[a], n, discovery.Name.Compare); !found {
				all := slices.Insert(slices.Clone(*m[a]), i, n)
				m[a] = &all
			}
		}
	}
}

func addresses(s *discovery.Service) map[netip.Addr]struct{} {
	if s == nil {
		return nil
	}
	out := make(map[netip.Addr]struct{}, len(s.Endpoints)+len(s.ClusterIPs))
	for _, a := range s.ClusterIPs {
		out[a] = struct{}{}
	}
	for _, e := range s.Endpoints {
		out[e.Address] = struct{}{}
	}
	return out
}
