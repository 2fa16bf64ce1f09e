package objects

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"unique"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Packed is an EndpointSlice that keeps its endpoints as bytes: a million endpoints are 10 MB so, 80 MB as protobuf, and 430 MB as they
// are. It stands in a Set for what it was made of. It is immutable.
type Packed struct {
	discoveryv1.EndpointSlice // Endpoints is nil

	count int                     // of endpoints
	data  []byte                  // one after another, as packer writes them
	words []unique.Handle[string] // zones and nodes, shared with other slices
}

// Of a packed endpoint the first byte. A pointer to a bool has two bits: it is there, and what it says.
const (
	packedReady = 1 << iota
	_
	packedServing
	_
	packedTerminating
	_
	packedHostname
	packedPod
)

// packer writes endpoints: flags; zone and node, as one more than their indices into words; the number of addresses, and each as the number of
// its bytes and these, or, if it is not as netip writes it, as packedText and a string; hostname; the Pod's name as how much of the last one it
// begins with, and the rest. Numbers are varints, strings have their length before them.
type packer struct {
	data  []byte
	words []unique.Handle[string]
	index map[string]int // of words
	pod   string         // the last one's name
}

const packedText = 255 // in the place of an address' length

func (p *packer) number(n int)  { p.data = binary.AppendUvarint(p.data, uint64(n)) }
func (p *packer) text(s string) { p.number(len(s)); p.data = append(p.data, s...) }
func (p *packer) flag(b *bool, at byte) byte {
	switch {
	case b == nil:
		return 0
	case *b:
		return at | at<<1
	}
	return at
}

func (p *packer) word(w *string) {
	if w == nil {
		p.number(0)
		return
	}
	i, ok := p.index[*w]
	if !ok {
		i = len(p.words)
		p.index[*w] = i
		p.words = append(p.words, unique.Make(*w))
	}
	p.number(i + 1)
}

func (p *packer) address(s string) {
	if a, err := netip.ParseAddr(s); err == nil && a.Zone() == "" && a.String() == s {
		p.data = append(p.data, byte(a.BitLen()/8))
		p.data = append(p.data, a.AsSlice()...)
		return
	}
	p.data = append(p.data, packedText)
	p.text(s)
}

func (p *packer) endpoint(e *discoveryv1.Endpoint) {
	flags := p.flag(e.Conditions.Ready, packedReady) | p.flag(e.Conditions.Serving, packedServing) | p.flag(e.Conditions.Terminating, packedTerminating)
	if e.Hostname != nil {
		flags |= packedHostname
	}
	pod := e.TargetRef != nil && e.TargetRef.Kind == "Pod"
	if pod {
		flags |= packedPod
	}
	p.data = append(p.data, flags)
	p.word(e.Zone)
	p.word(e.NodeName)
	p.number(len(e.Addresses))
	for _, a := range e.Addresses {
		p.address(a)
	}
	if e.Hostname != nil {
		p.text(*e.Hostname)
	}
	if pod {
		name, same := e.TargetRef.Name, 0
		for same < min(len(name), len(p.pod)) && name[same] == p.pod[same] {
			same++
		}
		p.number(same)
		p.text(name[same:])
		p.pod = name
	}
}

// Pack packs what Build and package kube read of s, which is not changed: of a Pod its name, nothing of other targets.
func Pack(s *discoveryv1.EndpointSlice) *Packed {
	w := packer{index: map[string]int{}}
	for i := range s.Endpoints {
		w.endpoint(&s.Endpoints[i])
	}
	p := &Packed{EndpointSlice: *s, count: len(s.Endpoints), data: slices.Clone(w.data), words: slices.Clone(w.words)}
	p.Endpoints = nil
	return p
}

// unpacker reads what packer wrote, one endpoint after another.
type unpacker struct {
	data   []byte
	flags  byte
	zone   int // one more than an index into words; 0: none
	node   int
	fields []byte // addresses and hostname
	pod    []byte // valid until the next one
}

func (u *unpacker) number() int {
	n, size := binary.Uvarint(u.data)
	u.data = u.data[size:]
	return int(n)
}

func (u *unpacker) bytes(n int) []byte {
	b := u.data[:n]
	u.data = u.data[n:]
	return b
}

// next reads the next endpoint; addresses and hostname are left to Unpack.
func (u *unpacker) next() {
	u.flags = u.bytes(1)[0]
	u.zone, u.node = u.number(), u.number()
	u.fields = u.data
	for range u.number() {
		u.address()
	}
	if u.flags&packedHostname != 0 {
		u.bytes(u.number())
	}
	if u.flags&packedPod != 0 {
		u.pod = u.pod[:u.number()]
		u.pod = append(u.pod, u.bytes(u.number())...)
	}
}

// address reads an address: its bytes, or, as text, what it was.
func (u *unpacker) address() (b []byte, text bool) {
	n := int(u.bytes(1)[0])
	if text = n == packedText; text {
		n = u.number()
	}
	return u.bytes(n), text
}

// Unpack returns the EndpointSlice anew.
func (p *Packed) Unpack() *discoveryv1.EndpointSlice {
	out := p.EndpointSlice
	if p.count == 0 {
		return &out
	}
	yes, no := true, false
	flag := func(u *unpacker, at byte) *bool {
		switch u.flags & (at | at<<1) {
		case 0:
			return nil
		case at:
			return &no
		}
		return &yes
	}
	words := make([]*string, len(p.words)+1)
	for i, w := range p.words {
		s := w.Value()
		words[i+1] = &s
	}
	u := unpacker{data: p.data}
	out.Endpoints = make([]discoveryv1.Endpoint, p.count)
	for i := range out.Endpoints {
		u.next()
		e := &out.Endpoints[i]
		e.Conditions = discoveryv1.EndpointConditions{Ready: flag(&u, packedReady), Serving: flag(&u, packedServing), Terminating: flag(&u, packedTerminating)}
		e.Zone, e.NodeName = words[u.zone], words[u.node]
		fields := unpacker{data: u.fields}
		for range fields.number() {
			b, text := fields.address()
			if a, ok := netip.AddrFromSlice(b); ok && !text {
				e.Addresses = append(e.Addresses, a.String())
			} else {
				e.Addresses = append(e.Addresses, string(b))
			}
		}
		if u.flags&packedHostname != 0 {
			name := string(fields.bytes(fields.number()))
			e.Hostname = &name
		}
		if u.flags&packedPod != 0 {
			e.TargetRef = &corev1.ObjectReference{Kind: "Pod", Name: string(u.pod)}
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

// OfAny reports whether an endpoint is one of pods, which are of p's namespace.
func (p *Packed) OfAny(pods map[string]bool) bool {
	u := unpacker{data: p.data}
	for range p.count {
		u.next()
		if u.flags&packedPod != 0 && pods[string(u.pod)] {
			return true
		}
	}
	return false
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

// Unpacked returns an EndpointSlice with its endpoints.
func Unpacked(v metav1.Object) *discoveryv1.EndpointSlice {
	if p, ok := v.(*Packed); ok {
		return p.Unpack()
	}
	return v.(*discoveryv1.EndpointSlice)
}
