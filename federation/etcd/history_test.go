package etcd_test

import (
	"bytes"
	"errors"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"

	"github.com/hanse-mesh/hanse/federation/etcd"
)

// serveEtcd serves an embedded etcd at an address, and makes another take its place.
func serveEtcd(t *testing.T, e *etcd.Embedded, at string) (addr string, stop func()) {
	t.Helper()
	kv, watch := e.Servers()
	l, err := net.Listen("tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	pb.RegisterKVServer(s, kv)
	pb.RegisterWatchServer(s, watch)
	var done sync.WaitGroup
	done.Go(func() { _ = s.Serve(l) })
	stop = sync.OnceFunc(func() { s.Stop(); done.Wait() })
	t.Cleanup(stop)
	return l.Addr().String(), stop
}

func fill(t *testing.T, e *etcd.Embedded, writes int) {
	t.Helper()
	for range writes {
		if _, err := etcd.NewKV(e.Store(), "").Put(t.Context(), "a", []byte("v")); err != nil {
			t.Fatal(err)
		}
	}
}

// TestRestored puts another etcd into the place of the one that was read: with a lower revision, with a higher one that another client has brought
// it to, and with what is as before. Nobody is given an answer of the other one.
func TestRestored(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		before, after int
		history       string // of the other one; as it was, if empty
		over          string
	}{
		"a lower revision":               {20, 3, "", "a lower revision"},
		"passed by what others wrote":    {3, 40, "another", "another history"},
		"with no history, and on beyond": {3, 40, "none", "another history"},
		"only away":                      {3, 40, "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			one, other := startEmbedded(t, t.TempDir()), startEmbedded(t, t.TempDir())
			fill(t, one, c.before)
			addr, stop := serveEtcd(t, one, "127.0.0.1:0")
			var out lockedBuffer
			cfg := etcd.ExternalConfig{Endpoints: []string{addr}, Log: slog.New(slog.NewTextHandler(&out, nil))}
			x, err := etcd.DialExternal(t.Context(), cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer x.Close()
			kv := etcd.NewKV(x.Store(), "")
			if _, _, err := kv.Get(t.Context(), "a"); err != nil || x.Restored() {
				t.Fatalf("restored: %v, %v", x.Restored(), err)
			}
			value, _, err := etcd.NewKV(one.Store(), "").Get(t.Context(), "history")
			if err != nil || len(value) != 32 {
				t.Fatalf("%q %v", value, err)
			}
			watch, err := x.Store().Watch(t.Context(), "a", 0)
			if err != nil {
				t.Fatal(err)
			}
			stop()
			if _, err := watch.Recv(); err == nil {
				t.Fatal("the stream goes on")
			}
			if c.history != "" {
				value = []byte(c.history)
			}
			if c.history != "none" {
				if _, err := etcd.NewKV(other.Store(), "").Put(t.Context(), "history", value); err != nil {
					t.Fatal(err)
				}
			}
			fill(t, other, c.after)
			if _, err := etcd.NewKV(other.Store(), "").Put(t.Context(), "b", []byte("other's")); err != nil {
				t.Fatal(err)
			}
			_, stop = serveEtcd(t, other, addr)
			defer stop()
			var got []byte
			eventually(t, "an answer", func() bool { got, _, err = kv.Get(t.Context(), "b"); return !errors.Is(err, etcd.ErrAway) })
			if c.over == "" {
				if err != nil || string(got) != "other's" {
					t.Errorf("%q %v", got, err)
				}
				return
			}
			if !errors.Is(err, etcd.ErrRestored) || !strings.Contains(err.Error(), c.over) || got != nil {
				t.Errorf("%q %v, want %q", got, err, c.over)
			}
			if _, err := kv.Put(t.Context(), "b", nil); !errors.Is(err, etcd.ErrRestored) {
				t.Errorf("a write: %v", err)
			}
			if _, err := x.Store().Watch(t.Context(), "b", 0); !errors.Is(err, etcd.ErrRestored) {
				t.Errorf("a watch: %v", err)
			}
			if err := x.Watchdog(t.Context()); !errors.Is(err, etcd.ErrRestored) {
				t.Errorf("the watchdog: %v", err)
			}
			if n := strings.Count(out.String(), "etcd was restored"); n != 1 {
				t.Errorf("said %d times:\n%s", n, &out)
			}

			// The next life knows of it, whether the last one found it or did not live to, and tells the others.
			for _, ended := range []bool{true, false} {
				cfg.History, cfg.Ended = x.History(), ended
				next, err := etcd.DialExternal(t.Context(), cfg)
				if err != nil {
					t.Fatal(err)
				}
				defer next.Close()
				if !next.Restored() {
					t.Errorf("ended %v: it is not seen", ended)
				}
				if v, _, err := etcd.NewKV(next.Store(), "").Get(t.Context(), "history"); err != nil || len(v) == 0 || bytes.Equal(v, []byte(cfg.History.Value)) {
					t.Errorf("ended %v: history is %q, was %q: %v", ended, v, cfg.History.Value, err)
				}
				cfg.History, cfg.Ended = next.History(), false
				again, err := etcd.DialExternal(t.Context(), cfg)
				if err != nil {
					t.Fatal(err)
				}
				defer again.Close()
				if again.Restored() {
					t.Error("it is found again and again")
				}
			}
		})
	}
}
