package objects

import (
	"cmp"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	mcsv1alpha1 "sigs.k8s.io/mcs-api/pkg/apis/v1alpha1"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/discovery/v1alpha1"
	"github.com/hanse-mesh/hanse/identity"
)

// Input is all that Build looks at.
type Input struct {
	Self  discovery.Self
	Set   *Set
	State *State    // of the Build before, or as persisted; nil at the very first
	Now   time.Time // for objects that carry no creationTimestamp and are new
	// NewID makes 32 hex digits for an endpoint that State does not know, of a service and its key among that service's; nil is RandomID.
	NewID    func(service discovery.Name, key string) string
	Complete bool // every source has been read whole
}

// RandomID returns 128 random bits as 32 hex digits.
func RandomID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails (crypto/rand)
	return hex.EncodeToString(b[:])
}

// Build makes the Snapshot of in.Set, and the State for the next Build. The objects must have passed Validate. An object
// that does not fit with the others (or the cluster) is left out, whole or in the part that the fault names, and the rest
// stands. Services whose objects did not change since in.State are the same pointers as before.
func Build(in Input) (*discovery.Snapshot, *State, []*Fault) {
	if in.State == nil {
		in.State = &State{}
	}
	if in.NewID == nil {
		in.NewID = func(discovery.Name, string) string { return RandomID() }
	}
	b := &builder{Input: in, next: &State{
		created: make(map[Key]time.Time, len(in.State.created)),
	}}
	b.next.self = place{in.Self.Cluster, in.Self.TrustDomain, in.Self.Network, in.Self.Region}
	snap := &discovery.Snapshot{Self: in.Self, Complete: in.Complete}
	snap.Services = b.services()
	snap.Routes = b.routes(snap.Services)
	snap.TrafficPolicy = b.trafficPolicies()
	snap.Access = b.accessPolicies(snap.Services)
	snap.Peers = b.peers()
	snap.TrustDomains = b.trustDomains()
	for _, o := range b.Set.sorted("Drill") {
		b.fault(o, "kind", o.Kind, "%s", DrillIsRun)
	}

	if !in.Complete {
		b.keepUnseen()
	}
	b.next.revision = in.State.revision
	if b.changed || len(b.next.created) != len(in.State.created) || b.next.known != in.State.known {
		b.next.revision++
	}
	sortFaults(b.faults)
	return snap, b.next, b.faults
}

// DrillIsRun says what is wrong with a Drill that is taken for configuration.
const DrillIsRun = "a Drill is run once, by hanse drill run -f FILE; nothing happens because it is here: take it out"

// keepUnseen keeps the memory of objects that a source which was not read whole may still bring.
func (b *builder) keepUnseen() {
	for k, t := range b.State.created {
		if _, seen := b.next.created[k]; !seen {
			b.next.created[k] = t
		}
	}
	next := b.next.services.Edit()
	for n, was := range b.State.services.All() {
		if next.Get(n) == nil {
			next.Put(n, &serviceState{ids: was.known()})
			if was.remembers() {
				b.next.known++
			}
		}
	}
	b.next.services = next.Done()
}

func sortFaults(faults []*Fault) {
	slices.SortStableFunc(faults, func(x, y *Fault) int {
		return cmp.Or(cmp.Compare(x.File, y.File), cmp.Compare(x.Line, y.Line), cmp.Compare(x.Object, y.Object), cmp.Compare(x.Field, y.Field))
	})
}

// builder is one Build.
type builder struct {
	Input
	next    *State
	changed bool // next remembers something that State does not
	faults  []*Fault
}

// all calls f for each object of a kind, by name.
func all[T any](b *builder, kind string, f func(Object, T)) {
	for _, o := range b.Set.sorted(kind) {
		f(o, o.Value.(T))
	}
}

func faultOf(o Object, field string, value any, reason string, args ...any) *Fault {
	c := checker{object: o}
	c.add(field, value, reason, args...)
	if o.node != nil {
		c.faults[0].Line += lineOf(o.node, field) - o.node.Line
	}
	return c.faults[0]
}

func (b *builder) fault(o Object, field string, value any, reason string, args ...any) {
	b.faults = append(b.faults, faultOf(o, field, value, reason, args...))
}

// pending is fault, for something that is missing and may come.
func (b *builder) pending(o Object, field string, value any, reason string, args ...any) {
	b.fault(o, field, value, reason, args...)
	b.faults[len(b.faults)-1].Pending = true
}

// created returns when o was created: as it says, else when it was first seen. Whole seconds, as Kubernetes keeps them.
func (b *builder) created(o Object) time.Time {
	if t := o.Value.GetCreationTimestamp(); !t.IsZero() {
		return t.UTC()
	}
	t, ok := b.State.created[o.Key()]
	if !ok {
		t = b.Now.UTC().Truncate(time.Second)
		b.changed = true
	}
	b.next.created[o.Key()] = t
	return t
}

// services builds those whose objects changed since the Build before, and takes the others from it.
func (b *builder) services() discovery.ByName[*discovery.Service] {
	exports := b.Set.kinds["ServiceExport"]
	was := b.State.index
	if !b.Complete || b.State.self != b.next.self {
		was = nil
	}
	is, changed := b.follow(was)
	for n := range is.untimed { // they are as old as State says
		t := b.created(exports.Get(n))
		if s := b.State.services.Get(n); s != nil && s.inputs.export != nil && !s.inputs.export.Created.Equal(t) {
			changed[n] = struct{}{}
		}
	}
	if was != nil {
		b.next.known = b.State.known
		b.next.services = b.State.services
		if len(changed) > 0 {
			is.faulty, is.orphans, is.alone = maps.Clone(was.faulty), maps.Clone(was.orphans), maps.Clone(was.alone)
		}
	} else {
		is.faulty, is.orphans, is.alone = map[discovery.Name]struct{}{}, map[discovery.Name]struct{}{}, map[discovery.Name]struct{}{}
	}
	states, results := b.next.services.Edit(), is.services.Edit()
	for n := range changed {
		if s := states.Get(n); s != nil && s.remembers() {
			b.next.known--
		}
		states.Delete(n)
		results.Delete(n)
		delete(is.faulty, n)
		delete(is.orphans, n)
		delete(is.alone, n)
		o, s := b.plainService(n)
		export, exported := exports.Lookup(n)
		if s == nil {
			if len(is.slices.Get(n)) > 0 {
				is.orphans[n] = struct{}{}
			}
			if exported {
				is.alone[n] = struct{}{}
			}
			continue
		}
		in := inputs{service: s}
		for _, so := range is.slices.Get(n) {
			in.slices = append(in.slices, so.Value)
		}
		if exported {
			spec := &export.Value.(*mcsv1alpha1.ServiceExport).Spec
			in.export = &discovery.Export{
				Created: b.created(export), Audience: audience(export.Value.GetAnnotations()[AnnotationAudience]),
				Labels: spec.ExportedLabels, Annotations: spec.ExportedAnnotations,
			}
		}
		now := b.State.services.Get(n)
		forget := b.Complete && now != nil && now.result != nil && now.ids != nil
		if now == nil || now.result == nil || forget || !now.inputs.equal(&in) || b.State.self != b.next.self {
			now = b.service(o, slices.Clone(is.slices.Get(n)), in, now)
		}
		if now.remembers() {
			b.next.known++
		}
		states.Put(n, now)
		results.Put(n, now.result)
		if len(now.faults) > 0 {
			is.faulty[n] = struct{}{}
		}
	}
	b.next.services, is.services = states.Done(), results.Done()
	for n := range is.faulty {
		b.faults = append(b.faults, b.next.services.Get(n).faults...)
	}
	for n := range is.orphans {
		if _, ok := b.Set.Get(Key{Kind: "Service", Namespace: n.Namespace, Name: n.Name}); ok { // an ExternalName
			continue
		}
		for _, o := range is.slices.Get(n) {
			b.pending(o, "metadata.labels["+discoveryv1.LabelServiceName+"]", n.Name, "there is no Service %s; its endpoints are not used", n)
		}
	}
	for n := range is.alone {
		o := exports.Get(n)
		if _, ok := b.Set.Get(Key{Kind: "Service", Namespace: n.Namespace, Name: n.Name}); ok {
			b.fault(o, "metadata.name", n.Name, "Service %s is an ExternalName, which cannot be exported (MCS InvalidServiceType)", n)
		} else {
			b.pending(o, "metadata.name", n.Name, "there is no Service %s to export (MCS NoService)", n)
		}
	}
	if b.Complete {
		b.next.index = is
	}
	return is.services
}

// plainService returns a Service that has endpoints, or nil.
func (b *builder) plainService(n discovery.Name) (Object, *corev1.Service) {
	o, ok := b.Set.Get(Key{Kind: "Service", Namespace: n.Namespace, Name: n.Name})
	if !ok {
		return o, nil
	}
	s := o.Value.(*corev1.Service)
	if s.Spec.Type == corev1.ServiceTypeExternalName {
		return o, nil
	}
	return o, s
}

// index is what a Build looked up, for the next to look only at what changed. It is immutable once its Build ended.
type index struct {
	set      *Set
	slices   discovery.ByName[[]Object] // EndpointSlices by Service, sorted by name
	services discovery.ByName[*discovery.Service]
	faulty   map[discovery.Name]struct{} // those with faults
	orphans  map[discovery.Name]struct{} // names in slices that are no Service with endpoints
	alone    map[discovery.Name]struct{} // ServiceExports without such a Service
	untimed  map[discovery.Name]struct{} // ServiceExports without a creationTimestamp
}

// follow indexes the Set, and names the Services of which an object changed; after nothing, all.
func (b *builder) follow(was *index) (*index, map[discovery.Name]struct{}) {
	changed := map[discovery.Name]struct{}{}
	serviceOf := func(o Object) discovery.Name {
		s := headOf(o.Value)
		return discovery.Name{Namespace: s.Namespace, Name: s.Labels[discoveryv1.LabelServiceName]}
	}
	before := was
	if before == nil {
		before = &index{set: &Set{}}
	}
	is := &index{set: b.Set, services: before.services, faulty: before.faulty, orphans: before.orphans, alone: before.alone, untimed: before.untimed}
	discovery.Diff(before.set.kinds["Service"], b.Set.kinds["Service"], func(n discovery.Name, _, _ Object) { changed[n] = struct{}{} })
	untimed := map[discovery.Name]bool{}
	discovery.Diff(before.set.kinds["ServiceExport"], b.Set.kinds["ServiceExport"], func(n discovery.Name, _, now Object) {
		changed[n] = struct{}{}
		if now.Value != nil {
			t := now.Value.GetCreationTimestamp()
			untimed[n] = t.IsZero()
		} else {
			untimed[n] = false
		}
	})
	if len(untimed) > 0 {
		is.untimed = maps.Clone(before.untimed)
		if is.untimed == nil {
			is.untimed = map[discovery.Name]struct{}{}
		}
		for n, so := range untimed {
			if delete(is.untimed, n); so {
				is.untimed[n] = struct{}{}
			}
		}
	}
	of := before.slices.Edit()
	discovery.Diff(before.set.kinds["EndpointSlice"], b.Set.kinds["EndpointSlice"], func(_ discovery.Name, old, now Object) {
		for _, o := range []Object{old, now} {
			if o.Value == nil {
				continue
			}
			n := serviceOf(o)
			changed[n] = struct{}{}
			list := slices.DeleteFunc(slices.Clone(of.Get(n)), func(p Object) bool { return compareNames(p, o) == 0 })
			if o == now {
				i, _ := slices.BinarySearchFunc(list, o, compareNames)
				list = slices.Insert(list, i, o)
			}
			if len(list) > 0 {
				of.Put(n, list)
			} else {
				of.Delete(n)
			}
		}
	})
	is.slices = of.Done()
	return is, changed
}

// service builds one service anew; was holds the IDs of its endpoints, or is nil.
func (b *builder) service(o Object, sliceObjects []Object, in inputs, was *serviceState) *serviceState {
	s := in.service
	svc := &discovery.Service{
		Name:        o.Name(),
		Traits:      traits(s),
		Labels:      s.Labels,
		Annotations: s.Annotations,
		Endpoints:   []*discovery.Endpoint{},
		Export:      in.export,
	}
	ips := s.Spec.ClusterIPs
	if len(ips) == 0 && s.Spec.ClusterIP != "" {
		ips = []string{s.Spec.ClusterIP}
	}
	for _, ip := range ips {
		if a, err := netip.ParseAddr(ip); err == nil {
			svc.ClusterIPs = append(svc.ClusterIPs, a)
		}
	}
	for _, p := range s.Spec.Ports {
		svc.Ports = append(svc.Ports, discovery.Port{Name: p.Name, Number: uint16(p.Port),
			Protocol: AppProtocol(p.AppProtocol, p.Name), UDP: p.Protocol == corev1.ProtocolUDP, SCTP: p.Protocol == corev1.ProtocolSCTP})
	}

	e := &endpointBuilder{builder: b, service: svc, ids: map[string]string{}, pods: map[string]podEndpoint{}}
	e.known = was.known()
	prefer := discoveryv1.AddressTypeIPv4
	if len(s.Spec.IPFamilies) > 0 {
		prefer = discoveryv1.AddressType(s.Spec.IPFamilies[0])
	}
	slices.SortStableFunc(sliceObjects, func(x, y Object) int { // the preferred family first
		rank := func(o Object) int {
			if headOf(o.Value).AddressType == prefer {
				return 0
			}
			return 1
		}
		return cmp.Compare(rank(x), rank(y))
	})
	e.dual = slices.ContainsFunc(sliceObjects, func(o Object) bool { return headOf(o.Value).AddressType != prefer })
	for _, so := range sliceObjects {
		e.slice(so, Unpacked(so.Value))
	}
	slices.SortFunc(svc.Endpoints, func(x, y *discovery.Endpoint) int { return cmp.Compare(x.ID, y.ID) })
	if was != nil && !b.Complete {
		for key, id := range e.known {
			e.ids[key] = id // those of e.ids are from there
		}
	}
	if was != nil && reflect.DeepEqual(was.result, svc) { // rewritten, but the same
		svc = was.result
	}
	b.changed = b.changed || !maps.Equal(e.known, e.ids)
	if len(e.ids) == len(svc.Endpoints) {
		e.ids = nil
	}
	return &serviceState{ids: e.ids, inputs: in, result: svc, faults: e.faults}
}

// traits are what consumers in other clusters see of a Service as a whole.
func traits(s *corev1.Service) discovery.Traits {
	t := discovery.Traits{
		Headless:              s.Spec.ClusterIP == corev1.ClusterIPNone,
		Affinity:              string(s.Spec.SessionAffinity),
		InternalTrafficPolicy: string(deref(s.Spec.InternalTrafficPolicy, "")),
		TrafficDistribution:   deref(s.Spec.TrafficDistribution, ""),
	}
	if c := s.Spec.SessionAffinityConfig; c != nil && c.ClientIP != nil {
		t.AffinityTimeout = uint32(deref(c.ClientIP.TimeoutSeconds, 0))
	}
	for _, f := range s.Spec.IPFamilies {
		t.IPFamilies = append(t.IPFamilies, discovery.IPFamily(f))
	}
	return t
}

// podEndpoint is a Pod's first endpoint, and the family of the slice that it is in.
type podEndpoint struct {
	family discoveryv1.AddressType
	of     *discovery.Endpoint
}

// endpointBuilder collects the endpoints of one service.
type endpointBuilder struct {
	*builder
	service *discovery.Service
	known   map[string]string      // IDs so far by endpointKey
	ids     map[string]string      // IDs from now on
	dual    bool                   // there are slices of several families
	pods    map[string]podEndpoint // by name, if so
	faults  []*Fault
}

func (e *endpointBuilder) slice(o Object, s *discoveryv1.EndpointSlice) {
	fault := func(field string, value any, reason string, args ...any) {
		e.faults = append(e.faults, faultOf(o, field, value, reason, args...))
	}
	proto := discovery.Profile{
		Transport: discovery.Transport(cmp.Or(s.Annotations[AnnotationTransport], string(discovery.Hop))),
		Locality:  discovery.Locality{Cluster: e.Self.Cluster, Region: cmp.Or(s.Annotations[AnnotationRegion], e.Self.Region)},
		Network:   e.Self.Network,
		HopPort:   number[uint16](s.Annotations[AnnotationHopPort]),
		Ports:     map[string]uint16{},
	}
	if proto.Transport != discovery.Plaintext {
		account := cmp.Or(s.Annotations[AnnotationServiceAccount], "default")
		td, err := spiffeid.TrustDomainFromString(e.Self.TrustDomain)
		if err != nil {
			fault("", nil, "the cluster's trust domain %q is none: %s", e.Self.TrustDomain, err)
			return
		}
		id, err := identity.WorkloadID(td, s.Namespace, account)
		if err != nil {
			fault("metadata.annotations["+AnnotationServiceAccount+"]", account, "makes no SPIFFE ID: %s", err)
			return
		}
		proto.SPIFFEID = id.String()
	}
	if proto.Transport != discovery.Hop {
		proto.HopPort = 0
	}
	for i, p := range s.Ports {
		name := deref(p.Name, "")
		if !slices.ContainsFunc(e.service.Ports, func(sp discovery.Port) bool { return sp.Name == name }) {
			fault(fmt.Sprintf("ports[%d].name", i), name, "Service %s has no port of this name; it has %s", e.service.Name, portNames(e.service.Ports))
			continue
		}
		proto.Ports[name] = uint16(deref(p.Port, 0))
	}
	if len(proto.Ports) == 0 && len(e.service.Ports) > 0 {
		return
	}
	suffix, weight := keySuffix(&proto), number[uint32](s.Annotations[AnnotationWeight])
	in := map[string]*discovery.Profile{} // by zone
	for i := range s.Endpoints {
		zone := deref(s.Endpoints[i].Zone, "")
		p := in[zone]
		if p == nil {
			here := proto
			here.Locality.Zone = zone
			p, in[zone] = &here, &here
		}
		e.endpoint(s.AddressType, discovery.Endpoint{Profile: p, Weight: weight}, suffix, &s.Endpoints[i])
	}
}

func (e *endpointBuilder) endpoint(family discoveryv1.AddressType, ep discovery.Endpoint, keySuffix string, from *discoveryv1.Endpoint) {
	if len(from.Addresses) == 0 {
		return
	}
	a, err := netip.ParseAddr(from.Addresses[0])
	if err != nil {
		return
	}
	pod := ""
	if e.dual && from.TargetRef != nil && from.TargetRef.Kind == "Pod" && from.TargetRef.Name != "" { // a dual-stack pod is in a slice of each family: one endpoint
		pod = from.TargetRef.Name
		if was, ok := e.pods[pod]; ok && was.family != family {
			if was.of.Second == nil && maps.Equal(was.of.Ports, ep.Ports) {
				was.of.Second = &a
			}
			return
		}
	}
	ep.Address = a
	ep.Hostname = deref(from.Hostname, "")
	ep.Ready = deref(from.Conditions.Ready, true)
	serving := deref(from.Conditions.Serving, ep.Ready)
	ep.Draining = deref(from.Conditions.Terminating, false) && serving

	key := endpointKey(&ep, keySuffix)
	if _, twice := e.ids[key]; twice { // while slices are rewritten an endpoint may be in two (KEP-752)
		return
	}
	id, ok := e.known[key]
	if !ok {
		id = e.NewID(e.service.Name, key)
	}
	ep.ID, e.ids[key] = id, id
	e.service.Endpoints = append(e.service.Endpoints, &ep)
	if _, ok := e.pods[pod]; pod != "" && !ok {
		e.pods[pod] = podEndpoint{family, &ep}
	}
}

// endpointKey tells the workloads of one service apart: "address|hostname|hop port|port name=target port,…". A workload that
// keeps it keeps its ID.
func endpointKey(e *discovery.Endpoint, suffix string) string {
	b := make([]byte, 0, 64)
	b = e.Address.AppendTo(b)
	b = append(b, '|')
	b = append(b, e.Hostname...)
	return string(append(b, suffix...))
}

// keySuffix is the part of endpointKey that all endpoints of a slice share.
func keySuffix(of *discovery.Profile) string {
	var ports []string
	for n, p := range of.Ports {
		ports = append(ports, n+"="+strconv.Itoa(int(p)))
	}
	slices.Sort(ports)
	return "|" + strconv.Itoa(int(of.HopPort)) + "|" + strings.Join(ports, ",")
}

// number reads an annotation that Validate accepted; "" is 0.
func number[T uint16 | uint32](s string) T {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil {
		return 0
	}
	return T(n)
}

func portNames(ports []discovery.Port) string {
	var names []string
	for _, p := range ports {
		names = append(names, fmt.Sprintf("%q (%d)", p.Name, p.Number))
	}
	return strings.Join(names, ", ")
}

// AppProtocol says what is spoken on a Service's port: appProtocol decides (the Kubernetes names kubernetes.io/h2c, /ws and
// /wss, or a bare protocol); without it the port's name up to the first "-", as Istio and Linkerd users write it
// ("grpc-api"). Anything else, also a port without either, is TCP: carried as it is, without routes.
func AppProtocol(appProtocol *string, portName string) discovery.AppProtocol {
	word := ""
	if appProtocol != nil && *appProtocol != "" {
		word = strings.TrimPrefix(strings.ToLower(*appProtocol), "kubernetes.io/")
	} else {
		word, _, _ = strings.Cut(strings.ToLower(portName), "-")
	}
	if strings.HasPrefix(strings.ToLower(portName), "grpc-web") && word == "grpc" {
		word = "http" // gRPC-Web is HTTP for everyone but the browser and the server
	}
	switch word {
	case "http", "http1", "ws", "grpc-web":
		return discovery.HTTP
	case "http2", "h2c":
		return discovery.HTTP2
	case "grpc":
		return discovery.GRPC
	}
	return discovery.TCP
}

func (b *builder) trafficPolicies() map[discovery.Name]*discovery.TrafficPolicy {
	policies := map[discovery.Name]*discovery.TrafficPolicy{}
	objs := b.byAge("TrafficPolicy")
	for _, o := range objs {
		p := o.Value.(*v1alpha1.TrafficPolicy)
		for i, ref := range p.Spec.TargetRefs {
			service := discovery.Name{Namespace: p.Namespace, Name: ref.Name}
			if was, taken := policies[service]; taken {
				b.fault(o, fmt.Sprintf("spec.targetRefs[%d]", i), ref.Name,
					"TrafficPolicy %s, which is older, already targets this Service and stays in force", was.Name)
				continue
			}
			policies[service] = trafficPolicy(p, service)
		}
	}
	return policies
}

// byAge returns the objects of a kind, oldest first, ties by name (Gateway API conflict resolution).
func (b *builder) byAge(kind string) []Object {
	objs := b.Set.sorted(kind)
	times := make(map[Key]time.Time, len(objs))
	for _, o := range objs {
		times[o.Key()] = b.created(o)
	}
	slices.SortStableFunc(objs, func(x, y Object) int { return times[x.Key()].Compare(times[y.Key()]) })
	return objs
}

func trafficPolicy(p *v1alpha1.TrafficPolicy, service discovery.Name) *discovery.TrafficPolicy {
	s := &p.Spec
	out := &discovery.TrafficPolicy{
		Name:         discovery.Name{Namespace: p.Namespace, Name: p.Name},
		Service:      service,
		Mode:         discovery.LocalityMode(cmp.Or(s.Locality.Mode, string(discovery.ModeFailover))),
		LoadBalancer: s.LoadBalancer.Type,
		HashHeader:   s.LoadBalancer.HashHeader,
		Timeout:      validDuration(s.Timeouts.Request),
		ConnTimeout:  validDuration(s.Timeouts.Connect),
		MaxRequests:  uint32(deref(s.MaxRequests, 0)),
	}
	for _, m := range s.Locality.Order {
		out.Order = append(out.Order, discovery.LocalityMatch(m))
	}
	for _, w := range s.Locality.Weights {
		out.Weights = append(out.Weights, discovery.LocalityWeight{LocalityMatch: discovery.LocalityMatch(w.LocalityMatch), Weight: uint32(w.Weight)})
	}
	if o := s.OutlierDetection; o != nil {
		out.Outlier = &discovery.OutlierDetection{
			ConsecutiveErrors: uint32(deref(o.ConsecutiveErrors, 0)),
			Interval:          validDuration(o.Interval),
			BaseEjection:      validDuration(o.BaseEjectionTime),
			MaxEjection:       validDuration(o.MaxEjectionTime),
			MaxPercent:        uint32(deref(o.MaxEjectionPercent, 0)),
		}
	}
	if r := s.RetryBudget; r != nil {
		out.RetryBudget = &discovery.RetryBudget{Percent: uint32(deref(r.Percent, 20)), MinConcurrency: uint32(deref(r.MinConcurrency, 3))}
	}
	return out
}

// validDuration reads a duration that Validate accepted.
func validDuration(d *gatewayv1.Duration) time.Duration {
	v, err := parseDuration(d)
	if err != nil {
		return 0
	}
	return v
}

func (b *builder) accessPolicies(services discovery.ByName[*discovery.Service]) []*discovery.AccessPolicy {
	var policies []*discovery.AccessPolicy
	all(b, "AccessPolicy", func(o Object, p *v1alpha1.AccessPolicy) {
		out := &discovery.AccessPolicy{
			Name:  o.Name(),
			Deny:  p.Spec.Action == v1alpha1.ActionDeny,
			Audit: p.Spec.Mode == v1alpha1.ModeAudit,
			Rules: []discovery.AccessRule{},
		}
		for i, ref := range p.Spec.TargetRefs {
			n := discovery.Name{Namespace: p.Namespace, Name: ref.Name}
			out.Services = append(out.Services, n)
			switch svc := services.Get(n); {
			case svc == nil:
				b.pending(o, fmt.Sprintf("spec.targetRefs[%d].name", i), ref.Name, "there is no Service %s in this cluster to protect", n)
			case usesHTTP(p) && !speaksHTTP(svc, 0):
				b.pending(o, fmt.Sprintf("spec.targetRefs[%d].name", i), ref.Name,
					"methods and paths match only HTTP, and all ports of Service %s are tcp; %s", n, sayProtocol)
			}
		}
		slices.SortFunc(out.Services, discovery.Name.Compare)
		for _, r := range p.Spec.Rules {
			rule := discovery.AccessRule{From: r.From, Methods: r.Methods, Paths: r.Paths}
			for _, port := range r.Ports {
				rule.Ports = append(rule.Ports, uint16(port))
			}
			out.Rules = append(out.Rules, rule)
		}
		policies = append(policies, out)
	})
	return policies
}

// sayProtocol is the remedy where a port is not known to speak HTTP.
const sayProtocol = "if it speaks HTTP or gRPC, say so in the port's appProtocol (http, http2 or grpc) or name"

// usesHTTP reports whether a rule looks at what only HTTP has.
func usesHTTP(p *v1alpha1.AccessPolicy) bool {
	return slices.ContainsFunc(p.Spec.Rules, func(r v1alpha1.AccessRule) bool { return len(r.Methods)+len(r.Paths) > 0 })
}

// speaksHTTP reports whether a port of a service, or with 0 any port, carries HTTP.
func speaksHTTP(s *discovery.Service, number uint16) bool { return carries(s, number, true) }

func carries(s *discovery.Service, number uint16, http bool) bool {
	return slices.ContainsFunc(s.Ports, func(p discovery.Port) bool {
		return p.Protocol.IsHTTP() == http && p.Carried() && (number == 0 || p.Number == number)
	})
}

func (b *builder) peers() map[string]*discovery.Peer {
	peers := map[string]*discovery.Peer{}
	all(b, "Peer", func(o Object, p *v1alpha1.Peer) {
		if p.Name == b.Self.Cluster {
			b.fault(o, "metadata.name", p.Name, "is this cluster itself; a Peer is another member")
			return
		}
		peers[p.Name] = &discovery.Peer{
			Name:          p.Name,
			Introductions: p.Spec.Introductions,
			Namespaces:    p.Spec.Import.Namespaces,
			SPIFFEIDs:     p.Spec.Import.SPIFFEIDs,
			Disabled:      p.Spec.Disabled,
			Labels:        p.Labels,
		}
	})
	return peers
}

func (b *builder) trustDomains() []*discovery.FederatedTrustDomain {
	var domains []*discovery.FederatedTrustDomain
	named := map[string]Object{}
	for _, o := range b.byAge("ClusterFederatedTrustDomain") {
		s := o.Value.(*v1alpha1.ClusterFederatedTrustDomain).Spec
		if s.TrustDomain == b.Self.TrustDomain {
			b.fault(o, "spec.trustDomain", s.TrustDomain, "is this cluster's own trust domain")
			continue
		}
		if was, dup := named[s.TrustDomain]; dup {
			b.fault(o, "spec.trustDomain", s.TrustDomain, "%s, which is older, already names it and stays in force", was.Key())
			continue
		}
		named[s.TrustDomain] = o
		rules, _ := o.Value.(*v1alpha1.ClusterFederatedTrustDomain).Allowed() // Validate has seen it
		var allow []discovery.Allow
		for _, r := range rules {
			allow = append(allow, discovery.Allow{Services: r.Services, SPIFFEIDs: r.SPIFFEIDs})
		}
		domains = append(domains, &discovery.FederatedTrustDomain{
			Name:        o.Value.GetName(),
			TrustDomain: s.TrustDomain,
			EndpointURL: s.BundleEndpointURL,
			Profile:     s.BundleEndpointProfile.Type,
			EndpointID:  s.BundleEndpointProfile.EndpointSPIFFEID,
			WebRoots:    o.Value.GetAnnotations()[v1alpha1.WebRootsAnnotation],
			Bundle:      s.TrustDomainBundle,
			Allow:       allow,
		})
	}
	slices.SortFunc(domains, func(x, y *discovery.FederatedTrustDomain) int { return cmp.Compare(x.Name, y.Name) })
	return domains
}
