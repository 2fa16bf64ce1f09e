package kube

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/discovery/kube"
)

func gatewayResource(plural string) schema.GroupVersionResource {
	return schema.GroupVersionResource{Group: "gateway.networking.k8s.io", Version: "v1", Resource: plural}
}

// parents says "controller name: Accepted=… ResolvedRefs=…" of each entry of a route's status.
func parents(o *unstructured.Unstructured) []string {
	if o == nil {
		return nil
	}
	list, _, _ := unstructured.NestedSlice(o.Object, "status", "parents")
	var out []string
	for _, p := range list {
		m := p.(map[string]any)
		name, _, _ := unstructured.NestedString(m, "parentRef", "name")
		said := fmt.Sprintf("%s %s:", m["controllerName"], name)
		conditions, _, _ := unstructured.NestedSlice(m, "conditions")
		for _, c := range conditions {
			c := c.(map[string]any)
			said += fmt.Sprintf(" %s=%s", c["type"], c["reason"])
		}
		out = append(out, said)
	}
	return out
}

// TestRouteStatus: what the leader writes into routes of all kinds, on change only, beside what other controllers write.
func TestRouteStatus(t *testing.T) {
	t.Parallel()
	s := start(t)
	s.crds(filepath.Join(module(t, "sigs.k8s.io/gateway-api"), "config/crd/standard"), "httproutes", "grpcroutes", "tlsroutes", "tcproutes", "referencegrants")
	s.namespaces("shop")
	src := source(t, s)
	m := &mesh{newer: make(chan struct{})}
	reg := prometheus.NewRegistry()
	w := kube.NewWriter(kube.WriterConfig{Source: src, Self: self, View: m.View, Log: slog.New(slog.NewTextHandler(t.Output(), nil)), Registerer: reg})
	run(t, w.Run)
	follow := func(ctx context.Context) error { // as hansed does: what is read becomes the view
		for {
			snap, _ := snapshot(t, src.Set())
			m.show(&discovery.Clusterset{Local: snap, Imports: discovery.NewByName(map[discovery.Name]*discovery.Import{})})
			select {
			case <-ctx.Done():
				return nil
			case <-src.Updated():
			}
		}
	}
	run(t, follow)
	s.apply([]byte(`
apiVersion: v1
kind: Service
metadata: {name: payments, namespace: shop}
spec: {ports: [{name: http, port: 80}, {name: tcp, port: 9000}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: r, namespace: shop}
spec:
  parentRefs: [{group: "", kind: Service, name: payments}, {name: ingress}]
  rules: [{backendRefs: [{name: payments, port: 80}, {name: later, port: 80}]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: GRPCRoute
metadata: {name: r, namespace: shop}
spec:
  parentRefs: [{group: "", kind: Service, name: gone}]
  rules: [{backendRefs: [{name: payments, port: 80}]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: TCPRoute
metadata: {name: r, namespace: shop}
spec:
  parentRefs: [{group: "", kind: Service, name: payments, port: 9000}]
  rules: [{backendRefs: [{name: payments, port: 9000}]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: TLSRoute
metadata: {name: r, namespace: shop}
spec:
  hostnames: ["*.example"]
  parentRefs: [{group: "", kind: Service, name: payments, sectionName: tcp}]
  rules: [{backendRefs: [{name: payments, port: 9000}]}]
`))
	says := func(plural string, want ...string) {
		t.Helper()
		until(t, fmt.Sprintf("%s says %q", plural, want), func() bool {
			return strings.Join(parents(s.get(gatewayResource(plural), "shop", "r")), "\n") == strings.Join(want, "\n")
		})
	}
	const ours = "hanse.mesh/controller "
	says("httproutes", ours+"payments: Accepted=Accepted ResolvedRefs=BackendNotFound")
	says("grpcroutes", ours+"gone: Accepted=NoMatchingParent ResolvedRefs=ResolvedRefs")
	says("tcproutes", ours+"payments: Accepted=Accepted ResolvedRefs=ResolvedRefs")
	says("tlsroutes", ours+"payments: Accepted=Accepted ResolvedRefs=ResolvedRefs")

	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	routes := s.client.Resource(gatewayResource("httproutes")).Namespace("shop")
	now := time.Now().UTC().Format(time.RFC3339)
	theirs := fmt.Sprintf(`{"op":"add","path":"/status/parents/-","value":{"controllerName":"example.com/ingress","parentRef":{"name":"ingress"},"conditions":[{"type":"Accepted","status":"True","reason":"Accepted","message":"","lastTransitionTime":%q}]}}`, now)
	if _, err := routes.Patch(ctx, "r", types.JSONPatchType, []byte("["+theirs+"]"), metav1.PatchOptions{}, "status"); err != nil {
		t.Fatal(err)
	}
	s.apply([]byte("apiVersion: v1\nkind: Service\nmetadata: {name: later, namespace: shop}\nspec: {ports: [{name: http, port: 80}]}\n"))
	says("httproutes", "example.com/ingress ingress: Accepted=Accepted", ours+"payments: Accepted=Accepted ResolvedRefs=ResolvedRefs")

	// A filter that the API server takes and Hanse does not: not accepted, and what was in force still is.
	bad := `[{"op":"add","path":"/spec/rules/0/filters","value":[{"type":"ExtensionRef","extensionRef":{"group":"example.com","kind":"Auth","name":"a"}}]}]`
	if _, err := routes.Patch(ctx, "r", types.JSONPatchType, []byte(bad), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	says("httproutes", "example.com/ingress ingress: Accepted=Accepted", ours+"payments: Accepted=UnsupportedValue ResolvedRefs=ResolvedRefs")
	if snap, _ := snapshot(t, src.Set()); len(snap.Routes) != 4 {
		t.Errorf("%d routes are in force, want those of before: 4", len(snap.Routes))
	}
	if faults := src.Faults(); len(faults) != 1 || faults[0].Field != "spec.rules[0].filters[0].type" {
		t.Errorf("faults %v", faults)
	}

	// Nothing is written without need.
	wrote := func() float64 {
		n := 0.0
		for _, plural := range []string{"httproutes", "grpcroutes", "tlsroutes", "tcproutes"} {
			n += written(t, reg, plural)
		}
		return n
	}
	before := wrote()
	until(t, "what was written is counted, which is a moment after it is seen", func() bool {
		was := before
		time.Sleep(300 * time.Millisecond)
		before = wrote()
		return before == was
	})
	s.apply([]byte("apiVersion: v1\nkind: Service\nmetadata: {name: another, namespace: shop}\nspec: {ports: [{name: http, port: 80}]}\n"))
	until(t, "it is seen", func() bool { snap, _ := snapshot(t, src.Set()); return snap.Services.Len() >= 3 })
	time.Sleep(300 * time.Millisecond)
	if after := wrote(); after != before {
		t.Errorf("%v statuses were written for a Service that no route names", after-before)
	}
}

// run runs f until the test ends.
func run(t *testing.T, f func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// written counts the writes of a resource's status.
func written(t *testing.T, reg *prometheus.Registry, resource string) float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	n := 0.0
	for _, f := range families {
		if f.GetName() != "hanse_kube_writes_total" {
			continue
		}
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				if l.GetName() == "resource" && l.GetValue() == resource {
					n += m.GetCounter().GetValue()
				}
			}
		}
	}
	return n
}
