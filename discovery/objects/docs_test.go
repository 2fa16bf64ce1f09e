package objects

import (
	"bytes"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

const docs = "../../docs/"

// examples returns the YAML that users are shown: docs/examples/*.yaml and what configuration.md fences, each example
// padded so that its lines are those of the page.
func examples(t testing.TB) map[string][]byte {
	t.Helper()
	found := map[string][]byte{}
	paths, err := filepath.Glob(docs + "examples/*.yaml")
	if err != nil || len(paths) == 0 {
		t.Fatalf("no examples: %v", err)
	}
	for _, p := range paths {
		if found[filepath.Base(p)], err = os.ReadFile(p); err != nil {
			t.Fatal(err)
		}
	}
	page, err := os.ReadFile(docs + "configuration.md")
	if err != nil {
		t.Fatal(err)
	}
	fences := regexp.MustCompile("(?sm)^```yaml\n(.*?)^```$").FindAllSubmatchIndex(page, -1)
	if len(fences) == 0 {
		t.Fatal("configuration.md has no fenced yaml")
	}
	for i, f := range fences {
		before := bytes.Count(page[:f[2]], []byte("\n"))
		found["configuration.md#"+string(rune('a'+i))] = append(bytes.Repeat([]byte("\n"), before), page[f[2]:f[3]]...)
	}
	return found
}

func TestExamplesAreValid(t *testing.T) {
	for name, text := range examples(t) {
		objs, err := Decode(text, name)
		if err != nil {
			t.Error(err)
		}
		if len(objs) == 0 {
			t.Errorf("%s: no objects", name)
		}
	}
}

func TestExampleDirectoryBuildsWithoutFault(t *testing.T) {
	var all []Object
	for name, text := range examples(t) {
		if strings.HasPrefix(name, "configuration.md") {
			continue
		}
		if name == "drill.yaml" { // is run, and no configuration
			continue
		}
		objs, _ := Decode(text, name)
		all = append(all, objs...)
	}
	self := testSelf
	self.TrustDomain = "west.example"
	snap, _, faults := Build(Input{Self: self, Set: NewSet(all...), Now: testNow})
	if err := asError(faults); err != nil {
		t.Error(err)
	}
	if snap.Services.Len() != 6 || len(snap.Routes) != 4 || len(snap.Access) != 2 || len(snap.Peers) != 1 || len(snap.TrustDomains) != 1 {
		t.Errorf("incomplete Snapshot: %s", show(t, snap))
	}
}

// Every kind, every annotation of ours and every field of our own specs is on the page.
func TestConfigurationPageIsComplete(t *testing.T) {
	page, err := os.ReadFile(docs + "configuration.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range Kinds() {
		if !bytes.Contains(page, []byte("`"+k.Name+"`")) {
			t.Errorf("configuration.md does not describe %s", k.Name)
		}
		for _, a := range annotationsOf(k.Name) {
			if !bytes.Contains(page, []byte("`"+a+"`")) {
				t.Errorf("configuration.md does not describe the annotation %s of %s", a, k.Name)
			}
		}
	}
}
