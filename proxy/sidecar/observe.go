package sidecar

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"log/slog"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
)

// record gathers what is logged and counted of one request or connection.
type record struct {
	start     time.Time
	reporter  string // source or destination
	protocol  string
	source    string // SPIFFE ID
	service   string // authority
	route     string
	policy    string
	method    string
	path      string
	dest      string // SPIFFE ID
	endpoint  string
	cluster   string
	region    string
	zone      string
	level     int
	tries     int
	status    int
	grpc      string
	code      string // of our own failure
	detail    string
	in, out   int64 // bytes of the request and of the response
	traceID   string
	firstByte time.Duration

	span trace.Span
}

type metrics struct {
	requests *prometheus.CounterVec
	duration *prometheus.HistogramVec
	active   *prometheus.GaugeVec
	bytes    *prometheus.CounterVec
	audit    *prometheus.CounterVec
}

func newMetrics(reg prometheus.Registerer) metrics {
	m := metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hanse_requests_total",
			Help: "Requests and TCP connections, by who reports, SPIFFE IDs of both ends, service, the endpoint's cluster and locality, status, gRPC status and the proxy's own error code.",
		}, []string{"reporter", "protocol", "source", "destination", "service", "cluster", "region", "zone", "code", "grpc", "error"}),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "hanse_request_seconds", Help: "Time to the head of the response.",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30},
		}, []string{"reporter", "service", "cluster", "region", "zone"}),
		active: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "hanse_requests_active", Help: "Requests and TCP connections in progress."}, []string{"reporter"}),
		bytes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hanse_bytes_total", Help: "Bytes of bodies and TCP connections, by service and direction (request, response)."}, []string{"reporter", "service", "direction"}),
		audit: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hanse_access_audit_total", Help: "Requests that a policy in audit mode would have decided otherwise."}, []string{"policy", "would"}),
	}
	if reg != nil {
		reg.MustRegister(m.requests, m.duration, m.active, m.bytes, m.audit)
	}
	return m
}

// begin starts a record.
func (s *Sidecar) begin(reporter, protocol string) *record {
	s.metrics.active.WithLabelValues(reporter).Inc()
	return &record{start: time.Now(), reporter: reporter, protocol: protocol}
}

// finish counts, logs and ends the span.
func (s *Sidecar) finish(rec *record) {
	m := s.metrics
	m.active.WithLabelValues(rec.reporter).Dec()
	service := rec.service
	if rec.code == codeUnknownService || rec.code == codeNoConfig {
		service = "" // a caller's invention must not become a label
	}
	m.requests.WithLabelValues(rec.reporter, rec.protocol, rec.source, rec.dest, service, rec.cluster, rec.region, rec.zone,
		strconv.Itoa(rec.status), rec.grpc, rec.code).Inc()
	took := time.Since(rec.start)
	head := rec.firstByte
	if head == 0 {
		head = took
	}
	if rec.code != codeCanceled {
		m.duration.WithLabelValues(rec.reporter, service, rec.cluster, rec.region, rec.zone).Observe(head.Seconds())
	}
	m.bytes.WithLabelValues(rec.reporter, service, "request").Add(float64(rec.in))
	m.bytes.WithLabelValues(rec.reporter, service, "response").Add(float64(rec.out))
	if rec.span != nil {
		rec.span.SetAttributes(attribute.String("hanse.service", rec.service), attribute.String("hanse.endpoint", rec.endpoint),
			attribute.String("hanse.cluster", rec.cluster), attribute.Int("hanse.tries", rec.tries), attribute.Int("http.response.status_code", rec.status))
		if rec.code != "" || rec.status >= 500 {
			rec.span.SetStatus(codes.Error, rec.code)
		}
		rec.span.End()
	}
	if s.cfg.AccessLog == nil {
		return
	}
	attrs := make([]slog.Attr, 0, 24)
	add := func(key, value string) {
		if value != "" {
			attrs = append(attrs, slog.String(key, value))
		}
	}
	add("reporter", rec.reporter)
	add("protocol", rec.protocol)
	add("source", rec.source)
	add("service", rec.service)
	add("destination", rec.dest)
	add("endpoint", rec.endpoint)
	add("cluster", rec.cluster)
	add("region", rec.region)
	add("zone", rec.zone)
	add("method", rec.method)
	add("path", rec.path)
	add("route", rec.route)
	add("policy", rec.policy)
	attrs = append(attrs, slog.Int("status", rec.status))
	add("grpcStatus", rec.grpc)
	add("error", rec.code)
	add("detail", rec.detail)
	if rec.reporter == reporterSource {
		attrs = append(attrs, slog.Int("level", rec.level), slog.Int("tries", rec.tries))
	}
	attrs = append(attrs, slog.Float64("durationMs", float64(took.Microseconds())/1000), slog.Float64("headMs", float64(head.Microseconds())/1000),
		slog.Int64("bytesIn", rec.in), slog.Int64("bytesOut", rec.out))
	add("traceId", rec.traceID)
	s.cfg.AccessLog.LogAttrs(context.Background(), slog.LevelInfo, "access", attrs...)
}

const (
	reporterSource      = "source"
	reporterDestination = "destination"
)

// fail notes our own failure.
func (rec *record) fail(f *failure) {
	rec.code, rec.detail, rec.status = f.code, f.detail, f.status
}

// trace keeps a valid traceparent, or creates one (W3C Trace Context §3.2); with a tracer, the request gets a span and h names it as
// the parent of what follows.
func (s *Sidecar) trace(ctx context.Context, rec *record, h http.Header, kind trace.SpanKind) context.Context {
	if s.cfg.Tracer != nil {
		propagator := propagation.TraceContext{}
		ctx = propagator.Extract(ctx, propagation.HeaderCarrier(h))
		ctx, rec.span = s.cfg.Tracer.Start(ctx, rec.reporter+" "+rec.service, trace.WithSpanKind(kind),
			trace.WithAttributes(attribute.String("http.request.method", rec.method), attribute.String("url.path", rec.path)))
		propagator.Inject(ctx, propagation.HeaderCarrier(h))
		rec.traceID = rec.span.SpanContext().TraceID().String()
		return ctx
	}
	if id, ok := traceID(h["Traceparent"]); ok {
		rec.traceID = id
		return ctx
	}
	var id [24]byte
	_, _ = rand.Read(id[:]) // never fails
	rec.traceID = hex.EncodeToString(id[:16])
	h.Del("Tracestate") // of no valid parent
	h.Set("Traceparent", "00-"+rec.traceID+"-"+hex.EncodeToString(id[16:])+"-01")
	return ctx
}

// traceID returns the trace ID of one valid traceparent.
func traceID(values []string) (string, bool) {
	if len(values) != 1 {
		return "", false
	}
	p := strings.Split(values[0], "-")
	if len(p) < 4 || len(p[0]) != 2 || p[0] == "ff" || len(p[1]) != 32 || len(p[2]) != 16 || len(p[3]) != 2 || p[0] == "00" && len(p) != 4 {
		return "", false
	}
	for _, part := range p[:4] {
		for i := range len(part) {
			if c := part[i]; !(c >= '0' && c <= '9' || c >= 'a' && c <= 'f') {
				return "", false
			}
		}
	}
	if strings.Trim(p[1], "0") == "" || strings.Trim(p[2], "0") == "" {
		return "", false
	}
	return p[1], true
}
