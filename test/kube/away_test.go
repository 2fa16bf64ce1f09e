package kube

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
	"k8s.io/client-go/rest"

	"github.com/hanse-mesh/hanse/discovery/objects"
)

// wire carries connections to a server, until it is cut.
type wire struct {
	net.Listener
	to string

	mu   sync.Mutex
	cut  bool                  // guarded by mu
	open map[net.Conn]struct{} // guarded by mu
}

func newWire(t testing.TB, to string) *wire {
	t.Helper()
	host, _, err := net.SplitHostPort(to) // the server's certificate is for that address
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		t.Fatal(err)
	}
	w := &wire{Listener: l, to: to, open: map[net.Conn]struct{}{}}
	var running sync.WaitGroup
	running.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			running.Go(func() { w.carry(c) })
		}
	})
	t.Cleanup(func() { l.Close(); w.set(true); running.Wait() })
	return w
}

func (w *wire) keep(c net.Conn) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.open[c] = struct{}{}
	return !w.cut
}

func (w *wire) carry(c net.Conn) {
	defer c.Close()
	if !w.keep(c) {
		return
	}
	to, err := net.DialTimeout("tcp", w.to, 5*time.Second)
	if err != nil {
		return
	}
	defer to.Close()
	if !w.keep(to) {
		return
	}
	go func() { _, _ = io.Copy(to, c); to.Close() }()
	_, _ = io.Copy(c, to)
	w.mu.Lock()
	delete(w.open, c)
	delete(w.open, to)
	w.mu.Unlock()
}

func (w *wire) set(cut bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.cut = cut; cut {
		for c := range w.open {
			c.Close()
		}
		clear(w.open)
	}
}

// TestWatchExpires: hansed is cut off; meanwhile objects come, change and go, etcd forgets the revisions between, and the API server is
// killed and starts again. Until the wire is mended all is as it was, then a list brings everything, and nothing that is gone stays.
func TestWatchExpires(t *testing.T) {
	t.Parallel()
	s := start(t)
	s.namespaces("shop")
	service := func(name string, port int) []byte {
		return fmt.Appendf(nil, "apiVersion: v1\nkind: Service\nmetadata: {name: %s, namespace: shop}\nspec: {ports: [{name: http, port: %d}]}\n", name, port)
	}
	s.apply(service("stays", 80))
	s.apply(service("changes", 80))
	s.apply(service("goes", 80))
	w := newWire(t, s.addr)
	src := sourceOf(t, &rest.Config{Host: "https://" + w.Addr().String(), BearerToken: "admintoken", TLSClientConfig: s.config.TLSClientConfig})
	port := func(name string) int {
		snap, _ := snapshot(t, src.Set())
		for n, svc := range snap.Services.All() {
			if n.Name == name {
				return int(svc.Ports[0].Number)
			}
		}
		return 0
	}
	until(t, "all is read", func() bool {
		return src.Complete() && port("stays") == 80 && port("changes") == 80 && port("goes") == 80
	})

	w.set(true)
	s.apply(service("changes", 81))
	s.apply(service("comes", 80))
	s.delete(services, "shop", "goes")
	s.kill()
	client := v3client.New(s.etcd.Server)
	defer client.Close()
	revision, err := client.Get(t.Context(), "none")
	if err == nil {
		_, err = client.Compact(t.Context(), revision.Header.Revision)
	}
	if err != nil {
		t.Fatal(err)
	}
	s.run()
	if port("changes") != 80 || port("goes") != 80 || port("stays") != 80 || !src.Complete() {
		t.Error("what was known is not in force while the API server is away")
	}
	w.set(false)
	until(t, "all is as the API server has it", func() bool {
		return port("stays") == 80 && port("changes") == 81 && port("goes") == 0 && port("comes") == 80
	})
	s.apply(service("later", 82))
	until(t, "and it is watched on", func() bool { return port("later") == 82 })
}

// TestServerIsKilledOverAndOver: an API server that is killed at any moment, on the same etcd, costs freshness only: an object that is there
// throughout is never missed, and what was written before each kill comes.
func TestServerIsKilledOverAndOver(t *testing.T) {
	t.Parallel()
	s := start(t)
	s.apply([]byte(shop))
	src := source(t, s)
	until(t, "complete", src.Complete)
	missed := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	var watching sync.WaitGroup
	watching.Go(func() {
		for ctx.Err() == nil {
			if _, ok := src.Set().Get(objects.Key{Kind: "Service", Namespace: "shop", Name: "payments"}); !ok {
				missed <- errors.New("a Service that was there throughout was missed")
				return
			}
			time.Sleep(time.Millisecond)
		}
	})
	for i := range 3 {
		name := fmt.Sprintf("s%d", i)
		s.apply(fmt.Appendf(nil, "apiVersion: v1\nkind: Service\nmetadata: {name: %s, namespace: shop}\nspec: {ports: [{name: http, port: 80}]}\n", name))
		time.Sleep(time.Duration(i) * 40 * time.Millisecond)
		s.kill()
		s.run()
		until(t, name+" is read", func() bool {
			_, ok := src.Set().Get(objects.Key{Kind: "Service", Namespace: "shop", Name: name})
			return ok
		})
	}
	cancel()
	watching.Wait()
	select {
	case err := <-missed:
		t.Error(err)
	default:
	}
}
