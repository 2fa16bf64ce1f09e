package sidecar

import (
	"context"
	"encoding/hex"
	"maps"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"

	"github.com/hanse-mesh/hanse/proxy/message"
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
	only      string // the endpoint that the caller's address means, if just one
	peer      string // the address of a caller without identity
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
	bytes    *prometheus.CounterVec
	audit    *prometheus.CounterVec
	rejects  *prometheus.CounterVec
	dropped  prometheus.Counter
	active   map[string]prometheus.Gauge // by reporter

	mu     sync.Mutex // held to add to series
	series atomic.Pointer[map[seriesKey]*series]
	last   atomic.Pointer[series] // used last: most requests are like the one before, and comparing costs less than hashing
}

// seriesKey are the labels of a request.
type seriesKey struct {
	reporter, protocol, source, dest, service, cluster, region, zone string
	status                                                           int
	grpc, code                                                       string
}

// series are a request's metrics, found once.
type series struct {
	key      seriesKey
	requests prometheus.Counter
	duration prometheus.Observer
	in, out  prometheus.Counter
}

// maxSeries bounds what is remembered; beyond, metrics are looked up anew each time.
const maxSeries = 4096

func newMetrics(reg prometheus.Registerer) *metrics {
	m := &metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hanse_requests_total",
			Help: "Requests and TCP connections, by who reports, SPIFFE IDs of both ends, service, the endpoint's cluster and locality, status, gRPC status and the proxy's own error code.",
		}, []string{"reporter", "protocol", "source", "destination", "service", "cluster", "region", "zone", "code", "grpc", "error"}),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "hanse_request_seconds", Help: "Time to the head of the response.",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30},
		}, []string{"reporter", "service", "cluster", "region", "zone"}),
		bytes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hanse_bytes_total", Help: "Bytes of bodies and TCP connections, by service and direction (request, response)."}, []string{"reporter", "service", "direction"}),
		audit: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hanse_access_audit_total", Help: "Requests that a policy in audit mode would have decided otherwise."}, []string{"policy", "would"}),
		rejects: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hanse_malformed_total", Help: "Requests and connections refused because they break HTTP, by who sent them (app, peer, plaintext, captured) and reason."}, []string{"from", "reason"}),
		dropped: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "hanse_access_log_dropped_total", Help: "Lines, or batches of them, of the access log that could not be written."}),
	}
	active := prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "hanse_requests_active", Help: "Requests and TCP connections in progress."}, []string{"reporter"})
	m.active = map[string]prometheus.Gauge{reporterSource: active.WithLabelValues(reporterSource), reporterDestination: active.WithLabelValues(reporterDestination)}
	m.series.Store(&map[seriesKey]*series{})
	if reg != nil {
		reg.MustRegister(m.requests, m.duration, active, m.bytes, m.audit, m.rejects, m.dropped)
	}
	return m
}

func (m *metrics) of(k seriesKey) *series {
	if s := m.last.Load(); s != nil && s.key == k {
		return s
	}
	if s := (*m.series.Load())[k]; s != nil {
		m.last.Store(s)
		return s
	}
	s := &series{
		key:      k,
		requests: m.requests.WithLabelValues(k.reporter, k.protocol, k.source, k.dest, k.service, k.cluster, k.region, k.zone, strconv.Itoa(k.status), k.grpc, k.code),
		duration: m.duration.WithLabelValues(k.reporter, k.service, k.cluster, k.region, k.zone),
		in:       m.bytes.WithLabelValues(k.reporter, k.service, "request"),
		out:      m.bytes.WithLabelValues(k.reporter, k.service, "response"),
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if old := *m.series.Load(); len(old) < maxSeries {
		next := maps.Clone(old)
		next[k] = s
		m.series.Store(&next)
	}
	return s
}

// begin starts a record.
func (s *Sidecar) begin(reporter, protocol string) *record {
	s.metrics.active[reporter].Inc()
	rec := records.Get().(*record)
	*rec = record{start: time.Now(), reporter: reporter, protocol: protocol}
	return rec
}

var records = sync.Pool{New: func() any { return new(record) }}

// finish counts, logs and ends the span. Nobody may use the record afterwards.
func (s *Sidecar) finish(rec *record) {
	defer records.Put(rec)
	s.metrics.active[rec.reporter].Dec()
	service := rec.service
	if rec.code == codeUnknownService || rec.code == codeNoConfig {
		service = "" // a caller's invention must not become a label
	}
	m := s.metrics.of(seriesKey{rec.reporter, rec.protocol, rec.source, rec.dest, service, rec.cluster, rec.region, rec.zone, rec.status, rec.grpc, rec.code})
	m.requests.Inc()
	now := time.Now()
	took := now.Sub(rec.start)
	head := rec.firstByte
	if head == 0 {
		head = took
	}
	if rec.code != codeCanceled {
		m.duration.Observe(head.Seconds())
	}
	if rec.in > 0 {
		m.in.Add(float64(rec.in))
	}
	if rec.out > 0 {
		m.out.Add(float64(rec.out))
	}
	if rec.span != nil {
		rec.span.SetAttributes(attribute.String("hanse.service", rec.service), attribute.String("hanse.endpoint", rec.endpoint),
			attribute.String("hanse.cluster", rec.cluster), attribute.Int("hanse.tries", rec.tries), attribute.Int("http.response.status_code", rec.status))
		if rec.code != "" || rec.status >= 500 {
			rec.span.SetStatus(codes.Error, rec.code)
		}
		rec.span.End()
	}
	if s.accessLog != nil {
		s.accessLog.add(rec, now, took, head)
	}
}

const (
	reporterSource      = "source"
	reporterDestination = "destination"
)

// fail notes our own failure.
func (rec *record) fail(f *failure) {
	rec.code, rec.detail, rec.status = f.code, f.detail, f.status
}

// noteGRPC notes the status that a response ends with.
func (rec *record) noteGRPC(head, trailers message.Fields) {
	if rec.protocol != "grpc" {
		return
	}
	status, ok := trailers.Get("grpc-status")
	if !ok {
		status = head.Value("grpc-status")
	}
	if rec.grpc = status; len(status) > 2 {
		rec.grpc = "invalid" // a peer's invention must not become a label
	}
}

// trace keeps a valid traceparent, or creates one (W3C Trace Context §3.2); with a tracer, the request gets a span and the fields name
// it as the parent of what follows.
func (s *Sidecar) trace(rec *record, h *message.Fields, kind trace.SpanKind) {
	if s.cfg.Tracer != nil {
		propagator := propagation.TraceContext{}
		ctx := propagator.Extract(context.Background(), carrier{h})
		ctx, rec.span = s.cfg.Tracer.Start(ctx, rec.reporter+" "+rec.service, trace.WithSpanKind(kind),
			trace.WithAttributes(attribute.String("http.request.method", rec.method), attribute.String("url.path", rec.path)))
		propagator.Inject(ctx, carrier{h})
		rec.traceID = rec.span.SpanContext().TraceID().String()
		return
	}
	if id, ok := traceID(*h); ok {
		rec.traceID = id
		return
	}
	var id [24]byte
	for i := 0; i < len(id); i += 8 {
		v := rand.Uint64()
		for j := range 8 {
			id[i+j] = byte(v >> (8 * j))
		}
	}
	var text [55]byte
	copy(text[:], "00-")
	hex.Encode(text[3:], id[:16])
	text[35] = '-'
	hex.Encode(text[36:], id[16:])
	copy(text[52:], "-01")
	parent := string(text[:])
	rec.traceID = parent[3:35]
	h.Del("tracestate") // of no valid parent
	h.Set("traceparent", parent)
}

// carrier lets OpenTelemetry read and write fields.
type carrier struct{ *message.Fields }

// Get implements propagation.TextMapCarrier, as do the others.
func (c carrier) Get(key string) string { return c.Value(strings.ToLower(key)) }
func (c carrier) Set(key, value string) { c.Fields.Set(strings.ToLower(key), value) }
func (c carrier) Keys() (keys []string) {
	for _, f := range *c.Fields {
		keys = append(keys, f.Name)
	}
	return keys
}

// traceID returns the trace ID of one valid traceparent.
func traceID(fields message.Fields) (string, bool) {
	p, n := "", 0
	for i := range fields {
		if fields[i].Name == "traceparent" {
			p = fields[i].Value
			n++
		}
	}
	if n != 1 || len(p) < 55 || p[2] != '-' || p[35] != '-' || p[52] != '-' || p[:2] == "ff" || len(p) > 55 && (p[:2] == "00" || p[55] != '-') {
		return "", false
	}
	zeros := [2]bool{true, true}
	for i := range 55 {
		c := p[i]
		if i == 2 || i == 35 || i == 52 {
			continue
		}
		if !(c >= '0' && c <= '9' || c >= 'a' && c <= 'f') {
			return "", false
		}
		if c != '0' && i > 2 && i < 35 {
			zeros[0] = false
		}
		if c != '0' && i > 35 && i < 52 {
			zeros[1] = false
		}
	}
	if zeros[0] || zeros[1] {
		return "", false
	}
	return p[3:35], true
}
