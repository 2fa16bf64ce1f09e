package agent_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/identity/attest"
	"github.com/hanse-mesh/hanse/identity/spiretypes"
)

// svidWithin waits for the source to have an SVID that f likes.
func svidWithin(t testing.TB, src *identity.Source, d time.Duration, f func(*x509svid.SVID) bool) time.Duration {
	t.Helper()
	start := time.Now()
	deadline := time.After(d)
	for {
		changed := src.Changed()
		if s, err := src.GetX509SVID(); err == nil && f(s) {
			return time.Since(start)
		}
		select {
		case <-changed:
		case <-deadline:
			t.Fatalf("not within %s", d)
		}
	}
}

// A changed entry is in the workload's SVID at once, though the next sync is an hour away.
func TestEntryChangeIsPushed(t *testing.T) {
	s := newServer(t, "west.demo", options{})
	s.start()
	cfg := s.agentConfig(s.token("spiffe://west.demo/ns/shop/sa/frontend"))
	cfg.SyncInterval = time.Hour
	a, _ := runAgent(t, cfg)
	wait(t, a.Source())
	// The entry that came with the token, which nobody but the server itself can change.
	entries, err := s.entryAPI(t).ListEntries(t.Context(), &entryv1.ListEntriesRequest{})
	check(t, err)
	e := entries.Entries[0]
	var took []time.Duration
	for i := range 20 {
		id := spiffeid.RequireFromString(fmt.Sprintf("spiffe://west.demo/ns/shop/sa/v%d", i))
		e.SpiffeId = spiretypes.FromID(id)
		_, err := s.api.Keep(t.Context(), "token.", []*types.Entry{e})
		check(t, err)
		took = append(took, svidWithin(t, a.Source(), 2*time.Second, func(s *x509svid.SVID) bool { return s.ID == id }))
	}
	slices.Sort(took)
	t.Logf("entry change to SVID: median %s, worst of %d %s", took[len(took)/2], len(took), took[len(took)-1])

	// A new server knows nothing of the stream before: it is opened anew.
	s.stop()
	s.start()
	e.SpiffeId = spiretypes.FromID(spiffeid.RequireFromString("spiffe://west.demo/ns/shop/sa/last"))
	_, err = s.api.Keep(t.Context(), "token.", []*types.Entry{e})
	check(t, err)
	svidWithin(t, a.Source(), 10*time.Second, func(s *x509svid.SVID) bool { return strings.HasSuffix(s.ID.Path(), "/last") })
}

// DNS names of an entry are in the SVID as soon as they are given.
func TestDNSNamesArePushed(t *testing.T) {
	s := newServer(t, "west.demo", options{})
	s.start()
	token, _, err := s.tokens.Create(t.Context(), attest.Grant{}, time.Hour)
	check(t, err)
	cfg := s.agentConfig(token)
	cfg.SyncInterval = 300 * time.Millisecond // its first syncs find no entry
	a, _ := runAgent(t, cfg)
	admin := s.entryAPI(t)
	var agentID *types.SPIFFEID
	for agentID == nil {
		agentID = s.firstAgent(t)
		time.Sleep(10 * time.Millisecond)
	}
	e := &types.Entry{SpiffeId: &types.SPIFFEID{TrustDomain: "west.demo", Path: "/x"}, ParentId: agentID, Selectors: []*types.Selector{{Type: "unix", Value: "uid:1"}}}
	resp, err := admin.BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{e}})
	check(t, err)
	svidWithin(t, a.Source(), 10*time.Second, func(s *x509svid.SVID) bool { return s.ID.Path() == "/x" })
	e = resp.Results[0].Entry
	e.DnsNames = []string{"x.example"}
	_, err = admin.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{e}})
	check(t, err)
	svidWithin(t, a.Source(), 2*time.Second, func(s *x509svid.SVID) bool { return slices.Equal(s.Certificates[0].DNSNames, e.DnsNames) })
}
