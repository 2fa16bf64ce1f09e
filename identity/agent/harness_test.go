package agent_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
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
	store     store // what the SPIRE Server API has of kv
	authority *ca.Authority
	bundles   *bundle.Store
	tokens    *attest.Tokens
	api       *spireapi.Server
	agentLife time.Duration
	now       func() time.Time                 // nil: time.Now
	withdrawn atomic.Pointer[x509.Certificate] // a root that is left out of the trust domain's bundle

	mu   sync.Mutex
	lis  *bufconn.Listener // guarded by mu; nil: the server is dead
	grpc *grpc.Server      // guarded by mu
	ends []context.CancelFunc
}

// store is a KV that may be away: it answers nothing, as an etcd behind a cut link.
type store struct {
	spireapi.KV
	away    atomic.Bool
	renewed atomic.Bool // it goes away when an agent has been renewed
}

func (k *store) Get(ctx context.Context, key string) ([]byte, error) {
	if k.away.Load() {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return k.KV.Get(ctx, key)
}

func (k *store) CompareAndPut(ctx context.Context, key string, old, value []byte) (bool, error) {
	ok, err := k.KV.CompareAndPut(ctx, key, old, value)
	if ok && k.renewed.Load() && bytes.Contains(value, []byte("new_serial")) {
		k.away.Store(true)
	}
	return ok, err
}

type options struct {
	ca ca.Config
	// agentLife of agents' SVIDs.
	agentLife time.Duration
	// now is the server's clock; nil: time.Now.
	now func() time.Time
}

func newServer(t *testing.T, td string, opts options) *server {
	t.Helper()
	s := &server{t: t, td: spiffeid.RequireTrustDomainFromString(td), dir: t.TempDir(), kv: attest.NewMemory()}
	s.store.KV = s.kv
	s.open(opts)
	return s
}

func (s *server) open(opts options) {
	s.t.Helper()
	opts.ca.Dir, opts.ca.TrustDomain, opts.ca.Now = filepath.Join(s.dir, "ca"), s.td, opts.now
	var err error
	s.authority, err = ca.Open(opts.ca)
	check(s.t, err)
	s.agentLife, s.now = opts.agentLife, opts.now
	s.bundles, err = bundle.Open(bundle.Config{Dir: filepath.Join(s.dir, "bundles"), TrustDomain: s.td, Now: opts.now})
	check(s.t, err)
	s.tokens = attest.New(s.td, s.kv, opts.now)
}

// start runs the server, as after a restart, until the test ends, or until stop.
func (s *server) start() {
	s.t.Helper()
	var err error
	s.api, err = spireapi.New(s.t.Context(), spireapi.Config{Authority: s.authority, Bundles: s.bundles, Tokens: s.tokens, KV: &s.store,
		OwnBundle: s.ownBundle, AgentLife: s.agentLife, AttestBurst: 2000, Now: s.now, Log: testLog(s.t)})
	check(s.t, err)
	s.ends = []context.CancelFunc{run(s.t, s.api.Run, nil), run(s.t, s.authority.Run, nil)}
	lis := bufconn.Listen(1 << 20)
	g := grpc.NewServer(grpc.Creds(credentials.NewTLS(s.api.TLSConfig())), grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second}))
	s.api.RegisterAgent(g)
	s.mu.Lock()
	s.lis, s.grpc = lis, g
	s.mu.Unlock()
	s.ends = append(s.ends, run(s.t, func(context.Context) error { return g.Serve(lis) }, g.Stop))
}

// restart ends the server and starts it with what it has on disk, after the given time.
func (s *server) restart(opts options, after time.Duration) {
	s.t.Helper()
	s.stop()
	for _, end := range slices.Backward(s.ends) {
		end()
	}
	time.Sleep(after)
	s.open(opts)
	s.start()
}

func (s *server) ownBundle() *spiffebundle.Bundle {
	b := s.authority.Bundle()
	if root := s.withdrawn.Load(); root != nil {
		b.RemoveX509Authority(root)
		b.SetSequenceNumber(s.authority.Sequence() + 1)
	}
	return b
}

// stop kills the server: its connections break, and new ones are refused.
func (s *server) stop() {
	s.mu.Lock()
	g := s.grpc
	s.lis = nil
	s.mu.Unlock()
	g.Stop()
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

// local connects to the services of administrators.
func (s *server) local(t testing.TB) *grpc.ClientConn {
	t.Helper()
	lis := bufconn.Listen(1 << 20)
	g := grpc.NewServer()
	s.api.RegisterAdmin(g)
	go func() { _ = g.Serve(lis) }()
	t.Cleanup(g.Stop)
	conn, err := grpc.NewClient("passthrough:///local", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }))
	check(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func (s *server) entryAPI(t testing.TB) entryv1.EntryClient {
	return entryv1.NewEntryClient(s.local(t))
}

// firstAgent is nil while none is attested.
func (s *server) firstAgent(t testing.TB) *types.SPIFFEID {
	t.Helper()
	resp, err := agentv1.NewAgentClient(s.local(t)).ListAgents(t.Context(), &agentv1.ListAgentsRequest{})
	check(t, err)
	if len(resp.Agents) == 0 {
		return nil
	}
	return resp.Agents[0].Id
}
