package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hanse-mesh/hanse/cmd/internal/admin"
	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/discovery/objects"
	"github.com/hanse-mesh/hanse/federation/etcd"
)

// catalog holds this cluster's configuration: the objects of the watched directory, and over them those that were applied.
// It builds the local Snapshot.
type catalog struct {
	self    discovery.Self
	store   records        // applied objects, by "Kind/namespace/name"
	sources []objectSource // what is configured elsewhere; an earlier one wins
	memory  memory
	log     *slog.Logger
	onBuild func(*discovery.Snapshot) // called by Run after each Build, in order

	gateways      atomic.Pointer[[]netip.AddrPort]     // nil: self's; see controlPlane.followReach
	clustersetIPs func() map[netip.Addr]discovery.Name // read-only; nil: there are none
	accounts      func() []discovery.Name              // likewise

	wake chan struct{}
	sync chan chan struct{} // closed by Run after a Build

	applying sync.Mutex // one Apply or Delete at a time

	mu      sync.Mutex
	applied *objects.Set     // guarded by mu
	state   *objects.State   // guarded by mu; of the last Build
	faults  []*objects.Fault // guarded by mu; of the last Build and of the sources
}

func newCatalog(self discovery.Self, store records, sources []objectSource, memory memory, log *slog.Logger, onBuild func(*discovery.Snapshot)) *catalog {
	return &catalog{self: self, store: store, sources: sources, memory: memory, log: log, onBuild: onBuild,
		wake: make(chan struct{}, 1), sync: make(chan chan struct{}), applied: objects.NewSet()}
}

// objectSource is where configuration comes from that is not applied to hansed itself.
type objectSource interface {
	Set() *objects.Set
	Complete() bool // it has been read whole at least once
	Faults() []*objects.Fault
	Updated() <-chan struct{} // signalled after any of them changed; one reader
}

// forward calls f for each signal, until ctx ends.
func forward(ctx context.Context, signals <-chan struct{}, f func()) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-signals:
			f()
		}
	}
}

func (c *catalog) complete() bool {
	return !slices.ContainsFunc(c.sources, func(s objectSource) bool { return !s.Complete() })
}

// layered is applied over what the sources have.
func (c *catalog) layered(applied *objects.Set) (*objects.Set, []*objects.Fault) {
	sets := []*objects.Set{applied}
	for _, s := range c.sources {
		sets = append(sets, s.Set())
	}
	return objects.Layer(sets...)
}

// configured finds an object in the sources.
func (c *catalog) configured(k objects.Key) (objects.Object, bool) {
	for _, s := range c.sources {
		if o, ok := s.Set().Get(k); ok {
			return o, true
		}
	}
	return objects.Object{}, false
}

// Run reads what was applied, then rebuilds the Snapshot whenever a source changes.
func (c *catalog) Run(ctx context.Context) error {
	if err := c.load(ctx); err != nil {
		return err
	}
	state, err := c.memory.load(ctx)
	if err != nil {
		return err
	}
	var forwarding sync.WaitGroup
	defer forwarding.Wait()
	for _, s := range c.sources {
		forwarding.Go(func() { forward(ctx, s.Updated(), c.kick) })
	}
	var built chan struct{}
	for {
		if c.complete() {
			var snap *discovery.Snapshot
			snap, state = c.build(c.memory.refresh(state))
			// IDs and export times are stored before anybody hears of them: a restart must not change them.
			if err := c.memory.save(ctx, state); err != nil && ctx.Err() == nil {
				c.log.Error("endpoint IDs and export times were not stored; after a restart they may be new", "err", err)
			}
			c.onBuild(snap)
		}
		if built != nil {
			close(built)
			built = nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-c.wake:
		case built = <-c.sync:
		}
	}
}

// follow takes in what other replicas apply, until ctx ends.
func (c *catalog) follow(ctx context.Context) error {
	for ctx.Err() == nil {
		err := c.store.kv.Watch(ctx, "", func([]etcd.KeyValue, int64) error {
			c.applying.Lock()
			defer c.applying.Unlock()
			if err := c.load(ctx); err != nil { // again, for an Apply here may have been faster
				return err
			}
			c.kick()
			return nil
		})
		if ctx.Err() == nil {
			etcd.Again(ctx, c.log, "applied objects are read again", err)
			pause(ctx, time.Second)
		}
	}
	return nil
}

// catchUp returns when the Snapshot is built from everything that was applied before.
func (c *catalog) catchUp(ctx context.Context) error {
	c.applying.Lock()
	err := c.load(ctx)
	c.applying.Unlock()
	if err == nil {
		err = c.memory.reload(ctx)
	}
	if err != nil {
		return err
	}
	built := make(chan struct{})
	select {
	case c.sync <- built:
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case <-built:
	case <-ctx.Done():
		return ctx.Err()
	}
	return nil
}

func (c *catalog) load(ctx context.Context) error {
	stored, err := c.store.List(ctx, "")
	if err != nil {
		return fmt.Errorf("read applied objects: %w", err)
	}
	var objs []objects.Object
	for key, value := range stored {
		decoded, err := objects.Decode(value, "")
		if err != nil {
			c.log.Error("an applied object does not decode and is left out", "key", key, "err", err)
		}
		objs = append(objs, decoded...)
	}
	c.mu.Lock()
	c.applied = objects.NewSet(objs...)
	c.mu.Unlock()
	return nil
}

func (c *catalog) build(state *objects.State) (*discovery.Snapshot, *objects.State) {
	c.mu.Lock()
	applied := c.applied
	c.mu.Unlock()
	set, doubled := c.layered(applied)
	var faults []*objects.Fault
	for _, s := range c.sources {
		faults = append(faults, s.Faults()...)
	}
	self := c.self
	if g := c.gateways.Load(); g != nil {
		self.Gateways = *g
	}
	snap, next, built := objects.Build(objects.Input{Self: self, Set: set, State: state, Now: time.Now(), NewID: c.memory.newID(), Complete: true})
	if c.clustersetIPs != nil {
		snap.ClustersetIPs = c.clustersetIPs()
	}
	if c.accounts != nil {
		snap.Accounts = c.accounts()
	}
	faults = append(append(slices.Clone(faults), doubled...), built...)
	c.mu.Lock()
	before := c.faults
	c.faults, c.state = faults, next
	c.mu.Unlock()
	for _, f := range faults {
		if !slices.ContainsFunc(before, func(o *objects.Fault) bool { return *o == *f }) {
			c.log.Warn("configuration fault; the last good state stays in force", "fault", f.Error())
		}
	}
	return snap, next
}

// buildFaults is what does not fit with the rest in the last Snapshot, and what the sources say.
func (c *catalog) buildFaults() []*objects.Fault {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.faults
}

// Faults is what is wrong with the configuration now.
func (c *catalog) Faults() []admin.Fault {
	c.mu.Lock()
	defer c.mu.Unlock()
	return adminFaults(c.faults)
}

func adminFaults(faults []*objects.Fault) []admin.Fault {
	out := make([]admin.Fault, len(faults))
	for i, f := range faults {
		out[i] = admin.Fault{File: f.File, Line: f.Line, Object: f.Object, Field: f.Field, Value: f.Value, Reason: f.Reason}
	}
	return out
}

// Apply stores the objects of a YAML stream, all or none.
func (c *catalog) Apply(ctx context.Context, yaml []byte, dryRun bool) ([]admin.Applied, error) {
	objs, err := objects.Decode(yaml, "")
	if err != nil {
		faults := objects.Faults(err)
		e := admin.Invalid("nothing was applied; correct the fields and apply again", "%d faults in the configuration", len(faults))
		e.Faults = adminFaults(faults)
		return nil, e
	}
	if len(objs) == 0 {
		return nil, admin.Invalid("a YAML document has at least apiVersion, kind and metadata.name", "there is no object in what was given")
	}
	c.applying.Lock()
	defer c.applying.Unlock()
	c.mu.Lock()
	applied := c.applied
	c.mu.Unlock()

	next := applied
	var out []admin.Applied
	var changed []objects.Object
	seen := map[objects.Key]bool{}
	for _, o := range objs {
		if seen[o.Key()] {
			return nil, admin.Invalid("keep one of them", "%s is given twice", o.Key())
		}
		seen[o.Key()] = true
		if f, ok := c.configured(o.Key()); ok {
			return nil, admin.Refused("change it there, or remove it there first", "%s is already configured by %s", o.Key(), f.File)
		}
		action := "created"
		if old, ok := applied.Get(o.Key()); ok {
			action = "configured"
			if same(old, o) {
				action = "unchanged"
			}
		}
		out = append(out, admin.Applied{Object: o.Key().String(), Action: action})
		if action != "unchanged" {
			changed = append(changed, o)
			next = next.Put(o)
		}
	}
	if err := c.fits(next, seen); err != nil {
		return nil, err
	}
	if dryRun || len(changed) == 0 {
		return out, nil
	}
	for i, o := range changed {
		b, err := json.Marshal(o)
		if err == nil {
			err = c.store.Put(ctx, storeKey(o.Key()), b)
		}
		if err != nil {
			c.undo(applied, changed[:i])
			return nil, fmt.Errorf("store %s: %w (nothing was applied)", o.Key(), err)
		}
	}
	c.replace(next)
	return out, nil
}

// fits refuses a Set of applied objects of which one of the named would be left out by Build. What only waits for another object is
// taken, as by an API server.
func (c *catalog) fits(next *objects.Set, named map[objects.Key]bool) error {
	c.mu.Lock()
	state := c.state
	c.mu.Unlock()
	set, _ := c.layered(next)
	_, _, faults := objects.Build(objects.Input{Self: c.self, Set: set, State: state, Now: time.Now(), Complete: true})
	var mine []*objects.Fault
	for _, f := range faults {
		for k := range named {
			if f.Object == k.String() && !f.Pending {
				mine = append(mine, f)
			}
		}
	}
	if len(mine) == 0 {
		return nil
	}
	e := admin.Invalid("nothing was applied; correct the fields and apply again", "%d faults in the configuration", len(mine))
	e.Faults = adminFaults(mine)
	return e
}

// undo puts back what was there before a half-stored Apply. It has its own time, since the caller's may be over.
func (c *catalog) undo(before *objects.Set, stored []objects.Object) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for _, o := range stored {
		var err error
		if old, ok := before.Get(o.Key()); ok {
			var b []byte
			if b, err = json.Marshal(old); err == nil {
				err = c.store.Put(ctx, storeKey(o.Key()), b)
			}
		} else {
			err = c.store.Delete(ctx, storeKey(o.Key()))
		}
		if err != nil {
			c.log.Error("an object of a failed apply could not be undone", "object", o.Key().String(), "err", err)
		}
	}
}

// Delete removes an applied object.
func (c *catalog) Delete(ctx context.Context, kind, namespace, name string) (admin.Applied, error) {
	k, err := lookupKind(kind)
	if err != nil {
		return admin.Applied{}, err
	}
	key := objects.Key{Kind: k.Name, Namespace: namespace, Name: name}
	if !k.Namespaced {
		key.Namespace = ""
	} else if namespace == "" {
		key.Namespace = "default"
	}
	c.applying.Lock()
	defer c.applying.Unlock()
	c.mu.Lock()
	applied := c.applied
	c.mu.Unlock()
	if _, ok := applied.Get(key); !ok {
		if f, ok := c.configured(key); ok {
			return admin.Applied{}, admin.Refused("remove it there", "%s is configured by %s", key, f.File)
		}
		return admin.Applied{}, admin.NotFound("hanse get "+k.Plural, "%s does not exist", key)
	}
	if err := c.store.Delete(ctx, storeKey(key)); err != nil {
		return admin.Applied{}, fmt.Errorf("delete %s: %w", key, err)
	}
	c.replace(applied.Delete(key))
	return admin.Applied{Object: key.String(), Action: "deleted"}, nil
}

// List returns the objects in force.
func (c *catalog) List(kind, namespace, name string) ([]admin.Object, error) {
	if kind != "" {
		k, err := lookupKind(kind)
		if err != nil {
			return nil, err
		}
		kind = k.Name
		if !k.Namespaced {
			namespace = ""
		}
	}
	c.mu.Lock()
	applied, faults := c.applied, c.faults
	c.mu.Unlock()
	set, _ := c.layered(applied)
	out := []admin.Object{}
	for _, o := range set.List(kind, namespace) {
		if name != "" && o.Name().Name != name {
			continue
		}
		b, err := json.Marshal(o)
		if err != nil {
			return nil, fmt.Errorf("encode %s: %w", o.Key(), err)
		}
		row := admin.Object{Kind: o.Kind, Namespace: o.Key().Namespace, Name: o.Key().Name, Source: o.File, Status: "in force", Object: b}
		if row.Source == "" {
			row.Source = "applied"
		}
		for _, f := range faults {
			if f.Object == o.Key().String() {
				row.Status = "fault: " + f.Field + ": " + f.Reason
				break
			}
		}
		out = append(out, row)
	}
	return out, nil
}

func (c *catalog) replace(next *objects.Set) {
	c.mu.Lock()
	c.applied = next
	c.mu.Unlock()
	c.kick()
}

func (c *catalog) kick() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

func lookupKind(word string) (objects.Kind, error) {
	k, ok := objects.LookupKind(word)
	if !ok {
		var known string
		for _, k := range objects.Kinds() {
			known += " " + k.Plural
		}
		return k, admin.Invalid("one of:"+known, "there is no kind %q", word)
	}
	return k, nil
}

func storeKey(k objects.Key) string { return k.Kind + "/" + k.Namespace + "/" + k.Name }

func same(a, b objects.Object) bool {
	x, errX := json.Marshal(a)
	y, errY := json.Marshal(b)
	return errX == nil && errY == nil && bytes.Equal(x, y)
}
