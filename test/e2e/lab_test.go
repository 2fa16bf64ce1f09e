package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"text/template"
	"time"

	"github.com/hanse-mesh/hanse/deploy"
)

// soak asks for full-length timers.
func soak() bool { return os.Getenv("HANSE_SOAK") != "" }

// Each lab of a run has a network 127.N.0.0/16 to itself.
var (
	firstNet = rand.IntN(128)
	nets     atomic.Int32
)

// bin is where the programs are; TestMain builds them.
var bin string

// built names the folder of the programs where they are built already.
const built = "HANSE_E2E_BIN"

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	if filepath.Base(os.Args[0]) == stampsProgram {
		return stamps(os.Args[1])
	}
	if target := os.Getenv(grpcTarget); target != "" {
		return grpcClient(target)
	}
	if runtime.GOOS != "linux" {
		fmt.Println("e2e: SKIPPED: the tests need addresses of 127.0.0.0/8 that anybody can bind, as on Linux")
		return 0
	}
	if bin = os.Getenv(built); bin != "" { // a test that runs itself again in a namespace
		return m.Run()
	}
	flag.Parse()
	if given := flag.Lookup("test.parallel"); given.Value.String() == given.DefValue { // the tests wait far more than they work
		if err := flag.Set("test.parallel", "4"); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	dir, err := os.MkdirTemp("", "hanse")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	bin = dir
	os.Setenv(built, dir)
	build := exec.Command("go", "build", "-trimpath", "-o", dir+"/", "../../cmd/hanse", "../../cmd/hansed", "../../cmd/hanse-proxy", "../../cmd/echo")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	build.Stdout, build.Stderr = os.Stderr, os.Stderr
	if err := build.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "build the programs:", err)
		return 1
	}
	return m.Run()
}

// cluster is what the templates of package deploy are filled in with.
type cluster struct {
	Name, TrustDomain, Region, Dir                   string
	Federation, Identity, XDS, BundleEndpoint, Admin string
	Gateway, GatewayAdmin, GatewayIP                 string
	Workloads                                        []*workload
	Services                                         []service
}

type service struct {
	Name      string
	Workloads []*workload
}

type workload struct {
	Cluster              *cluster
	Name, Service, Zone  string
	Serves, GatewaysOnly bool
	IP                   string
	Port, HopPort        int
	Outbound, Admin, App string
}

// lab is a mesh of real processes.
type lab struct {
	t        *testing.T
	dir      string
	clusters []*cluster
	starts   chan func()
	args     map[string][]string // more arguments of a process, by its name

	mu    sync.Mutex
	procs map[string]*process // guarded by mu; by name, such as "west/hansed"
}

type process struct {
	argv []string
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
}

// newLab plans clusters, each with a frontend (which only calls), payments in two zones, and a gateway. extra is appended to each hansed.yaml.
func newLab(t *testing.T, extra string, names ...string) *lab {
	t.Helper()
	dir, err := os.MkdirTemp("", "h") // short: Unix sockets' paths are
	if err != nil {
		t.Fatal(err)
	}
	l := &lab{t: t, dir: dir, procs: map[string]*process{}, starts: make(chan func()), args: map[string][]string{}}
	go func() { // children die with the thread that started them: this one lasts as long as the test
		runtime.LockOSThread()
		for f := range l.starts {
			f()
		}
	}()
	t.Cleanup(func() {
		l.stopAll()
		close(l.starts)
		if t.Failed() {
			l.tails()
		}
		os.RemoveAll(dir)
	})
	net := 64 + (firstNet+int(nets.Add(1)))%128
	for i, name := range names {
		ip := func(host int) string { return fmt.Sprintf("127.%d.%d.%d", net, i+1, host) }
		c := &cluster{Name: name, TrustDomain: name + ".test", Region: "eu-1", Dir: filepath.Join(dir, name),
			Federation: ip(1) + ":7443", Identity: ip(1) + ":7444", XDS: ip(1) + ":7445", BundleEndpoint: ip(1) + ":17446", Admin: ip(1) + ":7440",
			Gateway: ip(9) + ":15443", GatewayAdmin: ip(9) + ":15020", GatewayIP: ip(9)}
		for k, w := range []struct{ name, service, zone string }{
			{"frontend", "frontend", "eu-1a"}, {"intruder", "intruder", "eu-1a"}, {"pay-a", "payments", "eu-1a"}, {"pay-b", "payments", "eu-1b"},
		} {
			host := ip(11 + k)
			c.Workloads = append(c.Workloads, &workload{Cluster: c, Name: w.name, Service: w.service, Zone: w.zone, Serves: w.service == "payments",
				IP: host, Port: 8080, HopPort: 15008, Outbound: host + ":15001", Admin: host + ":15020", App: filepath.Join(c.Dir, w.name+".sock")})
		}
		c.Services = []service{{"payments", c.Workloads[2:]}}
		l.clusters = append(l.clusters, c)
		l.write(c, extra)
	}
	return l
}

func (l *lab) write(c *cluster, extra string) {
	t := template.Must(template.ParseFS(deploy.Demo, "demo/*.yaml.tmpl"))
	file := func(name, tmpl, more string, data any) {
		var b bytes.Buffer
		if err := t.ExecuteTemplate(&b, tmpl, data); err != nil {
			l.t.Fatal(err)
		}
		b.WriteString("\n" + more)
		if err := os.WriteFile(filepath.Join(c.Dir, name), b.Bytes(), 0o600); err != nil {
			l.t.Fatal(err)
		}
	}
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		l.t.Fatal(err)
	}
	file("hansed.yaml", "hansed.yaml.tmpl", "", c)
	if extra != "" { // the sample's identity section is replaced by a longer one
		path := filepath.Join(c.Dir, "hansed.yaml")
		b, err := os.ReadFile(path)
		if err != nil {
			l.t.Fatal(err)
		}
		s := strings.Replace(string(b), "identity:\n  listen:", "identity:\n"+lifes(extra)+"  listen:", 1) + timers(extra)
		if err := os.WriteFile(path, []byte(s), 0o600); err != nil {
			l.t.Fatal(err)
		}
	}
	file("gateway.yaml", "gateway.yaml.tmpl", "", c)
	file("mesh.yaml", "mesh.yaml.tmpl", "", c)
	for _, w := range c.Workloads {
		file(w.Name+".yaml", "sidecar.yaml.tmpl", "", w)
	}
}

// lifes and timers split what newLab was given: lines that begin with "identity " belong to that section.
func lifes(extra string) (out string) {
	for line := range strings.Lines(extra) {
		if v, ok := strings.CutPrefix(line, "identity "); ok {
			out += "  " + v
		}
	}
	return out
}

func timers(extra string) (out string) {
	for line := range strings.Lines(extra) {
		if !strings.HasPrefix(line, "identity ") {
			out += line
		}
	}
	return out
}

// shortTimers let a peer become suspect, and fresh again, within seconds.
const shortTimers = "timers: {suspect: 3s, recover: 2s, probe: 1s}\n"

// start starts a process under a name, or starts it again as it was.
func (l *lab) start(name string, argv ...string) {
	l.t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	if p := l.procs[name]; p != nil && len(argv) == 0 {
		argv = p.argv
	}
	log, err := os.OpenFile(filepath.Join(l.dir, strings.ReplaceAll(name, "/", "-")+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		l.t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(filepath.Join(bin, argv[0]), argv[1:]...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = l.dir, log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	l.starts <- func() { started <- cmd.Start() }
	if err := <-started; err != nil {
		l.t.Fatalf("start %s: %v", name, err)
	}
	p := &process{argv: argv, cmd: cmd, done: make(chan struct{})}
	l.procs[name] = p
	go func() {
		_ = cmd.Wait() // tests kill
		close(p.done)
	}()
}

func (l *lab) proc(name string) *process {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.procs[name] == nil {
		l.t.Fatalf("no process %s", name)
	}
	return l.procs[name]
}

func (l *lab) signal(name string, s syscall.Signal) {
	l.t.Helper()
	if err := l.proc(name).cmd.Process.Signal(s); err != nil {
		l.t.Fatalf("%s to %s: %v", s, name, err)
	}
}

// kill is kill -9, and waits for the end.
func (l *lab) kill(names ...string) {
	l.t.Helper()
	for _, n := range names {
		l.signal(n, syscall.SIGKILL)
	}
	for _, n := range names {
		<-l.proc(n).done
	}
}

// end is SIGTERM, and waits for the end.
func (l *lab) end(name string) {
	l.t.Helper()
	l.signal(name, syscall.SIGTERM)
	<-l.proc(name).done
}

func (l *lab) stopAll() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, p := range l.procs {
		_ = p.cmd.Process.Signal(syscall.SIGCONT)
		_ = p.cmd.Process.Signal(syscall.SIGTERM)
	}
	for _, p := range l.procs {
		select {
		case <-p.done:
		case <-time.After(8 * time.Second):
			_ = p.cmd.Process.Kill()
			<-p.done
		}
	}
}

// tails prints the ends of the logs of a failed test.
func (l *lab) tails() {
	logs, _ := filepath.Glob(filepath.Join(l.dir, "*.log"))
	for _, path := range logs {
		b, err := os.ReadFile(path)
		if err != nil || len(b) == 0 || strings.HasSuffix(path, "access.log") {
			continue
		}
		lines := strings.Split(strings.TrimSpace(string(b)), "\n")
		l.t.Logf("%s:\n%s", filepath.Base(path), strings.Join(lines[max(0, len(lines)-12):], "\n"))
	}
}

// hanse runs the command against a cluster and returns what it prints.
func (l *lab) hanse(c string, stdin string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(bin, "hanse"), append([]string{"--socket", filepath.Join(l.dir, c, "hansed.sock")}, args...)...)
	cmd.Stdin = strings.NewReader(stdin)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("hanse %s: %w: %s%s", strings.Join(args, " "), err, out.String(), errs.String())
	}
	return out.String(), nil
}

func (l *lab) must(c string, stdin string, args ...string) string {
	l.t.Helper()
	out, err := l.hanse(c, stdin, args...)
	if err != nil {
		l.t.Fatal(err)
	}
	return out
}

// get decodes what `hanse … -o json` prints.
func get[T any](l *lab, c string, args ...string) (v T) {
	l.t.Helper()
	out := l.must(c, "", append(args, "-o", "json")...)
	if err := json.Unmarshal([]byte(out), &v); err != nil {
		l.t.Fatalf("hanse %v: %v in %s", args, err, out)
	}
	return v
}

// eventually waits until f returns nil.
func (l *lab) eventually(within time.Duration, what string, f func() error) {
	l.t.Helper()
	deadline := time.Now().Add(within)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			l.t.Fatalf("%s: not within %s: %v", what, within, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// up starts every cluster and joins all to the first.
func (l *lab) up() {
	l.t.Helper()
	for _, c := range l.clusters {
		l.start(c.Name+"/hansed", append([]string{"hansed", "--config", filepath.Join(c.Dir, "hansed.yaml")}, l.args[c.Name+"/hansed"]...)...)
	}
	for _, c := range l.clusters {
		l.ready(c.Name+"/hansed", c.Admin)
		l.must(c.Name, "", "apply", "-f", filepath.Join(c.Dir, "mesh.yaml"))
		bundle := l.must(c.Name, "", "trust", "show", c.TrustDomain, "-o", "bundle")
		l.save(filepath.Join(c.Dir, "bundle.json"), bundle)
		l.save(filepath.Join(c.Dir, "gateway.token"), l.must(c.Name, "", "token", "create", "--gateway"))
		l.start(c.Name+"/gateway", "hanse-proxy", "--config", filepath.Join(c.Dir, "gateway.yaml"))
		for _, w := range c.Workloads {
			l.save(filepath.Join(c.Dir, w.Name+".token"), l.must(c.Name, "", "token", "create", "--agent", "shop/"+w.Service))
			if w.Serves {
				l.start(c.Name+"/"+w.Name+"-app", "echo", "serve", "--http", "unix:"+w.App, "--service", w.Service, "--cluster", c.Name, "--zone", w.Zone, "--instance", w.Name)
			}
			l.start(c.Name+"/"+w.Name, "hanse-proxy", "--config", filepath.Join(c.Dir, w.Name+".yaml"))
		}
	}
	for _, c := range l.clusters {
		l.ready(c.Name+"/gateway", c.GatewayAdmin)
		for _, w := range c.Workloads {
			l.ready(c.Name+"/"+w.Name, w.Admin)
		}
	}
	for _, c := range l.clusters[1:] {
		token := l.must(l.clusters[0].Name, "", "token", "create", "--for", c.Name)
		l.must(c.Name, token, "join", "-")
	}
	l.green()
}

func (l *lab) save(path, content string) {
	l.t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		l.t.Fatal(err)
	}
}

// green waits until every control plane says that all is well.
func (l *lab) green() {
	l.t.Helper()
	for _, c := range l.clusters {
		l.eventually(time.Minute, c.Name+" is green", func() error {
			out, err := l.hanse(c.Name, "", "status", "-o", "json")
			var s statusPage
			if jerr := json.Unmarshal([]byte(out), &s); jerr != nil {
				return errors.Join(err, jerr)
			}
			if !s.OK || len(s.Clusters) != len(l.clusters) {
				return fmt.Errorf("%s %+v", s.Summary, s.Checks)
			}
			return nil
		})
	}
}

func (l *lab) ready(name, addr string) {
	l.t.Helper()
	l.eventually(time.Minute, name+" is ready", func() error {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+"/readyz", nil)
		if err != nil {
			return err
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			b, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
			return fmt.Errorf("%s: %s", resp.Status, b)
		}
		return nil
	})
}

func (l *lab) cluster(name string) *cluster {
	return l.clusters[slices.IndexFunc(l.clusters, func(c *cluster) bool { return c.Name == name })]
}

func (c *cluster) workload(name string) *workload {
	return c.Workloads[slices.IndexFunc(c.Workloads, func(w *workload) bool { return w.Name == name })]
}

// answer is what the sample workload says of a call.
type answer struct {
	Service, Cluster, Zone, Instance, Caller, PeerAddress string
}

// client calls through a workload's sidecar.
func (l *lab) client(c, w string) *http.Client {
	proxy := &url.URL{Scheme: "http", Host: l.cluster(c).workload(w).Outbound}
	tr := &http.Transport{Proxy: http.ProxyURL(proxy), MaxIdleConnsPerHost: 16}
	l.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 10 * time.Second}
}

func call(client *http.Client, target string) (a answer, err error) {
	resp, err := client.Get(target)
	if err != nil {
		return a, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return a, err
	}
	if resp.StatusCode != http.StatusOK {
		return a, fmt.Errorf("%s (%s): %s", resp.Status, resp.Header.Get("hanse-error"), bytes.TrimSpace(b))
	}
	return a, json.Unmarshal(b, &a)
}

// load calls from c's frontend until stop is called, which returns how the calls went.
type load struct {
	ok, failed atomic.Int64
	stop       func()

	mu     sync.Mutex
	errs   []string         // guarded by mu; the first few
	served map[string]int64 // guarded by mu; by cluster
	last   string           // guarded by mu; cluster of the newest answer
}

func (l *lab) load(c, target string, workers int) *load {
	ld := &load{served: map[string]int64{}}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	client := l.client(c, "frontend")
	for range workers {
		wg.Go(func() {
			for ctx.Err() == nil {
				a, err := call(client, target)
				ld.mu.Lock()
				if err != nil {
					ld.failed.Add(1)
					if len(ld.errs) < 5 {
						ld.errs = append(ld.errs, time.Now().Format("15:04:05.000 ")+err.Error())
					}
				} else {
					ld.ok.Add(1)
					ld.served[a.Cluster]++
					ld.last = a.Cluster
				}
				ld.mu.Unlock()
				time.Sleep(10 * time.Millisecond)
			}
		})
	}
	ld.stop = sync.OnceFunc(func() { cancel(); wg.Wait() })
	l.t.Cleanup(ld.stop)
	return ld
}

// from waits until the newest answer came from a cluster.
func (ld *load) from(l *lab, within time.Duration, c string) {
	l.t.Helper()
	l.eventually(within, "calls are served by "+c, func() error {
		ld.mu.Lock()
		defer ld.mu.Unlock()
		if ld.last != c {
			return fmt.Errorf("served by %q; %d failed %v", ld.last, ld.failed.Load(), ld.errs)
		}
		return nil
	})
}

// none fails the test if a call has failed.
func (ld *load) none(l *lab, during string) {
	l.t.Helper()
	if n := ld.failed.Load(); n > 0 {
		ld.mu.Lock()
		defer ld.mu.Unlock()
		l.t.Errorf("%s: %d of %d calls failed: %v", during, n, n+ld.ok.Load(), ld.errs)
	}
	if ld.ok.Load() == 0 {
		l.t.Errorf("%s: no call was made", during)
	}
}

// What `hanse … -o json` prints, as a script would read it.
type (
	clusterList struct {
		Clusters []struct{ Name, State string } `json:"clusters"`
	}
	statusPage struct {
		OK      bool   `json:"ok"`
		Summary string `json:"summary"`
		Checks  []struct {
			Name, Detail string
			OK           bool
		} `json:"checks"`
		Clusters []struct{ Name string } `json:"clusters"`
	}
	endpoint struct {
		ID, Cluster, Region, Zone, Address, Network, SPIFFEID, Transport string
		Ready, Draining                                                  bool
	}
	trustDomain struct {
		Sequence uint64 `json:"sequence"`
	}
)
