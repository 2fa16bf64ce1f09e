package http1

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hanse-mesh/hanse/proxy/message"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// listen serves connections on loopback until the test ends.
func listen(t testing.TB, cfg *ServerConfig, handle func(message.ServerStream)) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	var conns sync.WaitGroup
	var mu sync.Mutex
	var open []*ServerConn
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			sc := NewServerConn(c, cfg, handle)
			mu.Lock()
			open = append(open, sc)
			mu.Unlock()
			conns.Go(func() { _ = sc.Serve() })
		}
	}()
	t.Cleanup(func() {
		_ = ln.Close()
		mu.Lock()
		for _, sc := range open {
			sc.Close()
		}
		mu.Unlock()
		conns.Wait()
	})
	return ln.Addr().String()
}

// facts answers with what the codec has made of a request.
func facts(s message.ServerStream) {
	r := s.Request()
	body, err := io.ReadAll(s)
	if err != nil {
		return
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s %s %s %s %s %d %q", r.Method, r.Scheme, r.Authority, r.Path, r.Protocol, r.Length, body)
	for _, f := range r.Fields {
		fmt.Fprintf(&b, " %s=%q", f.Name, f.Value)
	}
	for _, f := range s.Trailers() {
		fmt.Fprintf(&b, " trailer:%s=%q", f.Name, f.Value)
	}
	_ = s.Respond(&message.Response{Status: 200, Length: int64(b.Len())}, false)
	_, _ = s.Write(b.Bytes())
	_ = s.End(nil)
}

// converse sends bytes and reads what comes until the server closes, or falls silent after an answer.
func converse(t testing.TB, addr, sent string) string {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	must(t, err)
	defer c.Close()
	go func() {
		_, _ = io.WriteString(c, sent)
		_ = c.(*net.TCPConn).CloseWrite()
	}()
	_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
	b, err := io.ReadAll(c)
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		t.Fatalf("no end after %q", b)
	}
	return string(b)
}

const host = "Host: app.test\r\n"

func TestMalformedRequests(t *testing.T) {
	long := strings.Repeat("a", 70_000)
	for _, c := range []struct {
		sent   string
		status int
		reason string
	}{
		{"GET / HTTP/1.1\r\n\r\n", 400, "no_host"},
		{"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400, "two_hosts"},
		{"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400, "host"},
		{"GET / HTTP/1.1\r\nHost: me@a\r\n\r\n", 400, "host"},
		{"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400, "host"},
		{"GET / HTTP/1.1\r\nHost: a,b\r\n\r\n", 400, "host"},
		{"GET  / HTTP/1.1\r\n" + host + "\r\n", 400, "request_line"},
		{"GET  HTTP/1.1\r\n" + host + "\r\n", 400, "request_line"},
		{"GET / HTTP/1.1 \r\n" + host + "\r\n", 400, "request_line"},
		{"GET /a b HTTP/1.1\r\n" + host + "\r\n", 400, "request_line"},
		{" GET / HTTP/1.1\r\n" + host + "\r\n", 400, "method"},
		{"\r\nGET / HTTP/1.1\r\n" + host + "\r\n", 400, "request_line"},
		{"GET\t/\tHTTP/1.1\r\n" + host + "\r\n", 400, "request_line"},
		{"GET /\r\n" + host + "\r\n", 400, "request_line"},
		{"G@T / HTTP/1.1\r\n" + host + "\r\n", 400, "method"},
		{"GET / HTTP/2.0\r\n" + host + "\r\n", 505, "version"},
		{"GET / HTTP/1.2\r\n" + host + "\r\n", 505, "version"},
		{"GET / HTTP/0.9\r\n" + host + "\r\n", 505, "version"},
		{"GET / http/1.1\r\n" + host + "\r\n", 400, "request_line"},
		{"GET / HTTP/1.10\r\n" + host + "\r\n", 400, "request_line"},
		{"GET / HTTP/+1.1\r\n" + host + "\r\n", 400, "request_line"},
		{"GET /a#b HTTP/1.1\r\n" + host + "\r\n", 400, "target"},
		{"GET /a\x00b HTTP/1.1\r\n" + host + "\r\n", 400, "target"},
		{"GET /\xff HTTP/1.1\r\n" + host + "\r\n", 400, "target"},
		{"GET a HTTP/1.1\r\n" + host + "\r\n", 400, "target"},
		{"GET * HTTP/1.1\r\n" + host + "\r\n", 400, "target"},
		{"GET ftp://app.test/ HTTP/1.1\r\n" + host + "\r\n", 400, "target"},
		{"GET http:/// HTTP/1.1\r\n" + host + "\r\n", 400, "target"},
		{"GET http://me@app.test/ HTTP/1.1\r\n" + host + "\r\n", 400, "target"},
		{"GET http://other.test/ HTTP/1.1\r\n" + host + "\r\n", 400, "host_against_target"},
		{"CONNECT / HTTP/1.1\r\n" + host + "\r\n", 400, "target"},
		{"CONNECT app.test HTTP/1.1\r\n" + host + "\r\n", 400, "target"},
		{"CONNECT app.test:0 HTTP/1.1\r\n" + host + "\r\n", 400, "target"},
		{"CONNECT app.test:http HTTP/1.1\r\n" + host + "\r\n", 400, "target"},
		{"CONNECT a:1 HTTP/1.1\r\n" + host + "Content-Length: 5\r\n\r\nhello", 400, "connect_with_body"},
		{"GET / HTTP/1.1\n" + host + "\r\n", 400, "bare_lf"},
		{"GET / HTTP/1.1\r\nHost: a\n\r\n\r\n", 400, "bare_lf"},
		{"GET / HTTP/1.1\r\n" + host + "X: a\nY: b\r\n\r\n", 400, "bare_lf"},
		{"GET / HTTP/1.1\r\n" + host + "X: a\rY: b\r\n\r\n", 400, "bare_cr"},
		{"GET / HTTP/1.1\r\n" + host + "X: a\r\r\n\r\n", 400, "bare_cr"},
		{"GET / HTTP/1.1\r\n" + host + "X: a\x00b\r\n\r\n", 400, "field_value"},
		{"GET / HTTP/1.1\r\n" + host + "X: a\x7fb\r\n\r\n", 400, "field_value"},
		{"GET / HTTP/1.1\r\n" + host + "X: a\x0bb\r\n\r\n", 400, "field_value"},
		{"GET / HTTP/1.1\r\n" + host + "X: a\r\n b\r\n\r\n", 400, "folded_line"},
		{"GET / HTTP/1.1\r\n X: a\r\n" + host + "\r\n", 400, "folded_line"},
		{"GET / HTTP/1.1\r\n" + host + "X: a\r\n\tb\r\n\r\n", 400, "folded_line"},
		{"GET / HTTP/1.1\r\n" + host + "X : a\r\n\r\n", 400, "space_before_colon"},
		{"GET / HTTP/1.1\r\n" + host + "X\t: a\r\n\r\n", 400, "space_before_colon"},
		{"GET / HTTP/1.1\r\n" + host + ": a\r\n\r\n", 400, "empty_name"},
		{"GET / HTTP/1.1\r\n" + host + "X a\r\n\r\n", 400, "no_colon"},
		{"GET / HTTP/1.1\r\n" + host + "X(y): a\r\n\r\n", 400, "field_name"},
		{"GET / HTTP/1.1\r\n" + host + "X y: a\r\n\r\n", 400, "field_name"},
		{"GET / HTTP/1.1\r\n" + host + "X\xc3\xa4: a\r\n\r\n", 400, "field_name"},
		{"POST / HTTP/1.1\r\n" + host + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, "length_and_chunked"},
		{"POST / HTTP/1.1\r\n" + host + "Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello", 400, "two_lengths"},
		{"POST / HTTP/1.1\r\n" + host + "Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello", 400, "two_lengths"},
		{"POST / HTTP/1.1\r\n" + host + "Content-Length: 5, 5\r\n\r\nhello", 400, "content_length"},
		{"POST / HTTP/1.1\r\n" + host + "Content-Length: -5\r\n\r\nhello", 400, "content_length"},
		{"POST / HTTP/1.1\r\n" + host + "Content-Length: +5\r\n\r\nhello", 400, "content_length"},
		{"POST / HTTP/1.1\r\n" + host + "Content-Length: 0x5\r\n\r\nhello", 400, "content_length"},
		{"POST / HTTP/1.1\r\n" + host + "Content-Length: 5 5\r\n\r\nhello", 400, "content_length"},
		{"POST / HTTP/1.1\r\n" + host + "Content-Length: 99999999999999999999\r\n\r\n", 400, "content_length"},
		{"POST / HTTP/1.1\r\n" + host + "Content-Length:\r\n\r\n", 400, "content_length"},
		{"POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: gzip, chunked\r\n\r\n", 501, "transfer_encoding"},
		{"POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked, identity\r\n\r\n", 501, "transfer_encoding"},
		{"POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: xchunked\r\n\r\n", 501, "transfer_encoding"},
		{"POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", 400, "two_transfer_encodings"},
		{"POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n", 400, "two_transfer_encodings"},
		{"POST / HTTP/1.0\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n", 400, "chunked_in_1_0"},
		{"POST / HTTP/1.1\r\n" + host + "Expect: 200-maybe\r\nContent-Length: 5\r\n\r\n", 417, "expect"},
		{"GET / HTTP/1.1\r\n" + host + "Upgrade: a\r\nUpgrade: b\r\n\r\n", 400, "two_upgrades"},
		{"GET / HTTP/1.1\r\n" + host + "X: " + long + "\r\n\r\n", 431, "head_too_large"},
		{"GET / HTTP/1.1\r\n" + host + strings.Repeat("X: a\r\n", 300) + "\r\n", 431, "too_many_fields"},
		{"GET /" + long + " HTTP/1.1\r\n" + host + "\r\n", 414, "request_line_too_long"},
		{"GET /" + long[:20_000] + " HTTP/1.1\r\n" + host + "\r\n", 414, "request_line_too_long"},
		{"\x16\x03\x01\x02\x00\x01\x00", 0, "not_http"},
		{"INVALID CONNECTION PREFACE\r\n\r\n", 0, "not_http"},
		{"SSH-2.0-OpenSSH\r\n", 0, "not_http"},
	} {
		name := c.sent[:min(len(c.sent), 80)]
		t.Run(c.reason+"/"+name, func(t *testing.T) {
			var reason atomic.Pointer[string]
			addr := listen(t, &ServerConfig{OnReject: func(r string) { reason.Store(&r) }}, facts)
			got := converse(t, addr, c.sent)
			if c.status == 0 {
				if r := reason.Load(); got != "" || r == nil || *r != c.reason {
					t.Errorf("answered %q, reason %v", got, r)
				}
				return
			}
			if !strings.HasPrefix(got, fmt.Sprintf("HTTP/1.1 %d ", c.status)) || !strings.Contains(got, "connection: close\r\n") || strings.Count(got, "HTTP/1.1") != 1 {
				t.Errorf("answered %q, want %d", got, c.status)
			}
			if r := reason.Load(); r == nil || *r != c.reason {
				t.Errorf("reason %v, want %s", r, c.reason)
			}
		})
	}
}

// Bodies that are not acceptable end the connection: nothing after them is taken for a request.
func TestMalformedBodies(t *testing.T) {
	const head = "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n"
	for _, c := range []struct{ body, reason string }{
		{"g\r\n", "chunk_size"}, {"\r\n", "chunk_size"}, {"-1\r\n", "chunk_size"}, {"0x5\r\nhello\r\n0\r\n\r\n", "chunk_extension"},
		{" 5\r\nhello\r\n0\r\n\r\n", "chunk_size"}, {"5 \r\nhello\r\n0\r\n\r\n", "chunk_extension"}, {"5;a=b\r\nhello\r\n0\r\n\r\n", "chunk_extension"},
		{"5\nhello\r\n0\r\n\r\n", "chunk_extension"}, {"5\rhello\r\n0\r\n\r\n", "chunk_size"}, {"5\r\nhello0\r\n\r\n", "chunk_end"},
		{"5\r\nhello\n0\r\n\r\n", "chunk_end"}, {"5\r\nhello\r0\r\n\r\n", "chunk_end"}, {"1000000000000000\r\n", "chunk_size"},
		{"ffffffffffffffffff\r\n", "chunk_size"}, {"0000000000000000005\r\nhello\r\n", "chunk_size"},
		{"0\r\nX: a\nY: b\r\n\r\n", "bare_lf"}, {"0\r\nX : a\r\n\r\n", "space_before_colon"}, {"0\r\nContent-Length: 5\r\n\r\n", "trailer_field"},
		{"0\r\nTransfer-Encoding: chunked\r\n\r\n", "trailer_field"}, {"0\r\nHost: evil\r\n\r\n", "trailer_field"}, {"0\r\nAuthorization: x\r\n\r\n", "trailer_field"},
		{"0\r\n X: a\r\n\r\n", "folded_line"}, {"0\r\nX: " + strings.Repeat("a", 70_000) + "\r\n\r\n", "trailers_too_large"},
		{"5\r\nhel", ""},
	} {
		t.Run(c.reason+"/"+c.body[:min(len(c.body), 30)], func(t *testing.T) {
			var reason atomic.Pointer[string]
			addr := listen(t, &ServerConfig{OnReject: func(r string) { reason.Store(&r) }}, facts)
			got := converse(t, addr, head+c.body+"GET /smuggled HTTP/1.1\r\n"+host+"\r\n")
			if strings.Contains(got, "smuggled") || strings.HasPrefix(got, "HTTP/1.1 2") {
				t.Errorf("answered %q", got)
			}
			if r := reason.Load(); c.reason != "" && (r == nil || *r != c.reason) {
				t.Errorf("reason %v, want %s", r, c.reason)
			}
		})
	}
}

func TestGoodRequests(t *testing.T) {
	addr := listen(t, &ServerConfig{}, facts)
	for _, c := range []struct{ sent, want string }{
		{"GET / HTTP/1.1\r\n" + host + "\r\n", `GET http app.test /  0 ""`},
		{"GET /a%2Fb?c=d HTTP/1.1\r\nHOST: app.test\r\nX-Y:  two  words \r\nEmpty:\r\n\r\n", `GET http app.test /a%2Fb?c=d  0 "" x-y="two  words" empty=""`},
		{"GET http://app.test:8080/p HTTP/1.1\r\nHost: app.test:8080\r\n\r\n", `GET http app.test:8080 /p  0 ""`},
		{"GET http://app.test?q HTTP/1.1\r\n" + host + "\r\n", `GET http app.test /?q  0 ""`},
		{"OPTIONS * HTTP/1.1\r\n" + host + "\r\n", `OPTIONS http app.test *  0 ""`},
		{"OPTIONS http://app.test HTTP/1.1\r\n" + host + "\r\n", `OPTIONS http app.test *  0 ""`},
		{"GET / HTTP/1.0\r\n\r\n", `GET http  /  0 ""`},
		{"POST / HTTP/1.1\r\n" + host + "Content-Length: 5\r\n\r\nhello", `POST http app.test /  5 "hello"`},
		{"POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: Chunked\r\n\r\n5\r\nhello\r\n1\r\n!\r\n0\r\nX-Sum: 6\r\n\r\n", `POST http app.test /  -1 "hello!" trailer:x-sum="6"`},
		{"GET / HTTP/1.1\r\n" + host + "Connection: X-Mine, TE\r\nX-Mine: 1\r\nTE: gzip, trailers\r\nKeep-Alive: 5\r\nProxy-Connection: k\r\n\r\n", `GET http app.test /  0 "" te="trailers"`},
		{"GET / HTTP/1.1\r\n" + host + "Connection: Upgrade\r\nUpgrade: WebSocket\r\n\r\n", `GET http app.test / websocket -1 ""`},
		{"GET / HTTP/1.1\r\n" + host + "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMA\r\n\r\n", `GET http app.test /  0 ""`},
		{"GET / HTTP/1.1\r\n" + host + "Upgrade: websocket\r\n\r\n", `GET http app.test /  0 ""`},
		{"CONNECT db.shop:5432 HTTP/1.1\r\n" + host + "\r\n", `CONNECT  db.shop:5432   -1 ""`},
		{"GET / HTTP/1.1\r\n" + host + "Cookie: a=1\r\nX: 1\r\nX: 2\r\n\r\n", `GET http app.test /  0 "" cookie="a=1" x="1" x="2"`},
	} {
		got := converse(t, addr, c.sent)
		if _, body, _ := strings.Cut(got, "\r\n\r\n"); body != c.want {
			t.Errorf("%q:\n got %q\nwant %q", c.sent, got, c.want)
		}
	}
}

func TestPipeliningKeepsOrder(t *testing.T) {
	addr := listen(t, &ServerConfig{}, facts)
	var sent strings.Builder
	for i := range 50 {
		fmt.Fprintf(&sent, "POST /%d HTTP/1.1\r\n%sContent-Length: 3\r\n\r\nabc", i, host)
	}
	got := converse(t, addr, sent.String())
	at := 0
	for i := range 50 {
		next := strings.Index(got[at:], fmt.Sprintf("/%d  3", i))
		if next < 0 {
			t.Fatalf("no answer %d in order", i)
		}
		at += next
	}
}

func TestExpectContinue(t *testing.T) {
	for _, wants := range []bool{true, false} {
		addr := listen(t, &ServerConfig{}, func(s message.ServerStream) {
			if wants {
				facts(s)
				return
			}
			_ = s.Respond(&message.Response{Status: 403, Length: 0}, true)
		})
		c, err := net.Dial("tcp", addr)
		must(t, err)
		defer c.Close()
		_, err = io.WriteString(c, "POST / HTTP/1.1\r\n"+host+"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n")
		must(t, err)
		br := bufio.NewReader(c)
		line, err := br.ReadString('\n')
		must(t, err)
		if !wants {
			if rest, _ := io.ReadAll(br); !strings.HasPrefix(line, "HTTP/1.1 403") || !strings.Contains(string(rest), "connection: close") && len(rest) == 0 {
				t.Errorf("%q %q", line, rest)
			}
			continue
		}
		if line != "HTTP/1.1 100 Continue\r\n" {
			t.Fatalf("got %q", line)
		}
		_, _ = br.ReadString('\n')
		_, err = io.WriteString(c, "hello")
		must(t, err)
		if line, err = br.ReadString('\n'); err != nil || line != "HTTP/1.1 200 OK\r\n" {
			t.Errorf("%q %v", line, err)
		}
	}
}

// What answers look like, and what becomes of the connection.
func TestAnswers(t *testing.T) {
	text := message.Fields{{Name: "content-type", Value: "text/plain"}}
	for _, c := range []struct {
		name, sent string
		handle     func(s message.ServerStream)
		want       string
	}{
		{"chunked", "GET / HTTP/1.1\r\n" + host + "Connection: close\r\n\r\n", func(s message.ServerStream) {
			_ = s.Inform(103, message.Fields{{Name: "link", Value: "</x>"}})
			_ = s.Respond(&message.Response{Status: 200, Fields: text, Length: message.Unknown}, false)
			_, _ = s.Write([]byte("hello"))
			_ = s.Flush()
			_, _ = s.Write([]byte("!"))
			_ = s.End(message.Fields{{Name: "x-sum", Value: "6"}})
		}, "HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\nHTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n5\r\nhello\r\n1\r\n!\r\n0\r\nx-sum: 6\r\n\r\n"},
		{"chunked to HTTP/1.0", "GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", func(s message.ServerStream) {
			_ = s.Inform(103, nil)
			_ = s.Respond(&message.Response{Status: 200, Length: message.Unknown}, false)
			_, _ = s.Write([]byte("hello"))
			_ = s.End(message.Fields{{Name: "x-sum", Value: "6"}})
		}, "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nhello"},
		{"kept in HTTP/1.0", "GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", func(s message.ServerStream) {
			_ = s.Respond(&message.Response{Status: 200, Length: 2}, false)
			_, _ = s.Write([]byte("ok"))
			_ = s.End(nil)
		}, "HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: keep-alive\r\n\r\nok"},
		{"HEAD", "HEAD / HTTP/1.1\r\n" + host + "\r\n", func(s message.ServerStream) {
			_ = s.Respond(&message.Response{Status: 200, Length: 100}, false)
			_, _ = s.Write(make([]byte, 100))
			_ = s.End(nil)
		}, "HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n"},
		{"204", "GET / HTTP/1.1\r\n" + host + "\r\n", func(s message.ServerStream) { _ = s.Respond(&message.Response{Status: 204}, true) }, "HTTP/1.1 204 No Content\r\n\r\n"},
		{"304", "GET / HTTP/1.1\r\n" + host + "\r\n", func(s message.ServerStream) { _ = s.Respond(&message.Response{Status: 304, Length: 5}, true) }, "HTTP/1.1 304 Not Modified\r\ncontent-length: 5\r\n\r\n"},
		{"too short", "GET / HTTP/1.1\r\n" + host + "\r\n" + "GET / HTTP/1.1\r\n" + host + "\r\n", func(s message.ServerStream) {
			_ = s.Respond(&message.Response{Status: 200, Length: 10}, false)
			_, _ = s.Write([]byte("short"))
			_ = s.Flush()
			if s.End(nil) == nil {
				t.Error("a short body was ended")
			}
		}, "HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nshort"},
		{"no answer", "GET / HTTP/1.1\r\n" + host + "\r\n", func(message.ServerStream) {}, ""},
		{"panic", "GET / HTTP/1.1\r\n" + host + "\r\n", func(message.ServerStream) { panic("x") }, ""},
		{"body not wanted, short", "POST / HTTP/1.1\r\n" + host + "Content-Length: 5\r\n\r\nhelloGET / HTTP/1.1\r\n" + host + "\r\n", func(s message.ServerStream) {
			_ = s.Respond(&message.Response{Status: 413, Length: 0}, true)
		}, "HTTP/1.1 413 Request Entity Too Large\r\ncontent-length: 0\r\n\r\nHTTP/1.1 413 Request Entity Too Large\r\ncontent-length: 0\r\n\r\n"},
		{"body not wanted, long", "POST / HTTP/1.1\r\n" + host + "Content-Length: 1000000\r\n\r\nhello", func(s message.ServerStream) {
			_ = s.Respond(&message.Response{Status: 413, Length: 0}, true)
		}, "HTTP/1.1 413 Request Entity Too Large\r\ncontent-length: 0\r\n\r\n"},
		{"upgrade", "GET /ws HTTP/1.1\r\n" + host + "Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\nping", func(s message.ServerStream) {
			_ = s.Respond(&message.Response{Status: 101}, false)
			b := make([]byte, 10)
			n, _ := s.Read(b)
			_, _ = s.Write(b[:n])
			_ = s.End(nil)
		}, "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\nping"},
		{"upgrade refused", "GET /ws HTTP/1.1\r\n" + host + "Connection: upgrade\r\nUpgrade: websocket\r\n\r\nGET /x HTTP/1.1\r\n" + host + "\r\n", func(s message.ServerStream) {
			_ = s.Respond(&message.Response{Status: 403}, true)
		}, "HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"},
		{"CONNECT", "CONNECT a:1 HTTP/1.1\r\n" + host + "\r\nraw", func(s message.ServerStream) {
			_ = s.Respond(&message.Response{Status: 200, Length: message.Unknown}, false)
			b, _ := io.ReadAll(s)
			_, _ = s.Write(b)
			_ = s.End(nil)
		}, "HTTP/1.1 200 OK\r\n\r\nraw"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := converse(t, listen(t, &ServerConfig{}, c.handle), c.sent); got != c.want {
				t.Errorf("\n got %q\nwant %q", got, c.want)
			}
		})
	}
}

func TestCallerGoesAway(t *testing.T) {
	gone := make(chan error, 1)
	addr := listen(t, &ServerConfig{}, func(s message.ServerStream) {
		left := make(chan struct{})
		s.OnAbort(func(err error) { gone <- err; close(left) })
		<-left
	})
	c, err := net.Dial("tcp", addr)
	must(t, err)
	_, err = io.WriteString(c, "GET / HTTP/1.1\r\n"+host+"\r\n")
	must(t, err)
	time.AfterFunc(2*watchAfter, func() { _ = c.Close() })
	select {
	case <-gone:
	case <-time.After(10 * time.Second):
		t.Fatal("nobody noticed")
	}
}

// A handler that takes its time, and the next request that comes meanwhile.
func TestSlowHandlerAndTheNextRequest(t *testing.T) {
	addr := listen(t, &ServerConfig{}, func(s message.ServerStream) {
		s.OnAbort(func(err error) { t.Error("aborted:", err) })
		time.Sleep(3 * watchAfter)
		s.OnAbort(nil)
		facts(s)
	})
	c, err := net.Dial("tcp", addr)
	must(t, err)
	defer c.Close()
	br := bufio.NewReader(c)
	for i := range 3 {
		_, err = fmt.Fprintf(c, "GET /%d HTTP/1.1\r\n%s\r\n", i, host)
		must(t, err)
		if i == 1 { // the third comes while the second is served
			time.Sleep(2 * watchAfter)
			continue
		}
		for j := max(0, i-1); j <= i; j++ {
			resp, err := http.ReadResponse(br, nil)
			must(t, err)
			b, err := io.ReadAll(resp.Body)
			if err != nil || !strings.Contains(string(b), fmt.Sprintf("/%d ", j)) {
				t.Errorf("%d: %q %v", j, b, err)
			}
		}
	}
}

func TestTimeoutsAndShutdown(t *testing.T) {
	if got := converse2(t, listen(t, &ServerConfig{HeadTimeout: 50 * time.Millisecond}, facts), "GET / HT"); !strings.HasPrefix(got, "HTTP/1.1 408") {
		t.Errorf("a slow head: %q", got)
	}
	if got := converse2(t, listen(t, &ServerConfig{IdleTimeout: 50 * time.Millisecond}, facts), ""); got != "" {
		t.Errorf("an idle connection: %q", got)
	}
	a, b := net.Pipe()
	sc := NewServerConn(b, &ServerConfig{}, facts)
	ended := make(chan error, 1)
	go func() { ended <- sc.Serve() }()
	time.Sleep(10 * time.Millisecond)
	sc.Shutdown()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	_ = a.Close()
}

// converse2 does not end its side.
func converse2(t *testing.T, addr, sent string) string {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	must(t, err)
	defer c.Close()
	_, err = io.WriteString(c, sent)
	must(t, err)
	_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
	b, err := io.ReadAll(c)
	must(t, err)
	return string(b)
}

func TestStockClient(t *testing.T) {
	addr := listen(t, &ServerConfig{}, func(s message.ServerStream) {
		_ = s.Respond(&message.Response{Status: 200, Length: s.Request().Length}, false)
		buf := make([]byte, 32<<10)
		for {
			n, err := s.Read(buf)
			if _, werr := s.Write(buf[:n]); werr != nil {
				return
			}
			if err != nil {
				if errors.Is(err, io.EOF) {
					_ = s.End(s.Trailers())
				}
				return
			}
		}
	})
	var all sync.WaitGroup
	for i := range 20 {
		all.Go(func() {
			for _, known := range []bool{true, false} {
				body := bytes.Repeat([]byte{byte(i)}, i*50_000)
				var r io.Reader = bytes.NewReader(body)
				if !known {
					r = io.MultiReader(r)
				}
				resp, err := http.Post("http://"+addr+"/", "application/octet-stream", r)
				if err != nil {
					t.Error(err)
					return
				}
				got, err := io.ReadAll(resp.Body)
				_ = resp.Body.Close()
				if err != nil || !bytes.Equal(got, body) {
					t.Errorf("%d: %d of %d bytes, %v", i, len(got), len(body), err)
				}
			}
		})
	}
	all.Wait()
	http.DefaultClient.CloseIdleConnections()
}

func TestHTTP2IsHandedOver(t *testing.T) {
	got := make(chan string, 1)
	cfg := &ServerConfig{HTTP2: func(c net.Conn) {
		b := make([]byte, len(preface)+4)
		_, _ = io.ReadFull(c, b)
		got <- string(b)
	}}
	converse(t, listen(t, cfg, facts), preface+"more")
	if g := <-got; g != preface+"more" {
		t.Errorf("%q", g)
	}
	if got := converse(t, listen(t, &ServerConfig{}, facts), preface); !strings.HasPrefix(got, "HTTP/1.1 505") {
		t.Errorf("without HTTP/2: %q", got)
	}
}
