package drill

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/go-multierror"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/hanse-mesh/hanse/cmd/internal/admin"
	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/discovery/xdspb"
)

// ErrNotFound is returned for a drill that does not exist.
var ErrNotFound = errors.New("no such drill")

// Lease is how long an executor obeys without a renewal; Renew is how often it is renewed.
const (
	Lease = 15 * time.Second
	Renew = 5 * time.Second
)

// settle is how long after healing the engine still listens, so that the report can tell when traffic came back.
const settle = 20 * time.Second

// kept is how many ended drills stay readable.
const kept = 100

// Store keeps drills over restarts of the control plane. Keys are drill IDs.
type Store interface {
	Put(ctx context.Context, id string, value []byte) error
	Delete(ctx context.Context, id string) error
	List(ctx context.Context) (map[string][]byte, error)
}

// ControlPlane is what modes do to the control plane itself.
type ControlPlane interface {
	// Silence makes it answer nobody for d, or until Heal.
	Silence(d time.Duration)
	// CutFederation drops the links to all peers for d, or until Heal.
	CutFederation(d time.Duration)
	// Distrust refuses what rests on a trust domain, or trust domain/authority, for d, or until Heal.
	Distrust(root string, d time.Duration)
	Heal()
	// Rotate replaces the root, tells each moment, and returns when the old one is dropped. If ctx ends before, the rest happens by itself.
	Rotate(ctx context.Context, moment func(kind, detail string)) error
	// Closed counts connections that were closed since then because their peers' bundles no longer verify them.
	Closed(since time.Time) int
}

// Config of an Engine. All fields are required but Log and Leads.
type Config struct {
	Self  string // name of this cluster
	Store Store
	// Leads says whether this engine runs drills; where it does not, it obeys what Follow tells it of another replica's. Nil: always.
	Leads        func() bool
	ControlPlane ControlPlane
	View         func() *discovery.Clusterset
	// ReportEvery asks the proxies for load reports at that interval; 0 goes back to the default.
	ReportEvery func(time.Duration)
	// FaultsChanged is called after what Faults answers has changed.
	FaultsChanged func()
	Now           func() time.Time // monotonic
	Log           *slog.Logger
}

// Engine runs the drills of one control plane.
type Engine struct {
	cfg Config

	wake chan struct{}

	mu       sync.Mutex
	drills   map[string]*run      // guarded by mu
	history  history              // guarded by mu
	reported map[string]time.Time // guarded by mu: the newest report of each caller's proxy
	renewal  uint64               // guarded by mu
}

// run is one drill. Its fields are guarded by Engine.mu.
type run struct {
	drill    admin.Drill
	guard    Guard
	start    time.Time
	heal     time.Time // zero while it runs
	services map[discovery.Name]bool
	targets  map[string]bool
	hits     map[string][]uint32 // workload IP → target ports
	over     bool                // the report is final
	changed  chan struct{}       // closed at the next change
	moments  []admin.DrillMoment // of a rotation
	rotating context.CancelFunc  // nil until it does

	stored  string    // state in the store
	foreign bool      // another replica runs it
	renewed time.Time // when that was last heard of, if foreign
}

// storedDrill is a drill in the store. Left and Renewal are for the replicas that do not run it.
type storedDrill struct {
	admin.Drill
	Left    float64 `json:"leftSeconds,omitempty"`
	Renewal uint64  `json:"renewal,omitempty"`
}

// New returns an Engine. Run must be called for drills to end.
func New(cfg Config) *Engine {
	return &Engine{cfg: cfg, wake: make(chan struct{}, 1), drills: map[string]*run{}, reported: map[string]time.Time{}}
}

// Run resumes what a restart interrupted, renews, watches guards and heals. It returns after ctx ends.
func (e *Engine) Run(ctx context.Context) error {
	if err := e.load(ctx); err != nil {
		return err
	}
	tick := time.NewTicker(250 * time.Millisecond)
	defer tick.Stop()
	lastRenew := e.cfg.Now()
	leads := e.leads()
	var work sync.WaitGroup
	defer work.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for {
		e.rotate(ctx, &work)
		select {
		case <-ctx.Done():
			return nil
		case <-e.wake:
			lastRenew = e.cfg.Now()
			e.renew(ctx)
		case <-tick.C:
			if now := e.cfg.Now(); now.Sub(lastRenew) >= Renew {
				lastRenew = now
				e.renew(ctx)
			}
		}
		if was := leads; was != e.leads() {
			leads = !was
			e.change(ctx, leads)
		}
		e.step(ctx)
	}
}

// rotate begins the rotations of drills that have just begun.
func (e *Engine) rotate(ctx context.Context, work *sync.WaitGroup) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, r := range e.drills {
		if r.drill.Spec.Mode != Rotate || r.drill.State != "running" || r.foreign || r.rotating != nil {
			continue
		}
		var of context.Context
		of, r.rotating = context.WithCancel(ctx)
		work.Go(func() {
			err := e.cfg.ControlPlane.Rotate(of, func(kind, detail string) {
				e.mu.Lock()
				defer e.mu.Unlock()
				at := e.cfg.Now().Sub(r.start).Seconds()
				r.moments = append(r.moments, admin.DrillMoment{At: at, Kind: kind, Detail: detail})
				if kind == "renewed" {
					r.drill.Renewed = &at
				}
			})
			e.mu.Lock()
			defer e.mu.Unlock()
			switch {
			case r.drill.State != "running" || r.foreign || of.Err() != nil: // it was ended
			case err != nil:
				e.endLocked(r, e.cfg.Now(), "aborted", err.Error())
			default:
				e.endLocked(r, e.cfg.Now(), "done", "")
			}
		})
	}
}

func (e *Engine) leads() bool { return e.cfg.Leads == nil || e.cfg.Leads() }

const (
	restarted = "the control plane restarted during the drill; sidecars healed when its lease ended"
	deposed   = "the replica that ran the drill went away; it was ended by the next leader"
)

// load reads the drills of an earlier life. One that was running is over: its executors healed when its lease ran out. Unless another
// replica runs it.
func (e *Engine) load(ctx context.Context) error {
	stored, err := e.cfg.Store.List(ctx)
	if err != nil {
		return fmt.Errorf("read drills: %w", err)
	}
	if !e.leads() {
		e.Follow(stored)
		return nil
	}
	var faults *multierror.Error
	e.mu.Lock()
	defer e.mu.Unlock()
	for id, b := range stored {
		if e.drills[id] != nil {
			continue // started in this life, while this was being read
		}
		r := &run{over: true, changed: make(chan struct{})}
		if err := json.Unmarshal(b, &r.drill); err != nil {
			faults = multierror.Append(faults, fmt.Errorf("decode drill %s: %w", id, err))
			continue
		}
		r.start, r.stored = r.drill.Started, r.drill.State
		if !final(r.drill.State) {
			e.abortLocked(r, restarted)
			r.stored = r.drill.State // as ever: only shown
		}
		e.drills[id] = r
	}
	if faults.ErrorOrNil() != nil {
		e.cfg.Log.Warn("some stored drills cannot be read and are left out", "err", faults)
	}
	return nil
}

func final(state string) bool { return state != "running" && state != "healing" }

// abortLocked ends a drill whose engine is gone.
func (e *Engine) abortLocked(r *run, reason string) {
	r.drill.State, r.drill.Verdict, r.drill.Reason = "aborted", "FAILED", reason
	now := e.cfg.Now()
	r.drill.Ended, r.over, r.heal, r.foreign = &now, true, now, false
}

// change is called when this engine begins or ceases to lead. A drill does not change hands: the new leader ends it.
func (e *Engine) change(ctx context.Context, leads bool) {
	if leads {
		stored, err := e.cfg.Store.List(ctx)
		if err != nil {
			e.cfg.Log.Warn("drills of the leader before may be shown as running", "err", err)
		} else {
			e.follow(stored)
		}
	}
	e.mu.Lock()
	healed := false
	for _, r := range e.drills {
		switch {
		case r.over:
		case leads && r.foreign:
			healed = healed || r.drill.State == "running"
			e.abortLocked(r, deposed)
			close(r.changed)
			r.changed = make(chan struct{})
		case !leads:
			r.foreign, r.renewed = true, e.cfg.Now() // until the next leader ends it, or its lease does
		}
	}
	e.mu.Unlock()
	if leads {
		e.save(ctx)
	}
	if healed {
		e.cfg.ControlPlane.Heal()
		e.cfg.FaultsChanged()
		e.cfg.ReportEvery(0)
	}
}

// Follow takes in the drills as another replica has stored them. Those that it runs are obeyed here, too.
func (e *Engine) Follow(stored map[string][]byte) {
	if !e.leads() {
		e.follow(stored)
	}
}

func (e *Engine) follow(stored map[string][]byte) {
	now := e.cfg.Now()
	var began []storedDrill
	changed, healed := false, false
	e.mu.Lock()
	for id := range e.drills {
		if _, ok := stored[id]; !ok {
			delete(e.drills, id)
		}
	}
	for id, b := range stored {
		var d storedDrill
		if err := json.Unmarshal(b, &d); err != nil {
			e.cfg.Log.Warn("a stored drill cannot be read and is left out", "drill", id, "err", err)
			continue
		}
		r := e.drills[id]
		was := ""
		if r == nil {
			r = &run{changed: make(chan struct{}), targets: map[string]bool{}, hits: map[string][]uint32{}, start: d.Started}
			e.drills[id] = r
		} else {
			was = r.drill.State
		}
		r.drill, r.stored, r.foreign, r.over = d.Drill, d.State, true, final(d.State)
		switch {
		case d.State == "running":
			if was != "running" {
				r.aim(d.Spec, e.cfg.View())
				r.drill.Executors = d.Executors
				began = append(began, d)
			}
			if was != "running" || d.Renewal != e.renewal {
				r.start, r.renewed, changed = now.Add(seconds(d.Left)-seconds(d.Spec.For)), now, true
				e.renewal = d.Renewal
			}
		case was == "running":
			healed = true
			if m := d.Spec.Mode; inControlPlane(m) && m != Rotate {
				defer e.cfg.ControlPlane.Heal()
			}
		}
		close(r.changed)
		r.changed = make(chan struct{})
	}
	active := e.activeLocked()
	e.mu.Unlock()
	for _, d := range began {
		switch d.Spec.Mode {
		case SilenceControlPlane:
			e.cfg.ControlPlane.Silence(seconds(d.Left))
		case CutFederation:
			e.cfg.ControlPlane.CutFederation(seconds(d.Left))
		case DistrustRoot:
			if whole(d.Spec.Scope) {
				e.cfg.ControlPlane.Distrust(d.Spec.Root, seconds(d.Left))
			}
		}
		e.cfg.ReportEvery(time.Second)
		e.cfg.Log.Info("drill of another replica is obeyed", "drill", d.ID, "mode", d.Spec.Mode)
	}
	if changed || healed {
		e.cfg.FaultsChanged()
	}
	if !active {
		e.cfg.ReportEvery(0)
	}
}

// Start begins a drill. spec must be complete (Complete). Only one drill may hit an endpoint at a time.
func (e *Engine) Start(ctx context.Context, spec admin.DrillSpec) (string, error) {
	guard, err := ParseGuard(spec.AbortIf)
	if err != nil {
		return "", err
	}
	cs := e.cfg.View()
	id := newID()
	r := &run{
		guard: guard, start: e.cfg.Now(), changed: make(chan struct{}),
		targets: map[string]bool{}, hits: map[string][]uint32{},
		drill: admin.Drill{ID: id, Spec: spec, State: "running", Started: e.cfg.Now(), Success: 1},
	}
	r.aim(spec, cs)
	if inSidecars(spec.Mode) && len(r.hits) == 0 && (spec.Mode != DistrustRoot || !whole(spec.Scope)) {
		return "", fmt.Errorf("nothing to drill: no endpoint of %s matches", scopeText(spec.Scope))
	}

	e.mu.Lock()
	for _, o := range e.drills {
		if o.drill.State != "running" {
			continue
		}
		overlap := inControlPlane(spec.Mode) && inControlPlane(o.drill.Spec.Mode)
		for t := range r.targets {
			overlap = overlap || o.targets[t]
		}
		if overlap {
			e.mu.Unlock()
			return "", fmt.Errorf("drill %s already hits part of this: stop it first (hanse drill stop %s)", o.drill.ID, o.drill.ID)
		}
	}
	e.drills[id] = r
	r.stored = r.drill.State
	b, err := e.encodeLocked(r)
	e.mu.Unlock()
	if err == nil {
		err = e.cfg.Store.Put(ctx, id, b)
	}
	if err != nil {
		e.mu.Lock()
		delete(e.drills, id)
		e.mu.Unlock()
		return "", fmt.Errorf("store drill %s: %w", id, err)
	}
	switch spec.Mode {
	case SilenceControlPlane:
		e.cfg.ControlPlane.Silence(seconds(spec.For))
	case CutFederation:
		e.cfg.ControlPlane.CutFederation(seconds(spec.For))
	case DistrustRoot:
		if whole(spec.Scope) {
			e.cfg.ControlPlane.Distrust(spec.Root, seconds(spec.For))
		}
	}
	e.cfg.ReportEvery(time.Second)
	e.cfg.Log.Info("drill started", "drill", id, "mode", spec.Mode, "scope", scopeText(spec.Scope), "for", seconds(spec.For))
	e.kick()
	return id, nil
}

// whole says whether a scope is a whole cluster.
func whole(s admin.DrillScope) bool {
	return s.Service == "" && s.Zone == "" && s.Region == "" && s.Share >= 100
}

// aim finds out what is hit.
func (r *run) aim(spec admin.DrillSpec, cs *discovery.Clusterset) {
	for name, svc := range cs.Local.Services.All() {
		for _, ep := range svc.Endpoints {
			if !Hits(spec, name, ep) {
				continue
			}
			if r.services == nil {
				r.services = map[discovery.Name]bool{}
			}
			r.services[name] = true
			r.targets[ep.ID] = true
			ip := ep.Address.String()
			for _, port := range ep.Ports {
				if !slices.Contains(r.hits[ip], uint32(port)) {
					r.hits[ip] = append(r.hits[ip], uint32(port))
				}
			}
			slices.Sort(r.hits[ip])
			r.drill.Executors = append(r.drill.Executors, ip)
		}
	}
	if spec.Mode == DistrustRoot { // what the callers here lose is elsewhere
		clear(r.targets)
		r.services = nil
		for id := range resting(spec, cs) {
			r.targets[id] = true
		}
	}
	slices.Sort(r.drill.Executors)
	r.drill.Executors = slices.Compact(r.drill.Executors)
}

// Stop heals a running drill early.
func (e *Engine) Stop(id string) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	r, ok := e.drills[id]
	if !ok {
		return fmt.Errorf("drill %s: %w", id, ErrNotFound)
	}
	if r.drill.State == "running" {
		e.endLocked(r, e.cfg.Now(), "stopped", "stopped by hand")
	}
	return nil
}

// Get returns a drill as it stands, and a channel that is closed at its next change. final is true once its report is.
func (e *Engine) Get(id string) (d admin.Drill, changed <-chan struct{}, final bool, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	r, ok := e.drills[id]
	if !ok {
		return admin.Drill{}, nil, false, fmt.Errorf("drill %s: %w", id, ErrNotFound)
	}
	return r.drill, r.changed, r.over, nil
}

// List returns all drills, the newest first.
func (e *Engine) List() []admin.Drill {
	e.mu.Lock()
	defer e.mu.Unlock()
	out := make([]admin.Drill, 0, len(e.drills))
	for _, r := range e.drills {
		out = append(out, r.drill)
	}
	slices.SortFunc(out, func(a, b admin.Drill) int { return b.Started.Compare(a.Started) })
	return out
}

// Observe takes in one report of a caller's proxy; one without samples says that nobody called.
func (e *Engine) Observe(caller string, at time.Time, samples []Sample) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.reported[caller] = at
	for _, s := range samples {
		e.history.add(s)
	}
}

// Faults answers which faults are in force for the sidecar of these workload IPs; gateway asks for the cluster's gateways, which a
// black hole of the whole cluster hits too.
func (e *Engine) Faults(workloadIPs []string, gateway bool) *xdspb.Faults {
	e.mu.Lock()
	defer e.mu.Unlock()
	now := e.cfg.Now()
	out := &xdspb.Faults{}
	ids := sortedKeys(e.drills)
	for _, id := range ids {
		r := e.drills[id]
		if r.drill.State != "running" {
			continue
		}
		spec := r.drill.Spec
		left := r.start.Add(seconds(spec.For)).Sub(now)
		if left <= 0 || r.foreign && now.Sub(r.renewed) > Lease {
			continue
		}
		f := &xdspb.Fault{
			Drill: id, Mode: spec.Mode, Share: 100, Renewal: e.renewal,
			End: durationpb.New(left), Lease: durationpb.New(Lease), Report: durationpb.New(time.Second),
		}
		switch spec.Mode {
		case ExpireCertificates:
			f.Lease = nil // it may cut the way of its own renewal
		case DistrustRoot:
			f.Root = spec.Root
		case Slow:
			f.Latency, f.Share = durationpb.New(seconds(spec.Latency)), spec.Scope.Share
		case Errors:
			f.Status, f.Share = uint32(spec.Status), spec.Scope.Share
		}
		if gateway {
			s := spec.Scope
			if spec.Mode == Blackhole && whole(s) {
				out.Faults = append(out.Faults, f)
			}
			continue
		}
		if spec.Mode == DistrustRoot && whole(spec.Scope) { // callers that are nobody's endpoint, too
			out.Faults = append(out.Faults, f)
			continue
		}
		for _, ip := range workloadIPs {
			f.Ports = append(f.Ports, r.hits[ip]...)
		}
		if len(f.Ports) > 0 {
			slices.Sort(f.Ports)
			f.Ports = slices.Compact(f.Ports)
			out.Faults = append(out.Faults, f)
		}
	}
	return out
}

func (e *Engine) kick() {
	select {
	case e.wake <- struct{}{}:
	default:
	}
}

func (e *Engine) renew(ctx context.Context) {
	e.mu.Lock()
	running := false
	for _, r := range e.drills {
		if r.drill.State == "running" && !r.foreign {
			running = true
			if e.cfg.Leads != nil {
				r.stored = "" // the other replicas hear of it from the store
			}
		}
	}
	if running {
		e.renewal++
	}
	e.mu.Unlock()
	if running {
		e.cfg.FaultsChanged()
		if e.cfg.Leads != nil {
			e.save(ctx)
		}
	}
}

// encodeLocked is what the store has of a drill.
func (e *Engine) encodeLocked(r *run) ([]byte, error) {
	d := storedDrill{Drill: r.drill}
	if r.drill.State == "running" {
		d.Left, d.Renewal = r.start.Add(seconds(r.drill.Spec.For)).Sub(e.cfg.Now()).Seconds(), e.renewal
	}
	return json.Marshal(d)
}

// save stores what has changed.
func (e *Engine) save(ctx context.Context) {
	e.mu.Lock()
	put := map[string][]byte{}
	for id, r := range e.drills {
		if r.foreign || r.stored == r.drill.State {
			continue
		}
		if b, err := e.encodeLocked(r); err == nil {
			put[id] = b
		}
		r.stored = r.drill.State
	}
	e.mu.Unlock()
	for id, b := range put {
		if err := e.cfg.Store.Put(ctx, id, b); err != nil && ctx.Err() == nil {
			e.cfg.Log.Warn("a drill was not stored", "drill", id, "err", err)
		}
	}
}

// step moves every drill on: guard, end, report.
func (e *Engine) step(ctx context.Context) {
	now := e.cfg.Now()
	active, ended, over := false, false, false
	e.mu.Lock()
	for _, r := range e.drills {
		if r.over || r.foreign {
			continue
		}
		active = true
		switch {
		case r.drill.State == "running" && now.Sub(r.start) >= seconds(r.drill.Spec.For):
			// Sidecars heal by their own clocks at that moment, and not at this one, which is up to a tick later.
			verdict, reason := "done", ""
			if r.drill.Spec.Mode == Rotate {
				verdict, reason = "aborted", "the rotation took longer than "+seconds(r.drill.Spec.For).String()+"; it goes on by itself: hanse trust rotate shows it"
			}
			e.endLocked(r, r.start.Add(seconds(r.drill.Spec.For)), verdict, reason)
			ended = true
		case r.drill.State == "running":
			if why := r.guard.Tripped(r.recent(&e.history, now)); why != "" {
				e.endLocked(r, now, "aborted", "the guard tripped: "+why)
				ended = true
			}
		}
		samples := e.history.between(r.start.Add(-baseline), now)
		report(&r.drill, samples, moments{start: r.start, heal: r.heal, now: now, services: r.services, targets: r.targets})
		if m := r.drill.Spec.Mode; m == Rotate || m == DistrustRoot {
			r.drill.Closed = e.cfg.ControlPlane.Closed(r.start)
			r.drill.Timeline = slices.Insert(r.drill.Timeline, 1, r.moments...) // after the start
			slices.SortStableFunc(r.drill.Timeline, func(a, b admin.DrillMoment) int { return cmp.Compare(a.At, b.At) })
		}
		r.drill.Missing = e.silentLocked(samples, r, now)
		if !r.heal.IsZero() && r.settled(now) {
			r.finish()
			over = true
		}
		close(r.changed)
		r.changed = make(chan struct{})
	}
	if !e.leads() {
		e.mu.Unlock()
		return
	}
	drop := e.oldLocked()
	maps.DeleteFunc(e.reported, func(_ string, at time.Time) bool { return now.Sub(at) > historyLength })
	e.mu.Unlock()

	e.save(ctx)
	for _, id := range drop {
		if err := e.cfg.Store.Delete(ctx, id); err != nil {
			e.cfg.Log.Warn("old drill was not deleted", "drill", id, "err", err)
		}
	}
	if ended {
		e.cfg.FaultsChanged()
	}
	if over && !e.anyActive() || !active {
		e.cfg.ReportEvery(0)
	}
}

func (e *Engine) anyActive() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.activeLocked()
}

func (e *Engine) activeLocked() bool {
	for _, r := range e.drills {
		if !r.over {
			return true
		}
	}
	return false
}

// settled says whether the report can be final: traffic is back for 5 s, or nothing is to come back, or it takes too long.
func (r *run) settled(now time.Time) bool {
	healed := now.Sub(r.heal)
	switch {
	case r.drill.Return != nil:
		return healed > seconds(*r.drill.Return)+5*time.Second
	case len(r.targets) == 0 || r.drill.Calls == 0:
		return healed > 3*time.Second
	}
	return healed > settle
}

// recent adds up the last guardWindow of what the drill's services were called.
func (r *run) recent(h *history, now time.Time) Totals {
	var t Totals
	for _, s := range h.between(latest(r.start, now.Add(-guardWindow)), now) {
		if r.services == nil || r.services[s.Service] {
			t.add(s)
		}
	}
	return t
}

// silentLocked names callers that called what is drilled before the drill, and whose proxies have not reported since.
func (e *Engine) silentLocked(samples []Sample, r *run, now time.Time) []string {
	if now.Sub(r.start) <= 10*time.Second {
		return nil
	}
	before := map[string]bool{}
	for _, s := range samples {
		if s.Time.Before(r.start) && s.OK+s.Errors > 0 && (r.services == nil || r.services[s.Service]) && e.reported[s.Caller].Before(r.start) {
			before[s.Caller] = true
		}
	}
	return sortedKeys(before)
}

// endLocked removes the fault, which has ended at that time; the report follows when traffic has settled.
func (e *Engine) endLocked(r *run, at time.Time, verdict, reason string) {
	r.heal = at
	r.drill.State = "healing"
	r.drill.Verdict, r.drill.Reason = verdict, reason
	if m := r.drill.Spec.Mode; inControlPlane(m) && m != Rotate {
		e.cfg.ControlPlane.Heal()
	}
	if r.rotating != nil {
		r.rotating()
	}
	e.cfg.Log.Info("drill healed", "drill", r.drill.ID, "why", verdict, "reason", reason)
	e.kick()
}

// finish gives the verdict. A drill passes if it ran to its end, or was stopped, without its guard having tripped.
func (r *run) finish() {
	r.over = true
	r.drill.State = r.drill.Verdict // done, aborted or stopped
	r.drill.Verdict = "PASSED"
	if r.drill.State == "aborted" {
		r.drill.Verdict = "FAILED"
	}
	ended := r.heal
	r.drill.Ended = &ended
}

// oldLocked forgets the oldest ended drills above kept and returns their IDs.
func (e *Engine) oldLocked() []string {
	if len(e.drills) <= kept {
		return nil
	}
	ids := sortedKeys(e.drills)
	slices.SortFunc(ids, func(a, b string) int { return e.drills[a].drill.Started.Compare(e.drills[b].drill.Started) })
	var drop []string
	for _, id := range ids {
		if len(e.drills) <= kept {
			break
		}
		if e.drills[id].over {
			delete(e.drills, id)
			drop = append(drop, id)
		}
	}
	return drop
}

func newID() string {
	var b [3]byte
	rand.Read(b[:])
	return "d-" + hex.EncodeToString(b[:])
}
