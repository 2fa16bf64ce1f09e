package balance

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// ErrGateway is in the error of a Config.Probe that could not reach the gateway itself.
var ErrGateway = errors.New("gateway cannot be reached")

// maxProbes is how many are under way at once.
const maxProbes = 32

// Run logs what happens to endpoints, and with Config.Probe tries dead ones again and looks after the neighbours of one that has
// just died, until ctx ends. Without Config.Probe requests are let through to try.
func (b *Balancer) Run(ctx context.Context) error {
	var running sync.WaitGroup
	defer running.Wait()
	slots := make(chan struct{}, maxProbes)
	tick := time.NewTicker(firstBackoff / 4)
	defer tick.Stop()
	logged := b.events.last()
	for {
		logged = b.logEvents(logged)
		next := tick.C
		if b.probe != nil {
			due, dead := b.dueProbes()
			for _, p := range slices.Concat(due, b.neighbours(), b.scouts()) {
				select {
				case slots <- struct{}{}:
				case <-ctx.Done():
					return nil
				}
				running.Go(func() {
					defer func() { <-slots }()
					p.run(ctx)
				})
			}
			if !dead {
				next = nil // sleep until somebody is
			}
		} else {
			next = nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-b.wake:
		case <-next:
		}
	}
}

func (b *Balancer) logEvents(from uint64) (next uint64) {
	events, next := b.events.after(from)
	for _, e := range events {
		b.log.Info("endpoint health", "event", string(e.Kind), "xdsCluster", e.Cluster, "endpoint", e.Endpoint, "detail", e.Detail, "at", e.Time)
	}
	return next
}

// neighbours are the endpoints beside one that has died: in the same place, or behind the same gateway. In a black hole they are dead too, and
// nobody has noticed where no request is open.
func (b *Balancer) neighbours() (out []probe) {
	for _, c := range *b.clusters.Load() {
		dead := c.died.Swap(nil)
		if dead == nil {
			continue
		}
		s := c.state.Load()
		for i := range s.levels {
			for j := range s.levels[i].all {
				m := &s.levels[i].all[j]
				if m.host.id == dead.ID || !m.available() || m.endpoint.Locality != dead.Locality && !common(m.endpoint.Gateways, dead.Gateways) {
					continue
				}
				out = append(out, b.check(c, m, false))
			}
		}
	}
	return out
}

// check is a look at an endpoint that is thought to be well.
func (b *Balancer) check(c *cluster, m *candidate, scout bool) probe {
	p := probe{c: c, m: m, check: true, scout: scout}
	if len(m.gateways) > 0 {
		p.g = b.pickGateway(m.gateways, c.turn.Add(1), b.clock(), 0)
		p.through = p.g.addr
	}
	return p
}

func common(a, b []netip.AddrPort) bool {
	return slices.ContainsFunc(a, func(x netip.AddrPort) bool { return slices.Contains(b, x) })
}

// probe is one attempt at somebody dead.
type probe struct {
	c       *cluster
	m       *candidate
	g       *gateway // whose trial it is; nil: the endpoint's
	through netip.AddrPort
	check   bool // nobody's trial: the endpoint is thought to be well
	scout   bool // a check because of a doubt only: it has more time
}

// dueProbes takes the trials that are due, and says whether anybody is dead at all.
func (b *Balancer) dueProbes() (due []probe, dead bool) {
	now := b.clock()
	for _, c := range *b.clusters.Load() {
		if now >= c.due.Load() {
			c.refresh(now)
		}
		s := c.state.Load()
		for i := range s.levels {
			for j := range s.levels[i].all {
				m := &s.levels[i].all[j]
				for _, g := range m.gateways {
					if g.down.Load() {
						dead = true
						if g.try(now, s.def.ConnectTimeout) {
							due = append(due, probe{c: c, m: m, g: g, through: g.addr})
						}
					}
				}
				if !m.host.dead.down.Load() {
					continue
				}
				dead = true
				if !m.gatewaysDown() && !m.host.refusing.Load() && m.host.dead.try(now, s.def.ConnectTimeout) {
					p := probe{c: c, m: m}
					if len(m.gateways) > 0 {
						p.through = b.pickGateway(m.gateways, c.turn.Add(1), now, 0).addr
					}
					due = append(due, p)
				}
			}
		}
	}
	return due, dead
}

func (p *probe) run(ctx context.Context) {
	b := p.c.b
	limit := p.c.state.Load().def.ConnectTimeout
	if !p.check || p.scout {
		limit += time.Second
	}
	limited, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	began := b.clock()
	if p.check {
		slow := time.AfterFunc(slowCheck, func() {
			if p.m.host.heard.Load() < began {
				p.m.host.doubt.begin(b.clock())
			}
		})
		defer slow.Stop()
	}
	err := b.probe(limited, p.m.endpoint, p.through)
	if p.scout {
		p.m.host.asked.Store(false)
	}
	now := b.clock()
	switch {
	case ctx.Err() != nil: // it says nothing about the endpoint
	case p.check && err == nil:
		p.m.host.hear(now)
		if p.g != nil {
			p.g.doubt.end()
		}
	case p.check && !errors.Is(err, ErrGateway):
		p.c.fail(p.m.host, now, &Result{Outcome: ConnectFailed, Reason: err.Error()})
	case p.g != nil && (err == nil || !errors.Is(err, ErrGateway)): // the gateway did its part
		b.gatewayReturned(p.g)
	case p.g != nil:
		b.gatewayFailed(p.g, now, err.Error())
	case err == nil:
		p.c.forgive(p.m.host, false)
	default:
		p.c.fail(p.m.host, now, &Result{Outcome: ConnectFailed, Reason: err.Error()})
	}
}
