package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"testing"
	"time"
)

// drillReport is what a script reads of `hanse drill run -o json`.
type drillReport struct {
	State, Verdict, Reason string
	Calls, Failed, Retried uint64
	Detect                 *float64 `json:"detectSeconds"`
	P50Before              float64  `json:"p50BeforeMs"`
	P50During              float64  `json:"p50DuringMs"`
}

// TestDrillModes runs every mode against a mesh under load. Afterwards all is as it was.
func TestDrillModes(t *testing.T) {
	l := newLab(t, shortTimers, "west", "east")
	l.up()
	drill := func(args ...string) (d drillReport) {
		t.Helper()
		out, err := l.hanse("west", "", append([]string{"drill", "run", "--yes", "-o", "json"}, args...)...)
		if jerr := json.Unmarshal([]byte(out), &d); jerr != nil {
			t.Fatalf("drill %v: %v %v", args, err, jerr)
		}
		return d
	}
	zone := []string{"--service", "shop/payments", "--zone", "eu-1a", "--for", "4s"}
	over := func(d drillReport) error {
		if d.State != "done" || d.Verdict != "PASSED" || d.Calls == 0 {
			return fmt.Errorf("%+v", d)
		}
		return nil
	}

	ld := l.load("west", payments, 4)
	time.Sleep(6 * time.Second) // a baseline

	if d := drill(append([]string{"--drain"}, zone...)...); over(d) != nil || d.Failed != 0 {
		t.Errorf("drain: %+v", d)
	}
	if d := drill(append([]string{"--slow", "--latency", "200ms"}, zone...)...); over(d) != nil || d.Failed != 0 || d.P50During < d.P50Before {
		t.Errorf("slow: %+v", d)
	}
	for _, mode := range []string{"--silence-control-plane", "--cut-federation"} {
		if d := drill(mode, "--for", "6s"); d.State != "done" || d.Failed != 0 {
			t.Errorf("%s: %+v", mode, d)
		}
		l.green()
	}
	ld.stop()
	ld.none(l, "drain, slow, silence-control-plane and cut-federation")

	ld = l.load("west", payments, 4)
	time.Sleep(2 * time.Second)
	if d := drill(append([]string{"--errors", "--abort-if", "success<1%"}, zone...)...); over(d) != nil || d.Failed == 0 || d.Detect == nil {
		t.Errorf("errors: %+v", d)
	}
	if d := drill(append([]string{"--errors", "--for", "30s"}, zone[:4]...)...); d.State == "done" && d.Failed > 0 && d.Failed*50 > d.Calls {
		t.Errorf("the guard let 2%% fail: %+v", d)
	}
	ld.stop()

	// Whoever dies: a drill without its control plane heals in the sidecars, at the end of its lease.
	if out, err := l.hanse("west", "", "drill", "run", "--blackhole", "--yes", "--detach", "--service", "shop/payments", "--for", "60s"); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	client := l.client("west", "frontend")
	l.eventually(20*time.Second, "west's payments are black-holed", func() error {
		if a, err := call(client, payments); err != nil || a.Cluster != "east" {
			return fmt.Errorf("%+v %w", a, errors.Join(err))
		}
		return nil
	})
	l.kill("west/hansed")
	l.eventually(40*time.Second, "sidecars heal by themselves", func() error {
		if a, err := call(client, payments); err != nil || a.Cluster != "west" {
			return fmt.Errorf("%+v %w", a, errors.Join(err))
		}
		return nil
	})
	l.start("west/hansed")
	l.ready("west/hansed", l.cluster("west").Admin)
	l.green()
}
