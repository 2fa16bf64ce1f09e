package balance

import (
	"math/rand/v2"
	"slices"
	"testing"
)

func loadsOf(shares []share) (out []uint32) {
	for _, s := range shares {
		out = append(out, s.load)
	}
	return out
}

// percentHealthy is a level of 100 hosts.
func percentHealthy(n int) levelHealth { return levelHealth{hosts: 100, available: n, tenths: 10 * n} }

// TestDistributeAsEnvoyDocuments holds the rows of "Priority levels" in Envoy's documentation.
func TestDistributeAsEnvoyDocuments(t *testing.T) {
	for _, c := range []struct {
		healthy []int
		want    []uint32
	}{
		{[]int{100, 100}, []uint32{100, 0}},
		{[]int{72, 72}, []uint32{100, 0}},
		{[]int{71, 71}, []uint32{99, 1}},
		{[]int{50, 50}, []uint32{70, 30}},
		{[]int{25, 100}, []uint32{35, 65}},
		{[]int{0, 100}, []uint32{0, 100}},
		{[]int{100, 0}, []uint32{100, 0}},
		{[]int{100, 100, 100}, []uint32{100, 0, 0}},
		{[]int{72, 72, 100}, []uint32{100, 0, 0}},
		{[]int{71, 71, 100}, []uint32{99, 1, 0}},
		{[]int{50, 50, 100}, []uint32{70, 30, 0}},
		{[]int{25, 100, 100}, []uint32{35, 65, 0}},
		{[]int{25, 25, 100}, []uint32{35, 35, 30}},
		{[]int{0, 0, 100}, []uint32{0, 0, 100}},
	} {
		var levels []levelHealth
		for _, n := range c.healthy {
			levels = append(levels, percentHealthy(n))
		}
		if got := loadsOf(distribute(levels, 140, 50)); !slices.Equal(got, c.want) {
			t.Errorf("healthy %v: %v, want %v", c.healthy, got, c.want)
		}
	}
}

// TestPanicAsEnvoyDocuments holds the rows of "Panic threshold" in Envoy's documentation: two levels of which each is well
// or in panic.
func TestPanicAsEnvoyDocuments(t *testing.T) {
	for _, c := range []struct {
		a, b         int
		wantA, wantB uint32
		panicA       bool
		panicB       bool
	}{
		{72, 72, 100, 0, false, false},
		{71, 71, 99, 1, false, false},
		{50, 60, 70, 30, false, false},
		{25, 100, 35, 65, false, false},
		{25, 25, 50, 50, true, true}, // 70 % together
		{5, 65, 8, 92, true, false},  // the page says 7 and 93; the code gives what rounding leaves to the first available level
	} {
		got := distribute([]levelHealth{percentHealthy(c.a), percentHealthy(c.b)}, 140, 50)
		if got[0].load != c.wantA || got[1].load != c.wantB || got[0].panic != c.panicA || got[1].panic != c.panicB {
			t.Errorf("%d %% and %d %%: %+v, want %+v", c.a, c.b, got, c)
		}
	}
}

// oracle is a slow second opinion: it hands out the traffic percent by percent.
func oracle(levels []levelHealth, overprovisioning, threshold int) (loads []uint32, panics []bool) {
	health := func(damped bool) (out []int, sum int) {
		for _, l := range levels {
			points := 10 * l.available
			if damped {
				points = l.tenths
			}
			h := 0
			for h < 100 && l.hosts > 0 && (h+1)*10*l.hosts <= overprovisioning*points {
				h++
			}
			out, sum = append(out, h), sum+h
		}
		return out, min(sum, 100)
	}
	hs, sum := health(true)
	if sum < 100 {
		hs, sum = health(false)
	}
	loads, panics = make([]uint32, len(levels)), make([]bool, len(levels))
	every := true
	for i, l := range levels {
		few := l.hosts == 0 || 100*float64(l.available)/float64(l.hosts) < float64(threshold)
		panics[i] = sum < 100 && few
		every = every && panics[i]
	}
	weights := hs
	if every && sum < 100 {
		useful := 0
		for _, l := range levels {
			useful += l.hosts - l.dead
		}
		weights = nil
		for _, l := range levels {
			n := l.hosts - l.dead
			if useful == 0 {
				n = l.hosts
			}
			weights = append(weights, n)
		}
		sum = 0
		for _, w := range weights {
			sum += w
		}
	}
	given := uint32(0)
	for i, w := range weights {
		for sum > 0 && given < 100 && int(loads[i]+1)*sum <= w*100 {
			loads[i]++
			given++
		}
	}
	first := max(0, slices.IndexFunc(weights, func(w int) bool { return w > 0 }))
	loads[first] += 100 - given
	return loads, panics
}

func TestDistributeAgreesWithTheOracle(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	panicked := 0
	for range 100_000 {
		levels := make([]levelHealth, 1+r.IntN(5))
		for i := range levels {
			l := &levels[i]
			l.hosts = r.IntN(12)
			l.available = r.IntN(l.hosts + 1)
			if out := l.hosts - l.available; out > 0 {
				l.dead = r.IntN(out + 1)
			}
			for range l.available {
				l.tenths += 1 + r.IntN(10)
			}
		}
		threshold := uint32(r.IntN(101))
		got := distribute(levels, 140, threshold)
		loads, panics := oracle(levels, 140, int(threshold))
		sum := uint32(0)
		for i, s := range got {
			sum += s.load
			if s.load != loads[i] || s.panic != panics[i] {
				t.Fatalf("%+v, threshold %d: level %d has %+v, the oracle says %v %v", levels, threshold, i, s, loads, panics)
			}
			if s.panic {
				panicked++
			}
		}
		if sum != 100 {
			t.Fatalf("%+v: loads are %d %% together", levels, sum)
		}
	}
	if panicked < 1000 {
		t.Error("panic was hardly tested")
	}
}
