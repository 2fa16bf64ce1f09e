package sidecar_test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/hanse-mesh/hanse/proxy"
	"github.com/hanse-mesh/hanse/proxy/proxytest"
	"github.com/hanse-mesh/hanse/proxy/sidecar"
)

// TestUnderLoad hurts a mesh while twelve callers use it over HTTP/1.1, HTTP/2 and TCP. No answer is ever wrong, and only those are lost
// that nobody could save.
func TestUnderLoad(t *testing.T) {
	for _, c := range []struct {
		name string
		hurt func(*testing.T, *mesh)
		lost []string // what may be lost, by its beginning
	}{
		{"nothing", func(*testing.T, *mesh) { time.Sleep(500 * time.Millisecond) }, nil},
		{"slow reader", slowReaders, nil},
		{"slow writer", slowWriters, nil},
		{"reset mid-body", resets, nil},
		{"half-close", halfCloses, nil},
		// What had been sent and may not be repeated, and answers under way, cannot be saved.
		{"peer killed", killed, []string{"http/1.1 POST refused: 502 connection_lost", "http/2 POST refused: 502 connection_lost",
			"http/1.1 GET cut", "http/1.1 PUT cut", "http/1.1 POST cut", "http/2 GET cut", "http/2 PUT cut", "http/2 POST cut", "tcp cut"}},
		{"GOAWAY", goAway, nil},
		{"table swap", tableSwap, nil},
		{"SVID rotation", rotation, nil},
		{"drain", func(t *testing.T, m *mesh) { time.Sleep(300 * time.Millisecond); m.pays[0].stop() }, nil},
		{"head of 1 MiB", longHeads, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newMesh(t)
			tr := m.traffic()
			c.hurt(t, m)
			time.Sleep(200 * time.Millisecond)
			tr.end(c.lost...)
		})
	}
}

// request sends the head of a request on a connection of its own.
func request(t *testing.T, m *mesh, format string, args ...any) (net.Conn, *bufio.Reader) {
	t.Helper()
	c, err := net.Dial("tcp", m.front.outbound)
	if err != nil {
		t.Fatal(err)
	}
	_ = c.SetDeadline(time.Now().Add(patience))
	fmt.Fprintf(c, format, args...)
	return c, bufio.NewReaderSize(c, 16)
}

// answered reads an answer that must be whole and right.
func answered(t *testing.T, br *bufio.Reader, id string, n int) {
	t.Helper()
	resp, err := http.ReadResponse(br, nil)
	if err != nil {
		t.Errorf("%s: %v", id, err)
		return
	}
	defer resp.Body.Close()
	if body, err := io.ReadAll(resp.Body); err != nil || resp.StatusCode != 200 || resp.Header.Get("X-Id") != id || !bytes.Equal(body, stamped(id, n)) {
		t.Errorf("%s: %s, id %q, %d of %d bytes, %v", id, resp.Status, resp.Header.Get("X-Id"), len(body), n, err)
	}
}

// trickle reads slowly.
type trickle struct{ io.Reader }

func (r trickle) Read(p []byte) (int, error) {
	time.Sleep(10 * time.Millisecond)
	return r.Reader.Read(p[:min(len(p), 32<<10)])
}

func slowReaders(t *testing.T, m *mesh) {
	const size = 1 << 20
	var all sync.WaitGroup
	for i := range 8 {
		port := 8080 + i%2 // the far side in both protocols
		id := fmt.Sprintf("slow-%d", i)
		c, _ := request(t, m, "GET /?id=%s&n=%d HTTP/1.1\r\nHost: payments.shop:%d\r\n\r\n", id, size, port)
		all.Go(func() {
			defer c.Close()
			answered(t, bufio.NewReaderSize(trickle{c}, 32<<10), id, size)
		})
	}
	for i := range 4 { // over TCP
		id := fmt.Sprintf("slow-raw-%d", i)
		all.Go(func() {
			want := append([]byte(id+"\n"), stamped(id, size)...)
			c, err := net.Dial("tcp", m.tcp)
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(patience))
			go func() { _, _ = c.Write(want); _ = c.(*net.TCPConn).CloseWrite() }()
			if got, err := io.ReadAll(trickle{c}); err != nil || !bytes.HasPrefix(got, want) || !bytes.HasSuffix(got, []byte("the end of "+id+"\n")) {
				t.Errorf("%s: %d bytes, %v", id, len(got), err)
			}
		})
	}
	for i := range 8 { // and such as never read
		c, _ := request(t, m, "GET /?id=never-%d&n=%d HTTP/1.1\r\nHost: payments.shop:%d\r\n\r\n", i, 16<<20, 8080+i%2)
		defer c.Close()
	}
	all.Wait()
}

func slowWriters(t *testing.T, m *mesh) {
	var all sync.WaitGroup
	for i := range 8 {
		id := fmt.Sprintf("drib-%d", i)
		all.Go(func() { // a caller that sends byte by byte
			text := fmt.Sprintf("PUT /?id=%s&n=3000&sent=200 HTTP/1.1\r\nHost: payments.shop:%d\r\nContent-Length: 200\r\n\r\n%s", id, 8080+i%2, stamped(id, 200))
			c, br := request(t, m, "%s", text[:1])
			defer c.Close()
			for i := range len(text) - 1 {
				_, _ = io.WriteString(c, text[i+1:i+2])
				time.Sleep(2 * time.Millisecond)
			}
			answered(t, br, id, 3000)
		})
		all.Go(func() { // an application that does
			c, br := request(t, m, "GET /?id=%s&n=5000&slow=1 HTTP/1.1\r\nHost: payments.shop:%d\r\n\r\n", id, 8080+i%2)
			defer c.Close()
			answered(t, br, id, 5000)
		})
	}
	all.Wait()
}

func resets(t *testing.T, m *mesh) {
	for i := range 8 { // a tunnel, by the caller
		c, err := net.Dial("tcp", m.tcp)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(c, "reset-raw-%d\n%s", i, stamped("x", 100_000))
		_, _ = io.ReadFull(c, make([]byte, 10))
		_ = c.(*net.TCPConn).SetLinger(0)
		_ = c.Close()
	}
	for i := range 40 {
		port := 8080 + i%2
		switch id := fmt.Sprintf("reset-%d", i); i / 2 % 3 {
		case 0: // by the caller, within the answer
			c, br := request(t, m, "GET /?id=%s&n=1000000 HTTP/1.1\r\nHost: payments.shop:%d\r\n\r\n", id, port)
			_, _ = br.ReadString('\n')
			_ = c.(*net.TCPConn).SetLinger(0)
			_ = c.Close()
		case 1: // by the caller, within its own body
			c, _ := request(t, m, "PUT /?id=%s&n=10 HTTP/1.1\r\nHost: payments.shop:%d\r\nContent-Length: 200000\r\n\r\n%s", id, port, stamped(id, 70_000))
			time.Sleep(5 * time.Millisecond)
			_ = c.(*net.TCPConn).SetLinger(0)
			_ = c.Close()
		case 2: // by the application
			c, br := request(t, m, "POST /?id=%s&n=100000&abort=1 HTTP/1.1\r\nHost: payments.shop:%d\r\nContent-Length: 0\r\n\r\n", id, port)
			if resp, err := http.ReadResponse(br, nil); err != nil {
				t.Errorf("%s: %v", id, err)
			} else if body, err := io.ReadAll(resp.Body); err == nil || !bytes.Equal(body, stamped(id, len(body))) {
				t.Errorf("%s: the answer broke off, and looks whole or wrong: %d bytes, %v", id, len(body), err)
			}
			_ = c.Close()
		}
	}
}

// halfCloses: tr.raw does so all the time; here callers of HTTP/1.1 do.
func halfCloses(t *testing.T, m *mesh) {
	for i := range 16 {
		id := fmt.Sprintf("half-%d", i)
		c, br := request(t, m, "PUT /?id=%s&n=60000&sent=20000 HTTP/1.1\r\nHost: payments.shop:%d\r\nContent-Length: 20000\r\n\r\n%s", id, 8080+i%2, stamped(id, 20000))
		_ = c.(*net.TCPConn).CloseWrite()
		answered(t, br, id, 60000)
		_ = c.Close()
	}
}

func killed(t *testing.T, m *mesh) {
	for i := range 8 {
		time.Sleep(200 * time.Millisecond)
		c := m.cables[i%2]
		c.cut()
		time.Sleep(100 * time.Millisecond)
		c.mend()
		m.callers.round() // so that no call is hurt more often than it may be sent again
	}
}

// goAway drains one endpoint, then the other.
func goAway(t *testing.T, m *mesh) {
	for i := range 8 {
		m.pays[i%2].faults(proxy.Fault{Drill: "d", Mode: proxy.FaultDrain, Share: 100})
		time.Sleep(200 * time.Millisecond)
		m.pays[i%2].faults()
		time.Sleep(100 * time.Millisecond)
		m.callers.round()
	}
}

func tableSwap(t *testing.T, m *mesh) {
	for i := range 200 {
		switch i % 3 {
		case 0:
			m.route(m.addressed[0])
		case 1:
			m.route(m.addressed[1])
		case 2:
			m.route(m.addressed...)
		}
		m.open(m.pays[i%2])
		time.Sleep(10 * time.Millisecond)
	}
}

func rotation(t *testing.T, m *mesh) {
	const life = 2250 * time.Millisecond // NotAfter has whole seconds: at least 1.25 s
	for range 12 {
		m.front.src.SetSVID(m.west.SVID("/ns/shop/sa/frontend", life))
		for _, p := range m.pays {
			p.src.SetSVID(m.west.SVID("/ns/shop/sa/payments", life))
		}
		time.Sleep(250 * time.Millisecond)
	}
	m.front.src.SetSVID(m.west.SVID("/ns/shop/sa/frontend", time.Hour))
	for _, p := range m.pays {
		p.src.SetSVID(m.west.SVID("/ns/shop/sa/payments", time.Hour))
	}
}

// longHeads: a head of a mebibyte is refused, and costs nobody else anything.
func longHeads(t *testing.T, m *mesh) {
	long := strings.Repeat("x", 1<<20)
	var all sync.WaitGroup
	for i := range 4 {
		all.Go(func() { // of a request
			c, err := net.Dial("tcp", m.front.outbound)
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(patience))
			go func() {
				fmt.Fprintf(c, "GET /?id=long HTTP/1.1\r\nHost: payments.shop:8080\r\nX-Long: %s\r\n\r\n", long)
			}()
			resp, err := http.ReadResponse(bufio.NewReader(c), nil)
			if err != nil || resp.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
				t.Errorf("a request's head of 1 MiB: %v, %v", resp, err)
			}
		})
		all.Go(func() { // of an answer
			c, br := request(t, m, "GET /?id=head-%d&n=10&head=%d HTTP/1.1\r\nHost: payments.shop:%d\r\n\r\n", i, 1<<20, 8080+i%2)
			defer c.Close()
			resp, err := http.ReadResponse(br, nil)
			if err != nil || resp.StatusCode != http.StatusBadGateway {
				t.Errorf("an answer's head of 1 MiB: %v, %v", resp, err)
			}
		})
	}
	all.Go(func() { // of a request over HTTP/2
		req, _ := http.NewRequestWithContext(t.Context(), "GET", "http://payments.shop:8081/?id=long", nil)
		req.Header.Set("X-Long", long)
		protocols := new(http.Protocols)
		protocols.SetUnencryptedHTTP2(true)
		via := &http.Transport{Protocols: protocols, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "tcp", m.front.outbound)
		}}
		defer via.CloseIdleConnections()
		resp, err := via.RoundTrip(req)
		if err == nil && resp.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
			t.Errorf("a request's head of 1 MiB over HTTP/2: %s", resp.Status)
		}
	})
	all.Wait()
}

// TestApplicationSendsGoAway: a gRPC server that ends its connections all the time (MaxConnectionAge) loses no call.
func TestApplicationSendsGoAway(t *testing.T) {
	srv := grpc.NewServer(grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionAge: 30 * time.Millisecond, MaxConnectionAgeGrace: 10 * time.Second}))
	srv.RegisterService(&echoService, nil)
	ln := listen(t)
	go func() { _ = srv.Serve(ln) }()
	t.Cleanup(srv.Stop)
	front, _ := pairWith(t, proxy.GRPC, ln.Addr().String())
	conn := grpcClient(t, front)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	var callers sync.WaitGroup
	for i := range 8 {
		callers.Go(func() {
			for k := range 50 {
				id := fmt.Sprintf("%d-%d", i, k)
				out := new(wrapperspb.StringValue)
				if err := conn.Invoke(ctx, "/test.Echo/Unary", wrapperspb.String(id), out); err != nil || !strings.HasPrefix(out.Value, id+" ") {
					t.Errorf("call %s: %q, %v", id, out.Value, err)
					return
				}
			}
		})
	}
	callers.Wait()
}

// TestTunnelOfDeadCaller: a tunnel ends with its caller's connection, and with the sidecars', though the caller had ended its own
// direction before, and the application says nothing.
func TestTunnelOfDeadCaller(t *testing.T) {
	for _, captured := range []bool{false, true} {
		ln, ended := listen(t), make(chan net.Conn, 1)
		go func() {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			_, _ = io.Copy(io.Discard, c)
			ended <- c // and it keeps its own direction open
		}()
		k := newKernel(t)
		mesh := &addresses{at: map[string]*proxy.Service{"240.0.0.7": service(proxy.TCP)}}
		west := proxytest.NewDomain(t, "west.test")
		pay := start(t, west.Source("/ns/shop/sa/payments"), func(c *sidecar.Config) { c.Apps[8080] = ln.Addr().String() })
		pay.serves(proxy.TCP, authority)
		front := start(t, west.Source("/ns/shop/sa/frontend"), k.outbound(mesh), func(c *sidecar.Config) { c.DrainTimeout = 50 * time.Millisecond })
		front.calls(proxy.TCP, authority, []*proxy.Endpoint{pay.endpoint("e1")})
		var c net.Conn
		if captured {
			c = k.connect("240.0.0.7:8080")
		} else {
			var err error
			if c, err = net.Dial("tcp", front.outbound); err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			fmt.Fprint(c, "CONNECT payments.shop:8080 HTTP/1.1\r\nHost: payments.shop:8080\r\n\r\n")
			if _, err := c.Read(make([]byte, 100)); err != nil {
				t.Fatal(err)
			}
		}
		_ = c.(*net.TCPConn).CloseWrite()
		kept := <-ended
		front.stop()
		eventually(t, "the end of the tunnel", func() bool { return strings.Contains(pay.log.String(), `"protocol":"tcp"`) })
		_ = kept.Close()
	}
}

// TestIdleTunnelsHoldNoBuffers: a tunnel that carries nothing costs little, of all that is there: both sidecars, and both applications.
func TestIdleTunnelsHoldNoBuffers(t *testing.T) {
	k := newKernel(t)
	mesh := &addresses{at: map[string]*proxy.Service{"240.0.0.7": service(proxy.TCP)}}
	_, _ = pairWith(t, proxy.TCP, tcpApp(t), k.outbound(mesh))
	open := func(n int) {
		for range n {
			if _, err := io.ReadFull(k.connect("240.0.0.7:8080"), make([]byte, 6)); err != nil {
				t.Fatal(err)
			}
		}
	}
	memory := func() int {
		runtime.GC()
		runtime.GC() // pools keep what they have for one more
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int(m.HeapAlloc + m.StackInuse)
	}
	open(50)
	before := memory()
	const n = 400
	open(n)
	if each := (memory() - before) / n; each > 2*30<<10 {
		t.Errorf("%d bytes for a tunnel", each)
	} else {
		t.Logf("%d bytes for a tunnel", each)
	}
}

// TestIdleHalfClosedTunnel: a tunnel that its application has half-closed ends when it is idle, though the caller never closes.
func TestIdleHalfClosedTunnel(t *testing.T) {
	ln := listen(t)
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			_ = c.(*net.TCPConn).CloseWrite()
		}
	}()
	west := proxytest.NewDomain(t, "west.test")
	pay := start(t, west.Source("/ns/shop/sa/payments"), func(c *sidecar.Config) { c.Apps[8080], c.IdleTimeout = ln.Addr().String(), 100*time.Millisecond })
	pay.serves(proxy.TCP, authority)
	front := start(t, west.Source("/ns/shop/sa/frontend"))
	front.calls(proxy.TCP, authority, []*proxy.Endpoint{pay.endpoint("e1")})
	c, err := net.Dial("tcp", front.outbound)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fmt.Fprint(c, "CONNECT payments.shop:8080 HTTP/1.1\r\nHost: payments.shop:8080\r\n\r\n")
	eventually(t, "the end of the tunnel", func() bool { return strings.Contains(pay.log.String(), `"protocol":"tcp"`) })
}
