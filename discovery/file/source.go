package file

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/hanse-mesh/hanse/discovery/objects"
)

// maxFiles bounds the files of one directory.
const maxFiles = 20_000

// Config of a Source.
type Config struct {
	Dir        string
	Log        *slog.Logger
	Registerer prometheus.Registerer
	Debounce   time.Duration // quiet time after a change before it is read; 0 is 100 ms
	Rescan     time.Duration // between scans without an event; 0 is 30 s
}

// Source reads one directory.
type Source struct {
	cfg     Config        // read-only after New
	updated chan struct{} // size 1
	current atomic.Pointer[published]

	files    map[string]*fileState // owned by Run; by path
	reported map[string]bool       // owned by Run; faults already logged

	objectCount prometheus.Gauge
	faultCount  prometheus.Gauge
	scans       *prometheus.CounterVec
}

// published is what readers see. It is immutable.
type published struct {
	set      *objects.Set
	faults   []*objects.Fault
	complete bool
}

// fileState is what is known of one file.
type fileState struct {
	sum       [sha256.Size]byte // of candidate's bytes
	good      []objects.Object  // in force
	candidate []objects.Object  // last that decoded; not in force while it defines what another file does
	pending   bool              // candidate is not in force
	faults    []*objects.Fault  // of the newest bytes
}

// New returns a Source that has read nothing.
func New(cfg Config) *Source {
	cfg.Debounce = cmp.Or(cfg.Debounce, 100*time.Millisecond)
	cfg.Rescan = cmp.Or(cfg.Rescan, 30*time.Second)
	cfg.Dir = filepath.Clean(cfg.Dir)
	cfg.Log = cfg.Log.With("directory", cfg.Dir)
	s := &Source{
		cfg:      cfg,
		updated:  make(chan struct{}, 1),
		files:    map[string]*fileState{},
		reported: map[string]bool{},
		objectCount: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "hanse_file_objects", Help: "Objects in force from the configuration directory."}),
		faultCount: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "hanse_file_faults", Help: "Faults in the configuration directory's files; their last good versions are in force."}),
		scans: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hanse_file_scans_total", Help: "Scans of the configuration directory."}, []string{"result"}),
	}
	if cfg.Registerer != nil {
		cfg.Registerer.MustRegister(s.objectCount, s.faultCount, s.scans)
	}
	s.current.Store(&published{set: objects.NewSet()})
	return s
}

// Set returns the objects in force. It is empty until the directory has been read once.
func (s *Source) Set() *objects.Set { return s.current.Load().set }

// Complete reports whether the whole directory has been read at least once.
func (s *Source) Complete() bool { return s.current.Load().complete }

// Faults returns what is wrong with the directory now, sorted by file and line.
func (s *Source) Faults() []*objects.Fault { return s.current.Load().faults }

// Updated is signalled after Set, Complete or Faults changed.
func (s *Source) Updated() <-chan struct{} { return s.updated }

// Run reads the directory until ctx ends, and returns nil then. A directory that is missing is waited for.
func (s *Source) Run(ctx context.Context) error {
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watch %s: %w", s.cfg.Dir, err)
	}
	defer watcher.Close()

	rescan := time.NewTicker(s.cfg.Rescan)
	defer rescan.Stop()
	quiet := time.NewTimer(0)
	defer quiet.Stop()
	var since time.Time // of the first change that was not read yet
	changed := func() {
		if since.IsZero() {
			since = time.Now()
		}
		quiet.Reset(min(s.cfg.Debounce, time.Until(since.Add(maxDebounces*s.cfg.Debounce))))
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case e, ok := <-watcher.Events:
			if !ok {
				return fmt.Errorf("watch %s: closed", s.cfg.Dir)
			}
			if s.concerns(e.Name) {
				changed()
			}
			continue
		case err := <-watcher.Errors:
			s.cfg.Log.Warn("watching the configuration directory; reading it again", "error", err)
			changed()
			continue
		case <-quiet.C:
		case <-rescan.C:
		}
		since = time.Time{}
		if again := s.scan(watcher); again {
			quiet.Reset(max(s.cfg.Debounce, min(time.Second, s.cfg.Rescan)))
		}
	}
}

// maxDebounces is how many times Debounce a change waits at most while others follow it.
const maxDebounces = 10

// concerns reports whether an event at path may change what a scan finds.
func (s *Source) concerns(path string) bool {
	if filepath.Dir(path) == filepath.Dir(s.cfg.Dir) && path != s.cfg.Dir {
		return false // beside the directory, which is watched for a swapped link
	}
	name := filepath.Base(path)
	return !ignored(name) || strings.HasPrefix(name, "..") // a ConfigMap's ..data is swapped
}

// scan reads the directory once and publishes what changed. It reports whether to look again soon: the directory is not
// readable, or a file was being written.
func (s *Source) scan(watcher *fsnotify.Watcher) (again bool) {
	paths, err := s.list(watcher)
	if err != nil {
		s.scans.WithLabelValues("error").Inc()
		reason := fmt.Sprintf("cannot be read: %s; the last good state stays in force", cause(err))
		s.publish([]*objects.Fault{{File: s.cfg.Dir, Reason: reason}}, s.Complete())
		return true
	}
	listed := make(map[string]bool, len(paths))
	for _, path := range paths {
		listed[path] = true
		if s.read(path) {
			again = true
		}
	}
	maps.DeleteFunc(s.files, func(path string, _ *fileState) bool { return !listed[path] })
	s.accept()
	s.scans.WithLabelValues("ok").Inc()
	s.publish(nil, s.Complete() || !again)
	return again
}

// list returns the files to read, sorted, and watches their directories.
func (s *Source) list(watcher *fsnotify.Watcher) ([]string, error) {
	root, err := filepath.EvalSymlinks(s.cfg.Dir)
	if err != nil {
		return nil, err
	}
	watched := map[string]bool{}
	watch := func(dir string) error {
		watched[dir] = true
		return watcher.Add(dir) // again is harmless
	}
	if root != s.cfg.Dir {
		if err := watch(filepath.Dir(s.cfg.Dir)); err != nil {
			return nil, err
		}
	}
	defer func() {
		for _, dir := range watcher.WatchList() {
			if !watched[dir] {
				watcher.Remove(dir) // an error says that it is not watched any more
			}
		}
	}()
	var paths []string
	err = filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case path != root && ignored(e.Name()):
			if e.IsDir() {
				return filepath.SkipDir
			}
			return nil
		case e.IsDir():
			return watch(path)
		}
		if ext := filepath.Ext(path); ext != ".yaml" && ext != ".yml" && ext != ".json" {
			return nil
		}
		if len(paths) == maxFiles {
			return fmt.Errorf("more than %d files", maxFiles)
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		paths = append(paths, filepath.Join(s.cfg.Dir, rel))
		return nil
	})
	return paths, err
}

func ignored(name string) bool {
	return strings.HasPrefix(name, ".") || strings.HasSuffix(name, "~") || strings.HasSuffix(name, ".tmp")
}

// cause returns an error without the path, which the fault names already.
func cause(err error) error {
	var p *fs.PathError
	if errors.As(err, &p) {
		return p.Err
	}
	return err
}

// read decodes a file if its bytes changed. It reports whether the file was being written while it was read.
func (s *Source) read(path string) (again bool) {
	f := s.files[path]
	if f == nil {
		f = &fileState{}
		s.files[path] = f
	}
	unreadable := func(reason string) {
		f.sum = [sha256.Size]byte{}
		f.faults = []*objects.Fault{{File: path, Reason: reason}}
		f.candidate, f.pending = nil, false
	}
	data, stable, err := readStable(path)
	switch {
	case errors.Is(err, fs.ErrNotExist): // gone since it was listed
		delete(s.files, path)
		return true
	case err != nil:
		unreadable(fmt.Sprintf("cannot be read: %s", cause(err)))
		return false
	case !stable:
		return true
	}
	sum := sha256.Sum256(data)
	if sum == f.sum {
		return false
	}
	if len(bytes.TrimSpace(data)) == 0 && len(f.good) > 0 {
		unreadable("is empty; its last good version stays in force. To remove its objects, remove the file")
		return false
	}
	candidate, err := objects.Decode(data, path)
	f.sum, f.faults = sum, objects.Faults(err)
	f.candidate, f.pending = nil, err == nil
	if f.pending {
		f.candidate = candidate
	}
	return false
}

// readStable reads a regular file and reports whether it stayed the same meanwhile.
func readStable(path string) (data []byte, stable bool, err error) {
	before, err := os.Stat(path)
	if err != nil {
		return nil, false, err
	}
	if !before.Mode().IsRegular() {
		return nil, false, errors.New("not a regular file")
	}
	if before.Size() > objects.MaxFileBytes {
		return nil, false, fmt.Errorf("%d MiB, more than %d MiB; split it (an EndpointSlice holds at most %d endpoints, and a Service may have many slices)",
			before.Size()>>20, objects.MaxFileBytes>>20, objects.MaxEndpoints)
	}
	if data, err = os.ReadFile(path); err != nil {
		return nil, false, err
	}
	after, err := os.Stat(path)
	if err != nil {
		return nil, false, err
	}
	return data, os.SameFile(before, after) && before.ModTime().Equal(after.ModTime()) && after.Size() == int64(len(data)), nil
}

// accept puts the pending candidates in force, together, except where two files define one object: then what is in force
// stays, and of two new files the first by name counts.
func (s *Source) accept() {
	names := slices.Sorted(maps.Keys(s.files))
	pending := map[string]bool{}
	for _, n := range names {
		if f := s.files[n]; f.pending {
			pending[n] = true
			f.faults = nil
		}
	}
	for {
		rejected := s.firstConflict(names, pending)
		if rejected == "" {
			break
		}
		delete(pending, rejected)
	}
	for n := range pending {
		f := s.files[n]
		f.good, f.candidate, f.pending = f.candidate, nil, false
	}
}

// firstConflict notes the faults of, and returns, a pending file that defines an object which another file defines too.
func (s *Source) firstConflict(names []string, pending map[string]bool) string {
	owner := map[objects.Key]objects.Object{}
	for _, fixed := range []bool{true, false} {
		for _, n := range names {
			if pending[n] == fixed {
				continue
			}
			f := s.files[n]
			content := f.good
			if pending[n] {
				content = f.candidate
			}
			var faults []*objects.Fault
			for _, o := range content {
				if was, dup := owner[o.Key()]; dup {
					faults = append(faults, objects.Duplicate(o, was))
					continue
				}
				owner[o.Key()] = o
			}
			if len(faults) > 0 && pending[n] {
				f.faults = faults
				return n
			}
		}
	}
	return ""
}

// publish shows the state to readers, if it differs from what they see.
func (s *Source) publish(faults []*objects.Fault, complete bool) {
	var all []objects.Object
	for _, n := range slices.Sorted(maps.Keys(s.files)) {
		all = append(all, s.files[n].good...)
		faults = append(faults, s.files[n].faults...)
	}
	was := s.current.Load()
	next := &published{set: was.set, faults: faults, complete: complete}
	if !sameObjects(was.set, all) {
		next.set = objects.NewSet(all...)
	}
	s.log(faults)
	s.objectCount.Set(float64(next.set.Len()))
	s.faultCount.Set(float64(len(faults)))
	if next.set == was.set && next.complete == was.complete && sameFaults(next.faults, was.faults) {
		return
	}
	if next.set != was.set {
		s.cfg.Log.Info("configuration directory read", "objects", next.set.Len(), "faults", len(faults))
	}
	s.current.Store(next)
	select {
	case s.updated <- struct{}{}:
	default:
	}
}

// sameObjects reports whether set holds exactly the objects of all, by identity.
func sameObjects(set *objects.Set, all []objects.Object) bool {
	if set.Len() != len(all) {
		return false
	}
	for _, o := range all {
		if was, ok := set.Get(o.Key()); !ok || was.Value != o.Value {
			return false
		}
	}
	return true
}

func sameFaults(a, b []*objects.Fault) bool {
	return slices.EqualFunc(a, b, func(x, y *objects.Fault) bool { return *x == *y })
}

// log warns once of each fault, until it is gone and comes back.
func (s *Source) log(faults []*objects.Fault) {
	now := make(map[string]bool, len(faults))
	for _, f := range faults {
		text := f.Error()
		now[text] = true
		if !s.reported[text] {
			s.cfg.Log.Warn("fault in the configuration directory; the last good version stays in force",
				"file", f.File, "line", f.Line, "object", f.Object, "field", f.Field, "value", f.Value, "reason", f.Reason)
		}
	}
	s.reported = now
}
