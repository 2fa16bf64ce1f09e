package xdsserver

import (
	"context"
	"net"
	"strconv"
	"time"

	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	loadv3 "github.com/envoyproxy/go-control-plane/envoy/service/load_stats/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/discovery/xdsgen"
)

// maxEvents bounds the events of one endpoint's report.
const maxEvents = 256

// Report is what one proxy has seen since its report before.
type Report struct {
	Viewer   xdsgen.Viewer
	Time     time.Time // of receipt
	Clusters []ClusterReport
}

// ClusterReport is one authority.
type ClusterReport struct {
	Authority string
	Service   discovery.Name // zero where Authority is not one of ours
	Interval  time.Duration
	Dropped   uint64 // refused by the circuit breaker
	Endpoints []EndpointReport
}

// EndpointReport is one endpoint, or, where ID and Address are empty, a locality of a client that does not tell endpoints
// apart (gRPC).
type EndpointReport struct {
	ID          string
	Address     string // ip:port
	Locality    discovery.Locality
	Level       uint32
	Issued      uint64
	Succeeded   uint64
	Failed      uint64 // tries that failed, the retried ones included
	InProgress  uint64
	Retried     uint64 // of Failed: tried again elsewhere
	P50, P99    time.Duration
	Health      string // healthy, ejected or dead; "" is unknown
	Reason      string
	HealthSince time.Time
	Events      []Event
}

// Event is a moment that a proxy noticed.
type Event struct {
	Time   time.Time
	Kind   string // first_failure, ejected, shifted, returned
	Detail string
}

// reporter is one LRS stream.
type reporter struct {
	peer *peer
	wake chan struct{}
	end  context.CancelCauseFunc
}

func (r *reporter) kick() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// StreamLoadStats asks for load reports and hands them to Config.OnReport.
func (s *Server) StreamLoadStats(stream grpc.BidiStreamingServer[loadv3.LoadStatsRequest, loadv3.LoadStatsResponse]) error {
	p, err := s.authenticate(stream.Context())
	if err != nil {
		return err
	}
	if err := s.awaitView(stream.Context()); err != nil {
		return err
	}
	ctx, end := context.WithCancelCause(stream.Context())
	defer end(nil)
	r := &reporter{peer: p, wake: make(chan struct{}, 1), end: end}
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return errShutdown
	}
	s.reporters[r] = struct{}{}
	s.mu.Unlock()
	s.metrics.streams.WithLabelValues("lrs").Inc()
	defer func() {
		s.mu.Lock()
		delete(s.reporters, r)
		s.mu.Unlock()
		s.metrics.streams.WithLabelValues("lrs").Dec()
	}()
	var viewer *xdsgen.Viewer
	var asked time.Duration
	requests, failed := receive(ctx, stream.Recv)
	for {
		select {
		case req := <-requests:
			first := viewer == nil
			if first {
				v, _ := s.describe(p.id, req.GetNode())
				viewer = &v
			}
			if !first || len(req.GetClusterStats()) > 0 {
				s.metrics.reports.Inc()
				if s.cfg.OnReport != nil {
					s.cfg.OnReport(s.report(viewer, req.GetClusterStats()))
				}
			}
		case <-r.wake:
		case err := <-failed:
			return cause(ctx, err)
		case <-ctx.Done():
			return cause(ctx, nil)
		}
		s.mu.Lock()
		every := s.reportEvery
		s.mu.Unlock()
		if viewer == nil || every == asked {
			continue
		}
		asked = every
		if err := stream.Send(&loadv3.LoadStatsResponse{
			SendAllClusters:           true,
			LoadReportingInterval:     durationpb.New(every),
			ReportEndpointGranularity: true,
		}); err != nil {
			return cause(ctx, err)
		}
	}
}

func (s *Server) report(viewer *xdsgen.Viewer, stats []*endpointv3.ClusterStats) Report {
	out := Report{Viewer: *viewer, Time: s.now()}
	for _, c := range stats {
		cr := ClusterReport{Authority: short(c.GetClusterName()), Interval: c.GetLoadReportInterval().AsDuration(), Dropped: c.GetTotalDroppedRequests()}
		cr.Service, _ = xdsgen.Subject(cr.Authority)
		for _, l := range c.GetUpstreamLocalityStats() {
			at := discovery.Locality{
				Cluster: short(l.GetLocality().GetSubZone()), Region: short(l.GetLocality().GetRegion()), Zone: short(l.GetLocality().GetZone())}
			for _, e := range l.GetUpstreamEndpointStats() {
				cr.Endpoints = append(cr.Endpoints, endpointReport(at, l.GetPriority(), e))
			}
			if len(l.GetUpstreamEndpointStats()) == 0 {
				cr.Endpoints = append(cr.Endpoints, EndpointReport{
					Locality: at, Level: l.GetPriority(), Issued: l.GetTotalIssuedRequests(), Succeeded: l.GetTotalSuccessfulRequests(),
					Failed: l.GetTotalErrorRequests(), InProgress: l.GetTotalRequestsInProgress()})
			}
		}
		out.Clusters = append(out.Clusters, cr)
	}
	return out
}

// endpointReport reads the Struct that holds xdspb.EndpointReport's fields. What is missing or of another type is zero.
func endpointReport(at discovery.Locality, level uint32, e *endpointv3.UpstreamEndpointStats) EndpointReport {
	f := e.GetMetadata().GetFields()
	r := EndpointReport{
		ID:          short(f["id"].GetStringValue()),
		Locality:    at,
		Level:       level,
		Issued:      e.GetTotalIssuedRequests(),
		Succeeded:   e.GetTotalSuccessfulRequests(),
		Failed:      e.GetTotalErrorRequests(),
		InProgress:  e.GetTotalRequestsInProgress(),
		Retried:     uint64(number(f["retried"], 1<<53)),
		P50:         milliseconds(f["p50_ms"]),
		P99:         milliseconds(f["p99_ms"]),
		Health:      short(f["health"].GetStringValue()),
		Reason:      short(f["reason"].GetStringValue()),
		HealthSince: unixMilli(f["health_since_ms"]),
	}
	if a := e.GetAddress().GetSocketAddress(); a != nil {
		r.Address = net.JoinHostPort(short(a.GetAddress()), strconv.Itoa(int(a.GetPortValue())))
	}
	for _, v := range f["events"].GetListValue().GetValues() {
		if len(r.Events) == maxEvents {
			break
		}
		ev := v.GetStructValue().GetFields()
		r.Events = append(r.Events, Event{
			Time: unixMilli(ev["time_ms"]), Kind: short(ev["kind"].GetStringValue()), Detail: short(ev["detail"].GetStringValue())})
	}
	return r
}

// number is within 0 and limit; what is no number is 0.
func number(v *structpb.Value, limit float64) float64 {
	n := v.GetNumberValue()
	if !(n > 0) { // also NaN
		return 0
	}
	return min(n, limit)
}

func milliseconds(v *structpb.Value) time.Duration {
	return time.Duration(number(v, float64(time.Hour/time.Millisecond)) * float64(time.Millisecond))
}

// unixMilli is the zero time for 0.
func unixMilli(v *structpb.Value) time.Time {
	const year9999 = 253402300799000
	if n := number(v, year9999); n > 0 {
		return time.UnixMilli(int64(n))
	}
	return time.Time{}
}
