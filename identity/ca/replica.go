package ca

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Peers are the other replicas of the trust domain, which sign for this one until its own root is acknowledged. Their errors wrap
// ErrNotActive where none of them signs now.
type Peers interface {
	Signing() bool // whether one of them signs now
	SignX509(ctx context.Context, p X509Params) ([]*x509.Certificate, error)
	SignJWT(ctx context.Context, id spiffeid.ID, audience []string, ttl time.Duration) (JWTSVID, error)
}

// peersTime bounds how long peers are waited for.
const peersTime = 10 * time.Second

// Signs reports whether this replica signs itself.
func (a *Authority) Signs() bool {
	now := a.cfg.Now()
	r := a.state.Load().with(active)
	return r != nil && now.Before(r.cert.NotAfter) && (a.cfg.Until == nil || now.Before(a.cfg.Until()))
}

// Active is the certificate of the bundle on which rests what is signed now: the active root, or the upstream one above it. Nil: none signs.
func (a *Authority) Active() *x509.Certificate {
	if r := a.state.Load().with(active); r != nil {
		return r.inBundle()
	}
	return nil
}

// Rejoin forgets all roots and prepares a fresh one: for a replica that was away for so long that its roots have left the trust domain's
// bundle. Until the new root is acknowledged its Peers sign.
func (a *Authority) Rejoin() error {
	next, err := newRoot(a.cfg, a.cfg.Now())
	if err == nil {
		err = a.change(func(n *state) bool {
			n.roots = []*root{next}
			return true
		})
	}
	if err != nil {
		return fmt.Errorf("begin anew as a replica of %s: %w", a.cfg.TrustDomain, err)
	}
	a.log.Warn("this replica's roots have left the bundle; a fresh one is prepared", "root", next)
	return nil
}

// Retire makes the active root with that key ID an old, tainted one, though no successor is acknowledged: a replica that was away learns
// so that its root was revoked. A fresh root is prepared unless one is; until it is acknowledged, Peers sign.
func (a *Authority) Retire(keyID string) error {
	fail := func(err error) error { return fmt.Errorf("retire root %s of %s: %w", keyID, a.cfg.TrustDomain, err) }
	next, err := newRoot(a.cfg, a.cfg.Now())
	if err != nil {
		return fail(err)
	}
	found := false
	err = a.change(func(n *state) bool {
		for i, r := range n.roots {
			if r.phase == active && hex.EncodeToString(r.cert.SubjectKeyId) == keyID {
				c := *r
				c.phase, c.tainted, found = old, true, true
				n.roots[i] = &c
			}
		}
		if found && n.with(prepared) == nil {
			n.roots = append(n.roots, next)
		}
		return found
	})
	switch {
	case err != nil:
		return fail(err)
	case !found:
		return fail(ErrWrongPhase)
	}
	a.log.Warn("the active root was revoked by others and signs no more; another is prepared", "key_id", keyID, "sequence", a.Sequence())
	return nil
}

// byPeers lets the Peers sign where this replica may not.
func byPeers[T any](ctx context.Context, a *Authority, err error, sign func(context.Context, Peers) (T, error)) (T, error) {
	var none T
	if a.cfg.Peers == nil || !errors.Is(err, ErrNotActive) && !errors.Is(err, ErrExpired) {
		return none, err
	}
	ctx, cancel := context.WithTimeout(ctx, peersTime)
	defer cancel()
	out, perr := sign(ctx, a.cfg.Peers)
	if perr != nil {
		return none, fmt.Errorf("%w; another replica: %w", err, perr)
	}
	return out, nil
}
