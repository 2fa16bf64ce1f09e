package etcd

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"sync"
	"time"
)

// ErrRestored is what an External's Store says to everybody once its etcd is found to be another one than it was, or restored from a backup: what
// was read before is of a history that has ended, and whoever goes on begins anew.
var ErrRestored = errors.New("etcd was restored from a backup, or is another one")

// historyKey has a random value. Whoever finds that etcd was restored writes another one, so that the others find it, too, although etcd's revision
// may have passed the last one that they saw.
const historyKey = "history"

// History is what is known of an etcd's past: enough to tell a restored one.
type History struct {
	ClusterID uint64 `json:"cluster"`
	Revision  int64  `json:"revision"` // the highest seen
	Value     string `json:"value"`    // of historyKey
	Marks     []Mark `json:"marks"`    // of older revisions; from far to near, the fewer the farther
}

// Mark is when a revision was seen first.
type Mark struct {
	At       time.Time `json:"at"`
	Revision int64     `json:"revision"`
}

const (
	markEvery = 30 * time.Second
	maxMarks  = 256
)

// Since is when the last mark was made of a revision that is not after r: what was written up to then is in an etcd that was restored to r. Zero if
// none is known.
func (h *History) Since(r int64) (at time.Time) {
	for _, m := range h.Marks {
		if m.Revision <= r {
			at = m.At
		}
	}
	return at
}

func (h *History) mark(now time.Time) {
	if n := len(h.Marks); n > 0 && (h.Marks[n-1].Revision >= h.Revision || now.Sub(h.Marks[n-1].At) < markEvery) {
		return
	}
	h.Marks = append(h.Marks, Mark{now.UTC().Truncate(time.Second), h.Revision})
	if len(h.Marks) > maxMarks {
		kept := h.Marks[:0:0]
		for i, m := range h.Marks {
			if i%2 == 0 || i > maxMarks/2 {
				kept = append(kept, m)
			}
		}
		h.Marks = kept
	}
}

// past is what an External knows of its etcd's history.
type past struct {
	asking sync.Mutex // one looks, the others wait for what it finds

	mu    sync.Mutex
	known History // guarded by mu
	doubt bool    // guarded by mu: a call or a stream broke, and etcd may be another one since
	over  error   // guarded by mu; an ErrRestored

	restored chan struct{} // closed when over is set
}

// before is what was known when a call began; an error if the history is over.
func (x *External) before() (History, bool, error) {
	x.past.mu.Lock()
	defer x.past.mu.Unlock()
	return x.past.known, x.past.doubt, x.past.over
}

// begin is called before each call to a Store's etcd: it looks first whether this still is the etcd that it was, if there is a doubt.
func (x *External) begin(ctx context.Context) (History, error) {
	was, doubt, err := x.before()
	if err != nil || !doubt {
		return was, err
	}
	x.past.asking.Lock()
	defer x.past.asking.Unlock()
	if was, doubt, err = x.before(); err != nil || !doubt {
		return was, err
	}
	if err := x.look(ctx, was); err != nil {
		return was, err
	}
	x.past.mu.Lock()
	x.past.doubt = false
	x.past.mu.Unlock()
	return was, nil
}

// look compares the history that etcd has with the one that is known.
func (x *External) look(ctx context.Context, was History) error {
	kv, h, err := x.wire.Get(ctx, x.prefix+historyKey, 0)
	if err != nil {
		return err
	}
	value := ""
	if kv != nil {
		value = string(kv.Value)
	}
	if was.Value != "" && value != was.Value {
		return x.end(was, h, "another history than it had")
	}
	return x.answered(was, h)
}

// answered takes in what came with an answer to a call that began when was was known.
func (x *External) answered(was History, h Header) error {
	switch {
	case was.ClusterID != 0 && h.ClusterID != was.ClusterID:
		return x.end(was, h, "another cluster ID")
	case h.Revision < was.Revision:
		return x.end(was, h, "a lower revision")
	}
	x.past.mu.Lock()
	defer x.past.mu.Unlock()
	if k := &x.past.known; h.Revision > k.Revision {
		k.ClusterID, k.Revision = h.ClusterID, h.Revision
		k.mark(time.Now())
	}
	return x.past.over
}

// arrived takes in what came over a stream, which may be of a member that lags behind.
func (x *External) arrived(h Header) error { return x.answered(History{ClusterID: x.clusterID()}, h) }

func (x *External) clusterID() uint64 {
	x.past.mu.Lock()
	defer x.past.mu.Unlock()
	return x.past.known.ClusterID
}

// end says once that the history is over.
func (x *External) end(was History, h Header, why string) error {
	x.past.mu.Lock()
	defer x.past.mu.Unlock()
	if x.past.over != nil {
		return x.past.over
	}
	x.past.over = fmt.Errorf("%w: it has %s", ErrRestored, why)
	since := "unknown"
	if at := was.Since(h.Revision); h.ClusterID != 0 && !at.IsZero() {
		since = at.Format(time.RFC3339)
	}
	x.log.Error("etcd was restored from a backup, or is another one: all is read anew; what was written after the backup was taken is not there any more",
		"reason", why, "revision_before", was.Revision, "revision", h.Revision, "lost_since", since)
	close(x.past.restored)
	return x.past.over
}

// distrust has the next call look whether etcd still is the one that it was.
func (x *External) distrust() {
	x.past.mu.Lock()
	x.past.doubt = true
	x.past.mu.Unlock()
}

// adopt begins to follow the history that etcd has, which is known from before; or begins another, where that one is over or there was none. It
// reports whether it was over; ended: this was found before.
func (x *External) adopt(ctx context.Context, was History, ended bool) (over bool, err error) {
	kv, h, err := x.wire.Get(ctx, x.prefix+historyKey, 0)
	if err != nil {
		return false, err
	}
	var value string
	var rev int64
	if kv != nil {
		value, rev = string(kv.Value), kv.ModRevision
	}
	known := History{Value: value}
	if was.Value != "" {
		known = was
	}
	x.past.mu.Lock()
	x.past.known = known
	x.past.mu.Unlock()
	if !ended {
		switch {
		case was.Value != "" && value != was.Value:
			err = x.end(was, h, "another history than it had")
		case was.Value != "":
			err = x.answered(was, h)
		}
	}
	// The one that finds it says so to the others. Where the value is another already, one of them has, or it is of a time before: all see that.
	if over = ended || err != nil; value == "" || over && value == was.Value {
		id := make([]byte, 16)
		rand.Read(id)
		next := hex.EncodeToString(id)
		ok, _, err := x.wire.Txn(ctx, []Compare{{Key: x.prefix + historyKey, Revision: rev}}, []Op{{Key: x.prefix + historyKey, Value: []byte(next)}})
		if err != nil {
			return over, err
		}
		if ok {
			value = next
		} else if kv, _, err = x.wire.Get(ctx, x.prefix+historyKey, 0); err != nil {
			return over, err
		} else if kv != nil {
			value = string(kv.Value)
		}
	}
	if _, h, err = x.wire.Get(ctx, x.prefix+historyKey, 0); err != nil {
		return over, err
	}
	x.past.mu.Lock()
	if over {
		x.past.known.Marks, x.past.known.Revision = nil, 0
		x.past.over, x.past.restored = nil, make(chan struct{})
	}
	x.past.known.Value, x.past.known.ClusterID = value, h.ClusterID
	x.past.mu.Unlock()
	return over, x.answered(History{}, h)
}

// Restored reports whether etcd was found restored when it was dialled.
func (x *External) Restored() bool { return x.wasRestored }

// History is what to give to the next DialExternal.
func (x *External) History() History {
	x.past.mu.Lock()
	defer x.past.mu.Unlock()
	h := x.past.known
	h.Marks = append([]Mark(nil), h.Marks...)
	return h
}

// Watchdog looks each second whether etcd still is the one that it was, until it is not (ErrRestored) or ctx ends (nil).
func (x *External) Watchdog(ctx context.Context) error {
	for {
		was, _, err := x.before()
		if err == nil {
			err = x.look(ctx, was)
		}
		if errors.Is(err, ErrRestored) {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-x.past.restored:
		case <-time.After(time.Second):
		}
	}
}
