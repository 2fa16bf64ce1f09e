package peering

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/federation"
	"github.com/hanse-mesh/hanse/federation/etcd"
	"github.com/hanse-mesh/hanse/federation/federationpb"
)

func encode(m proto.Message) []byte {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		panic(fmt.Sprintf("marshal %T: %v", m, err)) // of our own, valid strings
	}
	return b
}

// loadExports reads what the last run exported: slots, export times and scope lists go on from there.
func (m *Mesh) loadExports(ctx context.Context) error {
	exports, restored := federation.NewExports(), map[string][]string{}
	err := etcd.ReadExports(ctx, m.cfg.Own, "", func(scope, key string, value []byte) error {
		if isServiceScope(scope) {
			exports.Restore(scope, key, value)
		}
		id, isPeer := strings.CutPrefix(scope, federation.PeerScope(""))
		list := &federationpb.Scopes{}
		if isPeer && key == federation.ScopesKey && proto.Unmarshal(value, list) == nil {
			restored[id] = list.Scopes
		}
		return nil
	})
	if err != nil {
		return err
	}
	m.restored.Store(&restored)
	m.exports.Store(exports)
	return nil
}

func isServiceScope(scope string) bool {
	return scope != federation.MembersScope && scope != federation.AcksScope && !strings.HasPrefix(scope, federation.PeerScope(""))
}

// exportServices gives the exporter the exported services of the local Snapshot. The first change goes at
// once, more within Debounce together. Nothing is exported before every source has been read whole: what was exported before stays until then.
func (m *Mesh) exportServices() {
	s, now := m.local.Load(), m.cfg.Now()
	m.exportLater = false
	if s == nil || !s.Complete || s == m.exportedFrom {
		return
	}
	if m.exportLater = now.Before(m.exportAt); m.exportLater {
		return
	}
	m.exportAt = now.Add(m.cfg.Timers.Debounce)
	prev := m.exports.Load()
	next, faults := federation.Encode(s, prev, now)
	if old := m.faults.Swap(&faults); old == nil || !slices.Equal(*old, faults) {
		for _, f := range faults {
			m.log.Error("service is not exported as it is now", "scope", f.Scope, "key", f.Key, "reason", f.Reason)
		}
	}
	exporter := m.term.Load().exporter
	value := func(scope string) func(string) ([]byte, error) {
		return func(key string) ([]byte, error) { return next.Value(scope, key) }
	}
	for scope, endpoints := range next.Scopes {
		if _, set := prev.Scopes[scope]; !set || m.exportedFrom == nil {
			exporter.Set(scope, etcd.Scope{
				Sums: next.Sums(scope), Value: value(scope), Endpoints: endpoints, Complete: true, Explained: explained(prev, next, scope),
			})
		}
	}
	if m.exportedFrom != nil {
		for scope, sums := range next.Changes(prev) {
			_, was := prev.Scopes[scope]
			if endpoints, is := next.Scopes[scope]; was && is {
				exporter.Patch(scope, etcd.Patch{Sums: sums, Value: value(scope), Endpoints: endpoints, Explained: explained(prev, next, scope)})
			}
		}
	}
	m.fade(prev, next)
	m.exports.Store(next)
	m.exportedFrom = s
}

// fade lets those who could read a scope read it on while its services, which are in other scopes now, are still there: without that they would
// be gone for a moment.
func (m *Mesh) fade(prev, next *federation.Exports) {
	listed := m.listed
	if listed == nil {
		listed = *m.restored.Load()
	}
	prev.Moved(next, func(name discovery.Name, scope string, _ int) {
		if _, stays := next.Scopes[scope]; stays || next.Scope(name) == "" || m.fading[scope] != nil {
			return
		}
		m.fading[scope] = map[string]bool{}
		for id, scopes := range listed {
			if slices.Contains(scopes, scope) {
				m.fading[scope][id] = true
			}
		}
	})
	for scope := range next.Scopes {
		delete(m.fading, scope)
	}
}

// faded forgets scopes that are empty now, and reports whether there was one.
func (m *Mesh) faded() bool {
	n := len(m.fading)
	for scope := range m.fading {
		if !m.term.Load().exporter.Holds(scope) {
			delete(m.fading, scope)
		}
	}
	return len(m.fading) < n
}

// explained counts the endpoints that a scope loses because their service is no longer exported, or in another scope.
func explained(prev, next *federation.Exports, scope string) int {
	n := 0
	prev.Moved(next, func(_ discovery.Name, in string, endpoints int) {
		if in == scope {
			n += endpoints
		}
	})
	return n
}

// exportMembership gives the exporter the records, scope lists and acknowledgements that peers read.
func (m *Mesh) exportMembership() {
	b, exporter := m.book.Load(), m.term.Load().exporter
	scopes := map[string]map[string][]byte{federation.MembersScope: {}, federation.AcksScope: {}}
	for _, r := range b.Exports() {
		scopes[federation.MembersScope][r.ID] = r.Bytes()
	}
	for td, sequence := range *m.acked.Load() {
		scopes[federation.AcksScope][td.Name()] = encode(&federationpb.Ack{Sequence: sequence})
	}
	listed := map[string][]string{}
	for _, member := range b.Members() {
		r := &member.Record
		listed[r.ID] = m.readable(r)
		scopes[federation.PeerScope(r.ID)] = map[string][]byte{federation.ScopesKey: encode(&federationpb.Scopes{Scopes: listed[r.ID]})}
	}
	m.listed = listed
	var names []string
	for scope, keys := range scopes {
		names = append(names, scope)
		if !sameKeys(m.membership[scope], keys) {
			exporter.Set(scope, etcd.Scope{Keys: keys, Complete: true})
		}
	}
	if m.exportedFrom == nil {
		m.membership = scopes
		return // which service scopes there are is not known yet
	}
	for scope := range m.exports.Load().Scopes {
		names = append(names, scope)
	}
	slices.Sort(names)
	if !slices.Equal(names, m.retained) {
		exporter.Retain(names...)
		m.retained = names
	}
	m.membership = scopes
}

func sameKeys(a, b map[string][]byte) bool {
	if a == nil || len(a) != len(b) {
		return false
	}
	for k, v := range b {
		if old, ok := a[k]; !ok || string(old) != string(v) {
			return false
		}
	}
	return true
}

// readable returns the scopes that a member may read beside its own, sorted. Until this run has exported once it is what the last run said:
// a list without a scope would tell the peer to delete it.
func (m *Mesh) readable(r *federation.Record) []string {
	if scopes, ok := (*m.restored.Load())[r.ID]; ok && m.exportedFrom == nil {
		return scopes
	}
	var labels map[string]string
	if s := m.local.Load(); s != nil && s.Peers[r.Name] != nil {
		labels = s.Peers[r.Name].Labels
	}
	scopes := append(m.exports.Load().Readable(r.Name, labels), federation.MembersScope, federation.AcksScope)
	for scope, members := range m.fading {
		if members[r.ID] {
			scopes = append(scopes, scope)
		}
	}
	slices.Sort(scopes)
	return scopes
}
