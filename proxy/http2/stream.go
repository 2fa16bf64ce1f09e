package http2

import (
	"errors"
	"io"
	"sync"

	xhttp2 "golang.org/x/net/http2"

	"github.com/hanse-mesh/hanse/proxy/message"
)

// stream is what both ends of an exchange have in common. Everything in it is guarded by conn.mu.
type stream struct {
	c      *conn
	id     uint32
	client *ClientStream // whose it is; nil at a server
	server *serverStream // the same at a server
	cond   sync.Cond     // something of the stream has changed
	gen    uint64        // of pending, when its head was added

	body       body
	recvWindow int64
	credit     int64 // read, and not given back yet
	expect     int64 // bytes of the body to come; message.Unknown
	trailer    message.Fields
	recvEnd    bool // END_STREAM came
	abandoned  bool // nobody reads any more
	readClosed bool // Read is to return
	answered   bool // client: the final head came

	sendWindow int64
	starved    bool   // waits for the connection's window
	promised   int64  // bytes of our body to come; message.Unknown
	lastFrame  int    // where in pending its newest DATA or HEADERS frame begins …
	lastGen    uint64 // … while gen of pending is this
	held       bool   // something of it is pending that nobody flushes yet
	sentEnd    bool   // END_STREAM was added
	unwanted   bool   // the peer has answered and wants no more of the request
	off        bool   // no longer in conn.streams
	err        error  // *message.Error: how it ended, unless by END_STREAM both ways

	onAbort func(err error)
	calling bool // onAbort runs
}

func (s *stream) init(c *conn, id uint32) {
	s.c, s.id = c, id
	s.cond.L = &c.mu
	s.recvWindow, s.sendWindow = int64(c.cfg.StreamWindow), c.peerWindow
	s.expect, s.promised = message.Unknown, message.Unknown
}

// fail ends the stream with err, and adds to calls what is to be called without mu.
func (s *stream) fail(err error, calls []func()) []func() {
	if s.err != nil {
		return calls
	}
	s.err = err
	s.cond.Broadcast()
	if f := s.onAbort; f != nil {
		s.onAbort, s.calling = nil, true
		calls = append(calls, func() {
			f(err)
			s.c.mu.Lock()
			s.calling = false
			s.cond.Broadcast()
			s.c.mu.Unlock()
		})
	}
	return calls
}

// setOnAbort returns after the function of before has returned if it is being called.
func (s *stream) setOnAbort(f func(err error)) {
	s.c.mu.Lock()
	for s.calling {
		s.cond.Wait()
	}
	err := s.err
	s.onAbort = nil
	if err == nil {
		s.onAbort = f
	}
	s.c.mu.Unlock()
	if err != nil && f != nil {
		f(err)
	}
}

// Read implements message.ServerStream and message.ClientStream, as do the others.
func (s *stream) Read(p []byte) (int, error) {
	c := s.c
	c.mu.Lock()
	for {
		if n := s.body.read(p); n > 0 {
			if c.consumed(s, int64(n)) {
				c.flush()
			} else {
				c.mu.Unlock()
			}
			return n, nil
		}
		switch {
		case s.readClosed:
			c.mu.Unlock()
			return 0, errReadClosed
		case s.recvEnd:
			c.mu.Unlock()
			return 0, io.EOF
		case s.err != nil:
			err := s.err
			c.mu.Unlock()
			return 0, err
		case len(p) == 0:
			c.mu.Unlock()
			return 0, nil
		case s.held:
			s.flushLocked()
			c.mu.Lock()
			continue
		}
		s.cond.Wait()
	}
}

// Ready implements the interfaces.
func (s *stream) Ready() bool {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	return s.body.size > 0 || s.recvEnd || s.err != nil
}

// Trailers implements the interfaces.
func (s *stream) Trailers() message.Fields {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	return s.trailer
}

var errReadClosed = &message.Error{Sent: true, Err: errors.New("http2: reading has been given up")}

// CloseRead implements message.ServerStream.
func (s *stream) CloseRead() {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	s.readClosed = true
	s.cond.Broadcast()
}

var errEnded = errors.New("http2: write after the end")

// Write implements the interfaces.
func (s *stream) Write(p []byte) (int, error) {
	c := s.c
	total := 0
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(p) > 0 {
		switch {
		case s.err != nil:
			return total, s.err
		case s.unwanted: // RFC 9113 §8.1: the answer is whole without it
			return total + len(p), nil
		case s.sentEnd:
			return total, &message.Error{Sent: true, Err: errEnded}
		case len(c.pending) > pendingLimit:
			c.waiting++
			c.flushSoon()
			c.room.Wait()
			c.waiting--
			continue
		}
		n := min(int64(len(p)), int64(c.peerFrame), s.sendWindow, c.sendWindow)
		if n <= 0 {
			if c.sendWindow <= 0 && !s.starved {
				s.starved = true
				c.starved++
			}
			s.held = false
			c.flushSoon()
			s.cond.Wait()
			continue
		}
		if s.starved {
			s.starved = false
			c.starved--
		}
		if s.promised >= 0 {
			if s.promised -= n; s.promised < 0 {
				return total, &message.Error{Sent: true, Err: errors.New("http2: body longer than announced")}
			}
		}
		s.sendWindow -= n
		c.sendWindow -= n
		c.buf()
		s.lastFrame, s.lastGen = len(c.pending), c.gen
		c.frame(int(n), xhttp2.FrameData, 0, s.id)
		c.pending = append(c.pending, p[:n]...)
		p = p[n:]
		total += int(n)
		s.held = true
		if len(c.pending) >= pendingFlush {
			s.flushLocked()
			c.mu.Lock()
		}
	}
	return total, nil
}

// flushLocked needs mu, and gives it up.
func (s *stream) flushLocked() {
	s.held = false
	s.c.flush()
}

// Flush implements the interfaces.
func (s *stream) Flush() error {
	s.c.mu.Lock()
	err := s.err
	if s.held && err == nil {
		s.flushLocked()
		return nil
	}
	s.c.mu.Unlock()
	return err
}

// End implements the interfaces.
func (s *stream) End(trailers message.Fields) error {
	c := s.c
	c.mu.Lock()
	switch {
	case s.err != nil:
		defer c.mu.Unlock()
		return s.err
	case s.sentEnd:
		c.mu.Unlock()
		return nil
	case s.promised > 0:
		c.mu.Unlock()
		return &message.Error{Sent: true, Err: errors.New("http2: body shorter than announced")}
	}
	switch {
	case len(trailers) > 0:
		c.enc.begin()
		c.putFields(trailers)
		c.headers(s.id, true)
	case s.lastGen == c.gen && s.lastFrame < len(c.pending):
		c.pending[s.lastFrame+4] |= byte(xhttp2.FlagDataEndStream) // the same bit as HEADERS'
	default:
		c.frame(0, xhttp2.FrameData, xhttp2.FlagDataEndStream, s.id)
	}
	s.sentEnd = true
	c.over(s)
	s.held = false
	c.flush()
	return nil
}

// body holds what has come and was not read.
type body struct {
	chunks []*[chunkSize]byte
	few    [2]*[chunkSize]byte // backs chunks at first
	from   int                 // of the first chunk
	to     int                 // of the last chunk
	size   int
}

const chunkSize = 4 << 10

var chunkPool = sync.Pool{New: func() any { return new([chunkSize]byte) }}

func (b *body) write(p []byte) {
	b.size += len(p)
	for len(p) > 0 {
		if b.chunks == nil {
			b.chunks = b.few[:0]
		}
		if len(b.chunks) == 0 || b.to == chunkSize {
			b.chunks = append(b.chunks, chunkPool.Get().(*[chunkSize]byte))
			b.to = 0
		}
		n := copy(b.chunks[len(b.chunks)-1][b.to:], p)
		b.to += n
		p = p[n:]
	}
}

func (b *body) read(p []byte) (n int) {
	for n < len(p) && b.size > 0 {
		end := chunkSize
		if len(b.chunks) == 1 {
			end = b.to
		}
		m := copy(p[n:], b.chunks[0][b.from:end])
		n += m
		b.from += m
		b.size -= m
		if b.from == end {
			chunkPool.Put(b.chunks[0])
			b.chunks = append(b.chunks[:0], b.chunks[1:]...)
			b.from = 0
		}
	}
	if b.size == 0 {
		b.drop()
	}
	return n
}

func (b *body) drop() {
	for _, x := range b.chunks {
		chunkPool.Put(x)
	}
	*b = body{chunks: b.chunks[:0]}
}
