package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"
)

const payments = "http://payments.shop:8080/"

// state is the whole endpoint list of payments as a cluster sees it, without what only tells the time.
func (l *lab) state(c string) []endpoint {
	l.t.Helper()
	return get[[]endpoint](l, c, "endpoints", "shop/payments")
}

// TestFaults hurts one mesh of two clusters in many ways, one after the other. Each step ends with the mesh as it was before.
func TestFaults(t *testing.T) {
	t.Parallel()
	l := newLab(t, shortTimers, "west", "east")
	l.up()
	before := map[string][]endpoint{"west": l.state("west"), "east": l.state("east")}
	if len(before["west"]) != 4 || len(before["east"]) != 4 {
		t.Fatalf("west sees %d endpoints and east %d, want 4 and 4", len(before["west"]), len(before["east"]))
	}
	asBefore := func(t *testing.T) {
		t.Helper()
		l.green()
		for c, want := range before {
			if got := l.state(c); !reflect.DeepEqual(got, want) {
				t.Errorf("%s sees\n%+v\nand before\n%+v", c, got, want)
			}
		}
	}
	step := func(name string, f func(t *testing.T)) {
		t.Run(name, func(sub *testing.T) {
			outer := l.t
			l.t = sub
			defer func() { l.t = outer }()
			f(sub)
			if !sub.Failed() {
				asBefore(sub)
			}
		})
		if t.Failed() {
			t.FailNow() // what follows would only fail after it
		}
	}

	step("calls stay in the zone, and a stranger is refused", func(t *testing.T) {
		a, err := call(l.client("west", "frontend"), payments)
		if err != nil || a.Cluster != "west" || a.Zone != "eu-1a" || a.Caller != "spiffe://west.test/ns/shop/sa/frontend" {
			t.Errorf("%+v, %v", a, err)
		}
		if _, err := call(l.client("west", "intruder"), payments); err == nil || !strings.Contains(err.Error(), "403") {
			t.Errorf("the intruder was answered: %v", err)
		}
	})

	step("kill -9 of an endpoint's application", func(t *testing.T) {
		ld := l.load("west", payments, 4)
		time.Sleep(500 * time.Millisecond)
		l.kill("west/pay-a-app")
		time.Sleep(2 * time.Second)
		l.start("west/pay-a-app")
		time.Sleep(time.Second)
		ld.stop()
		ld.none(l, "application killed and started again")
	})

	step("kill -9 of a zone, then of all of the cluster's payments: another cluster takes over, through its gateway", func(t *testing.T) {
		ld := l.load("west", payments, 4)
		time.Sleep(500 * time.Millisecond)
		l.kill("west/pay-a", "west/pay-a-app")
		time.Sleep(time.Second)
		l.kill("west/pay-b", "west/pay-b-app")
		ld.from(l, 20*time.Second, "east")
		a, err := call(l.client("west", "frontend"), payments)
		if err != nil || a.Cluster != "east" || a.Caller != "spiffe://west.test/ns/shop/sa/frontend" {
			t.Errorf("%+v, %v", a, err)
		}
		if gw := l.cluster("east").GatewayIP; !strings.HasPrefix(a.PeerAddress, gw+":") && a.PeerAddress != gw {
			t.Errorf("east's sidecar was dialled from %q, want its gateway %s", a.PeerAddress, gw)
		}
		for _, p := range []string{"west/pay-a-app", "west/pay-a", "west/pay-b-app", "west/pay-b"} {
			l.start(p)
		}
		ld.from(l, 40*time.Second, "west")
		ld.stop()
		ld.none(l, "all of west's payments killed and started again")
	})

	step("kill -9 of a gateway, used and unused", func(t *testing.T) {
		ld := l.load("west", payments, 2)
		l.kill("east/gateway")
		time.Sleep(2 * time.Second)
		ld.stop()
		ld.none(l, "east's gateway killed while west needs it not")
		l.start("east/gateway")
		l.ready("east/gateway", l.cluster("east").GatewayAdmin)
	})

	step("kill -9 of a hansed: nobody notices, and it comes back as it was", func(t *testing.T) {
		ld := l.load("west", payments, 2)
		l.kill("west/hansed")
		time.Sleep(2 * time.Second)
		l.start("west/hansed")
		l.ready("west/hansed", l.cluster("west").Admin)
		ld.stop()
		ld.none(l, "hansed killed and started again")
	})

	step("SIGSTOP of a peer's hansed: suspect, not forgotten", func(t *testing.T) {
		d := 6 * time.Second
		if soak() {
			d = 10 * time.Minute
		}
		ld := l.load("west", payments, 2)
		l.signal("east/hansed", syscall.SIGSTOP)
		l.eventually(d, "west holds east suspect", func() error {
			for _, c := range get[clusterList](l, "west", "clusters").Clusters {
				if c.Name == "east" && c.State == "suspect" {
					return nil
				}
			}
			return errors.New("east is not suspect")
		})
		time.Sleep(d / 2)
		if got := l.state("west"); !reflect.DeepEqual(got, before["west"]) {
			t.Errorf("while east is silent, west sees\n%+v\nand before\n%+v", got, before["west"])
		}
		l.signal("east/hansed", syscall.SIGCONT)
		ld.stop()
		ld.none(l, "east's hansed silent")
	})

	step("all hansed dead: calls go on, a killed sidecar comes back, and everything restarts from disk with the peer absent", func(t *testing.T) {
		ld := l.load("west", payments, 2)
		l.kill("west/hansed", "east/hansed")
		time.Sleep(time.Second)
		l.kill("west/pay-a", "west/pay-b") // now west's frontend needs east, without any control plane
		ld.from(l, 20*time.Second, "east")
		l.start("west/pay-a")
		l.ready("west/pay-a", l.cluster("west").workload("pay-a").Admin)
		ld.from(l, 40*time.Second, "west")
		ld.stop()
		ld.none(l, "no control plane anywhere")

		l.kill("west/frontend")
		l.start("west/frontend")
		l.ready("west/frontend", l.cluster("west").workload("frontend").Admin)
		if a, err := call(l.client("west", "frontend"), payments); err != nil || a.Cluster != "west" {
			t.Errorf("a caller's sidecar that restarted without hansed: %+v, %v", a, err)
		}

		l.start("west/hansed")
		l.ready("west/hansed", l.cluster("west").Admin)
		if got := l.state("west"); !reflect.DeepEqual(got, before["west"]) {
			t.Errorf("with east absent, west starts with\n%+v\nand had\n%+v", got, before["west"])
		}
		l.start("east/hansed")
		l.start("west/pay-b")
		l.ready("east/hansed", l.cluster("east").Admin)
		l.ready("west/pay-b", l.cluster("west").workload("pay-b").Admin)
	})

	step("a leave touches nothing else, and a new token brings it back", func(t *testing.T) {
		l.must("east", "", "leave", "--yes")
		l.eventually(20*time.Second, "west is alone", func() error {
			if eps := l.state("west"); len(eps) != 2 {
				return fmt.Errorf("west sees %d endpoints", len(eps))
			}
			return nil
		})
		token := l.must("west", "", "token", "create", "--for", "east")
		l.must("east", token, "join", "-")
		if _, err := l.hanse("east", token, "join", "-"); err != nil {
			t.Errorf("repeating a finished join: %v", err)
		}
	})
}

// TestRotationUnderLoad lets SVIDs and roots live for seconds and calls all the time.
func TestRotationUnderLoad(t *testing.T) {
	t.Parallel()
	d, lives := 20*time.Second, "identity x509Life: 4s\nidentity rootLife: 16s\n"
	if soak() {
		d, lives = 10*time.Minute, "identity x509Life: 20s\nidentity rootLife: 80s\n"
	}
	l := newLab(t, lives+shortTimers, "west", "east")
	l.up()
	seq := func() uint64 {
		return get[trustDomain](l, "west", "trust", "show", "east.test").Sequence
	}
	first := seq()
	local := l.load("west", payments, 2)
	l.kill("east/pay-a", "east/pay-a-app", "east/pay-b", "east/pay-b-app")
	across := l.load("east", payments, 2) // east has none left: its calls cross
	across.from(l, 20*time.Second, "west")
	time.Sleep(d)
	local.stop()
	across.stop()
	local.none(l, "rotation, within a cluster")
	across.none(l, "rotation, across clusters")
	if now := seq(); now <= first {
		t.Errorf("no root was rotated: sequence %d, then %d", first, now)
	}
}

// TestBadStarts is what a person sees when hansed cannot start.
func TestBadStarts(t *testing.T) {
	t.Parallel()
	l := newLab(t, "", "west")
	c := l.clusters[0]
	config := filepath.Join(c.Dir, "hansed.yaml")
	run := func(args ...string) (string, int) {
		out, err := exec.Command(filepath.Join(bin, "hansed"), args...).CombinedOutput()
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			return string(out), exit.ExitCode()
		}
		return string(out), 0
	}
	if out, code := run("--config", config, "--check"); code != 0 || !strings.Contains(out, "is good") {
		t.Errorf("--check of the sample: %d %s", code, out)
	}
	if out, code := run(); code != 2 || !strings.Contains(out, "hint:") {
		t.Errorf("no arguments: %d %s", code, out)
	}

	l.start("west/hansed", "hansed", "--config", config)
	l.ready("west/hansed", c.Admin)
	if out, code := run("--config", config); code != 1 || !strings.Contains(out, "hansed:") {
		t.Errorf("a second hansed on the same data: %d %s", code, out)
	}
	l.kill("west/hansed")

	key := filepath.Join(c.Dir, "data", "ca", "authority.json")
	good, err := os.ReadFile(key)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(key, good[:len(good)/2], 0o600); err != nil {
		t.Fatal(err)
	}
	if out, code := run("--config", config); code != 1 || !strings.Contains(out, "authority.json") {
		t.Errorf("a damaged key file: %d %s", code, out)
	}
	if now, err := os.ReadFile(key); err != nil || len(now) != len(good)/2 {
		t.Errorf("a damaged key file was overwritten: %v", err)
	}
	if err := os.WriteFile(key, good, 0o600); err != nil {
		t.Fatal(err)
	}

	db := filepath.Join(c.Dir, "data", "etcd", "own", "member", "snap", "db")
	if err := os.WriteFile(db, []byte(strings.Repeat("not a database ", 1000)), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, code := run("--config", config); code != 1 || !strings.Contains(out, "etcd") || !strings.Contains(out, "hint:") {
		t.Errorf("a damaged database: %d %s", code, out)
	}
}

// TestBadTokensAreNamed is what a person sees when a join cannot be.
func TestBadTokensAreNamed(t *testing.T) {
	t.Parallel()
	l := newLab(t, shortTimers, "west", "east", "west2")
	for _, c := range l.clusters {
		l.start(c.Name+"/hansed", "hansed", "--config", filepath.Join(c.Dir, "hansed.yaml"))
	}
	for _, c := range l.clusters {
		l.ready(c.Name+"/hansed", c.Admin)
	}
	join := func(c, token, want string) {
		t.Helper()
		if _, err := l.hanse(c, token, "join", "-"); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "hint:") {
			t.Errorf("join of %s: %v\nwant an error with %q and a hint", c, err, want)
		}
	}
	token := strings.TrimSpace(l.must("west", "", "token", "create", "--for", "east"))
	flipped := []byte(token)
	flipped[len(flipped)/2] ^= 1
	join("east", string(flipped), "")
	join("west2", token, "") // made for another name
	if out, err := l.hanse("east", token, "join", "--check", "-"); err != nil {
		t.Errorf("--check: %v %s", err, out)
	}
	if n := len(get[clusterList](l, "west", "clusters").Clusters); n != 1 {
		t.Errorf("--check changed something: %d clusters", n)
	}
	l.must("east", token, "join", "-")
	join("west2", token, "")
	if _, err := l.hanse("east", "", "join", token); err == nil || !strings.Contains(err.Error(), "exit status 2") {
		t.Errorf("a token as an argument: %v", err)
	}
	short := l.must("west", "", "token", "create", "--for", "west2", "--ttl", "1s")
	time.Sleep(1500 * time.Millisecond)
	join("west2", short, "expired")
	var s statusPage
	out, _ := l.hanse("west2", "", "status", "-o", "json")
	if err := json.Unmarshal([]byte(out), &s); err != nil || len(s.Clusters) != 1 {
		t.Errorf("after failed joins west2 is in a mesh: %v %s", err, out)
	}
}
