package http2

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	xhttp2 "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/hanse-mesh/hanse/proxy/message"
)

// conn is what both ends of a connection have in common.
type conn struct {
	nc     net.Conn
	cfg    Config
	client bool
	server *ServerConn // nil: client
	done   chan struct{}
	frames atomic.Uint64 // read so far

	// owned by the reader
	br      *bufio.Reader
	fr      *xhttp2.Framer // reads br
	dec     *hpack.Decoder
	head    headReader
	control flood
	resets  flood

	deadline time.Time // owned by the flusher: the write deadline in force

	mu        sync.Mutex
	room      sync.Cond // writers wait for pending to shrink, closers for it to be written
	waiting   int       // guarded by mu: on room
	pending   []byte    // guarded by mu: not written yet
	pooled    *[]byte   // guarded by mu: what pending came from
	gen       uint64    // guarded by mu: of pending
	answers   int       // guarded by mu: what the reader has added to pending
	flushing  bool      // guarded by mu: somebody writes, or is about to
	enc       encoder   // guarded by mu
	streams   map[uint32]*stream
	nextID    uint32 // client: of the next stream
	lastID    uint32 // server: the highest that the peer has opened
	forgotten [256]uint32
	forgetAt  int

	answeredStreams uint64 // guarded by mu, server: streams with an answer
	answeredBefore  uint64 // owned by the reader: before the current second

	sendWindow  int64 // guarded by mu: all below
	starved     int   // streams that wait for it
	recvWindow  int64
	recvCredit  int64
	buffered    int64
	withheld    int64
	peerWindow  int64 // INITIAL_WINDOW_SIZE
	peerFrame   int
	peerStreams uint32
	peerConnect bool // ENABLE_CONNECT_PROTOCOL
	peerKnown   bool // SETTINGS came
	pings       map[uint64]chan struct{}
	pingID      uint64
	draining    bool // no new streams; over when the open ones are
	peerLast    uint32
	err         error
}

// flood counts events of the current second.
type flood struct {
	second int64
	n      int
}

func (f *flood) add() int {
	if now := time.Now().Unix(); now != f.second {
		f.second, f.n = now, 0
	}
	f.n++
	return f.n
}

var buffers = sync.Pool{New: func() any { b := make([]byte, 0, 4<<10); return &b }}

func (c *conn) init(nc net.Conn, cfg Config, client bool) {
	c.nc, c.cfg, c.client = nc, cfg.withDefaults(), client
	c.done = make(chan struct{})
	c.room.L = &c.mu
	c.streams = map[uint32]*stream{}
	c.enc.init()
	c.br = bufio.NewReaderSize(nc, readBuffer)
	c.fr = xhttp2.NewFramer(io.Discard, c.br)
	c.fr.SetReuseFrames()
	c.fr.SetMaxReadFrameSize(maxFrame)
	c.dec = hpack.NewDecoder(defaultTableSize, nil)
	c.head.init(c.dec, c.cfg.MaxHeadBytes, client)
	c.nextID = 1
	c.sendWindow, c.peerWindow, c.peerFrame, c.peerStreams = defaultWindow, defaultWindow, maxFrame, maxWindow
	c.recvWindow = max(defaultWindow, int64(c.cfg.ConnWindow))
	c.peerLast = maxWindow

	c.mu.Lock()
	defer c.mu.Unlock()
	settings := []xhttp2.Setting{
		{ID: xhttp2.SettingInitialWindowSize, Val: c.cfg.StreamWindow},
		{ID: xhttp2.SettingMaxHeaderListSize, Val: c.cfg.MaxHeadBytes},
	}
	if client {
		c.buf()
		c.pending = append(c.pending, xhttp2.ClientPreface...)
		settings = append(settings, xhttp2.Setting{ID: xhttp2.SettingEnablePush, Val: 0})
	} else {
		settings = append(settings, xhttp2.Setting{ID: xhttp2.SettingMaxConcurrentStreams, Val: c.cfg.MaxStreams}, xhttp2.Setting{ID: settingConnect, Val: 1})
	}
	c.frame(6*len(settings), xhttp2.FrameSettings, 0, 0)
	for _, s := range settings {
		c.pending = binary.BigEndian.AppendUint16(c.pending, uint16(s.ID))
		c.pending = binary.BigEndian.AppendUint32(c.pending, s.Val)
	}
	if more := c.recvWindow - defaultWindow; more > 0 {
		c.windowUpdate(0, more)
	}
}

const settingConnect = xhttp2.SettingEnableConnectProtocol

// buf makes sure that there is a pending buffer. It needs mu, as all that appends below.
func (c *conn) buf() {
	if c.pending == nil {
		c.pooled = buffers.Get().(*[]byte)
		c.pending = (*c.pooled)[:0]
	}
}

// frame appends a frame's head.
func (c *conn) frame(length int, t xhttp2.FrameType, flags xhttp2.Flags, id uint32) {
	c.buf()
	c.pending = append(c.pending, byte(length>>16), byte(length>>8), byte(length), byte(t), byte(flags), byte(id>>24), byte(id>>16), byte(id>>8), byte(id))
}

func (c *conn) frame32(t xhttp2.FrameType, id, value uint32) {
	c.frame(4, t, 0, id)
	c.pending = binary.BigEndian.AppendUint32(c.pending, value)
}

func (c *conn) windowUpdate(id uint32, n int64) { c.frame32(xhttp2.FrameWindowUpdate, id, uint32(n)) }

func (c *conn) goAwayFrame(last uint32, code xhttp2.ErrCode, debug string) {
	c.frame(8+len(debug), xhttp2.FrameGoAway, 0, 0)
	c.pending = binary.BigEndian.AppendUint32(c.pending, last)
	c.pending = binary.BigEndian.AppendUint32(c.pending, uint32(code))
	c.pending = append(c.pending, debug...)
}

func (c *conn) pingFrame(flags xhttp2.Flags, data uint64) {
	c.frame(8, xhttp2.FramePing, flags, 0)
	c.pending = binary.BigEndian.AppendUint64(c.pending, data)
}

// headers appends the block that enc has made as HEADERS and CONTINUATION frames.
func (c *conn) headers(id uint32, end bool) {
	block := c.enc.b
	flags, t := xhttp2.Flags(0), xhttp2.FrameHeaders
	if end {
		flags = xhttp2.FlagHeadersEndStream
	}
	for first := true; first || len(block) > 0; first = false {
		n := min(len(block), c.peerFrame)
		if n == len(block) {
			flags |= xhttp2.FlagHeadersEndHeaders
		}
		c.frame(n, t, flags, id)
		c.pending = append(c.pending, block[:n]...)
		block, flags, t = block[n:], 0, xhttp2.FrameContinuation
	}
	if cap(c.enc.b) > 16<<10 {
		c.enc.b = nil
	}
}

// flush writes what is pending. The first to come yields once, so that others can add theirs, and writes for all. It needs mu, and
// gives it up.
func (c *conn) flush() {
	if c.flushing || len(c.pending) == 0 {
		c.mu.Unlock()
		return
	}
	c.flushing = true
	c.mu.Unlock()
	runtime.Gosched()
	c.write(4)
}

// flushSoon is flush for the reader, which must not wait. It needs mu, and keeps it.
func (c *conn) flushSoon() {
	if !c.flushing && len(c.pending) > 0 {
		c.flushing = true
		go c.write(-1)
	}
}

// write is the flusher. After some rounds for others it leaves the rest to a goroutine.
func (c *conn) write(rounds int) {
	for {
		c.mu.Lock()
		if c.err != nil || len(c.pending) == 0 {
			c.flushing = false
			if c.waiting > 0 {
				c.room.Broadcast()
			}
			c.mu.Unlock()
			return
		}
		if rounds == 0 {
			c.mu.Unlock()
			go c.write(-1)
			return
		}
		rounds--
		b, p := c.pending, c.pooled
		c.pending, c.pooled, c.answers = nil, nil, 0
		c.gen++
		c.mu.Unlock()

		// Moving a deadline costs as much as a small write does: it is moved when a quarter of it has passed.
		if now := time.Now(); c.deadline.Sub(now) < c.cfg.WriteTimeout*3/4 {
			c.deadline = now.Add(c.cfg.WriteTimeout)
			_ = c.nc.SetWriteDeadline(c.deadline)
		}
		_, err := c.nc.Write(b)
		if cap(b) <= 2*pendingLimit {
			*p = b
			buffers.Put(p)
		}
		c.mu.Lock()
		if c.waiting > 0 {
			c.room.Broadcast()
		}
		c.mu.Unlock()
		if err != nil {
			c.fail(fmt.Errorf("http2: write: %w", err))
		}
	}
}

// fail ends the connection at once: all its streams fail with err.
func (c *conn) fail(err error) {
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return
	}
	c.err = err
	var calls []func()
	for _, s := range c.streams {
		sent := s.gen != c.gen
		calls = s.fail(&message.Error{Sent: sent, Err: err}, calls)
	}
	clear(c.streams)
	for id, ch := range c.pings {
		close(ch)
		delete(c.pings, id)
	}
	close(c.done)
	c.room.Broadcast()
	c.mu.Unlock()
	_ = c.nc.Close()
	for _, f := range calls {
		f()
	}
}

// farewell sends what is pending, waits shortly for it to be written, and ends the connection.
func (c *conn) farewell(err error) {
	stop := time.AfterFunc(lingerTimeout, func() { c.fail(err) })
	defer stop.Stop()
	c.mu.Lock()
	c.waiting++
	c.flushSoon()
	for c.err == nil && (c.flushing || len(c.pending) > 0) {
		c.room.Wait()
	}
	c.waiting--
	c.mu.Unlock()
	c.fail(err)
}

// Err is why the connection has ended, nil while it lives.
func (c *conn) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// Done is closed when the connection has ended.
func (c *conn) Done() <-chan struct{} { return c.done }

// Ping waits for the answer to one PING.
func (c *conn) Ping(ctx context.Context) error {
	c.mu.Lock()
	if c.err != nil {
		defer c.mu.Unlock()
		return c.err
	}
	if c.pings == nil {
		c.pings = map[uint64]chan struct{}{}
	}
	c.pingID++
	id, ch := c.pingID, make(chan struct{})
	c.pings[id] = ch
	c.pingFrame(0, id)
	c.flush()
	select {
	case <-ch:
		return c.Err()
	case <-ctx.Done():
		c.mu.Lock()
		delete(c.pings, id)
		c.mu.Unlock()
		return context.Cause(ctx)
	}
}

// read dispatches frames until the connection ends.
func (c *conn) read() {
	late := time.AfterFunc(settingsTimeout, func() {
		c.cfg.OnReject("settings_timeout")
		c.fail(&connError{xhttp2.ErrCodeSettingsTimeout, "no SETTINGS, or none acknowledged"})
	})
	defer late.Stop()
	acked := false
	for {
		if plain, err := c.plainHead(); plain && err == nil {
			continue
		} else if err != nil { // as of dispatch
			if c.ended(err) {
				return
			}
			continue
		}
		f, err := c.fr.ReadFrame()
		if err == nil {
			c.frames.Add(1)
			err = c.dispatch(f)
			if s, ok := f.(*xhttp2.SettingsFrame); ok && s.IsAck() && !acked {
				acked = true
				late.Stop()
			}
		}
		if err != nil && c.ended(err) {
			return
		}
	}
}

// ended ends the stream, or the connection, that err is about, and reports whether it was the connection.
func (c *conn) ended(err error) bool {
	var xs xhttp2.StreamError
	var xc xhttp2.ConnectionError
	var own *connError
	switch {
	case errors.As(err, &xs):
		c.cfg.OnReject("frame")
		c.resetStream(xs.StreamID, &streamError{xs.Code, "malformed frame"})
		return false
	case errors.As(err, &own):
	case errors.As(err, &xc):
		own = &connError{xhttp2.ErrCode(xc), "malformed frame"}
		if d := c.fr.ErrorDetail(); d != nil {
			c.cfg.Log.Debug("http2: malformed frame", "detail", d)
		}
	case errors.Is(err, xhttp2.ErrFrameTooLarge):
		own = &connError{xhttp2.ErrCodeFrameSize, "frame too large"}
	default:
		c.mu.Lock()
		over := c.draining && len(c.streams) == 0
		c.mu.Unlock()
		if over || errors.Is(err, io.EOF) {
			err = ErrClosed
		}
		c.fail(err)
		return true
	}
	c.cfg.OnReject(own.reason)
	c.mu.Lock()
	c.goAwayFrame(c.lastID, own.code, own.reason)
	c.mu.Unlock()
	c.farewell(own)
	return true
}

// plainHead takes in a HEADERS frame that is a whole head, without padding and priority, as nearly all are: the Framer would allocate for
// it. It is false, and nothing is taken, where the frame that comes is another one, or does not come at all.
func (c *conn) plainHead() (bool, error) {
	const whole, padded = xhttp2.FlagHeadersEndHeaders, xhttp2.FlagHeadersPadded | xhttp2.FlagHeadersPriority
	head, err := c.br.Peek(frameHead)
	if err != nil || !c.peerKnown || c.head.stream != 0 {
		return false, nil // the Framer says what is wrong
	}
	length, flags, id := int(head[0])<<16|int(head[1])<<8|int(head[2]), xhttp2.Flags(head[4]), binary.BigEndian.Uint32(head[5:])&maxWindow
	if xhttp2.FrameType(head[3]) != xhttp2.FrameHeaders || flags&(whole|padded) != whole || id == 0 || length > readBuffer-frameHead {
		return false, nil
	}
	frame, err := c.br.Peek(frameHead + length)
	if err != nil {
		return false, nil
	}
	c.frames.Add(1)
	err = c.headFrame(id, frame[frameHead:], flags.Has(xhttp2.FlagHeadersEndStream), true, false)
	_, _ = c.br.Discard(frameHead + length)
	return true, err
}

func (c *conn) dispatch(f xhttp2.Frame) error {
	if !c.peerKnown { // written by this goroutine only
		if s, ok := f.(*xhttp2.SettingsFrame); !ok || s.IsAck() {
			return &connError{xhttp2.ErrCodeProtocol, "the first frame is not SETTINGS"}
		}
	}
	switch f := f.(type) {
	case *xhttp2.DataFrame:
		return c.data(f)
	case *xhttp2.HeadersFrame:
		return c.headFrame(f.StreamID, f.HeaderBlockFragment(), f.StreamEnded(), f.HeadersEnded(), f.HasPriority() && f.Priority.StreamDep == f.StreamID)
	case *xhttp2.ContinuationFrame:
		return c.continuation(f)
	case *xhttp2.WindowUpdateFrame:
		return c.windowFrame(f)
	case *xhttp2.RSTStreamFrame:
		return c.resetFrame(f)
	case *xhttp2.SettingsFrame:
		return c.settingsFrame(f)
	case *xhttp2.PingFrame:
		return c.ping(f)
	case *xhttp2.GoAwayFrame:
		return c.goAwayReceived(f)
	case *xhttp2.PushPromiseFrame:
		return &connError{xhttp2.ErrCodeProtocol, "PUSH_PROMISE"}
	case *xhttp2.PriorityFrame:
		if f.StreamDep == f.StreamID {
			return xhttp2.StreamError{StreamID: f.StreamID, Code: xhttp2.ErrCodeProtocol}
		}
		return c.calm()
	}
	return c.calm() // unknown frames are ignored, a flood of them is not
}

// calm counts a frame that carries nothing.
func (c *conn) calm() error {
	if c.control.add() > maxControl {
		return &connError{xhttp2.ErrCodeEnhanceYourCalm, "flood of control frames"}
	}
	return nil
}

func (c *conn) settingsFrame(f *xhttp2.SettingsFrame) error {
	if err := c.calm(); err != nil || f.IsAck() {
		return err
	}
	if f.NumSettings() > 100 {
		return &connError{xhttp2.ErrCodeEnhanceYourCalm, "too many settings"}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.peerKnown = true
	err := f.ForeachSetting(func(s xhttp2.Setting) error {
		if err := s.Valid(); err != nil {
			return err
		}
		switch s.ID {
		case xhttp2.SettingHeaderTableSize:
			c.enc.resize(s.Val)
		case xhttp2.SettingMaxConcurrentStreams:
			c.peerStreams = s.Val
		case xhttp2.SettingInitialWindowSize:
			delta := int64(s.Val) - c.peerWindow
			c.peerWindow = int64(s.Val)
			for _, st := range c.streams {
				if st.sendWindow += delta; st.sendWindow > maxWindow {
					return &connError{xhttp2.ErrCodeFlowControl, "stream window overflows"}
				}
				st.cond.Broadcast()
			}
		case xhttp2.SettingMaxFrameSize:
			c.peerFrame = maxFrame // nothing is won by longer ones
		case settingConnect:
			c.peerConnect = s.Val == 1
		case xhttp2.SettingEnablePush:
			if c.client && s.Val != 0 {
				return &connError{xhttp2.ErrCodeProtocol, "a server enables push"}
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	c.frame(0, xhttp2.FrameSettings, xhttp2.FlagSettingsAck, 0)
	return c.answered()
}

// answered sends what the reader has added. It needs mu. A peer that asks without reading the answers is cut off.
func (c *conn) answered() error {
	if c.answers++; c.answers > maxAnswers {
		return &connError{xhttp2.ErrCodeEnhanceYourCalm, "answers are not read"}
	}
	c.flushSoon()
	return nil
}

func (c *conn) ping(f *xhttp2.PingFrame) error {
	data := binary.BigEndian.Uint64(f.Data[:])
	c.mu.Lock()
	defer c.mu.Unlock()
	if f.IsAck() {
		if ch := c.pings[data]; ch != nil {
			close(ch)
			delete(c.pings, data)
		}
		return nil
	}
	if err := c.calm(); err != nil {
		return err
	}
	c.pingFrame(xhttp2.FlagPingAck, data)
	return c.answered()
}

func (c *conn) goAwayReceived(f *xhttp2.GoAwayFrame) error {
	var calls []func()
	c.mu.Lock()
	c.draining = true
	if c.client && f.LastStreamID < c.peerLast {
		c.peerLast = f.LastStreamID
		for id, s := range c.streams {
			if id > f.LastStreamID {
				calls = s.fail(&message.Error{Code: uint32(f.ErrCode), Err: ErrGoAway}, calls)
				c.forget(s)
			}
		}
	}
	over := len(c.streams) == 0
	c.mu.Unlock()
	for _, f := range calls {
		f()
	}
	if over && c.client {
		c.farewell(ErrClosed)
	}
	return c.calm()
}

func (c *conn) windowFrame(f *xhttp2.WindowUpdateFrame) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if f.StreamID == 0 {
		if c.sendWindow += int64(f.Increment); c.sendWindow > maxWindow {
			return &connError{xhttp2.ErrCodeFlowControl, "connection window overflows"}
		}
		if c.starved > 0 {
			for _, s := range c.streams {
				if s.starved {
					s.cond.Broadcast()
				}
			}
		}
		return nil
	}
	s := c.streams[f.StreamID]
	if s == nil {
		if c.idle(f.StreamID) {
			return &connError{xhttp2.ErrCodeProtocol, "WINDOW_UPDATE of an idle stream"}
		}
		return c.calm()
	}
	if s.sendWindow += int64(f.Increment); s.sendWindow > maxWindow {
		return xhttp2.StreamError{StreamID: f.StreamID, Code: xhttp2.ErrCodeFlowControl}
	}
	s.cond.Broadcast()
	return nil
}

// idle reports whether a stream has never been opened. It needs mu.
func (c *conn) idle(id uint32) bool {
	if c.client {
		return id%2 == 0 || id >= c.nextID
	}
	return id%2 == 0 || id > c.lastID
}

func (c *conn) resetFrame(f *xhttp2.RSTStreamFrame) error {
	c.mu.Lock()
	s := c.streams[f.StreamID]
	if s == nil {
		idle := c.idle(f.StreamID)
		c.mu.Unlock()
		if idle {
			return &connError{xhttp2.ErrCodeProtocol, "RST_STREAM of an idle stream"}
		}
		return c.calm()
	}
	if f.ErrCode == xhttp2.ErrCodeNo && s.recvEnd && c.client {
		// RFC 9113 §8.1: the response is whole, the rest of the request is not wanted.
		s.unwanted = true
		s.sentEnd = true
		s.cond.Broadcast()
		c.over(s)
		c.mu.Unlock()
		return nil
	}
	calls := s.fail(&message.Error{Sent: f.ErrCode != xhttp2.ErrCodeRefusedStream, Code: uint32(f.ErrCode), Err: ErrReset}, nil)
	c.forget(s)
	flood := s.server != nil && !s.server.responded && c.floodOfResets()
	drained := c.drainedLocked()
	c.mu.Unlock()
	for _, f := range calls {
		f()
	}
	if drained {
		go c.farewell(ErrClosed)
	}
	if flood {
		return &connError{xhttp2.ErrCodeEnhanceYourCalm, "flood of resets"}
	}
	return nil
}

// floodOfResets counts a stream that its peer has opened in vain: work for us, and none for it. Who lets as many be answered is busy. It needs mu.
func (c *conn) floodOfResets() bool {
	n := c.resets.add()
	if n == 1 {
		c.answeredBefore = c.answeredStreams
	}
	return uint64(n) > maxResets+c.answeredStreams-c.answeredBefore
}

// forget takes a stream off the connection. It needs mu.
func (c *conn) forget(s *stream) {
	delete(c.streams, s.id)
	s.off = true
	if s.starved {
		s.starved = false
		c.starved--
	}
}

// over takes a stream off that has ended both ways. It needs mu.
func (c *conn) over(s *stream) {
	if s.sentEnd && s.recvEnd && !s.off {
		c.forget(s)
	}
}

// drainedLocked says whether the connection only waited for its last stream. It needs mu.
func (c *conn) drainedLocked() bool {
	return c.draining && len(c.streams) == 0 && c.err == nil && c.client
}

// reset sends RST_STREAM and remembers that frames of the stream may still arrive. It needs mu.
func (c *conn) reset(s *stream, code xhttp2.ErrCode) {
	if s.off {
		return
	}
	c.frame32(xhttp2.FrameRSTStream, s.id, uint32(code))
	c.remember(s.id)
	c.forget(s)
}

func (c *conn) remember(id uint32) {
	c.forgotten[c.forgetAt] = id
	c.forgetAt = (c.forgetAt + 1) % len(c.forgotten)
}

func (c *conn) remembered(id uint32) bool {
	for _, x := range c.forgotten {
		if x == id {
			return true
		}
	}
	return false
}

// resetStream ends a stream by our own decision, from the reader.
func (c *conn) resetStream(id uint32, why *streamError) {
	c.mu.Lock()
	var calls []func()
	if s := c.streams[id]; s != nil {
		calls = s.fail(&message.Error{Sent: true, Code: uint32(why.code), Err: why}, nil)
		c.reset(s, why.code)
	} else {
		c.frame32(xhttp2.FrameRSTStream, id, uint32(why.code))
		if !c.client && id > c.lastID && id%2 == 1 {
			c.lastID = id
		}
		c.remember(id)
	}
	_ = c.answered()
	c.mu.Unlock()
	for _, f := range calls {
		f()
	}
}

func (c *conn) data(f *xhttp2.DataFrame) error {
	id, body, length := f.StreamID, f.Data(), int64(f.Length)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.recvWindow -= length; c.recvWindow < 0 {
		return &connError{xhttp2.ErrCodeFlowControl, "more DATA than the connection's window"}
	}
	s := c.streams[id]
	if s == nil || s.recvEnd {
		c.giveBack(length)
		switch {
		case s == nil && c.idle(id):
			return &connError{xhttp2.ErrCodeProtocol, "DATA of an idle stream"}
		case s == nil && (c.client || c.remembered(id)):
			return c.calmUnless(length > 0)
		case s == nil:
			return &connError{xhttp2.ErrCodeStreamClosed, "DATA of a closed stream"}
		}
		return xhttp2.StreamError{StreamID: id, Code: xhttp2.ErrCodeStreamClosed}
	}
	if length == 0 && !f.StreamEnded() {
		if err := c.calm(); err != nil {
			return err
		}
	}
	if s.recvWindow -= length; s.recvWindow < 0 {
		c.giveBack(length)
		return xhttp2.StreamError{StreamID: id, Code: xhttp2.ErrCodeFlowControl}
	}
	if c.client && !s.answered {
		c.giveBack(length)
		return xhttp2.StreamError{StreamID: id, Code: xhttp2.ErrCodeProtocol}
	}
	n := int64(len(body))
	if s.expect >= 0 && n > s.expect || f.StreamEnded() && s.expect >= 0 && n != s.expect {
		c.giveBack(length)
		return xhttp2.StreamError{StreamID: id, Code: xhttp2.ErrCodeProtocol}
	}
	if s.expect >= 0 {
		s.expect -= n
	}
	if pad := length - n; pad > 0 {
		s.credit += pad
		c.giveBack(pad)
	}
	if s.abandoned { // nobody reads it
		s.credit += n
		c.giveBack(n)
	} else if n > 0 {
		s.body.write(body)
		c.buffered += n
		if c.buffered > c.cfg.MaxBuffered {
			c.withheld += n
		} else {
			c.giveBack(n)
		}
	}
	if f.StreamEnded() {
		s.recvEnd = true
		c.over(s)
	}
	s.cond.Broadcast()
	return nil
}

func (c *conn) calmUnless(useful bool) error {
	if useful {
		return nil
	}
	return c.calm()
}

// giveBack lets the peer send n more bytes on the connection. It needs mu.
func (c *conn) giveBack(n int64) {
	if c.recvCredit += n; c.recvCredit >= int64(c.cfg.ConnWindow)/2 {
		c.windowUpdate(0, c.recvCredit)
		c.recvWindow += c.recvCredit
		c.recvCredit = 0
		c.flushSoon()
	}
}

// consumed is called when n bytes of a stream were read. It needs mu, and says whether something is to be flushed.
func (c *conn) consumed(s *stream, n int64) bool {
	c.buffered -= n
	if c.withheld > 0 && c.buffered <= c.cfg.MaxBuffered {
		back := min(c.withheld, n)
		c.withheld -= back
		c.giveBack(back)
	}
	if s.credit += n; s.credit >= int64(c.cfg.StreamWindow)/2 && !s.recvEnd && !s.off {
		c.windowUpdate(s.id, s.credit)
		s.recvWindow += s.credit
		s.credit = 0
		return true
	}
	return false
}
