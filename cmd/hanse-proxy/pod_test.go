package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/hanse-mesh/hanse/discovery/kube/inject"
	"github.com/hanse-mesh/hanse/proxy/probe"
)

// TestInjectedConfiguration: what the injector writes, with every setting, is a configuration, once the pod tells what it alone knows.
func TestInjectedConfiguration(t *testing.T) {
	own := inject.Values{Cluster: "west", TrustDomain: "west.demo", Image: "x", KeyCurve: "P-384"}
	onSPIRE := inject.Values{Cluster: "west", TrustDomain: "west.demo", Image: "x", SPIRE: inject.SPIRE{CSIDriver: "csi.spiffe.io"}}
	for _, v := range []*inject.Values{&own, &onSPIRE} {
		if err := v.Complete(); err != nil {
			t.Fatal(err)
		}
		testInjected(t, v)
	}
}

func testInjected(t *testing.T, v *inject.Values) {
	for name, annotations := range map[string]map[string]string{"plain": nil, "all": {
		"hanse.mesh/proxy-log-level": "debug", "hanse.mesh/capture-inbound-mode": "permissive", "hanse.mesh/capture-exempt-ports": "9100",
		"hanse.mesh/capture-exclude-outbound-ports": "3306,9000-9100", "hanse.mesh/capture-exclude-inbound-ports": "7000", "hanse.mesh/capture-exclude-outbound-cidrs": "10.9.0.0/16", "hanse.mesh/workload-api": "true"}} {
		meta := &metav1.ObjectMeta{Annotations: annotations}
		spec := &corev1.PodSpec{Containers: []corev1.Container{{Name: "app", LivenessProbe: &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Port: intstr.FromInt32(80)}}},
			StartupProbe: &corev1.Probe{ProbeHandler: corev1.ProbeHandler{GRPC: &corev1.GRPCAction{Port: 81}}}}}}
		if err := v.Pod(meta, spec); err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(t.TempDir(), "hanse-proxy.yaml")
		if err := os.WriteFile(file, []byte(meta.Annotations["hanse.mesh/proxy-config"]), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := LoadConfig(file, "", ""); err == nil || !strings.Contains(err.Error(), "workloads[0].address") || !strings.Contains(err.Error(), "namespace") {
			t.Errorf("%s: outside a pod: %v", name, err)
		}
		for k, val := range map[string]string{envPodIP: "10.244.1.7", envPodNamespace: "shop", envPodName: "app-1", envRegion: "eu-1", envZone: "eu-1a"} {
			t.Setenv(k, val)
		}
		c, err := LoadConfig(file, "", "")
		if err != nil {
			t.Fatalf("%s: %v\n%s", name, err, meta.Annotations["hanse.mesh/proxy-config"])
		}
		if w := c.Workloads[0]; w.Address != "10.244.1.7" || w.Listen != "10.244.1.7:15008" || !w.AnyPort || c.Zone != "eu-1a" || c.NodeID != "sidecar/west/shop/app-1" || c.Namespace != "shop" || c.Keys.Curve != map[bool]string{false: "P-384"}[v.SPIRE.Used()] || (c.ControlPlane.WorkloadAPI != "") != v.SPIRE.Used() {
			t.Errorf("%s: %+v, zone %s, node %s", name, w, c.Zone, c.NodeID)
		}
		own := c.rules(func(field, format string, args ...any) { t.Errorf("%s: "+format, append([]any{field}, args...)...) }, false).OwnPorts
		for _, want := range []uint16{15008, 15020, 15021} {
			if !slices.Contains(own, want) {
				t.Errorf("%s: port %d is captured", name, want)
			}
		}
		for _, k := range []string{envPodIP, envPodNamespace, envPodName, envRegion, envZone} {
			t.Setenv(k, "")
		}
	}
}

func TestHealthConfig(t *testing.T) {
	c := &Config{Role: roleSidecar, Health: Health{Checks: map[string]probe.Check{"/a": {}, "b": {TCP: &probe.TCP{Port: 1}}, "/c": {HTTP: &probe.HTTP{Port: 1, Path: "x"}}, "/d": {TCP: &probe.TCP{Port: 1}, GRPC: &probe.GRPC{Port: 1}}, "/readyz": {TCP: &probe.TCP{Port: 1}}}}}
	faults := map[string]bool{}
	bad := func(field, _ string, _ ...any) { faults[field] = true }
	c.validateHealth(bad)
	c.Health.Listen = "15021"
	c.validateHealth(bad)
	for _, want := range []string{"health.listen", "health", "health.checks[/a]", "health.checks[b]", "health.checks[/c].http.path", "health.checks[/d]", "health.checks[/readyz]"} {
		if !faults[want] {
			t.Errorf("%s is not found wrong", want)
		}
	}
}
