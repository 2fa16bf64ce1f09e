package ca_test

import (
	"errors"
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
