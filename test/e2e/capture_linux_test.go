package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hanse-mesh/hanse/test/netns"
)

const captureHansed = `
cluster: NAME
trustDomain: NAME.test
mesh: test
region: eu
network: flat
dataDir: data
socket: hansed.sock
federation: {listen: "IP:7443"}
identity: {listen: "IP:7444"}
xds: {listen: "IP:7445"}
bundleEndpoint: {listen: "IP:7446"}
admin: {listen: "ADMIN"}
`

const captureSidecar = `
cluster: NAME
trustDomain: NAME.test
network: flat
region: eu
zone: eu-1
namespace: shop
controlPlane: {identity: ["IP:7444"], xds: ["IP:7445"], trustBundle: bundle.json, tokenFile: sidecar.token}
stateDir: sidecar
capture: {enabled: true, dns: true}
log: {access: sidecar.access.log}
drainTimeout: 1s
`

// captureOffer is what east offers.
const captureOffer = `
apiVersion: v1
kind: Service
metadata: {namespace: shop, name: payments}
spec: {ports: PORTS}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  namespace: shop
  name: payments
  labels: {kubernetes.io/service-name: payments}
  annotations: {hanse.mesh/service-account: payments}
addressType: IPv4
ports: PORTS
endpoints: [{addresses: [10.2.0.2]}]
---
apiVersion: multicluster.x-k8s.io/v1alpha1
kind: ServiceExport
metadata: {namespace: shop, name: payments}
---
apiVersion: hanse.mesh/v1alpha1
kind: AccessPolicy
metadata: {namespace: shop, name: payments}
spec:
  targetRefs: [{kind: Service, name: payments}]
  rules: [{from: ["spiffe://west.test/ns/shop/sa/frontend"]}]
`

// captureAddress is by what address west knows it.
const captureAddress = `
apiVersion: v1
kind: Service
metadata:
  namespace: shop
  name: payments
  annotations: {hanse.mesh/clusterset: "true"}
spec: {clusterIP: 10.96.0.7, ports: PORTS}
`

const capturePorts = `[{name: http, port: 8080}, {name: grpc, port: 8082}, {name: tcp, port: 8083}, {name: tcp-redis, port: 6379}]`

// pods are two clusters whose control planes share a network namespace, core, and which have a workload with a namespace of its own each.
type pods struct {
	*lab
	core *netns.NS
	pod  map[string]*netns.NS // by cluster
}

func newPods(t *testing.T) *pods {
	t.Helper()
	p := &pods{lab: newLab(t, ""), core: netns.New(t), pod: map[string]*netns.NS{}}
	p.core.Address(t, "10.9.0.1/32,10.9.0.2/32")
	p.core.Forward(t)
	for i, name := range []string{"west", "east"} {
		net, net6 := fmt.Sprintf("10.%d.0.", i+1), fmt.Sprintf("fd0%d::", i+1)
		p.pod[name] = netns.New(t)
		netns.Join(t, p.core, p.pod[name], net+"1/24,"+net6+"1/64", net+"2/24,"+net6+"2/64")
		p.pod[name].Route(t, "default", net+"1")
		p.pod[name].Route(t, "default", net6+"1")
		ip := fmt.Sprintf("10.9.0.%d", i+1)
		p.config(name, "hansed.yaml", captureHansed, "IP", ip, "ADMIN", fmt.Sprintf("127.0.0.1:%d", 7440+100*i))
		p.run(p.core, name+"/hansed", "hansed", "--config", filepath.Join(p.dir, name, "hansed.yaml"))
		p.readyIn(p.core, name+"/hansed", fmt.Sprintf("127.0.0.1:%d", 7440+100*i))
	}
	p.must("west", p.must("east", "", "token", "create", "--for", "west"), "join", "-")
	return p
}

// config writes a file of a cluster's.
func (p *pods) config(cluster, name, text string, replace ...string) {
	p.t.Helper()
	dir := filepath.Join(p.dir, cluster)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		p.t.Fatal(err)
	}
	p.save(filepath.Join(dir, name), strings.NewReplacer(append(replace, "NAME", cluster, "PORTS", capturePorts)...).Replace(text))
}

// run starts a process in a namespace; a name without / is one of ours.
func (p *pods) run(ns *netns.NS, name string, argv ...string) {
	p.t.Helper()
	log, err := os.OpenFile(filepath.Join(p.dir, strings.ReplaceAll(name, "/", "-")+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		p.t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(program(argv[0]), argv[1:]...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = p.dir, log, log
	if err := ns.Start(cmd); err != nil {
		p.t.Fatalf("start %s: %v", name, err)
	}
	proc := &process{argv: argv, cmd: cmd, done: make(chan struct{})}
	p.mu.Lock()
	p.procs[name] = proc
	p.mu.Unlock()
	go func() {
		_ = cmd.Wait() // tests kill
		close(proc.done)
	}()
}

func program(name string) string {
	switch name {
	case "hansed", "hanse-proxy", "hanse", "echo":
		return filepath.Join(bin, name)
	}
	return name
}

// output runs a program in a cluster's pod, and says what it printed.
func (p *pods) output(cluster string, argv ...string) (string, error) {
	cmd := exec.Command(program(argv[0]), argv[1:]...)
	cmd.Dir = p.dir
	out, err := p.pod[cluster].Output(cmd)
	return strings.TrimSpace(out), err
}

func (p *pods) readyIn(ns *netns.NS, name, admin string) {
	p.t.Helper()
	p.eventually(time.Minute, name+" is ready", func() error {
		out, err := ns.Output(exec.Command("curl", "-sS", "--fail-with-body", "--max-time", "5", "http://"+admin+"/readyz"))
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
}

// sidecar installs the rules, and starts the sidecar of a service account.
func (p *pods) sidecar(cluster, account, more string) {
	p.t.Helper()
	ip := map[string]string{"west": "10.9.0.1", "east": "10.9.0.2"}[cluster]
	p.config(cluster, "sidecar.yaml", captureSidecar+more, "IP", ip)
	p.config(cluster, "bundle.json", p.must(cluster, "", "trust", "show", cluster+".test", "-o", "bundle"))
	p.config(cluster, "sidecar.token", p.must(cluster, "", "token", "create", "--agent", "shop/"+account))
	file := filepath.Join(p.dir, cluster, "sidecar.yaml")
	if out, err := p.output(cluster, "hanse-proxy", "capture", "install", "--config", file); err != nil {
		p.t.Fatalf("%v: %s", err, out)
	}
	p.run(p.pod[cluster], cluster+"/sidecar", "hanse-proxy", "--config", file)
	p.readyIn(p.pod[cluster], cluster+"/sidecar", "127.0.0.1:15020")
}

// TestCapture: programs that know nothing of a mesh call across two trust domains, captured by the kernel's rules: curl, a WebSocket and
// a gRPC client, raw TCP and redis-cli; also while both control planes are dead.
func TestCapture(t *testing.T) {
	netns.Test(t, func(t *testing.T) {
		p := newPods(t)
		p.config("east", "mesh.yaml", captureOffer)
		p.must("east", "", "apply", "-f", filepath.Join(p.dir, "east", "mesh.yaml"))
		p.config("west", "mesh.yaml", captureAddress)
		p.must("west", "", "apply", "-f", filepath.Join(p.dir, "west", "mesh.yaml"))
		p.sidecar("east", "payments", `
workloads:
- address: 10.2.0.2
  ports: {8080: "127.0.0.1:8080", 8082: "127.0.0.1:8080", 8083: "127.0.0.1:8083", 6379: "127.0.0.1:6379"}
`)
		p.sidecar("west", "frontend", "")
		p.run(p.pod["east"], "east/app", "echo", "serve", "--http", "0.0.0.0:8080", "--tcp", "127.0.0.1:8083", "--service", "payments", "--cluster", "east")
		redis := haveRedis(t)
		if redis {
			p.run(p.pod["east"], "east/redis", "redis-server", "--port", "6379", "--bind", "127.0.0.1", "--save", "", "--dir", p.dir)
		}
		const at, name = "10.96.0.7", "payments.shop.svc.clusterset.local"
		p.eventually(20*time.Second, "west calls east", func() error {
			out, err := p.output("west", "curl", "-sS", "--fail-with-body", "--max-time", "5", "http://"+at+":8080/")
			if err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
			return nil
		})
		calls := func(t *testing.T) {
			for _, c := range [][]string{
				{"--http1.1", "http://" + at + ":8080/x"}, {"--http2-prior-knowledge", "http://" + at + ":8080/x"},
				{"--http1.1", "http://" + name + ":8080/x"}, {"--http2-prior-knowledge", "http://payments.shop:8080/x"}, {"-4", "http://payments:8080/x"}, {"-6", "http://payments:8080/x"},
			} {
				out, err := p.output("west", "curl", "-sS", "--max-time", "10", c[0], c[1])
				var a struct{ Caller, Cluster, Host string }
				if jerr := json.Unmarshal([]byte(out), &a); err != nil || jerr != nil || a.Caller != "spiffe://west.test/ns/shop/sa/frontend" || a.Cluster != "east" {
					t.Errorf("curl %s: %s %v %v", c, out, err, jerr)
				}
			}
			for _, c := range [][]string{
				{"ws://" + name + ":8080/ws"}, {"grpc://" + name + ":8082"}, {"grpc://" + at + ":8082", "--stream", "bidi"}, {"tcp://" + name + ":8083"},
			} {
				args := append([]string{"echo", "call", "--proxy", "", "--body", "ping pong"}, c[1:]...)
				if out, err := p.output("west", append(args, c[0])...); err != nil {
					t.Errorf("%s: %s %v", c, out, err)
				}
			}
			if redis {
				if out, err := p.output("west", "redis-cli", "-h", at, "SET", "key", "value"); err != nil || out != "OK" {
					t.Errorf("redis-cli SET: %q, %v", out, err)
				}
				if out, err := p.output("west", "redis-cli", "-h", name, "GET", "key"); err != nil || out != "value" {
					t.Errorf("redis-cli GET: %q, %v", out, err)
				}
			}
		}
		t.Run("calls", calls)
		t.Run("plaintext is refused", func(t *testing.T) {
			for _, from := range []string{"west", "east"} { // by its address past the mesh; east's own is its own business
				out, err := p.output(from, "curl", "-sS", "--max-time", "5", "http://10.2.0.2:8080/")
				if (err == nil) != (from == "east") {
					t.Errorf("from %s: %s %v", from, out, err)
				}
			}
			out, err := p.core.Output(exec.Command("curl", "-sS", "--max-time", "5", "http://10.2.0.2:8080/"))
			if err == nil {
				t.Errorf("from elsewhere: %s", out)
			}
			out, err = p.output("east", "curl", "-sS", "http://127.0.0.1:15020/metrics")
			if err != nil || !strings.Contains(out, `hanse_plaintext_inbound_total{decision="refused",port="8080",source="10.1.0.2"} 1`) ||
				!strings.Contains(out, `hanse_plaintext_inbound_total{decision="refused",port="8080",source="10.2.0.1"} 1`) {
				t.Errorf("not counted: %v", err)
			}
		})
		t.Run("rules are as configured", func(t *testing.T) {
			for _, cluster := range []string{"west", "east"} {
				if out, err := p.output(cluster, "hanse-proxy", "capture", "show", "--config", filepath.Join(p.dir, cluster, "sidecar.yaml")); err != nil || !strings.Contains(out, "# as ") {
					t.Errorf("%s: %s %v", cluster, out, err)
				}
			}
		})
		t.Run("without control planes", func(t *testing.T) {
			p.kill("west/hansed", "east/hansed")
			calls(t)
			p.eventually(20*time.Second, "the sidecar has kept what it knows", func() error {
				b, err := os.ReadFile(filepath.Join(p.dir, "west", "sidecar", "xds", "xds.state"))
				for _, port := range []string{"8080", "8082", "8083"} {
					if !strings.Contains(string(b), "payments.shop.svc.clusterset.local:"+port) {
						return fmt.Errorf("port %s is not kept (%v)", port, err)
					}
				}
				return nil
			})
			p.kill("west/sidecar") // and it starts again from that
			p.run(p.pod["west"], "west/sidecar", "hanse-proxy", "--config", filepath.Join(p.dir, "west", "sidecar.yaml"))
			p.readyIn(p.pod["west"], "west/sidecar", "127.0.0.1:15020")
			calls(t)
		})
		t.Run("without a sidecar", func(t *testing.T) {
			p.kill("west/sidecar")
			if out, err := p.output("west", "curl", "-sS", "--max-time", "5", "http://10.2.0.1/"); err == nil || !strings.Contains(out, "refused") && !strings.Contains(out, "connect") {
				t.Errorf("went past the mesh: %s %v", out, err)
			}
		})
	})
}

func haveRedis(t *testing.T) bool {
	for _, name := range []string{"redis-server", "redis-cli"} {
		if _, err := exec.LookPath(name); err != nil {
			if os.Getenv("HANSE_NO_SKIP") != "" && os.Getenv("HANSE_WITHOUT_REDIS") == "" {
				t.Fatalf("%s is needed: apt-get install redis-server redis-tools", name)
			}
			t.Logf("NOT TESTED: redis-cli through the mesh: there is no %s", name)
			return false
		}
	}
	return true
}
