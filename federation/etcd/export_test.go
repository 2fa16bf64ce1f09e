package etcd_test

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/hanse-mesh/hanse/federation/etcd"
	"github.com/hanse-mesh/hanse/federation/etcd/etcdpb"
	"github.com/hanse-mesh/hanse/federation/storetest"
)

// recorder notes the Txns that reach a store, and can refuse them.
type recorder struct {
	*storetest.Memory

	mu   sync.Mutex
	done [][]etcd.Op
	fail error // of the next Txn, after it was applied
}

func (r *recorder) txns() [][]etcd.Op {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.done
}

func (r *recorder) Txn(ctx context.Context, compares []etcd.Compare, ops []etcd.Op) (bool, etcd.Header, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.done = append(r.done, ops)
	ok, h, err := r.Memory.Txn(ctx, compares, ops)
	if r.fail != nil {
		err, r.fail = r.fail, nil
		return false, etcd.Header{}, err
	}
	return ok, h, err
}

// exporting runs f in a bubble beside an Exporter on memory.
func exporting(t *testing.T, f func(t *testing.T, store *recorder, e *etcd.Exporter)) {
	synctest.Test(t, func(t *testing.T) {
		store := &recorder{Memory: storetest.NewMemory(1)}
		e := etcd.NewExporter(etcd.ExporterConfig{Store: store, Log: testLog(t)})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- e.Run(ctx) }()
		f(t, store, e)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func meta(t *testing.T, s *storetest.Memory, scope string) *etcdpb.Meta {
	t.Helper()
	kv, _, err := s.Get(t.Context(), etcd.ExportPrefix+scope+"/meta", 0)
	if err != nil || kv == nil {
		t.Fatalf("meta of %s: %v %v", scope, kv, err)
	}
	m := &etcdpb.Meta{}
	if err := proto.Unmarshal(kv.Value, m); err != nil {
		t.Fatal(err)
	}
	return m
}

func data(s *storetest.Memory, scope string) map[string]string {
	m := map[string]string{}
	for k, v := range s.Dump(etcd.ExportPrefix + scope + "/") {
		k = strings.TrimPrefix(k, etcd.ExportPrefix+scope+"/")
		if !strings.HasPrefix(k, "!") && k != "meta" {
			m[k] = v
		}
	}
	return m
}

func wants(t *testing.T, s *storetest.Memory, scope string, want etcd.Scope) {
	t.Helper()
	keys := map[string]string{}
	for k, v := range want.Keys {
		keys[k] = string(v)
	}
	if got := data(s, scope); !maps.Equal(got, keys) {
		t.Errorf("scope %s has %d keys, want %d", scope, len(got), len(keys))
	}
}

func has(s *storetest.Memory, scope, key string) bool {
	_, ok := s.Dump(etcd.ExportPrefix)[etcd.ExportPrefix+scope+"/"+key]
	return ok
}

func TestExporterBatches(t *testing.T) {
	exporting(t, func(t *testing.T, store *recorder, e *etcd.Exporter) {
		e.Set("all", services(1000, "v1"))
		if err := e.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		wants(t, store.Memory, "all", services(1000, "v1"))
		sum := 0
		for i, ops := range store.txns() {
			if len(ops) > etcd.MaxOps {
				t.Errorf("Txn of %d operations", len(ops))
			}
			last := i == len(store.txns())-1
			epoch := false
			var m *etcdpb.Meta
			for _, op := range ops {
				switch key := strings.TrimPrefix(op.Key, etcd.ExportPrefix+"all/"); key {
				case "!epoch":
					epoch = true
				case "!tick":
				case "meta":
					m = &etcdpb.Meta{}
					if err := proto.Unmarshal(op.Value, m); err != nil {
						t.Fatal(err)
					}
				default:
					sum++
				}
			}
			if epoch != last {
				t.Errorf("Txn %d of %d has the epoch: %v", i, len(store.txns()), epoch)
			}
			if m == nil || m.Keys != int64(sum) || m.Complete != last {
				t.Errorf("Txn %d: meta %v after %d keys", i, m, sum)
			}
		}
		if m := meta(t, store.Memory, "all"); m.Endpoints != 1000 {
			t.Errorf("meta %v", m)
		}

		n := len(store.txns())
		e.Set("all", services(1000, "v1")) // other slices, same bytes
		next := services(1000, "v1")
		next.Keys["svc/shop/s0000"] = []byte("changed")
		e.Set("all", next)
		if err := e.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		if len(store.txns()) != n+1 || len(store.txns()[n]) != 1 {
			t.Errorf("one change made %d Txns: %v", len(store.txns())-n, store.txns()[n:])
		}
	})
}

func TestExporterLinger(t *testing.T) {
	exporting(t, func(t *testing.T, store *recorder, e *etcd.Exporter) {
		e.Set("all", services(10, "v1"))
		time.Sleep(time.Second)
		n := len(store.txns())
		for i := range 20 {
			update(e, map[string][]byte{"svc/shop/s0001": fmt.Append(nil, i)}, 10, 0)
			time.Sleep(4 * time.Millisecond)
		}
		time.Sleep(time.Second)
		if len(store.txns()) != n+1 {
			t.Errorf("20 changes within 80 ms made %d Txns", len(store.txns())-n)
		}
	})
}

func TestExporterIncomplete(t *testing.T) {
	exporting(t, func(t *testing.T, store *recorder, e *etcd.Exporter) {
		e.Set("all", services(20, "v1"))
		_ = e.Flush(t.Context())
		epoch := store.Dump(etcd.ExportPrefix)[etcd.ExportPrefix+"all/!epoch"]
		ctx, cancel := context.WithCancel(t.Context())
		again := etcd.NewExporter(etcd.ExporterConfig{Store: store, Log: testLog(t)})
		done := make(chan error)
		go func() { done <- again.Run(ctx) }()
		part := services(5, "v2")
		part.Complete = false
		again.Set("all", part)
		time.Sleep(time.Second)
		if got := data(store.Memory, "all"); len(got) != 40 || got["svc/shop/s0001"] != "service v2" {
			t.Errorf("a partial export left %d keys", len(got))
		}
		again.Set("all", services(15, "v2"))
		_ = again.Flush(t.Context())
		wants(t, store.Memory, "all", services(15, "v2"))
		if got := store.Dump(etcd.ExportPrefix)[etcd.ExportPrefix+"all/!epoch"]; got != epoch || epoch == "" {
			t.Error("a restart has changed the epoch")
		}
		cancel()
		<-done
	})
}

func TestExporterFirstIncomplete(t *testing.T) {
	exporting(t, func(t *testing.T, store *recorder, e *etcd.Exporter) {
		part := services(5, "v1")
		part.Complete = false
		e.Set("all", part)
		time.Sleep(time.Second)
		if has(store.Memory, "all", "!epoch") || meta(t, store.Memory, "all").Complete {
			t.Error("a partial export has an epoch")
		}
		e.Set("all", services(5, "v1"))
		time.Sleep(time.Second)
		if !has(store.Memory, "all", "!epoch") || !meta(t, store.Memory, "all").Complete {
			t.Error("the complete export has no epoch")
		}
	})
}

func TestExporterHoldsBack(t *testing.T) {
	exporting(t, func(t *testing.T, store *recorder, e *etcd.Exporter) {
		set := func(n, explained int) string {
			s := services(n, "v1")
			s.Explained = explained
			e.Set("all", s)
			time.Sleep(time.Second)
			st, err := e.Status()
			if err != nil {
				t.Fatal(err)
			}
			return st["all"].Held
		}
		for _, c := range []struct {
			n, explained int
			held         bool
			why          string
		}{
			{200, 0, false, "growth"},
			{145, 0, false, "loss of less than 30 %"},
			{90, 0, true, "loss of more than 30 % and 50"},
			{91, 0, true, "still"},
			{91, 40, false, "explained"},
			{45, 0, false, "loss of less than 50"},
			{0, 0, false, "loss of less than 50, all of it"},
			{300, 0, false, "growth"},
			{0, 300, false, "all of it, explained"},
			{300, 0, false, "growth"},
			{0, 100, true, "all of it, explained in part"},
		} {
			if held := set(c.n, c.explained); (held != "") != c.held {
				t.Errorf("%s: held %q", c.why, held)
			}
		}
		wants(t, store.Memory, "all", services(300, "v1"))
		e.Accept("all")
		time.Sleep(time.Second)
		wants(t, store.Memory, "all", services(0, "v1"))
		if m := meta(t, store.Memory, "all"); m.Keys != 0 || !m.Complete {
			t.Errorf("meta %v", m)
		}
	})
}

func TestExporterPartialExportHidesNoLoss(t *testing.T) {
	exporting(t, func(t *testing.T, store *recorder, e *etcd.Exporter) {
		e.Set("all", services(200, "v1"))
		_ = e.Flush(t.Context())
		part := services(10, "v2")
		part.Complete = false
		e.Set("all", part)
		if err := e.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := data(store.Memory, "all"); len(got) != 400 || got["svc/shop/s0001"] != "service v2" {
			t.Errorf("%d keys after a partial export", len(got))
		}
		if m := meta(t, store.Memory, "all"); m.Endpoints != 200 || !m.Complete {
			t.Errorf("meta %v", m)
		}
		e.Set("all", services(20, "v2"))
		time.Sleep(time.Second)
		if st, _ := e.Status(); st["all"].Held == "" {
			t.Error("the loss went through")
		}
		empty := etcd.Scope{}
		e.Set("for-north", empty)
		if err := e.Flush(t.Context()); err != nil || len(store.Dump(etcd.ExportPrefix+"for-north/")) != 0 {
			t.Errorf("an empty partial export: %v", err)
		}
	})
}

func TestExporterHoldsBackAfterRestart(t *testing.T) {
	exporting(t, func(t *testing.T, store *recorder, e *etcd.Exporter) {
		e.Set("all", services(200, "v1"))
		_ = e.Flush(t.Context())
		again := etcd.NewExporter(etcd.ExporterConfig{Store: store, Log: testLog(t)})
		again.Set("all", services(10, "v1")) // before it has read what is stored
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- again.Run(ctx) }()
		time.Sleep(time.Second)
		wants(t, store.Memory, "all", services(200, "v1"))
		again.Accept("all")
		time.Sleep(time.Second)
		wants(t, store.Memory, "all", services(10, "v1"))
		cancel()
		<-done
	})
}

func TestExporterMovesBetweenScopes(t *testing.T) {
	exporting(t, func(t *testing.T, store *recorder, e *etcd.Exporter) {
		one, rest := services(1, "v1"), services(3, "v1")
		e.Set("all", etcd.Scope{Keys: maps.Clone(rest.Keys), Endpoints: 3, Complete: true})
		time.Sleep(time.Second)
		for k := range one.Keys {
			delete(rest.Keys, k)
		}
		left := etcd.Scope{Keys: maps.Clone(rest.Keys), Endpoints: 2, Explained: 1, Complete: true}
		delete(left.Keys, "svc/shop/s0001") // not moved but deleted
		delete(left.Keys, "ep/shop/s0001/0")
		e.Set("all", left)
		e.Set("for-east", one)
		if err := e.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		for _, s := range []string{"all", "for-east"} {
			if !has(store.Memory, s, "svc/shop/s0000") || !has(store.Memory, s, "ep/shop/s0000/0") {
				t.Errorf("scope %s lacks the service that moves", s)
			}
		}
		if has(store.Memory, "all", "svc/shop/s0001") {
			t.Error("a deletion waits")
		}
		if m := meta(t, store.Memory, "all"); m.Keys != 4 {
			t.Errorf("meta %v", m)
		}
		time.Sleep(29 * time.Second)
		if !has(store.Memory, "all", "svc/shop/s0000") {
			t.Error("gone from the old scope too early")
		}
		time.Sleep(2 * time.Second)
		wants(t, store.Memory, "all", left)
		if m := meta(t, store.Memory, "all"); m.Keys != 2 {
			t.Errorf("meta %v", m)
		}
	})
}

func TestExporterRemovesScopes(t *testing.T) {
	exporting(t, func(t *testing.T, store *recorder, e *etcd.Exporter) {
		e.Set("all", services(10, "v1"))
		e.Set("for-east", services(200, "v1"))
		_ = e.Flush(t.Context())
		n := len(store.txns())
		e.Retain("all")
		time.Sleep(time.Minute)
		for k := range store.Dump(etcd.ExportPrefix + "for-east/") {
			t.Errorf("%s is left", k)
		}
		for _, ops := range store.txns()[n : len(store.txns())-3] {
			for _, op := range ops {
				if strings.HasSuffix(op.Key, "!epoch") {
					t.Error("the epoch went before the last keys")
				}
			}
		}
		wants(t, store.Memory, "all", services(10, "v1"))
		e.Set("for-east", services(1, "v2"))
		_ = e.Flush(t.Context())
		wants(t, store.Memory, "for-east", services(1, "v2"))
	})
}

func TestExporterTicks(t *testing.T) {
	exporting(t, func(t *testing.T, store *recorder, e *etcd.Exporter) {
		e.Set("all", services(1, "v1"))
		e.Set("members", etcd.Scope{Keys: map[string][]byte{"a": nil}, Complete: true})
		_ = e.Flush(t.Context())
		seen := map[string]bool{}
		time.Sleep(time.Second)
		for range 5 {
			time.Sleep(time.Minute)
			d := store.Dump(etcd.ExportPrefix)
			for _, s := range []string{"all", "members"} {
				seen[d[etcd.ExportPrefix+s+"/!tick"]] = true
			}
		}
		if len(seen) != 10 {
			t.Errorf("%d different ticks in 5 minutes of 2 scopes", len(seen))
		}
		again := etcd.NewExporter(etcd.ExporterConfig{Store: store, Log: testLog(t)})
		n := len(store.txns())
		again.Set("all", services(2, "v1"))
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- again.Run(ctx) }()
		_ = again.Flush(ctx)
		if first := store.txns()[n]; len(first) != 2 || !strings.HasSuffix(first[0].Key, "!tick") {
			t.Errorf("the first Txn after a restart is not the ticks: %v", first)
		}
		cancel()
		<-done
	})
}

func TestExporterUnknownOutcome(t *testing.T) {
	exporting(t, func(t *testing.T, store *recorder, e *etcd.Exporter) {
		e.Set("all", services(5, "v1"))
		_ = e.Flush(t.Context())
		store.mu.Lock()
		store.fail = context.DeadlineExceeded // though it was written
		store.mu.Unlock()
		e.Set("all", services(5, "v2"))
		time.Sleep(110 * time.Millisecond)
		e.Set("all", services(5, "v1"))
		time.Sleep(10 * time.Second)
		wants(t, store.Memory, "all", services(5, "v1"))
	})
}

func TestExporterAnnouncesRestart(t *testing.T) {
	exporting(t, func(t *testing.T, store *recorder, e *etcd.Exporter) {
		e.Set("all", services(5, "v1"))
		if err := e.AnnounceRestart(t.Context(), time.Minute); err != nil {
			t.Fatal(err)
		}
		if m := meta(t, store.Memory, "all"); m.RestartSeconds != 60 || m.Keys != 10 {
			t.Errorf("meta %v", m)
		}
		again := etcd.NewExporter(etcd.ExporterConfig{Store: store, Log: testLog(t)})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- again.Run(ctx) }()
		time.Sleep(time.Second)
		if m := meta(t, store.Memory, "all"); m.RestartSeconds != 0 || m.Keys != 10 {
			t.Errorf("meta %v after the restart", m)
		}
		cancel()
		<-done
	})
}

func TestReadExports(t *testing.T) {
	exporting(t, func(t *testing.T, store *recorder, e *etcd.Exporter) {
		e.Set("all", services(5, "v1"))
		e.Set("peers/"+self, scopeList("all"))
		_ = e.Flush(t.Context())
		got := map[string]map[string][]byte{}
		err := etcd.ReadExports(t.Context(), store, "", func(scope, key string, value []byte) error {
			if got[scope] == nil {
				got[scope] = map[string][]byte{}
			}
			got[scope][key] = value
			return nil
		})
		if err != nil || len(got) != 2 || len(got["all"]) != 10 || !bytes.Equal(got["peers/"+self]["scopes"], scopeList("all").Keys["scopes"]) {
			t.Errorf("got %v", got)
		}
	})
}

func TestExporterRemovesScopesThatItFindsLater(t *testing.T) {
	exporting(t, func(t *testing.T, store *recorder, e *etcd.Exporter) {
		e.Set("all", services(3, "v1"))
		e.Set("for-east", services(3, "v1"))
		_ = e.Flush(t.Context())
		again := etcd.NewExporter(etcd.ExporterConfig{Store: store, Log: testLog(t)})
		again.Set("all", services(3, "v1")) // before it has read what is stored
		again.Retain("all")
		if !again.Holds("for-east") {
			t.Error("it says that nothing is stored before it has looked")
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- again.Run(ctx) }()
		time.Sleep(10 * time.Second)
		if !again.Holds("for-east") || len(data(store.Memory, "for-east")) == 0 {
			t.Error("what has moved to another scope is gone at once")
		}
		time.Sleep(40 * time.Second) // the first one would tick after a minute
		if left := store.Dump(etcd.ExportPrefix + "for-east/"); again.Holds("for-east") || len(left) > 0 {
			t.Errorf("of the scope that is not retained %d keys are left", len(left))
		}
		wants(t, store.Memory, "all", services(3, "v1"))
		cancel()
		<-done
	})
}

// TestExporterRemembersAnExplanation: a deletion explains a loss also if something else changes before it is written.
func TestExporterRemembersAnExplanation(t *testing.T) {
	exporting(t, func(t *testing.T, store *recorder, e *etcd.Exporter) {
		e.Set("all", services(300, "v1"))
		_ = e.Flush(t.Context())
		deleted, next := services(150, "v1"), services(149, "v1")
		deleted.Explained = 150
		e.Set("all", deleted)
		e.Set("all", next)
		update(e, map[string][]byte{"svc/shop/s0001": []byte("changed")}, 149, 0)
		if err := e.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		next.Keys["svc/shop/s0001"] = []byte("changed")
		wants(t, store.Memory, "all", next)
		e.Set("all", services(90, "v1")) // and only once
		time.Sleep(time.Second)
		if st, _ := e.Status(); st["all"].Held == "" {
			t.Error("an explanation that was used up explains another loss")
		}
	})
}
