package spireapi

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const maxCSR = 16 << 10 // bytes

// parseCSR decodes a certificate request and checks its signature and key.
func parseCSR(der []byte) (*x509.CertificateRequest, error) {
	switch {
	case len(der) == 0:
		return nil, invalid("missing CSR")
	case len(der) > maxCSR:
		return nil, invalid("malformed CSR: larger than %d bytes", maxCSR)
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, invalid("malformed CSR: %v", err)
	}
	if err := CheckKey(csr.PublicKey); err != nil {
		return nil, invalid("CSR: %v", err)
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, invalid("CSR: invalid signature: %v", err)
	}
	return csr, nil
}

func CheckKey(key crypto.PublicKey) error {
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		if k.Curve == elliptic.P256() || k.Curve == elliptic.P384() {
			return nil
		}
		return fmt.Errorf("curve %s, want P-256 or P-384", k.Curve.Params().Name)
	case *rsa.PublicKey:
		if n := k.N.BitLen(); n < 2048 || n > 8192 {
			return fmt.Errorf("an RSA key of %d bits, want 2048 to 8192", n)
		}
		return nil
	}
	return fmt.Errorf("a key of type %T, want EC P-256 or P-384, or RSA", key)
}

// checkSubject refuses a CSR that asks for another identity than id. One that asks for none is accepted: by the API's
// definition only its key counts.
func checkSubject(csr *x509.CertificateRequest, id spiffeid.ID) error {
	if len(csr.URIs) == 0 {
		return nil
	}
	if len(csr.URIs) > 1 || csr.URIs[0].String() != id.String() {
		return invalid("CSR asks for %v, the entry is %s", csr.URIs, id)
	}
	return nil
}

// parseAgentCSR is parseCSR for a caller who is entitled to a certificate of one SPIFFE ID for its key, and to nothing else.
func parseAgentCSR(der []byte) (*x509.CertificateRequest, error) {
	csr, err := parseCSR(der)
	if err != nil {
		return nil, err
	}
	if len(csr.DNSNames) > 0 {
		return nil, invalid("CSR asks for the DNS names %q; those are an entry's to give", csr.DNSNames)
	}
	return csr, plainCSR(csr)
}

// plainCSR refuses a CSR that asks for what no X509-SVID of ours has: what is left out of a certificate would not hurt, but
// whoever asks for it is after something.
func plainCSR(csr *x509.CertificateRequest) error {
	if len(csr.IPAddresses)+len(csr.EmailAddresses) > 0 {
		return invalid("CSR asks for names that no X509-SVID has here: IP addresses %v, email addresses %q", csr.IPAddresses, csr.EmailAddresses)
	}
	for _, e := range csr.Extensions {
		if !e.Id.Equal(oidBasicConstraints) {
			continue
		}
		var bc struct {
			IsCA bool `asn1:"optional"`
			Path int  `asn1:"optional,default:-1"`
		}
		if _, err := asn1.Unmarshal(e.Value, &bc); err != nil || bc.IsCA {
			return invalid("CSR asks for the certificate of a CA")
		}
	}
	return nil
}

var oidBasicConstraints = asn1.ObjectIdentifier{2, 5, 29, 19}

// authorityOf is the hex key ID of what signed a certificate.
func authorityOf(c *x509.Certificate) string { return hex.EncodeToString(c.AuthorityKeyId) }

// keyHash identifies a public key.
func keyHash(csr *x509.CertificateRequest) [32]byte {
	return sha256.Sum256(csr.RawSubjectPublicKeyInfo)
}
