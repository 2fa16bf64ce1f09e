package objects

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	"sigs.k8s.io/yaml"

	"github.com/hanse-mesh/hanse/discovery"
)

const statusWorld = `
apiVersion: v1
kind: Service
metadata: {name: payments, namespace: shop}
spec: {ports: [{name: http, port: 80}, {name: tcp, port: 9000}]}
---
apiVersion: v1
kind: Service
metadata: {name: outside, namespace: shop}
spec: {type: ExternalName, externalName: example.com}
---
apiVersion: v1
kind: Service
metadata: {name: pods, namespace: shop}
spec: {clusterIP: None, ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: calls, namespace: shop}
spec: {ports: [{name: grpc, port: 80}, {name: http, port: 81}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: GRPCRoute
metadata: {name: first, namespace: shop}
spec:
  parentRefs: [{group: "", kind: Service, name: calls, port: 80}]
  rules: [{backendRefs: [{name: calls, port: 80}]}]
---
apiVersion: v1
kind: Service
metadata: {name: ledger, namespace: books}
spec: {ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: ledger, namespace: closed}
spec: {ports: [{name: http, port: 80}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: ReferenceGrant
metadata: {name: r, namespace: books}
spec:
  from: [{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: shop}]
  to: [{group: "", kind: Service}]
`

// world is what statusWorld means, with an import that only another cluster exports.
func world(t *testing.T) (*Set, *discovery.Clusterset) {
	t.Helper()
	objs, err := Decode([]byte(statusWorld), "world.yaml")
	if err != nil {
		t.Fatal(err)
	}
	set := NewSet(objs...)
	snap, _, _ := Build(Input{Self: testSelf, Set: set, Now: testNow, NewID: counter(), Complete: true})
	far := &discovery.Import{Name: discovery.Name{Namespace: "shop", Name: "far"}, Ports: []discovery.Port{{Name: "http", Number: 80, Protocol: discovery.HTTP}}}
	return set, &discovery.Clusterset{Local: snap, Imports: discovery.NewByName(map[discovery.Name]*discovery.Import{far.Name: far})}
}

// read returns a route as an API server holds it: what is wrong with it does not keep it out.
func read(t *testing.T, kind, spec string) (Object, []*Fault) {
	t.Helper()
	_, v, why := newValue(kind, "gateway.networking.k8s.io/v1")
	if why != "" {
		t.Fatal(why)
	}
	if err := yaml.UnmarshalStrict(fmt.Appendf(nil, "metadata: {name: r, namespace: shop, generation: 7}\nspec: {%s}\n", spec), v); err != nil {
		t.Fatal(err)
	}
	o := Object{Kind: kind, Value: v}
	return o, slices.DeleteFunc(Faults(Validate(o)), func(f *Fault) bool { return f.Foreign })
}

func TestRouteParents(t *testing.T) {
	const (
		service  = `parentRefs: [{group: "", kind: Service, name: payments, port: 80}]`
		accepted = "Accepted=True/Accepted"
		resolved = "ResolvedRefs=True/ResolvedRefs"
	)
	backend := func(ref string) string { return "rules: [{backendRefs: [" + ref + "]}]" }
	good := backend("{name: payments, port: 80}")
	for _, c := range []struct {
		name, kind, spec string
		want             []string // parent: conditions, and a part of the message of one that is False
		says             string
	}{
		{"in force", "HTTPRoute", service + "," + good, []string{accepted + " " + resolved}, ""},
		{"other controllers' parents are theirs", "HTTPRoute", `parentRefs: [{name: gw}, {group: "", kind: Service, name: payments}],` + good, []string{accepted + " " + resolved}, ""},
		{"only other controllers' parents", "HTTPRoute", `parentRefs: [{name: gw}],` + good, nil, ""},
		{"no such Service", "HTTPRoute", `parentRefs: [{group: "", kind: Service, name: gone}],` + good, []string{"Accepted=False/NoMatchingParent " + resolved}, "spec.parentRefs[0].name: there is no Service shop/gone"},
		{"ExternalName", "HTTPRoute", `parentRefs: [{group: "", kind: Service, name: outside}],` + good, []string{"Accepted=False/NoMatchingParent " + resolved}, "there is no Service shop/outside"},
		{"a headless Service", "HTTPRoute", `parentRefs: [{group: "", kind: Service, name: pods}],` + good, []string{"Accepted=False/NoMatchingParent " + resolved}, "spec.parentRefs[0]: \"shop/pods\": is headless"},
		{"a GRPCRoute has the port", "HTTPRoute", `parentRefs: [{group: "", kind: Service, name: calls, port: 80}],` + good, []string{"Accepted=False/Conflicted " + resolved}, "spec.parentRefs[0]: GRPCRoute shop/first is for the same ports of shop/calls"},
		{"a GRPCRoute has another port", "HTTPRoute", `parentRefs: [{group: "", kind: Service, name: calls}],` + good, []string{accepted + " " + resolved}, ""},
		{"a GRPCRoute of its kind", "GRPCRoute", `parentRefs: [{group: "", kind: Service, name: calls, port: 80}],` + good, []string{accepted + " " + resolved}, ""},
		{"no such port", "HTTPRoute", `parentRefs: [{group: "", kind: Service, name: payments, port: 81}, {group: "", kind: Service, name: payments}],` + good, []string{"Accepted=False/NoMatchingParent " + resolved, accepted + " " + resolved}, `spec.parentRefs[0].port: "81"`},
		{"no such sectionName", "HTTPRoute", `parentRefs: [{group: "", kind: Service, name: payments, sectionName: web}],` + good, []string{"Accepted=False/NoMatchingParent " + resolved}, "spec.parentRefs[0].sectionName"},
		{"a TCP port", "HTTPRoute", `parentRefs: [{group: "", kind: Service, name: payments, port: 9000}],` + good, []string{"Accepted=False/NoMatchingParent " + resolved}, "appProtocol"},
		{"TCPRoute", "TCPRoute", `parentRefs: [{group: "", kind: Service, name: payments, port: 9000}],` + backend("{name: payments, port: 9000}"), []string{accepted + " " + resolved}, ""},
		{"TCPRoute on an HTTP port", "TCPRoute", service + "," + good, []string{"Accepted=False/NoMatchingParent " + resolved}, "carried as tcp"},
		{"TLSRoute", "TLSRoute", `hostnames: [a.example], parentRefs: [{group: "", kind: Service, name: payments, sectionName: tcp}],` + backend("{name: payments, port: 9000}"), []string{accepted + " " + resolved}, ""},
		{"ServiceImport as parent and backend", "HTTPRoute", `parentRefs: [{group: multicluster.x-k8s.io, kind: ServiceImport, name: far}],` + backend("{group: multicluster.x-k8s.io, kind: ServiceImport, name: far, port: 80}"), []string{accepted + " " + resolved}, ""},
		{"nobody exports the ServiceImport", "HTTPRoute", `parentRefs: [{group: multicluster.x-k8s.io, kind: ServiceImport, name: payments}],` + good, []string{"Accepted=False/NoMatchingParent " + resolved}, "no cluster exports a Service shop/payments"},
		{"unknown backend", "HTTPRoute", service + "," + backend("{name: payments, port: 80}, {name: gone, port: 80}"), []string{accepted + " ResolvedRefs=False/BackendNotFound"}, "spec.rules[0].backendRefs[1]: there is no Service shop/gone"},
		{"unknown port of a backend", "HTTPRoute", service + "," + backend("{name: payments, port: 82}"), []string{accepted + " ResolvedRefs=False/BackendNotFound"}, "no TCP port 82"},
		{"wrong kind of backend", "HTTPRoute", service + "," + backend("{group: example.com, kind: Bucket, name: b}"), []string{accepted + " ResolvedRefs=False/InvalidKind"}, "spec.rules[0].backendRefs[0]: Bucket"},
		{"a grant lets it", "HTTPRoute", service + "," + backend("{name: ledger, namespace: books, port: 80}"), []string{accepted + " " + resolved}, ""},
		{"no grant lets it", "HTTPRoute", service + "," + backend("{name: ledger, namespace: closed, port: 80}"), []string{accepted + " ResolvedRefs=False/RefNotPermitted"}, "no ReferenceGrant in closed"},
		{"a grant for another kind", "GRPCRoute", service + "," + backend("{name: ledger, namespace: books, port: 80}"), []string{accepted + " ResolvedRefs=False/RefNotPermitted"}, "GRPCRoute shop/r"},
		{"a consumer's route to the producer's namespace", "HTTPRoute", `parentRefs: [{group: "", kind: Service, name: ledger, namespace: closed}],` + backend("{name: ledger, namespace: closed, port: 80}"), []string{accepted + " " + resolved}, ""},
		{"unknown mirror", "HTTPRoute", service + `, rules: [{filters: [{type: RequestMirror, requestMirror: {backendRef: {name: gone, port: 80}}}], backendRefs: [{name: payments, port: 80}]}]`, []string{accepted + " ResolvedRefs=False/BackendNotFound"}, "spec.rules[0].filters: there is no Service"},
		{"unsupported filter", "HTTPRoute", service + `, rules: [{filters: [{type: CORS, cors: {}}], backendRefs: [{name: payments, port: 80}]}]`, []string{"Accepted=False/UnsupportedValue " + resolved}, "spec.rules[0].filters[0].type"},
		{"filters that exclude each other", "HTTPRoute", service + `, rules: [{filters: [{type: RequestRedirect, requestRedirect: {}}, {type: URLRewrite, urlRewrite: {hostname: a.b}}]}]`, []string{"Accepted=False/IncompatibleFilters " + resolved}, "exclude each other"},
	} {
		t.Run(c.name, func(t *testing.T) {
			set, view := world(t)
			o, faults := read(t, c.kind, c.spec)
			parents, differ, ok := RouteParents(o, faults, set, view, testNow)
			if !ok || differ != (len(c.want) > 0) {
				t.Fatalf("differ %v, ok %v", differ, ok)
			}
			var got []string
			messages := ""
			for _, p := range parents {
				var said []string
				for _, cond := range p.Conditions {
					said = append(said, fmt.Sprintf("%s=%s/%s", cond.Type, cond.Status, cond.Reason))
					if cond.ObservedGeneration != 7 || !cond.LastTransitionTime.Time.Equal(testNow) || p.ControllerName != "hanse.mesh/controller" {
						t.Errorf("%+v of %s", cond, p.ControllerName)
					}
					if cond.Status != metav1.ConditionTrue {
						messages += cond.Message + "\n"
					}
				}
				got = append(got, strings.Join(said, " "))
			}
			if !slices.Equal(got, c.want) {
				t.Errorf("got %q\nwant %q\n%s", got, c.want, messages)
			}
			if !strings.Contains(messages, c.says) || c.says == "" && messages != "" {
				t.Errorf("says %q, want %q", messages, c.says)
			}
		})
	}
}

// TestRouteParentsAreKept: entries of others stay, times too, ours of parents that are gone go, and what is right is not written again.
func TestRouteParentsAreKept(t *testing.T) {
	set, view := world(t)
	o, _ := read(t, "HTTPRoute", `parentRefs: [{group: "", kind: Service, name: payments}], rules: [{backendRefs: [{name: payments, port: 80}]}]`)
	route := o.Value.(*gatewayv1.HTTPRoute)
	theirs := gatewayv1.RouteParentStatus{ControllerName: "example.com/ingress", ParentRef: gatewayv1.ParentReference{Name: "gw"}, Conditions: []metav1.Condition{{Type: "Accepted", Status: "False", Reason: "Pending"}}}
	stale := gatewayv1.RouteParentStatus{ControllerName: ControllerName, ParentRef: gatewayv1.ParentReference{Name: "old", Kind: ptr[gatewayv1.Kind]("Service"), Group: ptr[gatewayv1.Group]("")}}
	route.Status.Parents = []gatewayv1.RouteParentStatus{theirs, stale}
	first, differ, _ := RouteParents(o, nil, set, view, testNow)
	if !differ || len(first) != 2 || !sameParent(first[0], theirs) || first[1].ParentRef.Name != "payments" {
		t.Fatalf("%+v", first)
	}
	route.Status.Parents = first
	later := testNow.Add(time.Hour)
	if again, differ, _ := RouteParents(o, nil, set, view, later); differ {
		t.Errorf("written again: %+v", again)
	}
	route.Generation = 8
	again, differ, _ := RouteParents(o, nil, set, view, later)
	if c := again[1].Conditions[0]; !differ || c.ObservedGeneration != 8 || !c.LastTransitionTime.Time.Equal(testNow) {
		t.Errorf("differ %v, %+v: the generation is new, the time is not", differ, c)
	}
	view.Local.Services = view.Local.Services.Delete(discovery.Name{Namespace: "shop", Name: "payments"})
	if _, _, ok := RouteParents(o, nil, set, view, later); ok {
		t.Error("a view that lacks a Service of the Set says nothing about it")
	}
}

func ptr[T any](v T) *T { return &v }
