package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"io"
	"math/big"
	"time"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// leaf is what differs from one X509-SVID to the next.
type leaf struct {
	serial              *big.Int // positive
	notBefore, notAfter time.Time
	key                 crypto.PublicKey
	uri                 string
	dnsNames            []string
}

var (
	oidKeyUsage         = asn1.ObjectIdentifier{2, 5, 29, 15}
	oidExtKeyUsage      = asn1.ObjectIdentifier{2, 5, 29, 37}
	oidBasicConstraints = asn1.ObjectIdentifier{2, 5, 29, 19}
	oidAuthorityKeyID   = asn1.ObjectIdentifier{2, 5, 29, 35}
	oidSubjectAltName   = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidServerAuth       = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 1}
	oidClientAuth       = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 2}
	oidOrganization     = asn1.ObjectIdentifier{2, 5, 4, 10}
	oidECDSAWithSHA256  = asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 2}
	oidECDSAWithSHA384  = asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 3}

	// What all leaves have alike.
	leafSubject    = must(leafSubjectDER)
	leafExtensions = must(leafExtensionsDER)
)

func must(f func(*cryptobyte.Builder)) []byte {
	var b cryptobyte.Builder
	f(&b)
	return b.BytesOrPanic()
}

// sign returns the certificate of l, byte for byte what x509.CreateCertificate makes of the same template but for the signature, in less time: it
// encodes what all leaves share once.
func (r *root) sign(l leaf) ([]byte, error) {
	hash, algorithm := crypto.SHA256, oidECDSAWithSHA256
	if r.key.Curve == elliptic.P384() {
		hash, algorithm = crypto.SHA384, oidECDSAWithSHA384
	}
	spki, err := x509.MarshalPKIXPublicKey(l.key)
	if err != nil {
		return nil, err
	}
	for _, name := range append([]string{l.uri}, l.dnsNames...) {
		for i := range len(name) {
			if name[i] > 0x7f {
				return nil, fmt.Errorf("name %q is not ASCII", name)
			}
		}
	}
	addAlgorithm := func(b *cryptobyte.Builder) {
		b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) { b.AddASN1ObjectIdentifier(algorithm) })
	}
	tbs := cryptobyte.NewBuilder(make([]byte, 0, 1024))
	tbs.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1(cbasn1.Tag(0).ContextSpecific().Constructed(), func(b *cryptobyte.Builder) { b.AddASN1Int64(2) })
		b.AddASN1BigInt(l.serial)
		addAlgorithm(b)
		b.AddBytes(r.cert.RawSubject)
		b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
			addTime(b, l.notBefore)
			addTime(b, l.notAfter)
		})
		b.AddBytes(leafSubject)
		b.AddBytes(spki)
		b.AddASN1(cbasn1.Tag(3).ContextSpecific().Constructed(), func(b *cryptobyte.Builder) {
			b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
				b.AddBytes(leafExtensions)
				addExtension(b, oidAuthorityKeyID, false, func(b *cryptobyte.Builder) {
					b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
						b.AddASN1(cbasn1.Tag(0).ContextSpecific(), func(b *cryptobyte.Builder) { b.AddBytes(r.cert.SubjectKeyId) })
					})
				})
				addExtension(b, oidSubjectAltName, false, func(b *cryptobyte.Builder) {
					b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
						for _, name := range l.dnsNames {
							b.AddASN1(cbasn1.Tag(2).ContextSpecific(), func(b *cryptobyte.Builder) { b.AddBytes([]byte(name)) })
						}
						b.AddASN1(cbasn1.Tag(6).ContextSpecific(), func(b *cryptobyte.Builder) { b.AddBytes([]byte(l.uri)) })
					})
				})
			})
		})
	})
	der, err := tbs.Bytes()
	if err != nil {
		return nil, err
	}
	h := hash.New()
	h.Write(der)
	signature, err := checkedKey{r.key}.Sign(rand.Reader, h.Sum(nil), hash)
	if err != nil {
		return nil, err
	}
	cert := cryptobyte.NewBuilder(make([]byte, 0, len(der)+256))
	cert.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddBytes(der)
		addAlgorithm(b)
		b.AddASN1BitString(signature)
	})
	return cert.Bytes()
}

// checkedKey is a crypto.Signer whose signatures verify. Each that is made with a bit of the key flipped, in memory or on its way through the
// processor, tells whoever gets it that bit, random nonces or not: none may leave. crypto/x509 checks for the same reason, jose does not.
type checkedKey struct{ *ecdsa.PrivateKey }

var errFault = errors.New("a signature that was just made does not verify, and is withheld: this machine's memory or processor is faulty, or the key was changed in it")

// Sign implements crypto.Signer.
func (k checkedKey) Sign(random io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	signature, err := k.PrivateKey.Sign(random, digest, opts)
	if err == nil && !ecdsa.VerifyASN1(&k.PublicKey, digest, signature) {
		return nil, errFault
	}
	return signature, err
}

// addTime writes a time as RFC 5280 §4.1.2.5 has it: UTCTime through 2049.
func addTime(b *cryptobyte.Builder, t time.Time) {
	if t = t.UTC(); t.Year() >= 1950 && t.Year() < 2050 {
		b.AddASN1UTCTime(t)
		return
	}
	b.AddASN1GeneralizedTime(t)
}

func addExtension(b *cryptobyte.Builder, id asn1.ObjectIdentifier, critical bool, value func(*cryptobyte.Builder)) {
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1ObjectIdentifier(id)
		if critical {
			b.AddASN1Boolean(true)
		}
		b.AddASN1(cbasn1.OCTET_STRING, value)
	})
}

func leafSubjectDER(b *cryptobyte.Builder) {
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1(cbasn1.SET, func(b *cryptobyte.Builder) {
			b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
				b.AddASN1ObjectIdentifier(oidOrganization)
				b.AddASN1(cbasn1.PrintableString, func(b *cryptobyte.Builder) { b.AddBytes([]byte("Hanse")) })
			})
		})
	})
}

// leafExtensionsDER is key usage digitalSignature, extended key usage for both ends of TLS, and that this is no CA (X509-SVID §4).
func leafExtensionsDER(b *cryptobyte.Builder) {
	addExtension(b, oidKeyUsage, true, func(b *cryptobyte.Builder) {
		b.AddASN1(cbasn1.BIT_STRING, func(b *cryptobyte.Builder) { b.AddBytes([]byte{7, 0x80}) })
	})
	addExtension(b, oidExtKeyUsage, false, func(b *cryptobyte.Builder) {
		b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
			b.AddASN1ObjectIdentifier(oidServerAuth)
			b.AddASN1ObjectIdentifier(oidClientAuth)
		})
	})
	addExtension(b, oidBasicConstraints, true, func(b *cryptobyte.Builder) { b.AddASN1(cbasn1.SEQUENCE, func(*cryptobyte.Builder) {}) })
}
