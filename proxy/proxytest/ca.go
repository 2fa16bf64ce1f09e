// Package proxytest makes trust domains for tests of the data path: authorities, Sources with SVIDs, and who trusts whom.
package proxytest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net/url"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/hanse-mesh/hanse/identity"
)

// Domain is a trust domain with one root.
type Domain struct {
	t    testing.TB
	TD   spiffeid.TrustDomain
	key  *ecdsa.PrivateKey
	root *x509.Certificate
}

// NewDomain makes a trust domain, e.g. "west.test".
func NewDomain(t testing.TB, name string) *Domain {
	t.Helper()
	d := &Domain{t: t, TD: spiffeid.RequireTrustDomainFromString(name), key: newKey(t)}
	now := time.Now()
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(24 * time.Hour), KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		URIs: []*url.URL{d.TD.ID().URL()},
	}
	d.root = d.sign(tmpl, tmpl, &d.key.PublicKey)
	return d
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func (d *Domain) sign(tmpl, parent *x509.Certificate, pub any) *x509.Certificate {
	d.t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, pub, d.key)
	if err != nil {
		d.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		d.t.Fatal(err)
	}
	return cert
}

// Bundle returns the domain's own bundle.
func (d *Domain) Bundle() *spiffebundle.Bundle {
	b := spiffebundle.New(d.TD)
	b.AddX509Authority(d.root)
	return b
}

// SVID issues an SVID for a path such as "/ns/shop/sa/payments".
func (d *Domain) SVID(path string, life time.Duration) *x509svid.SVID {
	d.t.Helper()
	key, now := newKey(d.t), time.Now()
	id := spiffeid.RequireFromPath(d.TD, path)
	cert := d.sign(&x509.Certificate{
		SerialNumber: big.NewInt(now.UnixNano()), NotBefore: now.Add(-time.Minute), NotAfter: now.Add(life), URIs: []*url.URL{id.URL()},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}, d.root, &key.PublicKey)
	return &x509svid.SVID{ID: id, Certificates: []*x509.Certificate{cert}, PrivateKey: key}
}

// Source returns a Source with an SVID of one hour that trusts this domain and the others.
func (d *Domain) Source(path string, trusted ...*Domain) *identity.Source {
	d.t.Helper()
	s := identity.NewSource()
	s.Set(d.SVID(path, time.Hour), Bundles(append(trusted, d)...))
	return s
}

// Bundles returns the domains' bundles, as Source.SetBundles takes them.
func Bundles(domains ...*Domain) map[spiffeid.TrustDomain]*spiffebundle.Bundle {
	m := map[spiffeid.TrustDomain]*spiffebundle.Bundle{}
	for _, d := range domains {
		m[d.TD] = d.Bundle()
	}
	return m
}
