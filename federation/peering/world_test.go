package peering_test

import (
	"cmp"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/test/bufconn"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/federation/etcd"
	"github.com/hanse-mesh/hanse/federation/peering"
	"github.com/hanse-mesh/hanse/federation/storetest"
	"github.com/hanse-mesh/hanse/identity"
)

// world is a few control planes in one process: real meshes, TLS and gRPC, stores and a network in memory.
type world struct {
	t        testing.TB
	log      *slog.Logger
	clusters map[string]*cluster
	network  *network
}

func newWorld(t testing.TB) *world {
	w := &world{t: t, log: slog.New(slog.DiscardHandler), clusters: map[string]*cluster{}, network: &network{
		listeners: map[string]*bufconn.Listener{}, owner: map[string]string{}, cut: map[[2]string]bool{}, conns: map[net.Conn][2]string{},
	}}
	if os.Getenv("HANSE_TEST_LOG") != "" {
		w.log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	return w
}

// cluster is what outlives its control plane, and the control plane.
type cluster struct {
	w            *world
	name         string
	self         discovery.Self
	address      string
	advertise    string // if not address
	own, imports *storetest.Memory
	fault        *faulty // in front of own
	ca           *authority
	source       *identity.Source
	bundles      *bundles
	version      string
	role         func() peering.Role // of a replica
	replica      string
	skew         time.Duration
	local        *discovery.Snapshot

	mu    sync.Mutex
	links map[string]*storetest.Link // to other clusters' stores; guarded by mu

	mesh atomic.Pointer[peering.Mesh]
	stop func()
}

// add makes a cluster with one gateway on a network of its own, and starts it.
func (w *world) add(name string) *cluster {
	n := byte(len(w.clusters) + 1)
	c := w.make(name, n)
	w.gateway(c, true)
	c.start()
	return c
}

func (w *world) make(name string, n byte) *cluster {
	td := spiffeid.RequireTrustDomainFromString(name + ".demo")
	c := &cluster{
		w: w, name: name, address: name + ".test:7443", version: "v0.1.0", links: map[string]*storetest.Link{},
		own: storetest.NewMemory(uint64(n)), imports: storetest.NewMemory(uint64(n) + 100),
		self: discovery.Self{
			Cluster: name, TrustDomain: td.Name(), Network: name + "-net", Region: "eu-1",
			Gateways: []netip.AddrPort{netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, n, 9}), 15443)},
		},
		ca: newAuthority(w.t, td), source: identity.NewSource(),
	}
	c.fault = &faulty{Store: c.own}
	c.bundles = &bundles{source: c.source, all: map[spiffeid.TrustDomain]*spiffebundle.Bundle{td: c.ca.bundle()}}
	c.source.Set(c.ca.svid(identity.ControlPlaneID(td)), c.bundles.all)
	c.local = &discovery.Snapshot{Self: c.self, Complete: true}
	w.clusters[name] = c
	w.network.listen(c.address, name)
	w.network.listen(c.self.Gateways[0].String(), name)
	return c
}

// start runs the control plane on what the cluster has stored.
func (c *cluster) start() {
	c.w.t.Helper()
	m, err := peering.New(peering.Config{
		Self: c.self, MeshName: "demo", Version: c.version, Advertise: []string{cmp.Or(c.advertise, c.address)}, Source: c.source, Bundles: c.bundles,
		Own: c.fault, Imports: c.imports, Role: c.role, Replica: c.replica, DialPeer: c.dialPeer, JoinRate: 1000, Log: c.w.log.With("at", c.name),
		Dial: func(ctx context.Context, _, address string) (net.Conn, error) {
			return c.w.network.dial(ctx, c.name, address)
		},
		Now: func() time.Time { return time.Now().Add(c.skew) },
	})
	if err != nil {
		c.w.t.Fatal(err)
	}
	m.SetLocal(c.local)
	ctx, cancel := context.WithCancel(c.w.t.Context())
	var running sync.WaitGroup
	running.Go(func() {
		if err := m.Run(ctx); err != nil {
			c.w.t.Errorf("%s: %v", c.name, err)
		}
	})
	running.Go(func() {
		if err := m.Serve(ctx, c.w.network.listen(c.address, c.name)); err != nil {
			c.w.t.Errorf("%s: %v", c.name, err)
		}
	})
	c.stop = func() {
		cancel()
		c.w.network.kill(c.name, c.address)
		c.cutLinks()
		running.Wait()
		c.stop = nil
		c.mesh.Store(nil)
	}
	c.mesh.Store(m)
	<-m.Loaded()
}

func (w *world) stop() {
	for _, c := range w.clusters {
		if c.stop != nil {
			c.stop()
		}
		w.gateway(c, false)
	}
	w.network.close()
}

// join lets joiner join through issuer, as a person would.
func (w *world) join(joiner, issuer string) error {
	token, _, err := w.clusters[issuer].mesh.Load().CreateToken(w.t.Context(), joiner, 0)
	if err != nil {
		return fmt.Errorf("create token: %w", err)
	}
	_, err = w.clusters[joiner].mesh.Load().Join(w.t.Context(), token, func(peering.Progress) {})
	return err
}

// export gives a cluster a service with that many endpoints; 0 takes it away.
func (c *cluster) export(name discovery.Name, endpoints int, audience ...string) {
	next := *c.local
	svc := &discovery.Service{
		Name: name, Ports: []discovery.Port{{Name: "http", Number: 80, Protocol: discovery.HTTP}},
		Export: &discovery.Export{Created: time.Now().UTC().Truncate(time.Second), Audience: audience},
	}
	if old := next.Services.Get(name); old != nil {
		svc.Export.Created = old.Export.Created
	}
	for i := range endpoints {
		svc.Endpoints = append(svc.Endpoints, &discovery.Endpoint{
			ID:      fmt.Sprintf("%016x%016x", len(c.name), i),
			Address: netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}),
			Profile: &discovery.Profile{Ports: map[string]uint16{"http": 8080}, Transport: discovery.Hop, SPIFFEID: "spiffe://" + c.self.TrustDomain + "/ns/" + name.Namespace + "/sa/" + name.Name, Locality: discovery.Locality{Cluster: c.name, Region: "eu-1", Zone: "eu-1a"}, Network: c.self.Network},
			Ready:   true,
		})
	}
	next.Services = next.Services.Put(name, svc)
	if endpoints == 0 {
		next.Services = next.Services.Delete(name)
	}
	c.setLocal(&next)
}

func (c *cluster) setLocal(s *discovery.Snapshot) {
	c.local = s
	if m := c.mesh.Load(); m != nil {
		m.SetLocal(s)
	}
}

// link is c's way to another cluster's exports.
func (c *cluster) link(to string) *storetest.Link {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.links[to] == nil {
		c.links[to] = storetest.NewLink(&guarded{c.w.clusters[to], c})
	}
	return c.links[to]
}

func (c *cluster) cutLinks() {
	for name, other := range c.w.clusters {
		if name != c.name {
			l := other.link(c.name)
			l.Cut()
		}
	}
}

func (c *cluster) healLinks() {
	for name, other := range c.w.clusters {
		if name != c.name && other.stop != nil && !c.w.network.isCut(c.name, name) {
			other.link(c.name).Heal()
		}
	}
}

func (c *cluster) dialPeer(_ context.Context, to peering.Target) (etcd.Remote, error) {
	for _, other := range c.w.clusters {
		if other.self.TrustDomain == to.TrustDomain.Name() {
			return c.link(other.name), nil
		}
	}
	return nil, fmt.Errorf("no cluster of %s", to.TrustDomain)
}

// guarded is a cluster's own store behind what its Mesh authorises, for one reader.
type guarded struct{ of, reader *cluster }

func (g *guarded) allow(path string) error {
	m := g.of.mesh.Load()
	if m == nil {
		return storetest.ErrCut
	}
	td := spiffeid.RequireTrustDomainFromString(g.reader.self.TrustDomain)
	if _, err := g.of.source.GetX509BundleForTrustDomain(td); err != nil {
		return err
	}
	if _, err := g.reader.source.GetX509BundleForTrustDomain(spiffeid.RequireTrustDomainFromString(g.of.self.TrustDomain)); err != nil {
		return err
	}
	prefixes, ok := peering.AuthorizePrefixes(m, identity.ControlPlaneID(td))
	if !ok || !slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(path, p) }) {
		return fmt.Errorf("%s for %s: %w", path, g.reader.name, etcd.ErrPermissionDenied)
	}
	return nil
}

func (g *guarded) Get(ctx context.Context, key string, revision int64) (*etcd.KeyValue, etcd.Header, error) {
	if err := g.allow(key); err != nil {
		return nil, etcd.Header{}, err
	}
	return g.of.own.Get(ctx, key, revision)
}

func (g *guarded) List(ctx context.Context, prefix string, revision int64, each func(etcd.KeyValue) error) (etcd.Header, error) {
	if err := g.allow(prefix); err != nil {
		return etcd.Header{}, err
	}
	return g.of.own.List(ctx, prefix, revision, each)
}

func (g *guarded) Watch(ctx context.Context, prefix string, from int64) (etcd.Watcher, error) {
	if err := g.allow(prefix); err != nil {
		return nil, err
	}
	return g.of.own.Watch(ctx, prefix, from)
}

func (g *guarded) Txn(context.Context, []etcd.Compare, []etcd.Op) (bool, etcd.Header, error) {
	return false, etcd.Header{}, errors.New("peers never write")
}

var errCrashed = errors.New("the process was killed")

// faulty is a store whose process is killed after so many writes to the Book and the tokens.
type faulty struct {
	etcd.Store
	left    atomic.Int64 // writes until the kill, if armed
	armed   atomic.Bool
	crashed atomic.Bool
}

func (f *faulty) killAfter(writes int64) {
	f.left.Store(writes)
	f.armed.Store(true)
}

func (f *faulty) revive() (crashed bool) {
	f.armed.Store(false)
	return f.crashed.Swap(false)
}

func (f *faulty) Txn(ctx context.Context, c []etcd.Compare, ops []etcd.Op) (bool, etcd.Header, error) {
	if f.crashed.Load() {
		return false, etcd.Header{}, errCrashed
	}
	if f.armed.Load() && strings.HasPrefix(ops[0].Key, "mesh/") && f.left.Add(-1) < 0 {
		f.crashed.Store(true)
		return false, etcd.Header{}, errCrashed
	}
	return f.Store.Txn(ctx, c, ops)
}

// bundles is a trust store that is nothing but the Source.
type bundles struct {
	source *identity.Source
	mu     sync.Mutex
	all    map[spiffeid.TrustDomain]*spiffebundle.Bundle // guarded by mu
}

func (b *bundles) change(f func()) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	f()
	b.source.SetBundles(b.all)
	return nil
}

func (b *bundles) Add(td spiffeid.TrustDomain, x *spiffebundle.Bundle) error {
	return b.change(func() { b.all[td] = x })
}

func (b *bundles) Update(td spiffeid.TrustDomain, x *spiffebundle.Bundle) error {
	return b.change(func() {
		if b.all[td] != nil {
			b.all[td] = x
		}
	})
}

func (b *bundles) Remove(td spiffeid.TrustDomain) error {
	return b.change(func() { delete(b.all, td) })
}

// authority is a trust domain's CA.
type authority struct {
	t    testing.TB
	td   spiffeid.TrustDomain
	key  crypto.Signer
	root *x509.Certificate
}

func newAuthority(t testing.TB, td spiffeid.TrustDomain) *authority {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	a := &authority{t: t, td: td, key: key}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(1000 * time.Hour), IsCA: true,
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, URIs: []*url.URL{td.ID().URL()},
	}
	a.root = a.sign(template, template, key.Public())
	return a
}

func (a *authority) sign(template, parent *x509.Certificate, pub crypto.PublicKey) *x509.Certificate {
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return cert
}

func (a *authority) bundle() *spiffebundle.Bundle {
	b := spiffebundle.FromX509Authorities(a.td, []*x509.Certificate{a.root})
	b.SetSequenceNumber(1)
	return b
}

func (a *authority) svid(id spiffeid.ID) *x509svid.SVID {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	leaf := a.sign(&x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: time.Now().Add(-15 * time.Minute), NotAfter: time.Now().Add(900 * time.Hour), URIs: []*url.URL{id.URL()},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, a.root, key.Public())
	return &x509svid.SVID{ID: id, Certificates: []*x509.Certificate{leaf}, PrivateKey: key}
}

// network connects addresses in memory.
type network struct {
	mu        sync.Mutex
	listeners map[string]*bufconn.Listener // guarded by mu
	owner     map[string]string            // cluster by address; guarded by mu
	cut       map[[2]string]bool           // guarded by mu
	conns     map[net.Conn][2]string       // guarded by mu
}

func (n *network) listen(address, cluster string) net.Listener {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.owner[address] = cluster
	if n.listeners[address] == nil {
		n.listeners[address] = bufconn.Listen(64 << 10)
	}
	return n.listeners[address]
}

func (n *network) dial(ctx context.Context, from, address string) (net.Conn, error) {
	n.mu.Lock()
	l, to := n.listeners[address], n.owner[address]
	isCut := n.cut[pair(from, to)]
	n.mu.Unlock()
	if l == nil || isCut {
		return nil, fmt.Errorf("dial %s: no route", address)
	}
	c, err := l.DialContext(ctx)
	if err != nil {
		return nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.conns[c] = pair(from, to)
	return c, nil
}

func pair(a, b string) [2]string {
	if a > b {
		a, b = b, a
	}
	return [2]string{a, b}
}

func (n *network) isCut(a, b string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.cut[pair(a, b)]
}

// kill closes a listener and every connection of a cluster.
func (n *network) kill(cluster, address string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if l := n.listeners[address]; l != nil {
		l.Close()
		delete(n.listeners, address)
	}
	for c, p := range n.conns {
		if p[0] == cluster || p[1] == cluster {
			c.Close()
			delete(n.conns, c)
		}
	}
}

func (n *network) close() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, l := range n.listeners {
		l.Close()
	}
	for c := range n.conns {
		c.Close()
	}
}

// partition cuts, or heals, everything between two clusters but their gateways' answers to others.
func (w *world) partition(a, b string, cut bool) {
	w.network.mu.Lock()
	w.network.cut[pair(a, b)] = cut
	for c, p := range w.network.conns {
		if cut && p == pair(a, b) {
			c.Close()
			delete(w.network.conns, c)
		}
	}
	w.network.mu.Unlock()
	for _, l := range []*storetest.Link{w.clusters[a].link(b), w.clusters[b].link(a)} {
		if cut {
			l.BlackHole()
		} else {
			l.Heal()
		}
	}
}

// gateway starts or stops a cluster's gateway, which answers probes.
func (w *world) gateway(c *cluster, up bool) {
	address := c.self.Gateways[0].String()
	if !up {
		w.network.kill("", address)
		return
	}
	l := w.network.listen(address, c.name+"-gateway")
	w.answer(l, c, identity.GatewayID(spiffeid.RequireTrustDomainFromString(c.self.TrustDomain)))
}

// answer answers probes at a listener with an SVID of a cluster.
func (w *world) answer(l net.Listener, c *cluster, id spiffeid.ID) {
	src := identity.NewSource()
	svid := c.ca.svid(id)
	go func() {
		for {
			raw, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer raw.Close()
				src.Set(svid, c.source.Bundles())
				conn := tls.Server(raw, identity.ServerTLS(src, identity.AuthorizeAny()))
				raw.SetDeadline(time.Now().Add(time.Second))
				if conn.Handshake() == nil {
					io.WriteString(conn, "ok\n")
				}
			}()
		}
	}()
}
