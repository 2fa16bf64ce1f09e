// Package http2 is Hanse's HTTP/2 engine (RFC 9113, 8441): client and server over any net.Conn, for applications in the clear and for
// the hop over mutual TLS.
//
//	net.Conn ─► one reader per connection ─► streams ─► ServerStream's handler, ClientStream's user
//	streams ─► pending bytes of the connection ─► whoever flushes first yields once, and writes for all
//
// Frames are read by golang.org/x/net/http2's Framer and heads by its hpack package; everything else is here, HPACK's encoder included. A connection's reader
// never waits for anybody: what arrives is held by its stream up to the stream's window, and a slow reader so holds up its own stream
// only. The connection's window is given back when bytes arrive, until all streams together hold MaxBuffered; from then on, when
// they are read. Priorities are ignored, as RFC 9113 §5.3.2 allows.
//
// What a peer may make the engine keep or do is bounded: streams with a handler, bytes of a head, frames of a head, unread bytes, unsent
// answers, resets and control frames per second. Who exceeds it gets ENHANCE_YOUR_CALM.
package http2
