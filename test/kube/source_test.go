package kube

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/rest"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/discovery/kube"
	"github.com/hanse-mesh/hanse/discovery/objects"
)

func insecure() *tls.Config { return &tls.Config{InsecureSkipVerify: true} } // only to ask whether it is ready

var (
	services = schema.GroupVersionResource{Version: "v1", Resource: "services"}
	pods     = schema.GroupVersionResource{Version: "v1", Resource: "pods"}
	nodes    = schema.GroupVersionResource{Version: "v1", Resource: "nodes"}
	slicesR  = schema.GroupVersionResource{Group: "discovery.k8s.io", Version: "v1", Resource: "endpointslices"}
	exports  = schema.GroupVersionResource{Group: "multicluster.x-k8s.io", Version: "v1beta1", Resource: "serviceexports"}
	crdsR    = schema.GroupVersionResource{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"}
)

var self = discovery.Self{Cluster: "west", TrustDomain: "west.demo", Network: "west", Region: "eu-1"}

// source reads s until the test ends.
func source(t testing.TB, s *server) *kube.Source {
	t.Helper()
	return sourceOf(t, s.config)
}

// sourceOf is source by another way to the server.
func sourceOf(t testing.TB, config *rest.Config) *kube.Source {
	t.Helper()
	level := slog.LevelInfo
	if testing.Verbose() {
		level = slog.LevelDebug
	}
	src, err := kube.New(kube.Config{REST: config, Log: slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: level}))})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- src.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return src
}

// until waits for what must become true.
func until(t testing.TB, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !f(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within a minute: %s", what)
		}
	}
}

// snapshot builds what the objects mean, with endpoint IDs and times that can be compared.
func snapshot(t testing.TB, set *objects.Set) (*discovery.Snapshot, []*objects.Fault) {
	t.Helper()
	n := 0
	snap, _, faults := objects.Build(objects.Input{Self: self, Set: set, Now: time.Unix(0, 0), Complete: true,
		NewID: func(discovery.Name, string) string { n++; return fmt.Sprintf("%032x", n) }})
	for _, f := range faults {
		f.File, f.Line = "", 0
	}
	return snap, faults
}

// TestSameSnapshotAsFromFiles: the objects of docs/examples mean the same from a directory and from an API server.
func TestSameSnapshotAsFromFiles(t *testing.T) {
	t.Parallel()
	s := start(t)
	s.crds(filepath.Join(module(t, "sigs.k8s.io/gateway-api"), "config/crd/experimental"), "httproutes", "grpcroutes", "tlsroutes", "tcproutes", "referencegrants")
	s.crds(filepath.Join(module(t, "sigs.k8s.io/mcs-api"), "config/crd"), "serviceexports", "serviceimports")
	s.crds("../../deploy/crd", "hanse.mesh")
	files, err := filepath.Glob("../../docs/examples/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no examples: %v", err)
	}
	var objs []objects.Object
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		decoded, err := objects.Decode(b, f)
		if err != nil {
			t.Fatal(err)
		}
		decoded = slices.DeleteFunc(decoded, func(o objects.Object) bool { // the first is not read, the second is SPIRE's to define
			return o.Kind == "Drill" || o.Kind == "ClusterFederatedTrustDomain"
		})
		objs = append(objs, decoded...)
	}
	for _, o := range objs {
		if ns := o.Key().Namespace; ns != "" && ns != "default" {
			s.namespaces(ns)
		}
	}
	for _, o := range objs {
		b, err := json.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		u := decode(t, b)[0]
		k, _ := objects.LookupKind(o.Kind)
		u.SetAPIVersion(k.APIVersions[0])
		u.SetKind(o.Kind)
		if o.Kind == "ServiceExport" {
			u.SetAPIVersion("multicluster.x-k8s.io/v1beta1")
		}
		delete(u.Object, "status")
		unset(u.Object, "metadata", "creationTimestamp")
		if err := s.tryApply(u); err != nil {
			t.Fatalf("apply %s: %v", o.Key(), err)
		}
	}
	src := source(t, s)
	until(t, "all objects are there", func() bool { return src.Complete() && src.Set().Len() >= len(objs) })
	for _, o := range objs { // older routes go before newer ones, and files say nothing of age
		if there, ok := src.Set().Get(o.Key()); ok {
			o.Value.SetCreationTimestamp(there.Value.GetCreationTimestamp())
		}
	}
	want, wantFaults := snapshot(t, objects.NewSet(objs...))
	if f := src.Faults(); len(f) > 0 {
		t.Errorf("faults: %v", f)
	}
	set := src.Set()
	for _, o := range set.List("", "") { // what every API server has
		if o.Key() == (objects.Key{Kind: "Service", Namespace: "default", Name: "kubernetes"}) {
			set = set.Delete(o.Key())
		}
	}
	got, gotFaults := snapshot(t, set)
	ignore := []cmp.Option{
		cmp.Transformer("", func(b discovery.ByName[*discovery.Service]) map[discovery.Name]*discovery.Service {
			return maps.Collect(b.All())
		}),
		cmpopts.IgnoreTypes(time.Time{}), cmpopts.EquateEmpty(),
		cmpopts.EquateComparable(netip.Addr{}, netip.AddrPort{}),
		cmpopts.IgnoreFields(discovery.Service{}, "ClusterIPs"), // the server gives them
		cmp.Comparer(func(a, b discovery.Traits) bool { // defaults that the server writes down
			a, b = a.Normal(), b.Normal()
			a.IPFamilies, b.IPFamilies = nil, nil
			return a.Equal(b)
		}),
		cmp.FilterValues(func(a, b []discovery.RouteMatch) bool { return len(a)+len(b) > 0 }, cmp.Transformer("matches", func(m []discovery.RouteMatch) []any { // likewise: everything is the prefix /
			all := discovery.RouteMatch{Path: &discovery.PathMatch{Type: discovery.MatchPrefix, Value: "/"}}
			if len(m) == 0 {
				return []any{all}
			}
			out := make([]any, len(m))
			for i := range m {
				out[i] = m[i]
			}
			return out
		})),
		cmpopts.SortSlices(func(a, b *discovery.Endpoint) bool { return a.Address.Less(b.Address) }),
		cmpopts.IgnoreFields(discovery.Endpoint{}, "ID"),
	}
	if d := cmp.Diff(want, got, ignore...); d != "" {
		t.Errorf("Snapshot from files (-) and from the API server (+):\n%s", d)
	}
	if d := cmp.Diff(wantFaults, gotFaults, cmpopts.EquateEmpty()); d != "" {
		t.Errorf("faults from files (-) and from the API server (+):\n%s", d)
	}
}

func unset(m map[string]any, path ...string) {
	for _, p := range path[:len(path)-1] {
		m, _ = m[p].(map[string]any)
	}
	delete(m, path[len(path)-1])
}

const shop = `
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Service
metadata: {name: payments, namespace: shop}
spec:
  ports: [{name: http, port: 8080}]
---
apiVersion: v1
kind: Node
metadata: {name: n1, labels: {topology.kubernetes.io/region: eu-9, topology.kubernetes.io/zone: eu-9a}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: payments-x7
  namespace: shop
  labels: {kubernetes.io/service-name: payments, endpointslice.kubernetes.io/managed-by: endpointslice-controller.k8s.io}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints:
- {addresses: [10.1.0.1], nodeName: n1, zone: eu-9a, targetRef: {kind: Pod, name: p1, namespace: shop}}
- {addresses: [10.1.0.2], nodeName: n1, zone: eu-9a, targetRef: {kind: Pod, name: p2, namespace: shop}}
- {addresses: [10.1.0.3], targetRef: {kind: Pod, name: unknown, namespace: shop}}
`

func podYAML(name, account, annotations string) []byte {
	return fmt.Appendf(nil, `
apiVersion: v1
kind: Pod
metadata: {name: %s, namespace: shop, annotations: {%s}}
spec: {serviceAccountName: %s, containers: [{name: app, image: app}]}
`, name, annotations, account)
}

func endpoint(s *discovery.Snapshot, address string) *discovery.Endpoint {
	svc := s.Services.Get(discovery.Name{Namespace: "shop", Name: "payments"})
	if svc == nil {
		return nil
	}
	for _, e := range svc.Endpoints {
		if e.Address.String() == address {
			return e
		}
	}
	return nil
}

// TestPodsAndNodes: whose an endpoint is, and where, comes from its Pod and Node, and follows them.
func TestPodsAndNodes(t *testing.T) {
	t.Parallel()
	s := start(t)
	s.apply([]byte(shop))
	s.apply(podYAML("p1", "payments", `hanse.mesh/sidecar: "v1"`))
	s.apply(podYAML("p2", "billing", ""))
	src := source(t, s)
	until(t, "the first Snapshot", src.Complete)
	snap, faults := snapshot(t, src.Set())
	if len(faults) > 0 {
		t.Errorf("faults: %v", faults)
	}
	for _, want := range []struct {
		address, id string
		transport   discovery.Transport
		region      string
	}{
		{"10.1.0.1", "spiffe://west.demo/ns/shop/sa/payments", discovery.Hop, "eu-9"},
		{"10.1.0.2", "", discovery.Plaintext, "eu-9"},
		{"10.1.0.3", "", discovery.Plaintext, "eu-1"},
	} {
		e := endpoint(snap, want.address)
		if e == nil {
			t.Fatalf("no endpoint %s in %v", want.address, snap.Services)
		}
		if e.SPIFFEID != want.id || e.Transport != want.transport || e.Locality.Region != want.region {
			t.Errorf("endpoint %s is %s by %s in region %s, want %s by %s in %s", want.address, e.SPIFFEID, e.Transport, e.Locality.Region, want.id, want.transport, want.region)
		}
	}
	account := func(name string) discovery.Name { return discovery.Name{Namespace: "shop", Name: name} }
	if got := src.Accounts(); !slices.Equal(got, []discovery.Name{account("payments")}) {
		t.Errorf("accounts with sidecars: %v", got)
	}
	if err := s.patch(pods, "shop", "p2", `{"metadata":{"annotations":{"hanse.mesh/sidecar":"v1"}}}`); err != nil {
		t.Fatal(err)
	}
	until(t, "p2 has its identity", func() bool {
		snap, _ := snapshot(t, src.Set())
		e := endpoint(snap, "10.1.0.2")
		return e != nil && e.SPIFFEID == "spiffe://west.demo/ns/shop/sa/billing"
	})
	if err := s.patch(nodes, "", "n1", `{"metadata":{"labels":{"topology.kubernetes.io/region":"us-1"}}}`); err != nil {
		t.Fatal(err)
	}
	until(t, "n1 has moved", func() bool {
		snap, _ := snapshot(t, src.Set())
		e := endpoint(snap, "10.1.0.1")
		return e != nil && e.Locality.Region == "us-1"
	})
	s.delete(slicesR, "shop", "payments-x7")
	until(t, "all parts of the slice are gone", func() bool { return len(src.Set().List("EndpointSlice", "shop")) == 0 })
	if got := src.Accounts(); !slices.Equal(got, []discovery.Name{account("billing"), account("payments")}) {
		t.Errorf("accounts with sidecars, of a service or not: %v", got)
	}
	for len(src.Updated()) > 0 {
		<-src.Updated()
	}
	s.delete(pods, "shop", "p1")
	<-src.Updated()
	until(t, "an account goes with its last Pod", func() bool { return slices.Equal(src.Accounts(), []discovery.Name{account("billing")}) })
}

// TestDefinitionsComeAndGo: kinds are read while their CustomResourceDefinition exists, and nothing waits for those that do not.
func TestDefinitionsComeAndGo(t *testing.T) {
	t.Parallel()
	s := start(t)
	s.apply([]byte(shop))
	src := source(t, s)
	until(t, "complete without any definition", src.Complete)
	s.crds(filepath.Join(module(t, "sigs.k8s.io/mcs-api"), "config/crd"), "serviceexports")
	s.apply([]byte("apiVersion: multicluster.x-k8s.io/v1beta1\nkind: ServiceExport\nmetadata: {name: payments, namespace: shop}\n"))
	exported := func() bool { return len(src.Set().List("ServiceExport", "")) == 1 }
	until(t, "the export is read", exported)
	s.delete(crdsR, "", "serviceexports.multicluster.x-k8s.io")
	until(t, "the export is gone with its definition", func() bool { return !exported() })
	if src.Set().Len() == 0 {
		t.Error("everything went")
	}
	// Somebody's own definition of Drill: nothing happens by its objects, and that is said.
	drills := func() bool {
		return slices.ContainsFunc(src.Faults(), func(f *objects.Fault) bool { return f.Object == "CustomResourceDefinition drills.hanse.mesh" })
	}
	s.apply([]byte("apiVersion: apiextensions.k8s.io/v1\nkind: CustomResourceDefinition\nmetadata: {name: drills.hanse.mesh}\nspec: {group: hanse.mesh, scope: Cluster, names: {kind: Drill, plural: drills, singular: drill}, " +
		"versions: [{name: v1alpha1, served: true, storage: true, schema: {openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}}]}\n"))
	until(t, "the definition is reported", drills)
	s.delete(crdsR, "", "drills.hanse.mesh")
	until(t, "it no longer is", func() bool { return !drills() })
}

// TestServerRestarts: an API server that is away costs freshness only, and what changed meanwhile comes.
func TestServerRestarts(t *testing.T) {
	t.Parallel()
	s := start(t)
	s.crds(filepath.Join(module(t, "sigs.k8s.io/mcs-api"), "config/crd"), "serviceexports")
	s.apply([]byte(shop))
	s.apply([]byte("apiVersion: multicluster.x-k8s.io/v1beta1\nkind: ServiceExport\nmetadata: {name: payments, namespace: shop}\n"))
	src := source(t, s)
	until(t, "everything is read", func() bool { return src.Complete() && len(src.Set().List("ServiceExport", "")) == 1 })
	before := src.Set().Len()
	for range 2 {
		s.kill()
		time.Sleep(2 * time.Second)
		if n := src.Set().Len(); n != before {
			t.Fatalf("%d objects while the server is away, %d before", n, before)
		}
		s.run()
		if n := src.Set().Len(); n != before {
			t.Fatalf("%d objects after the restart, %d before", n, before)
		}
	}
	s.apply([]byte("apiVersion: v1\nkind: Service\nmetadata: {name: later, namespace: shop}\nspec: {ports: [{name: http, port: 80}]}\n"))
	until(t, "a later change comes", func() bool {
		_, ok := src.Set().Get(objects.Key{Kind: "Service", Namespace: "shop", Name: "later"})
		return ok
	})
	if n := src.Set().Len(); n != before+1 {
		t.Errorf("%d objects, want %d", n, before+1)
	}
}

// TestInvalidKeepsLastGood: an object that becomes invalid is reported, and its last valid state stays in force.
func TestInvalidKeepsLastGood(t *testing.T) {
	t.Parallel()
	s := start(t)
	s.apply([]byte(shop))
	src := source(t, s)
	until(t, "complete", src.Complete)
	if err := s.patch(services, "shop", "payments", `{"metadata":{"annotations":{"hanse.mesh/clusterset":"maybe"}},"spec":{"ports":[{"name":"http","port":9999}]}}`); err != nil {
		t.Fatal(err)
	}
	until(t, "the fault is reported", func() bool { return len(src.Faults()) == 1 })
	f := src.Faults()[0]
	if f.Object != "Service shop/payments" || f.Field != "metadata.annotations[hanse.mesh/clusterset]" || f.Value != "maybe" {
		t.Errorf("fault: %v", f)
	}
	snap, _ := snapshot(t, src.Set())
	if p := snap.Services.Get(discovery.Name{Namespace: "shop", Name: "payments"}).Ports[0].Number; p != 8080 {
		t.Errorf("port %d is in force, want the last good 8080", p)
	}
	if err := s.patch(services, "shop", "payments", `{"metadata":{"annotations":{"hanse.mesh/clusterset":"true"}}}`); err != nil {
		t.Fatal(err)
	}
	until(t, "the corrected object is in force", func() bool {
		snap, _ := snapshot(t, src.Set())
		return len(src.Faults()) == 0 && snap.Services.Get(discovery.Name{Namespace: "shop", Name: "payments"}).Ports[0].Number == 9999
	})
}
