//go:build linux

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hanse-mesh/hanse/test/kube/lab"
)

// machine is a cluster that is one machine without Kubernetes: plain processes, and files in testdata/metal.
type machine struct {
	*lab.Host
	s     *scene
	dir   string
	procs map[string]*exec.Cmd
}

func (s *scene) machine(h *lab.Host) *machine {
	s.t.Helper()
	m := &machine{Host: h, s: s, dir: filepath.Join(os.Getenv(stateDir), h.Name), procs: map[string]*exec.Cmd{}}
	err := os.CopyFS(m.dir, os.DirFS(filepath.Join("testdata", h.Name)))
	if err == nil {
		err = os.WriteFile(s.contexts(), fmt.Appendf(nil, "contexts: [{name: %s, socket: %s}]\n", h.Name, m.path("hansed.sock")), 0o600)
	}
	if err != nil {
		s.t.Fatal(err)
	}
	return m
}

// contexts is where hanse finds those hansed that are in no Kubernetes cluster.
func (s *scene) contexts() string { return filepath.Join(os.Getenv(stateDir), "contexts.yaml") }

func (m *machine) path(name string) string { return filepath.Join(m.dir, name) }

// start starts a program of bin, whose log is NAME.log; it ends with the test at the latest.
func (m *machine) start(name, program string, args ...string) {
	m.s.t.Helper()
	f, err := os.OpenFile(m.path(name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		m.s.t.Fatal(err)
	}
	defer f.Close()
	cmd := m.Command(m.s.ctx, filepath.Join(bin, program), args...)
	cmd.Stdout, cmd.Stderr = f, f
	if err := cmd.Start(); err != nil {
		m.s.t.Fatal(err)
	}
	m.procs[name] = cmd
}

// stop ends it as an init system does.
func (m *machine) stop(name string) {
	cmd := m.procs[name]
	delete(m.procs, name)
	if cmd != nil {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
	}
}

// call calls through the sidecar of frontend.
func (m *machine) call(url string) (result, error) {
	out, err := m.Command(m.s.ctx, filepath.Join(bin, "echo"), "call", "--timeout", "5s", url).Output()
	var r result
	if jerr := json.Unmarshal(out, &r); jerr != nil {
		return r, fmt.Errorf("%s calls %s: %w: %q", m.Name, url, err, out)
	}
	return r, nil
}

func (m *machine) answered(url, by string) error {
	for range 3 {
		if r, err := m.call(url); err != nil || r.Answer.Cluster != by {
			return fmt.Errorf("%s's frontend is answered by %q, not %q: %+v, %v", m.Name, r.Answer.Cluster, by, r, err)
		}
	}
	return nil
}

// mixed takes a cluster on Kubernetes, which is alone, and one from files on bare metal through a mesh's life.
func (s *scene) mixed(west *cluster, m *machine) {
	const (
		inPods  = "http://payments.shop.svc.clusterset.local:8080/"
		onMetal = "http://payments.shop:8080/"
	)
	joined := func() {
		s.t.Helper()
		s.until(time.Minute, func() error { return s.sees(west.Name, m.Name) })
		s.until(time.Minute, func() error { return s.sees(m.Name, west.Name) })
	}
	left := func() {
		s.t.Helper()
		s.hanse("--context", m.Name, "leave", "--yes")
		s.until(30*time.Second, func() error { return s.hasLeft(west.Name, m.Name) })
	}
	s.step("mixed: a cluster from files", func() {
		m.start("hansed", "hansed", "--config", m.path("hansed.yaml"))
		s.until(20*time.Second, func() error {
			_, err := s.tryHanse("--context", m.Name, "status")
			return err
		})
		if err := os.WriteFile(m.path("bundle.json"), []byte(s.hanse("--context", m.Name, "trust", "show", "-o", "bundle")), 0o600); err != nil {
			s.t.Fatal(err)
		}
		for name, whose := range map[string][]string{"payments": {"--agent", "shop/payments"}, "frontend": {"--agent", "shop/frontend"}, "gateway": {"--gateway"}} {
			s.hanse(append([]string{"--context", m.Name, "token", "create", "--file", m.path(name + ".token")}, whose...)...)
			m.start(name, "hanse-proxy", "--config", m.path(name+".yaml"))
		}
		m.start("app", "echo", "serve", "--http", "127.0.0.1:8080", "--service", "payments", "--cluster", m.Name)
		s.until(20*time.Second, func() error { return m.answered(onMetal, m.Name) })
	})
	s.step("mixed: join by context", func() {
		s.t.Logf("%s", s.hanse("join", "--context", m.Name, "--to-context", west.Name))
		joined()
		s.until(10*time.Second, func() error { return m.answered(onMetal, m.Name) })
		s.until(10*time.Second, func() error { return west.answered("frontend", inPods, west.Name) })
	})
	s.step("mixed: failover to Kubernetes and back", func() {
		var calls, failed atomic.Int64
		ctx, stop := context.WithCancel(s.ctx)
		defer stop()
		follow(s.t, ctx, m.Command(ctx, filepath.Join(bin, "echo"), "call", "--count", "0", "--interval", "20ms", "--timeout", "5s", onMetal), func(r result) {
			if calls.Add(1); !r.OK && ctx.Err() == nil {
				failed.Add(1)
				s.t.Errorf("failed: %+v", r)
			}
		})
		m.stop("app")
		s.until(10*time.Second, func() error { return m.answered(onMetal, west.Name) })
		if r, err := m.call(onMetal); err != nil || r.Answer.Caller != "spiffe://metal.example/ns/shop/sa/frontend" {
			s.t.Errorf("west saw %+v, %v", r, err)
		}
		m.start("app", "echo", "serve", "--http", "127.0.0.1:8080", "--service", "payments", "--cluster", m.Name)
		s.until(time.Minute, func() error { return m.answered(onMetal, m.Name) })
		s.t.Logf("%d calls from metal, %d failed", calls.Load(), failed.Load())
	})
	s.step("mixed: failover to metal and back", func() {
		load := west.load()
		west.kubectl("-n", "shop", "scale", "deployment/payments", "--replicas=0")
		s.until(30*time.Second, func() error { return west.answered("frontend", inPods, m.Name) })
		if r := west.mustCall("frontend", inPods); r.Answer.Caller != "spiffe://west.example/ns/shop/sa/frontend" {
			s.t.Errorf("metal saw %+v", r)
		}
		west.mustFail("stranger", inPods, "403")
		west.kubectl("-n", "shop", "scale", "deployment/payments", "--replicas=1")
		west.kubectl("-n", "shop", "rollout", "status", "deployment/payments", "--timeout=60s")
		s.until(time.Minute, func() error { return west.answered("frontend", inPods, west.Name) })
		load.mustHaveServed(50)
	})
	s.step("mixed: leave, join by token, leave", func() {
		left()
		m.stop("app")
		if r, err := m.call(onMetal); err != nil || r.OK {
			s.t.Errorf("metal has left, and is still served: %+v, %v", r, err)
		}
		token := m.path("mesh.token")
		s.hanse("--context", west.Name, "token", "create", "--for", m.Name, "--file", token)
		s.hanse("--context", m.Name, "join", "--check", "@"+token)
		s.t.Logf("%s", s.hanse("--context", m.Name, "join", "@"+token))
		joined()
		s.until(10*time.Second, func() error { return m.answered(onMetal, west.Name) })
		left()
		for name := range m.procs {
			if name != "hansed" {
				m.stop(name)
			}
		}
		m.stop("hansed")
		log, err := os.ReadFile(m.path("hansed.log"))
		if err != nil || strings.Contains(string(log), "panic:") {
			s.t.Errorf("hansed: %v\n%s", err, log)
		}
	})
}
