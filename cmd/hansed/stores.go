package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/federation"
	"github.com/hanse-mesh/hanse/federation/etcd"
	"github.com/hanse-mesh/hanse/federation/peering"
	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/identity/bundle"
)

// stores are where this cluster's state lives: two embedded etcds, so that peers' exports can never fill the own one, or one external.
type stores struct {
	own, imports etcd.Store
	kv           pb.KVServer // of own, for the guard
	watch        pb.WatchServer
	client       *clientv3.Client // of an external etcd, for the election; nil where this replica is alone
	close        []func() error
	wait         []func(context.Context) error
}

func openStores(ctx context.Context, cfg *Config, log *slog.Logger) (*stores, error) {
	s := &stores{}
	if len(cfg.Etcd.Endpoints) > 0 {
		tlsConfig, err := etcdTLS(cfg.Etcd)
		if err != nil {
			return nil, err
		}
		start, cancel := context.WithTimeout(ctx, 30*time.Second)
		defer cancel()
		x, err := etcd.DialExternal(start, etcd.ExternalConfig{Endpoints: cfg.Etcd.Endpoints, TLS: tlsConfig, Log: log.With("part", "etcd")})
		if err != nil {
			return nil, fmt.Errorf("external etcd: %w", err)
		}
		s.own, s.imports, s.client, s.close = x.Store(), x.Store(), x.Client(), []func() error{x.Close}
		s.kv, s.watch = x.Servers()
		return s, nil
	}
	for _, e := range []struct {
		name  string
		store *etcd.Store
	}{{"own", &s.own}, {"imports", &s.imports}} {
		x, err := etcd.StartEmbedded(ctx, etcd.EmbeddedConfig{Dir: filepath.Join(cfg.DataDir, "etcd", e.name), Name: cfg.Cluster + "-" + e.name,
			QuotaBytes: cfg.Etcd.QuotaBytes, Log: log.With("part", "etcd-"+e.name)})
		if err != nil {
			return nil, errors.Join(err, s.Close())
		}
		*e.store = x.Store()
		s.close, s.wait = append(s.close, x.Close), append(s.wait, x.Wait)
		if e.name == "own" {
			s.kv, s.watch = x.Servers()
		}
	}
	return s, nil
}

func etcdTLS(c Etcd) (*tls.Config, error) {
	if c.CertFile == "" && c.CAFile == "" {
		return nil, nil
	}
	t := &tls.Config{MinVersion: tls.VersionTLS12}
	if c.CertFile != "" {
		cert, err := tls.LoadX509KeyPair(c.CertFile, c.KeyFile)
		if err != nil {
			return nil, fmt.Errorf("etcd client certificate: %w", err)
		}
		t.Certificates = []tls.Certificate{cert}
	}
	if c.CAFile != "" {
		pem, err := os.ReadFile(c.CAFile)
		if err != nil {
			return nil, fmt.Errorf("etcd CA: %w", err)
		}
		t.RootCAs = x509.NewCertPool()
		if !t.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("etcd CA %s: no certificate in it", c.CAFile)
		}
	}
	return t, nil
}

// Close closes everything that was opened.
func (s *stores) Close() error {
	var errs []error
	for _, f := range s.close {
		errs = append(errs, f())
	}
	s.close = nil
	return errors.Join(errs...)
}

// run ends with ctx, or when an embedded etcd dies; either way everything is closed.
func (s *stores) run(ctx context.Context) error {
	died := make(chan error, len(s.wait))
	waiting, cancel := context.WithCancel(ctx)
	for _, w := range s.wait {
		go func() { died <- w(waiting) }()
	}
	var err error
	select {
	case <-ctx.Done():
	case err = <-died:
	}
	cancel()
	if ctx.Err() != nil {
		err = nil
	}
	return errors.Join(err, s.Close())
}

// newMesh gives peering its stores.
func (p *controlPlane) newMesh(self discovery.Self, reg prometheus.Registerer) (*peering.Mesh, error) {
	log := p.log.With("part", "federation")
	p.exporter = etcd.NewExporter(etcd.ExporterConfig{Store: p.stores.own, Linger: time.Millisecond, Log: log}) // peering has debounced already
	mesh, err := peering.New(peering.Config{
		Self: self, MeshName: p.cfg.Mesh, Version: p.version, Advertise: p.cfg.Federation.Advertise, Source: p.source, Bundles: meshBundles{p.bundles},
		Stores: peering.Stores{
			KV:        recordsOf(p.stores.own, "mesh/"),
			Exporter:  exports{p.exporter, p.stores.own},
			Imports:   imports{p.stores.imports},
			NewMirror: func(t peering.MirrorTarget) peering.Mirror { return p.newMirror(t, log, reg) },
		},
		Dial: p.board.dial, Log: log, Metrics: reg,
		Timers: peering.Timers{Debounce: p.cfg.Timers.ExportDelay.Duration, Probe: p.cfg.Timers.Probe.Duration},
	})
	if err != nil {
		return nil, err
	}
	p.guard = etcd.NewGuard(etcd.GuardConfig{KV: p.stores.kv, Watch: p.stores.watch, Source: p.source, Changed: mesh.AccessChanged(), Log: log, Metrics: reg,
		Authorize: func(id spiffeid.ID) ([]string, bool) {
			_, scopes, ok := mesh.Authorize(id)
			prefixes := make([]string, len(scopes))
			for i, s := range scopes {
				prefixes[i] = etcd.ExportPrefix + s + "/"
			}
			return prefixes, ok
		}})
	return mesh, nil
}

func (p *controlPlane) newMirror(t peering.MirrorTarget, log *slog.Logger, reg prometheus.Registerer) peering.Mirror {
	return mirror{etcd.NewMirror(etcd.MirrorConfig{
		Peer: t.MemberID, Self: p.mesh.ID(), Local: p.stores.imports, Log: log.With("peer", t.Name),
		Metrics: prometheus.WrapRegistererWith(prometheus.Labels{"cluster": t.Name}, reg),
		Dial: func(ctx context.Context) (etcd.Remote, error) {
			return etcd.DialPeer(ctx, etcd.PeerConfig{Addresses: t.Addresses,
				TLS:    identity.ClientTLS(p.source, identity.AuthorizeID(identity.ControlPlaneID(t.TrustDomain)), "h2"),
				Dialer: func(ctx context.Context, addr string) (net.Conn, error) { return p.board.dial(ctx, "tcp", addr) }})
		},
	})}
}

// runMesh runs federation, as the leader where there are several replicas.
func (p *controlPlane) runMesh(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	exported := make(chan error, 1)
	go func() {
		defer cancel()
		exported <- p.exporter.Run(ctx)
	}()
	err := p.mesh.Run(ctx)
	cancel()
	return errors.Join(err, <-exported)
}

// exports adapts the Exporter: what was Set is written when Set returns.
type exports struct {
	*etcd.Exporter
	store etcd.Store
}

func (e exports) Load(ctx context.Context) (map[string]map[string][]byte, error) {
	return etcd.ReadExports(ctx, e.store, "")
}

func (e exports) Set(ctx context.Context, scope string, keys map[string][]byte, complete bool) error {
	e.Exporter.Set(scope, etcd.Scope{Keys: keys, Complete: complete})
	return e.Flush(ctx)
}

// mirror adapts a Mirror's status.
type mirror struct{ *etcd.Mirror }

func (m mirror) Accept() bool {
	held := m.Mirror.Status().Held != ""
	m.Mirror.Accept()
	return held
}

func (m mirror) Status() peering.MirrorStatus {
	s := m.Mirror.Status()
	return peering.MirrorStatus{Revision: s.Revision, Head: s.PeerRevision, Answer: s.LastAnswer, Synced: s.Synced, Held: s.Held,
		Restarting: s.PlannedRestart > 0, Error: s.Err}
}

// meshBundles is the trust store as membership uses it.
type meshBundles struct{ *bundle.Store }

// Add relates with a member's trust domain and takes its bundle for first contact.
func (b meshBundles) Add(td spiffeid.TrustDomain, bd *spiffebundle.Bundle) error {
	if _, ok := b.Related(td); !ok {
		if err := b.Relate(bundle.Relation{TrustDomain: td}); err != nil {
			return err
		}
	}
	return b.Update(td, bd)
}

// Update takes what a member exports of itself. An older one than the one in force is no error: it changes nothing.
func (b meshBundles) Update(td spiffeid.TrustDomain, bd *spiffebundle.Bundle) error {
	if err := b.Set(td, bd, "mesh"); err != nil && !errors.Is(err, bundle.ErrStale) {
		return err
	}
	return nil
}

// Remove ends the relation.
func (b meshBundles) Remove(td spiffeid.TrustDomain) error { return b.Unrelate(td) }

// imports reads what mirrors have written.
type imports struct{ store etcd.Store }

const dataPart = "/data/"

func (i imports) Members(ctx context.Context) ([]string, error) {
	seen := map[string]bool{}
	_, err := i.store.List(ctx, etcd.ImportPrefix, 0, func(kv etcd.KeyValue) error {
		member, _, _ := strings.Cut(strings.TrimPrefix(kv.Key, etcd.ImportPrefix), "/")
		seen[member] = true
		return nil
	})
	out := make([]string, 0, len(seen))
	for m := range seen {
		out = append(out, m)
	}
	return out, err
}

// Drop removes all of a member, in bounded steps.
func (i imports) Drop(ctx context.Context, memberID string) error {
	for {
		var ops []etcd.Op
		full := errors.New("full")
		_, err := i.store.List(ctx, etcd.ImportPrefix+memberID+"/", 0, func(kv etcd.KeyValue) error {
			if len(ops) == etcd.MaxOps {
				return full
			}
			ops = append(ops, etcd.Op{Key: kv.Key, Delete: true})
			return nil
		})
		if err != nil && !errors.Is(err, full) {
			return fmt.Errorf("drop imports of member %.8s: %w", memberID, err)
		}
		if len(ops) == 0 {
			return nil
		}
		if _, _, err := i.store.Txn(ctx, nil, ops); err != nil {
			return fmt.Errorf("drop imports of member %.8s: %w", memberID, err)
		}
	}
}

func (i imports) Follow(ctx context.Context, memberID string, f func(first bool, changes []federation.Change)) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	prefix := etcd.ImportPrefix + memberID + "/"
	change := func(kv etcd.KeyValue) (federation.Change, bool) {
		scope, key, ok := strings.Cut(strings.TrimPrefix(kv.Key, prefix), dataPart)
		return federation.Change{Scope: scope, Key: key, Value: kv.Value, Revision: kv.ModRevision}, ok
	}
	var all []federation.Change
	h, err := i.store.List(ctx, prefix, 0, func(kv etcd.KeyValue) error {
		if c, ok := change(kv); ok {
			all = append(all, c)
		}
		return nil
	})
	if err != nil {
		return err
	}
	f(true, all)
	w, err := i.store.Watch(ctx, prefix, h.Revision+1)
	if err != nil {
		return err
	}
	for {
		r, err := w.Recv()
		if err != nil {
			return err
		}
		changes := make([]federation.Change, 0, len(r.Events))
		for _, e := range r.Events {
			if c, ok := change(e.KeyValue); ok {
				if e.Delete {
					c.Value = nil
				}
				changes = append(changes, c)
			}
		}
		if len(changes) > 0 {
			f(false, changes)
		}
	}
}
