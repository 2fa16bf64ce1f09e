package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/hanse-mesh/hanse/cmd/internal/chart"
)

// What the chart writes is a configuration that hansed takes, whatever is chosen.
func TestChartsConfiguration(t *testing.T) {
	for name, sets := range map[string][]string{
		"default":   nil,
		"bare":      {"webhooks.enabled=false", "gateway.enabled=false"},
		"replicas":  {"hansed.replicas=3", "etcd.endpoints={https://etcd-0:2379}", "etcd.tlsSecret=etcd"},
		"addresses": {"federation.advertise={west.example:7443}", "gateway.addresses={gw.example:15443,192.0.2.9:15443}", "region=eu-1", "network=flat", "labels.tier=gold"},
		"keys":      {"identity.keys.curve=P-384", "identity.keys.storage=memory", "identity.proxyKeys.curve=P-384", "hansed.config.identity.upstream.dir=/ca"},
		"spire":     {"identity.spire.server=spire-server.spire-server:8081"},
		"spire-dir": {"identity.spire.server=spire-server.spire-server:8081", "identity.spire.hostPath=/run/spire/agent-sockets", "identity.spire.socket=api.sock"},
		"more":      {"hansed.config.timers.suspect=30s", "hansed.config.kubeAPI.webhook.inject.logLevel=debug"},
	} {
		t.Run(name, func(t *testing.T) {
			values, err := chart.Merge(nil, append([]string{"cluster=west", "trustDomain=west.example"}, sets...))
			if err != nil {
				t.Fatal(err)
			}
			all, err := chart.Objects(chart.Options{Values: values, Namespace: "elsewhere"})
			if err != nil {
				t.Fatal(err)
			}
			i := slices.IndexFunc(all, func(o *unstructured.Unstructured) bool { return o.GetKind() == "ConfigMap" && o.GetName() == "hansed" })
			text, _, _ := unstructured.NestedString(all[i].Object, "data", "hansed.yaml")
			file := filepath.Join(t.TempDir(), "hansed.yaml")
			if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			c, err := LoadConfig(file)
			if err != nil {
				t.Fatalf("%v\n%s", err, text)
			}
			gateways := []string{"elsewhere:hanse-gateway"}
			if strings.HasPrefix(name, "spire") {
				gateways = nil
			}
			if c.Cluster != "west" || !c.KubeAPI.Enabled || !slices.Equal(c.Identity.Kubernetes.Gateways, gateways) || c.Health.Listen == "" {
				t.Errorf("configuration %s", text)
			}
			switch name {
			case "default":
				w := c.KubeAPI.Webhook
				if w.Service != "hansed.elsewhere" || w.Inject.Image != "hanse.mesh/hanse-proxy:v0.1.0" || !slices.Equal(w.Inject.XDS, []string{"hansed.elsewhere.svc:7445"}) ||
					c.KubeAPI.GatewayService != "elsewhere/hanse-gateway" || c.KubeAPI.FederationService != "elsewhere/hanse-federation" {
					t.Errorf("configuration %s", text)
				}
				if k := c.Identity.Keys; k.Curve != "P-256" || k.Storage != "disk" || w.Inject.KeyCurve != "P-256" {
					t.Errorf("configuration %s", text)
				}
			case "keys":
				if k := c.Identity.Keys; k.Curve != "P-384" || k.Storage != "memory" || c.KubeAPI.Webhook.Inject.KeyCurve != "P-384" {
					t.Errorf("configuration %s", text)
				}
			case "spire":
				if s, v := c.Identity.SPIRE, c.KubeAPI.Webhook.Inject.SPIRE; s.BundleEndpoint != "hansed.elsewhere.svc:7446" || s.Gateways[0].Selectors[0] != "k8s:ns:elsewhere" || v.CSIDriver != "csi.spiffe.io" || v.HostPath != "" {
					t.Errorf("configuration %s", text)
				}
			case "spire-dir":
				if s, v := c.Identity.SPIRE, c.KubeAPI.Webhook.Inject.SPIRE; s.WorkloadAPI != "unix:///run/hanse-workload-api/api.sock" || v.CSIDriver != "" || v.HostPath != "/run/spire/agent-sockets" || v.Socket != "api.sock" {
					t.Errorf("configuration %s", text)
				}
			case "bare":
				if c.KubeAPI.Webhook.Listen != "" || c.KubeAPI.GatewayService != "" {
					t.Errorf("configuration %s", text)
				}
			case "addresses":
				if c.KubeAPI.FederationService != "" || c.Network != "flat" || len(c.Gateways) != 2 {
					t.Errorf("configuration %s", text)
				}
			case "more":
				if c.Timers.Suspect.Seconds() != 30 || c.KubeAPI.Webhook.Inject.LogLevel != "debug" || !strings.Contains(c.KubeAPI.Webhook.Inject.Image, "hanse-proxy") {
					t.Errorf("values are not merged: %s", text)
				}
			}
		})
	}
}
