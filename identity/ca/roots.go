package ca

import (
	"crypto/x509"
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
	Created  time.Time
	Expires  time.Time
	// SignedUntil is when the last SVID of the root ends; an old root is dropped then.
	SignedUntil time.Time
	Held        bool // prepared, and a person activates it
	Tainted     bool
	Certificate *x509.Certificate // must not be changed
}

// Roots lists the roots of this replica, oldest first.
func (a *Authority) Roots() []Root {
	var out []Root
	for _, r := range a.state.Load().roots {
		out = append(out, Root{KeyID: hex.EncodeToString(r.cert.SubjectKeyId), JWTKeyID: r.kid, Phase: string(r.phase), Created: r.created, Expires: r.cert.NotAfter,
			SignedUntil: r.signedUntil, Held: r.held, Tainted: r.tainted, Certificate: r.cert})
	}
	slices.SortStableFunc(out, func(x, y Root) int { return x.Expires.Compare(y.Expires) })
	return out
}

// PrepareHeld is Prepare, for a person: the root waits for ActivateRoot, however many have acknowledged it. Only when a
// quarter of the active root's life remains does Run activate it.
func (a *Authority) PrepareHeld() error { return a.prepare(true) }

// Rotate prepares a root, unless one is, for Run to activate as soon as it is acknowledged: one that a person held back is so no
// more. It returns that root.
func (a *Authority) Rotate() (Root, error) {
	if err := a.Prepare(); err != nil {
		return Root{}, err
	}
	if r := a.state.Load().with(prepared); r != nil && r.held {
		if err := a.editRoot("", prepared, false, func(r *root) { r.held = false }); err != nil {
			return Root{}, fmt.Errorf("rotate root of %s: %w", a.cfg.TrustDomain, err)
		}
	}
	st := a.state.Load()
	next := st.with(prepared)
	if next == nil { // Run was quicker
		next = st.with(active)
	}
	for _, r := range a.Roots() {
		if r.KeyID == hex.EncodeToString(next.cert.SubjectKeyId) {
			a.kick()
			return r, nil
		}
	}
	return Root{}, fmt.Errorf("rotate root of %s: %w", a.cfg.TrustDomain, ErrUnknownRoot)
}

// Deadline is when Run activates the prepared root though not all have acknowledged it, or, where others sign, prepares another one; zero where
// none is prepared.
func (a *Authority) Deadline() time.Time {
	st := a.state.Load()
	next := st.with(prepared)
	if next == nil {
		return time.Time{}
	}
	return a.patience(st.with(active), next)
}

// kick makes Run look at once.
func (a *Authority) kick() {
	select {
	case a.wake <- struct{}{}:
	default:
	}
}

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

// Withdraw takes a prepared root out of the bundle again: it has signed nothing.
func (a *Authority) Withdraw(keyID string) error {
	if err := a.editRoot(keyID, prepared, true, nil); err != nil {
		return fmt.Errorf("withdraw root of %s: %w", a.cfg.TrustDomain, err)
	}
	a.log.Warn("prepared root withdrawn", "key_id", keyID, "sequence", a.Sequence())
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
