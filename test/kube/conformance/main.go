//go:build linux

// Command conformance runs the Gateway API's conformance suite, unmodified, against Hanse as its chart installs it, in a cluster of its own (test/kube/lab), and writes the suite's report.
// `make conformance-gateway` runs it where KUBECONFIG names no cluster.
package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"flag"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/hanse-mesh/hanse/deploy/oci"
	"github.com/hanse-mesh/hanse/test/kube/lab"
)

// echoImage is what the suite's pods run.
const echoImage = "registry.k8s.io/gateway-api/echo-advanced:v1.5.1"

func main() {
	bin := flag.String("bin", "bin", "directory of hanse, tools and images")
	version := flag.String("version", "v0.1.0", "of the images")
	report := flag.String("report", "docs/conformance/report.yaml", "where the suite's report goes")
	only := flag.String("run-test", "", "one test of the suite; then there is no report")
	flag.Parse()
	dir := filepath.Join(os.TempDir(), "hanse-conformance")
	if err := lab.Needs(filepath.Join(*bin, "tools")); err != nil {
		fail(1, err)
	}
	code, inside, err := lab.Enter("")
	if err != nil || !inside {
		fail(code, err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	began := time.Now()
	say := func(format string, args ...any) {
		fmt.Fprintf(os.Stderr, "%6.1fs %s\n", time.Since(began).Seconds(), fmt.Sprintf(format, args...))
	}
	if err := run(ctx, *bin, dir, *version, *report, *only, say); err != nil {
		fail(1, err)
	}
	os.Exit(0)
}

func fail(code int, err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "conformance:", err)
		code = max(code, 1)
	}
	os.Exit(code)
}

func run(ctx context.Context, bin, dir, version, report, only string, say func(string, ...any)) error {
	echo := filepath.Join(bin, "images", "echo-advanced.tar")
	if err := packEcho(filepath.Join(bin, "tools"), echo); err != nil {
		return err
	}
	images := []string{echo}
	for _, name := range []string{"pause", "hansed", "hanse-proxy"} {
		images = append(images, filepath.Join(bin, "images", name+".tar"))
	}
	l, err := lab.Up(ctx, lab.Config{Clusters: []string{"gw"}, Tools: filepath.Join(bin, "tools"), Images: images, Pause: "hanse.mesh/pause:" + version, Dir: dir, Log: os.Stderr})
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir) // it has an administrator's token
	defer l.Down()
	c := l.Clusters["gw"]
	say("cluster up")
	module, err := exec.CommandContext(ctx, "go", "-C", "test/kube/gateway", "list", "-m", "-f", "{{.Dir}}", "sigs.k8s.io/gateway-api").Output()
	if err != nil {
		return fmt.Errorf("the Gateway API's module: %w", err)
	}
	if _, err := c.Kubectl(ctx, "apply", "--server-side", "-f", filepath.Join(strings.TrimSpace(string(module)), "config/crd/standard")); err != nil {
		return err
	}
	install := c.Command(ctx, filepath.Join(bin, "hanse"), "install", "--set", "cluster=gw", "--set", "trustDomain=gw.example", "--set", "hansed.persistence.enabled=false", "--set", "gateway.enabled=false",
		"--set", "federation.service.type=ClusterIP", "--image-tag", version)
	if out, err := install.CombinedOutput(); err != nil {
		return fmt.Errorf("%w\n%s", err, out)
	}
	say("Hanse installed")
	absolute, err := filepath.Abs(report)
	if err != nil {
		return err
	}
	args := []string{"-test.v", "-test.timeout=20m", "-test.run=TestGatewayConformance", "-conformance-options-file=test/kube/gateway/options.yaml"}
	if only == "" {
		args = append(args, "-report-output="+absolute)
	} else {
		args = append(args, "-run-test="+only)
	}
	b, err := c.Command(ctx, filepath.Join(bin, "tools", "gateway-conformance"), args...).CombinedOutput()
	out := string(b)
	for line := range strings.Lines(out) {
		if err != nil || strings.HasPrefix(line, "    --- PASS") || strings.HasPrefix(line, "    --- FAIL") {
			fmt.Print(line)
		}
	}
	if err != nil {
		pods, _ := c.Kubectl(context.WithoutCancel(ctx), "get", "pods", "-A", "-o", "wide")
		return fmt.Errorf("the suite: %w\n%s", err, pods)
	}
	passed := strings.Count(out, "    --- PASS: TestGatewayConformance/Mesh") - strings.Count(out, "        --- PASS: TestGatewayConformance/Mesh")
	say("%d mesh tests passed, none failed", passed)
	return nil
}

// packEcho packs Istio's echo application as the suite's image has it.
func packEcho(tools, file string) error {
	m := oci.Image{Name: echoImage, Arch: runtime.GOARCH, Entrypoint: "/usr/local/bin/server", Files: map[string][]byte{}}
	for _, name := range []string{"server", "client"} {
		b, err := os.ReadFile(filepath.Join(tools, "gateway-echo", name))
		if err != nil {
			return err
		}
		m.Files["/usr/local/bin/"+name] = b
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "echo"}, DNSNames: []string{"echo"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	m.Files["/cert.crt"] = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	m.Files["/cert.key"] = pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})
	return m.Write(file)
}
