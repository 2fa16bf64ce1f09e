// Package gateway forwards sealed bytes between networks by the server name of their TLS ClientHello.
//
//	far sidecar ─► Gateway: SNI ─► Table.SNI ─► one target's mTLS port
//	                    └─ probe.<member ID> ─► answered here, with the gateway's own SVID
//
// The gateway ends no TLS but a probe's, so it can neither read nor change what it carries, and it dials only what its Table names.
// An unknown name is answered with the TLS alert unrecognized_name, a target that cannot be reached with internal_error: the
// caller then knows that the endpoint failed and not the gateway.
package gateway
