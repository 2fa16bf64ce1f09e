package discovery

import (
	"cmp"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

// ClustersetDomain ends the names of services of the whole mesh (KEP-1645 "DNS").
const ClustersetDomain = "svc.clusterset.local"

// ClusterDomain ends the names of this cluster's own services.
const ClusterDomain = "svc.cluster.local"

// HopPort is where a sidecar accepts the mTLS hop unless its endpoint says otherwise.
const HopPort = 15008

// Name is a namespaced name. Namespaces of the same name are the same in all clusters (MCS "namespace sameness").
type Name struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
}

// String returns "namespace/name".
func (n Name) String() string { return n.Namespace + "/" + n.Name }

// Compare orders by namespace, then name.
func (n Name) Compare(o Name) int {
	return cmp.Or(cmp.Compare(n.Namespace, o.Namespace), cmp.Compare(n.Name, o.Name))
}

// Host returns "name.namespace.svc.clusterset.local".
func (n Name) Host() string { return n.Name + "." + n.Namespace + "." + ClustersetDomain }

// Authority returns the mesh-wide resource name of one port, "name.namespace.svc.clusterset.local:8080": the authority that
// callers use and the name of the Listener, RouteConfiguration, xDS cluster and ClusterLoadAssignment.
func (n Name) Authority(port uint16) string { return n.Host() + ":" + strconv.Itoa(int(port)) }

// ParseAuthority reads a name as a caller may write it: "name.namespace[.svc[.clusterset.local|.cluster.local]][:port]".
// Port is 0 where none was given; local is true for …svc.cluster.local, which stays this cluster's own.
func ParseAuthority(authority string) (n Name, port uint16, local, ok bool) {
	host := authority
	if i := strings.LastIndexByte(authority, ':'); i >= 0 {
		p, err := strconv.ParseUint(authority[i+1:], 10, 16)
		if err != nil || p == 0 {
			return Name{}, 0, false, false
		}
		host, port = authority[:i], uint16(p)
	}
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	if h, found := strings.CutSuffix(host, "."+ClusterDomain); found {
		host, local = h, true
	} else {
		host = strings.TrimSuffix(strings.TrimSuffix(host, "."+ClustersetDomain), ".svc")
	}
	name, ns, found := strings.Cut(host, ".")
	if !found || name == "" || ns == "" || strings.Contains(ns, ".") {
		return Name{}, 0, false, false
	}
	return Name{Namespace: ns, Name: name}, port, local, true
}

// Locality says where something runs. Levels compare it from the right: zone, region, cluster.
type Locality struct {
	Cluster string `json:"cluster"`
	Region  string `json:"region,omitempty"`
	Zone    string `json:"zone,omitempty"`
}

// AppProtocol is what an application speaks on a port (Service.spec.ports[].appProtocol).
type AppProtocol string

// Protocols. HTTP accepts HTTP/1.1 and HTTP/2 from callers and speaks HTTP/1.1 to the application.
const (
	HTTP  AppProtocol = "http"
	HTTP2 AppProtocol = "http2" // kubernetes.io/h2c
	GRPC  AppProtocol = "grpc"
	TCP   AppProtocol = "tcp"
)

// IsHTTP reports whether routes, and policies on method and path, apply.
func (p AppProtocol) IsHTTP() bool { return p != TCP }

// Port is one port of a service.
type Port struct {
	Name     string      `json:"name,omitempty"`
	Number   uint16      `json:"port"`
	Protocol AppProtocol `json:"protocol"`
	UDP      bool        `json:"udp,omitempty"`  // listed and exported, but not carried by proxies
	SCTP     bool        `json:"sctp,omitempty"` // likewise
}

// Carried reports whether proxies carry the port: it is TCP.
func (p Port) Carried() bool { return !p.UDP && !p.SCTP }

// Transport is how an endpoint is reached.
type Transport string

// Transports.
const (
	Hop       Transport = "hop"       // a sidecar's mTLS HTTP/2 hop on HopPort
	TLS       Transport = "tls"       // the workload itself serves mTLS with its SVID on the target port (proxyless gRPC)
	Plaintext Transport = "plaintext" // no identity; reached only within the cluster, and only where a policy permits it
)

// Endpoint is one workload behind a service.
type Endpoint struct {
	ID       string      `json:"id"` // 32 hex digits: random, and kept as long as the workload keeps its address
	Address  netip.Addr  `json:"address"`
	Second   *netip.Addr `json:"second,omitempty"` // of a dual-stack workload, in the other IP family
	*Profile             // never nil
	Hostname string      `json:"hostname,omitempty"`
	Weight   uint32      `json:"weight,omitempty"` // 0 means 1
	Ready    bool        `json:"ready"`
	Draining bool        `json:"draining,omitempty"` // terminating but still serving
}

// Profile is what an endpoint has in common with others of its service: they share it, and it is never changed.
type Profile struct {
	Ports     map[string]uint16 `json:"ports"` // target port by the service port's name
	HopPort   uint16            `json:"hopPort,omitempty"`
	Transport Transport         `json:"transport"`
	SPIFFEID  string            `json:"spiffeID,omitempty"` // of the workload; empty only for Plaintext
	Locality  Locality          `json:"locality"`
	Network   string            `json:"network"` // endpoints of another network are reached through gateways
}

// Addresses returns the one or two addresses of the workload, the preferred one first.
func (e *Endpoint) Addresses() []netip.Addr {
	if e.Second != nil {
		return []netip.Addr{e.Address, *e.Second}
	}
	return []netip.Addr{e.Address}
}

// DialAddress returns where a proxy on the same network dials for the service port named portName.
func (e *Endpoint) DialAddress(portName string) netip.AddrPort {
	if e.Transport == Hop {
		return netip.AddrPortFrom(e.Address, cmp.Or(e.HopPort, HopPort))
	}
	return netip.AddrPortFrom(e.Address, e.Ports[portName])
}

// Traits are the properties of a Service as a whole that its consumers in other clusters see too (MCS ServiceImport). The zero value of
// each is Kubernetes' default.
type Traits struct {
	Headless              bool       `json:"headless,omitempty"`
	Affinity              string     `json:"sessionAffinity,omitempty"`        // "", "None" or "ClientIP"
	AffinityTimeout       uint32     `json:"sessionAffinityTimeout,omitempty"` // seconds; 0 means 10,800
	InternalTrafficPolicy string     `json:"internalTrafficPolicy,omitempty"`  // "", "Cluster" or "Local"
	TrafficDistribution   string     `json:"trafficDistribution,omitempty"`    // such as PreferClose
	IPFamilies            []IPFamily `json:"ipFamilies,omitempty"`             // the preferred one first
}

// IPFamily is one of IPv4 and IPv6.
type IPFamily string

// Families.
const (
	IPv4 IPFamily = "IPv4"
	IPv6 IPFamily = "IPv6"
)

// DefaultAffinityTimeout is that of session affinity by client IP, in seconds, unless a Service says otherwise.
const DefaultAffinityTimeout = 10_800

// Normal returns t with each default written as the zero value, so that equal traits compare equal.
func (t Traits) Normal() Traits {
	if t.Affinity == "None" {
		t.Affinity = ""
	}
	if t.Affinity == "" || t.AffinityTimeout == DefaultAffinityTimeout {
		t.AffinityTimeout = 0
	}
	if t.InternalTrafficPolicy == "Cluster" {
		t.InternalTrafficPolicy = ""
	}
	return t
}

// Equal compares all traits.
func (t Traits) Equal(o Traits) bool {
	return t.Headless == o.Headless && t.Affinity == o.Affinity && t.AffinityTimeout == o.AffinityTimeout &&
		t.InternalTrafficPolicy == o.InternalTrafficPolicy && t.TrafficDistribution == o.TrafficDistribution &&
		slices.Equal(t.IPFamilies, o.IPFamilies)
}

// Service is a service of one cluster, with its endpoints.
type Service struct {
	Name
	Traits
	Ports       []Port            `json:"ports"`
	ClusterIPs  []netip.Addr      `json:"clusterIPs,omitempty"`
	Labels      map[string]string `json:"labels,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
	Endpoints   []*Endpoint       `json:"endpoints"` // sorted by ID
	Export      *Export           `json:"export,omitempty"`
}

// Port returns the port with that number, or nil.
func (s *Service) Port(number uint16) *Port {
	for i := range s.Ports {
		if s.Ports[i].Number == number {
			return &s.Ports[i]
		}
	}
	return nil
}

// WithoutIdentity counts the endpoints that only this cluster can call: they are not exported.
func (s *Service) WithoutIdentity() int {
	n := 0
	for _, e := range s.Endpoints {
		if e.Transport == Plaintext {
			n++
		}
	}
	return n
}

// Export is a ServiceExport: the service may be called from other clusters.
type Export struct {
	Created     time.Time         `json:"created"`            // set once; the oldest export wins a conflict
	Audience    []string          `json:"audience,omitempty"` // member names and key=value labels of Peers (sorted); empty is every member
	Labels      map[string]string `json:"labels,omitempty"`   // of the ServiceImport (MCS exportedLabels); not those of the Service
	Annotations map[string]string `json:"annotations,omitempty"`
}
