package kube

import (
	"cmp"
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

var update = flag.Bool("update", false, "rewrite the goldens in testdata/scripts")

// serial runs scripts one after the other: they share an API server.
type serial struct{ *testing.T }

func (s serial) Run(name string, f func(testscript.T)) {
	s.T.Run(name, func(t *testing.T) { f(serial{t}) })
}
func (serial) Parallel()     {}
func (serial) Verbose() bool { return testing.Verbose() }

// changing are parts of an output that are others each time.
var changing = []struct {
	re *regexp.Regexp
	to string
}{
	{regexp.MustCompile(`\d+(\.\d)?s apart`), "0s apart"},
	{regexp.MustCompile(`127\.\d+\.\d+\.\d+:\d+`), "ADDRESS"},
	{regexp.MustCompile(`\d+(\.\d+)?(ms|µs)`), "1ms"},
	{regexp.MustCompile(`14m\d+s`), "14m59s"},
	{regexp.MustCompile(`member [0-9a-f]{8}`), "member ID"},
	{regexp.MustCompile(`(a trial Pod \(not made\) is refused: ).*`), "${1}…"}, // as the machine's resolver has it
	{regexp.MustCompile(`"[0-9a-f]{16}"`), `"SUM"`},
	{regexp.MustCompile(`  waiting for the end of .*\n`), ""}, // if it is not gone at once
	{regexp.MustCompile(`after \d+(\.\d+)?s`), "after 0s"},
}

// TestScripts holds what people read when they install, change, look at, join and take out, word by word: against a real API server, in whose cluster nothing runs.
func TestScripts(t *testing.T) {
	s := start(t)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); finish(ctx, s) }()
	t.Cleanup(func() { cancel(); <-done })
	c := newCommand(t, s)
	hansed := filepath.Join(t.TempDir(), "hansed")
	if out, err := exec.Command("go", "build", "-trimpath", "-o", hansed, "../../cmd/hansed").CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	testscript.RunT(serial{t}, testscript.Params{
		Dir:                 "testdata/scripts",
		UpdateScripts:       *update,
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(env *testscript.Env) error {
			env.Defer(func() { c.run("uninstall", "--context", "west", "--yes", "--force") }) // the next one finds a cluster as this one did
			tools, err := filepath.Abs(tools)
			if err != nil {
				return err
			}
			for k, v := range map[string]string{"PATH": filepath.Dir(c.bin) + ":" + filepath.Dir(hansed) + ":" + tools + ":" + env.Getenv("PATH"), "HOME": env.WorkDir,
				"KUBECONFIG": filepath.Join(c.dir, "kubeconfig"), "HANSE_CONFIG": ""} {
				env.Setenv(k, v)
			}
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			// hanse N ARGS… runs hanse, which must exit with N. What it says is in the files out and err, without what is other each time.
			"hanse": func(ts *testscript.TestScript, _ bool, args []string) {
				code := "0"
				if err := ts.Exec("hanse", args[1:]...); err != nil {
					code = strings.TrimPrefix(err.Error(), "exit status ")
				}
				for from, to := range map[string]string{"stdout": "out", "stderr": "err"} {
					text := strings.NewReplacer(s.config.Host, "SERVER", ts.Getenv("WORK"), "$WORK", cmp.Or(ts.Getenv("HANSE_CONFIG"), "$CONFIG"), "$CONFIG").Replace(ts.ReadFile(from))
					for _, c := range changing {
						text = c.re.ReplaceAllString(text, c.to)
					}
					ts.Check(os.WriteFile(ts.MkAbs(to), []byte(text), 0o600))
				}
				if code != args[0] {
					ts.Fatalf("hanse %s: exit code %s, want %s", strings.Join(args[1:], " "), code, args[0])
				}
			},
			// hansed NAME… starts a hansed for each, outside of Kubernetes, and writes the contexts by which they are reached.
			"hansed": func(ts *testscript.TestScript, _ bool, args []string) {
				dir, err := os.MkdirTemp("", "hk") // a socket's path must be short
				ts.Check(err)
				ts.Defer(func() { os.RemoveAll(dir) })
				contexts := "contexts:\n"
				for _, name := range args {
					p := freePorts(t, 5)
					config := filepath.Join(dir, name+".yaml")
					ts.Check(os.WriteFile(config, fmt.Appendf(nil, "cluster: %[1]s\ntrustDomain: %[1]s.example\nmesh: hanse\ngateways: [%[2]q]\ndataDir: %[1]s\nsocket: %[1]s.sock\nfederation: {listen: %[3]q}\nidentity: {listen: %[4]q}\nxds: {listen: %[5]q}\nbundleEndpoint: {listen: %[6]q}\nadmin: {listen: %[7]q}\n",
						name, "127.0.0.1:15443", p[0], p[1], p[2], p[3], p[4]), 0o600))
					cmd := exec.Command(hansed, "--config", config)
					ts.Check(cmd.Start())
					ts.Defer(func() { _ = cmd.Process.Signal(os.Interrupt); _ = cmd.Wait() })
					contexts += fmt.Sprintf("- {name: %s, socket: %s}\n", name, filepath.Join(dir, name+".sock"))
					until(t, name+" answers", func() bool {
						_, code := c.run("--socket", filepath.Join(dir, name+".sock"), "status")
						return code == 0
					})
				}
				ts.Check(os.WriteFile(filepath.Join(dir, "contexts.yaml"), []byte(contexts), 0o600))
				ts.Setenv("HANSE_CONFIG", filepath.Join(dir, "contexts.yaml"))
			},
		},
	})
}
