package discovery

import (
	"net/netip"
	"time"
)

// Clusterset is the view of the whole mesh from one cluster: its own Snapshot and what it imports.
type Clusterset struct {
	Local    *Snapshot
	Imports  map[Name]*Import
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
	Ports     []Port           `json:"ports"` // union by (name, number); a conflict is resolved by the oldest export
	Headless  bool             `json:"headless,omitempty"`
	Affinity  string           `json:"sessionAffinity,omitempty"`
	From      []ImportedFrom   `json:"from"` // by export time, oldest first; ties by member ID
	Conflicts []ImportConflict `json:"conflicts,omitempty"`
}

// ImportedFrom is one cluster's part of an Import.
type ImportedFrom struct {
	Member    string      `json:"member"` // member name; this cluster's own name for its own export
	Ports     []Port      `json:"ports"`
	Exported  time.Time   `json:"exported"`
	Revision  int64       `json:"revision"` // of the exporter's etcd when the data was written; 0 for the own export
	Endpoints []*Endpoint `json:"endpoints"`
}

// ImportConflict is an MCS Conflict condition.
type ImportConflict struct {
	Member  string `json:"member"`
	Reason  string `json:"reason"` // MCS reasons: PortConflict, TypeConflict, SessionAffinityConflict, …
	Message string `json:"message"`
}
