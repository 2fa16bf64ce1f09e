package probe

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
)

// Server answers on Listen. Ready and Log are required, and with Checks Workload and Dial.
type Server struct {
	Listen   string                                                               // ip:port or :port
	Checks   map[string]Check                                                     // by path
	Workload netip.Addr                                                           // where the application is
	Node     string                                                               // address of the pod's node, if it is known: the kubelet calls from there
	Ready    func() error                                                         // of the sidecar or gateway itself
	Dial     func(ctx context.Context, network, address string) (net.Conn, error) // of what is not captured
	Log      *slog.Logger
}

const (
	checkTimeout = 10 * time.Second // the kubelet gives up before, by its own measure
	maxCheckBody = 4 << 10
)

// Run serves until ctx ends.
func (s *Server) Run(ctx context.Context) error {
	ln, err := net.Listen("tcp", s.Listen)
	if err != nil {
		return fmt.Errorf("health: %w", err)
	}
	srv := &http.Server{Handler: s, ReadTimeout: checkTimeout, WriteTimeout: 2 * checkTimeout, IdleTimeout: time.Minute, MaxHeaderBytes: 8 << 10, ErrorLog: slog.NewLogLogger(s.Log.Handler(), slog.LevelDebug)}
	stop := context.AfterFunc(ctx, func() {
		end, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if srv.Shutdown(end) != nil {
			_ = srv.Close()
		}
	})
	defer stop()
	if err := srv.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("health: %w", err)
	}
	return nil
}

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		http.Error(w, "GET only", http.StatusMethodNotAllowed)
		return
	}
	if r.URL.Path == "/readyz" {
		if err := s.Ready(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
		return
	}
	c, ok := s.Checks[r.URL.Path]
	if !ok {
		http.NotFound(w, r)
		return
	}
	ctx := r.Context()
	if c.Hook {
		route, _ := os.ReadFile("/proc/net/route")
		route6, _ := os.ReadFile("/proc/net/ipv6_route")
		if !fromNode(r.RemoteAddr, s.Node, gateways(string(route), string(route6))) {
			s.Log.Warn("a hook is called by somebody who is not the kubelet", "path", r.URL.Path, "from", r.RemoteAddr)
			http.Error(w, "hooks are the kubelet's to call", http.StatusForbidden)
			return
		}
		_ = http.NewResponseController(w).SetWriteDeadline(time.Time{})
	} else {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, checkTimeout)
		defer cancel()
	}
	status, text := s.ask(ctx, c, r.UserAgent())
	w.WriteHeader(status)
	_, _ = io.WriteString(w, text)
}

// ask passes the application's own status on where it has one.
func (s *Server) ask(ctx context.Context, c Check, agent string) (int, string) {
	var err error
	switch {
	case c.HTTP != nil:
		status, text, e := s.askHTTP(ctx, c.HTTP, agent)
		if e == nil {
			return status, text
		}
		err = e
	case c.GRPC != nil:
		err = s.askGRPC(ctx, c.GRPC)
	default:
		var nc net.Conn
		if nc, err = s.Dial(ctx, "tcp", s.address(c.TCP.Port)); err == nil {
			_ = nc.Close()
		}
	}
	if err != nil {
		return http.StatusServiceUnavailable, err.Error() + "\n"
	}
	return http.StatusOK, "ok\n"
}

func (s *Server) address(port uint16) string { return netip.AddrPortFrom(s.Workload, port).String() }

func (s *Server) askHTTP(ctx context.Context, c *HTTP, agent string) (int, string, error) {
	scheme := "http"
	if c.HTTPS {
		scheme = "https"
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, scheme+"://"+s.address(c.Port)+c.Path, nil)
	if err != nil {
		return 0, "", err
	}
	r.Header.Set("User-Agent", agent)
	for _, h := range c.Headers {
		if strings.EqualFold(h[0], "host") {
			r.Host = h[1]
		} else {
			r.Header.Set(h[0], h[1])
		}
	}
	client := http.Client{
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{DialContext: s.Dial, DisableKeepAlives: true, MaxResponseHeaderBytes: 64 << 10,
			TLSClientConfig: &tls.Config{InsecureSkipVerify: true, SessionTicketsDisabled: true, MinVersion: tls.VersionTLS12}}, // the own pod: whose else could it be
	}
	resp, err := client.Do(r)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxCheckBody))
	if err != nil {
		return 0, "", err
	}
	return resp.StatusCode, string(body), nil
}

func (s *Server) askGRPC(ctx context.Context, c *GRPC) error {
	conn, err := grpc.NewClient("passthrough:///"+net.JoinHostPort(s.Workload.String(), strconv.Itoa(int(c.Port))), grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy(),
		grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) { return s.Dial(ctx, "tcp", address) }))
	if err != nil {
		return err
	}
	defer conn.Close()
	resp, err := grpc_health_v1.NewHealthClient(conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{Service: c.Service})
	if err == nil && resp.Status != grpc_health_v1.HealthCheckResponse_SERVING {
		err = fmt.Errorf("it answers %s", resp.Status)
	}
	return err
}
