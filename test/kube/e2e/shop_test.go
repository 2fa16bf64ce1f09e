//go:build linux

package e2e

import (
	"fmt"
	"strings"
)

// shop is an application that knows nothing of a mesh: its containers are what they would be without one.
func shop(cluster string) string {
	var b strings.Builder
	b.WriteString("apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {hanse.mesh/inject: enabled}}\n")
	serve := func(name string) string {
		return fmt.Sprintf(`[serve, --http, ":8080", --tcp, ":9090", --service, %s, --cluster, %s]`, name, cluster)
	}
	const idle = `[serve, --http, "127.0.0.1:8080"]`
	const url = "payments.shop.svc.clusterset.local:8080"
	app := func(name string, replicas int, args, probe string) {
		fmt.Fprintf(&b, `---
apiVersion: v1
kind: ServiceAccount
metadata: {name: %[1]s, namespace: shop}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: %[1]s, namespace: shop}
spec:
  replicas: %[2]d
  selector: {matchLabels: {app: %[1]s}}
  template:
    metadata: {labels: {app: %[1]s}}
    spec:
      serviceAccountName: %[1]s
      terminationGracePeriodSeconds: 15
      containers:
      - name: app
        image: hanse.mesh/echo:%[5]s
        args: %[3]s
        resources: {requests: {cpu: 10m, memory: 16Mi}}
%[4]s`, name, replicas, args, probe, version)
	}
	const probe = "        readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1}\n        livenessProbe: {tcpSocket: {port: 9090}}\n"
	for _, name := range []string{"payments", "catalog"} {
		replicas := 2
		if name == "catalog" && cluster == "west" {
			replicas = 0 // it is east's
		}
		app(name, replicas, serve(name), probe)
		fmt.Fprintf(&b, `---
apiVersion: v1
kind: Service
metadata: {name: %[1]s, namespace: shop}
spec:
  selector: {app: %[1]s}
  ports: [{name: http, port: 8080, appProtocol: http}, {name: tcp, port: 9090, appProtocol: tcp}]
---
apiVersion: hanse.mesh/v1alpha1
kind: AccessPolicy
metadata: {name: %[1]s, namespace: shop}
spec:
  targetRefs: [{kind: Service, name: %[1]s}]
  rules: [{from: ["spiffe://*/ns/shop/sa/frontend", "spiffe://*/ns/shop/sa/load", "spiffe://*/ns/shop/sa/load-grpc"]}]
`, name)
	}
	app("frontend", 1, idle, "")
	app("stranger", 1, idle, "")
	// A call that meets a black hole takes the 2 s in which it is noticed, and more on a busy machine: callers here ask whether calls fail, not how long they take.
	app("load", 0, fmt.Sprintf(`[call, --proxy, "", --count, "0", --interval, 20ms, --timeout, 10s, "http://%s/"]`, url), "")
	app("load-grpc", 0, fmt.Sprintf(`[call, --proxy, "", --count, "0", --interval, 20ms, --timeout, 10s, "grpc://%s"]`, url), "")
	return b.String()
}
