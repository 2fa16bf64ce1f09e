package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/hanse-mesh/hanse/cmd/internal/admin"
	"github.com/hanse-mesh/hanse/discovery/objects"
	"github.com/hanse-mesh/hanse/federation"
	"github.com/hanse-mesh/hanse/federation/etcd"
	"github.com/hanse-mesh/hanse/federation/peering"
	"github.com/hanse-mesh/hanse/identity/atomicfile"
	"github.com/hanse-mesh/hanse/identity/onspire"
)

// replica is what a hansed tells the others of its cluster, by its candidate's key.
type replica struct {
	Name      string    `json:"name"`
	ID        string    `json:"id"` // of its data directory
	Addresses []string  `json:"addresses"`
	Version   string    `json:"version"`
	Started   time.Time `json:"started"`
	Leading   time.Time `json:"leading,omitzero"` // since when
}

// replicas is this hansed among those of its cluster: who is there, who leads, and what this one may write. Without an external etcd it
// is alone, and leads.
type replicas struct {
	// read-only
	self     replica
	plain    etcd.Store
	election *etcd.Election // nil: alone
	log      *slog.Logger
	ready    func(context.Context) error // called before this one leads

	office atomic.Pointer[office]
	seen   atomic.Pointer[[]replica] // the leader first
	wake   chan struct{}             // size 1; seen has changed
}

// office is what this replica does at a time.
type office struct {
	leads   bool
	ctx     context.Context // of a leadership
	store   etcd.Store      // for the writes of a leader
	changed chan struct{}
}

func newReplicas(cfg *Config, s *stores, id, version string, log *slog.Logger, reg prometheus.Registerer) (*replicas, error) {
	r := &replicas{plain: s.own, log: log, wake: make(chan struct{}, 1),
		self: replica{Name: cfg.Replica, ID: id, Addresses: cfg.Federation.Advertise, Version: version, Started: time.Now().UTC().Truncate(time.Second)}}
	r.seen.Store(&[]replica{})
	if s.external == nil {
		r.office.Store(&office{leads: true, ctx: context.Background(), store: s.own})
	} else {
		r.office.Store(&office{changed: make(chan struct{})})
		r.election = etcd.NewElection(etcd.ElectionConfig{Client: s.external.Client(), Store: s.own, ID: cfg.Replica, TTL: cfg.Timers.Leader.Duration,
			Value: r.value, Seen: r.see, Log: log})
	}
	return r, reg.Register(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "hanse_leader", Help: "1 while this replica leads its cluster's control plane."},
		func() float64 { return float64(b2i(r.leads())) }))
}

// alone reports whether there can be no other replica.
func (r *replicas) alone() bool { return r.election == nil }

// unique waits until no other replica that is there has this one's name, for as long as the lease of one that has just died lasts.
func (r *replicas) unique(ctx context.Context, lease time.Duration) error {
	end := time.Now().Add(lease + 2*time.Second)
	for {
		all, _, err := etcd.NewKV(r.plain, "leader/").List(ctx, "")
		if err != nil {
			return fmt.Errorf("read who is there: %w", err)
		}
		var other *replica
		for _, kv := range all {
			var x replica
			if json.Unmarshal(kv.Value, &x) == nil && x.Name == r.self.Name && x.ID != r.self.ID {
				other = &x
			}
		}
		switch {
		case other == nil:
			return nil
		case time.Now().After(end):
			return fmt.Errorf("replica %q: another hansed of this cluster, at %s, has that name: give this one another by replica: in its configuration, or by --replica",
				r.self.Name, strings.Join(other.Addresses, ", "))
		}
		pause(ctx, 500*time.Millisecond)
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
}

// key is the segment of keys in etcd under which this replica keeps what is its own; "" where it is alone.
func (r *replicas) key() string {
	if r.alone() {
		return ""
	}
	return r.self.ID
}

// leads reports whether this replica leads, as far as it knows. What it writes says for certain.
func (r *replicas) leads() bool { return r.office.Load().leads }

// term is the present leadership, for writes to what knows no fence: their contexts end with it, and with this candidate's lease by the monotonic
// clock, so that a replica that was paused sees at once that its time is over, before etcd says so.
func (r *replicas) term() (onspire.Term, bool) {
	p := r.office.Load()
	if !p.leads {
		return nil, false
	}
	return func(ctx context.Context) (context.Context, context.CancelFunc, error) {
		if r.alone() {
			return ctx, func() {}, nil
		}
		until := r.election.Until()
		if p.ctx.Err() != nil || !time.Now().Before(until) {
			return nil, nil, fmt.Errorf("replica %s: %w", r.self.Name, etcd.ErrNotLeader)
		}
		ctx, cancel := context.WithDeadline(ctx, until)
		stop := context.AfterFunc(p.ctx, cancel)
		return ctx, func() { stop(); cancel() }, nil
	}, true
}

// during is a context that ends with ctx and with the present leadership; leads is false, and the context has ended, if there is none.
func (r *replicas) during(ctx context.Context) (term context.Context, end context.CancelFunc, leads bool) {
	p := r.office.Load()
	if !p.leads {
		term, end = context.WithCancel(ctx)
		end()
		return term, end, false
	}
	term, cancel := context.WithCancel(p.ctx) // its child, so that no time lies between the ends of the two
	stop := context.AfterFunc(ctx, cancel)
	return term, func() { stop(); cancel() }, true
}

// lookForOffice is how often a replica that does not lead sees whether it leads now.
const lookForOffice = time.Second

// whileLeading runs what writes to the API server while this replica leads; write's context ends with the leadership.
func (r *replicas) whileLeading(ctx context.Context, write func(context.Context) error) error {
	for ctx.Err() == nil {
		if term, end, leads := r.during(ctx); leads {
			err := write(term)
			end()
			if err != nil {
				return err
			}
		}
		pause(ctx, lookForOffice)
	}
	return nil
}

// Run stands for election until ctx ends.
func (r *replicas) Run(ctx context.Context) error {
	if r.alone() {
		<-ctx.Done()
		return nil
	}
	return r.election.Run(ctx, func(ctx context.Context, store etcd.Store) error {
		if err := r.ready(ctx); err != nil {
			if ctx.Err() == nil {
				r.log.Warn("does not lead: it cannot read what the leader before it wrote", "err", err)
				return fmt.Errorf("%w: %w", etcd.ErrNotLeader, err)
			}
			return nil
		}
		r.play(&office{leads: true, ctx: ctx, store: store})
		<-ctx.Done()
		r.play(&office{})
		return nil
	})
}

// play changes the office.
func (r *replicas) play(next *office) {
	next.changed = make(chan struct{})
	close(r.office.Swap(next).changed)
}

// meshRole is the office as peering wants it; nil where this replica is alone.
func (r *replicas) meshRole() func() peering.Role {
	if r.alone() {
		return nil
	}
	return func() peering.Role {
		p := r.office.Load()
		return peering.Role{Leads: p.leads, Store: p.store, Changed: p.changed}
	}
}

// value is what the candidate's key says.
func (r *replicas) value(leads bool) []byte {
	v := r.self
	if leads {
		v.Leading = time.Now().UTC().Truncate(time.Second)
	}
	b, err := json.Marshal(v)
	if err != nil {
		panic(err) // strings and times
	}
	return b
}

// see takes in who is there.
func (r *replicas) see(list []etcd.Candidate) {
	next := make([]replica, 0, len(list))
	for _, c := range list {
		var x replica
		if err := json.Unmarshal(c.Value, &x); err != nil {
			x = replica{Name: "unreadable: " + c.Key}
		}
		next = append(next, x)
	}
	r.seen.Store(&next)
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// leader is the one that leads now, as far as this one knows; ok is false if there is none.
func (r *replicas) leader() (leader replica, ok bool) {
	if seen := *r.seen.Load(); len(seen) > 0 {
		return seen[0], true
	}
	return replica{}, false
}

// others are the other replicas that are there.
func (r *replicas) others() []replica {
	return slices.DeleteFunc(slices.Clone(*r.seen.Load()), func(x replica) bool { return x.ID == r.self.ID })
}

// here are the IDs of the replicas that are there, this one among them.
func (r *replicas) here() map[string]bool {
	out := map[string]bool{r.self.ID: true}
	for _, x := range *r.seen.Load() {
		out[x.ID] = true
	}
	return out
}

// rows is what people see. It is empty where there can be no other.
func (r *replicas) rows(now time.Time, signs map[string]bool) []admin.Replica {
	var out []admin.Replica
	for i, x := range *r.seen.Load() {
		row := admin.Replica{Name: x.Name, ID: x.ID, Leads: i == 0, Self: x.ID == r.self.ID, Addresses: x.Addresses, Version: x.Version, Age: age(now, x.Started), Signs: signs[x.ID]}
		if i == 0 {
			row.LeadingSince = x.Leading
		}
		out = append(out, row)
	}
	return out
}

// check is the line of status on them.
func (r *replicas) check(now time.Time) admin.Check {
	c := admin.Check{Name: "replicas"}
	l, ok := r.leader()
	switch {
	case r.leads():
		c.OK, c.Detail = true, fmt.Sprintf("%d, %s leads since %s", len(*r.seen.Load()), r.self.Name, now.Sub(l.Leading).Round(time.Second))
	case !ok || l.Leading.IsZero():
		c.Detail, c.Remedy = "nobody leads: exports, mirrors and configuration stand still; calls go on", "wait some seconds; if it lasts: does etcd answer? hansed's log says"
	default:
		c.Detail, c.Remedy = fmt.Sprintf("this is %s, and %s at %s leads, but does not answer; this replica does not know how fresh the members are", r.self.Name, l.Name, strings.Join(l.Addresses, ", ")),
			"can the replicas reach each other's federation addresses?"
	}
	return c
}

// refuse is the answer to what only the leader does, by one that does not lead.
func (r *replicas) refuse() error {
	l, ok := r.leader()
	if !ok {
		return &admin.Error{Status: 503, Message: "no replica leads this cluster's control plane just now", Hint: "wait some seconds; if it lasts: does etcd answer?"}
	}
	if l.ID == r.self.ID && !l.Leading.IsZero() {
		return &admin.Error{Status: 503, Message: fmt.Sprintf("this replica, %s, led this cluster's control plane, and does not any more: etcd has not answered in time", l.Name),
			Hint: "does etcd answer? hansed's log says; then wait some seconds"}
	}
	if l.ID == r.self.ID {
		return &admin.Error{Status: 503, Message: fmt.Sprintf("this replica, %s, has been elected, and does not lead yet: it reads what the leader before it wrote", l.Name),
			Hint: "wait some seconds; if it lasts: does etcd answer? hansed's log says"}
	}
	return &admin.Error{Status: 503, Message: fmt.Sprintf("this is done by the replica that leads: %s at %s", l.Name, strings.Join(l.Addresses, ", ")), Hint: "ask there, or try again"}
}

// leaderStore is the own store, of which the leader alone can write.
type leaderStore struct {
	etcd.Store
	r *replicas
}

// Txn implements etcd.Store.
func (s leaderStore) Txn(ctx context.Context, compares []etcd.Compare, ops []etcd.Op) (bool, etcd.Header, error) {
	p := s.r.office.Load()
	if !p.leads {
		return false, etcd.Header{}, fmt.Errorf("replica %s: %w", s.r.self.Name, etcd.ErrNotLeader)
	}
	return p.store.Txn(ctx, compares, ops)
}

// replicaID is the random ID of a data directory, which outlives names and addresses.
func replicaID(dir string) (string, error) {
	path := filepath.Join(dir, "replica-id")
	b, err := atomicfile.Read(path, 1<<10)
	if errors.Is(err, fs.ErrNotExist) {
		id := objects.RandomID()
		return id, atomicfile.Write(path, []byte(id+"\n"))
	}
	if err != nil {
		return "", err
	}
	id := strings.TrimSpace(string(b))
	if !federation.IsMemberID(id) {
		return "", fmt.Errorf("%s is damaged: want 32 hex digits; remove it, and this replica is a new one", path)
	}
	return id, nil
}
