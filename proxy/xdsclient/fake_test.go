package xdsclient

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	loadv3 "github.com/envoyproxy/go-control-plane/envoy/service/load_stats/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/proxy/proxytest"
)

// controlPlane is a real ADS (delta) and LRS server over gRPC and mutual TLS, with resources that a test sets.
type controlPlane struct {
	discoveryv3.UnimplementedAggregatedDiscoveryServiceServer
	loadv3.UnimplementedLoadReportingServiceServer

	domain *proxytest.Domain
	lis    *bufconn.Listener
	server *grpc.Server

	mu        sync.Mutex
	silent    bool                                        // accepts streams and answers nothing
	resources map[string]map[string]*discoveryv3.Resource // by type URL and name
	version   int
	streams   map[*adsStream]struct{}
	requests  []*discoveryv3.DeltaDiscoveryRequest // of all streams
	trips     int                                  // requests that subscribe
	nodes     []*corev3.Node
	loads     chan *loadv3.LoadStatsRequest
	interval  time.Duration // of load reports
}

type adsStream struct {
	cp     *controlPlane
	out    chan *discoveryv3.DeltaDiscoveryResponse
	names  map[string]map[string]bool // subscribed, by type URL
	sent   map[string]map[string]string
	cancel context.CancelFunc
}

func newControlPlane(t testing.TB, domain *proxytest.Domain) *controlPlane {
	t.Helper()
	cp := &controlPlane{
		domain: domain, resources: map[string]map[string]*discoveryv3.Resource{}, streams: map[*adsStream]struct{}{},
		loads: make(chan *loadv3.LoadStatsRequest, 1000), interval: time.Second,
	}
	cp.start(t)
	t.Cleanup(cp.stop)
	return cp
}

func (cp *controlPlane) start(t testing.TB) {
	t.Helper()
	src := cp.domain.Source("/hanse/control-plane")
	cp.mu.Lock()
	defer cp.mu.Unlock()
	cp.lis = bufconn.Listen(1 << 20)
	calm := grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}) // as xdsserver
	cp.server = grpc.NewServer(calm, grpc.Creds(credentials.NewTLS(identity.ServerTLS(src, identity.AuthorizeMemberOf(cp.domain.TD), "h2"))))
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(cp.server, cp)
	loadv3.RegisterLoadReportingServiceServer(cp.server, cp)
	server, lis := cp.server, cp.lis
	go func() { _ = server.Serve(lis) }() // ends with stop
}

func (cp *controlPlane) stop() { cp.server.Stop() }

func (cp *controlPlane) dial(ctx context.Context, addr string) (net.Conn, error) {
	if addr != "control-plane:7445" {
		return nil, errors.New("connection refused")
	}
	cp.mu.Lock()
	lis := cp.lis
	cp.mu.Unlock()
	return lis.DialContext(ctx)
}

// set puts a resource in place and tells all streams; nil removes it.
func (cp *controlPlane) set(t testing.TB, typeURL, name string, m proto.Message) {
	t.Helper()
	var a *anypb.Any
	if m != nil {
		var err error
		if a, err = anypb.New(m); err != nil {
			t.Fatal(err)
		}
	}
	cp.setAny(typeURL, name, a)
}

func (cp *controlPlane) setAny(typeURL, name string, a *anypb.Any) {
	cp.mu.Lock()
	defer cp.mu.Unlock()
	if cp.resources[typeURL] == nil {
		cp.resources[typeURL] = map[string]*discoveryv3.Resource{}
	}
	cp.version++
	if a == nil {
		delete(cp.resources[typeURL], name)
	} else {
		cp.resources[typeURL][name] = &discoveryv3.Resource{Name: name, Version: fmt.Sprint("v", cp.version), Resource: a}
	}
	for s := range cp.streams {
		s.push(typeURL, []string{name})
	}
}

// push sends what differs from what was sent. cp.mu is held.
func (s *adsStream) push(typeURL string, names []string) {
	subscribed := s.names[typeURL]
	r := &discoveryv3.DeltaDiscoveryResponse{TypeUrl: typeURL, Nonce: fmt.Sprint("n", s.cp.version, "-", len(s.out), "-", time.Now().UnixNano())}
	for _, n := range names {
		if !subscribed[n] && !subscribed["*"] {
			continue
		}
		res := s.cp.resources[typeURL][n]
		switch have, ok := s.sent[typeURL][n]; {
		case res == nil && (!ok || have != ""):
			r.RemovedResources = append(r.RemovedResources, n)
			s.sent[typeURL][n] = ""
		case res != nil && have != res.Version:
			r.Resources = append(r.Resources, res)
			s.sent[typeURL][n] = res.Version
		}
	}
	if len(r.Resources)+len(r.RemovedResources) > 0 {
		s.out <- r
	}
}

func (cp *controlPlane) DeltaAggregatedResources(g discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	ctx, cancel := context.WithCancel(g.Context())
	defer cancel()
	s := &adsStream{cp: cp, out: make(chan *discoveryv3.DeltaDiscoveryResponse, 10_000), names: map[string]map[string]bool{}, sent: map[string]map[string]string{}, cancel: cancel}
	cp.mu.Lock()
	cp.streams[s] = struct{}{}
	cp.mu.Unlock()
	defer func() {
		cp.mu.Lock()
		defer cp.mu.Unlock()
		delete(cp.streams, s)
	}()
	go func() {
		for {
			select {
			case r := <-s.out:
				if g.Send(r) != nil {
					return
				}
			case <-ctx.Done():
				return
			}
		}
	}()
	requests := make(chan *discoveryv3.DeltaDiscoveryRequest)
	go func() {
		defer cancel()
		for {
			r, err := g.Recv()
			if err != nil {
				return
			}
			select {
			case requests <- r:
			case <-ctx.Done():
				return
			}
		}
	}()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case r := <-requests:
			cp.handle(s, r)
		}
	}
}

func (cp *controlPlane) handle(s *adsStream, r *discoveryv3.DeltaDiscoveryRequest) {
	cp.mu.Lock()
	defer cp.mu.Unlock()
	cp.requests = append(cp.requests, r)
	if cp.silent {
		return
	}
	if r.Node != nil {
		cp.nodes = append(cp.nodes, r.Node)
	}
	if s.names[r.TypeUrl] == nil {
		s.names[r.TypeUrl], s.sent[r.TypeUrl] = map[string]bool{}, map[string]string{}
	}
	for n, v := range r.InitialResourceVersions {
		s.sent[r.TypeUrl][n] = v
	}
	for _, n := range r.ResourceNamesUnsubscribe {
		delete(s.names[r.TypeUrl], n)
		delete(s.sent[r.TypeUrl], n)
	}
	if len(r.ResourceNamesSubscribe) == 0 {
		return
	}
	cp.trips++
	names := r.ResourceNamesSubscribe
	for _, n := range names {
		s.names[r.TypeUrl][n] = true
	}
	if slices.Contains(names, "*") {
		names = nil
		for n := range cp.resources[r.TypeUrl] {
			names = append(names, n)
		}
		for n := range r.InitialResourceVersions {
			names = append(names, n)
		}
		slices.Sort(names)
		names = slices.Compact(names)
	}
	s.push(r.TypeUrl, names)
}

func (cp *controlPlane) StreamLoadStats(g loadv3.LoadReportingService_StreamLoadStatsServer) error {
	first, err := g.Recv()
	if err != nil {
		return err
	}
	if first.Node == nil {
		return errors.New("no node")
	}
	if err := g.Send(&loadv3.LoadStatsResponse{SendAllClusters: true, ReportEndpointGranularity: true, LoadReportingInterval: durationpb.New(cp.interval)}); err != nil {
		return err
	}
	for {
		r, err := g.Recv()
		if err != nil {
			return err
		}
		select {
		case cp.loads <- r:
		case <-g.Context().Done():
			return g.Context().Err()
		}
	}
}

// rejected returns the NACKs of a type.
func (cp *controlPlane) rejected(typeURL string) (out []string) {
	cp.mu.Lock()
	defer cp.mu.Unlock()
	for _, r := range cp.requests {
		if r.TypeUrl == typeURL && r.ErrorDetail != nil {
			out = append(out, r.ErrorDetail.Message)
		}
	}
	return out
}

// acked counts the ACKs of a type.
func (cp *controlPlane) acked(typeURL string) (n int) {
	cp.mu.Lock()
	defer cp.mu.Unlock()
	for _, r := range cp.requests {
		if r.TypeUrl == typeURL && r.ErrorDetail == nil && r.ResponseNonce != "" {
			n++
		}
	}
	return n
}

// breakStreams ends every ADS stream.
func (cp *controlPlane) breakStreams() {
	cp.mu.Lock()
	defer cp.mu.Unlock()
	for s := range cp.streams {
		s.cancel()
	}
}
