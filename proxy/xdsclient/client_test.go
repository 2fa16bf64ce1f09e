package xdsclient

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/hanse-mesh/hanse/discovery/xdspb"
	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/proxy"
	"github.com/hanse-mesh/hanse/proxy/proxytest"
)

// start runs a client of cp until the test ends, or until the returned function is called.
func start(t *testing.T, cp *controlPlane, change ...func(*Config)) (*Client, func()) {
	t.Helper()
	cfg := Config{
		Addrs: []string{"control-plane:7445"}, Source: cp.domain.Source("/ns/shop/sa/frontend"), ServerID: identity.ControlPlaneID(cp.domain.TD),
		Node: Node{ID: "frontend-1", Cluster: "west", Region: "eu", Zone: "a", Namespace: "shop", Role: "sidecar", WorkloadIPs: []netip.Addr{netip.MustParseAddr("10.0.0.1")}},
		Dial: cp.dial,
	}
	for _, c := range change {
		c(&cfg)
	}
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := c.Run(ctx); err != nil {
			t.Errorf("Run: %v", err)
		}
	}()
	stop := func() { cancel(); <-done }
	t.Cleanup(stop)
	return c, stop
}

// bubble runs a test on a fake clock with its own control plane.
func bubble(t *testing.T, f func(t *testing.T, cp *controlPlane)) {
	synctest.Test(t, func(t *testing.T) {
		f(t, newControlPlane(t, proxytest.NewDomain(t, "west.test")))
	})
}

// service puts a service port with one endpoint in place.
func (cp *controlPlane) service(t testing.TB, authority, id string) {
	cp.set(t, endpointType, authority, loadAssignment(authority, []*endpointv3.LbEndpoint{lbEndpoint(t, id, "10.0.0.2")}))
	cp.set(t, clusterType, authority, edsCluster(t, authority))
	cp.set(t, listenerType, authority, httpListener(t, authority, to(authority)))
}

func resolve(t testing.TB, c *Client, authority string) *proxy.Listener {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	l, err := c.Resolve(ctx, authority)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func TestResolveOnDemand(t *testing.T) {
	bubble(t, func(t *testing.T, cp *controlPlane) {
		cp.service(t, payments, "e1")
		c, _ := start(t, cp)
		synctest.Wait()
		if n := len(c.Table().Listeners); n != 0 {
			t.Fatalf("%d listeners without being asked", n)
		}
		before := time.Now()
		l := resolve(t, c, payments)
		if time.Since(before) != 0 {
			t.Errorf("waited %s", time.Since(before))
		}
		if l.Authority != payments || l.Protocol != proxy.GRPC || len(l.Routes) != 1 {
			t.Errorf("listener %+v", l)
		}
		cl := c.Table().Clusters[payments]
		if cl == nil || !cl.EndpointsReceived || len(cl.Levels) != 1 || cl.Levels[0].Localities[0].Endpoints[0].ID != "e1" {
			t.Fatalf("cluster %+v", cl)
		}
		if st := c.Status(); !st.Connected || st.Names != 1 || st.LastError != "" {
			t.Errorf("status %+v", st)
		}
		n := cp.nodes[0]
		if n.Id != "frontend-1" || n.UserAgentName != "hanse-proxy" || n.Metadata.Fields["role"].GetStringValue() != "sidecar" ||
			n.Metadata.Fields["workload_ips"].GetListValue().Values[0].GetStringValue() != "10.0.0.1" {
			t.Errorf("node %v", n)
		}
	})
}

// TestRoundTrips counts how often the client must wait for an answer before the first call.
func TestRoundTrips(t *testing.T) {
	bubble(t, func(t *testing.T, cp *controlPlane) {
		cp.service(t, payments, "e1")
		cp.service(t, canary, "e2")
		split := "split.shop.svc.clusterset.local:80"
		cp.set(t, listenerType, split, httpListener(t, split, to(payments, canary)))
		c, _ := start(t, cp)
		synctest.Wait()
		trips := func() int { cp.mu.Lock(); defer cp.mu.Unlock(); return cp.trips }
		before := trips()
		resolve(t, c, payments)
		if n := trips() - before; n != 3 { // Listener, Cluster and endpoints at once
			t.Errorf("%d requests for a plain service, want 3 in one round trip", n)
		}
		l := resolve(t, c, split) // Listener, then what it leads to
		if len(l.Routes[0].Backends) != 2 || c.Table().Clusters[canary] == nil {
			t.Errorf("listener %+v, clusters %v", l, c.Table().Clusters)
		}
		if c.Table().Clusters[split] != nil {
			t.Error("the xDS cluster of a Listener that leads elsewhere is still followed")
		}
	})
}

func TestUnknownIsRememberedForAWhile(t *testing.T) {
	bubble(t, func(t *testing.T, cp *controlPlane) {
		c, _ := start(t, cp)
		_, err := c.Resolve(t.Context(), payments)
		if !errors.Is(err, ErrUnknown) {
			t.Fatalf("Resolve: %v", err)
		}
		synctest.Wait()
		if n := c.Status().Names; n != 0 {
			t.Errorf("%d names are followed", n)
		}
		cp.service(t, payments, "e1")
		time.Sleep(unknownFor - time.Millisecond)
		if _, err = c.Resolve(t.Context(), payments); !errors.Is(err, ErrUnknown) {
			t.Errorf("before 5 s: %v", err)
		}
		time.Sleep(time.Millisecond)
		resolve(t, c, payments)
		cp.set(t, listenerType, payments, nil)
		synctest.Wait()
		if _, err = c.Resolve(t.Context(), payments); !errors.Is(err, ErrUnknown) {
			t.Errorf("deleted: %v", err)
		}
		for _, bad := range []string{"", "*", "hanse/inbound/10.0.0.1", strings.Repeat("x", 600)} {
			if _, err := c.Resolve(t.Context(), bad); !errors.Is(err, ErrUnknown) {
				t.Errorf("%.20q: %v", bad, err)
			}
		}
	})
}

func TestUpdatesAreMakeBeforeBreak(t *testing.T) {
	bubble(t, func(t *testing.T, cp *controlPlane) {
		cp.service(t, payments, "e1")
		var last *proxy.Table
		check := true
		c, _ := start(t, cp, func(cfg *Config) {
			cfg.OnTable = func(tab *proxy.Table) {
				for _, l := range tab.Listeners {
					for _, r := range l.Routes {
						for _, b := range r.Backends {
							if cl := tab.Clusters[b.Cluster]; check && (cl == nil || !cl.EndpointsReceived) {
								t.Errorf("version %d routes to %s, which has not come", tab.Version, b.Cluster)
							}
						}
					}
				}
				last = tab
			}
		})
		resolve(t, c, payments)
		changed := c.Changed()
		cp.service(t, canary, "e2")
		cp.set(t, listenerType, payments, httpListener(t, payments, to(payments, canary)))
		synctest.Wait()
		absent := "absent.shop.svc.clusterset.local:80"
		if c.Table().Clusters[canary] == nil {
			t.Fatal("the new backend is not there")
		}
		check = false
		cp.set(t, listenerType, payments, httpListener(t, payments, to(payments, absent)))
		synctest.Wait()
		if c.Table().Clusters[canary] != nil || c.Table().Clusters[absent] != nil {
			t.Errorf("clusters %v", c.Table().Clusters)
		}
		if b := c.Table().Listeners[payments].Routes[0].Backends; len(b) != 2 {
			t.Fatalf("an absent Cluster must not hold the Listener back for ever: %v", b)
		}
		select {
		case <-changed:
		default:
			t.Error("Changed was not closed")
		}
		if last != c.Table() {
			t.Error("OnTable did not see the last table")
		}
	})
}

func TestEndpointChange(t *testing.T) {
	bubble(t, func(t *testing.T, cp *controlPlane) {
		cp.service(t, payments, "e1")
		c, _ := start(t, cp)
		resolve(t, c, payments)
		before := c.Table()
		cp.set(t, endpointType, payments, loadAssignment(payments,
			[]*endpointv3.LbEndpoint{lbEndpoint(t, "e2", "10.0.0.3")}, []*endpointv3.LbEndpoint{lbEndpoint(t, "e3", "10.0.0.4")}))
		synctest.Wait()
		after := c.Table()
		if before.Clusters[payments].Levels[0].Localities[0].Endpoints[0].ID != "e1" || len(after.Clusters[payments].Levels) != 2 {
			t.Error("the old table changed, or the new one did not")
		}
		if after.Listeners[payments] != before.Listeners[payments] || after.Version <= before.Version {
			t.Error("what did not change is a new object, or the version did not grow")
		}
		cp.set(t, endpointType, payments, nil)
		synctest.Wait()
		if cl := c.Table().Clusters[payments]; len(cl.Levels) != 0 || !cl.EndpointsReceived {
			t.Errorf("endpoints were removed: %+v", cl)
		}
	})
}

func TestNACKKeepsTheLastGood(t *testing.T) {
	bubble(t, func(t *testing.T, cp *controlPlane) {
		cp.service(t, payments, "e1")
		c, _ := start(t, cp)
		resolve(t, c, payments)
		good := c.Table().Clusters[payments]
		bad := loadAssignment(payments, []*endpointv3.LbEndpoint{lbEndpoint(t, "e2", "not an address")})
		cp.set(t, endpointType, payments, bad)
		synctest.Wait()
		if got := c.Table().Clusters[payments]; got != good {
			t.Errorf("a rejected resource changed the cluster: %+v", got)
		}
		nacks := cp.rejected(endpointType)
		if len(nacks) != 1 || !strings.Contains(nacks[0], payments) || !strings.Contains(nacks[0], "lb_endpoints[0].endpoint.address") {
			t.Errorf("NACKs %q", nacks)
		}
		if st := c.Status(); len(st.Rejected) != 1 || st.Rejected[0].Name != payments || st.Rejected[0].Type != "ClusterLoadAssignment" {
			t.Errorf("status %+v", st.Rejected)
		}
		cp.service(t, payments, "e3")
		synctest.Wait()
		if st := c.Status(); len(st.Rejected) != 0 || c.Table().Clusters[payments].Levels[0].Localities[0].Endpoints[0].ID != "e3" {
			t.Errorf("not mended: %+v", st.Rejected)
		}
	})
}

func TestRejectedListenerFailsItsResolve(t *testing.T) {
	bubble(t, func(t *testing.T, cp *controlPlane) {
		route := to(payments)
		route.Match.Grpc = &routev3.RouteMatch_GrpcRouteMatchOptions{}
		cp.set(t, listenerType, payments, httpListener(t, payments, route))
		c, _ := start(t, cp)
		_, err := c.Resolve(t.Context(), payments)
		if err == nil || !strings.Contains(err.Error(), "grpc is not supported") {
			t.Errorf("Resolve: %v", err)
		}
		cp.service(t, payments, "e1")
		synctest.Wait()
		resolve(t, c, payments)
	})
}

func TestReconnectAsksForDifferencesOnly(t *testing.T) {
	bubble(t, func(t *testing.T, cp *controlPlane) {
		cp.service(t, payments, "e1")
		c, _ := start(t, cp)
		resolve(t, c, payments)
		synctest.Wait()
		table := c.Table()
		cp.breakStreams()
		synctest.Wait()
		if c.Status().Connected {
			t.Error("still connected")
		}
		if c.Table() != table {
			t.Error("a broken stream changed the table")
		}
		cp.mu.Lock()
		n := len(cp.requests)
		cp.mu.Unlock()
		cp.set(t, listenerType, payments, nil) // while away
		time.Sleep(time.Second)
		synctest.Wait()
		cp.mu.Lock()
		var versions int
		for _, r := range cp.requests[n:] {
			versions += len(r.InitialResourceVersions)
		}
		cp.mu.Unlock()
		if versions != 3 {
			t.Errorf("%d initial_resource_versions, want those of Listener, Cluster and endpoints", versions)
		}
		if c.Table().Listeners[payments] != nil {
			t.Error("what was deleted while away is still there")
		}
	})
}

func TestSecondAddressIsTried(t *testing.T) {
	bubble(t, func(t *testing.T, cp *controlPlane) {
		cp.service(t, payments, "e1")
		c, _ := start(t, cp, func(cfg *Config) { cfg.Addrs = []string{"dead:7445", "control-plane:7445"} })
		resolve(t, c, payments)
	})
}

func TestSilentControlPlaneIsLeft(t *testing.T) {
	bubble(t, func(t *testing.T, cp *controlPlane) {
		cp.silent = true
		c, _ := start(t, cp)
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		_, err := c.Resolve(ctx, payments)
		if !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "no answer on the ADS stream") {
			t.Errorf("Resolve: %v", err)
		}
	})
}

func TestRestartWithoutControlPlane(t *testing.T) {
	bubble(t, func(t *testing.T, cp *controlPlane) {
		dir := filepath.Join(t.TempDir(), "state")
		keep := func(cfg *Config) { cfg.StateDir = dir }
		cp.service(t, payments, "e1")
		cp.set(t, listenerType, inboundPrefix+"10.0.0.1", inboundListener(t, "10.0.0.1", map[uint32]*xdspb.InboundMeta{8080: inboundMeta()}))
		cp.set(t, faultsType, faultsName, &xdspb.Faults{Faults: []*xdspb.Fault{{Drill: "d", Mode: "drain", Share: 100, End: durationpb.New(time.Minute)}}})
		c, stop := start(t, cp, keep)
		resolve(t, c, payments)
		synctest.Wait()
		if len(c.Table().Faults) != 1 {
			t.Fatalf("faults %v", c.Table().Faults)
		}
		stop()
		info, err := os.Stat(filepath.Join(dir, stateFile))
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Fatalf("state file: %v, %v", info, err)
		}
		cp.stop()
		c, stop = start(t, cp, keep)
		l := resolve(t, c, payments)
		table := c.Table()
		if l == nil || table.Clusters[payments].Levels[0].Localities[0].Endpoints[0].ID != "e1" || table.Inbound == nil || len(table.Inbound.Ports) != 1 {
			t.Errorf("kept table %+v", table)
		}
		if len(table.Faults) != 0 {
			t.Error("a drill outlived its proxy")
		}
		if st := c.Status(); !st.Kept || st.Connected {
			t.Errorf("status %+v", st)
		}
		cp.start(t)
		cp.service(t, payments, "e2")
		time.Sleep(20 * time.Second)
		synctest.Wait()
		if c.Status().Kept || c.Table().Clusters[payments].Levels[0].Localities[0].Endpoints[0].ID != "e2" {
			t.Errorf("no fresh state: %+v", c.Status())
		}
		stop()
		other, _ := start(t, cp, keep, func(cfg *Config) { cfg.Node.ID = "someone-else"; cfg.Dial = nil; cfg.Addrs = []string{"127.0.0.1:1"} })
		synctest.Wait()
		if other.Status().Kept {
			t.Error("took another proxy's state")
		}
	})
}

func TestCorruptStateIsNotUsed(t *testing.T) {
	for _, content := range []string{"", "garbage", stateMagic, stateMagic + "\x00\x00\x00\x00", stateMagic + "\x00\x00\x00\x00more"} {
		bubble(t, func(t *testing.T, cp *controlPlane) {
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, stateFile), []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
			cp.service(t, payments, "e1")
			c, _ := start(t, cp, func(cfg *Config) { cfg.StateDir = dir })
			resolve(t, c, payments)
		})
	}
}

// TestStateThatCannotBeKept: a disk that fails costs nothing but the state; it is told once, and so is its end.
func TestStateThatCannotBeKept(t *testing.T) {
	bubble(t, func(t *testing.T, cp *controlPlane) {
		dir := filepath.Join(t.TempDir(), "state")
		var log bytes.Buffer
		cp.service(t, payments, "e0")
		c, stop := start(t, cp, func(cfg *Config) { cfg.StateDir, cfg.Log = dir, slog.New(slog.NewTextHandler(&log, nil)) })
		resolve(t, c, payments)
		time.Sleep(2 * time.Second)
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
		for i := range 5 {
			cp.service(t, payments, fmt.Sprint("e", i+1))
			time.Sleep(2 * time.Second)
		}
		synctest.Wait()
		if c.Table().Clusters[payments].Levels[0].Localities[0].Endpoints[0].ID != "e5" {
			t.Error("the client stood still")
		}
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		cp.service(t, payments, "e6")
		time.Sleep(2 * time.Second)
		stop()
		if n := strings.Count(log.String(), "is not kept"); n != 1 || !strings.Contains(log.String(), "is kept again") {
			t.Errorf("told %d times:\n%s", n, log.String())
		}
		kept, err := load(dir, c.owner)
		if err != nil || len(kept) != 4 {
			t.Errorf("kept %d types, %v", len(kept), err)
		}
	})
}

func TestMetrics(t *testing.T) {
	bubble(t, func(t *testing.T, cp *controlPlane) {
		reg := prometheus.NewPedanticRegistry()
		cp.service(t, payments, "e1")
		c, _ := start(t, cp, func(cfg *Config) { cfg.Registerer = reg })
		resolve(t, c, payments)
		cp.set(t, endpointType, payments, loadAssignment(payments, []*endpointv3.LbEndpoint{lbEndpoint(t, "e2", "nowhere")}))
		synctest.Wait()
		value := func(name string) float64 {
			families, err := reg.Gather()
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range families {
				if f.GetName() == name {
					m := f.GetMetric()[0]
					return m.GetGauge().GetValue() + m.GetCounter().GetValue()
				}
			}
			t.Fatalf("no metric %s", name)
			return 0
		}
		for name, want := range map[string]float64{
			"hanse_xds_client_connected": 1, "hanse_xds_client_names": 1, "hanse_xds_client_rejected": 1, "hanse_xds_client_nacks_total": 1,
			"hanse_xds_client_age_seconds": 0, "hanse_xds_client_table_version": float64(c.Table().Version),
		} {
			if got := value(name); got != want {
				t.Errorf("%s is %v, want %v", name, got, want)
			}
		}
		cp.stop()
		time.Sleep(30 * time.Second)
		if value("hanse_xds_client_connected") != 0 || value("hanse_xds_client_age_seconds") < 29 {
			t.Error("the control plane is gone")
		}
	})
}

// TestRenewedFaults: an order that is told again keeps its time, a renewed one begins anew.
func TestRenewedFaults(t *testing.T) {
	bubble(t, func(t *testing.T, cp *controlPlane) {
		c, _ := start(t, cp)
		tell := func(renewal uint64, end time.Duration) proxy.Fault {
			cp.set(t, faultsType, faultsName, &xdspb.Faults{Faults: []*xdspb.Fault{{
				Drill: "d", Mode: "drain", Share: 100, End: durationpb.New(end), Lease: durationpb.New(15 * time.Second), Renewal: renewal}}})
			synctest.Wait()
			return c.Table().Faults[0]
		}
		first := tell(1, time.Minute)
		time.Sleep(5 * time.Second)
		if again := tell(1, time.Minute); !again.Received.Equal(first.Received) {
			t.Errorf("told again: received %s, not %s", again.Received, first.Received)
		}
		renewed := tell(2, 55*time.Second)
		if !renewed.Received.Equal(first.Received.Add(5*time.Second)) || !renewed.Active(time.Now().Add(14*time.Second)) || renewed.Active(time.Now().Add(15*time.Second)) {
			t.Errorf("renewed: %+v", renewed)
		}
		cp.set(t, faultsType, faultsName, &xdspb.Faults{})
		synctest.Wait()
		if len(c.Table().Faults) != 0 {
			t.Error("a drill that has ended is still in force")
		}
	})
}

func TestIdleNamesAreGivenUp(t *testing.T) {
	bubble(t, func(t *testing.T, cp *controlPlane) {
		cp.service(t, payments, "e1")
		cp.service(t, canary, "e2")
		c, _ := start(t, cp)
		resolve(t, c, payments)
		resolve(t, c, canary)
		for range 40 {
			time.Sleep(time.Minute)
			resolve(t, c, payments)
		}
		synctest.Wait()
		if tab := c.Table(); tab.Listeners[payments] == nil || tab.Listeners[canary] != nil || tab.Clusters[canary] != nil {
			t.Errorf("after 40 minutes: %v", tab.Listeners)
		}
		cp.mu.Lock()
		for s := range cp.streams {
			for _, url := range []string{listenerType, clusterType, endpointType} {
				if s.names[url][canary] || !s.names[url][payments] {
					t.Errorf("%s: subscribed to %v", url, s.names[url])
				}
			}
		}
		cp.mu.Unlock()
		resolve(t, c, canary)
	})
}

func TestTooManyNames(t *testing.T) {
	bubble(t, func(t *testing.T, cp *controlPlane) {
		cp.stop()
		c, _ := start(t, cp)
		synctest.Wait()
		for i := range maxNames {
			if err := c.want(fmt.Sprintf("n%d:80", i)); err != nil {
				t.Fatalf("name %d: %v", i, err)
			}
		}
		synctest.Wait()
		if _, err := c.Resolve(t.Context(), payments); !errors.Is(err, ErrTooMany) {
			t.Errorf("name %d: %v", maxNames+1, err)
		}
	})
}

func TestTrustIsAckedAfterLoading(t *testing.T) {
	bubble(t, func(t *testing.T, cp *controlPlane) {
		var mu sync.Mutex
		var asked []map[string]uint64
		fail := errors.New("not yet")
		cp.set(t, trustType, trustName, &xdspb.Trust{Sequences: map[string]uint64{"west.test": 7}})
		c, _ := start(t, cp, func(cfg *Config) {
			cfg.Trust = func(_ context.Context, t Trust) error {
				mu.Lock()
				defer mu.Unlock()
				asked = append(asked, t.Sequences)
				return fail
			}
		})
		time.Sleep(time.Second)
		synctest.Wait()
		mu.Lock()
		if len(asked) < 2 || asked[0]["west.test"] != 7 {
			t.Fatalf("asked %v", asked)
		}
		if n := cp.acked(trustType); n != 0 || len(c.Table().Trust) != 0 || c.Status().TrustError == "" {
			t.Errorf("%d ACKs before loading, trust %v, status %+v", n, c.Table().Trust, c.Status())
		}
		fail = nil
		mu.Unlock()
		time.Sleep(20 * time.Second)
		synctest.Wait()
		if n := cp.acked(trustType); n != 1 || c.Table().Trust["west.test"] != 7 || c.Status().TrustError != "" {
			t.Errorf("%d ACKs after loading, trust %v", n, c.Table().Trust)
		}
	})
}

func TestGatewayTable(t *testing.T) {
	bubble(t, func(t *testing.T, cp *controlPlane) {
		sni := func(i int) string { return fmt.Sprintf("e%d.endpoint.hanse", i) }
		for i := range 20 {
			cp.set(t, endpointType, sni(i), loadAssignment(sni(i), []*endpointv3.LbEndpoint{lbEndpoint(t, fmt.Sprint("e", i), "10.0.0.2")}))
		}
		c, _ := start(t, cp, func(cfg *Config) { cfg.Node.Role = "gateway" })
		synctest.Wait()
		tab := c.Table()
		if len(tab.SNI) != 20 || tab.SNI[sni(3)][0].ID != "e3" || tab.SNI[sni(3)][0].Weight != 3 {
			t.Fatalf("table %v", tab.SNI)
		}
		cp.set(t, endpointType, sni(3), nil)
		cp.breakStreams()
		cp.set(t, endpointType, sni(4), nil)
		time.Sleep(time.Second)
		synctest.Wait()
		if tab = c.Table(); len(tab.SNI) != 18 {
			t.Errorf("%d names, want 18", len(tab.SNI))
		}
		if _, err := c.Resolve(t.Context(), payments); !errors.Is(err, ErrUnknown) {
			t.Errorf("a gateway resolved a name: %v", err)
		}
	})
}

func TestGatewayRestartWithoutControlPlane(t *testing.T) {
	bubble(t, func(t *testing.T, cp *controlPlane) {
		const sni = "e1.endpoint.hanse"
		gateway := func(cfg *Config) { cfg.Node.Role, cfg.StateDir = "gateway", t.TempDir() }
		dir := ""
		cp.set(t, endpointType, sni, loadAssignment(sni, []*endpointv3.LbEndpoint{lbEndpoint(t, "e1", "10.0.0.2")}))
		_, stop := start(t, cp, gateway, func(cfg *Config) { dir = cfg.StateDir })
		synctest.Wait()
		stop()
		cp.stop()
		c, _ := start(t, cp, gateway, func(cfg *Config) { cfg.StateDir = dir })
		synctest.Wait()
		if len(c.Table().SNI[sni]) != 1 {
			t.Errorf("table %v", c.Table().SNI)
		}
	})
}

// loads is a Reporter.
type loads func() []proxy.ClusterLoad

func (f loads) Report() []proxy.ClusterLoad { return f() }

func TestLoadReports(t *testing.T) {
	bubble(t, func(t *testing.T, cp *controlPlane) {
		at := proxy.Locality{Cluster: "east", Region: "eu", Zone: "b"}
		cp.interval = 4 * time.Second
		report := loads(func() []proxy.ClusterLoad {
			return []proxy.ClusterLoad{{Cluster: payments, Interval: time.Second, Dropped: 1, Endpoints: []proxy.EndpointLoad{{
				Endpoint: &proxy.Endpoint{ID: "e1", Locality: at, Address: netip.MustParseAddrPort("10.0.0.2:15008")},
				Level:    1, Issued: 10, Succeeded: 7, Failed: 3, InProgress: 2, Retried: 1, P50: 2 * time.Millisecond, P99: 9 * time.Millisecond,
				Health: proxy.Dead, Reason: "lost \xff", Since: time.UnixMilli(5), Events: []proxy.Event{{Time: time.UnixMilli(4), Kind: proxy.FirstFailure, Detail: "d"}},
			}}}}
		})
		start(t, cp, func(cfg *Config) { cfg.Load = report })
		synctest.Wait()
		began := time.Now()
		m := <-cp.loads
		if d := time.Since(began); d != 4*time.Second {
			t.Errorf("first report after %s, want the server's 4 s", d)
		}
		l := m.ClusterStats[0].UpstreamLocalityStats[0]
		if m.ClusterStats[0].ClusterName != payments || m.ClusterStats[0].TotalDroppedRequests != 1 || l.Locality.SubZone != "east" || l.Priority != 1 ||
			l.TotalIssuedRequests != 10 || l.TotalSuccessfulRequests != 7 || l.TotalErrorRequests != 3 || l.TotalRequestsInProgress != 2 {
			t.Errorf("stats %v", m)
		}
		f := l.UpstreamEndpointStats[0].Metadata.Fields
		if f["id"].GetStringValue() != "e1" || f["health"].GetStringValue() != "dead" || f["p99_ms"].GetNumberValue() != 9 || f["retried"].GetNumberValue() != 1 ||
			f["events"].GetListValue().Values[0].GetStructValue().Fields["kind"].GetStringValue() != "first_failure" {
			t.Errorf("metadata %v", f)
		}
		cp.set(t, faultsType, faultsName, &xdspb.Faults{Faults: []*xdspb.Fault{{
			Drill: "d", Mode: "observe", End: durationpb.New(time.Minute), Report: durationpb.New(time.Second)}}})
		began = time.Now()
		for range 5 {
			<-cp.loads
		}
		if d := time.Since(began); d > 5*time.Second {
			t.Errorf("5 reports took %s during a drill that asks for one a second", d)
		}
	})
}

func TestInboundOfSeveralAddresses(t *testing.T) {
	bubble(t, func(t *testing.T, cp *controlPlane) {
		other := inboundMeta()
		other.DefaultAllow = false
		cp.set(t, listenerType, inboundPrefix+"10.0.0.1", inboundListener(t, "10.0.0.1", map[uint32]*xdspb.InboundMeta{8080: inboundMeta()}))
		cp.set(t, listenerType, inboundPrefix+"10.0.0.2", inboundListener(t, "10.0.0.2", map[uint32]*xdspb.InboundMeta{8080: other, 9090: other}))
		c, _ := start(t, cp, func(cfg *Config) {
			cfg.Node.WorkloadIPs = append(cfg.Node.WorkloadIPs, netip.MustParseAddr("10.0.0.2"))
		})
		synctest.Wait()
		in := c.Table().Inbound
		if in == nil || in.Address.String() != "10.0.0.1" || len(in.Ports) != 2 || !in.Ports[0].Access.DefaultAllow || in.Ports[1].Port != 9090 {
			t.Errorf("inbound %+v", in)
		}
		cp.set(t, listenerType, inboundPrefix+"10.0.0.1", nil)
		cp.set(t, listenerType, inboundPrefix+"10.0.0.2", nil)
		synctest.Wait()
		if c.Table().Inbound != nil {
			t.Error("still serving")
		}
	})
}

func TestStrangersAreNotServed(t *testing.T) {
	bubble(t, func(t *testing.T, cp *controlPlane) {
		evil := proxytest.NewDomain(t, "evil.test")
		c, _ := start(t, cp, func(cfg *Config) {
			cfg.Source = cp.domain.Source("/ns/shop/sa/frontend")
			cfg.ServerID = identity.ControlPlaneID(evil.TD) // the one that answers is not the one that we want
		})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := c.Resolve(ctx, payments); !errors.Is(err, ErrUnavailable) {
			t.Errorf("Resolve: %v", err)
		}
	})
}

func TestNewSaysWhatIsMissing(t *testing.T) {
	src := identity.NewSource()
	id := identity.ControlPlaneID(proxytest.NewDomain(t, "west.test").TD)
	for _, cfg := range []Config{{}, {Addrs: []string{"a"}}, {Addrs: []string{"a"}, Source: src}, {Addrs: []string{"a"}, Source: src, ServerID: id}} {
		if _, err := New(cfg); err == nil {
			t.Errorf("New(%+v) succeeded", cfg)
		}
	}
}

func TestWhatWasNotAskedForIsNotTaken(t *testing.T) {
	s := newStore(false, nil)
	if err := s.receive(&discoveryv3.DeltaDiscoveryResponse{TypeUrl: "type.googleapis.com/x"}, time.Time{}); err == nil {
		t.Error("took a type that was not asked for")
	}
	good := packed(t, edsCluster(t, payments))
	m := &discoveryv3.DeltaDiscoveryResponse{TypeUrl: clusterType, Resources: []*discoveryv3.Resource{{Name: payments, Version: "1", Resource: good}}, RemovedResources: []string{canary}}
	if err := s.receive(m, time.Time{}); err != nil {
		t.Errorf("a name that was given up meanwhile is no error: %v", err)
	}
	if table, _ := s.next(time.Time{}); table != nil {
		t.Errorf("table %+v", table)
	}
	m.Resources[0].Resource = packed(t, &xdspb.Trust{})
	s.want(payments)
	s.subscribe()
	if err := s.receive(m, time.Time{}); err == nil || !strings.Contains(err.Error(), payments) {
		t.Errorf("took a Trust for a Cluster: %v", err)
	}
}

// BenchmarkEndpointChange is one of 1,000 services' endpoints changing: response in, Table out.
func BenchmarkEndpointChange(b *testing.B) {
	s := newStore(false, nil)
	name := func(i int) string { return fmt.Sprintf("s%d.shop.svc.clusterset.local:80", i) }
	respond := func(typeURL string, i int, version string, m proto.Message) {
		r := &discoveryv3.DeltaDiscoveryResponse{TypeUrl: typeURL, Resources: []*discoveryv3.Resource{{Name: name(i), Version: version, Resource: packed(b, m)}}}
		if err := s.receive(r, time.Time{}); err != nil {
			b.Fatal(err)
		}
	}
	var few []*endpointv3.LbEndpoint
	for i := range 32 {
		few = append(few, lbEndpoint(b, fmt.Sprint("e", i), "10.0.0.2"))
	}
	for i := range 1000 {
		s.want(name(i))
		s.subscribe()
		respond(listenerType, i, "1", httpListener(b, name(i), to(name(i))))
		respond(clusterType, i, "1", edsCluster(b, name(i)))
		respond(endpointType, i, "1", loadAssignment(name(i), few))
	}
	s.next(time.Time{})
	r := &discoveryv3.DeltaDiscoveryResponse{TypeUrl: endpointType, Resources: []*discoveryv3.Resource{{Name: name(7), Version: "2", Resource: packed(b, loadAssignment(name(7), few))}}}
	b.ReportAllocs()
	for b.Loop() {
		if err := s.receive(r, time.Time{}); err != nil {
			b.Fatal(err)
		}
		if table, _ := s.next(time.Time{}); table == nil {
			b.Fatal("no table")
		}
	}
}

// BenchmarkGatewayChange is one of 10,000 names changing in a gateway's table.
func BenchmarkGatewayChange(b *testing.B) {
	s := newStore(true, nil)
	name := func(i int) string { return fmt.Sprintf("%032x.endpoint.hanse", i) }
	change := func(i int) {
		m := loadAssignment(name(i), []*endpointv3.LbEndpoint{lbEndpoint(b, "e", "10.0.0.2")})
		r := &discoveryv3.DeltaDiscoveryResponse{TypeUrl: endpointType, Resources: []*discoveryv3.Resource{{Name: name(i), Version: "1", Resource: packed(b, m)}}}
		if err := s.receive(r, time.Time{}); err != nil {
			b.Fatal(err)
		}
	}
	for i := range 10_000 {
		change(i)
	}
	s.next(time.Time{})
	b.ReportAllocs()
	for b.Loop() {
		change(7)
		s.next(time.Time{})
	}
}
