package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hanse-mesh/hanse/cmd/internal/admin"
	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/discovery/v1alpha1"
	"github.com/hanse-mesh/hanse/identity/bundle"
)

// TrustList lists the trust domains that this cluster trusts, its own first.
func (p *controlPlane) TrustList(context.Context) ([]admin.TrustDomain, error) {
	rows := map[spiffeid.TrustDomain]admin.TrustDomain{}
	for td, b := range p.bundles.All() {
		rows[td] = p.trustRow(td, b)
	}
	for _, r := range p.bundles.Relations() {
		if _, ok := rows[r.TrustDomain]; !ok {
			row := p.trustRow(r.TrustDomain, nil)
			if row.Note == "" {
				row.Note = "waits for its bundle"
			}
			rows[r.TrustDomain] = row
		}
	}
	out := make([]admin.TrustDomain, 0, len(rows))
	for _, r := range rows {
		out = append(out, r)
	}
	slices.SortFunc(out, func(a, b admin.TrustDomain) int { return cmp.Or(b2i(b.Own)-b2i(a.Own), cmp.Compare(a.Name, b.Name)) })
	return out, nil
}

func (p *controlPlane) trustRow(td spiffeid.TrustDomain, b *spiffebundle.Bundle) admin.TrustDomain {
	row := admin.TrustDomain{Name: td.Name(), Own: td == p.td, Source: "applied", Authorities: []string{}}
	set := p.mesh.Clusterset()
	for _, m := range set.Members {
		if m.TrustDomain == td.Name() {
			row.Member, row.Source = m.Name, "mesh"
		}
	}
	row.Allow = set.Local.AllowOf(td.Name())
	for _, imp := range set.Imports.All() {
		for _, from := range imp.From {
			if from.Member == row.Member {
				row.Withheld += from.Withheld
			}
		}
	}
	if r, ok := p.bundles.Related(td); ok && r.URL != "" && row.Member == "" {
		row.Source = "endpoint"
	}
	if row.Own {
		row.Source, row.Member = "own authority", p.cfg.Cluster
		if p.onSPIRE != nil {
			row.Source = "SPIRE"
		}
	}
	for _, d := range p.bundles.Distrusted() {
		switch {
		case d.TrustDomain != td.Name():
		case d.Authority == "":
			row.Distrusted = append(row.Distrusted, "all")
			row.Note = fmt.Sprintf("distrusted %s ago; undo: hanse trust distrust %s --undo", p.now().Sub(d.Since).Round(time.Second), td.Name())
		default:
			row.Distrusted = append(row.Distrusted, d.Authority)
		}
	}
	if r, ok := p.bundles.Refusals()[td]; ok {
		row.Refused = &admin.RefusedBundle{Age: age(p.now(), r.At), Source: r.Source, Sequence: r.Sequence, Reason: r.Reason}
	}
	if b == nil {
		return row
	}
	row.Sequence, _ = b.SequenceNumber()
	now := p.now()
	row.Age = bundleAge(b, now).Seconds()
	roles := map[string]string{}
	if row.Own {
		roles = p.roles()
	}
	for _, c := range b.X509Authorities() {
		sum := sha256.Sum256(c.RawSubjectPublicKeyInfo)
		left := "expired"
		if d := c.NotAfter.Sub(now); d > 0 {
			left = "expires in " + d.Round(time.Second).String()
		}
		row.Authorities = append(row.Authorities, fmt.Sprintf("%x…%x, %s%s", sum[:4], sum[30:], left, roles[bundle.AuthorityID(c)]))
	}
	if row.Own {
		for member, seq := range p.mesh.Acked(td) {
			if seq >= row.Sequence {
				row.Acked = append(row.Acked, member)
			} else {
				row.Missing = append(row.Missing, member)
			}
		}
		slices.Sort(row.Acked)
		slices.Sort(row.Missing)
	} else if row.Note == "" {
		row.Note = p.unacknowledged(td, row.Sequence)
	}
	return row
}

// unacknowledged says for whom this cluster waits before it tells a trust domain that its bundle is loaded; "" if it has told it.
func (p *controlPlane) unacknowledged(td spiffeid.TrustDomain, sequence uint64) string {
	if p.rollCall.before()[td.Name()] >= sequence {
		return ""
	}
	lacking := p.lacking(td, sequence)
	if len(lacking) == 0 {
		return "" // within a second it will be
	}
	return fmt.Sprintf("not acknowledged to %s yet: %s not loaded it: %s", td, hasOrHave(len(lacking)), strings.Join(lacking, ", "))
}

// roles says of own roots what they do and, where there are several replicas, whose they are: ", replica two: active, away".
func (p *controlPlane) roles() map[string]string {
	out := map[string]string{}
	switch {
	case p.roots != nil:
		for authority, x := range p.roots.owners() {
			out[authority] = fmt.Sprintf(", replica %s: %s", x.replica, x.phase)
			if x.away {
				out[authority] += ", away"
			}
		}
	case p.authority != nil:
		for _, x := range namesOf(p.authority.Roots()) {
			out[x.Authority] = ", " + x.Phase
		}
	}
	return out
}

// TrustShow returns one row, with the bundle.
func (p *controlPlane) TrustShow(ctx context.Context, name string) (admin.TrustDomain, error) {
	rows, err := p.TrustList(ctx)
	if err != nil {
		return admin.TrustDomain{}, err
	}
	for _, r := range rows {
		if r.Name == name {
			if b, ok := p.bundles.Get(spiffeid.RequireTrustDomainFromString(name)); ok {
				if r.Bundle, err = b.Marshal(); err != nil {
					return admin.TrustDomain{}, fmt.Errorf("encode the bundle of %s: %w", name, err)
				}
			}
			return r, nil
		}
	}
	return admin.TrustDomain{}, admin.NotFound("hanse trust list", "this cluster has no relation with the trust domain %q", name)
}

// TrustAdd applies a ClusterFederatedTrustDomain.
func (p *controlPlane) TrustAdd(ctx context.Context, req admin.TrustAdd) (admin.TrustDomain, error) {
	td, err := spiffeid.TrustDomainFromString(req.TrustDomain)
	if err != nil {
		return admin.TrustDomain{}, admin.Invalid("a trust domain is a name such as east.demo", "trust domain %q: %v", req.TrustDomain, err)
	}
	if td == p.td {
		return admin.TrustDomain{}, admin.Invalid("its roots are this cluster's own authority", "%s is this cluster's own trust domain", td)
	}
	if found, err := p.bundles.Trust(td, ""); err != nil {
		return admin.TrustDomain{}, err
	} else if _, related := p.bundles.Related(td); found && related && req.EndpointURL == "" && len(req.Bundle) == 0 && len(req.Allow) == 0 {
		return p.TrustShow(ctx, td.Name()) // its bundle was kept
	}
	o := v1alpha1.ClusterFederatedTrustDomain{
		TypeMeta:   metav1.TypeMeta{APIVersion: "spire.spiffe.io/v1alpha1", Kind: "ClusterFederatedTrustDomain"},
		ObjectMeta: metav1.ObjectMeta{Name: td.Name()},
		Spec:       v1alpha1.ClusterFederatedTrustDomainSpec{TrustDomain: td.Name(), BundleEndpointURL: req.EndpointURL, TrustDomainBundle: string(req.Bundle)},
	}
	o.Spec.BundleEndpointProfile.Type = cmp.Or(req.Profile, string(bundle.HTTPSSPIFFE))
	o.Spec.BundleEndpointProfile.EndpointSPIFFEID = req.EndpointID
	if req.WebRoots != "" {
		o.Annotations = map[string]string{v1alpha1.WebRootsAnnotation: req.WebRoots}
	}
	for _, a := range req.Allow {
		o.Spec.Allow = append(o.Spec.Allow, v1alpha1.FederationAllow{Services: a.Services, SPIFFEIDs: a.SPIFFEIDs})
	}
	b, err := json.Marshal(o)
	if err != nil {
		return admin.TrustDomain{}, err
	}
	if _, err := p.catalog.Apply(ctx, b, false); err != nil {
		return admin.TrustDomain{}, err
	}
	if err := p.relate(&discovery.FederatedTrustDomain{TrustDomain: td.Name(), EndpointURL: req.EndpointURL, Profile: o.Spec.BundleEndpointProfile.Type, EndpointID: req.EndpointID,
		WebRoots: req.WebRoots, Bundle: string(req.Bundle)}); err != nil {
		return admin.TrustDomain{}, err
	}
	return p.TrustShow(ctx, td.Name())
}

// TrustRemove ends a relation: the domain's SVIDs are refused from now on, and live connections that rest on them are closed.
func (p *controlPlane) TrustRemove(ctx context.Context, name string) error {
	td, err := spiffeid.TrustDomainFromString(name)
	if err != nil {
		return admin.Invalid("hanse trust list", "trust domain %q: %v", name, err)
	}
	for _, m := range p.mesh.Clusterset().Members {
		if m.TrustDomain == td.Name() {
			return admin.Refused(fmt.Sprintf("remove the member instead: hanse leave %s", m.Name), "%s is the trust domain of the member cluster %s", td, m.Name)
		}
	}
	if _, ok := p.bundles.Related(td); !ok {
		return admin.NotFound("hanse trust list", "this cluster has no relation with the trust domain %q", name)
	}
	if _, err := p.catalog.Delete(ctx, "ClusterFederatedTrustDomain", "", td.Name()); err != nil {
		return err
	}
	return p.bundles.Unrelate(td)
}

// relate brings one configured relation into force.
func (p *controlPlane) relate(t *discovery.FederatedTrustDomain) error {
	p.relating.Lock()
	defer p.relating.Unlock()
	td, err := spiffeid.TrustDomainFromString(t.TrustDomain)
	if err != nil {
		return fmt.Errorf("trust domain %q: %w", t.TrustDomain, err)
	}
	r := bundle.Relation{TrustDomain: td, URL: t.EndpointURL, Profile: bundle.Profile(t.Profile), WebRoots: t.WebRoots}
	if t.EndpointID != "" {
		if r.EndpointID, err = spiffeid.FromString(t.EndpointID); err != nil {
			return fmt.Errorf("endpoint SPIFFE ID %q: %w", t.EndpointID, err)
		}
	}
	if old, ok := p.bundles.Related(td); !ok || old != r {
		if err := p.bundles.Relate(r); err != nil {
			return err
		}
	}
	if t.Bundle == "" || p.initial[td] == t.Bundle {
		return nil // an initial bundle is taken once: what came since is newer
	}
	b, err := bundle.Parse(td, []byte(t.Bundle))
	if err != nil {
		return admin.Invalid("it must be the SPIFFE JSON form: hanse trust show -o json, or spire-server bundle show -format spiffe", "bundle of %s: %v", td, err)
	}
	// The first look of this process at a bundle without a sequence does not tell whether a person has changed it.
	_, seen := p.initial[td]
	if have, ok := p.bundles.Get(td); !ok || newer(b, have) && (seen || numbered(b)) {
		if err := p.bundles.Replace(td, b, "applied"); err != nil {
			return err
		}
	}
	p.initial[td] = t.Bundle
	return nil
}

func numbered(b *spiffebundle.Bundle) bool {
	_, ok := b.SequenceNumber()
	return ok
}

// bundleAge is how long ago a bundle was made: our authorities number them by time; of others it is the age of the newest authority.
func bundleAge(b *spiffebundle.Bundle, now time.Time) time.Duration {
	if seq, ok := b.SequenceNumber(); ok {
		if made := time.Unix(int64(min(seq, 1<<40)), 0); made.Year() > 2020 && made.Before(now.Add(time.Hour)) {
			return max(0, now.Sub(made))
		}
	}
	var newest time.Time
	for _, c := range b.X509Authorities() {
		if c.NotBefore.After(newest) {
			newest = c.NotBefore
		}
	}
	if newest.IsZero() {
		return 0
	}
	return max(0, now.Sub(newest))
}

func newer(b, than *spiffebundle.Bundle) bool {
	x, okX := b.SequenceNumber()
	y, okY := than.SequenceNumber()
	return !okX || !okY || x > y
}
