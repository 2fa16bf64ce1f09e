package e2e

import (
	"net"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// wire forwards connections, and may fall silent: nothing is lost and nothing refused, it just does not come.
type wire struct {
	silent atomic.Bool
	stop   func()
}

// lay begins to forward from one address to another.
func (l *lab) lay(from, to string) *wire {
	l.t.Helper()
	ln, err := net.Listen("tcp", from)
	if err != nil {
		l.t.Fatal(err)
	}
	w := &wire{}
	var mu sync.Mutex
	var conns []net.Conn
	w.stop = sync.OnceFunc(func() {
		w.silent.Store(false)
		_ = ln.Close()
		mu.Lock()
		defer mu.Unlock()
		for _, c := range conns {
			_ = c.Close()
		}
	})
	l.t.Cleanup(w.stop)
	pump := func(dst, src net.Conn) {
		defer dst.Close()
		buf := make([]byte, 32<<10)
		for {
			n, err := src.Read(buf)
			for w.silent.Load() {
				time.Sleep(10 * time.Millisecond)
			}
			if _, werr := dst.Write(buf[:n]); err != nil || werr != nil {
				return
			}
		}
	}
	go func() {
		for {
			in, err := ln.Accept()
			if err != nil {
				return
			}
			out, err := net.DialTimeout("tcp", to, 5*time.Second)
			if err != nil {
				_ = in.Close()
				continue
			}
			mu.Lock()
			conns = append(conns, in, out)
			mu.Unlock()
			go pump(out, in)
			go pump(in, out)
		}
	}()
	return w
}

// TestSilentEtcd: an etcd that neither answers nor refuses, behind a link that swallows everything, for longer than SVIDs live: they are renewed, a
// sidecar starts anew, and no call fails; what must be written is refused in time, and is done afterwards.
func TestSilentEtcd(t *testing.T) {
	t.Parallel()
	lives := "identity x509Life: 6s\n" + replicaTimers
	l := newLab(t, lives, "west", "east")
	west := l.cluster("west")
	two, etcd := l.second(west, lives), l.etcd(west)
	etcd.start()
	way := *etcd
	way.at = url.URL{Scheme: "http", Host: strings.TrimSuffix(west.GatewayIP, "9") + "6:2379"}
	link := l.lay(way.at.Host, etcd.at.Host)
	l.args["west/hansed"] = []string{"--etcd-endpoints", way.at.String(), "--replica", "one"}
	l.up()
	l.join(two, &way)
	l.leads("west", "one", 2)
	l.signing("west", 2)

	local, across := l.load("west", payments, 2), l.load("east", payments, 1)
	link.silent.Store(true)
	silence := time.Now()
	time.Sleep(7 * time.Second)
	l.kill("west/frontend")
	l.start("west/frontend")
	l.ready("west/frontend", west.workload("frontend").Admin)
	fresh := l.load("west", payments, 1)
	l.save(filepath.Join(two.Dir, "more.yaml"), "apiVersion: v1\nkind: Service\nmetadata: {namespace: shop, name: more}\nspec:\n  ports: [{name: http, port: 80}]\n")
	asked := time.Now()
	if out, err := l.hanse("west", "", "apply", "-f", filepath.Join(two.Dir, "more.yaml")); err == nil {
		t.Errorf("apply without etcd: %s", out)
	} else {
		t.Logf("apply is refused after %s: %v", time.Since(asked).Round(100*time.Millisecond), err)
	}
	time.Sleep(20*time.Second - time.Since(silence))
	fresh.none(l, "a sidecar that started while etcd was silent")
	link.silent.Store(false)
	l.eventually(30*time.Second, "what was refused is applied", func() error {
		_, err := l.hanse("west", "", "apply", "-f", filepath.Join(two.Dir, "more.yaml"))
		return err
	})
	l.green()
	for what, ld := range map[string]*load{"within the cluster": local, "across clusters": across, "from a fresh sidecar": fresh} {
		ld.stop()
		if what != "within the cluster" { // whose caller's sidecar was killed
			ld.none(l, "etcd silent, "+what)
		}
	}
}
