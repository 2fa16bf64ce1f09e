package balance

import (
	"cmp"
	"context"
	"log/slog"
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cespare/xxhash/v2"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/hanse-mesh/hanse/proxy"
)

// Policies of proxy.Cluster.Policy; everything else is least request.
const (
	roundRobin = "round_robin"
	ringHash   = "ring_hash"
)

// Config is what New needs. Every field may be zero.
type Config struct {
	ID         string           // of this proxy: decides which endpoints of many it uses
	Now        func() time.Time // default time.Now
	Rand       func() uint64    // uniform; default math/rand/v2
	Log        *slog.Logger
	Registerer prometheus.Registerer
	Ramp       time.Duration // over which returned endpoints take their share; default 10 s, negative: none

	// SuspectGateway is called after a connection through a gateway was lost, where the gateway may be the reason. It must not
	// block. Whoever checks answers by Balancer.Gateway.
	SuspectGateway func(netip.AddrPort)

	// Probe, if set, is how Run tries dead endpoints again, so that no request has to: connect to the endpoint, through the
	// gateway unless that is zero, and return nil if it answers. It is called with a deadline.
	Probe func(ctx context.Context, e *proxy.Endpoint, gateway netip.AddrPort) error
}

// Balancer picks endpoints for all xDS clusters of a proxy. It is safe for concurrent use.
type Balancer struct {
	// read-only after New
	id             string
	now            func() time.Time
	rand           func() uint64
	log            *slog.Logger
	start          time.Time
	ramp           int64
	suspectGateway func(netip.AddrPort)
	probe          func(context.Context, *proxy.Endpoint, netip.AddrPort) error
	wake           chan struct{} // of Run: something has happened

	clusters atomic.Pointer[map[string]*cluster]

	updates sync.Mutex
	version uint64 // guarded by updates; of the last table

	mu       sync.Mutex                  // after cluster.mu where both are held
	gateways map[netip.AddrPort]*gateway // guarded by mu

	events eventRing
}

// cluster is one xDS cluster.
type cluster struct {
	b    *Balancer
	name string

	state          atomic.Pointer[state]
	due            atomic.Int64 // clock: when the state must be worked out again
	active         atomic.Int64
	retries        atomic.Int64
	turn           atomic.Uint64
	dropped        atomic.Uint64
	refusedRetries atomic.Uint64
	ejections      atomic.Uint64
	died           atomic.Pointer[proxy.Endpoint] // the last to lose its connection; nil: Run has seen it
	doubted        atomic.Bool                    // somebody is in doubt, and Run has not seen it

	mu sync.Mutex

	// guarded by mu
	def           *proxy.Cluster // defaults filled in
	source        *proxy.Cluster // as the table has it
	hosts         map[string]*host
	gone          []candidate // left the table; still to be reported
	home          string      // where the traffic goes when all is well
	at            string      // where most of it goes while it does not
	shifted       bool
	reportedAt    int64
	reportedDrops uint64
	reportedEvent uint64
}

// New returns a Balancer without clusters.
func New(cfg Config) *Balancer {
	b := &Balancer{
		id: cfg.ID, now: cfg.Now, rand: cfg.Rand, log: cfg.Log, ramp: int64(cfg.Ramp), suspectGateway: cfg.SuspectGateway, probe: cfg.Probe,
		gateways: map[netip.AddrPort]*gateway{}, wake: make(chan struct{}, 1),
	}
	if b.now == nil {
		b.now = time.Now
	}
	if b.rand == nil {
		b.rand = rand.Uint64
	}
	if b.log == nil {
		b.log = slog.New(slog.DiscardHandler)
	}
	if b.ramp == 0 {
		b.ramp = int64(10 * time.Second)
	}
	b.start = b.now()
	b.clusters.Store(&map[string]*cluster{})
	if cfg.Registerer != nil {
		cfg.Registerer.MustRegister(&collector{b})
	}
	return b
}

// clock is monotonic and never 0.
func (b *Balancer) clock() int64 { return int64(b.now().Sub(b.start)) + 1 }

func (b *Balancer) time(at int64) time.Time { return b.start.Add(time.Duration(at - 1)) }

// Update obeys a new table; one that is older than the last does nothing. Health stays with (xDS cluster, endpoint ID). Clusters whose
// pointer is the same are not looked at.
func (b *Balancer) Update(t *proxy.Table) {
	b.updates.Lock()
	defer b.updates.Unlock()
	if t.Version < b.version {
		return
	}
	b.version = t.Version
	old := *b.clusters.Load()
	next := make(map[string]*cluster, len(t.Clusters))
	changed := len(old) != len(t.Clusters)
	now := b.clock()
	for name, def := range t.Clusters {
		c := old[name]
		if c == nil {
			c = &cluster{b: b, name: name, hosts: map[string]*host{}, reportedAt: now, reportedEvent: b.events.last()}
			changed = true
		}
		next[name] = c
		c.mu.Lock()
		if c.source != def {
			c.update(def, now)
			changed = true
		}
		c.mu.Unlock()
	}
	if !changed {
		return
	}
	b.clusters.Store(&next)
	b.sweepGateways(next)
}

// update takes a new definition. Endpoints that bring a level back which had nobody available begin with a ramp.
func (c *cluster) update(def *proxy.Cluster, now int64) {
	first := c.def == nil || !c.def.EndpointsReceived
	c.source, c.def = def, withDefaults(def)
	s := &state{def: c.def, levels: make([]level, len(def.Levels))}
	seen := make(map[string]bool, len(c.hosts))
	for i, dl := range def.Levels {
		l := &s.levels[i]
		served := false
		var fresh []*host
		var weights []uint64
		for _, loc := range dl.Localities {
			for _, e := range loc.Endpoints {
				if seen[e.ID] {
					continue
				}
				seen[e.ID] = true
				h, known := c.hosts[e.ID]
				if !known {
					h = &host{id: e.ID, since: now}
					c.hosts[e.ID] = h
					fresh = append(fresh, h)
				}
				m := candidate{endpoint: e, host: h, level: i, rank: xxhash.Sum64String(c.b.id + "/" + e.ID)}
				for _, addr := range e.Gateways {
					m.gateways = append(m.gateways, c.b.gateway(addr, now))
				}
				served = served || known && m.available()
				l.all = append(l.all, m)
				w := uint64(max(1, e.Weight))
				if def.WeightedLocality {
					w *= uint64(loc.Weight)
				}
				weights = append(weights, w)
			}
		}
		if !first && !served {
			for _, h := range fresh {
				h.returnedAt = now
			}
		}
		if def.Policy == ringHash {
			l.ring = newRing(l.all, weights)
		}
	}
	if old := c.state.Load(); old != nil {
		for i := range old.levels {
			for _, m := range old.levels[i].all {
				if !seen[m.endpoint.ID] {
					c.gone = append(c.gone, m)
					delete(c.hosts, m.endpoint.ID)
				}
			}
		}
	}
	if n := len(c.gone) - maxGone; n > 0 { // nobody reports
		c.gone = slices.Delete(c.gone, 0, n)
	}
	c.build(s, now, "")
}

func withDefaults(def *proxy.Cluster) *proxy.Cluster {
	d := *def
	o := &d.Outlier
	o.ConsecutiveErrors = cmp.Or(o.ConsecutiveErrors, 5)
	o.Interval = cmp.Or(o.Interval, 10*time.Second)
	o.BaseEjection = cmp.Or(o.BaseEjection, 30*time.Second)
	o.MaxEjection = max(cmp.Or(o.MaxEjection, 300*time.Second), o.BaseEjection)
	o.MaxPercent = cmp.Or(o.MaxPercent, 10)
	d.ConnectTimeout = cmp.Or(d.ConnectTimeout, time.Second)
	d.MaxRequests = cmp.Or(d.MaxRequests, 1024)
	d.RetryBudget.Percent = cmp.Or(d.RetryBudget.Percent, 20)
	d.RetryBudget.MinConcurrency = cmp.Or(d.RetryBudget.MinConcurrency, 3)
	d.Overprovisioning = cmp.Or(d.Overprovisioning, 140)
	d.PanicThreshold = cmp.Or(d.PanicThreshold, 50)
	return &d
}

// refresh does what is due by the clock.
func (c *cluster) refresh(now int64) {
	if !c.mu.TryLock() {
		return // somebody does it now; the old state serves until then
	}
	defer c.mu.Unlock()
	if now >= c.due.Load() {
		c.rebuild(now, "")
	}
}

// rebuild works out the state at now, and when that must be done again. cause is the endpoint whose change asked for it.
// c.mu is held.
func (c *cluster) rebuild(now int64, cause string) { c.build(c.state.Load(), now, cause) }

// build makes the state out of the members of old.
func (c *cluster) build(old *state, now int64, cause string) {
	s := &state{def: c.def, levels: make([]level, len(old.levels))}
	due := int64(math.MaxInt64)
	c.due.Store(due) // before reading gateways, so that one that fails from here on is not missed
	healths := make([]levelHealth, len(old.levels))
	for i := range old.levels {
		l := &s.levels[i]
		l.all, l.ring = old.levels[i].all, old.levels[i].ring
		lh := &healths[i]
		lh.hosts = len(l.all)
		for j := range l.all {
			m := &l.all[j]
			h := m.host
			if h.ejected && now >= h.ejectedUntil {
				h.ejected, h.returnedAt, h.since = false, now, now
				h.reason = "returned after ejection"
			}
			if h.ejected {
				due = min(due, h.ejectedUntil)
			}
			if m.useless() {
				lh.dead++
				if block, _ := m.blocker(now); block.down.Load() {
					if now >= block.retryAt.Load() {
						s.trials = append(s.trials, m)
					} else {
						due = min(due, block.retryAt.Load())
					}
				}
			}
			if t := m.tenths(now, c.b.ramp); t > 0 {
				lh.available++
				lh.tenths += t
				if t < rampSteps {
					due = min(due, now+c.b.ramp/rampSteps)
				}
			}
		}
	}
	var cumulated uint32
	for i, sh := range distribute(healths, c.def.Overprovisioning, c.def.PanicThreshold) {
		l := &s.levels[i]
		l.share = sh
		cumulated += sh.load
		l.cumulated = cumulated
		l.build(c, i, healths[i], now)
	}
	c.state.Store(s)
	c.due.Store(min(due, c.due.Load()))
	c.noteShift(s, now, cause)
	if c.b.probe != nil && (due < math.MaxInt64 || len(s.trials) > 0) {
		c.b.kick()
	}
}

// build makes the sets that picks draw from.
func (l *level) build(c *cluster, index int, lh levelHealth, now int64) {
	l.usable = make([]bool, len(l.all))
	place := make(map[string]int, len(l.all)) // of endpoint IDs, in l.all
	for j := range l.all {
		m := &l.all[j]
		place[m.endpoint.ID] = j
		if l.panic {
			l.usable[j] = lh.dead == lh.hosts || !m.useless()
		} else {
			l.usable[j] = m.available()
		}
	}
	limit := maxPerLevel
	if c.def.Policy == ringHash {
		limit = len(l.all) // all proxies must agree
	}
	var whole hostSet
	for _, loc := range c.def.Levels[index].Localities {
		set, hosts, tenths := &whole, 0, 0
		if c.def.WeightedLocality {
			set = &hostSet{}
		}
		for _, e := range loc.Endpoints {
			j, ok := place[e.ID]
			if !ok || l.all[j].endpoint != e {
				continue // named twice: the first counts
			}
			m := &l.all[j]
			t := m.tenths(now, c.b.ramp)
			hosts++
			tenths += t
			if !l.usable[j] {
				continue
			}
			if l.panic || !l.damping {
				t = rampSteps
			}
			set.add(m, uint64(max(1, e.Weight))*uint64(t))
		}
		if !c.def.WeightedLocality || len(set.members) == 0 {
			continue
		}
		set.finish(max(1, limit/len(c.def.Levels[index].Localities)))
		effective := uint64(loc.Weight) * 100
		if !l.panic && hosts > 0 {
			effective = uint64(loc.Weight) * min(100, uint64(c.def.Overprovisioning)*uint64(tenths)/uint64(rampSteps*hosts))
		}
		if n := len(l.localities); n > 0 {
			effective += l.localities[n-1].cumulated
		}
		set.cumulated = effective
		l.localities = append(l.localities, *set)
	}
	if len(whole.members) > 0 {
		whole.finish(limit)
		whole.cumulated = 1
		l.localities = []hostSet{whole}
	}
}

func (s *hostSet) add(m *candidate, weight uint64) {
	if n := len(s.weights); n > 0 {
		weight += s.weights[n-1]
	}
	s.members = append(s.members, m)
	s.weights = append(s.weights, weight)
}

// maxPerLevel is how many endpoints of a level one proxy uses, and keeps connections to. Which ones differs between proxies, so that all are
// used; where one of them fails, one other takes its place.
const maxPerLevel = 32

// finish leaves the members of highest rank, and drops weights that say nothing.
func (s *hostSet) finish(limit int) {
	if len(s.members) > limit {
		ranks := make([]uint64, len(s.members))
		for i, m := range s.members {
			ranks[i] = m.rank
		}
		slices.Sort(ranks)
		least := ranks[len(ranks)-limit]
		var few hostSet
		for i, m := range s.members {
			if m.rank >= least {
				few.add(m, s.weight(i))
			}
		}
		s.members, s.weights = few.members, few.weights
	}
	for i := range s.weights {
		if s.weight(i) != s.weights[0] {
			return
		}
	}
	s.weights = nil
}

// noteShift tells when the traffic leaves the place where it goes when all is well, moves on, and comes back.
func (c *cluster) noteShift(s *state, now int64, cause string) {
	primary := 0
	for i := range s.levels {
		if s.levels[i].load > s.levels[primary].load {
			primary = i
		}
	}
	if len(s.levels) == 0 || len(s.levels[primary].all) == 0 {
		return
	}
	at := s.levels[primary].name()
	if c.home == "" {
		c.home = at
	}
	well := at == c.home && s.levels[primary].load == 100
	switch {
	case well && c.shifted:
		c.shifted = false
		c.b.event(now, c.name, cause, proxy.Returned, "all traffic to "+at)
	case !well && (!c.shifted || at != c.at && at != c.home):
		c.shifted = true
		c.b.event(now, c.name, cause, proxy.Shifted, "from "+c.home+": "+s.loads())
	}
	c.at = at
}

// name says where a level is.
func (l *level) name() string {
	var names []string
	for i := range l.all {
		loc := l.all[i].endpoint.Locality
		if n := loc.Cluster + "/" + loc.Region + "/" + loc.Zone; !slices.Contains(names, n) {
			names = append(names, n)
			if len(names) > 3 {
				names[3] = "…"
				break
			}
		}
	}
	slices.Sort(names)
	return strings.Join(names, "+")
}

// gateway returns the one of an address. now begins its life where it is new.
func (b *Balancer) gateway(addr netip.AddrPort, now int64) *gateway {
	b.mu.Lock()
	defer b.mu.Unlock()
	g := b.gateways[addr]
	if g == nil {
		g = &gateway{addr: addr, since: now}
		b.gateways[addr] = g
	}
	return g
}

// sweepGateways forgets gateways that nobody is behind.
func (b *Balancer) sweepGateways(clusters map[string]*cluster) {
	used := map[*gateway]bool{}
	for _, c := range clusters {
		for _, l := range c.state.Load().levels {
			for i := range l.all {
				for _, g := range l.all[i].gateways {
					used[g] = true
				}
			}
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for addr, g := range b.gateways {
		if !used[g] {
			delete(b.gateways, addr)
		}
	}
}

// Gateway says what a check of a gateway found: nil, or why it is not to be used.
func (b *Balancer) Gateway(addr netip.AddrPort, err error) {
	b.mu.Lock()
	g := b.gateways[addr]
	b.mu.Unlock()
	switch {
	case g == nil:
	case err != nil:
		b.gatewayFailed(g, b.clock(), err.Error())
	case g.down.Load():
		b.gatewayReturned(g)
	default:
		g.doubt.end()
	}
}

func (b *Balancer) gatewayFailed(g *gateway, now int64, reason string) {
	b.mu.Lock()
	wasUp, changed := g.fail(now)
	if changed {
		g.reason = reason
	}
	if wasUp {
		g.since = now
	}
	b.mu.Unlock()
	if wasUp {
		b.log.Warn("gateway cannot be reached", "gateway", g.addr, "reason", reason)
	}
	if changed {
		b.gatewayChanged(g, now)
	}
}

func (b *Balancer) gatewayReturned(g *gateway) {
	now := b.clock()
	g.doubt.end()
	b.mu.Lock()
	wasDown := g.recover()
	if wasDown {
		g.returnedAt.Store(now)
		g.since, g.reason = now, "returned"
	}
	b.mu.Unlock()
	if wasDown {
		b.log.Info("gateway can be reached again", "gateway", g.addr)
		b.gatewayChanged(g, now)
	}
}

// kick wakes Run.
func (b *Balancer) kick() {
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

// gatewayChanged works out every cluster behind g anew.
func (b *Balancer) gatewayChanged(g *gateway, now int64) {
	for _, c := range *b.clusters.Load() {
		c.mu.Lock() // also waits for an update that has not seen the change
		if cause := c.state.Load().behind(g); cause != "" {
			c.rebuild(now, cause)
		}
		c.mu.Unlock()
	}
}

// behind returns an endpoint that is reached through g, or "".
func (s *state) behind(g *gateway) string {
	for i := range s.levels {
		for j := range s.levels[i].all {
			if slices.Contains(s.levels[i].all[j].gateways, g) {
				return s.levels[i].all[j].endpoint.ID
			}
		}
	}
	return ""
}
