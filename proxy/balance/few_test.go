package balance

import (
	"fmt"
	"testing"
)

// many is a level of 1,000 endpoints, a tenth of which has twice the weight.
func many() []string {
	var ids []string
	for i := range 1000 {
		ids = append(ids, fmt.Sprintf("e%03d", i))
	}
	return ids
}

// TestFewOfMany: of 1,000 endpoints a proxy uses 32, others use others, and a failure changes one.
func TestFewOfMany(t *testing.T) {
	used := func(b *Balancer) map[string]int { return draw(t, b, 3000) }
	b, _ := newTest(t, Config{ID: "front-1"})
	c := clusterOf(endpoints("a", many()...), endpoints("b", "b1"))
	b.Update(table(c))
	before := used(b)
	if len(before) != maxPerLevel {
		t.Fatalf("%d of 1,000 endpoints are used, want %d", len(before), maxPerLevel)
	}
	var failed string
	for failed = range before {
		break
	}
	failUntilOut(t, b, Result{Outcome: Dead}, failed)
	after, kept := used(b), 0
	for id := range after {
		if before[id] > 0 {
			kept++
		}
	}
	if len(after) != maxPerLevel || kept != maxPerLevel-1 || after[failed] > 0 {
		t.Errorf("after one failed: %d used, %d of them as before", len(after), kept)
	}
	other, _ := newTest(t, Config{ID: "front-2"})
	other.Update(table(c))
	same := 0
	for id := range used(other) {
		if before[id] > 0 {
			same++
		}
	}
	if same > maxPerLevel/4 {
		t.Errorf("two proxies share %d of %d endpoints", same, maxPerLevel)
	}
	byHash := *c
	byHash.Policy = ringHash
	b.Update(table(&byHash))
	hashed := map[string]bool{}
	for i := range 1000 {
		p := mustPick(t, b, PickInfo{Hash: Hash(fmt.Sprint(i))})
		hashed[p.Endpoint.ID] = true
		p.Done(Result{Status: 200})
	}
	if len(hashed) < 300 {
		t.Errorf("a hash reaches %d endpoints only", len(hashed))
	}
}

// TestFewOfManyKeepsWeights in expectation: over many proxies, an endpoint of twice the weight has twice the requests.
func TestFewOfManyKeepsWeights(t *testing.T) {
	c := clusterOf(endpoints("a", many()...))
	heavy := map[string]bool{}
	for i, e := range c.Levels[0].Localities[0].Endpoints {
		if i%10 == 0 {
			e.Weight = 2
			heavy[e.ID] = true
		}
	}
	c.Policy = roundRobin
	sum := 0
	for i := range 60 {
		b, _ := newTest(t, Config{ID: fmt.Sprint(i)})
		b.Update(table(c))
		for id, n := range draw(t, b, 500) {
			if heavy[id] {
				sum += n
			}
		}
	}
	if share := float64(sum) / 30_000; share < 0.15 || share > 0.22 { // 200 of 1,100
		t.Errorf("a tenth of double weight has %.3f of the requests", share)
	}
}
