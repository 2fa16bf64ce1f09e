package agent_test

import (
	"bytes"
	"crypto/tls"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"

	"github.com/hanse-mesh/hanse/identity/agent"
	"github.com/hanse-mesh/hanse/identity/bundle"
	"github.com/hanse-mesh/hanse/identity/ca"
)

func TestFiles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, east := newServer(t, "west.demo", options{}), newServer(t, "east.demo", options{})
		s.start()
		check(t, s.bundles.Relate(bundle.Relation{TrustDomain: east.td}))
		check(t, s.bundles.Set(east.td, east.authority.Bundle(), "join"))
		cfg := s.agentConfig(s.token(frontend))
		cfg.FilesDir, cfg.SyncInterval = filepath.Join(t.TempDir(), "files"), 10*time.Minute
		a, stop := runAgent(t, cfg)
		wait(t, a.Source())
		for range 3 { // SVIDs
			synctest.Wait()
			svid, err := a.Source().GetX509SVID()
			check(t, err)
			pair, err := tls.LoadX509KeyPair(filepath.Join(cfg.FilesDir, agent.FileSVID), filepath.Join(cfg.FilesDir, agent.FileKey))
			check(t, err)
			if !bytes.Equal(pair.Certificate[0], svid.Certificates[0].Raw) {
				t.Error("another SVID in the files")
			}
			time.Sleep(40 * time.Minute)
		}
		stop()
		var m struct {
			TrustDomains map[string]json.RawMessage `json:"trust_domains"`
		}
		data, err := os.ReadFile(filepath.Join(cfg.FilesDir, agent.FileBundleMap))
		check(t, err)
		check(t, json.Unmarshal(data, &m))
		for _, x := range []*server{s, east} {
			b, err := spiffebundle.Parse(x.td, m.TrustDomains[x.td.Name()])
			check(t, err)
			if !b.X509Bundle().Equal(x.authority.Bundle().X509Bundle()) || len(b.JWTAuthorities()) != 0 {
				t.Errorf("bundle of %s differs", x.td)
			}
		}
		sets := 0
		check(t, filepath.WalkDir(cfg.FilesDir, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			info, err := d.Info()
			check(t, err)
			switch {
			case d.IsDir() && path != cfg.FilesDir:
				sets++
				fallthrough
			case d.IsDir():
				if info.Mode().Perm() != 0o700 {
					t.Errorf("%s has mode %04o", path, info.Mode().Perm())
				}
			case d.Type()&fs.ModeSymlink == 0 && info.Mode().Perm() != 0o600:
				t.Errorf("%s has mode %04o", path, info.Mode().Perm())
			}
			return nil
		}))
		if sets != 1 {
			t.Errorf("%d sets left", sets)
		}
	})
}

// Whoever opens the folder once reads one consistent set, however often it changes.
func TestFilesAreConsistent(t *testing.T) {
	t.Parallel()
	s := newServer(t, "west.demo", options{ca: ca.Config{X509Life: time.Second}})
	s.start()
	cfg := s.agentConfig(s.token(frontend))
	cfg.FilesDir = filepath.Join(t.TempDir(), "files")
	cfg.SyncInterval = 50 * time.Millisecond
	a, _ := runAgent(t, cfg)
	wait(t, a.Source())
	seen := map[string]bool{}
	for deadline := time.Now().Add(2 * time.Minute); len(seen) < 3 && time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		set, err := os.Readlink(filepath.Join(cfg.FilesDir, "..data"))
		if err != nil {
			continue // not written yet
		}
		dir := filepath.Join(cfg.FilesDir, set)
		pair, err := tls.LoadX509KeyPair(filepath.Join(dir, agent.FileSVID), filepath.Join(dir, agent.FileKey))
		if errors.Is(err, fs.ErrNotExist) {
			continue // replaced meanwhile
		}
		check(t, err)
		seen[string(pair.Certificate[0])] = true
	}
	if len(seen) < 3 {
		t.Errorf("%d sets seen", len(seen))
	}
}
