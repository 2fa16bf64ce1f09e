package etcd

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// ElectionConfig says among whom a leader is elected.
type ElectionConfig struct {
	Client *clientv3.Client // nil: this replica is alone (an embedded etcd), and leads at once
	Store  Store            // what the leader writes to, in the same etcd
	Prefix string           // of the candidates' keys, "" is "leader/". As the Client sees it, so with the prefix of ExternalConfig
	Strip  string           // the prefix of ExternalConfig, of which the Store's keys are free
	ID     string           // of this replica, for the log
	// Value is what the other replicas are told of this one, asked for when it stands and again when it leads. nil: the ID.
	Value func(leads bool) []byte
	TTL   time.Duration // of the candidate's lease, in whole seconds: 5 s
	// Seen is told who is there, the leader first, after each change; by one goroutine. The slice is the callee's. May be nil.
	Seen func([]Candidate)
	Log  *slog.Logger
}

// Candidate is a replica that is there: the first one leads, the others wait.
type Candidate struct {
	Key     string
	Value   []byte
	Created int64 // revision at which it stood
}

// Election makes one of several replicas the leader: the candidate that has stood for longest. A candidate's key has a lease, and
// nothing else has one.
type Election struct {
	cfg   ElectionConfig
	until atomic.Pointer[time.Time] // of the present candidacy's lease; nil without one
}

// NewElection returns an Election.
func NewElection(cfg ElectionConfig) *Election {
	if cfg.Prefix == "" {
		cfg.Prefix = cfg.Strip + "leader/"
	}
	if cfg.TTL == 0 {
		cfg.TTL = 5 * time.Second
	}
	if cfg.Value == nil {
		cfg.Value = func(bool) []byte { return []byte(cfg.ID) }
	}
	if cfg.Seen == nil {
		cfg.Seen = func([]Candidate) {}
	}
	cfg.Log = orDiscard(cfg.Log)
	return &Election{cfg: cfg}
}

// Until is until when etcd keeps this candidate at least, by this machine's monotonic clock: a leader that writes to what knows no fence must
// have done so by then. It is counted from before the lease was asked for. Zero without a lease.
func (e *Election) Until() time.Time {
	if t := e.until.Load(); t != nil {
		return *t
	}
	return time.Time{}
}

// Run stands for election, and calls lead each time that this replica is elected, with a Store of which each Txn holds only while it leads.
// lead's context ends with the leadership; an ErrNotLeader from it means the same. Run returns when ctx ends (nil) or with another error of
// lead. A leader that ends resigns: the next one leads at once. One that dies is followed when its lease has run out.
func (e *Election) Run(ctx context.Context, lead func(ctx context.Context, store Store) error) error {
	if e.cfg.Client == nil {
		return lead(ctx, e.cfg.Store)
	}
	wait := 100 * time.Millisecond
	for {
		led, err := e.term(ctx, lead)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, errCampaign), errors.Is(err, ErrNotLeader):
			e.cfg.Log.Warn("not leading", "error", err)
		default:
			return err
		}
		if led {
			wait = 100 * time.Millisecond
		}
		if !sleep(ctx, wait) {
			return nil
		}
		wait = min(2*wait, 2*time.Second)
	}
}

var (
	errCampaign = errors.New("stand for leadership")
	errLease    = errors.New("the lease has ended")
)

// term is one candidacy and, if it is won, one leadership.
func (e *Election) term(ctx context.Context, lead func(context.Context, Store) error) (led bool, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	var work sync.WaitGroup
	defer e.until.Store(nil)
	defer work.Wait()
	defer cancel(nil)
	lease, err := e.lease(ctx, &work, cancel)
	if err != nil {
		return false, fmt.Errorf("%w: %w", errCampaign, err)
	}
	defer e.resign(lease)
	key, created, err := e.stand(ctx, lease)
	if err != nil {
		return false, fmt.Errorf("%w: %w", errCampaign, err)
	}
	won := make(chan struct{})
	work.Go(func() { e.follow(ctx, key, won, cancel) })
	select {
	case <-won:
	case <-ctx.Done():
		return false, fmt.Errorf("%w: %w", errCampaign, context.Cause(ctx))
	}
	if err := e.put(ctx, key, created, lease, e.cfg.Value(true)); err != nil {
		return false, fmt.Errorf("%w: %w", errCampaign, err)
	}
	e.cfg.Log.Info("leading", "replica", e.cfg.ID)
	err = lead(ctx, &fenced{Store: e.cfg.Store, fence: Compare{Key: key[len(e.cfg.Strip):], Created: true, Revision: created}})
	if err == nil && ctx.Err() != nil {
		return true, fmt.Errorf("%w: %w", ErrNotLeader, context.Cause(ctx))
	}
	return true, err
}

// lease takes a lease and keeps it until ctx ends. When it cannot be kept, it cancels.
func (e *Election) lease(ctx context.Context, work *sync.WaitGroup, cancel context.CancelCauseFunc) (clientv3.LeaseID, error) {
	call, done := context.WithTimeout(ctx, requestTimeout)
	defer done()
	asked := time.Now()
	r, err := e.cfg.Client.Grant(call, int64(max(1, e.cfg.TTL/time.Second)))
	if err != nil {
		return 0, fmt.Errorf("take a lease: %w", err)
	}
	life := time.Duration(r.TTL) * time.Second
	until := asked.Add(life)
	e.until.Store(&until)
	work.Go(func() { e.keep(ctx, r.ID, life, until, cancel) })
	return r.ID, nil
}

// keep renews a lease each third of its time. It cancels when it has run out, by etcd's word or by this machine's clock.
func (e *Election) keep(ctx context.Context, lease clientv3.LeaseID, life time.Duration, until time.Time, cancel context.CancelCauseFunc) {
	for sleep(ctx, max(time.Until(until)-life*2/3, 0)) {
		call, done := context.WithDeadline(ctx, until)
		asked := time.Now()
		_, err := e.cfg.Client.KeepAliveOnce(call, lease)
		done()
		switch {
		case err == nil:
			next := asked.Add(life)
			until = next
			e.until.Store(&next)
		case errors.Is(err, rpctypes.ErrLeaseNotFound), !time.Now().Before(until):
			cancel(errLease)
			return
		default:
			sleep(ctx, 200*time.Millisecond)
		}
	}
}

// stand makes this replica a candidate.
func (e *Election) stand(ctx context.Context, lease clientv3.LeaseID) (key string, created int64, err error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	key = fmt.Sprintf("%s%016x", e.cfg.Prefix, uint64(lease))
	r, err := e.cfg.Client.Put(ctx, key, string(e.cfg.Value(false)), clientv3.WithLease(lease))
	if err != nil {
		return "", 0, fmt.Errorf("write %s: %w", key, err)
	}
	return key, r.Header.Revision, nil
}

// put changes what the others are told.
func (e *Election) put(ctx context.Context, key string, created int64, lease clientv3.LeaseID, value []byte) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	r, err := e.cfg.Client.Txn(ctx).If(clientv3.Compare(clientv3.CreateRevision(key), "=", created)).
		Then(clientv3.OpPut(key, string(value), clientv3.WithLease(lease))).Commit()
	if err != nil {
		return fmt.Errorf("write %s: %w", key, err)
	}
	if !r.Succeeded {
		return fmt.Errorf("write %s: %w", key, errLease)
	}
	return nil
}

// resign gives the lease back, so that another leads at once. Where etcd does not answer, the lease runs out by itself.
func (e *Election) resign(lease clientv3.LeaseID) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	if _, err := e.cfg.Client.Revoke(ctx, lease); err != nil {
		e.cfg.Log.Debug("lease is not given back; it runs out", "error", err)
	}
}

// follow tells who is there until ctx ends. It closes won when this candidate is the oldest, and cancels when it is none any more.
func (e *Election) follow(ctx context.Context, key string, won chan struct{}, cancel context.CancelCauseFunc) {
	candidates := NewKV(e.cfg.Store, e.cfg.Prefix[len(e.cfg.Strip):])
	leads := false
	for ctx.Err() == nil {
		err := candidates.Watch(ctx, "", func(all []KeyValue, _ int64) error {
			list := make([]Candidate, 0, len(all))
			for _, kv := range all {
				list = append(list, Candidate{Key: kv.Key, Value: kv.Value, Created: kv.CreateRevision})
			}
			slices.SortFunc(list, func(a, b Candidate) int { return cmp.Compare(a.Created, b.Created) })
			e.cfg.Seen(list)
			mine := slices.IndexFunc(list, func(c Candidate) bool { return e.cfg.Prefix+c.Key == key })
			switch {
			case mine < 0:
				cancel(errLease)
			case mine == 0 && !leads:
				leads = true
				close(won)
			}
			return nil
		})
		if ctx.Err() == nil {
			Again(ctx, e.cfg.Log, "who leads is read again", err)
			sleep(ctx, 200*time.Millisecond)
		}
	}
}

// fenced lets Txns through only while the candidate's key is the one that this replica created.
type fenced struct {
	Store
	fence Compare
}

func (f *fenced) Txn(ctx context.Context, compares []Compare, ops []Op) (bool, Header, error) {
	all := append([]Compare{f.fence}, compares...)
	ok, h, err := f.Store.Txn(ctx, all, ops)
	if err != nil || ok {
		return ok, h, err
	}
	kv, _, err := f.Store.Get(ctx, f.fence.Key, 0) // which compare was it?
	if err != nil {
		return false, h, err
	}
	if kv == nil || kv.CreateRevision != f.fence.Revision {
		return false, h, fmt.Errorf("leader key %s: %w", f.fence.Key, ErrNotLeader)
	}
	return false, h, nil
}
