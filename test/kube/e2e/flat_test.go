//go:build linux

package e2e

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hanse-mesh/hanse/test/kube/lab"
)

// TestFlatNetwork: where pods of both clusters reach each other, pods without a sidecar call an import by what every cluster has: CoreDNS with its option multicluster, and kube-proxy.
// TCP, UDP, both families; clusterset IPs and headless names.
func TestFlatNetwork(t *testing.T) {
	s := up(t, lab.Config{Flat: true, Dual: true})
	west, east := s.west, s.east
	s.step("install and join, on one network", func() {
		for _, c := range s.both() {
			s.install(c, "network=flat", "gateway.replicas=1")
		}
		s.hanse("join", "--context", "east", "--to-context", "west")
		for _, c := range s.both() {
			c.apply(depot(c.Name))
		}
		for _, c := range s.both() {
			c.kubectl("-n", "depot", "rollout", "status", "statefulset/echo", "--timeout=90s")
			c.kubectl("-n", "outside", "rollout", "status", "deployment/caller", "--timeout=90s")
		}
	})
	const ip, headless = "echo.depot.svc.clusterset.local", "each.depot.svc.clusterset.local"
	from := func(c *cluster, url string) (result, error) { return c.callFrom("outside", "caller", url) }
	works := func(c *cluster, url string) {
		s.t.Helper()
		s.until(30*time.Second, func() error {
			r, err := from(c, url)
			if err == nil && !r.OK {
				err = fmt.Errorf("%s: %+v", url, r)
			}
			return err
		})
	}
	s.step("one cluster exports", func() {
		if r, err := from(west, "http://"+ip+"/"); err != nil || !strings.Contains(r.Error, "no such host") {
			s.t.Errorf("before it is exported: %+v, %v", r, err)
		}
		for _, name := range []string{"echo", "each"} {
			east.apply(serviceExport("depot", name))
		}
		began := time.Now()
		works(west, "http://"+ip+"/")
		s.t.Logf("a pod without a sidecar has an answer %.1f s after the export", time.Since(began).Seconds())
		for _, url := range []string{"tcp://" + ip + ":9090", "udp://" + ip + ":9090", "http://" + headless + ":8080/", "tcp://" + headless + ":9090", "udp://" + headless + ":9090", "udp://echo-1.east." + headless + ":9090"} {
			works(west, url)
			works(east, url) // an exporting cluster imports, too
		}
		for _, c := range s.both() {
			for _, url := range []string{"http://" + ip + "/", "http://" + headless + ":8080/", "http://echo-0.east." + headless + ":8080/"} {
				for range 5 {
					if r, err := from(c, url); err != nil || r.Answer.Cluster != "east" || r.Answer.Caller != "" {
						s.t.Errorf("%s calls %s: %+v, %v", c.Name, url, r, err)
					}
				}
			}
		}
	})
	s.step("both families", func() {
		for _, c := range s.both() {
			for _, address := range c.ipsOf("echo", 2) {
				for _, url := range []string{"http://" + bracketed(address) + "/", "tcp://" + bracketed(address) + ":9090", "udp://" + bracketed(address) + ":9090"} {
					works(c, url)
				}
			}
		}
	})
	s.step("both clusters export", func() {
		for _, name := range []string{"echo", "each"} {
			west.apply(serviceExport("depot", name))
		}
		for _, c := range s.both() {
			for _, url := range []string{"http://" + ip + "/", "http://" + headless + ":8080/"} {
				seen := map[string]int{}
				s.until(30*time.Second, func() error {
					if r, err := from(c, url); err != nil || !r.OK {
						return fmt.Errorf("%+v, %v", r, err)
					} else if seen[r.Answer.Cluster]++; len(seen) < 2 {
						return fmt.Errorf("only %v answer", seen)
					}
					return nil
				})
			}
			for _, there := range s.both() {
				if r, err := from(c, "http://echo-1."+there.Name+"."+headless+":8080/"); err != nil || r.Answer.Cluster != there.Name {
					s.t.Errorf("%s calls the pod echo-1 of %s: %+v, %v", c.Name, there.Name, r, err)
				}
			}
		}
	})
	s.step("what is strict stays strict", func() {
		east.apply(serviceExport("depot", "vault"))
		works(west, "udp://vault.depot.svc.clusterset.local:9090") // the name is known, and sidecars leave UDP alone
		if r, err := from(west, "http://vault.depot.svc.clusterset.local/"); err != nil || r.OK {
			s.t.Errorf("a pod without identity is served by a strict sidecar: %+v, %v", r, err)
		}
	})
	s.step("no longer exported", func() {
		for _, c := range s.both() {
			c.kubectl("-n", "depot", "delete", "serviceexport", "--all")
		}
		for _, c := range s.both() {
			for _, url := range []string{"http://" + ip + "/", "udp://" + headless + ":9090"} {
				s.until(30*time.Second, func() error {
					if r, err := from(c, url); err != nil || !strings.Contains(r.Error, "no such host") {
						return fmt.Errorf("%s: %+v, %v", url, r, err)
					}
					return nil
				})
			}
		}
	})
}

// ipsOf are the clusterset IPs of an import in depot.
func (c *cluster) ipsOf(name string, want int) []string {
	c.s.t.Helper()
	var ips []string
	if err := json.Unmarshal([]byte(c.kubectl("-n", "depot", "get", "serviceimport", name, "-o", "jsonpath={.spec.ips}")), &ips); err != nil || len(ips) != want {
		c.s.t.Fatalf("%s: clusterset IPs of %s: %v, %v; want %d", c.Name, name, ips, err, want)
	}
	slices.Sort(ips)
	return ips
}

func bracketed(ip string) string {
	if strings.Contains(ip, ":") {
		return "[" + ip + "]"
	}
	return ip
}

// depot is a StatefulSet with sidecars that let in callers without identity, one that does not, and a caller without a sidecar in another namespace.
func depot(cluster string) string {
	const head = `apiVersion: v1
kind: Namespace
metadata: {name: depot, labels: {hanse.mesh/inject: enabled}}
---
apiVersion: v1
kind: Namespace
metadata: {name: outside}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: caller, namespace: outside}
spec:
  selector: {matchLabels: {app: caller}}
  template:
    metadata: {labels: {app: caller}}
    spec:
      terminationGracePeriodSeconds: 1
      containers: [{name: app, image: "hanse.mesh/echo:%s", args: [serve, --http, "127.0.0.1:8080"]}]
`
	const set = `---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: %[1]s, namespace: depot}
spec:
  replicas: %[2]d
  serviceName: each
  podManagementPolicy: Parallel
  selector: {matchLabels: {app: %[1]s}}
  template:
    metadata: {labels: {app: %[1]s}, annotations: {hanse.mesh/capture-inbound-mode: %[3]s}}
    spec:
      terminationGracePeriodSeconds: 5
      containers:
      - name: app
        image: hanse.mesh/echo:%[5]s
        args: [serve, --http, ":8080", --tcp, ":9090", --udp, ":9090", --service, %[1]s, --cluster, %[4]s]
        readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}
---
apiVersion: v1
kind: Service
metadata: {name: %[1]s, namespace: depot}
spec:
  ipFamilyPolicy: PreferDualStack
  selector: {app: %[1]s}
  ports: [{name: http, port: 80, targetPort: 8080}, {name: tcp, port: 9090}, {name: udp, port: 9090, protocol: UDP}]
`
	const each = `---
apiVersion: v1
kind: Service
metadata: {name: each, namespace: depot}
spec:
  clusterIP: None
  ipFamilyPolicy: PreferDualStack
  selector: {app: echo}
  ports: [{name: http, port: 8080}, {name: tcp, port: 9090}, {name: udp, port: 9090, protocol: UDP}]
`
	return fmt.Sprintf(head, version) + fmt.Sprintf(set, "echo", 2, "permissive", cluster, version) + fmt.Sprintf(set, "vault", 1, "strict", cluster, version) + each
}
