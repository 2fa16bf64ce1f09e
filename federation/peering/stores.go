package peering

import (
	"context"
	"fmt"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/hanse-mesh/hanse/federation"
	"github.com/hanse-mesh/hanse/federation/etcd"
	"github.com/hanse-mesh/hanse/federation/etcd/etcdpb"
)

// kv is the cluster's own store as tokens, the Book and small notes need it.
type kv struct{ etcd *etcd.KV }

// Get implements join.KV.
func (k kv) Get(ctx context.Context, key string) ([]byte, error) {
	value, _, err := k.etcd.Get(ctx, key)
	return value, err
}

// Put implements join.KV.
func (k kv) Put(ctx context.Context, key string, value []byte) error {
	_, err := k.etcd.Put(ctx, key, value)
	return err
}

// PutIfAbsent implements join.KV.
func (k kv) PutIfAbsent(ctx context.Context, key string, value []byte) (bool, error) {
	return k.etcd.PutIfAbsent(ctx, key, value)
}

// Delete implements join.KV.
func (k kv) Delete(ctx context.Context, key string) error { return k.etcd.Delete(ctx, key) }

// List implements join.KV.
func (k kv) List(ctx context.Context, prefix string) (map[string][]byte, error) {
	found, _, err := k.etcd.List(ctx, prefix)
	if err != nil {
		return nil, err
	}
	out := make(map[string][]byte, len(found))
	for _, kv := range found {
		out[kv.Key] = kv.Value
	}
	return out, nil
}

// imports reads what mirrors have written, and drops it.
type imports struct{ store etcd.Store }

func importPrefix(memberID string) string { return etcd.ImportPrefix + memberID + "/" }

// split cuts "<scope>/data/<key>" or "<scope>/checkpoint" of a member.
func split(path string) (scope, key string, checkpoint bool) {
	if scope, ok := strings.CutSuffix(path, "/checkpoint"); ok && !strings.Contains(scope, "/data/") {
		return scope, "", true
	}
	scope, key, _ = strings.Cut(path, "/data/")
	return scope, key, false
}

// follow calls f with everything that is there of a member (first is true, once), and then with each batch of changes, until ctx ends.
func (i imports) follow(ctx context.Context, memberID string, f func(first bool, changes []federation.Change)) error {
	prefix := importPrefix(memberID)
	revisions := map[string]int64{} // of the exporter, by scope
	var there []federation.Change
	take := func(kv etcd.KeyValue, deleted bool) (federation.Change, bool, error) {
		scope, key, checkpoint := split(kv.Key[len(prefix):])
		if !checkpoint {
			c := federation.Change{Scope: scope, Key: key}
			if !deleted {
				c.Value = nonNil(kv.Value)
			}
			return c, true, nil
		}
		cp := &etcdpb.Checkpoint{}
		if err := proto.Unmarshal(kv.Value, cp); err != nil {
			return federation.Change{}, false, fmt.Errorf("checkpoint of scope %s of member %.8s: %w", scope, memberID, err)
		}
		revisions[scope] = cp.Revision
		return federation.Change{}, false, nil
	}
	h, err := i.store.List(ctx, prefix, 0, func(kv etcd.KeyValue) error {
		c, isData, err := take(kv, false)
		if isData {
			there = append(there, c)
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("read imports of member %.8s: %w", memberID, err)
	}
	stamp := func(changes []federation.Change) {
		for n := range changes {
			changes[n].Revision = revisions[changes[n].Scope]
		}
	}
	stamp(there)
	f(true, there)
	there = nil

	w, err := i.store.Watch(ctx, prefix, h.Revision+1)
	if err != nil {
		return fmt.Errorf("watch imports of member %.8s: %w", memberID, err)
	}
	for {
		r, err := w.Recv()
		if err != nil {
			return fmt.Errorf("watch imports of member %.8s: %w", memberID, err)
		}
		var changes []federation.Change
		for _, e := range r.Events {
			if c, isData, err := take(e.KeyValue, e.Delete); err != nil {
				return err
			} else if isData {
				changes = append(changes, c)
			}
		}
		if len(changes) > 0 {
			stamp(changes)
			f(false, changes)
		}
	}
}

// nonNil tells an empty value from a deletion.
func nonNil(b []byte) []byte {
	if b == nil {
		return []byte{}
	}
	return b
}

// members lists the members of which anything is there.
func (i imports) members(ctx context.Context) ([]string, error) {
	seen := map[string]bool{}
	var out []string
	_, err := i.store.List(ctx, etcd.ImportPrefix, 0, func(kv etcd.KeyValue) error {
		if id, _, ok := strings.Cut(kv.Key[len(etcd.ImportPrefix):], "/"); ok && !seen[id] {
			seen[id] = true
			out = append(out, id)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list imports: %w", err)
	}
	return out, nil
}
