package spireapi

import (
	"context"
	"encoding/hex"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/identity/ca"
	"github.com/hanse-mesh/hanse/identity/spiretypes"
)

type svidService struct {
	svidv1.UnimplementedSVIDServer
	service
}

// mintable says why id cannot be minted for an administrator, or nil.
func (s *Server) mintable(id spiffeid.ID) error {
	switch {
	case !id.MemberOf(s.td):
		return invalid("%s is not of trust domain %s", id, s.td)
	case id.Path() == "":
		return invalid("%s names no workload", id)
	case identity.Reserved(id):
		return invalid("%s is reserved", id)
	}
	return nil
}

// MintX509SVID signs a CSR with one URI SAN, for administrators.
func (s *svidService) MintX509SVID(ctx context.Context, req *svidv1.MintX509SVIDRequest) (*svidv1.MintX509SVIDResponse, error) {
	if err := s.admin(ctx); err != nil {
		return nil, err
	}
	csr, err := parseCSR(req.Csr)
	if err != nil {
		return nil, err
	}
	if err := plainCSR(csr); err != nil {
		return nil, err
	}
	if len(csr.URIs) != 1 {
		return nil, invalid("CSR has %d URI SANs, want the one SPIFFE ID", len(csr.URIs))
	}
	id, err := spiffeid.FromURI(csr.URIs[0])
	if err != nil {
		return nil, invalid("CSR: URI SAN: %v", err)
	}
	chain, err := s.MintX509(ctx, ca.X509Params{ID: id, PublicKey: csr.PublicKey, DNSNames: csr.DNSNames, TTL: seconds(req.Ttl)})
	if err != nil {
		return nil, err
	}
	return &svidv1.MintX509SVIDResponse{Svid: spiretypes.FromChain(id, chain)}, nil
}

// MintJWTSVID signs a JWT-SVID, for administrators.
func (s *svidService) MintJWTSVID(ctx context.Context, req *svidv1.MintJWTSVIDRequest) (*svidv1.MintJWTSVIDResponse, error) {
	if err := s.admin(ctx); err != nil {
		return nil, err
	}
	id, err := spiretypes.ToID(req.Id)
	if err != nil {
		return nil, invalid("id: %v", err)
	}
	svid, err := s.MintJWT(ctx, id, req.Audience, seconds(req.Ttl))
	if err != nil {
		return nil, err
	}
	return &svidv1.MintJWTSVIDResponse{Svid: svid}, nil
}

// BatchNewX509SVID signs SVIDs for entries of the calling agent.
func (s *svidService) BatchNewX509SVID(ctx context.Context, req *svidv1.BatchNewX509SVIDRequest) (*svidv1.BatchNewX509SVIDResponse, error) {
	a, entries, err := s.callersEntries(ctx)
	if err != nil {
		return nil, err
	}
	switch {
	case len(req.Params) == 0:
		return nil, invalid("missing parameters")
	case len(req.Params) > maxBatch:
		return nil, invalid("more than %d parameters", maxBatch)
	}
	resp := new(svidv1.BatchNewX509SVIDResponse)
	for _, p := range req.Params {
		svid, err := s.newX509(ctx, a.ID, p, entries)
		s.refusedPart(ctx, "BatchNewX509SVID", err)
		resp.Results = append(resp.Results, &svidv1.BatchNewX509SVIDResponse_Result{Status: statusOf(err), Svid: svid})
	}
	return resp, nil
}

func (s *svidService) callersEntries(ctx context.Context) (*agentRecord, map[string]*entryRecord, error) {
	a, err := s.agent(ctx)
	if err != nil {
		return nil, nil, err
	}
	out := map[string]*entryRecord{}
	for _, e := range s.reg.authorized(a, s.cfg.Now()) {
		out[e.Id] = e
	}
	return a, out, nil
}

func (s *svidService) newX509(ctx context.Context, agentID string, p *svidv1.NewX509SVIDParams, entries map[string]*entryRecord) (*types.X509SVID, error) {
	switch {
	case p.GetEntryId() == "":
		return nil, invalid("missing entry ID")
	case entries[p.EntryId] == nil:
		return nil, status.Errorf(codes.NotFound, "entry %q not found or not authorized", p.EntryId)
	}
	e := entries[p.EntryId]
	csr, err := parseAgentCSR(p.Csr)
	if err != nil {
		return nil, err
	}
	if err := checkSubject(csr, e.spiffeID); err != nil {
		return nil, err
	}
	chain, err := s.cfg.Authority.SignX509(ctx, ca.X509Params{ID: e.spiffeID, PublicKey: csr.PublicKey, DNSNames: e.DnsNames, TTL: s.entryTTL(e, e.X509SvidTtl)})
	if err != nil {
		return nil, s.signError(err)
	}
	s.log.Debug("X509-SVID signed", "id", e.spiffeID.String(), "entry", e.Id, "expires", chain[0].NotAfter)
	s.noteSigned(agentID, chain)
	svid := spiretypes.FromChain(e.spiffeID, chain)
	svid.Hint = e.Hint
	return svid, nil
}

// entryTTL is the life that an entry asks for, never beyond its own end. 0 is the default.
func (s *svidService) entryTTL(e *entryRecord, asked int32) time.Duration {
	ttl := seconds(asked)
	if e.ExpiresAt == 0 {
		return ttl
	}
	left := time.Unix(e.ExpiresAt, 0).Sub(s.cfg.Now())
	if ttl == 0 || left < ttl {
		return left
	}
	return ttl
}

// NewJWTSVID signs a JWT-SVID for an entry of the calling agent.
func (s *svidService) NewJWTSVID(ctx context.Context, req *svidv1.NewJWTSVIDRequest) (*svidv1.NewJWTSVIDResponse, error) {
	_, entries, err := s.callersEntries(ctx)
	if err != nil {
		return nil, err
	}
	e := entries[req.EntryId]
	if e == nil {
		return nil, status.Errorf(codes.NotFound, "entry %q not found or not authorized", req.EntryId)
	}
	svid, err := s.signJWT(ctx, e.spiffeID, req.Audience, seconds(e.JwtSvidTtl))
	if err != nil {
		return nil, err
	}
	svid.Hint = e.Hint
	return &svidv1.NewJWTSVIDResponse{Svid: svid}, nil
}

func (s *Server) signJWT(ctx context.Context, id spiffeid.ID, audience []string, ttl time.Duration) (*types.JWTSVID, error) {
	if len(audience) == 0 || len(audience) > maxNames {
		return nil, invalid("%d audiences, want 1 to %d", len(audience), maxNames)
	}
	for _, a := range audience {
		if a == "" || len(a) > maxString {
			return nil, invalid("an audience is empty or too long")
		}
	}
	j, err := s.cfg.Authority.SignJWT(ctx, id, audience, ttl)
	if err != nil {
		return nil, s.signError(err)
	}
	return &types.JWTSVID{Token: j.Token, Id: spiretypes.FromID(id), ExpiresAt: j.Expires.Unix(), IssuedAt: j.IssuedAt.Unix()}, nil
}

// NewDownstreamX509CA signs an intermediate CA for the calling downstream server, which is one by an entry's flag. Only the
// key of its CSR counts.
func (s *svidService) NewDownstreamX509CA(ctx context.Context, req *svidv1.NewDownstreamX509CARequest) (*svidv1.NewDownstreamX509CAResponse, error) {
	id, err := s.downstream(ctx)
	if err != nil {
		return nil, err
	}
	csr, err := parseCSR(req.Csr)
	if err != nil {
		return nil, err
	}
	chain, err := s.cfg.Authority.SignDownstream(ctx, csr.PublicKey, seconds(req.PreferredTtl))
	if err != nil {
		return nil, s.signError(err)
	}
	s.log.Info("downstream CA signed", "for", id.String(), "key_id", hex.EncodeToString(chain[0].SubjectKeyId), "expires", chain[0].NotAfter)
	resp := new(svidv1.NewDownstreamX509CAResponse)
	for _, c := range chain {
		resp.CaCertChain = append(resp.CaCertChain, c.Raw)
	}
	for _, c := range s.cfg.OwnBundle().X509Authorities() {
		resp.X509Authorities = append(resp.X509Authorities, c.Raw)
	}
	return resp, nil
}

func seconds(n int32) time.Duration { return time.Duration(max(n, 0)) * time.Second }
