package demo

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"
)

// stopTime is how long a process may take to end in an orderly way before it is killed.
const stopTime = 6 * time.Second

// process is one that the demo started, as its list keeps it.
type process struct {
	Name string `json:"name"`
	PID  int    `json:"pid"`
}

// processes starts processes, each in its own group so that the terminal's Ctrl-C reaches the demo alone, and stops them all.
type processes struct {
	dir     string
	list    *os.File       // of what was started, a JSON line each; for Down
	died    chan error     // the first that ended by itself
	starts  chan startJob  // to the thread that starts all
	ended   sync.WaitGroup // of the processes
	mu      sync.Mutex     // guards those below
	running map[int]string
	stopped bool
}

type startJob struct {
	cmd  *exec.Cmd
	done chan error
}

func listPath(dir string) string { return filepath.Join(dir, "processes.jsonl") }

// newProcesses returns processes that end when this program does; close must be called.
func newProcesses(dir string) (*processes, error) {
	f, err := os.OpenFile(listPath(dir), os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	p := &processes{dir: dir, list: f, died: make(chan error, 1), starts: make(chan startJob), running: map[int]string{}}
	go func() {
		// A child's death signal comes when the thread that started it ends: this one lasts as long as the demo.
		runtime.LockOSThread()
		for j := range p.starts {
			j.done <- j.cmd.Start()
		}
	}()
	return p, nil
}

func (p *processes) log(name string) string { return filepath.Join(p.dir, "log", name+".log") }

// start starts a program. Its output goes to the log of its name. If it ends before stop, died hears of it.
func (p *processes) start(name, program string, args ...string) error {
	out, err := os.OpenFile(p.log(name), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	cmd := exec.Command(program, args...)
	cmd.Stdout, cmd.Stderr, cmd.Dir = out, out, p.dir
	cmd.SysProcAttr = attributes()
	j := startJob{cmd, make(chan error, 1)}
	p.starts <- j
	if err := <-j.done; err != nil {
		return fmt.Errorf("start %s: %w", name, err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.running[cmd.Process.Pid] = name
	if err := json.NewEncoder(p.list).Encode(process{name, cmd.Process.Pid}); err != nil {
		return err
	}
	p.ended.Go(func() {
		err := cmd.Wait()
		p.mu.Lock()
		delete(p.running, cmd.Process.Pid)
		stopped := p.stopped
		p.mu.Unlock()
		if !stopped {
			select {
			case p.died <- fmt.Errorf("%s ended (%v): %s", name, state(err), lastLines(p.log(name))):
			default:
			}
		}
	})
	return nil
}

func state(err error) string {
	if err == nil {
		return "exit status 0"
	}
	return err.Error()
}

// close stops everything, gateways and sidecars together with the control planes, and returns when all have ended.
func (p *processes) close() error {
	p.mu.Lock()
	p.stopped = true
	p.mu.Unlock()
	p.signal(syscall.SIGTERM)
	kill := time.AfterFunc(stopTime, func() { p.signal(syscall.SIGKILL) })
	p.ended.Wait()
	kill.Stop()
	close(p.starts) // only now: with its thread all children would be killed
	return errors.Join(p.list.Close(), os.Remove(listPath(p.dir)))
}

func (p *processes) signal(s syscall.Signal) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for pid := range p.running {
		_ = syscall.Kill(-pid, s) // the group; it may be gone
	}
}

// lastLines is the end of a log, for the person who must know why.
func lastLines(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(lines[max(0, len(lines)-3):], "\n") + "\n(" + path + ")"
}

// lock is held by the demo that runs in a directory, and holds its process ID.
type lock struct{ f *os.File }

var errLocked = errors.New("a demo runs here already")

func lockPath(dir string) string { return filepath.Join(dir, "lock") }

// takeLock returns errLocked if a demo runs in dir.
func takeLock(dir string) (*lock, error) {
	f, err := os.OpenFile(lockPath(dir), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, errLocked
		}
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	if err := f.Truncate(0); err != nil {
		f.Close()
		return nil, err
	}
	if _, err := fmt.Fprintln(f, os.Getpid()); err != nil {
		f.Close()
		return nil, err
	}
	return &lock{f}, nil
}

func (l *lock) release() error { return l.f.Close() }

// holder is the process that holds the lock of dir, or 0.
func holder(dir string) (int, error) {
	f, err := os.Open(lockPath(dir))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	err = syscall.Flock(int(f.Fd()), syscall.LOCK_SH|syscall.LOCK_NB)
	if err == nil {
		return 0, nil
	}
	if !errors.Is(err, syscall.EWOULDBLOCK) {
		return 0, err
	}
	var pid int
	if _, err := fmt.Fscan(io.LimitReader(f, 32), &pid); err != nil || pid <= 1 {
		return 0, fmt.Errorf("%s does not hold a process ID", lockPath(dir))
	}
	return pid, nil
}

// ErrNone says that there is no demo in a directory.
var ErrNone = errors.New("there is no demo")

// Status lists the processes of the demo in dir, and whether each lives. Its first is the demo itself.
func Status(dir string) ([]Process, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	pid, err := holder(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, ErrNone
	}
	if err != nil {
		return nil, err
	}
	l := []Process{{Name: "hanse demo", PID: pid, Alive: pid != 0}}
	listed, err := listed(dir)
	if err != nil {
		return nil, err
	}
	for _, p := range listed {
		l = append(l, Process{Name: p.Name, PID: p.PID, Alive: alive(p.PID, dir)})
	}
	return l, nil
}

// Process is one process of a demo.
type Process struct {
	Name  string `json:"name"`
	PID   int    `json:"pid"`
	Alive bool   `json:"alive"`
}

func listed(dir string) ([]process, error) {
	b, err := os.ReadFile(listPath(dir))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var l []process
	for s := bufio.NewScanner(bytes.NewReader(b)); s.Scan(); {
		var p process
		if json.Unmarshal(s.Bytes(), &p) == nil && p.PID > 1 { // a last line may be cut off
			l = append(l, p)
		}
	}
	return l, nil
}

// alive reports whether pid is still the process that was started for dir, and not another that got its number.
func alive(pid int, dir string) bool {
	cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		if _, e := os.Stat("/proc/self"); e == nil {
			return false
		}
		if cmdline, err = exec.Command("ps", "-o", "command=", "-p", fmt.Sprint(pid)).Output(); err != nil {
			return false
		}
	}
	return bytes.Contains(cmdline, []byte(dir+string(os.PathSeparator)))
}

// Down ends the demo in dir, also one that was killed and left processes behind. It returns the names of what it ended.
func Down(ctx context.Context, dir string) ([]string, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	pid, err := holder(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, ErrNone
	}
	if err != nil {
		return nil, err
	}
	var ended []string
	wait := func(limit time.Duration, gone func() bool) bool {
		ctx, cancel := context.WithTimeout(ctx, limit)
		defer cancel()
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for !gone() {
			select {
			case <-ctx.Done():
				return false
			case <-tick.C:
			}
		}
		return true
	}
	if pid != 0 {
		gone := func() bool {
			pid, err := holder(dir)
			return err == nil && pid == 0
		}
		ended = append(ended, "hanse demo")
		if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
			return nil, fmt.Errorf("end the demo (process %d): %w", pid, err)
		}
		if !wait(2*stopTime, gone) {
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				return nil, fmt.Errorf("kill the demo (process %d): %w", pid, err)
			}
			wait(stopTime, gone)
		}
	}
	left, err := listed(dir)
	if err != nil {
		return ended, err
	}
	anyAlive := func() bool {
		for _, p := range left {
			if alive(p.PID, dir) {
				return true
			}
		}
		return false
	}
	for _, s := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		for _, p := range left {
			if alive(p.PID, dir) {
				if s == syscall.SIGTERM {
					ended = append(ended, p.Name)
				}
				_ = syscall.Kill(-p.PID, s)
			}
		}
		wait(stopTime, func() bool { return !anyAlive() })
	}
	if anyAlive() {
		return ended, fmt.Errorf("some processes of %s could not be ended: see %s", dir, listPath(dir))
	}
	if err := os.Remove(listPath(dir)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return ended, err
	}
	return ended, nil
}
