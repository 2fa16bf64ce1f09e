// Package admin is what hanse says to hansed: HTTP with JSON over a Unix socket (file permissions decide who may), or over
// mutual TLS with an admin SVID on port 7447.
//
//	hanse ─► Client ══ HTTP/JSON ══► Handler ─► Backend (hansed)
//
// The types here are also the documented shape of every `hanse … -o json`. Ages and durations are seconds, times are RFC 3339.
// Long operations (join, drill run, watches) answer with newline-delimited JSON: Event values, the last of which has Done or Error.
package admin
