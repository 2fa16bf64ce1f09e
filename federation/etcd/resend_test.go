package etcd_test

import (
	"context"
	"net"
	"sync/atomic"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hanse-mesh/hanse/federation/etcd"
)

// losing is an etcd whose answers to Txns are lost while lose is above zero; before is what happens between a lost one and the next.
type losing struct {
	pb.KVServer
	lose   atomic.Int64
	hang   atomic.Bool // instead of breaking
	before func()
	change atomic.Int64 // so many Ranges are told that the leader has changed
}

func (s *losing) Range(ctx context.Context, r *pb.RangeRequest) (*pb.RangeResponse, error) {
	if s.change.Add(-1) >= 0 {
		return nil, rpctypes.ErrGRPCLeaderChanged
	}
	return s.KVServer.Range(ctx, r)
}

func (s *losing) Txn(ctx context.Context, r *pb.TxnRequest) (*pb.TxnResponse, error) {
	a, err := s.KVServer.Txn(ctx, r)
	if err == nil && s.lose.Add(-1) >= 0 {
		if s.before != nil {
			s.before()
		}
		if s.hang.Load() {
			<-ctx.Done()
		}
		return nil, status.Error(codes.Unavailable, "error reading from server: EOF")
	}
	return a, err
}

// TestExternalLostAnswers loses the answer to a write that was done: it is neither refused nor done twice, and one that others were before is.
func TestExternalLostAnswers(t *testing.T) {
	t.Parallel()
	e := startEmbedded(t, t.TempDir())
	kv, watch := e.Servers()
	lost := &losing{KVServer: kv}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	pb.RegisterKVServer(s, lost)
	pb.RegisterWatchServer(s, watch)
	served := make(chan struct{})
	go func() { defer close(served); _ = s.Serve(l) }()
	defer func() { s.Stop(); <-served }()
	x, err := etcd.DialExternal(t.Context(), etcd.ExternalConfig{Endpoints: []string{l.Addr().String()}})
	if err != nil {
		t.Fatal(err)
	}
	defer x.Close()
	store := etcd.NewKV(x.Store(), "")
	own := etcd.NewKV(e.Store(), "")

	lost.lose.Store(2)
	rev, err := store.Put(t.Context(), "a", []byte("1"))
	if _, have, _ := own.Get(t.Context(), "a"); err != nil || rev != have {
		t.Errorf("a write whose answers were lost: revision %d, stored at %d: %v", rev, have, err)
	}
	lost.lose.Store(1)
	ok, rev, err := store.CompareAndPut(t.Context(), "a", []byte("2"), rev)
	if _, have, _ := own.Get(t.Context(), "a"); err != nil || !ok || rev != have {
		t.Errorf("a write under a compare whose answer was lost: %v, revision %d, stored at %d: %v", ok, rev, have, err)
	}
	lost.lose.Store(1)
	if ok, err := store.CompareAndDelete(t.Context(), "a", rev); err != nil || !ok {
		t.Errorf("a deletion under a compare whose answer was lost: %v %v", ok, err)
	}
	lost.lose.Store(1)
	if ok, err := store.PutIfAbsent(t.Context(), "b", []byte("mine")); err != nil || !ok {
		t.Errorf("a first write whose answer was lost: %v %v", ok, err)
	}
	lost.lose.Store(1)
	if ok, err := store.PutIfAbsent(t.Context(), "b", []byte("yours")); err != nil || ok {
		t.Errorf("a write that was refused, and its answer lost: %v %v", ok, err)
	}

	// etcd elects another leader while it is asked whether a write was done, and while it is read.
	lost.lose.Store(1)
	lost.before = func() { lost.change.Store(2) }
	if ok, err := store.PutIfAbsent(t.Context(), "d", []byte("mine")); err != nil || !ok {
		t.Errorf("a first write whose answer was lost by an election: %v %v", ok, err)
	}
	lost.before = nil
	lost.change.Store(2)
	if v, _, err := store.Get(t.Context(), "d"); err != nil || string(v) != "mine" {
		t.Errorf("read during an election: %q %v", v, err)
	}

	// It does not break, and never comes.
	lost.hang.Store(true)
	lost.lose.Store(1)
	if ok, err := store.PutIfAbsent(t.Context(), "c", []byte("mine")); err != nil || !ok {
		t.Errorf("a first write that was never answered: %v %v", ok, err)
	}
	lost.hang.Store(false)

	// Another one writes before it is known that this one did: then it is as if this one had been refused.
	lost.before = func() {
		if _, err := own.Put(context.Background(), "b", []byte("another's")); err != nil {
			t.Error(err)
		}
	}
	_, rev, _ = store.Get(t.Context(), "b")
	lost.lose.Store(1)
	if ok, _, err := store.CompareAndPut(t.Context(), "b", []byte("new"), rev); err != nil || ok {
		t.Errorf("a write that was overtaken: %v %v", ok, err)
	}
	if v, _, _ := own.Get(t.Context(), "b"); string(v) != "another's" {
		t.Errorf("stored is %q", v)
	}
}
