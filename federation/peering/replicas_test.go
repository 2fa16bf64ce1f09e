package peering_test

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/federation/etcd"
	"github.com/hanse-mesh/hanse/federation/peering"
	"github.com/hanse-mesh/hanse/federation/storetest"
)

// seat is one replica's part in an election that the test decides.
type seat struct {
	store  etcd.Store
	now    atomic.Pointer[peering.Role]
	change chan struct{}
	writes atomic.Int64 // that held, outside of mesh/ and replicas/
}

func newSeat(store etcd.Store) *seat {
	s := &seat{store: store}
	s.follow()
	return s
}

func (s *seat) play(r peering.Role) {
	old := s.change
	s.change = make(chan struct{})
	r.Changed = s.change
	if r.Store == nil {
		r.Store = &counted{s.store, s, nil}
	}
	s.now.Store(&r)
	if old != nil {
		close(old)
	}
}

func (s *seat) follow() { s.play(peering.Role{}) }

// lead makes it the leader from the etcd's point of view, by a new leader key, and from its own.
func (s *seat) lead(t *testing.T) {
	t.Helper()
	_, _, err := s.store.Txn(context.Background(), nil, []etcd.Op{{Key: "leader/x", Delete: true}})
	if err != nil {
		t.Fatal(err)
	}
	_, h, err := s.store.Txn(context.Background(), nil, []etcd.Op{{Key: "leader/x", Value: []byte("x")}})
	if err != nil {
		t.Fatal(err)
	}
	s.play(peering.Role{Leads: true, Store: &counted{s.store, s, &etcd.Compare{Key: "leader/x", Created: true, Revision: h.Revision}}})
}

// counted counts the writes of a replica, and refuses those of a deposed leader.
type counted struct {
	etcd.Store
	seat  *seat
	fence *etcd.Compare
}

func (c *counted) Txn(ctx context.Context, compares []etcd.Compare, ops []etcd.Op) (bool, etcd.Header, error) {
	if c.fence != nil {
		compares = append([]etcd.Compare{*c.fence}, compares...)
	}
	ok, h, err := c.Store.Txn(ctx, compares, ops)
	if err == nil && !ok && c.fence != nil {
		if kv, _, err := c.Get(ctx, c.fence.Key, 0); err == nil && (kv == nil || kv.CreateRevision != c.fence.Revision) {
			return false, h, etcd.ErrNotLeader
		}
	}
	if ok && !strings.HasPrefix(ops[0].Key, "mesh/") && !strings.HasPrefix(ops[0].Key, "replicas/") {
		c.seat.writes.Add(1)
	}
	return ok, h, err
}

// replicas makes a cluster of two control planes over one store; neither is started.
func (w *world) replicas(name string, n byte) (a, b *cluster, seats [2]*seat) {
	a = w.make(name, n)
	a.imports = a.own
	w.gateway(a, true)
	second := &cluster{w: w, name: name, self: a.self, address: name + "-2.test:7443", own: a.own, imports: a.own, fault: &faulty{Store: a.own},
		ca: a.ca, source: a.source, bundles: a.bundles, version: a.version, local: a.local, links: map[string]*storetest.Link{}}
	for i, c := range []*cluster{a, second} {
		s := newSeat(a.own)
		seats[i] = s
		c.role, c.replica = func() peering.Role { return *s.now.Load() }, fmt.Sprint("r", i+1)
	}
	return a, second, seats
}

func equalViews(t *testing.T, what string, a, b *cluster) {
	t.Helper()
	if diff := cmp.Diff(dump(t, a.mesh.Load().Clusterset()), dump(t, b.mesh.Load().Clusterset())); diff != "" {
		t.Errorf("%s: the replicas disagree:\n%s", what, diff)
	}
}

// TestReplicas: two control planes of one cluster over one store. Whoever leads, both come to the same Clusterset; a join through the one
// that follows works; a change of the leader loses nothing, and what a deposed leader writes is refused.
func TestReplicas(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		first, second, seats := w.replicas("west", 1)
		east := w.add("east")
		seats[0].lead(t)
		first.start()
		second.start()
		defer func() {
			if second.stop != nil {
				second.stop()
			}
		}()
		for _, c := range []*cluster{first, second} {
			c.mesh.Load().SetAddresses([]string{first.address, second.address})
			c.export(payments, 70)
		}
		east.export(payments, 30)
		settle(time.Second)

		// The token is made by the follower, and redeemed there.
		token, _, err := second.mesh.Load().CreateToken(t.Context(), "east", 0)
		if err != nil {
			t.Fatal(err)
		}
		first.stop() // the leader is away meanwhile
		if _, err := east.mesh.Load().Join(t.Context(), token, silent); err != nil {
			t.Fatalf("join through a follower: %v", err)
		}
		first.start()
		first.mesh.Load().SetAddresses([]string{first.address, second.address})
		settle(30 * time.Second)
		if got := len(second.mesh.Load().Clusterset().Imports.Get(payments).From); got != 2 {
			t.Fatalf("the follower imports from %d clusters, want itself and east", got)
		}
		equalViews(t, "after the join", first, second)
		if n := seats[1].writes.Load(); n != 0 {
			t.Errorf("the follower wrote %d times", n)
		}
		if r := east.mesh.Load().Status().Members[0].Record; len(r.Addresses) != 2 {
			t.Errorf("east knows the addresses %v of west, want both", r.Addresses)
		}

		// A change at a peer reaches both.
		east.export(payments, 31)
		settle(5 * time.Second)
		if got := len(second.mesh.Load().Clusterset().Imports.Get(payments).From[1].Endpoints); got != 31 {
			t.Errorf("the follower sees %d endpoints of east, want 31", got)
		}
		equalViews(t, "after a change", first, second)

		// Another one leads; the old one does not know it yet.
		exports, imports := first.own.Dump("exports/"), first.own.Dump("imports/")
		before := dump(t, second.mesh.Load().Clusterset())
		stale := seats[0].now.Load().Store
		seats[1].lead(t)
		if ok, _, err := stale.Txn(t.Context(), nil, []etcd.Op{{Key: "exports/v1/all/svc/x/y", Value: []byte("x")}}); ok || err == nil {
			t.Errorf("a deposed leader writes: %v %v", ok, err)
		}
		old := seats[0].writes.Load()
		east.export(payments, 32)
		settle(20 * time.Second)
		if n := seats[0].writes.Load(); n != old {
			t.Errorf("the deposed leader wrote %d times", n-old)
		}
		if seats[1].writes.Load() == 0 {
			t.Error("the new leader has written nothing")
		}
		east.export(payments, 31)
		settle(20 * time.Second)
		if diff := cmp.Diff(before, dump(t, second.mesh.Load().Clusterset())); diff != "" {
			t.Errorf("the new leader's view:\n%s", diff)
		}
		data := func(all map[string]string) map[string]string { // without bookkeeping
			out := map[string]string{}
			for k, v := range all {
				if strings.Contains(k, "/svc/") || strings.Contains(k, "/ep/") {
					out[k] = v
				}
			}
			return out
		}
		if diff := cmp.Diff(data(exports), data(first.own.Dump("exports/"))); diff != "" {
			t.Errorf("exports changed with the leader:\n%s", diff)
		}
		if diff := cmp.Diff(data(imports), data(first.own.Dump("imports/"))); diff != "" {
			t.Errorf("imports changed with the leader:\n%s", diff)
		}

		// The old one learns of it, and follows.
		seats[0].follow()
		settle(20 * time.Second)
		equalViews(t, "after the change of the leader", first, second)

		// A silent peer is suspect at both, as the leader has judged.
		w.partition("west", "east", true)
		second.link("east").BlackHole()
		settle(time.Minute)
		for i, c := range []*cluster{first, second} {
			if s := c.mesh.Load().Clusterset().Members["east"].State; s != discovery.Suspect {
				t.Errorf("east is %s at replica %d, want suspect", s, i+1)
			}
		}
		w.partition("west", "east", false)
		second.link("east").Heal()
		settle(time.Minute)
		equalViews(t, "after east is back", first, second)
		if s := first.mesh.Load().Clusterset().Members["east"].State; s != discovery.Fresh {
			t.Errorf("east is %s, want fresh", s)
		}

		// One alone goes on, as leader and as follower.
		second.stop()
		if got := len(first.mesh.Load().Clusterset().Imports.Get(payments).From); got != 2 {
			t.Errorf("without a leader the follower imports from %d clusters, want 2", got)
		}
		seats[0].lead(t)
		settle(20 * time.Second)
		east.export(payments, 33)
		settle(10 * time.Second)
		if got := len(first.mesh.Load().Clusterset().Imports.Get(payments).From[1].Endpoints); got != 33 {
			t.Errorf("the last replica sees %d endpoints of east, want 33", got)
		}
	})
}
