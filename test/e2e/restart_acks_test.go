package e2e

import (
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// gate stands between a cluster's proxies and its hansed.
type gate struct {
	mu    sync.Mutex
	shut  bool                  // guarded by mu
	conns map[net.Conn]struct{} // guarded by mu
}

// gate makes the proxies of a cluster, which are not up yet, come to their hansed through it.
func (l *lab) gate(c *cluster) *gate {
	l.t.Helper()
	g := &gate{conns: map[net.Conn]struct{}{}}
	var at []string
	for _, to := range []string{c.Identity, c.XDS} {
		host, _, _ := net.SplitHostPort(to)
		ln, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
		if err != nil {
			l.t.Fatal(err)
		}
		l.t.Cleanup(func() { ln.Close(); g.close() })
		go g.serve(ln, to)
		at = append(at, to, ln.Addr().String())
	}
	files, err := filepath.Glob(filepath.Join(c.Dir, "*.yaml"))
	if err != nil {
		l.t.Fatal(err)
	}
	for _, path := range files {
		b, err := os.ReadFile(path)
		if err != nil {
			l.t.Fatal(err)
		}
		if filepath.Base(path) != "hansed.yaml" {
			l.save(path, strings.NewReplacer(at...).Replace(string(b)))
		}
	}
	return g
}

func (g *gate) serve(ln net.Listener, to string) {
	for {
		in, err := ln.Accept()
		if err != nil {
			return // closed
		}
		go func() {
			defer in.Close()
			out, err := net.DialTimeout("tcp", to, 5*time.Second)
			if err != nil {
				return
			}
			defer out.Close()
			g.mu.Lock()
			shut := g.shut
			if !shut {
				g.conns[in], g.conns[out] = struct{}{}, struct{}{}
			}
			g.mu.Unlock()
			if shut {
				return
			}
			go func() {
				_, _ = io.Copy(out, in)
				out.Close()
			}()
			_, _ = io.Copy(in, out)
			g.mu.Lock()
			delete(g.conns, in)
			delete(g.conns, out)
			g.mu.Unlock()
		}()
	}
}

// close cuts what is connected, and lets nobody through any more.
func (g *gate) close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.shut = true
	for c := range g.conns {
		c.Close()
	}
}

func (g *gate) open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.shut = false
}

// TestAcknowledgementsAfterARestart: west rotates its root while east's hansed is killed and started again, and east's proxies take their time to
// come back. What they have not loaded is not acknowledged, west does not sign with it, and no call is refused.
func TestAcknowledgementsAfterARestart(t *testing.T) {
	t.Parallel()
	l := newLab(t, shortTimers, "west", "east")
	west, east := l.cluster("west"), l.cluster("east")
	l.write(west, "identity x509Life: 6s\n"+shortTimers) // what a new root signs is in use at once
	gate := l.gate(east)
	l.up()
	l.kill("east/pay-a", "east/pay-a-app", "east/pay-b", "east/pay-b-app")
	across := l.load("east", payments, 2) // east has none left: its calls cross
	across.from(l, 20*time.Second, "west")

	gate.close()
	l.kill("east/hansed")
	rotated := make(chan error, 1)
	before := get[trustPage](l, "west", "trust", "show", "west.test")
	go func() {
		_, err := l.hanse("west", "", "trust", "rotate")
		rotated <- err
	}()
	var announced trustPage
	l.eventually(20*time.Second, "west announces a root", func() error {
		if announced = get[trustPage](l, "west", "trust", "show", "west.test"); announced.Sequence == before.Sequence {
			return fmt.Errorf("it does not")
		}
		return nil
	})
	l.start("east/hansed")
	l.eventually(time.Minute, "east's hansed has it, and says whom it waits for", func() error {
		out, err := l.hanse("east", "", "trust", "show", "west.test")
		if err == nil && !(strings.Contains(out, "not acknowledged to west.test yet") && strings.Contains(out, "proxy sidecar/east/") &&
			strings.Contains(out, "(not back yet; until ")) {
			err = fmt.Errorf("%s", out)
		}
		return err
	})
	// West's SVIDs are renewed every 3 s: time enough for a mistake to show. It is well within the time for which proxies are waited for.
	for deadline := time.Now().Add(8 * time.Second); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		select {
		case err := <-rotated:
			t.Fatalf("west signs with a root that east's proxies do not know (%v)", err)
		default:
		}
	}
	across.none(l, "while east's proxies are away")
	if out := l.must("west", "", "trust", "show", "west.test"); !strings.Contains(out, "prepared") || !strings.Contains(out, "not yet by") {
		t.Errorf("west does not say that it waits:\n%s", out)
	}
	gate.open()
	if err := <-rotated; err != nil {
		t.Fatal(err)
	}
	l.eventually(30*time.Second, "nobody is waited for any more", func() error {
		if out := l.must("east", "", "trust", "show", "west.test"); strings.Contains(out, "not acknowledged") {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
	served := across.ok.Load()
	l.eventually(20*time.Second, "calls go on", func() error {
		if n := across.ok.Load() - served; n < 500 {
			return fmt.Errorf("%d", n)
		}
		return nil
	})
	across.stop()
	across.none(l, "with west's new root")
}
