package storetest

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/hanse-mesh/hanse/federation/etcd"
)

// Contract tests what every etcd.Store promises. open returns an empty store and what compacts it.
func Contract(t *testing.T, open func(*testing.T) (s etcd.Store, compact func(revision int64))) {
	for _, c := range []struct {
		name string
		run  func(*testing.T, etcd.Store, func(int64))
	}{
		{"GetPutDelete", testGetPutDelete},
		{"Txn", testTxn},
		{"List", testList},
		{"Watch", testWatch},
		{"Compaction", testCompaction},
		{"KV", testKV},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, compact := open(t)
			c.run(t, s, compact)
		})
	}
}

func put(t *testing.T, s etcd.Store, key, value string) int64 {
	t.Helper()
	ok, h, err := s.Txn(t.Context(), nil, []etcd.Op{{Key: key, Value: []byte(value)}})
	if err != nil || !ok {
		t.Fatalf("put %s: %v %v", key, ok, err)
	}
	return h.Revision
}

func remove(t *testing.T, s etcd.Store, key string) int64 {
	t.Helper()
	_, h, err := s.Txn(t.Context(), nil, []etcd.Op{{Key: key, Delete: true}})
	if err != nil {
		t.Fatalf("delete %s: %v", key, err)
	}
	return h.Revision
}

func get(t *testing.T, s etcd.Reader, key string, revision int64) (string, *etcd.KeyValue, etcd.Header) {
	t.Helper()
	kv, h, err := s.Get(t.Context(), key, revision)
	if err != nil {
		t.Fatalf("get %s: %v", key, err)
	}
	if kv == nil {
		return "", nil, h
	}
	return string(kv.Value), kv, h
}

func testGetPutDelete(t *testing.T, s etcd.Store, _ func(int64)) {
	if _, kv, h := get(t, s, "a", 0); kv != nil || h.ClusterID == 0 || h.Revision == 0 {
		t.Fatalf("absent key: %v, header %v", kv, h)
	}
	r1 := put(t, s, "a", "1")
	r2 := put(t, s, "a", "2")
	if r2 != r1+1 {
		t.Errorf("revisions %d, %d: want one per Txn", r1, r2)
	}
	v, kv, h := get(t, s, "a", 0)
	if v != "2" || kv.CreateRevision != r1 || kv.ModRevision != r2 || h.Revision != r2 {
		t.Errorf("got %q %+v %+v", v, kv, h)
	}
	if v, _, _ := get(t, s, "a", r1); v != "1" {
		t.Errorf("at the older revision: %q", v)
	}
	r3 := remove(t, s, "a")
	if _, kv, _ := get(t, s, "a", 0); kv != nil {
		t.Errorf("deleted key is still there")
	}
	if r4 := remove(t, s, "a"); r4 != r3 {
		t.Errorf("deleting an absent key made revision %d after %d", r4, r3)
	}
	r5 := put(t, s, "a", "")
	if _, kv, _ := get(t, s, "a", 0); kv == nil || kv.CreateRevision != r5 || len(kv.Value) != 0 {
		t.Errorf("recreated key with an empty value: %+v", kv)
	}
}

func testTxn(t *testing.T, s etcd.Store, _ func(int64)) {
	txn := func(compares []etcd.Compare, ops ...etcd.Op) bool {
		t.Helper()
		ok, _, err := s.Txn(t.Context(), compares, ops)
		if err != nil {
			t.Fatal(err)
		}
		return ok
	}
	absent := []etcd.Compare{{Key: "lead"}}
	if !txn(absent, etcd.Op{Key: "lead", Value: []byte("x")}) || txn(absent, etcd.Op{Key: "lead", Value: []byte("y")}) {
		t.Error("put if absent: want once")
	}
	_, lead, _ := get(t, s, "lead", 0)
	put(t, s, "lead", "renewed")
	fence := []etcd.Compare{{Key: "lead", Created: true, Revision: lead.CreateRevision}}
	if !txn(fence, etcd.Op{Key: "b", Value: []byte("1")}, etcd.Op{Key: "a", Value: []byte("1")}, etcd.Op{Key: "none", Delete: true}) {
		t.Error("a renewed leader key keeps its CreateRevision")
	}
	_, a, _ := get(t, s, "a", 0)
	_, b, _ := get(t, s, "b", 0)
	if a == nil || b == nil || a.ModRevision != b.ModRevision {
		t.Errorf("one Txn is one revision: %+v %+v", a, b)
	}
	if txn([]etcd.Compare{{Key: "a", Revision: a.ModRevision}, {Key: "b", Revision: 1}}, etcd.Op{Key: "a", Delete: true}) {
		t.Error("all compares must hold")
	}
	remove(t, s, "lead")
	put(t, s, "lead", "other")
	if txn(fence, etcd.Op{Key: "a", Value: []byte("late")}) {
		t.Error("a new leader key must fence the old leader")
	}
	if _, _, err := s.Txn(t.Context(), nil, []etcd.Op{{Key: "a", Value: []byte("1")}, {Key: "a", Value: []byte("2")}}); err == nil {
		t.Error("a key twice in one Txn: want an error")
	}
}

func list(t *testing.T, s etcd.Reader, prefix string, revision int64) (keys []string, h etcd.Header) {
	t.Helper()
	h, err := s.List(t.Context(), prefix, revision, func(kv etcd.KeyValue) error {
		keys = append(keys, kv.Key+"="+string(kv.Value))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return keys, h
}

func testList(t *testing.T, s etcd.Store, _ func(int64)) {
	if keys, h := list(t, s, "p/", 0); len(keys) != 0 || h.Revision == 0 || h.ClusterID == 0 {
		t.Errorf("empty list: %v %+v", keys, h)
	}
	var last int64
	for i := range 300 {
		last = put(t, s, fmt.Sprintf("p/%03d", i), "v")
	}
	put(t, s, "o", "before")
	put(t, s, "p", "no slash")
	put(t, s, "p0", "after")
	put(t, s, "p/000", "new")
	keys, h := list(t, s, "p/", 0)
	if len(keys) != 300 || keys[0] != "p/000=new" || keys[299] != "p/299=v" || h.Revision != last+4 {
		t.Errorf("list: %d keys, %v…, header %+v", len(keys), keys[:1], h)
	}
	if keys, h := list(t, s, "p/", last); len(keys) != 300 || keys[0] != "p/000=v" || h.Revision != last {
		t.Errorf("list at revision %d: %d keys, %v…, header %+v", last, len(keys), keys[:1], h)
	}
	stop := errors.New("stop")
	if _, err := s.List(t.Context(), "p/", 0, func(etcd.KeyValue) error { return stop }); !errors.Is(err, stop) {
		t.Errorf("an error of each must end the list: %v", err)
	}
}

func testWatch(t *testing.T, s etcd.Store, _ func(int64)) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	r1 := put(t, s, "w/a", "1")
	put(t, s, "x", "other")
	if _, _, err := s.Txn(t.Context(), nil, []etcd.Op{{Key: "w/b", Value: []byte("2")}, {Key: "w/c", Value: []byte("3")}}); err != nil {
		t.Fatal(err)
	}
	w, err := s.Watch(ctx, "w/", r1)
	if err != nil {
		t.Fatal(err)
	}
	last := remove(t, s, "w/a")
	var got []string
	for len(got) < 4 {
		r, err := w.Recv()
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range r.Events {
			got = append(got, fmt.Sprintf("%s=%s %d %v", e.Key, e.Value, e.ModRevision-r1, e.Delete))
		}
	}
	if want := fmt.Sprint([]string{"w/a=1 0 false", "w/b=2 2 false", "w/c=3 2 false", "w/a= 3 true"}); fmt.Sprint(got) != want {
		t.Errorf("got %v, want %v", got, want)
	}
	last = max(last, put(t, s, "x", "moves the revision only"))
	for {
		if err := w.RequestProgress(); err != nil {
			t.Fatal(err)
		}
		r, err := w.Recv()
		if err != nil || len(r.Events) > 0 {
			t.Fatalf("progress: %+v %v", r, err)
		}
		if r.Header.Revision >= last {
			break
		}
	}
	cancel()
	if _, err := w.Recv(); err == nil {
		t.Error("a watch ends with its context")
	}
}

func testCompaction(t *testing.T, s etcd.Store, compact func(int64)) {
	r1 := put(t, s, "c/a", "1")
	put(t, s, "c/a", "2")
	r3 := put(t, s, "c/a", "3")
	compact(r3)
	if _, _, err := s.Get(t.Context(), "c/a", r1); !errors.Is(err, etcd.ErrCompacted) {
		t.Errorf("get before the compaction: %v", err)
	}
	if _, err := s.List(t.Context(), "c/", r1, func(etcd.KeyValue) error { return nil }); !errors.Is(err, etcd.ErrCompacted) {
		t.Errorf("list before the compaction: %v", err)
	}
	if v, _, _ := get(t, s, "c/a", r3); v != "3" {
		t.Errorf("at the compacted revision: %q", v)
	}
	w, err := s.Watch(t.Context(), "c/", r1)
	if err == nil {
		_, err = w.Recv()
	}
	if !errors.Is(err, etcd.ErrCompacted) {
		t.Errorf("watch from before the compaction: %v", err)
	}
}

func testKV(t *testing.T, s etcd.Store, _ func(int64)) {
	kv := etcd.NewKV(s, "hanse/tokens/")
	put(t, s, "hanse/other", "x")
	ctx := t.Context()
	if ok, err := kv.PutIfAbsent(ctx, "a", []byte("1")); !ok || err != nil {
		t.Fatal(ok, err)
	}
	if ok, err := kv.PutIfAbsent(ctx, "a", []byte("2")); ok || err != nil {
		t.Fatal(ok, err)
	}
	v, rev, err := kv.Get(ctx, "a")
	if string(v) != "1" || rev == 0 || err != nil {
		t.Fatal(string(v), rev, err)
	}
	ok, rev2, err := kv.CompareAndPut(ctx, "a", []byte("2"), rev)
	if !ok || err != nil {
		t.Fatal(ok, err)
	}
	if ok, err := kv.CompareAndDelete(ctx, "a", rev); ok || err != nil {
		t.Error("deleted though it had changed", err)
	}
	if rev3, err := kv.Put(ctx, "b", []byte("3")); rev3 <= rev2 || err != nil {
		t.Error(rev3, err)
	}
	all, _, err := kv.List(ctx, "")
	if err != nil || len(all) != 2 || all[0].Key != "a" || string(all[1].Value) != "3" {
		t.Errorf("list: %v %v", all, err)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	step := 0
	err = kv.Watch(ctx, "", func(all []etcd.KeyValue, _ int64) error {
		switch step++; len(all) {
		case 2:
			ok, err := kv.CompareAndDelete(ctx, "a", rev2)
			if !ok {
				return fmt.Errorf("not deleted: %w", err)
			}
			return err
		case 1:
			return kv.Delete(ctx, "b")
		}
		cancel()
		return nil
	})
	if !errors.Is(err, context.Canceled) || step != 3 {
		t.Errorf("watch ended in step %d: %v", step, err)
	}
	if v, rev, err := kv.Get(t.Context(), "a"); v != nil || rev != 0 || err != nil {
		t.Error(v, rev, err)
	}
}
