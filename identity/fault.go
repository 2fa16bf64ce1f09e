package identity

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"maps"
	"math/big"
	"net/url"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// Fault is what a drill makes handshakes suffer. Whoever sets it takes it back: it is nowhere but in memory. What the Source hands out
// otherwise, to a Workload API for example, stays as it is.
type Fault struct {
	Expired    bool     // present a certificate that has expired, with the own SPIFFE ID
	Distrusted []string // a trust domain, or trust domain "/" AuthorityID: verify nothing that rests on it
}

// AuthorityID names an X.509 authority: the SHA-256 of its public key (SubjectPublicKeyInfo), in hex.
func AuthorityID(c *x509.Certificate) string {
	sum := sha256.Sum256(c.RawSubjectPublicKeyInfo)
	return hex.EncodeToString(sum[:])
}

// SetFault replaces the fault in force; the zero Fault heals.
func (s *Source) SetFault(f Fault) { s.replace(func(n *sourceState) { n.fault = f }) }

// suffer computes what handshakes go by.
func (n *sourceState) suffer(old *sourceState) {
	n.verify, n.expired = n.bundles, nil
	if n.fault.Expired && n.svid != nil {
		if n.expired = old.expired; n.expired == nil || n.svid.ID != old.svid.ID {
			n.expired = expiredTwin(n.svid.ID)
		}
	}
	for _, what := range n.fault.Distrusted {
		name, authority, one := strings.Cut(what, "/")
		td, err := spiffeid.TrustDomainFromString(name)
		if err != nil {
			continue
		}
		b := n.verify[td]
		if b == nil {
			continue
		}
		n.verify = maps.Clone(n.verify)
		if !one {
			delete(n.verify, td)
			continue
		}
		n.verify[td] = lacking(b, authority)
	}
}

func lacking(b *spiffebundle.Bundle, authority string) *spiffebundle.Bundle {
	out := b.Clone()
	for _, c := range b.X509Authorities() {
		if AuthorityID(c) == authority {
			out.RemoveX509Authority(c)
		}
	}
	return out
}

// expiredTwin makes a certificate that says what an SVID of that ID said until a minute ago. Nobody has signed it but itself: a peer sees
// first that it has expired. It is nil, and the handshake fails for want of a certificate, only where there is no randomness.
func expiredTwin(id spiffeid.ID) *x509svid.SVID {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return &x509svid.SVID{}
	}
	now := time.Now()
	template := &x509.Certificate{SerialNumber: big.NewInt(now.UnixNano()), URIs: []*url.URL{id.URL()}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(-time.Minute),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return &x509svid.SVID{}
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return &x509svid.SVID{}
	}
	return &x509svid.SVID{ID: id, Certificates: []*x509.Certificate{c}, PrivateKey: key}
}

// presented is the SVID that handshakes present.
func (s *Source) presented() (*x509svid.SVID, error) {
	n := s.state.Load()
	switch {
	case n.expired != nil && len(n.expired.Certificates) == 0:
		return nil, fmt.Errorf("a drill lets the SVID of %s expire", n.svid.ID)
	case n.expired != nil:
		return n.expired, nil
	}
	return s.GetX509SVID()
}

// Expired reports whether a drill lets the own SVID be expired.
func (s *Source) Expired() bool { return s.state.Load().expired != nil }
