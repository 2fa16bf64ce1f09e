package objects

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	mcsv1alpha1 "sigs.k8s.io/mcs-api/pkg/apis/v1alpha1"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/discovery/v1alpha1"
)

// Object is one decoded object and where it was written. It must not be changed.
type Object struct {
	Kind  string        // such as Service
	Value metav1.Object // pointer to the kind's Go type, namespace filled in
	File  string        // "" where it did not come from a file
	Line  int           // of its first line; 0 where unknown

	node *yaml.Node // of kinds of which Build may name a field; nil otherwise
}

// Key names an object: no two kinds here share a name, so the API group is not part of it.
type Key struct {
	Kind      string
	Namespace string // "" for cluster-scoped kinds
	Name      string
}

// Key returns the key of o.
func (o Object) Key() Key {
	return Key{Kind: o.Kind, Namespace: o.Value.GetNamespace(), Name: o.Value.GetName()}
}

// Name returns namespace and name of o.
func (o Object) Name() discovery.Name {
	return discovery.Name{Namespace: o.Value.GetNamespace(), Name: o.Value.GetName()}
}

func (k Key) name() discovery.Name { return discovery.Name{Namespace: k.Namespace, Name: k.Name} }

// String returns "Service shop/payments", or "Peer east" for a cluster-scoped kind.
func (k Key) String() string {
	if k.Namespace == "" {
		return strings.TrimSpace(k.Kind + " " + k.Name)
	}
	return k.Kind + " " + k.Namespace + "/" + k.Name
}

// Compare orders keys by kind, namespace and name.
func (k Key) Compare(o Key) int {
	return cmp.Or(cmp.Compare(k.Kind, o.Kind), cmp.Compare(k.Namespace, o.Namespace), cmp.Compare(k.Name, o.Name))
}

// MarshalJSON returns the object as Kubernetes writes it. Decode reads it back.
func (o Object) MarshalJSON() ([]byte, error) { return json.Marshal(o.Value) }

// Kind describes a kind that Hanse knows.
type Kind struct {
	Name        string
	APIVersions []string // first preferred
	Plural      string
	Short       []string
	Namespaced  bool
	make        func() metav1.Object
}

// New returns an empty object of the kind's Go type.
func (k Kind) New() metav1.Object { return k.make() }

// Kinds of objects that are read, in the order in which they are listed to people.
func Kinds() []Kind {
	mcs := []string{"multicluster.x-k8s.io/v1alpha1", "multicluster.x-k8s.io/v1beta1"} // the same fields in both
	gateway := []string{"gateway.networking.k8s.io/v1"}
	own := []string{v1alpha1.APIVersion}
	return []Kind{
		{"Service", []string{"v1"}, "services", []string{"svc"}, true, func() metav1.Object { return &corev1.Service{} }},
		{"EndpointSlice", []string{"discovery.k8s.io/v1"}, "endpointslices", nil, true, func() metav1.Object { return &discoveryv1.EndpointSlice{} }},
		{"ServiceExport", mcs, "serviceexports", []string{"svcex"}, true, func() metav1.Object { return &mcsv1alpha1.ServiceExport{} }},
		{"HTTPRoute", gateway, "httproutes", nil, true, func() metav1.Object { return &gatewayv1.HTTPRoute{} }},
		{"GRPCRoute", gateway, "grpcroutes", nil, true, func() metav1.Object { return &gatewayv1.GRPCRoute{} }},
		{"TLSRoute", append(gateway, "gateway.networking.k8s.io/v1alpha3", "gateway.networking.k8s.io/v1alpha2"), "tlsroutes", nil, true, func() metav1.Object { return &gatewayv1.TLSRoute{} }},
		{"TCPRoute", append(gateway, "gateway.networking.k8s.io/v1alpha2"), "tcproutes", nil, true, func() metav1.Object { return &gatewayv1.TCPRoute{} }},
		{"ReferenceGrant", append(gateway, "gateway.networking.k8s.io/v1beta1"), "referencegrants", []string{"refgrant"}, true, func() metav1.Object { return &gatewayv1.ReferenceGrant{} }},
		{"TrafficPolicy", own, "trafficpolicies", []string{"tp"}, true, func() metav1.Object { return &v1alpha1.TrafficPolicy{} }},
		{"AccessPolicy", own, "accesspolicies", []string{"ap"}, true, func() metav1.Object { return &v1alpha1.AccessPolicy{} }},
		{"Peer", own, "peers", nil, false, func() metav1.Object { return &v1alpha1.Peer{} }},
		{"Drill", own, "drills", nil, false, func() metav1.Object { return &v1alpha1.Drill{} }},
		{"ClusterFederatedTrustDomain", []string{v1alpha1.SPIREAPIVersion}, "clusterfederatedtrustdomains", []string{"cftd"}, false,
			func() metav1.Object { return &v1alpha1.ClusterFederatedTrustDomain{} }},
	}
}

// LookupKind finds a kind by name, plural or short name, as typed to kubectl: case does not matter, and a ".group" after
// it is allowed.
func LookupKind(word string) (Kind, bool) {
	word, group, _ := strings.Cut(strings.ToLower(word), ".")
	for _, k := range Kinds() {
		if group != "" && !slices.ContainsFunc(k.APIVersions, func(v string) bool { return strings.HasPrefix(v, group+"/") }) {
			continue
		}
		if word == strings.ToLower(k.Name) || word == k.Plural || slices.Contains(k.Short, word) {
			return k, true
		}
	}
	return Kind{}, false
}

func kindNames() string {
	var names []string
	for _, k := range Kinds() {
		names = append(names, k.Name+" ("+strings.Join(k.APIVersions, " or ")+")")
	}
	return strings.Join(names, ", ")
}

// newValue returns an empty value of the kind, or the fault that says what to write instead.
func newValue(kind, apiVersion string) (Kind, metav1.Object, string) {
	i := slices.IndexFunc(Kinds(), func(k Kind) bool { return k.Name == kind })
	if i < 0 {
		if k, ok := LookupKind(kind); ok {
			return Kind{}, nil, fmt.Sprintf("no such kind; did you mean %s?", k.Name)
		}
		var names []string
		for _, k := range Kinds() {
			names = append(names, k.Name)
		}
		if best := closest(kind, names); best != "" {
			return Kind{}, nil, fmt.Sprintf("no such kind; did you mean %s?", best)
		}
		return Kind{}, nil, "not a kind that Hanse reads; known are " + kindNames()
	}
	k := Kinds()[i]
	if !slices.Contains(k.APIVersions, apiVersion) {
		return Kind{}, nil, fmt.Sprintf("apiVersion of %s must be %s", kind, strings.Join(k.APIVersions, " or "))
	}
	return k, k.make(), ""
}
