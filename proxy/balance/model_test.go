package balance

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/hanse-mesh/hanse/proxy"
)

// TestRandomLives lets endpoints of random clusters fail and recover in random ways. At each step what Explain says must follow
// from the health that it shows, picks must obey it, and when all is well again all traffic must be home.
func TestRandomLives(t *testing.T) {
	for seed := range uint64(12) {
		r := rand.New(rand.NewPCG(seed, 7))
		b, clock := newTest(t, Config{})
		var levels []proxy.LocalityEndpoints
		for i := range 1 + r.IntN(4) {
			var ids []string
			for j := range 1 + r.IntN(6) {
				ids = append(ids, fmt.Sprintf("%c%d", 'a'+i, j))
			}
			levels = append(levels, endpoints(string(rune('a'+i)), ids...))
		}
		c := clusterOf(levels...)
		c.Policy = []string{"", roundRobin, ringHash}[r.IntN(3)]
		c.Outlier = proxy.Outlier{ConsecutiveErrors: 2, BaseEjection: 5 * time.Second, MaxEjection: 20 * time.Second, MaxPercent: 100}
		b.Update(table(c))
		bad := map[string]Outcome{} // endpoints that do not work
		for range 400 {
			switch r.IntN(12) {
			case 0:
				l := levels[r.IntN(len(levels))]
				bad[l.Endpoints[r.IntN(len(l.Endpoints))].ID] = []Outcome{ConnectFailed, Dead, Refused, Reset, TimedOut}[r.IntN(5)]
			case 1:
				clear(bad)
			case 2:
				clock.advance(time.Duration(r.IntN(4000)) * time.Millisecond)
			}
			before, _ := b.Explain(service)
			checkExplanation(t, &before)
			p := mustPick(t, b, PickInfo{Hash: r.Uint64()})
			checkPick(t, &before, &p)
			if o, ok := bad[p.Endpoint.ID]; ok {
				p.Done(Result{Outcome: o})
			} else {
				p.Done(Result{Status: 200})
			}
			if t.Failed() {
				t.Fatalf("seed %d", seed)
			}
		}
		clear(bad)
		for range 60 {
			clock.advance(time.Second)
			draw(t, b, 5)
		}
		if e, _ := b.Explain(service); e.Levels[0].Load != 100 || e.Levels[0].Health != 100 {
			t.Errorf("seed %d: all is well for a minute, but level 0 has %d %%, health %d %%", seed, e.Levels[0].Load, e.Levels[0].Health)
		}
	}
}

// checkExplanation holds loads and panic to the oracle, by the health that is shown.
func checkExplanation(t *testing.T, e *Explanation) {
	t.Helper()
	var levels []levelHealth
	ramping := false
	for _, l := range e.Levels {
		lh := levelHealth{hosts: len(l.Endpoints)}
		for _, s := range l.Endpoints {
			switch s.Health {
			case proxy.Healthy:
				lh.available++
			case proxy.Dead:
				lh.dead++
			}
		}
		lh.tenths = 10 * lh.available
		ramping = ramping || lh.available > 0 && l.Health < min(100, uint32(140*lh.available/lh.hosts))
		levels = append(levels, lh)
	}
	loads, panics := oracle(levels, 140, 50)
	var total uint32
	for i, l := range e.Levels {
		total += l.Load
		if l.Panic != panics[i] {
			t.Errorf("level %d: panic %v, the oracle says %v: %+v", i, l.Panic, panics[i], e)
		}
		if !ramping && l.Load != loads[i] {
			t.Errorf("level %d: %d %%, the oracle says %v: %+v", i, l.Load, loads, e)
		}
	}
	if total != 100 {
		t.Errorf("%d %% of the traffic: %+v", total, e)
	}
}

// checkPick: somebody out is picked only as a trial, in panic, or where nobody else is.
func checkPick(t *testing.T, e *Explanation, p *Pick) {
	t.Helper()
	l := e.Levels[p.Level]
	i := slices.IndexFunc(l.Endpoints, func(s EndpointState) bool { return s.ID == p.Endpoint.ID })
	s := l.Endpoints[i]
	everybodyDead := true
	for _, l := range e.Levels {
		for _, s := range l.Endpoints {
			everybodyDead = everybodyDead && s.Health == proxy.Dead
		}
	}
	switch {
	case s.Health == proxy.Ejected && !l.Panic:
		t.Errorf("picked %+v, of %+v", s, e)
	case s.Health == proxy.Dead && s.RetryIn > 0 && !everybodyDead:
		t.Errorf("picked %+v before its time, of %+v", s, e)
	}
}
