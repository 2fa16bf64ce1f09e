package docs

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
)

const module = "github.com/hanse-mesh/hanse"

// rules reads the table of architecture.md: package → what it may import inside the module.
func rules(t *testing.T) map[string][]string {
	t.Helper()
	page, err := os.ReadFile("architecture.md")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile("(?s)```imports\n(.*?)```").FindSubmatch(page)
	if m == nil {
		t.Fatal("architecture.md has no ```imports block")
	}
	out := map[string][]string{}
	for line := range strings.Lines(string(m[1])) {
		left, right, ok := strings.Cut(strings.TrimSpace(line), "←")
		fields := strings.Fields(left)
		if !ok || len(fields) < 2 {
			t.Fatalf("architecture.md: cannot read the line %q", line)
		}
		out[fields[0]] = strings.Fields(right)
	}
	return out
}

type goPackage struct {
	ImportPath, Doc string
	Imports         []string
	GoFiles         []string
}

func packages(t *testing.T) []goPackage {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Doc,Imports,GoFiles", "./...")
	cmd.Dir = ".."
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	var ps []goPackage
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p goPackage
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		if len(p.GoFiles) > 0 {
			ps = append(ps, p)
		}
	}
	if len(ps) < 10 {
		t.Fatalf("go list found only %d packages", len(ps))
	}
	return ps
}

func TestPackagesImportOnlyWhatTheArchitectureSays(t *testing.T) {
	table := rules(t)
	for _, p := range packages(t) {
		name := strings.TrimPrefix(p.ImportPath, module+"/")
		if strings.HasPrefix(name, "test/") || strings.HasPrefix(name, "deploy") || name == "docs" {
			continue // what spans programs may import anything
		}
		allowed, ok := rule(table, name)
		if !ok {
			t.Errorf("%s is not in the table of architecture.md: say in a sentence what it owns and what it may import", name)
			continue
		}
		for _, imp := range p.Imports {
			inside, ok := strings.CutPrefix(imp, module+"/")
			if ok && !permits(allowed, inside) && !strings.HasPrefix(inside, name+"/") {
				t.Errorf("%s imports %s, which architecture.md does not allow (allowed: %v)", name, inside, allowed)
			}
		}
	}
}

// rule finds the table's line for a package; a package below a listed command belongs to it.
func rule(table map[string][]string, name string) ([]string, bool) {
	for n := name; ; {
		if r, ok := table[n]; ok {
			return r, true
		}
		i := strings.LastIndexByte(n, '/')
		if i < 0 || !strings.HasPrefix(n, "cmd/") && !strings.HasSuffix(n, "pb") {
			return nil, false
		}
		n = n[:i]
	}
}

func permits(allowed []string, pkg string) bool {
	for _, a := range allowed {
		if base, all := strings.CutSuffix(a, "/..."); a == pkg || all && (pkg == base || strings.HasPrefix(pkg, base+"/")) {
			return true
		}
	}
	return false
}

func TestEveryPackageHasAComment(t *testing.T) {
	for _, p := range packages(t) {
		if p.Doc == "" {
			t.Errorf("%s has no package comment: what flows, what is promised?", p.ImportPath)
		}
	}
}
