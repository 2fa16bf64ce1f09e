package sidecar

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-multierror"
	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/trace"

	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/proxy"
	"github.com/hanse-mesh/hanse/proxy/balance"
	"github.com/hanse-mesh/hanse/proxy/fault"
	"github.com/hanse-mesh/hanse/proxy/hop"
	"github.com/hanse-mesh/hanse/proxy/http1"
)

// Control is what a sidecar needs of the control plane's client.
type Control interface {
	// Resolve returns the Listener of an authority, which Table then has with its endpoints; or xdsclient.ErrUnknown. It asks the
	// control plane where it must, and gives up with ctx.
	Resolve(ctx context.Context, authority string) (*proxy.Listener, error)
	// Table is the newest; never nil.
	Table() *proxy.Table
	// Changed is closed when there is a newer Table.
	Changed() <-chan struct{}
}

// Config configures a Sidecar. Source, Control, Hop and Balancer are required. The Sidecar closes the listeners.
type Config struct {
	Source    *identity.Source
	Control   Control
	Hop       *hop.Client       // run by the Sidecar
	Balancer  *balance.Balancer // run by the Sidecar
	Namespace string            // of the workload, for short names
	Locality  proxy.Locality    // of the workload

	Outbound net.Listener    // explicit proxy; nil: none
	Local    []LocalListener // one service each

	Inbound           net.Listener      // the hop; nil: none
	Workload          netip.Addr        // its address in the mesh
	Apps              map[uint16]string // by declared port: "127.0.0.1:9101" or "unix:/run/app.sock"
	GatewaysOnly      []netip.Addr      // not empty: hop connections from elsewhere are refused
	ReportPeerAddress bool              // tell the application where the hop connection came from

	ConnectTimeout time.Duration // to the application; default 1 s
	IdleTimeout    time.Duration // of TCP and upgraded connections without a byte either way; default 1 h
	DrainTimeout   time.Duration // after ctx ended; default 30 s

	Log       *slog.Logger
	AccessLog *slog.Logger // nil: none
	Metrics   prometheus.Registerer
	Tracer    trace.Tracer // nil: traceparent is kept or created, no spans
}

// LocalListener leads to one service, for applications that know no proxy.
type LocalListener struct {
	Listener  net.Listener
	Authority string // as callers write it: "payments.shop:8080"
}

// Sidecar is the data path of one workload.
type Sidecar struct {
	cfg       Config
	log       *slog.Logger
	metrics   metrics
	hop       *hop.Client
	balancer  *balance.Balancer
	faults    *fault.Injector
	server    *hop.Server // nil: no inbound
	apps      map[uint16]*app
	plaintext *plaintext
	locals    []string // authorities of cfg.Local

	draining atomic.Bool
	mirrors  chan struct{} // a slot each

	coreCtx    context.Context // set by Run, ends after the drain
	background sync.WaitGroup

	applyMu sync.Mutex
	applied uint64 // guarded by applyMu: version of the Table that balancer and faults obey

	trackMu sync.Mutex
	tracked map[io.Closer]struct{} // guarded by trackMu: what an http.Server no longer knows; nil at the end
}

// New builds a Sidecar; it fails on names and addresses that cannot be used.
func New(cfg Config) (*Sidecar, error) {
	for d, v := range map[*time.Duration]time.Duration{
		&cfg.ConnectTimeout: time.Second, &cfg.IdleTimeout: time.Hour, &cfg.DrainTimeout: 30 * time.Second,
	} {
		if *d == 0 {
			*d = v
		}
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	s := &Sidecar{
		cfg: cfg, log: cfg.Log, metrics: newMetrics(cfg.Metrics), hop: cfg.Hop, balancer: cfg.Balancer, apps: map[uint16]*app{},
		faults: fault.New(cfg.Log), mirrors: make(chan struct{}, maxMirrors), tracked: map[io.Closer]struct{}{},
	}
	s.plaintext = newPlaintext(cfg.Locality.Cluster, cfg.ConnectTimeout)
	for port, address := range cfg.Apps {
		s.apps[port] = newApp(address, cfg.ConnectTimeout)
	}
	for _, l := range cfg.Local {
		authority, err := authorityOf(l.Authority, cfg.Namespace, 80)
		if err != nil {
			return nil, fmt.Errorf("local listener %s: %w", l.Listener.Addr(), err)
		}
		s.locals = append(s.locals, authority)
	}
	if cfg.Inbound != nil {
		s.server = hop.NewServer(hop.ServerConfig{
			Source: cfg.Source, Handler: http.HandlerFunc(s.inbound), Admit: s.admit, Wrap: s.faults.Wrap,
			DrainTimeout: cfg.DrainTimeout, Log: cfg.Log, Metrics: cfg.Metrics,
		})
	}
	return s, nil
}

// Run waits for an identity, then serves until ctx ends, then drains: callers are sent elsewhere and open requests finish, while the
// application can still call out; at last everything is closed.
func (s *Sidecar) Run(ctx context.Context) error {
	if err := s.cfg.Source.Wait(ctx); err != nil {
		s.closeListeners()
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	var stopCore context.CancelFunc
	s.coreCtx, stopCore = context.WithCancel(context.WithoutCancel(ctx))
	defer stopCore()
	var core group
	core.run(stopCore, func() error { return s.hop.Run(s.coreCtx) })
	core.run(stopCore, func() error { return s.balancer.Run(s.coreCtx) })
	core.run(stopCore, func() error { return s.faults.Run(s.coreCtx) })
	core.run(stopCore, func() error { return s.watchTables(s.coreCtx) })
	core.run(stopCore, func() error { return s.watchFaults(s.coreCtx) })

	serveCtx, stopServing := context.WithCancel(ctx)
	defer stopServing()
	context.AfterFunc(s.coreCtx, stopServing)
	context.AfterFunc(serveCtx, func() { s.draining.Store(true) })
	var in group
	if s.server != nil {
		in.run(stopServing, func() error { return s.server.Serve(serveCtx, s.cfg.Inbound) })
	}
	outCtx, stopOut := context.WithCancel(s.coreCtx)
	defer stopOut()
	var out group
	if s.cfg.Outbound != nil {
		out.run(stopServing, func() error { return s.serveApp(outCtx, s.cfg.Outbound, "") })
	}
	for i, l := range s.cfg.Local {
		out.run(stopServing, func() error { return s.serveLocal(outCtx, l.Listener, s.locals[i]) })
	}
	<-serveCtx.Done()
	result := in.wait(nil)
	stopOut()
	s.drainTracked()
	result = out.wait(result)
	s.background.Wait()
	stopCore()
	result = core.wait(result)
	s.plaintext.close()
	for _, a := range s.apps {
		a.close()
	}
	return result.ErrorOrNil()
}

// group runs functions and gathers their errors.
type group struct {
	wg  sync.WaitGroup
	mu  sync.Mutex
	err *multierror.Error // guarded by mu
}

// run calls stop when f ends, so that nothing lives on half.
func (g *group) run(stop func(), f func() error) {
	g.wg.Go(func() {
		defer stop()
		if err := f(); err != nil {
			g.mu.Lock()
			g.err = multierror.Append(g.err, err)
			g.mu.Unlock()
		}
	})
}

func (g *group) wait(with *multierror.Error) *multierror.Error {
	g.wg.Wait()
	if g.err == nil {
		return with
	}
	return multierror.Append(with, g.err.Errors...)
}

func (s *Sidecar) closeListeners() {
	if s.cfg.Outbound != nil {
		_ = s.cfg.Outbound.Close()
	}
	if s.cfg.Inbound != nil {
		_ = s.cfg.Inbound.Close()
	}
	for _, l := range s.cfg.Local {
		_ = l.Listener.Close()
	}
}

// ownID is the workload's SPIFFE ID, or "" before there is one.
func (s *Sidecar) ownID() string {
	svid, err := s.cfg.Source.GetX509SVID()
	if err != nil {
		return ""
	}
	return svid.ID.String()
}

// apply makes balancer and faults obey a Table, unless they obey a newer one.
func (s *Sidecar) apply(t *proxy.Table) {
	s.applyMu.Lock()
	defer s.applyMu.Unlock()
	if t.Version <= s.applied {
		return
	}
	s.applied = t.Version
	s.balancer.Update(t)
	s.faults.Set(s.whole(t.Faults))
}

func (s *Sidecar) watchTables(ctx context.Context) error {
	for {
		changed := s.cfg.Control.Changed()
		s.apply(s.cfg.Control.Table())
		select {
		case <-changed:
		case <-ctx.Done():
			return nil
		}
	}
}

// watchFaults sends all callers away when a drill drains this workload.
func (s *Sidecar) watchFaults(ctx context.Context) error {
	for {
		active, changed := s.faults.Active()
		for _, f := range active {
			if f.Mode == proxy.FaultDrain && f.Share == 100 && len(f.Ports) == 0 && s.server != nil {
				s.server.GoAway()
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil
		}
	}
}

// serveApp serves HTTP/1.1 and HTTP/2 with prior knowledge until ctx ends, then waits for open requests.
func (s *Sidecar) serveApp(ctx context.Context, ln net.Listener, fixed string) error {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	server := &http.Server{
		Handler:           s.outbound(fixed),
		Protocols:         protocols,
		HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: 1000},
		MaxHeaderBytes:    64 << 10,
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       5 * time.Minute,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(strict{ln}) }()
	select {
	case err := <-ended:
		return fmt.Errorf("serve applications on %s: %w", ln.Addr(), err)
	case <-ctx.Done():
	}
	drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.cfg.DrainTimeout)
	defer cancel()
	if err := server.Shutdown(drain); err != nil {
		_ = server.Close()
	}
	<-ended
	return nil
}

// strict hands out guarded connections.
type strict struct{ net.Listener }

// Accept implements net.Listener.
func (l strict) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return http1.Guard(c), nil
}

// serveLocal serves one service on a listener: TCP as it is, the rest as HTTP.
func (s *Sidecar) serveLocal(ctx context.Context, ln net.Listener, authority string) error {
	accepted := &handedOver{conns: make(chan net.Conn), addr: ln.Addr(), done: make(chan struct{})}
	httpDone := make(chan error, 1)
	go func() { httpDone <- s.serveApp(ctx, accepted, authority) }()
	stop := context.AfterFunc(ctx, func() { _ = ln.Close() })
	defer stop()
	var conns sync.WaitGroup
	var result error
	for {
		conn, err := ln.Accept()
		if err != nil {
			if ctx.Err() == nil {
				if !errors.Is(err, net.ErrClosed) {
					s.log.Warn("accept", "listener", ln.Addr(), "error", err)
					time.Sleep(50 * time.Millisecond)
					continue
				}
				result = fmt.Errorf("serve %s on %s: %w", authority, ln.Addr(), err)
			}
			break
		}
		conns.Go(func() {
			table, listener, f := s.resolve(ctx, authority)
			if f == nil && listener.Protocol == proxy.TCP {
				defer conn.Close()
				s.tcp(s.coreCtx, conn, table, listener)
				return
			}
			accepted.hand(conn) // also where there is no such service: HTTP can say so
		})
	}
	_ = accepted.Close()
	if err := <-httpDone; result == nil && ctx.Err() == nil {
		result = err
	}
	conns.Wait() // Run closes what goes on for too long
	return result
}

// handedOver is a listener of connections that somebody else accepted.
type handedOver struct {
	conns chan net.Conn
	addr  net.Addr
	once  sync.Once
	done  chan struct{}
}

func (h *handedOver) hand(c net.Conn) {
	select {
	case h.conns <- c:
	case <-h.done:
		_ = c.Close()
	}
}

// Accept implements net.Listener.
func (h *handedOver) Accept() (net.Conn, error) {
	select {
	case c := <-h.conns:
		return c, nil
	case <-h.done:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (h *handedOver) Close() error {
	h.once.Do(func() { close(h.done) })
	return nil
}

// Addr implements net.Listener.
func (h *handedOver) Addr() net.Addr { return h.addr }

// track remembers a connection that shutdown must close and await; call the result when it is over.
func (s *Sidecar) track(c io.Closer) (untrack func()) {
	s.trackMu.Lock()
	defer s.trackMu.Unlock()
	if s.tracked == nil { // too late
		_ = c.Close()
		return func() {}
	}
	s.tracked[c] = struct{}{}
	s.background.Add(1)
	return func() {
		s.trackMu.Lock()
		defer s.trackMu.Unlock()
		delete(s.tracked, c)
		s.background.Done()
	}
}

// drainTracked waits until nothing is tracked, up to DrainTimeout, then closes what is left and all that comes.
func (s *Sidecar) drainTracked() {
	look := time.NewTicker(20 * time.Millisecond)
	defer look.Stop()
	for deadline := time.Now().Add(s.cfg.DrainTimeout); time.Now().Before(deadline); <-look.C {
		s.trackMu.Lock()
		open := len(s.tracked)
		s.trackMu.Unlock()
		if open == 0 {
			break
		}
	}
	s.trackMu.Lock()
	defer s.trackMu.Unlock()
	for c := range s.tracked {
		_ = c.Close()
	}
	s.tracked = nil
}
