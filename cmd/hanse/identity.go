package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/hanse-mesh/hanse/cmd/internal/admin"
)

func (c *cli) identityCommand() *cobra.Command {
	group := &cobra.Command{
		Use:   "identity",
		Short: "SPIFFE IDs of this cluster: who has which, and why",
		Long: `A workload's SPIFFE ID comes from its namespace and service account, or from a registration entry. Agents (sidecars, SPIRE agents) that have attested get
SVIDs for the entries that are theirs; everything here is of this cluster's own trust domain.`,
	}
	group.AddCommand(c.identityListCommand(), c.identityShowCommand(), c.identityMintCommand())
	return group
}

func (c *cli) identityListCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "list",
		Short:   "List SPIFFE IDs, the services that they serve, and the agents that have SVIDs for them",
		Example: "  hanse identity list\n  hanse identity list -o json | jq -r '.[] | select(.agents == []) | .id'   # nobody has asked for these",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			b, err := c.client()
			if err != nil {
				return err
			}
			defer b.Close()
			all, err := b.Identities(cmd.Context())
			if err != nil {
				return err
			}
			if c.structured() {
				return c.print(all)
			}
			if len(all) == 0 {
				fmt.Fprintln(c.out, "Nobody has an identity yet: no agent has attested, there is no entry, and no endpoint with one. See: hanse token create --help")
				return nil
			}
			t := newTable("ID", "SERVES", "ENTRIES", "AGENTS", "SEEN")
			for _, i := range all {
				seen := "-"
				for _, a := range i.Agents {
					if a.Seen != nil {
						seen = age(*a.Seen) + " ago"
						break
					}
				}
				t.row(plain(i.ID), plain(dash(strings.Join(i.Services, ", "))), plain(fmt.Sprint(len(i.Entries))), plain(fmt.Sprint(len(i.Agents))), plain(seen))
			}
			c.table(t)
			return nil
		},
	}
	c.outputFlag(cmd, "json", "yaml")
	return cmd
}

func (c *cli) identityShowCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:               "show ID",
		Short:             "Show one: its entries with their selectors, and its agents",
		Long:              "ID is a SPIFFE ID, or NAMESPACE/SERVICE-ACCOUNT.",
		Example:           "  hanse identity show shop/payments\n  hanse identity show spiffe://west.demo/ns/shop/sa/payments -o json",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: c.completeIdentities,
		RunE: func(cmd *cobra.Command, args []string) error {
			b, err := c.client()
			if err != nil {
				return err
			}
			defer b.Close()
			i, err := b.Identity(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if c.structured() {
				return c.print(i)
			}
			fmt.Fprintf(c.out, "ID        %s\nserves    %s\n", i.ID, dash(strings.Join(i.Services, ", ")))
			for _, e := range i.Entries {
				fmt.Fprintf(c.out, "\nentry     %s\n  parent     %s\n  selectors  %s\n", e.ID, e.Parent, dash(strings.Join(e.Selectors, ", ")))
				for _, f := range [][2]string{{"federates", strings.Join(e.FederatesWith, ", ")}, {"DNS names", strings.Join(e.DNSNames, ", ")}, {"hint", e.Hint}} {
					if f[1] != "" {
						fmt.Fprintf(c.out, "  %-9s  %s\n", f[0], f[1])
					}
				}
				if e.Expires != nil {
					fmt.Fprintf(c.out, "  expires    in %s\n", age(time.Until(*e.Expires).Seconds()))
				}
			}
			if len(i.Agents) > 0 {
				fmt.Fprintln(c.out)
				t := newTable("AGENT", "ATTESTED BY", "SVID EXPIRES", "SEEN")
				for _, a := range i.Agents {
					seen, expires := "-", "in "+age(time.Until(a.Expires).Seconds())
					if a.Seen != nil {
						seen = age(*a.Seen) + " ago"
					}
					if a.Banned {
						expires = "banned"
					}
					t.row(plain(a.ID), plain(a.Type), plain(expires), plain(seen))
				}
				c.table(t)
			}
			return nil
		},
	}
	c.outputFlag(cmd, "json", "yaml")
	return cmd
}

func (c *cli) identityMintCommand() *cobra.Command {
	var dir, file string
	var life time.Duration
	var dns, audience []string
	var show bool
	cmd := &cobra.Command{
		Use:   "mint ID --dir DIR | mint ID --audience AUDIENCE --file FILE",
		Short: "Have an SVID signed by hand, to try something as a workload",
		Long: `ID is a SPIFFE ID, or NAMESPACE/SERVICE-ACCOUNT; those of control planes, gateways, agents and administrators are not given away.

With --dir the SVID is X.509: the private key is made here and goes nowhere else, and DIR then holds svid.pem, key.pem and bundle.json, all with mode 0600. With --audience it is a JWT, in
FILE with mode 0600, or on standard output where --show asks for that. hansed logs who was minted, and until when.`,
		Example: `  hanse identity mint shop/frontend --dir /tmp/frontend --ttl 10m
  hanse identity mint shop/frontend --audience payments --file frontend.jwt
  curl -H "Authorization: Bearer $(hanse identity mint shop/frontend --audience payments --show)" …`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: c.completeIdentities,
		RunE: func(cmd *cobra.Command, args []string) error {
			switch jwt := len(audience) > 0; {
			case jwt && (dir != "" || len(dns) > 0):
				return usage("without --audience it is an X509-SVID", "--dir and --dns are of X509-SVIDs")
			case jwt && (file == "") == !show:
				return usage("--show prints a secret: to a terminal it stays in the scrollback", "say where the JWT goes: --file FILE or --show")
			case !jwt && dir == "":
				return usage("hanse identity mint shop/frontend --dir frontend", "say where the files go: --dir DIR, or --audience for a JWT")
			case show && c.output != "":
				return usage("leave --show or --output out", "--show prints the token and nothing else")
			case !jwt && (file != "" || show):
				return usage("give --audience", "--file and --show are of JWT-SVIDs")
			}
			req := admin.MintRequest{ID: args[0], DNSNames: dns, Audience: audience, TTL: life.Seconds()}
			var private []byte
			if dir != "" {
				var err error
				if req.PublicKey, private, err = newKey(); err != nil {
					return err
				}
			}
			b, err := c.client()
			if err != nil {
				return err
			}
			defer b.Close()
			got, err := b.Mint(cmd.Context(), req)
			if err != nil {
				return err
			}
			where := file
			switch {
			case show:
				fmt.Fprintln(c.out, got.Token)
				return nil
			case file != "":
				err = replace(file, []byte(got.Token+"\n"))
			default:
				where = dir
				err = writeSVID(dir, got.Chain, private, got.Bundle)
			}
			if err != nil {
				return err
			}
			got.Token = "" // it is in its file
			if c.structured() {
				return c.print(got)
			}
			fmt.Fprintf(c.out, "%s, expires in %s: %s\n", got.ID, age(time.Until(got.Expires).Seconds()), where)
			return nil
		},
	}
	cmd.Flags().StringVar(&dir, "dir", "", "`DIR` for an X509-SVID's files; made if it is missing")
	cmd.Flags().StringVar(&file, "file", "", "`FILE` for a JWT-SVID")
	cmd.Flags().BoolVar(&show, "show", false, "print the JWT-SVID")
	cmd.Flags().StringSliceVar(&audience, "audience", nil, "`AUDIENCE` of a JWT-SVID; can be repeated")
	cmd.Flags().StringSliceVar(&dns, "dns", nil, "DNS `NAME` in an X509-SVID; can be repeated")
	cmd.Flags().DurationVar(&life, "ttl", 0, "life, from 1m to 168h (default the authority's)")
	must(cmd.MarkFlagDirname("dir"))
	c.outputFlag(cmd, "json", "yaml")
	return cmd
}

// completeIdentities completes a SPIFFE ID.
func (c *cli) completeIdentities(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	b, err := c.client()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	defer b.Close()
	all, _ := b.Identities(cmd.Context())
	var out []string
	for _, i := range all {
		out = append(out, i.ID)
	}
	return out, cobra.ShellCompDirectiveNoFileComp
}
