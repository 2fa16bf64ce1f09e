package sidecar

import (
	"encoding/json"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestLinesKeepNothingStale: what one record says is never told of the next, and times are exact.
func TestLinesKeepNothingStale(t *testing.T) {
	var l lines
	at := time.Date(2026, 11, 26, 23, 59, 59, 999_000_001, time.FixedZone("", 2*3600+1800))
	a := record{reporter: "source", source: "spiffe://a/x", service: "one", method: "GET", path: "/\"\\", status: 200, tries: 1}
	b := a
	b.service, b.zone = "two", "z"
	for i, c := range []struct {
		rec  record
		at   time.Time
		time string
	}{{a, at, "2026-11-26T23:59:59.999000001+02:30"}, {b, at, "2026-11-26T23:59:59.999000001+02:30"}, {a, at.Add(time.Second), "2026-11-27T00:00:00.999000001+02:30"},
		{a, at.UTC().Truncate(time.Second), "2026-11-26T21:29:59.000000000Z"}} {
		if i == 3 {
			l.second = 0 // another zone within one process's life
		}
		var got map[string]any
		if err := json.Unmarshal(l.append(nil, &c.rec, c.at, time.Millisecond, 1500*time.Nanosecond), &got); err != nil {
			t.Fatal(err)
		}
		zone, hasZone := got["zone"]
		if got["time"] != c.time || got["service"] != c.rec.service || got["path"] != c.rec.path || hasZone != (c.rec.zone != "") || hasZone && zone != c.rec.zone {
			t.Errorf("%d: %v", i, got)
		}
		if stamp, err := time.Parse(time.RFC3339Nano, c.time); err != nil || !stamp.Equal(c.at) {
			t.Error(err, stamp)
		}
	}
}

// TestFailuresAndAccessLogAreDocumented: no line has a key twice, and docs/operations.md has every key and every code of a failure, and no other.
func TestFailuresAndAccessLogAreDocumented(t *testing.T) {
	b, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	_, page, _ := strings.Cut(string(b), "## Why a call failed")
	page, _, _ = strings.Cut(page, "\n## ")
	tables := strings.SplitN(page, "**The access log**", 2)
	if len(tables) != 2 {
		t.Fatal("no section about failures and the access log")
	}
	first := func(table string) (words []string) {
		for _, row := range regexp.MustCompile("(?m)^\\| (`[^|]*) \\|").FindAllStringSubmatch(table, -1) {
			for _, w := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(row[1], -1) {
				words = append(words, w[1])
			}
		}
		slices.Sort(words)
		return words
	}

	var rec record
	v := reflect.ValueOf(&rec).Elem()
	for i := range v.NumField() {
		if f := v.Field(i); f.Kind() == reflect.String {
			reflect.NewAt(f.Type(), f.Addr().UnsafePointer()).Elem().SetString("x")
		}
	}
	rec.reporter = reporterSource
	var keys []string
	d := json.NewDecoder(strings.NewReader(string((&lines{}).append(nil, &rec, time.Now(), 1, 1))))
	for d.More() {
		k, err := d.Token()
		if err != nil {
			t.Fatal(err)
		}
		if k == json.Delim('{') {
			continue
		}
		keys = append(keys, k.(string))
		if _, err := d.Token(); err != nil { // its value
			t.Fatal(err)
		}
	}
	slices.Sort(keys)
	if c := slices.Compact(slices.Clone(keys)); len(c) != len(keys) {
		t.Errorf("a key twice: %q", keys)
	}
	if doc := first(tables[1]); !slices.Equal(doc, keys) {
		t.Errorf("the access log has %q,\nits page says %q", keys, doc)
	}

	source, err := os.ReadFile("answer.go")
	if err != nil {
		t.Fatal(err)
	}
	var codes []string
	for _, m := range regexp.MustCompile(`(?m)^\tcode\w+ += "(\w+)"`).FindAllStringSubmatch(string(source), -1) {
		codes = append(codes, m[1])
	}
	slices.Sort(codes)
	if doc := first(tables[0]); !slices.Equal(doc, codes) || len(codes) == 0 {
		t.Errorf("codes %q,\ntheir page says %q", codes, doc)
	}
}

func BenchmarkAccessLine(b *testing.B) {
	var l lines
	rec := record{reporter: "source", protocol: "http", source: "spiffe://west.bench/ns/shop/sa/frontend", service: "payments.shop.svc.clusterset.local:8080",
		dest: "spiffe://west.bench/ns/shop/sa/payments", endpoint: "3771784f29a71640070cfc20a75e090d", cluster: "west", region: "eu-1", method: "GET", path: "/100",
		route: "default", status: 200, tries: 1, out: 100, traceID: "ddca0f6dd9500783d191050628fb144f"}
	var buf []byte
	b.ReportAllocs()
	for range b.N {
		buf = l.append(buf[:0], &rec, time.Now(), 200*time.Microsecond, 180*time.Microsecond)
	}
}
