package etcd_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/hanse-mesh/hanse/federation/etcd"
	"github.com/hanse-mesh/hanse/federation/etcd/etcdpb"
)

// ready is a world with a synced mirror of n services.
func ready(t *testing.T, n int) *world {
	t.Parallel()
	w := newWorld(t)
	w.exporter.Set("all", services(n, "v0"))
	w.exporter.Set("peers/"+self, scopeList("all"))
	w.flush()
	w.startMirror()
	w.converge("all")
	eventually(t, "synced", func() bool { return w.mirror.Status().Synced })
	return w
}

// churn changes, adds and deletes random services until stop.
func (w *world) churn() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := 0; ctx.Err() == nil; i++ {
			name := fmt.Sprintf("s%04d", rand.IntN(300))
			change := map[string][]byte{"svc/shop/" + name: []byte("service"), "ep/shop/" + name + "/0": fmt.Appendf(nil, "churn %d", i)}
			if rand.IntN(4) == 0 {
				change = map[string][]byte{"svc/shop/" + name: nil, "ep/shop/" + name + "/0": nil}
			}
			update(w.exporter, change, 300, 0)
			time.Sleep(time.Millisecond)
		}
	})
	return func() {
		cancel()
		wg.Wait()
		w.flush()
	}
}

func (w *world) relists() int { return w.mirror.Status().Relists }

func TestPeerGoesAndComesBack(t *testing.T) {
	w := ready(t, 200)
	relists := w.relists()
	stop := w.churn()
	for range 5 {
		w.listener.stop()
		eventually(t, "loss noticed", func() bool { return !w.mirror.Status().Connected })
		w.listener.start()
		eventually(t, "back", func() bool { return w.mirror.Status().Connected })
	}
	stop()
	w.converge("all")
	if n := w.relists(); n != relists {
		t.Errorf("%d lists for mere reconnections", n-relists)
	}
}

func TestBlackHole(t *testing.T) {
	w := ready(t, 200)
	stop := w.churn()
	w.net.blackHole(true)
	eventually(t, "loss noticed", func() bool { return !w.mirror.Status().Connected })
	if got := imported(t, w.east.Store(), "all"); len(got) < 200 {
		t.Errorf("only %d keys are left while the peer is silent", len(got))
	}
	w.net.blackHole(false)
	stop()
	w.converge("all")
}

func TestCompactionPastTheMirror(t *testing.T) {
	w := ready(t, 200)
	relists := w.relists()
	w.net.blackHole(true)
	eventually(t, "loss noticed", func() bool { return !w.mirror.Status().Connected })
	stop := w.churn()
	time.Sleep(100 * time.Millisecond)
	stop()
	kv, err := w.west.Client().Get(t.Context(), "x")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.west.Client().Compact(t.Context(), kv.Header.Revision); err != nil {
		t.Fatal(err)
	}
	w.net.blackHole(false)
	w.converge("all")
	if w.relists() == relists {
		t.Error("not listed again")
	}
}

func TestMirrorKilledUnderLoad(t *testing.T) {
	w := ready(t, 200)
	relists := w.relists()
	stop := w.churn()
	for range 8 {
		time.Sleep(time.Duration(rand.IntN(40)) * time.Millisecond)
		w.stopMirror()
		w.startMirror()
	}
	eventually(t, "synced", func() bool { return w.mirror.Status().Synced })
	if n := w.relists(); n > relists {
		t.Errorf("%d lists after mere restarts", n)
	}
	stop()
	w.converge("all")
}

func TestTwoMirrors(t *testing.T) {
	w := ready(t, 200)
	second := w.newMirror()
	background(t, second.Run)
	stop := w.churn()
	time.Sleep(300 * time.Millisecond)
	stop()
	w.converge("all")
}

// restart runs change while nothing uses west's data directory.
func (w *world) restart(dir string, change func()) {
	w.listener.stop()
	w.stopExport()
	if err := w.west.Close(); err != nil {
		w.t.Fatal(err)
	}
	change()
	w.west = startEmbedded(w.t, dir)
}

func TestPeerWiped(t *testing.T) {
	w := ready(t, 200)
	dir := t.TempDir()
	w.restart(dir, func() {})
	w.serve()
	// the wiped peer is up but has not exported: nothing may go
	seen := w.mirror.Status().LastAnswer
	eventually(t, "the wiped peer answers", func() bool { return w.mirror.Status().LastAnswer.After(seen.Add(500 * time.Millisecond)) })
	if got := imported(t, w.east.Store(), "all"); len(got) != 400 {
		t.Fatalf("%d keys are left of an import whose peer exports nothing yet", len(got))
	}
	w.export()
	w.exporter.Set("all", services(120, "after the wipe"))
	w.exporter.Set("peers/"+self, scopeList("all"))
	w.flush()
	w.converge("all")
}

func TestPeerRestoredFromBackup(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	dir, backup := t.TempDir(), t.TempDir()
	w.restart(dir, func() {}) // so that the directory is known
	w.export()
	w.serve()
	w.exporter.Set("all", services(200, "v0"))
	w.exporter.Set("peers/"+self, scopeList("all"))
	w.flush()
	w.restart(dir, func() {
		if err := os.CopyFS(backup, os.DirFS(dir)); err != nil {
			t.Fatal(err)
		}
	})
	w.export()
	w.serve()
	w.exporter.Set("all", services(200, "lost by the restore"))
	w.flush()
	w.startMirror()
	w.converge("all")
	w.stopMirror()
	w.restart(backup, func() {})
	w.export()
	for i := range 30 { // beyond the revision that the mirror has seen
		w.exporter.Set("all", services(200, fmt.Sprint("new history ", i)))
		w.flush()
	}
	// of the revisions that were lost, one key is as the mirror has it, and none has changed since
	w.serve()
	w.startMirror()
	w.converge("all")
}

func TestQuota(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.quota = 40_000
	w.exporter.Set("all", services(100, "small"))
	w.exporter.Set("peers/"+self, scopeList("all"))
	w.flush()
	w.startMirror()
	w.converge("all")
	before := imported(t, w.east.Store(), "all")
	w.exporter.Set("all", services(100, strings.Repeat("large", 200)))
	w.flush()
	eventually(t, "quota alarm", func() bool { return strings.Contains(w.mirror.Status().Err, "quota") })
	if got := imported(t, w.east.Store(), "all"); len(got) != len(before) {
		t.Errorf("%d keys where %d were", len(got), len(before))
	}
	if st := w.mirror.Status(); st.Bytes > w.quota {
		t.Errorf("%d bytes of %d", st.Bytes, w.quota)
	}
	w.exporter.Set("all", services(100, "small again"))
	w.flush()
	w.converge("all")
	eventually(t, "no alarm", func() bool { return w.mirror.Status().Err == "" })
}

func TestPermissionDenied(t *testing.T) {
	w := ready(t, 100)
	w.allow("members", "acks", "peers/"+self)
	w.guard.Recheck()
	eventually(t, "denial noticed", func() bool { return strings.Contains(w.mirror.Status().Err, "permission denied") })
	if got := imported(t, w.east.Store(), "all"); len(got) != 200 {
		t.Errorf("%d keys are left", len(got))
	}
	eventually(t, "one denied scope is not a lost peer", func() bool {
		st := w.mirror.Status()
		return st.Connected && strings.HasPrefix(st.Err, "scope all: ")
	})
	w.allow("all", "members", "acks", "peers/"+self)
	w.exporter.Set("all", services(100, "after"))
	w.flush()
	w.converge("all")
}

func TestHeldSweep(t *testing.T) {
	w := ready(t, 100)
	w.stopMirror()
	w.stopExport()
	// half of the scope goes, and the peer's own count does not know of it
	for i := range 50 {
		if _, err := w.west.Client().Delete(t.Context(), fmt.Sprintf("%sall/ep/shop/s%04d/0", etcd.ExportPrefix, i)); err != nil {
			t.Fatal(err)
		}
	}
	kv, err := w.west.Client().Get(t.Context(), "x")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.west.Client().Compact(t.Context(), kv.Header.Revision); err != nil {
		t.Fatal(err)
	}
	w.startMirror()
	eventually(t, "held", func() bool { return w.mirror.Status().Held != "" })
	if got := imported(t, w.east.Store(), "all"); len(got) != 200 {
		t.Fatalf("%d keys are left", len(got))
	}
	// a restart of the mirror does not forget it
	w.stopMirror()
	w.startMirror()
	eventually(t, "held again", func() bool { return w.mirror.Status().Held != "" })
	if got := imported(t, w.east.Store(), "all"); len(got) != 200 {
		t.Fatalf("%d keys are left", len(got))
	}
	w.mirror.Accept()
	w.converge("all")
	eventually(t, "not held", func() bool { return w.mirror.Status().Held == "" })
}

func TestHeldSweepEndsWhenTheCountAgrees(t *testing.T) {
	w := ready(t, 10)
	w.stopMirror()
	w.stopExport()
	put := func(keys int64) {
		b, err := proto.Marshal(&etcdpb.Meta{Keys: keys, Complete: true})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.west.Client().Put(t.Context(), etcd.ExportPrefix+"all/meta", string(b)); err != nil {
			t.Fatal(err)
		}
	}
	put(20)
	if _, err := w.west.Client().Delete(t.Context(), etcd.ExportPrefix+"all/svc/shop/s0001"); err != nil {
		t.Fatal(err)
	}
	kv, err := w.west.Client().Get(t.Context(), "x")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.west.Client().Compact(t.Context(), kv.Header.Revision); err != nil {
		t.Fatal(err)
	}
	w.startMirror()
	eventually(t, "held", func() bool { return w.mirror.Status().Held != "" })
	put(19)
	w.converge("all")
	eventually(t, "not held", func() bool { return w.mirror.Status().Held == "" })
}

func TestCorruptDataDirectory(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	e, err := etcd.StartEmbedded(t.Context(), etcd.EmbeddedConfig{Dir: dir, Name: "west"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := etcd.NewKV(e.Store(), "").Put(t.Context(), "k", []byte("v")); err != nil {
		t.Fatal(err)
	}
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func(dir string) error{
		"database of rubbish": func(dir string) error {
			return os.WriteFile(dir+"/member/snap/db", []byte(strings.Repeat("rubbish ", 8192)), 0o600)
		},
		"database cut short": func(dir string) error { return os.Truncate(dir+"/member/snap/db", 100) },
		"log of rubbish": func(dir string) error {
			files, err := os.ReadDir(dir + "/member/wal")
			if err != nil {
				return err
			}
			for _, f := range files {
				if strings.HasSuffix(f.Name(), ".wal") {
					return os.WriteFile(dir+"/member/wal/"+f.Name(), []byte(strings.Repeat("rubbish ", 8192)), 0o600)
				}
			}
			return errors.New("no wal")
		},
		"database gone": func(dir string) error { return os.Remove(dir + "/member/snap/db") },
		"log gone":      func(dir string) error { return os.RemoveAll(dir + "/member/wal") },
		"all gone":      func(dir string) error { return os.RemoveAll(dir + "/member") },
		"not a directory": func(dir string) error {
			if err := os.RemoveAll(dir); err != nil {
				return err
			}
			return os.WriteFile(dir, nil, 0o600)
		},
	} {
		t.Run(name, func(t *testing.T) {
			broken := t.TempDir() + "/data"
			if err := os.CopyFS(broken, os.DirFS(dir)); err != nil {
				t.Fatal(err)
			}
			if err := spoil(broken); err != nil {
				t.Fatal(err)
			}
			e, err := etcd.StartEmbedded(t.Context(), etcd.EmbeddedConfig{Dir: broken, Name: "west"})
			if err == nil {
				_ = e.Close()
				t.Fatal("started")
			}
			var de *etcd.DataError
			if !errors.As(err, &de) || !strings.Contains(err.Error(), broken) || !strings.Contains(de.Hint(), broken) {
				t.Errorf("error %v does not name the directory and a way out", err)
			}
			t.Log(err)
		})
	}
	again := startEmbedded(t, dir)
	if v, _, err := etcd.NewKV(again.Store(), "").Get(t.Context(), "k"); string(v) != "v" || err != nil {
		t.Errorf("after a restart: %q %v", v, err)
	}
}

// TestKilled kills a writing process and starts again on what it leaves.
func TestKilled(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for i := range 3 {
		p := newProcess(t, dir)
		p.say("start data")
		if got := p.say("export 200 1 32 1"); got != "ok" {
			t.Fatal(got)
		}
		fmt.Fprintln(p.in, "flap 0 60000 32 1") // never answered
		time.Sleep(time.Duration(50+rand.IntN(200)) * time.Millisecond)
		if err := p.cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = p.cmd.Wait()
		e, err := etcd.StartEmbedded(t.Context(), etcd.EmbeddedConfig{Dir: dir + "/data", Name: "data"})
		if err != nil {
			t.Fatalf("after kill %d: %v", i, err)
		}
		keys := 0
		err = etcd.ReadExports(t.Context(), e.Store(), "", func(scope, _ string, _ []byte) error {
			if scope == "all" {
				keys++
			}
			return nil
		})
		if err != nil || keys != 400 {
			t.Errorf("after kill %d: %d keys, %v", i, keys, err)
		}
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	}
}
