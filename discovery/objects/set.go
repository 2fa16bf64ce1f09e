package objects

import (
	"maps"
	"slices"
)

// Set holds objects by key. It is never changed: Put and Delete return another, which shares what did not change. The zero
// value is empty.
type Set struct {
	kinds map[string][]Object // by kind, sorted by key
}

// NewSet returns a Set of objs; of two with the same key the last counts.
func NewSet(objs ...Object) *Set { return (&Set{}).Put(objs...) }

func compareKeys(a, b Object) int { return a.Name().Compare(b.Name()) }

// Put returns s with objs added or replaced.
func (s *Set) Put(objs ...Object) *Set {
	added := map[string][]Object{}
	for _, o := range objs {
		added[o.Kind] = append(added[o.Kind], o)
	}
	next := &Set{kinds: maps.Clone(s.kinds)}
	if next.kinds == nil {
		next.kinds = map[string][]Object{}
	}
	for kind, list := range added {
		slices.Reverse(list) // so that Compact keeps the last of equal keys
		slices.SortStableFunc(list, compareKeys)
		list = slices.CompactFunc(list, func(a, b Object) bool { return compareKeys(a, b) == 0 })
		next.kinds[kind] = mergeSorted(list, next.kinds[kind], nil)
	}
	return next
}

// mergeSorted returns the union of two sorted lists; of equal keys, a's counts and shadowed is told.
func mergeSorted(a, b []Object, shadowed func(kept, lost Object)) []Object {
	out := make([]Object, 0, len(a)+len(b))
	for len(a) > 0 && len(b) > 0 {
		switch c := compareKeys(a[0], b[0]); {
		case c > 0:
			out, b = append(out, b[0]), b[1:]
			continue
		case c == 0:
			if shadowed != nil {
				shadowed(a[0], b[0])
			}
			b = b[1:]
		}
		out, a = append(out, a[0]), a[1:]
	}
	return append(append(out, a...), b...)
}

// Delete returns s without keys.
func (s *Set) Delete(keys ...Key) *Set {
	next := &Set{kinds: maps.Clone(s.kinds)}
	for _, k := range keys {
		if i, ok := next.find(k); ok {
			list := slices.Clone(next.kinds[k.Kind])
			next.kinds[k.Kind] = slices.Delete(list, i, i+1)
		}
	}
	return next
}

func (s *Set) find(k Key) (int, bool) {
	return slices.BinarySearchFunc(s.kinds[k.Kind], k, func(o Object, k Key) int { return o.Key().Compare(k) })
}

// Get returns the object of key.
func (s *Set) Get(key Key) (Object, bool) {
	i, ok := s.find(key)
	if !ok {
		return Object{}, false
	}
	return s.kinds[key.Kind][i], true
}

// Len counts the objects.
func (s *Set) Len() int {
	n := 0
	for _, list := range s.kinds {
		n += len(list)
	}
	return n
}

// List returns the objects of a kind in a namespace, sorted by key; "" means every kind, every namespace.
func (s *Set) List(kind, namespace string) []Object {
	var list []Object
	for _, k := range slices.Sorted(maps.Keys(s.kinds)) {
		if kind != "" && k != kind {
			continue
		}
		for _, o := range s.kinds[k] {
			if namespace == "" || o.Value.GetNamespace() == namespace {
				list = append(list, o)
			}
		}
	}
	return list
}

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
		next := &Set{kinds: maps.Clone(merged.kinds)}
		for kind, list := range s.kinds {
			next.kinds[kind] = mergeSorted(merged.kinds[kind], list, func(kept, lost Object) { faults = append(faults, Duplicate(lost, kept)) })
		}
		merged = next
	}
	sortFaults(faults)
	return merged, faults
}
