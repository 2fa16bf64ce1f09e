package agent

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"

	"github.com/hanse-mesh/hanse/identity/atomicfile"
)

// The files that runFiles keeps in FilesDir, for gRPC's file_watcher certificate provider (gRFC A29, A87).
const (
	FileSVID      = "svid.pem"
	FileKey       = "key.pem"
	FileBundle    = "bundle.pem" // of the own trust domain
	FileBundleMap = "spiffe_trust_bundle_map.json"
)

// runFiles writes the files at each change of the Source, until ctx ends. They are links through one link, ..data, which
// is swapped, so that whoever opens it sees one consistent set (as Kubernetes projects volumes).
func (a *Agent) runFiles(ctx context.Context) error {
	if err := atomicfile.MakeDir(a.cfg.FilesDir); err != nil {
		return fmt.Errorf("identity files: %w", err)
	}
	for {
		changed := a.src.Changed()
		var retry <-chan time.Time
		if _, err := a.src.GetX509SVID(); err == nil {
			if err := a.writeFiles(); err != nil {
				a.metrics.failures.WithLabelValues("files").Inc()
				a.log.Error("cannot write identity files; the last set stays", "dir", a.cfg.FilesDir, "error", err)
				retry = time.After(a.cfg.SyncInterval)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-retry:
		}
	}
}

func (a *Agent) writeFiles() (err error) {
	files, err := a.fileSet()
	if err != nil {
		return err
	}
	dir := a.cfg.FilesDir
	set := "..set-" + strings.ToLower(rand.Text())
	if err := os.Mkdir(filepath.Join(dir, set), 0o700); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(filepath.Join(dir, set)))
		}
	}()
	for name, data := range files {
		if err := atomicfile.Write(filepath.Join(dir, set, name), data); err != nil {
			return err
		}
	}
	old, err := os.Readlink(filepath.Join(dir, "..data"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := swapLink(set, filepath.Join(dir, "..data")); err != nil {
		return err
	}
	for name := range files {
		path := filepath.Join(dir, name)
		if to, err := os.Readlink(path); err == nil && to == filepath.Join("..data", name) {
			continue
		}
		if err := swapLink(filepath.Join("..data", name), path); err != nil {
			return err
		}
	}
	if err := atomicfile.SyncDir(dir); err != nil {
		return err
	}
	if old != "" && filepath.Base(old) == old {
		return os.RemoveAll(filepath.Join(dir, old))
	}
	return nil
}

// swapLink makes path a link to target, replacing what was there in one step.
func swapLink(target, path string) error {
	tmp := filepath.Join(filepath.Dir(path), "..link-"+strings.ToLower(rand.Text()))
	if err := os.Symlink(target, tmp); err != nil {
		return err
	}
	if err := os.Rename(tmp, path); err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	return nil
}

func (a *Agent) fileSet() (map[string][]byte, error) {
	svid, err := a.src.GetX509SVID()
	if err != nil {
		return nil, err
	}
	chain, key, err := svid.Marshal()
	if err != nil {
		return nil, fmt.Errorf("encode X509-SVID: %w", err)
	}
	var roots []byte
	byTD := map[string]json.RawMessage{}
	for td, b := range a.src.Bundles() {
		if td == svid.ID.TrustDomain() {
			for _, c := range b.X509Authorities() {
				roots = append(roots, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
			}
		}
		// Only X.509 authorities: some gRPC implementations refuse a map with other keys.
		x := spiffebundle.FromX509Bundle(b.X509Bundle())
		if seq, ok := b.SequenceNumber(); ok {
			x.SetSequenceNumber(seq)
		}
		if byTD[td.Name()], err = x.Marshal(); err != nil {
			return nil, fmt.Errorf("encode bundle of %s: %w", td, err)
		}
	}
	bundleMap, err := json.Marshal(map[string]any{"trust_domains": byTD})
	if err != nil {
		return nil, fmt.Errorf("encode bundle map: %w", err)
	}
	return map[string][]byte{FileSVID: chain, FileKey: key, FileBundle: roots, FileBundleMap: bundleMap}, nil
}
