package docs

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

// TestMCSIsTested: every row of mcs.md names a test, and each exists, with its subtest.
func TestMCSIsTested(t *testing.T) {
	sources := testSources(t, "../test/kube", "../federation", "../proxy/dns", "../cmd/hansed", ".")
	if rows := testedRows(t, "mcs.md", sources, "kube", func(source, name string) bool { return strings.Contains(source, name+`"`) }); rows < 30 {
		t.Fatalf("only %d rows", rows)
	}
}

// TestNobodyElseWritesServiceImports: no role that is added to Kubernetes' own ones may write ServiceImports (KEP-1645 "Importing Services").
func TestNobodyElseWritesServiceImports(t *testing.T) {
	role := regexp.MustCompile(`(?m)^kind: (Cluster)?Role$`)
	err := filepath.WalkDir("../deploy", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".yaml") {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for doc := range strings.SplitSeq(string(b), "\n---") {
			if !role.MatchString(doc) || strings.Contains(doc, "{{") {
				continue
			}
			var r struct {
				Metadata struct{ Labels map[string]string }
				Rules    []struct{ Resources, Verbs []string }
			}
			if err := yaml.Unmarshal([]byte(doc), &r); err != nil {
				t.Errorf("%s: %v", path, err)
				continue
			}
			for label := range r.Metadata.Labels {
				if !strings.HasPrefix(label, "rbac.authorization.k8s.io/aggregate-to-") {
					continue
				}
				for _, rule := range r.Rules {
					if s := strings.Join(rule.Resources, " "); strings.Contains(s, "serviceimports") || strings.Contains(s, "*") {
						t.Errorf("%s adds %v to %s", path, rule, label)
					}
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
