package spireapi_test

import (
	"context"
	"log/slog"
	"testing"

	debugv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/debug/v1"
	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	loggerv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/logger/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/identity/spireapi"
)

// TestOperationsAuthorization holds what SPIRE's policy says: local authorities are for administrators, logger, debug and
// health for the local socket alone.
func TestOperationsAuthorization(t *testing.T) {
	level := new(slog.LevelVar)
	f := newFixture(t, func(c *spireapi.Config) { c.Level = level })
	adminID, err := identity.AdminID(west, "anna")
	check(t, err)
	adminSVID, err := f.authority.NewSVID(adminID, 0)
	check(t, err)
	agent := f.agent(frontend)
	calls := map[string]func(ctx context.Context, c grpc.ClientConnInterface) error{
		"local authority": func(ctx context.Context, c grpc.ClientConnInterface) error {
			api := localauthorityv1.NewLocalAuthorityClient(c)
			if _, err := api.GetJWTAuthorityState(ctx, &localauthorityv1.GetJWTAuthorityStateRequest{}); err != nil {
				return err
			}
			_, err := api.PrepareX509Authority(ctx, &localauthorityv1.PrepareX509AuthorityRequest{})
			return err
		},
		"logger": func(ctx context.Context, c grpc.ClientConnInterface) error {
			_, err := loggerv1.NewLoggerClient(c).SetLogLevel(ctx, &loggerv1.SetLogLevelRequest{NewLevel: types.LogLevel_DEBUG})
			return err
		},
		"debug": func(ctx context.Context, c grpc.ClientConnInterface) error {
			_, err := debugv1.NewDebugClient(c).GetInfo(ctx, &debugv1.GetInfoRequest{})
			return err
		},
		"health": func(ctx context.Context, c grpc.ClientConnInterface) error {
			_, err := healthv1.NewHealthClient(c).Check(ctx, &healthv1.HealthCheckRequest{})
			return err
		},
	}
	for _, c := range []struct {
		caller          string
		client          *client
		authority, rest codes.Code
	}{
		{"anonymous", f.connect(nil), codes.Unauthenticated, codes.Unimplemented},
		{"agent", agent, codes.PermissionDenied, codes.Unimplemented},
		{"admin", f.connect(adminSVID), codes.OK, codes.Unimplemented},
		{"local", f.admin, codes.OK, codes.OK},
	} {
		for name, call := range calls {
			want := c.rest
			if name == "local authority" {
				want = c.authority
			}
			wantCode(t, c.caller+": "+name, call(t.Context(), c.client.conn), want)
		}
	}
	if level.Level() != slog.LevelDebug {
		t.Errorf("level %s after SetLogLevel", level.Level())
	}
}
