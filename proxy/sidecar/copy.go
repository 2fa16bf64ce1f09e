package sidecar

import (
	"errors"
	"io"
	"net"
	"sync"
	"time"

	"github.com/hanse-mesh/hanse/proxy/message"
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
	io.Reader
	io.Writer
	Flush() error
	CloseWrite() error
	Break() // ends both directions at once; what waits returns
}

// serverEnd is an exchange that has become a tunnel, at its server.
type serverEnd struct{ message.ServerStream }

func (e serverEnd) CloseWrite() error { return e.End(nil) }
func (e serverEnd) Break() {
	e.Abort(errBroken)
	e.CloseRead() // after End, Abort does nothing
}

// clientEnd is the same at its client.
type clientEnd struct{ message.ClientStream }

func (e clientEnd) CloseWrite() error { return e.End(nil) }
func (e clientEnd) Break()            { e.Cancel(errBroken) }

var errBroken = errors.New("the other end is gone")

// connEnd is a connection in the clear.
type connEnd struct{ net.Conn }

func (e connEnd) Flush() error { return nil }
func (e connEnd) Break()       { _ = e.Close() }
func (e connEnd) CloseWrite() error {
	if w, ok := e.Conn.(interface{ CloseWrite() error }); ok {
		return w.CloseWrite()
	}
	return errors.ErrUnsupported
}

// relay carries bytes both ways, each direction to its own end, and returns when both are over: the bytes from a to b and back.
// An end that cannot be passed on ends both.
func relay(a, b end, idle time.Duration) (ab, ba int64) {
	watch := newIdle(idle, func() { a.Break(); b.Break() })
	defer watch.stop()
	direction := func(dst, src end, n *int64) {
		var err error
		*n, err = copyBytes(dst, src, watch)
		if err == nil && dst.CloseWrite() == nil {
			return
		}
		a.Break()
		b.Break()
	}
	var back sync.WaitGroup
	back.Go(func() { direction(a, b, &ba) })
	direction(b, a, &ab)
	back.Wait()
	return ab, ba
}

func copyBytes(dst end, src io.Reader, watch *idleWatch) (int64, error) {
	buf := pooledBuffers.Get().(*[32 << 10]byte)
	defer pooledBuffers.Put(buf)
	var total int64
	for {
		n, err := src.Read(buf[:])
		if n > 0 {
			watch.touch()
			m, writeErr := dst.Write(buf[:n])
			total += int64(m)
			if writeErr == nil {
				writeErr = dst.Flush()
			}
			if writeErr != nil {
				return total, writeErr
			}
		}
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
