package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/hanse-mesh/hanse/cmd/internal/admin"
)

func (c *cli) tokenCommand() *cobra.Command {
	group := &cobra.Command{Use: "token", Short: "Make tokens that let a cluster join or a proxy attest itself"}
	group.AddCommand(c.tokenCreateCommand())
	return group
}

func (c *cli) tokenCreateCommand() *cobra.Command {
	var req admin.TokenRequest
	var gateway bool
	var ttl time.Duration
	var file string
	cmd := &cobra.Command{
		Use:   "create {--for CLUSTER | --agent NAMESPACE/SERVICEACCOUNT | --gateway}",
		Short: "Make a token: for a cluster to join the mesh, or for a proxy of this cluster",
		Long: `Make a token that can be used once, within 15 minutes.

With --for it is a mesh token: it lets the cluster of that name join this mesh. With --agent or --gateway it is an agent token:
it lets a sidecar or gateway of this cluster obtain its identity.

A token is a secret. If standard output is not a terminal, only the token is printed, so that it can be piped.`,
		Example: `  hanse token create --for east
  hanse --context west token create --for east | hanse --context east join -
  hanse token create --agent shop/payments --file payments.token`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if gateway {
				req.Workload = "gateway"
			}
			if (req.For == "") == (req.Workload == "") {
				return usage("hanse token create --for CLUSTER, or --agent NAMESPACE/SERVICEACCOUNT, or --gateway", "say what the token is for")
			}
			if ns, sa, ok := strings.Cut(req.Workload, "/"); req.Workload != "" && !gateway && (!ok || ns == "" || sa == "" || strings.Contains(sa, "/")) {
				return usage("--agent NAMESPACE/SERVICEACCOUNT, for example --agent shop/payments", "%q does not name a workload", req.Workload)
			}
			if ttl < 0 || ttl > 24*time.Hour {
				return usage("--ttl 15m", "a token lives up to 24h, not %s", ttl)
			}
			req.TTL = ttl.Seconds()
			b, err := c.client()
			if err != nil {
				return err
			}
			defer b.Close()
			t, err := b.CreateToken(cmd.Context(), req)
			if err != nil {
				return err
			}
			return c.printToken(t, req.For != "", file)
		},
	}
	cmd.Flags().StringVar(&req.For, "for", "", "the `CLUSTER` that is to join")
	cmd.Flags().StringVar(&req.Workload, "agent", "", "the workload `NAMESPACE/SERVICEACCOUNT` whose proxy is to attest itself")
	cmd.Flags().BoolVar(&gateway, "gateway", false, "for a gateway of this cluster")
	cmd.Flags().DurationVar(&ttl, "ttl", 15*time.Minute, "how long it can be used")
	cmd.Flags().StringVar(&file, "file", "", "write the token to `FILE` with mode 0600, not to standard output")
	cmd.MarkFlagsMutuallyExclusive("for", "agent", "gateway")
	c.outputFlag(cmd, "json", "yaml")
	return cmd
}

func (c *cli) printToken(t admin.Token, mesh bool, file string) error {
	lives := fmt.Sprintf("one use, expires in %s", age(t.Expires.Sub(c.now()).Seconds()))
	switch {
	case file != "":
		f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return fmt.Errorf("write the token: %w", err)
		}
		if _, err := fmt.Fprintln(f, t.Token); err != nil {
			f.Close()
			return fmt.Errorf("write the token: %w", err)
		}
		if err := f.Close(); err != nil {
			return fmt.Errorf("write the token: %w", err)
		}
		fmt.Fprintf(c.err, "Token for %s written to %s (%s)\n", t.For, file, lives)
	case c.structured():
		return c.print(t)
	case !c.outTTY:
		fmt.Fprintln(c.out, t.Token)
	case mesh:
		fmt.Fprintf(c.out, "Token for cluster %q (%s):\n\n  %s\n\nOn a machine that reaches %s's control plane, run `hanse join` and paste it (or pipe it into `hanse join -`).\n", t.For, lives, t.Token, t.For)
	default:
		fmt.Fprintf(c.out, "Token for %s (%s):\n\n  %s\n\nWrite it into the file that its hanse-proxy is configured with, mode 0600.\n", t.For, lives, t.Token)
	}
	return nil
}

func (c *cli) joinCommand() *cobra.Command {
	var check bool
	var to string
	var patience time.Duration
	cmd := &cobra.Command{
		Use:   "join [--check] [- | @FILE | --to-context MEMBER]",
		Short: "Join this cluster to a mesh, with a token that one of its members made",
		Long: `Join this cluster to a mesh. The mesh token comes from "hanse token create --for CLUSTER" on any member; one token joins
this cluster to all of them. It is asked for without echo, or read from standard input (-) or from a file (@FILE): as an argument
it would be seen in the list of processes.

With --check everything is verified and nothing is changed, here or there, and the token stays unused. A join that was interrupted
is finished by repeating it.

With --to-context one command does it all: it waits until both clusters know by which addresses others reach them (load balancers, node ports, or what was
given), has the member make a token, verifies both directions, and joins.`,
		Example: `  hanse join --context east --to-context west
  hanse join --check
  hanse join @east.token
  hanse --context west token create --for east | hanse --context east join -`,
		Args: func(_ *cobra.Command, args []string) error {
			const hint = "run `hanse join` and paste it, or pipe it into `hanse join -`, or put it into a file: hanse join @FILE"
			if len(args) > 1 {
				return usage(hint, "one token at most")
			}
			if len(args) == 1 && args[0] != "-" && !strings.HasPrefix(args[0], "@") {
				return usage(hint, "a token must not be an argument: the list of processes and the shell's history would show it")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if to != "" {
				if len(args) > 0 {
					return usage("hanse join --to-context MEMBER, or hanse join @FILE", "a token is given, and --to-context makes one")
				}
				return c.joinTo(cmd.Context(), to, check, patience)
			}
			token, err := c.readToken(args)
			if err != nil {
				return err
			}
			b, err := c.client()
			if err != nil {
				return err
			}
			defer b.Close()
			return c.join(cmd.Context(), b, admin.JoinRequest{Token: token, Check: check})
		},
	}
	cmd.Flags().BoolVar(&check, "check", false, "verify everything, change nothing")
	cmd.Flags().StringVar(&to, "to-context", "", "the `MEMBER` to join through, as a context: it makes the token")
	cmd.Flags().DurationVar(&patience, "timeout", 2*time.Minute, "with --to-context, how long to wait for addresses")
	must(cmd.RegisterFlagCompletionFunc("to-context", c.completeContexts))
	c.outputFlag(cmd, "json", "yaml")
	return cmd
}

func (c *cli) readToken(args []string) (string, error) {
	var token string
	switch {
	case len(args) == 1 && args[0] == "-":
		line, err := readLine(c.in)
		if err == io.EOF {
			return "", usage("hanse --context OTHER token create --for CLUSTER | hanse join -", "there was no token on standard input")
		}
		if err != nil {
			return "", fmt.Errorf("read the token: %w", err)
		}
		token = line
	case len(args) == 1:
		f, err := os.Open(args[0][1:])
		if err != nil {
			return "", usage("hanse token create --for CLUSTER --file FILE, on a member, writes one", "read the token: %v", err)
		}
		defer f.Close()
		if token, err = readLine(f); err != nil {
			return "", fmt.Errorf("read the token from %s: %w", args[0][1:], err)
		}
	case !c.inTTY:
		return "", usage("pipe the token into `hanse join -`, or put it into a file: hanse join @FILE", "there is no terminal to ask for the mesh token")
	default:
		fmt.Fprint(c.err, "Mesh token: ")
		line, err := c.readSecret()
		fmt.Fprintln(c.err)
		if err != nil {
			return "", fmt.Errorf("read the token: %w", err)
		}
		token = line
	}
	if token = strings.TrimSpace(token); token == "" {
		return "", usage("`hanse token create --for CLUSTER` on a member makes one", "the token is empty")
	}
	return token, nil
}

// joined is what `hanse join -o json` prints.
type joined struct {
	admin.JoinResult
	Checked bool          `json:"checked,omitempty"` // --check: nothing was changed
	Checks  []admin.Check `json:"checks"`
}

// checkWidth aligns checks that come one by one.
const checkWidth = 24

func (c *cli) join(ctx context.Context, b admin.Backend, req admin.JoinRequest) error {
	p := c.palette()
	result := joined{Checked: req.Check, Checks: []admin.Check{}}
	var err error
	result.JoinResult, err = b.Join(ctx, req, func(e admin.Event) error {
		if e.Check != nil {
			result.Checks = append(result.Checks, *e.Check)
		}
		switch {
		case c.structured():
		case e.Check != nil:
			c.check(c.out, p, *e.Check, checkWidth)
		case e.Step != "":
			fmt.Fprintln(c.out, e.Step)
		}
		return nil
	})
	if err != nil {
		if req.Check && !c.structured() {
			fmt.Fprintln(c.out, "Nothing was changed.")
		}
		return err
	}
	if c.structured() {
		return c.print(result)
	}
	for _, a := range result.Accepts {
		fmt.Fprintf(c.out, "  accepts from %s\n", a)
	}
	if req.Check {
		fmt.Fprintln(c.out, "All is well. Nothing was changed; the token is unused. Now: hanse join")
		return nil
	}
	fmt.Fprintf(c.out, "%s %s in mesh %q; %s imports %s, exports %d.\n", p.green("Joined."), counted(len(result.Members), "cluster"), result.Mesh,
		result.Cluster, counted(result.Imports, "service"), result.Exports)
	fmt.Fprintln(c.out, "Try: hanse clusters · hanse services · hanse explain FROM TO")
	return nil
}

func (c *cli) leaveCommand() *cobra.Command {
	var req admin.LeaveRequest
	var yes bool
	cmd := &cobra.Command{
		Use:   "leave [MEMBER] [--force]",
		Short: "Take this cluster, or another member, out of the mesh",
		Long: `Take this cluster out of the mesh, or remove MEMBER. What the remaining members tell each other does not change.

With --force a cluster leaves although the others cannot be reached, and a member is removed although it cannot be asked.
A cluster that left comes back with a new token only.`,
		Example:           "  hanse leave\n  hanse leave north --force --yes",
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: c.completeMembers(),
		RunE: func(cmd *cobra.Command, args []string) error {
			what := "Take this cluster out of its mesh?"
			if len(args) == 1 {
				req.Member = args[0]
				what = fmt.Sprintf("Remove %s from the mesh?", req.Member)
			}
			if ok, err := c.confirm(yes, "%s", what); err != nil {
				return err
			} else if !ok {
				fmt.Fprintln(c.err, "Nothing was changed.")
				return errSaid
			}
			b, err := c.client()
			if err != nil {
				return err
			}
			defer b.Close()
			r, err := b.Leave(cmd.Context(), req)
			if err != nil {
				return err
			}
			if c.structured() {
				return c.print(r)
			}
			if r.State == "left" {
				fmt.Fprintf(c.out, "%s left the mesh.\n", r.Member)
			} else {
				fmt.Fprintf(c.out, "%s is proposed to leave: the others show the proposal, and go on as before.\n", r.Member)
			}
			if len(r.Told) > 0 {
				fmt.Fprintf(c.out, "  told     %s\n", strings.Join(r.Told, ", "))
			}
			if len(r.Untold) > 0 {
				fmt.Fprintf(c.out, "  not yet  %s (they hear it when they can be reached)\n", strings.Join(r.Untold, ", "))
			}
			if r.Note != "" {
				fmt.Fprintln(c.out, r.Note)
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&req.Force, "force", false, "also if those concerned cannot be reached")
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	c.outputFlag(cmd, "json", "yaml")
	return cmd
}

func (c *cli) clustersCommand() *cobra.Command {
	var watch bool
	cmd := &cobra.Command{
		Use:   "clusters",
		Short: "List the members of the mesh and how they are",
		Long: `List the members of the mesh. STATE is fresh, suspect (its control plane has been silent; its endpoints stay, ranked behind others) or
withdrawn (its data path is dead too). LAG is how many revisions behind this cluster's copy is, SEEN since when it has not answered, and
PROBE the last end-to-end call to its gateways with SVIDs.`,
		Example:           "  hanse clusters\n  hanse clusters -o wide\n  hanse clusters --watch",
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			b, err := c.client()
			if err != nil {
				return err
			}
			defer b.Close()
			if watch {
				return c.watchClusters(cmd.Context(), b)
			}
			all, err := b.Clusters(cmd.Context())
			if err != nil {
				return err
			}
			if c.structured() {
				return c.print(all)
			}
			c.printClusters(all)
			return nil
		},
	}
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "go on, and show changes")
	c.outputFlag(cmd, "wide", "json", "yaml")
	cmd.AddCommand(c.acceptCommand())
	return cmd
}

func (c *cli) acceptCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "accept MEMBER",
		Short:             "Accept that a member lost most of its services, where hansed held that back",
		Long:              "hansed does not delete many of a member's services at once unless the member's own figures agree: it could be its mistake. This command says that it is none.",
		Example:           "  hanse clusters accept north",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: c.completeMembers(),
		RunE: func(cmd *cobra.Command, args []string) error {
			b, err := c.client()
			if err != nil {
				return err
			}
			defer b.Close()
			if err := b.AcceptHeld(cmd.Context(), args[0]); err != nil {
				return err
			}
			fmt.Fprintf(c.out, "What %s lists now is in force.\n", args[0])
			return nil
		},
	}
}

func stateMood(state string) mood {
	switch state {
	case "fresh", "self":
		return good
	case "withdrawn", "left":
		return bad
	}
	return doubtful
}

func (c *cli) printClusters(all admin.Clusters) {
	head := []string{"CLUSTER", "TRUST DOMAIN", "STATE", "LAG", "SEEN", "EXPORTS", "ENDPOINTS", "PROBE", "REGION"}
	wide := c.output == "wide"
	if wide {
		head = append(head, "NETWORK", "ADDRESSES", "GATEWAYS", "VERSION", "REVISION", "ID")
	}
	t := newTable(head...)
	for _, m := range all.Clusters {
		name, lag := m.Name, "?"
		if m.Self {
			name, lag = name+"*", "-"
		} else if m.Lag != nil {
			lag = fmt.Sprint(*m.Lag)
		}
		r := []cell{plain(name), plain(m.TrustDomain), {m.State, stateMood(m.State)}, plain(lag), plain(ageOr(m.SeenAge)), number(m.Exports), number(m.Endpoints), probe(m), plain(dash(m.Region))}
		if wide {
			r = append(r, plain(m.Network), plain(dash(strings.Join(m.Addresses, ","))), plain(dash(strings.Join(m.Gateways, ","))), plain(dash(m.Version)), number(m.Revision), plain(m.ID))
		}
		t.row(r...)
	}
	c.table(t)
	p := c.palette()
	var notes []string
	for _, m := range all.Clusters {
		if m.Note != "" {
			notes = append(notes, m.Name+": "+m.Note)
		}
		if m.Held != "" {
			notes = append(notes, fmt.Sprintf("%s: a loss is held back: %s.\n  remedy: if that is right, hanse clusters accept %s", m.Name, m.Held, m.Name))
		}
	}
	for _, a := range all.Alarms {
		notes = append(notes, p.red("alarm:")+" "+a)
	}
	if len(notes) > 0 {
		fmt.Fprintf(c.out, "\n%s\n", strings.Join(notes, "\n"))
	}
	if len(all.Clusters) == 1 && len(notes) == 0 {
		fmt.Fprintf(c.out, "\n%s is alone. Join another: hanse token create --for NAME, and `hanse join` there.\n", all.Clusters[0].Name)
	}
}

func probe(m admin.Cluster) cell {
	switch {
	case m.Self || !m.Probe.Known:
		return plain("-")
	case m.Probe.OK && m.State == "suspect":
		return cell{"data ok", doubtful}
	case m.Probe.OK:
		return cell{"ok " + span(m.Probe.RTT), good}
	}
	return cell{"failed", bad}
}

// watchClusters shows the members each second until ctx ends: redrawn on a terminal, elsewhere a line (or JSON value) for each change.
func (c *cli) watchClusters(ctx context.Context, b admin.Backend) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	was := map[string]string{}
	for first := true; ; first = false {
		all, err := b.Clusters(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		is := map[string]string{}
		for _, m := range all.Clusters {
			is[m.Name] = m.State
		}
		changed := first
		for name, state := range is {
			if was[name] != state {
				changed = true
			}
		}
		for name := range was {
			if _, ok := is[name]; !ok {
				changed = true
			}
		}
		switch {
		case c.structured() && changed:
			if err := c.print(all); err != nil {
				return err
			}
		case c.structured():
		case c.outTTY:
			fmt.Fprint(c.out, "\x1b[H\x1b[2J")
			c.printClusters(all)
		case changed:
			fmt.Fprintf(c.out, "%s\n", c.now().UTC().Format(time.TimeOnly))
			c.printClusters(all)
		}
		was = is
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}
