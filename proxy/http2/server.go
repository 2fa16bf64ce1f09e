package http2

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime/debug"
	"sync"
	"time"

	xhttp2 "golang.org/x/net/http2"

	"github.com/hanse-mesh/hanse/proxy/message"
)

// ServerConn is the server's end of a connection.
type ServerConn struct {
	conn
	handle func(message.ServerStream)

	handlers sync.WaitGroup

	// guarded by conn.mu
	running   int // handlers
	goingAway bool
	farewells bool // the last id was told
	idle      []chan *serverStream
	idleFrom  time.Time
	timer     *time.Timer
	asked     uint64 // frames read when the silent peer was asked; 0: it was not
	seen      uint64 // frames read at the last look
	seenAt    time.Time
}

// NewServerConn takes nc over. handle is called for each exchange, on a goroutine of its own.
func NewServerConn(nc net.Conn, cfg Config, handle func(message.ServerStream)) *ServerConn {
	c := &ServerConn{handle: handle}
	c.init(nc, cfg, false)
	c.server = c
	return c
}

var errPreface = errors.New("http2: no client preface")

const prefaceTimeout = 10 * time.Second

// Serve answers until the connection has ended and all handlers have returned. It is nil where the peer, or GoAway, ended it.
func (c *ServerConn) Serve() error {
	defer c.handlers.Wait()
	defer c.releaseIdle(0)
	c.mu.Lock()
	c.idleFrom, c.seenAt = time.Now(), time.Now()
	if every := c.interval(); every > 0 && c.err == nil {
		c.timer = time.AfterFunc(every, c.maintain)
		defer c.timer.Stop()
	}
	c.flush()
	_ = c.nc.SetReadDeadline(time.Now().Add(prefaceTimeout))
	var preface [len(xhttp2.ClientPreface)]byte
	if _, err := io.ReadFull(c.nc, preface[:]); err != nil || !bytes.Equal(preface[:], []byte(xhttp2.ClientPreface)) {
		c.cfg.OnReject("preface")
		if err == nil {
			c.mu.Lock()
			c.goAwayFrame(0, xhttp2.ErrCodeProtocol, "")
			c.mu.Unlock()
			c.farewell(errPreface)
		} else {
			c.fail(fmt.Errorf("%w: %w", errPreface, err))
		}
		return errPreface
	}
	_ = c.nc.SetReadDeadline(time.Time{})
	c.read()
	if err := c.Err(); !errors.Is(err, ErrClosed) {
		return err
	}
	return nil
}

// serverStream is one exchange.
type serverStream struct {
	stream
	request message.Request
	fields  [12]message.Field // backs the request's
	head    bool              // HEAD: the response has no body

	// guarded by conn.mu
	responded bool
	noBody    bool
}

func (c *conn) requestHead(id uint32) error {
	h := &c.head
	c.mu.Lock()
	if st := c.streams[id]; st != nil {
		return c.requestTrailers(st)
	}
	switch {
	case c.err != nil: // writing has failed, and nobody would end this stream
		defer c.mu.Unlock()
		return c.err
	case id%2 == 0:
		c.mu.Unlock()
		return &connError{xhttp2.ErrCodeProtocol, "HEADERS of an even stream"}
	case id <= c.lastID:
		late := c.remembered(id)
		c.mu.Unlock()
		if late {
			return c.calm()
		}
		return &connError{xhttp2.ErrCodeStreamClosed, "HEADERS of a closed stream"}
	}
	sc := c.server
	c.lastID = id
	if sc.farewells || sc.running >= int(c.cfg.MaxStreams) {
		c.frame32(xhttp2.FrameRSTStream, id, uint32(xhttp2.ErrCodeRefusedStream))
		c.remember(id)
		err := c.answered()
		flood := c.floodOfResets()
		c.mu.Unlock()
		if err == nil && flood {
			err = &connError{xhttp2.ErrCodeEnhanceYourCalm, "flood of streams"}
		}
		return err
	}
	s := &serverStream{}
	s.init(c, id)
	s.server = s
	s.gen = c.gen - 1
	r := &s.request
	h.request(r, s.fields[:0])
	if h.malformed != "" {
		c.mu.Unlock()
		return c.malformed(id)
	}
	if h.tooLarge { // RFC 6585 §5
		c.cfg.OnReject("head_too_large")
		c.encodeResponse(431, nil, 0)
		c.headers(id, true)
		if !h.end {
			c.frame32(xhttp2.FrameRSTStream, id, uint32(xhttp2.ErrCodeNo))
		}
		c.remember(id)
		err := c.answered()
		c.mu.Unlock()
		return err
	}
	s.head, s.recvEnd, s.expect = r.Method == "HEAD", h.end, r.Length
	c.streams[id] = &s.stream
	sc.start(s)
	c.mu.Unlock()
	return nil
}

// requestTrailers needs mu, and gives it up.
func (c *conn) requestTrailers(st *stream) error {
	h := &c.head
	id := st.id
	switch {
	case st.recvEnd:
		c.mu.Unlock()
		return xhttp2.StreamError{StreamID: id, Code: xhttp2.ErrCodeStreamClosed}
	case !h.end:
		h.bad("trailers_without_end")
	case h.tooLarge:
		h.bad("head_too_large")
	case st.expect > 0:
		h.bad("content_length")
	}
	trailer := h.trailers()
	if h.malformed != "" {
		c.mu.Unlock()
		return c.malformed(id)
	}
	st.trailer, st.recvEnd = trailer, true
	c.over(st)
	st.cond.Broadcast()
	c.mu.Unlock()
	return nil
}

// start runs the handler, on a goroutine that has served before if one rests. It needs mu.
func (c *ServerConn) start(s *serverStream) {
	c.running++
	c.handlers.Add(1)
	if n := len(c.idle); n > 0 {
		c.idle[n-1] <- s
		c.idle = c.idle[:n-1]
		return
	}
	go c.work(s)
}

const maxIdleWorkers = 256

// work serves one stream after the other: a goroutine that has grown its stack is worth keeping for a while.
func (c *ServerConn) work(s *serverStream) {
	next := make(chan *serverStream, 1)
	for s != nil {
		c.serve(s)
		c.mu.Lock()
		c.running--
		if c.running == 0 {
			c.idleFrom = time.Now()
		}
		rest := len(c.idle) < maxIdleWorkers && c.err == nil && !c.goingAway && c.timer != nil
		if rest {
			c.idle = append(c.idle, next)
		}
		over := c.overLocked()
		c.mu.Unlock()
		c.handlers.Done()
		if over {
			go c.end()
		}
		if !rest {
			return
		}
		s = <-next
	}
}

// releaseIdle lets all resting goroutines but keep end.
func (c *ServerConn) releaseIdle(keep int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(c.idle) > keep {
		n := len(c.idle) - 1
		c.idle[n] <- nil
		c.idle = c.idle[:n]
	}
}

func (c *ServerConn) serve(s *serverStream) {
	defer func() {
		if p := recover(); p != nil {
			c.cfg.Log.Error("panic in an HTTP/2 handler", "panic", p, "stack", string(debug.Stack()))
		}
		s.finish()
	}()
	c.handle(s)
}

var errNoAnswer = errors.New("http2: the handler has returned before its answer was whole")

// finish ends what the handler has left open.
func (s *serverStream) finish() {
	c := s.c
	c.mu.Lock()
	s.onAbort = nil
	s.readClosed = true
	s.cond.Broadcast()
	for s.calling {
		s.cond.Wait()
	}
	switch {
	case s.off:
	case !s.sentEnd:
		s.fail(&message.Error{Sent: true, Err: errNoAnswer}, nil)
		c.reset(&s.stream, xhttp2.ErrCodeInternal)
	default: // RFC 9113 §8.1: the rest of the request is not wanted
		c.reset(&s.stream, xhttp2.ErrCodeNo)
	}
	s.release()
	c.flush()
}

// Request implements message.ServerStream, as do the others.
func (s *serverStream) Request() *message.Request { return &s.request }

// OnAbort implements message.ServerStream.
func (s *serverStream) OnAbort(f func(err error)) { s.setOnAbort(f) }

var errResponded = errors.New("http2: there is an answer already")

// Inform implements message.ServerStream.
func (s *serverStream) Inform(status int, fields message.Fields) error {
	if status < 102 || status > 199 {
		return nil
	}
	c := s.c
	c.mu.Lock()
	if s.err != nil || s.responded {
		defer c.mu.Unlock()
		if s.err != nil {
			return s.err
		}
		return &message.Error{Sent: true, Err: errResponded}
	}
	c.encodeResponse(status, fields, message.Unknown)
	c.headers(s.id, false)
	c.flush()
	return nil
}

// Respond implements message.ServerStream.
func (s *serverStream) Respond(r *message.Response, end bool) error {
	c := s.c
	c.mu.Lock()
	switch {
	case s.err != nil:
		defer c.mu.Unlock()
		return s.err
	case s.responded:
		c.mu.Unlock()
		return &message.Error{Sent: true, Err: errResponded}
	case s.request.Protocol != "" && r.Status/100 == 2, r.Status == 101 && s.request.Protocol == "":
		c.mu.Unlock()
		return &message.Error{Sent: true, Err: message.ErrUnsupported}
	}
	status, length := r.Status, r.Length
	tunnel := status == 101 || s.request.Method == "CONNECT" && status/100 == 2
	switch {
	case tunnel:
		status, length = 200, message.Unknown
		if r.Status != 101 {
			status = r.Status
		}
	case status == 204, status == 304 && length == 0:
		length = message.Unknown
	case end && length < 0 && !s.head && status != 304:
		length = 0
	}
	s.responded = true
	c.answeredStreams++
	s.noBody = s.head || status == 204 || status == 304
	if !tunnel && !s.noBody {
		s.promised = r.Length
	}
	c.encodeResponse(status, r.Fields, length)
	c.buf()
	s.lastFrame, s.lastGen = len(c.pending), c.gen
	c.headers(s.id, end)
	if !end {
		s.held = true
		c.mu.Unlock()
		return nil
	}
	s.sentEnd = true
	c.over(&s.stream)
	s.held = false
	c.flush()
	return nil
}

// Write implements message.ServerStream. The body of a response that has none is dropped.
func (s *serverStream) Write(p []byte) (int, error) {
	s.c.mu.Lock()
	noBody, responded := s.noBody, s.responded
	s.c.mu.Unlock()
	switch {
	case !responded:
		return 0, &message.Error{Sent: true, Err: errors.New("http2: body before the head")}
	case noBody:
		return len(p), nil
	}
	return s.stream.Write(p)
}

// Abort implements message.ServerStream.
func (s *serverStream) Abort(err error) {
	c := s.c
	c.mu.Lock()
	if !s.sentEnd {
		if err == nil {
			err = ErrAborted
		}
		if s.err == nil {
			s.fail(&message.Error{Sent: true, Err: err}, nil)
			s.onAbort, s.calling = nil, false
		}
		c.reset(&s.stream, xhttp2.ErrCodeInternal)
	}
	c.flush()
}

// GoAway asks the peer to go elsewhere: what it has sent by then is still answered, then the connection ends.
func (c *ServerConn) GoAway() {
	c.mu.Lock()
	if c.goingAway || c.err != nil {
		c.mu.Unlock()
		return
	}
	c.goingAway = true
	c.goAwayFrame(maxWindow, xhttp2.ErrCodeNo, "")
	c.pingID++
	answer := make(chan struct{})
	if c.pings == nil {
		c.pings = map[uint64]chan struct{}{}
	}
	c.pings[c.pingID] = answer
	c.pingFrame(0, c.pingID)
	c.flushSoon()
	c.mu.Unlock()
	go func() { // ends by itself after lingerTimeout
		wait := time.NewTimer(lingerTimeout)
		defer wait.Stop()
		select {
		case <-answer:
		case <-wait.C:
		case <-c.done:
			return
		}
		c.mu.Lock()
		c.goAwayFrame(c.lastID, xhttp2.ErrCodeNo, "")
		c.farewells = true
		over := c.overLocked()
		c.flush()
		if over {
			c.end()
		}
	}()
}

// overLocked says whether nothing is left to wait for. It needs mu.
func (c *ServerConn) overLocked() bool {
	return c.farewells && c.running == 0 && c.err == nil
}

// end closes a connection that has said goodbye: the peer may close first.
func (c *ServerConn) end() {
	c.mu.Lock()
	c.waiting++
	stop := time.AfterFunc(lingerTimeout, func() { c.fail(ErrClosed) })
	c.flushSoon()
	for c.err == nil && (c.flushing || len(c.pending) > 0) {
		c.room.Wait()
	}
	c.waiting--
	c.mu.Unlock()
	if w, ok := c.nc.(interface{ CloseWrite() error }); ok && w.CloseWrite() == nil {
		wait := time.NewTimer(lingerTimeout / 2)
		defer wait.Stop()
		select {
		case <-c.done:
		case <-wait.C:
		}
	}
	stop.Stop()
	c.fail(ErrClosed)
}

// Close ends the connection at once; open streams fail with cause.
func (c *ServerConn) Close(cause error) {
	if cause == nil {
		cause = ErrClosed
	}
	c.fail(cause)
}

// interval of maintain.
func (c *ServerConn) interval() time.Duration {
	every := 10 * time.Second
	if c.cfg.IdleTimeout > 0 {
		every = min(every, c.cfg.IdleTimeout/4)
	}
	if c.cfg.PingAfter > 0 {
		every = min(every, c.cfg.PingAfter/4)
	}
	return max(every, 5*time.Millisecond)
}

// maintain looks after a connection now and then: goroutines that rest, idleness, silence.
func (c *ServerConn) maintain() {
	now := time.Now()
	frames := c.frames.Load()
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return
	}
	if frames != c.seen {
		c.seen, c.seenAt, c.asked = frames, now, 0
	}
	silent := now.Sub(c.seenAt)
	idle := c.running == 0 && c.cfg.IdleTimeout > 0 && now.Sub(c.idleFrom) >= c.cfg.IdleTimeout
	rest := c.running == 0
	dead := false
	if c.cfg.PingAfter > 0 && silent >= c.cfg.PingAfter {
		switch {
		case c.asked == 0:
			c.asked = frames + 1
			c.pingID++
			c.pingFrame(0, c.pingID)
			c.flushSoon()
		case silent >= 2*c.cfg.PingAfter:
			dead = true
		}
	}
	c.timer.Reset(c.interval())
	c.mu.Unlock()
	switch {
	case dead:
		c.fail(ErrDead)
	case idle:
		c.GoAway()
	}
	if rest {
		c.releaseIdle(0)
	}
}
