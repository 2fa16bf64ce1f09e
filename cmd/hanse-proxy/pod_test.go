package main

import (
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/hanse-mesh/hanse/discovery/kube/inject"
)

// TestInjectedConfiguration: what the injector writes, with every setting, is a configuration, once the pod tells what it alone knows.
func TestInjectedConfiguration(t *testing.T) {
	v := inject.Values{Cluster: "west", TrustDomain: "west.demo", Image: "x"}
	if err := v.Complete(); err != nil {
		t.Fatal(err)
	}
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
		if w := c.Workloads[0]; w.Address != "10.244.1.7" || w.Listen != "10.244.1.7:15008" || !w.AnyPort || c.Zone != "eu-1a" || c.NodeID != "sidecar/west/shop/app-1" || c.Namespace != "shop" {
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

func TestGateways(t *testing.T) {
	got := gateways("Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"+
		"eth0\t00000000\t0101F40A\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"+
		"eth0\t0000F40A\t0101F40A\t0003\t0\t0\t0\t0000FFFF\t0\t0\t0\n",
		"fd000000000000000000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 00000001 00000000 00000001     eth0\n"+
			"00000000000000000000000000000000 00 00000000000000000000000000000000 00 fd000000000000000000000000000002 00000400 00000001 00000000 00000003     eth0\n")
	want := []netip.Addr{netip.MustParseAddr("10.244.1.1"), netip.MustParseAddr("fd00::2")}
	if binary.NativeEndian.Uint16([]byte{1, 0}) == 1 && !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

func TestHealthConfig(t *testing.T) {
	c := &Config{Role: roleSidecar, Health: Health{Checks: map[string]Check{"/a": {}, "b": {TCP: &TCPCheck{Port: 1}}, "/c": {HTTP: &HTTPCheck{Port: 1, Path: "x"}}, "/d": {TCP: &TCPCheck{Port: 1}, GRPC: &GRPCCheck{Port: 1}}, "/readyz": {TCP: &TCPCheck{Port: 1}}}}}
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

// TestChecks: the application is asked as the kubelet would have, and its own answer counts.
func TestChecks(t *testing.T) {
	app := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/moved":
			http.Redirect(w, r, "/away", http.StatusFound)
		case r.URL.Path == "/ill":
			http.Error(w, "ill", http.StatusInternalServerError)
		case r.Host != "app.example" || r.Header.Get("X-A") != "b" || r.UserAgent() != "kube-probe/1.36":
			http.Error(w, "not as asked", http.StatusTeapot)
		}
	}))
	defer app.Close()
	port := netip.MustParseAddrPort(app.Listener.Addr().String()).Port()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv, book := grpc.NewServer(), health.NewServer()
	grpc_health_v1.RegisterHealthServer(srv, book)
	book.SetServingStatus("well", grpc_health_v1.HealthCheckResponse_SERVING)
	book.SetServingStatus("ill", grpc_health_v1.HealthCheckResponse_NOT_SERVING)
	go func() { _ = srv.Serve(ln) }()
	defer srv.Stop()
	grpcPort := netip.MustParseAddrPort(ln.Addr().String()).Port()
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	none := netip.MustParseAddrPort(closed.Addr().String()).Port()
	_ = closed.Close()
	headers := [][2]string{{"Host", "app.example"}, {"X-A", "b"}}
	ready := errors.New("not yet")
	k := &checker{at: netip.MustParseAddr("127.0.0.1"), ready: func() error { return ready }, dial: (&net.Dialer{}).DialContext, log: slog.New(slog.DiscardHandler), cfg: Health{Checks: map[string]Check{
		"/well": {HTTP: &HTTPCheck{Port: port, Path: "/", Headers: headers}}, "/plain": {HTTP: &HTTPCheck{Port: port, Path: "/"}}, "/ill": {HTTP: &HTTPCheck{Port: port, Path: "/ill", Headers: headers}},
		"/moved": {HTTP: &HTTPCheck{Port: port, Path: "/moved"}}, "/gone": {HTTP: &HTTPCheck{Port: none, Path: "/"}}, "/tcp": {TCP: &TCPCheck{Port: port}}, "/notcp": {TCP: &TCPCheck{Port: none}},
		"/grpc": {GRPC: &GRPCCheck{Port: grpcPort, Service: "well"}}, "/illgrpc": {GRPC: &GRPCCheck{Port: grpcPort, Service: "ill"}}, "/strange": {GRPC: &GRPCCheck{Port: grpcPort, Service: "?"}}}}}
	ask := func(method, path string) int {
		r := httptest.NewRequest(method, path, nil)
		r.Header.Set("User-Agent", "kube-probe/1.36")
		r.RemoteAddr = "203.0.113.77:40000"
		w := httptest.NewRecorder()
		k.ServeHTTP(w, r.WithContext(context.Background()))
		return w.Code
	}
	for path, want := range map[string]int{"/well": 200, "/plain": 418, "/ill": 500, "/moved": 302, "/gone": 503, "/tcp": 200, "/notcp": 503, "/grpc": 200, "/illgrpc": 503, "/strange": 503, "/other": 404, "/readyz": 503} {
		if got := ask("GET", path); got != want {
			t.Errorf("%s: %d, want %d", path, got, want)
		}
	}
	k.cfg.Checks["/hook"] = Check{HTTP: &HTTPCheck{Port: port, Path: "/moved"}, Hook: true}
	if got := ask("GET", "/hook"); got != 403 {
		t.Errorf("a hook called by anybody: %d", got)
	}
	k.cfg.node = "203.0.113.77"
	if got := ask("GET", "/hook"); got != 302 {
		t.Errorf("a hook called from the node: %d", got)
	}
	if ready = nil; ask("GET", "/readyz") != 200 || ask("POST", "/well") != 405 {
		t.Error("ready is not told, or POST is taken")
	}
}
