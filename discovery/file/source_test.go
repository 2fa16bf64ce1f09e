package file

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/hanse-mesh/hanse/discovery/objects"
)

func service(name string, port int) string {
	return fmt.Sprintf("apiVersion: v1\nkind: Service\nmetadata: {name: %s, namespace: shop}\nspec: {ports: [{port: %d}]}\n---\n", name, port)
}

// dir is a directory under test with a Source that runs on it.
type dir struct {
	*testing.T
	path    string
	source  *Source
	metrics *prometheus.Registry
	log     *syncBuffer
}

type syncBuffer struct {
	mu sync.Mutex
	bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.Buffer.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.Buffer.String()
}

// start runs a Source. A rescan of an hour leaves all to events.
func start(t *testing.T, path string, rescan time.Duration) *dir {
	t.Helper()
	d := &dir{T: t, path: path, log: &syncBuffer{}, metrics: prometheus.NewRegistry()}
	d.source = New(Config{Dir: path, Log: slog.New(slog.NewTextHandler(d.log, nil)), Registerer: d.metrics,
		Debounce: 5 * time.Millisecond, Rescan: rescan})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- d.source.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return d
}

func (d *dir) write(name, text string) {
	d.Helper()
	path := filepath.Join(d.path, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		d.Fatal(err)
	}
	if err := os.WriteFile(path+".tmp", []byte(text), 0o644); err != nil {
		d.Fatal(err)
	}
	if err := os.Rename(path+".tmp", path); err != nil {
		d.Fatal(err)
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// state is "name:port …" of the Services in force, and then the faults.
func (d *dir) state() string {
	var out []string
	for _, o := range d.source.Set().List("Service", "") {
		text, _ := o.MarshalJSON()
		_, after, _ := strings.Cut(string(text), `"port":`)
		port, _, _ := strings.Cut(after, ",")
		out = append(out, o.Value.GetName()+":"+port)
	}
	for _, f := range d.source.Faults() {
		out = append(out, "fault:"+filepath.Base(f.File))
	}
	return strings.Join(out, " ")
}

// until waits for a state, woken by Updated.
func (d *dir) until(want string) {
	d.Helper()
	limit := time.After(10 * time.Second)
	for d.state() != want || !d.source.Complete() {
		select {
		case <-d.source.Updated():
		case <-limit:
			d.Fatalf("state is %q (complete: %v), want %q; log:\n%s", d.state(), d.source.Complete(), want, d.log)
		}
	}
}

func TestFollowsChanges(t *testing.T) {
	d := start(t, t.TempDir(), time.Hour)
	d.until("")
	d.write("a.yaml", service("a", 1))
	d.until("a:1")
	d.write("deep/er/b.json", `{"apiVersion": "v1", "kind": "Service", "metadata": {"name": "b"}, "spec": {"ports": [{"port": 2, "targetPort": 1}]}}`)
	d.until("b:2 a:1")                                                                      // namespace default sorts first
	check(t, os.WriteFile(filepath.Join(d.path, "a.yaml"), []byte(service("a", 3)), 0o644)) // in place
	d.until("b:2 a:3")
	check(t, os.Rename(filepath.Join(d.path, "a.yaml"), filepath.Join(d.path, "c.yml")))
	d.write("d.yaml", service("d", 4))
	d.until("b:2 a:3 d:4")
	check(t, os.RemoveAll(filepath.Join(d.path, "deep")))
	d.until("a:3 d:4")
	families, err := d.metrics.Gather()
	check(t, err)
	for _, f := range families {
		if got := f.GetMetric()[0].GetGauge().GetValue(); f.GetName() == "hanse_file_objects" && got != 2 {
			t.Errorf("hanse_file_objects is %v", got)
		}
	}
}

func TestIgnoresTemporaryFiles(t *testing.T) {
	d := start(t, t.TempDir(), time.Hour)
	for _, n := range []string{".a.yaml.swp", ".hidden.yaml", "a.yaml~", "a.yaml.tmp", "README.md", ".git/x.yaml"} {
		check(t, os.MkdirAll(filepath.Dir(filepath.Join(d.path, n)), 0o755))
		check(t, os.WriteFile(filepath.Join(d.path, n), []byte("not: ours"), 0o644))
	}
	d.write("z.yaml", service("z", 1))
	d.until("z:1")
}

func TestLastGoodVersionStays(t *testing.T) {
	d := start(t, t.TempDir(), time.Hour)
	d.write("a.yaml", service("a", 1)+service("b", 1))
	d.write("c.yaml", service("c", 1))
	d.until("a:1 b:1 c:1")
	d.write("a.yaml", service("a", 2)+service("b", 99999)) // a file takes effect whole or not at all
	d.until("a:1 b:1 c:1 fault:a.yaml")
	d.write("c.yaml", service("c", 2)) // others go on
	d.until("a:1 b:1 c:2 fault:a.yaml")
	d.write("a.yaml", "") // emptied, as by a full disk
	for !strings.Contains(d.source.Faults()[0].Reason, "is empty; its last good version stays") {
		<-d.source.Updated()
	}
	d.until("a:1 b:1 c:2 fault:a.yaml")
	d.write("a.yaml", service("a", 2))
	d.until("a:2 c:2")
	d.write("bad.yaml", "a: [")
	d.until("a:2 c:2 fault:bad.yaml")
	check(t, os.Remove(filepath.Join(d.path, "bad.yaml")))
	d.until("a:2 c:2")
	if n := strings.Count(d.log.String(), "value=99999"); n != 1 {
		t.Errorf("the fault was logged %d times", n)
	}
}

func TestAFaultyFileDoesNotHoldUpTheFirstLoad(t *testing.T) {
	path := t.TempDir()
	check(t, os.WriteFile(filepath.Join(path, "a.yaml"), []byte("kind: ["), 0o644))
	check(t, os.WriteFile(filepath.Join(path, "b.yaml"), []byte(service("b", 1)), 0o644))
	start(t, path, time.Hour).until("b:1 fault:a.yaml")
}

func TestUnreadableFileKeepsLastGood(t *testing.T) {
	d := start(t, t.TempDir(), time.Hour)
	d.write("a.yaml", service("a", 1))
	d.until("a:1")
	check(t, os.Remove(filepath.Join(d.path, "a.yaml")))
	check(t, os.Mkdir(filepath.Join(d.path, "target"), 0o755))
	check(t, os.Symlink("target", filepath.Join(d.path, "a.yaml"))) // not a regular file, whoever runs the test
	d.until("a:1 fault:a.yaml")
	check(t, os.Remove(filepath.Join(d.path, "a.yaml")))
	d.write("a.yaml", service("a", 2))
	d.until("a:2")
}

func TestDuplicateNamesBothFiles(t *testing.T) {
	d := start(t, t.TempDir(), time.Hour)
	d.write("m.yaml", service("a", 1))
	d.until("a:1")
	d.write("b.yaml", service("a", 2)+service("b", 2)) // sorts first, but what is in force stays
	d.until("a:1 fault:b.yaml")
	if got := d.source.Faults()[0].Error(); !strings.Contains(got, "b.yaml:1: Service shop/a") || !strings.Contains(got, "m.yaml on line 1") {
		t.Error(got)
	}
	check(t, os.Remove(filepath.Join(d.path, "m.yaml"))) // and is taken over when it goes
	d.until("a:2 b:2")
}

// accept is decided by content alone, whatever the order of events.
func TestObjectsMoveBetweenFiles(t *testing.T) {
	path := t.TempDir()
	s := New(Config{Dir: path, Log: slog.New(slog.DiscardHandler)})
	put := func(name string, texts ...string) {
		t.Helper()
		check(t, os.WriteFile(filepath.Join(path, name), []byte(strings.Join(texts, "")), 0o644))
	}
	scan := func() string {
		t.Helper()
		for _, e := range must(os.ReadDir(path)) {
			s.read(filepath.Join(path, e.Name()))
		}
		s.accept()
		s.publish(nil, true)
		return (&dir{T: t, source: s}).state()
	}
	put("a.yaml", service("x", 1), service("y", 1))
	put("b.yaml", service("z", 1))
	if got := scan(); got != "x:1 y:1 z:1" {
		t.Fatal(got)
	}
	// y moves from a to b in one scan.
	put("a.yaml", service("x", 1))
	put("b.yaml", service("z", 1), service("y", 2))
	if got := scan(); got != "x:1 y:2 z:1" {
		t.Error(got)
	}
	// They swap, but b has a fault: a may not take what b still holds.
	put("a.yaml", service("y", 3), service("z", 3))
	put("b.yaml", service("x", 3), "kind: [")
	if got := scan(); got != "x:1 y:2 z:1 fault:a.yaml fault:a.yaml fault:b.yaml" {
		t.Error(got)
	}
	put("b.yaml", service("x", 4))
	if got := scan(); got != "x:4 y:3 z:3" {
		t.Error(got)
	}
	// Two new files with one object: the first by name.
	put("d.yaml", service("n", 2))
	put("c.yaml", service("n", 1))
	if got := scan(); got != "n:1 x:4 y:3 z:3 fault:d.yaml" {
		t.Error(got)
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// As the kubelet updates a mounted ConfigMap: files are links through ..data, which is swapped.
func TestConfigMapSwap(t *testing.T) {
	path := t.TempDir()
	version := func(n, port int) {
		data := fmt.Sprintf("..2026_%d", n)
		check(t, os.Mkdir(filepath.Join(path, data), 0o755))
		check(t, os.WriteFile(filepath.Join(path, data, "a.yaml"), []byte(service("a", port)), 0o644))
		check(t, os.Symlink(data, filepath.Join(path, "..data_tmp")))
		check(t, os.Rename(filepath.Join(path, "..data_tmp"), filepath.Join(path, "..data")))
	}
	version(1, 1)
	check(t, os.Symlink("..data/a.yaml", filepath.Join(path, "a.yaml")))
	d := start(t, path, time.Hour)
	d.until("a:1")
	version(2, 2)
	check(t, os.RemoveAll(filepath.Join(path, "..2026_1")))
	d.until("a:2")
}

// The directory itself is a link that is swapped, as by a release tool.
func TestDirectorySwap(t *testing.T) {
	base := t.TempDir()
	for i, v := range []string{"v1", "v2"} {
		check(t, os.Mkdir(filepath.Join(base, v), 0o755))
		check(t, os.WriteFile(filepath.Join(base, v, "a.yaml"), []byte(service("a", i+1)), 0o644))
	}
	link := filepath.Join(base, "current")
	check(t, os.Symlink("v1", link))
	d := start(t, link, time.Hour)
	d.until("a:1")
	check(t, os.Symlink("v2", link+".next"))
	check(t, os.Rename(link+".next", link))
	d.until("a:2")
	d.write("a.yaml", service("a", 3)) // and the new one is watched
	d.until("a:3")
}

func TestVanishedDirectoryKeepsLastGood(t *testing.T) {
	path := filepath.Join(t.TempDir(), "conf")
	check(t, os.Mkdir(path, 0o755))
	d := start(t, path, 20*time.Millisecond)
	d.write("a.yaml", service("a", 1))
	d.until("a:1")
	check(t, os.Rename(path, path+".away"))
	d.until("a:1 fault:conf")
	check(t, os.Rename(path+".away", path))
	d.until("a:1")
	d.write("a.yaml", service("a", 2))
	d.until("a:2")
}

func TestMissingDirectoryIsWaitedFor(t *testing.T) {
	path := filepath.Join(t.TempDir(), "later")
	d := start(t, path, 20*time.Millisecond)
	for len(d.source.Faults()) == 0 {
		<-d.source.Updated()
	}
	if d.source.Complete() {
		t.Error("complete without a directory")
	}
	d.write("a.yaml", service("a", 1))
	d.until("a:1")
}

// An unchanged directory publishes nothing, and what did not change is the same object.
func TestQuietWhenNothingChanges(t *testing.T) {
	d := start(t, t.TempDir(), 5*time.Millisecond)
	d.write("a.yaml", service("a", 1))
	d.write("b.yaml", service("b", 1))
	d.until("a:1 b:1")
	before := d.source.Set()
	for range 20 { // rescans meanwhile
		d.write("ignored.txt", "x")
	}
	if d.source.Set() != before {
		t.Error("another Set without a change")
	}
	d.write("b.yaml", service("b", 2))
	d.until("a:1 b:2")
	key := objects.Key{Kind: "Service", Namespace: "shop", Name: "a"}
	x, _ := before.Get(key)
	y, _ := d.source.Set().Get(key)
	if x.Value != y.Value {
		t.Error("an unchanged file was decoded again")
	}
}

// A steady stream of changes is read in between.
func TestSteadyChangesDoNotStarve(t *testing.T) {
	d := start(t, t.TempDir(), time.Hour)
	d.until("")
	stop := make(chan struct{})
	var writer sync.WaitGroup
	writer.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			case <-time.After(time.Millisecond):
				os.WriteFile(filepath.Join(d.path, "noise.yaml"), []byte(strings.Repeat("#\n", i%7)), 0o644)
			}
		}
	})
	defer writer.Wait()
	defer close(stop)
	d.write("a.yaml", service("a", 1))
	limit := time.After(10 * time.Second)
	for !slices.Contains(strings.Fields(d.state()), "a:1") {
		select {
		case <-d.source.Updated():
		case <-limit:
			t.Fatalf("starved: %s", d.state())
		}
	}
}
