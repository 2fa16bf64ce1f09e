package kube

import (
	"crypto/sha256"
	"maps"
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	mcsv1beta1 "sigs.k8s.io/mcs-api/pkg/apis/v1beta1"

	"github.com/hanse-mesh/hanse/discovery"
)

// writtenObjects is what the API server holds for one import. It must not be changed.
type writtenObjects struct {
	namespace bool                         // whether it exists
	imported  *mcsv1beta1.ServiceImport    // somebody else's, if it has not Hanse's label; nil if there is none
	service   *corev1.Service              // nil if there is none
	slices    map[string]*writtenEndpoints // by name
}

// writtenEndpoints is what is kept of an EndpointSlice that Hanse has written: of its endpoints, whether they are those that it would write.
type writtenEndpoints struct {
	discoveryv1.EndpointSlice // Endpoints is nil
	sum                       [sha256.Size]byte
}

func condenseWritten(o metav1.Object) any {
	w := &writtenEndpoints{EndpointSlice: *o.(*discoveryv1.EndpointSlice)}
	w.sum, w.Endpoints = sumOf(w.Endpoints), nil
	return w
}

// sumOf tells endpoints apart.
func sumOf(endpoints []discoveryv1.Endpoint) [sha256.Size]byte {
	b, err := (&discoveryv1.EndpointSlice{Endpoints: endpoints}).Marshal()
	if err != nil {
		return [sha256.Size]byte{} // cannot be: it writes into memory
	}
	return sha256.Sum256(b)
}

// note remembers that an object is new or changed. With mu held.
func (s *Source) note(k *kind, name types.NamespacedName, value any) {
	s.changed[ref{k, name}] = struct{}{}
	if slice, ok := value.(*writtenEndpoints); ok {
		n := discovery.Name{Namespace: name.Namespace, Name: slice.Labels[mcsv1beta1.LabelServiceName]}
		if s.slices[n] == nil {
			s.slices[n] = map[string]*writtenEndpoints{}
		}
		s.slices[n][name.Name] = slice
	}
	s.rewrite(k, name, value)
}

// drop forgets an object. With mu held.
func (s *Source) drop(k *kind, name types.NamespacedName) {
	value := k.items[name].value
	delete(k.items, name)
	s.count(name, value, -1)
	s.changed[ref{k, name}] = struct{}{}
	if slice, ok := value.(*writtenEndpoints); ok {
		n := discovery.Name{Namespace: name.Namespace, Name: slice.Labels[mcsv1beta1.LabelServiceName]}
		delete(s.slices[n], name.Name)
		if len(s.slices[n]) == 0 {
			delete(s.slices, n)
		}
	}
	s.rewrite(k, name, value)
}

// rewrite tells Writer which import an object belongs to. With mu held.
func (s *Source) rewrite(k *kind, name types.NamespacedName, value any) {
	if k.name == "ServiceImport" {
		s.ips = nil
	}
	n := discovery.Name{Namespace: name.Namespace, Name: name.Name}
	switch v := value.(type) {
	case *corev1.Service:
		if k.name != writtenService {
			return
		}
		n.Name = v.Labels[labelImport]
	case *writtenEndpoints:
		n.Name = v.Labels[mcsv1beta1.LabelServiceName]
	case namespace:
		n = discovery.Name{Namespace: name.Name} // all imports of it
	case *mcsv1beta1.ServiceImport:
	default:
		return
	}
	s.imports[n] = struct{}{}
	s.kickWriter()
}

// kickWriter has Writer look again.
func (s *Source) kickWriter() {
	select {
	case s.rewritten <- struct{}{}:
	default:
	}
}

// takeRewritten returns the imports of which the server's objects have changed since the last call; one without a name is a namespace.
func (s *Source) takeRewritten() map[discovery.Name]struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := s.imports
	s.imports = map[discovery.Name]struct{}{}
	return out
}

// writtenNames returns the imports of which the server has objects.
func (s *Source) writtenNames() map[discovery.Name]struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := map[discovery.Name]struct{}{}
	for name := range s.kind("ServiceImport").items {
		out[discovery.Name{Namespace: name.Namespace, Name: name.Name}] = struct{}{}
	}
	for _, it := range s.kind(writtenService).items {
		if v, ok := it.value.(*corev1.Service); ok {
			out[discovery.Name{Namespace: v.Namespace, Name: v.Labels[labelImport]}] = struct{}{}
		}
	}
	for n := range s.slices {
		out[n] = struct{}{}
	}
	return out
}

// writtenOf returns what the server has of an import.
func (s *Source) writtenOf(n discovery.Name) writtenObjects {
	s.mu.Lock()
	defer s.mu.Unlock()
	at := func(k, name string) any {
		return s.kind(k).items[types.NamespacedName{Namespace: n.Namespace, Name: name}].value
	}
	var out writtenObjects
	out.imported, _ = at("ServiceImport", n.Name).(*mcsv1beta1.ServiceImport)
	out.service, _ = at(writtenService, behindName(n)).(*corev1.Service)
	out.slices = maps.Clone(s.slices[n])
	_, out.namespace = s.kind("Namespace").items[types.NamespacedName{Name: n.Namespace}]
	return out
}

// define notes which version of a kind is read; the zero value is none.
func (s *Source) define(k *kind, gv schema.GroupVersion) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if gv.Empty() {
		delete(s.versions, k)
	} else {
		s.versions[k] = gv
	}
	s.kickWriter()
}

// defined returns the version of a kind that is read, if its CustomResourceDefinition exists.
func (s *Source) defined(name string) (schema.GroupVersion, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	gv, ok := s.versions[s.kind(name)]
	return gv, ok
}

// ClustersetIPs returns the IPs that ServiceImports give to services of the clusterset, whoever wrote them. It must not be changed.
func (s *Source) ClustersetIPs() map[netip.Addr]discovery.Name {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ips != nil {
		return s.ips
	}
	out := map[netip.Addr]discovery.Name{}
	for name, it := range s.kind("ServiceImport").items {
		if v, ok := it.value.(*mcsv1beta1.ServiceImport); ok {
			for _, ip := range v.Spec.IPs {
				if a, err := netip.ParseAddr(ip); err == nil {
					out[a] = discovery.Name{Namespace: name.Namespace, Name: name.Name}
				}
			}
		}
	}
	s.ips = out
	return out
}
