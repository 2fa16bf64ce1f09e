package http1

import (
	"bytes"
	"crypto/sha1"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"github.com/hanse-mesh/hanse/proxy/message"
)

// ServerConfig configures server connections. The zero value is usable.
type ServerConfig struct {
	MaxHeadBytes int           // default 64 KiB
	MaxFields    int           // default 200
	HeadTimeout  time.Duration // from the first byte of a head to its last; default 30 s
	IdleTimeout  time.Duration // between requests, and between bytes of a body; default 5 min
	WriteTimeout time.Duration // of one write; default 30 s

	OnReject func(reason string) // called for each malformed request with a constant; may be nil
	HTTP2    func(c net.Conn)    // serves a connection that begins with HTTP/2's preface, which c still has; nil: 505
	Log      *slog.Logger        // nil: none
}

func (c *ServerConfig) withDefaults() ServerConfig {
	d := *c
	set(&d.MaxHeadBytes, 64<<10)
	set(&d.MaxFields, 200)
	set(&d.HeadTimeout, 30*time.Second)
	set(&d.IdleTimeout, 5*time.Minute)
	set(&d.WriteTimeout, 30*time.Second)
	if d.OnReject == nil {
		d.OnReject = func(string) {}
	}
	if d.Log == nil {
		d.Log = slog.New(slog.DiscardHandler)
	}
	return d
}

func set[T comparable](v *T, d T) {
	var zero T
	if *v == zero {
		*v = d
	}
}

// ServerConn answers the requests of one connection, one after the other.
type ServerConn struct {
	wire
	cfg    ServerConfig
	handle func(message.ServerStream)
	head   head
	stream serverStream // of the exchange under way: one after the other

	// guarded by wire.mu
	idle     bool // between two requests, with nothing of the next
	shutdown bool
	current  *serverStream
	timer    *time.Timer // calls watch; nil: was never needed
	armed    bool        // timer runs. It is left to itself between exchanges: it fires ten times a second at most
}

// NewServerConn takes nc over. handle is called on the goroutine of Serve.
func NewServerConn(nc net.Conn, cfg *ServerConfig, handle func(message.ServerStream)) *ServerConn {
	c := &ServerConn{cfg: cfg.withDefaults(), handle: handle}
	c.nc, c.writeTimeout = nc, c.cfg.WriteTimeout
	return c
}

const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

// Serve answers until the connection has ended, and closes it. It is nil where either side ended it in order.
func (c *ServerConn) Serve() error {
	defer c.nc.Close()
	defer c.stopTimer()
	for first := true; ; first = false {
		n, err := c.readHead(first)
		switch {
		case err == errPreface && c.cfg.HTTP2 != nil:
			c.unbounded()
			c.cfg.HTTP2(&replayed{Conn: c.nc, head: bytes.Clone(c.unread())})
			return nil
		case err == errPreface:
			return c.refuse(&Reject{505, "version"})
		case errors.Is(err, errIdle):
			return nil
		case err != nil:
			var rej *Reject
			if errors.As(err, &rej) {
				return c.refuse(rej)
			}
			return err
		}
		s := &c.stream
		c.mu.Lock()
		*s = serverStream{c: c, over: true} // until it has begun
		c.mu.Unlock()
		if rej := parseRequest(c.buf[c.r:c.r+n], &s.request, &c.head, c.cfg.MaxFields); rej != nil {
			return c.refuse(rej)
		}
		c.r += n
		s.begin()
		if !c.exchange(s) {
			return nil
		}
	}
}

var (
	errPreface = errors.New("http1: HTTP/2 preface")
	errIdle    = errors.New("http1: idle connection ended")
)

// readHead reads until a head is whole, and returns its length.
func (c *ServerConn) readHead(first bool) (int, error) {
	scanned := 0
	for {
		b := c.unread()
		if first && len(b) > 0 && len(b) < len(preface) && strings.HasPrefix(preface, string(b)) {
			scanned = 0 // wait for more
		} else if first && len(b) >= len(preface) && string(b[:len(preface)]) == preface {
			return 0, errPreface
		} else if n := headEnd(b, scanned); n > 0 {
			if n > c.cfg.MaxHeadBytes {
				return 0, &Reject{431, "head_too_large"}
			}
			return n, nil
		} else if len(b) >= c.cfg.MaxHeadBytes {
			return 0, tooLarge(b)
		} else if e := early(b); e != nil {
			return 0, e
		}
		scanned = len(b)
		limit := c.cfg.HeadTimeout
		if len(b) == 0 {
			limit = c.cfg.IdleTimeout
			if !c.rest(true) {
				return 0, errIdle
			}
		}
		c.within(limit)
		err := c.fill(c.cfg.MaxHeadBytes)
		if len(b) == 0 && !c.rest(false) && err == nil {
			return 0, errIdle
		}
		if err != nil {
			var timeout net.Error
			switch {
			case len(b) == 0:
				return 0, errIdle
			case errors.As(err, &timeout) && timeout.Timeout():
				return 0, &Reject{408, "head_timeout"}
			}
			return 0, err
		}
	}
}

func tooLarge(b []byte) *Reject {
	if bytes.IndexByte(b[:min(len(b), maxRequestLine)], '\n') < 0 {
		return &Reject{414, "request_line_too_long"}
	}
	return &Reject{431, "head_too_large"}
}

// early refuses what can never become a request, so that nobody waits for its rest.
func early(b []byte) *Reject {
	for i, c := range b[:min(len(b), 24)] {
		switch {
		case c == ' ' && i > 0:
			return nil
		case c == '\r' && i > 0, c < ' ' && c != '\r' && c != '\n' && c != '\t' || c >= 0x7f:
			return notHTTP
		case !tokenBytes[c]:
			return bad("request_line")
		}
	}
	return nil
}

// rest notes whether the connection waits for a request. It is false once the connection is to end.
func (c *ServerConn) rest(idle bool) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.idle = idle
	return !c.shutdown
}

// Shutdown ends the connection after the current exchange; at once if there is none.
func (c *ServerConn) Shutdown() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.shutdown = true
	if c.idle {
		_ = c.nc.SetReadDeadline(time.Unix(1, 0))
	}
}

func (c *ServerConn) stopTimer() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.timer != nil {
		c.timer.Stop()
	}
}

// Close ends the connection at once, and what is open on it.
func (c *ServerConn) Close() {
	_ = c.nc.Close()
	c.mu.Lock()
	s := c.current
	c.mu.Unlock()
	if s != nil {
		s.broken(&message.Error{Sent: true, Err: net.ErrClosed})
	}
}

// refuse answers bytes that are no request, and ends the connection.
func (c *ServerConn) refuse(r *Reject) error {
	c.cfg.OnReject(r.Reason)
	if r.Status == 0 {
		return r
	}
	text := fmt.Sprintf("%s: %s\n", strings.ToLower(http.StatusText(r.Status)), strings.ReplaceAll(r.Reason, "_", " "))
	c.mu.Lock()
	c.add(fmt.Sprintf("HTTP/1.1 %d %s\r\ncontent-type: text/plain; charset=utf-8\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s", r.Status, http.StatusText(r.Status), len(text), text))
	err := c.flush()
	c.mu.Unlock()
	if err == nil {
		c.linger()
	}
	return r
}

const (
	lingerTime  = 500 * time.Millisecond
	lingerBytes = 256 << 10
)

// linger lets the peer read the answer before the connection goes: closing with bytes unread would destroy it (RFC 9112 §9.6).
func (c *ServerConn) linger() {
	if c.closeWrite() != nil {
		return
	}
	_ = c.nc.SetReadDeadline(time.Now().Add(lingerTime))
	_, _ = io.CopyN(io.Discard, c.nc, lingerBytes)
}

// exchange runs the handler, and reports whether another request may follow.
func (c *ServerConn) exchange(s *serverStream) (again bool) {
	c.mu.Lock()
	c.current, s.over = s, false
	c.mu.Unlock()
	func() {
		defer func() {
			if p := recover(); p != nil {
				c.cfg.Log.Error("panic in an HTTP/1.1 handler", "panic", p, "stack", string(debug.Stack()))
			}
		}()
		c.handle(s)
	}()
	return s.finish()
}

// serverStream is one exchange.
type serverStream struct {
	c       *ServerConn
	request message.Request

	// of the reader
	in body

	// guarded by wire.mu
	continues  bool // 100 (Continue) is awaited
	minor      byte
	closing    bool // the connection ends with this exchange
	responded  bool
	tunnel     bool // raw bytes from here on
	isHead     bool
	noBody     bool
	chunk      bool
	left       int64 // to be written; message.Unknown
	ended      bool
	err        error
	onAbort    func(err error)
	calling    bool
	readClosed bool
	watching   chan struct{} // closed when the background read has ended; nil: there is none
	since      time.Time     // of the first OnAbort
	cond       sync.Cond
	over       bool // the handler has returned
}

// begin sets up what follows the head.
func (s *serverStream) begin() {
	c, h := s.c, &s.c.head
	s.cond.L = &c.mu
	s.minor = h.minor
	s.closing = h.close || h.minor == 0 && !h.keepAlive
	s.isHead = s.request.Method == "HEAD"
	s.continues = h.expect && h.minor == 1 && (h.chunked || h.length > 0)
	s.left = message.Unknown
	switch {
	case s.request.Method == "CONNECT" || s.request.Protocol != "":
		s.in.kind = untilClose
	case h.chunked:
		s.in = body{kind: chunked, chunks: chunks{request: true, maxHead: c.cfg.MaxHeadBytes, maxFields: c.cfg.MaxFields}}
	case h.length > 0:
		s.in = body{kind: fixed, left: h.length}
	}
}

// Request implements message.ServerStream, as do the others.
func (s *serverStream) Request() *message.Request { return &s.request }

// Read implements message.ServerStream.
func (s *serverStream) Read(p []byte) (int, error) {
	c := s.c
	if s.in.kind == untilClose {
		return s.readRaw(p)
	}
	if s.in.over() {
		return 0, io.EOF
	}
	c.mu.Lock()
	if s.err != nil || s.readClosed {
		defer c.mu.Unlock()
		if s.err != nil {
			return 0, s.err
		}
		return 0, errReadClosed
	}
	if s.continues {
		s.continues = false
		if !s.responded {
			c.add("HTTP/1.1 100 Continue\r\n\r\n")
			_ = c.flush()
		}
	}
	if len(c.unread()) == 0 {
		c.within(c.cfg.IdleTimeout)
	}
	c.mu.Unlock()
	n, err := c.body(&s.in, p)
	if err != nil && !errors.Is(err, io.EOF) {
		c.mu.Lock()
		closed := s.readClosed
		c.mu.Unlock()
		if closed {
			return n, errReadClosed
		}
		var rej *Reject
		if errors.As(err, &rej) {
			c.cfg.OnReject(rej.Reason)
		}
		s.broken(&message.Error{Sent: true, Err: err})
	}
	return n, err
}

var errReadClosed = &message.Error{Sent: true, Err: errors.New("http1: reading has been given up")}

// CloseRead implements message.ServerStream.
func (s *serverStream) CloseRead() {
	c := s.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if !s.readClosed && !s.over {
		s.readClosed = true
		c.readDeadline = time.Unix(1, 0)
		_ = c.nc.SetReadDeadline(c.readDeadline)
	}
}

// readRaw is Read after an upgrade or CONNECT was accepted; before, there is nothing to read.
func (s *serverStream) readRaw(p []byte) (int, error) {
	c := s.c
	s.stopWatch()
	c.mu.Lock()
	tunnel, err := s.tunnel, s.err
	if err == nil && s.readClosed {
		err = errReadClosed
	}
	if err == nil && tunnel {
		c.unbounded()
	}
	c.mu.Unlock()
	switch {
	case err != nil:
		return 0, err
	case !tunnel:
		return 0, io.EOF
	}
	n, err := c.body(&s.in, p)
	if err != nil && !errors.Is(err, io.EOF) {
		s.broken(&message.Error{Sent: true, Err: err})
	}
	return n, err
}

// Ready implements message.ServerStream.
func (s *serverStream) Ready() bool {
	s.c.mu.Lock()
	waits := s.continues && !s.responded
	raw := s.in.kind == untilClose && !s.tunnel
	s.c.mu.Unlock()
	return raw || !waits && s.c.ready(&s.in)
}

// Trailers implements message.ServerStream.
func (s *serverStream) Trailers() message.Fields { return s.in.chunks.trailers }

// broken ends the exchange because the caller is gone, or has sent what is no body.
func (s *serverStream) broken(err error) {
	c := s.c
	c.mu.Lock()
	if s.err != nil || s.over {
		c.mu.Unlock()
		return
	}
	s.err, s.closing = err, true
	f := s.onAbort
	s.onAbort = nil
	s.calling = f != nil
	c.mu.Unlock()
	if f == nil {
		return
	}
	f(err)
	c.mu.Lock()
	s.calling = false
	s.cond.Broadcast()
	c.mu.Unlock()
}

// watchAfter is how long a handler works before somebody looks whether the caller is still there.
const watchAfter = 100 * time.Millisecond

// OnAbort implements message.ServerStream.
func (s *serverStream) OnAbort(f func(err error)) {
	c := s.c
	c.mu.Lock()
	for s.calling {
		s.cond.Wait()
	}
	err := s.err
	s.onAbort = nil
	if err == nil {
		s.onAbort = f
	}
	if f != nil && err == nil && s.since.IsZero() && s.in.over() {
		s.since = c.readAt // just before the head came, or long before: then it was waiting behind another
		c.arm(watchAfter)
	}
	c.mu.Unlock()
	if err != nil && f != nil {
		f(err)
	}
}

// arm lets watch be called. It needs mu.
func (c *ServerConn) arm(after time.Duration) {
	switch {
	case c.armed:
		return
	case c.timer == nil:
		c.timer = time.AfterFunc(after, c.watch)
	default:
		c.timer.Reset(after)
	}
	c.armed = true
}

// watch reads ahead while a handler works, to see the caller go. What comes is kept for the next request.
func (c *ServerConn) watch() {
	c.mu.Lock()
	c.armed = false
	s := c.current
	if s == nil || s.over || s.err != nil || s.onAbort == nil || s.since.IsZero() || s.watching != nil || s.tunnel || c.w > c.r {
		c.mu.Unlock()
		return
	}
	if left := watchAfter - time.Since(s.since); left > 0 { // armed for an exchange before
		c.arm(left)
		c.mu.Unlock()
		return
	}
	done := make(chan struct{})
	s.watching = done
	c.mu.Unlock()
	c.unbounded()
	err := c.fill(c.cfg.MaxHeadBytes)
	c.mu.Lock()
	stopped := s.over || s.tunnel || c.shutdown
	c.mu.Unlock()
	var timeout net.Error
	if err != nil && !stopped && !(errors.As(err, &timeout) && timeout.Timeout()) {
		s.broken(&message.Error{Sent: true, Err: err})
	}
	close(done) // from here on s may be another exchange
}

// stopWatch ends the background read, so that another may read.
func (s *serverStream) stopWatch() {
	c := s.c
	c.mu.Lock()
	done := s.watching
	c.mu.Unlock()
	if done == nil {
		return
	}
	for { // until it has seen the deadline: it may set its own first
		_ = c.nc.SetReadDeadline(time.Unix(1, 0))
		select {
		case <-done:
			c.readDeadline = time.Unix(1, 0)
			c.unbounded()
			c.mu.Lock()
			s.watching = nil
			c.mu.Unlock()
			return
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// Inform implements message.ServerStream.
func (s *serverStream) Inform(status int, fields message.Fields) error {
	if status < 102 || status > 199 || s.minor == 0 {
		return nil
	}
	c := s.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if s.responded || s.err != nil {
		return s.err
	}
	c.statusLine(status)
	c.addFields(fields)
	c.add("\r\n")
	return s.wrote(c.flush())
}

func (w *wire) statusLine(status int) {
	if status == 200 {
		w.add("HTTP/1.1 200 OK\r\n")
		return
	}
	w.add("HTTP/1.1 ")
	w.addInt(int64(status))
	w.add(" ")
	w.add(http.StatusText(status))
	w.add("\r\n")
}

func (s *serverStream) wrote(err error) error {
	if err == nil {
		return nil
	}
	s.closing = true
	if s.err == nil {
		s.err = &message.Error{Sent: true, Err: err}
	}
	return s.err
}

var errResponded = &message.Error{Sent: true, Err: errors.New("http1: there is an answer already")}

// Respond implements message.ServerStream.
func (s *serverStream) Respond(r *message.Response, end bool) error {
	c := s.c
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case s.err != nil:
		return s.err
	case s.responded:
		return errResponded
	case r.Status == 101 && s.request.Protocol == "" || r.Status < 101 || r.Status > 999:
		return &message.Error{Sent: true, Err: message.ErrUnsupported}
	}
	s.responded = true
	c.statusLine(r.Status)
	c.addFields(r.Fields)
	s.tunnel = r.Status == 101 || s.request.Method == "CONNECT" && r.Status/100 == 2
	if s.in.kind == untilClose && !s.tunnel {
		s.closing = true // what follows the request was meant for somebody else
	}
	switch {
	case s.tunnel:
		s.closing = true
		if r.Status == 101 {
			s.switching(r)
		}
		c.add("\r\n")
		return s.wrote(c.flush())
	case s.isHead || r.Status == 304:
		s.noBody = true
		if r.Length > 0 || r.Length == 0 && s.isHead {
			c.length(r.Length)
		}
	case r.Status == 204:
		s.noBody = true
	case end:
		c.length(0)
	case r.Length >= 0:
		s.left = r.Length
		c.length(r.Length)
	case s.minor == 0:
		s.closing = true // the end of the connection is the end of the body
	default:
		s.chunk = true
		c.add("transfer-encoding: chunked\r\n")
	}
	s.closing = s.closing || c.shutdown
	switch {
	case s.closing:
		c.add("connection: close\r\n")
	case s.minor == 0:
		c.add("connection: keep-alive\r\n")
	}
	c.add("\r\n")
	if end {
		s.ended = true
		return s.wrote(c.flush())
	}
	return nil
}

func (w *wire) length(n int64) {
	w.add("content-length: ")
	w.addInt(n)
	w.add("\r\n")
}

// switching adds what an answer to Upgrade needs. It needs mu.
func (s *serverStream) switching(r *message.Response) {
	c := s.c
	c.add("connection: upgrade\r\nupgrade: ")
	c.add(s.request.Protocol)
	c.add("\r\n")
	key, has := s.request.Fields.Get("sec-websocket-key")
	if _, answered := r.Fields.Get("sec-websocket-accept"); has && !answered && s.request.Protocol == "websocket" {
		c.add("sec-websocket-accept: " + accept(key) + "\r\n")
	}
}

// accept is RFC 6455 §4.2.2.
func accept(key string) string {
	sum := sha1.Sum([]byte(key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
	return base64.StdEncoding.EncodeToString(sum[:])
}

// Write implements message.ServerStream. The body of a response that has none is dropped.
func (s *serverStream) Write(p []byte) (int, error) {
	c := s.c
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case s.err != nil:
		return 0, s.err
	case !s.responded || s.ended:
		return 0, &message.Error{Sent: true, Err: errors.New("http1: body before the head, or after the end")}
	case s.noBody || len(p) == 0:
		return len(p), nil
	}
	if s.left >= 0 {
		if s.left -= int64(len(p)); s.left < 0 {
			return 0, &message.Error{Sent: true, Err: errors.New("http1: body longer than announced")}
		}
	}
	if err := s.wrote(c.write(p, s.chunk)); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Flush implements message.ServerStream.
func (s *serverStream) Flush() error {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	if s.err != nil {
		return s.err
	}
	return s.wrote(s.c.flush())
}

// End implements message.ServerStream. Trailers are dropped where the caller cannot take them.
func (s *serverStream) End(trailers message.Fields) error {
	c := s.c
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case s.err != nil:
		return s.err
	case s.ended:
		return nil
	case !s.responded || s.left > 0:
		return &message.Error{Sent: true, Err: errors.New("http1: body shorter than announced")}
	}
	s.ended = true
	if s.tunnel {
		if err := s.wrote(c.flush()); err != nil {
			return err
		}
		return s.wrote(c.closeWrite())
	}
	if s.chunk {
		c.add("0\r\n")
		c.addFields(trailers)
		c.add("\r\n")
	}
	return s.wrote(c.flush())
}

var errAborted = errors.New("http1: exchange broken off")

// Abort implements message.ServerStream.
func (s *serverStream) Abort(err error) {
	c := s.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if s.ended && !s.tunnel || s.over {
		return
	}
	if err == nil {
		err = errAborted
	}
	if s.err == nil {
		s.err = &message.Error{Sent: true, Err: err}
	}
	s.closing, s.onAbort = true, nil
	if l, ok := c.nc.(interface{ SetLinger(int) error }); ok && s.responded && !s.chunk && s.left < 0 {
		_ = l.SetLinger(0) // where only the connection's end tells the body's, a reset tells that it is not whole
	}
	_ = c.nc.Close()
}

// maxDrain is how much of a body that nobody wanted is read to keep the connection.
const maxDrain = 64 << 10

// finish ends what the handler has left open, and reports whether another request may follow.
func (s *serverStream) finish() bool {
	c := s.c
	c.mu.Lock()
	s.over = true // from here on nobody begins to read ahead
	s.onAbort = nil
	for s.calling {
		s.cond.Wait()
	}
	whole := s.ended && s.err == nil
	again := whole && !s.closing && !c.shutdown
	awaited := s.continues
	c.mu.Unlock()
	s.stopWatch()
	if !whole {
		return false
	}
	if s.tunnel {
		return false
	}
	if !s.in.over() {
		// A caller that still waits for 100 (Continue) may send the body or not: only the end of the connection tells.
		if !again || awaited || !s.drain() {
			c.linger()
			return false
		}
	}
	if !again {
		c.linger()
	}
	return again
}

// drain reads the rest of a short body.
func (s *serverStream) drain() bool {
	c := s.c
	if s.in.kind == fixed && s.in.left > maxDrain {
		return false
	}
	buf := make([]byte, 4<<10)
	_ = c.nc.SetReadDeadline(time.Now().Add(lingerTime))
	c.readDeadline = time.Unix(1, 0)
	for n := 0; n <= maxDrain; {
		m, err := c.body(&s.in, buf)
		n += m
		if errors.Is(err, io.EOF) {
			return true
		}
		if err != nil {
			return false
		}
	}
	return false
}

// replayed is a connection whose first bytes were read already.
type replayed struct {
	net.Conn
	head []byte
}

// Read implements net.Conn.
func (r *replayed) Read(p []byte) (int, error) {
	if len(r.head) > 0 {
		n := copy(p, r.head)
		if r.head = r.head[n:]; len(r.head) == 0 {
			r.head = nil
		}
		return n, nil
	}
	return r.Conn.Read(p)
}

// CloseWrite implements half-closing.
func (r *replayed) CloseWrite() error {
	if w, ok := r.Conn.(interface{ CloseWrite() error }); ok {
		return w.CloseWrite()
	}
	return errors.ErrUnsupported
}
