package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/hanse-mesh/hanse/identity/peercred"
	"github.com/hanse-mesh/hanse/identity/sds"
)

// listenUnix opens the socket of the Workload API. A socket that a dead process left is replaced. Others than its owner can only reach it where
// the configuration has users.
func (a *Agent) listenUnix() (net.Listener, error) {
	path, dir, mode := a.cfg.SocketPath, fs.FileMode(0o700), fs.FileMode(0o600)
	if a.cfg.SocketUsers.others() {
		dir, mode = 0o755, 0o666
	}
	if err := os.MkdirAll(filepath.Dir(path), dir); err != nil {
		return nil, fmt.Errorf("workload API socket: %w", err)
	}
	if info, err := os.Lstat(path); err == nil && info.Mode()&fs.ModeSocket != 0 {
		if conn, err := net.DialTimeout("unix", path, time.Second); err == nil {
			_ = conn.Close()
			return nil, fmt.Errorf("workload API socket %s is in use", path)
		}
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("workload API socket: %w", err)
		}
	}
	lis, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("workload API socket: %w", err)
	}
	if err := os.Chmod(path, mode); err != nil {
		return nil, errors.Join(fmt.Errorf("workload API socket: %w", err), lis.Close())
	}
	return &admitted{Listener: lis, agent: a}, nil
}

// SocketUsers are those who may use the Workload API's socket, beside root and the user of this process.
type SocketUsers struct {
	Any    bool // whoever reaches the socket
	IDs    []uint32
	Groups []uint32 // whoever is in one of them, primary or supplementary
}

func (u SocketUsers) others() bool { return u.Any || len(u.IDs) > 0 || len(u.Groups) > 0 }

func (u SocketUsers) has(c peercred.Caller) bool {
	in := func(gid uint32) bool { return slices.Contains(u.Groups, gid) }
	return slices.Contains(u.IDs, c.UID) || in(c.GID) || slices.ContainsFunc(c.Groups, in)
}

// admit asks the kernel who called.
func (u SocketUsers) admit(c net.Conn) (peercred.Caller, error) {
	caller, err := peercred.Of(c)
	switch {
	case u.Any:
		return caller, nil
	case errors.Is(err, errors.ErrUnsupported) && !u.others(): // the socket's mode lets only its owner in
		return caller, nil
	case err != nil:
		return caller, err
	case caller.UID == 0, caller.UID == uint32(os.Geteuid()), u.has(caller):
		return caller, nil
	}
	return caller, fmt.Errorf("uid %d (gid %d, groups %v) is not among the users of the socket", caller.UID, caller.GID, caller.Groups)
}

// admitted turns away who may not call, before a byte is read.
type admitted struct {
	net.Listener
	agent *Agent
}

func (l *admitted) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		caller, err := l.agent.cfg.SocketUsers.admit(c)
		if err == nil {
			l.agent.log.Debug("Workload API called", "by", caller.String())
			return c, nil
		}
		_ = c.Close()
		l.agent.metrics.strangers.Inc()
		if l.agent.strangers.Due(time.Now()) {
			l.agent.log.Warn("caller of the Workload API refused; more of them in the next 10 s are only counted", "by", caller.String(), "error", err)
		}
	}
}

// ServeWorkloadAPI serves the SPIFFE Workload API, and Envoy's SDS, on lis until ctx ends. Whoever can connect gets the workload's
// identity: lis must let nobody else in.
func (a *Agent) ServeWorkloadAPI(ctx context.Context, lis net.Listener) error {
	s := grpc.NewServer(
		grpc.MaxRecvMsgSize(1<<20),
		grpc.ConnectionTimeout(10*time.Second),
		grpc.UnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
			if err := checkHeader(ctx, info.FullMethod); err != nil {
				return nil, err
			}
			return h(ctx, req)
		}),
		grpc.StreamInterceptor(func(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, h grpc.StreamHandler) error {
			if err := checkHeader(stream.Context(), info.FullMethod); err != nil {
				return err
			}
			return h(srv, stream)
		}),
	)
	workload.RegisterSpiffeWorkloadAPIServer(s, &workloadServer{agent: a})
	sds.Register(s, a.src, a.log)
	done := make(chan error, 1)
	go func() { done <- s.Serve(lis) }()
	var err error
	select {
	case <-ctx.Done():
		s.Stop()
		<-done // what Serve says after Stop is not news
	case err = <-done:
		s.Stop()
		err = fmt.Errorf("serve Workload API: %w", err)
	}
	return err
}

// checkHeader wants the header that keeps web pages out (SPIFFE Workload API §3, SPIFFE Workload Endpoint §4). Envoy, whose SDS is no part of
// that standard, does not send it.
func checkHeader(ctx context.Context, method string) error {
	if strings.HasPrefix(method, "/"+secretv3.SecretDiscoveryService_ServiceDesc.ServiceName+"/") {
		return nil
	}
	md, _ := metadata.FromIncomingContext(ctx)
	if v := md.Get("workload.spiffe.io"); len(v) != 1 || v[0] != "true" {
		return status.Error(codes.InvalidArgument, "security header missing from request")
	}
	return nil
}

// workloadServer serves one identity: that of the agent's Source.
type workloadServer struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	agent *Agent
}

// follow sends what f makes of the Source, again when it changed, until the stream ends. It waits for the first SVID.
func follow[T proto.Message](ctx context.Context, a *Agent, f func() (T, error), send func(T) error) error {
	var last T
	first := true
	for {
		changed := a.src.Changed()
		if _, err := a.src.GetX509SVID(); err == nil {
			msg, err := f()
			if err != nil {
				return status.Error(codes.Internal, err.Error())
			}
			if first || !proto.Equal(last, msg) {
				if err := send(msg); err != nil {
					return err
				}
				last, first = msg, false
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
}

// FetchX509SVID implements the Workload API §5.2.1.
func (s *workloadServer) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	return follow(stream.Context(), s.agent, func() (*workload.X509SVIDResponse, error) {
		svid, err := s.agent.src.GetX509SVID()
		if err != nil {
			return nil, err
		}
		chain, key, err := svid.MarshalRaw()
		if err != nil {
			return nil, fmt.Errorf("encode X509-SVID: %w", err)
		}
		resp := &workload.X509SVIDResponse{FederatedBundles: map[string][]byte{}}
		out := &workload.X509SVID{SpiffeId: svid.ID.String(), X509Svid: chain, X509SvidKey: key}
		for td, b := range s.agent.src.Bundles() {
			if td == svid.ID.TrustDomain() {
				out.Bundle = concat(b)
			} else {
				resp.FederatedBundles[td.IDString()] = concat(b)
			}
		}
		resp.Svids = []*workload.X509SVID{out}
		return resp, nil
	}, stream.Send)
}

// FetchX509Bundles implements the Workload API §5.2.2.
func (s *workloadServer) FetchX509Bundles(_ *workload.X509BundlesRequest, stream grpc.ServerStreamingServer[workload.X509BundlesResponse]) error {
	return follow(stream.Context(), s.agent, func() (*workload.X509BundlesResponse, error) {
		resp := &workload.X509BundlesResponse{Bundles: map[string][]byte{}}
		for td, b := range s.agent.src.Bundles() {
			resp.Bundles[td.IDString()] = concat(b)
		}
		return resp, nil
	}, stream.Send)
}

// FetchJWTBundles implements the Workload API §6.2.2.
func (s *workloadServer) FetchJWTBundles(_ *workload.JWTBundlesRequest, stream grpc.ServerStreamingServer[workload.JWTBundlesResponse]) error {
	return follow(stream.Context(), s.agent, func() (*workload.JWTBundlesResponse, error) {
		resp := &workload.JWTBundlesResponse{Bundles: map[string][]byte{}}
		for td, b := range s.agent.src.Bundles() {
			data, err := b.JWTBundle().Marshal()
			if err != nil {
				return nil, fmt.Errorf("encode JWT bundle of %s: %w", td, err)
			}
			resp.Bundles[td.IDString()] = data
		}
		return resp, nil
	}, stream.Send)
}

// FetchJWTSVID implements the Workload API §6.2.1.
func (s *workloadServer) FetchJWTSVID(ctx context.Context, req *workload.JWTSVIDRequest) (*workload.JWTSVIDResponse, error) {
	if len(req.Audience) == 0 {
		return nil, status.Error(codes.InvalidArgument, "audience must be specified")
	}
	if err := s.agent.src.Wait(ctx); err != nil {
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	svid, err := s.agent.src.GetX509SVID()
	if err != nil {
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	if req.SpiffeId != "" && req.SpiffeId != svid.ID.String() {
		return nil, status.Errorf(codes.PermissionDenied, "this workload is not %s", req.SpiffeId)
	}
	token, err := s.agent.jwtSVID(ctx, req.Audience)
	if err != nil {
		s.agent.metrics.failures.WithLabelValues("workload_api").Inc()
		s.agent.log.Warn("cannot get a JWT-SVID", "audience", req.Audience, "error", err)
		return nil, status.Errorf(codes.Unavailable, "could not fetch JWT-SVID: %v", err)
	}
	return &workload.JWTSVIDResponse{Svids: []*workload.JWTSVID{{SpiffeId: svid.ID.String(), Svid: token}}}, nil
}

// ValidateJWTSVID implements the Workload API §6.2.3.
func (s *workloadServer) ValidateJWTSVID(_ context.Context, req *workload.ValidateJWTSVIDRequest) (*workload.ValidateJWTSVIDResponse, error) {
	switch {
	case req.Audience == "":
		return nil, status.Error(codes.InvalidArgument, "audience must be specified")
	case req.Svid == "":
		return nil, status.Error(codes.InvalidArgument, "svid must be specified")
	}
	svid, err := jwtsvid.ParseAndValidate(req.Svid, jwtBundles(s.agent.src.Bundles()), []string{req.Audience})
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	claims, err := structpb.NewStruct(svid.Claims)
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "claims: %v", err)
	}
	return &workload.ValidateJWTSVIDResponse{SpiffeId: svid.ID.String(), Claims: claims}, nil
}

// jwtBundles implements jwtbundle.Source.
type jwtBundles map[spiffeid.TrustDomain]*spiffebundle.Bundle

func (m jwtBundles) GetJWTBundleForTrustDomain(td spiffeid.TrustDomain) (*jwtbundle.Bundle, error) {
	b, ok := m[td]
	if !ok {
		return nil, fmt.Errorf("no bundle for trust domain %s", td)
	}
	return b.JWTBundle(), nil
}

func concat(b *spiffebundle.Bundle) []byte {
	var out []byte
	for _, c := range b.X509Authorities() {
		out = append(out, c.Raw...)
	}
	return out
}

// jwtSVID returns a JWT-SVID from the cache or the server.
func (a *Agent) jwtSVID(ctx context.Context, audience []string) (string, error) {
	audience = slices.Sorted(slices.Values(audience))
	if token, fresh := a.jwts.get(audience); fresh {
		return token, nil
	}
	token, err := a.fetchJWT(ctx, audience)
	if err != nil {
		if old, _ := a.jwts.get(audience); old != "" { // valid still: the server may be dead
			return old, nil
		}
		return "", err
	}
	return token, nil
}

func (a *Agent) fetchJWT(ctx context.Context, audience []string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, rpcTimeout)
	defer cancel()
	if err := a.lock(ctx); err != nil {
		return "", err
	}
	defer func() { <-a.work }()
	c, err := a.mutual()
	if err != nil {
		return "", err
	}
	now := a.cfg.Now()
	resp, err := c.svids.NewJWTSVID(ctx, &svidv1.NewJWTSVIDRequest{EntryId: a.state.entryID, Audience: audience})
	if err != nil {
		return "", fmt.Errorf("get JWT-SVID from %s: %w", c.addr, err)
	}
	if resp.GetSvid().GetToken() == "" {
		return "", fmt.Errorf("get JWT-SVID from %s: it sent none", c.addr)
	}
	expires := time.Unix(resp.Svid.ExpiresAt, 0)
	a.jwts.put(audience, jwtEntry{token: resp.Svid.Token, renewAt: renewTime(now, expires), expires: expires})
	a.metrics.renewals.WithLabelValues("jwt").Inc()
	return resp.Svid.Token, nil
}

// jwtCache keeps JWT-SVIDs by audience until half of their life is over, or while nothing better is to be had.
type jwtCache struct {
	now func() time.Time

	mu sync.Mutex
	m  map[string]jwtEntry // guarded by mu
}

type jwtEntry struct {
	token            string
	renewAt, expires time.Time
}

const maxJWTs = 1000

func newJWTCache(now func() time.Time) *jwtCache {
	return &jwtCache{now: now, m: map[string]jwtEntry{}}
}

// get returns a token that is valid, and whether it needs no renewal.
func (c *jwtCache) get(audience []string) (token string, fresh bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e, now := c.m[strings.Join(audience, "\x00")], c.now()
	if !now.Before(e.expires) {
		return "", false
	}
	return e.token, now.Before(e.renewAt)
}

func (c *jwtCache) put(audience []string, e jwtEntry) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.m) >= maxJWTs {
		now := c.now()
		maps.DeleteFunc(c.m, func(_ string, e jwtEntry) bool { return !now.Before(e.expires) })
	}
	if len(c.m) >= maxJWTs {
		clear(c.m)
	}
	c.m[strings.Join(audience, "\x00")] = e
}

// drop forgets every token, for another identity.
func (c *jwtCache) drop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	clear(c.m)
}
