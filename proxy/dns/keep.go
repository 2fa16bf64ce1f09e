package dns

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"time"

	"github.com/hanse-mesh/hanse/identity/atomicfile"
)

const (
	maxPoolFile = 16 << 20
	keepEvery   = time.Second // at most
)

// lostAtMost is how many addresses a sidecar that was killed may have handed out and not kept.
const lostAtMost = 4096

// load reads a kept Pool. There being none is no error. An application may hold addresses that were not kept: those that are handed out
// from now on are others.
func (p *Pool) load(path string) error {
	err := p.read(path)
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.keys)+len(p.reals) > 0 {
		p.next += lostAtMost
	} else {
		p.next = 1 + rand.Uint32N(min(p.last, 1<<24))
	}
	if p.next > p.last {
		p.next = 1 + (p.next-1)%p.last
	}
	return err
}

func (p *Pool) read(path string) error {
	b, err := atomicfile.Read(path, maxPoolFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	f, err := decodePool(b)
	if err == nil {
		err = p.restore(f)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

func decodePool(b []byte) (*poolFile, error) {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	f := &poolFile{}
	if err := d.Decode(f); err != nil {
		return nil, err
	}
	return f, nil
}

// keep writes the Pool when it has changed, until ctx ends, and once more then.
func (s *Server) keep(ctx context.Context) {
	failed := false
	save := func() {
		f := s.cfg.Pool.snapshot()
		if f == nil {
			return
		}
		b, err := json.Marshal(f)
		if err == nil {
			err = atomicfile.Write(s.cfg.StateFile, b)
		}
		if err != nil && !failed {
			s.log.Warn("the addresses that DNS has handed out are not kept: after a restart they mean nothing", "error", err)
		}
		failed = err != nil
	}
	defer save()
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.cfg.Pool.dirty:
		}
		save()
		select {
		case <-ctx.Done():
			return
		case <-time.After(keepEvery):
		}
	}
}
