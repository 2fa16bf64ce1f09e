package spireapi

import (
	"context"
	"crypto/x509"
	"errors"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/identity/attest"
	"github.com/hanse-mesh/hanse/identity/ca"
	"github.com/hanse-mesh/hanse/identity/spiretypes"
)

const (
	joinToken      = "join_token"
	attestTimeout  = 10 * time.Second // of each message of an unknown caller
	examineTimeout = 20 * time.Second

	// So many attestations are worked on at a time, whatever the rate: more only slow each other down until all time out. The others wait
	// this long.
	maxAttesting = 64
	attestWait   = 8 * time.Second
)

// agentKept is how long an expired agent is remembered.
const agentKept = 24 * time.Hour

type agentService struct {
	agentv1.UnimplementedAgentServer
	service
}

// AttestAgent admits an agent by a token or other evidence. Anyone may call it, at a limited rate.
func (s *agentService) AttestAgent(stream agentv1.Agent_AttestAgentServer) error {
	ctx := stream.Context()
	if err := s.admitAttestation(remoteHost(ctx)); err != nil {
		return err
	}
	req, err := nextMessage(stream)
	if err != nil {
		return err
	}
	if err := s.enterAttestation(ctx); err != nil {
		return err
	}
	inside := true
	defer func() {
		if inside {
			s.leaveAttestation()
		}
	}()
	result, err := s.attestAgent(ctx, req.GetParams(), func(challenge []byte) ([]byte, error) {
		s.leaveAttestation() // the caller may take its time: it must not be the others'
		inside = false
		if err := stream.Send(&agentv1.AttestAgentResponse{Step: &agentv1.AttestAgentResponse_Challenge{Challenge: challenge}}); err != nil {
			return nil, err
		}
		next, err := nextMessage(stream)
		if err != nil {
			return nil, err
		}
		if err := s.enterAttestation(ctx); err != nil {
			return nil, err
		}
		inside = true
		return next.GetChallengeResponse(), nil
	})
	if err != nil {
		label := "refused"
		if c := status.Code(err); c == codes.Internal || c == codes.Unavailable {
			label = "error"
		}
		s.attest.WithLabelValues(label).Inc()
		s.reasons.WithLabelValues(s.evidenceType(req), refusalReason(err)).Inc()
		s.log.Warn("attestation refused", "from", remoteHost(ctx), "type", req.GetParams().GetData().GetType(), "error", err)
		return err
	}
	s.attest.WithLabelValues("ok").Inc()
	return stream.Send(&agentv1.AttestAgentResponse{Step: &agentv1.AttestAgentResponse_Result_{Result: result}})
}

// enterAttestation waits until few enough attestations are worked on.
func (s *agentService) enterAttestation(ctx context.Context) error {
	timer := time.NewTimer(attestWait)
	defer timer.Stop()
	select {
	case s.attesting <- struct{}{}:
		return nil
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	case <-timer.C:
		return s.tooMany(remoteHost(ctx), "all addresses together", s.all.promise(0))
	}
}

func (s *agentService) leaveAttestation() { <-s.attesting }

// admitAttestation limits attestations, per source address and in all, before anything is read of them.
func (s *agentService) admitAttestation(host string) error {
	whose := host
	ok, after := s.limit.take(host)
	if ok {
		whose = "all addresses together"
		ok, after = s.all.queue()
	}
	if ok {
		return nil
	}
	return s.tooMany(host, whose, after)
}

// tooMany counts an attestation that is turned away, and says when to come back.
func (s *agentService) tooMany(host, whose string, after time.Duration) error {
	s.attest.WithLabelValues("limited").Inc()
	reason := "flood"
	if whose != host {
		reason = "flood of many"
	}
	s.reasons.WithLabelValues("", reason).Inc()
	if s.floods.Due(s.cfg.Now()) {
		s.log.Warn("too many attestations; more of them are refused for now without a word here", "from", host, "limit_of", whose)
	}
	after = max(after.Round(time.Millisecond), time.Millisecond)
	st := status.Newf(codes.ResourceExhausted, "too many attestations from %s, try again in %s", whose, after)
	if with, err := st.WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(after)}); err == nil {
		st = with
	}
	return st.Err()
}

// evidenceType is a label: what callers make up is "other".
func (s *agentService) evidenceType(req *agentv1.AttestAgentRequest) string {
	kind := req.GetParams().GetData().GetType()
	if kind == joinToken || s.cfg.Attestors[kind] != nil {
		return kind
	}
	return "other"
}

// refusalReason is a label for why an agent was not admitted.
func refusalReason(err error) string {
	var st *types.PermissionDeniedDetails
	for _, d := range status.Convert(err).Details() {
		if x, ok := d.(*types.PermissionDeniedDetails); ok {
			st = x
		}
	}
	switch {
	case errors.Is(err, attest.ErrUnknown):
		return "unknown token"
	case errors.Is(err, attest.ErrTampered):
		return "damaged token"
	case errors.Is(err, attest.ErrUsed):
		return "used token"
	case errors.Is(err, attest.ErrExpired):
		return "expired token"
	case st.GetReason() == types.PermissionDeniedDetails_AGENT_BANNED:
		return "banned"
	}
	switch code := status.Code(err); code {
	case codes.PermissionDenied:
		return "evidence"
	case codes.InvalidArgument:
		return "CSR or request"
	case codes.FailedPrecondition:
		return "type"
	case codes.DeadlineExceeded:
		return "silence"
	case codes.Internal, codes.Unavailable:
		return "error here"
	default:
		return "other"
	}
}

// tokenRefused is the answer to a token that is not taken. It keeps why, for refusalReason.
type tokenRefused struct{ error }

func (e tokenRefused) Unwrap() error { return e.error }

// GRPCStatus implements what package status asks for.
func (e tokenRefused) GRPCStatus() *status.Status {
	return status.Newf(codes.InvalidArgument, "attest agent: %v", e.error)
}

// nextMessage bounds how long an unknown caller may keep a stream open: its Recv ends when the method returns.
func nextMessage(stream agentv1.Agent_AttestAgentServer) (*agentv1.AttestAgentRequest, error) {
	type received struct {
		req *agentv1.AttestAgentRequest
		err error
	}
	ch := make(chan received, 1)
	go func() {
		req, err := stream.Recv()
		ch <- received{req, err}
	}()
	timer := time.NewTimer(attestTimeout)
	defer timer.Stop()
	select {
	case r := <-ch:
		if errors.Is(r.err, io.EOF) {
			return nil, invalid("the stream ended without attestation data")
		}
		return r.req, r.err
	case <-timer.C:
		return nil, status.Error(codes.DeadlineExceeded, "no attestation data within 10 s")
	}
}

// accepted is an agent whose evidence holds.
type accepted struct {
	id        spiffeid.ID
	entry     spiffeid.ID // zero: what an administrator registers
	kind      string
	selectors []selectorRecord
	reattest  bool
}

func (s *agentService) attestAgent(ctx context.Context, p *agentv1.AttestAgentRequest_Params, challenge attest.Challenge) (*agentv1.AttestAgentResponse_Result, error) {
	switch {
	case p == nil:
		return nil, invalid("missing params")
	case p.Data == nil:
		return nil, invalid("missing attestation data")
	}
	attestor := s.cfg.Attestors[p.Data.Type]
	if attestor == nil && p.Data.Type != joinToken {
		return nil, status.Errorf(codes.FailedPrecondition, "attestation of type %q is not served here, only %v", p.Data.Type,
			append([]string{joinToken}, slices.Sorted(maps.Keys(s.cfg.Attestors))...))
	}
	csr, err := parseAgentCSR(p.GetParams().GetCsr())
	if err != nil {
		return nil, err
	}
	var who accepted
	if attestor == nil {
		who, err = s.redeem(ctx, string(p.Data.Payload), csr)
	} else {
		who, err = s.examine(ctx, attestor, p.Data, challenge)
	}
	if err != nil {
		return nil, err
	}
	if a := s.reg.agent(who.id.String()); a != nil && a.Banned {
		return nil, denied(types.PermissionDeniedDetails_AGENT_BANNED, "agent %s is banned", who.id)
	}
	chain, err := s.signAgent(ctx, who.id, csr)
	if err != nil {
		return nil, err
	}
	_, err = s.reg.putAgent(ctx, who.id.String(), func(a *agentRecord) error {
		a.Type, a.Selectors, a.CanReattest = who.kind, who.selectors, who.reattest
		a.Serial, a.Expires, a.Authority = chain[0].SerialNumber.String(), chain[0].NotAfter.Unix(), authorityOf(chain[0])
		a.NewSerial, a.NewExpires, a.NewAuthority = "", 0, ""
		return nil
	})
	if err != nil {
		return nil, s.internal("attest agent", err)
	}
	if !who.entry.IsZero() {
		if err := s.grantEntry(ctx, who); err != nil {
			return nil, s.internal("attest agent", err)
		}
	}
	s.log.Info("agent attested", "agent", who.id.String(), "for", who.entry.String(), "from", remoteHost(ctx))
	return &agentv1.AttestAgentResponse_Result{Svid: spiretypes.FromChain(who.id, chain), Reattestable: who.reattest}, nil
}

// grantedEntryID is the ID of the entry that came with an agent's token or pod: of its kind and the last part of /spire/agent/<kind>/….
func grantedEntryID(agent spiffeid.ID) string {
	kind, rest, _ := strings.Cut(strings.TrimPrefix(agent.Path(), "/spire/agent/"), "/")
	if kind == joinToken {
		kind = "token"
	}
	return kind + "." + rest[strings.LastIndexByte(rest, '/')+1:]
}

func (s *agentService) redeem(ctx context.Context, token string, csr *x509.CertificateRequest) (accepted, error) {
	red, err := s.cfg.Tokens.Redeem(ctx, strings.TrimSpace(token), keyHash(csr))
	switch {
	case errors.Is(err, attest.ErrUnknown), errors.Is(err, attest.ErrTampered), errors.Is(err, attest.ErrUsed), errors.Is(err, attest.ErrExpired):
		return accepted{}, tokenRefused{err}
	case err != nil:
		return accepted{}, s.internal("attest agent", err)
	}
	return accepted{id: red.AgentID, entry: red.ID, kind: joinToken}, nil
}

// examine has an Attestor check evidence that can be shown again.
func (s *agentService) examine(ctx context.Context, by attest.Attestor, data *types.AttestationData, challenge attest.Challenge) (accepted, error) {
	ctx, cancel := context.WithTimeout(ctx, examineTimeout)
	defer cancel()
	e, err := by.Attest(ctx, data.Payload, challenge)
	switch st, isStatus := status.FromError(err); {
	case errors.Is(err, attest.ErrRefused):
		return accepted{}, status.Errorf(codes.PermissionDenied, "attest agent by %s: %v", data.Type, err)
	case err != nil && isStatus: // of the stream
		return accepted{}, st.Err()
	case err != nil:
		s.log.Error("cannot check an agent's evidence", "type", data.Type, "error", err)
		return accepted{}, status.Errorf(codes.Unavailable, "attest agent by %s: the evidence cannot be checked now", data.Type)
	}
	out := accepted{id: e.AgentID, entry: e.Entry, kind: data.Type, reattest: true}
	for _, v := range e.Selectors {
		out.selectors = append(out.selectors, selectorRecord{Type: data.Type, Value: v})
	}
	return out, nil
}

// grantEntry gives an agent the one entry that its token or its pod is for.
func (s *agentService) grantEntry(ctx context.Context, who accepted) error {
	entryID := grantedEntryID(who.id)
	_, err := s.reg.putEntry(ctx, entryID, func(cur *entryRecord) (*entryRecord, error) {
		if cur != nil && cur.spiffeID == who.entry && cur.parentID == who.id {
			return cur, nil
		}
		return newEntryRecord(&types.Entry{
			Id:        entryID,
			SpiffeId:  spiretypes.FromID(who.entry),
			ParentId:  spiretypes.FromID(who.id),
			Selectors: []*types.Selector{{Type: "spiffe_id", Value: who.id.String()}},
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
func (s *Server) signError(err error) error {
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
	csr, err := parseAgentCSR(req.GetParams().GetCsr())
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
		n.NewSerial, n.NewExpires, n.NewAuthority = chain[0].SerialNumber.String(), chain[0].NotAfter.Unix(), authorityOf(chain[0])
		return nil
	})
	switch {
	case errors.Is(err, errNoAgent):
		return nil, denied(types.PermissionDeniedDetails_AGENT_NOT_ATTESTED, "agent %s is not attested", a.ID)
	case err != nil:
		return nil, s.unavailable("renew agent", err)
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
	s.mu.Lock()
	defer s.mu.Unlock()
	for id := range s.seen { // that another replica has forgotten
		if s.followed[id] == nil && s.reg.agent(id) == nil {
			delete(s.seen, id)
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
