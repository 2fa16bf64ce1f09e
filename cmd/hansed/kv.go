package main

import (
	"context"
	"strings"
)

// kv is what hansed keeps in its own etcd. Values are small; a missing key is a nil value.
type kv interface {
	Get(ctx context.Context, key string) ([]byte, error)
	Put(ctx context.Context, key string, value []byte) error
	PutIfAbsent(ctx context.Context, key string, value []byte) (bool, error)
	CompareAndDelete(ctx context.Context, key string, value []byte) (bool, error)
	Delete(ctx context.Context, key string) error
	List(ctx context.Context, prefix string) (map[string][]byte, error)
}

// below is a kv under a prefix: its users name keys without it.
type below struct {
	kv     kv
	prefix string
}

func (b below) Get(ctx context.Context, key string) ([]byte, error) {
	return b.kv.Get(ctx, b.prefix+key)
}

func (b below) Put(ctx context.Context, key string, value []byte) error {
	return b.kv.Put(ctx, b.prefix+key, value)
}

func (b below) PutIfAbsent(ctx context.Context, key string, value []byte) (bool, error) {
	return b.kv.PutIfAbsent(ctx, b.prefix+key, value)
}

func (b below) CompareAndDelete(ctx context.Context, key string, value []byte) (bool, error) {
	return b.kv.CompareAndDelete(ctx, b.prefix+key, value)
}

func (b below) Delete(ctx context.Context, key string) error {
	return b.kv.Delete(ctx, b.prefix+key)
}

func (b below) List(ctx context.Context, prefix string) (map[string][]byte, error) {
	found, err := b.kv.List(ctx, b.prefix+prefix)
	if err != nil {
		return nil, err
	}
	out := make(map[string][]byte, len(found))
	for k, v := range found {
		out[strings.TrimPrefix(k, b.prefix)] = v
	}
	return out, nil
}
