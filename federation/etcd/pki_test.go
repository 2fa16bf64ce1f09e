package etcd_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"math/big"
	mrand "math/rand/v2"
	"net"
	"net/url"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/hanse-mesh/hanse/federation/etcd"
	"github.com/hanse-mesh/hanse/identity"
)

// authority is the certificate authority of one trust domain.
type authority struct {
	td     spiffeid.TrustDomain
	cert   *x509.Certificate
	key    *ecdsa.PrivateKey
	bundle *spiffebundle.Bundle
}

func newAuthority(t testing.TB, td string) *authority {
	t.Helper()
	a := &authority{td: spiffeid.RequireTrustDomainFromString(td)}
	var err error
	if a.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, URIs: []*url.URL{a.td.ID().URL()},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, a.key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	a.bundle = spiffebundle.FromX509Authorities(a.td, []*x509.Certificate{a.cert})
	return a
}

// svid makes a control plane's X509-SVID.
func (a *authority) svid(t testing.TB, id spiffeid.ID) *x509svid.SVID {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, URIs: []*url.URL{id.URL()},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &x509svid.SVID{ID: id, Certificates: []*x509.Certificate{cert}, PrivateKey: key}
}

// source is an identity of a that trusts these authorities.
func (a *authority) source(t testing.TB, trusted ...*authority) *identity.Source {
	s := identity.NewSource()
	s.Set(a.svid(t, identity.ControlPlaneID(a.td)), bundles(append(trusted, a)...))
	return s
}

func bundles(as ...*authority) map[spiffeid.TrustDomain]*spiffebundle.Bundle {
	m := map[spiffeid.TrustDomain]*spiffebundle.Bundle{}
	for _, a := range as {
		m[a.td] = a.bundle
	}
	return m
}

// startEmbedded starts an etcd that ends with the test.
func startEmbedded(t testing.TB, dir string) *etcd.Embedded {
	t.Helper()
	e, err := etcd.StartEmbedded(context.Background(), etcd.EmbeddedConfig{Dir: dir, Name: "test"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = e.Close() })
	return e
}

// listener serves a Guard at one loopback address, and can go away and come back there.
type listener struct {
	t      testing.TB
	guard  *etcd.Guard
	source *identity.Source
	addr   string
	server *grpc.Server
	done   chan struct{}
}

func serve(t testing.TB, g *etcd.Guard, source *identity.Source) *listener {
	l := &listener{t: t, guard: g, source: source, addr: "127.0.0.1:0"}
	l.start()
	t.Cleanup(l.stop)
	return l
}

func (l *listener) start() {
	l.t.Helper()
	lis, err := net.Listen("tcp", l.addr)
	if err != nil {
		l.t.Fatal(err)
	}
	if l.server == nil {
		l.addr = lis.Addr().String()
	}
	opts := etcd.ServerOptions(mrand.New(mrand.NewPCG(1, 2)))
	l.server = grpc.NewServer(append(opts, grpc.Creds(credentials.NewTLS(identity.ServerTLS(l.source, identity.AuthorizeAny(), "h2"))))...)
	l.guard.Register(l.server)
	l.done = make(chan struct{})
	go func(s *grpc.Server, done chan struct{}) {
		defer close(done)
		_ = s.Serve(lis)
	}(l.server, l.done)
}

func (l *listener) stop() {
	l.server.Stop()
	<-l.done
}

// netFault is a dialer whose connections can be turned into a black hole.
type netFault struct {
	mu    sync.Mutex
	hole  bool
	conns []*faultConn
}

func (n *netFault) dial(ctx context.Context, addr string) (net.Conn, error) {
	n.mu.Lock()
	hole := n.hole
	n.mu.Unlock()
	if hole {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	c, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	fc := &faultConn{Conn: c, n: n, closed: make(chan struct{})}
	n.mu.Lock()
	n.conns = append(n.conns, fc)
	n.mu.Unlock()
	return fc, nil
}

// blackHole makes all present connections swallow what is sent and deliver nothing, for good; new ones are not made until healed.
func (n *netFault) blackHole(on bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.hole = on
	for _, c := range n.conns {
		c.mu.Lock()
		c.dead = true
		c.mu.Unlock()
	}
}

type faultConn struct {
	net.Conn
	n      *netFault
	once   sync.Once
	closed chan struct{}
	mu     sync.Mutex
	dead   bool
}

func (c *faultConn) isDead() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.dead
}

func (c *faultConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if c.isDead() {
		<-c.closed
		return 0, net.ErrClosed
	}
	return n, err
}

func (c *faultConn) Write(b []byte) (int, error) {
	if c.isDead() {
		return len(b), nil
	}
	return c.Conn.Write(b)
}

func (c *faultConn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}
