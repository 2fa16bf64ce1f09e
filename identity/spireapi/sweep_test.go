package spireapi_test

import (
	"slices"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"google.golang.org/grpc/codes"

	"github.com/hanse-mesh/hanse/identity/spireapi"
	"github.com/hanse-mesh/hanse/identity/spiretypes"
)

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
