package agent_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/identity/agent"
	"github.com/hanse-mesh/hanse/identity/attest"
	"github.com/hanse-mesh/hanse/identity/ca"
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
