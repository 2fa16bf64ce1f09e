package attest_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hanse-mesh/hanse/identity/attest"
)

// device is a certificate and its key.
type device struct {
	cert *x509.Certificate
	key  crypto.Signer
}

var popTime = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func newDevice(t testing.TB, key crypto.Signer, issuer *device, edit func(*x509.Certificate)) *device {
	t.Helper()
	template := &x509.Certificate{SerialNumber: big.NewInt(0xabc), Subject: pkix.Name{CommonName: "rack 7"}, NotBefore: popTime.Add(-time.Hour), NotAfter: popTime.Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true}
	if edit != nil {
		edit(template)
	}
	d := &device{key: key}
	parent := template
	signer := key
	if issuer != nil {
		parent, signer = issuer.cert, issuer.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	check(t, err)
	d.cert, err = x509.ParseCertificate(der)
	check(t, err)
	return d
}

func isCA(c *x509.Certificate) { c.IsCA, c.KeyUsage = true, x509.KeyUsageCertSign }

func ecKey(t testing.TB, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	check(t, err)
	return key
}

func payload(t testing.TB, certs ...*x509.Certificate) []byte {
	t.Helper()
	var ders [][]byte
	for _, c := range certs {
		ders = append(ders, c.Raw)
	}
	data, err := json.Marshal(map[string]any{"certificates": ders})
	check(t, err)
	return data
}

// answer is what SPIRE's agent plugin answers with a key.
func answer(t testing.TB, key crypto.Signer) attest.Challenge {
	return func(challenge []byte) ([]byte, error) {
		var c map[string]*struct{ Nonce []byte }
		check(t, json.Unmarshal(challenge, &c))
		nonce := make([]byte, 32)
		rand.Read(nonce)
		switch key := key.(type) {
		case *rsa.PrivateKey:
			if c["rsa_signature"] == nil || c["ecdsa_signature"] != nil {
				t.Errorf("challenge %s", challenge)
				return nil, errors.New("no RSA challenge")
			}
			sum := sha256.Sum256(slices.Concat(c["rsa_signature"].Nonce, nonce))
			sig, err := rsa.SignPSS(rand.Reader, key, crypto.SHA256, sum[:], nil)
			check(t, err)
			return json.Marshal(map[string]any{"rsa_signature": map[string][]byte{"nonce": nonce, "signature": sig}})
		case *ecdsa.PrivateKey:
			sum := sha256.Sum256(slices.Concat(c["ecdsa_signature"].Nonce, nonce))
			r, s, err := ecdsa.Sign(rand.Reader, key, sum[:])
			check(t, err)
			return json.Marshal(map[string]any{"ecdsa_signature": map[string][]byte{"nonce": nonce, "r": r.Bytes(), "s": s.Bytes()}})
		}
		return nil, errors.New("no such key")
	}
}

func TestX509Pop(t *testing.T) {
	root := newDevice(t, ecKey(t, elliptic.P256()), nil, isCA)
	middle := newDevice(t, ecKey(t, elliptic.P384()), root, isCA)
	p := attest.NewX509Pop(west, []*x509.Certificate{root.cert}, func() time.Time { return popTime })
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	check(t, err)
	for name, d := range map[string]*device{
		"RSA":   newDevice(t, rsaKey, middle, nil),
		"P-256": newDevice(t, ecKey(t, elliptic.P256()), middle, nil),
		"P-384": newDevice(t, ecKey(t, elliptic.P384()), middle, nil),
	} {
		e, err := p.Attest(t.Context(), payload(t, d.cert, middle.cert), answer(t, d.key))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if !strings.HasPrefix(e.AgentID.String(), "spiffe://west.demo/spire/agent/x509pop/") || !e.Entry.IsZero() || len(e.Selectors) != 4 ||
			e.Selectors[0] != "subject:cn:rack 7" || !slices.Contains(e.Selectors, "serialnumber:0abc") {
			t.Errorf("%s: %+v", name, e)
		}
	}
}

// Each is refused, and the agent is told why.
func TestX509PopRefusals(t *testing.T) {
	root := newDevice(t, ecKey(t, elliptic.P256()), nil, isCA)
	p := attest.NewX509Pop(west, []*x509.Certificate{root.cert}, func() time.Time { return popTime })
	key := ecKey(t, elliptic.P256())
	good := newDevice(t, key, root, nil)
	stranger := newDevice(t, ecKey(t, elliptic.P256()), nil, isCA)
	weakRSA := newDevice(t, weakRSAKey(t), root, nil)
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	check(t, err)
	var replay []byte
	_, err = p.Attest(t.Context(), payload(t, good.cert), func(c []byte) ([]byte, error) {
		r, err := answer(t, key)(c)
		replay = r
		return r, err
	})
	check(t, err)
	fixed := func(s string) attest.Challenge { return func([]byte) ([]byte, error) { return []byte(s), nil } }
	for name, c := range map[string]struct {
		payload   []byte
		challenge attest.Challenge
		want      string
	}{
		"another's certificate without its key": {payload(t, good.cert), answer(t, ecKey(t, elliptic.P256())), "not by the certificate's key"},
		"a replayed answer":                     {payload(t, good.cert), fixed(string(replay)), "not by the certificate's key"},
		"an empty answer":                       {payload(t, good.cert), fixed("{}"), "not by the certificate's key"},
		"noise for an answer":                   {payload(t, good.cert), fixed("noise"), "does not decode"},
		"a stranger's certificate":              {payload(t, newDevice(t, key, stranger, nil).cert, stranger.cert), answer(t, key), "verification failed"},
		"an expired certificate":                {payload(t, newDevice(t, key, root, func(c *x509.Certificate) { c.NotAfter = popTime.Add(-time.Minute) }).cert), answer(t, key), "expired"},
		"the CA itself":                         {payload(t, root.cert), answer(t, root.key), "is a CA's"},
		"no digital signatures":                 {payload(t, newDevice(t, key, root, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment }).cert), answer(t, key), "not intended"},
		"RSA of 1024 bits":                      {payload(t, weakRSA.cert), answer(t, weakRSA.key), "1024 bits"},
		"P-224":                                 {payload(t, newDevice(t, ecKey(t, elliptic.P224()), root, nil).cert), answer(t, key), "P-224"},
		"Ed25519":                               {payload(t, newDevice(t, ed, root, nil).cert), answer(t, ed), "ed25519"},
		"no certificate":                        {payload(t), answer(t, key), "0 certificates"},
		"too many":                              {payload(t, slices.Repeat([]*x509.Certificate{good.cert}, 9)...), answer(t, key), "9 certificates"},
		"noise for a certificate":               {[]byte(`{"certificates":["bm9pc2U="]}`), answer(t, key), "certificate 0"},
		"noise":                                 {[]byte("noise"), answer(t, key), "does not decode"},
		"a novel":                               {make([]byte, 1<<20), answer(t, key), "larger than"},
	} {
		if _, err := p.Attest(t.Context(), c.payload, c.challenge); !errors.Is(err, attest.ErrRefused) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want a refusal with %q", name, err, c.want)
		}
	}
	broken := errors.New("stream broken")
	if _, err := p.Attest(t.Context(), payload(t, good.cert), func([]byte) ([]byte, error) { return nil, broken }); !errors.Is(err, broken) || errors.Is(err, attest.ErrRefused) {
		t.Errorf("a broken stream: %v", err)
	}
}

// weakRSAKey has 1024 bits, which crypto/rsa makes no more without being asked to.
func weakRSAKey(t *testing.T) *rsa.PrivateKey {
	t.Helper()
	t.Setenv("GODEBUG", "rsa1024min=0")
	key, err := rsa.GenerateKey(rand.Reader, 1024)
	check(t, err)
	return key
}

func FuzzX509Pop(f *testing.F) {
	key := ecKey(f, elliptic.P256())
	root := newDevice(f, key, nil, isCA)
	d := newDevice(f, key, root, nil)
	p := attest.NewX509Pop(west, []*x509.Certificate{root.cert}, func() time.Time { return popTime })
	f.Add(payload(f, d.cert), []byte(`{"ecdsa_signature":{"nonce":"AA==","r":"AA==","s":"AA=="}}`))
	f.Add([]byte(`{"certificates":[null]}`), []byte(`{"rsa_signature":{}}`))
	f.Fuzz(func(t *testing.T, payload, response []byte) {
		if e, err := p.Attest(context.Background(), payload, func([]byte) ([]byte, error) { return response, nil }); err == nil {
			t.Errorf("accepted %+v", e)
		}
	})
}
