package xdsclient

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"net/netip"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/hanse-mesh/hanse/discovery/xdspb"
	"github.com/hanse-mesh/hanse/proxy"
)

func decodeService(m *xdspb.Service) (any, error) {
	if m.Host == "" || len(m.Host) > maxName || len(m.Endpoint) > maxName {
		return nil, fmt.Errorf("host: %q is empty or too long, or endpoint is", shorten(m.Host))
	}
	if err := errors.Join(bounded("ports", len(m.Ports), maxPorts), bounded("endpoints", len(m.Endpoints), maxHosts)); err != nil {
		return nil, err
	}
	s := &proxy.Service{Host: m.Host, Headless: m.Headless, Endpoint: m.Endpoint}
	for i, p := range m.Ports {
		switch {
		case p.Port == 0 || p.Port > math.MaxUint16:
			return nil, fmt.Errorf("ports[%d].port: %d is no port", i, p.Port)
		case p.Target > math.MaxUint16:
			return nil, fmt.Errorf("ports[%d].target: %d is no port", i, p.Target)
		case len(p.Name) > maxName:
			return nil, fmt.Errorf("ports[%d].name: %q is too long", i, shorten(p.Name))
		}
		protocol := proxy.Protocol(p.Protocol)
		switch protocol {
		case proxy.HTTP, proxy.HTTP2, proxy.GRPC, proxy.TCP:
		default:
			return nil, fmt.Errorf("ports[%d].protocol: %q is not known", i, shorten(p.Protocol))
		}
		s.Ports = append(s.Ports, proxy.ServicePort{Number: uint16(p.Port), Name: p.Name, Protocol: protocol, Target: uint16(p.Target)})
	}
	for i, e := range m.Endpoints {
		out := proxy.ServiceEndpoint{ID: e.Id, Hostname: e.Hostname, Cluster: e.Cluster, Flat: e.Flat, Targets: map[string]uint16{}}
		var err error
		if out.Address, err = netip.ParseAddr(e.Address); err != nil {
			return nil, fmt.Errorf("endpoints[%d].address: %q is no IP address", i, shorten(e.Address))
		}
		if e.Id == "" || max(len(e.Id), len(e.Hostname), len(e.Cluster)) > maxName {
			return nil, fmt.Errorf("endpoints[%d]: id is empty, or id, hostname or cluster is too long", i)
		}
		if err := bounded(fmt.Sprintf("endpoints[%d].targets", i), len(e.Targets), maxPorts); err != nil {
			return nil, err
		}
		for name, target := range e.Targets {
			if target == 0 || target > math.MaxUint16 {
				return nil, fmt.Errorf("endpoints[%d].targets[%s]: %d is no port", i, shorten(name), target)
			}
			out.Targets[name] = uint16(target)
		}
		s.Endpoints = append(s.Endpoints, out)
	}
	return s, nil
}

func decodeTrust(m *xdspb.Trust) (any, error) {
	if err := bounded("sequences", len(m.Sequences), maxDomains); err != nil {
		return nil, err
	}
	if err := bounded("authorities", len(m.Authorities), maxDomains); err != nil {
		return nil, err
	}
	for td, d := range m.Authorities {
		if err := bounded("authorities."+shorten(td), len(d), maxDigest); err != nil {
			return nil, err
		}
	}
	return Trust{Sequences: maps.Clone(m.Sequences), Authorities: maps.Clone(m.Authorities)}, nil
}

func decodeFaults(m *xdspb.Faults) (any, error) {
	if err := bounded("faults", len(m.Faults), maxFaults); err != nil {
		return nil, err
	}
	out := make([]proxy.Fault, len(m.Faults))
	for i, f := range m.Faults {
		var err error
		if out[i], err = decodeFault(f); err != nil {
			return nil, fmt.Errorf("faults[%d].%w", i, err)
		}
	}
	return out, nil
}

func decodeFault(m *xdspb.Fault) (f proxy.Fault, err error) {
	if err := only(m, "drill", "mode", "share", "latency", "status", "ports", "end", "lease", "report", "renewal", "root"); err != nil {
		return f, err
	}
	f = proxy.Fault{Drill: shorten(m.Drill), Mode: proxy.FaultMode(m.Mode), Share: m.Share, Status: int(m.Status), Renewal: m.Renewal}
	switch f.Mode {
	case proxy.FaultErrors:
		if f.Status < 200 || f.Status > 599 {
			return f, fmt.Errorf("status is %d", f.Status)
		}
	case proxy.FaultDistrust:
		f.Root = m.Root
		td, _, _ := strings.Cut(m.Root, "/")
		if _, err := spiffeid.TrustDomainFromString(td); err != nil || len(m.Root) > 512 {
			return f, fmt.Errorf("root is %q", shorten(m.Root))
		}
	case proxy.FaultDrain, proxy.FaultBlackhole, proxy.FaultSlow, proxy.FaultObserve, proxy.FaultExpire:
	default:
		return f, fmt.Errorf("mode %q is not known", shorten(m.Mode))
	}
	if f.Share > 100 || f.Share == 0 && f.Mode != proxy.FaultObserve {
		return f, fmt.Errorf("share is %d", f.Share)
	}
	if err := bounded("ports", len(m.Ports), maxPorts); err != nil {
		return f, err
	}
	for _, p := range m.Ports {
		if p == 0 || p > math.MaxUint16 {
			return f, fmt.Errorf("ports: %d", p)
		}
		f.Ports = append(f.Ports, uint16(p))
	}
	for _, d := range []struct {
		field string
		from  *durationpb.Duration
		to    *time.Duration
	}{{"latency", m.Latency, &f.Latency}, {"end", m.End, &f.End}, {"lease", m.Lease, &f.Lease}, {"report", m.Report, &f.Report}} {
		if *d.to, err = duration(d.from); err != nil {
			return f, fmt.Errorf("%s: %w", d.field, err)
		}
	}
	return f, nil
}
