package drill

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hanse-mesh/hanse/cmd/internal/admin"
)

// TestAReplicaObeys: the drill of the replica that leads has its faults at the other one too, as long as it is renewed; its end ends them;
// and the next leader ends what the one before has left.
func TestAReplicaObeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		var wg sync.WaitGroup
		defer wg.Wait()
		defer cancel()
		store := &memory{values: map[string][]byte{}}
		var leader atomic.Int32
		var engines [2]*Engine
		var alive [2]atomic.Bool
		start := func(i int32) {
			e := engine(store)
			e.cfg.Leads = func() bool { return leader.Load() == i && alive[i].Load() }
			e.cfg.ControlPlane, e.cfg.Store = &memory{}, mortal{store, &alive[i]}
			engines[i] = e
			alive[i].Store(true)
			wg.Go(func() {
				if err := e.Run(ctx); err != nil {
					t.Error(err)
				}
			})
			wg.Go(func() { // as the watch of the store
				for ctx.Err() == nil {
					time.Sleep(100 * time.Millisecond)
					if all, err := store.List(ctx); err == nil {
						e.Follow(all)
					}
				}
			})
		}
		start(0)
		start(1)
		faults := func(i int) int { return len(engines[i].Faults([]string{"127.0.1.11"}, false).Faults) }
		run := func(i int, mode string, length float64) string {
			t.Helper()
			id, err := engines[i].Start(ctx, complete(t, admin.DrillSpec{Mode: mode, For: length, Scope: admin.DrillScope{Service: "shop/payments", Zone: "eu-1a"}}))
			if err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
			return id
		}
		time.Sleep(time.Second)

		id := run(0, Blackhole, 30)
		f := engines[1].Faults([]string{"127.0.1.11"}, false).Faults
		if len(f) != 1 || f[0].Drill != id || f[0].Mode != Blackhole || f[0].End.AsDuration() > 29500*time.Millisecond || f[0].End.AsDuration() < 28*time.Second {
			t.Fatalf("faults at the replica that follows: %v", f)
		}
		renewal := f[0].Renewal
		time.Sleep(20 * time.Second) // longer than a lease
		if f := engines[1].Faults([]string{"127.0.1.11"}, false).Faults; len(f) != 1 || f[0].Renewal <= renewal {
			t.Errorf("it is not renewed at the replica that follows: %v", f)
		}
		if d, _, _, err := engines[1].Get(id); err != nil || d.State != "running" {
			t.Errorf("the replica that follows shows %+v %v", d, err)
		}
		time.Sleep(20 * time.Second)
		if faults(0) != 0 || faults(1) != 0 {
			t.Error("it does not end")
		}

		if err := engines[0].Stop(run(0, Blackhole, 300)); err != nil {
			t.Error(err)
		}
		time.Sleep(time.Second)
		if faults(1) != 0 {
			t.Error("stopped, it goes on at the replica that follows")
		}
		time.Sleep(time.Minute)

		// The leader dies, and nobody follows it: the lease ends the drill.
		id = run(0, Blackhole, 300)
		alive[0].Store(false)
		time.Sleep(10 * time.Second)
		if faults(1) != 1 {
			t.Error("it has ended before its lease")
		}
		time.Sleep(10 * time.Second)
		if faults(1) != 0 {
			t.Error("nobody renews it, and it goes on")
		}

		// Another one leads and ends it for good.
		leader.Store(1)
		time.Sleep(2 * time.Second)
		if d, _, final, err := engines[1].Get(id); err != nil || !final || d.State != "aborted" || d.Reason != deposed {
			t.Errorf("the next leader shows %+v %v %v", d, final, err)
		}
		other := engine(store)
		other.cfg.Leads = func() bool { return false }
		if err := other.load(ctx); err != nil {
			t.Fatal(err)
		}
		if d, _, _, err := other.Get(id); err != nil || d.State != "aborted" {
			t.Errorf("stored is %+v %v", d, err)
		}

		// A drill of the control plane itself silences all replicas.
		silence := complete(t, admin.DrillSpec{Mode: SilenceControlPlane, For: 20})
		if _, err := engines[1].Start(ctx, silence); err != nil {
			t.Fatal(err)
		}
		all, err := store.List(ctx)
		if err != nil {
			t.Fatal(err)
		}
		other.Follow(all)
		if got := time.Duration(store.silenced.Load()); got < 19*time.Second || got > 20*time.Second {
			t.Errorf("the replica that follows is silent for %s", got)
		}
	})
}

// mortal is a store to which the dead do not write.
type mortal struct {
	*memory
	alive *atomic.Bool
}

func (m mortal) Put(ctx context.Context, id string, v []byte) error {
	if !m.alive.Load() {
		return errors.New("not the leader any more")
	}
	return m.memory.Put(ctx, id, v)
}
