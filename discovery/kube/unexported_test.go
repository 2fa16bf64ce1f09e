package kube

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	mcsv1alpha1 "sigs.k8s.io/mcs-api/pkg/apis/v1alpha1"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/discovery/objects"
)

// exportOf returns the condition Ready of shop/payments with some endpoints: "pod" with a sidecar, "!pod" without one, "?pod" that has not been read, or an address of no Pod.
func exportOf(t *testing.T, endpoints ...string) string {
	t.Helper()
	s := &discoveryv1.EndpointSlice{AddressType: discoveryv1.AddressTypeIPv4, Ports: []discoveryv1.EndpointPort{{Name: new("http"), Port: new(int32(8080))}}}
	s.Name, s.Namespace, s.Labels = "payments-x7", "shop", map[string]string{discoveryv1.LabelServiceName: "payments", discoveryv1.LabelManagedBy: "endpointslice-controller.k8s.io"}
	for i, name := range endpoints {
		e := discoveryv1.Endpoint{Addresses: []string{fmt.Sprintf("10.1.%d.%d", i/250, i%250)}}
		if strings.Contains(name, ".") {
			e.Addresses[0] = name
		} else {
			e.TargetRef = &corev1.ObjectReference{Kind: "Pod", Name: name}
		}
		s.Endpoints = append(s.Endpoints, e)
	}
	service := objects.Object{Kind: "Service", Value: &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "payments", Namespace: "shop"}, Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Name: "http", Port: 8080}}}}}
	export := objects.Object{Kind: "ServiceExport", Value: &mcsv1alpha1.ServiceExport{ObjectMeta: metav1.ObjectMeta{Name: "payments", Namespace: "shop"}}}
	set := objects.NewSet(service, export)
	for _, part := range split(s, func(name string) (pod, bool) {
		switch name[0] {
		case '!':
			return pod{account: "payments", transport: "plaintext"}, true
		case '?':
			return pod{}, false
		}
		return pod{account: "payments", transport: "hop"}, true
	}, func(string) (node, bool) { return node{}, false }) {
		set = set.Put(objects.Object{Kind: "EndpointSlice", Value: objects.Pack(part)})
	}
	snap, _, faults := objects.Build(objects.Input{Self: discovery.Self{Cluster: "west", TrustDomain: "west.demo", Network: "west"}, Set: set, Now: time.Unix(0, 0), Complete: true})
	if len(faults) > 0 {
		t.Fatal(faults)
	}
	view := &discovery.Clusterset{Local: snap}
	name := discovery.Name{Namespace: "shop", Name: "payments"}
	conditions, _ := exportConditions(export, service, unexportedOf(set, view, []discovery.Name{name})[name], view, "west", time.Unix(0, 0))
	for _, c := range conditions {
		if c.Type == "Ready" {
			if c.Status != metav1.ConditionTrue || c.Reason != "Exported" {
				t.Errorf("Ready is %s %s", c.Status, c.Reason)
			}
			return c.Message
		}
	}
	t.Fatal("no condition Ready")
	return ""
}

// TestReadySaysWhatStaysAtHome: which endpoints of an exported service are not exported, why, and what to do.
func TestReadySaysWhatStaysAtHome(t *testing.T) {
	const remedy = "; label namespace shop hanse.mesh/inject=enabled, if it is not, and restart them"
	many := []string{"a"}
	for i := range 1000 {
		many = append(many, fmt.Sprintf("!%s-%04d", strings.Repeat("p", 240), i))
	}
	for _, c := range []struct {
		endpoints []string
		want      string
	}{
		{nil, "other clusters may read it"},
		{[]string{"a", "b"}, "other clusters may read it"},
		{[]string{"a", "?b"}, "other clusters may read it"}, // until the Pod is read
		{[]string{"a", "!b"}, "1 of 2 endpoints are not exported: pod !b has no sidecar" + remedy},
		{[]string{"!b", "a", "!c"}, "2 of 3 endpoints are not exported: pods !b, !c have no sidecar" + remedy},
		{[]string{"!1", "!2", "!3", "!4", "!5"}, "5 of 5 endpoints are not exported: pods !1, !2, !3 and 2 more have no sidecar" + remedy},
		{[]string{"a", "192.0.2.9"}, "1 of 2 endpoints are not exported: addresses 192.0.2.9 are of no pod and have no identity; an EndpointSlice of your own with the annotation hanse.mesh/service-account gives them one"},
		{many, "1000 of 1001 endpoints are not exported: pods "},
	} {
		got := exportOf(t, c.endpoints...)
		if !strings.HasPrefix(got, c.want) || len(c.endpoints) < 1000 && got != c.want {
			t.Errorf("%v:\n got %s\nwant %s", c.endpoints, got, c.want)
		}
		if len(got) > 1500 {
			t.Errorf("%d bytes: a message is bounded", len(got))
		}
	}
	page, err := os.ReadFile("../../docs/troubleshooting.md")
	if err != nil {
		t.Fatal(err)
	}
	if shown := exportOf(t, "!ledger-0", "ledger-1"); !strings.Contains(string(page), "Ready=True Exported: "+strings.ReplaceAll(shown, "!", "")) {
		t.Errorf("troubleshooting.md does not show: %s", shown)
	}
}
