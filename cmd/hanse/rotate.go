package main

import (
	"encoding/json"
	"encoding/pem"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hanse-mesh/hanse/cmd/internal/admin"
)

func (c *cli) trustRotateCommand() *cobra.Command {
	var req admin.RotateRequest
	cmd := &cobra.Command{
		Use: "rotate [--activate-now [--force]]", Short: "Replace the root that this cluster signs with",
		Long: `Replace the root that this cluster signs with. The next root is put into the bundle first, and signs only when every cluster, proxy and agent
that must verify it has loaded that bundle; it is activated all the same when a quarter of the old root's life remains, with an alarm. The old root stays in
the bundle until the last SVID that it signed has ended.

Each of several hansed of a cluster has a root of its own and replaces it, one that is away when it is back. Nothing is lost by Ctrl-C, nor if the hansed that was
asked dies: the rotation goes on by itself, and the same command shows it again. Where the old key is stolen, do not wait:
--activate-now --force, then hanse trust distrust with the old root.`,
		Example: "  hanse trust rotate\n  hanse trust rotate --activate-now\n  hanse trust rotate -o json",
		Args:    cobra.NoArgs, ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if req.Force && !req.ActivateNow {
				return usage("--activate-now --force", "--force is for --activate-now")
			}
			b, err := c.client()
			if err != nil {
				return err
			}
			defer b.Close()
			said := ""
			r, err := b.TrustRotate(cmd.Context(), req, func(e admin.Event) error {
				var r admin.Rotation
				if len(e.Data) == 0 {
					return nil
				}
				if err := json.Unmarshal(e.Data, &r); err != nil {
					return fmt.Errorf("decode the rotation's progress: %w", err)
				}
				line := fmt.Sprintf("root %s waits to be loaded by %s", key(r.Root), strings.Join(r.Missing, ", "))
				if len(r.Missing) == 0 {
					line = fmt.Sprintf("root %s is loaded by all", key(r.Root))
				}
				c.progress(&said, line, fmt.Sprintf("   %s   at the latest in %s   Ctrl-C is harmless: it goes on", age(r.Elapsed), age(r.Left)))
				return nil
			})
			c.endProgress(said)
			if err != nil {
				if cmd.Context().Err() != nil {
					fmt.Fprintln(c.err, "The rotation goes on by itself. See it again: hanse trust rotate; withdraw it: hanse trust distrust ROOT")
				}
				return err
			}
			if c.structured() {
				return c.print(r)
			}
			how := "everybody had loaded it"
			if r.Forced {
				how = "by force; these may refuse its SVIDs until they load the bundle: " + strings.Join(r.Missing, ", ")
			}
			fmt.Fprintf(c.out, "Root %s signs now, after %s: %s.\n", key(r.Root), span(r.Elapsed), how)
			if r.OldUntil != nil {
				fmt.Fprintf(c.out, "The old root %s stays in the bundle for %s, until the last SVID that it signed has ended. At once: hanse trust distrust %s\n",
					key(r.Old), age(r.OldLeft), first(r.Old))
			}
			if len(r.Away) > 0 {
				fmt.Fprintf(c.out, "Not there, and replacing their roots when they are back: %s\n", strings.Join(r.Away, ", "))
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&req.ActivateNow, "activate-now", false, "do not wait for those who have not loaded it")
	cmd.Flags().BoolVar(&req.Force, "force", false, "with --activate-now: also if somebody would refuse what it signs")
	c.outputFlag(cmd, "json", "yaml")
	return cmd
}

func (c *cli) trustDistrustCommand(names cobra.CompletionFunc) *cobra.Command {
	var req admin.DistrustRequest
	var yes bool
	var wait time.Duration
	cmd := &cobra.Command{
		Use: "distrust TRUSTDOMAIN|AUTHORITY", Short: "Refuse a trust domain, or one root, at once and everywhere in this cluster",
		Long: `Refuse a trust domain, or one of its roots, at once and everywhere in this cluster: new connections fail, and open ones that rest on it are closed, in hansed and
in every proxy. It prints when the last was closed, and who has not confirmed. The decision stays, whatever bundles come later, until it is undone.

An authority is named by the beginning (at least 8 digits) of what hanse trust show prints of it, of its key ID or of its JWT key ID. An old root of this cluster's
own is first left by all agents, then revoked; the one that signs must be rotated away before. The root of a hansed that is away can be revoked whatever it did.`,
		Example: "  hanse trust distrust partner.example\n  hanse trust distrust 9f3a00417b11 --yes\n  hanse trust distrust partner.example --undo",
		Args:    cobra.ExactArgs(1), ValidArgsFunction: names,
		RunE: func(cmd *cobra.Command, args []string) error {
			if wait <= 0 {
				return usage("--wait 30s", "%s is no time to wait", wait)
			}
			req.What, _, _ = strings.Cut(args[0], "…") // as hanse trust show prints a root
			req.Wait = wait.Seconds()
			if !req.Undo {
				if ok, err := c.confirm(yes, "Refuse every identity that rests on %s from now on, and close its connections?", args[0]); err != nil {
					return err
				} else if !ok {
					fmt.Fprintln(c.err, "Nothing was changed.")
					return errSaid
				}
			}
			b, err := c.client()
			if err != nil {
				return err
			}
			defer b.Close()
			said := ""
			d, err := b.TrustDistrust(cmd.Context(), req, func(e admin.Event) error {
				var d admin.Distrusted
				if len(e.Data) == 0 {
					return nil
				}
				if err := json.Unmarshal(e.Data, &d); err != nil {
					return fmt.Errorf("decode the progress: %w", err)
				}
				line := fmt.Sprintf("%d confirmed, waiting for %s", d.Confirmed, strings.Join(d.Missing, ", "))
				if d.Note != "" {
					line = fmt.Sprintf("%s: %s", d.Note, strings.Join(d.Missing, ", "))
				}
				c.progress(&said, line, "")
				return nil
			})
			c.endProgress(said)
			if err != nil {
				return err
			}
			if c.structured() {
				if err := c.print(d); err != nil {
					return err
				}
			} else {
				c.printDistrusted(d, req)
			}
			if len(d.Missing) > 0 {
				return errSaid
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&req.Undo, "undo", false, "trust it again")
	cmd.Flags().BoolVar(&req.Force, "force", false, "revoke an own root also if agents rest on it, which then need new tokens")
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	cmd.Flags().DurationVar(&wait, "wait", 30*time.Second, "how long to wait for confirmations")
	c.outputFlag(cmd, "json", "yaml")
	return cmd
}

func (c *cli) printDistrusted(d admin.Distrusted, req admin.DistrustRequest) {
	what := d.TrustDomain
	if d.Authority != "" {
		what = fmt.Sprintf("root %s of %s", key(d.Authority), d.TrustDomain)
	}
	p := c.palette()
	if d.Undone {
		fmt.Fprintf(c.out, "%s is trusted again; %s loaded it.\n", what, haveProxies(d.Confirmed))
	} else {
		fmt.Fprintf(c.out, "%s is refused. hansed closed %s in %s; %s none open, the last after %s.\n",
			what, counted(d.Closed, "connection"), span(d.HansedIn), haveProxies(d.Confirmed), span(d.LastIn))
	}
	if d.Note != "" {
		fmt.Fprintln(c.out, d.Note)
	}
	if len(d.Missing) > 0 {
		fmt.Fprintf(c.out, "%s by %s: they act by the old bundles until they answer.\nremedy: hanse proxies shows them; run this again when they are back\n", p.red("not confirmed"), strings.Join(d.Missing, ", "))
	}
	if !d.Undone && d.Note == "" {
		fmt.Fprintf(c.out, "Undo: hanse trust distrust %s --undo\n", req.What)
	}
}

func haveProxies(n int) string {
	if n == 1 {
		return "1 proxy has"
	}
	return fmt.Sprintf("%d proxies have", n)
}

// progress shows work under way: one line that is rewritten on a terminal, else a line for each news.
func (c *cli) progress(said *string, line, aside string) {
	switch {
	case c.errTTY:
		fmt.Fprintf(c.err, "\r\x1b[K%s", c.fit(line+aside))
	case *said != line:
		fmt.Fprintln(c.err, line)
	}
	*said = line
}

func (c *cli) endProgress(said string) {
	if c.errTTY && said != "" {
		fmt.Fprint(c.err, "\r\x1b[K")
	}
}

// key is an authority's name as hanse trust show prints it; first is what another command takes of it.
func key(id string) string {
	if len(id) == 64 {
		return id[:8] + "…" + id[60:]
	}
	return id
}

func first(id string) string { return id[:min(16, len(id))] }

func (c *cli) trustRefreshCommand(names cobra.CompletionFunc) *cobra.Command {
	cmd := &cobra.Command{
		Use: "refresh TRUSTDOMAIN", Short: "Fetch a trust domain's bundle from its endpoint now", Example: "  hanse trust refresh partner.example",
		Args: cobra.ExactArgs(1), ValidArgsFunction: names,
		RunE: func(cmd *cobra.Command, args []string) error {
			b, err := c.client()
			if err != nil {
				return err
			}
			defer b.Close()
			td, err := b.TrustRefresh(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if c.structured() {
				return c.print(td)
			}
			fmt.Fprintf(c.out, "The bundle of %s is sequence %d, %s.\n", td.Name, td.Sequence, counted(len(td.Authorities), "root"))
			return nil
		},
	}
	c.outputFlag(cmd, "json", "yaml")
	return cmd
}

func (c *cli) trustExportCommand(names cobra.CompletionFunc) *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use: "export [TRUSTDOMAIN]", Short: "Print a trust domain's bundle, for those who are to trust it",
		Long: `Print a trust domain's bundle, for those who are to trust it; without a name this cluster's own. It is public. The SPIFFE JSON has X.509 and JWT
authorities, a sequence and a refresh hint; PEM has the X.509 authorities only.`,
		Example: "  hanse trust export > west.json\n  hanse trust export --format pem > west.pem\n  hanse trust export | hanse --context east trust add west.demo --bundle -",
		Args:    cobra.MaximumNArgs(1), ValidArgsFunction: names,
		RunE: func(cmd *cobra.Command, args []string) error {
			if format != "spiffe" && format != "pem" {
				return usage("--format spiffe or --format pem", "there is no format %q", format)
			}
			b, err := c.client()
			if err != nil {
				return err
			}
			defer b.Close()
			name := ""
			if len(args) == 1 {
				name = args[0]
			} else {
				s, err := b.Status(cmd.Context())
				if err != nil {
					return err
				}
				name = s.TrustDomain
			}
			td, err := b.TrustShow(cmd.Context(), name)
			if err != nil {
				return err
			}
			if len(td.Bundle) == 0 {
				return admin.NotFound("hanse trust show "+name, "there is no bundle of %s", name)
			}
			if format == "spiffe" {
				_, err := fmt.Fprintf(c.out, "%s\n", td.Bundle)
				return err
			}
			id, err := spiffeid.TrustDomainFromString(td.Name)
			if err != nil {
				return err
			}
			parsed, err := spiffebundle.Parse(id, td.Bundle)
			if err != nil {
				return fmt.Errorf("bundle of %s: %w", name, err)
			}
			for _, cert := range parsed.X509Authorities() {
				if err := pem.Encode(c.out, &pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}); err != nil {
					return err
				}
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&format, "format", "spiffe", "`FORMAT`: spiffe or pem")
	must(cmd.RegisterFlagCompletionFunc("format", cobra.FixedCompletions([]string{"spiffe", "pem"}, cobra.ShellCompDirectiveNoFileComp)))
	return cmd
}
