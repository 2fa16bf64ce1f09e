package main

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"k8s.io/client-go/rest"

	"github.com/hanse-mesh/hanse/federation/etcd"
	"github.com/hanse-mesh/hanse/federation/storetest"
	"github.com/hanse-mesh/hanse/identity/onspire"
)

// TestFencedWrites: what a leader has decided and would write to the API server when its time is over, as after a pause, is not sent; what is
// on its way then ends. Reads go on.
func TestFencedWrites(t *testing.T) {
	var changes atomic.Int32
	arrived := make(chan struct{}, 1)
	var hang atomic.Bool
	api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet {
			return
		}
		if _, err := io.Copy(io.Discard, r.Body); err != nil {
			return
		}
		changes.Add(1)
		if hang.Load() {
			arrived <- struct{}{}
			<-r.Context().Done()
		}
	}))
	defer api.Close()

	leads, over := true, false
	lease, expire := context.WithCancel(t.Context())
	term := func() (onspire.Term, bool) {
		return func(ctx context.Context) (context.Context, context.CancelFunc, error) {
			if over {
				return nil, nil, etcd.ErrNotLeader
			}
			ctx, cancel := context.WithCancel(ctx)
			stop := context.AfterFunc(lease, cancel)
			return ctx, func() { stop(); cancel() }, nil
		}, leads
	}
	kubeconfig := filepath.Join(t.TempDir(), "kubeconfig")
	if err := os.WriteFile(kubeconfig, []byte("apiVersion: v1\nkind: Config\ncurrent-context: x\nclusters: [{name: x, cluster: {server: \""+api.URL+"\"}}]\ncontexts: [{name: x, context: {cluster: x}}]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	config, err := kubeREST(KubeAPI{Enabled: true, Kubeconfig: kubeconfig}, term)
	if err != nil {
		t.Fatal(err)
	}
	client, err := rest.HTTPClientFor(config)
	if err != nil {
		t.Fatal(err)
	}
	defer client.CloseIdleConnections()
	do := func(ctx context.Context, method string) error {
		t.Helper()
		req, err := http.NewRequestWithContext(ctx, method, api.URL, strings.NewReader("{}"))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := client.Do(req)
		if err != nil {
			return err
		}
		return resp.Body.Close()
	}
	check := func(when string, err, want error, sent int32) {
		t.Helper()
		if !errors.Is(err, want) || changes.Load() != sent {
			t.Errorf("%s: %v, want %v; %d changes arrived, want %d", when, err, want, changes.Load(), sent)
		}
	}
	check("a leader", do(t.Context(), http.MethodPatch), nil, 1)

	decided, end := context.WithCancel(t.Context())
	end()
	check("decided in a term before this one", do(decided, http.MethodPatch), context.Canceled, 1)
	over = true
	for _, method := range []string{http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete} {
		check("paused past its lease", do(t.Context(), method), etcd.ErrNotLeader, 1)
	}
	check("a read", do(t.Context(), http.MethodGet), nil, 1)
	over, leads = false, false
	check("a follower", do(t.Context(), http.MethodPatch), etcd.ErrNotLeader, 1)

	leads = true
	hang.Store(true)
	go func() {
		<-arrived
		expire()
	}()
	check("the lease ends on the way", do(t.Context(), http.MethodPatch), context.Canceled, 2)
}

// TestWhileLeading: the context of what writes ends with the leadership, at once and for good: a next one is another context.
func TestWhileLeading(t *testing.T) {
	r := testReplicas(t, storetest.NewMemory(1), "one")
	r.office.Store(&office{changed: make(chan struct{})})
	if term, _, leads := r.during(t.Context()); leads || term.Err() == nil {
		t.Error("a follower has a term")
	}
	elect := func() (resign func()) {
		lead, cancel := context.WithCancel(t.Context())
		r.play(&office{leads: true, ctx: lead, store: r.plain})
		return cancel
	}
	resign := elect()
	first, end, leads := r.during(t.Context())
	defer end()
	if !leads || first.Err() != nil {
		t.Fatal("the leader has no term")
	}
	resign()
	if first.Err() == nil {
		t.Error("the term outlives the leadership")
	}
	elect()
	second, end, leads := r.during(t.Context())
	defer end()
	if !leads || second.Err() != nil || first.Err() == nil {
		t.Error("the next leadership is not another term")
	}

	ctx, stop := context.WithCancel(t.Context())
	terms := 0
	err := r.whileLeading(ctx, func(term context.Context) error {
		terms++
		stop()
		<-term.Done()
		return nil
	})
	if err != nil || terms != 1 {
		t.Errorf("%d terms, %v", terms, err)
	}
}
