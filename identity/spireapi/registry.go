package spireapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/proto"

	"github.com/hanse-mesh/hanse/identity"
)

// KV keeps agents and entries. Replicas share it. attest.Memory is one that lasts as long as the process.
type KV interface {
	// Get returns the value of key, nil if there is none.
	Get(ctx context.Context, key string) ([]byte, error)
	// CompareAndPut stores value under key and returns true if its value still is old; nil: if there is none.
	CompareAndPut(ctx context.Context, key string, old, value []byte) (bool, error)
	// Delete removes key, if it is there.
	Delete(ctx context.Context, key string) error
	// List returns all keys that begin with prefix, and their values.
	List(ctx context.Context, prefix string) (map[string][]byte, error)
}

const (
	agentPrefix = "agents/"  // + the agent's SPIFFE ID
	entryPrefix = "entries/" // + the entry's ID
)

// agentRecord is immutable once it is in a registry.
type agentRecord struct {
	ID         string `json:"id"`
	Type       string `json:"type"` // of attestation
	Serial     string `json:"serial"`
	Expires    int64  `json:"expires"`              // Unix seconds
	NewSerial  string `json:"new_serial,omitempty"` // renewed, not used yet
	NewExpires int64  `json:"new_expires,omitempty"`
	// Authority is the hex key ID of what signed it; "" where that was not noted yet.
	Authority    string `json:"authority,omitempty"`
	NewAuthority string `json:"new_authority,omitempty"` // of NewSerial's

	Banned      bool             `json:"banned,omitempty"`
	CanReattest bool             `json:"can_reattest,omitempty"`
	Selectors   []selectorRecord `json:"selectors,omitempty"`
}

type selectorRecord struct {
	Type  string `json:"type"`
	Value string `json:"value"`
}

func (a *agentRecord) selectors() []*types.Selector {
	var out []*types.Selector
	for _, s := range a.Selectors {
		out = append(out, &types.Selector{Type: s.Type, Value: s.Value})
	}
	return out
}

// entryRecord is immutable once it is in a registry.
type entryRecord struct {
	*types.Entry
	spiffeID, parentID spiffeid.ID
	// federateAll: the entry came with an agent token, or is kept (see Keep), and federates with every related trust domain.
	federateAll bool
}

func (e *entryRecord) expired(now time.Time) bool {
	return e.ExpiresAt != 0 && e.ExpiresAt <= now.Unix()
}

type entryValue struct {
	Entry       []byte `json:"entry"` // protobuf spire.api.types.Entry
	FederateAll bool   `json:"federate_all,omitempty"`
}

// registry is the agents and entries of a trust domain: a copy in memory of what the KV holds, written through.
type registry struct {
	kv KV
	td spiffeid.TrustDomain

	// Who holds one writes what it is for, over the KV too. Entries are written one after the other, since one must not be like another; of agents
	// those that share a lock by their ID's hash: many renew at a time, and a store that takes its time is waited for together.
	entryWrite turn
	agentWrite [64]turn

	mu       sync.RWMutex
	agents   map[string]*agentRecord      // guarded by mu, written under agentWrite
	entries  map[string]*entryRecord      // guarded by mu, written under entryWrite
	byParent map[string][]string          // guarded by mu: parent ID → entry IDs, sorted
	watchers map[string]map[*watcher]bool // guarded by mu; by parent ID
}

// watcher is woken when an entry below one of its parents changes.
type watcher struct {
	wake    chan struct{} // size 1
	parents []string
}

func newWatcher() *watcher { return &watcher{wake: make(chan struct{}, 1)} }

func (w *watcher) signal() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// watch has w woken for these parents from now on, and for no others.
func (r *registry) watch(w *watcher, parents []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, p := range w.parents {
		delete(r.watchers[p], w)
		if len(r.watchers[p]) == 0 {
			delete(r.watchers, p)
		}
	}
	w.parents = parents
	for _, p := range parents {
		if r.watchers[p] == nil {
			r.watchers[p] = map[*watcher]bool{}
		}
		r.watchers[p][w] = true
	}
}

// notify wakes those who watch a parent. The caller holds mu.
func (r *registry) notify(parent string) {
	for w := range r.watchers[parent] {
		w.signal()
	}
}

func newRegistry(kv KV, td spiffeid.TrustDomain) *registry {
	r := &registry{kv: kv, td: td, entryWrite: make(turn, 1), watchers: map[string]map[*watcher]bool{}}
	for i := range r.agentWrite {
		r.agentWrite[i] = make(turn, 1)
	}
	return r
}

// turn is a lock, of size 1, that is waited for no longer than a context.
type turn chan struct{}

func (t turn) take(ctx context.Context) error {
	select {
	case t <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (t turn) end() { <-t }

func (r *registry) agentTurn(id string) turn {
	h := fnv.New32a()
	_, _ = h.Write([]byte(id))
	return r.agentWrite[h.Sum32()%uint32(len(r.agentWrite))]
}

func (r *registry) load(ctx context.Context) error {
	for _, t := range append(r.agentWrite[:], r.entryWrite) {
		if err := t.take(ctx); err != nil {
			return err
		}
		defer t.end()
	}
	agentValues, err := r.kv.List(ctx, agentPrefix)
	if err != nil {
		return err
	}
	entryValues, err := r.kv.List(ctx, entryPrefix)
	if err != nil {
		return err
	}
	agents := map[string]*agentRecord{}
	for key, value := range agentValues {
		a := new(agentRecord)
		if err := json.Unmarshal(value, a); err != nil {
			return fmt.Errorf("decode %s: %w", key, err)
		}
		agents[a.ID] = a
	}
	entries := map[string]*entryRecord{}
	byParent := map[string][]string{}
	for key, value := range entryValues {
		e, err := decodeEntry(value)
		if err != nil {
			return fmt.Errorf("decode %s: %w", key, err)
		}
		entries[e.Id] = e
		byParent[e.parentID.String()] = append(byParent[e.parentID.String()], e.Id)
	}
	for _, ids := range byParent {
		slices.Sort(ids)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.agents, r.entries, r.byParent = agents, entries, byParent
	for parent := range r.watchers {
		r.notify(parent)
	}
	return nil
}

func decodeEntry(value []byte) (*entryRecord, error) {
	var v entryValue
	if err := json.Unmarshal(value, &v); err != nil {
		return nil, err
	}
	p := new(types.Entry)
	if err := proto.Unmarshal(v.Entry, p); err != nil {
		return nil, err
	}
	return newEntryRecord(p, v.FederateAll)
}

func (r *registry) counts() (agents, entries int) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return len(r.agents), len(r.entries)
}

func (r *registry) agent(id string) *agentRecord {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.agents[id]
}

func (r *registry) allAgents() []*agentRecord {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return slices.SortedFunc(maps.Values(r.agents), func(a, b *agentRecord) int { return strings.Compare(a.ID, b.ID) })
}

// tries is how often a record is written anew because another replica was faster.
const tries = 10

var (
	errNoAgent = errors.New("there is no such agent any more")
	errBusy    = errors.New("other replicas changed it meanwhile, again and again")
)

// updateAgent stores what f makes of a copy of the agent. Where another replica was faster, f decides again.
func (r *registry) updateAgent(ctx context.Context, id string, f func(next *agentRecord) error) (*agentRecord, error) {
	return r.writeAgent(ctx, id, false, f)
}

// putAgent is updateAgent, or makes a new agent.
func (r *registry) putAgent(ctx context.Context, id string, f func(next *agentRecord) error) (*agentRecord, error) {
	return r.writeAgent(ctx, id, true, f)
}

func (r *registry) writeAgent(ctx context.Context, id string, create bool, f func(next *agentRecord) error) (*agentRecord, error) {
	turn := r.agentTurn(id)
	if err := turn.take(ctx); err != nil {
		return nil, fmt.Errorf("write agent %s: %w", id, err)
	}
	defer turn.end()
	for range tries {
		was, err := r.kv.Get(ctx, agentPrefix+id)
		if err != nil {
			return nil, fmt.Errorf("read agent %s: %w", id, err)
		}
		next := &agentRecord{ID: id}
		switch {
		case was != nil:
			if err := json.Unmarshal(was, next); err != nil {
				return nil, fmt.Errorf("decode agent %s: %w", id, err)
			}
		case !create:
			return nil, fmt.Errorf("agent %s: %w", id, errNoAgent)
		}
		if err := f(next); err != nil {
			return nil, err
		}
		value, err := json.Marshal(next)
		if err != nil {
			return nil, err
		}
		ok, err := r.kv.CompareAndPut(ctx, agentPrefix+id, was, value)
		if err != nil {
			return nil, fmt.Errorf("store agent %s: %w", id, err)
		}
		if ok {
			r.applyAgent(id, next)
			return next, nil
		}
	}
	return nil, fmt.Errorf("store agent %s: %w", id, errBusy)
}

// applyAgent takes an agent into memory; nil: it is gone.
func (r *registry) applyAgent(id string, a *agentRecord) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if a == nil {
		delete(r.agents, id)
		return
	}
	r.agents[id] = a
}

// applyEntry takes an entry into memory; nil: it is gone.
func (r *registry) applyEntry(id string, e *entryRecord) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if was := r.entries[id]; was != nil {
		r.unlink(was)
		r.notify(was.parentID.String())
	}
	if e == nil {
		delete(r.entries, id)
		return
	}
	r.entries[id] = e
	parent := e.parentID.String()
	r.notify(parent)
	ids := append(slices.Clone(r.byParent[parent]), id)
	slices.Sort(ids)
	r.byParent[parent] = ids
}

// changed takes in what is stored under a key now.
func (r *registry) changed(key string, value []byte) error {
	if id, ok := strings.CutPrefix(key, agentPrefix); ok {
		if value == nil {
			r.applyAgent(id, nil)
			return nil
		}
		a := new(agentRecord)
		if err := json.Unmarshal(value, a); err != nil {
			return fmt.Errorf("decode %s: %w", key, err)
		}
		r.applyAgent(id, a)
	}
	if id, ok := strings.CutPrefix(key, entryPrefix); ok {
		if value == nil {
			r.applyEntry(id, nil)
			return nil
		}
		e, err := decodeEntry(value)
		if err != nil {
			return fmt.Errorf("decode %s: %w", key, err)
		}
		r.applyEntry(id, e)
	}
	return nil
}

// fetchAgent reads an agent that another replica may have attested or renewed a moment ago, and the entry that came with its token or pod. It is
// nil if there is none.
func (r *registry) fetchAgent(ctx context.Context, id spiffeid.ID) (*agentRecord, error) {
	keys := []string{agentPrefix + id.String()}
	if entry := grantedEntryID(id); r.entry(entry) == nil {
		keys = append(keys, entryPrefix+entry)
	}
	for _, key := range keys {
		value, err := r.kv.Get(ctx, key)
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", key, err)
		}
		if err := r.changed(key, value); err != nil {
			return nil, err
		}
	}
	return r.agent(id.String()), nil
}

func (r *registry) deleteAgent(ctx context.Context, id string) error {
	turn := r.agentTurn(id)
	if err := turn.take(ctx); err != nil {
		return fmt.Errorf("delete agent %s: %w", id, err)
	}
	defer turn.end()
	if err := r.kv.Delete(ctx, agentPrefix+id); err != nil {
		return fmt.Errorf("delete agent %s: %w", id, err)
	}
	r.applyAgent(id, nil)
	return nil
}

func (r *registry) entry(id string) *entryRecord {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.entries[id]
}

func (r *registry) allEntries() []*entryRecord {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return slices.SortedFunc(maps.Values(r.entries), func(a, b *entryRecord) int { return strings.Compare(a.Id, b.Id) })
}

// similar returns the entry with the same SPIFFE ID, parent and selectors.
func (r *registry) similar(e *entryRecord) *entryRecord {
	r.mu.RLock()
	defer r.mu.RUnlock()
	for _, id := range r.byParent[e.parentID.String()] {
		if x := r.entries[id]; x.spiffeID == e.spiffeID && sameSet(selectorStrings(x.Selectors), selectorStrings(e.Selectors)) {
			return x
		}
	}
	return nil
}

// putEntry stores what f decides on, given the present entry of that ID (nil if there is none). f may refuse. Where another replica was
// faster, f decides again.
func (r *registry) putEntry(ctx context.Context, id string, f func(cur *entryRecord) (*entryRecord, error)) (*entryRecord, error) {
	return r.putEntryIn(ctx, r.kv, id, f)
}

func (r *registry) putEntryIn(ctx context.Context, kv KV, id string, f func(cur *entryRecord) (*entryRecord, error)) (*entryRecord, error) {
	if err := r.entryWrite.take(ctx); err != nil {
		return nil, fmt.Errorf("write entry %s: %w", id, err)
	}
	defer r.entryWrite.end()
	for range tries {
		was, err := kv.Get(ctx, entryPrefix+id)
		if err != nil {
			return nil, fmt.Errorf("read entry %s: %w", id, err)
		}
		var cur *entryRecord
		if was != nil {
			if cur, err = decodeEntry(was); err != nil {
				return nil, fmt.Errorf("decode entry %s: %w", id, err)
			}
		}
		next, err := f(cur)
		if err != nil {
			return nil, err
		}
		p, err := proto.Marshal(next.Entry)
		if err != nil {
			return nil, err
		}
		value, err := json.Marshal(entryValue{Entry: p, FederateAll: next.federateAll})
		if err != nil {
			return nil, err
		}
		ok, err := kv.CompareAndPut(ctx, entryPrefix+id, was, value)
		if err != nil {
			return nil, fmt.Errorf("store entry %s: %w", id, err)
		}
		if ok {
			r.applyEntry(id, next)
			return next, nil
		}
	}
	return nil, fmt.Errorf("store entry %s: %w", id, errBusy)
}

func (r *registry) deleteEntry(ctx context.Context, id string) (bool, error) {
	return r.deleteEntryIn(ctx, r.kv, id)
}

func (r *registry) deleteEntryIn(ctx context.Context, kv KV, id string) (bool, error) {
	if err := r.entryWrite.take(ctx); err != nil {
		return false, fmt.Errorf("delete entry %s: %w", id, err)
	}
	defer r.entryWrite.end()
	cur, err := kv.Get(ctx, entryPrefix+id)
	if err != nil {
		return false, fmt.Errorf("read entry %s: %w", id, err)
	}
	if cur == nil {
		r.applyEntry(id, nil)
		return false, nil
	}
	if err := kv.Delete(ctx, entryPrefix+id); err != nil {
		return false, fmt.Errorf("delete entry %s: %w", id, err)
	}
	r.applyEntry(id, nil)
	return true, nil
}

// unlink takes e out of byParent. The caller holds mu.
func (r *registry) unlink(e *entryRecord) {
	if e == nil {
		return
	}
	parent := e.parentID.String()
	ids := slices.DeleteFunc(slices.Clone(r.byParent[parent]), func(id string) bool { return id == e.Id })
	if len(ids) == 0 {
		delete(r.byParent, parent)
		return
	}
	r.byParent[parent] = ids
}

// isAdmin reports whether an entry makes id an administrator.
func (r *registry) isAdmin(id spiffeid.ID, now time.Time) bool {
	r.mu.RLock()
	defer r.mu.RUnlock()
	for _, e := range r.entries {
		if e.Admin && e.spiffeID == id && !e.expired(now) {
			return true
		}
	}
	return false
}

// isDownstream reports whether an entry makes id a downstream server.
func (r *registry) isDownstream(id spiffeid.ID, now time.Time) bool {
	r.mu.RLock()
	defer r.mu.RUnlock()
	for _, e := range r.entries {
		if e.Downstream && e.spiffeID == id && !e.expired(now) {
			return true
		}
	}
	return false
}

// authorized returns the entries that an agent may have SVIDs of, sorted by ID: those below its own ID, below the
// aliases that its selectors give it (entries below the server's ID), and below those entries in turn.
func (r *registry) authorized(a *agentRecord, now time.Time) []*entryRecord {
	entries, _ := r.reach(a, now)
	return entries
}

// reach is authorized, and the parents below which a change of entries may change that.
func (r *registry) reach(a *agentRecord, now time.Time) ([]*entryRecord, []string) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	have := selectorStrings(a.selectors())
	parents := []string{a.ID}
	for _, id := range r.byParent[identity.SPIREServerID(r.td).String()] {
		if e := r.entries[id]; !e.expired(now) && subset(selectorStrings(e.Selectors), have) {
			parents = append(parents, e.spiffeID.String())
		}
	}
	visited := map[string]bool{}
	out := map[string]*entryRecord{}
	for len(parents) > 0 {
		parent := parents[0]
		parents = parents[1:]
		if visited[parent] {
			continue
		}
		visited[parent] = true
		for _, id := range r.byParent[parent] {
			e := r.entries[id]
			if e.expired(now) {
				continue
			}
			out[id] = e
			parents = append(parents, e.spiffeID.String())
		}
	}
	below := append(slices.Collect(maps.Keys(visited)), identity.SPIREServerID(r.td).String())
	return slices.SortedFunc(maps.Values(out), func(a, b *entryRecord) int { return strings.Compare(a.Id, b.Id) }), below
}

func selectorStrings(s []*types.Selector) []string {
	var out []string
	for _, x := range s {
		out = append(out, x.Type+":"+x.Value)
	}
	return out
}

func subset(part, whole []string) bool {
	for _, x := range part {
		if !slices.Contains(whole, x) {
			return false
		}
	}
	return true
}

func sameSet(a, b []string) bool { return subset(a, b) && subset(b, a) }
