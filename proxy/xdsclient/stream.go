package xdsclient

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"sync"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"

	"github.com/hanse-mesh/hanse/identity"
)

// event is something that happens on a connection.
type event struct {
	stream   *stream
	opened   bool
	response *discoveryv3.DeltaDiscoveryResponse
	err      error // the stream, or the attempt, has ended
}

// stream is one ADS stream.
type stream struct {
	addr string
	out  outbox

	// owned by the loop of Run
	answered bool
	received time.Time
	nodeSent bool
}

// outbox queues requests, so that the loop never waits for a server that does not read.
type outbox struct {
	mu    sync.Mutex
	queue []*discoveryv3.DeltaDiscoveryRequest // guarded by mu
	wake  chan struct{}
}

func (o *outbox) add(rs ...*discoveryv3.DeltaDiscoveryRequest) {
	o.mu.Lock()
	o.queue = append(o.queue, rs...)
	o.mu.Unlock()
	select {
	case o.wake <- struct{}{}:
	default:
	}
}

func (o *outbox) take() []*discoveryv3.DeltaDiscoveryRequest {
	o.mu.Lock()
	defer o.mu.Unlock()
	q := o.queue
	o.queue = nil
	return q
}

// send queues requests; without a stream they are part of the next one's beginning.
func (r *run) send(rs ...*discoveryv3.DeltaDiscoveryRequest) {
	if r.stream == nil || len(rs) == 0 {
		return
	}
	if !r.stream.nodeSent {
		r.stream.nodeSent = true
		rs[0].Node = r.node()
	}
	r.stream.out.add(rs...)
}

// connections connects to one address after the other, until ctx ends.
func (r *run) connections(ctx context.Context) {
	backoff := minBackoff
	for i := 0; ; i++ {
		if r.cfg.Source.Wait(ctx) != nil {
			return
		}
		addr := r.cfg.Addrs[i%len(r.cfg.Addrs)]
		answered, err := r.connection(ctx, addr)
		if ctx.Err() != nil {
			return
		}
		if answered {
			backoff = minBackoff // and the next one is as good: this one may be paused, and would be waited for
		}
		if !r.tell(ctx, event{err: fmt.Errorf("%s: %w", addr, err)}) {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(jitter(backoff)):
		}
		if !answered && (i+1)%len(r.cfg.Addrs) == 0 {
			backoff = min(2*backoff, maxBackoff)
		}
	}
}

func (r *run) tell(ctx context.Context, e event) bool {
	select {
	case r.events <- e:
		return true
	case <-ctx.Done():
		return false
	}
}

// connection runs one connection, its ADS stream and its load reports, until one of them ends.
func (r *run) connection(ctx context.Context, addr string) (answered bool, err error) {
	conn, err := r.dial(addr)
	if err != nil {
		return false, err
	}
	var running sync.WaitGroup
	ctx, cancel := context.WithCancelCause(ctx)
	defer running.Wait()
	defer func() { err = errors.Join(err, conn.Close()) }()
	defer cancel(nil)

	ads, err := discoveryv3.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx)
	if err != nil {
		return false, fmt.Errorf("open ADS stream: %w", err)
	}
	patience := time.AfterFunc(firstAnswer, func() { cancel(errors.New("no answer on the ADS stream")) })
	defer patience.Stop()
	s := &stream{addr: addr, out: outbox{wake: make(chan struct{}, 1)}}
	if !r.tell(ctx, event{stream: s, opened: true}) {
		return false, context.Cause(ctx)
	}
	running.Go(func() {
		for {
			for _, m := range s.out.take() {
				if ads.Send(m) != nil {
					return // Recv tells why
				}
			}
			select {
			case <-ctx.Done():
				return
			case <-s.out.wake:
			}
		}
	})
	for {
		m, err := ads.Recv()
		if err != nil {
			if cause := context.Cause(ctx); cause != nil {
				err = cause
			}
			return answered, err
		}
		if !answered {
			answered = true
			patience.Stop()
			if r.cfg.Load != nil {
				running.Go(func() { r.loadReports(ctx, conn) })
			}
		}
		if !r.tell(ctx, event{stream: s, response: m}) {
			return answered, context.Cause(ctx)
		}
	}
}

func (r *run) dial(addr string) (*grpc.ClientConn, error) {
	opts := []grpc.DialOption{
		grpc.WithTransportCredentials(credentials.NewTLS(identity.ClientTLS(r.cfg.Source, identity.AuthorizeID(r.cfg.ServerID), "h2"))),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 5 * time.Second}),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.DefaultConfig, MinConnectTimeout: 5 * time.Second}),
		grpc.WithDisableRetry(),
		grpc.WithNoProxy(),
	}
	if r.cfg.Dial != nil {
		opts = append(opts, grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) { return r.cfg.Dial(ctx, addr) }))
	}
	return grpc.NewClient("passthrough:///"+addr, opts...)
}

// handle takes what happened on a connection.
func (r *run) handle(ctx context.Context, e event, loaded chan<- trustResult, running *sync.WaitGroup) {
	switch {
	case e.opened:
		r.stream = e.stream
		r.send(r.store.connect()...)
	case e.err != nil:
		if r.stream != nil && r.stream.answered {
			r.log.Warn("control plane is gone; going on with what is known", "server", r.stream.addr, "error", e.err)
		} else if msg := e.err.Error(); msg != r.lastErr {
			r.log.Warn("control plane does not answer", "error", e.err)
		}
		r.stream, r.lastErr = nil, e.err.Error()
		r.endTrust()
	case e.stream == r.stream:
		if !r.stream.answered {
			r.stream.answered, r.lastErr = true, ""
			r.log.Info("connected to the control plane", "server", r.stream.addr)
		}
		r.kept = false
		r.stream.received = r.now()
		r.receive(ctx, e.response, loaded, running)
	}
}

func (r *run) receive(ctx context.Context, m *discoveryv3.DeltaDiscoveryResponse, loaded chan<- trustResult, running *sync.WaitGroup) {
	bad := r.store.receive(m, r.now())
	if bad != nil {
		kind := "other"
		if r.store.byURL[m.TypeUrl] != nil {
			kind = shortType(m.TypeUrl)
		}
		r.nacks.WithLabelValues(kind).Inc()
		r.log.Error("rejected configuration; what was in force stays", "type", kind, "error", bad)
	}
	if m.TypeUrl == trustType && bad == nil {
		r.loadTrust(ctx, m, loaded, running)
		return
	}
	r.send(ack(m, bad))
}

// trustResult is the end of loading bundles for a response.
type trustResult struct {
	response  *discoveryv3.DeltaDiscoveryResponse
	sequences map[string]uint64
	err       error
}

// loadTrust loads bundles beside the loop; a newer response ends the load of an older one.
func (r *run) loadTrust(ctx context.Context, m *discoveryv3.DeltaDiscoveryResponse, loaded chan<- trustResult, running *sync.WaitGroup) {
	r.endTrust()
	r.trustFor = m
	trust := r.store.announced()
	if r.cfg.Trust == nil {
		r.store.trusted = trust.Sequences
		r.send(ack(m, nil))
		return
	}
	ctx, r.trustCancel = context.WithCancel(ctx)
	running.Go(func() {
		backoff := minBackoff
		for {
			err := r.cfg.Trust(ctx, trust)
			select {
			case loaded <- trustResult{m, trust.Sequences, err}:
			case <-ctx.Done():
				return
			}
			if err == nil {
				return
			}
			select {
			case <-time.After(jitter(backoff)):
			case <-ctx.Done():
				return
			}
			backoff = min(2*backoff, maxBackoff)
		}
	})
}

func (r *run) endTrust() {
	if r.trustCancel != nil {
		r.trustCancel()
		r.trustCancel = nil
	}
}

func (r *run) trustLoaded(res trustResult) {
	if r.trustCancel == nil || res.response != r.trustFor || !maps.Equal(res.sequences, r.store.announced().Sequences) {
		return // of before
	}
	if res.err != nil {
		if r.trustErr == "" {
			r.log.Warn("bundles are not loaded yet", "error", res.err)
		}
		r.trustErr = res.err.Error()
		return
	}
	r.trustErr = ""
	r.store.trusted = res.sequences
	r.send(ack(res.response, nil))
	r.endTrust()
}
