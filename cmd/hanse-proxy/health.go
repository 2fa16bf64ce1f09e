package main

import "github.com/hanse-mesh/hanse/proxy/probe"

// Health answers who has no identity, the kubelet above all: on /readyz for the sidecar or gateway, and on the paths of checks for the application, which the sidecar then asks. Everything else of
// the application stays behind mutual TLS.
type Health struct {
	Listen string                 `json:"listen"` // ip:port or :port; default: none
	Checks map[string]probe.Check `json:"checks"` // by path

	node string // address of the pod's node, by the environment
}

func (c *Config) validateHealth(bad report) {
	h := &c.Health
	if h.Listen == "" {
		if len(h.Checks) > 0 {
			bad("health.listen", "missing: say where the checks are answered, such as :15021")
		}
		return
	}
	hostPort(bad, "health.listen", h.Listen)
	if c.Role == roleSidecar && len(c.Workloads) == 0 {
		bad("health", "there is no workload whose health could be told")
	}
	if c.Role == roleGateway && len(h.Checks) > 0 {
		bad("health.checks", "a gateway stands before no application")
	}
	probe.Validate(h.Checks, "health.checks", bad)
}
