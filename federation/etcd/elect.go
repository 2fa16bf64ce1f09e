package etcd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
)

// ElectionConfig says among whom a leader is elected.
type ElectionConfig struct {
	Client *clientv3.Client // nil: this replica is alone (an embedded etcd), and leads at once
	Store  Store            // what the leader writes to, in the same etcd
	Prefix string           // of the leader keys, "" is "leader/". As the Client sees it, so with the prefix of ExternalConfig
	Strip  string           // the prefix of ExternalConfig, of which the Store's keys are free
	ID     string           // of this replica
	TTL    time.Duration    // of the leader key's lease: 10 s
	Log    *slog.Logger
}

// Election makes one of several replicas the leader. The lease is on the leader key only.
type Election struct{ cfg ElectionConfig }

// NewElection returns an Election.
func NewElection(cfg ElectionConfig) *Election {
	if cfg.Prefix == "" {
		cfg.Prefix = "leader/"
	}
	if cfg.TTL == 0 {
		cfg.TTL = 10 * time.Second
	}
	cfg.Log = orDiscard(cfg.Log)
	return &Election{cfg: cfg}
}

// Run campaigns, and calls lead each time that this replica is elected, with a Store of which each Txn holds only while it leads. lead's
// context ends with the leadership; an ErrNotLeader from it means the same. Run returns when ctx ends (nil) or with another error of lead.
func (e *Election) Run(ctx context.Context, lead func(ctx context.Context, store Store) error) error {
	if e.cfg.Client == nil {
		return lead(ctx, e.cfg.Store)
	}
	for {
		err := e.term(ctx, lead)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, errCampaign), errors.Is(err, ErrNotLeader):
			e.cfg.Log.Warn("not leading", "error", err)
		default:
			return err
		}
		if !sleep(ctx, time.Second) {
			return nil
		}
	}
}

var errCampaign = errors.New("campaign for leadership")

// term is one campaign and, if it is won, one leadership.
func (e *Election) term(ctx context.Context, lead func(context.Context, Store) error) error {
	s, err := concurrency.NewSession(e.cfg.Client, concurrency.WithTTL(max(1, int(e.cfg.TTL/time.Second))), concurrency.WithContext(ctx))
	if err != nil {
		return fmt.Errorf("%w: %w", errCampaign, err)
	}
	defer s.Close() // gives the lease back, so that another leads at once
	el := concurrency.NewElection(s, e.cfg.Prefix)
	if err := el.Campaign(ctx, e.cfg.ID); err != nil {
		return fmt.Errorf("%w: %w", errCampaign, err)
	}
	ctx, cancel := context.WithCancel(ctx)
	stopped := make(chan struct{})
	defer func() {
		cancel()
		<-stopped
	}()
	go func() {
		defer close(stopped)
		select {
		case <-s.Done():
			cancel()
		case <-ctx.Done():
		}
	}()
	e.cfg.Log.Info("leading", "replica", e.cfg.ID)
	key := el.Key()[len(e.cfg.Strip):]
	err = lead(ctx, &fenced{Store: e.cfg.Store, fence: Compare{Key: key, Created: true, Revision: el.Rev()}})
	if err == nil && ctx.Err() != nil {
		return ErrNotLeader
	}
	return err
}

// fenced lets Txns through only while the leader key is the one that this replica created.
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
