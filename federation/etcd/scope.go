package etcd

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/hanse-mesh/hanse/federation/etcd/etcdpb"
)

var (
	errRelist    = errors.New("the peer's history is not the one that was mirrored")
	errFenced    = errors.New("another mirror of this peer has written")
	errQuota     = errors.New("the peer's import quota is used up")
	errEpochGone = errors.New("no epoch any more")
	errEmpty     = errors.New("the peer has not finished its first export")
)

const (
	maxTake    = 256              // responses before timers are looked at again
	maxRestart = 10 * time.Minute // of an announced restart that is believed
)

// scopeMirror mirrors one scope of a peer.
type scopeMirror struct {
	// read-only after newScopeMirror
	m      *Mirror
	name   string
	remote string // prefix at the peer
	local  string // prefix here
	plain  bool   // needs neither epoch nor meta
	accept chan struct{}

	report scopeReport // guarded by Mirror.mu

	// owned by run
	loaded bool
	cp     *etcdpb.Checkpoint
	cpRev  int64            // ModRevision of the checkpoint here: the fence
	sizes  map[string]int64 // by key held here
	stale  map[string]bool  // of them, those that the peer lacks
	scopes []byte           // value of the key "scopes"
}

// scopeReport is a scope's part of the status.
type scopeReport struct {
	following bool
	keys      int
	revision  int64
	held      string
	err       string
	restart   time.Duration
}

func newScopeMirror(m *Mirror, name string) *scopeMirror {
	return &scopeMirror{
		m: m, name: name, remote: m.cfg.RemotePrefix + name + "/", local: m.cfg.LocalPrefix + name + "/",
		plain: name == membersScope || name == acksScope || strings.HasPrefix(name, peersPart), accept: make(chan struct{}, 1),
	}
}

// run follows the scope until ctx ends or the connection breaks. What only concerns this scope is retried here.
func (s *scopeMirror) run(ctx context.Context, remote Remote) error {
	wait := s.m.cfg.Timers.BackoffMin
	relist := false
	for {
		err := s.follow(ctx, remote, relist)
		relist = false
		delay := s.m.cfg.Timers.Retry
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, errRelist), errors.Is(err, ErrCompacted):
			relist, delay = true, 0
			s.m.log.Info("scope is listed again", "scope", s.name, "reason", err)
		case errors.Is(err, errFenced):
			s.loaded, delay = false, wait
			s.m.log.Debug("reload after another mirror", "scope", s.name)
		case errors.Is(err, errEmpty):
			delay = wait
			wait = min(wait*2, s.m.cfg.Timers.Probe)
		case errors.Is(err, ErrPermissionDenied): // at first soon again: a member that just joined may not know us yet
			delay = wait
			wait = min(wait*2, s.m.cfg.Timers.Retry)
			s.fault(err)
		case errors.Is(err, errQuota), errors.Is(err, ErrNoSpace):
			relist, delay = true, 6*delay // what made it fit again may be anywhere in the scope
			s.fault(err)
		default:
			return err
		}
		s.publish(func(r *scopeReport) {
			r.following = false
			if delay > 0 && !errors.Is(err, errFenced) {
				r.err = err.Error()
			}
		})
		if delay > 0 && !sleep(ctx, delay) {
			return ctx.Err()
		}
	}
}

func (s *scopeMirror) fault(err error) {
	s.m.mu.Lock()
	known := s.report.err == err.Error()
	s.m.mu.Unlock()
	if !known {
		s.m.log.Error("scope is not mirrored; what is here stays", "scope", s.name, "error", err)
	}
}

func (s *scopeMirror) publish(f func(*scopeReport)) {
	s.m.mu.Lock()
	s.report.keys = len(s.sizes)
	f(&s.report)
	s.m.mu.Unlock()
	wake(s.m.updated)
}

// load reads what is here. It returns the digest of each value.
func (s *scopeMirror) load(ctx context.Context) (map[string][sha256.Size]byte, error) {
	s.loaded = false
	var freed int64
	for _, n := range s.sizes {
		freed += n
	}
	_ = s.m.reserve(-freed)
	s.sizes, s.stale, s.cp, s.cpRev, s.scopes = map[string]int64{}, map[string]bool{}, &etcdpb.Checkpoint{}, 0, nil
	digests := map[string][sha256.Size]byte{}
	var held int64
	_, err := s.m.cfg.Local.List(ctx, s.local, 0, func(kv KeyValue) error {
		rest := kv.Key[len(s.local):]
		if rest == checkpointKey {
			s.cpRev = kv.ModRevision
			return proto.Unmarshal(kv.Value, s.cp)
		}
		key, ok := strings.CutPrefix(rest, dataPart)
		if !ok {
			return nil
		}
		digests[key] = sha256.Sum256(kv.Value)
		s.sizes[key] = size(key, kv.Value)
		held += s.sizes[key]
		if s.name == peersPart+s.m.cfg.Self && key == scopesKey {
			s.scopes = present(kv.Value)
		}
		return nil
	})
	if err != nil {
		s.sizes = nil
		return nil, fmt.Errorf("read the imports of scope %s: %w", s.name, err)
	}
	s.m.mu.Lock()
	s.m.bytes += held // more than the quota if that has shrunk
	s.m.mu.Unlock()
	s.loaded = true
	return digests, nil
}

// present tells an empty value from an absent one.
func present(value []byte) []byte {
	if value == nil {
		return []byte{}
	}
	return value
}

func size(key string, value []byte) int64 { return int64(len(key)+len(value)) + overhead }

// heads are the keys of a scope that tell one history from another.
type heads struct {
	Header
	epoch, tick []byte
	tickRev     int64
}

func (s *scopeMirror) heads(ctx context.Context, remote Remote) (heads, error) {
	ctx, cancel := context.WithTimeout(ctx, s.m.cfg.Timers.Answer)
	defer cancel()
	var h heads
	hdr, err := remote.List(ctx, s.remote+"!", 0, func(kv KeyValue) error {
		switch kv.Key[len(s.remote):] {
		case epochKey:
			h.epoch = kv.Value
		case tickKey:
			h.tick, h.tickRev = kv.Value, kv.ModRevision
		}
		return nil
	})
	if err != nil {
		return h, fmt.Errorf("probe: %w", err)
	}
	h.Header = hdr
	s.m.answered(hdr)
	return h, nil
}

// diverged reports why the history behind h is not the one that cp was taken from, or "".
func diverged(cp *etcdpb.Checkpoint, h heads) string {
	switch {
	case cp.ClusterId != h.ClusterID:
		return "another cluster ID"
	case !bytes.Equal(cp.Epoch, h.epoch):
		return "another epoch"
	case h.Revision < cp.Revision:
		return "a lower revision"
	case h.tickRev > 0 && h.tickRev <= cp.Revision && !bytes.Equal(cp.Tick, h.tick):
		return "another tick: it was restored from a backup"
	}
	return ""
}

// follow brings the scope up to date and follows it. It returns only errors.
func (s *scopeMirror) follow(ctx context.Context, remote Remote, relist bool) error {
	if !s.loaded {
		if _, err := s.load(ctx); err != nil {
			return err
		}
	}
	h, err := s.heads(ctx, remote)
	if err != nil {
		return err
	}
	if h.epoch == nil && (!s.plain || len(s.cp.Epoch) > 0) {
		return errEmpty
	}
	why := diverged(s.cp, h)
	switch {
	case relist:
		why = "asked for"
	case !s.cp.Synced:
		why = "no complete list yet"
	case s.cp.Held && len(s.stale) == 0:
		why = "it is not known any more which keys are held"
	case why == "" && h.tickRev > s.cp.Revision && len(s.cp.Tick) > 0:
		// a newer tick says nothing of our revision; ask for the one that was valid then
		kv, _, err := remote.Get(ctx, s.remote+tickKey, s.cp.Revision)
		if err != nil {
			return err
		}
		if kv == nil || !bytes.Equal(kv.Value, s.cp.Tick) {
			why = "another tick: it was restored from a backup"
		}
	}
	if why != "" {
		s.m.log.Info("list scope", "scope", s.name, "reason", why)
		if err := s.list(ctx, remote); err != nil {
			return err
		}
	}
	return s.watch(ctx, remote)
}

// list brings the scope to the state of one revision of the peer.
func (s *scopeMirror) list(ctx context.Context, remote Remote) error {
	digests, err := s.load(ctx)
	if err != nil {
		return err
	}
	s.m.mu.Lock()
	s.m.status.Relists++
	s.m.mu.Unlock()
	s.cp.Synced = false
	if err := s.commit(ctx, newBatch()); err != nil {
		return err
	}
	next := &etcdpb.Checkpoint{Synced: true}
	seen := make(map[string]bool, len(digests))
	b, full := newBatch(), error(nil)
	h, err := remote.List(ctx, s.remote, 0, func(kv KeyValue) error {
		key := kv.Key[len(s.remote):]
		switch key {
		case epochKey:
			next.Epoch = kv.Value
			return nil
		case tickKey:
			next.Tick = kv.Value
			return nil
		case metaKey:
			next.Meta = kv.Value
			return nil
		}
		if seen[key] = true; len(seen)%1000 == 0 {
			s.m.heard()
		}
		if s.refused(key, kv.Value) {
			return nil
		}
		if d, ok := digests[key]; ok && d == sha256.Sum256(kv.Value) {
			return nil
		}
		if full != nil {
			return nil
		}
		if b.full(key, kv.Value) {
			if err := s.commit(ctx, b); errors.Is(err, errQuota) {
				full = err
				return nil
			} else if err != nil {
				return err
			}
			b = newBatch()
		}
		b.put(key, kv.Value)
		return nil
	})
	if err != nil {
		return fmt.Errorf("list: %w", err)
	}
	s.m.answered(h)
	if next.Epoch == nil && !s.plain {
		return errEmpty
	}
	if full == nil && len(b.ops) > 0 {
		if err := s.commit(ctx, b); errors.Is(err, errQuota) {
			full = err
		} else if err != nil {
			return err
		}
	}
	for key := range s.sizes {
		if !seen[key] {
			s.stale[key] = true
		}
	}
	swept := len(s.stale) > 0
	if swept {
		if err := s.sweep(ctx, next.Meta, len(seen), false); err != nil {
			return err
		}
	}
	if full != nil {
		if swept && len(s.stale) == 0 {
			return fmt.Errorf("%w: there is room now", errRelist)
		}
		return full
	}
	next.ClusterId, next.Revision = h.ClusterID, h.Revision
	s.cp = next
	return s.commit(ctx, newBatch())
}

// refused reports whether an object is too large to be kept. Its last good state stays, and the others go on.
func (s *scopeMirror) refused(key string, value []byte) bool {
	if key != "" && len(key) <= maxKey && len(value) <= MaxValue {
		return false
	}
	s.m.log.Error("object is not mirrored: it is too large", "scope", s.name, "key", key[:min(len(key), 64)], "key-bytes", len(key), "value-bytes", len(value))
	return true
}

// sweep deletes the stale keys if the peer's own count agrees that it has exactly the others, or if a person says so.
func (s *scopeMirror) sweep(ctx context.Context, meta []byte, present int, accepted bool) error {
	if len(s.stale) == 0 {
		return nil
	}
	if why := disagrees(meta, present, s.plain); why != "" && !accepted {
		s.m.mu.Lock()
		news := s.report.held == ""
		s.report.held = fmt.Sprintf("%d keys are kept that the peer lacks: %s", len(s.stale), why)
		s.m.mu.Unlock()
		if news {
			s.m.log.Error("keys that the peer lacks are kept until its count agrees", "scope", s.name, "keys", len(s.stale), "reason", why)
		}
		wake(s.m.updated)
		return nil
	}
	b := newBatch()
	for key := range s.stale {
		if b.full(key, nil) {
			if err := s.commit(ctx, b); err != nil {
				return err
			}
			b = newBatch()
		}
		b.remove(key)
	}
	if err := s.commit(ctx, b); err != nil {
		return err
	}
	s.publish(func(r *scopeReport) { r.held = "" })
	return nil
}

// disagrees says why a list with that many data keys is not the one that meta describes, or "".
func disagrees(meta []byte, present int, plain bool) string {
	if meta == nil && plain {
		return ""
	}
	var pb etcdpb.Meta
	switch err := proto.Unmarshal(meta, &pb); {
	case meta == nil:
		return "it does not say how many it has"
	case err != nil:
		return fmt.Sprintf("its count cannot be read: %v", err)
	case !pb.Complete:
		return "its export is not complete"
	case pb.Keys != int64(present):
		return fmt.Sprintf("it says that it has %d keys, and %d are seen", pb.Keys, present)
	}
	return ""
}

// batch is what one Txn writes. The last operation on a key counts.
type batch struct {
	ops    map[string]Op
	bytes  int
	marked bool // the checkpoint alone is worth writing
}

func newBatch() *batch { return &batch{ops: map[string]Op{}} }

// full reports whether one more operation needs another Txn.
func (b *batch) full(key string, value []byte) bool {
	if _, ok := b.ops[key]; !ok && len(b.ops) >= MaxOps {
		return true
	}
	return len(b.ops) > 0 && b.bytes+len(key)+len(value)+overhead > MaxBytes
}

func (b *batch) put(key string, value []byte) {
	b.ops[key] = Op{Key: key, Value: value}
	b.bytes += len(key) + len(value) + overhead
}

func (b *batch) remove(key string) {
	b.ops[key] = Op{Key: key, Delete: true}
	b.bytes += len(key) + overhead
}

// commit writes a batch and the checkpoint in one Txn, fenced by the checkpoint as it was last seen.
func (s *scopeMirror) commit(ctx context.Context, b *batch) error {
	var delta int64
	ops := make([]Op, 0, len(b.ops)+1)
	for key, op := range b.ops {
		delta -= s.sizes[key]
		if !op.Delete {
			delta += size(key, op.Value)
		} else if _, ok := s.sizes[key]; !ok {
			continue
		}
		op.Key = s.local + dataPart + key
		ops = append(ops, op)
	}
	if err := s.m.reserve(delta); err != nil {
		return err
	}
	s.cp.Held = s.holds(b)
	cp, err := proto.Marshal(s.cp)
	if err != nil {
		return fmt.Errorf("encode checkpoint: %w", err)
	}
	ops = append(ops, Op{Key: s.local + checkpointKey, Value: cp})
	ok, h, err := s.m.cfg.Local.Txn(ctx, []Compare{{Key: s.local + checkpointKey, Revision: s.cpRev}}, ops)
	if err == nil && !ok {
		err = errFenced
	}
	if err != nil {
		_ = s.m.reserve(-delta)
		s.loaded = false // it may have been written all the same
		return fmt.Errorf("write imports: %w", err)
	}
	s.cpRev = h.Revision
	for key, op := range b.ops {
		delete(s.stale, key)
		if op.Delete {
			delete(s.sizes, key)
		} else {
			s.sizes[key] = size(key, op.Value)
		}
		if s.name == peersPart+s.m.cfg.Self && key == scopesKey {
			if s.scopes = nil; !op.Delete {
				s.scopes = present(op.Value)
			}
		}
	}
	return nil
}

// holds reports whether stale keys remain after b.
func (s *scopeMirror) holds(b *batch) bool {
	for key := range s.stale {
		if _, ok := b.ops[key]; !ok {
			return true
		}
	}
	return false
}

// received is what the stream's reader passes on.
type received struct {
	r   *WatchResponse
	err error
}

// watch follows the scope from its checkpoint on.
func (s *scopeMirror) watch(ctx context.Context, remote Remote) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	w, err := remote.Watch(ctx, s.remote, s.cp.Revision+1)
	if err != nil {
		return err
	}
	responses := make(chan received, 64)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() { // ends with ctx or the stream
		for {
			r, err := w.Recv()
			select {
			case responses <- received{r, err}:
			case <-ctx.Done():
				return
			}
			if err != nil {
				return
			}
		}
	})
	s.followed(true)
	probe := time.NewTicker(s.m.cfg.Timers.Probe)
	defer probe.Stop()
	probed := make(chan error, 1)
	probing, gone := false, false
	silence := time.NewTimer(s.m.cfg.Timers.Silence)
	defer silence.Stop()
	if err := w.RequestProgress(); err != nil {
		return fmt.Errorf("watch: %w", err)
	}
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case got := <-responses:
			silence.Reset(s.m.cfg.Timers.Silence)
			if err := s.take(ctx, got, responses); err != nil {
				return err
			}
		case <-silence.C:
			return fmt.Errorf("watch: no progress for %s", s.m.cfg.Timers.Silence)
		case <-probe.C:
			if err := w.RequestProgress(); err != nil {
				return fmt.Errorf("watch: %w", err)
			}
			if probing {
				continue
			}
			probing = true
			at := proto.CloneOf(s.cp) // the revision first, then the question
			wg.Go(func() { probed <- s.probe(ctx, remote, at) })
		case err := <-probed:
			probing = false
			if errors.Is(err, errEpochGone) && !gone { // its DELETE may be under way
				gone = true
				continue
			}
			if err != nil {
				return err
			}
			gone = false
		case <-s.accept:
			if err := s.sweep(ctx, s.cp.Meta, len(s.sizes)-len(s.stale), true); err != nil {
				return err
			}
		}
	}
}

// probe asks whether the peer's history still is the one that is being followed.
func (s *scopeMirror) probe(ctx context.Context, remote Remote, at *etcdpb.Checkpoint) error {
	h, err := s.heads(ctx, remote)
	if err != nil {
		return err
	}
	why := diverged(at, h)
	switch {
	case why == "":
		return nil
	case h.epoch == nil && h.ClusterID == at.ClusterId && h.Revision >= at.Revision:
		return fmt.Errorf("%w: %w", errRelist, errEpochGone)
	}
	return fmt.Errorf("%w: %s", errRelist, why)
}

// take applies a response and all that wait behind it.
func (s *scopeMirror) take(ctx context.Context, got received, more <-chan received) error {
	b := newBatch()
	for range maxTake {
		if got.err != nil {
			if err := s.flush(ctx, b); err != nil {
				return err
			}
			return fmt.Errorf("watch: %w", got.err)
		}
		s.m.answered(got.r.Header)
		if err := s.events(ctx, got.r, &b); err != nil {
			s.loaded = false // the checkpoint in memory may be ahead of what was written
			return err
		}
		select {
		case got = <-more:
			continue
		default:
		}
		break
	}
	return s.flush(ctx, b)
}

// flush writes what is left of a batch.
func (s *scopeMirror) flush(ctx context.Context, b *batch) error {
	listed := s.scopes
	if len(b.ops) > 0 || b.marked {
		if err := s.commit(ctx, b); err != nil {
			return err
		}
	}
	if err := s.sweep(ctx, s.cp.Meta, len(s.sizes)-len(s.stale), false); err != nil {
		return err
	}
	s.followed((listed == nil) != (s.scopes == nil) || !bytes.Equal(listed, s.scopes))
	return nil
}

// followed reports that all up to the checkpoint is here, and passes on the scope list if that is news.
func (s *scopeMirror) followed(listed bool) {
	var fault string
	if listed && s.scopes != nil {
		if err := s.m.allowed(s.scopes); err != nil { // the list before stays in force
			fault = err.Error()
			s.m.log.Error("scope list is not taken", "error", err)
		}
	}
	var meta etcdpb.Meta
	_ = proto.Unmarshal(s.cp.Meta, &meta) // sweep says what is wrong with it
	s.publish(func(r *scopeReport) {
		if r.following, r.revision = true, s.cp.Revision; listed || s.scopes == nil {
			r.err = fault
		}
		r.restart = min(time.Duration(meta.RestartSeconds)*time.Second, maxRestart)
	})
}

// remove deletes the scope here, because the peer's scope list does not have it any more.
func (s *scopeMirror) remove(ctx context.Context) error {
	if _, err := s.load(ctx); err != nil {
		return err
	}
	s.cp.Synced = false
	for key := range s.sizes {
		s.stale[key] = true
	}
	if err := s.sweep(ctx, nil, 0, true); err != nil {
		return err
	}
	_, _, err := s.m.cfg.Local.Txn(ctx, []Compare{{Key: s.local + checkpointKey, Revision: s.cpRev}}, []Op{{Key: s.local + checkpointKey, Delete: true}})
	s.loaded = false
	return err
}

// events adds a response to the batch, and writes full batches. A batch that ends inside a revision claims the one before.
func (s *scopeMirror) events(ctx context.Context, r *WatchResponse, b **batch) error {
	if len(r.Events) == 0 && !r.More {
		s.cp.Revision = max(s.cp.Revision, r.Header.Revision) // progress; written with the next events
		return nil
	}
	for _, e := range r.Events {
		s.cp.Revision = max(s.cp.Revision, e.ModRevision-1)
		key := e.Key[len(s.remote):]
		switch key {
		case epochKey:
			if !e.Delete && len(s.cp.Epoch) > 0 && !bytes.Equal(e.Value, s.cp.Epoch) {
				return fmt.Errorf("%w: another epoch", errRelist)
			}
			s.cp.Epoch, (*b).marked = e.Value, true
			continue
		case tickKey:
			s.cp.Tick = e.Value
			(*b).marked = true
			continue
		case metaKey:
			s.cp.Meta = e.Value
			(*b).marked = true
			continue
		}
		if s.refused(key, e.Value) {
			continue
		}
		if (*b).full(key, e.Value) {
			if err := s.commit(ctx, *b); err != nil {
				return err
			}
			*b = newBatch()
		}
		if e.Delete {
			(*b).remove(key)
		} else {
			(*b).put(key, e.Value)
		}
	}
	if n := len(r.Events); n > 0 && !r.More {
		s.cp.Revision = max(s.cp.Revision, r.Events[n-1].ModRevision)
	}
	return nil
}
