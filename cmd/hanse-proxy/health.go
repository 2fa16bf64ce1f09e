package main

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/hanse-mesh/hanse/proxy/sidecar"
)

// Health answers who has no identity, the kubelet above all: on /readyz for the sidecar or gateway, and on the paths of checks for the application, which the sidecar then asks. Everything else of
// the application stays behind mutual TLS.
type Health struct {
	Listen string           `json:"listen"` // ip:port or :port; default: none
	Checks map[string]Check `json:"checks"` // by path

	node string // address of the pod's node, by the environment
}

// Check is one question to the application; exactly one of the three.
type Check struct {
	HTTP *HTTPCheck `json:"http"`
	GRPC *GRPCCheck `json:"grpc"`
	TCP  *TCPCheck  `json:"tcp"`
	Hook bool       `json:"hook"` // a hook of the application's life: it is waited for as long as who asks waits
}

// HTTPCheck is a GET; answers from 200 to 399 are good, as the kubelet has it.
type HTTPCheck struct {
	Port    uint16      `json:"port"`
	Path    string      `json:"path"`
	HTTPS   bool        `json:"https"` // its certificate is not verified, as the kubelet has it
	Headers [][2]string `json:"headers"`
}

// GRPCCheck asks by gRPC's health protocol.
type GRPCCheck struct {
	Port    uint16 `json:"port"`
	Service string `json:"service"`
}

// TCPCheck connects.
type TCPCheck struct {
	Port uint16 `json:"port"`
}

// maxChecks is far beyond three for each container.
const maxChecks = 256

func (c *Config) validateHealth(bad report) {
	h := &c.Health
	if h.Listen == "" {
		if len(h.Checks) > 0 {
			bad("health.listen", "missing: say where the checks are answered, such as :15021")
		}
		return
	}
	hostPort(bad, "health.listen", h.Listen)
	if c.Role == roleSidecar && len(c.Workloads) == 0 {
		bad("health", "there is no workload whose health could be told")
	}
	if c.Role == roleGateway && len(h.Checks) > 0 {
		bad("health.checks", "a gateway stands before no application")
	}
	if len(h.Checks) > maxChecks {
		bad("health.checks", "%d of them: at most %d", len(h.Checks), maxChecks)
	}
	for path, k := range h.Checks {
		field := "health.checks[" + path + "]"
		if !strings.HasPrefix(path, "/") || path == "/readyz" {
			bad(field, "want a path other than /readyz")
		}
		kinds, port := 0, uint16(0)
		if k.HTTP != nil {
			kinds, port = kinds+1, k.HTTP.Port
			if !strings.HasPrefix(k.HTTP.Path, "/") {
				bad(field+".http.path", "%q does not begin with /", k.HTTP.Path)
			}
		}
		if k.GRPC != nil {
			kinds, port = kinds+1, k.GRPC.Port
		}
		if k.TCP != nil {
			kinds, port = kinds+1, k.TCP.Port
		}
		if kinds != 1 || port == 0 {
			bad(field, "want one of http, grpc and tcp, with a port")
		}
	}
}

// fromNode says whether a caller is the kubelet, whose address is the node's or, seen from a pod, that of the gateway: hooks change what the application does.
func fromNode(remote, node string, gateways []netip.Addr) bool {
	ap, err := netip.ParseAddrPort(remote)
	if err != nil {
		return false
	}
	from := ap.Addr().Unmap().WithZone("")
	if slices.Contains(gateways, from) {
		return true
	}
	own, err := netip.ParseAddr(node)
	return err == nil && own == from
}

// gateways are those of the default routes in what Linux has as /proc/net/route and /proc/net/ipv6_route.
func gateways(route, route6 string) (out []netip.Addr) {
	for line := range strings.Lines(route) {
		f := strings.Fields(line)
		if len(f) > 7 && f[1] == "00000000" && f[7] == "00000000" {
			if b, err := hex.DecodeString(f[2]); err == nil && len(b) == 4 {
				a := netip.AddrFrom4([4]byte(binary.NativeEndian.AppendUint32(nil, binary.BigEndian.Uint32(b)))) // the number is in the machine's order
				if !a.IsUnspecified() {
					out = append(out, a)
				}
			}
		}
	}
	for line := range strings.Lines(route6) {
		f := strings.Fields(line)
		if len(f) > 4 && strings.Trim(f[0], "0") == "" && f[1] == "00" {
			if b, err := hex.DecodeString(f[4]); err == nil && len(b) == 16 {
				if a := netip.AddrFrom16([16]byte(b)); !a.IsUnspecified() {
					out = append(out, a)
				}
			}
		}
	}
	return out
}

// checker answers on Health.Listen.
type checker struct {
	cfg   Health
	at    netip.Addr // of the workload
	ready func() error
	dial  sidecar.Dial // not captured
	log   *slog.Logger
}

const (
	checkTimeout = 10 * time.Second // the kubelet gives up before, by its own measure
	maxCheckBody = 4 << 10
)

func (k *checker) run(ctx context.Context) error {
	ln, err := net.Listen("tcp", k.cfg.Listen)
	if err != nil {
		return fmt.Errorf("health: %w", err)
	}
	srv := &http.Server{Handler: k, ReadTimeout: checkTimeout, WriteTimeout: 2 * checkTimeout, IdleTimeout: time.Minute, MaxHeaderBytes: 8 << 10, ErrorLog: slog.NewLogLogger(k.log.Handler(), slog.LevelDebug)}
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
func (k *checker) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		http.Error(w, "GET only", http.StatusMethodNotAllowed)
		return
	}
	if r.URL.Path == "/readyz" {
		if err := k.ready(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
		return
	}
	c, ok := k.cfg.Checks[r.URL.Path]
	if !ok {
		http.NotFound(w, r)
		return
	}
	ctx, cancel := context.WithCancel(r.Context())
	if c.Hook {
		route, _ := os.ReadFile("/proc/net/route")
		route6, _ := os.ReadFile("/proc/net/ipv6_route")
		if !fromNode(r.RemoteAddr, k.cfg.node, gateways(string(route), string(route6))) {
			cancel()
			k.log.Warn("a hook is called by somebody who is not the kubelet", "path", r.URL.Path, "from", r.RemoteAddr)
			http.Error(w, "hooks are the kubelet's to call", http.StatusForbidden)
			return
		}
		_ = http.NewResponseController(w).SetWriteDeadline(time.Time{})
	} else {
		ctx, cancel = context.WithTimeout(ctx, checkTimeout)
	}
	defer cancel()
	status, text := k.ask(ctx, c, r.UserAgent())
	w.WriteHeader(status)
	_, _ = io.WriteString(w, text)
}

// ask passes the application's own status on where it has one.
func (k *checker) ask(ctx context.Context, c Check, agent string) (int, string) {
	var err error
	switch {
	case c.HTTP != nil:
		status, text, e := k.askHTTP(ctx, c.HTTP, agent)
		if e == nil {
			return status, text
		}
		err = e
	case c.GRPC != nil:
		err = k.askGRPC(ctx, c.GRPC)
	default:
		var nc net.Conn
		if nc, err = k.dial(ctx, "tcp", k.address(c.TCP.Port)); err == nil {
			_ = nc.Close()
		}
	}
	if err != nil {
		return http.StatusServiceUnavailable, err.Error() + "\n"
	}
	return http.StatusOK, "ok\n"
}

func (k *checker) address(port uint16) string { return netip.AddrPortFrom(k.at, port).String() }

func (k *checker) askHTTP(ctx context.Context, c *HTTPCheck, agent string) (int, string, error) {
	scheme := "http"
	if c.HTTPS {
		scheme = "https"
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, scheme+"://"+k.address(c.Port)+c.Path, nil)
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
		Transport: &http.Transport{DialContext: k.dial, DisableKeepAlives: true, MaxResponseHeaderBytes: 64 << 10,
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

func (k *checker) askGRPC(ctx context.Context, c *GRPCCheck) error {
	conn, err := grpc.NewClient("passthrough:///"+net.JoinHostPort(k.at.String(), strconv.Itoa(int(c.Port))), grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy(),
		grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) { return k.dial(ctx, "tcp", address) }))
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
