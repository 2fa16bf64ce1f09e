package spireapi_test

import (
	"context"
	"encoding/json"
	"errors"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hanse-mesh/hanse/identity/attest"
	"github.com/hanse-mesh/hanse/identity/spireapi"
	"github.com/hanse-mesh/hanse/identity/spiretypes"
)

// cluster is a Kubernetes that knows a few tokens.
type cluster map[string]attest.Review

func (c cluster) ReviewToken(_ context.Context, token string, _ []string) (attest.Review, error) {
	if token == "break" {
		return attest.Review{}, errors.New("connection refused")
	}
	return c[token], nil
}

func podToken(namespace, account, podUID string) attest.Review {
	return attest.Review{Authenticated: true, Audiences: []string{"hanse"}, Username: "system:serviceaccount:" + namespace + ":" + account,
		Extra: map[string][]string{"authentication.kubernetes.io/pod-name": {"x"}, "authentication.kubernetes.io/pod-uid": {podUID}}}
}

func kubeFixture(t *testing.T) *fixture {
	return newFixture(t, func(c *spireapi.Config) {
		c.Attestors = map[string]attest.Attestor{"hanse_pod": &attest.Pods{TrustDomain: west, Cluster: "west", Reviewer: cluster{
			"frontend": podToken("shop", "frontend", "uid-1"), "payments": podToken("shop", "payments", "uid-2"), "moved": podToken("shop", "payments", "uid-1")}}}
	})
}

func kubePayload(token string) string {
	b, _ := json.Marshal(map[string]string{"cluster": "west", "token": token})
	return string(b)
}

// A pod's agent has exactly its pod's entry, attests again instead of renewing, and only its newest SVID is active.
func TestPodAgent(t *testing.T) {
	f := kubeFixture(t)
	ctx := t.Context()
	attestPod := func(token string) *client {
		t.Helper()
		key := newKey(t)
		result, err := f.connect(nil).attest(ctx, "hanse_pod", kubePayload(token), csr(t, key))
		check(t, err)
		if !result.Reattestable {
			t.Error("a pod's agent cannot attest again")
		}
		return f.connect(svidOf(t, result.Svid, key))
	}
	first := attestPod("frontend")
	if got := first.svid.ID.String(); got != "spiffe://west.demo/spire/agent/hanse_pod/west/uid-1" {
		t.Errorf("agent %s", got)
	}
	entries := first.sync(t, nil)
	if id, err := spiretypes.ToID(entries[0].SpiffeId); err != nil || id != frontend || len(entries) != 1 {
		t.Errorf("entries %v", entries)
	}
	_, err := first.RenewAgent(ctx, &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: csr(t, newKey(t))}})
	if reason(err) != types.PermissionDeniedDetails_AGENT_MUST_REATTEST {
		t.Errorf("renewal: %v", err)
	}
	// An entry of another pod is not to be had.
	other := attestPod("payments")
	resp, err := first.BatchNewX509SVID(ctx, &svidv1.BatchNewX509SVIDRequest{Params: []*svidv1.NewX509SVIDParams{{EntryId: other.sync(t, nil)[0].Id, Csr: csr(t, newKey(t))}}})
	check(t, err)
	if got := codes.Code(resp.Results[0].Status.Code); got != codes.NotFound {
		t.Errorf("another pod's entry: %s", got)
	}
	second := attestPod("frontend")
	second.sync(t, nil)
	_, err = first.BatchNewX509SVID(ctx, &svidv1.BatchNewX509SVIDRequest{})
	if reason(err) != types.PermissionDeniedDetails_AGENT_NOT_ACTIVE {
		t.Errorf("the SVID of before: %v", err)
	}
	// A pod UID with another account, which Kubernetes never does, takes its entry with it rather than having two.
	moved := attestPod("moved")
	entries = moved.sync(t, nil)
	if id, _ := spiretypes.ToID(entries[0].SpiffeId); len(entries) != 1 || id != spiffeid.RequireFromString("spiffe://west.demo/ns/shop/sa/payments") {
		t.Errorf("entries after the change: %v", entries)
	}
	list, err := f.admin.ListAgents(ctx, &agentv1.ListAgentsRequest{Filter: &agentv1.ListAgentsRequest_Filter{ByAttestationType: "hanse_pod"}})
	check(t, err)
	if len(list.Agents) != 2 || len(list.Agents[0].Selectors) == 0 || list.Agents[0].Selectors[0].Type != "hanse_pod" {
		t.Errorf("agents %v", list.Agents)
	}
}

func TestPodAgentRefusals(t *testing.T) {
	f := kubeFixture(t)
	c := f.connect(nil)
	for token, want := range map[string]codes.Code{"forged": codes.PermissionDenied, "break": codes.Unavailable, "": codes.PermissionDenied} {
		_, err := c.attest(t.Context(), "hanse_pod", kubePayload(token), csr(t, newKey(t)))
		wantCode(t, "token "+token, err, want)
	}
	_, err := c.attest(t.Context(), "k8s_psat", kubePayload("frontend"), csr(t, newKey(t)))
	wantCode(t, "a node agent, which nobody allowed", err, codes.FailedPrecondition)

	// Banned, a pod stays outside, with a good token too.
	_, err = c.attest(t.Context(), "hanse_pod", kubePayload("frontend"), csr(t, newKey(t)))
	check(t, err)
	_, err = f.admin.BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: spiretypes.FromID(spiffeid.RequireFromString("spiffe://west.demo/spire/agent/hanse_pod/west/uid-1"))})
	check(t, err)
	if _, err = c.attest(t.Context(), "hanse_pod", kubePayload("frontend"), csr(t, newKey(t))); reason(err) != types.PermissionDeniedDetails_AGENT_BANNED {
		t.Errorf("banned: %v", err)
	}
}

// challenger asks one question.
type challenger struct{}

func (challenger) Attest(_ context.Context, payload []byte, challenge attest.Challenge) (attest.Evidence, error) {
	answer, err := challenge([]byte("who goes there?"))
	if err != nil {
		return attest.Evidence{}, err
	}
	if string(answer) != "a friend" {
		return attest.Evidence{}, attest.ErrRefused
	}
	return attest.Evidence{AgentID: spiffeid.RequireFromString("spiffe://west.demo/spire/agent/test/" + string(payload))}, nil
}

func TestChallenge(t *testing.T) {
	f := newFixture(t, func(c *spireapi.Config) { c.Attestors = map[string]attest.Attestor{"test": challenger{}} })
	ask := func(reply func(agentv1.Agent_AttestAgentClient) error) (*agentv1.AttestAgentResponse, error) {
		t.Helper()
		stream, err := f.connect(nil).AttestAgent(t.Context())
		check(t, err)
		check(t, stream.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
			Data: &types.AttestationData{Type: "test", Payload: []byte("a")}, Params: &agentv1.AgentX509SVIDParams{Csr: csr(t, newKey(t))}}}}))
		resp, err := stream.Recv()
		check(t, err)
		if string(resp.GetChallenge()) != "who goes there?" {
			t.Errorf("challenge %v", resp)
		}
		check(t, reply(stream))
		return stream.Recv()
	}
	say := func(s string) func(agentv1.Agent_AttestAgentClient) error {
		return func(stream agentv1.Agent_AttestAgentClient) error {
			return stream.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_ChallengeResponse{ChallengeResponse: []byte(s)}})
		}
	}
	if resp, err := ask(say("a friend")); err != nil || resp.GetResult().GetSvid() == nil || !resp.GetResult().Reattestable {
		t.Errorf("%v, %v", resp, err)
	}
	_, err := ask(say("a foe"))
	wantCode(t, "a wrong answer", err, codes.PermissionDenied)
	_, err = ask(func(stream agentv1.Agent_AttestAgentClient) error { return stream.CloseSend() })
	if c := status.Code(err); c != codes.InvalidArgument {
		t.Errorf("no answer: %v", err)
	}
}
