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
	"unsafe"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/hanse-mesh/hanse/identity/agent"
)

// dialAs connects to a Unix socket as another user, with a primary group and supplementary ones.
func dialAs(uid, gid int, groups []uint32, path string) (c net.Conn, err error) {
	done := make(chan struct{})
	go func() { // on a thread of its own, which ends with it
		defer close(done)
		runtime.LockOSThread()
		var list unsafe.Pointer
		if len(groups) > 0 {
			list = unsafe.Pointer(&groups[0])
		}
		if _, _, no := syscall.RawSyscall(syscall.SYS_SETGROUPS, uintptr(len(groups)), uintptr(list), 0); no != 0 {
			err = no
			return
		}
		if _, _, no := syscall.RawSyscall(syscall.SYS_SETRESGID, ^uintptr(0), uintptr(gid), ^uintptr(0)); no != 0 {
			err = no
			return
		}
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
	many := make([]uint32, 1000) // more than fit at the first try
	for i := range many {
		many[i] = uint32(20000 + i)
	}
	friends := append(many, 4801)
	for _, c := range []struct {
		name             string
		users            agent.SocketUsers
		friend, stranger bool // are served
	}{
		{"nobody else", agent.SocketUsers{}, false, false},
		{"one", agent.SocketUsers{IDs: []uint32{friend}}, true, false},
		{"a primary group", agent.SocketUsers{Groups: []uint32{4700}}, true, false},
		{"a supplementary group", agent.SocketUsers{Groups: []uint32{4801}}, true, false},
		{"groups of nobody, and a user", agent.SocketUsers{IDs: []uint32{friend}, Groups: []uint32{9}}, true, false},
		{"a group whose number is a user's", agent.SocketUsers{Groups: []uint32{friend}}, false, false},
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
			served := func(uid, gid int, groups []uint32) bool {
				conn, err := dialAs(uid, gid, groups, cfg.SocketPath)
				if err != nil {
					return false
				}
				defer conn.Close()
				// A gRPC server speaks first; who is turned away hears the end.
				check(t, conn.SetReadDeadline(time.Now().Add(10*time.Second)))
				n, _ := conn.Read(make([]byte, 1))
				return n == 1
			}
			if got := served(friend, 4700, friends); got != c.friend {
				t.Errorf("the friend is served: %t", got)
			}
			if got := served(stranger, 4702, many); got != c.stranger {
				t.Errorf("the stranger is served: %t", got)
			}
			if len(c.users.IDs)+len(c.users.Groups) > 0 { // else the socket's mode keeps them away, or nothing does
				want := 1.0
				if !c.friend {
					want = 2
				}
				if n := metric(t, reg, "hanse_workload_api_refused_total"); n != want {
					t.Errorf("%v refusals counted, want %v", n, want)
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
