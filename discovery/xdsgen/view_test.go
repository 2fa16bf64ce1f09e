package xdsgen

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/hanse-mesh/hanse/discovery"
)

var seeds = flag.Int("seeds", 3, "random walks of TestChangesMissNothing")

// world is a small clusterset that changes at random: new objects for what changes, the same pointers for what does not.
type world struct {
	*rand.Rand
	set *discovery.Clusterset
}

func newWorld(seed uint64) *world {
	w := &world{Rand: rand.New(rand.NewPCG(seed, 1))}
	w.set = &discovery.Clusterset{
		Local: &discovery.Snapshot{
			Self:          discovery.Self{Cluster: "west", TrustDomain: "west.demo", Network: "west", Region: "eu-1"},
			TrafficPolicy: map[discovery.Name]*discovery.TrafficPolicy{},
		},
		Members: map[string]*discovery.Member{"east": {Name: "east", Network: "east", Region: "eu-1", State: discovery.Fresh, Gateways: []netip.AddrPort{netip.MustParseAddrPort("127.0.2.9:15443")}}},
		Trusted: map[string]uint64{"west.demo": 1, "east.demo": 1},
	}
	return w
}

var worldNames = []discovery.Name{{Namespace: "shop", Name: "a"}, {Namespace: "shop", Name: "b"}, {Namespace: "lab", Name: "c"}}

func pick[T any](w *world, of ...T) T { return of[w.IntN(len(of))] }

func (w *world) endpoints(cluster string) []*discovery.Endpoint {
	var out []*discovery.Endpoint
	for i := range w.IntN(4) {
		out = append(out, &discovery.Endpoint{
			ID:      fmt.Sprintf("%s-%d", cluster, i),
			Address: netip.AddrFrom4([4]byte{10, 0, 0, byte(w.IntN(3))}),
			Profile: &discovery.Profile{Ports: map[string]uint16{"p": uint16(8000 + w.IntN(2))}, Transport: pick(w, discovery.Hop, discovery.TLS), SPIFFEID: "spiffe://" + cluster + ".demo/ns/shop/sa/" + pick(w, "x", "y"), Network: pick(w, "west", cluster), Locality: discovery.Locality{Cluster: cluster, Region: "eu-1", Zone: pick(w, "a", "b")}},
			Ready:   w.IntN(4) > 0,
		})
	}
	return out
}

var worldPort = []discovery.Port{{Name: "p", Number: 80, Protocol: discovery.HTTP}}

// step returns the next clusterset.
func (w *world) step() *discovery.Clusterset {
	old := w.set
	local := *old.Local
	next := &discovery.Clusterset{Local: &local, Imports: old.Imports, Members: cloned(old.Members), Trusted: old.Trusted}
	local.TrafficPolicy = cloned(local.TrafficPolicy)
	n := pick(w, worldNames...)
	switch w.IntN(9) {
	case 8:
		local.TrustDomains = []*discovery.FederatedTrustDomain{{TrustDomain: "east.demo", Allow: pick(w, nil, []discovery.Allow{
			{Services: []string{pick(w, "shop/*", "*/a")}, SPIFFEIDs: []string{"spiffe://east.demo/ns/shop/sa/" + pick(w, "x", "*")}},
		})}}
	case 7:
		local.ClustersetIPs = cloned(local.ClustersetIPs)
		if a := netip.AddrFrom4([4]byte{10, 0, 0, byte(4 + w.IntN(2))}); w.IntN(3) == 0 {
			delete(local.ClustersetIPs, a)
		} else {
			local.ClustersetIPs[a] = n
		}
	case 0, 1:
		if w.IntN(3) == 0 {
			local.Services = local.Services.Delete(n)
			break
		}
		s := &discovery.Service{Name: n, Ports: worldPort, Endpoints: w.endpoints("west"), Traits: discovery.Traits{Headless: w.IntN(3) == 0}}
		if !s.Headless {
			s.ClusterIPs = []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, byte(2 + w.IntN(3))})}
			s.Annotations = map[string]string{ClustersetAnnotation: pick(w, "true", "")}
		}
		if w.IntN(2) == 0 {
			s.Export = &discovery.Export{}
		}
		local.Services = local.Services.Put(n, s)
	case 2:
		if w.IntN(3) == 0 {
			next.Imports = next.Imports.Delete(n)
			break
		}
		i := &discovery.Import{Name: n, Ports: worldPort, Traits: discovery.Traits{Headless: w.IntN(3) == 0}, From: []discovery.ImportedFrom{{Member: "east", Ports: worldPort, Endpoints: w.endpoints("east")}}}
		if s := local.Services.Get(n); s != nil && s.Export != nil {
			i.From = append(i.From, discovery.ImportedFrom{Member: "west", Ports: worldPort, Endpoints: s.Endpoints})
		}
		next.Imports = next.Imports.Put(n, i)
	case 3:
		local.Routes = nil
		for i := range w.IntN(3) {
			local.Routes = append(local.Routes, &discovery.Route{Name: discovery.Name{Namespace: pick(w, "shop", "lab"), Name: fmt.Sprint("r", i)}, Kind: "HTTPRoute",
				Parents: []discovery.RouteRef{{Service: pick(w, worldNames...)}},
				Rules:   []*discovery.RouteRule{{Backends: []discovery.Backend{{Service: pick(w, worldNames...), Port: 80, Weight: 1}}, Filters: w.filters()}}})
		}
	case 4:
		local.TrafficPolicy[n] = &discovery.TrafficPolicy{Service: n, Mode: pick(w, discovery.ModeFailover, discovery.ModeBalance)}
	case 5:
		local.Access = []*discovery.AccessPolicy{{Name: n, Services: []discovery.Name{n}, Deny: w.IntN(2) == 0,
			Rules: []discovery.AccessRule{{From: []string{"spiffe://west.demo/**"}}}}}
	case 6:
		m := *next.Members["east"]
		m.State = pick(w, discovery.Fresh, discovery.Suspect, discovery.Withdrawn)
		next.Members["east"] = &m
	}
	w.set = next
	return next
}

func (w *world) filters() discovery.Filters {
	if w.IntN(3) > 0 {
		return discovery.Filters{}
	}
	return discovery.Filters{Mirror: &discovery.Backend{Service: pick(w, worldNames...), Port: 80}}
}

func cloned[K comparable, V any](m map[K]V) map[K]V {
	out := make(map[K]V, len(m))
	for k, v := range m {
		out[k] = v
	}
	return out
}

// TestChangesMissNothing walks through random states: what Changes do not touch is byte-identical, and a View that grew step by
// step equals one made at once.
func TestChangesMissNothing(t *testing.T) {
	var viewers []*Viewer
	for _, kind := range []Kind{Sidecar, GRPC} {
		for ns, account := range map[string]string{"shop": "x", "lab": "y"} {
			viewers = append(viewers, &Viewer{ID: "v", Cluster: "west", Namespace: ns, Region: "eu-1", Zone: "a", Network: "west", Kind: kind, SPIFFEID: "spiffe://west.demo/ns/shop/sa/" + account})
		}
	}
	type query struct{ typeURL, name string }
	var queries []query
	for _, n := range worldNames {
		for _, u := range []string{ListenerType, ClusterType, EndpointType} {
			queries = append(queries, query{u, n.Authority(80)}, query{u, authorityOf(n, 80, true)})
		}
		queries = append(queries, query{ServiceType, n.Host()}, query{ServiceType, hostOf(n, true)})
	}
	for i := range 3 {
		queries = append(queries, query{ListenerType, fmt.Sprintf("%s10.0.0.%d", InboundPrefix, i)}, query{ListenerType, fmt.Sprintf("%s10.0.0.%d:8000", GRPCServerPrefix, i)})
	}
	for i := range 6 {
		queries = append(queries, query{ServiceType, fmt.Sprintf("%s10.0.0.%d", AddressPrefix, i)})
	}
	queries = append(queries, query{ListenerType, GRPCServerPrefix + "[::]:8001"})
	version := func(v *View, viewer *Viewer, q query) string {
		r, err := v.Resource(viewer, q.typeURL, q.name)
		if err != nil {
			t.Fatal(err)
		}
		if r == nil {
			return ""
		}
		return r.Version
	}
	for seed := range uint64(*seeds) {
		w := newWorld(seed)
		view := NewView(w.set, nil)
		for step := range 25 {
			next, ch := view.Next(w.step(), nil)
			fresh := NewView(w.set, nil)
			for _, viewer := range viewers {
				for _, q := range queries {
					got := version(next, viewer, q)
					if want := version(fresh, viewer, q); got != want {
						t.Fatalf("seed %d step %d: %s for %+v differs from a new view's", seed, step, q.name, viewer)
					}
					service, host := Subject(q.name)
					if !ch.Touches(service, host) && got != version(view, viewer, q) {
						t.Fatalf("seed %d step %d: %s %s changed, and the changes do not say so: %+v", seed, step, q.typeURL, q.name, ch)
					}
				}
			}
			for _, n := range worldNames {
				if ch.Touches(n, netip.Addr{}) {
					continue
				}
				old, err1 := view.GatewayResources(n)
				now, err2 := next.GatewayResources(n)
				if err1 != nil || err2 != nil || !slices.EqualFunc(old, now, func(a, b *Resource) bool { return a.Name == b.Name && a.Version == b.Version }) {
					t.Fatalf("seed %d step %d: gateway table of %s changed unseen", seed, step, n)
				}
			}
			view = next
		}
	}
}

func TestNothingChanges(t *testing.T) {
	w := newWorld(1)
	for range 30 {
		w.step()
	}
	v := NewView(w.set, nil)
	again := *w.set
	if _, ch := v.Next(&again, nil); !ch.Nothing() {
		t.Errorf("equal states differ: %+v", ch)
	}
}

// TestSubset: a sidecar uses 32 endpoints of a level; one that goes is replaced by one other; sidecars choose differently, and
// each endpoint is chosen about equally often.
func TestSubset(t *testing.T) {
	n := discovery.Name{Namespace: "shop", Name: "big"}
	make200 := func(without int) *View {
		s := &discovery.Service{Name: n, Ports: worldPort}
		for i := range 200 {
			if i != without {
				s.Endpoints = append(s.Endpoints, &discovery.Endpoint{
					ID:      fmt.Sprint(i),
					Address: netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}),
					Profile: &discovery.Profile{Ports: map[string]uint16{"p": 1}, Transport: discovery.Hop, SPIFFEID: "spiffe://west.demo/ns/shop/sa/x"},
					Ready:   true,
				})
			}
		}
		w := newWorld(0)
		w.set.Local.Services = w.set.Local.Services.Put(n, s)
		return NewView(w.set, nil)
	}
	chosen := func(v *View, id string) map[string]bool {
		l, err := v.Levels(&Viewer{ID: id, Cluster: "west", Region: "eu-1", Kind: Sidecar}, n.Authority(80))
		if err != nil {
			t.Fatal(err)
		}
		if len(l.Levels) != 1 || len(l.Levels[0].Endpoints) != maxPerLevel || !l.Subset || l.Levels[0].Total < 199 {
			t.Fatalf("levels are %+v", l)
		}
		out := make(map[string]bool)
		for _, e := range l.Levels[0].Endpoints {
			out[e.ID] = true
		}
		return out
	}
	all, count := make200(-1), make(map[string]int)
	const viewers = 200
	for i := range viewers {
		for id := range chosen(all, fmt.Sprint("v", i)) {
			count[id]++
		}
	}
	mean := viewers * maxPerLevel / 200
	for i := range 200 {
		if c := count[fmt.Sprint(i)]; c < mean/3 || c > mean*2 {
			t.Errorf("endpoint %d is used by %d of %d sidecars, on average %d", i, c, viewers, mean)
		}
	}
	before := chosen(all, "v")
	for gone := 0; gone < 200; gone += 10 {
		after := chosen(make200(gone), "v")
		kept := 0
		for id := range after {
			if before[id] {
				kept++
			}
		}
		if want := maxPerLevel - map[bool]int{true: 1}[before[fmt.Sprint(gone)]]; kept != want {
			t.Errorf("without %d: %d of %d kept, want %d", gone, kept, maxPerLevel, want)
		}
	}
	g, err := all.Levels(&Viewer{ID: "v", Cluster: "west", Region: "eu-1", Kind: GRPC}, n.Authority(80))
	if err != nil || len(g.Levels[0].Endpoints) != 200 {
		t.Errorf("gRPC: %v, %v", g, err)
	}
	all.Set.Local.Services.Get(n).Headless = true
	h, err := all.Levels(&Viewer{ID: "v", Cluster: "west", Region: "eu-1", Kind: Sidecar}, n.Authority(80))
	if err != nil || len(h.Levels[0].Endpoints) != 200 {
		t.Errorf("endpoints of a headless service are called one by one, and some are missing: %v, %v", h, err)
	}
}

func TestMatch(t *testing.T) {
	w := newWorld(0)
	n := worldNames[0]
	to := func(s string) []discovery.Backend {
		return []discovery.Backend{{Service: n, Port: 80, Weight: 1, Invalid: s}}
	}
	path := func(ty discovery.MatchType, v string) []discovery.RouteMatch {
		return []discovery.RouteMatch{{Path: &discovery.PathMatch{Type: ty, Value: v}}}
	}
	w.set.Local.Services = w.set.Local.Services.Put(n, &discovery.Service{Name: n, Ports: worldPort})
	w.set.Local.Routes = []*discovery.Route{{Name: discovery.Name{Namespace: "shop", Name: "r"}, Kind: "HTTPRoute", Parents: []discovery.RouteRef{{Service: n}},
		Rules: []*discovery.RouteRule{
			{Name: "prefix", Matches: path(discovery.MatchPrefix, "/a/"), Backends: to("")},
			{Name: "long", Matches: path(discovery.MatchPrefix, "/a/b"), Backends: to("")},
			{Name: "exact", Matches: path(discovery.MatchExact, "/a/b"), Backends: to("")},
			{Name: "regex", Matches: path(discovery.MatchRegex, "/a/b/[0-9]+"), Backends: to("")},
			{Name: "method", Matches: []discovery.RouteMatch{{Path: &discovery.PathMatch{Type: discovery.MatchPrefix, Value: "/a"}, Method: "PUT"}}, Backends: to("")},
			{Name: "header", Matches: []discovery.RouteMatch{{Headers: []discovery.ValueMatch{{Type: discovery.MatchExact, Name: "X-Env", Value: "t"}}}}, Backends: to("")},
			{Name: "query", Matches: []discovery.RouteMatch{{Query: []discovery.ValueMatch{{Type: discovery.MatchRegex, Name: "q", Value: "[0-9]"}}}}, Backends: to("")},
		}}}
	r, err := NewView(w.set, nil).Routes(&Viewer{Namespace: "shop"}, n.Authority(80))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		req  Request
		want string
	}{
		{Request{Method: "GET", Path: "/a/b"}, "exact"},
		{Request{Method: "GET", Path: "/a/b/1"}, "regex"},
		{Request{Method: "GET", Path: "/a/b/x"}, "long"},
		{Request{Method: "GET", Path: "/a/bx"}, "prefix"},
		{Request{Method: "GET", Path: "/a"}, "prefix"},
		{Request{Method: "PUT", Path: "/a"}, "method"},
		{Request{Method: "GET", Path: "/ab"}, ""},
		{Request{Method: "GET", Path: "/", Headers: map[string][]string{"x-env": {"t"}}}, "header"},
		{Request{Method: "GET", Path: "/", Headers: map[string][]string{"x-env": {"t", "u"}}}, ""},
		{Request{Method: "GET", Path: "/", Query: map[string][]string{"q": {"7"}}}, "query"},
		{Request{Method: "GET", Path: "/", Query: map[string][]string{"q": {"77"}}}, ""},
	} {
		got := ""
		if rule := r.Match(&c.req); rule != nil {
			got = rule.Name
		}
		if want := c.want; want != "" && got != "HTTPRoute shop/r rule "+want || want == "" && got != "" {
			t.Errorf("%+v: got %q, want %q", c.req, got, want)
		}
	}
}

func TestAccessDefault(t *testing.T) {
	for _, c := range []struct {
		policies []*discovery.AccessPolicy
		exported bool
		allow    bool
		foreign  bool // of the first allow rule
	}{
		{nil, false, true, false},
		{[]*discovery.AccessPolicy{{Name: discovery.Name{Namespace: "other", Name: "p"}}}, false, true, false},
		{[]*discovery.AccessPolicy{{Name: discovery.Name{Namespace: "shop", Name: "p"}, Audit: true}}, false, true, false},
		{[]*discovery.AccessPolicy{{Name: discovery.Name{Namespace: "shop", Name: "p"}}}, false, false, false},
		{[]*discovery.AccessPolicy{{Name: discovery.Name{Namespace: "shop", Name: "p"}, Deny: true}}, false, false, false},
		{[]*discovery.AccessPolicy{{Name: discovery.Name{Namespace: "shop", Name: "p"}, Services: []discovery.Name{worldNames[1]}}}, false, true, false},
		{[]*discovery.AccessPolicy{{Name: discovery.Name{Namespace: "shop", Name: "p"}, Rules: []discovery.AccessRule{{From: []string{"spiffe://east.demo/**"}}}}}, false, false, false},
		{[]*discovery.AccessPolicy{{Name: discovery.Name{Namespace: "shop", Name: "p"}, Rules: []discovery.AccessRule{{From: []string{"spiffe://east.demo/**"}}}}}, true, false, true},
		{[]*discovery.AccessPolicy{{Name: discovery.Name{Namespace: "shop", Name: "p"}, Rules: []discovery.AccessRule{{}}}}, true, false, false}, // it names nobody
	} {
		w := newWorld(0)
		s := &discovery.Service{Name: worldNames[0], Ports: worldPort}
		if c.exported {
			s.Export = &discovery.Export{}
		}
		w.set.Local.Services, w.set.Local.Access = w.set.Local.Services.Put(s.Name, s), c.policies
		m := NewView(w.set, nil).Access(s.Name, 80)
		if m.DefaultAllow != c.allow || len(m.Allow) > 0 && m.Allow[0].Foreign != c.foreign {
			t.Errorf("%+v exported %v: got %v", c.policies, c.exported, m)
		}
	}
}
