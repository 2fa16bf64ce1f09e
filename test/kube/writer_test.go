package kube

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/discovery/kube"
)

var imports = schema.GroupVersionResource{Group: "multicluster.x-k8s.io", Version: "v1beta1", Resource: "serviceimports"}

// mesh is the view that a Writer obeys.
type mesh struct {
	mu    sync.Mutex
	view  *discovery.Clusterset
	newer chan struct{}
}

func (m *mesh) View() (*discovery.Clusterset, <-chan struct{}) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.view, m.newer
}

func (m *mesh) set(local *discovery.Snapshot, imports ...*discovery.Import) {
	v := &discovery.Clusterset{Local: local}
	for _, i := range imports {
		v.Imports = v.Imports.Put(i.Name, i)
	}
	m.show(v)
}

func (m *mesh) show(v *discovery.Clusterset) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.view = v
	close(m.newer)
	m.newer = make(chan struct{})
}

// writer writes to s until the test ends.
func writer(t *testing.T, s *server, src *kube.Source) *mesh {
	t.Helper()
	m := &mesh{newer: make(chan struct{})}
	w := kube.NewWriter(kube.WriterConfig{Source: src, Self: self, View: m.View, Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return m
}

func imported(members int) *discovery.Import {
	i := &discovery.Import{Name: discovery.Name{Namespace: "shop", Name: "payments"}, Ports: []discovery.Port{{Name: "http", Number: 8080, Protocol: discovery.HTTP}, {Name: "dns", Number: 53, UDP: true, Protocol: discovery.TCP}},
		Labels: map[string]string{"tier": "gold"}}
	for m := range members {
		from := discovery.ImportedFrom{Member: fmt.Sprintf("c%d", m), Ports: i.Ports, Exported: time.Unix(0, 0)}
		for e := range 3 {
			from.Endpoints = append(from.Endpoints, &discovery.Endpoint{
				ID:      fmt.Sprintf("%016x%016x", m, e),
				Address: netip.AddrFrom4([4]byte{10, 9, byte(m), byte(e + 1)}),
				Profile: &discovery.Profile{Ports: map[string]uint16{"http": 9090, "dns": 5353}, Network: "west", Locality: discovery.Locality{Cluster: from.Member, Zone: "z"}},
				Ready:   true,
			})
		}
		from.Endpoints = append(from.Endpoints, &discovery.Endpoint{
			ID:      fmt.Sprintf("%016xffffffffffffffff", m),
			Address: netip.MustParseAddr("10.99.0.1"),
			Profile: &discovery.Profile{Ports: map[string]uint16{"http": 1}, Network: "elsewhere"},
			Ready:   true,
		})
		i.From = append(i.From, from)
	}
	return i
}

func (s *server) get(r schema.GroupVersionResource, namespace, name string) *unstructured.Unstructured {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	o, err := s.client.Resource(r).Namespace(namespace).Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		s.t.Fatal(err)
	}
	return o
}

func (s *server) list(r schema.GroupVersionResource, namespace, selector string) []unstructured.Unstructured {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	l, err := s.client.Resource(r).Namespace(namespace).List(ctx, metav1.ListOptions{LabelSelector: selector})
	if err != nil {
		s.t.Fatal(err)
	}
	return l.Items
}

func condition(o *unstructured.Unstructured, typ string) (status, reason string) {
	if o == nil {
		return "", ""
	}
	list, _, _ := unstructured.NestedSlice(o.Object, "status", "conditions")
	for _, c := range list {
		if m := c.(map[string]any); m["type"] == typ {
			return m["status"].(string), m["reason"].(string)
		}
	}
	return "", ""
}

// mcs is an API server with KEP-1645's kinds, the shop, and a Writer.
func mcs(t *testing.T) (*server, *kube.Source, *mesh) {
	t.Helper()
	s := start(t)
	s.crds(filepath.Join(module(t, "sigs.k8s.io/mcs-api"), "config/crd"), "serviceexports", "serviceimports")
	s.apply([]byte(shop))
	src := source(t, s)
	until(t, "complete", src.Complete)
	return s, src, writer(t, s, src)
}

// TestImportsAreWritten: a ServiceImport, the Service with its IPs and the EndpointSlices of each cluster come and go with the import, and
// are put right when somebody changes them.
func TestImportsAreWritten(t *testing.T) {
	t.Parallel()
	s, src, m := mcs(t)
	local, _ := snapshot(t, src.Set())
	m.set(local, imported(2))
	until(t, "the import is ready", func() bool {
		status, _ := condition(s.get(imports, "shop", "payments"), "Ready")
		return status == "True"
	})
	i := s.get(imports, "shop", "payments")
	ips, _, _ := unstructured.NestedStringSlice(i.Object, "spec", "ips")
	if typ, _, _ := unstructured.NestedString(i.Object, "spec", "type"); typ != "ClusterSetIP" || len(ips) != 1 || i.GetLabels()["tier"] != "gold" {
		t.Errorf("ServiceImport: %v", i.Object)
	}
	clusters, _, _ := unstructured.NestedSlice(i.Object, "status", "clusters")
	if len(clusters) != 2 {
		t.Errorf("status.clusters: %v", clusters)
	}
	behind := s.list(services, "shop", "app.kubernetes.io/managed-by=hanse.mesh")
	if len(behind) != 1 {
		t.Fatalf("%d Services behind it", len(behind))
	}
	if ip, _, _ := unstructured.NestedString(behind[0].Object, "spec", "clusterIP"); ip != ips[0] {
		t.Errorf("clusterset IP %s is not the Service's %s", ips[0], ip)
	}
	written := s.list(slicesR, "shop", "multicluster.kubernetes.io/service-name=payments")
	if len(written) != 2 {
		t.Fatalf("%d EndpointSlices, want one a cluster", len(written))
	}
	for _, w := range written {
		l := w.GetLabels()
		endpoints, _, _ := unstructured.NestedSlice(w.Object, "endpoints")
		if l["kubernetes.io/service-name"] != behind[0].GetName() || l["endpointslice.kubernetes.io/managed-by"] != "hanse.mesh" ||
			!slices.Contains([]string{"c0", "c1"}, l["multicluster.kubernetes.io/source-cluster"]) || len(endpoints) != 3 {
			t.Errorf("EndpointSlice: %v with %d endpoints; want 3, none on another network", l, len(endpoints))
		}
	}
	if n := len(src.Set().List("EndpointSlice", "shop")); n != 2 { // the shop's own, in two places
		t.Errorf("%d slices of this cluster: what Hanse writes is none of them", n)
	}

	// Nothing is written twice.
	before := s.get(imports, "shop", "payments").GetResourceVersion()
	m.set(local, imported(2))
	time.Sleep(time.Second)
	if after := s.get(imports, "shop", "payments").GetResourceVersion(); after != before {
		t.Error("an unchanged ServiceImport was written again")
	}

	// What somebody changes or deletes comes back; what a cluster no longer exports goes.
	s.delete(slicesR, "shop", written[0].GetName())
	if err := s.patch(imports, "shop", "payments", `{"spec":{"ports":[{"port":1}]}}`); err != nil {
		t.Fatal(err)
	}
	until(t, "both are put right", func() bool {
		ports, _, _ := unstructured.NestedSlice(s.get(imports, "shop", "payments").Object, "spec", "ports")
		return len(ports) == 2 && len(s.list(slicesR, "shop", "multicluster.kubernetes.io/service-name=payments")) == 2
	})
	m.set(local, imported(1))
	until(t, "one cluster's slice is gone", func() bool {
		return len(s.list(slicesR, "shop", "multicluster.kubernetes.io/service-name=payments")) == 1
	})
	m.set(local)
	until(t, "all is gone", func() bool {
		return s.get(imports, "shop", "payments") == nil && len(s.list(services, "shop", "app.kubernetes.io/managed-by=hanse.mesh")) == 0 &&
			len(s.list(slicesR, "shop", "multicluster.kubernetes.io/service-name=payments")) == 0
	})
	if s.get(services, "shop", "payments") == nil {
		t.Error("the cluster's own Service went, too")
	}
}

// TestImportNeedsItsNamespace: a cluster without the namespace does not import into it, until it has it (KEP-1645 "Namespace sameness").
func TestImportNeedsItsNamespace(t *testing.T) {
	t.Parallel()
	s, src, m := mcs(t)
	i := imported(1)
	i.Name.Namespace = "later"
	local, _ := snapshot(t, src.Set())
	m.set(local, imported(1), i)
	until(t, "the other import is there", func() bool { return s.get(imports, "shop", "payments") != nil })
	if s.get(imports, "later", "payments") != nil {
		t.Error("imported into a namespace that does not exist")
	}
	s.namespaces("later")
	until(t, "the import comes with its namespace", func() bool { return s.get(imports, "later", "payments") != nil })
}

// TestForeignImportStays: a ServiceImport that somebody else wrote is not touched.
func TestForeignImportStays(t *testing.T) {
	t.Parallel()
	s, src, m := mcs(t)
	s.apply([]byte("apiVersion: multicluster.x-k8s.io/v1beta1\nkind: ServiceImport\nmetadata: {name: payments, namespace: shop}\nspec: {type: Headless, ports: [{port: 7}]}\n"))
	local, _ := snapshot(t, src.Set())
	time.Sleep(time.Second) // until it has been read
	m.set(local, imported(1))
	time.Sleep(2 * time.Second)
	if typ, _, _ := unstructured.NestedString(s.get(imports, "shop", "payments").Object, "spec", "type"); typ != "Headless" {
		t.Error("it was overwritten")
	}
	m.set(local)
	time.Sleep(time.Second)
	if s.get(imports, "shop", "payments") == nil {
		t.Error("it was deleted")
	}
}

// TestExportStatus: Valid, Ready and Conflict of a ServiceExport say what is (KEP-1645 "Status").
func TestExportStatus(t *testing.T) {
	t.Parallel()
	s, src, m := mcs(t)
	s.apply([]byte(`
apiVersion: v1
kind: Service
metadata: {name: outside, namespace: shop}
spec: {type: ExternalName, externalName: example.com}
---
apiVersion: multicluster.x-k8s.io/v1beta1
kind: ServiceExport
metadata: {name: payments, namespace: shop}
---
apiVersion: multicluster.x-k8s.io/v1beta1
kind: ServiceExport
metadata: {name: outside, namespace: shop}
---
apiVersion: multicluster.x-k8s.io/v1beta1
kind: ServiceExport
metadata: {name: missing, namespace: shop}
`))
	until(t, "the exports are read", func() bool { return len(src.Set().List("ServiceExport", "shop")) == 3 })
	local, _ := snapshot(t, src.Set())
	i := imported(1)
	i.Conflicts = []discovery.ImportConflict{{Member: "west", With: "c0", Reason: "PortConflict", Message: "port http is 8080 in c0"}}
	m.set(local, i)
	for _, want := range []struct{ name, typ, status, reason string }{
		{"payments", "Valid", "True", "Valid"}, {"payments", "Ready", "True", "Exported"}, {"payments", "Conflict", "True", "PortConflict"},
		{"outside", "Valid", "False", "InvalidServiceType"}, {"missing", "Valid", "False", "NoService"}, {"missing", "Conflict", "False", "NoConflicts"},
	} {
		until(t, fmt.Sprintf("ServiceExport %s is %s=%s (%s)", want.name, want.typ, want.status, want.reason), func() bool {
			status, reason := condition(s.get(exports, "shop", want.name), want.typ)
			return status == want.status && reason == want.reason
		})
	}
}

// TestExportSaysWhatStaysAtHome: Pods without a sidecar are not exported, and the ServiceExport says so for as long as it is so. It is written when that changes only.
func TestExportSaysWhatStaysAtHome(t *testing.T) {
	t.Parallel()
	c := newClusterset(t)
	c.apply([]byte(shop + "---\napiVersion: multicluster.x-k8s.io/v1beta1\nkind: ServiceExport\nmetadata: {name: payments, namespace: shop}\n"))
	c.apply(podYAML("p1", "payments", `hanse.mesh/sidecar: "v1"`))
	c.apply(podYAML("p2", "payments", ""))
	ready := func(want string) string {
		t.Helper()
		var o *unstructured.Unstructured
		until(t, "Ready says "+want, func() bool {
			o = c.get(exports, "shop", "payments")
			list, _, _ := unstructured.NestedSlice(o.Object, "status", "conditions")
			for _, c := range list {
				if m := c.(map[string]any); m["type"] == "Ready" {
					return m["message"] == want && m["status"] == "True"
				}
			}
			return false
		})
		return o.GetResourceVersion()
	}
	version := ready("1 of 3 endpoints are not exported: pod p2 has no sidecar; label namespace shop hanse.mesh/inject=enabled, if it is not, and restart them")
	for i := range 5 { // whatever else happens to it
		if err := c.patch(services, "shop", "payments", fmt.Sprintf(`{"metadata":{"labels":{"round":"%d"}}}`, i)); err != nil {
			t.Fatal(err)
		}
		c.again()
		time.Sleep(200 * time.Millisecond)
	}
	if now := c.get(exports, "shop", "payments").GetResourceVersion(); now != version {
		t.Error("it was written again, and nothing had changed")
	}
	c.apply(podYAML("p2", "payments", `hanse.mesh/sidecar: "v1"`))
	ready("other clusters may read it")
}

// TestAPodThatIsReadAfterItsEndpoint may have a sidecar until then. That it has none changes nothing in the mesh, and is told all the same.
func TestAPodThatIsReadAfterItsEndpoint(t *testing.T) {
	t.Parallel()
	s, src, m := mcs(t)
	s.apply([]byte("apiVersion: multicluster.x-k8s.io/v1beta1\nkind: ServiceExport\nmetadata: {name: payments, namespace: shop}\n"))
	until(t, "the export is read", func() bool { return len(src.Set().List("ServiceExport", "shop")) == 1 })
	local, _ := snapshot(t, src.Set())
	message := func() string {
		list, _, _ := unstructured.NestedSlice(s.get(exports, "shop", "payments").Object, "status", "conditions")
		for _, c := range list {
			if m := c.(map[string]any); m["type"] == "Ready" {
				return m["message"].(string)
			}
		}
		return ""
	}
	m.set(local)
	until(t, "it is exported", func() bool { return message() == "other clusters may read it" })
	time.Sleep(time.Second) // what was written comes back as a change
	s.apply(podYAML("p2", "payments", ""))
	until(t, "Ready names the Pod", func() bool {
		m.set(local)
		return strings.HasPrefix(message(), "1 of 3 endpoints are not exported: pod p2 has no sidecar")
	})
}
