package main

import (
	"cmp"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"github.com/hanse-mesh/hanse/cmd/internal/daemon"
	"github.com/hanse-mesh/hanse/discovery/kube/inject"
)

func (c *cli) injectCommand() *cobra.Command {
	var files []string
	var valuesFile string
	var v inject.Values
	cmd := &cobra.Command{
		Use:   "inject -f FILE",
		Short: "Put sidecars into the workloads of Kubernetes manifests",
		Long: `Put a sidecar into every Pod, and every template of Pods, of Kubernetes manifests, and print them all: what has no Pods comes out as it went in.
It is what the webhook does in namespaces with the label hanse.mesh/inject: enabled, for pipelines that want to see it beforehand.

A workload that says hanse.mesh/inject: disabled (label or annotation of the template) is left alone, as is one that has a sidecar. What was done is told on
standard error. docs/injection.md describes the sidecar and the annotations that change it.`,
		Example: `  hanse inject -f app.yaml --cluster west --trust-domain west.example | kubectl apply -f -
  kubectl get deployment payments -o yaml | hanse inject -f - --values mesh.yaml | kubectl apply -f -`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if valuesFile != "" {
				b, err := c.readFile(valuesFile)
				if err != nil {
					return err
				}
				var from inject.Values
				if err := yaml.UnmarshalStrict(b, &from); err != nil {
					return usage("docs/injection.md lists the values", "%s: %w", valuesFile, err)
				}
				from.Cluster, from.TrustDomain, from.Image = cmp.Or(v.Cluster, from.Cluster), cmp.Or(v.TrustDomain, from.TrustDomain), cmp.Or(v.Image, from.Image)
				v = from
			}
			v.Image, v.Version = cmp.Or(v.Image, "hanse.mesh/hanse-proxy:"+daemon.Version), cmp.Or(v.Version, daemon.Version)
			if err := v.Complete(); err != nil {
				return usage("give --cluster and --trust-domain, or --values FILE", "%s", strings.ReplaceAll(err.Error(), "\n", "; "))
			}
			l, err := c.sources(files)
			if err != nil {
				return err
			}
			var outs [][]byte
			var all []inject.Workload
			for _, s := range l {
				out, workloads, err := v.File(s.data)
				if err != nil {
					return fmt.Errorf("%s: %w", s.name, err)
				}
				outs, all = append(outs, out), append(all, workloads...)
			}
			for i, out := range outs {
				if i > 0 {
					fmt.Fprintln(c.out, "---")
				}
				if _, err := c.out.Write(out); err != nil {
					return err
				}
			}
			for _, w := range all {
				name := strings.ToLower(w.Kind) + "/" + w.Name
				if w.Injected {
					fmt.Fprintf(c.err, "%s: injected\n", name)
				} else {
					fmt.Fprintf(c.err, "%s: left as it is: %s\n", name, w.Why)
				}
			}
			if len(all) == 0 {
				fmt.Fprintln(c.err, "there is no workload in this")
			}
			return nil
		},
	}
	c.filesFlag(cmd, &files)
	cmd.Flags().StringVar(&valuesFile, "values", "", "a `FILE` with what all sidecars have in common: cluster, trustDomain, image, identity, xds, resources, …")
	cmd.Flags().StringVar(&v.Cluster, "cluster", "", "this cluster's `NAME` in the mesh")
	cmd.Flags().StringVar(&v.TrustDomain, "trust-domain", "", "its trust `DOMAIN`")
	cmd.Flags().StringVar(&v.Image, "image", "", "`IMAGE` of hanse-proxy (default hanse.mesh/hanse-proxy of this version)")
	must(cmd.MarkFlagFilename("values", "yaml", "yml"))
	return cmd
}
