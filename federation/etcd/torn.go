package etcd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"iter"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/fileutil"
	"go.etcd.io/etcd/server/v3/storage/wal"
	"go.etcd.io/etcd/server/v3/storage/wal/walpb"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"
)

// A full disk or a crash tears the write at the log's end. etcd's own repair is not asked, for three reasons: it first copies the whole
// segment (64 MB), on the disk that is full; it believes a length that points beyond the file, and cuts there even where whole records
// follow; and zeros in a value are to it a tear, wherever in the last segment it meets a wrong checksum. So mendLog decides before etcd reads.

const (
	frameBytes = 8       // of a record's length, in front of it
	sector     = 512     // what a disk writes whole or not at all
	maxSegment = 1 << 28 // etcd starts a new one after 64 MB
	maxState   = 64      // a HardState is three numbers
	brokenExt  = ".broken"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// mendLog reads the log in dir. A torn write at its end, which nobody was told of as done, is cut off and kept beside; any other damage is an
// error, and nothing is changed. applied is the last entry that the database has: a log that ends before it has lost what was acknowledged.
func mendLog(dir string, applied uint64, log *slog.Logger) error {
	segments, leftovers, err := logFiles(dir)
	if err != nil {
		return err
	}
	if len(segments) == 0 {
		return fmt.Errorf("log %s is damaged: it has no segment", dir)
	}
	last := segments[len(segments)-1]
	lock, err := lockFile(last, os.O_RDWR, "log "+last)
	if err != nil {
		return err
	}
	defer lock.Close()
	s := logScan{}
	for _, path := range segments {
		if err := s.segment(path, path == last); err != nil {
			return err
		}
	}
	if !s.snapshots || s.snapshot > s.commit { // a whole log begins with an empty one
		return fmt.Errorf("log %s is damaged: it cannot be read from its beginning", dir)
	}
	if known := max(applied, s.commit); known > s.index {
		return fmt.Errorf("log %s is damaged: it ends with entry %d at byte %d, and entry %d was acknowledged", last, s.index, s.end, known)
	}
	// etcd would write a segment into such a file as if it were empty, over a header that a crash may have left in it
	for _, path := range leftovers {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if s.torn == nil {
		return nil
	}
	kept := last + brokenExt
	if err := writeSynced(kept, s.torn); err != nil {
		return fmt.Errorf("keep the torn end of log %s, from byte %d on: %w", last, s.end, err)
	}
	if err := errors.Join(lock.Truncate(s.end), lock.Sync()); err != nil {
		return fmt.Errorf("cut log %s at byte %d: %w", last, s.end, err)
	}
	log.Warn("the last write to the log was torn, as by a full disk or a crash; it was never acknowledged, and is cut off",
		"file", last, "offset", s.end, "bytes", len(s.torn), "kept", kept)
	return nil
}

// logFiles returns the segments in dir in order, and the files that were to become segments.
func logFiles(dir string) (segments, leftovers []string, err error) {
	entries, err := os.ReadDir(dir) // sorted
	if err != nil {
		return nil, nil, err
	}
	for _, e := range entries {
		switch filepath.Ext(e.Name()) {
		case ".wal":
			segments = append(segments, filepath.Join(dir, e.Name()))
		case ".tmp":
			leftovers = append(leftovers, filepath.Join(dir, e.Name()))
		}
	}
	return segments, leftovers, nil
}

// lockFile waits a little for a process before this one to end.
func lockFile(path string, flags int, what string) (*fileutil.LockedFile, error) {
	for deadline := time.Now().Add(lockTimeout); ; time.Sleep(20 * time.Millisecond) {
		f, err := fileutil.TryLockFile(path, flags, 0o600)
		if errors.Is(err, fileutil.ErrLocked) {
			if time.Now().Before(deadline) {
				continue
			}
			return nil, fmt.Errorf("%s is in use by another process", what)
		}
		return f, err
	}
}

// writeSynced leaves no part of a file behind: on a full disk each byte counts.
func writeSynced(path string, b []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		_ = os.Remove(path)
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// logScan is what was read of a log, segment by segment.
type logScan struct {
	crc       uint32 // of all data so far: it goes on over segments
	index     uint64 // of the last entry
	entries   bool   // there was one
	commit    uint64
	snapshots bool   // there is one
	snapshot  uint64 // the index of the first
	metadata  []byte
	end       int64  // of the last whole record of the last segment
	torn      []byte // what follows it there, if that is a torn write
}

// segmentReader is one segment as etcd's decoder wants it.
type segmentReader struct {
	*io.SectionReader
	name string
}

func (r segmentReader) FileInfo() (fs.FileInfo, error) { return r, nil }
func (r segmentReader) Name() string                   { return r.name }
func (r segmentReader) Mode() fs.FileMode              { return 0o600 }
func (r segmentReader) ModTime() time.Time             { return time.Time{} }
func (r segmentReader) IsDir() bool                    { return false }
func (r segmentReader) Sys() any                       { return nil }

func (s *logScan) segment(path string, last bool) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if info.Size() > maxSegment {
		return fmt.Errorf("log %s is damaged: %d bytes, where a segment has %d at most", path, info.Size(), maxSegment)
	}
	if err := s.read(f, info.Size(), filepath.Base(path), last); err != nil {
		return fmt.Errorf("log %s is damaged at byte %d: %w", path, s.end, err)
	}
	return nil
}

// read checks one segment. Only in the last one may something be torn.
func (s *logScan) read(r io.ReaderAt, size int64, name string, last bool) error {
	d := wal.NewDecoder(segmentReader{io.NewSectionReader(r, 0, size), name})
	d.UpdateCRC(s.crc)
	s.end = 0
	records, err := 0, error(nil)
	for rec := new(walpb.Record); ; records++ {
		if err = d.Decode(rec); err != nil {
			break
		}
		if err := s.record(rec, records, d); err != nil {
			return err
		}
		s.end, s.crc = d.LastOffset(), d.LastCRC() // the decoder's sum takes in what it then refuses, too
	}
	switch {
	case records < 2:
		return errors.New("it does not begin with a checksum and the member's metadata, which are on disk before a segment has its name")
	case !last && !errors.Is(err, io.EOF):
		return fmt.Errorf("%w; it is not the last segment, so this is no torn write", err)
	case !last: // zeros may follow; that nothing is missing, the next segment's first record says
		return nil
	}
	left := size - s.end
	written, err := lastByte(io.NewSectionReader(r, s.end, left))
	if err != nil {
		return err
	}
	if written == 0 && (left == 0 || left >= frameBytes) {
		return nil // the end, and space for more
	}
	rest := make([]byte, left)
	if _, err := r.ReadAt(rest, s.end); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if err := tornWrite(rest, int(written), s.end, s.crc, s.index); err != nil {
		return err
	}
	s.torn = rest[:written]
	return nil
}

// lastByte returns the offset after the last byte that is not zero.
func lastByte(r io.Reader) (int64, error) {
	last, buf := int64(0), make([]byte, len(zeros))
	for at := int64(0); ; at += int64(len(buf)) {
		n, err := io.ReadFull(r, buf)
		if !zero(buf[:n]) {
			last = at + int64(len(bytes.TrimRight(buf[:n], "\x00")))
		}
		if err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				err = nil
			}
			return last, err
		}
	}
}

var zeros [64 << 10]byte

func zero(b []byte) bool {
	for len(b) > len(zeros) {
		if !bytes.Equal(b[:len(zeros)], zeros[:]) {
			return false
		}
		b = b[len(zeros):]
	}
	return bytes.Equal(b, zeros[:len(b)])
}

// record takes in the n-th record of a segment, whose checksum is right.
func (s *logScan) record(rec *walpb.Record, n int, d wal.Decoder) error {
	if want := []int64{wal.CrcType, wal.MetadataType}; n < len(want) && rec.GetType() != want[n] {
		return fmt.Errorf("record %d is of type %d, not %d", n, rec.GetType(), want[n])
	}
	switch rec.GetType() {
	case wal.CrcType:
		if sum := d.LastCRC(); sum != 0 && sum != rec.GetCrc() {
			return fmt.Errorf("it goes on after checksum %08x, and what is before it has %08x: records are missing", rec.GetCrc(), sum)
		}
		d.UpdateCRC(rec.GetCrc())
	case wal.MetadataType:
		if s.metadata != nil && !bytes.Equal(s.metadata, rec.Data) {
			return errors.New("it is of another member than the segment before it")
		}
		s.metadata = bytes.Clone(rec.Data)
	case wal.EntryType:
		var e raftpb.Entry
		if err := proto.Unmarshal(rec.Data, &e); err != nil {
			return fmt.Errorf("entry: %w", err)
		}
		if s.entries && e.GetIndex() > s.index+1 {
			return fmt.Errorf("entry %d follows entry %d", e.GetIndex(), s.index)
		}
		s.index, s.entries = e.GetIndex(), true
	case wal.StateType:
		var state raftpb.HardState
		if err := proto.Unmarshal(rec.Data, &state); err != nil {
			return fmt.Errorf("state: %w", err)
		}
		s.commit = state.GetCommit()
	case wal.SnapshotType:
		var snap walpb.Snapshot
		if err := proto.Unmarshal(rec.Data, &snap); err != nil {
			return fmt.Errorf("snapshot: %w", err)
		}
		if !s.snapshots {
			s.snapshots, s.snapshot = true, snap.GetIndex()
		}
		s.index = max(s.index, snap.GetIndex())
	default:
		return fmt.Errorf("record of type %d, which is unknown", rec.GetType())
	}
	return nil
}

// tornWrite returns nil if tail is a write that did not finish, else what speaks against it. The tail is a segment from off on, where its
// last whole record ends, and of which so many bytes were written: zeros follow. crc and index are as they are where it begins.
//
// etcd writes in order, beyond the file's end or over zeros: a write that stopped ends with the file, or in zeros. One that lost its power
// may lack any of its sectors, which then are zeros, and whole records may follow; but none that commits an entry beyond index, for such
// a one is written only after the disk has confirmed that entry.
func tornWrite(tail []byte, written int, off int64, crc uint32, index uint64) error {
	if written <= frameBytes {
		return nil
	}
	h, n, ok := readHead(tail[frameBytes:])
	next := sector - int(off%sector)
	switch legible := frameBytes + n; {
	case !ok && legible >= written:
		return nil // it stopped in there
	case zero(tail[:min(next, len(tail))]), // the sector that it begins in was never written
		(next < legible || !ok && next == legible) && zero(tail[next:min(next+sector, len(tail))]): // or that which its head goes on in
		return unsynced(tail, next, off, index)
	case !ok:
		return errors.New("it is no record, and more follows")
	}
	end := frameBytes + h.end
	size, pad, ok := frame(tail)
	if !ok || size != h.end { // one of its two lengths is wrong, which no tear explains; unless nothing whole can be lost, it is refused
		if end <= len(tail) && h.crc == crc32.Update(crc, castagnoli, tail[frameBytes+h.data:end]) {
			return errors.New("a record is whole but for its length")
		}
		if end <= len(tail) && (tail[end-1] != 0 || written > end) {
			return errors.New("length and checksum of a record are wrong")
		}
		for at := range wholeRecords(tail, frameBytes) {
			return fmt.Errorf("the length of a record is wrong, and a whole record follows at byte %d", off+int64(at))
		}
		return nil
	}
	switch {
	case end+pad > len(tail), tail[end-1] == 0 && written <= end:
		return nil // it stopped
	case lacksSector(tail, end, off):
		return unsynced(tail, end+pad, off, index)
	case written > end:
		return errors.New("the checksum of a record is wrong, and more follows")
	}
	return errors.New("the checksum of the last record is wrong, and it was written to its end")
}

// unsynced returns nil if nothing in tail from a place on shows that what is before it was on disk, and perhaps acknowledged.
func unsynced(tail []byte, from int, off int64, index uint64) error {
	for at, h := range wholeRecords(tail, from) {
		var state raftpb.HardState
		if h.typ == wal.StateType && h.end-h.data <= maxState && proto.Unmarshal(tail[at+frameBytes+h.data:at+frameBytes+h.end], &state) == nil && state.GetCommit() > index {
			return fmt.Errorf("sectors are missing, and the record at byte %d says that entry %d, which was in them or follows them, had been acknowledged", off+int64(at), state.GetCommit())
		}
	}
	return nil
}

// lacksSector reports whether one of the sectors that begin within a record at the start of tail, and before end, was never written.
func lacksSector(tail []byte, end int, off int64) bool {
	for at := sector - int(off%sector); at < end; at += sector {
		if zero(tail[at:min(at+sector, len(tail))]) {
			return true
		}
	}
	return false
}

// wholeRecords yields where in tail, from a place on, something has the form of a record: what went into its checksum is unknown there. It looks
// within records, too: what has the form of one may be part of somebody's value, and reach beyond true records.
func wholeRecords(tail []byte, from int) iter.Seq2[int, head] {
	return func(yield func(int, head) bool) {
		for at := from; at+frameBytes < len(tail); at += 8 { // so are records aligned
			size, pad, ok := frame(tail[at:])
			if next := at + frameBytes + size + pad; ok && next <= len(tail) {
				if h, _, ok := readHead(tail[at+frameBytes:]); ok && h.end == size && zero(tail[next-pad:next]) {
					if !yield(at, h) {
						return
					}
				}
			}
		}
	}
}

// frame reads a record's length and the padding that this makes. ok is false if etcd never writes such a one.
func frame(b []byte) (size, pad int, ok bool) {
	if len(b) < frameBytes {
		return 0, 0, false
	}
	l := binary.LittleEndian.Uint64(b)
	n := l &^ (0xff << 56)
	if n == 0 || n > maxSegment {
		return 0, 0, false
	}
	size, pad = int(n), int(-n%8)
	flags := byte(0)
	if pad != 0 {
		flags = 0x80 | byte(pad)
	}
	return size, pad, byte(l>>56) == flags
}

// head is what a record begins with. Its offsets are from the record's first byte, which its length is in front of.
type head struct {
	typ       int64
	crc       uint32
	data, end int // end may be beyond what is there
}

// readHead reads what etcd's encoder writes: type, checksum, and then the data. If it is not that, n is how many bytes might have been.
func readHead(b []byte) (h head, n int, ok bool) {
	field := func(tag byte) (uint64, bool) {
		if n >= len(b) || b[n] != tag {
			return 0, false
		}
		v, length := binary.Uvarint(b[n+1:])
		if length == 0 {
			n = len(b) // they end in it
		}
		if length <= 0 {
			return 0, false
		}
		n += 1 + length
		return v, true
	}
	typ, ok := field(0x08)
	if !ok {
		return h, n, false
	}
	sum, ok := field(0x10)
	if !ok {
		return h, n, false
	}
	if typ < uint64(wal.MetadataType) || typ > uint64(wal.SnapshotType) || sum > 1<<32-1 {
		return h, 0, false
	}
	h = head{typ: int64(typ), crc: uint32(sum), data: n, end: n}
	size, ok := field(0x1a)
	if !ok {
		return h, n, h.typ == wal.CrcType || h.typ == wal.MetadataType // these may have none
	}
	if size > maxSegment {
		return h, h.data, false
	}
	h.data, h.end = n, n+int(size)
	return h, n, true
}
