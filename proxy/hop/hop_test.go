package hop_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/proxy/hop"
	"github.com/hanse-mesh/hanse/proxy/message"
	"github.com/hanse-mesh/hanse/proxy/proxytest"
)

const payments = "/ns/shop/sa/payments"

// serve starts a Server on loopback and returns the Peer to dial, and what stops it.
func serve(t testing.TB, src *identity.Source, h http.Handler, change ...func(*hop.ServerConfig)) (hop.Peer, *hop.Server, func()) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	cfg := hop.ServerConfig{Source: src, DrainTimeout: 2 * time.Second, Handle: func(caller hop.Caller, s message.ServerStream) {
		s.Request().Fields.Set("x-caller", caller.ID.String())
		proxytest.Handler(h)(s)
	}}
	for _, f := range change {
		f(&cfg)
	}
	s := hop.NewServer(cfg)
	svid, err := src.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	stop := run(t, func(ctx context.Context) error { return s.Serve(ctx, ln) })
	return hop.Peer{ID: "e1", Address: netip.MustParseAddrPort(ln.Addr().String()), SNI: "e1.endpoint.hanse", SPIFFEID: svid.ID.String()}, s, stop
}

func run(t testing.TB, f func(context.Context) error) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := f(ctx); err != nil {
			t.Errorf("run: %v", err)
		}
	}()
	var once sync.Once
	stop = func() { once.Do(func() { cancel(); <-done }) }
	t.Cleanup(stop)
	return stop
}

func client(t testing.TB, src *identity.Source, change ...func(*hop.ClientConfig)) *hop.Client {
	t.Helper()
	cfg := hop.ClientConfig{Source: src, ConnectTimeout: 3 * time.Second}
	for _, f := range change {
		f(&cfg)
	}
	c := hop.NewClient(cfg)
	run(t, c.Run)
	return c
}

func request(t testing.TB, method, path string, body io.Reader) *http.Request {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, "https://payments.shop.svc.clusterset.local:8080"+path, body)
	if err != nil {
		t.Fatal(err)
	}
	return req
}

func whoCalls(w http.ResponseWriter, r *http.Request) {
	fmt.Fprint(w, r.Header.Get("X-Caller"))
}

func roundTrip(c *hop.Client, peer hop.Peer, req *http.Request) (*http.Response, error) {
	return proxytest.RoundTrip(func(ctx context.Context, r *message.Request, o message.Options) (message.ClientStream, error) {
		return c.Open(ctx, peer, r, o)
	}, req)
}

func TestRequestCarriesTheCallersID(t *testing.T) {
	west, east := proxytest.NewDomain(t, "west.test"), proxytest.NewDomain(t, "east.test")
	peer, _, _ := serve(t, east.Source(payments, west), http.HandlerFunc(whoCalls))
	c := client(t, west.Source("/ns/shop/sa/frontend", east))
	for range 3 {
		resp, err := roundTrip(c, peer, request(t, "GET", "/", nil))
		if err != nil {
			t.Fatal(err)
		}
		b, _ := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if got := string(b); got != "spiffe://west.test/ns/shop/sa/frontend" {
			t.Errorf("caller %q", got)
		}
	}
	if n := len(c.Connections()); n != 1 {
		t.Errorf("%d connections, want one shared", n)
	}
}

func TestRefusedIdentities(t *testing.T) {
	west, east, other := proxytest.NewDomain(t, "west.test"), proxytest.NewDomain(t, "east.test"), proxytest.NewDomain(t, "other.test")
	served := false
	peer, _, _ := serve(t, east.Source(payments, west), http.HandlerFunc(func(http.ResponseWriter, *http.Request) { served = true }))
	impostor := peer
	impostor.SPIFFEID = "spiffe://east.test/ns/shop/sa/catalog"
	for name, tc := range map[string]struct {
		src  *identity.Source
		peer hop.Peer
	}{
		"not federated with the server": {other.Source("/ns/shop/sa/frontend", east), peer},
		"server not federated with us":  {west.Source("/ns/shop/sa/frontend"), peer},
		"server is somebody else":       {west.Source("/ns/shop/sa/frontend", east), impostor},
		"no SVID":                       {identity.NewSource(), peer},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := roundTrip(client(t, tc.src), tc.peer, request(t, "GET", "/", nil))
			var e *hop.Error
			if !errors.As(err, &e) || e.Stage != hop.StageHandshake || e.Sent {
				t.Errorf("error %v, want one of the handshake with nothing sent", err)
			}
		})
	}
	if served {
		t.Error("the handler was called")
	}
}

// TestDistrust: open streams end and no new ones begin as soon as the peer's bundle is gone, on either side.
func TestDistrust(t *testing.T) {
	for _, side := range []string{"client", "server"} {
		t.Run(side, func(t *testing.T) {
			west, east := proxytest.NewDomain(t, "west.test"), proxytest.NewDomain(t, "east.test")
			clientSrc, serverSrc := west.Source("/ns/shop/sa/frontend", east), east.Source(payments, west)
			peer, _, _ := serve(t, serverSrc, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				_ = http.NewResponseController(w).Flush()
				<-r.Context().Done()
			}))
			c := client(t, clientSrc)
			resp, err := roundTrip(c, peer, request(t, "GET", "/", nil))
			if err != nil {
				t.Fatal(err)
			}
			if side == "client" {
				clientSrc.SetBundles(proxytest.Bundles(west))
			} else {
				serverSrc.SetBundles(proxytest.Bundles(east))
			}
			if _, err := io.ReadAll(resp.Body); err == nil {
				t.Error("the open stream ended cleanly")
			}
			if _, err := roundTrip(c, peer, request(t, "GET", "/", nil)); err == nil {
				t.Error("a new stream was opened")
			}
		})
	}
}

// TestRotation: a new SVID of the same ID leaves the connection; another ID never shares it.
func TestRotation(t *testing.T) {
	d := proxytest.NewDomain(t, "west.test")
	peer, _, _ := serve(t, d.Source(payments), http.HandlerFunc(whoCalls))
	src := d.Source("/ns/shop/sa/frontend")
	c := client(t, src)
	call := func() string {
		resp, err := roundTrip(c, peer, request(t, "GET", "/", nil))
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, _ := io.ReadAll(resp.Body)
		return string(b)
	}
	call()
	src.SetSVID(d.SVID("/ns/shop/sa/frontend", time.Hour))
	call()
	if n := len(c.Connections()); n != 1 {
		t.Errorf("%d connections after rotation, want 1", n)
	}
	src.SetSVID(d.SVID("/ns/shop/sa/other", time.Hour))
	if got := call(); got != "spiffe://west.test/ns/shop/sa/other" {
		t.Errorf("caller %q after the identity changed", got)
	}
}

// TestExpiry: no stream is opened on a connection whose SVID has expired, and open ones go on.
func TestExpiry(t *testing.T) {
	t.Parallel() // it waits
	d := proxytest.NewDomain(t, "west.test")
	peer, _, _ := serve(t, d.Source(payments), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).Flush()
		_, _ = io.Copy(w, r.Body)
	}))
	src := d.Source("/ns/shop/sa/frontend")
	src.SetSVID(d.SVID("/ns/shop/sa/frontend", 5*time.Second)) // the first call is over before, also on a busy machine
	c := client(t, src)
	pr, pw := io.Pipe()
	resp, err := roundTrip(c, peer, request(t, "POST", "/", pr))
	if err != nil {
		t.Fatal(err)
	}
	first := c.Connections()[0]
	src.SetSVID(d.SVID("/ns/shop/sa/frontend", time.Hour))
	time.Sleep(time.Until(first.Expires) + 50*time.Millisecond)
	second, err := roundTrip(c, peer, request(t, "POST", "/", strings.NewReader("new")))
	if err != nil {
		t.Fatal(err)
	}
	_ = second.Body.Close()
	if n := len(c.Connections()); n != 2 {
		t.Errorf("%d connections, want the old one and a new one", n)
	}
	_, _ = io.WriteString(pw, "still open")
	_ = pw.Close()
	if b, err := io.ReadAll(resp.Body); err != nil || string(b) != "still open" {
		t.Errorf("old stream gave %q, %v", b, err)
	}
}

// hole is a connection that can stop carrying bytes without closing.
type hole struct {
	net.Conn
	shut chan struct{}
}

func (h hole) Read(p []byte) (int, error) {
	n, err := h.Conn.Read(p)
	select {
	case <-h.shut:
		if err == nil {
			return h.Read(p)
		}
	default:
	}
	return n, err
}

func (h hole) Write(p []byte) (int, error) {
	select {
	case <-h.shut:
		return len(p), nil
	default:
		return h.Conn.Write(p)
	}
}

func TestBlackHoleIsFoundByPing(t *testing.T) {
	d := proxytest.NewDomain(t, "west.test")
	shut := make(chan struct{})
	entered := make(chan struct{})
	peer, _, _ := serve(t, d.Source(payments), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/hang" {
			close(entered)
			<-r.Context().Done()
		}
	}), func(c *hop.ServerConfig) { c.Wrap = func(n net.Conn) net.Conn { return hole{n, shut} } })
	c := client(t, d.Source("/ns/shop/sa/frontend"), func(c *hop.ClientConfig) {
		c.PingAfter, c.DeadAfter = 50*time.Millisecond, time.Second
	})
	go func() { <-entered; close(shut) }()
	_, err := roundTrip(c, peer, request(t, "GET", "/hang", nil))
	if !errors.Is(err, hop.ErrDead) || !hop.Sent(err) {
		t.Errorf("error %v, want ErrDead of a request that was sent", err)
	}
}

// pause is a connection whose bytes wait while it is shut.
type pause struct {
	net.Conn
	shut, open chan struct{}
}

func (p pause) Write(b []byte) (int, error) {
	select {
	case <-p.shut:
		<-p.open
	default:
	}
	return p.Conn.Write(b)
}

// TestDoubt: a PING that is not answered as soon as usual is told, and that an answer came after all; so is one that is never answered.
func TestDoubt(t *testing.T) {
	d := proxytest.NewDomain(t, "west.test")
	shut, reopen := make(chan struct{}), make(chan struct{})
	entered, leave := make(chan struct{}, 2), make(chan struct{})
	peer, _, _ := serve(t, d.Source(payments), http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		entered <- struct{}{}
		<-leave
	}), func(c *hop.ServerConfig) { c.Wrap = func(n net.Conn) net.Conn { return pause{n, shut, reopen} } })
	c := hop.NewClient(hop.ClientConfig{Source: d.Source("/ns/shop/sa/frontend"), PingAfter: 50 * time.Millisecond, DeadAfter: 4 * time.Second})
	told := make(chan bool, 100)
	c.OnDoubt(func(to hop.Peer, doubtful bool) {
		if to.Address != peer.Address || to.SPIFFEID != peer.SPIFFEID || to.Gateway.IsValid() {
			t.Errorf("doubt of %+v", to)
		}
		told <- doubtful
	})
	run(t, c.Run)
	failed := make(chan error, 1)
	go func() {
		_, err := roundTrip(c, peer, request(t, "GET", "/", nil))
		failed <- err
	}()
	<-entered
	close(shut)
	if !<-told {
		t.Fatal("no doubt while nothing comes")
	}
	close(reopen)
	if <-told {
		t.Fatal("a doubt again, and no answer")
	}
	close(leave)
	if err := <-failed; err != nil {
		t.Errorf("the call: %v", err)
	}
}

// TestSilent tells silence from refusals.
func TestSilent(t *testing.T) {
	d := proxytest.NewDomain(t, "west.test")
	peer, _, stop := serve(t, d.Source(payments), http.HandlerFunc(whoCalls))
	mute, err := net.Listen("tcp", "127.0.0.1:0") // connects, and says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer mute.Close()
	c := client(t, d.Source("/ns/shop/sa/frontend"), func(c *hop.ClientConfig) {
		dial := (&net.Dialer{}).DialContext
		c.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
			if strings.HasPrefix(address, "192.0.2.1:") { // nobody there: as the dialer says when its time is up
				<-ctx.Done()
			}
			return dial(ctx, network, address)
		}
	})
	lost, noAnswer := peer, peer
	lost.Address, lost.ConnectTimeout = netip.MustParseAddrPort("192.0.2.1:1"), 50*time.Millisecond
	noAnswer.Address, noAnswer.ConnectTimeout = netip.MustParseAddrPort(mute.Addr().String()), 50*time.Millisecond
	stranger := peer
	stranger.SPIFFEID = "spiffe://west.test/ns/shop/sa/else"
	check := func(what string, to hop.Peer, want bool) {
		t.Helper()
		_, err := roundTrip(c, to, request(t, "GET", "/", nil))
		if err == nil || hop.Silent(err) != want {
			t.Errorf("%s: silent is %v, want %v: %v", what, !want, want, err)
		}
	}
	check("no connection", lost, true)
	check("no handshake", noAnswer, true)
	check("another identity", stranger, false)
	stop()
	check("refused", peer, false)
}

// TestLongSilenceIsNotDeath: an application may take its time as long as the peer answers PINGs.
func TestLongSilenceIsNotDeath(t *testing.T) {
	t.Parallel() // it waits
	d := proxytest.NewDomain(t, "west.test")
	peer, _, _ := serve(t, d.Source(payments), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		time.Sleep(4 * time.Second)
		fmt.Fprint(w, "late")
	}))
	c := client(t, d.Source("/ns/shop/sa/frontend"), func(c *hop.ClientConfig) {
		c.PingAfter, c.DeadAfter = 20*time.Millisecond, 3*time.Second
	})
	resp, err := roundTrip(c, peer, request(t, "GET", "/", nil))
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
}

// TestDrain: GOAWAY lets open streams finish, and later ones fail as not sent.
func TestDrain(t *testing.T) {
	d := proxytest.NewDomain(t, "west.test")
	entered, leave := make(chan struct{}), make(chan struct{})
	peer, _, stop := serve(t, d.Source(payments), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		close(entered)
		<-leave
		fmt.Fprint(w, "finished")
	}))
	c := client(t, d.Source("/ns/shop/sa/frontend"))
	type result struct {
		body string
		err  error
	}
	got := make(chan result, 1)
	go func() {
		resp, err := roundTrip(c, peer, request(t, "GET", "/", nil))
		if err != nil {
			got <- result{err: err}
			return
		}
		b, err := io.ReadAll(resp.Body)
		got <- result{string(b), err}
	}()
	<-entered
	stopped := make(chan struct{})
	go func() { stop(); close(stopped) }()
	for c.Connections()[0].Draining || usable(c) {
		time.Sleep(5 * time.Millisecond)
	}
	if _, err := roundTrip(c, peer, request(t, "GET", "/", nil)); err == nil || hop.Sent(err) {
		t.Errorf("a request during drain: %v, want a failure with nothing sent", err)
	}
	close(leave)
	if r := <-got; r.err != nil || r.body != "finished" {
		t.Errorf("open stream gave %q, %v", r.body, r.err)
	}
	<-stopped
}

func usable(c *hop.Client) bool {
	for _, conn := range c.Connections() {
		if !conn.GoneAway {
			return true
		}
	}
	return false
}

// TestStreamHalfClose: each direction of a CONNECT stream ends on its own, in either order, bytes equal.
func TestStreamHalfClose(t *testing.T) {
	d := proxytest.NewDomain(t, "west.test")
	up, down := bytes.Repeat([]byte("upward "), 50_000), bytes.Repeat([]byte("downward "), 50_000)
	for _, first := range []string{"client", "server"} {
		t.Run(first+" ends first", func(t *testing.T) {
			received := make(chan []byte, 1)
			peer, _, _ := serve(t, d.Source(payments), nil, func(c *hop.ServerConfig) {
				c.Handle = func(_ hop.Caller, s message.ServerStream) {
					if r := s.Request(); r.Method != http.MethodConnect || r.Authority != "payments.shop.svc.clusterset.local:5432" {
						_ = s.Respond(&message.Response{Status: http.StatusMisdirectedRequest}, true)
						return
					}
					if err := errors.Join(s.Respond(&message.Response{Status: 200, Length: message.Unknown}, false), s.Flush()); err != nil {
						t.Error(err)
						return
					}
					send := func() {
						_, _ = s.Write(down)
						_ = s.End(nil)
					}
					if first == "server" {
						send()
					}
					b, err := io.ReadAll(s)
					if err != nil {
						t.Error(err)
					}
					received <- b
					if first == "client" {
						send()
					}
				}
			})
			c := client(t, d.Source("/ns/shop/sa/frontend"))
			connect := func(authority string) (message.ClientStream, *message.Response) {
				s, err := c.Open(t.Context(), peer, &message.Request{Method: http.MethodConnect, Authority: authority, Length: message.Unknown}, message.Options{})
				if err != nil {
					t.Fatal(err)
				}
				resp, err := s.Response()
				if err != nil {
					t.Fatal(err)
				}
				return s, resp
			}
			s, _ := connect("payments.shop.svc.clusterset.local:5432")
			defer s.Close()
			send := func() {
				_, _ = s.Write(up)
				_ = s.End(nil)
			}
			if first == "client" {
				send()
			}
			b, err := io.ReadAll(s)
			if err != nil || !bytes.Equal(b, down) {
				t.Errorf("client read %d bytes, %v", len(b), err)
			}
			if first == "server" {
				send()
			}
			if got := <-received; !bytes.Equal(got, up) {
				t.Errorf("server read %d bytes", len(got))
			}
			refused, resp := connect("other:1")
			if resp.Status != http.StatusMisdirectedRequest {
				t.Errorf("wrong authority: %+v", resp)
			}
			refused.Close()
		})
	}
}

// TestDeadGateway: the error blames the gateway, not the endpoint.
func TestDeadGateway(t *testing.T) {
	d := proxytest.NewDomain(t, "west.test")
	peer, _, _ := serve(t, d.Source(payments), http.HandlerFunc(whoCalls))
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	peer.Gateway = netip.MustParseAddrPort(ln.Addr().String())
	_ = ln.Close()
	_, err = roundTrip(client(t, d.Source("/ns/shop/sa/frontend")), peer, request(t, "GET", "/", nil))
	var e *hop.Error
	if !errors.As(err, &e) || e.Stage != hop.StageGateway || e.Sent {
		t.Errorf("error %v, want one of the gateway", err)
	}
}

// TestFullConnection: where a connection has no free stream another is opened, up to the limit; then streams wait.
func TestFullConnection(t *testing.T) {
	d := proxytest.NewDomain(t, "west.test")
	leave := make(chan struct{})
	var served atomic.Int32
	peer, _, _ := serve(t, d.Source(payments), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		served.Add(1)
		<-leave
	}), func(c *hop.ServerConfig) { c.MaxStreams = 2 })
	c := client(t, d.Source("/ns/shop/sa/frontend"), func(c *hop.ClientConfig) { c.MaxConns = 2 })
	var calls sync.WaitGroup
	call := func() {
		resp, err := roundTrip(c, peer, request(t, "GET", "/", nil))
		if err != nil {
			t.Error(err)
			return
		}
		_ = resp.Body.Close()
	}
	for i := range int32(4) {
		calls.Go(call)
		for served.Load() <= i { // each sees the ones before
			if t.Failed() {
				t.FailNow()
			}
			time.Sleep(time.Millisecond)
		}
	}
	if n := len(c.Connections()); n != 2 {
		t.Errorf("%d connections for 4 streams of 2 each", n)
	}
	calls.Go(call) // waits for a stream
	close(leave)
	calls.Wait()
}

// TestIdleConnectionsAreClosed by the client.
func TestIdleConnectionsAreClosed(t *testing.T) {
	d := proxytest.NewDomain(t, "west.test")
	peer, _, _ := serve(t, d.Source(payments), http.HandlerFunc(whoCalls))
	c := client(t, d.Source("/ns/shop/sa/frontend"), func(c *hop.ClientConfig) { c.IdleClose, c.PingAfter = 50*time.Millisecond, 20*time.Millisecond })
	resp, err := roundTrip(c, peer, request(t, "GET", "/", nil))
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	for len(c.Connections()) > 0 {
		time.Sleep(5 * time.Millisecond)
	}
	if resp, err = roundTrip(c, peer, request(t, "GET", "/", nil)); err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
}

// TestServerExpiry: a server whose SVID expires sends its callers away, by GOAWAY.
func TestServerExpiry(t *testing.T) {
	t.Parallel() // it waits
	d := proxytest.NewDomain(t, "west.test")
	src := d.Source(payments)
	src.SetSVID(d.SVID(payments, 5*time.Second))
	entered, leave := make(chan struct{}, 2), make(chan struct{})
	peer, _, _ := serve(t, src, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		entered <- struct{}{}
		if r.URL.Path == "/hang" {
			<-leave
		}
		fmt.Fprint(w, "ok")
	}))
	c := client(t, d.Source("/ns/shop/sa/frontend"))
	done := make(chan error, 1)
	go func() {
		resp, err := roundTrip(c, peer, request(t, "GET", "/hang", nil))
		if err == nil {
			_, err = io.ReadAll(resp.Body)
		}
		done <- err
	}()
	<-entered
	src.SetSVID(d.SVID(payments, time.Hour))
	for usable(c) {
		time.Sleep(5 * time.Millisecond)
	}
	resp, err := roundTrip(c, peer, request(t, "GET", "/", nil))
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	close(leave)
	if err := <-done; err != nil {
		t.Errorf("the open stream: %v", err)
	}
}

// TestHeaderLimit: a head that is too large is refused, and the connection serves others.
func TestHeaderLimit(t *testing.T) {
	d := proxytest.NewDomain(t, "west.test")
	peer, _, _ := serve(t, d.Source(payments), http.HandlerFunc(whoCalls), func(c *hop.ServerConfig) { c.MaxHeaderBytes = 4 << 10 })
	c := client(t, d.Source("/ns/shop/sa/frontend"))
	req := request(t, "GET", "/", nil)
	req.Header.Set("X-Big", strings.Repeat("x", 100<<10))
	if resp, err := roundTrip(c, peer, req); err == nil {
		if resp.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
			t.Errorf("status %d", resp.StatusCode)
		}
		_ = resp.Body.Close()
	}
	resp, err := roundTrip(c, peer, request(t, "GET", "/", nil))
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
}

// TestBulkHasItsOwn: while a stream carries many bytes, small ones use another connection, and once it is over they come back.
func TestBulkHasItsOwn(t *testing.T) {
	d := proxytest.NewDomain(t, "west.test")
	stop := make(chan struct{})
	peer, _, _ := serve(t, d.Source(payments), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for r.URL.Path == "/bulk" {
			select {
			case <-stop:
				return
			default:
				_, _ = w.Write(make([]byte, 64<<10))
			}
		}
	}))
	c := client(t, d.Source("/ns/shop/sa/frontend"))
	bulk, err := roundTrip(c, peer, request(t, "GET", "/bulk", nil))
	if err != nil {
		t.Fatal(err)
	}
	read := make(chan struct{})
	go func() {
		defer close(read)
		_, _ = io.Copy(io.Discard, bulk.Body)
		_ = bulk.Body.Close()
	}()
	small := func(n int) {
		for range n {
			resp, err := roundTrip(c, peer, request(t, "GET", "/small", nil))
			if err != nil {
				t.Fatal(err)
			}
			_ = resp.Body.Close()
		}
	}
	apart := func() (n uint64) {
		conns := c.Connections()
		if len(conns) > 2 {
			t.Fatalf("%d connections for one bulk stream and small ones", len(conns))
		}
		for _, conn := range conns {
			if conn.Read < 1<<20 {
				n += conn.Requests
			}
		}
		return n
	}
	for end := time.Now().Add(10 * time.Second); apart() < 50; {
		if time.Now().After(end) {
			t.Fatalf("%+v", c.Connections())
		}
		small(10)
	}
	close(stop)
	<-read
}

// TestManyLongStreams: where the peer allows no more on one connection, others are opened beyond what threads want.
func TestManyLongStreams(t *testing.T) {
	d := proxytest.NewDomain(t, "west.test")
	leave := make(chan struct{})
	var served sync.WaitGroup
	peer, _, _ := serve(t, d.Source(payments), http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		served.Done()
		<-leave
	}), func(c *hop.ServerConfig) { c.MaxStreams = 30 })
	c := client(t, d.Source("/ns/shop/sa/frontend"))
	served.Add(300)
	var calls sync.WaitGroup
	for range 300 {
		calls.Go(func() {
			resp, err := roundTrip(c, peer, request(t, "GET", "/", nil))
			if err != nil {
				t.Error(err)
				served.Done()
				return
			}
			_ = resp.Body.Close()
		})
	}
	served.Wait()
	if n := len(c.Connections()); n < 10 || n > 16 {
		t.Errorf("%d connections for 300 streams of 30 each", n)
	}
	close(leave)
	calls.Wait()
}

// TestLeavingCallersDoNotWait for a connection that is being made.
func TestLeavingCallersDoNotWait(t *testing.T) {
	d := proxytest.NewDomain(t, "west.test")
	peer, _, _ := serve(t, d.Source(payments), http.HandlerFunc(whoCalls))
	dialling, never := make(chan struct{}), make(chan struct{})
	c := client(t, d.Source("/ns/shop/sa/frontend"), func(c *hop.ClientConfig) {
		c.Dial = func(ctx context.Context, _, _ string) (net.Conn, error) {
			close(dialling)
			<-never
			return nil, net.ErrClosed
		}
	})
	defer close(never)
	ctx, leave := context.WithCancel(context.Background())
	go func() {
		<-dialling
		leave()
	}()
	_, err := c.Open(ctx, peer, &message.Request{Method: "GET", Scheme: "https", Authority: "a", Path: "/"}, message.Options{End: true})
	var e *hop.Error
	if !errors.As(err, &e) || e.Sent || !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}
