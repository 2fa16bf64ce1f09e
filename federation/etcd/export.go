package etcd

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/hanse-mesh/hanse/federation/etcd/etcdpb"
)

const (
	holdEndpoints = 50 // more than this many
	holdPercent   = 30 // and more than this share, lost without an explanation, are held back
)

// ExporterConfig says where exports are written.
type ExporterConfig struct {
	Store  Store         // an Election's, where there is more than one replica
	Prefix string        // "" is ExportPrefix
	Linger time.Duration // from the first change to its Txn: 100 ms
	Tick   time.Duration // between ticks: 1 min
	Move   time.Duration // that a service stays in its old scope after it is in a new one: 30 s
	Log    *slog.Logger
	Now    func() time.Time // nil is time.Now
	Rand   io.Reader        // of epochs and ticks; nil is crypto/rand
}

// Scope is what a scope shall be: all of it. What it refers to may not be changed later.
type Scope struct {
	Keys      map[string][]byte // values by key; or, where they would be a burden to hold, the two below
	Sums      map[string]Sum    // of the values, by key
	Value     func(key string) ([]byte, error)
	Endpoints int  // in these keys
	Complete  bool // all sources have been read. Without that nothing is deleted
	Explained int  // endpoints that are gone since the Set before because their object was deleted, or moved to another scope
}

// Sum tells values apart: half of their SHA-256.
type Sum = [16]byte

// SumOf returns the Sum of a value.
func SumOf(value []byte) Sum {
	h := sha256.Sum256(value)
	return Sum(h[:16])
}

// digested returns the scope by its sums, and where its values come from.
func (w *Scope) digested() (map[string]Sum, func(string) ([]byte, error)) {
	if w.Value != nil {
		return w.Sums, w.Value
	}
	sums := make(map[string]Sum, len(w.Keys))
	for key, v := range w.Keys {
		sums[key] = SumOf(v)
	}
	return sums, func(key string) ([]byte, error) { return w.Keys[key], nil }
}

// ScopeStatus is the state of an exported scope.
type ScopeStatus struct {
	Keys      int    // written
	Endpoints int    // written
	Complete  bool   // peers list it
	Pending   int    // keys to write
	Held      string // why the last Set is held back; Accept lets it through
}

// Exporter writes a cluster's exports into its own etcd: differences only, in batches, each with the count of keys that it leaves.
// It knows values by their sums and holds none.
type Exporter struct {
	cfg    ExporterConfig
	dirty  chan struct{} // something is to be written
	urgent chan struct{} // without lingering

	mu      sync.Mutex // guards all below
	scopes  map[string]*exportScope
	loaded  bool
	retain  map[string]bool // scopes, as last said; nil: nothing was said
	restart time.Duration
	err     error
	settled chan struct{} // closed after each flush
}

// exportScope is one scope as it shall be and as it is stored.
type exportScope struct {
	want      map[string]Sum // nil: unknown, what is stored stays
	value     func(key string) ([]byte, error)
	patched   map[string]func(key string) ([]byte, error) // of Patch: where values come from that are not written yet; nil if want is not ours to change
	complete  bool
	endpoints int
	explained int // endpoints of last that endpoints lacks with an explanation
	held      *Scope
	remove    bool

	stored map[string]Sum
	epoch  []byte
	meta   []byte
	last   *etcdpb.Meta // meta decoded

	check map[string]bool      // keys that may differ
	queue []string             // of them, those to look at, by service
	due   map[string]time.Time // deletions that wait, since their service has moved
}

// NewExporter returns an Exporter.
func NewExporter(cfg ExporterConfig) *Exporter {
	if cfg.Prefix == "" {
		cfg.Prefix = ExportPrefix
	}
	if cfg.Linger == 0 {
		cfg.Linger = 100 * time.Millisecond
	}
	if cfg.Tick == 0 {
		cfg.Tick = time.Minute
	}
	if cfg.Move == 0 {
		cfg.Move = 30 * time.Second
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Rand == nil {
		cfg.Rand = rand.Reader
	}
	cfg.Log = orDiscard(cfg.Log)
	return &Exporter{cfg: cfg, dirty: make(chan struct{}, 1), urgent: make(chan struct{}, 1), scopes: map[string]*exportScope{}, settled: make(chan struct{})}
}

// ReadExports calls each with what is stored under an export prefix ("" is ExportPrefix), without bookkeeping, in the order of the keys.
func ReadExports(ctx context.Context, store Store, prefix string, each func(scope, key string, value []byte) error) error {
	prefix = cmp.Or(prefix, ExportPrefix)
	_, err := store.List(ctx, prefix, 0, func(kv KeyValue) error {
		scope, key, ok := splitScope(kv.Key[len(prefix):])
		if !ok || key == epochKey || key == tickKey || key == metaKey {
			return nil
		}
		return each(scope, key, kv.Value)
	})
	if err != nil {
		return fmt.Errorf("read own exports: %w", err)
	}
	return nil
}

// splitScope cuts "<scope>/<key>". A scope is one segment, or two if the first is "peers".
func splitScope(path string) (scope, key string, ok bool) {
	if rest, found := strings.CutPrefix(path, peersPart); found {
		id, key, ok := strings.Cut(rest, "/")
		return peersPart + id, key, ok
	}
	return strings.Cut(path, "/")
}

// load reads what is stored and compares all of it with what shall be.
func (e *Exporter) load(ctx context.Context) error {
	stored := map[string]*exportScope{}
	_, err := e.cfg.Store.List(ctx, e.cfg.Prefix, 0, func(kv KeyValue) error {
		name, key, ok := splitScope(kv.Key[len(e.cfg.Prefix):])
		if !ok {
			return nil
		}
		s := stored[name]
		if s == nil {
			s = newExportScope()
			stored[name] = s
		}
		switch key {
		case epochKey:
			s.epoch = kv.Value
		case tickKey:
		case metaKey:
			s.meta = kv.Value
			if err := proto.Unmarshal(kv.Value, s.last); err != nil {
				s.meta = nil // written anew
			}
		default:
			s.stored[key] = SumOf(kv.Value)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("read own exports: %w", err)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	first := !e.loaded
	for name, old := range e.scopes {
		s := stored[name]
		if s == nil {
			s = newExportScope()
			stored[name] = s
		}
		s.want, s.value, s.patched = old.want, old.value, old.patched
		s.complete, s.endpoints, s.explained = old.complete, old.endpoints, old.explained
		s.held, s.remove, s.due = old.held, old.remove, old.due
	}
	e.scopes, e.loaded = stored, true
	e.drop()
	for name, s := range stored {
		if first && s.want != nil && s.complete && s.epoch != nil { // Set came before this
			if lost := unexplained(int(s.last.Endpoints), s.endpoints, s.explained); lost > 0 {
				s.hold(e, name, &Scope{Sums: s.want, Value: s.lookup(), Endpoints: s.endpoints, Complete: true, Explained: s.explained}, lost)
				s.want, s.value, s.patched, s.explained = nil, nil, nil, 0
			}
		}
		s.compare()
		maps.DeleteFunc(s.due, func(key string, _ time.Time) bool { return !s.check[key] })
	}
	return nil
}

func newExportScope() *exportScope {
	return &exportScope{stored: map[string]Sum{}, last: &etcdpb.Meta{}, check: map[string]bool{}, due: map[string]time.Time{}}
}

// unexplained returns how many endpoints are lost beyond what may happen without a person, or 0.
func unexplained(before, after, explained int) int {
	lost := before - after - explained
	if lost > holdEndpoints && lost*100 > before*holdPercent {
		return lost
	}
	return 0
}

func (s *exportScope) hold(e *Exporter, name string, want *Scope, lost int) {
	if s.held == nil {
		e.cfg.Log.Error("export is held back: too many endpoints would go without an explanation",
			"scope", name, "lost", lost, "before", s.last.Endpoints, "after", want.Endpoints)
	}
	s.held = want
}

// compare marks every key that may differ.
func (s *exportScope) compare() {
	for key, v := range s.want {
		if old, ok := s.stored[key]; !ok || old != v {
			s.check[key] = true
		}
	}
	if s.want == nil && !s.remove {
		return
	}
	for key := range s.stored {
		if _, ok := s.want[key]; !ok {
			s.check[key] = true
		}
	}
}

// lookup returns where the values of want come from.
func (s *exportScope) lookup() func(string) ([]byte, error) {
	value, patched := s.value, s.patched
	return func(key string) ([]byte, error) {
		if from := patched[key]; from != nil {
			return from(key)
		}
		if value == nil {
			return nil, errors.New("nobody has its value any more")
		}
		return value(key)
	}
}

func (e *Exporter) scope(name string) *exportScope {
	s := e.scopes[name]
	if s == nil {
		s = newExportScope()
		e.scopes[name] = s
	}
	s.remove = false
	return s
}

// Set says what a scope shall be. It returns at once. A loss that nothing explains is held back.
func (e *Exporter) Set(scope string, want Scope) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.set(scope, e.scope(scope), want)
}

func (e *Exporter) set(scope string, s *exportScope, want Scope) {
	if s.held != nil {
		want.Explained += s.held.Explained
	}
	if e.loaded && want.Complete && s.epoch != nil {
		if lost := unexplained(int(s.last.Endpoints), want.Endpoints, s.explained+want.Explained); lost > 0 {
			s.hold(e, scope, &want, lost)
			return
		}
	}
	e.take(s, want)
}

func (e *Exporter) take(s *exportScope, want Scope) {
	s.held = nil
	s.want, s.value = want.digested()
	s.patched, s.endpoints = nil, want.Endpoints
	s.explained += want.Explained
	if s.want == nil {
		s.want = map[string]Sum{}
	}
	s.complete = want.Complete
	if e.loaded {
		s.compare()
	}
	wake(e.dirty)
}

// Patch is what changes of a scope that was Set.
type Patch struct {
	Sums      map[string]Sum // by key; zero deletes
	Value     func(key string) ([]byte, error)
	Endpoints int // as in Scope
	Explained int
}

// Patch changes some keys of a scope, at a cost that does not grow with the scope. It returns at once.
func (e *Exporter) Patch(scope string, p Patch) {
	e.mu.Lock()
	defer e.mu.Unlock()
	s := e.scope(scope)
	if s.want == nil || s.held != nil || unexplained(int(s.last.Endpoints), p.Endpoints, s.explained+p.Explained) > 0 {
		was := exportScope{want: s.want, value: s.lookup()}
		if s.held != nil {
			was.want, was.value = s.held.digested()
		}
		was.patch(p, map[string]bool{})
		e.set(scope, s, Scope{Sums: was.want, Value: was.lookup(), Endpoints: p.Endpoints, Explained: p.Explained, Complete: s.complete})
		return
	}
	s.patch(p, s.check)
	s.endpoints = p.Endpoints
	s.explained += p.Explained
	wake(e.dirty)
}

// patch changes some of want, and marks them.
func (s *exportScope) patch(p Patch, mark map[string]bool) {
	if s.patched == nil {
		if s.want, s.patched = maps.Clone(s.want), map[string]func(string) ([]byte, error){}; s.want == nil {
			s.want = map[string]Sum{}
		}
	}
	for k, sum := range p.Sums {
		if mark[k] = true; sum == (Sum{}) {
			delete(s.want, k)
			delete(s.patched, k)
		} else {
			s.want[k], s.patched[k] = sum, p.Value
		}
	}
}

// Retain removes every scope that is not among these. Call it when all sources have been read.
func (e *Exporter) Retain(scopes ...string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.retain = map[string]bool{}
	for _, s := range scopes {
		e.retain[s] = true
	}
	e.drop()
	wake(e.dirty)
}

// drop marks what is not retained for removal.
func (e *Exporter) drop() {
	for name, s := range e.scopes {
		if e.retain != nil && !e.retain[name] && !s.remove {
			s.remove, s.want, s.value, s.patched, s.held = true, nil, nil, nil, nil
			s.compare()
		}
	}
}

// Holds reports whether anything of a scope is, or may be, stored.
func (e *Exporter) Holds(scope string) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return !e.loaded || e.scopes[scope] != nil
}

// Accept lets what is held back of a scope through (a person's decision).
func (e *Exporter) Accept(scope string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if s := e.scopes[scope]; s != nil && s.held != nil {
		e.cfg.Log.Info("held export was accepted", "scope", scope, "endpoints", s.held.Endpoints)
		e.take(s, *s.held)
	}
}

// Status returns the state of each scope, and the last failure if it has not been overcome.
func (e *Exporter) Status() (map[string]ScopeStatus, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	out := make(map[string]ScopeStatus, len(e.scopes))
	for name, s := range e.scopes {
		st := ScopeStatus{Keys: len(s.stored), Endpoints: int(s.last.Endpoints), Complete: s.epoch != nil, Pending: len(s.check)}
		if s.held != nil {
			st.Held = fmt.Sprintf("of %d endpoints only %d would remain, and %d deletions explain it", s.last.Endpoints, s.held.Endpoints, s.held.Explained)
		}
		out[name] = st
	}
	return out, e.err
}

// AnnounceRestart tells peers that silence of up to d is planned, and returns when that is written. The next Run takes it back.
func (e *Exporter) AnnounceRestart(ctx context.Context, d time.Duration) error {
	e.mu.Lock()
	e.restart = d
	e.mu.Unlock()
	return e.Flush(ctx)
}

// Flush returns when everything that was said before is written, except for what waits by intention.
func (e *Exporter) Flush(ctx context.Context) error {
	for {
		e.mu.Lock()
		done, settled := e.loaded, e.settled
		for _, s := range e.scopes {
			done = done && s.settled(e.restart)
		}
		err := e.err
		e.mu.Unlock()
		if done {
			return nil
		}
		wake(e.urgent)
		select {
		case <-settled:
		case <-ctx.Done():
			return fmt.Errorf("write exports: %w", errors.Join(ctx.Err(), err))
		}
	}
}

// Run writes until ctx ends (nil), or until the Store says that this is not the leader any more.
func (e *Exporter) Run(ctx context.Context) error {
	const minWait, maxWait = 100 * time.Millisecond, 5 * time.Second
	tick := time.NewTicker(e.cfg.Tick)
	defer tick.Stop()
	wait, fresh := minWait, true // fresh: what is stored is not known
	for {
		err := e.round(ctx, fresh)
		fresh = false
		e.settle(err)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, ErrNotLeader):
			return fmt.Errorf("write exports: %w", err)
		case err != nil:
			e.cfg.Log.Error("exports are not written; peers keep what they have", "error", err)
			if !sleep(ctx, wait) {
				return nil
			}
			wait, fresh = min(wait*2, maxWait), true
			continue
		}
		wait = minWait
		due := time.NewTimer(e.untilDue())
		select {
		case <-ctx.Done():
		case <-e.urgent:
		case <-due.C:
		case <-e.dirty:
			e.linger(ctx)
		case <-tick.C:
			if err := e.ticks(ctx); err != nil && ctx.Err() == nil {
				e.cfg.Log.Warn("tick is not written", "error", err)
				if errors.Is(err, ErrNotLeader) {
					due.Stop()
					return fmt.Errorf("write tick: %w", err)
				}
			}
		}
		due.Stop()
	}
}

func (e *Exporter) linger(ctx context.Context) {
	t := time.NewTimer(e.cfg.Linger)
	defer t.Stop()
	select {
	case <-t.C:
	case <-e.urgent:
	case <-ctx.Done():
	}
}

func (e *Exporter) settle(err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.err = err
	close(e.settled)
	e.settled = make(chan struct{})
}

// untilDue is the wait for the next delayed deletion.
func (e *Exporter) untilDue() time.Duration {
	e.mu.Lock()
	defer e.mu.Unlock()
	next := 24 * time.Hour
	for _, s := range e.scopes {
		for _, at := range s.due {
			next = min(next, max(0, at.Sub(e.cfg.Now())))
		}
	}
	return next
}

// round writes all there is to write. The first round after a start or a failure reads what is stored, and writes a new tick
// before anything else: what a restored backup lacks then differs from it at every later revision.
func (e *Exporter) round(ctx context.Context, fresh bool) error {
	if fresh {
		if err := e.load(ctx); err != nil {
			return err
		}
		if err := e.ticks(ctx); err != nil {
			return fmt.Errorf("write tick: %w", err)
		}
	}
	for {
		name, ops, done := e.next()
		if ops == nil {
			return nil
		}
		for i := range ops {
			ops[i].Key = e.cfg.Prefix + name + "/" + ops[i].Key
		}
		if _, _, err := e.cfg.Store.Txn(ctx, nil, ops); err != nil {
			return fmt.Errorf("scope %s: %w", name, err)
		}
		done()
	}
}

// ticks writes a new tick into every complete scope, all at one revision.
func (e *Exporter) ticks(ctx context.Context) error {
	var ops []Op
	e.mu.Lock()
	for _, name := range slices.Sorted(maps.Keys(e.scopes)) {
		if s := e.scopes[name]; s.epoch != nil && !s.remove {
			v, err := e.random()
			if err != nil {
				e.mu.Unlock()
				return err
			}
			ops = append(ops, Op{Key: e.cfg.Prefix + name + "/" + tickKey, Value: v})
		}
	}
	e.mu.Unlock()
	for part := range slices.Chunk(ops, MaxOps) {
		if _, _, err := e.cfg.Store.Txn(ctx, nil, part); err != nil {
			return err
		}
	}
	return nil
}

func (e *Exporter) random() ([]byte, error) {
	b := make([]byte, 16)
	if _, err := io.ReadFull(e.cfg.Rand, b); err != nil {
		return nil, fmt.Errorf("read randomness: %w", err)
	}
	return b, nil
}

// next returns one Txn of one scope, and what to call when it has been applied.
func (e *Exporter) next() (string, []Op, func()) {
	e.mu.Lock()
	defer e.mu.Unlock()
	now := e.cfg.Now()
	for _, name := range slices.Sorted(maps.Keys(e.scopes)) {
		if ops, done := e.scopes[name].batch(e, name, now); ops != nil {
			return name, ops, func() {
				e.mu.Lock()
				defer e.mu.Unlock()
				done()
			}
		}
	}
	return "", nil, nil
}

// batch returns the scope's next Txn, with keys relative to it.
func (s *exportScope) batch(e *Exporter, name string, now time.Time) ([]Op, func()) {
	ops, sums := s.differences(e, name, now)
	left := len(s.stored)
	for _, op := range ops {
		_, exists := s.stored[op.Key]
		switch {
		case op.Delete:
			left--
		case !exists:
			left++
		}
	}
	if s.remove && left == 0 {
		return s.bury(e, name, ops, sums)
	}
	last := len(s.check)-len(ops) <= len(s.due) // nothing more to write, except what waits
	meta := &etcdpb.Meta{Keys: int64(left), Endpoints: s.last.Endpoints, Complete: s.last.Complete, RestartSeconds: int64(e.restart / time.Second)}
	var epoch, tick []byte
	explained := 0                           // by what is written now
	if last && s.want != nil && s.complete { // a partial export changes nothing that peers or the hold-back compare with
		meta.Endpoints, meta.Complete, explained = int64(s.endpoints), true, s.explained
		if s.epoch == nil {
			epoch, tick = e.birth()
		}
	}
	raw, err := proto.MarshalOptions{Deterministic: true}.Marshal(meta)
	if err != nil { // not of a valid message
		return nil, nil
	}
	fresh := !bytes.Equal(raw, s.meta) && (s.meta != nil || s.want != nil)
	if len(ops) == 0 && !fresh && epoch == nil {
		s.explained -= explained // it is as it was
		return nil, nil
	}
	all := slices.Clone(ops)
	if fresh {
		all = append(all, Op{Key: metaKey, Value: raw})
	}
	if epoch != nil {
		all = append(all, Op{Key: epochKey, Value: epoch}, Op{Key: tickKey, Value: tick})
	}
	return all, func() {
		s.applied(ops, sums)
		s.meta, s.last = raw, meta
		s.explained -= explained
		if epoch != nil {
			s.epoch = epoch
		}
	}
}

// differences returns up to one Txn of writes and deletions, and the sums of what is written. Keys of one service go together where they fit.
func (s *exportScope) differences(e *Exporter, name string, now time.Time) ([]Op, []Sum) {
	if len(s.queue) == 0 && len(s.check) > 0 {
		s.queue = slices.SortedFunc(maps.Keys(s.check), func(a, b string) int {
			return cmp.Or(strings.Compare(owner(a), owner(b)), strings.Compare(a, b))
		})
	}
	var ops []Op
	var sums []Sum
	size, lookup := 0, s.lookup()
	for ; len(s.queue) > 0; s.queue = s.queue[1:] {
		key := s.queue[0]
		var value []byte
		sum, wanted := s.want[key]
		old, exists := s.stored[key]
		switch {
		case wanted && exists && old == sum, !wanted && !exists:
			s.agree(key)
			continue
		case wanted:
			delete(s.due, key)
			var err error
			if value, err = lookup(key); err == nil && SumOf(value) != sum {
				err = errors.New("it is not what was announced")
			}
			if err != nil {
				e.cfg.Log.Error("key is not exported, its last good state stays", "scope", name, "key", key, "error", err)
				s.agree(key)
				continue
			}
		case !s.remove && (s.want == nil || !s.complete):
			s.agree(key) // absence means nothing yet
			continue
		case s.waits(e, name, key, now):
			continue
		}
		if len(ops) >= MaxOps-3 || (len(ops) > 0 && size+len(key)+len(value) > MaxBytes) {
			return ops, sums
		}
		ops, sums = append(ops, Op{Key: key, Value: value, Delete: !wanted}), append(sums, sum)
		size += len(key) + len(value) + overhead
	}
	return ops, sums
}

func (s *exportScope) agree(key string) {
	delete(s.check, key)
	delete(s.due, key)
	delete(s.patched, key)
}

// waits reports whether the deletion of a key has to wait, because its service has moved to another scope.
func (s *exportScope) waits(e *Exporter, name, key string, now time.Time) bool {
	at, ok := s.due[key]
	if !ok {
		if !e.elsewhere(name, owner(key)) {
			return false
		}
		at = now.Add(e.cfg.Move)
		s.due[key] = at
	}
	return now.Before(at)
}

func (e *Exporter) elsewhere(scope, service string) bool {
	if service == "" {
		return false
	}
	for name, s := range e.scopes {
		if _, ok := s.want["svc/"+service]; ok && name != scope {
			return true
		}
	}
	return false
}

// owner returns the service ("<namespace>/<name>") of svc/<namespace>/<name> and ep/<namespace>/<name>/<slot>, or "".
func owner(key string) string {
	if rest, ok := strings.CutPrefix(key, "svc/"); ok {
		return rest
	}
	if rest, ok := strings.CutPrefix(key, "ep/"); ok {
		if i := strings.LastIndexByte(rest, '/'); i > 0 {
			return rest[:i]
		}
	}
	return ""
}

// birth makes the epoch of a scope and its first tick.
func (e *Exporter) birth() (epoch, tick []byte) {
	epoch, err := e.random()
	if err == nil {
		tick, err = e.random()
	}
	if err != nil {
		e.cfg.Log.Error("scope stays unlisted", "error", err)
		return nil, nil
	}
	return epoch, tick
}

// bury deletes the last keys of a removed scope, its epoch last of all.
func (s *exportScope) bury(e *Exporter, name string, ops []Op, sums []Sum) ([]Op, func()) {
	gone := func() {
		if e.scopes[name] == s && s.remove {
			delete(e.scopes, name)
			return
		}
		s.applied(ops, sums) // it was Set again meanwhile
		s.epoch, s.meta, s.last = nil, nil, &etcdpb.Meta{}
		s.compare()
	}
	if s.epoch == nil && s.meta == nil && len(ops) == 0 {
		gone()
		return nil, nil
	}
	all := slices.Clone(ops)
	for _, key := range []string{metaKey, tickKey, epochKey} {
		all = append(all, Op{Key: key, Delete: true})
	}
	return all, gone
}

// applied notes what a Txn has written.
func (s *exportScope) applied(ops []Op, sums []Sum) {
	for i, op := range ops {
		if op.Delete {
			delete(s.stored, op.Key)
		} else {
			s.stored[op.Key] = sums[i]
		}
		sum, wanted := s.want[op.Key]
		if wanted != op.Delete && (!wanted || sum == sums[i]) {
			s.agree(op.Key)
		}
	}
}

// settled reports whether nothing is left to write, except what waits by intention.
func (s *exportScope) settled(restart time.Duration) bool {
	switch {
	case len(s.check) != len(s.due), s.meta != nil && s.last.RestartSeconds != int64(restart/time.Second):
		return false
	case s.remove:
		return len(s.due) > 0
	case s.want == nil:
		return true
	}
	return !s.complete || (s.epoch != nil && s.last.Endpoints == int64(s.endpoints))
}
