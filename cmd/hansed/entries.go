package main

import (
	"context"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/identity/onspire"
	"github.com/hanse-mesh/hanse/identity/spiretypes"
)

// entryKeeper keeps the registration entries that the workloads of discovered services need, where hansed is the issuer.
type entryKeeper struct {
	p     *controlPlane
	nodes *types.Entry // what the node agents of Kubernetes are called together; nil: there are none
	want  chan *discovery.Snapshot
	stays *lingering
}

// retryEntries is how often entries are compared again without a change: one that a person deleted is made anew.
const retryEntries = 30 * time.Second

// nodesID is the parent of what SPIRE's agents on Kubernetes nodes get.
func nodesID(td spiffeid.TrustDomain) spiffeid.ID {
	return spiffeid.RequireFromSegments(td, "hanse", "nodes")
}

// openEntries sets the keeper up. Entries are templates of the configuration; with node agents and no templates they are those of Kubernetes.
func (p *controlPlane) openEntries() error {
	i := &p.cfg.Identity
	templates := slices.Clone(i.Entries)
	k := &entryKeeper{p: p, want: make(chan *discovery.Snapshot, 1), stays: newLingering(i.Linger.Duration)}
	if len(i.Kubernetes.NodeAgents) > 0 {
		k.nodes = &types.Entry{Id: onspire.IDPrefix + "nodes", SpiffeId: spiretypes.FromID(nodesID(p.td)), ParentId: spiretypes.FromID(identity.SPIREServerID(p.td)),
			Selectors: []*types.Selector{{Type: "k8s_psat", Value: "cluster:" + i.Kubernetes.Cluster}}}
		if len(templates) == 0 {
			templates = []SPIREEntry{{Parent: nodesID(p.td).String(), Selectors: []string{"k8s:ns:{{.Namespace}}", "k8s:sa:{{.ServiceAccount}}"}}}
		}
	}
	cfg := *p.cfg
	cfg.Identity.SPIRE = SPIRE{Entries: templates}
	var err error
	if p.workloads, err = newRegistrar(&cfg, p.log.With("part", "entries")); err != nil {
		return err
	}
	p.entries = k
	return nil
}

// set is told of a new Snapshot. It has one caller.
func (k *entryKeeper) set(s *discovery.Snapshot) {
	select {
	case <-k.want:
	default:
	}
	k.want <- s
}

// run writes while this replica leads, until ctx ends.
func (k *entryKeeper) run(ctx context.Context) error {
	var want []onspire.Entry
	known := false
	for {
		wait := retryEntries
		term, end, leads := k.p.replicas.during(ctx)
		if known && leads {
			p, now := k.p, time.Now()
			all, next := k.stays.entries(want, now)
			if k.nodes != nil {
				all[k.nodes.Id] = k.nodes
			}
			var list []*types.Entry
			for _, e := range all {
				list = append(list, e)
			}
			changed, err := p.spire.Keep(term, onspire.IDPrefix, list)
			switch {
			case term.Err() != nil:
			case err != nil:
				p.log.Warn("not all entries of discovered workloads could be kept; tried again", "part", "entries", "err", err)
				wait = time.Second
			case changed > 0:
				p.log.Info("entries of discovered workloads changed", "part", "entries", "changed", changed, "entries", len(list))
			}
			if next > 0 {
				wait = min(wait, next)
			}
		}
		end()
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case s := <-k.want:
			want, known = k.p.workloads.entries(s), true
		case <-timer.C:
		}
		timer.Stop()
	}
}

// lingering remembers what was wanted, for a workload that is only restarted.
type lingering struct {
	linger time.Duration
	last   map[string]*lingered // by entry ID
}

type lingered struct {
	entry *types.Entry
	at    time.Time
}

func newLingering(d time.Duration) *lingering {
	return &lingering{linger: d, last: map[string]*lingered{}}
}

// entries are those wanted now and those wanted until recently, by ID, and in how long the first of the latter goes (0: there is none).
func (l *lingering) entries(want []onspire.Entry, now time.Time) (out map[string]*types.Entry, next time.Duration) {
	for _, e := range want {
		r := e.Registration()
		l.last[r.Id] = &lingered{r, now}
	}
	out = map[string]*types.Entry{}
	for id, x := range l.last {
		if left := x.at.Add(l.linger).Sub(now); x.at.Equal(now) || left > 0 {
			out[id] = x.entry
			if !x.at.Equal(now) && (next == 0 || left < next) {
				next = left
			}
			continue
		}
		delete(l.last, id)
	}
	return out, next
}
