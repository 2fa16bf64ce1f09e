package peering

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hanse-mesh/hanse/federation"
	"github.com/hanse-mesh/hanse/identity"
)

// registry is the Book as the join service sees it.
type registry struct{ m *Mesh }

// Own implements join.Registry.
func (g registry) Own() federation.Record { return *g.m.book.Load().Own() }

// Clash implements join.Registry.
func (g registry) Clash(r federation.Record) error { return g.m.book.Load().Clash(&r) }

// Members implements join.Registry.
func (g registry) Members() []string {
	b := g.m.book.Load()
	out := []string{b.Own().Name}
	for _, e := range b.Members() {
		out = append(out, e.Record.Name)
	}
	slices.Sort(out)
	return out
}

// Known implements join.Registry.
func (g registry) Known(id string) (federation.Record, bool) {
	b := g.m.book.Load()
	e := b.Entries[id]
	if e == nil || id == b.Self || e.Record.Standing == federation.Left {
		return federation.Record{}, false
	}
	return e.Record, true
}

// Admit implements join.Registry. A cluster that resumes (it says so by being joining at the same incarnation) keeps its incarnation; any
// other begins a new life, two ahead, so that a left record that others may still make of the old one does not beat it.
func (g registry) Admit(ctx context.Context, r federation.Record) (self federation.Record, others []federation.Record, err error) {
	err = g.m.change(ctx, func(b *federation.Book) ([]string, error) {
		own, now := *b.Own(), federation.Stamp(g.m.cfg.Now())
		if own.Standing == federation.Joining {
			return nil, fmt.Errorf("cluster %s is itself joining a mesh", own.Name)
		}
		if r.ID == b.Self {
			return nil, fmt.Errorf("cluster %s cannot join itself", own.Name)
		}
		if err := b.Clash(&r); err != nil {
			return nil, err
		}
		changed := []string{r.ID}
		if own.Standing == federation.Left { // it begins a mesh of its own again
			own.Standing, own.Incarnation, own.Sponsor, own.Mesh = federation.Joined, own.Incarnation+2, "", g.m.cfg.MeshName
			own.Admitted, own.Changed, own.Proof = now, now, nil
			b.Put(&federation.Entry{Record: own})
			changed = append(changed, b.Self)
		}
		cur := b.Entries[r.ID]
		if cur != nil && cur.Record.Sponsor == b.Self && cur.Record.Incarnation == r.Incarnation && r.Standing == federation.Joining &&
			cur.Record.Standing != federation.Left {
			r.Standing, r.Admitted, r.Changed = cur.Record.Standing, cur.Record.Admitted, cur.Record.Changed
			if r.Standing == federation.Joined {
				r.Expires = time.Time{}
			}
		} else {
			if cur != nil {
				r.Incarnation = max(r.Incarnation, cur.Record.Incarnation)
			}
			r.Incarnation += 2
			r.Standing, r.Admitted, r.Changed = federation.Joining, now, now
		}
		r.Sponsor, r.Mesh, r.Proof = b.Self, own.Mesh, nil
		b.Put(&federation.Entry{Record: r})
		self, others = r, allBut(b, r.ID)
		return changed, nil
	})
	return self, others, err
}

// Confirm implements join.Registry.
func (g registry) Confirm(ctx context.Context, id string, incarnation uint64) (self federation.Record, others []federation.Record, err error) {
	err = g.m.change(ctx, func(b *federation.Book) ([]string, error) {
		e := b.Entries[id]
		if e == nil || e.Record.Incarnation != incarnation || e.Record.Standing == federation.Left || e.Record.Sponsor != b.Self {
			return nil, fmt.Errorf("member %.8s is not joining at cluster %s; begin again with the token", id, b.Own().Name)
		}
		next := *e
		others = allBut(b, id)
		if next.Record.Standing == federation.Joined {
			self = next.Record
			return nil, nil
		}
		next.Record.Standing, next.Record.Expires, next.Record.Changed = federation.Joined, time.Time{}, federation.Stamp(g.m.cfg.Now())
		self = next.Record
		b.Put(&next)
		g.m.log.Info("cluster joined", "cluster", self.Name, "member", id, "incarnation", incarnation)
		return []string{id}, nil
	})
	return self, others, err
}

// allBut returns what a joiner is told of the mesh: this cluster, all live members and every left record.
func allBut(b *federation.Book, id string) []federation.Record {
	var out []federation.Record
	for _, k := range slices.Sorted(maps.Keys(b.Entries)) {
		if e := b.Entries[k]; k != id && !e.Held {
			out = append(out, e.Record)
		}
	}
	return out
}

// Departed implements join.Registry.
func (g registry) Departed(ctx context.Context, r federation.Record) error {
	return g.m.change(ctx, func(b *federation.Book) ([]string, error) {
		changed := b.Observe(r.ID, []federation.Record{r}, federation.Reader{}, g.m.cfg.Now())
		if e := b.Entries[r.ID]; e == nil || e.Record.Standing != federation.Left {
			return nil, fmt.Errorf("the left record of %s, incarnation %d, does not apply here", r.Name, r.Incarnation)
		}
		if len(changed) > 0 {
			g.m.log.Info("cluster left", "cluster", r.Name, "member", r.ID)
		}
		return changed, nil
	})
}

// signLeft makes the Proof of a left record with this cluster's own SVID.
func signLeft(src *identity.Source, r *federation.Record) error {
	svid, err := src.GetX509SVID()
	if err != nil {
		return err
	}
	h, message := crypto.SHA256, r.SignedBytes()
	if _, ok := svid.PrivateKey.(ed25519.PrivateKey); ok {
		h = 0
	} else {
		sum := sha256.Sum256(message)
		message = sum[:]
	}
	sig, err := svid.PrivateKey.Sign(rand.Reader, message, h)
	if err != nil {
		return fmt.Errorf("sign the left record of %s: %w", r.Name, err)
	}
	p := &federation.Proof{Signature: sig}
	for _, c := range svid.Certificates {
		p.Chain = append(p.Chain, c.Raw)
	}
	r.Proof = p
	return nil
}

// verifyLeft reports whether the proof of a left record is by the member itself, or by its sponsor, as the Book knows them. The chain is
// verified as of when it was new: the record outlives it.
func verifyLeft(b *federation.Book) func(left, known *federation.Record) bool {
	return func(left, known *federation.Record) bool {
		var chain []*x509.Certificate
		for _, der := range left.Proof.Chain {
			c, err := x509.ParseCertificate(der)
			if err != nil {
				return false
			}
			chain = append(chain, c)
		}
		if len(chain) == 0 || left.Changed.After(chain[0].NotAfter) {
			return false
		}
		writers := []*federation.Record{known}
		if s := b.Entries[known.Sponsor]; s != nil {
			writers = append(writers, &s.Record)
		}
		return slices.ContainsFunc(writers, func(w *federation.Record) bool {
			td, err := spiffeid.TrustDomainFromString(w.TrustDomain)
			if err != nil {
				return false
			}
			bundle, err := spiffebundle.Parse(td, w.Bundle)
			if err != nil {
				return false
			}
			id, err := identity.Verify(chain, bundle, chain[0].NotBefore.Add(time.Second))
			return err == nil && id == identity.ControlPlaneID(td) && verifySignature(chain[0], left.SignedBytes(), left.Proof.Signature)
		})
	}
}

func verifySignature(leaf *x509.Certificate, message, sig []byte) bool {
	sum := sha256.Sum256(message)
	switch key := leaf.PublicKey.(type) {
	case *ecdsa.PublicKey:
		return ecdsa.VerifyASN1(key, sum[:], sig)
	case *rsa.PublicKey:
		return rsa.VerifyPKCS1v15(key, crypto.SHA256, sum[:], sig) == nil
	case ed25519.PublicKey:
		return ed25519.Verify(key, message, sig)
	}
	return false
}
