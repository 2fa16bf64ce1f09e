package main

import (
	"bytes"
	"log/slog"
	"maps"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/hanse-mesh/hanse/discovery/xdsgen"
	"github.com/hanse-mesh/hanse/discovery/xdsserver"
	"github.com/hanse-mesh/hanse/federation/storetest"
	"github.com/hanse-mesh/hanse/identity"
)

// TestRollCall: what was acknowledged, and who was connected, is known after a start; a damaged file is said, and stops nothing.
func TestRollCall(t *testing.T) {
	var log bytes.Buffer
	open := func(dir string) (*rollCall, []string) {
		r := newRollCall(dir, slog.New(slog.NewTextHandler(&log, nil)))
		return r, r.open()
	}
	dir := t.TempDir()
	r, proxies := open(dir)
	if len(proxies) > 0 || len(r.before()) > 0 {
		t.Errorf("at the first start: %v, %v", proxies, r.before())
	}
	r.say(map[string]uint64{"east.test": 7})
	r.keep([]string{"a", "b"})
	written, err := os.Stat(r.path)
	if err != nil {
		t.Fatal(err)
	}
	r.keep([]string{"a", "b"})
	if again, err := os.Stat(r.path); err != nil || !os.SameFile(written, again) {
		t.Errorf("the same is written again (%v)", err)
	}
	r, proxies = open(dir)
	if !slices.Equal(proxies, []string{"a", "b"}) || !maps.Equal(r.before(), map[string]uint64{"east.test": 7}) {
		t.Errorf("after a start: %v, %v", proxies, r.before())
	}
	if log.Len() > 0 {
		t.Errorf("it complains: %s", &log)
	}
	for _, damaged := range []string{"{", `{"acked": {"east.test": -1}}`, `{"proxy": []}`} {
		if err := os.WriteFile(r.path, []byte(damaged), 0o600); err != nil {
			t.Fatal(err)
		}
		log.Reset()
		if r, proxies = open(dir); len(proxies) > 0 || len(r.before()) > 0 || log.Len() == 0 {
			t.Errorf("%s: %v, %v, %q", damaged, proxies, r.before(), &log)
		}
	}
}

// TestStrandedProxies: the proxies of a replica that is gone are to be waited for, once; not those of one that is only silent, and not gRPC clients,
// which acknowledge nothing.
func TestStrandedProxies(t *testing.T) {
	now := time.Now()
	r := testReplicas(t, storetest.NewMemory(1), "one")
	p := &controlPlane{td: westTD, replicas: r, log: slog.New(slog.DiscardHandler), source: identity.NewSource(), now: func() time.Time { return now }}
	x := newExchange(p)
	proxy := func(id string, hanse bool) xdsserver.ProxyStatus {
		return xdsserver.ProxyStatus{Viewer: xdsgen.Viewer{ID: id}, Hanse: hanse}
	}
	x.heard["2"] = said{at: now, proxies: []xdsserver.ProxyStatus{proxy("a", true), proxy("grpc", false)}}
	x.heard["3"] = said{at: now, proxies: []xdsserver.ProxyStatus{proxy("b", true)}}
	check := func(when string, elsewhere, stranded []string) {
		t.Helper()
		gotElsewhere, gotStranded := x.moves()
		slices.Sort(gotElsewhere)
		if !slices.Equal(gotElsewhere, elsewhere) || !slices.Equal(gotStranded, stranded) {
			t.Errorf("%s: elsewhere %v, want %v; stranded %v, want %v", when, gotElsewhere, elsewhere, gotStranded, stranded)
		}
	}
	r.seen.Store(&[]replica{r.self, {ID: "2"}, {ID: "3"}})
	check("all are there", []string{"a", "b"}, nil)
	now = now.Add(exchangeKept + time.Second)
	check("both are silent", nil, nil)
	r.seen.Store(&[]replica{r.self, {ID: "3"}})
	check("one is gone", nil, []string{"a"})
	check("and it is known", nil, nil)
}
