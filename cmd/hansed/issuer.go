package main

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hanse-mesh/hanse/cmd/internal/admin"
	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/identity/bundle"
	"github.com/hanse-mesh/hanse/identity/ca"
	"github.com/hanse-mesh/hanse/identity/onspire"
	"github.com/hanse-mesh/hanse/identity/upstream"
)

// issuer is whom the identities of this cluster come from: its own authority, or a SPIRE that was there before.
type issuer interface {
	Run(ctx context.Context) error
	// RunSVID keeps the control plane's own SVID in src until ctx ends.
	RunSVID(ctx context.Context, src *identity.Source) error
	// Sign makes an X509-SVID with DNS names, for a server of this control plane whose clients know no SPIFFE IDs.
	Sign(ctx context.Context, key crypto.Signer, id spiffeid.ID, life time.Duration, dnsNames []string) ([]*x509.Certificate, error)
	// Bundle is the own trust domain's; ok is false while the issuer has not said.
	Bundle() (b *spiffebundle.Bundle, ok bool)
	// Changed returns a channel that is closed at the next change of it. Take it before reading.
	Changed() <-chan struct{}
}

// ownAuthority is hansed as its own issuer.
type ownAuthority struct {
	*ca.Authority
	id   spiffeid.ID
	life time.Duration
}

func (a ownAuthority) RunSVID(ctx context.Context, src *identity.Source) error {
	return a.Authority.RunSVID(ctx, a.id, a.life, src)
}

func (a ownAuthority) Sign(ctx context.Context, key crypto.Signer, id spiffeid.ID, life time.Duration, dnsNames []string) ([]*x509.Certificate, error) {
	return a.SignX509(ctx, ca.X509Params{ID: id, PublicKey: key.Public(), TTL: life, DNSNames: dnsNames})
}

func (a ownAuthority) Bundle() (*spiffebundle.Bundle, bool) { return a.Authority.Bundle(), true }

// firstPatience is how long a start waits for spire-server, where this cluster has never seen its bundle.
const firstPatience = 30 * time.Second

// openSPIRE makes SPIRE the issuer.
func (p *controlPlane) openSPIRE(ctx context.Context, reg prometheus.Registerer) error {
	c := p.cfg.Identity.SPIRE
	s, err := onspire.New(onspire.Config{Address: c.Server, WorkloadAPI: c.WorkloadAPI, TrustDomain: p.td, Relay: relayAddress(p.cfg), Linger: c.Linger.Duration, Lead: p.replicas.term,
		Log: p.log.With("part", "spire"), Registerer: reg})
	if err != nil {
		return err
	}
	if p.workloads, err = newRegistrar(p.cfg, p.log.With("part", "spire")); err != nil {
		return err
	}
	p.onSPIRE, p.issuer = s, s
	if _, known := p.bundles.Get(p.td); known {
		return nil // what SPIRE said last stays in force until it answers
	}
	ctx, cancel := context.WithTimeout(ctx, firstPatience)
	defer cancel()
	if err := s.First(ctx); err != nil {
		return errors.Join(fmt.Errorf("identity.spire: %w: is it running, and may this user read its socket, or is this SVID an administrator's?", err), s.Close())
	}
	b, _ := s.Bundle()
	return p.takeOwnBundle(b)
}

// upstreamCA is a CA above the own authority.
type upstreamCA interface {
	ca.Upstream
	fmt.Stringer
	Run(ctx context.Context) error
	Err() error // of what was tried last; nil: it is well
}

// openCA opens the own authority. Where it needs a signature from a SPIRE above, that is waited for.
func (p *controlPlane) openCA(ctx context.Context, cfg ca.Config) (*ca.Authority, error) {
	ctx, cancel := context.WithTimeout(ctx, firstPatience)
	defer cancel()
	for {
		a, err := ca.Open(cfg)
		if err != nil && errors.Is(err, ca.ErrUpstream) {
			err = fmt.Errorf("identity.upstream: %w", err)
		}
		if p.cfg.Identity.Upstream.SPIRE.Server == "" || !errors.Is(err, ca.ErrUpstream) {
			return a, err
		}
		if pause(ctx, 500*time.Millisecond); ctx.Err() != nil {
			return nil, err
		}
	}
}

// openUpstream opens what the configuration sets above the own authority, if anything.
func (p *controlPlane) openUpstream() (upstreamCA, error) {
	c, log := p.cfg.Identity.Upstream, p.log.With("part", "upstream")
	switch {
	case c.SPIRE.Server != "":
		return upstream.NewSPIRE(upstream.SPIREConfig{Server: c.SPIRE.Server, WorkloadAPI: c.SPIRE.WorkloadAPI, TrustDomain: p.td, Log: log})
	case c.Dir != "" || c.CertFile != "":
		// What is wrong with them is in the log, and in Err. A CA that they signed before signs on; without one the start ends.
		f, _ := upstream.OpenFiles(upstream.FilesConfig{Dir: c.Dir, CertFile: c.CertFile, KeyFile: c.KeyFile, CAFile: c.CAFile, TrustDomain: p.td, Now: p.now, Log: log})
		return f, nil
	}
	return nil, nil
}

// upstreamCheck is the line of status on it.
func upstreamCheck(u upstreamCA) admin.Check {
	c := admin.Check{Name: "upstream authority", OK: true, Detail: u.String()}
	if err := u.Err(); err != nil {
		c.OK, c.Detail = false, fmt.Sprintf("%s: the last good state stays in force: %v", u, err)
		c.Remedy = "correct it before this authority's CA expires: hanse trust show"
	}
	return c
}

// relayAddress is where spire-server reaches this control plane's bundle endpoint.
func relayAddress(cfg *Config) string {
	if a := cfg.Identity.SPIRE.BundleEndpoint; a != "" {
		return a
	}
	host, port, err := net.SplitHostPort(cfg.Bundle.Listen)
	if ip := net.ParseIP(host); err == nil && (host == "" || ip != nil && ip.IsUnspecified()) {
		host = "127.0.0.1"
	}
	return net.JoinHostPort(host, port)
}

// takeOwnBundle brings what the issuer says of its own trust domain into the store, and from there everywhere. SPIRE's sequences may be
// smaller than those before, after a move to it or from a backup: then ours goes on growing, so that no other cluster takes it for old.
func (p *controlPlane) takeOwnBundle(b *spiffebundle.Bundle) error {
	err := p.bundles.Set(p.td, b, "own authority")
	if !errors.Is(err, bundle.ErrStale) {
		return err
	}
	if p.onSPIRE == nil {
		return nil
	}
	if have, ok := p.bundles.Get(p.td); ok && have.X509Bundle().Equal(b.X509Bundle()) && have.JWTBundle().Equal(b.JWTBundle()) {
		return nil
	}
	return p.bundles.Replace(p.td, b, "SPIRE, which counts anew")
}

// tellSPIRE hands each change of foreign bundles to spire-server.
func (p *controlPlane) tellSPIRE(ctx context.Context) error {
	for {
		changed := p.bundles.Changed()
		p.onSPIRE.SetBundles(p.bundles.All())
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
}

// registrar knows which entries the workloads of a Snapshot need.
type registrar struct {
	self      onspire.Workload
	td        spiffeid.TrustDomain
	x509, jwt time.Duration
	workloads []*onspire.Template
	fixed     []onspire.Entry // of the control plane and its gateways
	log       *slog.Logger

	// of the last call of entries
	services   discovery.ByName[*discovery.Service]
	made       discovery.ByName[*serviceEntries]
	accounts   []discovery.Name
	ofAccounts []accountEntries // of each of accounts
	failed     []discovery.Name // accounts without an entry
}

// accountEntries are what a service account needs, and why that is not all.
type accountEntries struct {
	serviceEntries
	id  spiffeid.ID
	err error
}

// serviceEntries are what the endpoints of one service need. A Service is immutable, so they are made once.
type serviceEntries struct {
	keys []string // of entries
	all  []onspire.Entry
}

func newRegistrar(cfg *Config, log *slog.Logger) (*registrar, error) {
	td, err := spiffeid.TrustDomainFromString(cfg.TrustDomain)
	if err != nil {
		return nil, err
	}
	r := &registrar{td: td, self: onspire.Workload{TrustDomain: td.Name(), Cluster: cfg.Cluster, Region: cfg.Region}, x509: cfg.Identity.X509Life.Duration, jwt: cfg.Identity.JWTLife.Duration, log: log}
	c := cfg.Identity.SPIRE
	for _, e := range c.Entries {
		t, err := onspire.ParseTemplate(e.Parent, e.Selectors)
		if err != nil {
			return nil, err
		}
		r.workloads = append(r.workloads, t)
	}
	for id, of := range map[spiffeid.ID][]SPIREEntry{identity.ControlPlaneID(td): c.ControlPlane, identity.GatewayID(td): c.Gateways} {
		for _, e := range of {
			t, err := onspire.ParseTemplate(e.Parent, e.Selectors)
			if err != nil {
				return nil, err
			}
			w := r.self
			w.ID = id.String()
			entry, err := r.entry(t, w)
			if err != nil {
				return nil, err
			}
			r.fixed = append(r.fixed, entry)
		}
	}
	return r, nil
}

func (r *registrar) entry(t *onspire.Template, w onspire.Workload) (onspire.Entry, error) {
	e, err := t.Entry(w)
	e.X509Life, e.JWTLife = r.x509, r.jwt
	return e, err
}

// entries are those that a Snapshot asks for; a service that has not changed since the last call costs next to nothing. s may be nil: then only the fixed ones.
func (r *registrar) entries(s *discovery.Snapshot) []onspire.Entry {
	out, seen := slices.Clone(r.fixed), map[string]bool{}
	if s == nil || len(r.workloads) == 0 {
		return out
	}
	made := r.made.Edit()
	discovery.Diff(r.services, s.Services, func(name discovery.Name, _, svc *discovery.Service) {
		if svc == nil {
			made.Delete(name)
		} else {
			made.Put(name, r.ofService(svc))
		}
	})
	r.services, r.made = s.Services, made.Done()
	ids := map[spiffeid.ID]bool{}
	take := func(of *serviceEntries) {
		for i, key := range of.keys {
			ids[of.all[i].ID] = true
			if !seen[key] {
				seen[key] = true
				out = append(out, of.all[i])
			}
		}
	}
	for _, of := range r.made.All() {
		take(of)
	}
	if !slices.Equal(r.accounts, s.Accounts) {
		r.accounts, r.ofAccounts = s.Accounts, make([]accountEntries, len(s.Accounts))
		for i, a := range s.Accounts {
			r.ofAccounts[i] = r.ofAccount(a)
		}
	}
	var failed []discovery.Name
	for i := range r.ofAccounts {
		of, a := &r.ofAccounts[i], r.accounts[i]
		take(&of.serviceEntries)
		if of.err == nil || ids[of.id] { // by its address, say, where a service leads to it
			continue
		}
		failed = append(failed, a)
		if !slices.Contains(r.failed, a) {
			r.log.Warn("a workload gets no entry on SPIRE", "account", a.String(), "err", of.err)
		}
	}
	r.failed = failed
	return out
}

// ofAccount makes the entries of workloads that no service need lead to, and whose addresses are not known.
func (r *registrar) ofAccount(a discovery.Name) accountEntries {
	id, err := identity.WorkloadID(r.td, a.Namespace, a.Name)
	if err != nil || identity.Reserved(id) {
		return accountEntries{}
	}
	out := accountEntries{id: id}
	w := r.self
	w.ID, w.Namespace, w.ServiceAccount = id.String(), a.Namespace, a.Name
	for _, t := range r.workloads {
		e, err := r.entry(t, w)
		if err != nil {
			out.err = errors.Join(out.err, err)
			continue
		}
		out.keys, out.all = append(out.keys, keyOf(e)), append(out.all, e)
	}
	return out
}

// keyOf tells entries apart.
func keyOf(e onspire.Entry) string {
	return e.ID.String() + " " + e.Parent.String() + " " + strings.Join(e.Selectors, " ")
}

// ofService makes the entries of one service, each once.
func (r *registrar) ofService(svc *discovery.Service) *serviceEntries {
	out, seen := &serviceEntries{}, map[string]bool{}
	for _, ep := range svc.Endpoints {
		id, err := spiffeid.FromString(ep.SPIFFEID)
		if err != nil || !id.MemberOf(r.td) || identity.Reserved(id) {
			continue
		}
		w := r.self
		w.ID, w.Address, w.Hostname, w.Region, w.Zone = id.String(), ep.Address.String(), ep.Hostname, ep.Locality.Region, ep.Locality.Zone
		w.Namespace, w.ServiceAccount, _ = identity.ParseWorkloadID(id)
		for _, t := range r.workloads {
			e, err := r.entry(t, w)
			if err != nil {
				r.log.Warn("a workload gets no entry on SPIRE", "id", ep.SPIFFEID, "service", svc.Name.String(), "err", err)
				continue
			}
			key := keyOf(e)
			if !seen[key] {
				seen[key] = true
				out.keys, out.all = append(out.keys, key), append(out.all, e)
			}
		}
	}
	return out
}

// spireCheck is the line of status on SPIRE.
func (p *controlPlane) spireCheck(now time.Time) []admin.Check {
	s := p.onSPIRE.Status()
	server, agent := admin.Check{Name: "spire-server"}, admin.Check{Name: "spire-agent"}
	since := "has never answered since this control plane started"
	if !s.Answered.IsZero() {
		since = fmt.Sprintf("answered last %s ago", now.Sub(s.Answered).Round(time.Second))
	}
	switch {
	case s.Err != nil:
		server.Detail = fmt.Sprintf("%s; the last good state stays in force: %v", since, s.Err)
		server.Remedy = "is spire-server running, and identity.spire.server right?"
	case len(s.Faults) > 0:
		server.Detail = fmt.Sprintf("it refuses %d of what this cluster needs; first: %s", len(s.Faults), s.Faults[0])
		server.Remedy = "hansed's log and spire-server's say why"
	default:
		server.OK, server.Detail = true, fmt.Sprintf("%s; %d entries and %d foreign bundles are kept there", p.cfg.Identity.SPIRE.Server, s.Entries, s.Domains)
		if len(s.Foreign) > 0 {
			server.Detail += fmt.Sprintf("; left alone, since people made them: %s", strings.Join(s.Foreign, ", "))
		}
	}
	if s.AgentErr != nil {
		agent.Detail = fmt.Sprintf("the last SVID stays in force until it expires: %v", s.AgentErr)
		agent.Remedy = fmt.Sprintf("is spire-agent running at %s, and is there an entry for %s with selectors of this process?", p.cfg.Identity.SPIRE.WorkloadAPI, identity.ControlPlaneID(p.td))
	} else {
		agent.OK, agent.Detail = true, p.cfg.Identity.SPIRE.WorkloadAPI
	}
	return []admin.Check{server, agent}
}

// bySPIRE refuses what the issuer does and hansed does not, while SPIRE is the issuer.
func (p *controlPlane) bySPIRE(what, command string) error {
	if p.onSPIRE == nil {
		return nil
	}
	return admin.Refused(command, "%s is SPIRE's to do: this cluster's identities come from it", what)
}
