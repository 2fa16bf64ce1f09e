package spire

import (
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// kind is where a cluster's identities come from.
type kind string

const (
	ownAgents  kind = "Hanse's authority, our agent"
	spireAgent kind = "Hanse's authority, a real spire-agent"
	realSPIRE  kind = "a real spire-server and its spire-agent"
)

// Each mesh of a run has a network 127.N.0.0/16 to itself.
var (
	firstNet = rand.IntN(128)
	nets     atomic.Int32
)

// mesh is several clusters of real processes on loopback, in one flat network.
type mesh struct {
	*lab
	members []*member
}

// member is a cluster: hansed, a frontend that only calls, and a service "pay-<name>" that no other cluster has.
type member struct {
	m         *mesh
	kind      kind
	name, td  string
	dir       string
	ip        func(host int) string
	spireAPI  string // admin socket of who issues: hansed or spire-server
	agentSock string
	gateway   bool // it is a network of its own, behind a gateway
	remote    bool // spire-server is asked by mTLS, with an administrator's SVID, not by its socket
	serverEnv []string
	federates string // of spire-server's configuration: its bundle endpoint
	rootLife  string // of hansed's own authority; default 2h
	web       string // of hansed's: its https_web bundle endpoint
	sync      string // of spire-agent's configuration
	more      string // of hansed.yaml
	xds       string // of a proxy's configuration: more addresses
	ownSock   string // Workload API of hansed, which then has a spire-agent to itself; "": agentSock

	startServer, stopServer func()
	hansed                  *proc
	agent, ownAgent         *spireAgentOf
	stop                    map[string]func() // of sidecars
}

func newMesh(t *testing.T, kinds map[string]kind, names ...string) *mesh {
	t.Helper()
	dir, err := os.MkdirTemp("", "hs") // short: a socket's path has at most 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	if dir, err = filepath.EvalSymlinks(dir); err != nil { // as spire-agent sees it
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	m := &mesh{lab: &lab{t: t, dir: dir}}
	net := 64 + (firstNet+int(nets.Add(1)))%128
	for i, name := range names {
		c := &member{m: m, kind: kinds[name], name: name, td: name + ".test", dir: filepath.Join(dir, name), ip: func(host int) string { return fmt.Sprintf("127.%d.%d.%d", net, i+1, host) }}
		if err := os.Mkdir(c.dir, 0o700); err != nil {
			t.Fatal(err)
		}
		m.members = append(m.members, c)
	}
	return m
}

// program makes a program that spire-agent's selectors tell from others by its path.
func (c *member) program(role, program string) string {
	c.m.t.Helper()
	path := filepath.Join(c.dir, role)
	if os.Link(tools+program, path) == nil {
		return path
	}
	b, err := os.ReadFile(tools + program)
	if err == nil {
		err = os.WriteFile(path, b, 0o700)
	}
	if err != nil {
		c.m.t.Fatal(err)
	}
	return path
}

func (c *member) save(name, text string) string { return c.m.save(filepath.Join(c.name, name), text) }

func (c *member) start(name, program string, args ...string) (stop func()) {
	c.m.t.Helper()
	return start(c.m.t, filepath.Join(c.dir, name+".log"), program, args...)
}

// hanse runs the CLI at this member.
func (c *member) hanse(stdin string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, tools+"hanse", append([]string{"--socket", filepath.Join(c.dir, "h.sock")}, args...)...)
	cmd.Stdin = strings.NewReader(stdin)
	var out, errs strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s: hanse %s: %w: %s%s", c.name, strings.Join(args, " "), err, out.String(), errs.String())
	}
	return out.String(), nil
}

func (c *member) must(stdin string, args ...string) string {
	c.m.t.Helper()
	out, err := c.hanse(stdin, args...)
	if err != nil {
		c.m.t.Fatal(err)
	}
	return out
}

// spire runs the spire-server CLI at whoever issues for this member.
func (c *member) spire(command string, want ...string) string {
	c.m.t.Helper()
	l := *c.m.lab
	l.socket = c.spireAPI
	return l.run(command, want...)
}

// hansedConfig is hansed.yaml; more is put into its identity section.
func (c *member) hansedConfig(identity, more string) {
	c.save("hansed.yaml", fmt.Sprintf(`cluster: %s
trustDomain: %s
network: %s
dataDir: d
socket: h.sock
identity:
  listen: "%s:7444"
%sfederation: {listen: "%s:7443"}
xds: {listen: "%s:7445"}
bundleEndpoint: {listen: "%s:7446"%s}
admin: {listen: "%s:7440"}
%s`, c.name, c.td, c.network(), c.ip(1), identity, c.ip(1), c.ip(1), c.ip(1), c.web, c.ip(1), more))
}

func (c *member) network() string {
	if c.gateway {
		return c.name
	}
	return "lab"
}

func (c *member) startHansed() {
	c.m.t.Helper()
	c.hansed = run(c.m.t, filepath.Join(c.dir, "hansed.log"), filepath.Join(c.dir, "hansed"), "--config", filepath.Join(c.dir, "hansed.yaml"))
}

const services = `apiVersion: v1
kind: Service
metadata: {name: frontend, namespace: shop}
spec:
  ports:
  - {name: http, port: 8080}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: frontend
  namespace: shop
  labels: {kubernetes.io/service-name: frontend}
  annotations: {hanse.mesh/service-account: frontend}
addressType: IPv4
ports:
- {name: http, port: 8080}
endpoints:
- addresses: [%[2]s]
---
apiVersion: v1
kind: Service
metadata: {name: pay-%[1]s, namespace: shop}
spec:
  ports:
  - {name: http, port: 8080}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: pay-%[1]s
  namespace: shop
  labels: {kubernetes.io/service-name: pay-%[1]s}
  annotations: {hanse.mesh/service-account: pay}
addressType: IPv4
ports:
- {name: http, port: 8080}
endpoints:
- addresses: [%[3]s]
---
apiVersion: multicluster.x-k8s.io/v1alpha1
kind: ServiceExport
metadata: {name: pay-%[1]s, namespace: shop}
---
apiVersion: hanse.mesh/v1alpha1
kind: AccessPolicy
metadata: {name: pay-%[1]s, namespace: shop}
spec:
  targetRefs:
  - {kind: Service, name: pay-%[1]s}
  rules:
  - from: ["spiffe://*/ns/shop/sa/frontend"]
`

// up starts hansed, on a SPIRE of its own where it is of that kind, and applies the services.
func (c *member) up(x509Life string) {
	c.m.t.Helper()
	c.program("hansed", "hansed")
	c.program("frontend", "hanse-proxy")
	c.program("pay", "hanse-proxy")
	c.agentSock = filepath.Join(c.dir, "w.sock")
	life, more := "  x509Life: "+x509Life+"\n", c.more
	if c.gateway {
		c.program("gateway", "hanse-proxy")
		more += fmt.Sprintf("gateways: [\"%s:15443\"]\n", c.ip(9))
	}
	if c.kind == realSPIRE {
		c.startSPIRE()
		host, port := c.serverAddress()
		c.agent = c.spireAgent("spire-agent", c.agentSock, host, port)
		if c.ownSock != "" {
			c.ownAgent = c.spireAgent("own-agent", c.ownSock, host, port)
		}
		server := "unix://" + c.spireAPI
		own := c.ownEntry()
		if c.remote {
			server, own = host+":"+port, ""
			c.spire(fmt.Sprintf("entry create -admin -parentID spiffe://%s/node -spiffeID spiffe://%s/hanse/control-plane -selector unix:path:%s/hansed", c.td, c.td, c.dir), "Entry ID")
		}
		c.hansedConfig(life+c.onSPIRE(server, own), more)
	} else {
		c.spireAPI = filepath.Join(c.dir, "d/spire-server/api.sock")
		c.hansedConfig(life+"  rootLife: "+cmp.Or(c.rootLife, "2h")+"\n", more)
	}
	c.startHansed()
	c.m.eventually(c.name+"'s hansed is ready", func() error { return ready(c.ip(1) + ":7440") })
	c.must("", "apply", "-f", c.save("mesh.yaml", fmt.Sprintf(services, c.name, c.ip(2), c.ip(3))))
	if c.kind == spireAgent {
		c.agent = c.spireAgent("spire-agent", c.agentSock, c.ip(1), "7444")
	}
}

// ownEntry is the part of it that makes the control plane's entry.
func (c *member) ownEntry() string {
	return fmt.Sprintf("    controlPlane:\n    - {parent: \"spiffe://{{.TrustDomain}}/node\", selectors: [\"unix:path:%s/hansed\"]}\n", c.dir)
}

// onSPIRE is the section of hansed.yaml for a cluster on its SPIRE.
func (c *member) onSPIRE(server, own string) string {
	return fmt.Sprintf(`  spire:
    server: %q
    workloadAPI: unix://%s
    linger: 2s
    gateways:
    - {parent: "spiffe://{{.TrustDomain}}/node", selectors: ["unix:path:%s/gateway"]}
%s    entries:
    - {parent: "spiffe://{{.TrustDomain}}/node", selectors: ["unix:path:%s/{{.ServiceAccount}}"]}
`, server, cmp.Or(c.ownSock, c.agentSock), c.dir, own, c.dir)
}

func (c *member) serverAddress() (host, port string) { return c.ip(8), "8081" }

// startSPIRE starts a real spire-server.
func (c *member) startSPIRE() {
	c.m.t.Helper()
	host, port := c.serverAddress()
	c.spireAPI = filepath.Join(c.dir, "s.sock")
	conf := c.save("server.conf", fmt.Sprintf(`server {
  bind_address = %q
  bind_port = %q
  socket_path = %q
  trust_domain = %q
  data_dir = %q
  log_level = "DEBUG"
  ca_key_type = "ec-p256"
  ca_ttl = "24h"
  %s
}
plugins {
  DataStore "sql" { plugin_data { database_type = "sqlite3" connection_string = %q } }
  KeyManager "disk" { plugin_data { keys_path = %q } }
  NodeAttestor "join_token" { plugin_data {} }
}
`, host, port, c.spireAPI, c.td, c.dir, c.federates, filepath.Join(c.dir, "db.sqlite3"), filepath.Join(c.dir, "keys.json")))
	c.startServer = func() {
		c.stopServer = c.start("spire-server", "env", append(slices.Clone(c.serverEnv), tools+"tools/spire-server", "run", "-config", conf)...)
		l := *c.m.lab
		l.socket = c.spireAPI
		c.m.eventually(c.name+"'s spire-server is healthy", func() error { _, err := l.try("healthcheck"); return err })
	}
	c.startServer()
}

// spireAgentOf is a spire-agent that can be stopped and started again.
type spireAgentOf struct {
	start, stop func()
}

// spireAgent starts a real spire-agent, which is spiffe://<td>/node by its join token. It keeps its key, so that it needs none at its next start.
func (c *member) spireAgent(name, socket, host, port string) *spireAgentOf {
	c.m.t.Helper()
	token := c.m.find(c.spire("token generate -spiffeID spiffe://"+c.td+"/node"), `Token: (\S+)`)
	keys := filepath.Join(c.dir, name+"-keys")
	if err := os.Mkdir(keys, 0o700); err != nil {
		c.m.t.Fatal(err)
	}
	conf := c.agentConf(name, socket, host, port, fmt.Sprintf("NodeAttestor \"join_token\" { plugin_data {} }\n  KeyManager \"disk\" { plugin_data { directory = %q } }", keys))
	a := &spireAgentOf{}
	a.start = func() {
		a.stop = c.start(name, tools+"tools/spire-agent", "run", "-config", conf, "-joinToken", token)
	}
	a.start()
	return a
}

// runAgent starts a real spire-agent that attests by a plugin, and keeps its key in memory. Its name is that of its files.
func (c *member) runAgent(name, host, port, attestor string, args ...string) (stop func()) {
	c.m.t.Helper()
	conf := c.agentConf(name, c.agentSock, host, port, attestor+"\n  KeyManager \"memory\" { plugin_data {} }")
	return c.start(name, tools+"tools/spire-agent", append([]string{"run", "-config", conf}, args...)...)
}

func (c *member) agentConf(name, socket, host, port, plugins string) string {
	c.m.t.Helper()
	return c.save(name+".conf", fmt.Sprintf(`agent {
  data_dir = %q
  log_level = "DEBUG"
  server_address = %q
  server_port = %q
  socket_path = %q
  trust_bundle_path = %q
  trust_domain = %q
  %s
}
plugins {
  %s
  WorkloadAttestor "unix" { plugin_data { discover_workload_path = true } }
}
`, filepath.Join(c.dir, name+"-data"), host, port, socket, c.save("bootstrap.pem", c.spire("bundle show")), c.td, c.sync, plugins))
}

// sidecars starts both workloads, after the clusters have joined.
func (c *member) sidecars() {
	c.m.t.Helper()
	if c.kind == spireAgent {
		federates := ""
		for _, o := range c.m.members {
			if o != c {
				federates += " -federatesWith spiffe://" + o.td
			}
		}
		for _, w := range []string{"frontend", "pay"} {
			c.spire(fmt.Sprintf("entry create -parentID spiffe://%s/node -spiffeID spiffe://%s/ns/shop/sa/%s -selector unix:path:%s/%s -x509SVIDTTL 60%s", c.td, c.td, w, c.dir, w, federates), "Entry ID")
		}
	}
	c.start("app", tools+"echo", "serve", "--http", "unix:"+filepath.Join(c.dir, "app.sock"), "--service", "pay-"+c.name, "--cluster", c.name)
	if c.gateway {
		conf := c.save("gateway.yaml", fmt.Sprintf("role: gateway\ncluster: %s\ntrustDomain: %s\nstateDir: gateway-state\nadmin: {listen: \"%s:15020\"}\ngateway: {listen: \"%s:15443\"}\ncontrolPlane:\n%s  xds: [\"%s:7445\"]\n",
			c.name, c.td, c.ip(9), c.ip(9), c.source("gateway", "--gateway"), c.ip(1)))
		c.start("gateway", filepath.Join(c.dir, "gateway"), "--config", conf)
	}
	c.sidecar("frontend")
	c.sidecar("pay")
}

// source is the part of a proxy's configuration by which it gets its identity.
func (c *member) source(w string, of ...string) string {
	c.m.t.Helper()
	if c.kind != ownAgents {
		return fmt.Sprintf("  workloadAPI: unix://%s\n", c.agentSock)
	}
	return fmt.Sprintf("  identity: [\"%s:7444\"]\n  trustBundle: %s\n  tokenFile: %s\n", c.ip(1),
		c.save("bundle.json", c.must("", "trust", "show", c.td, "-o", "bundle")), c.save(w+".token", c.must("", append([]string{"token", "create"}, of...)...)))
}

// sidecar starts that of frontend or pay, with the identities of the member's kind.
func (c *member) sidecar(w string) {
	c.m.t.Helper()
	host, more := c.ip(2), fmt.Sprintf("outbound: {listen: \"%s:15001\"}\n", c.ip(2))
	if w == "pay" {
		host, more = c.ip(3), fmt.Sprintf("outbound: {listen: none}\nworkloads:\n- address: %s\n  ports: {\"8080\": \"unix:%s\"}\n", c.ip(3), filepath.Join(c.dir, "app.sock"))
	}
	conf := c.save(w+".yaml", fmt.Sprintf("role: sidecar\ncluster: %s\ntrustDomain: %s\nnetwork: %s\nnamespace: shop\nstateDir: %s-state\nadmin: {listen: \"%s:15020\"}\nlog: {access: %s.access.log}\ncontrolPlane:\n%s  xds: [\"%s:7445\"%s]\n%s",
		c.name, c.td, c.network(), w, host, w, c.source(w, "--agent", "shop/"+w), c.ip(1), c.xds, more))
	if c.stop == nil {
		c.stop = map[string]func(){}
	}
	c.stop[w] = c.start(w, filepath.Join(c.dir, w), "--config", conf)
}

func ready(addr string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+"/readyz", nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if b, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<10)); resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", resp.Status, b)
	}
	return nil
}

// join joins all members to the first by the CLI, and starts the workloads.
func (m *mesh) join() {
	m.t.Helper()
	first := m.members[0]
	for _, c := range m.members[1:] {
		c.must(first.must("", "token", "create", "--for", c.name), "join", "-")
	}
	for _, c := range m.members {
		m.eventually(c.name+" trusts all", func() error {
			out, err := c.hanse("", "trust", "list", "-o", "json")
			for _, o := range m.members {
				if err == nil && !strings.Contains(out, o.td) {
					err = fmt.Errorf("%s does not trust %s: %s", c.name, o.td, out)
				}
			}
			return err
		})
		c.sidecars()
	}
	for _, c := range m.members {
		for _, host := range []int{2, 3} {
			m.eventually(fmt.Sprintf("sidecar %d of %s is ready", host, c.name), func() error { return ready(c.ip(host) + ":15020") })
		}
	}
	for _, c := range m.members {
		m.eventually(c.name+" is green", func() error {
			out, err := c.hanse("", "status", "-o", "json")
			var s struct {
				OK       bool
				Clusters []any
			}
			if jerr := json.Unmarshal([]byte(out), &s); jerr != nil {
				return errors.Join(err, jerr)
			}
			if !s.OK || len(s.Clusters) != len(m.members) {
				return errors.New(out)
			}
			return nil
		})
	}
}

// load is calls between all pairs of clusters until stop.
type load struct {
	ok, failed atomic.Int64
	stop       func()

	mu    sync.Mutex
	errs  []string         // guarded by mu; the first few
	pairs map[string]int64 // guarded by mu; answered calls
}

func (m *mesh) load() *load {
	ld := &load{pairs: map[string]int64{}}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for _, from := range m.members {
		proxy := &url.URL{Scheme: "http", Host: from.ip(2) + ":15001"}
		client := &http.Client{Transport: &http.Transport{Proxy: http.ProxyURL(proxy)}, Timeout: 10 * time.Second}
		m.t.Cleanup(client.CloseIdleConnections)
		for _, to := range m.members {
			if from == to {
				continue
			}
			pair := string(from.kind) + " → " + string(to.kind)
			wg.Go(func() {
				for ctx.Err() == nil {
					err := call(client, "http://pay-"+to.name+".shop:8080/", to.name)
					ld.mu.Lock()
					if err != nil {
						ld.failed.Add(1)
						if len(ld.errs) < 8 {
							ld.errs = append(ld.errs, fmt.Sprintf("%s %s → %s: %v", time.Now().Format("15:04:05.000"), from.name, to.name, err))
						}
					} else {
						ld.ok.Add(1)
						ld.pairs[pair]++
					}
					ld.mu.Unlock()
					time.Sleep(time.Duration(4*len(m.members)*(len(m.members)-1)) * time.Millisecond)
				}
			})
		}
	}
	ld.stop = sync.OnceFunc(func() { cancel(); wg.Wait() })
	m.t.Cleanup(ld.stop)
	return ld
}

func call(client *http.Client, target, cluster string) error {
	resp, err := client.Get(target)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK || !strings.Contains(string(b), cluster) {
		return fmt.Errorf("%s (%s): %s", resp.Status, resp.Header.Get("hanse-error"), b)
	}
	return nil
}

// none fails the test if a call has failed, or a pair has not called.
func (ld *load) none(m *mesh, during string) {
	m.t.Helper()
	ld.mu.Lock()
	defer ld.mu.Unlock()
	if n := ld.failed.Load(); n > 0 {
		m.t.Errorf("%s: %d of %d calls failed: %s", during, n, n+ld.ok.Load(), strings.Join(ld.errs, "\n"))
	}
	if ld.failed.Load() == 0 {
		m.t.Logf("%s: %d calls between %d pairs of kinds, none failed", during, ld.ok.Load(), len(ld.pairs))
	}
}

// authorities are of what a member's workloads and control plane present.
func (c *member) authorities() (map[string]string, error) {
	out := map[string]string{}
	for what, addr := range map[string]string{"pay": c.ip(3) + ":15008", "control plane": c.ip(1) + ":7445"} {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		d := &tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}, VerifyConnection: func(s tls.ConnectionState) error { //nolint:gosec // looks only
			out[what] = fmt.Sprintf("%x", s.PeerCertificates[0].AuthorityKeyId)
			return nil
		}}}
		conn, err := d.DialContext(ctx, "tcp", addr)
		cancel()
		if err == nil {
			conn.Close()
		}
		if out[what] == "" {
			return nil, fmt.Errorf("%s of %s: %w", what, c.name, err)
		}
	}
	return out, nil
}

// rotate brings a member onto a new root, and revokes the old one where a person does that.
func (c *member) rotate() {
	c.m.t.Helper()
	if c.kind != realSPIRE {
		c.must("", "trust", "rotate")
		return
	}
	before := c.m.find(c.spire("localauthority x509 show"), `Active X\.509 authority:\s+Authority ID: (\S+)`)
	next := c.m.find(c.spire("localauthority x509 prepare"), `Authority ID: (\S+)`)
	// As docs/spire.md says: not before all others, and the own agents, have the new root.
	c.m.eventually(c.name+"'s new root is everywhere", func() error {
		out, err := c.hanse("", "trust", "show", c.td, "-o", "json")
		var row struct {
			Authorities, Missing []string
		}
		if err == nil {
			err = json.Unmarshal([]byte(out), &row)
		}
		if err == nil && (len(row.Authorities) < 2 || len(row.Missing) > 0) {
			err = errors.New(out)
		}
		return err
	})
	c.spire("localauthority x509 activate -authorityID "+next, next)
	c.spire("localauthority x509 taint -authorityID "+before, before)
	c.m.eventually(c.name+"'s SVIDs come from the new root", func() error {
		have, err := c.authorities()
		for what, a := range have {
			if err == nil && a != next {
				err = fmt.Errorf("that of %s comes from %s, want %s", what, a, next)
			}
		}
		return err
	})
	c.spire("localauthority x509 revoke -authorityID "+before, before)
}

// TestMixed is the matrix: every kind of authority and agent calls every other, both ways, while all rotate.
func TestMixed(t *testing.T) {
	m := newMesh(t, map[string]kind{"west": ownAgents, "east": realSPIRE, "north": spireAgent, "south": realSPIRE, "up": ownAgents, "down": spireAgent},
		"west", "east", "north", "south", "up", "down") // two of each kind
	m.members[3].remote = true
	for _, c := range m.members {
		c.up("60s")
	}
	m.join()
	ld := m.load()
	for _, c := range m.members[:3] {
		c.rotate()
		ld.none(m, "rotation of "+c.name+", "+string(c.kind))
	}
	m.members[1].outage()
	ld.none(m, "an outage of a spire-server")
	time.Sleep(5 * time.Second) // what a revocation breaks shows when connections are made anew
	ld.stop()
	ld.none(m, "all")
	if len(ld.pairs) != 9 {
		t.Errorf("%d of 9 pairs of kinds have called", len(ld.pairs))
	}
}

// TestGateways: the same through sealed gateways, of which one has its SVID from SPIRE.
func TestGateways(t *testing.T) {
	m := newMesh(t, map[string]kind{"west": ownAgents, "east": realSPIRE}, "west", "east")
	for _, c := range m.members {
		c.gateway = true
		c.up("60s")
	}
	m.join() // green: the gateways have answered probes with their own SVIDs
	ld := m.load()
	m.eventually("calls both ways", func() error {
		ld.mu.Lock()
		defer ld.mu.Unlock()
		if len(ld.pairs) != 2 || ld.ok.Load() < 200 {
			return fmt.Errorf("%v", ld.pairs)
		}
		return nil
	})
	ld.stop()
	ld.none(m, "through gateways")
}

const late = `apiVersion: v1
kind: Service
metadata: {name: late, namespace: shop}
spec:
  ports:
  - {name: http, port: 8080}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: late
  namespace: shop
  labels: {kubernetes.io/service-name: late}
  annotations: {hanse.mesh/service-account: late}
addressType: IPv4
ports:
- {name: http, port: 8080}
endpoints:
- addresses: [%s]
`

// status is whether all is well here, and what hanse status says.
func (c *member) status() (ok bool, text string) {
	out, err := c.hanse("", "status", "-o", "json")
	var s struct{ OK bool }
	if jerr := json.Unmarshal([]byte(out), &s); jerr != nil {
		return false, fmt.Sprint(err, out)
	}
	return s.OK, out
}

// entries waits until the spire-server has so many entries of a service account in namespace shop.
func (c *member) entries(account string, want int) {
	c.m.t.Helper()
	c.m.eventually(fmt.Sprintf("%d entries of %s", want, account), func() error {
		l := *c.m.lab
		l.socket = c.spireAPI
		out, err := l.try("entry", "show", "-spiffeID", "spiffe://"+c.td+"/ns/shop/sa/"+account)
		if err == nil && !strings.Contains(out, fmt.Sprintf("Found %d entr", want)) {
			err = errors.New(out)
		}
		return err
	})
}

// outage takes the spire-server away for a while, in which a service comes: what it needs is there when the server is back, and goes
// when the service does.
func (c *member) outage() {
	c.m.t.Helper()
	c.stopServer()
	c.must("", "apply", "-f", c.save("late.yaml", fmt.Sprintf(late, c.ip(4))))
	c.m.eventually("status says that SPIRE is away", func() error {
		if ok, text := c.status(); ok || !strings.Contains(text, "the last good state stays in force") {
			return errors.New(text)
		}
		return nil
	})
	c.startServer()
	c.entries("late", 1)
	c.m.eventually("hanse identity list shows the entry on SPIRE", func() error {
		out, err := c.hanse("", "identity", "list", "-o", "json")
		if err == nil && !strings.Contains(out, "unix:path:"+c.dir+"/late") {
			err = errors.New(out)
		}
		return err
	})
	c.green()
	c.must("", "delete", "endpointslices", "late", "-n", "shop")
	c.must("", "delete", "services", "late", "-n", "shop")
	c.entries("late", 0)
}
