package objects

import (
	"iter"
	"maps"
	"slices"

	"github.com/hanse-mesh/hanse/discovery"
)

// Set holds objects by key. It is never changed: Put and Delete return another, which shares what did not change. The zero
// value is empty.
type Set struct {
	kinds map[string]discovery.ByName[Object]
}

// NewSet returns a Set of objs; of two with the same key the last counts.
func NewSet(objs ...Object) *Set { return (&Set{}).Put(objs...) }

// Put returns s with objs added or replaced.
func (s *Set) Put(objs ...Object) *Set {
	return s.edit(func(of func(kind string) *discovery.Edit[Object]) {
		for _, o := range objs {
			of(o.Kind).Put(o.Name(), o)
		}
	})
}

// Delete returns s without keys.
func (s *Set) Delete(keys ...Key) *Set {
	return s.edit(func(of func(kind string) *discovery.Edit[Object]) {
		for _, k := range keys {
			of(k.Kind).Delete(k.name())
		}
	})
}

// edit returns what change makes of s.
func (s *Set) edit(change func(of func(kind string) *discovery.Edit[Object])) *Set {
	edits := map[string]*discovery.Edit[Object]{}
	change(func(kind string) *discovery.Edit[Object] {
		e := edits[kind]
		if e == nil {
			e = s.kinds[kind].Edit()
			edits[kind] = e
		}
		return e
	})
	next := &Set{kinds: make(map[string]discovery.ByName[Object], len(s.kinds)+len(edits))}
	maps.Copy(next.kinds, s.kinds)
	for kind, e := range edits {
		next.kinds[kind] = e.Done()
	}
	return next
}

// Get returns the object of key.
func (s *Set) Get(key Key) (Object, bool) { return s.kinds[key.Kind].Lookup(key.name()) }

// Differ calls f for each name of a kind with another object than before.
func (s *Set) Differ(before *Set, kind string, f func(discovery.Name)) {
	discovery.Diff(before.kinds[kind], s.kinds[kind], func(n discovery.Name, _, _ Object) { f(n) })
}

// Len counts the objects.
func (s *Set) Len() int {
	n := 0
	for _, of := range s.kinds {
		n += of.Len()
	}
	return n
}

// All yields the objects of a kind, in no order.
func (s *Set) All(kind string) iter.Seq[Object] {
	return func(yield func(Object) bool) {
		for _, o := range s.kinds[kind].All() {
			if !yield(o) {
				return
			}
		}
	}
}

// List returns the objects of a kind in a namespace, sorted by key; "" means every kind, every namespace.
func (s *Set) List(kind, namespace string) []Object {
	var list []Object
	for _, k := range slices.Sorted(maps.Keys(s.kinds)) {
		if kind != "" && k != kind {
			continue
		}
		for _, o := range s.sorted(k) {
			if namespace == "" || o.Value.GetNamespace() == namespace {
				list = append(list, o)
			}
		}
	}
	return list
}

// sorted returns the objects of a kind by name.
func (s *Set) sorted(kind string) []Object {
	of := s.kinds[kind]
	list := make([]Object, 0, of.Len())
	for _, o := range of.All() {
		list = append(list, o)
	}
	slices.SortFunc(list, compareNames)
	return list
}

func compareNames(a, b Object) int { return a.Name().Compare(b.Name()) }

// Layer puts Sets over one another: where several hold a key, the first of them counts, and each other is a fault that
// names both. A nil Set is empty.
func Layer(sets ...*Set) (*Set, []*Fault) {
	var faults []*Fault
	merged := &Set{}
	for _, s := range sets {
		switch {
		case s == nil || s.Len() == 0:
			continue
		case merged.Len() == 0:
			merged = s
			continue
		}
		merged = s.edit(func(of func(kind string) *discovery.Edit[Object]) {
			for kind, upper := range merged.kinds {
				for name, o := range upper.All() {
					e := of(kind)
					if lost := e.Get(name); lost.Value != nil {
						faults = append(faults, Duplicate(lost, o))
					}
					e.Put(name, o)
				}
			}
		})
	}
	sortFaults(faults)
	return merged, faults
}
