//go:build linux

// Command labctl keeps Kubernetes clusters up for somebody to try things on: `make lab`, and in another terminal
//
//	go run ./test/kube/lab/labctl a kubectl get pods -A
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/hanse-mesh/hanse/test/kube/lab"
)

func main() {
	flat := flag.Bool("flat", false, "pods of all clusters reach each other")
	dual := flag.Bool("dual", false, "nodes, pods and services have addresses of both families")
	clusters := flag.String("clusters", "a,b", "names, separated by commas")
	nodes := flag.Int("nodes", 1, "of each cluster; the second one is CLUSTER-2 for commands")
	hosts := flag.String("hosts", "", "names of machines without Kubernetes, separated by commas")
	dir := flag.String("dir", filepath.Join(os.TempDir(), "hanse-clusters"), "state and logs; another lab needs another one")
	tools := flag.String("tools", "bin/tools", "directory of kube-apiserver and the others")
	images := flag.String("images", "bin/images", "directory of OCI archives that every node gets")
	version := flag.String("version", "v0.1.0", "of the images")
	check := flag.Bool("check", false, "see whether this machine can run clusters at all: start them and a pod in each, and end them")
	flag.Usage = func() {
		fmt.Fprintln(flag.CommandLine.Output(), "usage: labctl [flags]                    keep clusters up until interrupted\n       labctl [flags] CLUSTER COMMAND…   run a command in the network of a cluster, with its KUBECONFIG, or of a host\n       labctl [flags] CLUSTER load FILE  give its nodes the images of an OCI archive")
		flag.PrintDefaults()
	}
	flag.Parse()
	code, err := 0, error(nil)
	if flag.NArg() > 1 {
		code, err = in(*dir, *tools, flag.Arg(0), flag.Args()[1:])
	} else {
		code, err = up(lab.Config{Clusters: strings.Split(*clusters, ","), Nodes: *nodes, Hosts: strings.FieldsFunc(*hosts, func(r rune) bool { return r == ',' }), Tools: *tools, Flat: *flat, Dual: *dual, Dir: *dir, Pause: "hanse.mesh/pause:" + *version, Log: os.Stderr}, *images, *check)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "labctl:", err)
		code = max(1, code)
	}
	os.Exit(code)
}

func up(cfg lab.Config, images string, check bool) (int, error) {
	if err := lab.Needs(cfg.Tools); err != nil {
		return 1, err
	}
	code, entered, err := lab.Enter(cfg.Dir + ".pid")
	if err != nil || !entered {
		return code, err
	}
	if cfg.Images, err = filepath.Glob(filepath.Join(images, "*.tar")); err != nil {
		return 1, err
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	l, err := lab.Up(ctx, cfg)
	if err != nil {
		return 1, err
	}
	defer l.Down()
	if check {
		for _, c := range l.Clusters {
			if err := runPod(ctx, c, cfg.Pause); err != nil {
				return 1, fmt.Errorf("cluster %s: %w", c.Name, err)
			}
		}
		return 0, nil
	}
	for _, name := range cfg.Clusters {
		fmt.Fprintf(os.Stderr, "cluster %s: node %s, %s; labctl %s kubectl get pods -A\n", name, l.Clusters[name].IP, l.Clusters[name].Kubeconfig, name)
	}
	for _, name := range cfg.Hosts {
		fmt.Fprintf(os.Stderr, "host %s: %s; labctl %s COMMAND\n", name, l.Hosts[name].IP, name)
	}
	fmt.Fprintln(os.Stderr, "Ctrl-C ends them")
	<-ctx.Done()
	return 0, nil
}

// runPod runs a pod until it is ready.
func runPod(ctx context.Context, c *lab.Cluster, image string) error {
	if _, err := c.Kubectl(ctx, "run", "check", "--image="+image, "--restart=Never"); err != nil {
		return err
	}
	_, err := c.Kubectl(ctx, "wait", "--for=condition=Ready", "pod/check", "--timeout=60s")
	return err
}

// in runs a command inside a lab that is up.
func in(dir, tools, cluster string, command []string) (int, error) {
	pid, err := os.ReadFile(dir + ".pid")
	if err != nil {
		return 1, fmt.Errorf("no lab is up in %s: %w", dir, err)
	}
	if tools, err = filepath.Abs(tools); err != nil {
		return 1, err
	}
	lab := []string{"-t", strings.TrimSpace(string(pid)), "-m", "-p"}
	switch command[0] {
	case "kubectl":
		command[0] = filepath.Join(tools, "kubectl")
		fallthrough
	default:
		command = append([]string{"nsenter", "--net=/run/netns/" + cluster, "env", "KUBECONFIG=" + kubeconfig(dir, cluster)}, command...)
	case "load":
		if len(command) != 2 {
			return 2, errors.New("load takes one file")
		}
		archive, err := filepath.Abs(command[1])
		if err != nil {
			return 1, err
		}
		command = []string{"nsenter", "--net=/run/netns/" + cluster, "ctr", "-a", filepath.Join(nodeDir(dir, cluster), "run-containerd/containerd.sock"), "-n", "k8s.io", "images", "import", archive}
	}
	cmd := exec.Command("nsenter", append(lab, command...)...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	err = cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode(), nil
	}
	return 0, err
}

// nodeDir is where a node has its state: CLUSTER, or CLUSTER-2 for the second one.
func nodeDir(dir, name string) string {
	if i := strings.LastIndexByte(name, '-'); i > 0 {
		if second := filepath.Join(dir, name[:i], "node-"+name[i+1:]); exists(second) {
			return second
		}
	}
	return filepath.Join(dir, name)
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// kubeconfig is a cluster's; a host has those of all clusters.
func kubeconfig(dir, name string) string {
	for _, d := range []string{nodeDir(dir, name), filepath.Dir(nodeDir(dir, name))} {
		if own := filepath.Join(d, "admin.conf"); exists(own) {
			return own
		}
	}
	all, _ := filepath.Glob(filepath.Join(dir, "*", "admin.conf"))
	return strings.Join(all, string(filepath.ListSeparator))
}
