package agent

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"slices"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"

	"github.com/hanse-mesh/hanse/identity"
)

// Errors to branch on.
var (
	// ErrTokenRefused ends Run when the server does not take the agent token and there is no SVID to go on with.
	ErrTokenRefused = errors.New("the server refuses the agent token")
	// ErrBanned ends Run when an administrator has banned this agent.
	ErrBanned = errors.New("this agent is banned")
)

// Config of an Agent. Either WorkloadAPI is set, or all of ServerAddrs, TrustDomain and StateDir.
type Config struct {
	ServerAddrs []string // host:port of SPIRE Server APIs of one trust domain, tried in turn
	TrustDomain spiffeid.TrustDomain
	TrustBundle string // file with the first trust in the server: PEM certificates or a SPIFFE bundle; needed to attest
	TokenFile   string // file with the agent token, mode 0600; needed to attest
	StateDir    string // mode 0700; keeps keys, SVIDs and bundles

	// PodToken is the file of the pod's projected token, read anew each time, with which to attest instead of an agent token;
	// PodCluster is the cluster's name at the server.
	PodToken, PodCluster string

	// Curve of the agent's own keys and of the workload's: P-256 (also if nil) or P-384. Keys that are kept serve until their next renewal.
	Curve elliptic.Curve

	// WorkloadAPI is the address of another agent's Workload API (unix:///…), which then is the source of everything.
	WorkloadAPI string

	SocketPath  string // Unix socket on which to serve the Workload API; empty: not served
	SocketUsers SocketUsers
	FilesDir    string // folder to write SVID, key and bundle files into, for proxyless gRPC; empty: none

	// SyncInterval is how often the server is asked for changes, default 5 s. While it tells of them by itself, as hansed does, it
	// is asked once a minute at the most.
	SyncInterval time.Duration
	// Dial connects to a server, by default with a net.Dialer.
	Dial func(ctx context.Context, addr string) (net.Conn, error)

	Now        func() time.Time
	Log        *slog.Logger
	Registerer prometheus.Registerer // may be nil
}

func (c *Config) validate() error {
	if c.WorkloadAPI != "" {
		if len(c.ServerAddrs) > 0 || c.SocketPath != "" {
			return errors.New("with another agent's Workload API there is no server to ask and no Workload API to serve")
		}
		return nil
	}
	var errs []error
	if len(c.ServerAddrs) == 0 {
		errs = append(errs, errors.New("no server address"))
	}
	if c.TrustDomain.IsZero() {
		errs = append(errs, errors.New("no trust domain"))
	}
	if c.PodToken != "" && (c.PodCluster == "" || c.TokenFile != "") {
		errs = append(errs, errors.New("a pod's token goes with the cluster's name, and excludes an agent token"))
	}
	if c.Curve != nil && c.Curve != elliptic.P256() && c.Curve != elliptic.P384() {
		errs = append(errs, fmt.Errorf("curve %s: want P-256 or P-384", c.Curve.Params().Name))
	}
	if c.StateDir == "" {
		errs = append(errs, errors.New("no state folder"))
	}
	return errors.Join(errs...)
}

// Agent keeps one workload's identity. Its methods are safe for concurrent use.
type Agent struct {
	// read-only after New
	cfg     Config
	log     *slog.Logger
	src     *identity.Source
	metrics *metrics

	nudge chan struct{} // size 1: entries or bundles have changed at the server
	told  atomic.Bool   // by a stream that stands, of such changes

	work chan struct{} // held while state, client or the schedule are in use; it admits one
	// guarded by work
	state  state
	client *client
	addrs  []string          // of servers, the next one to try first
	ended  bool              // runServer has closed the last client
	failed int               // steps in a row
	spent  string            // the token that has been used, or refused
	anew   *ecdsa.PrivateKey // of an attestation beside an SVID that may be worth nothing

	jwts *jwtCache // has its own lock

	strangers identity.Seldom // their lines in the log
}

// New builds an Agent.
func New(cfg Config) (*Agent, error) {
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("identity agent: %w", err)
	}
	if cfg.SyncInterval <= 0 {
		cfg.SyncInterval = 5 * time.Second
	}
	if cfg.Curve == nil {
		cfg.Curve = elliptic.P256()
	}
	if cfg.Dial == nil {
		dialer := &net.Dialer{Timeout: 10 * time.Second}
		cfg.Dial = func(ctx context.Context, addr string) (net.Conn, error) { return dialer.DialContext(ctx, "tcp", addr) }
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	a := &Agent{cfg: cfg, log: cfg.Log, src: identity.NewSource(), work: make(chan struct{}, 1), nudge: make(chan struct{}, 1),
		addrs: slices.Clone(cfg.ServerAddrs), jwts: newJWTCache(cfg.Now)}
	var err error
	if a.metrics, err = newMetrics(cfg.Registerer, a.src); err != nil {
		return nil, fmt.Errorf("identity agent: %w", err)
	}
	return a, nil
}

// Source is the workload's SVID and bundles. It is empty until Run has them.
func (a *Agent) Source() *identity.Source { return a.src }

// Run works until ctx ends. It returns an error when nothing but a person can help: a damaged state file, a refused
// token with nothing to go on with, a ban.
func (a *Agent) Run(ctx context.Context) error {
	if a.cfg.WorkloadAPI == "" {
		if err := a.lock(ctx); err != nil {
			return nil
		}
		err := a.loadState()
		<-a.work
		if err != nil {
			return fmt.Errorf("identity agent: %w", err)
		}
	}
	var lis net.Listener
	if a.cfg.SocketPath != "" {
		var err error
		if lis, err = a.listenUnix(); err != nil {
			return fmt.Errorf("identity agent: %w", err)
		}
	}
	g, ctx := errgroup.WithContext(ctx)
	if a.cfg.WorkloadAPI != "" {
		g.Go(func() error { return a.followWorkloadAPI(ctx) })
	} else {
		g.Go(func() error { return a.runServer(ctx) })
		g.Go(func() error { return a.followServer(ctx) })
	}
	if lis != nil {
		g.Go(func() error { return a.ServeWorkloadAPI(ctx, lis) })
	}
	if a.cfg.FilesDir != "" {
		g.Go(func() error { return a.runFiles(ctx) })
	}
	return g.Wait()
}

// runServer keeps the state in step with a SPIRE server.
func (a *Agent) runServer(ctx context.Context) error {
	defer func() {
		a.work <- struct{}{}
		a.client.close()
		a.client, a.ended = nil, true
		<-a.work
	}()
	var backoff time.Duration
	for {
		if err := a.lock(ctx); err != nil {
			return nil
		}
		err := a.step(ctx)
		due := a.state.due(a.cfg.Now(), a.syncInterval())
		<-a.work
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, ErrBanned), errors.Is(err, ErrTokenRefused) && !a.serves():
			return fmt.Errorf("identity agent: %w", err)
		case err != nil:
			a.metrics.failures.WithLabelValues("sync").Inc()
			level := slog.LevelWarn
			if !a.serves() {
				level = slog.LevelError
			}
			a.log.Log(ctx, level, "cannot sync identity; the last one stays in force", "error", err)
			backoff = min(max(2*backoff, 100*time.Millisecond), a.cfg.SyncInterval)
			due = backoff
			if after := retryAfter(err); after > due {
				due = after + after/8 // not before, with the jitter too: others were told other times
			}
		default:
			backoff = 0
		}
		timer, nudge := time.NewTimer(jitter(due)), a.nudge
		if err != nil {
			nudge = nil // it comes with each new connection, which each failure ends
		}
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		case <-nudge:
			timer.Stop()
		}
	}
}

// toldInterval is how often a server is asked that tells of changes by itself.
const toldInterval = time.Minute

func (a *Agent) syncInterval() time.Duration {
	if a.told.Load() {
		return max(a.cfg.SyncInterval, toldInterval)
	}
	return a.cfg.SyncInterval
}

// serves reports whether the Source has an SVID that is valid now.
func (a *Agent) serves() bool {
	svid, err := a.src.GetX509SVID()
	return err == nil && a.cfg.Now().Before(svid.Certificates[0].NotAfter)
}

func (a *Agent) lock(ctx context.Context) error {
	select {
	case a.work <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// jitter returns d less up to a tenth.
func jitter(d time.Duration) time.Duration { return d - time.Duration(rand.Int64N(int64(d)/10+1)) }

// TrustRefresh loads all bundles anew, until each named trust domain's has at least the given sequence, and returns when they are
// in the Source: a proxy may then acknowledge them. At least one load begins after the call, so that what is no longer
// trusted is gone from the Source too. A trust domain that this workload does not federate with is not waited
// for. It returns the last error when ctx ends first. An agent that follows another's Workload API has TrustFollowed instead.
func (a *Agent) TrustRefresh(ctx context.Context, want map[spiffeid.TrustDomain]uint64) error {
	wait := 50 * time.Millisecond
	want = maps.Clone(want)
	for loaded := false; ; {
		if err := a.lock(ctx); err != nil {
			return fmt.Errorf("refresh trust in %v: %w", a.behind(want), err)
		}
		var err error
		behind := a.behind(want)
		if len(behind) > 0 || !loaded {
			if err = a.step(ctx); err == nil || errors.Is(err, errNotRenewed) {
				loaded = true
				maps.DeleteFunc(want, func(td spiffeid.TrustDomain, _ uint64) bool {
					return td != a.cfg.TrustDomain && !slices.Contains(a.state.federates, td.Name())
				})
			}
			behind = a.behind(want)
		}
		<-a.work
		if len(behind) == 0 && loaded {
			return nil
		}
		timer := time.NewTimer(jitter(wait))
		select {
		case <-timer.C:
			wait = min(2*wait, a.cfg.SyncInterval)
		case <-ctx.Done():
			timer.Stop()
			return fmt.Errorf("refresh trust in %v: %w", behind, errors.Join(ctx.Err(), err))
		}
	}
}

// behind names the trust domains whose bundle in the Source is older than wanted.
func (a *Agent) behind(want map[spiffeid.TrustDomain]uint64) []string {
	have := a.src.Bundles()
	var out []string
	for td, seq := range want {
		b, ok := have[td]
		if !ok {
			out = append(out, td.Name())
			continue
		}
		if got, _ := b.SequenceNumber(); got < seq {
			out = append(out, td.Name())
		}
	}
	return out
}

type metrics struct {
	renewals *prometheus.CounterVec
	failures *prometheus.CounterVec

	strangers prometheus.Counter
}

func newMetrics(reg prometheus.Registerer, src *identity.Source) (*metrics, error) {
	m := &metrics{
		renewals: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hanse_svid_renewals_total", Help: "SVIDs fetched, by kind (agent, x509, jwt)."}, []string{"kind"}),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hanse_svid_failures_total", Help: "Failures that are tried again, by what failed (sync, files, workload_api)."}, []string{"what"}),
		strangers: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "hanse_workload_api_refused_total", Help: "Callers of the Workload API who are not among its users."}),
	}
	if reg == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.renewals, m.failures, m.strangers,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "hanse_svid_expiry_timestamp_seconds", Help: "When the workload's X509-SVID expires, in Unix seconds; 0 without one."},
			func() float64 {
				svid, err := src.GetX509SVID()
				if err != nil {
					return 0
				}
				return float64(svid.Certificates[0].NotAfter.Unix())
			}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "hanse_trust_bundles", Help: "Trust domains whose bundle is loaded."},
			func() float64 { return float64(len(src.Bundles())) }),
	} {
		if err := reg.Register(c); err != nil {
			return nil, fmt.Errorf("register metrics: %w", err)
		}
	}
	return m, nil
}
