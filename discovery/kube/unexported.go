package kube

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/discovery/objects"
)

// unexported are the endpoints of an exported service that stay at home, since they have no identity.
type unexported struct {
	pods      map[string]bool // without a sidecar, by name
	addresses map[string]bool // of no Pod
}

const maxUnexported = 3 // named in a message

// unexportedOf returns what stays at home of those services that have such endpoints, from one look at the EndpointSlices of set. A Pod that has gone, or
// has not been read, counts as neither: its endpoint goes or gets its identity at once.
func unexportedOf(set *objects.Set, view *discovery.Clusterset, services []discovery.Name) map[discovery.Name]*unexported {
	out := map[discovery.Name]*unexported{}
	for _, n := range services {
		if s := view.Local.Services.Get(n); s != nil && s.Export != nil && s.WithoutIdentity() > 0 {
			out[n] = &unexported{map[string]bool{}, map[string]bool{}}
		}
	}
	if len(out) == 0 {
		return nil
	}
	for o := range set.All("EndpointSlice") {
		a := o.Value.GetAnnotations()
		if a[annotationTransport] != string(discovery.Plaintext) {
			continue
		}
		u := out[discovery.Name{Namespace: o.Value.GetNamespace(), Name: o.Value.GetLabels()[discoveryv1.LabelServiceName]}]
		if u == nil {
			continue
		}
		for _, e := range objects.Unpacked(o.Value).Endpoints {
			switch {
			case e.TargetRef == nil:
				for _, address := range e.Addresses {
					u.addresses[address] = true
				}
			case a[annotationServiceAccount] != "":
				u.pods[e.TargetRef.Name] = true
			}
		}
	}
	return out
}

// message says how many of a service's endpoints are not exported, why, and what to do; "" if all are. It is bounded.
func (u *unexported) message(of *discovery.Service) string {
	if u == nil || len(u.pods)+len(u.addresses) == 0 {
		return ""
	}
	all := max(len(of.Endpoints), len(u.pods)+len(u.addresses))
	text := fmt.Sprintf("%d of %d endpoints are not exported: ", len(u.pods)+len(u.addresses), all)
	if len(u.pods) == 1 {
		text += "pod " + few(u.pods) + " has no sidecar"
	} else if len(u.pods) > 0 {
		text += "pods " + few(u.pods) + " have no sidecar"
	}
	if len(u.pods) > 0 {
		text += "; label namespace " + of.Namespace + " hanse.mesh/inject=enabled, if it is not, and restart them"
	}
	if len(u.addresses) > 0 {
		if len(u.pods) > 0 {
			text += "; "
		}
		text += "addresses " + few(u.addresses) + " are of no pod and have no identity; an EndpointSlice of your own with the annotation " + annotationServiceAccount + " gives them one"
	}
	return text
}

// few names the first of many.
func few(names map[string]bool) string {
	sorted := slices.Sorted(maps.Keys(names))
	more := ""
	if n := len(sorted) - maxUnexported; n > 0 {
		sorted, more = sorted[:maxUnexported], fmt.Sprintf(" and %d more", n)
	}
	return strings.Join(sorted, ", ") + more
}
