package federation_test

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/federation"
)

var payments = discovery.Name{Namespace: "shop", Name: "payments"}

func source(id, name string, e *federation.Export) federation.Source {
	return federation.Source{ID: id, Name: name, Part: &federation.Part{Exports: map[discovery.Name]*federation.Export{payments: e}}}
}

func TestMergeResolvesConflictsByTheOldestExport(t *testing.T) {
	http := discovery.Port{Name: "http", Number: 80, Protocol: discovery.HTTP}
	old := source("b", "west", &federation.Export{Exported: epoch, Ports: []discovery.Port{http, {Name: "admin", Number: 9000, Protocol: discovery.TCP}}})
	young := source("a", "east", &federation.Export{
		Exported: epoch.Add(time.Minute), Headless: true, Affinity: "ClientIP",
		Ports: []discovery.Port{{Name: "http", Number: 80, Protocol: discovery.GRPC}, {Name: "console", Number: 9000, Protocol: discovery.TCP}, {Name: "grpc", Number: 81, Protocol: discovery.GRPC}},
	})
	got := federation.Merge([]federation.Source{young, old}, nil)[payments]
	want := &discovery.Import{
		Name:  payments,
		Ports: []discovery.Port{http, {Name: "grpc", Number: 81, Protocol: discovery.GRPC}, {Name: "admin", Number: 9000, Protocol: discovery.TCP}},
		From: []discovery.ImportedFrom{
			{Member: "west", Ports: old.Part.Exports[payments].Ports, Exported: epoch},
			{Member: "east", Ports: young.Part.Exports[payments].Ports, Exported: epoch.Add(time.Minute)},
		},
		Conflicts: []discovery.ImportConflict{
			{Member: "east", Reason: federation.TypeConflict, Message: "headless is true, but false in the oldest export, of cluster west"},
			{Member: "east", Reason: federation.SessionAffinityConflict, Message: `session affinity is "ClientIP", but "" in the oldest export, of cluster west`},
			{Member: "east", Reason: federation.PortConflict, Message: `port "http" 80/TCP (grpc) conflicts with "http" 80/TCP (http) of an older export`},
			{Member: "east", Reason: federation.PortConflict, Message: `port "console" 9000/TCP (tcp) conflicts with "admin" 9000/TCP (tcp) of an older export`},
		},
	}
	if diff := cmp.Diff(want, got, equate); diff != "" {
		t.Fatalf("-want +got:\n%s", diff)
	}
}

func TestMergeBreaksTiesByMemberID(t *testing.T) {
	a := source("2", "east", &federation.Export{Exported: epoch, Headless: true})
	b := source("1", "west", &federation.Export{Exported: epoch})
	if got := federation.Merge([]federation.Source{a, b}, nil)[payments]; got.From[0].Member != "west" || got.Headless {
		t.Fatalf("%+v", got)
	}
}

// TestMergeIgnoresOrder gives random exports in random order.
func TestMergeIgnoresOrder(t *testing.T) {
	rnd := rand.New(rand.NewPCG(7, 7))
	for range 300 {
		var sources []federation.Source
		for i := range 1 + rnd.IntN(6) {
			p := &federation.Part{Exports: map[discovery.Name]*federation.Export{}}
			for s := range 3 {
				e := &federation.Export{Exported: epoch.Add(time.Duration(rnd.IntN(3)) * time.Second), Headless: rnd.IntN(3) == 0, Affinity: []string{"", "ClientIP"}[rnd.IntN(2)]}
				for range rnd.IntN(4) {
					e.Ports = append(e.Ports, discovery.Port{Name: fmt.Sprint("p", rnd.IntN(3)), Number: uint16(80 + rnd.IntN(3)), Protocol: []discovery.AppProtocol{discovery.HTTP, discovery.TCP}[rnd.IntN(2)]})
				}
				p.Exports[discovery.Name{Namespace: "n", Name: fmt.Sprint("s", s)}] = e
			}
			sources = append(sources, federation.Source{ID: fmt.Sprint("id", i), Name: fmt.Sprint("c", i), Part: p})
		}
		want := federation.Merge(sources, nil)
		rnd.Shuffle(len(sources), func(i, j int) { sources[i], sources[j] = sources[j], sources[i] })
		got := federation.Merge(sources, want)
		if diff := cmp.Diff(want, got, equate); diff != "" {
			t.Fatalf("the order matters:\n%s", diff)
		}
		for n := range got {
			if got[n] != want[n] {
				t.Fatalf("%s has not changed and was made anew", n)
			}
		}
	}
}
