package xdsserver

import (
	"net/netip"
	"sync"
	"time"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/discovery/xdsgen"
)

// logLength is how many changes of the view are remembered. A stream that is further behind checks all it has.
const logLength = 128

// idleEntry is how long a resource that nobody asks for is kept.
const idleEntry = 10 * time.Minute

// cache holds the current View and what has been made of it, by class of viewer.
type cache struct {
	mu      sync.Mutex // guards all below
	view    *xdsgen.View
	seq     uint64 // of view; grows with every View
	applied time.Time
	log     []*xdsgen.Changes // the last ones; the newest led to seq
	all     uint64            // seq of the last change that may concern every resource
	access  uint64
	service map[discovery.Name]uint64 // seq of the last change
	host    map[netip.Addr]uint64
	entries map[cacheKey]*entry
}

type cacheKey struct{ typeURL, name, class string }

// entry is one resource, made once.
type entry struct {
	seq     uint64 // of the View that it is made of, or of a later one in which it is the same; guarded by cache.mu
	service discovery.Name
	host    netip.Addr
	used    time.Time // guarded by cache.mu

	once sync.Once
	res  *xdsgen.Resource
	err  error
}

func newCache() *cache {
	return &cache{
		view:    xdsgen.NewView(&discovery.Clusterset{Local: &discovery.Snapshot{}}, nil),
		service: make(map[discovery.Name]uint64),
		host:    make(map[netip.Addr]uint64),
		entries: make(map[cacheKey]*entry),
	}
}

// apply makes set the current view. It reports whether anything can have changed.
func (c *cache) apply(set *discovery.Clusterset, callers xdsgen.Callers, now time.Time) bool {
	c.mu.Lock()
	view := c.view // only Run calls apply
	c.mu.Unlock()
	next, ch := view.Next(set, callers)

	c.mu.Lock()
	defer c.mu.Unlock()
	c.view = next
	if ch.Nothing() {
		return false
	}
	c.seq++
	c.applied = now
	if len(c.log) == logLength {
		c.log = append(c.log[:0], c.log[1:]...)
	}
	c.log = append(c.log, ch)
	if ch.All {
		c.all = c.seq
		clear(c.service)
		clear(c.host)
	}
	if ch.Access {
		c.access = c.seq
	}
	for n := range ch.Services {
		c.service[n] = c.seq
	}
	for h := range ch.Hosts {
		c.host[h] = c.seq
	}
	return true
}

// since returns the changes after seq and the current seq; complete is false where they are not remembered any more.
func (c *cache) since(seq uint64) (changes []*xdsgen.Changes, now uint64, applied time.Time, complete bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	behind := int(c.seq - seq)
	if behind > len(c.log) {
		return nil, c.seq, c.applied, false
	}
	return append(changes, c.log[len(c.log)-behind:]...), c.seq, c.applied, true
}

func (c *cache) current() (*xdsgen.View, uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.view, c.seq
}

// get returns a resource of the current View, shared by the viewer's class unless it is personal.
func (c *cache) get(viewer *xdsgen.Viewer, typeURL, name string, now time.Time) (*xdsgen.Resource, error) {
	k := cacheKey{typeURL, name, viewer.Class(typeURL, name)}
	c.mu.Lock()
	view := c.view
	e := c.entries[k]
	if e == nil || !c.valid(e) {
		e = &entry{seq: c.seq}
		e.service, e.host = xdsgen.Subject(name)
		c.entries[k] = e
	}
	e.used = now
	c.mu.Unlock()
	e.once.Do(func() { e.res, e.err = view.Resource(viewer, typeURL, name) })
	if e.res != nil && e.res.Personal {
		return view.Resource(viewer, typeURL, name)
	}
	return e.res, e.err
}

// valid reports whether nothing that e is made of has changed since. Guarded by mu.
func (c *cache) valid(e *entry) bool {
	switch {
	case e.seq < c.all:
		return false
	case !e.host.IsValid():
		return e.seq >= c.service[e.service]
	case e.host.IsUnspecified():
		return e.seq == c.seq
	}
	return e.seq >= c.host[e.host] && e.seq >= c.access
}

// sweep drops what nobody has asked for in a while. What is left holds for the current View, so that of earlier changes nothing need be
// remembered: otherwise they would be as many as all addresses that ever were, after a while.
func (c *cache) sweep(now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for k, e := range c.entries {
		if now.Sub(e.used) > idleEntry || !c.valid(e) {
			delete(c.entries, k)
		}
	}
	for _, e := range c.entries {
		e.seq = c.seq
	}
	clear(c.service)
	clear(c.host)
}
