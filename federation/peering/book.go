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
	"github.com/hanse-mesh/hanse/federation/federationpb"
)

const (
	selfKey     = "mesh/v1/self"
	memberPath  = "mesh/v1/members/"
	statePath   = "mesh/v1/states/"
	trustedPath = "mesh/v1/trusted/"
)

// change lets f decide on a copy of the Book, stores what it says has changed, and only then puts the copy in force.
// The own entry is stored last: a crash before leaves this cluster where it was.
func (m *Mesh) change(ctx context.Context, f func(b *federation.Book) (changed []string, err error)) error {
	m.bookMu.Lock()
	defer m.bookMu.Unlock()
	old := m.book.Load()
	next := old.Clone()
	changed, err := f(next)
	if err != nil || len(changed) == 0 && slices.Equal(next.Alarms(), old.Alarms()) {
		return err
	}
	own := false
	for _, id := range changed {
		if id == next.Self {
			own = true
			continue
		}
		if err := m.storeEntry(ctx, next, id); err != nil {
			return err
		}
	}
	if own {
		if err := m.storeEntry(ctx, next, next.Self); err != nil {
			return err
		}
	}
	m.book.Store(next)
	m.wake()
	return nil
}

func (m *Mesh) storeEntry(ctx context.Context, b *federation.Book, id string) error {
	e := b.Entries[id]
	if e == nil {
		if err := m.kv.Delete(ctx, memberPath+id); err != nil {
			return fmt.Errorf("forget member %.8s: %w", id, err)
		}
		return nil
	}
	pb := &federationpb.StoredEntry{Record: e.Record.Proto(), Direct: e.Direct, Via: e.Via, Held: e.Held}
	if e.Proposed != nil {
		pb.Proposed = e.Proposed.Proto()
	}
	value, err := proto.MarshalOptions{Deterministic: true}.Marshal(pb)
	if err != nil {
		return fmt.Errorf("encode member %.8s: %w", id, err)
	}
	if err := m.kv.Put(ctx, memberPath+id, value); err != nil {
		return fmt.Errorf("store member %.8s: %w", id, err)
	}
	return nil
}

// loadBook reads the Book, or begins one with a new member ID: a mesh of one.
func (m *Mesh) loadBook(ctx context.Context) (*federation.Book, error) {
	kv := m.kv
	self, err := kv.Get(ctx, selfKey)
	if err != nil {
		return nil, fmt.Errorf("read this cluster's member ID: %w", err)
	}
	if self == nil {
		id := make([]byte, 16)
		if _, err := rand.Read(id); err != nil {
			return nil, err
		}
		if _, err := kv.PutIfAbsent(ctx, selfKey, []byte(hex.EncodeToString(id))); err != nil {
			return nil, fmt.Errorf("store this cluster's member ID: %w", err)
		}
		if self, err = kv.Get(ctx, selfKey); err != nil {
			return nil, fmt.Errorf("read this cluster's member ID: %w", err)
		}
	}
	if !federation.IsMemberID(string(self)) {
		return nil, fmt.Errorf("this cluster's member ID in its store is damaged: %q", self)
	}
	stored, err := kv.List(ctx, memberPath)
	if err != nil {
		return nil, fmt.Errorf("read members: %w", err)
	}
	b := federation.NewBook(federation.Record{
		ID: string(self), Name: m.cfg.Self.Cluster, TrustDomain: m.cfg.Self.TrustDomain, Mesh: m.cfg.MeshName,
		Incarnation: 1, Standing: federation.Joined, Admitted: federation.Stamp(m.cfg.Now()), Changed: federation.Stamp(m.cfg.Now()),
	})
	for key, value := range stored {
		e, err := decodeEntry(value)
		if err != nil {
			return nil, fmt.Errorf("member %s: %w", strings.TrimPrefix(key, memberPath), err)
		}
		b.Put(e)
	}
	own := b.Own()
	if (own.Name != m.cfg.Self.Cluster || own.TrustDomain != m.cfg.Self.TrustDomain) && len(b.Entries) > 1 && own.Standing != federation.Left {
		return nil, fmt.Errorf("this cluster is in mesh %q as %q with trust domain %s, but is configured as %q with %s: leave the mesh first, or undo the change",
			own.Mesh, own.Name, own.TrustDomain, m.cfg.Self.Cluster, m.cfg.Self.TrustDomain)
	}
	return b, nil
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
	want.Addresses, want.Gateways = m.cfg.Advertise, m.cfg.Self.Gateways
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
