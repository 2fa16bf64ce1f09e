//go:build linux

package e2e

import (
	"encoding/json"
	"fmt"
	"strings"

	"sigs.k8s.io/yaml"
)

// app is what the applications of TestSidecars differ in; it is written as YAML.
type app struct {
	Replicas int             `json:"replicas"`
	Account  string          `json:"account"`
	Restart  string          `json:"restart"`
	Args     []string        `json:"args"`
	More     json.RawMessage `json:"more"`   // of the container
	Labels   string          `json:"labels"` // of the pod: a: b, c: d
}

func parse(text string) app {
	var a app
	if err := yaml.UnmarshalStrict([]byte(text), &a); err != nil {
		panic(fmt.Sprintf("%s: %v", text, err))
	}
	if a.Account == "" {
		a.Account = "default"
	}
	if a.Restart == "" {
		a.Restart = "Always"
	}
	return a
}

// podSpec is a pod as Pod Security "restricted" wants it, in one line.
func podSpec(text string) string {
	a := parse(text)
	args, err := json.Marshal(a.Args)
	if err != nil {
		panic(err)
	}
	more := strings.TrimSuffix(strings.TrimPrefix(string(a.More), "{"), "}")
	if more != "" {
		more = ", " + more
	}
	return fmt.Sprintf(`{serviceAccountName: %s, restartPolicy: %s, terminationGracePeriodSeconds: 20, containers: [{name: app, image: "hanse.mesh/echo:%s", args: %s, resources: {requests: {cpu: 10m, memory: 16Mi}}, `+
		`securityContext: {runAsNonRoot: true, runAsUser: 1000, allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}, seccompProfile: {type: RuntimeDefault}}%s}]}`, a.Account, a.Restart, version, args, more)
}

func template(name, text string) string {
	labels := "app: " + name
	if a := parse(text); a.Labels != "" {
		labels += ", " + a.Labels
	}
	return fmt.Sprintf("{metadata: {labels: {%s}}, spec: %s}", labels, podSpec(text))
}

func deployment(namespace, name, text string) string {
	labels := ""
	if strings.HasPrefix(name, "sick-") {
		labels = ", labels: {sick: \"yes\"}"
	}
	return fmt.Sprintf("---\napiVersion: apps/v1\nkind: Deployment\nmetadata: {name: %s, namespace: %s%s}\nspec: {replicas: %d, selector: {matchLabels: {app: %[1]s}}, template: %[5]s}\n", name, namespace, labels, parse(text).Replicas, template(name, text))
}

// sidecarShop is a shop whose payments let callers in, and nobody else; and two namespaces without the label.
func sidecarShop(c *cluster) string {
	var b strings.Builder
	for _, n := range []string{"shop", "plain", "piped"} {
		labels := []string{}
		if n == "shop" {
			labels = append(labels, "hanse.mesh/inject: enabled")
		}
		if c == c.s.east {
			labels = append(labels, "pod-security.kubernetes.io/enforce: restricted")
		}
		fmt.Fprintf(&b, "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: %s, labels: {%s}}\n---\napiVersion: v1\nkind: ServiceAccount\nmetadata: {name: caller, namespace: %[1]s}\n", n, strings.Join(labels, ", "))
	}
	b.WriteString(`---
apiVersion: v1
kind: Service
metadata: {name: payments, namespace: shop}
spec:
  selector: {app: payments}
  ports: [{name: http, port: 8080, appProtocol: http}, {name: tcp, port: 9090, appProtocol: tcp}]
---
apiVersion: hanse.mesh/v1alpha1
kind: AccessPolicy
metadata: {name: payments, namespace: shop}
spec:
  targetRefs: [{kind: Service, name: payments}]
  rules: [{from: ["spiffe://*/ns/*/sa/caller"]}]
`)
	const (
		serve = `args: [serve, --http, ":8080", --tcp, ":9090"]`
		idle  = `args: [serve, --http, "127.0.0.1:8080"]`
		call  = `args: [call, --proxy, "", --count, "0", --interval, 20ms, --timeout, 5s`
	)
	for name, text := range map[string]string{
		"payments":  `{replicas: 2, ` + serve + `, more: {startupProbe: {grpc: {port: 8080}, periodSeconds: 1}, readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1}, livenessProbe: {tcpSocket: {port: 9090}, periodSeconds: 1}}}`,
		"frontend":  `{replicas: 1, account: caller, ` + idle + `, more: {readinessProbe: {exec: {command: [/echo, call, --proxy, "", "http://127.0.0.1:8080/"]}, periodSeconds: 1, timeoutSeconds: 5}}}`,
		"stranger":  `{replicas: 1, ` + idle + `}`,
		"optout":    `{replicas: 1, ` + idle + `, labels: "hanse.mesh/inject: disabled"}`,
		"late":      strings.Replace(late, "replicas: 1", "replicas: 0", 1),
		"load":      `{replicas: 0, account: caller, ` + call + `, "` + paymentsAt + `"]}`,
		"load-grpc": `{replicas: 0, account: caller, ` + call + `, "grpc://payments.shop:8080"]}`,
		"greeter": `{replicas: 0, account: caller, args: [call, --proxy, "", --count, "0", --interval, 50ms, --timeout, 5s, --linger, 2s, "` + paymentsAt + `"],
  more: {lifecycle: {preStop: {exec: {command: [/echo, call, --proxy, "", --count, "20", --interval, 50ms, --timeout, 5s, "` + paymentsAt + `"]}}}}}`,
		"hooked":    fmt.Sprintf(`{replicas: 1, args: [serve, --http, ":8080", --latency, %s], more: {lifecycle: {preStop: {httpGet: {path: /, port: 8080}}}}}`, hookTakes),
		"sick-http": `{replicas: 1, ` + serve + `, more: {readinessProbe: {httpGet: {path: /status/503, port: 8080}, periodSeconds: 1}}}`,
		"sick-tcp":  `{replicas: 1, ` + serve + `, more: {livenessProbe: {tcpSocket: {port: 9091}, periodSeconds: 1, failureThreshold: 3}}}`,
		"sick-grpc": `{replicas: 1, ` + serve + `, more: {readinessProbe: {grpc: {port: 8080, service: nope}, periodSeconds: 1}}}`,
		"sick-exec": `{replicas: 1, ` + serve + `, more: {readinessProbe: {exec: {command: [/echo, call, --proxy, "", "http://127.0.0.1:8081/"]}, periodSeconds: 1}}}`,
		"sick-hook": `{replicas: 1, ` + serve + `, more: {lifecycle: {preStop: {exec: {command: [/echo, call, --proxy, "", "http://127.0.0.1:8081/"]}}}}}`,
	} {
		b.WriteString(deployment("shop", name, text))
	}
	b.WriteString(deployment("plain", "outside", `{replicas: 1, `+idle+`}`))
	b.WriteString(deployment("plain", "optin", `{replicas: 1, `+idle+`, labels: "hanse.mesh/inject: enabled"}`))
	return b.String()
}
