package etcd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/hanse-mesh/hanse/federation/etcd/etcdpb"
)

// ImportsConfig says where imports are read.
type ImportsConfig struct {
	Store  Store
	Prefix string // "" is ImportPrefix
	Log    *slog.Logger
}

// Change is one imported key that was written, or deleted (Value is nil). Revision is the peer's, at or after the change.
type Change struct {
	Peer     string
	Scope    string
	Key      string
	Value    []byte
	Revision int64
}

// ImportsReader follows all imports and hands on what has changed. It keeps no values.
type ImportsReader struct {
	cfg     ImportsConfig
	updated chan struct{}

	mu      sync.Mutex
	listed  bool
	pending map[string]Change // by full key

	// owned by Run
	seen      map[string]int64 // ModRevision by full key
	revisions map[string]int64 // of the peer, by "<peer>/<scope>/"
}

// NewImportsReader returns an ImportsReader.
func NewImportsReader(cfg ImportsConfig) *ImportsReader {
	if cfg.Prefix == "" {
		cfg.Prefix = ImportPrefix
	}
	cfg.Log = orDiscard(cfg.Log)
	return &ImportsReader{cfg: cfg, updated: make(chan struct{}, 1), pending: map[string]Change{}, seen: map[string]int64{}, revisions: map[string]int64{}}
}

// Updated receives when there are Changes.
func (r *ImportsReader) Updated() <-chan struct{} { return r.updated }

// Changes returns what has changed since the call before, each key once and in no order; at first, everything. listed is false
// until everything that is stored has been seen.
func (r *ImportsReader) Changes() (changes []Change, listed bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	changes = make([]Change, 0, len(r.pending))
	for _, c := range r.pending {
		changes = append(changes, c)
	}
	r.pending = map[string]Change{}
	return changes, r.listed
}

// Snapshot reads all imports, by peer, scope and key, and the revision of the store that they are read at.
func (r *ImportsReader) Snapshot(ctx context.Context) (map[string]map[string]map[string][]byte, int64, error) {
	out := map[string]map[string]map[string][]byte{}
	h, err := r.cfg.Store.List(ctx, r.cfg.Prefix, 0, func(kv KeyValue) error {
		l, ok := r.locate(kv.Key)
		if !ok || l.key == "" {
			return nil
		}
		if out[l.peer] == nil {
			out[l.peer] = map[string]map[string][]byte{}
		}
		if out[l.peer][l.scope] == nil {
			out[l.peer][l.scope] = map[string][]byte{}
		}
		out[l.peer][l.scope][l.key] = kv.Value
		return nil
	})
	if err != nil {
		return nil, 0, fmt.Errorf("read imports: %w", err)
	}
	return out, h.Revision, nil
}

// location is a key of the imports; key is empty for a checkpoint.
type location struct{ peer, scope, key string }

func (r *ImportsReader) locate(full string) (l location, ok bool) {
	var rest string
	if l.peer, rest, ok = strings.Cut(full[len(r.cfg.Prefix):], "/"); !ok {
		return l, false
	}
	if l.scope, rest, ok = splitScope(rest); !ok {
		return l, false
	}
	if rest == checkpointKey {
		return l, true
	}
	l.key, ok = strings.CutPrefix(rest, dataPart)
	return l, ok && l.key != ""
}

// Run follows the imports until ctx ends.
func (r *ImportsReader) Run(ctx context.Context) error {
	const minWait, maxWait = 100 * time.Millisecond, 5 * time.Second
	wait := minWait
	for {
		rev, err := r.list(ctx)
		if err == nil {
			wait = minWait
			err = r.watch(ctx, rev)
		}
		if ctx.Err() != nil {
			return nil
		}
		if !errors.Is(err, ErrCompacted) {
			r.cfg.Log.Warn("imports are read again", "error", err)
		}
		if !sleep(ctx, wait) {
			return nil
		}
		wait = min(wait*2, maxWait)
	}
}

// list compares all keys with those seen.
func (r *ImportsReader) list(ctx context.Context) (int64, error) {
	now := make(map[string]int64, len(r.seen))
	h, err := r.cfg.Store.List(ctx, r.cfg.Prefix, 0, func(kv KeyValue) error {
		now[kv.Key] = kv.ModRevision
		if r.seen[kv.Key] != kv.ModRevision {
			r.apply(Event{KeyValue: kv})
		}
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("list imports: %w", err)
	}
	for key := range r.seen {
		if _, ok := now[key]; !ok {
			r.apply(Event{KeyValue: KeyValue{Key: key}, Delete: true})
		}
	}
	r.seen = now
	r.mu.Lock()
	r.listed = true
	r.mu.Unlock()
	wake(r.updated)
	return h.Revision, nil
}

func (r *ImportsReader) watch(ctx context.Context, rev int64) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	w, err := r.cfg.Store.Watch(ctx, r.cfg.Prefix, rev+1)
	if err != nil {
		return fmt.Errorf("watch imports: %w", err)
	}
	for {
		resp, err := w.Recv()
		if err != nil {
			return fmt.Errorf("watch imports: %w", err)
		}
		for _, checkpoints := range []bool{true, false} { // the revision first, then what it is of
			for _, e := range resp.Events {
				if strings.HasSuffix(e.Key, "/"+checkpointKey) != checkpoints {
					continue
				}
				if e.Delete {
					delete(r.seen, e.Key)
				} else {
					r.seen[e.Key] = e.ModRevision
				}
				r.apply(e)
			}
		}
		if len(resp.Events) > 0 {
			wake(r.updated)
		}
	}
}

// apply notes one change.
func (r *ImportsReader) apply(e Event) {
	l, ok := r.locate(e.Key)
	if !ok {
		return
	}
	at := l.peer + "/" + l.scope + "/"
	if l.key == "" {
		var cp etcdpb.Checkpoint
		switch {
		case e.Delete:
			delete(r.revisions, at)
		case proto.Unmarshal(e.Value, &cp) == nil:
			r.revisions[at] = cp.Revision
		}
		return
	}
	c := Change{Peer: l.peer, Scope: l.scope, Key: l.key, Revision: r.revisions[at]}
	if !e.Delete {
		if c.Value = e.Value; c.Value == nil {
			c.Value = []byte{}
		}
	}
	r.mu.Lock()
	r.pending[e.Key] = c
	r.mu.Unlock()
}

// RemoveImports deletes all imports of a peer that has left. Its Mirror must have ended.
func RemoveImports(ctx context.Context, store Store, peer string) error {
	return DeletePrefix(ctx, store, ImportPrefix+peer+"/")
}

// DeletePrefix deletes all keys that begin with prefix.
func DeletePrefix(ctx context.Context, store Store, prefix string) error {
	var ops []Op
	_, err := store.List(ctx, prefix, 0, func(kv KeyValue) error {
		ops = append(ops, Op{Key: kv.Key, Delete: true})
		return nil
	})
	for len(ops) > 0 && err == nil {
		n := min(len(ops), MaxOps)
		_, _, err = store.Txn(ctx, nil, ops[:n])
		ops = ops[n:]
	}
	if err != nil {
		return fmt.Errorf("delete %s: %w", prefix, err)
	}
	return nil
}
