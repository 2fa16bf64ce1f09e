package objects

import (
	"bytes"
	"fmt"
	"slices"
	"strconv"
	"unique"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Packed is an EndpointSlice that keeps its endpoints as bytes: a million endpoints are 60 MB so, and 430 MB as they are. It stands in a
// Set for what it was made of. It is immutable.
type Packed struct {
	discoveryv1.EndpointSlice // Endpoints is nil

	data  []byte                  // protobuf of the endpoints; zones and nodes are indices into words
	words []unique.Handle[string] // zones and nodes, shared with other slices
}

// Pack packs what Build and package kube read of s, which is not changed: of a Pod its name, nothing of other targets.
func Pack(s *discoveryv1.EndpointSlice) (*Packed, error) {
	p := &Packed{EndpointSlice: *s}
	p.Endpoints = nil
	bare := discoveryv1.EndpointSlice{Endpoints: make([]discoveryv1.Endpoint, len(s.Endpoints))}
	index := map[string]*string{}
	word := func(w *string) *string {
		if w == nil {
			return nil
		}
		i, ok := index[*w]
		if !ok {
			n := strconv.FormatInt(int64(len(p.words)), 36)
			i = &n
			index[*w] = i
			p.words = append(p.words, unique.Make(*w))
		}
		return i
	}
	for i := range s.Endpoints {
		e := &s.Endpoints[i]
		b := &bare.Endpoints[i]
		b.Addresses, b.Conditions, b.Hostname = e.Addresses, e.Conditions, e.Hostname
		b.Zone, b.NodeName = word(e.Zone), word(e.NodeName)
		if r := e.TargetRef; r != nil && r.Kind == "Pod" {
			b.TargetRef = &corev1.ObjectReference{Name: r.Name}
		}
	}
	data, err := bare.Marshal()
	if err != nil {
		return nil, fmt.Errorf("pack EndpointSlice %s/%s: %w", s.Namespace, s.Name, err)
	}
	p.data, p.words = slices.Clip(bytes.Clone(data)), slices.Clip(p.words)
	return p, nil
}

// Unpack returns the EndpointSlice anew.
func (p *Packed) Unpack() *discoveryv1.EndpointSlice {
	out := p.EndpointSlice
	var bare discoveryv1.EndpointSlice
	if err := bare.Unmarshal(p.data); err != nil {
		return &out // cannot be: Pack wrote it
	}
	word := func(i *string) *string {
		if i == nil {
			return nil
		}
		n, err := strconv.ParseInt(*i, 36, 32)
		if err != nil || int(n) >= len(p.words) {
			return nil
		}
		w := p.words[n].Value()
		return &w
	}
	out.Endpoints = bare.Endpoints
	for i := range out.Endpoints {
		e := &out.Endpoints[i]
		e.Zone, e.NodeName = word(e.Zone), word(e.NodeName)
		if e.TargetRef != nil {
			e.TargetRef.Kind = "Pod"
		}
	}
	return &out
}

// With returns p with other annotations, for the same endpoints.
func (p *Packed) With(annotations map[string]string) *Packed {
	out := *p
	out.Annotations = annotations
	return &out
}

// Mentions reports whether an endpoint may be of that Pod, or on that Node.
func (p *Packed) Mentions(name string) bool {
	return slices.ContainsFunc(p.words, func(w unique.Handle[string]) bool { return w.Value() == name }) || bytes.Contains(p.data, []byte(name))
}

// On reports whether an endpoint may be on one of nodes.
func (p *Packed) On(nodes map[string]bool) bool {
	return slices.ContainsFunc(p.words, func(w unique.Handle[string]) bool { return nodes[w.Value()] })
}

// headOf returns what an EndpointSlice says beside its endpoints.
func headOf(v metav1.Object) *discoveryv1.EndpointSlice {
	if p, ok := v.(*Packed); ok {
		return &p.EndpointSlice
	}
	return v.(*discoveryv1.EndpointSlice)
}

// unpacked returns an EndpointSlice with its endpoints.
func unpacked(v metav1.Object) *discoveryv1.EndpointSlice {
	if p, ok := v.(*Packed); ok {
		return p.Unpack()
	}
	return v.(*discoveryv1.EndpointSlice)
}
