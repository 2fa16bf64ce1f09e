package http2

import (
	"net"
	"slices"

	xhttp2 "golang.org/x/net/http2"

	"github.com/hanse-mesh/hanse/proxy/message"
)

// ClientConn is the client's end of a connection. It is safe for concurrent use.
type ClientConn struct{ conn }

// NewClientConn takes nc over and reads it until it ends. The preface goes out with the first request or PING.
func NewClientConn(nc net.Conn, cfg Config) *ClientConn {
	c := &ClientConn{}
	c.init(nc, cfg, true)
	go c.read()
	return c
}

// ClientStream is one exchange. It implements message.ClientStream, and belongs where its user wants it: Begin takes a zero one.
type ClientStream struct {
	stream
	isHead  bool // HEAD: no body, whatever the length says
	upgrade bool
	inform  func(status int, fields message.Fields)

	// guarded by conn.mu
	informs  []message.Response
	response *message.Response // final, once it is there
	final    message.Response
	fields   [8]message.Field // backs its fields
}

// Open begins an exchange. It does not wait: a peer's limit is ErrFull, within a *message.Error that says that nothing was sent.
func (c *ClientConn) Open(r *message.Request, o message.Options) (message.ClientStream, error) {
	s := new(ClientStream)
	if err := c.Begin(s, r, o); err != nil {
		return nil, err
	}
	return s, nil
}

// Begin is Open with a stream of the caller's.
func (c *ClientConn) Begin(s *ClientStream, r *message.Request, o message.Options) error {
	s.isHead, s.upgrade, s.inform = r.Method == "HEAD", r.Protocol != "", o.Inform
	c.mu.Lock()
	var err error
	switch {
	case c.err != nil:
		err = c.err
	case c.draining || c.nextID > maxWindow:
		err = ErrGoAway
	case len(c.streams) >= int(min(c.peerStreams, c.cfg.MaxStreams)):
		err = ErrFull
	case r.Protocol != "" && c.peerKnown && !c.peerConnect:
		err = message.ErrUnsupported
	}
	if err != nil {
		c.mu.Unlock()
		return &message.Error{Err: err}
	}
	s.init(&c.conn, c.nextID)
	c.nextID += 2
	s.client = s
	c.streams[s.id] = &s.stream
	c.encodeRequest(r)
	c.buf()
	s.gen = c.gen
	s.lastFrame, s.lastGen = len(c.pending), c.gen
	c.headers(s.id, o.End)
	s.held = true
	switch {
	case o.End:
		s.sentEnd = true
	case r.Method != "CONNECT" && r.Protocol == "":
		s.promised = r.Length
	}
	c.mu.Unlock()
	return nil
}

// Response implements message.ClientStream.
func (s *ClientStream) Response() (*message.Response, error) {
	c := s.c
	c.mu.Lock()
	if s.held {
		s.flushLocked()
		c.mu.Lock()
	}
	for {
		switch {
		case len(s.informs) > 0:
			r := s.informs[0]
			s.informs = s.informs[1:]
			c.mu.Unlock()
			if s.inform != nil {
				s.inform(r.Status, r.Fields)
			}
			c.mu.Lock()
			continue
		case s.response != nil:
			c.mu.Unlock()
			return s.response, nil
		case s.err != nil:
			defer c.mu.Unlock()
			return nil, s.err
		}
		s.cond.Wait()
	}
}

// Cancel implements message.ClientStream.
func (s *ClientStream) Cancel(err error) {
	c := s.c
	c.mu.Lock()
	s.cancel(err)
	c.flush()
}

// cancel needs mu.
func (s *ClientStream) cancel(err error) {
	if err == nil {
		err = ErrAborted
	}
	if s.err == nil {
		s.fail(&message.Error{Sent: s.gen != s.c.gen || s.off, Err: err}, nil)
	}
	s.c.reset(&s.stream, xhttp2.ErrCodeCancel)
	s.release()
}

// release gives back what was not read. It needs mu.
func (s *stream) release() {
	s.abandoned = true
	if n := int64(s.body.size); n > 0 {
		s.body.drop()
		s.c.consumed(s, n)
	}
}

// Close implements message.ClientStream.
func (s *ClientStream) Close() {
	c := s.c
	c.mu.Lock()
	if s.off && s.body.size == 0 {
		drained := c.drainedLocked()
		c.mu.Unlock()
		if drained {
			go c.farewell(ErrClosed)
		}
		return
	}
	s.cancel(nil)
	drained := c.drainedLocked()
	c.flush()
	if drained {
		go c.farewell(ErrClosed)
	}
}

const maxInforms = 16

func (c *conn) responseHead(id uint32) error {
	h := &c.head
	c.mu.Lock()
	st := c.streams[id]
	if st == nil {
		idle := c.idle(id)
		c.mu.Unlock()
		if idle {
			return &connError{xhttp2.ErrCodeProtocol, "HEADERS of an idle stream"}
		}
		return c.calm()
	}
	s := st.client
	switch {
	case s.recvEnd:
		c.mu.Unlock()
		return xhttp2.StreamError{StreamID: id, Code: xhttp2.ErrCodeStreamClosed}
	case h.tooLarge:
		h.bad("head_too_large")
	case s.answered: // trailers
		if !h.end {
			h.bad("trailers_without_end")
		}
		if s.trailer = h.trailers(); s.expect > 0 {
			h.bad("content_length")
		}
	default:
		c.takeResponse(s)
	}
	if h.malformed != "" {
		c.mu.Unlock()
		return c.malformed(id)
	}
	if h.end {
		s.recvEnd = true
		c.over(&s.stream)
	}
	s.cond.Broadcast()
	c.mu.Unlock()
	return nil
}

// takeResponse takes an informational or the final head. It needs mu.
func (c *conn) takeResponse(s *ClientStream) {
	h := &c.head
	r := &s.final
	h.response(r, s.fields[:0])
	switch {
	case h.malformed != "":
	case r.Status < 200:
		if h.end || len(s.informs) == maxInforms {
			h.bad("status")
		} else if r.Status != 100 {
			inform := *r
			inform.Fields = slices.Clone(r.Fields)
			s.informs = append(s.informs, inform)
		}
	default:
		s.answered = true
		s.expect = r.Length
		switch {
		case s.upgrade && r.Status < 300:
			r.Status, r.Length, s.expect = 101, message.Unknown, message.Unknown
		case s.isHead || r.Status == 304:
			s.expect = 0
		case r.Status == 204:
			r.Length, s.expect = 0, 0
		case h.end && r.Length > 0:
			h.bad("content_length")
		case h.end:
			r.Length = 0
		}
		s.response = r
	}
}

// Streams returns how many streams are open and how many may be.
func (c *ClientConn) Streams() (open, limit int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.streams), int(min(c.peerStreams, c.cfg.MaxStreams))
}

// Usable reports whether a new stream may be opened, now or when one of the open ones has ended.
func (c *ClientConn) Usable() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err == nil && !c.draining && c.nextID <= maxWindow
}

// Shutdown takes no new streams. The connection ends with the last open one.
func (c *ClientConn) Shutdown() {
	c.mu.Lock()
	c.draining = true
	drained := c.drainedLocked()
	c.mu.Unlock()
	if drained {
		c.farewell(ErrClosed)
	}
}

// Close ends the connection at once; open streams fail with cause.
func (c *ClientConn) Close(cause error) {
	if cause == nil {
		cause = ErrClosed
	}
	c.fail(cause)
}
