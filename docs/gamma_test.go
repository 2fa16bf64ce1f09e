package docs

import (
	"strings"
	"testing"
)

// TestGAMMAIsTested: every row of gamma.md names a test, and each exists, with its subtest.
func TestGAMMAIsTested(t *testing.T) {
	sources := testSources(t, "../discovery/xdsgen", "../discovery/objects", "../test/kube", "../test/kube/e2e")
	if rows := testedRows(t, "gamma.md", sources, "xdsgen", func(source, name string) bool { return strings.Contains(source, `"`+name+`"`) }); rows < 25 {
		t.Fatalf("only %d rows", rows)
	}
}
