package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hanse-mesh/hanse/cmd/internal/admin"
	"github.com/hanse-mesh/hanse/identity/bundle"
	"github.com/hanse-mesh/hanse/identity/ca"
)

const (
	lookAgain     = 100 * time.Millisecond // while something is waited for
	tellAgain     = time.Second            // to a watcher, without news
	distrustWait  = 30 * time.Second       // default, for confirmations
	maxWait       = 10 * time.Minute
	agentSyncTime = 5 * time.Second // of stock agents: what they fetch they hand on within it
)

// teller emits a payload when it has news, and about each second, without the fields that only count time.
type teller struct {
	emit func(admin.Event) error
	now  func() time.Time
	last any
	at   time.Time
}

func (t *teller) tell(v, news any) error {
	now := t.now()
	if reflect.DeepEqual(t.last, news) && now.Sub(t.at) < tellAgain {
		return nil
	}
	t.last, t.at = news, now
	ev, err := admin.DataEvent(v)
	if err != nil {
		return err
	}
	return t.emit(ev)
}

// wait tells, and then waits until it is time to look again.
func (t *teller) wait(ctx context.Context, v, news any) error {
	if err := t.tell(v, news); err != nil {
		return err
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(lookAgain):
		return nil
	}
}

// TrustRotate prepares a root and watches until it is active, at all replicas that are there. The authorities' own loops activate them: a
// watcher that goes changes nothing.
func (p *controlPlane) TrustRotate(ctx context.Context, req admin.RotateRequest, emit func(admin.Event) error) (admin.Rotation, error) {
	if err := p.bySPIRE("rotation", "spire-server localauthority x509 prepare; then hanse trust show "+p.td.Name()+" until nobody is missing; then spire-server localauthority x509 activate"); err != nil {
		return admin.Rotation{}, err
	}
	before := p.signingRoot()
	number, root, err := p.beginRotation(ctx, req.ActivateNow && req.Force)
	if err != nil {
		return admin.Rotation{}, err
	}
	sequence, deadline := p.authority.Sequence(), p.authority.Deadline()
	out := admin.Rotation{State: "waiting", Root: bundle.AuthorityID(root.Certificate), Sequence: sequence, Missing: []string{}, Deadline: deadline}
	if before != nil && before.KeyID != root.KeyID {
		out.Old = bundle.AuthorityID(before.Certificate)
	}
	if req.ActivateNow && root.Phase == "prepared" {
		ok, missing := p.rootAcknowledged(sequence)
		if !ok && !req.Force {
			return out, admin.Refused("wait: hanse trust rotate; or, if the old key is stolen: hanse trust rotate --activate-now --force",
				"the root is prepared, but %s not loaded it and would refuse what it signs: %s", hasOrHave(len(missing)), strings.Join(missing, ", "))
		}
		if p.roots == nil { // else it is ordered
			if err := p.authority.ActivateRoot(root.KeyID); err != nil && !errors.Is(err, ca.ErrWrongPhase) { // or by its own loop, meanwhile
				return out, err
			}
		}
		out.Forced, out.Missing = !ok, append(out.Missing, missing...)
		if !ok {
			p.log.Warn("root activated by force; these may refuse its SVIDs until they load the bundle", "missing", missing)
		}
	}
	t := teller{emit: emit, now: p.now}
	start := p.now()
	for {
		now := p.now()
		out.Elapsed, out.Left = now.Sub(start).Seconds(), max(0, deadline.Sub(now).Seconds())
		active, gone := false, true
		for _, r := range p.authority.Roots() {
			switch {
			case r.KeyID == root.KeyID:
				active, gone = r.Phase != "prepared", false
			case r.Phase == "old" && bundle.AuthorityID(r.Certificate) == out.Old:
				until := r.SignedUntil
				out.OldUntil, out.OldLeft = &until, max(0, until.Sub(now).Seconds())
			}
		}
		var behind []string // other replicas
		if p.roots != nil {
			behind, out.Away = p.roots.rotating(number)
		}
		switch {
		case gone:
			return out, admin.Refused("hanse trust show says what is", "the prepared root was withdrawn by somebody else")
		case active && len(behind) == 0:
			out.State = "active"
			if !out.Forced {
				out.Missing = []string{}
			}
			return out, nil
		case !active && !out.Forced:
			_, out.Missing = p.rootAcknowledged(sequence)
			out.Missing = append([]string{}, out.Missing...)
		case !out.Forced:
			out.Missing = behind
		}
		if err := t.wait(ctx, out, slices.Clone(out.Missing)); err != nil {
			return out, err
		}
	}
}

// beginRotation makes the next root; where there are other replicas all make theirs, and number is the rotation's.
func (p *controlPlane) beginRotation(ctx context.Context, force bool) (number int64, root ca.Root, err error) {
	if p.roots == nil {
		root, err = p.authority.Rotate()
	} else if number, err = p.roots.orderRotation(ctx, force); err == nil {
		root, err = p.roots.begun(ctx, number)
	}
	if err != nil {
		return 0, root, fmt.Errorf("rotate: %w", err)
	}
	return number, root, nil
}

// signingRoot is the root that signs; nil where none does.
func (p *controlPlane) signingRoot() *ca.Root {
	for _, r := range p.authority.Roots() {
		if r.Phase == "active" {
			return &r
		}
	}
	return nil
}

func hasOrHave(n int) string {
	if n == 1 {
		return "one has"
	}
	return fmt.Sprintf("%d have", n)
}

// TrustDistrust takes a trust domain, or an authority, out of force.
func (p *controlPlane) TrustDistrust(ctx context.Context, req admin.DistrustRequest, emit func(admin.Event) error) (admin.Distrusted, error) {
	td, authority, err := p.findTrust(req.What)
	if err != nil {
		return admin.Distrusted{}, err
	}
	wait := distrustWait
	if req.Wait > 0 {
		wait = min(time.Duration(req.Wait*float64(time.Second)), maxWait)
	}
	out := admin.Distrusted{TrustDomain: td.Name(), Authority: authority, Missing: []string{}, Undone: req.Undo}
	t, start := teller{emit: emit, now: p.now}, p.now()
	switch {
	case td == p.td && authority == "":
		return out, admin.Refused("name one of its roots: hanse trust show", "%s is this cluster's own trust domain", td)
	case td == p.td && req.Undo:
		return out, admin.Refused("hanse trust rotate makes another", "a root of this cluster that was revoked is gone")
	case td == p.td:
		return p.revokeOwn(ctx, authority, req.Force, wait, out, &t)
	case req.Undo:
		found, err := p.distrusts.undo(ctx, td, authority)
		if err != nil {
			return out, err
		}
		if !found {
			return out, admin.NotFound("hanse trust list", "%s is not distrusted", req.What)
		}
		return p.confirmed(ctx, start, wait, out, &t, func(*admin.Distrusted) bool { return true })
	}
	revision, err := p.distrusts.add(ctx, td, authority)
	if err != nil {
		if errors.Is(err, bundle.ErrTooMany) {
			return out, admin.Refused("take back what is settled: hanse trust distrust --undo", "%v", err)
		}
		return out, err
	}
	if revision == 0 {
		out.Note = "etcd does not answer: replicas that cannot be reached now obey when it does"
	}
	return p.confirmed(ctx, start, wait, out, &t, func(d *admin.Distrusted) bool {
		d.Missing = append(d.Missing, p.distrusts.missing(revision)...)
		return len(d.Missing) == 0
	})
}

// findTrust resolves a trust domain or the beginning of an authority's name.
func (p *controlPlane) findTrust(what string) (spiffeid.TrustDomain, string, error) {
	if td, err := spiffeid.TrustDomainFromString(what); err == nil {
		distrusted := slices.ContainsFunc(p.bundles.Distrusted(), func(d bundle.Distrust) bool { return d.TrustDomain == td.Name() })
		if _, ok := p.bundles.Related(td); ok || td == p.td || distrusted {
			return td, "", nil
		}
	}
	td, authority, err := p.bundles.Find(what)
	switch {
	case errors.Is(err, bundle.ErrAmbiguous):
		return td, "", admin.Invalid("give more of it: hanse trust show", "%v", err)
	case err != nil:
		if p.roots != nil {
			if authority, ok := p.roots.revokedLike(what); ok {
				return p.td, authority, nil
			}
		}
		for _, d := range p.bundles.Distrusted() { // its bundle may have gone since
			if len(what) >= 8 && strings.HasPrefix(d.Authority, strings.ToLower(what)) {
				td, err := spiffeid.TrustDomainFromString(d.TrustDomain)
				return td, d.Authority, err
			}
		}
		return td, "", admin.NotFound("hanse trust list names the trust domains, hanse trust show NAME its roots; an authority is named by at least 8 digits",
			"there is no trust domain and no authority %q", what)
	}
	return td, authority, nil
}

// confirmed waits until this control plane and all its proxies act by the present bundles, and done is satisfied too. What has been
// changed stays, whoever does not confirm.
func (p *controlPlane) confirmed(ctx context.Context, start time.Time, wait time.Duration, out admin.Distrusted, t *teller, done func(*admin.Distrusted) bool) (admin.Distrusted, error) {
	for {
		now := p.now()
		if out.HansedIn == 0 && p.sourceCurrent() {
			p.board.reverify() // what its own loop has not closed yet
			out.HansedIn = p.now().Sub(start).Seconds()
		}
		behind, current := p.xds.TrustBehind()
		if !p.trustAnnounced() {
			behind = append(behind, "this control plane")
		}
		if current > out.Confirmed || len(behind) == 0 && len(out.Missing) > 0 {
			out.LastIn = now.Sub(start).Seconds()
		}
		out.Confirmed, out.Missing = current, append([]string{}, behind...)
		if len(behind) == 0 && out.HansedIn > 0 && done(&out) {
			if out.LastIn == 0 && current > 0 {
				out.LastIn = now.Sub(start).Seconds()
			}
			out.Closed = p.board.closed(start)
			return out, nil
		}
		out.Closed = p.board.closed(start)
		if now.Sub(start) > wait {
			return out, nil
		}
		if err := t.tell(out, [2]any{out.Confirmed, slices.Clone(out.Missing)}); err != nil {
			return out, err
		}
		select {
		case <-ctx.Done():
			return out, ctx.Err()
		case <-time.After(lookAgain / 10):
		}
	}
}

// sourceCurrent says whether handshakes go by the bundles in the store.
func (p *controlPlane) sourceCurrent() bool {
	have, want := p.source.Bundles(), p.bundles.All()
	if len(have) != len(want) {
		return false
	}
	for td, b := range want {
		if x := have[td]; x == nil || !x.Equal(b) {
			return false
		}
	}
	return true
}

// trustAnnounced says whether the proxies were told of the present revision.
func (p *controlPlane) trustAnnounced() bool {
	return p.xds.TrustRevision() == uint64(p.bundles.Revision())
}

// revokeOwn is leaveOwn, and waits until everybody has loaded that.
func (p *controlPlane) revokeOwn(ctx context.Context, authority string, force bool, wait time.Duration, out admin.Distrusted, t *teller) (admin.Distrusted, error) {
	if err := p.bySPIRE("distrust of its own root", "spire-server localauthority x509 taint, and, when all have renewed, revoke"); err != nil {
		return out, err
	}
	out, err := p.leaveOwn(ctx, authority, force, wait, out, t)
	if err != nil {
		return out, err
	}
	return p.announced(ctx, p.now(), wait, out, t)
}

// leaveOwn takes a root of this cluster out of the bundle, after those who rest on it have left it.
func (p *controlPlane) leaveOwn(ctx context.Context, authority string, force bool, wait time.Duration, out admin.Distrusted, t *teller) (admin.Distrusted, error) {
	if p.roots != nil {
		return p.revokeShared(ctx, authority, force, wait, out, t)
	}
	return p.revokeAlone(ctx, authority, force, wait, out, t)
}

func refuseSigning() error {
	return admin.Refused("first hanse trust rotate; if its key is stolen: hanse trust rotate --activate-now --force", "this root signs now: nothing could be issued without it")
}

// shutOut is the note on those who were not waited for.
func shutOut(names []string) string {
	if len(names) == 0 {
		return ""
	}
	return "shut out, and in need of new tokens: " + strings.Join(names, ", ")
}

// revokeAlone revokes a root where there is no other replica.
func (p *controlPlane) revokeAlone(ctx context.Context, authority string, force bool, wait time.Duration, out admin.Distrusted, t *teller) (admin.Distrusted, error) {
	i := slices.IndexFunc(p.authority.Roots(), func(r ca.Root) bool {
		return bundle.AuthorityID(r.Certificate) == authority || r.JWTKeyID == authority
	})
	if i < 0 {
		return out, admin.NotFound("hanse trust show", "the root %s is not of this control plane", authority)
	}
	root := p.authority.Roots()[i]
	switch root.Phase {
	case "active":
		return out, refuseSigning()
	case "prepared":
		return out, p.authority.Withdraw(root.KeyID)
	}
	if err := p.authority.Taint(root.KeyID); err != nil && !errors.Is(err, ca.ErrWrongPhase) {
		return out, err
	}
	out, resting, err := p.whileRenewing(ctx, wait, out, t, "run it again when they are back", func(elapsed time.Duration) ([]string, bool) {
		resting := p.spire.RestingOn(root.KeyID)
		return resting, len(resting) == 0 || force && elapsed > agentSyncTime
	})
	if err != nil {
		return out, err
	}
	out.Note = shutOut(resting)
	return out, p.authority.Revoke(root.KeyID)
}

// revokeShared orders the revocation of a replica's root, which may be away, and waits until it is out of the bundle. Who goes away changes nothing.
func (p *controlPlane) revokeShared(ctx context.Context, authority string, force bool, wait time.Duration, out admin.Distrusted, t *teller) (admin.Distrusted, error) {
	v, ok := p.roots.ordered(authority)
	if !ok || force && !v.Force && !v.Revoked {
		root, owner, found := p.roots.find(authority)
		here := p.replicas.here()[owner]
		switch {
		case !found && !ok:
			return out, admin.NotFound("hanse trust show", "the root %s is not of a replica of this control plane", authority)
		case !found: // its owner has dropped it, and says so
		case root.Phase == "active" && here:
			return out, refuseSigning()
		default:
			if err := p.roots.orderRevocation(ctx, root, owner, force); err != nil {
				return out, err
			}
		}
	}
	var last []string
	out, _, err := p.whileRenewing(ctx, wait, out, t, "it goes on by itself when they are back", func(time.Duration) ([]string, bool) {
		if v, ok := p.roots.ordered(authority); ok && !v.Revoked {
			last = p.roots.leaving(v.Authority)
		}
		return last, !inBundle(p.ownBundle(), authority)
	})
	if v, ok := p.roots.ordered(authority); err == nil && ok && v.Force {
		out.Note = shutOut(last)
	}
	return out, err
}

// whileRenewing waits until nobody need be waited for any more, and returns who rested on the root then.
func (p *controlPlane) whileRenewing(ctx context.Context, wait time.Duration, out admin.Distrusted, t *teller, later string, look func(elapsed time.Duration) (resting []string, done bool)) (admin.Distrusted, []string, error) {
	for start := p.now(); ; {
		elapsed := p.now().Sub(start)
		resting, done := look(elapsed)
		if done {
			out.Note = ""
			return out, resting, nil
		}
		if elapsed > wait {
			if len(resting) == 0 { // and nobody takes the root out
				return out, nil, admin.Refused("hanse status says who leads; it goes on by itself", "the root is tainted, but not revoked: no replica leads")
			}
			return out, nil, admin.Refused(later+"; with --force they are shut out and need new tokens",
				"the root is tainted, but not revoked: %d agents still rest on it: %s", len(resting), strings.Join(resting, ", "))
		}
		out.Missing, out.Note = append([]string{}, resting...), "agents are renewing what the root signed"
		if err := t.wait(ctx, out, out.Missing); err != nil {
			return out, nil, err
		}
	}
}

// inBundle looks for an authority in a bundle by its name: an X.509 one's key, or a JWT key ID.
func inBundle(b *spiffebundle.Bundle, authority string) bool {
	return b.HasJWTAuthority(authority) ||
		slices.ContainsFunc(b.X509Authorities(), func(c *x509.Certificate) bool { return bundle.AuthorityID(c) == authority })
}

// announced waits until everybody has the own bundle as it is now: this cluster's proxies and agents, and the other clusters.
func (p *controlPlane) announced(ctx context.Context, start time.Time, wait time.Duration, out admin.Distrusted, t *teller) (admin.Distrusted, error) {
	sequence := p.authority.Sequence()
	if p.roots != nil {
		sequence, _ = p.ownBundle().SequenceNumber()
	}
	out.Missing = []string{}
	return p.confirmed(ctx, start, wait, out, t, func(d *admin.Distrusted) bool {
		for member, seq := range p.mesh.Acked(p.td) {
			if seq < sequence {
				d.Missing = append(d.Missing, "cluster "+member)
			}
		}
		for _, x := range p.xds.TrustLacking(p.td.Name(), sequence, p.rollCall.before()) {
			d.Missing = append(d.Missing, x.ID)
		}
		if b, ok := p.bundles.Get(p.td); !ok {
			d.Missing = append(d.Missing, "this control plane")
		} else if seq, _ := b.SequenceNumber(); seq < sequence {
			d.Missing = append(d.Missing, "this control plane")
		}
		if p.acks != nil {
			d.Missing = append(d.Missing, p.acks.missing(sequence)...)
		}
		slices.Sort(d.Missing)
		d.Missing = slices.Compact(d.Missing) // a proxy may lack the revision, too
		return len(d.Missing) == 0
	})
}

// TrustRefresh pulls a bundle now.
func (p *controlPlane) TrustRefresh(ctx context.Context, name string) (admin.TrustDomain, error) {
	td, err := spiffeid.TrustDomainFromString(name)
	if err != nil {
		return admin.TrustDomain{}, admin.Invalid("hanse trust list", "trust domain %q: %v", name, err)
	}
	r, ok := p.bundles.Related(td)
	switch {
	case !ok:
		return admin.TrustDomain{}, admin.NotFound("hanse trust list", "this cluster has no relation with the trust domain %q", name)
	case r.URL == "":
		return admin.TrustDomain{}, admin.Refused("members of the mesh push theirs within seconds; else: hanse trust add "+name+" --endpoint URL", "%s has no bundle endpoint to ask", name)
	}
	if err := p.puller.Refresh(ctx, td); err != nil {
		return admin.TrustDomain{}, admin.Refused("hanse trust show "+name+" says what is in force", "%v", err)
	}
	return p.TrustShow(ctx, name)
}
