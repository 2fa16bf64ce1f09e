package ca

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hanse-mesh/hanse/identity/atomicfile"
)

// phase is where a root is in its life.
type phase string

const (
	prepared phase = "prepared" // in the bundle, signs nothing yet
	active   phase = "active"   // signs
	old      phase = "old"      // signs no more, in the bundle while something it signed is valid
)

// root is immutable once it is in a state.
type root struct {
	phase       phase
	created     time.Time
	cert        *x509.Certificate
	key         *ecdsa.PrivateKey
	jwtKey      *ecdsa.PrivateKey
	kid         string
	signedUntil time.Time // nothing that it signed ends later
	held        bool      // prepared by a person, who activates it too
	tainted     bool      // old, and agents are to renew what it signed

	// Of a root that an Upstream signed; it is then no root of the bundle, but a CA below one.
	above  []*x509.Certificate // between cert and anchor, lowest first
	anchor *x509.Certificate   // in the bundle; nil: cert itself is
}

// inBundle is the certificate of the bundle that the root rests on.
func (r *root) inBundle() *x509.Certificate {
	if r.anchor != nil {
		return r.anchor
	}
	return r.cert
}

// below is what follows a certificate that the root signed, up to the bundle.
func (r *root) below() []*x509.Certificate {
	if r.anchor == nil {
		return nil
	}
	return append([]*x509.Certificate{r.cert}, r.above...)
}

// LogValue hides the keys.
func (r *root) LogValue() slog.Value {
	return slog.GroupValue(slog.String("phase", string(r.phase)), slog.String("key_id", hex.EncodeToString(r.cert.SubjectKeyId)),
		slog.Time("expires", r.cert.NotAfter))
}

// life is how long the root was made to live, without the backdating.
func (r *root) life() time.Duration { return r.cert.NotAfter.Sub(r.created) }

// state is immutable once stored.
type state struct {
	sequence uint64
	roots    []*root // at most one prepared, at most one active
	added    []Added // by others; not changed in place
	changed  chan struct{}
}

func (s *state) with(p phase) *root {
	for _, r := range s.roots {
		if r.phase == p {
			return r
		}
	}
	return nil
}

func (s *state) bundle(cfg Config) *spiffebundle.Bundle {
	b := spiffebundle.New(cfg.TrustDomain)
	for _, p := range []phase{active, prepared, old} {
		for _, r := range s.roots {
			if r.phase != p {
				continue
			}
			b.AddX509Authority(r.inBundle())
			if err := b.AddJWTAuthority(r.kid, r.jwtKey.Public()); err != nil {
				panic(err) // a key ID is never empty
			}
		}
	}
	for _, d := range s.added {
		if d.Certificate != nil {
			b.AddX509Authority(d.Certificate)
		} else if err := b.AddJWTAuthority(d.JWTKeyID, d.JWTKey); err != nil {
			panic(err) // a key ID is never empty
		}
	}
	b.SetSequenceNumber(s.sequence)
	b.SetRefreshHint(min(5*time.Minute, max(cfg.RootLife/20, time.Second)).Truncate(time.Second))
	return b
}

func newRoot(cfg Config, now time.Time) (*root, error) {
	r := &root{phase: prepared, created: now.UTC()}
	var err error
	if r.key, err = ecdsa.GenerateKey(cfg.Curve, rand.Reader); err != nil {
		return nil, fmt.Errorf("make root key: %w", err)
	}
	if r.jwtKey, err = ecdsa.GenerateKey(cfg.Curve, rand.Reader); err != nil {
		return nil, fmt.Errorf("make JWT key: %w", err)
	}
	template, err := caTemplate(cfg, now, now.Add(cfg.RootLife))
	if err != nil {
		return nil, err
	}
	if cfg.Upstream != nil {
		if r.kid, err = keyID(r.jwtKey); err != nil {
			return nil, err
		}
		return r, r.signedBy(cfg.Upstream, template)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, r.key.Public(), r.key)
	if err != nil {
		return nil, fmt.Errorf("make root: %w", err)
	}
	if r.cert, err = x509.ParseCertificate(der); err != nil {
		return nil, fmt.Errorf("make root: %w", err)
	}
	if r.kid, err = keyID(r.jwtKey); err != nil {
		return nil, err
	}
	return r, nil
}

// caTemplate is a signing certificate (X509-SVID §4): a CA with keyCertSign, whose SPIFFE ID has no path.
func caTemplate(cfg Config, now, notAfter time.Time) (*x509.Certificate, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	subject := pkix.Name{Organization: []string{"Hanse"}, CommonName: cfg.TrustDomain.Name(), SerialNumber: serial.Text(16)}
	if cfg.Replica != "" {
		subject.OrganizationalUnit = []string{cfg.Replica}
	}
	return &x509.Certificate{
		SerialNumber:          serial,
		Subject:               subject,
		NotBefore:             now.Add(-backdate),
		NotAfter:              notAfter,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		URIs:                  []*url.URL{cfg.TrustDomain.ID().URL()},
	}, nil
}

func keyID(key *ecdsa.PrivateKey) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return "", fmt.Errorf("make key ID: %w", err)
	}
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:16]), nil
}

// change makes the next state by f, stores it on disk and then in memory. f reports whether the bundle changes; such a
// change is not made in memory when the disk refuses it.
func (a *Authority) change(f func(next *state) (bundle bool)) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	cur := a.state.Load()
	next := &state{sequence: cur.sequence, roots: slices.Clone(cur.roots), added: cur.added, changed: cur.changed}
	bundle := f(next)
	if bundle {
		next.changed = make(chan struct{})
		next.sequence = max(cur.sequence+1, uint64(max(a.cfg.Now().Unix(), 0)))
	}
	var err error
	if !a.cfg.Memory {
		err = store(a.path, a.cfg.TrustDomain, next)
	}
	if err == nil || !bundle {
		a.state.Store(next)
	}
	if err == nil && bundle {
		close(cur.changed)
	}
	return err
}

// The file. Version 1.
type fileState struct {
	Version     int        `json:"version"`
	TrustDomain string     `json:"trust_domain"`
	Sequence    uint64     `json:"sequence"`
	Roots       []fileRoot `json:"roots"`

	Added []fileAdded `json:"added,omitempty"`
}

type fileRoot struct {
	Phase       phase     `json:"phase"`
	Created     time.Time `json:"created"`
	SignedUntil time.Time `json:"signed_until"`
	Held        bool      `json:"held,omitempty"`
	Tainted     bool      `json:"tainted,omitempty"`
	Certificate []byte    `json:"certificate"` // DER
	Key         []byte    `json:"key"`         // PKCS#8
	JWTKey      []byte    `json:"jwt_key"`     // PKCS#8
	Above       [][]byte  `json:"above,omitempty"`
	Anchor      []byte    `json:"anchor,omitempty"`
}

const maxFile = 1 << 20

func store(path string, td spiffeid.TrustDomain, s *state) error {
	f := fileState{Version: 1, TrustDomain: td.Name(), Sequence: s.sequence}
	for _, r := range s.roots {
		key, err := x509.MarshalPKCS8PrivateKey(r.key)
		if err != nil {
			return fmt.Errorf("encode root key: %w", err)
		}
		jwtKey, err := x509.MarshalPKCS8PrivateKey(r.jwtKey)
		if err != nil {
			return fmt.Errorf("encode JWT key: %w", err)
		}
		fr := fileRoot{Phase: r.phase, Created: r.created, SignedUntil: r.signedUntil, Held: r.held, Tainted: r.tainted,
			Certificate: r.cert.Raw, Key: key, JWTKey: jwtKey}
		if r.anchor != nil {
			fr.Anchor = r.anchor.Raw
			for _, c := range r.above {
				fr.Above = append(fr.Above, c.Raw)
			}
		}
		f.Roots = append(f.Roots, fr)
	}
	for _, d := range s.added {
		fa, err := d.encode()
		if err != nil {
			return fmt.Errorf("encode added authority %s: %w", d.KeyID(), err)
		}
		f.Added = append(f.Added, fa)
	}
	data, err := json.MarshalIndent(f, "", "  ")
	if err != nil {
		return fmt.Errorf("encode authority: %w", err)
	}
	return atomicfile.Write(path, data)
}

// load returns an empty state for a missing file.
func load(path string, td spiffeid.TrustDomain) (*state, error) {
	s := &state{changed: make(chan struct{})}
	data, err := atomicfile.Read(path, maxFile)
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err != nil {
		return nil, err
	}
	if err := s.decode(data, td); err != nil {
		return nil, fmt.Errorf("%s is damaged or not ours, and is left as it is; restore it from a backup, or move it away to start with a new root: %w", path, err)
	}
	return s, nil
}

func (s *state) decode(data []byte, td spiffeid.TrustDomain) error {
	var f fileState
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&f); err != nil {
		return err
	}
	switch {
	case f.Version != 1:
		return fmt.Errorf("version %d, want 1", f.Version)
	case f.TrustDomain != td.Name():
		return fmt.Errorf("it is the authority of %q, not of %q", f.TrustDomain, td.Name())
	case len(f.Roots) == 0:
		return errors.New("it has no root")
	}
	s.sequence = f.Sequence
	for i, fr := range f.Roots {
		r, err := fr.decode(td)
		if err != nil {
			return fmt.Errorf("root %d: %w", i, err)
		}
		if r.phase != old && s.with(r.phase) != nil {
			return fmt.Errorf("root %d: a second %s one", i, r.phase)
		}
		s.roots = append(s.roots, r)
	}
	for i, fa := range f.Added {
		d, err := fa.decode()
		if err != nil {
			return fmt.Errorf("added authority %d: %w", i, err)
		}
		s.added = append(s.added, d)
	}
	return nil
}

func (f fileRoot) decode(td spiffeid.TrustDomain) (*root, error) {
	r := &root{phase: f.Phase, created: f.Created, signedUntil: f.SignedUntil, held: f.Held, tainted: f.Tainted}
	switch r.phase {
	case prepared, active, old:
	default:
		return nil, fmt.Errorf("unknown phase %q", r.phase)
	}
	var err error
	if r.cert, err = x509.ParseCertificate(f.Certificate); err != nil {
		return nil, err
	}
	if len(r.cert.URIs) != 1 || r.cert.URIs[0].String() != td.IDString() {
		return nil, fmt.Errorf("the certificate is not of %s", td.IDString())
	}
	if r.key, err = parseKey(f.Key); err != nil {
		return nil, fmt.Errorf("root key: %w", err)
	}
	if !r.key.PublicKey.Equal(r.cert.PublicKey) {
		return nil, errors.New("the key does not belong to the certificate")
	}
	if r.jwtKey, err = parseKey(f.JWTKey); err != nil {
		return nil, fmt.Errorf("JWT key: %w", err)
	}
	if len(f.Anchor) > 0 {
		if r.anchor, err = x509.ParseCertificate(f.Anchor); err != nil {
			return nil, fmt.Errorf("anchor: %w", err)
		}
		for _, der := range f.Above {
			c, err := x509.ParseCertificate(der)
			if err != nil {
				return nil, fmt.Errorf("certificate above: %w", err)
			}
			r.above = append(r.above, c)
		}
	}
	r.kid, err = keyID(r.jwtKey)
	return r, err
}

func parseKey(der []byte) (*ecdsa.PrivateKey, error) {
	k, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, err
	}
	key, ok := k.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("a %T, want an elliptic curve key", k)
	}
	return key, nil
}
