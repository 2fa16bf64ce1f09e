package kube

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/hanse-mesh/hanse/discovery/objects"
)

const verdicts = "../../discovery/objects/testdata/verdicts/"

// documents are those of a YAML stream, each with the field that a comment before it wants refused.
func documents(t testing.TB, path string) (docs [][]byte, wants []string) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, doc := range bytes.Split(b, []byte("---\n")) {
		comment, _, _ := strings.Cut(string(doc), "\n")
		docs, wants = append(docs, doc), append(wants, strings.TrimPrefix(comment, "# wants: "))
	}
	return docs, wants
}

// submit asks for what kubectl would create, and changes nothing.
func (s *server) submit(o *unstructured.Unstructured) error {
	r, err := s.resource(o)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	_, err = r.Create(ctx, o, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}, FieldValidation: metav1.FieldValidationStrict})
	return err
}

// TestVerdictsAgree: `hanse validate` and an API server with hansed's webhook accept the same objects and refuse the same; the definitions
// alone refuse no good one.
func TestVerdictsAgree(t *testing.T) {
	t.Parallel()
	s := start(t)
	s.crds(filepath.Join(module(t, "sigs.k8s.io/mcs-api"), "config/crd"), "serviceexports", "serviceimports")
	s.crds("../../deploy/crd", "hanse.mesh")
	s.crds("../../deploy/crd/optional", "spire")
	s.namespaces("shop")
	good, _ := documents(t, verdicts+"good.yaml")
	bad, wants := documents(t, verdicts+"bad.yaml")
	alone := make([]bool, len(bad)) // refused by the definition alone
	for _, doc := range good {
		if err := s.submit(decode(t, doc)[0]); err != nil {
			t.Errorf("the definitions refuse a good object: %v\n%s", err, doc)
		}
	}
	for i, doc := range bad {
		alone[i] = s.submit(decode(t, doc)[0]) != nil
	}

	h := newHansed(t, s)
	_, port, _ := net.SplitHostPort(h.webhook)
	s.apply(fmt.Appendf(nil, `
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingWebhookConfiguration
metadata: {name: hanse-validate}
webhooks:
- name: validate.hanse.mesh
  admissionReviewVersions: [v1]
  clientConfig: {url: "https://localhost:%s/validate"}
  rules:
  - {apiGroups: [hanse.mesh], apiVersions: ["*"], resources: ["*"], operations: [CREATE, UPDATE], scope: "*"}
  - {apiGroups: [multicluster.x-k8s.io], apiVersions: ["*"], resources: [serviceexports], operations: [CREATE, UPDATE], scope: Namespaced}
  failurePolicy: Fail
  sideEffects: None
`, port))
	configurations := schema.GroupVersionResource{Group: "admissionregistration.k8s.io", Version: "v1", Resource: "validatingwebhookconfigurations"}
	until(t, "the API server is told whom to trust", func() bool {
		for _, w := range at[[]any](s.get(configurations, "", "hanse-validate"), "webhooks") {
			config, _ := w.(map[string]any)["clientConfig"].(map[string]any)
			return config["caBundle"] != nil
		}
		return false
	})
	until(t, "the webhook answers", func() bool { return s.submit(decode(t, good[0])[0]) == nil })
	validate := func(doc []byte) (string, error) {
		out, err := exec.Command(filepath.Join(h.bin, "hanse"), "validate", "-f", h.write("object.yaml", string(doc))).CombinedOutput()
		return string(out), err
	}
	for _, doc := range good {
		if out, err := validate(doc); err != nil {
			t.Errorf("hanse validate refuses a good object: %s\n%s", out, doc)
		}
		if err := s.submit(decode(t, doc)[0]); err != nil {
			t.Errorf("the API server with the webhook refuses a good object: %v\n%s", err, doc)
		}
	}
	n := 0
	for i, doc := range bad {
		out, err := validate(doc)
		if err == nil || !strings.Contains(out, wants[i]) {
			t.Errorf("hanse validate says %v for the field %s: %s\n%s", err, wants[i], out, doc)
		}
		err = s.submit(decode(t, doc)[0])
		if err == nil || !alone[i] && !strings.Contains(err.Error(), wants[i]) {
			t.Errorf("the API server with the webhook says %v for the field %s of\n%s", err, wants[i], doc)
		}
		if alone[i] {
			n++
		} else {
			t.Logf("only the webhook refuses %s: %v", wants[i], err)
		}
	}
	t.Logf("of %d bad objects the definitions alone refuse %d", len(bad), n)
}

// TestBadObjectsHarmNobody: without a webhook, a fault in each kind is either refused by the API server or reported with its field; the rest
// stays as it is.
func TestBadObjectsHarmNobody(t *testing.T) {
	t.Parallel()
	s := start(t)
	s.crds(filepath.Join(module(t, "sigs.k8s.io/gateway-api"), "config/crd/experimental"), "httproutes", "grpcroutes", "referencegrants")
	s.crds(filepath.Join(module(t, "sigs.k8s.io/mcs-api"), "config/crd"), "serviceexports", "serviceimports")
	s.crds("../../deploy/crd", "hanse.mesh")
	s.crds("../../deploy/crd/optional", "spire")
	s.apply([]byte(shop))
	src := source(t, s)
	until(t, "complete", src.Complete)
	before, _ := snapshot(t, src.Set())
	bad, wants := documents(t, verdicts+"bad.yaml")
	more, moreWants := documents(t, "testdata/bad.yaml")
	bad, wants = append(bad, more...), append(wants, moreWants...)
	kinds := map[string]bool{}
	reported := map[objects.Key]string{}
	for i, doc := range bad {
		o := decode(t, doc)[0]
		kinds[o.GetKind()] = true
		if err := s.tryApply(o); err == nil {
			reported[objects.Key{Kind: o.GetKind(), Namespace: o.GetNamespace(), Name: o.GetName()}] = wants[i]
		}
	}
	for _, k := range objects.Kinds() {
		if !kinds[k.Name] && k.Name != "Drill" && k.Name != "TCPRoute" && k.Name != "TLSRoute" {
			t.Errorf("no fault in a %s is tried", k.Name)
		}
	}
	delete(reported, objects.Key{Kind: "TrafficPolicy", Namespace: "shop", Name: "t16"}) // an unknown field, which the API server leaves out
	for key, field := range reported {
		until(t, key.String()+" is reported with "+field, func() bool {
			for _, f := range src.Faults() {
				if f.Object == key.String() && strings.HasPrefix(f.Field, field) {
					return true
				}
			}
			return false
		})
	}
	after, _ := snapshot(t, src.Set())
	for n, svc := range before.Services.All() {
		if now := after.Services.Get(n); now == nil || len(now.Endpoints) != len(svc.Endpoints) || fmt.Sprint(now.Ports) != fmt.Sprint(svc.Ports) {
			t.Errorf("Service %s is %+v, before %+v", n, now, svc)
		}
	}
	t.Logf("%d faults: %d refused by the API server, %d reported", len(bad), len(bad)-len(reported), len(reported))
}

// TestExplain: kubectl explains our kinds field by field, and lists them by their short names and category.
func TestExplain(t *testing.T) {
	t.Parallel()
	need(t, "kubectl", "nobody reads the definitions as people do")
	s := start(t)
	s.crds("../../deploy/crd", "hanse.mesh")
	s.crds("../../deploy/crd/optional", "spire")
	s.namespaces("shop")
	good, _ := documents(t, verdicts+"good.yaml")
	for _, doc := range good {
		if o := decode(t, doc)[0]; strings.HasPrefix(o.GetAPIVersion(), "hanse.mesh/") {
			s.apply(doc)
		}
	}
	s.apply([]byte("apiVersion: spire.spiffe.io/v1alpha1\nkind: ClusterFederatedTrustDomain\nmetadata: {name: partner}\nspec: {trustDomain: partner.example, bundleEndpointURL: https://partner.example/bundle, bundleEndpointProfile: {type: https_web}}\n"))
	kubectl := func(args ...string) string {
		cmd := exec.Command(tools+"kubectl", append([]string{"--server", s.config.Host, "--certificate-authority", s.config.CAFile, "--token", "admintoken", "--kubeconfig", "/dev/null"}, args...)...)
		cmd.Env = append(os.Environ(), "HOME="+t.TempDir())
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Errorf("kubectl %v: %v\n%s", args, err, out)
		}
		return string(out)
	}
	// An API server publishes the schemas that kubectl explains some time after it has taken the definitions.
	until(t, "all schemas are published", func() bool {
		all := kubectl("get", "--raw", "/openapi/v3")
		if !strings.Contains(all, "apis/spire.spiffe.io/v1alpha1") || !strings.Contains(all, "apis/hanse.mesh/v1alpha1") {
			return false
		}
		ours := kubectl("get", "--raw", "/openapi/v3/apis/hanse.mesh/v1alpha1")
		return strings.Contains(ours, `"TrafficPolicy"`) && strings.Contains(ours, `"AccessPolicy"`) && strings.Contains(ours, `"Peer"`)
	})
	for _, kind := range []string{"trafficpolicy", "accesspolicy", "peer", "clusterfederatedtrustdomain"} {
		out := kubectl("explain", "--recursive=false", kind+".spec")
		if !strings.Contains(out, "FIELDS:") || strings.Contains(out, "<no description>") {
			t.Errorf("kubectl explain %s.spec:\n%s", kind, out)
		}
	}
	if out := kubectl("explain", "trafficpolicy.spec.locality.mode"); !strings.Contains(out, "Mode is Failover (default), Pin, Balance or Weigh.") || !strings.Contains(out, "ENUM:") {
		t.Errorf("kubectl explain:\n%s", out)
	}
	for args, want := range map[string]string{
		"get tp -n shop":                   "near",
		"get ap -n shop":                   "nobody",
		"get peers":                        "ask",
		"get hanse -A":                     "trafficpolicy.hanse.mesh/near",
		"get clusterfederatedtrustdomains": "https://partner.example/bundle",
	} {
		if out := kubectl(strings.Fields(args)...); !strings.Contains(out, want) {
			t.Errorf("kubectl %s does not show %s:\n%s", args, want, out)
		}
	}
}

// TestPolicyStatus: objects of our own kinds say whether they are in force, and why not.
func TestPolicyStatus(t *testing.T) {
	t.Parallel()
	s := start(t)
	s.crds("../../deploy/crd", "hanse.mesh")
	s.apply([]byte(shop))
	src := source(t, s)
	until(t, "complete", src.Complete)
	local, _ := snapshot(t, src.Set())
	writer(t, s, src).set(local)
	tp := schema.GroupVersionResource{Group: "hanse.mesh", Version: "v1alpha1", Resource: "trafficpolicies"}
	peers := schema.GroupVersionResource{Group: "hanse.mesh", Version: "v1alpha1", Resource: "peers"}
	policy := func(header string) {
		s.apply(fmt.Appendf(nil, "apiVersion: hanse.mesh/v1alpha1\nkind: TrafficPolicy\nmetadata: {name: p, namespace: shop}\nspec: {targetRefs: [{kind: Service, name: payments}], loadBalancer: {type: RingHash, hashHeader: %q}}\n", header))
	}
	is := func(r schema.GroupVersionResource, namespace, name, status, reason, message string) {
		t.Helper()
		until(t, fmt.Sprintf("%s is Accepted=%s (%s): %s", name, status, reason, message), func() bool {
			o := s.get(r, namespace, name)
			for _, c := range at[[]any](o, "status", "conditions") {
				m := c.(map[string]any)
				if m["type"] == "Accepted" {
					return m["status"] == status && m["reason"] == reason && strings.Contains(m["message"].(string), message) && m["observedGeneration"] == o.GetGeneration()
				}
			}
			return false
		})
	}
	policy("x-user")
	s.apply([]byte("apiVersion: hanse.mesh/v1alpha1\nkind: Peer\nmetadata: {name: east}\nspec: {import: {spiffeIDs: [\"spiffe://East/**\"]}}\n"))
	is(tp, "shop", "p", "True", "Accepted", "in force")
	is(peers, "", "east", "False", "Invalid", "spec.import.spiffeIDs[0]")
	policy("a b")
	is(tp, "shop", "p", "False", "Invalid", `spec.loadBalancer.hashHeader: "a b"`)
	policy("x-tenant")
	is(tp, "shop", "p", "True", "Accepted", "in force")
	before := s.get(tp, "shop", "p").GetResourceVersion()
	time.Sleep(time.Second)
	if after := s.get(tp, "shop", "p").GetResourceVersion(); after != before {
		t.Error("an unchanged status was written again")
	}
}
