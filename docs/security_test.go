package docs

import (
	"os"
	"strings"
	"testing"
)

// TestAttacksAreTested: every row of security.md's table of attacks names tests, and each exists, with its subtest.
func TestAttacksAreTested(t *testing.T) {
	page, err := os.ReadFile("security.md")
	if err != nil {
		t.Fatal(err)
	}
	sources := testSources(t, "../identity/spireapi", "../identity")
	_, table, ok := strings.Cut(string(page), "\n| attack | test |\n|---|---|\n")
	if !ok {
		t.Fatal("security.md has no table of attacks")
	}
	table, _, _ = strings.Cut(table, "\n\n")
	rows := strings.Split(strings.TrimSpace(table), "\n")
	for _, row := range rows {
		namedTests(t, "security.md", row, sources, "spireapi", func(source, name string) bool { return strings.Contains(source, `{"`+name+`", func`) })
	}
	if len(rows) < 20 {
		t.Fatalf("only %d rows", len(rows))
	}
}
