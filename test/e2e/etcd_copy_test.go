package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

// TestEtcdCopy takes a cluster from its embedded etcd to one of three members, and a second hansed to the first, under load: who is a member, what is
// exported, applied and distrusted, endpoints' IDs and roots are as they were.
func TestEtcdCopy(t *testing.T) {
	t.Parallel()
	const timers = "timers: {suspect: 3s, recover: 2s, probe: 1s}\n"
	l := newLab(t, timers, "west", "east")
	west := l.cluster("west")
	two := l.second(west, timers)
	l.up()
	before := map[string][]endpoint{"west": l.state("west"), "east": l.state("east")}
	if len(before["west"]) != 4 || len(before["east"]) != 4 {
		t.Fatalf("west sees %d endpoints and east %d, want 4 and 4", len(before["west"]), len(before["east"]))
	}
	roots := get[trustPage](l, "west", "trust", "show", "west.test").Authorities
	near := l.load("west", payments, 2)
	l.kill("east/pay-a", "east/pay-a-app", "east/pay-b", "east/pay-b-app")
	across := l.load("east", payments, 2) // east has none left: its calls cross
	across.from(l, 30*time.Second, "west")
	before["east"], before["west"] = l.state("east"), l.state("west")

	embedded := filepath.Join(west.Dir, "embedded.yaml")
	b, err := os.ReadFile(filepath.Join(west.Dir, "hansed.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	l.save(embedded, string(b))
	etcd := l.etcdOfThree(west, west, two)
	external := filepath.Join(west.Dir, "hansed.yaml")
	for _, m := range etcd.members {
		etcd.start(m, "new", etcd.members...)
	}
	etcd.healthy(etcd.members...)
	run := func() (string, error) {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		out, err := exec.CommandContext(ctx, filepath.Join(bin, "hansed"), "copy", "--config", embedded, "--to", external).CombinedOutput()
		return string(out), err
	}
	if out, err := run(); err == nil || !strings.Contains(out, "in use by another process") {
		t.Errorf("while hansed runs: %v %s", err, out)
	}
	l.end("west/hansed")
	out, err := run()
	if err != nil || !strings.Contains(out, "Copied ") {
		t.Fatalf("%v %s", err, out)
	}
	if out, err := run(); err == nil || !strings.Contains(out, "not empty") {
		t.Errorf("a second time: %v %s", err, out)
	}
	l.start("west/hansed", "hansed", "--config", external, "--replica", "one")
	l.ready("west/hansed", west.Admin)
	l.leads("west", "one", 1)
	l.green()
	same := func(what, c string, want []endpoint) {
		t.Helper()
		l.eventually(30*time.Second, what+": "+c+" sees what it saw before", func() error {
			if got := l.state(c); !reflect.DeepEqual(got, want) {
				return fmt.Errorf("\n%+v\nbefore\n%+v", got, want)
			}
			return nil
		})
	}
	same("over an external etcd", "west", before["west"])
	same("over an external etcd", "east", before["east"])
	if now := get[trustPage](l, "west", "trust", "show", "west.test").Authorities; len(now) != len(roots) || now[0][:8] != roots[0][:8] {
		t.Errorf("roots are %v, were %v", now, roots)
	}
	l.start("west-2/hansed", "hansed", "--config", filepath.Join(two.Dir, "hansed.yaml"), "--replica", "two")
	l.ready("west-2/hansed", two.Admin)
	l.signing("west-2", 2)
	same("with a second one", "west-2", before["west"])
	near.none(l, "from an embedded etcd to an external one")
	across.none(l, "from an embedded etcd to an external one")
	near.stop()
	across.stop()
}
