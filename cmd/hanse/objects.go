package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"github.com/hanse-mesh/hanse/cmd/internal/admin"
	"github.com/hanse-mesh/hanse/discovery/objects"
	"github.com/hanse-mesh/hanse/discovery/v1alpha1"
)

// source is one file of configuration.
type source struct {
	name string // as faults name it
	data []byte
}

// sources reads what -f names: files, directories (their .yaml, .yml and .json files, not those of subdirectories), and - for standard input.
func (c *cli) sources(names []string) ([]source, error) {
	var l []source
	add := func(name, shown string) error {
		b, err := c.readFile(name)
		if err != nil {
			return err
		}
		l = append(l, source{shown, b})
		return nil
	}
	for _, name := range names {
		if name == "-" {
			if err := add("-", "standard input"); err != nil {
				return nil, err
			}
			continue
		}
		fi, err := os.Stat(name)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, usage("-f takes a file, a directory, or - for standard input", "there is no %s", name)
		}
		if err != nil {
			return nil, err
		}
		if !fi.IsDir() {
			if err := add(name, name); err != nil {
				return nil, err
			}
			continue
		}
		entries, err := os.ReadDir(name)
		if err != nil {
			return nil, err
		}
		found := len(l)
		for _, e := range entries {
			if ext := filepath.Ext(e.Name()); !e.IsDir() && !strings.HasPrefix(e.Name(), ".") && slices.Contains([]string{".yaml", ".yml", ".json"}, ext) {
				path := filepath.Join(name, e.Name())
				if err := add(path, path); err != nil {
					return nil, err
				}
			}
		}
		if len(l) == found {
			return nil, usage("files of configuration end in .yaml, .yml or .json", "there is none in %s", name)
		}
	}
	return l, nil
}

// joinSources makes one YAML stream of all, so that they are applied together or not at all. locate finds a line of it in its file.
func joinSources(l []source) (stream []byte, locate func(line int) (file string, at int)) {
	var b bytes.Buffer
	starts := make([]int, len(l)) // the line of the stream before each file's first
	for i, s := range l {
		if i > 0 {
			b.WriteString("---\n")
		}
		starts[i] = bytes.Count(b.Bytes(), []byte("\n"))
		b.Write(s.data)
		if !bytes.HasSuffix(s.data, []byte("\n")) {
			b.WriteByte('\n')
		}
	}
	return b.Bytes(), func(line int) (string, int) {
		for i, start := range slices.Backward(starts) {
			if line > start {
				return l[i].name, line - start
			}
		}
		return l[0].name, line
	}
}

// decodeAll checks each source by itself. Its error is an *admin.Error with every fault. That there is nothing in all of them is one, as it is to
// kubectl: a pipeline whose first part has failed would go on.
func decodeAll(l []source) ([]objects.Object, error) {
	var all []objects.Object
	var faults []admin.Fault
	for _, s := range l {
		objs, err := objects.Decode(s.data, s.name)
		all = append(all, objs...)
		for _, f := range objects.Faults(err) {
			faults = append(faults, admin.Fault{File: f.File, Line: f.Line, Object: f.Object, Field: f.Field, Value: f.Value, Reason: f.Reason})
		}
	}
	if len(faults) > 0 {
		return nil, &admin.Error{Message: counted(len(faults), "fault") + " in the configuration", Faults: faults, Hint: "correct them; nothing was applied. docs/configuration.md describes every kind"}
	}
	if len(all) == 0 {
		var names []string
		for _, s := range l {
			names = append(names, s.name)
		}
		return nil, &admin.Error{Message: "there is no object in " + strings.Join(names, ", "), Hint: "is it the file that you mean, and has what writes it worked?"}
	}
	return all, nil
}

func (c *cli) filesFlag(cmd *cobra.Command, files *[]string) {
	cmd.Flags().StringSliceVarP(files, "filename", "f", nil, "a `FILE`, a directory, or - for standard input; can be repeated")
	must(cmd.MarkFlagRequired("filename"))
	must(cmd.MarkFlagFilename("filename", "yaml", "yml", "json"))
}

func (c *cli) applyCommand() *cobra.Command {
	var files []string
	var dryRun bool
	cmd := &cobra.Command{
		Use:   "apply -f FILE",
		Short: "Create or change objects: services, routes, policies, peers",
		Long: `Create or change objects. All files are applied together or not at all. The objects are Kubernetes' own (Service, EndpointSlice,
ServiceExport, HTTPRoute, GRPCRoute, TLSRoute, TCPRoute, ReferenceGrant), SPIRE's ClusterFederatedTrustDomain, and TrafficPolicy, AccessPolicy and Peer of
hanse.mesh/v1alpha1: docs/configuration.md describes them.`,
		Example: "  hanse apply -f payments.yaml\n  hanse apply -f ./mesh --dry-run\n  cat route.yaml | hanse apply -f -",
		RunE: func(cmd *cobra.Command, _ []string) error {
			l, err := c.sources(files)
			if err != nil {
				return err
			}
			objs, err := decodeAll(l)
			if err != nil {
				return err
			}
			for _, o := range objs {
				if _, ok := o.Value.(*v1alpha1.Drill); ok {
					return usage("hanse drill run -f "+o.File, "%s: a Drill is run once, not applied; nothing was applied", o.Key())
				}
			}
			stream, locate := joinSources(l)
			b, err := c.client()
			if err != nil {
				return err
			}
			defer b.Close()
			applied, err := b.Apply(cmd.Context(), stream, dryRun)
			if e := (*admin.Error)(nil); errors.As(err, &e) {
				for i := range e.Faults {
					if f := &e.Faults[i]; f.Line > 0 {
						f.File, f.Line = locate(f.Line)
					}
				}
			}
			if err != nil {
				return err
			}
			if c.structured() {
				return c.print(applied)
			}
			dry := ""
			if dryRun {
				dry = " (dry run)"
			}
			for _, a := range applied {
				fmt.Fprintf(c.out, "%s %s%s\n", a.Object, a.Action, dry)
			}
			return nil
		},
	}
	c.filesFlag(cmd, &files)
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "say what would happen, change nothing")
	c.outputFlag(cmd, "json", "yaml")
	return cmd
}

func (c *cli) validateCommand() *cobra.Command {
	var files []string
	cmd := &cobra.Command{
		Use:     "validate -f FILE",
		Short:   "Check objects without a cluster",
		Long:    "Check objects as hansed would, without hansed: unknown fields, wrong values, and what each kind promises. Every fault is named with its file, line, field and remedy.",
		Example: "  hanse validate -f ./mesh\n  hanse validate -f - < route.yaml",
		RunE: func(*cobra.Command, []string) error {
			l, err := c.sources(files)
			if err != nil {
				return err
			}
			all, err := decodeAll(l)
			if err != nil {
				return err
			}
			fmt.Fprintf(c.out, "OK: %s in %s.\n", counted(len(all), "object"), counted(len(l), "file"))
			for _, o := range all {
				if o.Kind == "Drill" {
					fmt.Fprintf(c.err, "note: %s: %s is for hanse drill run -f; hansed's configuration directory and API servers are no place for it\n", o.File, o.Key())
				}
			}
			return nil
		},
	}
	c.filesFlag(cmd, &files)
	return cmd
}

// kind finds the kind that a person means.
func kind(word string) (objects.Kind, error) {
	k, ok := objects.LookupKind(word)
	if !ok {
		var names []string
		for _, k := range objects.Kinds() {
			names = append(names, k.Plural)
		}
		return k, usage("there are "+strings.Join(names, ", "), "there is no kind %q", word)
	}
	return k, nil
}

func completeKinds(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var names []string
	for _, k := range objects.Kinds() {
		names = append(names, k.Plural)
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// objectName splits NAMESPACE/NAME; the flag's namespace is for a NAME alone.
func objectName(k objects.Kind, name, namespace string) (ns, n string) {
	if !k.Namespaced {
		return "", name
	}
	if ns, n, ok := strings.Cut(name, "/"); ok {
		return ns, n
	}
	return namespace, name
}

func (c *cli) getCommand() *cobra.Command {
	var namespace string
	cmd := &cobra.Command{
		Use:   "get KIND [NAME]",
		Short: "List objects, or print them as they can be applied",
		Long: `List the objects of a kind, or of all kinds with "all": those that were applied and those of hansed's configuration directory.
With -o yaml or json the objects themselves are printed, so that they can be applied elsewhere. NAME can be NAMESPACE/NAME.`,
		Example:           "  hanse get services\n  hanse get httproute shop/payments -o yaml\n  hanse get all -o yaml | hanse --context east apply -f -",
		Args:              cobra.RangeArgs(1, 2),
		ValidArgsFunction: completeKinds,
		RunE: func(cmd *cobra.Command, args []string) error {
			var k objects.Kind
			var err error
			if args[0] == "all" {
				k.Namespaced = true
			} else if k, err = kind(args[0]); err != nil {
				return err
			}
			ns, name := namespace, ""
			if len(args) == 2 {
				ns, name = objectName(k, args[1], namespace)
			}
			b, err := c.client()
			if err != nil {
				return err
			}
			defer b.Close()
			l, err := b.ListObjects(cmd.Context(), k.Name, ns, name)
			if err != nil {
				return err
			}
			if name != "" && len(l) == 0 {
				return admin.NotFound("hanse get "+args[0]+" lists what there is", "there is no %s %s", strings.ToLower(k.Name), args[1])
			}
			if c.structured() {
				return c.printObjects(l)
			}
			if len(l) == 0 {
				fmt.Fprintln(c.out, "None.")
				return nil
			}
			t := newTable("KIND", "NAMESPACE", "NAME", "SOURCE", "STATUS")
			for _, o := range l {
				t.row(plain(o.Kind), plain(dash(o.Namespace)), plain(o.Name), plain(o.Source), plain(dash(o.Status)))
			}
			c.table(t)
			return nil
		},
	}
	cmd.Flags().StringVarP(&namespace, "namespace", "n", "", "only this `NAMESPACE`")
	c.outputFlag(cmd, "json", "yaml")
	return cmd
}

// printObjects writes YAML documents, or in JSON one object or a List, as kubectl does.
func (c *cli) printObjects(l []admin.Object) error {
	if c.output == "yaml" {
		for i, o := range l {
			b, err := yaml.JSONToYAML(o.Object)
			if err != nil {
				return err
			}
			if i > 0 {
				fmt.Fprintln(c.out, "---")
			}
			if _, err := c.out.Write(b); err != nil {
				return err
			}
		}
		return nil
	}
	if len(l) == 1 {
		return c.print(l[0].Object)
	}
	items := []json.RawMessage{}
	for _, o := range l {
		items = append(items, o.Object)
	}
	return c.print(map[string]any{"apiVersion": "v1", "kind": "List", "items": items})
}

func (c *cli) deleteCommand() *cobra.Command {
	var namespace string
	cmd := &cobra.Command{
		Use:               "delete KIND NAME",
		Short:             "Delete an object that was applied",
		Long:              "Delete an object that was applied. What comes from hansed's configuration directory is deleted there.",
		Example:           "  hanse delete httproute shop/payments",
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: completeKinds,
		RunE: func(cmd *cobra.Command, args []string) error {
			k, err := kind(args[0])
			if err != nil {
				return err
			}
			ns, name := objectName(k, args[1], namespace)
			if k.Namespaced && ns == "" {
				return usage("hanse delete "+args[0]+" NAMESPACE/"+name, "the namespace of %s %s is missing", strings.ToLower(k.Name), name)
			}
			b, err := c.client()
			if err != nil {
				return err
			}
			defer b.Close()
			a, err := b.DeleteObject(cmd.Context(), k.Name, ns, name)
			if err != nil {
				return err
			}
			if c.structured() {
				return c.print(a)
			}
			fmt.Fprintf(c.out, "%s %s\n", a.Object, a.Action)
			return nil
		},
	}
	cmd.Flags().StringVarP(&namespace, "namespace", "n", "", "the object's `NAMESPACE`")
	c.outputFlag(cmd, "json", "yaml")
	return cmd
}
