package kube

import (
	"context"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/discovery/kube"
	"github.com/hanse-mesh/hanse/discovery/objects"
	"github.com/hanse-mesh/hanse/federation"
)

// clusterset is one real cluster, west, and what others say they export: the same Build, Merge and Writer as in hansed.
type clusterset struct {
	*server
	src *kube.Source

	mu      sync.Mutex
	others  map[string]map[discovery.Name]*federation.Export // guarded by mu: by member
	states  map[string]discovery.PeerState                   // guarded by mu: fresh if missing
	changed chan struct{}
}

// epoch is when the clusters of this test began to export.
var epoch = time.Now().Add(-time.Hour).Truncate(time.Second)

func newClusterset(t *testing.T, flags ...string) *clusterset {
	t.Helper()
	s := start(t, flags...)
	s.crds(filepath.Join(module(t, "sigs.k8s.io/mcs-api"), "config/crd"), "serviceexports", "serviceimports")
	c := &clusterset{server: s, src: source(t, s), others: map[string]map[discovery.Name]*federation.Export{},
		states: map[string]discovery.PeerState{}, changed: make(chan struct{}, 1)}
	until(t, "complete", c.src.Complete)
	m := writer(t, s, c.src)
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		var state *objects.State
		var snap *discovery.Snapshot
		for {
			snap, state, _ = objects.Build(objects.Input{Self: self, Set: c.src.Set(), State: state, Now: time.Now(), Complete: true})
			c.mu.Lock()
			sources := []federation.Source{{ID: "west", Name: "west", Part: federation.LocalPart(snap, nil, nil)}}
			members := map[string]*discovery.Member{}
			for name, exports := range c.others {
				sources = append(sources, federation.Source{ID: name, Name: name, Part: &federation.Part{Exports: discovery.NewByName(exports)}})
				members[name] = &discovery.Member{Name: name, State: discovery.Fresh}
				if st, ok := c.states[name]; ok {
					members[name].State = st
				}
			}
			c.mu.Unlock()
			m.show(&discovery.Clusterset{Local: snap, Imports: federation.Merge(sources, nil).Imports, Members: members})
			select {
			case <-ctx.Done():
				return
			case <-c.src.Updated():
			case <-c.changed:
			}
		}
	})
	t.Cleanup(func() { cancel(); running.Wait() })
	return c
}

// elsewhere has another cluster export a service, or with nil export it no longer.
func (c *clusterset) elsewhere(member, namespace string, e *federation.Export) {
	c.mu.Lock()
	if c.others[member] == nil {
		c.others[member] = map[discovery.Name]*federation.Export{}
	}
	n := discovery.Name{Namespace: namespace, Name: "hello"}
	if c.others[member][n] = e; e == nil {
		delete(c.others[member], n)
	}
	c.mu.Unlock()
	c.again()
}

func (c *clusterset) state(member string, s discovery.PeerState) {
	c.mu.Lock()
	c.states[member] = s
	c.mu.Unlock()
	c.again()
}

func (c *clusterset) again() {
	select {
	case c.changed <- struct{}{}:
	default:
	}
}

// remote is an export of the service hello by another cluster, older than any of west by minutes, with one endpoint at each address.
func remote(older int, change func(*federation.Export), addresses ...string) *federation.Export {
	e := &federation.Export{Exported: epoch.Add(-time.Duration(older) * time.Minute), Ports: []discovery.Port{{Name: "http", Number: 80, Protocol: discovery.HTTP}}}
	for i, a := range addresses {
		e.Endpoints = append(e.Endpoints, &discovery.Endpoint{
			ID:       fmt.Sprintf("%032x", i+1),
			Address:  netip.MustParseAddr(a),
			Profile:  &discovery.Profile{Ports: map[string]uint16{"http": 8080}, Network: "west", Locality: discovery.Locality{Zone: "z1"}},
			Ready:    true,
			Hostname: fmt.Sprintf("hello-%d", i),
		})
	}
	if change != nil {
		change(e)
	}
	return e
}

// hello makes a namespace with a Service hello of one ready endpoint, and exports it.
func (c *clusterset) hello(namespace, spec string) {
	c.t.Helper()
	c.namespaces(namespace)
	c.service(namespace, spec)
	c.export(namespace, "")
}

func (c *clusterset) service(namespace, spec string) {
	c.t.Helper()
	if spec == "" {
		spec = "{ports: [{name: http, port: 80}]}"
	}
	c.apply(fmt.Appendf(nil, `
apiVersion: v1
kind: Service
metadata: {name: hello, namespace: %[1]s, labels: {of: service}, annotations: {of: service}}
spec: %[2]s
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: hello-x, namespace: %[1]s, labels: {kubernetes.io/service-name: hello}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints: [{addresses: [10.1.0.1], hostname: hello-0, conditions: {ready: true}}]
`, namespace, spec))
}

func (c *clusterset) export(namespace, spec string) {
	c.t.Helper()
	c.apply(fmt.Appendf(nil, "apiVersion: multicluster.x-k8s.io/v1beta1\nkind: ServiceExport\nmetadata: {name: hello, namespace: %s, labels: {of: export}, annotations: {of: export}}\n%s\n", namespace, spec))
}

func (c *clusterset) unexport(namespace string) {
	c.t.Helper()
	c.delete(exports, namespace, "hello")
}

// imported waits until the ServiceImport hello is as f says.
func (c *clusterset) imported(namespace, what string, f func(i *unstructured.Unstructured) bool) *unstructured.Unstructured {
	c.t.Helper()
	var i *unstructured.Unstructured
	until(c.t, "ServiceImport "+namespace+"/hello: "+what, func() bool {
		i = c.get(imports, namespace, "hello")
		return i != nil && f(i)
	})
	return i
}

func (c *clusterset) ready(namespace string) *unstructured.Unstructured {
	c.t.Helper()
	return c.imported(namespace, "ready", func(i *unstructured.Unstructured) bool {
		status, _ := condition(i, "Ready")
		return status == "True"
	})
}

func (c *clusterset) gone(namespace string) {
	c.t.Helper()
	until(c.t, "nothing is left of the import "+namespace+"/hello", func() bool {
		return c.get(imports, namespace, "hello") == nil && len(c.slices(namespace)) == 0 && len(c.list(services, namespace, "app.kubernetes.io/managed-by=hanse.mesh")) == 0
	})
}

// never checks for a moment that there is no ServiceImport, in which another one, of marker, came.
func (c *clusterset) never(namespace, marker string) {
	c.t.Helper()
	c.ready(marker)
	if c.get(imports, namespace, "hello") != nil {
		c.t.Errorf("there is a ServiceImport %s/hello", namespace)
	}
}

func (c *clusterset) slices(namespace string) []unstructured.Unstructured {
	return c.list(slicesR, namespace, "multicluster.kubernetes.io/service-name=hello")
}

func (c *clusterset) exported(namespace, typ, status, reason string) {
	c.t.Helper()
	until(c.t, fmt.Sprintf("ServiceExport %s/hello is %s=%s (%s)", namespace, typ, status, reason), func() bool {
		s, r := condition(c.get(exports, namespace, "hello"), typ)
		return s == status && r == reason
	})
}

func at[T any](o *unstructured.Unstructured, path ...string) T {
	v, _, _ := unstructured.NestedFieldNoCopy(o.Object, path...)
	t, _ := v.(T)
	return t
}

func spec(o *unstructured.Unstructured, field string) string { return at[string](o, "spec", field) }

// ports says what a ServiceImport or Service has, as "name number/protocol".
func ports(o *unstructured.Unstructured) string {
	var out []string
	for _, p := range at[[]any](o, "spec", "ports") {
		m := p.(map[string]any)
		out = append(out, fmt.Sprintf("%v %v/%v", m["name"], m["port"], m["protocol"]))
	}
	slices.Sort(out)
	return strings.Join(out, ", ")
}

func ipsOf(o *unstructured.Unstructured) []string {
	ips, _, _ := unstructured.NestedStringSlice(o.Object, "spec", "ips")
	return ips
}

// addresses are those of all imported EndpointSlices, with the cluster that they say.
func (c *clusterset) addresses(namespace string) string {
	var out []string
	for _, s := range c.slices(namespace) {
		for _, e := range at[[]any](&s, "endpoints") {
			out = append(out, fmt.Sprintf("%s: %v", s.GetLabels()["multicluster.kubernetes.io/source-cluster"], e.(map[string]any)["addresses"].([]any)[0]))
		}
	}
	slices.Sort(out)
	return strings.Join(out, ", ")
}

// TestMCS holds a real API server to what KEP-1645 says that it should hold. docs/mcs.md lists the sentences; each subtest is one of them.
func TestMCS(t *testing.T) {
	t.Parallel()
	c := newClusterset(t)
	c.hello("marker", "")

	t.Run("a Service without a ServiceExport is not exported, even if others export it", func(t *testing.T) {
		c.namespaces("silent")
		c.service("silent", "")
		c.elsewhere("east", "silent", remote(1, nil, "10.2.0.1"))
		i := c.ready("silent")
		if clusters := at[[]any](i, "status", "clusters"); len(clusters) != 1 || c.addresses("silent") != "east: 10.2.0.1" {
			t.Errorf("imported from %v, endpoints %s; want those of east", clusters, c.addresses("silent"))
		}
	})
	t.Run("a ServiceExport exports the Service of its own name and namespace", func(t *testing.T) {
		c.namespaces("here", "there")
		c.service("here", "")
		c.export("there", "")
		c.exported("there", "Valid", "False", "NoService")
		c.never("here", "marker")
		c.export("here", "")
		c.ready("here")
	})
	t.Run("deleting a ServiceExport stops exporting", func(t *testing.T) {
		c.hello("deleted", "")
		c.ready("deleted")
		c.unexport("deleted")
		c.gone("deleted")
		if c.get(services, "deleted", "hello") == nil {
			t.Error("the Service went, too")
		}
	})
	t.Run("an ExternalName is refused", func(t *testing.T) {
		c.namespaces("external")
		c.apply([]byte("apiVersion: v1\nkind: Service\nmetadata: {name: hello, namespace: external}\nspec: {type: ExternalName, externalName: example.com}\n"))
		c.export("external", "")
		c.exported("external", "Valid", "False", "InvalidServiceType")
		c.exported("external", "Ready", "False", "Failed")
		c.never("external", "marker")
	})
	t.Run("a ServiceExport without Service is not Valid until the Service is there", func(t *testing.T) {
		c.namespaces("early")
		c.export("early", "")
		c.exported("early", "Valid", "False", "NoService")
		c.service("early", "")
		c.exported("early", "Valid", "True", "Valid")
		c.exported("early", "Ready", "True", "Exported")
		c.exported("early", "Conflict", "False", "NoConflicts")
	})
	t.Run("a multi-cluster service is imported by all clusters with its namespace and by no other", func(t *testing.T) {
		c.elsewhere("east", "nowhere", remote(1, nil, "10.2.0.1"))
		c.namespaces("bare")
		c.elsewhere("east", "bare", remote(1, nil, "10.2.0.1"))
		c.ready("bare")
		c.never("nowhere", "marker")
		c.namespaces("nowhere")
		c.ready("nowhere")
	})
	t.Run("exporting clusters import, too", func(t *testing.T) {
		c.ready("marker")
		if got := c.addresses("marker"); got != "west: 10.1.0.1" {
			t.Errorf("endpoints %s", got)
		}
	})
	t.Run("a ServiceImport is there as long as one cluster exports", func(t *testing.T) {
		c.hello("both", "")
		c.elsewhere("east", "both", remote(1, nil, "10.2.0.1"))
		c.imported("both", "of two", func(i *unstructured.Unstructured) bool { return len(at[[]any](i, "status", "clusters")) == 2 })
		uid := c.get(imports, "both", "hello").GetUID()
		c.unexport("both")
		i := c.imported("both", "of one", func(i *unstructured.Unstructured) bool { return len(at[[]any](i, "status", "clusters")) == 1 })
		if i.GetUID() != uid {
			t.Error("it was made anew")
		}
		c.elsewhere("east", "both", nil)
		c.gone("both")
	})
	t.Run("a ServiceImport somebody changed is put right", func(t *testing.T) {
		c.hello("meddled", "")
		c.ready("meddled")
		if err := c.patch(imports, "meddled", "hello", `{"spec":{"type":"Headless","ports":[{"port":1}],"ips":["192.0.2.1"]}}`); err != nil {
			t.Fatal(err)
		}
		c.imported("meddled", "as before", func(i *unstructured.Unstructured) bool {
			return spec(i, "type") == "ClusterSetIP" && ports(i) == "http 80/TCP" && !slices.Contains(ipsOf(i), "192.0.2.1")
		})
		c.delete(imports, "meddled", "hello")
		c.ready("meddled")
	})
	t.Run("ClusterIP becomes ClusterSetIP", func(t *testing.T) {
		i := c.ready("marker")
		if spec(i, "type") != "ClusterSetIP" || len(ipsOf(i)) == 0 {
			t.Errorf("type %s, IPs %v", spec(i, "type"), ipsOf(i))
		}
	})
	t.Run("a headless Service becomes Headless, without IP", func(t *testing.T) {
		c.hello("headless", `{clusterIP: None, ports: [{name: http, port: 80}]}`)
		i := c.ready("headless")
		if spec(i, "type") != "Headless" || len(ipsOf(i)) > 0 {
			t.Errorf("type %s, IPs %v", spec(i, "type"), ipsOf(i))
		}
		if n := len(c.list(services, "headless", "app.kubernetes.io/managed-by=hanse.mesh")); n != 0 {
			t.Errorf("%d Services behind it", n)
		}
		written := c.slices("headless")
		if len(written) != 1 {
			t.Fatalf("%d EndpointSlices", len(written))
		}
		endpoint := at[[]any](&written[0], "endpoints")[0].(map[string]any)
		if _, kubeProxys := written[0].GetLabels()["kubernetes.io/service-name"]; endpoint["hostname"] != "hello-0" || kubeProxys {
			t.Errorf("hostname %v, labels %v", endpoint["hostname"], written[0].GetLabels())
		}
	})
	t.Run("StatefulSets of the same name in several clusters are told apart", func(t *testing.T) {
		c.elsewhere("east", "headless", remote(1, func(e *federation.Export) { e.Headless = true }, "10.2.0.1"))
		until(t, "both are there", func() bool { return c.addresses("headless") == "east: 10.2.0.1, west: 10.1.0.1" })
		for _, s := range c.slices("headless") {
			if h := at[[]any](&s, "endpoints")[0].(map[string]any)["hostname"]; h != "hello-0" {
				t.Errorf("hostname %v", h)
			}
		}
	})
	for _, typ := range []string{"NodePort", "LoadBalancer"} {
		t.Run(typ+" becomes ClusterSetIP, the Service stays as it is", func(t *testing.T) {
			ns := strings.ToLower(typ)
			c.namespaces(ns)
			c.service(ns, "{type: "+typ+", ports: [{name: http, port: 80}]}")
			before := c.get(services, ns, "hello").GetResourceVersion()
			c.export(ns, "")
			i := c.ready(ns)
			if spec(i, "type") != "ClusterSetIP" || c.get(services, ns, "hello").GetResourceVersion() != before {
				t.Errorf("type %s, Service changed: %v", spec(i, "type"), c.get(services, ns, "hello").GetResourceVersion() != before)
			}
		})
	}
	t.Run("the clusterset IP is the same for the life of the ServiceImport", func(t *testing.T) {
		c.hello("steady", "")
		ips := ipsOf(c.ready("steady"))
		c.elsewhere("east", "steady", remote(1, func(e *federation.Export) {
			e.Ports = append(e.Ports, discovery.Port{Name: "more", Number: 81, Protocol: discovery.TCP})
			e.Affinity = "ClientIP"
		}, "10.2.0.1"))
		c.imported("steady", "of two", func(i *unstructured.Unstructured) bool {
			return ports(i) == "http 80/TCP, more 81/TCP" && spec(i, "sessionAffinity") == "ClientIP"
		})
		c.unexport("steady")
		i := c.imported("steady", "of one", func(i *unstructured.Unstructured) bool { return len(at[[]any](i, "status", "clusters")) == 1 })
		if !slices.Equal(ipsOf(i), ips) {
			t.Errorf("IPs %v, before %v", ipsOf(i), ips)
		}
	})
	t.Run("each EndpointSlice is of one cluster, labelled, managed and owned", func(t *testing.T) {
		c.hello("sliced", "")
		c.elsewhere("east", "sliced", remote(1, nil, "10.2.0.1", "fd00::1"))
		until(t, "three slices", func() bool { return len(c.slices("sliced")) == 3 })
		i := c.ready("sliced")
		if at[string](i, "status", "endpointSliceObjects") != "Present" {
			t.Error("status.endpointSliceObjects is not Present")
		}
		for _, s := range c.slices("sliced") {
			l := s.GetLabels()
			if !slices.Contains([]string{"east", "west"}, l["multicluster.kubernetes.io/source-cluster"]) || l["endpointslice.kubernetes.io/managed-by"] != "hanse.mesh" {
				t.Errorf("labels of %s: %v", s.GetName(), l)
			}
			o := s.GetOwnerReferences()
			if len(o) != 1 || o[0].Kind != "ServiceImport" || o[0].Name != "hello" || o[0].UID != i.GetUID() || o[0].APIVersion != i.GetAPIVersion() || o[0].Controller != nil && *o[0].Controller {
				t.Errorf("owners of %s: %v", s.GetName(), o)
			}
		}
		c.delete(imports, "sliced", "hello")
		until(t, "a new ServiceImport owns them", func() bool {
			i := c.get(imports, "sliced", "hello")
			return i != nil && len(c.slices("sliced")) == 3 && !slices.ContainsFunc(c.slices("sliced"), func(s unstructured.Unstructured) bool {
				return len(s.GetOwnerReferences()) != 1 || s.GetOwnerReferences()[0].UID != i.GetUID()
			})
		})
	})
	t.Run("endpoints of a cluster that is unreachable do not stay", func(t *testing.T) {
		c.hello("stale", "")
		c.elsewhere("south", "stale", remote(1, nil, "10.3.0.1"))
		until(t, "both are there", func() bool { return c.addresses("stale") == "south: 10.3.0.1, west: 10.1.0.1" })
		c.state("south", discovery.Withdrawn)
		until(t, "one is withdrawn", func() bool { return c.addresses("stale") == "west: 10.1.0.1" })
		c.state("south", discovery.Fresh)
		until(t, "it is back", func() bool { return c.addresses("stale") == "south: 10.3.0.1, west: 10.1.0.1" })
	})
	t.Run("ports are the union", func(t *testing.T) {
		c.hello("union", "{ports: [{name: http, port: 80}]}")
		c.elsewhere("east", "union", remote(1, func(e *federation.Export) {
			e.Ports = append(e.Ports, discovery.Port{Name: "sig", Number: 142, Protocol: discovery.TCP, SCTP: true}, discovery.Port{Name: "dns", Number: 80, Protocol: discovery.TCP, UDP: true})
		}, "10.2.0.1"))
		c.imported("union", "ports", func(i *unstructured.Unstructured) bool { return ports(i) == "dns 80/UDP, http 80/TCP, sig 142/SCTP" })
		behind := c.list(services, "union", "app.kubernetes.io/managed-by=hanse.mesh")
		if len(behind) != 1 || ports(&behind[0]) != "dns 80/UDP, http 80/TCP, sig 142/SCTP" {
			t.Errorf("Services behind it: %v", behind)
		}
		c.exported("union", "Conflict", "True", "PortConflict") // calls of the union's ports do not reach everybody
	})
	t.Run("ports clash by name, then by protocol and number, and the oldest wins", func(t *testing.T) {
		c.hello("ports", "{ports: [{name: http, port: 80}, {name: admin, port: 9000}]}")
		c.elsewhere("east", "ports", remote(1, func(e *federation.Export) {
			e.Ports = []discovery.Port{{Name: "http", Number: 8000, Protocol: discovery.HTTP}, {Name: "console", Number: 9000, Protocol: discovery.TCP}}
		}, "10.2.0.1"))
		c.imported("ports", "the oldest's", func(i *unstructured.Unstructured) bool { return ports(i) == "console 9000/TCP, http 8000/TCP" })
		c.exported("ports", "Conflict", "True", "PortConflict")
	})
	for _, f := range []struct {
		ns, reason, spec, field, want string
		change                        func(*federation.Export)
	}{
		{"clash-type", "TypeConflict", "", "type", "Headless", func(e *federation.Export) { e.Headless = true }},
		{"clash-affinity", "SessionAffinityConflict", "", "sessionAffinity", "ClientIP", func(e *federation.Export) { e.Affinity = "ClientIP" }},
		{"clash-config", "SessionAffinityConfigConflict", "{sessionAffinity: ClientIP, ports: [{name: http, port: 80}]}", "sessionAffinity", "ClientIP",
			func(e *federation.Export) { e.Affinity, e.AffinityTimeout = "ClientIP", 60 }},
		{"clash-internal", "InternalTrafficPolicyConflict", "", "internalTrafficPolicy", "Local", func(e *federation.Export) { e.InternalTrafficPolicy = "Local" }},
		{"clash-distribution", "TrafficDistributionConflict", "", "trafficDistribution", "PreferClose", func(e *federation.Export) { e.TrafficDistribution = "PreferClose" }},
		{"clash-families", "IPFamilyConflict", "", "type", "ClusterSetIP", func(e *federation.Export) { e.IPFamilies = []discovery.IPFamily{discovery.IPv6} }},
		{"clash-labels", "LabelsConflict", "", "type", "ClusterSetIP", func(e *federation.Export) { e.Labels = map[string]string{"tier": "gold"} }},
		{"clash-annotations", "AnnotationsConflict", "", "type", "ClusterSetIP", func(e *federation.Export) { e.Annotations = map[string]string{"example.com/a": "b"} }},
	} {
		t.Run(f.reason+": the oldest export wins, and both say so", func(t *testing.T) {
			c.hello(f.ns, f.spec)
			c.ready(f.ns)
			c.elsewhere("east", f.ns, remote(1, f.change, "10.2.0.1")) // older: west loses
			c.exported(f.ns, "Conflict", "True", f.reason)
			c.imported(f.ns, f.field+" of the oldest", func(i *unstructured.Unstructured) bool { return spec(i, f.field) == f.want })
			e := remote(-120, f.change, "10.2.0.1") // younger: west wins, and says so, too
			c.elsewhere("east", f.ns, e)
			c.exported(f.ns, "Conflict", "True", f.reason)
			message := ""
			until(t, "the message names field, winner and why", func() bool {
				for _, k := range at[[]any](c.get(exports, f.ns, "hello"), "status", "conditions") {
					if m := k.(map[string]any); m["type"] == "Conflict" {
						message = m["message"].(string)
					}
				}
				return strings.Contains(message, "oldest export, of cluster west")
			})
			c.elsewhere("east", f.ns, nil)
			c.exported(f.ns, "Conflict", "False", "NoConflicts")
		})
	}
	t.Run("a headless export that outlives the oldest makes it headless", func(t *testing.T) {
		c.namespaces("turned")
		c.elsewhere("east", "turned", remote(2, nil, "10.2.0.1"))
		c.elsewhere("south2", "turned", remote(1, func(e *federation.Export) { e.Headless = true }, "10.3.0.1"))
		c.imported("turned", "ClusterSetIP", func(i *unstructured.Unstructured) bool { return spec(i, "type") == "ClusterSetIP" && len(ipsOf(i)) > 0 })
		c.elsewhere("east", "turned", nil)
		c.imported("turned", "Headless", func(i *unstructured.Unstructured) bool { return spec(i, "type") == "Headless" && len(ipsOf(i)) == 0 })
		until(t, "no Service behind it, no slice for kube-proxy", func() bool {
			return len(c.list(services, "turned", "app.kubernetes.io/managed-by=hanse.mesh")) == 0 && len(c.list(slicesR, "turned", "kubernetes.io/service-name")) == 0
		})
	})
	t.Run("the fields of the Service are the ServiceImport's", func(t *testing.T) {
		c.hello("fields", "{sessionAffinity: ClientIP, internalTrafficPolicy: Local, trafficDistribution: PreferSameZone, ports: [{name: http, port: 80, appProtocol: kubernetes.io/h2c}]}")
		i, s := c.ready("fields"), c.get(services, "fields", "hello")
		for _, f := range []string{"sessionAffinity", "internalTrafficPolicy", "trafficDistribution"} {
			if spec(i, f) != spec(s, f) || spec(i, f) == "" {
				t.Errorf("%s is %q, want the Service's %q", f, spec(i, f), spec(s, f))
			}
		}
		if got, want := at[map[string]any](i, "spec", "sessionAffinityConfig"), at[map[string]any](s, "spec", "sessionAffinityConfig"); fmt.Sprint(got) != fmt.Sprint(want) || got == nil {
			t.Errorf("sessionAffinityConfig is %v, want the Service's %v", got, want)
		}
		if p := at[[]any](i, "spec", "ports")[0].(map[string]any)["appProtocol"]; p != "kubernetes.io/h2c" {
			t.Errorf("appProtocol is %v", p)
		}
		c.ready("marker") // and defaults are written as the Service has them
		if i := c.get(imports, "marker", "hello"); spec(i, "sessionAffinity") != "None" || spec(i, "internalTrafficPolicy") != "Cluster" {
			t.Errorf("defaults: sessionAffinity %q, internalTrafficPolicy %q", spec(i, "sessionAffinity"), spec(i, "internalTrafficPolicy"))
		}
	})
	t.Run("only exported labels and annotations are propagated", func(t *testing.T) {
		c.namespaces("labels")
		c.service("labels", "")
		c.export("labels", "spec: {exportedLabels: {tier: gold}, exportedAnnotations: {example.com/team: pay}}")
		i := c.ready("labels")
		if l, a := i.GetLabels(), i.GetAnnotations(); l["tier"] != "gold" || a["example.com/team"] != "pay" || l["of"] != "" || a["of"] != "" {
			t.Errorf("labels %v, annotations %v", l, a)
		}
	})
	t.Run("a Service of the same name is not touched", func(t *testing.T) {
		c.namespaces("local")
		c.service("local", "")
		before := c.get(services, "local", "hello")
		c.elsewhere("east", "local", remote(1, nil, "10.2.0.1"))
		i := c.ready("local")
		after := c.get(services, "local", "hello")
		if after.GetResourceVersion() != before.GetResourceVersion() || slices.Contains(ipsOf(i), spec(after, "clusterIP")) {
			t.Errorf("Service %v, before %v; import %v", after, before, ipsOf(i))
		}
		if n := len(c.list(slicesR, "local", "kubernetes.io/service-name=hello")); n != 1 {
			t.Errorf("%d EndpointSlices of the Service", n)
		}
	})
	t.Run("callable last on the way in, uncallable first on the way out", func(t *testing.T) {
		c.namespaces("order")
		seen := c.follow(t, "order")
		c.elsewhere("east", "order", remote(1, nil, "10.2.0.1"))
		c.ready("order")
		c.elsewhere("east", "order", nil)
		c.gone("order")
		until(t, "all has been seen", func() bool { return len(seen()) >= 7 }) // of three kinds added and gone, and one callable
		got := strings.Join(seen(), ", ")
		for _, want := range [][2]string{{"Service added", "EndpointSlice added"}, {"EndpointSlice added", "ServiceImport callable"}, {"ServiceImport gone", "EndpointSlice gone"}, {"EndpointSlice gone", "Service gone"}} {
			if a, b := slices.Index(seen(), want[0]), slices.Index(seen(), want[1]); a < 0 || b < 0 || a > b {
				t.Errorf("%q is not before %q: %s", want[0], want[1], got)
			}
		}
	})
	t.Run("a ServiceExport that is edited keeps its place in age", func(t *testing.T) {
		c.hello("aged", "")
		c.elsewhere("east", "aged", remote(-120, func(e *federation.Export) { e.Headless = true }, "10.2.0.1")) // younger
		c.exported("aged", "Conflict", "True", "TypeConflict")
		if err := c.patch(exports, "aged", "hello", `{"spec":{"exportedLabels":{"a":"b"}}}`); err != nil {
			t.Fatal(err)
		}
		c.imported("aged", "relabelled", func(i *unstructured.Unstructured) bool {
			return i.GetLabels()["a"] == "b" && spec(i, "type") == "ClusterSetIP"
		})
	})
}

// follow notes what happens to imports, Services and slices of a namespace in the order of the server's revisions.
func (c *clusterset) follow(t *testing.T, namespace string) func() []string {
	t.Helper()
	var mu sync.Mutex
	type event struct {
		revision int64
		what     string
	}
	var events []event
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	note := func(kind string, e watch.Event) {
		o, ok := e.Object.(*unstructured.Unstructured)
		if !ok { // the watch ended
			return
		}
		what := kind + map[watch.EventType]string{watch.Added: " added", watch.Deleted: " gone"}[e.Type]
		if kind == "ServiceImport" && e.Type != watch.Deleted && len(ipsOf(o)) > 0 {
			what = "ServiceImport callable"
		}
		if what == kind {
			return
		}
		var revision int64
		fmt.Sscan(o.GetResourceVersion(), &revision)
		mu.Lock()
		defer mu.Unlock()
		if what == "ServiceImport callable" && slices.ContainsFunc(events, func(e event) bool { return e.what == what }) {
			return
		}
		events = append(events, event{revision, what})
	}
	for kind, r := range map[string]schema.GroupVersionResource{"ServiceImport": imports, "Service": services, "EndpointSlice": slicesR} {
		w, err := c.client.Resource(r).Namespace(namespace).Watch(ctx, metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		running.Go(func() {
			for e := range w.ResultChan() {
				note(kind, e)
			}
		})
	}
	t.Cleanup(func() { cancel(); running.Wait() })
	return func() []string {
		mu.Lock()
		defer mu.Unlock()
		slices.SortFunc(events, func(a, b event) int { return int(a.revision - b.revision) })
		var out []string
		for _, e := range events {
			out = append(out, e.what)
		}
		return out
	}
}

// TestMCSDualStack: the IPs of a ServiceImport are of the families in which its endpoints are reached, in the order of ipFamilies, each once.
func TestMCSDualStack(t *testing.T) {
	t.Parallel()
	c := newClusterset(t, "--service-cluster-ip-range=10.96.0.0/16,fd00:96::/112")
	families := func(f ...discovery.IPFamily) func(*federation.Export) {
		return func(e *federation.Export) { e.IPFamilies = f }
	}
	for _, test := range []struct {
		name string
		of   []discovery.IPFamily
		want string
	}{
		{"four", []discovery.IPFamily{discovery.IPv4}, "[IPv4]"},
		{"six", []discovery.IPFamily{discovery.IPv6}, "[IPv6]"},
		{"both", []discovery.IPFamily{discovery.IPv4, discovery.IPv6}, "[IPv4 IPv6]"},
		{"reversed", []discovery.IPFamily{discovery.IPv6, discovery.IPv4}, "[IPv6 IPv4]"},
	} {
		t.Run("ips and ipFamilies agree: "+test.name, func(t *testing.T) {
			c.namespaces(test.name)
			c.elsewhere("east", test.name, remote(1, families(test.of...), "10.2.0.1"))
			i := c.ready(test.name)
			var is []string
			for _, ip := range ipsOf(i) {
				if netip.MustParseAddr(ip).Is4() {
					is = append(is, "IPv4")
				} else {
					is = append(is, "IPv6")
				}
			}
			if got := fmt.Sprint(at[[]any](i, "spec", "ipFamilies")); got != test.want || fmt.Sprint(is) != test.want {
				t.Errorf("ipFamilies %s, ips %v; want %s", got, ipsOf(i), test.want)
			}
		})
	}
	t.Run("a Pod of two families is reached in both", func(t *testing.T) {
		c.namespaces("pods")
		c.apply([]byte(`
apiVersion: v1
kind: Service
metadata: {name: hello, namespace: pods}
spec: {ipFamilyPolicy: RequireDualStack, ports: [{name: http, port: 80}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: hello-4, namespace: pods, labels: {kubernetes.io/service-name: hello}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints: [{addresses: [10.1.0.1], targetRef: {kind: Pod, name: p1, uid: u1}}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: hello-6, namespace: pods, labels: {kubernetes.io/service-name: hello}}
addressType: IPv6
ports: [{name: http, port: 8080}]
endpoints: [{addresses: ["fd00:1::1"], targetRef: {kind: Pod, name: p1, uid: u1}}]
`))
		c.export("pods", "")
		i := c.ready("pods")
		until(t, "both addresses are there", func() bool { return c.addresses("pods") == "west: 10.1.0.1, west: fd00:1::1" })
		if len(ipsOf(i)) != 2 {
			t.Errorf("IPs %v", ipsOf(i))
		}
	})
}

// TestMCSOtherFamily: a service of a family that this cluster's Services have not says so, and no endpoint is where kube-proxy looks.
func TestMCSOtherFamily(t *testing.T) {
	t.Parallel()
	c := newClusterset(t)
	c.namespaces("six")
	c.elsewhere("east", "six", remote(1, func(e *federation.Export) { e.IPFamilies = []discovery.IPFamily{discovery.IPv6} }, "fd00::1"))
	i := c.imported("six", "not supported", func(i *unstructured.Unstructured) bool {
		status, reason := condition(i, "Ready")
		return status == "False" && reason == "IPFamilyNotSupported"
	})
	if f := fmt.Sprint(at[[]any](i, "spec", "ipFamilies")); f != "[IPv4]" || len(ipsOf(i)) != 1 {
		t.Errorf("ipFamilies %s, ips %v", f, ipsOf(i))
	}
}
