package objects

import (
	"bytes"
	"os"
	"strings"
	"testing"
)

// TestVerdicts: of testdata/verdicts, good.yaml is accepted, and each object of bad.yaml refused for the field that its comment names.
// test/kube holds an API server with the webhook to the same.
func TestVerdicts(t *testing.T) {
	good, err := os.ReadFile("testdata/verdicts/good.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for i, doc := range bytes.Split(good, []byte("---\n")) {
		if objs, err := Decode(doc, "good.yaml"); err != nil || len(objs) != 1 {
			t.Errorf("document %d: %v", i+1, err)
		}
	}
	bad, err := os.ReadFile("testdata/verdicts/bad.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, doc := range bytes.Split(bad, []byte("---\n")) {
		comment, _, _ := strings.Cut(string(doc), "\n")
		wants, ok := strings.CutPrefix(comment, "# wants: ")
		if !ok {
			t.Fatalf("no field is named before\n%s", doc)
		}
		_, err := Decode(doc, "bad.yaml")
		faults := Faults(err)
		if len(faults) != 1 || faults[0].Field != wants {
			t.Errorf("want one fault at %s of\n%s\ngot %v", wants, doc, err)
		}
	}
}
