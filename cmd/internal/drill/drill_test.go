package drill

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hanse-mesh/hanse/cmd/internal/admin"
	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/discovery/objects"
)

var payments = discovery.Name{Namespace: "shop", Name: "payments"}

func endpoint(id, cluster, zone, ip string) *discovery.Endpoint {
	return &discovery.Endpoint{
		ID:      id,
		Address: netip.MustParseAddr(ip),
		Profile: &discovery.Profile{Ports: map[string]uint16{"http": 8080}, Locality: discovery.Locality{Cluster: cluster, Region: "eu-1", Zone: zone}},
		Ready:   true,
	}
}

// mesh is west with payments in two zones and a ledger of its own, and east with payments.
func mesh(east discovery.PeerState) *discovery.Clusterset {
	local := []*discovery.Endpoint{endpoint("a1", "west", "eu-1a", "127.0.1.11"), endpoint("b1", "west", "eu-1b", "127.0.1.12")}
	ledger := discovery.Name{Namespace: "shop", Name: "ledger"}
	return &discovery.Clusterset{
		Local: &discovery.Snapshot{Self: discovery.Self{Cluster: "west"}, Services: discovery.NewByName(map[discovery.Name]*discovery.Service{
			payments: {Name: payments, Endpoints: local},
			ledger:   {Name: ledger, Endpoints: []*discovery.Endpoint{endpoint("l1", "west", "eu-1a", "127.0.1.13")}},
		})},
		Imports: discovery.NewByName(map[discovery.Name]*discovery.Import{payments: {Name: payments, From: []discovery.ImportedFrom{
			{Member: "west", Endpoints: local},
			{Member: "east", Endpoints: []*discovery.Endpoint{endpoint("e1", "east", "eu-1a", "127.0.2.11")}},
		}}}),
		Members: map[string]*discovery.Member{"east": {Name: "east", State: east}},
	}
}

func complete(t *testing.T, spec admin.DrillSpec) admin.DrillSpec {
	t.Helper()
	spec, err := Complete(spec, "west")
	if err != nil {
		t.Fatal(err)
	}
	return spec
}

func TestPlanNamesWhoTakesOver(t *testing.T) {
	for _, c := range []struct {
		name    string
		scope   admin.DrillScope
		east    discovery.PeerState
		covered bool
		want    string
	}{
		{"one zone", admin.DrillScope{Service: "shop/payments", Zone: "eu-1a"}, discovery.Fresh, true, "shop/payments hit=1 [east (1 healthy) west eu-1b (1 healthy)]"},
		{"whole service", admin.DrillScope{Service: "shop/payments"}, discovery.Fresh, true, "shop/payments hit=2 [east (1 healthy)]"},
		{"suspect peer still takes over", admin.DrillScope{Service: "shop/payments"}, discovery.Suspect, true, "shop/payments hit=2 [east (1 healthy, suspect)]"},
		{"withdrawn peer does not", admin.DrillScope{Service: "shop/payments"}, discovery.Withdrawn, false, "shop/payments hit=2 []"},
		{"service of this cluster only", admin.DrillScope{Service: "shop/ledger"}, discovery.Fresh, false, "shop/ledger hit=1 []"},
	} {
		t.Run(c.name, func(t *testing.T) {
			plan := Plan(complete(t, admin.DrillSpec{Mode: Blackhole, Scope: c.scope}), mesh(c.east))
			var got []string
			for _, s := range plan.Services {
				takers := append([]string(nil), s.Takers...)
				if len(takers) == 2 && takers[0] > takers[1] {
					takers[0], takers[1] = takers[1], takers[0]
				}
				got = append(got, fmt.Sprintf("%s hit=%d %v", s.Service, s.Hit, takers))
			}
			if plan.Covered != c.covered || strings.Join(got, "; ") != c.want {
				t.Errorf("covered=%v %s\nwant    %v %s", plan.Covered, strings.Join(got, "; "), c.covered, c.want)
			}
		})
	}
}

// hanse validate and hanse drill run have the same bounds.
func TestHowLongADrillMayLast(t *testing.T) {
	for length, ok := range map[string]bool{"500ms": false, "1s": true, "1h": true, "1h1s": false, "24h": false} {
		_, invalid := objects.Decode([]byte("apiVersion: hanse.mesh/v1alpha1\nkind: Drill\nmetadata: {name: d}\nspec: {mode: drain, scope: {cluster: west}, duration: "+length+"}\n"), "d.yaml")
		d, err := time.ParseDuration(length)
		if err != nil {
			t.Fatal(err)
		}
		_, refused := Complete(admin.DrillSpec{Mode: Drain, For: d.Seconds()}, "west")
		if (invalid == nil) != ok || (refused == nil) != ok {
			t.Errorf("%s: validate says %v, run says %v", length, invalid, refused)
		}
	}
}

func TestCompleteRefuses(t *testing.T) {
	for want, spec := range map[string]admin.DrillSpec{
		`drill mode "explode"`:            {Mode: "explode"},
		`only its own cluster "west"`:     {Mode: Drain, Scope: admin.DrillScope{Cluster: "east"}},
		"want between 1s and 1h0m0s":      {Mode: Drain, For: 7200},
		`guard "success>1"`:               {Mode: Drain, AbortIf: "success>1"},
		`service "payments": want name`:   {Mode: Drain, Scope: admin.DrillScope{Service: "payments"}},
		"error status 200: want 400 to 5": {Mode: Errors, Status: 200},
		"share 101: want 1 to 100":        {Mode: Drain, Scope: admin.DrillScope{Share: 101}},
	} {
		if _, err := Complete(spec, "west"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Complete(%+v) = %v, want an error with %q", spec, err, want)
		}
	}
}

func TestGuard(t *testing.T) {
	g, err := ParseGuard("success < 99.5%, p99>200ms")
	if err != nil || g.MinSuccess != 0.995 || g.MaxP99 != 200*time.Millisecond {
		t.Fatalf("ParseGuard = %+v, %v", g, err)
	}
	var few, one, good, bad, slow Totals
	few.add(Sample{Errors: 5})
	one.add(Sample{OK: 40, Errors: 1})
	good.add(Sample{OK: 1000, Errors: 40, Retried: 40, P99: 100 * time.Millisecond})
	bad.add(Sample{OK: 980, Errors: 20})
	slow.add(Sample{OK: 1000, P99: time.Second})
	if why := g.Tripped(few); why != "" {
		t.Errorf("5 calls are too few to judge: %s", why)
	}
	if why := g.Tripped(one); why != "" {
		t.Errorf("one failed call says nothing: %s", why)
	}
	if why := g.Tripped(good); why != "" {
		t.Errorf("retried calls did not fail: %s", why)
	}
	if g.Tripped(bad) == "" || g.Tripped(slow) == "" {
		t.Error("98% success and a p99 of 1 s must trip")
	}
}

// memory is a Store and a ControlPlane.
type memory struct {
	mu       sync.Mutex
	values   map[string][]byte
	silenced atomic.Int64
	healed   atomic.Int32

	distrusted atomic.Int64
	rotations  atomic.Int32
	takes      time.Duration
	fails      error
}

func (m *memory) Put(_ context.Context, id string, v []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.values[id] = v
	return nil
}
func (m *memory) Delete(_ context.Context, id string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.values, id)
	return nil
}
func (m *memory) List(context.Context) (map[string][]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return maps.Clone(m.values), nil
}
func (m *memory) Silence(d time.Duration)       { m.silenced.Store(int64(d)) }
func (m *memory) CutFederation(d time.Duration) { m.silenced.Store(int64(d)) }
func (m *memory) Heal()                         { m.healed.Add(1) }

func (m *memory) Distrust(_ string, d time.Duration) { m.distrusted.Store(int64(d)) }
func (m *memory) Closed(time.Time) int               { return 7 }
func (m *memory) Rotate(ctx context.Context, moment func(kind, detail string)) error {
	m.rotations.Add(1)
	moment("prepared", "")
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(m.takes):
	}
	if m.fails == nil {
		moment("renewed", "")
	}
	return m.fails
}

func engine(store *memory) *Engine {
	return New(Config{Self: "west", Store: store, ControlPlane: store, View: func() *discovery.Clusterset { return mesh(discovery.Fresh) },
		ReportEvery: func(time.Duration) {}, FaultsChanged: func() {}, Now: time.Now, Log: slog.New(slog.NewTextHandler(io.Discard, nil))})
}

// traffic plays a caller that uses a1, then b1 once a1 is hit, then a1 again after the fault has gone.
func traffic(ctx context.Context, e *Engine, lose uint64) {
	failed, ejected := false, false
	for ctx.Err() == nil {
		time.Sleep(time.Second)
		s := Sample{Time: time.Now(), Caller: "frontend", Service: payments, Cluster: "west", OK: 100, P50: time.Millisecond, P99: 4 * time.Millisecond}
		if f := e.Faults([]string{"127.0.1.11"}, false); len(f.Faults) > 0 {
			if !failed {
				failed = true
				e.Observe("frontend", s.Time, []Sample{{Time: s.Time, Caller: "frontend", Service: payments, Endpoint: "a1", Cluster: "west", Zone: "eu-1a", Errors: 5 + lose, Retried: 5,
					Events: []Event{{Time: s.Time, Kind: "first_failure", Detail: "ping timeout"}}}})
			} else if !ejected {
				ejected = true
				e.Observe("frontend", s.Time, []Sample{{Time: s.Time, Caller: "frontend", Service: payments, Endpoint: "a1", Cluster: "west", Zone: "eu-1a",
					Events: []Event{{Time: s.Time, Kind: "ejected"}}}})
			}
			s.Endpoint, s.Zone = "b1", "eu-1b"
		} else {
			s.Endpoint, s.Zone = "a1", "eu-1a"
		}
		e.Observe("frontend", s.Time, []Sample{s})
	}
}

func TestDrillRunsHealsAndReports(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		store := &memory{values: map[string][]byte{}}
		e := engine(store)
		var wg sync.WaitGroup
		wg.Go(func() {
			if err := e.Run(ctx); err != nil {
				t.Error(err)
			}
		})
		wg.Go(func() { traffic(ctx, e, 0) })
		time.Sleep(20 * time.Second)
		id, err := e.Start(ctx, complete(t, admin.DrillSpec{Mode: Blackhole, For: 30, Scope: admin.DrillScope{Service: "shop/payments", Zone: "eu-1a"}}))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := e.Start(ctx, complete(t, admin.DrillSpec{Mode: Drain})); err == nil {
			t.Error("a second drill on the same endpoint was started")
		}
		time.Sleep(10 * time.Second)
		f := e.Faults([]string{"127.0.1.11"}, false).Faults
		if len(f) != 1 || f[0].Mode != Blackhole || f[0].End.AsDuration() != 20*time.Second || f[0].Lease.AsDuration() != Lease || f[0].Ports[0] != 8080 {
			t.Errorf("faults of the executor: %v", f)
		}
		if f := e.Faults([]string{"127.0.1.12"}, false).Faults; len(f) != 0 {
			t.Errorf("a sidecar outside of the scope was given %v", f)
		}
		if f := e.Faults(nil, true).Faults; len(f) != 0 {
			t.Errorf("the gateway was given %v by a drill of one zone", f)
		}
		time.Sleep(60 * time.Second)
		d, _, final, err := e.Get(id)
		if err != nil || !final || d.Verdict != "PASSED" || d.State != "done" {
			t.Fatalf("final=%v err=%v drill=%+v", final, err, d)
		}
		if d.Failed != 0 || d.Retried != 5 || d.Calls < 2900 || d.Detect == nil || *d.Detect > 1.5 || d.Shift == nil || *d.Shift > 2.5 || d.Return == nil || *d.Return > 2 {
			t.Errorf("report: %+v detect=%v shift=%v return=%v", d, deref(d.Detect), deref(d.Shift), deref(d.Return))
		}
		for _, row := range d.Traffic {
			want := map[string][3]float64{"eu-1a": {1, 0, 1}, "eu-1b": {0, 1, 0}}[row.Zone]
			if got := [3]float64{row.Before, row.During, row.After}; got != want {
				t.Errorf("traffic of %s: %v, want %v", row.Zone, got, want)
			}
		}
		if f := e.Faults([]string{"127.0.1.11"}, false).Faults; len(f) != 0 {
			t.Errorf("healed, yet %v", f)
		}
		cancel()
		wg.Wait()

		// The report outlives the control plane.
		again := engine(store)
		if err := again.load(context.Background()); err != nil {
			t.Fatal(err)
		}
		if d2, _, final, err := again.Get(id); err != nil || !final || d2.Calls != d.Calls {
			t.Errorf("after a restart: %+v final=%v %v", d2, final, err)
		}
	})
}

func TestGuardAborts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		store := &memory{values: map[string][]byte{}}
		e := engine(store)
		var wg sync.WaitGroup
		wg.Go(func() { _ = e.Run(ctx) })
		wg.Go(func() { traffic(ctx, e, 100) })
		time.Sleep(5 * time.Second)
		id, err := e.Start(ctx, complete(t, admin.DrillSpec{Mode: Errors, For: 60, Scope: admin.DrillScope{Service: "shop/payments", Zone: "eu-1a"}}))
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(4 * time.Second)
		if f := e.Faults([]string{"127.0.1.11"}, false).Faults; len(f) != 0 {
			t.Error("the guard did not heal within 4 s of 100 failed calls")
		}
		time.Sleep(30 * time.Second)
		d, _, _, _ := e.Get(id)
		if d.State != "aborted" || d.Verdict != "FAILED" || !strings.Contains(d.Reason, "success") {
			t.Errorf("drill: %+v", d)
		}
		cancel()
		wg.Wait()
	})
}

func TestControlPlaneModesAndRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		store := &memory{values: map[string][]byte{}}
		e := engine(store)
		var wg sync.WaitGroup
		wg.Go(func() { _ = e.Run(ctx) })
		id, err := e.Start(ctx, complete(t, admin.DrillSpec{Mode: SilenceControlPlane, For: 10}))
		if err != nil || store.silenced.Load() != int64(10*time.Second) {
			t.Fatalf("silenced for %d: %v", store.silenced.Load(), err)
		}
		time.Sleep(12 * time.Second)
		if store.healed.Load() != 1 {
			t.Errorf("healed %d times", store.healed.Load())
		}
		id2, err := e.Start(ctx, complete(t, admin.DrillSpec{Mode: Drain, For: 100}))
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		cancel() // the control plane dies in the middle
		wg.Wait()
		again := engine(store)
		if err := again.load(context.Background()); err != nil {
			t.Fatal(err)
		}
		if d, _, final, _ := again.Get(id2); !final || d.State != "aborted" || !strings.Contains(d.Reason, "restarted") {
			t.Errorf("interrupted drill after the restart: %+v", d)
		}
		if f := again.Faults([]string{"127.0.1.11"}, false).Faults; len(f) != 0 {
			t.Errorf("a drill was resumed by itself: %v", f)
		}
		if d, _, _, _ := again.Get(id); d.State != "done" && d.State != "aborted" {
			t.Errorf("first drill: %+v", d)
		}
	})
}

func deref(f *float64) float64 {
	if f == nil {
		return -1
	}
	return *f
}

// Sidecars heal when the time is up, and report it before the engine's next tick; that is after the drill, not during it.
func TestReportsBetweenTheEndAndTheNextTick(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		store := &memory{values: map[string][]byte{}}
		e := engine(store)
		var wg sync.WaitGroup
		wg.Go(func() { _ = e.Run(ctx) })
		observe := func(caller, endpoint string, s Sample, events ...string) {
			s.Time, s.Caller, s.Service, s.Endpoint, s.Cluster = time.Now(), caller, payments, endpoint, "west"
			for _, kind := range events {
				s.Events = append(s.Events, Event{Time: s.Time, Kind: kind})
			}
			e.Observe(caller, s.Time, []Sample{s})
		}
		time.Sleep(10*time.Second + 10*time.Millisecond) // ticks are 240 ms after what follows
		observe("frontend", "a1", Sample{OK: 100})
		observe("idle", "a1", Sample{OK: 1})
		observe("gone", "a1", Sample{OK: 1})
		time.Sleep(time.Nanosecond)
		id, err := e.Start(ctx, complete(t, admin.DrillSpec{Mode: Blackhole, For: 11, Scope: admin.DrillScope{Service: "shop/payments", Zone: "eu-1a"}}))
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Second)
		observe("frontend", "a1", Sample{Retried: 1}) // reported before the failure that it made good
		time.Sleep(time.Second)
		observe("frontend", "a1", Sample{Errors: 8, Retried: 7}, "first_failure", "ejected")
		for range 7 {
			time.Sleep(time.Second)
			observe("frontend", "b1", Sample{OK: 100})
		}
		e.Observe("idle", time.Now(), nil)
		time.Sleep(1100 * time.Millisecond) // the time is up for 100 ms, and no tick has come
		observe("frontend", "a1", Sample{OK: 30}, "returned")
		time.Sleep(20 * time.Second)
		d, _, final, _ := e.Get(id)
		if !final || d.Shift == nil || *d.Shift != 3 || d.Return == nil || *d.Return > 0.2 || d.Failed != 0 || d.Retried != 8 || d.Elapsed != 11 {
			t.Errorf("final=%v shift=%v return=%v: %+v", final, deref(d.Shift), deref(d.Return), d)
		}
		if len(d.Missing) != 1 || d.Missing[0] != "gone" {
			t.Errorf("callers whose proxies are silent: %v", d.Missing)
		}
		cancel()
		wg.Wait()
	})
}

func TestDistrustRoot(t *testing.T) {
	if _, err := Complete(admin.DrillSpec{Mode: DistrustRoot}, "west"); err == nil || !strings.Contains(err.Error(), "--root") {
		t.Errorf("without a root: %v", err)
	}
	if _, err := Complete(admin.DrillSpec{Mode: Drain, Root: "east.demo"}, "west"); err == nil {
		t.Error("a root in another mode")
	}
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		store := &memory{values: map[string][]byte{}}
		e := engine(store)
		set := e.cfg.View()
		set.Imports.Get(payments).From[1].Endpoints[0].SPIFFEID = "spiffe://east.demo/ns/shop/sa/payments"
		e.cfg.View = func() *discovery.Clusterset { return set }
		var wg sync.WaitGroup
		wg.Go(func() { _ = e.Run(ctx) })
		spec := complete(t, admin.DrillSpec{Mode: DistrustRoot, Root: "east.demo", For: 10})
		if plan := Plan(spec, set); plan.Endpoints != 1 || !plan.Covered || plan.Services[0].Hit != 1 || plan.Services[0].Left != 2 {
			t.Errorf("plan: %+v", plan)
		}
		id, err := e.Start(ctx, spec)
		if err != nil || store.distrusted.Load() != int64(10*time.Second) {
			t.Fatalf("distrusted for %d: %v", store.distrusted.Load(), err)
		}
		if _, err := e.Start(ctx, complete(t, admin.DrillSpec{Mode: CutFederation})); err == nil {
			t.Error("another drill of the control plane began meanwhile")
		}
		f := e.Faults([]string{"127.0.1.11"}, false).Faults
		if len(f) != 1 || f[0].Mode != DistrustRoot || f[0].Root != "east.demo" || f[0].Lease.AsDuration() != Lease {
			t.Errorf("faults: %v", f)
		}
		if f := e.Faults(nil, false).Faults; len(f) != 1 {
			t.Errorf("a caller that is no endpoint goes on trusting: %v", f)
		}
		time.Sleep(20 * time.Second)
		if d, _, final, _ := e.Get(id); !final || d.State != "done" || store.healed.Load() != 1 || len(e.Faults([]string{"127.0.1.11"}, false).Faults) != 0 {
			t.Errorf("healed %d times: %+v", store.healed.Load(), d)
		}
		spec.Scope.Zone = "eu-1a" // sidecars alone
		store.distrusted.Store(0)
		if _, err := e.Start(ctx, spec); err != nil || store.distrusted.Load() != 0 || len(e.Faults(nil, false).Faults) != 0 {
			t.Errorf("the control plane distrusts for %d in a drill of a zone: %v", store.distrusted.Load(), err)
		}
		cancel()
		wg.Wait()
	})
}

func TestRotateDrill(t *testing.T) {
	if _, err := Complete(admin.DrillSpec{Mode: Rotate, Scope: admin.DrillScope{Zone: "eu-1a"}}, "west"); err == nil {
		t.Error("a rotation of a zone")
	}
	for _, c := range []struct {
		name           string
		fails          error
		takes          time.Duration
		state, verdict string
	}{
		{"all goes well", nil, 5 * time.Second, "done", "PASSED"},
		{"an agent is away", errors.New("1 agents still rest on the old root"), 5 * time.Second, "aborted", "FAILED"},
		{"too slow", nil, time.Hour, "aborted", "FAILED"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(context.Background())
				store := &memory{values: map[string][]byte{}, takes: c.takes, fails: c.fails}
				e := engine(store)
				var wg sync.WaitGroup
				wg.Go(func() { _ = e.Run(ctx) })
				id, err := e.Start(ctx, complete(t, admin.DrillSpec{Mode: Rotate, For: 30}))
				if err != nil {
					t.Fatal(err)
				}
				time.Sleep(40 * time.Second)
				d, _, final, _ := e.Get(id)
				if !final || d.State != c.state || d.Verdict != c.verdict || c.fails != nil && d.Reason != c.fails.Error() {
					t.Errorf("final=%v %+v", final, d)
				}
				var kinds []string
				for _, m := range d.Timeline {
					kinds = append(kinds, m.Kind)
				}
				if c.state == "done" && (strings.Join(kinds, " ") != "started prepared renewed healed" || d.Renewed == nil || *d.Renewed < 5 || d.Closed != 7) {
					t.Errorf("timeline %v, renewed %v, closed %d", kinds, deref(d.Renewed), d.Closed)
				}
				if store.rotations.Load() != 1 {
					t.Errorf("rotated %d times", store.rotations.Load())
				}
				cancel()
				wg.Wait()
			})
		})
	}
}

// An expired SVID may cut the way of its own renewal: that drill has no lease, and its end is the executor's.
func TestExpireCertificates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := engine(&memory{values: map[string][]byte{}})
		if _, err := e.Start(t.Context(), complete(t, admin.DrillSpec{Mode: ExpireCertificates, For: 10, Scope: admin.DrillScope{Zone: "eu-1a"}})); err != nil {
			t.Fatal(err)
		}
		f := e.Faults([]string{"127.0.1.11"}, false).Faults
		if len(f) != 1 || f[0].Mode != ExpireCertificates || f[0].Lease != nil || f[0].End.AsDuration() != 10*time.Second {
			t.Errorf("faults: %v", f)
		}
		if f := e.Faults([]string{"127.0.1.12"}, false).Faults; len(f) != 0 {
			t.Errorf("outside of the scope: %v", f)
		}
	})
}
