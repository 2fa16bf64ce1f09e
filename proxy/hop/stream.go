package hop

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"sync"
)

// headerHalfClose asks for, and promises, framed bytes from server to client; see Stream.
const headerHalfClose = "Hanse-Half-Close"

const framed = "framed"

// Stream carries raw bytes both ways over one CONNECT stream. Each direction ends on its own: CloseWrite sends the end, Read returns
// io.EOF after the other side's.
//
// The server's HTTP/2 engine cannot end its direction while it still reads, so between two Hanse peers the server's bytes are framed:
// a 32-bit big-endian length and that many bytes; length 0 is the end. Towards other peers the server's end closes both directions.
type Stream struct {
	Header http.Header // the other side's

	r          io.ReadCloser
	w          io.Writer
	closeWrite func() error
	close      func()

	framedRead  bool
	framedWrite bool

	readMu sync.Mutex
	left   uint32 // guarded by readMu: of the current frame
	eof    bool   // guarded by readMu

	writeMu sync.Mutex
	buf     []byte // guarded by writeMu
	ended   bool   // guarded by writeMu
}

// StatusError is an answer to CONNECT other than success.
type StatusError struct {
	Status int
	Header http.Header
	Body   io.ReadCloser // to be closed
}

// Error implements error.
func (e *StatusError) Error() string { return fmt.Sprintf("peer answered CONNECT with %d", e.Status) }

// Open opens a CONNECT stream to authority at peer. It returns *StatusError if the peer refuses, *Error if it was not reached.
// ctx bounds the opening only. The caller closes the Stream.
func (c *Client) Open(ctx context.Context, peer Peer, authority string, header http.Header) (*Stream, error) {
	streamCtx, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() { cancel(context.Cause(ctx)) })
	pr, pw := io.Pipe()
	h := header.Clone()
	if h == nil {
		h = http.Header{}
	}
	h.Set(headerHalfClose, framed)
	req := (&http.Request{
		Method: http.MethodConnect, URL: &url.URL{Scheme: "https", Host: authority}, Host: authority,
		Header: h, Body: pr, ContentLength: -1, Proto: "HTTP/2.0", ProtoMajor: 2,
	}).WithContext(streamCtx)
	resp, err := c.RoundTrip(peer, req)
	if !stop() && err == nil {
		_ = resp.Body.Close()
		err = &Error{Peer: peer.SPIFFEID, Address: peer.Address, Stage: StageStream, Sent: true, Err: context.Cause(ctx)}
	}
	if err != nil {
		cancel(err)
		_ = pw.CloseWithError(err)
		return nil, err
	}
	if resp.StatusCode/100 != 2 {
		_ = pw.Close()
		return nil, &StatusError{Status: resp.StatusCode, Header: resp.Header, Body: resp.Body}
	}
	s := &Stream{Header: resp.Header, r: resp.Body, w: pw, closeWrite: pw.Close, framedRead: resp.Header.Get(headerHalfClose) == framed}
	s.close = func() {
		_ = pw.CloseWithError(io.ErrClosedPipe)
		_ = resp.Body.Close()
		cancel(io.ErrClosedPipe)
	}
	return s, nil
}

// Accept answers a CONNECT request with 200 and header. The Stream lives until the handler returns.
func Accept(w http.ResponseWriter, r *http.Request, header http.Header) (*Stream, error) {
	rc := http.NewResponseController(w)
	for k, v := range header {
		w.Header()[k] = v
	}
	wantFramed := r.Header.Get(headerHalfClose) == framed
	if wantFramed {
		w.Header().Set(headerHalfClose, framed)
	}
	w.WriteHeader(http.StatusOK)
	if err := rc.Flush(); err != nil {
		return nil, fmt.Errorf("answer CONNECT: %w", err)
	}
	s := &Stream{Header: r.Header, r: r.Body, framedWrite: wantFramed}
	s.w = flushWriter{w, rc}
	s.closeWrite = func() error { return errors.ErrUnsupported }
	s.close = func() { _ = r.Body.Close() }
	return s, nil
}

type flushWriter struct {
	w  io.Writer
	rc *http.ResponseController
}

func (f flushWriter) Write(p []byte) (int, error) {
	n, err := f.w.Write(p)
	if err == nil {
		err = f.rc.Flush()
	}
	return n, err
}

// Read implements io.Reader.
func (s *Stream) Read(p []byte) (int, error) {
	if !s.framedRead {
		return s.r.Read(p)
	}
	s.readMu.Lock()
	defer s.readMu.Unlock()
	if s.eof {
		return 0, io.EOF
	}
	if s.left == 0 {
		var head [4]byte
		if _, err := io.ReadFull(s.r, head[:]); err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF // an end without its frame is a broken stream
			}
			return 0, err
		}
		if s.left = binary.BigEndian.Uint32(head[:]); s.left == 0 {
			s.eof = true
			return 0, io.EOF
		}
	}
	n, err := s.r.Read(p[:min(len(p), int(s.left))])
	s.left -= uint32(n)
	if errors.Is(err, io.EOF) {
		err = nil // the next Read tells whether the end was announced
	}
	return n, err
}

// Write implements io.Writer. The bytes are on their way when it returns.
func (s *Stream) Write(p []byte) (int, error) {
	if !s.framedWrite {
		return s.w.Write(p)
	}
	if len(p) == 0 {
		return 0, nil
	}
	s.writeMu.Lock()
	defer s.writeMu.Unlock()
	if s.ended {
		return 0, io.ErrClosedPipe
	}
	s.buf = binary.BigEndian.AppendUint32(s.buf[:0], uint32(len(p)))
	s.buf = append(s.buf, p...)
	if _, err := s.w.Write(s.buf); err != nil {
		return 0, err
	}
	return len(p), nil
}

// CloseWrite ends this side's direction. It is errors.ErrUnsupported on the server's side where the peer does not know frames: only
// Close is left then.
func (s *Stream) CloseWrite() error {
	if !s.framedWrite {
		return s.closeWrite()
	}
	s.writeMu.Lock()
	defer s.writeMu.Unlock()
	if s.ended {
		return nil
	}
	s.ended = true
	_, err := s.w.Write(make([]byte, 4))
	return err
}

// Close ends both directions at once.
func (s *Stream) Close() error {
	s.close()
	return nil
}
