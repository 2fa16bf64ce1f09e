package docs

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestPromisesAreTested: every test that promises.md names exists, in the package that it names.
func TestPromisesAreTested(t *testing.T) {
	page, err := os.ReadFile("promises.md")
	if err != nil {
		t.Fatal(err)
	}
	have := map[string]bool{}
	declared := regexp.MustCompile(`(?m)^func ((?:Test|Fuzz)\w+)\(`)
	look := func(path string, _ fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case strings.HasSuffix(path, ".txtar"):
			have[filepath.Base(path)] = true
		case strings.HasSuffix(path, "_test.go"):
			source, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			for _, m := range declared.FindAllSubmatch(source, -1) {
				have[filepath.Base(filepath.Dir(path))+"."+string(m[1])] = true
			}
		}
		return nil
	}
	for _, dir := range []string{"federation", "identity", "discovery/xdsserver", "cmd/hansed", "test/e2e"} {
		if err := filepath.WalkDir("../"+dir, look); err != nil {
			t.Fatal(err)
		}
	}
	names := regexp.MustCompile(`\b(?:\w+\.)?(?:Test|Fuzz)[A-Z]\w+|\b[a-z-]+\.txtar\b`).FindAllString(string(page), -1)
	if len(names) < 50 {
		t.Fatalf("only %d tests are named", len(names))
	}
	for _, name := range names {
		if !strings.Contains(name, ".") {
			name = "federation." + name
		}
		if !have[name] {
			t.Errorf("promises.md names %s, which does not exist", name)
		}
	}
}
