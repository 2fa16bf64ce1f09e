package spire

import (
	"fmt"
	"testing"
)

// TestMove moves a cluster from Hanse's authority to SPIRE, as docs/spire.md says: below SPIRE first, then on it, then its sidecars one by one. No
// call fails but while the only sidecar of a service restarts.
func TestMove(t *testing.T) {
	t.Parallel()
	m := newMesh(t, map[string]kind{"west": ownAgents, "east": ownAgents}, "west", "east")
	west, east := m.members[0], m.members[1]
	for _, c := range m.members {
		c.up("60s")
	}
	m.join()
	ld := m.load()
	ours := *m.lab // hansed's own SPIRE API
	ours.socket = west.spireAPI
	old := ours.find(ours.run("localauthority x509 show"), `Active X\.509 authority:\s+Authority ID: (\S+)`)

	// SPIRE comes, of the same trust domain, and hansed below it.
	west.sync = "experimental { sync_interval = \"1s\" }"
	west.startSPIRE()
	host, port := west.serverAddress()
	west.agent = west.spireAgent("spire-agent", west.agentSock, host, port)
	west.spire(fmt.Sprintf("entry create -downstream -parentID spiffe://%s/node -spiffeID spiffe://%s/west/hansed -selector unix:path:%s/hansed", west.td, west.td, west.dir), "Entry ID")
	root := m.find(west.spire("localauthority x509 show"), `Active X\.509 authority:\s+Authority ID: (\S+)`)
	restart := func(identity string) {
		t.Helper()
		west.hansed.stop()
		west.hansedConfig("  x509Life: 60s\n"+identity, "")
		west.startHansed()
		m.eventually("west's hansed is ready", func() error { return ready(west.ip(1) + ":7440") })
	}
	restart(fmt.Sprintf("  rootLife: 2h\n  upstream: {spire: {server: \"%s:%s\", workloadAPI: \"unix://%s\"}}\n", host, port, west.agentSock))
	restsOn := func(w string, host int, length int) {
		t.Helper()
		m.eventually(fmt.Sprintf("%s of west presents %d certificates below SPIRE's root", w, length), func() error {
			chain, err := presented(west.ip(host) + ":15008")
			if err == nil && (len(chain) != length || fmt.Sprintf("%x", chain[length-1].AuthorityKeyId) != root) {
				err = fmt.Errorf("%d, by %x", len(chain), chain[len(chain)-1].AuthorityKeyId)
			}
			return err
		})
	}
	m.eventually("hansed signs below SPIRE", func() error {
		if chain, err := ours.minted("spiffe://" + west.td + "/x"); err != nil || len(chain) != 2 {
			return fmt.Errorf("a chain of %d: %w", len(chain), err)
		}
		return nil
	})
	ours.run("localauthority x509 taint -authorityID "+old, old) // agents renew now, not when what they have ends
	restsOn("pay", 3, 2)
	m.eventually("nothing rests on the old root", func() error {
		_, err := ours.try("localauthority", "x509", "revoke", "-authorityID", old)
		return err
	})
	east.authoritiesAre(west.td, 1)
	ld.none(m, "SPIRE set above")

	// hansed on SPIRE. What it signed before is good until it ends.
	restart(west.onSPIRE("unix://"+west.spireAPI, west.ownEntry()))
	west.entries("pay", 1)
	west.green()
	if chain, err := presented(west.ip(1) + ":7445"); err != nil || len(chain) != 1 || fmt.Sprintf("%x", chain[0].AuthorityKeyId) != root {
		t.Errorf("the control plane's SVID is not SPIRE's: %v", err)
	}
	if _, err := ours.try("healthcheck"); err == nil {
		t.Error("hansed still serves as an authority")
	}
	ld.none(m, "on SPIRE")
	ld.stop()

	// The sidecars move. Whichever has moved, they and east's accept each other.
	west.kind = realSPIRE
	for i, w := range []string{"pay", "frontend"} {
		west.stop[w]()
		west.sidecar(w)
		m.eventually(w+" is ready", func() error { return ready(west.ip(3-i) + ":15020") })
		if w == "pay" {
			restsOn(w, 3, 1)
		}
		ld := m.load()
		m.eventually("calls both ways", func() error {
			if n := ld.ok.Load(); n < 100 {
				return fmt.Errorf("%d", n)
			}
			return nil
		})
		ld.stop()
		ld.none(m, w+" has moved")
	}

	// West announces, by SPIRE, and all have it.
	next := m.find(west.spire("localauthority x509 prepare"), `Authority ID: (\S+)`)
	east.authoritiesAre(west.td, 2)
	west.acknowledged()
	west.spire("localauthority x509 activate -authorityID " + next)
	west.green()
}
