package kube

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/dynamic/dynamicinformer"
	"k8s.io/client-go/tools/cache"
)

// RootConfigMap is in each namespace, so that sidecars know whom to trust before they have an identity.
const RootConfigMap = "hanse-root"

// Keys of RootConfigMap.
const (
	RootBundle = "bundle.json" // the SPIFFE bundle of the trust domain
	RootPEM    = "ca.pem"      // its X.509 authorities
)

// Roots is what the API server is told of this cluster's trust domain.
type Roots struct{ Bundle, PEM []byte }

// RootKeeper keeps RootConfigMap in every namespace, and the CA bundles of webhook configurations, as the trust domain's roots are. It writes only what differs. One replica of hansed
// runs it, the leader.
type RootKeeper struct {
	source *Source
	roots  func() (Roots, <-chan struct{})
	hooks  map[schema.GroupVersionResource]string
	log    *slog.Logger
	writes *prometheus.CounterVec
}

// NewRootKeeper returns a RootKeeper for the API server of source. roots returns the newest, and a channel that is closed when there are newer ones. mutating and validating name
// configurations of webhooks that hansed serves; those that do not exist are left alone, and "" is none. writes counts by resource, verb and result, as a Writer's.
func (w *Writer) NewRootKeeper(roots func() (Roots, <-chan struct{}), mutating, validating string) *RootKeeper {
	gv := schema.GroupVersion{Group: "admissionregistration.k8s.io", Version: "v1"}
	return &RootKeeper{source: w.cfg.Source, roots: roots, log: w.cfg.Log, writes: w.writes, hooks: map[schema.GroupVersionResource]string{
		gv.WithResource("mutatingwebhookconfigurations"): mutating, gv.WithResource("validatingwebhookconfigurations"): validating}}
}

// without are namespaces in which no workload of the mesh runs.
var without = []string{"kube-system", "kube-public", "kube-node-lease"}

var configMaps = corev1.SchemeGroupVersion.WithResource("configmaps")

// Run writes until ctx ends, and returns nil then. What fails is tried again.
func (k *RootKeeper) Run(ctx context.Context) error {
	client := k.source.clients.dynamic
	dirty := make(chan struct{}, 1)
	signal := func() {
		select {
		case dirty <- struct{}{}:
		default:
		}
	}
	named := func(name string) dynamicinformer.TweakListOptionsFunc {
		return func(o *metav1.ListOptions) {
			if name != "" {
				o.FieldSelector = fields.OneTermEqualSelector("metadata.name", name).String()
			}
		}
	}
	var running sync.WaitGroup
	defer running.Wait()
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	var synced []cache.InformerSynced
	watch := func(r schema.GroupVersionResource, name string) (cache.GenericLister, error) {
		i := dynamicinformer.NewFilteredDynamicInformer(client, r, "", 0, nil, named(name))
		if err := i.Informer().SetTransform(func(o any) (any, error) {
			if u, ok := o.(*unstructured.Unstructured); ok {
				u.SetManagedFields(nil)
			}
			return o, nil
		}); err != nil {
			return nil, err
		}
		if err := i.Informer().SetWatchErrorHandlerWithContext(func(_ context.Context, _ *cache.Reflector, err error) {
			k.log.Debug("watch begins again", "resource", r.Resource, "err", err)
		}); err != nil {
			return nil, err
		}
		if _, err := i.Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{AddFunc: func(any) { signal() }, UpdateFunc: func(any, any) { signal() }, DeleteFunc: func(any) { signal() }}); err != nil {
			return nil, err
		}
		running.Go(func() { i.Informer().RunWithContext(ctx) })
		synced = append(synced, i.Informer().HasSynced)
		return i.Lister(), nil
	}
	namespaces, err := watch(corev1.SchemeGroupVersion.WithResource("namespaces"), "")
	if err != nil {
		return err
	}
	written, err := watch(configMaps, RootConfigMap)
	if err != nil {
		return err
	}
	hooks := map[schema.GroupVersionResource]cache.GenericLister{}
	for r, name := range k.hooks {
		if name == "" {
			continue
		}
		if hooks[r], err = watch(r, name); err != nil {
			return err
		}
	}
	if !cache.WaitForCacheSync(ctx.Done(), synced...) {
		return nil
	}
	for {
		roots, newer := k.roots()
		var again <-chan time.Time
		failed := 0
		note := func(err error) {
			if err != nil && ctx.Err() == nil {
				if failed++; failed == 1 {
					k.log.Warn("not everybody is told whom to trust; trying again", "err", err)
				}
				again = time.After(retryAfter)
			}
		}
		if len(roots.Bundle) > 0 {
			all, _ := namespaces.List(labels.Everything()) // never fails
			for _, o := range all {
				note(k.keepMap(ctx, o.(*unstructured.Unstructured), written, roots))
			}
			for r, lister := range hooks {
				note(k.keepHooks(ctx, client, r, lister, roots))
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-newer:
		case <-dirty:
		case <-again:
		}
	}
}

// keepMap writes the ConfigMap of one namespace if it differs.
func (k *RootKeeper) keepMap(ctx context.Context, namespace *unstructured.Unstructured, have cache.GenericLister, roots Roots) error {
	name := namespace.GetName()
	if slices.Contains(without, name) || namespace.GetDeletionTimestamp() != nil {
		return nil
	}
	want := map[string]string{RootBundle: string(roots.Bundle), RootPEM: string(roots.PEM)}
	if o, err := have.ByNamespace(name).Get(RootConfigMap); err == nil {
		is, _, _ := unstructured.NestedStringMap(o.(*unstructured.Unstructured).Object, "data")
		if maps.Equal(is, want) {
			return nil
		}
	}
	u := &unstructured.Unstructured{Object: map[string]any{"apiVersion": "v1", "kind": "ConfigMap",
		"metadata": map[string]any{"name": RootConfigMap, "namespace": name, "labels": map[string]any{labelManagedBy: ManagedBy}},
		"data":     map[string]any{RootBundle: want[RootBundle], RootPEM: want[RootPEM]}}}
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	_, err := k.source.clients.dynamic.Resource(configMaps).Namespace(name).Apply(ctx, RootConfigMap, u, metav1.ApplyOptions{FieldManager: fieldManager, Force: true})
	if apierrors.IsNotFound(err) || apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause) { // it goes
		err = nil
	}
	return k.result("configmaps", "apply", name+"/"+RootConfigMap, err)
}

// keepHooks writes the CA bundle of every webhook of a configuration that differs.
func (k *RootKeeper) keepHooks(ctx context.Context, client dynamic.Interface, r schema.GroupVersionResource, have cache.GenericLister, roots Roots) error {
	want := base64.StdEncoding.EncodeToString(roots.PEM)
	all, _ := have.List(labels.Everything())
	for _, o := range all {
		u := o.(*unstructured.Unstructured)
		hooks, _, _ := unstructured.NestedSlice(u.Object, "webhooks")
		var patch []map[string]any
		for i, h := range hooks {
			m, _ := h.(map[string]any)
			if is, _, _ := unstructured.NestedString(m, "clientConfig", "caBundle"); is != want {
				patch = append(patch,
					map[string]any{"op": "test", "path": fmt.Sprintf("/webhooks/%d/name", i), "value": m["name"]},
					map[string]any{"op": "add", "path": fmt.Sprintf("/webhooks/%d/clientConfig/caBundle", i), "value": want})
			}
		}
		if len(patch) == 0 {
			continue
		}
		b, err := json.Marshal(patch)
		if err != nil {
			return err
		}
		write, cancel := context.WithTimeout(ctx, writeTimeout)
		_, err = client.Resource(r).Patch(write, u.GetName(), types.JSONPatchType, b, metav1.PatchOptions{FieldManager: fieldManager})
		cancel()
		if apierrors.IsNotFound(err) {
			err = nil
		}
		if err := k.result(r.Resource, "patch", u.GetName(), err); err != nil {
			return err
		}
	}
	return nil
}

func (k *RootKeeper) result(resource, verb, name string, err error) error {
	if err != nil {
		k.writes.WithLabelValues(resource, verb, "error").Inc()
		return fmt.Errorf("%s %s %s: %w", verb, resource, name, err)
	}
	k.writes.WithLabelValues(resource, verb, "ok").Inc()
	return nil
}
