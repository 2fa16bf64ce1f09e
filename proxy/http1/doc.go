// Package http1 holds HTTP/1.1 requests to the letter where leniency lets requests be smuggled (RFC 9112 §11.2).
//
//	application ─► Guard ─► net/http
//
// A Guard passes on the bytes of requests that every reader frames in the same way, and fails at the first byte of any other: a
// Content-Length beside Transfer-Encoding, two lengths, a bare CR or LF, a folded line, space before a colon, a chunk
// size that is not plain hexadecimal. It repairs nothing.
package http1
