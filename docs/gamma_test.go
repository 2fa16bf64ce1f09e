package docs

import (
	"os"
	"strings"
	"testing"
)

// TestGAMMAIsTested: every row of gamma.md names a test, and each exists, with its subtest.
func TestGAMMAIsTested(t *testing.T) {
	page, err := os.ReadFile("gamma.md")
	if err != nil {
		t.Fatal(err)
	}
	sources := testSources(t, "../discovery/xdsgen", "../discovery/objects", "../test/kube", "../test/kube/e2e")
	rows := 0
	for row := range strings.SplitSeq(string(page), "\n") {
		if !strings.HasPrefix(row, "| ") || strings.HasPrefix(row, "| the specification") {
			continue
		}
		rows++
		cells := strings.Split(row, "|")
		namedTests(t, "gamma.md", cells[len(cells)-2], sources, "xdsgen", func(source, name string) bool { return strings.Contains(source, `"`+name+`"`) })
	}
	if rows < 25 {
		t.Fatalf("only %d rows", rows)
	}
}
