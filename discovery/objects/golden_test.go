package objects

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/tools/txtar"

	"github.com/hanse-mesh/hanse/discovery"
)

var update = flag.Bool("update", false, "rewrite the golden files")

var (
	testSelf = discovery.Self{Cluster: "west", TrustDomain: "west.demo", Network: "west", Region: "eu-1"}
	testNow  = time.Date(2026, 11, 22, 20, 0, 0, 0, time.UTC)
)

// counter makes IDs that count.
func counter() func(discovery.Name, string) string {
	n := 0
	return func(discovery.Name, string) string { n++; return fmt.Sprintf("%032x", n) }
}

// Each testdata/*.txtar holds *.yaml and *.json that are decoded, and what comes of them: faults.txt (of Decode, then of
// Build) and snapshot.json.
func TestGolden(t *testing.T) {
	paths, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(paths) == 0 {
		t.Fatalf("no testdata: %v", err)
	}
	for _, path := range paths {
		t.Run(strings.TrimSuffix(filepath.Base(path), ".txtar"), func(t *testing.T) {
			archive, err := txtar.ParseFile(path)
			if err != nil {
				t.Fatal(err)
			}
			got := map[string][]byte{}
			var faults []*Fault
			var objs []Object
			for _, f := range archive.Files {
				if f.Name == "faults.txt" || f.Name == "snapshot.json" {
					continue
				}
				o, err := Decode(f.Data, f.Name)
				objs, faults = append(objs, o...), append(faults, Faults(err)...)
			}
			snap, _, more := Build(Input{Self: testSelf, Set: NewSet(objs...), Now: testNow, NewID: counter(), Complete: true})
			for _, f := range append(faults, more...) {
				got["faults.txt"] = fmt.Appendf(got["faults.txt"], "%s\n", f.Error())
			}
			if len(objs) > 0 {
				got["snapshot.json"] = show(t, snap)
			}
			if *update {
				archive.Files = slices.DeleteFunc(archive.Files, func(f txtar.File) bool { return f.Name == "faults.txt" || f.Name == "snapshot.json" })
				for _, name := range slices.Sorted(maps.Keys(got)) {
					archive.Files = append(archive.Files, txtar.File{Name: name, Data: got[name]})
				}
				if err := os.WriteFile(path, txtar.Format(archive), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			want := map[string][]byte{}
			for _, f := range archive.Files {
				want[f.Name] = f.Data
			}
			for _, name := range []string{"faults.txt", "snapshot.json"} {
				if d := cmp.Diff(string(want[name]), string(got[name])); d != "" {
					t.Errorf("%s (-want +got):\n%s", name, d)
				}
			}
		})
	}
}

// show writes a Snapshot whole.
func show(t *testing.T, s *discovery.Snapshot) []byte {
	t.Helper()
	out := struct {
		*discovery.Snapshot
		Services        []*discovery.Service       `json:"services,omitempty"`
		TrafficPolicies []*discovery.TrafficPolicy `json:"trafficPolicies,omitempty"`
	}{Snapshot: s}
	for _, n := range s.Services.Names() {
		out.Services = append(out.Services, s.Services.Get(n))
	}
	for _, n := range slices.SortedFunc(maps.Keys(s.TrafficPolicy), discovery.Name.Compare) {
		out.TrafficPolicies = append(out.TrafficPolicies, s.TrafficPolicy[n])
	}
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	if err := e.Encode(out); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}
