package bundle_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/hanse-mesh/hanse/identity/bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// webServer serves east's bundle to web clients, with a certificate in files.
type webServer struct {
	cert, key, url string
	store          *bundle.Store
}

func newWebServer(t *testing.T) *webServer {
	t.Helper()
	dir := t.TempDir()
	w := &webServer{cert: filepath.Join(dir, "cert.pem"), key: filepath.Join(dir, "key.pem")}
	var err error
	w.store, err = bundle.Open(bundle.Config{TrustDomain: east})
	check(t, err)
	w.certify(t, time.Now())
	cfg, err := bundle.WebTLS(w.cert, w.key, slog.New(slog.DiscardHandler))
	check(t, err)
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	srv := &http.Server{Handler: w.store.Handler(), TLSConfig: cfg, ReadHeaderTimeout: time.Minute, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, 0)}
	go func() { _ = srv.ServeTLS(lis, "", "") }()
	t.Cleanup(func() { srv.Close() })
	w.url = "https://" + lis.Addr().String()
	return w
}

// certify puts a new certificate into the files, which says that it was written then.
func (w *webServer) certify(t *testing.T, written time.Time) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(written.UnixNano()), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	check(t, err)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	check(t, err)
	check(t, os.WriteFile(w.cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
	check(t, os.WriteFile(w.key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}), 0o600))
	for _, name := range []string{w.cert, w.key} {
		check(t, os.Chtimes(name, written, written))
	}
}

func (w *webServer) roots(t *testing.T) *x509.CertPool {
	t.Helper()
	b, err := os.ReadFile(w.cert)
	check(t, err)
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(b)
	return pool
}

// TestWebProfile: a first bundle needs no bundle before it; the web's authorities vouch for a change of all roots, and for nothing older; the
// system's roots know nothing of our server; and a renewed certificate is presented without a restart, a damaged one never.
func TestWebProfile(t *testing.T) {
	w := newWebServer(t)
	first, second := union(5, authority(t, east).Bundle()), union(6, authority(t, east).Bundle())
	check(t, w.store.Set(east, first, "own"))
	s, err := bundle.Open(bundle.Config{TrustDomain: west})
	check(t, err)
	check(t, s.Relate(bundle.Relation{TrustDomain: east, URL: w.url, Profile: bundle.HTTPSWeb}))
	puller := func(roots *x509.CertPool) *bundle.Puller {
		p, err := bundle.NewPuller(bundle.PullerConfig{Store: s, WebRoots: roots})
		check(t, err)
		return p
	}
	if err := puller(nil).Refresh(t.Context(), east); err == nil || s.Sequences()[east] != 0 {
		t.Errorf("an endpoint that no authority of the web vouches for: %v", err)
	}
	p := puller(w.roots(t))
	check(t, p.Refresh(t.Context(), east))
	check(t, w.store.Replace(east, second, "own"))
	check(t, p.Refresh(t.Context(), east))
	if b, _ := s.Get(east); !b.Equal(second) {
		t.Error("a change of all roots, vouched for, is not in force")
	}
	check(t, s.Replace(east, union(7, second), "administrator"))
	if err := p.Refresh(t.Context(), east); err == nil {
		t.Error("an older bundle is believed because the web vouches for its messenger")
	}

	w.certify(t, time.Now().Add(time.Minute))
	renewed := puller(w.roots(t))
	if err := renewed.Refresh(t.Context(), east); err == nil || !isStale(err) {
		t.Errorf("the renewed certificate is not presented: %v", err)
	}
	check(t, os.WriteFile(w.cert, []byte("damaged"), 0o600))
	if err := renewed.Refresh(t.Context(), east); !isStale(err) {
		t.Errorf("with a damaged file: %v", err)
	}
	if _, err := bundle.WebTLS(w.cert, w.key, slog.New(slog.DiscardHandler)); err == nil {
		t.Error("a damaged certificate is served")
	}
}

// TestWebRootsOfARelation: the roots that a relation names vouch for its endpoint, and those of the configuration do not beside them.
func TestWebRootsOfARelation(t *testing.T) {
	w, other := newWebServer(t), newWebServer(t)
	check(t, w.store.Set(east, union(5, authority(t, east).Bundle()), "own"))
	dir := t.TempDir()
	s, err := bundle.Open(bundle.Config{Dir: dir, TrustDomain: west})
	check(t, err)
	pemOf := func(w *webServer) string {
		b, err := os.ReadFile(w.cert)
		check(t, err)
		return string(b)
	}
	r := bundle.Relation{TrustDomain: east, URL: w.url, Profile: bundle.HTTPSWeb, WebRoots: pemOf(other)}
	check(t, s.Relate(r))
	refresh := func(s *bundle.Store) error {
		p, err := bundle.NewPuller(bundle.PullerConfig{Store: s, WebRoots: w.roots(t)})
		check(t, err)
		return p.Refresh(t.Context(), east)
	}
	if err := refresh(s); err == nil {
		t.Error("the roots of the configuration vouch beside those of the relation")
	}
	r.WebRoots = pemOf(w)
	check(t, s.Relate(r))
	s, err = bundle.Open(bundle.Config{Dir: dir, TrustDomain: west}) // as after a restart
	check(t, err)
	check(t, refresh(s))
	for what, r := range map[string]bundle.Relation{
		"noise":        {TrustDomain: east, URL: w.url, Profile: bundle.HTTPSWeb, WebRoots: "noise"},
		"https_spiffe": {TrustDomain: east, URL: w.url, Profile: bundle.HTTPSSPIFFE, EndpointID: spiffeid.RequireFromString("spiffe://east.demo/x"), WebRoots: pemOf(w)},
	} {
		if err := s.Relate(r); err == nil {
			t.Errorf("taken: %s", what)
		}
	}
}

// isStale says that a bundle was fetched, and refused for its age.
func isStale(err error) bool { return errors.Is(err, bundle.ErrStale) }
