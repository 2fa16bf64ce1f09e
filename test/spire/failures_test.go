package spire

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// trust is what hanse trust show says of a trust domain.
func (c *member) trust(td string) (row struct {
	Sequence             uint64
	Authorities, Missing []string
}, err error) {
	out, err := c.hanse("", "trust", "show", td, "-o", "json")
	if err == nil {
		err = json.Unmarshal([]byte(out), &row)
	}
	return row, err
}

// authoritiesAre waits until a control plane has so many authorities of a trust domain.
func (c *member) authoritiesAre(td string, want int) {
	c.m.t.Helper()
	c.m.eventually(fmt.Sprintf("%s has %d authorities of %s", c.name, want, td), func() error {
		row, err := c.trust(td)
		if err == nil && len(row.Authorities) != want {
			err = fmt.Errorf("%q", row.Authorities)
		}
		return err
	})
}

// onServer is how many X.509 authorities of a trust domain the spire-server has.
func (c *member) onServer(td string) (n int, err error) {
	l := *c.m.lab
	l.socket = c.spireAPI
	out, err := l.try("bundle", "list", "-id", "spiffe://"+td, "-format", "spiffe")
	if err != nil {
		return 0, err
	}
	n, _, err = countKeys(out)
	return n, err
}

// onServerAre waits until the spire-server has so many.
func (c *member) onServerAre(td string, want int) {
	c.m.t.Helper()
	c.m.eventually(fmt.Sprintf("%s's spire-server has %d authorities of %s", c.name, want, td), func() error {
		n, err := c.onServer(td)
		if err == nil && n != want {
			err = fmt.Errorf("%d", n)
		}
		return err
	})
}

// acknowledged waits until everybody has this cluster's bundle.
func (c *member) acknowledged() {
	c.m.t.Helper()
	c.m.eventually("all have "+c.name+"'s bundle", func() error {
		row, err := c.trust(c.td)
		if err == nil && len(row.Missing) > 0 {
			err = fmt.Errorf("missing: %q", row.Missing)
		}
		return err
	})
}

// settled waits until all proxies of a member are at its hansed and have said which bundles they have: for some seconds after it connects, a
// proxy that has not said so is not waited for.
func (c *member) settled() {
	c.m.t.Helper()
	c.m.eventually("the proxies of "+c.name+" have what was announced", func() error {
		out, err := c.hanse("", "proxies", "-o", "json")
		var all []struct{ TrustAcked bool }
		if err == nil {
			err = json.Unmarshal([]byte(out), &all)
		}
		if n := len(slices.DeleteFunc(all, func(p struct{ TrustAcked bool }) bool { return !p.TrustAcked })); err == nil && n != 2 {
			err = errors.New(out)
		}
		return err
	})
}

// stays looks for some seconds whether something remains as it is.
func (m *mesh) stays(what string, f func() error) {
	m.t.Helper()
	for end := time.Now().Add(3 * time.Second); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
		if err := f(); err != nil {
			m.t.Errorf("%s: %v", what, err)
			return
		}
	}
}

// lacks says whether a member has not acknowledged this cluster's bundle.
func (c *member) lacks(member string) error {
	row, err := c.trust(c.td)
	if err == nil && !slices.Contains(row.Missing, member) {
		err = fmt.Errorf("missing: %q", row.Missing)
	}
	return err
}

// red waits until a line of hanse status is red and says why.
func (c *member) red(check, why string) {
	c.m.t.Helper()
	c.m.eventually("status of "+c.name+" is red", func() error {
		out, err := c.hanse("", "status", "-o", "json")
		var s struct {
			OK     bool
			Checks []struct {
				Name, Detail string
				OK           bool
			}
		}
		if jerr := json.Unmarshal([]byte(out), &s); jerr != nil {
			return errors.Join(err, jerr)
		}
		for _, x := range s.Checks {
			if x.Name == check && !x.OK && !s.OK && strings.Contains(x.Detail, why) {
				return nil
			}
		}
		return fmt.Errorf("want %q in the check %q: %s", why, check, out)
	})
}

func (c *member) green() {
	c.m.t.Helper()
	c.m.eventually(c.name+" is green", func() error {
		if ok, text := c.status(); !ok {
			return errors.New(text)
		}
		return nil
	})
}

// presented is what a listener shows, its SVID first.
func presented(addr string) (chain []*x509.Certificate, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	d := &tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}, VerifyConnection: func(s tls.ConnectionState) error { //nolint:gosec // looks only
		chain = s.PeerCertificates
		return nil
	}}}
	conn, err := d.DialContext(ctx, "tcp", addr)
	if err == nil {
		conn.Close()
	}
	if len(chain) == 0 {
		return nil, err
	}
	return chain, nil
}

// files copies those of a pattern into a folder.
func files(t *testing.T, pattern, to string) {
	t.Helper()
	all, err := filepath.Glob(pattern)
	if err != nil || len(all) == 0 {
		t.Fatalf("%s: %v, %d files", pattern, err, len(all))
	}
	for _, f := range all {
		b, err := os.ReadFile(f)
		if err == nil {
			err = os.WriteFile(filepath.Join(to, filepath.Base(f)), b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestFailures takes away, one after the other, what a cluster on SPIRE rests on, while calls go on both ways. Its parts are rows of docs/spire.md.
func TestFailures(t *testing.T) {
	t.Parallel()
	m := newMesh(t, map[string]kind{"west": ownAgents, "east": realSPIRE}, "west", "east")
	west, east := m.members[0], m.members[1]
	east.ownSock = filepath.Join(east.dir, "o.sock")
	east.sync = "experimental { sync_interval = \"1s\" }"
	for _, c := range m.members {
		c.up("40s")
	}
	m.join()
	ld := m.load()
	row := func(name string, f func(t *testing.T)) {
		t.Helper()
		began := time.Now()
		if !t.Run(name, f) {
			t.FailNow()
		}
		ld.none(m, name)
		t.Logf("%s took %s", name, time.Since(began).Round(time.Second))
	}
	roots := 1 // of west
	announce := func() string {
		roots++
		return m.find(west.spire("localauthority x509 prepare"), `Authority ID: (\S+)`)
	}

	row("an entry of ours", func(*testing.T) {
		id := m.find(east.spire("entry show -spiffeID spiffe://"+east.td+"/ns/shop/sa/pay"), `Entry ID\s*: (hanse-\S+)`)
		east.spire("entry delete -entryID "+id, "Deleted entry") // that it is made again, in a moment or a minute, a row below sees
	})

	row("agent of a workload", func(*testing.T) {
		east.settled()
		east.agent.stop()
		next := announce()
		east.onServerAre(west.td, roots)
		m.stays("its sidecar cannot have what is new, so east has not acknowledged it", func() error { return west.lacks("east") })
		east.agent.start()
		west.acknowledged()
		west.spire("localauthority x509 activate -authorityID " + next)
	})

	row("agent of hansed", func(*testing.T) {
		east.ownAgent.stop()
		east.red("spire-agent", "the last SVID stays in force until it expires")
		if err := ready(east.ip(1) + ":7440"); err != nil {
			t.Errorf("hansed has an SVID and is not ready: %v", err)
		}
		east.hansed.stop()
		east.startHansed()
		m.eventually("its log says what it waits for", func() error {
			b, err := os.ReadFile(filepath.Join(east.dir, "hansed.log"))
			if n := strings.Count(string(b), "cannot follow the Workload API"); err == nil && n < 2 {
				err = fmt.Errorf("%d times", n)
			}
			return err
		})
		m.stays("without an SVID it is not ready", func() error {
			if ready(east.ip(1)+":7440") == nil {
				return errors.New("it is")
			}
			return nil
		})
		east.ownAgent.start()
		m.eventually("it is ready", func() error { return ready(east.ip(1) + ":7440") })
		east.green()
	})

	row("hansed", func(*testing.T) {
		east.entries("pay", 1) // made again
		before, err := presented(east.ip(3) + ":15008")
		if err != nil {
			t.Fatal(err)
		}
		east.hansed.kill()
		next := announce()
		m.eventually("SPIRE renews the workload's SVID", func() error {
			now, err := presented(east.ip(3) + ":15008")
			if err == nil && now[0].SerialNumber.Cmp(before[0].SerialNumber) == 0 {
				err = errors.New("not yet")
			}
			return err
		})
		if n, err := east.onServer(west.td); err != nil || n != roots-1 {
			t.Errorf("spire-server has %d authorities of west, want the %d of before: %v", n, roots-1, err)
		}
		if err := west.lacks("east"); err != nil {
			t.Errorf("nobody can have told east: %v", err)
		}
		east.startHansed()
		west.acknowledged()
		east.onServerAre(west.td, roots)
		west.spire("localauthority x509 activate -authorityID " + next)
	})

	row("spire-server", func(*testing.T) {
		east.settled()
		east.stopServer()
		east.red("spire-server", "the last good state stays in force")
		next := announce()
		east.authoritiesAre(west.td, roots)
		m.stays("no workload of east can have the new root", func() error { return west.lacks("east") })
		east.startServer()
		west.acknowledged()
		east.green()
		west.spire("localauthority x509 activate -authorityID " + next)
	})

	ld.stop()
	t.Run("spire-server from a backup", func(*testing.T) {
		backup := filepath.Join(east.dir, "backup")
		if err := os.Mkdir(backup, 0o700); err != nil {
			t.Fatal(err)
		}
		east.stopServer()
		files(t, filepath.Join(east.dir, "db.sqlite3*"), backup)
		files(t, filepath.Join(east.dir, "keys.json"), backup)
		east.startServer()
		east.green()

		// Meanwhile a service comes, another root signs, and west announces one.
		east.must("", "apply", "-f", east.save("late.yaml", fmt.Sprintf(late, east.ip(4))))
		east.entries("late", 1)
		active := m.find(east.spire("localauthority x509 prepare"), `Authority ID: (\S+)`)
		west.authoritiesAre(east.td, 2)
		east.spire("localauthority x509 activate -authorityID "+active, active)
		announce()
		east.onServerAre(west.td, roots)
		l := *m.lab
		l.socket = east.spireAPI
		svid, err := l.minted("spiffe://" + east.td + "/ns/shop/sa/pay")
		if err != nil {
			t.Fatal(err)
		}
		td := spiffeid.RequireTrustDomainFromString(east.td)
		accepts := func() error {
			b, err := spiffebundle.Parse(td, []byte(west.must("", "trust", "show", east.td, "-o", "bundle")))
			if err != nil {
				t.Fatal(err)
			}
			_, _, err = x509svid.Verify(svid, b)
			return err
		}
		if err := accepts(); err != nil || fmt.Sprintf("%x", svid[0].AuthorityKeyId) != active {
			t.Errorf("before: %v", err)
		}
		before, err := west.trust(east.td)
		if err != nil {
			t.Fatal(err)
		}

		east.stopServer()
		for _, f := range []string{"db.sqlite3", "db.sqlite3-wal", "db.sqlite3-shm", "keys.json"} {
			if err := os.Remove(filepath.Join(east.dir, f)); err != nil && !errors.Is(err, os.ErrNotExist) {
				t.Fatal(err)
			}
		}
		files(t, filepath.Join(backup, "*"), east.dir)
		east.startServer()
		east.entries("late", 1)
		east.onServerAre(west.td, roots)
		west.authoritiesAre(east.td, 1)
		if now, err := west.trust(east.td); err != nil || now.Sequence <= before.Sequence {
			t.Errorf("sequence %d after %d: %v", now.Sequence, before.Sequence, err)
		}
		if accepts() == nil {
			t.Error("what the backup does not know is accepted")
		}
		again := m.load()
		m.eventually("calls go on when the agents have renewed", func() error {
			again.mu.Lock()
			defer again.mu.Unlock()
			if len(again.pairs) != 2 {
				return fmt.Errorf("%v, %v", again.pairs, again.errs)
			}
			return nil
		})
		again.stop()
		east.green()
	})
}

// TestFirstStart: hansed waits for the SPIRE that it rests on, and ends with the reason if it does not come. For files it does not wait.
func TestFirstStart(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ name, identity, why string }{
		{"on SPIRE", "  spire: {server: \"unix://%[1]s/s.sock\", workloadAPI: \"unix://%[1]s/w.sock\"}\n", "is it running, and may this user read its socket"},
		{"below SPIRE", "  upstream: {spire: {server: \"127.0.0.1:1\", workloadAPI: \"unix://%[1]s/w.sock\"}}\n", "have a CA signed upstream: the Workload API unix://%[1]s/w.sock"},
		{"below files", "  upstream: {dir: \"%[1]s/none\"}\n", "%[1]s/none/tls.crt: no such file"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			m := newMesh(t, nil, "west")
			west := m.members[0]
			west.program("hansed", "hansed")
			west.hansedConfig(fmt.Sprintf(c.identity, west.dir), "")
			began := time.Now()
			west.startHansed()
			select {
			case <-west.hansed.done:
			case <-time.After(time.Minute):
				t.Fatal("it does not end")
			}
			took := time.Since(began)
			b, err := os.ReadFile(filepath.Join(west.dir, "hansed.log"))
			if why := strings.ReplaceAll(c.why, "%[1]s", west.dir); err != nil || !strings.Contains(string(b), why) || west.hansed.ProcessState.Success() {
				t.Errorf("%s, %v: want the reason %q: %s", west.hansed.ProcessState, err, why, b)
			}
			if waits := took > 25*time.Second; waits != (c.name != "below files") {
				t.Errorf("it ended after %s: %s", took, b)
			}
		})
	}
}
