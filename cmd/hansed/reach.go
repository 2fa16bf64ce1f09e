package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/hanse-mesh/hanse/discovery/kube"
)

const (
	reachEvery   = 10 * time.Second // between looks
	reachSoon    = time.Second      // while something is not known
	reachTimeout = 5 * time.Second
	maxReach     = 32 // addresses of one kind: the protocol's bound of a member's record is above
)

// reach is by which addresses other clusters get here, where that is not fixed: names, and what Services of Kubernetes are given.
type reach struct {
	gateways   []string                                                              // host:port as configured
	gateway    string                                                                // namespace/name of a Service, or ""
	federation string                                                                // likewise
	lookup     func(ctx context.Context, network, host string) ([]netip.Addr, error) // of names
	exposed    func(ctx context.Context, service, port string) ([]string, error)     // by which host:port a Service is reached from outside
}

func newReach(cfg *Config, source *kube.Source) *reach {
	r := &reach{gateways: cfg.Gateways, gateway: cfg.KubeAPI.GatewayService, federation: cfg.KubeAPI.FederationService, lookup: net.DefaultResolver.LookupNetIP}
	if source != nil {
		r.exposed = source.Exposed
	}
	return r
}

// fixed says that there is nothing to follow.
func (r *reach) fixed() bool {
	return r.gateway == "" && r.federation == "" && !slices.ContainsFunc(r.gateways, func(g string) bool {
		_, err := netip.ParseAddrPort(g)
		return err != nil
	})
}

// addresses of the gateways now: every one that every name has. What cannot be told now stays as it was last, which the caller remembers by known.
func (r *reach) addresses(ctx context.Context, known map[string][]netip.AddrPort) ([]netip.AddrPort, error) {
	ctx, cancel := context.WithTimeout(ctx, reachTimeout)
	defer cancel()
	all := r.gateways
	var faults []error
	if r.gateway != "" {
		exposed, err := r.exposed(ctx, r.gateway, "mesh")
		if err != nil {
			return nil, err
		}
		all = slices.Concat(all, exposed)
	}
	var out []netip.AddrPort
	for _, g := range all {
		host, port, err := net.SplitHostPort(g)
		if err != nil {
			faults = append(faults, fmt.Errorf("gateway %q: %w", g, err))
			continue
		}
		if a, err := netip.ParseAddrPort(g); err == nil {
			out = append(out, a)
			continue
		}
		ips, err := r.lookup(ctx, "ip", host)
		if err != nil {
			faults = append(faults, fmt.Errorf("gateway %s: %w", g, err))
			out = append(out, known[g]...)
			continue
		}
		known[g] = nil
		for _, ip := range ips {
			if a, err := netip.ParseAddrPort(net.JoinHostPort(ip.Unmap().String(), port)); err == nil {
				known[g] = append(known[g], a)
			}
		}
		out = append(out, known[g]...)
	}
	slices.SortFunc(out, func(a, b netip.AddrPort) int {
		return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Port(), b.Port()))
	})
	out = slices.Compact(out)
	return out[:min(len(out), maxReach)], errors.Join(faults...)
}

// followReach tells the mesh where this cluster is reached, until ctx ends. Names and Services that cannot be asked leave what is known in force.
func (p *controlPlane) followReach(ctx context.Context) error {
	if p.reach.fixed() {
		return nil
	}
	known := map[string][]netip.AddrPort{}
	var gateways []netip.AddrPort
	var federation []string
	var said string
	for {
		wait := reachEvery
		next, err := p.reach.addresses(ctx, known)
		if (err == nil || len(next) > 0) && !slices.Equal(next, gateways) {
			gateways = next
			p.log.Info("gateways of this cluster", "addresses", gateways)
			p.mesh.SetGateways(gateways)
			p.catalog.gateways.Store(&next)
			p.catalog.kick()
		}
		if p.reach.federation != "" {
			asked, cancel := context.WithTimeout(ctx, reachTimeout)
			at, ferr := p.reach.exposed(asked, p.reach.federation, "federation")
			cancel()
			if ferr == nil && len(at) > 0 && !slices.Equal(at, federation) {
				federation = at[:min(len(at), maxReach)]
				p.log.Info("federation addresses of this cluster", "addresses", federation)
				p.mesh.SetAddresses(federation)
			}
			err = errors.Join(err, ferr)
		}
		if len(gateways) == 0 || p.reach.federation != "" && len(federation) == 0 {
			wait = reachSoon
		}
		if text := fmt.Sprint(err); err != nil && ctx.Err() == nil && text != said {
			p.log.Warn("by which addresses others reach this cluster is not known whole; what was known stays", "err", strings.ReplaceAll(text, "\n", "; "))
			said = text
		} else if err == nil {
			said = ""
		}
		pause(ctx, wait)
		if ctx.Err() != nil {
			return nil
		}
	}
}
