package main

import (
	"context"
	"encoding/json"
	"log/slog"
	"maps"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hanse-mesh/hanse/federation/etcd"
)

// replicasPath is where each replica keeps what is its own: <ID>/acks, <ID>/trusted/.
const replicasPath = "replicas/v1/"

// ackBook is which bundles the replicas and all that are connected to them have loaded. What the cluster says to others is the lowest.
type ackBook struct {
	td       spiffeid.TrustDomain
	kv       *etcd.KV
	replicas *replicas
	log      *slog.Logger

	mu  sync.Mutex
	own map[string]uint64            // guarded by mu; as published
	by  map[string]map[string]uint64 // guarded by mu; by replica's ID, then trust domain
}

func newAckBook(p *controlPlane) *ackBook {
	return &ackBook{td: p.td, kv: etcd.NewKV(p.stores.own, replicasPath), replicas: p.replicas, log: p.log.With("part", "acks"), by: map[string]map[string]uint64{}}
}

// Run takes in what other replicas say, until ctx ends.
func (b *ackBook) Run(ctx context.Context) error {
	for ctx.Err() == nil {
		err := b.kv.Watch(ctx, "", func(all []etcd.KeyValue, _ int64) error {
			by := map[string]map[string]uint64{}
			for _, kv := range all {
				id, ok := strings.CutSuffix(kv.Key, "/acks")
				if !ok {
					continue
				}
				acked := map[string]uint64{}
				if err := json.Unmarshal(kv.Value, &acked); err != nil {
					b.log.Error("acknowledgements of a replica are left out", "replica", id, "err", err)
				}
				by[id] = acked
			}
			b.mu.Lock()
			b.by = by
			b.mu.Unlock()
			return nil
		})
		if ctx.Err() == nil {
			etcd.Again(ctx, b.log, "acknowledgements of the replicas are read again", err)
			pause(ctx, time.Second)
		}
	}
	return nil
}

// publish says what is loaded here. next is not changed later.
func (b *ackBook) publish(ctx context.Context, next map[string]uint64) {
	b.mu.Lock()
	was := b.own
	b.mu.Unlock()
	if was != nil && maps.Equal(was, next) {
		return
	}
	value, err := json.Marshal(next)
	if err == nil {
		_, err = b.kv.Put(ctx, b.replicas.self.ID+"/acks", value)
	}
	if err != nil {
		if ctx.Err() == nil {
			b.log.Warn("acknowledgements are not published; tried again", "err", err)
		}
		return
	}
	b.mu.Lock()
	b.own = next
	b.mu.Unlock()
}

// lowest is what all replicas that are there have loaded.
func (b *ackBook) lowest() map[string]uint64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	low := maps.Clone(b.own)
	for _, x := range b.replicas.others() {
		for td, seq := range low {
			low[td] = min(seq, b.by[x.ID][td])
		}
	}
	return low
}

// missing names the other replicas that are there, and have not, or whose proxies and agents have not, loaded that own bundle.
func (b *ackBook) missing(sequence uint64) []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	var out []string
	for _, x := range b.replicas.others() {
		if b.by[x.ID][b.td.Name()] < sequence {
			out = append(out, "replica "+x.Name)
		}
	}
	return out
}
