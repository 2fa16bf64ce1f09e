package spireapi_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"io"
	"net"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
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
	"google.golang.org/protobuf/types/known/wrapperspb"

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

// The sequence of a stock spire-agent v1.13.
func TestStockAgentSequence(t *testing.T) {
	f := newFixture(t)
	ctx := t.Context()
	eastCA := f.federate(east)
	token, _, err := f.tokens.Create(ctx, attest.Grant{ID: frontend}, 0)
	check(t, err)

	anonymous := f.connect(nil)
	key := newKey(t)
	result, err := anonymous.attest(ctx, "join_token", token, csr(t, key))
	check(t, err)
	agentID, err := spiretypes.ToID(result.Svid.Id)
	check(t, err)
	if !strings.HasPrefix(agentID.String(), "spiffe://west.demo/spire/agent/join_token/") || strings.Contains(agentID.String(), token[5:15]) {
		t.Errorf("agent ID %s", agentID)
	}
	own, err := anonymous.GetBundle(ctx, &bundlev1.GetBundleRequest{})
	check(t, err)
	b, err := spiretypes.ToBundle(own)
	check(t, err)
	if !b.Equal(f.authority.Bundle()) {
		t.Error("another bundle")
	}

	a := f.connect(svidOf(t, result.Svid, key))
	mask := &types.EntryMask{SpiffeId: true, Selectors: true, FederatesWith: true, Admin: true, Downstream: true, RevisionNumber: true, StoreSvid: true, Hint: true, CreatedAt: true}
	entries := a.sync(t, mask)
	if len(entries) != 1 {
		t.Fatalf("%d entries", len(entries))
	}
	e := entries[0]
	if id, err := spiretypes.ToID(e.SpiffeId); err != nil || id != frontend || !slices.Equal(e.FederatesWith, []string{"east.demo"}) || e.ParentId != nil || len(e.Selectors) != 1 || e.CreatedAt == 0 {
		t.Errorf("entry %v", e)
	}
	fed, err := a.GetFederatedBundle(ctx, &bundlev1.GetFederatedBundleRequest{TrustDomain: "east.demo"})
	check(t, err)
	if b, err := spiretypes.ToBundle(fed); err != nil || !b.Equal(eastCA.Bundle()) {
		t.Errorf("east's bundle differs: %v", err)
	}
	_, err = a.GetFederatedBundle(ctx, &bundlev1.GetFederatedBundleRequest{TrustDomain: "north.demo"})
	wantCode(t, "a bundle that is not there", err, codes.NotFound)

	workloadKey := newKey(t)
	resp, err := a.BatchNewX509SVID(ctx, &svidv1.BatchNewX509SVIDRequest{Params: []*svidv1.NewX509SVIDParams{{EntryId: e.Id, Csr: csr(t, workloadKey, frontend.String())}}})
	check(t, err)
	if s := resp.Results[0].Status; s.Code != int32(codes.OK) {
		t.Fatalf("status %v", s)
	}
	svid := svidOf(t, resp.Results[0].Svid, workloadKey)
	if id, _, err := x509svid.Verify(svid.Certificates, f.authority.Bundle()); err != nil || id != frontend {
		t.Errorf("SVID of %v, %v", id, err)
	}
	jwt, err := a.NewJWTSVID(ctx, &svidv1.NewJWTSVIDRequest{EntryId: e.Id, Audience: []string{"payments"}})
	check(t, err)
	if s, err := jwtsvid.ParseAndValidate(jwt.Svid.Token, f.authority.Bundle(), []string{"payments"}); err != nil || s.ID != frontend {
		t.Errorf("JWT-SVID %v, %v", s, err)
	}

	// Renewed: the old SVID is good until the new one is used.
	newAgentKey := newKey(t)
	renewed, err := a.RenewAgent(ctx, &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: csr(t, newAgentKey)}})
	check(t, err)
	a.sync(t, mask)
	b2 := f.connect(svidOf(t, renewed.Svid, newAgentKey))
	b2.sync(t, mask)
	_, err = a.GetAuthorizedEntries(ctx, &entryv1.GetAuthorizedEntriesRequest{})
	if reason(err) != types.PermissionDeniedDetails_AGENT_NOT_ACTIVE {
		t.Errorf("the old SVID after the new one was used: %v", err)
	}

	// A related trust domain more is a new revision of the entry.
	f.federate(spiffeid.RequireTrustDomainFromString("north.demo"))
	again := b2.sync(t, mask)
	if len(again[0].FederatesWith) != 2 || again[0].RevisionNumber <= e.RevisionNumber {
		t.Errorf("federates with %v, revision %d after %d", again[0].FederatesWith, again[0].RevisionNumber, e.RevisionNumber)
	}
}

// sync calls SyncAuthorizedEntries as spire-agent does.
func (c *client) sync(t *testing.T, mask *types.EntryMask) []*types.Entry {
	t.Helper()
	stream, err := c.SyncAuthorizedEntries(t.Context())
	check(t, err)
	check(t, stream.Send(&entryv1.SyncAuthorizedEntriesRequest{OutputMask: mask}))
	resp, err := stream.Recv()
	check(t, err)
	if len(resp.EntryRevisions) == 0 {
		check(t, stream.CloseSend())
		return resp.Entries
	}
	var ids []string
	for {
		for _, r := range resp.EntryRevisions {
			ids = append(ids, r.Id)
		}
		if !resp.More {
			break
		}
		resp, err = stream.Recv()
		check(t, err)
	}
	var out []*types.Entry
	for len(ids) > 0 { // spire-agent asks in steps, too
		n := min(len(ids), 600)
		check(t, stream.Send(&entryv1.SyncAuthorizedEntriesRequest{Ids: ids[:n]}))
		ids = ids[n:]
		for more := true; more; {
			resp, err := stream.Recv()
			check(t, err)
			out = append(out, resp.Entries...)
			more = resp.More
		}
	}
	check(t, stream.CloseSend())
	if _, err := stream.Recv(); err != io.EOF {
		t.Errorf("the stream ends with %v", err)
	}
	return out
}

func TestAttestationRefusals(t *testing.T) {
	f := newFixture(t)
	ctx := t.Context()
	c := f.connect(nil)
	token := func() string {
		tok, _, err := f.tokens.Create(ctx, attest.Grant{ID: frontend}, time.Minute)
		check(t, err)
		return tok
	}
	used, good := token(), token()
	_, err := c.attest(ctx, "join_token", used, csr(t, newKey(t)))
	check(t, err)
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	check(t, err)
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	check(t, err)
	broken := csr(t, newKey(t))
	broken[len(broken)-5] ^= 1
	for name, c2 := range map[string]struct {
		kind, token string
		csr         []byte
		code        codes.Code
		want        string
	}{
		"used":          {"join_token", used, csr(t, newKey(t)), codes.InvalidArgument, "used already"},
		"tampered":      {"join_token", good[:20] + flip(good[20:21]) + good[21:], csr(t, newKey(t)), codes.InvalidArgument, "damaged"},
		"wrong":         {"join_token", "c0ffee00-0000-0000-0000-000000000000", csr(t, newKey(t)), codes.InvalidArgument, "not one of"},
		"empty":         {"join_token", "", csr(t, newKey(t)), codes.InvalidArgument, "not one of"},
		"another kind":  {"aws_iid", good, csr(t, newKey(t)), codes.FailedPrecondition, "aws_iid"},
		"no CSR":        {"join_token", good, nil, codes.InvalidArgument, "missing CSR"},
		"noise":         {"join_token", good, []byte("noise"), codes.InvalidArgument, "malformed CSR"},
		"bad signature": {"join_token", good, broken, codes.InvalidArgument, "CSR"},
		"a huge CSR":    {"join_token", good, make([]byte, 1<<20), codes.InvalidArgument, "larger than"},
		"P-224":         {"join_token", good, csr(t, p224), codes.InvalidArgument, "P-224"},
		"Ed25519":       {"join_token", good, csr(t, edKey), codes.InvalidArgument, "ed25519"},
	} {
		_, err := c.attest(ctx, c2.kind, c2.token, c2.csr)
		if status.Code(err) != c2.code || !strings.Contains(err.Error(), c2.want) {
			t.Errorf("%s: %v, want %s with %q", name, err, c2.code, c2.want)
		}
	}
	// None of these used the token up.
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	check(t, err)
	if _, err = c.attest(ctx, "join_token", good, csr(t, rsaKey)); err != nil {
		t.Error(err)
	}
	expired := token()
	f.advance(2 * time.Minute)
	if _, err = f.connect(nil).attest(ctx, "join_token", expired, csr(t, newKey(t))); status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "expired") {
		t.Errorf("expired: %v", err)
	}
}

func TestAttestationIsRateLimited(t *testing.T) {
	f := newFixture(t, func(c *spireapi.Config) { c.AttestBurst, c.AttestsPerSecond = 3, 1 })
	c := f.connect(nil)
	der := csr(t, newKey(t))
	for range 3 {
		_, err := c.attest(t.Context(), "join_token", "a-guess-and-another", der)
		wantCode(t, "a guess", err, codes.InvalidArgument)
	}
	_, err := c.attest(t.Context(), "join_token", "a-guess-and-another", der)
	wantCode(t, "one guess more", err, codes.ResourceExhausted)
	f.advance(2 * time.Second)
	_, err = c.attest(t.Context(), "join_token", "a-guess-and-another", der)
	wantCode(t, "later", err, codes.InvalidArgument)
}

// Who may call what. Whatever a caller is not named for is refused.
func TestAuthorization(t *testing.T) {
	f := newFixture(t)
	ctx := t.Context()
	f.federate(east)
	agent := f.agent(frontend)
	entry := agent.sync(t, nil)[0]
	workloadSVID, err := f.authority.NewSVID(frontend, 0)
	check(t, err)
	adminID, err := identity.AdminID(west, "anna")
	check(t, err)
	adminSVID, err := f.authority.NewSVID(adminID, 0)
	check(t, err)
	callers := map[string]*client{"anonymous": f.connect(nil), "agent": agent, "workload": f.connect(workloadSVID), "admin": f.connect(adminSVID), "local": f.admin}
	adminOnly := []string{"admin", "local"}

	for name, m := range map[string]struct {
		call func(c *client) error
		may  []string
	}{
		"GetBundle": {func(c *client) error { _, err := c.GetBundle(ctx, &bundlev1.GetBundleRequest{}); return err }, []string{"anonymous", "agent", "workload", "admin", "local"}},
		"GetFederatedBundle": {func(c *client) error {
			_, err := c.GetFederatedBundle(ctx, &bundlev1.GetFederatedBundleRequest{TrustDomain: "east.demo"})
			return err
		}, []string{"agent", "admin", "local"}},
		"GetAuthorizedEntries": {func(c *client) error {
			_, err := c.GetAuthorizedEntries(ctx, &entryv1.GetAuthorizedEntriesRequest{})
			return err
		}, []string{"agent"}},
		"SyncAuthorizedEntries": {func(c *client) error {
			s, err := c.SyncAuthorizedEntries(ctx)
			if err == nil {
				_ = s.Send(&entryv1.SyncAuthorizedEntriesRequest{})
				_, err = s.Recv()
			}
			return err
		}, []string{"agent"}},
		"BatchNewX509SVID": {func(c *client) error {
			_, err := c.BatchNewX509SVID(ctx, &svidv1.BatchNewX509SVIDRequest{Params: []*svidv1.NewX509SVIDParams{{EntryId: entry.Id, Csr: csr(t, newKey(t))}}})
			return err
		}, []string{"agent"}},
		"NewJWTSVID": {func(c *client) error {
			_, err := c.NewJWTSVID(ctx, &svidv1.NewJWTSVIDRequest{EntryId: entry.Id, Audience: []string{"x"}})
			return err
		}, []string{"agent"}},
		"RenewAgent": {func(c *client) error {
			_, err := c.RenewAgent(ctx, &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: csr(t, newKey(t))}})
			return err
		}, []string{"agent"}},
		"PostStatus": {func(c *client) error { _, err := c.PostStatus(ctx, &agentv1.PostStatusRequest{}); return err }, []string{"agent"}},
		"MintX509SVID": {func(c *client) error {
			_, err := c.MintX509SVID(ctx, &svidv1.MintX509SVIDRequest{Csr: csr(t, newKey(t), "spiffe://west.demo/x")})
			return err
		}, adminOnly},
		"MintJWTSVID": {func(c *client) error {
			_, err := c.MintJWTSVID(ctx, &svidv1.MintJWTSVIDRequest{Id: spiretypes.FromID(frontend), Audience: []string{"x"}})
			return err
		}, adminOnly},
		"CreateJoinToken": {func(c *client) error {
			_, err := c.CreateJoinToken(ctx, &agentv1.CreateJoinTokenRequest{Ttl: 60})
			return err
		}, adminOnly},
		"ListAgents":  {func(c *client) error { _, err := c.ListAgents(ctx, &agentv1.ListAgentsRequest{}); return err }, adminOnly},
		"CountAgents": {func(c *client) error { _, err := c.CountAgents(ctx, &agentv1.CountAgentsRequest{}); return err }, adminOnly},
		"GetAgent": {func(c *client) error {
			_, err := c.GetAgent(ctx, &agentv1.GetAgentRequest{Id: spiretypes.FromID(agent.svid.ID)})
			return err
		}, adminOnly},
		"ListEntries":  {func(c *client) error { _, err := c.ListEntries(ctx, &entryv1.ListEntriesRequest{}); return err }, adminOnly},
		"CountEntries": {func(c *client) error { _, err := c.CountEntries(ctx, &entryv1.CountEntriesRequest{}); return err }, adminOnly},
		"GetEntry":     {func(c *client) error { _, err := c.GetEntry(ctx, &entryv1.GetEntryRequest{Id: entry.Id}); return err }, adminOnly},
		"BatchCreateEntry": {func(c *client) error {
			_, err := c.BatchCreateEntry(ctx, &entryv1.BatchCreateEntryRequest{})
			return err
		}, adminOnly},
		"BatchUpdateEntry": {func(c *client) error {
			_, err := c.BatchUpdateEntry(ctx, &entryv1.BatchUpdateEntryRequest{})
			return err
		}, adminOnly},
		"BatchDeleteEntry": {func(c *client) error {
			_, err := c.BatchDeleteEntry(ctx, &entryv1.BatchDeleteEntryRequest{})
			return err
		}, adminOnly},
		"CountBundles": {func(c *client) error { _, err := c.CountBundles(ctx, &bundlev1.CountBundlesRequest{}); return err }, adminOnly},
		"ListFederatedBundles": {func(c *client) error {
			_, err := c.ListFederatedBundles(ctx, &bundlev1.ListFederatedBundlesRequest{})
			return err
		}, adminOnly},
		"BatchCreateFederatedBundle": {func(c *client) error {
			_, err := c.BatchCreateFederatedBundle(ctx, &bundlev1.BatchCreateFederatedBundleRequest{})
			return err
		}, adminOnly},
		"BatchUpdateFederatedBundle": {func(c *client) error {
			_, err := c.BatchUpdateFederatedBundle(ctx, &bundlev1.BatchUpdateFederatedBundleRequest{})
			return err
		}, adminOnly},
		"BatchSetFederatedBundle": {func(c *client) error {
			_, err := c.BatchSetFederatedBundle(ctx, &bundlev1.BatchSetFederatedBundleRequest{})
			return err
		}, adminOnly},
		"BatchDeleteFederatedBundle": {func(c *client) error {
			_, err := c.BatchDeleteFederatedBundle(ctx, &bundlev1.BatchDeleteFederatedBundleRequest{})
			return err
		}, adminOnly},
		"ListFederationRelationships": {func(c *client) error {
			_, err := c.ListFederationRelationships(ctx, &trustdomainv1.ListFederationRelationshipsRequest{})
			return err
		}, adminOnly},
		"BatchCreateFederationRelationship": {func(c *client) error {
			_, err := c.BatchCreateFederationRelationship(ctx, &trustdomainv1.BatchCreateFederationRelationshipRequest{})
			return err
		}, adminOnly},
		"BatchUpdateFederationRelationship": {func(c *client) error {
			_, err := c.BatchUpdateFederationRelationship(ctx, &trustdomainv1.BatchUpdateFederationRelationshipRequest{})
			return err
		}, adminOnly},
		"BatchDeleteFederationRelationship": {func(c *client) error {
			_, err := c.BatchDeleteFederationRelationship(ctx, &trustdomainv1.BatchDeleteFederationRelationshipRequest{})
			return err
		}, adminOnly},
	} {
		for who, c := range callers {
			err := m.call(c)
			if slices.Contains(m.may, who) {
				if err != nil {
					t.Errorf("%s by %s: %v", name, who, err)
				}
				continue
			}
			if code := status.Code(err); code != codes.PermissionDenied && code != codes.Unauthenticated {
				t.Errorf("%s by %s: %v", name, who, err)
			}
		}
	}
	for name, call := range map[string]func(c *client) error{
		"GetFederationRelationship": func(c *client) error {
			_, err := c.GetFederationRelationship(ctx, &trustdomainv1.GetFederationRelationshipRequest{TrustDomain: "x.demo"})
			return err
		},
		"RefreshBundle": func(c *client) error {
			_, err := c.RefreshBundle(ctx, &trustdomainv1.RefreshBundleRequest{TrustDomain: "x.demo"})
			return err
		},
		"BanAgent": func(c *client) error {
			_, err := c.BanAgent(ctx, &agentv1.BanAgentRequest{Id: spiretypes.FromID(frontend)})
			return err
		},
		"DeleteAgent": func(c *client) error {
			_, err := c.DeleteAgent(ctx, &agentv1.DeleteAgentRequest{Id: spiretypes.FromID(frontend)})
			return err
		},
	} {
		for who, c := range callers {
			want := codes.NotFound
			if !slices.Contains(adminOnly, who) {
				want = codes.PermissionDenied
			}
			if code := status.Code(call(c)); code != want && (want != codes.PermissionDenied || code != codes.Unauthenticated) {
				t.Errorf("%s by %s: %s", name, who, code)
			}
		}
	}
	for name, call := range map[string]func(c *client) error{ // for downstream servers, which none of these is
		"NewDownstreamX509CA": func(c *client) error {
			_, err := c.NewDownstreamX509CA(ctx, &svidv1.NewDownstreamX509CARequest{Csr: csr(t, newKey(t))})
			return err
		},
		"PublishJWTAuthority": func(c *client) error {
			_, err := c.PublishJWTAuthority(ctx, &bundlev1.PublishJWTAuthorityRequest{})
			return err
		},
	} {
		for who, c := range callers {
			if code := status.Code(call(c)); code != codes.PermissionDenied && code != codes.Unauthenticated {
				t.Errorf("%s by %s: %s", name, who, code)
			}
		}
	}
	for who, c := range callers {
		_, err := c.AppendBundle(ctx, &bundlev1.AppendBundleRequest{})
		want := codes.InvalidArgument // there is nothing to append
		if !slices.Contains(adminOnly, who) {
			want = codes.PermissionDenied
		}
		if code := status.Code(err); code != want && (want != codes.PermissionDenied || code != codes.Unauthenticated) {
			t.Errorf("AppendBundle by %s: %s", who, code)
		}
	}
}

// Another trust domain's SVID, be it of an administrator or an agent, opens nothing here.
func TestForeignCallers(t *testing.T) {
	f := newFixture(t)
	eastCA := f.federate(east)
	admin, err := identity.AdminID(east, "eve")
	check(t, err)
	svid, err := eastCA.NewSVID(admin, 0)
	check(t, err)
	if _, err := f.connect(svid).ListAgents(t.Context(), &agentv1.ListAgentsRequest{}); err == nil {
		t.Error("a foreign administrator is served")
	}
	// The same name by another authority.
	impostor, err := ca.Open(ca.Config{Dir: t.TempDir(), TrustDomain: west})
	check(t, err)
	admin, err = identity.AdminID(west, "eve")
	check(t, err)
	svid, err = impostor.NewSVID(admin, 0)
	check(t, err)
	if _, err := f.connect(svid).ListAgents(t.Context(), &agentv1.ListAgentsRequest{}); err == nil {
		t.Error("an impostor is served")
	}
}

// Connections outlive certificates, bans and roots; each call is checked.
func TestOpenConnections(t *testing.T) {
	ctx := t.Context()
	call := func(c *client) error {
		_, err := c.GetAuthorizedEntries(ctx, &entryv1.GetAuthorizedEntriesRequest{})
		return err
	}
	t.Run("expired", func(t *testing.T) {
		f := newFixture(t)
		a := f.agent(frontend)
		check(t, call(a))
		f.advance(2 * time.Hour)
		if err := call(a); reason(err) != types.PermissionDeniedDetails_AGENT_EXPIRED {
			t.Error(err)
		}
	})
	t.Run("banned", func(t *testing.T) {
		f := newFixture(t)
		a := f.agent(frontend)
		check(t, call(a))
		_, err := f.admin.BanAgent(ctx, &agentv1.BanAgentRequest{Id: spiretypes.FromID(a.svid.ID)})
		check(t, err)
		if err := call(a); reason(err) != types.PermissionDeniedDetails_AGENT_BANNED {
			t.Error(err)
		}
	})
	t.Run("deleted", func(t *testing.T) {
		f := newFixture(t)
		a := f.agent(frontend)
		check(t, call(a))
		_, err := f.admin.DeleteAgent(ctx, &agentv1.DeleteAgentRequest{Id: spiretypes.FromID(a.svid.ID)})
		check(t, err)
		if err := call(a); reason(err) != types.PermissionDeniedDetails_AGENT_NOT_ATTESTED {
			t.Error(err)
		}
		if n, err := f.admin.CountEntries(ctx, &entryv1.CountEntriesRequest{}); err != nil || n.Count != 0 {
			t.Errorf("%v entries left, %v", n, err)
		}
	})
	t.Run("root withdrawn", func(t *testing.T) {
		var mu sync.Mutex
		var own *spiffebundle.Bundle
		f := newFixture(t, func(c *spireapi.Config) {
			authority := c.Authority
			c.OwnBundle = func() *spiffebundle.Bundle {
				mu.Lock()
				defer mu.Unlock()
				if own != nil {
					return own
				}
				return authority.Bundle()
			}
		})
		a := f.agent(frontend)
		check(t, call(a))
		other, err := ca.Open(ca.Config{Dir: t.TempDir(), TrustDomain: west})
		check(t, err)
		mu.Lock()
		own = other.Bundle()
		mu.Unlock()
		if err := call(a); reason(err) != types.PermissionDeniedDetails_AGENT_NOT_ATTESTED {
			t.Error(err)
		}
	})
}

func TestSigningRefusals(t *testing.T) {
	f := newFixture(t)
	ctx := t.Context()
	a := f.agent(frontend)
	other := f.agent(spiffeid.RequireFromString("spiffe://west.demo/ns/shop/sa/payments"))
	mine, theirs := a.sync(t, nil)[0].Id, other.sync(t, nil)[0].Id
	weak, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	check(t, err)
	for name, c := range map[string]struct {
		entry string
		csr   []byte
		code  codes.Code
	}{
		"another agent's entry": {theirs, csr(t, newKey(t)), codes.NotFound},
		"no such entry":         {"x", csr(t, newKey(t)), codes.NotFound},
		"no entry":              {"", csr(t, newKey(t)), codes.InvalidArgument},
		"another ID":            {mine, csr(t, newKey(t), "spiffe://west.demo/ns/shop/sa/payments"), codes.InvalidArgument},
		"two IDs":               {mine, csr(t, newKey(t), frontend.String(), frontend.String()), codes.InvalidArgument},
		"DNS names":             {mine, csrWith(t, func(r *x509.CertificateRequest) { r.DNSNames = []string{"bank.example"} }), codes.InvalidArgument},
		"IP addresses":          {mine, csrWith(t, func(r *x509.CertificateRequest) { r.IPAddresses = []net.IP{{10, 0, 0, 1}} }), codes.InvalidArgument},
		"email addresses":       {mine, csrWith(t, func(r *x509.CertificateRequest) { r.EmailAddresses = []string{"eve@bank.example"} }), codes.InvalidArgument},
		"a CA's certificate":    {mine, csrWith(t, askForCA), codes.InvalidArgument},
		"P-521":                 {mine, csr(t, weak, frontend.String()), codes.InvalidArgument},
		"only the key":          {mine, csr(t, newKey(t)), codes.OK},
	} {
		resp, err := a.BatchNewX509SVID(ctx, &svidv1.BatchNewX509SVIDRequest{Params: []*svidv1.NewX509SVIDParams{{EntryId: c.entry, Csr: c.csr}}})
		check(t, err)
		if got := codes.Code(resp.Results[0].Status.Code); got != c.code || (resp.Results[0].Svid != nil) != (c.code == codes.OK) {
			t.Errorf("%s: %v", name, resp.Results[0])
		}
	}
	_, err = a.NewJWTSVID(ctx, &svidv1.NewJWTSVIDRequest{EntryId: theirs, Audience: []string{"x"}})
	wantCode(t, "another agent's JWT-SVID", err, codes.NotFound)
	_, err = a.NewJWTSVID(ctx, &svidv1.NewJWTSVIDRequest{EntryId: mine})
	wantCode(t, "no audience", err, codes.InvalidArgument)

	for _, id := range []string{"spiffe://west.demo/hanse/admin/eve", "spiffe://west.demo/hanse/control-plane", "spiffe://west.demo/spire/server", "spiffe://west.demo", "spiffe://east.demo/x"} {
		_, err := f.admin.MintX509SVID(ctx, &svidv1.MintX509SVIDRequest{Csr: csr(t, newKey(t), id)})
		wantCode(t, "minting "+id, err, codes.InvalidArgument)
		_, err = f.admin.MintJWTSVID(ctx, &svidv1.MintJWTSVIDRequest{Id: spiretypes.FromID(spiffeid.RequireFromString(id)), Audience: []string{"x"}})
		wantCode(t, "minting a JWT for "+id, err, codes.InvalidArgument)
		_, err = f.admin.CreateJoinToken(ctx, &agentv1.CreateJoinTokenRequest{Ttl: 60, AgentId: spiretypes.FromID(spiffeid.RequireFromString(id))})
		wantCode(t, "a token for "+id, err, codes.InvalidArgument)
		resp, err := f.admin.BatchCreateEntry(ctx, &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{entry(id, a.svid.ID.String())}})
		check(t, err)
		if got := codes.Code(resp.Results[0].Status.Code); got != codes.InvalidArgument {
			t.Errorf("an entry for %s: %s", id, got)
		}
	}
	minted, err := f.admin.MintX509SVID(ctx, &svidv1.MintX509SVIDRequest{Csr: csr(t, newKey(t), "spiffe://west.demo/tool"), Ttl: 60})
	check(t, err)
	if left := time.Until(time.Unix(minted.Svid.ExpiresAt, 0)); left > time.Minute || left < 50*time.Second {
		t.Errorf("minted for %v", left)
	}
}

func entry(id, parent string, selectors ...string) *types.Entry {
	e := &types.Entry{SpiffeId: spiretypes.FromID(spiffeid.RequireFromString(id)), ParentId: spiretypes.FromID(spiffeid.RequireFromString(parent))}
	if len(selectors) == 0 {
		selectors = []string{"unix:uid:1000"}
	}
	for _, s := range selectors {
		kind, value, _ := strings.Cut(s, ":")
		e.Selectors = append(e.Selectors, &types.Selector{Type: kind, Value: value})
	}
	return e
}

func TestEntries(t *testing.T) {
	f := newFixture(t)
	ctx := t.Context()
	create := func(entries ...*types.Entry) []*entryv1.BatchCreateEntryResponse_Result {
		t.Helper()
		resp, err := f.admin.BatchCreateEntry(ctx, &entryv1.BatchCreateEntryRequest{Entries: entries})
		check(t, err)
		return resp.Results
	}
	token, err := f.admin.CreateJoinToken(ctx, &agentv1.CreateJoinTokenRequest{Ttl: 60})
	check(t, err)
	key := newKey(t)
	result, err := f.connect(nil).attest(ctx, "join_token", token.Value, csr(t, key))
	check(t, err)
	a := f.connect(svidOf(t, result.Svid, key))
	if n := len(a.sync(t, nil)); n != 0 {
		t.Fatalf("a plain join token gives %d entries", n)
	}
	node := a.svid.ID.String()

	results := create(entry("spiffe://west.demo/web", node), entry("spiffe://west.demo/web", node), entry("spiffe://west.demo/db", "spiffe://west.demo/web", "unix:uid:2", "unix:gid:3"))
	for i, want := range []codes.Code{codes.OK, codes.AlreadyExists, codes.OK} {
		if got := codes.Code(results[i].Status.Code); got != want || results[i].Entry == nil {
			t.Errorf("entry %d: %s", i, got)
		}
	}
	web, db := results[0].Entry, results[2].Entry
	if results[1].Entry.Id != web.Id || web.CreatedAt == 0 {
		t.Errorf("a similar entry is %v", results[1].Entry)
	}
	if n := len(a.sync(t, nil)); n != 2 { // db is below web
		t.Errorf("%d entries", n)
	}

	bad := map[string]*types.Entry{
		"no selectors":         {SpiffeId: web.SpiffeId, ParentId: web.ParentId},
		"a colon":              {SpiffeId: web.SpiffeId, ParentId: web.ParentId, Selectors: []*types.Selector{{Type: "a:b", Value: "c"}}},
		"no parent":            {SpiffeId: web.SpiffeId, Selectors: web.Selectors},
		"a foreign parent":     entry("spiffe://west.demo/x", "spiffe://east.demo/spire/agent/x"),
		"a negative TTL":       {SpiffeId: web.SpiffeId, ParentId: web.ParentId, Selectors: web.Selectors, X509SvidTtl: -1},
		"federates with self":  {SpiffeId: web.SpiffeId, ParentId: web.ParentId, Selectors: web.Selectors, FederatesWith: []string{"west.demo"}},
		"federates with noise": {SpiffeId: web.SpiffeId, ParentId: web.ParentId, Selectors: web.Selectors, FederatesWith: []string{"a b"}},
		"a bad DNS name":       {SpiffeId: web.SpiffeId, ParentId: web.ParentId, Selectors: web.Selectors, DnsNames: []string{"a..b"}},
		"a bad ID":             {Id: "a/b", SpiffeId: web.SpiffeId, ParentId: web.ParentId, Selectors: web.Selectors},
		"nothing":              nil,
	}
	for name, e := range bad {
		if r := create(e)[0]; codes.Code(r.Status.Code) != codes.InvalidArgument || r.Entry != nil {
			t.Errorf("%s: %v", name, r)
		}
	}

	t.Run("update", func(t *testing.T) {
		resp, err := f.admin.BatchUpdateEntry(ctx, &entryv1.BatchUpdateEntryRequest{InputMask: &types.EntryMask{DnsNames: true, X509SvidTtl: true, FederatesWith: true},
			Entries: []*types.Entry{{Id: web.Id, DnsNames: []string{"web.shop", "*.web.shop"}, X509SvidTtl: 30, FederatesWith: []string{"east.demo"}}, {Id: "none"}}})
		check(t, err)
		if got := codes.Code(resp.Results[1].Status.Code); got != codes.NotFound {
			t.Errorf("an entry that is not there: %s", got)
		}
		e := resp.Results[0].Entry
		if e.RevisionNumber != web.RevisionNumber+1 || e.CreatedAt != web.CreatedAt || len(e.Selectors) != 1 {
			t.Errorf("updated to %v", e)
		}
		svid, err := a.BatchNewX509SVID(ctx, &svidv1.BatchNewX509SVIDRequest{Params: []*svidv1.NewX509SVIDParams{{EntryId: web.Id, Csr: csr(t, newKey(t))}}})
		check(t, err)
		leaf := svidOf(t, svid.Results[0].Svid, nil).Certificates[0]
		if !slices.Equal(leaf.DNSNames, []string{"web.shop", "*.web.shop"}) || time.Until(leaf.NotAfter) > 30*time.Second {
			t.Errorf("DNS names %v, ends in %v", leaf.DNSNames, time.Until(leaf.NotAfter))
		}
		resp, err = f.admin.BatchUpdateEntry(ctx, &entryv1.BatchUpdateEntryRequest{InputMask: &types.EntryMask{SpiffeId: true},
			Entries: []*types.Entry{{Id: web.Id, SpiffeId: spiretypes.FromID(identity.ControlPlaneID(west))}}})
		check(t, err)
		if got := codes.Code(resp.Results[0].Status.Code); got != codes.InvalidArgument {
			t.Errorf("an update to a reserved ID: %s", got)
		}
	})
	t.Run("aliases", func(t *testing.T) { // a node alias, by the agent's selectors, which a token's agent has none of
		create(entry("spiffe://west.demo/nodes/all", serverID.String(), "k8s:cluster:x"), entry("spiffe://west.demo/job", "spiffe://west.demo/nodes/all"))
		if n := len(a.sync(t, nil)); n != 2 {
			t.Errorf("%d entries", n)
		}
	})
	t.Run("expired", func(t *testing.T) {
		e := entry("spiffe://west.demo/batch", node)
		e.ExpiresAt = time.Now().Add(time.Minute).Unix()
		create(e)
		if n := len(a.sync(t, nil)); n != 3 {
			t.Errorf("%d entries", n)
		}
		f.advance(2 * time.Minute)
		if n := len(a.sync(t, nil)); n != 2 {
			t.Errorf("%d entries after the end of one", n)
		}
	})
	t.Run("filters and pages", func(t *testing.T) {
		all, err := f.admin.ListEntries(ctx, &entryv1.ListEntriesRequest{})
		check(t, err)
		var paged []string
		for token := ""; ; {
			p, err := f.admin.ListEntries(ctx, &entryv1.ListEntriesRequest{PageSize: 2, PageToken: token, OutputMask: &types.EntryMask{}})
			check(t, err)
			for _, e := range p.Entries {
				paged = append(paged, e.Id)
				if e.SpiffeId != nil {
					t.Error("the output mask does not mask")
				}
			}
			if token = p.NextPageToken; token == "" {
				break
			}
		}
		if len(paged) != len(all.Entries) || len(paged) != 5 {
			t.Errorf("%d entries in pages, %d at once", len(paged), len(all.Entries))
		}
		type filter = entryv1.CountEntriesRequest_Filter
		for name, c := range map[string]struct {
			f    *filter
			want int32
		}{
			"by ID":           {&filter{BySpiffeId: web.SpiffeId}, 1},
			"by parent":       {&filter{ByParentId: web.ParentId}, 2},
			"exactly":         {&filter{BySelectors: &types.SelectorMatch{Selectors: db.Selectors}}, 1},
			"subset":          {&filter{BySelectors: &types.SelectorMatch{Selectors: append(slices.Clone(db.Selectors), web.Selectors...), Match: types.SelectorMatch_MATCH_SUBSET}}, 4},
			"superset":        {&filter{BySelectors: &types.SelectorMatch{Selectors: db.Selectors[:1], Match: types.SelectorMatch_MATCH_SUPERSET}}, 1},
			"any":             {&filter{BySelectors: &types.SelectorMatch{Selectors: []*types.Selector{db.Selectors[0], web.Selectors[0]}, Match: types.SelectorMatch_MATCH_ANY}}, 4},
			"federates":       {&filter{ByFederatesWith: &types.FederatesWithMatch{TrustDomains: []string{"east.demo"}}}, 1},
			"not downstream":  {&filter{ByDownstream: wrapperspb.Bool(false)}, 5},
			"downstream":      {&filter{ByDownstream: wrapperspb.Bool(true)}, 0},
			"a hint there is": {&filter{ByHint: wrapperspb.String("x")}, 0},
		} {
			if n, err := f.admin.CountEntries(ctx, &entryv1.CountEntriesRequest{Filter: c.f}); err != nil || n.Count != c.want {
				t.Errorf("%s: %v, %v, want %d", name, n, err, c.want)
			}
		}
	})
	t.Run("restart", func(t *testing.T) {
		again, err := spireapi.New(ctx, spireapi.Config{Authority: f.authority, Bundles: f.bundles, Tokens: f.tokens, KV: f.kv, Now: f.now})
		check(t, err)
		c := newClient(t, serve(t, grpc.NewServer(), again.RegisterAdmin), insecure.NewCredentials())
		got, err := c.GetEntry(ctx, &entryv1.GetEntryRequest{Id: web.Id})
		check(t, err)
		if want, err := f.admin.GetEntry(ctx, &entryv1.GetEntryRequest{Id: web.Id}); err != nil || got.String() != want.String() {
			t.Errorf("%v, want %v, %v", got, want, err)
		}
		if n, err := c.CountAgents(ctx, &agentv1.CountAgentsRequest{Filter: &agentv1.CountAgentsRequest_Filter{ByAttestationType: "join_token", ByBanned: wrapperspb.Bool(false)}}); err != nil || n.Count != 1 {
			t.Errorf("%v agents, %v", n, err)
		}
	})
	t.Run("delete", func(t *testing.T) {
		resp, err := f.admin.BatchDeleteEntry(ctx, &entryv1.BatchDeleteEntryRequest{Ids: []string{web.Id, web.Id}})
		check(t, err)
		if codes.Code(resp.Results[0].Status.Code) != codes.OK || codes.Code(resp.Results[1].Status.Code) != codes.NotFound {
			t.Errorf("%v", resp.Results)
		}
		if n := len(a.sync(t, nil)); n != 0 {
			t.Errorf("%d entries", n)
		}
		_, err = f.admin.GetEntry(ctx, &entryv1.GetEntryRequest{Id: web.Id})
		wantCode(t, "the deleted entry", err, codes.NotFound)
	})
}

// An entry with the admin flag makes an administrator.
func TestAdminEntry(t *testing.T) {
	f := newFixture(t)
	a := f.agent(frontend)
	ops := entry("spiffe://west.demo/ops", a.svid.ID.String())
	ops.Admin = true
	resp, err := f.admin.BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{ops}})
	check(t, err)
	svid, err := f.authority.NewSVID(spiffeid.RequireFromString("spiffe://west.demo/ops"), 0)
	check(t, err)
	c := f.connect(svid)
	_, err = c.CountAgents(t.Context(), &agentv1.CountAgentsRequest{})
	check(t, err)
	_, err = f.admin.BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{resp.Results[0].Entry.Id}})
	check(t, err)
	_, err = c.CountAgents(t.Context(), &agentv1.CountAgentsRequest{})
	wantCode(t, "after the entry is gone", err, codes.PermissionDenied)
}

func TestManyEntries(t *testing.T) {
	f := newFixture(t)
	a := f.agent(frontend)
	var batch []*types.Entry
	for i := range 1200 {
		batch = append(batch, entry(fmt.Sprintf("spiffe://west.demo/w/%d", i), a.svid.ID.String()))
		if len(batch) == 400 {
			_, err := f.admin.BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: batch})
			check(t, err)
			batch = nil
		}
	}
	got := map[string]bool{}
	for _, e := range a.sync(t, &types.EntryMask{SpiffeId: true}) {
		got[e.SpiffeId.Path] = true
	}
	if len(got) != 1201 {
		t.Errorf("%d entries arrive", len(got))
	}
}

func TestFederatedBundles(t *testing.T) {
	f := newFixture(t)
	ctx := t.Context()
	authority := func(td spiffeid.TrustDomain) *types.Bundle {
		a, err := ca.Open(ca.Config{Dir: t.TempDir(), TrustDomain: td})
		check(t, err)
		p, err := spiretypes.FromBundle(a.Bundle())
		check(t, err)
		return p
	}
	eastBundle := authority(east)
	set, err := f.admin.BatchSetFederatedBundle(ctx, &bundlev1.BatchSetFederatedBundleRequest{Bundle: []*types.Bundle{eastBundle, authority(west), {TrustDomain: "north.demo"}, {TrustDomain: "a b"},
		{TrustDomain: "north.demo", X509Authorities: []*types.X509Certificate{{Asn1: []byte("noise")}}}, {TrustDomain: "north.demo", X509Authorities: eastBundle.X509Authorities}}})
	check(t, err)
	for i, r := range set.Results {
		want := codes.InvalidArgument
		if i == 0 {
			want = codes.OK
		}
		if codes.Code(r.Status.Code) != want {
			t.Errorf("bundle %d: %v", i, r.Status)
		}
	}
	if _, ok := f.bundles.Related(spiffeid.RequireTrustDomainFromString("north.demo")); ok {
		t.Error("a refused bundle makes a relation")
	}
	created, err := f.admin.BatchCreateFederatedBundle(ctx, &bundlev1.BatchCreateFederatedBundleRequest{Bundle: []*types.Bundle{eastBundle}})
	check(t, err)
	if codes.Code(created.Results[0].Status.Code) != codes.AlreadyExists {
		t.Errorf("created again: %v", created.Results[0].Status)
	}
	updated, err := f.admin.BatchUpdateFederatedBundle(ctx, &bundlev1.BatchUpdateFederatedBundleRequest{Bundle: []*types.Bundle{{TrustDomain: "east.demo", RefreshHint: 60}, {TrustDomain: "north.demo"}},
		InputMask: &types.BundleMask{RefreshHint: true}})
	check(t, err)
	if b := updated.Results[0].Bundle; b.GetRefreshHint() != 60 || len(b.GetX509Authorities()) != 1 || codes.Code(updated.Results[1].Status.Code) != codes.NotFound {
		t.Errorf("updated: %v", updated.Results)
	}
	if n, err := f.admin.CountBundles(ctx, &bundlev1.CountBundlesRequest{}); err != nil || n.Count != 2 {
		t.Errorf("%v bundles, %v", n, err)
	}
	if l, err := f.admin.ListFederatedBundles(ctx, &bundlev1.ListFederatedBundlesRequest{OutputMask: &types.BundleMask{SequenceNumber: true}}); err != nil || len(l.Bundles) != 1 || l.Bundles[0].SequenceNumber == 0 || l.Bundles[0].X509Authorities != nil {
		t.Errorf("list: %v, %v", l, err)
	}

	a := f.agent(frontend)
	federated := entry("spiffe://west.demo/web", a.svid.ID.String())
	federated.FederatesWith = []string{"east.demo"}
	_, err = f.admin.BatchCreateEntry(ctx, &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{federated}})
	check(t, err)
	del := func(mode bundlev1.BatchDeleteFederatedBundleRequest_Mode) codes.Code {
		resp, err := f.admin.BatchDeleteFederatedBundle(ctx, &bundlev1.BatchDeleteFederatedBundleRequest{TrustDomains: []string{"east.demo"}, Mode: mode})
		check(t, err)
		return codes.Code(resp.Results[0].Status.Code)
	}
	if got := del(bundlev1.BatchDeleteFederatedBundleRequest_RESTRICT); got != codes.FailedPrecondition {
		t.Errorf("RESTRICT: %s", got)
	}
	if got := del(bundlev1.BatchDeleteFederatedBundleRequest_DISSOCIATE); got != codes.OK {
		t.Errorf("DISSOCIATE: %s", got)
	}
	for _, e := range a.sync(t, nil) {
		if len(e.FederatesWith) != 0 {
			t.Errorf("entry %s federates with %v", e.SpiffeId.Path, e.FederatesWith)
		}
	}
	if got := del(bundlev1.BatchDeleteFederatedBundleRequest_DELETE); got != codes.NotFound {
		t.Errorf("again: %s", got)
	}
	_, err = a.GetFederatedBundle(ctx, &bundlev1.GetFederatedBundleRequest{TrustDomain: "east.demo"})
	wantCode(t, "the deleted bundle", err, codes.NotFound)
}

func TestRelationships(t *testing.T) {
	var refreshed []string
	f := newFixture(t, func(c *spireapi.Config) {
		c.Refresh = func(_ context.Context, td spiffeid.TrustDomain) error {
			refreshed = append(refreshed, td.Name())
			return nil
		}
	})
	ctx := t.Context()
	rel := func(td, url, id string) *types.FederationRelationship {
		return &types.FederationRelationship{TrustDomain: td, BundleEndpointUrl: url,
			BundleEndpointProfile: &types.FederationRelationship_HttpsSpiffe{HttpsSpiffe: &types.HTTPSSPIFFEProfile{EndpointSpiffeId: id}}}
	}
	const id = "spiffe://east.demo/hanse/control-plane"
	resp, err := f.admin.BatchCreateFederationRelationship(ctx, &trustdomainv1.BatchCreateFederationRelationshipRequest{FederationRelationships: []*types.FederationRelationship{
		rel("east.demo", "https://east:7446", id), rel("east.demo", "https://east:7446", id), rel("north.demo", "http://north", id), rel("north.demo", "https://north", "x"), rel("west.demo", "https://west", id), {TrustDomain: "north.demo", BundleEndpointUrl: "https://north"}}})
	check(t, err)
	for i, want := range []codes.Code{codes.OK, codes.AlreadyExists, codes.InvalidArgument, codes.InvalidArgument, codes.InvalidArgument, codes.InvalidArgument} {
		if got := codes.Code(resp.Results[i].Status.Code); got != want {
			t.Errorf("relationship %d: %v, want %s", i, resp.Results[i].Status, want)
		}
	}
	updated, err := f.admin.BatchUpdateFederationRelationship(ctx, &trustdomainv1.BatchUpdateFederationRelationshipRequest{InputMask: &types.FederationRelationshipMask{BundleEndpointUrl: true},
		FederationRelationships: []*types.FederationRelationship{{TrustDomain: "east.demo", BundleEndpointUrl: "https://east:8443"}, {TrustDomain: "north.demo"}}})
	check(t, err)
	if codes.Code(updated.Results[0].Status.Code) != codes.OK || codes.Code(updated.Results[1].Status.Code) != codes.NotFound {
		t.Errorf("updated: %v", updated.Results)
	}
	got, err := f.admin.GetFederationRelationship(ctx, &trustdomainv1.GetFederationRelationshipRequest{TrustDomain: "east.demo"})
	check(t, err)
	if got.BundleEndpointUrl != "https://east:8443" || got.GetHttpsSpiffe().GetEndpointSpiffeId() != id || got.TrustDomainBundle != nil {
		t.Errorf("relationship %v", got)
	}
	l, err := f.admin.ListFederationRelationships(ctx, &trustdomainv1.ListFederationRelationshipsRequest{OutputMask: &types.FederationRelationshipMask{}})
	check(t, err)
	if len(l.FederationRelationships) != 1 || l.FederationRelationships[0].BundleEndpointUrl != "" {
		t.Errorf("list %v", l)
	}
	_, err = f.admin.RefreshBundle(ctx, &trustdomainv1.RefreshBundleRequest{TrustDomain: "east.demo"})
	check(t, err)
	if !slices.Equal(refreshed, []string{"east.demo"}) {
		t.Errorf("refreshed %v", refreshed)
	}
	deleted, err := f.admin.BatchDeleteFederationRelationship(ctx, &trustdomainv1.BatchDeleteFederationRelationshipRequest{TrustDomains: []string{"east.demo", "east.demo"}})
	check(t, err)
	if codes.Code(deleted.Results[0].Status.Code) != codes.OK || codes.Code(deleted.Results[1].Status.Code) != codes.NotFound {
		t.Errorf("deleted: %v", deleted.Results)
	}
}

// Missing is what a rotation waits for.
func TestMissing(t *testing.T) {
	f := newFixture(t)
	ctx := t.Context()
	eastCA := f.federate(east)
	a := f.agent(frontend)
	own := func() []string { return f.api.Missing(west, f.authority.Sequence()) }
	foreign := func() []string { return f.api.Missing(east, eastCA.Sequence()) }
	id := []string{a.svid.ID.String()}
	if !slices.Equal(own(), id) || !slices.Equal(foreign(), id) {
		t.Errorf("an agent that has loaded nothing: %v, %v", own(), foreign())
	}
	fetch := func() {
		_, err := a.GetBundle(ctx, &bundlev1.GetBundleRequest{})
		check(t, err)
		_, err = a.GetFederatedBundle(ctx, &bundlev1.GetFederatedBundleRequest{TrustDomain: "east.demo"})
		check(t, err)
	}
	fetch()
	if !slices.Equal(own(), id) {
		t.Errorf("just now: %v", own())
	}
	f.advance(5 * time.Second)
	if len(own()) != 0 || len(foreign()) != 0 {
		t.Errorf("a sync interval later: %v, %v", own(), foreign())
	}
	check(t, f.authority.Prepare())
	if !slices.Equal(own(), id) || len(foreign()) != 0 {
		t.Errorf("after a new root: %v, %v", own(), foreign())
	}
	fetch()
	f.advance(5 * time.Second)
	if len(own()) != 0 {
		t.Errorf("after it is loaded: %v", own())
	}
	check(t, f.authority.Activate())
	f.advance(time.Minute)
	if len(own()) != 0 {
		t.Errorf("an agent that is silent for a minute: %v", own())
	}
	again, err := spireapi.New(ctx, spireapi.Config{Authority: f.authority, Bundles: f.bundles, Tokens: f.tokens, KV: f.kv, Now: f.now})
	check(t, err)
	if !slices.Equal(again.Missing(west, f.authority.Sequence()), id) || !again.AnyMissing(west, f.authority.Sequence()) {
		t.Error("just after a restart nobody is known to have loaded anything")
	}
	again.Moved(id)
	if got := again.Missing(west, f.authority.Sequence()); len(got) != 0 || again.AnyMissing(west, f.authority.Sequence()) {
		t.Errorf("an agent that follows another replica: %v", got)
	}
}

func TestSweep(t *testing.T) {
	f := newFixture(t)
	a := f.agent(frontend)
	banned := f.agent(frontend)
	_, err := f.admin.BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: spiretypes.FromID(banned.svid.ID)})
	check(t, err)
	f.advance(26 * time.Hour)
	check(t, f.api.Sweep(t.Context()))
	_, err = f.admin.GetAgent(t.Context(), &agentv1.GetAgentRequest{Id: spiretypes.FromID(a.svid.ID)})
	wantCode(t, "an agent that expired a day ago", err, codes.NotFound)
	if got, err := f.admin.GetAgent(t.Context(), &agentv1.GetAgentRequest{Id: spiretypes.FromID(banned.svid.ID)}); err != nil || !got.Banned {
		t.Errorf("a banned one: %v, %v", got, err)
	}
}

// TestSweepForgetsWhatAnotherReplicaForgot: nothing is kept of agents that are no more, of which this replica has heard.
func TestSweepForgetsWhatAnotherReplicaForgot(t *testing.T) {
	f := newFixture(t)
	id := f.agent(frontend).svid.ID.String()
	f.api.Moved([]string{id, "spiffe://west.demo/hanse/agent/gone"})
	check(t, f.api.Sweep(t.Context()))
	if got := spireapi.Heard(f.api); !slices.Equal(got, []string{id}) {
		t.Errorf("after a sweep it has heard of %v, want %s", got, id)
	}
}

func FuzzCSR(f *testing.F) {
	key := newKey(f)
	f.Add(csr(f, key))
	f.Add(csr(f, key, "spiffe://west.demo/x"))
	f.Add([]byte{0x30, 0x82})
	f.Fuzz(func(t *testing.T, der []byte) {
		if err := spireapi.CheckCSR(der); err != nil && status.Code(err) != codes.InvalidArgument {
			t.Errorf("error %v", err)
		}
	})
}
