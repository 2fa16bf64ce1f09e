package main

import (
	"cmp"
	"context"
	"crypto/x509"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hanse-mesh/hanse/cmd/internal/admin"
	"github.com/hanse-mesh/hanse/identity/ca"
	"github.com/hanse-mesh/hanse/identity/spireapi"
	"github.com/hanse-mesh/hanse/identity/spiretypes"
)

// Identities lists entries, agents and the workloads of discovered services by SPIFFE ID.
func (p *controlPlane) Identities(context.Context) ([]admin.Identity, error) {
	rows := map[string]*admin.Identity{}
	row := func(id string) *admin.Identity {
		if rows[id] == nil {
			rows[id] = &admin.Identity{ID: id, Services: []string{}, Entries: []admin.IdentityEntry{}, Agents: []admin.IdentityAgent{}}
		}
		return rows[id]
	}
	agents := map[string]admin.IdentityAgent{}
	if p.spire != nil {
		for _, a := range p.spire.Agents() {
			v := admin.IdentityAgent{ID: a.ID.String(), Type: a.Type, Expires: a.Expires.UTC(), Banned: a.Banned}
			if !a.Seen.IsZero() {
				seen := age(p.now(), a.Seen)
				v.Seen = &seen
			}
			agents[v.ID] = v
			r := row(v.ID)
			r.Agents = append(r.Agents, v)
		}
		for _, e := range p.spire.Entries() {
			v := identityEntry(e)
			r := row(idText(e.SpiffeId))
			r.Entries = append(r.Entries, v)
			if a, ok := agents[v.Parent]; ok && !slices.ContainsFunc(r.Agents, func(x admin.IdentityAgent) bool { return x.ID == a.ID }) {
				r.Agents = append(r.Agents, a)
			}
		}
	}
	if p.onSPIRE != nil { // agents, and other entries, are SPIRE's to list
		for _, e := range p.onSPIRE.Entries() {
			r := row(idText(e.SpiffeId))
			r.Entries = append(r.Entries, identityEntry(e))
		}
	}
	if local := p.mesh.Clusterset().Local; local != nil {
		for _, s := range local.Services.All() {
			for _, e := range s.Endpoints {
				if e.SPIFFEID == "" {
					continue
				}
				if r := row(e.SPIFFEID); !slices.Contains(r.Services, s.Name.String()) {
					r.Services = append(r.Services, s.Name.String())
				}
			}
		}
	}
	out := make([]admin.Identity, 0, len(rows))
	for _, id := range slices.Sorted(maps.Keys(rows)) {
		r := rows[id]
		slices.Sort(r.Services)
		out = append(out, *r)
	}
	return out, nil
}

func idText(id *types.SPIFFEID) string {
	v, err := spiretypes.ToID(id)
	if err != nil {
		return ""
	}
	return v.String()
}

func identityEntry(e *types.Entry) admin.IdentityEntry {
	v := admin.IdentityEntry{ID: e.Id, Parent: idText(e.ParentId), Selectors: []string{}, FederatesWith: e.FederatesWith, DNSNames: e.DnsNames, Hint: e.Hint, Admin: e.Admin, Downstream: e.Downstream, X509Life: float64(e.X509SvidTtl)}
	for _, s := range e.Selectors {
		v.Selectors = append(v.Selectors, s.Type+":"+s.Value)
	}
	if e.ExpiresAt > 0 {
		at := time.Unix(e.ExpiresAt, 0).UTC()
		v.Expires = &at
	}
	return v
}

// ownID reads a SPIFFE ID of this trust domain, or NAMESPACE/ACCOUNT.
func (p *controlPlane) ownID(text string) (spiffeid.ID, error) {
	hint := "want spiffe://" + p.td.Name() + "/… or NAMESPACE/SERVICE-ACCOUNT, such as shop/payments"
	if !strings.Contains(text, "://") {
		namespace, account, ok := strings.Cut(text, "/")
		if !ok {
			return spiffeid.ID{}, admin.Invalid(hint, "%q is no identity", text)
		}
		text = fmt.Sprintf("spiffe://%s/ns/%s/sa/%s", p.td.Name(), namespace, account)
	}
	id, err := spiffeid.FromString(text)
	if err != nil {
		return id, admin.Invalid(hint, "%q is no SPIFFE ID: %v", text, err)
	}
	if !id.MemberOf(p.td) {
		return id, admin.Invalid(hint, "%s is of another trust domain than this cluster's", id)
	}
	return id, nil
}

// Identity shows one.
func (p *controlPlane) Identity(ctx context.Context, text string) (admin.Identity, error) {
	id, err := p.ownID(text)
	if err != nil {
		return admin.Identity{}, err
	}
	all, err := p.Identities(ctx)
	if err != nil {
		return admin.Identity{}, err
	}
	for _, i := range all {
		if i.ID == id.String() {
			return i, nil
		}
	}
	return admin.Identity{}, admin.NotFound("hanse identity list shows those that there are", "no entry, agent or endpoint has the ID %s", id)
}

// Mint signs an SVID by hand, as an administrator of a SPIRE server may. It is logged.
func (p *controlPlane) Mint(ctx context.Context, req admin.MintRequest) (admin.Minted, error) {
	id, err := p.ownID(req.ID)
	if err != nil {
		return admin.Minted{}, err
	}
	life := time.Duration(req.TTL * float64(time.Second))
	if life != 0 && (life < time.Minute || life > maxAdminLife) {
		return admin.Minted{}, admin.Invalid("make it as short as you can", "life %s: want between 1m and %s", life, maxAdminLife)
	}
	if err := p.bySPIRE("an SVID for "+id.String(), "spire-server x509 mint, or jwt mint"); err != nil {
		return admin.Minted{}, err
	}
	out := admin.Minted{ID: id.String()}
	if len(req.Audience) > 0 {
		svid, err := p.spire.MintJWT(ctx, id, req.Audience, life)
		if err != nil {
			return out, minting(err)
		}
		out.Token, out.Expires = svid.Token, time.Unix(svid.ExpiresAt, 0).UTC()
		return out, nil
	}
	key, err := x509.ParsePKIXPublicKey(req.PublicKey)
	if err == nil {
		err = spireapi.CheckKey(key)
	}
	if err != nil {
		return out, admin.Invalid("hanse makes one", "public key: %v", err)
	}
	chain, err := p.spire.MintX509(ctx, ca.X509Params{ID: id, PublicKey: key, DNSNames: req.DNSNames, TTL: life})
	if err != nil {
		return out, minting(err)
	}
	for _, c := range chain {
		out.Chain = append(out.Chain, c.Raw)
	}
	out.Expires = chain[0].NotAfter
	own, ok := p.bundles.Get(p.td)
	if !ok {
		return out, fmt.Errorf("the own bundle is missing")
	}
	out.Bundle, err = own.Marshal()
	return out, err
}

// minting says as administrators are told what the SPIRE API would have said.
func minting(err error) error {
	st := status.Convert(err)
	if st.Code() == codes.InvalidArgument {
		return admin.Invalid("hanse identity list shows those that there are", "%s", st.Message())
	}
	return fmt.Errorf("%s", cmp.Or(st.Message(), "it was not signed"))
}
