package peering

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/federation"
	"github.com/hanse-mesh/hanse/federation/etcd"
	"github.com/hanse-mesh/hanse/federation/federationpb"
	"github.com/hanse-mesh/hanse/federation/join"
	"github.com/hanse-mesh/hanse/identity"
)

const (
	probeTimeout = 2 * time.Second
	sampled      = 3 // endpoints of a member on this network that are probed
	firstRead    = 10 * time.Second
)

// peer is the work for one live member: its mirror, the reading of what that brought, and the probes of its data path.
type peer struct {
	// read-only
	record federation.Record // as it was when the work began; a change of what matters begins it anew
	key    string
	term   *term
	td     spiffeid.TrustDomain
	mirror *etcd.Mirror // which runs at the leader only
	stop   context.CancelFunc
	ended  chan struct{}
	read   chan struct{} // closed when everything that was there has been read once

	part   atomic.Pointer[federation.Part]
	seen   atomic.Pointer[seen]
	judged atomic.Pointer[judgement]

	mu       sync.Mutex
	observed federation.Observed // guarded by mu
	probe    ProbeResult         // guarded by mu

	took   *seen     // by the Book; owned by the loop
	tookAt time.Time // owned by the loop
}

// seen is what a peer exports beside services. It is immutable.
type seen struct {
	records []federation.Record
	acks    map[string]uint64 // by trust domain
	faults  []federation.Fault
}

// judgement is a peer's state and since when.
type judgement struct {
	state discovery.PeerState
	since time.Time
}

// ProbeResult is the last round of probes of a member's data path, with SVIDs.
type ProbeResult struct {
	Known bool
	OK    bool // any address answered
	RTT   time.Duration
	At    time.Time
	Error string
}

func (m *Mesh) currentPeers() map[string]*peer {
	m.peersMu.RLock()
	defer m.peersMu.RUnlock()
	return maps.Clone(m.peers)
}

// peerKey changes when the work for a member must begin anew.
func (m *Mesh) peerKey(r *federation.Record) string {
	policy := ""
	if s := m.local.Load(); s != nil && s.Peers[r.Name] != nil {
		p := s.Peers[r.Name]
		policy = fmt.Sprintf("%q %q", p.Namespaces, p.SPIFFEIDs)
	}
	if s := m.local.Load(); s != nil {
		policy += fmt.Sprintf(" %q", s.AllowOf(r.TrustDomain))
	}
	return fmt.Sprintf("%s %s %q %d %s", r.Name, r.TrustDomain, r.Addresses, toUnix(r.Admitted), policy)
}

func toUnix(t time.Time) int64 { return t.Unix() }

// reconcilePeers starts, restarts and stops the work for members, and drops the imports of those that are no members any more.
func (m *Mesh) reconcilePeers(ctx context.Context, running *sync.WaitGroup) error {
	live := map[string]*federation.Record{}
	for _, member := range m.book.Load().Members() {
		if !m.disabled(member.Record.Name) {
			live[member.Record.ID] = &member.Record
		}
	}
	current := m.currentPeers()
	var errs []error
	for id, p := range current {
		if r := live[id]; r == nil || p.key != m.peerKey(r) || p.term != m.term.Load() {
			p.stop()
			<-p.ended
			if r == nil {
				errs = append(errs, m.forgetPeer(ctx, id))
			}
		}
	}
	for id, r := range live {
		if old := current[id]; old == nil || old.key != m.peerKey(r) || old.term != m.term.Load() {
			p, err := m.startPeer(ctx, running, r, old)
			if err != nil {
				errs = append(errs, fmt.Errorf("mirror cluster %s: %w", r.Name, err))
				continue
			}
			m.peersMu.Lock()
			m.peers[id] = p
			m.peersMu.Unlock()
		}
	}
	return errors.Join(errs...)
}

// forgetPeer drops what is kept of a member that is none any more.
func (m *Mesh) forgetPeer(ctx context.Context, id string) error {
	m.peersMu.Lock()
	delete(m.peers, id)
	m.peersMu.Unlock()
	t := m.term.Load()
	if !t.leads {
		return nil
	}
	if err := m.kv.Delete(ctx, statePath+id); err != nil {
		return fmt.Errorf("forget the state of member %.8s: %w", id, err)
	}
	if e := m.book.Load().Entries[id]; e != nil && e.Live() && m.book.Load().Own().Standing == federation.Joined {
		return nil // only disabled: its imports stay for when it is enabled
	}
	if err := etcd.RemoveImports(ctx, t.imports, id); err != nil {
		return fmt.Errorf("drop imports of member %.8s: %w", id, err)
	}
	return nil
}

// startPeers begins the work for all members and waits until what is on disk of them has been read.
func (m *Mesh) startPeers(ctx context.Context, running *sync.WaitGroup) error {
	if err := m.reconcilePeers(ctx, running); err != nil {
		return err
	}
	peers := m.currentPeers()
	if m.term.Load().leads {
		stored, err := etcd.ImportedPeers(ctx, m.cfg.Imports)
		if err != nil {
			return err
		}
		for _, id := range stored {
			if peers[id] == nil {
				if err := m.forgetPeer(ctx, id); err != nil {
					return err
				}
			}
		}
	}
	deadline := time.NewTimer(firstRead)
	defer deadline.Stop()
	for _, p := range peers {
		select {
		case <-p.read:
		case <-ctx.Done():
			return ctx.Err()
		case <-deadline.C:
			return fmt.Errorf("imports of cluster %s could not be read within %s", p.record.Name, firstRead)
		}
	}
	if m.term.Load().leads {
		m.judge(ctx)
	}
	return nil
}

func (m *Mesh) startPeer(ctx context.Context, running *sync.WaitGroup, r *federation.Record, old *peer) (*peer, error) {
	td, err := spiffeid.TrustDomainFromString(r.TrustDomain)
	if err != nil {
		return nil, err
	}
	ctx, stop := context.WithCancel(ctx)
	t := m.term.Load()
	p := &peer{record: *r, key: m.peerKey(r), term: t, td: td, stop: stop, ended: make(chan struct{}), read: make(chan struct{})}
	p.mirror = etcd.NewMirror(etcd.MirrorConfig{
		Peer: r.ID, Self: m.book.Load().Self, Local: t.imports, Log: m.log.With("cluster", r.Name), Now: m.cfg.Now,
		Timers: etcd.MirrorTimers{Probe: m.cfg.Timers.Probe}, QuotaBytes: m.cfg.ImportQuota,
		Dial: func(ctx context.Context) (etcd.Remote, error) {
			return m.cfg.DialPeer(ctx, Target{MemberID: r.ID, TrustDomain: td, Addresses: r.Addresses})
		},
	})
	if old != nil { // what was known stays until it is known anew
		p.part.Store(old.part.Load())
		p.seen.Store(old.seen.Load())
		p.judged.Store(old.judged.Load())
	} else {
		p.part.Store(&federation.Part{})
	}
	if old != nil && old.term == t {
		old.mu.Lock()
		p.observed, p.probe = old.observed, old.probe
		old.mu.Unlock()
	} else {
		now := m.cfg.Now()
		p.observed.Answer, p.observed.Success = now, now // patience begins now
		if j := m.lastJudgement(ctx, r.ID, now); old == nil || j.state != old.judged.Load().state {
			p.judged.Store(j)
		}
		if p.judged.Load().state == discovery.Withdrawn { // its data path was dead: that stays so until a success
			p.observed.FailedRound, p.observed.Success = m.cfg.Patience.Rounds, time.Time{}
		}
	}
	var work sync.WaitGroup
	work.Go(func() { m.follow(ctx, p) })
	if t.leads {
		work.Go(func() { m.runMirror(ctx, p) })
		work.Go(func() { m.probeLoop(ctx, p) })
	}
	running.Go(func() {
		work.Wait()
		stop()
		close(p.ended)
	})
	return p, nil
}

// lastJudgement is the state that a peer had when this cluster stopped.
func (m *Mesh) lastJudgement(ctx context.Context, id string, now time.Time) *judgement {
	j := &judgement{state: discovery.Fresh, since: now}
	value, err := m.kv.Get(ctx, statePath+id)
	if err != nil {
		return j
	}
	if s := discovery.PeerState(value); s == discovery.Suspect || s == discovery.Withdrawn {
		j.state = s
	}
	return j
}

// runMirror runs the mirror, again if it ends by itself.
func (m *Mesh) runMirror(ctx context.Context, p *peer) {
	for ctx.Err() == nil {
		if err := p.mirror.Run(ctx); err != nil && ctx.Err() == nil {
			m.log.Warn("mirror ended", "cluster", p.record.Name, "error", err)
		}
		pause(ctx, time.Second)
	}
}

// pause waits about d.
func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d*3/4 + rand.N(d/2))
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// follow decodes what the mirror brings.
func (m *Mesh) follow(ctx context.Context, p *peer) {
	log := m.log.With("cluster", p.record.Name)
	started := false
	for ctx.Err() == nil {
		r := newReader(m, p, log)
		err := etcd.FollowImports(ctx, m.cfg.Imports, p.record.ID, func(changes []federation.Change, complete bool) {
			r.take(changes)
			if !complete {
				return // what was known stays in force until all is known anew
			}
			r.publish()
			if !started {
				started = true
				close(p.read)
			}
			m.wake()
		})
		if ctx.Err() == nil {
			log.Warn("reading imports ended", "error", err)
		}
		pause(ctx, time.Second)
	}
}

// reader turns changes of one member's imports into its Part and seen. The callback of FollowImports owns it.
type reader struct {
	m       *Mesh
	p       *peer
	log     *slog.Logger
	decoder *federation.Decoder
	records map[string]federation.Record
	acks    map[string]uint64
	faults  map[string]federation.Fault // of records and acks, by key
	news    bool                        // in records or acks, or nothing was published yet
}

func newReader(m *Mesh, p *peer, log *slog.Logger) *reader {
	policy := federation.Policy{
		Member: p.record.Name, TrustDomain: p.td, Admitted: p.record.Admitted, Match: identity.MatchPattern,
	}
	if s := m.local.Load(); s != nil {
		policy.Peer, policy.Allow = s.Peers[p.record.Name], s.AllowOf(p.td.Name())
	}
	return &reader{
		m: m, p: p, log: log, decoder: federation.NewDecoder(policy), news: true,
		records: map[string]federation.Record{}, acks: map[string]uint64{}, faults: map[string]federation.Fault{},
	}
}

func (r *reader) take(changes []federation.Change) {
	for _, c := range changes {
		switch {
		case c.Scope == federation.MembersScope:
			r.news = true
			r.bookkeeping(c, r.record)
		case c.Scope == federation.AcksScope:
			r.news = true
			r.bookkeeping(c, r.ack)
		}
	}
	r.decoder.Apply(changes, r.m.cfg.Now())
}

func (r *reader) publish() {
	old := r.p.part.Load()
	next := r.decoder.Part()
	for _, f := range next.Faults {
		if !slices.Contains(old.Faults, f) {
			r.log.Warn("object refused; its last good state stays", "scope", f.Scope, "key", f.Key, "reason", f.Reason)
		}
	}
	r.p.part.Store(next)
	if r.news {
		r.news = false
		s := &seen{acks: maps.Clone(r.acks), faults: slices.Collect(maps.Values(r.faults))}
		for _, id := range slices.Sorted(maps.Keys(r.records)) {
			s.records = append(s.records, r.records[id])
		}
		slices.SortFunc(s.faults, func(a, b federation.Fault) int { return strings.Compare(a.Key, b.Key) })
		r.p.seen.Store(s)
	}
}

func (r *reader) bookkeeping(c federation.Change, decode func(federation.Change) error) {
	delete(r.faults, c.Scope+"/"+c.Key)
	if err := decode(c); err != nil {
		f := federation.Fault{Member: r.p.record.Name, Scope: c.Scope, Key: c.Key, Reason: err.Error()}
		r.faults[c.Scope+"/"+c.Key] = f
		r.log.Warn("object refused; its last good state stays", "scope", f.Scope, "key", f.Key, "reason", f.Reason)
	}
}

const maxMembers = 10000 // records and acks that one member may export

func (r *reader) record(c federation.Change) error {
	if c.Value == nil {
		delete(r.records, c.Key)
		return nil
	}
	rec, err := federation.DecodeRecord(c.Value)
	if err != nil {
		return err
	}
	if rec.ID != c.Key {
		return fmt.Errorf("the record is of member %.8s", rec.ID)
	}
	if _, known := r.records[c.Key]; !known && len(r.records) >= maxMembers {
		return fmt.Errorf("more than %d member records", maxMembers)
	}
	r.records[c.Key] = rec
	return nil
}

func (r *reader) ack(c federation.Change) error {
	if c.Value == nil {
		delete(r.acks, c.Key)
		return nil
	}
	a := &federationpb.Ack{}
	if err := proto.Unmarshal(c.Value, a); err != nil {
		return err
	}
	if _, known := r.acks[c.Key]; !known && len(r.acks) >= maxMembers {
		return fmt.Errorf("more than %d acknowledgements", maxMembers)
	}
	r.acks[c.Key] = a.Sequence
	return nil
}

// judge updates every peer's state.
func (m *Mesh) judge(ctx context.Context) {
	now := m.cfg.Now()
	for id, p := range m.currentPeers() {
		st := p.mirror.Status()
		p.mu.Lock()
		if st.LastAnswer.After(p.observed.Answer) {
			p.observed = m.cfg.Patience.Heard(p.observed, st.LastAnswer)
		}
		if st.PlannedRestart > 0 {
			p.observed.Grace = p.observed.Answer.Add(m.cfg.Patience.Grace)
		}
		o := p.observed
		p.mu.Unlock()
		was := p.judged.Load()
		state := m.cfg.Patience.Judge(was.state, o, now)
		if state == was.state {
			continue
		}
		p.judged.Store(&judgement{state: state, since: now})
		m.log.Info("peer state changed", "cluster", p.record.Name, "state", string(state), "was", string(was.state), "last_answer", o.Answer)
		if err := m.kv.Put(ctx, statePath+id, []byte(state)); err != nil {
			m.log.Warn("peer state not stored", "cluster", p.record.Name, "error", err)
		}
	}
}

// ReportSuccess notes that load reports show a success with a member's endpoints.
func (m *Mesh) ReportSuccess(member string) {
	for _, p := range m.currentPeers() {
		if p.record.Name == member {
			p.mu.Lock()
			p.observed = p.observed.Succeeded(m.cfg.Now())
			p.mu.Unlock()
		}
	}
}

// probeLoop probes the member's data path until ctx ends. Probing never stops, whatever the state.
func (m *Mesh) probeLoop(ctx context.Context, p *peer) {
	wait := min(m.cfg.Timers.Probe, 500*time.Millisecond) // at first soon again: the data path of a member that just joined is about to be there
	for ctx.Err() == nil {
		if targets := m.targets(p); len(targets) > 0 {
			res := m.probeRound(ctx, p, targets)
			if ctx.Err() != nil {
				return
			}
			p.mu.Lock()
			p.probe = res
			p.observed = p.observed.Probed(res.OK, res.At)
			p.mu.Unlock()
			m.wake()
			if res.OK {
				wait = m.cfg.Timers.Probe
			}
		}
		pause(ctx, wait)
		wait = min(2*wait, m.cfg.Timers.Probe)
	}
}

// target is one address of a member's data path and who must answer there.
type target struct {
	address netip.AddrPort
	sni     string
	want    spiffeid.ID
	protos  []string
}

// targets are the member's gateways, or on one and the same network the hops of a few endpoints.
func (m *Mesh) targets(p *peer) []target {
	r := p.record
	if e := m.book.Load().Entries[r.ID]; e != nil {
		r = e.Record
	}
	var out []target
	if r.Network != m.cfg.Self.Network {
		for _, g := range r.Gateways {
			out = append(out, target{address: g, sni: join.ProbeName(r.ID), want: identity.GatewayID(p.td)})
		}
		return out
	}
	var hops []*discovery.Endpoint
	part := p.part.Load()
	for _, e := range part.Exports.All() {
		for _, ep := range e.Endpoints {
			if ep.Ready && ep.Transport == discovery.Hop && ep.Network == m.cfg.Self.Network {
				hops = append(hops, ep)
			}
		}
	}
	rank := func(ep *discovery.Endpoint) uint64 { // the same few each time, others at another cluster
		h := fnv.New64a()
		h.Write([]byte(m.book.Load().Self + ep.ID))
		return h.Sum64()
	}
	slices.SortFunc(hops, func(a, b *discovery.Endpoint) int {
		return compare(rank(a), rank(b))
	})
	hops = slices.CompactFunc(hops, func(a, b *discovery.Endpoint) bool { return a.ID == b.ID })
	for _, ep := range hops[:min(sampled, len(hops))] {
		id, err := spiffeid.FromString(ep.SPIFFEID)
		if err != nil {
			continue
		}
		out = append(out, target{address: ep.DialAddress(""), want: id, protos: []string{"h2"}})
	}
	return out
}

func compare(a, b uint64) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

func (m *Mesh) probeRound(ctx context.Context, p *peer, targets []target) ProbeResult {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	type answer struct {
		rtt time.Duration
		err error
	}
	answers := make(chan answer, len(targets))
	for _, t := range targets {
		go func() {
			rtt, err := join.Probe(ctx, join.ProbeConfig{
				Dial: m.cfg.Dial, Source: m.cfg.Source, Address: t.address.String(), ServerName: t.sni, NextProtos: t.protos,
				Verify: func(chain []*x509.Certificate) error {
					id, err := m.cfg.Source.Verify(chain)
					if err == nil && id != t.want {
						err = fmt.Errorf("it is %s, want %s", id, t.want)
					}
					return err
				},
			})
			answers <- answer{rtt, err}
		}()
	}
	res := ProbeResult{Known: true}
	var errs []string
	for range targets {
		a := <-answers
		if a.err != nil {
			errs = append(errs, a.err.Error())
		} else if !res.OK || a.rtt < res.RTT {
			res.OK, res.RTT = true, a.rtt
		}
	}
	res.At = m.cfg.Now()
	slices.Sort(errs)
	res.Error = strings.Join(errs, "; ")
	return res
}
