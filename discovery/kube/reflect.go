package kube

import (
	"context"
	"fmt"
	"log/slog"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"
)

// clients of one API server: protobuf for client-go's own types, JSON for the rest.
type clients struct {
	typed   map[schema.GroupVersion]*rest.RESTClient
	params  runtime.ParameterCodec
	dynamic dynamic.Interface
}

// Limits of what is asked of a server. Reflectors ask rarely; these bound a mistake.
const qps, burst = 50, 100

func newClients(config *rest.Config) (clients, error) {
	config = rest.CopyConfig(config)
	config.QPS, config.Burst = qps, burst
	if config.UserAgent == "" {
		config.UserAgent = "hansed"
	}
	scheme := runtime.NewScheme()
	c := clients{typed: map[schema.GroupVersion]*rest.RESTClient{}, params: runtime.NewParameterCodec(scheme)}
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, discoveryv1.AddToScheme} {
		if err := add(scheme); err != nil {
			return c, err
		}
	}
	metav1.AddToGroupVersion(scheme, schema.GroupVersion{Version: "v1"})
	http, err := rest.HTTPClientFor(config)
	if err != nil {
		return c, err
	}
	for _, gv := range []schema.GroupVersion{corev1.SchemeGroupVersion, discoveryv1.SchemeGroupVersion} {
		of := rest.CopyConfig(config)
		of.GroupVersion, of.APIPath = &gv, "/apis"
		if gv.Group == "" {
			of.APIPath = "/api"
		}
		of.AcceptContentTypes, of.ContentType = "application/vnd.kubernetes.protobuf,application/json", "application/vnd.kubernetes.protobuf"
		of.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
		if c.typed[gv], err = rest.RESTClientForConfigAndClient(of, http); err != nil {
			return c, err
		}
	}
	c.dynamic, err = dynamic.NewForConfigAndClient(dynamic.ConfigFor(config), http)
	return c, err
}

// listWatch reads a kind of the whole cluster.
func (c *clients) listWatch(k *kind, gv schema.GroupVersion) *cache.ListWatch {
	if k.typed == nil {
		return dynamicListWatch(c.dynamic.Resource(gv.WithResource(k.resource)))
	}
	client := c.typed[gv]
	request := func(o metav1.ListOptions) *rest.Request {
		o.LabelSelector = k.selector
		return client.Get().Resource(k.resource).VersionedParams(&o, c.params)
	}
	return &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			return request(o).Do(ctx).Get()
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			o.Watch = true
			return request(o).Watch(ctx)
		},
	}
}

func dynamicListWatch(r dynamic.ResourceInterface) *cache.ListWatch {
	return &cache.ListWatch{
		ListWithContextFunc:  func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) { return r.List(ctx, o) },
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) { return r.Watch(ctx, o) },
	}
}

// reflect keeps k's items as the server has them, until ctx ends.
func (s *Source) reflect(ctx context.Context, k *kind, gv schema.GroupVersion) {
	var expected any = k.typed
	if k.typed == nil {
		u := &unstructured.Unstructured{}
		u.SetGroupVersionKind(gv.WithKind(k.name))
		expected = u
	}
	s.run(ctx, k.name, s.clients.listWatch(k, gv), expected, &store{s, k})
}

// run runs a reflector until ctx ends. Requests that fail are counted and logged by Source.failed.
func (s *Source) run(ctx context.Context, name string, lw *cache.ListWatch, expected any, into cache.ReflectorStore) {
	list, watching := lw.ListWithContextFunc, lw.WatchFuncWithContext
	lw.ListWithContextFunc = func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
		l, err := list(ctx, o)
		s.asked(ctx, name, err)
		return l, err
	}
	lw.WatchFuncWithContext = func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
		w, err := watching(ctx, o)
		s.asked(ctx, name, err)
		return w, err
	}
	logger := logr.FromSlogHandler(debugging{s.cfg.Log.Handler()})
	cache.NewReflectorWithOptions(lw, expected, into, cache.ReflectorOptions{Name: name, Logger: &logger}).RunWithContext(klog.NewContext(ctx, logger))
}

// debugging is a handler for what client-go has to say: Source says itself what people need to know.
type debugging struct{ slog.Handler }

func (h debugging) Enabled(ctx context.Context, _ slog.Level) bool {
	return h.Handler.Enabled(ctx, slog.LevelDebug)
}
func (h debugging) Handle(ctx context.Context, r slog.Record) error {
	r.Level = slog.LevelDebug
	return h.Handler.Handle(ctx, r)
}
func (h debugging) WithAttrs(a []slog.Attr) slog.Handler { return debugging{h.Handler.WithAttrs(a)} }
func (h debugging) WithGroup(name string) slog.Handler   { return debugging{h.Handler.WithGroup(name)} }

// store is a cache.ReflectorStore into a Source.
type store struct {
	source *Source
	kind   *kind
}

// Transformer implements cache.TransformingStore: lists that are streamed are trimmed as they come.
func (s *store) Transformer() cache.TransformFunc {
	return func(o any) (any, error) { return s.trimmed(o) }
}

// trimmed returns what is kept of an object; of one that has not changed, what is kept already, so that another list of all costs no memory.
// It may be called again on its own result.
func (s *store) trimmed(o any) (*kept, error) {
	if k, ok := o.(*kept); ok {
		return k, nil
	}
	m, name := accessor(o)
	name.Namespace = intern(name.Namespace)
	k := &kept{name: name}
	if k.item = s.source.item(s.kind, name); k.version != "" && k.version == m.GetResourceVersion() {
		return k, nil
	}
	v, err := s.kind.transform(o)
	if err != nil {
		return nil, err
	}
	if s.kind.condense != nil {
		v = s.kind.condense(v.(metav1.Object))
	}
	k.item = item{version: m.GetResourceVersion(), value: v}
	return k, nil
}

// Add implements cache.ReflectorStore, as do the others.
func (s *store) Add(o any) error {
	t, err := s.trimmed(o)
	if err == nil {
		s.source.take(s.kind, t)
	}
	return err
}

func (s *store) Update(o any) error { return s.Add(o) }

func (s *store) Delete(o any) error {
	if d, ok := o.(cache.DeletedFinalStateUnknown); ok {
		o = d.Obj
	}
	s.source.forget(s.kind, o)
	return nil
}

func (s *store) Replace(list []any, _ string) error {
	all := make([]*kept, len(list))
	for i, o := range list {
		t, err := s.trimmed(o)
		if err != nil {
			return err
		}
		all[i] = t
	}
	s.source.replace(s.kind, all)
	return nil
}

func (s *store) Resync() error { return nil }

// Bookmark implements cache.ReflectorBookmarkStore: the server is there, and nothing changed.
func (s *store) Bookmark(string) error {
	s.source.heard(s.kind.name)
	return nil
}

// accessor returns an object's metadata and name. Everything that a reflector hands over has both.
func accessor(o any) (metav1.Object, types.NamespacedName) {
	m := o.(metav1.Object)
	return m, types.NamespacedName{Namespace: m.GetNamespace(), Name: m.GetName()}
}

var crdResource = schema.GroupVersionResource{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"}

// reflectCRDs keeps those CustomResourceDefinitions that kinds wait for.
func (s *Source) reflectCRDs(ctx context.Context) {
	u := &unstructured.Unstructured{}
	u.SetGroupVersionKind(crdResource.GroupVersion().WithKind("CustomResourceDefinition"))
	s.run(ctx, "CustomResourceDefinition", dynamicListWatch(s.clients.dynamic.Resource(crdResource)), u, &crdStore{s})
}

// crdStore is a cache.ReflectorStore of CustomResourceDefinitions.
type crdStore struct{ source *Source }

// Transformer implements cache.TransformingStore: schemas, which are large, are not kept.
func (s *crdStore) Transformer() cache.TransformFunc {
	return func(o any) (any, error) {
		u, ok := o.(*unstructured.Unstructured)
		if !ok {
			return nil, fmt.Errorf("a CustomResourceDefinition came as %T", o)
		}
		trimMeta(u)
		versions, _, _ := unstructured.NestedSlice(u.Object, "spec", "versions")
		for _, v := range versions {
			if m, ok := v.(map[string]any); ok {
				delete(m, "schema")
				delete(m, "additionalPrinterColumns")
			}
		}
		u.Object["spec"] = map[string]any{"versions": versions}
		return u, nil
	}
}

func (s *crdStore) wanted(name string) bool {
	for _, k := range s.source.kinds {
		if k.typed == nil && k.crd() == name {
			return true
		}
	}
	return name == drillCRD
}

// Add implements cache.ReflectorStore, as do the others.
func (s *crdStore) Add(o any) error {
	u, err := s.Transformer()(o)
	if err != nil {
		return err
	}
	crd := u.(*unstructured.Unstructured)
	if s.wanted(crd.GetName()) {
		s.source.mu.Lock()
		s.source.crds[crd.GetName()], s.source.dirty = crd, true
		s.source.mu.Unlock()
		s.source.signal()
	}
	return nil
}

func (s *crdStore) Update(o any) error { return s.Add(o) }

func (s *crdStore) Delete(o any) error {
	if d, ok := o.(cache.DeletedFinalStateUnknown); ok {
		o = d.Obj
	}
	_, name := accessor(o)
	s.source.mu.Lock()
	delete(s.source.crds, name.Name)
	s.source.dirty = true
	s.source.mu.Unlock()
	s.source.signal()
	return nil
}

func (s *crdStore) Replace(list []any, _ string) error {
	crds := map[string]*unstructured.Unstructured{}
	for _, o := range list {
		u, err := s.Transformer()(o)
		if err != nil {
			return err
		}
		if crd := u.(*unstructured.Unstructured); s.wanted(crd.GetName()) {
			crds[crd.GetName()] = crd
		}
	}
	s.source.mu.Lock()
	s.source.crds, s.source.crdsIn, s.source.dirty = crds, true, true
	s.source.mu.Unlock()
	s.source.signal()
	return nil
}

func (s *crdStore) Resync() error { return nil }
