package etcd

import (
	"context"
	"fmt"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/hanse-mesh/hanse/federation"
	"github.com/hanse-mesh/hanse/federation/etcd/etcdpb"
)

// FollowImports calls f with all that is there of a peer, in parts, of which only the last is complete, and then with each change (which is
// complete, too), until ctx ends or the store fails. Whoever calls again begins anew: what is not named again until the first complete call is gone.
func FollowImports(ctx context.Context, store Store, peer string, f func(changes []federation.Change, complete bool)) error {
	prefix := ImportPrefix + peer + "/"
	revisions := map[string]int64{} // of the peer's etcd, by scope: its checkpoint comes before its data
	decode := func(changes []federation.Change, kv KeyValue, deleted bool) []federation.Change {
		scope, key, ok := splitImport(kv.Key[len(prefix):])
		switch {
		case !ok:
		case key != "":
			c := federation.Change{Scope: scope, Key: key, Revision: revisions[scope]}
			if !deleted {
				c.Value = present(kv.Value)
			}
			return append(changes, c)
		case !deleted:
			var cp etcdpb.Checkpoint
			if proto.Unmarshal(kv.Value, &cp) == nil { // else the Mirror lists anew, and writes another
				revisions[scope] = cp.Revision
			}
		}
		return changes
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	const part = 1000 // changes: what is there is not held as a whole
	changes := make([]federation.Change, 0, part)
	h, err := store.List(ctx, prefix, 0, func(kv KeyValue) error {
		if changes = decode(changes, kv, false); len(changes) == part {
			f(changes, false)
			changes = changes[:0]
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("read imports of %s: %w", peer, err)
	}
	f(changes, true)
	w, err := store.Watch(ctx, prefix, h.Revision+1)
	for err == nil {
		var r *WatchResponse
		if r, err = w.Recv(); err != nil {
			break
		}
		changes = changes[:0]
		for _, checkpoints := range []bool{true, false} { // the revision first, then what it is of
			for _, e := range r.Events {
				if strings.HasSuffix(e.Key, "/"+checkpointKey) == checkpoints {
					changes = decode(changes, e.KeyValue, e.Delete)
				}
			}
		}
		if len(changes) > 0 {
			f(changes, true)
		}
	}
	return fmt.Errorf("watch imports of %s: %w", peer, err)
}

// splitImport cuts "<scope>/data/<key>", or "<scope>/checkpoint", whose key is empty.
func splitImport(path string) (scope, key string, ok bool) {
	scope, rest, ok := splitScope(path)
	if !ok || rest == checkpointKey {
		return scope, "", ok
	}
	key, ok = strings.CutPrefix(rest, dataPart)
	return scope, key, ok && key != ""
}

// ImportedPeers lists the peers of which anything is there.
func ImportedPeers(ctx context.Context, store Store) ([]string, error) {
	var peers []string
	_, err := store.List(ctx, ImportPrefix, 0, func(kv KeyValue) error {
		peer, _, ok := strings.Cut(kv.Key[len(ImportPrefix):], "/")
		if ok && (len(peers) == 0 || peers[len(peers)-1] != peer) {
			peers = append(peers, peer)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list imports: %w", err)
	}
	return peers, nil
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
