// Package peering runs one cluster's side of the mesh: it exports the local Snapshot, mirrors each member, judges peers, and merges.
//
//	SetLocal ─► exports ─► own etcd ─► guard (Serve) ─► peers
//	peers ─► one mirror each ─► imports ─► Decoder ─► Merge ─► Clusterset
//	         their records ─► Book       probes, load reports ─► Judge
//
// A Mesh starts from its stores: with every peer absent it serves what it knew. Run owns every goroutine here and returns after they
// have ended. One loop applies what the pure core decides; joins, leaves and tokens are methods that may be called at any time while
// Run runs. What a member is believed is decided in package federation; this package never widens it.
package peering
