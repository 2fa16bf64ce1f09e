package etcd

import (
	"context"
	"errors"
	"io"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// Servers returns the API of the external etcd, passed through, for a Guard. The Guard's keys are the external ones, so Prefix must be empty.
func (x *External) Servers() (pb.KVServer, pb.WatchServer) {
	conn := x.client.ActiveConnection()
	return passKV{client: pb.NewKVClient(conn)}, passWatch{client: pb.NewWatchClient(conn)}
}

type passKV struct {
	pb.UnimplementedKVServer
	client pb.KVClient
}

func (p passKV) Range(ctx context.Context, r *pb.RangeRequest) (*pb.RangeResponse, error) {
	return p.client.Range(ctx, r)
}

func (p passKV) RangeStream(r *pb.RangeRequest, down pb.KV_RangeStreamServer) error {
	up, err := p.client.RangeStream(down.Context(), r)
	if err != nil {
		return err
	}
	for {
		chunk, err := up.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := down.Send(chunk); err != nil {
			return err
		}
	}
}

type passWatch struct {
	pb.UnimplementedWatchServer
	client pb.WatchClient
}

// Watch joins the peer's stream to one of the external etcd. If that breaks, so does the peer's: it comes again with its own revision.
func (p passWatch) Watch(down pb.Watch_WatchServer) error {
	ctx, cancel := context.WithCancel(down.Context())
	defer cancel()
	up, err := p.client.Watch(ctx)
	if err != nil {
		return err
	}
	go func() { // ends when Watch returns, since gRPC then ends down's Recv
		defer cancel()
		for {
			r, err := down.Recv()
			if err != nil || up.Send(r) != nil {
				return
			}
		}
	}()
	for {
		r, err := up.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := down.Send(r); err != nil {
			return err
		}
	}
}
