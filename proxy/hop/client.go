package hop

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hanse-mesh/hanse/identity"
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
	MaxConns       int                                                                  // per peer; default 4
	Log            *slog.Logger
	Metrics        prometheus.Registerer
}

// Client owns the outgoing connections of one process. It is safe for concurrent use.
type Client struct {
	cfg     ClientConfig
	engine  clientEngine
	metrics clientMetrics

	ctx    context.Context // ends with Run
	cancel context.CancelFunc
	dials  sync.WaitGroup

	mu     sync.Mutex
	closed bool              // guarded by mu
	pools  map[poolKey]*pool // guarded by mu
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

// pool is guarded by Client.mu.
type pool struct {
	conns   []*clientConn // including those that only finish their streams
	dialing *dial
}

type dial struct {
	done chan struct{}
	err  error // read after done
}

type clientConn struct {
	session  clientSession
	meter    *meteredConn
	tls      *tls.Conn
	key      poolKey
	expires  time.Time
	opened   time.Time
	busyFrom atomic.Int64 // Unix nanoseconds: when streams went from none to some
	pinging  atomic.Bool
	draining atomic.Bool
	cause    atomic.Pointer[error] // why it was ended by us
	requests atomic.Uint64

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
	if cfg.MaxConns == 0 {
		cfg.MaxConns = 4
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	c := &Client{
		cfg:    cfg,
		engine: newXnetClient(256<<10, 30*time.Second),
		pools:  map[poolKey]*pool{},
		metrics: clientMetrics{
			open: prometheus.NewGauge(prometheus.GaugeOpts{
				Name: "hanse_hop_client_connections", Help: "Open hop connections to peers."}),
			dials: prometheus.NewCounterVec(prometheus.CounterOpts{
				Name: "hanse_hop_client_dials_total", Help: "Hop connections attempted, by result: ok or the stage that failed."}, []string{"result"}),
			ended: prometheus.NewCounterVec(prometheus.CounterOpts{
				Name: "hanse_hop_client_ended_total", Help: "Hop connections ended, by cause."}, []string{"cause"}),
		},
	}
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

// Run watches the connections until ctx ends, then closes them all.
func (c *Client) Run(ctx context.Context) error {
	tick := time.NewTicker(max(c.cfg.PingAfter/4, 5*time.Millisecond))
	defer tick.Stop()
	var pings sync.WaitGroup
	defer pings.Wait()
	defer c.close()
	for {
		changed := c.cfg.Source.Changed()
		c.reverify()
		for again := false; !again; {
			select {
			case <-ctx.Done():
				return nil
			case <-changed:
				again = true
			case <-tick.C:
				c.sweep(&pings)
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

// all needs mu.
func (c *Client) all() []*clientConn {
	var conns []*clientConn
	for _, p := range c.pools {
		conns = append(conns, p.conns...)
	}
	return conns
}

// reverify closes connections whose peer the current bundles do not vouch for.
func (c *Client) reverify() {
	c.mu.Lock()
	conns := c.all()
	c.mu.Unlock()
	now := time.Now()
	for _, cc := range conns {
		if err := verifyNow(c.cfg.Source, cc.tls.ConnectionState().PeerCertificates, now); err != nil {
			c.cfg.Log.Warn("hop connection closed: peer is no longer trusted", "peer", cc.key.peer, "address", cc.key.address, "error", err)
			c.end(cc, ErrDistrusted)
		}
	}
}

// sweep pings, retires and forgets connections.
func (c *Client) sweep(pings *sync.WaitGroup) {
	c.mu.Lock()
	conns := c.all()
	c.mu.Unlock()
	now := time.Now()
	for _, cc := range conns {
		open, _ := cc.session.streams()
		usable := cc.session.usable()
		switch {
		case !usable && open == 0:
			c.end(cc, nil)
			continue
		case usable && !now.Before(cc.expires):
			c.retire(cc, pings)
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
	err := cc.session.ping(ctx)
	if err == nil || c.ctx.Err() != nil || cc.meter.lastRead.Load() != from {
		return
	}
	c.cfg.Log.Warn("hop connection dead", "peer", cc.key.peer, "address", cc.key.address, "gateway", cc.key.gateway, "silent", time.Since(time.Unix(0, from)).String())
	c.end(cc, ErrDead)
}

// retire stops new streams and lets the open ones finish.
func (c *Client) retire(cc *clientConn, wait *sync.WaitGroup) {
	if !cc.draining.CompareAndSwap(false, true) {
		return
	}
	wait.Go(func() { _ = cc.session.shutdown(c.ctx) })
}

// end closes a connection and forgets it. The cause replaces the error of its streams.
func (c *Client) end(cc *clientConn, cause error) {
	if cause != nil {
		cc.cause.CompareAndSwap(nil, &cause)
	}
	c.mu.Lock()
	found := false
	if p := c.pools[cc.key]; p != nil {
		for i, x := range p.conns {
			if x == cc {
				p.conns, found = append(p.conns[:i:i], p.conns[i+1:]...), true
				break
			}
		}
		if len(p.conns) == 0 && p.dialing == nil {
			delete(c.pools, cc.key)
		}
	}
	c.mu.Unlock()
	_ = cc.meter.Conn.Close() // first, so that TLS cannot block on a dead peer
	_ = cc.session.close()
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

// RoundTrip sends one request to peer and returns its answer; what the peer answers is never an error. Errors are *Error.
// The caller closes the response's body. req.URL.Scheme must be "http" or "https"; Host is the authority.
func (c *Client) RoundTrip(peer Peer, req *http.Request) (*http.Response, error) {
	cc, err := c.get(req.Context(), peer)
	if err != nil {
		return nil, err
	}
	var sent atomic.Bool
	trace := &httptrace.ClientTrace{WroteHeaders: func() { sent.Store(true) }}
	cc.requests.Add(1)
	resp, err := cc.session.roundTrip(req.WithContext(httptrace.WithClientTrace(req.Context(), trace)))
	if err == nil {
		resp.Request = req
		return resp, nil
	}
	reached := sent.Load() && !unprocessed(err)
	if cause := cc.cause.Load(); cause != nil {
		err = *cause
	} else if cc.meter.broken.Load() {
		err = fmt.Errorf("%w: %w", ErrLost, err)
	}
	if ctxErr := context.Cause(req.Context()); ctxErr != nil {
		err = ctxErr
	}
	return nil, &Error{Peer: peer.SPIFFEID, Address: peer.Address, Gateway: cc.key.gateway, Stage: StageStream, Sent: reached, Err: err}
}

// Ping opens a connection to peer if there is none, and waits for one PING's answer.
func (c *Client) Ping(ctx context.Context, peer Peer) error {
	cc, err := c.get(ctx, peer)
	if err != nil {
		return err
	}
	if err := cc.session.ping(ctx); err != nil {
		return &Error{Peer: peer.SPIFFEID, Address: peer.Address, Gateway: cc.key.gateway, Stage: StageStream, Err: err}
	}
	return nil
}

// get returns the least busy usable connection to peer, and opens one where there is none, or where all are full.
func (c *Client) get(ctx context.Context, peer Peer) (*clientConn, error) {
	fail := func(stage Stage, err error) error {
		return &Error{Peer: peer.SPIFFEID, Address: peer.Address, Gateway: peer.Gateway, Stage: stage, Err: err}
	}
	svid, err := c.cfg.Source.GetX509SVID()
	if err != nil {
		return nil, fail(StageHandshake, err)
	}
	want, err := spiffeid.FromString(peer.SPIFFEID)
	if err != nil {
		return nil, fail(StageHandshake, fmt.Errorf("endpoint's SPIFFE ID: %w", err))
	}
	key := poolKey{own: svid.ID.String(), peer: peer.SPIFFEID, address: peer.Address, gateway: peer.Gateway, sni: peer.SNI}
	for {
		c.mu.Lock()
		if c.closed {
			c.mu.Unlock()
			return nil, fail(StageConnect, ErrClosed)
		}
		p := c.pools[key]
		if p == nil {
			p = &pool{}
			c.pools[key] = p
		}
		best, full, usable := leastBusy(p.conns)
		if best != nil && (!full || usable >= c.cfg.MaxConns || p.dialing != nil) {
			if open, _ := best.session.streams(); open == 0 {
				best.busyFrom.Store(time.Now().UnixNano())
			}
			c.mu.Unlock()
			return best, nil
		}
		d := p.dialing
		if d == nil {
			d = &dial{done: make(chan struct{})}
			p.dialing = d
			c.dials.Add(1)
			go c.dial(d, key, peer, want)
		}
		c.mu.Unlock()
		select {
		case <-d.done:
			if d.err != nil {
				return nil, d.err
			}
		case <-ctx.Done():
			return nil, fail(StageConnect, context.Cause(ctx))
		}
	}
}

func leastBusy(conns []*clientConn) (best *clientConn, full bool, usable int) {
	least := 0
	for _, cc := range conns {
		if cc.draining.Load() || !cc.session.usable() || !time.Now().Before(cc.expires) {
			continue
		}
		usable++
		open, limit := cc.session.streams()
		if best == nil || open < least {
			best, least, full = cc, open, open >= limit
		}
	}
	return best, full, usable
}

// dial opens one connection for everyone who waits. It outlives the request that wanted it, within its timeout.
func (c *Client) dial(d *dial, key poolKey, peer Peer, want spiffeid.ID) {
	defer c.dials.Done()
	cc, err := c.connect(key, peer, want)
	c.mu.Lock()
	p := c.pools[key]
	p.dialing = nil
	switch {
	case err == nil && c.closed:
		err = &Error{Peer: peer.SPIFFEID, Address: peer.Address, Stage: StageConnect, Err: ErrClosed}
		_ = cc.meter.Conn.Close()
		_ = cc.session.close()
	case err == nil:
		p.conns = append(p.conns, cc)
		c.metrics.open.Inc()
	}
	if len(p.conns) == 0 {
		delete(c.pools, key)
	}
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

func (c *Client) connect(key poolKey, peer Peer, want spiffeid.ID) (*clientConn, error) {
	timeout := peer.ConnectTimeout
	if timeout == 0 {
		timeout = c.cfg.ConnectTimeout
	}
	ctx, cancel := context.WithTimeout(c.ctx, timeout)
	defer cancel()
	fail := func(stage Stage, err error) error {
		return &Error{Peer: peer.SPIFFEID, Address: peer.Address, Gateway: peer.Gateway, Stage: stage, Err: err}
	}
	address, stage := peer.Address, StageConnect
	if peer.Gateway.IsValid() {
		address, stage = peer.Gateway, StageGateway
	}
	raw, err := c.cfg.Dial(ctx, "tcp", address.String())
	if err != nil {
		return nil, fail(stage, err)
	}
	meter := &meteredConn{Conn: raw}
	var own time.Time
	cfg := identity.ClientTLS(c.cfg.Source, identity.AuthorizeID(want), "h2")
	cfg.ServerName = peer.SNI
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
	session, err := c.engine.start(conn)
	if err != nil {
		_ = raw.Close()
		return nil, fail(StageHandshake, fmt.Errorf("start HTTP/2: %w", err))
	}
	// TLS 1.3 clients finish first: a server that refuses our SVID says so in its first record, and the PING waits for that.
	if err := session.ping(ctx); err != nil {
		_ = raw.Close()
		_ = session.close()
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
	c.mu.Lock()
	conns := c.all()
	c.mu.Unlock()
	list := make([]Connection, 0, len(conns))
	for _, cc := range conns {
		open, _ := cc.session.streams()
		d := Connection{Own: cc.key.own, Peer: cc.key.peer, Address: cc.key.address, Streams: open, Requests: cc.requests.Load(),
			Read: cc.meter.read.Load(), Written: cc.meter.written.Load(), Opened: cc.opened, Expires: cc.expires, Draining: cc.draining.Load(), GoneAway: !cc.session.usable()}
		if cc.key.gateway.IsValid() {
			d.Gateway = cc.key.gateway.String()
		}
		list = append(list, d)
	}
	return list
}
