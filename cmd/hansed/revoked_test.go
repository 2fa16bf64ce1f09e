package main

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/hanse-mesh/hanse/federation/etcd"
	"github.com/hanse-mesh/hanse/federation/storetest"
)

// TestRevokedIsNotRestored puts a backup of etcd in force that was taken before a root was revoked: the revocation is written into it again.
func TestRevokedIsNotRestored(t *testing.T) {
	store := storetest.NewMemory(1)
	var clock shifted
	one, two := bothSign(t, store, clock.now)
	two.stop()
	thereAre(one)
	one.nobodyRests()
	stolen := namesOf(two.authority.Roots())[0]
	backup, _, err := etcd.NewKV(store, "").List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	if err := one.orderRevocation(t.Context(), stolen, two.replicas.self.ID, false); err != nil {
		t.Fatal(err)
	}
	has := func(s *signer) bool {
		b, ok := s.bundles.Get(westTD)
		for _, c := range two.authority.Bundle().X509Authorities() {
			if ok && b.HasX509Authority(c) {
				return true
			}
		}
		return false
	}
	waitFor(t, "the root is revoked", func() bool { return !has(one) })
	waitFor(t, "the disk has it", func() bool {
		one.mu.Lock()
		defer one.mu.Unlock()
		return one.kept[stolen.Authority].Revoked
	})
	one.stop()

	restored := storetest.NewMemory(2)
	for _, kv := range backup {
		if _, err := etcd.NewKV(restored, "").Put(t.Context(), kv.Key, kv.Value); err != nil {
			t.Fatal(err)
		}
	}
	again := newSigner(t, restored, one.dir, "one", clock.now)
	again.acked.Store(true)
	thereAre(again)
	stored := func() (v revocation) {
		value, _, err := etcd.NewKV(restored, revokedPath).Get(t.Context(), stolen.Authority)
		if err != nil || value != nil && json.Unmarshal(value, &v) != nil {
			t.Fatalf("%s: %v", value, err)
		}
		return v
	}
	waitFor(t, "the revocation is in etcd again", func() bool { return stored().Revoked })
	waitFor(t, "the root is in no bundle", func() bool { return !has(again) })
	if out, ok := again.ordered(stolen.Authority); !ok || !out.Revoked {
		t.Errorf("%+v %v", out, ok)
	}

	// What has expired is remembered by nobody.
	clock.shift(8 * 24 * time.Hour)
	kick(again.dirty)
	waitFor(t, "an expired root's revocation goes", func() bool { return stored().Authority == "" })
	time.Sleep(300 * time.Millisecond)
	if v := stored(); v.Authority != "" {
		t.Errorf("it comes back: %+v", v)
	}
}
