package kube

import (
	"context"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/hanse-mesh/hanse/discovery/kube/inject"
)

// TestInjection: a real API server takes what the webhook makes of Pods, defaults and strict validation included, in namespaces that want it; Pods that opt out are as they were, wrong annotations are refused by name and
// value, and the CA bundle and hanse-root are there, and come back when somebody takes them away.
func TestInjection(t *testing.T) {
	t.Parallel()
	s := start(t)
	s.namespaces("shop", "plain", "strict")
	namespaces := schema.GroupVersionResource{Version: "v1", Resource: "namespaces"}
	for name, labels := range map[string]string{"shop": `"hanse.mesh/inject": "enabled"`, "strict": `"hanse.mesh/inject": "enabled", "pod-security.kubernetes.io/enforce": "restricted"`} {
		if err := s.patch(namespaces, "", name, `{"metadata": {"labels": {`+labels+`}}}`); err != nil {
			t.Fatal(err)
		}
	}
	h := newHansed(t, s)
	_, port, _ := net.SplitHostPort(h.webhook)
	hook := func(name, selector, object string) string {
		return fmt.Sprintf(`
- name: %s.inject.hanse.mesh
  admissionReviewVersions: [v1]
  clientConfig: {url: "https://localhost:%s/inject/%s"}
  rules: [{apiGroups: [""], apiVersions: [v1], resources: [pods], operations: [CREATE], scope: Namespaced}]
  failurePolicy: Fail
  sideEffects: None
  namespaceSelector: {matchExpressions: [{key: hanse.mesh/inject, operator: %s, values: [enabled]}]}
  objectSelector: {matchExpressions: [{key: hanse.mesh/inject, operator: %s}]}`, name, port, name, selector, object)
	}
	s.apply([]byte("apiVersion: admissionregistration.k8s.io/v1\nkind: MutatingWebhookConfiguration\nmetadata: {name: hanse-inject}\nwebhooks:" +
		hook("namespace", "In", "NotIn, values: [disabled]") + hook("pod", "NotIn", "In, values: [enabled]")))
	configurations := schema.GroupVersionResource{Group: "admissionregistration.k8s.io", Version: "v1", Resource: "mutatingwebhookconfigurations"}
	told := func() bool {
		n := 0
		for _, w := range at[[]any](s.get(configurations, "", "hanse-inject"), "webhooks") {
			if config, _ := w.(map[string]any)["clientConfig"].(map[string]any); config["caBundle"] != nil {
				n++
			}
		}
		return n == 2
	}
	until(t, "the API server is told whom to trust", told)

	pod := func(namespace, metadata, spec string) string {
		return fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata: {name: app, namespace: %s%s}\nspec: {%s serviceAccountName: app, containers: [{name: app, image: x, ports: [{name: web, containerPort: 8080}], readinessProbe: {httpGet: {path: /ready, port: web}}, "+
			"securityContext: {runAsNonRoot: true, runAsUser: 1000, allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}, seccompProfile: {type: RuntimeDefault}}}]}\n", namespace, metadata, spec)
	}
	submitPod := func(yaml string) (*corev1.Pod, error) {
		o := decode(t, []byte(yaml))[0]
		r, err := s.resource(o)
		if err != nil {
			return nil, err
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		got, err := r.Create(ctx, o, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}, FieldValidation: metav1.FieldValidationStrict})
		if err != nil {
			return nil, err
		}
		var pod corev1.Pod
		return &pod, runtime.DefaultUnstructuredConverter.FromUnstructured(got.Object, &pod)
	}
	create := func(namespace, metadata, spec string) (*corev1.Pod, error) {
		return submitPod(pod(namespace, metadata, spec))
	}
	has := func(p *corev1.Pod) bool {
		return len(p.Spec.InitContainers) == 2 && p.Spec.InitContainers[1].Name == "hanse-proxy" && p.Annotations["hanse.mesh/sidecar"] != "" && p.Spec.Containers[0].ReadinessProbe.HTTPGet.Path == "/check/app/readiness"
	}
	var last error
	defer func() {
		if t.Failed() {
			t.Logf("of the first Pod: %v", last)
		}
	}()
	until(t, "the webhook answers", func() bool { _, last = create("shop", "", ""); return last == nil })
	for name, c := range map[string]struct {
		namespace, metadata, spec string
		injected                  bool
		refused                   string
	}{
		"the namespace wants it":     {"shop", "", "", true, ""},
		"the Pod does not":           {"shop", ", labels: {hanse.mesh/inject: disabled}", "", false, ""},
		"nor by annotation":          {"shop", ", annotations: {hanse.mesh/inject: disabled}", "", false, ""},
		"nobody wants it":            {"plain", "", "", false, ""},
		"the Pod alone":              {"plain", ", labels: {hanse.mesh/inject: enabled}", "", true, ""},
		"the node's network":         {"shop", "", "hostNetwork: true,", false, ""},
		"every setting":              {"shop", `, annotations: {hanse.mesh/proxy-cpu: 50m, hanse.mesh/proxy-memory-limit: 1Gi, hanse.mesh/workload-api: "true", hanse.mesh/capture-exempt-ports: "9100"}`, "", true, ""},
		"a wrong setting":            {"shop", ", annotations: {hanse.mesh/proxy-cpu: much}", "", false, `annotation hanse.mesh/proxy-cpu: "much"`},
		"Pod Security is the last":   {"strict", "", "", false, "NET_ADMIN"},
		"who has none is restricted": {"strict", ", labels: {hanse.mesh/inject: disabled}", "", false, ""},
	} {
		pod, err := create(c.namespace, c.metadata, c.spec)
		switch {
		case c.refused != "":
			if err == nil || !strings.Contains(err.Error(), c.refused) {
				t.Errorf("%s: %v, want %q in it", name, err, c.refused)
			}
		case err != nil:
			t.Errorf("%s: %v", name, err)
		case has(pod) != c.injected:
			t.Errorf("%s: injected %v, want %v: %+v", name, has(pod), c.injected, pod.Spec.InitContainers)
		}
	}

	// With capture from the node, Pod Security "restricted" takes a Pod with its sidecar.
	v := inject.Values{Cluster: "west", TrustDomain: "west.demo", Image: "hanse-proxy:test", Capture: inject.CaptureOnNode}
	if err := v.Complete(); err != nil {
		t.Fatal(err)
	}
	out, _, err := v.File([]byte(pod("strict", "", "")))
	if err != nil {
		t.Fatal(err)
	}
	if p, err := submitPod(string(out)); err != nil || !has(p) {
		t.Errorf("captured from the node: %+v, %v", p, err)
	}

	maps := schema.GroupVersionResource{Version: "v1", Resource: "configmaps"}
	root := func() bool {
		o := s.get(maps, "shop", "hanse-root")
		return o != nil && strings.Contains(at[string](o, "data", "bundle.json"), `"x5c"`)
	}
	until(t, "hanse-root is there", root)
	s.delete(maps, "shop", "hanse-root")
	until(t, "hanse-root is back", root)
	if err := s.patch(configurations, "", "hanse-inject", fmt.Sprintf(`{"webhooks": [{"name": "a.inject.hanse.mesh", "admissionReviewVersions": ["v1"], "sideEffects": "None", "clientConfig": {"url": "https://localhost:%[1]s/inject/namespace"}}, {"name": "b.inject.hanse.mesh", "admissionReviewVersions": ["v1"], "sideEffects": "None", "clientConfig": {"url": "https://localhost:%[1]s/inject/pod"}}]}`, port)); err != nil {
		t.Fatal(err)
	}
	until(t, "the CA bundle is back", told)
}
