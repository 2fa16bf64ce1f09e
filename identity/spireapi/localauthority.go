package spireapi

import (
	"context"
	"errors"
	"strings"

	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hanse-mesh/hanse/identity/ca"
)

// localAuthorityService rotates the roots of this replica, for administrators. A root's X.509 key and JWT key are one
// authority with two names here: what is done to one is done to the other. Upstream authorities are those that others added. WIT-SVIDs are not issued, so theirs are not served.
type localAuthorityService struct {
	localauthorityv1.UnimplementedLocalAuthorityServer
	service
}

// naming is by which of its two names a root is called.
type naming func(ca.Root) string

func x509Name(r ca.Root) string { return r.KeyID }
func jwtName(r ca.Root) string  { return r.JWTKeyID }

func (n naming) state(r *ca.Root) *localauthorityv1.AuthorityState {
	if r == nil {
		return nil
	}
	return &localauthorityv1.AuthorityState{AuthorityId: n(*r), ExpiresAt: r.Expires.Unix()}
}

// inPhase returns the youngest root of a phase, or nil.
func (s *localAuthorityService) inPhase(phase string) *ca.Root {
	var out *ca.Root
	for _, r := range s.cfg.Authority.Roots() {
		if r.Phase == phase {
			out = &r
		}
	}
	return out
}

// show returns the states; SPIRE shows a prepared authority or an old one, not both.
func (s *localAuthorityService) show(ctx context.Context, n naming) (active, prepared, old *localauthorityv1.AuthorityState, err error) {
	if err := s.admin(ctx); err != nil {
		return nil, nil, nil, err
	}
	a := s.inPhase("active")
	if a == nil {
		return nil, nil, nil, status.Error(codes.Unavailable, "server is initializing")
	}
	if p := s.inPhase("prepared"); p != nil {
		return n.state(a), n.state(p), nil, nil
	}
	return n.state(a), nil, n.state(s.inPhase("old")), nil
}

func (s *localAuthorityService) prepare(ctx context.Context, n naming) (*localauthorityv1.AuthorityState, error) {
	if _, _, _, err := s.show(ctx, n); err != nil {
		return nil, err
	}
	if err := s.cfg.Authority.PrepareHeld(); err != nil {
		return nil, s.internal("prepare authority", err)
	}
	return n.state(s.inPhase("prepared")), nil
}

// named returns the root of that name.
func (s *localAuthorityService) named(n naming, id string) *ca.Root {
	for _, r := range s.cfg.Authority.Roots() {
		if n(r) == id {
			return &r
		}
	}
	return nil
}

// activate answers for the active root too: its other half may have been activated a moment ago.
func (s *localAuthorityService) activate(ctx context.Context, n naming, id string) (*localauthorityv1.AuthorityState, error) {
	if err := s.admin(ctx); err != nil {
		return nil, err
	}
	if id == "" {
		return nil, invalid("no authority ID provided")
	}
	r := s.named(n, id)
	switch {
	case r == nil || r.Phase == "old":
		return nil, invalid("unexpected authority ID")
	case r.Phase == "prepared":
		if err := s.cfg.Authority.ActivateRoot(r.KeyID); err != nil && !errors.Is(err, ca.ErrWrongPhase) { // or by Run, meanwhile
			return nil, s.internal("activate authority", err)
		}
	}
	return n.state(r), nil
}

func (s *localAuthorityService) taint(ctx context.Context, n naming, id string) (*localauthorityv1.AuthorityState, error) {
	if err := s.admin(ctx); err != nil {
		return nil, err
	}
	if id == "" {
		return nil, invalid("no authority ID provided")
	}
	r := s.named(n, id)
	switch {
	case r == nil:
		return nil, invalid("unexpected authority ID")
	case r.Phase == "active":
		return nil, invalid("unable to taint current local authority")
	case r.Phase != "old":
		return nil, invalid("only Old local authorities can be tainted: unsupported local authority status: PREPARED")
	}
	if err := s.cfg.Authority.Taint(r.KeyID); err != nil {
		return nil, s.internal("taint authority", err)
	}
	return n.state(r), nil
}

func (s *localAuthorityService) revoke(ctx context.Context, n naming, id, unknown string) (*localauthorityv1.AuthorityState, error) {
	if err := s.admin(ctx); err != nil {
		return nil, err
	}
	r := s.named(n, id)
	switch {
	case id == "":
		return nil, invalid("invalid authority ID: no authority ID provided")
	case r == nil:
		return nil, invalid("invalid authority ID: %s", unknown)
	case r.Phase == "active":
		return nil, invalid("invalid authority ID: unable to use current authority")
	case r.Phase != "old":
		return nil, invalid("invalid authority ID: only Old local authority can be revoked")
	}
	if on := s.RestingOn(r.KeyID); len(on) > 0 {
		return nil, status.Errorf(codes.FailedPrecondition, "%d agents would be shut out, since their own SVIDs rest on this authority: %s; they renew within a few seconds "+
			"once it is tainted (localauthority x509 taint), so revoke it then, or evict those that are gone (agent evict)", len(on), some(on))
	}
	if err := s.cfg.Authority.Revoke(r.KeyID); err != nil {
		return nil, s.internal("revoke authority", err)
	}
	return &localauthorityv1.AuthorityState{AuthorityId: id}, nil
}

// some shows the first few.
func some(names []string) string {
	if len(names) > 3 {
		return strings.Join(names[:3], ", ") + ", …"
	}
	return strings.Join(names, ", ")
}

// TaintX509UpstreamAuthority marks an authority that somebody else brought.
func (s *localAuthorityService) TaintX509UpstreamAuthority(ctx context.Context, req *localauthorityv1.TaintX509UpstreamAuthorityRequest) (*localauthorityv1.TaintX509UpstreamAuthorityResponse, error) {
	if err := s.upstream(ctx, req.SubjectKeyId, s.cfg.Authority.TaintAdded); err != nil {
		return nil, err
	}
	return &localauthorityv1.TaintX509UpstreamAuthorityResponse{UpstreamAuthoritySubjectKeyId: req.SubjectKeyId}, nil
}

// RevokeX509UpstreamAuthority takes an authority that somebody else brought out of the bundle.
func (s *localAuthorityService) RevokeX509UpstreamAuthority(ctx context.Context, req *localauthorityv1.RevokeX509UpstreamAuthorityRequest) (*localauthorityv1.RevokeX509UpstreamAuthorityResponse, error) {
	if err := s.upstream(ctx, req.SubjectKeyId, s.cfg.Authority.RevokeAdded); err != nil {
		return nil, err
	}
	return &localauthorityv1.RevokeX509UpstreamAuthorityResponse{UpstreamAuthoritySubjectKeyId: req.SubjectKeyId}, nil
}

func (s *localAuthorityService) upstream(ctx context.Context, keyID string, do func(keyID string) error) error {
	if err := s.admin(ctx); err != nil {
		return err
	}
	if keyID == "" {
		return invalid("no subject key ID provided")
	}
	if s.named(x509Name, keyID) != nil {
		return status.Errorf(codes.FailedPrecondition, "%s is a local authority, not an upstream one", keyID)
	}
	switch err := do(keyID); {
	case errors.Is(err, ca.ErrUnknownRoot):
		return status.Errorf(codes.NotFound, "no upstream authority has the subject key ID %s", keyID)
	case err != nil:
		return s.internal("change upstream authority", err)
	}
	return nil
}

const noX509, noJWT = "only Old local authority can be revoked", "no JWT authority found with provided authority ID"

// GetX509AuthorityState names the X.509 authorities.
func (s *localAuthorityService) GetX509AuthorityState(ctx context.Context, _ *localauthorityv1.GetX509AuthorityStateRequest) (*localauthorityv1.GetX509AuthorityStateResponse, error) {
	active, prepared, old, err := s.show(ctx, x509Name)
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.GetX509AuthorityStateResponse{Active: active, Prepared: prepared, Old: old}, nil
}

// PrepareX509Authority puts the next authority into the bundle; it waits to be activated.
func (s *localAuthorityService) PrepareX509Authority(ctx context.Context, _ *localauthorityv1.PrepareX509AuthorityRequest) (*localauthorityv1.PrepareX509AuthorityResponse, error) {
	st, err := s.prepare(ctx, x509Name)
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.PrepareX509AuthorityResponse{PreparedAuthority: st}, nil
}

// ActivateX509Authority makes the prepared authority sign.
func (s *localAuthorityService) ActivateX509Authority(ctx context.Context, req *localauthorityv1.ActivateX509AuthorityRequest) (*localauthorityv1.ActivateX509AuthorityResponse, error) {
	st, err := s.activate(ctx, x509Name, req.AuthorityId)
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.ActivateX509AuthorityResponse{ActivatedAuthority: st}, nil
}

// TaintX509Authority has agents renew what the old authority signed.
func (s *localAuthorityService) TaintX509Authority(ctx context.Context, req *localauthorityv1.TaintX509AuthorityRequest) (*localauthorityv1.TaintX509AuthorityResponse, error) {
	st, err := s.taint(ctx, x509Name, req.AuthorityId)
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.TaintX509AuthorityResponse{TaintedAuthority: st}, nil
}

// RevokeX509Authority takes the old authority out of the bundle.
func (s *localAuthorityService) RevokeX509Authority(ctx context.Context, req *localauthorityv1.RevokeX509AuthorityRequest) (*localauthorityv1.RevokeX509AuthorityResponse, error) {
	st, err := s.revoke(ctx, x509Name, req.AuthorityId, noX509)
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.RevokeX509AuthorityResponse{RevokedAuthority: st}, nil
}

// GetJWTAuthorityState names the JWT authorities.
func (s *localAuthorityService) GetJWTAuthorityState(ctx context.Context, _ *localauthorityv1.GetJWTAuthorityStateRequest) (*localauthorityv1.GetJWTAuthorityStateResponse, error) {
	active, prepared, old, err := s.show(ctx, jwtName)
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.GetJWTAuthorityStateResponse{Active: active, Prepared: prepared, Old: old}, nil
}

// PrepareJWTAuthority puts the next authority into the bundle; it waits to be activated.
func (s *localAuthorityService) PrepareJWTAuthority(ctx context.Context, _ *localauthorityv1.PrepareJWTAuthorityRequest) (*localauthorityv1.PrepareJWTAuthorityResponse, error) {
	st, err := s.prepare(ctx, jwtName)
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.PrepareJWTAuthorityResponse{PreparedAuthority: st}, nil
}

// ActivateJWTAuthority makes the prepared authority sign.
func (s *localAuthorityService) ActivateJWTAuthority(ctx context.Context, req *localauthorityv1.ActivateJWTAuthorityRequest) (*localauthorityv1.ActivateJWTAuthorityResponse, error) {
	st, err := s.activate(ctx, jwtName, req.AuthorityId)
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.ActivateJWTAuthorityResponse{ActivatedAuthority: st}, nil
}

// TaintJWTAuthority has agents renew what the old authority signed.
func (s *localAuthorityService) TaintJWTAuthority(ctx context.Context, req *localauthorityv1.TaintJWTAuthorityRequest) (*localauthorityv1.TaintJWTAuthorityResponse, error) {
	st, err := s.taint(ctx, jwtName, req.AuthorityId)
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.TaintJWTAuthorityResponse{TaintedAuthority: st}, nil
}

// RevokeJWTAuthority takes the old authority out of the bundle.
func (s *localAuthorityService) RevokeJWTAuthority(ctx context.Context, req *localauthorityv1.RevokeJWTAuthorityRequest) (*localauthorityv1.RevokeJWTAuthorityResponse, error) {
	st, err := s.revoke(ctx, jwtName, req.AuthorityId, noJWT)
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.RevokeJWTAuthorityResponse{RevokedAuthority: st}, nil
}
