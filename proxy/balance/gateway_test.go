package balance

import (
	"net/netip"
	"testing"
	"time"
)

// While all gateways are down and none is due, the one that failed longest ago is tried: not the one that a call has just lost.
func TestGatewayThatFailedLongestAgo(t *testing.T) {
	b := &Balancer{}
	first, second := &gateway{addr: netip.MustParseAddrPort("192.0.2.1:15443")}, &gateway{addr: netip.MustParseAddrPort("192.0.2.2:15443")}
	gs := []*gateway{first, second}
	now := int64(time.Hour)
	first.fail(now)
	second.fail(now + 1)
	for turn := range uint64(4) {
		if g := b.pickGateway(gs, turn, now+2, time.Second); g != first {
			t.Errorf("turn %d: %s is tried, which has just failed", turn, g.addr)
		}
	}
	first.fail(now + 3) // in its time out, too
	if g := b.pickGateway(gs, 0, now+4, time.Second); g != second {
		t.Errorf("%s is tried, which has just failed", g.addr)
	}
}
