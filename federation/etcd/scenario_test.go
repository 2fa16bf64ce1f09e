package etcd_test

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hanse-mesh/hanse/federation"
	"github.com/hanse-mesh/hanse/federation/etcd"
	"github.com/hanse-mesh/hanse/federation/storetest"
)

// bubble is west and east in memory, with the real timers on a fake clock.
type bubble struct {
	t          *testing.T
	west, east *storetest.Memory
	link       *storetest.Link
	exporter   *etcd.Exporter
	mirror     *etcd.Mirror
	stopExport func()
}

// export starts an Exporter, which must be told what to export.
func (b *bubble) export() {
	b.exporter = etcd.NewExporter(etcd.ExporterConfig{Store: b.west, Log: testLog(b.t)})
	b.stopExport = b.run(b.exporter.Run)
}

func (b *bubble) run(f func(context.Context) error) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := f(ctx); err != nil {
			b.t.Errorf("Run: %v", err)
		}
	}()
	return func() {
		cancel()
		<-done
	}
}

func (b *bubble) converged() bool {
	return maps.Equal(data(b.west, "all"), b.imported())
}

func (b *bubble) imported() map[string]string {
	m := map[string]string{}
	p := etcd.ImportPrefix + "west/all/data/"
	for k, v := range b.east.Dump(p) {
		m[k[len(p):]] = v
	}
	return m
}

func inBubble(t *testing.T, f func(t *testing.T, b *bubble)) {
	synctest.Test(t, func(t *testing.T) {
		b := &bubble{t: t, west: storetest.NewMemory(1), east: storetest.NewMemory(2)}
		b.link = storetest.NewLink(b.west)
		b.export()
		b.exporter.Set("all", services(50, "v1"))
		b.exporter.Set("peers/"+self, scopeList("all"))
		defer func() { b.stopExport() }()
		b.mirror = etcd.NewMirror(etcd.MirrorConfig{Peer: "west", Self: self, Local: b.east, Log: testLog(t),
			Dial: func(context.Context) (etcd.Remote, error) { return b.link, nil }})
		defer b.run(b.mirror.Run)()
		time.Sleep(10 * time.Second)
		if !b.converged() || !b.mirror.Status().Synced {
			t.Fatalf("not synced: %+v", b.mirror.Status())
		}
		f(t, b)
	})
}

// until returns how long a condition takes to become true.
func (b *bubble) until(what string, cond func() bool) time.Duration {
	b.t.Helper()
	start := time.Now()
	for !cond() {
		if time.Since(start) > 5*time.Minute {
			b.t.Fatalf("not in 5 min: %s", what)
		}
		time.Sleep(10 * time.Millisecond)
	}
	return time.Since(start)
}

func TestDetectionTimes(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bubble) {
		lost := func() bool { return !b.mirror.Status().Connected }
		b.link.Cut()
		if d := b.until("reset noticed", lost); d > time.Second {
			t.Errorf("a reset was noticed after %s", d)
		}
		time.Sleep(time.Minute)
		b.link.Heal()
		b.exporter.Set("all", services(50, "v2"))
		if d := b.until("flow after reset", b.converged); d > 7*time.Second {
			t.Errorf("flow %s after a reset", d)
		}
		b.until("synced", func() bool { return b.mirror.Status().Synced })
		b.link.BlackHole()
		if d := b.until("black hole noticed", lost); d > 16*time.Second {
			t.Errorf("a black hole was noticed after %s", d)
		}
		before := b.imported()
		time.Sleep(10 * time.Minute)
		if !maps.Equal(before, b.imported()) {
			t.Error("silence has changed the imports")
		}
		b.exporter.Set("all", services(50, "v3"))
		b.link.Heal()
		if d := b.until("flow after black hole", b.converged); d > 7*time.Second {
			t.Errorf("flow %s after a black hole", d)
		}
		if st := b.mirror.Status(); st.Relists != 4 {
			t.Errorf("%d lists: want one of each scope", st.Relists)
		}
	})
}

func TestWipeUnderTheStream(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bubble) {
		// as a stock client would see it that resumes by itself: the revision is low, then passes the mirror's
		for i := range 3 {
			b.stopExport()
			b.west.Wipe()
			time.Sleep(time.Minute)
			if got := b.imported(); len(got) != 100 {
				t.Fatalf("%d keys are left of an import whose peer exports nothing yet", len(got))
			}
			kv := etcd.NewKV(b.west, "")
			for j := range 400 * (i % 2) {
				if _, err := kv.Put(t.Context(), "other", fmt.Append(nil, j)); err != nil {
					t.Fatal(err)
				}
			}
			b.export()
			b.exporter.Set("all", services(50, fmt.Sprint("epoch ", i)))
			b.exporter.Set("peers/"+self, scopeList("all"))
			if d := b.until("new epoch", b.converged); d > 7*time.Second {
				t.Errorf("a wiped peer's new export came after %s", d)
			}
		}
	})
}

func TestRestoredBackups(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bubble) {
		set := func(what string, n int) {
			b.exporter.Set("all", services(n, what))
			if err := b.exporter.Flush(context.Background()); err != nil {
				t.Error(err)
			}
		}
		for i := range 20 {
			backup := b.west.Backup()
			for j := range rand.IntN(4) {
				set(fmt.Sprintf("lost %d %d", i, j), 50)
			}
			time.Sleep(time.Duration(rand.IntN(100)) * time.Second)
			if rand.IntN(2) == 0 {
				b.link.Cut()
				time.Sleep(time.Duration(rand.IntN(20)) * time.Second)
			}
			b.stopExport()
			b.west.Restore(backup)
			b.export()
			for j := range rand.IntN(6) {
				set(fmt.Sprintf("kept %d %d", i, j), 49+i%2)
			}
			b.link.Heal()
			b.until("the restored history is mirrored", b.converged)
		}
	})
}

func TestDeposedMirrorWritesNothing(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bubble) {
		second := etcd.NewMirror(etcd.MirrorConfig{Peer: "west", Self: self, Local: b.east, Log: testLog(t),
			Dial: func(context.Context) (etcd.Remote, error) { return b.link, nil }})
		defer b.run(second.Run)()
		for i := range 50 {
			b.exporter.Set("all", services(50-i%3, fmt.Sprint("two ", i)))
			time.Sleep(time.Duration(rand.IntN(300)) * time.Millisecond)
		}
		b.until("both agree", b.converged)
		time.Sleep(time.Minute)
		if !b.converged() {
			t.Error("diverged afterwards")
		}
	})
}

func TestOneBadObjectStopsNothing(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bubble) {
		kv := etcd.NewKV(b.west, etcd.ExportPrefix)
		put := func(key string, value []byte) {
			t.Helper()
			if _, err := kv.Put(t.Context(), key, value); err != nil {
				t.Fatal(err)
			}
		}
		put("all/svc/shop/s0001", make([]byte, 2<<20))
		put("all/svc/shop/"+strings.Repeat("x", 5000), nil)
		put("peers/"+self+"/scopes", []byte("rubbish"))
		time.Sleep(time.Second)
		put("all/svc/shop/s0002", []byte("after"))
		b.until("others go on", func() bool { return b.imported()["svc/shop/s0002"] == "after" })
		got := b.imported()
		if got["svc/shop/s0001"] != "service v1" || len(got) != 100 {
			t.Errorf("%d keys; the last good state is %.20q", len(got), got["svc/shop/s0001"])
		}
		if st := b.mirror.Status(); !st.Connected || !strings.Contains(st.Err, "scope list") {
			t.Errorf("status %+v", st)
		}
		put("peers/"+self+"/scopes", scopeList("all").Keys["scopes"])
		b.until("no fault", func() bool { return b.mirror.Status().Err == "" })
	})
}

func TestPlannedRestartIsSeen(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bubble) {
		if err := b.exporter.AnnounceRestart(t.Context(), time.Minute); err != nil {
			t.Fatal(err)
		}
		b.until("announced", func() bool { return b.mirror.Status().PlannedRestart == time.Minute })
	})
}

func TestFollowImports(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bubble) {
		type call struct {
			changes  []federation.Change
			complete bool
		}
		calls := make(chan call, 100)
		follow := func(ctx context.Context) error {
			err := etcd.FollowImports(ctx, b.east, "west", func(changes []federation.Change, complete bool) {
				calls <- call{slices.Clone(changes), complete}
			})
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		view := map[string]string{}
		apply := func() (n int, complete bool) {
			time.Sleep(time.Second)
			for {
				select {
				case c := <-calls:
					n, complete = n+len(c.changes), c.complete
					for _, c := range c.changes {
						if c.Revision == 0 {
							t.Errorf("change %+v", c)
						}
						if c.Scope != "all" {
							continue
						}
						if delete(view, c.Key); c.Value != nil {
							view[c.Key] = string(c.Value)
						}
					}
				default:
					return n, complete
				}
			}
		}
		stop := b.run(follow)
		if n, complete := apply(); n != 101 || !complete || !maps.Equal(view, b.imported()) {
			t.Errorf("%d changes at first, %d keys, complete %t", n, len(view), complete)
		}
		update(b.exporter, map[string][]byte{"svc/shop/s0001": nil, "svc/shop/s0002": []byte("x")}, 50, 0)
		time.Sleep(time.Second)
		if n, complete := apply(); n != 2 || !complete || !maps.Equal(view, b.imported()) {
			t.Errorf("%d changes of 2, complete %t", n, complete)
		}
		many := map[string][]byte{}
		for i := range 2500 {
			many[fmt.Sprintf("ep/shop/s0005/%d", i)] = []byte("x")
		}
		update(b.exporter, many, 50, 0)
		time.Sleep(5 * time.Second)
		apply()
		stop()
		clear(view) // as whoever calls again
		stop = b.run(follow)
		parts := 0
		time.Sleep(time.Second)
		for len(calls) > 0 {
			c := <-calls
			parts++
			if c.complete != (parts == 3) {
				t.Errorf("part %d: complete %t", parts, c.complete)
			}
			for _, c := range c.changes {
				if c.Scope == "all" {
					view[c.Key] = string(c.Value)
				}
			}
		}
		if parts != 3 || !maps.Equal(view, b.imported()) {
			t.Errorf("%d parts, %d keys; want 3 and %d", parts, len(view), len(b.imported()))
		}
		peers, err := etcd.ImportedPeers(t.Context(), b.east)
		if err != nil || !slices.Equal(peers, []string{"west"}) {
			t.Errorf("peers %v, %v", peers, err)
		}
		stop()
	})
}
