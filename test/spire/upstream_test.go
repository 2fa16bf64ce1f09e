package spire

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

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

// TestDownstream: hansed below a real spire-server of the same trust domain. Workloads of the upstream's own, stock agent verify what hansed
// signs, X.509 and JWT, while the upstream rotates.
func TestDownstream(t *testing.T) {
	m := newMesh(t, map[string]kind{"west": realSPIRE}, "west")
	c := m.members[0]
	c.program("hansed", "hansed")
	c.agentSock = c.dir + "/w.sock"
	c.startSPIRE()
	spire := *m.lab
	spire.socket = c.spireAPI
	c.spireAgent(c.serverAddress())
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

	host, port := c.serverAddress()
	c.hansedConfig(fmt.Sprintf("  x509Life: 60s\n  rootLife: 2h\n  upstream: {spire: {server: \"%s:%s\", workloadAPI: \"unix://%s\"}}\n", host, port, c.agentSock), "")
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
		var b struct{ Keys []struct{ Use string } }
		if err == nil {
			err = json.Unmarshal([]byte(out), &b)
		}
		for _, k := range b.Keys {
			if k.Use == "x509-svid" {
				x509Keys++
			} else {
				jwtKeys++
			}
		}
		return x509Keys, jwtKeys, err
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
}
