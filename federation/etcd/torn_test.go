package etcd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.etcd.io/etcd/server/v3/storage/wal"
	"go.etcd.io/etcd/server/v3/storage/wal/walpb"
	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"
)

// save is what etcd saves, and syncs, at once: entries of these bodies, and then that the entries before them are committed.
func save(t testing.TB, w *wal.WAL, index *uint64, bodies ...[]byte) {
	t.Helper()
	state := &raftpb.HardState{Term: new(uint64(1)), Vote: new(uint64(1)), Commit: new(*index)}
	var entries []*raftpb.Entry
	for _, b := range bodies {
		*index++
		entries = append(entries, &raftpb.Entry{Term: new(uint64(1)), Index: new(*index), Data: b})
	}
	if err := w.Save(state, entries); err != nil {
		t.Fatal(err)
	}
}

const told = 4 // entries of realLog that were acknowledged

// realLog has etcd write a log of a few batches of which the last may be torn. It returns its one segment, without the space that is kept for
// more, and where each record begins, the end being the last.
func realLog(t testing.TB, last ...[]byte) (segment []byte, at []int64) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "wal")
	w, err := wal.Create(zap.NewNop(), dir, []byte("member"))
	if err != nil {
		t.Fatal(err)
	}
	index := uint64(0)
	for i := range told / 2 {
		save(t, w, &index, noise(20+100*i), noise(700))
	}
	save(t, w, &index, last...)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(onlySegment(t, dir))
	if err != nil {
		t.Fatal(err)
	}
	at = offsets(b)
	return b[:at[len(at)-1]:at[len(at)-1]], at
}

func offsets(segment []byte) []int64 {
	d := wal.NewDecoder(segmentReader{io.NewSectionReader(bytes.NewReader(segment), 0, int64(len(segment))), "x"})
	at := []int64{0}
	for rec := new(walpb.Record); d.Decode(rec) == nil; at = append(at, d.LastOffset()) {
		if rec.GetType() == wal.CrcType {
			d.UpdateCRC(rec.GetCrc())
		}
	}
	return at
}

// noise has no byte that is zero.
func noise(n int) []byte {
	r := rand.New(rand.NewPCG(1, uint64(n)))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(1 + r.IntN(255))
	}
	return b
}

func onlySegment(t testing.TB, dir string) string {
	t.Helper()
	segments, _, err := logFiles(dir)
	if err != nil || len(segments) != 1 {
		t.Fatalf("segments %v, %v", segments, err)
	}
	return segments[0]
}

func scan(segment []byte) (logScan, error) {
	s := logScan{}
	err := s.read(bytes.NewReader(segment), int64(len(segment)), "x", true)
	return s, err
}

// asFile makes a directory of one segment.
func asFile(t testing.TB, segment []byte) (dir, path string) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "wal")
	path = filepath.Join(dir, "0000000000000000-0000000000000000.wal")
	if err := errors.Join(os.Mkdir(dir, 0o700), os.WriteFile(path, segment, 0o600)); err != nil {
		t.Fatal(err)
	}
	return dir, path
}

// opens has the log mended, and etcd read it, write to it and read it again.
func opens(t testing.TB, segment []byte, entries int) {
	t.Helper()
	dir, path := asFile(t, segment)
	var out bytes.Buffer
	if err := mendLog(dir, uint64(entries), slog.New(slog.NewTextHandler(&out, nil))); err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(out.String(), "\n"); n > 1 || n == 1 && (!strings.Contains(out.String(), "offset=") || !strings.Contains(out.String(), path)) {
		t.Errorf("log: %s", &out)
	}
	for i := range 2 {
		w, err := wal.Open(zap.NewNop(), dir, &walpb.Snapshot{})
		if err != nil {
			t.Fatal(err)
		}
		_, state, got, err := w.ReadAll()
		if err != nil || len(got) != entries+i {
			t.Fatalf("%d entries, want %d: %v", len(got), entries+i, err)
		}
		if i == 0 {
			index := uint64(len(got))
			if state.GetCommit() > index {
				t.Fatalf("committed %d of %d", state.GetCommit(), index)
			}
			save(t, w, &index, []byte("more"))
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestTornLog tears a log of etcd's at each byte of its last records, so that it ends there, or goes on with zeros.
func TestTornLog(t *testing.T) {
	t.Parallel()
	space := make([]byte, 8<<10)
	for name, last := range map[string][]byte{
		"short":            []byte("v"),
		"empty":            nil,
		"some sectors":     noise(1300),
		"zeros":            make([]byte, 1300),
		"ends with zeros":  append(noise(600), make([]byte, 900)...),
		"begins with them": append(make([]byte, 900), noise(600)...),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			whole, at := realLog(t, last)
			n := len(at)
			// the batch is an entry and a state; what is before it was acknowledged
			before, entry, end := at[n-3], at[n-2], at[n-1]
			for cut := before; cut <= end; cut++ {
				for _, after := range [][]byte{nil, space[:3], space} {
					torn := slices.Concat(whole[:cut], after)
					if len(after) == 3 && cut+3 > end {
						continue
					}
					s, err := scan(torn)
					if err != nil {
						t.Fatalf("torn at %d of %d…%d…%d, then %d zeros: %v", cut, before, entry, end, len(after), err)
					}
					entries := told
					switch {
					case s.end == before:
					case s.end == entry && len(bytes.TrimRight(whole[:entry], "\x00")) <= int(cut):
						entries = told + 1
					case s.end == end && len(bytes.TrimRight(whole, "\x00")) <= int(cut):
						entries = told + 1
					default:
						t.Fatalf("torn at %d of %d…%d…%d, then %d zeros: cut at %d", cut, before, entry, end, len(after), s.end)
					}
					if s.index != uint64(entries) {
						t.Fatalf("torn at %d: entry %d is the last", cut, s.index)
					}
					if rest := torn[s.end:]; (s.torn != nil) != (!zero(rest) || len(rest) > 0 && len(rest) < frameBytes) {
						t.Fatalf("torn at %d, then %d zeros: %d bytes cut off of %d", cut, len(after), len(s.torn), len(rest))
					}
					if (cut-before)%797 == 1 {
						opens(t, torn, entries)
					}
				}
			}
		})
	}
}

// TestTornLengths has any number for the length of the last record, and the record whole, torn, or not there.
func TestTornLengths(t *testing.T) {
	t.Parallel()
	body := append(noise(100), make([]byte, 50)...) // so the record looks like one that stopped
	b, at := realLog(t, body)
	binary.LittleEndian.PutUint64(b[at[len(at)-3]:], 1<<40)
	refused(t, "the last entry, which ends with zeros, is whole but for its length", b[:at[len(at)-2]])
	whole, at := realLog(t, noise(2000))
	before, entry := at[len(at)-3], at[len(at)-2]
	size := uint64(entry - before - frameBytes)
	for _, length := range []uint64{0, 1, 7, 8, 16, 100, size - 8, size - 1, size, size + 1, size + 8, 4096, 64_000_000, maxSegment + 8, 1 << 40, 1<<55 + 3,
		1<<56 - 1, 0x80 << 56, 0x80<<56 | size, 0x87<<56 | size, 0xff << 56, math.MaxInt64, math.MaxUint64} {
		for _, space := range []int{0, 100, 8 << 10} {
			put := func(until int64) []byte {
				b := slices.Concat(whole[:until], make([]byte, space))
				binary.LittleEndian.PutUint64(b[before:], length)
				return b
			}
			for _, until := range []int64{before + 8, before + 10, before + 600, entry - 300} {
				b := put(until)
				if s, err := scan(b); err != nil || s.end != before {
					t.Errorf("length %#x, torn after %d bytes, then %d zeros: cut at %d, not %d: %v", length, until-before, space, s.end, before, err)
					continue
				}
				if space > 100 && until == before+600 {
					opens(t, b, told)
				}
			}
			if b := put(entry); binary.LittleEndian.Uint64(whole[before:]) != length {
				if s, err := scan(b); err == nil {
					t.Errorf("length %#x of a record that is whole, then %d zeros: cut at %d", length, space, s.end)
				}
			}
		}
	}
}

func refused(t testing.TB, why string, segment []byte) {
	t.Helper()
	s, err := scan(segment)
	if err == nil {
		t.Errorf("%s: taken, and cut at %d of %d", why, s.end, len(segment))
	}
}

// TestDamagedLog damages what was acknowledged.
func TestDamagedLog(t *testing.T) {
	t.Parallel()
	whole, at := realLog(t, []byte("last"))
	spoil := func(at int64, with ...byte) []byte {
		b := slices.Concat(whole, make([]byte, 8<<10))
		copy(b[at:], with)
		return b
	}
	n := len(at)
	for i := range n - 3 { // before the last batch: an entry, a state
		for off := at[i]; off < at[i+1]; off++ {
			if size, _, _ := frame(whole[at[i]:]); off >= at[i]+frameBytes+int64(size) {
				break // padding
			}
			refused(t, fmt.Sprintf("record %d at %d…%d: byte %d inverted", i, at[i], at[i+1], off), spoil(off, ^whole[off]))
		}
		for _, length := range []uint64{0, 1, 8, 1 << 20, 1 << 40, math.MaxUint64} {
			refused(t, fmt.Sprintf("record %d has length %#x", i, length), spoil(at[i], binary.LittleEndian.AppendUint64(nil, length)...))
		}
	}
	for off := int64(0); off+sector <= at[n-3]; off += sector {
		refused(t, fmt.Sprintf("sector at %d is zero", off), spoil(off, make([]byte, sector)...))
	}
	b := spoil(at[n-2]-5, 'X') // in the last entry, whose body ends there
	refused(t, "the last entry is another", b)
	if s, err := scan(whole); err != nil || s.torn != nil || s.index != told+1 {
		t.Errorf("undamaged: %+v, %v", s, err)
	}
	dir, path := asFile(t, b)
	err := mendLog(dir, told, slog.New(slog.DiscardHandler))
	if err == nil || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), fmt.Sprint(at[n-3])) {
		t.Errorf("error %v does not say where", err)
	}
	unchanged(t, dir, map[string][]byte{filepath.Base(path): b})

	// torn, but the database knows that it had been whole
	torn := whole[:at[n-2]-5]
	dir, path = asFile(t, torn)
	if err := mendLog(dir, told+1, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), "entry 5 was acknowledged") {
		t.Errorf("what the database has is cut off the log: %v", err)
	}
	unchanged(t, dir, map[string][]byte{filepath.Base(path): torn})

	// what is cut off cannot be kept
	if err := os.Mkdir(path+brokenExt, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := mendLog(dir, told, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), path+brokenExt) {
		t.Errorf("cut, and not kept: %v", err)
	}
	if b, err := os.ReadFile(path); err != nil || !bytes.Equal(b, torn) {
		t.Errorf("the log was changed: %v", err)
	}
}

func unchanged(t testing.TB, dir string, want map[string][]byte) {
	t.Helper()
	files, err := os.ReadDir(dir)
	if err != nil || len(files) != len(want) {
		t.Errorf("%v in %s, want %v: %v", files, dir, slices.Collect(maps.Keys(want)), err)
	}
	for name, b := range want {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || !bytes.Equal(got, b) {
			t.Errorf("%s was changed: %v", name, err)
		}
	}
}

// TestTornByPower has sectors missing of a batch that was never synced, though others after them are there. TestDamagedLog has them missing of
// those that were.
func TestTornByPower(t *testing.T) {
	t.Parallel()
	whole, at := realLog(t, noise(3000), noise(40))
	n := len(at)
	before := at[n-4] // of the batch: two entries, a state
	for off := (before + sector) / sector * sector; off < at[n-1]; off += sector {
		b := slices.Concat(whole, make([]byte, 8<<10))
		clear(b[off : off+sector])
		s, err := scan(b)
		if err != nil || s.end != before && off < at[n-3] || s.torn == nil {
			t.Errorf("never synced, sector at %d is missing: cut at %d, not %d, %v", off, s.end, before, err)
			continue
		}
		opens(t, b, int(s.index))
	}
	b := slices.Concat(whole, make([]byte, 8<<10))
	clear(b[before:min(before+sector-before%sector, at[n-1])]) // the one that it begins in
	if s, err := scan(b); err != nil || s.end != before || s.torn == nil {
		t.Errorf("never synced, the first sector is missing: %+v, %v", s, err)
	} else {
		opens(t, b, told)
	}
}

// TestTornByPowerAnywhere is that with the batch at each place that it may have in its first sector: a record's length and head may end with a
// sector, and go on in one that is missing. Once the batch was acknowledged, the same is damage, also if one of its values looks like a record
// that reaches over all that follows.
func TestTornByPowerAnywhere(t *testing.T) {
	size := wal.SegmentSizeBytes
	wal.SegmentSizeBytes = 16 << 10 // not parallel: nobody else writes logs now
	defer func() { wal.SegmentSizeBytes = size }()
	write := func(t *testing.T, bodies ...[]byte) (segment []byte, at []int64) {
		t.Helper()
		dir := filepath.Join(t.TempDir(), "wal")
		w, err := wal.Create(zap.NewNop(), dir, []byte("member"))
		if err != nil {
			t.Fatal(err)
		}
		index := uint64(0)
		for _, b := range bodies { // each is a batch: its entry, and a state
			save(t, w, &index, b)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(onlySegment(t, dir))
		if err != nil {
			t.Fatal(err)
		}
		return b, offsets(b)
	}
	for pad := 0; pad < sector; pad += 8 {
		last := noise(1500)
		segment, at := write(t, noise(100+pad), last)
		before, end := at[len(at)-3], at[len(at)-1]
		missing := func(f func(off int64, b []byte)) {
			for off := before / sector * sector; off < end; off += sector {
				b := slices.Clone(segment)
				clear(b[max(off, before):min(off+sector, end)])
				f(off, b)
			}
		}
		missing(func(off int64, b []byte) {
			if s, err := scan(b); err != nil || s.index < 1 || s.end < before {
				t.Errorf("a batch at %d, never synced, sector at %d is missing: entry %d, cut at %d, %v", before, off, s.index, s.end, err)
			}
		})
		in := 700 - (bytes.Index(segment, last)+700)%8 // where a record may begin
		head := []byte{0x08, byte(wal.EntryType), 0x10, 1, 0x1a}
		head = binary.AppendUvarint(head, 4000-7)
		copy(last[in:], append(binary.LittleEndian.AppendUint64(nil, 4000), head...))
		segment, at = write(t, noise(100+pad), last, noise(300))
		before, end = at[len(at)-5], at[len(at)-3]
		missing(func(off int64, b []byte) {
			if s, err := scan(b); err == nil && s.index < 2 {
				t.Errorf("a batch at %d, acknowledged, sector at %d is missing: cut at %d", before, off, s.end)
			}
		})
	}
}

// TestDamagedSegments damages one that is not the last, and what etcd leaves of a segment that it was about to begin.
func TestDamagedSegments(t *testing.T) {
	size := wal.SegmentSizeBytes
	wal.SegmentSizeBytes = 4 << 10 // not parallel: nobody else writes logs now
	defer func() { wal.SegmentSizeBytes = size }()
	dir := filepath.Join(t.TempDir(), "wal")
	w, err := wal.Create(zap.NewNop(), dir, []byte("member"))
	if err != nil {
		t.Fatal(err)
	}
	index := uint64(0)
	for range 14 {
		save(t, w, &index, noise(1000))
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	segments, _, err := logFiles(dir)
	if err != nil || len(segments) < 3 {
		t.Fatalf("segments %v, %v", segments, err)
	}
	mend := func(spoil func(dir string, segment []string) error) (string, error) {
		t.Helper()
		broken := t.TempDir()
		if err := os.CopyFS(broken, os.DirFS(dir)); err != nil {
			t.Fatal(err)
		}
		var in []string
		for _, s := range segments {
			in = append(in, filepath.Join(broken, filepath.Base(s)))
		}
		if err := spoil(broken, in); err != nil {
			t.Fatal(err)
		}
		return broken, mendLog(broken, index, slog.New(slog.DiscardHandler))
	}
	cut := func(path string, n int64) error {
		info, err := os.Stat(path)
		if err != nil {
			return err
		}
		return os.Truncate(path, info.Size()-n)
	}
	for i := range len(segments) - 1 {
		for _, n := range []int64{1, 8, 100, 2000, 4100} {
			_, err := mend(func(_ string, segment []string) error { return cut(segment[i], n) })
			if err == nil || !strings.Contains(err.Error(), "damaged at byte") {
				t.Errorf("segment %d of %d, without its last %d bytes: %v", i, len(segments), n, err)
			}
		}
		if _, err := mend(func(_ string, segment []string) error { return os.Remove(segment[i]) }); err == nil && i > 0 {
			t.Errorf("segment %d is gone: taken", i)
		}
	}
	broken, err := mend(func(dir string, segment []string) error {
		old, err := os.ReadFile(segment[0])
		if err != nil {
			return err
		}
		return errors.Join(os.WriteFile(filepath.Join(dir, "0.tmp"), old, 0o600), os.WriteFile(filepath.Join(dir, "1.tmp"), nil, 0o600))
	})
	if err != nil {
		t.Error(err)
	}
	want := map[string][]byte{}
	for _, s := range segments {
		if want[filepath.Base(s)], err = os.ReadFile(s); err != nil {
			t.Fatal(err)
		}
	}
	unchanged(t, broken, want)
}

// TestTornStore starts a server on its log and a torn write behind it.
func TestTornStore(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	put := func(e *Embedded, n int) {
		t.Helper()
		for i := range n {
			if _, err := NewKV(e.Store(), "").Put(t.Context(), fmt.Sprint("k", i), noise(100+i)); err != nil {
				t.Fatal(err)
			}
		}
	}
	e, err := StartEmbedded(t.Context(), EmbeddedConfig{Dir: dir, Name: "west"})
	if err != nil {
		t.Fatal(err)
	}
	put(e, 30)
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	log := filepath.Join(dir, "member", "wal")
	path := onlySegment(t, log)
	acknowledged := last(t, path)
	w, err := wal.Open(zap.NewNop(), log, &walpb.Snapshot{})
	if err != nil {
		t.Fatal(err)
	}
	_, _, entries, err := w.ReadAll()
	if err != nil {
		t.Fatal(err)
	}
	index := uint64(len(entries))
	save(t, w, &index, noise(500<<10))
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	end := last(t, path)
	segment, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	segment = segment[:end]
	for name, b := range map[string][]byte{
		"one byte":                 segment[:acknowledged+1],
		"its length":               segment[:acknowledged+8],
		"half, and the file ends":  segment[:acknowledged+250<<10],
		"half, and then zeros":     slices.Concat(segment[:acknowledged+250<<10], make([]byte, 1<<20)),
		"all but the last byte":    segment[:end-48],
		"a length beyond the file": slices.Concat(segment[:acknowledged], []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f}, segment[acknowledged+8:acknowledged+1000]),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			torn := filepath.Join(t.TempDir(), "data")
			path := filepath.Join(torn, "member", "wal", filepath.Base(path))
			snap := filepath.Join(torn, "member", "snap")
			if err := errors.Join(os.CopyFS(torn, os.DirFS(dir)), os.WriteFile(path, b, 0o600),
				os.WriteFile(filepath.Join(snap, "0000000000000002-000000000000001d.snap"), []byte("torn"), 0o600),
				os.WriteFile(filepath.Join(snap, "db.tmp.1"), make([]byte, 4096), 0o600)); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				e, err := StartEmbedded(t.Context(), EmbeddedConfig{Dir: torn, Name: "west"})
				if err != nil {
					t.Fatal(err)
				}
				for i := range 30 {
					if v, _, err := NewKV(e.Store(), "").Get(t.Context(), fmt.Sprint("k", i)); err != nil || !bytes.Equal(v, noise(100+i)) {
						t.Errorf("k%d, which was acknowledged, is %d bytes: %v", i, len(v), err)
					}
				}
				put(e, 30)
				if err := e.Close(); err != nil {
					t.Fatal(err)
				}
			}
			kept, err := os.ReadFile(path + brokenExt)
			if err != nil || !bytes.Equal(kept, bytes.TrimRight(b[acknowledged:], "\x00")) {
				t.Errorf("kept %d bytes: %v", len(kept), err)
			}
			if _, err := os.Stat(filepath.Join(snap, "db.tmp.1")); err == nil {
				t.Error("a copy of the database that never was whole is there still")
			}
		})
	}
	t.Run("acknowledged", func(t *testing.T) {
		t.Parallel()
		torn := filepath.Join(t.TempDir(), "data")
		if err := errors.Join(os.CopyFS(torn, os.DirFS(dir)), os.WriteFile(filepath.Join(torn, "member", "wal", filepath.Base(path)), segment[:acknowledged-100], 0o600)); err != nil {
			t.Fatal(err)
		}
		e, err := StartEmbedded(t.Context(), EmbeddedConfig{Dir: torn, Name: "west"})
		if err == nil {
			_ = e.Close()
			t.Fatal("started without a write that was acknowledged")
		}
		var de *DataError
		if !errors.As(err, &de) || !strings.Contains(err.Error(), "was acknowledged") {
			t.Error(err)
		}
	})
}

// last returns where the records of a segment end.
func last(t *testing.T, path string) int64 {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	at := offsets(b)
	return at[len(at)-1]
}

// FuzzTornWrite puts anything behind a whole log: what was acknowledged is never cut off, and what is left after a cut is whole.
func FuzzTornWrite(f *testing.F) {
	whole, at := realLog(f, noise(1200), make([]byte, 700))
	n := len(at)
	before := at[n-4]
	prefix := whole[:before:before]
	for _, end := range []int64{before + 1, before + 8, before + 12, before + 30, before + 700, at[n-3], at[n-2] - 100, at[n-1] - 3, at[n-1]} {
		f.Add(whole[before:end], uint16(0))
		f.Add(whole[before:end], uint16(5000))
	}
	f.Fuzz(func(t *testing.T, tail []byte, zeros uint16) {
		b := slices.Concat(prefix, tail, make([]byte, zeros))
		s, err := scan(b)
		if err != nil {
			return
		}
		if s.end < before || s.end > int64(len(b)) || s.index < told && s.end == before {
			t.Fatalf("cut at %d of %d, before what was acknowledged (%d)", s.end, len(b), before)
		}
		again, err := scan(b[:s.end])
		if err != nil || again.torn != nil || again.index != s.index || again.crc != s.crc || again.end != s.end {
			t.Fatalf("after the cut %+v, before it %+v: %v", again, s, err)
		}
		if s.torn == nil && !zero(b[s.end:]) {
			t.Fatalf("%d bytes at the end are neither a record nor torn", int64(len(b))-s.end)
		}
	})
}
