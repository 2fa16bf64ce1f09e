package spire

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// minted is what an authority signs for the spire-server CLI.
func (l *lab) minted(id string) ([]*x509.Certificate, error) {
	out, err := l.try("x509", "mint", "-spiffeID", id, "-ttl", "60s")
	if err != nil {
		return nil, err
	}
	svid, _, ok := strings.Cut(out, "Private key:")
	if !ok {
		return nil, fmt.Errorf("x509 mint: %s", out)
	}
	var chain []*x509.Certificate
	for rest := []byte(svid); ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return chain, nil
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		chain = append(chain, c)
	}
}

// renewed waits until a workload of the upstream's agent has an SVID of that authority.
func (m *mesh) renewed(app *workloadapi.X509Source, authority string) {
	m.t.Helper()
	m.eventually("the upstream's agent has renewed", func() error {
		svid, err := app.GetX509SVID()
		if err == nil && authorityOf(svid) != authority {
			err = errors.New("its workload has an SVID of the tainted root")
		}
		return err
	})
}

// TestDownstream: hansed below a real spire-server of the same trust domain. Workloads of the upstream's own, stock agent verify what hansed
// signs, X.509 and JWT, while the upstream rotates, is away, and revokes. Its parts are rows of docs/spire.md.
func TestDownstream(t *testing.T) {
	t.Parallel()
	m := newMesh(t, map[string]kind{"west": realSPIRE}, "west")
	c := m.members[0]
	c.program("hansed", "hansed")
	c.agentSock = c.dir + "/w.sock"
	c.startSPIRE()
	spire := *m.lab
	spire.socket = c.spireAPI
	host, port := c.serverAddress()
	c.agent = c.spireAgent("spire-agent", c.agentSock, host, port)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c.spire(fmt.Sprintf("entry create -downstream -parentID spiffe://%s/node -spiffeID spiffe://%s/west/hansed -selector unix:path:%s/hansed", c.td, c.td, c.dir), "Entry ID")
	c.spire(fmt.Sprintf("entry create -parentID spiffe://%s/node -spiffeID spiffe://%s/upstream/app -selector unix:path:%s", c.td, c.td, self), "Entry ID")

	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	addr := workloadapi.WithClientOptions(workloadapi.WithAddr("unix://" + c.agentSock))
	var app *workloadapi.X509Source
	m.eventually("the upstream's workload has its SVID", func() error {
		short, cancel := context.WithTimeout(ctx, 15*time.Second)
		defer cancel()
		var err error
		app, err = workloadapi.NewX509Source(short, addr)
		return err
	})
	defer app.Close()

	c.hansedConfig(fmt.Sprintf("  x509Life: 20m\n  rootLife: 12h\n  upstream: {spire: {server: \"%s:%s\", workloadAPI: \"unix://%s\"}}\n", host, port, c.agentSock), "")
	c.startHansed()
	m.eventually("hansed is ready", func() error { return ready(c.ip(1) + ":7440") })
	hansed := *m.lab
	hansed.socket = c.dir + "/d/spire-server/api.sock"

	// accepted says whether a workload of the upstream takes what hansed signs now, and which root of the upstream it rests on.
	accepted := func() (root *x509.Certificate, err error) {
		chain, err := hansed.minted("spiffe://" + c.td + "/ns/shop/sa/pay")
		if err != nil {
			return nil, err
		}
		if len(chain) != 2 {
			return nil, fmt.Errorf("a chain of %d certificates, want a leaf and hansed's CA", len(chain))
		}
		_, paths, err := x509svid.Verify(chain, app)
		if err != nil {
			return nil, err
		}
		return paths[0][len(paths[0])-1], nil
	}
	m.eventually("the upstream's workload accepts hansed's SVIDs", func() error { _, err := accepted(); return err })

	bundle := func() (x509Keys, jwtKeys int, err error) {
		out, err := hansed.try("bundle", "show", "-format", "spiffe")
		if err != nil {
			return 0, 0, err
		}
		return countKeys(out)
	}
	m.eventually("hansed's bundle is the upstream's root, and the JWT keys of both", func() error {
		x, j, err := bundle()
		if err == nil && (x != 1 || j != 2) {
			err = fmt.Errorf("%d X.509 and %d JWT authorities", x, j)
		}
		return err
	})
	token := strings.TrimSpace(hansed.run("jwt mint -spiffeID spiffe://" + c.td + "/ns/shop/sa/pay -audience app"))
	m.eventually("the upstream's workload accepts hansed's JWT-SVIDs", func() error {
		short, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		_, err := workloadapi.ValidateJWTSVID(short, token, "app", workloadapi.WithAddr("unix://"+c.agentSock))
		return err
	})

	c.kind = ownAgents
	c.program("frontend", "hanse-proxy")
	c.program("pay", "hanse-proxy")
	c.must("", "apply", "-f", c.save("mesh.yaml", fmt.Sprintf(services, c.name, c.ip(2), c.ip(3))))
	c.sidecars()
	m.eventually("a sidecar is ready", func() error { return ready(c.ip(3) + ":15020") })
	before := spire.find(c.spire("localauthority x509 show"), `Active X\.509 authority:\s+Authority ID: (\S+)`)
	next := spire.find(c.spire("localauthority x509 prepare"), `Authority ID: (\S+)`)
	m.eventually("hansed has the prepared root", func() error {
		x, _, err := bundle()
		if err == nil && x != 2 {
			err = fmt.Errorf("%d X.509 authorities", x)
		}
		return err
	})
	c.spire("localauthority x509 activate -authorityID "+next, next)
	c.spire("localauthority x509 taint -authorityID "+before, before)
	m.eventually("hansed's CA rests on the new root", func() error {
		root, err := accepted()
		if err == nil && fmt.Sprintf("%x", root.SubjectKeyId) != next {
			err = fmt.Errorf("it rests on %x, want %s", root.SubjectKeyId, next)
		}
		return err
	})
	m.eventually("the upstream's agent has renewed", func() error {
		svid, err := app.GetX509SVID()
		if err == nil && authorityOf(svid) != next {
			err = errors.New("its workload has an SVID of the tainted root")
		}
		return err
	})
	// restsOn waits until a workload of ours presents what rests on a root.
	restsOn := func(root string) {
		t.Helper()
		m.eventually("our workload has renewed", func() error {
			chain, err := presented(c.ip(3) + ":15008")
			if err == nil && fmt.Sprintf("%x", chain[len(chain)-1].AuthorityKeyId) != root {
				err = errors.New("it presents an SVID below the tainted root")
			}
			return err
		})
	}
	restsOn(next)
	c.spire("localauthority x509 revoke -authorityID "+before, before)
	m.eventually("the revoked root has left hansed's bundle", func() error {
		x, _, err := bundle()
		if err == nil && x != 1 {
			err = fmt.Errorf("%d X.509 authorities", x)
		}
		return err
	})
	if _, err := accepted(); err != nil {
		t.Errorf("after all: %v", err)
	}
	if out, err := c.hanse("", "status", "-o", "json"); err != nil || !strings.Contains(out, "upstream authority") {
		t.Errorf("status: %v %s", err, out)
	}

	t.Run("root revoked without a successor", func(*testing.T) {
		before, next, paused := next, "", time.Now()
		_ = c.hansed.Process.Signal(syscall.SIGSTOP) // it sees the end only
		next = spire.find(c.spire("localauthority x509 prepare"), `Authority ID: (\S+)`)
		m.eventually("the upstream's agent has the prepared root", func() error {
			b, err := app.GetX509BundleForTrustDomain(spiffeid.RequireTrustDomainFromString(c.td))
			if err == nil && !slices.ContainsFunc(b.X509Authorities(), func(r *x509.Certificate) bool { return fmt.Sprintf("%x", r.SubjectKeyId) == next }) {
				err = errors.New("not yet")
			}
			return err
		})
		c.spire("localauthority x509 activate -authorityID "+next, next)
		c.spire("localauthority x509 taint -authorityID "+before, before)
		m.renewed(app, next)
		c.spire("localauthority x509 revoke -authorityID "+before, before)
		t.Logf("SPIRE had revoked its root after %s", time.Since(paused).Round(100*time.Millisecond))
		began := time.Now()
		_ = c.hansed.Process.Signal(syscall.SIGCONT)
		m.eventually("hansed's CA rests on the new root", func() error {
			root, err := accepted()
			if err == nil && fmt.Sprintf("%x", root.SubjectKeyId) != next {
				err = fmt.Errorf("it rests on %x, want %s", root.SubjectKeyId, next)
			}
			return err
		})
		t.Logf("another CA signed after %s", time.Since(began).Round(100*time.Millisecond))
		// An agent whose own SVID rested on that root is nobody now, and knows no root of hansed's: with a trust bundle and a token of now it attests
		// anew by itself.
		c.save("bundle.json", c.must("", "trust", "show", c.td, "-o", "bundle"))
		for _, w := range []string{"frontend", "pay"} {
			c.save(w+".token", c.must("", "token", "create", "--agent", "shop/"+w))
		}
		restsOn(next)
		t.Logf("agents had attested anew after %s", time.Since(began).Round(100*time.Millisecond))
		c.green()
	})
	t.Run("SPIRE away", func(*testing.T) {
		c.stopServer()
		c.red("upstream authority", "the last good state stays in force")
		if _, err := accepted(); err != nil {
			t.Errorf("the present CA signs on: %v", err)
		}
		c.hansed.stop()
		c.startHansed()
		m.eventually("hansed starts without it", func() error { _, err := accepted(); return err })
		c.startServer()
		c.green()
	})
}
