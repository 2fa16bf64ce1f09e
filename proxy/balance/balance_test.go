package balance

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/hanse-mesh/hanse/proxy"
)

const service = "payments.shop.svc.clusterset.local:8080"

// clock is a test's own.
type clock struct {
	mu sync.Mutex
	at time.Time
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.at
}

func (c *clock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at = c.at.Add(d)
}

func newTest(t testing.TB, cfg Config) (*Balancer, *clock) {
	t.Helper()
	c := &clock{at: time.Unix(1_000_000, 0)}
	r := rand.New(rand.NewPCG(1, 2))
	cfg.Now, cfg.Rand = c.now, r.Uint64
	return New(cfg), c
}

// endpoints are ids at a zone of the own cluster.
func endpoints(zone string, ids ...string) proxy.LocalityEndpoints {
	l := proxy.LocalityEndpoints{Locality: proxy.Locality{Cluster: "west", Region: "eu", Zone: zone}, Weight: 1}
	for _, id := range ids {
		l.Endpoints = append(l.Endpoints, &proxy.Endpoint{ID: id, Locality: l.Locality, Weight: 1})
	}
	return l
}

func clusterOf(levels ...proxy.LocalityEndpoints) *proxy.Cluster {
	c := &proxy.Cluster{Name: service, EndpointsReceived: true}
	for _, l := range levels {
		c.Levels = append(c.Levels, proxy.Level{Localities: []proxy.LocalityEndpoints{l}})
	}
	return c
}

func table(c *proxy.Cluster) *proxy.Table {
	return &proxy.Table{Clusters: map[string]*proxy.Cluster{c.Name: c}}
}

func mustPick(t testing.TB, b *Balancer, info PickInfo) Pick {
	t.Helper()
	p, err := b.Pick(service, info)
	if err != nil {
		t.Fatalf("Pick: %v", err)
	}
	return p
}

// draw picks n times and answers 200 at once.
func draw(t testing.TB, b *Balancer, n int) map[string]int {
	t.Helper()
	got := map[string]int{}
	for range n {
		p := mustPick(t, b, PickInfo{})
		got[p.Endpoint.ID]++
		p.Done(Result{Status: 200})
	}
	return got
}

// failUntilOut makes every pick of the given endpoints fail until none is picked any more. One of 32 is not picked in a hundred picks by
// chance every 24th time; in a thousand never.
func failUntilOut(t testing.TB, b *Balancer, r Result, ids ...string) {
	t.Helper()
	for quiet := 0; quiet < 1000; {
		p := mustPick(t, b, PickInfo{})
		quiet++
		if slices.Contains(ids, p.Endpoint.ID) {
			p.Done(r)
			quiet = 0
		} else {
			p.Done(Result{Status: 200})
		}
	}
}

func kinds(events []proxy.Event) (out []string) {
	for _, e := range events {
		out = append(out, string(e.Kind)+" "+e.Endpoint)
	}
	return out
}

func TestDeadEndpointLeavesAtOnceAndReturnsOverARamp(t *testing.T) {
	b, clock := newTest(t, Config{})
	b.Update(table(clusterOf(endpoints("a", "a1"), endpoints("b", "b1"))))
	if got := draw(t, b, 100); got["a1"] != 100 {
		t.Fatalf("all well: %v", got)
	}
	p := mustPick(t, b, PickInfo{})
	p.Done(Result{Outcome: ConnectFailed, Reason: "refused"})
	if got := draw(t, b, 100); got["b1"] != 100 {
		t.Fatalf("a1 is dead: %v", got)
	}
	clock.advance(firstBackoff)
	trial := mustPick(t, b, PickInfo{})
	if trial.Endpoint.ID != "a1" {
		t.Fatalf("no trial after the time out, but %s", trial.Endpoint.ID)
	}
	if got := draw(t, b, 100); got["b1"] != 100 {
		t.Fatalf("more than one trial: %v", got)
	}
	trial.Done(Result{Status: 200})
	if got := draw(t, b, 1000); got["a1"] < 50 || got["a1"] > 250 {
		t.Fatalf("begin of the ramp: %v", got)
	}
	clock.advance(5 * time.Second)
	if got := draw(t, b, 1000); got["a1"] < 500 || got["a1"] > 900 {
		t.Fatalf("half way: %v", got)
	}
	clock.advance(6 * time.Second)
	if got := draw(t, b, 100); got["a1"] != 100 {
		t.Fatalf("end of the ramp: %v", got)
	}
	want := []string{"first_failure a1", "ejected a1", "shifted a1", "returned a1", "returned "}
	if got := kinds(b.Events(time.Time{})); !slices.Equal(got, want) {
		t.Errorf("events %v, want %v", got, want)
	}
}

func TestFailedTrialDoublesTheTimeOut(t *testing.T) {
	b, clock := newTest(t, Config{})
	b.Update(table(clusterOf(endpoints("a", "a1"), endpoints("b", "b1"))))
	lost := mustPick(t, b, PickInfo{})
	straggler := mustPick(t, b, PickInfo{})
	lost.Done(Result{Outcome: Dead})
	straggler.Done(Result{Outcome: Dead}) // the same connection: counts once
	for _, wait := range []time.Duration{1, 2, 4, 8, 10, 10} {
		clock.advance(wait*time.Second - 1)
		if got := draw(t, b, 10); got["b1"] != 10 {
			t.Fatalf("tried before %d s: %v", wait, got)
		}
		clock.advance(1)
		p := mustPick(t, b, PickInfo{})
		if p.Endpoint.ID != "a1" {
			t.Fatalf("not tried after %d s", wait)
		}
		p.Done(Result{Outcome: ConnectFailed})
	}
}

func TestEjectionByAnswers(t *testing.T) {
	b, clock := newTest(t, Config{})
	c := clusterOf(endpoints("a", "a1", "a2"), endpoints("b", "b1"))
	c.Outlier = proxy.Outlier{ConsecutiveErrors: 3, BaseEjection: 10 * time.Second}
	b.Update(table(c))
	failUntilOut(t, b, Result{Status: 503}, "a1")
	if got := draw(t, b, 1000); got["a1"] != 0 || got["b1"] < 200 || got["b1"] > 400 {
		t.Fatalf("a1 is out, its level at 70%%: %v", got)
	}
	failUntilOut(t, b, Result{GRPC: grpcUnavailable}, "a2") // 100 % of the level, since b1 is well
	if got := draw(t, b, 100); got["b1"] != 100 {
		t.Fatalf("level 0 is out: %v", got)
	}
	failUntilOutErr := mustPick(t, b, PickInfo{})
	failUntilOutErr.Done(Result{Status: 500}) // not a gateway error: the application's own
	clock.advance(10 * time.Second)
	if got := draw(t, b, 1000); got["a1"] == 0 || got["a2"] == 0 || got["b1"] < 500 {
		t.Fatalf("returned, ramping: %v", got)
	}
	clock.advance(10 * time.Second)
	if got := draw(t, b, 1000); got["b1"] != 0 {
		t.Fatalf("ramp is over: %v", got)
	}
}

// TestAnswersThatConnectAreStillCounted: a stream that was accepted and then answered badly is a bad answer.
func TestAnswersThatConnectAreStillCounted(t *testing.T) {
	b, _ := newTest(t, Config{})
	b.Update(table(clusterOf(endpoints("a", "a1"), endpoints("b", "b1"))))
	for range 5 {
		p := mustPick(t, b, PickInfo{})
		p.Connected()
		p.Done(Result{Status: 503})
	}
	if got := draw(t, b, 100); got["b1"] != 100 {
		t.Fatalf("five bad answers: %v", got)
	}
	b, clock := newTest(t, Config{Ramp: -1})
	b.Update(table(clusterOf(endpoints("a", "a1"), endpoints("b", "b1"))))
	p := mustPick(t, b, PickInfo{})
	p.Done(Result{Outcome: Dead})
	clock.advance(firstBackoff)
	p = mustPick(t, b, PickInfo{})
	p.Done(Result{Status: 503})
	if got := draw(t, b, 10); got["a1"] != 10 {
		t.Errorf("a bad answer is an answer, not death: %v", got)
	}
}

func TestEjectionsGrowLonger(t *testing.T) {
	b, clock := newTest(t, Config{Ramp: -1})
	c := clusterOf(endpoints("a", "a1"), endpoints("b", "b1"))
	c.Outlier = proxy.Outlier{ConsecutiveErrors: 1, BaseEjection: 10 * time.Second, MaxEjection: 25 * time.Second}
	b.Update(table(c))
	for _, want := range []time.Duration{10 * time.Second, 20 * time.Second, 25 * time.Second, 25 * time.Second} {
		p := mustPick(t, b, PickInfo{})
		if p.Endpoint.ID != "a1" {
			t.Fatalf("picked %s", p.Endpoint.ID)
		}
		p.Done(Result{Status: 502})
		clock.advance(want - 1)
		if got := draw(t, b, 10); got["a1"] != 0 {
			t.Fatalf("back before %s", want)
		}
		clock.advance(1)
	}
}

func TestEjectionIsLimitedWithoutALowerLevel(t *testing.T) {
	b, _ := newTest(t, Config{})
	c := clusterOf(endpoints("a", "a1", "a2", "a3", "a4"))
	c.Outlier.MaxPercent = 50
	b.Update(table(c))
	for range 500 {
		p := mustPick(t, b, PickInfo{})
		p.Done(Result{Status: 503})
	}
	e, _ := b.Explain(service)
	out := 0
	for _, s := range e.Levels[0].Endpoints {
		if s.Health == proxy.Ejected {
			out++
		}
	}
	if out != 2 {
		t.Errorf("%d of 4 are ejected, want 50 %%", out)
	}
}

func TestPanicAvoidsTheDead(t *testing.T) {
	b, _ := newTest(t, Config{})
	b.Update(table(clusterOf(endpoints("a", "a1", "a2", "a3"))))
	failUntilOut(t, b, Result{Outcome: ConnectFailed}, "a1", "a2")
	if e, _ := b.Explain(service); !e.Levels[0].Panic {
		t.Errorf("1 of 3 is well: no panic: %+v", e)
	}
	if got := draw(t, b, 100); got["a3"] != 100 {
		t.Errorf("panic picked the dead: %v", got)
	}
	p := mustPick(t, b, PickInfo{})
	p.Done(Result{Outcome: ConnectFailed})
	if got := draw(t, b, 100); len(got) == 0 {
		t.Errorf("all dead: %v", got)
	}
}

func TestExcludeGoesElsewhere(t *testing.T) {
	for _, policy := range []string{"", roundRobin, ringHash} {
		b, _ := newTest(t, Config{})
		c := clusterOf(endpoints("a", "a1", "a2"), endpoints("b", "b1"))
		c.Policy = policy
		b.Update(table(c))
		var tried []string
		for range 3 {
			p := mustPick(t, b, PickInfo{Exclude: tried, Hash: Hash("k")})
			if slices.Contains(tried, p.Endpoint.ID) {
				t.Fatalf("%q: %s again, after %v", policy, p.Endpoint.ID, tried)
			}
			tried = append(tried, p.Endpoint.ID)
			p.Done(Result{Status: 200})
		}
		if tried[2] != "b1" {
			t.Errorf("%q: order %v: the lower level must come last", policy, tried)
		}
		mustPick(t, b, PickInfo{Exclude: tried, Hash: Hash("k")}) // nothing else is left
	}
}

// TestOnlyOne: who asks for one endpoint gets that one, in whatever level and state, and no other.
func TestOnlyOne(t *testing.T) {
	b, _ := newTest(t, Config{})
	b.Update(table(clusterOf(endpoints("a", "a1", "a2"), endpoints("b", "b1"))))
	failUntilOut(t, b, Result{Outcome: Dead}, "a2")
	for _, id := range []string{"a1", "a2", "b1"} {
		for range 10 {
			p := mustPick(t, b, PickInfo{Only: id})
			if p.Endpoint.ID != id {
				t.Errorf("only %s: %s", id, p.Endpoint.ID)
			}
			p.Done(Result{Status: 200})
		}
	}
	for _, info := range []PickInfo{{Only: "nobody"}, {Only: "a1", Exclude: []string{"a1"}}} {
		if p, err := b.Pick(service, info); !errors.Is(err, ErrNoEndpoints) {
			t.Errorf("%+v: %+v, %v", info, p, err)
		}
	}
}

func TestGatewayHealthIsItsOwn(t *testing.T) {
	g1, g2 := netip.MustParseAddrPort("192.0.2.1:15443"), netip.MustParseAddrPort("192.0.2.2:15443")
	var suspects []netip.AddrPort
	b, clock := newTest(t, Config{SuspectGateway: func(a netip.AddrPort) { suspects = append(suspects, a) }})
	far := endpoints("f", "f1", "f2")
	for _, e := range far.Endpoints {
		e.Gateways = []netip.AddrPort{g1, g2}
	}
	c := clusterOf(far, endpoints("b", "b1"))
	b.Update(table(c))
	count := func() map[netip.AddrPort]int {
		got := map[netip.AddrPort]int{}
		for range 100 {
			p := mustPick(t, b, PickInfo{})
			got[p.Gateway]++
			p.Done(Result{Status: 200})
		}
		return got
	}
	if got := count(); got[g1] != 50 || got[g2] != 50 {
		t.Fatalf("not in turn: %v", got)
	}
	p := mustPick(t, b, PickInfo{})
	down, up := p.Gateway, g1
	if down == g1 {
		up = g2
	}
	p.Done(Result{Outcome: GatewayFailed, Reason: "refused"})
	if got := count(); got[up] != 100 {
		t.Fatalf("%s is down: %v", down, got)
	}
	e, _ := b.Explain(service)
	for _, s := range e.Levels[0].Endpoints {
		if s.Health != proxy.Healthy {
			t.Errorf("a gateway's failure charged %s: %s", s.ID, s.Reason)
		}
	}
	p = mustPick(t, b, PickInfo{})
	p.Done(Result{Outcome: GatewayFailed})
	if got := draw(t, b, 100); got["b1"] != 100 {
		t.Fatalf("both gateways are down: %v", got)
	}
	e, _ = b.Explain(service)
	if s := e.Levels[0].Endpoints[0]; s.Health != proxy.Dead || s.Reason == "" {
		t.Errorf("explain: %+v", s)
	}
	clock.advance(firstBackoff)
	p = mustPick(t, b, PickInfo{})
	if !p.Gateway.IsValid() {
		t.Fatal("no trial of a gateway")
	}
	back := p.Gateway
	p.Done(Result{Status: 200})
	b.Gateway(back, nil)
	clock.advance(11 * time.Second)
	if got := draw(t, b, 100); got["b1"] != 0 {
		t.Fatalf("a gateway is back: %v", got)
	}
	p = mustPick(t, b, PickInfo{})
	p.Done(Result{Outcome: Dead})
	if len(suspects) != 1 || suspects[0] != p.Gateway {
		t.Errorf("suspects %v, want %s", suspects, p.Gateway)
	}
}

func TestLimits(t *testing.T) {
	b, _ := newTest(t, Config{})
	c := clusterOf(endpoints("a", "a1"))
	c.MaxRequests = 20
	b.Update(table(c))
	var open []Pick
	for range 3 {
		open = append(open, mustPick(t, b, PickInfo{Retry: true}))
	}
	if _, err := b.Pick(service, PickInfo{Retry: true}); err != ErrRetryBudget {
		t.Errorf("fourth retry of four requests: %v", err)
	}
	for range 17 {
		open = append(open, mustPick(t, b, PickInfo{}))
	}
	if _, err := b.Pick(service, PickInfo{}); err != ErrOverloaded {
		t.Errorf("request 21 of 20: %v", err)
	}
	open[5].Done(Result{Status: 200})
	open[5].Done(Result{Status: 200})                          // does nothing
	open = append(open, mustPick(t, b, PickInfo{Retry: true})) // 20 % of 20 is 4
	for i := range open {
		open[i].Done(Result{Status: 200})
	}
	if e, _ := b.Explain(service); e.Active != 0 || e.Retries != 0 || e.Levels[0].Endpoints[0].Open != 0 {
		t.Errorf("left over: %+v", e)
	}
	if _, err := b.Pick("nobody", PickInfo{}); err != ErrUnknownCluster {
		t.Errorf("unknown cluster: %v", err)
	}
	b.Update(table(clusterOf()))
	if _, err := b.Pick(service, PickInfo{}); err != ErrNoEndpoints {
		t.Errorf("no endpoints: %v", err)
	}
}

func TestWeightedLocalities(t *testing.T) {
	b, _ := newTest(t, Config{})
	x, y := endpoints("a", "a1", "a2"), endpoints("b", "b1")
	x.Weight, y.Weight = 75, 25
	c := &proxy.Cluster{Name: service, EndpointsReceived: true, WeightedLocality: true,
		Levels: []proxy.Level{{Localities: []proxy.LocalityEndpoints{x, y}}}}
	b.Update(table(c))
	if got := draw(t, b, 10_000); got["b1"] < 2300 || got["b1"] > 2700 {
		t.Errorf("25 %% of the traffic: %v", got)
	}
}

func TestEndpointWeights(t *testing.T) {
	for _, policy := range []string{"", roundRobin} {
		b, _ := newTest(t, Config{})
		l := endpoints("a", "a1", "a2", "a3")
		l.Endpoints[2].Weight = 2
		c := clusterOf(l)
		c.Policy = policy
		b.Update(table(c))
		if got := draw(t, b, 10_000); got["a3"] < 4800 || got["a3"] > 5200 {
			t.Errorf("%q: half of the traffic: %v", policy, got)
		}
	}
}

func TestLeastRequestAvoidsTheBusy(t *testing.T) {
	b, _ := newTest(t, Config{})
	b.Update(table(clusterOf(endpoints("a", "a1", "a2", "a3"))))
	busy := map[string]int{}
	for range 300 {
		p := mustPick(t, b, PickInfo{})
		busy[p.Endpoint.ID]++
		if p.Endpoint.ID != "a1" {
			p.Done(Result{Status: 200})
		}
	}
	if busy["a1"] > 60 {
		t.Errorf("a1 never answers and got %d of 300", busy["a1"])
	}
}

func TestRingHashKeepsKeysInPlace(t *testing.T) {
	b, _ := newTest(t, Config{})
	var ids []string
	for i := range 10 {
		ids = append(ids, fmt.Sprintf("a%d", i))
	}
	c := clusterOf(endpoints("a", ids...))
	c.Policy = ringHash
	b.Update(table(c))
	where := func() map[string]string {
		out := map[string]string{}
		for i := range 500 {
			k := fmt.Sprint("user", i)
			p := mustPick(t, b, PickInfo{Hash: Hash(k)})
			out[k] = p.Endpoint.ID
			p.Done(Result{Status: 200})
		}
		return out
	}
	before := where()
	p := mustPick(t, b, PickInfo{Hash: Hash("user1")})
	p.Done(Result{Outcome: ConnectFailed})
	for k, id := range where() {
		if before[k] != p.Endpoint.ID && id != before[k] {
			t.Errorf("%s moved from %s to %s, but %s died", k, before[k], id, p.Endpoint.ID)
		}
		if id == p.Endpoint.ID {
			t.Errorf("%s goes to the dead %s", k, id)
		}
	}
}

func TestReport(t *testing.T) {
	b, clock := newTest(t, Config{})
	c := clusterOf(endpoints("a", "a1"), endpoints("b", "b1"))
	b.Update(table(c))
	for i := range 100 {
		p := mustPick(t, b, PickInfo{})
		p.Done(Result{Status: 200, Latency: time.Duration(i+1) * time.Millisecond})
	}
	open := mustPick(t, b, PickInfo{})
	clock.advance(5 * time.Second)
	r := b.Report()
	if len(r) != 1 || r[0].Interval != 5*time.Second || len(r[0].Endpoints) != 1 {
		t.Fatalf("report %+v", r)
	}
	l := r[0].Endpoints[0]
	if l.Issued != 101 || l.Succeeded != 100 || l.InProgress != 1 || l.Health != proxy.Healthy {
		t.Errorf("load %+v", l)
	}
	if l.P50 < 50*time.Millisecond || l.P50 > 64*time.Millisecond || l.P99 < 99*time.Millisecond || l.P99 > 132*time.Millisecond {
		t.Errorf("p50 %s, p99 %s of 1 to 100 ms", l.P50, l.P99)
	}
	open.Done(Result{Outcome: ConnectFailed, Retried: true})
	clock.advance(time.Second)
	c2 := clusterOf(endpoints("b", "b1")) // a1 leaves the table: what it did is still told
	b.Update(table(c2))
	r = b.Report()
	if len(r) != 1 || len(r[0].Endpoints) == 0 {
		t.Fatalf("report %+v", r)
	}
	i := slices.IndexFunc(r[0].Endpoints, func(l proxy.EndpointLoad) bool { return l.Endpoint.ID == "a1" })
	if i < 0 {
		t.Fatalf("a1 is not reported: %+v", r)
	}
	l = r[0].Endpoints[i]
	if l.Failed != 1 || l.Retried != 1 || l.Health != proxy.Dead || l.Reason == "" || !slices.Contains(kinds(l.Events), "first_failure a1") {
		t.Errorf("load %+v", l)
	}
	if r = b.Report(); len(r) != 0 {
		t.Errorf("nothing has happened: %+v", r)
	}
}
