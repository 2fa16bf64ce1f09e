package ca_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"

	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/identity/ca"
)

// signs wants SVIDs of both kinds, by keys of a curve, that go-spiffe verifies.
func signs(t *testing.T, a *ca.Authority, curve elliptic.Curve) {
	t.Helper()
	chain, err := a.SignX509(t.Context(), ca.X509Params{ID: frontend, PublicKey: newKey(t).Public()})
	check(t, err)
	bundle := a.Bundle()
	_, err = identity.Verify(chain, bundle, time.Now())
	check(t, err)
	for _, root := range bundle.X509Authorities() {
		if key := root.PublicKey.(*ecdsa.PublicKey); chain[0].CheckSignatureFrom(root) == nil && key.Curve != curve {
			t.Errorf("signed by a key on %s, want %s", key.Params().Name, curve.Params().Name)
		}
	}
	token, err := a.SignJWT(t.Context(), frontend, []string{"db"}, 0)
	check(t, err)
	svid, err := jwtsvid.ParseAndValidate(token.Token, jwtbundle.NewSet(bundle.JWTBundle()), []string{"db"})
	check(t, err)
	if svid.ID != frontend {
		t.Errorf("a token of %s", svid.ID)
	}
}

// TestCurves: keys on P-384 sign as those on P-256 do, and another curve in the configuration is a rotation, in which nothing becomes invalid.
func TestCurves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		cfg := ca.Config{Dir: dir, Acked: func(uint64) (bool, []string) { return true, nil }}
		a := open(t, cfg)
		signs(t, a, elliptic.P256())
		before, err := a.SignX509(t.Context(), ca.X509Params{ID: frontend, PublicKey: newKey(t).Public()})
		check(t, err)

		cfg.Curve = elliptic.P384()
		a = open(t, cfg)
		signs(t, a, elliptic.P256()) // the root of the disk, until another is acknowledged
		end := run(t, a)
		time.Sleep(time.Minute)
		signs(t, a, elliptic.P384())
		_, err = identity.Verify(before, a.Bundle(), time.Now())
		check(t, err)
		end()
		signs(t, open(t, cfg), elliptic.P384())
		own, err := open(t, cfg).NewSVID(frontend, 0)
		check(t, err)
		if key := own.PrivateKey.Public().(*ecdsa.PublicKey); key.Curve != elliptic.P384() {
			t.Errorf("its own SVID's key is on %s", key.Params().Name)
		}
		info, err := os.Stat(filepath.Join(dir, "authority.json"))
		check(t, err)
		if info.Mode().Perm() != 0o600 {
			t.Errorf("the keys have mode %04o", info.Mode().Perm())
		}
	})
}

func TestKeysInMemoryNeedAnUpstream(t *testing.T) {
	_, err := ca.Open(ca.Config{Dir: t.TempDir(), TrustDomain: frontend.TrustDomain(), Memory: true})
	if err == nil || !strings.Contains(err.Error(), "upstream") {
		t.Errorf("opened: %v", err)
	}
}
