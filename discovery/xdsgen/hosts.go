package xdsgen

import (
	"bytes"
	"cmp"
	"net/netip"
	"slices"

	"github.com/hanse-mesh/hanse/discovery"
)

// hosts lists the own services by the addresses of their endpoints and their own: 24 bytes for each of what may be a million. Split by address,
// sorted, and never changed in place, so that the next View copies little of it.
type hosts [512][]host

// host is one address of one service.
type host struct {
	addr    [16]byte // IPv4 and the same in IPv6 are not told apart: who asks looks at the service
	service *discovery.Name
}

func (h host) compare(o host) int {
	return cmp.Or(bytes.Compare(h.addr[:], o.addr[:]), h.service.Compare(*o.service))
}

func shard(a [16]byte) int { return int(a[15])<<1&511 ^ int(a[14])&1 }

// at returns the services that may have an address, sorted.
func (h *hosts) at(a netip.Addr) []discovery.Name {
	of := host{addr: a.As16()}
	all := h[shard(of.addr)]
	i, _ := slices.BinarySearchFunc(all, of, func(h, of host) int { return bytes.Compare(h.addr[:], of.addr[:]) })
	var out []discovery.Name
	for ; i < len(all) && all[i].addr == of.addr; i++ {
		out = append(out, *all[i].service)
	}
	return out
}

// put adds one, in no order.
func (h *hosts) put(a netip.Addr, service *discovery.Name) {
	o := host{a.As16(), service}
	i := shard(o.addr)
	h[i] = append(h[i], o)
}

// edit adds and removes others, which it sorts. None that is added is there, and all that are removed are.
func (h *hosts) edit(add, remove *hosts) {
	for i := range h {
		more, less := add[i], remove[i]
		if len(more)+len(less) == 0 {
			continue
		}
		slices.SortFunc(more, host.compare)
		slices.SortFunc(less, host.compare)
		next := make([]host, 0, len(h[i])+len(more)-len(less))
		for _, o := range h[i] {
			if len(less) > 0 && o.compare(less[0]) == 0 {
				less = less[1:]
				continue
			}
			for len(more) > 0 && more[0].compare(o) < 0 {
				next, more = append(next, more[0]), more[1:]
			}
			next = append(next, o)
		}
		h[i], add[i] = append(next, more...), nil
	}
}

// indexHosts brings hosts up to date for the services that moved, and tells of the addresses concerned.
func (v *View) indexHosts(old discovery.ByName[*discovery.Service], moved []discovery.Name, touch func(netip.Addr)) {
	var add, remove hosts
	for _, n := range moved {
		before, after := addresses(old.Get(n)), addresses(v.Set.Local.Services.Get(n))
		for len(before)+len(after) > 0 {
			switch c := compareFirst(before, after); {
			case c < 0:
				touch(before[0])
				remove.put(before[0], &n)
				before = before[1:]
			case c > 0:
				touch(after[0])
				add.put(after[0], &n)
				after = after[1:]
			default:
				touch(before[0])
				before, after = before[1:], after[1:]
			}
		}
	}
	v.hosts.edit(&add, &remove)
}

// compareFirst compares the first of two sorted lists, of which one may be at its end.
func compareFirst(a, b []netip.Addr) int {
	switch {
	case len(a) == 0:
		return 1
	case len(b) == 0:
		return -1
	}
	return a[0].Compare(b[0])
}

// addresses returns those of a service and of its endpoints, each once, sorted.
func addresses(s *discovery.Service) []netip.Addr {
	if s == nil {
		return nil
	}
	out := make([]netip.Addr, 0, len(s.Endpoints)+len(s.ClusterIPs))
	out = append(out, s.ClusterIPs...)
	for _, e := range s.Endpoints {
		out = append(out, e.Address)
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out)
}
