package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// startHanse runs a control plane and two sidecars, configured as deploy/ shows it.
func startHanse(ctx context.Context, dir, bin, app string) (*product, error) {
	bin, err := filepath.Abs(bin)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	ports := map[string]string{"APP": app, "DIR": dir}
	for _, name := range []string{"FEDERATION", "IDENTITY", "XDS", "ADMIN", "ENTRY", "OUTBOUND", "FRONTADMIN", "PAYADMIN"} {
		ports[name] = freePort()
	}
	_, hop, _ := net.SplitHostPort(freePort())
	ports["HOP"] = hop
	fill := func(text string) string {
		for k, v := range ports {
			text = strings.ReplaceAll(text, "$"+k+"$", v)
		}
		return text
	}
	for name, text := range map[string]string{"hansed.yaml": hansedYAML, "mesh.yaml": meshYAML, "frontend.yaml": frontYAML, "payments.yaml": payYAML} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(fill(text)), 0o600); err != nil {
			return nil, err
		}
	}
	control, err := begin(dir, "hansed.log", filepath.Join(bin, "hansed"), "--config", "hansed.yaml")
	if err != nil {
		return nil, err
	}
	stop := ending(control)
	hanse := func(args ...string) ([]byte, error) {
		cmd := exec.CommandContext(ctx, filepath.Join(bin, "hanse"), append([]string{"--socket", filepath.Join(dir, "hansed.sock")}, args...)...)
		cmd.Dir = dir
		out, err := cmd.Output()
		if err != nil {
			var text []byte
			if e, ok := err.(*exec.ExitError); ok {
				text = e.Stderr
			}
			err = fmt.Errorf("hanse %s: %w: %s", strings.Join(args, " "), err, text)
		}
		return out, err
	}
	steps := func() error {
		var err error
		for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
			if _, err = hanse("apply", "-f", "mesh.yaml"); err == nil {
				break
			}
		}
		if err != nil {
			return err
		}
		bundle, err := hanse("trust", "show", "-o", "bundle")
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, "bundle.json"), bundle, 0o600); err != nil {
			return err
		}
		for _, w := range []string{"frontend", "payments"} {
			if _, err := hanse("token", "create", "--agent", "shop/"+w, "--file", w+".token"); err != nil {
				return err
			}
		}
		return nil
	}
	if err := steps(); err != nil {
		stop()
		return nil, err
	}
	var cmds []*exec.Cmd
	var pids []int
	for _, w := range []string{"frontend", "payments"} {
		c, err := begin(dir, w+".log", filepath.Join(bin, "hanse-proxy"), "--config", w+".yaml")
		if err != nil {
			ending(cmds...)()
			stop()
			return nil, err
		}
		cmds, pids = append(cmds, c), append(pids, c.Process.Pid)
	}
	return answers(ctx, &product{name: "hanse", entry: ports["ENTRY"], host: "payments.shop:8080", pids: pids, admins: []string{ports["FRONTADMIN"], ports["PAYADMIN"]},
		stop: func() { ending(cmds...)(); stop() }})
}

const hansedYAML = `cluster: west
trustDomain: west.bench
mesh: bench
region: eu-1
dataDir: data
socket: hansed.sock
federation: {listen: "$FEDERATION$"}
identity: {listen: "$IDENTITY$"}
xds: {listen: "$XDS$"}
admin: {listen: "$ADMIN$"}
`

const meshYAML = `apiVersion: v1
kind: Service
metadata: {name: payments, namespace: shop}
spec:
  ports:
  - {name: http, port: 8080}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: payments
  namespace: shop
  labels: {kubernetes.io/service-name: payments}
  annotations: {hanse.mesh/service-account: payments, hanse.mesh/hop-port: "$HOP$"}
addressType: IPv4
ports:
- {name: http, port: 8080}
endpoints:
- addresses: [127.0.0.1]
---
apiVersion: hanse.mesh/v1alpha1
kind: AccessPolicy
metadata: {name: payments, namespace: shop}
spec:
  targetRefs:
  - {kind: Service, name: payments}
  rules:
  - from: ["spiffe://west.bench/ns/shop/sa/frontend"]
    methods: [GET]
`

const proxyYAML = `role: sidecar
cluster: west
trustDomain: west.bench
region: eu-1
namespace: shop
controlPlane:
  identity: ["$IDENTITY$"]
  xds: ["$XDS$"]
  trustBundle: bundle.json
`

const frontYAML = proxyYAML + `  tokenFile: frontend.token
stateDir: frontend
outbound: {listen: "$OUTBOUND$"}
listeners:
- {listen: "$ENTRY$", to: "payments.shop:8080"}
admin: {listen: "$FRONTADMIN$"}
log: {access: frontend.access.log}
`

const payYAML = proxyYAML + `  tokenFile: payments.token
stateDir: payments
workloads:
- address: 127.0.0.1
  hopPort: $HOP$
  ports: {"8080": "$APP$"}
admin: {listen: "$PAYADMIN$"}
log: {access: payments.access.log}
`

// certificates writes ca.pem and, for both ends, a certificate with key: NAME.pem holds both, NAME.crt and NAME.key one each.
func certificates(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "bench"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, ca, ca, &caKey.PublicKey, caKey)
	if err != nil {
		return err
	}
	block := func(kind string, b []byte) []byte { return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: b}) }
	if err := os.WriteFile(filepath.Join(dir, "ca.pem"), block("CERTIFICATE", der), 0o600); err != nil {
		return err
	}
	for i, name := range []string{"client", "server"} {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return err
		}
		leaf := &x509.Certificate{SerialNumber: big.NewInt(int64(2 + i)), Subject: pkix.Name{CommonName: name}, NotBefore: ca.NotBefore, NotAfter: ca.NotAfter, DNSNames: []string{name},
			KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}}
		der, err := x509.CreateCertificate(rand.Reader, leaf, ca, &key.PublicKey, caKey)
		if err != nil {
			return err
		}
		pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return err
		}
		crt, pk := block("CERTIFICATE", der), block("PRIVATE KEY", pkcs8)
		for file, b := range map[string][]byte{name + ".crt": crt, name + ".key": pk, name + ".pem": append(append([]byte(nil), crt...), pk...)} {
			if err := os.WriteFile(filepath.Join(dir, file), b, 0o600); err != nil {
				return err
			}
		}
	}
	return nil
}

// two starts both proxies of a chain from their configurations.
func two(ctx context.Context, name, dir, app string, config func(entry, middle string) [2]string, args func(file string) []string) (*product, error) {
	if _, err := exec.LookPath(name); err != nil {
		return nil, err
	}
	if err := certificates(dir); err != nil {
		return nil, err
	}
	entry, middle := freePort(), freePort()
	var cmds []*exec.Cmd
	var pids []int
	for i, text := range config(entry, middle) {
		file := filepath.Join(dir, fmt.Sprintf("%d.conf", i))
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			return nil, err
		}
		c, err := begin(dir, fmt.Sprintf("%d.log", i), name, args(file)...)
		if err != nil {
			ending(cmds...)()
			return nil, err
		}
		cmds, pids = append(cmds, c), append(pids, c.Process.Pid)
	}
	return answers(ctx, &product{name: name, entry: entry, host: "payments.shop:8080", pids: pids, stop: ending(cmds...)})
}

func startNginx(ctx context.Context, dir, _, app string) (*product, error) {
	config := func(entry, middle string) [2]string {
		head := func(n int) string {
			return fmt.Sprintf(`daemon off;
worker_processes 1;
pid %[1]s/%[2]d.pid;
error_log %[1]s/%[2]d.error warn;
events { worker_connections 4096; }
http {
  log_format full '$remote_addr [$time_iso8601] "$request" $status $body_bytes_sent $request_time "$http_user_agent" $ssl_client_s_dn $upstream_addr $request_id';
  access_log %[1]s/%[2]d.access full buffer=32k flush=1s;
  client_body_temp_path %[1]s/%[2]d.b; proxy_temp_path %[1]s/%[2]d.p; fastcgi_temp_path %[1]s/%[2]d.f; uwsgi_temp_path %[1]s/%[2]d.u; scgi_temp_path %[1]s/%[2]d.s;
  keepalive_requests 1000000000; keepalive_timeout 300;
  proxy_http_version 1.1;
  proxy_set_header Connection "";
  proxy_set_header Host $http_host;
  proxy_set_header traceparent $request_id;
`, dir, n)
		}
		return [2]string{
			head(0) + fmt.Sprintf(`  upstream peer { server %s; keepalive 256; keepalive_requests 1000000000; }
  server { listen %s;
    location / { proxy_pass https://peer; proxy_ssl_certificate client.crt; proxy_ssl_certificate_key client.key; proxy_ssl_trusted_certificate ca.pem;
      proxy_ssl_verify on; proxy_ssl_name server; proxy_ssl_protocols TLSv1.3; proxy_ssl_session_reuse off; } } }
`, middle, entry),
			head(1) + fmt.Sprintf(`  upstream app { server %s; keepalive 256; keepalive_requests 1000000000; }
  server { listen %s ssl; ssl_certificate server.crt; ssl_certificate_key server.key; ssl_client_certificate ca.pem; ssl_verify_client on; ssl_protocols TLSv1.3;
    location / { if ($ssl_client_s_dn != "CN=client") { return 403; } proxy_pass http://app; } } }
`, app, middle),
		}
	}
	return two(ctx, "nginx", dir, app, config, func(file string) []string {
		return []string{"-p", dir, "-c", file, "-e", filepath.Join(dir, "start.error")}
	})
}

func startHAProxy(ctx context.Context, dir, _, app string) (*product, error) {
	config := func(entry, middle string) [2]string {
		head := `global
  nbthread 1
  maxconn 4000
  log stdout format raw local0
  ssl-default-bind-options ssl-min-ver TLSv1.3
  ssl-default-server-options ssl-min-ver TLSv1.3
defaults
  mode http
  log global
  option httplog
  http-reuse always
  unique-id-format %{+X}o%ci%cp%rt
  unique-id-header traceparent
  timeout connect 5s
  timeout client 300s
  timeout server 300s
`
		return [2]string{
			head + fmt.Sprintf("listen l\n  bind %s\n  server s %s ssl crt %s/client.pem ca-file %s/ca.pem verify required verifyhost server\n", entry, middle, dir, dir),
			head + fmt.Sprintf("listen l\n  bind %s ssl crt %s/server.pem ca-file %s/ca.pem verify required\n  http-request deny unless { ssl_c_s_dn(cn) -m str client }\n  server s %s\n", middle, dir, dir, app),
		}
	}
	return two(ctx, "haproxy", dir, app, config, func(file string) []string { return []string{"-f", file} })
}
