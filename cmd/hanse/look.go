package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/hanse-mesh/hanse/cmd/internal/admin"
	"github.com/hanse-mesh/hanse/cmd/internal/daemon"
)

func (c *cli) statusCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Say whether this cluster is well, and what to do if not",
		Long: `Say whether this cluster is well. It is green only if every member was reached end to end with SVIDs a moment ago.
The exit code is 1 if something needs attention.`,
		Example:           "  hanse status\n  hanse --context east status -o json",
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			b, err := c.client()
			if err != nil {
				return err
			}
			defer b.Close()
			s, err := b.Status(cmd.Context())
			if err != nil {
				return err
			}
			if c.structured() {
				err = c.print(s)
			} else {
				c.printStatus(s)
			}
			if err == nil && !s.OK {
				return errSaid
			}
			return err
		},
	}
	c.outputFlag(cmd, "json", "yaml")
	return cmd
}

func (c *cli) printStatus(s admin.Status) {
	p := c.palette()
	if s.OK {
		fmt.Fprintf(c.out, "%s %s\n", p.green("OK:"), s.Summary)
	} else {
		fmt.Fprintf(c.out, "%s %s\n", p.red("NOT WELL:"), s.Summary)
	}
	fmt.Fprintf(c.out, "cluster %s, trust domain %s, hansed %s, %s, %s\n", s.Cluster, s.TrustDomain, s.Version, counted(s.Services, "service"), strings.Replace(counted(s.Proxies, "proxy"), "proxys", "proxies", 1))
	c.checks(c.out, p, s.Checks)
	if len(s.Replicas) == 0 {
		return
	}
	fmt.Fprintln(c.out)
	t := newTable("REPLICA", "LEADS", "SIGNS", "UP", "VERSION", "ADDRESS")
	for _, r := range s.Replicas {
		leads := "-"
		if r.Leads {
			leads = "since " + r.LeadingSince.Local().Format("2006-01-02 15:04:05")
		}
		t.row(plain(r.Name), plain(leads), plain(map[bool]string{true: "yes", false: "not yet"}[r.Signs]), plain(age(r.Age)), plain(dash(r.Version)), plain(dash(strings.Join(r.Addresses, ","))))
	}
	c.table(t)
}

func (c *cli) servicesCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:               "services",
		Short:             "List the services that can be called, and who serves them",
		Long:              "List the services of this cluster and of those that others export. CLUSTERS says how many endpoints of each cluster are ready, of how many. Endpoints without identity (their Pods have no sidecar) are not exported; those of exported services are counted below the table.",
		Example:           "  hanse services\n  hanse services -o json",
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			b, err := c.client()
			if err != nil {
				return err
			}
			defer b.Close()
			l, err := b.Services(cmd.Context())
			if err != nil {
				return err
			}
			if c.structured() {
				return c.print(l)
			}
			if len(l) == 0 {
				fmt.Fprintln(c.out, "No services yet. Apply some (hanse apply -f FILE), or write them into hansed's configuration directory.")
				return nil
			}
			t := newTable("SERVICE", "PORTS", "EXPORTED", "CLUSTERS")
			for _, s := range l {
				var ports, parts []string
				for _, p := range s.Ports {
					ports = append(ports, fmt.Sprint(p.Number))
				}
				for _, x := range s.Clusters {
					text := fmt.Sprintf("%s %d/%d", x.Cluster, x.Ready, x.Total)
					if x.State != "self" && x.State != "fresh" {
						text += " " + x.State
					}
					parts = append(parts, text)
				}
				t.row(plain(s.Namespace+"/"+s.Name), plain(dash(strings.Join(ports, ","))), plain(map[bool]string{true: "yes", false: "no"}[s.Exported]), plain(dash(strings.Join(parts, ", "))))
			}
			c.table(t)
			for _, s := range l {
				if s.Unexported > 0 {
					fmt.Fprintf(c.out, "\n%s %s/%s: %s of this cluster, without identity\n  remedy: give their Pods sidecars (namespace label hanse.mesh/inject=enabled, then restart them); the ServiceExport's condition Ready names them\n",
						c.palette().yellow("not exported:"), s.Namespace, s.Name, counted(s.Unexported, "endpoint"))
				}
				for _, conflict := range s.Conflicts {
					fmt.Fprintf(c.out, "\n%s %s/%s: %s\n", c.palette().yellow("conflict:"), s.Namespace, s.Name, conflict)
				}
			}
			return nil
		},
	}
	c.outputFlag(cmd, "json", "yaml")
	return cmd
}

func (c *cli) endpointsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:               "endpoints SERVICE",
		Short:             "List a service's endpoints in every cluster",
		Long:              "List a service's endpoints in every cluster. SERVICE is NAMESPACE/NAME; the namespace can be left out if there is one service of that name.",
		Example:           "  hanse endpoints payments\n  hanse endpoints shop/payments -o json",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: c.completeServices(),
		RunE: func(cmd *cobra.Command, args []string) error {
			b, err := c.client()
			if err != nil {
				return err
			}
			defer b.Close()
			name, err := service(cmd, b, args[0])
			if err != nil {
				return err
			}
			l, err := b.Endpoints(cmd.Context(), name)
			if err != nil {
				return err
			}
			if c.structured() {
				return c.print(l)
			}
			if len(l) == 0 {
				fmt.Fprintf(c.out, "%s has no endpoints in any cluster.\n", name)
				return nil
			}
			t := newTable("ENDPOINT", "CLUSTER", "REGION", "ZONE", "ADDRESS", "READY", "STATE", "HEALTH", "SEEN")
			for _, e := range l {
				ready := cell{"yes", good}
				switch {
				case e.Draining:
					ready = cell{"draining", doubtful}
				case !e.Ready:
					ready = cell{"no", bad}
				}
				health := cell{dash(e.Health), doubtful}
				switch e.Health {
				case "healthy":
					health.mood = good
				case "dead":
					health.mood = bad
				case "":
					health.mood = neutral
				}
				seen := "-"
				if e.State != "self" {
					seen = age(e.SeenAge)
				}
				t.row(plain(short(e.ID)), plain(e.Cluster), plain(dash(e.Region)), plain(dash(e.Zone)), plain(e.Address), ready, cell{e.State, stateMood(e.State)}, health, plain(seen))
			}
			c.table(t)
			return nil
		},
	}
	c.outputFlag(cmd, "json", "yaml")
	return cmd
}

// short is the part of an ID that people compare; -o json has the whole.
func short(id string) string {
	if len(id) > 8 {
		return id[:8]
	}
	return id
}

func (c *cli) proxiesCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:               "proxies",
		Short:             "List the connected proxies and what they made of their configuration",
		Long:              "List the proxies that are connected to this hansed. STATE is current, behind (not acknowledged yet) or nacked (the proxy refused it, and goes on with the last good one).",
		Example:           "  hanse proxies\n  hanse proxies -o json",
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			b, err := c.client()
			if err != nil {
				return err
			}
			defer b.Close()
			l, err := b.Proxies(cmd.Context())
			if err != nil {
				return err
			}
			if c.structured() {
				return c.print(l)
			}
			if len(l) == 0 {
				fmt.Fprintln(c.out, "No proxy is connected. Each needs an agent token: hanse token create --agent NAMESPACE/SERVICEACCOUNT")
				return nil
			}
			t := newTable("PROXY", "ROLE", "IDENTITY", "ZONE", "STATE", "CONFIG AGE", "CONNECTED", "VERSION")
			for _, p := range l {
				m := map[string]mood{"current": good, "nacked": bad}[p.State]
				if m == neutral {
					m = doubtful
				}
				t.row(plain(p.ID), plain(p.Role), plain(p.SPIFFEID), plain(dash(p.Zone)), cell{p.State, m}, plain(age(p.ConfigAge)), plain(age(p.Connected)), plain(dash(p.Version)))
			}
			c.table(t)
			for _, p := range l {
				for _, r := range p.Resources {
					if r.NACK != "" {
						fmt.Fprintf(c.out, "\n%s %s refused %s %s and goes on with %s: %s\n", c.palette().red("nacked:"), p.ID, r.Type, r.Sent, dash(r.Acked), r.NACK)
					}
				}
			}
			return nil
		},
	}
	c.outputFlag(cmd, "json", "yaml")
	return cmd
}

func (c *cli) explainCommand() *cobra.Command {
	var req admin.ExplainRequest
	var headers []string
	cmd := &cobra.Command{
		Use:   "explain FROM TO",
		Short: "Say how a call would go, where to, and why; or why it would fail",
		Long: `Say how a call of the workload FROM to the service TO would go: name, route, levels of endpoints with each one's rank, health and reason,
gateways, trust, policy, and whether the caller's sidecar has the current configuration. If the call would fail, the first line says why.

FROM is NAMESPACE/NAME of a workload of this cluster; TO a service, or an authority as the workload calls it (payments.shop:8080).
A namespace can be left out where the name is unique. The exit code is 1 if the call would fail.`,
		Example: `  hanse explain frontend payments
  hanse explain shop/frontend payments.shop:8080 --method POST --path /charge --header 'x-user: 7'`,
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: c.completeServices(),
		RunE: func(cmd *cobra.Command, args []string) error {
			req.Headers = map[string]string{}
			for _, h := range headers {
				name, value, ok := strings.Cut(h, ":")
				if !ok || name == "" {
					return usage("--header 'NAME: VALUE'", "%q is not a header", h)
				}
				req.Headers[strings.ToLower(strings.TrimSpace(name))] = strings.TrimSpace(value)
			}
			b, err := c.client()
			if err != nil {
				return err
			}
			defer b.Close()
			req.From, req.To = args[0], args[1]
			for _, name := range []*string{&req.From, &req.To} {
				if !strings.ContainsAny(*name, "/.:") {
					// What is no service may be a workload, or something that hansed explains the absence of.
					if full, err := service(cmd, b, *name); err == nil {
						*name = full
					} else if u := (*usageError)(nil); asUsage(err, &u) {
						return err
					}
				}
			}
			x, err := b.Explain(cmd.Context(), req)
			if err != nil {
				return err
			}
			if c.structured() {
				err = c.print(x)
			} else {
				c.printExplanation(x, args[0], args[1])
			}
			if err == nil && !x.OK {
				return errSaid
			}
			return err
		},
	}
	cmd.Flags().StringVar(&req.Path, "path", "/", "the request's `PATH`")
	cmd.Flags().StringVar(&req.Method, "method", "GET", "the request's `METHOD`")
	cmd.Flags().StringArrayVar(&headers, "header", nil, "a `'NAME: VALUE'` of the request; can be repeated")
	c.outputFlag(cmd, "wide", "json", "yaml")
	return cmd
}

// printExplanation prints x, of a call that was asked for as from and to.
func (c *cli) printExplanation(x admin.Explanation, from, to string) {
	p := c.palette()
	head, rest, _ := strings.Cut(x.Summary, " ")
	m := bad
	if x.OK {
		m = good
	}
	fmt.Fprintf(c.out, "%s %s\n\n", p.mood(m, head), rest)
	line := func(label, text string) { fmt.Fprintf(c.out, "%-8s %s\n", label, text) }
	for _, s := range []struct {
		label string
		lines []string
	}{{"name", []string{x.Name}}, {"route", []string{x.Route}}} {
		if s.lines[0] != "" {
			line(s.label, s.lines[0])
		}
	}
	rows := make([][4]string, len(x.Levels))
	var width [4]int
	for i, l := range x.Levels {
		where := []string{l.Cluster, l.Region}
		if l.Zone == "" {
			where = append(where, "*")
		} else {
			where = append(where, l.Zone)
		}
		rows[i] = [4]string{level(l.Level), strings.TrimSpace(strings.Join(where, " ")), fmt.Sprintf("%d/%d healthy", l.Healthy, l.Total), fmt.Sprintf("%.0f%%", l.Share*100)}
		for j, s := range rows[i] {
			width[j] = max(width[j], len(s))
		}
	}
	for i, l := range x.Levels {
		label := ""
		if i == 0 {
			label = "levels"
		}
		r := rows[i]
		text := fmt.Sprintf("%-*s  %-*s  %-*s  %*s of traffic", width[0], r[0], width[1], r[1], width[2], r[2], width[3], r[3])
		if l.Note != "" {
			text += "   " + l.Note
		}
		line(label, text)
		if c.output == "wide" || l.Healthy < l.Total || len(x.Levels) == 1 {
			for _, e := range l.Endpoints {
				line("", fmt.Sprintf("     %s  %s  %s: %s", short(e.ID), e.Address, e.Health, e.Reason))
			}
		}
	}
	for _, s := range []struct {
		label string
		lines []string
	}{{"trust", x.Trust}, {"policy", x.Policy}, {"config", x.Config}} {
		for i, text := range s.lines {
			if i == 0 {
				line(s.label, text)
			} else {
				line("", text)
			}
		}
	}
	if x.Remedy != "" {
		fmt.Fprintf(c.out, "\nremedy: %s\n", x.Remedy)
	} else if x.OK && c.output != "wide" {
		fmt.Fprintf(c.out, "\nEach endpoint with its reason: hanse explain %s %s -o wide\n", from, to)
	}
}

// level is a level's number; what is not used has none.
func level(n int) string {
	if n < 0 {
		return "-"
	}
	return fmt.Sprint(n)
}

// versions is what version prints.
type versions struct {
	Hanse   string `json:"hanse"`
	Hansed  string `json:"hansed,omitempty"`
	Cluster string `json:"cluster,omitempty"`
	Error   string `json:"error,omitempty"` // why hansed was not reached
}

func (c *cli) versionCommand() *cobra.Command {
	var client bool
	cmd := &cobra.Command{
		Use:     "version",
		Short:   "Print the version of this command, and of hansed if it can be reached",
		Example: "  hanse version\n  hanse version --client\n  hanse version -o json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			v := versions{Hanse: daemon.Version}
			if !client {
				b, err := c.client()
				if err != nil {
					return err
				}
				defer b.Close()
				if s, err := b.Status(cmd.Context()); err == nil {
					v.Hansed, v.Cluster = s.Version, s.Cluster
				} else {
					v.Error = err.Error()
				}
			}
			if c.structured() {
				return c.print(v)
			}
			fmt.Fprintf(c.out, "hanse %s\n", v.Hanse)
			switch {
			case v.Error != "":
				fmt.Fprintf(c.out, "hansed: %s\n", v.Error)
			case v.Hansed != "":
				fmt.Fprintf(c.out, "hansed %s (cluster %s)\n", v.Hansed, v.Cluster)
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&client, "client", false, "do not ask hansed")
	c.outputFlag(cmd, "json", "yaml")
	return cmd
}
