// Package ca is the authority of one replica of a trust domain: it signs X509-SVIDs and JWT-SVIDs, and replaces its own
// roots in time.
//
//	Open ─► prepared ─► active ─► old ─► gone         each root: an X.509 root and a JWT key, both P-256
//	          │            │        │
//	          └────────────┴────────┴─► Bundle ─► agents, peers
//
// A private key never leaves the replica that made it; state and keys are one file, mode 0600, replaced atomically.
// A root is in the bundle before it signs: Run prepares the next at half life, and activates it when Config.Acked says
// that everybody has it, or, with an alarm, when a quarter of the old root's life remains.
// A root stays in the bundle until everything that it signed has expired.
// Nothing that an authority signs outlives the root that signed it.
package ca
