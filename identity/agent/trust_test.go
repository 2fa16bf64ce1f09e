package agent_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/test/bufconn"

	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/identity/bundle"
	"github.com/hanse-mesh/hanse/identity/ca"
)

// federate relates two servers and copies each other's bundle at each change, as join and mirror do.
func federate(t *testing.T, a, b *server) {
	t.Helper()
	for _, p := range [][2]*server{{a, b}, {b, a}} {
		from, to := p[0], p[1]
		check(t, to.bundles.Relate(bundle.Relation{TrustDomain: from.td}))
		run(t, func(ctx context.Context) error {
			for {
				changed := from.authority.Changed()
				if err := to.bundles.Set(from.td, from.authority.Bundle(), "mirror"); err != nil {
					return err
				}
				select {
				case <-changed:
				case <-ctx.Done():
					return nil
				}
			}
		}, nil)
	}
}

// SVIDs live 4 s and roots 40 s; every request makes a new mTLS connection across the trust domains. None fails.
func TestRotationUnderLoad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var west, east *server
		acked := func(own, other **server) func(uint64) (bool, []string) {
			return func(seq uint64) (bool, []string) {
				missing := append((*own).api.Missing((*own).td, seq), (*other).api.Missing((*own).td, seq)...)
				return len(missing) == 0, missing
			}
		}
		cfg := ca.Config{RootLife: 40 * time.Second, X509Life: 4 * time.Second}
		cfg.Acked = acked(&west, &east)
		west = newServer(t, "west.demo", options{ca: cfg, agentLife: 8 * time.Second})
		cfg.Acked = acked(&east, &west)
		east = newServer(t, "east.demo", options{ca: cfg, agentLife: 8 * time.Second})
		west.start()
		east.start()
		federate(t, west, east)
		start := func(s *server, id string) *identity.Source {
			cfg := s.agentConfig(s.token(id))
			cfg.SyncInterval = 2 * time.Second
			a, _ := runAgent(t, cfg)
			wait(t, a.Source())
			return a.Source()
		}
		client := start(west, frontend)
		server := start(east, "spiffe://east.demo/ns/shop/sa/payments")
		payments := spiffeid.RequireFromString("spiffe://east.demo/ns/shop/sa/payments")

		lis := bufconn.Listen(1 << 20)
		tlsLis := tls.NewListener(lis, identity.ServerTLS(server, identity.AuthorizeID(spiffeid.RequireFromString(frontend))))
		var conns sync.WaitGroup
		run(t, func(context.Context) error {
			for {
				conn, err := tlsLis.Accept()
				if err != nil {
					conns.Wait()
					return nil
				}
				conns.Go(func() {
					defer conn.Close()
					_, _ = io.Copy(conn, conn)
				})
			}
		}, func() { _ = lis.Close() })

		time.Sleep(2 * time.Second) // both have synced each other's bundle
		issuers, svids, requests, failed := map[string]bool{}, map[string]bool{}, 0, 0
		for began := time.Now(); time.Since(began) < 55*time.Second; time.Sleep(400 * time.Millisecond) {
			requests++
			leaf, err := request(lis, identity.ClientTLS(client, identity.AuthorizeID(payments)))
			if err != nil {
				failed++
				t.Errorf("after %v: %v", time.Since(began), err)
				continue
			}
			issuers[string(leaf.AuthorityKeyId)] = true
			svids[leaf.SerialNumber.String()] = true
		}
		t.Logf("%d requests, %d failed, %d server SVIDs of %d roots", requests, failed, len(svids), len(issuers))
		if len(issuers) < 3 || len(svids) < 15 {
			t.Errorf("%d roots and %d SVIDs seen: that was no rotation", len(issuers), len(svids))
		}
	})
}

// request makes a connection, sends some bytes and wants them back.
func request(lis *bufconn.Listener, cfg *tls.Config) (leaf *x509.Certificate, err error) {
	conn, err := lis.Dial()
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	c := tls.Client(conn, cfg)
	if _, err := c.Write([]byte("ping")); err != nil {
		return nil, err
	}
	buf := make([]byte, 4)
	if _, err := io.ReadFull(c, buf); err != nil {
		return nil, err
	}
	if string(buf) != "ping" {
		return nil, fmt.Errorf("answer %q", buf)
	}
	return c.ConnectionState().PeerCertificates[0], nil
}

// TrustRefresh returns when the announced bundle is loaded, without waiting for the next sync.
func TestTrustRefresh(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, east := newServer(t, "west.demo", options{}), newServer(t, "east.demo", options{})
		s.start()
		cfg := s.agentConfig(s.token(frontend))
		cfg.SyncInterval = time.Hour
		a, _ := runAgent(t, cfg)
		wait(t, a.Source())
		check(t, s.bundles.Relate(bundle.Relation{TrustDomain: east.td}))
		check(t, s.bundles.Set(east.td, east.authority.Bundle(), "join"))
		want := map[spiffeid.TrustDomain]uint64{s.td: s.authority.Sequence(), east.td: east.authority.Sequence()}
		began := time.Now()
		check(t, a.TrustRefresh(t.Context(), want))
		if got := a.Source().Bundles()[east.td]; got == nil || !got.Equal(east.authority.Bundle()) {
			t.Error("not loaded")
		}
		check(t, east.authority.Prepare())
		check(t, s.bundles.Set(east.td, east.authority.Bundle(), "mirror"))
		want[east.td] = east.authority.Sequence()
		check(t, a.TrustRefresh(t.Context(), want))
		check(t, a.TrustRefresh(t.Context(), want))
		if n := len(a.Source().Bundles()[east.td].X509Authorities()); n != 2 || time.Since(began) > time.Second {
			t.Errorf("%d roots after %v", n, time.Since(began))
		}
		// What nobody has is waited for as long as the caller likes.
		want[east.td]++
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := a.TrustRefresh(ctx, want); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "east.demo") {
			t.Errorf("error: %v", err)
		}
		// What this workload does not federate with is not waited for.
		check(t, a.TrustRefresh(t.Context(), map[spiffeid.TrustDomain]uint64{spiffeid.RequireTrustDomainFromString("north.demo"): 7}))
		// What is distrusted, or not related any more, is gone when TrustRefresh returns, though no sequence says so.
		delete(want, east.td)
		gone := func(what string) {
			t.Helper()
			check(t, a.TrustRefresh(t.Context(), want))
			if _, ok := a.Source().Bundles()[east.td]; ok {
				t.Errorf("east is trusted after %s", what)
			}
		}
		check(t, s.bundles.Distrust(east.td, ""))
		gone("it was distrusted")
		if found, err := s.bundles.Trust(east.td, ""); err != nil || !found {
			t.Fatal(found, err)
		}
		check(t, a.TrustRefresh(t.Context(), want))
		if _, ok := a.Source().Bundles()[east.td]; !ok {
			t.Error("east is not trusted again")
		}
		check(t, s.bundles.Unrelate(east.td))
		gone("the end of the relation")
	})
}

// An SVID whose root is withdrawn from the own bundle is replaced at the next sync, not at half life.
func TestWithdrawnOwnRoot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, "west.demo", options{agentLife: 20 * time.Second})
		s.start()
		a, _ := runAgent(t, s.agentConfig(s.token(frontend)))
		wait(t, a.Source())
		before, err := a.Source().GetX509SVID()
		check(t, err)
		root := s.authority.Bundle().X509Authorities()[0]
		check(t, s.authority.Prepare())
		time.Sleep(10 * time.Second)
		check(t, s.authority.Activate())
		time.Sleep(20 * time.Second) // the agent's own SVID is of the new root now
		if svid, err := a.Source().GetX509SVID(); err != nil || svid.Certificates[0].CheckSignatureFrom(root) != nil {
			t.Fatalf("renewed before half life: %v", err)
		}
		s.withdrawn.Store(root)
		time.Sleep(6 * time.Second)
		svid, err := a.Source().GetX509SVID()
		check(t, err)
		if svid.Certificates[0].CheckSignatureFrom(root) == nil {
			t.Error("still of the withdrawn root")
		}
		if _, err := a.Source().Verify(before.Certificates); err == nil {
			t.Error("an SVID of the withdrawn root verifies")
		}
	})
}

// A root that is announced costs no new connection, or 10,000 agents would all make one at once; a server that the new bundle does not verify does.
func TestAnnouncedRootKeepsConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, "west.demo", options{})
		s.start()
		cfg := s.agentConfig(s.token(frontend))
		var dials atomic.Int32
		dial := cfg.Dial
		cfg.Dial = func(ctx context.Context, addr string) (net.Conn, error) {
			dials.Add(1)
			return dial(ctx, addr)
		}
		a, _ := runAgent(t, cfg)
		wait(t, a.Source())
		time.Sleep(10 * time.Second)
		before := dials.Load()
		old := s.authority.Roots()[0].KeyID
		_, err := s.authority.Rotate()
		check(t, err)
		roots := func() int {
			b, err := a.Source().GetX509BundleForTrustDomain(s.td)
			check(t, err)
			return len(b.X509Authorities())
		}
		time.Sleep(10 * time.Second)
		if n := dials.Load() - before; n != 0 || roots() != 2 {
			t.Errorf("%d new connections for an announced root, and it has %d roots", n, roots())
		}
		check(t, s.authority.Activate())
		check(t, s.authority.Taint(old))
		time.Sleep(10 * time.Second) // the agent's own SVID is another one now, and so is its connection
		before = dials.Load()
		check(t, s.authority.Revoke(old))
		time.Sleep(10 * time.Second)
		if n := dials.Load() - before; roots() != 1 || n > 1 {
			t.Errorf("%d new connections after the old root has gone, and it has %d roots", n, roots())
		}
		if on := s.api.RestingOn(old); len(on) != 0 {
			t.Errorf("%v rest on it", on)
		}

		// Revoked at once, while the server's SVID on this connection rests on it.
		old = s.authority.Roots()[0].KeyID
		_, err = s.authority.Rotate()
		check(t, err)
		check(t, s.authority.Activate())
		before = dials.Load()
		check(t, s.authority.Revoke(old))
		time.Sleep(2 * time.Minute)
		if dials.Load() == before {
			t.Error("goes on over a connection to a server whose root was revoked")
		}
	})
}

// What a tainted root signed is left at the next sync, the agent's own SVID first: then the root can be revoked, and nobody is shut out.
func TestTaintedRoot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, "west.demo", options{})
		s.start()
		a, _ := runAgent(t, s.agentConfig(s.token(frontend)))
		wait(t, a.Source())
		old := s.authority.Roots()[0].KeyID
		if on := s.api.RestingOn(old); len(on) != 1 {
			t.Fatalf("%v rest on the only root", on)
		}
		_, err := s.authority.Rotate()
		check(t, err)
		check(t, s.authority.Activate())
		time.Sleep(10 * time.Second) // two syncs
		if on := s.api.RestingOn(old); len(on) != 1 {
			t.Fatalf("%v rest on the old root: nobody has asked them to leave it", on)
		}
		check(t, s.authority.Taint(old))
		time.Sleep(6 * time.Second)
		if on := s.api.RestingOn(old); len(on) != 0 {
			t.Fatalf("%v still rest on the tainted root", on)
		}
		check(t, s.authority.Revoke(old))
		time.Sleep(3 * time.Hour) // SVIDs and the agent's own are renewed
		svid, err := a.Source().GetX509SVID()
		check(t, err)
		if _, err := a.Source().Verify(svid.Certificates); err != nil {
			t.Errorf("after the revocation: %v", err)
		}
		if n := len(a.Source().Bundles()[s.td].X509Authorities()); n != 1 {
			t.Errorf("%d roots in the agent's bundle, want 1", n)
		}
	})
}
