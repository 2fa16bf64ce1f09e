package sidecar_test

import (
	"bytes"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/hanse-mesh/hanse/proxy"
)

// BenchmarkDownload and BenchmarkUpload carry 16 MiB through two sidecars and a gateway.
func BenchmarkDownload(b *testing.B) {
	front, _ := pair(b, proxy.HTTP, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(w, bytes.NewReader(make([]byte, 16<<20)))
	}))
	c := front.http()
	b.SetBytes(16 << 20)
	for b.Loop() {
		resp, err := c.Get("http://payments:8080/")
		if err != nil {
			b.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		_ = resp.Body.Close()
	}
}

func BenchmarkUpload(b *testing.B) {
	front, _ := pair(b, proxy.HTTP, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) }))
	c := front.http()
	body := strings.Repeat("x", 16<<20)
	b.SetBytes(16 << 20)
	for b.Loop() {
		resp, err := c.Post("http://payments:8080/", "text/plain", strings.NewReader(body))
		if err != nil {
			b.Fatal(err)
		}
		_ = resp.Body.Close()
	}
}

func BenchmarkRequest(b *testing.B) {
	front, _ := pair(b, proxy.HTTP, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, "ok") }))
	c := front.http()
	for b.Loop() {
		resp, err := c.Get("http://payments:8080/")
		if err != nil {
			b.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		_ = resp.Body.Close()
	}
}
