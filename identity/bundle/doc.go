// Package bundle keeps the trust bundles of this trust domain and of those it is federated with, and exchanges them.
//
//	identity/ca, join, mirror, Puller ─► Store ─► identity.Source, SPIRE Server API, Handler (the bundle endpoint)
//
// A relation says that a trust domain may be trusted; it can exist before its bundle. Without a relation no bundle is taken.
// The newer sequence wins; what is stale, empty or another trust domain's is refused, and the old bundle stays in force.
// Everything is on disk before it is in force: a restart trusts what was trusted before.
package bundle
