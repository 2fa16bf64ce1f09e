// Package etcd moves a cluster's exports to its peers and the peers' exports here, as bytes under keys of etcd.
//
//	Exporter ─► own etcd: exports/v1/<scope>/… ─► Guard ═ SPIFFE mTLS, read-only etcd API ═► Mirror of each peer
//	Mirror ─► imports etcd: imports/<peer>/<scope>/{data/…, checkpoint} ─► FollowImports ─► changed keys
//
// It knows scopes, epochs, ticks and counts, and nothing of what a value means. Embedded is one etcd inside the process, without any
// listening socket; DialExternal reaches an external one, and then an Election names the replica that writes: each of its
// Txns compares the leader key, so a deposed leader writes nothing.
//
// A key leaves the imports only by a DELETE event of the peer, by a completed list that agrees with the peer's own count, or with its
// whole scope when the peer's scope list says so. Silence, errors and clocks remove nothing. The checkpoint is in the same Txn
// as the keys it stands for and fences it: two mirrors of one peer never lose, resurrect or age a key. No data key has a lease.
package etcd
