package objects

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestPackedIsWhatItWasMadeOf: all that is read of an EndpointSlice comes back, and what it was made of is not changed.
func TestPackedIsWhatItWasMadeOf(t *testing.T) {
	text := func(s string) *string { return &s }
	yes, no, port := true, false, int32(8080)
	s := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: "shop", Name: "payments-x", Labels: map[string]string{discoveryv1.LabelServiceName: "payments"}},
		AddressType: discoveryv1.AddressTypeIPv4, Ports: []discoveryv1.EndpointPort{{Name: text("http"), Port: &port}},
		Endpoints: []discoveryv1.Endpoint{
			{Addresses: []string{"10.1.0.1", "10.1.0.2"}, Conditions: discoveryv1.EndpointConditions{Ready: &yes, Serving: &no}, Hostname: text("p-0"), NodeName: text("n1"), Zone: text("z1"),
				TargetRef: &corev1.ObjectReference{Kind: "Pod", Name: "p1"}},
			{Addresses: []string{"10.1.0.3"}, NodeName: text("n2"), Zone: text("z1"), TargetRef: &corev1.ObjectReference{Kind: "VM", Name: "v"}},
			{Addresses: []string{"10.1.0.4"}},
			{Addresses: []string{"fd00::1"}, Conditions: discoveryv1.EndpointConditions{Terminating: &yes, Serving: &yes}, TargetRef: &corev1.ObjectReference{Kind: "Pod", Name: "p"}},
			{Addresses: []string{"FD00:0::2", "::ffff:10.1.0.5", "fe80::1%eth0", "010.1.0.6", "a.example", ""}, Hostname: text(""), Zone: text(""), TargetRef: &corev1.ObjectReference{Kind: "Pod", Name: "pod-2"}},
			{Conditions: discoveryv1.EndpointConditions{Ready: &no, Terminating: &no}},
		},
	}
	want := s.DeepCopy()
	p := Pack(s)
	if d := cmp.Diff(want, s); d != "" {
		t.Errorf("Pack changed what it was given:\n%s", d)
	}
	want.Endpoints[1].TargetRef = nil
	if d := cmp.Diff(want, p.Unpack()); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	for name, is := range map[string]bool{"p1": true, "p": true, "pod-2": true, "n2": false, "p9": false, "v": false, "": false} {
		if p.OfAny(map[string]bool{name: true}) != is {
			t.Errorf("is of %q: %v", name, !is)
		}
	}
	if !p.On(map[string]bool{"n1": true}) || p.On(map[string]bool{"p1": true}) {
		t.Error("On is about Nodes")
	}
	if q := p.With(map[string]string{"a": "b"}); q.Annotations["a"] != "b" || p.Annotations != nil || q.Unpack().Annotations["a"] != "b" {
		t.Error("With")
	}
}
