package http2

import (
	"errors"
	"log/slog"
	"time"

	xhttp2 "golang.org/x/net/http2"
)

// Config configures one connection. The zero value is usable.
type Config struct {
	MaxStreams   uint32 // concurrent ones: of a server's peer, and a client's own bound beside the peer's; default 1000
	StreamWindow uint32 // bytes of a stream that its sender may be ahead of its reader; default 256 KiB
	ConnWindow   uint32 // bytes of a connection under way; default 1 MiB
	MaxBuffered  int64  // unread bytes of all streams before the connection's window is withheld; default 8 MiB
	MaxHeadBytes uint32 // of a head or trailers, as RFC 9113 §6.5.2 counts; default 64 KiB

	WriteTimeout time.Duration // a peer that takes no byte for so long is given up; default 30 s
	IdleTimeout  time.Duration // server: without streams for so long, GOAWAY; 0: never
	PingAfter    time.Duration // server: a silent peer is asked, and given up after the same time again; 0: never

	OnReject func(reason string) // called for each violation and flood with a constant; may be nil
	Log      *slog.Logger        // nil: none
}

func (c Config) withDefaults() Config {
	set := func(v *uint32, d uint32) {
		if *v == 0 {
			*v = d
		}
	}
	set(&c.MaxStreams, 1000)
	set(&c.StreamWindow, 256<<10)
	set(&c.ConnWindow, 1<<20)
	set(&c.MaxHeadBytes, 64<<10)
	if c.MaxBuffered == 0 {
		c.MaxBuffered = 8 << 20
	}
	if c.WriteTimeout == 0 {
		c.WriteTimeout = 30 * time.Second
	}
	if c.OnReject == nil {
		c.OnReject = func(string) {}
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c
}

// What streams and connections fail with, besides the causes that callers give.
var (
	ErrFull    = errors.New("http2: the peer takes no more streams at present")
	ErrGoAway  = errors.New("http2: the peer is going away")
	ErrReset   = errors.New("http2: stream reset by the peer")
	ErrClosed  = errors.New("http2: connection closed")
	ErrDead    = errors.New("http2: no byte and no answer to PING")
	ErrAborted = errors.New("http2: exchange broken off")
)

// connError ends a connection by GOAWAY.
type connError struct {
	code   xhttp2.ErrCode
	reason string // a constant
}

func (e *connError) Error() string { return "http2: " + e.reason + " (" + e.code.String() + ")" }

// streamError ends a stream by RST_STREAM.
type streamError struct {
	code   xhttp2.ErrCode
	reason string // a constant
}

func (e *streamError) Error() string { return "http2: " + e.reason + " (" + e.code.String() + ")" }

const (
	defaultWindow    = 65535
	defaultTableSize = 4096
	maxWindow        = 1<<31 - 1
	maxFrame         = 16 << 10 // what we send and accept
	frameHead        = 9
	readBuffer       = 8 << 10

	pendingFlush = 32 << 10  // unsent bytes that are not held back any longer
	pendingLimit = 256 << 10 // unsent bytes before a writer waits
	maxAnswers   = 10_000    // unsent frames of the reader

	settingsTimeout = 10 * time.Second
	lingerTimeout   = time.Second

	// Floods, per second.
	maxControl = 2000 // PING, SETTINGS, PRIORITY, empty DATA, WINDOW_UPDATE of nobody …
	maxResets  = 1000 // streams that the peer opened and reset before an answer, beside as many as it let us answer

	headFrames = 64 // CONTINUATION frames of one head
)
