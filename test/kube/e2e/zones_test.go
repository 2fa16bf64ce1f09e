//go:build linux

package e2e

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hanse-mesh/hanse/test/kube/lab"
)

// TestZones: a cluster of two nodes, each a zone by its label. Calls stay in the caller's zone, go to the other one while there is nobody, and come back; a node is drained under load.
func TestZones(t *testing.T) {
	s := up(t, lab.Config{Clusters: []string{"west"}, Nodes: 2})
	west := s.west
	s.step("install over two zones", func() {
		for i, n := range west.Nodes {
			west.kubectl("label", "node", n.Name, "topology.kubernetes.io/region=west-1", "topology.kubernetes.io/zone="+zones[i])
		}
		s.install(west)
		west.apply(zonedShop())
		for _, d := range []string{"payments-a", "payments-b", "load", "load-grpc"} {
			west.kubectl("-n", "shop", "rollout", "status", "deployment/"+d, "--timeout=90s")
		}
		nodes := strings.Fields(west.kubectl("-n", system, "get", "pods", "-l", "app.kubernetes.io/name=hanse-gateway", "-o", "jsonpath={.items[*].spec.nodeName}"))
		if slices.Sort(nodes); !slices.Equal(nodes, []string{west.Nodes[0].Name, west.Nodes[1].Name}) {
			s.t.Errorf("gateways are on %v, not one on each node", nodes)
		}
	})
	const payments = "http://payments.shop.svc.cluster.local:8080/"
	settled := func(app, zone string) {
		s.t.Helper()
		s.until(time.Minute, func() error {
			for range 3 {
				if r, err := west.call(app, payments); err != nil || r.Answer.Zone != zone {
					return fmt.Errorf("%s is answered by zone %q, not %q: %+v, %v", app, r.Answer.Zone, zone, r, err)
				}
			}
			return nil
		})
	}
	s.step("calls stay in their zone", func() {
		settled("load", "a")
		settled("load-grpc", "b")
		load := west.load()
		time.Sleep(3 * time.Second) // a load, not a wait
		load.mustHaveServed(100)
		if got := slices.Sorted(maps.Keys(load.calls)); !slices.Equal(got, []string{"load → west a", "load-grpc → west b"}) {
			s.t.Errorf("answered: %v", load.calls)
		}
	})
	s.step("to the other zone, and back", func() {
		load := west.load()
		west.kubectl("-n", "shop", "scale", "deployment/payments-a", "--replicas=0")
		settled("load", "b")
		west.kubectl("-n", "shop", "scale", "deployment/payments-a", "--replicas=1")
		west.kubectl("-n", "shop", "rollout", "status", "deployment/payments-a", "--timeout=60s")
		settled("load", "a")
		load.mustHaveServed(100)
		if load.calls["load → west b"] == 0 || load.calls["load-grpc → west a"] != 0 {
			s.t.Errorf("answered: %v", load.calls)
		}
	})
	s.step("a node is drained", func() {
		west.kubectl("-n", "shop", "scale", "deployment/load-grpc", "--replicas=0") // it would end with its node
		load := west.load()
		west.kubectl("drain", west.Nodes[1].Name, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=90s")
		west.kubectl("-n", system, "rollout", "status", "deployment/hanse-gateway", "--timeout=60s")
		west.kubectl("uncordon", west.Nodes[1].Name)
		west.kubectl("-n", "shop", "rollout", "status", "deployment/payments-b", "--timeout=60s")
		load.mustHaveServed(100)
	})
}

var zones = []string{"a", "b"}

// zonedShop has payments in both zones, and a caller in each.
func zonedShop() string {
	var b strings.Builder
	b.WriteString(`apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {hanse.mesh/inject: enabled}}
---
apiVersion: v1
kind: Service
metadata: {name: payments, namespace: shop}
spec:
  selector: {app: payments}
  ports: [{name: http, port: 8080, appProtocol: http}]
`)
	add := func(name, app, zone, args, probe string) {
		fmt.Fprintf(&b, `---
apiVersion: apps/v1
kind: Deployment
metadata: {name: %[1]s, namespace: shop}
spec:
  selector: {matchLabels: {app: %[2]s, zone: %[3]s}}
  template:
    metadata: {labels: {app: %[2]s, zone: %[3]s}}
    spec:
      nodeSelector: {topology.kubernetes.io/zone: %[3]s}
      terminationGracePeriodSeconds: 15
      containers:
      - name: app
        image: hanse.mesh/echo:%[4]s
        args: %[5]s
        resources: {requests: {cpu: 10m, memory: 16Mi}}
%[6]s`, name, app, zone, version, args, probe)
	}
	for _, zone := range zones {
		add("payments-"+zone, "payments", zone, fmt.Sprintf(`[serve, --http, ":8080", --service, payments, --cluster, west, --zone, %s]`, zone), "        readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1}\n")
	}
	add("load", "load", "a", `[call, --proxy, "", --count, "0", --interval, 20ms, --timeout, 5s, "http://payments.shop.svc.cluster.local:8080/"]`, "")
	add("load-grpc", "load-grpc", "b", `[call, --proxy, "", --count, "0", --interval, 20ms, --timeout, 5s, "grpc://payments.shop.svc.cluster.local:8080"]`, "")
	return b.String()
}
