package federation

import (
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	"github.com/hanse-mesh/hanse/federation/federationpb"
)

// Standing is how far a cluster is in the mesh. It is not how well it is heard: see discovery.PeerState.
type Standing string

// Standings. Joining carries no traffic and expires with its mesh token.
const (
	Joining Standing = "joining"
	Joined  Standing = "member"
	Left    Standing = "left"
)

// Bounds of a Record.
const (
	maxAddresses = 16
	maxGateways  = 64
	maxBundle    = 128 << 10
	maxChain     = 8
	maxRecord    = 192 << 10
)

// Record is what is said about one member: by itself, and by the sponsor that admitted it. Others carry only its left record.
type Record struct {
	ID          string
	Name        string
	TrustDomain string
	Addresses   []string
	Gateways    []netip.AddrPort
	Network     string
	Region      string
	Bundle      []byte // SPIFFE JSON
	Sponsor     string // member ID; empty for the first
	Incarnation uint64 // grows whenever it leaves or (re)joins
	Standing    Standing
	Version     string
	Mesh        string
	Admitted    time.Time
	Changed     time.Time // when Standing was written
	Expires     time.Time // of Joining
	Proof       *Proof    // of Left
}

// Proof says who wrote a left record, so that anyone may carry it.
type Proof struct {
	Chain     [][]byte // X509-SVID of the writer's control plane, leaf first, DER
	Signature []byte   // over SignedBytes
}

// Proto returns the record as it is sent and stored.
func (r *Record) Proto() *federationpb.Member {
	pb := &federationpb.Member{
		Id: r.ID, Name: r.Name, TrustDomain: r.TrustDomain, Addresses: r.Addresses, Network: r.Network, Region: r.Region,
		Bundle: r.Bundle, Sponsor: r.Sponsor, Incarnation: r.Incarnation, Version: r.Version, Mesh: r.Mesh,
		AdmittedUnixMs: toMillis(r.Admitted), ChangedUnixMs: toMillis(r.Changed), ExpiresUnixMs: toMillis(r.Expires),
	}
	switch r.Standing {
	case Joining:
		pb.State = federationpb.Member_JOINING
	case Joined:
		pb.State = federationpb.Member_MEMBER
	case Left:
		pb.State = federationpb.Member_LEFT
	}
	for _, g := range r.Gateways {
		pb.Gateways = append(pb.Gateways, g.String())
	}
	if r.Proof != nil {
		pb.Proof = &federationpb.Proof{Chain: r.Proof.Chain, Signature: r.Proof.Signature}
	}
	return pb
}

// Bytes returns the record deterministically encoded.
func (r *Record) Bytes() []byte { return mustMarshal(r.Proto()) }

// SignedBytes is what a Proof signs: everything except bundle and proof.
func (r *Record) SignedBytes() []byte {
	pb := r.Proto()
	pb.Bundle, pb.Proof = nil, nil
	return mustMarshal(pb)
}

func mustMarshal(m proto.Message) []byte {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		panic(fmt.Sprintf("marshal %T: %v", m, err)) // only invalid UTF-8 could, and records are checked when they are made
	}
	return b
}

// DecodeRecord reads a record of another cluster.
func DecodeRecord(b []byte) (Record, error) {
	if len(b) > maxRecord {
		return Record{}, fmt.Errorf("member record of %d bytes, at most %d are accepted", len(b), maxRecord)
	}
	pb := &federationpb.Member{}
	if err := proto.Unmarshal(b, pb); err != nil {
		return Record{}, fmt.Errorf("not a Member: %w", err)
	}
	return RecordFromProto(pb)
}

// RecordFromProto checks every bound of a record. The bundle is only bounded in size; whoever trusts it parses it.
func RecordFromProto(pb *federationpb.Member) (Record, error) {
	fail := func(format string, args ...any) (Record, error) {
		return Record{}, fmt.Errorf("member record %.40q: %w", pb.GetId(), fmt.Errorf(format, args...))
	}
	if !IsMemberID(pb.GetId()) {
		return fail("the ID is not 32 hex digits")
	}
	if pb.Sponsor != "" && !IsMemberID(pb.Sponsor) {
		return fail("the sponsor's ID is not 32 hex digits")
	}
	if !dnsLabel.MatchString(pb.Name) {
		return fail("name %.80q is not a DNS label", pb.Name)
	}
	if td, err := spiffeid.TrustDomainFromString(pb.TrustDomain); err != nil || td.Name() != pb.TrustDomain {
		return fail("trust domain %.80q is not valid", pb.TrustDomain)
	}
	if len(pb.Network) > maxString || len(pb.Region) > maxString || len(pb.Version) > maxString || len(pb.Mesh) > maxString {
		return fail("network, region, version or mesh name longer than %d bytes", maxString)
	}
	if len(pb.Addresses) > maxAddresses || len(pb.Gateways) > maxGateways || len(pb.Bundle) > maxBundle {
		return fail("%d addresses, %d gateways, bundle of %d bytes: at most %d, %d and %d", len(pb.Addresses), len(pb.Gateways), len(pb.Bundle), maxAddresses, maxGateways, maxBundle)
	}
	r := Record{
		ID: pb.Id, Name: pb.Name, TrustDomain: pb.TrustDomain, Addresses: pb.Addresses, Network: pb.Network, Region: pb.Region,
		Bundle: pb.Bundle, Sponsor: pb.Sponsor, Incarnation: pb.Incarnation, Version: pb.Version, Mesh: pb.Mesh,
		Admitted: fromMillis(pb.AdmittedUnixMs), Changed: fromMillis(pb.ChangedUnixMs), Expires: fromMillis(pb.ExpiresUnixMs),
	}
	switch pb.State {
	case federationpb.Member_JOINING:
		r.Standing = Joining
	case federationpb.Member_MEMBER:
		r.Standing = Joined
	case federationpb.Member_LEFT:
		r.Standing = Left
	default:
		return fail("state %d is unknown", pb.State)
	}
	if r.Incarnation == 0 || r.Incarnation > 1<<40 {
		return fail("incarnation %d is out of bounds", r.Incarnation)
	}
	for _, a := range pb.Addresses {
		if err := CheckAddress(a); err != nil {
			return fail("%w", err)
		}
	}
	for _, g := range pb.Gateways {
		ap, err := netip.ParseAddrPort(g)
		if err != nil || ap.Port() == 0 {
			return fail("gateway %.80q is not ip:port", g)
		}
		r.Gateways = append(r.Gateways, ap)
	}
	if p := pb.Proof; p != nil {
		if len(p.Chain) > maxChain || len(p.Signature) > 1024 {
			return fail("proof with %d certificates and a signature of %d bytes", len(p.Chain), len(p.Signature))
		}
		r.Proof = &Proof{Chain: p.Chain, Signature: p.Signature}
	}
	return r, nil
}

// CheckAddress says what is wrong with a host:port.
func CheckAddress(a string) error {
	host, port, err := net.SplitHostPort(a)
	if err != nil || host == "" || len(a) > maxString+6 {
		return fmt.Errorf("address %.80q is not host:port", a)
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return fmt.Errorf("address %.80q has no valid port", a)
	}
	return nil
}

// IsMemberID reports whether s is 32 lower-case hex digits.
func IsMemberID(s string) bool {
	b, err := hex.DecodeString(s)
	return err == nil && len(b) == 16 && hex.EncodeToString(b) == s
}

// clone returns a record that shares nothing that its holder may change.
func (r Record) clone() Record {
	r.Addresses, r.Gateways = slices.Clone(r.Addresses), slices.Clone(r.Gateways)
	return r
}
