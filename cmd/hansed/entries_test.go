package main

import (
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hanse-mesh/hanse/identity/onspire"
)

// An entry outlives its workload by the linger, and no longer.
func TestEntriesLinger(t *testing.T) {
	e := onspire.Entry{ID: spiffeid.RequireFromString("spiffe://west.demo/ns/shop/sa/pay"), Parent: spiffeid.RequireFromString("spiffe://west.demo/node"), Selectors: []string{"unix:uid:1"}}
	now := time.Unix(1e9, 0)
	l := newLingering(time.Minute)
	for _, step := range []struct {
		after time.Duration
		want  []onspire.Entry
		have  int
		next  time.Duration
	}{
		{0, []onspire.Entry{e}, 1, 0},
		{10 * time.Second, []onspire.Entry{e}, 1, 0},
		{20 * time.Second, nil, 1, 40 * time.Second},
		{39 * time.Second, []onspire.Entry{e}, 1, 0}, // it was only restarted
		{59 * time.Second, nil, 1, time.Second},
		{time.Second, nil, 0, 0},
	} {
		now = now.Add(step.after)
		got, next := l.entries(step.want, now)
		if len(got) != step.have || next != step.next {
			t.Errorf("at %s: %d entries, next in %s; want %d, %s", now, len(got), next, step.have, step.next)
		}
	}
	if got, _ := newLingering(0).entries(nil, now); len(got) != 0 {
		t.Errorf("%d entries of nothing", len(got))
	}
}
