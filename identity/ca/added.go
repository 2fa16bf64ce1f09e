package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"time"
)

// Added is an authority in the bundle whose key is elsewhere: a downstream server's JWT key, or a root that a person or an
// upstream authority brought. Exactly one of Certificate and JWTKey is set.
type Added struct {
	Certificate *x509.Certificate
	JWTKeyID    string
	JWTKey      crypto.PublicKey
	Expires     time.Time // zero for a JWT key that has no end
	Tainted     bool
	Upstream    bool // an Upstream's: it goes when that no longer has it
}

// KeyID is the hex subject key ID of a certificate, or the JWT key's ID.
func (d Added) KeyID() string {
	if d.Certificate != nil {
		return hex.EncodeToString(d.Certificate.SubjectKeyId)
	}
	return d.JWTKeyID
}

func (d Added) same(o Added) bool {
	if d.Certificate != nil {
		return d.Certificate.Equal(o.Certificate)
	}
	return o.Certificate == nil && d.JWTKeyID == o.JWTKeyID
}

// maxAdded bounds the authorities that others bring.
const maxAdded = 200

// Errors of Add.
var (
	ErrTooMany = errors.New("too many added authorities") // more than 200
	ErrAdded   = errors.New("not an authority that can be added")
)

// Add puts authorities into the bundle until they expire or are revoked. Those that are there already stay as they are;
// a JWT key ID cannot be taken over by another key.
func (a *Authority) Add(all ...Added) error {
	cur := a.state.Load()
	var fresh []Added
	for _, d := range all {
		if err := a.checkAdded(cur, d); err != nil {
			return fmt.Errorf("add authority to the bundle of %s: %w: %w", a.cfg.TrustDomain, ErrAdded, err)
		}
		if d.Certificate != nil {
			d.Expires = d.Certificate.NotAfter
		}
		if !slices.ContainsFunc(cur.added, d.same) && !slices.ContainsFunc(fresh, d.same) && !cur.holds(d) {
			fresh = append(fresh, d)
		}
	}
	switch n := len(cur.added) + len(fresh); {
	case len(fresh) == 0:
		return nil
	case n > maxAdded:
		return fmt.Errorf("add authority to the bundle of %s: %w: %d, at most %d", a.cfg.TrustDomain, ErrTooMany, n, maxAdded)
	}
	err := a.change(func(n *state) bool {
		n.added = slices.Concat(n.added, fresh)
		return true
	})
	if err != nil {
		return fmt.Errorf("add authority to the bundle of %s: %w", a.cfg.TrustDomain, err)
	}
	for _, d := range fresh {
		a.log.Warn("authority of somebody else added to the bundle", "key_id", d.KeyID(), "expires", d.Expires, "sequence", a.Sequence())
	}
	return nil
}

func (a *Authority) checkAdded(cur *state, d Added) error {
	c := d.Certificate
	switch {
	case (c == nil) == (d.JWTKey == nil):
		return errors.New("want a certificate or a JWT key")
	case c == nil && d.JWTKeyID == "":
		return errors.New("a JWT key without ID")
	case c == nil:
		for kid, key := range cur.jwtKeys() {
			if k, ok := key.(interface{ Equal(crypto.PublicKey) bool }); kid == d.JWTKeyID && !(ok && k.Equal(d.JWTKey)) {
				return fmt.Errorf("another JWT key has the ID %s already", kid)
			}
		}
		return checkJWTKey(d.JWTKey)
	case !c.IsCA || !c.BasicConstraintsValid || c.KeyUsage&x509.KeyUsageCertSign == 0:
		return fmt.Errorf("certificate %q is not a CA's", c.Subject)
	case len(c.SubjectKeyId) == 0:
		return fmt.Errorf("certificate %q has no subject key ID", c.Subject)
	case len(c.URIs) > 0 && (len(c.URIs) > 1 || c.URIs[0].String() != a.cfg.TrustDomain.IDString()):
		return fmt.Errorf("certificate %q is of %v, want %s (X509-SVID §4.1)", c.Subject, c.URIs, a.cfg.TrustDomain.IDString())
	}
	return nil
}

// checkJWTKey refuses what no JWT-SVID may be signed with (JWT-SVID §2.1): among others, Ed25519.
func checkJWTKey(key crypto.PublicKey) error {
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		if k.Curve == elliptic.P256() || k.Curve == elliptic.P384() || k.Curve == elliptic.P521() {
			return nil
		}
	case *rsa.PublicKey:
		if k.N.BitLen() >= 2048 {
			return nil
		}
	}
	return fmt.Errorf("a JWT key of type %T, want EC (P-256, P-384, P-521) or RSA of 2048 bits or more", key)
}

// Added lists the authorities that others brought, in the order of their coming.
func (a *Authority) Added() []Added { return slices.Clone(a.state.Load().added) }

// TaintAdded marks one as not to be relied on. It stays in the bundle.
func (a *Authority) TaintAdded(keyID string) error {
	return a.editAdded("taint", keyID, func(d *Added) { d.Tainted = true })
}

// RevokeAdded takes one out of the bundle.
func (a *Authority) RevokeAdded(keyID string) error { return a.editAdded("revoke", keyID, nil) }

func (a *Authority) editAdded(what, keyID string, f func(*Added)) error {
	found := false
	err := a.change(func(n *state) bool {
		n.added = slices.Clone(n.added)
		i := slices.IndexFunc(n.added, func(d Added) bool { return d.KeyID() == keyID })
		if found = i >= 0; !found {
			return false
		}
		if f == nil {
			n.added = slices.Delete(n.added, i, i+1)
		} else {
			f(&n.added[i])
		}
		return true
	})
	if err == nil && !found {
		err = fmt.Errorf("%w: nobody added %s", ErrUnknownRoot, keyID)
	}
	if err != nil {
		return fmt.Errorf("%s authority of %s: %w", what, a.cfg.TrustDomain, err)
	}
	a.log.Warn("added authority changed", "what", what, "key_id", keyID, "sequence", a.Sequence())
	return nil
}

// holds reports whether d is one of this replica's own.
func (s *state) holds(d Added) bool {
	return slices.ContainsFunc(s.roots, func(r *root) bool {
		return d.Certificate != nil && r.cert.Equal(d.Certificate) || d.Certificate == nil && r.kid == d.JWTKeyID
	})
}

func (s *state) jwtKeys() map[string]crypto.PublicKey {
	out := map[string]crypto.PublicKey{}
	for _, r := range s.roots {
		out[r.kid] = r.jwtKey.Public()
	}
	for _, d := range s.added {
		if d.Certificate == nil {
			out[d.JWTKeyID] = d.JWTKey
		}
	}
	return out
}

func (d Added) expired(now time.Time) bool { return !d.Expires.IsZero() && !now.Before(d.Expires) }

// fileAdded is an Added on disk.
type fileAdded struct {
	Certificate []byte    `json:"certificate,omitempty"` // DER
	JWTKeyID    string    `json:"jwt_key_id,omitempty"`
	JWTKey      []byte    `json:"jwt_key,omitempty"` // PKIX
	Expires     time.Time `json:"expires,omitzero"`
	Tainted     bool      `json:"tainted,omitempty"`
	Upstream    bool      `json:"upstream,omitempty"`
}

func (d Added) encode() (fileAdded, error) {
	f := fileAdded{JWTKeyID: d.JWTKeyID, Expires: d.Expires, Tainted: d.Tainted, Upstream: d.Upstream}
	var err error
	if d.Certificate != nil {
		f.Certificate = d.Certificate.Raw
	} else {
		f.JWTKey, err = x509.MarshalPKIXPublicKey(d.JWTKey)
	}
	return f, err
}

func (f fileAdded) decode() (Added, error) {
	d := Added{JWTKeyID: f.JWTKeyID, Expires: f.Expires, Tainted: f.Tainted, Upstream: f.Upstream}
	var err error
	switch {
	case len(f.Certificate) > 0:
		d.Certificate, err = x509.ParseCertificate(f.Certificate)
	case f.JWTKeyID == "":
		err = errors.New("neither certificate nor JWT key ID")
	default:
		d.JWTKey, err = x509.ParsePKIXPublicKey(f.JWTKey)
	}
	return d, err
}
