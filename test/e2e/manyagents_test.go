package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/hanse-mesh/hanse/identity/agent"
)

// usage is what a process has used: CPU, and the memory that it holds.
func (l *lab) usage(name string) (cpu time.Duration, rss int64) {
	l.t.Helper()
	dir := fmt.Sprintf("/proc/%d/", l.proc(name).cmd.Process.Pid)
	stat, err := os.ReadFile(dir + "stat")
	if err != nil {
		l.t.Fatal(err)
	}
	f := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:])) // proc_pid_stat(5): from field 3 on
	user, _ := strconv.ParseInt(f[11], 10, 64)
	sys, _ := strconv.ParseInt(f[12], 10, 64)
	pages, _ := strconv.ParseInt(f[21], 10, 64)
	return time.Duration(user+sys) * (time.Second / 100), pages * int64(os.Getpagesize())
}

// renewals is an agent's log that keeps how long renewals took, in seconds: from the agent's first request to the SVID in the workload.
type renewals struct {
	mu   sync.Mutex
	took []float64 // guarded by mu
}

func (r *renewals) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelInfo }
func (r *renewals) WithAttrs([]slog.Attr) slog.Handler           { return r }
func (r *renewals) WithGroup(string) slog.Handler                { return r }

func (r *renewals) Handle(_ context.Context, rec slog.Record) error {
	if rec.Message != "X509-SVID renewed" {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	rec.Attrs(func(a slog.Attr) bool {
		if a.Key == "took" {
			r.took = append(r.took, a.Value.Duration().Seconds())
		}
		return true
	})
	return nil
}

// take returns what was kept since the last time.
func (r *renewals) take() []float64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	took := r.took
	r.took = nil
	return took
}

// TestManyAgents lets many agents, each with a connection of its own from an address of its own, attest to one hansed and renew all the
// time. HANSE_AGENTS says how many (make bench-identity: 10,000); a test run only shows that it works.
func TestManyAgents(t *testing.T) {
	n, life, look, rounds := 100, 8*time.Second, 6*time.Second, 3
	if many, err := strconv.Atoi(os.Getenv("HANSE_AGENTS")); err == nil {
		n, life, look, rounds = many, 2*time.Minute, time.Minute, 200
	} else {
		t.Parallel()
	}
	limits := "" // in a test run they are low, so that most agents are told to come back
	if n == 100 {
		limits = "identity attestation: {perSecond: 20, burst: 20, allPerSecond: 50, allBurst: 20}\n"
	}
	l := newLab(t, fmt.Sprintf("identity x509Life: %s\n", life)+limits, "west")
	c := l.cluster("west")
	l.start("west/hansed", "hansed", "--config", filepath.Join(c.Dir, "hansed.yaml"))
	l.ready("west/hansed", c.Admin)
	_, bare := l.usage("west/hansed")
	l.save(filepath.Join(c.Dir, "bundle.json"), l.must("west", "", "trust", "show", c.TrustDomain, "-o", "bundle"))

	admin := http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 4, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", filepath.Join(c.Dir, "hansed.sock"))
	}}}
	defer admin.CloseIdleConnections()
	token := func(workload string) string {
		resp, err := admin.Post("http://hansed/v1/tokens", "application/json", strings.NewReader(fmt.Sprintf(`{"workload":%q,"ttlSeconds":3600}`, workload)))
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		var got struct{ Token string }
		b, err := io.ReadAll(resp.Body)
		if err == nil {
			err = json.Unmarshal(b, &got)
		}
		if err != nil || got.Token == "" {
			t.Fatalf("a token of %s: %s %s %v", workload, resp.Status, b, err)
		}
		return got.Token
	}

	conn, err := grpc.NewClient("unix://"+filepath.Join(c.Dir, "data", "spire-server", "api.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	entries, joined := entryv1.NewEntryClient(conn), agentv1.NewAgentClient(conn)

	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	t.Cleanup(func() { cancel(); running.Wait() })
	var dialled atomic.Int64
	var renewing renewals
	build := func(i int, token string) *agent.Agent {
		dir := filepath.Join(l.dir, "agents", strconv.Itoa(i))
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		l.save(filepath.Join(dir, "token"), token)
		from := &net.TCPAddr{IP: net.IPv4(127, 200, byte(i>>8), byte(i))} // attestations are limited by address
		a, err := agent.New(agent.Config{ServerAddrs: []string{c.Identity}, TrustDomain: spiffeid.RequireTrustDomainFromString(c.TrustDomain),
			TrustBundle: filepath.Join(c.Dir, "bundle.json"), TokenFile: filepath.Join(dir, "token"), StateDir: filepath.Join(dir, "state"), Log: slog.New(&renewing),
			Dial: func(ctx context.Context, addr string) (net.Conn, error) {
				dialled.Add(1)
				return (&net.Dialer{LocalAddr: from}).DialContext(ctx, "tcp", addr)
			}})
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	start := func(i int, a *agent.Agent) {
		running.Go(func() {
			if err := a.Run(ctx); err != nil {
				t.Errorf("agent %d: %v", i, err)
			}
		})
	}

	// One agent whose entry a person has made, who may then change it.
	bareToken, err := joined.CreateJoinToken(ctx, &agentv1.CreateJoinTokenRequest{Ttl: 600})
	if err != nil {
		t.Fatal(err)
	}
	changing := build(n, bareToken.Value)
	start(n, changing)
	entry := &types.Entry{SpiffeId: &types.SPIFFEID{TrustDomain: c.TrustDomain, Path: "/ns/shop/sa/changing"},
		Selectors: []*types.Selector{{Type: "unix", Value: "uid:0"}}}
	l.eventually(20*time.Second, "the first agent has attested", func() error {
		list, err := joined.ListAgents(ctx, &agentv1.ListAgentsRequest{})
		if err == nil && len(list.Agents) != 1 {
			err = fmt.Errorf("%d agents", len(list.Agents))
		}
		if err == nil {
			entry.ParentId = list.Agents[0].Id
		}
		return err
	})
	made, err := entries.BatchCreateEntry(ctx, &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{entry}})
	if err != nil || made.Results[0].Status.Code != 0 {
		t.Fatalf("an entry: %v %v", made, err)
	}
	entry = made.Results[0].Entry

	agents := make([]*agent.Agent, n)
	for i := range agents {
		agents[i] = build(i, token(fmt.Sprintf("shop/app-%d", i)))
	}
	begin, before := time.Now(), first(l.usage("west/hansed"))
	wait, done := context.WithTimeout(ctx, 20*time.Minute)
	defer done()
	for i, a := range agents { // not all at once: their side of the handshakes takes as much CPU as hansed's
		start(i, a)
		if before := i - 200; before >= 0 {
			if err := agents[before].Source().Wait(wait); err != nil {
				t.Fatalf("agent %d: %v", before, err)
			}
		}
	}
	for i, a := range agents {
		if err := a.Source().Wait(wait); err != nil {
			t.Fatalf("agent %d: %v", i, err)
		}
	}
	if limits != "" {
		resp, err := http.Get("http://" + c.Admin + "/metrics")
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || !strings.Contains(string(b), `hanse_identity_attestations_total{result="limited"}`) {
			t.Errorf("no attestation was limited: %v", err)
		}
	}
	cpu, _ := l.usage("west/hansed")
	t.Logf("%d agents attested in %.1fs, %d connections, %.2f ms of hansed's CPU each", n, time.Since(begin).Seconds(), dialled.Load(), ms(cpu-before)/float64(n))

	// Renewals: how much of its life an SVID had left, at the least, when it was replaced, and what that costs.
	var renewed atomic.Int64
	var mu sync.Mutex
	var left []float64 // seconds; guarded by mu
	following, stop := context.WithCancel(ctx)
	var followers sync.WaitGroup
	for _, a := range agents {
		followers.Go(func() {
			for {
				changed := a.Source().Changed()
				was, err := a.Source().GetX509SVID()
				if err != nil {
					t.Error(err)
					return
				}
				select {
				case <-changed:
				case <-following.Done():
					return
				}
				if now, err := a.Source().GetX509SVID(); err == nil && now != was {
					renewed.Add(1)
					mu.Lock()
					left = append(left, time.Until(was.Certificates[0].NotAfter).Seconds())
					mu.Unlock()
				}
			}
		})
	}
	time.Sleep(life / 2) // until renewals are spread over time
	from, count := time.Now(), renewed.Load()
	cpu, _ = l.usage("west/hansed")
	renewing.take()
	time.Sleep(look)
	renewal := renewing.take()
	spent := first(l.usage("west/hansed")) - cpu
	_, rss := l.usage("west/hansed")
	took, count := time.Since(from).Seconds(), renewed.Load()-count
	if count == 0 {
		t.Fatal("nobody renewed")
	}
	if got := int64(len(renewal)); got < count*9/10 || got > count*11/10+int64(n)/10 {
		t.Fatalf("%d renewals were timed, and %d seen", got, count)
	}
	t.Logf("from an agent's request to the renewed SVID in its workload: p50 %.4fs, p99 %.4fs, the longest %.4fs, of %d", percentile(renewal, 50), percentile(renewal, 99), percentile(renewal, 100), len(renewal))
	t.Logf("%.0f renewals a second of %d agents: hansed uses %.2f of a CPU, syncs included; it holds %d MiB, %.0f KiB an agent", float64(count)/took, n,
		spent.Seconds()/took, rss>>20, float64(rss-bare)/1024/float64(n))

	// A changed entry, meanwhile.
	var pushed []float64
	for i := range rounds {
		entry.DnsNames = []string{fmt.Sprintf("round-%d.example", i)}
		at := time.Now()
		resp, err := entries.BatchUpdateEntry(ctx, &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{entry}, InputMask: &types.EntryMask{DnsNames: true}})
		if err != nil || resp.Results[0].Status.Code != 0 {
			t.Fatalf("update of %s: %v %v", entry.Id, resp, err)
		}
		for {
			changed := changing.Source().Changed()
			if svid, err := changing.Source().GetX509SVID(); err == nil && slices.Equal(svid.Certificates[0].DNSNames, entry.DnsNames) {
				break
			}
			select {
			case <-changed:
			case <-wait.Done():
				t.Fatal("the SVID does not follow its entry")
			}
		}
		pushed = append(pushed, time.Since(at).Seconds())
	}
	t.Logf("from a changed entry to the SVID in its workload: p50 %.3fs, p99 %.3fs, of %d", percentile(pushed, 50), percentile(pushed, 99), rounds)

	at := time.Now()
	var r rotation
	l.eventually(5*time.Minute, "the new root is active", func() error { // the command may be broken off: it goes on by itself
		out, err := l.hanse("west", "", "trust", "rotate", "-o", "json")
		if err == nil {
			err = json.Unmarshal([]byte(out), &r)
		}
		return err
	})
	if r.State != "active" || len(r.Missing) > 0 {
		t.Errorf("rotation: %+v", r)
	}
	t.Logf("a new root loaded by all %d agents and active after %.1fs", n, time.Since(at).Seconds())

	stop()
	followers.Wait()
	t.Logf("%d renewals; an SVID of %s had at least %.1fs left when it was replaced, the median %.1fs", renewed.Load(), life, percentile(left, 0), percentile(left, 50))
	if worst := percentile(left, 0); worst <= 0 {
		t.Errorf("an SVID had expired %.1fs before it was replaced", -worst)
	}
}

func first[A, B any](a A, _ B) A { return a }

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// percentile is the nearest rank; it sorts its argument. 0 is the least, 100 the greatest.
func percentile(of []float64, p int) float64 {
	slices.Sort(of)
	return of[max((len(of)*p+99)/100-1, 0)]
}
