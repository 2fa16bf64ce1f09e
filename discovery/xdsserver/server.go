package xdsserver

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"sync"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	loadv3 "github.com/envoyproxy/go-control-plane/envoy/service/load_stats/v3"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/discovery/xdsgen"
	"github.com/hanse-mesh/hanse/discovery/xdspb"
	"github.com/hanse-mesh/hanse/identity"
)

// Bounds and intervals.
const (
	maxNames      = 4*4096 + 64 // of all types, on one stream: 4,096 authorities need a Listener, a Cluster and endpoints each, and as many hosts a Service
	maxTypes      = 16          // on one stream
	maxMessage    = 4 << 20     // bytes received
	maxResponse   = 256 << 10   // bytes of resources in one delta response, unless one is larger
	reportDefault = 5 * time.Second
	callersEvery  = 30 * time.Second // how often shares of callers are taken anew
)

// Config of a Server.
type Config struct {
	Source      *identity.Source     // the control plane's SVID and the bundles; required
	TrustDomain spiffeid.TrustDomain // own; required
	Debounce    time.Duration        // views within it of the last are taken together; 0 is 20 ms
	OnReport    func(Report)         // called for each load report, also an empty one, from its stream's goroutine; may be nil
	Log         *slog.Logger
	Registerer  prometheus.Registerer // may be nil
	Now         func() time.Time      // nil: time.Now
}

// Server serves xDS. Register it, serve TLSConfig, and call Run.
type Server struct {
	discoveryv3.UnimplementedAggregatedDiscoveryServiceServer
	loadv3.UnimplementedLoadReportingServiceServer

	// read-only after New
	cfg     Config
	log     *slog.Logger
	now     func() time.Time
	metrics *metrics
	cache   *cache
	wake    chan struct{} // to Run: a view is pending
	ready   chan struct{} // closed by Run when there is a first view
	done    chan struct{} // closed by Run at its end

	mu           sync.Mutex
	pending      *discovery.Clusterset                    // guarded by mu; nil: none
	pendingSince time.Time                                // guarded by mu
	sessions     map[*session]struct{}                    // guarded by mu
	comings      uint64                                   // guarded by mu; grows as streams say who they are and end, and as proxies are expected and are not
	roster       roster                                   // guarded by mu
	reporters    map[*reporter]struct{}                   // guarded by mu
	trust        map[string]uint64                        // guarded by mu; nil until SetTrust. Never changed in place
	trustRev     uint64                                   // guarded by mu; goes with trust
	authorities  map[string][]byte                        // guarded by mu; goes with trust. Never changed in place
	trustGen     uint64                                   // guarded by mu
	faults       func(viewer xdsgen.Viewer) *xdspb.Faults // guarded by mu
	faultGen     uint64                                   // guarded by mu
	reportEvery  time.Duration                            // guarded by mu
	callers      xdsgen.Callers                           // guarded by mu; live counts
	elsewhere    xdsgen.Callers                           // guarded by mu; not changed in place: those of other replicas
	callersStale bool                                     // guarded by mu
	expected     map[string]time.Time                     // guarded by mu; by proxy's ID: until when; zero while not serving
	serving      bool                                     // guarded by mu: there has been a view
	closed       bool                                     // guarded by mu: Run has returned
}

// New returns a Server that knows no view yet.
func New(cfg Config) (*Server, error) {
	if cfg.Source == nil || cfg.TrustDomain.IsZero() {
		return nil, errors.New("xds server: needs a Source and a trust domain")
	}
	m, err := newMetrics(cfg.Registerer)
	if err != nil {
		return nil, fmt.Errorf("xds server: register metrics: %w", err)
	}
	s := &Server{
		cfg: cfg, log: cfg.Log, now: cfg.Now, metrics: m, cache: newCache(),
		wake:        make(chan struct{}, 1),
		ready:       make(chan struct{}),
		done:        make(chan struct{}),
		sessions:    make(map[*session]struct{}),
		reporters:   make(map[*reporter]struct{}),
		expected:    make(map[string]time.Time),
		callers:     make(xdsgen.Callers),
		reportEvery: reportDefault,
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if s.now == nil {
		s.now = time.Now
	}
	if s.cfg.Debounce == 0 {
		s.cfg.Debounce = 20 * time.Millisecond
	}
	return s, nil
}

// Register adds the aggregated discovery service (delta and state of the world) and the load reporting service.
func (s *Server) Register(r grpc.ServiceRegistrar) {
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(r, s)
	loadv3.RegisterLoadReportingServiceServer(r, s)
}

// TLSConfig requires an SVID of the own trust domain.
func (s *Server) TLSConfig() *tls.Config {
	return identity.ServerTLS(s.cfg.Source, identity.AuthorizeMemberOf(s.cfg.TrustDomain), "h2")
}

// ServerOptions are what the port wants of its grpc.Server: TLSConfig, and limits on sizes, idleness and age.
func (s *Server) ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.Creds(credentials.NewTLS(s.TLSConfig())),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxConcurrentStreams(100),
		grpc.ConnectionTimeout(10 * time.Second),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			Time: 20 * time.Second, Timeout: 10 * time.Second,
			MaxConnectionAge: 30 * time.Minute, MaxConnectionAgeGrace: time.Minute, // so that an SVID is presented anew
		}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
	}
}

// Run applies views and serves streams until ctx ends; then it ends all streams. Before the first view streams wait: a control
// plane that knows nothing yet must not take away what clients have.
func (s *Server) Run(ctx context.Context) error {
	defer s.end()
	tick := time.NewTicker(callersEvery)
	defer tick.Stop()
	var set *discovery.Clusterset
	var callers xdsgen.Callers
	var last time.Time
	changed := s.cfg.Source.Changed()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
			changed = s.cfg.Source.Changed()
			s.verifyAll()
			continue
		case <-tick.C:
			s.cache.sweep(s.now())
			fresh, ok := s.freshCallers()
			if !ok || set == nil {
				continue
			}
			callers = fresh
		case <-s.wake:
			if wait := s.cfg.Debounce - s.now().Sub(last); wait > 0 && !last.IsZero() {
				select {
				case <-ctx.Done():
					return nil
				case <-time.After(wait):
				}
			}
			set = s.takePending(set)
		}
		if s.cache.apply(set, callers, s.pendingTime()) {
			s.wakeAll()
		}
		if last.IsZero() {
			s.serves()
			close(s.ready)
		}
		last = s.now()
	}
}

// SetView makes set the view that is served. It returns at once; views that follow each other closely are taken together.
func (s *Server) SetView(set *discovery.Clusterset) {
	s.mu.Lock()
	if s.pending == nil {
		s.pendingSince = s.now()
	}
	s.pending = set
	s.mu.Unlock()
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

func (s *Server) takePending(old *discovery.Clusterset) *discovery.Clusterset {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pending == nil {
		return old
	}
	set := s.pending
	s.pending = nil
	return set
}

func (s *Server) pendingTime() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pendingSince
}

// View is the view that is served now, for explain.
func (s *Server) View() *xdsgen.View {
	v, _ := s.cache.current()
	return v
}

// SetTrust announces the newest bundle sequence of each trusted domain to all proxies. revision differs whenever what is trusted
// has changed otherwise; a proxy then loads every bundle anew. authorities are the digests of each domain's X.509 authorities (identity.Digest).
func (s *Server) SetTrust(sequences map[string]uint64, revision uint64, authorities map[string][]byte) {
	s.mu.Lock()
	if s.trust != nil && s.trustRev == revision && maps.Equal(s.trust, sequences) && maps.EqualFunc(s.authorities, authorities, bytes.Equal) {
		s.mu.Unlock()
		return
	}
	s.trust, s.trustRev, s.authorities = maps.Clone(sequences), revision, maps.Clone(authorities)
	s.trustGen++
	s.mu.Unlock()
	s.wakeAll()
}

// SetFaults says which drills are in force for a proxy, and sends the answers. f is called from many goroutines.
func (s *Server) SetFaults(f func(viewer xdsgen.Viewer) *xdspb.Faults) {
	s.mu.Lock()
	s.faults = f
	s.mu.Unlock()
	s.FaultsChanged()
}

// FaultsChanged asks the function of SetFaults again for every proxy, and sends what differs. A drill's owner calls it to
// renew, every few seconds.
func (s *Server) FaultsChanged() {
	s.mu.Lock()
	s.faultGen++
	s.mu.Unlock()
	s.wakeAll()
}

// SetReportInterval asks all proxies for load reports at that interval; 0 is the default of 5 s.
func (s *Server) SetReportInterval(d time.Duration) {
	if d <= 0 {
		d = reportDefault
	}
	s.mu.Lock()
	s.reportEvery = d
	for r := range s.reporters {
		r.kick()
	}
	s.mu.Unlock()
}

// awaitView blocks until there is a view.
func (s *Server) awaitView(ctx context.Context) error {
	select {
	case <-s.ready:
		return nil
	case <-s.done:
		return errShutdown
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *Server) wakeAll() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for ss := range s.sessions {
		ss.kick()
	}
}

// verifyAll ends the streams whose caller no bundle verifies any more.
func (s *Server) verifyAll() {
	s.mu.Lock()
	sessions := make([]*session, 0, len(s.sessions))
	for ss := range s.sessions {
		sessions = append(sessions, ss)
	}
	reporters := make([]*reporter, 0, len(s.reporters))
	for r := range s.reporters {
		reporters = append(reporters, r)
	}
	s.mu.Unlock()
	check := func(p *peer, end context.CancelCauseFunc) {
		if _, err := s.cfg.Source.Verify(p.chain); err != nil && s.now().Before(p.chain[0].NotAfter) {
			s.log.Warn("xds stream ended: its caller is not trusted any more", "spiffe_id", p.id.String(), "error", err)
			end(status.Error(codes.Unauthenticated, "no bundle verifies the SVID of this connection any more"))
		}
	}
	for _, ss := range sessions {
		check(ss.peer, ss.end)
	}
	for _, r := range reporters {
		check(r.peer, r.end)
	}
}

// end closes every stream, now and later.
func (s *Server) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	close(s.done)
	gone := status.Error(codes.Unavailable, "the control plane is shutting down")
	for ss := range s.sessions {
		ss.end(gone)
	}
	for r := range s.reporters {
		r.end(gone)
	}
}

// called counts a proxy in or out of a service's callers.
func (s *Server) called(service discovery.Name, at discovery.Locality, n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	m := s.callers[service]
	if m == nil {
		m = make(map[discovery.Locality]int)
		s.callers[service] = m
	}
	if m[at] += n; m[at] == 0 {
		delete(m, at)
		if len(m) == 0 {
			delete(s.callers, service)
		}
	}
	s.callersStale = true
}

func (s *Server) freshCallers() (xdsgen.Callers, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.callersStale {
		return nil, false
	}
	s.callersStale = false
	out := s.callersLocked()
	for n, m := range s.elsewhere {
		if out[n] == nil {
			out[n] = make(map[discovery.Locality]int, len(m))
		}
		for at, count := range m {
			out[n][at] += count
		}
	}
	return out, true
}

func (s *Server) callersLocked() xdsgen.Callers {
	out := make(xdsgen.Callers, len(s.callers))
	for n, m := range s.callers {
		out[n] = maps.Clone(m)
	}
	return out
}

// Callers counts the proxies here that call each service.
func (s *Server) Callers() xdsgen.Callers {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.callersLocked()
}

// SetCallersElsewhere counts those at other replicas of this control plane, so that all of them make the same levels. They must not be
// changed later.
func (s *Server) SetCallersElsewhere(callers xdsgen.Callers) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.elsewhere, s.callersStale = callers, true
}
