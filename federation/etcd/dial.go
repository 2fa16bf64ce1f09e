package etcd

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"

	"github.com/hanse-mesh/hanse/identity"
)

// maxResponse bounds one message of a peer: RangeStream sends chunks of about 2 MiB.
const maxResponse = 64 << 20

// Remote is a connection to a peer.
type Remote interface {
	Reader
	Close() error
}

// PeerConfig says how to reach a peer's federation listener.
type PeerConfig struct {
	Addresses []string                                                 // host:port, tried in order
	TLS       *tls.Config                                              // identity.ClientTLS; it checks the peer's whole SPIFFE ID
	Dialer    func(ctx context.Context, addr string) (net.Conn, error) // nil is TCP
}

// DialPeer returns a connection to a peer, which is made at the first call over it. Its errors name what the handshake said.
func DialPeer(_ context.Context, cfg PeerConfig) (Remote, error) {
	r := manual.NewBuilderWithScheme("hanse-peer")
	var state resolver.State
	for _, a := range cfg.Addresses {
		state.Endpoints = append(state.Endpoints, resolver.Endpoint{Addresses: []resolver.Address{{Addr: a}}})
	}
	r.InitialState(state)
	opts := []grpc.DialOption{
		grpc.WithResolvers(r),
		grpc.WithTransportCredentials(reporting{credentials.NewTLS(cfg.TLS)}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: keepaliveTime, Timeout: keepaliveTimeout, PermitWithoutStream: true}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxResponse)),
		connectParams(),
	}
	if cfg.Dialer != nil {
		opts = append(opts, grpc.WithContextDialer(cfg.Dialer))
	}
	conn, err := grpc.NewClient("hanse-peer:///federation", opts...)
	if err != nil {
		return nil, fmt.Errorf("connect to %v: %w", cfg.Addresses, err)
	}
	return &remote{newWire(conn), conn}, nil
}

// reporting tells a connection on whose chain it rests, so that it ends when the bundles no longer verify it.
type reporting struct {
	credentials.TransportCredentials
}

// ClientHandshake is the wrapped one's, and a report.
func (r reporting) ClientHandshake(ctx context.Context, authority string, below net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := r.TransportCredentials.ClientHandshake(ctx, authority, below)
	if t, ok := info.(credentials.TLSInfo); ok && err == nil {
		identity.Report(below, t.State)
	}
	return conn, info, err
}

// Clone keeps the reports.
func (r reporting) Clone() credentials.TransportCredentials {
	return reporting{r.TransportCredentials.Clone()}
}

type remote struct {
	*wire
	conn *grpc.ClientConn
}

func (r *remote) Close() error { return r.conn.Close() }
