package ca

import (
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"time"
)

// Errors of the methods that name a root.
var (
	// ErrUnknownRoot is returned when no root has that key ID.
	ErrUnknownRoot = errors.New("no such root")
	// ErrWrongPhase is returned when the root is not in the phase that the step needs.
	ErrWrongPhase = errors.New("the root is in another phase")
)

// Root describes one root without its keys. An X.509 key and a JWT key live and rotate together.
type Root struct {
	KeyID    string // subject key ID of the certificate, hex
	JWTKeyID string
	Phase    string // prepared, active or old
	Expires  time.Time
	Tainted  bool
}

// Roots lists the roots of this replica, oldest first.
func (a *Authority) Roots() []Root {
	var out []Root
	for _, r := range a.state.Load().roots {
		out = append(out, Root{KeyID: hex.EncodeToString(r.cert.SubjectKeyId), JWTKeyID: r.kid, Phase: string(r.phase), Expires: r.cert.NotAfter, Tainted: r.tainted})
	}
	slices.SortStableFunc(out, func(x, y Root) int { return x.Expires.Compare(y.Expires) })
	return out
}

// PrepareHeld is Prepare, for a person: the root waits for ActivateRoot, however many have acknowledged it. Only when a
// quarter of the active root's life remains does Run activate it.
func (a *Authority) PrepareHeld() error { return a.prepare(true) }

// ActivateRoot is Activate if the prepared root is that one.
func (a *Authority) ActivateRoot(keyID string) error {
	r := a.state.Load().with(prepared)
	if r == nil || hex.EncodeToString(r.cert.SubjectKeyId) != keyID {
		return fmt.Errorf("activate root %s of %s: %w: it is not prepared", keyID, a.cfg.TrustDomain, ErrWrongPhase)
	}
	return a.Activate()
}

// Taint marks an old root as not to be relied on: agents renew at once what it signed. It stays in the bundle.
func (a *Authority) Taint(keyID string) error {
	if err := a.editRoot(keyID, old, true, func(r *root) { r.tainted = true }); err != nil {
		return fmt.Errorf("taint root of %s: %w", a.cfg.TrustDomain, err)
	}
	a.log.Warn("root tainted", "key_id", keyID, "sequence", a.Sequence())
	return nil
}

// Revoke takes an old root out of the bundle, whatever it signed.
func (a *Authority) Revoke(keyID string) error {
	if err := a.editRoot(keyID, old, true, nil); err != nil {
		return fmt.Errorf("revoke root of %s: %w", a.cfg.TrustDomain, err)
	}
	a.log.Warn("root revoked", "key_id", keyID, "sequence", a.Sequence())
	return nil
}

// editRoot changes a copy of the root in phase p with that key ID ("" for any), or deletes it when f is nil.
func (a *Authority) editRoot(keyID string, p phase, bundle bool, f func(*root)) error {
	found := ErrUnknownRoot
	err := a.change(func(n *state) bool {
		for i, r := range n.roots {
			if keyID != "" && hex.EncodeToString(r.cert.SubjectKeyId) != keyID {
				continue
			}
			if r.phase != p {
				if keyID != "" {
					found = fmt.Errorf("%w: %s is %s, not %s", ErrWrongPhase, keyID, r.phase, p)
				}
				continue
			}
			found = nil
			if f == nil {
				n.roots = slices.Delete(n.roots, i, i+1)
			} else {
				c := *r
				f(&c)
				n.roots[i] = &c
			}
			return bundle
		}
		return false
	})
	return errors.Join(found, err)
}
