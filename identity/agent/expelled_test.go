package agent_test

import (
	"context"
	"errors"
	"net"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	"github.com/hanse-mesh/hanse/identity/agent"
	"github.com/hanse-mesh/hanse/identity/spiretypes"
)

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
