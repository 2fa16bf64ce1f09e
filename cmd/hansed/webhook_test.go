package main

import (
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	admissionv1 "k8s.io/api/admission/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/hanse-mesh/hanse/discovery/kube/inject"
)

func testWebhook(t testing.TB) http.Handler {
	t.Helper()
	v := inject.Values{Cluster: "west", TrustDomain: "west.demo", Image: "hanse-proxy:1"}
	if err := v.Complete(); err != nil {
		t.Fatal(err)
	}
	return newWebhook(v, slog.New(slog.DiscardHandler), nil).handler()
}

func review(t *testing.T, h http.Handler, path string, kind string, object string) *admissionv1.AdmissionResponse {
	t.Helper()
	body, err := json.Marshal(admissionv1.AdmissionReview{TypeMeta: metav1.TypeMeta{APIVersion: "admission.k8s.io/v1", Kind: "AdmissionReview"},
		Request: &admissionv1.AdmissionRequest{UID: "u1", Kind: metav1.GroupVersionKind{Version: "v1", Kind: kind}, Operation: admissionv1.Create, Object: runtime.RawExtension{Raw: []byte(object)}}})
	if err != nil {
		t.Fatal(err)
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest("POST", path, strings.NewReader(string(body))))
	var got admissionv1.AdmissionReview
	if err := json.Unmarshal(w.Body.Bytes(), &got); err != nil || got.Response == nil || got.Response.UID != "u1" || got.APIVersion != "admission.k8s.io/v1" {
		t.Fatalf("%s: %d %s: %v", path, w.Code, w.Body, err)
	}
	return got.Response
}

func TestWebhook(t *testing.T) {
	h := testWebhook(t)
	const plain = `{"metadata":{"name":"a"},"spec":{"containers":[{"name":"a","image":"x"}]}}`
	const optsIn = `{"metadata":{"name":"a","labels":{"hanse.mesh/inject":"enabled"}},"spec":{"containers":[{"name":"a","image":"x"}]}}`
	const optsOut = `{"metadata":{"name":"a","labels":{"hanse.mesh/inject":"disabled"}},"spec":{"containers":[{"name":"a","image":"x"}]}}`
	const wrong = `{"metadata":{"name":"a","annotations":{"hanse.mesh/proxy-cpu":"much"}},"spec":{"containers":[{"name":"a","image":"x"}]}}`
	for _, c := range []struct {
		path, object      string
		allowed, injected bool
	}{
		{"/inject/namespace", plain, true, true}, {"/inject/pod", plain, true, false}, {"/inject/pod", optsIn, true, true}, {"/inject/namespace", optsOut, true, false}, {"/inject/namespace", wrong, false, false},
	} {
		got := review(t, h, c.path, "Pod", c.object)
		if got.Allowed != c.allowed || (len(got.Patch) > 0) != c.injected || c.injected && !strings.Contains(string(got.Patch), "hanse-capture") {
			t.Errorf("%s of %s: %+v", c.path, c.object, got)
		}
		if !got.Allowed && !strings.Contains(got.Result.Message, `hanse.mesh/proxy-cpu: "much"`) {
			t.Errorf("the refusal does not name annotation and value: %s", got.Result.Message)
		}
	}
	good := `{"apiVersion":"hanse.mesh/v1alpha1","kind":"AccessPolicy","metadata":{"name":"a","namespace":"shop"},"spec":{"targetRefs":[{"kind":"Service","name":"a"}],"rules":[{"from":["spiffe://a/b"]}]}}`
	if got := review(t, h, "/validate", "AccessPolicy", good); !got.Allowed {
		t.Errorf("a good policy is refused: %s", got.Result.Message)
	}
	if got := review(t, h, "/validate", "AccessPolicy", strings.Replace(good, "spiffe://a/b", "b", 1)); got.Allowed || !strings.Contains(got.Result.Message, "spec.rules[0].from[0]") {
		t.Errorf("a bad policy: %+v", got.Result)
	}
	if got := review(t, h, "/validate", "Drill", `{"apiVersion":"hanse.mesh/v1alpha1","kind":"Drill","metadata":{"name":"d"},"spec":{"mode":"drain","scope":{"cluster":"west"}}}`); got.Allowed || !strings.Contains(got.Result.Message, "hanse drill run -f") {
		t.Errorf("a Drill in an API server: %+v", got)
	}
	for _, body := range []string{"", "{", `{"apiVersion":"admission.k8s.io/v1beta1","kind":"AdmissionReview","request":{}}`, `{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview"}`} {
		w := httptest.NewRecorder()
		if h.ServeHTTP(w, httptest.NewRequest("POST", "/inject/pod", strings.NewReader(body))); w.Code != http.StatusBadRequest {
			t.Errorf("%q: %d", body, w.Code)
		}
	}
}

func FuzzAdmissionReview(f *testing.F) {
	h := testWebhook(f)
	f.Add([]byte(`{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","request":{"uid":"1","kind":{"kind":"Pod"},"operation":"CREATE","object":{"spec":{"containers":[{}]}}}}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		for _, path := range []string{"/inject/namespace", "/validate"} {
			w := httptest.NewRecorder()
			if h.ServeHTTP(w, httptest.NewRequest("POST", path, strings.NewReader(string(body)))); w.Code != http.StatusOK && w.Code != http.StatusBadRequest {
				t.Fatalf("%d %s", w.Code, w.Body)
			}
		}
	})
}

func TestWebhookConfig(t *testing.T) {
	load := func(text string) (*Config, error) {
		path := filepath.Join(t.TempDir(), "hansed.yaml")
		if err := os.WriteFile(path, []byte("cluster: west\ntrustDomain: west.demo\ndataDir: data\n"+text), 0o600); err != nil {
			t.Fatal(err)
		}
		return LoadConfig(path)
	}
	c, err := load("kubeAPI: {enabled: true, webhook: {inject: {image: x}}}\n")
	if err != nil || c.KubeAPI.Webhook.Listen != ":7448" || c.KubeAPI.Webhook.Service != "hansed.hanse-system" || c.KubeAPI.Webhook.Inject.Cluster != "west" || c.KubeAPI.Webhook.Inject.XDS[0] != "hansed.hanse-system.svc:7445" {
		t.Errorf("%+v, %v", c, err)
	}
	for text, want := range map[string]string{
		"kubeAPI: {enabled: true, webhook: {listen: ':1'}}\n":                        "webhook.inject.image",
		"kubeAPI: {webhook: {inject: {image: x}}}\n":                                 "kubeAPI.enabled",
		"kubeAPI: {enabled: true, webhook: {service: hansed, inject: {image: x}}}\n": "webhook.service",
		"kubeAPI: {enabled: true, webhook: {inject: {image: x, cluster: east}}}\n":   "webhook.inject",
		"kubeAPI: {enabled: true, webhook: {inject: {image: x, identity: [a]}}}\n":   "host:port",
		"kubeAPI: {enabled: true, webhook: {inject: {image: x, colour: red}}}\n":     "colour",

		"kubeAPI: {enabled: true, webhook: {inject: {image: x, spire: {hostPath: /run}}}}\n":                                                              "remove it, or give identity.spire",
		"identity: {spire: {server: 'a:1', workloadAPI: 'unix:///s'}}\nkubeAPI: {enabled: true, webhook: {inject: {image: x}}}\n":                         "kubeAPI.webhook.inject.spire: missing",
		"identity: {spire: {server: 'a:1', workloadAPI: 'unix:///s'}}\nkubeAPI: {enabled: true, webhook: {inject: {image: x, spire: {hostPath: run}}}}\n": "spire.hostPath",
	} {
		if _, err := load(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q in it", text, err, want)
		}
	}
}
