package main

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/hanse-mesh/hanse/cmd/internal/chart"
)

// What the chart writes for gateways is a configuration that hanse-proxy takes.
func TestChartsGateway(t *testing.T) {
	values, err := chart.Merge(nil, []string{"cluster=west", "trustDomain=west.example", "region=eu-1", "identity.proxyKeys.curve=P-384"})
	if err != nil {
		t.Fatal(err)
	}
	all, err := chart.Objects(chart.Options{Values: values})
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(all, func(o *unstructured.Unstructured) bool {
		return o.GetKind() == "ConfigMap" && o.GetName() == "hanse-gateway"
	})
	text, _, _ := unstructured.NestedString(all[i].Object, "data", "hanse-proxy.yaml")
	file := filepath.Join(t.TempDir(), "hanse-proxy.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := LoadConfig(file, "", "")
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	if c.Role != roleGateway || c.Health.Listen != ":15021" || c.Network != "west" || c.Region != "eu-1" || c.ControlPlane.PodToken == "" || c.Socket != none || c.Keys.Curve != "P-384" {
		t.Errorf("configuration %s", text)
	}
}
