package objects

import (
	"crypto/x509"
	"fmt"
	"maps"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	mcsv1alpha1 "sigs.k8s.io/mcs-api/pkg/apis/v1alpha1"

	"github.com/hanse-mesh/hanse/discovery/v1alpha1"
	"github.com/hanse-mesh/hanse/identity"
)

// Annotations.
const (
	AnnotationServiceAccount = "hanse.mesh/service-account" // EndpointSlice: whose identity the endpoints have; default "default"
	AnnotationHopPort        = "hanse.mesh/hop-port"        // EndpointSlice: port of the sidecars' mTLS hop; default 15008
	AnnotationTransport      = "hanse.mesh/transport"       // EndpointSlice: hop (default), tls or plaintext
	AnnotationRegion         = "hanse.mesh/region"          // EndpointSlice: default the cluster's region
	AnnotationWeight         = "hanse.mesh/weight"          // EndpointSlice: weight of each endpoint; default 1
	AnnotationAudience       = "hanse.mesh/audience"        // ServiceExport: members or labels that may import; default all
	AnnotationClusterset     = "hanse.mesh/clusterset"      // Service: "true" lets short names mean the clusterset on Kubernetes
	AnnotationPlaintext      = "hanse.mesh/plaintext"       // Service: "true" lets workloads of the own cluster call endpoints without identity
)

const annotationPrefix = "hanse.mesh/"

// annotationsOf lists the annotations of ours that a kind understands.
func annotationsOf(kind string) []string {
	switch kind {
	case "Service":
		return []string{AnnotationClusterset, AnnotationPlaintext}
	case "EndpointSlice":
		return []string{AnnotationHopPort, AnnotationRegion, AnnotationServiceAccount, AnnotationTransport, AnnotationWeight}
	case "ServiceExport":
		return []string{AnnotationAudience}
	case "ClusterFederatedTrustDomain":
		return []string{v1alpha1.AllowAnnotation, v1alpha1.WebRootsAnnotation}
	}
	return nil
}

// Validate says what is wrong with an object whatever else exists, as one *multierror.Error of *Fault, or nil. The faults
// carry o.File and o.Line.
func Validate(o Object) error { return asError(validate(o)) }

func validate(o Object) []*Fault {
	c := &checker{object: o}
	c.metadata()
	switch v := o.Value.(type) {
	case *corev1.Service:
		c.service(v)
	case *discoveryv1.EndpointSlice:
		c.endpointSlice(v)
	case *mcsv1alpha1.ServiceExport:
		c.serviceExport(v)
	case *gatewayv1.HTTPRoute:
		c.httpRoute(v)
	case *gatewayv1.GRPCRoute:
		c.grpcRoute(v)
	case *gatewayv1.TLSRoute:
		c.tlsRoute(v)
	case *gatewayv1.TCPRoute:
		c.tcpRoute(v)
	case *gatewayv1.ReferenceGrant:
		c.referenceGrant(v)
	case *v1alpha1.TrafficPolicy:
		c.trafficPolicy(v)
	case *v1alpha1.AccessPolicy:
		c.accessPolicy(v)
	case *v1alpha1.Peer:
		c.peer(v)
	case *v1alpha1.Drill:
		c.drill(v)
	case *v1alpha1.ClusterFederatedTrustDomain:
		c.federatedTrustDomain(v)
	default:
		c.add("kind", o.Kind, "no such kind; known are %s", kindNames())
	}
	return c.faults
}

// checker collects the faults of one object.
type checker struct {
	object Object
	faults []*Fault
}

func (c *checker) add(field string, value any, reason string, args ...any) {
	f := &Fault{File: c.object.File, Line: c.object.Line, Object: c.object.Key().String(), Field: field,
		Reason: fmt.Sprintf(reason, args...)}
	if value != nil {
		f.Value = shorten(fmt.Sprint(value))
	}
	c.faults = append(c.faults, f)
}

// problems adds what Kubernetes' own checks say.
func (c *checker) problems(field, value string, problems []string) {
	if len(problems) > 0 {
		reason, _, cut := strings.Cut(problems[0], ", regex used for validation is")
		if cut && strings.Contains(reason, "(e.g.") {
			reason += ")"
		}
		c.add(field, value, "%s", reason)
	}
}

func (c *checker) oneOf(field, value string, allowed ...string) {
	if !slices.Contains(allowed, value) {
		var shown []string
		for _, a := range allowed {
			if a != "" {
				shown = append(shown, a)
			}
		}
		c.add(field, value, "must be %s", orList(shown))
	}
}

// orList writes "a, b or c".
func orList(s []string) string {
	if len(s) < 2 {
		return strings.Join(s, "")
	}
	return strings.Join(s[:len(s)-1], ", ") + " or " + s[len(s)-1]
}

func (c *checker) port(field string, port int32) {
	if port < 1 || port > 65535 {
		c.add(field, port, "must be a port from 1 to 65535")
	}
}

func (c *checker) intRange(field string, v *int32, low, high int32) {
	if v != nil && (*v < low || *v > high) {
		c.add(field, *v, "must be from %d to %d", low, high)
	}
}

var gep2257 = regexp.MustCompile(`^([0-9]{1,5}(h|m|s|ms)){1,4}$`)

// parseDuration reads a GEP-2257 duration; nil is 0.
func parseDuration(d *gatewayv1.Duration) (time.Duration, error) {
	if d == nil {
		return 0, nil
	}
	if !gep2257.MatchString(string(*d)) {
		return 0, fmt.Errorf("must be a duration of up to four parts in h, m, s or ms, such as 1m30s or 250ms (GEP-2257)")
	}
	return time.ParseDuration(string(*d))
}

func (c *checker) duration(field string, d *gatewayv1.Duration) time.Duration {
	v, err := parseDuration(d)
	if err != nil {
		c.add(field, *d, "%s", err)
	}
	return v
}

func (c *checker) positive(field string, d *gatewayv1.Duration) time.Duration {
	v := c.duration(field, d)
	if d != nil && v == 0 && gep2257.MatchString(string(*d)) {
		c.add(field, *d, "must be more than zero")
	}
	return v
}

func (c *checker) metadata() {
	meta := c.object.Value
	kind := c.object.Kind
	switch name := meta.GetName(); {
	case name == "" && meta.GetGenerateName() != "":
		c.add("metadata.name", nil, "must be given; generateName works only through the Kubernetes API")
	case name == "":
		c.add("metadata.name", nil, "must be given")
	case kind == "Service", kind == "ServiceExport", kind == "Peer":
		c.problems("metadata.name", name, validation.IsDNS1123Label(name))
	default:
		c.problems("metadata.name", name, validation.IsDNS1123Subdomain(name))
	}
	known, namespaced := LookupKind(kind)
	if namespaced = namespaced && known.Namespaced; namespaced {
		c.problems("metadata.namespace", meta.GetNamespace(), validation.IsDNS1123Label(meta.GetNamespace()))
	} else if meta.GetNamespace() != "" {
		c.add("metadata.namespace", meta.GetNamespace(), "%s is cluster-scoped; remove the namespace", kind)
	}
	for _, k := range slices.Sorted(maps.Keys(meta.GetLabels())) {
		c.problems("metadata.labels["+k+"]", k, validation.IsQualifiedName(k))
		c.problems("metadata.labels["+k+"]", meta.GetLabels()[k], validation.IsValidLabelValue(meta.GetLabels()[k]))
	}
	ours := annotationsOf(kind)
	for _, k := range slices.Sorted(maps.Keys(meta.GetAnnotations())) {
		if strings.HasPrefix(k, annotationPrefix) && !slices.Contains(ours, k) {
			reason := "no such annotation on " + kind
			if len(ours) > 0 {
				reason += "; " + suggest(k, ours)
			}
			c.add("metadata.annotations["+k+"]", nil, "%s", reason)
		}
	}
}

func (c *checker) service(s *corev1.Service) {
	c.oneOf("spec.type", string(s.Spec.Type), "", "ClusterIP", "NodePort", "LoadBalancer", "ExternalName")
	c.oneOf("spec.sessionAffinity", string(s.Spec.SessionAffinity), "", "None", "ClientIP")
	if p := s.Spec.InternalTrafficPolicy; p != nil {
		c.oneOf("spec.internalTrafficPolicy", string(*p), "Cluster", "Local")
	}
	if d := s.Spec.TrafficDistribution; d != nil {
		c.oneOf("spec.trafficDistribution", *d, "PreferClose", "PreferSameZone", "PreferSameNode")
	}
	if a := s.Spec.SessionAffinityConfig; a != nil {
		if s.Spec.SessionAffinity != corev1.ServiceAffinityClientIP {
			c.add("spec.sessionAffinityConfig", nil, "has a meaning only with sessionAffinity ClientIP")
		} else if a.ClientIP != nil {
			c.intRange("spec.sessionAffinityConfig.clientIP.timeoutSeconds", a.ClientIP.TimeoutSeconds, 1, 86_400)
		}
	}
	for i, f := range s.Spec.IPFamilies {
		field := fmt.Sprintf("spec.ipFamilies[%d]", i)
		c.oneOf(field, string(f), "IPv4", "IPv6")
		if slices.Contains(s.Spec.IPFamilies[:i], f) {
			c.add(field, f, "is listed twice")
		}
	}
	for _, name := range []string{AnnotationClusterset, AnnotationPlaintext} {
		if v, ok := s.Annotations[name]; ok {
			c.oneOf("metadata.annotations["+name+"]", v, "true", "false")
		}
	}
	headless := s.Spec.ClusterIP == corev1.ClusterIPNone
	if len(s.Spec.Ports) == 0 && !headless && s.Spec.Type != corev1.ServiceTypeExternalName {
		c.add("spec.ports", nil, "must have at least one port")
	}
	if !headless && s.Spec.ClusterIP != "" {
		if _, err := netip.ParseAddr(s.Spec.ClusterIP); err != nil {
			c.add("spec.clusterIP", s.Spec.ClusterIP, "must be an IP address or None")
		}
	}
	for i, ip := range s.Spec.ClusterIPs {
		if _, err := netip.ParseAddr(ip); err != nil && ip != corev1.ClusterIPNone {
			c.add(fmt.Sprintf("spec.clusterIPs[%d]", i), ip, "must be an IP address or None")
		}
	}
	names, numbers := map[string]bool{}, map[string]bool{}
	for i, p := range s.Spec.Ports {
		field := fmt.Sprintf("spec.ports[%d]", i)
		c.port(field+".port", p.Port)
		c.oneOf(field+".protocol", string(p.Protocol), "", "TCP", "UDP")
		if p.Name == "" && len(s.Spec.Ports) > 1 {
			c.add(field+".name", nil, "must be given where a Service has several ports")
		} else if p.Name != "" {
			c.problems(field+".name", p.Name, validation.IsDNS1123Label(p.Name))
		}
		if names[p.Name] && p.Name != "" {
			c.add(field+".name", p.Name, "is the name of another port too")
		}
		number := fmt.Sprint(p.Port, p.Protocol == corev1.ProtocolUDP)
		if numbers[number] {
			c.add(field+".port", p.Port, "is given to two ports of the same protocol")
		}
		names[p.Name], numbers[number] = true, true
	}
}

func (c *checker) endpointSlice(s *discoveryv1.EndpointSlice) {
	if name := s.Labels[discoveryv1.LabelServiceName]; name == "" {
		c.add("metadata.labels["+discoveryv1.LabelServiceName+"]", nil, "must name the Service that the endpoints belong to")
	}
	c.sliceAnnotations(s)
	c.oneOf("addressType", string(s.AddressType), "IPv4", "IPv6")
	names := map[string]bool{}
	for i, p := range s.Ports {
		field := fmt.Sprintf("ports[%d]", i)
		name := ""
		if p.Name != nil {
			name = *p.Name
		}
		if names[name] {
			c.add(field+".name", name, "is given to two ports")
		}
		names[name] = true
		if p.Port == nil {
			c.add(field+".port", nil, "must be given")
		} else {
			c.port(field+".port", *p.Port)
		}
		if p.Protocol != nil {
			c.oneOf(field+".protocol", string(*p.Protocol), "", "TCP", "UDP")
		}
	}
	if len(s.Ports) == 0 && len(s.Endpoints) > 0 {
		c.add("ports", nil, "must list the ports that the endpoints listen on")
	}
	if len(s.Endpoints) > MaxEndpoints {
		c.add("endpoints", nil, "%d endpoints; at most %d are allowed in one EndpointSlice: split it into several",
			len(s.Endpoints), MaxEndpoints)
		return
	}
	for i := range s.Endpoints {
		c.endpoint(fmt.Sprintf("endpoints[%d]", i), s.AddressType, &s.Endpoints[i])
	}
}

func (c *checker) endpoint(field string, family discoveryv1.AddressType, e *discoveryv1.Endpoint) {
	if len(e.Addresses) != 1 {
		c.add(field+".addresses", nil, "must have exactly one address (Kubernetes uses only the first); write one endpoint for each")
		return
	}
	switch a, err := netip.ParseAddr(e.Addresses[0]); {
	case err != nil || a.Zone() != "":
		c.add(field+".addresses[0]", e.Addresses[0], "must be an IP address")
	case family == discoveryv1.AddressTypeIPv4 && !a.Is4(), family == discoveryv1.AddressTypeIPv6 && (!a.Is6() || a.Is4In6()):
		c.add(field+".addresses[0]", e.Addresses[0], "is not of the slice's addressType %s", family)
	case a.IsUnspecified() || a.IsMulticast():
		c.add(field+".addresses[0]", e.Addresses[0], "must be the address of one host")
	}
	if e.Hostname != nil {
		c.problems(field+".hostname", *e.Hostname, validation.IsDNS1123Label(*e.Hostname))
	}
	if e.Zone != nil {
		c.problems(field+".zone", *e.Zone, validation.IsValidLabelValue(*e.Zone))
	}
}

func (c *checker) sliceAnnotations(s *discoveryv1.EndpointSlice) {
	field := func(name string) string { return "metadata.annotations[" + name + "]" }
	for _, name := range slices.Sorted(maps.Keys(s.Annotations)) {
		v := s.Annotations[name]
		switch name {
		case AnnotationServiceAccount:
			if strings.HasPrefix(v, "spiffe://") {
				c.add(field(name), v, "must be only the service account's name: the endpoints of this cluster are of its own trust domain")
			} else if err := spiffeid.ValidatePathSegment(v); err != nil || len(validation.IsDNS1123Subdomain(v)) > 0 {
				c.add(field(name), v, "must be a service account's name: lower case letters, digits, - and .")
			}
		case AnnotationTransport:
			c.oneOf(field(name), v, "hop", "tls", "plaintext")
		case AnnotationHopPort:
			if n, err := strconv.Atoi(v); err != nil || n < 1 || n > 65535 {
				c.add(field(name), v, "must be a port from 1 to 65535")
			} else if t := s.Annotations[AnnotationTransport]; t != "" && t != "hop" {
				c.add(field(name), v, "has a meaning only with %s hop, not %s", AnnotationTransport, t)
			}
		case AnnotationWeight:
			if n, err := strconv.Atoi(v); err != nil || n < 1 || n > 65535 {
				c.add(field(name), v, "must be a weight from 1 to 65535; to send nothing there, set conditions.ready: false")
			}
		case AnnotationRegion:
			c.problems(field(name), v, validation.IsValidLabelValue(v))
		}
	}
}

// reservedExports are prefixes of labels and annotations that mean something to control planes: no cluster sets them in another.
var reservedExports = []string{annotationPrefix, groupMCS + "/", "multicluster.kubernetes.io/"}

// maxExported bounds labels and annotations of a ServiceExport, each; maxExportedBytes the annotations together.
const (
	maxExported      = 64
	maxExportedBytes = 16 << 10
)

func (c *checker) exportedMetadata(field string, m map[string]string) {
	if len(m) > maxExported {
		c.add(field, nil, "%d entries; at most %d can be exported", len(m), maxExported)
	}
	for _, k := range slices.Sorted(maps.Keys(m)) {
		c.problems(field+"["+k+"]", k, validation.IsQualifiedName(k))
		if slices.ContainsFunc(reservedExports, func(p string) bool { return strings.HasPrefix(k, p) }) {
			c.add(field+"["+k+"]", k, "is reserved for control planes and cannot be exported; remove it")
		}
	}
}

func (c *checker) serviceExport(e *mcsv1alpha1.ServiceExport) {
	c.exportedMetadata("spec.exportedLabels", e.Spec.ExportedLabels)
	for _, k := range slices.Sorted(maps.Keys(e.Spec.ExportedLabels)) {
		c.problems("spec.exportedLabels["+k+"]", e.Spec.ExportedLabels[k], validation.IsValidLabelValue(e.Spec.ExportedLabels[k]))
	}
	c.exportedMetadata("spec.exportedAnnotations", e.Spec.ExportedAnnotations)
	size := 0
	for k, v := range e.Spec.ExportedAnnotations {
		size += len(k) + len(v)
	}
	if size > maxExportedBytes {
		c.add("spec.exportedAnnotations", nil, "%d bytes; at most %d can be exported", size, maxExportedBytes)
	}
	v, ok := e.Annotations[AnnotationAudience]
	if !ok {
		return
	}
	field := "metadata.annotations[" + AnnotationAudience + "]"
	if len(audience(v)) == 0 {
		c.add(field, v, "names nobody; remove the annotation to export to every member, or the ServiceExport to export to none")
	}
	for _, a := range audience(v) {
		if key, value, label := strings.Cut(a, "="); label {
			c.problems(field, a, append(validation.IsQualifiedName(key), validation.IsValidLabelValue(value)...))
		} else {
			c.problems(field, a, validation.IsDNS1123Label(a))
		}
	}
}

// audience splits the annotation's value; sorted, without duplicates.
func audience(v string) []string {
	var names []string
	for a := range strings.SplitSeq(v, ",") {
		if a = strings.TrimSpace(a); a != "" {
			names = append(names, a)
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

func (c *checker) targetRefs(refs []v1alpha1.TargetRef) {
	seen := map[string]bool{}
	for i, r := range refs {
		field := fmt.Sprintf("spec.targetRefs[%d]", i)
		switch {
		case r.Kind == "Service" && r.Group == "", r.Kind == "ServiceImport" && r.Group == groupMCS:
		case r.Kind == "ServiceImport":
			c.add(field+".group", r.Group, "must be %s for a ServiceImport", groupMCS)
		default:
			c.add(field+".kind", r.Kind, "must be Service (group \"\") or ServiceImport (group %s)", groupMCS)
		}
		c.problems(field+".name", r.Name, validation.IsDNS1123Label(r.Name))
		if seen[r.Name] {
			c.add(field+".name", r.Name, "is targeted twice")
		}
		seen[r.Name] = true
	}
}

func (c *checker) trafficPolicy(p *v1alpha1.TrafficPolicy) {
	s := &p.Spec
	if len(s.TargetRefs) == 0 {
		c.add("spec.targetRefs", nil, "must name at least one Service")
	}
	c.targetRefs(s.TargetRefs)

	l := &s.Locality
	c.oneOf("spec.locality.mode", l.Mode, "", "Failover", "Pin", "Balance", "Weigh")
	if len(l.Order) > 0 && (l.Mode == "Balance" || l.Mode == "Weigh") {
		c.add("spec.locality.order", nil, "has no meaning in mode %s; remove it, or use Failover or Pin", l.Mode)
	}
	if len(l.Order) == 0 && l.Mode == "Pin" {
		c.add("spec.locality.order", nil, "must say where to pin the traffic to")
	}
	if len(l.Weights) > 0 && l.Mode != "Weigh" {
		c.add("spec.locality.weights", nil, "has a meaning only in mode Weigh")
	}
	if len(l.Weights) == 0 && l.Mode == "Weigh" {
		c.add("spec.locality.weights", nil, "must be given in mode Weigh")
	}
	var sum int64
	for i, w := range l.Weights {
		c.intRange(fmt.Sprintf("spec.locality.weights[%d].weight", i), &w.Weight, 0, 1_000_000)
		sum += int64(w.Weight)
	}
	if len(l.Weights) > 0 && sum == 0 {
		c.add("spec.locality.weights", nil, "are all zero, which would send the traffic nowhere")
	}
	for i, m := range l.Order {
		c.locality(fmt.Sprintf("spec.locality.order[%d]", i), m)
	}
	for i, w := range l.Weights {
		c.locality(fmt.Sprintf("spec.locality.weights[%d]", i), w.LocalityMatch)
	}

	c.oneOf("spec.loadBalancer.type", s.LoadBalancer.Type, "", "LeastRequest", "RoundRobin", "RingHash")
	switch h := s.LoadBalancer.HashHeader; {
	case h != "" && s.LoadBalancer.Type != "RingHash":
		c.add("spec.loadBalancer.hashHeader", h, "has a meaning only with type RingHash")
	case h == "" && s.LoadBalancer.Type == "RingHash":
		c.add("spec.loadBalancer.hashHeader", nil, "must name the header to hash")
	case h != "":
		c.headerName("spec.loadBalancer.hashHeader", h)
	}
	if o := s.OutlierDetection; o != nil {
		field := "spec.outlierDetection."
		c.intRange(field+"consecutiveErrors", o.ConsecutiveErrors, 1, 1000)
		c.intRange(field+"maxEjectionPercent", o.MaxEjectionPercent, 1, 100)
		c.positive(field+"interval", o.Interval)
		base := c.positive(field+"baseEjectionTime", o.BaseEjectionTime)
		if longest := c.positive(field+"maxEjectionTime", o.MaxEjectionTime); longest > 0 && longest < base {
			c.add(field+"maxEjectionTime", *o.MaxEjectionTime, "must not be less than baseEjectionTime %s", base)
		}
	}
	if b := s.RetryBudget; b != nil {
		c.intRange("spec.retryBudget.percent", b.Percent, 1, 100)
		c.intRange("spec.retryBudget.minConcurrency", b.MinConcurrency, 1, 10_000)
	}
	c.duration("spec.timeouts.request", s.Timeouts.Request)
	c.positive("spec.timeouts.connect", s.Timeouts.Connect)
	c.intRange("spec.maxRequests", s.MaxRequests, 1, 1_000_000)
}

func (c *checker) locality(field string, m v1alpha1.LocalityMatch) {
	for _, f := range []struct{ name, value string }{{"cluster", m.Cluster}, {"region", m.Region}, {"zone", m.Zone}} {
		if f.value != "$self" {
			c.problems(field+"."+f.name, f.value, validation.IsValidLabelValue(f.value))
		}
	}
}

func (c *checker) accessPolicy(p *v1alpha1.AccessPolicy) {
	c.targetRefs(p.Spec.TargetRefs)
	c.oneOf("spec.action", p.Spec.Action, "", v1alpha1.ActionAllow, v1alpha1.ActionDeny)
	c.oneOf("spec.mode", p.Spec.Mode, "", v1alpha1.ModeEnforce, v1alpha1.ModeAudit)
	if p.Spec.Action == v1alpha1.ActionDeny && len(p.Spec.Rules) == 0 {
		c.add("spec.rules", nil, "must be given: without rules a Deny policy denies nobody. To deny everybody, use one empty rule: [{}]")
	}
	for i, r := range p.Spec.Rules {
		field := fmt.Sprintf("spec.rules[%d]", i)
		for j, pattern := range r.From {
			c.spiffePattern(fmt.Sprintf("%s.from[%d]", field, j), pattern)
		}
		for j, m := range r.Methods {
			if !methodName.MatchString(m) {
				c.add(fmt.Sprintf("%s.methods[%d]", field, j), m, "must be an HTTP method in capitals, such as GET")
			}
		}
		for j, path := range r.Paths {
			exact := strings.TrimSuffix(path, "*")
			if strings.Contains(exact, "*") || (!strings.HasPrefix(exact, "/") && path != "*") {
				c.add(fmt.Sprintf("%s.paths[%d]", field, j), path, "must begin with /; * may stand only at the end, for any rest")
			}
		}
		for j, port := range r.Ports {
			c.port(fmt.Sprintf("%s.ports[%d]", field, j), port)
		}
	}
}

var methodName = regexp.MustCompile(`^[A-Z]([A-Z_-]{0,30}[A-Z])?$`)

func (c *checker) spiffePattern(field, pattern string) {
	if err := identity.ValidatePattern(pattern); err != nil {
		reason := strings.TrimPrefix(err.Error(), fmt.Sprintf("SPIFFE-ID pattern %q: ", pattern))
		c.add(field, pattern, "not a SPIFFE-ID pattern: %s; write for example spiffe://east.example/ns/shop/sa/*", reason)
	}
}

func (c *checker) peer(p *v1alpha1.Peer) {
	c.oneOf("spec.introductions", p.Spec.Introductions, "",
		v1alpha1.IntroductionsAccept, v1alpha1.IntroductionsAsk, v1alpha1.IntroductionsRefuse)
	for i, ns := range p.Spec.Import.Namespaces {
		c.problems(fmt.Sprintf("spec.import.namespaces[%d]", i), ns, validation.IsDNS1123Label(ns))
	}
	for i, pattern := range p.Spec.Import.SPIFFEIDs {
		c.spiffePattern(fmt.Sprintf("spec.import.spiffeIDs[%d]", i), pattern)
	}
}

func (c *checker) drill(d *v1alpha1.Drill) {
	s := &d.Spec
	c.oneOf("spec.mode", s.Mode, v1alpha1.DrillModes()...)
	if s.Scope.Cluster == "" {
		c.add("spec.scope.cluster", nil, "must be given: a drill names the cluster that it happens in")
	} else {
		c.problems("spec.scope.cluster", s.Scope.Cluster, validation.IsDNS1123Label(s.Scope.Cluster))
	}
	c.problems("spec.scope.region", s.Scope.Region, validation.IsValidLabelValue(s.Scope.Region))
	c.problems("spec.scope.zone", s.Scope.Zone, validation.IsValidLabelValue(s.Scope.Zone))
	if svc := s.Scope.Service; svc != "" {
		ns, name, ok := strings.Cut(svc, "/")
		if !ok || len(validation.IsDNS1123Label(ns)) > 0 || len(validation.IsDNS1123Label(name)) > 0 {
			c.add("spec.scope.service", svc, "must be namespace/name")
		}
	}
	c.intRange("spec.scope.percent", s.Scope.Percent, 1, 100)
	switch s.Mode {
	case v1alpha1.DrillSilenceControlPlane, v1alpha1.DrillCutFederation, v1alpha1.DrillRotate:
		for _, f := range []struct {
			name  string
			given bool
		}{{"region", s.Scope.Region != ""}, {"zone", s.Scope.Zone != ""}, {"service", s.Scope.Service != ""}, {"percent", s.Scope.Percent != nil}} {
			if f.given {
				c.add("spec.scope."+f.name, nil, "mode %s concerns a whole cluster; remove this", s.Mode)
			}
		}
	}
	if v := c.positive("spec.duration", s.Duration); v > 0 && (v < v1alpha1.MinDrill || v > v1alpha1.MaxDrill) {
		c.add("spec.duration", *s.Duration, "must be from 1s to 1h")
	}
	if _, err := s.MinSuccess(); err != nil {
		c.add("spec.abortIf", s.AbortIf, "must be such as success<99%%, with a rate from 0 to 100")
	}
	latency := c.positive("spec.latency", s.Latency)
	switch {
	case s.Mode == v1alpha1.DrillSlow && s.Latency == nil:
		c.add("spec.latency", nil, "must be given in mode slow")
	case s.Mode != v1alpha1.DrillSlow && s.Latency != nil:
		c.add("spec.latency", *s.Latency, "has a meaning only in mode slow")
	case latency > time.Hour:
		c.add("spec.latency", *s.Latency, "must be at most 1h")
	}
	switch {
	case s.Mode == v1alpha1.DrillDistrustRoot && s.Root == "":
		c.add("spec.root", nil, "must be given in mode distrust-root: a trust domain, or the beginning of an authority's name")
	case s.Mode != v1alpha1.DrillDistrustRoot && s.Root != "":
		c.add("spec.root", s.Root, "has a meaning only in mode distrust-root")
	}
	c.intRange("spec.errorCode", s.ErrorCode, 400, 599)
	if s.ErrorCode != nil && s.Mode != v1alpha1.DrillErrors {
		c.add("spec.errorCode", *s.ErrorCode, "has a meaning only in mode errors")
	}
}

// maxAllow bounds rules of one trust domain, and what one rule lists.
const maxAllow = 1000

// allow checks spec.allow, or the annotation in its place.
func (c *checker) allow(f *v1alpha1.ClusterFederatedTrustDomain, td spiffeid.TrustDomain) []v1alpha1.FederationAllow {
	at := "spec.allow"
	if _, ok := f.Annotations[v1alpha1.AllowAnnotation]; ok {
		at = "metadata.annotations[" + v1alpha1.AllowAnnotation + "]"
	}
	rules, err := f.Allowed()
	if err != nil {
		c.add(at, f.Annotations[v1alpha1.AllowAnnotation], "%s", err)
	}
	if len(rules) > maxAllow {
		c.add(at, len(rules), "must be at most %d rules", maxAllow)
		return rules
	}
	for i, r := range rules {
		for j, name := range r.Services {
			ns, svc, _ := strings.Cut(name, "/")
			if ns != "*" && len(validation.IsDNS1123Label(ns)) > 0 || svc != "*" && len(validation.IsDNS1123Label(svc)) > 0 {
				c.add(fmt.Sprintf("%s[%d].services[%d]", at, i, j), name, "must be namespace/name, with * for any of either, such as shop/payments or shop/*")
			}
		}
		field := fmt.Sprintf("%s[%d].spiffeIDs", at, i)
		switch {
		case len(r.SPIFFEIDs) == 0:
			c.add(field, nil, "must list at least one pattern; spiffe://%s/** is every ID", td.Name())
		case len(r.SPIFFEIDs) > maxAllow || len(r.Services) > maxAllow:
			c.add(field, len(r.SPIFFEIDs), "a rule lists at most %d services and %d patterns", maxAllow, maxAllow)
			continue
		}
		for j, pattern := range r.SPIFFEIDs {
			field := fmt.Sprintf("%s[%d]", field, j)
			c.spiffePattern(field, pattern)
			if own, _, _ := strings.Cut(strings.TrimPrefix(pattern, "spiffe://"), "/"); identity.ValidatePattern(pattern) == nil && own != td.Name() {
				c.add(field, pattern, "names another trust domain: begin with spiffe://%s/", td.Name())
			}
		}
	}
	return rules
}

func (c *checker) federatedTrustDomain(f *v1alpha1.ClusterFederatedTrustDomain) {
	s := &f.Spec
	td, err := spiffeid.TrustDomainFromString(s.TrustDomain)
	example := td.Name()
	if err != nil || strings.Contains(s.TrustDomain, "/") {
		c.add("spec.trustDomain", s.TrustDomain, "must be a trust domain's name: lower case letters, digits, ., - and _")
		example = "partner.example"
	}
	rules := c.allow(f, td)
	if s.BundleEndpointURL == "" && (s.TrustDomainBundle != "" || len(rules) > 0) { // by hand, or a member of the mesh, whose bundle comes by itself
		if s.BundleEndpointProfile.EndpointSPIFFEID != "" {
			c.add("spec.bundleEndpointProfile.endpointSPIFFEID", s.BundleEndpointProfile.EndpointSPIFFEID, "has a meaning only with bundleEndpointURL")
		}
	} else if u, err := url.Parse(s.BundleEndpointURL); err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil {
		shown := ""
		if err == nil {
			shown = u.Redacted()
		}
		c.add("spec.bundleEndpointURL", shown, "must be an https:// URL without user and password")
	}
	profile := &s.BundleEndpointProfile
	if profile.Type != "" || s.BundleEndpointURL != "" {
		c.oneOf("spec.bundleEndpointProfile.type", profile.Type, v1alpha1.ProfileSPIFFE, v1alpha1.ProfileWeb)
	}
	switch _, err := spiffeid.FromString(profile.EndpointSPIFFEID); {
	case profile.Type == v1alpha1.ProfileSPIFFE && s.BundleEndpointURL != "" && err != nil:
		c.add("spec.bundleEndpointProfile.endpointSPIFFEID", profile.EndpointSPIFFEID,
			"must be the SPIFFE ID that the endpoint presents, such as spiffe://%s/spire/server", example)
	case profile.Type == v1alpha1.ProfileWeb && profile.EndpointSPIFFEID != "":
		c.add("spec.bundleEndpointProfile.endpointSPIFFEID", profile.EndpointSPIFFEID, "has a meaning only with https_spiffe")
	}
	if roots, ok := f.Annotations[v1alpha1.WebRootsAnnotation]; ok {
		field := "metadata.annotations[" + v1alpha1.WebRootsAnnotation + "]"
		switch {
		case profile.Type != v1alpha1.ProfileWeb:
			c.add(field, nil, "has a meaning only with https_web")
		case !x509.NewCertPool().AppendCertsFromPEM([]byte(roots)):
			c.add(field, roots, "must be certificates in PEM, of who vouches for the endpoint")
		}
	}
	if s.TrustDomainBundle != "" {
		if _, err := spiffebundle.Parse(td, []byte(s.TrustDomainBundle)); err != nil {
			c.add("spec.trustDomainBundle", nil, "must be a SPIFFE bundle in JSON: %s", err)
		}
	}
}
