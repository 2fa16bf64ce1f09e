package attest

import (
	"bytes"
	"context"
	"strings"
	"sync"
)

// Memory is a Store that lasts as long as the process. With CompareAndPut and Delete it is also the KV of identity/spireapi.
type Memory struct {
	mu sync.Mutex
	m  map[string][]byte // guarded by mu
}

// NewMemory returns an empty Memory.
func NewMemory() *Memory { return &Memory{m: map[string][]byte{}} }

// Get implements Store.
func (s *Memory) Get(_ context.Context, key string) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return bytes.Clone(s.m[key]), nil
}

// PutIfAbsent implements Store.
func (s *Memory) PutIfAbsent(_ context.Context, key string, value []byte) (bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.m[key]; ok {
		return false, nil
	}
	s.m[key] = bytes.Clone(value)
	return true, nil
}

// CompareAndDelete implements Store.
func (s *Memory) CompareAndDelete(_ context.Context, key string, value []byte) (bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if cur, ok := s.m[key]; !ok || !bytes.Equal(cur, value) {
		return false, nil
	}
	delete(s.m, key)
	return true, nil
}

// List implements Store.
func (s *Memory) List(_ context.Context, prefix string) (map[string][]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := map[string][]byte{}
	for k, v := range s.m {
		if strings.HasPrefix(k, prefix) {
			out[k] = bytes.Clone(v)
		}
	}
	return out, nil
}

// CompareAndPut stores value under key and returns true if its value still is old; nil: if there is none.
func (s *Memory) CompareAndPut(_ context.Context, key string, old, value []byte) (bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if cur, ok := s.m[key]; ok != (old != nil) || !bytes.Equal(cur, old) {
		return false, nil
	}
	s.m[key] = bytes.Clone(value)
	return true, nil
}

// Delete removes key.
func (s *Memory) Delete(_ context.Context, key string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.m, key)
	return nil
}
