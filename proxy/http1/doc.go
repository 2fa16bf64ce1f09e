// Package http1 speaks HTTP/1.1 (RFC 9110, 9112) with applications, to the letter where leniency lets requests be smuggled
// (RFC 9112 §11.2).
//
//	application ─► ServerConn ─► message.ServerStream
//	message.ClientStream ◄─ Client ─► application
//
// Parsing is a state machine over bytes: heads (parse.go) and the chunked coding (chunked.go), without I/O, with one allocation a
// head. What two readers could frame differently is refused with a status and a reason that is counted, never repaired: a
// Content-Length beside Transfer-Encoding, two lengths, a bare CR or LF, a folded line, space before a colon, a chunk size that is not plain
// hexadecimal, an absolute target against Host. Nothing is forwarded as raw bytes but what follows an accepted CONNECT or upgrade.
//
// A server connection is one goroutine; a second one looks out for the caller's leaving when a handler takes its time. A Client keeps
// connections to one address, and sends a request again only if nobody can have seen it, or if it is idempotent, without a body, and was the
// first to find the connection closed.
package http1
