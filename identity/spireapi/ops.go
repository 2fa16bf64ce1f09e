package spireapi

import (
	"context"
	"log/slog"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	debugv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/debug/v1"
	loggerv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/logger/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/identity/spiretypes"
)

// healthService says whether this server can sign.
type healthService struct {
	healthv1.UnimplementedHealthServer
	service
}

// Check is SERVING while an unexpired root is active. Only the server as a whole, "", is known.
func (s *healthService) Check(_ context.Context, req *healthv1.HealthCheckRequest) (*healthv1.HealthCheckResponse, error) {
	if req.Service != "" {
		return nil, status.Error(codes.NotFound, "unknown service")
	}
	for _, r := range s.cfg.Authority.Roots() {
		if r.Phase == "active" && s.cfg.Now().Before(r.Expires) {
			return &healthv1.HealthCheckResponse{Status: healthv1.HealthCheckResponse_SERVING}, nil
		}
	}
	return &healthv1.HealthCheckResponse{Status: healthv1.HealthCheckResponse_NOT_SERVING}, nil
}

// debugService describes the server.
type debugService struct {
	debugv1.UnimplementedDebugServer
	service
}

// GetInfo returns the counts, the uptime and the server's own SVID chain with its root.
func (s *debugService) GetInfo(context.Context, *debugv1.GetInfoRequest) (*debugv1.GetInfoResponse, error) {
	agents, entries := s.reg.counts()
	resp := &debugv1.GetInfoResponse{AgentsCount: int32(agents), EntriesCount: int32(entries), FederatedBundlesCount: int32(len((&bundleService{service: s.service}).federated())),
		Uptime: int32(s.cfg.Now().Sub(s.started).Seconds())}
	svid, err := s.src.GetX509SVID()
	if err != nil {
		return resp, nil // a joining replica has none yet
	}
	add := func(id spiffeid.ID, expires int64, subject string) {
		resp.SvidChain = append(resp.SvidChain, &debugv1.GetInfoResponse_Cert{Id: spiretypes.FromID(id), ExpiresAt: expires, Subject: subject})
	}
	for _, c := range svid.Certificates {
		add(identity.SPIREServerID(s.td), c.NotAfter.Unix(), c.Subject.String())
	}
	for _, c := range s.cfg.OwnBundle().X509Authorities() {
		if string(c.SubjectKeyId) == string(svid.Certificates[len(svid.Certificates)-1].AuthorityKeyId) {
			add(s.td.ID(), c.NotAfter.Unix(), c.Subject.String())
		}
	}
	return resp, nil
}

// loggerService changes how much is logged.
type loggerService struct {
	loggerv1.UnimplementedLoggerServer
	service
	launched slog.Level
}

// levels in SPIRE's words, quietest first.
var levels = []struct {
	api  types.LogLevel
	slog slog.Level
}{
	{types.LogLevel_PANIC, slog.LevelError + 8}, {types.LogLevel_FATAL, slog.LevelError + 4}, {types.LogLevel_ERROR, slog.LevelError},
	{types.LogLevel_WARN, slog.LevelWarn}, {types.LogLevel_INFO, slog.LevelInfo}, {types.LogLevel_DEBUG, slog.LevelDebug}, {types.LogLevel_TRACE, slog.LevelDebug - 4},
}

func apiLevel(l slog.Level) types.LogLevel {
	for _, x := range levels {
		if l >= x.slog {
			return x.api
		}
	}
	return types.LogLevel_TRACE
}

func (s *loggerService) answer() *types.Logger {
	return &types.Logger{CurrentLevel: apiLevel(s.cfg.Level.Level()), LaunchLevel: apiLevel(s.launched)}
}

// GetLogger returns the present level and that of the start.
func (s *loggerService) GetLogger(context.Context, *loggerv1.GetLoggerRequest) (*types.Logger, error) {
	return s.answer(), nil
}

// SetLogLevel changes the level until ResetLogLevel or the process's end.
func (s *loggerService) SetLogLevel(_ context.Context, req *loggerv1.SetLogLevelRequest) (*types.Logger, error) {
	if req.NewLevel == types.LogLevel_UNSPECIFIED {
		return nil, invalid("newLevel value cannot be LogLevel_UNSPECIFIED")
	}
	for _, x := range levels {
		if x.api == req.NewLevel {
			s.cfg.Level.Set(x.slog)
			s.log.Info("log level set", "level", req.NewLevel.String())
			return s.answer(), nil
		}
	}
	return nil, invalid("unsupported log level")
}

// ResetLogLevel goes back to the level of the start.
func (s *loggerService) ResetLogLevel(context.Context, *loggerv1.ResetLogLevelRequest) (*types.Logger, error) {
	s.cfg.Level.Set(s.launched)
	return s.answer(), nil
}
