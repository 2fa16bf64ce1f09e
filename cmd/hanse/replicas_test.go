package main

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/hanse-mesh/hanse/cmd/internal/admin"
)

// TestStatusShowsReplicas: who leads since when, and whose root signs.
func TestStatusShowsReplicas(t *testing.T) {
	var out bytes.Buffer
	c := &cli{out: &out, getenv: func(string) string { return "" }}
	c.printStatus(admin.Status{OK: true, Summary: "west is well.", Cluster: "west", Replicas: []admin.Replica{
		{Name: "west-2", Leads: true, LeadingSince: time.Date(2026, 11, 26, 12, 0, 0, 0, time.UTC), Signs: true, Age: 7200, Addresses: []string{"192.0.2.2:7443"}},
		{Name: "west-1", Age: 5},
	}})
	var got []string
	for line := range strings.Lines(out.String()) {
		got = append(got, strings.Join(strings.Fields(line), " "))
	}
	want := []string{"REPLICA LEADS SIGNS UP VERSION ADDRESS", "west-2 since " + time.Date(2026, 11, 26, 12, 0, 0, 0, time.UTC).Local().Format("2006-01-02 15:04:05") + " yes 2h - 192.0.2.2:7443", "west-1 - not yet 5s - -"}
	if tail := got[max(0, len(got)-3):]; strings.Join(tail, "\n") != strings.Join(want, "\n") {
		t.Errorf("%s\nwant\n%s", strings.Join(tail, "\n"), strings.Join(want, "\n"))
	}
}
