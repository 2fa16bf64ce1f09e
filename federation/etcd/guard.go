package etcd

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/hanse-mesh/hanse/identity"
)

// Limits of what a peer may ask.
const (
	maxPeerStreams = 2*maxScopes + 64 // at one time, of one SPIFFE ID: each scope is watched, and listed or probed
	maxWatches     = maxScopes + 16   // of one watch stream
	maxRangeKeys   = 1000             // of one Range; longer ones by limit and pages, or by RangeStream
	maxRequest     = 64 << 10
)

// Authorizer returns the key prefixes that a peer may read, each ending in a slash. It is false for a peer that may not read at all.
// It is called often and must not block.
type Authorizer func(peer spiffeid.ID) (prefixes []string, ok bool)

// GuardConfig says what a Guard serves, and to whom.
type GuardConfig struct {
	KV        pb.KVServer // of Embedded.Servers or External.Servers
	Watch     pb.WatchServer
	Source    *identity.Source // verifies peers again at each call and at each Recheck
	Authorize Authorizer
	Changed   <-chan struct{} // may be nil: the answers of Authorize have changed
	Log       *slog.Logger
	Metrics   prometheus.Registerer // may be nil
	Now       func() time.Time      // nil is time.Now
}

// Guard serves etcd's Range, RangeStream and Watch, read-only, each caller within its own prefixes. All else is Unimplemented.
type Guard struct {
	pb.UnimplementedKVServer
	cfg     GuardConfig
	metrics *guardMetrics

	mu      sync.Mutex
	streams map[*guarded]struct{} // guarded by mu
	byPeer  map[spiffeid.ID]int   // guarded by mu
}

type guardMetrics struct {
	requests *prometheus.CounterVec
	streams  *prometheus.GaugeVec
	closed   *prometheus.CounterVec
}

// guarded is one open stream.
type guarded struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
	chain  []*x509.Certificate
	id     spiffeid.ID
	ranges []keyRange // guarded by Guard.mu
}

// keyRange is what a request reads: one key if end is empty, else [key, end).
type keyRange struct{ key, end []byte }

// NewGuard returns a Guard.
func NewGuard(cfg GuardConfig) *Guard {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	cfg.Log = orDiscard(cfg.Log)
	g := &Guard{
		cfg:     cfg,
		streams: map[*guarded]struct{}{},
		byPeer:  map[spiffeid.ID]int{},
		metrics: &guardMetrics{
			requests: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "hanse_federation_guard_requests_total",
				Help: "Requests of peers to read this cluster's exports."}, []string{"trust_domain", "method", "code"}),
			streams: prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "hanse_federation_guard_streams",
				Help: "Open streams of peers."}, []string{"trust_domain"}),
			closed: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "hanse_federation_guard_streams_closed_total",
				Help: "Streams closed because a peer may no longer read all that it read."}, []string{"trust_domain"}),
		},
	}
	if cfg.Metrics != nil {
		cfg.Metrics.MustRegister(g.metrics.requests, g.metrics.streams, g.metrics.closed)
	}
	return g
}

// Register adds the Guard's services to a server that was made with ServerOptions.
func (g *Guard) Register(s grpc.ServiceRegistrar) {
	pb.RegisterKVServer(s, g)
	pb.RegisterWatchServer(s, guardWatch{g: g})
}

// ServerOptions are the limits and timers of the federation listener. rnd spreads the ages of connections.
func ServerOptions(rnd *rand.Rand) []grpc.ServerOption {
	age := 30 * time.Minute
	return []grpc.ServerOption{
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			Time: keepaliveTime, Timeout: keepaliveTimeout,
			MaxConnectionAge: age + time.Duration(rnd.Int64N(int64(age))), MaxConnectionAgeGrace: 30 * time.Second,
		}),
		grpc.MaxConcurrentStreams(maxPeerStreams),
		grpc.MaxRecvMsgSize(maxRequest),
		grpc.MaxHeaderListSize(16 << 10),
		grpc.ConnectionTimeout(10 * time.Second),
	}
}

// Run closes streams that have lost their authorisation, whenever that or a trust bundle changes, until ctx ends.
func (g *Guard) Run(ctx context.Context) error {
	for {
		bundles := g.cfg.Source.Changed()
		g.Recheck()
		select {
		case <-bundles:
		case <-g.cfg.Changed:
		case <-ctx.Done():
			return nil
		}
	}
}

// Recheck closes every stream of which the peer's chain no longer verifies, or of which a range is no longer authorised.
func (g *Guard) Recheck() {
	g.mu.Lock()
	open := make(map[*guarded][]keyRange, len(g.streams))
	for s := range g.streams {
		open[s] = s.ranges
	}
	g.mu.Unlock()
	for s, ranges := range open {
		if err := g.allowed(s.chain, s.id, ranges...); err != nil {
			g.cfg.Log.Info("peer may no longer read; its stream is closed", "peer", s.id.String(), "reason", err)
			g.metrics.closed.WithLabelValues(s.id.TrustDomain().Name()).Inc()
			s.cancel(err)
		}
	}
}

// caller returns the verified peer of a call.
func caller(ctx context.Context) ([]*x509.Certificate, spiffeid.ID, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil, spiffeid.ID{}, errors.New("no peer")
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return nil, spiffeid.ID{}, errors.New("no TLS")
	}
	id, err := identity.PeerID(info.State)
	return info.State.PeerCertificates, id, err
}

// allowed verifies the chain against the present bundles and each range against the present prefixes. The end of the SVID's life
// is the listener's affair (MaxConnectionAge), since a peer renews it without a new connection.
func (g *Guard) allowed(chain []*x509.Certificate, id spiffeid.ID, ranges ...keyRange) error {
	if len(chain) == 0 {
		return status.Error(codes.Unauthenticated, "no certificate")
	}
	at := g.cfg.Now()
	if at.After(chain[0].NotAfter) {
		at = chain[0].NotAfter
	}
	if _, err := identity.Verify(chain, g.cfg.Source, at); err != nil {
		return status.Errorf(codes.Unauthenticated, "verify %s: %v", id, err)
	}
	prefixes, ok := g.cfg.Authorize(id)
	if !ok {
		return status.Errorf(codes.PermissionDenied, "etcdserver: permission denied: %s is not a peer of this cluster", id)
	}
	for _, r := range ranges {
		if !r.within(prefixes) {
			return rpctypes.ErrGRPCPermissionDenied
		}
	}
	return nil
}

// within reports whether all of r begins with one of the prefixes. An end of "\0" is everything after key, and never within.
func (r keyRange) within(prefixes []string) bool {
	for _, p := range prefixes {
		if p == "" || !bytes.HasPrefix(r.key, []byte(p)) {
			continue
		}
		if len(r.end) == 0 || (bytes.Compare(r.key, r.end) < 0 && bytes.Compare(r.end, prefixEnd(p)) <= 0) {
			return true
		}
	}
	return false
}

func (g *Guard) count(id spiffeid.ID, method string, err error) {
	td := "unknown"
	if !id.IsZero() {
		td = id.TrustDomain().Name()
	}
	g.metrics.requests.WithLabelValues(td, method, status.Code(err).String()).Inc()
}

// checkRange bounds a request, and makes it linearizable.
func checkRange(r *pb.RangeRequest) (keyRange, error) {
	if len(r.Key) == 0 || len(r.Key) > maxKey || len(r.RangeEnd) > maxKey {
		return keyRange{}, status.Error(codes.InvalidArgument, "key missing or too long")
	}
	r.Serializable = false
	return keyRange{r.Key, r.RangeEnd}, nil
}

// Range implements etcd's KV.Range.
func (g *Guard) Range(ctx context.Context, r *pb.RangeRequest) (resp *pb.RangeResponse, err error) {
	chain, id, err := caller(ctx)
	defer func() { g.count(id, "Range", err) }()
	if err != nil {
		return nil, status.Error(codes.Unauthenticated, err.Error())
	}
	kr, err := checkRange(r)
	if err != nil {
		return nil, err
	}
	if err := g.allowed(chain, id, kr); err != nil {
		return nil, err
	}
	unbounded := !r.CountOnly && (r.Limit <= 0 || r.Limit > maxRangeKeys)
	if unbounded {
		r.Limit = maxRangeKeys
	}
	resp, err = g.cfg.KV.Range(ctx, r)
	if err == nil && unbounded && resp.More {
		return nil, status.Errorf(codes.ResourceExhausted, "more than %d keys: ask for pages of them, or by RangeStream", maxRangeKeys)
	}
	return resp, err
}

// RangeStream implements etcd's KV.RangeStream (3.7).
func (g *Guard) RangeStream(r *pb.RangeRequest, rs pb.KV_RangeStreamServer) (err error) {
	chain, id, err := caller(rs.Context())
	defer func() { g.count(id, "RangeStream", err) }()
	if err != nil {
		return status.Error(codes.Unauthenticated, err.Error())
	}
	kr, err := checkRange(r)
	if err != nil {
		return err
	}
	s, err := g.open(rs.Context(), chain, id)
	if err != nil {
		return err
	}
	defer g.close(s)
	if err := g.add(s, kr); err != nil {
		return err
	}
	return s.result(g.cfg.KV.RangeStream(r, rangeStream{rs, s.ctx}))
}

type rangeStream struct {
	pb.KV_RangeStreamServer
	ctx context.Context
}

func (s rangeStream) Context() context.Context { return s.ctx }

// Send stops at once when the stream has lost its authorisation.
func (s rangeStream) Send(r *pb.RangeStreamResponse) error {
	if err := s.ctx.Err(); err != nil {
		return err
	}
	return s.KV_RangeStreamServer.Send(r)
}

func (g *Guard) open(ctx context.Context, chain []*x509.Certificate, id spiffeid.ID) (*guarded, error) {
	s := &guarded{chain: chain, id: id}
	s.ctx, s.cancel = context.WithCancelCause(ctx)
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.byPeer[id] >= maxPeerStreams {
		s.cancel(nil)
		return nil, status.Errorf(codes.ResourceExhausted, "%s has %d streams already", id, maxPeerStreams)
	}
	g.byPeer[id]++
	g.streams[s] = struct{}{}
	g.metrics.streams.WithLabelValues(id.TrustDomain().Name()).Inc()
	return s, nil
}

func (g *Guard) close(s *guarded) {
	s.cancel(nil)
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.streams, s)
	if g.byPeer[s.id]--; g.byPeer[s.id] == 0 {
		delete(g.byPeer, s.id)
	}
	g.metrics.streams.WithLabelValues(s.id.TrustDomain().Name()).Dec()
}

// add notes the range first and asks for authorisation after, so that either this or a Recheck sees a change in between.
func (g *Guard) add(s *guarded, r keyRange) error {
	g.mu.Lock()
	if len(s.ranges) >= maxWatches {
		g.mu.Unlock()
		return status.Errorf(codes.ResourceExhausted, "more than %d watches", maxWatches)
	}
	before := s.ranges
	s.ranges = append(before[:len(before):len(before)], r)
	g.mu.Unlock()
	err := g.allowed(s.chain, s.id, r)
	if err != nil {
		g.mu.Lock()
		s.ranges = before
		g.mu.Unlock()
	}
	return err
}

// result says Unavailable when the Guard itself ended the stream: a stock client then comes again and hears what is denied.
func (s *guarded) result(err error) error {
	if cause := context.Cause(s.ctx); cause != nil && !errors.Is(cause, context.Canceled) && !errors.Is(cause, context.DeadlineExceeded) {
		return status.Errorf(codes.Unavailable, "authorisation changed: %v", status.Convert(cause).Message())
	}
	return err
}

type guardWatch struct {
	pb.UnimplementedWatchServer
	g *Guard
}

// Watch implements etcd's Watch.Watch.
func (gw guardWatch) Watch(stream pb.Watch_WatchServer) (err error) {
	g := gw.g
	chain, id, err := caller(stream.Context())
	defer func() { g.count(id, "Watch", err) }()
	if err != nil {
		return status.Error(codes.Unauthenticated, err.Error())
	}
	s, err := g.open(stream.Context(), chain, id)
	if err != nil {
		return err
	}
	defer g.close(s)
	w := &watchStream{Watch_WatchServer: stream, g: g, s: s, answered: make(chan struct{}, 1)}
	return s.result(g.cfg.Watch.Watch(w))
}

// watchStream lets only what is authorised through to etcd's watch server.
type watchStream struct {
	pb.Watch_WatchServer
	g        *Guard
	s        *guarded
	answered chan struct{} // a create has been answered

	mu      sync.Mutex // serialises Send, and guards pending
	pending int        // creates that etcd has not answered
}

func (w *watchStream) Context() context.Context { return w.s.ctx }

// Recv returns the next permitted request. A refused one is answered here, inside the stream: an error would end the peer's other watches.
func (w *watchStream) Recv() (*pb.WatchRequest, error) {
	for {
		r, err := w.Watch_WatchServer.Recv()
		if err != nil {
			return nil, err
		}
		create := r.GetCreateRequest()
		if create == nil {
			return r, nil
		}
		if err := w.check(create); err != nil {
			if err := w.refuse(err); err != nil {
				return nil, err
			}
			continue
		}
		w.mu.Lock()
		w.pending++
		w.mu.Unlock()
		return r, nil
	}
}

func (w *watchStream) check(c *pb.WatchCreateRequest) error {
	if len(c.Key) == 0 || len(c.Key) > maxKey || len(c.RangeEnd) > maxKey {
		return rpctypes.ErrGRPCPermissionDenied
	}
	c.PrevKv = false // would read what was compacted, and cost a read per event
	return w.g.add(w.s, keyRange{c.Key, c.RangeEnd})
}

// refuse waits until the creates before it are answered, since clients match answers to requests by order.
func (w *watchStream) refuse(reason error) error {
	for {
		w.mu.Lock()
		if w.pending == 0 {
			defer w.mu.Unlock()
			w.g.count(w.s.id, "WatchCreate", reason)
			text := rpctypes.ErrGRPCPermissionDenied.Error()
			if status.Code(reason) != codes.PermissionDenied {
				text = fmt.Sprintf("etcdserver: watch refused: %s", status.Convert(reason).Message())
			}
			return w.Watch_WatchServer.Send(&pb.WatchResponse{Header: &pb.ResponseHeader{}, WatchId: -1, Created: true, Canceled: true, CancelReason: text})
		}
		w.mu.Unlock()
		select {
		case <-w.answered:
		case <-w.s.ctx.Done():
			return w.s.ctx.Err()
		}
	}
}

func (w *watchStream) Send(r *pb.WatchResponse) error {
	if err := w.s.ctx.Err(); err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if r.Created {
		w.pending--
		select {
		case w.answered <- struct{}{}:
		default:
		}
	}
	return w.Watch_WatchServer.Send(r)
}
