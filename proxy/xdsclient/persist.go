package xdsclient

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/encoding/protodelim"
	"google.golang.org/protobuf/proto"
)

// What is kept: magic, checksum (CRC-32C, 4 bytes big endian), then length-delimited DeltaDiscoveryResponses, one for each type,
// Listeners first. The nonce of each is the owner, so that another proxy's state is not taken for this one's.
const (
	stateFile  = "xds.state"
	stateMagic = "hanse-xds-1\n"
	maxState   = 256 << 20
)

// snapshot is the state to be kept, or nil where nothing has changed since the last.
func (s *store) snapshot(owner string) []proto.Message {
	if s.saved {
		return nil
	}
	s.saved = true
	var out []proto.Message
	for _, k := range s.kinds[:trust] {
		r := &discoveryv3.DeltaDiscoveryResponse{TypeUrl: k.url, Nonce: owner}
		for _, n := range slices.Sorted(maps.Keys(k.held)) {
			r.Resources = append(r.Resources, &discoveryv3.Resource{Name: n, Version: k.held[n].version, Resource: k.held[n].any})
		}
		out = append(out, r)
	}
	return out
}

// save replaces the state file: 0600, whole or not at all. It returns the size.
func save(dir string, messages []proto.Message) (size int, err error) {
	var body bytes.Buffer
	for _, m := range messages {
		if _, err := protodelim.MarshalTo(&body, m); err != nil {
			return 0, fmt.Errorf("encode xDS state: %w", err)
		}
	}
	sum := crc32.Checksum(body.Bytes(), crc32.MakeTable(crc32.Castagnoli))
	f, err := os.CreateTemp(dir, stateFile+".*") // 0600
	if err != nil {
		return 0, fmt.Errorf("save xDS state: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close(), os.Remove(f.Name()))
		}
	}()
	head := append([]byte(stateMagic), byte(sum>>24), byte(sum>>16), byte(sum>>8), byte(sum))
	for _, b := range [][]byte{head, body.Bytes()} {
		if _, err := f.Write(b); err != nil {
			return 0, fmt.Errorf("save xDS state: %w", err)
		}
	}
	if err := f.Sync(); err != nil {
		return 0, fmt.Errorf("save xDS state: %w", err)
	}
	if err := f.Close(); err != nil {
		return 0, fmt.Errorf("save xDS state: %w", err)
	}
	if err := os.Rename(f.Name(), filepath.Join(dir, stateFile)); err != nil {
		return 0, fmt.Errorf("save xDS state: %w", err)
	}
	return body.Len(), nil
}

// load reads the state file of owner. There being none is no error.
func load(dir, owner string) ([]*discoveryv3.DeltaDiscoveryResponse, error) {
	f, err := os.Open(filepath.Join(dir, stateFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("load xDS state: %w", err)
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxState+1))
	if err != nil {
		return nil, fmt.Errorf("load xDS state: %w", err)
	}
	out, err := parseState(raw, owner)
	if err != nil {
		return nil, fmt.Errorf("load xDS state %s: %w", f.Name(), err)
	}
	return out, nil
}

func parseState(raw []byte, owner string) ([]*discoveryv3.DeltaDiscoveryResponse, error) {
	body, ok := bytes.CutPrefix(raw, []byte(stateMagic))
	switch {
	case len(raw) > maxState:
		return nil, fmt.Errorf("more than %d bytes", maxState)
	case !ok || len(body) < 4:
		return nil, errors.New("not a state file of this version")
	}
	want := uint32(body[0])<<24 | uint32(body[1])<<16 | uint32(body[2])<<8 | uint32(body[3])
	body = body[4:]
	if crc32.Checksum(body, crc32.MakeTable(crc32.Castagnoli)) != want {
		return nil, errors.New("checksum does not match")
	}
	var out []*discoveryv3.DeltaDiscoveryResponse
	r := bytes.NewReader(body)
	for r.Len() > 0 {
		m := &discoveryv3.DeltaDiscoveryResponse{}
		if err := (protodelim.UnmarshalOptions{MaxSize: maxState}).UnmarshalFrom(r, m); err != nil {
			return nil, err
		}
		if m.Nonce != owner {
			return nil, fmt.Errorf("belongs to %q", shorten(m.Nonce))
		}
		out = append(out, m)
	}
	return out, nil
}

// restore takes kept resources as if they had been received; who asked for them then is taken to ask for them now.
func (s *store) restore(kept []*discoveryv3.DeltaDiscoveryResponse, now time.Time) error {
	var errs []error
	for _, r := range kept {
		k := s.byURL[r.TypeUrl]
		if k == nil {
			continue
		}
		for _, res := range r.Resources {
			if k.url == listenerType && !slices.Contains(s.inbound, res.Name) && !s.gateway && len(s.names) < maxNames {
				s.want(res.Name)
			}
			if k.url == serviceType && !s.gateway && len(s.hosts) < maxNames {
				s.wantHost(res.Name)
			}
		}
		s.subscribe()
		for _, res := range r.Resources {
			if _, ok := k.wanted[res.Name]; !ok && !k.all() {
				continue
			}
			if err := s.take(k, res.Name, res.Version, res.Resource, now); err != nil {
				errs = append(errs, fmt.Errorf("kept %s %q: %w", shortType(k.url), shorten(res.Name), err))
			}
		}
		s.promote()
	}
	s.saved = true
	return errors.Join(errs...)
}
