package xdsserver

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	grpcpeer "google.golang.org/grpc/peer"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/discovery/xdsgen"
)

// bigSet is a clusterset of many services with endpoints each.
func bigSet(services, endpoints int) *discovery.Clusterset {
	s := shop{services: make(map[string][]*discovery.Endpoint)}
	for i := range services {
		n := fmt.Sprintf("s%d", i)
		for j := range endpoints {
			k := i*endpoints + j
			s.services[n] = append(s.services[n], endpoint(fmt.Sprintf("%032x", k), fmt.Sprintf("10.%d.%d.%d", k>>16, k>>8&255, k&255), n))
		}
	}
	return s.set()
}

// BenchmarkFirstCall is what a sidecar waits for before its first call to a service: over loopback TLS, to a control plane of
// 10,000 services with 10 endpoints each. "separate" is a client that asks for each resource as it learns of it; "at-once"
// subscribes to all three by the authority; "pushed" gets them with the Listener.
func BenchmarkFirstCall(b *testing.B) {
	const services = 10000
	h := start(b)
	h.view(bigSet(services, 10))
	for _, mode := range []string{"separate", "at-once", "pushed"} {
		b.Run(mode, func(b *testing.B) {
			var c *deltaClient
			wait := func(n int) {
				for range n {
					c.recv()
				}
			}
			trips := 0
			for i := 0; b.Loop(); i++ {
				if i%1000 == 0 { // below the limit of names of one stream
					c = h.delta(h.dial(h.own, frontend), node("bench", "hanse-proxy", map[string]any{"push_dependencies": mode == "pushed"}))
				}
				n := name(fmt.Sprintf("s%d", i%services))
				switch mode {
				case "separate":
					for _, u := range []string{xdsgen.ListenerType, xdsgen.ClusterType, xdsgen.EndpointType} {
						c.subscribe(u, n)
						wait(1)
						trips++
					}
				case "at-once":
					for _, u := range []string{xdsgen.ListenerType, xdsgen.ClusterType, xdsgen.EndpointType} {
						c.subscribe(u, n)
					}
					wait(3)
					trips++
				case "pushed":
					c.subscribe(xdsgen.ListenerType, n)
					wait(3)
					trips++
				}
			}
			b.ReportMetric(float64(trips)/float64(b.N), "round-trips/op")
		})
	}
}

// memoryStream is a server stream without a network.
type memoryStream struct {
	grpc.ServerStream
	ctx  context.Context
	in   chan *discoveryv3.DeltaDiscoveryRequest
	sent func(*discoveryv3.DeltaDiscoveryResponse)
}

func (m *memoryStream) Context() context.Context { return m.ctx }

func (m *memoryStream) Recv() (*discoveryv3.DeltaDiscoveryRequest, error) {
	select {
	case r := <-m.in:
		return r, nil
	case <-m.ctx.Done():
		return nil, m.ctx.Err()
	}
}

func (m *memoryStream) Send(r *discoveryv3.DeltaDiscoveryResponse) error {
	m.sent(r)
	return nil
}

// BenchmarkEndpointChange is what one changed endpoint costs: 10,000 services with 10 endpoints each, 1,000 sidecars that use 20 of
// them, so that each change concerns about two. Streams are in memory: this is the control plane without TLS and sockets.
func BenchmarkEndpointChange(b *testing.B) {
	const services, proxies, uses = 10000, 1000, 20
	west := newAuthority(b, "west.demo")
	s, err := New(Config{Source: west.source(b, "/hanse/control-plane"), TrustDomain: west.td, Debounce: time.Nanosecond, Log: slog.New(slog.DiscardHandler)})
	must(b, err)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go s.Run(ctx)
	set := bigSet(services, 10)
	s.SetView(set)

	state := tls.ConnectionState{PeerCertificates: west.svid(b, frontend).Certificates}
	ctx = grpcpeer.NewContext(ctx, &grpcpeer.Peer{AuthInfo: credentials.TLSInfo{State: state}})
	var received, bytes atomic.Int64
	subscribers := make(map[string]int)
	for p := range proxies {
		st := &memoryStream{ctx: ctx, in: make(chan *discoveryv3.DeltaDiscoveryRequest, 4), sent: func(r *discoveryv3.DeltaDiscoveryResponse) {
			for _, res := range r.Resources {
				received.Add(1)
				bytes.Add(int64(len(res.Resource.Value)))
			}
		}}
		go s.DeltaAggregatedResources(st)
		var names []string
		for u := range uses {
			n := fmt.Sprintf("s%d", (p*uses+u*7)%services)
			subscribers[n]++
			names = append(names, name(n))
		}
		for _, u := range []string{xdsgen.ListenerType, xdsgen.ClusterType, xdsgen.EndpointType} {
			st.in <- &discoveryv3.DeltaDiscoveryRequest{Node: node(fmt.Sprint("p", p), "hanse-proxy", nil), TypeUrl: u, ResourceNamesSubscribe: names}
		}
	}
	eventually(b, func() bool { return received.Load() == proxies*uses*3 })
	received.Store(0)
	bytes.Store(0)
	want := int64(0)
	i := 0
	for b.Loop() {
		i++
		n := fmt.Sprintf("s%d", i%services)
		key := discovery.Name{Namespace: "shop", Name: n}
		svc := *set.Local.Services.Get(key)
		svc.Endpoints = append([]*discovery.Endpoint(nil), svc.Endpoints...)
		e := *svc.Endpoints[0]
		e.Address = netip.AddrFrom4([4]byte{11, byte(i >> 16), byte(i >> 8), byte(i)})
		svc.Endpoints[0] = &e
		local := *set.Local
		local.Services = local.Services.Put(key, &svc)
		next := *set
		next.Local = &local
		set = &next
		s.SetView(set)
		want += int64(subscribers[n])
		for received.Load() < want {
			time.Sleep(20 * time.Microsecond)
		}
	}
	b.ReportMetric(float64(received.Load())/float64(b.N), "pushes/op")
	b.ReportMetric(float64(bytes.Load())/float64(b.N), "B-pushed/op")
}

// BenchmarkRollCall is what a control plane does each second to say which bundles all its proxies have loaded, with 10,000 of them connected.
func BenchmarkRollCall(b *testing.B) {
	h := start(b)
	trust := map[string]uint64{"west.demo": 3, "east.demo": 5, "north.demo": 1}
	h.SetTrust(trust, 1, nil)
	h.mu.Lock()
	for i := range 10000 {
		ss := &session{since: time.Now(), acked: trust, ackedRev: 1, ackedGen: 1}
		ss.client.hanse, ss.viewer.ID, ss.viewer.SPIFFEID = true, fmt.Sprintf("shop/frontend-%08x", i*2654435761), frontend
		h.sessions[ss] = struct{}{}
	}
	h.mu.Unlock()
	defer func() {
		h.mu.Lock()
		clear(h.sessions)
		h.mu.Unlock()
	}()
	b.Run("acked", func(b *testing.B) {
		for b.Loop() {
			h.TrustAcked(trust)
		}
	})
	b.Run("roster", func(b *testing.B) {
		for b.Loop() {
			if n := len(h.Roster()); n != 10000 {
				b.Fatalf("%d proxies", n)
			}
		}
	})
	b.Run("moves", func(b *testing.B) {
		for b.Loop() {
			h.Expect(nil)
			h.Moved(nil)
		}
	})
}
