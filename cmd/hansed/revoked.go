package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"time"

	"github.com/hanse-mesh/hanse/federation/etcd"
	"github.com/hanse-mesh/hanse/identity/atomicfile"
)

// A revocation is for ever: until the root has expired it is not undone. So each replica keeps those that it has seen on its own disk, too, and
// writes them again into an etcd that does not have them, as one that was restored from a backup: a revoked root does not come back.

// nearEnd is how long before a root's end nobody brings its revocation back any more: whose clock is ahead has deleted it.
const nearEnd = 15 * time.Minute

// loadKept reads what the disk has.
func (r *roots) loadKept() error {
	b, err := atomicfile.Read(r.disk, 1<<24)
	kept := map[string]revocation{}
	if err == nil {
		err = json.Unmarshal(b, &kept)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s: %w (remove it if etcd was not restored from a backup: etcd has what it had)", r.disk, err)
	}
	r.mu.Lock()
	r.kept = kept
	r.mu.Unlock()
	return nil
}

// add adds to revoked, which is what etcd has, what the disk has and etcd has not any more. The caller holds mu.
func (r *roots) add(revoked map[string]revocation) {
	r.lost = nil
	for authority, old := range r.kept {
		now, ok := revoked[authority]
		if ok && (now.Revoked || !old.Revoked) || !r.now().Before(old.Ends.Add(-nearEnd)) {
			continue
		}
		old.rev = now.rev
		revoked[authority] = old
		r.lost = append(r.lost, old)
	}
}

// keep stores what add has made. It is called without mu, for which whoever signs waits; kept changes here only.
func (r *roots) keep(revoked map[string]revocation) error {
	next := maps.Clone(revoked)
	maps.DeleteFunc(next, func(_ string, v revocation) bool { return v.Ends.IsZero() }) // damaged
	same := func(a, b revocation) bool {
		return a.Authority == b.Authority && a.Revoked == b.Revoked && a.Force == b.Force
	}
	r.mu.Lock()
	kept := r.kept
	r.mu.Unlock()
	if maps.EqualFunc(next, kept, same) {
		return nil
	}
	b, err := json.Marshal(next)
	if err == nil {
		err = atomicfile.Write(r.disk, b)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", r.disk, err)
	}
	r.mu.Lock()
	r.kept = next
	r.mu.Unlock()
	return nil
}

// restore writes what etcd does not have any more.
func (r *roots) restore(ctx context.Context, lost []revocation) error {
	kv := etcd.NewKV(r.store, revokedPath)
	for _, v := range lost {
		value, err := json.Marshal(v)
		if err != nil {
			return err
		}
		ok, _, err := kv.CompareAndPut(ctx, v.Authority, value, v.rev)
		if err != nil {
			return fmt.Errorf("revoke %s again: %w", v.Authority, err)
		}
		if ok {
			r.log.Warn("etcd did not have a revocation any more; it stays in force", "authority", v.Authority, "replica", v.Replica)
		}
	}
	return nil
}
