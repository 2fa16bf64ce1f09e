package daemon_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/hanse-mesh/hanse/cmd/internal/daemon"
)

func TestGroupStopsInReverse(t *testing.T) {
	var mu sync.Mutex
	var stopped []string
	var g daemon.Group
	for _, name := range []string{"identity", "xds", "sidecar"} {
		g.Add(name, func(ctx context.Context) error {
			<-ctx.Done()
			mu.Lock()
			defer mu.Unlock()
			stopped = append(stopped, name)
			return ctx.Err()
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := g.Run(ctx, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(stopped, []string{"sidecar", "xds", "identity"}) {
		t.Errorf("stopped %v", stopped)
	}
}

func TestGroupEndsWithItsFirstError(t *testing.T) {
	broken := errors.New("broken")
	var g daemon.Group
	g.Add("a", func(ctx context.Context) error { <-ctx.Done(); return nil })
	g.Add("b", func(context.Context) error { return broken })
	if err := g.Run(t.Context(), slog.New(slog.DiscardHandler)); !errors.Is(err, broken) || !strings.Contains(err.Error(), "b: broken") {
		t.Errorf("error %v", err)
	}
}

func TestAdmin(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	notReady := errors.New("no X509-SVID yet")
	level := new(slog.LevelVar)
	reg := prometheus.NewRegistry()
	a := &daemon.Admin{Ready: func() error { return notReady }, Gatherer: reg, Level: level, Snapshot: func() any { return map[string]int{"x": 1} }, Log: slog.New(slog.DiscardHandler)}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- a.Run(ctx, ln) }()
	do := func(method, path, host string) (int, string) {
		req, _ := http.NewRequestWithContext(t.Context(), method, "http://"+ln.Addr().String()+path, nil)
		req.Host = host
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, _ := io.ReadAll(resp.Body)
		return resp.StatusCode, string(b)
	}
	for _, tc := range []struct {
		method, path, host string
		status             int
		body               string
	}{
		{"GET", "/readyz", "127.0.0.1", 503, "no X509-SVID yet"},
		{"GET", "/livez", "localhost:1", 200, "ok"},
		{"GET", "/metrics", "127.0.0.1", 200, ""},
		{"GET", "/debug/snapshot", "127.0.0.1", 200, `"x": 1`},
		{"PUT", "/debug/loglevel?level=debug", "127.0.0.1", 200, ""},
		{"GET", "/debug/loglevel", "127.0.0.1", 200, "DEBUG"},
		{"PUT", "/debug/loglevel?level=loud", "127.0.0.1", 400, ""},
		{"GET", "/debug/pprof/", "127.0.0.1", 200, "goroutine"},
		{"GET", "/livez", "evil.example", 403, "loopback"},
	} {
		if status, body := do(tc.method, tc.path, tc.host); status != tc.status || !strings.Contains(body, tc.body) {
			t.Errorf("%s %s: %d %q", tc.method, tc.path, status, body)
		}
	}
	if level.Level() != slog.LevelDebug {
		t.Error("level not changed")
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	http.DefaultClient.CloseIdleConnections()
}

func TestCheckLoopback(t *testing.T) {
	for addr, ok := range map[string]bool{"127.0.0.1:1": true, "127.0.2.1:7440": true, "[::1]:1": true, "0.0.0.0:1": false, "10.0.0.1:1": false, "localhost:1": false, "": false} {
		if err := daemon.CheckLoopback(addr); (err == nil) != ok {
			t.Errorf("%s: %v", addr, err)
		}
	}
}
