package agent_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/identity/agent"
	"github.com/hanse-mesh/hanse/identity/bundle"
	"github.com/hanse-mesh/hanse/identity/ca"
)

// socketDir is short enough for a socket's name.
func socketDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "hanse")
	check(t, err)
	t.Cleanup(func() { check(t, os.RemoveAll(dir)) })
	return dir
}

// workloadAPI is west, federated with east, and an agent that serves frontend's Workload API on a Unix socket.
func workloadAPI(t *testing.T) (west, east *server, a *agent.Agent, addr string) {
	t.Helper()
	west, east = newServer(t, "west.demo", options{ca: ca.Config{X509Life: 2 * time.Second}}), newServer(t, "east.demo", options{})
	west.start()
	check(t, west.bundles.Relate(bundle.Relation{TrustDomain: east.td}))
	check(t, west.bundles.Set(east.td, east.authority.Bundle(), "join"))
	cfg := west.agentConfig(west.token(frontend))
	cfg.SocketPath = filepath.Join(socketDir(t), "private", "api.sock")
	cfg.SyncInterval = 50 * time.Millisecond
	a, _ = runAgent(t, cfg)
	wait(t, a.Source())
	for i := 0; ; i++ {
		if info, err := os.Stat(cfg.SocketPath); err == nil {
			if info.Mode().Perm() != 0o600 {
				t.Errorf("the socket has mode %04o", info.Mode().Perm())
			}
			break
		}
		if i > 1000 {
			t.Fatal("no socket")
		}
		time.Sleep(time.Millisecond)
	}
	if info, err := os.Stat(filepath.Dir(cfg.SocketPath)); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the socket's folder: %v, %v", info.Mode(), err)
	}
	return west, east, a, "unix://" + cfg.SocketPath
}

func TestWorkloadAPI(t *testing.T) {
	t.Parallel()
	west, east, _, addr := workloadAPI(t)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	c, err := workloadapi.New(ctx, workloadapi.WithAddr(addr))
	check(t, err)
	defer c.Close()

	t.Run("X509-SVID", func(t *testing.T) {
		x, err := c.FetchX509Context(ctx)
		check(t, err)
		if len(x.SVIDs) != 1 || x.SVIDs[0].ID.String() != frontend || x.Bundles.Len() != 2 {
			t.Errorf("SVIDs %v, %d bundles", x.SVIDs, x.Bundles.Len())
		}
		b, err := x.Bundles.GetX509BundleForTrustDomain(east.td)
		check(t, err)
		if !b.Equal(east.authority.Bundle().X509Bundle()) {
			t.Error("east's bundle differs")
		}
	})
	t.Run("bundles", func(t *testing.T) {
		x, err := c.FetchX509Bundles(ctx)
		check(t, err)
		j, err := c.FetchJWTBundles(ctx)
		check(t, err)
		if x.Len() != 2 || j.Len() != 2 {
			t.Errorf("%d X.509 bundles, %d JWT bundles", x.Len(), j.Len())
		}
	})
	t.Run("JWT-SVID", func(t *testing.T) {
		svid, err := c.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "payments", ExtraAudiences: []string{"ledger"}})
		check(t, err)
		again, err := c.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "ledger", ExtraAudiences: []string{"payments"}})
		check(t, err)
		if svid.ID.String() != frontend || svid.Marshal() != again.Marshal() {
			t.Errorf("%v; the same again comes from the cache: %v", svid.ID, svid.Marshal() == again.Marshal())
		}
		valid, err := c.ValidateJWTSVID(ctx, svid.Marshal(), "ledger")
		check(t, err)
		if valid.ID.String() != frontend {
			t.Errorf("validates as %s", valid.ID)
		}
		if _, err := c.ValidateJWTSVID(ctx, svid.Marshal(), "other"); status.Code(err) != codes.InvalidArgument {
			t.Errorf("for another audience: %v", err)
		}
		if _, err := c.ValidateJWTSVID(ctx, svid.Marshal()[:40], "ledger"); status.Code(err) != codes.InvalidArgument {
			t.Errorf("half a token: %v", err)
		}
		// Another trust domain's, by its bundle; and an unknown one's.
		foreign, err := east.authority.SignJWT(ctx, spiffeid.RequireFromString("spiffe://east.demo/x"), []string{"me"}, 0)
		check(t, err)
		if valid, err = c.ValidateJWTSVID(ctx, foreign.Token, "me"); err != nil || valid.ID.String() != "spiffe://east.demo/x" {
			t.Errorf("east's: %v, %v", valid, err)
		}
		foreign, err = newServer(t, "north.demo", options{}).authority.SignJWT(ctx, spiffeid.RequireFromString("spiffe://north.demo/x"), []string{"me"}, 0)
		check(t, err)
		if _, err = c.ValidateJWTSVID(ctx, foreign.Token, "me"); err == nil {
			t.Error("validates a stranger's")
		}
		other := spiffeid.RequireFromString("spiffe://west.demo/ns/shop/sa/admin")
		if _, err := c.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "x", Subject: other}); status.Code(err) != codes.PermissionDenied {
			t.Errorf("another subject: %v", err)
		}
	})
	t.Run("streams follow renewals and rotations", func(t *testing.T) {
		ctx, cancel := context.WithCancel(ctx)
		w := &recorder{done: cancel}
		time.AfterFunc(time.Second, func() { _ = west.authority.Prepare() })
		if err := c.WatchX509Context(ctx, w); status.Code(err) != codes.Canceled && !errors.Is(err, context.Canceled) {
			t.Errorf("watch ends with %v", err)
		}
		if len(w.serials) < 3 || w.roots < 2 {
			t.Errorf("%d SVIDs and %d roots seen", len(w.serials), w.roots)
		}
	})
	t.Run("SDS", func(t *testing.T) { // Envoy sends no header
		conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
		check(t, err)
		defer conn.Close()
		stream, err := secretv3.NewSecretDiscoveryServiceClient(conn).StreamSecrets(ctx)
		check(t, err)
		check(t, stream.Send(&discoveryv3.DiscoveryRequest{}))
		seen := map[string]bool{}
		for len(seen) < 2 { // renewals
			resp, err := stream.Recv()
			check(t, err)
			if len(resp.Resources) != 3 {
				t.Fatalf("%d secrets, want the SVID and two bundles", len(resp.Resources))
			}
			seen[string(resp.Resources[2].Value)] = true
			check(t, stream.Send(&discoveryv3.DiscoveryRequest{VersionInfo: resp.VersionInfo, ResponseNonce: resp.Nonce}))
		}
	})
	t.Run("the header is required", func(t *testing.T) {
		conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
		check(t, err)
		defer conn.Close()
		raw := workload.NewSpiffeWorkloadAPIClient(conn)
		for _, ctx := range []context.Context{ctx, metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "yes")} {
			stream, err := raw.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
			check(t, err)
			if _, err := stream.Recv(); status.Code(err) != codes.InvalidArgument {
				t.Errorf("FetchX509SVID: %v", err)
			}
			if _, err := raw.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"x"}}); status.Code(err) != codes.InvalidArgument {
				t.Errorf("FetchJWTSVID: %v", err)
			}
		}
		ctx := metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
		if _, err := raw.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("no audience: %v", err)
		}
		resp, err := raw.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "payments", Svid: fetch(ctx, t, raw)})
		check(t, err)
		if resp.Claims.AsMap()["sub"] != frontend {
			t.Errorf("claims %v", resp.Claims)
		}
	})
}

func fetch(ctx context.Context, t *testing.T, c workload.SpiffeWorkloadAPIClient) string {
	t.Helper()
	resp, err := c.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"payments"}})
	check(t, err)
	return resp.Svids[0].Svid
}

// recorder implements workloadapi.X509ContextWatcher. It is done when it has seen three SVIDs and a second root.
type recorder struct {
	serials map[string]bool
	roots   int
	done    context.CancelFunc
}

func (r *recorder) OnX509ContextUpdate(c *workloadapi.X509Context) {
	if r.serials == nil {
		r.serials = map[string]bool{}
	}
	r.serials[c.DefaultSVID().Certificates[0].SerialNumber.String()] = true
	if b, err := c.Bundles.GetX509BundleForTrustDomain(c.DefaultSVID().ID.TrustDomain()); err == nil {
		r.roots = len(b.X509Authorities())
	}
	if len(r.serials) >= 3 && r.roots >= 2 {
		r.done()
	}
}

func (r *recorder) OnX509ContextWatchError(error) {}

// JWT-SVIDs go on from the cache while the server is dead.
func TestJWTWithServerDead(t *testing.T) {
	t.Parallel()
	west, _, _, addr := workloadAPI(t)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	c, err := workloadapi.New(ctx, workloadapi.WithAddr(addr))
	check(t, err)
	defer c.Close()
	svid, err := c.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "payments"})
	check(t, err)
	west.stop()
	again, err := c.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "payments"})
	check(t, err)
	if again.Marshal() != svid.Marshal() {
		t.Error("another token")
	}
	if _, err := c.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "never asked before"}); status.Code(err) != codes.Unavailable {
		t.Errorf("a new audience: %v", err)
	}
}

// An agent that follows another's Workload API (SPIRE's, say) feeds the same Source.
func TestFollowWorkloadAPI(t *testing.T) {
	t.Parallel()
	_, east, _, addr := workloadAPI(t)
	dir := filepath.Join(t.TempDir(), "files")
	a, stop := runAgent(t, agent.Config{WorkloadAPI: addr, FilesDir: dir, SyncInterval: 10 * time.Millisecond})
	wait(t, a.Source())
	b := a.Source().Bundles()[east.td]
	north := spiffeid.RequireTrustDomainFromString("north.demo") // which this workload does not federate with
	check(t, a.TrustFollowed(t.Context(), map[spiffeid.TrustDomain][]byte{east.td: identity.Digest(b.X509Authorities()), north: identity.Digest(nil)}))
	short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := a.TrustFollowed(short, map[spiffeid.TrustDomain][]byte{east.td: identity.Digest(nil)}); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "east.demo") {
		t.Errorf("another authority is announced than there is: %v", err)
	}
	for renewals := 0; renewals < 2; renewals++ {
		svid, err := a.Source().GetX509SVID()
		check(t, err)
		if svid.ID.String() != frontend || len(a.Source().Bundles()) != 2 {
			t.Errorf("%s, %d bundles", svid.ID, len(a.Source().Bundles()))
		}
		if _, err := a.Source().Verify(svid.Certificates); err != nil {
			t.Error(err)
		}
		select {
		case <-a.Source().Changed():
		case <-time.After(10 * time.Second):
			t.Fatal("no renewal arrives")
		}
	}
	stop()
	if _, err := os.Stat(filepath.Join(dir, agent.FileSVID)); err != nil {
		t.Error(err)
	}
}

func TestSocketInUse(t *testing.T) {
	t.Parallel()
	_, _, _, addr := workloadAPI(t)
	s := newServer(t, "west.demo", options{})
	cfg := s.agentConfig(s.token(frontend))
	cfg.SocketPath = strings.TrimPrefix(addr, "unix://")
	a, err := agent.New(cfg)
	check(t, err)
	if err := a.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("error: %v", err)
	}
}

// The first trust in a server may be a SPIFFE bundle as well as PEM.
func TestBootstrapBundles(t *testing.T) {
	t.Parallel()
	s := newServer(t, "west.demo", options{})
	s.start()
	good, err := s.authority.Bundle().Marshal()
	check(t, err)
	empty, err := spiffebundle.New(s.td).Marshal()
	check(t, err)
	for name, c := range map[string]struct {
		data []byte
		ok   bool
	}{"a SPIFFE bundle": {good, true}, "an empty one": {empty, false}, "nothing": {nil, false}, "noise": {[]byte("hello"), false},
		"a key": {[]byte("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"), false}} {
		t.Run(name, func(t *testing.T) {
			cfg := s.agentConfig(s.token(frontend))
			check(t, os.WriteFile(cfg.TrustBundle, c.data, 0o600))
			cfg.SyncInterval = 20 * time.Millisecond
			a, _ := runAgent(t, cfg)
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			if !c.ok {
				cancel()
				ctx, cancel = context.WithTimeout(t.Context(), 50*time.Millisecond)
			}
			defer cancel()
			if err := a.Source().Wait(ctx); (err == nil) != c.ok {
				t.Errorf("SVID: %v", err)
			}
		})
	}
}
