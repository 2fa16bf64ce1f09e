// Package sidecar stands beside one workload: what the application calls goes out through it, and what calls the application comes
// in through it.
//
//	app ─► http1, http2 ─► outbound (explicit proxy, local listeners) ─► Table: route ─► balance ─► hop ═══► [gateway] ═══► peer
//	app ─► captured: by address ─► the same, or as it is to what is none of the mesh's
//	peer ═══► hop ─► inbound: target, access ─► http1, http2 ─► app
//
// Both ways are written against the exchanges of package message, so that any protocol meets any other.
// A request keeps the Table that it began with; a new Table touches no open stream. Nothing is forwarded as raw bytes past a parsed
// head, except where the caller asked for a tunnel.
// A try that reached no application is repeated on another endpoint; one that may have reached it only if the method is idempotent
// (RFC 9110 §9.2.2) or the route says so, within the retry budget, and if its body is still at hand (64 KiB).
// A captured connection belongs to the service at the address that it was made to. Callers without mutual TLS are refused, unless permitted
// or exempt by configuration; each is counted and named.
// Inbound refuses what no AccessPolicy or default allows, and ports that are not declared. Whoever calls is named to the application
// in x-forwarded-client-cert, which no caller can set.
//
// Header fields of our own, between sidecars unless said otherwise:
//
//	hanse-target       service:port that the request is for
//	hanse-status       the application's status, where it answered an upgrade with success and did not switch; docs/adr
//	hanse-unprocessed  "true": nothing reached the application, trying elsewhere is safe
//	hanse-error        to callers: the code of a failure that a proxy answers with
//	hanse-peer-address to the application, if configured: where the hop connection came from
package sidecar
