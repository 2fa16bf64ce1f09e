package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// sealedName is the server name that gateways pass on to the server that openSealed starts.
const sealedName = "sealed.shop.svc.clusterset.local"

// gateway measures one process that passes TLS connections on by their server name, without ending them.
func (b *bench) gateway(ctx context.Context) error {
	dir := filepath.Join(b.dir, "gateway")
	if err := certificates(dir); err != nil {
		return err
	}
	sealed, err := openSealed(dir)
	if err != nil {
		return err
	}
	defer sealed.Close()
	own := &bench{rounds: b.rounds, length: b.length, bin: b.bin}
	defer func() {
		for _, p := range own.products {
			p.stop()
		}
	}()
	starts := map[string]func(context.Context, string, string) (*product, error){
		"hanse": func(ctx context.Context, dir, to string) (*product, error) {
			return hanseGateway(ctx, dir, b.bin, to)
		},
		"nginx": nginxGateway, "haproxy": haproxyGateway,
	}
	for _, p := range b.products {
		start := starts[p.name]
		if start == nil {
			continue
		}
		at := filepath.Join(dir, p.name)
		if err := os.MkdirAll(at, 0o700); err != nil {
			return err
		}
		gw, err := start(ctx, at, sealed.Addr().String())
		if err == nil {
			own.products, err = append(own.products, gw), firstSealed(ctx, gw)
		}
		if err != nil {
			return fmt.Errorf("%s: %w\n%s", p.name, err, lastWords(at))
		}
	}
	var rows []string
	for _, kind := range []struct {
		what string
		verb byte
	}{{"download", 'd'}, {"upload", 'u'}} {
		by, err := own.take(ctx, "gateway, "+kind.what, func(p *product) (result, error) {
			cpu, start := cpuTime(p.pids), time.Now()
			err := throughGateway(p, kind.verb, bulk)
			const gib = float64(bulk) / (1 << 30)
			return result{CPU: (cpuTime(p.pids) - cpu).Seconds() / gib, PerSecond: gib / time.Since(start).Seconds()}, err
		})
		if err != nil {
			return err
		}
		for _, p := range own.products {
			rows = append(rows, fmt.Sprintf("%s\t%s\t%.2f\t%.2f\t%s", kind.what, p.name, of(by[p.name], cpuOf), of(by[p.name], perSecondOf), ratio(by, p.name)))
		}
	}
	b.report.table("256 MiB OF TLS THROUGH A GATEWAY\tPRODUCT\tCPU s PER GiB\tGiB/s\tRATIO", rows)
	by, err := own.take(ctx, "gateway, new connections", func(p *product) (result, error) {
		return loop(ctx, p, 8, b.length, func(_ int, w *window) (took []time.Duration, err error) {
			for {
				counts, over := w.counts()
				if over {
					return took, nil
				}
				start := time.Now()
				if err := throughGateway(p, 'd', 16); err != nil {
					return nil, err
				}
				if counts {
					took = append(took, time.Since(start))
				}
			}
		})
	})
	if err != nil {
		return err
	}
	b.report.table("NEW CONNECTION THROUGH A GATEWAY\tPRODUCT\tCPU µs\tCONNECTIONS/s\tp50 ms\tp99 ms\tRATIO", own.latencies("TLS handshake, 16 B", by))
	return nil
}

// openSealed serves TLS: a byte d or u, and eight digits of hexadecimal, ask for so many bytes of filling, or announce them.
func openSealed(dir string) (net.Listener, error) {
	cert, err := tls.LoadX509KeyPair(filepath.Join(dir, "server.crt"), filepath.Join(dir, "server.key"))
	if err != nil {
		return nil, err
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	go each(ln, func(raw net.Conn) {
		c := tls.Server(raw, &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS13})
		defer c.Close()
		var verb byte
		var n int64
		head := make([]byte, 9)
		if _, err := io.ReadFull(c, head); err != nil {
			return
		}
		if _, err := fmt.Sscanf(string(head), "%c%08x", &verb, &n); err != nil {
			return
		}
		if verb == 'd' {
			_, _ = io.Copy(struct{ io.Writer }{c}, repeated(int(n)))
			return
		}
		if _, err := io.CopyN(io.Discard, c, n); err == nil {
			_, _ = c.Write([]byte("ok"))
		}
	})
	return ln, nil
}

// throughGateway moves n bytes, a multiple of 16, on a connection of their own.
func throughGateway(p *product, verb byte, n int) error {
	raw, err := dial(p.tcp)
	if err != nil {
		return err
	}
	defer abrupt(raw)
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(p.roots)
	// The certificate says "server": what the connection is called on the way is the gateway's affair.
	c := tls.Client(raw, &tls.Config{ServerName: sealedName, InsecureSkipVerify: true, MinVersion: tls.VersionTLS13, VerifyConnection: func(s tls.ConnectionState) error {
		_, err := s.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: roots, DNSName: "server"})
		return err
	}})
	if _, err := fmt.Fprintf(c, "%c%08x", verb, n); err != nil {
		return err
	}
	if verb == 'u' {
		for sent := 0; sent < n; sent += 256 << 10 {
			if _, err := c.Write(filling[:256<<10]); err != nil {
				return err
			}
		}
		ok := make([]byte, 2)
		_, err := io.ReadFull(c, ok)
		return err
	}
	buf := make([]byte, min(n, 256<<10))
	for left := n; left > 0; left -= len(buf) {
		if _, err := io.ReadFull(c, buf); err != nil {
			return err
		}
		if !bytes.Equal(buf, filling[:len(buf)]) {
			return errors.New("wrong bytes")
		}
	}
	return nil
}

func firstSealed(ctx context.Context, p *product) (err error) {
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end) && ctx.Err() == nil; time.Sleep(50 * time.Millisecond) {
		if err = throughGateway(p, 'd', 16); err == nil {
			return nil
		}
	}
	return fmt.Errorf("no answer: %w", err)
}

func gatewayProduct(name, dir, listen string, cmd *exec.Cmd, stop func()) (*product, error) {
	roots, err := os.ReadFile(filepath.Join(filepath.Dir(dir), "ca.pem"))
	return &product{name: name, tcp: listen, pids: []int{cmd.Process.Pid}, stop: stop, roots: roots}, err
}

func hanseGateway(ctx context.Context, dir, bin, to string) (*product, error) {
	bin, err := filepath.Abs(bin)
	if err != nil {
		return nil, err
	}
	listen := freePort()
	_, port, _ := net.SplitHostPort(to)
	names := []string{"$GATEWAY$", listen, "$HOP$", port}
	for _, n := range []string{"$FEDERATION$", "$IDENTITY$", "$XDS$", "$BUNDLE$", "$ADMIN$", "$GATEWAYADMIN$"} {
		names = append(names, n, freePort())
	}
	fill := strings.NewReplacer(names...)
	for name, text := range map[string]string{"hansed.yaml": hansedYAML, "mesh.yaml": sealedYAML, "gateway.yaml": gatewayYAML} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(fill.Replace(text)), 0o600); err != nil {
			return nil, err
		}
	}
	if err := os.MkdirAll(filepath.Join(dir, "objects"), 0o700); err != nil {
		return nil, err
	}
	_, stop, err := startControl(ctx, dir, bin, [][]string{{"--gateway", "--file", "gateway.token"}})
	if err != nil {
		return nil, err
	}
	cmd, err := begin(dir, "gateway.log", filepath.Join(bin, "hanse-proxy"), "--config", "gateway.yaml")
	if err != nil {
		stop()
		return nil, err
	}
	end := ending(cmd)
	return gatewayProduct("hanse", dir, listen, cmd, func() { end(); stop() })
}

const sealedYAML = `apiVersion: v1
kind: Service
metadata: {name: sealed, namespace: shop}
spec:
  ports:
  - {name: tls, port: 443}
---
apiVersion: multicluster.x-k8s.io/v1alpha1
kind: ServiceExport
metadata: {name: sealed, namespace: shop}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: sealed
  namespace: shop
  labels: {kubernetes.io/service-name: sealed}
  annotations: {hanse.mesh/service-account: sealed, hanse.mesh/hop-port: "$HOP$"}
addressType: IPv4
ports:
- {name: tls, port: 443}
endpoints:
- addresses: [127.0.0.1]
`

const gatewayYAML = `role: gateway
cluster: west
trustDomain: west.bench
region: eu-1
controlPlane:
  identity: ["$IDENTITY$"]
  xds: ["$XDS$"]
  trustBundle: bundle.json
  tokenFile: gateway.token
stateDir: gateway
gateway: {listen: "$GATEWAY$"}
admin: {listen: "$GATEWAYADMIN$"}
`

func nginxGateway(_ context.Context, dir, to string) (*product, error) {
	listen := freePort()
	file := filepath.Join(dir, "gateway.conf")
	text := fmt.Sprintf(`daemon off;
%[4]sworker_processes 1;
pid %[1]s/pid;
events { worker_connections 4096; }
stream {
  map $ssl_preread_server_name $to { %[5]s %[3]s; }
  log_format full '$remote_addr [$time_iso8601] $status $bytes_sent $bytes_received $session_time $ssl_preread_server_name $upstream_addr';
  access_log %[1]s/access full buffer=32k flush=1s;
  server { listen %[2]s; ssl_preread on; proxy_pass $to; }
}
`, dir, listen, to, nginxStream(), sealedName)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		return nil, err
	}
	cmd, err := begin(dir, "gateway.log", "nginx", "-p", dir, "-c", file, "-e", filepath.Join(dir, "start.error"))
	if err != nil {
		return nil, err
	}
	return gatewayProduct("nginx", dir, listen, cmd, ending(cmd))
}

func haproxyGateway(_ context.Context, dir, to string) (*product, error) {
	listen := freePort()
	file := filepath.Join(dir, "gateway.conf")
	text := fmt.Sprintf(`global
  nbthread 1
  maxconn 2000
  log stdout format raw local0
defaults
  mode tcp
  log global
  option tcplog
  option splice-auto
  timeout connect 5s
  timeout client 300s
  timeout server 300s
frontend in
  bind %s
  tcp-request inspect-delay 5s
  tcp-request content accept if { req_ssl_hello_type 1 }
  use_backend sealed if { req_ssl_sni -i %s }
backend sealed
  server s %s
`, listen, sealedName, to)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		return nil, err
	}
	cmd, err := begin(dir, "gateway.log", "haproxy", "-f", file)
	if err != nil {
		return nil, err
	}
	return gatewayProduct("haproxy", dir, listen, cmd, ending(cmd))
}
