package sidecar

import (
	"errors"
	"io"
	"net/http"
	"sync"
)

// maxReplay is how much of a request's body is kept for another try, and for a mirror.
const maxReplay = 64 << 10

// readAhead is how far the caller is read ahead of the try that sends.
const readAhead = 32 << 10

var errStale = errors.New("this try is over")

// replay lets several tries read one body, one after the other, as long as no more than maxReplay of it has come. The caller is read
// by a goroutine of its own, so that a try can be given up while the caller is silent.
type replay struct {
	src io.ReadCloser

	mu      sync.Mutex
	changed *sync.Cond
	buf     []byte // guarded by mu: from base on
	base    int64  // guarded by mu: how much from the beginning is gone
	at      int64  // guarded by mu: where the current try reads
	err     error  // guarded by mu: of src
	turn    int    // guarded by mu: the try that may read; 0: none yet
	over    bool   // guarded by mu
}

func newReplay(body io.ReadCloser) *replay {
	b := &replay{src: body}
	b.changed = sync.NewCond(&b.mu)
	return b
}

// bodyOf returns nil where a request has no body.
func bodyOf(r *http.Request) *replay {
	if r.Body == nil || r.Body == http.NoBody || r.ContentLength == 0 {
		return nil
	}
	return newReplay(r.Body)
}

// next gives the body to a new try; the one before reads no more. It is false if the beginning is gone.
func (b *replay) next() (*replayReader, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.base > 0 {
		return nil, false
	}
	if b.turn == 0 {
		go b.pump()
	}
	b.turn++
	b.at = 0
	b.changed.Broadcast()
	return &replayReader{b: b, turn: b.turn}, true
}

// pump reads the caller until its body ends, or finish and one more read. net/http ends that read when the handler returns.
func (b *replay) pump() {
	chunk := pooledBuffers.Get().(*[32 << 10]byte)
	defer pooledBuffers.Put(chunk)
	for {
		b.mu.Lock()
		for !b.over && b.end()-b.at >= readAhead {
			b.changed.Wait()
		}
		over := b.over
		b.mu.Unlock()
		if over {
			return
		}
		n, err := b.src.Read(chunk[:])
		b.mu.Lock()
		b.buf = append(b.buf, chunk[:n]...)
		b.err = err
		b.trim()
		b.changed.Broadcast()
		b.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// end is how much has come. It needs mu.
func (b *replay) end() int64 { return b.base + int64(len(b.buf)) }

// trim lets go of what was read, once there is more than is kept. It needs mu.
func (b *replay) trim() {
	if b.end() > maxReplay && b.at > b.base {
		b.buf = b.buf[b.at-b.base:]
		b.base = b.at
	}
}

// replayable reports whether next would give the body again.
func (b *replay) replayable() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.base == 0
}

// finish ends all reading, and returns how much came.
func (b *replay) finish() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.over = true
	b.changed.Broadcast()
	return b.end()
}

type replayReader struct {
	b      *replay
	turn   int
	ended  func() // if set, is called before Read returns the caller's io.EOF
	closed bool   // guarded by b.mu
}

// Read implements io.Reader.
func (r *replayReader) Read(p []byte) (int, error) {
	b := r.b
	b.mu.Lock()
	defer b.mu.Unlock()
	for {
		switch {
		case b.turn != r.turn || r.closed || b.over:
			return 0, errStale
		case b.at < b.end():
			n := copy(p, b.buf[b.at-b.base:])
			b.at += int64(n)
			b.trim()
			b.changed.Broadcast()
			return n, nil
		case b.err != nil:
			if r.ended != nil && errors.Is(b.err, io.EOF) {
				r.ended()
			}
			return 0, b.err
		}
		b.changed.Wait()
	}
}

// Close ends a Read that waits. It does not close the caller's body, which another try may need.
func (r *replayReader) Close() error {
	r.b.mu.Lock()
	defer r.b.mu.Unlock()
	r.closed = true
	r.b.changed.Broadcast()
	return nil
}
