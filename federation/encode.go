package federation

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/federation/federationpb"
)

// Bounds of exports. Encode refuses what it would not itself decode.
const (
	MaxValue     = 256 << 10               // bytes of one object
	MaxPorts     = 256                     // of a service
	MaxSlot      = 64                      // endpoints of a slot
	MaxSlots     = 4096                    // of a service
	MaxEndpoints = (slotTarget) * MaxSlots // of a service
	slotTarget   = 48                      // endpoints that Encode aims at
)

// Fault is one object that could not be exported or imported. Its last good state stays in force.
type Fault struct {
	Member string // name of the exporter; empty for an own export
	Scope  string
	Key    string
	Reason string
}

// Error returns the fault as one sentence.
func (f Fault) Error() string {
	if f.Member == "" {
		return fmt.Sprintf("export %s in scope %s: %s", f.Key, f.Scope, f.Reason)
	}
	return fmt.Sprintf("import %s in scope %s from cluster %s: %s", f.Key, f.Scope, f.Member, f.Reason)
}

// Sum tells values apart: half of their SHA-256.
type Sum = [16]byte

// Exports is what a cluster exports, as keys and the sums of their values: a value is encoded again when it is needed. It is immutable.
type Exports struct {
	Scopes    map[string]int      // endpoints of each
	Audience  map[string][]string // member names and labels by scope; empty is every member
	Services  int
	Endpoints int

	trustDomain string
	services    discovery.ByName[*exported]
	from        discovery.ByName[*discovery.Service] // the Snapshot's
	failed      map[discovery.Name]struct{}          // those of from that could not be encoded
	held        map[string]int                       // services of each scope; nil after Restore
}

// exported is one service as it was last encoded.
type exported struct {
	source   *discovery.Service // from which it was encoded; nil after Restore
	scope    string
	audience []string
	since    time.Time
	ids      []string       // of endpoints; sorted, unless this is from Restore
	slots    []uint16       // of these
	sums     map[string]Sum // of values, by key
}

// Since returns the export time of a service, which was set when it was first exported.
func (e *Exports) Since(n discovery.Name) time.Time {
	if e == nil {
		return time.Time{}
	}
	if x := e.services.Get(n); x != nil {
		return x.since
	}
	return time.Time{}
}

// Scope returns the scope in which a service is exported, or "".
func (e *Exports) Scope(n discovery.Name) string {
	if x := e.services.Get(n); x != nil {
		return x.scope
	}
	return ""
}

// Sums returns the sums of a scope, by key.
func (e *Exports) Sums(scope string) map[string]Sum {
	sums := map[string]Sum{}
	for _, x := range e.services.All() {
		if x.scope == scope {
			maps.Copy(sums, x.sums)
		}
	}
	return sums
}

// Changes returns the sums that differ from those of prev, by scope and key; zero is a key that is gone.
func (e *Exports) Changes(prev *Exports) map[string]map[string]Sum {
	changes := map[string]map[string]Sum{}
	note := func(scope, key string, sum Sum) {
		if changes[scope] == nil {
			changes[scope] = map[string]Sum{}
		}
		changes[scope][key] = sum
	}
	discovery.Diff(prev.services, e.services, func(_ discovery.Name, old, x *exported) {
		if old != nil {
			for key := range old.sums {
				if x == nil || x.scope != old.scope || x.sums[key] == (Sum{}) {
					note(old.scope, key, Sum{})
				}
			}
		}
		if x != nil {
			for key, sum := range x.sums {
				if old == nil || old.scope != x.scope || old.sums[key] != sum {
					note(x.scope, key, sum)
				}
			}
		}
	})
	return changes
}

// Moved calls f for every service of e that is not in next, or in another scope there: its scope here, and how many endpoints it has in it.
func (e *Exports) Moved(next *Exports, f func(n discovery.Name, scope string, endpoints int)) {
	discovery.Diff(e.services, next.services, func(n discovery.Name, x, now *exported) {
		if x != nil && (now == nil || now.scope != x.scope) {
			f(n, x.scope, len(x.ids))
		}
	})
}

// Readable returns the scopes that a member may read, sorted. An audience names members, or labels ("tier=gold") that the exporter's own Peer
// object gives them.
func (e *Exports) Readable(member string, labels map[string]string) []string {
	in := func(who string) bool {
		key, value, label := strings.Cut(who, "=")
		return who == member || label && value == labels[key] && labels[key] != ""
	}
	var scopes []string
	for scope, audience := range e.Audience {
		if len(audience) == 0 || slices.ContainsFunc(audience, in) {
			scopes = append(scopes, scope)
		}
	}
	slices.Sort(scopes)
	return scopes
}

// Value encodes what a key of a scope holds. It has the sum that Sums says.
func (e *Exports) Value(scope, key string) ([]byte, error) {
	n, slot, err := ParseKey(key)
	if err != nil {
		return nil, err
	}
	x := e.services.Get(n)
	if x == nil || x.scope != scope {
		return nil, fmt.Errorf("key %s is not exported in scope %s", key, scope)
	}
	if x.source == nil {
		return nil, fmt.Errorf("key %s is from before the last start, and its service cannot be encoded now", key)
	}
	enc := &encoder{trustDomain: e.trustDomain}
	if slot < 0 {
		err = enc.service(x.source, x.since)
	} else {
		known := x.known()
		in := make([]*discovery.Endpoint, 0, MaxSlot)
		for _, ep := range x.source.Endpoints {
			if at, ok := known(ep.ID); ok && at == slot {
				in = append(in, ep)
			}
		}
		err = enc.slot(in)
	}
	return enc.buf, err
}

// NewExports returns Exports of nothing, to Restore into.
func NewExports() *Exports {
	return &Exports{Scopes: map[string]int{}}
}

// Restore reads one key of a cluster's own exports back from its store, so that the next Encode keeps slots and export times. What does not
// decode is left out and encoded anew.
func (e *Exports) Restore(scope, key string, value []byte) {
	e.Scopes[scope] += 0
	n, slot, err := ParseKey(key)
	if err != nil {
		return
	}
	x := e.services.Get(n)
	if x == nil {
		x = &exported{scope: scope, sums: map[string]Sum{}}
		e.services = e.services.Put(n, x)
	}
	if x.scope == scope {
		x.sums[key] = sumOf(value)
	}
	if slot < 0 {
		var pb federationpb.Service
		if proto.Unmarshal(value, &pb) == nil {
			x.since = fromMillis(pb.ExportedUnixMs)
		}
		return
	}
	var pb federationpb.Slot
	if proto.Unmarshal(value, &pb) == nil {
		e.Scopes[scope] += len(pb.Endpoints)
		for _, ep := range pb.Endpoints {
			x.ids, x.slots = append(x.ids, hex.EncodeToString(ep.Id)), append(x.slots, uint16(slot))
		}
	}
}

func sumOf(value []byte) Sum {
	h := sha256.Sum256(value)
	return Sum(h[:16])
}

// known returns where an endpoint was before.
func (x *exported) known() func(id string) (slot int, ok bool) {
	if x == nil {
		return func(string) (int, bool) { return 0, false }
	}
	if x.source == nil {
		slots := make(map[string]int, len(x.ids))
		for i, id := range x.ids {
			slots[id] = int(x.slots[i])
		}
		return func(id string) (int, bool) { slot, ok := slots[id]; return slot, ok }
	}
	next := 0 // mostly they are asked for in order
	return func(id string) (int, bool) {
		if next >= len(x.ids) || x.ids[next] != id {
			var ok bool
			if next, ok = slices.BinarySearch(x.ids, id); !ok {
				return 0, false
			}
		}
		next++
		return int(x.slots[next-1]), true
	}
}

// Encode turns the exported services of a Snapshot into keys and the sums of values. prev (may be nil) is the result before: an endpoint
// keeps its slot, a service its export time (now, if the source gives none), and a service that cannot be encoded its last good state,
// with a Fault. Endpoints without mTLS are of no use elsewhere and are left out.
func Encode(s *discovery.Snapshot, prev *Exports, now time.Time) (*Exports, []Fault) {
	if prev == nil {
		prev = NewExports()
	}
	next := &Exports{trustDomain: s.Self.TrustDomain, from: s.Services, failed: map[discovery.Name]struct{}{}}
	var services *discovery.Edit[*exported]
	var differ []discovery.Name
	if prev.held == nil { // nothing, or what was restored and may be gone
		services = discovery.ByName[*exported]{}.Edit()
		next.Scopes, next.Audience, next.held = map[string]int{AllScope: 0}, map[string][]string{AllScope: nil}, map[string]int{}
		for name := range s.Services.All() {
			differ = append(differ, name)
		}
	} else {
		services = prev.services.Edit()
		next.Scopes, next.Audience, next.held = maps.Clone(prev.Scopes), maps.Clone(prev.Audience), maps.Clone(prev.held)
		next.Services, next.Endpoints = prev.Services, prev.Endpoints
		differ = slices.Collect(maps.Keys(prev.failed))
		discovery.Diff(prev.from, s.Services, func(name discovery.Name, _, _ *discovery.Service) {
			if _, again := prev.failed[name]; !again {
				differ = append(differ, name)
			}
		})
	}
	var changed []*discovery.Service
	for _, name := range differ {
		if svc := s.Services.Get(name); svc != nil && svc.Export != nil {
			changed = append(changed, svc)
		} else {
			next.set(services, name, nil)
		}
	}
	var faults []Fault
	for i, done := range encodeServices(s.Self.TrustDomain, changed, prev, now) {
		name := changed[i].Name
		if done.err != nil {
			faults = append(faults, Fault{Scope: AudienceScope(changed[i].Export.Audience), Key: ServiceKey(name), Reason: done.err.Error()})
			next.failed[name] = struct{}{}
			done.exported = prev.services.Get(name)
		}
		next.set(services, name, done.exported)
	}
	next.services = services.Done()
	slices.SortFunc(faults, func(a, b Fault) int { return cmp.Compare(a.Key, b.Key) })
	return next, faults
}

// set puts what is exported of one service, or nil, into services, and keeps count.
func (e *Exports) set(services *discovery.Edit[*exported], name discovery.Name, x *exported) {
	if old := services.Get(name); old != nil {
		e.Services--
		e.Endpoints -= len(old.ids)
		e.Scopes[old.scope] -= len(old.ids)
		if e.held[old.scope]--; e.held[old.scope] == 0 {
			delete(e.held, old.scope)
			if old.scope != AllScope {
				delete(e.Scopes, old.scope)
				delete(e.Audience, old.scope)
			}
		}
	}
	if x == nil {
		services.Delete(name)
		return
	}
	services.Put(name, x)
	e.Services++
	e.Endpoints += len(x.ids)
	e.Scopes[x.scope] += len(x.ids)
	e.held[x.scope]++
	e.Audience[x.scope] = x.audience
}

// encoded is what became of one service.
type encoded struct {
	*exported
	err error
}

// encodeServices encodes many on all processors.
func encodeServices(trustDomain string, services []*discovery.Service, prev *Exports, now time.Time) []encoded {
	out := make([]encoded, len(services))
	var next atomic.Int64
	work := func() {
		e := &encoder{trustDomain: trustDomain}
		for {
			i := int(next.Add(1)) - 1
			if i >= len(services) {
				return
			}
			out[i].exported, out[i].err = e.encode(services[i], prev.services.Get(services[i].Name), now)
		}
	}
	const few = 32 // not worth a goroutine
	var wg sync.WaitGroup
	for range min(runtime.GOMAXPROCS(0), len(services)/few) - 1 {
		wg.Go(work)
	}
	work()
	wg.Wait()
	return out
}

// encoder encodes values one after another, in memory that it uses again.
type encoder struct {
	trustDomain string
	buf         []byte // the last value

	pb        federationpb.Slot
	endpoints []*federationpb.Endpoint
	bytes     []byte // of their IDs and addresses
}

func (e *encoder) encode(svc *discovery.Service, old *exported, now time.Time) (*exported, error) {
	x := &exported{
		source: svc, scope: AudienceScope(svc.Export.Audience), audience: svc.Export.Audience,
		since: Stamp(svc.Export.Created), sums: map[string]Sum{},
	}
	if x.since.IsZero() {
		if x.since = Stamp(now); old != nil && !old.since.IsZero() {
			x.since = old.since
		}
	}
	if _, _, err := ParseKey(ServiceKey(svc.Name)); err != nil {
		return nil, err
	}
	if err := e.service(svc, x.since); err != nil {
		return nil, err
	}
	x.sums[ServiceKey(svc.Name)] = sumOf(e.buf)

	endpoints := make([]*discovery.Endpoint, 0, len(svc.Endpoints))
	for _, ep := range svc.Endpoints {
		if ep.Transport == discovery.Plaintext {
			continue
		}
		if !e.own(ep.SPIFFEID) {
			return nil, fmt.Errorf("endpoint %s has SPIFFE ID %q: only IDs of trust domain %s can be exported", ep.ID, ep.SPIFFEID, e.trustDomain)
		}
		endpoints = append(endpoints, ep)
	}
	if len(endpoints) > MaxEndpoints {
		return nil, fmt.Errorf("%d endpoints, at most %d can be exported", len(endpoints), MaxEndpoints)
	}
	byID := func(a, b *discovery.Endpoint) int { return cmp.Compare(a.ID, b.ID) }
	if !slices.IsSortedFunc(endpoints, byID) {
		slices.SortFunc(endpoints, byID)
	}
	slots := assign(endpoints, old)
	x.ids, x.slots = make([]string, len(endpoints)), slots
	members := map[uint16][]*discovery.Endpoint{}
	for i, ep := range endpoints {
		x.ids[i] = ep.ID
		members[slots[i]] = append(members[slots[i]], ep)
	}
	for slot, eps := range members {
		if err := e.slot(eps); err != nil {
			return nil, err
		}
		x.sums[SlotKey(svc.Name, int(slot))] = sumOf(e.buf)
	}
	return x, nil
}

// own reports whether an ID is of this cluster's trust domain.
func (e *encoder) own(id string) bool {
	rest, ok := strings.CutPrefix(id, "spiffe://")
	return ok && len(rest) > len(e.trustDomain) && rest[len(e.trustDomain)] == '/' && rest[:len(e.trustDomain)] == e.trustDomain
}

// service encodes what is not of endpoints.
func (e *encoder) service(svc *discovery.Service, since time.Time) error {
	if len(svc.Ports) > MaxPorts {
		return fmt.Errorf("%d ports, at most %d can be exported", len(svc.Ports), MaxPorts)
	}
	traits := svc.Traits.Normal()
	if err := checkTraits(traits); err != nil {
		return err
	}
	if err := checkMetadata(svc.Export.Labels, svc.Export.Annotations); err != nil {
		return err
	}
	pb := &federationpb.Service{
		Headless: traits.Headless, SessionAffinity: traits.Affinity, SessionAffinitySeconds: traits.AffinityTimeout,
		InternalTrafficPolicy: traits.InternalTrafficPolicy, TrafficDistribution: traits.TrafficDistribution,
		Labels: svc.Export.Labels, Annotations: svc.Export.Annotations, ExportedUnixMs: toMillis(since),
	}
	for _, f := range traits.IPFamilies {
		pb.IpFamilies = append(pb.IpFamilies, string(f))
	}
	for _, p := range svc.Ports {
		pb.Ports = append(pb.Ports, &federationpb.Port{Name: p.Name, Number: uint32(p.Number), Protocol: string(p.Protocol), Udp: p.UDP, Sctp: p.SCTP})
	}
	return e.marshal(pb)
}

func (e *encoder) marshal(m proto.Message) (err error) {
	if e.buf, err = (proto.MarshalOptions{Deterministic: true}).MarshalAppend(e.buf[:0], m); err != nil {
		return fmt.Errorf("encode: %w", err)
	}
	if len(e.buf) > MaxValue {
		return fmt.Errorf("a value of %d bytes, at most %d can be exported", len(e.buf), MaxValue)
	}
	return nil
}

// assign gives every endpoint a slot: the one it had, else the emptiest of as many as are needed.
func assign(endpoints []*discovery.Endpoint, old *exported) []uint16 {
	slots := make([]uint16, len(endpoints))
	filled := make([]int, (len(endpoints)+slotTarget-1)/slotTarget)
	var fresh []int
	known := old.known()
	for i, ep := range endpoints {
		slot, ok := known(ep.ID)
		if !ok || slot >= MaxSlots {
			fresh = append(fresh, i)
			continue
		}
		for slot >= len(filled) {
			filled = append(filled, 0)
		}
		filled[slot]++
		slots[i] = uint16(slot)
	}
	if len(fresh) == 0 {
		return slots
	}
	// the emptiest is the first below a level that rises, so all slots are looked at once for each level
	level, at := slices.Min(filled), 0
	for _, i := range fresh {
		for filled[at] > level {
			if at++; at == len(filled) {
				level, at = level+1, 0
			}
		}
		filled[at]++
		slots[i] = uint16(at)
		if at++; at == len(filled) {
			level, at = level+1, 0
		}
	}
	return slots
}

// slot encodes endpoints that are sorted by ID.
func (e *encoder) slot(endpoints []*discovery.Endpoint) error {
	for len(e.endpoints) < len(endpoints) {
		e.endpoints = append(e.endpoints, &federationpb.Endpoint{})
	}
	e.pb.Profiles, e.pb.Endpoints, e.bytes = e.pb.Profiles[:0], e.endpoints[:len(endpoints)], e.bytes[:0]
	e.bytes = slices.Grow(e.bytes, 48*len(endpoints)) // which keeps what is cut from it in place
	var likes []*discovery.Endpoint                   // one of each profile
	for i, ep := range endpoints {
		var id [16]byte
		if n, err := hex.Decode(id[:], []byte(ep.ID)[:min(len(ep.ID), 34)]); len(ep.ID) != 32 || err != nil || n != 16 {
			return fmt.Errorf("endpoint ID %q is not 32 hex digits", ep.ID)
		}
		if ep.Hostname != "" && !dnsLabel.MatchString(ep.Hostname) {
			return fmt.Errorf("endpoint %s: hostname %.80q is not a DNS label", ep.ID, ep.Hostname)
		}
		like := slices.IndexFunc(likes, func(like *discovery.Endpoint) bool { return sameProfile(like, ep) })
		if like < 0 {
			like = len(likes)
			likes = append(likes, ep)
			e.pb.Profiles = append(e.pb.Profiles, encodeProfile(ep))
		}
		pb := e.endpoints[i]
		pb.Id, pb.Address, pb.Second = e.keep(id[:]), e.address(ep.Address), nil
		if ep.Second != nil {
			pb.Second = e.address(*ep.Second)
		}
		pb.Profile, pb.Hostname, pb.Weight, pb.NotReady, pb.Draining = uint32(like), ep.Hostname, ep.Weight, !ep.Ready, ep.Draining
	}
	return e.marshal(&e.pb)
}

// address returns the 4 or 16 bytes of a, in bytes.
func (e *encoder) address(a netip.Addr) []byte {
	switch a = a.Unmap(); {
	case a.Is4():
		b := a.As4()
		return e.keep(b[:])
	case a.Is6():
		b := a.As16()
		return e.keep(b[:])
	}
	return nil
}

// keep appends b to bytes, and returns it there.
func (e *encoder) keep(b []byte) []byte {
	e.bytes = append(e.bytes, b...)
	return e.bytes[len(e.bytes)-len(b):]
}

func sameProfile(a, b *discovery.Endpoint) bool {
	return a.Profile == b.Profile || a.SPIFFEID == b.SPIFFEID && a.Locality.Zone == b.Locality.Zone && a.Locality.Region == b.Locality.Region && a.Network == b.Network &&
		a.HopPort == b.HopPort && a.Transport == b.Transport && maps.Equal(a.Ports, b.Ports)
}

func encodeProfile(ep *discovery.Endpoint) *federationpb.Profile {
	p := &federationpb.Profile{
		HopPort: uint32(ep.HopPort), Transport: string(ep.Transport), SpiffeId: ep.SPIFFEID,
		Region: ep.Locality.Region, Zone: ep.Locality.Zone, Network: ep.Network,
	}
	for _, name := range slices.Sorted(maps.Keys(ep.Ports)) {
		p.Ports = append(p.Ports, &federationpb.TargetPort{Name: name, Number: uint32(ep.Ports[name])})
	}
	return p
}

// Stamp returns a time as exports and records keep it: UTC, in milliseconds. What is in memory then equals what a restart reads.
func Stamp(t time.Time) time.Time { return fromMillis(toMillis(t)) }

func toMillis(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMilli()
}

func fromMillis(ms int64) time.Time {
	if ms <= 0 {
		return time.Time{}
	}
	return time.UnixMilli(ms).UTC()
}
