package xdsserver

import (
	"errors"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	pushes   *prometheus.CounterVec
	bytes    *prometheus.CounterVec
	nacks    *prometheus.CounterVec
	failures *prometheus.CounterVec
	streams  *prometheus.GaugeVec
	reports  prometheus.Counter
	delay    prometheus.Histogram
}

func newMetrics(reg prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		pushes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hanse_xds_pushes_total", Help: "xDS responses sent, by resource type."}, []string{"type"}),
		bytes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hanse_xds_sent_bytes_total", Help: "Bytes of xDS resources sent, by resource type."}, []string{"type"}),
		nacks: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hanse_xds_nacks_total", Help: "xDS responses that a client rejected, by resource type."}, []string{"type"}),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hanse_xds_generation_errors_total", Help: "Resources that could not be made, by resource type."}, []string{"type"}),
		streams: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "hanse_xds_streams", Help: "Open streams, by protocol: delta, sotw or lrs."}, []string{"protocol"}),
		reports: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "hanse_xds_load_reports_total", Help: "Load reports received."}),
		delay: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "hanse_xds_push_delay_seconds",
			Help:    "From the view's being set to the response's being handed to the stream.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5}}),
	}
	if reg == nil {
		return m, nil
	}
	var errs []error
	for _, c := range []prometheus.Collector{m.pushes, m.bytes, m.nacks, m.failures, m.streams, m.reports, m.delay} {
		errs = append(errs, reg.Register(c))
	}
	return m, errors.Join(errs...)
}

// shortType is "Listener" for a type URL that ends in ".Listener"; foreign type URLs share one label.
func shortType(typeURL string) string {
	if !known(typeURL) {
		return "other"
	}
	return typeURL[strings.LastIndexByte(typeURL, '.')+1:]
}
