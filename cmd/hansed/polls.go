package main

import (
	"context"
	"time"

	"github.com/hanse-mesh/hanse/federation/etcd"
)

// polledKey says when somebody last fetched this trust domain's bundle from the endpoint of any replica (RFC 3339): roots wait for those who
// poll, also at the other replicas and after a restart.
const polledKey = "trust/polled"

const (
	pollsShared = 5 * time.Second // how often it is looked at
	pollsEvery  = time.Minute     // how old the stored time may be
)

// followPolls shares it until ctx ends.
func (p *controlPlane) followPolls(ctx context.Context) error {
	kv := etcd.NewKV(p.stores.own, "")
	tick := time.NewTicker(pollsShared)
	defer tick.Stop()
	for {
		if err := p.sharePolls(ctx, kv); err != nil && ctx.Err() == nil {
			p.log.Debug("who polls the bundle endpoint is not shared; tried again", "err", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func (p *controlPlane) sharePolls(ctx context.Context, kv *etcd.KV) error {
	ctx, cancel := context.WithTimeout(ctx, pollsShared)
	defer cancel()
	value, _, err := kv.Get(ctx, polledKey)
	if err != nil {
		return err
	}
	stored, err := time.Parse(time.RFC3339Nano, string(value))
	if err == nil {
		p.bundles.NotePolled(stored)
	}
	if at := p.bundles.Polled(); at.Sub(stored) >= pollsEvery { // also where it does not parse
		_, err := kv.Put(ctx, polledKey, []byte(at.UTC().Format(time.RFC3339Nano)))
		return err
	}
	return nil
}
