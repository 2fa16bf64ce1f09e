package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hanse-mesh/hanse/federation/etcd"
	"github.com/hanse-mesh/hanse/identity/bundle"
)

// distrustPath is where decisions against a trust domain or an authority are: <trust domain>/<authority or *>, a bundle.Distrust.
const distrustPath = "trust/distrusted/"

// distrusts keeps what people distrust in etcd, where every replica reads it, one that was away, too. The bundle store on disk is a copy, in
// force before etcd answers. Whoever cannot write to etcd obeys alone and writes later: a distrust is never lost, an undo is refused.
type distrusts struct {
	// read-only
	kv, marks *etcd.KV
	id        string // of this replica
	others    func() []replica
	bundles   *bundle.Store
	obeyed    func() bool // whether the bundles in the store are in force here and at all proxies
	log       *slog.Logger

	mu        sync.Mutex
	restored  bool                       // guarded by mu; etcd was, from a backup: what the disk has counts
	pending   map[string]bundle.Distrust // guarded by mu; by key: not in etcd yet
	revision  int64                      // guarded by mu; of etcd, as applied
	confirmed map[string]int64           // guarded by mu; by replica's ID: applied there, and at its proxies

	retry chan struct{} // size 1
}

// distrustMark is what a replica says under replicas/v1/<ID>/distrust. While it is absent, what the replica's own disk has counts, too.
type distrustMark struct {
	Revision int64 `json:"revision"` // of etcd, that it and its proxies obey
}

func newDistrusts(p *controlPlane) *distrusts {
	d := &distrusts{kv: etcd.NewKV(p.stores.own, distrustPath), marks: etcd.NewKV(p.stores.own, replicasPath), id: p.replicas.self.ID, others: p.replicas.others,
		bundles: p.bundles, restored: p.stores.restored, log: p.log.With("part", "distrust"), pending: map[string]bundle.Distrust{}, confirmed: map[string]int64{}, retry: make(chan struct{}, 1)}
	d.obeyed = func() bool {
		behind, _ := p.xds.TrustBehind()
		return len(behind) == 0 && p.sourceCurrent() && p.trustAnnounced()
	}
	return d
}

// distrustTime is how long etcd may take to store a decision.
const distrustTime = 5 * time.Second

func distrustKey(x bundle.Distrust) string {
	if x.Authority == "" {
		return x.TrustDomain + "/*"
	}
	return x.TrustDomain + "/" + x.Authority
}

// add distrusts here at once, and everywhere as soon as etcd has it. The revision is 0 while it has not.
func (d *distrusts) add(ctx context.Context, td spiffeid.TrustDomain, authority string) (revision int64, err error) {
	x := bundle.Distrust{TrustDomain: td.Name(), Authority: authority}
	key := distrustKey(x)
	d.mu.Lock()
	d.pending[key] = x
	d.mu.Unlock()
	if err := d.bundles.Distrust(td, authority); err != nil {
		d.mu.Lock()
		delete(d.pending, key)
		d.mu.Unlock()
		return 0, err
	}
	err = d.push(ctx)
	if err == nil { // or Run did it
		ctx, cancel := context.WithTimeout(ctx, distrustTime)
		defer cancel()
		_, revision, err = d.kv.Get(ctx, key)
	}
	if err != nil {
		kick(d.retry)
		d.log.Error("distrusted by this replica alone until etcd answers", "what", key, "err", err)
		return 0, nil
	}
	return revision, nil
}

// push writes what etcd does not have yet.
func (d *distrusts) push(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, distrustTime)
	defer cancel()
	d.mu.Lock()
	pending := maps.Clone(d.pending)
	d.mu.Unlock()
	for key, x := range pending {
		for _, in := range d.bundles.Distrusted() {
			if distrustKey(in) == key {
				x = in // with its time
			}
		}
		value, err := json.Marshal(x)
		if err != nil {
			return err
		}
		// The same again must not move the revision that others have confirmed.
		if _, err := d.kv.PutIfAbsent(ctx, key, value); err != nil {
			return fmt.Errorf("store the distrust of %s: %w", key, err)
		}
		d.mu.Lock()
		delete(d.pending, key)
		d.mu.Unlock()
	}
	return nil
}

// undo trusts again, everywhere. It reports whether there was anything to undo; without etcd nothing is changed.
func (d *distrusts) undo(ctx context.Context, td spiffeid.TrustDomain, authority string) (found bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, distrustTime)
	defer cancel()
	prefix := td.Name() + "/"
	all, _, err := d.kv.List(ctx, prefix)
	if err != nil {
		return false, fmt.Errorf("trust %s again: %w", td, err)
	}
	for _, kv := range all {
		if authority == "" || kv.Key == prefix+authority {
			found = true
			if err := d.kv.Delete(ctx, kv.Key); err != nil {
				return false, fmt.Errorf("trust %s again: %w", td, err)
			}
		}
	}
	d.mu.Lock()
	for key := range d.pending {
		if strings.HasPrefix(key, prefix) && (authority == "" || key == prefix+authority) {
			delete(d.pending, key)
		}
	}
	d.mu.Unlock()
	here, err := d.bundles.Trust(td, authority)
	return found || here, err
}

// missing names the other replicas that are there, and have not, or whose proxies have not, obeyed a decision of that revision.
func (d *distrusts) missing(revision int64) []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	var out []string
	for _, x := range d.others() {
		if revision > 0 && d.confirmed[x.ID] < revision {
			out = append(out, "replica "+x.Name)
		}
	}
	return out
}

// load puts in force what etcd has, before anybody is served.
func (d *distrusts) load(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	all, rev, err := d.kv.List(ctx, "")
	if err == nil {
		err = d.apply(ctx, all, rev)
	}
	if err != nil {
		return fmt.Errorf("read what is distrusted: %w", err)
	}
	return nil
}

// Run obeys what is in etcd until ctx ends.
func (d *distrusts) Run(ctx context.Context) error {
	var work sync.WaitGroup
	defer work.Wait()
	work.Go(func() { d.follow(ctx, "what is distrusted is read again", d.kv, d.apply) })
	work.Go(func() { d.follow(ctx, "what other replicas obey is read again", d.marks, d.takeMarks) })
	tick := time.NewTicker(lookAgain)
	defer tick.Stop()
	var said int64
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-d.retry:
			if err := d.push(ctx); err != nil && ctx.Err() == nil {
				d.log.Warn("a distrust is not in etcd yet; tried again", "err", err)
				pause(ctx, time.Second)
				kick(d.retry)
			}
			continue
		case <-tick.C:
		}
		d.mu.Lock()
		rev := d.revision
		d.mu.Unlock()
		if rev == said || !d.obeyed() {
			continue
		}
		if err := d.mark(ctx, rev); err != nil {
			d.log.Debug("what is obeyed here is not told yet", "err", err)
			pause(ctx, time.Second)
			continue
		}
		said = rev
	}
}

func (d *distrusts) mark(ctx context.Context, revision int64) error {
	ctx, cancel := context.WithTimeout(ctx, distrustTime)
	defer cancel()
	value, err := json.Marshal(distrustMark{revision})
	if err != nil {
		return err
	}
	_, err = d.marks.Put(ctx, d.id+"/distrust", value)
	return err
}

func (d *distrusts) follow(ctx context.Context, again string, kv *etcd.KV, f func(context.Context, []etcd.KeyValue, int64) error) {
	for ctx.Err() == nil {
		err := kv.Watch(ctx, "", func(all []etcd.KeyValue, rev int64) error { return f(ctx, all, rev) })
		if ctx.Err() == nil {
			etcd.Again(ctx, d.log, again, err)
			pause(ctx, time.Second)
		}
	}
}

// apply puts in force what etcd has, and what it does not have yet.
func (d *distrusts) apply(ctx context.Context, all []etcd.KeyValue, rev int64) error {
	_, marked, err := d.marks.Get(ctx, d.id+"/distrust")
	if err != nil {
		return err
	}
	d.mu.Lock()
	if marked == 0 || d.restored { // this replica is new to this etcd: what its disk has counts, rather once too often
		for _, x := range d.bundles.Distrusted() {
			d.pending[distrustKey(x)] = x
		}
	}
	if len(d.pending) > 0 {
		kick(d.retry)
	}
	next := map[string]bundle.Distrust{}
	for _, kv := range all {
		var x bundle.Distrust
		if err := json.Unmarshal(kv.Value, &x); err != nil || distrustKey(x) != kv.Key {
			// Whoever cannot read a decision obeys the key.
			d.log.Error("a stored distrust is damaged; the trust domain or authority of its key is distrusted", "key", kv.Key, "err", err)
			td, authority, _ := strings.Cut(kv.Key, "/")
			x = bundle.Distrust{TrustDomain: td, Authority: strings.TrimPrefix(authority, "*")}
		}
		next[kv.Key] = x
	}
	for key, x := range d.pending {
		if _, ok := next[key]; !ok {
			next[key] = x
		}
	}
	d.mu.Unlock()
	if err := d.bundles.SetDistrusted(slices.Collect(maps.Values(next))); err != nil && !errors.Is(err, bundle.ErrTooMany) {
		return err
	} else if err != nil {
		d.log.Error("what is distrusted stays as it was", "err", err)
	}
	if marked == 0 {
		if err := d.mark(ctx, 0); err != nil {
			return err
		}
	}
	d.mu.Lock()
	d.revision, d.restored = rev, false
	d.mu.Unlock()
	return nil
}

func (d *distrusts) takeMarks(_ context.Context, all []etcd.KeyValue, _ int64) error {
	confirmed := map[string]int64{}
	for _, kv := range all {
		id, ok := strings.CutSuffix(kv.Key, "/distrust")
		var m distrustMark
		if ok && json.Unmarshal(kv.Value, &m) == nil {
			confirmed[id] = m.Revision
		}
	}
	d.mu.Lock()
	d.confirmed = confirmed
	d.mu.Unlock()
	return nil
}
