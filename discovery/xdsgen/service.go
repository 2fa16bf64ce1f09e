package xdsgen

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/discovery/xdspb"
)

// ClustersetAnnotation on a Service with the value "true" lets its ClusterIP mean the service of the whole clusterset.
const ClustersetAnnotation = "hanse.mesh/clusterset"

// service is what a host name without port, or AddressPrefix and an address, stands for; nil: nothing of the mesh.
func (v *View) service(viewer *Viewer, name string) *xdspb.Service {
	if ip, ok := strings.CutPrefix(name, AddressPrefix); ok {
		addr, err := netip.ParseAddr(ip)
		if err != nil || addr.String() != ip {
			return nil
		}
		return v.serviceAt(viewer, addr)
	}
	n, port, local, ok := discovery.ParseAuthority(name)
	if !ok || port != 0 || name != hostOf(n, local) {
		return nil
	}
	ports, parts, headless, err := v.find(n, local)
	if err != nil {
		return nil
	}
	s := &xdspb.Service{Host: name, Ports: servicePorts(ports, nil), Headless: headless}
	if headless {
		s.Endpoints = v.serviceEndpoints(viewer, parts)
	}
	return s
}

// serviceAt finds the service that has an address as its clusterset IP, the own one that has it as a ClusterIP, or an endpoint at it.
func (v *View) serviceAt(viewer *Viewer, addr netip.Addr) *xdspb.Service {
	if n, ok := v.Set.Local.ClustersetIPs[addr]; ok {
		if imp := v.Set.Imports.Get(n); imp != nil {
			return &xdspb.Service{Host: n.Host(), Ports: servicePorts(imp.Ports, nil), Headless: imp.Headless}
		}
	}
	names := v.hosts.at(addr)
	for _, n := range names {
		s := v.Set.Local.Services.Get(n)
		if !slices.Contains(s.ClusterIPs, addr) {
			continue
		}
		if ports, _, headless, err := v.find(n, false); s.Annotations[ClustersetAnnotation] == "true" && err == nil {
			return &xdspb.Service{Host: n.Host(), Ports: servicePorts(ports, nil), Headless: headless}
		}
		return &xdspb.Service{Host: hostOf(n, true), Ports: servicePorts(s.Ports, nil)}
	}
	var out *xdspb.Service
	for _, n := range names {
		s := v.Set.Local.Services.Get(n)
		if out != nil && !s.Headless {
			continue // its own name is what a headless service's endpoint is best known by
		}
		p := v.ownPart(s)
		for _, e := range s.Endpoints {
			if ports := servicePorts(s.Ports, e); e.Address == addr && len(ports) > 0 && e.Network == viewer.Network && v.callable(viewer, &p, s.Ports, e) {
				out = &xdspb.Service{Host: hostOf(n, true), Ports: ports, Headless: s.Headless, Endpoint: e.ID}
				break
			}
		}
		if out != nil && s.Headless {
			break
		}
	}
	return out
}

// servicePorts are the TCP ports, lowest first; of an endpoint, those that it serves.
func servicePorts(ports []discovery.Port, of *discovery.Endpoint) []*xdspb.ServicePort {
	var out []*xdspb.ServicePort
	for _, p := range sortedPorts(ports) {
		sp := &xdspb.ServicePort{Port: uint32(p.Number), Name: p.Name, Protocol: string(p.Protocol)}
		if of != nil {
			if sp.Target = uint32(of.Ports[p.Name]); sp.Target == 0 {
				continue
			}
		}
		out = append(out, sp)
	}
	return out
}

// serviceEndpoints lists whom a headless service leads to, by cluster and ID.
func (v *View) serviceEndpoints(viewer *Viewer, parts []part) []*xdspb.ServiceEndpoint {
	var out []*xdspb.ServiceEndpoint
	for i := range parts {
		p := &parts[i]
		if p.state() == discovery.Withdrawn {
			continue
		}
		for _, e := range p.endpoints {
			if !e.Ready || e.Draining || !v.callable(viewer, p, p.ports, e) {
				continue
			}
			targets := make(map[string]uint32)
			for _, port := range sortedPorts(p.ports) {
				if t := e.Ports[port.Name]; t != 0 {
					targets[port.Name] = uint32(t)
				}
			}
			out = append(out, &xdspb.ServiceEndpoint{
				Id: e.ID, Hostname: e.Hostname, Cluster: p.cluster, Address: e.Address.String(), Flat: e.Network == viewer.Network, Targets: targets,
			})
		}
	}
	slices.SortFunc(out, func(a, b *xdspb.ServiceEndpoint) int {
		return cmp.Or(cmp.Compare(a.Cluster, b.Cluster), cmp.Compare(a.Id, b.Id))
	})
	return out[:min(len(out), maxServiceEndpoints)]
}

// maxServiceEndpoints bounds what a headless service's resource lists; a DNS answer holds far fewer.
const maxServiceEndpoints = 4096

// callable reports whether a viewer can call an endpoint on any of those ports.
func (v *View) callable(viewer *Viewer, p *part, ports []discovery.Port, e *discovery.Endpoint) bool {
	at := *p
	return slices.ContainsFunc(ports, func(port discovery.Port) bool {
		at.portName = port.Name
		_, reason := v.ranked(viewer, &at, e)
		return port.Carried() && reason == ""
	})
}

// hostOf is authorityOf without the port.
func hostOf(n discovery.Name, local bool) string {
	if local {
		return n.Name + "." + n.Namespace + "." + discovery.ClusterDomain
	}
	return n.Host()
}

// standIns notes the addresses that stand for a service of the clusterset which changed, or for another than before.
func (v *View) standIns(imports map[discovery.Name]struct{}, old map[netip.Addr]discovery.Name, touch func(netip.Addr)) {
	for n := range imports {
		if s := v.Set.Local.Services.Get(n); s != nil {
			for _, a := range s.ClusterIPs {
				touch(a)
			}
		}
	}
	for a, n := range v.Set.Local.ClustersetIPs {
		_, moved := imports[n]
		if was, had := old[a]; moved || !had || was != n {
			touch(a)
		}
	}
	for a := range old {
		if _, has := v.Set.Local.ClustersetIPs[a]; !has {
			touch(a)
		}
	}
}
