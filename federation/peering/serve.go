package peering

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/hanse-mesh/hanse/federation/etcd"
	"github.com/hanse-mesh/hanse/federation/join"
	"github.com/hanse-mesh/hanse/federation/join/joinpb"
	"github.com/hanse-mesh/hanse/identity"
)

const (
	handshakeTime = 10 * time.Second
	maxHandshakes = 256       // at one time
	maxClaim      = 256 << 10 // bytes of a joiner's request, which has its bundle
)

// Serve answers on the federation port until ctx ends. What a connection may reach is decided by its handshake, and by separate servers:
//
//	SNI join.hanse.mesh, while a mesh token is open: any client that has the key of its certificate; hanse.join.v1 and nothing else
//	SNI probe.<member ID>: a verified client; nothing: the connection is closed
//	SNI replica.hanse.mesh: control planes of the own trust domain, which are this cluster's replicas: what Replicas returns
//	any other: control planes of trusted domains; the guard of the own etcd and hanse.join.v1
//
// Serve closes lis.
func (m *Mesh) Serve(ctx context.Context, lis net.Listener) error {
	options := append(etcd.ServerOptions(rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64()))), grpc.Creds(acceptedTLS{}))
	peers := grpc.NewServer(options...)
	strangers := grpc.NewServer(append(options, grpc.MaxRecvMsgSize(maxClaim), grpc.MaxConcurrentStreams(4))...)
	if m.guard != nil {
		m.guard.Register(peers)
	}
	joinpb.RegisterJoinServer(peers, m.join)
	joinpb.RegisterJoinServer(strangers, m.join)

	toPeers, toStrangers := newHandoff(lis.Addr()), newHandoff(lis.Addr())
	var work sync.WaitGroup
	work.Go(func() { peers.Serve(toPeers) })
	work.Go(func() { strangers.Serve(toStrangers) })
	stop := context.AfterFunc(ctx, func() { lis.Close() })
	defer stop()
	cfg := m.serverTLS()
	handshakes := make(chan struct{}, maxHandshakes)
	var err error
	for {
		var raw net.Conn
		if raw, err = lis.Accept(); err != nil {
			break
		}
		select {
		case handshakes <- struct{}{}:
			work.Go(func() {
				defer func() { <-handshakes }()
				m.accept(ctx, raw, cfg, toPeers, toStrangers)
			})
		default:
			raw.Close()
		}
	}
	lis.Close()
	toPeers.Close()
	toStrangers.Close()
	m.replicas.Close()
	peers.Stop()
	strangers.Stop()
	work.Wait()
	if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
		return nil
	}
	return fmt.Errorf("accept federation connections: %w", err)
}

// Replicas returns the listener of connections from other replicas of this control plane, after their handshake. Serve feeds it.
func (m *Mesh) Replicas() net.Listener { return m.replicas }

// accept makes the handshake and hands the connection on.
func (m *Mesh) accept(ctx context.Context, raw net.Conn, cfg *tls.Config, toPeers, toStrangers *handoff) {
	ctx, cancel := context.WithTimeout(ctx, handshakeTime)
	defer cancel()
	conn := tls.Server(raw, cfg)
	if err := conn.HandshakeContext(ctx); err != nil {
		raw.Close()
		m.log.Info("federation handshake refused", "address", raw.RemoteAddr().String(), "error", err)
		return
	}
	switch conn.ConnectionState().ServerName {
	case join.ProbeName(m.book.Load().Self):
		conn.SetDeadline(time.Now().Add(time.Second))
		conn.Close() // says close_notify: the client knows that it was accepted
	case join.ServerName:
		toStrangers.give(ctx, conn)
	case join.ReplicaName:
		if x, ok := raw.(interface{ Exempt() }); ok { // of drills
			x.Exempt()
		}
		m.replicas.give(ctx, conn)
	default:
		identity.Report(raw, conn.ConnectionState())
		toPeers.give(ctx, conn)
	}
}

// serverTLS is the federation port's configuration.
func (m *Mesh) serverTLS() *tls.Config {
	src := m.cfg.Source
	strict := identity.ServerTLS(src, authorizeControlPlane, "h2")
	strangers := identity.ServerTLS(src, identity.AuthorizeAny(), "h2")
	strangers.GetCertificate = m.certificateWithRoots
	strangers.VerifyConnection = func(tls.ConnectionState) error { return nil } // the join service verifies, against the bundle in the request
	probe := identity.ServerTLS(src, identity.AuthorizeAny(), "h2")
	probe.VerifyConnection = func(state tls.ConnectionState) error { return m.verifyProber(state.PeerCertificates) }
	replicas := identity.ServerTLS(src, identity.AuthorizeID(identity.ControlPlaneID(m.td)), "http/1.1")
	cfg := strict.Clone()
	cfg.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		b := m.book.Load()
		switch {
		case b == nil:
			return nil, errors.New("this control plane is still starting")
		case hello.ServerName == join.ServerName && m.join.Open():
			return strangers, nil
		case hello.ServerName == join.ServerName:
			return nil, errors.New("no mesh token is open")
		case hello.ServerName == join.ReplicaName && m.replicated():
			return replicas, nil
		case hello.ServerName == join.ProbeName(b.Self):
			return probe, nil
		}
		return strict, nil
	}
	return cfg
}

func authorizeControlPlane(id spiffeid.ID) error {
	if id != identity.ControlPlaneID(id.TrustDomain()) {
		return fmt.Errorf("peer is %s, want a control plane", id)
	}
	return nil
}

// certificateWithRoots adds this cluster's own authorities to its chain: a joiner knows only their hashes.
func (m *Mesh) certificateWithRoots(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	svid, err := m.cfg.Source.GetX509SVID()
	if err != nil {
		return nil, err
	}
	roots, err := m.cfg.Source.GetX509BundleForTrustDomain(m.td)
	if err != nil {
		return nil, err
	}
	cert := &tls.Certificate{PrivateKey: svid.PrivateKey, Leaf: svid.Certificates[0]}
	for _, c := range append(svid.Certificates[:len(svid.Certificates):len(svid.Certificates)], roots.X509Authorities()...) {
		cert.Certificate = append(cert.Certificate, c.Raw)
	}
	return cert, nil
}

// verifyProber accepts control planes of trusted domains, and that of an issuer with whom this cluster is joining just now.
func (m *Mesh) verifyProber(chain []*x509.Certificate) error {
	id, err := m.cfg.Source.Verify(chain)
	if err != nil && len(chain) > 0 {
		if claimed, idErr := x509svid.IDFromCert(chain[0]); idErr == nil {
			if b := m.provisionalBundle(claimed.TrustDomain()); b != nil {
				id, err = identity.Verify(chain, b, time.Now())
			}
		}
	}
	if err != nil {
		return fmt.Errorf("verify prober: %w", err)
	}
	return authorizeControlPlane(id)
}

// handoff is a listener of connections that were accepted elsewhere.
type handoff struct {
	addr  net.Addr
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newHandoff(addr net.Addr) *handoff {
	return &handoff{addr: addr, conns: make(chan net.Conn), done: make(chan struct{})}
}

func (h *handoff) give(ctx context.Context, c net.Conn) {
	select {
	case h.conns <- c:
	case <-h.done:
		c.Close()
	case <-ctx.Done():
		c.Close()
	}
}

// Accept implements net.Listener.
func (h *handoff) Accept() (net.Conn, error) {
	select {
	case c := <-h.conns:
		return c, nil
	case <-h.done:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (h *handoff) Close() error {
	h.once.Do(func() { close(h.done) })
	return nil
}

// Addr implements net.Listener.
func (h *handoff) Addr() net.Addr { return h.addr }

// acceptedTLS passes on connections whose handshake accept has made.
type acceptedTLS struct{}

// ServerHandshake implements credentials.TransportCredentials.
func (acceptedTLS) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, ok := c.(*tls.Conn)
	if !ok {
		return nil, nil, fmt.Errorf("connection of type %T has no TLS", c)
	}
	return conn, credentials.TLSInfo{
		State: conn.ConnectionState(), CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity},
	}, nil
}

// ClientHandshake implements credentials.TransportCredentials.
func (acceptedTLS) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("server side only")
}

// Info implements credentials.TransportCredentials.
func (acceptedTLS) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

// Clone implements credentials.TransportCredentials.
func (c acceptedTLS) Clone() credentials.TransportCredentials { return c }

// OverrideServerName implements credentials.TransportCredentials.
func (acceptedTLS) OverrideServerName(string) error { return nil }

// replicaAddr is the address of the listener of replicas, which is a part of another one.
type replicaAddr struct{}

// Network implements net.Addr.
func (replicaAddr) Network() string { return "tcp" }

// String implements net.Addr.
func (replicaAddr) String() string { return join.ReplicaName }
