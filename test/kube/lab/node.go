//go:build linux

package lab

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const cniPlugins = "/usr/lib/cni"

// Node is a machine of a Cluster, on which its Pods run.
type Node struct {
	Name string
	IP   string // which other nodes reach

	c    *Cluster
	net  string // its network namespace
	dir  string
	pods []string // ranges: one, or one of each family
	pid  int      // containerd's, whose mounts are the node's
}

func (n *Node) path(name string) string { return filepath.Join(n.dir, name) }

// kubelet is the kubelet's name among the users of the cluster, and before .conf that of its kubeconfig.
func (n *Node) kubelet() string { return "kubelet-" + n.net }

// ips are its addresses.
func (n *Node) ips() string {
	if n.c.lab.cfg.Dual {
		return n.IP + "," + sixth(n.IP)
	}
	return n.IP
}

// in are nsenter's arguments for its mounts and network.
func (n *Node) in() []string { return []string{"-t", fmt.Sprint(n.pid), "-m", "-n"} }

// Command is a program to be run on the node, among its mounts and in its network.
func (n *Node) Command(ctx context.Context, program string, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "nsenter", append(append(n.in(), program), args...)...)
}

// ctr runs a command of `ctr images`.
func (n *Node) ctr(ctx context.Context, args ...string) error {
	_, err := run("", n.Command(ctx, "ctr", append([]string{"-n", "k8s.io", "images"}, args...)...))
	return err
}

// start starts a program in its network.
func (n *Node) start(name, program string, args ...string) (*exec.Cmd, error) {
	return n.c.lab.start(n.path(name+".log"), "nsenter", append([]string{"--net=/run/netns/" + n.net, program}, args...)...)
}

// up starts containerd, kubelet and kube-proxy. containerd and kubelet have mounts of their own, bound to directories of the lab where they would use the machine's.
func (n *Node) up(ctx context.Context) error {
	binds := ""
	for at, to := range map[string]string{"run-containerd": "/run/containerd", "lib-containerd": "/var/lib/containerd", "lib-kubelet": "/var/lib/kubelet", "log-pods": "/var/log/pods",
		"log-containers": "/var/log/containers", "lib-cni": "/var/lib/cni", "etc-cni": "/etc/cni/net.d", "pki": ""} {
		if err := os.MkdirAll(n.path(at), 0o755); err != nil {
			return err
		}
		if to != "" {
			binds += fmt.Sprintf("mkdir -p %s && mount --bind %s %s && ", to, n.path(at), to)
		}
	}
	if err := n.writeFiles(); err != nil {
		return err
	}
	if err := makeCgroups(n.net); err != nil {
		return err
	}
	containerd, err := n.start("containerd", "unshare", "-m", "--propagation", "private", "sh", "-c", "mount --make-rshared / && mount -t tmpfs none /run/netns && "+binds+"exec containerd -c "+n.path("containerd.toml"))
	if err != nil {
		return err
	}
	n.pid = containerd.Process.Pid
	if err := eventually(ctx, 30*time.Second, func() error {
		_, err := run("", n.Command(ctx, "ctr", "--connect-timeout", "1s", "version"))
		return err
	}); err != nil {
		return fmt.Errorf("containerd (%s): %w", n.path("containerd.log"), err)
	}
	for _, archive := range n.c.lab.cfg.Images {
		archive, err := filepath.Abs(archive)
		if err != nil {
			return err
		}
		if err := n.ctr(ctx, "import", archive); err != nil {
			return err
		}
	}
	if _, err := n.c.lab.start(n.path("kubelet.log"), "nsenter", append(n.in(), n.c.tool("kubelet"), "--kubeconfig="+n.c.path(n.kubelet()+".conf"), "--config="+n.path("kubelet.yaml"), "--hostname-override="+n.Name,
		"--node-ip="+n.ips(), "--root-dir=/var/lib/kubelet", "--cert-dir="+n.path("pki"))...); err != nil {
		return err
	}
	_, err = n.start("kube-proxy", n.c.tool("kube-proxy"), "--config="+n.path("proxy.yaml"))
	return err
}

func (n *Node) writeFiles() error {
	c := n.c
	ranges, routes := "", ""
	for i, subnet := range n.pods {
		ranges += fmt.Sprintf(`,[{"subnet":%q}]`, subnet)
		routes += fmt.Sprintf(`,{"dst":%q}`, []string{"0.0.0.0/0", "::/0"}[i])
	}
	for name, text := range map[string]string{
		"etc-cni/10-lab.conflist": fmt.Sprintf(`{"cniVersion":"1.0.0","name":"lab","plugins":[
{"type":"bridge","bridge":"cni0","isGateway":true,"hairpinMode":true,"ipMasq":%v,"ipam":{"type":"host-local","dataDir":"/var/lib/cni/networks","ranges":[%s],"routes":[%s]}},
{"type":"portmap","capabilities":{"portMappings":true}}]}`, c.lab.masquerades(), ranges[1:], routes[1:]),
		"containerd.toml": fmt.Sprintf(`version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = %q
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = %q
    conf_dir = "/etc/cni/net.d"
`, c.lab.cfg.Pause, cniPlugins),
		"resolv.conf": "nameserver 127.0.0.1\n",
		"kubelet.yaml": fmt.Sprintf(`apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
cgroupDriver: cgroupfs
cgroupRoot: /%s
failCgroupV1: false
failSwapOn: false
clusterDNS: [%q]
clusterDomain: cluster.local
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
resolvConf: %s
evictionHard: {memory.available: 100Mi, nodefs.available: 1%%, imagefs.available: 1%%}
imageGCHighThresholdPercent: 100
`, cgroup(n.net), c.IP, n.path("resolv.conf")),
		"proxy.yaml": fmt.Sprintf(`apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
clientConnection: {kubeconfig: %s}
mode: nftables
clusterCIDR: %s
hostnameOverride: %s
conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
`, c.path("admin.conf"), strings.Join(c.pods, ","), n.Name),
	} {
		if err := os.WriteFile(n.path(name), []byte(text), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// cgroupPrefix is before the number of the process outside, and the name of a cluster.
const cgroupPrefix = "hanse-clusters-"

func cgroup(name string) string { return cgroupPrefix + os.Getenv(inside) + "-" + name }

// roots are where a cgroup of the lab has to be: in each hierarchy of version 1, or in that of version 2.
func roots() []string {
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		return []string{"/sys/fs/cgroup"}
	}
	all, _ := filepath.Glob("/sys/fs/cgroup/*/cgroup.procs")
	var out []string
	for _, p := range all {
		if d := filepath.Dir(p); filepath.Base(d) != "unified" {
			out = append(out, d)
		}
	}
	return out
}

func makeCgroups(name string) error {
	for _, root := range roots() {
		if _, err := os.Stat(root + "/cgroup.controllers"); err == nil {
			for _, controller := range []string{"cpuset", "cpu", "memory", "pids", "hugetlb"} {
				_ = os.WriteFile(root+"/cgroup.subtree_control", []byte("+"+controller), 0o644) // those that there are
			}
		}
		dir := filepath.Join(root, cgroup(name))
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		for _, f := range []string{"cpuset.cpus", "cpuset.mems"} { // of version 1, where a new one is empty and takes nobody
			b, err := os.ReadFile(filepath.Join(root, f))
			if err != nil || root == "/sys/fs/cgroup" {
				continue
			}
			if err := os.WriteFile(filepath.Join(dir, f), []byte(strings.TrimSpace(string(b))), 0o644); err != nil {
				return err
			}
		}
	}
	return nil
}

// sweep removes the cgroups of labs that have ended: directories that hold nobody.
func sweep() {
	// Besides roots there is "unified", where runc makes empty ones beside those of version 1.
	for _, root := range append(roots(), "/sys/fs/cgroup/unified") {
		labs, _ := filepath.Glob(filepath.Join(root, cgroupPrefix+"*"))
		for _, lab := range labs {
			owner, _, _ := strings.Cut(strings.TrimPrefix(filepath.Base(lab), cgroupPrefix), "-")
			if pid, err := strconv.Atoi(owner); err != nil || pid != os.Getpid() && syscall.Kill(pid, 0) == nil {
				continue
			}
			var dirs []string
			_ = filepath.WalkDir(lab, func(p string, d os.DirEntry, err error) error {
				if err == nil && d.IsDir() {
					dirs = append(dirs, p)
				}
				return nil
			})
			for i := len(dirs) - 1; i >= 0; i-- {
				_ = os.Remove(dirs[i])
			}
		}
	}
}
