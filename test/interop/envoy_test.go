package interop

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/hanse-mesh/hanse/test/netns"
)

// An Envoy of each side, configured as docs/workload-api.md says. Each call has a TLS connection of its own.
const (
	sdsYAML = `
  - name: hanse
    typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {"@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, explicit_http_config: {http2_protocol_options: {}}}}
    load_assignment: {cluster_name: hanse, endpoints: [{lb_endpoints: [{endpoint: {address: {pipe: {path: "{SOCKET}"}}}}]}]}
`
	tlsYAML = `
      "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.{SIDE}TlsContext
      common_tls_context:
        tls_certificate_sds_secret_configs: [{name: default, sds_config: &{NAME} {resource_api_version: V3, api_config_source: {api_type: GRPC, transport_api_version: V3, grpc_services: [{envoy_grpc: {cluster_name: hanse}}]}}}]
        combined_validation_context:
          default_validation_context:
            match_typed_subject_alt_names: [{san_type: URI, matcher: {exact: "{PEER}"}}]
          validation_context_sds_secret_config: {name: "{TRUST}", sds_config: *{NAME}}
`
	httpYAML = `
  - name: {NAME}
    address: {socket_address: {address: "{IP}", port_value: {PORT}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: {NAME}
          route_config:
            virtual_hosts:
            - {name: all, domains: ["*"], routes: [{match: {prefix: /}, {ACTION}}]}
          http_filters: [{name: envoy.filters.http.router, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}]
`
)

// envoyTrusts are the names by which east's Envoy is told whom to trust, and whether that includes west.
var envoyTrusts = []struct {
	name string
	west bool
}{{"ALL", true}, {"spiffe://west.test", true}, {"ROOTCA", false}, {"spiffe://north.test", false}}

// envoys starts both and returns how to call: west's Envoy calls east's, which says who called and by which certificate.
func (l *lab) envoys(sockets map[string]string) (call func(i int) (string, error)) {
	fill := func(text string, replace ...string) string { return strings.NewReplacer(replace...).Replace(text) }
	var fronts, clusters, backs string
	for i, trust := range envoyTrusts {
		name, port := fmt.Sprint("t", i), fmt.Sprint(8440+i)
		fronts += fill(httpYAML, "{NAME}", name, "{IP}", ips["west"], "{PORT}", port, "{ACTION}", "route: {cluster: "+name+"}")
		clusters += fill(`
  - name: {NAME}
    typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {"@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, common_http_protocol_options: {max_requests_per_connection: 1}, explicit_http_config: {http_protocol_options: {}}}}
    load_assignment: {cluster_name: {NAME}, endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: "{IP}", port_value: {PORT}}}}}]}]}
    transport_socket:
      name: envoy.transport_sockets.tls
      typed_config:`, "{NAME}", name, "{IP}", ips["east"], "{PORT}", port) +
			strings.ReplaceAll(fill(tlsYAML, "{SIDE}", "Upstream", "{NAME}", name, "{TRUST}", "ALL", "{PEER}", "spiffe://east.test/ns/shop/sa/server"), "\n", "\n  ")
		backs += fill(httpYAML, "{NAME}", name, "{IP}", ips["east"], "{PORT}", port, "{ACTION}",
			`direct_response: {status: 200}, response_headers_to_add: [{header: {key: peer, value: "%DOWNSTREAM_PEER_URI_SAN% %DOWNSTREAM_PEER_SERIAL%"}}]`) + `
      transport_socket:
        name: envoy.transport_sockets.tls
        typed_config:` + strings.ReplaceAll(fill(tlsYAML, "{SIDE}", "Downstream", "{NAME}", name, "{TRUST}", trust.name, "{PEER}", "spiffe://west.test/ns/shop/sa/client")+
			"      require_client_certificate: true\n", "\n", "\n    ")
	}
	for cluster, config := range map[string]string{
		"west": "node: {id: west, cluster: west}\nstatic_resources:\n  listeners:" + fronts + "  clusters:" + clusters + "\n" + sdsYAML,
		"east": "node: {id: east, cluster: east}\nstatic_resources:\n  listeners:" + backs + "\n  clusters:" + sdsYAML,
	} {
		l.save(l.path(cluster, "envoy.yaml"), fill(config, "{SOCKET}", sockets[cluster]))
		l.run(l.core, cluster+"-envoy", "envoy", "--disable-hot-restart", "--concurrency", "1", "--log-level", "warn", "-c", l.path(cluster, "envoy.yaml"))
	}
	client := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
		return l.core.Dial(ctx, nil, network, address)
	}}}
	l.stop = append(l.stop, client.CloseIdleConnections)
	return func(i int) (string, error) {
		resp, err := client.Get(fmt.Sprintf("http://%s:%d/", ips["west"], 8440+i))
		if err != nil {
			return "", err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
		if err == nil && resp.StatusCode != http.StatusOK {
			err = fmt.Errorf("%s: %s", resp.Status, body)
		}
		return resp.Header.Get("peer"), err
	}
}

// TestEnvoy is two unmodified Envoys, each with the identity of a workload of another trust domain, by SDS from the Workload API's socket: mutual
// TLS between them, over renewals and a rotation without a failed call, until the one trust domain distrusts the other.
func TestEnvoy(t *testing.T) {
	need(t, "HANSE_WITHOUT_ENVOY", "make bin/tools/envoy", program("envoy"))
	netns.Test(t, func(t *testing.T) {
		l := newLab(t, shortLives)
		call := l.envoys(l.agents())
		const client = "spiffe://west.test/ns/shop/sa/client "
		l.eventually(20*time.Second, "west calls east", func() error {
			for i, trust := range envoyTrusts {
				if _, err := call(i); trust.west && err != nil {
					return fmt.Errorf("%s: %w", trust.name, err)
				}
			}
			return nil
		})
		serials := map[string]bool{}
		calls := func(what string, until func() bool) {
			t.Helper()
			for deadline, n := time.Now().Add(time.Minute), 0; !until(); n++ {
				if time.Now().After(deadline) {
					t.Fatalf("%s: not within a minute, %d calls", what, n)
				}
				for i, trust := range envoyTrusts {
					peer, err := call(i)
					serial, ours := strings.CutPrefix(peer, client)
					if trust.west != (err == nil) || trust.west && !ours {
						t.Fatalf("%s, who trusts %s: %q, %v", what, trust.name, peer, err)
					}
					if !trust.west && !strings.Contains(err.Error(), "503") {
						t.Fatalf("%s, who trusts %s, refuses: %v", what, trust.name, err)
					}
					if ours {
						serials[serial] = true
					}
				}
				time.Sleep(20 * time.Millisecond)
			}
		}
		calls("over a renewal", func() bool { return len(serials) > 1 })
		rotated := make(chan struct{})
		go func() { l.hanse("west", "", "trust", "rotate"); close(rotated) }()
		calls("over a rotation", func() bool {
			select {
			case <-rotated:
				return true
			default:
				return false
			}
		})
		before := len(serials)
		calls("after a rotation", func() bool { return len(serials) > before+1 })

		l.hanse("east", "", "trust", "distrust", "west.test", "--yes")
		l.eventually(20*time.Second, "east refuses west", func() error {
			for i, trust := range envoyTrusts {
				if peer, err := call(i); err == nil {
					return fmt.Errorf("%s: %s is answered", trust.name, peer)
				}
			}
			return nil
		})
		l.hanse("east", "", "trust", "distrust", "west.test", "--undo")
		l.eventually(20*time.Second, "east trusts west again", func() error { _, err := call(1); return err })
		for _, cluster := range []string{"west", "east"} {
			b, err := os.ReadFile(l.dir + "/" + cluster + "-envoy.log")
			if must(t, err); strings.Contains(string(b), "rejected") {
				t.Errorf("%s's Envoy has refused a secret: %s", cluster, b)
			}
		}
	})
}
