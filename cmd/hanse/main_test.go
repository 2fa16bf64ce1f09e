package main

import (
	"bytes"
	"context"
	"flag"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/hanse-mesh/hanse/cmd/internal/admin"
	"github.com/hanse-mesh/hanse/cmd/internal/admin/admintest"
)

var update = flag.Bool("update", false, "rewrite the goldens in testdata")

// serveFake serves a fresh fake mesh at a Unix socket in dir until cleanup.
func serveFake(dir string, cleanup func(func())) (string, error) {
	socket := filepath.Join(dir, "hansed.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		return "", err
	}
	srv := &http.Server{Handler: admin.Handler(admintest.New(time.Now), slog.New(slog.DiscardHandler)), ReadHeaderTimeout: time.Second}
	done := make(chan struct{})
	go func() { defer close(done); srv.Serve(l) }()
	cleanup(func() { srv.Close(); <-done })
	return socket, nil
}

// TestScripts runs the real command against a fake hansed on a real socket. The command is built without the race detector, with
// which each start of it would take half a second.
func TestScripts(t *testing.T) {
	bin := t.TempDir()
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", bin, ".").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		UpdateScripts:       *update,
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(env *testscript.Env) error {
			dir, err := os.MkdirTemp("", "hanse") // a socket's path must be short
			if err != nil {
				return err
			}
			env.Defer(func() { os.RemoveAll(dir) })
			socket, err := serveFake(dir, env.Defer)
			if err != nil {
				return err
			}
			env.Setenv("PATH", bin+string(os.PathListSeparator)+env.Getenv("PATH"))
			env.Setenv("HANSE_SOCKET", socket)
			env.Setenv("HANSE_CONFIG", "")
			env.Setenv("HOME", env.WorkDir)
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			// exitcode N COMMAND… runs a command that must exit with N; its output is for stdout and stderr as of exec.
			"exitcode": func(ts *testscript.TestScript, neg bool, args []string) {
				err := ts.Exec(args[1], args[2:]...)
				code := "0"
				if err != nil {
					code = strings.TrimPrefix(err.Error(), "exit status ")
				}
				if code != args[0] {
					ts.Fatalf("%s: exit code %s, want %s", strings.Join(args[1:], " "), code, args[0])
				}
			},
		},
	})
}

// terminal is a cli whose standard streams are terminals, against a fake mesh.
func terminal(t *testing.T, typed string) (*cli, *bytes.Buffer, *bytes.Buffer) {
	t.Helper()
	socket, err := serveFake(t.TempDir(), func(f func()) { t.Cleanup(f) })
	if err != nil {
		t.Fatal(err)
	}
	var out, errs bytes.Buffer
	return &cli{
		in: strings.NewReader(typed), out: &out, err: &errs, inTTY: true, outTTY: true, errTTY: true, now: time.Now,
		getenv:     func(k string) string { return map[string]string{"HANSE_SOCKET": socket}[k] },
		readSecret: func() (string, error) { return typed, nil },
	}, &out, &errs
}

func TestOnATerminal(t *testing.T) {
	for _, x := range []struct {
		name, typed, line string
		code              int
		out, err          []string
	}{
		{"token is explained", "", "token create --for south", 0, []string{`Token for cluster "south" (one use, expires in 1`, "hns1_south", "hanse join -"}, nil},
		{"join asks without echo", "hns1_good\n", "join", 0, []string{"\x1b[32m✓\x1b[0m token valid", "Joined.\x1b[0m 3 clusters in mesh \"demo\"; east imports 14 services, exports 6."}, []string{"Mesh token: "}},
		{"leave asks", "n\n", "leave north --force", 1, nil, []string{"Remove north from the mesh? [y/N]", "Nothing was changed."}},
		{"leave does", "yes\n", "leave north --force", 0, []string{"north left the mesh."}, nil},
		{"trust remove asks", "\n", "trust remove east.demo", 1, nil, []string{"Refuse every identity of east.demo"}},
		{"trust distrust asks", "n\n", "trust distrust east.demo", 1, nil, []string{"Refuse every identity that rests on east.demo", "Nothing was changed."}},
		{"trust rotate shows progress", "", "trust rotate", 0, []string{"signs now"}, []string{"root 1f2a33c4d5e6f708 waits to be loaded by cluster north   0s   at the latest in 2d   Ctrl-C is harmless"}},
		{"drill shows its plan and asks", "n\n", "drill run --drain", 1, nil, []string{"NOT COVERED", "Start it? [y/N]", "Nothing started."}},
		{"drill shows progress", "y\n", "drill run --drain --for 60s", 0, []string{"PASSED"}, []string{"▁▁▁▁▁▁▁▁▁▁ 0s of 60s", "Ctrl-C stops and heals"}},
		{"states are coloured", "", "clusters", 0, []string{"\x1b[33msuspect\x1b[0m", "\x1b[32mfresh\x1b[0m"}, nil},
	} {
		t.Run(x.name, func(t *testing.T) {
			c, out, errs := terminal(t, x.typed)
			if code := c.run(t.Context(), strings.Fields(x.line)); code != x.code {
				t.Errorf("exit code %d, want %d", code, x.code)
			}
			for _, want := range x.out {
				if !strings.Contains(out.String(), want) {
					t.Errorf("standard output lacks %q:\n%s", want, out)
				}
			}
			for _, want := range x.err {
				if !strings.Contains(errs.String(), want) {
					t.Errorf("standard error lacks %q:\n%s", want, errs)
				}
			}
			if strings.Contains(errs.String(), "hns1_") {
				t.Errorf("standard error shows the token:\n%s", errs)
			}
		})
	}
}

// TestNothingWasMeasured says so of a drill that nobody called into, rather than "success 100%".
func TestNothingWasMeasured(t *testing.T) {
	d := admin.Drill{ID: "d-1", State: "done", Verdict: "PASSED", Success: 1, Spec: admin.DrillSpec{Mode: "drain"}}
	var out bytes.Buffer
	c := &cli{out: &out, err: &out, now: time.Now, getenv: func(string) string { return "" }}
	if err := c.reportDrill(d); err != nil {
		t.Fatal(err)
	}
	if s := out.String(); !strings.Contains(s, "nobody called: ") || !strings.Contains(s, "success -, p50 - → -, p99 - → -") || strings.Contains(s, "100") {
		t.Errorf("the report of no call:\n%s", s)
	}
	out.Reset()
	c.output = "junit"
	if err := c.reportDrill(d); err != nil {
		t.Fatal(err)
	}
	if s := out.String(); !strings.Contains(s, `failures="0" skipped="4"`) || !strings.Contains(s, `<skipped message="nobody called">`) {
		t.Errorf("no call as JUnit:\n%s", s)
	}
}

// TestUnusedLevel: what explain says is not used has no level.
func TestUnusedLevel(t *testing.T) {
	var out bytes.Buffer
	c := &cli{out: &out, err: &out, now: time.Now, getenv: func(string) string { return "" }}
	c.printExplanation(admin.Explanation{OK: true, Summary: "OK: it goes", Levels: []admin.ExplainLevel{{Cluster: "north", Healthy: 1, Total: 1, Share: 1}, {Level: -1, Cluster: "east", Note: "not used: it is withdrawn"}}}, "a", "b")
	if s := out.String(); strings.Contains(s, "-1") || !strings.Contains(s, "         -  east") {
		t.Errorf("the levels:\n%s", s)
	}
}

func TestNoColour(t *testing.T) {
	c, out, _ := terminal(t, "")
	env := c.getenv
	c.getenv = func(k string) string {
		if k == "NO_COLOR" {
			return "1"
		}
		return env(k)
	}
	if code := c.run(t.Context(), []string{"clusters"}); code != 0 || strings.Contains(out.String(), "\x1b") {
		t.Errorf("exit code %d, output with colours in spite of NO_COLOR: %q", code, out)
	}
}

// A drill that is interrupted is stopped, heals and is reported.
func TestInterruptStopsTheDrill(t *testing.T) {
	ctx, interrupt := context.WithCancel(t.Context())
	c, out, _ := terminal(t, "")
	c.err = writerFunc(func(b []byte) (int, error) {
		if bytes.Contains(b, []byte("running")) {
			interrupt()
		}
		return len(b), nil
	})
	if code := c.run(ctx, strings.Fields("drill run --slow --yes")); code != 0 || !strings.Contains(out.String(), "PASSED\x1b[0m (stopped)") {
		t.Errorf("exit code %d:\n%s", code, out)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(b []byte) (int, error) { return f(b) }

// The committed reference is what the commands say. `make docs` rewrites it.
func TestReferenceIsCurrent(t *testing.T) {
	const committed = "../../docs/cli"
	dir := t.TempDir()
	c := &cli{out: os.Stdout, err: os.Stderr, getenv: func(string) string { return "" }, now: time.Now}
	if code := c.run(t.Context(), []string{"docs", dir}); code != 0 {
		t.Fatalf("exit code %d", code)
	}
	names := map[string]bool{}
	for _, d := range []string{dir, committed} {
		files, err := filepath.Glob(filepath.Join(d, "*.md"))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			names[filepath.Base(f)] = true
		}
	}
	for name := range names {
		if strings.HasPrefix(name, "hanse-proxy") {
			continue // a test of that command's
		}
		want, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Errorf("docs/cli/%s is of no command: make docs, and remove it", name)
			continue
		}
		if got, err := os.ReadFile(filepath.Join(committed, name)); err != nil || !bytes.Equal(got, want) {
			t.Errorf("docs/cli/%s is out of date: make docs (%v)", name, err)
		}
	}
}

// Every command says what it is for, and all that people run show an example.
func TestEveryCommandHelps(t *testing.T) {
	c := &cli{getenv: func(string) string { return "" }}
	for _, cmd := range c.root().Commands() {
		for _, x := range append(cmd.Commands(), cmd) {
			if x.Hidden {
				continue
			}
			if x.Short == "" || (x.Runnable() && !x.HasSubCommands() && x.Example == "") {
				t.Errorf("%s lacks a short text or an example", x.CommandPath())
			}
		}
	}
}

func TestAges(t *testing.T) {
	for s, want := range map[float64]string{-3: "0s", 0.4: "0s", 47: "47s", 119: "119s", 120: "2m", 200: "3m20s", 900: "15m", 7199: "119m", 7200: "2h", 200000: "2d"} {
		if got := age(s); got != want {
			t.Errorf("age(%v) = %s, want %s", s, got, want)
		}
	}
	for share, want := range map[float64]string{1: "100.0%", 0.99999: "99.99%", 0.9995: "99.95%", 0.912: "91.2%"} {
		if got := percent(share); got != want {
			t.Errorf("percent(%v) = %s, want %s", share, got, want)
		}
	}
}
