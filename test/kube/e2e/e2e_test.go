//go:build linux

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/hanse-mesh/hanse/test/kube/lab"
)

const (
	bin     = "../../../bin"
	version = "v0.1.0" // of the images, as the Makefile has it
)

// wanted is set by `make e2e-kube`.
const wanted = "HANSE_E2E_KUBE"

// stateDir is where the process outside says that the one inside shall keep its state.
const stateDir = "HANSE_E2E_DIR"

func TestMain(m *testing.M) { os.Exit(inLab(m)) }

// inLab runs the tests in namespaces of their own.
func inLab(m *testing.M) int {
	if pairs := os.Getenv(forwarding); pairs != "" {
		fmt.Println("test/kube/e2e: forward:", forward(pairs))
		return 1
	}
	if os.Getenv(wanted) == "" {
		fmt.Println("test/kube/e2e: SKIPPED: it takes minutes and a machine of its own; `make e2e-kube` runs it")
		return 0
	}
	if err := needs(); err != nil {
		fmt.Println("test/kube/e2e:", err)
		return 1
	}
	dir := os.Getenv(stateDir)
	if dir == "" {
		var err error
		if dir, err = os.MkdirTemp("", "hanse-e2e-"); err == nil {
			err = os.Setenv(stateDir, dir)
		}
		if err != nil {
			fmt.Println("test/kube/e2e:", err)
			return 1
		}
	}
	code, inside, err := lab.Enter("")
	switch {
	case err != nil:
		fmt.Println("test/kube/e2e:", err)
		return 1
	case inside:
		return m.Run()
	case code == 0:
		_ = os.RemoveAll(dir)
	default:
		fmt.Println("test/kube/e2e: logs are left in", dir)
	}
	return code
}

func needs() error {
	if err := lab.Needs(filepath.Join(bin, "tools")); err != nil {
		return err
	}
	for _, f := range []string{"hanse", "images/pause.tar", "images/hansed.tar", "images/hanse-proxy.tar", "images/echo.tar", "images/etcd.tar"} {
		if _, err := os.Stat(filepath.Join(bin, f)); err != nil {
			return fmt.Errorf("%w: `make e2e-kube` builds it", err)
		}
	}
	return nil
}

// TestTwoClusters is a mesh's life. Each step rests on those before.
func TestTwoClusters(t *testing.T) {
	s := up(t, lab.Config{Hosts: []string{"metal"}})
	west, east := s.west, s.east
	before := map[*cluster][]string{west: west.objects(), east: east.objects()}

	s.step("install", func() {
		for _, c := range s.both() {
			s.install(c)
			s.t.Logf("%s", s.hanse("check", "--context", c.Name))
		}
	})
	s.step("join by context", func() {
		s.t.Logf("%s", s.hanse("join", "--context", "east", "--to-context", "west"))
		s.until(time.Minute, func() error { return s.joined(west, east) })
		s.until(time.Minute, func() error { return s.joined(east, west) })
	})
	s.step("inject", func() {
		for _, c := range s.both() {
			c.apply(shop(c.Name))
		}
		for _, c := range s.both() {
			for _, d := range []string{"payments", "catalog", "frontend", "stranger"} {
				c.kubectl("-n", "shop", "rollout", "status", "deployment/"+d, "--timeout=90s")
				c.holdsInjected(d)
			}
		}
	})
	const catalog, payments = "catalog.shop.svc.clusterset.local", "payments.shop.svc.clusterset.local"
	s.step("ServiceExport to first answer", func() {
		calls := west.watch("frontend", "http://"+catalog+":8080/")
		for range 5 {
			if r := <-calls; r.OK {
				s.t.Fatalf("catalog answers before it is exported: %+v", r)
			}
		}
		east.export("catalog")
		began := time.Now() // that kubectl takes seconds on a busy machine is not what is promised
		for r := range calls {
			if r.OK {
				break
			}
			if time.Since(began) > 20*time.Second {
				s.t.Fatalf("no answer after 20 s: %+v", r)
			}
		}
		took := time.Since(began)
		s.t.Logf("a caller in west has an answer %.2f s after catalog was exported in east", took.Seconds())
		if took > 2*time.Second {
			s.t.Errorf("it took %s; under 2 s are promised", took)
		}
	})
	s.step("HTTP, gRPC and TCP by clusterset.local", func() {
		for _, url := range []string{"http://" + catalog + ":8080/", "grpc://" + catalog + ":8080"} {
			if a := west.mustCall("frontend", url).Answer; a.Cluster != "east" || a.Caller != "spiffe://west.example/ns/shop/sa/frontend" {
				s.t.Errorf("%s: answered by %q, for caller %q", url, a.Cluster, a.Caller)
			}
		}
		west.mustCall("frontend", "tcp://"+catalog+":9090")
		west.mustFail("stranger", "http://"+catalog+":8080/", "403")
		west.mustFail("frontend", "http://nothing.shop.svc.clusterset.local:8080/", "no such host")
	})
	s.step("failover and failback", func() {
		for _, c := range s.both() {
			c.export("payments")
		}
		const url = "http://" + payments + ":8080/"
		s.until(10*time.Second, func() error { return west.answered("frontend", url, "west") })
		s.until(10*time.Second, func() error { return east.answered("frontend", url, "east") })
		for _, d := range []string{"load", "load-grpc"} {
			west.kubectl("-n", "shop", "scale", "deployment/"+d, "--replicas=1")
			west.kubectl("-n", "shop", "rollout", "status", "deployment/"+d, "--timeout=60s")
		}
		load := west.load()
		west.kubectl("-n", "shop", "scale", "deployment/payments", "--replicas=0")
		s.until(30*time.Second, func() error { return west.answered("frontend", url, "east") })
		west.kubectl("-n", "shop", "scale", "deployment/payments", "--replicas=2")
		west.kubectl("-n", "shop", "rollout", "status", "deployment/payments", "--timeout=60s")
		s.until(time.Minute, func() error { return west.answered("frontend", url, "west") })
		load.mustHaveServed(100)
	})
	s.step("rolling restart of everything under load", func() {
		load := west.load()
		for _, w := range [][2]string{{system, "statefulset/hansed"}, {system, "deployment/hanse-gateway"}, {"shop", "deployment/payments"}, {"shop", "deployment/catalog"}, {"shop", "deployment/load"}, {"shop", "deployment/load-grpc"}} {
			for _, c := range s.both() {
				c.restart(w[0], w[1])
			}
		}
		s.until(time.Minute, func() error { return s.joined(west, east) })
		s.until(time.Minute, func() error { return s.joined(east, west) })
		load.mustHaveServed(500)
	})
	s.step("failover drill", func() {
		load := west.load()
		out := s.hanse("--context", "west", "drill", "run", "--blackhole", "--service", "shop/payments", "--for", "15s", "--yes", "-o", "json")
		s.holdsDrill(out, load.brokeOff())
		load.mustHaveServed(100)
	})
	s.step("leave", func() {
		s.hanse("--context", "east", "leave", "--yes")
		s.until(30*time.Second, func() error { return s.hasLeft("west", "east") })
		west.mustFail("frontend", "http://"+catalog+":8080/", "")
	})
	s.mixed(west, s.machine(s.hosts["metal"]))
	s.step("uninstall", func() {
		for _, c := range s.both() {
			c.kubectl("delete", "namespace", "shop", "--wait=false")
		}
		for _, c := range s.both() {
			c.kubectl("wait", "--for=delete", "namespace/shop", "--timeout=90s")
			s.hanse("uninstall", "--context", c.Name, "--yes")
			s.until(time.Minute, func() error { return same(before[c], c.objects()) })
		}
	})
}
