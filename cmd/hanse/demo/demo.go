package demo

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/hanse-mesh/hanse/cmd/internal/admin"
)

// Config of a demo.
type Config struct {
	Dir      string // everything is in it; made if missing, emptied if it is an earlier demo's
	Bin      string // where hanse, hansed, hanse-proxy and echo are
	Self     string // hanse as the person typed it, for the hints
	SharedIP bool   // all on 127.0.0.1, also where each could have its own address
	Exit     bool   // end after the story
	Out      io.Writer
	Colour   bool
	Terminal *os.File // where a drill shows its progress; nil: nowhere
}

// Report is what `hanse demo --exit -o json` prints.
type Report struct {
	OK       bool               `json:"ok"`
	Error    string             `json:"error,omitempty"`
	Claims   []admin.Check      `json:"claims"`   // all that was claimed, and whether it was observed
	Clusters []admin.Cluster    `json:"clusters"` // as west sees them
	Joins    []Joined           `json:"joins"`
	Calls    Calls              `json:"calls"`
	Zone     *admin.Drill       `json:"zoneDrill,omitempty"` // one zone fails
	Drill    *admin.Drill       `json:"drill,omitempty"`     // the whole cluster's service fails
	Seconds  map[string]float64 `json:"seconds"`             // each step's
}

// Joined is one join.
type Joined struct {
	Cluster string   `json:"cluster"`
	Members []string `json:"members"`
	Seconds float64  `json:"seconds"`
}

// Calls are those that were shown, and the steady ones by who served them ("west/eu-1a").
type Calls struct {
	Shown  []Call         `json:"shown"`
	Served map[string]int `json:"served"`
	Total  int            `json:"total"`
	Failed int            `json:"failed"`

	SlowestZone  float64 `json:"slowestZoneMs"`  // during the drill of a zone
	SlowestDrill float64 `json:"slowestDrillMs"` // during that of all of a cluster's payments
}

// show is the state of one telling.
type show struct {
	cfg     Config
	l       *layout
	procs   *processes
	report  *Report
	began   time.Time
	traffic *traffic
}

const (
	payments = "payments.shop:8080"
	catalog  = "catalog.shop:8080"
)

// Run tells the story and, unless cfg.Exit is set, stays until ctx ends. When it returns every process has ended. The Report is valid also with an error.
func Run(ctx context.Context, cfg Config) (_ *Report, err error) {
	s := &show{cfg: cfg, report: &Report{Claims: []admin.Check{}, Joins: []Joined{}, Seconds: map[string]float64{}}, began: time.Now()}
	defer func() {
		s.report.OK = err == nil
		for _, c := range s.report.Claims {
			s.report.OK = s.report.OK && c.OK
		}
		if err != nil {
			s.report.Error = err.Error()
		}
	}()
	if s.l, err = newLayout(cfg.Dir, !cfg.SharedIP && ownIPs()); err != nil {
		return s.report, err
	}
	held, err := prepare(s.l.dir)
	if err != nil {
		return s.report, err
	}
	defer func() { err = errors.Join(err, held.release()) }()
	err = s.l.free()
	if err != nil && s.l.ownIPs {
		s.say("%v: another demo may run; this one uses ports of 127.0.0.1 instead.", err)
		if s.l, err = newLayout(cfg.Dir, false); err == nil {
			err = s.l.free()
		}
	}
	if err != nil {
		return s.report, &admin.Error{Message: err.Error(), Hint: "another demo may run: hanse demo down --dir ITS-DIRECTORY"}
	}
	if err := s.l.write(); err != nil {
		return s.report, err
	}
	if s.procs, err = newProcesses(s.l.dir); err != nil {
		return s.report, err
	}
	defer func() {
		s.say("\nStopping …")
		err = errors.Join(err, s.procs.close())
	}()

	// A process that ends by itself ends the story.
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var background errgroup.Group
	background.Go(func() error {
		select {
		case err := <-s.procs.died:
			cancel(err)
		case <-ctx.Done():
		}
		return nil
	})
	defer func() {
		cancel(nil)
		_ = background.Wait() // its functions return nil
	}()

	if err := s.tell(ctx, &background); err != nil {
		if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) {
			return s.report, cause
		}
		return s.report, err
	}
	if !cfg.Exit {
		s.stay(ctx)
	}
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) {
		return s.report, cause
	}
	return s.report, nil
}

// marker is in each directory that a demo made: no other is emptied.
const marker = "this-is-a-hanse-demo"

// prepare makes the directory and takes its lock.
func prepare(dir string) (*lock, error) {
	entries, err := os.ReadDir(dir)
	switch {
	case errors.Is(err, os.ErrNotExist):
	case err != nil:
		return nil, err
	case len(entries) > 0:
		if _, err := os.Stat(filepath.Join(dir, marker)); err != nil {
			return nil, fmt.Errorf("%s has files that are not of a demo: choose another directory with --dir", dir)
		}
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(dir, marker), nil, 0o600); err != nil {
		return nil, err
	}
	l, err := takeLock(dir)
	if errors.Is(err, errLocked) {
		return nil, &admin.Error{Message: "a demo runs in " + dir + " already", Hint: "eval $(hanse demo env) to use it, hanse demo down to end it"}
	}
	if err != nil {
		return nil, err
	}
	if left, err := listed(dir); err != nil || anyLives(left, dir) {
		return nil, errors.Join(&admin.Error{Message: "an earlier demo in " + dir + " left processes behind", Hint: "hanse demo down"}, err, l.release())
	}
	for _, e := range entries {
		if e.Name() == marker || e.Name() == filepath.Base(lockPath(dir)) {
			continue
		}
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return nil, errors.Join(err, l.release())
		}
	}
	return l, nil
}

func anyLives(l []process, dir string) bool {
	for _, p := range l {
		if alive(p.PID, dir) {
			return true
		}
	}
	return false
}

// tell is the story.
func (s *show) tell(ctx context.Context, background *errgroup.Group) error {
	for _, step := range []struct {
		name string
		do   func(context.Context) error
	}{
		{"controlPlanes", s.startControlPlanes},
		{"proxies", s.startProxies},
		{"joins", s.joinClusters},
		{"firstCrossClusterCall", s.firstCall},
	} {
		if err := s.step(ctx, step.name, step.do); err != nil {
			return err
		}
	}
	s.report.Seconds["toFirstCrossClusterCall"] = time.Since(s.began).Seconds()
	s.traffic = newTraffic(s.l.cluster("west").workload("frontend"), payments)
	background.Go(func() error {
		s.traffic.run(ctx)
		return nil
	})
	for _, step := range []struct {
		name string
		do   func(context.Context) error
	}{
		{"look", s.look},
		{"calls", s.calls},
		{"drills", s.drills},
	} {
		if err := s.step(ctx, step.name, step.do); err != nil {
			return err
		}
	}
	s.report.Seconds["all"] = time.Since(s.began).Seconds()
	return nil
}

func (s *show) step(ctx context.Context, name string, do func(context.Context) error) error {
	start := time.Now()
	err := do(ctx)
	s.report.Seconds[name] = time.Since(start).Seconds()
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return ctx.Err()
}

func (s *show) startControlPlanes(ctx context.Context) error {
	s.title("Three clusters on this machine, each with its own control plane, its own store and its own trust domain")
	for _, c := range s.l.clusters {
		if err := s.procs.start(c.Name+"-hansed", filepath.Join(s.cfg.Bin, "hansed"), "--config", filepath.Join(c.Dir, "hansed.yaml")); err != nil {
			return err
		}
	}
	for _, c := range s.l.clusters {
		if err := until(ctx, 30*time.Second, "hansed of "+c.Name, func(ctx context.Context) error { return ready(ctx, c.Admin) }); err != nil {
			return err
		}
		s.say("  %s %-5s  control plane ready at %s, trust domain %s", s.tick(), c.Name, c.Federation, c.TrustDomain)
	}
	return nil
}

// startProxies applies each cluster's objects and starts its proxies. The commands are shown for one proxy; the others' are the same.
func (s *show) startProxies(ctx context.Context) error {
	s.title("Workloads: each proxy proves who it is with a token that can be used once")
	if _, err := s.shell(ctx, false, hanse("--context", "west", "apply", "-f", "west/mesh.yaml")); err != nil {
		return err
	}
	if _, err := s.shell(ctx, false, hanse("--context", "west", "token", "create", "--agent", "shop/frontend", "--file", "west/frontend.token")); err != nil {
		return err
	}
	var all errgroup.Group
	for _, c := range s.l.clusters {
		all.Go(func() error { return s.startCluster(ctx, c) })
	}
	if err := all.Wait(); err != nil {
		return err
	}
	for _, c := range s.l.clusters {
		if err := until(ctx, 30*time.Second, "gateway of "+c.Name, func(ctx context.Context) error { return ready(ctx, c.GatewayAdmin) }); err != nil {
			return err
		}
		names := []string{"gateway"}
		for _, w := range c.Workloads {
			if err := until(ctx, 30*time.Second, "sidecar of "+c.Name+"/"+w.Name, func(ctx context.Context) error { return ready(ctx, w.Admin) }); err != nil {
				return err
			}
			names = append(names, w.Name)
		}
		s.say("  %s %-5s  %s", s.tick(), c.Name, strings.Join(names, ", "))
	}
	return nil
}

func (s *show) startCluster(ctx context.Context, c *cluster) error {
	b, err := admin.New(admin.Config{Socket: c.socket()})
	if err != nil {
		return err
	}
	defer b.Close()
	if c.Name != "west" { // west's were applied by the command
		objects, err := os.ReadFile(filepath.Join(c.Dir, "mesh.yaml"))
		if err != nil {
			return err
		}
		if _, err := b.Apply(ctx, objects, false); err != nil {
			return fmt.Errorf("apply %s/mesh.yaml: %w", c.Name, err)
		}
	}
	td, err := b.TrustShow(ctx, c.TrustDomain)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(c.Dir, "bundle.json"), td.Bundle, 0o600); err != nil {
		return err
	}
	start := func(name string, req admin.TokenRequest) error {
		file := filepath.Join(c.Dir, name+".token")
		if _, err := os.Stat(file); errors.Is(err, os.ErrNotExist) {
			t, err := b.CreateToken(ctx, req)
			if err != nil {
				return err
			}
			if err := os.WriteFile(file, []byte(t.Token+"\n"), 0o600); err != nil {
				return err
			}
		}
		return s.procs.start(c.Name+"-"+name, filepath.Join(s.cfg.Bin, "hanse-proxy"), "--config", filepath.Join(c.Dir, name+".yaml"))
	}
	if err := start("gateway", admin.TokenRequest{Workload: "gateway"}); err != nil {
		return err
	}
	for _, w := range c.Workloads {
		if w.Serves {
			if err := s.procs.start(c.Name+"-"+w.Name+"-app", filepath.Join(s.cfg.Bin, "echo"), "serve", "--http", "unix:"+w.App,
				"--service", w.Service, "--cluster", c.Name, "--region", c.Region, "--zone", w.Zone, "--instance", w.Name); err != nil {
				return err
			}
		}
		if err := start(w.Name, admin.TokenRequest{Workload: "shop/" + w.Service}); err != nil {
			return err
		}
	}
	return nil
}

func (s *show) joinClusters(ctx context.Context) error {
	s.title("Joining: one token, one command; the second one is checked first")
	start := time.Now()
	if _, err := s.shell(ctx, false, hanse("--context", "west", "token", "create", "--for", "east"), hanse("--context", "east", "join", "-")); err != nil {
		return err
	}
	if err := s.joined(ctx, "east", start); err != nil {
		return err
	}
	if _, err := s.shell(ctx, false, hanse("--context", "west", "token", "create", "--for", "north", "--file", "north.token")); err != nil {
		return err
	}
	if _, err := s.shell(ctx, false, hanse("--context", "north", "join", "--check", "@north.token")); err != nil {
		return err
	}
	start = time.Now()
	if _, err := s.shell(ctx, false, hanse("--context", "north", "join", "@north.token")); err != nil {
		return err
	}
	return s.joined(ctx, "north", start)
}

func (s *show) joined(ctx context.Context, name string, start time.Time) error {
	b, err := admin.New(admin.Config{Socket: s.l.cluster(name).socket()})
	if err != nil {
		return err
	}
	defer b.Close()
	all, err := b.Clusters(ctx)
	if err != nil {
		return err
	}
	j := Joined{Cluster: name, Seconds: time.Since(start).Seconds()}
	for _, m := range all.Clusters {
		j.Members = append(j.Members, m.Name)
	}
	s.report.Joins = append(s.report.Joins, j)
	return nil
}

// firstCall waits for the first call across clusters: catalog is in east only.
func (s *show) firstCall(ctx context.Context) error {
	frontend := newCaller(s.l.cluster("west").workload("frontend"))
	defer frontend.http.CloseIdleConnections()
	return until(ctx, 30*time.Second, "first call to another cluster", func(ctx context.Context) error {
		if c := frontend.get(ctx, catalog); c.Status != 200 {
			return fmt.Errorf("%d %s", c.Status, c.Error)
		}
		return nil
	})
}

// look shows the mesh, once all see all.
func (s *show) look(ctx context.Context) error {
	s.title("The mesh as west sees it")
	for _, c := range s.l.clusters {
		b, err := admin.New(admin.Config{Socket: c.socket()})
		if err != nil {
			return err
		}
		err = until(ctx, 30*time.Second, c.Name+" sees all clusters", func(ctx context.Context) error { return seesAll(ctx, b, len(s.l.clusters)) })
		b.Close()
		s.claim(c.Name+" sees all members fresh, with a probe that succeeded", err, "")
	}
	if _, err := s.shell(ctx, false, hanse("--context", "west", "clusters")); err != nil {
		return err
	}
	b, err := admin.New(admin.Config{Socket: s.l.cluster("west").socket()})
	if err != nil {
		return err
	}
	defer b.Close()
	all, err := b.Clusters(ctx)
	if err != nil {
		return err
	}
	s.report.Clusters = all.Clusters
	if _, err := s.shell(ctx, false, hanse("services")); err != nil {
		return err
	}
	err = until(ctx, 20*time.Second, "status of west", func(ctx context.Context) error {
		st, err := b.Status(ctx)
		if err == nil && !st.OK {
			err = errors.New(st.Summary)
		}
		return err
	})
	s.claim("west's status is green", err, "")
	return nil
}

func seesAll(ctx context.Context, b *admin.Client, n int) error {
	all, err := b.Clusters(ctx)
	if err != nil {
		return err
	}
	if len(all.Clusters) != n {
		return fmt.Errorf("%d of %d members", len(all.Clusters), n)
	}
	for _, m := range all.Clusters {
		if !m.Self && (m.State != "fresh" || !m.Probe.OK) {
			return fmt.Errorf("%s is %s, its probe: %s", m.Name, m.State, m.Probe.Error)
		}
	}
	return nil
}

func (s *show) calls(ctx context.Context) error {
	west, east := s.l.cluster("west"), s.l.cluster("east")
	frontend, intruder := newCaller(west.workload("frontend")), newCaller(west.workload("intruder"))
	defer frontend.http.CloseIdleConnections()
	defer intruder.http.CloseIdleConnections()
	show := func(who string, w *workload, to string, c Call) {
		s.say("%s %s   # %s", s.prompt(), s.commandText([]string{"echo", "call", "--proxy", w.Outbound, "http://" + to + "/"}), who)
		if c.Status == 200 {
			s.say("  200: served by %s/%s in zone %s; it saw %s, connected from %s (%.1fms)", c.Cluster, c.Served, c.Zone, c.Caller, c.Via, c.Millis)
		} else {
			s.say("  %d: %s", c.Status, c.Error)
		}
		s.report.Calls.Shown = append(s.report.Calls.Shown, c)
	}

	s.title("A call goes to the nearest: the caller's own zone")
	// A service that joined a moment ago may have been called before its nearest endpoint was known.
	var near Call
	err := until(ctx, 10*time.Second, "calls stay in their zone", func(ctx context.Context) error {
		for range 10 {
			if near = frontend.get(ctx, payments); near.Cluster != "west" || near.Zone != "eu-1a" {
				return fmt.Errorf("%d, served by %s/%s %s", near.Status, near.Cluster, near.Zone, near.Error)
			}
		}
		return nil
	})
	show("west's frontend", west.workload("frontend"), payments, near)
	s.claim("frontend's calls to payments stay in its own zone", err, "10 of 10 in west/eu-1a")

	s.title("A call to what only another cluster has: through its gateway, mutual TLS end to end")
	far := frontend.get(ctx, catalog)
	show("west's frontend", west.workload("frontend"), catalog, far)
	err = nil
	via, _, splitErr := net.SplitHostPort(far.Via)
	switch {
	case far.Status != 200 || far.Cluster != "east":
		err = fmt.Errorf("%d, served by %q: %s", far.Status, far.Cluster, far.Error)
	case far.Caller != "spiffe://west.demo/ns/shop/sa/frontend":
		err = fmt.Errorf("the server saw the caller %q", far.Caller)
	case splitErr != nil || s.l.ownIPs && via != east.GatewayIP:
		err = fmt.Errorf("its connection came from %q, not from east's gateway %s", far.Via, east.GatewayIP)
	}
	s.claim("catalog in east sees west's frontend by its own identity, through east's gateway", err, far.Caller+" from "+far.Via)

	s.title("A call by a workload that no AccessPolicy allows")
	var refused Call
	err = until(ctx, 10*time.Second, "refusal", func(ctx context.Context) error {
		if refused = intruder.get(ctx, payments); refused.Status != 403 {
			return fmt.Errorf("%d %s", refused.Status, refused.Error)
		}
		return nil
	})
	show("west's intruder", west.workload("intruder"), payments, refused)
	s.claim("the intruder is refused", err, "403")

	s.title("Why?")
	_, err = s.shell(ctx, false, hanse("explain", "frontend", "payments"))
	return err
}

// drills fails one zone, and then all of west's payments, under load.
func (s *show) drills(ctx context.Context) error {
	const length = "8s"
	var err error
	s.title("Failing on purpose, while frontend calls payments 200 times a second: first one zone …")
	if s.report.Zone, err = s.drill(ctx, "--zone", "eu-1a", "--for", length); err != nil {
		return err
	}
	s.report.Calls.SlowestZone = s.traffic.worst()
	s.claimDrill("zone eu-1a fails: its calls go to eu-1b, and come back", s.report.Zone, s.report.Calls.SlowestZone, "west/eu-1b")

	s.title("… then all of west's payments")
	if _, err := s.shell(ctx, false, hanse("drill", "plan", "--blackhole", "--service", "payments")); err != nil {
		return err
	}
	if s.report.Drill, err = s.drill(ctx, "--for", length); err != nil {
		return err
	}
	s.report.Calls.SlowestDrill = s.traffic.worst()
	s.claimDrill("west's payments fail: their calls go to east, and come back", s.report.Drill, s.report.Calls.SlowestDrill, "east")

	err = s.traffic.settled(ctx, "west/eu-1a")
	s.claim("calls are back in their own zone", err, "")
	served, total, failed, fault := s.traffic.served()
	s.report.Calls.Served, s.report.Calls.Total, s.report.Calls.Failed = served, total, failed
	err = nil
	if failed > 0 {
		err = fmt.Errorf("%d of %d failed, such as: %s", failed, total, fault)
	}
	s.claim("no call of frontend failed in all this time", err, fmt.Sprintf("%d calls, served by %v", total, served))
	return nil
}

// drill waits until calls are in their own zone, and black-holes payments in the scope of args.
func (s *show) drill(ctx context.Context, args ...string) (*admin.Drill, error) {
	command := append([]string{"drill", "run", "--blackhole", "--service", "payments", "--yes"}, args...)
	if err := s.traffic.settled(ctx, "west/eu-1a"); err != nil {
		return nil, err
	}
	s.traffic.worst()
	_, runErr := s.shell(ctx, true, hanse(command...))
	b, err := admin.New(admin.Config{Socket: s.l.cluster("west").socket()})
	if err != nil {
		return nil, err
	}
	defer b.Close()
	l, err := b.DrillList(ctx)
	if err != nil {
		return nil, err
	}
	if len(l) == 0 {
		return nil, fmt.Errorf("no drill was run: %w", runErr)
	}
	return &l[0], nil
}

// claimDrill says what a drill must have shown: it passed, nothing failed, and the traffic went where it should and came back.
func (s *show) claimDrill(what string, d *admin.Drill, slowest float64, to string) {
	moved := 0.0
	for _, x := range d.Traffic {
		if strings.HasPrefix(x.Cluster+"/"+x.Zone, to) {
			moved += x.During
		}
	}
	var err error
	switch {
	case d.Verdict != "PASSED":
		err = fmt.Errorf("drill %s %s: %s", d.ID, d.Verdict, d.Reason)
	case d.Failed > 0:
		err = fmt.Errorf("%d of %d calls failed", d.Failed, d.Calls)
	case d.Shift == nil || moved < 0.5:
		err = fmt.Errorf("%.0f%% of the traffic went to %s", moved*100, to)
	case d.Return == nil:
		err = errors.New("it has not come back")
	}
	detail := ""
	if d.Shift != nil {
		detail = fmt.Sprintf("shifted in %.1fs, 0 of %d calls failed, the slowest took %.1fs", *d.Shift, d.Calls, slowest/1000)
	}
	s.claim(what, err, detail)
}

// stay keeps the clusters up until ctx ends.
func (s *show) stay(ctx context.Context) {
	self := s.cfg.Self
	dir := ""
	if filepath.Base(s.l.dir) != ".demo" {
		dir = " --dir " + s.cfg.Dir
	}
	s.title("The clusters stay up. In another terminal:")
	s.say("  eval $(%s demo env%s)      # point hanse at them; --context east, north for the others", self, dir)
	s.say("  %s clusters --watch", self)
	s.say("  %s explain frontend payments -o wide", self)
	s.say("  %s drill run --errors --service payments --for 30s", self)
	s.say("  curl -x http://%s http://%s/", s.l.cluster("west").workload("frontend").Outbound, payments)
	s.say("\nLogs: %s. Stop: Ctrl-C here, or %s demo down%s", filepath.Join(s.l.dir, "log"), self, dir)
	<-ctx.Done()
}

// claim records whether something was observed.
func (s *show) claim(what string, err error, detail string) {
	c := admin.Check{Name: what, OK: err == nil, Detail: detail}
	mark := s.tick()
	if err != nil {
		c.Detail = err.Error()
		mark = s.paint("31", "✗")
	}
	s.report.Claims = append(s.report.Claims, c)
	if c.Detail != "" {
		what += ": " + c.Detail
	}
	s.say("  %s %s", mark, what)
}

func hanse(args ...string) []string { return append([]string{"hanse"}, args...) }

// shell runs commands as a pipeline and prints them first, as a person would type them. With forgive an exit code other than 0 is an error only if
// there was no output. It returns what the last command printed.
func (s *show) shell(ctx context.Context, forgive bool, commands ...[]string) (string, error) {
	var typed []string
	for _, c := range commands {
		typed = append(typed, s.commandText(c))
	}
	s.say("%s %s", s.prompt(), strings.Join(typed, " | "))
	var input io.Reader
	for i, c := range commands {
		cmd := exec.CommandContext(ctx, filepath.Join(s.cfg.Bin, c[0]), c[1:]...)
		cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
		cmd.WaitDelay = 10 * time.Second
		cmd.Dir = s.l.dir
		cmd.Env = append(os.Environ(), "HANSE_CONFIG="+contexts(s.l.dir), "HANSE_CONTEXT=", "HANSE_SOCKET=")
		var out, errs bytes.Buffer
		cmd.Stdin, cmd.Stdout, cmd.Stderr = input, &out, &errs
		if forgive && s.cfg.Terminal != nil {
			cmd.Stderr = s.cfg.Terminal
		}
		err := cmd.Run()
		last := i == len(commands)-1
		if last {
			s.print(out.Bytes())
		}
		if err != nil && !(forgive && out.Len() > 0) {
			return "", fmt.Errorf("%s: %w\n%s", s.commandText(c), err, strings.TrimSpace(errs.String()))
		}
		if last {
			return out.String(), nil
		}
		input = &out
	}
	return "", nil
}

// commandText is a command as it would be typed.
func (s *show) commandText(c []string) string {
	words := make([]string, len(c))
	for i, w := range c {
		if strings.ContainsAny(w, " <>'\"$|&;*") {
			w = "'" + strings.ReplaceAll(w, "'", `'\''`) + "'"
		}
		words[i] = w
	}
	return strings.Join(words, " ")
}

func (s *show) print(b []byte) {
	for line := range bytes.Lines(b) {
		fmt.Fprintf(s.cfg.Out, "  %s", line)
	}
}

func (s *show) say(format string, args ...any) { fmt.Fprintf(s.cfg.Out, format+"\n", args...) }

func (s *show) title(text string) { s.say("\n%s", s.paint("1", text)) }

func (s *show) paint(code, text string) string {
	if !s.cfg.Colour {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

func (s *show) tick() string   { return s.paint("32", "✓") }
func (s *show) prompt() string { return s.paint("36", "$") }

// Print writes the Report as JSON.
func (r *Report) Print(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	return e.Encode(r)
}
