package gateway

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/proxy"
	"github.com/hanse-mesh/hanse/proxy/fault"
)

// Control is what a gateway needs of the control plane's client.
type Control interface {
	// Table is the newest; never nil.
	Table() *proxy.Table
	// Changed is closed when there is a newer Table.
	Changed() <-chan struct{}
}

// Config configures a Gateway. Source and Control are required.
type Config struct {
	Source           *identity.Source // for probes
	Control          Control
	DialFrom         netip.Addr    // source address of outgoing connections; zero: the system's choice
	MaxConns         int           // default 10,000
	HandshakeTimeout time.Duration // for the ClientHello; default 5 s
	ConnectTimeout   time.Duration // per target; default 1 s
	IdleTimeout      time.Duration // without a byte either way; default 10 min
	DrainTimeout     time.Duration // after ctx ended; default 30 s
	DrainIdle        time.Duration // silence after which a connection is closed while draining; default 1.5 s: the hop's PINGs come every second while streams are open
	Log              *slog.Logger
	Metrics          prometheus.Registerer
}

// Gateway splices connections.
type Gateway struct {
	cfg     Config
	faults  *fault.Injector
	metrics metrics

	mu    sync.Mutex
	conns map[*conn]struct{} // guarded by mu
}

type metrics struct {
	open  prometheus.Gauge
	conns *prometheus.CounterVec // by SNI and result
	bytes *prometheus.CounterVec // by SNI and direction
}

type conn struct {
	net.Conn
	sni     string
	lot     uint32
	target  net.Conn // guarded by Gateway.mu; nil until dialled
	opened  time.Time
	in, out atomic.Uint64
	active  atomic.Int64 // Unix nanoseconds of the last byte seen
}

// New builds a Gateway.
func New(cfg Config) *Gateway {
	if cfg.MaxConns == 0 {
		cfg.MaxConns = 10_000
	}
	for d, v := range map[*time.Duration]time.Duration{
		&cfg.HandshakeTimeout: 5 * time.Second, &cfg.ConnectTimeout: time.Second,
		&cfg.IdleTimeout: 10 * time.Minute, &cfg.DrainTimeout: 30 * time.Second, &cfg.DrainIdle: 1500 * time.Millisecond,
	} {
		if *d == 0 {
			*d = v
		}
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	g := &Gateway{cfg: cfg, faults: fault.New(cfg.Log), conns: map[*conn]struct{}{}, metrics: metrics{
		open: prometheus.NewGauge(prometheus.GaugeOpts{Name: "hanse_gateway_connections", Help: "Open connections."}),
		conns: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hanse_gateway_connections_total", Help: "Connections by server name (known ones only) and result."}, []string{"sni", "result"}),
		bytes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hanse_gateway_bytes_total", Help: "Sealed bytes carried, by server name and direction."}, []string{"sni", "direction"}),
	}}
	if cfg.Metrics != nil {
		cfg.Metrics.MustRegister(g.metrics.open, g.metrics.conns, g.metrics.bytes)
	}
	return g
}

// Serve accepts until ctx ends, then closes each connection when it falls silent, and all after DrainTimeout. It closes ln.
func (g *Gateway) Serve(ctx context.Context, ln net.Listener) error {
	stop := context.AfterFunc(ctx, func() { _ = ln.Close() })
	defer stop()
	connCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	var watchers, conns sync.WaitGroup
	watchers.Go(func() { g.watchTable(connCtx) })
	watchers.Go(func() { g.watchFaults(connCtx) })
	watchers.Go(func() { _ = g.faults.Run(connCtx) })
	var err error
	for {
		var raw net.Conn
		if raw, err = ln.Accept(); err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				break
			}
			g.cfg.Log.Warn("accept", "error", err)
			select {
			case <-time.After(50 * time.Millisecond):
			case <-ctx.Done():
			}
			continue
		}
		c := &conn{Conn: raw, lot: fault.Draw(), opened: time.Now()}
		if !g.add(c) {
			g.metrics.conns.WithLabelValues("", "limit").Inc()
			_ = raw.Close()
			continue
		}
		conns.Go(func() {
			defer g.remove(c)
			g.handle(connCtx, c)
		})
	}
	if ctx.Err() == nil {
		err = fmt.Errorf("serve gateway on %s: %w", ln.Addr(), err)
	} else {
		err = nil
	}
	done := make(chan struct{})
	go func() { conns.Wait(); close(done) }()
	g.drain(done)
	cancel() // also wakes what is silenced by a fault
	g.each((*conn).closeBoth)
	<-done
	watchers.Wait()
	return err
}

// drain closes what is silent, until done or DrainTimeout. A gateway cannot send GOAWAY into what it cannot read.
func (g *Gateway) drain(done <-chan struct{}) {
	deadline := time.NewTimer(g.cfg.DrainTimeout)
	defer deadline.Stop()
	look := time.NewTicker(g.cfg.DrainIdle)
	defer look.Stop()
	seen := map[*conn]uint64{}
	for {
		g.each(func(c *conn) {
			now := c.in.Load() + c.out.Load()
			if before, ok := seen[c]; ok && before == now {
				c.closeBoth()
			}
			seen[c] = now
			c.wake() // so that the counts are right at the next look
		})
		select {
		case <-done:
			return
		case <-deadline.C:
			return
		case <-look.C:
		}
	}
}

// wake makes the copies look around. It needs Gateway.mu.
func (c *conn) wake() {
	if c.target != nil {
		_ = c.SetReadDeadline(time.Now())
		_ = c.target.SetReadDeadline(time.Now())
	}
}

// closeBoth needs Gateway.mu.
func (c *conn) closeBoth() {
	_ = c.Close()
	if c.target != nil {
		_ = c.target.Close()
	}
}

func (g *Gateway) each(f func(*conn)) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for c := range g.conns {
		f(c)
	}
}

func (g *Gateway) add(c *conn) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.conns) >= g.cfg.MaxConns {
		return false
	}
	g.conns[c] = struct{}{}
	g.metrics.open.Inc()
	return true
}

func (g *Gateway) remove(c *conn) {
	_ = c.Close()
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.conns, c)
	g.metrics.open.Dec()
}

// watchTable obeys drills, and forgets the metrics of names that are gone.
func (g *Gateway) watchTable(ctx context.Context) {
	before := map[string][]proxy.Target{}
	for {
		changed := g.cfg.Control.Changed()
		t := g.cfg.Control.Table()
		g.faults.Set(t.Faults)
		for name := range before {
			if _, ok := t.SNI[name]; !ok {
				g.metrics.conns.DeletePartialMatch(prometheus.Labels{"sni": name})
				g.metrics.bytes.DeletePartialMatch(prometheus.Labels{"sni": name})
			}
		}
		before = t.SNI
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

// watchFaults wakes the copies when a fault begins, so that they fall silent at once.
func (g *Gateway) watchFaults(ctx context.Context) {
	for {
		faults, changed := g.faults.Active()
		if len(faults) > 0 {
			g.each((*conn).wake)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

// audible waits while a fault silences c.
func (g *Gateway) audible(ctx context.Context, c *conn) error {
	for {
		holed, changed := g.faults.Holed(c.lot)
		if !holed {
			return ctx.Err()
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (g *Gateway) handle(ctx context.Context, c *conn) {
	if g.audible(ctx, c) != nil {
		return
	}
	_ = c.SetReadDeadline(time.Now().Add(g.cfg.HandshakeTimeout))
	raw, name, err := ReadHello(c)
	if err != nil {
		g.metrics.conns.WithLabelValues("", "malformed").Inc()
		g.cfg.Log.Debug("no usable ClientHello", "address", c.RemoteAddr(), "error", err)
		switch {
		case errors.Is(err, errNoSNI):
			alert(c, alertUnrecognizedName)
		case errors.Is(err, errNotTLS):
			alert(c, alertDecodeError)
		}
		return
	}
	_ = c.SetReadDeadline(time.Time{})
	if strings.HasPrefix(name, "probe.") {
		g.probe(ctx, c, raw)
		return
	}
	targets := g.cfg.Control.Table().SNI[name]
	if len(targets) == 0 {
		g.metrics.conns.WithLabelValues("", "unrecognized_name").Inc()
		g.cfg.Log.Info("unknown server name", "sni", name, "address", c.RemoteAddr())
		alert(c, alertUnrecognizedName)
		return
	}
	target, err := g.dial(ctx, targets)
	if err != nil {
		g.metrics.conns.WithLabelValues(name, "unreachable").Inc()
		g.cfg.Log.Info("target unreachable", "sni", name, "error", err)
		alert(c, alertInternalError)
		return
	}
	defer target.Close()
	g.mu.Lock()
	c.sni, c.target = name, target
	g.mu.Unlock()
	if _, err := target.Write(raw); err != nil {
		g.metrics.conns.WithLabelValues(name, "unreachable").Inc()
		alert(c, alertInternalError)
		return
	}
	g.metrics.conns.WithLabelValues(name, "ok").Inc()
	c.active.Store(time.Now().UnixNano())
	c.in.Add(uint64(len(raw)))
	inBytes, outBytes := g.metrics.bytes.WithLabelValues(name, "in"), g.metrics.bytes.WithLabelValues(name, "out")
	inBytes.Add(float64(len(raw)))
	var both sync.WaitGroup
	both.Go(func() { g.copy(ctx, c, target, c.Conn, &c.in, inBytes) })
	both.Go(func() { g.copy(ctx, c, c.Conn, target, &c.out, outBytes) })
	both.Wait()
}

// dial tries the targets of one name, the first by weight.
func (g *Gateway) dial(ctx context.Context, targets []proxy.Target) (net.Conn, error) {
	d := net.Dialer{Timeout: g.cfg.ConnectTimeout, KeepAlive: 15 * time.Second}
	if g.cfg.DialFrom.IsValid() {
		d.LocalAddr = &net.TCPAddr{IP: g.cfg.DialFrom.AsSlice()}
	}
	var err error
	for tries, rest := 0, slices.Clone(targets); len(rest) > 0 && tries < 3; tries++ {
		i := choose(rest)
		var c net.Conn
		if c, err = d.DialContext(ctx, "tcp", rest[i].Address.String()); err == nil {
			return c, nil
		}
		rest = slices.Delete(rest, i, i+1)
	}
	return nil, err
}

func choose(targets []proxy.Target) int {
	var total uint64
	for _, t := range targets {
		total += uint64(max(1, t.Weight))
	}
	at := rand.Uint64N(total)
	for i, t := range targets {
		w := uint64(max(1, t.Weight))
		if at < w {
			return i
		}
		at -= w
	}
	return 0
}

// Between two looks at faults, counters and idleness a copy carries at most chunk, and takes at most lookEvery.
const (
	chunk     = 4 << 20
	lookEvery = 5 * time.Second
)

// copy carries one direction to its end; *net.TCPConn.ReadFrom splices in the kernel. A clean end is passed on, a broken one
// breaks both directions.
func (g *Gateway) copy(ctx context.Context, c *conn, dst, src net.Conn, total *atomic.Uint64, counter prometheus.Counter) {
	for {
		if g.audible(ctx, c) != nil {
			break
		}
		_ = src.SetReadDeadline(time.Now().Add(min(lookEvery, g.cfg.IdleTimeout)))
		n, err := io.CopyN(dst, src, chunk)
		if n > 0 {
			total.Add(uint64(n))
			counter.Add(float64(n))
			c.active.Store(time.Now().UnixNano())
		}
		switch {
		case err == nil:
			continue
		case errors.Is(err, io.EOF):
			if w, ok := dst.(interface{ CloseWrite() error }); ok && w.CloseWrite() == nil {
				return
			}
		case timeout(err) && time.Since(time.Unix(0, c.active.Load())) < g.cfg.IdleTimeout:
			continue // looked, or woken
		}
		break
	}
	_ = dst.Close()
	_ = src.Close()
}

func timeout(err error) bool {
	var ne net.Error
	return errors.As(err, &ne) && ne.Timeout()
}

// probe answers a control plane that asks whether this gateway lives: a full mTLS handshake with the gateway's SVID, then one line.
func (g *Gateway) probe(ctx context.Context, c *conn, hello []byte) {
	tc := tls.Server(&prefixed{Conn: c.Conn, before: bytes.NewReader(hello)}, identity.ServerTLS(g.cfg.Source, identity.AuthorizeAny()))
	ctx, cancel := context.WithTimeout(ctx, g.cfg.HandshakeTimeout)
	defer cancel()
	if err := tc.HandshakeContext(ctx); err != nil {
		g.metrics.conns.WithLabelValues("probe", "refused").Inc()
		g.cfg.Log.Info("probe refused", "address", c.RemoteAddr(), "error", err)
		return
	}
	g.metrics.conns.WithLabelValues("probe", "ok").Inc()
	_ = tc.SetDeadline(time.Now().Add(g.cfg.HandshakeTimeout))
	_, _ = io.WriteString(tc, "ok\n")
	_ = tc.CloseWrite()
	_, _ = io.Copy(io.Discard, io.LimitReader(tc, 4<<10)) // the prober closes first
	_ = tc.Close()
}

// prefixed gives back the bytes that were read to find the server name.
type prefixed struct {
	net.Conn
	before *bytes.Reader
}

func (p *prefixed) Read(b []byte) (int, error) {
	if p.before.Len() > 0 {
		return p.before.Read(b)
	}
	return p.Conn.Read(b)
}

// Alert descriptions (RFC 8446 §6).
const (
	alertDecodeError      = 50
	alertInternalError    = 80
	alertUnrecognizedName = 112
)

// alert answers a ClientHello with a fatal alert in the clear. What the caller sent meanwhile is read, so that closing does not
// reset the connection under the alert.
func alert(c net.Conn, description byte) {
	_ = c.SetDeadline(time.Now().Add(time.Second))
	if _, err := c.Write([]byte{21, 3, 3, 0, 2, 2, description}); err != nil {
		return
	}
	if w, ok := c.(interface{ CloseWrite() error }); ok {
		_ = w.CloseWrite()
	}
	_, _ = io.CopyN(io.Discard, c, 64<<10)
}

// CloseWrite passes the half-close on to the connection.
func (c *conn) CloseWrite() error {
	if w, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return w.CloseWrite()
	}
	return errors.ErrUnsupported
}

// Connection describes one spliced connection, for debugging.
type Connection struct {
	SNI    string    `json:"sni"`
	From   string    `json:"from"`
	To     string    `json:"to"`
	Opened time.Time `json:"opened"`
	In     uint64    `json:"bytesIn"`
	Out    uint64    `json:"bytesOut"`
}

// Connections lists what is spliced now.
func (g *Gateway) Connections() []Connection {
	list := []Connection{}
	g.each(func(c *conn) {
		if c.target != nil {
			list = append(list, Connection{SNI: c.sni, From: c.RemoteAddr().String(), To: c.target.RemoteAddr().String(), Opened: c.opened, In: c.in.Load(), Out: c.out.Load()})
		}
	})
	return list
}
