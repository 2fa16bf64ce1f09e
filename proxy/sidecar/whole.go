package sidecar

import (
	"maps"
	"slices"

	"github.com/hanse-mesh/hanse/proxy"
)

// whole names no ports in a fault that hits all ports of this workload: such a fault is the workload's, and a black hole then acts below
// the hop, so that callers notice by their unanswered PINGs as they would if the machine were gone.
func (s *Sidecar) whole(faults []proxy.Fault) []proxy.Fault {
	out := slices.Clone(faults)
	ports := s.ports()
	for i := range out {
		all := len(ports) > 0
		for _, port := range ports {
			all = all && slices.Contains(out[i].Ports, port)
		}
		if all {
			out[i].Ports = nil
		}
	}
	return out
}

// ports are those that the workload serves.
func (s *Sidecar) ports() (out []uint16) {
	if in := s.cfg.Control.Table().Inbound; s.cfg.AnyPort && in != nil {
		for i := range in.Ports {
			out = append(out, in.Ports[i].Port)
		}
		return out
	}
	return slices.Collect(maps.Keys(s.cfg.Apps))
}
