// Package spireapi serves the SPIRE Server API (spire-api-sdk v1: agent, svid, entry, bundle, trustdomain) over
// identity/ca, identity/attest and identity/bundle, so that Hanse's agents and unmodified spire-agents get their SVIDs here.
//
//	agent ─ AttestAgent(token, CSR) ─► agent SVID ─ mTLS ─► SyncAuthorizedEntries ─► BatchNewX509SVID, GetBundle, …
//	people ─ Unix socket, or mTLS with an admin SVID ─► entries, agents, tokens, federated bundles, relations
//
// On TLS a caller without certificate may attest and read the own bundle. Everything else needs an attested agent's
// active SVID or an administrator's; each method says which, and what it does not say is refused.
// A redeemed agent token makes an agent with exactly one entry, which federates with every related trust domain.
// IDs under /hanse/ and /spire/ are never given to an entry or minted here; only a token bound to the gateway yields its ID.
// Records are written to the KV before they are in force.
package spireapi
