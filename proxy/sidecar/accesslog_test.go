package sidecar

import (
	"encoding/json"
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
