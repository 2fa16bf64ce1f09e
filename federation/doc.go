// Package federation turns every cluster's exports into one clusterset view. It is pure: no clock, no network, no store.
//
//	local Snapshot ─► Encode ─► exports ─► peers
//	peers' exports ─► imports ─► Decoder ─► Merge ─► Clusterset ─► xDS
//	peers' records ─► Book (who is a member)       answers, probes ─► Judge (fresh, suspect, withdrawn)
//
// Encode keeps an endpoint in its slot and is deterministic: equal exports are equal bytes. A Decoder is the one border where foreign
// bytes become our types: bounded, only SPIFFE IDs of the exporter's own trust domain, and what the Peer object lets in. A bad object is
// a Fault of that object; its last good state stays in force. Merge follows KEP-1645 and gives the same Clusterset in
// whatever order exports came. A member leaves a Book only by a left record of its own, of its sponsor, or by a person's word: absence
// removes nobody. A silent peer's exports are demoted, and are withdrawn only when its data path is dead too.
package federation
