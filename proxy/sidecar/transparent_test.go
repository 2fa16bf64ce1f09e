package sidecar_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"net/textproto"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"

	"github.com/hanse-mesh/hanse/proxy"
	"github.com/hanse-mesh/hanse/proxy/proxytest"
	"github.com/hanse-mesh/hanse/proxy/sidecar"
)

// TestTransparent: what the caller sees through two sidecars is what it sees without.
func TestTransparent(t *testing.T) {
	mux := http.NewServeMux()
	mux.HandleFunc("/empty", func(http.ResponseWriter, *http.Request) {})
	mux.HandleFunc("/204", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(204) })
	mux.HandleFunc("/304", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Etag", `"x"`)
		w.WriteHeader(304)
	})
	mux.HandleFunc("/length", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "5")
		_, _ = io.WriteString(w, "12345")
	})
	mux.HandleFunc("/notype", func(w http.ResponseWriter, _ *http.Request) {
		w.Header()["Content-Type"] = nil
		_, _ = io.WriteString(w, "<html>")
	})
	mux.HandleFunc("/cookies", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Add("Set-Cookie", "a=1")
		w.Header().Add("Set-Cookie", "b=2")
		w.Header().Set("X-Big", strings.Repeat("x", 30_000))
		http.Error(w, "teapot", http.StatusTeapot)
	})
	mux.HandleFunc("/gzip", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Encoding", "gzip")
		_, _ = w.Write([]byte{0x1f, 0x8b, 0, 1, 2})
	})
	mux.HandleFunc("/hints", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Link", "</a.css>; rel=preload")
		w.WriteHeader(103)
		w.Header().Del("Link")
		_, _ = io.WriteString(w, "done")
	})
	mux.HandleFunc("/trailers", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Trailer", "X-Declared")
		b, _ := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%s %s", b, r.Trailer.Get("X-Up"))
		w.Header().Set("X-Declared", "1")
		w.Header().Set(http.TrailerPrefix+"X-Undeclared", "2")
	})
	mux.HandleFunc("/request", func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		h := r.Header.Clone()
		for _, name := range []string{"Traceparent", "X-Forwarded-Client-Cert", "Expect"} {
			h.Del(name)
		}
		fmt.Fprintf(w, "%s %s %s %d %v %q %v", r.Method, r.Host, r.RequestURI, r.ContentLength, r.TransferEncoding, b, h)
	})
	front, _ := pair(t, proxy.HTTP, mux)
	direct := httptest.NewServer(mux)
	defer direct.Close()
	toApp := &http.Transport{DisableCompression: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", direct.Listener.Addr().String())
	}}
	defer toApp.CloseIdleConnections()
	clients := map[string]*http.Client{"direct": {Transport: toApp, CheckRedirect: front.http().CheckRedirect}, "mesh": front.http()}

	type seen struct {
		Status  int
		Header  http.Header
		Body    string
		Length  int64
		Trailer http.Header
		Hints   []string
	}
	look := func(c *http.Client, method, path string, body func() io.Reader, edit func(*http.Request)) seen {
		var s seen
		ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{Got1xxResponse: func(code int, h textproto.MIMEHeader) error {
			s.Hints = append(s.Hints, fmt.Sprint(code, h.Get("Link")))
			return nil
		}})
		var r io.Reader
		if body != nil {
			r = body()
		}
		req, err := http.NewRequestWithContext(ctx, method, "http://payments.shop:8080"+path, r)
		if err != nil {
			t.Fatal(err)
		}
		if edit != nil {
			edit(req)
		}
		resp, err := c.Do(req)
		if err != nil {
			t.Fatalf("%s %s: %v", method, path, err)
		}
		s.Body = text(t, resp, nil)
		s.Status, s.Header, s.Length, s.Trailer = resp.StatusCode, resp.Header, resp.ContentLength, resp.Trailer
		s.Header.Del("Date")
		return s
	}
	for _, tc := range []struct {
		method, path string
		body         func() io.Reader
		edit         func(*http.Request)
	}{
		{method: "GET", path: "/empty"},
		{method: "GET", path: "/204"},
		{method: "GET", path: "/304"},
		{method: "GET", path: "/length"},
		{method: "HEAD", path: "/length"},
		{method: "GET", path: "/notype"},
		{method: "GET", path: "/cookies"},
		{method: "GET", path: "/gzip"},
		{method: "GET", path: "/hints"},
		{method: "GET", path: "/nowhere"},
		{method: "GET", path: "/request?a=b&c=%20d;e"},
		{method: "GET", path: "/request", edit: func(r *http.Request) {
			r.Header.Set("User-Agent", "")
			r.Header["X-Many"] = []string{"1", "2"}
			r.Header.Set("X-Hop", "gone")
			r.Header.Set("Te", "trailers")
		}},
		{method: "OPTIONS", path: "/request"},
		{method: "PATCH", path: "/request", body: func() io.Reader { return strings.NewReader("patch") }},
		{method: "POST", path: "/request", body: func() io.Reader { return strings.NewReader("") }},
		{method: "POST", path: "/request", body: func() io.Reader { return io.MultiReader(strings.NewReader("chunked")) }},
		{method: "PUT", path: "/request", body: func() io.Reader { return strings.NewReader("expected") }, edit: func(r *http.Request) { r.Header.Set("Expect", "100-continue") }},
		{method: "POST", path: "/trailers", body: func() io.Reader { return io.MultiReader(strings.NewReader("up")) }, edit: func(r *http.Request) {
			r.Trailer = http.Header{"X-Up": {"3"}}
		}},
	} {
		d, m := look(clients["direct"], tc.method, tc.path, tc.body, tc.edit), look(clients["mesh"], tc.method, tc.path, tc.body, tc.edit)
		if diff := cmp.Diff(d, m); diff != "" {
			t.Errorf("%s %s: direct (-), through the mesh (+)\n%s", tc.method, tc.path, diff)
		}
	}
}

// TestTrace: a valid traceparent is kept, a missing or broken one is made.
func TestTrace(t *testing.T) {
	front, _ := local(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, r.Header.Get("Traceparent"), "|", r.Header.Get("Tracestate"))
	}))
	const parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
	for given, keep := range map[string]bool{parent: true, "": false, "00-00000000000000000000000000000000-b7ad6b7169203331-01": false, "nonsense": false} {
		req, _ := http.NewRequestWithContext(t.Context(), "GET", "http://payments:8080/", nil)
		if given != "" {
			req.Header.Set("Traceparent", given)
			req.Header.Set("Tracestate", "a=1")
		}
		resp, err := front.http().Do(req)
		got := text(t, resp, err)
		if keep && got != given+"|a=1" {
			t.Errorf("%q became %q", given, got)
		}
		if !keep && (len(got) != len(parent)+1 || strings.Contains(got, given) && given != "") {
			t.Errorf("%q became %q", given, got)
		}
	}
}

// TestSpans: with a tracer, both sides' spans hang together.
func TestSpans(t *testing.T) {
	recorder := tracetest.NewSpanRecorder()
	tracer := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(recorder)).Tracer("test")
	west := proxytest.NewDomain(t, "west.test")
	traced := func(c *sidecar.Config) { c.Tracer = tracer }
	pay := start(t, west.Source("/ns/shop/sa/payments"), traced, func(c *sidecar.Config) { c.Apps[8080] = app(t, says("ok")) })
	pay.serves(proxy.HTTP, authority)
	front := start(t, west.Source("/ns/shop/sa/frontend"), traced)
	front.calls(proxy.HTTP, authority, []*proxy.Endpoint{pay.endpoint("e1")})
	get(t, front, "/")
	eventually(t, "two spans", func() bool { return len(recorder.Ended()) == 2 })
	spans := map[string]sdktrace.ReadOnlySpan{}
	for _, s := range recorder.Ended() {
		spans[s.Name()] = s
	}
	source, dest := spans["source "+authority], spans["destination "+authority]
	if source == nil || dest == nil || dest.Parent().SpanID() != source.SpanContext().SpanID() || dest.SpanContext().TraceID() != source.SpanContext().TraceID() {
		t.Errorf("spans %v", spans)
	}
}

// TestConnectOverHTTP2: a tunnel as a stream of the application's own HTTP/2 connection.
func TestConnectOverHTTP2(t *testing.T) {
	front, _ := pairWith(t, proxy.TCP, tcpApp(t))
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	tr := &http.Transport{Protocols: protocols, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", front.outbound)
	}}
	defer tr.CloseIdleConnections()
	pr, pw := io.Pipe()
	req, _ := http.NewRequestWithContext(t.Context(), http.MethodConnect, "http://payments.shop:8080", pr)
	resp, err := tr.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	data := bytes.Repeat([]byte("x"), 100_000)
	go func() {
		_, _ = pw.Write(data)
		_ = pw.Close()
	}()
	if b, err := io.ReadAll(resp.Body); err != nil || string(b) != "hello\n"+string(data) {
		t.Errorf("%d bytes, %v", len(b), err)
	}
}

// TestNothingIsLeft: after Run has returned no goroutine of it is left.
func TestNothingIsLeft(t *testing.T) {
	west := proxytest.NewDomain(t, "west.test")
	cycle := func() {
		pay := start(t, west.Source("/ns/shop/sa/payments"), func(c *sidecar.Config) { c.Apps[8080] = tcpApp(t) })
		pay.serves(proxy.TCP, authority)
		front := start(t, west.Source("/ns/shop/sa/frontend"), func(c *sidecar.Config) { c.DrainTimeout = 50 * time.Millisecond })
		front.calls(proxy.TCP, authority, []*proxy.Endpoint{pay.endpoint("e1")})
		c, err := net.Dial("tcp", front.outbound)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprint(c, "CONNECT payments:8080 HTTP/1.1\r\nHost: payments:8080\r\n\r\n")
		_, _ = c.Read(make([]byte, 100))
		front.stop() // with an open tunnel
		pay.stop()
		_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
		if _, err := io.Copy(io.Discard, c); errors.Is(err, context.DeadlineExceeded) {
			t.Error("the tunnel is still open")
		}
		_ = c.Close()
	}
	cycle()
	before := runtime.NumGoroutine()
	for range 3 {
		cycle()
	}
	// Each cycle leaves the test's own: an accept loop of tcpApp and a Health.
	eventually(t, "goroutines have ended", func() bool { return runtime.NumGoroutine() <= before+3*3 })
}
