package xdsclient

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	loadv3 "github.com/envoyproxy/go-control-plane/envoy/service/load_stats/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/hanse-mesh/hanse/proxy"
)

// Reporter yields what happened since it was asked before; proxy/balance's Balancer is one.
type Reporter interface {
	Report() []proxy.ClusterLoad
}

// minReport is the shortest interval of reports.
const minReport = 100 * time.Millisecond

// reportInterval is the shortest that a drill in force asks for; 0: none does.
func reportInterval(faults []proxy.Fault, now time.Time) time.Duration {
	var out time.Duration
	for i := range faults {
		if f := &faults[i]; f.Report > 0 && f.Active(now) && (out == 0 || f.Report < out) {
			out = f.Report
		}
	}
	return out
}

// loadReports reports over conn until ctx ends. A stream that breaks is opened again; what it had not sent is sent then.
func (r *run) loadReports(ctx context.Context, conn *grpc.ClientConn) {
	backoff := minBackoff
	told := false
	for {
		began := time.Now()
		err := r.loadStream(ctx, conn)
		if ctx.Err() != nil {
			return
		}
		if !told {
			r.log.Warn("load reports are interrupted", "error", err)
			told = true
		}
		if time.Since(began) > maxBackoff {
			backoff, told = minBackoff, false
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(jitter(backoff)):
		}
		backoff = min(2*backoff, maxBackoff)
	}
}

// loadStream is one LRS stream.
func (r *run) loadStream(ctx context.Context, conn *grpc.ClientConn) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	lrs, err := loadv3.NewLoadReportingServiceClient(conn).StreamLoadStats(ctx)
	if err != nil {
		return fmt.Errorf("open LRS stream: %w", err)
	}
	if err := lrs.Send(&loadv3.LoadStatsRequest{Node: r.node()}); err != nil {
		return fmt.Errorf("begin LRS stream: %w", err)
	}
	orders := make(chan *loadv3.LoadStatsResponse)
	failed := make(chan error, 1)
	var receiving sync.WaitGroup
	defer receiving.Wait()
	defer cancel()
	receiving.Go(func() {
		for {
			m, err := lrs.Recv()
			if err != nil {
				failed <- err
				return
			}
			select {
			case orders <- m:
			case <-ctx.Done():
				return
			}
		}
	})
	var order *loadv3.LoadStatsResponse
	last := time.Now()
	tick := time.NewTimer(defaultLoads)
	defer tick.Stop()
	for {
		changed := r.Changed()
		if order != nil {
			tick.Reset(max(0, r.interval(order)-time.Since(last)))
		}
		select {
		case err := <-failed:
			return err
		case order = <-orders:
			continue
		case <-changed: // a drill may have begun or ended
			continue
		case <-tick.C:
		}
		if order == nil {
			continue
		}
		last = time.Now()
		if err := lrs.Send(&loadv3.LoadStatsRequest{ClusterStats: r.stats(order)}); err != nil {
			return fmt.Errorf("send load report: %w", err)
		}
	}
}

// interval is the server's, or a drill's where that is shorter.
func (r *run) interval(order *loadv3.LoadStatsResponse) time.Duration {
	d := order.GetLoadReportingInterval().AsDuration()
	if d <= 0 {
		d = defaultLoads
	}
	if drill := time.Duration(r.reporting.Load()); drill > 0 {
		d = min(d, drill)
	}
	return max(d, minReport)
}

// stats is a report of the clusters that the server asked for. One is sent even if empty: it says that this proxy is alive.
func (r *run) stats(order *loadv3.LoadStatsResponse) []*endpointv3.ClusterStats {
	asked := map[string]bool{}
	for _, n := range order.Clusters {
		asked[n] = true
	}
	var out []*endpointv3.ClusterStats
	for _, l := range r.cfg.Load.Report() {
		if order.SendAllClusters || asked[l.Cluster] {
			out = append(out, clusterStats(&l, order.ReportEndpointGranularity))
		}
	}
	return out
}

func clusterStats(l *proxy.ClusterLoad, endpoints bool) *endpointv3.ClusterStats {
	out := &endpointv3.ClusterStats{ClusterName: l.Cluster, LoadReportInterval: durationpb.New(l.Interval), TotalDroppedRequests: l.Dropped}
	type key struct {
		at    proxy.Locality
		level int
	}
	byLocality := map[key]*endpointv3.UpstreamLocalityStats{}
	for i := range l.Endpoints {
		e := &l.Endpoints[i]
		k := key{e.Endpoint.Locality, e.Level}
		s := byLocality[k]
		if s == nil {
			s = &endpointv3.UpstreamLocalityStats{
				Locality: &corev3.Locality{Region: k.at.Region, Zone: k.at.Zone, SubZone: k.at.Cluster}, Priority: uint32(k.level),
			}
			byLocality[k] = s
			out.UpstreamLocalityStats = append(out.UpstreamLocalityStats, s)
		}
		s.TotalIssuedRequests += e.Issued
		s.TotalSuccessfulRequests += e.Succeeded
		s.TotalErrorRequests += e.Failed
		s.TotalRequestsInProgress += e.InProgress
		if endpoints {
			s.UpstreamEndpointStats = append(s.UpstreamEndpointStats, endpointStats(e))
		}
	}
	return out
}

// endpointStats carries the fields of xdspb.EndpointReport as a Struct.
func endpointStats(e *proxy.EndpointLoad) *endpointv3.UpstreamEndpointStats {
	number := structpb.NewNumberValue
	text := func(s string) *structpb.Value { return structpb.NewStringValue(strings.ToValidUTF8(s, "?")) }
	fields := map[string]*structpb.Value{
		"id": text(e.Endpoint.ID), "health": text(string(e.Health)), "reason": text(e.Reason),
		"health_since_ms": number(float64(e.Since.UnixMilli())), "retried": number(float64(e.Retried)),
		"p50_ms": number(float64(e.P50) / float64(time.Millisecond)), "p99_ms": number(float64(e.P99) / float64(time.Millisecond)),
	}
	if len(e.Events) > 0 {
		events := make([]*structpb.Value, len(e.Events))
		for i, ev := range e.Events {
			events[i] = structpb.NewStructValue(&structpb.Struct{Fields: map[string]*structpb.Value{
				"time_ms": number(float64(ev.Time.UnixMilli())), "kind": text(string(ev.Kind)), "detail": text(ev.Detail),
			}})
		}
		fields["events"] = structpb.NewListValue(&structpb.ListValue{Values: events})
	}
	addr := e.Endpoint.Address
	return &endpointv3.UpstreamEndpointStats{
		Address: &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
			Address: addr.Addr().String(), PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: uint32(addr.Port())}}}},
		Metadata:                &structpb.Struct{Fields: fields},
		TotalIssuedRequests:     e.Issued,
		TotalSuccessfulRequests: e.Succeeded,
		TotalErrorRequests:      e.Failed,
		TotalRequestsInProgress: e.InProgress,
	}
}
