//go:build linux

package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/hanse-mesh/hanse/test/kube/lab"
)

const next = "v0.2.0" // the same programs by another name, which is all that Kubernetes sees of an upgrade

// TestUpgrade: other images and values under load cost no call, nor does an image that there is not; the next upgrade mends that. hansed's authority and membership are in its volume,
// and outlive its Pods.
func TestUpgrade(t *testing.T) {
	s := up(t, lab.Config{})
	west, east := s.west, s.east
	s.step("install and join", func() {
		for _, c := range s.both() {
			for _, image := range []string{"hansed", "hanse-proxy"} {
				if err := c.TagImage(s.ctx, "hanse.mesh/"+image+":"+version, "hanse.mesh/"+image+":"+next); err != nil {
					s.t.Fatal(err)
				}
			}
			s.install(c)
		}
		s.hanse("join", "--context", "east", "--to-context", "west")
		s.openShop()
		// West's callers are served by east, through its gateways; east's at home.
		west.kubectl("-n", "shop", "scale", "deployment/payments", "--replicas=0")
		for _, c := range s.both() {
			for _, d := range []string{"load", "load-grpc"} {
				s.until(30*time.Second, func() error { return c.answered("frontend", paymentsURL, "east") })
				c.kubectl("-n", "shop", "scale", "deployment/"+d, "--replicas=1")
				c.kubectl("-n", "shop", "rollout", "status", "deployment/"+d, "--timeout=60s")
			}
		}
	})
	roots := map[*cluster]string{west: s.roots("west"), east: s.roots("east")}
	underLoad := func(calls int, f func()) {
		s.t.Helper()
		loads := []*load{west.load(), east.load()}
		f()
		for _, l := range loads {
			l.mustHaveServed(calls)
		}
	}
	s.step("other images and values", func() {
		underLoad(300, func() {
			out := s.hanse("upgrade", "--context", "west", "--yes", "--image-tag", next, "--set", "gateway.replicas=3", "--set", "hansed.logLevel=debug")
			for _, want := range []string{"~ statefulset/hansed", `hanse.mesh/hansed:` + version + `" → "hanse.mesh/hansed:` + next, "spec.replicas: 2 → 3", "Upgraded and ready"} {
				if !strings.Contains(out, want) {
					s.t.Errorf("no %q in\n%s", want, out)
				}
			}
			// From init containers that capture to a DaemonSet, which must be there before Pods that need it.
			s.hanse("upgrade", "--context", "east", "--yes", "--image-tag", next, "--set", "capture.mode=node")
		})
		west.runs(system, 1, "hanse.mesh/hansed:"+next)
		west.runs(system, 3, "hanse.mesh/hanse-proxy:"+next)
		east.runs(system, 3, "hanse.mesh/hanse-proxy:"+next) // two gateways, and the node's
	})
	s.step("sidecars follow when their Pods are replaced", func() {
		underLoad(300, func() {
			apps := []string{"deployment/payments", "deployment/frontend", "deployment/load", "deployment/load-grpc"}
			for _, c := range s.both() {
				c.kubectl(append([]string{"-n", "shop", "rollout", "restart"}, apps...)...)
			}
			for _, c := range s.both() {
				for _, app := range apps {
					c.kubectl("-n", "shop", "rollout", "status", app, "--timeout=120s")
				}
			}
		})
		east.holdsSidecar("frontend", "hanse-capture hanse.mesh/hanse-proxy:"+next+" hanse-proxy hanse.mesh/hanse-proxy:"+next)
		if args := east.kubectl("-n", "shop", "get", "pods", "-l", "app=frontend", "-o", `jsonpath={.items[*].spec.initContainers[?(@.name=="hanse-capture")].args}`); !strings.Contains(args, "wait") {
			s.t.Errorf("the node captures, but hanse-capture is given %s", args)
		}
	})
	s.step("an image that there is not, and back", func() {
		underLoad(300, func() {
			for _, c := range s.both() {
				out, err := s.tryHanse("upgrade", "--context", c.Name, "--yes", "--image-tag", "v9.9.9", "--timeout", "15s")
				if err == nil || !strings.Contains(err.Error(), "not ready in time") || !strings.Contains(err.Error(), "v9.9.9") {
					s.t.Errorf("an upgrade to nothing: %s, %v", out, err)
				}
			}
			mended := func(out string) {
				s.t.Helper()
				if !strings.Contains(out, "hansed-0 was stuck in the revision before (") {
					s.t.Errorf("it does not say what it mended:\n%s", out)
				}
				s.t.Logf("%s", out)
			}
			mended(s.hanse("upgrade", "--context", "east", "--yes", "--image-tag", next, "--timeout", "90s"))
			// Who does not wait is told by check, and may do it again.
			s.hanse("upgrade", "--context", "west", "--yes", "--image-tag", next, "--wait=false")
			s.until(30*time.Second, func() error {
				if out, err := s.tryHanse("check", "--context", "west"); err == nil || !strings.Contains(out, "hanse upgrade --context west makes hansed-0 anew") {
					return fmt.Errorf("check: %v\n%s", err, out)
				}
				return nil
			})
			mended(s.hanse("upgrade", "--context", "west", "--yes", "--image-tag", next, "--timeout", "90s"))
		})
	})
	s.step("the mesh is as it was", func() {
		s.until(time.Minute, func() error { return s.joined(west, east) })
		s.until(time.Minute, func() error { return s.joined(east, west) })
		for _, c := range s.both() { // of its volume, in each new Pod
			if now := s.roots(c.Name); now != roots[c] {
				s.t.Errorf("%s: roots were\n%s\nand are\n%s", c.Name, roots[c], now)
			}
		}
		west.kubectl("-n", "shop", "scale", "deployment/payments", "--replicas=1")
		s.until(time.Minute, func() error { return west.answered("frontend", paymentsURL, "west") })
		east.export("catalog")
		s.until(30*time.Second, func() error {
			return west.answered("frontend", catalogURL, "east")
		})
	})
}

const paymentsURL = "http://payments.shop.svc.clusterset.local:8080/"

// openShop makes the shop in both clusters, which export payments.
func (s *scene) openShop() {
	s.t.Helper()
	for _, c := range s.both() {
		c.apply(shop(c.Name))
	}
	for _, c := range s.both() {
		for _, d := range []string{"payments", "catalog", "frontend"} {
			c.kubectl("-n", "shop", "rollout", "status", "deployment/"+d, "--timeout=90s")
		}
		c.export("payments")
	}
}

// runs: that many Pods of a namespace are ready with an image.
func (c *cluster) runs(namespace string, want int, image string) {
	c.s.t.Helper()
	c.s.until(30*time.Second, func() error {
		out := c.kubectl("-n", namespace, "get", "pods", "-o", `jsonpath={range .items[*]}{.status.conditions[?(@.type=="Ready")].status} {.spec.containers[*].image}{"\n"}{end}`)
		if n := strings.Count(out, "True "+image+"\n"); n != want {
			return fmt.Errorf("%s: %d Pods of %s run %s, want %d:\n%s", c.Name, n, namespace, image, want, out)
		}
		return nil
	})
}

// holdsSidecar: the init containers of an application's Pods, with their images.
func (c *cluster) holdsSidecar(app, want string) {
	c.s.t.Helper()
	out := c.kubectl("-n", "shop", "get", "pods", "-l", "app="+app, "-o", `jsonpath={range .items[*]}{range .spec.initContainers[*]}{.name} {.image} {end}{"\n"}{end}`)
	for line := range strings.Lines(out) {
		if strings.TrimSpace(line) != want {
			c.s.t.Errorf("%s: a pod of %s has %q, want %q", c.Name, app, line, want)
		}
	}
}
