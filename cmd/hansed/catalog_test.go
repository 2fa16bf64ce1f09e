package main

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hanse-mesh/hanse/cmd/internal/admin"
	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/discovery/file"
	"github.com/hanse-mesh/hanse/federation/etcd"
	"github.com/hanse-mesh/hanse/federation/storetest"
)

const paymentsYAML = `
apiVersion: v1
kind: Service
metadata: {namespace: shop, name: payments}
spec:
  ports: [{name: http, port: 8080}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  namespace: shop
  name: payments-1
  labels: {kubernetes.io/service-name: payments}
addressType: IPv4
endpoints: [{addresses: [127.0.1.11], zone: eu-1a}]
ports: [{name: http, port: 8080}]
`

// start runs a catalog over store until the test ends, and returns it with a function that waits for a Snapshot.
func start(t *testing.T, store etcd.Store, dir, stateFile string) (*catalog, func(what string, ok func(*discovery.Snapshot) bool) *discovery.Snapshot) {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	var files *file.Source
	var sources []objectSource
	if dir != "" {
		files = file.New(file.Config{Dir: dir, Log: log, Debounce: time.Millisecond})
		sources = append(sources, files)
	}
	snaps := make(chan *discovery.Snapshot, 100)
	c := newCatalog(discovery.Self{Cluster: "west", TrustDomain: "west.demo", Network: "west"}, recordsOf(store, "config/"), sources, &fileMemory{path: stateFile}, log,
		func(s *discovery.Snapshot) { snaps <- s })
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	if files != nil {
		wg.Go(func() { _ = files.Run(ctx) })
	}
	wg.Go(func() {
		if err := c.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { cancel(); wg.Wait() })
	return c, func(what string, ok func(*discovery.Snapshot) bool) *discovery.Snapshot {
		t.Helper()
		deadline := time.After(10 * time.Second)
		for {
			select {
			case s := <-snaps:
				if ok(s) {
					return s
				}
			case <-deadline:
				t.Fatalf("no Snapshot with %s", what)
			}
		}
	}
}

func payments(s *discovery.Snapshot) *discovery.Service {
	return s.Services.Get(discovery.Name{Namespace: "shop", Name: "payments"})
}

func TestApplyIsAllOrNothingAndOutlivesARestart(t *testing.T) {
	ctx := context.Background()
	store := storetest.NewMemory(1)
	stateFile := filepath.Join(t.TempDir(), "ids.json")
	c, wait := start(t, store, "", stateFile)
	wait("nothing", func(s *discovery.Snapshot) bool { return s.Complete && payments(s) == nil })

	bad := paymentsYAML + "---\napiVersion: v1\nkind: Service\nmetadata: {namespace: shop, name: broken}\nspec: {ports: [{name: http, port: 70000}]}\n"
	_, err := c.Apply(ctx, []byte(bad), false)
	var refused *admin.Error
	if !errors.As(err, &refused) || len(refused.Faults) == 0 || !strings.Contains(refused.Faults[0].Field, "port") || refused.Hint == "" {
		t.Fatalf("a bad port was answered with %v, %+v", err, refused)
	}
	if objs, _ := c.List("", "", ""); len(objs) != 0 {
		t.Errorf("half of a refused apply is in force: %v", objs)
	}
	if got, err := c.Apply(ctx, []byte(paymentsYAML), true); err != nil || got[0].Action != "created" {
		t.Errorf("dry run: %v, %v", got, err)
	}
	if objs, _ := c.List("", "", ""); len(objs) != 0 {
		t.Errorf("a dry run changed something: %v", objs)
	}
	if _, err := c.Apply(ctx, []byte(paymentsYAML), false); err != nil {
		t.Fatal(err)
	}
	before := wait("payments", func(s *discovery.Snapshot) bool { return payments(s) != nil && len(payments(s).Endpoints) == 1 })
	if got, err := c.Apply(ctx, []byte(paymentsYAML), false); err != nil || got[0].Action != "unchanged" || got[1].Action != "unchanged" {
		t.Errorf("the same again: %v, %v", got, err)
	}

	_, wait2 := start(t, store, "", stateFile)
	after := wait2("payments", func(s *discovery.Snapshot) bool { return payments(s) != nil })
	if payments(after).Endpoints[0].ID != payments(before).Endpoints[0].ID {
		t.Error("a restart gave the endpoint another ID")
	}

	if _, err := c.Delete(ctx, "svc", "shop", "payments"); err != nil {
		t.Fatal(err)
	}
	wait("no payments", func(s *discovery.Snapshot) bool { return payments(s) == nil })
	if _, err := c.Delete(ctx, "svc", "shop", "payments"); !errors.As(err, &refused) || refused.Status != 404 {
		t.Errorf("deleting what is gone: %v", err)
	}
	if _, err := c.Delete(ctx, "gizmo", "shop", "payments"); !errors.As(err, &refused) || !strings.Contains(refused.Hint, "services") {
		t.Errorf("an unknown kind: %v", err)
	}
}

func TestFilesAndAppliedDoNotHideEachOther(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "payments.yaml"), []byte(paymentsYAML), 0o600); err != nil {
		t.Fatal(err)
	}
	c, wait := start(t, storetest.NewMemory(1), dir, filepath.Join(t.TempDir(), "ids.json"))
	wait("payments", func(s *discovery.Snapshot) bool { return payments(s) != nil })
	_, err := c.Apply(ctx, []byte(paymentsYAML), false)
	var refused *admin.Error
	if !errors.As(err, &refused) || refused.Status != 409 || !strings.Contains(refused.Message, "payments.yaml") {
		t.Errorf("applying what a file holds: %v", err)
	}

	// A file that breaks keeps its last good version in force, and is named.
	broken := filepath.Join(dir, "payments.yaml.tmp") // moved into place: while it is being written it would be an empty one
	if err := os.WriteFile(broken, []byte("apiVersion: v1\nkind: Service\nmetadata: {name: [}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(broken, filepath.Join(dir, "payments.yaml")); err != nil {
		t.Fatal(err)
	}
	s := wait("payments from the last good file", func(s *discovery.Snapshot) bool { return len(c.Faults()) > 0 })
	if payments(s) == nil {
		t.Error("a broken file took its objects with it")
	}
	if f := c.Faults()[0]; !strings.Contains(f.File, "payments.yaml") || f.Line == 0 {
		t.Errorf("the fault does not say where: %+v", f)
	}
}

// A Drill in the configuration does nothing, and that is said; the rest is in force.
func TestADrillIsNoConfiguration(t *testing.T) {
	const drill = "apiVersion: hanse.mesh/v1alpha1\nkind: Drill\nmetadata: {name: d}\nspec: {mode: drain, scope: {cluster: west}}\n"
	dir := t.TempDir()
	for name, text := range map[string]string{"payments.yaml": paymentsYAML, "game-day.yaml": drill} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c, wait := start(t, storetest.NewMemory(1), dir, filepath.Join(t.TempDir(), "ids.json"))
	wait("payments", func(s *discovery.Snapshot) bool { return payments(s) != nil })
	if f := c.Faults(); len(f) != 1 || !strings.HasSuffix(f[0].File, "game-day.yaml") || f[0].Object != "Drill d" || f[0].Field != "kind" || !strings.Contains(f[0].Reason, "hanse drill run -f") {
		t.Errorf("a Drill in the directory: %+v", f)
	}
	var refused *admin.Error
	if _, err := c.Apply(context.Background(), []byte(strings.Replace(drill, "name: d", "name: e", 1)), false); !errors.As(err, &refused) || len(refused.Faults) != 1 || !strings.Contains(refused.Faults[0].Reason, "hanse drill run -f") {
		t.Errorf("applying a Drill: %v", err)
	}
}
