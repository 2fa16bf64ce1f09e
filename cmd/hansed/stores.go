package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"golang.org/x/sync/errgroup"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/federation"
	"github.com/hanse-mesh/hanse/federation/etcd"
	"github.com/hanse-mesh/hanse/federation/peering"
	"github.com/hanse-mesh/hanse/identity/atomicfile"
	"github.com/hanse-mesh/hanse/identity/bundle"
)

// stores are where this cluster's state lives: two embedded etcds, so that peers' exports can never fill the own one, or one external.
type stores struct {
	own, imports etcd.Store
	external     *etcd.External                       // nil: embedded
	servers      func() (pb.KVServer, pb.WatchServer) // of own, for the guard
	restored     bool                                 // external: it is not what it was when this hansed last read from it
	close        []func() error
	wait         []func(context.Context) error
}

func openStores(ctx context.Context, cfg *Config, ended bool, log *slog.Logger) (*stores, error) {
	s := &stores{}
	if len(cfg.Etcd.Endpoints) > 0 {
		path := filepath.Join(cfg.DataDir, "etcd-history.json")
		was, err := readHistory(path)
		if err != nil {
			return nil, err
		}
		x, err := dialExternal(ctx, cfg, was, ended, log)
		if err != nil {
			return nil, fmt.Errorf("external etcd: %w", err)
		}
		if v, _, err := etcd.NewKV(x.Store(), "").Get(ctx, copyKey); err != nil || v != nil {
			if err == nil {
				err = errors.New("external etcd: a copy into it was not finished: run hansed copy again")
			}
			return nil, errors.Join(err, x.Close())
		}
		s.restored = x.Restored()
		s.wait = append(s.wait, x.Watchdog, func(ctx context.Context) error { return keepHistory(ctx, path, x, log) })
		s.external, s.own, s.imports, s.servers, s.close = x, x.Store(), x.Store(), x.Servers, []func() error{x.Close}
		return s, nil
	}
	names := []string{"own", "imports"}
	started := make([]*etcd.Embedded, len(names))
	var g errgroup.Group
	for i, name := range names {
		g.Go(func() (err error) {
			started[i], err = etcd.StartEmbedded(ctx, etcd.EmbeddedConfig{Dir: filepath.Join(cfg.DataDir, "etcd", name), Name: cfg.Cluster + "-" + name,
				QuotaBytes: cfg.Etcd.QuotaBytes, Log: log.With("part", "etcd-"+name)})
			return err
		})
	}
	err := g.Wait()
	for _, x := range started {
		if x != nil {
			s.close, s.wait = append(s.close, x.Close), append(s.wait, x.Wait)
		}
	}
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	s.own, s.imports, s.servers = started[0].Store(), started[1].Store(), started[0].Servers
	return s, nil
}

func dialExternal(ctx context.Context, cfg *Config, was etcd.History, ended bool, log *slog.Logger) (*etcd.External, error) {
	tlsConfig, roots, err := etcdTLS(cfg.Etcd)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	return etcd.DialExternal(ctx, etcd.ExternalConfig{Endpoints: cfg.Etcd.Endpoints, TLS: tlsConfig, Roots: roots, History: was, Ended: ended, Log: log.With("part", "etcd")})
}

// readHistory is what this hansed knew of its external etcd when it ended; nothing, where it is new to it.
func readHistory(path string) (h etcd.History, err error) {
	b, err := atomicfile.Read(path, 1<<20)
	if errors.Is(err, fs.ErrNotExist) {
		return h, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &h)
	}
	if err != nil {
		return h, fmt.Errorf("%s: %w (remove it, and this hansed does not see whether etcd was restored from a backup meanwhile)", path, err)
	}
	return h, nil
}

func writeHistory(path string, h etcd.History) error {
	b, err := json.Marshal(h)
	if err == nil {
		err = atomicfile.Write(path, b)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

// keepHistoryEvery bounds what this hansed forgets of etcd's history when it is killed.
const keepHistoryEvery = 10 * time.Second

// keepHistory stores what is known of etcd's history until ctx ends. It begins when what to do where that is over has been done.
func keepHistory(ctx context.Context, path string, x *etcd.External, log *slog.Logger) error {
	for stored := int64(-1); ctx.Err() == nil; pause(ctx, keepHistoryEvery) {
		if h := x.History(); h.Revision > stored {
			if err := writeHistory(path, h); err != nil {
				log.Error("what is known of etcd's history is not stored; tried again", "err", err)
				continue
			}
			stored = h.Revision
		}
	}
	return nil
}

// etcdTLS reads the client's certificate and the CA at each handshake: whoever renews the files need not restart hansed. roots is nil without a CA.
func etcdTLS(c Etcd) (t *tls.Config, roots func() (*x509.CertPool, error), err error) {
	if c.CertFile == "" && c.CAFile == "" {
		return nil, nil, nil
	}
	t = &tls.Config{MinVersion: tls.VersionTLS12, SessionTicketsDisabled: true}
	if c.CertFile != "" {
		load := func() (*tls.Certificate, error) {
			cert, err := tls.LoadX509KeyPair(c.CertFile, c.KeyFile)
			if err != nil {
				return nil, fmt.Errorf("etcd client certificate: %w", err)
			}
			return &cert, nil
		}
		if _, err := load(); err != nil {
			return nil, nil, err
		}
		t.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return load() }
	}
	if c.CAFile != "" {
		roots = func() (*x509.CertPool, error) {
			pem, err := os.ReadFile(c.CAFile)
			if err != nil {
				return nil, fmt.Errorf("etcd CA: %w", err)
			}
			pool := x509.NewCertPool()
			if !pool.AppendCertsFromPEM(pem) {
				return nil, fmt.Errorf("etcd CA %s: no certificate in it", c.CAFile)
			}
			return pool, nil
		}
		if t.RootCAs, err = roots(); err != nil {
			return nil, nil, err
		}
	}
	return t, roots, nil
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
	patience := federation.DefaultPatience()
	patience.Suspect, patience.Recover = p.cfg.Timers.Suspect.Duration, p.cfg.Timers.Recover.Duration
	return peering.New(peering.Config{
		Self: self, MeshName: p.cfg.Mesh, Version: p.version, Advertise: p.cfg.Federation.Advertise, Source: p.source, Bundles: meshBundles{p.bundles},
		Own: p.stores.own, Imports: p.stores.imports, Servers: p.stores.servers,
		Role: p.replicas.meshRole(), Replica: p.replicas.key(), Dial: p.board.dial, Patience: patience, Log: p.log.With("part", "federation"), Metrics: reg,
		Timers: peering.Timers{Debounce: p.cfg.Timers.ExportDelay.Duration, Probe: p.cfg.Timers.Probe.Duration},
	})
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
