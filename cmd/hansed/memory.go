package main

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/discovery/objects"
	"github.com/hanse-mesh/hanse/federation/etcd"
	"github.com/hanse-mesh/hanse/identity/atomicfile"
)

// memory keeps what the catalog must remember between Snapshots and over restarts: IDs of endpoints, and when objects were first seen.
type memory interface {
	load(ctx context.Context) (*objects.State, error)
	// reload reads again what others may have written.
	reload(ctx context.Context) error
	// refresh returns state with what others have remembered meanwhile.
	refresh(state *objects.State) *objects.State
	// save stores what is new in state.
	save(ctx context.Context, state *objects.State) error
	newID() func(discovery.Name, string) string // nil: random
}

// fileMemory is that of a hansed without replicas: a seed, from which endpoint IDs are made as replicas make them, and times. What it writes
// does not grow with the endpoints, of which there may be a million.
type fileMemory struct {
	path string

	seed    []byte                       // read-only after load
	old     map[string]map[string]string // read-only after load: IDs by service and key that were made before there was a seed; kept for ever
	created map[objects.Key]time.Time    // as saved; nil if nothing is
}

// memoryFile is the JSON form of a fileMemory. Version 1 had all endpoint IDs, and no seed.
type memoryFile struct {
	Version   int                          `json:"version"`
	Seed      []byte                       `json:"seed,omitempty"`
	Created   map[string]time.Time         `json:"created,omitempty"` // by Kind/namespace/name
	Endpoints map[string]map[string]string `json:"endpoints,omitempty"`
}

const memoryVersion = 2

func (m *fileMemory) load(context.Context) (*objects.State, error) {
	b, err := os.ReadFile(m.path)
	if errors.Is(err, fs.ErrNotExist) {
		m.seed = newSeed()
		return &objects.State{}, nil
	}
	var f memoryFile
	if err == nil {
		err = json.Unmarshal(b, &f)
	}
	if err == nil {
		err = m.take(&f)
	}
	if err != nil {
		return nil, fmt.Errorf("read endpoint IDs from %s: %w (restore the file, or remove it to give all endpoints new IDs)", m.path, err)
	}
	state := (&objects.State{}).WithCreated(m.created)
	if f.Version != memoryVersion {
		m.created = nil
	}
	return state, nil
}

func newSeed() []byte {
	seed := make([]byte, 32)
	rand.Read(seed)
	return seed
}

func (m *fileMemory) take(f *memoryFile) error {
	switch {
	case f.Version == 1 && f.Seed == nil:
		m.seed = newSeed()
	case f.Version != memoryVersion:
		return fmt.Errorf("version %d is not %d", f.Version, memoryVersion)
	case len(f.Seed) != 32:
		return fmt.Errorf("a seed of %d bytes, want 32", len(f.Seed))
	default:
		m.seed = f.Seed
	}
	m.old, m.created = f.Endpoints, map[objects.Key]time.Time{}
	for k, t := range f.Created {
		part := strings.Split(k, "/")
		if len(part) != 3 {
			return fmt.Errorf("key %q is not Kind/namespace/name", k)
		}
		m.created[objects.Key{Kind: part[0], Namespace: part[1], Name: part[2]}] = t
	}
	for service, ids := range f.Endpoints {
		for key, id := range ids {
			if raw, err := hex.DecodeString(id); err != nil || len(raw) != 16 {
				return fmt.Errorf("endpoint %s of %s has ID %q, not 32 hex digits", key, service, id)
			}
		}
	}
	return nil
}

func (m *fileMemory) reload(context.Context) error                { return nil }
func (m *fileMemory) refresh(state *objects.State) *objects.State { return state }

func (m *fileMemory) newID() func(discovery.Name, string) string {
	return func(service discovery.Name, key string) string {
		if id, ok := m.old[service.String()][key]; ok {
			return id
		}
		return idFrom(m.seed, service, key)
	}
}

func (m *fileMemory) save(_ context.Context, state *objects.State) error {
	if m.created != nil && maps.EqualFunc(m.created, state.Created(), time.Time.Equal) {
		return nil
	}
	f := memoryFile{Version: memoryVersion, Seed: m.seed, Created: map[string]time.Time{}, Endpoints: m.old}
	for k, t := range state.Created() {
		f.Created[k.Kind+"/"+k.Namespace+"/"+k.Name] = t
	}
	b, err := json.Marshal(f)
	if err == nil {
		err = atomicfile.Write(m.path, b)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", m.path, err)
	}
	m.created = maps.Clone(state.Created())
	if m.created == nil {
		m.created = map[objects.Key]time.Time{}
	}
	return nil
}

// idFrom makes an endpoint's ID: nobody tells it from random without the seed.
func idFrom(seed []byte, service discovery.Name, key string) string {
	h := hmac.New(sha256.New, seed)
	h.Write([]byte(service.String() + "\x00" + key))
	return hex.EncodeToString(h.Sum(nil)[:16])
}

const (
	seedKey     = "catalog/seed"
	createdPath = "catalog/created/" // then Kind/namespace/name
)

// sharedMemory is that of replicas: all make the same endpoint IDs, from a random seed that they share, so that it does not matter which
// of them leads or serves. Times are written by the leader; the others use theirs until they see those.
type sharedMemory struct {
	store etcd.Store  // reads are anyone's
	write etcd.Store  // writes are the leader's
	leads func() bool // now
	wake  func()
	log   *slog.Logger

	mu      sync.Mutex
	seed    []byte                    // guarded by mu
	created map[objects.Key]time.Time // guarded by mu; as stored
}

func (m *sharedMemory) load(ctx context.Context) (*objects.State, error) {
	kv := etcd.NewKV(m.store, "")
	if _, err := kv.PutIfAbsent(ctx, seedKey, newSeed()); err != nil {
		return nil, fmt.Errorf("seed of endpoint IDs: %w", err)
	}
	seed, _, err := kv.Get(ctx, seedKey)
	if err != nil {
		return nil, fmt.Errorf("seed of endpoint IDs: %w", err)
	}
	m.mu.Lock()
	m.seed = seed
	m.mu.Unlock()
	if err := m.reload(ctx); err != nil {
		return nil, err
	}
	return m.refresh(&objects.State{}), nil
}

func (m *sharedMemory) newID() func(discovery.Name, string) string {
	m.mu.Lock()
	seed := m.seed
	m.mu.Unlock()
	return func(service discovery.Name, key string) string { return idFrom(seed, service, key) }
}

func (m *sharedMemory) reload(ctx context.Context) error {
	all, _, err := etcd.NewKV(m.store, createdPath).List(ctx, "")
	if err != nil {
		return fmt.Errorf("read export times: %w", err)
	}
	m.take(all)
	return nil
}

func (m *sharedMemory) take(all []etcd.KeyValue) {
	next := make(map[objects.Key]time.Time, len(all))
	for _, kv := range all {
		part := strings.Split(kv.Key, "/")
		t, err := time.Parse(time.RFC3339, string(kv.Value))
		if len(part) != 3 || err != nil {
			m.log.Error("a stored export time is left out", "key", kv.Key, "err", err)
			continue
		}
		next[objects.Key{Kind: part[0], Namespace: part[1], Name: part[2]}] = t
	}
	m.mu.Lock()
	m.created = next
	m.mu.Unlock()
}

// follow takes in what the leader writes, until ctx ends.
func (m *sharedMemory) follow(ctx context.Context) error {
	for ctx.Err() == nil {
		err := etcd.NewKV(m.store, createdPath).Watch(ctx, "", func(all []etcd.KeyValue, _ int64) error {
			m.take(all)
			m.wake()
			return nil
		})
		if ctx.Err() == nil {
			etcd.Again(ctx, m.log, "export times are read again", err)
			pause(ctx, time.Second)
		}
	}
	return nil
}

func (m *sharedMemory) refresh(state *objects.State) *objects.State {
	m.mu.Lock()
	defer m.mu.Unlock()
	return state.WithCreated(m.created)
}

func (m *sharedMemory) save(ctx context.Context, state *objects.State) error {
	if !m.leads() {
		return nil
	}
	m.mu.Lock()
	known := m.created
	m.mu.Unlock()
	var ops []etcd.Op
	for k, t := range state.Created() {
		if _, ok := known[k]; !ok {
			ops = append(ops, etcd.Op{Key: createdKey(k), Value: []byte(t.UTC().Format(time.RFC3339))})
		}
	}
	for k := range known {
		if _, ok := state.Created()[k]; !ok {
			ops = append(ops, etcd.Op{Key: createdKey(k), Delete: true})
		}
	}
	for part := range slices.Chunk(ops, etcd.MaxOps) {
		if _, _, err := m.write.Txn(ctx, nil, part); err != nil {
			return fmt.Errorf("store export times: %w", err)
		}
	}
	if len(ops) > 0 {
		return m.reload(ctx)
	}
	return nil
}

// pause waits about d, or until ctx ends.
func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
