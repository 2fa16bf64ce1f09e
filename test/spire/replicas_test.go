package spire

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// etcd starts one for a member, and returns its address.
func (c *member) etcd() string {
	c.m.t.Helper()
	at, peer := "http://"+c.ip(5)+":2379", "http://"+c.ip(5)+":2380"
	c.start("etcd", tools+"tools/etcd", "--data-dir", filepath.Join(c.dir, "etcd"), "--log-level", "error", "--unsafe-no-fsync", "--listen-client-urls", at, "--advertise-client-urls", at,
		"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", "default="+peer)
	c.m.eventually("etcd answers", func() error {
		conn, err := net.DialTimeout("tcp", c.ip(5)+":2379", time.Second) // it listens to clients when it serves them
		if err == nil {
			conn.Close()
		}
		return err
	})
	return at
}

// replicated is the part of hansed.yaml by which a cluster has several hansed.
func replicated(name, etcd string) string {
	return fmt.Sprintf("replica: %s\netcd: {endpoints: [%q]}\ntimers: {suspect: 3s, recover: 2s, probe: 1s, leader: 2s}\n", name, etcd)
}

// second is another hansed of a member's cluster, with a data directory, a socket and addresses of its own.
func (c *member) second() *member {
	two := *c
	two.dir, two.hansed = filepath.Join(c.dir, "2"), nil
	two.name = filepath.Join(c.name, "2") // of its folder
	return &two
}

// startSecond starts it from the first one's configuration.
func (c *member) startSecond(etcd string) *member {
	c.m.t.Helper()
	two := c.second()
	b, err := os.ReadFile(filepath.Join(c.dir, "hansed.yaml"))
	if err == nil {
		err = os.Mkdir(two.dir, 0o700)
	}
	if err != nil {
		c.m.t.Fatal(err)
	}
	two.save("hansed.yaml", strings.NewReplacer(c.ip(1)+":", c.ip(6)+":", replicated("one", etcd), replicated("two", etcd)).Replace(string(b)))
	two.hansed = run(c.m.t, filepath.Join(two.dir, "hansed.log"), filepath.Join(c.dir, "hansed"), "--config", filepath.Join(two.dir, "hansed.yaml"))
	c.m.eventually("the second hansed is ready", func() error { return ready(c.ip(6) + ":7440") })
	return two
}

// leads waits until a hansed says that this replica leads so many, and, with signs, that all of them sign.
func (c *member) leads(leader string, count int, sign bool) {
	c.m.t.Helper()
	c.m.eventually(fmt.Sprintf("%s leads %d replicas", leader, count), func() error {
		out, err := c.hanse("", "status", "-o", "json")
		var s struct {
			Replicas []struct {
				Name         string
				Leads, Signs bool
				LeadingSince time.Time
			}
		}
		if jerr := json.Unmarshal([]byte(out), &s); jerr != nil {
			return errors.Join(err, jerr)
		}
		signs := 0
		for _, r := range s.Replicas {
			if r.Signs {
				signs++
			}
		}
		if len(s.Replicas) != count || s.Replicas[0].Name != leader || !s.Replicas[0].Leads || s.Replicas[0].LeadingSince.IsZero() || sign && signs != count {
			return fmt.Errorf("%+v", s.Replicas)
		}
		return nil
	})
}

// relayedBy says whether the spire-server fetches the bundle of a trust domain from this address of the cluster's.
func (c *member) relayedBy(td, host string) error {
	l := *c.m.lab
	l.socket = c.spireAPI
	out, err := l.try("federation", "show", "-trustDomain", td)
	if err == nil && !strings.Contains(out, "https://"+host+":7446/federated/"+td) {
		err = errors.New(out)
	}
	return err
}

// TestReplicasOnSPIRE: of two hansed of one cluster on SPIRE the leader keeps entries and federation. Killed, or paused past its lease, it is followed by the
// other, and what it does when it goes on undoes nothing.
func TestReplicasOnSPIRE(t *testing.T) {
	t.Parallel()
	m := newMesh(t, map[string]kind{"west": ownAgents, "east": realSPIRE}, "west", "east")
	west, one := m.members[0], m.members[1]
	etcd := one.etcd()
	one.more = replicated("one", etcd)
	one.xds = fmt.Sprintf(", \"%s:7445\"", one.ip(6))
	for _, c := range m.members {
		c.up("60s")
	}
	two := one.startSecond(etcd)
	one.leads("one", 2, false)
	m.join()
	ld := m.load()
	if err := one.relayedBy(west.td, one.ip(1)); err != nil {
		t.Error(err)
	}
	service := func(account string, at *member, host int) {
		t.Helper()
		at.must("", "apply", "-f", at.save(account+".yaml", strings.ReplaceAll(fmt.Sprintf(late, one.ip(host)), "late", account)))
	}
	service("before", two, 10) // at the one that follows: it passes it on
	one.entries("before", 1)

	one.hansed.kill()
	killed := time.Now()
	two.leads("two", 1, false)
	service("after", two, 11)
	one.entries("after", 1)
	m.eventually("the relationship leads to the one that is there", func() error { return one.relayedBy(west.td, one.ip(6)) })
	one.entries("before", 1)
	one.entries("pay", 1)
	t.Logf("the other kept SPIRE in step %s after kill -9 of the leader (lease of 2 s)", time.Since(killed).Round(100*time.Millisecond))
	next := m.find(west.spire("localauthority x509 prepare"), `Authority ID: (\S+)`)
	one.onServerAre(west.td, 2)
	west.acknowledged()
	west.spire("localauthority x509 activate -authorityID " + next)
	ld.none(m, "kill -9 of the leader")

	// It comes back and follows. Then the leader is paused past its lease, while it has something to write: what it writes when it goes on is nothing.
	one.startHansed()
	two.leads("two", 2, false)
	if err := one.relayedBy(west.td, one.ip(6)); err != nil {
		t.Errorf("one that follows has written: %v", err)
	}
	two.must("", "apply", "-f", two.save("gone.yaml", strings.ReplaceAll(fmt.Sprintf(late, one.ip(12)), "late", "gone")))
	one.entries("gone", 1)
	two.must("", "delete", "endpointslices", "gone", "-n", "shop") // whose entry is to go after 2 s
	_ = two.hansed.Process.Signal(syscall.SIGSTOP)
	one.leads("one", 1, false)
	one.must("", "apply", "-f", one.save("gone.yaml", strings.ReplaceAll(fmt.Sprintf(late, one.ip(12)), "late", "gone")))
	service("meanwhile", one, 13)
	one.entries("meanwhile", 1)
	one.entries("gone", 1)
	m.eventually("the relationship leads to the new leader", func() error { return one.relayedBy(west.td, one.ip(1)) })
	_ = two.hansed.Process.Signal(syscall.SIGCONT)
	m.stays("what the leader has made", func() error {
		l := *m.lab
		l.socket = one.spireAPI
		for _, account := range []string{"meanwhile", "gone", "pay"} {
			if out, err := l.try("entry", "show", "-spiffeID", "spiffe://"+one.td+"/ns/shop/sa/"+account); err != nil || !strings.Contains(out, "Found 1 entr") {
				return fmt.Errorf("%s: %v %s", account, err, out)
			}
		}
		return one.relayedBy(west.td, one.ip(1))
	})
	two.leads("one", 2, false)
	ld.none(m, "leader paused")
	ld.stop()
	one.green()
}

// TestReplicasBelowSPIRE: two hansed of one cluster have a CA each below one spire-server. Each signs what the upstream's workloads accept, alone too, and
// both follow the upstream to its next root.
func TestReplicasBelowSPIRE(t *testing.T) {
	t.Parallel()
	m := newMesh(t, map[string]kind{"west": realSPIRE}, "west")
	one := m.members[0]
	one.program("hansed", "hansed")
	one.agentSock = one.dir + "/w.sock"
	one.startSPIRE()
	host, port := one.serverAddress()
	one.agent = one.spireAgent("spire-agent", one.agentSock, host, port)
	one.spire(fmt.Sprintf("entry create -downstream -parentID spiffe://%s/node -spiffeID spiffe://%s/west/hansed -selector unix:path:%s/hansed", one.td, one.td, one.dir), "Entry ID")
	one.spire(fmt.Sprintf("entry create -parentID spiffe://%s/node -spiffeID spiffe://%s/upstream/app -selector %s", one.td, one.td, selfSelector(t)), "Entry ID")
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	var app *workloadapi.X509Source
	m.eventually("the upstream's workload has its SVID", func() (err error) {
		short, cancel := context.WithTimeout(ctx, 15*time.Second)
		defer cancel()
		app, err = workloadapi.NewX509Source(short, workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+one.agentSock)))
		return err
	})
	defer app.Close()

	etcd := one.etcd()
	one.hansedConfig(fmt.Sprintf("  x509Life: 60s\n  rootLife: 2h\n  upstream: {spire: {server: \"%s:%s\", workloadAPI: \"unix://%s\"}}\n", host, port, one.agentSock), replicated("one", etcd))
	one.startHansed()
	m.eventually("hansed is ready", func() error { return ready(one.ip(1) + ":7440") })
	two := one.startSecond(etcd)
	one.leads("one", 2, true)

	// rest waits until what a replica signs now is accepted, and rests on a root of the upstream; it returns the replica's CA.
	rest := func(c *member, root string) (ca string) {
		t.Helper()
		l := *m.lab
		l.socket = filepath.Join(c.dir, "d/spire-server/api.sock")
		m.eventually(fmt.Sprintf("what %s signs is accepted, and rests on %s", c.name, root), func() error {
			chain, err := l.minted("spiffe://" + one.td + "/ns/shop/sa/pay")
			if err != nil {
				return err
			}
			_, paths, err := x509svid.Verify(chain, app)
			if err != nil {
				return err
			}
			ca = fmt.Sprintf("%x", chain[0].AuthorityKeyId)
			if got := fmt.Sprintf("%x", paths[0][len(paths[0])-1].SubjectKeyId); got != root || len(chain) != 2 {
				return fmt.Errorf("a chain of %d that rests on %s", len(chain), got)
			}
			return nil
		})
		return ca
	}
	bundled := func(c *member, want int) {
		t.Helper()
		c.authoritiesAre(one.td, want)
	}
	spire := *m.lab
	spire.socket = one.spireAPI
	before := spire.find(one.spire("localauthority x509 show"), `Active X\.509 authority:\s+Authority ID: (\S+)`)
	first, second := rest(one, before), rest(two, before)
	if first == second {
		t.Error("both have one CA")
	}
	bundled(one, 1)
	bundled(two, 1)

	one.hansed.kill()
	two.leads("two", 1, true)
	if ca := rest(two, before); ca != second {
		t.Errorf("another CA signs at the one that is left: %s, before %s", ca, second)
	}
	bundled(two, 1)
	one.startHansed()
	two.leads("two", 2, true)
	if ca := rest(one, before); ca != first {
		t.Errorf("it came back with another CA: %s, before %s", ca, first)
	}

	next := spire.find(one.spire("localauthority x509 prepare"), `Authority ID: (\S+)`)
	bundled(one, 2)
	bundled(two, 2)
	m.eventually("the upstream's agent has the prepared root", func() error {
		svid, err := app.GetX509SVID()
		if err != nil {
			return err
		}
		b, err := app.GetX509BundleForTrustDomain(svid.ID.TrustDomain())
		if err == nil && len(b.X509Authorities()) != 2 {
			err = fmt.Errorf("%d roots", len(b.X509Authorities()))
		}
		return err
	})
	one.spire("localauthority x509 activate -authorityID "+next, next)
	one.spire("localauthority x509 taint -authorityID "+before, before)
	rest(one, next)
	rest(two, next)
	m.renewed(app, next)
	one.spire("localauthority x509 revoke -authorityID "+before, before)
	bundled(one, 1)
	bundled(two, 1)
	rest(one, next)
	rest(two, next)
	one.green()
}
