package discovery

import (
	"iter"
	"maps"
	"slices"
)

// ByName holds values by name, and is never changed: what Edit makes of it shares all that did not change, so that one change among thousands
// costs what it changes, and so does Diff. The zero value is empty.
type ByName[V any] struct {
	shards *[shardCount]*shard[V] // nil: empty
	len    int
}

const shardCount = 256

// shard is never empty, and never changed once its Edit is done.
type shard[V any] struct{ of map[Name]V }

// NewByName returns what a map has.
func NewByName[V any](of map[Name]V) ByName[V] {
	e := ByName[V]{}.Edit()
	for n, v := range of {
		e.Put(n, v)
	}
	return e.Done()
}

func shardOf(n Name) int {
	h := uint32(2166136261) // FNV-1a
	for i := range len(n.Namespace) {
		h = (h ^ uint32(n.Namespace[i])) * 16777619
	}
	h *= 16777619
	for i := range len(n.Name) {
		h = (h ^ uint32(n.Name[i])) * 16777619
	}
	return int(h^h>>16) % shardCount
}

// Len counts the values.
func (b ByName[V]) Len() int { return b.len }

// Get returns a name's value, or the zero value.
func (b ByName[V]) Get(n Name) V {
	v, _ := b.Lookup(n)
	return v
}

// Lookup returns a name's value, and whether there is one.
func (b ByName[V]) Lookup(n Name) (v V, ok bool) {
	if s := b.shard(shardOf(n)); s != nil {
		v, ok = s.of[n]
	}
	return v, ok
}

func (b ByName[V]) shard(i int) *shard[V] {
	if b.shards == nil {
		return nil
	}
	return b.shards[i]
}

// All yields every name and its value, in no order.
func (b ByName[V]) All() iter.Seq2[Name, V] {
	return func(yield func(Name, V) bool) {
		for i := range shardCount {
			if s := b.shard(i); s != nil {
				for n, v := range s.of {
					if !yield(n, v) {
						return
					}
				}
			}
		}
	}
}

// Names returns the names, sorted.
func (b ByName[V]) Names() []Name {
	names := make([]Name, 0, b.len)
	for n := range b.All() {
		names = append(names, n)
	}
	slices.SortFunc(names, Name.Compare)
	return names
}

// Put returns b with another value of one name.
func (b ByName[V]) Put(n Name, v V) ByName[V] {
	e := b.Edit()
	e.Put(n, v)
	return e.Done()
}

// Delete returns b without some names.
func (b ByName[V]) Delete(names ...Name) ByName[V] {
	e := b.Edit()
	for _, n := range names {
		e.Delete(n)
	}
	return e.Done()
}

// Diff calls changed for every name whose value is another one, with the zero value where there is none.
func Diff[V comparable](old, now ByName[V], changed func(n Name, old, now V)) {
	if old.shards == now.shards {
		return
	}
	for i := range shardCount {
		a, b := old.shard(i), now.shard(i)
		if a == b {
			continue
		}
		var was, is map[Name]V
		if a != nil {
			was = a.of
		}
		if b != nil {
			is = b.of
		}
		for n, v := range is {
			if o, ok := was[n]; !ok || o != v {
				changed(n, o, v)
			}
		}
		for n, o := range was {
			if _, ok := is[n]; !ok {
				var none V
				changed(n, o, none)
			}
		}
	}
}

// Edit begins a change of a copy of b.
func (b ByName[V]) Edit() *Edit[V] {
	e := &Edit[V]{next: ByName[V]{shards: new([shardCount]*shard[V]), len: b.len}}
	if b.shards != nil {
		*e.next.shards = *b.shards
	}
	return e
}

// Edit is a change under way.
type Edit[V any] struct {
	next ByName[V]
	own  [shardCount]bool // shards that are copies already
}

// Get returns a name's value as it is now, or the zero value.
func (e *Edit[V]) Get(n Name) V { return e.next.Get(n) }

// Put sets a name's value.
func (e *Edit[V]) Put(n Name, v V) {
	of := e.mine(shardOf(n))
	before := len(of)
	of[n] = v
	e.next.len += len(of) - before
}

// Delete removes a name.
func (e *Edit[V]) Delete(n Name) {
	i := shardOf(n)
	if s := e.next.shards[i]; s == nil || !has(s.of, n) {
		return
	}
	of := e.mine(i)
	delete(of, n)
	e.next.len--
	if len(of) == 0 {
		e.next.shards[i], e.own[i] = nil, false
	}
}

func has[V any](m map[Name]V, n Name) bool {
	_, ok := m[n]
	return ok
}

func (e *Edit[V]) mine(i int) map[Name]V {
	if !e.own[i] {
		of := map[Name]V{}
		if s := e.next.shards[i]; s != nil {
			of = maps.Clone(s.of)
		}
		e.next.shards[i], e.own[i] = &shard[V]{of}, true
	}
	return e.next.shards[i].of
}

// Done ends the change.
func (e *Edit[V]) Done() ByName[V] {
	done := e.next
	e.next = ByName[V]{} // it is immutable from here on: a later Put would find nothing
	return done
}
