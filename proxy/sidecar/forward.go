package sidecar

import (
	"errors"
	"io"
	"maps"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"strings"
	"sync"
	"time"
)

// pooledBuffers are 32 KiB each.
var pooledBuffers = sync.Pool{New: func() any { return new([32 << 10]byte) }}

// writeResponse passes a response on, head, body and trailers, and returns the number of bytes of the body. An error means that the
// response is incomplete: the caller of the proxy must see it break, by http.ErrAbortHandler.
func writeResponse(w http.ResponseWriter, resp *http.Response) (int64, error) {
	h := w.Header()
	maps.Copy(h, resp.Header)
	if _, ok := h["Content-Type"]; !ok {
		h["Content-Type"] = nil // net/http must not guess one
	}
	announced := len(resp.Trailer)
	for name := range resp.Trailer {
		h.Add("Trailer", name)
	}
	w.WriteHeader(resp.StatusCode)
	rc := http.NewResponseController(w)
	streaming := resp.ContentLength < 0 || strings.HasPrefix(resp.Header.Get("Content-Type"), "text/event-stream")
	if streaming {
		_ = rc.Flush()
	}
	n, err := copyBody(w, rc, resp.Body, streaming)
	if err != nil {
		return n, err
	}
	if len(resp.Trailer) == announced {
		for name, values := range resp.Trailer {
			h[name] = values
		}
	} else {
		for name, values := range resp.Trailer { // HTTP/2 need not announce them
			h[http.TrailerPrefix+name] = values
		}
	}
	if announced == 0 && len(resp.Trailer) > 0 {
		_ = rc.Flush() // HTTP/1.1: chunked, so that there is a place for them
	}
	return n, nil
}

func copyBody(w io.Writer, rc *http.ResponseController, body io.Reader, flush bool) (int64, error) {
	buf := pooledBuffers.Get().(*[32 << 10]byte)
	defer pooledBuffers.Put(buf)
	var total int64
	for {
		n, err := body.Read(buf[:])
		if n > 0 {
			m, writeErr := w.Write(buf[:n])
			total += int64(m)
			if writeErr != nil {
				return total, writeErr
			}
			if flush {
				if flushErr := rc.Flush(); flushErr != nil {
					return total, flushErr
				}
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

// passInformational forwards 103 and the like until stop is called; 100 is each connection's own matter, and 101 never comes here.
func passInformational(w http.ResponseWriter) (trace *httptrace.ClientTrace, stop func()) {
	var mu sync.Mutex
	stopped := false // guarded by mu; afterwards w belongs to the final response
	stop = func() {
		mu.Lock()
		stopped = true
		mu.Unlock()
	}
	return &httptrace.ClientTrace{Got1xxResponse: func(code int, header textproto.MIMEHeader) error {
		mu.Lock()
		defer mu.Unlock()
		if stopped || code == http.StatusContinue || code == http.StatusSwitchingProtocols {
			return nil
		}
		h := w.Header()
		before := maps.Clone(h)
		maps.Copy(h, http.Header(header))
		w.WriteHeader(code)
		clear(h)
		maps.Copy(h, before)
		return nil
	}}, stop
}

// halfCloser is either end of a relay.
type halfCloser interface {
	io.Reader
	io.Writer
	CloseWrite() error
	Close() error
}

// relay carries bytes both ways, each direction to its own end, and returns when both are over: the bytes from a to b and back.
// An end that cannot be passed on ends both.
func relay(a, b halfCloser, idle time.Duration) (ab, ba int64) {
	watch := newIdle(idle, func() { _ = a.Close(); _ = b.Close() })
	defer watch.stop()
	var both sync.WaitGroup
	direction := func(dst, src halfCloser, n *int64) {
		var err error
		*n, err = copyBytes(dst, src, watch)
		if err == nil && dst.CloseWrite() == nil {
			return
		}
		_ = a.Close()
		_ = b.Close()
	}
	both.Go(func() { direction(b, a, &ab) })
	both.Go(func() { direction(a, b, &ba) })
	both.Wait()
	return ab, ba
}

func copyBytes(dst io.Writer, src io.Reader, watch *idleWatch) (int64, error) {
	buf := pooledBuffers.Get().(*[32 << 10]byte)
	defer pooledBuffers.Put(buf)
	var total int64
	for {
		n, err := src.Read(buf[:])
		if n > 0 {
			watch.touch()
			m, writeErr := dst.Write(buf[:n])
			total += int64(m)
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
