package dns

import "github.com/prometheus/client_golang/prometheus"

type metrics struct {
	queries  *prometheus.CounterVec
	dropped  *prometheus.CounterVec
	upstream *prometheus.CounterVec
	seconds  prometheus.Histogram
}

func newMetrics(reg prometheus.Registerer, pool *Pool) (*metrics, error) {
	m := &metrics{
		queries: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "hanse_dns_queries_total",
			Help: "DNS queries answered, by whom the answer is (mesh, upstream, refused) and response code."}, []string{"by", "code"}),
		dropped: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "hanse_dns_dropped_total",
			Help: "DNS queries and connections that were not answered: malformed, overloaded, connections, loop."}, []string{"reason"}),
		upstream: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "hanse_dns_upstream_failures_total",
			Help: "Tries at an upstream resolver that brought no answer."}, []string{"upstream"}),
		seconds: prometheus.NewHistogram(prometheus.HistogramOpts{Name: "hanse_dns_upstream_seconds",
			Help: "Time until an upstream resolver has answered.", Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5}}),
	}
	if reg == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.queries, m.dropped, m.upstream, m.seconds,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "hanse_dns_addresses", Help: "Addresses that DNS has handed out and remembers."}, func() float64 {
			n, _ := pool.Size()
			return float64(n)
		}),
		prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "hanse_dns_addresses_forgotten_total", Help: "Addresses that were forgotten for want of room."}, func() float64 {
			_, n := pool.Size()
			return float64(n)
		}),
	} {
		if err := reg.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}
