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

// startNode starts containerd, kubelet, kube-proxy and the cluster's DNS. containerd and kubelet have mounts of their own, bound to directories of the lab where they would use the
// machine's.
func (c *Cluster) startNode(ctx context.Context) error {
	binds := ""
	for at, to := range map[string]string{"run-containerd": "/run/containerd", "lib-containerd": "/var/lib/containerd", "lib-kubelet": "/var/lib/kubelet", "log-pods": "/var/log/pods",
		"log-containers": "/var/log/containers", "lib-cni": "/var/lib/cni", "etc-cni": "/etc/cni/net.d"} {
		if err := os.MkdirAll(c.path(at), 0o755); err != nil {
			return err
		}
		binds += fmt.Sprintf("mkdir -p %s && mount --bind %s %s && ", to, c.path(at), to)
	}
	if err := c.writeNodeFiles(); err != nil {
		return err
	}
	if err := makeCgroups(c.Name); err != nil {
		return err
	}
	containerd, err := c.start("containerd", "unshare", "-m", "--propagation", "private", "sh", "-c", "mount --make-rshared / && mount -t tmpfs none /run/netns && "+binds+"exec containerd -c "+c.path("containerd.toml"))
	if err != nil {
		return err
	}
	c.pid = containerd.Process.Pid
	if err := eventually(ctx, 30*time.Second, func() error {
		_, err := run("", exec.CommandContext(ctx, "nsenter", append(c.node(), "ctr", "--connect-timeout", "1s", "version")...))
		return err
	}); err != nil {
		return fmt.Errorf("containerd (%s): %w", c.path("containerd.log"), err)
	}
	for _, archive := range c.lab.cfg.Images {
		if err := c.LoadImage(ctx, archive); err != nil {
			return err
		}
	}
	if _, err := c.lab.start(c.path("kubelet.log"), "nsenter", append(c.node(), c.tool("kubelet"), "--kubeconfig="+c.path("kubelet.conf"), "--config="+c.path("kubelet.yaml"), "--hostname-override=node-"+c.Name,
		"--node-ip="+c.ips(), "--root-dir=/var/lib/kubelet", "--cert-dir="+c.path("pki"))...); err != nil {
		return err
	}
	if _, err := c.start("kube-proxy", c.tool("kube-proxy"), "--config="+c.path("proxy.yaml")); err != nil {
		return err
	}
	_, err = c.start("coredns", c.tool("coredns"), "-conf", c.path("Corefile"))
	return err
}

func (c *Cluster) writeNodeFiles() error {
	ranges, routes := "", ""
	for i, subnet := range c.podsHere {
		ranges += fmt.Sprintf(`,[{"subnet":%q}]`, subnet)
		routes += fmt.Sprintf(`,{"dst":%q}`, []string{"0.0.0.0/0", "::/0"}[i])
	}
	for name, text := range map[string]string{
		"etc-cni/10-lab.conflist": fmt.Sprintf(`{"cniVersion":"1.0.0","name":"lab","plugins":[
{"type":"bridge","bridge":"cni0","isGateway":true,"hairpinMode":true,"ipMasq":%v,"ipam":{"type":"host-local","dataDir":"/var/lib/cni/networks","ranges":[%s],"routes":[%s]}},
{"type":"portmap","capabilities":{"portMappings":true}}]}`, !c.lab.cfg.Flat, ranges[1:], routes[1:]),
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
`, cgroup(c.Name), c.IP, c.path("resolv.conf")),
		"proxy.yaml": fmt.Sprintf(`apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
clientConnection: {kubeconfig: %s}
mode: nftables
clusterCIDR: %s
hostnameOverride: node-%s
conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
`, c.path("admin.conf"), strings.Join(c.pods, ","), c.Name),
		"Corefile": fmt.Sprintf(`.:53 {
  bind %[1]s
  errors
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
`, c.IP, c.path("admin.conf")),
	} {
		if err := c.write(name, text); err != nil {
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
