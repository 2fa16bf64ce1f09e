// Package identity is the vocabulary of who is who in Hanse: the SPIFFE ID scheme, the live Source of one's own
// X509-SVID and of every trusted bundle, and the mutual TLS configurations that rest on it.
//
//	identity/agent or identity/ca ─► Source ─► ServerTLS, ClientTLS ─► every listener and dialer of Hanse
//
// A Source is safe for concurrent use and never blocks a handshake: readers load one immutable state.
// A verifier picks the bundle by the peer's trust domain and compares the whole SPIFFE ID (SPIFFE-ID §2; X509-SVID §5).
// TLS is 1.3 only, without session resumption: a verified session never outlives the bundle that verified it.
package identity
