package attest

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hanse-mesh/hanse/identity"
)

// Review is what the cluster says of a service account token (Kubernetes TokenReview).
type Review struct {
	Authenticated bool
	Audiences     []string            // those asked for that the token is meant for
	Username      string              // system:serviceaccount:<namespace>:<name>
	Extra         map[string][]string // authentication.kubernetes.io/pod-uid and the like
	Error         string
}

// TokenReviewer asks the cluster's API server about a token. An error means that there was no answer.
type TokenReviewer interface {
	ReviewToken(ctx context.Context, token string, audiences []string) (Review, error)
}

// Default audiences of projected tokens. SPIRE's agents ask for the first.
const (
	NodeAudience = "spire-server"
	PodAudience  = "hanse"
)

// NodeAgents accepts node agents as SPIRE's k8s_psat plugin does: by a token bound to the agent's pod, of one of the
// allowed service accounts. The agent's ID ends in the UID of its node, so its newest one is that node's agent.
type NodeAgents struct {
	TrustDomain spiffeid.TrustDomain
	Cluster     string   // as the agent's configuration names it
	Allowed     []string // <namespace>:<service account>
	Audience    string   // default NodeAudience
	Reviewer    TokenReviewer
}

// Pods accepts an agent inside a pod by a token that is bound to that pod, and entitles it to exactly the ID of the
// pod's service account; those of Gateways to the cluster's gateway ID instead.
type Pods struct {
	TrustDomain spiffeid.TrustDomain
	Cluster     string
	Audience    string   // default PodAudience
	Gateways    []string // <namespace>:<service account>
	Reviewer    TokenReviewer
}

type kubePayload struct {
	Cluster string `json:"cluster"`
	Token   string `json:"token"`
}

// reviewed is a token that the cluster vouches for.
type reviewed struct {
	namespace, account                 string
	podName, podUID, nodeName, nodeUID string
}

func reviewToken(ctx context.Context, r TokenReviewer, payload []byte, cluster, audience string) (reviewed, error) {
	var in kubePayload
	if err := decodePayload(payload, &in); err != nil {
		return reviewed{}, err
	}
	switch {
	case in.Cluster != cluster:
		return reviewed{}, refused("the agent says that it is in cluster %q, and this is %q", in.Cluster, cluster)
	case in.Token == "":
		return reviewed{}, refused("it has no token")
	}
	rev, err := r.ReviewToken(ctx, in.Token, []string{audience})
	if err != nil {
		return reviewed{}, fmt.Errorf("ask cluster %s about the token: %w", cluster, err)
	}
	switch {
	case !rev.Authenticated:
		return reviewed{}, refused("cluster %s does not accept the token: %s", cluster, rev.Error)
	case !slices.Contains(rev.Audiences, audience):
		return reviewed{}, refused("the token is meant for %q, want %q", rev.Audiences, audience)
	}
	name, ok := strings.CutPrefix(rev.Username, "system:serviceaccount:")
	ns, sa, ok2 := strings.Cut(name, ":")
	if !ok || !ok2 || ns == "" || sa == "" {
		return reviewed{}, refused("%q is no service account", rev.Username)
	}
	extra := func(what string) string {
		if v := rev.Extra["authentication.kubernetes.io/"+what]; len(v) == 1 {
			return v[0]
		}
		return ""
	}
	out := reviewed{ns, sa, extra("pod-name"), extra("pod-uid"), extra("node-name"), extra("node-uid")}
	if out.podUID == "" || out.podName == "" {
		return reviewed{}, refused("the token is not bound to a pod: project one with a serviceAccountToken volume")
	}
	return out, nil
}

// Attest implements Attestor.
func (a *NodeAgents) Attest(ctx context.Context, payload []byte, _ Challenge) (Evidence, error) {
	r, err := reviewToken(ctx, a.Reviewer, payload, a.Cluster, cmp.Or(a.Audience, NodeAudience))
	if err != nil {
		return Evidence{}, err
	}
	if !slices.Contains(a.Allowed, r.namespace+":"+r.account) {
		return Evidence{}, refused("%s:%s is not on the list of service accounts of node agents", r.namespace, r.account)
	}
	if r.nodeUID == "" {
		return Evidence{}, refused("the cluster does not say which node the pod is on: Kubernetes 1.32 or newer does")
	}
	id, err := spiffeid.FromSegments(a.TrustDomain, "spire", "agent", "k8s_psat", a.Cluster, r.nodeUID)
	if err != nil {
		return Evidence{}, refused("%v", err)
	}
	return Evidence{AgentID: id, Selectors: []string{"cluster:" + a.Cluster, "agent_ns:" + r.namespace, "agent_sa:" + r.account,
		"agent_pod_name:" + r.podName, "agent_pod_uid:" + r.podUID, "agent_node_name:" + r.nodeName, "agent_node_uid:" + r.nodeUID}}, nil
}

// Attest implements Attestor.
func (a *Pods) Attest(ctx context.Context, payload []byte, _ Challenge) (Evidence, error) {
	r, err := reviewToken(ctx, a.Reviewer, payload, a.Cluster, cmp.Or(a.Audience, PodAudience))
	if err != nil {
		return Evidence{}, err
	}
	id, err := spiffeid.FromSegments(a.TrustDomain, "spire", "agent", "hanse_pod", a.Cluster, r.podUID)
	if err != nil {
		return Evidence{}, refused("%v", err)
	}
	entry, err := identity.WorkloadID(a.TrustDomain, r.namespace, r.account)
	if err != nil {
		return Evidence{}, refused("%v", err)
	}
	if slices.Contains(a.Gateways, r.namespace+":"+r.account) {
		entry = identity.GatewayID(a.TrustDomain)
	}
	return Evidence{AgentID: id, Entry: entry, Selectors: []string{"cluster:" + a.Cluster, "ns:" + r.namespace, "sa:" + r.account,
		"pod_name:" + r.podName, "pod_uid:" + r.podUID, "node_name:" + r.nodeName}}, nil
}
