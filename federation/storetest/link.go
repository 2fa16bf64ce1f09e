package storetest

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/hanse-mesh/hanse/federation/etcd"
)

// ErrCut is what calls over a cut Link return.
var ErrCut = errors.New("link is cut")

// Link is the way to a Store, and fails on demand.
type Link struct {
	store etcd.Store

	mu      sync.Mutex
	err     error
	hole    bool
	delay   time.Duration
	changed chan struct{} // closed when a fault is set or healed
}

// NewLink returns a healthy Link.
func NewLink(store etcd.Store) *Link { return &Link{store: store, changed: make(chan struct{})} }

func (l *Link) set(f func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	f()
	close(l.changed)
	l.changed = make(chan struct{})
}

// Cut makes all calls and open streams fail at once, as a connection reset does.
func (l *Link) Cut() { l.Refuse(ErrCut) }

// Refuse makes all calls and open streams fail with err.
func (l *Link) Refuse(err error) { l.set(func() { l.err = err }) }

// BlackHole makes all calls and open streams wait until their context ends or the Link heals.
func (l *Link) BlackHole() { l.set(func() { l.hole = true }) }

// Delay adds d to each call and each received response.
func (l *Link) Delay(d time.Duration) { l.set(func() { l.delay = d }) }

// Heal removes all faults.
func (l *Link) Heal() { l.set(func() { l.err, l.hole, l.delay = nil, false, 0 }) }

func (l *Link) faults() (hole bool, delay time.Duration, changed <-chan struct{}, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.hole, l.delay, l.changed, l.err
}

// pass waits as the faults demand.
func (l *Link) pass(ctx context.Context) error {
	for {
		hole, delay, changed, err := l.faults()
		if err != nil {
			return err
		}
		if !hole {
			if delay > 0 {
				t := time.NewTimer(delay)
				defer t.Stop()
				select {
				case <-t.C:
				case <-ctx.Done():
					return ctx.Err()
				}
			}
			return ctx.Err()
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Get implements etcd.Reader.
func (l *Link) Get(ctx context.Context, key string, revision int64) (*etcd.KeyValue, etcd.Header, error) {
	if err := l.pass(ctx); err != nil {
		return nil, etcd.Header{}, err
	}
	return l.store.Get(ctx, key, revision)
}

// List implements etcd.Reader.
func (l *Link) List(ctx context.Context, prefix string, revision int64, each func(etcd.KeyValue) error) (etcd.Header, error) {
	if err := l.pass(ctx); err != nil {
		return etcd.Header{}, err
	}
	return l.store.List(ctx, prefix, revision, each)
}

// Txn implements etcd.Store.
func (l *Link) Txn(ctx context.Context, compares []etcd.Compare, ops []etcd.Op) (bool, etcd.Header, error) {
	if err := l.pass(ctx); err != nil {
		return false, etcd.Header{}, err
	}
	return l.store.Txn(ctx, compares, ops)
}

// Watch implements etcd.Reader.
func (l *Link) Watch(ctx context.Context, prefix string, from int64) (etcd.Watcher, error) {
	if err := l.pass(ctx); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	w, err := l.store.Watch(ctx, prefix, from)
	if err != nil {
		cancel(err)
		return nil, err
	}
	go func() { // a cut breaks the stream also while Recv waits
		for {
			_, _, changed, err := l.faults()
			if err != nil {
				cancel(err)
				return
			}
			select {
			case <-changed:
			case <-ctx.Done():
				return
			}
		}
	}()
	return &linkWatcher{Watcher: w, l: l, ctx: ctx}, nil
}

// Close implements io.Closer, as a dialled peer does.
func (l *Link) Close() error { return nil }

type linkWatcher struct {
	etcd.Watcher
	l   *Link
	ctx context.Context
}

// Recv implements etcd.Watcher.
func (w *linkWatcher) Recv() (*etcd.WatchResponse, error) {
	r, err := w.Watcher.Recv()
	if err != nil {
		return nil, errors.Join(context.Cause(w.ctx), err)
	}
	if err := w.l.pass(w.ctx); err != nil {
		return nil, err
	}
	return r, nil
}

// RequestProgress implements etcd.Watcher.
func (w *linkWatcher) RequestProgress() error {
	if hole, _, _, _ := w.l.faults(); hole {
		return nil
	}
	return w.Watcher.RequestProgress()
}
