package docs

import (
	"os"
	"strings"
	"testing"
)

// TestFailuresAreTested: every row of spire.md's tables of what fails names tests, and each exists, with its part.
func TestFailuresAreTested(t *testing.T) {
	page, err := os.ReadFile("spire.md")
	if err != nil {
		t.Fatal(err)
	}
	sources := testSources(t, "../test/spire", "../identity/onspire", "../identity/upstream", "../identity/agent")
	tables, rows := strings.Split(string(page), "\n| what fails |"), 0
	for _, table := range tables[1:] {
		head, table, _ := strings.Cut(table, "|---|\n")
		if !strings.HasSuffix(strings.TrimRight(strings.TrimRight(head, "|-\n "), "|"), "test") {
			t.Errorf("a table without a column of tests: | what fails |%s", head)
		}
		table, _, _ = strings.Cut(table, "\n\n")
		for row := range strings.SplitSeq(strings.TrimSpace(table), "\n") {
			rows++
			cells := strings.Split(row, "|")
			namedTests(t, "spire.md", cells[len(cells)-2], sources, "spire", func(source, name string) bool {
				return strings.Contains(source, `"`+name+`", func`) || strings.Contains(source, `{"`+name+`"`)
			})
		}
	}
	if len(tables) != 3 || rows != 14 {
		t.Errorf("%d tables with %d rows, want 2 with 14", len(tables)-1, rows)
	}
}
