package main

import (
	"log/slog"
	"testing"
	"time"

	"github.com/hanse-mesh/hanse/federation/etcd"
	"github.com/hanse-mesh/hanse/federation/storetest"
	"github.com/hanse-mesh/hanse/identity/bundle"
)

// TestPollsAreShared: who polls one replica's bundle endpoint is waited for by the other, and after a restart.
func TestPollsAreShared(t *testing.T) {
	store := storetest.NewMemory(1)
	kv := etcd.NewKV(store, "")
	replica := func() *controlPlane {
		bundles, err := bundle.Open(bundle.Config{TrustDomain: westTD})
		if err != nil {
			t.Fatal(err)
		}
		return &controlPlane{stores: &stores{own: store}, bundles: bundles, log: slog.New(slog.DiscardHandler)}
	}
	share := func(p *controlPlane) {
		t.Helper()
		if err := p.sharePolls(t.Context(), kv); err != nil {
			t.Fatal(err)
		}
	}
	one, two := replica(), replica()
	share(one)
	if left := store.Dump(polledKey); len(left) != 0 {
		t.Errorf("nobody has polled, and it says %v", left)
	}
	at := time.Now().Round(0)
	one.bundles.NotePolled(at)
	share(one)
	share(two)
	if got := two.bundles.Polled(); !got.Equal(at) {
		t.Errorf("the other replica says %v, want %v", got, at)
	}
	two.bundles.NotePolled(at.Add(pollsEvery / 2)) // not worth a write
	share(two)
	again := replica()
	share(again)
	if got := again.bundles.Polled(); !got.Equal(at) {
		t.Errorf("after a restart: %v, want %v", got, at)
	}
	if _, err := kv.Put(t.Context(), polledKey, []byte("damaged")); err != nil {
		t.Fatal(err)
	}
	share(one)
	share(again)
	if got := again.bundles.Polled(); !got.Equal(at) {
		t.Errorf("after damage: %v, want %v", got, at)
	}
}
