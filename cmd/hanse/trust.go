package main

import (
	"crypto/x509"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hanse-mesh/hanse/cmd/internal/admin"
	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/identity"
)

func (c *cli) trustCommand() *cobra.Command {
	group := &cobra.Command{
		Use:   "trust",
		Short: "List and change whose identities this cluster accepts",
		Long: `A verifier accepts a SPIFFE ID only with the bundle of that ID's own trust domain. Members of the mesh exchange bundles by
themselves; add here the trust domains of others, and remove any that this cluster must no longer believe.`,
	}
	names := c.complete(func(cmd *cobra.Command, b *admin.Client) ([]string, error) {
		l, err := b.TrustList(cmd.Context())
		var names []string
		for _, td := range l {
			names = append(names, td.Name)
		}
		return names, err
	})

	list := &cobra.Command{
		Use: "list", Short: "List the trusted domains", Example: "  hanse trust list", ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			b, err := c.client()
			if err != nil {
				return err
			}
			defer b.Close()
			l, err := b.TrustList(cmd.Context())
			if err != nil {
				return err
			}
			if c.structured() {
				return c.print(l)
			}
			t := newTable("TRUST DOMAIN", "CLUSTER", "SEQUENCE", "ROOTS", "SOURCE", "AGE")
			for _, td := range l {
				name := td.Name
				if td.Own {
					name += "*"
				}
				t.row(plain(name), plain(dash(td.Member)), number(td.Sequence), number(len(td.Authorities)), plain(td.Source), plain(age(td.Age)))
			}
			c.table(t)
			for _, td := range l {
				if len(td.Missing) > 0 {
					fmt.Fprintf(c.out, "\n%s: %s not loaded sequence %d yet.\n", td.Name, have(td.Missing), td.Sequence)
				}
				if td.Note != "" {
					fmt.Fprintf(c.out, "\n%s: %s\n", td.Name, td.Note)
				}
				if td.Refused != nil {
					fmt.Fprintf(c.out, "\n%s: a bundle from %s was refused %s ago; the one before it is in force. See: hanse trust show %s\n", td.Name, td.Refused.Source, age(td.Refused.Age), td.Name)
				}
			}
			return nil
		},
	}
	c.outputFlag(list, "json", "yaml")

	show := &cobra.Command{
		Use: "show [TRUSTDOMAIN]", Short: "Show a trust domain's roots, and who has loaded them",
		Long: `Show a trust domain's roots, and who has loaded them; without a name this cluster's own. With -o bundle the bundle itself is printed in
SPIFFE's JSON, for those that need a first trust: a proxy of this cluster, or another trust domain.`,
		Example: "  hanse trust show east.demo\n  hanse trust show -o bundle > bundle.json",
		Args:    cobra.MaximumNArgs(1), ValidArgsFunction: names,
		RunE: func(cmd *cobra.Command, args []string) error {
			b, err := c.client()
			if err != nil {
				return err
			}
			defer b.Close()
			var name string
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
			if c.output == "bundle" {
				if len(td.Bundle) == 0 {
					return admin.NotFound("hanse trust show "+name, "there is no bundle of %s yet", name)
				}
				_, err := fmt.Fprintf(c.out, "%s\n", td.Bundle)
				return err
			}
			if c.structured() {
				return c.print(td)
			}
			c.printTrust(td)
			return nil
		},
	}
	c.outputFlag(show, "json", "yaml", "bundle")

	var req admin.TrustAdd
	var bundle, webRoots string
	var allow []string
	add := &cobra.Command{
		Use:   "add TRUSTDOMAIN [--bundle FILE | --endpoint URL]",
		Short: "Accept the identities of a trust domain",
		Long: `Accept the identities of a trust domain. Its bundle is a file (PEM or SPIFFE's JSON; - is standard input), or is fetched from its bundle
endpoint and kept fresh; with --endpoint and the profile https_spiffe a first bundle is needed to verify the endpoint. Without either, a member of the
mesh that was removed is trusted again.

With --allow only the IDs that it names may serve the services that it names: other endpoints of that trust domain are not imported, and no sidecar
accepts their identity. Once given, it replaces what was allowed before.`,
		Example: `  hanse trust add partner.example --bundle partner.pem
  hanse trust add partner.example --endpoint https://spire.partner.example:8443 --endpoint-id spiffe://partner.example/spire/server --bundle partner.pem
  hanse trust add east.demo
  hanse trust add east.demo --allow shop/payments=spiffe://east.demo/ns/shop/sa/payments --allow 'docs/*=/ns/docs/**'`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			td, err := spiffeid.TrustDomainFromString(args[0])
			if err != nil {
				return usage("a trust domain is like east.example", "%q: %w", args[0], err)
			}
			req.TrustDomain = td.Name()
			for _, rule := range allow {
				a, err := parseAllow(td, rule)
				if err != nil {
					return usage("--allow SERVICE=ID, such as --allow 'shop/*=spiffe://"+td.Name()+"/ns/shop/**'", "--allow %q: %w", rule, err)
				}
				req.Allow = append(req.Allow, a)
			}
			if bundle != "" {
				raw, err := c.readFile(bundle)
				if err != nil {
					return err
				}
				parsed, err := parseBundle(td, raw)
				if err != nil {
					return fmt.Errorf("bundle %s: %w", bundle, err)
				}
				if req.Bundle, err = parsed.Marshal(); err != nil {
					return fmt.Errorf("bundle %s: %w", bundle, err)
				}
			}
			if webRoots != "" {
				if req.EndpointURL == "" || req.Profile != "https_web" {
					return usage("--endpoint URL --profile https_web --web-roots "+webRoots, "--web-roots says who vouches for an https_web endpoint")
				}
				raw, err := c.readFile(webRoots)
				if err != nil {
					return err
				}
				if !x509.NewCertPool().AppendCertsFromPEM(raw) {
					return fmt.Errorf("%s holds no certificate in PEM", webRoots)
				}
				req.WebRoots = string(raw)
			}
			if req.EndpointURL == "" {
				req.Profile = ""
			} else if req.Profile == "https_spiffe" && req.EndpointID == "" {
				return usage("--endpoint-id spiffe://"+td.Name()+"/spire/server", "with https_spiffe the endpoint's SPIFFE ID is needed")
			}
			b, err := c.client()
			if err != nil {
				return err
			}
			defer b.Close()
			added, err := b.TrustAdd(cmd.Context(), req)
			if err != nil {
				return err
			}
			if c.structured() {
				return c.print(added)
			}
			fmt.Fprintf(c.out, "%s is trusted; this cluster's proxies hear it now.\n", added.Name)
			c.printTrust(added)
			return nil
		},
	}
	add.Flags().StringVar(&bundle, "bundle", "", "its bundle's `FILE`, or -")
	add.Flags().StringVar(&req.EndpointURL, "endpoint", "", "the `URL` of its bundle endpoint")
	add.Flags().StringVar(&req.Profile, "profile", "https_spiffe", "how the endpoint is verified: https_spiffe or https_web")
	add.Flags().StringVar(&req.EndpointID, "endpoint-id", "", "the endpoint's `SPIFFEID`, with https_spiffe")
	add.Flags().StringVar(&webRoots, "web-roots", "", "with https_web, a `FILE` (PEM) of who vouches for the endpoint, instead of hansed's or the system's roots; or -")
	add.Flags().StringArrayVar(&allow, "allow", nil, "`SERVICE[,SERVICE]=ID[,ID]`: these services may be served by these IDs only (may be repeated; patterns with *)")
	c.outputFlag(add, "json", "yaml")

	var yes bool
	remove := &cobra.Command{
		Use: "remove TRUSTDOMAIN", Short: "No longer accept the identities of a trust domain", Example: "  hanse trust remove partner.example --yes",
		Long: "No longer accept the identities of a trust domain. Calls from it and to it fail from now on; open connections are closed.",
		Args: cobra.ExactArgs(1), ValidArgsFunction: names,
		RunE: func(cmd *cobra.Command, args []string) error {
			if ok, err := c.confirm(yes, "Refuse every identity of %s from now on?", args[0]); err != nil {
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
			if err := b.TrustRemove(cmd.Context(), args[0]); err != nil {
				return err
			}
			fmt.Fprintf(c.out, "%s is no longer trusted. Undo: hanse trust add %s\n", args[0], args[0])
			return nil
		},
	}
	remove.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	group.AddCommand(list, show, add, remove, c.trustRefreshCommand(names), c.trustExportCommand(names), c.trustRotateCommand(), c.trustDistrustCommand(names))
	return group
}

// parseAllow reads SERVICE[,SERVICE]=ID[,ID]; without SERVICE= it is about all. An ID may be a path of the trust domain.
func parseAllow(td spiffeid.TrustDomain, rule string) (discovery.Allow, error) {
	var a discovery.Allow
	services, ids, ok := strings.Cut(rule, "=")
	if !ok {
		services, ids = "", rule
	} else if services != "" {
		a.Services = strings.Split(services, ",")
	}
	for _, s := range a.Services {
		if strings.Count(s, "/") != 1 {
			return a, fmt.Errorf("a service is namespace/name, not %q", s)
		}
	}
	for _, id := range strings.Split(ids, ",") {
		if strings.HasPrefix(id, "/") {
			id = td.IDString() + id
		}
		if err := identity.ValidatePattern(id); err != nil {
			return a, err
		}
		a.SPIFFEIDs = append(a.SPIFFEIDs, id)
	}
	return a, nil
}

func have(names []string) string {
	if len(names) == 1 {
		return names[0] + " has"
	}
	return strings.Join(names, ", ") + " have"
}

func (c *cli) printTrust(td admin.TrustDomain) {
	t := newTable()
	own := ""
	if td.Own {
		own = " (this cluster's own)"
	}
	t.row(plain("trust domain"), plain(td.Name+own))
	if td.Member != "" {
		t.row(plain("cluster"), plain(td.Member))
	}
	t.row(plain("source"), plain(fmt.Sprintf("%s, sequence %d, %s old", td.Source, td.Sequence, age(td.Age))))
	for _, a := range td.Authorities {
		t.row(plain("root"), plain(a))
	}
	for _, d := range td.Distrusted {
		t.row(plain("distrusted"), cell{d, bad})
	}
	for _, a := range td.Allow {
		services := "any service"
		if len(a.Services) > 0 {
			services = strings.Join(a.Services, ", ")
		}
		t.row(plain("allowed"), plain(fmt.Sprintf("%s by %s", services, strings.Join(a.SPIFFEIDs, ", "))))
	}
	if td.Withheld > 0 {
		t.row(plain("withheld"), cell{counted(td.Withheld, "endpoint") + " not imported: no rule here lets the ID serve the service", doubtful})
	}
	if len(td.Acked) > 0 {
		t.row(plain("loaded by"), plain(strings.Join(td.Acked, ", ")))
	}
	if len(td.Missing) > 0 {
		t.row(plain("not yet by"), cell{strings.Join(td.Missing, ", "), doubtful})
	}
	c.table(t)
	if r := td.Refused; r != nil {
		fmt.Fprintf(c.out, "%s %s ago, from %s: %s\n", c.palette().red("refused"), age(r.Age), r.Source, r.Reason)
		fmt.Fprintf(c.out, "remedy: ask that trust domain what happened; if it is meant: hanse trust add %s --bundle FILE\n", td.Name)
	}
	if td.Note != "" {
		fmt.Fprintln(c.out, td.Note)
	}
}

// maxFile bounds what is read of a file or of standard input, in bytes. It is hansed's own limit.
const maxFile = 8 << 20

// readFile reads a file, or standard input for "-".
func (c *cli) readFile(name string) ([]byte, error) {
	r := c.in
	if name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		r = f
	}
	b, err := io.ReadAll(io.LimitReader(r, maxFile+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	if len(b) > maxFile {
		return nil, fmt.Errorf("%s is larger than %d MiB", name, maxFile>>20)
	}
	return b, nil
}
