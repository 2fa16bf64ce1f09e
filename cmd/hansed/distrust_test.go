package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"log/slog"
	"math/big"
	"net/url"
	"reflect"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hanse-mesh/hanse/federation/etcd"
	"github.com/hanse-mesh/hanse/federation/storetest"
	"github.com/hanse-mesh/hanse/identity/bundle"
)

var eastTD = spiffeid.RequireTrustDomainFromString("east.demo")

// distrusting is the part of a replica that distrusts.
type distrusting struct {
	*distrusts
	obeys atomic.Bool
}

// severed is a store that cannot be written to while it is cut.
type severed struct {
	etcd.Store
	cut atomic.Bool
}

func (s *severed) Txn(ctx context.Context, c []etcd.Compare, ops []etcd.Op) (bool, etcd.Header, error) {
	if s.cut.Load() {
		return false, etcd.Header{}, errors.New("cut")
	}
	return s.Store.Txn(ctx, c, ops)
}

func newDistrusting(t *testing.T, id, dir string, store etcd.Store, others ...string) *distrusting {
	t.Helper()
	b, err := bundle.Open(bundle.Config{Dir: dir, TrustDomain: westTD})
	if err != nil {
		t.Fatal(err)
	}
	x := &distrusting{}
	x.obeys.Store(true)
	x.distrusts = &distrusts{kv: etcd.NewKV(store, distrustPath), marks: etcd.NewKV(store, replicasPath), id: id, bundles: b, log: slog.New(slog.DiscardHandler),
		pending: map[string]bundle.Distrust{}, confirmed: map[string]int64{}, retry: make(chan struct{}, 1), obeyed: func() bool { return x.obeys.Load() },
		others: func() (out []replica) {
			for _, o := range others {
				out = append(out, replica{ID: o, Name: o})
			}
			return out
		}}
	return x
}

func (d *distrusting) names() []string {
	out := []string{}
	for _, x := range d.bundles.Distrusted() {
		out = append(out, distrustKey(x))
	}
	return out
}

func runDistrusts(t *testing.T, all ...*distrusting) {
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(func() { cancel(); synctest.Wait() })
	for _, d := range all {
		if err := d.load(ctx); err != nil {
			t.Fatal(err)
		}
		go func() { _ = d.Run(ctx) }()
	}
}

// TestDistrustIsShared: what one replica is told, all obey; it is confirmed only when the proxies of each do; one that comes later, with
// nothing on its disk, obeys before it serves; and one undo is for all.
func TestDistrustIsShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := storetest.NewMemory(1)
		one, two := newDistrusting(t, "1", t.TempDir(), store, "2"), newDistrusting(t, "2", t.TempDir(), store, "1")
		two.obeys.Store(false)
		runDistrusts(t, one, two)
		rev, err := one.add(t.Context(), eastTD, "")
		if err != nil || rev == 0 {
			t.Fatalf("revision %d, %v", rev, err)
		}
		time.Sleep(time.Second)
		want := []string{"east.demo/*"}
		if got := two.names(); !reflect.DeepEqual(got, want) {
			t.Fatalf("the other replica distrusts %v, want %v", got, want)
		}
		if got := one.missing(rev); !reflect.DeepEqual(got, []string{"replica 2"}) {
			t.Errorf("missing %v, though a proxy of replica 2 has not obeyed", got)
		}
		two.obeys.Store(true)
		time.Sleep(time.Second)
		if got := one.missing(rev); got != nil {
			t.Errorf("missing %v", got)
		}
		if again, err := two.add(t.Context(), eastTD, ""); err != nil || again != rev {
			t.Errorf("the same again: revision %d, %v, want %d", again, err, rev)
		}

		three := newDistrusting(t, "3", t.TempDir(), store)
		if err := three.load(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := three.names(); !reflect.DeepEqual(got, want) {
			t.Errorf("a new replica distrusts %v before it serves, want %v", got, want)
		}

		if found, err := two.undo(t.Context(), eastTD, ""); err != nil || !found {
			t.Fatalf("undo: %v, %v", found, err)
		}
		time.Sleep(time.Second)
		if got := one.names(); len(got) != 0 {
			t.Errorf("%v is still distrusted after the undo", got)
		}
		if found, err := one.undo(t.Context(), eastTD, ""); err != nil || found {
			t.Errorf("undo of nothing: %v, %v", found, err)
		}
	})
}

// TestDistrustWithoutEtcd: a replica that cannot write obeys at once, says so, and tells the others later; nothing can be undone meanwhile.
func TestDistrustWithoutEtcd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		memory := storetest.NewMemory(1)
		broken := &severed{Store: memory}
		one, two := newDistrusting(t, "1", t.TempDir(), broken), newDistrusting(t, "2", t.TempDir(), memory)
		runDistrusts(t, one, two)
		broken.cut.Store(true)
		if rev, err := one.add(t.Context(), eastTD, ""); err != nil || rev != 0 {
			t.Fatalf("revision %d, %v", rev, err)
		}
		if len(one.names()) != 1 || len(two.names()) != 0 {
			t.Fatalf("one distrusts %v, two %v", one.names(), two.names())
		}
		broken.cut.Store(false)
		time.Sleep(10 * time.Second)
		if len(two.names()) != 1 || len(one.names()) != 1 {
			t.Fatalf("after etcd came back one distrusts %v, two %v", one.names(), two.names())
		}
		broken.cut.Store(true)
		if _, err := one.undo(t.Context(), eastTD, ""); err == nil || len(one.names()) != 1 {
			t.Errorf("an undo that etcd does not hear: %v, distrusted %v", err, one.names())
		}
	})
}

// TestDistrustOnDisk: what the disk of an earlier version has goes to etcd once; after that etcd decides, also for one that was away.
func TestDistrustOnDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, dir := storetest.NewMemory(1), t.TempDir()
		old, err := bundle.Open(bundle.Config{Dir: dir, TrustDomain: westTD})
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(old.Distrust(eastTD, ""), old.Distrust(eastTD, "0123456789")); err != nil {
			t.Fatal(err)
		}
		two := newDistrusting(t, "2", t.TempDir(), store)
		runDistrusts(t, newDistrusting(t, "1", dir, store), two)
		time.Sleep(10 * time.Second)
		if got := two.names(); len(got) != 2 {
			t.Fatalf("the other replica distrusts %v", got)
		}
		if found, err := two.undo(t.Context(), eastTD, "0123456789"); err != nil || !found {
			t.Fatalf("undo: %v, %v", found, err)
		}
		time.Sleep(time.Second)
		again := newDistrusting(t, "1", dir, store)
		if err := again.load(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := again.names(); !reflect.DeepEqual(got, []string{"east.demo/*"}) {
			t.Errorf("after a restart %v is distrusted", got)
		}
		// Whoever damages a decision does not get rid of it.
		if _, err := etcd.NewKV(store, distrustPath).Put(t.Context(), "east.demo/*", []byte("{")); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		if got := two.names(); !reflect.DeepEqual(got, []string{"east.demo/*"}) {
			t.Errorf("with a damaged record %v is distrusted", got)
		}
	})
}

// TestDistrustedStaysRefused: the bundle that comes later from the mesh does not bring back what any replica distrusts.
func TestDistrustedStaysRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := storetest.NewMemory(1)
		one, two := newDistrusting(t, "1", t.TempDir(), store), newDistrusting(t, "2", t.TempDir(), store)
		runDistrusts(t, one, two)
		if _, err := one.add(t.Context(), eastTD, ""); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
			KeyUsage: x509.KeyUsageCertSign, URIs: []*url.URL{eastTD.ID().URL()}}
		der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		root, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		b := spiffebundle.FromX509Authorities(eastTD, []*x509.Certificate{root})
		if err := (meshBundles{two.bundles}).Add(eastTD, b); err != nil {
			t.Fatal(err)
		}
		if _, err := two.bundles.GetX509BundleForTrustDomain(eastTD); err == nil {
			t.Error("a distrusted bundle is in force")
		}
		if _, err := one.undo(t.Context(), eastTD, ""); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		if _, err := two.bundles.GetX509BundleForTrustDomain(eastTD); err != nil {
			t.Errorf("after the undo: %v", err)
		}
	})
}
