//go:build linux

package lab

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// Cluster is one Kubernetes cluster.
type Cluster struct {
	Name       string
	IP         string // of its first node, on which its control plane is
	Kubeconfig string // of an administrator, with a context of the cluster's name; it works in the networks of the nodes only
	Nodes      []*Node

	lab      *Lab
	dir      string
	pods     []string // ranges: one, or one of each family
	services []string
}

const apiPort = 6443

func (l *Lab) cluster(name string, i int) *Cluster {
	dir := filepath.Join(l.cfg.Dir, name)
	c := &Cluster{Name: name, IP: nodeIP(i, 0), Kubeconfig: filepath.Join(dir, "admin.conf"), lab: l, dir: dir, pods: []string{podRange(i)}, services: []string{fmt.Sprintf("10.%d.0.0/16", 96+i)}}
	if l.cfg.Dual {
		c.pods, c.services = append(c.pods, podRange6(i)), append(c.services, fmt.Sprintf("fd00:%d::/112", 96+i))
	}
	for n := range l.cfg.Nodes {
		node := &Node{Name: "node-" + netOf(name, n), IP: nodeIP(i, n), c: c, net: netOf(name, n), dir: dir, pods: []string{podsOf(i, n)}}
		if n > 0 {
			node.dir = filepath.Join(dir, fmt.Sprint("node-", n+1))
		}
		if l.cfg.Dual {
			node.pods = append(node.pods, podsOf6(i, n))
		}
		c.Nodes = append(c.Nodes, node)
	}
	return c
}

func (c *Cluster) path(name string) string { return filepath.Join(c.dir, name) }
func (c *Cluster) tool(name string) string { return filepath.Join(c.lab.cfg.Tools, name) }

func (c *Cluster) write(name, text string) error {
	return os.WriteFile(c.path(name), []byte(text), 0o600)
}

// start starts a program in the node's network.
func (c *Cluster) start(name, program string, args ...string) (*exec.Cmd, error) {
	return c.lab.start(c.path(name+".log"), "nsenter", append([]string{"--net=/run/netns/" + c.Name, program}, args...)...)
}

// Command is a program to be run in the node's network, with KUBECONFIG set.
func (c *Cluster) Command(ctx context.Context, program string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"--net=/run/netns/" + c.Name, program}, args...)...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+c.Kubeconfig)
	return cmd
}

// Kubectl runs kubectl as the cluster's administrator, and returns what it said.
func (c *Cluster) Kubectl(ctx context.Context, args ...string) (string, error) {
	return run("", c.Command(ctx, c.tool("kubectl"), args...))
}

// Apply applies manifests, server-side.
func (c *Cluster) Apply(ctx context.Context, yaml string) error {
	_, err := run(yaml, c.Command(ctx, c.tool("kubectl"), "apply", "--server-side", "--force-conflicts", "-f", "-"))
	return err
}

// LoadImage makes the nodes have the images of an OCI archive.
func (c *Cluster) LoadImage(ctx context.Context, archive string) error {
	archive, err := filepath.Abs(archive)
	if err != nil {
		return err
	}
	return c.ctr(ctx, "import", archive)
}

// TagImage gives an image of the nodes a second name.
func (c *Cluster) TagImage(ctx context.Context, image, as string) error {
	return c.ctr(ctx, "tag", image, as)
}

func (c *Cluster) ctr(ctx context.Context, args ...string) error {
	for _, n := range c.Nodes {
		if err := n.ctr(ctx, args...); err != nil {
			return err
		}
	}
	return nil
}

func (c *Cluster) up(ctx context.Context) error {
	if err := os.MkdirAll(c.path("pki"), 0o700); err != nil {
		return err
	}
	if err := c.controlPlane(ctx); err != nil {
		return err
	}
	for _, n := range c.Nodes {
		if err := n.up(ctx); err != nil {
			return err
		}
	}
	if _, err := c.start("coredns", c.tool("coredns"), "-conf", c.path("Corefile")); err != nil {
		return err
	}
	for _, n := range c.Nodes {
		if err := eventually(ctx, time.Minute, func() error {
			out, err := c.Kubectl(ctx, "get", "node", n.Name, "-o", `jsonpath={.status.conditions[?(@.type=="Ready")].status}`)
			if err == nil && out != "True" {
				err = fmt.Errorf("%s is not ready (%s)", n.Name, n.path("kubelet.log"))
			}
			return err
		}); err != nil {
			return err
		}
	}
	return nil
}

// controlPlane starts what is not a node.
func (c *Cluster) controlPlane(ctx context.Context) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	if err := c.write("sa.key", string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}))); err != nil {
		return err
	}
	users := map[string][2]string{"admin": {"admin", "system:masters"}, "cm": {"system:kube-controller-manager", ""}, "sched": {"system:kube-scheduler", ""},
		"proxy": {"system:kube-proxy", ""}}
	for _, n := range c.Nodes {
		users[n.kubelet()] = [2]string{"system:node:" + n.Name, "system:nodes"}
	}
	var tokens strings.Builder
	for name, u := range users {
		secret := rand.Text()
		fmt.Fprintf(&tokens, "%s,%s,%s,%q\n", secret, u[0], name, u[1])
		err := c.write(name+".conf", fmt.Sprintf(`apiVersion: v1
kind: Config
clusters: [{name: %[1]q, cluster: {server: "https://%[2]s:%[3]d", certificate-authority: %[4]s}}]
users: [{name: %[1]q, user: {token: %[5]s}}]
contexts: [{name: %[1]q, context: {cluster: %[1]q, user: %[1]q}}]
current-context: %[1]q
`, c.Name, c.IP, apiPort, c.path("pki/apiserver.crt"), secret))
		if err != nil {
			return err
		}
	}
	for file, text := range map[string]string{"Corefile": c.corefile(), "hosts": ""} {
		if err := c.write(file, text); err != nil {
			return err
		}
	}
	if err := c.write("tokens.csv", tokens.String()); err != nil {
		return err
	}
	const client, peer = "http://127.0.0.1:2379", "http://127.0.0.1:2380"
	if _, err := c.start("etcd", c.tool("etcd"), "--name=d", "--data-dir="+c.path("etcd"), "--listen-client-urls="+client, "--advertise-client-urls="+client, "--listen-peer-urls="+peer,
		"--initial-advertise-peer-urls="+peer, "--initial-cluster=d="+peer, "--unsafe-no-fsync"); err != nil {
		return err
	}
	if _, err := c.start("kube-apiserver", c.tool("kube-apiserver"), "--etcd-servers="+client, "--bind-address="+c.IP, fmt.Sprintf("--secure-port=%d", apiPort), "--advertise-address="+c.IP, "--endpoint-reconciler-type=lease",
		"--cert-dir="+c.path("pki"), "--service-account-issuer=https://kubernetes.default.svc", "--service-account-key-file="+c.path("sa.key"), "--service-account-signing-key-file="+c.path("sa.key"),
		"--service-cluster-ip-range="+strings.Join(c.services, ","), "--token-auth-file="+c.path("tokens.csv"), "--authorization-mode=Node,RBAC", "--allow-privileged=true", "--kubelet-preferred-address-types=InternalIP"); err != nil {
		return err
	}
	if err := eventually(ctx, 2*time.Minute, func() error {
		out, err := c.Kubectl(ctx, "get", "--raw", "/readyz")
		if err == nil && out != "ok" {
			err = fmt.Errorf("the API server is not ready: %s", out)
		}
		return err
	}); err != nil {
		return fmt.Errorf("%w (%s)", err, c.path("kube-apiserver.log"))
	}
	if _, err := c.start("kube-controller-manager", c.tool("kube-controller-manager"), "--kubeconfig="+c.path("cm.conf"), "--leader-elect=false", "--use-service-account-credentials=true",
		"--service-account-private-key-file="+c.path("sa.key"), "--root-ca-file="+c.path("pki/apiserver.crt"), "--cluster-cidr="+strings.Join(c.pods, ","), "--allocate-node-cidrs=true", "--service-cluster-ip-range="+strings.Join(c.services, ","),
		"--bind-address=127.0.0.1", "--cert-dir="+c.path("pki")); err != nil {
		return err
	}
	if _, err := c.start("kube-scheduler", c.tool("kube-scheduler"), "--kubeconfig="+c.path("sched.conf"), "--leader-elect=false", "--bind-address=127.0.0.1", "--cert-dir="+c.path("pki")); err != nil {
		return err
	}
	return eventually(ctx, time.Minute, func() error {
		_, err := c.Kubectl(ctx, "get", "serviceaccount", "default", "-o", "name")
		return err
	})
}

// corefile is the configuration of the cluster's DNS.
func (c *Cluster) corefile() string {
	return fmt.Sprintf(`.:53 {
  bind %[1]s
  errors
  hosts %[3]s {
    ttl 1
    reload 1s
    fallthrough
  }
  kubernetes cluster.local {
    kubeconfig %[2]s
    pods insecure
  }
  cache 1
}
clusterset.local.:53 {
  bind %[1]s
  errors
  kubernetes clusterset.local {
    kubeconfig %[2]s
    multicluster clusterset.local
  }
  cache 1
}
`, c.IP, c.path("admin.conf"), c.path("hosts"))
}

// SetName makes the cluster's DNS answer a name with addresses, within two seconds; none: no more.
func (c *Cluster) SetName(name string, ips ...string) error {
	b, err := os.ReadFile(c.path("hosts"))
	if err != nil {
		return err
	}
	var lines []string
	for line := range strings.Lines(string(b)) {
		if !strings.HasSuffix(strings.TrimSpace(line), " "+name) {
			lines = append(lines, line)
		}
	}
	for _, ip := range ips {
		lines = append(lines, ip+" "+name+"\n")
	}
	return c.write("hosts", strings.Join(lines, ""))
}
