package upstream_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/identity/ca"
	"github.com/hanse-mesh/hanse/identity/upstream"
)

// TestMain runs the tests on one processor: see identity/agent.
func TestMain(m *testing.M) {
	runtime.GOMAXPROCS(1)
	os.Exit(m.Run())
}

var (
	west     = spiffeid.RequireTrustDomainFromString("west.demo")
	frontend = spiffeid.RequireFromString("spiffe://west.demo/ns/shop/sa/frontend")
)

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// authority is a CA as cert-manager or a person makes it: without SPIFFE ID.
type authority struct {
	cert *x509.Certificate
	key  crypto.Signer
}

func newCA(t testing.TB, name string, parent *authority, life time.Duration, edit func(*x509.Certificate)) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(t, err)
	return caOf(t, name, parent, life, key, edit)
}

func caOf(t testing.TB, name string, parent *authority, life time.Duration, key crypto.Signer, edit func(*x509.Certificate)) *authority {
	t.Helper()
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	check(t, err)
	c := &x509.Certificate{SerialNumber: serial, Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(life),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	if edit != nil {
		edit(c)
	}
	a := &authority{key: key}
	up, signer := c, key
	if parent != nil {
		up, signer = parent.cert, parent.key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, up, key.Public(), signer)
	check(t, err)
	a.cert, err = x509.ParseCertificate(der)
	check(t, err)
	return a
}

func (a *authority) pem() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw})
}

func (a *authority) keyPEM(t testing.TB) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(a.key)
	check(t, err)
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

// save writes what cert-manager writes: by a link that is moved, as Kubernetes updates a volume.
func save(t testing.TB, dir string, signer *authority, chain []byte, roots ...*authority) {
	t.Helper()
	data, err := os.MkdirTemp(dir, "..")
	check(t, err)
	var cas []byte
	for _, r := range roots {
		cas = append(cas, r.pem()...)
	}
	for name, b := range map[string][]byte{"tls.crt": append(signer.pem(), chain...), "tls.key": signer.keyPEM(t), "ca.crt": cas} {
		check(t, os.WriteFile(filepath.Join(data, name), b, 0o600))
		if _, err := os.Lstat(filepath.Join(dir, name)); err != nil {
			check(t, os.Symlink("..data/"+name, filepath.Join(dir, name)))
		}
	}
	check(t, os.Symlink(data, filepath.Join(dir, "..new")))
	check(t, os.Rename(filepath.Join(dir, "..new"), filepath.Join(dir, "..data")))
}

// open opens an authority below dir, or below nothing.
func open(t *testing.T, state, dir string) (*ca.Authority, *upstream.Files, func()) {
	t.Helper()
	cfg := ca.Config{Dir: state, TrustDomain: west, RootLife: 24 * time.Hour, X509Life: time.Hour, Acked: func(uint64) (bool, []string) { return true, nil }}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 2)
	var f *upstream.Files
	if dir != "" {
		f, _ = upstream.OpenFiles(upstream.FilesConfig{Dir: dir, TrustDomain: west, Interval: time.Minute})
		cfg.Upstream = f
		go func() { done <- f.Run(ctx) }()
	} else {
		done <- nil
	}
	a, err := ca.Open(cfg)
	check(t, err)
	go func() { done <- a.Run(ctx) }()
	return a, f, func() { cancel(); check(t, <-done); check(t, <-done) }
}

// watch signs an SVID every five minutes and wants every one that has not expired to verify by the bundle of now.
type watch struct {
	t     *testing.T
	svids [][]*x509.Certificate
}

func (w *watch) pass(a *ca.Authority, d time.Duration) {
	w.t.Helper()
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(5 * time.Minute) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		check(w.t, err)
		chain, err := a.SignX509(w.t.Context(), ca.X509Params{ID: frontend, PublicKey: key.Public()})
		check(w.t, err)
		w.svids = append(w.svids, chain)
		b := a.Bundle()
		var alive [][]*x509.Certificate
		for _, s := range w.svids {
			if !time.Now().Before(s[0].NotAfter) {
				continue
			}
			alive = append(alive, s)
			if id, err := identity.Verify(s, b, time.Now()); err != nil || id != frontend {
				w.t.Fatalf("an SVID with %s left is refused: %v", time.Until(s[0].NotAfter), err)
			}
		}
		w.svids = alive
	}
}

func roots(a *ca.Authority) (names []string) {
	for _, c := range a.Bundle().X509Authorities() {
		names = append(names, c.Subject.CommonName)
	}
	return names
}

func TestFilesRotate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, state := t.TempDir(), t.TempDir()
		first := newCA(t, "first", nil, 30*24*time.Hour, nil)
		save(t, dir, first, nil, first)
		a, f, stop := open(t, state, dir)
		w := &watch{t: t}
		w.pass(a, 2*time.Hour)
		if got := roots(a); len(got) != 1 || got[0] != "first" {
			t.Errorf("roots %q, want the one on disk", got)
		}
		if c := w.svids[0]; len(c) != 2 || c[1].URIs[0].String() != "spiffe://west.demo" || c[1].CheckSignatureFrom(first.cert) != nil {
			t.Errorf("an SVID's chain of %d does not lead to the CA on disk by one of ours", len(c))
		}

		// Half a change is no change.
		second := newCA(t, "second", nil, 30*24*time.Hour, nil)
		save(t, dir, &authority{cert: second.cert, key: first.key}, nil, second)
		w.pass(a, 10*time.Minute)
		if got := roots(a); len(got) != 1 || got[0] != "first" || f.Err() == nil || !strings.Contains(f.Err().Error(), "tls.key is not the key of") {
			t.Errorf("roots %q, error %v", got, f.Err())
		}

		// A new root: known before it is used, and the old one stays while something rests on it.
		save(t, dir, second, nil, second)
		w.pass(a, 15*time.Minute)
		if got := roots(a); len(got) != 2 || f.Err() != nil {
			t.Errorf("roots %q, error %v; want both", got, f.Err())
		}
		if c := w.svids[len(w.svids)-1]; c[1].CheckSignatureFrom(second.cert) != nil {
			t.Error("what is signed now does not rest on the new root")
		}
		w.pass(a, 4*time.Hour)
		if got := roots(a); len(got) != 1 || got[0] != "second" {
			t.Errorf("roots %q; nothing rests on the first any more", got)
		}

		// The same root signs an intermediate anew; a restart changes nothing.
		inter := newCA(t, "intermediate", second, 20*24*time.Hour, nil)
		save(t, dir, inter, nil, second)
		w.pass(a, 2*time.Hour)
		stop()
		a, _, stop = open(t, state, dir)
		w.pass(a, 24*time.Hour)
		if c := w.svids[len(w.svids)-1]; len(c) != 3 || !c[2].Equal(inter.cert) {
			t.Errorf("a chain of %d, want leaf, ours, intermediate", len(c))
		}
		stop()

		// Without an upstream the authority is its own again, and with one no more: nobody notices.
		a, _, stop = open(t, state, "")
		w.pass(a, 6*time.Hour)
		if got := roots(a); len(got) != 1 || got[0] != "west.demo" {
			t.Errorf("roots %q, want an own one", got)
		}
		stop()
		a, _, stop = open(t, state, dir)
		w.pass(a, 6*time.Hour)
		if got := roots(a); len(got) != 1 || got[0] != "second" {
			t.Errorf("roots %q, want the one on disk", got)
		}
		stop()
	})
}

// TestFilesBroken: while the files are broken, and over a restart too, the CA that they signed before signs on, until it expires; its successor
// is made when they are good again.
func TestFilesBroken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, state := t.TempDir(), t.TempDir()
		root := newCA(t, "root", nil, 30*24*time.Hour, nil)
		save(t, dir, root, nil, root)
		a, _, stop := open(t, state, dir)
		w := &watch{t: t}
		w.pass(a, time.Hour)
		signs := func() string { return string(w.svids[len(w.svids)-1][0].AuthorityKeyId) }
		first := signs()
		stop()
		save(t, dir, &authority{cert: root.cert, key: newCA(t, "another", nil, time.Hour, nil).key}, nil, root)
		a, f, stop := open(t, state, dir)
		w.pass(a, 21*time.Hour) // of the 24 of its life
		if signs() != first || f.Err() == nil || !strings.Contains(f.Err().Error(), "tls.key is not the key of") {
			t.Errorf("another CA signs, or error %v", f.Err())
		}
		save(t, dir, root, nil, root)
		w.pass(a, 5*time.Hour)
		if signs() == first || f.Err() != nil {
			t.Errorf("the first CA still signs, error %v", f.Err())
		}
		stop()

		// One that has just been set, and is broken, changes nothing; without any CA there is no start.
		save(t, dir, &authority{cert: root.cert, key: newCA(t, "another", nil, time.Hour, nil).key}, nil, root)
		own := t.TempDir()
		a, _, stop = open(t, own, "")
		w = &watch{t: t}
		w.pass(a, time.Hour)
		stop()
		a, f, stop = open(t, own, dir)
		w.pass(a, time.Hour)
		if got := roots(a); len(got) != 1 || got[0] != "west.demo" || f.Err() == nil {
			t.Errorf("roots %q, error %v", got, f.Err())
		}
		stop()
		if _, err := ca.Open(ca.Config{Dir: t.TempDir(), TrustDomain: west, Upstream: f}); !errors.Is(err, ca.ErrUpstream) || !strings.Contains(err.Error(), "tls.key is not the key of") {
			t.Errorf("a first start: %v", err)
		}
	})
}

func TestFilesAreRefused(t *testing.T) {
	t.Parallel()
	root := newCA(t, "root", nil, time.Hour, nil)
	other := newCA(t, "other", nil, time.Hour, nil)
	weak, err := rsa.GenerateKey(rand.Reader, 1024) //nolint:gosec // on purpose
	if err != nil {
		t.Log("this Go makes no weak keys:", err)
	}
	for _, c := range []struct {
		name   string
		signer *authority
		key    []byte
		roots  []byte
		want   string
	}{
		{"another key", root, other.keyPEM(t), root.pem(), "is not the key of"},
		{"no key", root, nil, root.pem(), "no PEM private key"},
		{"a leaf", newCA(t, "leaf", root, time.Hour, func(c *x509.Certificate) { c.IsCA, c.KeyUsage = false, x509.KeyUsageDigitalSignature }), nil, root.pem(), "isCA: true"},
		{"no CA below", newCA(t, "tight", root, time.Hour, func(c *x509.Certificate) { c.MaxPathLenZero = true }), nil, root.pem(), "path length 0"},
		{"expired", newCA(t, "old", root, -time.Second, nil), nil, root.pem(), "expired"},
		{"another root", newCA(t, "below", root, time.Hour, nil), nil, other.pem(), "does not chain to"},
		{"no root", newCA(t, "below", root, time.Hour, nil), nil, nil, "give the roots in the CA file"},
		{"rubbish", root, nil, []byte("-----BEGIN RUBBISH-----\nAAAA\n-----END RUBBISH-----\n"), `a PEM block "RUBBISH"`},
	} {
		dir := t.TempDir()
		key := c.key
		if key == nil && c.name != "no key" {
			key = c.signer.keyPEM(t)
		}
		check(t, os.WriteFile(filepath.Join(dir, "tls.crt"), c.signer.pem(), 0o600))
		check(t, os.WriteFile(filepath.Join(dir, "tls.key"), key, 0o600))
		check(t, os.WriteFile(filepath.Join(dir, "ca.crt"), c.roots, 0o600))
		if _, err := upstream.OpenFiles(upstream.FilesConfig{Dir: dir, TrustDomain: west}); err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), dir) {
			t.Errorf("%s: %v, want %q and the file", c.name, err, c.want)
		}
	}
	if weak != nil {
		dir := t.TempDir()
		a := caOf(t, "weak", nil, time.Hour, weak, nil)
		save(t, dir, a, nil, a)
		if _, err := upstream.OpenFiles(upstream.FilesConfig{Dir: dir, TrustDomain: west}); err == nil || !strings.Contains(err.Error(), "2048") {
			t.Errorf("a weak key: %v", err)
		}
	}
	// A self-signed CA needs no ca.crt; SEC 1 and PKCS #1 keys are read, too.
	dir := t.TempDir()
	der, err := x509.MarshalECPrivateKey(root.key.(*ecdsa.PrivateKey))
	check(t, err)
	check(t, os.WriteFile(filepath.Join(dir, "c"), root.pem(), 0o600))
	check(t, os.WriteFile(filepath.Join(dir, "k"), append([]byte("-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n"), pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})...), 0o600))
	_, err = upstream.OpenFiles(upstream.FilesConfig{CertFile: filepath.Join(dir, "c"), KeyFile: filepath.Join(dir, "k"), TrustDomain: west})
	check(t, err)
}

func FuzzFiles(f *testing.F) {
	root := newCA(f, "root", nil, time.Hour, nil)
	f.Add(root.pem(), root.keyPEM(f), root.pem())
	f.Add([]byte{}, []byte("-----BEGIN PRIVATE KEY-----"), bytes.Repeat([]byte("-"), 100))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, cert, key, cas []byte) {
		for name, b := range map[string][]byte{"tls.crt": cert, "tls.key": key, "ca.crt": cas} {
			check(t, os.WriteFile(filepath.Join(dir, name), b, 0o600))
		}
		up, err := upstream.OpenFiles(upstream.FilesConfig{Dir: dir, TrustDomain: west})
		if _, ok := up.Trusted(); ok != (err == nil) {
			t.Errorf("error %v, but trusted: %v", err, ok)
		}
	})
}

// TestKeysInMemory: nothing is written, what was is removed, and what another start signs is verified by the bundle of before.
func TestKeysInMemory(t *testing.T) {
	root := caOf(t, "root", nil, 100*24*time.Hour, ecKey(t), nil)
	dir, state := t.TempDir(), t.TempDir()
	save(t, dir, root, nil, root)
	f, err := upstream.OpenFiles(upstream.FilesConfig{Dir: dir, TrustDomain: west})
	check(t, err)
	cfg := ca.Config{Dir: state, TrustDomain: west, Upstream: f}
	start := func() *ca.Authority {
		a, err := ca.Open(cfg)
		check(t, err)
		return a
	}
	sign := func(a *ca.Authority) []*x509.Certificate {
		chain, err := a.SignX509(t.Context(), ca.X509Params{ID: spiffeid.RequireFromPath(west, "/ns/shop/sa/frontend"), PublicKey: ecKey(t).Public()})
		check(t, err)
		return chain
	}
	disk := start()
	before := sign(disk)
	cfg.Memory = true
	first := start()
	if disk.Roots()[0].KeyID != first.Roots()[0].KeyID {
		t.Error("the key of the disk is not used on")
	}
	second := start()
	if first.Roots()[0].KeyID == second.Roots()[0].KeyID {
		t.Error("the key outlived the process")
	}
	if files, err := os.ReadDir(state); err != nil || len(files) > 0 {
		t.Errorf("there is %v on disk: %v", files, err)
	}
	for _, chain := range [][]*x509.Certificate{before, sign(first), sign(second)} {
		for _, a := range []*ca.Authority{disk, first, second} {
			_, err := identity.Verify(chain, a.Bundle(), time.Now())
			check(t, err)
		}
	}
}

func ecKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(t, err)
	return key
}
