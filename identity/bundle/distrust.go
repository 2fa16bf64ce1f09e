package bundle

import (
	"cmp"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hanse-mesh/hanse/identity"
)

// Errors of Distrust and Find.
var (
	ErrUnknownAuthority = errors.New("no bundle here has that authority")
	ErrAmbiguous        = errors.New("more than one authority begins so")
	ErrTooMany          = errors.New("too much is distrusted already")
)

// maxDistrusted bounds what can be distrusted at once.
const maxDistrusted = 1000

// Distrust is a person's decision against a whole trust domain (Authority is empty), or against one authority of it. It
// outlives every bundle that comes later, and restarts, until Trust takes it back.
type Distrust struct {
	TrustDomain string    `json:"trust_domain"`
	Authority   string    `json:"authority,omitempty"` // AuthorityID of an X.509 authority, or the key ID of a JWT authority
	Since       time.Time `json:"since"`
}

// AuthorityID names an X.509 authority: the SHA-256 of its public key (SubjectPublicKeyInfo), in hex.
func AuthorityID(c *x509.Certificate) string { return identity.AuthorityID(c) }

// Distrust takes a trust domain, or one authority, out of force. Once it has returned, no bundle that the Store hands out has it.
// The same again is no error.
func (s *Store) Distrust(td spiffeid.TrustDomain, authority string) error {
	if td == s.cfg.TrustDomain {
		return fmt.Errorf("distrust %s: %w: it is the own one; revoke the root instead", td, ErrTrustDomain)
	}
	err := s.change(func(n *state) (bool, error) {
		if slices.ContainsFunc(n.distrusted, func(d Distrust) bool { return d.TrustDomain == td.Name() && d.Authority == authority }) {
			return false, nil
		}
		if len(n.distrusted) >= maxDistrusted {
			return false, ErrTooMany
		}
		n.distrusted = append(slices.Clone(n.distrusted), Distrust{TrustDomain: td.Name(), Authority: authority, Since: s.cfg.Now().UTC()})
		n.revision++
		return true, s.storeRelations(n)
	})
	if err != nil {
		return fmt.Errorf("distrust %s: %w", td, err)
	}
	s.log.Warn("distrusted", "trust_domain", td.Name(), "authority", authority)
	return nil
}

// SetDistrusted makes these the decisions in force, and no others, at once. What Since lacks is now.
func (s *Store) SetDistrusted(next []Distrust) error {
	next = slices.Clone(next)
	for i, d := range next {
		if d.TrustDomain == s.cfg.TrustDomain.Name() {
			return fmt.Errorf("distrust %s: %w: it is the own one; revoke the root instead", d.TrustDomain, ErrTrustDomain)
		}
		if d.Since.IsZero() {
			next[i].Since = s.cfg.Now().UTC()
		}
	}
	if len(next) > maxDistrusted {
		return ErrTooMany
	}
	slices.SortFunc(next, func(a, b Distrust) int {
		return cmp.Or(a.Since.Compare(b.Since), cmp.Compare(a.TrustDomain, b.TrustDomain), cmp.Compare(a.Authority, b.Authority))
	})
	same := func(a, b Distrust) bool { return a.TrustDomain == b.TrustDomain && a.Authority == b.Authority }
	err := s.change(func(n *state) (bool, error) {
		has := func(all []Distrust, d Distrust) bool {
			return slices.ContainsFunc(all, func(x Distrust) bool { return same(x, d) })
		}
		gone := slices.ContainsFunc(n.distrusted, func(d Distrust) bool { return !has(next, d) })
		if !gone && !slices.ContainsFunc(next, func(d Distrust) bool { return !has(n.distrusted, d) }) {
			return false, nil
		}
		n.distrusted = next
		n.revision++
		return true, s.storeRelations(n)
	})
	if err != nil {
		return fmt.Errorf("distrust: %w", err)
	}
	return nil
}

// Trust takes back one Distrust, and with authority "" all of a trust domain's. It reports whether there was any.
func (s *Store) Trust(td spiffeid.TrustDomain, authority string) (bool, error) {
	found := false
	err := s.change(func(n *state) (bool, error) {
		n.distrusted = slices.DeleteFunc(slices.Clone(n.distrusted), func(d Distrust) bool {
			hit := d.TrustDomain == td.Name() && (authority == "" || d.Authority == authority)
			found = found || hit
			return hit
		})
		if !found {
			return false, nil
		}
		n.revision++
		return true, s.storeRelations(n)
	})
	if err != nil {
		return false, fmt.Errorf("trust %s: %w", td, err)
	}
	if found {
		s.log.Warn("no longer distrusted", "trust_domain", td.Name(), "authority", authority)
	}
	return found, nil
}

// Distrusted lists what is distrusted, the oldest first.
func (s *Store) Distrusted() []Distrust { return slices.Clone(s.state.Load().distrusted) }

// Find returns the authority whose AuthorityID, subject key ID or JWT key ID begins with prefix, distrusted ones included.
// Errors: ErrUnknownAuthority, ErrAmbiguous.
func (s *Store) Find(prefix string) (spiffeid.TrustDomain, string, error) {
	prefix = strings.ToLower(strings.TrimSpace(prefix))
	type found struct {
		td spiffeid.TrustDomain
		id string
	}
	all := map[found]bool{}
	for td, b := range s.state.Load().bundles {
		for _, c := range b.X509Authorities() {
			if id := AuthorityID(c); strings.HasPrefix(id, prefix) || strings.HasPrefix(hex.EncodeToString(c.SubjectKeyId), prefix) {
				all[found{td, id}] = true
			}
		}
		for kid := range b.JWTAuthorities() {
			if strings.HasPrefix(strings.ToLower(kid), prefix) {
				all[found{td, kid}] = true
			}
		}
	}
	switch {
	case len(prefix) < 8 || len(all) == 0:
		return spiffeid.TrustDomain{}, "", fmt.Errorf("authority %q: %w", prefix, ErrUnknownAuthority)
	case len(all) > 1:
		return spiffeid.TrustDomain{}, "", fmt.Errorf("authority %q: %w", prefix, ErrAmbiguous)
	}
	for f := range maps.Keys(all) {
		return f.td, f.id, nil
	}
	panic("unreachable")
}

// apply computes what is in force.
func (s *state) apply() {
	s.inForce = make(map[spiffeid.TrustDomain]*spiffebundle.Bundle, len(s.bundles))
	for td, b := range s.bundles {
		if b = without(b, s.distrusted); b != nil {
			s.inForce[td] = b
		}
	}
}

// without returns b less what is distrusted: b itself if nothing of it is, nil if no X.509 authority is left.
func without(b *spiffebundle.Bundle, distrusted []Distrust) *spiffebundle.Bundle {
	var out *spiffebundle.Bundle
	for _, d := range distrusted {
		if d.TrustDomain != b.TrustDomain().Name() {
			continue
		}
		if d.Authority == "" {
			return nil
		}
		if out == nil {
			out = b.Clone()
		}
		for _, c := range b.X509Authorities() {
			if AuthorityID(c) == d.Authority {
				out.RemoveX509Authority(c)
			}
		}
		out.RemoveJWTAuthority(d.Authority)
	}
	switch {
	case out == nil:
		return b
	case len(out.X509Authorities()) == 0:
		return nil
	}
	return out
}
