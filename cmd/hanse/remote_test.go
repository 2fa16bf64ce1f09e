package main

import (
	"bytes"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"crypto/tls"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hanse-mesh/hanse/cmd/internal/admin"
	"github.com/hanse-mesh/hanse/cmd/internal/admin/admintest"
	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/proxy/proxytest"
)

// A context with an address is mutual TLS both ways: the command proves that it is an administrator, hansed that it is the control plane.
func TestRemoteContext(t *testing.T) {
	west, other := proxytest.NewDomain(t, "west.demo"), proxytest.NewDomain(t, "other.demo")
	serve := func(path string) string {
		src := west.Source(path, west)
		l, err := tls.Listen("tcp", "127.0.0.1:0", identity.ServerTLS(src, func(peer spiffeid.ID) error {
			if !identity.IsAdminID(peer.TrustDomain(), peer) {
				return fmt.Errorf("%s is not an administrator", peer)
			}
			return nil
		}, "http/1.1"))
		if err != nil {
			t.Fatal(err)
		}
		srv := &http.Server{Handler: admin.Handler(admintest.New(time.Now), slog.New(slog.DiscardHandler)), ReadHeaderTimeout: time.Second, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, 0)}
		done := make(chan struct{})
		go func() { defer close(done); srv.Serve(l) }()
		t.Cleanup(func() { srv.Close(); <-done })
		return l.Addr().String()
	}
	dir := t.TempDir()
	write := func(name string, d *proxytest.Domain, path string) {
		svid := d.SVID(path, time.Hour)
		cert, key, err := svid.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		bundle, err := d.Bundle().Marshal()
		if err != nil {
			t.Fatal(err)
		}
		for file, b := range map[string][]byte{name + ".pem": cert, name + ".key": key, name + ".json": bundle} {
			if err := os.WriteFile(filepath.Join(dir, file), b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	write("admin", west, "/hanse/admin/alice")
	write("workload", west, "/ns/shop/sa/frontend")
	write("foreign", other, "/hanse/admin/mallory")

	real, impostor := serve("/hanse/control-plane"), serve("/ns/shop/sa/frontend")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed := l.Addr().String()
	l.Close()
	for _, x := range []struct {
		name, address, files string
		code                 int
		want                 string
	}{
		{"administrator", real, "admin", 0, "west.demo"},
		{"not an administrator", real, "workload", 1, "is not an administrator's ID"},
		{"of another trust domain", real, "foreign", 1, "no mutual TLS with"},
		{"not the control plane", impostor, "admin", 1, "no mutual TLS with"},
		{"nobody there", closed, "admin", 1, "hansed does not listen at"},
	} {
		t.Run(x.name, func(t *testing.T) {
			config := filepath.Join(t.TempDir(), "config.yaml")
			text := fmt.Sprintf("current: x\ncontexts:\n- {name: x, address: %q, svid: %[2]s.pem, key: %[2]s.key, bundle: %[2]s.json}\n", x.address, filepath.Join(dir, x.files))
			if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			var out, errs bytes.Buffer
			c := &cli{in: strings.NewReader(""), out: &out, err: &errs, now: time.Now, getenv: func(k string) string {
				return map[string]string{"HANSE_CONFIG": config}[k]
			}}
			if code := c.run(t.Context(), []string{"clusters"}); code != x.code || !strings.Contains(out.String()+errs.String(), x.want) {
				t.Errorf("exit code %d, want %d and %q:\n%s%s", code, x.code, x.want, &out, &errs)
			}
			if x.code != 0 && !strings.Contains(errs.String(), "hint: ") {
				t.Errorf("no hint:\n%s", &errs)
			}
		})
	}
}
