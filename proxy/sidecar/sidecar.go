package sidecar

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
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
	AnyPort           bool              // declared ports that Apps does not name are served by the application at Workload itself
	GatewaysOnly      []netip.Addr      // not empty: hop connections from elsewhere are refused
	ReportPeerAddress bool              // tell the application where the hop connection came from

	Capture Capture
	Dial    Dial // of all but the hop, Hop's own; what it opens must not be captured. Default: a net.Dialer

	ConnectTimeout time.Duration // to the application; default 1 s
	IdleTimeout    time.Duration // of TCP and upgraded connections without a byte either way; default 1 h
	DrainTimeout   time.Duration // after ctx ended; default 30 s

	Log       *slog.Logger
	AccessLog io.Writer // one JSON object a line; nil: none
	Metrics   prometheus.Registerer
	Tracer    trace.Tracer // nil: traceparent is kept or created, no spans
}

// Dial connects, as net.Dialer.DialContext.
type Dial func(ctx context.Context, network, address string) (net.Conn, error)

// LocalListener leads to one service, for applications that know no proxy.
type LocalListener struct {
	Listener  net.Listener
	Authority string // as callers write it: "payments.shop:8080"
}

// Sidecar is the data path of one workload.
type Sidecar struct {
	cfg       Config
	log       *slog.Logger
	accessLog *accessLog // nil: none
	metrics   *metrics
	names     names
	certs     certs
	workload  string // Config.Workload
	hop       *hop.Client
	balancer  *balance.Balancer
	faults    *fault.Injector
	server    *hop.Server // nil: no inbound
	apps      apps
	plaintext *plaintext
	locals    []string // authorities of cfg.Local
	captured  *captured

	draining atomic.Bool
	mirrors  chan struct{} // a slot each

	coreCtx    context.Context // set by Run, ends after the drain
	background sync.WaitGroup

	applyMu sync.Mutex
	applied atomic.Uint64 // changed under applyMu: version of the Table that balancer and faults obey

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
	if cfg.Dial == nil {
		cfg.Dial = (&net.Dialer{}).DialContext
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	s := &Sidecar{
		cfg: cfg, log: cfg.Log, metrics: newMetrics(cfg.Metrics), hop: cfg.Hop, balancer: cfg.Balancer,
		faults: fault.New(cfg.Log), mirrors: make(chan struct{}, maxMirrors), workload: cfg.Workload.String(),
	}
	s.hop.OnDoubt(func(to hop.Peer, doubtful bool) { s.balancer.Doubt(to.Address, to.SPIFFEID, to.Gateway, doubtful) })
	s.accessLog = newAccessLog(cfg.AccessLog, s.metrics.dropped.Inc)
	s.captured = newCaptured(cfg.Capture, cfg.Metrics)
	s.plaintext = newPlaintext(cfg.Locality.Cluster, s.newApp)
	s.apps.open(s)
	for _, l := range cfg.Local {
		authority, err := authorityOf(l.Authority, cfg.Namespace, 80)
		if err != nil {
			return nil, fmt.Errorf("local listener %s: %w", l.Listener.Addr(), err)
		}
		s.locals = append(s.locals, authority)
	}
	if cfg.Inbound != nil {
		s.server = hop.NewServer(hop.ServerConfig{
			Source: cfg.Source, Handle: s.inbound, Admit: s.admit, Wrap: s.faults.Wrap,
			OnReject:     func(reason string) { s.metrics.rejects.WithLabelValues("peer", reason).Inc() },
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
	for _, ln := range s.captured.Inbound {
		in.run(stopServing, func() error { return s.accept(serveCtx, ln, s.serveInboundCaptured) })
	}
	outCtx, stopOut := context.WithCancel(s.coreCtx)
	defer stopOut()
	var out group
	if s.cfg.Outbound != nil {
		out.run(stopServing, func() error { return s.serveApp(outCtx, s.cfg.Outbound, "") })
	}
	for i, l := range s.cfg.Local {
		out.run(stopServing, func() error { return s.serveApp(outCtx, l.Listener, s.locals[i]) })
	}
	for _, ln := range s.captured.Outbound {
		out.run(stopServing, func() error { return s.accept(outCtx, ln, s.serveCaptured) })
	}
	<-serveCtx.Done()
	result := in.wait(nil)
	stopOut()
	result = out.wait(result)
	s.background.Wait()
	stopCore()
	result = core.wait(result)
	s.plaintext.close()
	s.apps.close()
	if s.accessLog != nil {
		s.accessLog.flush()
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
	for _, ln := range append(s.captured.Outbound, s.captured.Inbound...) {
		_ = ln.Close()
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
	if t.Version <= s.applied.Load() {
		return
	}
	s.applyMu.Lock()
	defer s.applyMu.Unlock()
	if t.Version <= s.applied.Load() {
		return
	}
	s.balancer.Update(t)
	s.faults.Set(s.whole(t.Faults))
	s.applied.Store(t.Version) // last: who sees it finds the rest in force
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

// Reverify closes the hop connections, of both directions, whose peer the current bundles do not vouch for. That happens at each
// change of the bundles by itself; when Reverify returns it has happened.
func (s *Sidecar) Reverify() {
	s.hop.Reverify()
	if s.server != nil {
		s.server.Reverify()
	}
}

// watchFaults sends all callers away when a drill drains this workload, and lets handshakes suffer what a drill does to identities.
func (s *Sidecar) watchFaults(ctx context.Context) error {
	defer s.cfg.Source.SetFault(identity.Fault{})
	var suffered identity.Fault
	for {
		active, changed := s.faults.Active()
		var f identity.Fault
		for i := range active {
			switch active[i].Mode { // of whatever ports: one SVID is for all
			case proxy.FaultExpire:
				f.Expired = true
			case proxy.FaultDistrust:
				f.Distrusted = append(f.Distrusted, active[i].Root)
			}
		}
		slices.Sort(f.Distrusted)
		if f.Expired != suffered.Expired || !slices.Equal(f.Distrusted, suffered.Distrusted) {
			s.cfg.Source.SetFault(f)
			if f.Expired && !suffered.Expired { // as at the end of an SVID: no new streams
				s.hop.GoAway()
				if s.server != nil {
					s.server.GoAway()
				}
			}
			suffered = f
		}
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
