package join

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/hanse-mesh/hanse/federation"
	"github.com/hanse-mesh/hanse/federation/join/joinpb"
	"github.com/hanse-mesh/hanse/identity"
)

// MaxClockSkew is how far the clocks of two clusters may be apart at a join.
const MaxClockSkew = 30 * time.Second

// ServerName is the SNI of a connection to the join service. Only under it does the federation port accept clients of trust domains that
// are not federated; such a connection reaches no other service.
const ServerName = "join.hanse.mesh"

// ReplicaName is the SNI of a connection between replicas of one control plane.
const ReplicaName = "replica.hanse.mesh"

const (
	tokenPath   = "mesh/v1/tokens/"
	bindingPath = "mesh/v1/bindings/"
	probeTime   = 5 * time.Second
)

// KV is the issuer's own store.
type KV interface {
	// Get returns the value of a key, or nil.
	Get(ctx context.Context, key string) ([]byte, error)
	Put(ctx context.Context, key string, value []byte) error
	// PutIfAbsent reports whether it wrote, in one transaction.
	PutIfAbsent(ctx context.Context, key string, value []byte) (bool, error)
	Delete(ctx context.Context, key string) error
	List(ctx context.Context, prefix string) (map[string][]byte, error)
}

// Registry is the membership to which a Server admits.
type Registry interface {
	// Own returns the issuer's record, with its bundle.
	Own() federation.Record
	// Clash says why a record cannot be added, or nil.
	Clash(federation.Record) error
	// Members returns the names of all members, the issuer included, sorted.
	Members() []string
	// Admit records a cluster as joining, and returns its record and those of all others. It may be repeated.
	Admit(ctx context.Context, r federation.Record) (self federation.Record, others []federation.Record, err error)
	// Confirm makes it a member. It may be repeated. A member ID or incarnation that is not joining is an error.
	Confirm(ctx context.Context, memberID string, incarnation uint64) (self federation.Record, others []federation.Record, err error)
	// Known returns the record of a member, joining ones included.
	Known(memberID string) (federation.Record, bool)
	// Departed takes a member's own word that it has left.
	Departed(ctx context.Context, r federation.Record) error
}

// Config is what a Server needs.
type Config struct {
	KV       KV
	Registry Registry
	Source   *identity.Source
	Dial     func(ctx context.Context, network, address string) (net.Conn, error) // for the reverse probe; nil: net.Dialer
	Log      *slog.Logger
	Now      func() time.Time
	Rate     float64 // calls of strangers per second; 0 is 5
}

// Server issues mesh tokens and serves hanse.join.v1.
type Server struct {
	joinpb.UnimplementedJoinServer
	cfg   Config
	limit bucket
	open  openTokens
}

// NewServer returns a Server. Load must be called before it is used.
func NewServer(cfg Config) *Server {
	if cfg.Rate == 0 {
		cfg.Rate = 5
	}
	if cfg.Dial == nil {
		cfg.Dial = (&net.Dialer{Timeout: probeTime}).DialContext
	}
	return &Server{cfg: cfg, limit: bucket{rate: cfg.Rate, burst: 10 * cfg.Rate}}
}

// openTokens is when the last open token expires.
type openTokens struct {
	mu   sync.Mutex
	till time.Time
}

// Open reports whether a mesh token is open, so that strangers may speak to the join service.
func (s *Server) Open() bool {
	s.open.mu.Lock()
	defer s.open.mu.Unlock()
	return s.cfg.Now().Before(s.open.till)
}

func (s *Server) opened(till time.Time) {
	s.open.mu.Lock()
	defer s.open.mu.Unlock()
	if till.After(s.open.till) {
		s.open.till = till
	}
}

// Load reads the open tokens of an earlier run, or of another replica.
func (s *Server) Load(ctx context.Context) error {
	return s.each(ctx, func(_ string, expires time.Time) error {
		s.opened(expires)
		return nil
	})
}

// Sweep forgets tokens that expired more than a day ago; so long they are kept, to tell "expired" from "wrong".
func (s *Server) Sweep(ctx context.Context) error {
	return s.each(ctx, func(id string, expires time.Time) error {
		if s.cfg.Now().Sub(expires) < 24*time.Hour {
			return nil
		}
		if err := errors.Join(s.cfg.KV.Delete(ctx, bindingPath+id), s.cfg.KV.Delete(ctx, tokenPath+id)); err != nil {
			return fmt.Errorf("forget mesh token %s: %w", id, err)
		}
		return nil
	})
}

func (s *Server) each(ctx context.Context, f func(id string, expires time.Time) error) error {
	tokens, err := s.cfg.KV.List(ctx, tokenPath)
	if err != nil {
		return fmt.Errorf("list mesh tokens: %w", err)
	}
	for key, value := range tokens {
		id := strings.TrimPrefix(key, tokenPath)
		st := &joinpb.StoredToken{}
		if err := proto.Unmarshal(value, st); err != nil {
			return fmt.Errorf("decode mesh token %s: %w", id, err)
		}
		if err := f(id, time.UnixMilli(st.ExpiresUnixMs)); err != nil {
			return err
		}
	}
	return nil
}

// CreateToken makes a token with which the cluster named forName may join until life (0 is TokenLife) from now.
func (s *Server) CreateToken(ctx context.Context, forName string, life time.Duration) (*Token, error) {
	if life <= 0 {
		life = TokenLife
	}
	own := s.cfg.Registry.Own()
	b, err := parseBundle(own.TrustDomain, own.Bundle)
	if err != nil {
		return nil, fmt.Errorf("this cluster's own bundle: %w", err)
	}
	if err := s.Sweep(ctx); err != nil { // so that old ones do not pile up
		return nil, err
	}
	t, err := NewToken(s.cfg.Now().Add(life), own.Addresses, b.X509Authorities())
	if err != nil {
		return nil, err
	}
	value, err := proto.Marshal(&joinpb.StoredToken{SecretSha256: hash(t.Secret[:]), ForName: forName, ExpiresUnixMs: t.Expires.UnixMilli()})
	if err != nil {
		return nil, err
	}
	if err := s.cfg.KV.Put(ctx, tokenPath+t.TokenID(), value); err != nil {
		return nil, fmt.Errorf("store %s: %w", t, err)
	}
	s.opened(t.Expires)
	s.cfg.Log.Info("mesh token created", "token", t, "for", forName, "expires", t.Expires)
	return t, nil
}

// claim is a checked Claim.
type claim struct {
	token   *joinpb.StoredToken
	tokenID string
	record  federation.Record
	bundle  *spiffebundle.Bundle
	bound   bool // to this very joiner
}

// check verifies who calls and that the token serves it. Its errors are gRPC statuses.
func (s *Server) check(ctx context.Context, pb *joinpb.Claim) (*claim, error) {
	if !s.limit.allow(s.cfg.Now()) {
		return nil, status.Error(codes.ResourceExhausted, "too many join attempts; try again in a few seconds")
	}
	r, err := federation.RecordFromProto(pb.GetMember())
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	b, err := parseBundle(r.TrustDomain, r.Bundle)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	chain, err := callerChain(ctx)
	if err != nil {
		return nil, status.Error(codes.Unauthenticated, err.Error())
	}
	if err := verifyControlPlane(chain, b); err != nil {
		return nil, status.Errorf(codes.PermissionDenied, "the client certificate does not verify against the bundle in the request: %v", err)
	}

	if known, ok := s.cfg.Registry.Known(r.ID); ok { // the ID is its holder's, whatever token the caller has
		if held, err := parseBundle(known.TrustDomain, known.Bundle); err != nil || verifyControlPlane(chain, held) != nil {
			return nil, status.Errorf(codes.PermissionDenied, "member %.8s is cluster %s, and the client certificate is not of its trust domain's bundle", r.ID, known.Name)
		}
	}

	c := &claim{tokenID: pb.TokenId, record: r, bundle: b}
	if id, err := hex.DecodeString(pb.TokenId); err != nil || len(id) != idSize {
		return nil, tokenError(ErrWrong)
	}
	value, err := s.cfg.KV.Get(ctx, tokenPath+c.tokenID)
	if err != nil {
		return nil, status.Errorf(codes.Unavailable, "read mesh token %s: %v", c.tokenID, err)
	}
	c.token = &joinpb.StoredToken{}
	if value == nil || proto.Unmarshal(value, c.token) != nil || !sameHash(hash(pb.Secret), c.token.SecretSha256) {
		return nil, tokenError(ErrWrong)
	}
	value, err = s.cfg.KV.Get(ctx, bindingPath+c.tokenID)
	if err != nil {
		return nil, status.Errorf(codes.Unavailable, "read mesh token %s: %v", c.tokenID, err)
	}
	if value != nil {
		if err := s.sameJoiner(value, c, chain); err != nil {
			return nil, err
		}
		c.bound = true
	}
	if !s.cfg.Now().Before(time.UnixMilli(c.token.ExpiresUnixMs)) {
		return nil, tokenError(ErrExpired)
	}
	if c.token.ForName != "" && c.token.ForName != r.Name {
		return nil, status.Errorf(codes.PermissionDenied, "this mesh token is for a cluster named %q, not %q", c.token.ForName, r.Name)
	}
	return c, nil
}

// sameJoiner accepts the joiner to which a token is bound: the member ID, and a client certificate of the bundle that it gave then (its
// bundle may have grown by a root since).
func (s *Server) sameJoiner(value []byte, c *claim, chain []*x509.Certificate) error {
	bound := &joinpb.Binding{}
	if err := proto.Unmarshal(value, bound); err != nil {
		return status.Errorf(codes.Internal, "binding of mesh token %s: %v", c.tokenID, err)
	}
	b, err := parseBundle(c.record.TrustDomain, bound.Bundle)
	if bound.MemberId != c.record.ID || err != nil || verifyControlPlane(chain, b) != nil {
		return tokenError(ErrUsed)
	}
	return nil
}

// Preview implements joinpb.JoinServer.
func (s *Server) Preview(ctx context.Context, req *joinpb.PreviewRequest) (*joinpb.PreviewResponse, error) {
	c, err := s.check(ctx, req.GetClaim())
	if err != nil {
		return nil, err
	}
	own := s.cfg.Registry.Own()
	expires := time.UnixMilli(c.token.ExpiresUnixMs)
	res := &joinpb.PreviewResponse{
		Mesh: own.Mesh, Members: s.cfg.Registry.Members(), TokenExpiresUnixMs: c.token.ExpiresUnixMs,
		Issuer: own.Proto(),
	}
	add := func(name string, err error, detail, remedy string) {
		check := &joinpb.Check{Name: name, Ok: err == nil, Detail: detail}
		if err != nil {
			check.Detail, check.Remedy = err.Error(), remedy
		}
		res.Checks = append(res.Checks, check)
	}
	add("token valid", nil, fmt.Sprintf("%s left, pins %s's bundle", expires.Sub(s.cfg.Now()).Truncate(time.Second), own.Name), "")
	add("names free", s.cfg.Registry.Clash(c.record), fmt.Sprintf("cluster %q, trust domain %q", c.record.Name, c.record.TrustDomain),
		"give this cluster another name or trust domain, or let the holder leave: hanse leave --force "+c.record.Name)
	skew := s.cfg.Now().Sub(time.UnixMilli(req.Claim.NowUnixMs)).Abs()
	add("clocks agree", checkSkew(skew), fmt.Sprintf("%.1fs apart", skew.Seconds()), "set both clocks by NTP")
	detail, err := compatible(c.record.Version, own.Version)
	add("versions agree", err, detail, "upgrade the older cluster first")
	address, rtt, err := s.reverseProbe(ctx, c)
	add(fmt.Sprintf("%s → %s", own.Name, strings.Join(c.record.Addresses, " ")), err,
		fmt.Sprintf("mTLS at %s, %.1fms", address, float64(rtt.Microseconds())/1000),
		fmt.Sprintf("%s cannot open connections to this cluster's federation address. Open the port, or give an address that %s can reach: hansed --federation-advertise HOST:PORT", own.Name, own.Name))
	return res, nil
}

func checkSkew(skew time.Duration) error {
	if skew > MaxClockSkew {
		return fmt.Errorf("%.1fs apart, at most %s", skew.Seconds(), MaxClockSkew)
	}
	return nil
}

// compatible holds for versions of the same major and neighbouring minor numbers.
func compatible(a, b string) (string, error) {
	majorA, minorA, okA := version(a)
	majorB, minorB, okB := version(b)
	switch {
	case a == b:
		return a + " everywhere", nil
	case okA && okB && (majorA != majorB || minorA > minorB+1 || minorB > minorA+1):
		return "", fmt.Errorf("%s here, %s there: more than one minor version apart", a, b)
	}
	return fmt.Sprintf("%s here, %s there", a, b), nil
}

func version(s string) (major, minor int, ok bool) {
	p := strings.SplitN(strings.TrimPrefix(s, "v"), ".", 3)
	if len(p) < 2 {
		return 0, 0, false
	}
	major, err1 := strconv.Atoi(p[0])
	minor, err2 := strconv.Atoi(p[1])
	return major, minor, err1 == nil && err2 == nil
}

// reverseProbe makes one mTLS handshake with the joiner, at the first of its addresses that answers.
func (s *Server) reverseProbe(ctx context.Context, c *claim) (address string, rtt time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, probeTime)
	defer cancel()
	if len(c.record.Addresses) == 0 {
		return "", 0, errors.New("the cluster advertises no federation address")
	}
	var errs []error
	for _, a := range c.record.Addresses {
		rtt, err := Probe(ctx, ProbeConfig{
			Dial: s.cfg.Dial, Source: s.cfg.Source, Address: a, ServerName: ProbeName(c.record.ID), Verify: func(chain []*x509.Certificate) error {
				return verifyControlPlane(chain, c.bundle)
			},
		})
		if err == nil {
			return a, rtt, nil
		}
		errs = append(errs, err)
	}
	return "", 0, errors.Join(errs...)
}

// Redeem implements joinpb.JoinServer.
func (s *Server) Redeem(ctx context.Context, req *joinpb.RedeemRequest) (*joinpb.RedeemResponse, error) {
	c, err := s.check(ctx, req.GetClaim())
	if err != nil {
		return nil, err
	}
	if err := s.cfg.Registry.Clash(c.record); err != nil {
		return nil, status.Error(codes.AlreadyExists, err.Error())
	}
	if err := checkSkew(s.cfg.Now().Sub(time.UnixMilli(req.Claim.NowUnixMs)).Abs()); err != nil {
		return nil, status.Errorf(codes.FailedPrecondition, "clocks: %v", err)
	}
	if !c.bound {
		value, err := proto.Marshal(&joinpb.Binding{MemberId: c.record.ID, Bundle: c.record.Bundle})
		if err != nil {
			return nil, status.Error(codes.Internal, err.Error())
		}
		won, err := s.cfg.KV.PutIfAbsent(ctx, bindingPath+c.tokenID, value)
		if err != nil {
			return nil, status.Errorf(codes.Unavailable, "bind mesh token %s: %v", c.tokenID, err)
		}
		if !won { // somebody was faster; it may have been this joiner
			if c, err = s.check(ctx, req.GetClaim()); err != nil {
				return nil, err
			}
		}
	}
	c.record.Expires = time.UnixMilli(c.token.ExpiresUnixMs).UTC()
	self, others, err := s.cfg.Registry.Admit(ctx, c.record)
	if err != nil {
		return nil, status.Error(codes.FailedPrecondition, err.Error())
	}
	own := s.cfg.Registry.Own()
	res := &joinpb.RedeemResponse{Mesh: own.Mesh, Issuer: own.Proto(), Self: self.Proto()}
	for _, o := range others {
		res.Members = append(res.Members, o.Proto())
	}
	s.cfg.Log.Info("mesh token redeemed", "token", c.tokenID, "cluster", c.record.Name, "member", c.record.ID)
	return res, nil
}

// Confirm implements joinpb.JoinServer. The caller is known by the bundle with which it was admitted.
func (s *Server) Confirm(ctx context.Context, req *joinpb.ConfirmRequest) (*joinpb.ConfirmResponse, error) {
	if !s.limit.allow(s.cfg.Now()) {
		return nil, status.Error(codes.ResourceExhausted, "too many join attempts; try again in a few seconds")
	}
	if err := s.authenticate(ctx, req.MemberId); err != nil {
		return nil, err
	}
	self, others, err := s.cfg.Registry.Confirm(ctx, req.MemberId, req.Incarnation)
	if err != nil {
		return nil, status.Error(codes.FailedPrecondition, err.Error())
	}
	res := &joinpb.ConfirmResponse{Self: self.Proto()}
	for _, o := range others {
		res.Members = append(res.Members, o.Proto())
	}
	return res, nil
}

// Leave implements joinpb.JoinServer.
func (s *Server) Leave(ctx context.Context, req *joinpb.LeaveRequest) (*joinpb.LeaveResponse, error) {
	r, err := federation.RecordFromProto(req.GetMember())
	if err != nil || r.Standing != federation.Left {
		return nil, status.Errorf(codes.InvalidArgument, "not a left record: %v", err)
	}
	if err := s.authenticate(ctx, r.ID); err != nil {
		return nil, err
	}
	if err := s.cfg.Registry.Departed(ctx, r); err != nil {
		return nil, status.Error(codes.FailedPrecondition, err.Error())
	}
	return &joinpb.LeaveResponse{}, nil
}

// authenticate accepts the control plane of a known member, by the bundle of its record.
func (s *Server) authenticate(ctx context.Context, memberID string) error {
	chain, err := callerChain(ctx)
	if err != nil {
		return status.Error(codes.Unauthenticated, err.Error())
	}
	r, ok := s.cfg.Registry.Known(memberID)
	if !ok {
		return status.Errorf(codes.FailedPrecondition, "member %.8s is not known here: redeem the mesh token first", memberID)
	}
	b, err := parseBundle(r.TrustDomain, r.Bundle)
	if err == nil {
		err = verifyControlPlane(chain, b)
	}
	if err != nil {
		return status.Errorf(codes.PermissionDenied, "caller is not the control plane of cluster %s: %v", r.Name, err)
	}
	return nil
}

// callerChain returns the client certificates of an RPC, whose key the handshake has proven. They are not verified yet.
func callerChain(ctx context.Context) ([]*x509.Certificate, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil, errors.New("no peer")
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok || len(info.State.PeerCertificates) == 0 {
		return nil, errors.New("no client certificate")
	}
	return info.State.PeerCertificates, nil
}

// parseBundle reads a bundle in SPIFFE JSON.
func parseBundle(trustDomain string, data []byte) (*spiffebundle.Bundle, error) {
	td, err := spiffeid.TrustDomainFromString(trustDomain)
	if err != nil {
		return nil, err
	}
	b, err := spiffebundle.Parse(td, data)
	if err != nil {
		return nil, fmt.Errorf("bundle of %s: %w", td, err)
	}
	if len(b.X509Authorities()) == 0 {
		return nil, fmt.Errorf("bundle of %s has no X.509 authority", td)
	}
	return b, nil
}

// verifyControlPlane checks that a chain verifies against a bundle and names the control plane of its trust domain.
func verifyControlPlane(chain []*x509.Certificate, b *spiffebundle.Bundle) error {
	id, err := identity.Verify(chain, b, time.Now())
	if err != nil {
		return err
	}
	if want := identity.ControlPlaneID(b.TrustDomain()); id != want {
		return fmt.Errorf("it is %s, want %s", id, want)
	}
	return nil
}

const reasonDomain = "hanse.mesh"

// tokenError is a status that tokenErrorOf turns back.
func tokenError(err error) error {
	st := status.New(codes.PermissionDenied, err.Error())
	for reason, e := range tokenReasons() {
		if errors.Is(err, e) {
			if d, derr := st.WithDetails(&errdetails.ErrorInfo{Reason: reason, Domain: reasonDomain}); derr == nil {
				st = d
			}
		}
	}
	return st.Err()
}

func tokenReasons() map[string]error {
	return map[string]error{"TOKEN_WRONG": ErrWrong, "TOKEN_USED": ErrUsed, "TOKEN_EXPIRED": ErrExpired}
}

// tokenErrorOf returns ErrWrong, ErrUsed or ErrExpired if that is what a status says, else nil.
func tokenErrorOf(err error) error {
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok && info.Domain == reasonDomain {
			return tokenReasons()[info.Reason]
		}
	}
	return nil
}

// bucket is a token bucket.
type bucket struct {
	rate, burst float64

	mu   sync.Mutex
	used float64
	last time.Time
}

func (b *bucket) allow(now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.used = max(0, b.used-now.Sub(b.last).Seconds()*b.rate)
	b.last = now
	if b.used+1 > b.burst {
		return false
	}
	b.used++
	return true
}
