package http1

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"io"
	"net"
	"sync"
	"time"

	"github.com/hanse-mesh/hanse/proxy/message"
)

// ClientConfig configures a Client. Dial is required.
type ClientConfig struct {
	Dial           func(ctx context.Context) (net.Conn, error)
	ConnectTimeout time.Duration // default 5 s
	IdleTimeout    time.Duration // of a connection without exchange; default 30 s
	WriteTimeout   time.Duration // of one write; default 30 s
	MaxIdle        int           // connections kept; default 256
	MaxHeadBytes   int           // of a response; default 256 KiB
	MaxFields      int           // default 500
}

// Client keeps connections to one address. It is safe for concurrent use.
type Client struct {
	cfg ClientConfig

	mu     sync.Mutex
	idle   []*clientConn // guarded by mu; the newest last
	sweep  *time.Timer   // guarded by mu; nil: nothing is idle
	closed bool          // guarded by mu
}

type clientConn struct {
	wire
	head   head
	again  []byte // backs clientStream.head
	used   bool   // for an exchange before
	idleAt time.Time
}

// NewClient returns a Client without connections.
func NewClient(cfg ClientConfig) *Client {
	set(&cfg.ConnectTimeout, 5*time.Second)
	set(&cfg.IdleTimeout, 30*time.Second)
	set(&cfg.WriteTimeout, 30*time.Second)
	set(&cfg.MaxIdle, 256)
	set(&cfg.MaxHeadBytes, 256<<10)
	set(&cfg.MaxFields, 500)
	return &Client{cfg: cfg}
}

// ErrClosed is returned once the Client is closed.
var ErrClosed = errors.New("http1: client is closed")

// get takes the connection that was used last, or dials.
func (c *Client) get(ctx context.Context, fresh bool) (*clientConn, error) {
	c.mu.Lock()
	for !fresh && len(c.idle) > 0 {
		n := len(c.idle) - 1
		cc := c.idle[n]
		c.idle[n] = nil
		c.idle = c.idle[:n]
		c.mu.Unlock()
		if time.Since(cc.idleAt) < trusted || alive(cc.nc) {
			return cc, nil
		}
		_ = cc.nc.Close()
		c.mu.Lock()
	}
	closed := c.closed
	c.mu.Unlock()
	if closed {
		return nil, ErrClosed
	}
	ctx, cancel := context.WithTimeout(ctx, c.cfg.ConnectTimeout)
	defer cancel()
	nc, err := c.cfg.Dial(ctx)
	if err != nil {
		return nil, err
	}
	cc := &clientConn{}
	cc.nc, cc.writeTimeout, cc.pooled = nc, c.cfg.WriteTimeout, true
	return cc, nil
}

// trusted is how long an idle connection is not asked whether it still lives.
const trusted = 5 * time.Millisecond

func (c *Client) put(cc *clientConn) {
	cc.idleAt, cc.used = time.Now(), true
	cc.rest()
	if cap(cc.again) > firstBuffer {
		cc.again = nil
	}
	c.mu.Lock()
	if c.closed || len(c.idle) >= c.cfg.MaxIdle {
		c.mu.Unlock()
		_ = cc.nc.Close()
		return
	}
	c.idle = append(c.idle, cc)
	if c.sweep == nil {
		c.sweep = time.AfterFunc(c.cfg.IdleTimeout, c.closeOld)
	}
	c.mu.Unlock()
}

// closeOld closes what was idle too long. The oldest come first.
func (c *Client) closeOld() {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := 0
	for n < len(c.idle) && time.Since(c.idle[n].idleAt) >= c.cfg.IdleTimeout {
		_ = c.idle[n].nc.Close()
		n++
	}
	c.idle = append(c.idle[:0], c.idle[n:]...)
	clear(c.idle[len(c.idle) : len(c.idle)+n])
	if len(c.idle) == 0 {
		c.sweep = nil
		return
	}
	c.sweep.Reset(max(c.cfg.IdleTimeout-time.Since(c.idle[0].idleAt), time.Millisecond))
}

// CloseIdle closes the connections that nobody uses.
func (c *Client) CloseIdle() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, cc := range c.idle {
		_ = cc.nc.Close()
	}
	c.idle = nil
}

// Close lets open exchanges finish and dials no more.
func (c *Client) Close() {
	c.mu.Lock()
	c.closed = true
	if c.sweep != nil {
		c.sweep.Stop()
	}
	c.mu.Unlock()
	c.CloseIdle()
}

// clientStream is one exchange.
type clientStream struct {
	c       *Client
	moving  sync.Mutex // held to change cc, and by Cancel, which may come at any time
	cc      *clientConn
	request *message.Request
	inform  func(status int, fields message.Fields)
	head    []byte // as sent, kept until the first byte of an answer; nil: it cannot be sent again
	awaited string // Sec-WebSocket-Accept, where the key is ours
	chunk   bool

	// of the reader
	response message.Response
	has      bool
	in       body
	reusable bool

	// guarded by cc.mu
	left    int64 // of the request's body; message.Unknown
	ended   bool  // the request is whole
	tunnel  bool
	flushed bool  // something was written
	err     error // of a Cancel
	closed  bool
}

// Open begins an exchange. ctx bounds connecting only.
func (c *Client) Open(ctx context.Context, r *message.Request, o message.Options) (message.ClientStream, error) {
	cc, err := c.get(ctx, false)
	if err != nil {
		return nil, &message.Error{Err: err}
	}
	s := &clientStream{c: c, cc: cc, request: r, inform: o.Inform, left: message.Unknown}
	cc.mu.Lock()
	s.writeHead(o.End)
	if cc.used && o.End && idempotent(r.Method) && r.Protocol == "" {
		cc.again = append(cc.again[:0], cc.out...)
		s.head = cc.again
	}
	cc.mu.Unlock()
	return s, nil
}

// idempotent is RFC 9110 §9.2.2.
func idempotent(method string) bool {
	switch method {
	case "GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE":
		return true
	}
	return false
}

// writeHead adds the request's head. It needs cc.mu.
func (s *clientStream) writeHead(end bool) {
	w, r := &s.cc.wire, s.request
	w.add(r.Method)
	w.add(" ")
	if r.Method == "CONNECT" {
		w.add(r.Authority)
	} else {
		w.add(r.Path)
	}
	w.add(" HTTP/1.1\r\nhost: ")
	w.add(r.Authority)
	w.add("\r\n")
	s.fields(r.Fields)
	switch {
	case r.Protocol != "":
		w.add("connection: upgrade\r\nupgrade: ")
		w.add(r.Protocol)
		w.add("\r\n")
		if _, has := r.Fields.Get("sec-websocket-key"); !has && r.Protocol == "websocket" {
			var nonce [16]byte
			_, _ = rand.Read(nonce[:]) // never fails
			key := base64.StdEncoding.EncodeToString(nonce[:])
			w.add("sec-websocket-key: " + key + "\r\n")
			s.awaited = accept(key)
		}
	case r.Method == "CONNECT":
	case end || r.Length == 0:
		if r.Method == "POST" || r.Method == "PUT" || r.Method == "PATCH" {
			w.length(0)
		}
		s.left = 0
		s.ended = end
	case r.Length > 0:
		w.length(r.Length)
		s.left = r.Length
	default:
		s.chunk = true
		w.add("transfer-encoding: chunked\r\n")
	}
	w.add("\r\n")
}

// fields adds the fields; those that HTTP/2 may have split are joined (RFC 9113 §8.2.3).
func (s *clientStream) fields(fields message.Fields) {
	cookies := 0
	for i := range fields {
		if fields[i].Name == "cookie" {
			cookies++
		}
	}
	if cookies < 2 {
		s.cc.addFields(fields)
		return
	}
	first := true
	for i := range fields {
		if fields[i].Name != "cookie" {
			s.cc.addFields(fields[i : i+1])
			continue
		}
		if !first {
			continue
		}
		first = false
		s.cc.add("cookie: ")
		n := 0
		for j := range fields {
			if fields[j].Name == "cookie" {
				if n++; n > 1 {
					s.cc.add("; ")
				}
				s.cc.add(fields[j].Value)
			}
		}
		s.cc.add("\r\n")
	}
}

func (s *clientStream) failure(err error) error {
	if s.err != nil {
		return s.err
	}
	var e *message.Error
	if errors.As(err, &e) {
		return err
	}
	return &message.Error{Sent: s.flushed, Err: err}
}

// flush needs cc.mu.
func (s *clientStream) flush() error {
	if len(s.cc.out) > 0 {
		s.flushed = true
	}
	return s.cc.flush()
}

// Write implements message.ClientStream, as do the others. Once the answer has ended the rest of a request is not wanted, and dropped.
func (s *clientStream) Write(p []byte) (int, error) {
	w := &s.cc.wire
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case s.err != nil:
		return 0, s.err
	case s.ended:
		return 0, &message.Error{Sent: true, Err: errors.New("http1: write after the end")}
	case len(p) == 0:
		return 0, nil
	case s.left >= 0 && s.left < int64(len(p)):
		return 0, &message.Error{Sent: true, Err: errors.New("http1: body longer than announced")}
	}
	if s.left >= 0 {
		s.left -= int64(len(p))
	}
	if len(w.out)+len(p) > flushAt {
		s.flushed = true
	}
	if err := w.write(p, s.chunk); err != nil {
		return 0, s.failure(err)
	}
	return len(p), nil
}

// Flush implements message.ClientStream.
func (s *clientStream) Flush() error {
	s.cc.mu.Lock()
	defer s.cc.mu.Unlock()
	if s.err != nil {
		return s.err
	}
	if err := s.flush(); err != nil {
		return s.failure(err)
	}
	return nil
}

// End implements message.ClientStream. Trailers go out with a body of unknown length only.
func (s *clientStream) End(trailers message.Fields) error {
	w := &s.cc.wire
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case s.err != nil:
		return s.err
	case s.ended:
		return nil
	case s.left > 0:
		return &message.Error{Sent: true, Err: errors.New("http1: body shorter than announced")}
	}
	s.ended = true
	if s.chunk {
		w.add("0\r\n")
		w.addFields(trailers)
		w.add("\r\n")
	}
	err := s.flush()
	if err == nil && s.request.Method == "CONNECT" || s.tunnel {
		err = w.closeWrite()
	}
	if err != nil {
		return s.failure(err)
	}
	return nil
}

// Response implements message.ClientStream.
func (s *clientStream) Response() (*message.Response, error) {
	if s.has {
		return &s.response, nil
	}
	w := &s.cc.wire
	w.mu.Lock()
	err := s.flush()
	w.mu.Unlock()
	for {
		if err == nil || s.head == nil { // an answer may have come though the request could not be sent whole
			readErr := s.readHead()
			if readErr == nil {
				return &s.response, nil
			}
			if err == nil {
				err = readErr
			}
		}
		w.mu.Lock()
		again := s.head != nil && w.r == w.w && s.err == nil && stale(err)
		w.mu.Unlock()
		if !again {
			break
		}
		// The peer had closed an idle connection: nobody has seen this request.
		cc, dialErr := s.c.get(context.Background(), true)
		if dialErr != nil {
			return nil, &message.Error{Err: dialErr}
		}
		head := s.head
		s.head = nil
		if !s.move(cc) {
			_ = cc.nc.Close()
			break
		}
		w = &s.cc.wire
		w.mu.Lock()
		w.room()
		w.out = append(w.out, head...)
		err = s.flush()
		w.mu.Unlock()
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return nil, s.failure(err)
}

// stale reports whether a connection failed as one does that its peer has closed.
func stale(err error) bool {
	var rej *Reject
	return !errors.As(err, &rej)
}

// move goes on with another connection. It is false if the exchange was cancelled meanwhile.
func (s *clientStream) move(cc *clientConn) bool {
	s.moving.Lock()
	defer s.moving.Unlock()
	old := s.cc
	old.mu.Lock()
	defer old.mu.Unlock()
	if s.err != nil {
		return false
	}
	_ = old.nc.Close()
	s.cc = cc
	return true
}

// readHead reads heads until the final one.
func (s *clientStream) readHead() error {
	cc := s.cc
	scanned := 0
	for informs := 0; ; {
		b := cc.unread()
		n := headEnd(b, scanned)
		if n == 0 {
			scanned = len(b)
			if len(b) >= s.c.cfg.MaxHeadBytes {
				return bad("head_too_large")
			}
			if err := cc.fill(s.c.cfg.MaxHeadBytes); err != nil {
				return cutShort(err)
			}
			continue
		}
		scanned = 0
		s.head = nil
		if informs > 0 {
			cc.head.fields = nil // somebody may have those of before
		}
		if rej := parseResponse(b[:n], &s.response, &cc.head, s.c.cfg.MaxFields); rej != nil {
			return rej
		}
		cc.r += n
		r := &s.response
		if r.Status >= 200 || r.Status == 101 {
			return s.framing()
		}
		if informs++; informs > 16 {
			return bad("too_many_informational")
		}
		if r.Status != 100 && s.inform != nil {
			s.inform(r.Status, r.Fields)
		}
	}
}

// framing finds out what follows the head (RFC 9112 §6.3).
func (s *clientStream) framing() error {
	r, h := &s.response, &s.cc.head
	s.reusable = !h.close && (h.minor == 1 || h.keepAlive)
	switch {
	case r.Status == 101:
		if s.request.Protocol == "" || !h.upgrading {
			return bad("switched_unasked")
		}
		if got, _ := r.Fields.Get("sec-websocket-accept"); s.awaited != "" {
			if got != s.awaited {
				return bad("websocket_accept")
			}
			r.Fields.Del("sec-websocket-accept")
		}
		s.raw()
	case s.request.Method == "CONNECT" && r.Status/100 == 2:
		s.raw()
	case s.request.Method == "HEAD", r.Status == 304:
	case r.Status == 204:
		r.Length = 0
	case h.chunked:
		s.in = body{kind: chunked, chunks: chunks{maxHead: s.c.cfg.MaxHeadBytes, maxFields: s.c.cfg.MaxFields}}
	case h.hasLength:
		s.in = body{kind: fixed, left: h.length}
	default:
		s.in.kind = untilClose
		s.reusable = false
	}
	if s.request.Protocol != "" {
		s.reusable = false
	}
	s.has = true
	return nil
}

func (s *clientStream) raw() {
	s.response.Length, s.in.kind, s.reusable = message.Unknown, untilClose, false
	s.cc.mu.Lock()
	s.tunnel, s.left = true, message.Unknown
	s.cc.mu.Unlock()
}

// Read implements message.ClientStream.
func (s *clientStream) Read(p []byte) (int, error) {
	n, err := s.cc.body(&s.in, p)
	if err == nil || errors.Is(err, io.EOF) {
		return n, err
	}
	s.cc.mu.Lock()
	defer s.cc.mu.Unlock()
	s.flushed = true
	return n, s.failure(err)
}

// Ready implements message.ClientStream.
func (s *clientStream) Ready() bool { return s.cc.ready(&s.in) }

// Trailers implements message.ClientStream.
func (s *clientStream) Trailers() message.Fields { return s.in.chunks.trailers }

// Cancel implements message.ClientStream.
func (s *clientStream) Cancel(err error) {
	if err == nil {
		err = errAborted
	}
	s.moving.Lock()
	defer s.moving.Unlock()
	cc := s.cc
	cc.mu.Lock()
	defer cc.mu.Unlock()
	if s.err == nil && !s.closed {
		s.err = &message.Error{Sent: s.flushed, Err: err}
		_ = cc.nc.Close()
	}
}

// Close implements message.ClientStream. The connection is kept if both messages were whole, and nothing came that nobody had asked for.
func (s *clientStream) Close() {
	cc := s.cc
	cc.mu.Lock()
	s.closed = true
	keep := s.ended && s.has && s.in.over() && s.reusable && s.err == nil && cc.failed == nil && cc.r == cc.w && len(cc.out) == 0
	cc.mu.Unlock()
	if keep {
		s.c.put(cc)
		return
	}
	_ = cc.nc.Close()
}
