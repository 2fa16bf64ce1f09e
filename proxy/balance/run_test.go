package balance

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/hanse-mesh/hanse/proxy"
)

// world answers probes; what is not in it is dead.
type world struct {
	mu   sync.Mutex
	up   map[string]bool
	seen map[string]int
}

func newWorld(up ...string) *world {
	w := &world{up: map[string]bool{}, seen: map[string]int{}}
	for _, n := range up {
		w.up[n] = true
	}
	return w
}

func (w *world) set(name string, up bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.up[name] = up
}

func (w *world) probe(ctx context.Context, e *proxy.Endpoint, gateway netip.AddrPort) error {
	w.mu.Lock()
	w.seen[e.ID]++
	g, up := !gateway.IsValid() || w.up[gateway.String()], w.up[e.ID]
	w.mu.Unlock()
	switch {
	case !g:
		return fmt.Errorf("%w: refused", ErrGateway)
	case !up:
		<-ctx.Done() // a black hole
		return errors.New("no answer")
	}
	return nil
}

// running runs a Balancer on the bubble's clock until the test ends.
func running(t *testing.T, cfg Config) *Balancer {
	b := New(cfg)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := b.Run(ctx); err != nil {
			t.Errorf("Run: %v", err)
		}
	}()
	t.Cleanup(func() { cancel(); <-done })
	return b
}

func TestProbesBringTheDeadBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld("b1")
		b := running(t, Config{Probe: w.probe})
		b.Update(table(clusterOf(endpoints("a", "a1"), endpoints("b", "b1"))))
		p := mustPick(t, b, PickInfo{})
		p.Done(Result{Outcome: ConnectFailed})
		for range 60 {
			time.Sleep(500 * time.Millisecond)
			if got := draw(t, b, 10); got["b1"] != 10 {
				t.Fatalf("a request was sent to the dead: %v", got)
			}
		}
		w.mu.Lock()
		tries := w.seen["a1"]
		w.mu.Unlock()
		if tries < 3 || tries > 8 {
			t.Errorf("%d probes in 30 s", tries)
		}
		w.set("a1", true)
		time.Sleep(maxBackoff + 3*time.Second + 11*time.Second)
		if got := draw(t, b, 100); got["a1"] != 100 {
			t.Errorf("not back: %v", got)
		}
	})
}

// TestBlackHole: every endpoint of a place stops answering. The first failure must be enough to shift all calls, though no
// request is open to the others.
func TestBlackHole(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld("b1")
		b := running(t, Config{Probe: w.probe})
		b.Update(table(clusterOf(endpoints("a", "a1", "a2", "a3", "a4", "a5", "a6", "a7", "a8"), endpoints("b", "b1"))))
		p := mustPick(t, b, PickInfo{})
		p.Done(Result{Outcome: Dead, Reason: "no answer to PING"})
		time.Sleep(1100 * time.Millisecond)
		if got := draw(t, b, 100); got["b1"] != 100 {
			t.Errorf("1.1 s after the first failure: %v", got)
		}
		for _, e := range b.Events(time.Time{}) {
			if e.Kind == proxy.Returned {
				t.Errorf("event %+v", e)
			}
		}
	})
}

func TestOneDeadEndpointLeavesItsNeighboursAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld("a1", "a2", "a3")
		b := running(t, Config{Probe: w.probe})
		b.Update(table(clusterOf(endpoints("a", "a1", "a2", "a3"), endpoints("b", "b1"))))
		p := mustPick(t, b, PickInfo{})
		dead := p.Endpoint.ID
		w.set(dead, false)
		p.Done(Result{Outcome: Dead})
		time.Sleep(3 * time.Second)
		e, _ := b.Explain(service)
		for _, s := range e.Levels[0].Endpoints {
			if (s.Health == proxy.Dead) != (s.ID == dead) {
				t.Errorf("%s is %s: %s", s.ID, s.Health, s.Reason)
			}
		}
	})
}

// TestDrainingIsNoticedByRequests: a workload that drains answers probes, and refuses requests.
func TestDrainingIsNoticedByRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld("a1", "b1")
		b := running(t, Config{Probe: w.probe})
		b.Update(table(clusterOf(endpoints("a", "a1"), endpoints("b", "b1"))))
		refused := 0
		call := func() {
			p := mustPick(t, b, PickInfo{})
			if p.Endpoint.ID == "a1" {
				refused++
				p.Done(Result{Outcome: Refused})
				p = mustPick(t, b, PickInfo{Exclude: []string{"a1"}})
			}
			p.Connected()
			p.Done(Result{Status: 200})
		}
		for range 600 {
			call()
			time.Sleep(100 * time.Millisecond)
		}
		if refused < 5 || refused > 12 {
			t.Errorf("%d requests were refused in a minute", refused)
		}
		for _, e := range b.Events(time.Time{}) {
			if e.Kind == proxy.Returned {
				t.Errorf("event %+v", e)
			}
		}
	})
}

// TestTwoThatDrainInTurn: one takes requests again, and nobody has noticed yet, when the other begins to refuse them.
func TestTwoThatDrainInTurn(t *testing.T) {
	b, _ := newTest(t, Config{})
	b.Update(table(clusterOf(endpoints("a", "a1", "a2"))))
	for range refusals {
		p := mustPick(t, b, PickInfo{Only: "a1"})
		p.Done(Result{Outcome: Refused})
	}
	p := mustPick(t, b, PickInfo{})
	if p.Endpoint.ID != "a2" {
		t.Fatalf("%s was picked", p.Endpoint.ID)
	}
	again := mustPick(t, b, PickInfo{Exclude: []string{"a2"}})
	if again.Endpoint.ID != "a1" {
		t.Errorf("after a2, %s was picked", again.Endpoint.ID)
	}
	again.Connected()
	again.Done(Result{Status: 200})
	p.Done(Result{Outcome: Refused, Retried: true})
}

func TestTheGoneAreBounded(t *testing.T) {
	b, _ := newTest(t, Config{})
	for i := range 2 * maxGone {
		b.Update(table(clusterOf(endpoints("a", fmt.Sprint("a", i)))))
	}
	if n := len((*b.clusters.Load())[service].gone); n > maxGone {
		t.Errorf("%d endpoints that are gone are remembered", n)
	}
}

func TestOlderTablesAreNotObeyed(t *testing.T) {
	b, _ := newTest(t, Config{})
	newer, older := table(clusterOf(endpoints("a", "a1"))), table(clusterOf(endpoints("b", "b1")))
	newer.Version, older.Version = 2, 1
	b.Update(newer)
	b.Update(older)
	if got := draw(t, b, 10); got["a1"] != 10 {
		t.Errorf("%v", got)
	}
}

func TestProbesBringGatewaysBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g1, g2 := netip.MustParseAddrPort("192.0.2.1:15443"), netip.MustParseAddrPort("192.0.2.2:15443")
		w := newWorld("f1", "b1")
		b := running(t, Config{Probe: w.probe})
		far := endpoints("f", "f1")
		far.Endpoints[0].Gateways = []netip.AddrPort{g1, g2}
		b.Update(table(clusterOf(far, endpoints("b", "b1"))))
		for range 2 {
			p := mustPick(t, b, PickInfo{})
			p.Done(Result{Outcome: GatewayFailed})
		}
		time.Sleep(20 * time.Second)
		if got := draw(t, b, 10); got["b1"] != 10 {
			t.Fatalf("both gateways are down: %v", got)
		}
		w.set(g2.String(), true)
		time.Sleep(25 * time.Second)
		for range 10 {
			p := mustPick(t, b, PickInfo{})
			if p.Gateway != g2 {
				t.Fatalf("picked %s by %s", p.Endpoint.ID, p.Gateway)
			}
			p.Done(Result{Status: 200})
		}
		e, _ := b.Explain(service)
		if len(e.Gateways) != 2 || e.Gateways[0].Up || !e.Gateways[1].Up {
			t.Errorf("gateways %+v", e.Gateways)
		}
	})
}

// TestConcurrently lets everything happen at once, for the race detector; at the end nothing may be left open.
func TestConcurrently(t *testing.T) {
	reg := prometheus.NewRegistry()
	b := New(Config{Registerer: reg, SuspectGateway: func(netip.AddrPort) {}, Ramp: time.Millisecond})
	g := netip.MustParseAddrPort("192.0.2.1:15443")
	make := func() *proxy.Cluster {
		near := endpoints("a", "a1", "a2", fmt.Sprint("a", 3+rand.IntN(3)))
		far := endpoints("b", "b1", "b2")
		for _, e := range far.Endpoints {
			e.Gateways = []netip.AddrPort{g}
		}
		c := clusterOf(near, far)
		c.Policy = []string{"", roundRobin, ringHash}[rand.IntN(3)]
		c.MaxRequests = 1_000_000
		c.Outlier.BaseEjection = time.Millisecond
		return c
	}
	b.Update(table(make()))
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 1500 {
				p, err := b.Pick(service, PickInfo{Hash: rand.Uint64(), Exclude: []string{"a1"}})
				if err != nil {
					t.Errorf("Pick: %v", err)
					return
				}
				p.Connected()
				p.Done(Result{Outcome: Outcome(rand.IntN(8)), Status: 200 + 303*rand.IntN(2), Latency: time.Duration(rand.IntN(1e9))})
			}
		})
	}
	wg.Go(func() {
		for range 100 {
			b.Update(table(make()))
			b.Report()
			b.Explain(service)
			b.Gateway(g, nil)
			if _, err := reg.Gather(); err != nil {
				t.Errorf("metrics: %v", err)
			}
		}
	})
	wg.Wait()
	b.Report()
	c := (*b.clusters.Load())[service]
	if c.active.Load() != 0 || c.retries.Load() != 0 || len(c.gone) != 0 {
		t.Errorf("left over: %d active, %d retries, %d gone", c.active.Load(), c.retries.Load(), len(c.gone))
	}
}

func TestLevelReturnsOverARamp(t *testing.T) {
	b, clock := newTest(t, Config{})
	b.Update(table(clusterOf(endpoints("a", "a1"), endpoints("b", "b1"))))
	b.Update(table(clusterOf(endpoints("b", "b1")))) // the zone dies, and the control plane says so
	if got := draw(t, b, 100); got["b1"] != 100 {
		t.Fatalf("%v", got)
	}
	b.Update(table(clusterOf(endpoints("a", "a9"), endpoints("b", "b1"))))
	if got := draw(t, b, 1000); got["a9"] < 50 || got["a9"] > 250 {
		t.Errorf("at once: %v", got)
	}
	clock.advance(11 * time.Second)
	if got := draw(t, b, 100); got["a9"] != 100 {
		t.Errorf("after the ramp: %v", got)
	}
	b.Update(table(clusterOf(endpoints("a", "a9", "a10"), endpoints("b", "b1")))) // growing is no return
	if got := draw(t, b, 1000); got["a10"] < 400 || got["b1"] != 0 {
		t.Errorf("a level that serves has grown: %v", got)
	}
	want := []string{"shifted ", "returned "}
	if got := kinds(b.Events(time.Time{})); len(got) != 2 || got[0] != want[0] || got[1] != want[1] {
		t.Errorf("events %v, want %v", got, want)
	}
}

func TestDrainingAndNotReadyAreAvoided(t *testing.T) {
	b, _ := newTest(t, Config{})
	l := endpoints("a", "a1", "a2", "a3", "a4")
	l.Endpoints[0].Draining, l.Endpoints[1].Unhealthy = true, true
	b.Update(table(clusterOf(l, endpoints("b", "b1"))))
	got := draw(t, b, 1000)
	if got["a1"]+got["a2"] != 0 || got["a3"] == 0 || got["b1"] < 200 || got["b1"] > 400 {
		t.Errorf("half of the level is away: %v", got)
	}
}

func TestLongStreamEndsATrial(t *testing.T) {
	b, clock := newTest(t, Config{Ramp: -1})
	b.Update(table(clusterOf(endpoints("a", "a1"), endpoints("b", "b1"))))
	p := mustPick(t, b, PickInfo{})
	p.Done(Result{Outcome: Dead})
	clock.advance(firstBackoff)
	stream := mustPick(t, b, PickInfo{})
	if stream.Endpoint.ID != "a1" {
		t.Fatal("no trial")
	}
	stream.Connected()
	if got := draw(t, b, 100); got["a1"] != 100 {
		t.Errorf("the stream is open, but: %v", got)
	}
	stream.Done(Result{Outcome: Canceled})
}

func TestHistogram(t *testing.T) {
	for _, d := range []time.Duration{0, time.Microsecond, 7 * time.Microsecond, time.Millisecond, 1234 * time.Microsecond, time.Second, time.Hour} {
		var h histogram
		h.add(d)
		now, before := h.read(), buckets{}
		got := now.quantile(&before, 0.99)
		low, high := d, d+d/4+2*time.Microsecond
		if d > time.Minute {
			low, high = time.Minute, 3*time.Minute
		}
		if got < low || got > high {
			t.Errorf("%s is told as %s", d, got)
		}
	}
}

func benchmarkPick(b *testing.B, n int, policy string) {
	bal := New(Config{})
	var ids []string
	for i := range n {
		ids = append(ids, fmt.Sprint("a", i))
	}
	c := clusterOf(endpoints("a", ids...), endpoints("b", "b1"))
	c.Policy, c.MaxRequests = policy, 1_000_000
	bal.Update(table(c))
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			p, err := bal.Pick(service, PickInfo{Hash: 42})
			if err != nil {
				b.Error(err)
				return
			}
			p.Done(Result{Status: 200, Latency: time.Millisecond})
		}
	})
}

func BenchmarkPickAndDone(b *testing.B) {
	for _, policy := range []string{"least_request", roundRobin, ringHash} {
		b.Run(policy, func(b *testing.B) { benchmarkPick(b, 32, policy) })
	}
}

func BenchmarkUpdate(b *testing.B) {
	var ids []string
	for i := range 32 {
		ids = append(ids, fmt.Sprint("a", i))
	}
	bal := New(Config{})
	b.ReportAllocs()
	for b.Loop() {
		bal.Update(table(clusterOf(endpoints("a", ids...), endpoints("b", ids...))))
	}
}

func TestPickDoesNotAllocate(t *testing.T) {
	b, _ := newTest(t, Config{})
	b.Update(table(clusterOf(endpoints("a", "a1", "a2"))))
	if n := testing.AllocsPerRun(100, func() {
		p, err := b.Pick(service, PickInfo{})
		if err != nil {
			t.Fatal(err)
		}
		p.Done(Result{Status: 200})
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
