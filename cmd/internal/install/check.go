package install

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/rest"

	"github.com/hanse-mesh/hanse/cmd/internal/admin"
)

const (
	maxSkew   = 30 * time.Second // between this machine and the API server: tokens and SVIDs have times
	minMinor  = 32
	maxAnswer = 1 << 20
)

// Version is the API server's ("v1.36.3"), and by how much its clock is ahead of this machine's.
func (c *Cluster) Version(ctx context.Context) (version string, ahead time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	client, err := rest.HTTPClientFor(c.rest)
	if err != nil {
		return "", 0, err
	}
	host, _, err := rest.DefaultServerUrlFor(c.rest)
	if err != nil {
		return "", 0, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, host.JoinPath("version").String(), nil)
	if err != nil {
		return "", 0, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return "", 0, err
	}
	defer resp.Body.Close()
	var v struct {
		GitVersion string `json:"gitVersion"`
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return "", 0, err
	}
	if resp.StatusCode != http.StatusOK || json.Unmarshal(b, &v) != nil || v.GitVersion == "" {
		return "", 0, fmt.Errorf("GET /version: %s", resp.Status)
	}
	if at, err := http.ParseTime(resp.Header.Get("Date")); err == nil {
		ahead = time.Until(at.Add(500 * time.Millisecond)) // it has whole seconds
	}
	return v.GitVersion, ahead, nil
}

// Before checks what an installation needs of a cluster. tell is told each fact.
func (c *Cluster) Before(ctx context.Context, objects []*unstructured.Unstructured, tell func(admin.Check)) (ok bool) {
	ok = true
	say := func(k admin.Check) {
		ok = ok && (k.OK || k.Warn)
		tell(k)
	}
	version, ahead, err := c.Version(ctx)
	if err != nil {
		say(admin.Check{Name: "API server", Detail: err.Error(), Remedy: "does kubectl --context " + c.Context + " version answer?"})
		return false
	}
	say(admin.Check{Name: "API server", OK: true, Detail: version})
	var minor int
	if _, err := fmt.Sscanf(version, "v1.%d", &minor); err != nil || minor < minMinor {
		say(admin.Check{Name: "version", Detail: version, Remedy: fmt.Sprintf("Hanse needs Kubernetes 1.%d or newer: native sidecars, and tokens that name their node", minMinor)})
	}
	if skew := ahead.Abs(); skew > maxSkew {
		say(admin.Check{Name: "clocks agree", Warn: true, Detail: fmt.Sprintf("the API server's is %s from this machine's", skew.Round(time.Second)), Remedy: "identities have times: see to NTP on whichever is wrong"})
	} else {
		say(admin.Check{Name: "clocks agree", OK: true, Detail: fmt.Sprintf("%.0fs apart", skew.Seconds())})
	}
	if missing, err := c.lacking(ctx, objects); err != nil {
		say(admin.Check{Name: "you may install", Detail: err.Error(), Remedy: "selfsubjectaccessreviews must be allowed, as they are to everybody by default"})
	} else if len(missing) > 0 {
		say(admin.Check{Name: "you may install", Detail: "you may not " + strings.Join(missing, ", "), Remedy: "ask for the ClusterRole cluster-admin, or let somebody install who has it"})
	} else {
		say(admin.Check{Name: "you may install", OK: true})
	}
	say(c.gatewayAPI(ctx))
	if wantsStorage(objects) {
		say(c.storage(ctx))
	}
	for _, driver := range csiDrivers(objects) {
		say(c.csiDriver(ctx, driver))
	}
	return ok
}

// lacking are the kinds of objects that the caller may not apply.
func (c *Cluster) lacking(ctx context.Context, objects []*unstructured.Unstructured) ([]string, error) {
	var out []string
	seen := map[string]bool{}
	for _, o := range objects {
		k := kinds[o.GetKind()]
		for _, verb := range []string{"create", "patch"} {
			key := verb + " " + k.Resource
			if seen[key] {
				continue
			}
			seen[key] = true
			attributes := map[string]any{"verb": verb, "group": k.Group, "resource": k.Resource}
			if !k.cluster {
				attributes["namespace"] = c.Namespace
			}
			allowed, err := c.review(ctx, "selfsubjectaccessreviews", "SelfSubjectAccessReview", map[string]any{"resourceAttributes": attributes})
			if err != nil {
				return nil, err
			}
			if !allowed {
				out = append(out, key)
			}
		}
	}
	return out, nil
}

func (c *Cluster) review(ctx context.Context, resource, kind string, spec map[string]any) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	o, err := c.client.Resource(gvr("authorization.k8s.io", "v1", resource)).Create(ctx, &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "authorization.k8s.io/v1", "kind": kind, "spec": spec}}, metav1.CreateOptions{})
	if err != nil {
		return false, err
	}
	allowed, _, _ := unstructured.NestedBool(o.Object, "status", "allowed")
	return allowed, nil
}

func (c *Cluster) gatewayAPI(ctx context.Context) admin.Check {
	version, err := c.served(ctx, "httproutes.gateway.networking.k8s.io")
	if err != nil || version == "" {
		return admin.Check{Name: "Gateway API", Warn: true, Detail: "not installed: no routes", Remedy: "https://gateway-api.sigs.k8s.io/guides/ installs it, if you want HTTPRoutes and GRPCRoutes"}
	}
	return admin.Check{Name: "Gateway API", OK: true, Detail: version}
}

func wantsStorage(objects []*unstructured.Unstructured) bool {
	return slices.ContainsFunc(objects, func(o *unstructured.Unstructured) bool {
		l, _, _ := unstructured.NestedSlice(o.Object, "spec", "volumeClaimTemplates")
		for _, x := range l {
			m, _ := x.(map[string]any)
			if class, _, _ := unstructured.NestedString(m, "spec", "storageClassName"); class == "" {
				return true
			}
		}
		return false
	})
}

func (c *Cluster) storage(ctx context.Context) admin.Check {
	found := ""
	err := c.list(ctx, gvr("storage.k8s.io", "v1", "storageclasses"), "", "", func(o *unstructured.Unstructured) error {
		if o.GetAnnotations()["storageclass.kubernetes.io/is-default-class"] == "true" {
			found = o.GetName()
		}
		return nil
	})
	if err != nil {
		return admin.Check{Name: "storage", Warn: true, Detail: "it is not known whether there is a default StorageClass, without which hansed would wait for its volume: " + err.Error(),
			Remedy: "kubectl --context " + c.Context + " get storageclass; --set hansed.persistence.storageClass=NAME needs no default"}
	}
	if found == "" {
		return admin.Check{Name: "storage", Warn: true, Detail: "there is no default StorageClass: hansed would wait for its volume",
			Remedy: "--set hansed.persistence.storageClass=NAME, or for a trial --set hansed.persistence.enabled=false"}
	}
	return admin.Check{Name: "storage", OK: true, Detail: "StorageClass " + found}
}

// csiDrivers are those of the volumes of Pods, which with identity.spire bring the SPIRE agent's socket.
func csiDrivers(objects []*unstructured.Unstructured) []string {
	var out []string
	for _, o := range objects {
		l, _, _ := unstructured.NestedSlice(o.Object, "spec", "template", "spec", "volumes")
		for _, x := range l {
			m, _ := x.(map[string]any)
			if driver, ok, _ := unstructured.NestedString(m, "csi", "driver"); ok && !slices.Contains(out, driver) {
				out = append(out, driver)
			}
		}
	}
	return out
}

func (c *Cluster) csiDriver(ctx context.Context, name string) admin.Check {
	asked, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if _, err := c.client.Resource(gvr("storage.k8s.io", "v1", "csidrivers")).Get(asked, name, metav1.GetOptions{}); err != nil {
		if !apierrors.IsNotFound(err) {
			return admin.Check{Name: "CSI driver", Warn: true, Detail: err.Error(), Remedy: "kubectl --context " + c.Context + " get csidriver " + name}
		}
		return admin.Check{Name: "CSI driver", Warn: true, Detail: fmt.Sprintf("there is no CSIDriver %s: Pods would wait for the SPIRE agent's socket", name),
			Remedy: "install the SPIFFE CSI driver beside SPIRE's agents, or --set identity.spire.hostPath=DIRECTORY of the socket on the nodes"}
	}
	return admin.Check{Name: "CSI driver", OK: true, Detail: name}
}

// After checks an installation. objects are what it should be; nil leaves that out.
func (c *Cluster) After(ctx context.Context, objects []*unstructured.Unstructured, tell func(admin.Check)) (ok bool) {
	ok = true
	say := func(k admin.Check) {
		ok = ok && (k.OK || k.Warn)
		tell(k)
	}
	for _, o := range objects {
		if o.GetKind() == "CustomResourceDefinition" {
			asked, cancel := context.WithTimeout(ctx, callTimeout)
			have, err := c.client.Resource(kinds["CustomResourceDefinition"].GroupVersionResource).Get(asked, o.GetName(), metav1.GetOptions{})
			cancel()
			if err != nil || condition(have, "Established") != "True" {
				say(admin.Check{Name: "definition", Detail: o.GetName() + " is not there, or not established", Remedy: "hanse upgrade --context " + c.Context})
			}
		}
		if o.GetKind() == "ClusterRole" && o.GetName() == hansed {
			say(c.hansedMay(ctx, o))
		}
	}
	if names := etcdNames(objects, c.Namespace); names != nil {
		say(c.etcdCertificate(ctx, names, time.Now()))
	}
	waiting, err := c.waiting(ctx)
	switch {
	case err != nil:
		say(admin.Check{Name: "pods", Detail: err.Error(), Remedy: "hanse install --context " + c.Context})
		return false
	case waiting != "":
		k := admin.Check{Name: "pods", Detail: waiting, Remedy: "kubectl --context " + c.Context + " -n " + c.Namespace + " describe pods; images that no registry has are to be loaded into each node (make images)"}
		if all, err := c.stuck(ctx, time.Now()); err == nil && len(all) > 0 {
			k.Remedy = "hanse upgrade --context " + c.Context + " makes " + all[0].pod.GetName() + " anew, which is stuck in the revision before"
		}
		say(k)
	default:
		say(admin.Check{Name: "pods", OK: true, Detail: "hansed and gateways are ready"})
	}
	for _, hook := range []string{"MutatingWebhookConfiguration", "ValidatingWebhookConfiguration"} {
		if k, there := c.hook(ctx, hook); there {
			say(k)
		}
	}
	if k, there := c.injects(ctx); there {
		say(k)
	}
	return ok
}

// hansedMay asks whether hansed may do what its role says: a binding may be missing, or a webhook or a policy stand in between.
func (c *Cluster) hansedMay(ctx context.Context, role *unstructured.Unstructured) admin.Check {
	rules, _, _ := unstructured.NestedSlice(role.Object, "rules")
	var missing []string
	for _, x := range rules {
		m, _ := x.(map[string]any)
		strs := func(field string) []string {
			l, _, _ := unstructured.NestedStringSlice(m, field)
			return l
		}
		attributes := map[string]any{"verb": strs("verbs")[0], "group": strs("apiGroups")[0]}
		resource, sub, _ := strings.Cut(strs("resources")[0], "/")
		attributes["resource"] = resource
		if sub != "" {
			attributes["subresource"] = sub
		}
		if names := strs("resourceNames"); len(names) > 0 {
			attributes["name"] = names[0]
		}
		allowed, err := c.review(ctx, "subjectaccessreviews", "SubjectAccessReview", map[string]any{"user": "system:serviceaccount:" + c.Namespace + ":" + hansed,
			"groups": []any{"system:serviceaccounts", "system:serviceaccounts:" + c.Namespace, "system:authenticated"}, "resourceAttributes": attributes})
		if err != nil {
			return admin.Check{Name: "hansed may", Warn: true, Detail: err.Error(), Remedy: "you may not ask: subjectaccessreviews need the ClusterRole system:auth-delegator"}
		}
		if !allowed {
			missing = append(missing, fmt.Sprint(attributes["verb"], " ", resource))
		}
	}
	if len(missing) > 0 {
		return admin.Check{Name: "hansed may", Detail: "it may not " + strings.Join(missing, ", "), Remedy: "hanse upgrade --context " + c.Context + " writes its ClusterRole and binding anew"}
	}
	return admin.Check{Name: "hansed may", OK: true, Detail: fmt.Sprintf("all %d rules of its ClusterRole", len(rules))}
}

// hook checks that hansed has told the API server whom to trust.
func (c *Cluster) hook(ctx context.Context, kind string) (k admin.Check, there bool) {
	k.Name = "webhook"
	err := c.list(ctx, kinds[kind].GroupVersionResource, "", partOf, func(o *unstructured.Unstructured) error {
		there = true
		k.Name = "webhook " + o.GetName()
		l, _, _ := unstructured.NestedSlice(o.Object, "webhooks")
		for _, x := range l {
			m, _ := x.(map[string]any)
			if b, _, _ := unstructured.NestedString(m, "clientConfig", "caBundle"); b == "" {
				k.Detail, k.Remedy = "it has no CA bundle yet", "the hansed that leads writes it: its log says why not"
				return nil
			}
		}
		k.OK, k.Detail = true, "the API server knows whom to trust"
		return nil
	})
	if err != nil {
		return admin.Check{Name: k.Name, Detail: err.Error()}, true
	}
	return k, there
}

// injects tries the webhook with a Pod that is not made.
func (c *Cluster) injects(ctx context.Context) (admin.Check, bool) {
	asked, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if _, err := c.client.Resource(kinds["MutatingWebhookConfiguration"].GroupVersionResource).Get(asked, "hanse-inject", metav1.GetOptions{}); apierrors.IsNotFound(err) {
		return admin.Check{}, false
	}
	k := admin.Check{Name: "injection"}
	pod := &unstructured.Unstructured{Object: map[string]any{"apiVersion": "v1", "kind": "Pod",
		"metadata": map[string]any{"generateName": "hanse-check-", "namespace": "default", "labels": map[string]any{injectLabel: "enabled"}},
		"spec":     map[string]any{"containers": []any{map[string]any{"name": "app", "image": "hanse.mesh/none"}}}}}
	got, err := c.client.Resource(gvr("", "v1", "pods")).Namespace("default").Create(asked, pod, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
	if err != nil {
		k.Detail, k.Remedy = "a trial Pod (not made) is refused: "+err.Error(), "the API server must reach hansed's pods at port 7448: does a firewall or network policy stand in between?"
		if apierrors.IsForbidden(err) {
			k.Warn = true
		}
		return k, true
	}
	l, _, _ := unstructured.NestedSlice(got.Object, "spec", "initContainers")
	for _, x := range l {
		if m, ok := x.(map[string]any); ok && m["name"] == "hanse-proxy" {
			k.OK, k.Detail = true, "a trial Pod (not made) is given a sidecar"
			return k, true
		}
	}
	k.Detail, k.Remedy = "a trial Pod (not made) is given no sidecar", "no hansed answers the webhook, and its failurePolicy is Ignore: its log says why"
	return k, true
}
