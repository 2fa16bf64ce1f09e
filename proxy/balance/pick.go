package balance

import (
	"cmp"
	"errors"
	"math"
	"math/bits"
	"net/netip"
	"slices"
	"sort"
	"time"

	"github.com/cespare/xxhash/v2"

	"github.com/hanse-mesh/hanse/proxy"
)

// Errors of Pick. The caller answers 503 and names them.
var (
	ErrUnknownCluster = errors.New("no such xDS cluster in the table")
	ErrNoEndpoints    = errors.New("no endpoints")
	ErrOverloaded     = errors.New("circuit breaker: too many open requests")
	ErrRetryBudget    = errors.New("retry budget is used up")
)

// PickInfo is what a pick depends on. The zero value is a first try without hash.
type PickInfo struct {
	Hash    uint64   // ring_hash: Hash of the header's value; 0 is none
	Exclude []string // endpoint IDs already tried; used again only where nothing else is left
	Only    string   // the ID of the one endpoint that will do, healthy or not, unless it is excluded; empty: any
	Retry   bool     // this try counts against the retry budget: set it where the one before may have reached the application
	Silent  bool     // a try before met silence (Pick.Doubt): take who has answered a check lately, or else leave the places where somebody is in doubt, as long as there is another
}

// Hash hashes a header's value for PickInfo. It is never 0.
func Hash(value string) uint64 { return max(1, xxhash.Sum64String(value)) }

// Pick is one try at one endpoint. Call Done once when it is over.
type Pick struct {
	Endpoint *proxy.Endpoint
	Gateway  netip.AddrPort // dial it, with Endpoint.SNI; zero: dial Endpoint.Address
	Level    int

	c     *cluster
	h     *host
	g     *gateway
	retry bool
}

// Outcome says how a try ended.
type Outcome int

// Outcomes. Whose failure it is decides whose health suffers.
const (
	Responded     Outcome = iota // an answer came: Status and GRPC say which
	Canceled                     // the caller went away: says nothing about the endpoint
	ConnectFailed                // no connection to the endpoint, or, behind a gateway, the gateway said so (TLS alert)
	GatewayFailed                // no connection to the gateway itself
	Dead                         // the hop connection was lost or answers no PING
	Refused                      // the endpoint takes no new streams (REFUSED_STREAM, GOAWAY)
	Reset                        // the stream broke after the request was sent
	TimedOut                     // no answer within the time for one try
)

// Result is how a try ended.
type Result struct {
	Outcome Outcome
	Status  int           // HTTP
	GRPC    int           // gRPC status; 0 for OK and where it is not gRPC
	Latency time.Duration // to the end of the answer's head
	Retried bool          // it failed, and is tried again elsewhere
	Reason  string        // of a failure, in words, for explain
}

// state is one immutable reading of a cluster: who may be used, and how much.
type state struct {
	def    *proxy.Cluster
	levels []level
	trials []*candidate // dead, or behind dead gateways, and due to be tried
}

type level struct {
	share
	cumulated  uint32 // of loads, up to this level
	all        []candidate
	usable     []bool // of all
	localities []hostSet
	ring       ring
}

// candidate is an endpoint as the table has it, with its health's owner.
type candidate struct {
	endpoint *proxy.Endpoint
	host     *host
	gateways []*gateway
	level    int
	rank     uint64 // among the endpoints that a proxy may use
}

// hostSet is what a pick draws from.
type hostSet struct {
	cumulated uint64 // of localities' effective weights
	members   []*candidate
	weights   []uint64 // cumulated; nil where all are equal
}

// Pick chooses an endpoint of an xDS cluster.
func (b *Balancer) Pick(name string, info PickInfo) (Pick, error) {
	c := (*b.clusters.Load())[name]
	if c == nil {
		return Pick{}, ErrUnknownCluster
	}
	now := b.clock()
	if now >= c.due.Load() {
		c.refresh(now)
	}
	s := c.state.Load()
	active := c.active.Add(1)
	if active > int64(s.def.MaxRequests) {
		c.active.Add(-1)
		c.dropped.Add(1)
		return Pick{}, ErrOverloaded
	}
	if info.Retry {
		budget := max(int64(s.def.RetryBudget.MinConcurrency), active*int64(s.def.RetryBudget.Percent)/100)
		if c.retries.Add(1) > budget {
			c.retries.Add(-1)
			c.active.Add(-1)
			c.refusedRetries.Add(1)
			return Pick{}, ErrRetryBudget
		}
	}
	var chosen *candidate
	var through *gateway
	if info.Only != "" {
		chosen = s.only(&info)
	} else {
		if !info.Silent {
			chosen, through = s.trial(b, now, info.Exclude)
		}
		if chosen == nil {
			chosen = s.choose(c, now, b.rand(), b.rand(), &info)
		}
	}
	if chosen == nil {
		c.active.Add(-1)
		if info.Retry {
			c.retries.Add(-1)
		}
		return Pick{}, ErrNoEndpoints
	}
	chosen.host.open.Add(1)
	chosen.host.issued.Add(1)
	p := Pick{Endpoint: chosen.endpoint, Level: chosen.level, c: c, h: chosen.host, retry: info.Retry}
	if len(chosen.gateways) > 0 {
		if through == nil {
			through = b.pickGateway(chosen.gateways, c.turn.Add(1), now, s.def.ConnectTimeout)
		}
		p.g, p.Gateway = through, through.addr
	}
	return p, nil
}

// only finds the one endpoint that is asked for.
func (s *state) only(info *PickInfo) *candidate {
	if slices.Contains(info.Exclude, info.Only) {
		return nil
	}
	for i := range s.levels {
		for j := range s.levels[i].all {
			if m := &s.levels[i].all[j]; m.endpoint.ID == info.Only {
				return m
			}
		}
	}
	return nil
}

// choose draws a level, a locality and an endpoint. Where all of that level are to be avoided, the other levels follow in order; where all of all
// are, one reason after the other is dropped.
func (s *state) choose(c *cluster, now int64, r1, r2 uint64, info *PickInfo) *candidate {
	at := uint32(scale(r1, 100))
	if info.Hash != 0 && s.def.Policy == ringHash {
		at = uint32(info.Hash % 100)
	}
	first := 0
	for first < len(s.levels)-1 && at >= s.levels[first].cumulated {
		first++
	}
	if first >= len(s.levels) {
		return nil
	}
	doubted := false
	if len(info.Exclude) == 0 && !info.Silent { // the usual first try
		m := s.levels[first].choose(c, s.def.Policy, r1, r2, info.Hash, nil)
		if doubted = m != nil && m.host.doubt.on(now); m != nil && !doubted {
			return m
		}
	}
	a := s.avoid(now, info)
	if !info.Silent {
		if m := s.levels[first].choose(c, s.def.Policy, r1, r2, info.Hash, &a); m != nil {
			return m
		}
		a.unheard = doubted // the whole level is
	}
	for {
		if m := s.levels[first].choose(c, s.def.Policy, r1, r2, info.Hash, &a); m != nil {
			return m
		}
		for i := range s.levels {
			if m := s.levels[i].choose(c, s.def.Policy, r1, r2, info.Hash, &a); m != nil {
				return m
			}
		}
		if a.onlyTried() {
			if m := s.refusing(a.tried); m != nil {
				return m
			}
		}
		if !a.relax() {
			return nil
		}
	}
}

// refusing is somebody not tried who took no requests a while ago, as one that drains does. He may take them again, and says at once if not; those
// who are left have just failed.
func (s *state) refusing(tried []string) *candidate {
	for i := range s.levels {
		for j := range s.levels[i].all {
			m := &s.levels[i].all[j]
			if m.host.refusing.Load() && m.host.dead.down.Load() && !m.endpoint.Draining && !m.endpoint.Unhealthy && !m.gatewaysDown() && !slices.Contains(tried, m.endpoint.ID) {
				return m
			}
		}
	}
	return nil
}

func (l *level) choose(c *cluster, policy string, r1, r2, hash uint64, a *avoid) *candidate {
	if policy == ringHash && hash != 0 {
		return l.ring.find(hash, l, a)
	}
	if len(l.localities) == 0 {
		return nil
	}
	from := 0
	if n := len(l.localities); n > 1 {
		at := scale(bits.RotateLeft64(r1, 32)*0x9e3779b97f4a7c15, l.localities[n-1].cumulated)
		from = sort.Search(n-1, func(i int) bool { return l.localities[i].cumulated > at })
	}
	for i := range l.localities {
		if m := l.localities[(from+i)%len(l.localities)].choose(c, policy, r2, a); m != nil {
			return m
		}
	}
	return nil
}

func (s *hostSet) choose(c *cluster, policy string, r uint64, a *avoid) *candidate {
	var m *candidate
	if policy == roundRobin {
		m = s.turn(c.turn.Add(1))
	} else {
		m = s.lesser(r)
	}
	if m == nil || !a.has(m) {
		return m
	}
	start := int(scale(r, uint64(len(s.members))))
	for i := range s.members {
		if m = s.members[(start+i)%len(s.members)]; !a.has(m) {
			return m
		}
	}
	return nil
}

// lesser draws two by weight and takes the one with fewer open requests for its weight.
func (s *hostSet) lesser(r uint64) *candidate {
	n := uint64(len(s.members))
	if n == 0 {
		return nil
	}
	if n == 1 {
		return s.members[0]
	}
	hi, lo := r>>32, r&math.MaxUint32
	if s.weights == nil {
		i := hi * n >> 32
		j := lo * (n - 1) >> 32
		if j >= i {
			j++
		}
		a, b := s.members[i], s.members[j]
		if b.host.open.Load() < a.host.open.Load() {
			return b
		}
		return a
	}
	i, j := s.at(scale(hi<<32, s.total())), s.at(scale(lo<<32, s.total()))
	a, b := s.members[i], s.members[j]
	if uint64(b.host.open.Load())*s.weight(i) < uint64(a.host.open.Load())*s.weight(j) {
		return b
	}
	return a
}

// turn takes members one after the other; by weight, in a sequence that spreads each one's turns.
func (s *hostSet) turn(n uint64) *candidate {
	switch {
	case len(s.members) == 0:
		return nil
	case s.weights == nil:
		return s.members[n%uint64(len(s.members))]
	}
	return s.members[s.at(scale(n*0x9e3779b97f4a7c15, s.total()))] // multiples of the golden ratio fill [0, 1) evenly
}

func (s *hostSet) total() uint64 { return s.weights[len(s.weights)-1] }

func (s *hostSet) weight(i int) uint64 {
	if i == 0 {
		return s.weights[0]
	}
	return s.weights[i] - s.weights[i-1]
}

func (s *hostSet) at(x uint64) int {
	lo, hi := 0, len(s.weights)-1
	for lo < hi {
		if mid := (lo + hi) / 2; s.weights[mid] > x {
			hi = mid
		} else {
			lo = mid + 1
		}
	}
	return lo
}

// trial lets one request through to somebody dead whose time out is over and who is not probed, through the gateway (if not nil) that
// it is to try.
func (s *state) trial(b *Balancer, now int64, exclude []string) (*candidate, *gateway) {
	for _, m := range s.trials {
		if b.probe != nil && !m.host.refusing.Load() || slices.Contains(exclude, m.endpoint.ID) {
			continue
		}
		if block, g := m.blocker(now); block.try(now, s.def.ConnectTimeout) {
			return m, g
		}
	}
	return nil, nil
}

// pickGateway takes the gateways that are up and not in doubt in turn, then any that is up, and one that is due to be tried; where there is neither, the one whose failure is longest ago: a call that has just lost the last
// one tries another, which may be back.
func (b *Balancer) pickGateway(gs []*gateway, turn uint64, now int64, connectTimeout time.Duration) *gateway {
	n := uint64(len(gs))
	for i := range n {
		if g := gs[(turn+i)%n]; !g.down.Load() && !g.doubt.on(now) {
			return g
		}
	}
	for i := range n {
		g := gs[(turn+i)%n]
		if !g.down.Load() || b.probe == nil && g.try(now, connectTimeout) {
			return g
		}
	}
	return slices.MinFunc(gs, func(x, y *gateway) int { return cmp.Compare(x.failed.Load(), y.failed.Load()) })
}

// scale maps a uniform 64-bit number to [0, n).
func scale(r, n uint64) uint64 {
	hi, _ := bits.Mul64(r, n)
	return hi
}

// ring is a consistent-hash ring over all members of a level, so that health changes do not move what is healthy.
type ring []ringPoint

type ringPoint struct {
	hash  uint64
	index int // in level.all
}

// minRing is Envoy's default minimum_ring_size.
const minRing = 1024

func newRing(all []candidate, weights []uint64) ring {
	var total uint64
	for _, w := range weights {
		total += w
	}
	if total == 0 {
		return nil
	}
	size := max(minRing, uint64(len(all)))
	r := make(ring, 0, size+uint64(len(all)))
	var key []byte
	for i := range all {
		n := (weights[i]*size + total - 1) / total
		for j := range n {
			key = append(key[:0], all[i].endpoint.ID...)
			key = append(key, '_', byte(j), byte(j>>8), byte(j>>16))
			r = append(r, ringPoint{xxhash.Sum64(key), i})
		}
	}
	sort.Slice(r, func(i, j int) bool { return r[i].hash < r[j].hash })
	return r
}

func (r ring) find(hash uint64, l *level, a *avoid) *candidate {
	if len(r) == 0 {
		return nil
	}
	start := sort.Search(len(r), func(i int) bool { return r[i].hash >= hash })
	for i := range r {
		k := r[(start+i)%len(r)].index
		if l.usable[k] && !a.has(&l.all[k]) {
			return &l.all[k]
		}
	}
	return nil
}
