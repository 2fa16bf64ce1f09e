//go:build linux

package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/hanse-mesh/hanse/test/kube/lab"
)

const (
	paymentsAt = "http://payments.shop:8080/"
	hookTakes  = 4 * time.Second
	late       = `{replicas: 1, account: caller, args: [call, --proxy, "", --count, "0", --interval, 50ms, --timeout, 5s, "` + paymentsAt + `"]}`
)

// TestSidecars: pods and their sidecars, from the first moment to the last. Two clusters that do not know each other: in west pods capture for themselves, and none that wants a sidecar
// starts without (failurePolicy Fail); in east the node captures, Pod Security "restricted" is enforced, and pods start without while there is no hansed (Ignore).
func TestSidecars(t *testing.T) {
	s := up(t, lab.Config{})
	west, east := s.west, s.east
	each := func(f func(c *cluster)) {
		s.t.Helper()
		for _, c := range s.both() {
			f(c)
		}
	}
	s.step("install", func() {
		s.install(west, "gateway.enabled=false")
		s.install(east, "gateway.enabled=false", "capture.mode=node", "webhooks.injectFailurePolicy=Ignore")
		each(func(c *cluster) { c.apply(sidecarShop(c)) })
		each(func(c *cluster) {
			for _, d := range []string{"payments", "frontend", "stranger", "optout", "hooked", "sick-hook"} {
				c.kubectl("-n", "shop", "rollout", "status", "deployment/"+d, "--timeout=90s")
			}
			for _, d := range []string{"outside", "optin"} {
				c.kubectl("-n", "plain", "rollout", "status", "deployment/"+d, "--timeout=90s")
			}
		})
	})
	s.step("who gets one", func() {
		each(func(c *cluster) {
			const with, without = "hanse-capture hanse-proxy / app", "/ app"
			for pod, want := range map[string]string{"shop/payments": with, "shop/optout": without, "plain/outside": without, "plain/optin": with} {
				namespace, app, _ := strings.Cut(pod, "/")
				for _, p := range c.podsOf(namespace, app) {
					if got := containers(p); got != want {
						s.t.Errorf("%s: a pod of %s has %q, want %q", c.Name, pod, got, want)
					}
				}
			}
			r := c.mustCall("frontend", paymentsAt)
			if want := "spiffe://" + c.Name + ".example/ns/shop/sa/caller"; r.Answer.Caller != want {
				s.t.Errorf("%s: payments saw %q, want %q", c.Name, r.Answer.Caller, want)
			}
			c.mustFail("stranger", paymentsAt, "403")
		})
		// Where restricted is enforced there is no capability, and where pods capture for themselves, restricted pods are refused with their sidecar's name.
		for _, p := range east.podsOf("shop", "payments") {
			for _, container := range slices.Concat(p.Spec.InitContainers, p.Spec.Containers) {
				if len(container.SecurityContext.Capabilities.Add) > 0 || !*container.SecurityContext.RunAsNonRoot {
					s.t.Errorf("east: %s runs as %+v", container.Name, container.SecurityContext)
				}
			}
		}
		west.apply("apiVersion: v1\nkind: Namespace\nmetadata: {name: strict, labels: {hanse.mesh/inject: enabled, pod-security.kubernetes.io/enforce: restricted}}\n---\n" + deployment("strict", "app", `{replicas: 1, args: [serve, --http, ":8080"]}`))
		s.until(30*time.Second, func() error { return west.event("strict", "FailedCreate", "hanse-capture") })
	})
	s.step("probes through strict mTLS", func() {
		each(func(c *cluster) { // that payments and frontend are ready says that HTTP, TCP, gRPC and commands pass; their ports are open to nobody else
			for _, p := range c.podsOf("shop", "payments") {
				for _, url := range []string{"http://" + p.Status.PodIP + ":8080/", "tcp://" + p.Status.PodIP + ":9090"} {
					if r, err := c.callFrom("plain", "outside", url); err != nil || r.OK {
						s.t.Errorf("%s: a pod without identity is served at %s: %+v, %v", c.Name, url, r, err)
					}
				}
			}
			for name, message := range map[string]string{"sick-http": "HTTP probe failed with statuscode: 503", "sick-tcp": "Liveness probe failed: HTTP probe failed", "sick-grpc": "Readiness probe failed: HTTP probe failed", "sick-exec": "Readiness probe failed: "} {
				s.until(time.Minute, func() error { return c.event("shop", "Unhealthy", message, name) })
				for _, p := range c.podsOf("shop", name) {
					app, proxy := p.Status.ContainerStatuses[0], p.Status.InitContainerStatuses[1]
					if name != "sick-tcp" && app.Ready || !proxy.Ready || proxy.RestartCount > 0 {
						s.t.Errorf("%s: %s: the application is ready: %v, its sidecar: %v, restarted %d times", c.Name, name, app.Ready, proxy.Ready, proxy.RestartCount)
					}
				}
			}
			s.until(time.Minute, func() error {
				if p := c.podsOf("shop", "sick-tcp"); len(p) != 1 || p[0].Status.ContainerStatuses[0].RestartCount == 0 {
					return fmt.Errorf("%s: who fails its liveness probe is not started again: %+v", c.Name, p)
				}
				return nil
			})
			c.kubectl("-n", "shop", "delete", "deployment", "-l", "sick=yes", "--wait=false")
		})
	})
	s.step("an application calls in its first and in its last moment", func() {
		each(func(c *cluster) {
			c.kubectl("-n", "shop", "scale", "deployment/greeter", "--replicas=3")
			c.kubectl("-n", "shop", "rollout", "status", "deployment/greeter", "--timeout=60s")
			var follow sync.WaitGroup
			logs := map[string]*bytes.Buffer{}
			for _, p := range c.podsOf("shop", "greeter") {
				log := &bytes.Buffer{}
				logs[p.Name] = log
				cmd := c.Command(s.ctx, filepath.Join(bin, "tools", "kubectl"), "-n", "shop", "logs", "-f", "-c", "app", p.Name)
				cmd.Stdout = log
				follow.Go(func() { _ = cmd.Run() })
			}
			time.Sleep(time.Second) // they have something to say
			began := time.Now()
			c.kubectl("-n", "shop", "scale", "deployment/greeter", "--replicas=0")
			c.kubectl("-n", "shop", "wait", "--for=delete", "pods", "-l", "app=greeter", "--timeout=60s")
			took := time.Since(began)
			follow.Wait()
			for name, log := range logs {
				before, after := 0, 0
				for line := range strings.Lines(log.String()) {
					var r result
					switch {
					case strings.Contains(line, "a signal"):
						before, after = after, 0
					case json.Unmarshal([]byte(line), &r) != nil || !r.OK:
						s.t.Errorf("%s: %s says after %d calls: %s", c.Name, name, after, line)
						fallthrough
					default:
						after++
					}
				}
				if before < 10 || after < 10 {
					s.t.Errorf("%s: %s called %d times before SIGTERM and %d times after it", c.Name, name, before, after)
				}
			}
			s.t.Logf("%s: %d pods called from their first moment to their last; gone %.1f s after they were to go", c.Name, len(logs), took.Seconds())
			if took > 15*time.Second {
				s.t.Errorf("%s: pods were gone after %s: 1 s preStop and 2 s more are theirs, and their grace is 20 s", c.Name, took)
			}
			// A hook by HTTP goes through the sidecar: the application takes its time for the answer, and is not ended before.
			began = time.Now()
			c.kubectl("-n", "shop", "delete", "deployment", "hooked")
			c.kubectl("-n", "shop", "wait", "--for=delete", "pods", "-l", "app=hooked", "--timeout=60s")
			if took := time.Since(began); took < hookTakes {
				s.t.Errorf("%s: gone %s after it was to go; its preStop hook takes %s", c.Name, took, hookTakes)
			}
			s.until(30*time.Second, func() error { return c.event("shop", "FailedPreStopHook", "", "sick-hook") }) // one that should fail
			for pod := range strings.Lines(c.kubectl("-n", "shop", "get", "events", "--field-selector=reason=FailedPreStopHook", "-o", `jsonpath={range .items[*]}{.involvedObject.name}{"\n"}{end}`)) {
				if !strings.HasPrefix(pod, "sick-hook") {
					s.t.Errorf("%s: the preStop hook of %s failed", c.Name, strings.TrimSpace(pod))
				}
			}
		})
	})
	s.step("Jobs finish", func() {
		each(func(c *cluster) {
			for name, url := range map[string]string{"good": paymentsAt, "bad": paymentsAt + "status/500"} {
				c.apply(fmt.Sprintf("apiVersion: batch/v1\nkind: Job\nmetadata: {name: %s, namespace: shop}\nspec: {backoffLimit: 0, template: %s}\n", name,
					template(name, `{account: caller, restart: Never, args: [call, --proxy, "", --count, "5", --interval, 100ms, "`+url+`"]}`)))
			}
			for name, condition := range map[string]string{"good": "Complete", "bad": "Failed"} {
				c.kubectl("-n", "shop", "wait", "--for=condition="+condition, "job/"+name, "--timeout=60s")
				for _, p := range c.podsOf("shop", name) {
					app, proxy := p.Status.ContainerStatuses[0].State.Terminated, p.Status.InitContainerStatuses[1].State.Terminated
					if app == nil || proxy == nil || proxy.ExitCode != 0 || proxy.FinishedAt.Before(&app.FinishedAt) || proxy.FinishedAt.Sub(app.FinishedAt.Time) > 5*time.Second {
						s.t.Errorf("%s: Job %s: the application ended with %+v, its sidecar with %+v", c.Name, name, app, proxy)
						continue
					}
					s.t.Logf("%s: the sidecar of Job %s ended %.0f s after the application", c.Name, name, proxy.FinishedAt.Sub(app.FinishedAt.Time).Seconds())
				}
			}
		})
	})
	s.step("what is not exported", func() {
		each(func(c *cluster) {
			c.apply("apiVersion: v1\nkind: Pod\nmetadata: {name: ledger-0, namespace: shop, labels: {app: payments, hanse.mesh/inject: disabled}}\nspec: " + podSpec(`{args: [serve, --http, ":8080", --tcp, ":9090"]}`) + "\n")
			c.export("payments")
			s.until(30*time.Second, func() error {
				out := c.kubectl("-n", "shop", "get", "serviceexport", "payments", "-o", `jsonpath={.status.conditions[?(@.type=="Ready")].message}`)
				if !strings.HasPrefix(out, "1 of 3 endpoints are not exported: pod ledger-0 has no sidecar; ") {
					return fmt.Errorf("%s: Ready says %q", c.Name, out)
				}
				return nil
			})
			if out := s.hanse("--context", c.Name, "services"); !strings.Contains(out, "not exported: shop/payments: 1 endpoint of this cluster, without identity") {
				s.t.Errorf("%s: hanse services: %s", c.Name, out)
			}
			c.kubectl("-n", "shop", "delete", "pod", "ledger-0")
			s.until(30*time.Second, func() error {
				if out := c.kubectl("-n", "shop", "get", "serviceexport", "payments", "-o", `jsonpath={.status.conditions[?(@.type=="Ready")].message}`); out != "other clusters may read it" {
					return fmt.Errorf("%s: Ready says %q", c.Name, out)
				}
				return nil
			})
		})
	})
	s.step("no hansed", func() {
		each(func(c *cluster) {
			c.kubectl("-n", "shop", "scale", "deployment/load", "deployment/load-grpc", "--replicas=1")
			for _, d := range []string{"load", "load-grpc"} {
				c.kubectl("-n", "shop", "rollout", "status", "deployment/"+d, "--timeout=60s")
			}
		})
		loads := map[*cluster]*load{west: west.load(), east: east.load()}
		each(func(c *cluster) {
			c.kubectl("-n", system, "scale", "statefulset/hansed", "--replicas=0")
			c.kubectl("-n", system, "wait", "--for=delete", "pod/hansed-0", "--timeout=60s")
		})
		each(func(c *cluster) { // the API server does all that it is asked for
			c.kubectl("-n", "plain", "scale", "deployment/outside", "--replicas=2")
			c.kubectl("-n", "shop", "scale", "deployment/late", "--replicas=1")
			c.apply("apiVersion: hanse.mesh/v1alpha1\nkind: TrafficPolicy\nmetadata: {name: payments, namespace: shop}\nspec: {targetRefs: [{kind: Service, name: payments}], loadBalancer: {type: RingHash, hashHeader: x-user}}\n")
			c.apply(s.inject(c, deployment("piped", "late", late)))
			c.kubectl("-n", "plain", "rollout", "status", "deployment/outside", "--timeout=60s")
		})
		s.until(30*time.Second, func() error { return west.event("shop", "FailedCreate", "failed calling webhook") })
		if p := west.podsOf("shop", "late"); len(p) > 0 {
			s.t.Errorf("west: a pod that wants a sidecar was made without hansed: %s", containers(p[0]))
		}
		east.kubectl("-n", "shop", "rollout", "status", "deployment/late", "--timeout=60s")
		if p := east.podsOf("shop", "late"); len(p) != 1 || containers(p[0]) != "/ app" {
			s.t.Errorf("east: failurePolicy Ignore: %+v", p)
		}
		s.until(time.Minute, func() error { // a sidecar that has nobody to ask is not ready, and its application does not start
			for _, c := range s.both() {
				p := c.podsOf("piped", "late")
				if len(p) != 1 || len(p[0].Status.InitContainerStatuses) != 2 || p[0].Status.InitContainerStatuses[1].State.Running == nil {
					return fmt.Errorf("%s: the sidecar does not run: %+v", c.Name, p)
				}
			}
			return nil
		})
		time.Sleep(5 * time.Second)
		each(func(c *cluster) {
			if app := c.podsOf("piped", "late")[0].Status.ContainerStatuses[0]; app.State.Waiting == nil || app.State.Waiting.Reason != "PodInitializing" {
				s.t.Errorf("%s: it has started before its sidecar was ready: %+v", c.Name, app.State)
			}
			for range 5 {
				c.mustCall("frontend", paymentsAt)
			}
			c.mustFail("stranger", paymentsAt, "403")
			loads[c].mustHaveServed(500)
		})
		each(func(c *cluster) { c.kubectl("-n", system, "scale", "statefulset/hansed", "--replicas=1") })
		each(func(c *cluster) {
			c.kubectl("-n", system, "rollout", "status", "statefulset/hansed", "--timeout=90s")
			if c == east {
				c.kubectl("-n", "shop", "rollout", "restart", "deployment/late")
			}
			for _, namespace := range []string{"shop", "piped"} {
				c.kubectl("-n", namespace, "rollout", "status", "deployment/late", "--timeout=120s")
				s.until(20*time.Second, func() error {
					if p := c.podsOf(namespace, "late"); len(p) != 1 || containers(p[0]) != "hanse-capture hanse-proxy / app" {
						return fmt.Errorf("%s: %s/late: %+v", c.Name, namespace, p)
					}
					return nil
				})
				first, _, _ := strings.Cut(c.kubectl("-n", namespace, "logs", "deployment/late", "-c", "app"), "\n")
				var r result
				if err := json.Unmarshal([]byte(first), &r); err != nil || !r.OK || r.Answer.Caller != "spiffe://"+c.Name+".example/ns/"+namespace+"/sa/caller" {
					s.t.Errorf("%s: the first call of %s/late: %s", c.Name, namespace, first)
				}
			}
		})
	})
	s.step("hanse inject makes the same pod", func() {
		each(func(c *cluster) {
			hook, piped := wantedOf(c.podsOf("shop", "late")[0]), wantedOf(c.podsOf("piped", "late")[0])
			if hook != piped {
				s.t.Errorf("%s: by the webhook\n%s\nby hanse inject\n%s", c.Name, hook, piped)
			}
		})
	})
}

// inject is `hanse inject -f`, with the values that the cluster was installed with.
func (s *scene) inject(c *cluster, yaml string) string {
	s.t.Helper()
	dir := s.t.TempDir()
	file, values := filepath.Join(dir, "app.yaml"), filepath.Join(dir, "values.yaml")
	capture := "pod"
	if c == s.east {
		capture = "node"
	}
	for name, text := range map[string]string{file: yaml, values: fmt.Sprintf("cluster: %s\ntrustDomain: %[1]s.example\ncapture: %s\nimagePullPolicy: IfNotPresent\n", c.Name, capture)} {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			s.t.Fatal(err)
		}
	}
	return s.hanse("inject", "-f", file, "--values", values)
}

// podsOf are the pods of an application that are not going.
func (c *cluster) podsOf(namespace, app string) []corev1.Pod {
	c.s.t.Helper()
	var list corev1.PodList
	if err := json.Unmarshal([]byte(c.kubectl("-n", namespace, "get", "pods", "-l", "app="+app, "-o", "json")), &list); err != nil {
		c.s.t.Fatalf("%s: %v", c.Name, err)
	}
	return slices.DeleteFunc(list.Items, func(p corev1.Pod) bool { return p.DeletionTimestamp != nil })
}

// containers names those of a pod, in their order.
func containers(p corev1.Pod) string {
	names := []string{}
	for _, c := range p.Spec.InitContainers {
		names = append(names, c.Name)
	}
	names = append(names, "/")
	for _, c := range p.Spec.Containers {
		names = append(names, c.Name)
	}
	return strings.Join(names, " ")
}

var tokenVolume = regexp.MustCompile(`kube-api-access-[a-z0-9]{5}`)

// wantedOf is what was asked for in a pod, without what its name and a restart make of it. Volumes have no order: the API server adds one before webhooks see the pod.
func wantedOf(p corev1.Pod) string {
	delete(p.Annotations, "kubectl.kubernetes.io/restartedAt")
	slices.SortFunc(p.Spec.Volumes, func(a, b corev1.Volume) int {
		return strings.Compare(tokenVolume.ReplaceAllString(a.Name, ""), tokenVolume.ReplaceAllString(b.Name, ""))
	})
	b, err := json.MarshalIndent(map[string]any{"spec": p.Spec, "annotations": p.Annotations}, "", " ")
	if err != nil {
		return err.Error()
	}
	return tokenVolume.ReplaceAllString(string(b), "kube-api-access")
}

// event: there is one for this reason, whose message and object's name have these in them.
func (c *cluster) event(namespace, reason, message string, object ...string) error {
	c.s.t.Helper()
	out := c.kubectl("-n", namespace, "get", "events", "--field-selector=reason="+reason, "-o", `jsonpath={range .items[*]}{.involvedObject.name}: {.message}{"\n"}{end}`)
	for line := range strings.Lines(out) {
		if strings.Contains(line, message) && !slices.ContainsFunc(object, func(o string) bool { return !strings.HasPrefix(line, o) }) {
			return nil
		}
	}
	return fmt.Errorf("%s: no event %s %v with %q: %s", c.Name, reason, object, message, out)
}
