package federation_test

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/federation"
)

var payments = discovery.Name{Namespace: "shop", Name: "payments"}

func source(id, name string, e *federation.Export) federation.Source {
	return federation.Source{ID: id, Name: name, Part: &federation.Part{Exports: discovery.NewByName(map[discovery.Name]*federation.Export{payments: e})}}
}

func TestMergeResolvesConflictsByTheOldestExport(t *testing.T) {
	http := discovery.Port{Name: "http", Number: 80, Protocol: discovery.HTTP}
	old := source("b", "west", &federation.Export{Exported: epoch, Ports: []discovery.Port{http, {Name: "admin", Number: 9000, Protocol: discovery.TCP}}})
	young := source("a", "east", &federation.Export{
		Exported: epoch.Add(time.Minute), Traits: discovery.Traits{Headless: true, Affinity: "ClientIP"},
		Ports: []discovery.Port{{Name: "http", Number: 80, Protocol: discovery.GRPC}, {Name: "console", Number: 9000, Protocol: discovery.TCP}, {Name: "grpc", Number: 81, Protocol: discovery.GRPC}},
	})
	got := federation.Merge([]federation.Source{young, old}, nil).Imports.Get(payments)
	want := &discovery.Import{
		Name:  payments,
		Ports: []discovery.Port{http, {Name: "grpc", Number: 81, Protocol: discovery.GRPC}, {Name: "admin", Number: 9000, Protocol: discovery.TCP}},
		From: []discovery.ImportedFrom{
			{Member: "west", Ports: old.Part.Exports.Get(payments).Ports, Exported: epoch},
			{Member: "east", Ports: young.Part.Exports.Get(payments).Ports, Exported: epoch.Add(time.Minute)},
		},
		Conflicts: []discovery.ImportConflict{
			{Member: "east", With: "west", Reason: federation.TypeConflict, Message: "headless is true, but false in the oldest export, of cluster west"},
			{Member: "east", With: "west", Reason: federation.SessionAffinityConflict, Message: `session affinity is "ClientIP", but "None" in the oldest export, of cluster west`},
			{Member: "east", With: "west", Reason: federation.PortConflict, Message: `port "http" 80/TCP (grpc) conflicts with "http" 80/TCP (http) of an older export, of cluster west`},
			{Member: "east", With: "west", Reason: federation.PortConflict, Message: `port "console" 9000/TCP (tcp) conflicts with "admin" 9000/TCP (tcp) of an older export, of cluster west`},
			{Member: "west", With: "east", Reason: federation.PortConflict, Message: `has no port "grpc" 81/TCP (grpc), which cluster east exports: calls to it reach only a part of the endpoints`},
		},
	}
	if diff := cmp.Diff(want, got, equate); diff != "" {
		t.Fatalf("-want +got:\n%s", diff)
	}
}

func TestMergeBreaksTiesByMemberID(t *testing.T) {
	a := source("2", "east", &federation.Export{Exported: epoch, Traits: discovery.Traits{Headless: true}})
	b := source("1", "west", &federation.Export{Exported: epoch})
	if got := federation.Merge([]federation.Source{a, b}, nil).Imports.Get(payments); got.From[0].Member != "west" || got.Headless {
		t.Fatalf("%+v", got)
	}
}

// TestMergeIgnoresOrder gives random exports in random order.
func TestMergeIgnoresOrder(t *testing.T) {
	rnd := rand.New(rand.NewPCG(7, 7))
	for range 300 {
		var sources []federation.Source
		for i := range 1 + rnd.IntN(6) {
			p := &federation.Part{}
			for s := range 3 {
				e := &federation.Export{Exported: epoch.Add(time.Duration(rnd.IntN(3)) * time.Second), Traits: discovery.Traits{Headless: rnd.IntN(3) == 0, Affinity: []string{"", "ClientIP"}[rnd.IntN(2)]}}
				for range rnd.IntN(3) {
					e.IPFamilies = append(e.IPFamilies, []discovery.IPFamily{discovery.IPv4, discovery.IPv6}[rnd.IntN(2)])
				}
				if rnd.IntN(2) == 0 {
					e.Labels = map[string]string{"tier": fmt.Sprint(rnd.IntN(2))}
				}
				for range rnd.IntN(4) {
					e.Ports = append(e.Ports, discovery.Port{Name: fmt.Sprint("p", rnd.IntN(3)), Number: uint16(80 + rnd.IntN(3)), Protocol: []discovery.AppProtocol{discovery.HTTP, discovery.TCP}[rnd.IntN(2)]})
				}
				p.Exports = p.Exports.Put(discovery.Name{Namespace: "n", Name: fmt.Sprint("s", s)}, e)
			}
			sources = append(sources, federation.Source{ID: fmt.Sprint("id", i), Name: fmt.Sprint("c", i), Part: p})
		}
		want := federation.Merge(sources, nil)
		rnd.Shuffle(len(sources), func(i, j int) { sources[i], sources[j] = sources[j], sources[i] })
		got := federation.Merge(sources, want)
		if diff := cmp.Diff(want.Imports, got.Imports, equate); diff != "" {
			t.Fatalf("the order matters:\n%s", diff)
		}
		for n := range got.Imports.All() {
			if got.Imports.Get(n) != want.Imports.Get(n) {
				t.Fatalf("%s has not changed and was made anew", n)
			}
		}
	}
}

// TestMergeOfEachTrait has three clusters, of which only the middle one differs from the oldest.
func TestMergeOfEachTrait(t *testing.T) {
	v4, v6 := discovery.IPv4, discovery.IPv6
	base := func() *federation.Export {
		return &federation.Export{
			Traits: discovery.Traits{Affinity: "ClientIP", InternalTrafficPolicy: "Local", TrafficDistribution: "PreferClose", IPFamilies: []discovery.IPFamily{v4, v6}},
			Labels: map[string]string{"tier": "gold"}, Annotations: map[string]string{"team": "shop"},
		}
	}
	for _, c := range []struct {
		name            string
		change          func(e *federation.Export)
		reason, message string // none: no conflict
		imported        func(i *discovery.Import) bool
	}{
		{"nothing", func(*federation.Export) {}, "", "", func(i *discovery.Import) bool { return i.Traits.Equal(base().Traits) && i.Labels["tier"] == "gold" }},
		{"headless", func(e *federation.Export) { e.Headless = true }, federation.TypeConflict, "headless is true, but false", func(i *discovery.Import) bool { return !i.Headless }},
		{"affinity", func(e *federation.Export) { e.Affinity = "" }, federation.SessionAffinityConflict, `is "None", but "ClientIP"`, func(i *discovery.Import) bool { return i.Affinity == "ClientIP" }},
		{"timeout", func(e *federation.Export) { e.AffinityTimeout = 60 }, federation.SessionAffinityConfigConflict, "is 60, but 10800", func(i *discovery.Import) bool { return i.AffinityTimeout == 0 }},
		{"internal policy", func(e *federation.Export) { e.InternalTrafficPolicy = "" }, federation.InternalTrafficPolicyConflict, `is "Cluster", but "Local"`, func(i *discovery.Import) bool { return i.InternalTrafficPolicy == "Local" }},
		{"distribution", func(e *federation.Export) { e.TrafficDistribution = "" }, federation.TrafficDistributionConflict, `is "", but "PreferClose"`, func(i *discovery.Import) bool { return i.TrafficDistribution == "PreferClose" }},
		{"labels", func(e *federation.Export) { e.Labels = map[string]string{"tier": "tin"} }, federation.LabelsConflict, `tier is "tin", not "gold"`, func(i *discovery.Import) bool { return i.Labels["tier"] == "gold" }},
		{"annotations", func(e *federation.Export) { e.Annotations = nil }, federation.AnnotationsConflict, "team is only there", func(i *discovery.Import) bool { return i.Annotations["team"] == "shop" }},
		{"one family", func(e *federation.Export) { e.IPFamilies = []discovery.IPFamily{v6} }, "", "", func(i *discovery.Import) bool { return fmt.Sprint(i.IPFamilies) == "[IPv6]" }},
		{"order of families", func(e *federation.Export) { e.IPFamilies = []discovery.IPFamily{v6, v4} }, "", "", func(i *discovery.Import) bool { return fmt.Sprint(i.IPFamilies) == "[IPv4 IPv6]" }},
		{"families not said", func(e *federation.Export) { e.IPFamilies = nil }, "", "", func(i *discovery.Import) bool { return fmt.Sprint(i.IPFamilies) == "[IPv4 IPv6]" }},
	} {
		oldest, middle, youngest := base(), base(), base()
		oldest.Exported, middle.Exported, youngest.Exported = epoch, epoch.Add(1), epoch.Add(2)
		c.change(middle)
		got := federation.Merge([]federation.Source{source("1", "east", middle), source("2", "north", youngest), source("3", "west", oldest)}, nil).Imports.Get(payments)
		if !c.imported(got) {
			t.Errorf("%s: imported %+v", c.name, got)
		}
		if c.reason == "" {
			if len(got.Conflicts) > 0 {
				t.Errorf("%s: conflicts %v", c.name, got.Conflicts)
			}
			continue
		}
		if len(got.Conflicts) != 1 || got.Conflicts[0].Reason != c.reason || !strings.Contains(got.Conflicts[0].Message, c.message) || !strings.Contains(got.Conflicts[0].Message, "cluster west") {
			t.Errorf("%s: conflicts %v, want one %s with %q and the cluster that won", c.name, got.Conflicts, c.reason, c.message)
		}
		for member, want := range map[string]int{"east": 1, "west": 1, "north": 0} {
			if n := len(got.ConflictsOf(member)); n != want {
				t.Errorf("%s: %d conflicts concern %s, want %d", c.name, n, member, want)
			}
		}
	}
}

func TestMergeWithoutACommonIPFamily(t *testing.T) {
	old := &federation.Export{Exported: epoch, Traits: discovery.Traits{IPFamilies: []discovery.IPFamily{discovery.IPv6}}}
	young := &federation.Export{Exported: epoch.Add(1), Traits: discovery.Traits{IPFamilies: []discovery.IPFamily{discovery.IPv4}}}
	got := federation.Merge([]federation.Source{source("1", "east", young), source("2", "west", old)}, nil).Imports.Get(payments)
	if fmt.Sprint(got.IPFamilies) != "[IPv6]" || len(got.Conflicts) != 1 || got.Conflicts[0].Reason != federation.IPFamilyConflict || got.Conflicts[0].Member != "east" {
		t.Fatalf("%+v", got)
	}
}

// TestMergeByStepsIsMergeAtOnce changes, adds and takes away exports and sources, and merges from the result before.
func TestMergeByStepsIsMergeAtOnce(t *testing.T) {
	rnd := rand.New(rand.NewPCG(11, 12))
	parts := map[string]map[discovery.Name]*federation.Export{}
	var before *federation.Merged
	reused := 0
	for step := range 2000 {
		id := fmt.Sprint("id", rnd.IntN(5))
		switch {
		case parts[id] == nil:
			parts[id] = map[discovery.Name]*federation.Export{}
		case rnd.IntN(20) == 0:
			delete(parts, id)
		default:
			name := discovery.Name{Namespace: "n", Name: fmt.Sprint("s", rnd.IntN(4))}
			if rnd.IntN(4) == 0 {
				delete(parts[id], name)
			} else {
				parts[id][name] = &federation.Export{Exported: epoch.Add(time.Duration(rnd.IntN(3)) * time.Second), Traits: discovery.Traits{Headless: rnd.IntN(2) == 0}}
			}
		}
		var sources []federation.Source
		for id, exports := range parts {
			sources = append(sources, federation.Source{ID: id, Name: "c" + id, Part: &federation.Part{Exports: discovery.NewByName(exports)}})
		}
		got, want := federation.Merge(sources, before), federation.Merge(sources, nil)
		if diff := cmp.Diff(want.Imports, got.Imports, equate); diff != "" {
			t.Fatalf("step %d:\n%s", step, diff)
		}
		for n, i := range got.Imports.All() {
			if before != nil && before.Imports.Get(n) == i {
				reused++
			}
		}
		before = got
	}
	if reused < 1000 {
		t.Errorf("only %d Imports were reused", reused)
	}
}

func BenchmarkMergeAfterOneChange(b *testing.B) {
	changed := discovery.Name{Namespace: "n", Name: "s7"}
	sources := make([]federation.Source, 3)
	for i := range sources {
		p := &federation.Part{}
		for s := range 10_000 {
			p.Exports = p.Exports.Put(discovery.Name{Namespace: "n", Name: fmt.Sprint("s", s)}, &federation.Export{Exported: epoch, Endpoints: make([]*discovery.Endpoint, 100)})
		}
		sources[i] = federation.Source{ID: fmt.Sprint(i), Name: fmt.Sprint("c", i), Part: p}
	}
	m := federation.Merge(sources, nil)
	b.ReportAllocs()
	for b.Loop() {
		p := *sources[1].Part
		e := *p.Exports.Get(changed)
		e.Revision++
		p.Exports = p.Exports.Put(changed, &e)
		sources[1].Part = &p
		m = federation.Merge(sources, m)
	}
}

func TestLocalPartReusesWhatHasNotChanged(t *testing.T) {
	s := snapshot("west.demo", service("west.demo", "payments", 2), service("west.demo", "catalog", 2))
	e, _ := federation.Encode(s, nil, epoch)
	before := federation.LocalPart(s, e, nil)
	next := *s
	changed := *s.Services.Get(payments)
	changed.Endpoints = changed.Endpoints[:1]
	next.Services = s.Services.Put(payments, &changed)
	e, _ = federation.Encode(&next, e, epoch)
	after := federation.LocalPart(&next, e, before)
	catalog := discovery.Name{Namespace: "shop", Name: "catalog"}
	if after.Exports.Get(catalog) != before.Exports.Get(catalog) || after.Exports.Get(payments) == before.Exports.Get(payments) || after.Endpoints != 3 {
		t.Fatalf("%d endpoints; catalog reused: %t, payments reused: %t", after.Endpoints,
			after.Exports.Get(catalog) == before.Exports.Get(catalog), after.Exports.Get(payments) == before.Exports.Get(payments))
	}
}
