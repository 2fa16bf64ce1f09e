package peering_test

import (
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/federation/peering"
)

// many returns services of so many endpoints each.
func many(r *real, services, endpoints int) map[discovery.Name]*discovery.Service {
	out := make(map[discovery.Name]*discovery.Service, services)
	for s := range services {
		svc := &discovery.Service{
			Name: discovery.Name{Namespace: "shop", Name: fmt.Sprintf("s%05d", s)}, Export: &discovery.Export{Created: time.Unix(1_700_000_000, 0).UTC()},
			Ports: []discovery.Port{{Name: "http", Number: 80, Protocol: discovery.HTTP}},
		}
		ports := map[string]uint16{"http": 8080}
		for e := range endpoints {
			svc.Endpoints = append(svc.Endpoints, &discovery.Endpoint{
				ID:      fmt.Sprintf("%016x%016x", s, e),
				Address: netip.AddrFrom4([4]byte{10, byte(s >> 8), byte(s), byte(e)}),
				Profile: &discovery.Profile{Ports: ports, Transport: discovery.Hop, SPIFFEID: "spiffe://" + r.td.Name() + "/ns/shop/sa/" + svc.Name.Name, Locality: discovery.Locality{Cluster: r.name, Region: "eu-1", Zone: "eu-1a"}, Network: r.name + "-net"},
				Ready:   true,
				Weight:  1,
			})
		}
		out[svc.Name] = svc
	}
	return out
}

// weigh gives a service's first endpoint another weight and hands the next Snapshot on.
func (r *real) weigh(name discovery.Name, weight uint32) {
	next := *r.local
	svc := *next.Services.Get(name)
	svc.Endpoints = slices.Clone(svc.Endpoints)
	ep := *svc.Endpoints[0]
	ep.Weight = weight
	svc.Endpoints[0] = &ep
	next.Services = next.Services.Put(name, &svc)
	r.local = &next
	r.mesh.SetLocal(r.local)
}

func joined(b *testing.B, services, endpoints int) (west, east *real) {
	west, east = newReal(b, "west"), newReal(b, "east")
	token, _, err := west.mesh.CreateToken(b.Context(), "east", 0)
	if err != nil {
		b.Fatal(err)
	}
	if _, err := east.mesh.Join(b.Context(), token, func(peering.Progress) {}); err != nil {
		b.Fatal(err)
	}
	next := *west.local
	next.Services = discovery.NewByName(many(west, services, endpoints))
	west.local = &next
	return west, east
}

func imported(c *discovery.Clusterset) int { return c.Imports.Len() }

// BenchmarkFullSync is from SetLocal in one cluster to the Clusterset of another: encode, own etcd, the guard, mTLS, mirror, decode, merge.
func BenchmarkFullSync(b *testing.B) {
	const services, endpoints = 10_000, 100
	for b.Loop() {
		west, east := joined(b, services, endpoints)
		cpu, start := cpuTime(b), time.Now()
		west.mesh.SetLocal(west.local)
		for {
			updated := east.mesh.Updated()
			if imported(east.mesh.Clusterset()) == services && east.mesh.Status().Members[0].Endpoints == services*endpoints {
				break
			}
			<-updated
		}
		b.ReportMetric(time.Since(start).Seconds(), "s/sync")
		b.ReportMetric((cpuTime(b) - cpu).Seconds(), "cpu-s/sync") // of both sides
		west.stop()
		east.stop()
	}
}

func cpuTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkEndpointChange is from SetLocal in one cluster to the Clusterset of another, of one endpoint.
func BenchmarkEndpointChange(b *testing.B) {
	for name, perSecond := range map[string]int{"idle": 0, "1000 changes per second": 1000} {
		b.Run(name, func(b *testing.B) {
			const services = 1000
			west, east := joined(b, services, 20)
			var mu sync.Mutex // west.local has two writers
			west.mesh.SetLocal(west.local)
			waitFor(east, func(c *discovery.Clusterset) bool { return imported(c) == services })
			watched := discovery.Name{Namespace: "shop", Name: "s00000"}
			done := make(chan struct{})
			var others sync.WaitGroup
			if perSecond > 0 {
				others.Go(func() {
					tick := time.NewTicker(time.Second / time.Duration(perSecond))
					defer tick.Stop()
					for n := uint32(0); ; n++ {
						select {
						case <-tick.C:
							mu.Lock()
							west.weigh(discovery.Name{Namespace: "shop", Name: fmt.Sprintf("s%05d", 1+n%(services-1))}, 2+n/services)
							mu.Unlock()
						case <-done:
							return
						}
					}
				})
			}
			var took []time.Duration
			for n := uint32(10); n < 110; n++ {
				time.Sleep(150 * time.Millisecond) // past the debounce
				start := time.Now()
				mu.Lock()
				west.weigh(watched, n)
				mu.Unlock()
				waitFor(east, func(c *discovery.Clusterset) bool { return c.Imports.Get(watched).From[0].Endpoints[0].Weight == n })
				took = append(took, time.Since(start))
			}
			close(done)
			others.Wait()
			slices.Sort(took)
			b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "ms-p50")
			b.ReportMetric(float64(took[len(took)*99/100].Microseconds())/1000, "ms-p99")
			b.ReportMetric(0, "ns/op")
		})
	}
}

func waitFor(r *real, ok func(*discovery.Clusterset) bool) {
	for {
		updated := r.mesh.Updated()
		if ok(r.mesh.Clusterset()) {
			return
		}
		<-updated
	}
}
