//lint:file-ignore SA1019 the successors in net/http offer no PING and no GOAWAY per connection; this file is the seam that hides x/net.

package hop

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"time"

	"golang.org/x/net/http2"
)

// clientEngine turns a connection that has finished its handshake into HTTP/2 streams.
type clientEngine interface {
	start(conn net.Conn) (clientSession, error)
}

// clientSession is one HTTP/2 connection, seen from the side that opens streams.
type clientSession interface {
	roundTrip(*http.Request) (*http.Response, error)
	// streams returns how many are open or waiting, and how many the peer allows.
	streams() (open, limit int)
	// usable is false from the first GOAWAY in either direction.
	usable() bool
	ping(context.Context) error
	// shutdown sends GOAWAY and returns when the streams have ended.
	shutdown(context.Context) error
	close() error
}

// unprocessed reports whether err promises that the peer did not act on the request: a refused stream, or one above the last
// stream of a GOAWAY (RFC 9113 §8.7).
func unprocessed(err error) bool {
	var se http2.StreamError
	if errors.As(err, &se) {
		return se.Code == http2.ErrCodeRefusedStream
	}
	if err == nil {
		return false
	}
	switch err.Error() { // x/net does not export them
	case "http2: Transport received Server's graceful shutdown GOAWAY",
		"http2: client conn not usable",
		"http2: client conn could not be established":
		return true
	}
	return false
}

type xnetClient struct{ transport *http2.Transport }

func newXnetClient(maxHeaderBytes uint32, writeTimeout time.Duration) xnetClient {
	return xnetClient{&http2.Transport{
		DisableCompression:         true,
		StrictMaxConcurrentStreams: true, // the pool decides when to open a further connection
		MaxHeaderListSize:          maxHeaderBytes,
		WriteByteTimeout:           writeTimeout,
	}}
}

func (x xnetClient) start(conn net.Conn) (clientSession, error) {
	cc, err := x.transport.NewClientConn(conn)
	if err != nil {
		return nil, err
	}
	return xnetSession{cc}, nil
}

type xnetSession struct{ cc *http2.ClientConn }

func (s xnetSession) roundTrip(req *http.Request) (*http.Response, error) { return s.cc.RoundTrip(req) }
func (s xnetSession) usable() bool                                        { return s.cc.CanTakeNewRequest() }
func (s xnetSession) ping(ctx context.Context) error                      { return s.cc.Ping(ctx) }
func (s xnetSession) shutdown(ctx context.Context) error                  { return s.cc.Shutdown(ctx) }
func (s xnetSession) close() error                                        { return s.cc.Close() }

func (s xnetSession) streams() (open, limit int) {
	st := s.cc.State()
	limit = int(st.MaxConcurrentStreams)
	if limit == 0 {
		limit = 100 // before the peer's SETTINGS
	}
	return st.StreamsActive + st.StreamsReserved + st.StreamsPending, limit
}

// serverSession is one HTTP/2 connection, seen from the side that answers.
type serverSession interface {
	// serve returns when the connection has ended.
	serve()
	// goAway refuses further streams; the connection ends when the open ones have.
	goAway()
}

type serverEngine interface {
	start(ctx context.Context, conn net.Conn) serverSession
}

type xnetServer struct {
	handler        http.Handler
	maxStreams     uint32
	maxHeaderBytes int
	idleTimeout    time.Duration
	pingAfter      time.Duration
	writeTimeout   time.Duration
	log            *slog.Logger
}

func (x xnetServer) start(ctx context.Context, conn net.Conn) serverSession {
	// A Server of its own per connection, because GOAWAY is sent to all of one Server's connections.
	base := &http.Server{
		Handler:           x.handler,
		MaxHeaderBytes:    x.maxHeaderBytes,
		ReadHeaderTimeout: 10 * time.Second,
		ErrorLog:          slog.NewLogLogger(x.log.Handler(), slog.LevelDebug),
	}
	h2 := &http2.Server{
		MaxConcurrentStreams:         x.maxStreams,
		IdleTimeout:                  x.idleTimeout,
		ReadIdleTimeout:              x.pingAfter,
		PingTimeout:                  x.pingAfter,
		WriteByteTimeout:             x.writeTimeout,
		MaxUploadBufferPerConnection: 128 << 20, // far more than one stream's, so that unread uploads do not hold up the others
		MaxUploadBufferPerStream:     512 << 10,
	}
	s := &xnetServerSession{ctx: ctx, conn: conn, base: base, h2: h2}
	if err := http2.ConfigureServer(base, h2); err != nil {
		x.log.Error("configure HTTP/2", "error", err)
	}
	return s
}

type xnetServerSession struct {
	ctx  context.Context
	conn net.Conn
	base *http.Server
	h2   *http2.Server
}

func (s *xnetServerSession) serve() {
	s.h2.ServeConn(s.conn, &http2.ServeConnOpts{Context: s.ctx, BaseConfig: s.base, Handler: s.base.Handler})
}

// goAway runs the hook that http2.ConfigureServer registered; base itself listens on nothing.
func (s *xnetServerSession) goAway() { _ = s.base.Shutdown(s.ctx) }
