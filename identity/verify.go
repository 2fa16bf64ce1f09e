package identity

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// maxChain bounds the certificates that a peer may have us look at.
const maxChain = 10

// Verify checks an X509-SVID, leaf first, against the bundle of its own trust domain, and returns its SPIFFE ID. Beyond
// go-spiffe's it holds the peer to what X509-SVID §3.1, §3.2, §4.3 and §4.4 demand of leaves and of signing certificates.
func Verify(chain []*x509.Certificate, bundles x509bundle.Source, now time.Time) (spiffeid.ID, error) {
	if len(chain) > maxChain {
		return spiffeid.ID{}, fmt.Errorf("a chain of %d certificates, at most %d", len(chain), maxChain)
	}
	id, verified, err := x509svid.Verify(chain, bundles, x509svid.WithTime(now))
	if err != nil {
		return id, err
	}
	if err := checkLeaf(chain[0], id); err != nil {
		return id, fmt.Errorf("X509-SVID %s: %w", id, err)
	}
	// One good way up is enough, as RFC 5280 has it.
	var faults []error
	for _, path := range verified {
		err := checkPath(path)
		if err == nil {
			return id, nil
		}
		faults = append(faults, err)
	}
	return id, fmt.Errorf("X509-SVID %s: %w", id, errors.Join(faults...))
}

var oidKeyUsage = asn1.ObjectIdentifier{2, 5, 29, 15}

func checkLeaf(c *x509.Certificate, id spiffeid.ID) error {
	eku := func(u x509.ExtKeyUsage) bool { return slices.Contains(c.ExtKeyUsage, u) }
	switch {
	case id.Path() == "":
		return errors.New("the ID of a leaf must have a path (X509-SVID §3.1)")
	case c.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return errors.New("the leaf lacks the key usage digitalSignature (X509-SVID §4.3)")
	case !slices.ContainsFunc(c.Extensions, func(e pkix.Extension) bool { return e.Id.Equal(oidKeyUsage) && e.Critical }):
		return errors.New("the leaf's key usage is not critical (X509-SVID §4.3)")
	case len(c.ExtKeyUsage)+len(c.UnknownExtKeyUsage) > 0 && !(eku(x509.ExtKeyUsageServerAuth) && eku(x509.ExtKeyUsageClientAuth)):
		return errors.New("the leaf's extended key usage lacks serverAuth or clientAuth (X509-SVID §4.4)")
	}
	return nil
}

// checkPath holds the signing certificates between leaf and root to the rules; the root is the bundle's own affair.
func checkPath(path []*x509.Certificate) error {
	for _, c := range path[1:max(len(path)-1, 1)] {
		switch {
		case !c.IsCA || !c.BasicConstraintsValid:
			return fmt.Errorf("signing certificate %q is not a CA's (X509-SVID §4.1)", c.Subject)
		case c.KeyUsage&x509.KeyUsageCertSign == 0:
			return fmt.Errorf("signing certificate %q lacks the key usage keyCertSign (X509-SVID §4.3)", c.Subject)
		case len(c.URIs) > 1:
			return fmt.Errorf("signing certificate %q has %d URI SANs (X509-SVID §2)", c.Subject, len(c.URIs))
		case len(c.URIs) == 1 && c.URIs[0].Scheme == "spiffe" && c.URIs[0].Path != "":
			return fmt.Errorf("the ID %s of a signing certificate has a path (X509-SVID §3.2)", c.URIs[0])
		}
	}
	return nil
}
