package main

import (
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hanse-mesh/hanse/cmd/internal/admin"
	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/federation"
	"github.com/hanse-mesh/hanse/federation/join"
	"github.com/hanse-mesh/hanse/federation/peering"
	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/identity/attest"
	"github.com/hanse-mesh/hanse/identity/ca"
)

// Clusters lists the members of the mesh, this cluster first.
func (p *controlPlane) Clusters(context.Context) (admin.Clusters, error) {
	s := p.mesh.Status()
	out := admin.Clusters{Mesh: s.Mesh, Clusters: p.clusters(s), Alarms: s.Alarms}
	for _, f := range s.Faults {
		out.Alarms = append(out.Alarms, "own export: "+f.Error())
	}
	for _, m := range s.Members {
		for _, f := range m.Faults {
			out.Alarms = append(out.Alarms, f.Error())
		}
	}
	return out, nil
}

func (p *controlPlane) clusters(s peering.Status) []admin.Cluster {
	now := p.now()
	rows := []admin.Cluster{{
		Name: s.Self.Name, ID: s.Self.ID, Self: true, TrustDomain: s.Self.TrustDomain, State: self, StateAge: age(now, s.Self.Changed), Synced: true,
		Exports: s.Exports, Endpoints: s.Local, Region: p.cfg.Region, Network: p.cfg.Network, Addresses: s.Self.Addresses,
		Gateways: addrPorts(s.Self.Gateways), Version: p.version,
	}}
	if s.Self.Standing == federation.Joining {
		rows[0].Note = "a join is not finished: it carries nothing yet; repeat hanse join with the same token"
	}
	for i := range s.Members {
		m := &s.Members[i]
		row := admin.Cluster{
			Name: m.Record.Name, ID: m.Record.ID, TrustDomain: m.Record.TrustDomain, State: m.State, StateAge: age(now, m.Since),
			Revision: m.Mirror.Revision, Synced: m.Mirror.Synced, Held: m.Mirror.Held, Exports: m.Exports, Endpoints: m.Endpoints,
			Region: m.Record.Region, Network: m.Record.Network, Addresses: m.Record.Addresses, Gateways: addrPorts(m.Record.Gateways),
			Version: m.Record.Version, Note: cmp.Or(m.Note, stateNote(m, now)),
			Probe: admin.Probe{Known: m.Probe.Known, OK: m.Probe.OK, RTT: m.Probe.RTT.Seconds(), Error: m.Probe.Error},
		}
		if lag, ok := m.Lag(); ok {
			row.Lag = &lag
		}
		if m.SeenAge >= 0 {
			seen := m.SeenAge.Seconds()
			row.SeenAge = &seen
		}
		if m.Probe.Known {
			row.Probe.Age = age(now, m.Probe.At)
		}
		rows = append(rows, row)
	}
	return rows
}

// stateNote says what a state means for the calls of people who read it.
func stateNote(m *peering.MemberStatus, now time.Time) string {
	switch m.State {
	case string(discovery.Suspect):
		data := "data path answers"
		if m.Probe.Known && !m.Probe.OK {
			data = "data path does not answer either"
		}
		silent := "since this control plane started"
		if m.SeenAge >= 0 {
			silent = "for " + m.SeenAge.Round(time.Second).String()
		}
		return fmt.Sprintf("control plane silent %s; its %d endpoints stay in use, ranked behind others (%s).", silent, m.Endpoints, data)
	case string(discovery.Withdrawn):
		return fmt.Sprintf("neither control plane nor data path answers; its %d endpoints are kept but not routed to.", m.Endpoints)
	}
	if m.Mirror.Held != "" {
		return "a loss is held back: " + m.Mirror.Held + "; if it is meant: hanse clusters accept " + m.Record.Name
	}
	return ""
}

func age(now, t time.Time) float64 {
	if t.IsZero() {
		return 0
	}
	return max(0, now.Sub(t).Seconds())
}

// seenAges is how many seconds ago each member was last heard of; those never heard of are missing.
func (p *controlPlane) seenAges() map[string]float64 {
	ages := map[string]float64{}
	for _, m := range p.mesh.Status().Members {
		if m.SeenAge >= 0 {
			ages[m.Record.Name] = m.SeenAge.Seconds()
		}
	}
	return ages
}

// probeState is what the last round of probes found at a gateway address.
func (p *controlPlane) probeState(a netip.AddrPort) string {
	for _, m := range p.mesh.Status().Members {
		if slices.Contains(m.Record.Gateways, a) && m.Probe.Known {
			if m.Probe.OK {
				return "up"
			}
			return "down"
		}
	}
	return ""
}

// Status says whether all is well. It is green only if every member is fresh, synced, and its data path answered a probe with SVIDs.
func (p *controlPlane) Status(ctx context.Context) (admin.Status, error) {
	s := p.mesh.Status()
	services, err := p.Services(ctx)
	if err != nil {
		return admin.Status{}, err
	}
	out := admin.Status{Cluster: p.cfg.Cluster, TrustDomain: p.cfg.TrustDomain, Version: p.version, Clusters: p.clusters(s), Proxies: len(p.proxies()), Services: len(services)}
	check := func(c admin.Check) { out.Checks = append(out.Checks, c) }
	if !p.replicas.alone() {
		out.Replicas = p.replicas.rows(p.now(), p.signs())
		check(p.replicas.check(p.now()))
	}

	if p.upstream != nil {
		check(upstreamCheck(p.upstream))
	}
	if p.onSPIRE != nil {
		out.Checks = append(out.Checks, p.spireCheck(p.now())...)
	}
	if svid, err := p.source.GetX509SVID(); err != nil || !svid.Certificates[0].NotAfter.After(p.now()) {
		check(admin.Check{Name: "own SVID", Detail: "expired or missing", Remedy: "look at hansed's log: its authority cannot sign"})
	} else {
		check(admin.Check{Name: "own SVID", OK: true, Detail: fmt.Sprintf("%s, expires in %s", svid.ID, svid.Certificates[0].NotAfter.Sub(p.now()).Round(time.Second))})
	}
	if faults := p.catalog.Faults(); len(faults) > 0 {
		f := faults[0]
		check(admin.Check{Name: "configuration", Detail: fmt.Sprintf("%d faults; the last good state is in force. First: %s", len(faults), faultText(f)), Remedy: "correct it; hanse validate -f shows all"})
	} else {
		detail := fmt.Sprintf("%d services", len(services))
		if len(services) == 1 {
			detail = "1 service"
		}
		check(admin.Check{Name: "configuration", OK: true, Detail: detail})
	}
	for i := range s.Members {
		check(memberCheck(&s.Members[i]))
	}
	for _, a := range s.Alarms {
		check(admin.Check{Name: "membership", Detail: a, Remedy: "hanse clusters -o wide"})
	}
	behind := 0
	for _, x := range p.proxies() {
		for _, t := range x.Types {
			if t.NACK != "" {
				behind++
				break
			}
		}
	}
	if behind > 0 {
		check(admin.Check{Name: "proxies", Detail: fmt.Sprintf("%d of %d rejected their configuration and keep the last good one", behind, out.Proxies), Remedy: "hanse proxies says why"})
	} else {
		check(admin.Check{Name: "proxies", OK: true, Detail: fmt.Sprintf("%d connected", out.Proxies)})
	}
	bad := 0
	for _, c := range out.Checks {
		if !c.OK && !c.Warn {
			bad++
		}
	}
	out.OK = bad == 0
	switch {
	case !out.OK:
		out.Summary = fmt.Sprintf("%s: %d of %d checks failed.", p.cfg.Cluster, bad, len(out.Checks))
	case present(s.Members) == 0:
		out.Summary = fmt.Sprintf("%s is well, and alone: no other cluster has joined.", p.cfg.Cluster)
	default:
		out.Summary = fmt.Sprintf("%s is well: %d clusters in mesh %q, all fresh, synced and probed end to end.", p.cfg.Cluster, present(s.Members)+1, s.Mesh)
	}
	return out, nil
}

// signs are the replicas that sign themselves.
func (p *controlPlane) signs() map[string]bool {
	if p.roots == nil {
		return nil
	}
	return p.roots.signs()
}

// present counts the members that have not left.
func present(members []peering.MemberStatus) int {
	n := 0
	for i := range members {
		if members[i].State != string(federation.Left) {
			n++
		}
	}
	return n
}

func memberCheck(m *peering.MemberStatus) admin.Check {
	c := admin.Check{Name: "cluster " + m.Record.Name}
	var parts []string
	fail := func(remedy, format string, args ...any) {
		parts = append(parts, fmt.Sprintf(format, args...))
		c.Remedy = cmp.Or(c.Remedy, remedy)
	}
	if m.State == string(federation.Left) {
		c.OK, c.Detail = true, "has left"
		return c
	}
	if m.State != string(discovery.Fresh) {
		fail("is its hansed running, and is its federation address reachable from here? hanse clusters -o wide", "is %s", m.State)
	}
	if !m.Mirror.Synced {
		fail("wait for the first sync; if it lasts: hansed's log names the error", "is not synced%s", colon(m.Mirror.Err))
	}
	if m.Mirror.Held != "" {
		fail("if the loss is meant: hanse clusters accept "+m.Record.Name, "a loss is held back: %s", m.Mirror.Held)
	}
	switch {
	case !m.Probe.Known:
		fail("the first probe comes within seconds", "its data path has not been probed yet")
	case !m.Probe.OK:
		fail("are its gateways running, and reachable from here?", "its data path does not answer%s", colon(m.Probe.Error))
	}
	if len(parts) > 0 {
		c.Detail = strings.Join(parts, "; ")
		return c
	}
	lag, _ := m.Lag()
	c.OK = true
	c.Detail = fmt.Sprintf("fresh, lag %d, seen %s ago, probe with SVIDs ok in %s", lag, m.SeenAge.Round(time.Second), m.Probe.RTT.Round(100*time.Microsecond))
	return c
}

func colon(s string) string {
	if s == "" {
		return ""
	}
	return ": " + s
}

func faultText(f admin.Fault) string {
	var parts []string
	if f.File != "" {
		parts = append(parts, fmt.Sprintf("%s:%d", f.File, f.Line))
	}
	for _, s := range []string{f.Object, f.Field, f.Reason} {
		if s != "" {
			parts = append(parts, s)
		}
	}
	return strings.Join(parts, ": ")
}

const maxTokenLife = 24 * time.Hour

// CreateToken makes a mesh token or an agent token.
func (p *controlPlane) CreateToken(ctx context.Context, req admin.TokenRequest) (admin.Token, error) {
	life := time.Duration(req.TTL * float64(time.Second))
	if life < 0 || life > maxTokenLife {
		return admin.Token{}, admin.Invalid("a token is for now, not for later", "token life %s: want at most %s", life, maxTokenLife)
	}
	switch {
	case (req.For == "") == (req.Workload == ""):
		return admin.Token{}, admin.Invalid("hanse token create --help", "a token is either for a cluster or for a workload")
	case req.For != "":
		if !dnsLabel.MatchString(req.For) {
			return admin.Token{}, admin.Invalid("lower-case letters, digits and -", "cluster name %q is not a DNS label", req.For)
		}
		t, expires, err := p.mesh.CreateToken(ctx, req.For, life)
		if err != nil {
			return admin.Token{}, admin.Refused("hanse clusters shows who is in the mesh", "%v", err)
		}
		return admin.Token{Token: t, For: req.For, Expires: expires}, nil
	}
	if err := p.bySPIRE("an agent token", "spire-server token generate; workloads of discovered services have their entries by themselves"); err != nil {
		return admin.Token{}, err
	}
	var id spiffeid.ID
	if req.Workload == "gateway" {
		id = identity.GatewayID(p.td)
	} else {
		ns, sa, ok := strings.Cut(req.Workload, "/")
		var err error
		if id, err = identity.WorkloadID(p.td, ns, sa); !ok || err != nil {
			return admin.Token{}, admin.Invalid("name it as namespace/serviceaccount, or gateway", "workload %q", req.Workload)
		}
	}
	t, expires, err := p.tokens.Create(ctx, attest.Grant{ID: id}, life)
	return admin.Token{Token: t, For: req.Workload, Expires: expires}, err
}

const (
	adminLife    = 12 * time.Hour
	maxAdminLife = 7 * 24 * time.Hour
)

// IssueAdmin signs an administrator's SVID. Who may ask is an administrator already: by the socket, or by an SVID of this kind.
func (p *controlPlane) IssueAdmin(ctx context.Context, req admin.AdminRequest) (admin.AdminSVID, error) {
	id, err := identity.AdminID(p.td, req.Name)
	if err != nil {
		return admin.AdminSVID{}, admin.Invalid("letters, digits, - . and _", "administrator's name %q: %v", req.Name, err)
	}
	life := cmp.Or(time.Duration(req.TTL*float64(time.Second)), adminLife)
	if life < time.Minute || life > maxAdminLife {
		return admin.AdminSVID{}, admin.Invalid("make it as short as you can", "life %s: want between 1m and %s", life, maxAdminLife)
	}
	key, err := x509.ParsePKIXPublicKey(req.PublicKey)
	if ec, ok := key.(*ecdsa.PublicKey); err != nil || !ok || ec.Curve != elliptic.P256() && ec.Curve != elliptic.P384() {
		return admin.AdminSVID{}, admin.Invalid("hanse makes one", "the public key is not one of EC P-256 or P-384")
	}
	if err := p.bySPIRE("an administrator's SVID", fmt.Sprintf("spire-server x509 mint -spiffeID %s -ttl %s", id, life)); err != nil {
		return admin.AdminSVID{}, err
	}
	chain, err := p.authority.SignX509(ctx, ca.X509Params{ID: id, PublicKey: key, TTL: life})
	if err != nil {
		return admin.AdminSVID{}, err
	}
	out := admin.AdminSVID{ID: id.String(), Address: p.cfg.Remote.Listen, Expires: chain[0].NotAfter}
	for _, c := range chain {
		out.Chain = append(out.Chain, c.Raw)
	}
	own, ok := p.bundles.Get(p.td)
	if !ok {
		return admin.AdminSVID{}, errors.New("the own bundle is missing")
	}
	if out.Bundle, err = own.Marshal(); err != nil {
		return admin.AdminSVID{}, err
	}
	p.log.Info("administrator's SVID issued", "id", out.ID, "expires", out.Expires)
	return out, nil
}

// Join joins a mesh, or with req.Check only finds out whether it could.
func (p *controlPlane) Join(ctx context.Context, req admin.JoinRequest, emit func(admin.Event) error) (admin.JoinResult, error) {
	var lost error // the caller has gone; a join goes on all the same
	progress := func(g peering.Progress) {
		ev := admin.Event{Step: g.Step}
		if g.Check != nil {
			ev.Check = &admin.Check{Name: g.Check.Name, OK: g.Check.OK, Detail: g.Check.Detail, Remedy: g.Check.Remedy}
		}
		if lost == nil {
			lost = emit(ev)
		}
	}
	token := strings.TrimSpace(req.Token)
	if req.Check {
		v, err := p.mesh.Preview(ctx, token, progress)
		if err != nil {
			return admin.JoinResult{}, joinError(err)
		}
		return admin.JoinResult{Mesh: v.Mesh, Cluster: p.cfg.Cluster, Through: v.Issuer.Name, TrustDomain: v.Issuer.TrustDomain, Members: v.Members}, nil
	}
	r, err := p.mesh.Join(context.WithoutCancel(ctx), token, progress)
	if err != nil {
		return admin.JoinResult{}, joinError(err)
	}
	return admin.JoinResult{Mesh: r.Mesh, Cluster: p.cfg.Cluster, Through: r.Through, TrustDomain: r.TrustDomain, Members: r.Members, Accepts: r.Accepts, Imports: r.Imports, Exports: r.Exports}, nil
}

func joinError(err error) error {
	var failed *join.CheckError
	switch {
	case errors.As(err, &failed):
		return admin.Refused("each failed check above has its remedy; nothing was changed", "%v", err)
	case errors.Is(err, join.ErrTampered):
		return admin.Invalid("copy the whole token again, from hns1_ to its end", "%v", err)
	case errors.Is(err, join.ErrWrong), errors.Is(err, join.ErrUsed), errors.Is(err, join.ErrExpired):
		return admin.Refused("make another on a member: hanse token create --for NAME", "%v", err)
	case errors.Is(err, peering.ErrAlreadyInMesh):
		return admin.Refused("hanse leave, then join again", "%v", err)
	}
	return admin.Refused("repeat it with the same token; what was done is not done twice", "join: %v", err)
}

// Leave takes this cluster, or by force another, out of the mesh.
func (p *controlPlane) Leave(ctx context.Context, req admin.LeaveRequest) (admin.LeaveResult, error) {
	r, err := p.mesh.Leave(context.WithoutCancel(ctx), req.Member, req.Force)
	switch {
	case errors.Is(err, peering.ErrNoSuchMember):
		return admin.LeaveResult{}, admin.NotFound("hanse clusters lists them", "%v", err)
	case errors.Is(err, peering.ErrNobodyTold), errors.Is(err, peering.ErrNeedsForce):
		return admin.LeaveResult{}, admin.Refused("hanse leave --force does it all the same; the others learn it when they meet", "%v", err)
	case err != nil:
		return admin.LeaveResult{}, err
	}
	return admin.LeaveResult{Member: r.Member, State: r.State, Told: r.Told, Untold: r.Untold, Note: r.Note}, nil
}

// AcceptHeld lets a member's loss, introduction or proposed leave take effect.
func (p *controlPlane) AcceptHeld(ctx context.Context, member string) error {
	err := p.mesh.AcceptHeld(ctx, member)
	switch {
	case errors.Is(err, peering.ErrNoSuchMember):
		return admin.NotFound("hanse clusters lists them", "%v", err)
	case errors.Is(err, peering.ErrNothingHeld):
		return admin.Refused("hanse clusters -o wide shows what is held", "%v", err)
	}
	return err
}
