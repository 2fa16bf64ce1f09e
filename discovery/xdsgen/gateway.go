package xdsgen

import (
	"cmp"
	"iter"
	"slices"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/discovery/xdspb"
)

// Exported yields the services that this cluster's gateways lead to, in no order.
func (v *View) Exported() iter.Seq[discovery.Name] {
	return func(yield func(discovery.Name) bool) {
		for n, s := range v.Set.Local.Services.All() {
			if s.Export != nil && !yield(n) {
				return
			}
		}
	}
}

// GatewayResources are the ClusterLoadAssignments of one service in the table of a gateway, one for each SNI name, sorted by
// name: every endpoint's own, and for any ready endpoint the service's and those of its ports. A service that is not exported
// has none. An endpoint's name may come with several services; its resource is the same each time.
func (v *View) GatewayResources(service discovery.Name) ([]*Resource, error) {
	s := v.Set.Local.Services.Get(service)
	if s == nil || s.Export == nil {
		return nil, nil
	}
	table := make(map[string]*endpointv3.ClusterLoadAssignment)
	for i, port := range sortedPorts(s.Ports) {
		for _, e := range s.Endpoints {
			target := e.Ports[port.Name]
			if e.Transport == discovery.Plaintext || target == 0 {
				continue
			}
			meta, err := metadata(&xdspb.EndpointMeta{Id: e.ID})
			if err != nil {
				return nil, err
			}
			lb := &endpointv3.LbEndpoint{
				HostIdentifier:      &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{Address: socketAddress(e.DialAddress(port.Name))}},
				Metadata:            meta,
				LoadBalancingWeight: u32(min(max(e.Weight, 1), maxWeight)),
			}
			add := func(name string) {
				if table[name] == nil {
					table[name] = &endpointv3.ClusterLoadAssignment{ClusterName: name, Endpoints: []*endpointv3.LocalityLbEndpoints{{Locality: &corev3.Locality{}}}}
				}
				at := table[name].Endpoints[0]
				at.LbEndpoints = append(at.LbEndpoints, lb)
			}
			if own := endpointSNI(e, target); table[own] == nil { // a hop serves all ports under one name
				add(own)
			}
			if e.Ready && !e.Draining {
				add(portSNI(service, port.Number))
				if i == 0 {
					add(service.Host())
				}
			}
		}
	}
	out := make([]*Resource, 0, len(table))
	for name, cla := range table {
		r, err := NewResource(name, cla)
		if err != nil {
			return nil, err
		}
		out = append(out, r)
	}
	slices.SortFunc(out, func(a, b *Resource) int { return cmp.Compare(a.Name, b.Name) })
	return out, nil
}

// sortedPorts are the TCP ports, lowest first.
func sortedPorts(ports []discovery.Port) []discovery.Port {
	out := slices.DeleteFunc(slices.Clone(ports), func(p discovery.Port) bool { return !p.Carried() })
	slices.SortFunc(out, func(a, b discovery.Port) int { return cmp.Compare(a.Number, b.Number) })
	return out
}
