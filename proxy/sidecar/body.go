package sidecar

import (
	"errors"
	"io"
	"sync"

	"github.com/hanse-mesh/hanse/proxy/message"
)

// maxReplay is how much of a request's body is kept for another try, and for a mirror.
const maxReplay = 64 << 10

// readAhead is how far the caller is read ahead of the try that sends.
const readAhead = 32 << 10

var errStale = errors.New("this try is over")

// source is what a body is read from: a message.ServerStream.
type source interface {
	Read(p []byte) (int, error)
	Ready() bool
	CloseRead()
	Trailers() message.Fields
}

// replay lets several tries send one body, one after the other, as long as no more than maxReplay of it has come. What has not
// arrived by the first try is read by a goroutine of its own, so that a try can be given up while the caller is silent. Once the beginning
// is gone there is no other try to keep anything for: the one that sends reads the rest by itself.
type replay struct {
	src source

	mu      sync.Mutex
	changed sync.Cond
	buf     []byte        // guarded by mu: from base on
	base    int64         // guarded by mu: how much from the beginning is gone
	at      int64         // guarded by mu: where the current try reads
	err     error         // guarded by mu: of src
	turn    int           // guarded by mu: the try that may read; 0: none yet
	over    bool          // guarded by mu
	pumping chan struct{} // closed when the pump has ended; nil: there is none
	handed  bool          // guarded by mu: the pump has ended before the body did
}

// newReplay takes what is at hand.
func newReplay(src source) *replay {
	b := &replay{src: src}
	b.changed.L = &b.mu
	for b.err == nil && len(b.buf) < maxReplay && src.Ready() {
		if len(b.buf) == cap(b.buf) {
			b.buf = append(make([]byte, 0, max(512, 2*cap(b.buf))), b.buf...)
		}
		n, err := src.Read(b.buf[len(b.buf):cap(b.buf)])
		b.buf, b.err = b.buf[:len(b.buf)+n], err
	}
	return b
}

// whole reports whether all of the body is at hand: then it is buf, and nobody else uses it.
func (b *replay) whole() bool { return b.base == 0 && b.pumping == nil && b.err == io.EOF }

// next gives the body to a new try; the one before reads no more. It is false if the beginning is gone.
func (b *replay) next() (*replayReader, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.base > 0 {
		return nil, false
	}
	if b.pumping == nil && b.err == nil {
		b.pumping = make(chan struct{})
		go b.pump()
	}
	b.turn++
	b.at = 0
	b.changed.Broadcast()
	return &replayReader{b: b, turn: b.turn}, true
}

// pump reads the caller until its body ends, or finish.
func (b *replay) pump() {
	defer close(b.pumping)
	chunk := pooledBuffers.Get().(*[32 << 10]byte)
	defer pooledBuffers.Put(chunk)
	for {
		b.mu.Lock()
		for !b.over && b.end()-b.at >= readAhead {
			b.changed.Wait()
		}
		over := b.over
		if !over && b.base > 0 {
			b.handed = true
			b.changed.Broadcast()
		}
		over = over || b.handed
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
	b.over = true
	b.changed.Broadcast()
	pumping := b.pumping
	open := b.err == nil
	b.mu.Unlock()
	if open {
		b.src.CloseRead()
	}
	if pumping != nil {
		<-pumping
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.end()
}

type replayReader struct {
	b      *replay
	turn   int
	closed bool // guarded by b.mu
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
			return 0, b.err
		case b.handed:
			return r.direct(p)
		}
		b.changed.Wait()
	}
}

// direct reads the caller. It needs mu, and gives it up meanwhile.
func (r *replayReader) direct(p []byte) (int, error) {
	b := r.b
	b.buf = nil
	b.mu.Unlock()
	n, err := b.src.Read(p)
	b.mu.Lock()
	b.base += int64(n)
	b.at = b.base
	b.err = err
	if err != nil && err != io.EOF && (r.closed || b.over) {
		return 0, errStale
	}
	if n > 0 {
		return n, nil // the error is the next one's
	}
	return 0, err
}

// ready reports whether Read would return at once.
func (r *replayReader) ready() bool {
	b := r.b
	b.mu.Lock()
	ready := b.turn != r.turn || r.closed || b.over || b.at < b.end() || b.err != nil
	handed := b.handed
	b.mu.Unlock()
	return ready || handed && b.src.Ready()
}

// Close ends a Read that waits. It does not end the caller's body if another try may need it.
func (r *replayReader) Close() error {
	b := r.b
	b.mu.Lock()
	r.closed = true
	b.changed.Broadcast()
	last := b.handed && b.turn == r.turn && b.err == nil
	b.mu.Unlock()
	if last {
		b.src.CloseRead()
	}
	return nil
}

// sending is a request's body on its way to one try.
type sending struct {
	reader *replayReader // nil: nothing is under way
	done   chan struct{}
}

// send passes the body to a try: at once what is at hand, the rest by a goroutine. It is false if the beginning of the body is gone.
func (b *replay) send(to message.ClientStream) (sending, bool) {
	if b.whole() {
		if _, err := to.Write(b.buf); err == nil {
			_ = to.End(b.src.Trailers()) // a failure shows in the answer
		}
		return sending{}, true
	}
	r, ok := b.next()
	if !ok {
		return sending{}, false
	}
	s := sending{reader: r, done: make(chan struct{})}
	go func() {
		defer close(s.done)
		buf := pooledBuffers.Get().(*[32 << 10]byte)
		defer pooledBuffers.Put(buf)
		for {
			if !r.ready() {
				if to.Flush() != nil {
					return
				}
			}
			n, err := r.Read(buf[:])
			if n > 0 {
				if _, err := to.Write(buf[:n]); err != nil {
					return
				}
			}
			switch {
			case err == io.EOF:
				_ = to.End(b.src.Trailers())
				return
			case err == errStale:
				return
			case err != nil:
				to.Cancel(&callerError{err})
				return
			}
		}
	}()
	return s, true
}

// stop ends what is under way, and with it the exchange.
func (s sending) stop(to message.ClientStream) {
	if s.reader == nil {
		return
	}
	_ = s.reader.Close()
	select {
	case <-s.done:
	default:
		to.Cancel(nil) // ends a Write that waits
		<-s.done
	}
}
