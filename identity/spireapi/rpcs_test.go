package spireapi_test

import (
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"log/slog"

	"github.com/hanse-mesh/hanse/identity/spireapi"
)

// Every RPC of the API is served on the administrators' socket: none answers Unimplemented but those of WIT-SVIDs, which
// SPIRE v1.13 has not either, and which nothing here issues.
func TestEveryRPC(t *testing.T) {
	f := newFixture(t, func(c *spireapi.Config) { c.Level = new(slog.LevelVar) })
	g := grpc.NewServer(f.api.ServerOptions()...)
	f.api.RegisterAdmin(g)
	var methods []string
	for name, info := range g.GetServiceInfo() {
		for _, m := range info.Methods {
			if !strings.HasPrefix(name, "grpc.health.") {
				methods = append(methods, "/"+name+"/"+m.Name)
			}
		}
	}
	slices.Sort(methods)
	conn := newClient(t, serve(t, grpc.NewServer(f.api.ServerOptions()...), f.api.RegisterAdmin), insecure.NewCredentials()).conn
	served := map[string]int{}
	for _, m := range methods {
		if strings.Contains(m, "WIT") {
			wantCode(t, m, conn.Invoke(t.Context(), m, &emptypb.Empty{}, &emptypb.Empty{}), codes.Unimplemented)
			continue
		}
		stream, err := conn.NewStream(t.Context(), &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, m)
		check(t, err)
		_ = stream.SendMsg(&emptypb.Empty{})
		_ = stream.CloseSend()
		if err = stream.RecvMsg(&emptypb.Empty{}); status.Code(err) == codes.Unimplemented {
			t.Errorf("%s: %v", m, err)
		}
		parts := strings.Split(m, ".")
		served[parts[len(parts)-3]]++
	}
	want := map[string]int{"agent": 9, "bundle": 10, "entry": 8, "svid": 5, "trustdomain": 6, "localauthority": 12, "logger": 3, "debug": 1}
	total := 0
	for service, n := range want {
		if served[service] != n {
			t.Errorf("%s: %d RPCs, want %d", service, served[service], n)
		}
		total += n
	}
	if total != 54 {
		t.Errorf("%d RPCs, want 54", total)
	}
}
