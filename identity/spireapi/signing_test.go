package spireapi_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"net"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hanse-mesh/hanse/identity/spireapi"
	"github.com/hanse-mesh/hanse/identity/spiretypes"
)

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
