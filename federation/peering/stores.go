package peering

import (
	"context"

	"github.com/hanse-mesh/hanse/federation/etcd"
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
