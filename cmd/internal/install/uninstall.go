package install

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"

	"github.com/hanse-mesh/hanse/discovery/objects"
)

const (
	// writtenBy marks what hansed writes: imports, the Services behind them, ConfigMaps with roots.
	writtenBy      = "app.kubernetes.io/managed-by=hanse.mesh"
	slicesWritten  = "endpointslice.kubernetes.io/managed-by=hanse.mesh"
	injectLabel    = "hanse.mesh/inject"
	sidecarNote    = "hanse.mesh/sidecar"
	pageSize       = 500
	goneEvery      = time.Second
	dataClaimLabel = nameLabel + " in (" + hansed + "," + etcdName + ")"
)

// Leftovers is what people have to know before an uninstallation.
type Leftovers struct {
	Pods       map[string]int // with a sidecar, by namespace: they run on, and lose their control plane
	Exports    int            // ServiceExports that go with their definition
	Objects    int            // of Hanse's own kinds that people wrote, likewise
	Trust      int            // ClusterFederatedTrustDomains, likewise
	Claims     []string       // PersistentVolumeClaims with keys and etcd
	Namespaces []string       // that ask for sidecars
}

// Look finds them.
func (c *Cluster) Look(ctx context.Context) (Leftovers, error) {
	out := Leftovers{Pods: map[string]int{}}
	err := c.list(ctx, gvr("", "v1", "pods"), "", "", func(o *unstructured.Unstructured) error {
		phase, _, _ := unstructured.NestedString(o.Object, "status", "phase")
		if _, ok := o.GetAnnotations()[sidecarNote]; ok && phase != "Succeeded" && phase != "Failed" {
			out.Pods[o.GetNamespace()]++
		}
		return nil
	})
	if err != nil {
		return out, err
	}
	definitions, err := c.definitions(ctx)
	if err != nil {
		return out, err
	}
	for _, d := range definitions {
		n := 0
		if err := c.list(ctx, d.resource, "", "", func(*unstructured.Unstructured) error { n++; return nil }); err != nil {
			return out, err
		}
		switch {
		case d.resource.Group == "hanse.mesh":
			out.Objects += n
		case d.resource.Group == "spire.spiffe.io":
			out.Trust = n
		case d.resource.Resource == "serviceexports":
			out.Exports = n
		}
	}
	if err := c.list(ctx, gvr("", "v1", "persistentvolumeclaims"), c.Namespace, dataClaimLabel, func(o *unstructured.Unstructured) error {
		out.Claims = append(out.Claims, o.GetName())
		return nil
	}); err != nil {
		return out, err
	}
	err = c.list(ctx, kinds["Namespace"].GroupVersionResource, "", injectLabel, func(o *unstructured.Unstructured) error {
		out.Namespaces = append(out.Namespaces, o.GetName())
		return nil
	})
	return out, err
}

// definition is a CustomResourceDefinition that goes with Hanse.
type definition struct {
	name     string
	resource schema.GroupVersionResource
}

// definitions are those of Hanse's kinds, and those of MCS and SPIRE that this program installed and nobody else has applied since.
func (c *Cluster) definitions(ctx context.Context) ([]definition, error) {
	var out []definition
	err := c.list(ctx, kinds["CustomResourceDefinition"].GroupVersionResource, "", "", func(o *unstructured.Unstructured) error {
		group, _, _ := unstructured.NestedString(o.Object, "spec", "group")
		plural, _, _ := unstructured.NestedString(o.Object, "spec", "names", "plural")
		switch group {
		case "hanse.mesh":
		case "multicluster.x-k8s.io", "spire.spiffe.io":
			if !ours(o) || shared(o) {
				return nil
			}
		default:
			return nil
		}
		if version := stored(o); version != "" {
			out = append(out, definition{o.GetName(), gvr(group, version, plural)})
		}
		return nil
	})
	return out, err
}

// stored is the version in which a kind is stored.
func stored(crd *unstructured.Unstructured) string {
	l, _, _ := unstructured.NestedSlice(crd.Object, "spec", "versions")
	for _, x := range l {
		if m, ok := x.(map[string]any); ok && m["storage"] == true {
			s, _ := m["name"].(string)
			return s
		}
	}
	return ""
}

// list calls f for every object, page by page. A kind that does not exist has none.
func (c *Cluster) list(ctx context.Context, r schema.GroupVersionResource, namespace, selector string, f func(*unstructured.Unstructured) error) error {
	next := ""
	for {
		asked, cancel := context.WithTimeout(ctx, callTimeout)
		l, err := c.client.Resource(r).Namespace(namespace).List(asked, metav1.ListOptions{LabelSelector: selector, Limit: pageSize, Continue: next})
		cancel()
		if apierrors.IsNotFound(err) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("%s: %w", r.Resource, err)
		}
		for i := range l.Items {
			if err := f(&l.Items[i]); err != nil {
				return err
			}
		}
		if next = l.GetContinue(); next == "" {
			return nil
		}
	}
}

// Uninstall takes out everything: what was installed, and what hansed wrote into other namespaces, and conditions that it wrote into other objects. What is gone already is no error, so that an
// uninstallation that was interrupted can be repeated. keepData leaves the claims and the namespace they are in.
func (c *Cluster) Uninstall(ctx context.Context, keepData bool, tell func(string)) error {
	have, err := c.installed(ctx)
	if err != nil {
		return err
	}
	definitions, err := c.definitions(ctx)
	if err != nil {
		return err
	}
	for _, o := range have {
		if err := c.remove(ctx, o); err != nil {
			return err
		}
		tell("removed " + title(o))
	}
	// Nothing must write any more before what was written goes.
	if err := c.gone(ctx, "pods of hansed and gateways", tell, func() (int, error) {
		n := 0
		err := c.list(ctx, gvr("", "v1", "pods"), c.Namespace, partOf, func(*unstructured.Unstructured) error { n++; return nil })
		return n, err
	}); err != nil {
		return err
	}
	mcs := gvr("multicluster.x-k8s.io", "v1alpha1", "serviceimports")
	exports := mcs.GroupVersion().WithResource("serviceexports")
	if v, err := c.served(ctx, "serviceimports.multicluster.x-k8s.io"); err != nil {
		return err
	} else if v != "" {
		mcs.Version, exports.Version = v, v
	}
	for _, w := range []struct {
		what     string
		resource schema.GroupVersionResource
		selector string
	}{
		{"ServiceImports", mcs, writtenBy},
		{"Services of imports", gvr("", "v1", "services"), writtenBy},
		{"EndpointSlices of imports", gvr("discovery.k8s.io", "v1", "endpointslices"), slicesWritten},
		{"ConfigMaps hanse-root", gvr("", "v1", "configmaps"), writtenBy},
	} {
		n := 0
		err := c.list(ctx, w.resource, "", w.selector, func(o *unstructured.Unstructured) error {
			n++
			asked, cancel := context.WithTimeout(ctx, callTimeout)
			defer cancel()
			err := c.client.Resource(w.resource).Namespace(o.GetNamespace()).Delete(asked, o.GetName(), metav1.DeleteOptions{})
			if apierrors.IsNotFound(err) {
				return nil
			}
			return err
		})
		if err != nil {
			return err
		}
		if n > 0 {
			tell(fmt.Sprintf("removed %d %s", n, w.what))
		}
	}
	if n, err := c.clean(ctx, exports); err != nil {
		return err
	} else if n > 0 {
		tell(fmt.Sprintf("removed the conditions of %d ServiceExports", n))
	}
	for _, kind := range []string{"httproutes", "grpcroutes", "tlsroutes", "tcproutes"} {
		version, err := c.served(ctx, kind+".gateway.networking.k8s.io")
		if err != nil {
			return err
		}
		if version == "" {
			continue
		}
		n, err := c.disown(ctx, gvr("gateway.networking.k8s.io", version, kind))
		if err != nil {
			return err
		}
		if n > 0 {
			tell(fmt.Sprintf("removed what was said of %d %s", n, kind))
		}
	}
	n := 0
	if err := c.list(ctx, kinds["Namespace"].GroupVersionResource, "", injectLabel, func(o *unstructured.Unstructured) error {
		n++
		asked, cancel := context.WithTimeout(ctx, callTimeout)
		defer cancel()
		_, err := c.client.Resource(kinds["Namespace"].GroupVersionResource).Patch(asked, o.GetName(), types.MergePatchType, []byte(`{"metadata":{"labels":{"`+injectLabel+`":null}}}`), metav1.PatchOptions{FieldManager: manager})
		return err
	}); err != nil {
		return err
	}
	if n > 0 {
		tell(fmt.Sprintf("removed the label %s of %d namespaces", injectLabel, n))
	}
	for _, d := range definitions {
		asked, cancel := context.WithTimeout(ctx, callTimeout)
		err := c.client.Resource(kinds["CustomResourceDefinition"].GroupVersionResource).Delete(asked, d.name, metav1.DeleteOptions{})
		cancel()
		if err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("%s: %w", d.name, err)
		}
		tell("removed customresourcedefinition/" + d.name)
	}
	if keepData {
		tell("kept namespace/" + c.Namespace + " and its claims")
		return nil
	}
	if err := c.list(ctx, gvr("", "v1", "persistentvolumeclaims"), c.Namespace, dataClaimLabel, func(o *unstructured.Unstructured) error {
		asked, cancel := context.WithTimeout(ctx, callTimeout)
		defer cancel()
		tell("removed persistentvolumeclaim/" + o.GetName())
		return c.client.Resource(gvr("", "v1", "persistentvolumeclaims")).Namespace(c.Namespace).Delete(asked, o.GetName(), metav1.DeleteOptions{})
	}); err != nil && !apierrors.IsNotFound(err) {
		return err
	}
	return c.removeNamespace(ctx, tell)
}

// removeNamespace removes it if this program made it, or it has Hanse's label.
func (c *Cluster) removeNamespace(ctx context.Context, tell func(string)) error {
	namespaces := c.client.Resource(kinds["Namespace"].GroupVersionResource)
	asked, cancel := context.WithTimeout(ctx, callTimeout)
	o, err := namespaces.Get(asked, c.Namespace, metav1.GetOptions{})
	cancel()
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if o.GetLabels()["app.kubernetes.io/part-of"] != "hanse" {
		tell("kept namespace/" + c.Namespace + ", which Hanse did not make")
		return nil
	}
	asked, cancel = context.WithTimeout(ctx, callTimeout)
	err = namespaces.Delete(asked, c.Namespace, metav1.DeleteOptions{})
	cancel()
	if err != nil && !apierrors.IsNotFound(err) {
		return err
	}
	if err := c.gone(ctx, "namespace "+c.Namespace, tell, func() (int, error) {
		asked, cancel := context.WithTimeout(ctx, callTimeout)
		defer cancel()
		_, err := namespaces.Get(asked, c.Namespace, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return 0, nil
		}
		return 1, err
	}); err != nil {
		return err
	}
	tell("removed namespace/" + c.Namespace)
	return nil
}

// gone waits until count is 0.
func (c *Cluster) gone(ctx context.Context, what string, tell func(string), count func() (int, error)) error {
	for first := true; ; first = false {
		n, err := count()
		if err != nil {
			return err
		}
		if n == 0 {
			return nil
		}
		if first {
			tell("waiting for the end of " + what)
		}
		select {
		case <-ctx.Done():
			if errors.Is(ctx.Err(), context.DeadlineExceeded) {
				return fmt.Errorf("%s: still there", what)
			}
			return ctx.Err()
		case <-time.After(goneEvery):
		}
	}
}

// served is the version in which a definition is stored, "" if there is none.
func (c *Cluster) served(ctx context.Context, name string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	o, err := c.client.Resource(kinds["CustomResourceDefinition"].GroupVersionResource).Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	return stored(o), nil
}

// disown takes hansed's entries out of status.parents of routes; those of other controllers stay.
func (c *Cluster) disown(ctx context.Context, r schema.GroupVersionResource) (int, error) {
	n := 0
	err := c.list(ctx, r, "", "", func(o *unstructured.Unstructured) error {
		l, _, _ := unstructured.NestedSlice(o.Object, "status", "parents")
		rest := slices.DeleteFunc(slices.Clone(l), func(x any) bool {
			m, _ := x.(map[string]any)
			return m["controllerName"] == string(objects.ControllerName)
		})
		if len(rest) == len(l) {
			return nil
		}
		n++
		status := map[string]any{"parents": rest}
		if len(rest) == 0 {
			status = nil // as a route has it that nobody has looked at
		}
		return c.patchStatus(ctx, r, o, status)
	})
	return n, err
}

// patchStatus merges status into that of an object, if it is still what was read. One that is gone is no error.
func (c *Cluster) patchStatus(ctx context.Context, r schema.GroupVersionResource, o *unstructured.Unstructured, status map[string]any) error {
	b, err := json.Marshal(map[string]any{"metadata": map[string]any{"resourceVersion": o.GetResourceVersion()}, "status": status})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	_, err = c.client.Resource(r).Namespace(o.GetNamespace()).Patch(ctx, o.GetName(), types.MergePatchType, b, metav1.PatchOptions{FieldManager: manager}, "status")
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}

// hansedConditions are those that hansed writes into ServiceExports.
var hansedConditions = []string{"Valid", "Ready", "Conflict"}

// clean takes hansed's conditions out of ServiceExports.
func (c *Cluster) clean(ctx context.Context, r schema.GroupVersionResource) (int, error) {
	n := 0
	err := c.list(ctx, r, "", "", func(o *unstructured.Unstructured) error {
		l, _, _ := unstructured.NestedSlice(o.Object, "status", "conditions")
		rest := slices.DeleteFunc(slices.Clone(l), func(x any) bool {
			m, _ := x.(map[string]any)
			kind, _ := m["type"].(string)
			return slices.Contains(hansedConditions, kind)
		})
		if len(rest) == len(l) {
			return nil
		}
		n++
		return c.patchStatus(ctx, r, o, map[string]any{"conditions": rest})
	})
	return n, err
}

// String tells what people have to know.
func (l Leftovers) String() string {
	var lines []string
	if len(l.Pods) > 0 {
		total := 0
		var where []string
		for _, ns := range slices.Sorted(maps.Keys(l.Pods)) {
			total += l.Pods[ns]
			where = append(where, fmt.Sprintf("%s (%d)", ns, l.Pods[ns]))
		}
		lines = append(lines, fmt.Sprintf("%d pods have sidecars, in %s: they go on with what they know until their SVIDs expire; restart their workloads afterwards to be rid of them", total, strings.Join(where, ", ")))
	}
	if l.Exports > 0 {
		lines = append(lines, fmt.Sprintf("%d ServiceExports go with their definition", l.Exports))
	}
	if l.Objects > 0 {
		lines = append(lines, fmt.Sprintf("%d objects of Hanse's kinds go with theirs", l.Objects))
	}
	if l.Trust > 0 {
		lines = append(lines, fmt.Sprintf("%d ClusterFederatedTrustDomains go with their definition", l.Trust))
	}
	if len(l.Claims) > 0 {
		lines = append(lines, fmt.Sprintf("the claims %s go, with this cluster's keys and state (--keep-data keeps them)", strings.Join(l.Claims, ", ")))
	}
	if len(l.Namespaces) > 0 {
		lines = append(lines, fmt.Sprintf("the namespaces %s lose their label %s", strings.Join(l.Namespaces, ", "), injectLabel))
	}
	return strings.Join(lines, "\n")
}
