package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/hanse-mesh/hanse/discovery/objects"
)

// route is a route as the API server has it, in force or not.
type route struct {
	object   objects.Object
	faults   []*objects.Fault // for which it is not in force
	resource schema.GroupVersionResource
}

// routes returns the routes that there are, those with faults too, by kind and name. What does not fit its Go type has no status that could be read.
func (s *Source) routes() []route {
	s.mu.Lock()
	var out []route
	for _, k := range s.kinds {
		gv, reading := s.versions[k]
		if !reading || k.written {
			continue
		}
		for _, it := range k.items {
			switch it.value.(type) {
			case *gatewayv1.HTTPRoute, *gatewayv1.GRPCRoute, *gatewayv1.TLSRoute, *gatewayv1.TCPRoute:
				out = append(out, route{objects.Object{Kind: k.name, Value: it.value.(metav1.Object), File: origin}, nil, gv.WithResource(k.resource)})
			}
		}
	}
	s.mu.Unlock()
	slices.SortFunc(out, func(a, b route) int { return a.object.Key().Compare(b.object.Key()) })
	for i := range out {
		out[i].faults = faultsOf(out[i].object)
	}
	return out
}

// patchParents replaces status.parents, which is one value to the API server: only on what it was made from, or another controller's entries might be lost. Where the
// route has changed meanwhile it is looked at again when that has been seen.
func (w *Writer) patchParents(ctx context.Context, r route, parents []gatewayv1.RouteParentStatus) error {
	if parents == nil {
		parents = []gatewayv1.RouteParentStatus{} // required, even if there is none
	}
	o := r.object.Value
	data, err := json.Marshal(map[string]any{"metadata": map[string]any{"resourceVersion": o.GetResourceVersion()}, "status": map[string]any{"parents": parents}})
	if err != nil {
		return fmt.Errorf("encode status of %s: %w", r.object.Key(), err)
	}
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	_, err = w.cfg.Source.clients.dynamic.Resource(r.resource).Namespace(o.GetNamespace()).Patch(ctx, o.GetName(), types.MergePatchType, data, metav1.PatchOptions{FieldManager: fieldManager}, "status")
	if apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
		err = nil
	}
	return w.result(r.resource, "status", o.GetNamespace(), o.GetName(), err)
}
