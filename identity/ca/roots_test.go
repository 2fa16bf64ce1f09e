package ca_test

import (
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hanse-mesh/hanse/identity/ca"
)

// A root that a person prepared waits, though all have acknowledged it; old roots can be tainted and revoked, others not.
func TestRootsByHand(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		open := func() *ca.Authority {
			a, err := ca.Open(ca.Config{Dir: dir, TrustDomain: spiffeid.RequireTrustDomainFromString("west.demo"),
				Acked: func(uint64) (bool, []string) { return true, nil }})
			if err != nil {
				t.Fatal(err)
			}
			return a
		}
		a := open()
		must := func(err error) {
			t.Helper()
			if err != nil {
				t.Fatal(err)
			}
		}
		wrong := func(err, want error) {
			t.Helper()
			if !errors.Is(err, want) {
				t.Errorf("err = %v, want %v", err, want)
			}
		}
		must(a.PrepareHeld())
		a = open() // the hold outlives a restart
		go func() { _ = a.Run(t.Context()) }()
		time.Sleep(time.Hour)
		roots := a.Roots()
		if len(roots) != 2 || roots[0].Phase != "active" || roots[1].Phase != "prepared" {
			t.Fatalf("an hour after PrepareHeld: %+v", roots)
		}
		first, second := roots[0].KeyID, roots[1].KeyID
		wrong(a.ActivateRoot(first), ca.ErrWrongPhase)
		wrong(a.Taint(first), ca.ErrWrongPhase)
		wrong(a.Revoke(second), ca.ErrWrongPhase)
		wrong(a.Revoke("00"), ca.ErrUnknownRoot)
		must(a.ActivateRoot(second))
		seq := a.Sequence()
		must(a.Taint(first))
		if roots = a.Roots(); !roots[0].Tainted || roots[1].Tainted || a.Sequence() <= seq {
			t.Errorf("after Taint: %+v, sequence %d, was %d", roots, a.Sequence(), seq)
		}
		if roots = open().Roots(); !roots[0].Tainted {
			t.Errorf("after a restart: %+v", roots)
		}
		must(a.Revoke(first))
		if b := a.Bundle(); len(b.X509Authorities()) != 1 || len(b.JWTAuthorities()) != 1 {
			t.Errorf("after Revoke the bundle has %d and %d authorities", len(b.X509Authorities()), len(b.JWTAuthorities()))
		}
	})
}

// Rotate releases a root that a person held back, is patient as long as the active root allows, and a prepared root can be withdrawn.
func TestRotate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var acked atomic.Bool
		a, err := ca.Open(ca.Config{Dir: t.TempDir(), TrustDomain: spiffeid.RequireTrustDomainFromString("west.demo"),
			Acked: func(uint64) (bool, []string) { return acked.Load(), []string{"cluster east"} }})
		if err != nil {
			t.Fatal(err)
		}
		go func() { _ = a.Run(t.Context()) }()
		if err := a.PrepareHeld(); err != nil {
			t.Fatal(err)
		}
		first := a.Roots()[0]
		root, err := a.Rotate()
		if err != nil || root.Phase != "prepared" || root.Held {
			t.Fatalf("%+v, %v", root, err)
		}
		if want := first.Expires.Add(-42 * time.Hour); !a.Deadline().Equal(want) { // a quarter of 7 days
			t.Errorf("waits until %v, want %v", a.Deadline(), want)
		}
		if again, err := a.Rotate(); err != nil || again.KeyID != root.KeyID {
			t.Errorf("a second Rotate makes a second root: %+v, %v", again, err)
		}
		time.Sleep(time.Hour)
		if err := a.Withdraw(root.KeyID); err != nil || len(a.Roots()) != 1 {
			t.Fatalf("withdrawn: %v, %d roots", err, len(a.Roots()))
		}
		if err := a.Withdraw(first.KeyID); !errors.Is(err, ca.ErrWrongPhase) {
			t.Errorf("withdraws the active root: %v", err)
		}
		if root, err = a.Rotate(); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		acked.Store(true)
		time.Sleep(6 * time.Second)
		for _, r := range a.Roots() {
			if r.KeyID == root.KeyID && r.Phase != "active" || r.KeyID == first.KeyID && r.Phase != "old" {
				t.Errorf("acknowledged for 6s: %s is %s", r.KeyID, r.Phase)
			}
		}
	})
}
