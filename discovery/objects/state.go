package objects

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hanse-mesh/hanse/discovery"
)

// State is what Build must remember between Snapshots: the random IDs of endpoints, and when objects first appeared that
// carry no creationTimestamp. It is never changed; Build returns the next one. Persist its JSON whenever Revision changes,
// so that a restart changes nothing.
type State struct {
	revision uint64
	created  map[Key]time.Time
	services discovery.ByName[*serviceState]
	known    int    // services with endpoint IDs
	index    *index // of the Build before, if that was complete; not persisted
	self     place  // what the results in services were built for; not persisted
}

// place is the part of discovery.Self that endpoints carry.
type place struct{ cluster, trustDomain, network, region string }

// serviceState is the memory of one service. It is immutable once its Build ended.
type serviceState struct {
	ids map[string]string // endpoint ID by endpointKey; nil where just those of result

	// The last result and what it came from; not persisted.
	inputs inputs
	result *discovery.Service
	faults []*Fault
}

// inputs are the objects of one service. Objects are immutable, so equal pointers are equal objects.
type inputs struct {
	service *corev1.Service
	slices  []metav1.Object
	export  *discovery.Export
}

// Revision grows whenever something changed that MarshalJSON shows. It does not outlive the process.
func (s *State) Revision() uint64 {
	if s == nil {
		return 0
	}
	return s.revision
}

// Created returns when objects without a creationTimestamp were first seen. It must not be changed.
func (s *State) Created() map[Key]time.Time { return s.created }

// WithCreated returns a State in which these objects were first seen at these times; the others as before.
func (s *State) WithCreated(created map[Key]time.Time) *State {
	next := *s
	next.created = maps.Clone(s.created)
	if next.created == nil {
		next.created = map[Key]time.Time{}
	}
	maps.Copy(next.created, created)
	return &next
}

// stateVersion is that of the JSON form.
const stateVersion = 1

type stateJSON struct {
	Version   int                          `json:"version"`
	Created   map[string]time.Time         `json:"created,omitempty"`   // by Kind/namespace/name
	Endpoints map[string]map[string]string `json:"endpoints,omitempty"` // ID by service, then endpointKey
}

// MarshalJSON writes what must outlive a restart. Equal states have equal bytes.
func (s *State) MarshalJSON() ([]byte, error) {
	out := stateJSON{Version: stateVersion, Created: map[string]time.Time{}, Endpoints: map[string]map[string]string{}}
	for k, t := range s.created {
		out.Created[k.Kind+"/"+k.Namespace+"/"+k.Name] = t
	}
	for n, svc := range s.services.All() {
		if ids := svc.known(); len(ids) > 0 {
			out.Endpoints[n.String()] = ids
		}
	}
	return json.Marshal(out)
}

// UnmarshalJSON reads what MarshalJSON wrote.
func (s *State) UnmarshalJSON(data []byte) error {
	var in stateJSON
	if err := json.Unmarshal(data, &in); err != nil {
		return fmt.Errorf("decode discovery state: %w", err)
	}
	if in.Version != stateVersion {
		return fmt.Errorf("decode discovery state: version %d is not %d", in.Version, stateVersion)
	}
	next := State{created: map[Key]time.Time{}}
	services := next.services.Edit()
	for k, t := range in.Created {
		part := strings.Split(k, "/")
		if len(part) != 3 {
			return fmt.Errorf("decode discovery state: key %q is not Kind/namespace/name", k)
		}
		next.created[Key{part[0], part[1], part[2]}] = t
	}
	for n, ids := range in.Endpoints {
		namespace, name, ok := strings.Cut(n, "/")
		if !ok {
			return fmt.Errorf("decode discovery state: service %q is not namespace/name", n)
		}
		for key, id := range ids {
			if !validID(id) {
				return fmt.Errorf("decode discovery state: endpoint %s of %s has ID %q, not 32 hex digits", key, n, id)
			}
		}
		services.Put(discovery.Name{Namespace: namespace, Name: name}, &serviceState{ids: ids})
		if len(ids) > 0 {
			next.known++
		}
	}
	next.services = services.Done()
	*s = next
	return nil
}

// known returns the endpoint IDs by endpointKey.
func (s *serviceState) known() map[string]string {
	if s == nil || s.ids != nil || s.result == nil {
		if s == nil {
			return nil
		}
		return s.ids
	}
	ids := make(map[string]string, len(s.result.Endpoints))
	suffixes := map[*discovery.Profile]string{} // few, which most endpoints share
	for _, e := range s.result.Endpoints {
		suffix, ok := suffixes[e.Profile]
		if !ok {
			suffix = keySuffix(e.Profile)
			suffixes[e.Profile] = suffix
		}
		ids[endpointKey(e, suffix)] = e.ID
	}
	return ids
}

// remembers reports whether there is any endpoint ID.
func (s *serviceState) remembers() bool {
	return len(s.ids) > 0 || s.result != nil && len(s.result.Endpoints) > 0
}

func validID(id string) bool {
	return len(id) == 32 && strings.Trim(id, "0123456789abcdef") == ""
}

func (a *inputs) equal(b *inputs) bool {
	return a.service == b.service && slices.Equal(a.slices, b.slices) && sameExport(a.export, b.export)
}

func sameExport(a, b *discovery.Export) bool {
	if a == nil || b == nil {
		return a == b
	}
	return a.Created.Equal(b.Created) && slices.Equal(a.Audience, b.Audience) && maps.Equal(a.Labels, b.Labels) && maps.Equal(a.Annotations, b.Annotations)
}
