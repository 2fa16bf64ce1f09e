package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// ticks is USER_HZ, which is 100 on all Linux systems that Go runs on.
const ticks = 100

// family is a process and its children.
func family(pid int) []int {
	out := []int{pid}
	lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, l := range lists {
		b, _ := os.ReadFile(l)
		for c := range strings.FieldsSeq(string(b)) {
			if n, err := strconv.Atoi(c); err == nil {
				out = append(out, family(n)...)
			}
		}
	}
	return out
}

// cpuTime is user and system time of processes and their children so far.
func cpuTime(pids []int) (d time.Duration) {
	for _, root := range pids {
		for _, pid := range family(root) {
			b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
			if err == nil {
				d += statTime(string(b))
			}
		}
	}
	return d
}

// statTime reads utime and stime of proc_pid_stat(5).
func statTime(stat string) time.Duration {
	f := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	if len(f) < 13 {
		return 0
	}
	u, _ := strconv.ParseInt(f[11], 10, 64)
	s, _ := strconv.ParseInt(f[12], 10, 64)
	return time.Duration(u+s) * time.Second / ticks
}

// resident is the memory of processes and their children, in bytes.
func resident(pids []int) (n int64) {
	for _, root := range pids {
		for _, pid := range family(root) {
			b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
			if f := strings.Fields(string(b)); err == nil && len(f) > 1 {
				pages, _ := strconv.ParseInt(f[1], 10, 64)
				n += pages * int64(os.Getpagesize())
			}
		}
	}
	return n
}

// begin starts a program that writes what it says into log, and ends with this process.
func begin(dir, log, name string, args ...string) (*exec.Cmd, error) {
	path, err := exec.LookPath(name)
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(dir, log), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	cmd := exec.Command(path, args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, f, f
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd, cmd.Start()
}

// ending stops programs that begin has started.
func ending(cmds ...*exec.Cmd) func() {
	return func() {
		for _, c := range cmds {
			if c != nil && c.Process != nil {
				_ = c.Process.Signal(syscall.SIGTERM)
			}
		}
		for _, c := range cmds {
			if c != nil && c.Process != nil {
				kill := time.AfterFunc(3*time.Second, func() { _ = c.Process.Kill() })
				_ = c.Wait()
				kill.Stop()
			}
		}
	}
}

// freePort returns an address of loopback that nobody uses at present.
func freePort() string {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "127.0.0.1:0"
	}
	defer ln.Close()
	return ln.Addr().String()
}

// answers waits until a chain answers in all protocols.
func answers(ctx context.Context, p *product) (*product, error) {
	var err error
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end) && ctx.Err() == nil; time.Sleep(50 * time.Millisecond) {
		if err = once(p); err == nil {
			p.fresh = resident(p.pids)
			if err = errors.Join(onceTCP(p), onceGRPC(ctx, p)); err == nil {
				return p, nil
			}
		}
	}
	p.stop()
	return nil, fmt.Errorf("%s does not answer: %w", p.name, err)
}

// lastWords are the ends of the logs in a directory.
func lastWords(dir string) string {
	var out strings.Builder
	for _, pattern := range []string{"*.log", "*.error"} {
		logs, _ := filepath.Glob(filepath.Join(dir, pattern))
		for _, l := range logs {
			b, _ := os.ReadFile(l)
			if len(b) > 0 && !strings.HasSuffix(l, ".access.log") {
				fmt.Fprintf(&out, "%s: …%s\n", filepath.Base(l), b[max(0, len(b)-600):])
			}
		}
	}
	return out.String()
}
