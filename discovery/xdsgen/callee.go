package xdsgen

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"

	"github.com/hanse-mesh/hanse/discovery"
)

// callee is one port of a service as one cluster's workloads call it.
type callee struct {
	name      discovery.Name
	authority string
	port      discovery.Port
	local     bool // …svc.cluster.local: this cluster's own endpoints only
	ports     []discovery.Port
	affinity  string
	headless  bool
	policy    *discovery.TrafficPolicy // never nil; the zero policy is the default
	parts     []part
}

// part is what one cluster contributes to a callee.
type part struct {
	service   discovery.Name
	member    *discovery.Member // nil: this cluster
	cluster   string
	region    string
	gateways  []netip.AddrPort
	ports     []discovery.Port
	portName  string // of the port that is called
	noPort    bool   // this cluster's service lacks the port
	endpoints []*discovery.Endpoint
	plaintext bool // endpoints without identity may be used
	withheld  int  // endpoints that were not imported, for their IDs
}

// state is Fresh for this cluster, and for a member that nothing is known of: silence is not absence.
func (p *part) state() discovery.PeerState {
	if p.member == nil {
		return discovery.Fresh
	}
	return cmp.Or(p.member.State, discovery.Fresh)
}

// PlaintextAnnotation on a Service with the value "true" permits calls to its endpoints that have no identity, from within
// this cluster.
const PlaintextAnnotation = "hanse.mesh/plaintext"

// lookup finds what an authority names. Only the canonical form, "name.namespace.svc.clusterset.local:port" or
// "….svc.cluster.local:port", is a resource name. The error says why there is nothing to call.
func (v *View) lookup(authority string) (*callee, error) {
	n, number, local, _ := discovery.ParseAuthority(authority)
	if !canonical(authority) {
		return nil, fmt.Errorf("%q is not of the form name.namespace.%s:port", authority, discovery.ClustersetDomain)
	}
	c := &callee{name: n, authority: authority, local: local, policy: v.Set.Local.TrafficPolicy[n]}
	if c.policy == nil {
		c.policy = &discovery.TrafficPolicy{}
	}
	var err error
	if c.ports, c.parts, c.headless, err = v.find(n, local); err != nil {
		return nil, err
	}
	c.affinity = v.affinity(n, local)
	for i := range c.parts {
		c.parts[i].setPort(number)
	}
	p := portNumber(c.ports, number)
	if p == nil {
		return nil, fmt.Errorf("service %s has no TCP port %d", n, number)
	}
	c.port = *p
	return c, nil
}

// find returns the ports of a service, and the clusters' parts of it. The error says why there is nothing to call.
func (v *View) find(n discovery.Name, local bool) (ports []discovery.Port, parts []part, headless bool, err error) {
	own, imp := v.Set.Local.Services.Get(n), v.Set.Imports.Get(n)
	switch {
	case local && own == nil:
		return nil, nil, false, fmt.Errorf("cluster %s has no service %s", v.Set.Local.Self.Cluster, n)
	case local, imp == nil && own != nil: // a service that nobody exports is callable within its cluster by both names
		return own.Ports, []part{v.ownPart(own)}, own.Headless, nil
	case imp == nil:
		return nil, nil, false, fmt.Errorf("no cluster exports a service %s, and cluster %s has none", n, v.Set.Local.Self.Cluster)
	}
	for i := range imp.From {
		parts = append(parts, v.importedPart(n, &imp.From[i], own))
	}
	return imp.Ports, parts, imp.Headless, nil
}

// affinity is the session affinity of a service that there is.
func (v *View) affinity(n discovery.Name, local bool) string {
	if imp := v.Set.Imports.Get(n); imp != nil && !local {
		return imp.Affinity
	}
	return v.Set.Local.Services.Get(n).Affinity
}

// canonical reports whether a name has the one form of a resource name, whether or not there is such a service.
func canonical(authority string) bool {
	n, number, local, ok := discovery.ParseAuthority(authority)
	return ok && number != 0 && authority == authorityOf(n, number, local)
}

func authorityOf(n discovery.Name, port uint16, local bool) string {
	return hostOf(n, local) + ":" + strconv.Itoa(int(port))
}

func portNumber(ports []discovery.Port, number uint16) *discovery.Port {
	i := slices.IndexFunc(ports, func(p discovery.Port) bool { return p.Number == number && p.Carried() })
	if i < 0 {
		return nil
	}
	return &ports[i]
}

func (v *View) ownPart(s *discovery.Service) part {
	self := &v.Set.Local.Self
	return part{service: s.Name, cluster: self.Cluster, region: self.Region, gateways: self.Gateways, ports: s.Ports, endpoints: s.Endpoints,
		plaintext: s.Annotations[PlaintextAnnotation] == "true"}
}

func (v *View) importedPart(n discovery.Name, from *discovery.ImportedFrom, own *discovery.Service) part {
	if from.Member == v.Set.Local.Self.Cluster && own != nil {
		return v.ownPart(own) // the Snapshot is at least as new as the merge
	}
	p := part{service: n, withheld: from.Withheld, cluster: from.Member, ports: from.Ports, endpoints: from.Endpoints, member: v.Set.Members[from.Member]}
	if p.member != nil {
		p.region, p.gateways = p.member.Region, p.member.Gateways
	} else if from.Member != v.Set.Local.Self.Cluster {
		p.member = &discovery.Member{Name: from.Member}
	}
	return p
}

func (p *part) setPort(number uint16) {
	if port := portNumber(p.ports, number); port != nil {
		p.portName = port.Name
	} else {
		p.noPort = true
	}
}
