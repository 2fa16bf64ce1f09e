package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"net/url"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// leafKeys are of each kind that a workload may bring.
var leafKeys = sync.OnceValue(func() []crypto.PublicKey {
	var out []crypto.PublicKey
	for _, c := range []elliptic.Curve{elliptic.P256(), elliptic.P384(), elliptic.P521()} {
		key, err := ecdsa.GenerateKey(c, rand.Reader)
		if err != nil {
			panic(err)
		}
		out = append(out, key.Public())
	}
	r, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	e, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		panic(err)
	}
	return append(out, r.Public(), e)
})

// leafRoots sign with each curve that a root may have.
var leafRoots = sync.OnceValue(func() []*root {
	var out []*root
	for _, c := range []elliptic.Curve{elliptic.P256(), elliptic.P384()} {
		key, err := ecdsa.GenerateKey(c, rand.Reader)
		if err != nil {
			panic(err)
		}
		now := time.Now()
		template, err := caTemplate(Config{TrustDomain: spiffeid.RequireTrustDomainFromString("west.demo")}, now, now.Add(time.Hour))
		if err != nil {
			panic(err)
		}
		der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
		if err != nil {
			panic(err)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			panic(err)
		}
		out = append(out, &root{key: key, cert: cert})
	}
	return out
})

// checkLeafDER compares a leaf with what crypto/x509 makes of the same template: the same bytes are signed, or both refuse.
func checkLeafDER(t *testing.T, r *root, l leaf) {
	t.Helper()
	got, err := r.sign(l)
	uri, uriErr := url.Parse(l.uri)
	if uriErr != nil || uri.String() != l.uri {
		return // no SPIFFE ID; the caller has one
	}
	want, wantErr := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber:          l.serial,
		Subject:               pkix.Name{Organization: []string{"Hanse"}},
		NotBefore:             l.notBefore,
		NotAfter:              l.notAfter,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
		URIs:                  []*url.URL{uri},
		DNSNames:              l.dnsNames,
	}, r.cert, l.key, r.key)
	if (err == nil) != (wantErr == nil) {
		t.Fatalf("error %v, crypto/x509's is %v", err, wantErr)
	}
	if err != nil {
		return
	}
	w, wantErr := x509.ParseCertificate(want)
	g, err := x509.ParseCertificate(got)
	if (err == nil) != (wantErr == nil) {
		t.Fatalf("parse: error %v, crypto/x509's is %v", err, wantErr)
	}
	if err != nil {
		return
	}
	if !bytes.Equal(g.RawTBSCertificate, w.RawTBSCertificate) {
		t.Fatalf("signed\n%x, crypto/x509 signs\n%x", g.RawTBSCertificate, w.RawTBSCertificate)
	}
	if err := g.CheckSignatureFrom(r.cert); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(g.Raw, got) || g.SignatureAlgorithm != w.SignatureAlgorithm {
		t.Fatalf("signed by %v, %d of %d bytes are the certificate", g.SignatureAlgorithm, len(g.Raw), len(got))
	}
}

// What is encoded here by hand is, byte for byte, what crypto/x509 encodes.
func TestLeafIsThatOfCryptoX509(t *testing.T) {
	now := time.Date(2026, 11, 27, 2, 3, 4, 5, time.FixedZone("x", 3600))
	for _, r := range leafRoots() {
		for _, key := range leafKeys() {
			for _, l := range []leaf{
				{serial: big.NewInt(1), notBefore: now, notAfter: now.Add(time.Hour), uri: "spiffe://west.demo/ns/shop/sa/frontend"},
				{serial: new(big.Int).Lsh(big.NewInt(255), 120), notBefore: now, notAfter: now.AddDate(30, 0, 0), uri: "spiffe://west.demo/x"},
				{serial: big.NewInt(128), notBefore: time.Date(1949, 1, 1, 0, 0, 0, 0, time.UTC), notAfter: now, uri: "spiffe://west.demo/x", dnsNames: []string{"a.example", "b"}},
				{serial: big.NewInt(128), notBefore: now, notAfter: now, uri: "spiffe://west.demo/x", dnsNames: []string{"bücher.example"}},
			} {
				l.key = key
				checkLeafDER(t, r, l)
			}
		}
	}
}

func FuzzLeaf(f *testing.F) {
	f.Add("spiffe://west.demo/ns/shop/sa/frontend", "", []byte{1}, int64(1795744984), int64(1795748584), uint8(0))
	f.Add("spiffe://west.demo/x", "a.example", []byte{255, 1}, int64(-1), int64(4102444800), uint8(9))
	f.Fuzz(func(t *testing.T, uri, name string, serial []byte, from, to int64, choice uint8) {
		if len(serial) > 20 {
			serial = serial[:20]
		}
		l := leaf{serial: new(big.Int).SetBytes(serial), notBefore: time.Unix(from, 0), notAfter: time.Unix(to, 0), key: leafKeys()[int(choice/2)%len(leafKeys())], uri: uri}
		if name != "" {
			l.dnsNames = []string{name, name}
		}
		checkLeafDER(t, leafRoots()[choice%2], l)
	})
}

// TestFaultySignature: with one bit of a key flipped nothing that it signs leaves.
func TestFaultySignature(t *testing.T) {
	for _, r := range leafRoots() {
		now := time.Now()
		good := &root{key: r.key, cert: r.cert, jwtKey: r.key, kid: "k"}
		raw, err := r.key.Bytes()
		if err != nil {
			t.Fatal(err)
		}
		raw[20] ^= 1
		flipped, err := ecdsa.ParseRawPrivateKey(r.key.Curve, raw)
		if err != nil {
			t.Fatal(err)
		}
		flipped.PublicKey = r.key.PublicKey
		for _, c := range []struct {
			root *root
			want error
		}{{good, nil}, {&root{key: flipped, cert: r.cert, jwtKey: flipped, kid: "k"}, errFault}} {
			l := leaf{serial: big.NewInt(1), notBefore: now, notAfter: now.Add(time.Hour), key: leafKeys()[0], uri: "spiffe://west.demo/ns/shop/sa/app"}
			if der, err := c.root.sign(l); !errors.Is(err, c.want) || (err == nil) != (der != nil) {
				t.Errorf("%s: X509-SVID of %d bytes, %v, want %v", r.key.Params().Name, len(der), err, c.want)
			}
			if j, err := c.root.signJWT(jwt.Claims{Subject: l.uri}); !errors.Is(err, c.want) || (err == nil) != (j != "") {
				t.Errorf("%s: JWT-SVID %.20q, %v, want %v", r.key.Params().Name, j, err, c.want)
			}
		}
	}
}

// BenchmarkSignatureCheck is what a signature costs without its check, and the check alone.
func BenchmarkSignatureCheck(b *testing.B) {
	digest := make([]byte, 48)
	for _, r := range leafRoots() {
		digest := digest[:r.key.Params().BitSize/8]
		signature, err := ecdsa.SignASN1(rand.Reader, r.key, digest)
		if err != nil {
			b.Fatal(err)
		}
		b.Run(r.key.Params().Name+"/sign", func(b *testing.B) {
			for b.Loop() {
				if _, err := ecdsa.SignASN1(rand.Reader, r.key, digest); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(r.key.Params().Name+"/check", func(b *testing.B) {
			for b.Loop() {
				if !ecdsa.VerifyASN1(&r.key.PublicKey, digest, signature) {
					b.Fatal("it does not verify")
				}
			}
		})
	}
}
