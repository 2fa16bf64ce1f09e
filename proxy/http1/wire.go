package http1

import (
	"errors"
	"io"
	"net"
	"strconv"
	"sync"
	"time"

	"github.com/hanse-mesh/hanse/proxy/message"
)

// wire is one connection's bytes: a buffer of what was read and not used, and one of what is to be written.
type wire struct {
	nc net.Conn

	// of the reader
	buf          []byte // buf[r:w] is unread
	r, w         int
	pooled       bool // buf is one of responses, unless it is longer
	readDeadline time.Time
	readAt       time.Time // of the last within

	mu            sync.Mutex // of the writer
	out           []byte     // guarded by mu
	pooledOut     *[]byte    // guarded by mu: what out came from
	writeDeadline time.Time  // guarded by mu
	writeTimeout  time.Duration
	failed        error // guarded by mu: of a write
}

// responses are read with longer buffers than requests, since nobody holds one while a connection is idle.
var responses = sync.Pool{New: func() any { return new([responseBuffer]byte) }}

const (
	responseBuffer = 16 << 10

	firstBuffer = 4 << 10
	flushAt     = 16 << 10
)

var outs = sync.Pool{New: func() any { b := make([]byte, 0, 4<<10); return &b }}

// fill reads more. It makes room first: up to limit bytes may be unread.
func (w *wire) fill(limit int) error {
	if w.r == w.w {
		w.r, w.w = 0, 0
		if len(w.buf) > responseBuffer || !w.pooled && len(w.buf) > firstBuffer {
			w.buf = nil // it was for one long head
		}
	}
	if w.buf == nil {
		if w.pooled {
			w.buf = responses.Get().(*[responseBuffer]byte)[:]
		} else {
			w.buf = make([]byte, firstBuffer)
		}
	}
	if w.w == len(w.buf) {
		if w.r > 0 {
			w.w = copy(w.buf, w.buf[w.r:w.w])
			w.r = 0
		} else {
			bigger := make([]byte, min(max(2*len(w.buf), firstBuffer), max(limit, firstBuffer)+1))
			if len(bigger) <= len(w.buf) {
				return errTooLong
			}
			copy(bigger, w.buf)
			w.buf = bigger
		}
	}
	n, err := w.nc.Read(w.buf[w.w:])
	w.w += n
	if n > 0 {
		return nil
	}
	if err == nil {
		err = io.ErrNoProgress
	}
	return err
}

// rest gives the buffer back while nothing is to be read, if it is a pooled one.
func (w *wire) rest() {
	if w.pooled && len(w.buf) == responseBuffer && w.r == w.w {
		responses.Put((*[responseBuffer]byte)(w.buf))
		w.buf, w.r, w.w = nil, 0, 0
	}
}

var errTooLong = errors.New("http1: too long")

func (w *wire) unread() []byte { return w.buf[w.r:w.w] }

// within bounds reads by d from now on. Moving a deadline costs as much as a small read: it is moved when a quarter of it has passed.
func (w *wire) within(d time.Duration) {
	now := time.Now()
	w.readAt = now
	if left := w.readDeadline.Sub(now); left < d*3/4 || left > d {
		w.readDeadline = now.Add(d)
		_ = w.nc.SetReadDeadline(w.readDeadline)
	}
}

func (w *wire) unbounded() {
	if !w.readDeadline.IsZero() {
		w.readDeadline = time.Time{}
		_ = w.nc.SetReadDeadline(time.Time{})
	}
}

// body reads a message's body into p.
func (w *wire) body(b *body, p []byte) (int, error) {
	for {
		if b.over() {
			return 0, io.EOF
		}
		if len(p) == 0 {
			return 0, nil
		}
		have := w.unread()
		switch b.kind {
		case fixed:
			if len(have) > 0 {
				n := copy(p[:min(int64(len(p)), b.left)], have)
				w.r += n
				b.left -= int64(n)
				return n, nil
			}
			n, err := w.nc.Read(p[:min(int64(len(p)), b.left)])
			b.left -= int64(n)
			if n > 0 {
				return n, nil
			}
			return 0, cutShort(err)
		case untilClose:
			if len(have) > 0 {
				n := copy(p, have)
				w.r += n
				return n, nil
			}
			n, err := w.nc.Read(p)
			if n > 0 {
				return n, nil
			}
			if errors.Is(err, io.EOF) {
				b.kind = none
			}
			return 0, err
		}
		if c := &b.chunks; c.state == chunkBytes && len(have) == 0 && uint64(len(p)) >= firstBuffer {
			n, err := w.nc.Read(p[:min(uint64(len(p)), c.left)]) // past the buffer
			if c.left -= uint64(n); c.left == 0 {
				c.state = chunkCRLF
			}
			if n > 0 {
				return n, nil
			}
			return 0, cutShort(err)
		}
		if b.chunks.state == chunkBytes {
			have = have[:min(len(have), len(p))]
		}
		data, n, rej := b.chunks.next(have)
		if rej != nil {
			return 0, rej
		}
		copy(p, data)
		w.r += n
		if len(data) > 0 {
			return len(data), nil
		}
		if n == 0 {
			if err := w.fill(b.chunks.maxHead); err != nil {
				return 0, cutShort(err)
			}
		}
	}
}

func cutShort(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// ready reports whether body would return at once.
func (w *wire) ready(b *body) bool {
	if b.over() {
		return true
	}
	have := w.unread()
	if b.kind != chunked || len(have) == 0 {
		return len(have) > 0
	}
	for c := b.chunks; ; { // a copy: nothing is taken
		data, n, rej := c.next(have)
		if rej != nil || len(data) > 0 || c.done {
			return true
		}
		if n == 0 {
			return false
		}
		have = have[n:]
	}
}

// add appends to what is to be written. It needs mu.
func (w *wire) add(s string) {
	w.room()
	w.out = append(w.out, s...)
}

func (w *wire) room() {
	if w.out == nil {
		w.pooledOut = outs.Get().(*[]byte)
		w.out = (*w.pooledOut)[:0]
	}
}

func (w *wire) addInt(n int64) {
	w.room()
	w.out = strconv.AppendInt(w.out, n, 10)
}

func (w *wire) addFields(fields message.Fields) {
	w.room()
	for i := range fields {
		w.out = append(w.out, fields[i].Name...)
		w.out = append(w.out, ": "...)
		w.out = append(w.out, fields[i].Value...)
		w.out = append(w.out, "\r\n"...)
	}
}

// write appends bytes of a body, or writes them through. It needs mu.
func (w *wire) write(p []byte, chunk bool) error {
	if w.failed != nil {
		return w.failed
	}
	w.room()
	if chunk {
		w.out = strconv.AppendInt(w.out, int64(len(p)), 16)
		w.out = append(w.out, "\r\n"...)
	}
	if len(w.out)+len(p) <= flushAt {
		w.out = append(w.out, p...)
	} else {
		if err := w.flush(); err != nil {
			return err
		}
		if err := w.through(p); err != nil {
			return err
		}
	}
	if chunk {
		w.add("\r\n")
	}
	return nil
}

func (w *wire) through(p []byte) error {
	if now := time.Now(); w.writeDeadline.Sub(now) < w.writeTimeout*3/4 {
		w.writeDeadline = now.Add(w.writeTimeout)
		_ = w.nc.SetWriteDeadline(w.writeDeadline)
	}
	_, err := w.nc.Write(p)
	if err != nil {
		w.failed = err
	}
	return err
}

// flush writes what waits. It needs mu.
func (w *wire) flush() error {
	if w.failed != nil || len(w.out) == 0 {
		return w.failed
	}
	b, p := w.out, w.pooledOut
	w.out, w.pooledOut = nil, nil
	err := w.through(b)
	if cap(b) <= 64<<10 {
		*p = b
		outs.Put(p)
	}
	return err
}

func (w *wire) closeWrite() error {
	if c, ok := w.nc.(interface{ CloseWrite() error }); ok {
		return c.CloseWrite()
	}
	return w.nc.Close()
}
