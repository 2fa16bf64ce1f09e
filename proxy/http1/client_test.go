package http1

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hanse-mesh/hanse/proxy/message"
)

func client(t testing.TB, addr string) (*Client, *atomic.Int32) {
	var dials atomic.Int32
	c := NewClient(ClientConfig{Dial: func(ctx context.Context) (net.Conn, error) {
		dials.Add(1)
		return (&net.Dialer{}).DialContext(ctx, "tcp", addr)
	}})
	t.Cleanup(c.Close)
	return c, &dials
}

func get(path string) *message.Request {
	return &message.Request{Method: "GET", Scheme: "http", Authority: "app.test", Path: path}
}

type answer struct {
	status   int
	length   int64
	fields   message.Fields
	body     string
	trailers message.Fields
}

func do(c *Client, r *message.Request, body []byte, trailers message.Fields) (a answer, err error) {
	s, err := c.Open(context.Background(), r, message.Options{End: body == nil})
	if err != nil {
		return a, err
	}
	defer s.Close()
	sent := make(chan error, 1)
	if body == nil {
		sent <- nil
	} else {
		go func() {
			_, err := s.Write(body)
			if err == nil {
				err = s.End(trailers)
			}
			sent <- err
		}()
	}
	resp, err := s.Response()
	if err != nil {
		return a, err
	}
	a.status, a.length, a.fields = resp.Status, resp.Length, resp.Fields
	b, err := io.ReadAll(s)
	a.body, a.trailers = string(b), s.Trailers()
	return a, errors.Join(err, <-sent)
}

func TestStockServer(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Length", strconv.FormatInt(r.ContentLength, 10))
		w.Header().Set("X-Cookie", r.Header.Get("Cookie"))
		if r.URL.Path == "/trailers" {
			w.Header().Set("Trailer", "X-Sum")
		}
		if r.URL.Path == "/hints" {
			w.Header().Set("Link", "</x>")
			w.WriteHeader(103)
		}
		b, _ := io.ReadAll(r.Body)
		_, _ = w.Write(b)
		w.Header().Set("X-Sum", r.Trailer.Get("X-Sum"))
	}))
	defer srv.Close()
	c, dials := client(t, srv.Listener.Addr().String())
	for range 3 {
		a, err := do(c, get("/"), nil, nil)
		if err != nil || a.status != 200 || a.length != 0 {
			t.Errorf("GET: %+v %v", a, err)
		}
		for _, known := range []bool{true, false} {
			body := bytes.Repeat([]byte("x"), 200_000)
			r := get("/trailers")
			r.Method, r.Length, r.Fields = "POST", int64(len(body)), message.Fields{{Name: "cookie", Value: "a=1"}, {Name: "cookie", Value: "b=2"}, {Name: "trailer", Value: "x-sum"}}
			if !known {
				r.Length = message.Unknown
			}
			a, err := do(c, r, body, message.Fields{{Name: "x-sum", Value: "7"}})
			if err != nil || a.body != string(body) || a.fields.Value("x-cookie") != "a=1; b=2" || !known && a.trailers.Value("x-sum") != "7" {
				t.Errorf("POST %v: %d bytes %v %v %v", known, len(a.body), a.fields, a.trailers, err)
			}
		}
		head := get("/")
		head.Method = "HEAD"
		if a, err := do(c, head, nil, nil); err != nil || a.body != "" {
			t.Errorf("HEAD: %+v %v", a, err)
		}
		hints := 0
		s, err := c.Open(t.Context(), get("/hints"), message.Options{End: true, Inform: func(status int, _ message.Fields) { hints += status }})
		must(t, err)
		if _, err := s.Response(); err != nil || hints != 103 {
			t.Errorf("hints: %d %v", hints, err)
		}
		_, _ = io.Copy(io.Discard, s)
		s.Close()
	}
	if n := dials.Load(); n != 1 {
		t.Errorf("%d connections for one exchange at a time", n)
	}
}

// script answers each connection's requests by what the script says, once a head has come.
func script(t *testing.T, answers ...string) (*Client, *atomic.Int32) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	t.Cleanup(func() { _ = ln.Close() })
	var mu sync.Mutex
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				br := bufio.NewReader(c)
				for {
					for {
						line, err := br.ReadString('\n')
						if err != nil {
							return
						}
						if line == "\r\n" {
							break
						}
					}
					mu.Lock()
					if len(answers) == 0 {
						mu.Unlock()
						return
					}
					a := answers[0]
					answers = answers[1:]
					mu.Unlock()
					if a == "" {
						return
					}
					_, _ = io.WriteString(c, strings.TrimSuffix(a, "$"))
					if strings.HasSuffix(a, "$") {
						return
					}
				}
			}()
		}
	}()
	return client(t, ln.Addr().String())
}

func TestAnswersOfAllKinds(t *testing.T) {
	const ok = "HTTP/1.1 200 OK\r\n"
	for _, c := range []struct {
		name, answer string
		want         string // status, body, how it ended
		dials        int32  // for two exchanges
	}{
		{"fixed", ok + "Content-Length: 2\r\n\r\nhi", "200 2 hi", 1},
		{"chunked", ok + "Transfer-Encoding: chunked\r\n\r\n2;x=y\r\nhi\r\n0\r\nA: b\r\n\r\n", "200 -1 hi a=b", 1},
		{"until close", ok + "\r\nhi$", "200 -1 hi", 2},
		{"close", ok + "Connection: close\r\nContent-Length: 2\r\n\r\nhi", "200 2 hi", 2},
		{"HTTP/1.0", "HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nhi", "200 2 hi", 2},
		{"HTTP/1.0 kept", "HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nhi", "200 2 hi", 1},
		{"100 first", "HTTP/1.1 100 Continue\r\n\r\n" + ok + "Content-Length: 2\r\n\r\nhi", "200 2 hi", 1},
		{"surplus bytes", ok + "Content-Length: 2\r\n\r\nhiHTTP/1.1 500 Evil\r\n\r\n", "200 2 hi", 2},
		{"204", "HTTP/1.1 204 No Content\r\n\r\n", "204 0 ", 1},
		{"304 with length", "HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n", "304 9 ", 1},
		{"no reason", "HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", "200 0 ", 1},
		{"cut short", ok + "Content-Length: 5\r\n\r\nhi$", "200 5 hi unexpected EOF", 2},
		{"chunked cut short", ok + "Transfer-Encoding: chunked\r\n\r\n5\r\nhi$", "200 -1 hi unexpected EOF", 2},
		{"bad chunk", ok + "Transfer-Encoding: chunked\r\n\r\nx\r\nhi$", "200 -1  http1: chunk_size (400)", 2},
		{"both", ok + "Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\nhi$", "http1: length_and_chunked (400)", 2},
		{"two lengths", ok + "Content-Length: 2\r\nContent-Length: 3\r\n\r\nhi$", "http1: two_lengths (400)", 2},
		{"no HTTP", "SSH-2.0-x\r\n\r\n$", "http1: status_line (400)", 2},
		{"HTTP/2", "HTTP/2 200\r\n\r\n$", "http1: status_line (400)", 2},
		{"status", "HTTP/1.1 20x OK\r\n\r\n$", "http1: status_line (400)", 2},
		{"bare LF", "HTTP/1.1 200 OK\nContent-Length: 2\r\n\r\nhi$", "http1: status_line (400)", 2},
		{"folded", ok + "X: a\r\n b\r\nContent-Length: 2\r\n\r\nhi$", "http1: folded_line (400)", 2},
		{"space before colon", ok + "Content-Length : 2\r\n\r\nhi$", "http1: space_before_colon (400)", 2},
		{"101 unasked", "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n", "http1: switched_unasked (400)", 2},
		{"nothing", "", "unexpected EOF", 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			cl, dials := script(t, c.answer, c.answer)
			for range 2 {
				a, err := do(cl, get("/"), nil, nil)
				got := fmt.Sprintf("%d %d %s", a.status, a.length, a.body)
				for _, f := range a.trailers {
					got += " " + f.Name + "=" + f.Value
				}
				switch {
				case a.status == 0 && err != nil:
					got = err.Error()
				case err != nil:
					got += " " + err.Error()
				}
				if got != c.want {
					t.Errorf("got %q, want %q", got, c.want)
				}
				if err != nil && !message.Sent(err) {
					t.Error("the request was sent")
				}
				time.Sleep(2 * trusted)
			}
			if n := dials.Load(); n != c.dials {
				t.Errorf("%d connections, want %d", n, c.dials)
			}
		})
	}
}

// A connection that its peer closes as it is used again costs nothing; a request with a body is not sent twice.
func TestStaleConnection(t *testing.T) {
	const ok = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"
	c, dials := script(t, ok, "", ok) // closes at the second request, without a word
	for range 2 {
		if a, err := do(c, get("/"), nil, nil); err != nil || a.body != "hi" {
			t.Errorf("%+v %v", a, err)
		}
	}
	if n := dials.Load(); n != 2 {
		t.Errorf("%d connections", n)
	}
	c, _ = script(t, ok, "", ok)
	if _, err := do(c, get("/"), nil, nil); err != nil {
		t.Fatal(err)
	}
	r := get("/")
	r.Method, r.Length = "POST", 1
	if _, err := do(c, r, []byte("x"), nil); err == nil || !message.Sent(err) {
		t.Errorf("a POST on a dead connection: %v", err)
	}
}

func TestDialFailure(t *testing.T) {
	c := NewClient(ClientConfig{Dial: func(context.Context) (net.Conn, error) { return nil, errors.New("refused") }})
	if _, err := c.Open(t.Context(), get("/"), message.Options{End: true}); err == nil || message.Sent(err) {
		t.Errorf("%v", err)
	}
}

func TestCancel(t *testing.T) {
	c, _ := script(t, "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhi")
	s, err := c.Open(t.Context(), get("/"), message.Options{End: true})
	must(t, err)
	defer s.Close()
	if _, err := s.Response(); err != nil {
		t.Fatal(err)
	}
	mine := errors.New("enough")
	time.AfterFunc(10*time.Millisecond, func() { s.Cancel(mine) })
	if _, err := io.ReadAll(s); !errors.Is(err, mine) {
		t.Errorf("%v", err)
	}
}

func TestUpgrades(t *testing.T) {
	addr := listen(t, &ServerConfig{}, func(s message.ServerStream) {
		if s.Request().Protocol != "websocket" {
			_ = s.Respond(&message.Response{Status: 400}, true)
			return
		}
		_ = s.Respond(&message.Response{Status: 101}, false)
		b, _ := io.ReadAll(s)
		_, _ = s.Write(b)
		_ = s.End(nil)
	})
	c, _ := client(t, addr)
	r := get("/ws")
	r.Protocol, r.Length = "websocket", message.Unknown
	s, err := c.Open(t.Context(), r, message.Options{})
	must(t, err)
	defer s.Close()
	resp, err := s.Response()
	must(t, err)
	if resp.Status != 101 {
		t.Fatalf("%+v", resp)
	}
	_, err = s.Write([]byte("hello"))
	must(t, errors.Join(err, s.Flush(), s.End(nil)))
	if b, err := io.ReadAll(s); err != nil || string(b) != "hello" {
		t.Errorf("%q %v", b, err)
	}
}

func TestIdleConnectionsClose(t *testing.T) {
	const ok = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
	c, _ := script(t, ok)
	c.cfg.IdleTimeout = 20 * time.Millisecond
	if _, err := do(c, get("/"), nil, nil); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		c.mu.Lock()
		n := len(c.idle)
		c.mu.Unlock()
		if n == 0 {
			return
		}
		if time.Now().After(end) {
			t.Fatal("still idle")
		}
	}
}

func BenchmarkServer(b *testing.B) {
	text := message.Fields{{Name: "content-type", Value: "text/plain"}}
	body := make([]byte, 100)
	addr := listen(b, &ServerConfig{}, func(s message.ServerStream) {
		_ = s.Respond(&message.Response{Status: 200, Fields: text, Length: 100}, false)
		_, _ = s.Write(body)
		_ = s.End(nil)
	})
	c, err := net.Dial("tcp", addr)
	must(b, err)
	defer c.Close()
	req := []byte("GET /path HTTP/1.1\r\nHost: app.test\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n")
	buf := make([]byte, 4096)
	b.ReportAllocs()
	for b.Loop() {
		_, err := c.Write(req)
		must(b, err)
		_, err = c.Read(buf)
		must(b, err)
	}
}

func BenchmarkParse(b *testing.B) {
	req := []byte("GET /path HTTP/1.1\r\nHost: app.test\r\nUser-Agent: bench\r\nAccept: */*\r\nX-Request-Id: 0123456789\r\n\r\n")
	var r message.Request
	var h head
	buf := make([]byte, len(req))
	b.ReportAllocs()
	for b.Loop() {
		copy(buf, req)
		if n := headEnd(buf, 0); n != len(req) {
			b.Fatal(n)
		}
		if e := parseRequest(buf, &r, &h, 200); e != nil {
			b.Fatal(e)
		}
	}
}
