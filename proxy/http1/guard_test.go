package http1

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
)

// verdict feeds s whole and byte by byte, which must agree.
func verdict(t *testing.T, s string) (good int, err error) {
	t.Helper()
	var whole, single framing
	good, err = whole.feed([]byte(s))
	for i := range len(s) {
		if _, singleErr := single.feed([]byte{s[i]}); singleErr != nil {
			if err == nil {
				t.Fatalf("%q: only byte by byte refused: %v", s, singleErr)
			}
			return good, err
		}
	}
	if err != nil {
		t.Fatalf("%q: only as a whole refused: %v", s, err)
	}
	if whole.state != single.state || whole.requests != single.requests {
		t.Fatalf("%q: states differ", s)
	}
	return good, nil
}

func TestAccepted(t *testing.T) {
	for name, tc := range map[string]struct {
		bytes    string
		requests int
		state    state
	}{
		"get":                  {"GET / HTTP/1.1\r\nHost: x\r\n\r\n", 1, requestLine},
		"two in a row":         {"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET /b HTTP/1.1\r\nHost: x\r\n\r\n", 2, requestLine},
		"length":               {"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nab\ncd", 1, requestLine},
		"length 0":             {"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", 1, requestLine},
		"chunked":              {"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5;a=b\r\na\r\nbc\r\n0\r\nX-T: 1\r\n\r\n", 1, requestLine},
		"body looks like more": {"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 18\r\n\r\nGET / HTTP/1.1\r\n\r\n", 1, requestLine},
		"http/1.0":             {"GET / HTTP/1.0\r\n\r\n", 1, requestLine},
		"absolute form":        {"GET http://a.b:80/ HTTP/1.1\r\nHost: a.b\r\n\r\n", 1, requestLine},
		"h2":                   {"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\r\n", 0, passing},
		"connect":              {"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n\x16\x03\n", 0, passing},
		"websocket":            {"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n\x81\n", 0, passing},
		"h2c is not taken":     {"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n", 1, requestLine},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := verdict(t, tc.bytes); err != nil {
				t.Fatal(err)
			}
			var f framing
			_, _ = f.feed([]byte(tc.bytes))
			if f.requests != tc.requests || f.state != tc.state {
				t.Errorf("%d requests, state %d", f.requests, f.state)
			}
		})
	}
}

func TestRefused(t *testing.T) {
	head := "POST / HTTP/1.1\r\nHost: x\r\n"
	for name, s := range map[string]string{
		"length beside chunked":   head + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
		"chunked beside length":   head + "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n",
		"two lengths":             head + "Content-Length: 5\r\nContent-Length: 5\r\n\r\n",
		"list of lengths":         head + "Content-Length: 5, 5\r\n\r\n",
		"signed length":           head + "Content-Length: +5\r\n\r\n",
		"empty length":            head + "Content-Length:\r\n\r\n",
		"huge length":             head + "Content-Length: 99999999999999999999\r\n\r\n",
		"two codings":             head + "Transfer-Encoding: gzip, chunked\r\n\r\n",
		"chunked twice":           head + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
		"other coding":            head + "Transfer-Encoding: xchunked\r\n\r\n",
		"hidden coding":           head + "Transfer-Encoding : chunked\r\n\r\n",
		"vertical tab":            head + "Transfer-Encoding: \x0bchunked\r\n\r\n",
		"chunked in 1.0":          "POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n",
		"folded line":             head + "X: a\r\n b\r\n\r\n",
		"bare LF":                 "GET / HTTP/1.1\nHost: x\n\n",
		"bare CR":                 head + "X: a\rb\r\n\r\n",
		"NUL":                     head + "X: a\x00b\r\n\r\n",
		"no name":                 head + ": a\r\n\r\n",
		"no colon":                head + "X\r\n\r\n",
		"two hosts":               head + "Host: y\r\n\r\n",
		"no host":                 "GET / HTTP/1.1\r\n\r\n",
		"space in target":         "GET /a b HTTP/1.1\r\nHost: x\r\n\r\n",
		"two spaces":              "GET  / HTTP/1.1\r\nHost: x\r\n\r\n",
		"version":                 "GET / HTTP/1.2\r\nHost: x\r\n\r\n",
		"h2 later":                "GET / HTTP/1.1\r\nHost: x\r\n\r\nPRI * HTTP/2.0\r\n\r\n",
		"leading empty line":      "\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n",
		"chunk size 0x":           head + "Transfer-Encoding: chunked\r\n\r\n0x5\r\n",
		"chunk size sign":         head + "Transfer-Encoding: chunked\r\n\r\n+5\r\n",
		"chunk size space":        head + "Transfer-Encoding: chunked\r\n\r\n 5\r\n",
		"chunk size long":         head + "Transfer-Encoding: chunked\r\n\r\n00000000000000005\r\n",
		"chunk size bare LF":      head + "Transfer-Encoding: chunked\r\n\r\n5\nabcde\r\n",
		"chunk too long":          head + "Transfer-Encoding: chunked\r\n\r\n2\r\nabc\r\n",
		"chunk end bare LF":       head + "Transfer-Encoding: chunked\r\n\r\n2\r\nab\n",
		"trailer changes framing": head + "Transfer-Encoding: chunked\r\n\r\n0\r\nContent-Length: 1\r\n\r\n",
		"connect with body":       "CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\nContent-Length: 1\r\n\r\n",
		"endless head":            head + strings.Repeat("X: y\r\n", 20_000),
		"endless line":            head + "X: " + strings.Repeat("y", 70_000),
		"endless trailers":        head + "Transfer-Encoding: chunked\r\n\r\n0\r\n" + strings.Repeat("X: y\r\n", 20_000),
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := verdict(t, s); !errors.Is(err, ErrMalformed) {
				t.Errorf("error %v", err)
			}
		})
	}
}

// FuzzFraming: what the Guard lets through, net/http frames in the same way.
func FuzzFraming(f *testing.F) {
	for _, s := range []string{
		"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET /b HTTP/1.1\r\nHost: x\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nabcdeGET / HTTP/1.0\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5;a=b\r\nabcde\r\n0\r\nX-T: 1\r\n\r\nGET / HTTP/1.0\r\n\r\n",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var fr framing
		if _, err := fr.feed(b); err != nil || fr.state == passing {
			return
		}
		br := bufio.NewReader(bytes.NewReader(b))
		for n := range fr.requests {
			req, err := http.ReadRequest(br)
			if err != nil {
				return // net/http may refuse more than framing
			}
			if _, err := io.Copy(io.Discard, req.Body); err != nil {
				t.Fatalf("request %d of %d: body: %v", n+1, fr.requests, err)
			}
		}
		if fr.state == requestLine && len(fr.line) == 0 && (br.Buffered() > 0) {
			t.Fatalf("net/http leaves %d bytes", br.Buffered())
		}
	})
}
