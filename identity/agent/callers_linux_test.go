package agent_test

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/hanse-mesh/hanse/identity/agent"
)

// dialAs connects to a Unix socket as another user.
func dialAs(uid int, path string) (c net.Conn, err error) {
	done := make(chan struct{})
	go func() { // on a thread of its own, which ends with it
		defer close(done)
		runtime.LockOSThread()
		if _, _, no := syscall.RawSyscall(syscall.SYS_SETRESUID, ^uintptr(0), uintptr(uid), ^uintptr(0)); no != 0 {
			err = no
			return
		}
		c, err = net.Dial("unix", path)
	}()
	<-done
	return c, err
}

// TestCallersOfTheWorkloadAPI: whom the kernel does not name as a user of the socket gets nothing, also where the socket's mode lets him connect.
func TestCallersOfTheWorkloadAPI(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("HANSE_NO_SKIP") != "" {
			t.Fatal("only root can call as somebody else")
		}
		t.Skip("SKIPPED, NOT TESTED: only root can call as somebody else")
	}
	const friend, stranger = 4711, 4712
	for _, c := range []struct {
		name             string
		users            agent.SocketUsers
		friend, stranger bool // are served
	}{
		{"nobody else", agent.SocketUsers{}, false, false},
		{"one", agent.SocketUsers{IDs: []uint32{friend}}, true, false},
		{"any", agent.SocketUsers{Any: true}, true, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newServer(t, "west.demo", options{})
			s.start()
			cfg := s.agentConfig(s.token(frontend))
			dir := socketDir(t)
			check(t, os.Chmod(dir, 0o755))
			reg := prometheus.NewRegistry()
			cfg.SocketPath, cfg.SocketUsers, cfg.Registerer = filepath.Join(dir, "public", "api.sock"), c.users, reg
			a, _ := runAgent(t, cfg)
			wait(t, a.Source())
			served := func(uid int) bool {
				conn, err := dialAs(uid, cfg.SocketPath)
				if err != nil {
					return false
				}
				defer conn.Close()
				// A gRPC server speaks first; who is turned away hears the end.
				check(t, conn.SetReadDeadline(time.Now().Add(10*time.Second)))
				n, _ := conn.Read(make([]byte, 1))
				return n == 1
			}
			if got := served(friend); got != c.friend {
				t.Errorf("the friend is served: %t", got)
			}
			if got := served(stranger); got != c.stranger {
				t.Errorf("the stranger is served: %t", got)
			}
			if len(c.users.IDs) > 0 { // else the socket's mode keeps them away, or nothing does
				if n := metric(t, reg, "hanse_workload_api_refused_total"); n != 1 {
					t.Errorf("%v refusals counted, want 1", n)
				}
			}
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second) // the own user always is
			defer cancel()
			_, err := workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr("unix://"+cfg.SocketPath))
			check(t, err)
		})
	}
}

func metric(t *testing.T, reg *prometheus.Registry, name string) float64 {
	t.Helper()
	families, err := reg.Gather()
	check(t, err)
	for _, f := range families {
		if f.GetName() == name {
			return f.GetMetric()[0].GetCounter().GetValue()
		}
	}
	return -1
}
