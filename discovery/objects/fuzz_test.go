package objects

import (
	"encoding/json"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"golang.org/x/tools/txtar"
)

func FuzzDecode(f *testing.F) {
	seeds := 0
	for _, text := range examples(f) {
		f.Add(text)
		seeds++
	}
	paths, _ := filepath.Glob("testdata/*.txtar")
	for _, p := range paths {
		archive, err := txtar.ParseFile(p)
		if err != nil {
			f.Fatal(err)
		}
		for _, file := range archive.Files {
			if strings.HasSuffix(file.Name, ".yaml") || strings.HasSuffix(file.Name, ".json") {
				f.Add(file.Data)
				seeds++
			}
		}
	}
	if seeds < 10 {
		f.Fatalf("only %d seeds found", seeds)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		lines := strings.Count(string(data), "\n") + 1
		objs, err := Decode(data, "f.yaml")
		for _, fault := range Faults(err) {
			if fault.Reason == "" || fault.Line < 0 || fault.Line > lines {
				t.Errorf("fault %+v in a file of %d lines", fault, lines)
			}
		}
		for _, o := range objs {
			text, err := json.Marshal(o)
			if err != nil {
				t.Fatalf("%s: %v", o.Key(), err)
			}
			again, err := Decode(text, "")
			if err != nil || len(again) != 1 {
				t.Fatalf("%s does not decode again: %v\n%s", o.Key(), err, text)
			}
			if more, _ := json.Marshal(again[0]); string(more) != string(text) {
				t.Errorf("%s changed when written and read:\n%s\n%s", o.Key(), text, more)
			}
		}
		a, state, _ := Build(Input{Self: testSelf, Set: NewSet(objs...), Now: testNow, NewID: counter()})
		b, _, _ := Build(Input{Self: testSelf, Set: NewSet(objs...), State: state, Now: testNow.Add(1), NewID: counter()})
		if !reflect.DeepEqual(a, b) {
			t.Error("the second Build differs from the first")
		}
	})
}
