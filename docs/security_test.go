package docs

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestAttacksAreTested: every row of security.md's table of attacks names tests, and each exists, with its subtest.
func TestAttacksAreTested(t *testing.T) {
	page, err := os.ReadFile("security.md")
	if err != nil {
		t.Fatal(err)
	}
	sources := map[string]string{}
	for _, dir := range []string{"../identity/spireapi", "../identity"} {
		files, err := filepath.Glob(filepath.Join(dir, "*_test.go"))
		if err != nil || len(files) == 0 {
			t.Fatalf("no tests in %s: %v", dir, err)
		}
		for _, f := range files {
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			sources[filepath.Base(dir)] += string(b)
		}
	}
	_, table, ok := strings.Cut(string(page), "\n| attack | test |\n|---|---|\n")
	if !ok {
		t.Fatal("security.md has no table of attacks")
	}
	table, _, _ = strings.Cut(table, "\n\n")
	rows := strings.Split(strings.TrimSpace(table), "\n")
	for _, row := range rows {
		names := regexp.MustCompile("`(?:(\\w+)\\.)?(Test\\w+)(?:/([^`]+))?`").FindAllStringSubmatch(row, -1)
		if len(names) == 0 {
			t.Errorf("no test in the row %.100s", row)
		}
		for _, n := range names {
			pkg := n[1]
			if pkg == "" {
				pkg = "spireapi"
			}
			if !strings.Contains(sources[pkg], "\nfunc "+n[2]+"(") || n[3] != "" && !strings.Contains(sources[pkg], `{"`+n[3]+`", func`) {
				t.Errorf("security.md names %s, which does not exist in package %s", n[0], pkg)
			}
		}
	}
	if len(rows) < 20 {
		t.Fatalf("only %d rows", len(rows))
	}
}
