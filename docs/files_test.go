package docs

import (
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "rewrite the tables of files.md from the code")

// files are the configuration files, by the folder whose Config says what is in them, and where the types of its fields from elsewhere are.
var files = []struct {
	dir       string
	elsewhere map[string]string
}{
	{"cmd/hansed", map[string]string{"inject": "discovery/kube/inject"}},
	{"cmd/hanse-proxy", map[string]string{"probe": "proxy/probe"}},
}

// TestFiles: files.md has every field of both configuration files, as its comment in the code says it, and each has a comment.
func TestFiles(t *testing.T) {
	b, err := os.ReadFile("files.md")
	if err != nil {
		t.Fatal(err)
	}
	page := string(b)
	for _, f := range files {
		c := collect(t, f.dir)
		for name, dir := range f.elsewhere {
			for k, v := range collect(t, dir) {
				c[name+"."+k] = v
			}
		}
		var table strings.Builder
		table.WriteString("| field | is |\n|---|---|\n")
		c.rows(t, &table, f.dir, "Config", "")
		table.WriteString("\n")
		begin, end := "<!-- "+f.dir+": `make docs` writes this -->\n", "<!-- end -->"
		head, rest, ok := strings.Cut(page, begin)
		old, tail, ended := strings.Cut(rest, end)
		if !ok || !ended {
			t.Fatalf("files.md has no place for %s", f.dir)
		}
		if old != "\n"+table.String() && !*update {
			t.Errorf("files.md is not what %s says: make docs", f.dir)
		}
		page = head + begin + "\n" + table.String() + end + tail
	}
	if *update {
		if err := os.WriteFile("files.md", []byte(page), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// structType is a struct and its comment.
type structType struct {
	*ast.StructType
	doc string
}

// types are the structs of packages, by name.
type types map[string]structType

func collect(t *testing.T, dir string) types {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join("..", dir, "*.go"))
	if err != nil || len(paths) == 0 {
		t.Fatal(dir, err)
	}
	out := types{}
	for _, path := range paths {
		if strings.HasSuffix(path, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range f.Decls {
			g, ok := d.(*ast.GenDecl)
			if !ok {
				continue
			}
			for _, s := range g.Specs {
				if ts, ok := s.(*ast.TypeSpec); ok {
					if st, ok := ts.Type.(*ast.StructType); ok {
						out[ts.Name.Name] = structType{st, g.Doc.Text()}
					}
				}
			}
		}
	}
	return out
}

// rows writes a row for each field of a struct whose name begins with "pkg." where it is elsewhere.
func (all types) rows(t *testing.T, out *strings.Builder, dir, name, prefix string) {
	t.Helper()
	for _, f := range all[name].Fields.List {
		if f.Tag == nil {
			continue
		}
		key, _, _ := strings.Cut(reflect.StructTag(strings.Trim(f.Tag.Value, "`")).Get("json"), ",")
		if key == "" || key == "-" {
			continue
		}
		inner, many := "", ""
		ast.Inspect(f.Type, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.ArrayType:
				many = "[]"
			case *ast.MapType:
				many = ".NAME"
			case *ast.SelectorExpr:
				inner = fmt.Sprintf("%s.%s", n.X, n.Sel)
				return false
			case *ast.Ident:
				inner = n.Name
				if pkg, _, ok := strings.Cut(name, "."); ok {
					inner = pkg + "." + inner
				}
			}
			return true
		})
		said := f.Comment.Text()
		if said == "" {
			said = strings.TrimPrefix(f.Doc.Text(), f.Names[0].Name+" ")
		}
		typ, isStruct := all[inner]
		if isStruct = isStruct && jsonFields(typ); isStruct && said == "" {
			said = strings.TrimPrefix(typ.doc, inner[strings.LastIndexByte(inner, '.')+1:]+" ")
		}
		if said == "" {
			t.Errorf("%s: %s%s has no comment", dir, prefix, key)
		}
		fmt.Fprintf(out, "| `%s%s` | %s |\n", prefix, key, strings.NewReplacer("|", "\\|", "<", "&lt;").Replace(strings.Join(strings.Fields(said), " ")))
		if isStruct {
			all.rows(t, out, dir, inner, prefix+key+many+".")
		}
	}
}

// jsonFields reports whether the struct is one of fields in the file, not one that reads itself.
func jsonFields(s structType) bool {
	for _, f := range s.Fields.List {
		if f.Tag != nil && regexp.MustCompile(`json:"\w`).MatchString(f.Tag.Value) {
			return true
		}
	}
	return false
}
