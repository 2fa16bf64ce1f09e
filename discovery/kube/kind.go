package kube

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	mcsv1beta1 "sigs.k8s.io/mcs-api/pkg/apis/v1beta1"

	"github.com/hanse-mesh/hanse/discovery/objects"
)

// kind is one kind of object that is read.
type kind struct {
	// read-only after New
	name     string
	resource string
	groups   []schema.GroupVersion   // first preferred
	selector string                  // of labels
	typed    runtime.Object          // of client-go's own types; nil for what a CustomResourceDefinition defines
	object   func() metav1.Object    // the type of package objects; nil for kinds that only help
	trim     func(runtime.Object)    // of typed kinds: forgets what nobody reads
	condense func(metav1.Object) any // what is kept; nil: the object itself
	written  bool                    // Hanse's own, which Writer compares with what should be there

	// guarded by Source.mu
	items  map[types.NamespacedName]item
	synced bool // a list has been completed
}

// item is one object as it is kept.
type item struct {
	version string // resourceVersion
	value   any
}

// kept is an item as reflectors hold it while a list comes: there may be a million.
type kept struct {
	metav1.Object // nil: nobody asks for more than this
	name          types.NamespacedName
	item
}

// GetNamespace implements metav1.Object, as do the others.
func (k *kept) GetNamespace() string       { return k.name.Namespace }
func (k *kept) GetName() string            { return k.name.Name }
func (k *kept) GetResourceVersion() string { return k.version }

// crd is the name of the kind's CustomResourceDefinition.
func (k *kind) crd() string { return k.resource + "." + k.groups[0].Group }

// ManagedBy is the value of endpointslice.kubernetes.io/managed-by on the EndpointSlices, and of app.kubernetes.io/managed-by on the Services
// and ServiceImports, that Hanse writes for imported services (KEP-1645). They are no services of this cluster.
const ManagedBy = "hanse.mesh"

// kinds returns what is read: those of package objects, and those that say more about endpoints.
func kinds() []*kind {
	core := schema.GroupVersion{Version: "v1"}
	all := []*kind{
		{name: "Pod", resource: "pods", groups: []schema.GroupVersion{core}, typed: &corev1.Pod{}, trim: trimPod, condense: condensePod},
		{name: "Node", resource: "nodes", groups: []schema.GroupVersion{core}, typed: &corev1.Node{}, trim: trimNode, condense: condenseNode},
		{name: "Namespace", resource: "namespaces", groups: []schema.GroupVersion{core}, typed: &corev1.Namespace{}, trim: trimNamespace, condense: condenseNamespace},
	}
	for _, o := range objects.Kinds() {
		if o.Name == "Drill" { // not configuration: see Source.publish
			continue
		}
		k := &kind{name: o.Name, resource: o.Plural, object: o.New}
		for _, v := range o.APIVersions {
			gv, _ := schema.ParseGroupVersion(v) // constants
			k.groups = append(k.groups, gv)
		}
		switch o.Name {
		case "Service":
			k.typed, k.trim, k.selector = &corev1.Service{}, trimService, labelManagedBy+"!="+ManagedBy
		case "EndpointSlice":
			k.typed, k.trim, k.selector = &discoveryv1.EndpointSlice{}, trimSlice, discoveryv1.LabelManagedBy+"!="+ManagedBy
		}
		all = append(all, k)
	}
	all = append(all,
		&kind{name: "ServiceImport", resource: "serviceimports", written: true, object: func() metav1.Object { return &mcsv1beta1.ServiceImport{} },
			groups: []schema.GroupVersion{{Group: mcsv1beta1.GroupName, Version: "v1beta1"}, {Group: mcsv1beta1.GroupName, Version: "v1alpha1"}}}, // the same fields in both
		&kind{name: writtenService, resource: "services", written: true, groups: []schema.GroupVersion{core}, typed: &corev1.Service{}, trim: trimWritten,
			selector: labelManagedBy + "=" + ManagedBy},
		&kind{name: writtenSlice, resource: "endpointslices", written: true, groups: []schema.GroupVersion{discoveryv1.SchemeGroupVersion},
			typed: &discoveryv1.EndpointSlice{}, trim: trimWritten, condense: condenseWritten, selector: discoveryv1.LabelManagedBy + "=" + ManagedBy})
	for _, k := range all {
		k.items = map[types.NamespacedName]item{}
	}
	return all
}

// Names of kinds that Hanse writes and that people write too.
const (
	writtenService = "imported Service"
	writtenSlice   = "imported EndpointSlice"
)

// broken is an object that does not fit its Go type: a CustomResourceDefinition of another make lets through what ours does not.
type broken struct {
	metav1.ObjectMeta
	err error
}

// transform makes of what the server sent what is kept: typed, trimmed.
func (k *kind) transform(o any) (any, error) {
	switch o := o.(type) {
	case *unstructured.Unstructured:
		v := k.object()
		if !k.written {
			trimMeta(o)
		}
		o.SetManagedFields(nil)
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(o.Object, v); err != nil {
			b := &broken{err: err}
			b.Name, b.Namespace, b.ResourceVersion = o.GetName(), o.GetNamespace(), o.GetResourceVersion()
			return b, nil
		}
		return v, nil
	case runtime.Object:
		if k.trim != nil {
			if !k.written {
				trimMeta(o.(metav1.Object))
			}
			o.(metav1.Object).SetManagedFields(nil)
			k.trim(o)
		}
		if s, ok := o.(*discoveryv1.EndpointSlice); ok && !k.written {
			return objects.Pack(s), nil
		}
		return o, nil
	}
	return o, nil
}

// check returns o as package objects takes it, or its faults.
func (k *kind) check(v any) (objects.Object, []*objects.Fault) {
	if b, ok := v.(*broken); ok {
		key := objects.Key{Kind: k.name, Namespace: b.Namespace, Name: b.Name}
		return objects.Object{}, []*objects.Fault{{File: origin, Object: key.String(), Reason: "does not decode: " + b.err.Error()}}
	}
	o := objects.Object{Kind: k.name, Value: v.(metav1.Object), File: origin}
	if p, ok := v.(*objects.Packed); ok {
		o.Value = p.Unpack()
	}
	if faults := faultsOf(o); len(faults) > 0 {
		return objects.Object{}, faults
	}
	return o, nil
}

// faultsOf are those of an object by itself, in an API server that has other controllers too.
func faultsOf(o objects.Object) []*objects.Fault {
	return slices.DeleteFunc(objects.Faults(objects.Validate(o)), func(f *objects.Fault) bool { return f.Foreign })
}

// origin stands where files have their name.
const origin = "Kubernetes"

// established says which version of a CustomResourceDefinition is to be read: the first of k that it serves.
func (k *kind) established(crd *unstructured.Unstructured) (schema.GroupVersion, error) {
	conditions, _, _ := unstructured.NestedSlice(crd.Object, "status", "conditions")
	if !slices.ContainsFunc(conditions, func(c any) bool {
		m, _ := c.(map[string]any)
		return m["type"] == "Established" && m["status"] == "True"
	}) {
		return schema.GroupVersion{}, errNotEstablished
	}
	versions, _, _ := unstructured.NestedSlice(crd.Object, "spec", "versions")
	var served []string
	for _, v := range versions {
		if m, _ := v.(map[string]any); m["served"] == true {
			served = append(served, fmt.Sprint(m["name"]))
		}
	}
	for _, gv := range k.groups {
		if slices.Contains(served, gv.Version) {
			return gv, nil
		}
	}
	return schema.GroupVersion{}, fmt.Errorf("it serves %s; Hanse reads %s", cmp.Or(strings.Join(served, ", "), "no version"), k.versions())
}

var errNotEstablished = errors.New("not established yet")

func (k *kind) versions() string {
	var names []string
	for _, gv := range k.groups {
		names = append(names, gv.Version)
	}
	return strings.Join(names, " or ")
}
