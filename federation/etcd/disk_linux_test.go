package etcd_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hanse-mesh/hanse/federation/etcd"
)

const fullDiskEnv = "HANSE_TEST_FULL_DISK"

// TestFullDisk fills a small file system of its own, in a mount namespace: what was acknowledged is there when there is room again.
func TestFullDisk(t *testing.T) { fullDisk(t, -1) }

// TestFullDiskTears takes the rest of the space away where the next write goes beyond what etcd's log has in advance, 64 MB: it is torn there.
func TestFullDiskTears(t *testing.T) { fullDisk(t, 122) }

// fullDisk fills the disk; after so many keys, if it comes to that, at once.
func fullDisk(t *testing.T, after int) {
	if os.Getenv(fullDiskEnv) == "" {
		t.Parallel()
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v", "-test.count=1")
		cmd.Env = append(os.Environ(), fullDiskEnv+"="+t.TempDir())
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS}
		if os.Geteuid() != 0 {
			cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWUSER
			cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
			cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
		}
		out, err := cmd.CombinedOutput()
		if os.Getenv("HANSE_NO_SKIP") == "" && (errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EINVAL)) {
			t.Skipf("SKIPPED, NOT TESTED: this machine gives no mount namespace (%v); run as root, or allow user namespaces", err)
		}
		if err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
			t.Fatalf("in its namespace: %v\n%s", err, out)
		}
		t.Logf("%s", out)
		return
	}
	dir, step, _ := strings.Cut(os.Getenv(fullDiskEnv), "|")
	start := func() (*etcd.Embedded, error) {
		return etcd.StartEmbedded(t.Context(), etcd.EmbeddedConfig{Dir: dir + "/data", Name: "west"})
	}
	full := func(err error) {
		t.Helper()
		t.Log(err)
		var de *etcd.DataError
		if !errors.As(err, &de) || !strings.Contains(err.Error(), "no space left on device") || !strings.Contains(err.Error(), dir) || !strings.Contains(de.Hint(), "free space") {
			t.Errorf("error %v does not say that the disk is full, where, and what to do", err)
		}
	}
	const size = 512 << 10
	key := func(i int) string { return fmt.Sprintf("key%04d", i) }
	switch step {
	case "":
		mount := func(flags uintptr, size string) {
			t.Helper()
			if err := unix.Mount("tmpfs", dir, "tmpfs", flags, "size="+size); err != nil {
				t.Fatalf("mount a small file system: %v", err)
			}
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			t.Fatal(err)
		}
		room := "180m" // etcd's log alone takes two files of 64 MB
		if after > 0 {
			room = "260m"
		}
		mount(0, room)
		for _, step := range []string{"fill", "restart"} { // each a process of its own, as hansed's end is that of its process
			runStep(t, dir, step)
		}
		mount(unix.MS_REMOUNT, "800m")
		runStep(t, dir, "check")
	case "fill":
		e, err := start()
		if err != nil {
			t.Fatal(err)
		}
		kv, n := etcd.NewKV(e.Store(), ""), 0
		for ; err == nil; n++ {
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			_, err = kv.Put(ctx, key(n), make([]byte, size))
			cancel()
			if n+1 == after {
				fillUp(t, dir)
			}
		}
		t.Logf("after %d keys: %v", n-1, err)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		full(e.Wait(ctx))
		full(e.Close())
		if err := os.WriteFile(dir+"/../acknowledged", fmt.Append(nil, n-1), 0o600); err != nil {
			t.Fatal(err)
		}
	case "restart": // as a supervisor does: it may even work until the next write
		if e, err := start(); err != nil {
			full(err)
		} else {
			_ = e.Close()
		}
	case "check":
		e, err := start()
		if err != nil {
			t.Fatalf("with room again: %v", err)
		}
		defer e.Close()
		b, err := os.ReadFile(dir + "/../acknowledged")
		if err != nil {
			t.Fatal(err)
		}
		n, err := strconv.Atoi(string(b))
		if err != nil {
			t.Fatal(err)
		}
		kv := etcd.NewKV(e.Store(), "")
		for i := range n {
			if v, _, err := kv.Get(t.Context(), key(i)); err != nil || len(v) != size {
				t.Fatalf("%s, which was acknowledged, is %d bytes: %v", key(i), len(v), err)
			}
		}
		if _, err := kv.Put(t.Context(), "more", []byte("v")); err != nil {
			t.Error(err)
		}
		if kept, err := filepath.Glob(dir + "/data/member/wal/*.broken"); after > 0 && (err != nil || len(kept) != 1) {
			t.Errorf("after %d keys: nothing was torn: %v %v", n, kept, err)
		}
	}
}

// fillUp leaves hardly anything of a file system free.
func fillUp(t *testing.T, dir string) {
	t.Helper()
	f, err := os.Create(dir + "/filler")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for err := error(unix.ENOSPC); errors.Is(err, unix.ENOSPC); { // etcd may have taken some of it meanwhile
		var s unix.Statfs_t
		if err := unix.Fstatfs(int(f.Fd()), &s); err != nil {
			t.Fatal(err)
		}
		free := int64(s.Bavail)*s.Bsize - 64<<10
		if free <= 0 {
			return
		}
		if err = unix.Fallocate(int(f.Fd()), 0, 0, free); err != nil && !errors.Is(err, unix.ENOSPC) {
			t.Fatal(err)
		}
	}
}

func runStep(t *testing.T, dir, step string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v", "-test.count=1")
	cmd.Env = append(os.Environ(), fullDiskEnv+"="+dir+"|"+step)
	out, err := cmd.CombinedOutput()
	if t.Logf("%s: %s", step, out); err != nil {
		t.Fatalf("%s: %v", step, err)
	}
}
