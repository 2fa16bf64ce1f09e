package sidecar

import (
	"errors"
	"io"
	"net/http"
	"sync"
)

// maxReplay is how much of a request's body is kept for another try, and for a mirror.
const maxReplay = 64 << 10

var errStale = errors.New("this try is over")

// replay lets several tries read one body, one after the other, as long as no more than maxReplay of it was read.
type replay struct {
	mu   sync.Mutex
	src  io.ReadCloser
	buf  []byte // what was read, from the beginning, unless lost
	err  error  // of src
	lost bool   // the beginning is gone
	turn int    // the try that may read
	n    int64  // bytes read from src
}

func newReplay(body io.ReadCloser) *replay { return &replay{src: body} }

// next gives the body to a new try; the one before reads no more. It is false if the beginning is gone.
func (b *replay) next() (io.ReadCloser, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.lost {
		return nil, false
	}
	b.turn++
	return &replayReader{b: b, turn: b.turn}, true
}

// replayable reports whether next would give the body again.
func (b *replay) replayable() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return !b.lost
}

func (b *replay) bytes() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.n
}

type replayReader struct {
	b    *replay
	turn int
	at   int // in b.buf
}

// Read holds the lock while the caller's bytes are awaited: another try waits for the same bytes.
func (r *replayReader) Read(p []byte) (int, error) {
	b := r.b
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.turn != r.turn {
		return 0, errStale
	}
	if r.at < len(b.buf) {
		n := copy(p, b.buf[r.at:])
		r.at += n
		return n, nil
	}
	if b.lost {
		b.buf, r.at = nil, 0
	}
	if b.err != nil {
		return 0, b.err
	}
	n, err := b.src.Read(p)
	b.n += int64(n)
	b.err = err
	if !b.lost {
		b.buf = append(b.buf, p[:n]...)
		r.at += n
		b.lost = len(b.buf) > maxReplay
	}
	return n, err
}

// Close does not close the caller's body, which another try may need.
func (r *replayReader) Close() error { return nil }

// bodyOf returns nil where a request has no body.
func bodyOf(r *http.Request) *replay {
	if r.Body == nil || r.Body == http.NoBody || r.ContentLength == 0 {
		return nil
	}
	return newReplay(r.Body)
}
