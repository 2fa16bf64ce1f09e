package spireapi_test

import (
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/identity/ca"
	"github.com/hanse-mesh/hanse/identity/spireapi"
	"github.com/hanse-mesh/hanse/identity/spiretypes"
)

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
