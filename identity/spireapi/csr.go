package spireapi

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
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
	if err := checkKey(csr.PublicKey); err != nil {
		return nil, invalid("CSR: %v", err)
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, invalid("CSR: invalid signature: %v", err)
	}
	return csr, nil
}

func checkKey(key crypto.PublicKey) error {
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

// keyHash identifies a public key.
func keyHash(csr *x509.CertificateRequest) [32]byte {
	return sha256.Sum256(csr.RawSubjectPublicKeyInfo)
}
