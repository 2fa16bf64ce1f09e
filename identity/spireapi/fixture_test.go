package spireapi_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"io"
	"net"
	"net/url"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/identity/attest"
	"github.com/hanse-mesh/hanse/identity/bundle"
	"github.com/hanse-mesh/hanse/identity/ca"
	"github.com/hanse-mesh/hanse/identity/spireapi"
	"github.com/hanse-mesh/hanse/identity/spiretypes"
)

var (
	west     = spiffeid.RequireTrustDomainFromString("west.demo")
	east     = spiffeid.RequireTrustDomainFromString("east.demo")
	frontend = spiffeid.RequireFromString("spiffe://west.demo/ns/shop/sa/frontend")
	serverID = identity.SPIREServerID(west)
)

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantCode(t *testing.T, what string, err error, want codes.Code) {
	t.Helper()
	if status.Code(err) != want {
		t.Errorf("%s: %v, want %s", what, err, want)
	}
}

// fixture is a server on bufconn and its clock.
type fixture struct {
	t         *testing.T
	authority *ca.Authority
	bundles   *bundle.Store
	tokens    *attest.Tokens
	kv        *attest.Memory
	api       *spireapi.Server
	lis       *bufconn.Listener
	admin     *client

	mu     sync.Mutex
	offset time.Duration // guarded by mu
}

func (f *fixture) now() time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	return time.Now().Add(f.offset)
}

func (f *fixture) advance(d time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.offset += d
}

func newFixture(t *testing.T, edit ...func(*spireapi.Config)) *fixture {
	t.Helper()
	f := &fixture{t: t, kv: attest.NewMemory()}
	var err error
	f.authority, err = ca.Open(ca.Config{Dir: t.TempDir(), TrustDomain: west, Now: f.now})
	check(t, err)
	f.bundles, err = bundle.Open(bundle.Config{TrustDomain: west})
	check(t, err)
	f.tokens = attest.New(west, f.kv, f.now)
	cfg := spireapi.Config{Authority: f.authority, Bundles: f.bundles, Tokens: f.tokens, KV: f.kv, AgentLife: time.Hour, Now: f.now}
	for _, e := range edit {
		e(&cfg)
	}
	f.api, err = spireapi.New(t.Context(), cfg)
	check(t, err)
	f.lis = serve(t, grpc.NewServer(append(f.api.ServerOptions(), grpc.Creds(credentials.NewTLS(f.api.TLSConfig())))...), f.api.RegisterAgent)
	adminLis := serve(t, grpc.NewServer(f.api.ServerOptions()...), f.api.RegisterAdmin)
	f.admin = newClient(t, adminLis, insecure.NewCredentials())
	return f
}

func serve(t *testing.T, g *grpc.Server, register func(grpc.ServiceRegistrar)) *bufconn.Listener {
	t.Helper()
	lis := bufconn.Listen(1 << 20)
	register(g)
	done := make(chan error, 1)
	go func() { done <- g.Serve(lis) }()
	t.Cleanup(func() {
		g.Stop()
		check(t, <-done)
	})
	return lis
}

// client is all five services over one connection.
type client struct {
	agentv1.AgentClient
	svidv1.SVIDClient
	entryv1.EntryClient
	bundlev1.BundleClient
	trustdomainv1.TrustDomainClient
	conn *grpc.ClientConn
	svid *x509svid.SVID
}

func newClient(t *testing.T, lis *bufconn.Listener, creds credentials.TransportCredentials) *client {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///server", grpc.WithTransportCredentials(creds),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }))
	check(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	return &client{conn: conn, AgentClient: agentv1.NewAgentClient(conn), SVIDClient: svidv1.NewSVIDClient(conn), EntryClient: entryv1.NewEntryClient(conn),
		BundleClient: bundlev1.NewBundleClient(conn), TrustDomainClient: trustdomainv1.NewTrustDomainClient(conn)}
}

// connect connects by TLS as a stock agent does, with an SVID or without.
func (f *fixture) connect(svid *x509svid.SVID) *client {
	f.t.Helper()
	cfg := &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}, VerifyConnection: func(s tls.ConnectionState) error {
		id, _, err := x509svid.Verify(s.PeerCertificates, f.authority.Bundle(), x509svid.WithTime(f.now()))
		if err == nil && id != serverID {
			err = fmt.Errorf("server is %s", id)
		}
		return err
	}}
	if svid != nil {
		cert := tls.Certificate{PrivateKey: svid.PrivateKey}
		for _, c := range svid.Certificates {
			cert.Certificate = append(cert.Certificate, c.Raw)
		}
		cfg.Certificates = []tls.Certificate{cert}
	}
	c := newClient(f.t, f.lis, credentials.NewTLS(cfg))
	c.svid = svid
	return c
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(t, err)
	return key
}

func csr(t testing.TB, key crypto.Signer, ids ...string) []byte {
	t.Helper()
	template := &x509.CertificateRequest{}
	for _, id := range ids {
		u, err := url.Parse(id)
		check(t, err)
		template.URIs = append(template.URIs, u)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	check(t, err)
	return der
}

func csrWith(t testing.TB, edit func(*x509.CertificateRequest)) []byte {
	t.Helper()
	template := &x509.CertificateRequest{}
	edit(template)
	der, err := x509.CreateCertificateRequest(rand.Reader, template, newKey(t))
	check(t, err)
	return der
}

// askForCA asks for basic constraints with the CA bit.
func askForCA(r *x509.CertificateRequest) {
	r.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 19}, Critical: true, Value: []byte{0x30, 0x03, 0x01, 0x01, 0xff}}}
}

func (c *client) attest(ctx context.Context, kind, token string, csr []byte) (*agentv1.AttestAgentResponse_Result, error) {
	stream, err := c.AttestAgent(ctx)
	if err != nil {
		return nil, err
	}
	req := &agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
		Data: &types.AttestationData{Type: kind, Payload: []byte(token)}, Params: &agentv1.AgentX509SVIDParams{Csr: csr}}}}
	if err := stream.Send(req); err != nil && err != io.EOF {
		return nil, err
	}
	resp, err := stream.Recv()
	return resp.GetResult(), err
}

func svidOf(t testing.TB, p *types.X509SVID, key crypto.Signer) *x509svid.SVID {
	t.Helper()
	chain, err := spiretypes.ToChain(p)
	check(t, err)
	id, err := x509svid.IDFromCert(chain[0])
	check(t, err)
	return &x509svid.SVID{ID: id, Certificates: chain, PrivateKey: key}
}

// agent attests one with a token for id and returns its client.
func (f *fixture) agent(id spiffeid.ID) *client {
	f.t.Helper()
	token, _, err := f.tokens.Create(f.t.Context(), attest.Grant{ID: id}, 0)
	check(f.t, err)
	key := newKey(f.t)
	result, err := f.connect(nil).attest(f.t.Context(), "join_token", token, csr(f.t, key))
	check(f.t, err)
	if result.Reattestable {
		f.t.Error("a token's agent can attest again")
	}
	return f.connect(svidOf(f.t, result.Svid, key))
}

func (f *fixture) federate(td spiffeid.TrustDomain) *ca.Authority {
	f.t.Helper()
	a, err := ca.Open(ca.Config{Dir: f.t.TempDir(), TrustDomain: td})
	check(f.t, err)
	check(f.t, f.bundles.Relate(bundle.Relation{TrustDomain: td}))
	check(f.t, f.bundles.Set(td, a.Bundle(), "join"))
	return a
}

func reason(err error) types.PermissionDeniedDetails_Reason {
	for _, d := range status.Convert(err).Details() {
		if d, ok := d.(*types.PermissionDeniedDetails); ok {
			return d.Reason
		}
	}
	return types.PermissionDeniedDetails_UNKNOWN
}
