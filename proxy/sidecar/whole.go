package sidecar

import (
	"slices"

	"github.com/hanse-mesh/hanse/proxy"
)

// whole names no ports in a fault that hits all ports of this workload: such a fault is the workload's, and a black hole then acts below
// the hop, so that callers notice by their unanswered PINGs as they would if the machine were gone.
func (s *Sidecar) whole(faults []proxy.Fault) []proxy.Fault {
	out := slices.Clone(faults)
	for i := range out {
		all := len(s.apps) > 0
		for port := range s.apps {
			all = all && slices.Contains(out[i].Ports, port)
		}
		if all {
			out[i].Ports = nil
		}
	}
	return out
}
