package spireapi

import (
	"context"
	"crypto/x509"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/proto"

	"github.com/hanse-mesh/hanse/identity/ca"
)

// AgentView is an agent as people look at it.
type AgentView struct {
	ID        spiffeid.ID
	Type      string // of attestation
	Expires   time.Time
	Seen      time.Time // zero: not by this replica since it started
	Banned    bool
	Selectors []*types.Selector
}

// Agents returns those whose SVID is valid or that are banned, sorted by ID.
func (s *Server) Agents() (out []AgentView) {
	now := s.cfg.Now()
	for _, a := range s.reg.allAgents() {
		id, err := spiffeid.FromString(a.ID)
		expires := time.Unix(max(a.Expires, a.NewExpires), 0)
		if err != nil || !a.Banned && !expires.After(now) {
			continue
		}
		s.mu.Lock()
		seen := s.seen[a.ID].at
		s.mu.Unlock()
		out = append(out, AgentView{ID: id, Type: a.Type, Expires: expires, Seen: seen, Banned: a.Banned, Selectors: a.selectors()})
	}
	return out
}

// Entries returns copies of those in force, sorted by their IDs.
func (s *Server) Entries() (out []*types.Entry) {
	now := s.cfg.Now()
	for _, e := range s.reg.allEntries() {
		if !e.expired(now) {
			out = append(out, proto.CloneOf(e.Entry))
		}
	}
	return out
}

// MintX509 signs an X509-SVID for an administrator, whom the caller has authorised. Errors are gRPC statuses.
func (s *Server) MintX509(ctx context.Context, p ca.X509Params) ([]*x509.Certificate, error) {
	if err := s.mintable(p.ID); err != nil {
		return nil, err
	}
	for _, name := range p.DNSNames {
		if !validDNSName(name) {
			return nil, invalid("%q is not a DNS name", name)
		}
	}
	chain, err := s.cfg.Authority.SignX509(ctx, p)
	if err != nil {
		return nil, s.signError(err)
	}
	s.log.Info("X509-SVID minted", "id", p.ID.String(), "expires", chain[0].NotAfter)
	return chain, nil
}

// MintJWT is MintX509 for a JWT-SVID.
func (s *Server) MintJWT(ctx context.Context, id spiffeid.ID, audience []string, ttl time.Duration) (*types.JWTSVID, error) {
	if err := s.mintable(id); err != nil {
		return nil, err
	}
	svid, err := s.signJWT(ctx, id, audience, ttl)
	if err != nil {
		return nil, err
	}
	s.log.Info("JWT-SVID minted", "id", id.String(), "audience", audience, "expires", time.Unix(svid.ExpiresAt, 0))
	return svid, nil
}
