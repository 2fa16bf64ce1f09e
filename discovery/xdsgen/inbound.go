package xdsgen

import (
	"cmp"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	httprbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcprbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/rbac/v3"
	tcpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/discovery/xdspb"
)

// served is one target port of a workload, and the service ports that lead to it.
type served struct {
	target   uint16
	hop      netip.AddrPort
	protocol discovery.AppProtocol
	by       []servicePort
}

type servicePort struct {
	service *discovery.Service
	port    uint16
}

// serves lists the target ports of the workload with that SPIFFE ID at addr, lowest first. An unspecified addr means every
// address of that ID: a server that listens on all.
func (v *View) serves(addr netip.Addr, spiffeID string, transport discovery.Transport) []*served {
	byTarget := make(map[uint16]*served)
	add := func(s *discovery.Service) {
		for _, e := range s.Endpoints {
			if e.SPIFFEID != spiffeID || e.Transport != transport || e.Address != addr && !addr.IsUnspecified() {
				continue
			}
			for _, p := range s.Ports {
				target := e.Ports[p.Name]
				if !p.Carried() || target == 0 {
					continue
				}
				t := byTarget[target]
				if t == nil {
					t = &served{target: target, hop: e.DialAddress(p.Name), protocol: p.Protocol}
					byTarget[target] = t
				}
				if sp := (servicePort{s, p.Number}); !slices.Contains(t.by, sp) {
					t.by = append(t.by, sp)
				}
			}
		}
	}
	if addr.IsUnspecified() {
		for _, s := range v.Set.Local.Services.All() {
			add(s)
		}
	} else {
		for _, n := range v.hosts.at(addr) {
			add(v.Set.Local.Services.Get(n))
		}
	}
	out := make([]*served, 0, len(byTarget))
	for _, t := range byTarget {
		slices.SortFunc(t.by, func(a, b servicePort) int {
			return cmp.Or(a.service.Name.Compare(b.service.Name), cmp.Compare(a.port, b.port))
		})
		out = append(out, t)
	}
	slices.SortFunc(out, func(a, b *served) int { return cmp.Compare(a.target, b.target) })
	return out
}

// Access says who may call one port of a service of this cluster; nil where there is no such port.
//
// Callers of the own trust domain are allowed until the first AccessPolicy in force selects the service, be it one that denies.
// Callers of another trust domain need a rule that names them, and the service
// must be exported. Where several services lead to one target port, the rules of all apply to it.
func (v *View) Access(service discovery.Name, port uint16) *xdspb.InboundMeta {
	s := v.Set.Local.Services.Get(service)
	if s == nil {
		return nil
	}
	p := portNumber(s.Ports, port)
	if p == nil {
		return nil
	}
	return v.inboundMeta(&served{protocol: p.Protocol, by: []servicePort{{s, port}}})
}

func (v *View) inboundMeta(t *served) *xdspb.InboundMeta {
	m := &xdspb.InboundMeta{Protocol: string(t.protocol), TrustDomain: v.Set.Local.Self.TrustDomain, DefaultAllow: true}
	for _, sp := range t.by {
		m.Services = append(m.Services, authorityOf(sp.service.Name, sp.port, false), authorityOf(sp.service.Name, sp.port, true))
	}
	for _, p := range v.Set.Local.Access {
		selected, exported := false, false
		for _, sp := range t.by {
			if selects(p, sp.service.Name) {
				selected = true
				exported = exported || sp.service.Export != nil
			}
		}
		if !selected {
			continue
		}
		if !p.Audit {
			m.DefaultAllow = false
		}
		for i := range p.Rules {
			r := &p.Rules[i]
			if len(r.Ports) > 0 && !slices.ContainsFunc(t.by, func(sp servicePort) bool {
				return selects(p, sp.service.Name) && slices.Contains(r.Ports, sp.port)
			}) {
				continue
			}
			rule := &xdspb.AccessRule{
				Policy: "AccessPolicy " + p.Name.String(), From: r.From, Methods: r.Methods, Paths: r.Paths,
				Foreign: p.Deny || exported && len(r.From) > 0,
			}
			switch {
			case p.Deny && p.Audit:
				m.AuditDeny = append(m.AuditDeny, rule)
			case p.Deny:
				m.Deny = append(m.Deny, rule)
			case p.Audit:
				m.AuditAllow = append(m.AuditAllow, rule)
			default:
				m.Allow = append(m.Allow, rule)
			}
		}
	}
	return m
}

func selects(p *discovery.AccessPolicy, n discovery.Name) bool {
	return p.Namespace == n.Namespace && (len(p.Services) == 0 || slices.Contains(p.Services, n))
}

// inboundListener is what a sidecar serves: one filter chain per declared target port of its own workload.
func (v *View) inboundListener(viewer *Viewer, name string, addr netip.Addr) (*listenerv3.Listener, error) {
	ports := v.serves(addr, viewer.SPIFFEID, discovery.Hop)
	if len(ports) == 0 || addr.IsUnspecified() {
		return nil, nil
	}
	l := &listenerv3.Listener{Name: name, Address: socketAddress(ports[0].hop)}
	for _, t := range ports {
		meta := v.inboundMeta(t)
		chain, err := v.filterChain(meta, t.protocol.IsHTTP(), fmt.Sprintf("%s:%d", addr, t.target))
		if err != nil {
			return nil, err
		}
		chain.FilterChainMatch = &listenerv3.FilterChainMatch{DestinationPort: wrapperspb.UInt32(uint32(t.target))}
		if chain.Metadata, err = metadata(meta); err != nil {
			return nil, err
		}
		l.FilterChains = append(l.FilterChains, chain)
	}
	return l, nil
}

// grpcServerListener is what an xDS-enabled gRPC server serves (gRFC A36): mutual TLS, and RBAC on what its services' policies say.
func (v *View) grpcServerListener(viewer *Viewer, name string, at netip.AddrPort) (*listenerv3.Listener, error) {
	ports := v.serves(at.Addr(), viewer.SPIFFEID, discovery.TLS)
	i := slices.IndexFunc(ports, func(t *served) bool { return t.target == at.Port() })
	if i < 0 {
		return nil, nil
	}
	chain, err := v.filterChain(v.inboundMeta(ports[i]), true, at.String())
	if err != nil {
		return nil, err
	}
	return &listenerv3.Listener{Name: name, Address: socketAddress(at), FilterChains: []*listenerv3.FilterChain{chain}}, nil
}

// filterChain requires a trusted client certificate and holds the access rules as RBAC: deny first, then allow.
func (v *View) filterChain(meta *xdspb.InboundMeta, http bool, name string) (*listenerv3.FilterChain, error) {
	tls, err := packed(&tlsv3.DownstreamTlsContext{
		RequireClientCertificate: wrapperspb.Bool(true),
		CommonTlsContext: &tlsv3.CommonTlsContext{
			TlsCertificateProviderInstance: certificateProvider(),
			ValidationContextType: &tlsv3.CommonTlsContext_ValidationContext{ValidationContext: &tlsv3.CertificateValidationContext{
				CaCertificateProviderInstance: certificateProvider(),
			}},
		},
	})
	if err != nil {
		return nil, err
	}
	chain := &listenerv3.FilterChain{
		Name:            name,
		TransportSocket: &corev3.TransportSocket{Name: tlsSocket, ConfigType: &corev3.TransportSocket_TypedConfig{TypedConfig: tls}},
	}
	deny := &rbacv3.RBAC{Action: rbacv3.RBAC_DENY, Policies: make(map[string]*rbacv3.Policy)}
	for i, r := range meta.Deny {
		deny.Policies[policyName(i, r)] = rbacPolicy(meta, r, http)
	}
	allow := &rbacv3.RBAC{Action: rbacv3.RBAC_ALLOW, Policies: make(map[string]*rbacv3.Policy)}
	for i, r := range meta.Allow {
		if http || len(r.Methods)+len(r.Paths) == 0 {
			allow.Policies[policyName(i, r)] = rbacPolicy(meta, r, http)
		}
	}
	if meta.DefaultAllow {
		allow.Policies["default"] = &rbacv3.Policy{
			Permissions: []*rbacv3.Permission{anyPermission()},
			Principals:  []*rbacv3.Principal{memberOf(meta.TrustDomain)},
		}
	}
	if http {
		chain.Filters, err = httpFilters(name, deny, allow)
	} else {
		chain.Filters, err = tcpFilters(name, deny, allow)
	}
	return chain, err
}

func httpFilters(name string, deny, allow *rbacv3.RBAC) ([]*listenerv3.Filter, error) {
	hcm := &hcmv3.HttpConnectionManager{
		StatPrefix: name,
		RouteSpecifier: &hcmv3.HttpConnectionManager_RouteConfig{RouteConfig: &routev3.RouteConfiguration{
			Name: name,
			VirtualHosts: []*routev3.VirtualHost{{Name: name, Domains: []string{"*"}, Routes: []*routev3.Route{{
				Match:  &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: "/"}},
				Action: &routev3.Route_NonForwardingAction{NonForwardingAction: &routev3.NonForwardingAction{}},
			}}}},
		}},
	}
	for _, f := range []struct {
		name string
		m    proto.Message
		skip bool
	}{
		{"hanse.deny", &httprbacv3.RBAC{Rules: deny}, len(deny.Policies) == 0},
		{"hanse.allow", &httprbacv3.RBAC{Rules: allow}, false},
		{"envoy.filters.http.router", &routerv3.Router{}, false},
	} {
		if f.skip {
			continue
		}
		filter, err := httpFilter(f.name, f.m)
		if err != nil {
			return nil, err
		}
		hcm.HttpFilters = append(hcm.HttpFilters, filter)
	}
	return networkFilters(namedFilter{"envoy.filters.network.http_connection_manager", hcm})
}

func tcpFilters(name string, deny, allow *rbacv3.RBAC) ([]*listenerv3.Filter, error) {
	var filters []namedFilter
	if len(deny.Policies) > 0 {
		filters = append(filters, namedFilter{"hanse.deny", &tcprbacv3.RBAC{Rules: deny, StatPrefix: name}})
	}
	return networkFilters(append(filters,
		namedFilter{"hanse.allow", &tcprbacv3.RBAC{Rules: allow, StatPrefix: name}},
		namedFilter{"envoy.filters.network.tcp_proxy", &tcpv3.TcpProxy{StatPrefix: name, ClusterSpecifier: &tcpv3.TcpProxy_Cluster{Cluster: name}}},
	)...)
}

type namedFilter struct {
	name string
	m    proto.Message
}

func networkFilters(filters ...namedFilter) ([]*listenerv3.Filter, error) {
	var out []*listenerv3.Filter
	for _, f := range filters {
		config, err := packed(f.m)
		if err != nil {
			return nil, err
		}
		out = append(out, &listenerv3.Filter{Name: f.name, ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: config}})
	}
	return out, nil
}

// policyName is unique and sorts in the order of the rules.
func policyName(i int, r *xdspb.AccessRule) string { return fmt.Sprintf("%03d %s", i, r.Policy) }

func rbacPolicy(meta *xdspb.InboundMeta, r *xdspb.AccessRule, http bool) *rbacv3.Policy {
	permission := anyPermission()
	if http {
		var all []*rbacv3.Permission
		if len(r.Methods) > 0 {
			all = append(all, orPermissions(r.Methods, func(m string) *rbacv3.Permission {
				return &rbacv3.Permission{Rule: &rbacv3.Permission_Header{Header: headerMatcher(
					discovery.ValueMatch{Type: discovery.MatchExact, Name: ":method", Value: m})}}
			}))
		}
		if len(r.Paths) > 0 {
			all = append(all, orPermissions(r.Paths, pathPermission))
		}
		switch len(all) {
		case 0:
		case 1:
			permission = all[0]
		default:
			permission = &rbacv3.Permission{Rule: &rbacv3.Permission_AndRules{AndRules: &rbacv3.Permission_Set{Rules: all}}}
		}
	}
	var principals []*rbacv3.Principal
	for _, pattern := range r.From {
		principals = append(principals, authenticated(patternMatcher(pattern)))
	}
	if len(principals) == 0 {
		principals = []*rbacv3.Principal{{Identifier: &rbacv3.Principal_Any{Any: true}}}
	}
	if !r.Foreign {
		for i, p := range principals {
			principals[i] = &rbacv3.Principal{Identifier: &rbacv3.Principal_AndIds{AndIds: &rbacv3.Principal_Set{
				Ids: []*rbacv3.Principal{memberOf(meta.TrustDomain), p}}}}
		}
	}
	return &rbacv3.Policy{Permissions: []*rbacv3.Permission{permission}, Principals: principals}
}

func anyPermission() *rbacv3.Permission {
	return &rbacv3.Permission{Rule: &rbacv3.Permission_Any{Any: true}}
}

func orPermissions(values []string, each func(string) *rbacv3.Permission) *rbacv3.Permission {
	rules := make([]*rbacv3.Permission, len(values))
	for i, s := range values {
		rules[i] = each(s)
	}
	return &rbacv3.Permission{Rule: &rbacv3.Permission_OrRules{OrRules: &rbacv3.Permission_Set{Rules: rules}}}
}

func pathPermission(path string) *rbacv3.Permission {
	m := &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Exact{Exact: path}}
	if prefix, ok := strings.CutSuffix(path, "*"); ok {
		m.MatchPattern = &matcherv3.StringMatcher_Prefix{Prefix: cmp.Or(prefix, "/")}
	}
	return &rbacv3.Permission{Rule: &rbacv3.Permission_UrlPath{UrlPath: &matcherv3.PathMatcher{Rule: &matcherv3.PathMatcher_Path{Path: m}}}}
}

func memberOf(td string) *rbacv3.Principal {
	return authenticated(&matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Prefix{Prefix: "spiffe://" + td + "/"}})
}

func authenticated(m *matcherv3.StringMatcher) *rbacv3.Principal {
	return &rbacv3.Principal{Identifier: &rbacv3.Principal_Authenticated_{Authenticated: &rbacv3.Principal_Authenticated{PrincipalName: m}}}
}

// patternMatcher is identity.MatchPattern in Envoy's words.
func patternMatcher(pattern string) *matcherv3.StringMatcher {
	if !strings.Contains(pattern, "*") {
		return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Exact{Exact: pattern}}
	}
	rest, any := strings.CutSuffix(strings.TrimPrefix(pattern, "spiffe://"), "/**")
	segs := strings.Split(rest, "/")
	for i, s := range segs {
		if s == "*" {
			segs[i] = "[^/]+"
		} else {
			segs[i] = regexp.QuoteMeta(s)
		}
	}
	re := "spiffe://" + strings.Join(segs, "/")
	if any {
		re += "(/.*)?"
	}
	return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_SafeRegex{SafeRegex: safeRegex(re)}}
}
