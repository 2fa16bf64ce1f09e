package xdsclient

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"strings"

	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"

	"github.com/hanse-mesh/hanse/discovery/xdspb"
	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/proxy"
)

func decodeInbound(ip string, m *listenerv3.Listener) (*proxy.Inbound, error) {
	addr, err := netip.ParseAddr(ip)
	if err != nil {
		return nil, fmt.Errorf("name: %w", err)
	}
	in := &proxy.Inbound{Address: addr}
	if err := bounded("filter_chains", len(m.FilterChains), maxPorts); err != nil {
		return nil, err
	}
	seen := map[uint16]bool{}
	for i, fc := range m.FilterChains {
		p, err := decodePort(fc)
		if err != nil {
			return nil, fmt.Errorf("filter_chains[%d].%w", i, err)
		}
		if seen[p.Port] {
			return nil, fmt.Errorf("filter_chains[%d].filter_chain_match.destination_port %d is there twice", i, p.Port)
		}
		seen[p.Port] = true
		in.Ports = append(in.Ports, *p)
	}
	return in, nil
}

func decodePort(m *listenerv3.FilterChain) (*proxy.InboundPort, error) {
	match := m.GetFilterChainMatch()
	if match == nil {
		return nil, errors.New("filter_chain_match is missing")
	}
	if err := only(match, "destination_port"); err != nil {
		return nil, fmt.Errorf("filter_chain_match: %w", err)
	}
	port := match.GetDestinationPort().GetValue()
	if port == 0 || port > math.MaxUint16 {
		return nil, fmt.Errorf("filter_chain_match.destination_port is %d", port)
	}
	var md xdspb.InboundMeta
	found, err := meta(m.Metadata, &md)
	if err != nil {
		return nil, err
	}
	if !found {
		return nil, errors.New("metadata: no access rules")
	}
	if err := only(&md, "services", "protocol", "trust_domain", "default_allow", "deny", "allow", "audit_deny", "audit_allow"); err != nil {
		return nil, fmt.Errorf("metadata: %w", err)
	}
	p := &proxy.InboundPort{Port: uint16(port), Services: md.Services}
	if p.Protocol, err = decodeProtocol(md.Protocol); err != nil {
		return nil, fmt.Errorf("metadata.protocol: %w", err)
	}
	if md.TrustDomain == "" {
		return nil, errors.New("metadata.trust_domain is missing")
	}
	p.Access = proxy.Access{TrustDomain: md.TrustDomain, DefaultAllow: md.DefaultAllow}
	for _, part := range []struct {
		field string
		from  []*xdspb.AccessRule
		to    *[]proxy.AccessRule
	}{
		{"deny", md.Deny, &p.Access.Deny}, {"allow", md.Allow, &p.Access.Allow},
		{"audit_deny", md.AuditDeny, &p.Access.AuditDeny}, {"audit_allow", md.AuditAllow, &p.Access.AuditAllow},
	} {
		if err := bounded("metadata."+part.field, len(part.from), maxRules); err != nil {
			return nil, err
		}
		for i, r := range part.from {
			rule, err := decodeRule(r)
			if err != nil {
				return nil, fmt.Errorf("metadata.%s[%d].%w", part.field, i, err)
			}
			*part.to = append(*part.to, rule)
		}
	}
	return p, nil
}

func decodeRule(m *xdspb.AccessRule) (out proxy.AccessRule, err error) {
	if err := only(m, "policy", "from", "foreign", "methods", "paths"); err != nil {
		return out, err
	}
	if max(len(m.From), len(m.Methods), len(m.Paths)) > maxPatterns {
		return out, fmt.Errorf("from, methods or paths: more than %d", maxPatterns)
	}
	for i, p := range m.From {
		if err := identity.ValidatePattern(p); err != nil {
			return out, fmt.Errorf("from[%d]: %w", i, err)
		}
	}
	for i, p := range m.Paths {
		if !strings.HasPrefix(p, "/") && p != "*" || strings.Contains(strings.TrimSuffix(p, "*"), "*") {
			return out, fmt.Errorf("paths[%d]: %q begins with / and may end in *", i, shorten(p))
		}
	}
	for i, method := range m.Methods {
		if !fieldName(method) {
			return out, fmt.Errorf("methods[%d]: %q is no method", i, shorten(method))
		}
	}
	return proxy.AccessRule{Policy: shorten(m.Policy), From: m.From, Foreign: m.Foreign, Methods: m.Methods, Paths: m.Paths}, nil
}
