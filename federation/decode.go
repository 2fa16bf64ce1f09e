package federation

import (
	"cmp"
	"encoding/hex"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/federation/federationpb"
)

const (
	maxImported   = 2_000_000       // endpoints of one member; in memory each is about ten times what it is in a slot
	maxString     = 253             // bytes of a name, region, zone or network
	maxWeight     = 1 << 20         // of an endpoint
	maxClockAhead = 5 * time.Minute // of an export time before it is not believed
)

// Policy is what a reader believes of one member's exports.
type Policy struct {
	Member      string               // its name
	TrustDomain spiffeid.TrustDomain // the only one whose IDs it may name
	Admitted    time.Time            // export times before this, or too far ahead, become this
	Peer        *discovery.Peer      // import policy; nil lets everything in
	Endpoints   int                  // at most so many are taken; 0 is 2,000,000
	Allow       []discovery.Allow    // which IDs may serve which services; empty lets everything in
	Match       func(pattern string, id spiffeid.ID) bool
}

// Change is one key of a scope that was written (Value) or deleted (nil). Revision is the exporter's, at or after the write.
type Change struct {
	Scope    string
	Key      string
	Value    []byte
	Revision int64
}

// Export is one service of a member as it was imported. It is immutable.
type Export struct {
	discovery.Traits // Normal
	Ports            []discovery.Port
	Labels           map[string]string // of the ServiceImport
	Annotations      map[string]string
	Exported         time.Time
	Revision         int64                 // of the newest of its objects
	Endpoints        []*discovery.Endpoint // sorted by ID
	Withheld         int                   // endpoints that the policy here does not let in
}

// Part is everything imported from one member. It is immutable.
type Part struct {
	Exports   discovery.ByName[*Export]
	Endpoints int
	Faults    []Fault // sorted by scope and key

	services discovery.ByName[*discovery.Service] // of LocalPart: what it was made of
	exported discovery.ByName[*exported]          // likewise
}

// Decoder follows one member's exports key by key. It is not safe for concurrent use.
type Decoder struct {
	policy  Policy
	objects map[discovery.Name]map[location]*object
	faults  map[location]string
	dirty   map[discovery.Name]bool
	held    int // endpoints of all objects
	part    *Part
}

type location struct{ scope, key string }

// object is a decoded service or slot; the last good one.
type object struct {
	revision  int64
	service   *Export // without endpoints; nil for a slot
	endpoints []*discovery.Endpoint
	withheld  int // not in endpoints
}

// NewDecoder returns a Decoder that has read nothing.
func NewDecoder(p Policy) *Decoder {
	p.Endpoints = cmp.Or(p.Endpoints, maxImported)
	return &Decoder{
		policy: p, objects: map[discovery.Name]map[location]*object{}, faults: map[location]string{},
		dirty: map[discovery.Name]bool{}, part: &Part{},
	}
}

// Apply takes changes in the order in which they happened. now bounds export times.
func (d *Decoder) Apply(changes []Change, now time.Time) {
	for _, c := range changes {
		if !IsExport(c.Key) {
			continue
		}
		at := location{c.Scope, c.Key}
		delete(d.faults, at)
		n, slot, err := ParseKey(c.Key)
		if err != nil {
			if c.Value != nil {
				d.faults[at] = err.Error()
			}
			continue
		}
		if c.Value == nil {
			if o := d.objects[n][at]; o != nil {
				d.held -= len(o.endpoints)
				delete(d.objects[n], at)
				d.dirty[n] = true
			}
			continue
		}
		if p := d.policy.Peer; p != nil && len(p.Namespaces) > 0 && !slices.Contains(p.Namespaces, n.Namespace) {
			continue // not an error: this cluster chose not to import it
		}
		o, err := d.decode(n, slot, c.Value, now)
		if err != nil {
			d.faults[at] = err.Error()
		}
		if o == nil {
			continue // the last good state stays in force
		}
		held := d.held + len(o.endpoints)
		if was := d.objects[n][at]; was != nil {
			held -= len(was.endpoints)
		}
		if held > d.policy.Endpoints {
			d.faults[at] = fmt.Sprintf("more than %d endpoints of one cluster", d.policy.Endpoints)
			continue
		}
		d.held = held
		o.revision = c.Revision
		if d.objects[n] == nil {
			d.objects[n] = map[location]*object{}
		}
		d.objects[n][at] = o
		d.dirty[n] = true
	}
}

// Part returns what has been imported so far.
func (d *Decoder) Part() *Part {
	next := &Part{Exports: d.part.Exports, Endpoints: d.part.Endpoints}
	exports := d.part.Exports.Edit()
	for n := range d.dirty {
		if old := exports.Get(n); old != nil {
			next.Endpoints -= len(old.Endpoints)
			exports.Delete(n)
		}
		if len(d.objects[n]) == 0 {
			delete(d.objects, n)
			continue
		}
		if e := join(d.objects[n]); e != nil {
			exports.Put(n, e)
			next.Endpoints += len(e.Endpoints)
		}
	}
	if len(d.dirty) > 0 {
		next.Exports = exports.Done()
	}
	clear(d.dirty)
	for at, reason := range d.faults {
		next.Faults = append(next.Faults, Fault{Member: d.policy.Member, Scope: at.scope, Key: at.key, Reason: reason})
	}
	slices.SortFunc(next.Faults, func(a, b Fault) int {
		return cmp.Or(cmp.Compare(a.Scope, b.Scope), cmp.Compare(a.Key, b.Key))
	})
	d.part = next
	return next
}

// join makes one Export of a service's objects. While a service moves between scopes it is in both: the newer record of the service,
// and of each endpoint, counts. Slots whose service record is not there yet are not visible.
func join(objects map[location]*object) *Export {
	var svc *object
	var at location
	for l, o := range objects {
		if o.service != nil && (svc == nil || o.newer(l, svc, at)) {
			svc, at = o, l
		}
	}
	if svc == nil {
		return nil
	}
	export := *svc.service
	e := &export
	e.Revision = svc.revision
	n := 0
	for _, o := range objects {
		e.Revision = max(e.Revision, o.revision)
		n += len(o.endpoints)
		e.Withheld += o.withheld
	}
	e.Endpoints = make([]*discovery.Endpoint, 0, n)
	for _, o := range objects {
		e.Endpoints = append(e.Endpoints, o.endpoints...)
	}
	byID := func(a, b *discovery.Endpoint) int { return strings.Compare(a.ID, b.ID) }
	slices.SortFunc(e.Endpoints, byID)
	for i := 1; i < n; i++ {
		if e.Endpoints[i].ID == e.Endpoints[i-1].ID { // it is in two slots
			e.Endpoints = newest(objects)
			slices.SortFunc(e.Endpoints, byID)
			break
		}
	}
	return e
}

// newest returns each endpoint once, as the newest object has it.
func newest(objects map[location]*object) []*discovery.Endpoint {
	type found struct {
		ep *discovery.Endpoint
		o  *object
		at location
	}
	byID := map[string]found{}
	for l, o := range objects {
		for _, ep := range o.endpoints {
			f, ok := byID[ep.ID]
			if !ok || o.newer(l, f.o, f.at) {
				byID[ep.ID] = found{ep, o, l}
			}
		}
	}
	endpoints := make([]*discovery.Endpoint, 0, len(byID))
	for _, f := range byID {
		endpoints = append(endpoints, f.ep)
	}
	return endpoints
}

// newer reports whether o, at l, counts before other. Ties are broken by where they are, so that the order of events does not matter.
func (o *object) newer(l location, other *object, at location) bool {
	if o.revision != other.revision {
		return o.revision > other.revision
	}
	return l.scope+"/"+l.key < at.scope+"/"+at.key
}

// decode returns an object, a fault, or both: an object without the endpoints that the fault is about.
func (d *Decoder) decode(n discovery.Name, slot int, value []byte, now time.Time) (*object, error) {
	if len(value) > MaxValue {
		return nil, fmt.Errorf("%d bytes, at most %d are accepted", len(value), MaxValue)
	}
	if slot < 0 {
		return d.decodeService(value, now)
	}
	return d.decodeSlot(n, value)
}

func (d *Decoder) decodeService(value []byte, now time.Time) (*object, error) {
	pb := &federationpb.Service{}
	if err := proto.Unmarshal(value, pb); err != nil {
		return nil, fmt.Errorf("not a Service: %w", err)
	}
	if len(pb.Ports) > MaxPorts {
		return nil, fmt.Errorf("%d ports, at most %d are accepted", len(pb.Ports), MaxPorts)
	}
	e := &Export{
		Traits: discovery.Traits{
			Headless: pb.Headless, Affinity: pb.SessionAffinity, AffinityTimeout: pb.SessionAffinitySeconds,
			InternalTrafficPolicy: pb.InternalTrafficPolicy, TrafficDistribution: pb.TrafficDistribution,
		}.Normal(),
		Labels: pb.Labels, Annotations: pb.Annotations, Exported: d.clamp(fromMillis(pb.ExportedUnixMs), now),
	}
	for _, f := range pb.IpFamilies {
		e.IPFamilies = append(e.IPFamilies, discovery.IPFamily(f))
	}
	if err := checkTraits(e.Traits); err != nil {
		return nil, err
	}
	if err := checkMetadata(e.Labels, e.Annotations); err != nil {
		return nil, err
	}
	for _, p := range pb.Ports {
		switch protocol := discovery.AppProtocol(p.Protocol); {
		case p.Number == 0 || p.Number > 65535:
			return nil, fmt.Errorf("port %d is not a port", p.Number)
		case len(p.Name) > maxString:
			return nil, fmt.Errorf("port %d has a name of %d bytes", p.Number, len(p.Name))
		case !slices.Contains([]discovery.AppProtocol{discovery.HTTP, discovery.HTTP2, discovery.GRPC, discovery.TCP}, protocol):
			return nil, fmt.Errorf("port %d has unknown protocol %.40q", p.Number, p.Protocol)
		default:
			e.Ports = append(e.Ports, discovery.Port{Name: p.Name, Number: uint16(p.Number), Protocol: protocol, UDP: p.Udp, SCTP: p.Sctp && !p.Udp})
		}
	}
	return &object{service: e}, nil
}

// clamp believes an export time only between the member's admission and a little ahead of this clock.
func (d *Decoder) clamp(t, now time.Time) time.Time {
	if t.Before(d.policy.Admitted) || t.After(now.Add(maxClockAhead)) {
		return d.policy.Admitted
	}
	return t
}

// profile is what endpoints of a slot share, decoded once.
type profile struct {
	shared *discovery.Profile
	wanted bool  // by the import policy
	err    error // nobody may use this profile
}

func (d *Decoder) decodeSlot(n discovery.Name, value []byte) (*object, error) {
	pb := &federationpb.Slot{}
	if err := proto.Unmarshal(value, pb); err != nil {
		return nil, fmt.Errorf("not a Slot: %w", err)
	}
	if len(pb.Endpoints) > MaxSlot || len(pb.Profiles) > MaxSlot {
		return nil, fmt.Errorf("%d endpoints and %d profiles, at most %d are accepted in a slot", len(pb.Endpoints), len(pb.Profiles), MaxSlot)
	}
	profiles := make([]profile, len(pb.Profiles))
	for i, p := range pb.Profiles {
		profiles[i] = d.profile(n, p)
	}
	o := &object{endpoints: make([]*discovery.Endpoint, 0, len(pb.Endpoints))}
	var refused []error
	all := make([]discovery.Endpoint, len(pb.Endpoints)) // they live and die together, and so do their IDs
	ids := make([]byte, 0, 32*len(pb.Endpoints))
	for _, e := range pb.Endpoints {
		if len(e.Id) == 16 {
			ids = hex.AppendEncode(ids, e.Id)
		}
	}
	id := string(ids)
	for i, e := range pb.Endpoints {
		ep := &all[i]
		if len(e.Id) == 16 {
			ep.ID, id = id[:32], id[32:]
		}
		if int(e.Profile) >= len(profiles) {
			refused = append(refused, fmt.Errorf("endpoint %x names profile %d of %d", e.Id, e.Profile, len(profiles)))
			continue
		}
		p := &profiles[e.Profile]
		if p.err != nil {
			refused = append(refused, fmt.Errorf("endpoint %.16x: %w", e.Id, p.err))
			continue
		}
		if err := decodeEndpoint(ep, p, e); err != nil {
			refused = append(refused, err)
			continue
		}
		if p.wanted {
			o.endpoints = append(o.endpoints, ep)
		} else {
			o.withheld++
		}
	}
	if len(refused) > 0 {
		return o, fmt.Errorf("%d of %d endpoints refused: %w", len(refused), len(pb.Endpoints), refused[0])
	}
	return o, nil
}

func (d *Decoder) profile(n discovery.Name, pb *federationpb.Profile) profile {
	id, err := spiffeid.FromString(pb.SpiffeId)
	switch {
	case err != nil:
		return profile{err: fmt.Errorf("SPIFFE ID %.100q: %w", pb.SpiffeId, err)}
	case !id.MemberOf(d.policy.TrustDomain):
		return profile{err: fmt.Errorf("SPIFFE ID %.200s is not of the exporter's trust domain %s", id, d.policy.TrustDomain)}
	case reserved(id):
		return profile{err: fmt.Errorf("SPIFFE ID %.200s is reserved", id)}
	case pb.Transport != string(discovery.Hop) && pb.Transport != string(discovery.TLS):
		return profile{err: fmt.Errorf("transport %.40q: only hop and tls cross clusters", pb.Transport)}
	case pb.HopPort > 65535:
		return profile{err: fmt.Errorf("hop port %d is not a port", pb.HopPort)}
	case len(pb.Region) > maxString || len(pb.Zone) > maxString || len(pb.Network) > maxString:
		return profile{err: fmt.Errorf("region, zone or network longer than %d bytes", maxString)}
	case len(pb.Ports) > MaxPorts:
		return profile{err: fmt.Errorf("%d ports, at most %d are accepted", len(pb.Ports), MaxPorts)}
	}
	ports := make(map[string]uint16, len(pb.Ports))
	for _, t := range pb.Ports {
		if t.Number == 0 || t.Number > 65535 || len(t.Name) > maxString {
			return profile{err: fmt.Errorf("target port %.40q: %d", t.Name, t.Number)}
		}
		ports[t.Name] = uint16(t.Number)
	}
	return profile{
		wanted: d.wanted(n, id),
		shared: &discovery.Profile{
			Ports: ports, HopPort: uint16(pb.HopPort), Transport: discovery.Transport(pb.Transport), SPIFFEID: id.String(),
			Locality: discovery.Locality{Cluster: d.policy.Member, Region: pb.Region, Zone: pb.Zone}, Network: pb.Network,
		},
	}
}

// reserved mirrors identity.Reserved: no workload has an ID under /hanse/ or /spire/.
func reserved(id spiffeid.ID) bool {
	first, _, _ := cut(id.Path())
	return first == "hanse" || first == "spire" || first == ""
}

func cut(path string) (first, rest string, ok bool) {
	for i := 1; i < len(path); i++ {
		if path[i] == '/' {
			return path[1:i], path[i:], true
		}
	}
	if len(path) > 1 {
		return path[1:], "", true
	}
	return "", "", false
}

// wanted says whether the policy here lets an ID serve a service.
func (d *Decoder) wanted(n discovery.Name, id spiffeid.ID) bool {
	matches := func(pattern string) bool { return d.policy.Match(pattern, id) }
	if p := d.policy.Peer; p != nil && len(p.SPIFFEIDs) > 0 && !slices.ContainsFunc(p.SPIFFEIDs, matches) {
		return false
	}
	return discovery.Allowed(d.policy.Allow, n, matches)
}

// decodeEndpoint fills in ep, which has its ID.
func decodeEndpoint(ep *discovery.Endpoint, p *profile, pb *federationpb.Endpoint) error {
	if len(pb.Id) != 16 {
		return fmt.Errorf("endpoint ID of %d bytes, want 16", len(pb.Id))
	}
	addr, ok := netip.AddrFromSlice(pb.Address)
	if !ok || addr.IsUnspecified() || addr.IsMulticast() {
		return fmt.Errorf("endpoint %x: address %x cannot be dialled", pb.Id, pb.Address[:min(len(pb.Address), 16)])
	}
	var second *netip.Addr
	if len(pb.Second) > 0 {
		other, ok := netip.AddrFromSlice(pb.Second)
		if other = other.Unmap(); !ok || other.IsUnspecified() || other.IsMulticast() || other.Is4() == addr.Unmap().Is4() {
			return fmt.Errorf("endpoint %x: second address %x is none of the other IP family", pb.Id, pb.Second[:min(len(pb.Second), 16)])
		}
		second = &other
	}
	if pb.Weight > maxWeight {
		return fmt.Errorf("endpoint %x: weight %d, at most %d is accepted", pb.Id, pb.Weight, maxWeight)
	}
	if pb.Hostname != "" && !dnsLabel.MatchString(pb.Hostname) {
		return fmt.Errorf("endpoint %x: hostname %.80q is not a DNS label", pb.Id, pb.Hostname)
	}
	ep.Profile, ep.Address, ep.Second, ep.Hostname, ep.Weight = p.shared, addr.Unmap(), second, pb.Hostname, pb.Weight
	ep.Ready, ep.Draining = !pb.NotReady, pb.Draining
	return nil
}
