package peering

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/hanse-mesh/hanse/federation"
	"github.com/hanse-mesh/hanse/federation/federationpb"
)

func encode(m proto.Message) []byte {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		panic(fmt.Sprintf("marshal %T: %v", m, err)) // of our own, valid strings
	}
	return b
}

// lingering is a key that has moved to another scope and stays readable in the old one for a while.
type lingering struct {
	value []byte
	until time.Time
}

// exportServices writes the exported services of the local Snapshot. Nothing is exported before every source has been read whole: what was
// exported before stays until then.
func (m *Mesh) exportServices(ctx context.Context) error {
	s, now := m.local.Load(), m.cfg.Now()
	if s == nil || !s.Complete {
		return nil
	}
	settling := len(m.moved) > 0
	if s == m.exportedFrom && !settling {
		return nil
	}
	if s != m.exportedFrom && m.exportedFrom != nil {
		if m.exportDue.IsZero() {
			m.exportDue = now.Add(m.cfg.Timers.Debounce)
		}
		if now.Before(m.exportDue) {
			return nil
		}
	}
	m.exportDue = time.Time{}
	prev := m.exports.Load()
	next, faults := federation.Encode(s, prev, now)
	m.reportFaults(faults)
	m.linger(prev, next, now)

	var errs []error
	written := map[string]bool{}
	for scope, keys := range next.Scopes {
		written[scope] = true
		errs = append(errs, m.setScope(ctx, scope, m.withLingering(scope, keys)))
	}
	for scope := range m.moved {
		if !written[scope] {
			written[scope] = true
			errs = append(errs, m.setScope(ctx, scope, m.withLingering(scope, nil)))
		}
	}
	for scope := range m.scopes {
		if isServiceScope(scope) && !written[scope] {
			errs = append(errs, m.setScope(ctx, scope, nil))
		}
	}
	if err := errors.Join(errs...); err != nil {
		m.exportDue = now.Add(time.Second)
		return err
	}
	m.exports.Store(next)
	m.exportedFrom = s
	return nil
}

func isServiceScope(scope string) bool {
	return scope != federation.MembersScope && scope != federation.AcksScope && !strings.HasPrefix(scope, "peers/")
}

// linger notes keys that have left a scope although their service is still exported, and forgets those whose time is over.
func (m *Mesh) linger(prev, next *federation.Exports, now time.Time) {
	for scope, keys := range m.moved {
		for key, l := range keys {
			if n, _, err := federation.ParseKey(key); err != nil || !now.Before(l.until) || next.Since(n).IsZero() {
				delete(keys, key)
			}
		}
		if len(keys) == 0 {
			delete(m.moved, scope)
		}
	}
	for scope, keys := range prev.Scopes {
		for key, value := range keys {
			n, _, err := federation.ParseKey(key)
			if err != nil || next.Scope(n) == "" || next.Scope(n) == scope {
				continue
			}
			if m.moved[scope] == nil {
				m.moved[scope] = map[string]lingering{}
			}
			m.moved[scope][key] = lingering{value, now.Add(m.cfg.Timers.Move)}
		}
	}
}

func (m *Mesh) withLingering(scope string, keys map[string][]byte) map[string][]byte {
	if len(m.moved[scope]) == 0 {
		return keys
	}
	out := map[string][]byte{}
	for key, l := range m.moved[scope] {
		out[key] = l.value
	}
	maps.Copy(out, keys)
	return out
}

func (m *Mesh) reportFaults(faults []federation.Fault) {
	if old := m.faults.Swap(&faults); old == nil || !slices.Equal(*old, faults) {
		for _, f := range faults {
			m.log.Error("service is not exported as it is now", "scope", f.Scope, "key", f.Key, "reason", f.Reason)
		}
	}
}

// exportMembership writes the records, scope lists and acknowledgements that peers read.
func (m *Mesh) exportMembership(ctx context.Context) error {
	b := m.book.Load()
	scopes := map[string]map[string][]byte{federation.MembersScope: {}, federation.AcksScope: {}}
	for _, r := range b.Exports() {
		scopes[federation.MembersScope][r.ID] = r.Bytes()
	}
	for td, sequence := range *m.acked.Load() {
		scopes[federation.AcksScope][td.Name()] = encode(&federationpb.Ack{Sequence: sequence})
	}
	for _, member := range b.Members() {
		r := &member.Record
		scopes[federation.PeerScope(r.ID)] = map[string][]byte{federation.ScopesKey: encode(&federationpb.Scopes{Scopes: m.readable(r)})}
	}
	var errs []error
	for scope := range m.scopes {
		if !isServiceScope(scope) && scopes[scope] == nil {
			errs = append(errs, m.setScope(ctx, scope, nil))
		}
	}
	for scope, keys := range scopes {
		errs = append(errs, m.setScope(ctx, scope, keys))
	}
	return errors.Join(errs...)
}

// readable returns the scopes that a member may read beside its own, sorted. Until this run has exported once it is what the last run said:
// a list without a scope would tell the peer to delete it.
func (m *Mesh) readable(r *federation.Record) []string {
	if scopes, ok := m.restored[r.ID]; ok && m.exportedFrom == nil {
		return scopes
	}
	scopes := append(m.exports.Load().Readable(r.Name), federation.MembersScope, federation.AcksScope)
	slices.Sort(scopes)
	return scopes
}

// setScope writes a scope unless it was written so before; nil removes it.
func (m *Mesh) setScope(ctx context.Context, scope string, keys map[string][]byte) error {
	d := digest(keys)
	if keys != nil && m.scopes[scope] == d {
		return nil
	}
	if err := m.cfg.Stores.Exporter.Set(ctx, scope, keys, true); err != nil {
		return fmt.Errorf("export scope %s: %w", scope, err)
	}
	if keys == nil {
		delete(m.scopes, scope)
	} else {
		m.scopes[scope] = d
	}
	return nil
}

func digest(keys map[string][]byte) string {
	h := sha256.New()
	for _, k := range slices.Sorted(maps.Keys(keys)) {
		fmt.Fprintf(h, "%d %s %d ", len(k), k, len(keys[k]))
		h.Write(keys[k])
	}
	return string(h.Sum(nil))
}
