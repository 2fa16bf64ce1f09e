package attest_test

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hanse-mesh/hanse/identity/attest"
)

// token is what the fake API server knows of one.
type token struct {
	audience, user, podName, podUID, nodeName, nodeUID string
}

// apiServer answers TokenReviews as Kubernetes 1.32 does.
func apiServer(t *testing.T, tokens map[string]token) *attest.KubeAPI {
	t.Helper()
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var in struct {
			APIVersion, Kind string
			Spec             struct {
				Token     string
				Audiences []string
			}
		}
		if r.Method != "POST" || r.URL.Path != "/apis/authentication.k8s.io/v1/tokenreviews" || r.Header.Get("Authorization") != "Bearer own-token" {
			http.Error(w, "forbidden", http.StatusForbidden)
			return
		}
		if err := json.NewDecoder(r.Body).Decode(&in); err != nil || in.Kind != "TokenReview" {
			http.Error(w, "bad request", http.StatusBadRequest)
			return
		}
		status := map[string]any{"error": "invalid bearer token"}
		if tok, ok := tokens[in.Spec.Token]; ok && (len(in.Spec.Audiences) != 1 || in.Spec.Audiences[0] != tok.audience) {
			status = map[string]any{"error": "token audiences are invalid for the target audiences"}
		} else if ok {
			extra := map[string][]string{}
			for k, v := range map[string]string{"pod-name": tok.podName, "pod-uid": tok.podUID, "node-name": tok.nodeName, "node-uid": tok.nodeUID} {
				if v != "" {
					extra["authentication.kubernetes.io/"+k] = []string{v}
				}
			}
			status = map[string]any{"authenticated": true, "audiences": []string{tok.audience}, "user": map[string]any{"username": tok.user, "extra": extra}}
		}
		w.WriteHeader(http.StatusCreated)
		_ = json.NewEncoder(w).Encode(map[string]any{"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "status": status})
	}))
	t.Cleanup(srv.Close)
	dir := t.TempDir()
	ca, own := filepath.Join(dir, "ca.crt"), filepath.Join(dir, "token")
	check(t, os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}), 0o644))
	check(t, os.WriteFile(own, []byte("own-token\n"), 0o644))
	api, err := attest.NewKubeAPI(srv.URL, ca, own)
	check(t, err)
	return api
}

var tokens = map[string]token{
	"node":      {"spire-server", "system:serviceaccount:spire:spire-agent", "spire-agent-x", "p-1", "node-1", "n-1"},
	"old":       {"spire-server", "system:serviceaccount:spire:spire-agent", "spire-agent-x", "p-1", "", ""},
	"thief":     {"spire-server", "system:serviceaccount:shop:frontend", "frontend-x", "p-2", "node-1", "n-1"},
	"pod":       {"hanse", "system:serviceaccount:shop:frontend", "frontend-x", "p-2", "node-1", "n-1"},
	"loose":     {"hanse", "system:serviceaccount:shop:frontend", "", "", "", ""},
	"user":      {"hanse", "jane", "frontend-x", "p-2", "node-1", "n-1"},
	"gateway":   {"hanse", "system:serviceaccount:hanse-system:hanse-gateway", "hanse-gateway-x", "p-3", "node-1", "n-1"},
	"imitator":  {"hanse", "system:serviceaccount:shop:hanse-gateway", "hanse-gateway-y", "p-4", "node-1", "n-1"},
	"strange":   {"hanse", "system:serviceaccount:shop:a/../b", "frontend-x", "p-2", "node-1", "n-1"},
	"otherwise": {"vault", "system:serviceaccount:shop:frontend", "frontend-x", "p-2", "node-1", "n-1"},
}

func kube(cluster, token string) []byte {
	data, _ := json.Marshal(map[string]string{"cluster": cluster, "token": token})
	return data
}

func TestKubernetes(t *testing.T) {
	api := apiServer(t, tokens)
	nodes := &attest.NodeAgents{TrustDomain: west, Cluster: "west", Allowed: []string{"spire:spire-agent"}, Reviewer: api}
	pods := &attest.Pods{TrustDomain: west, Cluster: "west", Reviewer: api}

	e, err := nodes.Attest(t.Context(), kube("west", "node"), nil)
	check(t, err)
	if e.AgentID.String() != "spiffe://west.demo/spire/agent/k8s_psat/west/n-1" || !e.Entry.IsZero() || strings.Join(e.Selectors, " ") !=
		"cluster:west agent_ns:spire agent_sa:spire-agent agent_pod_name:spire-agent-x agent_pod_uid:p-1 agent_node_name:node-1 agent_node_uid:n-1" {
		t.Errorf("node agent %+v", e)
	}
	e, err = pods.Attest(t.Context(), kube("west", "pod"), nil)
	check(t, err)
	if e.AgentID.String() != "spiffe://west.demo/spire/agent/hanse_pod/west/p-2" || e.Entry != frontend {
		t.Errorf("pod %+v", e)
	}

	// Gateways are told from workloads by namespace and account together.
	pods.Gateways = []string{"hanse-system:hanse-gateway"}
	for token, want := range map[string]string{"gateway": "spiffe://west.demo/hanse/gateway", "imitator": "spiffe://west.demo/ns/shop/sa/hanse-gateway", "pod": frontend.String()} {
		if e, err = pods.Attest(t.Context(), kube("west", token), nil); err != nil || e.Entry.String() != want {
			t.Errorf("%s is entitled to %s (%v), want %s", token, e.Entry, err, want)
		}
	}

	for name, c := range map[string]struct {
		by      attest.Attestor
		payload []byte
		want    string
	}{
		"a forged token":                {pods, kube("west", "forged"), "invalid bearer token"},
		"another cluster's token":       {pods, kube("east", "pod"), `cluster "east"`},
		"a token for another audience":  {pods, kube("west", "otherwise"), "audiences are invalid"},
		"a node agent's token by a pod": {pods, kube("west", "node"), "audiences are invalid"},
		"a token bound to no pod":       {pods, kube("west", "loose"), "not bound to a pod"},
		"a person's token":              {pods, kube("west", "user"), "no service account"},
		"a path in a name":              {pods, kube("west", "strange"), "segment"},
		"no token":                      {pods, kube("west", ""), "no token"},
		"noise":                         {pods, []byte("{"), "does not decode"},
		"a workload as node agent":      {nodes, kube("west", "thief"), "not on the list"},
		"an API server that is too old": {nodes, kube("west", "old"), "1.32"},
	} {
		if _, err := c.by.Attest(t.Context(), c.payload, nil); !errors.Is(err, attest.ErrRefused) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want a refusal with %q", name, err, c.want)
		}
	}
}

// An API server that does not answer refuses nobody: the agent may try again.
func TestKubernetesAPIServerIsAway(t *testing.T) {
	gone := httptest.NewTLSServer(http.NotFoundHandler())
	dir := t.TempDir()
	ca := filepath.Join(dir, "ca.crt")
	check(t, os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: gone.Certificate().Raw}), 0o644))
	check(t, os.WriteFile(filepath.Join(dir, "token"), []byte("own-token"), 0o644))
	api, err := attest.NewKubeAPI(gone.URL, ca, filepath.Join(dir, "token"))
	check(t, err)
	pods := &attest.Pods{TrustDomain: west, Cluster: "west", Reviewer: api}
	if _, err := pods.Attest(t.Context(), kube("west", "pod"), nil); err == nil || errors.Is(err, attest.ErrRefused) || !strings.Contains(err.Error(), "auth-delegator") {
		t.Errorf("404: %v", err)
	}
	gone.Close()
	if _, err := pods.Attest(t.Context(), kube("west", "pod"), nil); err == nil || errors.Is(err, attest.ErrRefused) {
		t.Errorf("nobody there: %v", err)
	}
	if _, err := attest.NewKubeAPI("http://10.0.0.1", ca, ""); err == nil {
		t.Error("an API server without TLS is taken")
	}
	if _, err := attest.NewKubeAPI("https://10.0.0.1", filepath.Join(dir, "token"), ""); err == nil || !strings.Contains(err.Error(), "no PEM") {
		t.Errorf("a file without CA: %v", err)
	}
}

func FuzzKubernetes(f *testing.F) {
	f.Add([]byte(`{"cluster":"west","token":"pod"}`))
	f.Add([]byte(`{"cluster":1}`))
	pods := &attest.Pods{TrustDomain: west, Cluster: "west", Reviewer: nobody{}}
	f.Fuzz(func(t *testing.T, data []byte) {
		if _, err := pods.Attest(t.Context(), data, nil); !errors.Is(err, attest.ErrRefused) {
			t.Errorf("%v", err)
		}
	})
}

type nobody struct{}

func (nobody) ReviewToken(context.Context, string, []string) (attest.Review, error) {
	return attest.Review{Error: "unknown"}, nil
}
