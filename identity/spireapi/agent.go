package spireapi

import (
	"context"
	"crypto/x509"
	"errors"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/identity/attest"
	"github.com/hanse-mesh/hanse/identity/ca"
	"github.com/hanse-mesh/hanse/identity/spiretypes"
)

const joinToken = "join_token"

// agentKept is how long an expired agent is remembered.
const agentKept = 24 * time.Hour

type agentService struct {
	agentv1.UnimplementedAgentServer
	service
}

// AttestAgent admits an agent by a token. Anyone may call it, at a limited rate.
func (s *agentService) AttestAgent(stream agentv1.Agent_AttestAgentServer) error {
	ctx := stream.Context()
	if host := remoteHost(ctx); !s.limit.allow(host) {
		return status.Errorf(codes.ResourceExhausted, "too many attestations from %s, try again later", host)
	}
	req, err := firstMessage(stream)
	if err != nil {
		return err
	}
	result, err := s.attestAgent(ctx, req.GetParams())
	if err != nil {
		label := "refused"
		if c := status.Code(err); c == codes.Internal || c == codes.Unavailable {
			label = "error"
		}
		s.attest.WithLabelValues(label).Inc()
		s.log.Warn("attestation refused", "from", remoteHost(ctx), "error", err)
		return err
	}
	s.attest.WithLabelValues("ok").Inc()
	return stream.Send(&agentv1.AttestAgentResponse{Step: &agentv1.AttestAgentResponse_Result_{Result: result}})
}

// firstMessage bounds how long an unknown caller may keep a stream open: its Recv ends when the method returns.
func firstMessage(stream agentv1.Agent_AttestAgentServer) (*agentv1.AttestAgentRequest, error) {
	type received struct {
		req *agentv1.AttestAgentRequest
		err error
	}
	ch := make(chan received, 1)
	go func() {
		req, err := stream.Recv()
		ch <- received{req, err}
	}()
	timer := time.NewTimer(10 * time.Second)
	defer timer.Stop()
	select {
	case r := <-ch:
		return r.req, r.err
	case <-timer.C:
		return nil, status.Error(codes.DeadlineExceeded, "no attestation data within 10 s")
	}
}

func (s *agentService) attestAgent(ctx context.Context, p *agentv1.AttestAgentRequest_Params) (*agentv1.AttestAgentResponse_Result, error) {
	switch {
	case p == nil:
		return nil, invalid("missing params")
	case p.Data == nil:
		return nil, invalid("missing attestation data")
	case p.Data.Type != joinToken:
		return nil, status.Errorf(codes.FailedPrecondition, "attestation of type %q is not served here, only %s", p.Data.Type, joinToken)
	}
	csr, err := parseCSR(p.GetParams().GetCsr())
	if err != nil {
		return nil, err
	}
	red, err := s.cfg.Tokens.Redeem(ctx, strings.TrimSpace(string(p.Data.Payload)), keyHash(csr))
	switch {
	case errors.Is(err, attest.ErrUnknown), errors.Is(err, attest.ErrTampered), errors.Is(err, attest.ErrUsed), errors.Is(err, attest.ErrExpired):
		return nil, invalid("attest agent: %v", err)
	case err != nil:
		return nil, s.internal("attest agent", err)
	}
	if a := s.reg.agent(red.AgentID.String()); a != nil && a.Banned {
		return nil, denied(types.PermissionDeniedDetails_AGENT_BANNED, "agent %s is banned", red.AgentID)
	}
	chain, err := s.signAgent(ctx, red.AgentID, csr)
	if err != nil {
		return nil, err
	}
	_, err = s.reg.putAgent(ctx, red.AgentID.String(), func(a *agentRecord) error {
		a.Type = joinToken
		a.Serial, a.Expires = chain[0].SerialNumber.String(), chain[0].NotAfter.Unix()
		a.NewSerial, a.NewExpires = "", 0
		return nil
	})
	if err != nil {
		return nil, s.internal("attest agent", err)
	}
	if !red.ID.IsZero() {
		if err := s.grantEntry(ctx, red); err != nil {
			return nil, s.internal("attest agent", err)
		}
	}
	s.log.Info("agent attested", "agent", red.AgentID.String(), "for", red.ID.String(), "from", remoteHost(ctx))
	return &agentv1.AttestAgentResponse_Result{Svid: spiretypes.FromChain(red.AgentID, chain)}, nil
}

// tokenEntryID is the ID of the entry that came with an agent's token.
func tokenEntryID(agent spiffeid.ID) string {
	return "token." + agent.Path()[strings.LastIndexByte(agent.Path(), '/')+1:]
}

// grantEntry gives an agent the one entry that its token is for.
func (s *agentService) grantEntry(ctx context.Context, red attest.Redemption) error {
	entryID := tokenEntryID(red.AgentID)
	_, err := s.reg.putEntry(ctx, entryID, func(cur *entryRecord) (*entryRecord, error) {
		if cur != nil {
			return cur, nil
		}
		return newEntryRecord(&types.Entry{
			Id:        entryID,
			SpiffeId:  spiretypes.FromID(red.ID),
			ParentId:  spiretypes.FromID(red.AgentID),
			Selectors: []*types.Selector{{Type: "spiffe_id", Value: red.AgentID.String()}},
			CreatedAt: s.cfg.Now().Unix(),
		}, true)
	})
	return err
}

func (s *service) signAgent(ctx context.Context, id spiffeid.ID, csr *x509.CertificateRequest) ([]*x509.Certificate, error) {
	chain, err := s.cfg.Authority.SignX509(ctx, ca.X509Params{ID: id, PublicKey: csr.PublicKey, TTL: s.cfg.AgentLife})
	if err != nil {
		return nil, s.signError(err)
	}
	return chain, nil
}

// signError is Unavailable while another replica may sign, or this one soon.
func (s *service) signError(err error) error {
	if errors.Is(err, ca.ErrNotActive) || errors.Is(err, ca.ErrExpired) {
		return status.Error(codes.Unavailable, err.Error())
	}
	return s.internal("sign", err)
}

// RenewAgent signs another SVID for the calling agent. The old one stays good until the new one is used.
func (s *agentService) RenewAgent(ctx context.Context, req *agentv1.RenewAgentRequest) (*agentv1.RenewAgentResponse, error) {
	a, err := s.agent(ctx)
	if err != nil {
		return nil, err
	}
	if a.CanReattest {
		return nil, denied(types.PermissionDeniedDetails_AGENT_MUST_REATTEST, "agent %s must attest again", a.ID)
	}
	csr, err := parseCSR(req.GetParams().GetCsr())
	if err != nil {
		return nil, err
	}
	id, err := spiffeid.FromString(a.ID)
	if err != nil {
		return nil, s.internal("renew agent", err)
	}
	chain, err := s.signAgent(ctx, id, csr)
	if err != nil {
		return nil, err
	}
	_, err = s.reg.updateAgent(ctx, a.ID, func(n *agentRecord) error {
		n.NewSerial, n.NewExpires = chain[0].SerialNumber.String(), chain[0].NotAfter.Unix()
		return nil
	})
	if err != nil {
		return nil, s.internal("renew agent", err)
	}
	return &agentv1.RenewAgentResponse{Svid: spiretypes.FromChain(id, chain)}, nil
}

// CreateJoinToken makes a token, for administrators. With an agent ID the agent also gets an entry of that ID.
func (s *agentService) CreateJoinToken(ctx context.Context, req *agentv1.CreateJoinTokenRequest) (*types.JoinToken, error) {
	if err := s.admin(ctx); err != nil {
		return nil, err
	}
	if req.Ttl < 1 {
		return nil, invalid("ttl is required, in seconds")
	}
	var g attest.Grant
	if req.AgentId != nil {
		id, err := spiretypes.ToID(req.AgentId)
		if err != nil {
			return nil, invalid("agent_id: %v", err)
		}
		if identity.Reserved(id) {
			return nil, invalid("agent_id: %s is reserved", id)
		}
		g.ID = id
	}
	ttl := time.Duration(req.Ttl) * time.Second
	token := req.Token
	var expires time.Time
	var err error
	if token == "" {
		token, expires, err = s.cfg.Tokens.Create(ctx, g, ttl)
	} else {
		expires, err = s.cfg.Tokens.Register(ctx, token, g, ttl)
	}
	if err != nil {
		return nil, invalid("%v", err)
	}
	return &types.JoinToken{Value: token, ExpiresAt: expires.Unix()}, nil
}

// CountAgents counts, for administrators.
func (s *agentService) CountAgents(ctx context.Context, req *agentv1.CountAgentsRequest) (*agentv1.CountAgentsResponse, error) {
	if err := s.admin(ctx); err != nil {
		return nil, err
	}
	f := req.GetFilter()
	agents, err := s.filterAgents(f.GetByAttestationType(), f.GetBySelectorMatch(), f.GetByBanned(), f.GetByCanReattest(), f.GetByExpiresBefore())
	if err != nil {
		return nil, err
	}
	return &agentv1.CountAgentsResponse{Count: int32(len(agents))}, nil
}

// ListAgents lists agents page by page, for administrators.
func (s *agentService) ListAgents(ctx context.Context, req *agentv1.ListAgentsRequest) (*agentv1.ListAgentsResponse, error) {
	if err := s.admin(ctx); err != nil {
		return nil, err
	}
	f := req.GetFilter()
	agents, err := s.filterAgents(f.GetByAttestationType(), f.GetBySelectorMatch(), f.GetByBanned(), f.GetByCanReattest(), f.GetByExpiresBefore())
	if err != nil {
		return nil, err
	}
	page, next := paginate(agents, func(a *agentRecord) string { return a.ID }, req.PageSize, req.PageToken)
	resp := &agentv1.ListAgentsResponse{NextPageToken: next}
	for _, a := range page {
		p, err := agentProto(a, req.OutputMask)
		if err != nil {
			return nil, s.internal("list agents", err)
		}
		resp.Agents = append(resp.Agents, p)
	}
	return resp, nil
}

// admits reports whether a filter, nil for none, lets value pass.
func admits(filter *wrapperspb.BoolValue, value bool) bool {
	return filter == nil || filter.Value == value
}

func (s *agentService) filterAgents(byType string, match *types.SelectorMatch, banned, canReattest *wrapperspb.BoolValue, expiresBefore string) ([]*agentRecord, error) {
	var before time.Time
	if expiresBefore != "" {
		var err error
		if before, err = time.Parse("2006-01-02 15:04:05 -0700 -07", expiresBefore); err != nil {
			return nil, invalid("by_expires_before: %v", err)
		}
	}
	var out []*agentRecord
	for _, a := range s.reg.allAgents() {
		switch {
		case byType != "" && a.Type != byType:
		case match != nil && !matchSet(int32(match.Match), selectorStrings(a.selectors()), selectorStrings(match.Selectors)):
		case !admits(banned, a.Banned):
		case !admits(canReattest, a.CanReattest):
		case !before.IsZero() && a.Expires >= before.Unix():
		default:
			out = append(out, a)
		}
	}
	return out, nil
}

// GetAgent returns one agent, for administrators.
func (s *agentService) GetAgent(ctx context.Context, req *agentv1.GetAgentRequest) (*types.Agent, error) {
	a, err := s.namedAgent(ctx, req.GetId())
	if err != nil {
		return nil, err
	}
	p, err := agentProto(a, req.OutputMask)
	if err != nil {
		return nil, s.internal("get agent", err)
	}
	return p, nil
}

// namedAgent returns the agent that an administrator names.
func (s *agentService) namedAgent(ctx context.Context, p *types.SPIFFEID) (*agentRecord, error) {
	if err := s.admin(ctx); err != nil {
		return nil, err
	}
	id, err := spiretypes.ToID(p)
	if err != nil {
		return nil, invalid("%v", err)
	}
	a := s.reg.agent(id.String())
	if a == nil {
		return nil, status.Errorf(codes.NotFound, "agent %s not found", id)
	}
	return a, nil
}

// BanAgent shuts an agent out until DeleteAgent lifts it, for administrators.
func (s *agentService) BanAgent(ctx context.Context, req *agentv1.BanAgentRequest) (*emptypb.Empty, error) {
	a, err := s.namedAgent(ctx, req.GetId())
	if err != nil {
		return nil, err
	}
	if _, err := s.reg.updateAgent(ctx, a.ID, func(n *agentRecord) error { n.Banned = true; return nil }); err != nil {
		return nil, s.internal("ban agent", err)
	}
	s.log.Info("agent banned", "agent", a.ID)
	return &emptypb.Empty{}, nil
}

// DeleteAgent forgets an agent and the entry that came with its token, for administrators.
func (s *agentService) DeleteAgent(ctx context.Context, req *agentv1.DeleteAgentRequest) (*emptypb.Empty, error) {
	a, err := s.namedAgent(ctx, req.GetId())
	if err != nil {
		return nil, err
	}
	if err := s.forgetAgent(ctx, a); err != nil {
		return nil, s.internal("delete agent", err)
	}
	s.log.Info("agent deleted", "agent", a.ID)
	return &emptypb.Empty{}, nil
}

func (s *Server) forgetAgent(ctx context.Context, a *agentRecord) error {
	for _, e := range s.reg.allEntries() {
		if e.federateAll && e.parentID.String() == a.ID {
			if _, err := s.reg.deleteEntry(ctx, e.Id); err != nil {
				return err
			}
		}
	}
	if err := s.reg.deleteAgent(ctx, a.ID); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.seen, a.ID)
	return nil
}

// sweepAgents forgets agents whose last SVID expired more than a day ago. Who is banned stays.
func (s *Server) sweepAgents(ctx context.Context) error {
	limit := s.cfg.Now().Add(-agentKept).Unix()
	for _, a := range s.reg.allAgents() {
		if !a.Banned && max(a.Expires, a.NewExpires) < limit {
			if err := s.forgetAgent(ctx, a); err != nil {
				return err
			}
		}
	}
	return nil
}

// PostStatus accepts an agent's report of the bundle that it serves.
func (s *agentService) PostStatus(ctx context.Context, req *agentv1.PostStatusRequest) (*agentv1.PostStatusResponse, error) {
	if _, err := s.agent(ctx); err != nil {
		return nil, err
	}
	s.noteLoaded(ctx, s.td, req.CurrentBundleSerial)
	return &agentv1.PostStatusResponse{}, nil
}

func agentProto(a *agentRecord, m *types.AgentMask) (*types.Agent, error) {
	if m == nil {
		m = &types.AgentMask{AttestationType: true, X509SvidSerialNumber: true, X509SvidExpiresAt: true, Selectors: true, Banned: true, CanReattest: true}
	}
	id, err := spiffeid.FromString(a.ID)
	if err != nil {
		return nil, err
	}
	p := &types.Agent{Id: spiretypes.FromID(id)}
	if m.AttestationType {
		p.AttestationType = a.Type
	}
	if m.X509SvidSerialNumber {
		p.X509SvidSerialNumber = a.Serial
	}
	if m.X509SvidExpiresAt {
		p.X509SvidExpiresAt = a.Expires
	}
	if m.Selectors {
		p.Selectors = a.selectors()
	}
	if m.Banned {
		p.Banned = a.Banned
	}
	if m.CanReattest {
		p.CanReattest = a.CanReattest
	}
	return p, nil
}
