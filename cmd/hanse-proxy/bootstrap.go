package main

import (
	"encoding/json"
	"fmt"
	"path/filepath"

	"github.com/hanse-mesh/hanse/identity/agent"
	"github.com/hanse-mesh/hanse/identity/atomicfile"
)

// writeBootstrap writes gRPC's bootstrap file (gRFC A27, A29, A36, A65, A87) and, beside it, grpc.env with the environment that a
// program needs to use it.
func writeBootstrap(c *Config) error {
	files := map[string]string{
		"certificate_file":             filepath.Join(c.Agent.FilesDir, agent.FileSVID),
		"private_key_file":             filepath.Join(c.Agent.FilesDir, agent.FileKey),
		"ca_certificate_file":          filepath.Join(c.Agent.FilesDir, agent.FileBundle),
		"spiffe_trust_bundle_map_file": filepath.Join(c.Agent.FilesDir, agent.FileBundleMap),
		"refresh_interval":             "5s",
	}
	servers := make([]any, len(c.ControlPlane.XDS))
	for i, address := range c.ControlPlane.XDS {
		servers[i] = map[string]any{
			"server_uri":      address,
			"channel_creds":   []any{map[string]any{"type": "tls", "config": files}},
			"server_features": []string{"xds_v3"},
		}
	}
	b, err := json.MarshalIndent(map[string]any{
		"xds_servers": servers,
		"node": map[string]any{
			"id": c.NodeID, "cluster": c.Cluster,
			"locality": map[string]string{"region": c.Region, "zone": c.Zone},
			"metadata": map[string]string{"cluster": c.Cluster, "network": c.Network, "namespace": c.Namespace},
		},
		"certificate_providers":                  map[string]any{"spiffe": map[string]any{"plugin_name": "file_watcher", "config": files}},
		"server_listener_resource_name_template": "grpc/server?xds.resource.listening_address=%s",
	}, "", "  ")
	if err != nil {
		return fmt.Errorf("encode gRPC bootstrap: %w", err)
	}
	if err := atomicfile.MakeDir(filepath.Dir(c.Agent.Bootstrap)); err != nil {
		return fmt.Errorf("gRPC bootstrap: %w", err)
	}
	if err := atomicfile.Write(c.Agent.Bootstrap, append(b, '\n')); err != nil {
		return fmt.Errorf("gRPC bootstrap: %w", err)
	}
	env := fmt.Sprintf("GRPC_XDS_BOOTSTRAP=%s\nGRPC_EXPERIMENTAL_XDS_MTLS_SPIFFE=true\nGRPC_EXPERIMENTAL_XDS_SNI=true\n", c.Agent.Bootstrap)
	if c.Socket != none {
		env += "SPIFFE_ENDPOINT_SOCKET=unix://" + c.Socket + "\n"
	}
	if err := atomicfile.Write(filepath.Join(filepath.Dir(c.Agent.Bootstrap), "grpc.env"), []byte(env)); err != nil {
		return fmt.Errorf("gRPC environment: %w", err)
	}
	return nil
}
