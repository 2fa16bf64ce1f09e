package proxy

import (
	"context"
	"errors"
	"net/netip"
)

// Service is a service of the mesh as found by an address that its callers use.
type Service struct {
	Host     string // "payments.shop.svc.clusterset.local"
	Ports    []ServicePort
	Headless bool
	Endpoint string // the host name of one endpoint, where the address names just one; else ""
}

// ServicePort is one declared port of a Service.
type ServicePort struct {
	Number   uint16
	Name     string
	Protocol Protocol
}

// Port is the declared port of that number, or nil.
func (s *Service) Port(number uint16) *ServicePort {
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
