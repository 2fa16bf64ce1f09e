package spireapi_test

import (
	"context"
	"errors"
	"slices"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/hanse-mesh/hanse/identity/spireapi"
	"github.com/hanse-mesh/hanse/identity/spiretypes"
)

func keepEntry(id, path, parent string, selectors ...string) *types.Entry {
	e := &types.Entry{Id: id, SpiffeId: spiretypes.FromID(spiffeid.RequireFromPath(west, path)), ParentId: spiretypes.FromID(spiffeid.RequireFromString(parent))}
	for _, s := range selectors {
		e.Selectors = append(e.Selectors, &types.Selector{Type: "k8s", Value: s})
	}
	return e
}

// What is kept is there, changes and goes as it is wanted; what people made stays.
func TestKeep(t *testing.T) {
	f := newFixture(t)
	ctx := t.Context()
	me := f.agent(frontend)
	mine := me.sync(t, nil)[0].Id
	ids := func() (out []string) {
		resp, err := f.admin.ListEntries(ctx, &entryv1.ListEntriesRequest{})
		check(t, err)
		for _, e := range resp.Entries {
			out = append(out, e.Id+" "+e.SpiffeId.Path)
		}
		slices.Sort(out)
		return out
	}
	keep := func(want int, entries ...*types.Entry) {
		t.Helper()
		n, err := f.api.Keep(ctx, "hanse-", entries)
		check(t, err)
		if n != want {
			t.Errorf("%d changes, want %d", n, want)
		}
	}
	pay, web := keepEntry("hanse-1", "/ns/shop/sa/pay", me.svid.ID.String(), "sa:pay"), keepEntry("hanse-2", "/ns/shop/sa/web", me.svid.ID.String(), "sa:web")
	keep(2, pay, web)
	keep(0, pay, web)
	if got := len(me.sync(t, nil)); got != 3 {
		t.Errorf("the agent sees %d entries, want 3", got)
	}
	web2 := keepEntry("hanse-2", "/ns/shop/sa/web", me.svid.ID.String(), "sa:web", "ns:shop")
	keep(1, pay, web2)
	keep(2, pay, keepEntry("hanse-3", "/x", me.svid.ID.String(), "sa:x")) // one comes, one goes
	if got, want := ids(), []string{"hanse-1 /ns/shop/sa/pay", "hanse-3 /x", mine + " " + frontend.Path()}; !slices.Equal(got, want) {
		t.Errorf("entries %q, want %q", got, want)
	}
	if _, err := f.admin.BatchDeleteEntry(ctx, &entryv1.BatchDeleteEntryRequest{Ids: []string{"hanse-1"}}); err != nil {
		t.Fatal(err)
	}
	keep(1, pay, keepEntry("hanse-3", "/x", me.svid.ID.String(), "sa:x")) // made anew
	resp, err := f.admin.BatchUpdateEntry(ctx, &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{web}, InputMask: &types.EntryMask{SpiffeId: true}})
	check(t, err)
	if resp.Results[0].Status.Code == 0 {
		t.Error("an entry that is kept was changed by an administrator")
	}
	// What would be everybody's or somebody else's is not written, and keeps nobody from theirs.
	if _, err := f.api.Keep(ctx, "hanse-", []*types.Entry{pay, keepEntry("hanse-4", "/all", me.svid.ID.String()), keepEntry(mine, "/stolen", me.svid.ID.String(), "x:y")}); err == nil {
		t.Error("an entry without selectors, and one of another prefix, were kept")
	}
	if got, want := ids(), []string{"hanse-1 /ns/shop/sa/pay", mine + " " + frontend.Path()}; !slices.Equal(got, want) {
		t.Errorf("entries %q, want %q", got, want)
	}
	keep(1)
	if got := len(me.sync(t, nil)); got != 1 {
		t.Errorf("the agent sees %d entries, want its own", got)
	}
}

// What is kept is written to the KV of the leader: one that has been deposed writes nothing, and what it would write stays as it is.
func TestKeepIsFenced(t *testing.T) {
	var leader deposed
	f := newFixture(t, func(c *spireapi.Config) { leader.KV = c.KV; c.KeptKV = &leader })
	e := keepEntry("hanse-1", "/ns/shop/sa/pay", spiffeid.RequireFromPath(west, "/spire/agent/x").String(), "sa:pay")
	if n, err := f.api.Keep(t.Context(), "hanse-", []*types.Entry{e}); n != 1 || err != nil {
		t.Fatalf("the leader: %d, %v", n, err)
	}
	leader.over = true
	other := keepEntry("hanse-2", "/ns/shop/sa/web", spiffeid.RequireFromPath(west, "/spire/agent/x").String(), "sa:web")
	if _, err := f.api.Keep(t.Context(), "hanse-", []*types.Entry{other}); !errors.Is(err, errDeposed) {
		t.Errorf("a deposed leader: %v", err)
	}
	resp, err := f.admin.ListEntries(t.Context(), &entryv1.ListEntriesRequest{})
	check(t, err)
	if len(resp.Entries) != 1 || resp.Entries[0].Id != "hanse-1" {
		t.Errorf("after a deposed leader there are %v", resp.Entries)
	}
	ended, end := context.WithCancel(t.Context())
	end()
	leader.over = false
	if n, err := f.api.Keep(ended, "hanse-", nil); n != 0 || !errors.Is(err, context.Canceled) {
		t.Errorf("after the end of its term: %d, %v", n, err)
	}
}

var errDeposed = errors.New("another leads")

// deposed is a KV that is not written any more when its time is over.
type deposed struct {
	spireapi.KV
	over bool
}

func (d *deposed) CompareAndPut(ctx context.Context, key string, old, value []byte) (bool, error) {
	if d.over {
		return false, errDeposed
	}
	return d.KV.CompareAndPut(ctx, key, old, value)
}

func (d *deposed) Delete(ctx context.Context, key string) error {
	if d.over {
		return errDeposed
	}
	return d.KV.Delete(ctx, key)
}
