package etcd

import (
	"bytes"
	"errors"
	"strings"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/protobuf/proto"

	"github.com/hanse-mesh/hanse/federation/etcd/etcdpb"
	"github.com/hanse-mesh/hanse/federation/federationpb"
)

// ExternalOf is an external etcd behind a client that the test has made.
func ExternalOf(c *clientv3.Client) *External { return &External{client: c, log: orDiscard(nil)} }

func TestCompactionKeepsHistory(t *testing.T) {
	start := time.Unix(0, 0)
	var marks []mark
	for minute := range 20 {
		now := start.Add(time.Duration(minute) * time.Minute)
		marks = append(marks, mark{now, int64(minute * 100)})
		var upTo int64
		upTo, marks = compaction(marks, now, 15*time.Minute)
		want := int64(0)
		if minute > 15 {
			want = int64(minute-15) * 100
		}
		if upTo != want {
			t.Errorf("minute %d: compact up to %d, want %d", minute, upTo, want)
		}
	}
	if upTo, left := compaction(marks, start.Add(time.Hour), time.Minute); upTo != 1900 || len(left) != 0 {
		t.Errorf("all is old: %d, %d marks left", upTo, len(left))
	}
}

func TestPrefixEnd(t *testing.T) {
	for prefix, want := range map[string]string{"a": "b", "a/": "a0", "a\xff": "b", "\xff\xff": "\x00", "": "\x00"} {
		if got := string(prefixEnd(prefix)); got != want {
			t.Errorf("%q: %q, want %q", prefix, got, want)
		}
	}
}

func FuzzWithin(f *testing.F) {
	f.Add("exports/v1/all/x", "exports/v1/all/y", "exports/v1/all/")
	f.Add("exports/v1/all/", "exports/v1/all0", "exports/v1/all/")
	f.Add("exports/v1/all/", "\x00", "exports/v1/all/")
	f.Add("exports/v1/all/", "exports/v1/allx", "exports/v1/all/")
	f.Fuzz(func(t *testing.T, key, end, prefix string) {
		r := keyRange{[]byte(key), []byte(end)}
		if !r.within([]string{prefix}) {
			return
		}
		if prefix == "" || !strings.HasPrefix(key, prefix) {
			t.Fatalf("key %q is not below %q", key, prefix)
		}
		if end == "" {
			return
		}
		// the last key that could be read is below the end of the prefix
		if stop := prefixEnd(prefix); end == "\x00" || (!bytes.Equal(stop, []byte{0}) && end > string(stop)) {
			t.Fatalf("range [%q, %q) is not below %q", key, end, prefix)
		}
	})
}

func FuzzScopeList(f *testing.F) {
	for _, names := range [][]string{nil, {"all"}, {"all", "for-0011223344556677"}, {"peers/x"}, {""}, {"a\x00b"}} {
		b, err := proto.Marshal(&federationpb.Scopes{Scopes: names})
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m := NewMirror(MirrorConfig{Peer: "west", Self: "x"})
		if err := m.allowed(b); err != nil {
			if m.allow != nil {
				t.Fatal("a bad list was taken")
			}
			return
		}
		for _, s := range m.allow {
			if checkScope(s) != nil || len(m.allow) > maxScopes {
				t.Fatalf("scope %q was taken", s)
			}
		}
	})
}

func FuzzMeta(f *testing.F) {
	for _, m := range []*etcdpb.Meta{{}, {Keys: 3, Complete: true}, {Keys: -1, Complete: true}, {Keys: 3}} {
		b, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, 3)
	}
	f.Fuzz(func(t *testing.T, b []byte, present int) {
		var m etcdpb.Meta
		ok := b != nil && proto.Unmarshal(b, &m) == nil && m.Complete && m.Keys == int64(present)
		if agrees := disagrees(b, present, false) == ""; agrees != ok {
			t.Fatalf("%v keys and %v: agrees %v", present, &m, agrees)
		}
	})
}

func FuzzSplitImport(f *testing.F) {
	f.Add("all/data/svc/shop/x")
	f.Add("peers/0001/checkpoint")
	f.Add("all/checkpoint")
	f.Add("x")
	f.Fuzz(func(t *testing.T, key string) {
		scope, rest, ok := splitImport(key)
		if ok && rest != "" && scope+"/"+dataPart+rest != key || ok && rest == "" && scope+"/"+checkpointKey != key {
			t.Fatalf("%q became %q and %q", key, scope, rest)
		}
	})
}

func TestEmbeddedRecoversFromItsQuota(t *testing.T) {
	t.Parallel()
	e, err := StartEmbedded(t.Context(), EmbeddedConfig{Dir: t.TempDir(), Name: "small", QuotaBytes: 8 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	kv := NewKV(e.Store(), "")
	var rev int64
	for i := 0; err == nil && i < 200; i++ {
		_, err = kv.Put(t.Context(), "full", make([]byte, 256<<10))
	}
	if !errors.Is(err, ErrNoSpace) {
		t.Fatalf("the quota does not hold: %v", err)
	}
	if err := kv.Delete(t.Context(), "full"); err != nil {
		t.Fatalf("a full store must let go: %v", err)
	}
	if _, rev, err = kv.List(t.Context(), ""); err != nil {
		t.Fatal(err)
	}
	// bbolt counts freed pages as free only some commits later, so it may take another round
	deadline := time.Now().Add(20 * time.Second)
	for err = ErrNoSpace; err != nil && time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		if err := e.compact(t.Context(), rev); err != nil {
			t.Fatal(err)
		}
		_, err = kv.Put(t.Context(), "again", []byte("v"))
	}
	if err != nil {
		t.Errorf("after compaction: %v", err)
	}
	if file, inUse := e.Sizes(); inUse > 1<<20 || file > 4<<20 {
		t.Errorf("%d bytes in use of %d", inUse, file)
	}
}

func TestEmbeddedThatFailsSaysSo(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	e, err := StartEmbedded(t.Context(), EmbeddedConfig{Dir: dir, Name: "west"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := StartEmbedded(t.Context(), EmbeddedConfig{Dir: dir, Name: "west"}); err == nil || !strings.Contains(err.Error(), "in use by another process") {
		t.Errorf("a second server on the same data: %v", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- e.Wait(t.Context()) }()
	log := newZap(nil, e.fail)
	go log.Fatal("failed to save", zap.Error(syscall.ENOSPC)) // as etcd does when its log cannot be written
	var de *DataError
	if err := <-ended; !errors.As(err, &de) || !strings.Contains(err.Error(), "no space left") || !strings.Contains(err.Error(), dir) {
		t.Errorf("Wait: %v", err)
	}
	if err := e.Close(); !errors.As(err, &de) {
		t.Errorf("Close: %v", err)
	}
	e.etcd.Close()
}
