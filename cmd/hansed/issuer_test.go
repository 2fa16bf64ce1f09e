package main

import (
	"log/slog"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/identity/bundle"
	"github.com/hanse-mesh/hanse/identity/ca"
	"github.com/hanse-mesh/hanse/identity/onspire"
)

// Each workload of a discovered service, and each service account that is told of, has one entry for each template, whatever its number of endpoints and services; nobody else's ID
// has any, and none that is reserved.
func TestEntriesOfASnapshot(t *testing.T) {
	cfg := &Config{Cluster: "west", TrustDomain: "west.demo"}
	cfg.Identity.SPIRE = SPIRE{
		Entries:      []SPIREEntry{{"spiffe://{{.TrustDomain}}/nodes", []string{"k8s:ns:{{.Namespace}}", "k8s:sa:{{.ServiceAccount}}"}}, {"spiffe://{{.TrustDomain}}/host/{{.Address}}", []string{"unix:user:{{.ServiceAccount}}"}}},
		ControlPlane: []SPIREEntry{{"spiffe://{{.TrustDomain}}/nodes", []string{"unix:user:hansed"}}},
	}
	cfg.fill()
	r, err := newRegistrar(cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ep := func(addr, id string) *discovery.Endpoint {
		return &discovery.Endpoint{Address: netip.MustParseAddr(addr), Profile: &discovery.Profile{SPIFFEID: id}}
	}
	pay := "spiffe://west.demo/ns/shop/sa/pay"
	services := map[discovery.Name]*discovery.Service{}
	for name, eps := range map[string][]*discovery.Endpoint{
		"pay":     {ep("10.0.0.1", pay), ep("10.0.0.2", pay)},
		"pay-too": {ep("10.0.0.1", pay)},
		"others":  {ep("10.0.0.3", "spiffe://east.demo/ns/shop/sa/pay"), ep("10.0.0.4", ""), ep("10.0.0.5", "spiffe://west.demo/hanse/control-plane"), ep("10.0.0.6", "spiffe://west.demo/spire/server")},
	} {
		n := discovery.Name{Namespace: "shop", Name: name}
		services[n] = &discovery.Service{Name: n, Endpoints: eps}
	}
	var got []string
	accounts := []discovery.Name{{Namespace: "shop", Name: "frontend"}, {Namespace: "shop", Name: "pay"}}
	for _, e := range r.entries(&discovery.Snapshot{Services: discovery.NewByName(services), Accounts: accounts}) {
		if e.X509Life != time.Hour || e.JWTLife != 5*time.Minute {
			t.Errorf("lives %s and %s, want those of the configuration", e.X509Life, e.JWTLife)
		}
		got = append(got, e.ID.Path()+" "+e.Parent.Path())
	}
	slices.Sort(got)
	want := []string{"/hanse/control-plane /nodes", "/ns/shop/sa/frontend /nodes", "/ns/shop/sa/pay /host/10.0.0.1", "/ns/shop/sa/pay /host/10.0.0.2", "/ns/shop/sa/pay /nodes"}
	if !slices.Equal(got, want) {
		t.Errorf("entries %q\nwant %q", got, want)
	}
	for _, accounts := range [][]discovery.Name{accounts[:1], accounts[1:]} {
		if n := len(r.entries(&discovery.Snapshot{Accounts: accounts})); n != 2 {
			t.Errorf("%d entries of %v and the control plane", n, accounts)
		}
	}
}

// SPIRE's sequence may go backwards; the one that others see never does, and grows with each change.
func TestOwnBundleOfSPIRENeverGoesBackwards(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("west.demo")
	store, err := bundle.Open(bundle.Config{TrustDomain: td})
	if err != nil {
		t.Fatal(err)
	}
	root := func() *spiffebundle.Bundle {
		a, err := ca.Open(ca.Config{Dir: t.TempDir(), TrustDomain: td})
		if err != nil {
			t.Fatal(err)
		}
		return a.Bundle()
	}
	p := &controlPlane{td: td, bundles: store, onSPIRE: &onspire.Server{}}
	var last uint64
	first, second := root(), root()
	for i, step := range []struct {
		b        *spiffebundle.Bundle
		sequence uint64
		grows    bool
	}{
		{first, 1_795_745_069, true}, // Hanse's own, before the move
		{second, 1, true},            // SPIRE's
		{second, 1, false},           // looked at again
		{first, 2, true},
		{second, 1, true}, // from a backup
		{second, 1, false},
		{first, 1_900_000_000, true},
	} {
		b := step.b.Clone()
		b.SetSequenceNumber(step.sequence)
		if err := p.takeOwnBundle(b); err != nil {
			t.Fatalf("step %d: %v", i, err)
		}
		have, _ := store.Get(td)
		if !have.X509Bundle().Equal(b.X509Bundle()) {
			t.Errorf("step %d: another bundle is in force", i)
		}
		seq, _ := have.SequenceNumber()
		if step.grows != (seq > last) || seq < last {
			t.Errorf("step %d: sequence %d after %d", i, seq, last)
		}
		last = seq
	}
}
