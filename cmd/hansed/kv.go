package main

import (
	"bytes"
	"context"

	"github.com/hanse-mesh/hanse/federation/etcd"
)

// recordsPath is where agents and entries are.
const recordsPath = "identity/records/"

// records is a part of the own etcd in the shape that attest.Store, spireapi.KV, drill.Store and the catalog want: keys without
// the prefix, values compared by content.
type records struct{ kv *etcd.KV }

func recordsOf(store etcd.Store, prefix string) records { return records{etcd.NewKV(store, prefix)} }

// Get returns the value of key, nil if there is none.
func (r records) Get(ctx context.Context, key string) ([]byte, error) {
	v, _, err := r.kv.Get(ctx, key)
	return v, err
}

// CompareAndPut stores value under key and returns true if its value still is old; nil: if there is none.
func (r records) CompareAndPut(ctx context.Context, key string, old, value []byte) (bool, error) {
	now, rev, err := r.kv.Get(ctx, key)
	if err != nil || (rev != 0) != (old != nil) || !bytes.Equal(now, old) {
		return false, err
	}
	ok, _, err := r.kv.CompareAndPut(ctx, key, value, rev)
	return ok, err
}

// Put stores value under key.
func (r records) Put(ctx context.Context, key string, value []byte) error {
	_, err := r.kv.Put(ctx, key, value)
	return err
}

// PutIfAbsent stores value and returns true, unless key is there already.
func (r records) PutIfAbsent(ctx context.Context, key string, value []byte) (bool, error) {
	return r.kv.PutIfAbsent(ctx, key, value)
}

// CompareAndDelete removes key and returns true if its value is still value.
func (r records) CompareAndDelete(ctx context.Context, key string, value []byte) (bool, error) {
	now, rev, err := r.kv.Get(ctx, key)
	if err != nil || rev == 0 || !bytes.Equal(now, value) {
		return false, err
	}
	return r.kv.CompareAndDelete(ctx, key, rev)
}

// Delete removes key, if it is there.
func (r records) Delete(ctx context.Context, key string) error { return r.kv.Delete(ctx, key) }

// List returns all keys that begin with prefix, and their values.
func (r records) List(ctx context.Context, prefix string) (map[string][]byte, error) {
	found, _, err := r.kv.List(ctx, prefix)
	if err != nil {
		return nil, err
	}
	out := make(map[string][]byte, len(found))
	for _, kv := range found {
		out[kv.Key] = kv.Value
	}
	return out, nil
}
