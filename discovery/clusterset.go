package discovery

import (
	"net/netip"
	"time"
)

// Clusterset is the view of the whole mesh from one cluster: its own Snapshot and what it imports.
type Clusterset struct {
	Local    *Snapshot
	Imports  ByName[*Import]
	Members  map[string]*Member // by member name, without this cluster
	Trusted  map[string]uint64  // sequence of the newest bundle by trust domain, own included
	Revision uint64             // grows with every change
}

// PeerState says how much a member's control plane and data path are heard of (protocol: fresh, suspect, withdrawn).
type PeerState string

// States.
const (
	Fresh     PeerState = "fresh"
	Suspect   PeerState = "suspect"   // demoted below fresh ones
	Withdrawn PeerState = "withdrawn" // not routed to
)

// Member is another cluster of the mesh as this one sees it.
type Member struct {
	ID          string           `json:"id"` // random, never reused
	Name        string           `json:"name"`
	TrustDomain string           `json:"trustDomain"`
	Network     string           `json:"network"`
	Region      string           `json:"region,omitempty"`
	Addresses   []string         `json:"addresses"` // host:port of its federation listener
	Gateways    []netip.AddrPort `json:"gateways"`
	State       PeerState        `json:"state"`
	Since       time.Time        `json:"since"` // of State
}

// Import is a service as imported: the union of what this cluster and its peers export under one name
// (KEP-1645 "ServiceImport"). A service that nobody exports is not in Clusterset.Imports, but callable within its own cluster.
type Import struct {
	Name
	Traits
	Ports       []Port            `json:"ports"`            // union by (name, number); a conflict is resolved by the oldest export
	Labels      map[string]string `json:"labels,omitempty"` // of the oldest export
	Annotations map[string]string `json:"annotations,omitempty"`
	From        []ImportedFrom    `json:"from"` // by export time, oldest first; ties by member ID
	Conflicts   []ImportConflict  `json:"conflicts,omitempty"`
}

// ConflictsOf returns the conflicts that a member's export is concerned in, as the one that lost or the one that won: MCS wants the
// Conflict condition on each of them.
func (i *Import) ConflictsOf(member string) []ImportConflict {
	var of []ImportConflict
	for _, c := range i.Conflicts {
		if c.Member == member || c.With == member {
			of = append(of, c)
		}
	}
	return of
}

// ImportedFrom is one cluster's part of an Import.
type ImportedFrom struct {
	Member    string      `json:"member"` // member name; this cluster's own name for its own export
	Ports     []Port      `json:"ports"`
	Exported  time.Time   `json:"exported"`
	Revision  int64       `json:"revision"` // of the exporter's etcd when the data was written; 0 for the own export
	Endpoints []*Endpoint `json:"endpoints"`
	Withheld  int         `json:"withheld,omitempty"` // more endpoints, whose IDs Peer.spec.import or spec.allow of their trust domain does not let in
}

// ImportConflict is an MCS Conflict condition: what Member exports differs from what With exports, and is not what is imported.
type ImportConflict struct {
	Member  string `json:"member"`
	With    string `json:"with"`
	Reason  string `json:"reason"` // MCS reasons: PortConflict, TypeConflict, SessionAffinityConflict, …
	Message string `json:"message"`
}
