package xdsserver

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"log/slog"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/identity"
)

// authority is a trust domain with one root.
type authority struct {
	td   spiffeid.TrustDomain
	cert *x509.Certificate
	key  crypto.Signer
}

func newAuthority(t testing.TB, td string) *authority {
	t.Helper()
	a := &authority{td: spiffeid.RequireTrustDomainFromString(td)}
	a.key = newKey(t)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: td},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		URIs: []*url.URL{a.td.ID().URL()},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, a.key.Public(), a.key)
	must(t, err)
	a.cert, err = x509.ParseCertificate(der)
	must(t, err)
	return a
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	return k
}

func (a *authority) svid(t testing.TB, path string) *x509svid.SVID {
	t.Helper()
	id, err := spiffeid.FromPath(a.td, path)
	must(t, err)
	key := newKey(t)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true, URIs: []*url.URL{id.URL()},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, key.Public(), a.key)
	must(t, err)
	leaf, err := x509.ParseCertificate(der)
	must(t, err)
	return &x509svid.SVID{ID: id, Certificates: []*x509.Certificate{leaf}, PrivateKey: key}
}

func (a *authority) bundle() *spiffebundle.Bundle {
	b := spiffebundle.New(a.td)
	b.AddX509Authority(a.cert)
	return b
}

func bundles(of ...*authority) map[spiffeid.TrustDomain]*spiffebundle.Bundle {
	out := make(map[spiffeid.TrustDomain]*spiffebundle.Bundle)
	for _, a := range of {
		out[a.td] = a.bundle()
	}
	return out
}

func (a *authority) source(t testing.TB, path string, trusted ...*authority) *identity.Source {
	t.Helper()
	src := identity.NewSource()
	src.Set(a.svid(t, path), bundles(append(trusted, a)...))
	return src
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// harness is a Server on loopback.
type harness struct {
	*Server
	t    testing.TB
	own  *authority
	src  *identity.Source
	addr string
	reg  *prometheus.Registry
}

func start(t testing.TB, change ...func(*Config)) *harness {
	t.Helper()
	return startFor(t, newAuthority(t, "west.demo"), change...)
}

// startFor serves a trust domain.
func startFor(t testing.TB, own *authority, change ...func(*Config)) *harness {
	t.Helper()
	h := &harness{t: t, own: own, src: own.source(t, "/hanse/control-plane"), reg: prometheus.NewRegistry()}
	cfg := Config{Source: h.src, TrustDomain: own.td, Debounce: time.Millisecond, Registerer: h.reg, Log: slog.New(slog.DiscardHandler)}
	for _, f := range change {
		f(&cfg)
	}
	var err error
	h.Server, err = New(cfg)
	must(t, err)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	h.addr = ln.Addr().String()
	g := grpc.NewServer(h.ServerOptions()...)
	h.Register(g)
	served := make(chan error, 2)
	ctx, cancel := context.WithCancel(context.Background())
	go func() { served <- g.Serve(ln) }()
	go func() { served <- h.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		g.Stop()
		for range 2 {
			if err := <-served; err != nil {
				t.Errorf("server: %v", err)
			}
		}
	})
	return h
}

// view makes set current and waits until it is.
func (h *harness) view(set *discovery.Clusterset) {
	h.t.Helper()
	h.SetView(set)
	eventually(h.t, func() bool { return h.View().Set == set })
}

func eventually(t testing.TB, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("did not happen")
		}
	}
}

// dial connects with an SVID of an authority.
func (h *harness) dial(a *authority, path string) *grpc.ClientConn {
	h.t.Helper()
	src := a.source(h.t, path, h.own)
	conn, err := grpc.NewClient(h.addr, grpc.WithTransportCredentials(credentials.NewTLS(clientTLS(src, h.own))))
	must(h.t, err)
	h.t.Cleanup(func() { conn.Close() })
	return conn
}

func clientTLS(src *identity.Source, server *authority) *tls.Config {
	return identity.ClientTLS(src, identity.AuthorizeID(identity.ControlPlaneID(server.td)), "h2")
}

func node(id, agent string, meta map[string]any) *corev3.Node {
	m, _ := structpb.NewStruct(meta)
	return &corev3.Node{
		Id: id, Locality: &corev3.Locality{Region: "eu-1", Zone: "eu-1a"}, Metadata: m,
		UserAgentName: agent, UserAgentVersionType: &corev3.Node_UserAgentVersion{UserAgentVersion: "test"},
	}
}

// deltaClient is a client of the incremental variant.
type deltaClient struct {
	t      testing.TB
	stream grpc.BidiStreamingClient[discoveryv3.DeltaDiscoveryRequest, discoveryv3.DeltaDiscoveryResponse]
	node   *corev3.Node
	got    chan *discoveryv3.DeltaDiscoveryResponse
	err    error // set when got is closed
}

func (h *harness) delta(conn *grpc.ClientConn, n *corev3.Node) *deltaClient {
	h.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	h.t.Cleanup(cancel)
	stream, err := discoveryv3.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx)
	must(h.t, err)
	c := &deltaClient{t: h.t, stream: stream, node: n, got: make(chan *discoveryv3.DeltaDiscoveryResponse, 10000)}
	go func() {
		defer close(c.got)
		for {
			resp, err := stream.Recv()
			if err != nil {
				c.err = err
				return
			}
			c.got <- resp
		}
	}()
	return c
}

func (c *deltaClient) send(req *discoveryv3.DeltaDiscoveryRequest) {
	c.t.Helper()
	req.Node, c.node = c.node, nil
	must(c.t, c.stream.Send(req))
}

func (c *deltaClient) subscribe(typeURL string, names ...string) {
	c.t.Helper()
	c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: typeURL, ResourceNamesSubscribe: names})
}

// recv returns the next response, which it acknowledges.
func (c *deltaClient) recv() *discoveryv3.DeltaDiscoveryResponse {
	c.t.Helper()
	resp := c.next()
	c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: resp.TypeUrl, ResponseNonce: resp.Nonce})
	return resp
}

func (c *deltaClient) next() *discoveryv3.DeltaDiscoveryResponse {
	c.t.Helper()
	select {
	case resp, ok := <-c.got:
		if !ok {
			c.t.Fatalf("stream ended: %v", c.err)
		}
		return resp
	case <-time.After(10 * time.Second):
		c.t.Fatal("no response")
		return nil
	}
}

// ended waits for the stream's end.
func (c *deltaClient) ended() error {
	c.t.Helper()
	for {
		select {
		case _, ok := <-c.got:
			if !ok {
				return c.err
			}
		case <-time.After(10 * time.Second):
			c.t.Fatal("the stream goes on")
		}
	}
}

// expect checks type, resource names and removed names of the next response.
func (c *deltaClient) expect(typeURL string, resources, removed []string) *discoveryv3.DeltaDiscoveryResponse {
	c.t.Helper()
	resp := c.recv()
	var names []string
	for _, r := range resp.Resources {
		names = append(names, r.Name)
	}
	if resp.TypeUrl != typeURL || !equal(names, resources) || !equal(resp.RemovedResources, removed) {
		c.t.Fatalf("got %s %q removed %q, want %s %q removed %q", shortType(resp.TypeUrl), names, resp.RemovedResources, shortType(typeURL), resources, removed)
	}
	return resp
}

func equal(a, b []string) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return true
}

// shop is a small clusterset; each call makes new objects.
type shop struct {
	services map[string][]*discovery.Endpoint // namespace shop, port 8080
	protocol discovery.AppProtocol
	exported bool
	access   []*discovery.AccessPolicy
	routes   []*discovery.Route
	imports  []*discovery.Import
	members  map[string]*discovery.Member
}

func (s shop) set() *discovery.Clusterset {
	if s.protocol == "" {
		s.protocol = discovery.HTTP
	}
	out := &discovery.Clusterset{
		Local: &discovery.Snapshot{
			Self:   discovery.Self{Cluster: "west", TrustDomain: "west.demo", Network: "west", Region: "eu-1", Gateways: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:1")}},
			Access: s.access, Routes: s.routes,
		},
		Members: s.members,
	}
	for name, endpoints := range s.services {
		n := discovery.Name{Namespace: "shop", Name: name}
		svc := &discovery.Service{Name: n, Ports: []discovery.Port{{Name: "p", Number: 8080, Protocol: s.protocol}}, Endpoints: endpoints}
		if s.exported {
			svc.Export = &discovery.Export{}
		}
		out.Local.Services = out.Local.Services.Put(n, svc)
	}
	for _, i := range s.imports {
		out.Imports = out.Imports.Put(i.Name, i)
	}
	return out
}

func endpoint(id, addr, account string) *discovery.Endpoint {
	return &discovery.Endpoint{
		ID:      id,
		Address: netip.MustParseAddr(addr),
		Profile: &discovery.Profile{Ports: map[string]uint16{"p": 9000}, Transport: discovery.Hop, SPIFFEID: "spiffe://west.demo/ns/shop/sa/" + account, Locality: discovery.Locality{Cluster: "west", Region: "eu-1", Zone: "eu-1a"}, Network: "west"},
		Ready:   true,
	}
}

func name(service string) string {
	return discovery.Name{Namespace: "shop", Name: service}.Authority(8080)
}
