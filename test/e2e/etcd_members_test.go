package e2e

import (
	"fmt"
	"path/filepath"
	"reflect"
	"testing"
	"time"
)

// TestEtcdMembers runs one cluster by two hansed over an etcd of three members, beside a cluster that embeds its own, and replaces one member
// after the other, while calls go on and people apply.
func TestEtcdMembers(t *testing.T) {
	t.Parallel()
	const timers = "timers: {suspect: 3s, recover: 2s, probe: 1s}\n" // a candidate's lease as in production: it outlives an election of etcd's
	l := newLab(t, timers, "west", "east")
	west, two, etcd := l.overThree(timers)
	m := etcd.members
	l.green()
	before := map[string][]endpoint{"west": l.state("west"), "west-2": l.state("west"), "east": l.state("east")}
	if len(before["west"]) != 4 || len(before["east"]) != 4 {
		t.Fatalf("west sees %d endpoints and east %d, want 4 and 4", len(before["west"]), len(before["east"]))
	}
	near, far, people := l.load("west", payments, 2), l.load("east", payments, 1), l.applies("west", "west-2")
	settled := func(what string) {
		t.Helper()
		l.green()
		for c, want := range before {
			l.eventually(30*time.Second, what+": "+c+" sees what it saw before", func() error {
				if got := l.state(c); !reflect.DeepEqual(got, want) {
					return fmt.Errorf("\n%+v\nbefore\n%+v", got, want)
				}
				return nil
			})
		}
		near.none(l, what)
		far.none(l, what)
	}

	// One member is lost for good, then another: hansed knows only the addresses of the first three, of which one works in the end.
	etcd.lose(m[0])
	m4 := etcd.replace(m[0], m[1], m[1], m[2])
	settled("first member replaced")
	people.none(l, "first member replaced")
	etcd.lose(m[1])
	m5 := etcd.replace(m[1], m[2], m[2], m4)
	settled("second member replaced")
	people.none(l, "second member replaced")

	// The new addresses, one hansed after the other.
	now := []*etcdMember{m[2], m4, m5}
	for c, x := range map[string]*cluster{"west": west, "west-2": two} {
		people.stop() // it is asked at its socket, which goes with it
		argv := append([]string{"hansed", "--etcd-endpoints", etcd.endpoints(now...)}, l.proc(c + "/hansed").argv[1:]...)
		l.end(c + "/hansed")
		l.start(c+"/hansed", argv...)
		l.ready(c+"/hansed", x.Admin)
		l.signing(c, 2)
	}
	settled("hansed has the new addresses")
	people = l.applies("west", "west-2")

	people.none(l, "hansed has the new addresses")
	people.stop()

	// Without a quorum nothing can be changed, and calls go on; with it again all is as it was.
	for _, x := range []*etcdMember{m[2], m5} {
		l.kill(etcd.process(x))
	}
	l.kill("west/frontend")
	l.start("west/frontend")
	l.ready("west/frontend", west.workload("frontend").Admin)
	l.load("west", payments, 1).from(l, 10*time.Second, "west")
	more := filepath.Join(l.dir, "more.yaml")
	l.save(more, "apiVersion: v1\nkind: Service\nmetadata: {namespace: shop, name: more}\nspec:\n  ports: [{name: http, port: 80}]\n")
	if out, err := l.hanse("west", "", "apply", "-f", more); err == nil {
		t.Errorf("without a quorum an apply says: %s", out)
	}
	far.none(l, "no quorum")
	l.start(etcd.process(m5))
	l.eventually(time.Minute, "somebody leads again", func() error {
		_, err := l.hanse("west", "", "apply", "-f", more)
		return err
	})
	far.none(l, "quorum is back")
	l.green()
	near.stop()
	far.stop()
}
