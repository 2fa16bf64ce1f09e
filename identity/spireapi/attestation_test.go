package spireapi_test

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hanse-mesh/hanse/identity/attest"
	"github.com/hanse-mesh/hanse/identity/spireapi"
	"github.com/hanse-mesh/hanse/identity/spiretypes"
)

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
