package main

import (
	"context"
	"encoding/json"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/hanse-mesh/hanse/federation/etcd"
	"github.com/hanse-mesh/hanse/federation/storetest"
	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/identity/bundle"
)

// signing is the key ID of the root that signs; "" while none does.
func (s *signer) signing() string {
	for _, x := range s.authority.Roots() {
		if x.Phase == "active" {
			return x.KeyID
		}
	}
	return ""
}

func (s *signer) newSVID(t *testing.T) *x509svid.SVID {
	t.Helper()
	svid, err := s.authority.NewSVID(identity.ControlPlaneID(westTD), 0)
	if err != nil {
		t.Fatal(err)
	}
	return svid
}

// nobodyRests makes all of a replica's agents leave at once what they are told to leave.
func (s *signer) nobodyRests() { s.rests(func() []string { return nil }) }

func (s *signer) rests(f func() []string) {
	s.stop()
	s.resting = func(string, uint64) []string { return f() }
	s.run()
}

// bothSign starts two replicas.
func bothSign(t *testing.T, store etcd.Store, now func() time.Time) (one, two *signer) {
	t.Helper()
	one, two = newSigner(t, store, t.TempDir(), "one", now), newSigner(t, store, t.TempDir(), "two", now)
	one.acked.Store(true)
	two.acked.Store(true)
	thereAre(one, two)
	waitFor(t, "both sign", func() bool { return one.authority.Signs() && two.authority.Signs() })
	return one, two
}

// TestRotationOrdered: an order reaches every replica once, also one that was away; and while it is under way the same order again is no other one.
func TestRotationOrdered(t *testing.T) {
	store := storetest.NewMemory(1)
	var clock shifted
	one, two := bothSign(t, store, clock.now)

	two.stop()
	thereAre(one)
	was := map[*signer]string{one: one.signing(), two: two.signing()}
	one.acked.Store(false)
	number, err := one.orderRotation(t.Context(), false)
	if err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the replica that is there has begun", func() bool {
		behind, away := one.rotating(number)
		return len(one.authority.Roots()) == 2 && slices.Equal(behind, []string{"replica one"}) && slices.Equal(away, []string{"two"})
	})
	if again, err := one.orderRotation(t.Context(), false); err != nil || again != number {
		t.Errorf("the same again: rotation %d, %v; want %d", again, err, number)
	}
	one.acked.Store(true)
	waitFor(t, "it has rotated", func() bool { behind, _ := one.rotating(number); return len(behind) == 0 && one.signing() != was[one] })

	two = newSigner(t, store, two.dir, "two", clock.now)
	two.acked.Store(true)
	thereAre(one, two)
	waitFor(t, "the one that was away has rotated", func() bool { return two.signing() != "" && two.signing() != was[two] })
	waitFor(t, "it says so", func() bool { behind, away := one.rotating(number); return len(behind)+len(away) == 0 })
	for s, name := range map[*signer]string{one: "one", two: "two"} {
		before := s.signing()
		s.stop()
		again := newSigner(t, store, s.dir, name, clock.now)
		time.Sleep(300 * time.Millisecond)
		if again.signing() != before || len(again.authority.Roots()) != 2 {
			t.Errorf("replica %s has rotated once more after a restart: %d roots", name, len(again.authority.Roots()))
		}
		again.stop()
	}
}

// TestRotationForced: an order that is made urgent lets the same roots sign, not others.
func TestRotationForced(t *testing.T) {
	store := storetest.NewMemory(1)
	var clock shifted
	one := newSigner(t, store, t.TempDir(), "one", clock.now)
	thereAre(one)
	was := one.signing()
	number, err := one.orderRotation(t.Context(), false)
	if err != nil {
		t.Fatal(err)
	}
	root, err := one.begun(t.Context(), number)
	if err != nil || root.Phase != "prepared" {
		t.Fatalf("%+v %v", root, err)
	}
	time.Sleep(300 * time.Millisecond)
	if one.signing() != was {
		t.Fatal("a root that nobody has acknowledged signs")
	}
	if again, err := one.orderRotation(t.Context(), true); err != nil || again != number {
		t.Fatalf("made urgent: rotation %d, %v; want %d", again, err, number)
	}
	waitFor(t, "the root signs", func() bool { return one.signing() == root.KeyID })
	if err := one.authority.Prepare(); err != nil { // its own time has come: nobody forces that
		t.Fatal(err)
	}
	time.Sleep(300 * time.Millisecond)
	if one.signing() != root.KeyID {
		t.Error("a later rotation was forced, too")
	}
	two := newSigner(t, store, t.TempDir(), "two", clock.now)
	time.Sleep(300 * time.Millisecond)
	if two.authority.Signs() {
		t.Error("a replica that came after the order is forced to sign before anybody knows its root")
	}
}

// TestRevocationOfOneAway: the root of a replica that is away is left and taken out of the bundle; when it is back it does not sign with it.
func TestRevocationOfOneAway(t *testing.T) {
	store := storetest.NewMemory(1)
	var clock shifted
	one, two := bothSign(t, store, clock.now)
	root := two.authority.Active()
	authority, svid := bundle.AuthorityID(root), two.newSVID(t)
	waitFor(t, "it has said so", func() bool { x, _, _ := one.find(authority); return x.Phase == "active" })
	two.stop()
	thereAre(one)

	var mu sync.Mutex
	agents := []string{"spiffe://west.demo/hanse/agent/a"}
	one.rests(func() []string { mu.Lock(); defer mu.Unlock(); return agents })
	named, owner, ok := one.find(authority)
	if !ok || owner != two.replicas.self.ID || named.Phase != "active" {
		t.Fatalf("%+v of %s: %v", named, owner, ok)
	}
	if err := one.orderRevocation(t.Context(), named, owner, false); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "an agent is named", func() bool { return slices.Equal(one.leaving(authority), agents) })
	if left := one.left(); !left[named.KeyID] || !left[named.JWTKeyID] {
		t.Errorf("agents are told to leave %v", left)
	}
	time.Sleep(300 * time.Millisecond)
	if b, _ := one.bundles.Get(westTD); !b.HasX509Authority(root) {
		t.Error("it is revoked while an agent rests on it")
	}
	two = newSigner(t, store, two.dir, "two", clock.now)
	if two.authority.Signs() || !two.authority.Bundle().HasX509Authority(root) {
		t.Error("it came back and signs with a root that all are to leave, or has dropped it too early")
	}
	two.stop()

	before := one.bundles.Sequences()[westTD]
	mu.Lock()
	agents = nil
	mu.Unlock()
	waitFor(t, "the root leaves the bundle", func() bool { b, _ := one.bundles.Get(westTD); return !b.HasX509Authority(root) })
	b, _ := one.bundles.Get(westTD)
	if b.HasJWTAuthority(named.JWTKeyID) || one.bundles.Sequences()[westTD] <= before {
		t.Errorf("its JWT key stays, or the sequence does: %d, before %d", one.bundles.Sequences()[westTD], before)
	}
	if _, _, err := x509svid.Verify(svid.Certificates, b); err == nil {
		t.Error("what it signed is accepted")
	}

	two = newSigner(t, store, two.dir, "two", clock.now)
	two.nobodyRests()
	thereAre(one, two)
	if two.authority.Signs() || two.authority.Bundle().HasX509Authority(root) {
		t.Fatal("it came back and has the revoked root")
	}
	fresh := two.newSVID(t)
	if string(fresh.Certificates[0].AuthorityKeyId) != string(one.authority.Active().SubjectKeyId) {
		t.Error("the other one does not sign for it")
	}
	two.acked.Store(true)
	waitFor(t, "it signs with another root", two.authority.Signs)
	if err := one.orderRevocation(t.Context(), named, owner, true); err != nil {
		t.Fatal(err)
	}
	clock.shift(8 * 24 * time.Hour) // the root has expired
	waitFor(t, "it is forgotten", func() bool { kick(one.dirty); return len(store.Dump(revokedPath)) == 0 })
}

// refusing is a store that refuses as many writes of what replicas say of their roots.
type refusing struct {
	etcd.Store
	writes atomic.Int32
}

func (s *refusing) Txn(ctx context.Context, compares []etcd.Compare, ops []etcd.Op) (bool, etcd.Header, error) {
	for _, op := range ops {
		if strings.HasPrefix(op.Key, rootsPath) && s.writes.Add(-1) >= 0 {
			return false, etcd.Header{}, storetest.ErrCut
		}
	}
	return s.Store.Txn(ctx, compares, ops)
}

// TestObeyedIsSaidAgain: a replica whose word did not reach etcd says it again, though nothing has changed since.
func TestObeyedIsSaidAgain(t *testing.T) {
	store := &refusing{Store: storetest.NewMemory(1)}
	var clock shifted
	one := newSigner(t, store, t.TempDir(), "one", clock.now)
	one.acked.Store(true)
	thereAre(one)
	first := one.authority.Active()
	if _, err := one.orderRotation(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "it has rotated", func() bool { return !one.authority.Active().Equal(first) })
	var left atomic.Bool
	agents := []string{"spiffe://west.demo/hanse/agent/a"}
	one.rests(func() []string {
		if left.Load() {
			return nil
		}
		return agents
	})
	named, owner, _ := one.find(bundle.AuthorityID(first))
	if err := one.orderRevocation(t.Context(), named, owner, false); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "an agent is named", func() bool { return slices.Equal(one.leaving(named.Authority), agents) })
	store.writes.Store(1)
	left.Store(true)
	waitFor(t, "the root leaves the bundle", func() bool { b, _ := one.bundles.Get(westTD); return !b.HasX509Authority(first) })
	if store.writes.Load() >= 1 {
		t.Error("no write was refused")
	}
}

// TestRevocationForced: who rests on the root is not waited for; a decision that cannot be read is obeyed by its key.
func TestRevocationForced(t *testing.T) {
	store := storetest.NewMemory(1)
	var clock shifted
	one := newSigner(t, store, t.TempDir(), "one", clock.now)
	one.acked.Store(true)
	one.rests(func() []string { return []string{"spiffe://west.demo/hanse/agent/gone"} })
	thereAre(one)
	first := one.authority.Active()
	if _, err := one.orderRotation(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "it has rotated", func() bool { return !one.authority.Active().Equal(first) })
	named, owner, _ := one.find(bundle.AuthorityID(first))
	if err := one.orderRevocation(t.Context(), named, owner, false); err != nil {
		t.Fatal(err)
	}
	clock.shift(2 * agentSyncTime)
	time.Sleep(300 * time.Millisecond)
	if !one.authority.Bundle().HasX509Authority(first) {
		t.Fatal("revoked without force")
	}
	if err := one.orderRevocation(t.Context(), named, owner, true); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "it is revoked", func() bool {
		kick(one.dirty)
		b, _ := one.bundles.Get(westTD)
		return !one.authority.Bundle().HasX509Authority(first) && !b.HasX509Authority(first)
	})

	second := bundle.AuthorityID(one.authority.Active())
	if _, err := one.orderRotation(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "it has rotated again", func() bool { return bundle.AuthorityID(one.authority.Active()) != second })
	if _, err := etcd.NewKV(store, revokedPath).Put(t.Context(), second, json.RawMessage("{")); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "a damaged decision is obeyed", func() bool {
		b, _ := one.bundles.Get(westTD)
		return !inBundle(b, second)
	})
}
