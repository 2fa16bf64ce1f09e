package balance

import (
	"fmt"
	"math/bits"
	"net/http"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/hanse-mesh/hanse/proxy"
)

// Times and counts that no policy sets.
const (
	firstBackoff    = time.Second // before somebody dead is tried again
	maxBackoff      = 10 * time.Second
	refusals        = 2 // in a row make an endpoint dead: it drains
	rampSteps       = 10
	grpcUnavailable = 14
)

// backoff is a dead party's way back: the time out doubles, and one trial at a time is let through.
type backoff struct {
	down    atomic.Bool
	trying  atomic.Bool  // a trial's result is out
	retryAt atomic.Int64 // clock; meaningful while down
	failed  atomic.Int64 // clock: the last failure

	// guarded by the owner's mu
	failures int
}

// fail begins the time out, or lengthens it after a failed trial. It reports whether the party was up, and whether anything
// changed: many requests may lose one connection.
func (o *backoff) fail(now int64) (wasUp, changed bool) {
	o.failed.Store(now)
	tried := o.trying.Swap(false)
	if o.down.Load() && !tried {
		return false, false
	}
	wait := firstBackoff << min(o.failures, 10)
	o.failures++
	o.retryAt.Store(now + int64(min(wait, maxBackoff)))
	return !o.down.Swap(true), true
}

// recover reports whether the party was down.
func (o *backoff) recover() bool {
	o.failures = 0
	o.trying.Store(false)
	return o.down.Swap(false)
}

// try takes the trial, if one is due. While its result is out, for at most the time to connect and to notice a black hole, there is
// no second one.
func (o *backoff) try(now int64, connectTimeout time.Duration) bool {
	at := o.retryAt.Load()
	if !o.down.Load() || now < at || !o.retryAt.CompareAndSwap(at, now+int64(connectTimeout+3*time.Second)) {
		return false
	}
	o.trying.Store(true)
	return true
}

// host is the health of one (xDS cluster, endpoint ID), and what it has done.
type host struct {
	id string

	open    atomic.Int64
	issued  atomic.Uint64
	ok      atomic.Uint64
	failed  atomic.Uint64
	retried atomic.Uint64
	latency histogram
	uneasy  atomic.Bool // a success must take the lock: something is to be forgiven
	doubt   doubt
	heard   atomic.Int64 // clock: the last answer to a check; 0: none
	asked   atomic.Bool  // a scout is under way

	dead     backoff     // its failures are guarded by cluster.mu
	refusing atomic.Bool // dead because it refuses requests, of which a probe knows nothing

	// guarded by cluster.mu
	errors       int // answers in a row
	refused      int // in a row
	ejections    int // how often in a row, for base × n
	ejectedUntil int64
	ejected      bool
	returnedAt   int64 // begin of the ramp; 0: none
	returning    bool  // no success since it was dead or ejected
	firstFailure int64 // time of the last event of that kind; 0: none
	reason       string
	since        int64 // of health and reason

	// guarded by cluster.mu: what the last report said
	reported     counts
	reportedAs   proxy.Health
	reportedFrom buckets
}

type counts struct{ issued, ok, failed, retried uint64 }

// gateway is the health of one gateway address, for all clusters behind it.
type gateway struct {
	addr netip.AddrPort
	backoff
	doubt      doubt
	returnedAt atomic.Int64

	// guarded by Balancer.mu
	reason string
	since  int64
}

// isFailure reports whether a response counts against an endpoint.
func (r *Result) isFailure() bool {
	switch r.Status {
	case http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return true
	}
	return r.GRPC == grpcUnavailable
}

func (r *Result) describe() string {
	var s string
	switch r.Outcome {
	case Responded:
		if r.GRPC != 0 {
			return fmt.Sprintf("gRPC status %d", r.GRPC)
		}
		return fmt.Sprintf("HTTP status %d", r.Status)
	case ConnectFailed:
		s = "connection failed"
	case GatewayFailed:
		s = "connection to the gateway failed"
	case Dead:
		s = "connection lost"
	case Refused:
		s = "takes no new requests"
	case Reset:
		s = "stream reset"
	case TimedOut:
		s = "no answer in time"
	}
	if r.Reason != "" {
		s += ": " + r.Reason
	}
	return s
}

// Done ends the try. A second call does nothing.
func (p *Pick) Done(r Result) {
	c, h := p.c, p.h
	if c == nil {
		return
	}
	p.c = nil
	h.open.Add(-1)
	c.active.Add(-1)
	if p.retry {
		c.retries.Add(-1)
	}
	switch {
	case r.Outcome == Canceled:
		return
	case r.Outcome == Responded && !r.isFailure():
		h.ok.Add(1)
		h.latency.add(r.Latency)
		p.reached(c, true)
		return
	}
	if r.Retried {
		h.retried.Add(1)
	}
	h.failed.Add(1)
	if r.Outcome == Responded {
		h.latency.add(r.Latency)
		p.reached(c, false)
	}
	now := c.b.clock()
	switch r.Outcome {
	case GatewayFailed:
		if p.g == nil {
			c.fail(h, now, &r)
			return
		}
		if !p.g.down.Load() {
			c.b.event(now, c.name, h.id, proxy.FirstFailure, r.describe()+" "+p.g.addr.String())
		}
		c.b.gatewayFailed(p.g, now, r.describe())
	case Dead, ConnectFailed:
		if !h.dead.down.Load() {
			c.died.Store(p.Endpoint)
		}
		c.fail(h, now, &r)
		if r.Outcome == Dead && p.g != nil && c.b.suspectGateway != nil {
			c.b.suspectGateway(p.g.addr)
		}
	default:
		c.fail(h, now, &r)
	}
}

// Connected says, before Done, that the endpoint has accepted the stream: it is not dead, nor is its gateway. Call it for streams
// that may stay open long. How the endpoint answers is for Done to say.
func (p *Pick) Connected() {
	if p.c != nil {
		p.reached(p.c, false)
	}
}

// reached ends what a failure began; all of it where the answer was good, too.
func (p *Pick) reached(c *cluster, good bool) {
	if p.g != nil && p.g.down.Load() {
		c.b.gatewayReturned(p.g)
	}
	if p.h.dead.down.Load() || good && p.h.uneasy.Load() {
		c.forgive(p.h, good)
	}
}

// forgive brings a dead endpoint back; a good answer also ends a row of bad ones.
func (c *cluster) forgive(h *host, good bool) {
	now := c.b.clock()
	h.doubt.end()
	c.mu.Lock()
	defer c.mu.Unlock()
	back := h.dead.recover()
	if back {
		h.refused, h.returnedAt, h.since, h.reason = 0, now, now, "was dead: "+h.reason
		if c.hosts[h.id] == h {
			c.rebuild(now, h.id)
		}
	}
	if good {
		h.errors, h.refused = 0, 0
	}
	if h.returning && !h.ejected && (good || back) {
		h.returning, h.firstFailure = false, 0
		c.b.event(now, c.name, h.id, proxy.Returned, "first success; "+h.reason)
	}
	h.uneasy.Store(h.ejected || h.returning || h.errors+h.refused > 0)
}

// fail counts a failure and takes the host out where it is due.
func (c *cluster) fail(h *host, now int64, r *Result) {
	c.mu.Lock()
	defer c.mu.Unlock()
	h.uneasy.Store(true)
	if c.hosts[h.id] != h {
		return // it has left the table
	}
	if h.firstFailure == 0 || now-h.firstFailure > int64(eventPause) {
		h.firstFailure = now
		c.b.event(now, c.name, h.id, proxy.FirstFailure, r.describe())
	}
	switch r.Outcome {
	case Refused:
		if h.refused++; h.refused < refusals && !h.dead.down.Load() {
			return
		}
		fallthrough
	case ConnectFailed, Dead, GatewayFailed:
		wasUp, changed := h.dead.fail(now)
		if !changed {
			return
		}
		h.returning, h.reason = true, r.describe()
		h.refusing.Store(r.Outcome == Refused)
		if wasUp {
			h.since = now
			c.b.event(now, c.name, h.id, proxy.EventEjected, h.reason)
			c.ejections.Add(1)
		}
		c.rebuild(now, h.id)
		return
	}
	if h.errors++; h.ejected || h.errors < int(c.def.Outlier.ConsecutiveErrors) || !c.mayEject(h) {
		return
	}
	o := &c.def.Outlier
	if h.returnedAt > 0 && !h.returning {
		h.ejections = max(0, h.ejections-int((now-h.returnedAt)/int64(o.Interval)))
	}
	h.ejections++
	out := min(time.Duration(h.ejections)*o.BaseEjection, o.MaxEjection)
	h.ejected, h.returning, h.ejectedUntil, h.since = true, true, now+int64(out), now
	h.reason = fmt.Sprintf("%d failures in a row (%s), out for %s", h.errors, r.describe(), out)
	h.errors = 0
	c.b.event(now, c.name, h.id, proxy.EventEjected, h.reason)
	c.ejections.Add(1)
	c.rebuild(now, h.id)
}

// mayEject holds ejections to a percentage of the level, unless a lower level has somebody healthy.
func (c *cluster) mayEject(h *host) bool {
	s := c.state.Load()
	at := -1
	for i := range s.levels {
		l := &s.levels[i]
		if at >= 0 && l.health > 0 {
			return true
		}
		out, here := 1, false
		for j := range l.all {
			if l.all[j].host.ejected {
				out++
			}
			here = here || l.all[j].host == h
		}
		if !here {
			continue
		}
		at = i
		if 100*out <= len(l.all)*int(c.def.Outlier.MaxPercent) || out == 1 {
			return true
		}
	}
	return false
}

// tenths is a host's share of full availability: 0 while it is out, 1 to 10 on its ramp.
func (m *candidate) tenths(now, ramp int64) int {
	if !m.available() {
		return 0
	}
	from := m.host.returnedAt
	if len(m.gateways) > 0 {
		oldest := int64(-1)
		for _, g := range m.gateways {
			if at := g.returnedAt.Load(); !g.down.Load() && (oldest < 0 || at < oldest) {
				oldest = at
			}
		}
		from = max(from, oldest)
	}
	if from <= 0 || ramp <= 0 || now-from >= ramp {
		return rampSteps
	}
	return 1 + int((now-from)*(rampSteps-1)/ramp)
}

func (m *candidate) available() bool {
	return !m.endpoint.Draining && !m.endpoint.Unhealthy && !m.host.ejected && !m.host.dead.down.Load() && !m.gatewaysDown()
}

// useless is what even panic avoids: facts, where Envoy would not tell them from judgements.
func (m *candidate) useless() bool {
	return m.endpoint.Draining || m.endpoint.Unhealthy || m.host.dead.down.Load() || m.gatewaysDown()
}

func (m *candidate) gatewaysDown() bool {
	for _, g := range m.gateways {
		if !g.down.Load() {
			return false
		}
	}
	return len(m.gateways) > 0
}

// blocker is whose trial it takes to bring m back: its own, or that of one of its gateways (then not nil).
func (m *candidate) blocker(now int64) (*backoff, *gateway) {
	if !m.gatewaysDown() || m.host.dead.down.Load() && m.host.dead.retryAt.Load() > now {
		return &m.host.dead, nil
	}
	next := m.gateways[0]
	for _, g := range m.gateways {
		if g.retryAt.Load() < next.retryAt.Load() {
			next = g
		}
	}
	return &next.backoff, next
}

// histogram counts latencies: four buckets an octave, from 1 µs to 67 s.
type histogram [octaves * 4]atomic.Uint32

type buckets [octaves * 4]uint32

const octaves = 27

func (h *histogram) add(d time.Duration) {
	h[bucket(uint64(max(1, d.Microseconds())))].Add(1)
}

func bucket(us uint64) int {
	octave := bits.Len64(us) - 1
	quarter := int(us<<2>>octave) & 3
	return min(octave*4+quarter, octaves*4-1)
}

// bound is a bucket's upper end.
func bound(i int) time.Duration {
	octave, quarter := i/4, i%4
	return time.Duration((uint64(1)<<octave)*uint64(5+quarter)/4) * time.Microsecond
}

func (h *histogram) read() (b buckets) {
	for i := range h {
		b[i] = h[i].Load()
	}
	return b
}

// quantile is an upper bound of the q-quantile of what came after before; 0 where nothing did.
func (b *buckets) quantile(before *buckets, q float64) time.Duration {
	var n uint64
	for i := range b {
		n += uint64(b[i] - before[i])
	}
	if n == 0 {
		return 0
	}
	rank, seen := uint64(q*float64(n-1)), uint64(0)
	for i := range b {
		if seen += uint64(b[i] - before[i]); seen > rank {
			return bound(i)
		}
	}
	return bound(len(b) - 1)
}
