package peering

import "github.com/spiffe/go-spiffe/v2/spiffeid"

// AuthorizePrefixes is the guard's question, for tests whose stores have no guard.
func AuthorizePrefixes(m *Mesh, id spiffeid.ID) ([]string, bool) { return m.authorizePrefixes(id) }
