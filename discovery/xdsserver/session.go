package xdsserver

import (
	"context"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/discovery/xdsgen"
	"github.com/hanse-mesh/hanse/discovery/xdspb"
)

// sendOrder is make before break: what is referred to comes before what refers to it.
var sendOrder = [...]string{
	xdsgen.ClusterType, xdsgen.EndpointType, xdsgen.ListenerType, xdsgen.RouteType, xdsgen.ServiceType, xdsgen.TrustType, xdsgen.FaultsType,
}

func known(typeURL string) bool { return slices.Contains(sendOrder[:], typeURL) }

// Names of the two resources of their types.
const (
	trustName  = "trust"
	faultsName = "faults"
)

// maxOutstanding is how many unacknowledged responses of a type are remembered.
const maxOutstanding = 256

// session is one ADS stream.
type session struct {
	// read-only after open
	s     *Server
	peer  *peer
	since time.Time
	wake  chan struct{} // something that this stream may show has changed
	end   context.CancelCauseFunc

	// owned by the stream's goroutine
	seq      uint64 // of the view that the stream has caught up with
	faultGen uint64
	trustGen uint64
	faults   *xdsgen.Resource // as of faultGen
	names    int              // subscriptions, of all types
	nonce    uint64
	types    map[string]*subscriptions
	subjects map[subject]map[key]struct{} // what to look at when a subject changed

	mu       sync.Mutex
	viewer   xdsgen.Viewer          // guarded by mu; written once, with the first request
	client   client                 // guarded by mu; likewise
	status   map[string]*TypeStatus // guarded by mu
	acked    map[string]uint64      // guarded by mu; trust sequences that the client has loaded
	ackedRev uint64                 // guarded by mu; goes with acked
	ackedGen uint64                 // guarded by mu; the Server's trustGen that acked is of
}

// key is one subscribed resource.
type key struct{ typeURL, name string }

// subject is what a resource is made from.
type subject struct {
	service discovery.Name
	host    netip.Addr
}

// subscriptions is what a stream wants of one type.
type subscriptions struct {
	wildcard    bool
	names       map[string]*subscription
	wild        map[string]*wild            // gateway: what the wildcard has brought
	byService   map[discovery.Name][]string // gateway: names in wild, by the service that they came with
	last        string                      // newest nonce sent
	outstanding []response
}

// subscription is one name that a stream wants.
type subscription struct {
	version string // last sent, or what the client said it has; "" is none
	told    bool   // that it does not exist
	implied bool   // sent along with a Listener, and not yet asked for
}

// wild is one resource that a wildcard brought, perhaps for several services.
type wild struct {
	version string
	owners  int
}

// response is one that awaits its ACK.
type response struct {
	nonce, version string
	trust          map[string]uint64
	trustRev       uint64
	trustOf        uint64
}

func (s *Server) open(ctx context.Context, protocol string) (context.Context, *session, error) {
	p, err := s.authenticate(ctx)
	if err != nil {
		return nil, nil, err
	}
	if err := s.awaitView(ctx); err != nil {
		return nil, nil, err
	}
	ctx, end := context.WithCancelCause(ctx)
	ss := &session{
		s: s, peer: p, since: s.now(), wake: make(chan struct{}, 1), end: end,
		types:    make(map[string]*subscriptions),
		subjects: make(map[subject]map[key]struct{}),
		status:   make(map[string]*TypeStatus),
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		end(nil)
		return nil, nil, errShutdown
	}
	s.sessions[ss] = struct{}{}
	s.metrics.streams.WithLabelValues(protocol).Inc()
	return ctx, ss, nil
}

func (ss *session) close(protocol string) {
	ss.end(nil)
	ss.s.mu.Lock()
	delete(ss.s.sessions, ss)
	ss.s.comings++
	ss.s.mu.Unlock()
	ss.s.metrics.streams.WithLabelValues(protocol).Dec()
	if t := ss.types[xdsgen.EndpointType]; t != nil {
		for name := range t.names {
			ss.count(xdsgen.EndpointType, name, -1)
		}
	}
}

func (ss *session) kick() {
	select {
	case ss.wake <- struct{}{}:
	default:
	}
}

// begin takes the Node of the first request.
func (ss *session) begin(node *corev3.Node) {
	if ss.viewer.SPIFFEID != "" {
		return
	}
	v, c := ss.s.describe(ss.peer.id, node)
	ss.mu.Lock()
	ss.viewer, ss.client = v, c
	ss.mu.Unlock()
	ss.s.mu.Lock()
	ss.s.comings++
	ss.s.mu.Unlock()
	_, ss.seq = ss.s.cache.current()
	ss.s.log.Debug("xds stream opened", "proxy", v.ID, "spiffe_id", v.SPIFFEID, "kind", v.Kind, "agent", c.agent)
}

// of returns the subscriptions of a type, or nil where the stream has too many types.
func (ss *session) of(typeURL string) (t *subscriptions, first bool) {
	if t := ss.types[typeURL]; t != nil {
		return t, false
	}
	if len(ss.types) == maxTypes {
		return nil, false
	}
	t = &subscriptions{names: make(map[string]*subscription)}
	ss.types[typeURL] = t
	return t, true
}

// subscribe adds a name. It is false where the stream has too many.
func (ss *session) subscribe(typeURL, name string, t *subscriptions) (*subscription, bool) {
	if sub := t.names[name]; sub != nil {
		return sub, true
	}
	if ss.names == maxNames {
		return nil, false
	}
	ss.names++
	sub := &subscription{}
	t.names[name] = sub
	sj := subjectOf(name)
	if ss.subjects[sj] == nil {
		ss.subjects[sj] = make(map[key]struct{})
	}
	ss.subjects[sj][key{typeURL, name}] = struct{}{}
	ss.count(typeURL, name, 1)
	return sub, true
}

func (ss *session) unsubscribe(typeURL, name string, t *subscriptions) {
	if t.names[name] == nil {
		return
	}
	ss.names--
	delete(t.names, name)
	sj := subjectOf(name)
	if delete(ss.subjects[sj], key{typeURL, name}); len(ss.subjects[sj]) == 0 {
		delete(ss.subjects, sj)
	}
	ss.count(typeURL, name, -1)
}

func subjectOf(name string) subject {
	service, host := xdsgen.Subject(name)
	return subject{service, host}
}

// count keeps the shares of callers: who subscribes to a service's endpoints calls it.
func (ss *session) count(typeURL, name string, n int) {
	if typeURL != xdsgen.EndpointType || ss.viewer.Kind == xdsgen.Gateway {
		return
	}
	if service, _ := xdsgen.Subject(name); service.Name != "" {
		ss.s.called(service, discovery.Locality{Cluster: ss.viewer.Cluster, Region: ss.viewer.Region, Zone: ss.viewer.Zone}, n)
	}
}

// resource makes one resource; nil where there is none.
func (ss *session) resource(typeURL, name string) *xdsgen.Resource {
	var r *xdsgen.Resource
	var err error
	switch {
	case typeURL == xdsgen.TrustType:
		r, err = ss.trustResource(name)
	case typeURL == xdsgen.FaultsType:
		if name == faultsName {
			r, err = ss.faultsResource()
		}
	case known(typeURL):
		r, err = ss.s.cache.get(&ss.viewer, typeURL, name, ss.s.now())
	}
	if err != nil {
		ss.s.metrics.failures.WithLabelValues(shortType(typeURL)).Inc()
		ss.s.log.Error("xds resource cannot be made; clients keep what they have", "type", shortType(typeURL), "name", name, "error", err)
		return nil
	}
	return r
}

func (ss *session) trustResource(name string) (*xdsgen.Resource, error) {
	ss.s.mu.Lock()
	sequences, revision, authorities, gen := ss.s.trust, ss.s.trustRev, ss.s.authorities, ss.s.trustGen
	ss.s.mu.Unlock()
	ss.trustGen = gen
	if name != trustName || sequences == nil {
		return nil, nil
	}
	return xdsgen.NewResource(trustName, &xdspb.Trust{Sequences: sequences, Revision: revision, Authorities: authorities})
}

// faultsResource asks for the drills in force once per generation: their remaining times differ at each asking.
func (ss *session) faultsResource() (*xdsgen.Resource, error) {
	ss.s.mu.Lock()
	f, gen := ss.s.faults, ss.s.faultGen
	ss.s.mu.Unlock()
	if ss.faults != nil && gen == ss.faultGen {
		return ss.faults, nil
	}
	m := &xdspb.Faults{}
	if f != nil && ss.client.hanse {
		if m = f(ss.viewer); m == nil {
			m = &xdspb.Faults{}
		}
	}
	r, err := xdsgen.NewResource(faultsName, m)
	ss.faults, ss.faultGen = r, gen
	return r, err
}

// dirty lists, by type, the subscribed names that may differ since the stream caught up, and the exported services, and
// catches up. applied is when the view was set.
func (ss *session) dirty() (names map[string][]string, services map[discovery.Name]struct{}, all bool, applied time.Time) {
	changes, now, applied, complete := ss.s.cache.since(ss.seq)
	behind := now != ss.seq
	ss.seq = now
	names = make(map[string][]string) // a few types
	if behind {
		all = !complete
		for _, ch := range changes {
			all = all || ch.All
		}
		if all {
			for typeURL, t := range ss.types {
				names[typeURL] = slices.Collect(maps.Keys(t.names))
			}
		} else {
			if ss.viewer.Kind == xdsgen.Gateway {
				services = make(map[discovery.Name]struct{})
				for _, ch := range changes {
					maps.Copy(services, ch.Services)
				}
			}
			found := make(map[key]struct{})
			for _, ch := range changes {
				ss.touched(ch, found)
			}
			for k := range found {
				names[k.typeURL] = append(names[k.typeURL], k.name)
			}
		}
	}
	ss.s.mu.Lock()
	trustGen, faultGen := ss.s.trustGen, ss.s.faultGen
	ss.s.mu.Unlock()
	if trustGen != ss.trustGen && ss.types[xdsgen.TrustType] != nil {
		names[xdsgen.TrustType] = []string{trustName}
	}
	if faultGen != ss.faultGen && ss.types[xdsgen.FaultsType] != nil {
		names[xdsgen.FaultsType] = []string{faultsName}
	}
	return names, services, all, applied
}

// touched collects the subscriptions that a change concerns, going through the shorter of the two lists.
func (ss *session) touched(ch *xdsgen.Changes, found map[key]struct{}) {
	if len(ch.Services)+len(ch.Hosts) < len(ss.subjects) && !ch.Access {
		for n := range ch.Services {
			maps.Copy(found, ss.subjects[subject{service: n}])
		}
		for h := range ch.Hosts {
			maps.Copy(found, ss.subjects[subject{host: h}])
		}
		for _, any := range [...]netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
			maps.Copy(found, ss.subjects[subject{host: any}])
		}
		return
	}
	for sj, keys := range ss.subjects {
		if ch.Touches(sj.service, sj.host) {
			maps.Copy(found, keys)
		}
	}
}

// sent notes a response that awaits its ACK.
func (ss *session) sent(typeURL string, t *subscriptions, version string, bytes, names int) (nonce string) {
	ss.nonce++
	nonce = strconv.FormatUint(ss.nonce, 36)
	t.last = nonce
	r := response{nonce: nonce, version: version}
	if typeURL == xdsgen.TrustType {
		ss.s.mu.Lock()
		r.trust, r.trustRev, r.trustOf = ss.s.trust, ss.s.trustRev, ss.s.trustGen
		ss.s.mu.Unlock()
	}
	if len(t.outstanding) == maxOutstanding {
		t.outstanding = append(t.outstanding[:0], t.outstanding[1:]...)
	}
	t.outstanding = append(t.outstanding, r)
	ss.s.metrics.pushes.WithLabelValues(shortType(typeURL)).Inc()
	ss.s.metrics.bytes.WithLabelValues(shortType(typeURL)).Add(float64(bytes))
	ss.mu.Lock()
	st := ss.typeStatus(typeURL)
	st.Sent, st.SentAt, st.Names = version, ss.s.now(), names
	ss.mu.Unlock()
	return nonce
}

// answered takes the ACK or NACK that a request carries.
func (ss *session) answered(typeURL, nonce string, t *subscriptions, detail *rpcstatus.Status) {
	i := slices.IndexFunc(t.outstanding, func(r response) bool { return r.nonce == nonce })
	if i < 0 {
		return
	}
	r := t.outstanding[i]
	t.outstanding = append(t.outstanding[:0], t.outstanding[i+1:]...)
	now := ss.s.now()
	ss.mu.Lock()
	st := ss.typeStatus(typeURL)
	if detail == nil {
		st.Acked, st.AckedAt, st.NACK = r.version, now, ""
		if r.trust != nil {
			ss.acked, ss.ackedRev, ss.ackedGen = r.trust, r.trustRev, r.trustOf
		}
	} else {
		st.NACK, st.NACKAt = detail.GetMessage(), now
	}
	ss.mu.Unlock()
	if detail == nil && r.trust != nil {
		ss.s.Moved([]string{ss.viewer.ID})
	}
	if detail != nil {
		ss.s.metrics.nacks.WithLabelValues(shortType(typeURL)).Inc()
		ss.s.log.Warn("xds response rejected; the client keeps what it had", "type", shortType(typeURL),
			"proxy", ss.viewer.ID, "spiffe_id", ss.viewer.SPIFFEID, "error", detail.GetMessage())
	}
}

// typeStatus is called with mu held.
func (ss *session) typeStatus(typeURL string) *TypeStatus {
	st := ss.status[typeURL]
	if st == nil {
		st = &TypeStatus{TypeURL: typeURL}
		ss.status[typeURL] = st
	}
	return st
}
