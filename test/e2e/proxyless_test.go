package e2e

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	xdscreds "google.golang.org/grpc/credentials/xds"
	_ "google.golang.org/grpc/xds" // the xds:/// resolver of unmodified grpc-go

	"github.com/hanse-mesh/hanse/cmd/echo/echopb"
)

// grpcTarget makes this test binary an unmodified grpc-go client: grpc reads its environment when the process starts.
const grpcTarget = "HANSE_E2E_GRPC_TARGET"

// grpcClient calls the target once and prints who answered. It is run by testMain in a process of its own.
func grpcClient(target string) int {
	creds, err := xdscreds.NewClientCredentials(xdscreds.ClientOptions{FallbackCreds: insecure.NewCredentials()})
	if err != nil {
		fmt.Println(err)
		return 1
	}
	conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(creds))
	if err != nil {
		fmt.Println(err)
		return 1
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	r, err := echopb.NewEchoClient(conn).Unary(ctx, &echopb.Request{Message: "hello"}, grpc.WaitForReady(true))
	if err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println(r.Message, r.Who.Cluster, r.Who.Caller)
	return 0
}

// TestProxylessGRPC: `hanse-proxy --role agent` gives an unmodified grpc-go client all that it needs to be a member: identity, trust and
// the address of the control plane. It then calls a workload behind a sidecar, with mutual TLS, and is refused where policy says so.
func TestProxylessGRPC(t *testing.T) {
	t.Parallel()
	l := newLab(t, shortTimers, "west")
	l.up()
	west := l.cluster("west")
	l.save(filepath.Join(west.Dir, "grpc-mesh.yaml"), fmt.Sprintf(`
apiVersion: v1
kind: Service
metadata: {namespace: shop, name: ledger}
spec: {ports: [{name: grpc, port: 8080}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  namespace: shop
  name: ledger
  labels: {kubernetes.io/service-name: ledger}
  annotations: {hanse.mesh/service-account: payments}
addressType: IPv4
ports: [{name: grpc, port: 8080}]
endpoints: [{addresses: [%s], zone: eu-1a}]
---
apiVersion: hanse.mesh/v1alpha1
kind: AccessPolicy
metadata: {namespace: shop, name: ledger}
spec:
  targetRefs: [{kind: Service, name: ledger}]
  rules: [{from: ["spiffe://west.test/ns/shop/sa/batch"]}]
`, west.workload("pay-b").IP))
	// payments in zone b becomes ledger alone, so that its port speaks gRPC.
	l.kill("west/pay-b", "west/pay-b-app")
	l.must("west", "", "delete", "endpointslice", "pay-b", "-n", "shop")
	l.must("west", "", "apply", "-f", filepath.Join(west.Dir, "grpc-mesh.yaml"))
	l.start("west/pay-b-app")
	l.start("west/pay-b")
	l.ready("west/pay-b", west.workload("pay-b").Admin)

	client := func(account string) (string, error) {
		dir := filepath.Join(west.Dir, account)
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		l.save(filepath.Join(west.Dir, account+".token"), l.must("west", "", "token", "create", "--agent", "shop/"+account))
		config := filepath.Join(west.Dir, account+".yaml")
		host := strings.TrimSuffix(west.GatewayIP, "9") + map[string]string{"batch": "31", "cron": "32"}[account]
		l.save(config, fmt.Sprintf(`role: agent
cluster: west
trustDomain: west.test
region: eu-1
zone: eu-1a
namespace: shop
controlPlane: {identity: ["%s"], xds: ["%s"], trustBundle: bundle.json, tokenFile: %s.token}
stateDir: %s/state
agent: {filesDir: %s/files}
admin: {listen: "%s:15020"}
`, west.Identity, west.XDS, account, account, account, host))
		l.start("west/"+account, "hanse-proxy", "--config", config)
		l.ready("west/"+account, host+":15020")
		var env []string
		f, err := os.Open(filepath.Join(dir, "files", "grpc.env"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for s := bufio.NewScanner(f); s.Scan(); {
			env = append(env, s.Text())
		}
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		cmd := exec.CommandContext(ctx, os.Args[0])
		cmd.Env = append(append(os.Environ(), env...), grpcTarget+"=xds:///ledger.shop.svc.clusterset.local:8080")
		out, err := cmd.CombinedOutput()
		return strings.TrimSpace(string(out)), err
	}
	if out, err := client("batch"); err != nil || out != "hello west spiffe://west.test/ns/shop/sa/batch" {
		t.Errorf("an allowed grpc-go client: %q, %v", out, err)
	}
	if out, err := client("cron"); err == nil || !strings.Contains(out, "PermissionDenied") {
		t.Errorf("a grpc-go client that no policy allows: %q, %v", out, err)
	}
}
