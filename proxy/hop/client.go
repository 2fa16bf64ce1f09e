package hop

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/proxy/http2"
	"github.com/hanse-mesh/hanse/proxy/message"
	"github.com/hanse-mesh/hanse/proxy/sock"
)

// Peer is an endpoint as the hop dials it.
type Peer struct {
	ID             string // endpoint ID, for logs
	Address        netip.AddrPort
	Gateway        netip.AddrPort // dialled instead of Address unless zero
	SNI            string         // "<id>.endpoint.hanse"
	SPIFFEID       string         // the only ID accepted
	ConnectTimeout time.Duration
}

// ClientConfig configures a Client. Only Source is required.
type ClientConfig struct {
	Source         *identity.Source
	Dial           func(ctx context.Context, network, address string) (net.Conn, error) // nil: net.Dialer
	ConnectTimeout time.Duration                                                        // TCP and TLS together, where Peer has none; default 1 s
	PingAfter      time.Duration                                                        // silence with open streams before a PING; default 1 s
	DeadAfter      time.Duration                                                        // silence that ends a connection; default 2 s
	IdleClose      time.Duration                                                        // default 90 s
	MaxConns       int                                                                  // per peer; default: one per thread in use, at most 4, and a few more for bulk or where all are full
	Log            *slog.Logger
	Metrics        prometheus.Registerer
}

// Client owns the outgoing connections of one process. It is safe for concurrent use.
type Client struct {
	cfg     ClientConfig
	metrics clientMetrics

	ctx    context.Context // ends with Run
	cancel context.CancelFunc
	dials  sync.WaitGroup

	doubt func(Peer, bool) // set before Run

	share atomic.Int32 // connections for small streams

	mu     sync.Mutex // held to change pools
	closed bool       // guarded by mu
	pools  atomic.Pointer[map[poolKey]*pool]
	lately [64]atomic.Pointer[found] // by port: comparing costs less than hashing
}

// found is a pool that was found in pools.
type found struct {
	in  *map[poolKey]*pool
	key poolKey
	p   *pool
}

// find returns the pool of a key, or nil.
func (c *Client) find(key *poolKey) *pool {
	pools, at := c.pools.Load(), &c.lately[key.address.Port()%uint16(len(c.lately))]
	if f := at.Load(); f != nil && f.in == pools && f.key == *key {
		return f.p
	}
	p := (*pools)[*key]
	if p != nil {
		at.Store(&found{pools, *key, p})
	}
	return p
}

type clientMetrics struct {
	open  prometheus.Gauge
	dials *prometheus.CounterVec
	ended *prometheus.CounterVec
}

// poolKey separates what must never share a connection: the endpoint, the way to it, its identity and one's own.
type poolKey struct {
	own, peer string
	address   netip.AddrPort
	gateway   netip.AddrPort
	sni       string
}

// pool is the connections to one peer.
type pool struct {
	conns   atomic.Pointer[[]*clientConn] // changed under Client.mu; including those that only finish their streams
	dialing *dial                         // guarded by Client.mu
	waiting atomic.Int32                  // for a stream, where the peer allows no more
	freed   chan struct{}                 // of size 1
}

func (p *pool) all() []*clientConn {
	if l := p.conns.Load(); l != nil {
		return *l
	}
	return nil
}

type dial struct {
	done chan struct{}
	err  error // read after done
}

type clientConn struct {
	session   *http2.ClientConn
	meter     *meteredConn
	tls       *tls.Conn
	key       poolKey
	pool      *pool // set when it joins
	expires   time.Time
	opened    time.Time
	active    atomic.Int64 // streams that are in use
	bulkUntil atomic.Int64 // Unix nanoseconds: it is left to streams that carry many bytes
	busyFrom  atomic.Int64 // Unix nanoseconds: when streams went from none to some
	pinging   atomic.Bool
	draining  atomic.Bool
	cause     atomic.Pointer[error] // why it was ended by us
	requests  atomic.Uint64

	idleFrom time.Time // owned by Run
}

// NewClient builds a Client. It dials nothing before the first request, and needs Run.
func NewClient(cfg ClientConfig) *Client {
	if cfg.Dial == nil {
		cfg.Dial = (&net.Dialer{KeepAlive: 15 * time.Second}).DialContext
	}
	setDefault(&cfg.ConnectTimeout, time.Second)
	setDefault(&cfg.PingAfter, time.Second)
	setDefault(&cfg.DeadAfter, 2*time.Second)
	setDefault(&cfg.IdleClose, 90*time.Second)
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	c := &Client{
		cfg:   cfg,
		doubt: func(Peer, bool) {},
		metrics: clientMetrics{
			open: prometheus.NewGauge(prometheus.GaugeOpts{
				Name: "hanse_hop_client_connections", Help: "Open hop connections to peers."}),
			dials: prometheus.NewCounterVec(prometheus.CounterOpts{
				Name: "hanse_hop_client_dials_total", Help: "Hop connections attempted, by result: ok or the stage that failed."}, []string{"result"}),
			ended: prometheus.NewCounterVec(prometheus.CounterOpts{
				Name: "hanse_hop_client_ended_total", Help: "Hop connections ended, by cause."}, []string{"cause"}),
		},
	}
	c.pools.Store(&map[poolKey]*pool{})
	c.countThreads()
	c.ctx, c.cancel = context.WithCancel(context.Background())
	if cfg.Metrics != nil {
		cfg.Metrics.MustRegister(c.metrics.open, c.metrics.dials, c.metrics.ended)
	}
	return c
}

func setDefault(d *time.Duration, v time.Duration) {
	if *d == 0 {
		*d = v
	}
}

// OnDoubt sets, before Run, what is called where a PING on a connection is not answered within a quarter of the time that there is for it, and (false)
// where a byte comes after all. A connection that is ended with ErrDead stays in doubt. f must not block.
func (c *Client) OnDoubt(f func(to Peer, doubtful bool)) { c.doubt = f }

// Run watches the connections until ctx ends, then closes them all.
func (c *Client) Run(ctx context.Context) error {
	tick := time.NewTicker(max(c.cfg.PingAfter/4, 5*time.Millisecond))
	defer tick.Stop()
	var pings sync.WaitGroup
	defer pings.Wait()
	defer c.close()
	for {
		changed := c.cfg.Source.Changed()
		c.Reverify()
		for again := false; !again; {
			select {
			case <-ctx.Done():
				return nil
			case <-changed:
				again = true
			case <-tick.C:
				c.sweep(&pings)
				tick.Reset(c.pace())
			}
		}
	}
}

func (c *Client) close() {
	c.cancel()
	c.mu.Lock()
	c.closed = true
	conns := c.all()
	c.mu.Unlock()
	for _, cc := range conns {
		c.end(cc, ErrClosed)
	}
	c.dials.Wait()
}

func (c *Client) all() []*clientConn {
	var conns []*clientConn
	for _, p := range *c.pools.Load() {
		conns = append(conns, p.all()...)
	}
	return conns
}

// pace is how often connections are looked at: a Client without any has little to do.
func (c *Client) pace() time.Duration {
	if len(*c.pools.Load()) == 0 {
		return max(c.cfg.PingAfter, 5*time.Millisecond)
	}
	return max(c.cfg.PingAfter/4, 5*time.Millisecond)
}

// Reverify closes connections whose peer the current bundles do not vouch for. Run does so at each change; a caller who has to
// know that they are closed calls it too.
func (c *Client) Reverify() {
	conns := c.all()
	now := time.Now()
	for _, cc := range conns {
		if err := verifyNow(c.cfg.Source, cc.tls.ConnectionState().PeerCertificates, now); err != nil {
			c.cfg.Log.Warn("hop connection closed: peer is no longer trusted", "peer", cc.key.peer, "address", cc.key.address, "error", err)
			c.end(cc, ErrDistrusted)
		}
	}
}

// maxConns is how many connections there are to one peer at most, where the configuration does not say; maxBulk of them may be left to bulk.
const (
	maxConns = 16
	maxBulk  = 4
)

// countThreads finds out how many connections small streams share: on fewer, more of them share a write, but connections are read and written by
// one thread each.
func (c *Client) countThreads() {
	n := c.cfg.MaxConns
	if n == 0 {
		n = min(runtime.GOMAXPROCS(0), 4)
	}
	c.share.Store(int32(n))
}

func (c *Client) limit() int {
	if c.cfg.MaxConns > 0 {
		return c.cfg.MaxConns
	}
	return maxConns
}

// sweep pings, retires and forgets connections.
func (c *Client) sweep(pings *sync.WaitGroup) {
	c.countThreads()
	conns := c.all()
	now := time.Now()
	for _, cc := range conns {
		open, _ := cc.session.Streams()
		usable := cc.session.Usable()
		switch {
		case !usable && open == 0:
			c.end(cc, nil)
			continue
		case usable && !now.Before(cc.expires):
			c.retire(cc)
		}
		if open == 0 {
			if cc.idleFrom.IsZero() {
				cc.idleFrom = now
			}
			if now.Sub(cc.idleFrom) >= c.cfg.IdleClose {
				c.end(cc, nil)
			}
			continue
		}
		cc.idleFrom = time.Time{}
		quietFrom := time.Unix(0, max(cc.meter.lastRead.Load(), cc.busyFrom.Load()))
		if now.Sub(quietFrom) >= c.cfg.PingAfter && cc.pinging.CompareAndSwap(false, true) {
			pings.Go(func() { c.ping(cc, quietFrom.Add(c.cfg.DeadAfter)) })
		}
	}
}

// ping ends the connection if nothing at all arrives until the deadline.
func (c *Client) ping(cc *clientConn, deadline time.Time) {
	defer cc.pinging.Store(false)
	if least := time.Now().Add((c.cfg.DeadAfter - c.cfg.PingAfter) / 2); deadline.Before(least) {
		deadline = least // the sweep came late
	}
	from := cc.meter.lastRead.Load()
	ctx, cancel := context.WithDeadline(c.ctx, deadline)
	defer cancel()
	usual, stop := context.WithTimeout(ctx, (c.cfg.DeadAfter-c.cfg.PingAfter)/4)
	err := cc.session.Ping(usual)
	stop()
	answered := func() bool { return err == nil || cc.meter.lastRead.Load() != from }
	if !answered() && cc.session.Err() == nil && ctx.Err() == nil {
		peer := Peer{Address: cc.key.address, Gateway: cc.key.gateway, SNI: cc.key.sni, SPIFFEID: cc.key.peer}
		c.doubt(peer, true)
		if err = cc.session.Ping(ctx); answered() {
			c.doubt(peer, false)
		}
	}
	if answered() || c.ctx.Err() != nil {
		return
	}
	c.cfg.Log.Warn("hop connection dead", "peer", cc.key.peer, "address", cc.key.address, "gateway", cc.key.gateway, "silent", time.Since(time.Unix(0, from)).String())
	c.end(cc, ErrDead)
}

// GoAway retires all connections: the open streams finish, and new ones dial.
func (c *Client) GoAway() {
	for _, cc := range c.all() {
		c.retire(cc)
	}
}

// retire stops new streams and lets the open ones finish.
func (c *Client) retire(cc *clientConn) {
	if cc.draining.CompareAndSwap(false, true) {
		go cc.session.Shutdown() // waits, shortly, where nothing is open
	}
}

// end closes a connection and forgets it. The cause replaces the error of its streams.
func (c *Client) end(cc *clientConn, cause error) {
	if cause != nil {
		cc.cause.CompareAndSwap(nil, &cause)
	}
	found := c.remove(cc)
	_ = cc.meter.Conn.Close() // first, so that TLS cannot block on a dead peer
	if cause == nil {
		cause = ErrClosed
	}
	cc.session.Close(cause)
	if !found {
		return
	}
	c.metrics.open.Dec()
	switch {
	case errors.Is(cause, ErrDead):
		c.metrics.ended.WithLabelValues("dead").Inc()
	case errors.Is(cause, ErrDistrusted):
		c.metrics.ended.WithLabelValues("distrusted").Inc()
	default:
		c.metrics.ended.WithLabelValues("closed").Inc()
	}
}

// remove forgets a connection, and reports whether it was known.
func (c *Client) remove(cc *clientConn) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	p := (*c.pools.Load())[cc.key]
	if p == nil {
		return false
	}
	var rest []*clientConn
	for _, x := range p.all() {
		if x != cc {
			rest = append(rest, x)
		}
	}
	if len(rest) == len(p.all()) {
		return false
	}
	p.conns.Store(&rest)
	c.tidy(cc.key, p)
	return true
}

// tidy forgets a pool that is empty. It needs mu.
func (c *Client) tidy(key poolKey, p *pool) {
	if len(p.all()) == 0 && p.dialing == nil {
		next := maps.Clone(*c.pools.Load())
		delete(next, key)
		c.pools.Store(&next)
	}
}

// Open begins an exchange with peer. ctx bounds the wait for a connection only. Errors, also those of the stream, are *Error; what
// the peer answers is never one.
func (c *Client) Open(ctx context.Context, peer Peer, r *message.Request, o message.Options) (message.ClientStream, error) {
	var patience *time.Timer
	for {
		cc, now, err := c.get(ctx, &peer)
		if err != nil {
			return nil, err
		}
		s := &stream{cc: cc, peer: peer.SPIFFEID}
		s.from.Store(now.UnixNano())
		err = cc.session.Begin(&s.ClientStream, r, o)
		if err == nil {
			cc.requests.Add(1)
			return s, nil
		}
		cc.release()
		switch {
		case errors.Is(err, message.ErrUnsupported):
			return nil, cc.failure(peer.SPIFFEID, err, nil)
		case errors.Is(err, http2.ErrFull):
			if patience == nil {
				patience = time.NewTimer(c.timeout(&peer))
				defer patience.Stop()
			}
			if ch := c.choose(cc.pool.all(), time.Now()); ch.usable < c.limit() {
				c.more(cc.key, cc.pool, &peer)
			}
			if !cc.await(ctx, patience) {
				return nil, cc.failure(peer.SPIFFEID, err, nil)
			}
		case errors.Is(err, http2.ErrGoAway):
			cc.draining.Store(true) // the next get finds another
		default:
			if c.ctx.Err() != nil || !c.remove(cc) {
				return nil, cc.failure(peer.SPIFFEID, err, nil)
			}
			c.metrics.open.Dec()
			c.metrics.ended.WithLabelValues("closed").Inc()
		}
	}
}

// await waits until some stream of the peer has ended. It is false if the time is up.
func (cc *clientConn) await(ctx context.Context, patience *time.Timer) bool {
	cc.pool.waiting.Add(1)
	defer cc.pool.waiting.Add(-1)
	again := time.NewTimer(10 * time.Millisecond) // one may have ended before this one waited
	defer again.Stop()
	select {
	case <-cc.pool.freed:
	case <-again.C:
	case <-patience.C:
		return false
	case <-ctx.Done():
		return false
	}
	return true
}

// release ends a use that get has begun.
func (cc *clientConn) release() {
	cc.active.Add(-1)
	if cc.pool.waiting.Load() > 0 {
		select {
		case cc.pool.freed <- struct{}{}:
		default:
		}
	}
}

func (c *Client) timeout(peer *Peer) time.Duration {
	if peer.ConnectTimeout > 0 {
		return peer.ConnectTimeout
	}
	return c.cfg.ConnectTimeout
}

// failure says what has become of a stream, and why.
func (cc *clientConn) failure(peer string, err, cancelled error) error {
	var e *message.Error
	if !errors.As(err, &e) {
		return err // a codec's word on what the caller does
	}
	why := e.Err
	switch cause := cc.cause.Load(); {
	case cancelled != nil && errors.Is(why, cancelled):
		why = cancelled
	case cause != nil:
		why = *cause
	case errors.Is(why, http2.ErrReset), errors.Is(why, http2.ErrFull), errors.Is(why, http2.ErrGoAway), errors.Is(why, message.ErrUnsupported):
		why = err
	case cc.meter.broken.Load() || cc.session.Err() != nil:
		why = fmt.Errorf("%w: %w", ErrLost, why)
	}
	return &Error{Peer: peer, Address: cc.key.address, Gateway: cc.key.gateway, Stage: StageStream, Sent: e.Sent, Err: why}
}

// stream names the peer in its errors, and what it carries.
type stream struct {
	http2.ClientStream
	cc        *clientConn
	peer      string
	bytes     atomic.Int64
	from      atomic.Int64 // Unix nanoseconds: when the current bulky bytes began
	cancelled atomic.Pointer[error]
}

// bulky is how many bytes within bulkTime make a stream one that small ones should not share a connection with, for as long again.
const (
	bulky    = 1 << 20
	bulkTime = 2 * time.Second
)

func (s *stream) count(n int) {
	if sum := s.bytes.Add(int64(n)); sum/bulky == (sum-int64(n))/bulky {
		return
	}
	now := time.Now().UnixNano()
	if now-s.from.Swap(now) < int64(bulkTime) {
		s.cc.bulkUntil.Store(now + int64(bulkTime))
	}
}

func (s *stream) fail(err error) error {
	if err == nil || err == io.EOF {
		return err
	}
	var cancelled error
	if p := s.cancelled.Load(); p != nil {
		cancelled = *p
	}
	return s.cc.failure(s.peer, err, cancelled)
}

func (s *stream) Write(p []byte) (int, error) {
	n, err := s.ClientStream.Write(p)
	s.count(n)
	return n, s.fail(err)
}

func (s *stream) Read(p []byte) (int, error) {
	n, err := s.ClientStream.Read(p)
	s.count(n)
	return n, s.fail(err)
}

func (s *stream) Response() (*message.Response, error) {
	r, err := s.ClientStream.Response()
	return r, s.fail(err)
}

func (s *stream) Flush() error                      { return s.fail(s.ClientStream.Flush()) }
func (s *stream) End(trailers message.Fields) error { return s.fail(s.ClientStream.End(trailers)) }

func (s *stream) Cancel(err error) {
	if err != nil {
		s.cancelled.CompareAndSwap(nil, &err)
	}
	s.ClientStream.Cancel(err)
}

func (s *stream) Close() {
	s.ClientStream.Close()
	s.cc.release()
}

// Ping opens a connection to peer if there is none, and waits for one PING's answer.
func (c *Client) Ping(ctx context.Context, peer Peer) error {
	cc, _, err := c.get(ctx, &peer)
	if err != nil {
		return err
	}
	defer cc.release()
	if err := cc.session.Ping(ctx); err != nil {
		if cause := cc.cause.Load(); cause != nil {
			err = *cause
		}
		return &Error{Peer: peer.SPIFFEID, Address: peer.Address, Gateway: cc.key.gateway, Stage: StageStream, Err: err}
	}
	return nil
}

// busyConn is how many streams a connection has before another is opened beside it.
const busyConn = 24

// choice is what there is for a new stream.
type choice struct {
	best   *clientConn // nil: nothing
	full   bool        // the peer allows it no more streams at present
	wanted bool        // another connection, for those who come later
	usable int
}

// choose takes the least busy connection: of those that small streams share, and no more of these than are wanted; where they are full, of the others; one
// that bulk has to itself only where there is no other.
func (c *Client) choose(conns []*clientConn, now time.Time) (ch choice) {
	var best, spare, bulk *clientConn
	share, shared, bulked, at := int(c.share.Load()), 0, 0, now.UnixNano()
	less := func(than *clientConn, cc *clientConn) *clientConn {
		if than == nil || cc.active.Load() < than.active.Load() {
			return cc
		}
		return than
	}
	for _, cc := range conns {
		if cc.draining.Load() || !now.Before(cc.expires) {
			continue
		}
		ch.usable++
		switch {
		case cc.bulkUntil.Load() > at:
			bulk = less(bulk, cc)
			bulked++
		case shared < share:
			best = less(best, cc)
			shared++
		default:
			spare = less(spare, cc)
		}
	}
	ch.best = best
	if best != nil && best.full() && spare != nil {
		ch.best = spare
	}
	if ch.best == nil && bulk != nil {
		ch.best = bulk
		ch.wanted = bulked < maxBulk
	}
	if ch.best == nil {
		return ch
	}
	ch.full = ch.best.full()
	if ch.full || best != nil && shared < share && best.active.Load() >= busyConn {
		ch.wanted = true
	}
	ch.wanted = ch.wanted && ch.usable < c.limit()
	return ch
}

// full reports whether the peer allows no more streams at present.
func (cc *clientConn) full() bool {
	if cc.active.Load() < busyConn {
		return false
	}
	open, limit := cc.session.Streams()
	return open >= limit
}

// get returns a connection to peer for one use, and opens one where there is none. Where all are busy it opens another for those who come
// later; where all are full it waits for that.
func (c *Client) get(ctx context.Context, peer *Peer) (*clientConn, time.Time, error) {
	fail := func(stage Stage, err error) error {
		return &Error{Peer: peer.SPIFFEID, Address: peer.Address, Gateway: peer.Gateway, Stage: stage, Err: err}
	}
	for {
		now := time.Now()
		svid, err := c.cfg.Source.GetX509SVID()
		if err != nil {
			return nil, now, fail(StageHandshake, err)
		}
		key := poolKey{own: svid.ID.String(), peer: peer.SPIFFEID, address: peer.Address, gateway: peer.Gateway, sni: peer.SNI}
		p := c.find(&key)
		if p != nil {
			ch := c.choose(p.all(), now)
			if ch.wanted {
				c.more(key, p, peer)
			}
			if ch.best != nil && (!ch.full || ch.usable >= c.limit()) {
				if ch.best.active.Add(1) == 1 {
					ch.best.busyFrom.Store(now.UnixNano())
				}
				return ch.best, now, nil
			}
		}
		c.mu.Lock()
		if c.closed {
			c.mu.Unlock()
			return nil, now, fail(StageConnect, ErrClosed)
		}
		p = c.pool(key)
		if ch := c.choose(p.all(), now); p.dialing == nil && ch.best != nil && !ch.full {
			c.mu.Unlock()
			continue // it was opened meanwhile
		}
		d := p.dialing
		if d == nil {
			d = c.startDial(key, p, peer)
		}
		c.mu.Unlock()
		select {
		case <-d.done:
			if d.err != nil {
				return nil, now, d.err
			}
		case <-ctx.Done():
			return nil, now, fail(StageConnect, context.Cause(ctx))
		}
	}
}

// pool returns the pool of a key, nil once the Client is closed. It needs mu.
func (c *Client) pool(key poolKey) *pool {
	if c.closed {
		return nil
	}
	p := (*c.pools.Load())[key]
	if p == nil {
		p = &pool{freed: make(chan struct{}, 1)}
		next := maps.Clone(*c.pools.Load())
		next[key] = p
		c.pools.Store(&next)
	}
	return p
}

// more opens another connection in the background.
func (c *Client) more(key poolKey, p *pool, peer *Peer) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if p.dialing == nil && !c.closed && (*c.pools.Load())[key] == p {
		c.startDial(key, p, peer)
	}
}

// startDial needs mu.
func (c *Client) startDial(key poolKey, p *pool, peer *Peer) *dial {
	d := &dial{done: make(chan struct{})}
	p.dialing = d
	c.dials.Add(1)
	go c.dial(d, key, *peer)
	return d
}

// dial opens one connection for everyone who waits. It outlives the request that wanted it, within its timeout.
func (c *Client) dial(d *dial, key poolKey, peer Peer) {
	defer c.dials.Done()
	cc, err := c.connect(key, peer)
	c.mu.Lock()
	p := (*c.pools.Load())[key]
	p.dialing = nil
	switch {
	case err == nil && c.closed:
		err = &Error{Peer: peer.SPIFFEID, Address: peer.Address, Stage: StageConnect, Err: ErrClosed}
		_ = cc.meter.Conn.Close()
		cc.session.Close(ErrClosed)
	case err == nil:
		cc.pool = p
		conns := append(append([]*clientConn(nil), p.all()...), cc)
		p.conns.Store(&conns)
		c.metrics.open.Inc()
	}
	c.tidy(key, p)
	c.mu.Unlock()
	result := "ok"
	var e *Error
	if errors.As(err, &e) {
		result = string(e.Stage)
	}
	c.metrics.dials.WithLabelValues(result).Inc()
	d.err = err
	close(d.done)
}

func (c *Client) connect(key poolKey, peer Peer) (*clientConn, error) {
	ctx, cancel := context.WithTimeout(c.ctx, c.timeout(&peer))
	defer cancel()
	fail := func(stage Stage, err error) error {
		return &Error{Peer: peer.SPIFFEID, Address: peer.Address, Gateway: peer.Gateway, Stage: stage, Err: err}
	}
	want, err := spiffeid.FromString(peer.SPIFFEID)
	if err != nil {
		return nil, fail(StageHandshake, fmt.Errorf("endpoint's SPIFFE ID: %w", err))
	}
	address, stage := peer.Address, StageConnect
	if peer.Gateway.IsValid() {
		address, stage = peer.Gateway, StageGateway
	}
	raw, err := c.cfg.Dial(ctx, "tcp", address.String())
	if err != nil {
		return nil, fail(stage, err)
	}
	meter := &meteredConn{Conn: sock.Wrap(raw)}
	var own time.Time
	cfg := identity.ClientTLS(c.cfg.Source, identity.AuthorizeID(want), "h2")
	cfg.ServerName = peer.SNI
	cfg.DynamicRecordSizingDisabled = true // a hop connection is long, and small records cost both ends
	certificate := cfg.GetClientCertificate
	cfg.GetClientCertificate = func(info *tls.CertificateRequestInfo) (*tls.Certificate, error) {
		cert, err := certificate(info)
		if err != nil {
			return nil, err
		}
		id, err := spiffeid.FromURI(cert.Leaf.URIs[0])
		if err == nil && id.String() != key.own {
			err = fmt.Errorf("own SPIFFE ID changed from %s to %s during the handshake", key.own, id)
		}
		own = cert.Leaf.NotAfter
		return cert, err
	}
	conn := tls.Client(meter, cfg)
	if err := conn.HandshakeContext(ctx); err != nil {
		_ = raw.Close()
		return nil, fail(StageHandshake, err)
	}
	state := conn.ConnectionState()
	if state.NegotiatedProtocol != "h2" {
		_ = raw.Close()
		return nil, fail(StageHandshake, fmt.Errorf("peer negotiated %q, want h2", state.NegotiatedProtocol))
	}
	session := http2.NewClientConn(conn, http2.Config{MaxStreams: 1000, MaxHeadBytes: 256 << 10, Log: c.cfg.Log})
	// TLS 1.3 clients finish first: a server that refuses our SVID says so in its first record, and the PING waits for that.
	if err := session.Ping(ctx); err != nil {
		_ = raw.Close()
		session.Close(err)
		return nil, fail(StageHandshake, fmt.Errorf("peer refused the connection: %w", err))
	}
	return &clientConn{session: session, meter: meter, tls: conn, key: key, expires: expiry(own, state), opened: time.Now()}, nil
}

// Connection describes one connection, for debugging.
type Connection struct {
	Own      string         `json:"own"`
	Peer     string         `json:"peer"`
	Address  netip.AddrPort `json:"address"`
	Gateway  string         `json:"gateway,omitempty"`
	Streams  int            `json:"streams"`
	Requests uint64         `json:"requests"`
	Read     uint64         `json:"bytesRead"`
	Written  uint64         `json:"bytesWritten"`
	Opened   time.Time      `json:"opened"`
	Expires  time.Time      `json:"expires"`
	Draining bool           `json:"draining,omitempty"` // own GOAWAY
	GoneAway bool           `json:"goneAway,omitempty"` // in either direction
}

// Connections lists what is open now.
func (c *Client) Connections() []Connection {
	conns := c.all()
	list := make([]Connection, 0, len(conns))
	for _, cc := range conns {
		open, _ := cc.session.Streams()
		d := Connection{Own: cc.key.own, Peer: cc.key.peer, Address: cc.key.address, Streams: open, Requests: cc.requests.Load(),
			Read: cc.meter.read.Load(), Written: cc.meter.written.Load(), Opened: cc.opened, Expires: cc.expires, Draining: cc.draining.Load(), GoneAway: !cc.session.Usable()}
		if cc.key.gateway.IsValid() {
			d.Gateway = cc.key.gateway.String()
		}
		list = append(list, d)
	}
	return list
}
