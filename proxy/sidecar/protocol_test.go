package sidecar_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	"golang.org/x/net/http2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/hanse-mesh/hanse/proxy"
	"github.com/hanse-mesh/hanse/proxy/proxytest"
	"github.com/hanse-mesh/hanse/proxy/sidecar"
)

// TestHTTP2 speaks HTTP/2 on both sides.
func TestHTTP2(t *testing.T) {
	front, _ := pair(t, proxy.HTTP2, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%s %s", r.Proto, r.Host)
	}))
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	tr := &http.Transport{Protocols: protocols, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", front.outbound)
	}}
	defer tr.CloseIdleConnections()
	resp, err := (&http.Client{Transport: tr}).Get("http://payments:8080/x")
	if got := text(t, resp, err); got != "HTTP/2.0 payments:8080" || resp.ProtoMajor != 2 {
		t.Errorf("%s over %s", got, resp.Proto)
	}
}

// TestOriginForm: a request with only a Host header is routed, too.
func TestOriginForm(t *testing.T) {
	front, _ := pair(t, proxy.HTTP, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.Host) }))
	req, _ := http.NewRequestWithContext(t.Context(), "GET", "http://"+front.outbound+"/", nil)
	req.Host = "payments.shop.svc.clusterset.local:8080"
	resp, err := http.DefaultClient.Do(req)
	if got := text(t, resp, err); got != req.Host {
		t.Errorf("got %q", got)
	}
	http.DefaultClient.CloseIdleConnections()
}

// TestBidirectionalStream: request and response flow at the same time, and nobody waits for an end.
func TestBidirectionalStream(t *testing.T) {
	front, _ := pair(t, proxy.HTTP, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rc := http.NewResponseController(w)
		_ = rc.EnableFullDuplex()
		_ = rc.Flush()
		br := bufio.NewReader(r.Body)
		for {
			line, err := br.ReadString('\n')
			if err != nil {
				return
			}
			fmt.Fprintf(w, "echo %s", line)
			_ = rc.Flush()
		}
	}))
	pr, pw := io.Pipe()
	req, _ := http.NewRequestWithContext(t.Context(), "POST", "http://payments:8080/", pr)
	resp, err := front.http().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	br := bufio.NewReader(resp.Body)
	for i := range 5 {
		fmt.Fprintf(pw, "%d\n", i)
		if line, err := br.ReadString('\n'); err != nil || line != fmt.Sprintf("echo %d\n", i) {
			t.Fatalf("line %d: %q, %v", i, line, err)
		}
	}
	_ = pw.Close()
	if rest, err := io.ReadAll(br); err != nil || len(rest) != 0 {
		t.Errorf("rest %q, %v", rest, err)
	}
}

// TestLargeBodies: bytes are equal both ways, and a slow reader holds the sender back.
func TestLargeBodies(t *testing.T) {
	const size = 8 << 20
	front, _ := pair(t, proxy.HTTP, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := sha256.New()
		if _, err := io.Copy(h, r.Body); err != nil {
			t.Error(err)
		}
		w.Header().Set("X-Sum", fmt.Sprintf("%x", h.Sum(nil)))
		_, _ = io.Copy(w, io.LimitReader(noise(), size))
	}))
	sum := sha256.New()
	req, _ := http.NewRequestWithContext(t.Context(), "PUT", "http://payments:8080/", io.TeeReader(io.LimitReader(noise(), size), sum))
	resp, err := front.http().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if got := resp.Header.Get("X-Sum"); got != fmt.Sprintf("%x", sum.Sum(nil)) {
		t.Errorf("upload arrived as %s", got)
	}
	down, want := sha256.New(), sha256.New()
	if n, err := io.Copy(down, resp.Body); n != size || err != nil {
		t.Fatalf("%d bytes, %v", n, err)
	}
	_, _ = io.Copy(want, io.LimitReader(noise(), size))
	if !bytes.Equal(down.Sum(nil), want.Sum(nil)) {
		t.Error("download differs")
	}
}

// noise is endless and the same each time.
func noise() io.Reader { return rand.NewChaCha8([32]byte{1}) }

// TestBackPressure: what the caller does not read does not pile up in the proxies.
func TestBackPressure(t *testing.T) {
	wrote := make(chan int64, 1)
	front, _ := pair(t, proxy.HTTP, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rc := http.NewResponseController(w)
		_ = rc.SetWriteDeadline(time.Now().Add(700 * time.Millisecond))
		n, _ := io.Copy(w, io.LimitReader(noise(), 256<<20))
		wrote <- n
	}))
	resp, err := front.http().Get("http://payments:8080/")
	if err != nil {
		t.Fatal(err)
	}
	if n := <-wrote; n > 64<<20 {
		t.Errorf("the application could write %d bytes that nobody read", n)
	}
	_ = resp.Body.Close()
}

// TestBrokenAnswer: an answer that breaks off must look broken to the caller.
func TestBrokenAnswer(t *testing.T) {
	front, _ := pair(t, proxy.HTTP, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, "half")
		_ = http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	}))
	resp, err := front.http().Get("http://payments:8080/")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if b, err := io.ReadAll(resp.Body); err == nil {
		t.Errorf("read %q without an error", b)
	}
}

// echoService is a gRPC service with all kinds of methods, without generated code.
var echoService = grpc.ServiceDesc{ServiceName: "test.Echo", HandlerType: (*any)(nil),
	Methods: []grpc.MethodDesc{{MethodName: "Unary", Handler: func(_ any, ctx context.Context, dec func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
		in := new(wrapperspb.StringValue)
		if err := dec(in); err != nil {
			return nil, err
		}
		if in.Value == "fail" {
			_ = grpc.SetTrailer(ctx, metadata.Pairs("why", "told"))
			return nil, status.Error(codes.FailedPrecondition, "as told: 100 %")
		}
		md, _ := metadata.FromIncomingContext(ctx)
		return wrapperspb.String(in.Value + " " + strings.Join(md.Get("x-forwarded-client-cert"), "|")), nil
	}}},
	Streams: []grpc.StreamDesc{{StreamName: "Bidi", ServerStreams: true, ClientStreams: true, Handler: func(_ any, stream grpc.ServerStream) error {
		for {
			in := new(wrapperspb.StringValue)
			if err := stream.RecvMsg(in); err != nil {
				if errors.Is(err, io.EOF) {
					stream.SetTrailer(metadata.Pairs("sum", "done"))
					return nil
				}
				return err
			}
			if err := stream.SendMsg(wrapperspb.String("re: " + in.Value)); err != nil {
				return err
			}
		}
	}}},
}

func grpcClient(t *testing.T, front *node) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+front.outbound, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority("payments.shop:8080"), grpc.WithNoProxy())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func TestGRPC(t *testing.T) {
	srv := grpc.NewServer()
	srv.RegisterService(&echoService, nil)
	path := filepath.Join(t.TempDir(), "grpc.sock")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = srv.Serve(ln) }()
	t.Cleanup(srv.Stop)
	front, pay := pairWith(t, proxy.GRPC, "unix:"+path)
	conn := grpcClient(t, front)

	out := new(wrapperspb.StringValue)
	if err := conn.Invoke(t.Context(), "/test.Echo/Unary", wrapperspb.String("hi"), out); err != nil || out.Value != "hi URI=spiffe://west.test/ns/shop/sa/frontend" {
		t.Errorf("unary: %q, %v", out.Value, err)
	}
	var trailer metadata.MD
	err = conn.Invoke(t.Context(), "/test.Echo/Unary", wrapperspb.String("fail"), out, grpc.Trailer(&trailer))
	if s := status.Convert(err); s.Code() != codes.FailedPrecondition || s.Message() != "as told: 100 %" || len(trailer["why"]) != 1 {
		t.Errorf("status %v, trailers %v", err, trailer)
	}
	stream, err := conn.NewStream(t.Context(), &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, "/test.Echo/Bidi")
	if err != nil {
		t.Fatal(err)
	}
	for i := range 5 {
		if err := stream.SendMsg(wrapperspb.String(fmt.Sprint(i))); err != nil {
			t.Fatal(err)
		}
		if err := stream.RecvMsg(out); err != nil || out.Value != fmt.Sprintf("re: %d", i) {
			t.Fatalf("message %d: %q, %v", i, out.Value, err)
		}
	}
	_ = stream.CloseSend()
	if err := stream.RecvMsg(out); !errors.Is(err, io.EOF) || stream.Trailer().Get("sum")[0] != "done" {
		t.Errorf("end: %v, trailers %v", err, stream.Trailer())
	}
	// What the proxies say themselves is said in gRPC's way.
	pay.control.change(func(t *proxy.Table) {
		t.Inbound = &proxy.Inbound{Ports: []proxy.InboundPort{{Services: []string{authority}, Port: 8080, Protocol: proxy.GRPC}}}
	})
	if err := conn.Invoke(t.Context(), "/test.Echo/Unary", wrapperspb.String("hi"), out); status.Code(err) != codes.PermissionDenied {
		t.Errorf("denied call: %v", err)
	}
	front.control.change(func(t *proxy.Table) { t.Listeners = nil })
	if err := conn.Invoke(t.Context(), "/test.Echo/Unary", wrapperspb.String("hi"), out); status.Code(err) != codes.Unavailable {
		t.Errorf("unknown service: %v", err)
	}
}

// The server's timer may end before its caller's: what it says by a reset is the caller's deadline, and no failure of the application.
func TestGRPCDeadlineAtServer(t *testing.T) {
	front, _ := pairWith(t, proxy.GRPC, h2app(t, func(fr *http2.Framer, stream uint32) { // as a gRPC server whose deadline has passed
		time.Sleep(60 * time.Millisecond)
		_ = fr.WriteRSTStream(stream, http2.ErrCodeCancel)
	}))
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	tr := &http.Transport{Protocols: protocols}
	t.Cleanup(tr.CloseIdleConnections)
	for timeout, want := range map[string]codes.Code{"30m": codes.DeadlineExceeded, "30x": codes.Canceled} { // m: milliseconds
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://"+front.outbound+"/test.Echo/Unary", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Host = "payments.shop:8080"
		req.Header = http.Header{"Content-Type": {"application/grpc"}, "Te": {"trailers"}, "Grpc-Timeout": {timeout}}
		resp, err := tr.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		if got := resp.Header.Get("grpc-status"); got != strconv.Itoa(int(want)) {
			t.Errorf("grpc-timeout %s: status %s (%s), want %v", timeout, got, resp.Header.Get("grpc-message"), want)
		}
	}
}

// h2app is an application that speaks HTTP/2 without net/http: answer does as it likes with each request.
func h2app(t *testing.T, answer func(fr *http2.Framer, stream uint32)) (address string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "h2.sock")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	accept(t, ln, func(c net.Conn) {
		if _, err := io.ReadFull(c, make([]byte, len(http2.ClientPreface))); err != nil {
			return
		}
		fr := http2.NewFramer(c, c)
		_ = fr.WriteSettings()
		for {
			f, err := fr.ReadFrame()
			if err != nil {
				return
			}
			switch f := f.(type) {
			case *http2.SettingsFrame:
				if !f.IsAck() {
					_ = fr.WriteSettingsAck()
				}
			case *http2.PingFrame:
				if !f.IsAck() {
					_ = fr.WritePing(true, f.Data)
				}
			case *http2.HeadersFrame:
				answer(fr, f.StreamID)
			}
		}
	})
	return "unix:" + path
}

func TestWebSocket(t *testing.T) {
	front, _ := pair(t, proxy.HTTP, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/ws" || r.URL.RawQuery != "room=1" {
			http.Error(w, "no such socket", http.StatusNotFound)
			return
		}
		c, err := websocket.Accept(w, r, &websocket.AcceptOptions{InsecureSkipVerify: true, Subprotocols: []string{"chat"}})
		if err != nil {
			t.Error(err)
			return
		}
		defer c.CloseNow()
		_ = c.Write(r.Context(), websocket.MessageText, []byte(r.Header.Get("X-Forwarded-Client-Cert")))
		c.SetReadLimit(1 << 20)
		for {
			kind, b, err := c.Read(r.Context())
			if err != nil {
				return
			}
			_ = c.Write(r.Context(), kind, b)
		}
	}))
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	c, resp, err := websocket.Dial(ctx, "ws://payments.shop:8080/ws?room=1", &websocket.DialOptions{HTTPClient: front.http(), Subprotocols: []string{"chat"}})
	if err != nil {
		t.Fatal(err)
	}
	defer c.CloseNow()
	if c.Subprotocol() != "chat" || resp.Header.Get("Hanse-Status") != "" {
		t.Errorf("subprotocol %q, header %v", c.Subprotocol(), resp.Header)
	}
	if _, b, err := c.Read(ctx); err != nil || string(b) != "URI=spiffe://west.test/ns/shop/sa/frontend" {
		t.Errorf("greeting %q, %v", b, err)
	}
	c.SetReadLimit(1 << 20)
	big := bytes.Repeat([]byte("0123456789"), 50_000)
	if err := c.Write(ctx, websocket.MessageBinary, big); err != nil {
		t.Fatal(err)
	}
	if _, b, err := c.Read(ctx); err != nil || !bytes.Equal(b, big) {
		t.Errorf("%d bytes came back, %v", len(b), err)
	}
	if err := c.Close(websocket.StatusNormalClosure, "bye"); err != nil {
		t.Errorf("close: %v", err)
	}
	_, resp, err = websocket.Dial(ctx, "ws://payments.shop:8080/other", &websocket.DialOptions{HTTPClient: front.http()})
	if err == nil || resp == nil || resp.StatusCode != http.StatusNotFound {
		t.Fatalf("refused upgrade: %v", err)
	}
	if b, _ := io.ReadAll(resp.Body); !strings.Contains(string(b), "no such socket") {
		t.Errorf("body %q", b)
	}
}

// TestUpgradeIsAuthorised: the policy sees an upgrade as the GET that it is.
func TestUpgradeIsAuthorised(t *testing.T) {
	front, pay := pair(t, proxy.HTTP, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { t.Error("reached the application") }))
	pay.control.change(func(t *proxy.Table) {
		in := *t.Inbound
		p := in.Ports[0]
		p.Access.Deny = []proxy.AccessRule{{Policy: "AccessPolicy shop/no-sockets", Methods: []string{"GET"}, Paths: []string{"/ws*"}}}
		in.Ports = []proxy.InboundPort{p}
		t.Inbound = &in
	})
	_, resp, err := websocket.Dial(t.Context(), "ws://payments.shop:8080/ws", &websocket.DialOptions{HTTPClient: front.http()})
	if err == nil || resp == nil || resp.StatusCode != http.StatusForbidden || resp.Header.Get("Hanse-Error") != "denied" {
		t.Errorf("%v", err)
	}
}

// tcpApp gives back what it got, after the client's end.
func tcpApp(t *testing.T) string {
	ln := listen(t)
	accept(t, ln, func(c net.Conn) {
		_, _ = io.WriteString(c, "hello\n")
		b, _ := io.ReadAll(c)
		_, _ = c.Write(b)
	})
	return ln.Addr().String()
}

func TestTCP(t *testing.T) {
	local := listen(t)
	front, _ := pairWith(t, proxy.TCP, tcpApp(t), func(c *sidecar.Config) {
		c.Local = []sidecar.LocalListener{{Listener: local, Authority: "payments.shop:8080"}}
	})
	data := bytes.Repeat([]byte("payload "), 100_000)
	exchange := func(t *testing.T, c net.Conn) {
		t.Helper()
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		br := bufio.NewReader(c)
		if line, err := br.ReadString('\n'); err != nil || line != "hello\n" { // the server speaks first
			t.Fatalf("greeting %q, %v", line, err)
		}
		go func() {
			_, _ = c.Write(data)
			_ = c.(interface{ CloseWrite() error }).CloseWrite()
		}()
		if b, err := io.ReadAll(br); err != nil || !bytes.Equal(b, data) {
			t.Errorf("%d bytes came back, %v", len(b), err)
		}
	}
	t.Run("local listener", func(t *testing.T) {
		c, err := net.Dial("tcp", local.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		exchange(t, c)
	})
	t.Run("CONNECT", func(t *testing.T) {
		c, err := net.Dial("tcp", front.outbound)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprint(c, "CONNECT payments.shop:8080 HTTP/1.1\r\nHost: payments.shop:8080\r\n\r\n")
		br := bufio.NewReaderSize(c, 16)
		for {
			line, err := br.ReadString('\n')
			if err != nil {
				t.Fatal(err)
			}
			if line == "\r\n" {
				break
			}
		}
		early, _ := br.Peek(br.Buffered())
		exchange(t, readAhead{c.(*net.TCPConn), io.MultiReader(bytes.NewReader(early), c)})
	})
	t.Run("unknown", func(t *testing.T) {
		c, err := net.Dial("tcp", front.outbound)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		fmt.Fprint(c, "CONNECT other.shop:1 HTTP/1.1\r\nHost: other.shop:1\r\n\r\n")
		resp, err := http.ReadResponse(bufio.NewReader(c), &http.Request{Method: "CONNECT"})
		if err != nil || resp.StatusCode != http.StatusBadGateway || resp.Header.Get("Hanse-Error") != "unknown_service" {
			t.Errorf("%v, %v", resp, err)
		}
	})
}

type readAhead struct {
	*net.TCPConn
	r io.Reader
}

func (c readAhead) Read(p []byte) (int, error) { return c.r.Read(p) }

// TestLocalListenerHTTP: the service's own name is the Host.
func TestLocalListenerHTTP(t *testing.T) {
	local := listen(t)
	west := proxytest.NewDomain(t, "west.test")
	pay := start(t, west.Source("/ns/shop/sa/payments"), func(c *sidecar.Config) {
		c.Apps[8080] = app(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.Host) }))
	})
	pay.serves(proxy.HTTP, authority)
	front := start(t, west.Source("/ns/shop/sa/frontend"), func(c *sidecar.Config) {
		c.Local = []sidecar.LocalListener{{Listener: local, Authority: "payments:8080"}}
	})
	front.calls(proxy.HTTP, authority, []*proxy.Endpoint{pay.endpoint("e1")})
	resp, err := http.Get("http://" + local.Addr().String() + "/")
	if got := text(t, resp, err); got != authority {
		t.Errorf("Host %q", got)
	}
	http.DefaultClient.CloseIdleConnections()
}
