package xdsclient

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"

	"github.com/hanse-mesh/hanse/proxy"
)

func decodeListener(name string, m *listenerv3.Listener) (any, error) {
	if m.Name != name {
		return nil, fmt.Errorf("name is %q", shorten(m.Name))
	}
	if ip, ok := strings.CutPrefix(name, inboundPrefix); ok {
		in, err := decodeInbound(ip, m)
		if err != nil {
			return nil, err
		}
		return in, nil
	}
	api := m.GetApiListener().GetApiListener()
	if api == nil {
		l, err := decodeChains(name, m)
		if err != nil {
			return nil, err
		}
		return newOutbound(l), nil
	}
	switch api.MessageName() {
	case "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager":
		var hcm hcmv3.HttpConnectionManager
		if err := unpack(api, &hcm); err != nil {
			return nil, fmt.Errorf("api_listener: %w", err)
		}
		routes, err := decodeRoutes(hcm.GetRouteConfig())
		if err != nil {
			return nil, fmt.Errorf("api_listener.route_config: %w", err)
		}
		return newOutbound(&proxy.Listener{Authority: name, Protocol: proxy.HTTP, Routes: routes}), nil
	case "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy":
		var tcp tcpv3.TcpProxy
		if err := unpack(api, &tcp); err != nil {
			return nil, fmt.Errorf("api_listener: %w", err)
		}
		l, err := decodeTCP(name, &tcp)
		if err != nil {
			return nil, fmt.Errorf("api_listener: %w", err)
		}
		return newOutbound(l), nil
	}
	return nil, fmt.Errorf("api_listener is a %q, want HttpConnectionManager or TcpProxy", shorten(string(api.MessageName())))
}

func newOutbound(l *proxy.Listener) *outbound {
	names := map[string]struct{}{}
	add := func(b *proxy.Backend) {
		if b.DirectStatus == 0 {
			names[b.Cluster] = struct{}{}
		}
	}
	for _, r := range l.Routes {
		for i := range r.Backends {
			add(&r.Backends[i])
		}
		if r.Mirror != nil {
			add(r.Mirror)
		}
	}
	for i := range l.Split {
		add(&l.Split[i])
	}
	for _, r := range l.SNI {
		for i := range r.Split {
			add(&r.Split[i])
		}
	}
	if l.Cluster != "" {
		names[l.Cluster] = struct{}{}
	}
	return &outbound{listener: l, clusters: slices.Sorted(maps.Keys(names))}
}

// decodeChains reads a Listener that parts TCP connections by server name.
func decodeChains(name string, m *listenerv3.Listener) (*proxy.Listener, error) {
	if len(m.FilterChains) == 0 && m.DefaultFilterChain == nil {
		return nil, errors.New("neither api_listener nor filter_chains is set")
	}
	if err := only(m, "name", "filter_chains", "default_filter_chain"); err != nil {
		return nil, err
	}
	if err := bounded("filter_chains", len(m.FilterChains), maxChains); err != nil {
		return nil, err
	}
	chain := func(c *listenerv3.FilterChain) (*proxy.Listener, error) {
		if len(c.Filters) != 1 {
			return nil, fmt.Errorf("%d filters, want 1", len(c.Filters))
		}
		var tcp tcpv3.TcpProxy
		if err := unpack(c.Filters[0].GetTypedConfig(), &tcp); err != nil {
			return nil, fmt.Errorf("filters[0]: %w", err)
		}
		return decodeTCP(name, &tcp)
	}
	out := &proxy.Listener{Authority: name, Protocol: proxy.TCP}
	if m.DefaultFilterChain != nil {
		l, err := chain(m.DefaultFilterChain)
		if err != nil {
			return nil, fmt.Errorf("default_filter_chain: %w", err)
		}
		out = l
	}
	for i, c := range m.FilterChains {
		l, err := chain(c)
		if err == nil && c.FilterChainMatch != nil {
			err = only(c.FilterChainMatch, "server_names")
		}
		names := c.GetFilterChainMatch().GetServerNames()
		if err == nil && len(names) == 0 {
			err = errors.New("filter_chain_match.server_names is empty")
		}
		if err == nil {
			err = bounded("filter_chain_match.server_names", len(names), maxRoutes)
		}
		if err != nil {
			return nil, fmt.Errorf("filter_chains[%d]: %w", i, err)
		}
		if len(l.Split) == 0 {
			l.Split = []proxy.Backend{{Cluster: l.Cluster, Weight: 1}}
		}
		out.SNI = append(out.SNI, proxy.SNIRoute{Name: c.Name, Hosts: names, Split: l.Split})
	}
	return out, nil
}

func decodeTCP(name string, m *tcpv3.TcpProxy) (*proxy.Listener, error) {
	l := &proxy.Listener{Authority: name, Protocol: proxy.TCP}
	switch c := m.ClusterSpecifier.(type) {
	case *tcpv3.TcpProxy_Cluster:
		if err := clusterName(c.Cluster); err != nil {
			return nil, fmt.Errorf("cluster: %w", err)
		}
		l.Cluster = c.Cluster
	case *tcpv3.TcpProxy_WeightedClusters:
		if err := bounded("weighted_clusters", len(c.WeightedClusters.Clusters), maxBackends); err != nil {
			return nil, err
		}
		for i, w := range c.WeightedClusters.Clusters {
			if err := clusterName(w.Name); err != nil {
				return nil, fmt.Errorf("weighted_clusters[%d].name: %w", i, err)
			}
			b := proxy.Backend{Cluster: w.Name, Weight: w.Weight}
			if w.Name == invalidCluster {
				b.DirectStatus = 500
			}
			l.Split = append(l.Split, b)
		}
	default:
		return nil, errors.New("neither cluster nor weighted_clusters is set")
	}
	return l, nil
}
