// Package discovery is the vocabulary of what a cluster offers and wants: services, endpoints, localities, exports, routes
// and policies, in the immutable Snapshot that every source yields.
//
//	file, kube ─► objects ─► Snapshot (this cluster) ─► federation.Merge ─► Clusterset ─► xdsgen ─► xdsserver ─► proxies
//
// A Snapshot is never changed after it was handed out; the next state is the next Snapshot. Slices that have no order of
// their own are sorted, so that equal states are equal values. The package imports nothing of this module.
package discovery
