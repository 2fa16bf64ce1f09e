//go:build linux

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hanse-mesh/hanse/test/kube/lab"
)

// spire is a SPIRE that a cluster's people had before Hanse: spire-server, spire-agent with its own attestor of Pods and the SPIFFE CSI driver, unmodified,
// on the cluster's only node.
type spire struct {
	c       *cluster
	dir     string
	sockets string // directory of the agent's socket on the nodes
	server  *exec.Cmd
}

func (c *cluster) spire() *spire {
	c.s.t.Helper()
	sp := &spire{c: c, dir: filepath.Join(os.Getenv(stateDir), "spire-"+c.Name), sockets: filepath.Join(os.Getenv(stateDir), "spire-"+c.Name, "run")}
	for _, dir := range []string{sp.dir, sp.sockets, sp.path("agent")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			c.s.t.Fatal(err)
		}
	}
	sp.write("resolv.conf", "search cluster.local\noptions ndots:5\nnameserver "+c.IP+"\n")
	sp.write("server.conf", fmt.Sprintf(`server {
  bind_address = "0.0.0.0"
  bind_port = "8081"
  socket_path = %q
  trust_domain = "%s.example"
  data_dir = %q
  ca_key_type = "ec-p256"
}
plugins {
  DataStore "sql" { plugin_data { database_type = "sqlite3" connection_string = %q } }
  KeyManager "disk" { plugin_data { keys_path = %q } }
  NodeAttestor "join_token" { plugin_data {} }
}
`, sp.path("api.sock"), c.Name, sp.dir, sp.path("db.sqlite3"), sp.path("keys.json")))
	sp.start()
	token := sp.find(`Token: (\S+)`, "token", "generate", "-spiffeID", sp.id("nodes"))
	sp.write("agent.conf", fmt.Sprintf(`agent {
  server_address = %q
  server_port = "8081"
  socket_path = %q
  trust_domain = "%s.example"
  data_dir = %q
  insecure_bootstrap = true
}
plugins {
  NodeAttestor "join_token" { plugin_data {} }
  KeyManager "memory" { plugin_data {} }
  WorkloadAttestor "k8s" { plugin_data { skip_kubelet_verification = true use_anonymous_authentication = true } }
}
`, c.IP, filepath.Join(sp.sockets, "spire-agent.sock"), c.Name, sp.path("agent")))
	sp.run("spire-agent", "run", "-config", sp.path("agent.conf"), "-joinToken", token)
	sp.driver()
	return sp
}

// driver makes the agent's socket a volume.
func (sp *spire) driver() {
	sp.c.s.t.Helper()
	const name = "csi.spiffe.io"
	dir, node := "/var/lib/kubelet/plugins/"+name, sp.c.Nodes[0]
	if out, err := node.Command(sp.c.s.ctx, "mkdir", "-p", dir).CombinedOutput(); err != nil {
		sp.c.s.t.Fatalf("%v: %s", err, out)
	}
	sp.follow("spiffe-csi-driver", node.Command(sp.c.s.ctx, sp.tool("spiffe-csi-driver"), "-node-id", node.Name, "-csi-socket-path", dir+"/csi.sock", "-workload-api-socket-dir", sp.sockets))
	sp.follow("csi-registrar", node.Command(sp.c.s.ctx, sp.tool("csi-registrar"), name, dir+"/csi.sock"))
	sp.c.apply(`apiVersion: storage.k8s.io/v1
kind: CSIDriver
metadata: {name: ` + name + `}
spec: {attachRequired: false, podInfoOnMount: true, fsGroupPolicy: None, volumeLifecycleModes: [Ephemeral]}
`)
	sp.c.s.until(30*time.Second, func() error {
		out, err := sp.c.Kubectl(sp.c.s.ctx, "get", "csinode", node.Name, "-o", "jsonpath={.spec.drivers[*].name}")
		if err == nil && out != name {
			err = fmt.Errorf("the kubelet's drivers: %q", out)
		}
		return err
	})
}

func (sp *spire) path(name string) string { return filepath.Join(sp.dir, name) }

func (sp *spire) id(path string) string { return "spiffe://" + sp.c.Name + ".example/" + path }

func (sp *spire) write(name, text string) {
	sp.c.s.t.Helper()
	if err := os.WriteFile(sp.path(name), []byte(text), 0o600); err != nil {
		sp.c.s.t.Fatal(err)
	}
}

// tool is the path of a program.
func (sp *spire) tool(name string) string {
	sp.c.s.t.Helper()
	exe, err := filepath.Abs(filepath.Join(bin, "tools", name))
	if err != nil {
		sp.c.s.t.Fatal(err)
	}
	return exe
}

// run runs a program in the node's network, where names of the cluster resolve.
func (sp *spire) run(program string, args ...string) *exec.Cmd {
	sp.c.s.t.Helper()
	return sp.follow(program, sp.c.Command(sp.c.s.ctx, "unshare", append([]string{"-m", "sh", "-c", `mount --bind "$0" /etc/resolv.conf && exec "$@"`, sp.path("resolv.conf"), sp.tool(program)}, args...)...))
}

// follow starts a program, which ends with the test. Its log is NAME.log.
func (sp *spire) follow(name string, cmd *exec.Cmd) *exec.Cmd {
	sp.c.s.t.Helper()
	log, err := os.OpenFile(sp.path(name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		sp.c.s.t.Fatal(err)
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		sp.c.s.t.Fatal(err)
	}
	return cmd
}

func (sp *spire) start() {
	sp.c.s.t.Helper()
	sp.server = sp.run("spire-server", "run", "-config", sp.path("server.conf"))
	sp.c.s.until(30*time.Second, func() error { _, err := sp.try("healthcheck"); return err })
}

func (sp *spire) stop() {
	_ = sp.server.Process.Signal(syscall.SIGTERM)
	_ = sp.server.Wait()
}

// try runs `spire-server` as its administrator.
func (sp *spire) try(args ...string) (string, error) {
	out, err := exec.CommandContext(sp.c.s.ctx, sp.tool("spire-server"), append(args, "-socketPath", sp.path("api.sock"))...).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("spire-server %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return string(out), err
}

func (sp *spire) find(pattern string, args ...string) string {
	sp.c.s.t.Helper()
	out, err := sp.try(args...)
	m := regexp.MustCompile(pattern).FindStringSubmatch(out)
	if err != nil || m == nil {
		sp.c.s.t.Fatalf("spire-server %s: want %s: %v, %s", strings.Join(args, " "), pattern, err, out)
	}
	return m[1]
}

// TestOnSPIRE: a cluster whose Pods have their identity from a SPIRE of its own, and one of Hanse's authority, are one mesh, while SPIRE rotates, is away, and everything is started anew.
func TestOnSPIRE(t *testing.T) {
	s := up(t, lab.Config{})
	west, east := s.west, s.east
	var sp *spire
	var before []string
	s.step("a SPIRE, and what it has to know of Hanse", func() {
		sp = west.spire()
		before = west.objects()
		sp.find(`(Entry ID)`, "entry", "create", "-admin", "-parentID", sp.id("nodes"), "-spiffeID", sp.id("hanse/control-plane"), "-selector", "k8s:ns:"+system, "-selector", "k8s:sa:hansed")
	})
	t.Cleanup(func() {
		for _, name := range []string{"spire-server.log", "spire-agent.log", "spiffe-csi-driver.log", "csi-registrar.log"} {
			if b, err := os.ReadFile(sp.path(name)); err == nil && t.Failed() {
				t.Logf("%s:\n%s", name, b[max(0, len(b)-6000):])
			}
		}
	})
	s.step("install", func() {
		s.install(west, "identity.spire.server="+west.IP+":8081")
		s.install(east)
		s.t.Logf("%s", s.hanse("check", "--context", "west"))
		s.t.Logf("%s", s.hanse("--context", "west", "status"))
	})
	s.step("join and inject", func() {
		s.hanse("join", "--context", "east", "--to-context", "west")
		for _, c := range s.both() {
			c.apply(shop(c.Name))
		}
		for _, c := range s.both() {
			for _, d := range []string{"payments", "frontend", "stranger"} {
				c.kubectl("-n", "shop", "rollout", "status", "deployment/"+d, "--timeout=120s")
				c.holdsInjected(d)
			}
			c.export("payments")
		}
		s.until(time.Minute, func() error { return s.joined(west, east) })
		s.until(time.Minute, func() error { return s.joined(east, west) })
		if out, err := sp.try("entry", "show", "-spiffeID", sp.id("ns/shop/sa/frontend")); err != nil || !strings.Contains(out, "k8s:sa:frontend") || !strings.Contains(out, "k8s:ns:shop") || !strings.Contains(out, "hanse-") {
			s.t.Errorf("frontend's entry on spire-server: %v, %s", err, out)
		}
	})
	const payments = "http://payments.shop.svc.clusterset.local:8080/"
	s.step("calls both ways", func() {
		for _, c := range s.both() {
			other := s.west
			if c == west {
				other = s.east
			}
			s.until(20*time.Second, func() error { return c.answered("frontend", payments, c.Name) })
			c.kubectl("-n", "shop", "scale", "deployment/payments", "--replicas=0")
			s.until(30*time.Second, func() error { return c.answered("frontend", payments, other.Name) })
			if a := c.mustCall("frontend", payments).Answer; a.Caller != "spiffe://"+c.Name+".example/ns/shop/sa/frontend" {
				s.t.Errorf("%s called %s as %q", c.Name, a.Cluster, a.Caller)
			}
			c.mustFail("stranger", payments, "403")
			c.kubectl("-n", "shop", "scale", "deployment/payments", "--replicas=2")
			c.kubectl("-n", "shop", "rollout", "status", "deployment/payments", "--timeout=60s")
		}
	})
	s.step("under load: SPIRE rotates", func() {
		for _, c := range s.both() {
			for _, d := range []string{"load", "load-grpc"} {
				c.kubectl("-n", "shop", "scale", "deployment/"+d, "--replicas=1")
				c.kubectl("-n", "shop", "rollout", "status", "deployment/"+d, "--timeout=60s")
			}
		}
		west.kubectl("-n", "shop", "scale", "deployment/payments", "--replicas=0") // so that all calls cross
		s.until(30*time.Second, func() error { return west.answered("frontend", payments, "east") })
		load := west.load()
		old := sp.find(`Active X\.509 authority:\s+Authority ID: (\S+)`, "localauthority", "x509", "show")
		next := sp.find(`Authority ID: (\S+)`, "localauthority", "x509", "prepare")
		s.until(time.Minute, func() error {
			var row struct{ Authorities, Missing []string }
			out, err := s.tryHanse("--context", "west", "trust", "show", "west.example", "-o", "json")
			if err == nil {
				err = json.Unmarshal([]byte(out), &row)
			}
			if err == nil && (len(row.Authorities) < 2 || len(row.Missing) > 0) {
				err = errors.New(out)
			}
			return err
		})
		sp.find(`(Activated|Active)`, "localauthority", "x509", "activate", "-authorityID", next)
		sp.find(`(?i)(tainted)`, "localauthority", "x509", "taint", "-authorityID", old)
		s.until(time.Minute, func() error { return west.answered("frontend", payments, "east") })
		time.Sleep(12 * time.Second) // load: agents sync every 5 s, and renew what is tainted
		sp.find(`(?i)(revoked)`, "localauthority", "x509", "revoke", "-authorityID", old)
		s.until(time.Minute, func() error { return west.answered("frontend", payments, "east") })
		load.mustHaveServed(500)
	})
	s.step("under load: SPIRE is away, and everything of Hanse is started anew", func() {
		load := west.load()
		sp.stop()
		time.Sleep(10 * time.Second) // load
		sp.start()
		for _, w := range [][2]string{{system, "statefulset/hansed"}, {system, "deployment/hanse-gateway"}, {"shop", "deployment/frontend"}, {"shop", "deployment/load"}} {
			west.restart(w[0], w[1])
		}
		s.until(time.Minute, func() error { return s.joined(west, east) })
		load.mustHaveServed(500)
	})
	s.step("under load: from the CSI driver to a directory of the node", func() {
		load := west.load()
		s.hanse("upgrade", "--context", "west", "--image-tag", version, "--set", "identity.spire.hostPath="+sp.sockets, "--yes", "--timeout", "3m")
		west.restart("shop", "deployment/frontend")
		west.restart("shop", "deployment/load")
		if out := west.kubectl("-n", "shop", "get", "pods", "-l", "app=frontend", "-o", "jsonpath={.items[*].spec.volumes[*].hostPath.path}"); out != sp.sockets {
			s.t.Errorf("frontend's volumes of the node: %q", out)
		}
		west.mustCall("frontend", payments)
		load.mustHaveServed(200)
	})
	s.step("leave, uninstall, and what is left", func() {
		s.hanse("--context", "west", "leave", "--yes")
		s.until(30*time.Second, func() error { return s.hasLeft("east", "west") })
		west.kubectl("delete", "namespace", "shop", "--timeout=60s")
		s.until(2*time.Minute, func() error { // entries go a minute after their workloads
			out, err := sp.try("entry", "show")
			if err == nil && strings.Contains(out, "/ns/shop/") {
				err = errors.New(out)
			}
			return err
		})
		s.hanse("uninstall", "--context", "west", "--yes")
		s.until(30*time.Second, func() error { return same(before, west.objects()) })
	})
}
