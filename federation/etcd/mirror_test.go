package etcd_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	"github.com/hanse-mesh/hanse/federation/etcd"
	"github.com/hanse-mesh/hanse/federation/etcd/etcdpb"
	"github.com/hanse-mesh/hanse/federation/federationpb"
	"github.com/hanse-mesh/hanse/federation/storetest"
	"github.com/hanse-mesh/hanse/identity"
)

// self is the member ID of the mirroring cluster in all tests.
const self = "00000000000000000000000000000001"

func testLog(t testing.TB) *slog.Logger {
	if !testing.Verbose() {
		return slog.New(slog.DiscardHandler)
	}
	var w io.Writer = os.Stderr
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: slog.LevelInfo})).With("test", t.Name())
}

// eventually waits for a condition, which the figure of its description should make true soon.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !cond() {
		if time.Now().After(deadline) {
			t.Fatalf("not within 20 s: %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// dump reads all keys under a prefix, stripped of it.
func dump(t testing.TB, s etcd.Reader, prefix string) map[string]string {
	t.Helper()
	out := map[string]string{}
	if _, err := s.List(context.Background(), prefix, 0, func(kv etcd.KeyValue) error {
		out[kv.Key[len(prefix):]] = string(kv.Value)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return out
}

// exported is the data of a scope at the exporter, imported the same at the importer.
func exported(t testing.TB, s etcd.Reader, scope string) map[string]string {
	m := dump(t, s, etcd.ExportPrefix+scope+"/")
	maps.DeleteFunc(m, func(k, _ string) bool { return strings.HasPrefix(k, "!") || k == "meta" })
	return m
}

func imported(t testing.TB, s etcd.Reader, scope string) map[string]string {
	return dump(t, s, etcd.ImportPrefix+"west/"+scope+"/data/")
}

// converge waits until the import is the export, as whole key spaces.
func converge(t testing.TB, from, to etcd.Reader, scopes ...string) {
	t.Helper()
	for _, scope := range scopes {
		var want, got map[string]string
		deadline := time.Now().Add(20 * time.Second)
		for {
			want, got = exported(t, from, scope), imported(t, to, scope)
			if maps.Equal(want, got) {
				break
			}
			if time.Now().After(deadline) {
				for k, v := range want {
					if got[k] != v {
						t.Errorf("scope %s: %s is %.20q at the peer and %.20q here", scope, k, v, got[k])
					}
				}
				for k := range got {
					if _, ok := want[k]; !ok {
						t.Errorf("scope %s: %s is resurrected", scope, k)
					}
				}
				t.Fatalf("scope %s: not equal", scope)
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
}

// background runs f until stop or the end of the test.
func background(t testing.TB, f func(context.Context) error) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := f(ctx); err != nil {
			t.Errorf("Run: %v", err)
		}
	}()
	var once sync.Once
	stop = func() {
		once.Do(func() {
			cancel()
			<-done
		})
	}
	t.Cleanup(stop)
	return stop
}

func scopeList(names ...string) etcd.Scope {
	b, err := proto.Marshal(&federationpb.Scopes{Scopes: names})
	if err != nil {
		panic(err)
	}
	return etcd.Scope{Keys: map[string][]byte{"scopes": b}, Complete: true}
}

// update changes some keys of the scope "all"; nil deletes.
func update(e *etcd.Exporter, changed map[string][]byte, endpoints, explained int) {
	sums := map[string]etcd.Sum{}
	for k, v := range changed {
		if sums[k] = (etcd.Sum{}); v != nil {
			sums[k] = etcd.SumOf(v)
		}
	}
	e.Patch("all", etcd.Patch{
		Sums: sums, Value: func(key string) ([]byte, error) { return changed[key], nil }, Endpoints: endpoints, Explained: explained,
	})
}

// services returns n services with slots of a few bytes each.
func services(n int, version string) etcd.Scope {
	keys := map[string][]byte{}
	for i := range n {
		keys[fmt.Sprintf("svc/shop/s%04d", i)] = []byte("service " + version)
		keys[fmt.Sprintf("ep/shop/s%04d/0", i)] = []byte("slot " + version)
	}
	return etcd.Scope{Keys: keys, Endpoints: n, Complete: true}
}

// world is an exporting cluster west and an importing cluster east, joined by mTLS over loopback.
type world struct {
	t          testing.TB
	west, east *etcd.Embedded
	westCA     *authority
	eastCA     *authority
	westSource *identity.Source
	eastSource *identity.Source
	exporter   *etcd.Exporter
	guard      *etcd.Guard
	listener   *listener
	net        *netFault
	mu         sync.Mutex
	prefixes   []string
	stopExport func()
	mirror     *etcd.Mirror
	stopMirror func()
	quota      int64
	timers     etcd.MirrorTimers
}

func newWorld(t testing.TB) *world {
	w := &world{t: t, westCA: newAuthority(t, "west.test"), eastCA: newAuthority(t, "east.test"), net: &netFault{}}
	w.timers = etcd.MirrorTimers{Probe: 100 * time.Millisecond, Answer: time.Second, Silence: 2 * time.Second, BackoffMin: 10 * time.Millisecond, BackoffMax: 100 * time.Millisecond, Retry: 50 * time.Millisecond}
	w.westSource, w.eastSource = w.westCA.source(t, w.eastCA), w.eastCA.source(t, w.westCA)
	w.west, w.east = startEmbedded(t, t.TempDir()), startEmbedded(t, t.TempDir())
	w.allow("all", "members", "acks", "peers/"+self)
	w.export()
	w.serve()
	return w
}

func (w *world) allow(scopes ...string) {
	var p []string
	for _, s := range scopes {
		p = append(p, etcd.ExportPrefix+s+"/")
	}
	w.mu.Lock()
	w.prefixes = p
	w.mu.Unlock()
}

func (w *world) authorize(peer spiffeid.ID) ([]string, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.prefixes, peer == identity.ControlPlaneID(w.eastCA.td)
}

func (w *world) export() {
	w.exporter = etcd.NewExporter(etcd.ExporterConfig{Store: w.west.Store(), Linger: time.Millisecond, Log: testLog(w.t)})
	w.stopExport = background(w.t, w.exporter.Run)
}

func (w *world) serve() {
	kv, watch := w.west.Servers()
	w.guard = etcd.NewGuard(etcd.GuardConfig{KV: kv, Watch: watch, Source: w.westSource, Authorize: w.authorize, Log: testLog(w.t)})
	if w.listener == nil {
		w.listener = serve(w.t, w.guard, w.westSource)
		return
	}
	w.listener.guard = w.guard
	w.listener.start()
}

func (w *world) flush() {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := w.exporter.Flush(ctx); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) newMirror() *etcd.Mirror { return w.newMirrorTo(w.east.Store()) }

func (w *world) newMirrorTo(local etcd.Store) *etcd.Mirror {
	return etcd.NewMirror(etcd.MirrorConfig{
		Peer: "west", Self: self, Local: local, Log: testLog(w.t), Timers: w.timers, QuotaBytes: w.quota,
		Dial: func(ctx context.Context) (etcd.Remote, error) {
			return etcd.DialPeer(ctx, etcd.PeerConfig{
				Addresses: []string{w.listener.addr}, Dialer: w.net.dial,
				TLS: identity.ClientTLS(w.eastSource, identity.AuthorizeID(identity.ControlPlaneID(w.westCA.td)), "h2"),
			})
		},
	})
}

func (w *world) startMirror() {
	w.mirror = w.newMirror()
	w.stopMirror = background(w.t, w.mirror.Run)
}

func (w *world) converge(scopes ...string) {
	w.t.Helper()
	converge(w.t, w.west.Store(), w.east.Store(), scopes...)
}

func TestMirror(t *testing.T) {
	w := newWorld(t)
	w.exporter.Set("all", services(200, "v1"))
	w.exporter.Set("members", etcd.Scope{Keys: map[string][]byte{self: []byte("record")}, Complete: true})
	w.exporter.Set("peers/"+self, scopeList("all"))
	w.flush()
	w.startMirror()
	w.converge("all", "members", "peers/"+self)
	eventually(t, "synced", func() bool { return w.mirror.Status().Synced })
	st := w.mirror.Status()
	if st.Keys != 402 || st.Bytes == 0 || !st.Connected || st.LastAnswer.IsZero() || st.Held != "" || st.Err != "" {
		t.Errorf("status %+v", st)
	}

	// changes and deletions
	w.exporter.Set("all", services(150, "v2"))
	w.flush()
	w.converge("all")

	// the scope list takes a scope away
	w.exporter.Set("peers/"+self, scopeList())
	w.flush()
	eventually(t, "scope removed", func() bool { return len(dump(t, w.east.Store(), etcd.ImportPrefix+"west/all/")) == 0 })
	w.exporter.Set("peers/"+self, scopeList("all"))
	w.flush()
	w.converge("all")
}

// TestManyScopes has more audiences than a gRPC server's or etcd's defaults allow streams.
func TestManyScopes(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.timers = etcd.MirrorTimers{} // 400 scopes with a probe each 100 ms would be a load of its own
	const many = 400
	var scopes []string
	var puts []etcd.Op
	complete, err := proto.Marshal(&etcdpb.Meta{Keys: 1, Complete: true})
	if err != nil {
		t.Fatal(err)
	}
	put := func(key string, value []byte) {
		puts = append(puts, etcd.Op{Key: etcd.ExportPrefix + key, Value: value})
	}
	for i := range many {
		name := fmt.Sprintf("for-%016x", i)
		scopes = append(scopes, name)
		put(name+"/!epoch", []byte(name))
		put(name+"/meta", complete)
		put(name+"/svc/shop/s", []byte("v1"))
	}
	w.stopExport()
	for _, scope := range []string{"members", "acks"} {
		put(scope+"/!epoch", []byte(scope))
	}
	put("peers/"+self+"/scopes", scopeList(scopes...).Keys["scopes"])
	for part := range slices.Chunk(puts, etcd.MaxOps) {
		if _, _, err := w.west.Store().Txn(t.Context(), nil, part); err != nil {
			t.Fatal(err)
		}
	}
	w.allow(append([]string{"members", "acks", "peers/" + self}, scopes...)...)
	m := w.newMirrorTo(storetest.NewMemory(9))
	background(t, m.Run)
	eventually(t, "synced", func() bool {
		st := m.Status()
		return st.Synced && len(st.Scopes) == many+3 && st.Keys == many+1
	})
}
