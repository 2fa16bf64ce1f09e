package kube

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"
	"unique"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/discovery/objects"
)

// Config of a Source.
type Config struct {
	REST       *rest.Config // of the API server; not changed
	Log        *slog.Logger
	Registerer prometheus.Registerer
	Debounce   time.Duration // a change is shown at once, and those that follow within this time together; 0 is 50 ms
}

// Source reads one API server.
type Source struct {
	cfg     Config        // read-only after New
	clients clients       // read-only after New
	kinds   []*kind       // read-only after New
	updated chan struct{} // size 1
	wake    chan struct{} // size 1

	rewritten chan struct{} // size 1: takeRewritten has something
	current   atomic.Pointer[published]

	mu      sync.Mutex
	changed map[ref]struct{}                      // guarded by mu: to be shown
	crds    map[string]*unstructured.Unstructured // guarded by mu: by name, only those that are read
	crdsIn  bool                                  // guarded by mu: their list has been completed
	dirty   bool                                  // guarded by mu: something else changed

	imports  map[discovery.Name]struct{}                     // guarded by mu: of takeRewritten
	slices   map[discovery.Name]map[string]*writtenEndpoints // guarded by mu: those written for imports, by the import's name and their own
	ips      map[netip.Addr]discovery.Name                   // guarded by mu; never changed in place. Nil: to be made anew
	sidecars map[discovery.Name]int                          // guarded by mu: how many Pods with a sidecar a service account has
	accounts []discovery.Name                                // guarded by mu; never changed in place. Nil: to be made anew
	versions map[*kind]schema.GroupVersion                   // guarded by mu: of kinds of CustomResourceDefinitions that are read

	parts    map[types.NamespacedName][]objects.Key // owned by Run: an EndpointSlice's keys in the Set, where not just its own
	set      *objects.Set                           // owned by Run
	faults   map[objects.Key][]*objects.Fault       // owned by Run
	watching map[*kind]watching                     // owned by Run: kinds of CustomResourceDefinitions

	objectCount *prometheus.GaugeVec
	faultCount  prometheus.Gauge
	errorCount  *prometheus.CounterVec
	lastEvent   *prometheus.GaugeVec
}

// watching is the reflector of a kind.
type watching struct {
	version schema.GroupVersion
	stop    func() // returns after it has ended
}

// published is what readers see. It is immutable.
type published struct {
	set      *objects.Set
	faults   []*objects.Fault
	complete bool
}

// ref names an object that changed.
type ref struct {
	kind *kind
	name types.NamespacedName
}

// New returns a Source that has read nothing; it fails on a REST configuration that cannot be used.
func New(cfg Config) (*Source, error) {
	cfg.Debounce = cmp.Or(cfg.Debounce, 50*time.Millisecond)
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	s := &Source{
		cfg: cfg, kinds: kinds(), updated: make(chan struct{}, 1), wake: make(chan struct{}, 1), rewritten: make(chan struct{}, 1),
		imports: map[discovery.Name]struct{}{}, slices: map[discovery.Name]map[string]*writtenEndpoints{}, sidecars: map[discovery.Name]int{}, versions: map[*kind]schema.GroupVersion{},
		changed: map[ref]struct{}{}, crds: map[string]*unstructured.Unstructured{},
		parts: map[types.NamespacedName][]objects.Key{}, set: objects.NewSet(), faults: map[objects.Key][]*objects.Fault{}, watching: map[*kind]watching{},
		objectCount: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "hanse_kube_objects", Help: "Objects known of the API server."}, []string{"kind"}),
		faultCount: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "hanse_kube_faults", Help: "Faults in objects of the API server; their last valid state is in force."}),
		errorCount: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hanse_kube_errors_total", Help: "Lists and watches that failed, and were begun again."}, []string{"kind"}),
		lastEvent: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "hanse_kube_last_event_timestamp_seconds", Help: "When the API server was last heard of."}, []string{"kind"}),
	}
	var err error
	if s.clients, err = newClients(cfg.REST); err != nil {
		return nil, fmt.Errorf("client of the API server %s: %w", cfg.REST.Host, err)
	}
	if cfg.Registerer != nil {
		cfg.Registerer.MustRegister(s.objectCount, s.faultCount, s.errorCount, s.lastEvent)
	}
	s.current.Store(&published{set: objects.NewSet()})
	return s, nil
}

// Set returns the objects in force. It is empty until all have been read once.
func (s *Source) Set() *objects.Set { return s.current.Load().set }

// Complete reports whether every kind has been read whole at least once.
func (s *Source) Complete() bool { return s.current.Load().complete }

// Faults returns what is wrong with the objects now, sorted by object.
func (s *Source) Faults() []*objects.Fault { return s.current.Load().faults }

// Updated is signalled after Set, Complete, Faults, ClustersetIPs or Accounts changed.
func (s *Source) Updated() <-chan struct{} { return s.updated }

// Run reads until ctx ends, and returns nil then. A server that cannot be reached is waited for.
func (s *Source) Run(ctx context.Context) error {
	var running sync.WaitGroup
	defer running.Wait()
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	for _, k := range s.kinds {
		if k.typed != nil {
			running.Go(func() { s.reflect(ctx, k, k.groups[0]) })
		}
	}
	running.Go(func() { s.reflectCRDs(ctx) })
	defer func() {
		for _, w := range s.watching {
			w.stop()
		}
	}()
	last := time.Now()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.wake:
		}
		if wait := s.cfg.Debounce - time.Since(last); wait > 0 {
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(wait):
			}
		}
		s.followCRDs(ctx)
		s.publish()
		last = time.Now()
	}
}

func (s *Source) signal() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// followCRDs begins and ends the reading of kinds as their CustomResourceDefinitions come and go.
func (s *Source) followCRDs(ctx context.Context) {
	s.mu.Lock()
	complete := s.crdsIn
	crds := maps.Clone(s.crds)
	s.mu.Unlock()
	if !complete {
		return
	}
	for _, k := range s.kinds {
		if k.typed != nil {
			continue
		}
		w, reading := s.watching[k]
		crd, there := crds[k.crd()]
		if !there {
			if reading {
				w.stop()
				delete(s.watching, k)
				s.define(k, schema.GroupVersion{})
				s.replace(k, nil) // with a CustomResourceDefinition go its objects
				s.cfg.Log.Info("a kind is no longer defined; its objects are gone", "kind", k.name, "crd", k.crd())
			}
			continue
		}
		version, err := k.established(crd)
		if err != nil {
			if !errors.Is(err, errNotEstablished) && !reading {
				s.cfg.Log.Warn("a kind is not read", "kind", k.name, "crd", k.crd(), "err", err)
			}
			continue // what is being read goes on
		}
		if reading {
			if w.version == version {
				continue
			}
			w.stop()
		}
		kctx, cancel := context.WithCancel(ctx)
		done := make(chan struct{})
		go func() {
			defer close(done)
			s.reflect(kctx, k, version)
		}()
		s.define(k, version)
		s.watching[k] = watching{version: version, stop: func() { cancel(); <-done }}
	}
}

// take keeps what a reflector saw of one object.
func (s *Source) take(k *kind, o *kept) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keep(k, o)
	s.signal()
}

// item returns what is kept of an object.
func (s *Source) item(k *kind, name types.NamespacedName) item {
	s.mu.Lock()
	defer s.mu.Unlock()
	return k.items[name]
}

// keep is take, with mu held.
func (s *Source) keep(k *kind, o *kept) {
	was, known := k.items[o.name]
	if known && was.version == o.version && was.version != "" {
		return
	}
	k.items[o.name] = o.item
	if !known || k.condense == nil || was.value != o.value { // most changes of a Pod or Node change nothing here
		s.count(o.name, o.value, 1) // before the other one, so that an account that stays is not gone in between
		s.count(o.name, was.value, -1)
		s.note(k, o.name, o.value)
	}
}

// count counts a Pod with a sidecar for its service account. With mu held.
func (s *Source) count(name types.NamespacedName, value any, n int) {
	h, ok := value.(unique.Handle[pod])
	if !ok || h.Value().transport != "hop" {
		return
	}
	account := discovery.Name{Namespace: name.Namespace, Name: h.Value().account}
	was := s.sidecars[account]
	if was+n == 0 {
		delete(s.sidecars, account)
	} else {
		s.sidecars[account] = was + n
	}
	if was == 0 || was+n == 0 {
		s.accounts, s.dirty = nil, true
	}
}

// Accounts returns the service accounts whose Pods have sidecars, sorted: of services or not, each has an identity. It must not be changed.
func (s *Source) Accounts() []discovery.Name {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.accounts == nil {
		s.accounts = slices.SortedFunc(maps.Keys(s.sidecars), discovery.Name.Compare)
		if s.accounts == nil {
			s.accounts = []discovery.Name{}
		}
	}
	return s.accounts
}

// forget drops one object.
func (s *Source) forget(k *kind, o any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, name := accessor(o)
	s.drop(k, name)
	s.signal()
}

// replace takes a completed list: what is not in it is gone.
func (s *Source) replace(k *kind, list []*kept) {
	s.mu.Lock()
	defer s.mu.Unlock()
	seen := make(map[types.NamespacedName]struct{}, len(list))
	for _, o := range list {
		s.keep(k, o)
		seen[o.name] = struct{}{}
	}
	for name := range k.items {
		if _, ok := seen[name]; !ok {
			s.drop(k, name)
		}
	}
	k.synced, s.dirty = true, true
	s.signal()
}

// drillCRD is a definition that Hanse does not bring.
const drillCRD = "drills.hanse.mesh"

var drillsDefined = &objects.Fault{File: origin, Object: "CustomResourceDefinition " + drillCRD,
	Reason: "Drills of an API server are not read: each is run once, by hanse drill run -f FILE. Take the definition out"}

// publish brings what changed into the Set.
func (s *Source) publish() {
	s.mu.Lock()
	if len(s.changed) == 0 && !s.dirty {
		s.mu.Unlock()
		return
	}
	changed := s.spread()
	s.changed, s.dirty = map[ref]struct{}{}, false
	var put []objects.Object
	var gone []objects.Key
	reported := false
	for r := range changed {
		reported = reported || slices.Contains(reportedKinds, r.kind.name) || statusOf(r.kind.items[r.name].value) != nil
		p, g := s.objectsOf(r)
		put, gone = append(put, p...), append(gone, g...)
	}
	complete := s.complete()
	_, drills := s.crds[drillCRD]
	stale := s.ips == nil || s.accounts == nil // ClustersetIPs or Accounts are others now, or may be
	for _, k := range s.kinds {
		s.objectCount.WithLabelValues(k.name).Set(float64(len(k.items)))
	}
	s.mu.Unlock()

	if len(put)+len(gone) > 0 {
		s.set = s.set.Delete(gone...).Put(put...)
	}
	faults := slices.Concat(slices.Collect(maps.Values(s.faults))...)
	if drills {
		faults = append(faults, drillsDefined)
	}
	slices.SortFunc(faults, func(a, b *objects.Fault) int {
		return cmp.Or(cmp.Compare(a.Object, b.Object), cmp.Compare(a.Field, b.Field))
	})
	s.faultCount.Set(float64(len(faults)))
	before := s.current.Load()
	now := &published{set: before.set, faults: faults, complete: before.complete || complete}
	if now.complete {
		now.set = s.set
	}
	if !before.complete && complete {
		s.cfg.Log.Info("all objects have been read", "objects", s.set.Len())
	}
	s.current.Store(now)
	if reported { // kinds whose status Writer reads in the Set: not before it is there, or it would write again what it has just written
		s.kickWriter()
	}
	if now.set == before.set && now.complete == before.complete && slices.Equal(now.faults, before.faults) && !stale {
		return // what Hanse itself has written, mostly
	}
	select {
	case s.updated <- struct{}{}:
	default:
	}
}

// reportedKinds are those whose status Writer keeps, and what that depends on beside the view of the mesh.
var reportedKinds = []string{"ServiceExport", "HTTPRoute", "GRPCRoute", "TLSRoute", "TCPRoute", "ReferenceGrant"}

// complete reports whether each kind that is defined has been listed. With mu held.
func (s *Source) complete() bool {
	if !s.crdsIn {
		return false
	}
	for _, k := range s.kinds {
		if _, reading := s.watching[k]; !k.synced && (k.typed != nil || reading) {
			return false
		}
	}
	return true
}

// spread returns what changed, and the EndpointSlices and Services that look different for it. With mu held.
func (s *Source) spread() map[ref]struct{} {
	changed := maps.Clone(s.changed)
	pods, nodes, namespaces := map[string]map[string]bool{}, map[string]bool{}, map[string]bool{} // Pods by namespace
	for r := range s.changed {
		switch r.kind.name {
		case "Pod":
			if pods[r.name.Namespace] == nil {
				pods[r.name.Namespace] = map[string]bool{}
			}
			pods[r.name.Namespace][r.name.Name] = true
		case "Node":
			nodes[r.name.Name] = true
		case "Namespace":
			namespaces[r.name.Name] = true
		}
	}
	if len(pods)+len(nodes)+len(namespaces) == 0 {
		return changed
	}
	slicesOf := s.kind("EndpointSlice")
	for name, it := range slicesOf.items {
		p, ok := it.value.(*objects.Packed)
		if ok && (len(nodes) > 0 && p.On(nodes) || len(pods[name.Namespace]) > 0 && p.OfAny(pods[name.Namespace])) {
			changed[ref{slicesOf, name}] = struct{}{}
		}
	}
	if len(namespaces) > 0 {
		ofServices := s.kind("Service")
		for name := range ofServices.items {
			if namespaces[name.Namespace] {
				changed[ref{ofServices, name}] = struct{}{}
			}
		}
	}
	return changed
}

// objectsOf returns what comes into the Set for r, and what leaves it. An object with faults keeps its last valid state. With mu held,
// called by Run only.
func (s *Source) objectsOf(r ref) (put []objects.Object, gone []objects.Key) {
	if r.kind.object == nil || r.kind.written {
		return nil, nil
	}
	key := objects.Key{Kind: r.kind.name, Namespace: r.name.Namespace, Name: r.name.Name}
	had := []objects.Key{key}
	if parts, ok := s.parts[r.name]; ok && r.kind.name == "EndpointSlice" {
		had = parts
	}
	it, there := r.kind.items[r.name]
	delete(s.faults, key)
	if !there {
		if r.kind.name == "EndpointSlice" {
			delete(s.parts, r.name)
		}
		return nil, had
	}
	o, faults := r.kind.check(it.value)
	if len(faults) > 0 {
		s.faults[key] = faults
		return nil, nil
	}
	switch v := o.Value.(type) {
	case *corev1.Service:
		ns, _ := s.kind("Namespace").items[types.NamespacedName{Name: v.Namespace}].value.(namespace)
		o.Value = inheritClusterset(v, ns)
		put = append(put, o)
	case *discoveryv1.EndpointSlice:
		put = s.place(o, it.value, v)
		keys := make([]objects.Key, len(put))
		for i, p := range put {
			keys[i] = p.Key()
		}
		if len(keys) == 1 && keys[0] == key {
			delete(s.parts, r.name)
		} else {
			s.parts[r.name] = keys
		}
		for _, k := range had {
			if !slices.Contains(keys, k) {
				gone = append(gone, k)
			}
		}
	default:
		put = append(put, o)
	}
	return put, gone
}

// place splits an EndpointSlice by what is known of its Pods and Nodes, and keeps the parts as the slice was kept. With mu held.
func (s *Source) place(o objects.Object, kept any, v *discoveryv1.EndpointSlice) []objects.Object {
	pods, nodes := s.kind("Pod").items, s.kind("Node").items
	parts := split(v, func(name string) (pod, bool) {
		h, ok := pods[types.NamespacedName{Namespace: v.Namespace, Name: name}].value.(unique.Handle[pod])
		if !ok {
			return pod{}, false
		}
		return h.Value(), true
	}, func(name string) (node, bool) {
		n, ok := nodes[types.NamespacedName{Name: name}].value.(node)
		return n, ok
	})
	out := make([]objects.Object, len(parts))
	for i, p := range parts {
		out[i] = o
		if whole, ok := kept.(*objects.Packed); ok && len(parts) == 1 {
			out[i].Value = whole.With(p.Annotations)
		} else {
			out[i].Value = objects.Pack(p)
		}
	}
	return out
}

func (s *Source) kind(name string) *kind {
	i := slices.IndexFunc(s.kinds, func(k *kind) bool { return k.name == name })
	return s.kinds[i]
}

// asked counts and logs a list or watch that failed, and is begun again.
func (s *Source) asked(ctx context.Context, k string, err error) {
	if err == nil {
		s.heard(k)
		return
	}
	if ctx.Err() != nil {
		return
	}
	s.errorCount.WithLabelValues(k).Inc()
	switch {
	case apierrors.IsForbidden(err) || apierrors.IsUnauthorized(err):
		s.cfg.Log.Error("the API server refuses to show a kind; let hansed's service account list and watch it", "kind", k, "err", err)
	case apierrors.IsResourceExpired(err) || apierrors.IsGone(err):
		s.cfg.Log.Debug("a watch has expired; listing again", "kind", k)
	default:
		s.cfg.Log.Warn("the API server cannot be read; what is known stays in force", "kind", k, "err", err)
	}
}

// heard notes that the server answered.
func (s *Source) heard(k string) {
	s.lastEvent.WithLabelValues(k).Set(float64(time.Now().UnixMilli()) / 1000)
}
