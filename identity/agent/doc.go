// Package agent gets an identity for one workload and keeps it: it attests at a SPIRE server (hansed, or SPIRE's own),
// fetches an X509-SVID and every trusted bundle, renews them, and hands them on.
//
//	token ─► AttestAgent ─► agent SVID ─► SyncAuthorizedEntries ─► BatchNewX509SVID, bundles ─► Source, Workload API, files
//	or: another agent's Workload API ─► Source
//
// Private keys are made here and never leave: they are kept in StateDir, mode 0600, so that a restart serves again at
// once, also while every server is dead, until the SVID expires.
// SVIDs are renewed at half life, with jitter, and at once when the root that signed them is not trusted any more.
// Old and whole beats new and partial: what cannot be fetched leaves the last good state in force, and is tried again.
package agent
