package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/hanse-mesh/hanse/cmd/internal/admin"
	"github.com/hanse-mesh/hanse/cmd/internal/chart"
	"github.com/hanse-mesh/hanse/cmd/internal/daemon"
	"github.com/hanse-mesh/hanse/cmd/internal/install"
)

// installing is what the commands for an installation share.
type installing struct {
	namespace string
	files     []string // of values
	sets      []string
	version   string
	wait      bool
	timeout   time.Duration
	dryRun    bool
	force     bool
	yes       bool
}

func (i *installing) flags(c *cli, cmd *cobra.Command) {
	cmd.Flags().StringVarP(&i.namespace, "namespace", "n", chart.Namespace, "the `NAMESPACE` of hansed and gateways")
	cmd.Flags().StringArrayVarP(&i.files, "values", "f", nil, "a `FILE` of values; later ones win")
	cmd.Flags().StringArrayVar(&i.sets, "set", nil, "a value as `KEY=VALUE`, over those of files")
	cmd.Flags().StringVar(&i.version, "image-tag", daemon.Version, "the `VERSION` of the images")
	cmd.Flags().BoolVar(&i.wait, "wait", true, "wait until all is ready")
	cmd.Flags().DurationVar(&i.timeout, "timeout", 5*time.Minute, "how long to wait")
	cmd.Flags().BoolVar(&i.dryRun, "dry-run", false, "say what would be done, and do nothing; with -o yaml, the objects")
	cmd.Flags().BoolVar(&i.force, "force-conflicts", false, "take over fields that somebody else has changed")
	must(cmd.MarkFlagFilename("values", "yaml", "yml"))
	c.outputFlag(cmd, "yaml")
}

// cluster is the Kubernetes cluster of --context; a context of hanse's own file may name one.
func (c *cli) cluster(namespace string) (*install.Cluster, error) {
	name := cmp.Or(c.context, c.getenv("HANSE_CONTEXT"))
	if name != "" {
		x, err := c.named(name)
		if err != nil {
			return nil, err
		}
		if x.KubeContext == "" {
			return nil, usage("kubectl config get-contexts", "context %q is a hansed outside of Kubernetes", name)
		}
		name = x.KubeContext
		if x.Namespace != "" && namespace == chart.Namespace {
			namespace = x.Namespace
		}
	}
	k, err := install.Connect(c.kubeconfigs(), name, namespace)
	if err != nil {
		return nil, usage("--context NAME; kubectl config get-contexts lists them", "%w", err)
	}
	return k, nil
}

// values reads those that the command line gives.
func (i *installing) values() (map[string]any, error) {
	var files [][]byte
	for _, f := range i.files {
		b, err := os.ReadFile(f)
		if err != nil {
			return nil, usage("--values FILE", "%w", err)
		}
		files = append(files, b)
	}
	v, err := chart.Merge(files, i.sets)
	if err != nil {
		return nil, usage("deploy/chart/hanse/values.yaml describes all values", "%w", err)
	}
	return v, nil
}

func (i *installing) objects(values map[string]any, kubeVersion string, upgrade bool) ([]*unstructured.Unstructured, error) {
	l, err := chart.Objects(chart.Options{Namespace: i.namespace, Values: values, Version: i.version, KubeVersion: kubeVersion, Upgrade: upgrade})
	if errors.Is(err, chart.ErrValues) {
		return nil, usage("deploy/chart/hanse/values.yaml describes all values; cluster and trustDomain are required: --set cluster=west --set trustDomain=west.example", "%w", err)
	}
	return l, err
}

func (c *cli) installCommand() *cobra.Command {
	var i installing
	cmd := &cobra.Command{
		Use:   "install --set cluster=NAME --set trustDomain=DOMAIN",
		Short: "Install Hanse into a Kubernetes cluster",
		Long: `Install Hanse into a Kubernetes cluster: its definitions, hansed, and gateways, of the Helm chart that this command carries. It checks what the cluster
must have beforehand, applies everything (server-side), and waits until all is ready. What it was given is kept in the cluster, for "hanse upgrade". If it is interrupted, do it again.

With --dry-run -o yaml it prints the objects, and asks no cluster: for GitOps.`,
		Example: `  hanse install --context west --set cluster=west --set trustDomain=west.example
  hanse install --context west -f west.yaml
  hanse install --set cluster=west --set trustDomain=west.example --dry-run -o yaml > hanse.yaml`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			values, err := i.values()
			if err != nil {
				return err
			}
			if i.dryRun && c.output == "yaml" {
				return c.printManifests(&i, values)
			}
			if _, err := i.objects(values, "", false); err != nil { // before anything is asked
				return err
			}
			k, err := c.cluster(i.namespace)
			if err != nil {
				return err
			}
			i.namespace = k.Namespace
			if _, there, err := k.Values(cmd.Context()); err != nil && !apierrors.IsForbidden(err) { // the checks say what is not allowed
				return unreachable(k, err)
			} else if there && !i.dryRun {
				return &admin.Error{Message: "Hanse is installed in " + k.Context + " already", Hint: "hanse upgrade --context " + k.Context + " changes it and keeps its values"}
			}
			return c.bring(cmd.Context(), k, &i, values, false)
		},
	}
	i.flags(c, cmd)
	return cmd
}

func (c *cli) printManifests(i *installing, values map[string]any) error {
	objects, err := i.objects(values, "", false)
	if err != nil {
		return err
	}
	b, err := chart.YAML(objects)
	if err != nil {
		return err
	}
	_, err = c.out.Write(b)
	return err
}

func unreachable(k *install.Cluster, err error) error {
	if apierrors.IsForbidden(err) {
		return &admin.Error{Message: fmt.Sprintf("context %s: %s", k.Context, strings.TrimPrefix(err.Error(), "context "+k.Context+": ")), Hint: "ask for the ClusterRole cluster-admin, or let somebody do it who has it"}
	}
	return &admin.Error{Message: fmt.Sprintf("the API server of context %s: %v", k.Context, err), Hint: "does `kubectl --context " + k.Context + " get namespaces` answer?"}
}

// bring applies what values ask for, and waits.
func (c *cli) bring(ctx context.Context, k *install.Cluster, i *installing, values map[string]any, upgrade bool) error {
	version, _, err := k.Version(ctx)
	if err != nil {
		return unreachable(k, err)
	}
	objects, err := i.objects(values, version, upgrade)
	if err != nil {
		return err
	}
	if objects, err = k.WithEtcdSecret(ctx, objects, c.now()); apierrors.IsForbidden(err) {
		return unreachable(k, err)
	} else if err != nil {
		return err
	}
	p := c.palette()
	plan := install.Plan{Objects: objects, Values: values, Version: i.version, Force: i.force}
	if !upgrade {
		fmt.Fprintf(c.out, "Installing Hanse %s as cluster %q into %s of context %s\n", i.version, values["cluster"], k.Namespace, k.Context)
		if !k.Before(ctx, objects, func(f admin.Check) { c.check(c.out, p, f, checkWidth) }) {
			fmt.Fprintln(c.out, "Nothing was changed.")
			return errSaid
		}
	}
	if i.dryRun || upgrade {
		changes, err := k.Diff(ctx, plan)
		if err != nil {
			return err
		}
		n := c.printChanges(changes)
		if i.dryRun {
			fmt.Fprintln(c.out, "Nothing was changed.")
			return nil
		}
		if n > 0 {
			if ok, err := c.confirm(i.yes, "Change %s in context %s?", counted(n, "object"), k.Context); err != nil {
				return err
			} else if !ok {
				fmt.Fprintln(c.err, "Nothing was changed.")
				return errSaid
			}
		}
	}
	err = k.Apply(ctx, plan, func(ch install.Change) {
		if !upgrade || ch.Verb == "skip" {
			c.printChange(ch)
		}
	})
	if err != nil {
		return &admin.Error{Message: err.Error(), Hint: "what was applied stays; do it again when the cause is gone"}
	}
	if !i.wait {
		fmt.Fprintf(c.out, "Applied. hanse check --context %s tells when it is ready.\n", k.Context)
		return nil
	}
	waiting, cancel := context.WithTimeout(ctx, i.timeout)
	defer cancel()
	begin := c.now()
	if err := k.Wait(waiting, func(what string) { fmt.Fprintf(c.out, "  … %s\n", what) }); err != nil {
		return &admin.Error{Message: err.Error(), Hint: "hanse check --context " + k.Context + " says what is missing; the installation stays, and may still become ready"}
	}
	done := "Installed"
	if upgrade {
		done = "Upgraded"
	}
	fmt.Fprintf(c.out, "%s and ready after %s.\n", p.green(done), age(c.now().Sub(begin).Seconds()))
	fmt.Fprintf(c.out, "Try: hanse check --context %s · hanse join --context %s --to-context OTHER · kubectl label namespace NAMESPACE hanse.mesh/inject=enabled\n", k.Context, k.Context)
	return nil
}

// printChange tells one that was made.
func (c *cli) printChange(ch install.Change) {
	p := c.palette()
	switch ch.Verb {
	case "skip":
		fmt.Fprintf(c.out, "  %s %s: %s\n", p.yellow("·"), ch.Object, ch.Note)
	case "remove":
		fmt.Fprintf(c.out, "  %s %s\n", p.red("-"), ch.Object)
	case "keep":
		fmt.Fprintf(c.out, "  = %s\n", ch.Object)
	default:
		fmt.Fprintf(c.out, "  %s %s\n", p.green("+"), ch.Object)
	}
}

// printChanges tells those that would be made, and returns how many.
func (c *cli) printChanges(l []install.Change) int {
	p := c.palette()
	n := 0
	for _, ch := range l {
		switch ch.Verb {
		case "create":
			fmt.Fprintf(c.out, "  %s %s\n", p.green("+"), ch.Object)
		case "remove":
			fmt.Fprintf(c.out, "  %s %s\n", p.red("-"), ch.Object)
		case "change":
			fmt.Fprintf(c.out, "  %s %s\n", p.yellow("~"), ch.Object)
			for _, f := range ch.Fields {
				fmt.Fprintf(c.out, "      %s\n", f)
			}
		case "skip":
			fmt.Fprintf(c.out, "  · %s: %s\n", ch.Object, ch.Note)
			continue
		default:
			continue
		}
		n++
	}
	if n == 0 {
		fmt.Fprintln(c.out, "  nothing differs")
	}
	return n
}

func (c *cli) upgradeCommand() *cobra.Command {
	var i installing
	var reset bool
	cmd := &cobra.Command{
		Use:   "upgrade",
		Short: "Bring an installation to this version, or change its values",
		Long: `Bring an installation to the version of this command, or change its values. Those it was given before are kept, and what is given now is put over them. It shows what would change,
field by field, by the API server's own dry run, and asks. What an earlier version had and this has not is removed. Pods are replaced one by one; calls of the mesh go on meanwhile.`,
		Example: `  hanse upgrade --context west
  hanse upgrade --context west --set gateway.replicas=3
  hanse upgrade --context west --dry-run`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			given, err := i.values()
			if err != nil {
				return err
			}
			k, err := c.cluster(i.namespace)
			if err != nil {
				return err
			}
			i.namespace = k.Namespace
			kept, there, err := k.Values(cmd.Context())
			if err != nil {
				return unreachable(k, err)
			}
			if !there {
				return &admin.Error{Message: fmt.Sprintf("context %s, namespace %s: %v", k.Context, k.Namespace, install.ErrNotInstalled), Hint: "hanse install --context " + k.Context}
			}
			values := given
			if !reset {
				values = chart.Over(given, kept)
			}
			if i.dryRun && c.output == "yaml" {
				return c.printManifests(&i, values)
			}
			for _, fixed := range []string{"cluster", "trustDomain"} {
				if was := kept[fixed]; was != values[fixed] {
					return usage("hanse uninstall, and install anew", "%s is %q, and stays so for the life of an installation, not %v", fixed, was, values[fixed])
				}
			}
			if was, is := etcdOf(kept), etcdOf(values); was != is {
				return usage("hanse leave and hanse uninstall, and install anew", "this cluster keeps its state in %s, and does so for the life of an installation: with %s it would begin without authority and mesh", was, is)
			}
			return c.bring(cmd.Context(), k, &i, values, true)
		},
	}
	i.flags(c, cmd)
	cmd.Flags().BoolVar(&reset, "reset-values", false, "forget the values that it was given before")
	cmd.Flags().BoolVarP(&i.yes, "yes", "y", false, "do not ask")
	return cmd
}

// etcdOf is where an installation keeps what it knows.
func etcdOf(values map[string]any) string {
	e, _ := values["etcd"].(map[string]any)
	if l, _ := e["endpoints"].([]any); len(l) > 0 {
		return "an etcd of your own"
	}
	if n := fmt.Sprint(cmp.Or(e["replicas"], any("0"))); n != "0" {
		return "an etcd of " + n + " members"
	}
	return "the etcd that hansed embeds"
}

func (c *cli) uninstallCommand() *cobra.Command {
	var namespace string
	var yes, force, keepData bool
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "uninstall",
		Short: "Take Hanse out of a Kubernetes cluster, and leave nothing",
		Long: `Take Hanse out of a Kubernetes cluster: webhooks first, so that Pods can be made without it; then hansed and gateways; then all that hansed wrote (ServiceImports, the Services and EndpointSlices
behind them, ConfigMaps hanse-root, conditions of ServiceExports, entries in status.parents of routes), labels hanse.mesh/inject of namespaces, definitions, and the namespace. Those of MCS and SPIRE go only if
"hanse install" brought them. Pods with sidecars go on
running; it says which.

A cluster that is in a mesh leaves it first (hanse leave), or the others wait for it in vain; --force goes on regardless.`,
		Example: "  hanse leave --context west && hanse uninstall --context west",
		RunE: func(cmd *cobra.Command, _ []string) error {
			k, err := c.cluster(namespace)
			if err != nil {
				return err
			}
			ctx := cmd.Context()
			left, err := k.Look(ctx)
			if err != nil {
				return unreachable(k, err)
			}
			if !force {
				if err := c.inMesh(ctx, k); err != nil {
					return err
				}
			}
			if text := left.String(); text != "" {
				fmt.Fprintln(c.out, text)
			}
			if ok, err := c.confirm(yes, "Take Hanse out of context %s?", k.Context); err != nil {
				return err
			} else if !ok {
				fmt.Fprintln(c.err, "Nothing was changed.")
				return errSaid
			}
			ctx, cancel := context.WithTimeout(ctx, timeout)
			defer cancel()
			if err := k.Uninstall(ctx, keepData, func(what string) { fmt.Fprintf(c.out, "  %s\n", what) }); err != nil {
				return &admin.Error{Message: err.Error(), Hint: "do it again: what is gone is no error"}
			}
			fmt.Fprintf(c.out, "%s from context %s.\n", c.palette().green("Gone"), k.Context)
			return nil
		},
	}
	cmd.Flags().StringVarP(&namespace, "namespace", "n", chart.Namespace, "the `NAMESPACE` of hansed and gateways")
	cmd.Flags().BoolVar(&force, "force", false, "also if this cluster is in a mesh, or hansed does not answer")
	cmd.Flags().BoolVar(&keepData, "keep-data", false, "keep the namespace, and the claims with keys and state")
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	cmd.Flags().DurationVar(&timeout, "timeout", 5*time.Minute, "how long to wait for the end of pods")
	return cmd
}

// inMesh is an error if the cluster's hansed says that it is in a mesh with others. One that does not answer says nothing.
func (c *cli) inMesh(ctx context.Context, k *install.Cluster) error {
	b, err := admin.New(admin.Config{Where: "hansed of context " + k.Context, Dial: k.Dial})
	if err != nil {
		return err
	}
	defer b.Close()
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	all, err := b.Clusters(ctx)
	if err != nil {
		fmt.Fprintf(c.err, "hansed does not say whether it is in a mesh (%v); going on\n", err)
		return nil
	}
	var others []string
	for _, m := range all.Clusters {
		if !m.Self && m.State != "left" {
			others = append(others, m.Name)
		}
	}
	if len(others) == 0 {
		return nil
	}
	return &admin.Error{Message: fmt.Sprintf("this cluster is in mesh %q with %s", all.Mesh, strings.Join(others, ", ")), Hint: "hanse leave --context " + k.Context + ", then this again; or --force, and on another member hanse leave NAME --force"}
}

func (c *cli) checkCommand() *cobra.Command {
	var i installing
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Is a Kubernetes cluster ready for Hanse, and is Hanse well there?",
		Long: `Before an installation, check what it needs: version, clock, permissions, storage. Afterwards, check what it has: definitions, what hansed is allowed, pods and their images, webhooks (with a Pod that is not made),
by which addresses others reach this cluster, and the mesh. It changes nothing.`,
		Example: "  hanse check --context west",
		RunE: func(cmd *cobra.Command, _ []string) error {
			k, err := c.cluster(i.namespace)
			if err != nil {
				return err
			}
			i.namespace = k.Namespace
			return c.checkAll(cmd.Context(), k, &i)
		},
	}
	cmd.Flags().StringVarP(&i.namespace, "namespace", "n", chart.Namespace, "the `NAMESPACE` of hansed and gateways")
	c.outputFlag(cmd, "json", "yaml")
	return cmd
}

// checked is what `hanse check -o json` prints.
type checked struct {
	OK     bool          `json:"ok"`
	Checks []admin.Check `json:"checks"`
}

func (c *cli) checkAll(ctx context.Context, k *install.Cluster, i *installing) error {
	p := c.palette()
	result := checked{OK: true, Checks: []admin.Check{}}
	say := func(f admin.Check) {
		result.OK = result.OK && (f.OK || f.Warn)
		result.Checks = append(result.Checks, f)
		if !c.structured() {
			c.check(c.out, p, f, checkWidth)
		}
	}
	values, there, err := k.Values(ctx)
	if err != nil {
		return unreachable(k, err)
	}
	i.version = daemon.Version
	asked := values
	if !there {
		asked = map[string]any{"cluster": "any", "trustDomain": "any.example"}
	}
	objects, err := i.objects(asked, "", there)
	if err != nil {
		return err
	}
	k.Before(ctx, objects, say)
	if there {
		k.After(ctx, objects, say)
		c.checkHansed(ctx, k, say)
	}
	switch {
	case c.structured():
		if err := c.print(result); err != nil {
			return err
		}
	case !result.OK:
	case there:
		fmt.Fprintln(c.out, "All is well.")
	default:
		fmt.Fprintf(c.out, "Hanse is not installed in %s of context %s, and can be: hanse install --context %s --set cluster=NAME --set trustDomain=DOMAIN\n", k.Namespace, k.Context, k.Context)
	}
	if !result.OK {
		return errSaid
	}
	return nil
}

// checkHansed asks hansed itself.
func (c *cli) checkHansed(ctx context.Context, k *install.Cluster, say func(admin.Check)) {
	b, err := admin.New(admin.Config{Where: "hansed of context " + k.Context, Dial: k.Dial})
	if err != nil {
		say(admin.Check{Name: "hansed answers", Detail: err.Error()})
		return
	}
	defer b.Close()
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	all, err := b.Clusters(ctx)
	if err != nil || len(all.Clusters) == 0 {
		f := admin.Check{Name: "hansed answers", Detail: fmt.Sprint(err), Remedy: "you need pods/exec in " + k.Namespace + " (Role hanse-admin): value admins"}
		var e *admin.Error
		if errors.As(err, &e) && e.Hint != "" {
			f.Remedy = e.Hint
		}
		say(f)
		return
	}
	self := all.Clusters[0]
	say(admin.Check{Name: "hansed answers", OK: true, Detail: fmt.Sprintf("cluster %q, %s", self.Name, self.TrustDomain)})
	if self.Version != daemon.Version {
		say(admin.Check{Name: "versions agree", Warn: true, Detail: fmt.Sprintf("hansed is %s, this command %s", self.Version, daemon.Version), Remedy: "hanse upgrade --context " + k.Context})
	} else {
		say(admin.Check{Name: "versions agree", OK: true, Detail: self.Version})
	}
	reach := func(name string, at []string, service, value string) {
		if len(at) == 0 {
			say(admin.Check{Name: name, Warn: true, Detail: "other clusters have no address to reach it", Remedy: "has the Service " + service + " an address? If there is no load balancer: hanse upgrade --set " + value + ".service.type=NodePort, or give addresses"})
			return
		}
		say(admin.Check{Name: name, OK: true, Detail: strings.Join(at, ", ")})
	}
	reach("federation", self.Addresses, "hanse-federation", "federation")
	reach("gateways", self.Gateways, "hanse-gateway", "gateway")
	for _, m := range all.Clusters[1:] {
		f := admin.Check{Name: "member " + m.Name, OK: m.State == "fresh", Detail: m.State, Remedy: "hanse clusters --context " + k.Context}
		if m.Note != "" {
			f.Detail += ": " + m.Note
		}
		say(f)
	}
	for _, a := range all.Alarms {
		say(admin.Check{Name: "alarm", Warn: true, Detail: a, Remedy: "hanse status --context " + k.Context})
	}
}
