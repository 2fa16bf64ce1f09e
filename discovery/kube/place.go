package kube

import (
	"cmp"
	"maps"
	"slices"
	"strconv"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/hanse-mesh/hanse/discovery/objects"
)

// Annotations of package objects that this package fills in.
const (
	annotationServiceAccount = objects.AnnotationServiceAccount
	annotationTransport      = objects.AnnotationTransport
	annotationHopPort        = objects.AnnotationHopPort
	annotationRegion         = objects.AnnotationRegion
	annotationWeight         = objects.AnnotationWeight
	annotationClusterset     = objects.AnnotationClusterset
)

// place is all that package objects reads from the annotations of an EndpointSlice, and so what its endpoints have in common.
type place struct{ account, transport, hopPort, region, weight string }

func (p place) annotations() map[string]string {
	a := map[string]string{}
	for name, v := range map[string]string{annotationServiceAccount: p.account, annotationTransport: p.transport, annotationHopPort: p.hopPort,
		annotationRegion: p.region, annotationWeight: p.weight} {
		if v != "" {
			a[name] = v
		}
	}
	return a
}

func (p place) compare(o place) int {
	return cmp.Or(cmp.Compare(p.account, o.account), cmp.Compare(p.transport, o.transport), cmp.Compare(p.hopPort, o.hopPort),
		cmp.Compare(p.region, o.region), cmp.Compare(p.weight, o.weight))
}

// split makes of one EndpointSlice of Pods one for each place that its endpoints are in; s itself is not changed. The first keeps
// its name, which with one service account, one region and sidecars everywhere is all. A slice that somebody wrote by hand says
// these things in its own annotations, and comes back as it is.
func split(s *discoveryv1.EndpointSlice, podOf func(name string) (pod, bool), nodeOf func(name string) (node, bool)) []*discoveryv1.EndpointSlice {
	if !slices.ContainsFunc(s.Endpoints, func(e discoveryv1.Endpoint) bool { return e.TargetRef != nil }) && s.Labels[discoveryv1.LabelManagedBy] == "" {
		return []*discoveryv1.EndpointSlice{s}
	}
	in := make(map[place][]int, 1)
	for i := range s.Endpoints {
		p := placeOf(&s.Endpoints[i], podOf, nodeOf)
		in[p] = append(in[p], i)
	}
	var out []*discoveryv1.EndpointSlice
	for _, p := range slices.SortedFunc(maps.Keys(in), place.compare) {
		part := &discoveryv1.EndpointSlice{ObjectMeta: s.ObjectMeta, AddressType: s.AddressType, Ports: s.Ports, Endpoints: s.Endpoints}
		part.Annotations = p.annotations()
		if len(in) > 1 {
			part.Endpoints = make([]discoveryv1.Endpoint, 0, len(in[p]))
			for _, i := range in[p] {
				part.Endpoints = append(part.Endpoints, s.Endpoints[i])
			}
		}
		if len(out) > 0 {
			part.Name += "-" + strconv.Itoa(len(out)+1)
		}
		out = append(out, part)
	}
	return out
}

// placeOf says where an endpoint is, and whose. One whose Pod is not known, or that is none, has no identity.
func placeOf(e *discoveryv1.Endpoint, podOf func(name string) (pod, bool), nodeOf func(name string) (node, bool)) place {
	p := place{transport: "plaintext"}
	if e.TargetRef != nil {
		if w, ok := podOf(e.TargetRef.Name); ok {
			p = place{account: w.account, transport: w.transport, hopPort: w.hopPort, weight: w.weight}
		}
	}
	if e.NodeName != nil {
		n, _ := nodeOf(*e.NodeName)
		p.region = n.region
	}
	return p
}

// inheritClusterset returns a Service with the annotation that its Namespace gives it, unless it has one itself.
func inheritClusterset(s *corev1.Service, from namespace) *corev1.Service {
	if _, own := s.Annotations[annotationClusterset]; own || from.clusterset == "" {
		return s
	}
	out := *s
	out.Annotations = maps.Clone(s.Annotations)
	if out.Annotations == nil {
		out.Annotations = map[string]string{}
	}
	out.Annotations[annotationClusterset] = from.clusterset
	return &out
}
