package demo

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hanse-mesh/hanse/discovery/objects"
)

func short(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "demo") // a socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func TestLayout(t *testing.T) {
	for _, own := range []bool{true, false} {
		dir := short(t)
		l, err := newLayout(dir, own)
		if err != nil {
			t.Fatal(err)
		}
		seen := map[string]bool{}
		for _, a := range l.listeners() {
			if seen[a] {
				t.Errorf("own addresses %v: %s is used twice", own, a)
			}
			seen[a] = true
			if !strings.HasPrefix(a, "127.0.") {
				t.Errorf("%s is not a loopback address", a)
			}
		}
		if err := l.write(); err != nil {
			t.Fatal(err)
		}
		for _, c := range l.clusters {
			path := filepath.Join(c.Dir, "mesh.yaml")
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			objs, err := objects.Decode(b, path)
			if err != nil || len(objs) < 4 {
				t.Errorf("%d objects, %v", len(objs), err)
			}
		}
		if got, err := Contexts(dir); err != nil || got != filepath.Join(dir, "config.yaml") {
			t.Errorf("contexts %q, %v", got, err)
		}
	}
	if _, err := newLayout("/"+strings.Repeat("x", maxSocketDir), true); err == nil {
		t.Error("a directory too deep for Unix sockets was accepted")
	}
}

func TestPrepare(t *testing.T) {
	dir := short(t)
	precious := filepath.Join(dir, "precious")
	if err := os.WriteFile(precious, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := prepare(dir); err == nil {
		t.Fatal("a directory with other files was taken")
	}
	if _, err := os.Stat(precious); err != nil {
		t.Fatal(err)
	}

	dir = filepath.Join(short(t), "new")
	l, err := prepare(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := prepare(dir); err == nil || !strings.Contains(err.Error(), "runs in") {
		t.Errorf("a second demo in one directory: %v", err)
	}
	old := filepath.Join(dir, "west")
	if err := os.Mkdir(old, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := l.release(); err != nil {
		t.Fatal(err)
	}
	if l, err = prepare(dir); err != nil {
		t.Fatal(err)
	}
	defer l.release()
	if _, err := os.Stat(old); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("an earlier demo's files are still there: %v", err)
	}
}

// What a killed demo left behind is found and ended, and nothing else.
func TestDown(t *testing.T) {
	dir := short(t)
	if _, err := Down(t.Context(), dir); !errors.Is(err, ErrNone) {
		t.Errorf("down without a demo: %v", err)
	}
	held, err := prepare(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "log"), 0o700); err != nil {
		t.Fatal(err)
	}
	p, err := newProcesses(dir)
	if err != nil {
		t.Fatal(err)
	}
	// The shell's command line names the directory as hansed's does; it has a child, as a wrapper would.
	if err := p.start("west-hansed", "/bin/sh", "-c", "sleep 1000; true", filepath.Join(dir, "west", "hansed.yaml")); err != nil {
		t.Fatal(err)
	}
	if _, err := p.list.WriteString(`{"name":"another's","pid":` + "1}\n{\"na"); err != nil { // cut off, and not ours
		t.Fatal(err)
	}
	if err := held.release(); err != nil { // as if the demo were gone
		t.Fatal(err)
	}
	l, err := Status(dir)
	if err != nil || len(l) != 2 || l[0].Alive || !l[1].Alive {
		t.Fatalf("status %+v, %v", l, err)
	}
	if l, err := prepare(dir); err == nil {
		l.release()
		t.Error("a demo started beside the processes of an earlier one")
	}
	ended, err := Down(t.Context(), dir)
	if err != nil || len(ended) != 1 || ended[0] != "west-hansed" {
		t.Errorf("down ended %v, %v", ended, err)
	}
	if err := <-p.died; !strings.Contains(err.Error(), "west-hansed ended") {
		t.Error(err)
	}
	if err := p.close(); err != nil && !errors.Is(err, os.ErrNotExist) { // Down removed the list
		t.Error(err)
	}
	if ended, err := Down(t.Context(), dir); err != nil || len(ended) > 0 {
		t.Errorf("down again ended %v, %v", ended, err)
	}
}

func TestProcessesEndWithTheDemo(t *testing.T) {
	dir := short(t)
	if err := os.Mkdir(filepath.Join(dir, "log"), 0o700); err != nil {
		t.Fatal(err)
	}
	p, err := newProcesses(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"a", "b"} {
		if err := p.start(name, "/bin/sh", "-c", "sleep 1000; true", filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	l, err := listed(dir)
	if err != nil || len(l) != 2 {
		t.Fatalf("%v, %v", l, err)
	}
	if err := p.close(); err != nil {
		t.Fatal(err)
	}
	for _, x := range l {
		if alive(x.PID, dir) {
			t.Errorf("%s lives on", x.Name)
		}
	}
}
