package balance

import (
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"github.com/hanse-mesh/hanse/proxy"
)

// A doubt is ended by an answer, by what Done says, or by time: longer than it takes to notice a black hole. Who has answered a check is
// above suspicion for as long as the call is waiting that made somebody ask.
const (
	doubtFor  = 3 * time.Second
	heardFor  = 2 * time.Second
	askAgain  = heardFor / 2
	slowCheck = 250 * time.Millisecond // a check that takes longer is a doubt
	scouts    = 3                      // of each place are asked when somebody is in doubt
)

// doubt is of a party that owes an answer for longer than is usual. It is neither dead nor ejected, and levels do not count it: it is passed
// over while there are others.
type doubt struct{ until atomic.Int64 } // clock

func (d *doubt) begin(now int64)   { d.until.Store(now + int64(doubtFor)) }
func (d *doubt) end()              { d.until.Store(0) }
func (d *doubt) on(now int64) bool { u := d.until.Load(); return u != 0 && u > now }

// hear notes the answer to a check.
func (h *host) hear(now int64) {
	h.heard.Store(now)
	h.doubt.end()
}

func (h *host) heardWithin(d time.Duration, now int64) bool {
	heard := h.heard.Load()
	return heard != 0 && now-heard < int64(d)
}

// Doubt says that a connection to an endpoint, through the gateway unless that is zero, owes an answer for longer than is usual, or
// (false) that it has answered. It may be called at any time, and does not block.
func (b *Balancer) Doubt(address netip.AddrPort, spiffeID string, gateway netip.AddrPort, doubtful bool) {
	now := b.clock()
	for _, c := range *b.clusters.Load() {
		s := c.state.Load()
		for i := range s.levels {
			for j := range s.levels[i].all {
				m := &s.levels[i].all[j]
				if m.endpoint.Address != address || m.endpoint.SPIFFEID != spiffeID {
					continue
				}
				if !doubtful {
					m.host.doubt.end()
					continue
				}
				m.host.doubt.begin(now)
				c.doubted.Store(true)
			}
		}
	}
	b.kick()
	if !gateway.IsValid() {
		return
	}
	b.mu.Lock()
	g := b.gateways[gateway]
	b.mu.Unlock()
	switch {
	case g == nil:
	case !doubtful:
		g.doubt.end()
	case b.suspectGateway != nil: // whoever checks it ends the doubt
		g.doubt.begin(now)
		b.suspectGateway(gateway)
	}
}

// Doubt says, before Done, that the try has met silence, so that a pick before Done knows it.
func (p *Pick) Doubt(o Outcome) {
	switch {
	case p.c == nil:
	case o == GatewayFailed && p.g != nil:
		p.g.doubt.begin(p.c.b.clock())
	default:
		p.h.doubt.begin(p.c.b.clock())
	}
}

// avoid is whom a pick passes over while there are others; nil: nobody.
type avoid struct {
	tried   []string         // endpoint IDs
	now     int64            // clock, by which doubts are on; 0: they do not matter
	silent  bool             // so do doubts of gateways, and places
	places  []proxy.Locality // where somebody is in doubt
	unheard bool             // who has not answered a check lately
}

// avoid begins with all there is to avoid.
func (s *state) avoid(now int64, info *PickInfo) avoid {
	a := avoid{tried: info.Exclude, now: now, silent: info.Silent, unheard: info.Silent}
	if !info.Silent {
		return a
	}
	for i := range s.levels {
		for j := range s.levels[i].all {
			m := &s.levels[i].all[j]
			if m.host.doubt.on(now) && !slices.Contains(a.places, m.endpoint.Locality) {
				a.places = append(a.places, m.endpoint.Locality)
			}
		}
	}
	return a
}

// relax drops the least of the reasons to avoid somebody. It is false where there is none left.
func (a *avoid) relax() bool {
	switch {
	case a.unheard:
		a.unheard = false
	case a.silent:
		a.silent = false
	case a.now != 0:
		a.now = 0
	case len(a.tried) > 0:
		a.tried = nil
	default:
		return false
	}
	return true
}

// onlyTried reports whether all reasons are dropped but that somebody was tried.
func (a *avoid) onlyTried() bool { return !a.unheard && !a.silent && a.now == 0 && len(a.tried) > 0 }

func (a *avoid) has(m *candidate) bool {
	switch {
	case a == nil:
		return false
	case a.now != 0 && m.host.doubt.on(a.now), slices.Contains(a.tried, m.endpoint.ID):
		return true
	case a.unheard:
		return !m.host.heardWithin(heardFor, a.now)
	}
	return a.silent && (slices.Contains(a.places, m.endpoint.Locality) || m.gatewaysDoubtful(a.now))
}

// gatewaysDoubtful reports whether none of the gateways to m is above suspicion.
func (m *candidate) gatewaysDoubtful(now int64) bool {
	for _, g := range m.gateways {
		if !g.down.Load() && !g.doubt.on(now) {
			return false
		}
	}
	return len(m.gateways) > 0
}

// scouts are a few of each place, asked while somebody is in doubt: before a call that waits for him is given up, it is known where it may go. He is
// asked too, so that his end is noticed where no call begins or ends with it: those of long streams and tunnels do not tell.
func (b *Balancer) scouts() (out []probe) {
	now := b.clock()
	for _, c := range *b.clusters.Load() {
		if !c.doubted.Swap(false) {
			continue
		}
		s := c.state.Load()
		known := map[proxy.Locality]int{} // who was heard lately, or is being asked
		for i := range s.levels {
			for _, set := range s.levels[i].localities {
				for _, m := range set.members {
					if m.host.heardWithin(askAgain, now) {
						known[m.endpoint.Locality]++
					}
				}
				first := int(scale(b.rand(), uint64(len(set.members))))
				for k := range set.members {
					m := set.members[(first+k)%len(set.members)]
					doubtful := m.host.doubt.on(now)
					if !m.available() || !doubtful && (known[m.endpoint.Locality] >= scouts || m.host.heardWithin(askAgain, now)) {
						continue
					}
					if !doubtful {
						known[m.endpoint.Locality]++
					}
					if m.host.asked.CompareAndSwap(false, true) {
						out = append(out, b.check(c, m, true))
					}
				}
			}
		}
	}
	return out
}
