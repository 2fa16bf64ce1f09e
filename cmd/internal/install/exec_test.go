package install

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"k8s.io/streaming/pkg/httpstream/wsstream"

	"github.com/hanse-mesh/hanse/cmd/internal/admin"
	"github.com/hanse-mesh/hanse/cmd/internal/admin/admintest"
)

// apiServer has the pods that are given, and joins exec in hansed-1 to socket, as a kubelet does with `hansed connect`.
func apiServer(t *testing.T, pods string, socket string, execs *atomic.Int32) *Cluster {
	t.Helper()
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/api/v1/namespaces/hanse-system/pods":
			w.Header().Set("Content-Type", "application/json")
			fmt.Fprintf(w, `{"apiVersion":"v1","kind":"PodList","items":[%s]}`, pods)
		case "/api/v1/namespaces/hanse-system/pods/hansed-1/exec":
			execs.Add(1)
			if q := r.URL.Query(); !slices.Equal(q["command"], []string{"/hansed", "connect", "--config", "/etc/hanse/hansed.yaml"}) || q.Get("stdin") != "true" || q.Get("container") != "hansed" {
				t.Errorf("asked to run %v", q)
			}
			exec(t, w, r, socket)
		default:
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusForbidden)
			_, _ = w.Write([]byte(`{"apiVersion":"v1","kind":"Status","status":"Failure","reason":"Forbidden","code":403,"message":"you may not exec"}`))
		}
	}))
	t.Cleanup(srv.Close)
	file := filepath.Join(t.TempDir(), "kubeconfig")
	text := fmt.Sprintf("apiVersion: v1\nkind: Config\nclusters: [{name: c, cluster: {server: %q}}]\ncontexts: [{name: west, context: {cluster: c}}]\n", srv.URL)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := Connect([]string{file}, "west", "hanse-system")
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// exec speaks v5.channel.k8s.io: channels 0 to 3 are standard input, output, error, and how it ended.
func exec(t *testing.T, w http.ResponseWriter, r *http.Request, socket string) {
	conn := wsstream.NewConn(map[string]wsstream.ChannelProtocolConfig{"v5.channel.k8s.io": {Binary: true,
		Channels: []wsstream.ChannelType{wsstream.ReadChannel, wsstream.WriteChannel, wsstream.WriteChannel, wsstream.WriteChannel, wsstream.ReadChannel}}})
	_, streams, err := conn.Open(w, r)
	if err != nil {
		t.Error(err)
		return
	}
	defer conn.Close()
	end := func(status map[string]any) {
		b, _ := json.Marshal(status)
		_, _ = streams[3].Write(b)
	}
	s, err := net.Dial("unix", socket)
	if err != nil {
		fmt.Fprint(streams[2], "hansed: hansed does not answer on its socket")
		end(map[string]any{"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NonZeroExitCode", "message": "command terminated with exit code 1",
			"details": map[string]any{"causes": []any{map[string]any{"reason": "ExitCode", "message": "1"}}}})
		return
	}
	defer s.Close()
	go func() {
		_, _ = io.Copy(s, streams[0])
		_ = s.(*net.UnixConn).CloseWrite()
	}()
	_, _ = io.Copy(streams[1], s)
	end(map[string]any{"kind": "Status", "apiVersion": "v1", "status": "Success"})
}

func pod(name, phase, ready string) string {
	return fmt.Sprintf(`{"apiVersion":"v1","kind":"Pod","metadata":{"name":%q,"namespace":"hanse-system"},"status":{"phase":%q,"conditions":[{"type":"Ready","status":%q}]}}`, name, phase, ready)
}

// Every command works through the API server's exec, in a pod that is ready, over few connections.
func TestExec(t *testing.T) {
	dir, err := os.MkdirTemp("", "hx") // a socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket := filepath.Join(dir, "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: admin.Handler(admintest.New(time.Now), slog.New(slog.DiscardHandler)), ReadHeaderTimeout: time.Second}
	go func() { _ = srv.Serve(l) }()
	t.Cleanup(func() { srv.Close() })

	var execs atomic.Int32
	c := apiServer(t, pod("hansed-0", "Running", "False")+","+pod("hansed-1", "Running", "True"), socket, &execs)
	b, err := admin.New(admin.Config{Where: "hansed of context west", Dial: c.Dial})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	for range 3 {
		all, err := b.Clusters(t.Context())
		if err != nil || len(all.Clusters) == 0 || !all.Clusters[0].Self {
			t.Fatalf("%+v, %v", all, err)
		}
	}
	if n := execs.Load(); n != 1 {
		t.Errorf("%d execs for three questions one after the other", n)
	}

	// A hansed that has ended is told by what the program in the pod says.
	gone := apiServer(t, pod("hansed-1", "Running", "True"), filepath.Join(dir, "none"), &execs)
	refuse := func(c *Cluster, want string) {
		t.Helper()
		b, err := admin.New(admin.Config{Where: "hansed of context west", Dial: c.Dial})
		if err != nil {
			t.Fatal(err)
		}
		defer b.Close()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		if _, err := b.Clusters(ctx); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q in it", err, want)
		}
	}
	refuse(gone, "does not answer on its socket")
	refuse(apiServer(t, "", socket, &execs), ErrNotInstalled.Error())
	refuse(apiServer(t, pod("hansed-1", "Pending", "False"), socket, &execs), "no pod of hansed runs")
	refuse(apiServer(t, pod("hansed-7", "Running", "True"), socket, &execs), "you may not exec")
}
