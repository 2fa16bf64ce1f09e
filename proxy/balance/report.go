package balance

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/hanse-mesh/hanse/proxy"
)

// eventPause is between two first failures of an endpoint that is never ejected. The others bound memory: events, and endpoints of
// an xDS cluster that are gone and not reported yet.
const (
	eventPause = 10 * time.Second
	ringSize   = 4096
	maxGone    = 1024
)

// eventRing keeps the last events.
type eventRing struct {
	mu     sync.Mutex
	events []proxy.Event // guarded by mu; the newest is number next-1
	next   uint64        // guarded by mu
}

func (r *eventRing) add(e proxy.Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.events) < ringSize {
		r.events = append(r.events, e)
	} else {
		r.events[r.next%ringSize] = e
	}
	r.next++
}

func (r *eventRing) last() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.next
}

// after returns the events from number from on, as far as they are still kept, and the number to go on with.
func (r *eventRing) after(from uint64) (out []proxy.Event, next uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if oldest := r.next - uint64(len(r.events)); from < oldest {
		from = oldest
	}
	for ; from < r.next; from++ {
		out = append(out, r.events[from%ringSize])
	}
	return out, r.next
}

func (b *Balancer) event(now int64, cluster, endpoint string, kind proxy.EventKind, detail string) {
	b.events.add(proxy.Event{Time: b.time(now), Cluster: cluster, Endpoint: endpoint, Kind: kind, Detail: detail})
	b.kick()
}

// Events returns the last events, oldest first: those not before since.
func (b *Balancer) Events(since time.Time) []proxy.Event {
	all, _ := b.events.after(0)
	return slices.DeleteFunc(all, func(e proxy.Event) bool { return e.Time.Before(since) })
}

// Report returns what has happened since the Report before. Endpoints of which there is nothing to say are left out.
func (b *Balancer) Report() []proxy.ClusterLoad {
	var out []proxy.ClusterLoad
	clusters := *b.clusters.Load()
	for _, name := range slices.Sorted(maps.Keys(clusters)) {
		if l := clusters[name].report(); len(l.Endpoints) > 0 || l.Dropped > 0 {
			out = append(out, l)
		}
	}
	return out
}

func (c *cluster) report() proxy.ClusterLoad {
	now := c.b.clock()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.rebuild(now, "")
	out := proxy.ClusterLoad{Cluster: c.name, Interval: time.Duration(now - c.reportedAt), Dropped: c.dropped.Load() - c.reportedDrops}
	c.reportedAt, c.reportedDrops = now, c.reportedDrops+out.Dropped
	events := map[string][]proxy.Event{}
	fresh, next := c.b.events.after(c.reportedEvent)
	for _, e := range fresh {
		if e.Cluster == c.name {
			events[e.Endpoint] = append(events[e.Endpoint], e)
		}
	}
	c.reportedEvent = next
	loose := events[""] // of the cluster: they ride on the first endpoint
	s := c.state.Load()
	add := func(m *candidate) {
		es := append(loose, events[m.endpoint.ID]...)
		if l, ok := m.report(c.b, es); ok {
			out.Endpoints = append(out.Endpoints, l)
			loose = nil
		}
	}
	for i := range s.levels {
		for j := range s.levels[i].all {
			add(&s.levels[i].all[j])
		}
	}
	for i := range c.gone {
		add(&c.gone[i])
	}
	c.gone = slices.DeleteFunc(c.gone, func(m candidate) bool { return m.host.open.Load() == 0 })
	return out
}

func (m *candidate) report(b *Balancer, events []proxy.Event) (proxy.EndpointLoad, bool) {
	h := m.host
	n := counts{h.issued.Load(), h.ok.Load(), h.failed.Load(), h.retried.Load()}
	health, reason, since := m.health(b)
	l := proxy.EndpointLoad{
		Endpoint: m.endpoint, Level: m.level, Health: health, Reason: reason, Since: since, Events: events,
		Issued: n.issued - h.reported.issued, Succeeded: n.ok - h.reported.ok, Failed: n.failed - h.reported.failed,
		Retried: n.retried - h.reported.retried, InProgress: uint64(max(0, h.open.Load())),
	}
	quiet := n == h.reported && l.InProgress == 0 && health == proxy.Healthy && cmp.Or(h.reportedAs, proxy.Healthy) == health && len(events) == 0
	if quiet {
		return l, false
	}
	seen := h.latency.read()
	l.P50, l.P99 = seen.quantile(&h.reportedFrom, 0.50), seen.quantile(&h.reportedFrom, 0.99)
	h.reported, h.reportedAs, h.reportedFrom = n, health, seen
	return l, true
}

// health says in words what counts most.
func (m *candidate) health(b *Balancer) (proxy.Health, string, time.Time) {
	h := m.host
	switch {
	case h.dead.down.Load():
		return proxy.Dead, h.reason, b.time(h.since)
	case m.gatewaysDown():
		b.mu.Lock()
		defer b.mu.Unlock()
		g := m.gateways[0]
		reason := fmt.Sprintf("no gateway of %d can be reached (%s: %s)", len(m.gateways), g.addr, g.reason)
		return proxy.Dead, reason, b.time(g.since)
	case h.ejected:
		return proxy.Ejected, h.reason, b.time(h.since)
	}
	return proxy.Healthy, h.reason, b.time(h.since)
}

// Explanation is the effective state of one xDS cluster.
type Explanation struct {
	Cluster  string         `json:"cluster"`
	Policy   string         `json:"policy"`
	Received bool           `json:"endpointsReceived"`
	Active   int64          `json:"activeRequests"`
	Retries  int64          `json:"activeRetries"`
	Levels   []LevelState   `json:"levels"`
	Gateways []GatewayState `json:"gateways,omitempty"`
}

// LevelState is one level of it.
type LevelState struct {
	Health    uint32          `json:"healthPercent"` // with overprovisioning
	Load      uint32          `json:"loadPercent"`
	Panic     bool            `json:"panic,omitempty"`
	Endpoints []EndpointState `json:"endpoints"`
}

// EndpointState is one endpoint of a level.
type EndpointState struct {
	ID       string         `json:"id"`
	Address  netip.AddrPort `json:"address"`
	Cluster  string         `json:"cluster"`
	Region   string         `json:"region,omitempty"`
	Zone     string         `json:"zone,omitempty"`
	SPIFFEID string         `json:"spiffeID,omitempty"`
	Health   proxy.Health   `json:"health"`
	Reason   string         `json:"reason,omitempty"` // of the health
	Rank     string         `json:"rank,omitempty"`   // why this level
	Since    time.Time      `json:"since"`
	RetryIn  time.Duration  `json:"retryIn,omitempty"` // until it is tried again
	Suspect  bool           `json:"suspect,omitempty"`
	Draining bool           `json:"draining,omitempty"`
	NotReady bool           `json:"notReady,omitempty"` // the control plane says so
	Open     int64          `json:"openRequests"`
	Share    float64        `json:"sharePercent"` // of the cluster's traffic, as expected from weights
}

// GatewayState is a gateway that endpoints are reached through.
type GatewayState struct {
	Address netip.AddrPort `json:"address"`
	Up      bool           `json:"up"`
	Reason  string         `json:"reason,omitempty"`
	Since   time.Time      `json:"since"`
}

// Explain says where the traffic of an xDS cluster goes and why. It is false where there is no such cluster.
func (b *Balancer) Explain(name string) (Explanation, bool) {
	c := (*b.clusters.Load())[name]
	if c == nil {
		return Explanation{}, false
	}
	now := b.clock()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.rebuild(now, "")
	s := c.state.Load()
	out := Explanation{
		Cluster: name, Policy: cmp.Or(c.def.Policy, "least_request"), Received: c.def.EndpointsReceived,
		Active: c.active.Load(), Retries: c.retries.Load(),
	}
	gateways := map[*gateway]bool{}
	for i := range s.levels {
		l := &s.levels[i]
		ls := LevelState{Health: l.health, Load: l.load, Panic: l.panic, Endpoints: []EndpointState{}}
		shares := l.shares()
		for j := range l.all {
			m := &l.all[j]
			e := m.endpoint
			es := EndpointState{
				ID: e.ID, Address: e.Address, Cluster: e.Locality.Cluster, Region: e.Locality.Region, Zone: e.Locality.Zone,
				SPIFFEID: e.SPIFFEID, Rank: e.Reason, Suspect: e.Suspect, Draining: e.Draining, NotReady: e.Unhealthy,
				Open: m.host.open.Load(), Share: math.Round(shares[m]*float64(l.load)*100) / 100,
			}
			es.Health, es.Reason, es.Since = m.health(b)
			switch {
			case es.Health == proxy.Dead:
				block, _ := m.blocker(now)
				es.RetryIn = max(0, time.Duration(block.retryAt.Load()-now))
			case es.Health == proxy.Ejected:
				es.RetryIn = time.Duration(m.host.ejectedUntil - now)
			}
			ls.Endpoints = append(ls.Endpoints, es)
			for _, g := range m.gateways {
				gateways[g] = true
			}
		}
		out.Levels = append(out.Levels, ls)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for g := range gateways {
		out.Gateways = append(out.Gateways, GatewayState{Address: g.addr, Up: !g.down.Load(), Reason: g.reason, Since: b.time(g.since)})
	}
	slices.SortFunc(out.Gateways, func(x, y GatewayState) int { return x.Address.Compare(y.Address) })
	return out, true
}

// shares are the parts of a level's traffic that weights promise.
func (l *level) shares() map[*candidate]float64 {
	out := map[*candidate]float64{}
	if len(l.localities) == 0 {
		return out
	}
	total, before := float64(l.localities[len(l.localities)-1].cumulated), 0.0
	for i := range l.localities {
		set := &l.localities[i]
		part := 1.0
		if total > 0 {
			part = (float64(set.cumulated) - before) / total
		}
		before = float64(set.cumulated)
		for j, m := range set.members {
			if set.weights == nil {
				out[m] = part / float64(len(set.members))
			} else {
				out[m] = part * float64(set.weight(j)) / float64(set.total())
			}
		}
	}
	return out
}

// loads says in words where the traffic goes.
func (s *state) loads() string {
	var parts []string
	for i := range s.levels {
		if s.levels[i].load > 0 {
			parts = append(parts, fmt.Sprintf("%d%% to %s", s.levels[i].load, s.levels[i].name()))
		}
	}
	return strings.Join(parts, ", ")
}

// Clusters returns the names of all xDS clusters, sorted.
func (b *Balancer) Clusters() []string { return slices.Sorted(maps.Keys(*b.clusters.Load())) }

// collector yields metrics from the state at the time of the scrape.
type collector struct{ b *Balancer }

var _ prometheus.Collector = (*collector)(nil)

// Describe sends nothing: the collector is unchecked, as its labels follow the table.
func (*collector) Describe(chan<- *prometheus.Desc) {}

// Collect sends all metrics.
func (m *collector) Collect(ch chan<- prometheus.Metric) {
	endpoints := prometheus.NewDesc("hanse_balance_endpoints", "Endpoints of an xDS cluster by health.", []string{"cluster", "health"}, nil)
	load := prometheus.NewDesc("hanse_balance_level_load_percent", "Share of the traffic that a level gets.", []string{"cluster", "level"}, nil)
	active := prometheus.NewDesc("hanse_balance_active_requests", "Open requests.", []string{"cluster"}, nil)
	dropped := prometheus.NewDesc("hanse_balance_dropped_total", "Requests refused by the circuit breaker.", []string{"cluster"}, nil)
	refused := prometheus.NewDesc("hanse_balance_retries_refused_total", "Retries refused by the retry budget.", []string{"cluster"}, nil)
	ejections := prometheus.NewDesc("hanse_balance_ejections_total", "Endpoints taken out: dead or ejected.", []string{"cluster"}, nil)
	for name, c := range *m.b.clusters.Load() {
		byHealth := map[proxy.Health]int{proxy.Healthy: 0, proxy.Ejected: 0, proxy.Dead: 0}
		c.mu.Lock()
		s := c.state.Load()
		for i := range s.levels {
			for j := range s.levels[i].all {
				h, _, _ := s.levels[i].all[j].health(m.b)
				byHealth[h]++
			}
		}
		c.mu.Unlock()
		for h, n := range byHealth {
			ch <- prometheus.MustNewConstMetric(endpoints, prometheus.GaugeValue, float64(n), name, string(h))
		}
		for i := range s.levels {
			ch <- prometheus.MustNewConstMetric(load, prometheus.GaugeValue, float64(s.levels[i].load), name, fmt.Sprint(i))
		}
		ch <- prometheus.MustNewConstMetric(active, prometheus.GaugeValue, float64(c.active.Load()), name)
		ch <- prometheus.MustNewConstMetric(dropped, prometheus.CounterValue, float64(c.dropped.Load()), name)
		ch <- prometheus.MustNewConstMetric(refused, prometheus.CounterValue, float64(c.refusedRetries.Load()), name)
		ch <- prometheus.MustNewConstMetric(ejections, prometheus.CounterValue, float64(c.ejections.Load()), name)
	}
}
