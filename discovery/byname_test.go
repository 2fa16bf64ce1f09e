package discovery

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"testing"
)

// TestByName holds it to a map over random changes: what was before stays, Diff says what differs and nothing else.
func TestByName(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	var b ByName[int]
	model := map[Name]int{}
	check := func(b ByName[int], m map[Name]int) {
		t.Helper()
		if got := maps.Collect(b.All()); !maps.Equal(got, m) || b.Len() != len(m) {
			t.Fatalf("%d values %v, want %v", b.Len(), got, m)
		}
	}
	for range 300 {
		before, was := b, maps.Clone(model)
		e := b.Edit()
		for range random.IntN(40) {
			n := Name{Namespace: fmt.Sprint(random.IntN(4)), Name: fmt.Sprint(random.IntN(200))}
			if random.IntN(3) == 0 {
				e.Delete(n)
				delete(model, n)
			} else {
				v := random.IntN(3)
				e.Put(n, v)
				model[n] = v
			}
			if e.Get(n) != model[n] {
				t.Fatalf("%s is %d while edited, want %d", n, e.Get(n), model[n])
			}
		}
		b = e.Done()
		check(b, model)
		check(before, was)
		changed := map[Name]int{}
		Diff(before, b, func(n Name, old, now int) {
			if changed[n]++; old != was[n] || now != model[n] {
				t.Fatalf("%s: told %d to %d, want %d to %d", n, old, now, was[n], model[n])
			}
		})
		for n := range was {
			if v, ok := model[n]; (!ok || v != was[n]) != (changed[n] == 1) {
				t.Fatalf("%s: %d to %d (%v), told %d times", n, was[n], v, ok, changed[n])
			}
		}
		for n := range model {
			if _, ok := was[n]; !ok && changed[n] != 1 {
				t.Fatalf("%s is new, told %d times", n, changed[n])
			}
		}
	}
	check(b.Delete(Name{}).Put(Name{Name: "x"}, 7).Delete(Name{Name: "x"}), model)
	if got := NewByName(model); got.Len() != len(model) {
		t.Error("a map is not taken over whole")
	}
	if v, ok := (ByName[int]{}).Lookup(Name{}); v != 0 || ok {
		t.Error("the zero value has something")
	}
}
