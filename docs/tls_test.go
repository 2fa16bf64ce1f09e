package docs

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"strings"
	"testing"
)

// No TLS session of ours is resumed: a resumed session would outlive the bundle that verified it. Every tls.Config that the
// programs make says so where it is made, and nothing gives one a session cache.
func TestNoTLSResumption(t *testing.T) {
	set := token.NewFileSet()
	found := 0
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (strings.HasPrefix(d.Name(), ".") && path != ".." || d.Name() == "test" || d.Name() == "testdata") {
			return fs.SkipDir
		}
		if !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return nil
		}
		file, err := parser.ParseFile(set, path, nil, 0)
		if err != nil {
			return err
		}
		ast.Inspect(file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.SelectorExpr:
				if n.Sel.Name == "ClientSessionCache" || n.Sel.Name == "SetSessionTicketKeys" {
					t.Errorf("%s: %s", set.Position(n.Pos()), n.Sel.Name)
				}
			case *ast.CompositeLit:
				sel, ok := n.Type.(*ast.SelectorExpr)
				if !ok || sel.Sel.Name != "Config" {
					return true
				}
				if pkg, ok := sel.X.(*ast.Ident); !ok || pkg.Name != "tls" {
					return true
				}
				found++
				off := false
				for _, e := range n.Elts {
					if kv, ok := e.(*ast.KeyValueExpr); ok {
						key, _ := kv.Key.(*ast.Ident)
						value, _ := kv.Value.(*ast.Ident)
						off = off || key != nil && key.Name == "SessionTicketsDisabled" && value != nil && value.Name == "true"
						if key != nil && key.Name == "ClientSessionCache" {
							t.Errorf("%s: a session cache", set.Position(kv.Pos()))
						}
					}
				}
				if !off {
					t.Errorf("%s: a tls.Config without SessionTicketsDisabled: true", set.Position(n.Pos()))
				}
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if found < 4 {
		t.Errorf("found %d configurations, and there are more: this test looks in the wrong place", found)
	}
}
