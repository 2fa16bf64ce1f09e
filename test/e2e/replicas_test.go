package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"
)

// replicaRow is a replica as hanse status -o json shows it.
type replicaRow struct {
	Name               string
	Leads, Self, Signs bool
	LeadingSince       time.Time
}

// replicas is what a control plane says of itself and the others of its cluster, whether or not all is well.
func (l *lab) replicas(c string) (rows []replicaRow, err error) {
	out, err := l.hanse(c, "", "status", "-o", "json")
	var s struct{ Replicas []replicaRow }
	if jerr := json.Unmarshal([]byte(out), &s); jerr != nil {
		return nil, fmt.Errorf("%w: %w", jerr, err)
	}
	return s.Replicas, nil
}

// leads waits until a control plane says that this replica leads, and how many there are.
func (l *lab) leads(c, leader string, count int) {
	l.t.Helper()
	l.eventually(30*time.Second, fmt.Sprintf("%s says that %s leads %d replicas", c, leader, count), func() error {
		rows, err := l.replicas(c)
		if err != nil {
			return err
		}
		if len(rows) != count || rows[0].Name != leader || !rows[0].Leads || rows[0].LeadingSince.IsZero() {
			return fmt.Errorf("%+v", rows)
		}
		return nil
	})
}

// signing waits until a control plane says that there are so many replicas, and that all sign.
func (l *lab) signing(c string, replicas int) {
	l.t.Helper()
	l.eventually(time.Minute, fmt.Sprintf("all of %d replicas sign", replicas), func() error {
		rows, err := l.replicas(c)
		signs := 0
		for _, r := range rows {
			if r.Signs {
				signs++
			}
		}
		if err == nil && (len(rows) != replicas || signs != replicas) {
			err = fmt.Errorf("%+v", rows)
		}
		return err
	})
}

// second writes the configuration of another replica of a cluster, with addresses of its own, and tells the cluster's proxies of it.
func (l *lab) second(c *cluster, extra string) *cluster {
	l.t.Helper()
	other := func(addr string) string { return strings.Replace(addr, ".1:", ".2:", 1) }
	two := *c
	two.Dir, two.Workloads = filepath.Join(l.dir, c.Name+"-2"), nil
	two.Federation, two.Identity, two.XDS, two.BundleEndpoint, two.Admin = other(c.Federation), other(c.Identity), other(c.XDS), other(c.BundleEndpoint), other(c.Admin)
	l.write(&two, extra)
	proxies := []string{"gateway"}
	for _, w := range c.Workloads {
		proxies = append(proxies, w.Name)
	}
	for i, name := range proxies {
		path := filepath.Join(c.Dir, name+".yaml")
		b, err := os.ReadFile(path)
		if err != nil {
			l.t.Fatal(err)
		}
		identity, xds := fmt.Sprintf("%q, %q", c.Identity, two.Identity), fmt.Sprintf("%q, %q", c.XDS, two.XDS)
		if i%2 == 1 {
			identity, xds = fmt.Sprintf("%q, %q", two.Identity, c.Identity), fmt.Sprintf("%q, %q", two.XDS, c.XDS)
		}
		s := strings.NewReplacer(fmt.Sprintf("[%q]", c.Identity), "["+identity+"]", fmt.Sprintf("[%q]", c.XDS), "["+xds+"]").Replace(string(b))
		l.save(path, s)
	}
	return &two
}

// replicated starts a lab whose cluster west has an etcd of its own, on which one hansed runs, and another one is to.
func (l *lab) replicated(extra string) (west, two *cluster, etcd *etcdServer) {
	l.t.Helper()
	west = l.cluster("west")
	two, etcd = l.second(west, extra), l.etcd(west)
	etcd.start()
	l.args["west/hansed"] = []string{"--etcd-endpoints", etcd.at.String(), "--replica", "one"}
	l.up()
	return west, two, etcd
}

// join starts the other one.
func (l *lab) join(two *cluster, etcd *etcdServer) {
	l.t.Helper()
	l.start("west-2/hansed", "hansed", "--config", filepath.Join(two.Dir, "hansed.yaml"), "--etcd-endpoints", etcd.at.String(), "--replica", "two")
	l.ready("west-2/hansed", two.Admin)
}

const replicaTimers = "timers: {suspect: 3s, recover: 2s, probe: 1s, leader: 2s}\n"

// TestReplicas runs one cluster by two hansed over one etcd, beside a cluster by one, and takes the leader away in every way, under load.
func TestReplicas(t *testing.T) {
	t.Parallel()
	l := newLab(t, replicaTimers, "west", "east")
	west, two, etcd := l.replicated(replicaTimers)
	l.leads("west", "one", 1)

	// A second one joins: its root is acknowledged before it signs, and it does what it is asked, or passes it on.
	l.join(two, etcd)
	l.leads("west-2", "one", 2)
	l.signing("west-2", 2)
	l.green()
	before := map[string][]endpoint{"west": l.state("west"), "east": l.state("east")}
	if len(before["west"]) != 4 || len(before["east"]) != 4 {
		t.Fatalf("west sees %d endpoints and east %d, want 4 and 4", len(before["west"]), len(before["east"]))
	}
	asBefore := func(what string, west ...string) {
		t.Helper()
		for _, c := range append(west, "east") {
			want := before["west"]
			if c == "east" {
				want = before["east"]
			}
			l.eventually(30*time.Second, what+": "+c+" sees what it saw before", func() error {
				if got := l.state(c); !reflect.DeepEqual(got, want) {
					return fmt.Errorf("\n%+v\nbefore\n%+v", got, want)
				}
				return nil
			})
		}
	}
	asBefore("at the follower", "west-2")
	if out := l.must("west-2", "", "apply", "-f", filepath.Join(west.Dir, "mesh.yaml")); !strings.Contains(out, "unchanged") {
		t.Errorf("apply at the follower: %s", out)
	}

	ld := l.load("west", payments, 4)
	far := l.load("east", payments, 1)
	settled := func(what string) {
		t.Helper()
		ld.none(l, what)
		far.none(l, what)
	}

	// kill -9 of the leader.
	killed := time.Now()
	l.kill("west/hansed")
	l.leads("west-2", "two", 1)
	t.Logf("another replica led %s after kill -9 of the leader (lease of 2s)", time.Since(killed).Round(10*time.Millisecond))
	l.eventually(30*time.Second, "all proxies of west speak to the other replica", func() error {
		if n := len(get[[]struct{ ID string }](l, "west-2", "proxies")); n != 5 {
			return fmt.Errorf("%d", n)
		}
		return nil
	})
	asBefore("after kill -9 of the leader", "west-2")
	l.save(filepath.Join(two.Dir, "more.yaml"), "apiVersion: v1\nkind: Service\nmetadata: {namespace: shop, name: more}\nspec:\n  ports: [{name: http, port: 80}]\n")
	l.must("west-2", "", "apply", "-f", filepath.Join(two.Dir, "more.yaml"))
	settled("kill -9 of the leader")

	// It comes back, and follows.
	l.start("west/hansed")
	l.ready("west/hansed", west.Admin)
	l.leads("west", "two", 2)
	if out := l.must("west", "", "get", "service", "more", "-n", "shop"); !strings.Contains(out, "more") {
		t.Errorf("what was applied meanwhile: %s", out)
	}
	asBefore("after the old leader is back", "west", "west-2")
	l.green()

	// Sidecars of one service at both replicas: a drill that is asked for at the one that follows is obeyed by all.
	l.kill("west/pay-b")
	l.start("west/pay-b")
	l.ready("west/pay-b", west.workload("pay-b").Admin)
	for _, c := range []string{"west", "west-2"} {
		l.eventually(30*time.Second, c+" knows all proxies", func() error {
			if n := len(get[[]struct{ ID string }](l, c, "proxies")); n != 5 {
				return fmt.Errorf("%d", n)
			}
			return nil
		})
	}
	time.Sleep(6 * time.Second) // a baseline
	out, err := l.hanse("west", "", "drill", "run", "--yes", "-o", "json", "--blackhole", "--service", "shop/payments", "--for", "8s")
	var d struct {
		drillReport
		Traffic []struct {
			Cluster string
			During  float64
		}
	}
	if jerr := json.Unmarshal([]byte(out), &d); jerr != nil {
		t.Fatalf("drill: %v %v", err, jerr)
	}
	if d.State != "done" || d.Calls == 0 || d.Detect == nil {
		t.Errorf("drill: %+v", d)
	}
	for _, row := range d.Traffic {
		if row.Cluster == "west" && row.During > 0.2 {
			t.Errorf("during the drill of both, west served %v of the calls: %+v", row.During, d.Traffic)
		}
	}
	asBefore("after a drill", "west", "west-2")

	// The leader is paused past its lease: another leads; when it goes on it follows.
	l.signal("west-2/hansed", syscall.SIGSTOP)
	l.leads("west", "one", 1)
	l.signal("west-2/hansed", syscall.SIGCONT)
	l.leads("west-2", "one", 2)
	asBefore("after the leader was paused", "west", "west-2")
	settled("leader paused")

	// A leader that ends in order is followed at once.
	ended := time.Now()
	l.signal("west/hansed", syscall.SIGTERM)
	<-l.proc("west/hansed").done
	l.leads("west-2", "two", 1)
	t.Logf("another replica led %s after SIGTERM to the leader, which then took its time to end", time.Since(ended).Round(10*time.Millisecond))
	l.start("west/hansed")
	l.ready("west/hansed", west.Admin)
	l.leads("west", "two", 2)
	asBefore("after a restart of the leader", "west", "west-2")
	settled("leader restarted")

	// Without etcd calls, identities and xDS go on with what is known.
	etcd.stop()
	time.Sleep(5 * time.Second)
	l.kill("west/frontend")
	l.start("west/frontend")
	l.ready("west/frontend", west.workload("frontend").Admin)
	if a, err := call(l.client("west", "frontend"), payments); err != nil {
		t.Errorf("a sidecar that was restarted while etcd is away: %+v %v", a, err)
	}
	etcd.start()
	l.eventually(30*time.Second, "one of them leads again", func() error {
		rows, err := l.replicas("west")
		if err == nil && (len(rows) != 2 || !rows[0].Leads || rows[0].LeadingSince.Before(ended)) {
			err = fmt.Errorf("%+v", rows)
		}
		return err
	})
	l.green()
	asBefore("after etcd was away", "west", "west-2")
	far.none(l, "etcd away")
	far.stop()
	ld.stop()
}

// TestReplicasRotate lets SVIDs and roots of two replicas live for seconds, and kills one after the other for long enough that its roots
// expire, while calls go on.
func TestReplicasRotate(t *testing.T) {
	t.Parallel()
	lives := "identity x509Life: 4s\nidentity rootLife: 24s\n" + replicaTimers
	l := newLab(t, lives, "west", "east")
	west, two, etcd := l.replicated(lives)
	l.join(two, etcd)
	l.signing("west-2", 2)

	local := l.load("west", payments, 2)
	l.kill("east/pay-a-app", "east/pay-b-app") // not their sidecars: a root waits half a minute for who has just gone
	across := l.load("east", payments, 2)      // east has none left: its calls cross
	across.from(l, 20*time.Second, "west")
	victims := []string{"west"}
	if soak() {
		victims = append(victims, "west-2")
	}
	for _, victim := range victims {
		l.kill(victim + "/hansed")
		time.Sleep(26 * time.Second)
		local.none(l, victim+" away for longer than a root lives, within the cluster")
		across.none(l, victim+" away for longer than a root lives, across clusters")
		l.start(victim + "/hansed")
		l.ready(victim+"/hansed", map[string]string{"west": west.Admin, "west-2": two.Admin}[victim])
		l.signing("west-2", 2)
	}
	local.stop()
	across.stop()
	local.none(l, "rotation with replicas, within a cluster")
	across.none(l, "rotation with replicas, across clusters")
	for _, hansed := range []string{"west", "west-2", "east"} {
		b, err := os.ReadFile(filepath.Join(l.dir, hansed+"-hansed.log"))
		if err != nil {
			t.Fatal(err)
		}
		if n := bytes.Count(b, []byte("root activated although not acknowledged by all")); n > 0 { // a quarter of a root's life is 6 s here
			t.Logf("%s has waited for acknowledgements in vain %d times", hansed, n)
		}
	}
}

// rootOf is a root as hanse trust show names it: the beginning of its name, whose it is and what it does.
func (l *lab) rootOf(c, replica, phase string) (string, error) {
	td := strings.TrimSuffix(c, "-2") + ".test"
	out, err := l.hanse(c, "", "trust", "show", td, "-o", "json")
	if err != nil {
		return "", err
	}
	var page trustPage
	if err := json.Unmarshal([]byte(out), &page); err != nil {
		return "", err
	}
	for _, a := range page.Authorities {
		if strings.Contains(a, ", replica "+replica+": "+phase) {
			name, _, _ := strings.Cut(a, "…")
			return name, nil
		}
	}
	return "", fmt.Errorf("replica %s has no root that is %s: %v", replica, phase, page.Authorities)
}

// newRoot waits until a replica signs with another root than that one, and returns it.
func (l *lab) newRoot(c, replica, than string) (name string) {
	l.t.Helper()
	l.eventually(time.Minute, fmt.Sprintf("%s says that replica %s signs with a new root", c, replica), func() (err error) {
		if name, err = l.rootOf(c, replica, "active"); err == nil && name == than {
			err = fmt.Errorf("it still is %s", name)
		}
		return err
	})
	return name
}

// TestReplicasTrust rotates and revokes the roots of two hansed of one cluster under load, while one after the other dies in the midst of it:
// what was ordered is done by all, also by one that was away, and no call fails.
func TestReplicasTrust(t *testing.T) {
	t.Parallel()
	l := newLab(t, replicaTimers, "west", "east")
	west, two, etcd := l.replicated(replicaTimers)
	l.join(two, etcd)
	l.leads("west", "one", 2)
	is := map[string]string{"one": l.newRoot("west", "one", ""), "two": l.newRoot("west", "two", "")}
	admins := map[string]string{"west": west.Admin, "west-2": two.Admin}
	back := func(c string) {
		t.Helper()
		l.start(c + "/hansed")
		l.ready(c+"/hansed", admins[c])
		l.eventually(30*time.Second, "both replicas are there", func() error {
			rows, err := l.replicas("west")
			if err == nil && len(rows) != 2 {
				err = fmt.Errorf("%+v", rows)
			}
			return err
		})
	}
	// rotated waits until both have replaced the roots that they had.
	rotated := func(at string) {
		t.Helper()
		for _, r := range []string{"one", "two"} {
			is[r] = l.newRoot(at, r, is[r])
		}
	}
	local := l.load("west", payments, 2)
	l.kill("east/pay-a", "east/pay-a-app", "east/pay-b", "east/pay-b-app")
	across := l.load("east", payments, 2) // east has none left: its calls cross
	across.from(l, 20*time.Second, "west")
	settled := func(what string) {
		t.Helper()
		local.none(l, what+", within the cluster")
		across.none(l, what+", across clusters")
	}

	// Asked at the follower, both rotate, and it says so when both have.
	r := get[rotation](l, "west-2", "trust", "rotate")
	if r.State != "active" || len(r.Missing) > 0 || r.Old[:8] != is["two"] || r.Root[:8] == is["two"] {
		t.Fatalf("%+v", r)
	}
	rotated("west-2")
	if is["two"] != r.Root[:8] {
		t.Errorf("it signs with %s, and said %s", is["two"], r.Root)
	}
	settled("rotation of both")

	// The one that is asked dies at once: the other one, the leader or not, goes on, and it goes on itself when it is back.
	askedOnes := []string{"west"}
	if soak() {
		askedOnes = append(askedOnes, "west-2")
	}
	for _, asked := range askedOnes {
		other := map[string]string{"west": "west-2", "west-2": "west"}[asked]
		name := map[string]string{"west": "one", "west-2": "two"}
		said := make(chan struct{})
		go func() {
			defer close(said)
			_, _ = l.hanse(asked, "", "trust", "rotate")
		}()
		l.eventually(10*time.Second, "a rotation has begun", func() error {
			_, err := l.rootOf(other, name[other], "prepared")
			if err != nil {
				if x, again := l.rootOf(other, name[other], "active"); again == nil && x != is[name[other]] {
					return nil // it is through with it
				}
			}
			return err
		})
		l.kill(asked + "/hansed")
		<-said
		is[name[other]] = l.newRoot(other, name[other], is[name[other]])
		back(asked)
		is[name[asked]] = l.newRoot(other, name[asked], is[name[asked]])
		settled("the replica that was asked to rotate died, " + asked)
	}

	// One that is away when it is ordered is named, and does it when it is back.
	l.kill("west-2/hansed")
	l.leads("west", "one", 1)
	r = get[rotation](l, "west", "trust", "rotate")
	if r.State != "active" || !reflect.DeepEqual(r.Away, []string{"two"}) {
		t.Errorf("%+v", r)
	}
	was := is["two"]
	is["one"] = l.newRoot("west", "one", is["one"])

	// Meanwhile its root, with which it would have signed, is revoked: all leave it, and it finds another when it is back.
	if out, err := l.hanse("west", "", "trust", "distrust", is["one"], "--yes"); err == nil || !strings.Contains(err.Error(), "signs now") {
		t.Errorf("the root that signs is revoked: %s %v", out, err)
	}
	d := get[distrusted](l, "west", "trust", "distrust", was, "--yes")
	t.Logf("the root of a replica that is away is revoked: %+v", d)
	if len(d.Missing) > 0 || d.Confirmed == 0 {
		t.Errorf("%+v", d)
	}
	for _, c := range []string{"west", "east"} {
		l.eventually(10*time.Second, c+" does not have the root any more", func() error {
			for _, a := range get[trustPage](l, c, "trust", "show", "west.test").Authorities {
				if strings.HasPrefix(a, was) {
					return fmt.Errorf("%s", a)
				}
			}
			return nil
		})
	}
	settled("the root of a replica that was away was revoked")
	back("west-2")
	is["two"] = l.newRoot("west", "two", was)
	l.kill("west/pay-b") // what comes now is signed by either
	l.start("west/pay-b")
	l.ready("west/pay-b", west.workload("pay-b").Admin)
	l.green()
	settled("that replica is back")

	// An old root of the one is revoked by the other.
	old, err := l.rootOf("west", "one", "old")
	if err != nil {
		t.Fatal(err)
	}
	if d := get[distrusted](l, "west-2", "trust", "distrust", old, "--yes"); len(d.Missing) > 0 {
		t.Errorf("%+v", d)
	}
	for _, c := range []string{"west", "west-2"} {
		if out := l.must(c, "", "trust", "show", "west.test"); strings.Contains(out, old) {
			t.Errorf("%s has the revoked root still:\n%s", c, out)
		}
	}
	settled("an old root was revoked by the other replica")

	// Without etcd nothing is half done.
	etcd.stop()
	if out, err := l.hanse("west-2", "", "trust", "rotate"); err == nil || !strings.Contains(err.Error(), "nothing was changed") {
		t.Errorf("a rotation without etcd: %s %v", out, err)
	}
	etcd.start()
	l.green()
	rotatedNot, err := l.rootOf("west-2", "two", "active")
	if err != nil || rotatedNot != is["two"] {
		t.Errorf("%s signs, want %s: %v", rotatedNot, is["two"], err)
	}
	local.stop()
	across.stop()
	settled("rotation and revocation with replicas")
}
