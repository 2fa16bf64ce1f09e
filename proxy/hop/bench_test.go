package hop_test

import (
	"io"
	"net/http"
	"slices"
	"testing"
	"time"

	"github.com/hanse-mesh/hanse/proxy/hop"
	"github.com/hanse-mesh/hanse/proxy/proxytest"
)

// BenchmarkSmallBesideBulk is how long a small exchange takes alone, beside a stream that carries as much as it can on the same connection, and
// beside one that has been given its own.
func BenchmarkSmallBesideBulk(b *testing.B) {
	for _, c := range []struct {
		name  string
		bulk  bool
		conns int // 0: as shipped
	}{{"alone", false, 0}, {"one connection", true, 1}, {"as shipped", true, 0}} {
		b.Run(c.name, func(b *testing.B) {
			d := proxytest.NewDomain(b, "west.test")
			peer, _, _ := serve(b, d.Source(payments), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				for r.URL.Path == "/bulk" {
					if _, err := w.Write(make([]byte, 64<<10)); err != nil {
						return
					}
				}
			}))
			client := client(b, d.Source("/ns/shop/sa/frontend"), func(cfg *hop.ClientConfig) { cfg.MaxConns = c.conns })
			small := func() {
				resp, err := roundTrip(client, peer, request(b, "GET", "/small", nil))
				if err != nil {
					b.Fatal(err)
				}
				_ = resp.Body.Close()
			}
			small()
			if c.bulk {
				resp, err := roundTrip(client, peer, request(b, "GET", "/bulk", nil))
				if err != nil {
					b.Fatal(err)
				}
				read := make(chan struct{})
				defer func() { _ = resp.Body.Close(); <-read }()
				go func() {
					defer close(read)
					_, _ = io.Copy(io.Discard, resp.Body)
				}()
				for end := time.Now().Add(300 * time.Millisecond); time.Now().Before(end); {
					small()
				}
			}
			var took []time.Duration
			b.ResetTimer()
			for range b.N {
				start := time.Now()
				small()
				took = append(took, time.Since(start))
			}
			b.StopTimer()
			slices.Sort(took)
			b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-µs")
			b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-µs")
		})
	}
}
