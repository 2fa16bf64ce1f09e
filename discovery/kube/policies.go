package kube

import (
	"cmp"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/discovery/objects"
	"github.com/hanse-mesh/hanse/discovery/v1alpha1"
)

// policy is an object of our own kinds, also one that is not valid, with what it says of itself.
type policy struct {
	key        objects.Key
	resource   schema.GroupVersionResource
	generation int64
	conditions []metav1.Condition
}

// statusOf returns the status of an object of our own kinds that have one, or nil.
func statusOf(value any) *v1alpha1.Status {
	switch v := value.(type) {
	case *v1alpha1.TrafficPolicy:
		return &v.Status
	case *v1alpha1.AccessPolicy:
		return &v.Status
	case *v1alpha1.Peer:
		return &v.Status
	}
	return nil
}

// policies returns the objects of our own kinds, sorted.
func (s *Source) policies() []policy {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []policy
	for _, k := range s.kinds {
		gv, ok := s.versions[k]
		if !ok || gv.String() != v1alpha1.APIVersion {
			continue
		}
		for name, it := range k.items {
			if st := statusOf(it.value); st != nil {
				out = append(out, policy{key: objects.Key{Kind: k.name, Namespace: name.Namespace, Name: name.Name}, resource: gv.WithResource(k.resource),
					generation: it.value.(metav1.Object).GetGeneration(), conditions: st.Conditions})
			}
		}
	}
	slices.SortFunc(out, func(a, b policy) int { return a.key.Compare(b.key) })
	return out
}

// accepted returns the conditions of p as they should be with these faults of it, those of other controllers kept, and whether they differ.
func (p *policy) accepted(faults []*objects.Fault, now time.Time) (conditions []metav1.Condition, differ bool) {
	c := metav1.Condition{Type: v1alpha1.ConditionAccepted, Status: metav1.ConditionTrue, Reason: v1alpha1.ReasonAccepted, Message: "it is in force",
		ObservedGeneration: p.generation, LastTransitionTime: metav1.NewTime(now)}
	if len(faults) > 0 {
		c.Status, c.Reason = metav1.ConditionFalse, v1alpha1.ReasonPending
		var texts []string
		for _, f := range faults {
			if !f.Pending {
				c.Reason = v1alpha1.ReasonInvalid
			}
			text := strings.TrimPrefix((&objects.Fault{Field: f.Field, Value: f.Value, Reason: f.Reason}).Error(), ": ")
			if len(texts) < maxReported && !slices.Contains(texts, text) {
				texts = append(texts, text)
			}
		}
		c.Message = strings.Join(texts, "; ")
		c.Message = c.Message[:min(len(c.Message), 4096)]
	}
	conditions = slices.Clone(p.conditions)
	meta.SetStatusCondition(&conditions, c)
	return conditions, !equality.Semantic.DeepEqual(conditions, p.conditions)
}

// faultsByObject gathers what is wrong: what the Source found, and what else the Writer is told of.
func (w *Writer) faultsByObject() map[string][]*objects.Fault {
	all := w.cfg.Source.Faults()
	if w.cfg.Faults != nil {
		all = append(slices.Clone(all), w.cfg.Faults()...)
	}
	out := map[string][]*objects.Fault{}
	for _, f := range all {
		out[f.Object] = append(out[f.Object], f)
	}
	for _, list := range out {
		slices.SortFunc(list, func(a, b *objects.Fault) int {
			return cmp.Or(cmp.Compare(a.Field, b.Field), cmp.Compare(a.Reason, b.Reason))
		})
	}
	return out
}

func (p *policy) name() discovery.Name {
	return discovery.Name{Namespace: p.key.Namespace, Name: p.key.Name}
}
