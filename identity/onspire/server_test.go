package onspire_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/hanse-mesh/hanse/identity/attest"
	"github.com/hanse-mesh/hanse/identity/bundle"
	"github.com/hanse-mesh/hanse/identity/ca"
	"github.com/hanse-mesh/hanse/identity/onspire"
	"github.com/hanse-mesh/hanse/identity/spireapi"
)

var (
	west = spiffeid.RequireTrustDomainFromString("west.demo")
	east = spiffeid.RequireTrustDomainFromString("east.demo")
	node = spiffeid.RequireFromString("spiffe://west.demo/node")
)

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// spire is a SPIRE Server API on a socket, which can be stopped and started again.
type spire struct {
	t         *testing.T
	authority *ca.Authority
	bundles   *bundle.Store
	api       *spireapi.Server
	path      string
	entries   entryv1.EntryClient
	before    func(ctx context.Context) // each call; nil: nothing. Set before anybody calls
	stop      func()
}

func newSPIRE(t *testing.T) *spire {
	t.Helper()
	s := &spire{t: t, path: filepath.Join(t.TempDir(), "s.sock")}
	var err error
	s.authority, err = ca.Open(ca.Config{Dir: t.TempDir(), TrustDomain: west})
	check(t, err)
	s.bundles, err = bundle.Open(bundle.Config{TrustDomain: west})
	check(t, err)
	kv := attest.NewMemory()
	s.api, err = spireapi.New(t.Context(), spireapi.Config{Authority: s.authority, Bundles: s.bundles, Tokens: attest.New(west, kv, time.Now), KV: kv})
	check(t, err)
	s.start()
	t.Cleanup(func() { s.stop() })
	conn, err := grpc.NewClient("unix://"+s.path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	check(t, err)
	t.Cleanup(func() { conn.Close() })
	s.entries = entryv1.NewEntryClient(conn)
	return s
}

func (s *spire) start() {
	s.t.Helper()
	l, err := net.Listen("unix", s.path)
	check(s.t, err)
	g := grpc.NewServer(append(s.api.ServerOptions(), grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
		if s.before != nil {
			s.before(ctx)
		}
		return h(ctx, req)
	}))...)
	s.api.RegisterAdmin(g)
	done := make(chan error, 1)
	go func() { done <- g.Serve(l) }()
	s.stop = func() { g.Stop(); check(s.t, <-done); s.stop = func() {} }
}

// held are the entries that the server has: SPIFFE IDs with what they federate with.
func (s *spire) held() []string {
	s.t.Helper()
	r, err := s.entries.ListEntries(s.t.Context(), &entryv1.ListEntriesRequest{})
	check(s.t, err)
	var out []string
	for _, e := range r.Entries {
		out = append(out, strings.Join(append([]string{e.SpiffeId.Path}, e.FederatesWith...), " "))
	}
	slices.Sort(out)
	return out
}

func (s *spire) run(edit func(*onspire.Config)) *onspire.Server {
	s.t.Helper()
	cfg := onspire.Config{Address: "unix://" + s.path, WorkloadAPI: "unix:///nowhere", TrustDomain: west, Relay: "127.0.0.1:7446", Linger: 300 * time.Millisecond}
	if edit != nil {
		edit(&cfg)
	}
	o, err := onspire.New(cfg)
	check(s.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- o.Run(ctx) }()
	s.t.Cleanup(func() { cancel(); check(s.t, <-done) })
	return o
}

func eventually(t *testing.T, what string, f func() error) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func (s *spire) eventually(want ...string) {
	s.t.Helper()
	eventually(s.t, "entries on the server", func() error {
		if got := s.held(); !slices.Equal(got, want) {
			return fmt.Errorf("%q, want %q", got, want)
		}
		return nil
	})
}

func entry(name string, selectors ...string) onspire.Entry {
	return onspire.Entry{ID: spiffeid.RequireFromString("spiffe://west.demo/ns/shop/sa/" + name), Parent: node, Selectors: selectors, X509Life: time.Hour, JWTLife: 5 * time.Minute}
}

func foreign(t *testing.T) *spiffebundle.Bundle {
	t.Helper()
	a, err := ca.Open(ca.Config{Dir: t.TempDir(), TrustDomain: east})
	check(t, err)
	return a.Bundle()
}

func bundles(b *spiffebundle.Bundle) map[spiffeid.TrustDomain]*spiffebundle.Bundle {
	if b == nil {
		return map[spiffeid.TrustDomain]*spiffebundle.Bundle{}
	}
	return map[spiffeid.TrustDomain]*spiffebundle.Bundle{b.TrustDomain(): b}
}

func TestKeepsInStep(t *testing.T) {
	t.Parallel()
	s := newSPIRE(t)
	people := &types.Entry{SpiffeId: &types.SPIFFEID{TrustDomain: "west.demo", Path: "/theirs"}, ParentId: &types.SPIFFEID{TrustDomain: "west.demo", Path: "/node"},
		Selectors: []*types.Selector{{Type: "unix", Value: "uid:1"}}, Hint: "hanse"} // whatever its hint says
	r, err := s.entries.BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{people}})
	check(t, err)
	if c := r.Results[0].Status.Code; c != 0 {
		t.Fatal(r.Results[0].Status)
	}
	o := s.run(nil)
	b := foreign(t)
	o.SetBundles(bundles(b))
	time.Sleep(50 * time.Millisecond)
	s.eventually("/theirs") // nothing is unwanted before it is known what is wanted
	o.SetEntries([]onspire.Entry{entry("a", "unix:uid:2"), entry("b", "unix:uid:3")})
	s.eventually("/ns/shop/sa/a east.demo", "/ns/shop/sa/b east.demo", "/theirs")
	if rel, ok := s.bundles.Related(east); !ok || rel.URL != "https://127.0.0.1:7446/federated/east.demo" || rel.EndpointID.String() != "spiffe://west.demo/hanse/control-plane" {
		t.Errorf("relationship: %+v", rel)
	}
	if got, ok := s.bundles.Get(east); !ok || !got.X509Bundle().Equal(b.X509Bundle()) || !got.JWTBundle().Equal(b.JWTBundle()) {
		t.Errorf("the bundle on the server differs: %v", ok)
	}

	// An entry outlives its workload a little, and then goes.
	o.SetEntries([]onspire.Entry{entry("a", "unix:uid:2")})
	time.Sleep(100 * time.Millisecond)
	if got := s.held(); len(got) != 3 {
		t.Errorf("removed at once: %q", got)
	}
	s.eventually("/ns/shop/sa/a east.demo", "/theirs")

	// A domain that is no longer trusted goes with relationship, bundle and what federates with it.
	o.SetBundles(bundles(nil))
	s.eventually("/ns/shop/sa/a", "/theirs")
	eventually(t, "the relationship ends", func() error {
		if _, ok := s.bundles.Related(east); ok {
			return errors.New("it is still there")
		}
		return nil
	})

	// What people have made is left alone, and said.
	o.SetEntries([]onspire.Entry{entry("a", "unix:uid:2"), {ID: spiffeid.RequireFromString("spiffe://west.demo/theirs"), Parent: node, Selectors: []string{"unix:uid:1"}}})
	eventually(t, "status", func() error {
		if st := o.Status(); len(st.Foreign) != 1 || !strings.Contains(st.Foreign[0], "/theirs") || st.Entries != 1 || !st.InStep || st.Err != nil {
			return fmt.Errorf("%+v", st)
		}
		return nil
	})
	if kept := o.Entries(); len(kept) != 1 || kept[0].SpiffeId.Path != "/ns/shop/sa/a" {
		t.Errorf("kept: %v", kept)
	}
	o.SetEntries(nil)
	s.eventually("/theirs")
}

// What the server is asked for while it is down is there when it is back; until then the last own bundle stays.
func TestServerDown(t *testing.T) {
	t.Parallel()
	s := newSPIRE(t)
	o := s.run(nil)
	o.SetBundles(bundles(nil))
	o.SetEntries([]onspire.Entry{entry("a", "unix:uid:2")})
	s.eventually("/ns/shop/sa/a")
	before, ok := o.Bundle()
	if !ok {
		t.Fatal("no own bundle")
	}
	s.stop()
	o.SetEntries([]onspire.Entry{entry("a", "unix:uid:2"), entry("b", "unix:uid:3")})
	o.SetBundles(bundles(foreign(t)))
	check(t, s.authority.Prepare())
	eventually(t, "status says so", func() error {
		if st := o.Status(); st.Err == nil || st.InStep || st.Answered.IsZero() {
			return fmt.Errorf("%+v", st)
		}
		return nil
	})
	if b, _ := o.Bundle(); !b.Equal(before) {
		t.Error("the own bundle has changed while nobody said so")
	}
	changed := o.Changed()
	s.start()
	s.eventually("/ns/shop/sa/a east.demo", "/ns/shop/sa/b east.demo")
	<-changed
	if b, _ := o.Bundle(); len(b.X509Authorities()) != 2 {
		t.Errorf("%d roots, want the prepared one, too", len(b.X509Authorities()))
	}
	eventually(t, "status is well", func() error {
		if st := o.Status(); st.Err != nil || !st.InStep {
			return fmt.Errorf("%+v", st)
		}
		return nil
	})
}

func TestFollowerOnlyReads(t *testing.T) {
	t.Parallel()
	s := newSPIRE(t)
	o := s.run(func(c *onspire.Config) { c.Lead = func() (onspire.Term, bool) { return nil, false } })
	o.SetBundles(bundles(foreign(t)))
	o.SetEntries([]onspire.Entry{entry("a", "unix:uid:2")})
	eventually(t, "the own bundle is read", func() error {
		if _, ok := o.Bundle(); !ok {
			return errors.New("not yet")
		}
		return nil
	})
	time.Sleep(100 * time.Millisecond)
	if got := s.held(); len(got) != 0 {
		t.Errorf("a replica that does not lead has made %q", got)
	}
}

// TestPausedLeader: a leader that was paused between what it read and what it would write, until after another had taken over, writes nothing.
func TestPausedLeader(t *testing.T) {
	t.Parallel()
	s := newSPIRE(t)
	var pausing, over atomic.Bool
	paused, resume := make(chan struct{}), make(chan struct{})
	once := sync.OnceFunc(func() { close(paused) })
	first := s.run(func(c *onspire.Config) {
		c.Lead = func() (onspire.Term, bool) {
			return func(ctx context.Context) (context.Context, context.CancelFunc, error) {
				if pausing.Load() {
					once()
					<-resume
				}
				if over.Load() {
					return nil, nil, errors.New("another leads")
				}
				return ctx, func() {}, nil
			}, !over.Load()
		}
	})
	first.SetBundles(bundles(nil))
	first.SetEntries([]onspire.Entry{entry("a", "unix:uid:2"), entry("b", "unix:uid:3")})
	s.eventually("/ns/shop/sa/a", "/ns/shop/sa/b")
	pausing.Store(true)
	first.SetEntries([]onspire.Entry{entry("c", "unix:uid:4")})
	<-paused
	second := s.run(nil)
	b := foreign(t)
	second.SetBundles(bundles(b))
	second.SetEntries([]onspire.Entry{entry("a", "unix:uid:2"), entry("d", "unix:uid:5")})
	want := []string{"/ns/shop/sa/a east.demo", "/ns/shop/sa/d east.demo"}
	s.eventually(want...)
	over.Store(true)
	close(resume)
	for end := time.Now().Add(2 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if got := s.held(); !slices.Equal(got, want) {
			t.Fatalf("after the first went on: %q, want %q", got, want)
		}
	}
	if st := first.Status(); st.Err != nil {
		t.Errorf("that another leads is no failure of SPIRE's: %v", st.Err)
	}
}

// TestServerComes: a first start waits for the server.
func TestServerComes(t *testing.T) {
	t.Parallel()
	s := newSPIRE(t)
	s.eventually() // it serves
	s.stop()
	o, err := onspire.New(onspire.Config{Address: "unix://" + s.path, WorkloadAPI: "unix:///nowhere", TrustDomain: west})
	check(t, err)
	defer o.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	came := make(chan error, 1)
	go func() { came <- o.First(ctx) }()
	select {
	case err := <-came:
		t.Fatalf("it does not wait: %v", err)
	case <-time.After(time.Second):
	}
	s.start()
	check(t, <-came)
	if _, ok := o.Bundle(); !ok {
		t.Error("no bundle")
	}
}

// TestOtherTrustDomainIsRefused, and the reason is told even where time is over during a later try, which knows none.
func TestOtherTrustDomainIsRefused(t *testing.T) {
	t.Parallel()
	s := newSPIRE(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var calls atomic.Int32
	s.before = func(call context.Context) {
		if calls.Add(1) == 2 {
			cancel()
			<-call.Done()
		}
	}
	o, err := onspire.New(onspire.Config{Address: "unix://" + s.path, WorkloadAPI: "unix:///nowhere", TrustDomain: east})
	check(t, err)
	defer o.Close()
	if err := o.First(ctx); err == nil || !strings.Contains(err.Error(), "is of trust domain west.demo, and trustDomain says east.demo") {
		t.Errorf("first look: %v", err)
	}
}

func TestTemplate(t *testing.T) {
	t.Parallel()
	tm, err := onspire.ParseTemplate("spiffe://{{.TrustDomain}}/nodes/{{.Cluster}}", []string{"k8s:ns:{{.Namespace}}", "k8s:sa:{{.ServiceAccount}}"})
	check(t, err)
	e, err := tm.Entry(onspire.Workload{TrustDomain: "west.demo", Cluster: "west", ID: "spiffe://west.demo/ns/shop/sa/pay", Namespace: "shop", ServiceAccount: "pay"})
	check(t, err)
	if e.ID.String() != "spiffe://west.demo/ns/shop/sa/pay" || e.Parent.String() != "spiffe://west.demo/nodes/west" || !slices.Equal(e.Selectors, []string{"k8s:ns:shop", "k8s:sa:pay"}) {
		t.Errorf("%+v", e)
	}
	if _, err := tm.Entry(onspire.Workload{TrustDomain: "west.demo", Cluster: "west", ID: "spiffe://west.demo/hanse/gateway"}); err == nil {
		t.Error("a selector without a value was taken: it would be anybody's")
	}
	for _, bad := range []struct {
		parent    string
		selectors []string
		want      string
	}{
		{"spiffe://{{.TrustDomain}}/n", nil, "selectors: none"},
		{"{{.Cluster}}", []string{"unix:uid:1"}, `parent "west"`},
		{"spiffe://{{.TrustDomain}}/n", []string{"unix"}, "want type:value"},
		{"spiffe://{{.TrustDomain}}/n", []string{"unix:{{.Nobody}}"}, "Nobody"},
		{"spiffe://{{.TrustDomain", []string{"unix:uid:1"}, "parent"},
	} {
		if _, err := onspire.ParseTemplate(bad.parent, bad.selectors); err == nil || !strings.Contains(err.Error(), bad.want) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
}
