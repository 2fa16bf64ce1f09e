//go:build linux

package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// Config describes a Lab.
type Config struct {
	Clusters []string  // names, at most 8; default a and b
	Nodes    int       // of each cluster, at most 4; default 1. The first one has the control plane, too
	Hosts    []string  // names of machines beside them, on the same network, with nothing on them; at most 8
	Tools    string    // directory of etcd, kube-apiserver, …; required
	Images   []string  // OCI archives that every node has; the pause image must be among them
	Pause    string    // its name
	Flat     bool      // pods of all clusters reach each other, by the addresses that they have
	Dual     bool      // nodes, pods and services have addresses of both families
	Dir      string    // state and logs; required
	Log      io.Writer // progress; nil: none
}

// Lab is what runs.
type Lab struct {
	Clusters map[string]*Cluster
	Hosts    map[string]*Host

	// read-only after Up
	cfg Config

	mu   sync.Mutex
	cmds []*exec.Cmd // guarded by mu: in the order in which they were started
}

// programs are needed in Config.Tools.
var programs = []string{"etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "kubectl", "coredns"}

// Needs says what is missing on this machine; nil if nothing is.
func Needs(tools string) error {
	var missing []string
	if os.Geteuid() != 0 {
		missing = append(missing, "root")
	}
	for _, p := range []string{"containerd", "ctr", "runc", "ip", "iptables", "nsenter", "unshare", "conntrack", "nft"} {
		if _, err := exec.LookPath(p); err != nil {
			missing = append(missing, p)
		}
	}
	if _, err := os.Stat(cniPlugins + "/bridge"); err != nil {
		missing = append(missing, cniPlugins+"/bridge")
	}
	for _, p := range programs {
		if _, err := os.Stat(filepath.Join(tools, p)); err != nil {
			missing = append(missing, filepath.Join(tools, p))
		}
	}
	if len(missing) == 0 {
		return nil
	}
	return fmt.Errorf("missing: %s (Debian: apt-get install --no-install-recommends containerd runc containernetworking-plugins iptables nftables conntrack iproute2; the others: make kube-tools)", strings.Join(missing, ", "))
}

// inside marks the process that has the namespaces; its value is the number of the one outside.
const inside = "HANSE_LAB_INSIDE"

// Enter runs this program again, with the same arguments, in namespaces of its own, and returns its exit code; in there it returns at once, and ok is true. pidFile, if not "", holds the
// number of the process in there meanwhile.
func Enter(pidFile string) (code int, ok bool, err error) {
	if os.Getenv(inside) != "" {
		return 0, true, setUp()
	}
	exe, err := os.Executable()
	if err != nil {
		return 1, false, err
	}
	cmd := exec.Command(exe, os.Args[1:]...)
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d", inside, os.Getpid()))
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWPID | unix.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	defer signal.Stop(signals)
	sweep()
	defer sweep()
	runtime.LockOSThread() // Pdeathsig is of the thread
	defer runtime.UnlockOSThread()
	if err := cmd.Start(); err != nil {
		return 1, false, fmt.Errorf("namespaces: %w", err)
	}
	if pidFile != "" {
		if err := os.WriteFile(pidFile, fmt.Appendln(nil, cmd.Process.Pid), 0o600); err != nil {
			_ = cmd.Process.Kill()
			return 1, false, err
		}
		defer os.Remove(pidFile)
	}
	ended := make(chan struct{})
	defer close(ended)
	go func() {
		for {
			select {
			case <-ended:
				return
			case s := <-signals:
				if s != os.Interrupt { // a terminal sends that to both
					_ = cmd.Process.Signal(s)
				}
			}
		}
	}()
	err = cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return max(1, exit.ExitCode()), false, nil
	}
	return 0, false, err
}

// setUp makes the mounts this process's own.
func setUp() error {
	if err := unix.Mount("none", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("private mounts: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	if err := os.MkdirAll("/run/netns", 0o755); err != nil {
		return err
	}
	if err := unix.Mount("none", "/run/netns", "tmpfs", 0, ""); err != nil {
		return fmt.Errorf("mount /run/netns: %w", err)
	}
	return nil
}

// Up starts the clusters. It must be called in the process that Enter has made.
func Up(ctx context.Context, cfg Config) (_ *Lab, err error) {
	if len(cfg.Clusters) == 0 {
		cfg.Clusters = []string{"a", "b"}
	}
	if len(cfg.Clusters) > 8 || len(cfg.Hosts) > 8 {
		return nil, fmt.Errorf("%d clusters and %d hosts: at most 8 each", len(cfg.Clusters), len(cfg.Hosts))
	}
	if cfg.Nodes == 0 {
		cfg.Nodes = 1
	}
	if cfg.Nodes < 0 || cfg.Nodes > 4 || cfg.Nodes > 1 && cfg.Flat {
		return nil, fmt.Errorf("%d nodes: at most 4; and one, if the network is flat", cfg.Nodes)
	}
	if err := Needs(cfg.Tools); err != nil {
		return nil, err
	}
	for _, p := range []*string{&cfg.Tools, &cfg.Dir} {
		if *p, err = filepath.Abs(*p); err != nil {
			return nil, err
		}
	}
	l := &Lab{cfg: cfg, Clusters: map[string]*Cluster{}, Hosts: map[string]*Host{}}
	defer func() {
		if err != nil {
			l.Down()
		}
	}()
	if err := os.RemoveAll(cfg.Dir); err != nil { // of a lab before
		return nil, err
	}
	if err := l.network(ctx); err != nil {
		return nil, err
	}
	for i, name := range cfg.Hosts {
		l.Hosts[name] = &Host{Name: name, IP: hostIP(i)}
	}
	g, ctx := errgroup.WithContext(ctx)
	for i, name := range cfg.Clusters {
		c := l.cluster(name, i)
		l.Clusters[name] = c
		g.Go(func() error {
			start := time.Now()
			if err := c.up(ctx); err != nil {
				return fmt.Errorf("cluster %s: %w", name, err)
			}
			l.say("cluster %s is ready after %s", name, time.Since(start).Round(100*time.Millisecond))
			return nil
		})
	}
	return l, g.Wait()
}

func (l *Lab) say(format string, args ...any) {
	if l.cfg.Log != nil {
		l.mu.Lock()
		defer l.mu.Unlock()
		fmt.Fprintf(l.cfg.Log, format+"\n", args...)
	}
}

// network makes a namespace for each node and host, and a bridge between them.
func (l *Lab) network(ctx context.Context) error {
	lines := []string{"netns add fab", "-n fab link set lo up", "-n fab link add fab0 type bridge", "-n fab link set fab0 up"}
	machine := func(n, port, ip string) {
		lines = append(lines, "netns add "+n, "-n "+n+" link set lo up", fmt.Sprintf("link add eth0 netns %s type veth peer name %s netns fab", n, port),
			fmt.Sprintf("-n fab link set %s master fab0 up", port), fmt.Sprintf("-n %s addr add %s/24 dev eth0", n, ip), fmt.Sprintf("-n %s link set eth0 up", n),
			fmt.Sprintf("-n %s route add default via 10.9.0.254", n)) // programs look for the interface of the default route; nothing is behind this one
		if l.cfg.Dual && strings.HasPrefix(port, "v") {
			lines = append(lines, fmt.Sprintf("-n %s addr add %s/64 dev eth0 nodad", n, sixth(ip)))
		}
	}
	var nodes []string
	for i, c := range l.cfg.Clusters {
		for n := range l.cfg.Nodes {
			machine(netOf(c, n), fmt.Sprintf("v%d-%d", i, n), nodeIP(i, n))
			nodes = append(nodes, netOf(c, n))
		}
	}
	for i, n := range l.cfg.Hosts {
		machine(n, fmt.Sprintf("h%d", i), hostIP(i))
	}
	for _, line := range lines {
		if _, err := run("", exec.CommandContext(ctx, "ip", strings.Fields(line)...)); err != nil {
			return err
		}
	}
	forward := []string{"net.ipv4.ip_forward=1"}
	if l.cfg.Dual {
		forward = append(forward, "net.ipv6.conf.all.forwarding=1")
	}
	for _, n := range nodes {
		if _, err := run("", exec.CommandContext(ctx, "nsenter", append([]string{"--net=/run/netns/" + n, "sysctl", "-qw"}, forward...)...)); err != nil {
			return err
		}
	}
	return l.Routes(ctx, l.cfg.Flat)
}

// masquerades says that what Pods send to machines comes from their node. Not by the plugin where there are several nodes, which would hide Pods of one from those of the other.
func (l *Lab) masquerades() bool { return !l.cfg.Flat && l.cfg.Nodes == 1 }

// Routes lets pods of all clusters reach each other, or not. Where they do, the nodes must not hide them: see Config.Flat. Pods of one cluster reach each other in any case.
func (l *Lab) Routes(ctx context.Context, flat bool) error {
	ip := func(args ...string) error {
		_, err := run("", exec.CommandContext(ctx, "ip", args...))
		return err
	}
	for i, c := range l.cfg.Clusters {
		for n := range l.cfg.Nodes {
			net := netOf(c, n)
			for j := range l.cfg.Clusters {
				if i == j {
					continue
				}
				via := map[string]string{podRange(j): nodeIP(j, 0)}
				if l.cfg.Dual {
					via[podRange6(j)] = sixth(nodeIP(j, 0))
				}
				for pods, node := range via {
					to := []string{"blackhole", pods}
					if flat {
						to = []string{pods, "via", node}
					}
					if err := errors.Join(ip("-n", net, "route", "flush", pods), ip(append([]string{"-n", net, "route", "add"}, to...)...)); err != nil {
						return err
					}
				}
			}
			if l.cfg.Nodes == 1 {
				continue
			}
			ranges := map[string]string{podRange(i): "iptables"}
			if l.cfg.Dual {
				ranges[podRange6(i)] = "ip6tables"
			}
			for m := range l.cfg.Nodes {
				if m == n {
					continue
				}
				if err := ip("-n", net, "route", "replace", podsOf(i, m), "via", nodeIP(i, m)); err != nil {
					return err
				}
				if l.cfg.Dual {
					if err := ip("-n", net, "route", "replace", podsOf6(i, m), "via", sixth(nodeIP(i, m))); err != nil {
						return err
					}
				}
			}
			for pods, tables := range ranges {
				rule := []string{"POSTROUTING", "-s", pods, "!", "-d", pods, "-j", "MASQUERADE"}
				in := []string{"--net=/run/netns/" + net, tables, "-w", "-t", "nat"}
				if _, err := run("", exec.CommandContext(ctx, "nsenter", append(append(in, "-C"), rule...)...)); err == nil {
					continue
				}
				if _, err := run("", exec.CommandContext(ctx, "nsenter", append(append(in, "-A"), rule...)...)); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// netOf is the network namespace of a node.
func netOf(cluster string, n int) string {
	if n == 0 {
		return cluster
	}
	return fmt.Sprintf("%s-%d", cluster, n+1)
}

// nodeIP is the address of node n of cluster i.
func nodeIP(i, n int) string { return fmt.Sprintf("10.9.0.%d", 10*n+i+1) }

// podsOf are the addresses of a node's Pods.
func podsOf(i, n int) string  { return fmt.Sprintf("10.%d.%d.0/24", 244+i, n+1) }
func podsOf6(i, n int) string { return fmt.Sprintf("fd00:%d:0:%d::/64", 244+i, n+1) }

func hostIP(i int) string    { return fmt.Sprintf("10.9.0.%d", i+101) }
func podRange(i int) string  { return fmt.Sprintf("10.%d.0.0/16", 244+i) }
func podRange6(i int) string { return fmt.Sprintf("fd00:%d::/56", 244+i) }

// sixth is the IPv6 address of a node with an IPv4 address.
func sixth(ip string) string { return "fd00:9::" + ip[strings.LastIndexByte(ip, '.')+1:] }

// start runs a program until the lab ends; what it says goes to a file.
func (l *Lab) start(log string, name string, args ...string) (*exec.Cmd, error) {
	f, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	cmd := exec.Command(name, args...)
	cmd.Stdout, cmd.Stderr = f, f
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // a terminal's interrupt is for this process
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	l.mu.Lock()
	l.cmds = append(l.cmds, cmd)
	l.mu.Unlock()
	go func() { _ = cmd.Wait() }()
	return cmd, nil
}

// Down ends everything. It is not needed: the end of this process does the same, less kindly.
func (l *Lab) Down() {
	l.mu.Lock()
	cmds := l.cmds
	l.cmds = nil
	l.mu.Unlock()
	for i := len(cmds) - 1; i >= 0; i-- {
		_ = cmds[i].Process.Kill()
	}
}

// run runs a program and returns what it said on standard output.
func run(stdin string, cmd *exec.Cmd) (string, error) {
	cmd.Stdin = strings.NewReader(stdin)
	cmd.WaitDelay = time.Second
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, strings.TrimSpace(errs.String()))
	}
	return out.String(), nil
}

// eventually calls f until it succeeds.
func eventually(ctx context.Context, limit time.Duration, f func() error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		err := f()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(100 * time.Millisecond):
		}
	}
}
