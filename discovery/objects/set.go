package objects

import (
	"maps"
	"slices"
)

// Set holds objects by key. It is never changed: Put and Delete return another. The zero value is empty.
type Set struct {
	objects map[Key]Object
}

// NewSet returns a Set of objs; of two with the same key the last counts.
func NewSet(objs ...Object) *Set { return (&Set{}).Put(objs...) }

// Put returns s with objs added or replaced.
func (s *Set) Put(objs ...Object) *Set {
	next := make(map[Key]Object, len(s.objects)+len(objs))
	maps.Copy(next, s.objects)
	for _, o := range objs {
		next[o.Key()] = o
	}
	return &Set{objects: next}
}

// Delete returns s without keys.
func (s *Set) Delete(keys ...Key) *Set {
	next := maps.Clone(s.objects)
	for _, k := range keys {
		delete(next, k)
	}
	return &Set{objects: next}
}

// Get returns the object of key.
func (s *Set) Get(key Key) (Object, bool) {
	o, ok := s.objects[key]
	return o, ok
}

// Len counts the objects.
func (s *Set) Len() int { return len(s.objects) }

// List returns the objects of a kind in a namespace, sorted by key; "" means every kind, every namespace.
func (s *Set) List(kind, namespace string) []Object {
	var list []Object
	for k, o := range s.objects {
		if (kind == "" || k.Kind == kind) && (namespace == "" || k.Namespace == namespace) {
			list = append(list, o)
		}
	}
	slices.SortFunc(list, func(a, b Object) int { return a.Key().Compare(b.Key()) })
	return list
}

// Layer puts Sets over one another: where several hold a key, the first of them counts, and each other is a fault that
// names both. A nil Set is empty.
func Layer(sets ...*Set) (*Set, []*Fault) {
	var faults []*Fault
	merged := map[Key]Object{}
	for _, s := range sets {
		if s == nil {
			continue
		}
		for k, o := range s.objects {
			if was, dup := merged[k]; dup {
				faults = append(faults, Duplicate(o, was))
				continue
			}
			merged[k] = o
		}
	}
	sortFaults(faults)
	return &Set{objects: merged}, faults
}
