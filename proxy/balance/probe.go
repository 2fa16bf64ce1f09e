package balance

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"time"
)

// ErrGateway is in the error of a Config.Probe that could not reach the gateway itself.
var ErrGateway = errors.New("gateway cannot be reached")

// maxProbes is how many are under way at once.
const maxProbes = 32

// Run tries dead endpoints and gateways by Config.Probe, until ctx ends. Without Config.Probe it only waits: then requests are let
// through to try.
func (b *Balancer) Run(ctx context.Context) error {
	if b.probe == nil {
		<-ctx.Done()
		return nil
	}
	var running sync.WaitGroup
	defer running.Wait()
	slots := make(chan struct{}, maxProbes)
	tick := time.NewTicker(firstBackoff / 4)
	defer tick.Stop()
	for {
		due, dead := b.dueProbes()
		for _, p := range due {
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
		next := tick.C
		if !dead {
			next = nil // nobody is dead: sleep until somebody is
		}
		select {
		case <-ctx.Done():
			return nil
		case <-b.wake:
		case <-next:
		}
	}
}

// probe is one attempt at somebody dead.
type probe struct {
	c       *cluster
	m       *candidate
	g       *gateway // whose trial it is; nil: the endpoint's
	through netip.AddrPort
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
				if !m.gatewaysDown() && m.host.dead.try(now, s.def.ConnectTimeout) {
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
	limited, cancel := context.WithTimeout(ctx, p.c.state.Load().def.ConnectTimeout+time.Second)
	defer cancel()
	err := b.probe(limited, p.m.endpoint, p.through)
	now := b.clock()
	switch {
	case ctx.Err() != nil: // it says nothing about the endpoint
	case p.g != nil && (err == nil || !errors.Is(err, ErrGateway)): // the gateway did its part
		b.gatewayReturned(p.g)
	case p.g != nil:
		b.gatewayFailed(p.g, now, err.Error())
	case err == nil:
		p.c.forgive(p.m.host)
	default:
		p.c.fail(p.m.host, now, &Result{Outcome: ConnectFailed, Reason: err.Error()})
	}
}
