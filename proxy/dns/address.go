package dns

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/hanse-mesh/hanse/proxy"
)

// Control is what is asked of the control plane's client.
type Control interface {
	// Service returns what a host name stands for; proxy.ErrUnknown where nothing is there.
	Service(ctx context.Context, host string) (*proxy.Service, error)
	proxy.Addresses
}

// Addresses finds services by the addresses that a Pool has handed out, and by their ClusterIPs.
type Addresses struct {
	Pool    *Pool
	Control Control
}

// ServiceAt implements proxy.Addresses. An address of the Pool's that stands for nothing any more is an error, but not
// proxy.ErrUnknown: nothing else can have it.
func (a Addresses) ServiceAt(ctx context.Context, address netip.Addr) (*proxy.Service, error) {
	k, known, ours := a.Pool.At(address)
	switch {
	case !known && ours:
		return nil, fmt.Errorf("address %s is not in use: look the name up again", address)
	case !known:
		return a.Control.ServiceAt(ctx, address)
	}
	svc, err := a.Control.Service(ctx, k.host)
	unknown := errors.Is(err, proxy.ErrUnknown)
	switch {
	case unknown && ours: // the error as it is would mean that the address is none of the mesh's
		return nil, fmt.Errorf("address %s was %s, which is gone", address, k.host)
	case err != nil && !unknown || err == nil && k.endpoint == "":
		return svc, err
	}
	out := &proxy.Service{Host: k.host, Headless: true, Endpoint: k.endpoint}
	if err == nil {
		out.Ports = svc.Ports
		for i := range svc.Endpoints {
			if e := &svc.Endpoints[i]; e.ID == k.endpoint {
				out.Ports = make([]proxy.ServicePort, len(svc.Ports))
				for j, p := range svc.Ports {
					p.Target = e.Targets[p.Name]
					out.Ports[j] = p
				}
				return out, nil
			}
		}
	}
	if !ours { // who had it is gone, and somebody else may have it now
		return a.Control.ServiceAt(ctx, address)
	}
	return out, nil
}
