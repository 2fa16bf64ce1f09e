package identity

import (
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// WorkloadID returns spiffe://<td>/ns/<namespace>/sa/<serviceAccount>, the ID of every workload.
func WorkloadID(td spiffeid.TrustDomain, namespace, serviceAccount string) (spiffeid.ID, error) {
	return spiffeid.FromSegments(td, "ns", namespace, "sa", serviceAccount)
}

// ParseWorkloadID splits an ID made by WorkloadID. It is false for every other ID.
func ParseWorkloadID(id spiffeid.ID) (namespace, serviceAccount string, ok bool) {
	s := strings.Split(id.Path(), "/")
	if len(s) != 5 || s[1] != "ns" || s[3] != "sa" {
		return "", "", false
	}
	return s[2], s[4], true
}

// ControlPlaneID is presented on the federation, xDS and bundle endpoint ports of hansed.
func ControlPlaneID(td spiffeid.TrustDomain) spiffeid.ID {
	return spiffeid.RequireFromSegments(td, "hanse", "control-plane")
}

// GatewayID is presented by a cluster's east-west gateways, which terminate only probes.
func GatewayID(td spiffeid.TrustDomain) spiffeid.ID {
	return spiffeid.RequireFromSegments(td, "hanse", "gateway")
}

// SPIREServerID is presented on the SPIRE Server API port; stock spire-agents insist on it.
func SPIREServerID(td spiffeid.TrustDomain) spiffeid.ID {
	return spiffeid.RequireFromSegments(td, "spire", "server")
}

// AdminID is the ID of a remote administrator.
func AdminID(td spiffeid.TrustDomain, name string) (spiffeid.ID, error) {
	return spiffeid.FromSegments(td, "hanse", "admin", name)
}

// IsAdminID reports whether id is an administrator of td.
func IsAdminID(td spiffeid.TrustDomain, id spiffeid.ID) bool {
	return id.MemberOf(td) && strings.HasPrefix(id.Path(), "/hanse/admin/")
}

// AgentUserAgent is how our own agents introduce themselves to a SPIRE server.
const AgentUserAgent = "hanse-agent"

// Reserved reports whether id is in /hanse/ or /spire/, which no registration entry and no mint request may name.
func Reserved(id spiffeid.ID) bool {
	p := id.Path() + "/"
	return strings.HasPrefix(p, "/hanse/") || strings.HasPrefix(p, "/spire/")
}

// MatchPattern reports whether id matches a SPIFFE-ID pattern of a policy: a SPIFFE ID in which "*" stands for one whole
// path segment or the trust domain, and a last "**" for any number of further segments. Nothing is implied: the pattern
// "spiffe://west.demo/ns/shop/sa/*" does not match another trust domain's shop.
func MatchPattern(pattern string, id spiffeid.ID) bool {
	rest, ok := strings.CutPrefix(pattern, "spiffe://")
	if !ok {
		return false
	}
	p := strings.Split(rest, "/")
	s := strings.Split(strings.TrimPrefix(id.String(), "spiffe://"), "/")
	for i, seg := range p {
		if seg == "**" && i == len(p)-1 {
			return len(s) >= i
		}
		if i >= len(s) || (seg != "*" && seg != s[i]) {
			return false
		}
	}
	return len(p) == len(s)
}

// ValidatePattern says what is wrong with a pattern of MatchPattern, or nil.
func ValidatePattern(pattern string) error {
	rest, ok := strings.CutPrefix(pattern, "spiffe://")
	if !ok {
		return fmt.Errorf("SPIFFE-ID pattern %q: must begin with spiffe://", pattern)
	}
	segs := strings.Split(rest, "/")
	for i, seg := range segs {
		switch {
		case seg == "":
			return fmt.Errorf("SPIFFE-ID pattern %q: empty segment", pattern)
		case seg == "*", seg == "**" && i == len(segs)-1 && i > 0:
		case strings.Contains(seg, "*"):
			return fmt.Errorf("SPIFFE-ID pattern %q: * stands for one whole segment, ** only at the end", pattern)
		case i == 0:
			if _, err := spiffeid.TrustDomainFromString(seg); err != nil {
				return fmt.Errorf("SPIFFE-ID pattern %q: %w", pattern, err)
			}
		default:
			if err := spiffeid.ValidatePathSegment(seg); err != nil {
				return fmt.Errorf("SPIFFE-ID pattern %q: %w", pattern, err)
			}
		}
	}
	return nil
}
