package spireapi_test

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"

	"github.com/hanse-mesh/hanse/identity/spireapi"
)

// downstream is a client with the SVID of a downstream server.
func (f *fixture) downstream() *client {
	f.t.Helper()
	id := "spiffe://west.demo/nested"
	e := entry(id, "spiffe://west.demo/spire/agent/join_token/x")
	e.Downstream = true
	resp, err := f.admin.BatchCreateEntry(f.t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{e}})
	check(f.t, err)
	if code := codes.Code(resp.Results[0].Status.Code); code != codes.OK {
		f.t.Fatal(resp.Results[0].Status)
	}
	svid, err := f.authority.NewSVID(spiffeid.RequireFromString(id), 0)
	check(f.t, err)
	return f.connect(svid)
}

// What a downstream CA signs is verified by our bundle, and stays so while the CA lives, also after our root changed.
func TestDownstreamCA(t *testing.T) {
	f := newFixture(t)
	ctx := t.Context()
	down := f.downstream()
	key := newKey(t)
	resp, err := down.NewDownstreamX509CA(ctx, &svidv1.NewDownstreamX509CARequest{Csr: csr(t, key, "spiffe://west.demo"), PreferredTtl: 7200})
	check(t, err)
	inter, err := x509.ParseCertificate(resp.CaCertChain[0])
	check(t, err)
	if !inter.IsCA || inter.URIs[0].String() != "spiffe://west.demo" || len(resp.X509Authorities) != 1 || inter.KeyUsage != x509.KeyUsageCertSign|x509.KeyUsageCRLSign {
		t.Errorf("CA %v, %d authorities", inter.Subject, len(resp.X509Authorities))
	}
	leafKey := newKey(t)
	u, _ := url.Parse(frontend.String())
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(2), NotBefore: f.now().Add(-time.Minute), NotAfter: f.now().Add(time.Hour), URIs: []*url.URL{u},
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true}, inter, leafKey.Public(), key)
	check(t, err)
	leaf, err := x509.ParseCertificate(der)
	check(t, err)
	chain := []*x509.Certificate{leaf, inter}
	verify := func(what string) {
		t.Helper()
		if id, _, err := x509svid.Verify(chain, f.authority.Bundle(), x509svid.WithTime(f.now())); err != nil || id != frontend {
			t.Errorf("%s: %v, %v", what, id, err)
		}
	}
	verify("at first")
	check(t, f.authority.Prepare())
	check(t, f.authority.Activate())
	f.advance(30 * time.Minute)
	check(t, f.authority.DropOld())
	verify("after our rotation")

	// A caller whose SVID comes from the downstream CA is who it is, here too, until our root is gone.
	admin := f.connect(&x509svid.SVID{ID: frontend, Certificates: chain, PrivateKey: leafKey})
	_, err = admin.CountEntries(ctx, &entryv1.CountEntriesRequest{})
	if err == nil || !strings.Contains(err.Error(), "not an administrator") {
		t.Errorf("a workload of the downstream: %v", err)
	}
	check(t, f.authority.Revoke(hex.EncodeToString(inter.AuthorityKeyId)))
	if _, err = admin.CountEntries(ctx, &entryv1.CountEntriesRequest{}); err == nil || !strings.Contains(err.Error(), "not trusted any more") {
		t.Errorf("after the root went: %v", err)
	}
}

func TestPublishJWTAuthority(t *testing.T) {
	f := newFixture(t)
	ctx := t.Context()
	down := f.downstream()
	jwt := func(id string, key any, expires time.Time) *bundlev1.PublishJWTAuthorityRequest {
		der, err := x509.MarshalPKIXPublicKey(key)
		check(t, err)
		k := &types.JWTKey{KeyId: id, PublicKey: der}
		if !expires.IsZero() {
			k.ExpiresAt = expires.Unix()
		}
		return &bundlev1.PublishJWTAuthorityRequest{JwtAuthority: k}
	}
	before := f.authority.Sequence()
	key := newKey(t).Public()
	resp, err := down.PublishJWTAuthority(ctx, jwt("nested-1", key, f.now().Add(time.Hour)))
	check(t, err)
	if len(resp.JwtAuthorities) != 2 || f.authority.Sequence() <= before {
		t.Errorf("%d keys, sequence %d after %d", len(resp.JwtAuthorities), f.authority.Sequence(), before)
	}
	again := f.authority.Sequence()
	_, err = down.PublishJWTAuthority(ctx, jwt("nested-1", key, f.now().Add(time.Hour)))
	check(t, err)
	if f.authority.Sequence() != again {
		t.Error("the same key again changes the bundle")
	}
	own := f.authority.Roots()[0].JWTKeyID
	ed, _, err := ed25519.GenerateKey(rand.Reader)
	check(t, err)
	for name, req := range map[string]*bundlev1.PublishJWTAuthorityRequest{
		"our own key's ID":        jwt(own, newKey(t).Public(), f.now().Add(time.Hour)),
		"another downstream's":    jwt("nested-1", newKey(t).Public(), f.now().Add(time.Hour)),
		"no ID":                   jwt("", newKey(t).Public(), f.now().Add(time.Hour)),
		"an ID without end":       jwt(strings.Repeat("x", 5000), newKey(t).Public(), f.now().Add(time.Hour)),
		"Ed25519 (JWT-SVID §2.1)": jwt("ed", ed, f.now().Add(time.Hour)),
		"expired":                 jwt("old", newKey(t).Public(), f.now().Add(-time.Hour)),
		"without end":             jwt("endless", newKey(t).Public(), time.Time{}),
		"noise":                   {JwtAuthority: &types.JWTKey{KeyId: "x", PublicKey: []byte("noise")}},
		"nothing":                 {},
	} {
		_, err := down.PublishJWTAuthority(ctx, req)
		wantCode(t, name, err, codes.InvalidArgument)
	}
	f.advance(2 * time.Hour)
	check(t, f.authority.DropOld())
	if n := len(f.authority.Bundle().JWTAuthorities()); n != 1 {
		t.Errorf("%d JWT keys after its end", n)
	}
}

func TestDownstreamIsLimited(t *testing.T) {
	f := newFixture(t, func(c *spireapi.Config) { c.AttestBurst, c.AttestsPerSecond = 3, 0.01 })
	down := f.downstream()
	var err error
	for range 4 {
		if _, err = down.PublishJWTAuthority(t.Context(), &bundlev1.PublishJWTAuthorityRequest{}); err == nil {
			t.Fatal("nothing is published")
		}
	}
	wantCode(t, "the call after the burst", err, codes.ResourceExhausted)
}

func TestAppendBundle(t *testing.T) {
	f := newFixture(t)
	ctx := t.Context()
	root := func(edit func(*x509.Certificate)) []byte {
		key := newKey(t)
		template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: f.now().Add(-time.Minute), NotAfter: f.now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
		edit(template)
		der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
		check(t, err)
		return der
	}
	good := root(func(*x509.Certificate) {})
	b, err := f.admin.AppendBundle(ctx, &bundlev1.AppendBundleRequest{X509Authorities: []*types.X509Certificate{{Asn1: good}}})
	check(t, err)
	if len(b.X509Authorities) != 2 || b.TrustDomain != "west.demo" {
		t.Errorf("bundle %v", b)
	}
	u, _ := url.Parse("spiffe://east.demo")
	for name, der := range map[string][]byte{
		"no CA":                          root(func(c *x509.Certificate) { c.IsCA = false }),
		"no keyCertSign":                 root(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageDigitalSignature }),
		"the root of another domain":     root(func(c *x509.Certificate) { c.URIs = []*url.URL{u} }),
		"a root that has expired":        root(func(c *x509.Certificate) { c.NotAfter = f.now().Add(-time.Second) }),
		"noise instead of a certificate": []byte("noise"),
		"an empty certificate":           nil,
	} {
		_, err := f.admin.AppendBundle(ctx, &bundlev1.AppendBundleRequest{X509Authorities: []*types.X509Certificate{{Asn1: der}}})
		wantCode(t, name, err, codes.InvalidArgument)
	}
	many := make([]*types.X509Certificate, 210)
	for i := range many {
		many[i] = &types.X509Certificate{Asn1: root(func(c *x509.Certificate) { c.SerialNumber = big.NewInt(int64(i + 10)) })}
	}
	_, err = f.admin.AppendBundle(ctx, &bundlev1.AppendBundleRequest{X509Authorities: many})
	wantCode(t, "too many", err, codes.ResourceExhausted)

	// Tainted, then taken out; a replica's own root is not for these calls.
	la := localauthorityv1.NewLocalAuthorityClient(f.admin.conn)
	cert, err := x509.ParseCertificate(good)
	check(t, err)
	id := hex.EncodeToString(cert.SubjectKeyId)
	_, err = la.TaintX509UpstreamAuthority(ctx, &localauthorityv1.TaintX509UpstreamAuthorityRequest{SubjectKeyId: id})
	check(t, err)
	b, err = f.admin.GetBundle(ctx, &bundlev1.GetBundleRequest{})
	check(t, err)
	if fmt.Sprint(b.X509Authorities[0].Tainted, b.X509Authorities[1].Tainted) != "false true" {
		t.Errorf("tainted: %v", b.X509Authorities)
	}
	_, err = la.RevokeX509UpstreamAuthority(ctx, &localauthorityv1.RevokeX509UpstreamAuthorityRequest{SubjectKeyId: id})
	check(t, err)
	if n := len(f.authority.Bundle().X509Authorities()); n != 1 {
		t.Errorf("%d authorities", n)
	}
	_, err = la.RevokeX509UpstreamAuthority(ctx, &localauthorityv1.RevokeX509UpstreamAuthorityRequest{SubjectKeyId: id})
	wantCode(t, "revoked already", err, codes.NotFound)
	_, err = la.TaintX509UpstreamAuthority(ctx, &localauthorityv1.TaintX509UpstreamAuthorityRequest{SubjectKeyId: f.authority.Roots()[0].KeyID})
	wantCode(t, "a local authority", err, codes.FailedPrecondition)
}

// Revoking a root that agents rest on would shut them out; it is refused until they have moved, or are gone.
func TestRevokeWaitsForAgents(t *testing.T) {
	f := newFixture(t)
	ctx := t.Context()
	a := f.agent(frontend)
	la := localauthorityv1.NewLocalAuthorityClient(f.admin.conn)
	root := f.authority.Roots()[0].KeyID
	prep, err := la.PrepareX509Authority(ctx, &localauthorityv1.PrepareX509AuthorityRequest{})
	check(t, err)
	_, err = la.ActivateX509Authority(ctx, &localauthorityv1.ActivateX509AuthorityRequest{AuthorityId: prep.PreparedAuthority.AuthorityId})
	check(t, err)
	revoke := func() error {
		_, err := la.RevokeX509Authority(ctx, &localauthorityv1.RevokeX509AuthorityRequest{AuthorityId: root})
		return err
	}
	err = revoke()
	wantCode(t, "an agent rests on it", err, codes.FailedPrecondition)
	if !strings.Contains(err.Error(), a.svid.ID.String()) || !strings.Contains(err.Error(), "evict") {
		t.Errorf("%v", err)
	}
	_, err = la.TaintX509Authority(ctx, &localauthorityv1.TaintX509AuthorityRequest{AuthorityId: root})
	check(t, err)
	renewed := f.renew(a)
	wantCode(t, "an agent that may not have its new SVID yet", revoke(), codes.FailedPrecondition)
	renewed.sync(t, nil)
	check(t, revoke())
	renewed.sync(t, nil)
}

// renew renews the SVID of an agent and returns its client with the new one, which has not been used yet.
func (f *fixture) renew(a *client) *client {
	f.t.Helper()
	key := newKey(f.t)
	resp, err := a.RenewAgent(f.t.Context(), &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: csr(f.t, key)}})
	check(f.t, err)
	return f.connect(svidOf(f.t, resp.Svid, key))
}
