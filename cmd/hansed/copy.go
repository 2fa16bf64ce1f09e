package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/hanse-mesh/hanse/discovery/objects"
	"github.com/hanse-mesh/hanse/federation/etcd"
)

// copyKey is there while a copy has not ended: nobody starts from a half of one.
const copyKey = "copy/unfinished"

// copyCommand takes a cluster's state from one etcd to another.
func copyCommand() *cobra.Command {
	var from, to string
	cmd := &cobra.Command{
		Use:   "copy --config FILE --to FILE",
		Short: "Copy this cluster's state into an external etcd, to have several hansed",
		Long: `Copy what hansed keeps in the etcd of one configuration (the embedded one, or an external one) into the external etcd of another: members, exports, imports,
entries, agents, applied objects, what is distrusted, the seed of endpoint IDs. Keys of roots stay in dataDir, which both configurations name. No hansed of the
cluster may run meanwhile; calls go on. The etcd that is copied to must be empty; that which is copied from is not changed. A copy that was interrupted is run again.`,
		Example:       "  hansed copy --config hansed.yaml --to hansed-external.yaml && hansed --config hansed-external.yaml",
		Args:          cobra.NoArgs,
		SilenceErrors: true, SilenceUsage: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if from == "" || to == "" {
				return usageError{errors.New("give the configuration that is with --config, and that which is to be with --to")}
			}
			old, err := LoadConfig(from)
			if err != nil {
				return err
			}
			next, err := LoadConfig(to)
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), time.Hour)
			defer cancel()
			return copyState(ctx, old, next, cmd.OutOrStdout())
		},
	}
	cmd.Flags().StringVar(&from, "config", "", "configuration `FILE` with the etcd to copy from")
	cmd.Flags().StringVar(&to, "to", "", "configuration `FILE` with the external etcd to copy to")
	return cmd
}

// notCopied are keys of those who run, and of an etcd itself.
func notCopied(key string) bool {
	return strings.HasPrefix(key, "leader/") || key == "history" || key == copyKey
}

func copyState(ctx context.Context, old, next *Config, out io.Writer) (err error) {
	switch {
	case len(next.Etcd.Endpoints) == 0:
		return errors.New("--to: etcd.endpoints: missing: state is copied into an external etcd; the way back is a new start, since the roots of other replicas cannot come along")
	case old.Cluster != next.Cluster || old.TrustDomain != next.TrustDomain:
		return fmt.Errorf("--to: cluster %q with trust domain %s, and --config has %q with %s: one cluster's state is not another's", next.Cluster, next.TrustDomain, old.Cluster, old.TrustDomain)
	case old.DataDir != next.DataDir:
		return fmt.Errorf("--to: dataDir: %s, and --config has %s: the keys of roots are there, and stay", next.DataDir, old.DataDir)
	}
	log := slog.New(slog.DiscardHandler)
	src, err := openStores(ctx, old, false, log)
	if err != nil {
		return fmt.Errorf("copy from: %w", err)
	}
	defer func() { err = errors.Join(err, src.Close()) }()
	if src.external != nil {
		running, _, err := etcd.NewKV(src.own, "leader/").List(ctx, "")
		if err != nil {
			return err
		}
		if len(running) > 0 {
			return fmt.Errorf("copy from: %d hansed of this cluster run: stop them first, and wait for timers.leader (%s)", len(running), old.Timers.Leader.Duration)
		}
	}
	x, err := dialExternal(ctx, next, etcd.History{}, false, log)
	if err != nil {
		return fmt.Errorf("copy to: %w", err)
	}
	defer func() { err = errors.Join(err, x.Close()) }()
	dst := x.Store()
	_, unfinished, err := etcd.NewKV(dst, "").Get(ctx, copyKey)
	if err != nil {
		return err
	}
	if unfinished == 0 {
		_, err = dst.List(ctx, "", 0, func(kv etcd.KeyValue) error {
			if !notCopied(kv.Key) {
				return fmt.Errorf("copy to: this etcd is not empty, it has %s: give the cluster one of its own", kv.Key)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	if _, err := etcd.NewKV(dst, "").Put(ctx, copyKey, []byte(old.Cluster)); err != nil {
		return err
	}
	w := &copying{ctx: ctx, store: dst}
	stores := []etcd.Store{src.own}
	if src.external == nil {
		stores = append(stores, src.imports)
		if err := w.memory(filepath.Join(old.DataDir, "endpoint-ids.json")); err != nil {
			return err
		}
	}
	for _, s := range stores {
		if _, err := s.List(ctx, "", 0, func(kv etcd.KeyValue) error {
			if notCopied(kv.Key) {
				return nil
			}
			return w.put(kv.Key, kv.Value)
		}); err != nil {
			return err
		}
	}
	if err := w.flush(); err != nil {
		return err
	}
	if err := etcd.NewKV(dst, "").Delete(ctx, copyKey); err != nil {
		return err
	}
	fmt.Fprintf(out, "Copied %d keys of cluster %q into %s.\nStart hansed with the new configuration; what it was copied from is as it was, and out of date from then on.\n",
		w.keys, next.Cluster, strings.Join(next.Etcd.Endpoints, ", "))
	return nil
}

// copying writes in batches.
type copying struct {
	ctx   context.Context
	store etcd.Store
	ops   []etcd.Op
	bytes int
	keys  int
}

func (w *copying) put(key string, value []byte) error {
	if len(w.ops) > 0 && (len(w.ops) == etcd.MaxOps || w.bytes+len(key)+len(value) > etcd.MaxBytes) {
		if err := w.flush(); err != nil {
			return err
		}
	}
	w.ops = append(w.ops, etcd.Op{Key: key, Value: value})
	w.bytes += len(key) + len(value)
	w.keys++
	return nil
}

func (w *copying) flush() error {
	if len(w.ops) == 0 {
		return nil
	}
	if _, _, err := w.store.Txn(w.ctx, nil, w.ops); err != nil {
		return fmt.Errorf("copy to: write %s and %d more keys: %w", w.ops[0].Key, len(w.ops)-1, err)
	}
	w.ops, w.bytes = nil, 0
	return nil
}

// memory puts where replicas look for it what a hansed without others keeps in a file: the seed of endpoint IDs, and export times.
func (w *copying) memory(path string) error {
	m := &fileMemory{path: path}
	state, err := m.load(w.ctx)
	if err != nil {
		return err
	}
	if err := w.put(seedKey, m.seed); err != nil {
		return err
	}
	for k, t := range state.Created() {
		if err := w.put(createdKey(k), []byte(t.UTC().Format(time.RFC3339))); err != nil {
			return err
		}
	}
	return nil
}

func createdKey(k objects.Key) string { return createdPath + k.Kind + "/" + k.Namespace + "/" + k.Name }
