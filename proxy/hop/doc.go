// Package hop is the multiplexed HTTP/2 hop between sidecars: one warm mutual TLS connection per peer and source
// identity, many streams on it.
//
//	sidecar ─► Client ─► pool ─► [gateway, by SNI] ─► Server ─► http.Handler, with the caller's Peer in the context
//
// The TLS session is end to end: a gateway on the way splices it and holds no key of it. A Client accepts exactly the SPIFFE
// ID that the caller named. A connection never carries two source identities, takes no stream after either SVID expired, and is
// closed when a change of bundles no longer verifies its peer.
// While streams are open a silent connection is asked by PING, and declared dead if that stays unanswered; its streams then fail
// with ErrDead. An Error says whether the request may have reached the application.
//
// Raw bytes travel as CONNECT streams (RFC 9113 §8.5): Client.Open and Accept; docs/adr has their headers.
//
// The HTTP/2 engine is golang.org/x/net/http2, in engine.go and nowhere else.
package hop
