package kube

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// hansed is the real program, with an API server as its source.
type hansed struct {
	t        testing.TB
	dir, bin string
	identity string // its address for agents
	xds      string
	admin    string // its port for metrics and profiles
	webhook  string // its address
	cmd      *exec.Cmd
	log      string
}

// newHansed runs hansed beside s until the test ends.
func newHansed(t testing.TB, s *server) *hansed {
	t.Helper()
	dir, err := os.MkdirTemp("", "hk") // short: Unix sockets' paths are
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	ports := freePorts(t, 5)
	webhook := freePortsAt(t, "127.0.0.1", 1)[0] // as "localhost", which its certificate names
	h := &hansed{t: t, dir: dir, bin: t.TempDir(), identity: ports[1], xds: ports[2], admin: ports[4], webhook: webhook, log: filepath.Join(dir, "log")}
	build := exec.Command("go", "build", "-trimpath", "-o", h.bin+"/", "../../cmd/hanse", "../../cmd/hansed", "../../cmd/hanse-proxy")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	h.write("kubeconfig", fmt.Sprintf(`
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: %q, certificate-authority: %q}}]
users: [{name: u, user: {token: admintoken}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
current-context: x
`, s.config.Host, s.config.CAFile))
	config := h.write("hansed.yaml", fmt.Sprintf(`
cluster: west
trustDomain: west.demo
mesh: demo
region: eu-1
dataDir: data
socket: hansed.sock
kubeAPI: {enabled: true, kubeconfig: kubeconfig, webhook: {listen: %q, inject: {image: "hanse-proxy:test"}}}
federation: {listen: %q}
identity: {listen: %q}
xds: {listen: %q}
bundleEndpoint: {listen: %q}
admin: {listen: %q}
`, h.webhook, ports[0], ports[1], ports[2], ports[3], ports[4]))
	h.cmd = h.start("hansed", h.log, "--config", config)
	return h
}

func (h *hansed) write(name, text string) string {
	path := filepath.Join(h.dir, name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		h.t.Fatal(err)
	}
	return path
}

// start runs a program until the test ends, and shows the end of its log if that failed.
func (h *hansed) start(program, log string, args ...string) *exec.Cmd {
	h.t.Helper()
	out, err := os.Create(log)
	if err != nil {
		h.t.Fatal(err)
	}
	defer out.Close()
	cmd := exec.Command(filepath.Join(h.bin, program), args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = h.dir, out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
		if h.t.Failed() {
			b, _ := os.ReadFile(log)
			h.t.Logf("%s:\n%s", program, b[max(0, len(b)-6000):])
		}
	})
	return cmd
}

func (h *hansed) hanse(args ...string) string {
	out, _ := exec.Command(filepath.Join(h.bin, "hanse"), append([]string{"--socket", filepath.Join(h.dir, "hansed.sock")}, args...)...).CombinedOutput()
	return string(out)
}

// TestHansed: a Service that is exported is in the mesh, its ServiceImport in the API server until it is exported no longer.
func TestHansed(t *testing.T) {
	t.Parallel()
	s := start(t)
	s.crds(filepath.Join(module(t, "sigs.k8s.io/mcs-api"), "config/crd"), "serviceexports", "serviceimports")
	s.apply([]byte(shop))
	hanse := newHansed(t, s).hanse
	until(t, "hansed knows the Service", func() bool { return strings.Contains(hanse("get", "services"), "payments") })
	var o []struct{ Source string }
	if err := json.Unmarshal([]byte(hanse("get", "services", "payments", "--namespace", "shop", "-o", "json")), &o); err == nil && len(o) == 1 && o[0].Source != "Kubernetes" {
		t.Errorf("it comes from %q", o[0].Source)
	}
	began := time.Now()
	s.apply([]byte("apiVersion: multicluster.x-k8s.io/v1beta1\nkind: ServiceExport\nmetadata: {name: payments, namespace: shop}\n"))
	until(t, "the import is ready", func() bool {
		status, _ := condition(s.get(imports, "shop", "payments"), "Ready")
		return status == "True"
	})
	t.Logf("ServiceExport → ServiceImport ready in %.2f s", time.Since(began).Seconds())
	until(t, "the export says so", func() bool {
		status, _ := condition(s.get(exports, "shop", "payments"), "Ready")
		return status == "True"
	})
	s.delete(exports, "shop", "payments")
	until(t, "the import is gone", func() bool { return s.get(imports, "shop", "payments") == nil })
}
