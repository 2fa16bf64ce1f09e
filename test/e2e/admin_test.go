package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestRemoteAdministration makes an administrator over the socket, and then asks from afar: with that SVID, and with a workload's.
func TestRemoteAdministration(t *testing.T) {
	t.Parallel()
	l := newLab(t, "", "west")
	west := l.clusters[0]
	addr := strings.TrimSuffix(west.GatewayIP, "9") + "1:7447"
	config := filepath.Join(west.Dir, "hansed.yaml")
	b, err := os.ReadFile(config)
	if err != nil {
		t.Fatal(err)
	}
	l.save(config, string(b)+"remoteAdmin: {listen: \""+addr+"\"}\n")
	l.start("west/hansed", "hansed", "--config", config)
	l.ready("west/hansed", west.Admin)
	dir := filepath.Join(l.dir, "alice")
	if out := l.must("west", "", "admin", "create", "alice", "--dir", dir, "--ttl", "1h"); !strings.Contains(out, "spiffe://west.test/hanse/admin/alice") {
		t.Errorf("admin create: %s", out)
	}
	for _, f := range []string{"svid.pem", "key.pem", "bundle.json"} {
		if info, err := os.Stat(filepath.Join(dir, f)); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", f, info, err)
		}
	}
	contexts := filepath.Join(l.dir, "contexts.yaml")
	l.save(contexts, fmt.Sprintf("current: west\ncontexts:\n- {name: west, address: \"%s\", svid: alice/svid.pem, key: alice/key.pem, bundle: alice/bundle.json}\n", addr))
	remote := func() (string, error) {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		cmd := exec.CommandContext(ctx, filepath.Join(bin, "hanse"), "status")
		cmd.Env = append(os.Environ(), "HANSE_CONFIG="+contexts)
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	if out, err := remote(); err != nil || !strings.HasPrefix(out, "OK: west is well") {
		t.Errorf("from afar: %v %s", err, out)
	}
	if _, err := l.hanse("west", "", "admin", "create", "bob/../spire", "--dir", dir); err == nil || !strings.Contains(err.Error(), "hint:") {
		t.Errorf("a name that would be another ID: %v", err)
	}
	for _, f := range []string{"svid.pem", "key.pem"} {
		if err := os.Remove(filepath.Join(dir, f)); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := remote(); err == nil {
		t.Errorf("without an SVID: %s", out)
	}
}
