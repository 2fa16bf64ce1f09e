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
	"sync"
	"time"
)

// called is how many more services of startHanse's mesh the workload serves and has a policy for; and others, if asked for, has elsewhere.
const called = 10

// startHanse runs a control plane and two sidecars, configured as deploy/ shows it. more services are in the mesh, which nobody calls.
func startHanse(ctx context.Context, dir, bin string, to *backends, more int) (*product, error) {
	bin, err := filepath.Abs(bin)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Join(dir, "objects"), 0o700); err != nil {
		return nil, err
	}
	ports := map[string]string{"APP": to.http, "GRPCAPP": to.grpc, "TCPAPP": to.tcp, "DIR": dir}
	for _, name := range []string{"FEDERATION", "IDENTITY", "XDS", "BUNDLE", "ADMIN", "ENTRY", "GRPCENTRY", "TCPENTRY", "OUTBOUND", "FRONTADMIN", "PAYADMIN"} {
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
	for i := range called {
		if err := os.WriteFile(filepath.Join(dir, "objects", fmt.Sprintf("called-%d.yaml", i)), []byte(strings.ReplaceAll(fill(calledYAML), "$I$", fmt.Sprint(i))), 0o600); err != nil {
			return nil, err
		}
	}
	for from := 0; from < more; from += 500 {
		var text strings.Builder
		for i := from; i < min(more, from+500); i++ {
			text.WriteString(strings.NewReplacer("$I$", fmt.Sprint(i), "$IP$", fmt.Sprintf("10.7.%d.%d", i/250, 1+i%250)).Replace(otherYAML))
		}
		if err := os.WriteFile(filepath.Join(dir, "objects", fmt.Sprintf("other-%d.yaml", from)), []byte(text.String()), 0o600); err != nil {
			return nil, err
		}
	}
	control, stop, err := startControl(ctx, dir, bin, [][]string{{"--agent", "shop/frontend", "--file", "frontend.token"}, {"--agent", "shop/payments", "--file", "payments.token"}})
	if err != nil {
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
	end := sync.OnceFunc(func() { ending(cmds...)(); stop() })
	return answers(ctx, &product{name: "hanse", version: "this tree, as shipped: routing, AccessPolicy, metrics, access log, trace IDs; hop: HTTP/2", http: ports["ENTRY"], grpc: ports["GRPCENTRY"], tcp: ports["TCPENTRY"], host: "payments.shop:8080", pids: pids, stop: end,
		admins: []string{ports["FRONTADMIN"], ports["PAYADMIN"]}, explicit: ports["OUTBOUND"], control: control.Process.Pid})
}

// startControl runs a control plane from hansed.yaml, applies mesh.yaml, and writes bundle.json and the tokens whose arguments are given.
func startControl(ctx context.Context, dir, bin string, tokens [][]string) (control *exec.Cmd, stop func(), err error) {
	if control, err = begin(dir, "hansed.log", filepath.Join(bin, "hansed"), "--config", "hansed.yaml"); err != nil {
		return nil, nil, err
	}
	stop = ending(control)
	defer func() {
		if err != nil {
			stop()
		}
	}()
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
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		if _, err = hanse("apply", "-f", "mesh.yaml"); err == nil {
			break
		}
		if time.Now().After(end) {
			return nil, nil, err
		}
	}
	bundle, err := hanse("trust", "show", "-o", "bundle")
	if err != nil {
		return nil, nil, err
	}
	if err := os.WriteFile(filepath.Join(dir, "bundle.json"), bundle, 0o600); err != nil {
		return nil, nil, err
	}
	for _, t := range tokens {
		if _, err := hanse(append([]string{"token", "create"}, t...)...); err != nil {
			return nil, nil, err
		}
	}
	return control, stop, nil
}

const hansedYAML = `cluster: west
trustDomain: west.bench
mesh: bench
region: eu-1
dataDir: data
configDir: objects
socket: hansed.sock
federation: {listen: "$FEDERATION$"}
identity: {listen: "$IDENTITY$"}
xds: {listen: "$XDS$"}
bundleEndpoint: {listen: "$BUNDLE$"}
admin: {listen: "$ADMIN$"}
`

const meshYAML = `apiVersion: v1
kind: Service
metadata: {name: payments, namespace: shop}
spec:
  ports:
  - {name: http, port: 8080}
  - {name: grpc, port: 8082}
  - {name: tcp, port: 8083}
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
- {name: grpc, port: 8082}
- {name: tcp, port: 8083}
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
    methods: [GET, PUT, POST]
    ports: [8080, 8082]
  - from: ["spiffe://west.bench/ns/shop/sa/frontend"]
    ports: [8083]
`

const calledYAML = `apiVersion: v1
kind: Service
metadata: {name: called-$I$, namespace: shop}
spec:
  ports:
  - {name: http, port: 8080}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: called-$I$
  namespace: shop
  labels: {kubernetes.io/service-name: called-$I$}
  annotations: {hanse.mesh/service-account: payments, hanse.mesh/hop-port: "$HOP$"}
addressType: IPv4
ports:
- {name: http, port: 8080}
endpoints:
- addresses: [127.0.0.1]
---
apiVersion: hanse.mesh/v1alpha1
kind: AccessPolicy
metadata: {name: called-$I$, namespace: shop}
spec:
  targetRefs:
  - {kind: Service, name: called-$I$}
  rules:
  - from: ["spiffe://west.bench/ns/shop/sa/frontend"]
    methods: [GET]
`

const otherYAML = `---
apiVersion: v1
kind: Service
metadata: {name: other-$I$, namespace: shop}
spec:
  ports:
  - {name: http, port: 8080}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: other-$I$
  namespace: shop
  labels: {kubernetes.io/service-name: other-$I$}
  annotations: {hanse.mesh/service-account: other}
addressType: IPv4
ports:
- {name: http, port: 8080}
endpoints:
- addresses: [$IP$]
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
- {listen: "$GRPCENTRY$", to: "payments.shop:8082"}
- {listen: "$TCPENTRY$", to: "payments.shop:8083"}
admin: {listen: "$FRONTADMIN$"}
log: {access: frontend.access.log}
`

const payYAML = proxyYAML + `  tokenFile: payments.token
stateDir: payments
outbound: {listen: none}
workloads:
- address: 127.0.0.1
  hopPort: $HOP$
  ports: {"8080": "$APP$", "8082": "$GRPCAPP$", "8083": "$TCPAPP$"}
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

// chain is where the proxies of others listen: entries of the first, and between both.
type chain struct{ entry, middle map[string]string }

// two starts both proxies of a chain from their configurations.
func two(ctx context.Context, name, binary, dir string, version []string, config func(chain) [2]string, args func(i int, file string) []string) (*product, error) {
	binary, err := exec.LookPath(binary)
	if err != nil {
		return nil, exec.ErrNotFound
	}
	if binary, err = filepath.Abs(binary); err != nil { // it runs elsewhere
		return nil, err
	}
	if err := certificates(dir); err != nil {
		return nil, err
	}
	c := chain{map[string]string{}, map[string]string{}}
	for _, protocol := range []string{"http", "grpc", "tcp"} {
		c.entry[protocol], c.middle[protocol] = freePort(), freePort()
	}
	said, _ := exec.CommandContext(ctx, binary, version...).CombinedOutput() // the answer to the first request shows whether it works
	line, _, _ := strings.Cut(strings.TrimSpace(strings.TrimPrefix(strings.TrimSpace(string(said)), binary)), "\n")
	var cmds []*exec.Cmd
	var pids []int
	for i, text := range config(c) {
		file := filepath.Join(dir, fmt.Sprintf("%d.%s", i, map[bool]string{true: "yaml", false: "conf"}[name == "envoy"]))
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			return nil, err
		}
		cmd, err := begin(dir, fmt.Sprintf("%d.log", i), binary, args(i, file)...)
		if err != nil {
			ending(cmds...)()
			return nil, err
		}
		cmds, pids = append(cmds, cmd), append(pids, cmd.Process.Pid)
	}
	return answers(ctx, &product{name: name, version: line, http: c.entry["http"], grpc: c.entry["grpc"], tcp: c.entry["tcp"], host: "payments.shop:8080", pids: pids, stop: ending(cmds...)})
}

// nginxStream loads nginx's module for TCP where Debian puts it; it is built in elsewhere.
func nginxStream() string {
	const module = "/usr/lib/nginx/modules/ngx_stream_module.so"
	if _, err := os.Stat(module); err != nil {
		return ""
	}
	return "load_module " + module + ";\n"
}

func startNginx(ctx context.Context, dir string, to *backends) (*product, error) {
	config := func(c chain) [2]string {
		head := func(n int) string {
			return nginxStream() + fmt.Sprintf(`daemon off;
worker_processes 1;
pid %[1]s/%[2]d.pid;
error_log %[1]s/%[2]d.error warn;
events { worker_connections 4096; }
`, dir, n)
		}
		http := func(n int) string {
			return fmt.Sprintf(`http {
  log_format full '$remote_addr [$time_iso8601] "$request" $status $body_bytes_sent $request_time "$http_user_agent" $ssl_client_s_dn $upstream_addr $request_id';
  access_log %[1]s/%[2]d.access full buffer=32k flush=1s;
  client_body_temp_path %[1]s/%[2]d.b; proxy_temp_path %[1]s/%[2]d.p; fastcgi_temp_path %[1]s/%[2]d.f; uwsgi_temp_path %[1]s/%[2]d.u; scgi_temp_path %[1]s/%[2]d.s;
  keepalive_requests 1000000000; keepalive_timeout 300;
  client_max_body_size 0; proxy_request_buffering off; proxy_max_temp_file_size 0;
  proxy_http_version 1.1;
  proxy_set_header Connection "";
  proxy_set_header Host $http_host;
  proxy_set_header traceparent $request_id;
  grpc_set_header traceparent $request_id;
`, dir, n)
		}
		secure := func(kind string) string {
			return strings.ReplaceAll("X_ssl_certificate client.crt; X_ssl_certificate_key client.key; X_ssl_trusted_certificate ca.pem; X_ssl_verify on; X_ssl_name server; X_ssl_protocols TLSv1.3; X_ssl_session_reuse off;", "X", kind)
		}
		const serving = "ssl_certificate server.crt; ssl_certificate_key server.key; ssl_client_certificate ca.pem; ssl_verify_client on; ssl_protocols TLSv1.3;"
		stream := func(n int) string {
			return fmt.Sprintf(`stream {
  log_format full '$remote_addr [$time_iso8601] $status $bytes_sent $bytes_received $session_time $ssl_client_s_dn $upstream_addr';
  access_log %[1]s/%[2]d.tcp full buffer=32k flush=1s;
`, dir, n)
		}
		return [2]string{
			head(0) + http(0) + fmt.Sprintf(`  upstream peer { server %s; keepalive 256; keepalive_requests 1000000000; }
  upstream grpcpeer { server %s; keepalive 256; keepalive_requests 1000000000; }
  server { listen %s; location / { proxy_pass https://peer; %s } }
  server { listen %s http2; location / { grpc_pass grpcs://grpcpeer; %s } }
}
`, c.middle["http"], c.middle["grpc"], c.entry["http"], secure("proxy"), c.entry["grpc"], secure("grpc")) +
				stream(0) + fmt.Sprintf("  server { listen %s; proxy_pass %s; proxy_ssl on; %s }\n}\n", c.entry["tcp"], c.middle["tcp"], secure("proxy")),
			head(1) + http(1) + fmt.Sprintf(`  upstream app { server %s; keepalive 256; keepalive_requests 1000000000; }
  upstream grpcapp { server %s; keepalive 256; keepalive_requests 1000000000; }
  server { listen %s ssl; %s location / { if ($ssl_client_s_dn != "CN=client") { return 403; } proxy_pass http://app; } }
  server { listen %s ssl http2; %s location / { if ($ssl_client_s_dn != "CN=client") { return 403; } grpc_pass grpc://grpcapp; } }
}
`, to.http, to.grpc, c.middle["http"], serving, c.middle["grpc"], serving) +
				stream(1) + fmt.Sprintf("  server { listen %s ssl; %s proxy_pass %s; }\n}\n", c.middle["tcp"], serving, to.tcp),
		}
	}
	return two(ctx, "nginx", "nginx", dir, []string{"-v"}, config, func(_ int, file string) []string {
		return []string{"-p", dir, "-c", file, "-e", filepath.Join(dir, "start.error")}
	})
}

func startHAProxy(ctx context.Context, dir string, to *backends) (*product, error) {
	config := func(c chain) [2]string {
		const head = `global
  nbthread 1
  maxconn 8000
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
		client := fmt.Sprintf("ssl crt %s/client.pem ca-file %s/ca.pem verify required verifyhost server", dir, dir)
		server := fmt.Sprintf("ssl crt %s/server.pem ca-file %s/ca.pem verify required", dir, dir)
		const deny = "  http-request deny unless { ssl_c_s_dn(cn) -m str client }\n"
		const raw = "  mode tcp\n  option tcplog\n"
		return [2]string{
			head + fmt.Sprintf("listen h\n  bind %s\n  server s %s %s\n", c.entry["http"], c.middle["http"], client) +
				fmt.Sprintf("listen g\n  bind %s proto h2\n  server s %s %s alpn h2\n", c.entry["grpc"], c.middle["grpc"], client) +
				fmt.Sprintf("listen t\n"+raw+"  bind %s\n  server s %s %s\n", c.entry["tcp"], c.middle["tcp"], client),
			head + fmt.Sprintf("listen h\n  bind %s %s\n"+deny+"  server s %s\n", c.middle["http"], server, to.http) +
				fmt.Sprintf("listen g\n  bind %s %s alpn h2\n"+deny+"  server s %s proto h2\n", c.middle["grpc"], server, to.grpc) +
				fmt.Sprintf("listen t\n"+raw+"  bind %s %s\n  tcp-request content reject unless { ssl_c_s_dn(cn) -m str client }\n  server s %s\n", c.middle["tcp"], server, to.tcp),
		}
	}
	return two(ctx, "haproxy", "haproxy", dir, []string{"-v"}, config, func(_ int, file string) []string { return []string{"-f", file} })
}
