package admin_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hanse-mesh/hanse/cmd/internal/admin"
	"github.com/hanse-mesh/hanse/cmd/internal/admin/admintest"
)

// serve serves b on a Unix socket and returns a client of it.
func serve(t *testing.T, b admin.Backend) (*admin.Client, string) {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: admin.Handler(b, slog.New(slog.DiscardHandler)), ReadHeaderTimeout: time.Second}
	done := make(chan struct{})
	go func() { defer close(done); srv.Serve(l) }()
	t.Cleanup(func() { srv.Close(); <-done })
	c, err := admin.New(admin.Config{Socket: socket})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c, socket
}

func TestClientIsTheBackend(t *testing.T) {
	ctx := t.Context()
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	near := admintest.New(func() time.Time { return now })
	far, _ := serve(t, near)

	same := func(what string, op func(admin.Backend) (any, error)) {
		t.Helper()
		want, err := op(near)
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		got, err := op(far)
		if err != nil {
			t.Fatalf("%s over HTTP: %v", what, err)
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("%s differs over HTTP (-near +far):\n%s", what, d)
		}
	}
	same("status", func(b admin.Backend) (any, error) { return b.Status(ctx) })
	same("clusters", func(b admin.Backend) (any, error) { return b.Clusters(ctx) })
	same("services", func(b admin.Backend) (any, error) { return b.Services(ctx) })
	same("endpoints", func(b admin.Backend) (any, error) { return b.Endpoints(ctx, "shop/payments") })
	same("proxies", func(b admin.Backend) (any, error) { return b.Proxies(ctx) })
	same("explain", func(b admin.Backend) (any, error) {
		return b.Explain(ctx, admin.ExplainRequest{From: "shop/frontend", To: "shop/payments", Headers: map[string]string{"X": "1"}})
	})
	same("token", func(b admin.Backend) (any, error) {
		return b.CreateToken(ctx, admin.TokenRequest{Workload: "shop/frontend"})
	})
	same("trust list", func(b admin.Backend) (any, error) { return b.TrustList(ctx) })
	same("trust show", func(b admin.Backend) (any, error) { return b.TrustShow(ctx, "east.demo") })
	same("apply", func(b admin.Backend) (any, error) {
		return b.Apply(ctx, []byte("kind: Peer\nmetadata: {name: east}\n"), true)
	})
	same("drill plan", func(b admin.Backend) (any, error) { return b.DrillPlan(ctx, admin.DrillSpec{Mode: "drain"}) })
	same("join", func(b admin.Backend) (any, error) {
		var events []admin.Event
		r, err := b.Join(ctx, admin.JoinRequest{Token: "hns1_good"}, func(e admin.Event) error { events = append(events, e); return nil })
		return []any{events, r}, err
	})
	if _, err := far.DrillRun(ctx, admin.DrillSpec{Mode: "drain", For: 1}, func(admin.Event) error { return nil }); err != nil {
		t.Fatal(err)
	}
	same("drills", func(b admin.Backend) (any, error) { return b.DrillList(ctx) })
	same("drill", func(b admin.Backend) (any, error) { return b.DrillGet(ctx, "d-7f1") })
}

func TestErrorsKeepStatusHintAndFaults(t *testing.T) {
	ctx := t.Context()
	c, socket := serve(t, admintest.New(time.Now))
	var e *admin.Error
	if _, err := c.Endpoints(ctx, "shop/nope"); !errors.As(err, &e) || e.Status != 404 || e.Hint == "" {
		t.Errorf("endpoints of an unknown service: %#v", err)
	}
	if _, err := c.Apply(ctx, []byte("kind: Peer\nmetadata: {name: bad}\n"), false); !errors.As(err, &e) || len(e.Faults) != 1 || e.Faults[0].Line != 2 {
		t.Errorf("apply of a bad object: %#v", err)
	}
	if _, err := c.Apply(ctx, make([]byte, 8<<20+1), false); !errors.As(err, &e) || e.Status != http.StatusRequestEntityTooLarge {
		t.Errorf("apply of too much: %#v", err)
	}
	checks := 0
	_, err := c.Join(ctx, admin.JoinRequest{Token: "hns1_unreachable"}, func(e admin.Event) error {
		if e.Check != nil {
			checks++
		}
		return nil
	})
	if !errors.As(err, &e) || checks != 4 {
		t.Errorf("join with a failing check: %d checks, %#v", checks, err)
	}

	raw := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}}
	for body, want := range map[string]string{
		`{"token":"x","chekc":true}`: "chekc",
		`{"token":"x"} {}`:           "more than one",
		`{"token":`:                  "unexpected EOF",
	} {
		res, err := raw.Post("http://hansed/v1/join", "application/json", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		var got admin.Error
		if err := json.NewDecoder(res.Body).Decode(&got); err != nil || res.StatusCode != 400 || !strings.Contains(got.Message, want) {
			t.Errorf("POST /v1/join %s: %s %+v %v", body, res.Status, got, err)
		}
		res.Body.Close()
	}
	raw.CloseIdleConnections()
}

// dying is a hansed that is killed in the middle of a join.
type dying struct{ *admintest.Fake }

func (dying) Join(ctx context.Context, _ admin.JoinRequest, emit func(admin.Event) error) (admin.JoinResult, error) {
	if err := emit(admin.StepEvent("joining")); err != nil {
		return admin.JoinResult{}, err
	}
	panic(http.ErrAbortHandler)
}

func TestUnreachable(t *testing.T) {
	ctx := t.Context()
	message := func(err error) string {
		t.Helper()
		var e *admin.Error
		if !errors.As(err, &e) || e.Hint == "" {
			t.Fatalf("not an error with a hint: %v", err)
		}
		return e.Message
	}
	dir := t.TempDir()
	c, err := admin.New(admin.Config{Socket: filepath.Join(dir, "none")})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Status(ctx); !strings.Contains(message(err), "not running") {
		t.Errorf("no socket: %v", err)
	}

	dead := filepath.Join(dir, "dead")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: dead})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	if c, err = admin.New(admin.Config{Socket: dead}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Status(ctx); !strings.Contains(message(err), "is down") {
		t.Errorf("a dead socket: %v", err)
	}
	if os.Getuid() != 0 { // root may open everything
		if err := os.Chmod(dead, 0); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Status(ctx); !strings.Contains(message(err), "permission denied") {
			t.Errorf("a socket of another: %v", err)
		}
	}

	if c, _ = serve(t, dying{admintest.New(time.Now)}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Join(ctx, admin.JoinRequest{}, func(admin.Event) error { return nil }); !strings.Contains(message(err), "went away") {
		t.Errorf("killed in the middle: %v", err)
	}
}

func TestDrillStopEndsItsStream(t *testing.T) {
	ctx := t.Context()
	c, _ := serve(t, admintest.New(time.Now))
	d, err := c.DrillRun(ctx, admin.DrillSpec{Mode: "slow", For: 60}, func(e admin.Event) error {
		var d admin.Drill
		if err := json.Unmarshal(e.Data, &d); err != nil {
			return err
		}
		_, err := c.DrillStop(ctx, d.ID)
		return err
	})
	if err != nil || d.State != "stopped" {
		t.Errorf("stopped drill: %+v, %v", d, err)
	}
}

// TestCallersAreNoted: what is done over the socket is logged with who did it.
func TestCallersAreNoted(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	srv := &http.Server{Handler: admin.Handler(admintest.New(time.Now), slog.New(slog.NewTextHandler(&log, nil))), ReadHeaderTimeout: time.Second, ConnContext: admin.WithCaller}
	done := make(chan struct{})
	go func() { defer close(done); srv.Serve(l) }()
	c, err := admin.New(admin.Config{Socket: socket})
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.CreateToken(t.Context(), admin.TokenRequest{Workload: "shop/frontend"})
	c.Close()
	srv.Close()
	<-done
	if want := fmt.Sprintf("local socket, uid %d pid %d", os.Geteuid(), os.Getpid()); err != nil || !strings.Contains(log.String(), want) {
		t.Errorf("%v; the log lacks %q:\n%s", err, want, &log)
	}
}
