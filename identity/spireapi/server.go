package spireapi

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	debugv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/debug/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	loggerv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/logger/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/identity/attest"
	"github.com/hanse-mesh/hanse/identity/bundle"
	"github.com/hanse-mesh/hanse/identity/ca"
)

const (
	activateTime = 500 * time.Millisecond // for the store to note that an agent uses its new SVID
	heardOf      = 30 * time.Second       // after which a silent agent is waited for no more
	syncInterval = 5 * time.Second        // of stock agents
	ownInterval  = time.Second            // of our own, which push what they load
)

// Config of a Server. Authority, Bundles, Tokens and KV are required.
type Config struct {
	Authority *ca.Authority
	Bundles   *bundle.Store // federated bundles and relations
	Tokens    *attest.Tokens
	KV        KV // agents and entries
	KeptKV    KV // the same, for Keep: where there are replicas, one that only the leader can write; default KV

	// Attestors check what agents show other than tokens, by the type that they call it: x509pop, k8s_psat, hanse_pod.
	Attestors map[string]attest.Attestor

	// OwnBundle is the bundle of the whole trust domain, with the roots of every replica. Default: Authority.Bundle.
	OwnBundle func() *spiffebundle.Bundle
	// Tainted are key IDs of authorities that agents are to leave besides those that Authority has tainted: other replicas'. May be nil.
	Tainted func() map[string]bool
	// Refresh pulls the bundle of a related trust domain from its endpoint, for RefreshBundle. May be nil.
	Refresh func(ctx context.Context, td spiffeid.TrustDomain) error

	// AgentLife is the life of an agent's SVID, default 24 h: an agent that finds no server for longer needs a new token.
	AgentLife        time.Duration
	AttestsPerSecond float64 // per source address, default 20
	AttestBurst      int     // default 100
	// AllAttestsPerSecond is for all sources together, default 10 times that of one, with a burst of 10 times as many: a flood from many
	// addresses leaves the CPU to those who are attested.
	AllAttestsPerSecond float64
	AllAttestBurst      int

	// Level is what the Logger service changes. Without it that service is not served.
	Level *slog.LevelVar

	Now        func() time.Time
	Log        *slog.Logger
	Registerer prometheus.Registerer // may be nil
}

// Server is the SPIRE Server API of one replica.
type Server struct {
	// read-only after New
	cfg      Config
	td       spiffeid.TrustDomain
	log      *slog.Logger
	src      *identity.Source // presents <td>/spire/server
	reg      *registry
	limit    *limiter
	all      *limiter // of all sources together
	attest   *prometheus.CounterVec
	reasons  *prometheus.CounterVec
	refusals *prometheus.CounterVec
	started  time.Time

	attesting chan struct{} // one for each attestation that is worked on

	floods, strangers, unwritten identity.Seldom // of their lines in the log

	mu       sync.Mutex
	seen     map[string]activity  // guarded by mu; by agent ID
	followed map[string]*follower // guarded by mu; by agent
}

// activity is what an agent has loaded.
type activity struct {
	at       time.Time // of its last call
	loaded   map[spiffeid.TrustDomain]loaded
	signedBy string // key ID of the root of the newest X509-SVID for a workload
}

type loaded struct {
	sequence uint64
	since    time.Time
	handsOn  time.Duration // until what uses the agent has it, too
}

// New loads the agents and entries from cfg.KV and builds a Server.
func New(ctx context.Context, cfg Config) (*Server, error) {
	if cfg.AgentLife <= 0 {
		cfg.AgentLife = 24 * time.Hour
	}
	if cfg.AttestsPerSecond <= 0 {
		cfg.AttestsPerSecond = 20
	}
	if cfg.AttestBurst <= 0 {
		cfg.AttestBurst = 100
	}
	if cfg.AllAttestsPerSecond <= 0 {
		cfg.AllAttestsPerSecond = 10 * cfg.AttestsPerSecond
	}
	if cfg.AllAttestBurst <= 0 {
		cfg.AllAttestBurst = 10 * cfg.AttestBurst
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.OwnBundle == nil {
		cfg.OwnBundle = cfg.Authority.Bundle
	}
	s := &Server{
		cfg:       cfg,
		td:        cfg.Authority.TrustDomain(),
		log:       cfg.Log,
		src:       identity.NewSource(),
		limit:     newLimiter(cfg.AttestsPerSecond, cfg.AttestBurst, cfg.Now),
		all:       newLimiter(cfg.AllAttestsPerSecond, cfg.AllAttestBurst, cfg.Now),
		seen:      map[string]activity{},
		attesting: make(chan struct{}, maxAttesting),
		followed:  map[string]*follower{},
		started:   cfg.Now(),
		attest: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hanse_identity_attestations_total", Help: "Agent attestations, by result (ok, refused, limited, error)."}, []string{"result"}),
		reasons: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hanse_identity_attestations_refused_total", Help: "Agent attestations that were refused or limited, by type of evidence and reason."}, []string{"type", "reason"}),
		refusals: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hanse_identity_refused_total", Help: "Calls of the SPIRE Server API, parts of batches and handshakes that were refused, by call and gRPC code."}, []string{"call", "code"}),
	}
	if s.cfg.KeptKV == nil {
		s.cfg.KeptKV = cfg.KV
	}
	s.reg = newRegistry(cfg.KV, s.td)
	if err := s.Reload(ctx); err != nil {
		return nil, err
	}
	svid, err := cfg.Authority.NewSVID(identity.SPIREServerID(s.td), 0)
	switch {
	case err == nil:
		s.src.SetSVID(svid)
	case !errors.Is(err, ca.ErrNotActive): // a joining replica gets its SVID when Run sees its root active
		return nil, fmt.Errorf("serve SPIRE Server API of %s: %w", s.td, err)
	}
	if cfg.Registerer != nil {
		for _, c := range []prometheus.Collector{s.attest, s.reasons, s.refusals,
			prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "hanse_identity_agents", Help: "Attested agents."},
				func() float64 { agents, _ := s.reg.counts(); return float64(agents) }),
			prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "hanse_identity_entries", Help: "Registration entries."},
				func() float64 { _, entries := s.reg.counts(); return float64(entries) }),
		} {
			if err := cfg.Registerer.Register(c); err != nil {
				return nil, fmt.Errorf("register metrics: %w", err)
			}
		}
	}
	return s, nil
}

// Run keeps the server's own SVID and forgets expired agents and tokens, until ctx ends.
func (s *Server) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	var err error
	wg.Go(func() {
		err = s.cfg.Authority.RunSVID(ctx, identity.SPIREServerID(s.td), 0, s.src)
	})
	wg.Go(func() { s.tellOfBundles(ctx) })
	ticker := time.NewTicker(10 * time.Minute)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			wg.Wait()
			return err
		case <-ticker.C:
			if err := s.Sweep(ctx); err != nil {
				s.log.Warn("cannot forget expired agents and tokens; tried again later", "error", err)
			}
		}
	}
}

// Sweep forgets agents and tokens that expired more than a day ago. Run calls it now and then.
func (s *Server) Sweep(ctx context.Context) error {
	return errors.Join(s.cfg.Tokens.Sweep(ctx), s.sweepAgents(ctx))
}

// Changed takes in what another replica has stored under a key of the KV; a nil value says that it is gone.
func (s *Server) Changed(key string, value []byte) error { return s.reg.changed(key, value) }

// Reload reads all agents and entries again.
func (s *Server) Reload(ctx context.Context) error {
	if err := s.reg.load(ctx); err != nil {
		return fmt.Errorf("load agents and entries of %s: %w", s.td, err)
	}
	return nil
}

// RegisterAgent registers the services for the TLS port (7444), where TLSConfig must be in use.
func (s *Server) RegisterAgent(r grpc.ServiceRegistrar) { s.register(r, false) }

// RegisterAdmin registers the services for a Unix socket whose permissions admit administrators only: every caller is one.
func (s *Server) RegisterAdmin(r grpc.ServiceRegistrar) { s.register(r, true) }

func (s *Server) register(r grpc.ServiceRegistrar, local bool) {
	svc := service{Server: s, local: local}
	agentv1.RegisterAgentServer(r, &agentService{service: svc})
	svidv1.RegisterSVIDServer(r, &svidService{service: svc})
	entryv1.RegisterEntryServer(r, &entryService{service: svc})
	bundlev1.RegisterBundleServer(r, &bundleService{service: svc})
	trustdomainv1.RegisterTrustDomainServer(r, &trustDomainService{service: svc})
	localauthorityv1.RegisterLocalAuthorityServer(r, &localAuthorityService{service: svc})
	if !local {
		return
	}
	// These are the local socket's alone, as with a stock server.
	healthv1.RegisterHealthServer(r, &healthService{service: svc})
	debugv1.RegisterDebugServer(r, &debugService{service: svc})
	if s.cfg.Level != nil {
		loggerv1.RegisterLoggerServer(r, &loggerService{service: svc, launched: s.cfg.Level.Level()})
	}
}

// ServerOptions makes a gRPC server count and log what is refused. Use them for each server that services are registered on.
func (s *Server) ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
			resp, err := h(ctx, req)
			if err != nil {
				s.refused(ctx, path.Base(info.FullMethod), err)
			}
			return resp, err
		}),
		grpc.ChainStreamInterceptor(func(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, h grpc.StreamHandler) error {
			err := h(srv, stream)
			if err != nil {
				s.refused(stream.Context(), path.Base(info.FullMethod), err)
			}
			return err
		}),
	}
}

// refused counts and logs what a caller was not given. Who asks for what is not there, or leaves, was not refused.
func (s *Server) refused(ctx context.Context, call string, err error) {
	code := status.Code(err)
	others := code == codes.NotFound && (call == "BatchNewX509SVID" || call == "NewJWTSVID") // an entry that is another's is not told from none
	switch {
	case others, code == codes.PermissionDenied, code == codes.Unauthenticated, code == codes.InvalidArgument, code == codes.ResourceExhausted, code == codes.FailedPrecondition:
		s.refusals.WithLabelValues(call, code.String()).Inc()
		if call != "AttestAgent" { // which says more itself
			var id string
			if chain := callerChain(ctx); len(chain) > 0 && len(chain[0].URIs) > 0 {
				id = chain[0].URIs[0].String()
			}
			s.log.Warn("caller refused", "call", call, "caller", id, "from", remoteHost(ctx), "error", err)
		}
	}
}

// refusedPart is refused for a part of a batch, whose call succeeds.
func (s *Server) refusedPart(ctx context.Context, call string, err error) {
	if err != nil {
		s.refused(ctx, call, err)
	}
}

// TLSConfig presents spiffe://<td>/spire/server, which stock agents insist on, and asks for a certificate. One that is
// given must be of this trust domain and verify; agents attest without one. Session tickets are off.
func (s *Server) TLSConfig() *tls.Config {
	cfg := identity.ServerTLS(s.src, identity.AuthorizeAny(), "h2")
	cfg.ClientAuth = tls.RequestClientCert
	cfg.VerifyConnection = func(state tls.ConnectionState) error {
		if len(state.PeerCertificates) == 0 {
			return nil
		}
		if _, err := identity.Verify(state.PeerCertificates, s.cfg.OwnBundle(), s.cfg.Now()); err != nil {
			s.refusals.WithLabelValues("handshake", codes.Unauthenticated.String()).Inc()
			if s.strangers.Due(s.cfg.Now()) {
				s.log.Warn("caller refused; more of them in the next 10 s are only counted", "call", "handshake", "error", err)
			}
			return fmt.Errorf("verify caller: %w", err)
		}
		return nil
	}
	return cfg
}

// Missing names the agents that have not loaded the bundle of td with at least that sequence, or did so less than one sync
// interval (5 s) ago: what a stock agent fetches it hands on within that time; of our own agents it is 1 s. It asks for agents that were heard of in
// the last 30 s or follow its changes, and until 30 s after New for all unexpired ones; for a foreign td, for those that federate with it.
func (s *Server) Missing(td spiffeid.TrustDomain, sequence uint64) []string {
	return s.missing(td, sequence, math.MaxInt)
}

// AnyMissing reports whether Missing names anybody.
func (s *Server) AnyMissing(td spiffeid.TrustDomain, sequence uint64) bool {
	return len(s.missing(td, sequence, 1)) > 0
}

func (s *Server) missing(td spiffeid.TrustDomain, sequence uint64, most int) []string {
	now := s.cfg.Now()
	starting := now.Sub(s.started) < heardOf
	var out []string
	for _, a := range s.reg.allAgents() {
		if len(out) == most {
			break
		}
		s.mu.Lock()
		act, heard := s.seen[a.ID]
		l, ok := act.loaded[td]
		if s.followed[a.ID] != nil { // which asks seldom, and is there
			act.at = now
		}
		s.mu.Unlock()
		switch {
		case a.Banned:
		case heard && now.Sub(act.at) > heardOf, !heard && (!starting || a.Expires <= now.Unix()):
		case ok && l.sequence >= sequence && now.Sub(l.since) >= l.handsOn:
		case td == s.td || s.federates(a, td, now):
			out = append(out, a.ID)
		}
	}
	return out
}

// federates reports whether an entry of the agent federates with td.
func (s *Server) federates(a *agentRecord, td spiffeid.TrustDomain, now time.Time) bool {
	svc := service{Server: s}
	return slices.ContainsFunc(s.reg.authorized(a, now), func(e *entryRecord) bool {
		return slices.Contains(svc.federatesWith(e), td.Name())
	})
}

// noteLoaded remembers that the calling agent, if it is one, was given a bundle.
func (s *service) noteLoaded(ctx context.Context, td spiffeid.TrustDomain, sequence uint64) {
	a, err := s.agent(ctx)
	if err != nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	act := s.seen[a.ID]
	if l := act.loaded[td]; l.sequence != sequence {
		if act.loaded == nil {
			act.loaded = map[spiffeid.TrustDomain]loaded{}
		}
		act.loaded[td] = loaded{sequence: sequence, since: s.cfg.Now(), handsOn: handsOn(ctx)}
		s.seen[a.ID] = act
	}
}

// handsOn is how long the caller takes to hand on what it loads. An agent that lies about what it is deceives its own workloads only.
func handsOn(ctx context.Context) time.Duration {
	md, _ := metadata.FromIncomingContext(ctx)
	if agent := md.Get("user-agent"); len(agent) == 1 && strings.HasPrefix(agent[0], identity.AgentUserAgent+" ") {
		return ownInterval
	}
	return syncInterval
}

// service is what the services share.
type service struct {
	*Server
	local bool // every caller is an administrator
}

// callerChain is the certificates of the caller, leaf first, nil without one. The handshake has verified them.
func callerChain(ctx context.Context) []*x509.Certificate {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return nil
	}
	return info.State.PeerCertificates
}

// callerID checks the caller's certificate again, since connections outlive both certificates and roots.
func (s *service) callerID(ctx context.Context) (spiffeid.ID, *x509.Certificate, error) {
	chain := callerChain(ctx)
	if len(chain) == 0 {
		return spiffeid.ID{}, nil, status.Error(codes.Unauthenticated, "the caller presented no certificate")
	}
	cert := chain[0]
	id, err := x509svid.IDFromCert(cert)
	if err != nil {
		return spiffeid.ID{}, nil, status.Errorf(codes.Unauthenticated, "the caller's certificate: %v", err)
	}
	if s.cfg.Now().After(cert.NotAfter) {
		return spiffeid.ID{}, nil, denied(types.PermissionDeniedDetails_AGENT_EXPIRED, "the SVID of %s has expired", id)
	}
	own := s.cfg.OwnBundle()
	if len(chain) == 1 { // verified before by a root that signed it itself: is that still there?
		for _, root := range own.X509Authorities() {
			if string(root.SubjectKeyId) == string(cert.AuthorityKeyId) {
				return id, cert, nil
			}
		}
	} else if _, err := identity.Verify(chain, own, s.cfg.Now()); err == nil {
		return id, cert, nil
	}
	return spiffeid.ID{}, nil, denied(types.PermissionDeniedDetails_AGENT_NOT_ATTESTED, "the root that signed the SVID of %s is not trusted any more", id)
}

// downstream refuses everybody but downstream servers.
func (s *service) downstream(ctx context.Context) (spiffeid.ID, error) {
	if s.local {
		return spiffeid.ID{}, status.Error(codes.PermissionDenied, "a downstream server must present its SVID on the TLS port")
	}
	id, _, err := s.callerID(ctx)
	if err != nil {
		return id, err
	}
	if !s.reg.isDownstream(id, s.cfg.Now()) {
		return id, status.Errorf(codes.PermissionDenied, "%s is not a downstream server: no entry of that ID has the downstream flag", id)
	}
	if !s.limit.allow("downstream " + id.String()) {
		return id, status.Errorf(codes.ResourceExhausted, "too many calls of %s, try again later", id)
	}
	return id, nil
}

// admin refuses everybody but administrators.
func (s *service) admin(ctx context.Context) error {
	if s.local {
		return nil
	}
	id, _, err := s.callerID(ctx)
	if err != nil {
		return err
	}
	if identity.IsAdminID(s.td, id) || s.reg.isAdmin(id, s.cfg.Now()) {
		return nil
	}
	return status.Errorf(codes.PermissionDenied, "%s is not an administrator", id)
}

// agent returns the calling agent, which must be attested and present its active SVID, or the one just renewed, which
// becomes active by this; while the store is away both are good.
func (s *service) agent(ctx context.Context) (*agentRecord, error) {
	id, cert, err := s.callerID(ctx)
	if err != nil {
		return nil, err
	}
	a := s.reg.agent(id.String())
	if serial := cert.SerialNumber.String(); a == nil || serial != a.Serial && serial != a.NewSerial {
		if a, err = s.reg.fetchAgent(ctx, id); err != nil { // another replica has seen it a moment ago
			return nil, s.unavailable("find agent", err)
		}
	}
	switch {
	case a == nil:
		return nil, denied(types.PermissionDeniedDetails_AGENT_NOT_ATTESTED, "agent %s is not attested", id)
	case a.Banned:
		return nil, denied(types.PermissionDeniedDetails_AGENT_BANNED, "agent %s is banned", id)
	}
	switch serial := cert.SerialNumber.String(); serial {
	case a.Serial:
	case a.NewSerial:
		wctx, cancel := context.WithTimeout(ctx, activateTime)
		defer cancel()
		now, err := s.reg.updateAgent(wctx, a.ID, func(n *agentRecord) error {
			if n.NewSerial == serial {
				n.Serial, n.Expires, n.Authority = n.NewSerial, n.NewExpires, n.NewAuthority
				n.NewSerial, n.NewExpires, n.NewAuthority = "", 0, ""
			}
			return nil
		})
		switch {
		case err == nil:
			a = now
		case errors.Is(err, errNoAgent):
			return nil, denied(types.PermissionDeniedDetails_AGENT_NOT_ATTESTED, "agent %s is not attested", id)
		case s.unwritten.Due(s.cfg.Now()): // the store is away: it is written down another time
			s.log.Warn("that an agent has begun to use its new SVID is not written down; tried again at its next call", "agent", a.ID, "error", err)
		}
	default:
		return nil, denied(types.PermissionDeniedDetails_AGENT_NOT_ACTIVE, "the SVID of agent %s is not its active one", id)
	}
	s.mu.Lock()
	act := s.seen[a.ID]
	act.at = s.cfg.Now()
	s.seen[a.ID] = act
	s.mu.Unlock()
	return a, nil
}

func denied(reason types.PermissionDeniedDetails_Reason, format string, args ...any) error {
	st := status.Newf(codes.PermissionDenied, format, args...)
	if with, err := st.WithDetails(&types.PermissionDeniedDetails{Reason: reason}); err == nil {
		st = with
	}
	return st.Err()
}

// internal logs what went wrong here and keeps it from the caller.
func (s *Server) internal(what string, err error) error {
	s.log.Error("cannot serve the SPIRE Server API", "what", what, "error", err)
	return status.Errorf(codes.Internal, "%s: internal error, see the server's log", what)
}

// unavailable is internal, where another replica, or a moment later this one, may serve.
func (s *Server) unavailable(what string, err error) error {
	s.log.Warn("cannot serve the SPIRE Server API now", "what", what, "error", err)
	return status.Errorf(codes.Unavailable, "%s: not now, see the server's log", what)
}

func invalid(format string, args ...any) error {
	return status.Errorf(codes.InvalidArgument, format, args...)
}

// statusOf is the part of a batch's answer that stands for err.
func statusOf(err error) *types.Status {
	if err == nil {
		return &types.Status{Code: int32(codes.OK), Message: "OK"}
	}
	st := status.Convert(err)
	return &types.Status{Code: int32(st.Code()), Message: st.Message()}
}

func remoteHost(ctx context.Context) string {
	p, ok := peer.FromContext(ctx)
	if !ok || p.Addr == nil {
		return ""
	}
	host, _, err := net.SplitHostPort(p.Addr.String())
	if err != nil {
		return p.Addr.String()
	}
	return host
}
