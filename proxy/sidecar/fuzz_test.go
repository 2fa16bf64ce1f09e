package sidecar_test

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	xhttp2 "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/proxy"
	"github.com/hanse-mesh/hanse/proxy/proxytest"
	"github.com/hanse-mesh/hanse/proxy/sidecar"
)

// seen is a request as net/http reads it.
type seen struct {
	method, target, host, body string
	header                     http.Header
}

func (s seen) String() string { return fmt.Sprintf("%s %s %s %q", s.method, s.target, s.host, s.body) }

// readAs reads the next whole request.
func readAs(br *bufio.Reader) (seen, error) {
	r, err := http.ReadRequest(br)
	if err != nil {
		return seen{}, err
	}
	body, err := io.ReadAll(r.Body)
	target := r.RequestURI
	if r.URL.Host != "" {
		target = r.URL.RequestURI()
	}
	return seen{r.Method, target, r.Host, string(body), r.Header}, err
}

// recorder is an application on net/http's reading of the wire, which remembers every request that it takes for one.
type recorder struct {
	mu  sync.Mutex
	got []seen // guarded by mu
}

func (r *recorder) take() []seen {
	r.mu.Lock()
	defer r.mu.Unlock()
	got := r.got
	r.got = nil
	return got
}

func (r *recorder) listen(t testing.TB) string {
	ln, err := net.Listen("unix", filepath.Join(t.TempDir(), "app.sock"))
	if err != nil {
		t.Fatal(err)
	}
	accept(t, ln, func(c net.Conn) {
		for br := bufio.NewReader(c); ; {
			s, err := readAs(br)
			if err != nil {
				return
			}
			r.mu.Lock()
			r.got = append(r.got, s)
			r.mu.Unlock()
			if _, err := io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"); err != nil {
				return
			}
		}
	})
	return "unix:" + ln.Addr().String()
}

// chain is two sidecars before a recorder.
func chain(t testing.TB) (*recorder, *proxytest.Domain, *node, *node) {
	west := proxytest.NewDomain(t, "west.test")
	r := &recorder{}
	address := r.listen(t)
	pay := start(t, west.Source("/ns/shop/sa/payments"), func(c *sidecar.Config) { c.Apps[8080] = address })
	pay.serves(proxy.HTTP, authority)
	front := start(t, west.Source("/ns/shop/sa/frontend"))
	front.calls(proxy.HTTP, authority, []*proxy.Endpoint{pay.endpoint("e1")})
	return r, west, front, pay
}

// FuzzBytesThroughSidecars: of any bytes that a caller sends, the application sees no request that net/http, reading these bytes, would
// not see at the same place: nothing is smuggled.
func FuzzBytesThroughSidecars(f *testing.F) {
	const host = "Host: payments.shop:8080\r\n"
	for _, s := range []string{
		"GET /a HTTP/1.1\r\n" + host + "\r\nGET /b HTTP/1.1\r\n" + host + "\r\n",
		"POST /a HTTP/1.1\r\n" + host + "Content-Length: 5\r\n\r\nhelloGET /b HTTP/1.1\r\n" + host + "\r\n",
		"POST /a HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX: y\r\n\r\nGET /b HTTP/1.1\r\n" + host + "\r\n",
		"POST /a HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\nGET /b HTTP/1.1\r\n" + host + "\r\n",
		"GET http://payments.shop:8080/a HTTP/1.1\r\n" + host + "\r\n", "HEAD /a HTTP/1.0\r\n" + host + "\r\n",
		"GET /a HTTP/1.1\r\n" + host + "Connection: upgrade\r\nUpgrade: x\r\n\r\nGET /b HTTP/1.1\r\n" + host + "\r\n",
		"PUT /a HTTP/1.1\r\n" + host + "Expect: 100-continue\r\nContent-Length: 2\r\n\r\nhi", "OPTIONS * HTTP/1.1\r\n" + host + "\r\n",
		"GET /a HTTP/1.1\r\n" + host + "X: a\r\n b: c\r\n\r\n", "GET /a HTTP/1.1\r\n" + host + "Connection: x-y, close\r\nX-Y: 1\r\n\r\nGET /b HTTP/1.1\r\n" + host + "\r\n",
	} {
		f.Add([]byte(s))
	}
	app, _, front, _ := chain(f)
	var before []byte // the application may see the last of it late, when its caller has gone
	f.Fuzz(func(t *testing.T, b []byte) {
		if bytes.HasPrefix(b, []byte("PRI * HTTP/2")) {
			return // another language
		}
		c, err := net.Dial("tcp", front.outbound)
		if err != nil {
			t.Fatal(err)
		}
		_ = c.(*net.TCPConn).SetLinger(0) // thousands a second: no time to wait for ports
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		go func() { _, _ = c.Write(b); _ = c.(*net.TCPConn).CloseWrite() }()
		if _, err := io.Copy(io.Discard, c); err != nil && strings.Contains(err.Error(), "timeout") {
			t.Fatalf("no end within 10 s: %q", b)
		}
		got := app.take()
		var wants []seen
		for _, sent := range [][]byte{before, b} {
			for br := bufio.NewReader(bytes.NewReader(sent)); ; {
				want, err := readAs(br)
				if err != nil {
					break
				}
				wants = append(wants, want)
			}
		}
		for _, want := range wants {
			if len(got) > 0 && got[0].String() == want.String() {
				got = got[1:]
			}
		}
		if len(got) > 0 {
			t.Fatalf("the application saw %v, which net/http does not see in %q", got, b)
		}
		before = bytes.Clone(b)
	})
}

// peerConn writes HTTP/2 that no decent client would.
type peerConn struct {
	net.Conn
	fr   *xhttp2.Framer
	buf  bytes.Buffer
	enc  *hpack.Encoder
	next uint32
}

func newPeerConn(c net.Conn) (*peerConn, error) {
	p := &peerConn{Conn: c, fr: xhttp2.NewFramer(c, c), next: 1}
	p.enc = hpack.NewEncoder(&p.buf)
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.WriteString(c, xhttp2.ClientPreface); err != nil {
		return nil, err
	}
	return p, p.fr.WriteSettings()
}

// ask sends one request and waits for whatever ends it. It is false if the connection has ended, too.
func (p *peerConn) ask(body []byte, fields ...string) bool {
	_ = p.SetDeadline(time.Now().Add(10 * time.Second))
	id := p.next
	p.next += 2
	p.buf.Reset()
	for i := 0; i < len(fields); i += 2 {
		_ = p.enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1], Sensitive: true})
	}
	if p.fr.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: id, BlockFragment: p.buf.Bytes(), EndHeaders: true, EndStream: len(body) == 0}) != nil {
		return false
	}
	if len(body) > 0 && p.fr.WriteData(id, true, body) != nil {
		return false
	}
	for {
		f, err := p.fr.ReadFrame()
		if err != nil {
			return false
		}
		switch f := f.(type) {
		case *xhttp2.SettingsFrame:
			if !f.IsAck() {
				_ = p.fr.WriteSettingsAck()
			}
		case *xhttp2.PingFrame:
			if !f.IsAck() {
				_ = p.fr.WritePing(true, f.Data)
			}
		case *xhttp2.GoAwayFrame:
			return false
		case *xhttp2.DataFrame:
			_ = p.fr.WriteWindowUpdate(0, max(1, f.Length))
		}
		if f.Header().StreamID == id {
			if _, reset := f.(*xhttp2.RSTStreamFrame); reset || f.Header().Flags.Has(xhttp2.FlagDataEndStream) {
				return p.next < 1<<30
			}
		}
	}
}

// FuzzFieldsThroughSidecars: whatever an application, or a peer with an SVID, puts into the fields of one HTTP/2 request, an application of HTTP/1.1
// sees that request or none, with the same body.
func FuzzFieldsThroughSidecars(f *testing.F) {
	for _, s := range [][5]string{
		{"GET", "/a", "payments.shop:8080", "x-y", "z"}, {"GET", "/a HTTP/1.1\r\nHost: b\r\n\r\nGET /b", "payments.shop:8080", "x-y", "z"},
		{"GET\r\n", "/a", "payments.shop:8080", "x-y", "z"}, {"POST", "/a", "payments.shop:8080", "content-length", "5"},
		{"POST", "/a", "payments.shop:8080", "transfer-encoding", "chunked"}, {"POST", "/a", "payments.shop:8080", "x-y", "z\r\ntransfer-encoding: chunked"},
		{"POST", "/a", "payments.shop:8080", "x-y: z\r\ncontent-length", "0"}, {"GET", "/a", "payments.shop:8080\r\nx: y", "host", "evil"},
		{"GET", "/a", "payments.shop:8080", "connection", "keep-alive"}, {"GET", "/a", "payments.shop:8080", "hanse-target", authority},
		{"GET", "/a", "payments.shop:8080", "expect", "100-continue"}, {"GET", "/a", "payments.shop:8080", "te", "trailers"}, {"OPTIONS", "*", "payments.shop:8080", "cookie", "a=b"},
	} {
		for _, peer := range []bool{false, true} {
			f.Add(s[0], s[1], s[2], s[3], s[4], []byte("hello"), peer)
			f.Add(s[0], s[1], s[2], s[3], s[4], []byte(nil), peer)
		}
	}
	app, west, front, pay := chain(f)
	caller := west.Source("/ns/shop/sa/frontend")
	var conns [2]*peerConn
	f.Fuzz(func(t *testing.T, method, path, host, name, value string, body []byte, peer bool) {
		if len(body) > 16<<10 {
			return
		}
		at := 0
		if peer {
			at = 1
		}
		if conns[at] == nil {
			address := front.outbound
			if peer {
				address = pay.hop.String()
			}
			c, err := net.Dial("tcp", address)
			if err == nil && peer {
				_ = c.SetDeadline(time.Now().Add(10 * time.Second))
				c = tls.Client(c, identity.ClientTLS(caller, identity.AuthorizeAny(), "h2"))
			}
			if err == nil {
				conns[at], err = newPeerConn(c)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		fields := []string{":method", method, ":scheme", "http", ":authority", host, ":path", path, name, value}
		if peer && name != "hanse-target" {
			fields = append(fields, "hanse-target", authority)
		}
		began := time.Now()
		if !conns[at].ask(body, fields...) {
			_ = conns[at].Close()
			conns[at] = nil
		}
		if took := time.Since(began); took > 9*time.Second {
			t.Fatalf("no answer within %s", took)
		}
		for i, got := range app.take() {
			want := seen{method, path, host, string(body), nil}
			if peer && got.host != host { // the target decides, whatever the authority
				t.Fatalf("the application was told another host: %v, asked %v", got, want)
			}
			if i > 0 || got.method != method || got.body != string(body) || got.target != path {
				t.Fatalf("the application saw %v (%d), asked was %v with %q: %q", got, i, want, name, value)
			}
			for own := range got.header {
				if strings.HasPrefix(own, "Hanse-") {
					t.Fatalf("the application was told %s", own)
				}
			}
		}
	})
}
