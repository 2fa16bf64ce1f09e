package dns

import (
	"context"
	"errors"
	"math/rand/v2"
	"net/netip"

	"github.com/miekg/dns"

	"github.com/hanse-mesh/hanse/proxy"
)

// Seconds for which an answer may be kept.
const (
	ttlService  = 30 // its address stays
	ttlEndpoint = 5
	ttlNegative = 5
	ttlVersion  = 28_800
)

// schema is the version of the multicluster DNS specification that is answered by (§2.2).
const schema = "1.0.0"

// maxRecords bounds the addresses in one answer; of more, some are drawn.
const maxRecords = 256

// answer is what is said about a name of the mesh.
type answer struct {
	code    int
	records []dns.RR
	extra   []dns.RR
	soa     string // owner of the SOA that goes with an answer without records
}

var (
	noName = answer{code: dns.RcodeNameError, soa: zone}
	noData = answer{soa: zone}
	failed = answer{code: dns.RcodeServerFailure}
)

// errForeign says that a short name is none of the mesh's.
var errForeign = errors.New("not of the mesh")

// mesh answers a question about the mesh. name is as the application wrote it.
func (s *Server) mesh(ctx context.Context, q question, name string, qtype uint16) (answer, error) {
	switch {
	case q.kind == nothing:
		return noName, nil
	case q.kind == between && qtype == dns.TypeSOA && dns.CanonicalName(name) == zone:
		return answer{records: []dns.RR{soa(zone)}}, nil
	case q.kind == version && (qtype == dns.TypeTXT || qtype == dns.TypeANY):
		return answer{records: []dns.RR{&dns.TXT{Hdr: dns.RR_Header{Name: name, Rrtype: dns.TypeTXT, Class: dns.ClassINET, Ttl: ttlVersion}, Txt: []string{schema}}}}, nil
	case q.kind == between || q.kind == version:
		return noData, nil
	}
	svc, err := s.cfg.Control.Service(ctx, q.host)
	switch {
	case errors.Is(err, proxy.ErrUnknown) && q.short:
		return answer{}, errForeign
	case errors.Is(err, proxy.ErrUnknown):
		return noName, nil
	case err != nil && q.short:
		return answer{}, errForeign // "example.com" must not wait for a control plane
	case err != nil:
		s.log.Debug("a name of the mesh cannot be answered", "name", name, "error", err)
		return failed, nil
	}
	switch q.kind {
	case protocol:
		return noData, nil
	case cluster:
		for i := range svc.Endpoints {
			if svc.Endpoints[i].Cluster == q.cluster {
				return noData, nil
			}
		}
		return noName, nil
	case servicePort:
		return s.ports(svc, q, name, qtype), nil
	}
	var addresses []netip.Addr
	ttl := uint32(ttlEndpoint)
	switch {
	case q.kind == endpoint:
		found := false
		for i := range svc.Endpoints {
			if e := &svc.Endpoints[i]; e.Cluster == q.cluster && hostname(e) == q.hostname {
				found = true
				addresses = append(addresses, s.endpointAddresses(svc, e)...)
			}
		}
		if !found {
			return noName, nil
		}
	case svc.Headless && s.cfg.Fixed[svc.Host] == nil && len(svc.Endpoints) == 0 && !q.short:
		return noName, nil // multicluster DNS §2.4.1
	case svc.Headless && s.cfg.Fixed[svc.Host] == nil:
		for _, i := range drawn(len(svc.Endpoints)) {
			addresses = append(addresses, s.endpointAddresses(svc, &svc.Endpoints[i])...)
		}
	default:
		ttl = ttlService
		addresses = s.serviceAddresses(svc)
	}
	out := answer{soa: zone}
	if q.short {
		out.soa = name
	}
	out.records = records(name, qtype, ttl, addresses)
	return out, nil
}

// ports answers _http._tcp.payments.shop.svc.clusterset.local.
func (s *Server) ports(svc *proxy.Service, q question, name string, qtype uint16) answer {
	var port *proxy.ServicePort
	for i := range svc.Ports {
		if svc.Ports[i].Name == q.port {
			port = &svc.Ports[i]
		}
	}
	if port == nil || q.port == "" {
		return noName
	}
	if qtype != dns.TypeSRV && qtype != dns.TypeANY {
		return noData
	}
	out := answer{soa: zone}
	add := func(target string, number uint16, ttl uint32, addresses []netip.Addr) {
		out.records = append(out.records, &dns.SRV{
			Hdr: dns.RR_Header{Name: name, Rrtype: dns.TypeSRV, Class: dns.ClassINET, Ttl: ttl}, Weight: 100, Port: number, Target: target,
		})
		out.extra = append(out.extra, records(target, dns.TypeANY, ttl, addresses)...)
	}
	if !svc.Headless {
		add(svc.Host+".", port.Number, ttlService, s.serviceAddresses(svc))
		return out
	}
	for _, i := range drawn(len(svc.Endpoints)) {
		e := &svc.Endpoints[i]
		if target := e.Targets[port.Name]; target != 0 {
			add(hostname(e)+"."+e.Cluster+"."+svc.Host+".", target, ttlEndpoint, s.endpointAddresses(svc, e))
		}
	}
	return out
}

// drawn are the indices of at most maxRecords of n, in random order.
func drawn(n int) []int {
	p := rand.Perm(n)
	return p[:min(n, maxRecords)]
}

// serviceAddresses are none where the sidecar has no way to take a connection to them.
func (s *Server) serviceAddresses(svc *proxy.Service) []netip.Addr {
	if a, ok := s.cfg.Fixed[svc.Host]; ok {
		return a
	}
	return s.assigned(key{host: svc.Host})
}

func (s *Server) endpointAddresses(svc *proxy.Service, e *proxy.ServiceEndpoint) []netip.Addr {
	k := key{svc.Host, e.ID}
	if e.Flat {
		s.cfg.Pool.Note(e.Address.Unmap(), k)
		return []netip.Addr{e.Address.Unmap()}
	}
	return s.assigned(k)
}

func (s *Server) assigned(k key) []netip.Addr {
	if s.cfg.NoAssign {
		return nil
	}
	v4, v6 := s.cfg.Pool.Assign(k)
	if v6.IsValid() && s.reaches6() {
		return []netip.Addr{v4, v6}
	}
	return []netip.Addr{v4}
}

// records are those of the type that was asked for; TypeANY is both.
func records(name string, qtype uint16, ttl uint32, addresses []netip.Addr) (out []dns.RR) {
	for _, a := range addresses {
		h := dns.RR_Header{Name: name, Class: dns.ClassINET, Ttl: ttl}
		switch {
		case a.Is4() && (qtype == dns.TypeA || qtype == dns.TypeANY):
			h.Rrtype = dns.TypeA
			out = append(out, &dns.A{Hdr: h, A: a.AsSlice()})
		case a.Is6() && (qtype == dns.TypeAAAA || qtype == dns.TypeANY):
			h.Rrtype = dns.TypeAAAA
			out = append(out, &dns.AAAA{Hdr: h, AAAA: a.AsSlice()})
		}
	}
	return out
}

// reversed answers a question for the name of one of the Pool's addresses.
func (s *Server) reversed(address netip.Addr, name string, qtype uint16) answer {
	k, known, _ := s.cfg.Pool.At(address)
	switch {
	case !known:
		return answer{code: dns.RcodeNameError, soa: name}
	case qtype != dns.TypePTR && qtype != dns.TypeANY:
		return answer{soa: name}
	}
	return answer{records: []dns.RR{&dns.PTR{Hdr: dns.RR_Header{Name: name, Rrtype: dns.TypePTR, Class: dns.ClassINET, Ttl: ttlEndpoint}, Ptr: k.host + "."}}}
}

// soa says for how long absence may be remembered (RFC 2308).
func soa(owner string) dns.RR {
	return &dns.SOA{
		Hdr: dns.RR_Header{Name: owner, Rrtype: dns.TypeSOA, Class: dns.ClassINET, Ttl: ttlNegative},
		Ns:  "ns.dns." + zone, Mbox: "hostmaster." + zone, Serial: 1, Refresh: 7200, Retry: 1800, Expire: 86400, Minttl: ttlNegative,
	}
}
