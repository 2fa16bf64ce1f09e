// Package upstream lets somebody else's CA stand above Hanse's own authority: it implements ca.Upstream.
//
//	files (PEM, or a folder as cert-manager writes it) ─► Files ─┐
//	spire-server, with a downstream entry ─────────────► SPIRE ──┴─► a CA of ours below the root, which signs the SVIDs
//
// What does not read, fit together or answer is said in the log and by Err; the last good state stays in force.
package upstream
