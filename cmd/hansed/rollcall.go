package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/identity/atomicfile"
)

// rollCall remembers over a start which bundles were acknowledged, and which proxies were connected: nothing more is acknowledged before they
// are back, or are waited for no more. Agents are in etcd.
type rollCall struct {
	path string
	log  *slog.Logger
	kept roster // owned by acknowledge, after open

	failing identity.Seldom

	mu   sync.Mutex
	said map[string]uint64 // guarded by mu; not changed in place; by trust domain
}

// roster is what the data directory has of them.
type roster struct {
	Acked   map[string]uint64 `json:"acked"` // sequence by trust domain
	Proxies []string          `json:"proxies"`
}

const maxRoster = 64 << 20 // bytes

func newRollCall(dir string, log *slog.Logger) *rollCall {
	return &rollCall{path: filepath.Join(dir, "proxies.json"), log: log}
}

// open reads what was, and returns the proxies that were connected. Without it nobody is waited for, and nothing counts as acknowledged.
func (r *rollCall) open() []string {
	b, err := atomicfile.Read(r.path, maxRoster)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var was roster
	if err == nil {
		d := json.NewDecoder(bytes.NewReader(b))
		d.DisallowUnknownFields()
		if err = d.Decode(&was); err != nil {
			err = fmt.Errorf("%s is damaged: %w", r.path, err)
		}
	}
	if err != nil {
		r.log.Error("which proxies were connected is not known; bundles may be acknowledged before they are back", "err", err)
		return nil
	}
	r.mu.Lock()
	r.said = was.Acked
	r.mu.Unlock()
	r.kept = was
	return was.Proxies
}

// before is what was acknowledged last.
func (r *rollCall) before() map[string]uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.said
}

// say notes what is acknowledged now; acked is not changed later.
func (r *rollCall) say(acked map[string]uint64) map[string]uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.said = acked
	return acked
}

// keep writes what a next start should know.
func (r *rollCall) keep(proxies []string) {
	next := roster{Acked: r.before(), Proxies: proxies}
	if maps.Equal(next.Acked, r.kept.Acked) && slices.Equal(next.Proxies, r.kept.Proxies) {
		return
	}
	b, err := json.Marshal(next)
	if err == nil {
		err = atomicfile.Write(r.path, b)
	}
	if err != nil {
		if r.failing.Due(time.Now()) {
			r.log.Error("which proxies are connected is not kept; tried again", "err", err)
		}
		return
	}
	r.kept = next
}
