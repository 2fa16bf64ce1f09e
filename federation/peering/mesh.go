package peering

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/federation"
	"github.com/hanse-mesh/hanse/federation/etcd"
	"github.com/hanse-mesh/hanse/federation/join"
	"github.com/hanse-mesh/hanse/identity"
)

// Timers of a Mesh. Zero is the default.
type Timers struct {
	Debounce time.Duration // between exports while the local state keeps changing; 100 ms
	Probe    time.Duration // between rounds of data-path probes; 5 s
	Tick     time.Duration // between judgements; 1 s
	Move     time.Duration // a service that changes its audience is in both scopes for so long; 30 s
}

func (t Timers) withDefaults() Timers {
	set := func(d *time.Duration, def time.Duration) {
		if *d == 0 {
			*d = def
		}
	}
	set(&t.Debounce, 100*time.Millisecond)
	set(&t.Probe, 5*time.Second)
	set(&t.Tick, time.Second)
	set(&t.Move, 30*time.Second)
	return t
}

// Bundles is the trust store of this cluster. What it holds reaches handshakes through the identity.Source.
type Bundles interface {
	// Add relates with a trust domain and takes its bundle for first contact. A newer bundle that is already there stays.
	Add(td spiffeid.TrustDomain, b *spiffebundle.Bundle) error
	// Update takes the bundle that a member exports of itself. An older one changes nothing. Where a person has ended the relation it is
	// an error and changes nothing.
	Update(td spiffeid.TrustDomain, b *spiffebundle.Bundle) error
	// Remove ends the relation: the trust domain is not trusted any more.
	Remove(td spiffeid.TrustDomain) error
}

// Config is what a Mesh needs.
type Config struct {
	Self      discovery.Self
	MeshName  string           // of the mesh that this cluster begins; a joined mesh has its own
	Version   string           // of this program, "v0.1.0"
	Advertise []string         // host:port at which peers reach the federation listener
	Source    *identity.Source // the control plane's SVID, and all bundles
	Bundles   Bundles
	Own       etcd.Store // this cluster's own etcd: exports, members, tokens
	Imports   etcd.Store // where peers' exports are mirrored to
	// Servers is the own etcd's API, which peers read through a guard. Nil (tests without one): Serve has no guard.
	Servers func() (pb.KVServer, pb.WatchServer)
	// DialPeer connects to a member's exports; nil: its federation listener, by Dial.
	DialPeer func(ctx context.Context, to Target) (etcd.Remote, error)
	Dial     func(ctx context.Context, network, address string) (net.Conn, error) // to other clusters; nil: net.Dialer
	// Role says whether this replica leads; nil: it is the only one. With others, Own and Imports are one and the same store.
	Role        func() Role
	Replica     string // of this cluster, where there are others; one path segment
	Timers      Timers
	ImportQuota int64               // bytes of keys and values of one peer; 0 is federation/etcd's default
	Patience    federation.Patience // zero fields: the protocol's
	JoinRate    float64             // calls of strangers per second; 0 is join's default
	Log         *slog.Logger
	Metrics     prometheus.Registerer // may be nil
	Now         func() time.Time      // nil: time.Now
}

// Target is a member to be mirrored.
type Target struct {
	MemberID    string
	TrustDomain spiffeid.TrustDomain
	Addresses   []string
}

// Mesh is one cluster's side of the mesh. Its methods are safe for concurrent use.
type Mesh struct {
	// read-only after New
	cfg        Config
	td         spiffeid.TrustDomain
	log        *slog.Logger
	join       *join.Server
	replicas   *handoff
	store      writer // the own one
	kv         join.KV
	guard      *etcd.Guard   // nil without Servers
	loaded     chan struct{} // closed when the stores have been read
	loadedOnce sync.Once
	kick       chan struct{}      // wakes the loop
	settling   chan chan struct{} // closed by the loop after a step

	term          atomic.Pointer[term]
	book          atomic.Pointer[federation.Book]
	bookMu        sync.Mutex // serialises writers of book
	bookRevision  int64      // at which book is stored; guarded by bookMu
	opMu          sync.Mutex // serialises Join and Leave
	access        atomic.Pointer[map[spiffeid.TrustDomain]grant]
	accessChanged chan struct{} // size 1

	local      atomic.Pointer[discovery.Snapshot]
	addresses  atomic.Pointer[[]string]                       // of the federation listeners of all replicas
	gateways   atomic.Pointer[[]netip.AddrPort]               // of this cluster
	states     atomic.Pointer[map[string]discovery.PeerState] // by member ID, as the leader has judged; nil until read
	restored   atomic.Pointer[map[string][]string]            // scopes by member ID, as the last run, or the leader, exported them
	acked      atomic.Pointer[map[spiffeid.TrustDomain]uint64]
	clusterset atomic.Pointer[published]
	exports    atomic.Pointer[federation.Exports]
	faults     atomic.Pointer[[]federation.Fault] // of own exports

	provisionalMu sync.Mutex
	provisional   map[spiffeid.TrustDomain]*spiffebundle.Bundle // issuers of joins under way, for their reverse probe; guarded by provisionalMu

	peersMu sync.RWMutex
	peers   map[string]*peer // by member ID; written by the loop, guarded by peersMu

	// owned by the loop in Run
	exportedFrom *discovery.Snapshot
	exportAt     time.Time                       // not before
	exportLater  bool                            // there is something to export at exportAt
	membership   map[string]map[string][]byte    // as given to the exporter, by scope and key
	retained     []string                        // scopes
	fading       map[string]map[string]bool      // scopes that all services have left, and the IDs of the members that may read them until they are empty
	listed       map[string][]string             // scopes by member ID, as last given to the exporter
	markers      map[string]bool                 // trust domains that this Mesh has added, as stored
	trusted      map[spiffeid.TrustDomain]string // bundle as it was given to Bundles
	merged       mergeInput
	mergeAt      time.Time // not before
	mergeLater   bool      // there is something to merge at mergeAt
	applied      basis
}

// published is a Clusterset and the end of its time.
type published struct {
	*discovery.Clusterset
	replaced chan struct{}
}

// grant is what one trust domain's control plane may read.
type grant struct {
	memberID string
	prefixes []string
}

// New builds a Mesh. Run brings it to life.
func New(cfg Config) (*Mesh, error) {
	td, err := spiffeid.TrustDomainFromString(cfg.Self.TrustDomain)
	if err != nil {
		return nil, fmt.Errorf("own trust domain: %w", err)
	}
	for _, a := range cfg.Advertise {
		if err := federation.CheckAddress(a); err != nil {
			return nil, fmt.Errorf("advertised federation address: %w", err)
		}
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Dial == nil {
		cfg.Dial = (&net.Dialer{Timeout: 5 * time.Second}).DialContext
	}
	if cfg.MeshName == "" {
		cfg.MeshName = cfg.Self.Cluster
	}
	cfg.Patience = cfg.Patience.WithDefaults()
	cfg.Timers = cfg.Timers.withDefaults()
	m := &Mesh{
		cfg: cfg, td: td, log: cfg.Log, loaded: make(chan struct{}), kick: make(chan struct{}, 1), settling: make(chan chan struct{}), accessChanged: make(chan struct{}, 1),
		peers: map[string]*peer{}, provisional: map[spiffeid.TrustDomain]*spiffebundle.Bundle{},
		trusted: map[spiffeid.TrustDomain]string{},
	}
	m.term.Store(&term{own: cfg.Own, imports: cfg.Imports})
	m.addresses.Store(&cfg.Advertise)
	m.gateways.Store(&cfg.Self.Gateways)
	m.restored.Store(&map[string][]string{})
	m.access.Store(&map[spiffeid.TrustDomain]grant{})
	m.acked.Store(&map[spiffeid.TrustDomain]uint64{})
	m.clusterset.Store(&published{&discovery.Clusterset{
		Local: &discovery.Snapshot{Self: cfg.Self}, Members: map[string]*discovery.Member{}, Trusted: map[string]uint64{},
	}, make(chan struct{})})
	m.store = writer{cfg.Own, &m.term}
	m.kv = kv{etcd.NewKV(m.store, "")}
	if cfg.Servers != nil {
		kvServer, watchServer := cfg.Servers()
		m.guard = etcd.NewGuard(etcd.GuardConfig{
			KV: kvServer, Watch: watchServer, Source: cfg.Source, Authorize: m.authorizePrefixes, Changed: m.accessChanged,
			Log: cfg.Log, Metrics: cfg.Metrics, Now: cfg.Now,
		})
	}
	if m.cfg.DialPeer == nil {
		m.cfg.DialPeer = m.dialPeer
	}
	if cfg.Metrics != nil {
		if err := cfg.Metrics.Register(newCollector(m)); err != nil {
			return nil, fmt.Errorf("register metrics: %w", err)
		}
	}
	m.replicas = newHandoff(replicaAddr{})
	m.join = join.NewServer(join.Config{
		KV: m.kv, Registry: registry{m}, Source: cfg.Source, Dial: cfg.Dial, Log: cfg.Log, Now: cfg.Now, Rate: cfg.JoinRate,
	})
	return m, nil
}

// wake makes the loop look again; a burst costs one look.
func (m *Mesh) wake() {
	select {
	case m.kick <- struct{}{}:
	default:
	}
}

// SetLocal gives the Mesh what this cluster's sources say now.
func (m *Mesh) SetLocal(s *discovery.Snapshot) {
	m.local.Store(s)
	m.wake()
}

// SetAcked says which sequence of each trust domain's bundle this control plane and all its proxies have loaded; peers read it.
func (m *Mesh) SetAcked(acked map[spiffeid.TrustDomain]uint64) {
	c := maps.Clone(acked)
	m.acked.Store(&c)
	m.wake()
}

// Clusterset returns the current view of the mesh. It is immutable and never nil.
func (m *Mesh) Clusterset() *discovery.Clusterset { return m.clusterset.Load().Clusterset }

// Updated returns a channel that is closed when Clusterset has a successor. Take it before reading.
func (m *Mesh) Updated() <-chan struct{} { return m.clusterset.Load().replaced }

// Loaded returns a channel that is closed when the stores have been read: from then on Clusterset has what was known before.
func (m *Mesh) Loaded() <-chan struct{} { return m.loaded }

// SetAddresses says where the federation listeners of all replicas are, as other clusters dial them.
func (m *Mesh) SetAddresses(addresses []string) {
	a := slices.Clone(addresses)
	m.addresses.Store(&a)
	m.wake()
}

// SetGateways says where this cluster's gateways are, as other clusters dial them.
func (m *Mesh) SetGateways(gateways []netip.AddrPort) {
	g := slices.Clone(gateways)
	m.gateways.Store(&g)
	m.wake()
}

// work is Run in one Role, until ctx ends or the store says that this is not the leader any more.
func (m *Mesh) work(ctx context.Context, t *term) error {
	if err := m.load(ctx, t); err != nil {
		return fmt.Errorf("start federation: %w", err)
	}
	var running sync.WaitGroup
	defer running.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	failed := make(chan error, 1)
	if t.leads {
		running.Go(func() {
			if err := t.exporter.Run(ctx); err != nil && ctx.Err() == nil {
				failed <- err
			}
		})
	} else {
		running.Go(func() { m.followScopes(ctx) })
	}
	if m.replicated() {
		running.Go(func() { m.followBook(ctx) })
	}
	if err := m.startPeers(ctx, &running); err != nil {
		return fmt.Errorf("start federation: %w", err)
	}
	m.merge()
	m.loadedOnce.Do(func() { close(m.loaded) })
	tick := time.NewTicker(m.cfg.Timers.Tick)
	defer tick.Stop()
	var settled chan struct{}
	for {
		bundles := m.cfg.Source.Changed()
		if err := m.step(ctx, &running); err != nil && ctx.Err() == nil {
			m.log.Error("federation step", "error", err)
			pause(ctx, m.cfg.Timers.Tick) // and try again, but not in a loop that feeds itself
		}
		if settled != nil {
			close(settled)
			settled = nil
		}
		var due <-chan time.Time
		if m.exportLater {
			due = time.After(m.exportAt.Sub(m.cfg.Now()))
		}
		var remerge <-chan time.Time
		if m.mergeLater {
			remerge = time.After(m.mergeAt.Sub(m.cfg.Now()))
		}
		select {
		case <-ctx.Done():
			return nil
		case err := <-failed:
			return err
		case <-m.kick:
		case <-bundles:
		case <-due:
			m.applied = basis{}
		case <-remerge:
		case <-tick.C:
		case settled = <-m.settling:
			m.mergeAt = time.Time{}
		}
	}
}

// load reads the stores.
func (m *Mesh) load(ctx context.Context, t *term) error {
	if err := m.loadBook(ctx); err != nil {
		return err
	}
	if !t.leads {
		m.exports.Store(&federation.Exports{})
		return m.join.Load(ctx)
	}
	if err := m.resumeLeave(ctx); err != nil {
		return fmt.Errorf("finish a leave: %w", err)
	}
	if err := m.refreshOwn(ctx); err != nil {
		return err
	}
	if err := m.join.Load(ctx); err != nil {
		return err
	}
	if err := m.join.Sweep(ctx); err != nil {
		return err
	}
	return m.loadExports(ctx)
}

// step brings everything outside in line with the Book, the local Snapshot and what the peers' goroutines have found.
func (m *Mesh) step(ctx context.Context, running *sync.WaitGroup) error {
	var errs []error
	note := func(err error) {
		if err != nil {
			errs = append(errs, err)
		}
	}
	leads := m.term.Load().leads
	if leads {
		note(m.observe(ctx))
		if now := m.cfg.Now(); m.book.Load().Due(now) {
			note(m.change(ctx, func(b *federation.Book) ([]string, error) { return b.Expire(now), nil }))
		}
		note(m.expireJoining(ctx))
	}
	if m.faded() {
		m.applied = basis{}
	}
	if from := m.basisNow(); from != m.applied {
		others := m.applied
		others.local = from.local
		if leads && others != from { // services are not in the own record
			note(m.refreshOwn(ctx))
		}
		note(m.trust(ctx))
		if leads {
			m.exportServices()
			m.exportMembership()
		}
		m.authorize()
		note(m.reconcilePeers(ctx, running))
		m.applied = from
		if len(errs) > 0 {
			m.applied = basis{} // again
		}
	}
	if leads {
		m.judge(ctx)
	} else {
		m.followJudge()
	}
	m.merge()
	return errors.Join(errs...)
}

// basis is what membership, exports and the work for peers follow from.
type basis struct {
	book      *federation.Book
	local     *discovery.Snapshot
	acked     *map[spiffeid.TrustDomain]uint64
	restored  *map[string][]string
	addresses *[]string
	gateways  *[]netip.AddrPort
	bundles   <-chan struct{} // of the Source; another one after each change
}

func (m *Mesh) basisNow() basis {
	return basis{m.book.Load(), m.local.Load(), m.acked.Load(), m.restored.Load(), m.addresses.Load(), m.gateways.Load(), m.cfg.Source.Changed()}
}

// reobserve is how often what a peer exports of members is read again though it has not changed: what it means also depends on what others
// have said since.
const reobserve = 30 * time.Second

// observe gives the Book what each peer exports of members.
func (m *Mesh) observe(ctx context.Context) error {
	var errs []error
	for id, p := range m.currentPeers() {
		seen := p.seen.Load()
		if seen == nil || seen == p.took && m.cfg.Now().Sub(p.tookAt) < reobserve {
			continue
		}
		var reader federation.Reader
		if s := m.local.Load(); s != nil && s.Peers[p.record.Name] != nil {
			reader.Introductions = s.Peers[p.record.Name].Introductions
		}
		err := m.change(ctx, func(b *federation.Book) ([]string, error) {
			reader.Verify = verifyLeft(b)
			before := names(b)
			changed := b.Observe(id, seen.records, reader, m.cfg.Now())
			for _, c := range changed {
				r := &b.Entries[c].Record
				m.log.Info("member record changed", "member", r.Name, "id", r.ID, "standing", r.Standing, "incarnation", r.Incarnation, "from", p.record.Name, "new", before[c] == "")
			}
			return changed, nil
		})
		if err != nil {
			errs = append(errs, fmt.Errorf("records of cluster %s: %w", p.record.Name, err))
			continue
		}
		p.took, p.tookAt = seen, m.cfg.Now()
	}
	return errors.Join(errs...)
}

// authorize computes what each member may read.
func (m *Mesh) authorize() {
	b := m.book.Load()
	next := map[spiffeid.TrustDomain]grant{}
	for _, member := range b.Members() {
		r := &member.Record
		td, err := spiffeid.TrustDomainFromString(r.TrustDomain)
		if err != nil || m.disabled(r.Name) {
			continue
		}
		g := grant{memberID: r.ID}
		for _, scope := range append(slices.Clone(m.readable(r)), federation.PeerScope(r.ID)) {
			g.prefixes = append(g.prefixes, etcd.ExportPrefix+scope+"/")
		}
		next[td] = g
	}
	old := m.access.Swap(&next)
	if !maps.EqualFunc(*old, next, func(a, b grant) bool { return a.memberID == b.memberID && slices.Equal(a.prefixes, b.prefixes) }) {
		select {
		case m.accessChanged <- struct{}{}:
		default:
		}
	}
}

// authorizePrefixes is the guard's question: what may this peer read? Nothing, for everyone but the control planes of live members.
func (m *Mesh) authorizePrefixes(id spiffeid.ID) (prefixes []string, ok bool) {
	g, ok := (*m.access.Load())[id.TrustDomain()]
	if !ok || id != identity.ControlPlaneID(id.TrustDomain()) {
		return nil, false
	}
	return g.prefixes, true
}

func (m *Mesh) dialPeer(ctx context.Context, to Target) (etcd.Remote, error) {
	return etcd.DialPeer(ctx, etcd.PeerConfig{
		Addresses: to.Addresses, TLS: identity.ClientTLS(m.cfg.Source, identity.AuthorizeID(identity.ControlPlaneID(to.TrustDomain)), "h2"),
		Dialer: func(ctx context.Context, addr string) (net.Conn, error) { return m.cfg.Dial(ctx, "tcp", addr) },
	})
}

func (m *Mesh) disabled(name string) bool {
	s := m.local.Load()
	return s != nil && s.Peers[name] != nil && s.Peers[name].Disabled
}

// trust keeps the trust store in line with the members' bundles. A marker says that this Mesh has added a trust domain: it is added once,
// so that a person who removes it is obeyed, and removed once.
func (m *Mesh) trust(ctx context.Context) error {
	if m.markers == nil {
		stored, err := m.kv.List(ctx, m.trustedPath())
		if err != nil {
			return fmt.Errorf("read trusted members: %w", err)
		}
		m.markers = map[string]bool{}
		for key := range stored {
			m.markers[strings.TrimPrefix(key, m.trustedPath())] = true
		}
	}
	var errs []error
	live := map[string]bool{}
	for _, member := range m.book.Load().Members() {
		r := &member.Record
		td, err := spiffeid.TrustDomainFromString(r.TrustDomain)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		live[td.Name()] = true
		if m.markers[td.Name()] && m.trusted[td] == string(r.Bundle) {
			continue
		}
		if err := m.trustMember(ctx, td, r); err != nil {
			errs = append(errs, fmt.Errorf("trust cluster %s: %w", r.Name, err))
		}
		m.trusted[td] = string(r.Bundle)
	}
	for name := range m.markers {
		if live[name] {
			continue
		}
		td, err := spiffeid.TrustDomainFromString(name)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		delete(m.trusted, td)
		if err := m.cfg.Bundles.Remove(td); err != nil {
			errs = append(errs, fmt.Errorf("end trust in %s: %w", td, err))
			continue
		}
		m.log.Info("trust domain no longer trusted", "trust_domain", td.Name())
		if err := m.kv.Delete(ctx, m.trustedPath()+name); err != nil {
			errs = append(errs, fmt.Errorf("end trust in %s: %w", td, err))
			continue
		}
		delete(m.markers, name)
	}
	return errors.Join(errs...)
}

// trustedPath is where the markers are. Each replica has a trust store of its own, and so markers of its own.
func (m *Mesh) trustedPath() string {
	if m.cfg.Replica == "" {
		return trustedPath
	}
	return "replicas/v1/" + m.cfg.Replica + "/trusted/"
}

func (m *Mesh) trustMember(ctx context.Context, td spiffeid.TrustDomain, r *federation.Record) error {
	b, err := spiffebundle.Parse(td, r.Bundle)
	if err != nil {
		return fmt.Errorf("its bundle: %w", err)
	}
	if m.markers[td.Name()] {
		return m.cfg.Bundles.Update(td, b)
	}
	if err := m.cfg.Bundles.Add(td, b); err != nil {
		return err
	}
	m.log.Info("trust domain trusted", "trust_domain", td.Name(), "cluster", r.Name)
	if err := m.kv.Put(ctx, m.trustedPath()+td.Name(), []byte{}); err != nil {
		return err
	}
	m.markers[td.Name()] = true
	return nil
}

func sameBundle(b *spiffebundle.Bundle, data []byte) bool {
	have, err := spiffebundle.Parse(b.TrustDomain(), data)
	return err == nil && have.Equal(b)
}

// Acked returns the sequence of a trust domain's bundle that each fresh or suspect member says it has loaded, by member name; a member
// that has said nothing yet is 0.
func (m *Mesh) Acked(td spiffeid.TrustDomain) map[string]uint64 {
	out := map[string]uint64{}
	for _, p := range m.currentPeers() {
		if j := p.judged.Load(); j != nil && j.state == discovery.Withdrawn {
			continue
		}
		out[p.record.Name] = 0
		if seen := p.seen.Load(); seen != nil {
			out[p.record.Name] = seen.acks[td.Name()]
		}
	}
	return out
}
