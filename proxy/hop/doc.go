// Package hop is the multiplexed HTTP/2 hop between sidecars: one warm mutual TLS connection per peer and source
// identity, many streams on it.
//
//	sidecar ─► Client ─► pool ─► [gateway, by SNI] ─► Server ─► Handle, with the verified Caller
//
// The TLS session is end to end: a gateway on the way splices it and holds no key of it. A Client accepts exactly the SPIFFE
// ID that the caller named. A connection never carries two source identities, takes no stream after either SVID expired, and is
// closed when a change of bundles no longer verifies its peer.
// While streams are open a silent connection is asked by PING, and declared dead if that stays unanswered; its streams then fail
// with ErrDead. An Error says whether the request may have reached the application.
//
// A request takes the connection with the fewest streams. Busy ones get company in the background, up to one per processor, and streams
// that carry many bytes count for many, so that small requests go elsewhere.
//
// Raw bytes travel as CONNECT, and upgrades as extended CONNECT (RFC 9113 §8.5, RFC 8441): package proxy/message says how.
package hop
