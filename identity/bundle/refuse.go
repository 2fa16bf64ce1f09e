package bundle

import (
	"errors"
	"fmt"
	"maps"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Refusal is the newest bundle of a trust domain that was not taken. The one in force before it still is.
type Refusal struct {
	At       time.Time
	Source   string
	Sequence uint64 // of the refused bundle; 0 if it has none
	Reason   string
}

// Refusals returns what was refused and has not been made good since by a bundle from the same source.
func (s *Store) Refusals() map[spiffeid.TrustDomain]Refusal {
	s.refusedMu.Lock()
	defer s.refusedMu.Unlock()
	return maps.Clone(s.refusals)
}

// maxRefusals bounds the trust domains of which a refusal is remembered.
const maxRefusals = 1000

// note remembers a refusal.
func (s *Store) note(td spiffeid.TrustDomain, b *spiffebundle.Bundle, source string, err error) {
	reason := "other"
	for _, r := range []struct {
		err  error
		name string
	}{{ErrStale, "backwards"}, {ErrShrinks, "shrinks"}, {ErrTrustDomain, "trust_domain"}, {ErrEmpty, "empty"}, {ErrUnrelated, "unrelated"}} {
		if errors.Is(err, r.err) {
			reason = r.name
		}
	}
	seq, _ := b.SequenceNumber()
	if td != s.cfg.TrustDomain { // of our own, two writers may come in any order
		s.refused.WithLabelValues(td.Name(), reason).Inc()
	}
	s.refusedMu.Lock()
	defer s.refusedMu.Unlock()
	if _, known := s.refusals[td]; !known && len(s.refusals) >= maxRefusals || td == s.cfg.TrustDomain {
		return
	}
	s.refusals[td] = Refusal{At: s.cfg.Now(), Source: source, Sequence: seq, Reason: err.Error()}
}

// forgive forgets a refusal that the same source has made good.
func (s *Store) forgive(td spiffeid.TrustDomain, source string) {
	s.refusedMu.Lock()
	defer s.refusedMu.Unlock()
	if s.refusals[td].Source == source {
		delete(s.refusals, td)
	}
}

// shrinks refuses a bundle without authorities of the one in force that have not expired, unless a newer sequence announces that
// and at least one known authority remains to say so. vouched needs only the sequence: it may be a whole new authority.
//
// An authority that leaves with life left was either used up early (Hanse drops a root when its last SVID has ended) or is
// revoked; both come with a sequence, and the second must take effect at once. What this keeps out is a bundle that was cut off,
// made from half the replicas, or offered by one who is not the authority.
func shrinks(cur, b *spiffebundle.Bundle, by standing, now time.Time) error {
	have, _ := cur.SequenceNumber()
	got, numbered := b.SequenceNumber()
	var gone []string
	kept := false
	for _, c := range cur.X509Authorities() {
		switch {
		case b.HasX509Authority(c):
			kept = true
		case now.Before(c.NotAfter):
			gone = append(gone, "X.509 authority "+short(AuthorityID(c)))
		}
	}
	for kid := range cur.JWTAuthorities() {
		if !b.HasJWTAuthority(kid) {
			gone = append(gone, "JWT authority "+short(kid)) // JWT authorities have no end of their own
		}
	}
	switch {
	case len(gone) == 0:
		return nil
	case !numbered:
		if !x509Gone(gone) {
			return nil // a bundle without a sequence is all that its domain can say; keys for JWTs go so
		}
		return fmt.Errorf("%w: %s, without a sequence number", ErrShrinks, strings.Join(gone, ", "))
	case got > have && !kept && x509Gone(gone) && by != vouched:
		return fmt.Errorf("%w: sequence %d keeps none of the authorities of sequence %d", ErrShrinks, got, have)
	}
	return nil // orderSequence has the rest
}

func x509Gone(gone []string) bool {
	for _, g := range gone {
		if strings.HasPrefix(g, "X.509") {
			return true
		}
	}
	return false
}

func short(id string) string {
	if len(id) > 16 {
		return id[:16] + "…"
	}
	return id
}
