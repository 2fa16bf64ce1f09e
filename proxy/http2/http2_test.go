//lint:file-ignore SA1019 x/net's own Transport and Server are the stock peers that this engine must get on with.

package http2

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	xhttp2 "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/hanse-mesh/hanse/proxy/message"
)

// pair is a loopback TCP connection.
func pair(t testing.TB) (client, server net.Conn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer ln.Close()
	accepted := make(chan net.Conn, 1)
	go func() {
		c, err := ln.Accept()
		if err != nil {
			c = nil
		}
		accepted <- c
	}()
	client, err = net.Dial("tcp", ln.Addr().String())
	must(t, err)
	if server = <-accepted; server == nil {
		t.Fatal("not accepted")
	}
	t.Cleanup(func() { _ = client.Close(); _ = server.Close() })
	return client, server
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// serve runs a server on conn until the test ends.
func serve(t testing.TB, conn net.Conn, cfg Config, handle func(message.ServerStream)) *ServerConn {
	t.Helper()
	sc := NewServerConn(conn, cfg, handle)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = sc.Serve()
	}()
	t.Cleanup(func() {
		sc.Close(nil)
		select {
		case <-ended:
		case <-time.After(10 * time.Second):
			t.Error("the server's handlers have not ended")
		}
	})
	return sc
}

// both are a client and a server of ours.
func both(t testing.TB, cfg Config, handle func(message.ServerStream)) (*ClientConn, *ServerConn) {
	t.Helper()
	c, s := pair(t)
	sc := serve(t, s, cfg, handle)
	cc := NewClientConn(c, cfg)
	t.Cleanup(func() { cc.Close(nil) })
	return cc, sc
}

func get(path string) *message.Request {
	return &message.Request{Method: "GET", Scheme: "http", Authority: "app.test", Path: path}
}

// echo answers with the request's body, its trailers, and a few of its facts.
func echo(s message.ServerStream) {
	r := s.Request()
	resp := &message.Response{Status: 200, Length: r.Length, Fields: message.Fields{{Name: "x-method", Value: r.Method}, {Name: "x-path", Value: r.Path},
		{Name: "x-authority", Value: r.Authority}, {Name: "x-protocol", Value: r.Protocol}, {Name: "x-cookie", Value: r.Fields.Value("cookie")}}}
	if r.Protocol != "" {
		resp.Status = 101
	}
	if s.Respond(resp, false) != nil {
		return
	}
	buf := make([]byte, 32<<10)
	for {
		if !s.Ready() {
			_ = s.Flush()
		}
		n, err := s.Read(buf)
		if _, werr := s.Write(buf[:n]); werr != nil {
			return
		}
		if errors.Is(err, io.EOF) {
			_ = s.End(s.Trailers())
			return
		}
		if err != nil {
			s.Abort(err)
			return
		}
	}
}

// exchange sends a body and returns the answer to it.
func exchange(cc *ClientConn, r *message.Request, body []byte, trailers message.Fields) (*message.Response, []byte, message.Fields, error) {
	st, err := cc.Open(r, message.Options{End: len(body) == 0 && len(trailers) == 0})
	if err != nil {
		return nil, nil, nil, err
	}
	defer st.Close()
	sent := make(chan error, 1)
	go func() {
		if len(body) == 0 && len(trailers) == 0 {
			sent <- nil
			return
		}
		_, err := st.Write(body)
		sent <- errors.Join(err, st.End(trailers))
	}()
	resp, err := st.Response()
	if err != nil {
		return nil, nil, nil, err
	}
	got, err := io.ReadAll(st)
	return resp, got, st.Trailers(), errors.Join(err, <-sent)
}

func random(n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(n)})
	_, _ = r.Read(b)
	return b
}

func TestMuchToSendIsNoPeerThatDoesNotRead(t *testing.T) {
	cc, sc := both(t, Config{}, echo)
	if err := cc.Ping(t.Context()); err != nil {
		t.Fatal(err)
	}
	for i := range 100 {
		r := get("/")
		r.Fields = message.Fields{{Name: "x-long", Value: fmt.Sprintf("%d%s", i, strings.Repeat("v", 20_000))}}
		st, err := cc.Open(r, message.Options{}) // nothing flushes it yet
		if err != nil {
			t.Fatal(err)
		}
		defer st.Close()
	}
	if err := sc.Ping(t.Context()); err != nil {
		t.Error(err)
	}
	if err := cc.Err(); err != nil {
		t.Error(err)
	}
}

func TestExchanges(t *testing.T) {
	cc, _ := both(t, Config{}, echo)
	var all sync.WaitGroup
	for i := range 64 {
		all.Go(func() {
			for j := range 8 {
				body := random((i * j * 997) % 300_000)
				r := get(fmt.Sprintf("/%d/%d?x=%%2F", i, j))
				r.Method, r.Length = "POST", int64(len(body))
				r.Fields = message.Fields{{Name: "cookie", Value: "a=1"}, {Name: "cookie", Value: "b=2"}, {Name: "x-long", Value: strings.Repeat("v", 20_000)}}
				trailers := message.Fields{{Name: "x-sum", Value: strconv.Itoa(len(body))}}
				resp, got, gotTrailers, err := exchange(cc, r, body, trailers)
				if err != nil {
					t.Errorf("%s: %v", r.Path, err)
					return
				}
				if resp.Status != 200 || !bytes.Equal(got, body) || resp.Fields.Value("x-path") != r.Path || resp.Fields.Value("x-cookie") != "a=1; b=2" ||
					resp.Fields.Value("x-authority") != "app.test" || len(gotTrailers) != 1 || gotTrailers[0] != trailers[0] {
					t.Errorf("%s: %+v, %d of %d bytes, trailers %v", r.Path, resp, len(got), len(body), gotTrailers)
				}
			}
		})
	}
	all.Wait()
	if open, _ := cc.Streams(); open != 0 {
		t.Errorf("%d streams are left", open)
	}
	cc.mu.Lock()
	defer cc.mu.Unlock()
	if cc.buffered != 0 || cc.withheld != 0 || cc.starved != 0 {
		t.Errorf("left: %d buffered, %d withheld, %d starved", cc.buffered, cc.withheld, cc.starved)
	}
}

// The stock client and server of Go on the other side.
func TestStockClient(t *testing.T) {
	c, s := pair(t)
	serve(t, s, Config{}, echo)
	tr := &xhttp2.Transport{AllowHTTP: true, DialTLSContext: func(context.Context, string, string, *tls.Config) (net.Conn, error) { return c, nil }}
	var all sync.WaitGroup
	for i := range 32 {
		all.Go(func() {
			body := random(i * 31_000)
			req, _ := http.NewRequest("PUT", "http://app.test/p?q="+strconv.Itoa(i), io.MultiReader(bytes.NewReader(body)))
			req.Trailer = http.Header{"X-T": {"1"}}
			resp, err := tr.RoundTrip(req)
			if err != nil {
				t.Error(err)
				return
			}
			defer resp.Body.Close()
			got, err := io.ReadAll(resp.Body)
			if err != nil || !bytes.Equal(got, body) || resp.Trailer.Get("X-T") != "1" || resp.Header.Get("X-Path") != "/p?q="+strconv.Itoa(i) {
				t.Errorf("%d: %d of %d bytes, %v %v, %v", i, len(got), len(body), resp.Header, resp.Trailer, err)
			}
		})
	}
	all.Wait()
	tr.CloseIdleConnections()
}

func TestStockServer(t *testing.T) {
	c, s := pair(t)
	go (&xhttp2.Server{}).ServeConn(s, &xhttp2.ServeConnOpts{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/hints" {
			w.Header().Set("Link", "</x>")
			w.WriteHeader(103)
		}
		w.Header().Set("Trailer", "X-T")
		w.Header().Set("X-Length", strconv.FormatInt(r.ContentLength, 10))
		_, _ = io.Copy(w, r.Body)
		w.Header().Set("X-T", r.Trailer.Get("X-T"))
	})})
	cc := NewClientConn(c, Config{})
	defer cc.Close(nil)
	var all sync.WaitGroup
	for i := range 32 {
		all.Go(func() {
			body := random(1 + i*31_000)
			r := get("/")
			r.Method, r.Length, r.Fields = "POST", int64(len(body)), message.Fields{{Name: "trailer", Value: "x-t"}}
			resp, got, trailers, err := exchange(cc, r, body, message.Fields{{Name: "x-t", Value: "1"}})
			if err != nil || resp.Status != 200 || !bytes.Equal(got, body) || trailers.Value("x-t") != "1" || resp.Fields.Value("x-length") != strconv.Itoa(len(body)) {
				t.Errorf("%d: %+v %d of %d bytes %v %v", i, resp, len(got), len(body), trailers, err)
			}
		})
	}
	all.Wait()
	hints := 0
	st, err := cc.Open(get("/hints"), message.Options{End: true, Inform: func(status int, f message.Fields) {
		if status == 103 && f.Value("link") == "</x>" {
			hints++
		}
	}})
	must(t, err)
	if _, err := st.Response(); err != nil || hints != 1 {
		t.Errorf("%d early hints, %v", hints, err)
	}
	st.Close()
	head := get("/")
	head.Method = "HEAD"
	if resp, body, _, err := exchange(cc, head, nil, nil); err != nil || len(body) != 0 || resp.Status != 200 {
		t.Errorf("HEAD: %+v %q %v", resp, body, err)
	}
}

func TestTunnelsKeepHalfClose(t *testing.T) {
	cc, _ := both(t, Config{}, echo)
	for _, r := range []*message.Request{{Method: "CONNECT", Authority: "db.shop:5432", Length: message.Unknown},
		{Method: "GET", Scheme: "http", Authority: "app.test", Path: "/ws", Protocol: "websocket", Length: message.Unknown}} {
		st, err := cc.Open(r, message.Options{})
		must(t, err)
		resp, err := st.Response()
		must(t, err)
		if want := map[string]int{"": 200, "websocket": 101}[r.Protocol]; resp.Status != want || resp.Fields.Value("x-protocol") != r.Protocol {
			t.Errorf("%s: %+v", r.Method, resp)
		}
		buf := make([]byte, 16)
		for _, say := range []string{"ping", "again"} {
			_, err = st.Write([]byte(say))
			must(t, errors.Join(err, st.Flush()))
			if n, err := st.Read(buf); err != nil || string(buf[:n]) != say {
				t.Errorf("got %q, %v", buf[:n], err)
			}
		}
		must(t, st.End(nil))
		if n, err := st.Read(buf); n != 0 || !errors.Is(err, io.EOF) {
			t.Errorf("after the end: %d, %v", n, err)
		}
		st.Close()
	}
}

// A reader that reads nothing holds up its own stream only, and its memory is bounded.
func TestSlowReaderHoldsItsStreamOnly(t *testing.T) {
	const size = 4 << 20
	body := random(size)
	cc, _ := both(t, Config{StreamWindow: 64 << 10, ConnWindow: 128 << 10, MaxBuffered: 1 << 20}, func(s message.ServerStream) {
		if s.Respond(&message.Response{Status: 200, Length: size}, false) == nil {
			if _, err := s.Write(body); err == nil {
				_ = s.End(nil)
			}
		}
	})
	var slow []message.ClientStream
	for range 8 { // four connection windows in total
		st, err := cc.Open(get("/slow"), message.Options{End: true})
		must(t, err)
		_, err = st.Response()
		must(t, err)
		slow = append(slow, st)
	}
	for range 4 {
		if _, got, _, err := exchange(cc, get("/"), nil, nil); err != nil || !bytes.Equal(got, body) {
			t.Fatalf("%d bytes, %v", len(got), err)
		}
	}
	cc.mu.Lock()
	if cc.buffered > 8*64<<10 {
		t.Errorf("%d bytes are buffered", cc.buffered)
	}
	cc.mu.Unlock()
	for i, st := range slow {
		if i%2 == 0 {
			got, err := io.ReadAll(st)
			if err != nil || !bytes.Equal(got, body) {
				t.Errorf("slow stream: %d bytes, %v", len(got), err)
			}
		}
		st.Close()
	}
	if _, got, _, err := exchange(cc, get("/"), nil, nil); err != nil || len(got) != size {
		t.Fatalf("afterwards: %d bytes, %v", len(got), err)
	}
}

// More unread bytes than MaxBuffered withhold the connection's window, until they are read or given up.
func TestMemoryIsBounded(t *testing.T) {
	cc, _ := both(t, Config{StreamWindow: 64 << 10, ConnWindow: 64 << 10, MaxBuffered: 128 << 10}, func(s message.ServerStream) {
		_ = s.Respond(&message.Response{Status: 200, Length: message.Unknown}, false)
		_, _ = s.Write(make([]byte, 1<<20))
	})
	var open []message.ClientStream
	for range 10 {
		st, err := cc.Open(get("/"), message.Options{End: true})
		must(t, err)
		must(t, st.Flush())
		open = append(open, st)
	}
	settle(t, func() bool {
		cc.mu.Lock()
		defer cc.mu.Unlock()
		return cc.withheld > 0 && cc.recvWindow-cc.withheld <= 0
	})
	cc.mu.Lock()
	if cc.buffered > 128<<10+64<<10 {
		t.Errorf("%d bytes are buffered", cc.buffered)
	}
	cc.mu.Unlock()
	for _, st := range open {
		st.Close()
	}
	st, err := cc.Open(get("/"), message.Options{End: true})
	must(t, err)
	defer st.Close()
	if _, err := io.ReadFull(st, make([]byte, 500_000)); err != nil {
		t.Errorf("after the others were closed: %v", err)
	}
}

func settle(t *testing.T, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("has not settled")
		}
	}
}

func TestCancelAndAbort(t *testing.T) {
	aborted := make(chan error, 1)
	cc, _ := both(t, Config{}, func(s message.ServerStream) {
		switch s.Request().Path {
		case "/wait":
			gone := make(chan struct{})
			s.OnAbort(func(err error) { aborted <- err; close(gone) })
			<-gone
		case "/abort":
			_ = s.Respond(&message.Response{Status: 200, Length: 100}, false)
			_, _ = s.Write([]byte("half"))
			_ = s.Flush()
			s.Abort(errors.New("the upstream broke"))
		case "/panic":
			panic("a handler's fault")
		case "/short":
			_ = s.Respond(&message.Response{Status: 200, Length: 10}, false)
			_, _ = s.Write([]byte("short"))
			if s.End(nil) == nil {
				t.Error("a body shorter than announced was ended")
			}
		}
	})
	st, err := cc.Open(get("/wait"), message.Options{End: true})
	must(t, err)
	mine := errors.New("too late")
	time.AfterFunc(10*time.Millisecond, func() { st.Cancel(mine) })
	if _, err := st.Response(); !errors.Is(err, mine) || !message.Sent(err) {
		t.Errorf("cancelled: %v", err)
	}
	st.Close()
	var e *message.Error
	if err := <-aborted; !errors.As(err, &e) || e.Code != uint32(xhttp2.ErrCodeCancel) {
		t.Errorf("the server saw %v", err)
	}
	for _, path := range []string{"/abort", "/panic", "/short", "/nothing"} {
		_, _, _, err := exchange(cc, get(path), nil, nil)
		if !errors.As(err, &e) || e.Code != uint32(xhttp2.ErrCodeInternal) || !errors.Is(err, ErrReset) {
			t.Errorf("%s: %v", path, err)
		}
	}
	if err := cc.Err(); err != nil {
		t.Errorf("the connection has suffered: %v", err)
	}
}

// An answer may be whole before the request is; the rest of the request is then not wanted, and nobody waits for it.
func TestEarlyResponse(t *testing.T) {
	cc, _ := both(t, Config{}, func(s message.ServerStream) {
		_ = s.Respond(&message.Response{Status: 413}, true)
	})
	r := get("/")
	r.Method, r.Length = "POST", 10<<20
	resp, _, _, err := exchange(cc, r, make([]byte, 10<<20), nil)
	if err != nil || resp.Status != 413 {
		t.Errorf("%+v %v", resp, err)
	}
}

func TestLimits(t *testing.T) {
	release := make(chan struct{})
	cc, _ := both(t, Config{MaxStreams: 4, MaxHeadBytes: 8 << 10}, func(s message.ServerStream) {
		if s.Request().Path == "/hold" {
			<-release
		}
		_ = s.Respond(&message.Response{Status: 204}, true)
	})
	must(t, cc.Ping(t.Context())) // SETTINGS have come
	var held []message.ClientStream
	for range 4 {
		st, err := cc.Open(get("/hold"), message.Options{End: true})
		must(t, err)
		must(t, st.Flush())
		held = append(held, st)
	}
	if _, err := cc.Open(get("/"), message.Options{End: true}); !errors.Is(err, ErrFull) || message.Sent(err) {
		t.Errorf("a stream too many: %v", err)
	}
	close(release)
	for _, st := range held {
		if r, err := st.Response(); err != nil || r.Status != 204 {
			t.Errorf("%+v %v", r, err)
		}
		st.Close()
	}
	r := get("/")
	r.Fields.Add("x-large", strings.Repeat("x", 9<<10))
	if resp, _, _, err := exchange(cc, r, nil, nil); err != nil || resp.Status != 431 {
		t.Errorf("a head too large: %+v %v", resp, err)
	}
	if resp, _, _, err := exchange(cc, get("/"), nil, nil); err != nil || resp.Status != 204 {
		t.Errorf("afterwards: %+v %v", resp, err)
	}
}

func TestGoAwayFinishesWhatIsOpen(t *testing.T) {
	release, started := make(chan struct{}), make(chan struct{}, 8)
	cc, sc := both(t, Config{}, func(s message.ServerStream) {
		started <- struct{}{}
		<-release
		_ = s.Respond(&message.Response{Status: 200}, true)
	})
	var open []message.ClientStream
	for range 3 {
		st, err := cc.Open(get("/"), message.Options{End: true})
		must(t, err)
		must(t, st.Flush())
		<-started
		open = append(open, st)
	}
	sc.GoAway()
	settle(t, func() bool { return !cc.Usable() })
	if _, err := cc.Open(get("/"), message.Options{End: true}); !errors.Is(err, ErrGoAway) || message.Sent(err) {
		t.Errorf("after GOAWAY: %v", err)
	}
	close(release)
	for _, st := range open {
		if r, err := st.Response(); err != nil || r.Status != 200 {
			t.Errorf("an open stream: %+v %v", r, err)
		}
		st.Close()
	}
	for _, done := range []<-chan struct{}{cc.Done(), sc.Done()} {
		select {
		case <-done:
		case <-time.After(10 * time.Second):
			t.Fatal("a drained connection stays open")
		}
	}
}

func TestLostConnection(t *testing.T) {
	c, s := pair(t)
	begun := make(chan struct{}, 1)
	failed := make(chan error, 1)
	serve(t, s, Config{}, func(s message.ServerStream) {
		s.OnAbort(func(err error) { failed <- err })
		begun <- struct{}{}
		_, _ = s.Read(make([]byte, 1))
	})
	cc := NewClientConn(c, Config{})
	r := get("/")
	r.Method, r.Length = "POST", message.Unknown
	st, err := cc.Open(r, message.Options{})
	must(t, err)
	must(t, st.Flush())
	<-begun
	mine := errors.New("dead")
	cc.Close(mine)
	if _, err := st.Response(); !errors.Is(err, mine) || !message.Sent(err) {
		t.Errorf("client: %v", err)
	}
	st.Close()
	if err := <-failed; err == nil {
		t.Error("the server's stream did not fail")
	}
}

func TestSilentPeerIsGivenUp(t *testing.T) {
	c, s := pair(t)
	sc := serve(t, s, Config{PingAfter: 50 * time.Millisecond}, echo)
	_, err := c.Write([]byte(xhttp2.ClientPreface))
	must(t, err)
	fr := xhttp2.NewFramer(c, c)
	must(t, fr.WriteSettings())
	must(t, fr.WriteSettingsAck())
	go func() { _, _ = io.Copy(io.Discard, c) }() // takes all, answers nothing
	select {
	case <-sc.Done():
	case <-time.After(10 * time.Second):
		t.Fatal("a silent peer is kept for ever")
	}
	if !errors.Is(sc.Err(), ErrDead) {
		t.Error(sc.Err())
	}
}

func TestIdleConnectionEnds(t *testing.T) {
	cc, sc := both(t, Config{IdleTimeout: time.Second}, echo) // long enough for a call on a busy machine
	if _, _, _, err := exchange(cc, get("/"), nil, nil); err != nil {
		t.Fatal(err)
	}
	for _, done := range []<-chan struct{}{cc.Done(), sc.Done()} {
		select {
		case <-done:
		case <-time.After(10 * time.Second):
			t.Fatal("an idle connection stays open")
		}
	}
}

// raw is a client that can misbehave.
type raw struct {
	t    testing.TB
	conn net.Conn
	fr   *xhttp2.Framer
	enc  *hpack.Encoder
	buf  bytes.Buffer
}

func newRaw(t testing.TB, cfg Config, handle func(message.ServerStream)) *raw {
	c, s := pair(t)
	serve(t, s, cfg, handle)
	r := &raw{t: t, conn: c, fr: xhttp2.NewFramer(c, c)}
	r.fr.AllowIllegalWrites = true
	r.enc = hpack.NewEncoder(&r.buf)
	_, err := c.Write([]byte(xhttp2.ClientPreface))
	must(t, err)
	must(t, r.fr.WriteSettings())
	must(t, r.fr.WriteSettingsAck())
	return r
}

func (r *raw) headers(id uint32, end bool, kv ...string) {
	r.buf.Reset()
	for i := 0; i < len(kv); i += 2 {
		must(r.t, r.enc.WriteField(hpack.HeaderField{Name: kv[i], Value: kv[i+1]}))
	}
	must(r.t, r.fr.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: id, BlockFragment: r.buf.Bytes(), EndHeaders: true, EndStream: end}))
}

// outcome reads until the stream was answered, reset, or the connection ended.
func (r *raw) outcome(id uint32) string {
	_ = r.conn.SetReadDeadline(time.Now().Add(10 * time.Second))
	dec := hpack.NewDecoder(4096, nil)
	for {
		f, err := r.fr.ReadFrame()
		if err != nil {
			return "closed"
		}
		switch f := f.(type) {
		case *xhttp2.HeadersFrame:
			fields, err := dec.DecodeFull(f.HeaderBlockFragment())
			must(r.t, err)
			if f.StreamID == id {
				return fields[0].Value
			}
		case *xhttp2.RSTStreamFrame:
			if f.StreamID == id {
				return f.ErrCode.String()
			}
		case *xhttp2.GoAwayFrame:
			return "GOAWAY " + f.ErrCode.String()
		}
	}
}

func TestMalformedHeads(t *testing.T) {
	ok := []string{":method", "GET", ":scheme", "http", ":authority", "app.test", ":path", "/"}
	with := func(kv ...string) []string { return append(append([]string(nil), ok...), kv...) }
	for _, c := range []struct {
		name string
		kv   []string
		end  bool
		want string
	}{
		{"good", ok, true, "200"},
		{"upper case", with("X-Upper", "1"), true, "PROTOCOL_ERROR"},
		{"no token", with("x y", "1"), true, "PROTOCOL_ERROR"},
		{"empty name", with("", "1"), true, "PROTOCOL_ERROR"},
		{"CR in a value", with("x", "a\rb"), true, "PROTOCOL_ERROR"},
		{"LF in a value", with("x", "a\nhost: evil"), true, "PROTOCOL_ERROR"},
		{"NUL in a value", with("x", "a\x00"), true, "PROTOCOL_ERROR"},
		{"leading space", with("x", " a"), true, "PROTOCOL_ERROR"},
		{"trailing tab", with("x", "a\t"), true, "PROTOCOL_ERROR"},
		{"connection", with("connection", "close"), true, "PROTOCOL_ERROR"},
		{"transfer-encoding", with("transfer-encoding", "chunked"), true, "PROTOCOL_ERROR"},
		{"upgrade", with("upgrade", "h2c"), true, "PROTOCOL_ERROR"},
		{"te", with("te", "gzip"), true, "PROTOCOL_ERROR"},
		{"te trailers", with("te", "trailers"), true, "200"},
		{"two lengths", with("content-length", "1", "content-length", "2"), false, "PROTOCOL_ERROR"},
		{"signed length", with("content-length", "+1"), false, "PROTOCOL_ERROR"},
		{"length without a body", with("content-length", "5"), true, "PROTOCOL_ERROR"},
		{"host against authority", with("host", "other.test"), true, "PROTOCOL_ERROR"},
		{"host as authority", with("host", "app.test"), true, "200"},
		{"two hosts", []string{":method", "GET", ":scheme", "http", ":path", "/", "host", "a", "host", "a"}, true, "PROTOCOL_ERROR"},
		{"userinfo", []string{":method", "GET", ":scheme", "http", ":authority", "me@app.test", ":path", "/"}, true, "PROTOCOL_ERROR"},
		{"pseudo after regular", []string{":method", "GET", ":scheme", "http", "x", "1", ":path", "/"}, true, "PROTOCOL_ERROR"},
		{"unknown pseudo", with(":color", "blue"), true, "PROTOCOL_ERROR"},
		{"status in a request", with(":status", "200"), true, "PROTOCOL_ERROR"},
		{"two paths", with(":path", "/"), true, "PROTOCOL_ERROR"},
		{"empty path", []string{":method", "GET", ":scheme", "http", ":path", ""}, true, "PROTOCOL_ERROR"},
		{"no method", []string{":scheme", "http", ":path", "/"}, true, "PROTOCOL_ERROR"},
		{"no scheme", []string{":method", "GET", ":path", "/"}, true, "PROTOCOL_ERROR"},
		{"absolute path", []string{":method", "GET", ":scheme", "http", ":path", "http://x/"}, true, "PROTOCOL_ERROR"},
		{"space in the path", []string{":method", "GET", ":scheme", "http", ":path", "/ HTTP/1.1"}, true, "PROTOCOL_ERROR"},
		{"space in the method", []string{":method", "GET /", ":scheme", "http", ":path", "/"}, true, "PROTOCOL_ERROR"},
		{"CONNECT with a path", []string{":method", "CONNECT", ":authority", "a:1", ":path", "/"}, false, "PROTOCOL_ERROR"},
		{"CONNECT without authority", []string{":method", "CONNECT"}, false, "PROTOCOL_ERROR"},
		{"protocol without CONNECT", with(":protocol", "websocket"), false, "PROTOCOL_ERROR"},
		{"extended CONNECT", []string{":method", "CONNECT", ":protocol", "websocket", ":scheme", "http", ":authority", "a", ":path", "/"}, false, "200"},
	} {
		t.Run(c.name, func(t *testing.T) {
			rejects := make(chan string, 1)
			r := newRaw(t, Config{OnReject: func(reason string) { rejects <- reason }}, echo)
			r.headers(1, c.end, c.kv...)
			if got := r.outcome(1); got != c.want {
				t.Errorf("got %s, want %s", got, c.want)
			}
			if c.want != "200" {
				<-rejects
			}
		})
	}
}

func TestBodiesAgainstTheirLength(t *testing.T) {
	head := []string{":method", "POST", ":scheme", "http", ":authority", "app.test", ":path", "/", "content-length", "4"}
	read := func(s message.ServerStream) {
		if _, err := io.ReadAll(s); err == nil {
			_ = s.Respond(&message.Response{Status: 204}, true)
		}
	}
	for _, c := range []struct {
		name string
		send func(r *raw)
		want string
	}{
		{"right", func(r *raw) { must(t, r.fr.WriteData(1, true, []byte("abcd"))) }, "204"},
		{"padded", func(r *raw) { must(t, r.fr.WriteDataPadded(1, true, []byte("abcd"), make([]byte, 50))) }, "204"},
		{"too long", func(r *raw) { must(t, r.fr.WriteData(1, true, []byte("abcde"))) }, "PROTOCOL_ERROR"},
		{"too short", func(r *raw) { must(t, r.fr.WriteData(1, true, []byte("abc"))) }, "PROTOCOL_ERROR"},
		{"short before trailers", func(r *raw) { must(t, r.fr.WriteData(1, false, []byte("abc"))); r.headers(1, true, "x", "1") }, "PROTOCOL_ERROR"},
		{"pseudo in trailers", func(r *raw) { must(t, r.fr.WriteData(1, false, []byte("abcd"))); r.headers(1, true, ":path", "/") }, "PROTOCOL_ERROR"},
		{"data after the end", func(r *raw) {
			must(t, r.fr.WriteData(1, true, []byte("abcd")))
			must(t, r.fr.WriteData(1, true, []byte("x")))
		}, "204 or STREAM_CLOSED"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRaw(t, Config{}, read)
			r.headers(1, false, head...)
			c.send(r)
			if got := r.outcome(1); !strings.Contains(c.want, strings.TrimPrefix(got, "GOAWAY ")) {
				t.Errorf("got %s, want %s", got, c.want)
			}
		})
	}
}

func TestFloods(t *testing.T) {
	head := []string{":method", "GET", ":scheme", "http", ":authority", "app.test", ":path", "/"}
	for _, c := range []struct {
		name string
		send func(r *raw, i int) error
	}{
		{"PING", func(r *raw, _ int) error { return r.fr.WritePing(false, [8]byte{}) }},
		{"SETTINGS", func(r *raw, _ int) error { return r.fr.WriteSettings() }},
		{"PRIORITY", func(r *raw, i int) error { return r.fr.WritePriority(uint32(2*i+1), xhttp2.PriorityParam{}) }},
		{"unknown frames", func(r *raw, _ int) error { return r.fr.WriteRawFrame(0xbe, 0, 0, nil) }},
		{"rapid reset", func(r *raw, i int) error {
			r.buf.Reset()
			for j := 0; j < len(head); j += 2 {
				_ = r.enc.WriteField(hpack.HeaderField{Name: head[j], Value: head[j+1]})
			}
			id := uint32(2*i + 1)
			err := r.fr.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: id, BlockFragment: r.buf.Bytes(), EndHeaders: true})
			return errors.Join(err, r.fr.WriteRSTStream(id, xhttp2.ErrCodeCancel))
		}},
		{"CONTINUATION", func(r *raw, i int) error {
			if i == 0 {
				return r.fr.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte{0x82}})
			}
			return r.fr.WriteContinuation(1, false, nil)
		}},
		{"empty DATA", func(r *raw, i int) error {
			if i == 0 {
				r.headers(1, false, ":method", "POST", ":scheme", "http", ":authority", "app.test", ":path", "/")
			}
			return r.fr.WriteData(1, false, nil)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var calm atomic.Bool
			r := newRaw(t, Config{OnReject: func(reason string) { calm.Store(calm.Load() || strings.HasPrefix(reason, "flood")) }}, echo)
			go func() { _, _ = io.Copy(io.Discard, r.conn) }()
			for i := 0; ; i++ {
				if i == 100_000 {
					t.Fatal("100,000 frames, and no end")
				}
				if c.send(r, i) != nil {
					break
				}
			}
			settle(t, calm.Load)
		})
	}
}

// TestResetsAfterAnAnswer are how tunnels end whose caller resets its connection: no flood, however many there are.
func TestResetsAfterAnAnswer(t *testing.T) {
	cc, _ := both(t, Config{}, echo)
	for i := range 4 * maxResets {
		st, err := cc.Open(&message.Request{Method: "CONNECT", Authority: "app.test:1", Length: message.Unknown}, message.Options{})
		if err == nil {
			_, err = st.Response()
		}
		if err != nil {
			t.Fatalf("stream %d: %v", i, err)
		}
		st.Close()
	}
}

// A peer that takes no bytes is given up, and with it everybody who waits to write to it.
func TestStuckPeer(t *testing.T) {
	c, s := pair(t)
	_ = s.(*net.TCPConn).SetWriteBuffer(1 << 10)
	sc := serve(t, s, Config{WriteTimeout: 100 * time.Millisecond}, func(s message.ServerStream) {
		_ = s.Respond(&message.Response{Status: 200, Length: message.Unknown}, false)
		for {
			if _, err := s.Write(make([]byte, 64<<10)); err != nil {
				return
			}
		}
	})
	_ = c.(*net.TCPConn).SetReadBuffer(1 << 10)
	r := &raw{t: t, conn: c, fr: xhttp2.NewFramer(c, c)}
	r.enc = hpack.NewEncoder(&r.buf)
	_, err := c.Write([]byte(xhttp2.ClientPreface))
	must(t, err)
	must(t, r.fr.WriteSettings(xhttp2.Setting{ID: xhttp2.SettingInitialWindowSize, Val: 1 << 30}))
	must(t, r.fr.WriteWindowUpdate(0, 1<<30))
	r.headers(1, true, ":method", "GET", ":scheme", "http", ":authority", "a", ":path", "/")
	select {
	case <-sc.Done():
	case <-time.After(10 * time.Second):
		t.Fatal("still waits")
	}
}

func TestSettingsChangeWindows(t *testing.T) {
	got := make(chan int, 1)
	r := newRaw(t, Config{}, func(s message.ServerStream) {
		_ = s.Respond(&message.Response{Status: 200, Length: message.Unknown}, false)
		n, _ := s.Write(make([]byte, 1000))
		got <- n
		_ = s.End(nil)
	})
	must(t, r.fr.WriteSettings(xhttp2.Setting{ID: xhttp2.SettingInitialWindowSize, Val: 600}))
	r.headers(1, true, ":method", "GET", ":scheme", "http", ":authority", "a", ":path", "/")
	data := func(want int) {
		t.Helper()
		_ = r.conn.SetReadDeadline(time.Now().Add(10 * time.Second))
		for sum := 0; sum < want; {
			f, err := r.fr.ReadFrame()
			must(t, err)
			if d, ok := f.(*xhttp2.DataFrame); ok {
				sum += len(d.Data())
			}
		}
	}
	data(600)
	must(t, r.fr.WriteSettings(xhttp2.Setting{ID: xhttp2.SettingInitialWindowSize, Val: 100})) // now −500
	must(t, r.fr.WriteWindowUpdate(1, 400))                                                    // −100
	must(t, r.fr.WriteWindowUpdate(1, 500))                                                    // 400
	data(400)
	if n := <-got; n != 1000 {
		t.Errorf("%d bytes were written", n)
	}
}

// brokenConn fails to write, and still delivers what had come.
type brokenConn struct {
	net.Conn
	came   io.Reader
	closed chan struct{}
	once   sync.Once
}

func (c *brokenConn) Write([]byte) (int, error) { return 0, errors.New("broken") }
func (c *brokenConn) Close() error              { c.once.Do(func() { close(c.closed) }); return nil }
func (c *brokenConn) Read(p []byte) (int, error) {
	<-c.closed
	return c.came.Read(p)
}

// What came before a connection broke opens no stream that nobody would end.
func TestStreamsOfABrokenConnection(t *testing.T) {
	var b bytes.Buffer
	b.WriteString(xhttp2.ClientPreface)
	fr := xhttp2.NewFramer(&b, nil)
	must(t, fr.WriteSettings())
	must(t, fr.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: 1, EndHeaders: true, BlockFragment: []byte("\x02\x07CONNECT\x01\x03a:1")}))
	client, server := pair(t)
	defer client.Close()
	sc := NewServerConn(&brokenConn{Conn: server, came: &b, closed: make(chan struct{})}, Config{}, echo)
	ended := make(chan struct{})
	go func() { _ = sc.Serve(); close(ended) }()
	select {
	case <-ended:
	case <-time.After(10 * time.Second):
		t.Fatal("a handler waits for ever")
	}
}

// patience is how long either end may take on the fuzzers' clock, which only runs while all goroutines wait: saying goodbye is all that takes time.
const patience = 2 * lingerTimeout

func FuzzServer(f *testing.F) {
	f.Add([]byte("\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00\x05\x01\x05\x00\x00\x00\x01\x82\x86\x84\x41\x00"))
	f.Add([]byte("\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x64\x00\x00\x04\x08\x00\x00\x00\x00\x00\x00\x00\x00\x01"))
	f.Fuzz(func(t *testing.T, b []byte) {
		synctest.Test(t, func(t *testing.T) { // a goroutine that waits for ever fails it at once
			began := time.Now()
			c, s := net.Pipe()
			sc := NewServerConn(s, Config{Log: slog.New(slog.DiscardHandler)}, echo)
			ended := make(chan struct{})
			go func() { _ = sc.Serve(); close(ended) }()
			go func() { _, _ = io.Copy(io.Discard, c) }()
			_, _ = c.Write(append([]byte(xhttp2.ClientPreface+"\x00\x00\x00\x04\x00\x00\x00\x00\x00"), b...))
			_ = c.Close()
			<-ended
			if took := time.Since(began); took > patience {
				t.Fatalf("took %s", took)
			}
		})
	})
}

func FuzzClient(f *testing.F) {
	f.Add([]byte("\x00\x00\x01\x01\x05\x00\x00\x00\x01\x88"))
	f.Add([]byte("\x00\x00\x01\x01\x04\x00\x00\x00\x01\x88\x00\x00\x03\x00\x01\x00\x00\x00\x01abc"))
	f.Fuzz(func(t *testing.T, b []byte) {
		synctest.Test(t, func(t *testing.T) {
			began := time.Now()
			c, s := net.Pipe()
			go func() { _, _ = io.Copy(io.Discard, s) }()
			cc := NewClientConn(c, Config{})
			get, err := cc.Open(get("/"), message.Options{End: true})
			must(t, err)
			must(t, get.Flush())
			put, err := cc.Open(&message.Request{Method: "PUT", Scheme: "http", Authority: "app.test", Path: "/", Length: 200_000}, message.Options{})
			must(t, err)
			var both sync.WaitGroup
			both.Go(func() { // more than the window: waits for the peer
				if _, err := put.Write(make([]byte, 200_000)); err == nil {
					_ = put.End(nil)
				}
			})
			for _, st := range []message.ClientStream{get, put} {
				both.Go(func() {
					if _, err := st.Response(); err == nil {
						_, _ = io.Copy(io.Discard, st)
					}
				})
			}
			_, _ = s.Write(append([]byte("\x00\x00\x00\x04\x00\x00\x00\x00\x00"), b...))
			_ = s.Close()
			both.Wait()
			get.Close()
			put.Close()
			<-cc.Done()
			if took := time.Since(began); took > patience {
				t.Fatalf("took %s", took)
			}
		})
	})
}
