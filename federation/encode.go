package federation

import (
	"cmp"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"
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

// Exports is what a cluster exports, as keys and values. It is immutable.
type Exports struct {
	Scopes    map[string]map[string][]byte // values by scope and key
	Audience  map[string][]string          // member names and labels by scope; empty is every member
	Services  int
	Endpoints int

	services map[discovery.Name]*exported
}

// exported is one service as it was last encoded.
type exported struct {
	source    *discovery.Service // from which it was encoded; nil after Restore
	scope     string
	audience  []string
	since     time.Time
	slots     map[string]int // by endpoint ID
	endpoints int
	values    map[string][]byte // by key
}

// Since returns the export time of a service, which was set when it was first exported.
func (e *Exports) Since(n discovery.Name) time.Time {
	if e == nil || e.services[n] == nil {
		return time.Time{}
	}
	return e.services[n].since
}

// Scope returns the scope in which a service is exported, or "".
func (e *Exports) Scope(n discovery.Name) string {
	if e.services[n] == nil {
		return ""
	}
	return e.services[n].scope
}

// In returns how many endpoints a scope has.
func (e *Exports) In(scope string) int {
	n := 0
	e.Each(func(_ discovery.Name, in string, endpoints int) {
		if in == scope {
			n += endpoints
		}
	})
	return n
}

// Each calls f for every service.
func (e *Exports) Each(f func(n discovery.Name, scope string, endpoints int)) {
	for n, x := range e.services {
		f(n, x.scope, x.endpoints)
	}
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

// Restore reads a cluster's own exports back from its store, so that the next Encode keeps slots and export times. What does not
// decode is left out and encoded anew.
func Restore(scopes map[string]map[string][]byte) *Exports {
	e := &Exports{Scopes: map[string]map[string][]byte{}, services: map[discovery.Name]*exported{}}
	for scope, keys := range scopes {
		e.Scopes[scope] = keys
		for key, value := range keys {
			n, slot, err := ParseKey(key)
			if err != nil {
				continue
			}
			x := e.services[n]
			if x == nil {
				x = &exported{scope: scope, slots: map[string]int{}, values: map[string][]byte{}}
				e.services[n] = x
			}
			if x.scope == scope {
				x.values[key] = value
			}
			if slot < 0 {
				var pb federationpb.Service
				if proto.Unmarshal(value, &pb) == nil {
					x.since = fromMillis(pb.ExportedUnixMs)
				}
				continue
			}
			var pb federationpb.Slot
			if proto.Unmarshal(value, &pb) == nil {
				for _, ep := range pb.Endpoints {
					x.slots[hex.EncodeToString(ep.Id)] = slot
					x.endpoints = len(x.slots)
				}
			}
		}
	}
	return e
}

// Encode turns the exported services of a Snapshot into keys and values. prev (may be nil) is the result before: an endpoint keeps
// its slot, a service its export time (now, if the source gives none), and a service that cannot be encoded its last good state,
// with a Fault. Endpoints without mTLS are of no use elsewhere and are left out.
func Encode(s *discovery.Snapshot, prev *Exports, now time.Time) (*Exports, []Fault) {
	if prev == nil {
		prev = &Exports{}
	}
	next := &Exports{
		Scopes:   map[string]map[string][]byte{AllScope: {}},
		Audience: map[string][]string{AllScope: nil},
		services: map[discovery.Name]*exported{},
	}
	var faults []Fault
	for name, svc := range s.Services {
		if svc.Export == nil {
			continue
		}
		old := prev.services[name]
		x := old
		if old == nil || old.source != svc {
			var err error
			if x, err = encodeService(s.Self.TrustDomain, svc, old, now); err != nil {
				faults = append(faults, Fault{Scope: AudienceScope(svc.Export.Audience), Key: ServiceKey(name), Reason: err.Error()})
				if x = old; x == nil {
					continue
				}
			}
		}
		next.services[name] = x
		next.Services++
		next.Endpoints += x.endpoints
		if next.Scopes[x.scope] == nil {
			next.Scopes[x.scope], next.Audience[x.scope] = map[string][]byte{}, x.audience
		}
		for k, v := range x.values {
			next.Scopes[x.scope][k] = v
		}
	}
	slices.SortFunc(faults, func(a, b Fault) int { return cmp.Compare(a.Key, b.Key) })
	return next, faults
}

func encodeService(trustDomain string, svc *discovery.Service, old *exported, now time.Time) (*exported, error) {
	x := &exported{
		source: svc, scope: AudienceScope(svc.Export.Audience), audience: svc.Export.Audience,
		since: Stamp(svc.Export.Created), slots: map[string]int{}, values: map[string][]byte{},
	}
	if x.since.IsZero() {
		if x.since = Stamp(now); old != nil && !old.since.IsZero() {
			x.since = old.since
		}
	}
	if _, _, err := ParseKey(ServiceKey(svc.Name)); err != nil {
		return nil, err
	}
	if len(svc.Ports) > MaxPorts {
		return nil, fmt.Errorf("%d ports, at most %d can be exported", len(svc.Ports), MaxPorts)
	}
	traits := svc.Traits.Normal()
	if err := checkTraits(traits); err != nil {
		return nil, err
	}
	if err := checkMetadata(svc.Export.Labels, svc.Export.Annotations); err != nil {
		return nil, err
	}
	pb := &federationpb.Service{
		Headless: traits.Headless, SessionAffinity: traits.Affinity, SessionAffinitySeconds: traits.AffinityTimeout,
		InternalTrafficPolicy: traits.InternalTrafficPolicy, TrafficDistribution: traits.TrafficDistribution,
		Labels: svc.Export.Labels, Annotations: svc.Export.Annotations, ExportedUnixMs: toMillis(x.since),
	}
	for _, f := range traits.IPFamilies {
		pb.IpFamilies = append(pb.IpFamilies, string(f))
	}
	for _, p := range svc.Ports {
		pb.Ports = append(pb.Ports, &federationpb.Port{Name: p.Name, Number: uint32(p.Number), Protocol: string(p.Protocol), Udp: p.UDP})
	}
	if err := x.put(ServiceKey(svc.Name), pb); err != nil {
		return nil, err
	}

	var endpoints []*discovery.Endpoint
	for _, ep := range svc.Endpoints {
		if ep.Transport == discovery.Plaintext {
			continue
		}
		if !strings.HasPrefix(ep.SPIFFEID, "spiffe://"+trustDomain+"/") {
			return nil, fmt.Errorf("endpoint %s has SPIFFE ID %q: only IDs of trust domain %s can be exported", ep.ID, ep.SPIFFEID, trustDomain)
		}
		endpoints = append(endpoints, ep)
	}
	if len(endpoints) > MaxEndpoints {
		return nil, fmt.Errorf("%d endpoints, at most %d can be exported", len(endpoints), MaxEndpoints)
	}
	slots := assign(endpoints, old)
	for slot, eps := range slots {
		if len(eps) == 0 {
			continue
		}
		pb, err := encodeSlot(eps)
		if err != nil {
			return nil, err
		}
		if err := x.put(SlotKey(svc.Name, slot), pb); err != nil {
			return nil, err
		}
		for _, ep := range eps {
			x.slots[ep.ID] = slot
		}
	}
	x.endpoints = len(endpoints)
	return x, nil
}

func (x *exported) put(key string, m proto.Message) error {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		return fmt.Errorf("encode %s: %w", key, err)
	}
	if len(b) > MaxValue {
		return fmt.Errorf("%s is %d bytes, at most %d can be exported", key, len(b), MaxValue)
	}
	x.values[key] = b
	return nil
}

// assign puts every endpoint into a slot: the one it had, else the emptiest of as many as are needed.
func assign(endpoints []*discovery.Endpoint, old *exported) [][]*discovery.Endpoint {
	slots := make([][]*discovery.Endpoint, (len(endpoints)+slotTarget-1)/slotTarget)
	var fresh []*discovery.Endpoint
	for _, ep := range endpoints {
		slot, known := 0, false
		if old != nil {
			slot, known = old.slots[ep.ID]
		}
		if !known || slot >= MaxSlots {
			fresh = append(fresh, ep)
			continue
		}
		for slot >= len(slots) {
			slots = append(slots, nil)
		}
		slots[slot] = append(slots[slot], ep)
	}
	for _, ep := range fresh {
		emptiest := 0
		for i := range slots {
			if len(slots[i]) < len(slots[emptiest]) {
				emptiest = i
			}
		}
		slots[emptiest] = append(slots[emptiest], ep)
	}
	for _, eps := range slots {
		slices.SortFunc(eps, func(a, b *discovery.Endpoint) int { return cmp.Compare(a.ID, b.ID) })
	}
	return slots
}

func encodeSlot(endpoints []*discovery.Endpoint) (*federationpb.Slot, error) {
	pb := &federationpb.Slot{Endpoints: make([]*federationpb.Endpoint, 0, len(endpoints))}
	var likes []*discovery.Endpoint // one of each profile
	for _, ep := range endpoints {
		id, err := hex.DecodeString(ep.ID)
		if err != nil || len(id) != 16 {
			return nil, fmt.Errorf("endpoint ID %q is not 32 hex digits", ep.ID)
		}
		if ep.Hostname != "" && !dnsLabel.MatchString(ep.Hostname) {
			return nil, fmt.Errorf("endpoint %s: hostname %.80q is not a DNS label", ep.ID, ep.Hostname)
		}
		i := slices.IndexFunc(likes, func(like *discovery.Endpoint) bool { return sameProfile(like, ep) })
		if i < 0 {
			i = len(likes)
			likes = append(likes, ep)
			pb.Profiles = append(pb.Profiles, encodeProfile(ep))
		}
		pb.Endpoints = append(pb.Endpoints, &federationpb.Endpoint{
			Id: id, Address: ep.Address.Unmap().AsSlice(), Profile: uint32(i), Hostname: ep.Hostname,
			Weight: ep.Weight, NotReady: !ep.Ready, Draining: ep.Draining,
		})
	}
	return pb, nil
}

func sameProfile(a, b *discovery.Endpoint) bool {
	return a.SPIFFEID == b.SPIFFEID && a.Locality.Zone == b.Locality.Zone && a.Locality.Region == b.Locality.Region && a.Network == b.Network &&
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
