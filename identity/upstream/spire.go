package upstream

import (
	"cmp"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/url"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"

	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/identity/ca"
	"github.com/hanse-mesh/hanse/identity/spiretypes"
)

const callTime = 10 * time.Second

// SPIREConfig says where the spire-server is, and whose Workload API gives the SVID with the downstream entry.
type SPIREConfig struct {
	Server      string // host:port
	WorkloadAPI string // unix:///path
	TrustDomain spiffeid.TrustDomain
	Log         *slog.Logger
}

// SPIRE is a spire-server of the same trust domain above this authority.
type SPIRE struct {
	// read-only
	cfg     SPIREConfig
	log     *slog.Logger
	creds   *identity.Source
	conn    *grpc.ClientConn
	svids   svidv1.SVIDClient
	bundles bundlev1.BundleClient

	mu       sync.Mutex
	trusted  ca.Trusted    // guarded by mu; zero until the first answer
	changed  chan struct{} // guarded by mu
	err      error         // guarded by mu; of the last call
	agentErr error         // guarded by mu; of the Workload API
}

// NewSPIRE builds a SPIRE. It connects when it is used.
func NewSPIRE(cfg SPIREConfig) (*SPIRE, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	s := &SPIRE{cfg: cfg, log: cfg.Log, creds: identity.NewSource(), changed: make(chan struct{}), err: errors.New("it has not answered yet")}
	var err error
	s.conn, err = grpc.NewClient("dns:///"+cfg.Server,
		grpc.WithTransportCredentials(credentials.NewTLS(identity.ClientTLS(s.creds, identity.AuthorizeID(identity.SPIREServerID(cfg.TrustDomain)), "h2"))),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 5 * time.Second}, MinConnectTimeout: 5 * time.Second}))
	if err != nil {
		return nil, fmt.Errorf("spire-server %s: %w", cfg.Server, err)
	}
	s.svids, s.bundles = svidv1.NewSVIDClient(s.conn), bundlev1.NewBundleClient(s.conn)
	return s, nil
}

// Run follows the agent's SVID and the server's bundle until ctx ends.
func (s *SPIRE) Run(ctx context.Context) error {
	defer s.conn.Close()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		c, err := workloadapi.New(ctx, workloadapi.WithAddr(s.cfg.WorkloadAPI))
		if err != nil {
			return fmt.Errorf("the Workload API %s: %w", s.cfg.WorkloadAPI, err)
		}
		defer c.Close()
		if err := c.WatchX509Context(ctx, watcher{s}); ctx.Err() == nil {
			return fmt.Errorf("the Workload API %s: %w", s.cfg.WorkloadAPI, err)
		}
		return nil
	})
	g.Go(func() error {
		tick := time.NewTicker(poll)
		defer tick.Stop()
		for {
			if _, err := s.creds.GetX509SVID(); err == nil {
				s.note(ctx, s.readBundle(ctx))
			}
			select {
			case <-ctx.Done():
				return nil
			case <-tick.C:
			}
		}
	})
	return g.Wait()
}

// note keeps the outcome of a call, and says a new failure once.
func (s *SPIRE) note(ctx context.Context, err error) {
	if ctx.Err() != nil {
		return
	}
	s.mu.Lock()
	news := err != nil && (s.err == nil || s.err.Error() != err.Error())
	s.err = err
	s.mu.Unlock()
	if news {
		s.log.Error("the upstream SPIRE does not answer; the last good state stays in force", "server", s.cfg.Server, "err", err)
	}
}

// Err says what fails at the agent or the server; nil: all is well.
func (s *SPIRE) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return cmp.Or(s.agentErr, s.err)
}

// String names the server, for people.
func (s *SPIRE) String() string { return "spire-server " + s.cfg.Server }

// watcher implements workloadapi.X509ContextWatcher.
type watcher struct{ *SPIRE }

func (w watcher) OnX509ContextUpdate(x *workloadapi.X509Context) { w.take(x) }

func (w watcher) OnX509ContextWatchError(err error) {
	err = fmt.Errorf("the Workload API %s: %w", w.cfg.WorkloadAPI, err)
	w.mu.Lock()
	news := w.agentErr == nil || w.agentErr.Error() != err.Error()
	w.agentErr = err
	w.mu.Unlock()
	if news {
		w.log.Warn("the upstream's agent is not followed; the last SVID stays in force", "err", err)
	}
}

// take uses the SVID that the agent gives first: this process should have but one.
func (s *SPIRE) take(x *workloadapi.X509Context) {
	bundles := map[spiffeid.TrustDomain]*spiffebundle.Bundle{}
	if b, ok := x.Bundles.Get(s.cfg.TrustDomain); ok {
		bundles[s.cfg.TrustDomain] = spiffebundle.FromX509Bundle(b)
	}
	s.creds.Set(x.DefaultSVID(), bundles)
	s.mu.Lock()
	s.agentErr = nil
	s.mu.Unlock()
}

// ready sees to an SVID, which Run may not have brought yet.
func (s *SPIRE) ready(ctx context.Context) error {
	if _, err := s.creds.GetX509SVID(); err == nil {
		return nil
	}
	x, err := workloadapi.FetchX509Context(ctx, workloadapi.WithAddr(s.cfg.WorkloadAPI))
	if err != nil {
		return fmt.Errorf("the Workload API %s: %w", s.cfg.WorkloadAPI, err)
	}
	s.take(x)
	return nil
}

// Sign implements ca.Upstream.
func (s *SPIRE) Sign(ctx context.Context, template *x509.Certificate, key crypto.Signer) ([]*x509.Certificate, error) {
	if err := s.ready(ctx); err != nil {
		return nil, err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{s.cfg.TrustDomain.ID().URL()}}, key)
	if err != nil {
		return nil, fmt.Errorf("make a certificate request: %w", err)
	}
	call, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	r, err := s.svids.NewDownstreamX509CA(call, &svidv1.NewDownstreamX509CARequest{Csr: csr, PreferredTtl: int32(min(time.Until(template.NotAfter)/time.Second, 1<<31-1))}) //nolint:gosec // bounded
	if err != nil {
		return nil, fmt.Errorf("spire-server %s: NewDownstreamX509CA: %w", s.cfg.Server, err)
	}
	var chain []*x509.Certificate
	for i, der := range r.CaCertChain {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("spire-server %s: certificate %d: %w", s.cfg.Server, i, err)
		}
		chain = append(chain, c)
	}
	return chain, s.readBundle(ctx)
}

// Publish implements ca.Upstream: workloads of the SPIRE above verify our JWT-SVIDs, too.
func (s *SPIRE) Publish(ctx context.Context, keyID string, key crypto.PublicKey, expires time.Time) error {
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return err
	}
	call, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	_, err = s.bundles.PublishJWTAuthority(call, &bundlev1.PublishJWTAuthorityRequest{JwtAuthority: &types.JWTKey{KeyId: keyID, PublicKey: der, ExpiresAt: expires.Unix()}})
	return err
}

func (s *SPIRE) readBundle(ctx context.Context) error {
	call, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	p, err := s.bundles.GetBundle(call, &bundlev1.GetBundleRequest{})
	if err != nil {
		return fmt.Errorf("read the bundle of spire-server %s: %w", s.cfg.Server, err)
	}
	b, err := spiretypes.ToBundle(p)
	if err != nil {
		return fmt.Errorf("the bundle of spire-server %s: %w", s.cfg.Server, err)
	}
	switch {
	case b.TrustDomain() != s.cfg.TrustDomain:
		return fmt.Errorf("spire-server %s is of trust domain %s, and trustDomain says %s: a downstream has the one of its upstream", s.cfg.Server, b.TrustDomain(), s.cfg.TrustDomain)
	case len(b.X509Authorities()) == 0:
		return errors.New("the bundle of spire-server " + s.cfg.Server + " has no X.509 authority")
	}
	t := ca.Trusted{Bundle: b, Final: true}
	for _, a := range p.X509Authorities {
		if c, err := x509.ParseCertificate(a.Asn1); err == nil && a.Tainted {
			t.Tainted = append(t.Tainted, c)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.trusted
	s.trusted = t
	if old.Bundle == nil || !old.Bundle.X509Bundle().Equal(b.X509Bundle()) || !maps.EqualFunc(old.Bundle.JWTAuthorities(), b.JWTAuthorities(), sameKey) || len(old.Tainted) != len(t.Tainted) {
		close(s.changed)
		s.changed = make(chan struct{})
	}
	return nil
}

func sameKey(a, b crypto.PublicKey) bool {
	x, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && x.Equal(b)
}

// Trusted implements ca.Upstream.
func (s *SPIRE) Trusted() (ca.Trusted, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.trusted, s.trusted.Bundle != nil
}

// Changed implements ca.Upstream.
func (s *SPIRE) Changed() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changed
}
