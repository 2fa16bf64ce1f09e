package e2e

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const multiYAML = `
apiVersion: v1
kind: Service
metadata: {namespace: shop, name: multi}
spec:
  ports:
  - {name: http, port: 8080}
  - {name: http2, port: 8081}
  - {name: grpc, port: 8082}
  - {name: tcp, port: 8083}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  namespace: shop
  name: multi
  labels: {kubernetes.io/service-name: multi}
  annotations: {hanse.mesh/service-account: multi}
addressType: IPv4
ports: [{name: http, port: 8080}, {name: http2, port: 8081}, {name: grpc, port: 8082}, {name: tcp, port: 8083}]
endpoints: [{addresses: [ADDRESS], zone: eu-1a}]
---
apiVersion: multicluster.x-k8s.io/v1alpha1
kind: ServiceExport
metadata: {namespace: shop, name: multi}
---
apiVersion: hanse.mesh/v1alpha1
kind: AccessPolicy
metadata: {namespace: shop, name: multi}
spec:
  targetRefs: [{kind: Service, name: multi}]
  rules: [{from: ["spiffe://west.test/ns/shop/sa/frontend"]}]
`

// TestProtocols calls from west to what only east has, through its gateway, in every protocol; and makes sure that nobody else gets anything.
func TestProtocols(t *testing.T) {
	t.Parallel()
	l := newLab(t, shortTimers, "west", "east")
	l.up()
	east := l.cluster("east")
	ip := strings.TrimSuffix(east.GatewayIP, "9") + "21"
	l.save(filepath.Join(east.Dir, "multi-mesh.yaml"), strings.Replace(multiYAML, "ADDRESS", ip, 1))
	l.must("east", "", "apply", "-f", filepath.Join(east.Dir, "multi-mesh.yaml"))
	l.save(filepath.Join(east.Dir, "multi.token"), l.must("east", "", "token", "create", "--agent", "shop/multi"))
	http, raw := filepath.Join(east.Dir, "multi.sock"), filepath.Join(east.Dir, "multi-tcp.sock")
	b, err := os.ReadFile(filepath.Join(east.Dir, "pay-a.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	pay := east.workload("pay-a")
	config := strings.NewReplacer("pay-a", "multi", pay.IP, ip, `"8080": unix:`+pay.App,
		fmt.Sprintf("\"8080\": unix:%s\n    \"8081\": unix:%s\n    \"8082\": unix:%s\n    \"8083\": unix:%s", http, http, http, raw)).Replace(string(b))
	l.save(filepath.Join(east.Dir, "multi.yaml"), config)
	l.start("east/multi-app", "echo", "serve", "--http", "unix:"+http, "--tcp", "unix:"+raw, "--service", "multi", "--cluster", "east", "--zone", "eu-1a")
	l.start("east/multi", "hanse-proxy", "--config", filepath.Join(east.Dir, "multi.yaml"))
	l.ready("east/multi", ip+":15020")

	echo := func(workload, target string, args ...string) (string, error) {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		cmd := exec.CommandContext(ctx, filepath.Join(bin, "echo"), append(append([]string{"call", "--proxy", l.cluster("west").workload(workload).Outbound}, args...), target)...)
		out, err := cmd.CombinedOutput()
		return string(bytes.TrimSpace(out)), err
	}
	l.eventually(10*time.Second, "west imports multi", func() error {
		_, err := l.hanse("west", "", "endpoints", "shop/multi")
		return err
	})
	body := strings.Repeat("every byte ", 9_000)
	for _, c := range []struct {
		name, target string
		args         []string
	}{
		{"HTTP/1.1", "http://multi.shop:8080/a?b=c", nil},
		{"HTTP/1.1 with a body", "http://multi.shop:8080/", []string{"--method", "POST", "--body", body}},
		{"HTTP/2", "http://multi.shop:8081/", nil},
		{"WebSocket", "ws://multi.shop:8080/ws", []string{"--body", "ping"}},
		{"gRPC unary", "grpc://multi.shop:8082", []string{"--body", "ping"}},
		{"gRPC client stream", "grpc://multi.shop:8082", []string{"--body", "ping", "--stream", "client"}},
		{"gRPC server stream", "grpc://multi.shop:8082", []string{"--body", "ping", "--stream", "server"}},
		{"gRPC bidirectional", "grpc://multi.shop:8082", []string{"--body", "ping", "--stream", "bidi"}},
		{"TCP", "tcp://multi.shop:8083", []string{"--body", body[:60_000]}},
	} {
		t.Run(c.name, func(t *testing.T) {
			out, err := echo("frontend", c.target, c.args...)
			if err != nil {
				t.Fatalf("%v: %s", err, out[:min(len(out), 2000)])
			}
			if !strings.HasPrefix(c.target, "tcp") && !strings.Contains(out, "spiffe://west.test/ns/shop/sa/frontend") {
				t.Errorf("the server did not see the caller's ID: %s", out[:min(len(out), 500)])
			}
			// Of WebSocket and TCP the client itself compares what comes back.
			if len(c.args) > 1 && c.name != "WebSocket" && !strings.Contains(out, c.args[1][:4]) {
				t.Errorf("the bytes did not come back: %s", out[:min(len(out), 500)])
			}
			if c.args != nil && c.args[0] == "--method" {
				var line struct {
					Answer struct{ Body string } `json:"answer"`
				}
				if json.Unmarshal([]byte(out), &line) == nil && line.Answer.Body != "" && line.Answer.Body != body {
					t.Error("the body that came back differs")
				}
			}
			if out, err := echo("intruder", c.target, append(c.args, "--timeout", "5s")...); err == nil {
				t.Errorf("the intruder was answered: %s", out[:min(len(out), 500)])
			}
		})
	}

	t.Run("without an SVID", func(t *testing.T) {
		for _, addr := range []string{ip + ":15008", east.Gateway} {
			c, err := tls.DialWithDialer(&net.Dialer{Timeout: 5 * time.Second}, "tcp", addr, &tls.Config{InsecureSkipVerify: true, ServerName: "multi.shop.svc.clusterset.local", NextProtos: []string{"h2"}})
			if err == nil { // TLS 1.3: the refusal of a client without certificate comes with the first read
				c.SetDeadline(time.Now().Add(5 * time.Second))
				_, err = c.Read(make([]byte, 1))
				c.Close()
			}
			if err == nil {
				t.Errorf("%s answered a client without SVID", addr)
			}
		}
	})
}
