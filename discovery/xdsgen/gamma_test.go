package xdsgen_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/discovery/objects"
	"github.com/hanse-mesh/hanse/discovery/xdsgen"
)

// services are what the routes below are about; store is exported by other clusters, store-far by them only.
const services = `
apiVersion: v1
kind: Service
metadata: {name: store, namespace: shop}
spec: {ports: [{name: http, port: 80}, {name: http-admin, port: 8081}, {name: tcp, port: 9000}]}
---
apiVersion: v1
kind: Service
metadata: {name: store-v2, namespace: shop}
spec: {type: NodePort, ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: pods, namespace: shop}
spec: {clusterIP: None, ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: outside, namespace: shop}
spec: {type: ExternalName, externalName: example.com}
---
apiVersion: v1
kind: Service
metadata: {name: public, namespace: shop}
spec: {type: LoadBalancer, ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: ledger, namespace: books}
spec: {ports: [{name: http, port: 80}]}
---
`

const (
	clusterLocal = "store.shop.svc.cluster.local:80"
	clusterset   = "store.shop.svc.clusterset.local:80"
)

// mesh is services, and routes of some kind.
func mesh(t *testing.T, routes ...string) *xdsgen.View {
	t.Helper()
	objs, err := objects.Decode([]byte(services+strings.Join(routes, "\n---\n")), "gamma.yaml")
	if err != nil {
		t.Fatal(err)
	}
	snap, _, _ := objects.Build(objects.Input{Self: discovery.Self{Cluster: "west", TrustDomain: "west.example", Network: "west"}, Set: objects.NewSet(objs...), Now: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC), Complete: true})
	imports := map[discovery.Name]*discovery.Import{}
	for _, name := range []string{"store", "store-far"} {
		n := discovery.Name{Namespace: "shop", Name: name}
		imports[n] = &discovery.Import{Name: n, Ports: []discovery.Port{{Name: "http", Number: 80, Protocol: discovery.HTTP}}}
	}
	return xdsgen.NewView(&discovery.Clusterset{Local: snap, Imports: discovery.NewByName(imports)}, nil)
}

func route(kind, namespace, name, spec string) string {
	return fmt.Sprintf("apiVersion: gateway.networking.k8s.io/v1\nkind: %s\nmetadata: {name: %s, namespace: %s, creationTimestamp: \"2026-01-01T00:00:00Z\"}\nspec: {%s}\n", kind, name, namespace, spec)
}

// parent and to are parts of a route's spec.
func parent(name string, more ...string) string {
	return fmt.Sprintf("parentRefs: [{group: '', kind: Service, name: %s%s}]", name, strings.Join(append([]string{""}, more...), ", "))
}

func to(backends ...string) string {
	return "rules: [{backendRefs: [" + strings.Join(backends, ", ") + "]}]"
}

const imported = "group: multicluster.x-k8s.io, kind: ServiceImport, "

// goes says where a request of a caller in a namespace ends: its targets with their weights, or what it is answered.
func goes(t *testing.T, v *xdsgen.View, namespace, authority, path string) string {
	t.Helper()
	r, err := v.Routes(&xdsgen.Viewer{Namespace: namespace, Cluster: "west"}, authority)
	if err != nil {
		return err.Error()
	}
	rule := r.Match(&xdsgen.Request{Method: "GET", Path: path})
	if rule == nil {
		return "404"
	}
	var out []string
	for _, x := range rule.Targets {
		if x.Invalid != "" {
			out = append(out, "500")
			continue
		}
		out = append(out, fmt.Sprintf("%s×%d", strings.Replace(x.Authority, ".svc.", " ", 1), x.Weight))
	}
	return strings.Join(out, ", ")
}

// TestGAMMA holds what GEP-1294, GEP-1426 and GEP-1748 say of routes with a Service as parent: docs/gamma.md names a subtest for each sentence.
func TestGAMMA(t *testing.T) {
	v2 := to("{name: store-v2, port: 80}")
	const onV2 = "store-v2.shop cluster.local:80×1"
	type call struct{ namespace, authority, path, want string }
	for _, c := range []struct {
		name   string
		routes []string
		calls  []call
	}{
		{"without a route all traffic works", nil, []call{{"shop", clusterLocal, "/", "store.shop cluster.local:80×1"}, {"lab", clusterset, "/", "store.shop clusterset.local:80×1"}}},
		{"a route replaces what would happen without it", []string{route("HTTPRoute", "shop", "r", parent("store")+", rules: [{matches: [{path: {value: /cart}}], backendRefs: [{name: store-v2, port: 80}]}]")},
			[]call{{"shop", clusterLocal, "/cart", onV2}, {"shop", clusterLocal, "/other", "404"}}},
		{"weights split the traffic", []string{route("HTTPRoute", "shop", "r", parent("store")+","+to("{name: store, port: 80, weight: 90}", "{name: store-v2, port: 80, weight: 10}"))},
			[]call{{"lab", clusterLocal, "/", "store.shop cluster.local:80×90, store-v2.shop cluster.local:80×10"}}},
		{"a Service without endpoints of its own is a parent", []string{route("HTTPRoute", "shop", "r", parent("store")+","+v2)}, []call{{"shop", clusterLocal, "/", onV2}}}, // none here has an EndpointSlice
		{"a headless Service is no parent", []string{route("HTTPRoute", "shop", "r", parent("pods")+","+v2)}, []call{{"shop", "pods.shop.svc.cluster.local:80", "/", "pods.shop cluster.local:80×1"}}},
		{"NodePort and LoadBalancer are parents and backends", []string{route("HTTPRoute", "shop", "a", parent("public")+","+v2), route("HTTPRoute", "shop", "b", parent("store-v2")+","+to("{name: public, port: 80}"))},
			[]call{{"shop", "public.shop.svc.cluster.local:80", "/", onV2}, {"shop", "store-v2.shop.svc.cluster.local:80", "/", "public.shop cluster.local:80×1"}}},
		{"an ExternalName is no backend", []string{route("HTTPRoute", "shop", "r", parent("store")+","+to("{name: outside, port: 80}"))}, []call{{"shop", clusterLocal, "/", "500"}}},
		{"a backend that does not exist is answered 500", []string{route("HTTPRoute", "shop", "r", parent("store")+","+to("{name: gone, port: 80}"))}, []call{{"shop", clusterLocal, "/", "500"}}},
		{"a port binds to that port only", []string{route("HTTPRoute", "shop", "r", parent("store", "port: 8081")+","+v2)},
			[]call{{"shop", "store.shop.svc.cluster.local:8081", "/", onV2}, {"shop", clusterLocal, "/", "store.shop cluster.local:80×1"}}},
		{"without a port a route binds to all", []string{route("HTTPRoute", "shop", "r", parent("store")+","+v2)}, []call{{"shop", "store.shop.svc.cluster.local:8081", "/", onV2}, {"shop", clusterLocal, "/", onV2}}},
		{"hostnames have no meaning", []string{route("HTTPRoute", "shop", "r", "hostnames: [elsewhere.example], "+parent("store")+","+v2)}, []call{{"shop", clusterLocal, "/", onV2}}},
		{"a producer route holds for callers of all namespaces", []string{route("HTTPRoute", "shop", "r", parent("store")+","+v2)}, []call{{"shop", clusterLocal, "/", onV2}, {"lab", clusterLocal, "/", onV2}, {"books", clusterset, "/", "store-v2.shop clusterset.local:80×1"}}},
		{"a consumer route holds for its own namespace only", []string{route("HTTPRoute", "lab", "r", parent("store", "namespace: shop")+","+to("{name: store-v2, namespace: shop, port: 80}"))},
			[]call{{"lab", clusterLocal, "/", onV2}, {"shop", clusterLocal, "/", "store.shop cluster.local:80×1"}, {"books", clusterLocal, "/", "store.shop cluster.local:80×1"}}},
		{"a consumer route stands for the producer's", []string{route("HTTPRoute", "shop", "p", parent("store")+", rules: [{matches: [{path: {value: /producer}}], backendRefs: [{name: public, port: 80}]}]"),
			route("HTTPRoute", "lab", "r", parent("store", "namespace: shop")+", rules: [{matches: [{path: {value: /consumer}}], backendRefs: [{name: store-v2, namespace: shop, port: 80}]}]")},
			[]call{{"lab", clusterLocal, "/consumer", onV2}, {"lab", clusterLocal, "/producer", "404"}, {"books", clusterLocal, "/producer", "public.shop cluster.local:80×1"}}},
		{"routes of one kind and group are merged", []string{route("HTTPRoute", "shop", "a", parent("store")+","+to("{name: public, port: 80}")), route("HTTPRoute", "shop", "b", parent("store")+", rules: [{matches: [{path: {value: /cart}}], backendRefs: [{name: store-v2, port: 80}]}]")},
			[]call{{"shop", clusterLocal, "/cart", onV2}, {"shop", clusterLocal, "/", "public.shop cluster.local:80×1"}}},
		{"a backend's own routes are not gone through", []string{route("HTTPRoute", "shop", "a", parent("store")+","+v2), route("HTTPRoute", "shop", "b", parent("store-v2")+","+to("{name: public, port: 80}"))},
			[]call{{"shop", clusterLocal, "/", onV2}, {"shop", "store-v2.shop.svc.cluster.local:80", "/", "public.shop cluster.local:80×1"}}},
		{"a GRPCRoute goes before an HTTPRoute", []string{route("HTTPRoute", "shop", "a", parent("store")+","+to("{name: public, port: 80}")), route("GRPCRoute", "shop", "g", parent("store", "port: 80")+","+v2)},
			[]call{{"shop", clusterLocal, "/", onV2}, {"shop", "store.shop.svc.cluster.local:8081", "/", "public.shop cluster.local:80×1"}}},
		{"backends of the route's and of the parent's namespace need no grant", []string{route("HTTPRoute", "books", "r", parent("store", "namespace: shop")+","+to("{name: ledger, port: 80}", "{name: store-v2, namespace: shop, port: 80}"))},
			[]call{{"books", clusterLocal, "/", "ledger.books cluster.local:80×1, store-v2.shop cluster.local:80×1"}}},
		{"backends of a third namespace need a grant", []string{route("HTTPRoute", "shop", "r", parent("store")+","+to("{name: ledger, namespace: books, port: 80}"))}, []call{{"shop", clusterLocal, "/", "500"}}},
		{"a grant lets a route send there", []string{route("HTTPRoute", "shop", "r", parent("store")+","+to("{name: ledger, namespace: books, port: 80}")), grant("books", "HTTPRoute", "shop", "group: '', kind: Service")},
			[]call{{"shop", clusterLocal, "/", "ledger.books cluster.local:80×1"}}},

		{"a ServiceImport is a backend", []string{route("HTTPRoute", "shop", "r", parent("store")+","+to("{"+imported+"name: store-far, port: 80}"))}, []call{{"shop", clusterLocal, "/", "store-far.shop clusterset.local:80×1"}}},
		{"what can be routed to a Service can be to a ServiceImport", []string{route("HTTPRoute", "shop", "r", parent("store")+", rules: [{matches: [{method: GET, path: {value: /far}}], backendRefs: [{"+imported+"name: store-far, port: 80}]}, {backendRefs: [{"+imported+"name: store, port: 80}]}]")},
			[]call{{"shop", clusterLocal, "/far", "store-far.shop clusterset.local:80×1"}, {"shop", clusterLocal, "/", "store.shop clusterset.local:80×1"}}},
		{"a Service and a ServiceImport share the traffic", []string{route("HTTPRoute", "shop", "r", parent("store")+","+to("{name: store, port: 80, weight: 90}", "{"+imported+"name: store, port: 80, weight: 10}"))},
			[]call{{"shop", clusterLocal, "/", "store.shop cluster.local:80×90, store.shop clusterset.local:80×10"}}},
		{"a ServiceImport of another namespace needs a grant for its kind", []string{route("HTTPRoute", "books", "r", "parentRefs: [{group: '', kind: Service, name: ledger}], "+to("{"+imported+"name: store-far, namespace: shop, port: 80}")), grant("shop", "HTTPRoute", "books", "group: '', kind: Service")},
			[]call{{"books", "ledger.books.svc.cluster.local:80", "/", "500"}}},
		{"a grant lets a route send to a ServiceImport", []string{route("HTTPRoute", "books", "r", "parentRefs: [{group: '', kind: Service, name: ledger}], "+to("{"+imported+"name: store-far, namespace: shop, port: 80}")), grant("shop", "HTTPRoute", "books", "group: multicluster.x-k8s.io, kind: ServiceImport")},
			[]call{{"books", "ledger.books.svc.cluster.local:80", "/", "store-far.shop clusterset.local:80×1"}}},
		{"a ServiceImport as parent means what is called in the clusterset", []string{route("HTTPRoute", "shop", "r", "parentRefs: [{"+imported+"name: store}], "+to("{"+imported+"name: store-far, port: 80}"))},
			[]call{{"shop", clusterset, "/", "store-far.shop clusterset.local:80×1"}, {"shop", clusterLocal, "/", "store.shop cluster.local:80×1"}}},
		{"a Service as backend means the own cluster", []string{route("HTTPRoute", "shop", "r", parent("store")+","+to("{name: store, port: 80}"))}, []call{{"shop", clusterLocal, "/", "store.shop cluster.local:80×1"}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := mesh(t, c.routes...)
			for _, x := range c.calls {
				if got := goes(t, v, x.namespace, x.authority, x.path); got != x.want {
					t.Errorf("from %s to %s%s: %s, want %s", x.namespace, x.authority, x.path, got, x.want)
				}
			}
		})
	}
}

// TestGAMMATLSBeforeTCP: of a port that is carried as it is, connections with a name of a TLSRoute are its, and the others the TCPRoute's.
func TestGAMMATLSBeforeTCP(t *testing.T) {
	v := mesh(t, route("TCPRoute", "shop", "t", parent("store", "port: 9000")+","+to("{name: public, port: 80}")), route("TLSRoute", "shop", "s", "hostnames: [a.example], "+parent("store", "port: 9000")+","+to("{name: store-v2, port: 80}")))
	r, err := v.Routes(&xdsgen.Viewer{Namespace: "shop", Cluster: "west"}, "store.shop.svc.cluster.local:9000")
	if err != nil {
		t.Fatal(err)
	}
	for sni, want := range map[string]string{"a.example": "TLSRoute shop/s rule 1", "b.example": "TCPRoute shop/t rule 1", "": "TCPRoute shop/t rule 1"} {
		if rule := r.Match(&xdsgen.Request{SNI: sni}); rule == nil || rule.Name != want {
			t.Errorf("%q: %+v, want %s", sni, rule, want)
		}
	}
}

func grant(namespace, kind, from, to string) string {
	return fmt.Sprintf("apiVersion: gateway.networking.k8s.io/v1\nkind: ReferenceGrant\nmetadata: {name: g, namespace: %s}\nspec: {from: [{group: gateway.networking.k8s.io, kind: %s, namespace: %s}], to: [{%s}]}\n", namespace, kind, from, to)
}
