package xdsgen

import (
	"cmp"
	"maps"
	"math"
	"net/netip"
	"slices"
	"strconv"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/discovery/xdspb"
)

// Defaults where a TrafficPolicy is silent.
const (
	connectTimeout    = time.Second
	maxRequests       = 1024
	overprovisioning  = 140 // percent, Envoy's
	panicThreshold    = 50  // percent, Envoy's
	consecutiveErrors = 5
	outlierInterval   = 2 * time.Second
	baseEjection      = 5 * time.Second
	maxEjection       = 60 * time.Second
	maxEjectedPercent = 100 // a whole level may go while a lower one is healthy
	retryPercent      = 20
	retryConcurrency  = 3
)

// noSAN is accepted from nobody: a service without endpoints has no identity, and an empty list would accept every one.
const noSAN = "spiffe://hanse.invalid/none"

func (v *View) cluster(viewer *Viewer, c *callee) (proto.Message, error) {
	socket, err := v.upstreamTLS(viewer, c)
	if err != nil {
		return nil, err
	}
	meta, err := metadata(&xdspb.ServiceMeta{Service: c.name.String(), Protocol: string(c.port.Protocol), HashHeader: c.policy.HashHeader})
	if err != nil {
		return nil, err
	}
	p := c.policy
	budget := cmp.Or(p.RetryBudget, &discovery.RetryBudget{Percent: retryPercent, MinConcurrency: retryConcurrency})
	out := &clusterv3.Cluster{
		Name:                 c.authority,
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_EDS},
		EdsClusterConfig:     &clusterv3.Cluster_EdsClusterConfig{EdsConfig: ads()},
		ConnectTimeout:       durationpb.New(cmp.Or(p.ConnTimeout, connectTimeout)),
		LbPolicy:             lbPolicy(viewer, c),
		CircuitBreakers: &clusterv3.CircuitBreakers{Thresholds: []*clusterv3.CircuitBreakers_Thresholds{{
			MaxRequests: u32(cmp.Or(p.MaxRequests, maxRequests)),
			RetryBudget: &clusterv3.CircuitBreakers_Thresholds_RetryBudget{
				BudgetPercent:       &typev3.Percent{Value: float64(cmp.Or(budget.Percent, retryPercent))},
				MinRetryConcurrency: u32(cmp.Or(budget.MinConcurrency, retryConcurrency)),
			},
		}}},
		OutlierDetection: outlierDetection(viewer, p.Outlier),
		CommonLbConfig:   &clusterv3.Cluster_CommonLbConfig{HealthyPanicThreshold: &typev3.Percent{Value: panicThreshold}},
		TransportSocket:  socket,
		Metadata:         meta,
	}
	if p.Mode == discovery.ModeWeigh {
		out.CommonLbConfig.LocalityConfigSpecifier = &clusterv3.Cluster_CommonLbConfig_LocalityWeightedLbConfig_{
			LocalityWeightedLbConfig: &clusterv3.Cluster_CommonLbConfig_LocalityWeightedLbConfig{}}
	}
	return out, nil
}

// invalidCluster has no endpoints: what is sent there fails at once.
func invalidCluster() *clusterv3.Cluster {
	return &clusterv3.Cluster{
		Name:                 InvalidCluster,
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_EDS},
		EdsClusterConfig:     &clusterv3.Cluster_EdsClusterConfig{EdsConfig: ads()},
		ConnectTimeout:       durationpb.New(connectTimeout),
	}
}

func lbPolicy(viewer *Viewer, c *callee) clusterv3.Cluster_LbPolicy {
	switch {
	case hashes(c):
		return clusterv3.Cluster_RING_HASH
	case c.policy.LoadBalancer == "RoundRobin":
		return clusterv3.Cluster_ROUND_ROBIN
	case viewer.Kind == GRPC && c.policy.LoadBalancer == "":
		return clusterv3.Cluster_ROUND_ROBIN // every gRPC has it; least_request came with A48
	}
	return clusterv3.Cluster_LEAST_REQUEST
}

func outlierDetection(viewer *Viewer, o *discovery.OutlierDetection) *clusterv3.OutlierDetection {
	o = cmp.Or(o, &discovery.OutlierDetection{})
	out := &clusterv3.OutlierDetection{
		Interval:                 durationpb.New(cmp.Or(o.Interval, outlierInterval)),
		BaseEjectionTime:         durationpb.New(cmp.Or(o.BaseEjection, baseEjection)),
		MaxEjectionTime:          durationpb.New(cmp.Or(o.MaxEjection, maxEjection)),
		MaxEjectionPercent:       u32(cmp.Or(o.MaxPercent, maxEjectedPercent)),
		EnforcingSuccessRate:     u32(0),
		EnforcingConsecutive_5Xx: u32(0),
	}
	if viewer.Kind == GRPC { // gRFC A50 knows no consecutive errors
		out.FailurePercentageThreshold = u32(85)
		out.FailurePercentageMinimumHosts = u32(1)
		out.FailurePercentageRequestVolume = u32(cmp.Or(o.ConsecutiveErrors, consecutiveErrors))
		out.EnforcingFailurePercentage = u32(100)
		return out
	}
	out.ConsecutiveGatewayFailure = u32(cmp.Or(o.ConsecutiveErrors, consecutiveErrors))
	out.EnforcingConsecutiveGatewayFailure = u32(100)
	return out
}

func certificateProvider() *tlsv3.CertificateProviderPluginInstance {
	return &tlsv3.CertificateProviderPluginInstance{InstanceName: tlsInstance}
}

// upstreamTLS accepts the service's SPIFFE IDs. A sidecar goes further and accepts at each endpoint only that endpoint's.
func (v *View) upstreamTLS(viewer *Viewer, c *callee) (*corev3.TransportSocket, error) {
	ids := make(map[string]struct{})
	for i := range c.parts {
		for _, e := range c.parts[i].endpoints {
			if e.SPIFFEID != "" && v.trusts(e.SPIFFEID) && v.allows(c.name, e.SPIFFEID) {
				ids[e.SPIFFEID] = struct{}{}
			}
		}
	}
	sans := slices.Sorted(maps.Keys(ids))
	if len(sans) == 0 {
		sans = []string{noSAN}
	}
	check := &tlsv3.CertificateValidationContext{CaCertificateProviderInstance: certificateProvider()}
	tls := &tlsv3.UpstreamTlsContext{CommonTlsContext: &tlsv3.CommonTlsContext{
		TlsCertificateProviderInstance: certificateProvider(),
		ValidationContextType:          &tlsv3.CommonTlsContext_ValidationContext{ValidationContext: check},
	}}
	for _, id := range sans {
		exact := &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Exact{Exact: id}}
		if viewer.Kind == GRPC {
			//lint:ignore SA1019 gRPC reads only the field that Envoy deprecated (gRFC A29)
			check.MatchSubjectAltNames = append(check.MatchSubjectAltNames, exact)
		} else {
			check.MatchTypedSubjectAltNames = append(check.MatchTypedSubjectAltNames,
				&tlsv3.SubjectAltNameMatcher{SanType: tlsv3.SubjectAltNameMatcher_URI, Matcher: exact})
		}
	}
	if viewer.Kind == GRPC {
		tls.Sni = serviceSNI(c.name, c.ports, c.port.Number)
	}
	config, err := packed(tls)
	if err != nil {
		return nil, err
	}
	return &corev3.TransportSocket{Name: tlsSocket, ConfigType: &corev3.TransportSocket_TypedConfig{TypedConfig: config}}, nil
}

func (v *View) loadAssignment(viewer *Viewer, c *callee) (m proto.Message, personal bool, err error) {
	levels := v.levels(viewer, c)
	out := &endpointv3.ClusterLoadAssignment{
		ClusterName: c.authority,
		Policy:      &endpointv3.ClusterLoadAssignment_Policy{OverprovisioningFactor: u32(overprovisioning)},
	}
	if viewer.Kind == GRPC {
		out.Policy = nil // gRPC fails over by whole priorities
		out.Endpoints = grpcLocalities(levels, c.policy)
		return out, false, nil
	}
	for priority, l := range levels.Levels {
		for _, group := range byLocality(l.Endpoints) {
			at := locality(group[0].Locality, priority)
			at.LoadBalancingWeight = u32(localityWeight(c.policy, levels.Mode, l.Endpoints, group))
			for i := range group {
				e, err := lbEndpoint(&group[i])
				if err != nil {
					return nil, false, err
				}
				at.LbEndpoints = append(at.LbEndpoints, e)
			}
			out.Endpoints = append(out.Endpoints, at)
		}
	}
	return out, levels.Subset, nil
}

func locality(l discovery.Locality, priority int) *endpointv3.LocalityLbEndpoints {
	return &endpointv3.LocalityLbEndpoints{
		Locality: &corev3.Locality{Region: l.Region, Zone: l.Zone, SubZone: l.Cluster},
		Priority: uint32(priority),
	}
}

// byLocality splits endpoints, which are sorted by locality, into runs of one.
func byLocality(endpoints []Ranked) [][]Ranked {
	var out [][]Ranked
	for start := 0; start < len(endpoints); {
		end := start + 1
		for end < len(endpoints) && endpoints[end].Locality == endpoints[start].Locality {
			end++
		}
		out = append(out, endpoints[start:end])
		start = end
	}
	return out
}

// localityWeight is the sum of a locality's weights; under Weigh, its part of the shares that the policy's entries give.
func localityWeight(policy *discovery.TrafficPolicy, mode discovery.LocalityMode, level, group []Ranked) uint32 {
	var sum uint64
	for i := range group {
		sum += uint64(group[i].Weight)
	}
	if mode != discovery.ModeWeigh {
		return uint32(sum)
	}
	var all uint64
	for _, w := range policy.Weights {
		all += uint64(w.Weight)
	}
	total := make([]uint64, len(policy.Weights)) // of each entry's endpoints
	for i := range level {
		total[level[i].share] += uint64(level[i].Weight)
	}
	const scale = 1_000_000 // of all entries together
	var part float64
	for i := range group {
		share := group[i].share
		part += scale * float64(policy.Weights[share].Weight) / float64(all) * float64(group[i].Weight) / float64(total[share])
	}
	return max(1, uint32(math.Round(part)))
}

func lbEndpoint(r *Ranked) (*endpointv3.LbEndpoint, error) {
	m := &xdspb.EndpointMeta{
		Id: r.ID, Cluster: r.Locality.Cluster, SpiffeId: r.SPIFFEID, Transport: string(r.Transport),
		Sni: r.SNI, Suspect: r.Suspect, Reason: r.Reason, Draining: r.Draining,
	}
	for _, g := range r.Gateways {
		m.Gateways = append(m.Gateways, g.String())
	}
	meta, err := metadata(m)
	if err != nil {
		return nil, err
	}
	health := corev3.HealthStatus_HEALTHY
	switch {
	case r.Draining:
		health = corev3.HealthStatus_DRAINING
	case !r.Ready:
		health = corev3.HealthStatus_UNHEALTHY
	}
	return &endpointv3.LbEndpoint{
		HostIdentifier:      &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{Address: socketAddress(r.Address)}},
		HealthStatus:        health,
		Metadata:            meta,
		LoadBalancingWeight: u32(r.Weight),
	}, nil
}

// grpcLocalities is what a gRPC client can read: ready endpoints only, one endpoint per gateway address of another network
// (which picks the endpoint by the service's SNI), each address once, and priorities without gaps.
func grpcLocalities(levels *Levels, policy *discovery.TrafficPolicy) []*endpointv3.LocalityLbEndpoints {
	var out []*endpointv3.LocalityLbEndpoints
	used := make(map[netip.AddrPort]bool)
	priority := 0
	for _, l := range levels.Levels {
		groups := make(map[discovery.Locality][]Ranked)
		var ready []Ranked
		for _, e := range l.Endpoints {
			if !e.Ready || e.Draining {
				continue
			}
			at := e.Locality
			if len(e.Gateways) > 0 {
				at.Zone = "" // a gateway leads to all zones
			}
			groups[at] = append(groups[at], e)
			ready = append(ready, e)
		}
		before := len(out)
		for _, at := range slices.SortedFunc(maps.Keys(groups), compareLocality) {
			group := groups[at]
			l := locality(at, priority)
			l.LoadBalancingWeight = u32(localityWeight(policy, levels.Mode, ready, group))
			add := func(ap netip.AddrPort, weight uint32) {
				if !used[ap] {
					used[ap] = true
					l.LbEndpoints = append(l.LbEndpoints, &endpointv3.LbEndpoint{
						HostIdentifier:      &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{Address: socketAddress(ap)}},
						HealthStatus:        corev3.HealthStatus_HEALTHY,
						LoadBalancingWeight: u32(weight),
					})
				}
			}
			for _, e := range group {
				if len(e.Gateways) == 0 {
					add(e.Address, e.Weight)
				}
				for _, g := range e.Gateways {
					add(g, 1)
				}
			}
			if len(l.LbEndpoints) > 0 {
				out = append(out, l)
			}
		}
		if len(out) > before {
			priority++
		}
	}
	return out
}

// endpointSNI names one endpoint at its gateway; one that serves TLS itself is named with the port.
func endpointSNI(e *discovery.Endpoint, target uint16) string {
	if e.Transport == discovery.TLS {
		return strconv.Itoa(int(target)) + "." + e.ID + ".endpoint.hanse"
	}
	return e.ID + ".endpoint.hanse"
}

// serviceSNI names any ready endpoint of a service at its gateway; with the port in front where the service has several.
func serviceSNI(n discovery.Name, ports []discovery.Port, number uint16) string {
	for _, p := range ports {
		if p.Carried() && p.Number != number {
			return portSNI(n, number)
		}
	}
	return n.Host()
}

func portSNI(n discovery.Name, number uint16) string {
	return strconv.Itoa(int(number)) + "." + n.Host()
}
