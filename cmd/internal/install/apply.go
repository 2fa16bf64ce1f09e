package install

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"
)

// valuesName is the ConfigMap that remembers what an installation was asked for. `hanse upgrade` begins with it.
const valuesName = "hanse-values"

// Change is what applying an object would do, or did.
type Change struct {
	Object string   `json:"object"` // kind/name
	Verb   string   `json:"verb"`   // create, change, keep, remove, skip
	Fields []string `json:"fields,omitempty"`
	Note   string   `json:"note,omitempty"`
}

// Values are those that the installation was asked for, and whether there is one.
func (c *Cluster) Values(ctx context.Context) (map[string]any, bool, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	o, err := c.client.Resource(kinds["ConfigMap"].GroupVersionResource).Namespace(c.Namespace).Get(ctx, valuesName, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("context %s: %w", c.Context, err)
	}
	text, _, _ := unstructured.NestedString(o.Object, "data", "values.yaml")
	v := map[string]any{}
	if err := yaml.UnmarshalStrict([]byte(text), &v); err != nil {
		return nil, false, fmt.Errorf("configmap %s/%s, values.yaml: %w", c.Namespace, valuesName, err)
	}
	return v, true, nil
}

// remembered is the ConfigMap of values.
func (c *Cluster) remembered(values map[string]any, version string) (*unstructured.Unstructured, error) {
	b, err := yaml.Marshal(values)
	if err != nil {
		return nil, err
	}
	return &unstructured.Unstructured{Object: map[string]any{"apiVersion": "v1", "kind": "ConfigMap",
		"metadata": map[string]any{"name": valuesName, "namespace": c.Namespace, "labels": map[string]any{"app.kubernetes.io/part-of": "hanse", "app.kubernetes.io/version": version}},
		"data":     map[string]any{"values.yaml": string(b)}}}, nil
}

// Plan is what is to be applied, in order.
type Plan struct {
	Objects []*unstructured.Unstructured
	Values  map[string]any
	Version string
	Force   bool // take over fields that somebody else owns
}

// Diff says what Apply would do, by the API server's own dry run.
func (c *Cluster) Diff(ctx context.Context, p Plan) ([]Change, error) {
	return c.each(ctx, p, true, nil)
}

// Apply applies all, tells each change, and removes what an earlier installation had and this has not.
func (c *Cluster) Apply(ctx context.Context, p Plan, tell func(Change)) error {
	_, err := c.each(ctx, p, false, tell)
	return err
}

func (c *Cluster) each(ctx context.Context, p Plan, dry bool, tell func(Change)) ([]Change, error) {
	values, err := c.remembered(p.Values, p.Version)
	if err != nil {
		return nil, err
	}
	var out []Change
	said := func(ch Change) {
		out = append(out, ch)
		if tell != nil {
			tell(ch)
		}
	}
	namespaceIsNew := false
	for _, o := range slices.Concat(p.Objects, []*unstructured.Unstructured{values}) {
		if dry && namespaceIsNew && o.GetNamespace() != "" { // a dry run in a namespace that does not exist fails
			said(Change{Object: title(o), Verb: "create"})
			continue
		}
		ch, err := c.apply(ctx, o, p.Force, dry)
		if err != nil {
			return out, err
		}
		if o.GetKind() == "Namespace" && ch.Verb == "create" {
			namespaceIsNew = true
		}
		said(ch)
	}
	old, err := c.obsolete(ctx, append(slices.Clone(p.Objects), values))
	if err != nil {
		return out, err
	}
	for _, o := range old {
		if !dry {
			if err := c.remove(ctx, o); err != nil {
				return out, err
			}
		}
		said(Change{Object: title(o), Verb: "remove"})
	}
	return out, nil
}

func (c *Cluster) apply(ctx context.Context, o *unstructured.Unstructured, force, dry bool) (Change, error) {
	ch := Change{Object: title(o)}
	at, err := c.of(o)
	if err != nil {
		return ch, err
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	have, err := at.Get(ctx, o.GetName(), metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		have, ch.Verb = nil, "create"
	case err != nil:
		return ch, fmt.Errorf("%s: %w", ch.Object, err)
	}
	if have != nil && o.GetKind() == "CustomResourceDefinition" && foreign(have, o) {
		ch.Verb, ch.Note = "skip", "installed by somebody else, and left to them"
		return ch, nil
	}
	options := metav1.ApplyOptions{FieldManager: manager, Force: force}
	if dry {
		options.DryRun = []string{metav1.DryRunAll}
	}
	got, err := at.Apply(ctx, o.GetName(), o, options)
	if apierrors.IsConflict(err) {
		return ch, fmt.Errorf("%s: somebody else has changed what is to be applied (--force-conflicts takes it over): %w", ch.Object, err)
	}
	if err != nil {
		return ch, fmt.Errorf("%s: %w", ch.Object, err)
	}
	if have != nil {
		ch.Verb = "keep"
		if ch.Fields = differing("", have.Object, got.Object); len(ch.Fields) > 0 {
			ch.Verb = "change"
		}
	}
	return ch, nil
}

// foreign says that a definition which is not of our own group was not applied by this program.
func foreign(have, want *unstructured.Unstructured) bool {
	group, _, _ := unstructured.NestedString(want.Object, "spec", "group")
	return group != "hanse.mesh" && !ours(have)
}

// ours says that this program applied an object.
func ours(o *unstructured.Unstructured) bool {
	return slices.ContainsFunc(o.GetManagedFields(), func(m metav1.ManagedFieldsEntry) bool {
		return m.Manager == manager && m.Operation == metav1.ManagedFieldsOperationApply
	})
}

// shared says that somebody else has applied or changed it, too; the API server writes its status itself.
func shared(o *unstructured.Unstructured) bool {
	return slices.ContainsFunc(o.GetManagedFields(), func(m metav1.ManagedFieldsEntry) bool { return m.Manager != manager && m.Subresource == "" })
}

// volatile are fields that the API server itself writes.
var volatile = []string{"metadata.managedFields", "metadata.resourceVersion", "metadata.generation", "metadata.creationTimestamp", "metadata.uid", "status"}

const maxFields = 12

// differing are the paths at which two objects differ, with both values where they are short.
func differing(path string, a, b any) []string {
	if slices.Contains(volatile, path) || equality.Semantic.DeepEqual(a, b) {
		return nil
	}
	x, ok1 := a.(map[string]any)
	y, ok2 := b.(map[string]any)
	if ok1 && ok2 {
		var out []string
		keys := map[string]bool{}
		for k := range x {
			keys[k] = true
		}
		for k := range y {
			keys[k] = true
		}
		for _, k := range slices.Sorted(maps.Keys(keys)) {
			p := k
			if path != "" {
				p = path + "." + k
			}
			out = append(out, differing(p, x[k], y[k])...)
		}
		return out[:min(len(out), maxFields)]
	}
	l, ok1 := a.([]any)
	m, ok2 := b.([]any)
	if ok1 && ok2 && len(l) == len(m) {
		var out []string
		for i := range l {
			out = append(out, differing(fmt.Sprintf("%s[%d]", path, i), l[i], m[i])...)
		}
		return out[:min(len(out), maxFields)]
	}
	return []string{path + ": " + short(a) + " → " + short(b)}
}

func short(v any) string {
	if v == nil {
		return "nothing"
	}
	b, err := json.Marshal(v)
	if err != nil || len(b) > 120 {
		return "…"
	}
	return string(b)
}

// obsolete are objects of an earlier installation that are not wanted any more.
func (c *Cluster) obsolete(ctx context.Context, want []*unstructured.Unstructured) ([]*unstructured.Unstructured, error) {
	wanted := map[string]bool{}
	for _, o := range want {
		wanted[title(o)] = true
	}
	have, err := c.installed(ctx)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(have, func(o *unstructured.Unstructured) bool { return wanted[title(o)] || !ours(o) }), nil
}

// removal is the order in which kinds go: webhooks first, or nothing could be created without hansed; then what writes, so that nothing comes back.
var removal = []string{"MutatingWebhookConfiguration", "ValidatingWebhookConfiguration", "DaemonSet", "Deployment", "StatefulSet", "PodDisruptionBudget", "NetworkPolicy", "Service", "Secret", "ConfigMap", "RoleBinding", "Role", "ClusterRoleBinding", "ClusterRole", "ServiceAccount"}

// installed are the objects of an installation, without definitions and the namespace, in the order in which they are to go.
func (c *Cluster) installed(ctx context.Context) ([]*unstructured.Unstructured, error) {
	var out []*unstructured.Unstructured
	for _, kind := range removal {
		k := kinds[kind]
		ctx, cancel := context.WithTimeout(ctx, callTimeout)
		namespace := c.Namespace
		if k.cluster {
			namespace = ""
		}
		l, err := c.client.Resource(k.GroupVersionResource).Namespace(namespace).List(ctx, metav1.ListOptions{LabelSelector: partOf})
		cancel()
		if err != nil && !apierrors.IsNotFound(err) {
			return nil, fmt.Errorf("%s: %w", k.Resource, err)
		}
		if l == nil {
			continue
		}
		for i := range l.Items {
			o := &l.Items[i]
			o.SetKind(kind)
			out = append(out, o)
		}
	}
	return out, nil
}

// remove deletes an object, and what it owns before it.
func (c *Cluster) remove(ctx context.Context, o *unstructured.Unstructured) error {
	at, err := c.of(o)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	policy := metav1.DeletePropagationBackground
	if err := at.Delete(ctx, o.GetName(), metav1.DeleteOptions{PropagationPolicy: &policy}); err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("%s: %w", title(o), err)
	}
	return nil
}

// Wait waits until hansed and the gateways serve, and mends what would be in vain to wait for. tell is told when what is waited for changes, and what was mended.
func (c *Cluster) Wait(ctx context.Context, tell func(string)) error {
	last := ""
	for {
		waiting, err := c.waiting(ctx)
		if err == nil && waiting == "" {
			return nil
		}
		if err == nil {
			err = c.mend(ctx, time.Now(), tell)
		}
		switch {
		case err != nil && ctx.Err() != nil: // what was said before is why
			waiting = last
		case err != nil:
			waiting = err.Error()
		}
		if waiting != last {
			tell(waiting)
			last = waiting
		}
		select {
		case <-ctx.Done():
			if errors.Is(ctx.Err(), context.DeadlineExceeded) {
				return fmt.Errorf("not ready in time: %s", last)
			}
			return ctx.Err()
		case <-time.After(time.Second):
		}
	}
}

// waiting is what is not ready, "" if all is.
func (c *Cluster) waiting(ctx context.Context) (string, error) {
	var out []string
	for _, kind := range []string{"StatefulSet", "Deployment", "DaemonSet"} {
		ctx, cancel := context.WithTimeout(ctx, callTimeout)
		defer cancel()
		l, err := c.client.Resource(kinds[kind].GroupVersionResource).Namespace(c.Namespace).List(ctx, metav1.ListOptions{LabelSelector: partOf})
		if err != nil {
			return "", err
		}
		if kind == "StatefulSet" && len(l.Items) == 0 {
			return "", ErrNotInstalled
		}
		for i := range l.Items {
			o := &l.Items[i]
			number := func(field string) int64 {
				n, _, _ := unstructured.NestedInt64(o.Object, "status", field)
				return n
			}
			want, _, _ := unstructured.NestedInt64(o.Object, "spec", "replicas")
			all, ready, updated := "replicas", "readyReplicas", "updatedReplicas"
			if kind == "DaemonSet" {
				want, all, ready, updated = number("desiredNumberScheduled"), "currentNumberScheduled", "numberReady", "updatedNumberScheduled"
			}
			if number("observedGeneration") >= o.GetGeneration() && number(ready) == want && number(updated) == want && number(all) == want {
				continue
			}
			text := fmt.Sprintf("%s: %d of %d ready", o.GetName(), min(number(ready), number(updated)), want)
			pods, err := c.client.Resource(gvr("", "v1", "pods")).Namespace(c.Namespace).List(ctx, metav1.ListOptions{LabelSelector: nameLabel + "=" + o.GetName(), Limit: 100})
			if err == nil {
				if t := troubles(pods.Items); t != "" {
					text += " (" + t + ")"
				}
			}
			out = append(out, text)
		}
	}
	return strings.Join(out, "; "), nil
}

func ready(pod *unstructured.Unstructured) bool {
	if pod.GetDeletionTimestamp() != nil {
		return false
	}
	return condition(pod, "Ready") == "True"
}

func condition(o *unstructured.Unstructured, kind string) string {
	l, _, _ := unstructured.NestedSlice(o.Object, "status", "conditions")
	for _, x := range l {
		if m, ok := x.(map[string]any); ok && m["type"] == kind {
			s, _ := m["status"].(string)
			return s
		}
	}
	return ""
}

// troubles says why Pods are not ready, each reason once.
func troubles(pods []unstructured.Unstructured) string {
	reasons := map[string]bool{}
	for i := range pods {
		pod := &pods[i]
		if ready(pod) || pod.GetDeletionTimestamp() != nil {
			continue
		}
		found := false
		for _, list := range []string{"initContainerStatuses", "containerStatuses"} {
			l, _, _ := unstructured.NestedSlice(pod.Object, "status", list)
			for _, x := range l {
				m, _ := x.(map[string]any)
				reason, _, _ := unstructured.NestedString(m, "state", "waiting", "reason")
				message, _, _ := unstructured.NestedString(m, "state", "waiting", "message")
				if reason != "" && reason != "ContainerCreating" && reason != "PodInitializing" {
					if len(message) > 200 {
						message = message[:200] + "…"
					}
					reasons[strings.TrimSpace(reason+" "+message)], found = true, true
				}
			}
		}
		l, _, _ := unstructured.NestedSlice(pod.Object, "status", "conditions")
		for _, x := range l {
			m, _ := x.(map[string]any)
			if m["type"] == "PodScheduled" && m["status"] == "False" {
				message, _ := m["message"].(string)
				reasons["not scheduled: "+message], found = true, true
			}
		}
		if !found {
			phase, _, _ := unstructured.NestedString(pod.Object, "status", "phase")
			reasons[pod.GetName()+" is "+phase] = true
		}
	}
	return strings.Join(slices.Sorted(maps.Keys(reasons)), "; ")
}
