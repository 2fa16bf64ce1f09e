package objects

import (
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	mcsv1alpha1 "sigs.k8s.io/mcs-api/pkg/apis/v1alpha1"

	"github.com/hanse-mesh/hanse/discovery"
)

// TestBuildByStepsIsBuildAtOnce changes random objects, and compares the Build that looks at these only with one that looks at all.
func TestBuildByStepsIsBuildAtOnce(t *testing.T) {
	rnd := rand.New(rand.NewPCG(3, 5))
	meta := func(name string) metav1.ObjectMeta {
		return metav1.ObjectMeta{Namespace: fmt.Sprint("n", rnd.IntN(2)), Name: name}
	}
	port, name := int32(8080), "http"
	random := func() Object {
		service := fmt.Sprint("s", rnd.IntN(4))
		switch rnd.IntN(4) {
		case 0:
			s := &corev1.Service{ObjectMeta: meta(service), Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Name: "http", Port: int32(80 + rnd.IntN(3))}}}}
			if rnd.IntN(5) == 0 {
				s.Spec.Type = corev1.ServiceTypeExternalName
			}
			return Object{Kind: "Service", Value: s}
		case 1:
			return Object{Kind: "ServiceExport", Value: &mcsv1alpha1.ServiceExport{ObjectMeta: meta(service), Spec: mcsv1alpha1.ServiceExportSpec{ExportedLabels: map[string]string{"v": fmt.Sprint(rnd.IntN(3))}}}}
		}
		s := &discoveryv1.EndpointSlice{ObjectMeta: meta(fmt.Sprint("e", rnd.IntN(6))), AddressType: discoveryv1.AddressTypeIPv4, Ports: []discoveryv1.EndpointPort{{Name: &name, Port: &port}}}
		if rnd.IntN(4) == 0 {
			other := "https" // a fault
			s.Ports = append(s.Ports, discoveryv1.EndpointPort{Name: &other, Port: &port})
		}
		s.Labels = map[string]string{discoveryv1.LabelServiceName: service}
		for range rnd.IntN(4) {
			s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{Addresses: []string{fmt.Sprintf("10.0.0.%d", 1+rnd.IntN(9))}})
		}
		o := Object{Kind: "EndpointSlice", Value: s}
		if rnd.IntN(2) == 0 {
			o.Value = Pack(s)
		}
		return o
	}
	set, now := NewSet(), time.Unix(1_700_000_000, 0)
	var state *State
	for step := range 600 {
		now = now.Add(time.Second)
		for range rnd.IntN(4) {
			if o := random(); rnd.IntN(3) == 0 {
				set = set.Delete(o.Key())
			} else {
				set = set.Put(o)
			}
		}
		in := Input{Self: discovery.Self{Cluster: "west", TrustDomain: "west.demo"}, Set: set, State: state, Now: now, Complete: rnd.IntN(20) != 0,
			NewID: func(n discovery.Name, key string) string { return fmt.Sprintf("%032x", len(n.String()+key)) }}
		if step == 400 {
			in.Self.Region = "eu-2"
		}
		got, next, gotFaults := Build(in)
		if state != nil {
			whole := *state
			whole.index = nil
			in.State = &whole
		}
		want, wantNext, wantFaults := Build(in)
		if d := cmp.Diff(want, got, cmp.Transformer("", func(b discovery.ByName[*discovery.Service]) map[discovery.Name]*discovery.Service {
			return maps.Collect(b.All())
		}), cmpopts.EquateComparable(netip.Addr{}, netip.AddrPort{})); d != "" {
			t.Fatalf("step %d: Snapshot, whole (-) and by steps (+):\n%s", step, d)
		}
		if d := cmp.Diff(wantFaults, gotFaults, cmpopts.SortSlices(func(a, b *Fault) bool { return a.Error() < b.Error() })); d != "" {
			t.Fatalf("step %d: faults, whole (-) and by steps (+):\n%s", step, d)
		}
		a, _ := json.Marshal(wantNext)
		b, _ := json.Marshal(next)
		if string(a) != string(b) || wantNext.known != next.known || wantNext.revision != next.revision {
			t.Fatalf("step %d: state %s (%d, %d), want %s (%d, %d)", step, b, next.known, next.revision, a, wantNext.known, wantNext.revision)
		}
		state = next
	}
}
