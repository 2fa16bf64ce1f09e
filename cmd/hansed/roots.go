package main

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hanse-mesh/hanse/federation/etcd"
	"github.com/hanse-mesh/hanse/identity/bundle"
	"github.com/hanse-mesh/hanse/identity/ca"
)

// Keys of what replicas tell each other of their roots.
const (
	rootsPath   = "authority/replicas/" // + replica's ID: a rootsRecord, by that replica
	unionKey    = "authority/bundle"    // a union, by the leader
	rootsPrefix = "authority/"
)

// rootsRecord is what a replica says of its own roots.
type rootsRecord struct {
	Name      string          `json:"name"`
	Addresses []string        `json:"addresses"`
	Bundle    json.RawMessage `json:"bundle"` // its own roots, as SPIFFE JSON
	Active    []byte          `json:"active"` // subject key ID of the root that signs; empty while none does
	Until     time.Time       `json:"until"`  // nothing that it signs ends later
	Roots     []namedRoot     `json:"roots"`
	Obeyed    obeyed          `json:"obeyed"`
}

// union is the trust domain's bundle, of which replicas' bundles it was made, and what agents are to leave: a change of either is a new
// sequence, of which agents are told.
type union struct {
	Bundle json.RawMessage   `json:"bundle"`
	From   map[string]uint64 `json:"from"`            // sequence by replica's ID
	Leave  []string          `json:"leave,omitempty"` // authorities, sorted
}

// roots joins the roots of all replicas into the trust domain's one bundle. Each replica keeps its keys to itself and says in etcd what
// its roots are; the leader makes the bundle, whose sequence grows; all put it in force. The roots of a replica that is away leave the
// bundle when all that it can have signed has expired.
type roots struct {
	// read-only
	td        spiffeid.TrustDomain
	store     etcd.Store // for what is this replica's own
	leader    etcd.Store // for what is the leader's
	replicas  *replicas
	bundles   *bundle.Store
	life      time.Duration // the longest of what it signs
	now       func() time.Time
	log       *slog.Logger
	disk      string                                       // file with revocations
	authority *ca.Authority                                // set by enroll
	resting   func(keyID string, sequence uint64) []string // agents that rest on a root, or have not loaded the bundle that tells them to leave it

	publishing sync.Mutex

	mu       sync.Mutex
	until    time.Time              // guarded by mu; as the others know it
	records  map[string]rootsRecord // guarded by mu; by replica's ID
	union    union                  // guarded by mu
	unionRev int64                  // guarded by mu
	included [2]uint64              // guarded by mu: own sequence, and that of the first bundle that has its roots
	leave    map[string]uint64      // guarded by mu: sequence of the first bundle that tells agents to leave an authority
	rotation rotation               // guarded by mu; the last that was ordered
	revoked  map[string]revocation  // guarded by mu; not changed in place; by authority
	done     obeyed                 // guarded by mu; by this replica
	said     obeyed                 // guarded by mu; what of it the others know
	kept     map[string]revocation  // guarded by mu; not changed in place; by authority: what the disk has of revoked
	lost     []revocation           // guarded by mu; of kept, what etcd does not have, or not any more

	dirty chan struct{} // size 1: the leader looks again
	told  chan struct{} // size 1: this replica looks what is ordered
}

func newRoots(p *controlPlane, leader etcd.Store) *roots {
	life := max(24*time.Hour, p.cfg.Identity.X509Life.Duration) // an agent's SVID, a workload's
	return &roots{td: p.td, disk: filepath.Join(p.cfg.DataDir, "revoked.json"), store: p.stores.own, leader: leader, replicas: p.replicas, bundles: p.bundles, now: p.now,
		life: min(life, p.cfg.Identity.RootLife.Duration), log: p.log.With("part", "roots"), records: map[string]rootsRecord{}, dirty: make(chan struct{}, 1), told: make(chan struct{}, 1)}
}

// Until is until when the others know that this replica signs.
func (r *roots) Until() time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.until
}

// enroll makes this replica's roots known. The first replica of all begins the bundle and signs at once; any later one waits until its root
// is acknowledged. One whose root has left the bundle while others sign begins anew.
func (r *roots) enroll(ctx context.Context, a *ca.Authority) error {
	r.authority = a
	if err := r.loadKept(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	own, err := a.Bundle().Marshal()
	if err != nil {
		return fmt.Errorf("encode own roots: %w", err)
	}
	first, err := json.Marshal(union{Bundle: own, From: map[string]uint64{r.replicas.self.ID: a.Sequence()}})
	if err != nil {
		return err
	}
	begun, err := etcd.NewKV(r.store, "").PutIfAbsent(ctx, unionKey, first)
	if err != nil {
		return fmt.Errorf("begin the bundle: %w", err)
	}
	if begun && a.Active() == nil {
		if err := a.Activate(); err != nil {
			return err
		}
	}
	all, _, err := etcd.NewKV(r.store, "").List(ctx, rootsPrefix)
	if err != nil {
		return err
	}
	if err := r.take(all); err != nil {
		return err
	}
	r.mu.Lock()
	if own, ok := r.records[r.replicas.self.ID]; ok {
		r.done = obeyed{Rotation: own.Obeyed.Rotation, Root: own.Obeyed.Root}
	} else { // new: what was ordered before is no business of its fresh root
		r.done.Rotation = r.rotation.Number
	}
	r.mu.Unlock()
	if _, err := r.obey(ctx); err != nil { // before anything is signed
		return err
	}
	return r.publish(ctx)
}

// publish says what this replica's roots are, and promises that nothing it signs ends after twice the longest life from now.
func (r *roots) publish(ctx context.Context) error {
	r.publishing.Lock() // what is older must not come later
	defer r.publishing.Unlock()
	own, err := r.authority.Bundle().Marshal()
	if err != nil {
		return fmt.Errorf("encode own roots: %w", err)
	}
	rec := rootsRecord{Name: r.replicas.self.Name, Addresses: r.replicas.self.Addresses, Bundle: own, Until: r.now().Add(2 * r.life).UTC().Truncate(time.Second),
		Roots: namesOf(r.authority.Roots())}
	r.mu.Lock()
	rec.Obeyed = r.done // which is not changed in place
	r.mu.Unlock()
	if c := r.authority.Active(); c != nil {
		rec.Active = c.SubjectKeyId
	}
	b, err := json.Marshal(rec)
	if err != nil {
		return err
	}
	if _, err := etcd.NewKV(r.store, rootsPath).Put(ctx, r.replicas.self.ID, b); err != nil {
		return fmt.Errorf("publish own roots: %w", err)
	}
	r.mu.Lock()
	r.until, r.said = rec.Until, rec.Obeyed
	r.mu.Unlock()
	return nil
}

// Run keeps the others informed of this replica's roots, puts the bundle in force, and makes it while this replica leads, until ctx ends.
func (r *roots) Run(ctx context.Context) error {
	var work sync.WaitGroup
	defer work.Wait()
	work.Go(func() { r.follow(ctx) })
	work.Go(func() { r.merging(ctx) })
	work.Go(func() { r.obeying(ctx) })
	for {
		changed := r.authority.Changed()
		wait := r.life / 2
		if err := r.publish(ctx); err != nil && ctx.Err() == nil {
			r.log.Error("own roots are not published; tried again", "err", err)
			wait = time.Second
		}
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			t.Stop()
			return nil
		case <-changed:
		case <-t.C:
		}
		t.Stop()
	}
}

func (r *roots) follow(ctx context.Context) {
	for ctx.Err() == nil {
		err := etcd.NewKV(r.store, "").Watch(ctx, rootsPrefix, func(all []etcd.KeyValue, _ int64) error { return r.take(all) })
		if ctx.Err() == nil {
			etcd.Again(ctx, r.log, "roots of the replicas are read again", err)
			pause(ctx, time.Second)
		}
	}
}

// take takes in what is in etcd.
func (r *roots) take(all []etcd.KeyValue) error {
	records, revoked := map[string]rootsRecord{}, map[string]revocation{}
	var u union
	var order rotation
	var rev int64
	for _, kv := range all {
		if kv.Key == rotationKey {
			if err := json.Unmarshal(kv.Value, &order); err != nil {
				r.log.Error("the order to rotate is damaged and not obeyed: order it again", "key", kv.Key, "err", err)
				order = rotation{}
			}
		}
		if authority, ok := strings.CutPrefix(kv.Key, revokedPath); ok {
			var v revocation
			if err := json.Unmarshal(kv.Value, &v); err != nil || v.Authority != authority {
				r.log.Error("a stored revocation is damaged; the authority of its key is revoked", "key", kv.Key, "err", err)
				v = revocation{Authority: authority, Revoked: true} // whoever cannot read a decision obeys the key
			}
			v.rev = kv.ModRevision
			revoked[authority] = v
		}
		if id, ok := strings.CutPrefix(kv.Key, rootsPath); ok {
			var rec rootsRecord
			if err := json.Unmarshal(kv.Value, &rec); err != nil {
				r.log.Error("a replica's roots are left out", "key", kv.Key, "err", err)
				continue
			}
			records[id] = rec
		}
		if kv.Key == unionKey {
			rev = kv.ModRevision
			if err := json.Unmarshal(kv.Value, &u); err != nil {
				return fmt.Errorf("decode %s: %w", unionKey, err)
			}
		}
	}
	var b *spiffebundle.Bundle
	var sequence uint64
	if u.Bundle != nil {
		var err error
		if b, err = bundle.Parse(r.td, u.Bundle); err != nil {
			return fmt.Errorf("decode %s: %w", unionKey, err)
		}
		sequence, _ = b.SequenceNumber()
	}
	r.mu.Lock()
	leave := map[string]uint64{}
	for _, authority := range u.Leave {
		if leave[authority] = r.leave[authority]; leave[authority] == 0 {
			leave[authority] = sequence
		}
	}
	r.leave = leave
	r.add(revoked)
	r.records, r.union, r.unionRev, r.rotation, r.revoked = records, u, rev, order, revoked
	r.mu.Unlock()
	kick(r.dirty)
	kick(r.told)
	if err := r.keep(revoked); err != nil {
		return err
	}
	if b == nil {
		return nil // gone from etcd: the last good one stays, and the leader writes it again
	}
	if err := r.bundles.Set(r.td, b, "replicas"); err != nil && !errors.Is(err, bundle.ErrStale) {
		return fmt.Errorf("own bundle: %w", err)
	}
	r.include(b)
	if c := r.authority.Active(); c != nil && !b.HasX509Authority(c) && r.othersSign(b, nil) {
		return r.authority.Rejoin() // and Run publishes it
	}
	return nil
}

// othersSign reports whether another replica, of those that are here if that is said, has a root in b that signs.
func (r *roots) othersSign(b *spiffebundle.Bundle, here map[string]bool) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for id, rec := range r.records {
		if id != r.replicas.self.ID && (here == nil || here[id]) && r.now().Before(rec.Until) && slices.ContainsFunc(b.X509Authorities(), func(c *x509.Certificate) bool {
			return len(rec.Active) > 0 && bytes.Equal(c.SubjectKeyId, rec.Active)
		}) {
			return true
		}
	}
	return false
}

// include notes the first bundle in which all own roots are.
func (r *roots) include(b *spiffebundle.Bundle) {
	own := r.authority.Bundle()
	sequence, _ := own.SequenceNumber()
	for _, c := range own.X509Authorities() {
		if !b.HasX509Authority(c) {
			return
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.included[0] != sequence {
		r.included[0] = sequence
		r.included[1], _ = b.SequenceNumber()
	}
}

// Included is the sequence of the first bundle that has all roots of this replica, as of its own sequence; 0 if none has yet.
func (r *roots) Included(own uint64) uint64 {
	if b, ok := r.bundles.Get(r.td); ok {
		r.include(b)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.included[0] != own {
		return 0
	}
	return r.included[1]
}

// merging makes the bundle while this replica leads.
func (r *roots) merging(ctx context.Context) {
	tick := time.NewTicker(min(r.life/20, time.Minute))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-r.dirty:
		case <-tick.C:
		}
		if !r.replicas.leads() {
			continue
		}
		if err := errors.Join(r.decide(ctx), r.merge(ctx)); err != nil && ctx.Err() == nil {
			r.log.Warn("the bundle of all replicas is not made; tried again", "err", err)
			pause(ctx, 200*time.Millisecond)
			kick(r.dirty)
		}
	}
}

// merge writes the bundle if it is not what the replicas' roots make, and forgets replicas that are gone for good.
func (r *roots) merge(ctx context.Context) error {
	r.mu.Lock()
	records, was, rev, revoked := maps.Clone(r.records), r.union, r.unionRev, r.revoked
	r.mu.Unlock()
	alive := map[string]bool{}
	for _, x := range *r.replicas.seen.Load() {
		alive[x.ID] = true
	}
	b, from, gone := joinRoots(r.td, records, revoked, alive, r.now())
	leave := slices.Sorted(maps.Keys(revoked))
	kv := etcd.NewKV(r.leader, "")
	for _, id := range gone {
		r.log.Info("a replica is gone for good, its roots have left the bundle", "replica", records[id].Name, "id", id)
		if err := kv.Delete(ctx, rootsPath+id); err != nil {
			return err
		}
		if err := etcd.DeletePrefix(ctx, r.leader, replicasPath+id+"/"); err != nil {
			return err
		}
	}
	if len(b.X509Authorities()) == 0 {
		return errors.New("no replica has said what its roots are")
	}
	var sequence uint64
	if was.Bundle != nil {
		old, err := bundle.Parse(r.td, was.Bundle)
		if err != nil {
			return fmt.Errorf("decode %s: %w", unionKey, err)
		}
		if old.X509Bundle().Equal(b.X509Bundle()) && old.JWTBundle().Equal(b.JWTBundle()) && maps.Equal(was.From, from) && slices.Equal(was.Leave, leave) {
			return nil
		}
		sequence, _ = old.SequenceNumber()
	}
	if have, ok := r.bundles.Get(r.td); ok { // also where etcd is younger than that
		n, _ := have.SequenceNumber()
		sequence = max(sequence, n)
	}
	b.SetSequenceNumber(max(sequence+1, uint64(max(r.now().Unix(), 0))))
	raw, err := b.Marshal()
	if err != nil {
		return fmt.Errorf("encode the bundle: %w", err)
	}
	value, err := json.Marshal(union{Bundle: raw, From: from, Leave: leave})
	if err != nil {
		return err
	}
	ok, _, err := kv.CompareAndPut(ctx, unionKey, value, rev)
	if err != nil {
		return err
	}
	if !ok {
		return errors.New("it was changed meanwhile")
	}
	n, _ := b.SequenceNumber()
	r.log.Info("bundle made of the roots of all replicas", "replicas", len(from), "sequence", n)
	return nil
}

// joinRoots makes the bundle of what the replicas have said, without what is revoked. Roots of one that is not alive are in it until what it
// signed has expired; one that has none left is gone.
func joinRoots(td spiffeid.TrustDomain, records map[string]rootsRecord, revoked map[string]revocation, alive map[string]bool, now time.Time) (b *spiffebundle.Bundle, from map[string]uint64, gone []string) {
	b, from = spiffebundle.New(td), map[string]uint64{}
	out := map[string]bool{}
	for _, v := range revoked {
		if v.Revoked {
			out[v.Authority], out[v.JWTKeyID] = true, true
		}
	}
	for _, id := range slices.Sorted(maps.Keys(records)) {
		rec := records[id]
		own, err := bundle.Parse(td, rec.Bundle)
		if err != nil {
			continue // of a version that this one cannot read: its own business until it expires
		}
		if !alive[id] && !now.Before(rec.Until) {
			gone = append(gone, id)
			continue
		}
		from[id], _ = own.SequenceNumber()
		for _, c := range own.X509Authorities() {
			if now.Before(c.NotAfter) && !out[bundle.AuthorityID(c)] {
				b.AddX509Authority(c)
			}
		}
		for kid, key := range own.JWTAuthorities() {
			if out[kid] {
				continue
			}
			if err := b.AddJWTAuthority(kid, key); err != nil {
				continue // an empty key ID
			}
		}
		hint, _ := own.RefreshHint()
		if have, ok := b.RefreshHint(); hint > 0 && (!ok || hint < have) {
			b.SetRefreshHint(hint)
		}
	}
	return b, from, gone
}

// signs reports, by replica's ID, which replicas' roots sign.
func (r *roots) signs() map[string]bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := map[string]bool{}
	for id, rec := range r.records {
		out[id] = len(rec.Active) > 0
	}
	return out
}

// addresses are those of the federation listeners of all replicas, also of those that are away.
func (r *roots) addresses() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := slices.Clone(r.replicas.self.Addresses)
	for _, rec := range r.records {
		out = append(out, rec.Addresses...)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func kick(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
