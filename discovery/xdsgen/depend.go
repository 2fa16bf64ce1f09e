package xdsgen

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/hanse-mesh/hanse/discovery"
)

// Dependencies are the names of the Clusters, and ClusterLoadAssignments, that an outbound Listener refers to, sorted.
func (v *View) Dependencies(viewer *Viewer, listener string) []string {
	c, err := v.lookup(listener)
	if err != nil {
		return nil
	}
	var out []string
	for _, r := range v.routing(viewer, c).Rules {
		for _, t := range r.Targets {
			switch {
			case t.Weight == 0 || r.Filters.Redirect != nil:
			case t.Invalid == "":
				out = append(out, t.Authority)
			case viewer.Kind == GRPC:
				out = append(out, InvalidCluster)
			}
		}
		if m := r.Filters.Mirror; m != nil && m.Invalid == "" {
			out = append(out, authorityOf(m.Service, m.Port, false))
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// Subject says what part of a View a resource is made from, so that Changes tell whether it may differ. For an inbound
// listener, or what is at an address, that is the address, otherwise the service; both are zero for names that no View has.
func Subject(name string) (service discovery.Name, host netip.Addr) {
	for _, prefix := range [...]string{InboundPrefix, AddressPrefix} {
		if ip, ok := strings.CutPrefix(name, prefix); ok {
			host, _ = netip.ParseAddr(ip)
			return service, host
		}
	}
	if at, ok := strings.CutPrefix(name, GRPCServerPrefix); ok {
		ap, _ := netip.ParseAddrPort(at)
		return service, ap.Addr()
	}
	service, _, _, _ = discovery.ParseAuthority(name)
	return service, host
}

// Touches reports whether a resource with that Subject may differ.
func (c *Changes) Touches(service discovery.Name, host netip.Addr) bool {
	if c.All {
		return true
	}
	if host.IsValid() {
		_, moved := c.Hosts[host]
		return moved || c.Access || host.IsUnspecified()
	}
	_, ok := c.Services[service]
	return ok
}

// Nothing reports whether no resource can differ.
func (c *Changes) Nothing() bool {
	return !c.All && !c.Access && len(c.Services) == 0 && len(c.Hosts) == 0
}
