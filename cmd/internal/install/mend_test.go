package install

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"

	"github.com/hanse-mesh/hanse/cmd/internal/chart"
)

func object(t *testing.T, text string) unstructured.Unstructured {
	t.Helper()
	var o unstructured.Unstructured
	b, err := yaml.YAMLToJSON([]byte("apiVersion: v1\nkind: Any\n" + text))
	if err == nil {
		err = o.UnmarshalJSON(b)
	}
	if err != nil {
		t.Fatal(err)
	}
	return o
}

// Only a Pod that Kubernetes would leave as it is for ever is deleted: of an earlier revision, and unable to run or not ready for long.
func TestStuck(t *testing.T) {
	now := time.Date(2026, 11, 27, 12, 0, 0, 0, time.UTC)
	pod := func(name, revision, readySince, status string) string {
		return fmt.Sprintf("metadata: {name: %s, labels: {controller-revision-hash: %s}}\nstatus: {conditions: [{type: Ready, status: %q, lastTransitionTime: %q}], containerStatuses: [{state: {%s}}]}\n", name, revision,
			map[bool]string{true: "True", false: "False"}[readySince == ""], now.Add(-time.Second).Format(time.RFC3339), status)
	}
	const pull, crash, runs, made = "waiting: {reason: ImagePullBackOff, message: no such image}", "waiting: {reason: CrashLoopBackOff}", "running: {}", "waiting: {reason: ContainerCreating}"
	const notYet = "no"
	late := fmt.Sprintf("metadata: {name: hansed-0, labels: {controller-revision-hash: old}}\nstatus: {conditions: [{type: Ready, status: \"False\", lastTransitionTime: %q}], containerStatuses: [{state: {running: {}}}]}\n",
		now.Add(-2*time.Minute).Format(time.RFC3339))
	pending := "metadata: {name: hansed-0, labels: {controller-revision-hash: old}}\nstatus: {conditions: [{type: PodScheduled, status: \"False\", message: no node}]}\n"
	leaving := "metadata: {name: hansed-1, deletionTimestamp: \"2026-11-27T11:59:59Z\", labels: {controller-revision-hash: new}}\n"
	for name, c := range map[string]struct {
		seen int
		pods []string
		want string
	}{
		"image":                           {3, []string{pod("hansed-0", "old", notYet, pull)}, "hansed-0: ImagePullBackOff no such image"},
		"crash":                           {3, []string{pod("hansed-0", "old", notYet, crash)}, "hansed-0: CrashLoopBackOff"},
		"not scheduled":                   {3, []string{pending}, "hansed-0: not scheduled: no node"},
		"runs, not ready for long":        {3, []string{late}, "hansed-0: hansed-0 is "},
		"runs, not ready for a second":    {3, []string{pod("hansed-0", "old", notYet, runs)}, ""},
		"being made":                      {3, []string{pod("hansed-0", "old", notYet, made)}, ""},
		"of the right revision":           {3, []string{pod("hansed-0", "new", notYet, pull)}, ""},
		"ready":                           {3, []string{pod("hansed-0", "old", "", runs)}, ""},
		"the template is not seen yet":    {2, []string{pod("hansed-0", "old", notYet, pull)}, ""},
		"another is leaving":              {3, []string{pod("hansed-0", "old", notYet, pull), leaving}, ""},
		"the second of three, ready ones": {3, []string{pod("hansed-0", "old", "", runs), pod("hansed-1", "old", notYet, pull), pod("hansed-2", "new", "", runs)}, "hansed-1: ImagePullBackOff no such image"},
	} {
		t.Run(name, func(t *testing.T) {
			set := object(t, fmt.Sprintf("metadata: {name: hansed, generation: 3}\nstatus: {observedGeneration: %d, updateRevision: new}\n", c.seen))
			var pods []unstructured.Unstructured
			for _, p := range c.pods {
				pods = append(pods, object(t, p))
			}
			got := ""
			if p, why := stuckOf(&set, pods, now); p != nil {
				got = p.GetName() + ": " + why
			}
			if got != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}

// Every kind that the chart can make is known: applied, waited for, and taken out again.
func TestKindsOfTheChart(t *testing.T) {
	for _, sets := range [][]string{nil, {"capture.mode=node"}, {"hansed.replicas=3", "etcd.endpoints={https://etcd:2379}", "admins[0].kind=Group", "admins[0].name=g"}} {
		values, err := chart.Merge(nil, append([]string{"cluster=west", "trustDomain=west.example"}, sets...))
		if err != nil {
			t.Fatal(err)
		}
		objects, err := chart.Objects(chart.Options{Values: values})
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range objects {
			if _, ok := kinds[o.GetKind()]; !ok {
				t.Errorf("%s %s: a kind that is not known", o.GetKind(), o.GetName())
			}
			if k := o.GetKind(); k != "Namespace" && k != "CustomResourceDefinition" && !slices.Contains(removal, k) {
				t.Errorf("%s %s: nothing removes it", k, o.GetName())
			}
		}
	}
}
