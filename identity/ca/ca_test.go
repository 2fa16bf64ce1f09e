package ca_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/identity/ca"
)

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

func open(t testing.TB, cfg ca.Config) *ca.Authority {
	t.Helper()
	if cfg.Dir == "" {
		cfg.Dir = t.TempDir()
	}
	cfg.TrustDomain = west
	a, err := ca.Open(cfg)
	check(t, err)
	return a
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(t, err)
	return key
}

// run runs the authority until the test ends or the returned function is called.
func run(t *testing.T, a *ca.Authority) context.CancelFunc {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	end := func() {
		cancel()
		if err, ok := <-done; ok {
			close(done)
			check(t, err)
		}
	}
	t.Cleanup(end)
	return end
}

// X509-SVID §2 to §4 and appendix A.
func TestX509Profile(t *testing.T) {
	now := time.Now()
	a := open(t, ca.Config{Now: func() time.Time { return now }})
	chain, err := a.SignX509(t.Context(), ca.X509Params{ID: frontend, PublicKey: newKey(t).Public(), DNSNames: []string{"frontend.shop"}})
	check(t, err)
	leaf := chain[0]
	if len(leaf.URIs) != 1 || leaf.URIs[0].String() != frontend.String() {
		t.Errorf("URI SANs %v", leaf.URIs)
	}
	if leaf.IsCA || !leaf.BasicConstraintsValid || leaf.KeyUsage != x509.KeyUsageDigitalSignature {
		t.Errorf("CA %v, key usage %b", leaf.IsCA, leaf.KeyUsage)
	}
	if len(leaf.ExtKeyUsage) != 2 || len(leaf.DNSNames) != 1 || leaf.SerialNumber.Sign() <= 0 {
		t.Errorf("extended key usage %v, DNS names %v, serial %v", leaf.ExtKeyUsage, leaf.DNSNames, leaf.SerialNumber)
	}
	for _, ext := range leaf.Extensions {
		if ext.Id.String() == "2.5.29.15" && !ext.Critical {
			t.Error("key usage is not critical")
		}
	}
	if want := now.Add(time.Hour).Truncate(time.Second); !leaf.NotAfter.Equal(want) {
		t.Errorf("ends %v, want %v", leaf.NotAfter, want)
	}
	if back := now.Sub(leaf.NotBefore); back < 15*time.Minute || back > 15*time.Minute+time.Second {
		t.Errorf("begins %v back", back)
	}
	if id, _, err := x509svid.Verify(chain, a.Bundle()); err != nil || id != frontend {
		t.Errorf("verifies as %v, %v", id, err)
	}

	roots := a.Bundle().X509Authorities()
	if len(roots) != 1 {
		t.Fatalf("%d roots", len(roots))
	}
	root := roots[0]
	if !root.IsCA || root.KeyUsage&x509.KeyUsageCertSign == 0 || len(root.URIs) != 1 || root.URIs[0].String() != "spiffe://west.demo" {
		t.Errorf("root: CA %v, key usage %b, URIs %v", root.IsCA, root.KeyUsage, root.URIs)
	}
	if _, ok := root.PublicKey.(*ecdsa.PublicKey); !ok || len(root.SubjectKeyId) == 0 || !bytes.Equal(leaf.AuthorityKeyId, root.SubjectKeyId) {
		t.Errorf("root key %T, subject key ID %x, leaf's authority key ID %x", root.PublicKey, root.SubjectKeyId, leaf.AuthorityKeyId)
	}
}

func TestRefusesIDs(t *testing.T) {
	a := open(t, ca.Config{})
	for _, id := range []string{"spiffe://east.demo/ns/shop/sa/frontend", "spiffe://west.demo"} {
		if _, err := a.SignX509(t.Context(), ca.X509Params{ID: spiffeid.RequireFromString(id), PublicKey: newKey(t).Public()}); err == nil {
			t.Errorf("signs an X509-SVID for %s", id)
		}
		if _, err := a.SignJWT(t.Context(), spiffeid.RequireFromString(id), []string{"x"}, 0); err == nil {
			t.Errorf("signs a JWT-SVID for %s", id)
		}
	}
	if _, err := a.SignX509(t.Context(), ca.X509Params{PublicKey: newKey(t).Public()}); err == nil {
		t.Error("signs for no ID")
	}
	if _, err := a.SignJWT(t.Context(), frontend, nil, 0); err == nil {
		t.Error("signs a JWT-SVID without audience")
	}
}

func TestNothingOutlivesItsRoot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := open(t, ca.Config{RootLife: 10 * time.Second})
		root := a.Bundle().X509Authorities()[0]
		svid, err := a.NewSVID(frontend, time.Hour)
		check(t, err)
		if end := svid.Certificates[0].NotAfter; end.After(root.NotAfter) {
			t.Errorf("X509-SVID ends %v, its root %v", end, root.NotAfter)
		}
		token, err := a.SignJWT(t.Context(), frontend, []string{"x"}, time.Hour)
		check(t, err)
		if token.Expires.After(root.NotAfter) {
			t.Errorf("JWT-SVID ends %v, its root %v", token.Expires, root.NotAfter)
		}
		time.Sleep(11 * time.Second) // and Run does not run
		if _, err := a.NewSVID(frontend, time.Hour); !errors.Is(err, ca.ErrExpired) {
			t.Errorf("signing with an expired root: %v", err)
		}
	})
}

func TestJWT(t *testing.T) {
	a := open(t, ca.Config{})
	j, err := a.SignJWT(t.Context(), frontend, []string{"payments", "ledger"}, 0)
	check(t, err)
	svid, err := jwtsvid.ParseAndValidate(j.Token, a.Bundle(), []string{"ledger"})
	check(t, err)
	if svid.ID != frontend || len(svid.Audience) != 2 || time.Until(svid.Expiry) > 5*time.Minute || time.Until(svid.Expiry) < 4*time.Minute {
		t.Errorf("%v for %v until %v", svid.ID, svid.Audience, svid.Expiry)
	}
	if _, err := jwtsvid.ParseAndValidate(j.Token, a.Bundle(), []string{"other"}); err == nil {
		t.Error("validates for another audience")
	}
	if _, err := jwtsvid.ParseAndValidate(j.Token, open(t, ca.Config{}).Bundle(), []string{"ledger"}); err == nil {
		t.Error("validates by another authority")
	}
	var out strings.Builder
	slog.New(slog.NewTextHandler(&out, nil)).Info("x", "svid", j)
	if strings.Contains(out.String(), j.Token) {
		t.Error("the token is logged")
	}
}

func TestReopen(t *testing.T) {
	dir := t.TempDir()
	a := open(t, ca.Config{Dir: dir})
	svid, err := a.NewSVID(frontend, 0)
	check(t, err)
	check(t, a.Prepare())
	b := open(t, ca.Config{Dir: dir})
	if !a.Bundle().Equal(b.Bundle()) {
		t.Error("the bundle differs after a restart")
	}
	if _, _, err := x509svid.Verify(svid.Certificates, b.Bundle()); err != nil {
		t.Error(err)
	}
	info, err := os.Stat(filepath.Join(dir, "authority.json"))
	check(t, err)
	if info.Mode().Perm() != 0o600 {
		t.Errorf("authority.json has mode %04o", info.Mode().Perm())
	}
	entries, err := os.ReadDir(dir)
	check(t, err)
	if len(entries) != 1 {
		t.Errorf("files left: %v", entries)
	}
}

func TestDamagedFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "authority.json")
	open(t, ca.Config{Dir: dir})
	good, err := os.ReadFile(path)
	check(t, err)
	other := t.TempDir()
	_, err = ca.Open(ca.Config{Dir: other, TrustDomain: spiffeid.RequireTrustDomainFromString("east.demo")})
	check(t, err)
	foreign, err := os.ReadFile(filepath.Join(other, "authority.json"))
	check(t, err)
	for name, data := range map[string][]byte{
		"empty":                nil,
		"truncated":            good[:len(good)/2],
		"noise":                []byte("\x00\x01\x02"),
		"unknown field":        bytes.Replace(good, []byte(`"version"`), []byte(`"vision"`), 1),
		"another version":      bytes.Replace(good, []byte(`"version": 1`), []byte(`"version": 2`), 1),
		"no root":              []byte(`{"version":1,"trust_domain":"west.demo","sequence":1,"roots":[]}`),
		"another trust domain": foreign,
		"a renamed domain":     bytes.Replace(foreign, []byte(`"east.demo"`), []byte(`"west.demo"`), 1),
		"a flipped key":        bytes.Replace(good, []byte(`"key": "`), []byte(`"key": "AAAA`), 1),
		"too large":            bytes.Repeat([]byte(" "), 2<<20),
	} {
		t.Run(name, func(t *testing.T) {
			check(t, os.WriteFile(path, data, 0o600))
			_, err := ca.Open(ca.Config{Dir: dir, TrustDomain: west})
			if err == nil || !strings.Contains(err.Error(), path) {
				t.Errorf("error %v does not name %s", err, path)
			}
			if after, err := os.ReadFile(path); err != nil || !bytes.Equal(after, data) {
				t.Error("the damaged file was changed")
			}
		})
	}
	t.Run("readable by others", func(t *testing.T) {
		check(t, os.WriteFile(path, good, 0o600))
		check(t, os.Chmod(path, 0o640))
		if _, err := ca.Open(ca.Config{Dir: dir, TrustDomain: west}); err == nil || !strings.Contains(err.Error(), "chmod 600") {
			t.Errorf("error: %v", err)
		}
	})
}

func TestClock(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	cfg := ca.Config{Dir: t.TempDir(), Now: func() time.Time { return now }}
	first := open(t, cfg)
	t.Run("far behind", func(t *testing.T) {
		now := now.Add(-time.Hour)
		_, err := ca.Open(ca.Config{Dir: cfg.Dir, TrustDomain: west, Now: func() time.Time { return now }})
		if !errors.Is(err, ca.ErrClock) || !strings.Contains(err.Error(), "correct the clock") {
			t.Errorf("error: %v", err)
		}
	})
	t.Run("a little behind", func(t *testing.T) {
		now := now.Add(-10 * time.Minute)
		b := open(t, ca.Config{Dir: cfg.Dir, Now: func() time.Time { return now }})
		svid, err := b.NewSVID(frontend, 0)
		check(t, err)
		if leaf := svid.Certificates[0]; leaf.NotBefore.Before(b.Bundle().X509Authorities()[0].NotBefore) {
			t.Errorf("begins %v, before its root", leaf.NotBefore)
		}
	})
	t.Run("expired", func(t *testing.T) {
		now = now.Add(8 * 24 * time.Hour)
		var log bytes.Buffer
		cfg.Log = slog.New(slog.NewTextHandler(&log, nil))
		b := open(t, cfg)
		if _, err := b.NewSVID(frontend, 0); err != nil {
			t.Error(err)
		}
		if !strings.Contains(log.String(), "root expired") || !strings.Contains(log.String(), "level=ERROR") {
			t.Errorf("no alarm: %s", &log)
		}
		if b.Sequence() <= first.Sequence() || len(b.Bundle().X509Authorities()) != 1 {
			t.Errorf("sequence %d after %d, %d roots", b.Sequence(), first.Sequence(), len(b.Bundle().X509Authorities()))
		}
	})
}

// A rotation in full: prepared at half life, active once acknowledged, the old root kept while its SVIDs live.
func TestRotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var acked atomic.Bool
		var asked atomic.Uint64
		a := open(t, ca.Config{RootLife: time.Hour, X509Life: 4 * time.Minute, Acked: func(seq uint64) (bool, []string) {
			asked.Store(seq)
			return acked.Load(), []string{"agent"}
		}})
		run(t, a)
		first := a.Bundle().X509Authorities()[0]
		before, err := a.NewSVID(frontend, 0)
		check(t, err)
		if !isFrom(before, first) {
			t.Fatal("at the first start nothing is waited for")
		}

		changed := a.Changed()
		time.Sleep(30*time.Minute - time.Second)
		synctest.Wait()
		if n := len(a.Bundle().X509Authorities()); n != 1 {
			t.Fatalf("%d roots before half life", n)
		}
		time.Sleep(2 * time.Second)
		<-changed
		roots := a.Bundle().X509Authorities()
		if len(roots) != 2 || len(a.Bundle().JWTAuthorities()) != 2 {
			t.Fatalf("%d roots at half life", len(roots))
		}
		next := roots[1]
		time.Sleep(10 * time.Minute)
		during, err := a.NewSVID(frontend, 0)
		check(t, err)
		if !isFrom(during, first) || asked.Load() != a.Sequence() {
			t.Errorf("signs with the new root before it is acknowledged, or asks for sequence %d of %d", asked.Load(), a.Sequence())
		}
		acked.Store(true)
		time.Sleep(10 * time.Second)
		after, err := a.NewSVID(frontend, 0)
		check(t, err)
		if !isFrom(after, next) {
			t.Error("does not sign with the new root")
		}
		for _, svid := range []*x509svid.SVID{during, after} {
			if _, _, err := x509svid.Verify(svid.Certificates, a.Bundle()); err != nil {
				t.Error(err)
			}
		}
		time.Sleep(time.Until(during.Certificates[0].NotAfter) - time.Second)
		if n := len(a.Bundle().X509Authorities()); n != 2 {
			t.Errorf("%d roots while an SVID of the old one lives", n)
		}
		time.Sleep(10 * time.Minute)
		if n := len(a.Bundle().X509Authorities()); n != 1 {
			t.Errorf("%d roots after everything of the old one expired", n)
		}
	})
}

func isFrom(svid *x509svid.SVID, root *x509.Certificate) bool {
	return svid.Certificates[0].CheckSignatureFrom(root) == nil
}

// Waiting ends when a quarter of the old root's life remains, with an alarm that names who is missing.
func TestRotationUnacknowledged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		reg := prometheus.NewRegistry()
		a := open(t, ca.Config{RootLife: time.Hour, Acked: func(uint64) (bool, []string) { return false, []string{"cluster north"} },
			Log: slog.New(slog.NewTextHandler(&log, nil)), Registerer: reg})
		stop := run(t, a)
		first := a.Bundle().X509Authorities()[0]
		time.Sleep(44 * time.Minute)
		svid, err := a.NewSVID(frontend, 0)
		check(t, err)
		if !isFrom(svid, first) {
			t.Error("went on too early")
		}
		time.Sleep(time.Minute + 10*time.Second)
		if svid, err = a.NewSVID(frontend, 0); err != nil || isFrom(svid, first) {
			t.Errorf("did not go on: %v", err)
		}
		stop()
		if !strings.Contains(log.String(), "cluster north") || !strings.Contains(log.String(), "level=ERROR") {
			t.Errorf("no alarm: %s", &log)
		}
		families, err := reg.Gather()
		check(t, err)
		for _, f := range families {
			if f.GetName() == "hanse_ca_unacknowledged_activations_total" && f.GetMetric()[0].GetCounter().GetValue() == 1 {
				return
			}
		}
		t.Error("the metric does not count it")
	})
}

func TestJoiningReplica(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var acked atomic.Bool
		a := open(t, ca.Config{Join: true, Acked: func(uint64) (bool, []string) { return acked.Load(), nil }})
		run(t, a)
		time.Sleep(time.Minute)
		if _, err := a.NewSVID(frontend, 0); !errors.Is(err, ca.ErrNotActive) {
			t.Errorf("signs before its root is acknowledged: %v", err)
		}
		if len(a.Bundle().X509Authorities()) != 1 {
			t.Error("does not publish its root")
		}
		acked.Store(true)
		time.Sleep(10 * time.Second)
		if _, err := a.NewSVID(frontend, 0); err != nil {
			t.Error(err)
		}
	})
}

// peer is another replica.
type peer struct {
	ca.Peers
	away atomic.Bool
}

func (p *peer) Signing() bool { return !p.away.Load() }

// A joining replica whose root somebody does not acknowledge lets the others sign for as long as they are there, with a fresh root when half of
// its life is over, and signs when they are gone.
func TestJoiningReplicaUnacknowledged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var one peer
		a := open(t, ca.Config{Join: true, Peers: &one, Acked: func(uint64) (bool, []string) { return false, []string{"agent x"} }})
		run(t, a)
		first := a.Roots()
		if until := first[0].Created.Add(84 * time.Hour); !a.Deadline().Equal(until) {
			t.Errorf("waits until %v, want %v", a.Deadline(), until)
		}
		time.Sleep(83 * time.Hour)
		if a.Signs() {
			t.Error("it signs though somebody would refuse that, and another replica is there")
		}
		time.Sleep(2 * time.Hour)
		second := a.Roots()
		if a.Signs() || len(second) != 1 || second[0].KeyID == first[0].KeyID {
			t.Errorf("after half of the root's life: %+v", second)
		}
		time.Sleep(50 * time.Hour)
		if a.Signs() {
			t.Error("it signs though another replica is there")
		}
		one.away.Store(true)
		time.Sleep(10 * time.Second)
		if !a.Signs() {
			t.Error("nobody signs")
		}
	})
}

// Many rotations leave three roots at most, and the sequence only grows.
func TestManyRotations(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := open(t, ca.Config{RootLife: 20 * time.Second, X509Life: 2 * time.Second, Acked: func(uint64) (bool, []string) { return true, nil }})
		run(t, a)
		src := identity.NewSource()
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- a.RunSVID(ctx, frontend, 0, src) }()
		last := uint64(0)
		for range 120 {
			time.Sleep(700 * time.Millisecond)
			svid, err := src.GetX509SVID()
			check(t, err)
			if _, _, err := x509svid.Verify(svid.Certificates, a.Bundle()); err != nil {
				t.Fatal(err)
			}
			if seq := a.Sequence(); seq < last {
				t.Fatalf("sequence %d after %d", seq, last)
			} else {
				last = seq
			}
			if n := len(a.Bundle().X509Authorities()); n > 3 {
				t.Fatalf("%d roots", n)
			}
		}
		cancel()
		check(t, <-done)
	})
}

// A disk that takes no more writes stops rotation, with the last good state in force, and not signing.
func TestFullDisk(t *testing.T) {
	dir := t.TempDir()
	a := open(t, ca.Config{Dir: dir})
	before := a.Bundle()
	var old syscall.Rlimit
	check(t, syscall.Getrlimit(syscall.RLIMIT_FSIZE, &old))
	signal.Ignore(syscall.SIGXFSZ) // the limit then shows as EFBIG
	defer signal.Reset(syscall.SIGXFSZ)
	check(t, syscall.Setrlimit(syscall.RLIMIT_FSIZE, &syscall.Rlimit{Cur: 10, Max: old.Max}))
	err := a.Prepare()
	_, signErr := a.NewSVID(frontend, 0)
	check(t, syscall.Setrlimit(syscall.RLIMIT_FSIZE, &old))
	if err == nil || !strings.Contains(err.Error(), "authority.json") {
		t.Errorf("error %v does not name the file", err)
	}
	if signErr != nil {
		t.Errorf("cannot sign: %v", signErr)
	}
	if !a.Bundle().Equal(before) {
		t.Error("the bundle changed although it could not be kept")
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("files left: %v, %v", entries, err)
	}
	if !open(t, ca.Config{Dir: dir}).Bundle().Equal(before) {
		t.Error("the file changed")
	}
}

func BenchmarkSignX509(b *testing.B) {
	key := newKey(b).Public()
	signings(b, func(a *ca.Authority) error {
		_, err := a.SignX509(context.Background(), ca.X509Params{ID: frontend, PublicKey: key})
		return err
	})
}

func BenchmarkSignJWT(b *testing.B) {
	signings(b, func(a *ca.Authority) error {
		_, err := a.SignJWT(context.Background(), frontend, []string{"payments"}, 0)
		return err
	})
}

// signings counts what one CPU signs in a second, by curve.
func signings(b *testing.B, sign func(*ca.Authority) error) {
	for _, curve := range []elliptic.Curve{elliptic.P256(), elliptic.P384()} {
		b.Run(curve.Params().Name, func(b *testing.B) {
			a := open(b, ca.Config{Curve: curve})
			b.ReportAllocs()
			start := cpu(b)
			for b.Loop() {
				if err := sign(a); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.N)/(cpu(b)-start).Seconds(), "signings/cpu-s")
		})
	}
}

// cpu is the processor time that this process has used.
func cpu(b *testing.B) time.Duration {
	b.Helper()
	var u syscall.Rusage
	check(b, syscall.Getrusage(syscall.RUSAGE_SELF, &u))
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
