// Package install puts Hanse into a Kubernetes cluster, looks after it there, and takes it out again.
//
//	chart ─► objects ─► server-side apply ─► Wait
//	                 ╰─► what is there     ─► Diff, Check, Uninstall
//
// It also reaches a hansed that runs in a pod, through the API server.
package install

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

const (
	callTimeout = 20 * time.Second // of one question to an API server

	// manager owns the fields that are applied here.
	manager = "hanse"

	partOf      = "app.kubernetes.io/part-of=hanse"
	nameLabel   = "app.kubernetes.io/name"
	hansed      = "hansed"
	gatewayName = "hanse-gateway"
)

// Cluster is a Kubernetes cluster, as a kubeconfig has it.
type Cluster struct {
	Context   string // of the kubeconfig
	Namespace string // in which hansed is
	rest      *rest.Config
	client    dynamic.Interface
}

// Kubeconfigs are the files that kubectl would read: explicit if given, else those of $KUBECONFIG, else ~/.kube/config.
func Kubeconfigs(explicit string, getenv func(string) string) []string {
	if explicit != "" {
		return []string{explicit}
	}
	if v := getenv(clientcmd.RecommendedConfigPathEnvVar); v != "" {
		return filepath.SplitList(v)
	}
	if home := getenv("HOME"); home != "" {
		return []string{filepath.Join(home, ".kube", "config")}
	}
	return nil
}

func rules(files []string) *clientcmd.ClientConfigLoadingRules {
	if len(files) == 1 {
		if _, err := os.Stat(files[0]); err == nil {
			return &clientcmd.ClientConfigLoadingRules{ExplicitPath: files[0]}
		}
	}
	return &clientcmd.ClientConfigLoadingRules{Precedence: files}
}

// Contexts are the names of contexts in kubeconfigs, sorted, and the current one.
func Contexts(files []string) (names []string, current string, err error) {
	if len(files) == 0 {
		return nil, "", nil
	}
	c, err := rules(files).Load()
	if err != nil {
		return nil, "", fmt.Errorf("kubeconfig %s: %w", strings.Join(files, string(os.PathListSeparator)), err)
	}
	for n := range c.Contexts {
		names = append(names, n)
	}
	slices.Sort(names)
	return names, c.CurrentContext, nil
}

// Connect returns the Cluster of a context; "" is the current one. Nothing is asked of it yet.
func Connect(files []string, context, namespace string) (*Cluster, error) {
	names, current, err := Contexts(files)
	if err != nil {
		return nil, err
	}
	if context == "" {
		context = current
	}
	switch {
	case len(names) == 0:
		return nil, fmt.Errorf("there is no kubeconfig with a context in %s", strings.Join(files, ", "))
	case context == "":
		return nil, fmt.Errorf("no context is given, and the kubeconfig has no current one; it has %s", strings.Join(names, ", "))
	case !slices.Contains(names, context):
		return nil, fmt.Errorf("the kubeconfig has no context %q; it has %s", context, strings.Join(names, ", "))
	}
	config, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules(files), &clientcmd.ConfigOverrides{CurrentContext: context, Context: clientcmdapi.Context{}}).ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("context %s: %w", context, err)
	}
	config.UserAgent, config.QPS, config.Burst = "hanse", 100, 200
	c := &Cluster{Context: context, Namespace: namespace, rest: config}
	if c.client, err = dynamic.NewForConfig(config); err != nil {
		return nil, fmt.Errorf("context %s: %w", context, err)
	}
	return c, nil
}

// kinds are those of the chart: where an API server has them.
var kinds = map[string]struct {
	schema.GroupVersionResource
	cluster bool // not in a namespace
}{
	"CustomResourceDefinition":       {gvr("apiextensions.k8s.io", "v1", "customresourcedefinitions"), true},
	"Namespace":                      {gvr("", "v1", "namespaces"), true},
	"ServiceAccount":                 {gvr("", "v1", "serviceaccounts"), false},
	"ConfigMap":                      {gvr("", "v1", "configmaps"), false},
	"Secret":                         {gvr("", "v1", "secrets"), false},
	"Service":                        {gvr("", "v1", "services"), false},
	"StatefulSet":                    {gvr("apps", "v1", "statefulsets"), false},
	"Deployment":                     {gvr("apps", "v1", "deployments"), false},
	"DaemonSet":                      {gvr("apps", "v1", "daemonsets"), false},
	"PodDisruptionBudget":            {gvr("policy", "v1", "poddisruptionbudgets"), false},
	"NetworkPolicy":                  {gvr("networking.k8s.io", "v1", "networkpolicies"), false},
	"ClusterRole":                    {gvr("rbac.authorization.k8s.io", "v1", "clusterroles"), true},
	"ClusterRoleBinding":             {gvr("rbac.authorization.k8s.io", "v1", "clusterrolebindings"), true},
	"Role":                           {gvr("rbac.authorization.k8s.io", "v1", "roles"), false},
	"RoleBinding":                    {gvr("rbac.authorization.k8s.io", "v1", "rolebindings"), false},
	"MutatingWebhookConfiguration":   {gvr("admissionregistration.k8s.io", "v1", "mutatingwebhookconfigurations"), true},
	"ValidatingWebhookConfiguration": {gvr("admissionregistration.k8s.io", "v1", "validatingwebhookconfigurations"), true},
}

func gvr(group, version, resource string) schema.GroupVersionResource {
	return schema.GroupVersionResource{Group: group, Version: version, Resource: resource}
}

// of is where an object is.
func (c *Cluster) of(o *unstructured.Unstructured) (dynamic.ResourceInterface, error) {
	k, ok := kinds[o.GetKind()]
	if !ok {
		return nil, fmt.Errorf("%s %s: the chart has a kind that is not known here", o.GetKind(), o.GetName())
	}
	if k.cluster {
		return c.client.Resource(k.GroupVersionResource), nil
	}
	if o.GetNamespace() == "" {
		return nil, fmt.Errorf("%s %s has no namespace", o.GetKind(), o.GetName())
	}
	return c.client.Resource(k.GroupVersionResource).Namespace(o.GetNamespace()), nil
}

// title names an object for people.
func title(o *unstructured.Unstructured) string {
	return strings.ToLower(o.GetKind()) + "/" + o.GetName()
}

// ErrNotInstalled says that there is no Hanse in a cluster.
var ErrNotInstalled = errors.New("hanse is not installed there")
