package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"runtime/debug"
	"time"

	"github.com/spf13/cobra"

	"github.com/hanse-mesh/hanse/cmd/internal/daemon"
	"github.com/hanse-mesh/hanse/federation/etcd"
)

const (
	restartGrace = time.Minute // for which peers do not hold a planned silence against this cluster
	tellTime     = time.Second // to tell them
)

func main() {
	if err := command().Execute(); err != nil {
		fmt.Fprintln(os.Stderr, "hansed:", err)
		var h interface{ Hint() string }
		if errors.As(err, &h) {
			fmt.Fprintln(os.Stderr, "hint:", h.Hint())
		}
		var u usageError
		if errors.As(err, &u) {
			os.Exit(2)
		}
		os.Exit(1)
	}
}

// usageError is a command line that cannot be meant.
type usageError struct{ error }

// Hint says where to look.
func (usageError) Hint() string { return "hansed --help" }

func command() *cobra.Command {
	var path string
	var check bool
	var endpoints []string
	var replica string
	var advertise []string
	cmd := &cobra.Command{
		Use:   "hansed --config FILE",
		Short: "Control plane of one cluster of a Hanse mesh",
		Example: `  hansed --config /etc/hanse/hansed.yaml
  hansed --config /etc/hanse/hansed.yaml --check      # is the file good? changes nothing
  hansed --config /etc/hanse/hansed.yaml --etcd-endpoints https://10.0.0.7:2379 --replica west-2`,
		Version:       daemon.Version,
		Args:          cobra.NoArgs,
		SilenceErrors: true, SilenceUsage: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if path == "" {
				return usageError{errors.New("no configuration file: give one with --config")}
			}
			cfg, err := LoadConfig(path)
			if err != nil {
				return err
			}
			if len(endpoints) > 0 || replica != "" || len(advertise) > 0 {
				if len(advertise) > 0 {
					cfg.Federation.Advertise = advertise
				}
				if len(endpoints) > 0 {
					cfg.Etcd.Endpoints = endpoints
				}
				cfg.Replica = cmp.Or(replica, cfg.Replica)
				if err := cfg.Validate(); err != nil {
					return err
				}
			}
			if check {
				fmt.Fprintf(cmd.OutOrStdout(), "%s is good: cluster %q, trust domain %s.\n", path, cfg.Cluster, cfg.TrustDomain)
				return nil
			}
			return run(cmd.Context(), cfg)
		},
	}
	cmd.Flags().StringVar(&path, "config", "", "configuration file (YAML); docs/files.md lists its fields")
	cmd.Flags().BoolVar(&check, "check", false, "check the configuration and end")
	cmd.Flags().StringSliceVar(&endpoints, "etcd-endpoints", nil, "use this external etcd instead of the embedded one; several hansed over one etcd are replicas, of which one leads")
	cmd.Flags().StringVar(&replica, "replica", "", "name of this hansed among those of its cluster; default the host's name")
	cmd.Flags().StringSliceVar(&advertise, "advertise", nil, "host:port at which other clusters and other replicas reach this hansed's federation port; default what the file says")
	cmd.AddCommand(connectCommand(), copyCommand())
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	return cmd
}

// gcPercent of the live heap may be garbage: what is held of a large mesh is large and seldom changes, and little CPU is spent on it.
const gcPercent = 50

// run is the process: it returns when a signal came and everything has ended.
func run(ctx context.Context, cfg *Config) error {
	if ctx == nil {
		ctx = context.Background()
	}
	level := new(slog.LevelVar)
	l, err := daemon.ParseLevel(cfg.Log.Level)
	if err != nil {
		return err
	}
	level.Set(l)
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
	log := daemon.Logger(os.Stderr, level).With("cluster", cfg.Cluster)
	ctx, stop := daemon.Signals(ctx, log)
	defer stop()

	for ended := false; ; ended = true {
		err := live(ctx, cfg, ended, log, level)
		if !errors.Is(err, etcd.ErrRestored) || ctx.Err() != nil {
			return err
		}
		log.Warn("begins anew, with what etcd has now")
	}
}

// live is one life of the control plane. It ends with ctx, or with an error; etcd.ErrRestored: all that it knew of etcd is void. ended: the life
// before ended by that.
func live(ctx context.Context, cfg *Config, ended bool, log *slog.Logger, level *slog.LevelVar) error {
	reg := daemon.NewRegistry()
	p, err := build(ctx, cfg, ended, daemon.Version, log, level, reg)
	if err != nil {
		return err
	}
	adminListener, err := net.Listen("tcp", cfg.Admin.Listen)
	if err != nil {
		return errors.Join(fmt.Errorf("admin: listen on %s: %w", cfg.Admin.Listen, err), p.stores.Close())
	}
	var healthListener net.Listener
	if cfg.Health.Listen != "" {
		if healthListener, err = net.Listen("tcp", cfg.Health.Listen); err != nil {
			return errors.Join(fmt.Errorf("health: listen on %s: %w", cfg.Health.Listen, err), adminListener.Close(), p.stores.Close())
		}
	}
	page := &daemon.Admin{Ready: p.ready, Gatherer: reg, Level: level, Snapshot: p.snapshot, Log: log}
	var g daemon.Group
	g.Add("stores", p.stores.run)
	g.Add("admin", func(ctx context.Context) error { return page.Run(ctx, adminListener) })
	if healthListener != nil {
		g.Add("health", func(ctx context.Context) error { return page.RunHealth(ctx, healthListener, cfg.Health.Metrics) })
	}
	g.Add("control plane", p.Run)
	log.Info("hansed starts", "version", daemon.Version, "trust_domain", cfg.TrustDomain, "data", cfg.DataDir)
	// Before anything ends, peers are told that the silence which follows is planned.
	work, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	defer context.AfterFunc(ctx, func() {
		defer end()
		if len(p.replicas.others()) > 0 {
			return // another one leads at once
		}
		tell, cancel := context.WithTimeout(work, tellTime)
		defer cancel()
		if err := p.mesh.AnnounceRestart(tell, restartGrace); err != nil {
			log.Warn("peers were not told of the planned restart; they wait as for a failure", "err", err)
		}
	})()
	err = g.Run(work, log)
	log.Info("hansed has ended")
	return err
}

// ready says why this control plane cannot serve yet. It needs no peer.
func (p *controlPlane) ready() error {
	select {
	case <-p.listening:
	default:
		return errors.New("listeners are not open yet")
	}
	if _, err := p.source.GetX509SVID(); err != nil {
		return fmt.Errorf("this control plane can serve nobody: %w; hanse status says why", err)
	}
	select {
	case <-p.mesh.Loaded():
	default:
		return errors.New("the state of the mesh is being read")
	}
	if !p.mesh.Clusterset().Local.Complete {
		return errors.New("configuration has not been read whole yet")
	}
	return nil
}

// snapshot is what /debug/snapshot shows.
func (p *controlPlane) snapshot() any {
	set := p.mesh.Clusterset()
	type service struct {
		Name string
		Data any
	}
	view := struct {
		Local    any
		Services []service
		Imports  []service
		Members  any
		Trusted  map[string]uint64
		Revision uint64
	}{Local: set.Local, Members: set.Members, Trusted: set.Trusted, Revision: set.Revision}
	for n, s := range set.Local.Services.All() {
		view.Services = append(view.Services, service{n.String(), s})
	}
	for n, s := range set.Imports.All() {
		view.Imports = append(view.Imports, service{n.String(), s})
	}
	return view
}
