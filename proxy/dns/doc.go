// Package dns answers one workload's DNS questions: those about the mesh itself, all others by asking the resolvers of before.
//
//	app ─► Server ─┬─ *.svc.clusterset.local ─► control plane (what is there), Pool (an address for it)
//	               └─ everything else ─► forwarder ─► upstream resolvers
//	app ─► 240.0.0.7:8080, captured ─► Pool: which service, or which endpoint of a headless one, was that?
//
// The Pool's addresses mean something in this sidecar only. One that was handed out is not handed out for anything else in a long time,
// and a sidecar that starts again knows what it has handed out. A headless service has an address for each endpoint: its own where
// that can be reached, else one of the Pool; a connection to it goes to that endpoint and no other.
//
// Names of the mesh follow KEP-1645 and the multicluster DNS specification: absence is NXDOMAIN, and a name without such a record
// NODATA, both with a SOA (RFC 2308). They are answered also while every upstream is down. Nothing listens but on loopback.
package dns
