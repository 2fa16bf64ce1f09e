package agent_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/identity/agent"
	"github.com/hanse-mesh/hanse/identity/attest"
	"github.com/hanse-mesh/hanse/identity/bundle"
	"github.com/hanse-mesh/hanse/identity/ca"
	"github.com/hanse-mesh/hanse/identity/spiretypes"
)

const frontend = "spiffe://west.demo/ns/shop/sa/frontend"

func TestAttestAndRenew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, "west.demo", options{})
		s.start()
		reg := prometheus.NewRegistry()
		cfg := s.agentConfig(s.token(frontend))
		cfg.Registerer, cfg.SyncInterval = reg, 4*time.Minute
		a, _ := runAgent(t, cfg)
		wait(t, a.Source())
		first, err := a.Source().GetX509SVID()
		check(t, err)
		if got := first.ID.String(); got != frontend {
			t.Errorf("SVID is %s", got)
		}
		if id, err := a.Source().Verify(first.Certificates); err != nil || id != first.ID {
			t.Errorf("own SVID verifies as %v, %v", id, err)
		}
		if got := gauge(t, reg, "hanse_svid_expiry_timestamp_seconds"); got != float64(first.Certificates[0].NotAfter.Unix()) {
			t.Errorf("expiry metric %v", got)
		}
		time.Sleep(26 * time.Minute)
		if svid, err := a.Source().GetX509SVID(); err != nil || svid != first {
			t.Errorf("renewed before half life: %v", err)
		}
		time.Sleep(8 * time.Minute)
		svid, err := a.Source().GetX509SVID()
		check(t, err)
		if svid == first {
			t.Error("not renewed after half life")
		}
		if bytes.Equal(svid.Certificates[0].RawSubjectPublicKeyInfo, first.Certificates[0].RawSubjectPublicKeyInfo) {
			t.Error("renewed with the same key")
		}
		time.Sleep(8 * time.Hour)
		if svid, err = a.Source().GetX509SVID(); err != nil || time.Until(svid.Certificates[0].NotAfter) < 25*time.Minute {
			t.Errorf("after hours: %v", err)
		}
	})
}

// The server's store is away for as long as a renewed agent SVID can wait: workloads get theirs, and trust is loaded. It may also go away at the worst
// moment, when a new agent SVID is written and not used yet.
func TestStoreAway(t *testing.T) {
	for name, renewed := range map[string]bool{"before the agent is renewed": false, "when the agent is renewed": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newServer(t, "west.demo", options{})
				s.start()
				cfg := s.agentConfig(s.token(frontend))
				cfg.SyncInterval = 10 * time.Minute
				a, _ := runAgent(t, cfg)
				wait(t, a.Source())
				if renewed {
					s.store.renewed.Store(true)
				} else {
					s.store.away.Store(true)
				}
				healthy := func(hours int) {
					t.Helper()
					for range 4 * hours {
						time.Sleep(15 * time.Minute)
						if svid, err := a.Source().GetX509SVID(); err != nil || time.Until(svid.Certificates[0].NotAfter) < 20*time.Minute {
							t.Fatalf("its store away: %v", err)
						}
						ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
						err := a.TrustRefresh(ctx, map[spiffeid.TrustDomain]uint64{s.td: s.authority.Sequence()})
						cancel()
						check(t, err)
					}
				}
				healthy(23)
				if away := s.store.away.Load(); !away {
					t.Error("the agent was not renewed at its half life")
				}
				s.store.away.Store(false)
				s.store.renewed.Store(false)
				healthy(25) // longer than the agent's first SVID lives
			})
		})
	}
}

func gauge(t *testing.T, reg *prometheus.Registry, name string) float64 {
	t.Helper()
	families, err := reg.Gather()
	check(t, err)
	for _, f := range families {
		if f.GetName() == name {
			return f.GetMetric()[0].GetGauge().GetValue()
		}
	}
	t.Fatalf("no metric %s", name)
	return 0
}

func TestOverTCP(t *testing.T) {
	s := newServer(t, "west.demo", options{})
	s.start()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	g := grpc.NewServer(grpc.Creds(credentials.NewTLS(s.api.TLSConfig())))
	s.api.RegisterAgent(g)
	run(t, func(context.Context) error { return g.Serve(lis) }, g.Stop)
	cfg := s.agentConfig(s.token(frontend))
	cfg.ServerAddrs, cfg.Dial = []string{"127.0.0.1:1", lis.Addr().String()}, nil // the first one is dead
	a, _ := runAgent(t, cfg)
	wait(t, a.Source())
}

func TestGatewayToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, "west.demo", options{})
		s.start()
		a, _ := runAgent(t, s.agentConfig(s.token("spiffe://west.demo/hanse/gateway")))
		wait(t, a.Source())
		if svid, err := a.Source().GetX509SVID(); err != nil || svid.ID != identity.GatewayID(s.td) {
			t.Errorf("SVID %v, %v", svid, err)
		}
	})
}

// A wrong, tampered, used or expired token is refused, and Run says which.
func TestTokens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, "west.demo", options{})
		s.start()
		used := s.token(frontend)
		a, stop := runAgent(t, s.agentConfig(used))
		wait(t, a.Source())
		stop()
		expired := s.token(frontend)
		time.Sleep(attest.DefaultTTL)
		good := s.token(frontend)
		tampered := good[:30] + "x" + good[31:]
		if tampered == good {
			tampered = good[:30] + "y" + good[31:]
		}
		for name, c := range map[string]struct{ token, want string }{
			"used":     {used, "used already"},
			"expired":  {expired, "expired"},
			"tampered": {tampered, "damaged"},
			"wrong":    {"some-other-token-entirely", "not one of this trust domain's"},
		} {
			b, err := agent.New(s.agentConfig(c.token))
			check(t, err)
			err = b.Run(t.Context())
			if !errors.Is(err, agent.ErrTokenRefused) || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), c.token) {
				t.Errorf("%s: %v", name, err)
			}
		}
		// The good one still serves.
		a, _ = runAgent(t, s.agentConfig(good))
		wait(t, a.Source())
	})
}

// An answer that is lost after the token was redeemed costs no second token: the same key may ask again.
func TestLostAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, "west.demo", options{})
		s.start()
		cfg := s.agentConfig(s.token(frontend))
		var tries atomic.Int32
		dial := cfg.Dial
		cfg.Dial = func(ctx context.Context, addr string) (net.Conn, error) {
			conn, err := dial(ctx, addr)
			if err != nil || tries.Add(1) > 1 {
				return conn, err
			}
			return &cutConn{Conn: conn, left: 4000}, nil // dies in the middle of the first answer
		}
		_, stop := runAgent(t, cfg)
		time.Sleep(time.Millisecond)
		stop() // and so does the agent
		a, _ := runAgent(t, cfg)
		wait(t, a.Source())
		if tries.Load() < 2 {
			t.Error("the first try was not cut")
		}
	})
}

// cutConn reads so many bytes and then fails.
type cutConn struct {
	net.Conn
	left int // owned by the reader
}

func (c *cutConn) Read(p []byte) (int, error) {
	if c.left <= 0 {
		return 0, io.ErrUnexpectedEOF
	}
	n, err := c.Conn.Read(p[:min(len(p), c.left)])
	c.left -= n
	return n, err
}

func TestRestartWithServerDead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, "west.demo", options{})
		s.start()
		cfg := s.agentConfig(s.token(frontend))
		a, stop := runAgent(t, cfg)
		wait(t, a.Source())
		before, err := a.Source().GetX509SVID()
		check(t, err)
		stop()
		s.stop()
		time.Sleep(10 * time.Minute)
		a, stop = runAgent(t, cfg)
		synctest.Wait()
		after, err := a.Source().GetX509SVID()
		check(t, err)
		if !after.Certificates[0].Equal(before.Certificates[0]) {
			t.Error("another SVID")
		}
		if _, err := a.Source().Verify(after.Certificates); err != nil {
			t.Error(err)
		}
		stop()
		info, err := os.Stat(filepath.Join(cfg.StateDir, "agent.json"))
		check(t, err)
		if dir, err := os.Stat(cfg.StateDir); err != nil || dir.Mode().Perm() != 0o700 || info.Mode().Perm() != 0o600 {
			t.Errorf("folder %v, file %v", dir.Mode(), info.Mode())
		}

		// After its expiry it serves nothing, and comes back when a server does, without a token.
		time.Sleep(time.Hour)
		a, _ = runAgent(t, cfg)
		synctest.Wait()
		if svid, err := a.Source().GetX509SVID(); err == nil {
			t.Errorf("serves an SVID that expired %v ago", time.Since(svid.Certificates[0].NotAfter))
		}
		s.start()
		wait(t, a.Source())
	})
}

// A server that restarts, and loses no state, is found again without a new token.
func TestServerRestarts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, "west.demo", options{agentLife: time.Minute, ca: ca.Config{X509Life: time.Minute}})
		s.start()
		a, _ := runAgent(t, s.agentConfig(s.token(frontend)))
		wait(t, a.Source())
		s.stop()
		time.Sleep(15 * time.Second)
		s.start()
		time.Sleep(3 * time.Minute)
		svid, err := a.Source().GetX509SVID()
		check(t, err)
		if time.Until(svid.Certificates[0].NotAfter) < 25*time.Second {
			t.Error("not renewed after the server's restart")
		}
	})
}

func TestBan(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, "west.demo", options{})
		s.start()
		a, err := agent.New(s.agentConfig(s.token(frontend)))
		check(t, err)
		done := make(chan error)
		go func() { done <- a.Run(t.Context()) }()
		wait(t, a.Source())
		admin := s.admin(t)
		agents, err := admin.ListAgents(t.Context(), &agentv1.ListAgentsRequest{})
		check(t, err)
		_, err = admin.BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: agents.Agents[0].Id})
		check(t, err)
		if err := <-done; !errors.Is(err, agent.ErrBanned) {
			t.Errorf("Run ends with %v", err)
		}
	})
}

// admin is a client of the administrators' socket.
func (s *server) admin(t *testing.T) agentv1.AgentClient {
	t.Helper()
	lis := bufconn.Listen(1 << 20)
	g := grpc.NewServer()
	s.api.RegisterAdmin(g)
	run(t, func(context.Context) error { return g.Serve(lis) }, g.Stop)
	conn, err := grpc.NewClient("passthrough:///admin", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }))
	check(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	return agentv1.NewAgentClient(conn)
}

// An agent that the server forgot attests again, if there is a new token, and serves on meanwhile.
func TestForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, "west.demo", options{})
		s.start()
		cfg := s.agentConfig(s.token(frontend))
		a, _ := runAgent(t, cfg)
		wait(t, a.Source())
		first, err := a.Source().GetX509SVID()
		check(t, err)
		_, err = s.admin(t).DeleteAgent(t.Context(), &agentv1.DeleteAgentRequest{Id: spiretypes.FromID(s.agentID(t))})
		check(t, err)
		time.Sleep(2 * time.Minute)
		if svid, err := a.Source().GetX509SVID(); err != nil || svid != first {
			t.Errorf("does not serve on: %v", err)
		}
		check(t, os.WriteFile(cfg.TokenFile, []byte(s.token(frontend)), 0o600))
		time.Sleep(time.Minute)
		if svid, err := a.Source().GetX509SVID(); err != nil || svid == first {
			t.Errorf("has not attested again: %v", err)
		}
	})
}

// admitAgain puts a new token, and a trust bundle of now, where an agent finds them.
func (s *server) admitAgain(cfg agent.Config) {
	s.t.Helper()
	fresh := s.agentConfig(s.token(frontend))
	for to, from := range map[string]string{cfg.TrustBundle: fresh.TrustBundle, cfg.TokenFile: fresh.TokenFile} {
		b, err := os.ReadFile(from)
		check(s.t, err)
		check(s.t, os.WriteFile(to, b, 0o600))
	}
}

// An agent whose root was revoked while the server was away is refused in the handshake already. It serves on, and attests anew with another token
// and a trust bundle of now.
func TestShutOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, "west.demo", options{})
		s.start()
		cfg := s.agentConfig(s.token(frontend))
		a, _ := runAgent(t, cfg)
		wait(t, a.Source())
		first, err := a.Source().GetX509SVID()
		check(t, err)
		old := s.authority.Roots()[0].KeyID
		check(t, s.authority.Prepare())
		time.Sleep(10 * time.Second)
		s.stop()
		check(t, s.authority.Activate())
		check(t, s.authority.Revoke(old))
		s.restart(options{}, time.Minute)
		time.Sleep(2 * time.Minute)
		if svid, err := a.Source().GetX509SVID(); err != nil || !svid.Certificates[0].Equal(first.Certificates[0]) {
			t.Fatalf("does not serve on: %v", err)
		}
		s.admitAgain(cfg)
		time.Sleep(time.Minute)
		svid, err := a.Source().GetX509SVID()
		check(t, err)
		if _, err := a.Source().Verify(svid.Certificates); err != nil || svid.Certificates[0].Equal(first.Certificates[0]) {
			t.Errorf("has not attested again: %v", err)
		}
	})
}

// An agent whose root is revoked while it follows the server attests anew within seconds, though the next sync is a minute off.
func TestShutOutWhileFollowing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, "west.demo", options{})
		s.start()
		cfg := s.agentConfig(s.token(frontend))
		a, _ := runAgent(t, cfg)
		wait(t, a.Source())
		first, err := a.Source().GetX509SVID()
		check(t, err)
		old := s.authority.Roots()[0].KeyID
		check(t, s.authority.Prepare())
		time.Sleep(10 * time.Second)
		check(t, s.authority.Activate())
		time.Sleep(10 * time.Second)
		s.admitAgain(cfg)
		check(t, s.authority.Revoke(old))
		time.Sleep(15 * time.Second)
		if svid, err := a.Source().GetX509SVID(); err != nil || svid.Certificates[0].Equal(first.Certificates[0]) {
			t.Errorf("has not attested again: %v", err)
		}
	})
}

func (s *server) agentID(t *testing.T) spiffeid.ID {
	t.Helper()
	agents, err := s.admin(t).ListAgents(t.Context(), &agentv1.ListAgentsRequest{})
	check(t, err)
	id, err := spiretypes.ToID(agents.Agents[0].Id)
	check(t, err)
	return id
}

func TestBadConfiguration(t *testing.T) {
	s := newServer(t, "west.demo", options{})
	for name, cfg := range map[string]agent.Config{
		"nothing":            {},
		"no state folder":    {ServerAddrs: []string{"x"}, TrustDomain: s.td},
		"two sources":        {WorkloadAPI: "unix:///x", ServerAddrs: []string{"x"}},
		"two Workload APIs":  {WorkloadAPI: "unix:///x", SocketPath: "y"},
		"without the server": {TrustDomain: s.td, StateDir: "x"},
	} {
		if _, err := agent.New(cfg); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestDamagedState(t *testing.T) {
	s := newServer(t, "west.demo", options{})
	cfg := s.agentConfig(s.token(frontend))
	check(t, os.Mkdir(cfg.StateDir, 0o700))
	path := filepath.Join(cfg.StateDir, "agent.json")
	for _, data := range []string{"", "{", `{"version":7}`, `{"version":1,"trust_domain":"east.demo"}`, `{"version":1,"trust_domain":"west.demo","agent":{"key":"","chain":null}}`} {
		check(t, os.WriteFile(path, []byte(data), 0o600))
		a, err := agent.New(cfg)
		check(t, err)
		if err := a.Run(t.Context()); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%q: error %v does not name %s", data, err, path)
		}
		if after, err := os.ReadFile(path); err != nil || string(after) != data {
			t.Errorf("%q: the file was changed", data)
		}
	}
}

// A server with the right name and another authority gets no token.
func TestImpostor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, impostor := newServer(t, "west.demo", options{}), newServer(t, "west.demo", options{})
		impostor.start()
		cfg := s.agentConfig(s.token(frontend))
		cfg.Dial = impostor.dial
		a, _ := runAgent(t, cfg)
		time.Sleep(time.Minute)
		if _, err := a.Source().GetX509SVID(); err == nil {
			t.Error("has an SVID of an impostor")
		}
		if records, err := impostor.kv.List(t.Context(), "agents/"); err != nil || len(records) != 0 {
			t.Errorf("the impostor has agents: %v, %v", records, err)
		}
	})
}

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

func TestFiles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, east := newServer(t, "west.demo", options{}), newServer(t, "east.demo", options{})
		s.start()
		check(t, s.bundles.Relate(bundle.Relation{TrustDomain: east.td}))
		check(t, s.bundles.Set(east.td, east.authority.Bundle(), "join"))
		cfg := s.agentConfig(s.token(frontend))
		cfg.FilesDir, cfg.SyncInterval = filepath.Join(t.TempDir(), "files"), 10*time.Minute
		a, stop := runAgent(t, cfg)
		wait(t, a.Source())
		for range 3 { // SVIDs
			synctest.Wait()
			svid, err := a.Source().GetX509SVID()
			check(t, err)
			pair, err := tls.LoadX509KeyPair(filepath.Join(cfg.FilesDir, agent.FileSVID), filepath.Join(cfg.FilesDir, agent.FileKey))
			check(t, err)
			if !bytes.Equal(pair.Certificate[0], svid.Certificates[0].Raw) {
				t.Error("another SVID in the files")
			}
			time.Sleep(40 * time.Minute)
		}
		stop()
		var m struct {
			TrustDomains map[string]json.RawMessage `json:"trust_domains"`
		}
		data, err := os.ReadFile(filepath.Join(cfg.FilesDir, agent.FileBundleMap))
		check(t, err)
		check(t, json.Unmarshal(data, &m))
		for _, x := range []*server{s, east} {
			b, err := spiffebundle.Parse(x.td, m.TrustDomains[x.td.Name()])
			check(t, err)
			if !b.X509Bundle().Equal(x.authority.Bundle().X509Bundle()) || len(b.JWTAuthorities()) != 0 {
				t.Errorf("bundle of %s differs", x.td)
			}
		}
		sets := 0
		check(t, filepath.WalkDir(cfg.FilesDir, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			info, err := d.Info()
			check(t, err)
			switch {
			case d.IsDir() && path != cfg.FilesDir:
				sets++
				fallthrough
			case d.IsDir():
				if info.Mode().Perm() != 0o700 {
					t.Errorf("%s has mode %04o", path, info.Mode().Perm())
				}
			case d.Type()&fs.ModeSymlink == 0 && info.Mode().Perm() != 0o600:
				t.Errorf("%s has mode %04o", path, info.Mode().Perm())
			}
			return nil
		}))
		if sets != 1 {
			t.Errorf("%d sets left", sets)
		}
	})
}

// Whoever opens the folder once reads one consistent set, however often it changes.
func TestFilesAreConsistent(t *testing.T) {
	t.Parallel()
	s := newServer(t, "west.demo", options{ca: ca.Config{X509Life: time.Second}})
	s.start()
	cfg := s.agentConfig(s.token(frontend))
	cfg.FilesDir = filepath.Join(t.TempDir(), "files")
	cfg.SyncInterval = 50 * time.Millisecond
	a, _ := runAgent(t, cfg)
	wait(t, a.Source())
	seen := map[string]bool{}
	for deadline := time.Now().Add(2 * time.Minute); len(seen) < 3 && time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		set, err := os.Readlink(filepath.Join(cfg.FilesDir, "..data"))
		if err != nil {
			continue // not written yet
		}
		dir := filepath.Join(cfg.FilesDir, set)
		pair, err := tls.LoadX509KeyPair(filepath.Join(dir, agent.FileSVID), filepath.Join(dir, agent.FileKey))
		if errors.Is(err, fs.ErrNotExist) {
			continue // replaced meanwhile
		}
		check(t, err)
		seen[string(pair.Certificate[0])] = true
	}
	if len(seen) < 3 {
		t.Errorf("%d sets seen", len(seen))
	}
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

// The agent's own key and the workload's are of the chosen curve; those of before serve until they are renewed.
func TestCurve(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, "west.demo", options{agentLife: 10 * time.Minute, ca: ca.Config{X509Life: 10 * time.Minute}})
		s.start()
		cfg := s.agentConfig(s.token(frontend))
		curves := func(a *agent.Agent) string {
			t.Helper()
			synctest.Wait() // an SVID is served before it is kept
			svid, err := a.Source().GetX509SVID()
			check(t, err)
			data, err := os.ReadFile(filepath.Join(cfg.StateDir, "agent.json"))
			check(t, err)
			var kept struct {
				Agent, SVID struct {
					Key   []byte
					Chain [][]byte
				}
			}
			check(t, json.Unmarshal(data, &kept))
			out := svid.PrivateKey.(*ecdsa.PrivateKey).Params().Name
			for _, c := range []struct {
				Key   []byte
				Chain [][]byte
			}{kept.Agent, kept.SVID} {
				key, err := x509.ParsePKCS8PrivateKey(c.Key)
				check(t, err)
				cert, err := x509.ParseCertificate(c.Chain[0])
				check(t, err)
				if !cert.PublicKey.(*ecdsa.PublicKey).Equal(key.(*ecdsa.PrivateKey).Public()) {
					t.Error("the kept key is not the certificate's")
				}
				out += " " + key.(*ecdsa.PrivateKey).Params().Name
			}
			return out // in use, agent's, kept
		}
		for _, c := range []struct {
			curve         elliptic.Curve
			before, after string
		}{
			{elliptic.P384(), "P-384 P-384 P-384", "P-384 P-384 P-384"},
			{nil, "P-384 P-384 P-384", "P-256 P-256 P-256"},
			{elliptic.P384(), "P-256 P-256 P-256", "P-384 P-384 P-384"},
		} {
			cfg.Curve = c.curve
			a, stop := runAgent(t, cfg)
			wait(t, a.Source())
			if got := curves(a); got != c.before {
				t.Errorf("at the start: %s, want %s", got, c.before)
			}
			time.Sleep(10 * time.Minute)
			if got := curves(a); got != c.after {
				t.Errorf("renewed: %s, want %s", got, c.after)
			}
			stop()
		}
		cfg.Curve = elliptic.P521()
		if _, err := agent.New(cfg); err == nil || !strings.Contains(err.Error(), "curve P-521") {
			t.Errorf("P-521: %v", err)
		}
	})
}
