package peering_test

import (
	"context"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/federation/etcd"
	"github.com/hanse-mesh/hanse/federation/peering"
	"github.com/hanse-mesh/hanse/identity"
)

// real is a control plane over embedded etcd and TCP.
type real struct {
	t       testing.TB
	name    string
	dir     string
	td      spiffeid.TrustDomain
	ca      *authority
	source  *identity.Source
	bundles *bundles
	local   *discovery.Snapshot
	address string

	mesh    *peering.Mesh
	own     *etcd.Embedded
	imports *etcd.Embedded
	stop    func()
}

func newReal(t testing.TB, name string) *real {
	td := spiffeid.RequireTrustDomainFromString(name + ".demo")
	r := &real{t: t, name: name, dir: t.TempDir(), td: td, ca: newAuthority(t, td), source: identity.NewSource()}
	r.bundles = &bundles{source: r.source, all: map[spiffeid.TrustDomain]*spiffebundle.Bundle{td: r.ca.bundle()}}
	r.source.Set(r.ca.svid(identity.ControlPlaneID(td)), r.bundles.all)
	r.local = &discovery.Snapshot{
		Self:     discovery.Self{Cluster: name, TrustDomain: td.Name(), Network: name + "-net"},
		Complete: true,
	}
	r.start("127.0.0.1:0")
	t.Cleanup(func() {
		if r.stop != nil {
			r.stop()
		}
	})
	return r
}

func (r *real) start(listen string) {
	r.t.Helper()
	lis, err := net.Listen("tcp", listen)
	if err != nil {
		r.t.Fatal(err)
	}
	r.address = lis.Addr().String()
	w := newWorld(r.t)
	for name, at := range map[string]**etcd.Embedded{"own": &r.own, "imports": &r.imports} {
		if *at, err = etcd.StartEmbedded(r.t.Context(), etcd.EmbeddedConfig{Dir: r.dir + "/" + name, Name: name, Log: w.log}); err != nil {
			r.t.Fatal(err)
		}
	}
	r.mesh, err = peering.New(peering.Config{
		Self: r.local.Self, MeshName: "demo", Version: "v0.1.0", Advertise: []string{r.address}, Source: r.source, Bundles: r.bundles,
		Own: r.own.Store(), Imports: r.imports.Store(), Servers: r.own.Servers, JoinRate: 1000, Log: w.log.With("at", r.name),
		Timers: peering.Timers{Debounce: 10 * time.Millisecond, Probe: 500 * time.Millisecond, Tick: 100 * time.Millisecond},
	})
	if err != nil {
		r.t.Fatal(err)
	}
	r.mesh.SetLocal(r.local)
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		if err := r.mesh.Run(ctx); err != nil {
			r.t.Errorf("%s: %v", r.name, err)
		}
	})
	running.Go(func() {
		if err := r.mesh.Serve(ctx, lis); err != nil {
			r.t.Errorf("%s: %v", r.name, err)
		}
	})
	r.stop = func() {
		cancel()
		running.Wait()
		r.own.Close()
		r.imports.Close()
		r.stop = nil
	}
	<-r.mesh.Loaded()
}

func (r *real) export(svc *discovery.Service) {
	next := *r.local
	next.Services = discovery.NewByName(map[discovery.Name]*discovery.Service{svc.Name: svc})
	r.local = &next
	r.mesh.SetLocal(r.local)
}

// until waits for a state; the test's own deadline is the bound.
func (r *real) until(what string, ok func(*discovery.Clusterset) bool) {
	r.t.Helper()
	deadline := time.After(20 * time.Second)
	for {
		updated := r.mesh.Updated()
		if ok(r.mesh.Clusterset()) {
			return
		}
		select {
		case <-updated:
		case <-deadline:
			r.t.Fatalf("%s never saw %s; status %+v", r.name, what, r.mesh.Status())
		}
	}
}

func endpoints(c *discovery.Clusterset, member string) int {
	if imp := c.Imports.Get(payments); imp != nil {
		for _, f := range imp.From {
			if f.Member == member {
				return len(f.Endpoints)
			}
		}
	}
	return 0
}

// TestOverEtcdAndTCP is the whole path with nothing replaced: embedded etcd, the guard, mutual TLS over TCP.
func TestOverEtcdAndTCP(t *testing.T) {
	w := newWorld(t)
	shape := w.make("west", 1)
	west, east := newReal(t, "west"), newReal(t, "east")
	shape.export(payments, 70)
	west.export(shape.local.Services.Get(payments))

	token, _, err := west.mesh.CreateToken(t.Context(), "east", 0)
	if err != nil {
		t.Fatal(err)
	}
	res, err := east.mesh.Join(t.Context(), token, func(p peering.Progress) {
		if p.Check != nil {
			t.Logf("%t %s: %s", p.Check.OK, p.Check.Name, p.Check.Detail)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", res)
	east.until("70 endpoints", func(c *discovery.Clusterset) bool { return endpoints(c, "west") == 70 })

	shape.export(payments, 71)
	west.export(shape.local.Services.Get(payments))
	east.until("71 endpoints", func(c *discovery.Clusterset) bool { return endpoints(c, "west") == 71 })

	// Nobody but members' control planes reads anything.
	stranger := newAuthority(t, spiffeid.RequireTrustDomainFromString("evil.demo"))
	for who, src := range map[string]*identity.Source{
		"a stranger":                source(stranger.svid(identity.ControlPlaneID(stranger.td)), east.source.Bundles()),
		"a workload of a member":    source(east.ca.svid(spiffeid.RequireFromPath(east.td, "/ns/shop/sa/payments")), east.source.Bundles()),
		"a gateway of a member":     source(east.ca.svid(identity.GatewayID(east.td)), east.source.Bundles()),
		"the member, other's scope": east.source,
	} {
		remote, err := etcd.DialPeer(t.Context(), etcd.PeerConfig{Addresses: []string{west.address}, TLS: identity.ClientTLS(src, identity.AuthorizeAny(), "h2")})
		if err != nil {
			t.Fatal(err)
		}
		prefix := etcd.ExportPrefix
		if who == "the member, other's scope" {
			prefix += "peers/" + strings.Repeat("0", 32) + "/"
		}
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		if _, err := remote.List(ctx, prefix, 0, func(kv etcd.KeyValue) error { t.Errorf("%s reads %s", who, kv.Key); return nil }); err == nil {
			t.Errorf("%s may list %s", who, prefix)
		}
		cancel()
		remote.Close()
	}

	// The exporter restarts, changed.
	at := west.address
	west.stop()
	shape.export(payments, 69)
	west.local = &discovery.Snapshot{Self: west.local.Self, Complete: true, Services: shape.local.Services}
	west.start(at)
	east.until("69 endpoints after west's restart", func(c *discovery.Clusterset) bool { return endpoints(c, "west") == 69 })

	// A stream that was opened before a leave ends with it, also one on a connection of its own.
	remote, err := etcd.DialPeer(t.Context(), etcd.PeerConfig{Addresses: []string{west.address}, TLS: identity.ClientTLS(east.source, identity.AuthorizeAny(), "h2")})
	if err != nil {
		t.Fatal(err)
	}
	defer remote.Close()
	stream, err := remote.Watch(t.Context(), etcd.ExportPrefix+"all/", 0)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		for {
			if _, err := stream.Recv(); err != nil {
				ended <- err
				return
			}
		}
	}()
	select {
	case err := <-ended:
		t.Fatalf("a member may not watch: %v", err)
	case <-time.After(200 * time.Millisecond):
	}
	if _, err := east.mesh.Leave(t.Context(), "", false); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-ended:
		t.Logf("stream of the leaver: %v", err)
	case <-time.After(20 * time.Second):
		t.Error("the leaver's stream goes on")
	}
	west.until("east gone", func(c *discovery.Clusterset) bool { return len(c.Members) == 0 })
	if cs := east.mesh.Clusterset(); len(cs.Members) != 0 || endpoints(cs, "west") != 0 {
		t.Errorf("after its leave east still has %+v", cs.Members)
	}
	for _, r := range []*real{west, east} {
		if resp, err := r.imports.Client().Get(t.Context(), "imports/", clientv3.WithPrefix()); err != nil || len(resp.Kvs) != 0 {
			t.Errorf("%s keeps %d imported keys, %v", r.name, len(resp.Kvs), err)
		}
	}
}

func source(svid *x509svid.SVID, b map[spiffeid.TrustDomain]*spiffebundle.Bundle) *identity.Source {
	s := identity.NewSource()
	s.Set(svid, b)
	return s
}
