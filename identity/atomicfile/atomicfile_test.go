package atomicfile_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/hanse-mesh/hanse/identity/atomicfile"
)

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestWriteAndRead(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b")
	check(t, atomicfile.MakeDir(dir))
	path := filepath.Join(dir, "x")
	if _, err := atomicfile.Read(path, 10); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a missing file: %v", err)
	}
	check(t, os.WriteFile(path, []byte("old and open"), 0o644))
	if _, err := atomicfile.Read(path, 100); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Errorf("a file that others read: %v", err)
	}
	check(t, atomicfile.Write(path, []byte("new")))
	if data, err := atomicfile.Read(path, 3); err != nil || string(data) != "new" {
		t.Errorf("%q, %v", data, err)
	}
	if _, err := atomicfile.Read(path, 2); err == nil {
		t.Error("reads beyond the limit")
	}
	info, err := os.Stat(dir)
	check(t, err)
	entries, err := os.ReadDir(dir)
	check(t, err)
	if info.Mode().Perm() != 0o700 || len(entries) != 1 {
		t.Errorf("mode %04o, files %v", info.Mode().Perm(), entries)
	}
	if err := atomicfile.Write(filepath.Join(dir, "none", "x"), nil); err == nil || !strings.Contains(err.Error(), "none") {
		t.Errorf("a missing folder: %v", err)
	}
}

// A reader sees one whole content or another.
func TestConcurrentWriters(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x")
	check(t, atomicfile.Write(path, []byte(strings.Repeat("a", 1000))))
	var wg sync.WaitGroup
	for _, c := range []string{"a", "b", "c"} {
		wg.Go(func() {
			for range 20 {
				if err := atomicfile.Write(path, []byte(strings.Repeat(c, 1000))); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for range 200 {
		data, err := atomicfile.Read(path, 2000)
		check(t, err)
		if len(data) != 1000 || strings.Trim(string(data), string(data[:1])) != "" {
			t.Fatalf("mixed content of %d bytes", len(data))
		}
	}
	wg.Wait()
}
