package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/coder/websocket"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	xdscreds "google.golang.org/grpc/credentials/xds"
	"google.golang.org/grpc/status"
	_ "google.golang.org/grpc/xds" // xds:///

	"github.com/hanse-mesh/hanse/cmd/echo/echopb"
)

// Result is one line of output.
type Result struct {
	OK      bool            `json:"ok"`
	Status  string          `json:"status"`
	Error   string          `json:"error,omitempty"` // hanse-error, or why there was no answer
	Seconds float64         `json:"seconds"`
	Answer  json.RawMessage `json:"answer,omitempty"` // what echo said
	Text    string          `json:"text,omitempty"`   // where it was not JSON
}

// caller calls one URL.
type caller struct {
	target  *url.URL
	proxy   string
	method  string
	body    string
	headers addresses
	timeout time.Duration
	stream  string
	client  *http.Client
}

func callMain(args []string, stdout, stderr io.Writer) int {
	c := &caller{}
	flags := flag.NewFlagSet("echo call", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.StringVar(&c.proxy, "proxy", "127.0.0.1:15001", "the sidecar's outbound `address`; empty: none")
	flags.StringVar(&c.method, "method", http.MethodGet, "HTTP method")
	flags.StringVar(&c.body, "body", "", "request body or message")
	flags.Var(&c.headers, "header", "`name: value` of a header; may be repeated")
	flags.DurationVar(&c.timeout, "timeout", 10*time.Second, "of one call")
	flags.StringVar(&c.stream, "stream", "unary", "of gRPC: unary, client, server or bidi")
	count := flags.Int("count", 1, "number of calls; 0: until interrupted")
	interval := flags.Duration("interval", 0, "between calls")
	linger := flags.Duration("linger", 0, "after a signal go on calling for so long; says so on standard error")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	target, err := url.Parse(flags.Arg(0))
	if flags.NArg() != 1 || err != nil || target.Host == "" && target.Scheme != "xds" {
		fmt.Fprintf(stderr, "echo call: give one URL: http://payments.shop:8080/, ws://…, grpc://…, xds:///…, tcp://… or udp://…\n")
		return 2
	}
	c.target = target
	tr := &http.Transport{DisableCompression: true}
	if c.proxy != "" {
		tr.Proxy = http.ProxyURL(&url.URL{Scheme: "http", Host: c.proxy})
	}
	c.client = &http.Client{Transport: tr, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends it at once
	if *linger > 0 {
		signalled, enough := context.WithCancel(context.Background())
		defer enough()
		context.AfterFunc(ctx, func() {
			fmt.Fprintf(stderr, "echo call: a signal; going on for %s\n", *linger)
			time.AfterFunc(*linger, enough)
		})
		ctx = signalled
	}
	failed := false
	enc := json.NewEncoder(stdout)
	for n := 0; (*count == 0 || n < *count) && ctx.Err() == nil; n++ {
		if n > 0 && *interval > 0 {
			select {
			case <-time.After(*interval):
			case <-ctx.Done():
				return exitOf(failed)
			}
		}
		began := time.Now()
		callCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.timeout) // a call that has begun is finished
		r := c.call(callCtx)
		cancel()
		r.Seconds = time.Since(began).Seconds()
		failed = failed || !r.OK
		if err := enc.Encode(r); err != nil {
			fmt.Fprintf(os.Stderr, "echo call: %v\n", err)
			return 1
		}
	}
	return exitOf(failed)
}

func exitOf(failed bool) int {
	if failed {
		return 1
	}
	return 0
}

func (c *caller) call(ctx context.Context) Result {
	var r Result
	var err error
	switch c.target.Scheme {
	case "http":
		r, err = c.http(ctx)
	case "ws":
		r, err = c.webSocket(ctx)
	case "grpc", "xds":
		r, err = c.grpc(ctx)
	case "tcp":
		r, err = c.tcp(ctx)
	case "udp":
		r, err = c.udp(ctx)
	default:
		err = fmt.Errorf("scheme %q: want http, ws, grpc, xds, tcp or udp", c.target.Scheme)
	}
	if err != nil && r.Error == "" {
		r.Error = err.Error()
	}
	return r
}

func (c *caller) header() http.Header {
	h := http.Header{}
	for _, line := range c.headers {
		name, value, _ := strings.Cut(line, ":")
		h.Add(strings.TrimSpace(name), strings.TrimSpace(value))
	}
	return h
}

func (c *caller) http(ctx context.Context) (r Result, err error) {
	req, err := http.NewRequestWithContext(ctx, c.method, c.target.String(), strings.NewReader(c.body))
	if err != nil {
		return r, err
	}
	req.Header = c.header()
	if host := req.Header.Get("Host"); host != "" {
		req.Host = host
	}
	resp, err := c.client.Do(req)
	if err != nil {
		return r, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 4<<20))
	r.Status, r.OK, r.Error = resp.Status, resp.StatusCode < 400 && err == nil, resp.Header.Get("Hanse-Error")
	r.text(b)
	return r, err
}

func (r *Result) text(b []byte) {
	b = bytes.TrimSpace(b)
	if len(b) > 0 && b[0] == '{' && json.Valid(b) {
		r.Answer = b
	} else {
		r.Text = string(b)
	}
}

func (c *caller) webSocket(ctx context.Context) (r Result, err error) {
	conn, resp, err := websocket.Dial(ctx, c.target.String(), &websocket.DialOptions{HTTPClient: c.client, HTTPHeader: c.header()})
	if resp != nil {
		r.Status, r.Error = resp.Status, resp.Header.Get("Hanse-Error")
	}
	if err != nil {
		return r, err
	}
	defer conn.CloseNow()
	_, who, err := conn.Read(ctx)
	if err != nil {
		return r, err
	}
	if err := conn.Write(ctx, websocket.MessageText, []byte(c.body)); err != nil {
		return r, err
	}
	_, back, err := conn.Read(ctx)
	if err != nil {
		return r, err
	}
	if string(back) != c.body {
		return r, fmt.Errorf("sent %q, got back %q", c.body, back)
	}
	r.OK, r.Answer = true, who
	return r, conn.Close(websocket.StatusNormalClosure, "")
}

// dial connects to the target, through the proxy's CONNECT if there is one.
func (c *caller) dial(ctx context.Context) (net.Conn, error) {
	var d net.Dialer
	if c.proxy == "" {
		return d.DialContext(ctx, "tcp", c.target.Host)
	}
	conn, err := d.DialContext(ctx, "tcp", c.proxy)
	if err != nil {
		return nil, err
	}
	if deadline, ok := ctx.Deadline(); ok {
		_ = conn.SetDeadline(deadline)
	}
	fmt.Fprintf(conn, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", c.target.Host, c.target.Host)
	br := bufio.NewReaderSize(conn, 4<<10)
	resp, err := http.ReadResponse(br, &http.Request{Method: http.MethodConnect})
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		why := resp.Header.Get("Hanse-Error")
		_ = conn.Close()
		return nil, fmt.Errorf("proxy answered %s: %s", resp.Status, why)
	}
	return buffered{conn, br}, nil
}

// buffered is a connection of which some bytes were read ahead.
type buffered struct {
	net.Conn
	r *bufio.Reader
}

func (b buffered) Read(p []byte) (int, error) { return b.r.Read(p) }

func (b buffered) CloseWrite() error {
	if w, ok := b.Conn.(interface{ CloseWrite() error }); ok {
		return w.CloseWrite()
	}
	return errors.ErrUnsupported
}

func (c *caller) tcp(ctx context.Context) (r Result, err error) {
	conn, err := c.dial(ctx)
	if err != nil {
		return r, err
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, c.body); err != nil {
		return r, err
	}
	if w, ok := conn.(interface{ CloseWrite() error }); ok {
		if err := w.CloseWrite(); err != nil {
			return r, err
		}
	}
	b, err := io.ReadAll(io.LimitReader(conn, 4<<20))
	if err != nil {
		return r, err
	}
	r.OK, r.Text = string(b) == c.body, string(b)
	if !r.OK {
		r.Error = "got back other bytes than were sent"
	}
	return r, nil
}

// udp sends one datagram and waits for it to come back. No sidecar carries it.
func (c *caller) udp(ctx context.Context) (r Result, err error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "udp", c.target.Host)
	if err != nil {
		return r, err
	}
	defer conn.Close()
	if deadline, ok := ctx.Deadline(); ok {
		_ = conn.SetDeadline(deadline)
	}
	if _, err := io.WriteString(conn, c.body); err != nil {
		return r, err
	}
	buf := make([]byte, maxDatagram)
	n, err := conn.Read(buf)
	if err != nil {
		return r, err
	}
	r.OK, r.Text = string(buf[:n]) == c.body, string(buf[:n])
	if !r.OK {
		r.Error = "got back another datagram than was sent"
	}
	return r, nil
}

func (c *caller) grpc(ctx context.Context) (r Result, err error) {
	var conn *grpc.ClientConn
	if c.target.Scheme == "xds" { // no sidecar: gRPC itself is a member of the mesh
		creds, err := xdscreds.NewClientCredentials(xdscreds.ClientOptions{FallbackCreds: refuse{insecure.NewCredentials()}})
		if err != nil {
			return r, err
		}
		conn, err = grpc.NewClient(c.target.String(), grpc.WithTransportCredentials(creds))
		if err != nil {
			return r, err
		}
	} else {
		address := cmp.Or(c.proxy, c.target.Host) // HTTP/2 with prior knowledge; the authority says where to
		conn, err = grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithAuthority(c.target.Host), grpc.WithNoProxy())
		if err != nil {
			return r, err
		}
	}
	defer conn.Close()
	reply, err := c.exchange(ctx, echopb.NewEchoClient(conn))
	r.Status = status.Code(err).String()
	if err != nil {
		r.Error = status.Convert(err).Message()
		return r, err
	}
	w := reply.GetWho()
	r.OK = true
	r.Answer, err = json.Marshal(Who{Service: w.GetService(), Cluster: w.GetCluster(), Region: w.GetRegion(), Zone: w.GetZone(),
		Instance: w.GetInstance(), Caller: w.GetCaller(), PeerAddress: w.GetPeerAddress()})
	r.Text = reply.GetMessage()
	return r, err
}

// refuse are credentials that never connect: without mTLS from the control plane there is no call.
type refuse struct {
	credentials.TransportCredentials
}

func (refuse) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("the control plane gave no mTLS configuration")
}

func (refuse) ServerHandshake(net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("the control plane gave no mTLS configuration")
}

func (r refuse) Clone() credentials.TransportCredentials { return r }

// exchange returns the last reply.
func (c *caller) exchange(ctx context.Context, client echopb.EchoClient) (reply *echopb.Reply, err error) {
	req := &echopb.Request{Message: c.body, Count: 3}
	switch c.stream {
	case "unary":
		return client.Unary(ctx, req)
	case "client":
		stream, err := client.ClientStream(ctx)
		if err != nil {
			return nil, err
		}
		for range 3 {
			if err := stream.Send(req); err != nil {
				break // CloseAndRecv says why
			}
		}
		return stream.CloseAndRecv()
	case "server":
		stream, err := client.ServerStream(ctx, req)
		if err != nil {
			return nil, err
		}
		for n := uint32(0); ; n++ {
			next, err := stream.Recv()
			if errors.Is(err, io.EOF) {
				if n != req.Count {
					return nil, fmt.Errorf("%d replies, want %d", n, req.Count)
				}
				return reply, nil
			}
			if err != nil {
				return nil, err
			}
			reply = next
		}
	case "bidi":
		stream, err := client.BidiStream(ctx)
		if err != nil {
			return nil, err
		}
		for range 3 {
			if err := stream.Send(req); err != nil && !errors.Is(err, io.EOF) { // of a stream that has ended Recv says why
				return nil, err
			}
			if reply, err = stream.Recv(); err != nil {
				return nil, err
			}
		}
		return reply, stream.CloseSend()
	}
	return nil, fmt.Errorf("stream %q: want unary, client, server or bidi", c.stream)
}
