package sidecar

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"time"

	"github.com/hanse-mesh/hanse/proxy/message"
	"github.com/hanse-mesh/hanse/proxy/sock"
)

// pooledBuffers are 32 KiB each.
var pooledBuffers = sync.Pool{New: func() any { return new([32 << 10]byte) }}

// copyBody passes the body and the trailers of a response on, and returns the number of bytes. Nothing waits in a buffer while more is
// awaited.
func copyBody(to message.ServerStream, from message.ClientStream) (int64, error) {
	buf := pooledBuffers.Get().(*[32 << 10]byte)
	defer pooledBuffers.Put(buf)
	var total int64
	for {
		if !from.Ready() {
			if err := to.Flush(); err != nil {
				return total, &callerError{err}
			}
		}
		n, err := from.Read(buf[:])
		if n > 0 {
			total += int64(n)
			if _, writeErr := to.Write(buf[:n]); writeErr != nil {
				return total, &callerError{writeErr}
			}
		}
		switch {
		case err == io.EOF:
			if err := to.End(from.Trailers()); err != nil {
				return total, &callerError{err}
			}
			return total, nil
		case err != nil:
			_ = to.Flush() // what has come so far is true
			return total, err
		}
	}
}

// callerError is a failure of the side that an answer goes to.
type callerError struct{ err error }

func (e *callerError) Error() string { return e.err.Error() }
func (e *callerError) Unwrap() error { return e.err }

// end is either end of a relay.
type end interface {
	io.Writer
	// next waits for bytes, and returns them in b or elsewhere. While it waits b is not held: an idle tunnel has no buffers.
	next(b *lateBuffer) ([]byte, error)
	Flush() error
	CloseWrite() error
	Break() // ends both directions at once; what waits returns
}

// serverEnd is an exchange that has become a tunnel, at its server.
type serverEnd struct{ message.ServerStream }

func (e serverEnd) next(b *lateBuffer) ([]byte, error) { return b.fill(e.ServerStream) }

func (e serverEnd) CloseWrite() error { return e.End(nil) }
func (e serverEnd) Break() {
	e.Abort(errBroken)
	e.CloseRead() // after End, Abort does nothing
}

// clientEnd is the same at its client.
type clientEnd struct{ message.ClientStream }

func (e clientEnd) next(b *lateBuffer) ([]byte, error) {
	if c, ok := e.ClientStream.(*connStream); ok {
		return c.next(b)
	}
	return b.fill(e.ClientStream)
}

func (e clientEnd) CloseWrite() error { return e.End(nil) }
func (e clientEnd) Break()            { e.Cancel(errBroken) }

var errBroken = errors.New("the other end is gone")

// connEnd is a connection in the clear.
type connEnd struct{ net.Conn }

func (e connEnd) next(b *lateBuffer) ([]byte, error) {
	nc := e.Conn
	if r, ok := nc.(*replayedConn); ok && len(r.head) == 0 {
		nc = r.Conn
	}
	if c, ok := nc.(interface {
		ReadLate(sock.LateBuffer) (int, error)
	}); ok {
		n, err := c.ReadLate(b)
		if n == 0 {
			return nil, err
		}
		return b.large[:n], err
	}
	p := b.Take()
	n, err := nc.Read(p)
	return p[:n], err
}

func (e connEnd) Flush() error { return nil }
func (e connEnd) Break()       { _ = e.Close() }
func (e connEnd) CloseWrite() error {
	if w, ok := e.Conn.(interface{ CloseWrite() error }); ok {
		return w.CloseWrite()
	}
	return errors.ErrUnsupported
}

// relay carries bytes both ways, each direction to its own end, and returns when both are over: the bytes from a to b and back.
// An end that cannot be passed on ends both, as does ctx.
func relay(ctx context.Context, a, b end, idle time.Duration) (ab, ba int64) {
	both := func() { a.Break(); b.Break() }
	watch := newIdle(idle, both)
	defer watch.stop()
	defer context.AfterFunc(ctx, both)()
	if s, ok := a.(serverEnd); ok { // whose caller may vanish after its last byte, while b says nothing
		s.OnAbort(func(error) { b.Break() })
		defer s.OnAbort(nil)
	}
	direction := func(dst, src end, n *int64) {
		var err error
		*n, err = copyBytes(dst, src, watch)
		if err == nil && dst.CloseWrite() == nil {
			return
		}
		both()
	}
	var back sync.WaitGroup
	back.Go(func() { direction(a, b, &ba) })
	direction(b, a, &ab)
	back.Wait()
	return ab, ba
}

// lateBuffer is a pooled buffer, held while there is something in it.
type lateBuffer struct {
	large *[32 << 10]byte
	small [512]byte
}

// Take implements sock.LateBuffer, as does Give.
func (b *lateBuffer) Take() []byte {
	if b.large == nil {
		b.large = pooledBuffers.Get().(*[32 << 10]byte)
	}
	return b.large[:]
}

func (b *lateBuffer) Give() {
	if b.large != nil {
		pooledBuffers.Put(b.large)
		b.large = nil
	}
}

// fill reads from a stream: into the small buffer where that has to wait, and into the large one what more there is.
func (b *lateBuffer) fill(s interface {
	Read(p []byte) (int, error)
	Ready() bool
}) ([]byte, error) {
	n := 0
	if !s.Ready() {
		var err error
		if n, err = s.Read(b.small[:]); err != nil || n < len(b.small) || !s.Ready() {
			return b.small[:n], err
		}
	}
	p := b.Take()
	copy(p, b.small[:n])
	m, err := s.Read(p[n:])
	return p[:n+m], err
}

func copyBytes(dst, src end, watch *idleWatch) (int64, error) {
	var buf lateBuffer
	defer buf.Give()
	var total int64
	for {
		p, err := src.next(&buf)
		if len(p) > 0 {
			watch.touch()
			m, writeErr := dst.Write(p)
			total += int64(m)
			if writeErr == nil {
				writeErr = dst.Flush()
			}
			if writeErr != nil {
				return total, writeErr
			}
		}
		buf.Give()
		if errors.Is(err, io.EOF) {
			return total, nil
		}
		if err != nil {
			return total, err
		}
	}
}

// idleWatch calls a function after a time without touch.
type idleWatch struct {
	after time.Duration
	timer *time.Timer
	mu    sync.Mutex
	last  time.Time // guarded by mu
}

func newIdle(after time.Duration, f func()) *idleWatch {
	w := &idleWatch{after: after, last: time.Now()}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.timer = time.AfterFunc(after, func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		if left := w.after - time.Since(w.last); left > 0 {
			w.timer.Reset(left)
			return
		}
		f()
	})
	return w
}

func (w *idleWatch) touch() {
	w.mu.Lock()
	w.last = time.Now()
	w.mu.Unlock()
}

func (w *idleWatch) stop() { w.timer.Stop() }
