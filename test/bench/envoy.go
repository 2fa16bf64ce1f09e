package main

import (
	"context"
	"fmt"
	"os"
	"strings"
)

// startEnvoy runs two Envoys with one worker each: automatic codec towards the client, HTTP/2 between both (which is what sidecars of
// meshes do), RBAC on the caller's name, access log, request IDs, statistics.
func startEnvoy(ctx context.Context, dir, binary string, to *backends) (*product, error) {
	if binary == "" {
		binary = "envoy"
		if _, err := os.Stat("bin/tools/envoy"); err == nil {
			binary = "bin/tools/envoy"
		}
	}
	config := func(c chain) [2]string {
		client := `
    transport_socket:
      name: tls
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
        sni: server
        max_session_keys: 0
        common_tls_context:` + envoyTLS("client", "server")
		server := `
    transport_socket:
      name: tls
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
        require_client_certificate: true
        disable_stateless_session_resumption: true
        common_tls_context:` + envoyTLS("server", "client")
		front := envoy{log: dir + "/0.access"}
		front.http("http", c.entry["http"], "", false)
		front.http("grpc", c.entry["grpc"], "", false)
		front.tcp("tcp", c.entry["tcp"], "", false)
		front.cluster("http", c.middle["http"], client, true)
		front.cluster("grpc", c.middle["grpc"], client, true)
		front.cluster("tcp", c.middle["tcp"], client, false)
		back := envoy{log: dir + "/1.access"}
		back.http("http", c.middle["http"], server, true)
		back.http("grpc", c.middle["grpc"], server, true)
		back.tcp("tcp", c.middle["tcp"], server, true)
		back.cluster("http", to.http, "", false)
		back.cluster("grpc", to.grpc, "", true)
		back.cluster("tcp", to.tcp, "", false)
		return [2]string{strings.ReplaceAll(front.yaml(), "DIR", dir), strings.ReplaceAll(back.yaml(), "DIR", dir)}
	}
	return two(ctx, "envoy", binary, dir, []string{"--version"}, config, func(i int, file string) []string {
		return []string{"-c", file, "--concurrency", "1", "--log-level", "warn", "--use-dynamic-base-id"}
	})
}

// envoyTLS goes on after "common_tls_context:".
func envoyTLS(own, peer string) string {
	return fmt.Sprintf(`
          tls_params: {tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_3}
          alpn_protocols: [h2]
          tls_certificates:
          - {certificate_chain: {filename: DIR/%[1]s.crt}, private_key: {filename: DIR/%[1]s.key}}
          validation_context:
            trusted_ca: {filename: DIR/ca.pem}
            match_typed_subject_alt_names:
            - {san_type: DNS, matcher: {exact: %[2]s}}`, own, peer)
}

// envoy gathers a static configuration.
type envoy struct {
	log                 string
	listeners, clusters strings.Builder
}

func hostPort(address string) string {
	host, port, _ := strings.Cut(address, ":")
	return fmt.Sprintf("{socket_address: {address: %s, port_value: %s}}", host, port)
}

const rbacRules = `rules: {action: ALLOW, policies: {caller: {permissions: [{any: true}], principals: [{authenticated: {principal_name: {exact: client}}}]}}}`

func (e *envoy) access() string {
	return fmt.Sprintf(`
        access_log:
        - name: file
          typed_config: {"@type": type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog, path: %s}`, e.log)
}

func (e *envoy) http(name, address, tls string, rbac bool) {
	filters := ""
	if rbac {
		filters = `
        - name: rbac
          typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC, ` + rbacRules + `}`
	}
	fmt.Fprintf(&e.listeners, `
- name: %[1]s
  address: %[2]s
  filter_chains:
  - filters:
    - name: hcm
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
        stat_prefix: %[1]s
        stream_idle_timeout: 0s%[3]s
        route_config:
          virtual_hosts:
          - name: all
            domains: ["*"]
            routes:
            - {match: {prefix: /}, route: {cluster: %[1]s, timeout: 0s}}
        http_filters:%[4]s
        - name: router
          typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}%[5]s
`, name, hostPort(address), e.access(), filters, tls)
}

func (e *envoy) tcp(name, address, tls string, rbac bool) {
	filters := ""
	if rbac {
		filters = `
    - name: rbac
      typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.network.rbac.v3.RBAC, stat_prefix: rbac, ` + rbacRules + `}`
	}
	fmt.Fprintf(&e.listeners, `
- name: %[1]s
  address: %[2]s
  filter_chains:
  - filters:%[4]s
    - name: tcp
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
        stat_prefix: %[1]s
        cluster: %[1]s%[3]s%[5]s
`, name, hostPort(address), e.access(), filters, tls)
}

func (e *envoy) cluster(name, address, tls string, h2 bool) {
	protocol := "http_protocol_options: {}"
	if h2 {
		protocol = "http2_protocol_options: {}"
	}
	fmt.Fprintf(&e.clusters, `
  - name: %[1]s
    connect_timeout: 5s
    type: STATIC
    circuit_breakers: {thresholds: [{max_connections: 100000, max_pending_requests: 100000, max_requests: 100000}]}
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {%[3]s}
    load_assignment:
      cluster_name: %[1]s
      endpoints: [{lb_endpoints: [{endpoint: {address: %[2]s}}]}]%[4]s
`, name, hostPort(address), protocol, tls)
}

func (e *envoy) yaml() string {
	return "static_resources:\n  listeners:" + strings.ReplaceAll(e.listeners.String(), "\n", "\n  ") + "\n  clusters:" + e.clusters.String()
}
