package etcd_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hanse-mesh/hanse/federation/etcd"
	"github.com/hanse-mesh/hanse/identity"
)

// stock returns the stock etcd client of east at west's guard.
func (w *world) stock() *clientv3.Client {
	w.t.Helper()
	c, err := clientv3.New(clientv3.Config{
		Endpoints: []string{w.listener.addr}, Logger: zap.NewNop(), DialTimeout: 5 * time.Second,
		TLS: identity.ClientTLS(w.eastSource, identity.AuthorizeID(identity.ControlPlaneID(w.westCA.td)), "h2"),
	})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = c.Close() })
	return c
}

func short(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestGuardWithStockClient(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.exporter.Set("all", services(20, "v1"))
	w.exporter.Set("for-north", services(5, "secret"))
	w.flush()
	c, ctx := w.stock(), short(t)
	p := etcd.ExportPrefix

	r, err := c.Get(ctx, p+"all/", clientv3.WithPrefix())
	if err != nil || len(r.Kvs) != 43 || r.Header.ClusterId == 0 {
		t.Fatalf("get --prefix: %v %v", r, err)
	}
	if r, err := c.Get(ctx, p+"all/", clientv3.WithPrefix(), clientv3.WithCountOnly()); err != nil || r.Count != 43 {
		t.Errorf("count: %v %v", r, err)
	}
	chunks, err := c.GetStream(ctx, p+"all/", clientv3.WithPrefix())
	if err != nil {
		t.Fatal(err)
	}
	if r, err := clientv3.GetStreamToGetResponse(chunks); err != nil || len(r.Kvs) != 43 {
		t.Errorf("RangeStream: %v %v", r, err)
	}
	for name, req := range map[string]func() error{
		"another scope":        func() error { _, err := c.Get(ctx, p+"for-north/", clientv3.WithPrefix()); return err },
		"all scopes":           func() error { _, err := c.Get(ctx, p, clientv3.WithPrefix()); return err },
		"a key elsewhere":      func() error { _, err := c.Get(ctx, "hanse/tokens/x"); return err },
		"everything":           func() error { _, err := c.Get(ctx, "", clientv3.WithPrefix()); return err },
		"from a key on":        func() error { _, err := c.Get(ctx, p+"all/", clientv3.WithFromKey()); return err },
		"beyond the scope":     func() error { _, err := c.Get(ctx, p+"all/", clientv3.WithRange(p+"b")); return err },
		"a scope alike":        func() error { _, err := c.Get(ctx, p+"all"); return err },
		"a stream of anything": func() error { return drain(c.GetStream(ctx, p, clientv3.WithPrefix())) },
	} {
		if err := req(); !errors.Is(err, rpctypes.ErrPermissionDenied) && status.Code(err) != codes.PermissionDenied && !strings.Contains(fmt.Sprint(err), "permission denied") {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, req := range map[string]func() error{
		"put":     func() error { _, err := c.Put(ctx, p+"all/x", "y"); return err },
		"delete":  func() error { _, err := c.Delete(ctx, p+"all/svc/shop/s0001"); return err },
		"txn":     func() error { _, err := c.Txn(ctx).Then(clientv3.OpGet(p + "all/meta")).Commit(); return err },
		"compact": func() error { _, err := c.Compact(ctx, 2); return err },
		"lease":   func() error { _, err := c.Grant(ctx, 10); return err },
		"members": func() error { _, err := c.MemberList(ctx); return err },
		"status":  func() error { _, err := c.Status(ctx, w.listener.addr); return err },
		"auth":    func() error { _, err := c.UserList(ctx); return err },
	} {
		if err := req(); !strings.Contains(fmt.Sprint(err), "nimplemented") {
			t.Errorf("%s: %v", name, err)
		}
	}

	// a denied watch is refused alone, and one before and one after it work
	first := c.Watch(ctx, p+"all/", clientv3.WithPrefix(), clientv3.WithPrevKV())
	denied := c.Watch(ctx, p+"for-north/", clientv3.WithPrefix())
	second := c.Watch(ctx, p+"all/svc/shop/s0001")
	if r := <-denied; !r.Canceled || !strings.Contains(fmt.Sprint(r.Err()), "permission denied") {
		t.Errorf("denied watch: %+v", r)
	}
	update(w.exporter, map[string][]byte{"svc/shop/s0001": []byte("v2")}, 20, 0)
	for name, ch := range map[string]clientv3.WatchChan{"first": first, "second": second} {
		r := <-ch
		if len(r.Events) != 1 || string(r.Events[0].Kv.Value) != "v2" || r.Events[0].PrevKv != nil {
			t.Errorf("%s watch: %+v", name, r)
		}
	}
	if err := c.RequestProgress(ctx); err != nil {
		t.Fatal(err)
	}
	if r := <-first; !r.IsProgressNotify() {
		t.Errorf("progress: %+v", r)
	}
}

func drain(ch clientv3.GetStreamChan, err error) error {
	if err != nil {
		return err
	}
	_, err = clientv3.GetStreamToGetResponse(ch)
	return err
}

func TestGuardBoundsRange(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.exporter.Set("all", services(600, "v1"))
	w.flush()
	c, ctx := w.stock(), short(t)
	if _, err := c.Get(ctx, etcd.ExportPrefix+"all/", clientv3.WithPrefix()); status.Code(err) != codes.ResourceExhausted && !strings.Contains(fmt.Sprint(err), "RangeStream") {
		t.Errorf("1,200 keys at once: %v", err)
	}
	if r, err := c.Get(ctx, etcd.ExportPrefix+"all/", clientv3.WithPrefix(), clientv3.WithLimit(1000)); err != nil || len(r.Kvs) != 1000 || !r.More {
		t.Errorf("a page: %v", err)
	}
	if _, err := c.Get(ctx, etcd.ExportPrefix+"all/"+strings.Repeat("x", 5000)); err == nil {
		t.Error("a key of 5,000 bytes was accepted")
	}
}

func TestGuardRefusesStrangers(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.exporter.Set("all", services(5, "v1"))
	w.flush()
	north := newAuthority(t, "north.test")

	// not federated at all: the handshake fails, and the error says so
	stranger := north.source(t, w.westCA)
	r, err := etcd.DialPeer(t.Context(), etcd.PeerConfig{Addresses: []string{w.listener.addr}, TLS: identity.ClientTLS(stranger, identity.AuthorizeAny(), "h2")})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, _, err := r.Get(short(t), etcd.ExportPrefix+"all/meta", 0); err == nil {
		t.Error("an authority that is not federated was let in")
	}
	// federated, but not a peer
	w.westSource.SetBundles(bundles(w.westCA, w.eastCA, north))
	if _, _, err := r.Get(short(t), etcd.ExportPrefix+"all/meta", 0); err == nil {
		t.Error("a stranger read")
	} else {
		eventually(t, "permission denied", func() bool {
			_, _, err := r.Get(short(t), etcd.ExportPrefix+"all/meta", 0)
			return errors.Is(err, etcd.ErrPermissionDenied)
		})
	}
	// a workload of a peer's trust domain is not the peer
	id, err := identity.WorkloadID(w.eastCA.td, "shop", "frontend")
	if err != nil {
		t.Fatal(err)
	}
	w.eastSource.SetSVID(w.eastCA.svid(t, id))
	if _, err := w.stock().Get(short(t), etcd.ExportPrefix+"all/meta"); !strings.Contains(fmt.Sprint(err), "not a peer") {
		t.Errorf("a workload read: %v", err)
	}
}

func TestGuardClosesStreamsOfAWithdrawnBundle(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.exporter.Set("all", services(5, "v1"))
	w.flush()
	background(t, w.guard.Run)
	r, err := etcd.DialPeer(t.Context(), etcd.PeerConfig{Addresses: []string{w.listener.addr}, TLS: identity.ClientTLS(w.eastSource, identity.AuthorizeAny(), "h2")})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	ctx := short(t)
	watcher, err := r.Watch(ctx, etcd.ExportPrefix+"all/", 0)
	if err != nil {
		t.Fatal(err)
	}
	w.westSource.SetBundles(bundles(w.westCA))
	if _, err := watcher.Recv(); err == nil || ctx.Err() != nil {
		t.Errorf("the stream goes on: %v", err)
	}
	if _, _, err := r.Get(ctx, etcd.ExportPrefix+"all/meta", 0); err == nil {
		t.Error("the open connection still reads")
	}
	w.westSource.SetBundles(bundles(w.westCA, w.eastCA))
	eventually(t, "back in", func() bool {
		_, _, err := r.Get(ctx, etcd.ExportPrefix+"all/meta", 0)
		return err == nil
	})
}

func TestGuardClosesStreamsWhenAScopeGoes(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.exporter.Set("all", services(5, "v1"))
	w.flush()
	c, ctx := w.stock(), short(t)
	kept := c.Watch(ctx, etcd.ExportPrefix+"members/", clientv3.WithPrefix(), clientv3.WithCreatedNotify())
	lost := c.Watch(ctx, etcd.ExportPrefix+"all/", clientv3.WithPrefix(), clientv3.WithCreatedNotify())
	<-kept
	<-lost
	w.allow("members")
	w.guard.Recheck()
	r, ok := <-lost
	if ok && !r.Canceled {
		t.Errorf("the watch goes on: %+v", r)
	}
	w.exporter.Set("members", etcd.Scope{Keys: map[string][]byte{"a": []byte("x")}, Complete: true})
	if r := <-kept; len(r.Events) == 0 {
		t.Errorf("the other watch has ended: %+v", r)
	}
}

func TestGuardMetrics(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	kv, watch := w.west.Servers()
	reg := prometheus.NewRegistry()
	g := etcd.NewGuard(etcd.GuardConfig{KV: kv, Watch: watch, Source: w.westSource, Authorize: w.authorize, Metrics: reg})
	if _, err := g.Range(t.Context(), &pb.RangeRequest{Key: []byte("a")}); status.Code(err) != codes.Unauthenticated {
		t.Errorf("a call without a peer: %v", err)
	}
	if families, err := reg.Gather(); len(families) != 1 || err != nil {
		t.Errorf("%v: %v", families, err)
	}
}

// TestPassThrough has another etcd API between the Guard and etcd, as with an external cluster.
func TestPassThrough(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.allow("") // the whole prefix, for a stand-in of an external etcd
	c := w.stock()
	w.exporter.Set("all", services(300, "v1"))
	w.exporter.Set("peers/"+self, scopeList("all"))
	w.flush()
	x := etcd.ExternalOf(c)
	kv, watch := x.Servers()
	second := etcd.NewGuard(etcd.GuardConfig{KV: kv, Watch: watch, Source: w.westSource, Log: testLog(t), Authorize: w.authorize})
	l := serve(t, second, w.westSource)
	w.listener = l
	w.allow("", "all", "members", "acks", "peers/"+self)
	w.startMirror()
	w.converge("all")
	w.exporter.Set("all", services(299, "v2"))
	w.flush()
	w.converge("all")
}

// TestElectionShows: who is there is told, the leader first; a leader that ends is followed at once, not when its lease has run out; and a
// candidate whose key is gone stands again.
func TestElectionShows(t *testing.T) {
	t.Parallel()
	e := startEmbedded(t, t.TempDir())
	var seen [2]atomic.Pointer[[]etcd.Candidate]
	led := make(chan string, 8)
	stand := func(i int) func() {
		id := fmt.Sprint("replica ", i)
		el := etcd.NewElection(etcd.ElectionConfig{Client: e.Client(), Store: e.Store(), ID: id, TTL: time.Minute, Log: testLog(t),
			Value: func(leads bool) []byte { return fmt.Appendf(nil, "%d%v", i, leads) },
			Seen:  func(c []etcd.Candidate) { seen[i].Store(&c) }})
		return background(t, func(ctx context.Context) error {
			return el.Run(ctx, func(ctx context.Context, _ etcd.Store) error {
				led <- id
				<-ctx.Done()
				return nil
			})
		})
	}
	shows := func(i int, want string) {
		t.Helper()
		var got string
		for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
			got = ""
			if list := seen[i].Load(); list != nil {
				for _, c := range *list {
					got += string(c.Value) + " "
				}
			}
			if got == want {
				return
			}
		}
		t.Fatalf("replica %d sees %q, want %q", i, got, want)
	}
	stop0 := stand(0)
	if id := <-led; id != "replica 0" {
		t.Fatal(id)
	}
	stand(1)
	shows(0, "0true 1false ")
	shows(1, "0true 1false ")

	// The follower's key goes, as if its lease had run out while it was paused.
	waiting := (*seen[0].Load())[1]
	if _, _, err := e.Store().Txn(t.Context(), nil, []etcd.Op{{Key: "leader/" + waiting.Key, Delete: true}}); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if list := *seen[0].Load(); len(list) == 2 && list[1].Key != waiting.Key {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("it does not stand again: %v", *seen[0].Load())
		}
	}

	// So does the leader's: another leads, and it waits.
	leading := (*seen[0].Load())[0]
	if _, _, err := e.Store().Txn(t.Context(), nil, []etcd.Op{{Key: "leader/" + leading.Key, Delete: true}}); err != nil {
		t.Fatal(err)
	}
	if id := <-led; id != "replica 1" {
		t.Fatal(id)
	}
	shows(1, "1true 0false ")
	stop0()
	shows(1, "1true ") // though its lease has most of a minute left
}

func TestElection(t *testing.T) {
	t.Parallel()
	e := startEmbedded(t, t.TempDir())
	led := make(chan string, 8)
	var stores [2]etcd.Store
	var elections [2]*etcd.Election
	stop := func(i int) func() {
		id := fmt.Sprint("replica ", i)
		el := etcd.NewElection(etcd.ElectionConfig{Client: e.Client(), Store: e.Store(), ID: id, TTL: 2 * time.Second, Log: testLog(t)})
		elections[i] = el
		return background(t, func(ctx context.Context) error {
			return el.Run(ctx, func(ctx context.Context, s etcd.Store) error {
				stores[i] = s
				led <- id
				<-ctx.Done()
				return nil
			})
		})
	}
	stop0 := stop(0)
	if id := <-led; id != "replica 0" {
		t.Fatal(id)
	}
	stop(1)
	until := elections[0].Until()
	if left := time.Until(until); left <= 0 || left > 2*time.Second {
		t.Errorf("it leads for %s more, want what is left of its lease", left)
	}
	time.Sleep(time.Until(until)) // on which it is renewed
	if !elections[0].Until().After(until) {
		t.Error("the lease is not renewed")
	}
	op := []etcd.Op{{Key: "k", Value: []byte("v")}}
	if ok, _, err := stores[0].Txn(t.Context(), nil, op); !ok || err != nil {
		t.Errorf("the leader writes: %v %v", ok, err)
	}
	if ok, _, err := stores[0].Txn(t.Context(), []etcd.Compare{{Key: "k"}}, op); ok || err != nil {
		t.Errorf("a compare of its own: %v %v", ok, err)
	}
	stop0()
	if left := elections[0].Until(); !left.IsZero() {
		t.Errorf("without a lease it leads until %s", left)
	}
	if id := <-led; id != "replica 1" {
		t.Fatal(id)
	}
	if ok, _, err := stores[0].Txn(t.Context(), nil, op); ok || !errors.Is(err, etcd.ErrNotLeader) {
		t.Errorf("a deposed leader writes: %v %v", ok, err)
	}
	if ok, _, err := stores[1].Txn(t.Context(), nil, op); !ok || err != nil {
		t.Errorf("the new leader writes: %v %v", ok, err)
	}
	alone := etcd.NewElection(etcd.ElectionConfig{Store: e.Store()})
	if err := alone.Run(t.Context(), func(_ context.Context, s etcd.Store) error {
		_, _, err := s.Txn(t.Context(), nil, op)
		return err
	}); err != nil {
		t.Error(err)
	}
}
