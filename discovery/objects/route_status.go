package objects

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/hanse-mesh/hanse/discovery"
)

// ControllerName is under what Hanse writes into the status of routes.
const ControllerName gatewayv1.GatewayController = "hanse.mesh/controller"

// maxParents are in a route's status (the bound of the Gateway API's CRDs).
const maxParents = 32

// RouteParents returns status.parents of a route as they should be, and whether they differ from what it has: an entry of ours for each parentRef that is a Service or
// ServiceImport, and those of other controllers as they are. faults are those of the object by itself (Validate), for which it is not in force. view may be older than set: ok is false
// where that leaves open what is to be said.
func RouteParents(o Object, faults []*Fault, set *Set, view *discovery.Clusterset, now time.Time) (parents []gatewayv1.RouteParentStatus, differ, ok bool) {
	refs, has := routeOf(o)
	if has == nil {
		return nil, false, false
	}
	s := routeStatus{routeBuilder: routeBuilder{builder: &builder{Input: Input{Set: set, State: &State{}, Now: now}, next: &State{created: map[Key]time.Time{}}}, services: view.Local.Services, object: o}, view: view}
	all(s.builder, "ReferenceGrant", func(_ Object, g *gatewayv1.ReferenceGrant) { s.grants = append(s.grants, g) })
	for i, p := range refs {
		if group, kind := string(deref(p.Group, groupGateway)), string(deref(p.Kind, "Gateway")); isServiceRef(group, kind) {
			s.parentAt(i, p, faults)
		}
	}
	resolved := s.references()
	if s.behind {
		return nil, false, false
	}
	generation := o.Value.GetGeneration()
	for _, p := range has.Parents {
		if p.ControllerName != ControllerName {
			parents = append(parents, p)
		}
	}
	for _, p := range s.accepted {
		entry := gatewayv1.RouteParentStatus{ParentRef: p.ref, ControllerName: ControllerName}
		if i := slices.IndexFunc(has.Parents, func(h gatewayv1.RouteParentStatus) bool {
			return h.ControllerName == ControllerName && sameRef(h.ParentRef, p.ref)
		}); i >= 0 {
			entry.Conditions = slices.Clone(has.Parents[i].Conditions)
		}
		for _, c := range []metav1.Condition{p.condition, resolved} {
			c.ObservedGeneration, c.LastTransitionTime = generation, metav1.NewTime(now.Truncate(time.Second))
			meta.SetStatusCondition(&entry.Conditions, c)
		}
		if len(parents) < maxParents {
			parents = append(parents, entry)
		}
	}
	return parents, !slices.EqualFunc(has.Parents, parents, sameParent), true
}

// routeOf returns the parents that a route names and its status; nil for what is no route.
func routeOf(o Object) ([]gatewayv1.ParentReference, *gatewayv1.RouteStatus) {
	switch v := o.Value.(type) {
	case *gatewayv1.HTTPRoute:
		return v.Spec.ParentRefs, &v.Status.RouteStatus
	case *gatewayv1.GRPCRoute:
		return v.Spec.ParentRefs, &v.Status.RouteStatus
	case *gatewayv1.TLSRoute:
		return v.Spec.ParentRefs, &v.Status.RouteStatus
	case *gatewayv1.TCPRoute:
		return v.Spec.ParentRefs, &v.Status.RouteStatus
	}
	return nil, nil
}

func sameParent(a, b gatewayv1.RouteParentStatus) bool {
	return a.ControllerName == b.ControllerName && sameRef(a.ParentRef, b.ParentRef) && slices.EqualFunc(a.Conditions, b.Conditions, func(x, y metav1.Condition) bool {
		return x.Type == y.Type && x.Status == y.Status && x.Reason == y.Reason && x.Message == y.Message && x.ObservedGeneration == y.ObservedGeneration && x.LastTransitionTime.Equal(&y.LastTransitionTime)
	})
}

func sameRef(a, b gatewayv1.ParentReference) bool {
	return a.Name == b.Name && deref(a.Group, groupGateway) == deref(b.Group, groupGateway) && deref(a.Kind, "Gateway") == deref(b.Kind, "Gateway") &&
		deref(a.Namespace, "") == deref(b.Namespace, "") && deref(a.SectionName, "") == deref(b.SectionName, "") && deref(a.Port, 0) == deref(b.Port, 0)
}

// routeStatus builds a route once more, by itself, and keeps what is wrong by where it belongs.
type routeStatus struct {
	routeBuilder
	view     *discovery.Clusterset
	behind   bool // view lacks a Service that the Set has
	accepted []acceptance
}

type acceptance struct {
	ref       gatewayv1.ParentReference
	condition metav1.Condition
}

func (s *routeStatus) parentAt(i int, p gatewayv1.ParentReference, invalid []*Fault) {
	s.faults = nil
	ref, ok := s.parent(i, p)
	if ok {
		s.parents = append(s.parents, ref)
	}
	no := func(reason gatewayv1.RouteConditionReason, message string) {
		s.accepted = append(s.accepted, acceptance{p, condition(gatewayv1.RouteConditionAccepted, metav1.ConditionFalse, reason, message)})
	}
	service, imported := s.find(ref.Service)
	switch {
	case len(invalid) > 0:
		reason := gatewayv1.RouteReasonUnsupportedValue
		if i := slices.IndexFunc(invalid, func(f *Fault) bool { return f.Condition != "" }); i >= 0 {
			reason = gatewayv1.RouteConditionReason(invalid[i].Condition)
		}
		no(reason, say(invalid)+"; until this is corrected, the last state without faults holds")
	case service == nil && imported == nil:
		no(gatewayv1.RouteReasonNoMatchingParent, fmt.Sprintf("spec.parentRefs[%d].name: there is no Service %s here, and no cluster exports one", i, ref.Service))
	case ref.Import && imported == nil:
		no(gatewayv1.RouteReasonNoMatchingParent, fmt.Sprintf("spec.parentRefs[%d].name: no cluster exports a Service %s", i, ref.Service))
	case len(s.faults) > 0:
		no(gatewayv1.RouteReasonNoMatchingParent, say(s.faults))
	case s.hiddenBy(ref, service, imported) != nil:
		no(reasonConflicted, fmt.Sprintf("spec.parentRefs[%d]: GRPCRoute %s is for the same ports of %s, and hides every HTTPRoute there", i, s.hiddenBy(ref, service, imported).Name, ref.Service))
	default:
		s.accepted = append(s.accepted, acceptance{p, condition(gatewayv1.RouteConditionAccepted, metav1.ConditionTrue, gatewayv1.RouteReasonAccepted, "the route is in force")})
	}
}

// reasonConflicted is GEP-1294's, which the API has no constant for.
const reasonConflicted gatewayv1.RouteConditionReason = "Conflicted"

// hiddenBy returns a GRPCRoute of the same namespace that leaves no port of a parent to the HTTPRoute at hand (GEP-1294 "Route types"; xdsgen obeys the same).
func (s *routeStatus) hiddenBy(ref discovery.RouteRef, own *discovery.Service, imported *discovery.Import) *discovery.Route {
	if s.object.Kind != "HTTPRoute" {
		return nil
	}
	var ports []discovery.Port
	if own != nil && !ref.Import {
		ports = own.Ports
	} else if imported != nil {
		ports = imported.Ports
	}
	var by *discovery.Route
	for _, p := range ports {
		if !p.Protocol.IsHTTP() || ref.Port != 0 && ref.Port != p.Number {
			continue
		}
		i := slices.IndexFunc(s.view.Local.Routes, func(r *discovery.Route) bool {
			return r.Kind == "GRPCRoute" && r.Namespace == s.object.Value.GetNamespace() && slices.ContainsFunc(r.Parents, func(g discovery.RouteRef) bool {
				return g.Service == ref.Service && (g.Port == 0 || g.Port == p.Number) && (!g.Import || ref.Import)
			})
		})
		if i < 0 {
			return nil
		}
		by = s.view.Local.Routes[i]
	}
	return by
}

// find returns what a name means here and in the clusterset.
func (s *routeStatus) find(n discovery.Name) (*discovery.Service, *discovery.Import) {
	own, imported := s.view.Local.Services.Get(n), s.view.Imports.Get(n)
	if own == nil && hasService(s.Set, n) {
		s.behind = true
	}
	return own, imported
}

// references is the condition ResolvedRefs: the first reason of all that do not resolve, and each of them.
func (s *routeStatus) references() metav1.Condition {
	var reason gatewayv1.RouteConditionReason
	var said []string
	for _, b := range s.backends() {
		r, message := gatewayv1.RouteConditionReason(""), ""
		own, imported := s.find(b.Service)
		switch {
		case b.Invalid != "":
			word, rest, _ := strings.Cut(b.Invalid, ": ")
			r, message = gatewayv1.RouteConditionReason(word), rest
		case own == nil && imported == nil:
			r, message = gatewayv1.RouteReasonBackendNotFound, fmt.Sprintf("there is no Service %s here, and no cluster exports one", b.Service)
		case !hasPort(own, imported, b.Port):
			r, message = gatewayv1.RouteReasonBackendNotFound, fmt.Sprintf("Service %s has no TCP port %d", b.Service, b.Port)
		default:
			continue
		}
		reason = gatewayv1.RouteConditionReason(cmp.Or(string(reason), string(r)))
		said = append(said, b.field+": "+message)
	}
	if reason == "" {
		return condition(gatewayv1.RouteConditionResolvedRefs, metav1.ConditionTrue, gatewayv1.RouteReasonResolvedRefs, "all backends are known")
	}
	return condition(gatewayv1.RouteConditionResolvedRefs, metav1.ConditionFalse, reason, strings.Join(said, "; "))
}

// hasService reports whether there will be a Service in the view: an ExternalName is none.
func hasService(set *Set, n discovery.Name) bool {
	o, ok := set.Get(Key{Kind: "Service", Namespace: n.Namespace, Name: n.Name})
	if !ok {
		return false
	}
	s, is := o.Value.(*corev1.Service)
	return is && s.Spec.Type != corev1.ServiceTypeExternalName
}

func hasPort(own *discovery.Service, imported *discovery.Import, number uint16) bool {
	has := func(ports []discovery.Port) bool {
		return slices.ContainsFunc(ports, func(p discovery.Port) bool { return p.Number == number && p.Carried() })
	}
	return own != nil && has(own.Ports) || imported != nil && has(imported.Ports)
}

// reference is a backend and where the route names it.
type reference struct {
	discovery.Backend
	field string
}

// backends lists all that the route refers to, mirrors too.
func (s *routeStatus) backends() []reference {
	var out []reference
	rule := func(i int, r *discovery.RouteRule) {
		at := fmt.Sprintf("spec.rules[%d]", i)
		for j, b := range r.Backends {
			out = append(out, reference{b, fmt.Sprintf("%s.backendRefs[%d]", at, j)})
			if m := b.Filters.Mirror; m != nil {
				out = append(out, reference{*m, fmt.Sprintf("%s.backendRefs[%d].filters", at, j)})
			}
		}
		if m := r.Filters.Mirror; m != nil {
			out = append(out, reference{*m, at + ".filters"})
		}
	}
	switch v := s.object.Value.(type) {
	case *gatewayv1.HTTPRoute:
		for i := range v.Spec.Rules {
			rule(i, s.httpRule(i, &v.Spec.Rules[i]))
		}
	case *gatewayv1.GRPCRoute:
		for i := range v.Spec.Rules {
			rule(i, s.grpcRule(i, &v.Spec.Rules[i]))
		}
	case *gatewayv1.TLSRoute:
		for i, r := range v.Spec.Rules {
			rule(i, s.tcpRule(i, r.Name, r.BackendRefs))
		}
	case *gatewayv1.TCPRoute:
		for i, r := range v.Spec.Rules {
			rule(i, s.tcpRule(i, r.Name, r.BackendRefs))
		}
	}
	return out
}

// maxMessage bounds a condition's message, as the API does.
const maxMessage = 32768

func condition(t gatewayv1.RouteConditionType, status metav1.ConditionStatus, reason gatewayv1.RouteConditionReason, message string) metav1.Condition {
	return metav1.Condition{Type: string(t), Status: status, Reason: string(reason), Message: strings.ToValidUTF8(message[:min(len(message), maxMessage)], "")}
}

// say joins faults without the object's name, which has them.
func say(faults []*Fault) string {
	var out []string
	for _, f := range faults {
		g := *f
		g.File, g.Line, g.Object = "", 0, ""
		out = append(out, g.Error())
	}
	return strings.Join(out, "; ")
}
