package spireapi_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/identity/spireapi"
	"github.com/hanse-mesh/hanse/identity/spiretypes"
)

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
