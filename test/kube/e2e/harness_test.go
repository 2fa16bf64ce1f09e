//go:build linux

package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hanse-mesh/hanse/test/kube/lab"
)

const system = "hanse-system" // the namespace of the control plane

// scene is two clusters, or west alone, and what is asked of them.
type scene struct {
	t          *testing.T
	ctx        context.Context
	west, east *cluster
	hosts      map[string]*lab.Host // beside them, without Kubernetes
}

// cluster fails the test where it cannot do what it is asked for.
type cluster struct {
	*lab.Cluster
	s *scene
}

// up starts two clusters, or those of cfg, with what Hanse needs of a cluster: a volume. Their pods do not reach each other, unless cfg says so.
func up(t *testing.T, cfg lab.Config) *scene {
	t.Helper()
	if cfg.Clusters == nil {
		cfg.Clusters = []string{"west", "east"}
	}
	cfg.Tools, cfg.Pause, cfg.Dir, cfg.Log = filepath.Join(bin, "tools"), "hanse.mesh/pause:"+version, filepath.Join(os.Getenv(stateDir), "lab"), t.Output()
	for _, name := range []string{"pause", "hansed", "hanse-proxy", "echo", "etcd"} {
		cfg.Images = append(cfg.Images, filepath.Join(bin, "images", name+".tar"))
	}
	began := time.Now()
	l, err := lab.Up(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Down)
	t.Logf("clusters after %.1f s", time.Since(began).Seconds())
	s := &scene{t: t, ctx: t.Context(), hosts: l.Hosts}
	s.west = &cluster{l.Clusters["west"], s}
	if east := l.Clusters["east"]; east != nil {
		s.east = &cluster{east, s}
	}
	for _, c := range s.both() {
		c.volume("hansed")
		s.until(time.Minute, func() error { // the last thing that a new cluster makes
			_, err := c.Kubectl(s.ctx, "-n", "kube-node-lease", "get", "lease", c.Nodes[len(c.Nodes)-1].Name)
			return err
		})
	}
	return s
}

func (s *scene) both() []*cluster {
	if s.east == nil {
		return []*cluster{s.west}
	}
	return []*cluster{s.west, s.east}
}

// step is a part of the story; the rest of it makes no sense once one has failed.
func (s *scene) step(name string, f func()) {
	s.t.Helper()
	outer, began := s.t, time.Now()
	ok := outer.Run(name, func(t *testing.T) {
		s.t = t
		f()
	})
	s.t = outer
	outer.Logf("%s: %.1f s", name, time.Since(began).Seconds())
	if !ok {
		s.tell()
		outer.FailNow()
	}
}

// tell shows what there is when something has failed.
func (s *scene) tell() {
	for _, c := range s.both() {
		for _, args := range [][]string{{"get", "pods", "-A", "-o", "wide"}, {"get", "events", "-A", "--field-selector=type=Warning", "--sort-by=.lastTimestamp"}, {"-n", system, "logs", "statefulset/hansed", "--tail=40"}} {
			out, err := c.Kubectl(context.Background(), args...)
			s.t.Logf("%s: kubectl %s\n%s%v", c.Name, strings.Join(args, " "), out, err)
		}
	}
}

// until waits for f to succeed.
func (s *scene) until(limit time.Duration, f func() error) {
	s.t.Helper()
	deadline := time.Now().Add(limit)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("not after %s: %v", limit, err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func (c *cluster) kubectl(args ...string) string {
	c.s.t.Helper()
	out, err := c.Kubectl(c.s.ctx, args...)
	if err != nil {
		c.s.t.Fatalf("%s: %v", c.Name, err)
	}
	return out
}

func (c *cluster) apply(yaml string) {
	c.s.t.Helper()
	if err := c.Apply(c.s.ctx, yaml); err != nil {
		c.s.t.Fatalf("%s: %v", c.Name, err)
	}
}

func (c *cluster) export(service string) {
	c.s.t.Helper()
	c.apply(serviceExport("shop", service))
}

func serviceExport(namespace, service string) string {
	return fmt.Sprintf("apiVersion: multicluster.x-k8s.io/v1beta1\nkind: ServiceExport\nmetadata: {name: %s, namespace: %s}\n", service, namespace)
}

// restart restarts one workload and waits for its end.
func (c *cluster) restart(namespace, workload string) {
	c.s.t.Helper()
	c.kubectl("-n", namespace, "rollout", "restart", workload)
	c.kubectl("-n", namespace, "rollout", "status", workload, "--timeout=120s")
}

// objects are all objects of a cluster but events, sorted.
func (c *cluster) objects() []string {
	c.s.t.Helper()
	kinds := slices.DeleteFunc(strings.Fields(c.kubectl("api-resources", "--verbs=list", "-o", "name")), func(k string) bool {
		return k == "events" || k == "events.events.k8s.io" || k == "componentstatuses"
	})
	slices.Sort(kinds)
	out := c.kubectl("get", strings.Join(kinds, ","), "-A", "-o", `jsonpath={range .items[*]}{.apiVersion} {.kind} {.metadata.namespace}/{.metadata.name}{"\n"}{end}`)
	all := strings.Split(strings.TrimSpace(out), "\n")
	slices.Sort(all)
	return all
}

// same says what is in only one of two lists.
func same(before, after []string) error {
	var diff []string
	for _, o := range after {
		if !slices.Contains(before, o) {
			diff = append(diff, "left: "+o)
		}
	}
	for _, o := range before {
		if !slices.Contains(after, o) {
			diff = append(diff, "gone: "+o)
		}
	}
	if len(diff) > 0 {
		return errors.New(strings.Join(diff, "\n"))
	}
	return nil
}

// holdsInjected: the pod of an application has a sidecar that it did not ask for, and its own container as it was written.
func (c *cluster) holdsInjected(app string) {
	c.s.t.Helper()
	out := c.kubectl("-n", "shop", "get", "pods", "-l", "app="+app, "-o", `jsonpath={range .items[*]}{.spec.initContainers[*].name} / {range .spec.containers[*]}{.name} {.image}{end}{"\n"}{end}`)
	want := "hanse-capture hanse-proxy / app hanse.mesh/echo:" + version
	for line := range strings.Lines(strings.TrimSpace(out)) {
		if strings.TrimSpace(line) != want {
			c.s.t.Errorf("%s: pods of %s have %q, want %q", c.Name, app, line, want)
		}
	}
}

// result is a line of `echo call`.
type result struct {
	OK     bool   `json:"ok"`
	Status string `json:"status"`
	Error  string `json:"error"`
	Text   string `json:"text"`
	Answer struct{ Service, Cluster, Zone, Caller string }

	Seconds float64 `json:"seconds"`
}

// call calls from the pod of an application of the shop.
func (c *cluster) call(app, url string) (result, error) { return c.callFrom("shop", app, url) }

func (c *cluster) callFrom(namespace, app, url string) (result, error) {
	out, err := c.Kubectl(c.s.ctx, "-n", namespace, "exec", "deployment/"+app, "-c", "app", "--", "/echo", "call", "--proxy", "", "--body", "hello", "--timeout", "5s", url)
	var r result
	if jerr := json.Unmarshal([]byte(out), &r); jerr != nil {
		return r, fmt.Errorf("%s: %s calls %s: %w: %q", c.Name, app, url, err, out)
	}
	return r, nil
}

func (c *cluster) mustCall(app, url string) result {
	c.s.t.Helper()
	r, err := c.call(app, url)
	if err != nil || !r.OK {
		c.s.t.Errorf("%s: %s calls %s: %+v, %v", c.Name, app, url, r, err)
	}
	return r
}

// mustFail: a call has no good answer; its status has want in it.
func (c *cluster) mustFail(app, url, want string) {
	c.s.t.Helper()
	if r, err := c.call(app, url); err != nil || r.OK || !strings.Contains(r.Status+r.Error, want) {
		c.s.t.Errorf("%s: %s calls %s: want %q, got %+v, %v", c.Name, app, url, want, r, err)
	}
}

// answered: the next calls are all answered by a cluster.
func (c *cluster) answered(app, url, by string) error {
	for range 3 {
		if r, err := c.call(app, url); err != nil || r.Answer.Cluster != by {
			return fmt.Errorf("%s is answered by %q, not %q: %+v, %v", app, r.Answer.Cluster, by, r, err)
		}
	}
	return nil
}

// watch calls all the time, from the pod of an application, until the test ends.
func (c *cluster) watch(app, url string) <-chan result {
	c.s.t.Helper()
	ctx, stop := context.WithCancel(c.s.ctx)
	cmd := c.Command(ctx, filepath.Join(bin, "tools", "kubectl"), "-n", "shop", "exec", "deployment/"+app, "-c", "app", "--",
		"/echo", "call", "--proxy", "", "--count", "0", "--interval", "20ms", "--timeout", "2s", url)
	results := make(chan result)
	follow(c.s.t, ctx, cmd, func(r result) {
		select {
		case results <- r:
		case <-ctx.Done():
		}
	})
	c.s.t.Cleanup(stop)
	return results
}

// follow gives f every line that cmd says.
func follow(t *testing.T, ctx context.Context, cmd *exec.Cmd, f func(result)) {
	t.Helper()
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	var done sync.WaitGroup
	done.Go(func() {
		for lines := bufio.NewScanner(out); lines.Scan(); {
			var r result
			if json.Unmarshal(lines.Bytes(), &r) == nil {
				f(r)
			}
		}
		_ = cmd.Wait()
	})
	context.AfterFunc(ctx, done.Wait)
}

// load is what the callers of a cluster saw, in all pods that they have had: their log.
type load struct {
	c    *cluster
	stop context.CancelFunc
	done sync.WaitGroup

	mu       sync.Mutex
	pods     map[string]bool // guarded by mu, as the next
	calls    map[string]int  // by application and answering cluster
	failures []string
	slowest  float64
}

// load begins to read what the callers in a cluster say.
func (c *cluster) load() *load {
	ctx, stop := context.WithCancel(c.s.ctx)
	l := &load{c: c, stop: stop, pods: map[string]bool{}, calls: map[string]int{}}
	l.done.Go(func() {
		for ctx.Err() == nil {
			out, _ := c.Kubectl(ctx, "-n", "shop", "get", "pods", "-l", "app in (load,load-grpc)", "-o", `jsonpath={range .items[?(@.status.phase=="Running")]}{.metadata.name} {.metadata.labels.app}{"\n"}{end}`)
			for line := range strings.Lines(out) {
				if pod, app, ok := strings.Cut(strings.TrimSpace(line), " "); ok && !l.pods[pod] {
					l.pods[pod] = true
					l.done.Go(func() { l.read(ctx, pod, app) })
				}
			}
			select {
			case <-ctx.Done():
			case <-time.After(300 * time.Millisecond):
			}
		}
	})
	c.s.t.Cleanup(stop)
	return l
}

// read reads a pod's log, from now on if it was there before, until the pod or ctx ends.
func (l *load) read(ctx context.Context, pod, app string) {
	cmd := l.c.Command(ctx, filepath.Join(bin, "tools", "kubectl"), "-n", "shop", "logs", "-f", "--since=1s", "-c", "app", pod)
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.failures = append(l.failures, fmt.Sprintf("log of %s: %v", pod, err))
		return
	}
	for lines := bufio.NewScanner(out); lines.Scan(); {
		var r result
		if json.Unmarshal(lines.Bytes(), &r) != nil {
			continue
		}
		l.mu.Lock()
		l.calls[app+" → "+strings.TrimSpace(r.Answer.Cluster+" "+r.Answer.Zone)]++
		l.slowest = max(l.slowest, r.Seconds)
		if !r.OK {
			l.failures = append(l.failures, fmt.Sprintf("%s %s: %s", time.Now().Format("15:04:05.000"), pod, lines.Text()))
		}
		l.mu.Unlock()
	}
	_ = cmd.Wait()
}

// mustHaveServed ends it: enough calls, and none that failed.
func (l *load) mustHaveServed(calls int) {
	l.c.s.t.Helper()
	l.end()
	n := 0
	for _, v := range l.calls {
		n += v
	}
	l.c.s.t.Logf("%d calls %v, the slowest took %.2f s, %d failed; %d pods called", n, l.calls, l.slowest, len(l.failures), len(l.pods))
	for i, f := range l.failures {
		if i == 20 {
			l.c.s.t.Errorf("and %d more", len(l.failures)-i)
			break
		}
		l.c.s.t.Errorf("failed: %s", f)
	}
	if n < calls {
		l.c.s.t.Errorf("%d calls only; %d would say something", n, calls)
	}
}

func (l *load) end() {
	l.stop()
	l.done.Wait()
}

// brokeOff takes out of the failures the one that a caller of gRPC may have for each time that its server falls silent, and reports how many there
// were: its head and its message had arrived, its trailers had not, and so it could not be tried again. The caller has one call under way at a time.
func (l *load) brokeOff() int {
	l.end()
	all := len(l.failures)
	found := slices.IndexFunc(l.failures, func(f string) bool {
		return strings.Contains(f, " load-grpc-") && strings.Contains(f, "stream terminated by RST_STREAM with error code: INTERNAL_ERROR")
	})
	if found >= 0 {
		l.c.s.t.Logf("broken off: %s", l.failures[found])
		l.failures = slices.Delete(l.failures, found, found+1)
	}
	return all - len(l.failures)
}

// member is what a cluster says of another one.
type member struct {
	Name, State string
	Probe       struct {
		OK    bool
		Error string
	}
}

func (s *scene) member(context, name string) (member, error) {
	out, err := s.tryHanse("--context", context, "clusters", "-o", "json")
	if err != nil {
		return member{}, err
	}
	var all struct{ Clusters []member }
	if err := json.Unmarshal([]byte(out), &all); err != nil {
		return member{}, fmt.Errorf("%w: %s", err, out)
	}
	for _, m := range all.Clusters {
		if m.Name == name {
			return m, nil
		}
	}
	return member{State: "unknown"}, nil
}

// joined: c knows the other as fresh, and a call to its gateway came back.
func (s *scene) joined(c, other *cluster) error { return s.sees(c.Name, other.Name) }

func (s *scene) sees(context, other string) error {
	m, err := s.member(context, other)
	if err == nil && (m.State != "fresh" || !m.Probe.OK) {
		err = fmt.Errorf("%s sees %s: %s, probe %+v", context, other, m.State, m.Probe)
	}
	return err
}

// hasLeft: a cluster knows that another is gone.
func (s *scene) hasLeft(context, other string) error {
	m, err := s.member(context, other)
	if err == nil && m.State != "left" && m.State != "unknown" {
		err = fmt.Errorf("%s sees %s: %s", context, other, m.State)
	}
	return err
}
