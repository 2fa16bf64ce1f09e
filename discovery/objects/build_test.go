package objects

import (
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hanse-mesh/hanse/discovery"
)

func decode(t testing.TB, yaml string) []Object {
	t.Helper()
	objs, err := Decode([]byte(yaml), "t.yaml")
	if err != nil {
		t.Fatal(err)
	}
	return objs
}

func slice(name, service string, addresses ...string) string {
	var b strings.Builder
	fmt.Fprintf(&b, `
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: %s, namespace: shop, labels: {kubernetes.io/service-name: %s}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints:
`, name, service)
	for _, a := range addresses {
		fmt.Fprintf(&b, "- addresses: [%s]\n", a)
	}
	return b.String()
}

func service(name string) string {
	return fmt.Sprintf(`
---
apiVersion: v1
kind: Service
metadata: {name: %s, namespace: shop}
spec: {ports: [{name: http, port: 8080}]}
`, name)
}

func export(name string) string {
	return fmt.Sprintf(`
---
apiVersion: multicluster.x-k8s.io/v1alpha1
kind: ServiceExport
metadata: {name: %s, namespace: shop}
`, name)
}

// build is Build without faults.
func build(t testing.TB, in Input) (*discovery.Snapshot, *State) {
	t.Helper()
	if in.Self.Cluster == "" {
		in.Self = testSelf
	}
	snap, state, faults := Build(in)
	if err := asError(faults); err != nil {
		t.Fatal(err)
	}
	return snap, state
}

func shopName(n string) discovery.Name { return discovery.Name{Namespace: "shop", Name: n} }

func idsByAddress(s *discovery.Snapshot, service string) map[string]string {
	ids := map[string]string{}
	for _, e := range s.Services.Get(shopName(service)).Endpoints {
		ids[e.Address.String()] = e.ID
	}
	return ids
}

func diff(a, b any) string {
	x, _ := json.MarshalIndent(a, "", " ")
	y, _ := json.MarshalIndent(b, "", " ")
	return cmp.Diff(string(x), string(y))
}

func TestEndpointsKeepTheirIDs(t *testing.T) {
	before, state := build(t, Input{Complete: true, Now: testNow, Set: NewSet(decode(t, service("a")+export("a")+slice("a-1", "a", "10.0.0.1", "10.0.0.2"))...)})
	// Another slice, other order, one gone, one new: what stays keeps its ID.
	after, _ := build(t, Input{Complete: true, Now: testNow.Add(time.Hour), State: state,
		Set: NewSet(decode(t, service("a")+export("a")+slice("a-9", "a", "10.0.0.3", "10.0.0.2"))...)})
	was, is := idsByAddress(before, "a"), idsByAddress(after, "a")
	if len(was) != 2 || len(is) != 2 || was["10.0.0.2"] != is["10.0.0.2"] {
		t.Errorf("IDs %v became %v", was, is)
	}
	if is["10.0.0.3"] == was["10.0.0.1"] {
		t.Error("a new endpoint has the ID of one that went")
	}
	for _, id := range is {
		if !validID(id) {
			t.Errorf("ID %q is not 32 hex digits", id)
		}
	}
	if e := after.Services.Get(shopName("a")).Export; !e.Created.Equal(testNow) {
		t.Errorf("export time moved to %s", e.Created)
	}
}

// Restart from disk: the persisted State, decoded from scratch, gives the same Snapshot and State.
func TestStateSurvivesRestart(t *testing.T) {
	text := service("a") + export("a") + slice("a-1", "a", "10.0.0.1", "10.0.0.2") + service("b")
	before, state := build(t, Input{Complete: true, Now: testNow, Set: NewSet(decode(t, text)...)})
	disk, err := json.Marshal(state)
	if err != nil {
		t.Fatal(err)
	}
	loaded := &State{}
	if err := json.Unmarshal(disk, loaded); err != nil {
		t.Fatal(err)
	}
	after, next := build(t, Input{Complete: true, Now: testNow.Add(time.Hour), State: loaded, Set: NewSet(decode(t, text)...)})
	if d := diff(before, after) + diff(before.Services.Get(shopName("a")), after.Services.Get(shopName("a"))); d != "" {
		t.Errorf("Snapshot changed (-before +after):\n%s", d)
	}
	if again, _ := json.Marshal(next); string(again) != string(disk) {
		t.Errorf("State changed from %s to %s", disk, again)
	}
	if next.Revision() != loaded.Revision() {
		t.Error("Revision grew though nothing changed")
	}
}

func TestStateRefusesWhatItDidNotWrite(t *testing.T) {
	for _, text := range []string{`{`, `{"version":2}`, `{"version":1,"created":{"x":"2026-01-01T00:00:00Z"}}`,
		`{"version":1,"endpoints":{"a":{}}}`, `{"version":1,"endpoints":{"a/b":{"k":"nohex"}}}`} {
		if err := new(State).UnmarshalJSON([]byte(text)); err == nil {
			t.Errorf("%s was accepted", text)
		}
	}
}

func TestBuildIsPure(t *testing.T) {
	set := NewSet(decode(t, service("a")+export("a")+slice("a-1", "a", "10.0.0.1", "10.0.0.2"))...)
	_, state := build(t, Input{Complete: true, Now: testNow, Set: set, NewID: counter()})
	disk, _ := json.Marshal(state)
	in := Input{Now: testNow, Set: set.Put(decode(t, service("b")+slice("b-1", "b", "10.0.1.1"))...), State: state}
	var snaps []*discovery.Snapshot
	for range 2 {
		in.NewID = counter()
		s, _ := build(t, in)
		snaps = append(snaps, s)
	}
	if !reflect.DeepEqual(snaps[0], snaps[1]) {
		t.Error("the same Input gave two Snapshots")
	}
	if now, _ := json.Marshal(state); string(now) != string(disk) {
		t.Error("Build changed the State it was given")
	}
}

// A service whose content did not change keeps its pointer, also when its file was read again, so that what depends on it need not be made
// again.
func TestUnchangedServicesAreTheSamePointers(t *testing.T) {
	a, b := service("a")+slice("a-1", "a", "10.0.0.1"), service("b")+slice("b-1", "b", "10.0.1.1")
	before, state := build(t, Input{Complete: true, Now: testNow, Set: NewSet(decode(t, a+b)...)})
	after, next := build(t, Input{Complete: true, Now: testNow, State: state, Set: NewSet(decode(t, a+service("b")+slice("b-1", "b", "10.0.1.2"))...)})
	if before.Services.Get(shopName("a")) != after.Services.Get(shopName("a")) {
		t.Error("a was made again")
	}
	if before.Services.Get(shopName("b")) == after.Services.Get(shopName("b")) {
		t.Error("b was not made again")
	}
	if next.Revision() == state.Revision() {
		t.Error("Revision did not grow with a new endpoint")
	}
	moved := testSelf
	moved.Region = "us-1"
	elsewhere, _ := build(t, Input{Self: moved, Complete: true, Now: testNow, State: next, Set: NewSet(decode(t, a)...)})
	if got := elsewhere.Services.Get(shopName("a")).Endpoints[0].Locality.Region; got != "us-1" {
		t.Errorf("region %q after the cluster's changed", got)
	}
}

func TestDuplicateAndDualStackEndpointsAreOne(t *testing.T) {
	snap, _ := build(t, Input{Complete: true, Now: testNow, Set: NewSet(decode(t, service("a")+slice("a-1", "a", "10.0.0.1")+slice("a-2", "a", "10.0.0.1")+`
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: a-v6, namespace: shop, labels: {kubernetes.io/service-name: a}}
addressType: IPv6
ports: [{name: http, port: 8080}]
endpoints:
- {addresses: ["fd00::5"], targetRef: {kind: Pod, name: p, uid: u-1}}
- {addresses: ["fd00::6"]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: a-z4, namespace: shop, labels: {kubernetes.io/service-name: a}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints:
- {addresses: ["10.0.0.5"], targetRef: {kind: Pod, name: p, uid: u-1}}
`)...)})
	ids := idsByAddress(snap, "a")
	if len(ids) != 3 || ids["10.0.0.1"] == "" || ids["10.0.0.5"] == "" || ids["fd00::6"] == "" {
		t.Errorf("endpoints %v", ids)
	}
}

func TestAnExportIsOlderThanItsService(t *testing.T) {
	_, state, faults := Build(Input{Self: testSelf, Now: testNow, Set: NewSet(decode(t, export("a"))...)})
	if len(faults) != 1 || !faults[0].Pending {
		t.Fatalf("faults %v", faults)
	}
	snap, _ := build(t, Input{Complete: true, Now: testNow.Add(time.Hour), State: state, Set: NewSet(decode(t, export("a")+service("a"))...)})
	if got := snap.Services.Get(shopName("a")).Export.Created; !got.Equal(testNow) {
		t.Errorf("export time %s, want that of its first sight", got)
	}
}

// While a source was not read whole, what it may still bring is remembered.
func TestIncompleteBuildForgetsNothing(t *testing.T) {
	a, b := service("a")+export("a")+slice("a-1", "a", "10.0.0.1", "10.0.0.2"), service("b")+export("b")+slice("b-1", "b", "10.0.1.1")
	before, state := build(t, Input{Now: testNow, Complete: true, Set: NewSet(decode(t, a+b)...)})
	later := testNow.Add(time.Hour)
	_, state = build(t, Input{Now: later, State: state, Set: NewSet(decode(t, service("a")+slice("a-1", "a", "10.0.0.1"))...)})
	after, state := build(t, Input{Now: later, Complete: true, State: state, Set: NewSet(decode(t, a+b)...)})
	if d := diff(before.Services.Get(shopName("a")), after.Services.Get(shopName("a"))) + diff(before.Services.Get(shopName("b")), after.Services.Get(shopName("b"))); d != "" {
		t.Errorf("-before +after:\n%s", d)
	}
	_, state = build(t, Input{Now: later, Complete: true, State: state, Set: NewSet(decode(t, service("a"))...)})
	if disk, _ := json.Marshal(state); string(disk) != `{"version":1}` {
		t.Errorf("a complete Build remembers what is gone: %s", disk)
	}
}

func TestSetIsImmutable(t *testing.T) {
	a := NewSet(decode(t, service("a"))...)
	b := a.Put(decode(t, service("b"))...)
	c := b.Delete(Key{"Service", "shop", "a"})
	if a.Len() != 1 || b.Len() != 2 || c.Len() != 1 {
		t.Errorf("lengths %d, %d, %d", a.Len(), b.Len(), c.Len())
	}
	if _, ok := c.Get(Key{"Service", "shop", "b"}); !ok || len(b.List("Service", "shop")) != 2 || len(b.List("", "else")) != 0 || len(b.List("Peer", "")) != 0 {
		t.Error("Get or List")
	}
}

func TestLayerNamesBothPlaces(t *testing.T) {
	one, _ := Decode([]byte(service("a")), "one.yaml")
	two, _ := Decode([]byte(service("a")+service("b")), "two.yaml")
	set, faults := Layer(NewSet(one...), nil, NewSet(two...))
	if set.Len() != 2 || len(faults) != 1 {
		t.Fatalf("%d objects, faults %v", set.Len(), faults)
	}
	if got, want := faults[0].Error(), `two.yaml:3: Service shop/a: metadata.name: "a": already defined in one.yaml on line 3; remove one of the two`; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if o, _ := set.Get(Key{"Service", "shop", "a"}); o.File != "one.yaml" {
		t.Errorf("%s counts", o.File)
	}
}

// fleet is n services of m endpoints each.
func fleet(b *testing.B, n, m int) *Set {
	b.Helper()
	var objs []Object
	for i := range n {
		var addresses []string
		for j := range m {
			addresses = append(addresses, fmt.Sprintf("10.%d.%d.%d", i/256, i%256, j))
		}
		name := fmt.Sprintf("s%d", i)
		objs = append(objs, decode(b, service(name)+export(name)+slice(name, name, addresses...))...)
	}
	return NewSet(objs...)
}

func BenchmarkBuild10kServices(b *testing.B) {
	set := fleet(b, 10_000, 100)
	b.Run("first", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			build(b, Input{Now: testNow, Set: set})
		}
	})
	b.Run("one-changed", func(b *testing.B) {
		_, state := build(b, Input{Now: testNow, Set: set})
		b.ReportAllocs()
		i := 0
		for b.Loop() {
			i++
			changed := set.Put(decode(b, slice("s7", "s7", fmt.Sprintf("10.0.7.%d", i%256)))...)
			_, state = build(b, Input{Now: testNow, Set: changed, State: state})
		}
	})
}

func BenchmarkDecode(b *testing.B) {
	var text strings.Builder
	for i := range 1000 {
		text.WriteString(service(fmt.Sprintf("s%d", i)) + slice(fmt.Sprintf("s%d", i), fmt.Sprintf("s%d", i), "10.0.0.1", "10.0.0.2", "10.0.0.3"))
	}
	b.SetBytes(int64(text.Len()))
	b.ReportAllocs()
	for b.Loop() {
		decode(b, text.String())
	}
}
