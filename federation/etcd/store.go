package etcd

import (
	"context"
	"errors"
	"fmt"
)

// What a Store refuses, for callers to branch on.
var (
	ErrCompacted        = errors.New("revision has been compacted")
	ErrPermissionDenied = errors.New("permission denied")
	ErrNoSpace          = errors.New("no space: the store's quota is used up")
	ErrNotLeader        = errors.New("not the leader any more")
	ErrAway             = errors.New("etcd is away") // an external one; External has logged it
)

// Limits of one Txn (etcd's own defaults, less what the Store adds itself: a checkpoint and a fence).
const (
	MaxOps   = 127           // data operations of one Txn
	MaxBytes = 1 << 18       // of keys and values of one Txn that are batched together; etcd keeps about 30 Txns in memory
	MaxValue = 1<<20 + 1<<18 // bytes of one value
	overhead = 64            // of one operation, estimated
	maxKey   = 4096          // bytes of a key
	pageSize = int64(1000)   // keys of a page where RangeStream is missing
)

// KeyValue is one key at some revision. Its Value must not be changed.
type KeyValue struct {
	Key            string
	Value          []byte
	CreateRevision int64
	ModRevision    int64
}

// Header says which etcd cluster answered, and at which revision.
type Header struct {
	ClusterID uint64
	Revision  int64
}

// Op writes Value to Key, or deletes Key.
type Op struct {
	Key    string
	Value  []byte
	Delete bool
}

// Compare holds if Key has this ModRevision (or, if Created, CreateRevision). Revision 0 is an absent key.
type Compare struct {
	Key      string
	Created  bool
	Revision int64
}

// Event is one change of one key. Delete events have no Value.
type Event struct {
	KeyValue
	Delete bool
}

// WatchResponse is some events in order of revision, or, without events, the news that everything up to Header.Revision was delivered.
// More is true if events of the last revision are still to come.
type WatchResponse struct {
	Header Header
	Events []Event
	More   bool
}

// Watcher is one stream of events. Recv blocks; it returns ErrCompacted, ErrPermissionDenied or what broke the stream. One
// goroutine may Recv while others call RequestProgress. The stream ends with its context.
type Watcher interface {
	Recv() (*WatchResponse, error)
	RequestProgress() error
}

// Reader is what can be read of an etcd: one's own, or a peer's through its Guard.
type Reader interface {
	// Get returns the key at a revision (0: the latest, linearizable). It is nil if absent.
	Get(ctx context.Context, key string, revision int64) (*KeyValue, Header, error)
	// List calls each for every key that begins with prefix, in order, all at one revision (0: the latest), which the Header names.
	List(ctx context.Context, prefix string, revision int64, each func(KeyValue) error) (Header, error)
	// Watch returns the events from a revision on (0: from now) of keys that begin with prefix.
	Watch(ctx context.Context, prefix string, from int64) (Watcher, error)
}

// Store is what Exporter, Mirror, FollowImports and KV need of one's own etcd. storetest has its contract.
type Store interface {
	Reader
	// Txn applies all ops if all compares hold, else none. No key may occur twice in ops. After an error the outcome is unknown,
	// except for ErrNoSpace and ErrNotLeader: nothing was written.
	Txn(ctx context.Context, compares []Compare, ops []Op) (ok bool, h Header, err error)
}

// firstKey is the first key that begins with prefix; etcd has no empty key.
func firstKey(prefix string) []byte {
	if prefix == "" {
		return []byte{0}
	}
	return []byte(prefix)
}

// prefixEnd is the first key after all that begin with prefix.
func prefixEnd(prefix string) []byte {
	b := []byte(prefix)
	for i := len(b) - 1; i >= 0; i-- {
		if b[i] < 0xff {
			b[i]++
			return b[:i+1]
		}
	}
	return []byte{0}
}

// KV keeps small things (identity entries, tokens, configuration, drills) under one prefix of a Store. Keys are given and returned
// without it.
type KV struct {
	store  Store
	prefix string
}

// NewKV returns the keys of store that begin with prefix, which ends in a slash or is empty.
func NewKV(store Store, prefix string) *KV { return &KV{store: store, prefix: prefix} }

// Get returns the value of key and its ModRevision, or nil and 0.
func (kv *KV) Get(ctx context.Context, key string) ([]byte, int64, error) {
	got, _, err := kv.store.Get(ctx, kv.prefix+key, 0)
	if err != nil {
		return nil, 0, fmt.Errorf("read %s%s: %w", kv.prefix, key, err)
	}
	if got == nil {
		return nil, 0, nil
	}
	return got.Value, got.ModRevision, nil
}

func (kv *KV) txn(ctx context.Context, verb, key string, compares []Compare, op Op) (bool, int64, error) {
	ok, h, err := kv.store.Txn(ctx, compares, []Op{op})
	if err != nil {
		return false, 0, fmt.Errorf("%s %s%s: %w", verb, kv.prefix, key, err)
	}
	return ok, h.Revision, nil
}

// Put writes key and returns the new ModRevision.
func (kv *KV) Put(ctx context.Context, key string, value []byte) (int64, error) {
	_, rev, err := kv.txn(ctx, "write", key, nil, Op{Key: kv.prefix + key, Value: value})
	return rev, err
}

// PutIfAbsent writes key unless it exists; ok is false if it did.
func (kv *KV) PutIfAbsent(ctx context.Context, key string, value []byte) (ok bool, err error) {
	ok, _, err = kv.CompareAndPut(ctx, key, value, 0)
	return ok, err
}

// CompareAndPut writes key if its ModRevision still is revision (0: absent).
func (kv *KV) CompareAndPut(ctx context.Context, key string, value []byte, revision int64) (ok bool, rev int64, err error) {
	k := kv.prefix + key
	return kv.txn(ctx, "write", key, []Compare{{Key: k, Revision: revision}}, Op{Key: k, Value: value})
}

// CompareAndDelete deletes key if its ModRevision still is revision.
func (kv *KV) CompareAndDelete(ctx context.Context, key string, revision int64) (ok bool, err error) {
	k := kv.prefix + key
	ok, _, err = kv.txn(ctx, "delete", key, []Compare{{Key: k, Revision: revision}}, Op{Key: k, Delete: true})
	return ok, err
}

// Delete deletes key; an absent one is no error.
func (kv *KV) Delete(ctx context.Context, key string) error {
	_, _, err := kv.txn(ctx, "delete", key, nil, Op{Key: kv.prefix + key, Delete: true})
	return err
}

// List returns everything under prefix, sorted by key, and the revision that it was read at.
func (kv *KV) List(ctx context.Context, prefix string) ([]KeyValue, int64, error) {
	var all []KeyValue
	h, err := kv.store.List(ctx, kv.prefix+prefix, 0, func(e KeyValue) error {
		e.Key = e.Key[len(kv.prefix):]
		all = append(all, e)
		return nil
	})
	if err != nil {
		return nil, 0, fmt.Errorf("list %s%s: %w", kv.prefix, prefix, err)
	}
	return all, h.Revision, nil
}

// Watch calls changed with what is under prefix, now and after each change, until ctx ends or the stream breaks; it then returns why.
// A burst of changes may be one call. Callers that outlive a broken stream call it again.
func (kv *KV) Watch(ctx context.Context, prefix string, changed func([]KeyValue, int64) error) error {
	for {
		all, rev, err := kv.List(ctx, prefix)
		if err != nil {
			return err
		}
		if err := changed(all, rev); err != nil {
			return err
		}
		if err := kv.wait(ctx, prefix, rev); err != nil && !errors.Is(err, ErrCompacted) {
			return fmt.Errorf("watch %s%s: %w", kv.prefix, prefix, err)
		}
	}
}

// wait returns after a change beyond rev.
func (kv *KV) wait(ctx context.Context, prefix string, rev int64) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	w, err := kv.store.Watch(ctx, kv.prefix+prefix, rev+1)
	if err != nil {
		return err
	}
	for {
		r, err := w.Recv()
		if err != nil {
			return err
		}
		if len(r.Events) > 0 {
			return nil
		}
	}
}
