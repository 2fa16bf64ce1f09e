// Package chart renders the Helm chart of Hanse, which this program carries, into the objects that it stands for.
//
// It uses Helm's own engine, so that `hanse install`, `helm install` and deploy/manifests are one and the same.
package chart

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"slices"
	"strings"

	helmchart "helm.sh/helm/v3/pkg/chart"
	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/engine"
	"helm.sh/helm/v3/pkg/strvals"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/yaml"

	"github.com/hanse-mesh/hanse/deploy"
)

const (
	root = "chart/hanse"

	// Name of the release, and the namespace that everything is in by default.
	Name      = "hanse"
	Namespace = "hanse-system"

	defaultKube = "v1.36.0"
)

// Options of a rendering.
type Options struct {
	Namespace   string         // default Namespace
	Values      map[string]any // over the chart's own
	Version     string         // of the images; default: the chart's
	KubeVersion string         // "v1.36.3"; default: one that is new enough
	Upgrade     bool           // of what is installed
}

// ErrValues is what is wrong with values, every fault of them.
var ErrValues = errors.New("values")

// load reads the chart.
func load() (*helmchart.Chart, error) {
	var files []*loader.BufferedFile
	err := fs.WalkDir(deploy.Chart, root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := deploy.Chart.ReadFile(path)
		files = append(files, &loader.BufferedFile{Name: strings.TrimPrefix(path, root+"/"), Data: b})
		return err
	})
	if err != nil {
		return nil, err
	}
	return loader.LoadFiles(files)
}

// Merge reads values of files, and over them of KEY=VALUE as in `helm --set`.
func Merge(files [][]byte, sets []string) (map[string]any, error) {
	out := map[string]any{}
	for i, b := range files {
		var v map[string]any
		if err := yaml.UnmarshalStrict(b, &v); err != nil {
			return nil, fmt.Errorf("%w: file %d: %w", ErrValues, i+1, err)
		}
		out = chartutil.CoalesceTables(v, out)
	}
	for _, s := range sets {
		if err := strvals.ParseInto(s, out); err != nil {
			return nil, fmt.Errorf("%w: --set %q: %w", ErrValues, s, err)
		}
	}
	return out, nil
}

// Defaults is the chart's values.yaml, with its comments.
func Defaults() string {
	b, err := deploy.Chart.ReadFile(root + "/values.yaml")
	if err != nil {
		panic(err) // it is compiled in
	}
	return string(b)
}

// Objects are the chart's, in the order in which they can be created: CustomResourceDefinitions first, then the namespace, then what is in it, webhooks last.
func Objects(o Options) ([]*unstructured.Unstructured, error) {
	c, err := load()
	if err != nil {
		return nil, fmt.Errorf("chart: %w", err)
	}
	if o.Version != "" {
		c.Metadata.AppVersion = o.Version
	}
	if o.Namespace == "" {
		o.Namespace = Namespace
	}
	caps := chartutil.DefaultCapabilities.Copy()
	caps.KubeVersion = chartutil.KubeVersion{Version: defaultKube, Major: "1", Minor: strings.Split(defaultKube, ".")[1]}
	if o.KubeVersion != "" {
		v, err := chartutil.ParseKubeVersion(o.KubeVersion)
		if err != nil {
			return nil, fmt.Errorf("version of Kubernetes: %w", err)
		}
		caps.KubeVersion = *v
	}
	if want := c.Metadata.KubeVersion; !chartutil.IsCompatibleRange(want, caps.KubeVersion.String()) {
		return nil, fmt.Errorf("kubernetes %s: %s is needed", caps.KubeVersion.Version, strings.TrimSuffix(strings.TrimPrefix(want, ">="), "-0")+" or newer")
	}
	values, err := chartutil.ToRenderValues(c, o.Values, chartutil.ReleaseOptions{Name: Name, Namespace: o.Namespace, Revision: 1, IsInstall: !o.Upgrade, IsUpgrade: o.Upgrade}, caps)
	if err != nil {
		return nil, fmt.Errorf("%w: %s", ErrValues, tidy(err.Error()))
	}
	files, err := engine.Render(c, values)
	if err != nil {
		return nil, fmt.Errorf("%w: %s", ErrValues, tidy(err.Error()))
	}
	var out []*unstructured.Unstructured
	for _, crd := range c.CRDObjects() {
		if out, err = decode(out, crd.Filename, crd.File.Data); err != nil {
			return nil, err
		}
	}
	level := "restricted"
	if v, err := values.PathValue("Values.gateway.hostPort"); err == nil && v != nil {
		level = "privileged" // a port of the node is beyond baseline
	}
	server, _ := values.PathValue("Values.identity.spire.server")
	if v, err := values.PathValue("Values.identity.spire.hostPath"); err == nil && v != "" && server != "" {
		level = "privileged" // a directory of the node
	}
	if v, err := values.PathValue("Values.capture.mode"); err == nil && v == "node" {
		level = "privileged" // so are the node's processes
	}
	out = append(out, namespace(o.Namespace, level))
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if strings.HasSuffix(name, ".txt") {
			continue
		}
		if out, err = decode(out, name, []byte(files[name])); err != nil {
			return nil, err
		}
	}
	slices.SortStableFunc(out, func(a, b *unstructured.Unstructured) int { return rank(a) - rank(b) })
	return out, nil
}

// tidy makes an error of Helm's one for people.
func tidy(text string) string {
	if _, rest, ok := strings.Cut(text, "error calling fail: "); ok {
		return rest
	}
	var lines []string
	for _, l := range strings.Split(text, "\n") {
		l = strings.TrimSpace(strings.TrimPrefix(strings.TrimSpace(l), "- "))
		if l != "" && !strings.HasPrefix(l, "values don't meet the specifications") && l != "hanse:" {
			lines = append(lines, strings.ReplaceAll(l, "at '/", "at '"))
		}
	}
	if !slices.ContainsFunc(lines, func(l string) bool { return !strings.HasPrefix(l, "at '") }) {
		slices.Sort(lines) // the schema's faults come in no order
	}
	return strings.Join(lines, "; ")
}

func decode(out []*unstructured.Unstructured, name string, data []byte) ([]*unstructured.Unstructured, error) {
	r := utilyaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(data)))
	for {
		doc, err := r.Read()
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		var m map[string]any
		if err := yaml.UnmarshalStrict(doc, &m); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		if len(m) == 0 {
			continue
		}
		o := &unstructured.Unstructured{Object: m}
		if o.GetKind() == "" || o.GetName() == "" {
			return nil, fmt.Errorf("%s: an object without kind or name", name)
		}
		out = append(out, o)
	}
}

// namespace is not the chart's, for Helm has --create-namespace. Pods of Hanse pass the strictest level of Pod Security, host ports of gateways, sockets in directories of the node, and capture from the node excepted.
func namespace(name, level string) *unstructured.Unstructured {
	return &unstructured.Unstructured{Object: map[string]any{"apiVersion": "v1", "kind": "Namespace", "metadata": map[string]any{"name": name, "labels": map[string]any{
		"app.kubernetes.io/part-of": "hanse", "app.kubernetes.io/managed-by": "Helm",
		"pod-security.kubernetes.io/enforce": level, "pod-security.kubernetes.io/warn": level,
	}}}}
}

var order = []string{"CustomResourceDefinition", "Namespace", "ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding", "NetworkPolicy", "PodDisruptionBudget", "ConfigMap", "Service", "StatefulSet", "Deployment", "DaemonSet",
	"MutatingWebhookConfiguration", "ValidatingWebhookConfiguration"}

func rank(o *unstructured.Unstructured) int {
	if i := slices.Index(order, o.GetKind()); i >= 0 {
		return i
	}
	return len(order)
}

// YAML is the objects as documents.
func YAML(objects []*unstructured.Unstructured) ([]byte, error) {
	var out bytes.Buffer
	for i, o := range objects {
		b, err := yaml.Marshal(o.Object)
		if err != nil {
			return nil, err
		}
		if i > 0 {
			out.WriteString("---\n")
		}
		out.Write(b)
	}
	return out.Bytes(), nil
}

// Over is given put over kept.
func Over(given, kept map[string]any) map[string]any {
	return chartutil.CoalesceTables(given, kept)
}
