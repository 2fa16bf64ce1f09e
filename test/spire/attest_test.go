package spire

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// serves waits until the agent gives this process an SVID of that ID.
func (c *member) serves(id string) {
	c.m.t.Helper()
	c.m.eventually("the agent gives "+id, func() error {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		x, err := workloadapi.FetchX509Context(ctx, workloadapi.WithAddr("unix://"+c.agentSock))
		if err == nil && x.DefaultSVID().ID.String() != id {
			err = fmt.Errorf("it gives %s", x.DefaultSVID().ID)
		}
		return err
	})
}

func selfSelector(t *testing.T) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return "unix:path:" + self
}

func pemFile(t *testing.T, c *member, name, kind string, der []byte) string {
	t.Helper()
	return c.save(name, string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})))
}

// TestX509Pop: an unmodified spire-agent attests by a certificate of the machine, and again after it has lost everything but that.
func TestX509Pop(t *testing.T) {
	m := newMesh(t, nil, "west")
	c := m.members[0]
	c.agentSock, c.spireAPI = c.dir+"/w.sock", c.dir+"/d/spire-server/api.sock"
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	caCert := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "machines"}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	caDER, err := x509.CreateCertificate(rand.Reader, caCert, caCert, caKey.Public(), caKey)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	leaf := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "machine-7"}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature}
	leafDER, err := x509.CreateCertificate(rand.Reader, leaf, caCert, key.Public(), caKey)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	c.program("hansed", "hansed")
	c.hansedConfig(fmt.Sprintf("  x509pop: {caFile: %s}\n", pemFile(t, c, "machines.pem", "CERTIFICATE", caDER)), "")
	c.startHansed()
	m.eventually("hansed is ready", func() error { return ready(c.ip(1) + ":7440") })

	attestor := fmt.Sprintf("NodeAttestor \"x509pop\" { plugin_data {\n private_key_path = %q\n certificate_path = %q\n} }",
		pemFile(t, c, "machine.key", "PRIVATE KEY", keyDER), pemFile(t, c, "machine.pem", "CERTIFICATE", leafDER))
	stop := c.runAgent("pop", c.ip(1), "7444", attestor)
	var agent string
	m.eventually("the agent is listed", func() error {
		l := *m.lab
		l.socket = c.spireAPI
		out, err := l.try("agent", "list")
		if err == nil && !strings.Contains(out, "/spire/agent/x509pop/") {
			err = errors.New(out)
		}
		if err == nil {
			agent = l.find(out, `SPIFFE ID\s*: (\S+)`)
		}
		return err
	})
	c.spire("agent show -spiffeID "+agent, "x509pop", "subject:cn:machine-7")
	c.spire("entry create -parentID "+agent+" -spiffeID spiffe://west.test/ns/shop/sa/pay -selector "+selfSelector(t), "Entry ID")
	c.serves("spiffe://west.test/ns/shop/sa/pay")

	stop()
	if err := os.RemoveAll(filepath.Join(c.dir, "pop-data")); err != nil {
		t.Fatal(err)
	}
	stop = c.runAgent("pop", c.ip(1), "7444", attestor)
	c.serves("spiffe://west.test/ns/shop/sa/pay")
	c.spire("agent list", agent, "Found 1 attested agent")

	// A machine of another CA is refused.
	stop()
	if err := os.RemoveAll(filepath.Join(c.dir, "pop-data")); err != nil {
		t.Fatal(err)
	}
	stranger := &x509.Certificate{SerialNumber: big.NewInt(3), Subject: pkix.Name{CommonName: "machine-7"}, NotBefore: leaf.NotBefore, NotAfter: leaf.NotAfter, KeyUsage: x509.KeyUsageDigitalSignature}
	strangerDER, err := x509.CreateCertificate(rand.Reader, stranger, stranger, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	pemFile(t, c, "machine.pem", "CERTIFICATE", strangerDER)
	c.runAgent("stranger", c.ip(1), "7444", attestor)
	m.eventually("the stranger is refused", func() error { return c.logged("stranger.log", "PermissionDenied") })
}

// logged says whether a log has a text in it.
func (c *member) logged(name, text string) error {
	b, err := os.ReadFile(filepath.Join(c.dir, name))
	if err == nil && !strings.Contains(string(b), text) {
		err = fmt.Errorf("%s has no %q", name, text)
	}
	return err
}

// TestNodeAgent: an unmodified spire-agent attests by a projected token (k8s_psat). The API server here answers TokenReview only, as
// Kubernetes 1.32 and newer do: that of a real one is held by test/kube.
func TestNodeAgent(t *testing.T) {
	m := newMesh(t, nil, "west")
	c := m.members[0]
	c.agentSock, c.spireAPI = c.dir+"/w.sock", c.dir+"/d/spire-server/api.sock"
	api := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var review struct {
			APIVersion string `json:"apiVersion"`
			Kind       string `json:"kind"`
			Spec       struct {
				Token     string   `json:"token"`
				Audiences []string `json:"audiences"`
			} `json:"spec"`
			Status map[string]any `json:"status"`
		}
		if err := json.NewDecoder(r.Body).Decode(&review); err != nil || r.URL.Path != "/apis/authentication.k8s.io/v1/tokenreviews" || r.Header.Get("Authorization") != "Bearer reviewer" {
			http.Error(w, "no", http.StatusForbidden)
			return
		}
		account, known := map[string]string{"node-token": "spire:spire-agent", "app-token": "shop:pay"}[review.Spec.Token]
		review.Status = map[string]any{"authenticated": known}
		if known {
			review.Status["audiences"] = []string{"spire-server"}
			review.Status["user"] = map[string]any{"username": "system:serviceaccount:" + account, "extra": map[string][]string{
				"authentication.kubernetes.io/pod-name": {"spire-agent-x7"}, "authentication.kubernetes.io/pod-uid": {"11111111-0000-0000-0000-000000000000"},
				"authentication.kubernetes.io/node-name": {"node-7"}, "authentication.kubernetes.io/node-uid": {"77777777-0000-0000-0000-000000000000"}}}
		}
		w.WriteHeader(http.StatusCreated)
		_ = json.NewEncoder(w).Encode(review)
	}))
	defer api.Close()
	c.program("hansed", "hansed")
	c.hansedConfig(fmt.Sprintf("  kubernetes: {cluster: west, server: %q, caFile: %q, tokenFile: %q, nodeAgents: [\"spire:spire-agent\"]}\n", api.URL,
		pemFile(t, c, "api.pem", "CERTIFICATE", api.Certificate().Raw), c.save("reviewer", "reviewer")), "")
	c.startHansed()
	m.eventually("hansed is ready", func() error { return ready(c.ip(1) + ":7440") })

	token := c.save("token", "node-token")
	attestor := fmt.Sprintf("NodeAttestor \"k8s_psat\" { plugin_data {\n cluster = \"west\"\n token_path = %q\n} }", token)
	// All node agents share a parent ID, as on a SPIRE of Kubernetes.
	c.spire("entry create -node -spiffeID spiffe://west.test/nodes -selector k8s_psat:cluster:west", "Entry ID")
	c.spire("entry create -parentID spiffe://west.test/nodes -spiffeID spiffe://west.test/ns/shop/sa/pay -selector "+selfSelector(t), "Entry ID")
	stop := c.runAgent("psat", c.ip(1), "7444", attestor)
	c.serves("spiffe://west.test/ns/shop/sa/pay")
	c.spire("agent list", "spiffe://west.test/spire/agent/k8s_psat/west/77777777-0000-0000-0000-000000000000")

	// The agent comes again with nothing but its token, as after its pod was replaced.
	stop()
	if err := os.RemoveAll(filepath.Join(c.dir, "psat-data")); err != nil {
		t.Fatal(err)
	}
	stop = c.runAgent("psat", c.ip(1), "7444", attestor)
	c.serves("spiffe://west.test/ns/shop/sa/pay")
	c.spire("agent list", "Found 1 attested agent")

	// A pod of another service account is no node agent.
	stop()
	if err := os.RemoveAll(filepath.Join(c.dir, "psat-data")); err != nil {
		t.Fatal(err)
	}
	c.save("token", "app-token")
	c.runAgent("pod", c.ip(1), "7444", attestor)
	m.eventually("the pod is refused", func() error { return c.logged("pod.log", "is not on the list of service accounts of node agents") })
}
