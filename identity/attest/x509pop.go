package attest

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1" // #nosec G505 -- a name in SPIRE's agent IDs and selectors, not a proof
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math/big"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const (
	nonceLen  = 32
	maxX509   = 8 // certificates in one payload
	minRSA    = 2048
	maxRSA    = 8192
	maxSigLen = maxRSA / 8
)

// X509Pop accepts agents that hold the key of a certificate that chains to one of its CAs, as SPIRE's x509pop plugin:
// the agent signs a fresh nonce of ours together with one of its own. Its ID ends in the certificate's SHA-1 fingerprint.
type X509Pop struct {
	td    spiffeid.TrustDomain
	roots *x509.CertPool
	now   func() time.Time
}

// NewX509Pop returns one for agents of td whose certificates chain to cas.
func NewX509Pop(td spiffeid.TrustDomain, cas []*x509.Certificate, now func() time.Time) *X509Pop {
	p := &X509Pop{td: td, roots: x509.NewCertPool(), now: now}
	if p.now == nil {
		p.now = time.Now
	}
	for _, c := range cas {
		p.roots.AddCert(c)
	}
	return p
}

// The messages of SPIRE's plugin.
type (
	popPayload struct {
		Certificates [][]byte `json:"certificates"`
	}
	popNonce struct {
		Nonce []byte `json:"nonce"`
	}
	popChallenge struct {
		RSA   *popNonce `json:"rsa_signature"`
		ECDSA *popNonce `json:"ecdsa_signature"`
	}
	popResponse struct {
		RSA *struct {
			Nonce     []byte `json:"nonce"`
			Signature []byte `json:"signature"`
		} `json:"rsa_signature"`
		ECDSA *struct {
			Nonce []byte `json:"nonce"`
			R     []byte `json:"r"`
			S     []byte `json:"s"`
		} `json:"ecdsa_signature"`
	}
)

// Attest implements Attestor.
func (p *X509Pop) Attest(_ context.Context, payload []byte, challenge Challenge) (Evidence, error) {
	var in popPayload
	if err := decodePayload(payload, &in); err != nil {
		return Evidence{}, err
	}
	leaf, chain, err := p.verify(in.Certificates)
	if err != nil {
		return Evidence{}, err
	}
	if err := prove(leaf, challenge); err != nil {
		return Evidence{}, err
	}
	id, err := spiffeid.FromSegments(p.td, "spire", "agent", "x509pop", fingerprint(leaf))
	if err != nil {
		return Evidence{}, err
	}
	e := Evidence{AgentID: id}
	if cn := leaf.Subject.CommonName; cn != "" {
		e.Selectors = append(e.Selectors, "subject:cn:"+cn)
	}
	for _, c := range chain[1:] { // as SPIRE: every CA of the chain
		if s := "ca:fingerprint:" + fingerprint(c); !slices.Contains(e.Selectors, s) {
			e.Selectors = append(e.Selectors, s)
		}
	}
	e.Selectors = append(e.Selectors, "serialnumber:"+serialHex(leaf.SerialNumber))
	return e, nil
}

// verify returns the leaf and a chain from it to a root.
func (p *X509Pop) verify(ders [][]byte) (*x509.Certificate, []*x509.Certificate, error) {
	if n := len(ders); n == 0 || n > maxX509 {
		return nil, nil, refused("%d certificates, want 1 to %d", n, maxX509)
	}
	var certs []*x509.Certificate
	between := x509.NewCertPool()
	for i, der := range ders {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, nil, refused("certificate %d: %v", i, err)
		}
		if certs = append(certs, c); i > 0 {
			between.AddCert(c)
		}
	}
	leaf := certs[0]
	if leaf.IsCA {
		return nil, nil, refused("the certificate is a CA's")
	}
	if leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0 {
		return nil, nil, refused("the certificate is not intended for digital signatures")
	}
	chains, err := leaf.Verify(x509.VerifyOptions{Roots: p.roots, Intermediates: between, CurrentTime: p.now(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	if err != nil {
		return nil, nil, refused("certificate verification failed: %v", err)
	}
	return leaf, chains[0], nil
}

// prove has the agent sign a nonce.
func prove(leaf *x509.Certificate, challenge Challenge) error {
	nonce := make([]byte, nonceLen)
	rand.Read(nonce)
	var c popChallenge
	switch key := leaf.PublicKey.(type) {
	case *rsa.PublicKey:
		if n := key.N.BitLen(); n < minRSA || n > maxRSA {
			return refused("an RSA key of %d bits, want %d to %d", n, minRSA, maxRSA)
		}
		c.RSA = &popNonce{nonce}
	case *ecdsa.PublicKey:
		if key.Curve == elliptic.P224() {
			return refused("curve P-224 is too weak")
		}
		c.ECDSA = &popNonce{nonce}
	default:
		return refused("a key of type %T, want RSA or EC", key)
	}
	out, err := json.Marshal(c)
	if err != nil {
		return fmt.Errorf("encode challenge: %w", err)
	}
	data, err := challenge(out)
	if err != nil {
		return err
	}
	var r popResponse
	if err := decodePayload(data, &r); err != nil {
		return err
	}
	combined := func(theirs []byte) []byte {
		sum := sha256.Sum256(slices.Concat(nonce, theirs))
		return sum[:]
	}
	ok := false
	switch key := leaf.PublicKey.(type) {
	case *rsa.PublicKey:
		ok = r.RSA != nil && len(r.RSA.Nonce) == nonceLen && len(r.RSA.Signature) <= maxSigLen &&
			rsa.VerifyPSS(key, crypto.SHA256, combined(r.RSA.Nonce), r.RSA.Signature, nil) == nil
	case *ecdsa.PublicKey:
		ok = r.ECDSA != nil && len(r.ECDSA.Nonce) == nonceLen && len(r.ECDSA.R) <= maxSigLen && len(r.ECDSA.S) <= maxSigLen &&
			ecdsa.Verify(key, combined(r.ECDSA.Nonce), new(big.Int).SetBytes(r.ECDSA.R), new(big.Int).SetBytes(r.ECDSA.S))
	}
	if !ok {
		return refused("the signature of the nonce is not by the certificate's key")
	}
	return nil
}

func fingerprint(c *x509.Certificate) string {
	sum := sha1.Sum(c.Raw) // #nosec G401 -- a name
	return hex.EncodeToString(sum[:])
}

// serialHex has an even number of digits, as SPIRE writes it.
func serialHex(n *big.Int) string {
	s := n.Text(16)
	if len(s)%2 == 1 {
		s = "0" + s
	}
	return s
}
