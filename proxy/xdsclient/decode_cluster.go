package xdsclient

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"

	"github.com/hanse-mesh/hanse/discovery/xdspb"
	"github.com/hanse-mesh/hanse/proxy"
)

func decodeCluster(name string, m *clusterv3.Cluster) (any, error) {
	if m.Name != name {
		return nil, fmt.Errorf("name is %q", shorten(m.Name))
	}
	if m.GetType() != clusterv3.Cluster_EDS {
		return nil, fmt.Errorf("type is %s, want EDS", m.GetType())
	}
	if s := m.GetEdsClusterConfig().GetServiceName(); s != "" && s != name {
		return nil, fmt.Errorf("eds_cluster_config.service_name is %q, want the cluster's name", shorten(s))
	}
	var md xdspb.ServiceMeta
	if _, err := meta(m.Metadata, &md); err != nil {
		return nil, err
	}
	protocol, err := decodeProtocol(md.Protocol)
	if err != nil {
		return nil, fmt.Errorf("metadata.protocol: %w", err)
	}
	c := &proxy.Cluster{
		Name: name, Service: shorten(md.Service), Protocol: protocol, HashHeader: strings.ToLower(shorten(md.HashHeader)),
		Overprovisioning: 140, PanicThreshold: 50,
		WeightedLocality: m.GetCommonLbConfig().GetLocalityWeightedLbConfig() != nil,
	}
	switch m.LbPolicy {
	case clusterv3.Cluster_LEAST_REQUEST:
		c.Policy = "least_request"
	case clusterv3.Cluster_ROUND_ROBIN:
		c.Policy = "round_robin"
	case clusterv3.Cluster_RING_HASH:
		c.Policy = "ring_hash"
	default:
		return nil, fmt.Errorf("lb_policy %s is not supported", m.LbPolicy)
	}
	if c.ConnectTimeout, err = duration(m.ConnectTimeout); err != nil {
		return nil, fmt.Errorf("connect_timeout: %w", err)
	}
	if p := m.GetCommonLbConfig().GetHealthyPanicThreshold(); p != nil {
		if c.PanicThreshold, err = percent(p.Value); err != nil {
			return nil, fmt.Errorf("common_lb_config.healthy_panic_threshold: %w", err)
		}
	}
	for _, t := range m.GetCircuitBreakers().GetThresholds() {
		if t.Priority != corev3.RoutingPriority_DEFAULT {
			continue
		}
		c.MaxRequests = t.GetMaxRequests().GetValue()
		if b := t.RetryBudget; b != nil {
			if c.RetryBudget.Percent, err = percent(b.GetBudgetPercent().GetValue()); err != nil {
				return nil, fmt.Errorf("circuit_breakers.thresholds.retry_budget.budget_percent: %w", err)
			}
			c.RetryBudget.MinConcurrency = b.GetMinRetryConcurrency().GetValue()
		}
	}
	if err := decodeOutlier(&c.Outlier, m.OutlierDetection); err != nil {
		return nil, fmt.Errorf("outlier_detection.%w", err)
	}
	return c, nil
}

func decodeOutlier(o *proxy.Outlier, m *clusterv3.OutlierDetection) (err error) {
	o.ConsecutiveErrors = firstSet(m.GetConsecutiveGatewayFailure(), m.GetConsecutive_5Xx())
	o.MaxPercent = m.GetMaxEjectionPercent().GetValue()
	if o.MaxPercent > 100 {
		return fmt.Errorf("max_ejection_percent is %d", o.MaxPercent)
	}
	if o.Interval, err = duration(m.GetInterval()); err != nil {
		return fmt.Errorf("interval: %w", err)
	}
	if o.BaseEjection, err = duration(m.GetBaseEjectionTime()); err != nil {
		return fmt.Errorf("base_ejection_time: %w", err)
	}
	if o.MaxEjection, err = duration(m.GetMaxEjectionTime()); err != nil {
		return fmt.Errorf("max_ejection_time: %w", err)
	}
	return nil
}

func decodeAssignment(m *endpointv3.ClusterLoadAssignment) (any, error) {
	out := &assignment{}
	if f := m.GetPolicy().GetOverprovisioningFactor(); f != nil {
		if out.overprovisioning = f.Value; f.Value < 100 || f.Value > 10_000 {
			return nil, fmt.Errorf("policy.overprovisioning_factor is %d", f.Value)
		}
	}
	ids := map[string]struct{}{}
	for i, l := range m.Endpoints {
		if l.Priority >= maxLevels {
			return nil, fmt.Errorf("endpoints[%d].priority is %d, at most %d levels are read", i, l.Priority, maxLevels)
		}
		for uint32(len(out.levels)) <= l.Priority {
			out.levels = append(out.levels, proxy.Level{})
		}
		at := proxy.LocalityEndpoints{
			Locality: proxy.Locality{
				Cluster: shorten(l.GetLocality().GetSubZone()), Region: shorten(l.GetLocality().GetRegion()), Zone: shorten(l.GetLocality().GetZone()),
			},
			Weight: l.GetLoadBalancingWeight().GetValue(),
		}
		if err := bounded("endpoints", len(ids)+len(l.LbEndpoints), maxEndpoints); err != nil {
			return nil, err
		}
		for j, le := range l.LbEndpoints {
			e, err := decodeEndpoint(le, at.Locality)
			if err != nil {
				return nil, fmt.Errorf("endpoints[%d].lb_endpoints[%d].%w", i, j, err)
			}
			if _, twice := ids[e.ID]; twice {
				return nil, fmt.Errorf("endpoints[%d].lb_endpoints[%d].metadata.id %s is there twice", i, j, e.ID)
			}
			ids[e.ID] = struct{}{}
			at.Endpoints = append(at.Endpoints, e)
		}
		level := &out.levels[l.Priority]
		level.Localities = append(level.Localities, at)
	}
	for i, l := range out.levels {
		if len(l.Localities) == 0 {
			return nil, fmt.Errorf("priorities have a gap: nothing has %d", i)
		}
	}
	return out, nil
}

func decodeEndpoint(m *endpointv3.LbEndpoint, at proxy.Locality) (*proxy.Endpoint, error) {
	var md xdspb.EndpointMeta
	found, err := meta(m.Metadata, &md)
	if err != nil {
		return nil, err
	}
	if !found || md.Id == "" {
		return nil, errors.New("metadata: no endpoint ID")
	}
	e := &proxy.Endpoint{
		ID: md.Id, SNI: md.Sni, SPIFFEID: md.SpiffeId, Transport: proxy.Transport(md.Transport), Locality: at, Weight: 1,
		Suspect: md.Suspect, Draining: md.Draining, Reason: shorten(md.Reason),
	}
	if len(e.ID) > maxName || len(e.SNI) > maxName || len(e.SPIFFEID) > 2048 {
		return nil, errors.New("metadata: a name is too long")
	}
	if e.Address, err = address(m.GetEndpoint().GetAddress()); err != nil {
		return nil, fmt.Errorf("endpoint.address: %w", err)
	}
	switch e.Transport {
	case proxy.TransportHop, proxy.TransportTLS:
		if !strings.HasPrefix(e.SPIFFEID, "spiffe://") {
			return nil, fmt.Errorf("metadata.spiffe_id %q: transport %s needs one", shorten(e.SPIFFEID), e.Transport)
		}
	case proxy.TransportPlaintext:
	default:
		return nil, fmt.Errorf("metadata.transport %q is not known", shorten(md.Transport))
	}
	if err := bounded("metadata.gateways", len(md.Gateways), maxGateways); err != nil {
		return nil, err
	}
	for _, g := range md.Gateways {
		ap, err := netip.ParseAddrPort(g)
		if err != nil || ap.Port() == 0 {
			return nil, fmt.Errorf("metadata.gateways: %q is not ip:port", shorten(g))
		}
		e.Gateways = append(e.Gateways, ap)
	}
	if len(e.Gateways) > 0 && (e.SNI == "" || e.Transport == proxy.TransportPlaintext) {
		return nil, errors.New("metadata: an endpoint behind a gateway needs an SNI and mutual TLS")
	}
	if w := m.LoadBalancingWeight; w != nil {
		if e.Weight = w.Value; w.Value == 0 || w.Value > 1<<20 {
			return nil, fmt.Errorf("load_balancing_weight is %d", w.Value)
		}
	}
	switch m.HealthStatus {
	case corev3.HealthStatus_UNKNOWN, corev3.HealthStatus_HEALTHY:
	case corev3.HealthStatus_DRAINING:
		e.Draining = true
	default:
		e.Unhealthy = true
	}
	return e, nil
}

// decodeTargets reads one line of a gateway's table. Endpoints that drain are used only where no other is.
func decodeTargets(m *endpointv3.ClusterLoadAssignment) (any, error) {
	var ready, draining []proxy.Target
	for i, l := range m.Endpoints {
		if err := bounded("endpoints", len(ready)+len(draining)+len(l.LbEndpoints), maxEndpoints); err != nil {
			return nil, err
		}
		for j, le := range l.LbEndpoints {
			var md xdspb.EndpointMeta
			if _, err := meta(le.Metadata, &md); err != nil {
				return nil, fmt.Errorf("endpoints[%d].lb_endpoints[%d].%w", i, j, err)
			}
			addr, err := address(le.GetEndpoint().GetAddress())
			if err != nil {
				return nil, fmt.Errorf("endpoints[%d].lb_endpoints[%d].endpoint.address: %w", i, j, err)
			}
			if md.Id == "" || len(md.Id) > maxName {
				return nil, fmt.Errorf("endpoints[%d].lb_endpoints[%d].metadata.id %q is not valid", i, j, shorten(md.Id))
			}
			t := proxy.Target{ID: md.Id, Address: addr, Weight: 1}
			if w := le.LoadBalancingWeight; w != nil {
				t.Weight = w.Value
			}
			switch le.HealthStatus {
			case corev3.HealthStatus_UNKNOWN, corev3.HealthStatus_HEALTHY:
				ready = append(ready, t)
			case corev3.HealthStatus_DRAINING:
				draining = append(draining, t)
			}
		}
	}
	if len(ready) == 0 {
		return draining, nil
	}
	return ready, nil
}
