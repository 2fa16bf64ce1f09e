package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/hanse-mesh/hanse/cmd/internal/admin"
	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/discovery/objects"
	"github.com/hanse-mesh/hanse/federation/etcd"
	"github.com/hanse-mesh/hanse/federation/storetest"
	"github.com/hanse-mesh/hanse/identity"
)

func testReplicas(t *testing.T, store etcd.Store, name string) *replicas {
	t.Helper()
	r, err := newReplicas(&Config{Replica: name}, &stores{own: store}, objects.RandomID(), "v0", slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// TestAFollowerRefusesWhatItCannotDo: only the leader's store can be written; and who asks a replica that cannot reach the leader is told
// which one that is, and where.
func TestAFollowerRefusesWhatItCannotDo(t *testing.T) {
	store := storetest.NewMemory(1)
	r := testReplicas(t, store, "two")
	write := func() error {
		_, err := recordsOf(leaderStore{store, r}, "config/").PutIfAbsent(t.Context(), "x", []byte("y"))
		return err
	}
	r.office.Store(&office{changed: make(chan struct{})})
	if err := write(); !errors.Is(err, etcd.ErrNotLeader) {
		t.Errorf("a follower writes: %v", err)
	}
	changed := r.office.Load().changed
	r.play(&office{leads: true, store: store})
	<-changed
	if err := write(); err != nil {
		t.Errorf("the leader writes: %v", err)
	}

	r.play(&office{})
	p := &controlPlane{td: westTD, replicas: r, log: slog.New(slog.DiscardHandler), source: identity.NewSource(), now: time.Now}
	p.exchange = newExchange(p)
	asked := 0
	h := p.viaLeader(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { asked++ }))
	ask := func(method, path string) (code int, text string) {
		t.Helper()
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), method, path, strings.NewReader("{}")))
		var e admin.Error
		if w.Code != http.StatusOK && json.Unmarshal(w.Body.Bytes(), &e) != nil {
			t.Fatalf("%s %s: %s", method, path, w.Body)
		}
		return w.Code, e.Message
	}
	if err := r.refuse(); !strings.Contains(err.Error(), "no replica leads") {
		t.Errorf("without a leader: %v", err)
	}
	r.seen.Store(&[]replica{{Name: "one", ID: "1", Addresses: []string{"127.0.0.1:1"}}, r.self})
	if code, text := ask("POST", "/v1/apply"); code != http.StatusServiceUnavailable || !strings.Contains(text, "replica one at 127.0.0.1:1 leads") || asked != 0 {
		t.Errorf("the leader does not answer: %d %s", code, text)
	}
	for _, any := range [][2]string{{"GET", "/v1/services"}, {"POST", "/v1/tokens"}, {"GET", "/v1/status"}, {"GET", "/v1/clusters"}} {
		asked = 0
		if code, text := ask(any[0], any[1]); code != http.StatusOK || asked != 1 {
			t.Errorf("%v is not answered by any replica: %d %s", any, code, text)
		}
	}
	if c := r.check(time.Now()); c.OK || !strings.Contains(c.Detail, "nobody leads") {
		t.Errorf("status says %+v", c)
	}
}

// TestWhoAsksDuringAnElection: what only the leader does waits for one that is being elected, here or elsewhere, and not for ever.
func TestWhoAsksDuringAnElection(t *testing.T) {
	store := storetest.NewMemory(1)
	r := testReplicas(t, store, "two")
	p := &controlPlane{td: westTD, replicas: r, log: slog.New(slog.DiscardHandler)}
	await := func(ctx context.Context, others bool, wait time.Duration) string {
		began := time.Now()
		leader, ok := p.awaitLeader(ctx, others, wait)
		if !ok {
			return fmt.Sprint("nobody after ", time.Since(began).Round(time.Second))
		}
		return fmt.Sprint(leader.Name, " after ", time.Since(began).Round(time.Second))
	}
	one := replica{Name: "one", ID: "1", Addresses: []string{"127.0.0.1:1"}}
	for name, c := range map[string]struct {
		seen   []replica
		others bool
		then   func() // after 4 s
		want   string
	}{
		"nobody stands":              {want: "nobody after 10s", others: true},
		"another one leads":          {seen: []replica{one, r.self}, others: true, want: "one after 0s"},
		"it was sent here by it":     {seen: []replica{one, r.self}, want: "nobody after 10s"},
		"it was sent here too early": {seen: []replica{one, r.self}, then: func() { r.play(&office{leads: true, store: store}) }, want: "two after 4s"},
		"elected, reads first":       {seen: []replica{r.self}, others: true, then: func() { r.play(&office{leads: true, store: store}) }, want: "two after 4s"},
		"elected, reads for long":    {seen: []replica{r.self}, others: true, want: "nobody after 10s"},
		"the other stands late":      {others: true, then: func() { r.see([]etcd.Candidate{{Value: []byte(`{"name":"one","id":"1","addresses":["x:1"]}`)}}) }, want: "one after 4s"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r.office.Store(&office{changed: make(chan struct{})})
				r.seen.Store(&c.seen)
				if c.then != nil {
					time.AfterFunc(4*time.Second, c.then)
				}
				if got := await(t.Context(), c.others, electionTime); got != c.want {
					t.Errorf("%s, want %s", got, c.want)
				}
			})
		})
	}
	r.office.Store(&office{changed: make(chan struct{})})
	r.seen.Store(&[]replica{r.self})
	if err := r.refuse(); !strings.Contains(err.Error(), "elected") {
		t.Errorf("an elected one that does not lead yet says: %v", err)
	}
}

// TestReplicaNames: two hansed of one name are told apart, and the second does not start.
func TestReplicaNames(t *testing.T) {
	store := storetest.NewMemory(1)
	first, second := testReplicas(t, store, "one"), testReplicas(t, store, "one")
	put := func(ops ...etcd.Op) {
		t.Helper()
		if _, _, err := store.Txn(t.Context(), nil, ops); err != nil {
			t.Fatal(err)
		}
	}
	put(etcd.Op{Key: "leader/a", Value: first.value(true)})
	if err := first.unique(t.Context(), 0); err != nil {
		t.Errorf("it takes itself for another: %v", err)
	}
	if err := second.unique(t.Context(), -time.Second); err == nil || !strings.Contains(err.Error(), "--replica") {
		t.Errorf("a second one of the name: %v", err)
	}
	time.AfterFunc(100*time.Millisecond, func() { put(etcd.Op{Key: "leader/a", Delete: true}) })
	if err := second.unique(t.Context(), 10*time.Second); err != nil {
		t.Errorf("after the lease of the one that died: %v", err)
	}
}

// TestReplicasRemember: whoever leads, endpoints have the same IDs and objects the same times.
func TestReplicasRemember(t *testing.T) {
	store := storetest.NewMemory(1)
	seen := map[string]string{}
	for _, round := range []string{"first leader", "follower", "next leader"} {
		leads := round != "follower"
		m := &sharedMemory{store: store, write: store, leads: func() bool { return leads }, wake: func() {}, log: slog.New(slog.DiscardHandler)}
		snaps := make(chan *discovery.Snapshot, 10)
		c := newCatalog(discovery.Self{Cluster: "west", TrustDomain: "west.demo", Network: "west"}, recordsOf(store, "config/"), nil, m, slog.New(slog.DiscardHandler),
			func(s *discovery.Snapshot) { snaps <- s })
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- c.Run(ctx) }()
		<-snaps
		if round == "first leader" {
			export := "\n---\napiVersion: multicluster.x-k8s.io/v1alpha1\nkind: ServiceExport\nmetadata: {namespace: shop, name: payments}\n"
			if _, err := c.Apply(ctx, []byte(paymentsYAML+export), false); err != nil {
				t.Fatal(err)
			}
		}
		if err := c.catchUp(ctx); err != nil {
			t.Fatal(err)
		}
		var last *discovery.Snapshot
		for len(snaps) > 0 {
			last = <-snaps
		}
		if last == nil || last.Services.Len() != 1 {
			t.Fatalf("%s: %+v", round, last)
		}
		for _, s := range last.Services.All() {
			got := s.Endpoints[0].ID + " " + s.Export.Created.String()
			if was := seen["x"]; was != "" && was != got {
				t.Errorf("%s has %s, and before it was %s", round, got, was)
			}
			seen["x"] = got
		}
		time.Sleep(1100 * time.Millisecond) // times have whole seconds
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
	if n := len(store.Dump(createdPath)); n == 0 {
		t.Error("no time is stored")
	}
}
