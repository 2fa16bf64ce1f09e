package join

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/hanse-mesh/hanse/federation"
	"github.com/hanse-mesh/hanse/federation/federationpb"
	"github.com/hanse-mesh/hanse/federation/join/joinpb"
	"github.com/hanse-mesh/hanse/identity"
)

// Check is one fact that a join found, good or bad.
type Check struct {
	Name   string
	OK     bool
	Detail string
	Remedy string
}

// CheckError is a failed Preview.
type CheckError struct{ Failed []Check }

// Error names the failed checks.
func (e *CheckError) Error() string {
	s := "check failed"
	for i, c := range e.Failed {
		if i > 0 {
			s += ";"
		} else {
			s += ":"
		}
		s += " " + c.Name + ": " + c.Detail
	}
	return s
}

// ClientConfig is what a joiner needs.
type ClientConfig struct {
	Source *identity.Source
	Dial   func(ctx context.Context, network, address string) (net.Conn, error) // nil: net.Dialer
	Now    func() time.Time
}

// Client is a connection to the issuer of a mesh token, whose chain and ID have been verified.
type Client struct {
	Issuer  spiffeid.TrustDomain
	Bundle  *spiffebundle.Bundle // the roots that verified: a part of the issuer's bundle, for the time of the join
	Address string               // that answered
	RTT     time.Duration        // of the handshake

	token *Token
	conn  *grpc.ClientConn
	api   joinpb.JoinClient
	now   func() time.Time
}

// Dial connects to the first address of the token that answers with a chain that the token pins. Nothing secret has been sent when it
// returns. Close must be called. A token that has expired by this clock is tried all the same: the issuer's clock decides, and if this one is
// wrong, Preview says so.
func Dial(ctx context.Context, cfg ClientConfig, t *Token) (*Client, error) {
	if cfg.Dial == nil {
		cfg.Dial = (&net.Dialer{}).DialContext
	}
	var errs []error
	for _, address := range t.Addresses {
		c, err := dial(ctx, cfg, t, address)
		if err == nil {
			return c, nil
		}
		errs = append(errs, fmt.Errorf("issuer at %s: %w", address, err))
		if ctx.Err() != nil {
			break
		}
	}
	err := errors.Join(errs...)
	if !errors.Is(err, ErrExpired) && !cfg.Now().Before(t.Expires) {
		return nil, fmt.Errorf("%w by this cluster's clock, at %s, and the issuer cannot be asked: %w", ErrExpired, t.Expires.Format(time.RFC3339), err)
	}
	return nil, err
}

// dial makes the first handshake itself, so that its error can be told, and hands the connection to gRPC.
func dial(ctx context.Context, cfg ClientConfig, t *Token, address string) (*Client, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*probeTime)
	defer cancel()
	c := &Client{Address: address, token: t, now: cfg.Now}
	var verified atomic.Pointer[spiffebundle.Bundle]
	tlsConfig := identity.ClientTLS(cfg.Source, identity.AuthorizeAny(), "h2")
	tlsConfig.ServerName = ServerName
	tlsConfig.VerifyConnection = func(state tls.ConnectionState) error {
		b, err := verifyPinned(state.PeerCertificates, t)
		verified.Store(b)
		return err
	}
	raw, err := cfg.Dial(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	start := time.Now()
	tc := tls.Client(raw, tlsConfig)
	if err := tc.HandshakeContext(ctx); err != nil {
		raw.Close()
		var alert *net.OpError
		if errors.As(err, &alert) && alert.Op == "remote error" { // crypto/tls: the server's alert
			return nil, fmt.Errorf("%w by the issuer's clock, or the issuer has lost it: it has no open mesh token (%w)", ErrExpired, err)
		}
		return nil, err
	}
	c.RTT = time.Since(start)
	c.Bundle = verified.Load()
	c.Issuer = c.Bundle.TrustDomain()

	var first atomic.Pointer[tls.Conn]
	first.Store(tc)
	c.conn, err = grpc.NewClient("passthrough:///"+address,
		grpc.WithTransportCredentials(verifiedTLS{}),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			if tc := first.Swap(nil); tc != nil {
				return tc, nil
			}
			raw, err := cfg.Dial(ctx, "tcp", address)
			if err != nil {
				return nil, err
			}
			tc := tls.Client(raw, tlsConfig)
			if err := tc.HandshakeContext(ctx); err != nil {
				raw.Close()
				return nil, err
			}
			return tc, nil
		}))
	if err != nil {
		tc.Close()
		return nil, err
	}
	c.api = joinpb.NewJoinClient(c.conn)
	return c, nil
}

// verifyPinned accepts a chain that ends in a presented root that the token pins, and that names a control plane.
func verifyPinned(chain []*x509.Certificate, t *Token) (*spiffebundle.Bundle, error) {
	if len(chain) == 0 {
		return nil, errors.New("the server presented no certificate")
	}
	id, err := x509svid.IDFromCert(chain[0])
	if err != nil {
		return nil, err
	}
	b := spiffebundle.New(id.TrustDomain())
	for _, cert := range chain[1:] {
		if slices.Contains(t.Pins, Pin(cert)) {
			b.AddX509Authority(cert)
		}
	}
	if len(b.X509Authorities()) == 0 {
		return nil, errors.New("the server is not the issuer of this mesh token: it has none of the roots that the token pins")
	}
	return b, verifyControlPlane(chain, b)
}

// verifiedTLS passes through connections on which the handshake is done.
type verifiedTLS struct{}

func (verifiedTLS) ClientHandshake(_ context.Context, _ string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	tc := conn.(*tls.Conn)
	return conn, credentials.TLSInfo{
		State: tc.ConnectionState(), CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity},
	}, nil
}

func (verifiedTLS) ServerHandshake(net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("client side only")
}

func (verifiedTLS) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

func (v verifiedTLS) Clone() credentials.TransportCredentials { return v }
func (verifiedTLS) OverrideServerName(string) error           { return nil }

// Close ends the connection.
func (c *Client) Close() error { return c.conn.Close() }

func (c *Client) claim(self federation.Record) *joinpb.Claim {
	return &joinpb.Claim{TokenId: c.token.TokenID(), Secret: c.token.Secret[:], Member: self.Proto(), NowUnixMs: c.now().UnixMilli()}
}

// Preview is what a join would find.
type Preview struct {
	Mesh    string
	Issuer  federation.Record
	Members []string // names
	Expires time.Time
	Checks  []Check
}

// Preview checks both sides and changes nothing. Errors: ErrWrong, ErrUsed, ErrExpired; failed checks are in the result.
func (c *Client) Preview(ctx context.Context, self federation.Record) (*Preview, error) {
	res, err := c.api.Preview(ctx, &joinpb.PreviewRequest{Claim: c.claim(self)})
	if err != nil {
		return nil, c.fail("preview", err)
	}
	issuer, err := c.issuer(res.Issuer.GetTrustDomain(), res.Issuer)
	if err != nil {
		return nil, err
	}
	p := &Preview{Mesh: res.Mesh, Issuer: issuer, Members: res.Members, Expires: time.UnixMilli(res.TokenExpiresUnixMs)}
	for _, k := range res.Checks {
		p.Checks = append(p.Checks, Check{Name: k.Name, OK: k.Ok, Detail: k.Detail, Remedy: k.Remedy})
	}
	p.Checks = append(p.Checks, Check{
		Name: fmt.Sprintf("%s → %s", self.Name, c.Address), OK: true,
		Detail: fmt.Sprintf("mTLS as spiffe://%s/hanse/control-plane, %.1fms", self.TrustDomain, float64(c.RTT.Microseconds())/1000),
	})
	return p, nil
}

// Admission is what a redeemed token yields.
type Admission struct {
	Mesh    string
	Issuer  federation.Record
	Self    federation.Record
	Members []federation.Record
}

// Redeem binds the token to this cluster, which is joining from then on. It may be repeated.
func (c *Client) Redeem(ctx context.Context, self federation.Record) (*Admission, error) {
	res, err := c.api.Redeem(ctx, &joinpb.RedeemRequest{Claim: c.claim(self)})
	if err != nil {
		return nil, c.fail("redeem", err)
	}
	issuer, err := c.issuer(res.Issuer.GetTrustDomain(), res.Issuer)
	if err != nil {
		return nil, err
	}
	a := &Admission{Mesh: res.Mesh, Issuer: issuer}
	if a.Self, err = federation.RecordFromProto(res.Self); err != nil {
		return nil, fmt.Errorf("answer of the issuer: %w", err)
	}
	a.Members, err = records(res.Members)
	return a, err
}

// Confirm makes this cluster a member, and returns its record and those of all others. It may be repeated.
func (c *Client) Confirm(ctx context.Context, memberID string, incarnation uint64) (federation.Record, []federation.Record, error) {
	res, err := c.api.Confirm(ctx, &joinpb.ConfirmRequest{MemberId: memberID, Incarnation: incarnation})
	if err != nil {
		return federation.Record{}, nil, c.fail("confirm", err)
	}
	self, err := federation.RecordFromProto(res.Self)
	if err != nil {
		return self, nil, fmt.Errorf("answer of the issuer: %w", err)
	}
	members, err := records(res.Members)
	return self, members, err
}

func records(pbs []*federationpb.Member) ([]federation.Record, error) {
	if len(pbs) > maxMembers {
		return nil, fmt.Errorf("answer of the issuer: %d members, at most %d are accepted", len(pbs), maxMembers)
	}
	var out []federation.Record
	for _, pb := range pbs {
		r, err := federation.RecordFromProto(pb)
		if err != nil {
			return nil, fmt.Errorf("answer of the issuer: %w", err)
		}
		out = append(out, r)
	}
	return out, nil
}

// issuer checks that the issuer's record is of the trust domain that the handshake proved, with at least one pinned root in its bundle.
func (c *Client) issuer(td string, pb *federationpb.Member) (federation.Record, error) {
	r, err := federation.RecordFromProto(pb)
	if err != nil {
		return r, fmt.Errorf("answer of the issuer: %w", err)
	}
	if td != c.Issuer.Name() {
		return r, fmt.Errorf("the issuer calls itself %s, but its certificate is of %s", td, c.Issuer)
	}
	b, err := parseBundle(td, r.Bundle)
	if err != nil {
		return r, fmt.Errorf("answer of the issuer: %w", err)
	}
	for _, root := range b.X509Authorities() {
		if slices.Contains(c.token.Pins, Pin(root)) {
			return r, nil
		}
	}
	return r, errors.New("answer of the issuer: its bundle has none of the roots that the token pins")
}

// fail names the operation; a token's fault is its own error.
func (c *Client) fail(op string, err error) error {
	if t := tokenErrorOf(err); t != nil {
		return t
	}
	st := status.Convert(err)
	return fmt.Errorf("%s at the issuer %s (%s): %s", op, c.Issuer, c.Address, st.Message())
}

// Fingerprint returns the short form in which people compare roots.
func Fingerprint(root *x509.Certificate) string {
	sum := sha256.Sum256(root.RawSubjectPublicKeyInfo)
	return hex.EncodeToString(sum[:2]) + "…" + hex.EncodeToString(sum[31:])
}

// SayLeft tells one member that this cluster has left. dial connects to it; the chain must be of its control plane by src.
func SayLeft(ctx context.Context, src *identity.Source, dial func(ctx context.Context, network, address string) (net.Conn, error), to, left federation.Record) error {
	td, err := spiffeid.TrustDomainFromString(to.TrustDomain)
	if err != nil {
		return err
	}
	var errs []error
	for _, address := range to.Addresses {
		creds := credentials.NewTLS(identity.ClientTLS(src, identity.AuthorizeID(identity.ControlPlaneID(td)), "h2"))
		conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(creds),
			grpc.WithContextDialer(func(ctx context.Context, a string) (net.Conn, error) { return dial(ctx, "tcp", a) }))
		if err != nil {
			return err
		}
		_, err = joinpb.NewJoinClient(conn).Leave(ctx, &joinpb.LeaveRequest{Member: left.Proto()})
		conn.Close()
		if err == nil {
			return nil
		}
		errs = append(errs, fmt.Errorf("tell cluster %s at %s: %s", to.Name, address, status.Convert(err).Message()))
	}
	return errors.Join(errs...)
}
