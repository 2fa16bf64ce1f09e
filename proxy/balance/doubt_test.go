package balance

import (
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hanse-mesh/hanse/proxy"
)

// addressed gives the endpoints of a cluster addresses and IDs, by which connections know them.
func addressed(c *proxy.Cluster) *proxy.Cluster {
	next := netip.MustParseAddr("10.0.0.1")
	for _, l := range c.Levels {
		for _, loc := range l.Localities {
			for _, e := range loc.Endpoints {
				e.Address, e.SPIFFEID = netip.AddrPortFrom(next, 15008), "spiffe://west.test/ns/shop/sa/payments"
				next = next.Next()
			}
		}
	}
	return c
}

// doubts is what the hop says of connections to endpoints.
func doubts(t *testing.T, b *Balancer, doubtful bool, ids ...string) {
	t.Helper()
	for _, id := range ids {
		m := (*b.clusters.Load())[service].state.Load().only(&PickInfo{Only: id})
		if m == nil {
			t.Fatalf("no endpoint %s", id)
		}
		b.Doubt(m.endpoint.Address, m.endpoint.SPIFFEID, netip.AddrPort{}, doubtful)
	}
}

// drawSilent is where retries after a silence go.
func drawSilent(t *testing.T, b *Balancer, tried ...string) map[string]int {
	t.Helper()
	got := map[string]int{}
	for range 100 {
		p := mustPick(t, b, PickInfo{Exclude: tried, Silent: true})
		got[p.Endpoint.ID]++
		p.Done(Result{Status: 200})
	}
	return got
}

func only(got map[string]int, ids ...string) bool {
	for id := range got {
		if !slices.Contains(ids, id) {
			return false
		}
	}
	return len(got) > 0
}

func TestDoubtIsPassedOver(t *testing.T) {
	for _, policy := range []string{"", roundRobin, ringHash} {
		b, clock := newTest(t, Config{})
		c := addressed(clusterOf(endpoints("a", "a1", "a2"), endpoints("b", "b1")))
		c.Policy = policy
		b.Update(table(c))
		doubts(t, b, true, "a1")
		if got := draw(t, b, 100); got["a2"] != 100 {
			t.Errorf("%s: a1 is in doubt: %v", policy, got)
		}
		if e, _ := b.Explain(service); e.Levels[0].Load != 100 || e.Levels[0].Health != 100 {
			t.Errorf("%s: one doubt has changed levels: %+v", policy, e.Levels)
		}
		doubts(t, b, true, "a2")
		if got := draw(t, b, 100); got["b1"] != 100 {
			t.Errorf("%s: all of a is in doubt: %v", policy, got)
		}
		doubts(t, b, true, "b1")
		if got := draw(t, b, 100); !only(got, "a1", "a2") {
			t.Errorf("%s: all are in doubt, so that it does not matter: %v", policy, got)
		}
		doubts(t, b, false, "a1")
		if got := draw(t, b, 100); got["a1"] != 100 {
			t.Errorf("%s: a1 has answered: %v", policy, got)
		}
		clock.advance(doubtFor)
		if got := draw(t, b, 100); got["a2"] == 0 || !only(got, "a1", "a2") {
			t.Errorf("%s: no doubt lasts: %v", policy, got)
		}
	}
}

// TestRetryAfterSilenceLeavesThePlace, where nobody there has been heard since; and stays where there is no other.
func TestRetryAfterSilenceLeavesThePlace(t *testing.T) {
	b, _ := newTest(t, Config{})
	b.Update(table(clusterOf(endpoints("a", "a1", "a2", "a3"), endpoints("b", "b1"))))
	silent := func(exclude ...string) Pick {
		p := mustPick(t, b, PickInfo{Exclude: exclude, Silent: len(exclude) > 0})
		p.Doubt(Dead)
		return p
	}
	p := silent()
	first := p.Endpoint.ID
	if got := drawSilent(t, b, first); got["b1"] != 100 {
		t.Errorf("after the silence of %s: %v", first, got)
	}
	if got := draw(t, b, 100); got[first] > 0 || got["b1"] > 0 {
		t.Errorf("one silence moves no first try: %v", got)
	}
	p.Done(Result{Outcome: Dead})
	q := silent(first)
	q.Done(Result{Outcome: Dead})
	if q.Endpoint.ID != "b1" {
		t.Fatalf("%s was picked", q.Endpoint.ID)
	}
	if got := drawSilent(t, b, first, "b1"); got[first]+got["b1"] > 0 {
		t.Errorf("nobody is left elsewhere, but of a: %v", got)
	}
}

// TestOneSilentEndpointMovesNobody: its neighbours answer, and so take its calls, retries too. It is found dead without a call.
func TestOneSilentEndpointMovesNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := running(t, Config{Probe: newWorld("a2", "a3", "b1").probe})
		b.Update(table(addressed(clusterOf(endpoints("a", "a1", "a2", "a3"), endpoints("b", "b1")))))
		doubts(t, b, true, "a1")
		time.Sleep(time.Millisecond)
		if got := draw(t, b, 100); !only(got, "a2", "a3") {
			t.Errorf("first tries: %v", got)
		}
		time.Sleep(750 * time.Millisecond)
		if got := drawSilent(t, b, "a1"); !only(got, "a2", "a3") {
			t.Errorf("retries: %v", got)
		}
		time.Sleep(doubtFor)
		e, _ := b.Explain(service)
		for _, s := range slices.Concat(e.Levels[0].Endpoints, e.Levels[1].Endpoints) {
			if (s.Health == proxy.Dead) != (s.ID == "a1") { // no call has told
				t.Errorf("%s is %s: %s", s.ID, s.Health, s.Reason)
			}
		}
	})
}

// TestSilentClusterIsLeftAtOnce: where a whole cluster is silent, the doubt of one endpoint is enough to know, before its calls are given up, that the
// next place is silent too; and it stays known.
func TestSilentClusterIsLeftAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := running(t, Config{Probe: newWorld("c1").probe})
		b.Update(table(addressed(clusterOf(endpoints("a", "a1", "a2"), endpoints("b", "b1", "b2"), endpoints("c", "c1")))))
		doubts(t, b, true, "a1", "a2")
		time.Sleep(time.Millisecond)
		if got := draw(t, b, 100); got["c1"] != 100 {
			t.Errorf("at once, when only c1 has answered: %v", got)
		}
		doubts(t, b, false, "a2")
		if got := draw(t, b, 100); got["a2"] != 100 {
			t.Errorf("a2 has answered: %v", got)
		}
		doubts(t, b, true, "a1")
		time.Sleep(slowCheck + time.Millisecond)
		for what, got := range map[string]map[string]int{"first tries": draw(t, b, 100), "retries": drawSilent(t, b, "a1")} {
			if got["c1"] != 100 {
				t.Errorf("%s: %v", what, got)
			}
		}
		time.Sleep(2 * doubtFor)
		for id := range drawSilent(t, b) {
			if id != "c1" {
				t.Errorf("%s was forgotten to be silent", id)
			}
		}
		e, _ := b.Explain(service)
		for _, s := range e.Levels[0].Endpoints {
			if s.Health != proxy.Dead {
				t.Errorf("%s is %s: %s", s.ID, s.Health, s.Reason)
			}
		}
	})
}

// TestScoutsAreFew: a doubt in a large service asks some of each place, and not again while it lasts.
func TestScoutsAreFew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		var places []proxy.LocalityEndpoints
		for _, zone := range []string{"a", "b"} {
			var ids []string
			for i := range 20 {
				ids = append(ids, zone+string(rune('a'+i)))
				w.set(ids[i], true)
			}
			places = append(places, endpoints(zone, ids...))
		}
		b := running(t, Config{Probe: w.probe})
		b.Update(table(addressed(clusterOf(places...))))
		for range 5 {
			doubts(t, b, true, "aa")
			time.Sleep(100 * time.Millisecond)
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		if n := len(w.seen); n < 2*scouts || n > 2*scouts+1 { // and aa
			t.Errorf("%d of 40 were asked, want %d", n, 2*scouts+1)
		}
	})
}

// TestGatewayInDoubt: connections through a gateway owe answers. Others go by another until it has been looked at, and a retry after a silence does
// not go to whom only it leads to.
func TestGatewayInDoubt(t *testing.T) {
	g1, g2 := netip.MustParseAddrPort("192.0.2.1:15443"), netip.MustParseAddrPort("192.0.2.2:15443")
	var suspects []netip.AddrPort
	b, _ := newTest(t, Config{SuspectGateway: func(g netip.AddrPort) { suspects = append(suspects, g) }})
	far, farther := endpoints("f", "f1", "f2"), endpoints("g", "g1")
	for _, e := range append(slices.Clone(far.Endpoints), farther.Endpoints...) {
		e.Gateways = []netip.AddrPort{g1, g2}
	}
	farther.Endpoints[0].Gateways = []netip.AddrPort{g1}
	c := addressed(clusterOf(far, farther, endpoints("h", "h1")))
	b.Update(table(c))
	b.Doubt(far.Endpoints[0].Address, far.Endpoints[0].SPIFFEID, g1, true)
	if len(suspects) != 1 || suspects[0] != g1 {
		t.Errorf("suspects %v", suspects)
	}
	through := func() map[netip.AddrPort]int {
		got := map[netip.AddrPort]int{}
		for range 100 {
			p := mustPick(t, b, PickInfo{})
			got[p.Gateway]++
			p.Done(Result{Status: 200})
		}
		return got
	}
	if got := through(); got[g2] != 100 {
		t.Errorf("g1 is in doubt: %v", got)
	}
	if got := drawSilent(t, b, "f1"); got["h1"] != 100 {
		t.Errorf("a retry: %v", got)
	}
	b.Gateway(g1, nil)
	if got := through(); got[g1] == 0 || got[g2] == 0 {
		t.Errorf("g1 was found well: %v", got)
	}
	if got := drawSilent(t, b, "f1"); got["g1"] != 100 {
		t.Errorf("a retry, while g1 is well: %v", got)
	}
	p := mustPick(t, b, PickInfo{})
	p.Doubt(GatewayFailed)
	if q := mustPick(t, b, PickInfo{}); q.Gateway == p.Gateway || q.Gateway == (netip.AddrPort{}) {
		t.Errorf("%s cannot be reached, and is dialled again", p.Gateway)
	}
}
