package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"

	"github.com/hanse-mesh/hanse/cmd/internal/drill"
	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/discovery/file"
	"github.com/hanse-mesh/hanse/discovery/kube"
	"github.com/hanse-mesh/hanse/discovery/xdsgen"
	"github.com/hanse-mesh/hanse/discovery/xdspb"
	"github.com/hanse-mesh/hanse/discovery/xdsserver"
	"github.com/hanse-mesh/hanse/federation/etcd"
	"github.com/hanse-mesh/hanse/federation/peering"
	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/identity/atomicfile"
	"github.com/hanse-mesh/hanse/identity/attest"
	"github.com/hanse-mesh/hanse/identity/bundle"
	"github.com/hanse-mesh/hanse/identity/ca"
	"github.com/hanse-mesh/hanse/identity/onspire"
	"github.com/hanse-mesh/hanse/identity/spireapi"
)

// controlPlane joins the parts of one hansed. It implements admin.Backend.
type controlPlane struct {
	// read-only after build
	cfg     *Config
	version string
	td      spiffeid.TrustDomain
	log     *slog.Logger
	now     func() time.Time

	stores    *stores
	replicas  *replicas
	shared    *sharedMemory // nil where this hansed is alone
	board     *switchboard
	issuer    issuer
	authority *ca.Authority   // nil where SPIRE issues
	onSPIRE   *onspire.Server // nil where it does not
	workloads *registrar      // of the entries of discovered workloads, on SPIRE or here
	entries   *entryKeeper    // of them; nil on SPIRE
	upstream  upstreamCA      // nil without one
	roots     *roots          // nil where this hansed is alone, or SPIRE issues
	acks      *ackBook
	rollCall  *rollCall
	exchange  *exchange
	bundles   *bundle.Store
	distrusts *distrusts
	puller    *bundle.Puller
	source    *identity.Source // the control plane's own SVID, and all bundles
	tokens    *attest.Tokens   // nil where SPIRE issues
	spire     *spireapi.Server // likewise
	files     *file.Source     // nil without a directory
	kube      *kube.Source     // nil without Kubernetes
	writer    *kube.Writer     // likewise
	webhook   *webhook         // nil without injection
	catalog   *catalog
	mesh      *peering.Mesh
	reach     *reach
	xds       *xdsserver.Server
	health    *healthBook
	drills    *drill.Engine

	listening chan struct{} // closed when every listener is open

	relating   sync.Mutex
	initial    map[spiffeid.TrustDomain]string // bundles of configured relations that were taken; guarded by relating
	configured map[spiffeid.TrustDomain]bool   // relations that the catalog asked for; owned by reconcileTrust
}

// build opens the stores and joins the parts. Nothing runs yet; the caller closes p.stores. ended: the etcd that was known is not there any more.
func build(ctx context.Context, cfg *Config, ended bool, version string, log *slog.Logger, level *slog.LevelVar, reg prometheus.Registerer) (_ *controlPlane, err error) {
	td, err := spiffeid.TrustDomainFromString(cfg.TrustDomain)
	if err != nil {
		return nil, err
	}
	source := identity.NewSource()
	p := &controlPlane{cfg: cfg, version: version, td: td, log: log, now: time.Now, board: newSwitchboard(source), source: source,
		health: newHealthBook(time.Now), listening: make(chan struct{}), configured: map[spiffeid.TrustDomain]bool{},
		initial: map[spiffeid.TrustDomain]string{}, rollCall: newRollCall(cfg.DataDir, log.With("part", "acks"))}
	if err := atomicfile.MakeDir(cfg.DataDir); err != nil {
		return nil, fmt.Errorf("data directory %s: %w", cfg.DataDir, err)
	}
	if p.stores, err = openStores(ctx, cfg, ended, log); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.stores.Close())
		}
	}()

	id, err := replicaID(cfg.DataDir)
	if err != nil {
		return nil, err
	}
	if p.replicas, err = newReplicas(cfg, p.stores, id, version, log.With("part", "replicas"), reg); err != nil {
		return nil, err
	}
	if !p.replicas.alone() {
		if err := p.replicas.unique(ctx, cfg.Timers.Leader.Duration); err != nil {
			return nil, err
		}
	}
	p.replicas.ready = func(ctx context.Context) error { return p.catalog.catchUp(ctx) }
	leader := leaderStore{p.stores.own, p.replicas}

	// Identity.
	if p.bundles, err = bundle.Open(bundle.Config{Dir: filepath.Join(cfg.DataDir, "bundles"), TrustDomain: td, Log: log.With("part", "bundles"), Registerer: reg}); err != nil {
		return nil, err
	}
	p.distrusts = newDistrusts(p)
	if err := p.distrusts.load(ctx); err != nil {
		return nil, err
	}
	if !p.replicas.alone() {
		p.acks, p.exchange = newAckBook(p), newExchange(p)
	}
	if cfg.Identity.SPIRE.Server != "" {
		err = p.openSPIRE(ctx, reg)
	} else {
		err = p.openAuthority(ctx, leader, reg)
	}
	if err != nil {
		return nil, err
	}
	p.source.SetBundles(p.bundles.All())
	webRoots, err := readRoots(cfg.Bundle.WebRoots)
	if err != nil {
		return nil, err
	}
	if p.puller, err = bundle.NewPuller(bundle.PullerConfig{Store: p.bundles, WebRoots: webRoots, Log: log.With("part", "bundles"), Registerer: reg}); err != nil {
		return nil, err
	}
	if p.authority != nil {
		p.tokens = attest.New(td, recordsOf(p.stores.own, "identity/tokens/"), time.Now)
		evidence, err := attestors(cfg.Identity, td)
		if err != nil {
			return nil, err
		}
		var left func() map[string]bool
		if p.roots != nil {
			left = p.roots.left
		}
		p.spire, err = spireapi.New(ctx, spireapi.Config{Authority: p.authority, Bundles: p.bundles, Tokens: p.tokens, KV: recordsOf(p.stores.own, recordsPath), KeptKV: recordsOf(leader, recordsPath), Attestors: evidence,
			AttestsPerSecond: cfg.Identity.Attestation.PerSecond, AttestBurst: cfg.Identity.Attestation.Burst,
			AllAttestsPerSecond: cfg.Identity.Attestation.AllPerSecond, AllAttestBurst: cfg.Identity.Attestation.AllBurst,
			OwnBundle: p.ownBundle, Tainted: left, Refresh: p.puller.Refresh, Level: level, Log: log.With("part", "spire-api"), Registerer: reg})
		if err != nil {
			return nil, err
		}
		if p.roots != nil {
			p.roots.resting = func(keyID string, sequence uint64) []string {
				all := append(p.spire.RestingHere(keyID), p.spire.Missing(td, sequence)...)
				slices.Sort(all)
				return slices.Compact(all)
			}
		}
	}

	if p.spire != nil {
		if err := p.openEntries(); err != nil {
			return nil, err
		}
	}

	// Discovery.
	self := discovery.Self{Cluster: cfg.Cluster, TrustDomain: cfg.TrustDomain, Network: cfg.Network, Region: cfg.Region}
	for _, g := range cfg.Gateways {
		if a, err := netip.ParseAddrPort(g); err == nil { // names are looked up by followReach
			self.Gateways = append(self.Gateways, a)
		}
	}
	var sources []objectSource
	if cfg.ConfigDir != "" {
		p.files = file.New(file.Config{Dir: cfg.ConfigDir, Log: log.With("part", "files"), Registerer: reg})
		sources = append(sources, p.files)
	}
	if cfg.KubeAPI.Enabled {
		if p.kube, err = newKube(cfg.KubeAPI, p.replicas.term, log.With("part", "kubernetes"), reg); err != nil {
			return nil, err
		}
		sources = append(sources, p.kube)
	}
	var remember memory = &fileMemory{path: filepath.Join(cfg.DataDir, "endpoint-ids.json")}
	if !p.replicas.alone() {
		p.shared = &sharedMemory{store: p.stores.own, write: leader, leads: p.replicas.leads, wake: func() { p.catalog.kick() }, log: log.With("part", "catalog")}
		remember = p.shared
	}
	p.catalog = newCatalog(self, recordsOf(leader, "config/"), sources, remember, log.With("part", "catalog"),
		func(s *discovery.Snapshot) {
			p.reconcileTrust(s)
			p.mesh.SetLocal(s)
			if p.onSPIRE != nil {
				p.onSPIRE.SetEntries(p.workloads.entries(s))
			} else {
				p.entries.set(s)
			}
		})

	if p.kube != nil {
		p.catalog.clustersetIPs, p.catalog.accounts = p.kube.ClustersetIPs, p.kube.Accounts
	}

	// Federation.
	if p.mesh, err = p.newMesh(self, reg); err != nil {
		return nil, err
	}

	p.reach = newReach(cfg, p.kube)
	if p.kube != nil {
		p.writer = kube.NewWriter(kube.WriterConfig{Source: p.kube, Self: self, View: p.kubeView, Faults: p.catalog.buildFaults, Log: log.With("part", "kubernetes"), Registerer: reg})
		if w := cfg.KubeAPI.Webhook; w.Listen != "" {
			p.webhook = newWebhook(w.Inject, log.With("part", "webhook"), reg)
		}
	}

	// xDS and drills.
	p.xds, err = xdsserver.New(xdsserver.Config{Source: p.source, TrustDomain: td, OnReport: p.onReport, Log: log.With("part", "xds"), Registerer: reg})
	if err != nil {
		return nil, err
	}
	p.xds.Expect(p.rollCall.open())
	var leads func() bool
	if !p.replicas.alone() {
		leads = p.replicas.leads
	}
	p.drills = drill.New(drill.Config{Self: cfg.Cluster, Leads: leads, Store: drillRecords{recordsOf(leader, "drills/")}, ControlPlane: &drillPlane{switchboard: p.board, p: p}, View: p.mesh.Clusterset,
		ReportEvery: p.xds.SetReportInterval, FaultsChanged: p.xds.FaultsChanged, Now: time.Now, Log: log.With("part", "drill")})
	p.xds.SetFaults(func(v xdsgen.Viewer) *xdspb.Faults {
		ips := make([]string, len(v.WorkloadIPs))
		for i, a := range v.WorkloadIPs {
			ips[i] = a.String()
		}
		return p.drills.Faults(ips, v.Kind == xdsgen.Gateway)
	})
	return p, nil
}

// openAuthority makes hansed its own issuer.
func (p *controlPlane) openAuthority(ctx context.Context, leader leaderStore, reg prometheus.Registerer) (err error) {
	cfg := p.cfg
	authority := ca.Config{Dir: filepath.Join(cfg.DataDir, "ca"), TrustDomain: p.td, Curve: cfg.Identity.Keys.elliptic(), Memory: cfg.Identity.Keys.Storage == "memory", RootLife: cfg.Identity.RootLife.Duration,
		X509Life: cfg.Identity.X509Life.Duration, JWTLife: cfg.Identity.JWTLife.Duration, Acked: p.rootAcknowledged, Log: p.log.With("part", "ca"), Registerer: reg}
	if p.upstream, err = p.openUpstream(); err != nil {
		return err
	}
	if p.upstream != nil {
		authority.Upstream = p.upstream
	}
	if !p.replicas.alone() {
		p.roots = newRoots(p, leader)
		authority.Replica, authority.Join, authority.Peers, authority.Until = cfg.Replica, true, p.roots, p.roots.Until
	}
	if p.authority, err = p.openCA(ctx, authority); err != nil {
		return err
	}
	p.issuer = ownAuthority{p.authority, identity.ControlPlaneID(p.td), cfg.Identity.X509Life.Duration}
	if p.roots != nil {
		err = p.roots.enroll(ctx, p.authority)
	} else {
		err = p.takeOwnBundle(p.authority.Bundle())
	}
	if err != nil {
		return fmt.Errorf("own bundle: %w", err)
	}
	svid, err := p.authority.NewSVID(identity.ControlPlaneID(p.td), cfg.Identity.X509Life.Duration)
	switch {
	case err == nil:
		p.source.SetSVID(svid)
	case p.roots == nil:
		return fmt.Errorf("own SVID: %w", err)
	default:
		p.log.Warn("no SVID yet, and without one nobody can be served: another replica must sign it", "err", err)
	}
	return nil
}

// Run serves until ctx ends, and has stopped everything when it returns.
func (p *controlPlane) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	run := func(name string, f func(context.Context) error) {
		g.Go(func() error {
			if err := f(ctx); err != nil && !errors.Is(err, context.Canceled) {
				return fmt.Errorf("%s: %w", name, err)
			}
			return nil
		})
	}
	run("authority", p.issuer.Run)
	run("own SVID", func(ctx context.Context) error { return p.issuer.RunSVID(ctx, p.source) })
	if p.roots == nil {
		run("own bundle", p.publishOwnBundle)
	} else {
		run("own bundle", p.roots.Run)
		run("signing for replicas", p.roots.RunSigning)
		run("agents and entries", p.followRecords)
	}
	if !p.replicas.alone() {
		run("acknowledgements of replicas", p.acks.Run)
		run("proxies of replicas", p.exchange.Run)
		run("drills of replicas", p.followDrills)
	}
	if p.upstream != nil {
		run("upstream authority", p.upstream.Run)
	}
	if p.onSPIRE != nil {
		run("bundles on SPIRE", p.tellSPIRE)
	} else {
		run("SPIRE API", p.spire.Run)
		run("entries", p.entries.run)
	}
	run("bundles", func(ctx context.Context) error { return p.bundles.RunSource(ctx, p.source) })
	run("distrust", p.distrusts.Run)
	run("connections", func(ctx context.Context) error { return p.board.watch(ctx, p.log) })
	run("bundle endpoints", p.puller.Run)
	run("who polls the bundle", p.followPolls)
	if p.files != nil {
		run("files", p.files.Run)
	}
	if p.kube != nil {
		run("Kubernetes", p.kube.Run)
		run("Kubernetes imports", func(ctx context.Context) error { return p.replicas.whileLeading(ctx, p.writer.Run) })
		mutating, validating := "", ""
		if p.webhook != nil {
			mutating, validating = injectConfiguration, validateConfiguration
		}
		roots := p.writer.NewRootKeeper(p.kubeRoots, mutating, validating) // gateways need them without a webhook too
		run("Kubernetes roots", func(ctx context.Context) error { return p.replicas.whileLeading(ctx, roots.Run) })
		if p.webhook != nil {
			run("webhook certificate", func(ctx context.Context) error { return p.webhook.runCertificate(ctx, p) })
		}
	}
	run("reach", p.followReach)
	run("replicas", p.replicas.Run)
	run("catalog", p.catalog.Run)
	if p.shared != nil {
		run("applied objects", p.catalog.follow)
		run("export times", p.shared.follow)
		run("addresses", p.publishAddresses)
	}
	run("federation", p.mesh.Run)
	run("views", p.publishViews)
	run("xDS", p.xds.Run)
	run("drills", p.drills.Run)
	run("acknowledgements", p.acknowledge)
	run("listeners", p.serve)
	return g.Wait()
}

// publishOwnBundle brings each change of the own roots into the bundle store, and from there everywhere.
func (p *controlPlane) publishOwnBundle(ctx context.Context) error {
	for {
		changed := p.issuer.Changed()
		if b, ok := p.issuer.Bundle(); ok {
			if err := p.takeOwnBundle(b); err != nil {
				p.log.Error("own bundle was not stored; the last one stays in force", "err", err)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
}

// addresses are those of the replicas' federation listeners.
func (p *controlPlane) addresses() []string {
	if p.roots != nil {
		return p.roots.addresses()
	}
	all := slices.Clone(p.replicas.self.Addresses)
	for _, r := range p.replicas.others() {
		all = append(all, r.Addresses...)
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// publishAddresses tells the mesh where the replicas' federation listeners are. One that goes away stays in the list until its roots have left
// the bundle: it may come back, and a peer that finds nobody there tries the next.
func (p *controlPlane) publishAddresses(ctx context.Context) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	var last []string
	for {
		if all := p.addresses(); p.cfg.KubeAPI.FederationService == "" && !slices.Equal(all, last) {
			p.mesh.SetAddresses(all)
			last = all
		}
		select {
		case <-ctx.Done():
			return nil
		case <-p.replicas.wake:
			if p.roots != nil {
				kick(p.roots.dirty)
			}
		case <-tick.C:
		}
	}
}

// publishViews hands each Clusterset and each change of trust to the xDS server.
func (p *controlPlane) publishViews(ctx context.Context) error {
	sweep := time.NewTicker(healthMemory)
	defer sweep.Stop()
	select {
	case <-ctx.Done():
		return nil
	case <-p.mesh.Loaded(): // before that a view would take away what was known
	}
	for {
		updated, trust := p.mesh.Updated(), p.bundles.Changed()
		if set := p.mesh.Clusterset(); set.Local.Complete {
			p.xds.SetView(set)
		}
		p.xds.SetTrust(names(p.bundles.Sequences()), uint64(p.bundles.Revision()), p.authorities())
		select {
		case <-ctx.Done():
			return nil
		case <-updated:
		case <-trust:
		case <-sweep.C:
			p.health.Sweep()
		}
	}
}

// authorities are the digests of the X.509 authorities of all trust domains.
func (p *controlPlane) authorities() map[string][]byte {
	out := map[string][]byte{}
	for td, b := range p.bundles.All() {
		out[td.Name()] = identity.Digest(b.X509Authorities())
	}
	return out
}

func names(by map[spiffeid.TrustDomain]uint64) map[string]uint64 {
	out := make(map[string]uint64, len(by))
	for td, seq := range by {
		out[td.Name()] = seq
	}
	return out
}

// domains are the trust domains of names.
func domains(by map[string]uint64) map[spiffeid.TrustDomain]uint64 {
	out := make(map[spiffeid.TrustDomain]uint64, len(by))
	for name, n := range by {
		if td, err := spiffeid.TrustDomainFromString(name); err == nil {
			out[td] = n
		}
	}
	return out
}

// followRecords takes in the agents and entries that other replicas store, until ctx ends.
func (p *controlPlane) followRecords(ctx context.Context) error {
	for ctx.Err() == nil {
		err := func() error {
			_, h, err := p.stores.own.Get(ctx, recordsPath, 0)
			if err != nil {
				return err
			}
			if err := p.spire.Reload(ctx); err != nil {
				return err
			}
			w, err := p.stores.own.Watch(ctx, recordsPath, h.Revision+1)
			if err != nil {
				return err
			}
			for {
				r, err := w.Recv()
				if err != nil {
					return err
				}
				for _, e := range r.Events {
					value := e.Value
					if e.Delete {
						value = nil
					}
					if err := p.spire.Changed(strings.TrimPrefix(e.Key, recordsPath), value); err != nil {
						p.log.Error("a record of another replica is left out", "key", e.Key, "err", err)
					}
				}
			}
		}()
		if ctx.Err() == nil {
			etcd.Again(ctx, p.log, "agents and entries are read again", err)
			pause(ctx, time.Second)
		}
	}
	return nil
}

// followDrills takes in the drills that another replica runs, until ctx ends.
func (p *controlPlane) followDrills(ctx context.Context) error {
	for ctx.Err() == nil {
		err := etcd.NewKV(p.stores.own, "drills/").Watch(ctx, "", func(all []etcd.KeyValue, _ int64) error {
			stored := make(map[string][]byte, len(all))
			for _, kv := range all {
				stored[kv.Key] = kv.Value
			}
			p.drills.Follow(stored)
			return nil
		})
		if ctx.Err() == nil {
			etcd.Again(ctx, p.log, "drills are read again", err)
			pause(ctx, time.Second)
		}
	}
	return nil
}

// acknowledge tells the mesh which bundles this control plane, all its proxies and all its agents have loaded; all replicas of it, where there are others.
func (p *controlPlane) acknowledge(ctx context.Context) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		p.muster()
		said := p.rollCall.say(p.loaded(p.rollCall.before()))
		if roster := p.xds.Roster(); ctx.Err() == nil { // at the end proxies go because this control plane goes
			p.rollCall.keep(roster)
		}
		if p.acks != nil {
			p.acks.publish(ctx, said)
			said = p.acks.lowest()
		}
		p.mesh.SetAcked(domains(said))
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// loaded is, by trust domain, the sequence of the bundle that all have loaded, as far as it is known: while somebody is not back after a
// start, what was said before.
func (p *controlPlane) loaded(before map[string]uint64) map[string]uint64 {
	proxies, next := p.xds.TrustAcked(before), map[string]uint64{}
	for td, seq := range p.bundles.Sequences() {
		name := td.Name()
		if seq = min(seq, proxies[name]); seq > before[name] && p.spire != nil && p.spire.AnyMissing(td, seq) {
			seq = before[name]
		}
		next[name] = seq
	}
	return next
}

// muster takes in which proxies have gone from one replica to another, or have lost theirs.
func (p *controlPlane) muster() {
	if p.exchange == nil {
		return
	}
	elsewhere, stranded := p.exchange.moves()
	p.xds.Expect(stranded)
	p.xds.Moved(elsewhere)
}

// lacking names the proxies and agents here that have not loaded a bundle with at least that sequence.
func (p *controlPlane) lacking(td spiffeid.TrustDomain, sequence uint64) []string {
	p.muster()
	var proxies, agents []string
	for _, x := range p.xds.TrustLacking(td.Name(), sequence, p.rollCall.before()) {
		name := "proxy " + x.ID
		if !x.Until.IsZero() {
			name += " (not back yet; until " + x.Until.UTC().Format("15:04:05Z") + ")"
		}
		proxies = append(proxies, name)
	}
	if p.spire != nil { // on SPIRE they are SPIRE's
		for _, id := range p.spire.Missing(td, sequence) {
			agents = append(agents, "agent "+id)
		}
	}
	return append(someOf(proxies, "proxies"), someOf(agents, "agents")...)
}

// someOf is at most maxNamed of them, and how many more there are.
func someOf(all []string, what string) []string {
	if n := len(all) - maxNamed; n > 0 {
		return append(all[:maxNamed:maxNamed], fmt.Sprintf("%d more %s", n, what))
	}
	return all
}

// rootAcknowledged says whether everybody who must has loaded the own bundle of that sequence: members, proxies and stock agents.
func (p *controlPlane) rootAcknowledged(sequence uint64) (bool, []string) {
	var missing []string
	if p.roots != nil {
		if sequence = p.roots.Included(sequence); sequence == 0 {
			return false, []string{"the bundle of all replicas"}
		}
		missing = p.acks.missing(sequence)
	}
	for member, seq := range p.mesh.Acked(p.td) {
		if seq < sequence {
			missing = append(missing, "cluster "+member)
		}
	}
	missing = append(missing, p.lacking(p.td, sequence)...)
	if len(missing) == 0 && p.xds.TrustAcked(p.rollCall.before())[p.td.Name()] < sequence {
		missing = append(missing, "this control plane") // which has not announced it yet
	}
	if until := p.pollersWaitedFor(); p.now().Before(until) {
		missing = append(missing, "whoever polls the bundle endpoint (until "+until.UTC().Format("15:04:05Z")+")")
	}
	return len(missing) == 0, missing
}

// Those who poll the bundle endpoint acknowledge nothing. A root that is announced is given so many of the bundle's refresh hints to be fetched
// before it signs: with https_spiffe the endpoint's own SVID rests on it, and who has not fetched it by then never can again. Who has
// not polled for so many is waited for no more.
const (
	pollsWaited    = 2
	pollsForgotten = 12
)

// pollersWaitedFor is until when the announced root waits for them; zero where there is none, or nobody polls.
func (p *controlPlane) pollersWaitedFor() time.Time {
	hint, ok := p.ownBundle().RefreshHint()
	if !ok {
		return time.Time{}
	}
	polled := p.now().Sub(p.bundles.Polled()) < pollsForgotten*hint
	// Whose endpoint is polled polls ours, as a rule, be it at another replica or before a restart.
	if !polled && !slices.ContainsFunc(p.bundles.Relations(), func(r bundle.Relation) bool { return r.URL != "" }) {
		return time.Time{}
	}
	for _, r := range p.authority.Roots() {
		if r.Phase == "prepared" {
			return r.Created.Add(pollsWaited * hint)
		}
	}
	return time.Time{}
}

// maxNamed is how many proxies, and how many agents, are named that have not loaded a bundle; of thousands nobody reads more.
const maxNamed = 20

// ownBundle is the bundle of the own trust domain, with the roots of every replica.
func (p *controlPlane) ownBundle() *spiffebundle.Bundle {
	if b, ok := p.bundles.Get(p.td); ok {
		return b
	}
	return p.authority.Bundle() // its only user is the SPIRE API, which there is with an authority only
}

// onReport spreads what a proxy reports.
func (p *controlPlane) onReport(r xdsserver.Report) {
	if p.exchange != nil {
		p.exchange.tell(r)
	}
	p.note(r)
}

// note takes in what a proxy of this or another replica reports.
func (p *controlPlane) note(r xdsserver.Report) {
	samples, alive := p.health.Note(r)
	p.drills.Observe(r.Viewer.ID, r.Time, samples)
	for _, member := range alive {
		p.mesh.ReportSuccess(member)
	}
}

// reconcileTrust brings the configured bundle federation into force, and ends what is no longer configured. What fails is said
// and tried again at the next change.
func (p *controlPlane) reconcileTrust(s *discovery.Snapshot) {
	next := map[spiffeid.TrustDomain]bool{}
	for _, t := range s.TrustDomains {
		td, err := spiffeid.TrustDomainFromString(t.TrustDomain)
		if err == nil {
			next[td] = true
			err = p.relate(t)
		}
		if err != nil {
			p.log.Error("configured trust domain is not in force", "object", t.Name, "err", err)
		}
	}
	members := p.mesh.Clusterset().Members
	for td := range p.configured {
		member := false // whose trust rests on its membership
		for _, m := range members {
			member = member || m.TrustDomain == td.Name()
		}
		if !next[td] && !member {
			if err := p.bundles.Unrelate(td); err != nil {
				p.log.Error("trust domain is still trusted", "trust_domain", td.Name(), "err", err)
				next[td] = true
			}
		}
	}
	p.configured = next
}

// drillRecords is records without their reads of one key.
type drillRecords struct{ records }

func (r drillRecords) List(ctx context.Context) (map[string][]byte, error) {
	return r.records.List(ctx, "")
}

// readRoots reads the authorities of the web from a PEM file; without one it is nil, the system's.
func readRoots(file string) (*x509.CertPool, error) {
	if file == "" {
		return nil, nil
	}
	pem, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("bundleEndpoint.webRoots: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("bundleEndpoint.webRoots: no certificate in %s", file)
	}
	return pool, nil
}
