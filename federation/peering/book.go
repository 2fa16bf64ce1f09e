package peering

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/hanse-mesh/hanse/federation"
	"github.com/hanse-mesh/hanse/federation/etcd"
	"github.com/hanse-mesh/hanse/federation/federationpb"
)

const (
	meshPath    = "mesh/v1/"
	selfKey     = "mesh/v1/self"
	revisionKey = "mesh/v1/book" // written with each change of the Book, which holds only if nobody has changed it since it was read
	memberPath  = "mesh/v1/members/"
	statePath   = "mesh/v1/states/"
	trustedPath = "mesh/v1/trusted/"
)

// tries is how often a change is decided anew because another replica was faster.
const tries = 10

// change lets f decide on a copy of the Book, stores what it says has changed, and only then puts the copy in force. Where another replica
// has changed the Book meanwhile, f decides again, on that. The own entry is stored last: a crash before leaves this cluster where it was.
func (m *Mesh) change(ctx context.Context, f func(b *federation.Book) (changed []string, err error)) error {
	m.bookMu.Lock()
	defer m.bookMu.Unlock()
	for range tries {
		old := m.book.Load()
		next := old.Clone()
		changed, err := f(next)
		if err != nil || len(changed) == 0 && slices.Equal(next.Alarms(), old.Alarms()) {
			return err
		}
		ok, err := m.storeBook(ctx, next, changed)
		if err != nil {
			return err
		}
		if ok {
			m.book.Store(next)
			m.wake()
			return nil
		}
		if err := m.reloadBook(ctx); err != nil {
			return err
		}
	}
	return fmt.Errorf("other replicas of this cluster changed the members of the mesh %d times meanwhile: try again", tries)
}

// storeBook stores the entries of changed members; ok is false if the stored Book is not the one that next was made from. The caller
// holds bookMu.
func (m *Mesh) storeBook(ctx context.Context, next *federation.Book, changed []string) (ok bool, err error) {
	var ops []etcd.Op
	size := 0
	flush := func() (bool, error) {
		ops = append(ops, etcd.Op{Key: revisionKey, Value: []byte{}})
		ok, h, err := m.store.Txn(ctx, []etcd.Compare{{Key: revisionKey, Revision: m.bookRevision}}, ops)
		if err != nil {
			return false, fmt.Errorf("store members: %w", err)
		}
		if ok {
			m.bookRevision = h.Revision
		}
		ops, size = nil, 0
		return ok, nil
	}
	slices.SortStableFunc(changed, func(a, b string) int { // the own one last
		return b2i(a == next.Self) - b2i(b == next.Self)
	})
	for _, id := range slices.Compact(changed) {
		op, err := entryOp(next, id)
		if err != nil {
			return false, err
		}
		if len(ops) > 0 && (len(ops) >= etcd.MaxOps-1 || size+len(op.Value) > etcd.MaxBytes) {
			if ok, err := flush(); err != nil || !ok {
				return ok, err
			}
		}
		ops = append(ops, op)
		size += len(op.Value)
	}
	if len(ops) == 0 {
		return true, nil
	}
	return flush()
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

func entryOp(b *federation.Book, id string) (etcd.Op, error) {
	e := b.Entries[id]
	if e == nil {
		return etcd.Op{Key: memberPath + id, Delete: true}, nil
	}
	pb := &federationpb.StoredEntry{Record: e.Record.Proto(), Direct: e.Direct, Via: e.Via, Held: e.Held}
	if e.Proposed != nil {
		pb.Proposed = e.Proposed.Proto()
	}
	value, err := proto.MarshalOptions{Deterministic: true}.Marshal(pb)
	if err != nil {
		return etcd.Op{}, fmt.Errorf("encode member %.8s: %w", id, err)
	}
	return etcd.Op{Key: memberPath + id, Value: value}, nil
}

// loadBook reads the Book, or begins one with a new member ID: a mesh of one.
func (m *Mesh) loadBook(ctx context.Context) error {
	id := make([]byte, 16)
	if _, err := rand.Read(id); err != nil {
		return err
	}
	if _, err := m.kv.PutIfAbsent(ctx, selfKey, []byte(hex.EncodeToString(id))); err != nil {
		return fmt.Errorf("store this cluster's member ID: %w", err)
	}
	m.bookMu.Lock()
	defer m.bookMu.Unlock()
	return m.reloadBook(ctx)
}

// reloadBook puts the stored Book in force. The caller holds bookMu.
func (m *Mesh) reloadBook(ctx context.Context) error {
	all, _, err := etcd.NewKV(m.store, "").List(ctx, meshPath)
	if err != nil {
		return fmt.Errorf("read members: %w", err)
	}
	b, revision, err := m.decodeBook(all)
	if err != nil {
		return err
	}
	m.book.Store(b)
	m.bookRevision = revision
	m.wake()
	return nil
}

// decodeBook makes the Book of what is stored, and the revision at which it was.
func (m *Mesh) decodeBook(all []etcd.KeyValue) (b *federation.Book, revision int64, err error) {
	var self string
	for _, kv := range all {
		switch kv.Key {
		case selfKey:
			self = string(kv.Value)
		case revisionKey:
			revision = kv.ModRevision
		}
	}
	if !federation.IsMemberID(self) {
		return nil, 0, fmt.Errorf("this cluster's member ID in its store is damaged: %q", self)
	}
	b = federation.NewBook(federation.Record{
		ID: self, Name: m.cfg.Self.Cluster, TrustDomain: m.cfg.Self.TrustDomain, Mesh: m.cfg.MeshName,
		Incarnation: 1, Standing: federation.Joined, Admitted: federation.Stamp(m.cfg.Now()), Changed: federation.Stamp(m.cfg.Now()),
	})
	for _, kv := range all {
		id, ok := strings.CutPrefix(kv.Key, memberPath)
		if !ok {
			continue
		}
		e, err := decodeEntry(kv.Value)
		if err != nil {
			return nil, 0, fmt.Errorf("member %s: %w", id, err)
		}
		b.Put(e)
	}
	own := b.Own()
	if (own.Name != m.cfg.Self.Cluster || own.TrustDomain != m.cfg.Self.TrustDomain) && len(b.Entries) > 1 && own.Standing != federation.Left {
		return nil, 0, fmt.Errorf("this cluster is in mesh %q as %q with trust domain %s, but is configured as %q with %s: leave the mesh first, or undo the change",
			own.Mesh, own.Name, own.TrustDomain, m.cfg.Self.Cluster, m.cfg.Self.TrustDomain)
	}
	return b, revision, nil
}

func decodeEntry(value []byte) (*federation.Entry, error) {
	pb := &federationpb.StoredEntry{}
	if err := proto.Unmarshal(value, pb); err != nil {
		return nil, err
	}
	r, err := federation.RecordFromProto(pb.Record)
	if err != nil {
		return nil, err
	}
	e := &federation.Entry{Record: r, Direct: pb.Direct, Via: pb.Via, Held: pb.Held}
	if pb.Proposed != nil {
		p, err := federation.RecordFromProto(pb.Proposed)
		if err != nil {
			return nil, err
		}
		e.Proposed = &p
	}
	return e, nil
}

// refreshOwn brings this cluster's own record up to its configuration and its own bundle.
func (m *Mesh) refreshOwn(ctx context.Context) error {
	have := *m.book.Load().Own()
	want := have
	want.Name, want.TrustDomain = m.cfg.Self.Cluster, m.cfg.Self.TrustDomain
	want.Addresses, want.Gateways = *m.addresses.Load(), *m.gateways.Load()
	want.Network, want.Region, want.Version = m.cfg.Self.Network, m.cfg.Self.Region, m.cfg.Version
	if own := m.cfg.Source.Bundles()[m.td]; own != nil && !sameBundle(own, have.Bundle) {
		b, err := own.Marshal()
		if err != nil {
			return fmt.Errorf("encode this cluster's bundle: %w", err)
		}
		want.Bundle = b
	}
	if have.Mesh == "" {
		want.Mesh = m.cfg.MeshName
	}
	if string(have.Bytes()) == string(want.Bytes()) {
		return nil
	}
	return m.change(ctx, func(b *federation.Book) ([]string, error) {
		e := *b.Entries[b.Self]
		now := want
		now.Incarnation, now.Standing, now.Sponsor, now.Changed = e.Record.Incarnation, e.Record.Standing, e.Record.Sponsor, e.Record.Changed
		now.Admitted, now.Expires, now.Proof, now.Mesh = e.Record.Admitted, e.Record.Expires, e.Record.Proof, want.Mesh
		if now.Standing == federation.Left {
			now.Proof = nil // it covers what is changed here
		}
		e.Record = now
		b.Put(&e)
		return []string{b.Self}, nil
	})
}

// names of members by ID, this cluster included.
func names(b *federation.Book) map[string]string {
	out := map[string]string{}
	for id, e := range maps.All(b.Entries) {
		out[id] = e.Record.Name
	}
	return out
}
