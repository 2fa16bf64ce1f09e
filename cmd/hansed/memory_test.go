package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/discovery/objects"
)

// TestMemoryOutlivesARestart: IDs and times come back, also those of a file that was written before IDs had a seed; what is written does not
// grow with the endpoints; a file that is none is refused.
func TestMemoryOutlivesARestart(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ids.json")
	old := strings.Repeat("ab", 16)
	if err := os.WriteFile(path, []byte(`{"version":1,"created":{"ServiceExport/shop/payments":"2026-01-02T03:04:05Z"},"endpoints":{"shop/payments":{"10.0.0.1||0|":"`+old+`"}}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	payments := discovery.Name{Namespace: "shop", Name: "payments"}
	var ids []string
	size := int64(0)
	for range 3 {
		m := &fileMemory{path: path}
		state, err := m.load(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if got := state.Created()[objects.Key{Kind: "ServiceExport", Namespace: "shop", Name: "payments"}]; !got.Equal(time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)) {
			t.Errorf("created %v", got)
		}
		if id := m.newID()(payments, "10.0.0.1||0|"); id != old {
			t.Errorf("an ID of before is %s, was %s", id, old)
		}
		ids = append(ids, m.newID()(payments, "10.0.0.2||0|"))
		if err := m.save(t.Context(), state); err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(path)
		if err != nil || size != 0 && info.Size() != size {
			t.Errorf("%d bytes are kept, %d before: %v", info.Size(), size, err)
		}
		size = info.Size()
	}
	if ids[0] != ids[1] || ids[1] != ids[2] || ids[0] == old || len(ids[0]) != 32 {
		t.Errorf("IDs after restarts: %v", ids)
	}
	for _, bad := range []string{`{`, `{"version":9}`, `{"version":2,"seed":"AAAA"}`, `{"version":1,"endpoints":{"a/b":{"k":"xyz"}}}`, `{"version":1,"created":{"a":"2026-01-02T03:04:05Z"}}`} {
		if err := os.WriteFile(path, []byte(bad), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := (&fileMemory{path: path}).load(t.Context()); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", bad, err)
		}
	}
}
