package docs

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// testSources are the tests of packages, by the names of their directories; those of this package are docs.
func testSources(t *testing.T, dirs ...string) map[string]string {
	t.Helper()
	sources := map[string]string{}
	for _, dir := range dirs {
		files, err := filepath.Glob(filepath.Join(dir, "*_test.go"))
		if err != nil || len(files) == 0 {
			t.Fatalf("no tests in %s: %v", dir, err)
		}
		name := filepath.Base(dir)
		if name == "." {
			name = "docs"
		}
		for _, f := range files {
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			sources[name] += string(b)
		}
	}
	return sources
}

var namedTest = regexp.MustCompile("`(?:(\\w+)\\.)?(Test\\w+)(?:/([^`]+))?`")

// namedTests checks that a row of a page's table names a test, and that each one exists, with its subtest. usual is the package of those that name none; subtest finds one in its source.
func namedTests(t *testing.T, page, row string, sources map[string]string, usual string, subtest func(source, name string) bool) {
	t.Helper()
	names := namedTest.FindAllStringSubmatch(row, -1)
	if len(names) == 0 {
		t.Errorf("no test in the row %.100s", row)
	}
	for _, n := range names {
		pkg := n[1]
		if pkg == "" {
			pkg = usual
		}
		if source := sources[pkg]; !strings.Contains(source, "\nfunc "+n[2]+"(") || n[3] != "" && !subtest(source, n[3]) {
			t.Errorf("%s names %s, which does not exist in package %s", page, n[0], pkg)
		}
	}
}

// testedRows checks, and counts, the rows of the tables of a page whose first column is the specification and whose last one the test.
func testedRows(t *testing.T, page string, sources map[string]string, usual string, subtest func(source, name string) bool) (rows int) {
	t.Helper()
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	for row := range strings.SplitSeq(string(text), "\n") {
		if !strings.HasPrefix(row, "| ") || strings.HasPrefix(row, "| the specification") {
			continue
		}
		rows++
		cells := strings.Split(row, "|")
		namedTests(t, page, cells[len(cells)-2], sources, usual, subtest)
	}
	return rows
}
