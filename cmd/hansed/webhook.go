package main

import (
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	admissionv1 "k8s.io/api/admission/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hanse-mesh/hanse/discovery/kube"
	"github.com/hanse-mesh/hanse/discovery/kube/inject"
	"github.com/hanse-mesh/hanse/discovery/objects"
	"github.com/hanse-mesh/hanse/identity"
)

// Webhook answers the API server: it puts sidecars into Pods and judges objects of our kinds. Off without an image.
type Webhook struct {
	Listen  string        `json:"listen"`  // default :7448
	Service string        `json:"service"` // name.namespace of the Service that leads here; default hansed.hanse-system
	Inject  inject.Values `json:"inject"`  // what sidecars have in common; cluster, trustDomain and network are this hansed's
}

// Names of the configurations by which API servers find the webhook; the chart has them.
const (
	injectConfiguration   = "hanse-inject"
	validateConfiguration = "hanse-validate"
)

func (c *Config) fillWebhook(version string) {
	w := &c.KubeAPI.Webhook
	if w.Inject.Image == "" {
		return
	}
	w.Listen, w.Service = cmp.Or(w.Listen, ":7448"), cmp.Or(w.Service, "hansed."+inject.SystemNamespace)
	v := &w.Inject
	v.Cluster, v.TrustDomain, v.Network, v.Version = cmp.Or(v.Cluster, c.Cluster), cmp.Or(v.TrustDomain, c.TrustDomain), cmp.Or(v.Network, c.Network), cmp.Or(v.Version, version)
	v.Audience = cmp.Or(v.Audience, c.Identity.Kubernetes.Audience)
}

func (c *Config) validateWebhook(bad func(field, format string, args ...any)) {
	w := &c.KubeAPI.Webhook
	if w.Inject.Image == "" {
		if w.Listen != "" || w.Service != "" {
			bad("kubeAPI.webhook.inject.image", "missing: without the image of hanse-proxy nothing is injected")
		}
		return
	}
	if !c.KubeAPI.Enabled {
		bad("kubeAPI.webhook", "it needs kubeAPI.enabled: the API server is told whom to trust")
	}
	if name, namespace, ok := strings.Cut(w.Service, "."); !ok || name == "" || namespace == "" {
		bad("kubeAPI.webhook.service", "%q is not NAME.NAMESPACE", w.Service)
	}
	if w.Inject.Cluster != c.Cluster || w.Inject.TrustDomain != c.TrustDomain {
		bad("kubeAPI.webhook.inject", "cluster and trustDomain are those of this hansed: leave them out")
	}
	switch on, given := c.Identity.SPIRE.Server != "", w.Inject.SPIRE.Used(); {
	case on && !given:
		bad("kubeAPI.webhook.inject.spire", "missing: identity.spire signs here, and sidecars find its agent by csiDriver (csi.spiffe.io) or hostPath (the directory of its socket)")
	case given && !on:
		bad("kubeAPI.webhook.inject.spire", "this control plane is the authority: remove it, or give identity.spire")
	}
	if err := w.Inject.Complete(); err != nil {
		bad("kubeAPI.webhook.inject", "%s", strings.ReplaceAll(err.Error(), "\n", "; "))
	}
}

// webhook serves admission reviews (admission.k8s.io/v1).
type webhook struct {
	values inject.Values
	log    *slog.Logger
	cert   atomic.Pointer[tls.Certificate]
	asked  *prometheus.CounterVec
}

// maxReview is what an API server sends at most: an object of 3 MiB and the one before.
const maxReview = 8 << 20

func newWebhook(values inject.Values, log *slog.Logger, reg prometheus.Registerer) *webhook {
	w := &webhook{values: values, log: log, asked: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "hanse_webhook_reviews_total", Help: "Admission reviews, by webhook (inject, validate) and result (injected, left, allowed, refused, malformed)."}, []string{"webhook", "result"})}
	if reg != nil {
		reg.MustRegister(w.asked)
	}
	return w
}

// handler answers on /inject/namespace, whose Pods are in a namespace that wants sidecars, /inject/pod, whose Pods say so themselves, and /validate.
func (w *webhook) handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("POST /inject/namespace", w.review("inject", func(r *admissionv1.AdmissionRequest) (*admissionv1.AdmissionResponse, string) {
		return w.inject(r, map[string]string{inject.Label: "enabled"})
	}))
	mux.Handle("POST /inject/pod", w.review("inject", func(r *admissionv1.AdmissionRequest) (*admissionv1.AdmissionResponse, string) {
		return w.inject(r, nil)
	}))
	mux.Handle("POST /validate", w.review("validate", validate))
	mux.HandleFunc("GET /readyz", func(rw http.ResponseWriter, _ *http.Request) { fmt.Fprintln(rw, "ok") })
	return mux
}

// review decodes a question and encodes the answer.
func (w *webhook) review(name string, answer func(*admissionv1.AdmissionRequest) (*admissionv1.AdmissionResponse, string)) http.Handler {
	return http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(http.MaxBytesReader(rw, r.Body, maxReview))
		var review admissionv1.AdmissionReview
		if err == nil {
			err = json.Unmarshal(body, &review)
		}
		if err == nil && (review.Request == nil || review.APIVersion != admissionv1.SchemeGroupVersion.String() || review.Kind != "AdmissionReview") {
			err = errors.New("want an AdmissionReview of admission.k8s.io/v1 with a request")
		}
		if err != nil {
			w.asked.WithLabelValues(name, "malformed").Inc()
			http.Error(rw, err.Error(), http.StatusBadRequest)
			return
		}
		resp, result := answer(review.Request)
		w.asked.WithLabelValues(name, result).Inc()
		resp.UID = review.Request.UID
		rw.Header().Set("Content-Type", "application/json")
		if err := json.NewEncoder(rw).Encode(admissionv1.AdmissionReview{TypeMeta: review.TypeMeta, Response: resp}); err != nil {
			w.log.Debug("admission review was not answered", "err", err)
		}
	})
}

func refused(err error) (*admissionv1.AdmissionResponse, string) {
	return &admissionv1.AdmissionResponse{Result: &metav1.Status{Status: metav1.StatusFailure, Code: http.StatusUnprocessableEntity, Reason: metav1.StatusReasonInvalid, Message: "hanse: " + err.Error()}}, "refused"
}

func (w *webhook) inject(r *admissionv1.AdmissionRequest, namespace map[string]string) (*admissionv1.AdmissionResponse, string) {
	if r.Kind.Kind != "Pod" || r.Operation != admissionv1.Create {
		return &admissionv1.AdmissionResponse{Allowed: true}, "left"
	}
	ops, why, err := w.values.Patch(namespace, r.Object.Raw)
	if err != nil {
		w.log.Warn("a Pod is refused", "namespace", r.Namespace, "name", r.Name, "err", err)
		return refused(err)
	}
	if len(ops) == 0 {
		return &admissionv1.AdmissionResponse{Allowed: true, AuditAnnotations: map[string]string{"left": why}}, "left"
	}
	patch, err := json.Marshal(ops)
	if err != nil {
		return refused(err)
	}
	kind := admissionv1.PatchTypeJSONPatch
	return &admissionv1.AdmissionResponse{Allowed: true, Patch: patch, PatchType: &kind}, "injected"
}

// validate gives the verdict of `hanse validate`; a Drill, which is good in a file, does nothing in an API server.
func validate(r *admissionv1.AdmissionRequest) (*admissionv1.AdmissionResponse, string) {
	if len(r.Object.Raw) > 0 {
		decoded, err := objects.Decode(r.Object.Raw, "")
		if err != nil {
			return refused(err)
		}
		for _, o := range decoded {
			if o.Kind == "Drill" {
				return refused(errors.New(objects.DrillIsRun))
			}
		}
	}
	return &admissionv1.AdmissionResponse{Allowed: true}, "allowed"
}

// runCertificate keeps a certificate of the issuer for the webhook's names.
func (w *webhook) runCertificate(ctx context.Context, p *controlPlane) error {
	service := p.cfg.KubeAPI.Webhook.Service
	names := []string{service + ".svc", service + ".svc.cluster.local", service, "localhost"}
	for ctx.Err() == nil {
		wait := time.Second // after an error
		changed := p.issuer.Changed()
		key, err := ecdsa.GenerateKey(p.cfg.Identity.Keys.elliptic(), rand.Reader)
		if err != nil {
			return err
		}
		chain, err := p.issuer.Sign(ctx, key, identity.ControlPlaneID(p.td), p.cfg.Identity.X509Life.Duration, names)
		if err != nil {
			w.log.Error("the webhook has no new certificate", "err", err)
			changed = nil
		} else {
			cert := &tls.Certificate{PrivateKey: key, Leaf: chain[0]}
			for _, c := range chain {
				cert.Certificate = append(cert.Certificate, c.Raw)
			}
			w.cert.Store(cert)
			wait = max(chain[0].NotAfter.Sub(p.now())/2, 50*time.Millisecond)
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-timer.C:
		case <-changed: // a root that is distrusted must not hold it
		}
		timer.Stop()
	}
	return nil
}

// tls is what the webhook serves with. API servers present no certificate unless told to: whoever reaches it learns what a sidecar looks like, no more.
func (w *webhook) tls() *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS13, SessionTicketsDisabled: true, NextProtos: []string{"h2", "http/1.1"}, GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
		if c := w.cert.Load(); c != nil {
			return c, nil
		}
		return nil, errors.New("no certificate yet")
	}}
}

// kubeRoots is what Kubernetes is told of the own roots.
func (p *controlPlane) kubeRoots() (kube.Roots, <-chan struct{}) {
	changed := p.bundles.Changed()
	b, ok := p.bundles.Get(p.td)
	if !ok {
		return kube.Roots{}, changed
	}
	doc, err := b.Marshal()
	if err != nil {
		p.log.Error("own bundle cannot be encoded", "err", err)
		return kube.Roots{}, changed
	}
	var text []byte
	for _, c := range b.X509Authorities() {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return kube.Roots{Bundle: doc, PEM: text}, changed
}
