// Package onspire lets a cluster live on a SPIRE that was there before: hansed then signs nothing.
//
//	wanted entries, bundles ─► plan ─► entries, federation relationships, bundles on spire-server
//	spire-server ─► own bundle (X.509 and JWT) ─► peers
//	spire-agent's Workload API ─► the control plane's own SVID
//
// Only what carries this package's marks is ever changed or removed: entries whose ID begins with "hanse-", and relationships whose
// bundle endpoint is this control plane's. What people made stays as it is, even where it is in the way.
// While SPIRE does not answer, the last good state stays in force and what is wanted is kept; Status says so.
package onspire
