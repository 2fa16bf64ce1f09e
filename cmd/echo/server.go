package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/coder/websocket"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	xdscreds "google.golang.org/grpc/credentials/xds"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/xds"

	"github.com/hanse-mesh/hanse/cmd/echo/echopb"
)

// Who is what every answer begins with.
type Who struct {
	Service     string `json:"service"`
	Cluster     string `json:"cluster"`
	Region      string `json:"region"`
	Zone        string `json:"zone"`
	Instance    string `json:"instance"`
	Caller      string `json:"caller"`                // SPIFFE ID from x-forwarded-client-cert
	PeerAddress string `json:"peerAddress,omitempty"` // of the hop connection, if the sidecar reports it
}

// Answer is the body of an HTTP answer.
type Answer struct {
	Who
	Method   string            `json:"method"`
	Host     string            `json:"host"`
	Path     string            `json:"path"` // with query
	Protocol string            `json:"protocol"`
	Headers  map[string]string `json:"headers"` // without cookies and credentials
	Body     string            `json:"body,omitempty"`
	Length   int64             `json:"length"` // of the request's body
}

// server answers.
type server struct {
	echopb.UnimplementedEchoServer

	who     Who
	errors  float64       // share of requests that fail with 503
	latency time.Duration // of every request
	rnd     func() float64
}

const (
	maxEcho     = 1 << 20 // of a body that is given back in an Answer
	maxDatagram = 64 << 10
)

func serveMain(args []string, stderr io.Writer) int {
	s := &server{rnd: rand.Float64}
	flags := flag.NewFlagSet("echo serve", flag.ContinueOnError)
	flags.SetOutput(stderr)
	var http, tcp, udp, xdsAddrs addresses
	flags.Var(&http, "http", "`address` for HTTP/1.1, HTTP/2, WebSocket and gRPC (with its health service): host:port or unix:/path; may be repeated")
	flags.Var(&tcp, "tcp", "`address` for raw TCP, which gives back every byte; may be repeated")
	flags.Var(&udp, "udp", "`address` (host:port) for UDP, which gives back every datagram; may be repeated")
	flags.Var(&xdsAddrs, "xds", "`address` (ip:port) for gRPC as a member of the mesh without a sidecar: mTLS and policy come by xDS; may be repeated")
	flags.StringVar(&s.who.Service, "service", "echo", "name of the service")
	flags.StringVar(&s.who.Cluster, "cluster", "", "cluster")
	flags.StringVar(&s.who.Region, "region", "", "region")
	flags.StringVar(&s.who.Zone, "zone", "", "zone")
	flags.StringVar(&s.who.Instance, "instance", "", "name of this instance; default: process ID")
	flags.Float64Var(&s.errors, "errors", 0, "share of requests, 0 to 1, that fail with 503 (UNAVAILABLE)")
	flags.DurationVar(&s.latency, "latency", 0, "wait before each answer")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	if len(http)+len(tcp)+len(udp)+len(xdsAddrs) == 0 || flags.NArg() > 0 {
		fmt.Fprintf(stderr, "echo serve: give --http, --tcp, --udp or --xds addresses, and nothing else\n")
		return 2
	}
	if s.who.Instance == "" {
		s.who.Instance = strconv.Itoa(os.Getpid())
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := s.run(ctx, http, tcp, udp, xdsAddrs); err != nil {
		fmt.Fprintf(stderr, "echo: %v\n", err)
		return 1
	}
	return 0
}

type addresses []string

func (a *addresses) String() string { return strings.Join(*a, ",") }

func (a *addresses) Set(s string) error {
	*a = append(*a, s)
	return nil
}

func listen(address string) (net.Listener, error) {
	path, ok := strings.CutPrefix(address, "unix:")
	if !ok {
		return net.Listen("tcp", address)
	}
	if fi, err := os.Lstat(path); err == nil && fi.Mode()&os.ModeSocket != 0 {
		if c, err := net.Dial("unix", path); err == nil {
			_ = c.Close()
			return nil, fmt.Errorf("%s is in use", path)
		}
		if err := os.Remove(path); err != nil { // left by a dead process
			return nil, err
		}
	}
	return net.Listen("unix", path)
}

// run serves until ctx ends, then finishes what is open, up to 5 s.
func (s *server) run(ctx context.Context, httpAddrs, tcpAddrs, udpAddrs, xdsAddrs []string) error {
	var listeners []net.Listener
	var sockets []net.PacketConn
	closeAll := func() {
		for _, ln := range listeners {
			_ = ln.Close()
		}
		for _, c := range sockets {
			_ = c.Close()
		}
	}
	for _, a := range udpAddrs {
		c, err := net.ListenPacket("udp", a)
		if err != nil {
			closeAll()
			return err
		}
		sockets = append(sockets, c)
	}
	for _, a := range slices.Concat(httpAddrs, tcpAddrs, xdsAddrs) {
		ln, err := listen(a)
		if err != nil {
			closeAll()
			return err
		}
		listeners = append(listeners, ln)
	}
	grpcServer := grpc.NewServer()
	echopb.RegisterEchoServer(grpcServer, s)
	healthpb.RegisterHealthServer(grpcServer, health.NewServer())
	meshServer, err := s.meshServer(len(xdsAddrs) > 0)
	if err != nil {
		closeAll()
		return err
	}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	web := &http.Server{Protocols: protocols, ReadHeaderTimeout: 10 * time.Second, Handler: s.handler(grpcServer)}
	stop := context.AfterFunc(ctx, closeAll)
	defer stop()
	var all sync.WaitGroup
	for i, ln := range listeners {
		switch {
		case i < len(httpAddrs):
			all.Go(func() { _ = web.Serve(ln) })
		case i < len(httpAddrs)+len(tcpAddrs):
			all.Go(func() { serveTCP(ctx, ln) })
		default:
			all.Go(func() { _ = meshServer.Serve(ln) })
		}
	}
	for _, c := range sockets {
		all.Go(func() { serveUDP(c) })
	}
	<-ctx.Done()
	drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	if web.Shutdown(drain) != nil {
		_ = web.Close()
	}
	grpcServer.Stop()
	if meshServer != nil {
		meshServer.Stop()
	}
	all.Wait()
	return nil
}

// meshServer is gRPC's own xDS server; nil unless wanted, as it needs a bootstrap file.
func (s *server) meshServer(wanted bool) (*xds.GRPCServer, error) {
	if !wanted {
		return nil, nil
	}
	creds, err := xdscreds.NewServerCredentials(xdscreds.ServerOptions{FallbackCreds: refuse{insecure.NewCredentials()}})
	if err != nil {
		return nil, err
	}
	g, err := xds.NewGRPCServer(grpc.Creds(creds))
	if err != nil {
		return nil, fmt.Errorf("xDS server: %w", err)
	}
	echopb.RegisterEchoServer(g, s)
	return g, nil
}

// handler gives gRPC its calls, and answers the rest.
func (s *server) handler(grpcServer *grpc.Server) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/ws", s.webSocket)
	mux.HandleFunc("/raw", s.raw)
	mux.HandleFunc("/bytes/{n}", s.bytes)
	mux.HandleFunc("/status/{code}", s.status)
	mux.HandleFunc("/", s.echo)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ProtoMajor == 2 && strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc") {
			grpcServer.ServeHTTP(w, r)
			return
		}
		if s.latency > 0 {
			time.Sleep(s.latency)
		}
		if s.errors > 0 && s.rnd() < s.errors {
			http.Error(w, "echo: failing as told by --errors", http.StatusServiceUnavailable)
			return
		}
		mux.ServeHTTP(w, r)
	})
}

func (s *server) whoFor(cert, peer string) Who {
	w := s.who
	w.Caller, w.PeerAddress = callerOf(cert), peer
	return w
}

// callerOf takes the URI out of x-forwarded-client-cert.
func callerOf(cert string) string {
	for part := range strings.SplitSeq(cert, ";") {
		if uri, ok := strings.CutPrefix(strings.TrimSpace(part), "URI="); ok {
			return uri
		}
	}
	return ""
}

// echo answers with an Answer.
func (s *server) echo(w http.ResponseWriter, r *http.Request) {
	a := Answer{Who: s.whoFor(r.Header.Get("X-Forwarded-Client-Cert"), r.Header.Get("Hanse-Peer-Address")), Method: r.Method, Host: r.Host,
		Path: r.URL.RequestURI(), Protocol: r.Proto, Headers: map[string]string{}}
	for name, values := range r.Header {
		switch name {
		case "Cookie", "Authorization", "Proxy-Authorization":
		default:
			a.Headers[strings.ToLower(name)] = strings.Join(values, ", ")
		}
	}
	body, err := io.ReadAll(io.LimitReader(r.Body, maxEcho))
	if err == nil {
		var rest int64
		rest, err = io.Copy(io.Discard, r.Body)
		a.Length = int64(len(body)) + rest
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	a.Body = string(body)
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(a)
}

// raw gives back the body as it comes.
func (s *server) raw(w http.ResponseWriter, r *http.Request) {
	rc := http.NewResponseController(w)
	if r.ProtoMajor == 1 {
		_ = rc.EnableFullDuplex()
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	buf := make([]byte, 32<<10)
	for {
		n, err := r.Body.Read(buf)
		if n > 0 {
			if _, err := w.Write(buf[:n]); err != nil {
				return
			}
			_ = rc.Flush()
		}
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			panic(http.ErrAbortHandler)
		}
	}
}

// bytes answers with n bytes.
func (s *server) bytes(w http.ResponseWriter, r *http.Request) {
	n, err := strconv.ParseInt(r.PathValue("n"), 10, 64)
	if err != nil || n < 0 {
		http.Error(w, "want a number of bytes", http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Content-Length", strconv.FormatInt(n, 10))
	_, _ = io.CopyN(w, pattern{}, n)
}

// pattern is an endless sequence of the alphabet.
type pattern struct{}

func (pattern) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = byte('a' + i%26)
	}
	return len(p), nil
}

// status answers with a status.
func (s *server) status(w http.ResponseWriter, r *http.Request) {
	code, err := strconv.Atoi(r.PathValue("code"))
	if err != nil || code < 200 || code > 599 {
		code = http.StatusBadRequest
	}
	w.WriteHeader(code)
}

// webSocket first sends who it is, then gives back every message.
func (s *server) webSocket(w http.ResponseWriter, r *http.Request) {
	c, err := websocket.Accept(w, r, &websocket.AcceptOptions{InsecureSkipVerify: true})
	if err != nil {
		return
	}
	defer c.CloseNow()
	who, err := json.Marshal(s.whoFor(r.Header.Get("X-Forwarded-Client-Cert"), r.Header.Get("Hanse-Peer-Address")))
	if err != nil || c.Write(r.Context(), websocket.MessageText, who) != nil {
		return
	}
	for {
		kind, data, err := c.Read(r.Context())
		if err != nil {
			return
		}
		if c.Write(r.Context(), kind, data) != nil {
			return
		}
	}
}

// serveTCP gives back every byte, and then the end.
func serveTCP(ctx context.Context, ln net.Listener) {
	var conns sync.WaitGroup
	defer conns.Wait()
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		conns.Go(func() {
			defer c.Close()
			stop := context.AfterFunc(ctx, func() { _ = c.Close() })
			defer stop()
			if _, err := io.Copy(c, c); err == nil {
				if w, ok := c.(interface{ CloseWrite() error }); ok {
					_ = w.CloseWrite()
				}
			}
		})
	}
}

// serveUDP gives back every datagram until c is closed.
func serveUDP(c net.PacketConn) {
	buf := make([]byte, maxDatagram)
	for {
		n, from, err := c.ReadFrom(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil {
			_, _ = c.WriteTo(buf[:n], from)
		}
	}
}

func (s *server) reply(ctx context.Context, req *echopb.Request, number uint32) (*echopb.Reply, error) {
	if d := s.latency + time.Duration(req.GetDelayMs())*time.Millisecond; d > 0 {
		timer := time.NewTimer(d)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-ctx.Done():
			return nil, status.FromContextError(ctx.Err()).Err()
		}
	}
	if req.GetStatus() != 0 {
		return nil, status.Error(codes.Code(req.GetStatus()), "as the request wants")
	}
	if s.errors > 0 && s.rnd() < s.errors {
		return nil, status.Error(codes.Unavailable, "failing as told by --errors")
	}
	md, _ := metadata.FromIncomingContext(ctx)
	cert := ""
	if p, ok := peer.FromContext(ctx); ok { // without a sidecar the caller is in the TLS connection
		if info, ok := p.AuthInfo.(credentials.TLSInfo); ok && info.SPIFFEID != nil {
			cert = "URI=" + info.SPIFFEID.String()
		}
	}
	first := func(name string) string {
		if v := md.Get(name); len(v) > 0 {
			return v[0]
		}
		return ""
	}
	w := s.whoFor(cmp.Or(cert, first("x-forwarded-client-cert")), first("hanse-peer-address"))
	return &echopb.Reply{Message: req.GetMessage(), Number: number, Padding: make([]byte, min(req.GetSize(), 1<<20)), Who: &echopb.Who{
		Service: w.Service, Cluster: w.Cluster, Region: w.Region, Zone: w.Zone, Instance: w.Instance, Caller: w.Caller, PeerAddress: w.PeerAddress}}, nil
}

// Unary implements echopb.EchoServer.
func (s *server) Unary(ctx context.Context, req *echopb.Request) (*echopb.Reply, error) {
	return s.reply(ctx, req, 0)
}

// ClientStream implements echopb.EchoServer.
func (s *server) ClientStream(stream grpc.ClientStreamingServer[echopb.Request, echopb.Reply]) error {
	var messages []string
	for {
		req, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			reply, err := s.reply(stream.Context(), &echopb.Request{Message: strings.Join(messages, ",")}, uint32(len(messages)))
			if err != nil {
				return err
			}
			return stream.SendAndClose(reply)
		}
		if err != nil {
			return err
		}
		messages = append(messages, req.GetMessage())
	}
}

// ServerStream implements echopb.EchoServer.
func (s *server) ServerStream(req *echopb.Request, stream grpc.ServerStreamingServer[echopb.Reply]) error {
	for n := range req.GetCount() {
		reply, err := s.reply(stream.Context(), req, n)
		if err != nil {
			return err
		}
		if err := stream.Send(reply); err != nil {
			return err
		}
	}
	return nil
}

// BidiStream implements echopb.EchoServer.
func (s *server) BidiStream(stream grpc.BidiStreamingServer[echopb.Request, echopb.Reply]) error {
	for n := uint32(0); ; n++ {
		req, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		reply, err := s.reply(stream.Context(), req, n)
		if err != nil {
			return err
		}
		if err := stream.Send(reply); err != nil {
			return err
		}
	}
}
