package federation

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/hanse-mesh/hanse/discovery"
)

// Scopes that every member may read. Peer scopes are "peers/<member-id>", readable by that member alone.
const (
	MembersScope = "members" // <member-id> → Member
	AcksScope    = "acks"    // <trust-domain> → Ack
	AllScope     = "all"     // exports for every member
)

// ScopesKey is the one key of a peer scope.
const ScopesKey = "scopes"

// PeerScope returns the scope that tells one peer what it may read.
func PeerScope(memberID string) string { return "peers/" + memberID }

// AudienceScope returns the scope of exports for this audience. The same set of names and labels is the same scope.
func AudienceScope(audience []string) string {
	if len(audience) == 0 {
		return AllScope
	}
	s := slices.Compact(slices.Sorted(slices.Values(audience)))
	sum := sha256.Sum256([]byte(strings.Join(s, "\n")))
	return "for-" + hex.EncodeToString(sum[:8])
}

// ServiceKey returns "svc/<namespace>/<name>".
func ServiceKey(n discovery.Name) string { return "svc/" + n.Namespace + "/" + n.Name }

// SlotKey returns "ep/<namespace>/<name>/<slot>".
func SlotKey(n discovery.Name, slot int) string {
	return "ep/" + n.Namespace + "/" + n.Name + "/" + strconv.Itoa(slot)
}

// dnsLabel is RFC 1123's.
var dnsLabel = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)

// ParseKey reads a key of ServiceKey (slot is -1) or SlotKey.
func ParseKey(key string) (n discovery.Name, slot int, err error) {
	p := strings.Split(key, "/")
	switch {
	case len(p) == 3 && p[0] == "svc":
		slot = -1
	case len(p) == 4 && p[0] == "ep":
		slot, err = strconv.Atoi(p[3])
		if err != nil || slot < 0 || slot >= MaxSlots || strconv.Itoa(slot) != p[3] {
			return n, 0, fmt.Errorf("key %q: slot %q is not a number below %d", key, p[3], MaxSlots)
		}
	default:
		return n, 0, fmt.Errorf("key %q: neither svc/<namespace>/<name> nor ep/<namespace>/<name>/<slot>", key)
	}
	n = discovery.Name{Namespace: p[1], Name: p[2]}
	if !dnsLabel.MatchString(n.Namespace) || !dnsLabel.MatchString(n.Name) {
		return n, 0, fmt.Errorf("key %q: %q is not a DNS label pair", key, n)
	}
	return n, slot, nil
}

// IsExport reports whether a key of a scope is of a service or of a slot, and not of membership or bookkeeping.
func IsExport(key string) bool {
	return strings.HasPrefix(key, "svc/") || strings.HasPrefix(key, "ep/")
}
