package storetest

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sort"
	"strings"
	"sync"

	"github.com/hanse-mesh/hanse/federation/etcd"
)

// version is one state of a key.
type version struct {
	kv      etcd.KeyValue
	deleted bool
}

// state is all that a Memory holds. Values and slices of versions are never changed in place.
type state struct {
	revision  int64
	compacted int64
	keys      map[string][]version // oldest first
	log       []etcd.Event         // by revision
}

// Memory is an etcd.Store in memory.
type Memory struct {
	clusterID uint64

	mu      sync.Mutex
	state   state
	changed chan struct{} // closed at the next change
	broken  chan struct{} // closed when streams break
	quota   int           // bytes; 0 is none
}

// NewMemory returns an empty Memory. Two of the same clusterID are what a wiped and recreated etcd looks like.
func NewMemory(clusterID uint64) *Memory {
	return &Memory{clusterID: clusterID, state: state{revision: 1, keys: map[string][]version{}}, changed: make(chan struct{}), broken: make(chan struct{})}
}

func (m *Memory) header() etcd.Header {
	return etcd.Header{ClusterID: m.clusterID, Revision: m.state.revision}
}

// at returns the version of a key at a revision, or nil.
func at(vs []version, revision int64) *etcd.KeyValue {
	i := sort.Search(len(vs), func(i int) bool { return vs[i].kv.ModRevision > revision })
	if i == 0 || vs[i-1].deleted {
		return nil
	}
	kv := vs[i-1].kv
	return &kv
}

// readable resolves revision 0 and refuses a compacted or future one.
func (m *Memory) readable(revision int64) (int64, error) {
	switch {
	case revision == 0:
		return m.state.revision, nil
	case revision < m.state.compacted:
		return 0, fmt.Errorf("%w up to %d", etcd.ErrCompacted, m.state.compacted)
	case revision > m.state.revision:
		return 0, fmt.Errorf("revision %d is in the future of %d", revision, m.state.revision)
	}
	return revision, nil
}

// Get implements etcd.Reader.
func (m *Memory) Get(ctx context.Context, key string, revision int64) (*etcd.KeyValue, etcd.Header, error) {
	if err := ctx.Err(); err != nil {
		return nil, etcd.Header{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	rev, err := m.readable(revision)
	if err != nil {
		return nil, etcd.Header{}, err
	}
	return at(m.state.keys[key], rev), m.header(), nil
}

// List implements etcd.Reader.
func (m *Memory) List(ctx context.Context, prefix string, revision int64, each func(etcd.KeyValue) error) (etcd.Header, error) {
	if err := ctx.Err(); err != nil {
		return etcd.Header{}, err
	}
	m.mu.Lock()
	rev, err := m.readable(revision)
	if err != nil {
		m.mu.Unlock()
		return etcd.Header{}, err
	}
	var all []etcd.KeyValue
	for k, vs := range m.state.keys {
		if strings.HasPrefix(k, prefix) {
			if kv := at(vs, rev); kv != nil {
				all = append(all, *kv)
			}
		}
	}
	m.mu.Unlock()
	slices.SortFunc(all, func(a, b etcd.KeyValue) int { return strings.Compare(a.Key, b.Key) })
	for _, kv := range all {
		if err := each(kv); err != nil {
			return etcd.Header{}, err
		}
	}
	return etcd.Header{ClusterID: m.clusterID, Revision: rev}, nil
}

// Txn implements etcd.Store.
func (m *Memory) Txn(ctx context.Context, compares []etcd.Compare, ops []etcd.Op) (bool, etcd.Header, error) {
	if err := ctx.Err(); err != nil {
		return false, etcd.Header{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := check(ops); err != nil {
		return false, etcd.Header{}, err
	}
	for _, c := range compares {
		var rev int64
		if kv := at(m.state.keys[c.Key], m.state.revision); kv != nil {
			if rev = kv.ModRevision; c.Created {
				rev = kv.CreateRevision
			}
		}
		if rev != c.Revision {
			return false, m.header(), nil
		}
	}
	if m.quota > 0 && m.size(ops) > m.quota {
		return false, etcd.Header{}, fmt.Errorf("memory store: %w", etcd.ErrNoSpace)
	}
	m.apply(ops)
	return true, m.header(), nil
}

func check(ops []etcd.Op) error {
	seen := map[string]bool{}
	for _, op := range ops {
		if op.Key == "" || seen[op.Key] {
			return fmt.Errorf("key %q is empty or twice in one Txn", op.Key)
		}
		seen[op.Key] = true
	}
	if len(ops) > etcd.MaxOps+8 {
		return fmt.Errorf("%d operations are too many for one Txn", len(ops))
	}
	return nil
}

func (m *Memory) size(ops []etcd.Op) int {
	n := 0
	for _, vs := range m.state.keys {
		if kv := at(vs, m.state.revision); kv != nil {
			n += len(kv.Key) + len(kv.Value)
		}
	}
	for _, op := range ops {
		if !op.Delete {
			n += len(op.Key) + len(op.Value)
		}
	}
	return n
}

func (m *Memory) apply(ops []etcd.Op) {
	rev, wrote := m.state.revision+1, false
	for _, op := range ops {
		vs := m.state.keys[op.Key]
		old := at(vs, m.state.revision)
		if op.Delete && old == nil {
			continue
		}
		kv := etcd.KeyValue{Key: op.Key, ModRevision: rev, CreateRevision: rev}
		if !op.Delete {
			kv.Value = slices.Clone(op.Value)
			if old != nil {
				kv.CreateRevision = old.CreateRevision
			}
		}
		m.state.keys[op.Key] = append(vs, version{kv, op.Delete})
		m.state.log = append(m.state.log, etcd.Event{KeyValue: kv, Delete: op.Delete})
		wrote = true
	}
	if wrote {
		m.state.revision = rev
		m.wake()
	}
}

func (m *Memory) wake() {
	close(m.changed)
	m.changed = make(chan struct{})
}

// Compact forgets the history before a revision. Watches that still need it end with ErrCompacted.
func (m *Memory) Compact(revision int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.state.compacted = revision
	m.state.log = slices.DeleteFunc(slices.Clone(m.state.log), func(e etcd.Event) bool { return e.ModRevision < revision })
	for k, vs := range m.state.keys {
		i := max(sort.Search(len(vs), func(i int) bool { return vs[i].kv.ModRevision > revision })-1, 0)
		if m.state.keys[k] = slices.Clone(vs[i:]); len(vs[i:]) == 1 && vs[i].deleted {
			delete(m.state.keys, k)
		}
	}
	m.wake()
}

// Backup is a state to Restore.
type Backup struct{ state state }

// Backup returns the present state.
func (m *Memory) Backup() Backup {
	m.mu.Lock()
	defer m.mu.Unlock()
	return Backup{m.state.clone()}
}

func (s state) clone() state {
	s.keys = maps.Clone(s.keys)
	for k, vs := range s.keys {
		s.keys[k] = slices.Clip(vs)
	}
	s.log = slices.Clip(s.log)
	return s
}

// Restore goes back to a Backup and breaks all streams, as a restart from it would.
func (m *Memory) Restore(b Backup) { m.replace(b.state.clone()) }

// Wipe empties the store, keeps its cluster ID, and breaks all streams.
func (m *Memory) Wipe() { m.replace(state{revision: 1, keys: map[string][]version{}}) }

func (m *Memory) replace(s state) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.state = s
	close(m.broken)
	m.broken = make(chan struct{})
}

// SetQuota makes Txns that would hold more than these bytes fail with ErrNoSpace; 0 is no quota.
func (m *Memory) SetQuota(bytes int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.quota = bytes
}

// Dump returns all keys below prefix, for comparing whole key spaces.
func (m *Memory) Dump(prefix string) map[string]string {
	out := map[string]string{}
	_, _ = m.List(context.Background(), prefix, 0, func(kv etcd.KeyValue) error {
		out[kv.Key] = string(kv.Value)
		return nil
	})
	return out
}

// Watch implements etcd.Reader.
func (m *Memory) Watch(ctx context.Context, prefix string, from int64) (etcd.Watcher, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if from == 0 {
		from = m.state.revision + 1
	}
	return &watcher{m: m, ctx: ctx, prefix: prefix, next: from, broken: m.broken, progress: make(chan struct{}, 1)}, nil
}

type watcher struct {
	m        *Memory
	ctx      context.Context
	prefix   string
	next     int64 // owned by Recv: the first revision not yet looked at
	broken   chan struct{}
	progress chan struct{}
}

// Recv implements etcd.Watcher.
func (w *watcher) Recv() (*etcd.WatchResponse, error) {
	asked := false
	for {
		r, changed, err := w.collect()
		if err != nil || len(r.Events) > 0 || asked {
			return r, err
		}
		select {
		case <-changed:
		case <-w.progress:
			asked = true
		case <-w.broken:
			return nil, fmt.Errorf("watch %s: the stream broke", w.prefix)
		case <-w.ctx.Done():
			return nil, w.ctx.Err()
		}
	}
}

func (w *watcher) collect() (*etcd.WatchResponse, <-chan struct{}, error) {
	w.m.mu.Lock()
	defer w.m.mu.Unlock()
	s := &w.m.state
	select {
	case <-w.broken:
		return nil, nil, fmt.Errorf("watch %s: the stream broke", w.prefix)
	default:
	}
	if w.next < s.compacted {
		return nil, nil, fmt.Errorf("%w up to %d", etcd.ErrCompacted, s.compacted)
	}
	r := &etcd.WatchResponse{Header: w.m.header()}
	i := sort.Search(len(s.log), func(i int) bool { return s.log[i].ModRevision >= w.next })
	for _, e := range s.log[i:] {
		if strings.HasPrefix(e.Key, w.prefix) {
			r.Events = append(r.Events, e)
		}
	}
	w.next = max(w.next, s.revision+1)
	return r, w.m.changed, nil
}

// RequestProgress implements etcd.Watcher.
func (w *watcher) RequestProgress() error {
	select {
	case w.progress <- struct{}{}:
	default:
	}
	return nil
}
