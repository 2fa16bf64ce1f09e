package hop

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/proxy/http2"
	"github.com/hanse-mesh/hanse/proxy/message"
	"github.com/hanse-mesh/hanse/proxy/sock"
)

// Caller is who opened a connection; every request on it carries it in its context.
type Caller struct {
	ID      spiffeid.ID // verified against the bundle of its own trust domain
	Address net.Addr    // of the TCP connection: a gateway's where one is between
}

// ServerConfig configures a Server. Source and Handle are required.
type ServerConfig struct {
	Source           *identity.Source
	Handle           func(Caller, message.ServerStream) // is called for each exchange, on a goroutine of its own
	Authorize        identity.Authorizer                // nil: every ID that a bundle vouches for
	Admit            func(net.Addr) error
	Wrap             func(net.Conn) net.Conn // below TLS, for faults
	MaxConns         int                     // default 10,000
	MaxStreams       uint32                  // per connection; default 1,000
	MaxHeaderBytes   int                     // default 64 KiB
	HandshakeTimeout time.Duration           // default 5 s
	IdleTimeout      time.Duration           // default 3 min; clients close after 90 s
	PingAfter        time.Duration           // silence before the server asks whether the client lives; default 15 s
	OnReject         func(reason string)     // called for each violation of HTTP/2 with a constant; may be nil
	DrainTimeout     time.Duration           // after ctx ended; default 30 s
	Log              *slog.Logger
	Metrics          prometheus.Registerer
}

// Server answers hop connections.
type Server struct {
	cfg     ServerConfig
	metrics serverMetrics

	mu    sync.Mutex
	conns map[*serverConn]struct{}
}

type serverMetrics struct {
	open     prometheus.Gauge
	accepted *prometheus.CounterVec
}

type serverConn struct {
	raw     net.Conn
	chain   []*x509.Certificate
	caller  Caller
	session *http2.ServerConn // nil before the handshake
	expires time.Time
}

// NewServer builds a Server.
func NewServer(cfg ServerConfig) *Server {
	if cfg.Authorize == nil {
		cfg.Authorize = identity.AuthorizeAny()
	}
	if cfg.MaxConns == 0 {
		cfg.MaxConns = 10_000
	}
	if cfg.MaxStreams == 0 {
		cfg.MaxStreams = 1000
	}
	if cfg.MaxHeaderBytes == 0 {
		cfg.MaxHeaderBytes = 64 << 10
	}
	setDefault(&cfg.HandshakeTimeout, 5*time.Second)
	setDefault(&cfg.IdleTimeout, 3*time.Minute)
	setDefault(&cfg.PingAfter, 15*time.Second)
	setDefault(&cfg.DrainTimeout, 30*time.Second)
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{
		cfg:   cfg,
		conns: map[*serverConn]struct{}{},
		metrics: serverMetrics{
			open: prometheus.NewGauge(prometheus.GaugeOpts{
				Name: "hanse_hop_server_connections", Help: "Open hop connections from callers."}),
			accepted: prometheus.NewCounterVec(prometheus.CounterOpts{
				Name: "hanse_hop_server_accepted_total", Help: "Hop connections accepted, by result."}, []string{"result"}),
		},
	}
	if cfg.Metrics != nil {
		cfg.Metrics.MustRegister(s.metrics.open, s.metrics.accepted)
	}
	return s
}

// Serve accepts until ctx ends, then sends GOAWAY to every caller, waits for open streams up to DrainTimeout, and closes the rest.
// It closes ln. Several listeners may be served at the same time.
func (s *Server) Serve(ctx context.Context, ln net.Listener) error {
	stop := context.AfterFunc(ctx, func() { _ = ln.Close() })
	defer stop()
	// Streams outlive ctx while they drain.
	connCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	var conns sync.WaitGroup
	mine := make(map[*serverConn]struct{}) // guarded by s.mu
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		s.watch(ctx)
	}()

	var err error
	for {
		var raw net.Conn
		if raw, err = ln.Accept(); err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				break
			}
			s.cfg.Log.Warn("accept hop connection", "error", err)
			select { // out of file descriptors, or a caller that is gone already
			case <-time.After(50 * time.Millisecond):
			case <-ctx.Done():
			}
			continue
		}
		raw = sock.Wrap(raw)
		if s.cfg.Wrap != nil {
			raw = s.cfg.Wrap(raw)
		}
		sc := &serverConn{raw: raw}
		if !s.add(sc, mine) {
			s.metrics.accepted.WithLabelValues("limit").Inc()
			_ = raw.Close()
			continue
		}
		conns.Go(func() {
			defer s.remove(sc, mine)
			s.serveConn(connCtx, sc)
		})
	}
	<-watched
	if ctx.Err() == nil {
		err = fmt.Errorf("serve hop on %s: %w", ln.Addr(), err)
	} else {
		err = nil
	}
	done := make(chan struct{})
	go func() { conns.Wait(); close(done) }()
	s.drain(mine, done)
	return err
}

// drain repeats GOAWAY, for a handshake that ends meanwhile, until all connections are gone or time is up.
func (s *Server) drain(conns map[*serverConn]struct{}, done <-chan struct{}) {
	deadline := time.NewTimer(s.cfg.DrainTimeout)
	defer deadline.Stop()
	again := time.NewTicker(100 * time.Millisecond)
	defer again.Stop()
	for {
		s.goAway(conns)
		select {
		case <-done:
			return
		case <-again.C:
		case <-deadline.C:
			s.mu.Lock()
			for sc := range conns {
				_ = sc.raw.Close()
			}
			s.mu.Unlock()
			<-done
			return
		}
	}
}

func (s *Server) goAway(conns map[*serverConn]struct{}) {
	s.mu.Lock()
	var sessions []*http2.ServerConn
	for sc := range conns {
		if sc.session != nil {
			sessions = append(sessions, sc.session)
		}
	}
	s.mu.Unlock()
	for _, session := range sessions {
		session.GoAway()
	}
}

// GoAway asks every caller to go elsewhere: open streams finish, then the connections end.
func (s *Server) GoAway() { s.goAway(s.conns) }

func (s *Server) add(sc *serverConn, mine map[*serverConn]struct{}) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.conns) >= s.cfg.MaxConns {
		return false
	}
	s.conns[sc] = struct{}{}
	mine[sc] = struct{}{}
	s.metrics.open.Inc()
	return true
}

func (s *Server) remove(sc *serverConn, mine map[*serverConn]struct{}) {
	_ = sc.raw.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, sc)
	delete(mine, sc)
	s.metrics.open.Dec()
}

// Reverify closes connections whose caller the current bundles do not vouch for. Serve does so at each change; a caller who has
// to know that they are closed calls it too.
func (s *Server) Reverify() {
	now := time.Now()
	s.mu.Lock()
	var all []*serverConn
	for sc := range s.conns {
		if sc.session != nil {
			all = append(all, sc)
		}
	}
	s.mu.Unlock()
	for _, sc := range all {
		if err := verifyNow(s.cfg.Source, sc.chain, now); err != nil {
			s.cfg.Log.Warn("hop connection closed: caller is no longer trusted", "caller", sc.caller.ID, "address", sc.caller.Address, "error", err)
			_ = sc.raw.Close()
		}
	}
}

// watch closes connections whose caller is no longer trusted.
func (s *Server) watch(ctx context.Context) {
	for {
		changed := s.cfg.Source.Changed()
		s.Reverify()
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

func (s *Server) serveConn(ctx context.Context, sc *serverConn) {
	if s.cfg.Admit != nil {
		if err := s.cfg.Admit(sc.raw.RemoteAddr()); err != nil {
			s.metrics.accepted.WithLabelValues("refused").Inc()
			s.cfg.Log.Warn("hop connection refused", "address", sc.raw.RemoteAddr(), "error", err)
			return
		}
	}
	var own time.Time
	cfg := identity.ServerTLS(s.cfg.Source, s.cfg.Authorize, "h2")
	cfg.DynamicRecordSizingDisabled = true
	certificate := cfg.GetCertificate
	cfg.GetCertificate = func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
		cert, err := certificate(hello)
		if err == nil {
			own = cert.Leaf.NotAfter
		}
		return cert, err
	}
	tc := tls.Server(sc.raw, cfg)
	handshake, cancel := context.WithTimeout(ctx, s.cfg.HandshakeTimeout)
	err := tc.HandshakeContext(handshake)
	cancel()
	state := tc.ConnectionState()
	if err == nil && state.NegotiatedProtocol != "h2" {
		err = errors.New("caller offered no ALPN protocol h2")
	}
	if err != nil {
		s.metrics.accepted.WithLabelValues("handshake").Inc()
		s.cfg.Log.Info("hop handshake refused", "address", sc.raw.RemoteAddr(), "error", err)
		return
	}
	id, err := identity.PeerID(state)
	if err != nil {
		return // verified above: cannot be
	}
	caller := Caller{ID: id, Address: sc.raw.RemoteAddr()}
	session := http2.NewServerConn(tc, http2.Config{MaxStreams: s.cfg.MaxStreams, MaxHeadBytes: uint32(s.cfg.MaxHeaderBytes), IdleTimeout: s.cfg.IdleTimeout,
		PingAfter: s.cfg.PingAfter, OnReject: s.cfg.OnReject, Log: s.cfg.Log}, func(st message.ServerStream) { s.cfg.Handle(caller, st) })
	s.mu.Lock()
	sc.chain, sc.caller, sc.session, sc.expires = state.PeerCertificates, caller, session, expiry(own, state)
	s.mu.Unlock()
	// A bundle may have changed since the handshake began, unseen by watch.
	if err := verifyNow(s.cfg.Source, sc.chain, time.Now()); err != nil {
		s.metrics.accepted.WithLabelValues("handshake").Inc()
		return
	}
	s.metrics.accepted.WithLabelValues("ok").Inc()
	expired := time.AfterFunc(time.Until(sc.expires), session.GoAway)
	defer expired.Stop()
	if err := session.Serve(); err != nil {
		s.cfg.Log.Debug("hop connection ended", "caller", caller.ID, "address", caller.Address, "error", err)
	}
}
