package etcd_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"

	"github.com/hanse-mesh/hanse/federation/etcd"
)

// TestExternalAway takes an external etcd away from many who watch it, and brings it back: one line says each, and all watch again.
func TestExternalAway(t *testing.T) {
	t.Parallel()
	e := startEmbedded(t, t.TempDir())
	kv, watch := e.Servers()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	serve := func(l net.Listener) (stop func()) {
		s := grpc.NewServer()
		pb.RegisterKVServer(s, kv)
		pb.RegisterWatchServer(s, watch)
		var done sync.WaitGroup
		done.Go(func() { _ = s.Serve(l) })
		return func() { s.Stop(); done.Wait() }
	}
	stop := serve(l)
	var out lockedBuffer
	log := slog.New(slog.NewTextHandler(&out, nil))
	x, err := etcd.DialExternal(t.Context(), etcd.ExternalConfig{Endpoints: []string{l.Addr().String()}, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	const watchers = 10
	var seen, again [watchers]atomic.Int64
	store := etcd.NewKV(x.Store(), "a/")
	ctx, cancel := context.WithCancel(t.Context())
	var all sync.WaitGroup
	for i := range watchers {
		all.Go(func() {
			for ctx.Err() == nil {
				err := store.Watch(ctx, "", func(all []etcd.KeyValue, _ int64) error {
					seen[i].Store(int64(len(all)))
					return nil
				})
				if ctx.Err() != nil {
					return
				}
				if !errors.Is(err, etcd.ErrAway) {
					t.Errorf("watcher %d: %v", i, err)
				}
				etcd.Again(ctx, log, fmt.Sprint("watcher ", i, " reads again"), err)
				again[i].Add(1)
				time.Sleep(10 * time.Millisecond)
			}
		})
	}
	defer all.Wait()
	defer cancel()
	every := func(what string, n [watchers]*atomic.Int64, least int64) {
		t.Helper()
		eventually(t, what, func() bool {
			for _, c := range n {
				if c.Load() < least {
					return false
				}
			}
			return true
		})
	}
	var sees, reads [watchers]*atomic.Int64
	for i := range watchers {
		sees[i], reads[i] = &seen[i], &again[i]
	}
	own := etcd.NewKV(e.Store(), "a/")
	put := func(key string) {
		t.Helper()
		if _, err := own.Put(t.Context(), key, []byte("v")); err != nil {
			t.Fatal(err)
		}
	}
	put("1")
	every("all see it", sees, 1)
	stop()
	every("all try again", reads, 5)
	if n := strings.Count(out.String(), "level=WARN"); n != 1 || !strings.Contains(out.String(), "etcd is away") {
		t.Errorf("%d lines:\n%s", n, &out)
	}
	put("2")
	if l, err = net.Listen("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	stop = serve(l)
	defer stop()
	every("all see what came meanwhile", sees, 2)
	eventually(t, "that it is there again is said", func() bool {
		n := strings.Count(out.String(), "etcd answers again")
		return n > 0 && n == strings.Count(out.String(), "level=WARN")
	})
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}
