package xdsserver

import (
	"context"
	"crypto/x509"
	"net/netip"
	"slices"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	grpcpeer "google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/hanse-mesh/hanse/discovery/xdsgen"
	"github.com/hanse-mesh/hanse/identity"
)

// peer is a verified caller.
type peer struct {
	id    spiffeid.ID
	chain []*x509.Certificate // verified at the handshake, leaf first
}

// authenticate returns the caller of a stream. It is checked again here, so that a server that was given other credentials
// than TLSConfig still lets nobody else in.
func (s *Server) authenticate(ctx context.Context) (*peer, error) {
	p, ok := grpcpeer.FromContext(ctx)
	if !ok {
		return nil, status.Error(codes.Unauthenticated, "no peer")
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok || len(info.State.PeerCertificates) == 0 {
		return nil, status.Error(codes.Unauthenticated, "xDS needs mutual TLS with an SVID")
	}
	id, err := s.cfg.Source.Verify(info.State.PeerCertificates)
	if err != nil {
		return nil, status.Errorf(codes.Unauthenticated, "verify SVID: %v", err)
	}
	if !id.MemberOf(s.cfg.TrustDomain) {
		return nil, status.Errorf(codes.PermissionDenied, "%s is of another trust domain than %s", id, s.cfg.TrustDomain)
	}
	return &peer{id: id, chain: info.State.PeerCertificates}, nil
}

// client is what a Node says about the program at the other end.
type client struct {
	agent   string // user agent name
	version string
	hanse   bool // one of ours: reads trust and faults
	push    bool // keeps Clusters and ClusterLoadAssignments that come with a Listener
	role    string
}

// bounds of what a Node may say
const (
	maxNodeString  = 256
	maxWorkloadIPs = 64
)

// describe makes a Viewer of an SVID and a Node: the identity and namespace are the SVID's, the rest is believed.
func (s *Server) describe(id spiffeid.ID, node *corev3.Node) (xdsgen.Viewer, client) {
	meta := node.GetMetadata().GetFields()
	text := func(key string) string { return short(meta[key].GetStringValue()) }
	v := xdsgen.Viewer{
		ID:       short(node.GetId()),
		Cluster:  s.View().Set.Local.Self.Cluster,
		Region:   short(node.GetLocality().GetRegion()),
		Zone:     short(node.GetLocality().GetZone()),
		Network:  text("network"),
		Kind:     xdsgen.Sidecar,
		SPIFFEID: id.String(),
	}
	if v.Network == "" {
		v.Network = s.View().Set.Local.Self.Network
	}
	v.Namespace, _, _ = identity.ParseWorkloadID(id)
	c := client{agent: short(node.GetUserAgentName()), version: text("version"), role: text("role")}
	if c.version == "" {
		c.version = short(node.GetUserAgentVersion())
	}
	c.hanse = strings.HasPrefix(c.agent, "hanse-proxy")
	c.push = meta["push_dependencies"].GetBoolValue()
	switch {
	case id == identity.GatewayID(s.cfg.TrustDomain):
		v.Kind = xdsgen.Gateway
	case strings.HasPrefix(c.agent, "gRPC") || strings.HasPrefix(c.agent, "grpc"):
		v.Kind = xdsgen.GRPC
	}
	if c.role == "" {
		c.role = string(v.Kind)
	}
	for _, ip := range meta["workload_ips"].GetListValue().GetValues() {
		if addr, err := netip.ParseAddr(ip.GetStringValue()); err == nil && len(v.WorkloadIPs) < maxWorkloadIPs {
			v.WorkloadIPs = append(v.WorkloadIPs, addr)
		}
	}
	slices.SortFunc(v.WorkloadIPs, netip.Addr.Compare)
	return v, c
}

func short(s string) string {
	if len(s) > maxNodeString {
		return strings.ToValidUTF8(s[:maxNodeString], "")
	}
	return s
}
