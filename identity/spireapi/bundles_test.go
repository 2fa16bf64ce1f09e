package spireapi_test

import (
	"context"
	"slices"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"

	"github.com/hanse-mesh/hanse/identity/ca"
	"github.com/hanse-mesh/hanse/identity/spireapi"
	"github.com/hanse-mesh/hanse/identity/spiretypes"
)

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
