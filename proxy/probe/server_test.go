package probe

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
)

// TestChecks: the application is asked as the kubelet would have, and its own answer counts.
func TestChecks(t *testing.T) {
	app := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/moved":
			http.Redirect(w, r, "/away", http.StatusFound)
		case r.URL.Path == "/ill":
			http.Error(w, "ill", http.StatusInternalServerError)
		case r.Host != "app.example" || r.Header.Get("X-A") != "b" || r.UserAgent() != "kube-probe/1.36":
			http.Error(w, "not as asked", http.StatusTeapot)
		}
	}))
	defer app.Close()
	port := netip.MustParseAddrPort(app.Listener.Addr().String()).Port()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv, book := grpc.NewServer(), health.NewServer()
	grpc_health_v1.RegisterHealthServer(srv, book)
	book.SetServingStatus("well", grpc_health_v1.HealthCheckResponse_SERVING)
	book.SetServingStatus("ill", grpc_health_v1.HealthCheckResponse_NOT_SERVING)
	go func() { _ = srv.Serve(ln) }()
	defer srv.Stop()
	grpcPort := netip.MustParseAddrPort(ln.Addr().String()).Port()
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	none := netip.MustParseAddrPort(closed.Addr().String()).Port()
	_ = closed.Close()
	headers := [][2]string{{"Host", "app.example"}, {"X-A", "b"}}
	ready := errors.New("not yet")
	k := &Server{Workload: netip.MustParseAddr("127.0.0.1"), Ready: func() error { return ready }, Dial: (&net.Dialer{}).DialContext, Log: slog.New(slog.DiscardHandler), Checks: map[string]Check{
		"/well": {HTTP: &HTTP{Port: port, Path: "/", Headers: headers}}, "/plain": {HTTP: &HTTP{Port: port, Path: "/"}}, "/ill": {HTTP: &HTTP{Port: port, Path: "/ill", Headers: headers}},
		"/moved": {HTTP: &HTTP{Port: port, Path: "/moved"}}, "/gone": {HTTP: &HTTP{Port: none, Path: "/"}}, "/tcp": {TCP: &TCP{Port: port}}, "/notcp": {TCP: &TCP{Port: none}},
		"/grpc": {GRPC: &GRPC{Port: grpcPort, Service: "well"}}, "/illgrpc": {GRPC: &GRPC{Port: grpcPort, Service: "ill"}}, "/strange": {GRPC: &GRPC{Port: grpcPort, Service: "?"}}}}
	ask := func(method, path string) int {
		r := httptest.NewRequest(method, path, nil)
		r.Header.Set("User-Agent", "kube-probe/1.36")
		r.RemoteAddr = "203.0.113.77:40000"
		w := httptest.NewRecorder()
		k.ServeHTTP(w, r.WithContext(context.Background()))
		return w.Code
	}
	for path, want := range map[string]int{"/well": 200, "/plain": 418, "/ill": 500, "/moved": 302, "/gone": 503, "/tcp": 200, "/notcp": 503, "/grpc": 200, "/illgrpc": 503, "/strange": 503, "/other": 404, "/readyz": 503} {
		if got := ask("GET", path); got != want {
			t.Errorf("%s: %d, want %d", path, got, want)
		}
	}
	k.Checks["/hook"] = Check{HTTP: &HTTP{Port: port, Path: "/moved"}, Hook: true}
	if got := ask("GET", "/hook"); got != 403 {
		t.Errorf("a hook called by anybody: %d", got)
	}
	k.Node = "203.0.113.77"
	if got := ask("GET", "/hook"); got != 302 {
		t.Errorf("a hook called from the node: %d", got)
	}
	if ready = nil; ask("GET", "/readyz") != 200 || ask("POST", "/well") != 405 {
		t.Error("ready is not told, or POST is taken")
	}
}
