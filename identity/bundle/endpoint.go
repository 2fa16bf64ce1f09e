package bundle

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hanse-mesh/hanse/identity"
)

// Handler is the bundle endpoint of this trust domain (SPIFFE Federation §5.1): GET answers its bundle on any path.
func (s *Store) Handler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			w.Header().Set("Allow", "GET, HEAD")
			http.Error(w, "method not allowed", http.StatusMethodNotAllowed)
			return
		}
		b, ok := s.Get(s.cfg.TrustDomain)
		if !ok {
			http.Error(w, "no bundle yet", http.StatusServiceUnavailable)
			return
		}
		s.NotePolled(s.cfg.Now())
		s.answer(w, b)
	})
}

// NotePolled notes that somebody fetched it at t, here or from another replica.
func (s *Store) NotePolled(t time.Time) {
	for at := t.UnixNano(); ; {
		if was := s.polled.Load(); was >= at || s.polled.CompareAndSwap(was, at) {
			return
		}
	}
}

// Polled is when somebody last fetched this trust domain's bundle from an endpoint; zero if that is not known.
func (s *Store) Polled() time.Time {
	if at := s.polled.Load(); at != 0 {
		return time.Unix(0, at)
	}
	return time.Time{}
}

// Relay answers GET prefix<trust domain> with the bundle of a related trust domain that is in force, for a SPIRE server which this control
// plane provides with bundles, and everything else by next.
func (s *Store) Relay(prefix string, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		name, ok := strings.CutPrefix(r.URL.Path, prefix)
		if !ok || r.Method != http.MethodGet {
			next.ServeHTTP(w, r)
			return
		}
		td, err := spiffeid.TrustDomainFromString(name)
		if err != nil {
			http.Error(w, "no trust domain", http.StatusNotFound)
			return
		}
		b, ok := s.Get(td)
		if !ok {
			http.Error(w, "no bundle of this trust domain", http.StatusNotFound)
			return
		}
		s.answer(w, b)
	})
}

func (s *Store) answer(w http.ResponseWriter, b *spiffebundle.Bundle) {
	data, err := b.Marshal()
	if err != nil {
		s.log.Error("cannot encode a bundle", "trust_domain", b.TrustDomain().Name(), "error", err)
		http.Error(w, "cannot encode the bundle", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-cache")
	_, _ = w.Write(data) // the client is gone
}

// EndpointTLS returns the configuration of a bundle endpoint with the https_spiffe profile: it presents the SVID of src
// and asks for no certificate, since a bundle is public.
func EndpointTLS(src *identity.Source) *tls.Config {
	cfg := identity.ServerTLS(src, identity.AuthorizeAny(), "h2", "http/1.1")
	cfg.ClientAuth = tls.NoClientCert
	cfg.VerifyConnection = nil
	return cfg
}

// PullerConfig configures a Puller.
type PullerConfig struct {
	Store      *Store
	Timeout    time.Duration                                                     // of one pull, default 30 s
	Dial       func(ctx context.Context, network, addr string) (net.Conn, error) // default: a net.Dialer
	WebRoots   *x509.CertPool                                                    // who vouches for https_web endpoints; nil: the system's roots
	Log        *slog.Logger
	Registerer prometheus.Registerer // may be nil
}

// Puller fetches the bundles of those relations that have a bundle endpoint.
type Puller struct {
	// read-only after NewPuller
	cfg      PullerConfig
	log      *slog.Logger
	failures *prometheus.CounterVec
}

// NewPuller builds a Puller.
func NewPuller(cfg PullerConfig) (*Puller, error) {
	setDefault(&cfg.Timeout, 30*time.Second)
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Dial == nil {
		cfg.Dial = (&net.Dialer{}).DialContext
	}
	p := &Puller{cfg: cfg, log: cfg.Log, failures: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "hanse_bundle_pull_failures_total", Help: "Pulls from a bundle endpoint that failed, by trust domain."}, []string{"trust_domain"})}
	if cfg.Registerer != nil {
		if err := cfg.Registerer.Register(p.failures); err != nil {
			return nil, fmt.Errorf("register metrics: %w", err)
		}
	}
	return p, nil
}

func setDefault(d *time.Duration, value time.Duration) {
	if *d <= 0 {
		*d = value
	}
}

// Run pulls every relation's bundle: at once, then by its refresh hint (default 5 min), and after an error with backoff
// from 1 s to that. It ends with ctx.
func (p *Puller) Run(ctx context.Context) error {
	due := map[spiffeid.TrustDomain]*pull{}
	for {
		changed := p.cfg.Store.Changed()
		now := time.Now()
		next := now.Add(time.Hour)
		seen := map[spiffeid.TrustDomain]bool{}
		for _, r := range p.cfg.Store.Relations() {
			if r.URL == "" {
				continue
			}
			seen[r.TrustDomain] = true
			d := due[r.TrustDomain]
			if d == nil || d.relation != r {
				d = &pull{relation: r}
				due[r.TrustDomain] = d
			}
			if !d.at.After(now) {
				d.done(p.pull(ctx, r))
				if d.err != nil && ctx.Err() == nil {
					p.failures.WithLabelValues(r.TrustDomain.Name()).Inc()
					p.log.Warn("cannot pull a bundle; the last one stays in force", "trust_domain", r.TrustDomain.Name(), "error", d.err)
				}
			}
			if d.at.Before(next) {
				next = d.at
			}
		}
		for td := range due {
			if !seen[td] {
				delete(due, td)
			}
		}
		timer := time.NewTimer(time.Until(next))
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		case <-changed:
			timer.Stop()
		}
	}
}

// pull is when a relation is pulled next.
type pull struct {
	relation Relation
	at       time.Time
	backoff  time.Duration
	err      error
}

func (d *pull) done(hint time.Duration, err error) {
	d.err = err
	wait := hint
	if err != nil {
		d.backoff = min(max(2*d.backoff, time.Second), 5*time.Minute)
		wait = d.backoff
	} else {
		d.backoff = 0
	}
	d.at = time.Now().Add(wait - time.Duration(rand.Int64N(int64(wait)/10+1)))
}

// Refresh pulls the bundle of td now.
func (p *Puller) Refresh(ctx context.Context, td spiffeid.TrustDomain) error {
	r, ok := p.cfg.Store.Related(td)
	if !ok {
		return fmt.Errorf("pull bundle of %s: %w", td, ErrUnrelated)
	}
	_, err := p.pull(ctx, r)
	return err
}

// pull fetches and sets one bundle and returns when to come again.
func (p *Puller) pull(ctx context.Context, r Relation) (time.Duration, error) {
	b, err := p.fetch(ctx, r)
	if err != nil {
		return 0, fmt.Errorf("pull bundle of %s from %s: %w", r.TrustDomain, r.URL, err)
	}
	set := p.cfg.Store.Set
	if r.Profile == HTTPSWeb {
		set = p.cfg.Store.SetVouched
	}
	if err := set(r.TrustDomain, b, r.URL); err != nil {
		return 0, err
	}
	hint, ok := b.RefreshHint()
	if !ok {
		hint = 5 * time.Minute // SPIFFE Trust Domain and Bundle §4.1.2
	}
	return hint, nil
}

// verifySPIFFE accepts an endpoint that presents that ID, by the bundle in force.
func (p *Puller) verifySPIFFE(endpoint spiffeid.ID) *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS12, // foreign endpoints
		InsecureSkipVerify:     true,             // no host names: VerifyConnection verifies chain and ID
		SessionTicketsDisabled: true,
		VerifyConnection: func(state tls.ConnectionState) error {
			id, err := identity.Verify(state.PeerCertificates, p.cfg.Store, time.Now())
			if err != nil {
				return err
			}
			return identity.AuthorizeID(endpoint)(id)
		},
	}
}

func (p *Puller) fetch(ctx context.Context, r Relation) (*spiffebundle.Bundle, error) {
	var verify *tls.Config
	switch r.Profile {
	case HTTPSWeb:
		roots := p.cfg.WebRoots
		if r.WebRoots != "" {
			roots = x509.NewCertPool()
			roots.AppendCertsFromPEM([]byte(r.WebRoots)) // Relate has seen them
		}
		verify = &tls.Config{MinVersion: tls.VersionTLS12, SessionTicketsDisabled: true, RootCAs: roots}
	case HTTPSSPIFFE:
		verify = p.verifySPIFFE(r.EndpointID)
	default:
		return nil, fmt.Errorf("profile %q is not supported", r.Profile)
	}
	ctx, cancel := context.WithTimeout(ctx, p.cfg.Timeout)
	defer cancel()
	transport := &http.Transport{
		DialContext:       p.cfg.Dial,
		DisableKeepAlives: true,
		ForceAttemptHTTP2: true,
		TLSClientConfig:   verify,
	}
	defer transport.CloseIdleConnections()
	client := &http.Client{
		Transport: transport,
		CheckRedirect: func(*http.Request, []*http.Request) error {
			return errors.New("the endpoint redirects, which is refused")
		},
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, r.URL, http.NoBody)
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("status %s", resp.Status)
	}
	return Read(r.TrustDomain, resp.Body)
}
