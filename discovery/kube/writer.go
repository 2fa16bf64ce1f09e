package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-multierror"
	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	mcsv1beta1 "sigs.k8s.io/mcs-api/pkg/apis/v1beta1"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/discovery/objects"
)

// fieldManager owns the fields that Hanse writes (server-side apply).
const fieldManager = "hansed"

// WriterConfig configures a Writer. All but Faults, Registerer and Now are required.
type WriterConfig struct {
	Source *Source // of the same API server; run by somebody else
	Self   discovery.Self
	// View returns the newest view of the mesh, nil before there is one, and a channel that is closed when there is a newer one.
	View       func() (*discovery.Clusterset, <-chan struct{})
	Faults     func() []*objects.Fault // of objects that do not fit with others; nil is none
	Log        *slog.Logger
	Registerer prometheus.Registerer
	Now        func() time.Time // nil is time.Now
}

// Writer keeps what an API server holds of the mesh as the mesh is: ServiceImports, the Services and EndpointSlices behind them, and the
// status of ServiceExports, of routes and of our own kinds. It writes only what differs. One replica of hansed runs it, the leader.
type Writer struct {
	cfg    WriterConfig // read-only after NewWriter
	writes *prometheus.CounterVec

	// owned by Run
	seen      seen
	exports   map[discovery.Name]struct{} // whose ServiceExports' status is to be looked at
	withdrawn map[string]bool             // members whose endpoints are not written
	looked    time.Time                   // when the routes' status was last looked at
	owed      bool                        // it is to be looked at again
}

// seen is what Writer looked at last, so that it looks next at what differs.
type seen struct {
	imports  discovery.ByName[*discovery.Import]
	exported struct { // what the status of ServiceExports follows from
		set      *objects.Set
		imports  discovery.ByName[*discovery.Import]
		services discovery.ByName[*discovery.Service]
	}
}

const (
	writeTimeout = 15 * time.Second
	maxWrites    = 8 // at one time
	retryAfter   = 2 * time.Second
	maxReported  = 5 // failures of one round in a line of the log

	routesEvery = 500 * time.Millisecond // all routes are looked at for any change of the mesh, of which endpoints make many
)

// NewWriter returns a Writer that has written nothing.
func NewWriter(cfg WriterConfig) *Writer {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	w := &Writer{cfg: cfg, writes: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "hanse_kube_writes_total", Help: "Writes to the API server."}, []string{"resource", "verb", "result"})}
	if cfg.Registerer != nil {
		cfg.Registerer.MustRegister(w.writes)
	}
	return w
}

// Run writes until ctx ends, and returns nil then. What fails is tried again.
func (w *Writer) Run(ctx context.Context) error {
	w.seen, w.exports = seen{}, map[discovery.Name]struct{}{}
	w.seen.exported.set = objects.NewSet()
	dirty := w.cfg.Source.writtenNames()
	for {
		view, newer := w.cfg.View()
		for n := range w.cfg.Source.takeRewritten() {
			if n.Name != "" {
				dirty[n] = struct{}{}
				continue
			}
			for i := range w.seen.imports.All() { // a namespace came or went
				if i.Namespace == n.Namespace {
					dirty[i] = struct{}{}
				}
			}
		}
		var again <-chan time.Time
		if view != nil && w.cfg.Source.Complete() {
			err := w.reconcile(ctx, view, dirty)
			if err != nil && ctx.Err() == nil {
				w.cfg.Log.Warn("the API server does not hold all that the mesh says; trying again", "err", err)
				again = time.After(retryAfter)
			} else if w.owed {
				again = time.After(routesEvery - time.Since(w.looked))
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-newer:
		case <-w.cfg.Source.rewritten:
		case <-again:
		}
	}
}

// reconcile writes what differs. dirty are imports to look at beside those that changed in view; those that failed are left in it.
func (w *Writer) reconcile(ctx context.Context, view *discovery.Clusterset, dirty map[discovery.Name]struct{}) error {
	withdrawn := map[string]bool{}
	for name, m := range view.Members {
		if m.State == discovery.Withdrawn {
			withdrawn[name] = true
		}
	}
	if !maps.Equal(withdrawn, w.withdrawn) {
		for n, i := range view.Imports.All() {
			if slices.ContainsFunc(i.From, func(f discovery.ImportedFrom) bool { return withdrawn[f.Member] != w.withdrawn[f.Member] }) {
				dirty[n] = struct{}{}
			}
		}
	}
	w.withdrawn = withdrawn
	discovery.Diff(w.seen.imports, view.Imports, func(n discovery.Name, _, _ *discovery.Import) { dirty[n] = struct{}{} })
	w.seen.imports = view.Imports
	var (
		running sync.WaitGroup
		slots   = make(chan struct{}, maxWrites)
		mu      sync.Mutex
		faults  *multierror.Error // guarded by mu
	)
	each := func(what string, f func() error, ok func()) {
		slots <- struct{}{}
		running.Go(func() {
			defer func() { <-slots }()
			err := f()
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				faults = multierror.Append(faults, fmt.Errorf("%s: %w", what, err))
				return
			}
			ok()
		})
	}
	if gv, ok := w.cfg.Source.defined("ServiceImport"); ok {
		names := make([]discovery.Name, 0, len(dirty))
		for n := range dirty {
			names = append(names, n)
		}
		for _, n := range names {
			i := view.Imports.Get(n)
			if ctx.Err() != nil {
				break
			}
			each("ServiceImport "+n.String(), func() error { return w.write(ctx, gv, n, i) }, func() { delete(dirty, n) })
		}
	}
	if gv, ok := w.cfg.Source.defined("ServiceExport"); ok && view.Local != nil {
		set := w.cfg.Source.Set()
		w.exportsToLookAt(set, view)
		mu.Lock()
		names := slices.Collect(maps.Keys(w.exports))
		mu.Unlock()
		home := unexportedOf(set, view, names)
		for _, n := range names {
			if ctx.Err() != nil {
				break
			}
			o, there := set.Get(objects.Key{Kind: "ServiceExport", Namespace: n.Namespace, Name: n.Name})
			var conditions []metav1.Condition
			differ := false
			if there {
				service, _ := set.Get(objects.Key{Kind: "Service", Namespace: n.Namespace, Name: n.Name})
				conditions, differ = exportConditions(o, service, home[n], view, w.cfg.Self.Cluster, w.cfg.Now())
			}
			if !differ {
				mu.Lock()
				delete(w.exports, n)
				mu.Unlock()
				continue
			}
			each("status of "+o.Key().String(), func() error {
				return w.patchStatus(ctx, gv.WithResource("serviceexports"), n, map[string]any{"conditions": conditions})
			}, func() { delete(w.exports, n) })
		}
	}
	if w.owed = time.Since(w.looked) < routesEvery; !w.owed && view.Local != nil {
		w.looked = time.Now()
		for _, r := range w.cfg.Source.routes() {
			parents, differ, ok := objects.RouteParents(r.object, r.faults, w.cfg.Source.Set(), view, w.cfg.Now())
			if !ok || !differ || ctx.Err() != nil {
				continue
			}
			each("status of "+r.object.Key().String(), func() error { return w.patchParents(ctx, r, parents) }, func() {})
		}
	}
	wrong := w.faultsByObject()
	for _, p := range w.cfg.Source.policies() {
		conditions, differ := p.accepted(wrong[p.key.String()], w.cfg.Now())
		if !differ || ctx.Err() != nil {
			continue
		}
		each("status of "+p.key.String(), func() error {
			return w.patchStatus(ctx, p.resource, p.name(), map[string]any{"conditions": conditions})
		}, func() {})
	}
	running.Wait()
	return short(faults)
}

// exportsToLookAt notes the ServiceExports whose status may be another than when they were looked at last.
func (w *Writer) exportsToLookAt(set *objects.Set, view *discovery.Clusterset) {
	mark := func(n discovery.Name) { w.exports[n] = struct{}{} }
	was := &w.seen.exported
	set.Differ(was.set, "ServiceExport", mark)
	set.Differ(was.set, "Service", mark)
	set.Differ(was.set, "EndpointSlice", func(n discovery.Name) { // a Pod that turns out to have no sidecar changes no Service
		if o, ok := set.Get(objects.Key{Kind: "EndpointSlice", Namespace: n.Namespace, Name: n.Name}); ok && o.Value.GetAnnotations()[annotationTransport] == string(discovery.Plaintext) {
			mark(discovery.Name{Namespace: n.Namespace, Name: o.Value.GetLabels()[discoveryv1.LabelServiceName]})
		}
	})
	discovery.Diff(was.imports, view.Imports, func(n discovery.Name, _, _ *discovery.Import) { mark(n) })
	discovery.Diff(was.services, view.Local.Services, func(n discovery.Name, _, _ *discovery.Service) { mark(n) })
	was.set, was.imports, was.services = set, view.Imports, view.Local.Services
}

// short makes one error of many that fits a line.
func short(m *multierror.Error) error {
	if m == nil {
		return nil
	}
	more := ""
	if len(m.Errors) > maxReported {
		more = fmt.Sprintf("; and %d more", len(m.Errors)-maxReported)
	}
	var texts []string
	for _, err := range m.Errors[:min(maxReported, len(m.Errors))] {
		texts = append(texts, err.Error())
	}
	return errors.New(strings.Join(texts, "; ") + more)
}

// errForeign is a ServiceImport of somebody else's.
var errForeign = errors.New("it exists and was not written by Hanse (no label " + labelManagedBy + "=" + ManagedBy + "): delete it, and Hanse writes its own")

// write makes what the API server holds of n what i says. On the way in the Service comes first, since it has the IPs; then a ServiceImport
// without them, for the EndpointSlices to be owned by; and the IPs, which make it callable, last. On the way out the ServiceImport goes first
// (KEP-1645: what is not exported is not reachable).
func (w *Writer) write(ctx context.Context, gv schema.GroupVersion, n discovery.Name, i *discovery.Import) error {
	have := w.cfg.Source.writtenOf(n)
	if have.imported != nil && have.imported.Labels[labelManagedBy] != ManagedBy {
		if i == nil {
			return nil
		}
		return errForeign
	}
	if i == nil || !have.namespace {
		return w.remove(ctx, gv, n, have)
	}
	var ips []netip.Addr
	if !i.Headless {
		var err error
		if ips, err = w.writeService(ctx, i, have.service); err != nil {
			return err
		}
	}
	want := ImportedObjects(w.cfg.Self, i, ips, w.withdrawn)
	want.Import.APIVersion = gv.String()
	imports := gv.WithResource("serviceimports")
	if have.imported == nil {
		var err error
		if have.imported, err = w.firstImport(ctx, imports, want.Import); err != nil {
			return err
		}
	}
	for _, s := range want.Slices {
		s.OwnerReferences = []metav1.OwnerReference{{APIVersion: gv.String(), Kind: "ServiceImport", Name: n.Name, UID: have.imported.UID}}
		if is := have.slices[s.Name]; is != nil && sameSlice(is, s) {
			continue
		}
		if err := w.apply(ctx, discoveryv1.SchemeGroupVersion.WithResource("endpointslices"), s, ""); err != nil {
			return err
		}
	}
	if !sameImport(have.imported, want.Import) {
		if err := w.apply(ctx, imports, want.Import, ""); err != nil {
			return err
		}
	}
	want.Import.Status.Conditions = importConditions(have.imported, want.Import, i, w.cfg.Now())
	if !equality.Semantic.DeepEqual(have.imported.Status, want.Import.Status) {
		if err := w.apply(ctx, imports, want.Import, "status"); err != nil {
			return err
		}
	}
	for name := range have.slices {
		if !slices.ContainsFunc(want.Slices, func(s *discoveryv1.EndpointSlice) bool { return s.Name == name }) {
			if err := w.delete(ctx, discoveryv1.SchemeGroupVersion.WithResource("endpointslices"), n.Namespace, name); err != nil {
				return err
			}
		}
	}
	if i.Headless && have.service != nil {
		return w.delete(ctx, corev1.SchemeGroupVersion.WithResource("services"), n.Namespace, have.service.Name)
	}
	return nil
}

// firstImport returns the ServiceImport that the Source has not seen yet: the server's, or without IPs a new one.
func (w *Writer) firstImport(ctx context.Context, imports schema.GroupVersionResource, want *mcsv1beta1.ServiceImport) (*mcsv1beta1.ServiceImport, error) {
	bounded, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	got, err := w.cfg.Source.clients.dynamic.Resource(imports).Namespace(want.Namespace).Get(bounded, want.Name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		first := want.DeepCopy()
		first.Spec.IPs, first.Spec.IPFamilies = nil, nil
		got, err = w.applied(ctx, imports, first, "")
	}
	if err != nil {
		return nil, err
	}
	if got.GetLabels()[labelManagedBy] != ManagedBy {
		return nil, errForeign
	}
	out := &mcsv1beta1.ServiceImport{}
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(got.Object, out); err != nil {
		return nil, fmt.Errorf("decode ServiceImport %s/%s: %w", want.Namespace, want.Name, err)
	}
	return out, nil
}

func (w *Writer) remove(ctx context.Context, gv schema.GroupVersion, n discovery.Name, have writtenObjects) error {
	if have.imported != nil {
		if err := w.delete(ctx, gv.WithResource("serviceimports"), n.Namespace, n.Name); err != nil {
			return err
		}
	}
	for name := range have.slices {
		if err := w.delete(ctx, discoveryv1.SchemeGroupVersion.WithResource("endpointslices"), n.Namespace, name); err != nil {
			return err
		}
	}
	if have.service != nil {
		return w.delete(ctx, corev1.SchemeGroupVersion.WithResource("services"), n.Namespace, have.service.Name)
	}
	return nil
}

// writeService returns the clusterset IPs: those of the Service behind the import.
func (w *Writer) writeService(ctx context.Context, i *discovery.Import, is *corev1.Service) ([]netip.Addr, error) {
	want := behind(i)
	ips := []string(nil)
	if is != nil && sameService(is, want) {
		ips = is.Spec.ClusterIPs
	} else {
		got, err := w.applied(ctx, corev1.SchemeGroupVersion.WithResource("services"), want, "")
		if err != nil {
			return nil, err
		}
		ips, _, _ = unstructured.NestedStringSlice(got.Object, "spec", "clusterIPs")
	}
	var out []netip.Addr
	for _, ip := range ips {
		a, err := netip.ParseAddr(ip)
		if err != nil {
			return nil, fmt.Errorf("service %s/%s has cluster IP %q: %w", want.Namespace, want.Name, ip, err)
		}
		out = append(out, a)
	}
	return out, nil
}

func sameService(is, want *corev1.Service) bool {
	if !maps.Equal(is.Labels, want.Labels) || is.Spec.SessionAffinity != want.Spec.SessionAffinity || len(is.Spec.Ports) != len(want.Spec.Ports) || len(is.Spec.Selector) > 0 {
		return false
	}
	if want.Spec.SessionAffinityConfig != nil && !equality.Semantic.DeepEqual(is.Spec.SessionAffinityConfig, want.Spec.SessionAffinityConfig) {
		return false
	}
	for i, p := range want.Spec.Ports {
		q := is.Spec.Ports[i]
		if p.Name != q.Name || p.Port != q.Port || p.Protocol != q.Protocol || !equality.Semantic.DeepEqual(p.AppProtocol, q.AppProtocol) {
			return false
		}
	}
	return true
}

func sameSlice(is *writtenEndpoints, want *discoveryv1.EndpointSlice) bool {
	return maps.Equal(is.Labels, want.Labels) && slices.Equal(is.OwnerReferences, want.OwnerReferences) && is.AddressType == want.AddressType && equality.Semantic.DeepEqual(is.Ports, want.Ports) &&
		is.sum == sumOf(want.Endpoints)
}

func sameImport(is, want *mcsv1beta1.ServiceImport) bool {
	return maps.Equal(is.Labels, want.Labels) && maps.Equal(is.Annotations, want.Annotations) && equality.Semantic.DeepEqual(is.Spec, want.Spec)
}

// apply writes an object, or a subresource of it, by server-side apply.
func (w *Writer) apply(ctx context.Context, r schema.GroupVersionResource, o metav1.Object, sub string) error {
	_, err := w.applied(ctx, r, o, sub)
	return err
}

func (w *Writer) applied(ctx context.Context, r schema.GroupVersionResource, o metav1.Object, sub string) (*unstructured.Unstructured, error) {
	m, err := runtime.DefaultUnstructuredConverter.ToUnstructured(o)
	if err != nil {
		return nil, fmt.Errorf("encode %s %s/%s: %w", r.Resource, o.GetNamespace(), o.GetName(), err)
	}
	u := &unstructured.Unstructured{Object: m}
	unstructured.RemoveNestedField(m, "metadata", "creationTimestamp")
	options := metav1.ApplyOptions{FieldManager: fieldManager, Force: true}
	if sub == "" {
		delete(m, "status")
	} else {
		delete(m, "spec")
		u.SetLabels(nil)
		u.SetAnnotations(nil)
	}
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	client := w.cfg.Source.clients.dynamic.Resource(r).Namespace(o.GetNamespace())
	var got *unstructured.Unstructured
	if sub == "" {
		got, err = client.Apply(ctx, o.GetName(), u, options)
	} else {
		got, err = client.ApplyStatus(ctx, o.GetName(), u, options)
	}
	return got, w.result(r, "apply", o.GetNamespace(), o.GetName(), err)
}

// patchStatus replaces parts of an object's status.
func (w *Writer) patchStatus(ctx context.Context, r schema.GroupVersionResource, n discovery.Name, status map[string]any) error {
	data, err := json.Marshal(map[string]any{"status": status})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	_, err = w.cfg.Source.clients.dynamic.Resource(r).Namespace(n.Namespace).Patch(ctx, n.Name, types.MergePatchType, data, metav1.PatchOptions{FieldManager: fieldManager}, "status")
	if apierrors.IsNotFound(err) { // it went meanwhile
		err = nil
	}
	return w.result(r, "status", n.Namespace, n.Name, err)
}

func (w *Writer) delete(ctx context.Context, r schema.GroupVersionResource, namespace, name string) error {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	err := w.cfg.Source.clients.dynamic.Resource(r).Namespace(namespace).Delete(ctx, name, metav1.DeleteOptions{})
	if apierrors.IsNotFound(err) {
		err = nil
	}
	return w.result(r, "delete", namespace, name, err)
}

func (w *Writer) result(r schema.GroupVersionResource, verb, namespace, name string, err error) error {
	if err != nil {
		w.writes.WithLabelValues(r.Resource, verb, "error").Inc()
		return fmt.Errorf("%s %s %s/%s: %w", verb, r.Resource, namespace, name, err)
	}
	w.writes.WithLabelValues(r.Resource, verb, "ok").Inc()
	return nil
}
