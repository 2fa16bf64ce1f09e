package peering

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/federation"
	"github.com/hanse-mesh/hanse/federation/etcd"
	"github.com/hanse-mesh/hanse/federation/federationpb"
)

// Role is what this replica of a control plane is to do until Changed is closed. The leader exports, mirrors, judges and probes. A follower
// reads what the leader has written and comes to the same Clusterset; it serves everything, and writes only what a person or another cluster
// asks of it, each time on condition that nobody else has changed the Book.
type Role struct {
	Leads bool
	// Store takes the writes of a leader, for Own and Imports both: each holds only while it leads. Nil: this replica is alone.
	Store   etcd.Store
	Changed <-chan struct{}
}

// term is one Role and what belongs to it.
type term struct {
	number       int
	leads        bool
	own, imports etcd.Store
	exporter     *etcd.Exporter // nil for a follower
}

// writer is the own store, with the writes of the present term.
type writer struct {
	etcd.Store
	term *atomic.Pointer[term]
}

// Txn implements etcd.Store.
func (w writer) Txn(ctx context.Context, compares []etcd.Compare, ops []etcd.Op) (bool, etcd.Header, error) {
	return w.term.Load().own.Txn(ctx, compares, ops)
}

// begin makes the term of a Role.
func (m *Mesh) begin(r Role) *term {
	t := &term{number: m.term.Load().number + 1, leads: r.Leads, own: m.cfg.Own, imports: m.cfg.Imports}
	if r.Store != nil {
		t.own, t.imports = r.Store, r.Store
	}
	if t.leads {
		t.exporter = etcd.NewExporter(etcd.ExporterConfig{Store: t.own, Linger: m.cfg.Timers.Debounce / 10, Move: m.cfg.Timers.Move, Log: m.cfg.Log, Now: m.cfg.Now})
	}
	m.term.Store(t)
	m.exportedFrom, m.membership, m.retained, m.exportLater = nil, nil, nil, false
	m.fading, m.listed = map[string]map[string]bool{}, nil
	m.restored.Store(&map[string][]string{})
	m.markers, m.trusted, m.applied = nil, map[spiffeid.TrustDomain]string{}, basis{}
	return t
}

// Run works until ctx ends, and has stopped all it started when it returns. No peer needs to be reachable.
func (m *Mesh) Run(ctx context.Context) error {
	if m.guard != nil {
		guarding := make(chan struct{})
		defer func() { <-guarding }()
		go func() {
			defer close(guarding)
			m.guard.Run(ctx)
		}()
	}
	if m.cfg.Role == nil {
		return m.work(ctx, m.begin(Role{Leads: true}))
	}
	for ctx.Err() == nil {
		role := m.cfg.Role()
		working, cancel := context.WithCancel(ctx)
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			select {
			case <-role.Changed:
				cancel()
			case <-working.Done():
			}
		}()
		err := m.work(working, m.begin(role))
		if over := working.Err() != nil; err != nil && !over {
			m.log.Warn("federation begins anew", "leads", role.Leads, "error", err)
			pause(working, time.Second)
		}
		if errors.Is(err, etcd.ErrNotLeader) { // and Role will say so in a moment
			<-working.Done()
		}
		cancel()
		<-ended
	}
	return nil
}

// replicated reports whether other replicas write the Book, too.
func (m *Mesh) replicated() bool { return m.cfg.Role != nil }

// followBook takes in what other replicas write of the mesh, until ctx ends.
func (m *Mesh) followBook(ctx context.Context) {
	m.again(ctx, "members of the mesh", func() error {
		return etcd.NewKV(m.cfg.Own, "").Watch(ctx, meshPath, func(all []etcd.KeyValue, _ int64) error { return m.takeBook(ctx, all) })
	})
}

// again calls f, which reads until something breaks, until ctx ends.
func (m *Mesh) again(ctx context.Context, what string, f func() error) {
	for ctx.Err() == nil {
		if err := f(); err != nil && ctx.Err() == nil {
			m.log.Warn("read again", "what", what, "error", err)
		}
		pause(ctx, 200*time.Millisecond)
	}
}

// takeBook puts a newer Book in force, and with it the states of peers and the open tokens.
func (m *Mesh) takeBook(ctx context.Context, all []etcd.KeyValue) error {
	m.bookMu.Lock()
	b, revision, err := m.decodeBook(all)
	if err == nil && revision > m.bookRevision {
		m.book.Store(b)
		m.bookRevision = revision
	}
	m.bookMu.Unlock()
	if err != nil {
		return err
	}
	states := map[string]discovery.PeerState{}
	for _, kv := range all {
		if id, ok := strings.CutPrefix(kv.Key, statePath); ok {
			states[id] = discovery.PeerState(kv.Value)
		}
	}
	m.states.Store(&states)
	m.wake()
	return m.join.Load(ctx)
}

// followScopes takes in which scopes the leader lets each peer read, until ctx ends.
func (m *Mesh) followScopes(ctx context.Context) {
	prefix := etcd.ExportPrefix + federation.PeerScope("")
	m.again(ctx, "scopes of peers", func() error {
		return etcd.NewKV(m.cfg.Own, prefix).Watch(ctx, "", func(all []etcd.KeyValue, _ int64) error {
			next := map[string][]string{}
			for _, kv := range all {
				id, key, _ := strings.Cut(kv.Key, "/")
				if key != federation.ScopesKey {
					continue
				}
				list := &federationpb.Scopes{}
				if err := proto.Unmarshal(kv.Value, list); err != nil {
					return fmt.Errorf("scopes of member %.8s: %w", id, err)
				}
				next[id] = list.Scopes
			}
			m.restored.Store(&next)
			m.wake()
			return nil
		})
	})
}

// followJudge is judge for a follower: the leader's judgements.
func (m *Mesh) followJudge() {
	states := m.states.Load()
	if states == nil {
		return
	}
	now := m.cfg.Now()
	for id, p := range m.currentPeers() {
		state, was := (*states)[id], p.judged.Load()
		if state != discovery.Suspect && state != discovery.Withdrawn {
			state = discovery.Fresh
		}
		if state != was.state {
			p.judged.Store(&judgement{state: state, since: now})
		}
	}
}
