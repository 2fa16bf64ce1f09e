package agent_test

import (
	"context"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/test/bufconn"

	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/identity/agent"
	"github.com/hanse-mesh/hanse/identity/attest"
	"github.com/hanse-mesh/hanse/identity/bundle"
	"github.com/hanse-mesh/hanse/identity/ca"
	"github.com/hanse-mesh/hanse/identity/spireapi"
)

// server is the identity side of a hansed over bufconn: authority, bundles, tokens and the SPIRE Server API.
type server struct {
	t         *testing.T
	td        spiffeid.TrustDomain
	dir       string
	kv        *attest.Memory
	authority *ca.Authority
	bundles   *bundle.Store
	tokens    *attest.Tokens
	api       *spireapi.Server

	mu   sync.Mutex
	lis  *bufconn.Listener // guarded by mu; nil: the server is dead
	grpc *grpc.Server      // guarded by mu
}

type options struct {
	ca ca.Config
	// agentLife of agents' SVIDs.
	agentLife time.Duration
}

func newServer(t *testing.T, td string, opts options) *server {
	t.Helper()
	s := &server{t: t, td: spiffeid.RequireTrustDomainFromString(td), dir: t.TempDir(), kv: attest.NewMemory()}
	opts.ca.Dir, opts.ca.TrustDomain = filepath.Join(s.dir, "ca"), s.td
	var err error
	s.authority, err = ca.Open(opts.ca)
	check(t, err)
	s.bundles, err = bundle.Open(bundle.Config{Dir: filepath.Join(s.dir, "bundles"), TrustDomain: s.td})
	check(t, err)
	s.tokens = attest.New(s.td, s.kv, nil)
	s.api, err = spireapi.New(t.Context(), spireapi.Config{Authority: s.authority, Bundles: s.bundles, Tokens: s.tokens, KV: s.kv,
		AgentLife: opts.agentLife, Log: testLog(t)})
	check(t, err)
	return s
}

// start runs the server until the test ends, or until stop.
func (s *server) start() {
	lis := bufconn.Listen(1 << 20)
	g := grpc.NewServer(grpc.Creds(credentials.NewTLS(s.api.TLSConfig())))
	s.api.RegisterAgent(g)
	s.mu.Lock()
	s.lis, s.grpc = lis, g
	s.mu.Unlock()
	run(s.t, func(context.Context) error { return g.Serve(lis) }, g.Stop)
}

func (s *server) stop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.grpc.Stop()
	s.lis = nil
}

func (s *server) dial(ctx context.Context, _ string) (net.Conn, error) {
	s.mu.Lock()
	lis := s.lis
	s.mu.Unlock()
	if lis == nil {
		return nil, fmt.Errorf("connection refused")
	}
	return lis.DialContext(ctx)
}

func (s *server) token(id string) string {
	s.t.Helper()
	token, _, err := s.tokens.Create(s.t.Context(), attest.Grant{ID: spiffeid.RequireFromString(id)}, 0)
	check(s.t, err)
	return token
}

// agentConfig is an agent's configuration with a fresh state folder and the token in a file.
func (s *server) agentConfig(token string) agent.Config {
	s.t.Helper()
	dir := s.t.TempDir()
	roots := filepath.Join(dir, "roots.pem")
	var data []byte
	for _, c := range s.authority.Bundle().X509Authorities() {
		data = append(data, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	check(s.t, os.WriteFile(roots, data, 0o600))
	check(s.t, os.WriteFile(filepath.Join(dir, "token"), []byte(token+"\n"), 0o600))
	return agent.Config{ServerAddrs: []string{"hansed"}, TrustDomain: s.td, TrustBundle: roots, TokenFile: filepath.Join(dir, "token"),
		StateDir: filepath.Join(dir, "state"), Dial: s.dial, Log: testLog(s.t)}
}

// runAgent runs an agent until the test ends or the returned function is called.
func runAgent(t *testing.T, cfg agent.Config) (*agent.Agent, context.CancelFunc) {
	t.Helper()
	a, err := agent.New(cfg)
	check(t, err)
	return a, run(t, a.Run, nil)
}

// run calls f in a goroutine and ends it with the test, or when the returned function is called.
func run(t *testing.T, f func(context.Context) error, stop func()) context.CancelFunc {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	end := sync.OnceFunc(func() {
		cancel()
		if stop != nil {
			stop()
		}
		if err := <-done; err != nil {
			t.Errorf("run: %v", err)
		}
	})
	t.Cleanup(end)
	return end
}

func wait(t *testing.T, src *identity.Source) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	check(t, src.Wait(ctx))
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func testLog(t testing.TB) *slog.Logger {
	if !testing.Verbose() {
		return slog.New(slog.DiscardHandler)
	}
	return slog.New(slog.NewTextHandler(tWriter{t}, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

type tWriter struct{ t testing.TB }

var _ io.Writer = tWriter{}

func (w tWriter) Write(p []byte) (int, error) {
	w.t.Log(string(p))
	return len(p), nil
}
