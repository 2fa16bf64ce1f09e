package http2

import (
	"fmt"
	"io"
	"sync"
	"testing"

	"github.com/hanse-mesh/hanse/proxy/message"
)

// BenchmarkExchange is a small GET and its answer of 100 bytes over loopback TCP: both ends.
func BenchmarkExchange(b *testing.B) {
	for _, n := range []int{1, 16, 128} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			answer := make([]byte, 100)
			cc, _ := both(b, Config{}, func(s message.ServerStream) {
				_ = s.Respond(&message.Response{Status: 200, Length: 100, Fields: message.Fields{{Name: "content-type", Value: "text/plain"}, {Name: "server", Value: "app"}}}, false)
				_, _ = s.Write(answer)
				_ = s.End(nil)
			})
			r := get("/")
			r.Fields = message.Fields{{Name: "user-agent", Value: "bench"}, {Name: "accept", Value: "*/*"}, {Name: "traceparent", Value: "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"}}
			b.ReportAllocs()
			b.ResetTimer()
			var all sync.WaitGroup
			for i := range n {
				all.Go(func() {
					buf := make([]byte, 4096)
					for range (b.N - i + n - 1) / n {
						st, err := cc.Open(r, message.Options{End: true})
						must(b, err)
						_, err = st.Response()
						must(b, err)
						for err == nil {
							_, err = st.Read(buf)
						}
						st.Close()
					}
				})
			}
			all.Wait()
		})
	}
}

// BenchmarkBytes is one long body.
func BenchmarkBytes(b *testing.B) {
	chunk := make([]byte, 32<<10)
	cc, _ := both(b, Config{}, func(s message.ServerStream) {
		_ = s.Respond(&message.Response{Status: 200, Length: message.Unknown}, false)
		for range b.N {
			if _, err := s.Write(chunk); err != nil {
				return
			}
		}
		_ = s.End(nil)
	})
	b.SetBytes(int64(len(chunk)))
	st, err := cc.Open(get("/"), message.Options{End: true})
	must(b, err)
	defer st.Close()
	_, err = st.Response()
	must(b, err)
	if n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{st}, make([]byte, 32<<10)); err != nil || n != int64(b.N*len(chunk)) {
		b.Fatal(n, err)
	}
}
