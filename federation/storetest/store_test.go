package storetest_test

import (
	"net"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hanse-mesh/hanse/federation/etcd"
	"github.com/hanse-mesh/hanse/federation/storetest"
)

func TestMemory(t *testing.T) {
	storetest.Contract(t, func(*testing.T) (etcd.Store, func(int64)) {
		m := storetest.NewMemory(7)
		return m, m.Compact
	})
}

func TestLink(t *testing.T) {
	storetest.Contract(t, func(*testing.T) (etcd.Store, func(int64)) {
		m := storetest.NewMemory(7)
		return storetest.NewLink(m), m.Compact
	})
}

func start(t *testing.T) *etcd.Embedded {
	e, err := etcd.StartEmbedded(t.Context(), etcd.EmbeddedConfig{Dir: t.TempDir(), Name: "test"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	return e
}

func compacting(t *testing.T, e *etcd.Embedded) func(int64) {
	return func(rev int64) {
		if _, err := e.Client().Compact(t.Context(), rev); err != nil {
			t.Fatal(err)
		}
	}
}

func TestEmbedded(t *testing.T) {
	storetest.Contract(t, func(t *testing.T) (etcd.Store, func(int64)) {
		e := start(t)
		return e.Store(), compacting(t, e)
	})
}

// beforeRangeStream is an etcd older than 3.7.
type beforeRangeStream struct{ pb.KVServer }

func (beforeRangeStream) RangeStream(*pb.RangeRequest, pb.KV_RangeStreamServer) error {
	return status.Error(codes.Unimplemented, "unknown method RangeStream")
}

// TestExternal speaks to etcd over a socket, below a prefix.
func TestExternal(t *testing.T) {
	for name, old := range map[string]bool{"3.7": false, "before 3.7": true} {
		t.Run(name, func(t *testing.T) {
			e := start(t)
			kv, watch := e.Servers()
			if old {
				kv = beforeRangeStream{kv}
			}
			s := grpc.NewServer()
			pb.RegisterKVServer(s, kv)
			pb.RegisterWatchServer(s, watch)
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			done := make(chan struct{})
			go func() {
				defer close(done)
				_ = s.Serve(l)
			}()
			t.Cleanup(func() {
				s.Stop()
				<-done
			})
			storetest.Contract(t, func(t *testing.T) (etcd.Store, func(int64)) {
				x, err := etcd.DialExternal(t.Context(), etcd.ExternalConfig{Endpoints: []string{l.Addr().String()}, Prefix: t.Name() + "/"})
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { _ = x.Close() })
				return x.Store(), compacting(t, e)
			})
		})
	}
}

func TestExternalThatIsNotThere(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	_ = l.Close()
	if _, err := etcd.DialExternal(t.Context(), etcd.ExternalConfig{Endpoints: []string{addr}}); err == nil {
		t.Error("connected to nothing")
	} else {
		t.Log(err)
	}
}
