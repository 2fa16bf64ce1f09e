package node

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hanse-mesh/hanse/proxy/capture"
	"github.com/hanse-mesh/hanse/test/netns"
)

// TestMain: as a program it asks.
func TestMain(m *testing.M) {
	if text, ok := asks([]byte(strings.Join(os.Args, "\x00") + "\x00")); ok {
		cfg, err := Rules(text)
		if err == nil {
			ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
			err = capture.Wait(ctx, cfg)
			cancel()
		} else {
			time.Sleep(30 * time.Second) // to be seen; the test ends it
		}
		fmt.Println("waited:", err)
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func rules() *capture.Config {
	return &capture.Config{Table: "hanse", OutboundPort: 15002, InboundPort: 15006, DNSPort: 15053, Mark: 1503, UIDs: []uint32{1503}, OwnPorts: []uint16{15008}}
}

// journal is a log that is read while it is written.
type journal struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (j *journal) Write(p []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.b.Write(p)
}

func (j *journal) until(t *testing.T, want string) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		j.mu.Lock()
		text := j.b.String()
		j.mu.Unlock()
		if strings.Contains(text, want) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the agent does not say %q:\n%s", want, text)
		}
	}
}

// A process without privilege waits until the agent has found it, and is captured then. Who asks for the node's network, for other rules, or for nonsense, gets nothing.
func TestAgent(t *testing.T) {
	netns.Test(t, func(t *testing.T) {
		node, pod, world := netns.New(t), netns.New(t), netns.New(t)
		netns.Join(t, pod, world, "10.0.0.1/24", "10.0.0.2/24")
		pod.Route(t, "default", "10.0.0.2")
		proc := t.TempDir()
		appear := func(pid, real string) {
			if err := os.Symlink(real, filepath.Join(proc, pid)); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.MkdirAll(filepath.Join(proc, "1/ns"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(node.Path(), filepath.Join(proc, "1/ns/net")); err != nil {
			t.Fatal(err)
		}
		log := &journal{}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		a := &Agent{Proc: proc, Log: slog.New(slog.NewTextHandler(log, nil)), every: 10 * time.Millisecond}
		go func() { ended <- a.Run(ctx) }()

		exe := program(t)
		ask := func(ns *netns.NS, pid string, cfg *capture.Config, garble func(string) string) (*exec.Cmd, *bytes.Buffer) {
			args, err := Arguments(cfg)
			if err != nil {
				t.Fatal(err)
			}
			args[3] = garble(args[3])
			cmd := exec.Command(exe, args...)
			var out bytes.Buffer
			cmd.Stdout, cmd.Stderr = &out, &out
			if users, err := os.ReadFile("/proc/self/uid_map"); err == nil && bytes.Contains(users, []byte("4294967295")) { // else there is but one user
				cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65532, Gid: 65532, NoSetGroups: true}}
			}
			if err := ns.Start(cmd); err != nil {
				t.Fatal(err)
			}
			appear(pid, realProc(t, cmd.Process.Pid))
			return cmd, &out
		}
		same := func(s string) string { return s }

		cmd, out := ask(pod, "100", rules(), same)
		if err := cmd.Wait(); err != nil || out.String() != "waited: <nil>\n" {
			t.Fatalf("%v: %s", err, out)
		}
		var d net.Dialer
		if err := pod.Do(func() error {
			state, err := capture.In("").Show(rules())
			if err == nil && !state.Matches {
				err = fmt.Errorf("installed is %+v", state)
			}
			return err
		}); err != nil {
			t.Error(err)
		}
		if c, err := pod.Dial(ctx, &d, "tcp", "10.0.0.2:80"); err == nil {
			c.Close()
			t.Error("a captured connection got through without a sidecar")
		}
		// A second time it is there already; other rules do not replace them.
		other := rules()
		other.OutboundPort = 15012
		for i, cfg := range []*capture.Config{rules(), other} {
			cmd, _ := ask(pod, fmt.Sprint(101+i), cfg, same)
			defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
		}
		log.until(t, "other rules than those asked for")
		if err := pod.Do(func() error {
			state, err := capture.In("").Show(rules())
			if err == nil && !state.Matches {
				err = fmt.Errorf("now installed is %+v", state)
			}
			return err
		}); err != nil {
			t.Error(err)
		}
		cmd, _ = ask(node, "103", rules(), same)
		log.until(t, "the node's own network")
		_, _ = cmd.Process.Kill(), cmd.Wait()
		if err := node.Do(func() error {
			state, err := capture.In("").Show(rules())
			if err == nil && state.Installed {
				err = fmt.Errorf("the node is captured: %+v", state)
			}
			return err
		}); err != nil {
			t.Error(err)
		}
		cmd, _ = ask(world, "104", rules(), func(s string) string { return strings.Replace(s, "Table", "Colour", 1) })
		log.until(t, `unknown field \"Colour\"`)
		_, _ = cmd.Process.Kill(), cmd.Wait()
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

// program is this one where every user may start it.
func program(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "node")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	exe := filepath.Join(dir, "asks")
	if err := os.WriteFile(exe, b, 0o755); err != nil {
		t.Fatal(err)
	}
	return exe
}

// realProc is the folder of a process of this test's PID namespace, as /proc shows it.
func realProc(t *testing.T, pid int) string {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*/status")
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Readlink("/proc/self/ns/pid")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range all {
		b, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(b)) {
			if ids, ok := strings.CutPrefix(line, "NSpid:"); ok {
				is := strings.Fields(ids)
				ns, err := os.Readlink(filepath.Join(filepath.Dir(f), "ns/pid"))
				if err == nil && ns == self && is[len(is)-1] == fmt.Sprint(pid) {
					return filepath.Dir(f)
				}
			}
		}
	}
	t.Fatalf("process %d is not in /proc", pid)
	return ""
}

func FuzzRules(f *testing.F) {
	args, err := Arguments(rules())
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(args[3]))
	f.Add([]byte(`{"Table":"hanse","Always":["10.0.0.0/8"],"Outbound":{"Exclude":["::/0"]}}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		cfg, err := Rules(text)
		if err != nil {
			return
		}
		args, err := Arguments(cfg)
		if err != nil {
			return
		}
		if _, err := Rules([]byte(args[3])); err != nil {
			t.Fatalf("what was taken is refused when written again: %v\n%s", err, args[3])
		}
	})
}
