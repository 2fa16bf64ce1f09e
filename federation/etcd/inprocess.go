package etcd

import (
	"context"
	"io"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
)

// directKV calls a KVServer as a client would. etcd's own adapter has all but RangeStream.
type directKV struct {
	server pb.KVServer
	pb.KVClient
}

func (d directKV) RangeStream(ctx context.Context, in *pb.RangeRequest, _ ...grpc.CallOption) (pb.KV_RangeStreamClient, error) {
	s := &rangePipe{ctx: ctx, chunks: make(chan *pb.RangeStreamResponse, 1)}
	go func() {
		defer close(s.chunks)
		s.err = d.server.RangeStream(in, rangePipeServer{s})
	}()
	return rangePipeClient{s}, nil
}

// rangePipe joins the two ends of an in-process RangeStream. err is read after chunks is closed.
type rangePipe struct {
	ctx    context.Context
	chunks chan *pb.RangeStreamResponse
	err    error
}

type rangePipeServer struct{ *rangePipe }

func (s rangePipeServer) Send(r *pb.RangeStreamResponse) error {
	select {
	case s.chunks <- r:
		return nil
	case <-s.ctx.Done():
		return s.ctx.Err()
	}
}

func (s rangePipeServer) Context() context.Context     { return s.ctx }
func (s rangePipeServer) SetHeader(metadata.MD) error  { return nil }
func (s rangePipeServer) SendHeader(metadata.MD) error { return nil }
func (s rangePipeServer) SetTrailer(metadata.MD)       {}
func (s rangePipeServer) SendMsg(m any) error          { return s.Send(m.(*pb.RangeStreamResponse)) }
func (s rangePipeServer) RecvMsg(any) error            { return io.EOF }

type rangePipeClient struct{ *rangePipe }

func (c rangePipeClient) Recv() (*pb.RangeStreamResponse, error) {
	r, ok := <-c.chunks
	switch {
	case ok:
		return r, nil
	case c.err != nil:
		return nil, c.err
	}
	return nil, io.EOF
}

func (c rangePipeClient) Context() context.Context     { return c.ctx }
func (c rangePipeClient) Header() (metadata.MD, error) { return nil, nil }
func (c rangePipeClient) Trailer() metadata.MD         { return nil }
func (c rangePipeClient) CloseSend() error             { return nil }
func (c rangePipeClient) SendMsg(any) error            { return io.EOF }
func (c rangePipeClient) RecvMsg(any) error            { return io.EOF }
