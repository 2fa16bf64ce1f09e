package spireapi_test

import (
	"slices"
	"testing"
	"time"

	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"

	"github.com/hanse-mesh/hanse/identity/spireapi"
)

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
