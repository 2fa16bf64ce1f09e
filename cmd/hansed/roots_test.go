package main

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/hanse-mesh/hanse/federation/etcd"
	"github.com/hanse-mesh/hanse/federation/storetest"
	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/identity/bundle"
	"github.com/hanse-mesh/hanse/identity/ca"
)

var westTD = spiffeid.RequireTrustDomainFromString("west.demo")

// signer is one replica's authority over a shared store.
type signer struct {
	*roots
	dir   string
	acked atomic.Bool // everybody has its root
	run   func()
	stop  func()
}

// shifted is a clock.
type shifted struct{ atomic.Int64 }

func (s *shifted) now() time.Time        { return time.Now().Add(time.Duration(s.Load())) }
func (s *shifted) shift(d time.Duration) { s.Store(int64(d)) }

// thereAre says which replicas are there.
func thereAre(all ...*signer) {
	var list []replica
	for _, s := range all {
		list = append(list, s.replicas.self)
	}
	for _, s := range all {
		s.replicas.seen.Store(&list)
		kick(s.dirty)
	}
}

// newSigner starts a replica.
func newSigner(t *testing.T, store etcd.Store, dir, name string, now func() time.Time) *signer {
	t.Helper()
	cfg := &Config{Replica: name, DataDir: dir, Identity: Identity{X509Life: Duration{time.Hour}, RootLife: Duration{7 * 24 * time.Hour}}}
	id, err := replicaID(dir)
	if err != nil {
		t.Fatal(err)
	}
	r, err := newReplicas(cfg, &stores{own: store}, id, "v0", slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	r.office.Store(&office{leads: true, store: store}) // whoever writes the bundle first
	r.seen.Store(&[]replica{r.self})
	bundles, err := bundle.Open(bundle.Config{TrustDomain: westTD})
	if err != nil {
		t.Fatal(err)
	}
	s := &signer{dir: dir}
	s.roots = newRoots(&controlPlane{cfg: cfg, td: westTD, stores: &stores{own: store}, replicas: r, bundles: bundles, now: now, log: slog.New(slog.DiscardHandler)}, store)
	a, err := ca.Open(ca.Config{Dir: dir, TrustDomain: westTD, Replica: name, Join: true, Peers: s.roots, Until: s.Until, Now: now,
		Acked: func(own uint64) (bool, []string) { return s.acked.Load() && s.Included(own) > 0, nil }})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.enroll(t.Context(), a); err != nil {
		t.Fatal(err)
	}
	s.run = func() {
		ctx, cancel := context.WithCancel(context.Background())
		var running sync.WaitGroup
		for _, run := range []func(context.Context) error{s.Run, s.RunSigning, a.Run} {
			running.Go(func() {
				if err := run(ctx); err != nil {
					t.Error(err)
				}
			})
		}
		s.stop = func() {
			cancel()
			running.Wait()
			s.stop = func() {}
		}
	}
	s.run()
	t.Cleanup(func() { s.stop() })
	return s
}

func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not within 20s", what)
		}
	}
}

// TestRootsOfReplicas: the first replica signs at once, the next lets it sign until its own root is acknowledged; each one's SVIDs verify
// everywhere before it signs; and a replica that is gone for good takes its root with it, but not before what it signed has expired.
func TestRootsOfReplicas(t *testing.T) {
	store := storetest.NewMemory(1)
	var clock shifted
	one := newSigner(t, store, t.TempDir(), "one", clock.now)
	if !one.authority.Signs() {
		t.Fatal("the first replica does not sign")
	}
	two := newSigner(t, store, t.TempDir(), "two", clock.now)
	thereAre(one, two)
	if two.authority.Signs() {
		t.Fatal("the second replica signs before its root is acknowledged")
	}
	verify := func(what string, svid *x509svid.SVID, by ...*signer) {
		t.Helper()
		for _, s := range by {
			b, ok := s.bundles.Get(westTD)
			if !ok {
				t.Fatalf("%s: no bundle at %s", what, s.replicas.self.Name)
			}
			if id, _, err := x509svid.Verify(svid.Certificates, b); err != nil || id != svid.ID {
				t.Errorf("%s: at %s: %v", what, s.replicas.self.Name, err)
			}
		}
	}
	svid, err := two.authority.NewSVID(identity.ControlPlaneID(westTD), 0)
	if err != nil {
		t.Fatal("the second replica's SVID, signed by the first:", err)
	}
	if string(svid.Certificates[0].AuthorityKeyId) != string(one.authority.Active().SubjectKeyId) {
		t.Error("the second replica's SVID is not of the first one's root")
	}
	verify("signed for the second", svid, one, two)
	if j, err := two.authority.SignJWT(t.Context(), svid.ID, []string{"x"}, 0); err != nil || j.Token == "" {
		t.Errorf("a JWT-SVID, signed by the first: %v", err)
	}
	if left := store.Dump("signing/"); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}

	waitFor(t, "both roots are in the bundle of both", func() bool {
		a, _ := one.bundles.Get(westTD)
		b, _ := two.bundles.Get(westTD)
		return len(a.X509Authorities()) == 2 && len(a.JWTAuthorities()) == 2 && a.Equal(b)
	})
	if two.authority.Signs() {
		t.Error("the second replica signs before its root is acknowledged")
	}
	two.acked.Store(true)
	waitFor(t, "the second replica signs", two.authority.Signs)
	if svid, err = two.authority.NewSVID(identity.ControlPlaneID(westTD), 0); err != nil {
		t.Fatal(err)
	}
	if string(svid.Certificates[0].AuthorityKeyId) != string(two.authority.Active().SubjectKeyId) {
		t.Error("it is signed by the other one still")
	}
	verify("signed by the second", svid, one, two)

	// The second goes away.
	two.stop()
	thereAre(one)
	if !svid.Certificates[0].NotAfter.Before(two.Until()) {
		t.Errorf("signed until %s, and the others were told %s", svid.Certificates[0].NotAfter, two.Until())
	}
	clock.shift(40 * time.Hour)
	kick(one.dirty)
	time.Sleep(300 * time.Millisecond)
	if b, _ := one.bundles.Get(westTD); len(b.X509Authorities()) != 2 {
		t.Error("its root has left the bundle before all that it signed has expired")
	}
	clock.shift(49 * time.Hour)
	if err := one.publish(t.Context()); err != nil { // as it does every half life
		t.Fatal(err)
	}
	before := one.bundles.Sequences()[westTD]
	waitFor(t, "its root leaves", func() bool {
		kick(one.dirty)
		b, _ := one.bundles.Get(westTD)
		return len(b.X509Authorities()) == 1 && b.HasX509Authority(one.authority.Active())
	})
	if after := one.bundles.Sequences()[westTD]; after <= before {
		t.Errorf("the bundle's sequence went from %d to %d", before, after)
	}
	if left := store.Dump(rootsPath + two.replicas.self.ID); len(left) != 0 {
		t.Errorf("left behind of the second: %v", left)
	}

	// It comes back, and begins anew.
	old := two.authority.Active()
	two = newSigner(t, store, two.dir, "two", clock.now)
	thereAre(one, two)
	if two.authority.Signs() || two.authority.Bundle().HasX509Authority(old) {
		t.Error("a replica whose root has left the bundle signs with it")
	}
	two.acked.Store(true)
	waitFor(t, "it signs again", two.authority.Signs)
}

// TestRootsPromise: a replica that cannot tell the others how long it signs signs nothing that ends later.
func TestRootsPromise(t *testing.T) {
	store := &faultyStore{Store: storetest.NewMemory(1)}
	var clock shifted
	s := newSigner(t, store, t.TempDir(), "one", clock.now)
	s.stop()
	store.err = errors.New("etcd is away")
	clock.shift(47*time.Hour + 30*time.Minute)
	svid, err := s.authority.NewSVID(identity.ControlPlaneID(westTD), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if svid.Certificates[0].NotAfter.After(s.Until()) {
		t.Errorf("it signed until %s, and has promised %s", svid.Certificates[0].NotAfter, s.Until())
	}
	clock.shift(49 * time.Hour)
	if _, err := s.authority.NewSVID(identity.ControlPlaneID(westTD), time.Hour); !errors.Is(err, ca.ErrNotActive) {
		t.Errorf("it signs beyond what it promised: %v", err)
	}
}

// faultyStore refuses writes with err, if that is set.
type faultyStore struct {
	etcd.Store
	err error
}

func (f *faultyStore) Txn(ctx context.Context, c []etcd.Compare, ops []etcd.Op) (bool, etcd.Header, error) {
	if f.err != nil {
		return false, etcd.Header{}, f.err
	}
	return f.Store.Txn(ctx, c, ops)
}
