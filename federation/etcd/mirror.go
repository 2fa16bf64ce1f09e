package etcd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"

	"github.com/hanse-mesh/hanse/federation/federationpb"
)

// Where exports and imports are.
const (
	ExportPrefix = "exports/v1/"
	ImportPrefix = "imports/"
)

// Keys of a scope that are about the scope.
const (
	epochKey      = "!epoch"
	tickKey       = "!tick"
	metaKey       = "meta"
	scopesKey     = "scopes"     // of the scope peers/<member-id>
	dataPart      = "data/"      // of an imported scope
	checkpointKey = "checkpoint" // of an imported scope
)

// Scopes that each peer may read without being listed, and that need no epoch.
const (
	membersScope = "members"
	acksScope    = "acks"
	peersPart    = "peers/"
)

const maxScopes = 512 // of one peer

// MirrorTimers are the waits of a Mirror. Zero fields take the defaults.
type MirrorTimers struct {
	Probe      time.Duration // between probes of a scope: 5 s
	Answer     time.Duration // to a probe: 5 s
	Silence    time.Duration // of a stream whose progress was asked for, until it is given up: 15 s
	BackoffMin time.Duration // after the first failure: 100 ms
	BackoffMax time.Duration // 5 s
	Retry      time.Duration // after a refusal (permission, quota): 5 s
}

func (t MirrorTimers) withDefaults() MirrorTimers {
	for _, f := range []struct {
		v *time.Duration
		d time.Duration
	}{
		{&t.Probe, 5 * time.Second}, {&t.Answer, 5 * time.Second}, {&t.Silence, 15 * time.Second}, {&t.Retry, 5 * time.Second},
		{&t.BackoffMin, 100 * time.Millisecond}, {&t.BackoffMax, 5 * time.Second},
	} {
		if *f.v == 0 {
			*f.v = f.d
		}
	}
	return t
}

// MirrorConfig says what is mirrored, and where to.
type MirrorConfig struct {
	Peer         string // name of the peer, one path segment
	Self         string // own member ID: the peer lists what we may read at peers/<Self>/scopes
	Dial         func(ctx context.Context) (Remote, error)
	RemotePrefix string // "" is ExportPrefix
	Local        Store
	LocalPrefix  string // "" is ImportPrefix + Peer + "/"
	QuotaBytes   int64  // of keys and values of this peer; 0 is 256 MiB
	Timers       MirrorTimers
	Log          *slog.Logger
	Metrics      prometheus.Registerer // may be nil
	Now          func() time.Time      // nil is time.Now
}

// MirrorStatus is what a Mirror knows of its peer.
type MirrorStatus struct {
	Peer           string
	Connected      bool          // the present connection has answered
	LastAnswer     time.Time     // with a monotonic reading; zero before the first
	Revision       int64         // of the peer: all scopes are here up to it
	PeerRevision   int64         // of its newest answer
	LagRevisions   int64         // PeerRevision - Revision
	Synced         bool          // every scope was listed completely and is being followed
	Held           string        // why keys that the peer lacks are kept; Accept deletes them
	Err            string        // the last failure, empty when there is none now
	Bytes          int64         // of keys and values held
	Keys           int           // held, without bookkeeping
	Scopes         []string      // being mirrored, sorted
	PlannedRestart time.Duration // announced: silence of that long is expected
	Relists        int           // complete lists begun
}

// Mirror copies what one peer exports to us, byte for byte, and never guesses.
type Mirror struct {
	cfg     MirrorConfig
	log     *slog.Logger
	updated chan struct{}
	listed  chan struct{} // the peer's scope list has changed
	away    bool          // owned by Run: its absence has been logged

	mu     sync.Mutex // guards all below, and scopeMirror.report
	status MirrorStatus
	scopes map[string]*scopeMirror
	allow  []string // the peer's scope list; nil is unknown
	bytes  int64
}

// NewMirror returns a Mirror of one peer.
func NewMirror(cfg MirrorConfig) *Mirror {
	cfg.Timers = cfg.Timers.withDefaults()
	if cfg.RemotePrefix == "" {
		cfg.RemotePrefix = ExportPrefix
	}
	if cfg.LocalPrefix == "" {
		cfg.LocalPrefix = ImportPrefix + cfg.Peer + "/"
	}
	if cfg.QuotaBytes == 0 {
		cfg.QuotaBytes = 256 << 20
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	cfg.Log = orDiscard(cfg.Log)
	return &Mirror{cfg: cfg, log: cfg.Log.With("peer", cfg.Peer), updated: make(chan struct{}, 1), listed: make(chan struct{}, 1),
		scopes: map[string]*scopeMirror{}, status: MirrorStatus{Peer: cfg.Peer}}
}

func orDiscard(log *slog.Logger) *slog.Logger {
	if log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return log
}

func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Updated receives after the status or the imports have changed.
func (m *Mirror) Updated() <-chan struct{} { return m.updated }

// Accept deletes the keys that are held although the peer lacks them (a person's decision).
func (m *Mirror) Accept() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, s := range m.scopes {
		wake(s.accept)
	}
}

// Status returns the present status.
func (m *Mirror) Status() MirrorStatus {
	m.mu.Lock()
	defer m.mu.Unlock()
	st := m.status
	st.Bytes = m.bytes
	st.Synced = len(m.scopes) > 0 && (m.cfg.Self == "" || m.allow != nil)
	st.Revision = 0
	for _, name := range slices.Sorted(maps.Keys(m.scopes)) {
		r := m.scopes[name].report
		st.Scopes = append(st.Scopes, name)
		st.Keys += r.keys
		st.Synced = st.Synced && r.following
		if r.revision > 0 && (st.Revision == 0 || r.revision < st.Revision) {
			st.Revision = r.revision
		}
		if r.held != "" {
			st.Held = fmt.Sprintf("scope %s: %s", name, r.held)
		}
		if r.err != "" {
			st.Err = fmt.Sprintf("scope %s: %s", name, r.err)
		}
		st.PlannedRestart = max(st.PlannedRestart, r.restart)
	}
	st.LagRevisions = max(0, st.PeerRevision-st.Revision)
	return st
}

// answered notes that the peer has spoken.
func (m *Mirror) answered(h Header) {
	now := m.cfg.Now()
	m.mu.Lock()
	first := !m.status.Connected
	m.status.Connected, m.status.LastAnswer, m.status.Err = true, now, ""
	m.status.PeerRevision = h.Revision
	m.mu.Unlock()
	if first {
		m.log.Info("peer answers", "revision", h.Revision)
	}
	wake(m.updated)
}

// heard notes that a long answer goes on.
func (m *Mirror) heard() {
	now := m.cfg.Now()
	m.mu.Lock()
	defer m.mu.Unlock()
	m.status.LastAnswer = now
}

// Run mirrors until ctx ends (nil), or until the local store says that this is not the leader any more.
func (m *Mirror) Run(ctx context.Context) error {
	if m.cfg.Metrics != nil {
		unregister, err := m.register()
		if err != nil {
			return err
		}
		defer unregister()
	}
	defer m.disconnected(nil)
	backoff := m.cfg.Timers.BackoffMin
	for {
		err := m.known(ctx)
		if err == nil {
			err = m.session(ctx)
		}
		if ctx.Err() != nil {
			return nil
		}
		if errors.Is(err, ErrNotLeader) {
			return fmt.Errorf("mirror %s: %w", m.cfg.Peer, err)
		}
		if m.disconnected(err) {
			backoff = m.cfg.Timers.BackoffMin
		}
		if !sleep(ctx, backoff/2+rand.N(backoff/2+1)) {
			return nil
		}
		backoff = min(backoff*2, m.cfg.Timers.BackoffMax)
	}
}

func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// disconnected notes the end of a session, and reports whether the peer had answered in it.
func (m *Mirror) disconnected(err error) (answered bool) {
	m.mu.Lock()
	answered = m.status.Connected
	m.status.Connected = false
	if answered {
		m.away = false
	}
	if err != nil {
		m.status.Err = err.Error()
	}
	for _, s := range m.scopes {
		s.report.following = false
	}
	m.mu.Unlock()
	switch {
	case err == nil:
	case answered: // also when the peer's listener ends an old connection
		m.log.Info("connection to the peer has ended", "error", err)
	case !m.away:
		m.away = true
		m.log.Warn("peer is away; its exports stay as they are", "error", err)
	default:
		m.log.Debug("peer is still away", "error", err)
	}
	wake(m.updated)
	return answered
}

// known finds the scopes that are here already, so that an authoritative list can remove them.
func (m *Mirror) known(ctx context.Context) error {
	m.mu.Lock()
	done := len(m.scopes) > 0
	m.mu.Unlock()
	if done {
		return nil
	}
	names := m.fixedScopes()
	_, err := m.cfg.Local.List(ctx, m.cfg.LocalPrefix, 0, func(kv KeyValue) error {
		rest := kv.Key[len(m.cfg.LocalPrefix):]
		if scope, ok := strings.CutSuffix(rest, "/"+checkpointKey); ok && !slices.Contains(names, scope) {
			names = append(names, scope)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("read the imports of %s: %w", m.cfg.Peer, err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, n := range names {
		m.scopes[n] = newScopeMirror(m, n)
	}
	return nil
}

func (m *Mirror) fixedScopes() []string {
	names := []string{membersScope, acksScope}
	if m.cfg.Self != "" {
		names = append(names, peersPart+m.cfg.Self)
	}
	return names
}

// session mirrors over one connection until that breaks.
func (m *Mirror) session(ctx context.Context) error {
	remote, err := m.cfg.Dial(ctx)
	if err != nil {
		return err
	}
	defer remote.Close()
	ctx, cancel := context.WithCancelCause(ctx)
	var wg sync.WaitGroup
	running := map[string]*run{}
	defer wg.Wait()
	defer cancel(nil)
	start := func(s *scopeMirror) {
		r := &run{done: make(chan struct{})}
		var rctx context.Context
		rctx, r.stop = context.WithCancel(ctx)
		running[s.name] = r
		wg.Go(func() {
			defer close(r.done)
			if err := s.run(rctx, remote); err != nil && rctx.Err() == nil {
				cancel(err)
			}
		})
	}
	for {
		add, gone := m.plan()
		for _, s := range add {
			if running[s.name] == nil {
				start(s)
			}
		}
		for _, s := range gone {
			if r := running[s.name]; r != nil {
				r.stop()
				<-r.done
				delete(running, s.name)
			}
			if err := s.remove(ctx); err != nil {
				return fmt.Errorf("remove scope %s, which %s no longer exports to us: %w", s.name, m.cfg.Peer, err)
			}
			m.log.Info("scope removed: the peer no longer lists it for us", "scope", s.name)
			m.forget(s)
		}
		select {
		case <-m.listed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

type run struct {
	stop context.CancelFunc
	done chan struct{}
}

// plan returns the scopes to mirror, and those that an authoritative list no longer has. Until there is such a list, what is known is kept and tried.
func (m *Mirror) plan() (add, gone []*scopeMirror) {
	m.mu.Lock()
	defer m.mu.Unlock()
	fixed := m.fixedScopes()
	for _, name := range m.allow {
		if m.scopes[name] == nil {
			m.scopes[name] = newScopeMirror(m, name)
		}
	}
	for name, s := range m.scopes {
		if slices.Contains(fixed, name) || m.allow == nil || slices.Contains(m.allow, name) {
			add = append(add, s)
			continue
		}
		gone = append(gone, s)
	}
	return add, gone
}

// forget drops a removed scope, unless it was listed again meanwhile.
func (m *Mirror) forget(s *scopeMirror) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.scopes[s.name] == s && !slices.Contains(m.allow, s.name) {
		delete(m.scopes, s.name)
		return
	}
	wake(m.listed)
}

// allowed takes the peer's scope list, as of a completed list or an event.
func (m *Mirror) allowed(value []byte) error {
	var pb federationpb.Scopes
	if err := proto.Unmarshal(value, &pb); err != nil {
		return fmt.Errorf("decode the scope list of %s: %w", m.cfg.Peer, err)
	}
	if len(pb.Scopes) > maxScopes {
		return fmt.Errorf("scope list of %s has %d entries; at most %d", m.cfg.Peer, len(pb.Scopes), maxScopes)
	}
	allow := []string{}
	for _, s := range pb.Scopes {
		if err := checkScope(s); err != nil {
			return fmt.Errorf("scope list of %s: %w", m.cfg.Peer, err)
		}
		if !slices.Contains(m.fixedScopes(), s) {
			allow = append(allow, s)
		}
	}
	m.mu.Lock()
	m.allow = allow
	m.mu.Unlock()
	wake(m.listed)
	return nil
}

// checkScope refuses names that would not be one path segment of keys.
func checkScope(s string) error {
	if s == "" || len(s) > 128 || strings.ContainsAny(s, "/!\x00") || s == "peers" {
		return fmt.Errorf("%q is not the name of a scope", s)
	}
	return nil
}

// reserve counts bytes of this peer; it refuses more than the quota.
func (m *Mirror) reserve(delta int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if delta > 0 && m.bytes+delta > m.cfg.QuotaBytes {
		return fmt.Errorf("%w: %d bytes and %d more of at most %d", errQuota, m.bytes, delta, m.cfg.QuotaBytes)
	}
	m.bytes += delta
	return nil
}

// register exposes the status as metrics.
func (m *Mirror) register() (unregister func(), err error) {
	reg := prometheus.WrapRegistererWith(prometheus.Labels{"peer": m.cfg.Peer}, m.cfg.Metrics)
	truth := map[bool]float64{true: 1}
	var done []prometheus.Collector
	unregister = func() {
		for _, c := range done {
			reg.Unregister(c)
		}
	}
	for _, d := range []struct {
		name, help string
		value      func(MirrorStatus) float64
	}{
		{"connected", "1 while the peer answers.", func(s MirrorStatus) float64 { return truth[s.Connected] }},
		{"synced", "1 while every scope is complete and followed.", func(s MirrorStatus) float64 { return truth[s.Synced] }},
		{"held", "1 while keys are kept that the peer lacks.", func(s MirrorStatus) float64 { return truth[s.Held != ""] }},
		{"lag_revisions", "Revisions of the peer that are not here yet.", func(s MirrorStatus) float64 { return float64(s.LagRevisions) }},
		{"age_seconds", "Since the last answer of the peer; -1 before the first.", func(s MirrorStatus) float64 {
			if s.LastAnswer.IsZero() {
				return -1
			}
			return m.cfg.Now().Sub(s.LastAnswer).Seconds()
		}},
		{"bytes", "Of keys and values held of the peer.", func(s MirrorStatus) float64 { return float64(s.Bytes) }},
		{"keys", "Held of the peer.", func(s MirrorStatus) float64 { return float64(s.Keys) }},
		{"relists", "Complete lists begun.", func(s MirrorStatus) float64 { return float64(s.Relists) }},
	} {
		g := prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "hanse_federation_mirror_" + d.name, Help: d.help},
			func() float64 { return d.value(m.Status()) })
		if err := reg.Register(g); err != nil {
			unregister()
			return nil, fmt.Errorf("register metrics of the mirror of %s: %w", m.cfg.Peer, err)
		}
		done = append(done, g)
	}
	return unregister, nil
}
