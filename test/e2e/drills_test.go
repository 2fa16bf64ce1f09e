package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"testing"
	"time"
)

// drillReport is what a script reads of `hanse drill run -o json`.
type drillReport struct {
	State, Verdict, Reason string
	Calls, Failed, Retried uint64
	Detect                 *float64 `json:"detectSeconds"`
	Renewed                *float64 `json:"renewedSeconds"`
	Closed                 int
	P50Before              float64 `json:"p50BeforeMs"`
	P50During              float64 `json:"p50DuringMs"`
}

// TestDrillModes runs every mode against a mesh under load. Afterwards all is as it was.
func TestDrillModes(t *testing.T) {
	t.Parallel()
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

	l.save(filepath.Join(l.dir, "drain.yaml"), `{apiVersion: hanse.mesh/v1alpha1, kind: Drill, metadata: {name: drain}, spec: {mode: drain, duration: 4s,
  scope: {cluster: west, service: shop/payments, zone: eu-1a}}}`)
	if d := drill("-f", filepath.Join(l.dir, "drain.yaml")); over(d) != nil || d.Failed != 0 {
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

// TestIdentityDrills lets certificates expire, distrusts a trust domain and rotates the root, under load. Nothing fails within a cluster, and
// afterwards all is as it was, though the control plane dies in the middle.
func TestIdentityDrills(t *testing.T) {
	t.Parallel()
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
	ld := l.load("west", payments, 4)
	time.Sleep(6 * time.Second) // a baseline
	if d := drill("--expire-certificates", "--service", "shop/payments", "--zone", "eu-1a", "--for", "5s"); d.State != "done" || d.Failed != 0 || d.Detect == nil {
		t.Errorf("expire-certificates: %+v", d)
	}
	d := drill("--rotate", "--for", "90s")
	t.Logf("rotate: %+v, SVIDs renewed in %.1fs", d, deref(d.Renewed))
	if d.State != "done" || d.Failed != 0 || d.Renewed == nil || d.Calls == 0 {
		t.Errorf("rotate: %+v", d)
	}
	if td := get[trustPage](l, "west", "trust", "show", "west.test"); len(td.Authorities) != 1 {
		t.Errorf("%d roots after the drill, want the new one", len(td.Authorities))
	}
	d = drill("--distrust-root", "--root", "east.test", "--for", "5s")
	t.Logf("distrust-root: %+v", d)
	if d.State != "done" || d.Failed != 0 || d.Closed == 0 {
		t.Errorf("distrust-root: %+v", d)
	}
	ld.stop()
	ld.none(l, "expire-certificates, rotate and distrust-root")
	l.green()

	l.kill("west/pay-a", "west/pay-a-app", "west/pay-b", "west/pay-b-app")
	client := l.client("west", "frontend")
	answers := func() error {
		_, err := call(client, payments)
		return err
	}
	l.eventually(20*time.Second, "calls cross", answers)
	if out, err := l.hanse("west", "", "drill", "run", "--distrust-root", "--root", "east.test", "--yes", "--detach", "--for", "60s", "--abort-if", "success<1%"); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	l.eventually(10*time.Second, "east is refused", func() error {
		if answers() == nil {
			return errors.New("it answers")
		}
		return nil
	})
	l.kill("west/hansed")
	l.eventually(40*time.Second, "sidecars trust again by themselves", answers)
	l.start("west/hansed")
	l.ready("west/hansed", l.cluster("west").Admin)
	l.known("west", "east")
}

func deref(f *float64) float64 {
	if f == nil {
		return -1
	}
	return *f
}
