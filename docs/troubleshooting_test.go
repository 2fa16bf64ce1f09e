package docs

import (
	"os"
	"regexp"
	"strings"
	"testing"
)

// TestSymptomsLead: the table of troubleshooting.md leads to each of its symptoms, and each has a cause and a remedy.
func TestSymptomsLead(t *testing.T) {
	b, err := os.ReadFile("troubleshooting.md")
	if err != nil {
		t.Fatal(err)
	}
	page := string(b)
	anchors := map[string]bool{}
	punctuation := regexp.MustCompile(`[^\p{L}\p{N} _-]`)
	symptoms := strings.Split(page, "\n### ")[1:]
	for _, s := range symptoms {
		title, text, _ := strings.Cut(s, "\n")
		anchor := strings.ReplaceAll(punctuation.ReplaceAllString(strings.ToLower(title), ""), " ", "-")
		anchors[anchor] = true
		if !strings.Contains(page, "](#"+anchor+")") {
			t.Errorf("nothing leads to %q (#%s)", title, anchor)
		}
		for _, part := range []string{"```console\n", "**Cause:**", "**Remedy:**"} {
			if !strings.Contains(text, part) {
				t.Errorf("%q has no %s", title, part)
			}
		}
	}
	if len(symptoms) < 15 {
		t.Errorf("only %d symptoms", len(symptoms))
	}
	for _, m := range regexp.MustCompile(`\]\(#([^)]+)\)`).FindAllStringSubmatch(page, -1) {
		if !anchors[m[1]] {
			t.Errorf("#%s leads nowhere", m[1])
		}
	}
}
