// Package spiretypes turns SPIRE's protobuf types into ours and back: SPIFFE IDs, bundles, X509-SVIDs. It is the one
// border of identity/spireapi and identity/agent for these, so what is refused by one is refused by both.
package spiretypes

import (
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
)

// maxChain bounds the certificates of one SVID.
const maxChain = 16

// FromID encodes an ID.
func FromID(id spiffeid.ID) *types.SPIFFEID {
	return &types.SPIFFEID{TrustDomain: id.TrustDomain().Name(), Path: id.Path()}
}

// ToID decodes an ID (SPIFFE-ID §2). A path without its leading slash is accepted, as the API's comment asks.
func ToID(p *types.SPIFFEID) (spiffeid.ID, error) {
	if p == nil {
		return spiffeid.ID{}, errors.New("no SPIFFE ID")
	}
	td, err := spiffeid.TrustDomainFromString(p.TrustDomain)
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("SPIFFE ID: trust domain %q: %w", p.TrustDomain, err)
	}
	path := p.Path
	if path != "" && path[0] != '/' {
		path = "/" + path
	}
	id, err := spiffeid.FromPath(td, path)
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("SPIFFE ID: path %q: %w", p.Path, err)
	}
	return id, nil
}

// FromBundle encodes a bundle.
func FromBundle(b *spiffebundle.Bundle) (*types.Bundle, error) {
	out := &types.Bundle{TrustDomain: b.TrustDomain().Name()}
	for _, c := range b.X509Authorities() {
		out.X509Authorities = append(out.X509Authorities, &types.X509Certificate{Asn1: c.Raw})
	}
	for kid, key := range b.JWTAuthorities() {
		der, err := x509.MarshalPKIXPublicKey(key)
		if err != nil {
			return nil, fmt.Errorf("encode bundle of %s: JWT authority %s: %w", b.TrustDomain(), kid, err)
		}
		out.JwtAuthorities = append(out.JwtAuthorities, &types.JWTKey{KeyId: kid, PublicKey: der})
	}
	out.SequenceNumber, _ = b.SequenceNumber()
	if hint, ok := b.RefreshHint(); ok {
		out.RefreshHint = int64(hint / time.Second)
	}
	return out, nil
}

// ToBundle decodes a bundle. What is tainted is still trusted until it is taken out, as SPIRE has it. Sequence 0 means
// that there is none.
func ToBundle(p *types.Bundle) (*spiffebundle.Bundle, error) {
	if p == nil {
		return nil, errors.New("no bundle")
	}
	td, err := spiffeid.TrustDomainFromString(p.TrustDomain)
	if err != nil {
		return nil, fmt.Errorf("bundle: trust domain %q: %w", p.TrustDomain, err)
	}
	b := spiffebundle.New(td)
	for _, a := range p.X509Authorities {
		certs, err := x509.ParseCertificates(a.GetAsn1())
		if err != nil {
			return nil, fmt.Errorf("bundle of %s: %w", td, err)
		}
		for _, c := range certs {
			b.AddX509Authority(c)
		}
	}
	for _, k := range p.JwtAuthorities {
		key, err := x509.ParsePKIXPublicKey(k.GetPublicKey())
		if err != nil {
			return nil, fmt.Errorf("bundle of %s: JWT authority %q: %w", td, k.GetKeyId(), err)
		}
		if err := b.AddJWTAuthority(k.GetKeyId(), key); err != nil {
			return nil, fmt.Errorf("bundle of %s: %w", td, err)
		}
	}
	if p.SequenceNumber != 0 {
		b.SetSequenceNumber(p.SequenceNumber)
	}
	if p.RefreshHint > 0 {
		b.SetRefreshHint(time.Duration(min(p.RefreshHint, 24*3600)) * time.Second)
	}
	return b, nil
}

// FromChain encodes an X509-SVID, leaf first.
func FromChain(id spiffeid.ID, chain []*x509.Certificate) *types.X509SVID {
	out := &types.X509SVID{Id: FromID(id), ExpiresAt: chain[0].NotAfter.Unix()}
	for _, c := range chain {
		out.CertChain = append(out.CertChain, c.Raw)
	}
	return out
}

// ToChain decodes the certificates of an X509-SVID, leaf first. It does not verify them.
func ToChain(p *types.X509SVID) ([]*x509.Certificate, error) {
	if n := len(p.GetCertChain()); n == 0 || n > maxChain {
		return nil, fmt.Errorf("X509-SVID: a chain of %d certificates", n)
	}
	var chain []*x509.Certificate
	for _, der := range p.CertChain {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("X509-SVID: %w", err)
		}
		chain = append(chain, c)
	}
	return chain, nil
}

// FollowHeader is the metadata of SyncAuthorizedEntries by which an agent of ours asks to be told of changes. A stock server does not know
// it, and then says nothing after its first answer.
const FollowHeader = "hanse-follow"
