// Hanse-proxy is the data path: a workload's sidecar, a cluster's east-west gateway, or an agent for workloads that speak gRPC's xDS
// themselves.
//
//	identity/agent ─► Source ─┬─► xdsclient ─► Table ─► sidecar or gateway
//	                          └─► files, bootstrap (agent)
//
// It links neither etcd nor client-go.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"

	"github.com/hanse-mesh/hanse/cmd/internal/daemon"
)

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

// run returns 0 when all went well, 1 when not, 2 for wrong usage.
func run(args []string, stdout, stderr io.Writer) int {
	if len(args) > 0 && args[0] == "capture" {
		return runCommand(args, stdout, stderr)
	}
	flags := flag.NewFlagSet("hanse-proxy", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.Usage = func() {
		fmt.Fprint(stderr, "Usage: hanse-proxy [flags]            run what the configuration says\n       hanse-proxy capture --help     lead a workload's connections to its sidecar\n\nFlags:\n")
		flags.PrintDefaults()
	}
	path := flags.String("config", "/etc/hanse/hanse-proxy.yaml", "configuration `file`")
	role := flags.String("role", "", "sidecar, gateway or agent; default: what the file says, else sidecar")
	check := flags.Bool("check", false, "check the configuration and exit")
	version := flags.Bool("version", false, "print the version and exit")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	if flags.NArg() > 0 {
		fmt.Fprintf(stderr, "hanse-proxy: unexpected argument %q\nhint: all settings are in the file that --config names\n", flags.Arg(0))
		return 2
	}
	if *version {
		fmt.Fprintf(stdout, "hanse-proxy %s\n", daemon.Version)
		return 0
	}
	cfg, err := LoadConfig(*path, *role, os.Getenv("SPIFFE_ENDPOINT_SOCKET"))
	if err != nil {
		fmt.Fprintf(stderr, "hanse-proxy: %v\nhint: hanse-proxy --check --config FILE tests a file without starting\n", err)
		return 1
	}
	if *check {
		fmt.Fprintf(stdout, "%s: ok, role %s\n", *path, cfg.Role)
		return 0
	}
	if err := serve(context.Background(), cfg, stderr); err != nil {
		fmt.Fprintf(stderr, "hanse-proxy: %v\n", err)
		return 1
	}
	return 0
}
