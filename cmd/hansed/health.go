package main

import (
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/hanse-mesh/hanse/cmd/internal/drill"
	"github.com/hanse-mesh/hanse/cmd/internal/explain"
	"github.com/hanse-mesh/hanse/discovery/xdsserver"
)

// healthMemory is how long what a proxy has reported of an endpoint is believed after its last report.
const healthMemory = 30 * time.Second

// healthBook is what the proxies' load reports say of endpoints.
type healthBook struct {
	now func() time.Time

	mu   sync.Mutex
	seen map[healthKey]map[string]observation // guarded by mu; by proxy ID
}

type healthKey struct{ authority, endpoint string }

type observation struct {
	at            time.Time
	state, reason string
}

func newHealthBook(now func() time.Time) *healthBook {
	return &healthBook{now: now, seen: map[healthKey]map[string]observation{}}
}

// Note takes in a report. It returns the drill samples in it, and the clusters whose data path it shows to work.
func (b *healthBook) Note(r xdsserver.Report) (samples []drill.Sample, alive []string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, c := range r.Clusters {
		for _, e := range c.Endpoints {
			if e.ID == "" {
				continue
			}
			k := healthKey{c.Authority, e.ID}
			if b.seen[k] == nil {
				b.seen[k] = map[string]observation{}
			}
			b.seen[k][r.Viewer.ID] = observation{r.Time, e.Health, e.Reason}
			s := drill.Sample{Time: r.Time, Caller: r.Viewer.ID, Service: c.Service, Endpoint: e.ID, Cluster: e.Locality.Cluster, Zone: e.Locality.Zone,
				OK: e.Succeeded, Errors: e.Failed, Retried: e.Retried, P50: e.P50, P99: e.P99}
			for _, ev := range e.Events {
				s.Events = append(s.Events, drill.Event{Time: ev.Time, Kind: ev.Kind, Detail: ev.Detail})
			}
			samples = append(samples, s)
			if e.Succeeded > 0 && e.Locality.Cluster != r.Viewer.Cluster && !slices.Contains(alive, e.Locality.Cluster) {
				alive = append(alive, e.Locality.Cluster)
			}
		}
	}
	return samples, alive
}

// Sweep forgets what is too old to be believed.
func (b *healthBook) Sweep() {
	b.mu.Lock()
	defer b.mu.Unlock()
	old := b.now().Add(-healthMemory)
	for k, by := range b.seen {
		for id, o := range by {
			if o.at.Before(old) {
				delete(by, id)
			}
		}
		if len(by) == 0 {
			delete(b.seen, k)
		}
	}
}

// Of returns what proxy says of an endpoint as a backend of authority; where it says nothing, or proxy is "", the worst that any proxy says.
func (b *healthBook) Of(proxy, authority, endpoint string) explain.Health {
	b.mu.Lock()
	defer b.mu.Unlock()
	old := b.now().Add(-healthMemory)
	by := b.seen[healthKey{authority, endpoint}]
	if o, ok := by[proxy]; ok && o.at.After(old) {
		return explain.Health{State: o.state, Reason: o.reason}
	}
	var worst explain.Health
	for _, o := range by {
		if o.at.After(old) && badness(o.state) > badness(worst.State) {
			worst = explain.Health{State: o.state, Reason: o.reason}
		}
	}
	return worst
}

// Worst is the worst that any proxy says of an endpoint, under whatever authority.
func (b *healthBook) Worst(endpoint string, authorities []string) string {
	worst := ""
	for _, a := range authorities {
		if h := b.Of("", a, endpoint); badness(h.State) > badness(worst) {
			worst = h.State
		}
	}
	return worst
}

func badness(state string) int {
	return slices.Index([]string{"", "healthy", "ejected", "dead"}, state)
}

// addrPorts renders addresses for people.
func addrPorts(as []netip.AddrPort) []string {
	out := make([]string, len(as))
	for i, a := range as {
		out[i] = a.String()
	}
	return out
}
