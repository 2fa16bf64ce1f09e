package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hanse-mesh/hanse/proxy/capture"
)

// Agent installs rules for who waits for them on its node. It needs the node's processes (hostPID), and CAP_SYS_PTRACE, CAP_SYS_ADMIN and CAP_NET_ADMIN.
type Agent struct {
	Proc string // default /proc
	Log  *slog.Logger

	every time.Duration // default 200ms
	known map[int]*process
	host  [2]uint64 // the node's network namespace
}

// process is one that there was when last looked.
type process struct {
	first time.Time // seen
	again time.Time // not before, after an error
	done  bool
	round uint64
}

const (
	lookEvery = 200 * time.Millisecond
	settled   = time.Minute // after which a process will not become one that asks: a container's first is another program for a moment
	retryIn   = 2 * time.Second

	maxWarnings = 5 // at once: whoever likes may ask for nonsense
)

// Run works until ctx ends, and returns nil then.
func (a *Agent) Run(ctx context.Context) error {
	if a.Proc == "" {
		a.Proc = "/proc"
		if os.Getpid() == 1 {
			return errors.New("there are no processes but its own: the node's are needed (hostPID: true)")
		}
	}
	if a.every == 0 {
		a.every = lookEvery
	}
	var err error
	if a.host, err = namespace(filepath.Join(a.Proc, "1/ns/net")); err != nil {
		return fmt.Errorf("the node's network namespace: %w (CAP_SYS_PTRACE is needed)", err)
	}
	a.known = map[int]*process{}
	tick := time.NewTicker(a.every)
	defer tick.Stop()
	a.Log.Info("captures for pods of this node that wait for it")
	for round := uint64(1); ; round++ {
		if err := a.look(round, time.Now()); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// look does what there is to do.
func (a *Agent) look(round uint64, now time.Time) error {
	dir, err := os.Open(a.Proc)
	if err != nil {
		return err
	}
	names, err := dir.Readdirnames(-1)
	_ = dir.Close()
	if err != nil {
		return err
	}
	warned := 0
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		p := a.known[pid]
		if p == nil {
			p = &process{first: now}
			a.known[pid] = p
		}
		p.round = round
		if p.done || now.Before(p.again) || now.Sub(p.first) > settled {
			continue
		}
		asked, err := a.serve(pid)
		switch {
		case !asked:
		case err != nil:
			if warned++; warned <= maxWarnings {
				a.Log.Warn("capture is not installed; trying again", "pid", pid, "err", err)
			}
			p.again = now.Add(retryIn)
		default:
			p.done = true
		}
	}
	for pid, p := range a.known {
		if p.round != round {
			delete(a.known, pid)
		}
	}
	return nil
}

// serve installs the rules that a process asks for, if it does.
func (a *Agent) serve(pid int) (asked bool, err error) {
	dir, err := os.Open(filepath.Join(a.Proc, strconv.Itoa(pid))) // of this process, whoever has its number later
	if err != nil {
		return false, nil // gone
	}
	defer dir.Close()
	self := fmt.Sprintf("/proc/self/fd/%d", dir.Fd())
	f, err := os.Open(self + "/cmdline")
	if err != nil {
		return false, nil
	}
	cmdline, err := io.ReadAll(io.LimitReader(f, maxRules+4<<10))
	_ = f.Close()
	if err != nil {
		return false, nil
	}
	text, ok := asks(cmdline)
	if !ok {
		return false, nil
	}
	cfg, err := Rules(text)
	if err != nil {
		return true, err
	}
	ns, err := os.Open(self + "/ns/net")
	if err != nil {
		return true, fmt.Errorf("its network namespace: %w", err)
	}
	defer ns.Close()
	at := fmt.Sprintf("/proc/self/fd/%d", ns.Fd())
	id, err := namespace(at)
	if err != nil {
		return true, err
	}
	if id == a.host {
		return true, errors.New("it is in the node's own network, for which nobody may ask")
	}
	rules := capture.In(at)
	state, err := rules.Show(cfg)
	if err != nil {
		return true, err
	}
	if state.Installed { // once: the first to ask is there before any application
		if !state.Matches {
			a.Log.Warn("other rules than those asked for are installed already, and stay", "pid", pid, "table", cfg.Table)
		}
		return true, nil
	}
	if _, err := rules.Install(cfg); err != nil {
		return true, err
	}
	a.Log.Info("captured", "pid", pid, "table", cfg.Table, "netns", id[1])
	return true, nil
}

// namespace identifies one, by device and inode.
func namespace(path string) ([2]uint64, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return [2]uint64{}, fmt.Errorf("stat %s: %w", path, err)
	}
	return [2]uint64{st.Dev, st.Ino}, nil
}
