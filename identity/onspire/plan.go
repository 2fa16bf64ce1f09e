package onspire

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/hanse-mesh/hanse/identity/spiretypes"
)

const (
	idPrefix = "hanse-" // of the IDs of our entries
	hint     = "hanse"  // of our entries: it tells a workload with several SVIDs which one is the mesh's

	// RelayPath is where this control plane's bundle endpoint answers with the bundles of other trust domains; the domain's name follows.
	RelayPath = "/federated/"
)

// Entry is one registration entry that is wanted.
type Entry struct {
	ID, Parent spiffeid.ID
	Selectors  []string // type:value
	X509Life   time.Duration
	JWTLife    time.Duration
}

// entryID names an entry by what cannot be changed in it.
func (e Entry) entryID() string {
	sel := slices.Sorted(slices.Values(e.Selectors))
	sum := sha256.Sum256([]byte(e.ID.String() + "\x00" + e.Parent.String() + "\x00" + strings.Join(sel, "\x00")))
	return idPrefix + hex.EncodeToString(sum[:16])
}

// IDPrefix is how the IDs of all entries of ours begin.
const IDPrefix = idPrefix

// Registration is the entry as an authority of Hanse's own keeps it: without the hint, for of several entries with the same one an agent gives a
// process the first only.
func (e Entry) Registration() *types.Entry {
	p := e.proto(nil)
	p.Hint = ""
	return p
}

func (e Entry) proto(federates []string) *types.Entry {
	p := &types.Entry{Id: e.entryID(), SpiffeId: spiretypes.FromID(e.ID), ParentId: spiretypes.FromID(e.Parent), Hint: hint,
		X509SvidTtl: int32(e.X509Life / time.Second), JwtSvidTtl: int32(e.JWTLife / time.Second), FederatesWith: federates}
	for _, s := range e.Selectors {
		kind, value, _ := strings.Cut(s, ":")
		p.Selectors = append(p.Selectors, &types.Selector{Type: kind, Value: value})
	}
	return p
}

// entryPlan is what brings the entries of a server to what is wanted.
type entryPlan struct {
	create, update []*types.Entry
	remove         []string // IDs
}

// planEntries compares. have is everything with our hint; what is there without our prefix is not ours.
func planEntries(have []*types.Entry, want []Entry, federates []string) entryPlan {
	var p entryPlan
	wanted := map[string]*types.Entry{}
	for _, e := range want {
		x := e.proto(federates)
		wanted[x.Id] = x
	}
	seen := map[string]bool{}
	for _, h := range have {
		if !strings.HasPrefix(h.Id, idPrefix) {
			continue
		}
		seen[h.Id] = true
		switch w := wanted[h.Id]; {
		case w == nil:
			p.remove = append(p.remove, h.Id)
		case w.X509SvidTtl != h.X509SvidTtl || w.JwtSvidTtl != h.JwtSvidTtl || !sameSet(w.FederatesWith, h.FederatesWith):
			p.update = append(p.update, w)
		}
	}
	for _, id := range slices.Sorted(maps.Keys(wanted)) {
		if !seen[id] {
			p.create = append(p.create, wanted[id])
		}
	}
	return p
}

func sameSet(a, b []string) bool {
	return slices.Equal(slices.Sorted(slices.Values(a)), slices.Sorted(slices.Values(b)))
}

// trustPlan is what brings bundles and relationships of a server to what is wanted.
type trustPlan struct {
	set            []*types.Bundle
	create, update []*types.FederationRelationship
	remove         []string // trust domains: relationship and bundle
	foreign        []string // trust domains whose relationship somebody else made; only its bundle is set
}

// planTrust compares. relay is the URL before the trust domain's name, endpoint the SPIFFE ID that answers there.
func planTrust(have []*types.Bundle, relations []*types.FederationRelationship, want map[spiffeid.TrustDomain]*spiffebundle.Bundle, relay string, endpoint spiffeid.ID) (trustPlan, error) {
	var p trustPlan
	held := map[string]*types.Bundle{}
	for _, b := range have {
		held[b.TrustDomain] = b
	}
	related := map[string]*types.FederationRelationship{}
	for _, r := range relations {
		related[r.TrustDomain] = r
	}
	names := slices.SortedFunc(maps.Keys(want), func(a, b spiffeid.TrustDomain) int { return cmp.Compare(a.Name(), b.Name()) })
	for _, td := range names {
		b, err := spiretypes.FromBundle(want[td])
		if err != nil {
			return p, err
		}
		if h := held[td.Name()]; h == nil || !sameBundle(h, want[td]) {
			p.set = append(p.set, b)
		}
		r := &types.FederationRelationship{TrustDomain: td.Name(), BundleEndpointUrl: relay + td.Name(),
			BundleEndpointProfile: &types.FederationRelationship_HttpsSpiffe{HttpsSpiffe: &types.HTTPSSPIFFEProfile{EndpointSpiffeId: endpoint.String()}}}
		switch h := related[td.Name()]; {
		case h == nil:
			p.create = append(p.create, r)
		case !ours(h):
			p.foreign = append(p.foreign, td.Name())
		case h.BundleEndpointUrl != r.BundleEndpointUrl || h.GetHttpsSpiffe().GetEndpointSpiffeId() != endpoint.String():
			p.update = append(p.update, r)
		}
	}
	for _, r := range relations {
		td, err := spiffeid.TrustDomainFromString(r.TrustDomain)
		if err == nil && want[td] == nil && ours(r) {
			p.remove = append(p.remove, r.TrustDomain)
		}
	}
	return p, nil
}

// ours says whether a relationship leads to this control plane's bundle endpoint, at whatever address that was.
func ours(r *types.FederationRelationship) bool {
	return strings.HasSuffix(r.BundleEndpointUrl, RelayPath+r.TrustDomain)
}

func sameBundle(have *types.Bundle, want *spiffebundle.Bundle) bool {
	h, err := spiretypes.ToBundle(have)
	if err != nil {
		return false
	}
	return h.X509Bundle().Equal(want.X509Bundle()) && h.JWTBundle().Equal(want.JWTBundle())
}
