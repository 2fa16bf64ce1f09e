package upstream

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hanse-mesh/hanse/identity/ca"
)

const (
	maxFile = 1 << 20
	poll    = time.Second
)

// FilesConfig says where a CA is on disk. Either Dir, or CertFile and KeyFile.
type FilesConfig struct {
	Dir      string // with tls.crt, tls.key and ca.crt, as cert-manager writes them
	CertFile string // PEM: the CA certificate, then those between it and the root
	KeyFile  string // PEM: PKCS#8, PKCS#1 or SEC 1
	CAFile   string // PEM: the roots; may be missing where CertFile's certificate is a root itself

	TrustDomain spiffeid.TrustDomain
	Interval    time.Duration // between looks at the files; default 1 s
	Now         func() time.Time
	Log         *slog.Logger
}

// Files is a CA on disk. It is read again when it changes.
type Files struct {
	cfg FilesConfig // read-only
	log *slog.Logger

	mu      sync.Mutex
	sum     [sha256.Size]byte // guarded by mu; of what was read last, good or not
	key     crypto.Signer     // guarded by mu
	chain   []*x509.Certificate
	trusted ca.Trusted
	changed chan struct{}
	err     error // guarded by mu; of the last reading
}

// OpenFiles reads the files. The error says what is wrong with them; the Files can be used all the same, and signs when they are good.
func OpenFiles(cfg FilesConfig) (*Files, error) {
	if cfg.Dir != "" {
		cfg.CertFile, cfg.KeyFile, cfg.CAFile = filepath.Join(cfg.Dir, "tls.crt"), filepath.Join(cfg.Dir, "tls.key"), filepath.Join(cfg.Dir, "ca.crt")
	}
	if cfg.Interval <= 0 {
		cfg.Interval = poll
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	f := &Files{cfg: cfg, log: cfg.Log, changed: make(chan struct{})}
	f.read()
	return f, f.Err()
}

// Run reads the files again when they change, until ctx ends.
func (f *Files) Run(ctx context.Context) error {
	tick := time.NewTicker(f.cfg.Interval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			f.read()
		}
	}
}

// Err says why the files, as they are now, are not in force; nil: they are.
func (f *Files) Err() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err
}

// String names the files, for people.
func (f *Files) String() string { return cmp.Or(f.cfg.Dir, f.cfg.CertFile) }

func (f *Files) read() {
	var parts [3][]byte
	var errs []error
	for i, path := range []string{f.cfg.CertFile, f.cfg.KeyFile, f.cfg.CAFile} {
		if path == "" {
			continue
		}
		b, err := readFile(path)
		if i == 2 && errors.Is(err, os.ErrNotExist) {
			err = nil
		}
		parts[i], errs = b, append(errs, err)
	}
	sum := sha256.Sum256(bytes.Join(parts[:], []byte{0}))
	f.mu.Lock()
	defer f.mu.Unlock()
	err := errors.Join(errs...)
	if err == nil && sum == f.sum {
		return
	}
	var chain []*x509.Certificate
	var key crypto.Signer
	var roots []*x509.Certificate
	if err == nil {
		f.sum = sum
		chain, key, roots, err = f.parse(parts[0], parts[1], parts[2])
	}
	if err != nil {
		if f.err == nil || f.err.Error() != err.Error() {
			f.log.Error("the upstream CA is not read; the last good one stays in force", "err", err)
		}
		f.err, f.sum = err, [sha256.Size]byte{} // three files are not replaced at one moment: read them again
		return
	}
	f.err, f.key, f.chain = nil, key, chain
	f.trusted = ca.Trusted{Bundle: spiffebundle.FromX509Authorities(f.cfg.TrustDomain, roots), Signer: chain[0]}
	close(f.changed)
	f.changed = make(chan struct{})
	f.log.Info("upstream CA read", "file", f.cfg.CertFile, "subject", chain[0].Subject.String(), "expires", chain[0].NotAfter)
}

func readFile(path string) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	b, err := io.ReadAll(io.LimitReader(file, maxFile+1))
	if err == nil && len(b) > maxFile {
		err = errors.New("larger than 1 MiB")
	}
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return b, nil
}

func (f *Files) parse(certs, key, cas []byte) (chain []*x509.Certificate, signer crypto.Signer, roots []*x509.Certificate, err error) {
	if chain, err = certificates(certs); err != nil {
		return nil, nil, nil, fmt.Errorf("%s: %w", f.cfg.CertFile, err)
	}
	if len(chain) == 0 {
		return nil, nil, nil, fmt.Errorf("%s: no PEM certificate", f.cfg.CertFile)
	}
	if signer, err = privateKey(key); err != nil {
		return nil, nil, nil, fmt.Errorf("%s: %w", f.cfg.KeyFile, err)
	}
	c := chain[0]
	pub, ok := c.PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	switch {
	case !ok || !pub.Equal(signer.Public()):
		return nil, nil, nil, fmt.Errorf("%s is not the key of %s", f.cfg.KeyFile, f.cfg.CertFile)
	case !c.IsCA || !c.BasicConstraintsValid || c.KeyUsage&x509.KeyUsageCertSign == 0:
		return nil, nil, nil, fmt.Errorf("%s: certificate %q is not a CA's: with cert-manager, set isCA: true and usages [cert sign]", f.cfg.CertFile, c.Subject)
	case c.MaxPathLen == 0 && c.MaxPathLenZero:
		return nil, nil, nil, fmt.Errorf("%s: certificate %q may sign no CA below it (path length 0), and Hanse needs one", f.cfg.CertFile, c.Subject)
	case !f.cfg.Now().Before(c.NotAfter):
		return nil, nil, nil, fmt.Errorf("%s: certificate %q expired at %s", f.cfg.CertFile, c.Subject, c.NotAfter.UTC().Format(time.RFC3339))
	}
	if roots, err = certificates(cas); err != nil {
		return nil, nil, nil, fmt.Errorf("%s: %w", f.cfg.CAFile, err)
	}
	if len(roots) == 0 {
		roots = chain[len(chain)-1:]
	}
	for _, r := range roots {
		if r.CheckSignatureFrom(r) != nil {
			return nil, nil, nil, fmt.Errorf("%s: certificate %q is no root: give the roots in the CA file (ca.crt)", cmp.Or(f.cfg.CAFile, f.cfg.CertFile), r.Subject)
		}
	}
	o := x509.VerifyOptions{Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(), CurrentTime: f.cfg.Now(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}
	for _, r := range roots {
		o.Roots.AddCert(r)
	}
	for _, x := range chain[1:] {
		o.Intermediates.AddCert(x)
	}
	verified, err := c.Verify(o)
	if err != nil {
		return nil, nil, nil, fmt.Errorf("%s does not chain to %s: %w", f.cfg.CertFile, cmp.Or(f.cfg.CAFile, "a root"), err)
	}
	path := verified[0]
	return path[:max(1, len(path)-1)], signer, roots, nil
}

func certificates(b []byte) ([]*x509.Certificate, error) {
	var out []*x509.Certificate
	for {
		var block *pem.Block
		if block, b = pem.Decode(b); block == nil {
			return out, nil
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("a PEM block %q, want CERTIFICATE", block.Type)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", len(out), err)
		}
		out = append(out, c)
	}
}

func privateKey(b []byte) (crypto.Signer, error) {
	for {
		var block *pem.Block
		if block, b = pem.Decode(b); block == nil {
			return nil, errors.New("no PEM private key")
		}
		var key any
		var err error
		switch block.Type {
		case "PRIVATE KEY":
			key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
		case "EC PRIVATE KEY":
			key, err = x509.ParseECPrivateKey(block.Bytes)
		case "RSA PRIVATE KEY":
			key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
		default:
			continue // EC PARAMETERS
		}
		if err != nil {
			return nil, err
		}
		switch k := key.(type) {
		case *ecdsa.PrivateKey:
			return k, nil
		case *rsa.PrivateKey:
			if k.N.BitLen() < 2048 {
				return nil, fmt.Errorf("an RSA key of %d bits, want 2048 or more", k.N.BitLen())
			}
			return k, nil
		}
		return nil, fmt.Errorf("a key of type %T, want EC or RSA", key)
	}
}

// Sign implements ca.Upstream.
func (f *Files) Sign(_ context.Context, template *x509.Certificate, key crypto.Signer) ([]*x509.Certificate, error) {
	f.mu.Lock()
	chain, signer, trusted, err := f.chain, f.key, f.trusted.Bundle, f.err
	f.mu.Unlock()
	if trusted == nil {
		return nil, err
	}
	all := trusted.X509Authorities()
	t := *template
	if t.NotBefore.Before(chain[0].NotBefore) {
		t.NotBefore = chain[0].NotBefore
	}
	if t.NotAfter.After(chain[0].NotAfter) {
		t.NotAfter = chain[0].NotAfter
	}
	if !f.cfg.Now().Before(t.NotAfter) {
		return nil, fmt.Errorf("%s expired at %s", f.cfg.CertFile, t.NotAfter.UTC().Format(time.RFC3339))
	}
	der, err := x509.CreateCertificate(rand.Reader, &t, chain[0], key.Public(), signer)
	if err != nil {
		return nil, err
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	out := []*x509.Certificate{c}
	for _, x := range chain {
		if !contains(all, x) {
			out = append(out, x)
		}
	}
	return out, nil
}

func contains(all []*x509.Certificate, c *x509.Certificate) bool {
	for _, x := range all {
		if x.Equal(c) {
			return true
		}
	}
	return false
}

// Publish implements ca.Upstream: a CA on disk knows nothing of JWT keys.
func (f *Files) Publish(context.Context, string, crypto.PublicKey, time.Time) error { return nil }

// Trusted implements ca.Upstream.
func (f *Files) Trusted() (ca.Trusted, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.trusted, f.trusted.Bundle != nil
}

// Changed implements ca.Upstream.
func (f *Files) Changed() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.changed
}
