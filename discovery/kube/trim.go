package kube

import (
	"maps"
	"strings"
	"unique"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

const annotationPrefix = "hanse.mesh/"

// trimMeta forgets what nobody reads of an object's metadata, which is often most of it.
func trimMeta(o metav1.Object) {
	o.SetManagedFields(nil)
	o.SetOwnerReferences(nil)
	o.SetFinalizers(nil)
	a := o.GetAnnotations()
	maps.DeleteFunc(a, func(name, _ string) bool { return !strings.HasPrefix(name, annotationPrefix) })
	if len(a) == 0 {
		a = nil
	}
	o.SetAnnotations(a)
}

func trimService(o runtime.Object) {
	s := o.(*corev1.Service)
	s.Status = corev1.ServiceStatus{}
	s.Spec.Selector = nil
}

// intern returns an equal string that all users of it share.
func intern(s string) string { return unique.Make(s).Value() }

// trimSlice keeps of a label set the two that are read. What is kept of endpoints, Pack says.
func trimSlice(o runtime.Object) {
	s := o.(*discoveryv1.EndpointSlice)
	maps.DeleteFunc(s.Labels, func(name, _ string) bool {
		return name != discoveryv1.LabelServiceName && name != discoveryv1.LabelManagedBy
	})
	s.GenerateName = ""
}

func trimWritten(o runtime.Object) {
	if s, ok := o.(*corev1.Service); ok {
		s.Status = corev1.ServiceStatus{}
	}
}

// SidecarAnnotation on a Pod says that it has a sidecar; its value is the sidecar's version. The injector sets it.
const SidecarAnnotation = "hanse.mesh/sidecar"

// pod is what is kept of a Pod; as a unique.Handle, since most are like many others.
type pod struct {
	account   string
	transport string // as AnnotationTransport
	hopPort   string // as AnnotationHopPort
	weight    string // as AnnotationWeight
}

func trimPod(o runtime.Object) {
	p := o.(*corev1.Pod)
	p.Labels = nil
	p.Spec = corev1.PodSpec{ServiceAccountName: p.Spec.ServiceAccountName}
	p.Status = corev1.PodStatus{}
}

func condensePod(o metav1.Object) any {
	p := o.(*corev1.Pod)
	a := p.Annotations
	out := pod{account: intern(p.Spec.ServiceAccountName), transport: "plaintext", hopPort: intern(a[annotationHopPort]), weight: intern(a[annotationWeight])}
	if out.account == "" {
		out.account = "default"
	}
	switch {
	case a[annotationTransport] != "":
		out.transport = intern(a[annotationTransport])
	case a[SidecarAnnotation] != "":
		out.transport = "hop"
	}
	return unique.Make(out)
}

// node is what is kept of a Node.
type node struct{ region string }

func trimNode(o runtime.Object) {
	n := o.(*corev1.Node)
	maps.DeleteFunc(n.Labels, func(name, _ string) bool { return name != corev1.LabelTopologyRegion })
	n.Spec, n.Status = corev1.NodeSpec{}, corev1.NodeStatus{}
}

func condenseNode(o metav1.Object) any {
	return node{region: intern(o.GetLabels()[corev1.LabelTopologyRegion])}
}

// namespace is what is kept of a Namespace.
type namespace struct{ clusterset string }

func trimNamespace(o runtime.Object) {
	n := o.(*corev1.Namespace)
	n.Labels, n.Spec, n.Status = nil, corev1.NamespaceSpec{}, corev1.NamespaceStatus{}
}

func condenseNamespace(o metav1.Object) any {
	return namespace{clusterset: o.GetAnnotations()[annotationClusterset]}
}
