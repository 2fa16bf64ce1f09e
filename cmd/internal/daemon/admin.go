package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"net/netip"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// NewRegistry returns a registry with the process's and the runtime's own metrics.
func NewRegistry() *prometheus.Registry {
	reg := prometheus.NewRegistry()
	reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return reg
}

// Admin is the loopback port for operators.
type Admin struct {
	Ready    func() error // nil: ready; else why not
	Gatherer prometheus.Gatherer
	Level    *slog.LevelVar
	Snapshot func() any // what /debug/snapshot shows as JSON; it holds no secret
	Log      *slog.Logger

	// Extra is served under its patterns (net/http's), beside the fixed ones.
	Extra map[string]http.Handler
}

// CheckLoopback refuses an address that others than this machine could reach.
func CheckLoopback(address string) error {
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return fmt.Errorf("admin address %q: want ip:port: %w", address, err)
	}
	if !ap.Addr().IsLoopback() {
		return fmt.Errorf("admin address %q: only loopback addresses are allowed", address)
	}
	return nil
}

// Run serves on ln until ctx ends. ln must be loopback; it is closed.
func (a *Admin) Run(ctx context.Context, ln net.Listener) error { return a.serve(ctx, ln, a.handler()) }

func (a *Admin) serve(ctx context.Context, ln net.Listener, h http.Handler) error {
	srv := &http.Server{Handler: h, ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Minute,
		MaxHeaderBytes: 16 << 10, ErrorLog: slog.NewLogLogger(a.Log.Handler(), slog.LevelDebug)}
	stop := context.AfterFunc(ctx, func() {
		closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		if srv.Shutdown(closing) != nil {
			_ = srv.Close()
		}
	})
	defer stop()
	if err := srv.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve admin on %s: %w", ln.Addr(), err)
	}
	return nil
}

// RunHealth serves /livez and /readyz on ln, and /metrics if it may, to whoever can reach it, until ctx ends. ln is closed.
func (a *Admin) RunHealth(ctx context.Context, ln net.Listener, metrics bool) error {
	mux := http.NewServeMux()
	a.health(mux)
	if metrics {
		mux.Handle("GET /metrics", a.metrics())
	}
	return a.serve(ctx, ln, mux)
}

func (a *Admin) health(mux *http.ServeMux) {
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("ok\n")) })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := a.Ready(); err != nil {
			http.Error(w, "not ready: "+err.Error(), http.StatusServiceUnavailable)
			return
		}
		_, _ = w.Write([]byte("ok\n"))
	})
}

func (a *Admin) metrics() http.Handler {
	return promhttp.HandlerFor(a.Gatherer, promhttp.HandlerOpts{ErrorLog: slog.NewLogLogger(a.Log.Handler(), slog.LevelWarn)})
}

func (a *Admin) handler() http.Handler {
	mux := http.NewServeMux()
	a.health(mux)
	mux.Handle("GET /metrics", a.metrics())
	mux.HandleFunc("GET /debug/loglevel", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, a.Level.Level()) })
	mux.HandleFunc("PUT /debug/loglevel", func(w http.ResponseWriter, r *http.Request) {
		level, err := ParseLevel(r.URL.Query().Get("level"))
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		a.Level.Set(level)
		a.Log.Info("log level changed", "level", level.String())
	})
	if a.Snapshot != nil {
		mux.HandleFunc("GET /debug/snapshot", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			enc := json.NewEncoder(w)
			enc.SetIndent("", "  ")
			if err := enc.Encode(a.Snapshot()); err != nil {
				a.Log.Warn("write snapshot", "error", err)
			}
		})
	}
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	for pattern, h := range a.Extra {
		mux.Handle(pattern, h)
	}
	// A web page that a user of this machine visits must not drive it by a name that resolves to loopback.
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host, _, err := net.SplitHostPort(r.Host)
		if err != nil {
			host = r.Host
		}
		if addr, err := netip.ParseAddr(host); host != "localhost" && (err != nil || !addr.IsLoopback()) {
			http.Error(w, "Host must be a loopback address", http.StatusForbidden)
			return
		}
		mux.ServeHTTP(w, r)
	})
}
