package install

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

const (
	revisionLabel = "controller-revision-hash"

	// stuckAfter is how long a Pod may run and not be ready before it counts as stuck. One that cannot even run is stuck at once.
	stuckAfter = time.Minute
	maxWhy     = 80
)

// mend deletes the Pods for which Kubernetes would wait for ever. What they keep is in their volumes.
func (c *Cluster) mend(ctx context.Context, now time.Time, tell func(string)) error {
	all, err := c.stuck(ctx, now)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	for _, s := range all {
		uid := s.pod.GetUID()
		err := c.client.Resource(gvr("", "v1", "pods")).Namespace(c.Namespace).Delete(ctx, s.pod.GetName(), metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &uid}})
		if apierrors.IsNotFound(err) || apierrors.IsConflict(err) { // it has gone meanwhile
			continue
		}
		if err != nil {
			return fmt.Errorf("delete pod %s, which is stuck in the revision before: %w", s.pod.GetName(), err)
		}
		tell(fmt.Sprintf("%s was stuck in the revision before (%s), where Kubernetes would leave it: deleted, and made anew", s.pod.GetName(), s.why))
	}
	return nil
}

// stuckPod is one of an earlier revision of its StatefulSet that never becomes ready. A StatefulSet does not replace it although its template is right by now
// (https://kubernetes.io/docs/concepts/workloads/controllers/statefulset/#forced-rollback).
type stuckPod struct {
	pod *unstructured.Unstructured
	why string
}

// stuck finds them, one of each StatefulSet.
func (c *Cluster) stuck(ctx context.Context, now time.Time) ([]stuckPod, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	sets, err := c.client.Resource(kinds["StatefulSet"].GroupVersionResource).Namespace(c.Namespace).List(ctx, metav1.ListOptions{LabelSelector: partOf})
	if err != nil {
		return nil, err
	}
	var out []stuckPod
	for i := range sets.Items {
		set := &sets.Items[i]
		l, err := c.client.Resource(gvr("", "v1", "pods")).Namespace(c.Namespace).List(ctx, metav1.ListOptions{LabelSelector: nameLabel + "=" + set.GetName(), Limit: 100})
		if err != nil {
			return nil, err
		}
		if pod, why := stuckOf(set, l.Items, now); pod != nil {
			if len(why) > maxWhy {
				why = strings.ToValidUTF8(why[:maxWhy], "") + "…"
			}
			out = append(out, stuckPod{pod, why})
		}
	}
	return out, nil
}

// stuckOf is the first Pod of a StatefulSet that it would wait for in vain, and why; nil if there is none. One at a time: the next one may only have been waiting for it.
func stuckOf(set *unstructured.Unstructured, pods []unstructured.Unstructured, now time.Time) (*unstructured.Unstructured, string) {
	seen, _, _ := unstructured.NestedInt64(set.Object, "status", "observedGeneration")
	revision, _, _ := unstructured.NestedString(set.Object, "status", "updateRevision")
	if seen < set.GetGeneration() || revision == "" { // what is the right revision is not known yet
		return nil, ""
	}
	if slices.ContainsFunc(pods, func(p unstructured.Unstructured) bool { return p.GetDeletionTimestamp() != nil }) {
		return nil, ""
	}
	for i := range pods {
		pod := &pods[i]
		if pod.GetLabels()[revisionLabel] == revision || ready(pod) {
			continue
		}
		if why := troubles(pods[i : i+1]); !running(pod) || now.Sub(notReadySince(pod)) > stuckAfter {
			return pod, why
		}
	}
	return nil, ""
}

// running says that every container of a Pod runs, or is being started for the first time.
func running(pod *unstructured.Unstructured) bool {
	if condition(pod, "PodScheduled") == "False" {
		return false
	}
	for _, list := range []string{"initContainerStatuses", "containerStatuses"} {
		l, _, _ := unstructured.NestedSlice(pod.Object, "status", list)
		for _, x := range l {
			m, _ := x.(map[string]any)
			reason, _, _ := unstructured.NestedString(m, "state", "waiting", "reason")
			if reason != "" && reason != "ContainerCreating" && reason != "PodInitializing" {
				return false
			}
		}
	}
	return true
}

// notReadySince is when a Pod ceased to be ready, or was made.
func notReadySince(pod *unstructured.Unstructured) time.Time {
	l, _, _ := unstructured.NestedSlice(pod.Object, "status", "conditions")
	for _, x := range l {
		if m, ok := x.(map[string]any); ok && m["type"] == "Ready" {
			text, _ := m["lastTransitionTime"].(string)
			if t, err := time.Parse(time.RFC3339, text); err == nil {
				return t
			}
		}
	}
	return pod.GetCreationTimestamp().Time
}
