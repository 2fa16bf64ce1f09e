package identity_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base64"
	"fmt"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/identity/bundle"
)

// The rules of the X509-SVID standard, one test after another in its order, and the tricks with chains and names that they
// are there against. Each makes certificates that break one rule and no other.

// signer is a certificate and its key.
type signer struct {
	cert *x509.Certificate
	key  crypto.Signer
}

func uris(t testing.TB, ids ...string) []*url.URL {
	t.Helper()
	var out []*url.URL
	for _, id := range ids {
		u, err := url.Parse(id)
		check(t, err)
		out = append(out, u)
	}
	return out
}

// issue signs a template; with issuer nil it is self-signed.
func issue(t testing.TB, template *x509.Certificate, issuer *signer) *signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(t, err)
	return issueFor(t, key, template, issuer)
}

func issueFor(t testing.TB, key crypto.Signer, template *x509.Certificate, issuer *signer) *signer {
	t.Helper()
	template.SerialNumber, _ = rand.Int(rand.Reader, big.NewInt(1<<62))
	if template.NotAfter.IsZero() {
		template.NotBefore, template.NotAfter = time.Now().Add(-time.Minute), time.Now().Add(time.Hour)
	}
	by := issuer
	if by == nil {
		by = &signer{cert: template, key: key}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, by.cert, key.Public(), by.key)
	check(t, err)
	cert, err := x509.ParseCertificate(der)
	check(t, err)
	return &signer{cert, key}
}

func authority(t testing.TB, ids ...string) *x509.Certificate {
	return &x509.Certificate{Subject: pkix.Name{CommonName: "authority " + rand.Text()}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, URIs: uris(t, ids...)}
}

func leaf(t testing.TB, ids ...string) *x509.Certificate {
	return &x509.Certificate{Subject: pkix.Name{CommonName: "leaf"}, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}, URIs: uris(t, ids...)}
}

// world has the roots of two trust domains in one Source.
type world struct {
	src        *identity.Source
	west, east *signer
}

func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{src: identity.NewSource(), west: issue(t, authority(t, "spiffe://west.demo"), nil), east: issue(t, authority(t, "spiffe://east.demo"), nil)}
	w.trust(t, w.west, w.east)
	return w
}

func (w *world) trust(t testing.TB, west, east *signer) {
	m := map[spiffeid.TrustDomain]*spiffebundle.Bundle{}
	for name, s := range map[string]*signer{"west.demo": west, "east.demo": east} {
		td := spiffeid.RequireTrustDomainFromString(name)
		m[td] = spiffebundle.FromX509Authorities(td, []*x509.Certificate{s.cert})
	}
	w.src.SetBundles(m)
}

const caller = "spiffe://west.demo/ns/shop/sa/frontend"

func (w *world) accepts(t *testing.T, what string, chain ...*signer) {
	t.Helper()
	if id, err := w.src.Verify(certs(chain)); err != nil || id.String() != caller {
		t.Errorf("%s: %v, %v", what, id, err)
	}
}

func (w *world) refuses(t *testing.T, what, why string, chain ...*signer) {
	t.Helper()
	if _, err := w.src.Verify(certs(chain)); err == nil || !strings.Contains(err.Error(), why) {
		t.Errorf("%s: %v, want a refusal with %q", what, err, why)
	}
}

func certs(chain []*signer) []*x509.Certificate {
	var out []*x509.Certificate
	for _, s := range chain {
		out = append(out, s.cert)
	}
	return out
}

func TestX509SVID_2_ExactlyOneURISAN(t *testing.T) {
	w := newWorld(t)
	w.accepts(t, "one", issue(t, leaf(t, caller), w.west))
	w.refuses(t, "none", "no URI SAN", issue(t, leaf(t), w.west))
	w.refuses(t, "two IDs", "more than one URI SAN", issue(t, leaf(t, caller, "spiffe://west.demo/ns/bank/sa/vault"), w.west))
	w.refuses(t, "another URI beside it", "more than one URI SAN", issue(t, leaf(t, caller, "https://west.demo"), w.west))
	w.refuses(t, "the same twice", "more than one URI SAN", issue(t, leaf(t, caller, caller), w.west))
}

func TestX509SVID_2_OtherSANsAreAllowed(t *testing.T) {
	w := newWorld(t)
	l := leaf(t, caller)
	l.DNSNames = []string{"frontend.shop", "east.demo"}
	w.accepts(t, "DNS names", issue(t, l, w.west))
}

func TestX509SVID_3_1_LeafIDHasAPath(t *testing.T) {
	w := newWorld(t)
	w.refuses(t, "the trust domain itself", "§3.1", issue(t, leaf(t, "spiffe://west.demo"), w.west))
}

func TestX509SVID_3_2_SigningCertificateIDHasNoPath(t *testing.T) {
	w := newWorld(t)
	between := issue(t, authority(t, "spiffe://west.demo/ns/shop/sa/ca"), w.west)
	w.refuses(t, "an intermediate with a workload's ID", "§3.2", issue(t, leaf(t, caller), between), between)
	for _, id := range []string{"spiffe://west.demo", ""} {
		a := authority(t)
		if id != "" {
			a.URIs = uris(t, id)
		}
		good := issue(t, a, w.west)
		w.accepts(t, "an intermediate of "+id, issue(t, leaf(t, caller), good), good)
	}
}

func TestX509SVID_3_2_SigningCertificatesDoNotAuthenticate(t *testing.T) {
	w := newWorld(t)
	w.refuses(t, "a root", "", w.west)
	w.refuses(t, "an intermediate with a workload's ID", "CA flag", issue(t, authority(t, caller), w.west))
}

func TestX509SVID_4_1_SigningCertificateIsACA(t *testing.T) {
	w := newWorld(t)
	workload := issue(t, leaf(t, caller), w.west) // which signs for others
	w.refuses(t, "a workload signs", "", issue(t, leaf(t, caller), workload), workload)
	a := authority(t, "spiffe://west.demo")
	a.IsCA = false
	between := issue(t, a, w.west)
	w.refuses(t, "keyCertSign without the CA flag", "", issue(t, leaf(t, caller), between), between)
}

func TestX509SVID_4_1_PathLengthIsObeyed(t *testing.T) {
	w := newWorld(t)
	a := authority(t, "spiffe://west.demo")
	a.MaxPathLen, a.MaxPathLenZero = 0, true
	last := issue(t, a, w.west)
	w.accepts(t, "a leaf below pathLen 0", issue(t, leaf(t, caller), last), last)
	more := issue(t, authority(t, "spiffe://west.demo"), last)
	w.refuses(t, "a CA below pathLen 0", "too many intermediates", issue(t, leaf(t, caller), more), more, last)
}

func TestX509SVID_4_2_NameConstraintsAreObeyed(t *testing.T) {
	w := newWorld(t)
	a := authority(t, "spiffe://west.demo")
	a.PermittedURIDomains = []string{"east.demo"}
	between := issue(t, a, w.west)
	w.refuses(t, "an ID outside of the permitted names", "not permitted", issue(t, leaf(t, caller), between), between)
	a = authority(t, "spiffe://west.demo")
	a.ExcludedURIDomains = []string{"west.demo"}
	between = issue(t, a, w.west)
	w.refuses(t, "an ID in the excluded names", "excluded", issue(t, leaf(t, caller), between), between)
	a = authority(t, "spiffe://west.demo")
	a.PermittedURIDomains = []string{"west.demo"}
	between = issue(t, a, w.west)
	w.accepts(t, "an ID within the permitted names", issue(t, leaf(t, caller), between), between)

	// The constraint is on a certificate further up, and one below it names more.
	a = authority(t, "spiffe://west.demo")
	a.PermittedURIDomains = []string{"west.demo", "east.demo"}
	upper := authority(t, "spiffe://east.demo")
	upper.PermittedURIDomains = []string{"east.demo"}
	top := issue(t, upper, w.west)
	wider := issue(t, a, top)
	w.refuses(t, "a wider constraint below a narrow one", "not permitted", issue(t, leaf(t, caller), wider), wider, top)

	// A host in the permitted domain is not the domain: a leading dot would be needed, and is another rule.
	a = authority(t, "spiffe://west.demo")
	a.PermittedURIDomains = []string{".west.demo"}
	between = issue(t, a, w.west)
	w.refuses(t, "only hosts below the domain", "not permitted", issue(t, leaf(t, caller), between), between)
}

// A constraint of a kind that is not understood, and critical, refuses rather than being passed over.
func TestX509SVID_4_2_UnknownCriticalExtensionsAreRefused(t *testing.T) {
	w := newWorld(t)
	l := leaf(t, caller)
	l.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 99999, 1}, Critical: true, Value: []byte{5, 0}}}
	w.refuses(t, "on the leaf", "unhandled critical extension", issue(t, l, w.west))
	a := authority(t, "spiffe://west.demo")
	a.ExtraExtensions = l.ExtraExtensions
	between := issue(t, a, w.west)
	w.refuses(t, "on an intermediate", "unhandled critical extension", issue(t, leaf(t, caller), between), between)
}

func TestX509SVID_4_3_LeafKeyUsage(t *testing.T) {
	w := newWorld(t)
	for name, c := range map[string]struct {
		usage x509.KeyUsage
		why   string
	}{
		"keyCertSign":                 {x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, "KeyCertSign"},
		"cRLSign":                     {x509.KeyUsageDigitalSignature | x509.KeyUsageCRLSign, "KeyCrlSign"},
		"digitalSignature is missing": {x509.KeyUsageKeyEncipherment, "digitalSignature"},
		"no key usage":                {0, "digitalSignature"},
	} {
		l := leaf(t, caller)
		l.KeyUsage = c.usage
		w.refuses(t, name, c.why, issue(t, l, w.west))
	}
	l := leaf(t, caller)
	l.KeyUsage |= x509.KeyUsageKeyEncipherment | x509.KeyUsageKeyAgreement
	w.accepts(t, "keyEncipherment and keyAgreement, as SPIRE sets them", issue(t, l, w.west))
}

func TestX509SVID_4_3_KeyUsageIsCritical(t *testing.T) {
	w := newWorld(t)
	l := leaf(t, caller)
	l.KeyUsage = 0
	l.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 15}, Critical: false, Value: []byte{3, 2, 7, 0x80}}}
	w.refuses(t, "not critical", "not critical", issue(t, l, w.west))
}

func TestX509SVID_4_3_SigningCertificateHasKeyCertSign(t *testing.T) {
	w := newWorld(t)
	for name, usage := range map[string]x509.KeyUsage{"none": 0, "cRLSign only": x509.KeyUsageCRLSign, "digitalSignature only": x509.KeyUsageDigitalSignature} {
		a := authority(t, "spiffe://west.demo")
		a.KeyUsage = usage
		between := issue(t, a, w.west)
		w.refuses(t, "key usage "+name, "", issue(t, leaf(t, caller), between), between)
	}
}

func TestX509SVID_4_4_ExtendedKeyUsageHasServerAndClientAuth(t *testing.T) {
	w := newWorld(t)
	for name, eku := range map[string][]x509.ExtKeyUsage{
		"serverAuth only": {x509.ExtKeyUsageServerAuth}, "clientAuth only": {x509.ExtKeyUsageClientAuth}, "code signing": {x509.ExtKeyUsageCodeSigning},
	} {
		l := leaf(t, caller)
		l.ExtKeyUsage = eku
		w.refuses(t, name, "§4.4", issue(t, l, w.west))
	}
	l := leaf(t, caller)
	l.ExtKeyUsage = nil
	w.accepts(t, "none at all", issue(t, l, w.west))
}

func TestX509SVID_5_1_PathValidation(t *testing.T) {
	w := newWorld(t)
	between := issue(t, authority(t, "spiffe://west.demo"), w.west)
	l := issue(t, leaf(t, caller), between)
	w.accepts(t, "leaf and intermediate", l, between)
	w.refuses(t, "the intermediate is missing", "unknown authority", l)
	w.refuses(t, "a stranger's intermediate in its place", "unknown authority", l, issue(t, authority(t, "spiffe://west.demo"), w.west))

	stranger := issue(t, authority(t, "spiffe://west.demo"), nil)
	w.refuses(t, "a stranger's root of the same name, sent along", "unknown authority", issue(t, leaf(t, caller), stranger), stranger)

	// The stranger copies name and key ID of our root.
	copied := *w.west.cert
	twin := authority(t, "spiffe://west.demo")
	twin.RawSubject, twin.Subject, twin.SubjectKeyId = copied.RawSubject, copied.Subject, copied.SubjectKeyId
	forged := issue(t, twin, nil)
	w.refuses(t, "a root with our root's name and key ID", "", issue(t, leaf(t, caller), forged), forged)
	w.refuses(t, "the same, with our root sent along", "", issue(t, leaf(t, caller), forged), w.west)

	past := leaf(t, caller)
	past.NotBefore, past.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
	w.refuses(t, "expired", "expired", issue(t, past, w.west))
	future := leaf(t, caller)
	future.NotBefore, future.NotAfter = time.Now().Add(time.Hour), time.Now().Add(2*time.Hour)
	w.refuses(t, "not valid yet", "not yet valid", issue(t, future, w.west))
	a := authority(t, "spiffe://west.demo")
	a.NotBefore, a.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
	ended := issue(t, a, w.west)
	w.refuses(t, "an intermediate that has expired", "expired", issue(t, leaf(t, caller), ended), ended)

	broken := *issue(t, leaf(t, caller), w.west)
	raw := append([]byte(nil), broken.cert.Raw...)
	raw[len(raw)-1] ^= 1
	c, err := x509.ParseCertificate(raw)
	check(t, err)
	w.refuses(t, "a signature with one bit turned", "", &signer{cert: c})

	long := []*signer{l, between}
	for len(long) < 11 {
		long = append(long, between)
	}
	w.refuses(t, "a chain without end", "certificates, at most", long...)
}

func TestX509SVID_5_2_TheLeafsTrustDomainPicksTheBundle(t *testing.T) {
	w := newWorld(t)
	w.refuses(t, "a foreign domain's root claims our ID", "unknown authority", issue(t, leaf(t, caller), w.east))
	between := issue(t, authority(t, "spiffe://west.demo"), w.east)
	w.refuses(t, "a foreign root signs an intermediate of our domain", "unknown authority", issue(t, leaf(t, caller), between), between)
	w.refuses(t, "the same, with our root sent along", "unknown authority", issue(t, leaf(t, caller), between), between, w.west)
	w.refuses(t, "a domain that nobody federates with", "north.demo", issue(t, leaf(t, "spiffe://north.demo/x"), w.west))
	for _, id := range []string{"spiffe://west.demo.east.demo/ns/shop/sa/frontend", "spiffe://WEST.demo/ns/shop/sa/frontend", "spiffe://west.demo:443/ns/shop/sa/frontend", "spiffe://east.demo@west.demo/x"} {
		w.refuses(t, id, "", issue(t, leaf(t, id), w.east))
	}
}

func TestX509SVID_5_2_TheSchemeIsSPIFFE(t *testing.T) {
	w := newWorld(t)
	for _, id := range []string{"https://west.demo/ns/shop/sa/frontend", "urn:west.demo:frontend", "spiffe:west.demo/x", "spiffes://west.demo/x", "//west.demo/x"} {
		w.refuses(t, id, "", issue(t, leaf(t, id), w.west))
	}
}

// SPIFFE-ID §2: what Go's URL parser would forgive.
func TestX509SVID_5_2_TheIDIsWellFormed(t *testing.T) {
	w := newWorld(t)
	for _, id := range []string{caller + "/", caller + "?admin", caller + "#x", "spiffe://west.demo/ns/../x", "spiffe://west.demo/ns/./x", "spiffe://west.demo//ns/x", "spiffe://west.demo/ns/%61"} {
		w.refuses(t, id, "", issue(t, leaf(t, id), w.west))
	}
}

// SPIFFE leaves X.509 keys open: a foreign SVID with an Ed25519 key is verified (ours never have one), a JWT's is not.
func TestX509SVID_Ed25519(t *testing.T) {
	w := newWorld(t)
	_, key, err := ed25519.GenerateKey(rand.Reader)
	check(t, err)
	w.accepts(t, "a foreign leaf", issueFor(t, key, leaf(t, caller), w.west))
}

// X509-SVID §6.2 and Trust Domain and Bundle §4: what may be in a bundle that came from elsewhere.
func TestX509SVID_6_2_ForeignBundles(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("west.demo")
	w := newWorld(t)
	jwk := func(use, kid string, x5c ...*x509.Certificate) string {
		var all []string
		for _, c := range x5c {
			all = append(all, `"`+base64.StdEncoding.EncodeToString(c.Raw)+`"`)
		}
		pub := x5c[0].PublicKey.(*ecdsa.PublicKey)
		point, err := pub.Bytes()
		check(t, err)
		b64 := base64.RawURLEncoding.EncodeToString
		return fmt.Sprintf(`{"keys":[{"use":%q,"kid":%q,"kty":"EC","crv":"P-256","x":%q,"y":%q,"x5c":[%s]}]}`, use, kid, b64(point[1:33]), b64(point[33:]), strings.Join(all, ","))
	}
	if b, err := bundle.Parse(td, []byte(jwk("x509-svid", "", w.west.cert))); err != nil || len(b.X509Authorities()) != 1 {
		t.Errorf("our own root: %v", err)
	}
	for name, c := range map[string]struct{ doc, why string }{
		"the bundle of A offered as B": {jwk("x509-svid", "", w.east.cert), "spiffe://east.demo"},
		"a leaf as authority":          {jwk("x509-svid", "", issue(t, leaf(t, "spiffe://west.demo/x"), w.west).cert), ""},
		"two certificates in one key":  {jwk("x509-svid", "", w.west.cert, w.east.cert), "single certificate"},
	} {
		b, err := bundle.Parse(td, []byte(c.doc))
		if err == nil && len(b.X509Authorities()) > 0 || err != nil && !strings.Contains(err.Error(), c.why) {
			t.Errorf("%s: %v, %v", name, b, err)
		}
	}
}
