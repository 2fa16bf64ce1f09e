// Package sds hands a workload's SVID and bundles to Envoy: the Secret Discovery Service v3, by the names that spire-agent has for them.
//
//	Source ─► Secrets by name ─► StreamSecrets ─► Envoy
//
//	default, the workload's SPIFFE ID      its X509-SVID and key
//	ROOTCA, spiffe://<own trust domain>    whom to trust of its own trust domain
//	spiffe://<trust domain>                whom to trust of that one
//	ALL                                    whom to trust of each of them, by the trust domain of the peer's ID
//
// A Secret is sent again when it has changed. A trust domain without a bundle, not yet known or distrusted, has a Secret all the same, which
// trusts nobody: Envoy would keep the last one that it was given.
package sds
