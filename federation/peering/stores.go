package peering

import (
	"context"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hanse-mesh/hanse/federation"
	"github.com/hanse-mesh/hanse/federation/join"
)

// Bundles is the trust store of this cluster. What it holds reaches handshakes through the identity.Source.
type Bundles interface {
	// Add relates with a trust domain and takes its bundle for first contact. A newer bundle that is already there stays.
	Add(td spiffeid.TrustDomain, b *spiffebundle.Bundle) error
	// Update takes the bundle that a member exports of itself. Where a person has ended the relation it is an error and changes nothing.
	Update(td spiffeid.TrustDomain, b *spiffebundle.Bundle) error
	// Remove ends the relation: the trust domain is not trusted any more.
	Remove(td spiffeid.TrustDomain) error
}

// Exporter writes what peers may read.
type Exporter interface {
	// Load returns what was exported before, by scope and key.
	Load(ctx context.Context) (map[string]map[string][]byte, error)
	// Set makes keys the content of a scope; nil removes the scope. Only differences are written. complete says that every source
	// has been read whole: only then may peers list the scope for the first time.
	Set(ctx context.Context, scope string, keys map[string][]byte, complete bool) error
}

// Imports is where mirrors keep what peers export, by member ID. It outlives the process.
type Imports interface {
	// Follow calls f with everything that is there of a member (first is true, once), and then with each batch of changes, until ctx ends.
	Follow(ctx context.Context, memberID string, f func(first bool, changes []federation.Change)) error
	// Members lists the members of which anything is there.
	Members(ctx context.Context) ([]string, error)
	// Drop removes all of a member.
	Drop(ctx context.Context, memberID string) error
}

// Mirror copies one member's exports into Imports while it runs.
type Mirror interface {
	Run(ctx context.Context) error
	Status() MirrorStatus
	// Accept applies a loss that is held back. It reports whether there was one.
	Accept() bool
}

// MirrorStatus is what a Mirror knows.
type MirrorStatus struct {
	Revision   int64     // of the exporter, up to which everything is here
	Head       int64     // of the exporter, as last heard
	Answer     time.Time // the last of any kind; zero if none since the start
	Synced     bool
	Held       string // why a loss is held back
	Restarting bool   // the exporter announced a restart
	Error      string // the last, if it stands
}

// MirrorTarget says whom to mirror.
type MirrorTarget struct {
	MemberID    string
	Name        string
	TrustDomain spiffeid.TrustDomain
	Addresses   []string
}

// Stores is where a Mesh keeps things.
type Stores struct {
	KV        join.KV
	Exporter  Exporter
	Imports   Imports
	NewMirror func(MirrorTarget) Mirror
}
