package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/hanse-mesh/hanse/cmd/internal/daemon"
	"github.com/hanse-mesh/hanse/proxy/capture"
	"github.com/hanse-mesh/hanse/proxy/capture/node"
)

// usageError is a wrong command line: exit code 2.
type usageError struct{ error }

// errDiffers ends show where what is installed is not what is wanted.
var errDiffers = errors.New("differs")

// captureFlags are shared by the commands below capture.
type captureFlags struct {
	config, netns, output string
	dryRun                bool
	out                   io.Writer
}

// commands is the tree of commands beside the program's own flags.
func commands(stdout io.Writer) *cobra.Command {
	f := &captureFlags{out: stdout}
	root := &cobra.Command{Use: "hanse-proxy", SilenceErrors: true, SilenceUsage: true, CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true}}
	group := &cobra.Command{
		Use:   "capture",
		Short: "Lead a workload's connections to its sidecar, without the workload's help",
		Long: `Rules of the kernel (nftables) lead what an application calls, and what calls it, to its sidecar: the application needs no change.
They are a table of their own in the network namespace that the command runs in, a container's for one, and are written, compared and
removed as a whole. The section capture of the sidecar's configuration file says what they are.

CAP_NET_ADMIN in that namespace is needed; no other program is.`,
		Example: `  hanse-proxy capture install --config /etc/hanse/hanse-proxy.yaml
  hanse-proxy capture show
  nsenter --net --target 4711 hanse-proxy capture show -o json
  hanse-proxy capture remove`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	group.PersistentFlags().StringVar(&f.config, "config", "/etc/hanse/hanse-proxy.yaml", "configuration `FILE` of the sidecar")
	group.PersistentFlags().StringVar(&f.netns, "netns", "", "network namespace by its `FILE`, such as /proc/4711/ns/net (default this process's own)")
	group.PersistentFlags().StringVarP(&f.output, "output", "o", "text", "`FORMAT` of what is printed: text or json")
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	noArgs := func(cmd *cobra.Command, args []string) error {
		if len(args) > 0 {
			return usageError{fmt.Errorf("%s takes no argument, got %q", cmd.CommandPath(), args[0])}
		}
		if f.output != "text" && f.output != "json" {
			return usageError{fmt.Errorf("--output %q: want text or json", f.output)}
		}
		return nil
	}

	install := &cobra.Command{
		Use:   "install",
		Short: "Install the rules, or change them to what the configuration says",
		Long: `Install makes the table what the configuration says, in one transaction: there is no moment without rules, nor one with half of them.
Where it is that already, nothing happens. Connections that are open stay as they are.`,
		Example: `  hanse-proxy capture install --config /etc/hanse/proxy/payments.yaml
  hanse-proxy capture install --dry-run          # what would be installed
  hanse-proxy capture install --netns /proc/$(pidof payments)/ns/net`,
		Args: noArgs,
		RunE: func(*cobra.Command, []string) error { return f.install() },
	}
	remove := &cobra.Command{
		Use:   "remove",
		Short: "Remove the rules, all of them",
		Long: `Remove takes the whole table away. Connections that were led to the sidecar end with it; what is opened afterwards goes its own way,
without the mesh.`,
		Example: `  hanse-proxy capture remove
  hanse-proxy capture remove --table hanse       # without a configuration file`,
		Args: noArgs,
	}
	table := remove.Flags().String("table", "", "`NAME` of the table (default what the configuration says)")
	remove.RunE = func(*cobra.Command, []string) error { return f.remove(*table) }
	for _, cmd := range []*cobra.Command{install, remove} {
		cmd.Flags().BoolVar(&f.dryRun, "dry-run", false, "only say what would be done")
	}
	show := &cobra.Command{
		Use:   "show",
		Short: "Show what is installed, and whether it is what the configuration says",
		Long: `Show prints the table as it is installed, with the number of connections that each rule has led to the sidecar, and what differs from
the configuration. It exits with 1 where something does.`,
		Example: `  hanse-proxy capture show
  hanse-proxy capture show -o json | jq .matches`,
		Args: noArgs,
		RunE: func(*cobra.Command, []string) error { return f.show() },
	}
	var timeout time.Duration
	var text string
	wait := &cobra.Command{
		Use:   "wait",
		Short: "Wait until somebody else has installed the rules: for Pods without NET_ADMIN",
		Long: `Wait asks the node's "hanse-proxy capture node" for the rules that the configuration says, and ends once this namespace's connections are
captured by them. It needs no privilege, and a user that is not exempt from capture.`,
		Example: `  hanse-proxy capture wait --config /etc/hanse/proxy/hanse-proxy.yaml
  hanse-proxy capture wait --timeout 5m`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return f.wait(cmd.Context(), text, timeout) },
	}
	wait.Flags().DurationVar(&timeout, "timeout", 2*time.Minute, "`TIME` to wait at most")
	wait.Flags().StringVar(&text, "rules", "", "the rules themselves, as wait tells the node with which it starts itself anew")
	_ = wait.Flags().MarkHidden("rules") // it is there
	onNode := &cobra.Command{
		Use:   "node",
		Short: "Install the rules for Pods of this node that wait for them",
		Long: `Node looks for processes of this node that run "hanse-proxy capture wait", enters their network namespaces, and installs what they ask for.
A process can ask for its own namespace only, once, and never for the node's. It asks no API server.

The node's processes (hostPID) and CAP_SYS_PTRACE, CAP_SYS_ADMIN and CAP_NET_ADMIN are needed. The Helm chart runs it with capture.mode=node.`,
		Example: `  hanse-proxy capture node
  kubectl --namespace hanse-system logs daemonset/hanse-node`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return f.node(cmd.Context(), cmd.ErrOrStderr()) },
	}
	group.AddCommand(install, remove, show, wait, onNode)
	root.AddCommand(group)
	return root
}

// runCommand returns an exit code.
func runCommand(args []string, stdout, stderr io.Writer) int {
	root := commands(stdout)
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(context.Background())
	var wrong usageError
	switch {
	case err == nil:
		return 0
	case errors.Is(err, errDiffers):
		return 1
	case errors.As(err, &wrong), strings.HasPrefix(err.Error(), "unknown command"):
		fmt.Fprintf(stderr, "hanse-proxy: %v\nhint: hanse-proxy capture --help\n", err)
		return 2
	}
	fmt.Fprintf(stderr, "hanse-proxy: %v\n", err)
	if hint := hintFor(err); hint != "" {
		fmt.Fprintf(stderr, "hint: %s\n", hint)
	}
	return 1
}

func hintFor(err error) string {
	switch {
	case errors.Is(err, capture.ErrPermission):
		return "run it as root, or in a container with the capability NET_ADMIN (securityContext.capabilities.add), or from the host with --netns"
	case errors.Is(err, capture.ErrUnsupported):
		return "Linux 5.2 or newer with nf_tables is needed, and its parts nft_redir, nft_fib_inet and nft_chain_nat: modprobe them on the host"
	case errors.Is(err, context.DeadlineExceeded):
		return "does hanse-proxy capture node run on this node? kubectl --namespace hanse-system get pods -o wide -l app.kubernetes.io/name=hanse-node"
	case errors.Is(err, errOff):
		return "set enabled: true in the section capture"
	}
	return ""
}

var errOff = errors.New("capture is not enabled")

// load reads the configuration, and what the kernel is to be told.
func (f *captureFlags) load() (*capture.Config, error) {
	cfg, err := LoadConfig(f.config, "", "")
	if err != nil {
		return nil, err
	}
	if !cfg.Capture.Enabled {
		return nil, fmt.Errorf("%s: %w", f.config, errOff)
	}
	var faults error
	rules := cfg.rules(func(field, format string, args ...any) {
		faults = errors.Join(faults, fmt.Errorf("%s: %s: %s", f.config, field, fmt.Sprintf(format, args...)))
	}, true)
	return rules, faults
}

func (f *captureFlags) install() error {
	cfg, err := f.load()
	if err != nil {
		return err
	}
	rules := capture.In(f.netns)
	if f.dryRun {
		plan := capture.Plan(cfg)
		state, err := rules.Show(cfg)
		if errors.Is(err, capture.ErrPermission) { // what is wanted can be said without
			state, err = nil, nil
		}
		if err != nil {
			return err
		}
		return f.print(map[string]any{"table": cfg.Table, "dryRun": true, "changed": state == nil || !state.Matches, "chains": plan.Chains}, func(w io.Writer) {
			writeTable(w, plan)
			switch {
			case state == nil:
				fmt.Fprintln(w, "# not compared with what is installed: that needs CAP_NET_ADMIN")
			case state.Matches:
				fmt.Fprintln(w, "# nothing would change")
			case state.Installed:
				fmt.Fprintln(w, "# would replace what is installed:")
				writeDifference(w, state)
			default:
				fmt.Fprintln(w, "# would be installed")
			}
		})
	}
	changed, err := rules.Install(cfg)
	if err != nil {
		return err
	}
	return f.print(map[string]any{"table": cfg.Table, "dryRun": false, "changed": changed}, func(w io.Writer) {
		if !changed {
			fmt.Fprintf(w, "table inet %s is as configured already\n", cfg.Table)
			return
		}
		fmt.Fprintf(w, "installed table inet %s: outbound to port %d", cfg.Table, cfg.OutboundPort)
		if cfg.InboundPort != 0 {
			fmt.Fprintf(w, ", inbound to port %d", cfg.InboundPort)
		}
		if cfg.DNSPort != 0 {
			fmt.Fprintf(w, ", DNS to port %d", cfg.DNSPort)
		}
		fmt.Fprintln(w)
	})
}

func (f *captureFlags) remove(table string) error {
	if table == "" {
		cfg, err := LoadConfig(f.config, "", "")
		if err != nil {
			return fmt.Errorf("%w (or say --table)", err)
		}
		table = cfg.Capture.Table
	}
	probe := &capture.Config{Table: table}
	rules := capture.In(f.netns)
	var removed bool
	if f.dryRun {
		state, err := rules.Show(probe)
		if err != nil {
			return err
		}
		removed = state.Installed
	} else {
		var err error
		if removed, err = rules.Remove(table); err != nil {
			return err
		}
	}
	return f.print(map[string]any{"table": table, "dryRun": f.dryRun, "changed": removed}, func(w io.Writer) {
		switch {
		case !removed:
			fmt.Fprintf(w, "there is no table inet %s\n", table)
		case f.dryRun:
			fmt.Fprintf(w, "would remove table inet %s\n", table)
		default:
			fmt.Fprintf(w, "removed table inet %s\n", table)
		}
	})
}

func (f *captureFlags) show() error {
	cfg, err := f.load()
	if err != nil {
		return err
	}
	state, err := capture.In(f.netns).Show(cfg)
	if err != nil {
		return err
	}
	if err := f.print(state, func(w io.Writer) {
		switch {
		case !state.Installed:
			fmt.Fprintf(w, "table inet %s is not installed: hanse-proxy capture install --config %s\n", state.Table, f.config)
			return
		case state.Matches:
			writeTable(w, state)
			fmt.Fprintf(w, "# as %s says\n", f.config)
		default:
			writeTable(w, state)
			fmt.Fprintf(w, "# differs from %s (+ missing, - surplus); hanse-proxy capture install mends it:\n", f.config)
			writeDifference(w, state)
		}
	}); err != nil {
		return err
	}
	if !state.Matches {
		return errDiffers
	}
	return nil
}

// wait starts this program anew with the rules on its command line, where the node's agent reads them: it needs no file of the Pod.
func (f *captureFlags) wait(ctx context.Context, text string, timeout time.Duration) error {
	if text == "" {
		cfg, err := f.load()
		if err != nil {
			return err
		}
		args, err := node.Arguments(cfg)
		if err != nil {
			return err
		}
		exe, err := os.Executable()
		if err != nil {
			return err
		}
		return fmt.Errorf("start %s anew: %w", exe, syscall.Exec(exe, append(append([]string{"hanse-proxy"}, args...), "--timeout", timeout.String()), os.Environ()))
	}
	cfg, err := node.Rules([]byte(text))
	if err != nil {
		return err
	}
	ctx, stop := daemon.Signals(ctx, slog.New(slog.DiscardHandler))
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	began := time.Now()
	if err := capture.Wait(ctx, cfg); err != nil {
		return err
	}
	return f.print(map[string]any{"table": cfg.Table, "captured": true, "seconds": time.Since(began).Seconds()}, func(w io.Writer) {
		fmt.Fprintf(w, "captured by table inet %s, after %.1f s\n", cfg.Table, time.Since(began).Seconds())
	})
}

// node works until it is told to end.
func (f *captureFlags) node(ctx context.Context, stderr io.Writer) error {
	log := daemon.Logger(stderr, new(slog.LevelVar))
	ctx, stop := daemon.Signals(ctx, log)
	defer stop()
	return (&node.Agent{Log: log}).Run(ctx)
}

func (f *captureFlags) print(v any, text func(io.Writer)) error {
	if f.output == "json" {
		enc := json.NewEncoder(f.out)
		enc.SetIndent("", "  ")
		return enc.Encode(v)
	}
	text(f.out)
	return nil
}

func writeTable(w io.Writer, s *capture.State) {
	fmt.Fprintf(w, "table inet %s {\n", s.Table)
	for _, c := range s.Chains {
		fmt.Fprintf(w, "\tchain %s {\n", c.Name)
		if c.Hook != "" {
			fmt.Fprintf(w, "\t\t%s\n", c.Hook)
		}
		for _, r := range c.Rules {
			line := r.Text
			if r.Packets != nil {
				line = strings.Replace(line, "counter", fmt.Sprintf("counter packets %d", *r.Packets), 1)
			}
			fmt.Fprintf(w, "\t\t%s\n", line)
		}
		fmt.Fprintln(w, "\t}")
	}
	fmt.Fprintln(w, "}")
}

func writeDifference(w io.Writer, s *capture.State) {
	for _, l := range s.Missing {
		fmt.Fprintf(w, "+ %s: %s\n", l.Chain, l.Text)
	}
	for _, l := range s.Surplus {
		fmt.Fprintf(w, "- %s: %s\n", l.Chain, l.Text)
	}
	if len(s.Missing)+len(s.Surplus) == 0 {
		fmt.Fprintln(w, "the same rules in another order")
	}
}
