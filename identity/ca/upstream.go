package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
)

// Upstream signs CAs of an Authority, so that the roots of its trust domain are somebody else's: a SPIRE server's, or of a CA on disk.
type Upstream interface {
	// Sign makes a CA certificate from template for key's public half. The chain is that CA first, without the root.
	Sign(ctx context.Context, template *x509.Certificate, key crypto.Signer) (chain []*x509.Certificate, err error)
	// Publish makes a JWT key known where tokens of this Authority are to be verified beyond its own bundle.
	Publish(ctx context.Context, keyID string, key crypto.PublicKey, expires time.Time) error
	// Trusted is what the upstream is trusted by now; ok is false while that is not known. It must not be changed.
	Trusted() (t Trusted, ok bool)
	// Changed returns a channel that is closed at the next change of Trusted. Take it before reading.
	Changed() <-chan struct{}
}

// Trusted is what an Upstream is trusted by.
type Trusted struct {
	Bundle *spiffebundle.Bundle
	// Signer is the certificate that signs CAs now, where that is known: a CA that another one signed is replaced.
	Signer *x509.Certificate
	// Tainted are authorities of Bundle on which nothing new should rest.
	Tainted []*x509.Certificate
	// Final says that what is gone from Bundle is revoked. Otherwise it stays in this Authority's bundle while something rests on it.
	Final bool
}

// ErrUpstream is wrapped by errors of the Upstream, without whose signature nothing can be signed.
var ErrUpstream = errors.New("have a CA signed upstream")

const upstreamTime = 30 * time.Second // for one signature

// signedBy makes r a CA below an upstream root.
func (r *root) signedBy(up Upstream, template *x509.Certificate) error {
	ctx, cancel := context.WithTimeout(context.Background(), upstreamTime)
	defer cancel()
	chain, err := up.Sign(ctx, template, r.key)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUpstream, err)
	}
	if len(chain) == 0 || !r.key.PublicKey.Equal(chain[0].PublicKey) {
		return errors.New("the upstream authority signed another key than this one")
	}
	r.cert, r.above = chain[0], chain[1:]
	if len(r.cert.URIs) != 1 || r.cert.URIs[0].String() != template.URIs[0].String() {
		return fmt.Errorf("the upstream authority signed a CA of %v, want %s", r.cert.URIs, template.URIs[0])
	}
	t, ok := up.Trusted()
	if !ok {
		return errors.New("the upstream authority has not said what it is trusted by")
	}
	if r.anchor = anchorOf(chain, t.Bundle.X509Authorities()); r.anchor == nil {
		return errors.New("what the upstream authority signed does not chain to what it is trusted by")
	}
	if err := up.Publish(ctx, r.kid, r.jwtKey.Public(), r.cert.NotAfter); err != nil {
		return fmt.Errorf("publish JWT key upstream: %w", err)
	}
	return nil
}

// anchorOf is the root that a chain leads to, or nil.
func anchorOf(chain, roots []*x509.Certificate) *x509.Certificate {
	o := x509.VerifyOptions{Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}
	for _, c := range roots {
		o.Roots.AddCert(c)
	}
	for _, c := range chain[1:] {
		o.Intermediates.AddCert(c)
	}
	o.CurrentTime = chain[0].NotBefore.Add(time.Second) // expiry is judged elsewhere
	for _, c := range append(slices.Clone(chain), roots...) {
		if c.NotBefore.After(o.CurrentTime) {
			o.CurrentTime = c.NotBefore
		}
	}
	verified, err := chain[0].Verify(o)
	if err != nil {
		return nil
	}
	return verified[0][len(verified[0])-1]
}

func (a *Authority) upstreamChanged() <-chan struct{} {
	if a.cfg.Upstream == nil {
		return nil
	}
	return a.cfg.Upstream.Changed()
}

// followUpstream brings what the upstream is trusted by into the bundle, and takes out what has gone. A CA whose root has gone is replaced
// at once: nobody accepts what it signs.
func (a *Authority) followUpstream() error {
	var t Trusted
	if a.cfg.Upstream != nil {
		var ok bool
		if t, ok = a.cfg.Upstream.Trusted(); !ok {
			return nil
		}
	} else {
		t.Bundle = spiffebundle.New(a.cfg.TrustDomain)
	}
	st := a.state.Load()
	var want []Added
	for _, c := range t.Bundle.X509Authorities() {
		want = append(want, Added{Certificate: c, Upstream: true})
	}
	for kid, key := range t.Bundle.JWTAuthorities() {
		want = append(want, Added{JWTKeyID: kid, JWTKey: key, Upstream: true})
	}
	now := a.cfg.Now()
	want = slices.DeleteFunc(want, func(d Added) bool { return d.Certificate != nil && !now.Before(d.Certificate.NotAfter) })
	if err := a.Add(want...); err != nil {
		return err
	}
	if act := st.with(active); act != nil && act.anchor != nil && t.Final && !t.Bundle.HasX509Authority(act.anchor) {
		a.log.Error("the root above the signing CA was revoked upstream: another CA signs at once")
		if err := a.Prepare(); err != nil {
			return err
		}
		if err := a.Activate(); err != nil {
			return err
		}
	}
	if err := a.taintUpstream(t.Tainted); err != nil {
		return err
	}
	rests := func(d Added) bool {
		return !t.Final && d.Certificate != nil && slices.ContainsFunc(a.state.Load().roots, func(r *root) bool { return r.anchor != nil && r.anchor.Equal(d.Certificate) })
	}
	gone := func(d Added) bool { return d.Upstream && !slices.ContainsFunc(want, d.same) && !rests(d) }
	if !slices.ContainsFunc(a.state.Load().added, gone) {
		return nil
	}
	err := a.change(func(n *state) bool {
		n.added = slices.DeleteFunc(slices.Clone(n.added), gone)
		if t.Final { // what rests on a revoked root is worth nothing
			n.roots = slices.DeleteFunc(n.roots, func(r *root) bool { return r.phase == old && r.anchor != nil && !t.Bundle.HasX509Authority(r.anchor) })
		}
		return true
	})
	if err != nil {
		return fmt.Errorf("take what has gone upstream out of the bundle of %s: %w", a.cfg.TrustDomain, err)
	}
	a.log.Warn("what has gone upstream left the bundle", "sequence", a.Sequence())
	return nil
}

// taintUpstream has agents leave what is tainted upstream as soon as something else signs, so that it can be revoked without shutting them out.
func (a *Authority) taintUpstream(tainted []*x509.Certificate) error {
	act := a.state.Load().with(active)
	leave := func(d Added) bool {
		return d.Upstream && !d.Tainted && d.Certificate != nil && slices.ContainsFunc(tainted, d.Certificate.Equal) &&
			(act == nil || act.anchor == nil || !act.anchor.Equal(d.Certificate))
	}
	if !slices.ContainsFunc(a.state.Load().added, leave) {
		return nil
	}
	err := a.change(func(n *state) bool {
		n.added = slices.Clone(n.added)
		for i, d := range n.added {
			n.added[i].Tainted = d.Tainted || leave(d)
		}
		return true
	})
	if err != nil {
		return fmt.Errorf("taint what is tainted upstream of %s: %w", a.cfg.TrustDomain, err)
	}
	a.log.Warn("a root is tainted upstream: agents renew what rests on it", "sequence", a.Sequence())
	return nil
}

// moved reports whether the active root is not what would be made now: the upstream came, went, or signs with another certificate, or the
// root above is tainted.
func (a *Authority) moved(act *root) bool {
	if (a.cfg.Upstream != nil) != (act.anchor != nil) {
		return true
	}
	if a.cfg.Upstream == nil {
		return false
	}
	t, ok := a.cfg.Upstream.Trusted()
	switch {
	case !ok:
		return false
	case t.Signer != nil && (!bytes.Equal(t.Signer.RawSubject, act.cert.RawIssuer) || act.cert.CheckSignatureFrom(t.Signer) != nil):
		return true
	}
	return slices.ContainsFunc(t.Tainted, act.anchor.Equal)
}
