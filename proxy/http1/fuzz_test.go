package http1

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/hanse-mesh/hanse/proxy/message"
)

// reading is what a codec makes of a message: enough to tell whether two agree on what is in it and where the next begins.
type reading struct {
	what, authority, body string
	rest                  int
}

// ours reads one request, as ServerConn does.
func ours(b []byte) (r reading, req message.Request, err error) {
	b = bytes.Clone(b)
	n := headEnd(b, 0)
	if n == 0 {
		return r, req, io.ErrUnexpectedEOF
	}
	var h head
	if e := parseRequest(b[:n], &req, &h, 200); e != nil {
		return r, req, e
	}
	body, rest, err := ourBody(b[n:], &h, true)
	return reading{req.Method + " " + req.Path, req.Authority, body, rest}, req, err
}

func ourBody(b []byte, h *head, request bool) (string, int, error) {
	if !h.chunked {
		if int64(len(b)) < h.length {
			return "", 0, io.ErrUnexpectedEOF
		}
		return string(b[:h.length]), len(b) - int(h.length), nil
	}
	c := chunks{request: request, maxHead: 64 << 10, maxFields: 200}
	var body bytes.Buffer
	for !c.done {
		data, n, e := c.next(b)
		if e != nil {
			return "", 0, e
		}
		if n == 0 {
			return "", 0, io.ErrUnexpectedEOF
		}
		body.Write(data)
		b = b[n:]
	}
	return body.String(), len(b), nil
}

// What we accept, net/http must read in the same way: no byte of one's body may be another's request.
func FuzzRequestAgainstNetHTTP(f *testing.F) {
	for _, s := range []string{
		"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
		"POST /x?y HTTP/1.1\r\nHost: a:1\r\nContent-Length: 5\r\n\r\nhelloGET / HTTP/1.1\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX: y\r\n\r\nrest",
		"GET http://a/b HTTP/1.1\r\nHost: a\r\n\r\n", "CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n", "OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: a\r\nContent-Length : 5\r\n\r\nhello", "GET / HTTP/1.0\r\n\r\n", "GET / HTTP/1.1\r\nHost: a\r\nX: a\r\n b\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		got, req, err := ours(b)
		if err != nil {
			return
		}
		src := bytes.NewReader(b)
		br := bufio.NewReader(src)
		theirs, err := http.ReadRequest(br)
		if err != nil {
			// Where they are stricter in matters that do not frame, nothing can be smuggled: they answer 400.
			return
		}
		body, err := io.ReadAll(theirs.Body)
		if err != nil {
			if req.Method == "CONNECT" {
				return
			}
			t.Fatalf("we read a whole message, net/http: %v\n%q", err, b)
		}
		if theirs.Header.Get("Transfer-Encoding") != "" {
			t.Fatalf("net/http knows a transfer coding that we do not: %q", b)
		}
		rest := br.Buffered() + src.Len()
		path := theirs.URL.RequestURI()
		if theirs.Method != "CONNECT" && theirs.URL.Opaque == "" && theirs.RequestURI[0] == '/' {
			path = theirs.RequestURI
		}
		if req.Method == "CONNECT" {
			path = ""
		}
		want := reading{theirs.Method + " " + path, theirs.Host, string(body), rest}
		if got.body != want.body || got.rest != want.rest || !strings.HasPrefix(got.what, theirs.Method+" ") {
			t.Fatalf("we read %+v\nnet/http %+v\n%q", got, want, b)
		}
		if req.Method != "CONNECT" && !strings.EqualFold(got.authority, want.authority) {
			t.Fatalf("we call %q, net/http %q\n%q", got.authority, want.authority, b)
		}
		if req.Method != "CONNECT" && theirs.RequestURI[0] == '/' && got.what != want.what {
			t.Fatalf("we read %q, net/http %q", got.what, want.what)
		}
	})
}

func FuzzResponseAgainstNetHTTP(f *testing.F) {
	for _, s := range []string{
		"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhiHTTP/1.1 200 OK\r\n\r\n", "HTTP/1.1 204 No Content\r\n\r\n",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nX: y\r\n\r\n", "HTTP/1.0 200\r\n\r\nall", "HTTP/1.1 304 X\r\nContent-Length: 5\r\n\r\n",
		"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		mine := bytes.Clone(b)
		n := headEnd(mine, 0)
		if n == 0 {
			return
		}
		var r message.Response
		var h head
		if parseResponse(mine[:n], &r, &h, 500) != nil || r.Status < 200 || r.Status == 204 || r.Status == 304 {
			return
		}
		if !h.chunked && !h.hasLength {
			return
		}
		body, rest, err := ourBody(mine[n:], &h, false)
		if err != nil {
			return
		}
		src := bytes.NewReader(b)
		br := bufio.NewReader(src)
		theirs, err := http.ReadResponse(br, nil)
		if err != nil {
			return
		}
		got, err := io.ReadAll(theirs.Body)
		if err != nil {
			t.Fatalf("we read a whole message, net/http: %v\n%q", err, b)
		}
		if string(got) != body || theirs.StatusCode != r.Status || br.Buffered()+src.Len() != rest {
			t.Fatalf("we read %d %q and %d more, net/http %d %q and %d more\n%q", r.Status, body, rest, theirs.StatusCode, got, br.Buffered()+src.Len(), b)
		}
	})
}

// What we write, net/http reads as it was meant.
func FuzzWrittenRequest(f *testing.F) {
	f.Add("GET", "/a?b", "x-y", "value", []byte("body"))
	f.Fuzz(func(t *testing.T, method, path, name, value string, body []byte) {
		raw := method + " " + path + " HTTP/1.1\r\nhost: a\r\n" + name + ": " + value + "\r\n\r\n"
		_, req, err := ours([]byte(raw))
		if err != nil || req.Method == "CONNECT" || req.Protocol != "" {
			return
		}
		req.Length = int64(len(body))
		cc := &clientConn{}
		s := &clientStream{cc: cc, request: &req, left: message.Unknown}
		s.writeHead(false)
		if len(body) > 0 && len(body) < flushAt/2 {
			must(t, cc.write(body, s.chunk))
		} else {
			body = nil
		}
		theirs, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(cc.out)))
		if err != nil {
			if strings.Contains(err.Error(), "malformed") || strings.Contains(err.Error(), "invalid") {
				return // they refuse what we pass on: stricter, and nothing is smuggled
			}
			if errors.Is(err, io.ErrUnexpectedEOF) {
				t.Fatalf("net/http waits for more: %q", cc.out)
			}
			return
		}
		got, err := io.ReadAll(theirs.Body)
		if len(body) > 0 && (err != nil || !bytes.Equal(got, body)) || theirs.Host != "a" && theirs.Host != req.Authority {
			t.Fatalf("%q: %v\n%q", got, err, cc.out)
		}
	})
}

func FuzzChunks(f *testing.F) {
	f.Add([]byte("5\r\nhello\r\n0\r\n\r\n"), 3)
	f.Fuzz(func(t *testing.T, b []byte, cut int) {
		// The same bytes give the same body, in whatever pieces they come.
		whole, rest, err := ourBody(b, &head{chunked: true}, true)
		if err != nil {
			return
		}
		c := chunks{request: true, maxHead: 64 << 10, maxFields: 200}
		var body bytes.Buffer
		step := 1 + max(cut, -cut)%7
		have, at := []byte(nil), 0
		for !c.done {
			data, n, e := c.next(have)
			if e != nil {
				t.Fatalf("in pieces: %v", e)
			}
			body.Write(data)
			have = have[n:]
			if n == 0 {
				if at == len(b) {
					t.Fatal("in pieces: no end")
				}
				next := min(len(b), at+step)
				have = append(bytes.Clone(have), b[at:next]...)
				at = next
			}
		}
		if body.String() != whole || len(have)+len(b)-at != rest {
			t.Fatalf("in pieces %q and %d, whole %q and %d", body.String(), len(have)+len(b)-at, whole, rest)
		}
	})
}
