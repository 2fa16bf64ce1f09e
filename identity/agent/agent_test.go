package agent_test

import (
	"context"
	"net"
	"testing"
	"testing/synctest"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/hanse-mesh/hanse/identity/agent"
)

func TestAttestAndServe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, "west.demo", options{})
		s.start()
		a, _ := runAgent(t, s.agentConfig(s.token("spiffe://west.demo/ns/shop/sa/frontend")))
		wait(t, a.Source())
		svid, err := a.Source().GetX509SVID()
		check(t, err)
		if got := svid.ID.String(); got != "spiffe://west.demo/ns/shop/sa/frontend" {
			t.Errorf("SVID is %s", got)
		}
		if id, err := a.Source().Verify(svid.Certificates); err != nil || id != svid.ID {
			t.Errorf("own SVID verifies as %v, %v", id, err)
		}
	})
}

func TestOverTCP(t *testing.T) {
	s := newServer(t, "west.demo", options{})
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	g := grpc.NewServer(grpc.Creds(credentials.NewTLS(s.api.TLSConfig())))
	s.api.RegisterAgent(g)
	run(t, func(context.Context) error { return g.Serve(lis) }, g.Stop)
	cfg := s.agentConfig(s.token("spiffe://west.demo/ns/shop/sa/frontend"))
	cfg.ServerAddrs, cfg.Dial = []string{"127.0.0.1:1", lis.Addr().String()}, nil // the first one is dead
	a, err := agent.New(cfg)
	check(t, err)
	run(t, a.Run, nil)
	wait(t, a.Source())
}
