package federation_test

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/federation"
	"github.com/hanse-mesh/hanse/federation/federationpb"
	"github.com/hanse-mesh/hanse/identity"
)

var epoch = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

var equate = cmp.Options{cmpopts.EquateEmpty(), cmp.Transformer("", func(b discovery.ByName[*discovery.Import]) map[discovery.Name]*discovery.Import {
	return maps.Collect(b.All())
}), cmpopts.EquateComparable(netip.Addr{}, netip.AddrPort{})}

func endpoint(td string, n int) *discovery.Endpoint {
	return &discovery.Endpoint{
		ID:      fmt.Sprintf("%032x", n*7919),
		Address: netip.AddrFrom4([4]byte{10, byte(n >> 16), byte(n >> 8), byte(n)}),
		Profile: &discovery.Profile{Ports: map[string]uint16{"http": 8080}, HopPort: 15008, Transport: discovery.Hop, SPIFFEID: "spiffe://" + td + "/ns/shop/sa/payments", Locality: discovery.Locality{Cluster: "west", Region: "eu-1", Zone: "eu-1" + string(rune('a'+n%2))}, Network: "west-net"},
		Ready:   n%5 != 0,
		Weight:  uint32(n % 3),
	}
}

func service(td, name string, endpoints int, audience ...string) *discovery.Service {
	s := &discovery.Service{
		Name:   discovery.Name{Namespace: "shop", Name: name},
		Ports:  []discovery.Port{{Name: "http", Number: 80, Protocol: discovery.HTTP}},
		Export: &discovery.Export{Created: epoch, Audience: audience},
	}
	for i := range endpoints {
		s.Endpoints = append(s.Endpoints, endpoint(td, i+1))
	}
	slices.SortFunc(s.Endpoints, func(a, b *discovery.Endpoint) int { return strings.Compare(a.ID, b.ID) })
	return s
}

func snapshot(td string, services ...*discovery.Service) *discovery.Snapshot {
	s := &discovery.Snapshot{Self: discovery.Self{Cluster: "west", TrustDomain: td}, Complete: true}
	for _, svc := range services {
		s.Services = s.Services.Put(svc.Name, svc)
	}
	return s
}

func policy(td string) federation.Policy {
	return federation.Policy{Member: "west", TrustDomain: spiffeid.RequireTrustDomainFromString(td), Admitted: epoch.Add(-time.Hour), Match: identity.MatchPattern}
}

// values encodes all that e exports.
func values(e *federation.Exports) map[string]map[string][]byte {
	out := map[string]map[string][]byte{}
	for scope := range e.Scopes {
		out[scope] = map[string][]byte{}
		for key, sum := range e.Sums(scope) {
			v, err := e.Value(scope, key)
			if h := sha256.Sum256(v); err != nil || !bytes.Equal(h[:16], sum[:]) {
				panic(fmt.Sprintf("%s of %s: %v, or another sum", key, scope, err))
			}
			out[scope][key] = v
		}
	}
	return out
}

// restored is what a restart makes of e.
func restored(e *federation.Exports) *federation.Exports {
	r := federation.NewExports()
	for scope, keys := range values(e) {
		for k, v := range keys {
			r.Restore(scope, k, v)
		}
	}
	return r
}

func all(e *federation.Exports) []federation.Change {
	var out []federation.Change
	for scope, keys := range values(e) {
		for k, v := range keys {
			out = append(out, federation.Change{Scope: scope, Key: k, Value: v, Revision: 7})
		}
	}
	return out
}

func TestExportsComeBackAsTheyWere(t *testing.T) {
	svc := service("west.demo", "payments", 100)
	svc.Traits = discovery.Traits{
		Headless: true, Affinity: "ClientIP", AffinityTimeout: 60, InternalTrafficPolicy: "Local", TrafficDistribution: "PreferClose",
		IPFamilies: []discovery.IPFamily{discovery.IPv6, discovery.IPv4},
	}
	svc.Export.Labels, svc.Export.Annotations = map[string]string{"example.com/tier": "gold"}, map[string]string{"note": "any text, ü"}
	svc.Endpoints[0].Hostname = "payments-0"
	six, four := netip.MustParseAddr("fd00::7"), netip.MustParseAddr("10.255.0.1")
	svc.Endpoints[1].Second = &six
	svc.Endpoints[2].Address, svc.Endpoints[2].Second = six, &four
	svc.Ports = append(svc.Ports, discovery.Port{Name: "dns", Number: 53, Protocol: discovery.TCP, UDP: true}, discovery.Port{Name: "sig", Number: 53, Protocol: discovery.TCP, SCTP: true})
	e, faults := federation.Encode(snapshot("west.demo", svc), nil, epoch)
	if len(faults) > 0 {
		t.Fatal(faults)
	}
	d := federation.NewDecoder(policy("west.demo"))
	d.Apply(all(e), epoch)
	p := d.Part()
	got := p.Exports.Get(svc.Name)
	want := &federation.Export{
		Traits: svc.Traits, Ports: svc.Ports, Labels: svc.Export.Labels, Annotations: svc.Export.Annotations,
		Exported: epoch, Revision: 7, Endpoints: svc.Endpoints,
	}
	if diff := cmp.Diff(want, got, equate); diff != "" || len(p.Faults) > 0 {
		t.Fatalf("faults %v; -want +got:\n%s", p.Faults, diff)
	}
}

func TestSlotsAreHalfFullAndStable(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	svc := service("west.demo", "payments", 1000)
	e, _ := federation.Encode(snapshot("west.demo", svc), nil, epoch)
	for k, v := range values(e)[federation.AllScope] {
		if strings.HasPrefix(k, "ep/") {
			pb := &federationpb.Slot{}
			if err := proto.Unmarshal(v, pb); err != nil || len(pb.Endpoints) < 32 || len(pb.Endpoints) > 64 {
				t.Fatalf("%s holds %d endpoints (%v), want 32 to 64", k, len(pb.Endpoints), err)
			}
		}
	}
	for round := range 200 {
		next := *svc
		next.Endpoints = slices.Clone(svc.Endpoints)
		at := rnd.IntN(len(next.Endpoints))
		changed := *next.Endpoints[at]
		switch round % 3 {
		case 0:
			changed.Ready = !changed.Ready
			next.Endpoints[at] = &changed
		case 1:
			next.Endpoints = slices.Delete(next.Endpoints, at, at+1)
		case 2:
			next.Endpoints = append(next.Endpoints, endpoint("west.demo", 5000+round))
		}
		prev := e
		if round%10 == 9 { // as after a restart
			prev = restored(e)
		}
		e2, faults := federation.Encode(snapshot("west.demo", &next), prev, epoch.Add(time.Hour))
		if len(faults) > 0 {
			t.Fatal(faults)
		}
		if n := differences(e.Sums(federation.AllScope), e2.Sums(federation.AllScope)); n > 1 {
			t.Fatalf("round %d: one endpoint changed, %d keys did", round, n)
		}
		svc, e = &next, e2
	}
}

func differences(a, b map[string]federation.Sum) int {
	n := 0
	for k := range a {
		if a[k] != b[k] {
			n++
		}
	}
	for k := range b {
		if _, ok := a[k]; !ok {
			n++
		}
	}
	return n
}

func TestEncodeIsDeterministic(t *testing.T) {
	svc := service("west.demo", "payments", 200)
	a, _ := federation.Encode(snapshot("west.demo", svc), nil, epoch)
	for range 20 {
		shuffled := *svc
		shuffled.Endpoints = slices.Clone(svc.Endpoints)
		b, _ := federation.Encode(snapshot("west.demo", &shuffled), nil, epoch)
		if n := differences(a.Sums(federation.AllScope), b.Sums(federation.AllScope)); n != 0 {
			t.Fatalf("%d keys differ", n)
		}
	}
}

func TestExportTimeIsSetOnce(t *testing.T) {
	svc := service("west.demo", "payments", 1)
	svc.Export.Created = time.Time{}
	e, _ := federation.Encode(snapshot("west.demo", svc), nil, epoch)
	again := *svc
	e, _ = federation.Encode(snapshot("west.demo", &again), restored(e), epoch.Add(time.Hour))
	if got := e.Since(svc.Name); !got.Equal(epoch) {
		t.Fatalf("export time is %s, want %s", got, epoch)
	}
}

func TestWhatCannotBeExportedKeepsItsLastGoodState(t *testing.T) {
	good := service("west.demo", "payments", 3)
	other := service("west.demo", "catalog", 3)
	e, _ := federation.Encode(snapshot("west.demo", good, other), nil, epoch)
	for name, spoil := range map[string]func(*discovery.Service){
		"a foreign ID":          func(s *discovery.Service) { s.Endpoints[1].SPIFFEID = "spiffe://east.demo/ns/shop/sa/payments" },
		"a million endpoints":   func(s *discovery.Service) { s.Endpoints = make([]*discovery.Endpoint, 1_000_000); fill(s.Endpoints) },
		"an ID that is not one": func(s *discovery.Service) { s.Endpoints[0].ID = "web-1" },
		"too many ports":        func(s *discovery.Service) { s.Ports = make([]discovery.Port, 1000) },
		"a huge name":           func(s *discovery.Service) { s.Endpoints[0].Hostname = strings.Repeat("a", 1<<20) },
		"a name that is none":   func(s *discovery.Service) { s.Endpoints[0].Hostname = "a.b" },
		"a reserved label":      func(s *discovery.Service) { s.Export.Labels = map[string]string{"hanse.mesh/x": "y"} },
		"a label's value":       func(s *discovery.Service) { s.Export.Labels = map[string]string{"x": "not a value"} },
		"a huge annotation":     func(s *discovery.Service) { s.Export.Annotations = map[string]string{"x": strings.Repeat("a", 1<<20)} },
		"a third IP family":     func(s *discovery.Service) { s.IPFamilies = []discovery.IPFamily{"IPv4", "IPv6", "IPv8"} },
	} {
		bad := service("west.demo", "payments", 3)
		spoil(bad)
		e2, faults := federation.Encode(snapshot("west.demo", bad, other), e, epoch)
		if len(faults) != 1 || faults[0].Key != "svc/shop/payments" {
			t.Errorf("%s: faults are %v", name, faults)
		}
		if n := differences(e.Sums(federation.AllScope), e2.Sums(federation.AllScope)); n != 0 {
			t.Errorf("%s: %d keys changed", name, n)
		}
		t.Log(faults)
	}
}

func fill(eps []*discovery.Endpoint) {
	one := endpoint("west.demo", 1)
	for i := range eps {
		eps[i] = one
	}
}

func TestAudience(t *testing.T) {
	e, _ := federation.Encode(snapshot("west.demo", service("west.demo", "open", 1), service("west.demo", "closed", 1, "east", "south"), service("west.demo", "also", 1, "south", "east")), nil, epoch)
	scope := federation.AudienceScope([]string{"east", "south"})
	if diff := cmp.Diff(map[string][]string{"east": {federation.AllScope, scope}, "north": {federation.AllScope}},
		map[string][]string{"east": e.Readable("east", nil), "north": e.Readable("north", nil)}); diff != "" {
		t.Fatal(diff)
	}
	if got := slices.Sorted(maps.Keys(e.Sums(scope))); !slices.Equal(got, []string{"ep/shop/also/0", "ep/shop/closed/0", "svc/shop/also", "svc/shop/closed"}) {
		t.Fatal(got)
	}
}

func TestForeignBytesAreBelievedOnlyWithinBounds(t *testing.T) {
	profile := func(f func(*federationpb.Profile)) *federationpb.Slot {
		p := &federationpb.Profile{Transport: "hop", SpiffeId: "spiffe://west.demo/ns/shop/sa/payments", Ports: []*federationpb.TargetPort{{Name: "http", Number: 8080}}}
		f(p)
		return &federationpb.Slot{Profiles: []*federationpb.Profile{p}, Endpoints: []*federationpb.Endpoint{{Id: make([]byte, 16), Address: []byte{10, 0, 0, 1}}}}
	}
	slotOf := func(f func(*federationpb.Slot)) *federationpb.Slot {
		s := profile(func(*federationpb.Profile) {})
		f(s)
		return s
	}
	for name, c := range map[string]struct {
		key   string
		value proto.Message
		want  string
	}{
		"foreign trust domain": {"ep/shop/payments/0", profile(func(p *federationpb.Profile) { p.SpiffeId = "spiffe://east.demo/ns/shop/sa/payments" }), "not of the exporter's trust domain west.demo"},
		"control plane":        {"ep/shop/payments/0", profile(func(p *federationpb.Profile) { p.SpiffeId = "spiffe://west.demo/hanse/control-plane" }), "reserved"},
		"no ID":                {"ep/shop/payments/0", profile(func(p *federationpb.Profile) { p.SpiffeId = "" }), "SPIFFE ID"},
		"plaintext":            {"ep/shop/payments/0", profile(func(p *federationpb.Profile) { p.Transport = "plaintext" }), "only hop and tls"},
		"port":                 {"ep/shop/payments/0", profile(func(p *federationpb.Profile) { p.HopPort = 70000 }), "not a port"},
		"65 endpoints": {"ep/shop/payments/0", slotOf(func(s *federationpb.Slot) {
			s.Endpoints = make([]*federationpb.Endpoint, 65)
			for i := range s.Endpoints {
				s.Endpoints[i] = &federationpb.Endpoint{}
			}
		}), "at most 64"},
		"profile":    {"ep/shop/payments/0", slotOf(func(s *federationpb.Slot) { s.Endpoints[0].Profile = 9 }), "profile 9 of 1"},
		"short ID":   {"ep/shop/payments/0", slotOf(func(s *federationpb.Slot) { s.Endpoints[0].Id = []byte{1} }), "want 16"},
		"no address": {"ep/shop/payments/0", slotOf(func(s *federationpb.Slot) { s.Endpoints[0].Address = []byte{0, 0, 0, 0} }), "cannot be dialled"},
		"second":     {"ep/shop/payments/0", slotOf(func(s *federationpb.Slot) { s.Endpoints[0].Second = s.Endpoints[0].Address }), "none of the other IP family"},
		"protocol":   {"svc/shop/payments", &federationpb.Service{Ports: []*federationpb.Port{{Number: 80, Protocol: "quic"}}}, "unknown protocol"},
		"port zero":  {"svc/shop/payments", &federationpb.Service{Ports: []*federationpb.Port{{Protocol: "http"}}}, "port 0"},
		"hostname":   {"ep/shop/payments/0", slotOf(func(s *federationpb.Slot) { s.Endpoints[0].Hostname = "a.example." }), "not a DNS label"},
		"weight":     {"ep/shop/payments/0", slotOf(func(s *federationpb.Slot) { s.Endpoints[0].Weight = 1 << 30 }), "at most 1048576"},
		"affinity":   {"svc/shop/payments", &federationpb.Service{SessionAffinity: "Cookie"}, "affinity \"Cookie\" is unknown"},
		"timeout":    {"svc/shop/payments", &federationpb.Service{SessionAffinity: "ClientIP", SessionAffinitySeconds: 100_000}, "at most 86400"},
		"internal":   {"svc/shop/payments", &federationpb.Service{InternalTrafficPolicy: "Remote"}, "policy \"Remote\" is unknown"},
		"distribute": {"svc/shop/payments", &federationpb.Service{TrafficDistribution: "a b"}, "not a word"},
		"family":     {"svc/shop/payments", &federationpb.Service{IpFamilies: []string{"IPv8"}}, "family \"IPv8\" is unknown"},
		"families":   {"svc/shop/payments", &federationpb.Service{IpFamilies: []string{"IPv4", "IPv4"}}, "twice"},
		"label":      {"svc/shop/payments", &federationpb.Service{Labels: map[string]string{"hanse.mesh/audience": "east"}}, "reserved"},
		"label key":  {"svc/shop/payments", &federationpb.Service{Labels: map[string]string{"a b": "east"}}, "not a qualified name"},
		"annotation": {"svc/shop/payments", &federationpb.Service{Annotations: map[string]string{"multicluster.kubernetes.io/source-cluster": "east"}}, "reserved"},
		"too many":   {"svc/shop/payments", &federationpb.Service{Annotations: hundred()}, "at most 64"},
		"name":       {"svc/shop/Payments!", &federationpb.Service{}, "DNS label"},
		"slot":       {"ep/shop/payments/007", &federationpb.Slot{}, "slot"},
		"too big":    {"svc/shop/payments", &federationpb.Service{SessionAffinity: strings.Repeat("x", 300<<10)}, "at most 262144"},
	} {
		value, err := proto.Marshal(c.value)
		if err != nil {
			t.Fatal(err)
		}
		d := federation.NewDecoder(policy("west.demo"))
		d.Apply([]federation.Change{{Scope: "all", Key: c.key, Value: value}}, epoch)
		p := d.Part()
		if len(p.Faults) != 1 || !strings.Contains(p.Faults[0].Error(), c.want) || !strings.Contains(p.Faults[0].Error(), "west") {
			t.Errorf("%s: faults are %v, want one with %q", name, p.Faults, c.want)
		}
		for _, e := range p.Exports.All() {
			if len(e.Endpoints) > 0 {
				t.Errorf("%s: an endpoint came in", name)
			}
		}
	}
}

func hundred() map[string]string {
	m := map[string]string{}
	for i := range 100 {
		m[fmt.Sprint("k", i)] = ""
	}
	return m
}

func TestBadObjectIsAFaultOfThatObjectOnly(t *testing.T) {
	svc := service("west.demo", "payments", 100)
	e, _ := federation.Encode(snapshot("west.demo", svc), nil, epoch)
	d := federation.NewDecoder(policy("west.demo"))
	d.Apply(all(e), epoch)
	d.Apply([]federation.Change{{Scope: "all", Key: "ep/shop/payments/0", Value: []byte("\xff\xff not protobuf")}}, epoch)
	p := d.Part()
	if got := len(p.Exports.Get(svc.Name).Endpoints); got != 100 || len(p.Faults) != 1 {
		t.Fatalf("%d endpoints, want the last good 100; faults %v", got, p.Faults)
	}
	d.Apply([]federation.Change{{Scope: "all", Key: "ep/shop/payments/0", Value: values(e)["all"]["ep/shop/payments/0"]}}, epoch)
	if p := d.Part(); len(p.Faults) != 0 {
		t.Fatalf("faults %v stay after the object is good again", p.Faults)
	}
	d.Apply([]federation.Change{{Scope: "all", Key: "svc/shop/payments"}}, epoch)
	if p := d.Part(); p.Exports.Len() != 0 || p.Endpoints != 0 {
		t.Fatalf("service is there without its record: %+v", p)
	}
}

func TestImportPolicy(t *testing.T) {
	a, b := service("west.demo", "payments", 4), service("west.demo", "catalog", 4)
	b.Namespace = "back"
	for _, ep := range a.Endpoints[:2] {
		ep.SPIFFEID = "spiffe://west.demo/ns/shop/sa/other"
	}
	e, _ := federation.Encode(snapshot("west.demo", a, b), nil, epoch)
	p := policy("west.demo")
	p.Peer = &discovery.Peer{Name: "west", Namespaces: []string{"shop"}, SPIFFEIDs: []string{"spiffe://west.demo/ns/*/sa/payments"}}
	d := federation.NewDecoder(p)
	d.Apply(all(e), epoch)
	part := d.Part()
	if part.Exports.Len() != 1 || len(part.Exports.Get(a.Name).Endpoints) != 2 || len(part.Faults) != 0 {
		t.Fatalf("%d services, %d endpoints, faults %v; want 1, 2, none", part.Exports.Len(), part.Endpoints, part.Faults)
	}
}

// TestAllow drops endpoints whose ID no rule of their trust domain lets serve the service, and counts them.
func TestAllow(t *testing.T) {
	a, b := service("west.demo", "payments", 4), service("west.demo", "catalog", 4)
	for _, ep := range a.Endpoints[:3] {
		ep.SPIFFEID = "spiffe://west.demo/ns/shop/sa/other"
	}
	e, _ := federation.Encode(snapshot("west.demo", a, b), nil, epoch)
	p := policy("west.demo")
	p.Allow = []discovery.Allow{{Services: []string{"shop/payments"}, SPIFFEIDs: []string{"spiffe://west.demo/ns/*/sa/payments"}}}
	d := federation.NewDecoder(p)
	d.Apply(all(e), epoch)
	part := d.Part()
	for name, want := range map[discovery.Name][2]int{a.Name: {1, 3}, b.Name: {0, 4}} {
		if x := part.Exports.Get(name); x == nil || len(x.Endpoints) != want[0] || x.Withheld != want[1] {
			t.Errorf("%s: %+v, want %d endpoints, %d withheld", name, x, want[0], want[1])
		}
	}
	if len(part.Faults) != 0 {
		t.Errorf("what a policy here leaves out is no fault of the exporter: %v", part.Faults)
	}
}

func TestExportTimeIsClamped(t *testing.T) {
	for _, c := range []struct{ claimed, want time.Time }{
		{epoch, epoch},
		{epoch.Add(4 * time.Minute), epoch.Add(4 * time.Minute)},
		{epoch.Add(6 * time.Minute), epoch.Add(-time.Hour)},
		{epoch.Add(-2 * time.Hour), epoch.Add(-time.Hour)},
		{time.UnixMilli(1), epoch.Add(-time.Hour)},
	} {
		svc := service("west.demo", "payments", 1)
		svc.Export.Created = c.claimed
		e, _ := federation.Encode(snapshot("west.demo", svc), nil, epoch)
		d := federation.NewDecoder(policy("west.demo"))
		d.Apply(all(e), epoch)
		if got := d.Part().Exports.Get(svc.Name).Exported; !got.Equal(c.want) {
			t.Errorf("claimed %s: %s, want %s", c.claimed, got, c.want)
		}
	}
}

func TestServiceInTwoScopesIsOne(t *testing.T) {
	svc := service("west.demo", "payments", 60)
	e, _ := federation.Encode(snapshot("west.demo", svc), nil, epoch)
	d := federation.NewDecoder(policy("west.demo"))
	d.Apply(all(e), epoch)
	moved := all(e)
	for i := range moved {
		moved[i].Scope, moved[i].Revision = "for-1234", 9
	}
	d.Apply(moved, epoch)
	if p := d.Part(); len(p.Exports.Get(svc.Name).Endpoints) != 60 || p.Exports.Get(svc.Name).Revision != 9 {
		t.Fatalf("%d endpoints at revision %d", len(p.Exports.Get(svc.Name).Endpoints), p.Exports.Get(svc.Name).Revision)
	}
	for _, c := range all(e) {
		d.Apply([]federation.Change{{Scope: c.Scope, Key: c.Key}}, epoch)
	}
	if p := d.Part(); len(p.Exports.Get(svc.Name).Endpoints) != 60 {
		t.Fatalf("%d endpoints after the move, want 60", len(p.Exports.Get(svc.Name).Endpoints))
	}
}

func FuzzDecode(f *testing.F) {
	e, _ := federation.Encode(snapshot("west.demo", service("west.demo", "payments", 5)), nil, epoch)
	seeds := 0
	for k, v := range values(e)[federation.AllScope] {
		f.Add(k, v)
		seeds++
	}
	if seeds < 2 {
		f.Fatal("no seeds")
	}
	td := spiffeid.RequireTrustDomainFromString("west.demo")
	f.Fuzz(func(t *testing.T, key string, value []byte) {
		d := federation.NewDecoder(policy("west.demo"))
		svc, err := e.Value(federation.AllScope, "svc/shop/payments")
		if err != nil {
			t.Fatal(err)
		}
		d.Apply([]federation.Change{{Scope: "all", Key: "svc/shop/payments", Value: svc}, {Scope: "all", Key: key, Value: value}}, epoch)
		for _, x := range d.Part().Exports.All() {
			for _, ep := range x.Endpoints {
				if id, err := spiffeid.FromString(ep.SPIFFEID); err != nil || !id.MemberOf(td) || identity.Reserved(id) || len(ep.ID) != 32 {
					t.Fatalf("came in: %+v", ep)
				}
			}
		}
	})
}

func FuzzDecodeRecord(f *testing.F) {
	r := record("aa", "west", 3)
	r.Proof = &federation.Proof{Chain: [][]byte{{1}}, Signature: []byte{2}}
	f.Add(r.Bytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := federation.DecodeRecord(b)
		if err != nil {
			return
		}
		again, err := federation.DecodeRecord(r.Bytes())
		if err != nil || string(again.Bytes()) != string(r.Bytes()) {
			t.Fatalf("what decodes does not encode to the same: %v", err)
		}
	})
}

func TestAudienceByLabel(t *testing.T) {
	e := &federation.Exports{Audience: map[string][]string{federation.AllScope: nil, "for-1": {"east", "tier=gold"}, "for-2": {"tier="}}}
	for _, c := range []struct {
		member string
		labels map[string]string
		want   string
	}{
		{"east", nil, "all for-1"},
		{"north", nil, "all"},
		{"north", map[string]string{"tier": "gold"}, "all for-1"},
		{"north", map[string]string{"tier": "silver"}, "all"},
	} {
		if got := strings.Join(e.Readable(c.member, c.labels), " "); got != c.want {
			t.Errorf("Readable(%q, %v) = %s, want %s", c.member, c.labels, got, c.want)
		}
	}
}

// TestManyServicesEncodeAsOne has enough to be encoded by several goroutines.
func TestManyServicesEncodeAsOne(t *testing.T) {
	var services []*discovery.Service
	for i := range 500 {
		svc := service("west.demo", fmt.Sprint("s", i), i%150)
		if i == 77 {
			svc.Endpoints[3].SPIFFEID = "spiffe://east.demo/x"
		}
		services = append(services, svc)
	}
	e, faults := federation.Encode(snapshot("west.demo", services...), nil, epoch)
	if len(faults) != 1 || faults[0].Key != "svc/shop/s77" || e.Services != 499 {
		t.Fatalf("%d services, faults %v", e.Services, faults)
	}
	d := federation.NewDecoder(policy("west.demo"))
	d.Apply(all(e), epoch)
	for i, svc := range services {
		if got := d.Part().Exports.Get(svc.Name); i != 77 && (got == nil || cmp.Diff(svc.Endpoints, got.Endpoints, equate) != "") {
			t.Fatalf("%s came back otherwise", svc.Name)
		}
	}
}

// TestFreshEndpointsGoToTheEmptiestSlot compares with the obvious way.
func TestFreshEndpointsGoToTheEmptiestSlot(t *testing.T) {
	rnd := rand.New(rand.NewPCG(3, 4))
	svc := service("west.demo", "payments", 0)
	var e *federation.Exports
	want := map[string]int{}
	for round := range 60 {
		next := *svc
		next.Endpoints = slices.DeleteFunc(slices.Clone(svc.Endpoints), func(*discovery.Endpoint) bool { return rnd.IntN(3) == 0 })
		for i := range rnd.IntN(80) {
			next.Endpoints = append(next.Endpoints, endpoint("west.demo", 1000*round+i+1))
		}
		slices.SortFunc(next.Endpoints, func(a, b *discovery.Endpoint) int { return strings.Compare(a.ID, b.ID) })
		e, _ = federation.Encode(snapshot("west.demo", &next), e, epoch)
		filled := make([]int, (len(next.Endpoints)+47)/48)
		is := map[string]int{}
		for _, ep := range next.Endpoints {
			if slot, ok := want[ep.ID]; ok {
				for slot >= len(filled) {
					filled = append(filled, 0)
				}
				filled[slot]++
				is[ep.ID] = slot
			}
		}
		for _, ep := range next.Endpoints {
			if _, ok := is[ep.ID]; !ok {
				is[ep.ID] = slices.Index(filled, slices.Min(filled))
				filled[is[ep.ID]]++
			}
		}
		got := map[string]int{}
		for k, v := range values(e)[federation.AllScope] {
			if _, slot, _ := federation.ParseKey(k); slot >= 0 {
				pb := &federationpb.Slot{}
				if err := proto.Unmarshal(v, pb); err != nil {
					t.Fatal(err)
				}
				for _, ep := range pb.Endpoints {
					got[fmt.Sprintf("%x", ep.Id)] = slot
				}
			}
		}
		if !maps.Equal(is, got) {
			t.Fatalf("round %d: slots differ:\n%s", round, cmp.Diff(is, got))
		}
		svc, want = &next, is
	}
}

func BenchmarkEncode(b *testing.B) {
	var services []*discovery.Service
	for i := range 1000 {
		services = append(services, service("west.demo", fmt.Sprint("s", i), 100))
	}
	s := snapshot("west.demo", services...)
	b.ReportAllocs()
	for b.Loop() {
		federation.Encode(s, nil, epoch)
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/100_000, "ns/endpoint")
}

func BenchmarkDecode(b *testing.B) {
	var services []*discovery.Service
	for i := range 1000 {
		services = append(services, service("west.demo", fmt.Sprint("s", i), 100))
	}
	e, _ := federation.Encode(snapshot("west.demo", services...), nil, epoch)
	changes := all(e)
	b.ReportAllocs()
	for b.Loop() {
		d := federation.NewDecoder(policy("west.demo"))
		for part := range slices.Chunk(changes, 127) {
			d.Apply(part, epoch)
			d.Part()
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/100_000, "ns/endpoint")
}

func TestOneMemberIsBounded(t *testing.T) {
	svc := service("west.demo", "payments", 200)
	e, _ := federation.Encode(snapshot("west.demo", svc), nil, epoch)
	p := policy("west.demo")
	p.Endpoints = 170
	d := federation.NewDecoder(p)
	for range 3 { // what comes again is not counted twice
		d.Apply(all(e), epoch)
	}
	part := d.Part()
	if part.Endpoints == 0 || part.Endpoints > 170 || len(part.Faults) == 0 || !strings.Contains(part.Faults[0].Reason, "more than 170 endpoints") {
		t.Fatalf("%d endpoints came in, faults %v", part.Endpoints, part.Faults)
	}
	for k := range e.Sums(federation.AllScope) {
		if strings.HasSuffix(k, "/0") || strings.HasSuffix(k, "/1") {
			d.Apply([]federation.Change{{Scope: federation.AllScope, Key: k}}, epoch)
		}
	}
	d.Apply(all(e), epoch) // there is room for others now
	if part := d.Part(); part.Endpoints == 0 || part.Endpoints > 170 {
		t.Fatalf("%d endpoints came in", part.Endpoints)
	}
}

// TestOnlyServicesAreExported: the caller's cluster decides about routes and traffic, the server's about access.
func TestOnlyServicesAreExported(t *testing.T) {
	s := snapshot("west.demo", service("west.demo", "payments", 1))
	unexported := service("west.demo", "private", 1)
	unexported.Export = nil
	s.Services = s.Services.Put(unexported.Name, unexported)
	s.Routes = []*discovery.Route{{}}
	s.TrafficPolicy = map[discovery.Name]*discovery.TrafficPolicy{{Namespace: "shop", Name: "payments"}: {}}
	s.Access = []*discovery.AccessPolicy{{}}
	s.Peers = map[string]*discovery.Peer{"east": {Name: "east"}}
	e, faults := federation.Encode(s, nil, epoch)
	got := slices.Sorted(maps.Keys(e.Sums(federation.AllScope)))
	if want := []string{"ep/shop/payments/0", "svc/shop/payments"}; !slices.Equal(got, want) || len(e.Scopes) != 1 || len(faults) != 0 {
		t.Fatalf("exported are %v in %d scopes, faults %v", got, len(e.Scopes), faults)
	}
}

// TestChangesAreTheDifference compares with the difference of all sums.
func TestChangesAreTheDifference(t *testing.T) {
	rnd := rand.New(rand.NewPCG(5, 6))
	services := map[int]*discovery.Service{}
	e, _ := federation.Encode(snapshot("west.demo"), nil, epoch)
	audiences := [][]string{nil, {"east"}, {"north"}}
	for step := range 300 {
		switch n := rnd.IntN(8); {
		case rnd.IntN(4) == 0:
			delete(services, n)
		default:
			services[n] = service("west.demo", fmt.Sprint("s", n), rnd.IntN(120), audiences[rnd.IntN(3)]...)
		}
		next, faults := federation.Encode(snapshot("west.demo", slices.Collect(maps.Values(services))...), e, epoch)
		if len(faults) > 0 {
			t.Fatal(faults)
		}
		endpoints := 0
		for scope, n := range next.Scopes {
			endpoints += n
			want := map[string]federation.Sum{}
			for k, sum := range next.Sums(scope) {
				if e.Sums(scope)[k] != sum {
					want[k] = sum
				}
			}
			for k := range e.Sums(scope) {
				if _, ok := next.Sums(scope)[k]; !ok {
					want[k] = federation.Sum{}
				}
			}
			if got := next.Changes(e)[scope]; !maps.Equal(got, want) {
				t.Fatalf("step %d, scope %s: %d changes, want %d", step, scope, len(got), len(want))
			}
		}
		if endpoints != next.Endpoints {
			t.Fatalf("%d endpoints in all scopes, %d in all", endpoints, next.Endpoints)
		}
		if e = next; step%7 == 0 {
			e = restored(e)
		}
	}
}

// TestEncodeByStepsIsEncodeAtOnce: what an Encode and a LocalPart take from the ones before is what they would make themselves.
func TestEncodeByStepsIsEncodeAtOnce(t *testing.T) {
	rnd := rand.New(rand.NewPCG(3, 3))
	s := snapshot("west.demo")
	var e *federation.Exports
	var part *federation.Part
	for step := range 400 {
		next := *s
		for range 1 + rnd.IntN(3) {
			svc := service("west.demo", fmt.Sprint("s", rnd.IntN(12)), rnd.IntN(6))
			switch rnd.IntN(6) {
			case 0:
				svc.Export = nil
			case 1, 2:
				svc.Export = &discovery.Export{Created: epoch, Audience: []string{fmt.Sprint("c", rnd.IntN(3))}}
			case 3:
				if len(svc.Endpoints) > 0 {
					svc.Endpoints[0].Hostname = "a.b" // cannot be exported
				}
			}
			if next.Services = next.Services.Put(svc.Name, svc); rnd.IntN(4) == 0 {
				next.Services = next.Services.Delete(svc.Name)
			}
		}
		s = &next
		var faults []federation.Fault
		e, faults = federation.Encode(s, e, epoch)
		_, wantFaults := federation.Encode(s, nil, epoch)
		if diff := cmp.Diff(wantFaults, faults, cmpopts.EquateEmpty()); diff != "" {
			t.Fatalf("step %d: faults\n%s", step, diff)
		}
		for _, f := range faults { // its last good state is still in e, and cannot be in want
			n, _, _ := federation.ParseKey(f.Key)
			s.Services = s.Services.Delete(n)
		}
		want, _ := federation.Encode(s, nil, epoch)
		e, faults = federation.Encode(s, e, epoch)
		if e.Services != want.Services || e.Endpoints != want.Endpoints || !maps.Equal(e.Scopes, want.Scopes) || len(faults) > 0 {
			t.Fatalf("step %d: %d services, %d endpoints, scopes %v; want %d, %d, %v", step, e.Services, e.Endpoints, e.Scopes, want.Services, want.Endpoints, want.Scopes)
		}
		if diff := cmp.Diff(want.Audience, e.Audience); diff != "" {
			t.Fatalf("step %d: audiences\n%s", step, diff)
		}
		part = federation.LocalPart(s, e, part)
		whole := federation.LocalPart(s, e, nil)
		if diff := cmp.Diff(maps.Collect(whole.Exports.All()), maps.Collect(part.Exports.All()), equate); diff != "" || part.Endpoints != whole.Endpoints {
			t.Fatalf("step %d: %d endpoints, want %d\n%s", step, part.Endpoints, whole.Endpoints, diff)
		}
	}
}
