package kube

import (
	"cmp"
	"crypto/sha256"
	"encoding/base32"
	"encoding/hex"
	"fmt"
	"maps"
	"math/bits"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	mcsv1beta1 "sigs.k8s.io/mcs-api/pkg/apis/v1beta1"

	"github.com/hanse-mesh/hanse/discovery"
)

// Labels of what Hanse writes.
const (
	labelManagedBy = "app.kubernetes.io/managed-by" // value ManagedBy, on ServiceImports and the Services behind them
	labelImport    = "hanse.mesh/service-import"    // on the Service behind a ServiceImport: its name
)

// Imported is what one cluster's API server should hold for one imported service (KEP-1645).
type Imported struct {
	Import  *mcsv1beta1.ServiceImport
	Service *corev1.Service // whose cluster IPs are the clusterset IPs, so that kube-proxy serves them; nil for a headless service
	Slices  []*discoveryv1.EndpointSlice
}

// slotSize is how many endpoints a slice has on average, so that one that changes rewrites few.
const slotSize = 64

// ImportedObjects says what i becomes in a cluster. ips are the IPs that the Service behind it has been given, if it has been; withdrawn
// are members whose endpoints nobody is to call (KEP-1645 "Endpoint TTL"). The same arguments give the same objects.
func ImportedObjects(self discovery.Self, i *discovery.Import, ips []netip.Addr, withdrawn map[string]bool) *Imported {
	out := &Imported{Import: &mcsv1beta1.ServiceImport{
		TypeMeta: metav1.TypeMeta{APIVersion: mcsv1beta1.GroupName + "/v1beta1", Kind: "ServiceImport"},
		ObjectMeta: metav1.ObjectMeta{Namespace: i.Name.Namespace, Name: i.Name.Name, Labels: maps.Clone(i.Labels),
			Annotations: maps.Clone(i.Annotations)},
	}}
	if out.Import.Labels == nil {
		out.Import.Labels = map[string]string{}
	}
	out.Import.Labels[labelManagedBy] = ManagedBy
	spec := &out.Import.Spec
	spec.Type, spec.Ports = mcsv1beta1.ClusterSetIP, importPorts(i.Ports)
	if i.Headless {
		spec.Type = mcsv1beta1.Headless
		for _, f := range i.IPFamilies {
			spec.IPFamilies = append(spec.IPFamilies, corev1.IPFamily(f))
		}
	} else {
		out.Service = behind(i)
		for _, ip := range clustersetIPs(i, ips) { // which families they are of is not for the exports to say
			spec.IPs = append(spec.IPs, ip.String())
			spec.IPFamilies = append(spec.IPFamilies, corev1.IPFamily(family(ip)))
		}
		// Defaults are written out, as they are in the Services that this one is like.
		spec.SessionAffinity, spec.SessionAffinityConfig = affinity(i)
		policy := corev1.ServiceInternalTrafficPolicy(cmp.Or(i.InternalTrafficPolicy, string(corev1.ServiceInternalTrafficPolicyCluster)))
		spec.InternalTrafficPolicy = &policy
	}
	if i.TrafficDistribution != "" {
		spec.TrafficDistribution = &i.TrafficDistribution
	}
	for _, from := range i.From {
		if !withdrawn[from.Member] {
			out.Slices = append(out.Slices, importedSlices(self, i, &from)...)
		}
		out.Import.Status.Clusters = append(out.Import.Status.Clusters, mcsv1beta1.ClusterStatus{Cluster: from.Member})
	}
	slices.SortFunc(out.Import.Status.Clusters, func(a, b mcsv1beta1.ClusterStatus) int { return cmp.Compare(a.Cluster, b.Cluster) })
	out.Import.Status.EndpointSliceObjects = mcsv1beta1.EndpointSliceObjectsAbsent
	if len(out.Slices) > 0 {
		out.Import.Status.EndpointSliceObjects = mcsv1beta1.EndpointSliceObjectsPresent
	}
	return out
}

// clustersetIPs are those of ips by which every endpoint is reached, in the order that the exports prefer; all, if there is none.
func clustersetIPs(i *discovery.Import, ips []netip.Addr) []netip.Addr {
	var common []netip.Addr
	for _, f := range i.IPFamilies {
		for _, ip := range ips {
			if family(ip) == f {
				common = append(common, ip)
			}
		}
	}
	if len(common) == 0 {
		return ips
	}
	return common
}

func family(a netip.Addr) discovery.IPFamily {
	if a.Unmap().Is4() {
		return discovery.IPv4
	}
	return discovery.IPv6
}

func affinity(i *discovery.Import) (corev1.ServiceAffinity, *corev1.SessionAffinityConfig) {
	if i.Affinity != string(corev1.ServiceAffinityClientIP) {
		return corev1.ServiceAffinityNone, nil
	}
	seconds := int32(cmp.Or(i.AffinityTimeout, discovery.DefaultAffinityTimeout))
	return corev1.ServiceAffinityClientIP, &corev1.SessionAffinityConfig{ClientIP: &corev1.ClientIPConfig{TimeoutSeconds: &seconds}}
}

func protocol(p discovery.Port) corev1.Protocol {
	switch {
	case p.UDP:
		return corev1.ProtocolUDP
	case p.SCTP:
		return corev1.ProtocolSCTP
	}
	return corev1.ProtocolTCP
}

func appProtocol(p discovery.AppProtocol) *string {
	word := string(p)
	switch p {
	case discovery.TCP:
		return nil
	case discovery.HTTP2:
		word = "kubernetes.io/h2c"
	}
	return &word
}

func importPorts(ports []discovery.Port) []mcsv1beta1.ServicePort {
	out := []mcsv1beta1.ServicePort{}
	for _, p := range ports {
		out = append(out, mcsv1beta1.ServicePort{Name: p.Name, Port: int32(p.Number), Protocol: protocol(p), AppProtocol: appProtocol(p.Protocol)})
	}
	return out
}

// behindName is the name of the Service behind an import. It is not the import's own, which a Service of this cluster may have.
func behindName(n discovery.Name) string {
	sum := sha256.Sum256([]byte(n.String()))
	return "hanse-" + strings.ToLower(base32.HexEncoding.WithPadding(base32.NoPadding).EncodeToString(sum[:10]))
}

// behind is the Service that gives an import its IPs. It selects nothing: its EndpointSlices are written by Hanse.
func behind(i *discovery.Import) *corev1.Service {
	s := &corev1.Service{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Service"},
		ObjectMeta: metav1.ObjectMeta{Namespace: i.Namespace, Name: behindName(i.Name),
			Labels: map[string]string{labelManagedBy: ManagedBy, labelImport: i.Name.Name}},
		Spec: corev1.ServiceSpec{Type: corev1.ServiceTypeClusterIP},
	}
	s.Spec.SessionAffinity, s.Spec.SessionAffinityConfig = affinity(i)
	policy := corev1.IPFamilyPolicyPreferDualStack
	s.Spec.IPFamilyPolicy = &policy
	for _, p := range i.Ports {
		s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: p.Name, Port: int32(p.Number), Protocol: protocol(p), AppProtocol: appProtocol(p.Protocol)})
	}
	return s
}

// byZone reports whether the exports prefer endpoints in the caller's zone, which kube-proxy does by their hints.
func byZone(i *discovery.Import) bool {
	return i.TrafficDistribution == corev1.ServiceTrafficDistributionPreferClose || i.TrafficDistribution == corev1.ServiceTrafficDistributionPreferSameZone
}

// bucket is what one EndpointSlice can hold: endpoints of one family and of the same target ports, and a share of these by ID.
type bucket struct {
	family discoveryv1.AddressType
	ports  string // by name, so that it can be compared
	slot   int
}

// importedSlices are one member's endpoints. Those on another network are left out: only sidecars reach them, through gateways.
func importedSlices(self discovery.Self, i *discovery.Import, from *discovery.ImportedFrom) []*discoveryv1.EndpointSlice {
	reachable := make([]*discovery.Endpoint, 0, len(from.Endpoints))
	for _, e := range from.Endpoints {
		if e.Network == self.Network {
			reachable = append(reachable, e)
		}
	}
	slots := 1 << bits.Len(uint((len(reachable)-1)/slotSize))
	in := map[bucket][]at{}
	for _, e := range reachable {
		b := bucket{ports: fmt.Sprint(e.Ports), slot: slotOf(e.ID, slots)}
		for _, a := range e.Addresses() {
			b.family = discoveryv1.AddressType(family(a))
			in[b] = append(in[b], at{e, a})
		}
	}
	var out []*discoveryv1.EndpointSlice
	for _, b := range slices.SortedFunc(maps.Keys(in), func(a, b bucket) int {
		return cmp.Or(cmp.Compare(a.family, b.family), cmp.Compare(a.ports, b.ports), cmp.Compare(a.slot, b.slot))
	}) {
		out = append(out, importedSlice(i, from, b, in[b]))
	}
	return out
}

// at is an endpoint at one of its addresses.
type at struct {
	*discovery.Endpoint
	address netip.Addr
}

// slotOf spreads random IDs of 32 hex digits evenly.
func slotOf(id string, slots int) int {
	b, err := hex.DecodeString(id[:min(8, len(id))])
	if err != nil {
		return 0
	}
	n := 0
	for _, x := range b {
		n = n<<8 | int(x)
	}
	return n & (slots - 1)
}

func importedSlice(i *discovery.Import, from *discovery.ImportedFrom, b bucket, endpoints []at) *discoveryv1.EndpointSlice {
	name := behindName(i.Name)
	sum := sha256.Sum256([]byte(b.ports))
	s := &discoveryv1.EndpointSlice{
		TypeMeta: metav1.TypeMeta{APIVersion: "discovery.k8s.io/v1", Kind: "EndpointSlice"},
		ObjectMeta: metav1.ObjectMeta{Namespace: i.Namespace,
			Name: strings.Join([]string{name, from.Member, strings.ToLower(string(b.family)), hex.EncodeToString(sum[:2]), strconv.Itoa(b.slot)}, "-"),
			Labels: map[string]string{
				discoveryv1.LabelManagedBy:    ManagedBy,
				mcsv1beta1.LabelServiceName:   i.Name.Name,
				mcsv1beta1.LabelSourceCluster: from.Member,
			}},
		AddressType: b.family,
	}
	if !i.Headless {
		s.Labels[discoveryv1.LabelServiceName] = name // kube-proxy's
	}
	for _, p := range i.Ports {
		target, ok := endpoints[0].Ports[p.Name]
		if !ok {
			continue
		}
		number, proto, portName := int32(target), protocol(p), p.Name
		s.Ports = append(s.Ports, discoveryv1.EndpointPort{Name: &portName, Port: &number, Protocol: &proto, AppProtocol: appProtocol(p.Protocol)})
	}
	for _, e := range endpoints {
		ready, serving, terminating := e.Ready && !e.Draining, e.Ready || e.Draining, e.Draining
		ep := discoveryv1.Endpoint{Addresses: []string{e.address.Unmap().String()},
			Conditions: discoveryv1.EndpointConditions{Ready: &ready, Serving: &serving, Terminating: &terminating}}
		if e.Hostname != "" {
			ep.Hostname = &e.Hostname
		}
		if e.Locality.Zone != "" {
			ep.Zone = &e.Locality.Zone
			if byZone(i) {
				ep.Hints = &discoveryv1.EndpointHints{ForZones: []discoveryv1.ForZone{{Name: e.Locality.Zone}}}
			}
		}
		s.Endpoints = append(s.Endpoints, ep)
	}
	slices.SortFunc(s.Endpoints, func(a, b discoveryv1.Endpoint) int { return cmp.Compare(a.Addresses[0], b.Addresses[0]) })
	return s
}
