package onspire

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"log/slog"
	"maps"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/identity/spiretypes"
)

const (
	poll      = time.Second      // between looks at the own bundle
	lookAgain = time.Minute      // at entries and bundles, which somebody may have removed
	callTime  = 10 * time.Second // of one call
	pageSize  = 500
	batchSize = 100
	maxItems  = 1 << 20 // of a list that a server sends
)

// Config of a Server. Address, WorkloadAPI, TrustDomain and Relay are required.
type Config struct {
	Address     string // of spire-server: unix:///path of its admin socket, or host:port, where the own SVID must be an administrator's
	WorkloadAPI string // of the spire-agent beside this control plane: unix:///path
	TrustDomain spiffeid.TrustDomain
	Relay       string // host:port at which spire-server reaches this control plane's bundle endpoint

	// Linger is how long an entry outlives what it was made for, so that a service that comes back finds its workloads with their SVIDs; default 1 min.
	Linger time.Duration
	// Lead says whether this replica writes, and for which term. Nil: always.
	Lead func() (Term, bool)

	Now        func() time.Time
	Log        *slog.Logger
	Registerer prometheus.Registerer // may be nil
}

// Term is a time in which a replica leads. It gives each write a context that ends with it, or an error if it is over: spire-server knows no
// fences, so a replica that was paused must find out for itself that another one leads now.
type Term func(ctx context.Context) (context.Context, context.CancelFunc, error)

// Server is a spire-server as this control plane uses it. It is safe for concurrent use.
type Server struct {
	// read-only after New
	cfg      Config
	log      *slog.Logger
	creds    *identity.Source // the own SVID, and the own bundle as the agent has it
	failures *prometheus.CounterVec
	wake     chan struct{} // size 1

	conn      *grpc.ClientConn
	entries   entryv1.EntryClient
	bundles   bundlev1.BundleClient
	relations trustdomainv1.TrustDomainClient

	mu          sync.Mutex
	wantEntries []Entry                                       // guarded by mu; nil until SetEntries
	wantBundles map[spiffeid.TrustDomain]*spiffebundle.Bundle // guarded by mu; nil until SetBundles
	own         *spiffebundle.Bundle                          // guarded by mu; nil until the first look
	changed     chan struct{}                                 // guarded by mu; closed when own is replaced
	kept        []*types.Entry                                // guarded by mu; not changed in place
	status      Status                                        // guarded by mu
	unwanted    map[string]time.Time                          // owned by Run: since when an entry of ours is not wanted
	term        Term                                          // owned by Run: in which what is written was planned
}

// Status is how things stand with SPIRE.
type Status struct {
	Answered time.Time // when it did last; zero: never
	Err      error     // of the last look; nil: it is well
	InStep   bool      // what is wanted is there
	Entries  int       // of ours that are there
	Domains  int       // trust domains whose bundle is kept there
	Foreign  []string  // what somebody else made and is left alone, though it is in the way
	Faults   []string  // what the server refused
	AgentErr error     // of the Workload API; nil: it is well
}

// New builds a Server. It connects when it is used.
func New(cfg Config) (*Server, error) {
	if cfg.Linger <= 0 {
		cfg.Linger = time.Minute
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Lead == nil {
		cfg.Lead = func() (Term, bool) {
			return func(ctx context.Context) (context.Context, context.CancelFunc, error) { return ctx, func() {}, nil }, true
		}
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{cfg: cfg, log: cfg.Log, creds: identity.NewSource(), wake: make(chan struct{}, 1), changed: make(chan struct{}), unwanted: map[string]time.Time{},
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "hanse_spire_failures_total",
			Help: "What SPIRE did not do or refused and is tried again, by what (bundle, reconcile, workload_api)."}, []string{"what"})}
	if cfg.Registerer != nil {
		answered := prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "hanse_spire_answered_timestamp_seconds", Help: "When spire-server answered last, in Unix seconds; 0: never."},
			func() float64 {
				if at := s.Status().Answered; !at.IsZero() {
					return float64(at.Unix())
				}
				return 0
			})
		entries := prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "hanse_spire_entries", Help: "Registration entries that this control plane keeps on spire-server."},
			func() float64 { return float64(s.Status().Entries) })
		for _, c := range []prometheus.Collector{s.failures, answered, entries} {
			if err := cfg.Registerer.Register(c); err != nil {
				return nil, fmt.Errorf("register metrics: %w", err)
			}
		}
	}
	target, transport := cfg.Address, grpc.WithTransportCredentials(insecure.NewCredentials()) // a socket that its owner guards
	if !s.local() {
		target = "dns:///" + cfg.Address
		transport = grpc.WithTransportCredentials(credentials.NewTLS(identity.ClientTLS(s.creds, identity.AuthorizeID(identity.SPIREServerID(cfg.TrustDomain)), "h2")))
	}
	var err error
	s.conn, err = grpc.NewClient(target, transport, grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 5 * time.Second}, MinConnectTimeout: 5 * time.Second}))
	if err != nil {
		return nil, fmt.Errorf("spire-server %s: %w", cfg.Address, err)
	}
	s.entries, s.bundles, s.relations = entryv1.NewEntryClient(s.conn), bundlev1.NewBundleClient(s.conn), trustdomainv1.NewTrustDomainClient(s.conn)
	return s, nil
}

func (s *Server) local() bool { return strings.HasPrefix(s.cfg.Address, "unix:") }

// Close ends the connection.
func (s *Server) Close() error { return s.conn.Close() }

// SetEntries replaces the wanted entries.
func (s *Server) SetEntries(want []Entry) {
	if want == nil {
		want = []Entry{}
	}
	s.mu.Lock()
	s.wantEntries = want
	s.mu.Unlock()
	s.kick()
}

// SetBundles replaces the wanted foreign bundles: each has a relationship, and all entries federate with it.
func (s *Server) SetBundles(want map[spiffeid.TrustDomain]*spiffebundle.Bundle) {
	want = maps.Clone(want)
	delete(want, s.cfg.TrustDomain)
	s.mu.Lock()
	s.wantBundles = want
	s.mu.Unlock()
	s.kick()
}

// Sign has SPIRE mint an X509-SVID with DNS names.
func (s *Server) Sign(ctx context.Context, key crypto.Signer, id spiffeid.ID, life time.Duration, dnsNames []string) ([]*x509.Certificate, error) {
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{id.URL()}, DNSNames: dnsNames}, key)
	if err != nil {
		return nil, fmt.Errorf("make a certificate request: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	r, err := svidv1.NewSVIDClient(s.conn).MintX509SVID(ctx, &svidv1.MintX509SVIDRequest{Csr: csr, Ttl: int32(life / time.Second)})
	if err != nil {
		return nil, fmt.Errorf("mint %s on spire-server %s: %w", id, s.cfg.Address, err)
	}
	return spiretypes.ToChain(r.GetSvid())
}

func (s *Server) kick() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// Bundle is the own trust domain's as spire-server has it; ok is false until it was read.
func (s *Server) Bundle() (b *spiffebundle.Bundle, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.own, s.own != nil
}

// Changed returns a channel that is closed at the next change of the own bundle. Take it before reading.
func (s *Server) Changed() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changed
}

// Entries are those that are kept on spire-server, as of the last look: what has just been made is among them when that look ends. They must not be changed.
func (s *Server) Entries() []*types.Entry {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.kept
}

// Status says how things stand.
func (s *Server) Status() Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.status
}

// First reads the own bundle, for a control plane that has none yet. It tries until ctx ends, and returns why it did not succeed.
func (s *Server) First(ctx context.Context) error {
	var why error
	for {
		err := s.first(ctx)
		if err == nil {
			return nil
		}
		if why == nil || ctx.Err() == nil { // a try that was cut short knows less than the one before
			why = err
		}
		select {
		case <-ctx.Done():
			return why
		case <-time.After(500 * time.Millisecond):
		}
	}
}

func (s *Server) first(ctx context.Context) error {
	if !s.local() {
		call, cancel := context.WithTimeout(ctx, callTime)
		defer cancel()
		x, err := workloadapi.FetchX509Context(call, workloadapi.WithAddr(s.cfg.WorkloadAPI))
		if err != nil {
			return fmt.Errorf("the Workload API %s: %w", s.cfg.WorkloadAPI, err)
		}
		s.credentials(x)
	}
	return s.readBundle(ctx)
}

// Run keeps server and control plane in step until ctx ends.
func (s *Server) Run(ctx context.Context) error {
	defer s.Close()
	tick := time.NewTicker(poll)
	defer tick.Stop()
	var due, settled time.Time // of the next whole look; when no predecessor's write can be under way any more
	dirty, led := true, false
	for {
		term, leads := s.cfg.Lead()
		if leads && !led {
			dirty, settled = true, s.cfg.Now().Add(callTime)
		}
		led = leads
		if err := s.readBundle(ctx); err != nil && ctx.Err() == nil {
			s.failed("bundle", err)
			dirty = true // it may come back with what it had long ago
		} else if leads && (dirty || !s.cfg.Now().Before(due)) {
			s.term = term
			next, err := s.reconcile(ctx)
			if left := settled.Sub(s.cfg.Now()); left > 0 {
				next = min(next, left)
			}
			switch {
			case err == nil || ctx.Err() != nil:
			case s.over(ctx):
				s.log.Info("this replica leads no more: what is left to write is another's", "err", err)
			default:
				s.failed("reconcile", err)
			}
			dirty, due = err != nil, s.cfg.Now().Add(next)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-s.wake:
			dirty = true
		case <-tick.C:
		}
	}
}

// over reports whether the term is.
func (s *Server) over(ctx context.Context) bool {
	_, end, err := s.term(ctx)
	if err == nil {
		end()
	}
	return err != nil
}

// failed notes a failure, and says it once.
func (s *Server) failed(what string, err error) {
	s.failures.WithLabelValues(what).Inc()
	s.mu.Lock()
	news := s.status.Err == nil || s.status.Err.Error() != err.Error()
	s.status.Err, s.status.InStep = err, false
	s.mu.Unlock()
	if news {
		s.log.Error("SPIRE is not kept in step; the last good state stays in force", "server", s.cfg.Address, "err", err)
	}
}

func (s *Server) readBundle(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	p, err := s.bundles.GetBundle(ctx, &bundlev1.GetBundleRequest{})
	if err != nil {
		return fmt.Errorf("read the bundle from spire-server %s: %w", s.cfg.Address, err)
	}
	b, err := spiretypes.ToBundle(p)
	if err != nil {
		return fmt.Errorf("the bundle of spire-server %s: %w", s.cfg.Address, err)
	}
	if b.TrustDomain() != s.cfg.TrustDomain {
		return fmt.Errorf("spire-server %s is of trust domain %s, and trustDomain says %s", s.cfg.Address, b.TrustDomain(), s.cfg.TrustDomain)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.status.Answered.IsZero() || s.status.Err != nil {
		s.log.Info("spire-server answers", "server", s.cfg.Address)
	}
	s.status.Answered, s.status.Err = s.cfg.Now(), nil
	if s.own == nil || !s.own.Equal(b) {
		s.own = b
		close(s.changed)
		s.changed = make(chan struct{})
	}
	return nil
}

// reconcile does what is missing and says when to look again.
func (s *Server) reconcile(ctx context.Context) (time.Duration, error) {
	s.mu.Lock()
	entries, bundles := s.wantEntries, s.wantBundles
	s.mu.Unlock()
	if bundles == nil {
		return lookAgain, nil
	}
	var now Status
	federates, remove, err := s.trust(ctx, bundles, &now)
	if err != nil {
		return 0, err
	}
	next := lookAgain
	if entries != nil { // before configuration was read whole nothing is known to be unwanted
		if next, err = s.register(ctx, entries, federates, &now); err != nil {
			return 0, err
		}
	}
	if err := s.untrust(ctx, remove, &now); err != nil {
		return 0, err
	}
	s.mu.Lock()
	s.status.InStep, s.status.Entries, s.status.Domains, s.status.Foreign, s.status.Faults = len(now.Faults) == 0, now.Entries, len(federates), now.Foreign, now.Faults
	s.mu.Unlock()
	return next, nil
}

// trust sets bundles and relationships, and returns the trust domains that entries may federate with, and those to be removed.
func (s *Server) trust(ctx context.Context, want map[spiffeid.TrustDomain]*spiffebundle.Bundle, now *Status) (federates, remove []string, err error) {
	have, err := pages(ctx, func(ctx context.Context, token string) ([]*types.Bundle, string, error) {
		r, err := s.bundles.ListFederatedBundles(ctx, &bundlev1.ListFederatedBundlesRequest{PageSize: pageSize, PageToken: token})
		return r.GetBundles(), r.GetNextPageToken(), err
	})
	if err != nil {
		return nil, nil, fmt.Errorf("list federated bundles: %w", err)
	}
	relations, err := pages(ctx, func(ctx context.Context, token string) ([]*types.FederationRelationship, string, error) {
		r, err := s.relations.ListFederationRelationships(ctx, &trustdomainv1.ListFederationRelationshipsRequest{PageSize: pageSize, PageToken: token})
		return r.GetFederationRelationships(), r.GetNextPageToken(), err
	})
	if err != nil {
		return nil, nil, fmt.Errorf("list federation relationships: %w", err)
	}
	plan, err := planTrust(have, relations, want, "https://"+s.cfg.Relay+RelayPath, identity.ControlPlaneID(s.cfg.TrustDomain))
	if err != nil {
		return nil, nil, err
	}
	for _, td := range plan.foreign {
		now.Foreign = append(now.Foreign, "federation relationship with "+td)
	}
	held := map[string]bool{}
	for _, b := range have {
		held[b.TrustDomain] = true
	}
	err = batches(ctx, s.term, plan.set, func(ctx context.Context, part []*types.Bundle) error {
		r, err := s.bundles.BatchSetFederatedBundle(ctx, &bundlev1.BatchSetFederatedBundleRequest{Bundle: part})
		for i, x := range r.GetResults() {
			if i < len(part) && s.took(now, "set", "bundle of "+part[i].TrustDomain, x.GetStatus()) {
				held[part[i].TrustDomain] = true
			}
		}
		return err
	})
	if err != nil {
		return nil, nil, fmt.Errorf("set federated bundles: %w", err)
	}
	err = batches(ctx, s.term, plan.create, func(ctx context.Context, part []*types.FederationRelationship) error {
		r, err := s.relations.BatchCreateFederationRelationship(ctx, &trustdomainv1.BatchCreateFederationRelationshipRequest{FederationRelationships: part})
		for i, x := range r.GetResults() {
			if i < len(part) {
				s.took(now, "created", "federation relationship with "+part[i].TrustDomain, x.GetStatus())
			}
		}
		return err
	})
	if err != nil {
		return nil, nil, fmt.Errorf("create federation relationships: %w", err)
	}
	err = batches(ctx, s.term, plan.update, func(ctx context.Context, part []*types.FederationRelationship) error {
		r, err := s.relations.BatchUpdateFederationRelationship(ctx, &trustdomainv1.BatchUpdateFederationRelationshipRequest{FederationRelationships: part,
			InputMask: &types.FederationRelationshipMask{BundleEndpointUrl: true, BundleEndpointProfile: true}})
		for i, x := range r.GetResults() {
			if i < len(part) {
				s.took(now, "updated", "federation relationship with "+part[i].TrustDomain, x.GetStatus())
			}
		}
		return err
	})
	if err != nil {
		return nil, nil, fmt.Errorf("update federation relationships: %w", err)
	}
	for td := range want {
		if held[td.Name()] {
			federates = append(federates, td.Name())
		}
	}
	slices.Sort(federates)
	return federates, plan.remove, nil
}

// untrust removes bundles of ours, and their relationships. Entries, ours or not, lose them.
func (s *Server) untrust(ctx context.Context, domains []string, now *Status) error {
	err := batches(ctx, s.term, domains, func(ctx context.Context, part []string) error {
		b, err := s.bundles.BatchDeleteFederatedBundle(ctx, &bundlev1.BatchDeleteFederatedBundleRequest{TrustDomains: part, Mode: bundlev1.BatchDeleteFederatedBundleRequest_DISSOCIATE})
		if err != nil {
			return fmt.Errorf("remove federated bundles: %w", err)
		}
		for i, x := range b.GetResults() {
			if i < len(part) {
				s.took(now, "removed", "bundle of "+part[i], x.GetStatus())
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return batches(ctx, s.term, domains, func(ctx context.Context, part []string) error {
		r, err := s.relations.BatchDeleteFederationRelationship(ctx, &trustdomainv1.BatchDeleteFederationRelationshipRequest{TrustDomains: part})
		if err != nil {
			return fmt.Errorf("remove federation relationships: %w", err)
		}
		for i, x := range r.GetResults() {
			if i < len(part) {
				s.took(now, "removed", "federation relationship with "+part[i], x.GetStatus())
			}
		}
		return nil
	})
}

// register brings the entries in step.
func (s *Server) register(ctx context.Context, want []Entry, federates []string, now *Status) (time.Duration, error) {
	have, err := pages(ctx, func(ctx context.Context, token string) ([]*types.Entry, string, error) {
		r, err := s.entries.ListEntries(ctx, &entryv1.ListEntriesRequest{Filter: &entryv1.ListEntriesRequest_Filter{ByHint: wrapperspb.String(hint)}, PageSize: pageSize, PageToken: token})
		return r.GetEntries(), r.GetNextPageToken(), err
	})
	if err != nil {
		return 0, fmt.Errorf("list entries: %w", err)
	}
	plan := planEntries(have, want, federates)
	remove, next := s.linger(plan.remove)
	kept := map[string]*types.Entry{}
	for _, h := range have {
		if strings.HasPrefix(h.Id, idPrefix) {
			kept[h.Id] = h
		}
	}
	err = batches(ctx, s.term, plan.create, func(ctx context.Context, part []*types.Entry) error {
		r, err := s.entries.BatchCreateEntry(ctx, &entryv1.BatchCreateEntryRequest{Entries: part})
		for i, x := range r.GetResults() {
			if i >= len(part) {
				break
			}
			name := "entry of " + show(part[i].SpiffeId) + " under " + show(part[i].ParentId)
			switch {
			case codes.Code(x.GetStatus().GetCode()) == codes.AlreadyExists:
				now.Foreign = append(now.Foreign, name)
			case s.took(now, "created", name, x.GetStatus()):
				kept[part[i].Id] = part[i]
			}
		}
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("create entries: %w", err)
	}
	err = batches(ctx, s.term, plan.update, func(ctx context.Context, part []*types.Entry) error {
		r, err := s.entries.BatchUpdateEntry(ctx, &entryv1.BatchUpdateEntryRequest{Entries: part, InputMask: &types.EntryMask{X509SvidTtl: true, JwtSvidTtl: true, FederatesWith: true}})
		for i, x := range r.GetResults() {
			if i < len(part) && s.took(now, "updated", "entry of "+show(part[i].SpiffeId), x.GetStatus()) {
				kept[part[i].Id] = part[i]
			}
		}
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("update entries: %w", err)
	}
	err = batches(ctx, s.term, remove, func(ctx context.Context, part []string) error {
		r, err := s.entries.BatchDeleteEntry(ctx, &entryv1.BatchDeleteEntryRequest{Ids: part})
		for i, x := range r.GetResults() {
			if i < len(part) && s.took(now, "removed", "entry "+part[i], x.GetStatus()) {
				delete(kept, part[i])
			}
		}
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("remove entries: %w", err)
	}
	now.Entries = len(kept)
	s.mu.Lock()
	s.kept = slices.SortedFunc(maps.Values(kept), func(a, b *types.Entry) int { return strings.Compare(a.Id, b.Id) })
	s.mu.Unlock()
	return next, nil
}

// linger returns those of the unwanted entries whose time is over, and when to look again.
func (s *Server) linger(unwanted []string) (over []string, next time.Duration) {
	now, since := s.cfg.Now(), map[string]time.Time{}
	next = lookAgain
	for _, id := range unwanted {
		at, ok := s.unwanted[id]
		if !ok {
			at = now
		}
		since[id] = at
		if left := at.Add(s.cfg.Linger).Sub(now); left > 0 {
			next = min(next, left)
		} else {
			over = append(over, id)
		}
	}
	s.unwanted = since
	return over, next
}

// took notes what the server says to one item of a batch.
func (s *Server) took(now *Status, action, what string, st *types.Status) bool {
	switch c := codes.Code(st.GetCode()); {
	case c == codes.OK:
		s.log.Info("changed on SPIRE", "what", what, "action", action)
		return true
	case c == codes.NotFound && action == "removed":
		return true
	default:
		now.Faults = append(now.Faults, fmt.Sprintf("%s: %s (%s)", what, st.GetMessage(), c))
		return false
	}
}

func show(id *types.SPIFFEID) string { return "spiffe://" + id.GetTrustDomain() + id.GetPath() }

// pages reads a list whole.
func pages[T any](ctx context.Context, page func(ctx context.Context, token string) ([]T, string, error)) ([]T, error) {
	var all []T
	for token := ""; ; {
		call, cancel := context.WithTimeout(ctx, callTime)
		part, next, err := page(call, token)
		cancel()
		if err != nil {
			return nil, err
		}
		if all = append(all, part...); len(all) > maxItems {
			return nil, fmt.Errorf("more than %d items", maxItems)
		}
		if next == "" || next == token {
			return all, nil
		}
		token = next
	}
}

// batches calls f, which writes, for parts of all.
func batches[T any](ctx context.Context, term Term, all []T, f func(ctx context.Context, part []T) error) error {
	for part := range slices.Chunk(all, batchSize) {
		write, end, err := term(ctx)
		if err != nil {
			return err
		}
		call, cancel := context.WithTimeout(write, callTime)
		err = f(call, part)
		cancel()
		end()
		if err != nil {
			return err
		}
	}
	return nil
}
