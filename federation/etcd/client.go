package etcd

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"strings"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
)

// requestTimeout bounds each Get and Txn, and the wait for a watch to be created.
const requestTimeout = 10 * time.Second

// wire is a Store over etcd's API: in process, of an external etcd, or of a peer's Guard.
type wire struct {
	kv    pb.KVClient
	watch pb.WatchClient
}

func newWire(conn grpc.ClientConnInterface) *wire {
	return &wire{kv: pb.NewKVClient(conn), watch: pb.NewWatchClient(conn)}
}

// callError is rpcError, but says first that it was the caller who gave up.
func callError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("%w: %s", ctx.Err(), status.Convert(err).Message())
	}
	return rpcError(err)
}

// rpcError gives the refusals that callers branch on their names; the rest keeps its gRPC status.
func rpcError(err error) error {
	var named error
	s, _ := status.FromError(err)
	var e rpctypes.EtcdError
	msg := s.Message()
	if errors.As(err, &e) {
		msg = e.Error()
	}
	switch {
	case strings.Contains(msg, rpctypes.ErrCompacted.Error()):
		named = ErrCompacted
	case strings.Contains(msg, rpctypes.ErrNoSpace.Error()):
		named = ErrNoSpace
	case s.Code() == codes.PermissionDenied, errors.As(err, &e) && e.Code() == codes.PermissionDenied:
		named = ErrPermissionDenied
	default:
		return err
	}
	return fmt.Errorf("%w: %s", named, msg)
}

func header(h *pb.ResponseHeader) Header {
	return Header{ClusterID: h.GetClusterId(), Revision: h.GetRevision()}
}

func keyValue(kv *mvccpb.KeyValue) KeyValue {
	return KeyValue{Key: string(kv.Key), Value: kv.Value, CreateRevision: kv.CreateRevision, ModRevision: kv.ModRevision}
}

func (w *wire) Get(ctx context.Context, key string, revision int64) (*KeyValue, Header, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	r, err := w.kv.Range(ctx, &pb.RangeRequest{Key: []byte(key), Revision: revision})
	if err != nil {
		return nil, Header{}, callError(ctx, err)
	}
	if len(r.Kvs) == 0 {
		return nil, header(r.Header), nil
	}
	kv := keyValue(r.Kvs[0])
	return &kv, header(r.Header), nil
}

func (w *wire) List(ctx context.Context, prefix string, revision int64, each func(KeyValue) error) (Header, error) {
	ctx, cancel := context.WithCancel(ctx) // ends the stream when each refuses
	defer cancel()
	rs, err := w.kv.RangeStream(ctx, &pb.RangeRequest{Key: firstKey(prefix), RangeEnd: prefixEnd(prefix), Revision: revision})
	if err != nil {
		return Header{}, callError(ctx, err)
	}
	for first := true; ; first = false {
		r, err := rs.Recv()
		switch {
		case first && status.Code(err) == codes.Unimplemented:
			return w.listPages(ctx, prefix, revision, each)
		case errors.Is(err, io.EOF):
			return Header{}, fmt.Errorf("list %s: the stream ended before its header", prefix)
		case err != nil:
			return Header{}, callError(ctx, err)
		}
		for _, kv := range r.GetRangeResponse().GetKvs() {
			if err := each(keyValue(kv)); err != nil {
				return Header{}, err
			}
		}
		if h := r.GetRangeResponse().GetHeader(); h != nil { // on the last chunk only
			out := header(h)
			if revision != 0 {
				out.Revision = revision
			}
			return out, nil
		}
	}
}

// listPages is List for an etcd before 3.7, which has no RangeStream: pages at one pinned revision.
func (w *wire) listPages(ctx context.Context, prefix string, revision int64, each func(KeyValue) error) (Header, error) {
	req := &pb.RangeRequest{Key: firstKey(prefix), RangeEnd: prefixEnd(prefix), Revision: revision, Limit: pageSize}
	for {
		r, err := w.page(ctx, req)
		if err != nil {
			return Header{}, callError(ctx, err)
		}
		if req.Revision == 0 {
			req.Revision = r.Header.Revision
		}
		for _, kv := range r.Kvs {
			if err := each(keyValue(kv)); err != nil {
				return Header{}, err
			}
		}
		if !r.More || len(r.Kvs) == 0 {
			return Header{ClusterID: r.Header.ClusterId, Revision: req.Revision}, nil
		}
		req.Key = append(r.Kvs[len(r.Kvs)-1].Key, 0)
	}
}

func (w *wire) page(ctx context.Context, req *pb.RangeRequest) (*pb.RangeResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	return w.kv.Range(ctx, req)
}

func (w *wire) Txn(ctx context.Context, compares []Compare, ops []Op) (bool, Header, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	req := &pb.TxnRequest{}
	for _, c := range compares {
		cmp := &pb.Compare{Key: []byte(c.Key), Result: pb.Compare_EQUAL, Target: pb.Compare_MOD, TargetUnion: &pb.Compare_ModRevision{ModRevision: c.Revision}}
		if c.Created {
			cmp.Target, cmp.TargetUnion = pb.Compare_CREATE, &pb.Compare_CreateRevision{CreateRevision: c.Revision}
		}
		req.Compare = append(req.Compare, cmp)
	}
	for _, op := range ops {
		if op.Delete {
			req.Success = append(req.Success, &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{
				RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte(op.Key)}}})
			continue
		}
		req.Success = append(req.Success, &pb.RequestOp{Request: &pb.RequestOp_RequestPut{
			RequestPut: &pb.PutRequest{Key: []byte(op.Key), Value: op.Value}}})
	}
	r, err := w.kv.Txn(ctx, req)
	if err != nil {
		return false, Header{}, callError(ctx, err)
	}
	return r.Succeeded, header(r.Header), nil
}

func (w *wire) Watch(ctx context.Context, prefix string, from int64) (Watcher, error) {
	stream, err := w.watch.Watch(ctx)
	if err != nil {
		return nil, callError(ctx, err)
	}
	err = stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{
		Key: firstKey(prefix), RangeEnd: prefixEnd(prefix), StartRevision: from, ProgressNotify: true, Fragment: true,
	}}})
	if err != nil && !errors.Is(err, io.EOF) { // Recv says why
		return nil, callError(ctx, err)
	}
	ws := &wireWatcher{ctx: ctx, stream: stream}
	r, err := stream.Recv()
	if err != nil {
		return nil, callError(ctx, err)
	}
	if err := ws.canceled(r); err != nil {
		return nil, err
	}
	if !r.Created {
		return nil, fmt.Errorf("watch %s: the first answer is not its creation", prefix)
	}
	return ws, nil
}

type wireWatcher struct {
	ctx    context.Context // the caller's; the stream's own ends with the stream
	stream pb.Watch_WatchClient
}

func (w *wireWatcher) canceled(r *pb.WatchResponse) error {
	switch {
	case r.CompactRevision != 0, strings.Contains(r.CancelReason, rpctypes.ErrCompacted.Error()):
		return fmt.Errorf("%w up to %d", ErrCompacted, r.CompactRevision)
	case strings.Contains(r.CancelReason, "permission denied"):
		return fmt.Errorf("watch: %w", ErrPermissionDenied)
	case r.Canceled:
		return fmt.Errorf("watch canceled by the server: %s", r.CancelReason)
	}
	return nil
}

func (w *wireWatcher) Recv() (*WatchResponse, error) {
	r, err := w.stream.Recv()
	if err != nil {
		return nil, callError(w.ctx, err)
	}
	if err := w.canceled(r); err != nil {
		return nil, err
	}
	out := &WatchResponse{Header: header(r.Header), More: r.Fragment, Events: make([]Event, len(r.Events))}
	for i, e := range r.Events {
		out.Events[i] = Event{KeyValue: keyValue(e.Kv), Delete: e.Type == mvccpb.Event_DELETE}
	}
	return out, nil
}

func (w *wireWatcher) RequestProgress() error {
	return w.stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_ProgressRequest{ProgressRequest: &pb.WatchProgressRequest{}}})
}

// ExternalConfig says how to reach an external etcd cluster.
type ExternalConfig struct {
	Endpoints []string
	TLS       *tls.Config // nil is plain text, for a Unix socket or loopback only
	// Roots are asked for at each handshake, instead of TLS.RootCAs; may be nil. For endpoints with TLS only.
	Roots  func() (*x509.CertPool, error)
	Prefix string // put before every key; the Guard needs it empty
	// History is what was known of this etcd before; zero if nothing was. Ended: an External before this one found that it is over.
	History History
	Ended   bool
	Log     *slog.Logger
}

// External is an external etcd cluster.
type External struct {
	client *clientv3.Client
	prefix string
	log    *slog.Logger
	wire   Store
	away   atomic.Bool

	past        past
	wasRestored bool // since what ExternalConfig.History says
}

// DialExternal connects to an external etcd cluster and returns when it has answered, or when ctx ends.
func DialExternal(ctx context.Context, cfg ExternalConfig) (*External, error) {
	options := []grpc.DialOption{connectParams()}
	if cfg.TLS != nil && cfg.Roots != nil && len(cfg.Endpoints) > 0 && !plain(cfg.Endpoints[0]) {
		options = append(options, grpc.WithTransportCredentials(freshRoots{credentials.NewTLS(cfg.TLS), cfg.TLS, cfg.Roots}))
	}
	c, err := clientv3.New(clientv3.Config{
		Endpoints: cfg.Endpoints, TLS: cfg.TLS, Logger: newZap(cfg.Log, nil), Context: context.WithoutCancel(ctx),
		DialTimeout: requestTimeout, DialKeepAliveTime: keepaliveTime, DialKeepAliveTimeout: keepaliveTimeout,
		MaxCallRecvMsgSize: math.MaxInt32, DialOptions: options,
	})
	if err != nil {
		return nil, fmt.Errorf("connect to etcd at %s: %w", strings.Join(cfg.Endpoints, ","), err)
	}
	x := &External{client: c, prefix: cfg.Prefix, log: orDiscard(cfg.Log), wire: resending{newWire(c.ActiveConnection())}}
	x.past.restored = make(chan struct{})
	if x.wasRestored, err = x.adopt(ctx, cfg.History, cfg.Ended); err != nil {
		_ = c.Close()
		return nil, fmt.Errorf("read from etcd at %s: %w", strings.Join(cfg.Endpoints, ","), err)
	}
	return x, nil
}

// plain reports whether the stock client leaves TLS out for an endpoint; it goes by the first one for all.
func plain(endpoint string) bool {
	return strings.HasPrefix(endpoint, "http://") || strings.HasPrefix(endpoint, "unix:")
}

// freshRoots are the credentials of a client whose CA may be replaced while it runs. The stock client's are made of one tls.Config, and its
// VerifyConnection is not told what address was dialled.
type freshRoots struct {
	credentials.TransportCredentials
	config *tls.Config
	roots  func() (*x509.CertPool, error)
}

// ClientHandshake implements credentials.TransportCredentials.
func (f freshRoots) ClientHandshake(ctx context.Context, authority string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	roots, err := f.roots()
	if err != nil {
		return nil, nil, err
	}
	c := f.config.Clone()
	c.RootCAs = roots
	return credentials.NewTLS(c).ClientHandshake(ctx, authority, conn)
}

// Clone implements credentials.TransportCredentials.
func (f freshRoots) Clone() credentials.TransportCredentials {
	f.TransportCredentials = f.TransportCredentials.Clone()
	return f
}

// connectParams makes the client try again within 5 s of a peer's return.
func connectParams() grpc.DialOption {
	return grpc.WithConnectParams(grpc.ConnectParams{
		Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 5 * time.Second},
		MinConnectTimeout: 5 * time.Second,
	})
}

// Client returns the stock client.
func (x *External) Client() *clientv3.Client { return x.client }

// Store returns the cluster as a Store.
func (x *External) Store() Store {
	s := &noting{Store: x.wire, x: x}
	if x.prefix == "" {
		return s
	}
	return &prefixed{Store: s, prefix: x.prefix}
}

// note says once that the cluster is away, and once that it is there again, for all who read from it or write to it.
func (x *External) note(ctx context.Context, err error) error {
	if err != nil && ctx.Err() == nil && !errors.Is(err, ErrRestored) {
		x.distrust()
	}
	if status.Code(err) == codes.Unavailable || errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil { // the call's own end
		if !x.away.Swap(true) {
			x.log.Warn("etcd is away; what was read from it stays in force, and all is tried again", "error", err)
		}
		return fmt.Errorf("%w: %w", ErrAway, err)
	}
	if err == nil && x.away.Load() && x.away.Swap(false) {
		x.log.Info("etcd answers again")
	}
	return err
}

// noting has an External note what came of each call. A watch that is only opened says nothing: without a quorum that works, too.
type noting struct {
	Store
	x *External
}

func (n *noting) Get(ctx context.Context, key string, revision int64) (*KeyValue, Header, error) {
	was, err := n.x.begin(ctx)
	if err != nil {
		return nil, Header{}, n.x.note(ctx, err)
	}
	kv, h, err := n.Store.Get(ctx, key, revision)
	if err == nil {
		err = n.x.answered(was, h)
	}
	return kv, h, n.x.note(ctx, err)
}

func (n *noting) List(ctx context.Context, prefix string, revision int64, each func(KeyValue) error) (Header, error) {
	was, err := n.x.begin(ctx)
	if err != nil {
		return Header{}, n.x.note(ctx, err)
	}
	h, err := n.Store.List(ctx, prefix, revision, each)
	if err == nil && revision == 0 {
		err = n.x.answered(was, h)
	}
	return h, n.x.note(ctx, err)
}

func (n *noting) Txn(ctx context.Context, compares []Compare, ops []Op) (bool, Header, error) {
	was, err := n.x.begin(ctx)
	if err != nil {
		return false, Header{}, n.x.note(ctx, err)
	}
	ok, h, err := n.Store.Txn(ctx, compares, ops)
	if err == nil && !ok { // of one that was sent again, the revision may be of what was done before
		err = n.x.answered(was, h)
	}
	return ok, h, n.x.note(ctx, err)
}

func (n *noting) Watch(ctx context.Context, prefix string, from int64) (Watcher, error) {
	if _, err := n.x.begin(ctx); err != nil {
		return nil, n.x.note(ctx, err)
	}
	w, err := n.Store.Watch(ctx, prefix, from)
	if err != nil {
		return nil, n.x.note(ctx, err)
	}
	return &notingWatcher{w, ctx, n.x}, nil
}

type notingWatcher struct {
	Watcher
	ctx context.Context // of the stream
	x   *External
}

func (w *notingWatcher) Recv() (*WatchResponse, error) {
	r, err := w.Watcher.Recv()
	if err == nil {
		err = w.x.arrived(r.Header)
	}
	if err != nil {
		return nil, w.x.note(w.ctx, err)
	}
	return r, nil
}

// Again logs why something of a Store is read again: at level Warn, unless External has said once for all that it is away.
func Again(ctx context.Context, log *slog.Logger, what string, err error) {
	level := slog.LevelWarn
	if errors.Is(err, ErrAway) {
		level = slog.LevelDebug
	}
	log.Log(ctx, level, what, "err", err)
}

// Close ends the connection.
func (x *External) Close() error { return x.client.Close() }

// prefixed puts a prefix before every key.
type prefixed struct {
	Store
	prefix string
}

func (p *prefixed) strip(kv *KeyValue) { kv.Key = strings.TrimPrefix(kv.Key, p.prefix) }

func (p *prefixed) Get(ctx context.Context, key string, revision int64) (*KeyValue, Header, error) {
	kv, h, err := p.Store.Get(ctx, p.prefix+key, revision)
	if kv != nil {
		p.strip(kv)
	}
	return kv, h, err
}

func (p *prefixed) List(ctx context.Context, prefix string, revision int64, each func(KeyValue) error) (Header, error) {
	return p.Store.List(ctx, p.prefix+prefix, revision, func(kv KeyValue) error {
		p.strip(&kv)
		return each(kv)
	})
}

func (p *prefixed) Watch(ctx context.Context, prefix string, from int64) (Watcher, error) {
	w, err := p.Store.Watch(ctx, p.prefix+prefix, from)
	if err != nil {
		return nil, err
	}
	return &prefixedWatcher{Watcher: w, p: p}, nil
}

func (p *prefixed) Txn(ctx context.Context, compares []Compare, ops []Op) (bool, Header, error) {
	cs, os := make([]Compare, len(compares)), make([]Op, len(ops))
	for i, c := range compares {
		c.Key = p.prefix + c.Key
		cs[i] = c
	}
	for i, op := range ops {
		op.Key = p.prefix + op.Key
		os[i] = op
	}
	return p.Store.Txn(ctx, cs, os)
}

type prefixedWatcher struct {
	Watcher
	p *prefixed
}

func (w *prefixedWatcher) Recv() (*WatchResponse, error) {
	r, err := w.Watcher.Recv()
	if err != nil {
		return nil, err
	}
	for i := range r.Events {
		w.p.strip(&r.Events[i].KeyValue)
	}
	return r, nil
}
