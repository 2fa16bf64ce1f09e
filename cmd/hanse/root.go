package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/hanse-mesh/hanse/cmd/internal/admin"
)

// root returns the whole tree of commands.
func (c *cli) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "hanse",
		Short: "Join clusters into one service mesh, look at it, and rehearse its failures",
		Long: `Hanse joins clusters into one service mesh. Every cluster keeps its own control plane, its own store and its own trust domain;
what one exports can be called from all, over mutual TLS, from the nearest healthy place.

This command talks to the control plane of one cluster, hansed, by its Unix socket, remotely with an admin SVID, or through the API server of the Kubernetes cluster it runs in.`,
		Example: `  hanse demo                            # three clusters on this machine, to try everything
  hanse status                          # is this cluster well?
  hanse clusters                        # who is in the mesh?
  hanse explain frontend payments       # how would this call go?`,
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.PersistentFlags().StringVar(&c.context, "context", "", "the `NAME` of a context of the configuration file, or else of a kubeconfig (default $HANSE_CONTEXT)")
	root.PersistentFlags().StringVar(&c.kubeconfig, "kubeconfig", "", "the kubeconfig `FILE` (default $KUBECONFIG, or ~/.kube/config)")
	root.PersistentFlags().StringVar(&c.socket, "socket", "", "hansed's Unix socket `PATH` (default $HANSE_SOCKET, or "+defaultSocket+")")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usage(cmd.CommandPath()+" --help", "%w", err)
	})
	root.AddGroup(
		&cobra.Group{ID: "kube", Title: "On Kubernetes:"},
		&cobra.Group{ID: "mesh", Title: "The mesh:"},
		&cobra.Group{ID: "look", Title: "What is there, and why:"},
		&cobra.Group{ID: "config", Title: "Configuration:"},
		&cobra.Group{ID: "try", Title: "Try it:"},
	)
	add := func(group string, cmds ...*cobra.Command) {
		for _, cmd := range cmds {
			cmd.GroupID = group
			root.AddCommand(cmd)
		}
	}
	add("kube", c.installCommand(), c.upgradeCommand(), c.uninstallCommand(), c.checkCommand())
	add("mesh", c.tokenCommand(), c.joinCommand(), c.leaveCommand(), c.clustersCommand(), c.trustCommand(), c.identityCommand(), c.adminCommand())
	add("look", c.statusCommand(), c.servicesCommand(), c.endpointsCommand(), c.proxiesCommand(), c.explainCommand())
	add("config", c.applyCommand(), c.getCommand(), c.deleteCommand(), c.validateCommand(), c.injectCommand(), c.contextsCommand())
	add("try", c.drillCommand(), c.demoCommand())
	root.AddCommand(c.versionCommand(), c.docsCommand(root))
	root.MarkFlagsMutuallyExclusive("context", "socket")
	must(root.MarkPersistentFlagFilename("kubeconfig"))
	must(root.RegisterFlagCompletionFunc("context", c.completeContexts))
	strict(root)
	return root
}

// must is for mistakes of this program's own text, such as completing a flag that does not exist.
func must(err error) {
	if err != nil {
		panic(err)
	}
}

// strict makes wrong arguments a usageError, everywhere, and a group of commands refuse what it does not have.
func strict(cmd *cobra.Command) {
	for _, sub := range cmd.Commands() {
		strict(sub)
	}
	if cmd.HasSubCommands() && cmd.RunE == nil {
		cmd.Args = cobra.ArbitraryArgs
		cmd.RunE = func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return cmd.Help()
			}
			hint := cmd.CommandPath() + " --help"
			cmd.SuggestionsMinimumDistance = 2
			if s := cmd.SuggestionsFor(args[0]); len(s) > 0 {
				hint = "did you mean `" + cmd.CommandPath() + " " + s[0] + "`?"
			}
			return usage(hint, "%s has no command %q", cmd.CommandPath(), args[0])
		}
		return
	}
	check := cmd.Args
	if check == nil {
		check = cobra.NoArgs
	}
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			if u := (*usageError)(nil); asUsage(err, &u) {
				return err
			}
			return usage("usage: "+cmd.UseLine(), "%w", err)
		}
		// cobra checks these later, and its errors could not be told from those of the command itself.
		if err := errors.Join(cmd.ValidateRequiredFlags(), cmd.ValidateFlagGroups()); err != nil {
			return usage(cmd.CommandPath()+" --help", "%w", err)
		}
		return nil
	}
}

// outputFlag adds -o with the formats that the command has beside its table.
func (c *cli) outputFlag(cmd *cobra.Command, formats ...string) {
	cmd.Flags().StringVarP(&c.output, "output", "o", "", "output `FORMAT`: "+strings.Join(formats, ", ")+"; a table for people if not given")
	must(cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(formats, cobra.ShellCompDirectiveNoFileComp)))
	before := cmd.PreRunE
	cmd.PreRunE = func(cmd *cobra.Command, args []string) error {
		if c.output != "" && !slices.Contains(formats, c.output) {
			return usage("-o "+strings.Join(formats, "|"), "there is no output format %q here", c.output)
		}
		if before != nil {
			return before(cmd, args)
		}
		return nil
	}
}

// complete returns a completion from what hansed knows. Without hansed there is none.
func (c *cli) complete(names func(*cobra.Command, *admin.Client) ([]string, error)) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		b, err := c.client()
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		defer b.Close()
		l, err := names(cmd, b)
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return l, cobra.ShellCompDirectiveNoFileComp
	}
}

func (c *cli) completeMembers() cobra.CompletionFunc {
	return c.complete(func(cmd *cobra.Command, b *admin.Client) ([]string, error) {
		all, err := b.Clusters(cmd.Context())
		var names []string
		for _, m := range all.Clusters {
			if !m.Self {
				names = append(names, m.Name)
			}
		}
		return names, err
	})
}

func (c *cli) completeClusters() cobra.CompletionFunc {
	return c.complete(func(cmd *cobra.Command, b *admin.Client) ([]string, error) {
		all, err := b.Clusters(cmd.Context())
		var names []string
		for _, m := range all.Clusters {
			names = append(names, m.Name)
		}
		return names, err
	})
}

func (c *cli) completeServices() cobra.CompletionFunc {
	return c.complete(func(cmd *cobra.Command, b *admin.Client) ([]string, error) {
		all, err := b.Services(cmd.Context())
		var names []string
		for _, s := range all {
			names = append(names, s.Namespace+"/"+s.Name)
		}
		return names, err
	})
}

// service finds the whole name of a service: "payments" is shop/payments if there is no other payments.
func service(cmd *cobra.Command, b admin.Backend, name string) (string, error) {
	if strings.Contains(name, "/") {
		return name, nil
	}
	all, err := b.Services(cmd.Context())
	if err != nil {
		return "", err
	}
	var found []string
	for _, s := range all {
		if s.Name == name {
			found = append(found, s.Namespace+"/"+s.Name)
		}
	}
	switch len(found) {
	case 0:
		return "", admin.NotFound("hanse services lists what there is", "no service %q", name)
	case 1:
		return found[0], nil
	}
	return "", usage("say which, as NAMESPACE/NAME", "there are several services %q: %s", name, strings.Join(found, ", "))
}

// confirm asks on the terminal. With --yes nobody is asked; without a terminal nobody can be, and silence is not a yes.
func (c *cli) confirm(yes bool, format string, args ...any) (bool, error) {
	if yes {
		return true, nil
	}
	if !c.inTTY || !c.errTTY {
		return false, usage("add --yes if that is what you want", "there is no terminal to ask: "+format, args...)
	}
	fmt.Fprintf(c.err, format+" [y/N] ", args...)
	line, err := readLine(c.in)
	if err != nil {
		return false, err
	}
	line = strings.ToLower(strings.TrimSpace(line))
	return line == "y" || line == "yes", nil
}
