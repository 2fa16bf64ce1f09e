package spireapi_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"log/slog"
	"maps"
	"math/big"
	"net"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/identity/attest"
	"github.com/hanse-mesh/hanse/identity/ca"
	"github.com/hanse-mesh/hanse/identity/spireapi"
	"github.com/hanse-mesh/hanse/identity/spiretypes"
)

// logbook keeps what is logged.
type logbook struct {
	mu sync.Mutex
	b  bytes.Buffer // guarded by mu
}

func (l *logbook) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logbook) take() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.b.String()
	l.b.Reset()
	return s
}

// refusals is the sum of all counters of refusals.
func refusals(t *testing.T, reg *prometheus.Registry) float64 {
	t.Helper()
	all, err := reg.Gather()
	check(t, err)
	var sum float64
	for _, f := range all {
		for _, m := range f.Metric {
			switch f.GetName() {
			case "hanse_identity_refused_total":
				sum += m.GetCounter().GetValue()
			case "hanse_identity_attestations_total":
				if m.Label[0].GetValue() != "ok" {
					sum += m.GetCounter().GetValue()
				}
			}
		}
	}
	return sum
}

// reasonsOf are the reasons for which attestations were refused.
func reasonsOf(t *testing.T, reg *prometheus.Registry) map[string]float64 {
	t.Helper()
	all, err := reg.Gather()
	check(t, err)
	out := map[string]float64{}
	for _, f := range all {
		if f.GetName() != "hanse_identity_attestations_refused_total" {
			continue
		}
		for _, m := range f.Metric {
			for _, l := range m.Label {
				if l.GetName() == "reason" {
					out[l.GetValue()] += m.GetCounter().GetValue()
				}
			}
		}
	}
	return out
}

// A flood of attestations is told when to come back, one from many addresses is bounded in all, and no caller can make up labels.
func TestFloods(t *testing.T) {
	reg := prometheus.NewRegistry()
	f := newFixture(t, func(c *spireapi.Config) {
		c.Registerer = reg
		c.AttestBurst, c.AttestsPerSecond = 3, 0.5
	})
	try := func() error {
		_, err := f.connect(nil).attest(t.Context(), "made-up", "x", csr(t, newKey(t)))
		return err
	}
	var err error
	for range 4 {
		err = try()
	}
	if status.Code(err) != codes.ResourceExhausted {
		t.Fatalf("the fourth of three: %v", err)
	}
	var after time.Duration
	for _, d := range status.Convert(err).Details() {
		if r, ok := d.(*errdetails.RetryInfo); ok {
			after = r.RetryDelay.AsDuration()
		}
	}
	if after <= 0 || after > 2*time.Second {
		t.Fatalf("told to come back in %s, want at most 2s", after)
	}
	f.advance(after + time.Millisecond)
	if err := try(); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("after the time that was told: %v", err)
	}
	if got, want := reasonsOf(t, reg), map[string]float64{"type": 4, "flood": 1}; !maps.Equal(got, want) {
		t.Errorf("reasons %v, want %v", got, want)
	}

	many := prometheus.NewRegistry()
	f = newFixture(t, func(c *spireapi.Config) {
		c.Registerer = many
		c.AttestBurst, c.AttestsPerSecond, c.AllAttestsPerSecond = 1, 1, 0.001
	})
	for range 20 { // a second apart, each is within the limit of its address
		err = try()
		f.advance(1001 * time.Millisecond)
	}
	if got := reasonsOf(t, many)["flood of many"]; status.Code(err) != codes.ResourceExhausted || got != 10 {
		t.Errorf("of 20 with a burst of 10 in all, %v are refused; the last: %v", got, err)
	}
}

// Each attack is refused, counted, and logged in words that tell an operator what was tried.
func TestAttacks(t *testing.T) {
	reg := prometheus.NewRegistry()
	book := &logbook{}
	f := newFixture(t, func(c *spireapi.Config) {
		c.Registerer, c.Log = reg, slog.New(slog.NewTextHandler(book, nil))
		c.Attestors = map[string]attest.Attestor{"hanse_pod": &attest.Pods{TrustDomain: west, Cluster: "west", Reviewer: cluster{"frontend": podToken("shop", "frontend", "uid-1")}}}
		c.AttestBurst, c.AttestsPerSecond = 50, 1
	})
	eastCA := f.federate(east)
	ctx := t.Context()
	token := func() string {
		tok, _, err := f.tokens.Create(ctx, attest.Grant{ID: frontend}, 20*time.Minute)
		check(t, err)
		return tok
	}
	join := func(tok string, der []byte) error {
		_, err := f.connect(nil).attest(ctx, "join_token", tok, der)
		return err
	}
	me, victim := f.agent(frontend), f.agent(spiffeid.RequireFromString("spiffe://west.demo/ns/bank/sa/vault"))
	mine, theirs := me.sync(t, nil)[0].Id, victim.sync(t, nil)[0].Id
	sign := func(entry string, der []byte) error {
		resp, err := me.BatchNewX509SVID(ctx, &svidv1.BatchNewX509SVIDRequest{Params: []*svidv1.NewX509SVIDParams{{EntryId: entry, Csr: der}}})
		check(t, err)
		if resp.Results[0].Svid != nil {
			t.Error("an SVID was signed")
		}
		return status.Error(codes.Code(resp.Results[0].Status.Code), resp.Results[0].Status.Message)
	}
	offer := func(td string, of *ca.Authority) error {
		p, err := spiretypes.FromBundle(of.Bundle())
		check(t, err)
		p.TrustDomain = td
		resp, err := f.admin.BatchSetFederatedBundle(ctx, &bundlev1.BatchSetFederatedBundleRequest{Bundle: []*types.Bundle{p}})
		check(t, err)
		return status.Error(codes.Code(resp.Results[0].Status.Code), resp.Results[0].Status.Message)
	}
	impostor, err := ca.Open(ca.Config{Dir: t.TempDir(), TrustDomain: west})
	check(t, err)
	as := func(a *ca.Authority, id spiffeid.ID) error {
		_, err := f.connect(claim(t, a, id)).GetAuthorizedEntries(ctx, &entryv1.GetAuthorizedEntriesRequest{})
		return err
	}
	otherTokens := attest.New(west, attest.NewMemory(), f.now)
	foreign, _, err := otherTokens.Create(ctx, attest.Grant{ID: frontend}, 20*time.Minute)
	check(t, err)
	used := token()
	check(t, join(used, csr(t, newKey(t))))
	rsa1024 := weakCSR(t)
	shortKey, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	check(t, err)
	p224 := csr(t, shortKey)

	for _, a := range []struct {
		name string
		try  func() error
		log  string
	}{
		{"a forged token", func() error { return join(strings.Repeat("guess", 8), csr(t, newKey(t))) }, "not one of this trust domain's"},
		{"a tampered token", func() error { tok := token(); return join(tok[:20]+flip(tok[20:21])+tok[21:], csr(t, newKey(t))) }, "damaged"},
		{"a replayed token", func() error { return join(used, csr(t, newKey(t))) }, "used already"},
		{"another cluster's token", func() error { return join(foreign, csr(t, newKey(t))) }, "not one of this trust domain's"},
		{"a pod token of another cluster", func() error {
			_, err := f.connect(nil).attest(ctx, "hanse_pod", `{"cluster":"east","token":"frontend"}`, csr(t, newKey(t)))
			return err
		}, `cluster \"east\"`},
		{"a forged pod token", func() error {
			_, err := f.connect(nil).attest(ctx, "hanse_pod", kubePayload("forged"), csr(t, newKey(t)))
			return err
		}, "does not accept the token"},
		{"attestation with a CSR that has DNS names", func() error {
			return join(token(), csrWith(t, func(r *x509.CertificateRequest) { r.DNSNames = []string{"x"} }))
		}, "DNS names"},
		{"attestation with a CSR for a CA", func() error { return join(token(), csrWith(t, askForCA)) }, "certificate of a CA"},
		{"attestation with a weak key", func() error { return join(token(), rsa1024) }, "1024 bits"},
		{"attestation with a key on a short curve", func() error { return join(token(), p224) }, "P-224"},
		{"a CSR for another ID", func() error { return sign(mine, csr(t, newKey(t), "spiffe://west.demo/ns/bank/sa/vault")) }, "CSR asks for"},
		{"a CSR for an ID of another trust domain", func() error { return sign(mine, csr(t, newKey(t), "spiffe://east.demo/ns/shop/sa/frontend")) }, "CSR asks for"},
		{"a CSR with a DNS name", func() error {
			return sign(mine, csrWith(t, func(r *x509.CertificateRequest) { r.DNSNames = []string{"bank"} }))
		}, "DNS names"},
		{"a CSR with an IP address", func() error {
			return sign(mine, csrWith(t, func(r *x509.CertificateRequest) { r.IPAddresses = []net.IP{{1, 2, 3, 4}} }))
		}, "1.2.3.4"},
		{"a CSR with the CA bit", func() error { return sign(mine, csrWith(t, askForCA)) }, "certificate of a CA"},
		{"a CSR with a weak key", func() error { return sign(mine, rsa1024) }, "1024 bits"},
		{"a CSR with a key on a short curve", func() error { return sign(mine, p224) }, "P-224"},
		{"an entry of another agent", func() error { return sign(theirs, csr(t, newKey(t))) }, "not authorized"},
		{"a JWT-SVID of another agent's entry", func() error {
			_, err := me.NewJWTSVID(ctx, &svidv1.NewJWTSVIDRequest{EntryId: theirs, Audience: []string{"bank"}})
			return err
		}, "not authorized"},
		{"an agent administers", func() error {
			_, err := me.CreateJoinToken(ctx, &agentv1.CreateJoinTokenRequest{Ttl: 60})
			return err
		}, "not an administrator"},
		{"an agent makes itself a downstream server", func() error {
			_, err := me.NewDownstreamX509CA(ctx, &svidv1.NewDownstreamX509CARequest{Csr: csr(t, newKey(t))})
			return err
		}, "downstream"},
		{"an agent's SVID claimed by another authority of the same name", func() error { return as(impostor, me.svid.ID) }, "verify"},
		{"a foreign domain's authority claims our agent's ID", func() error { return as(eastCA, me.svid.ID) }, "verify"},
		{"a foreign administrator", func() error {
			id, err := identity.AdminID(east, "eve")
			check(t, err)
			return as(eastCA, id)
		}, "east.demo"},
		{"the bundle of A offered as B", func() error { return offer("north.demo", eastCA) }, "spiffe://east.demo"},
		{"our own bundle offered as a foreign one", func() error { return offer("north.demo", f.authority) }, "spiffe://west.demo"},
		{"a foreign bundle offered as our own", func() error { return offer("west.demo", eastCA) }, "this trust domain itself"},
		{"an expired token", func() error {
			tok := token()
			f.advance(20 * time.Minute)
			return join(tok, csr(t, newKey(t)))
		}, "expired"},
		{"a flood of attestations", func() error {
			var err error
			for range 200 {
				if err = join("guess-upon-guess", rsa1024); status.Code(err) == codes.ResourceExhausted {
					return err
				}
			}
			return nil
		}, "too many attestations"},
	} {
		t.Run(a.name, func(t *testing.T) {
			before, reasons := refusals(t, reg), reasonsOf(t, reg)
			book.take()
			f.advance(11 * time.Second) // a line for each kind of flood
			err := a.try()
			if err == nil {
				t.Fatal("it succeeds")
			}
			if after := refusals(t, reg); after <= before {
				t.Errorf("not counted: %v, then %v (%v)", before, after, err)
			}
			if why := attestationReasons[a.name]; reasonsOf(t, reg)[why] <= reasons[why] && why != "" {
				t.Errorf("not counted as %q: %v", why, reasonsOf(t, reg))
			}
			if log := book.take(); !strings.Contains(log, a.log) {
				t.Errorf("log %q, want %q in it", log, a.log)
			}
		})
	}
	// The victims of all this are as they were.
	me.sync(t, nil)
	victim.sync(t, nil)
}

// attestationReasons are the labels of hanse_identity_attestations_refused_total, by attack.
var attestationReasons = map[string]string{
	"a forged token": "unknown token", "a tampered token": "damaged token", "a replayed token": "used token", "another cluster's token": "unknown token",
	"an expired token": "expired token", "a pod token of another cluster": "evidence", "a forged pod token": "evidence",
	"attestation with a CSR that has DNS names": "CSR or request", "attestation with a CSR for a CA": "CSR or request", "attestation with a weak key": "CSR or request",
	"attestation with a key on a short curve": "CSR or request",
	"a flood of attestations":                 "flood",
}

func flip(s string) string {
	if s == "A" {
		return "B"
	}
	return "A"
}

// weakCSR is for an RSA key of 1024 bits.
func weakCSR(t *testing.T) []byte {
	t.Helper()
	t.Setenv("GODEBUG", "rsa1024min=0")
	key, err := rsa.GenerateKey(rand.Reader, 1024)
	check(t, err)
	return csr(t, key)
}

// claim is an SVID of any ID that a's key can make: by an intermediate of its own.
func claim(t *testing.T, a *ca.Authority, id spiffeid.ID) *x509svid.SVID {
	t.Helper()
	key, leafKey := newKey(t), newKey(t)
	chain, err := a.SignDownstream(t.Context(), key.Public(), 0)
	check(t, err)
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(3), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		URIs: []*url.URL{id.URL()}, KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true}, chain[0], leafKey.Public(), key)
	check(t, err)
	leaf, err := x509.ParseCertificate(der)
	check(t, err)
	return &x509svid.SVID{ID: id, Certificates: append([]*x509.Certificate{leaf}, chain...), PrivateKey: leafKey}
}
