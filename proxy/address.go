package proxy

import (
	"context"
	"errors"
	"net/netip"
)

// Service is a service of the mesh as found by name, or by an address that its callers use.
type Service struct {
	Host      string // "payments.shop.svc.clusterset.local"
	Ports     []ServicePort
	Headless  bool
	Endpoint  string            // the ID of one endpoint, where the address is just that one's; else ""
	Endpoints []ServiceEndpoint // found by name, of a headless service: those that can be called
}

// ServicePort is one declared port of a Service.
type ServicePort struct {
	Number   uint16
	Name     string
	Protocol Protocol
	Target   uint16 // the endpoint's own port, where Endpoint is set
}

// ServiceEndpoint is one endpoint of a headless Service.
type ServiceEndpoint struct {
	ID       string
	Hostname string // may be empty
	Cluster  string
	Address  netip.Addr
	Flat     bool              // Address is reachable from here
	Targets  map[string]uint16 // its own port by the service port's name
}

// Port is the declared port that a caller of that number means, or nil. At an endpoint's address that is the endpoint's own port
// first, as without a mesh.
func (s *Service) Port(number uint16) *ServicePort {
	if s.Endpoint != "" {
		for i := range s.Ports {
			if s.Ports[i].Target == number {
				return &s.Ports[i]
			}
		}
	}
	for i := range s.Ports {
		if s.Ports[i].Number == number {
			return &s.Ports[i]
		}
	}
	return nil
}

// Addresses finds services by address: those handed out by the sidecar's own DNS, and those that the control plane tells of.
type Addresses interface {
	// ServiceAt returns the service at an address, or ErrUnknown where none of the mesh has it. It is called for every captured
	// connection: what is known must be answered without waiting, and what is not, within ctx.
	ServiceAt(ctx context.Context, address netip.Addr) (*Service, error)
}

// ErrUnknown says that an address is no service's of the mesh.
var ErrUnknown = errors.New("no service of the mesh has this address")
