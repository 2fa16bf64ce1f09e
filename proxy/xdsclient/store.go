package xdsclient

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/hanse-mesh/hanse/proxy"
)

// store is what the client has and wants: a state machine that is told what happens and answers with what is to be sent and with
// Tables. It does no I/O and reads no clock.
type store struct {
	gateway bool
	inbound []string // names of inbound Listeners, in order
	kinds   [6]*kind // in the order in which they are asked for
	byURL   map[string]*kind

	names   map[string]*name    // by authority
	hosts   map[string]struct{} // Service resources that were asked for
	renamed bool                // names has gained or lost some since the last look
	pending map[string]*name    // those whose newest Listener waits for what it leads to
	unknown map[string]time.Time
	trusted map[string]uint64 // loaded

	table    *proxy.Table
	touched  map[string]struct{} // authorities whose subscriptions must be worked out again
	moved    map[string]struct{} // hosts that were asked for, or given up
	leads    map[string][]string // xDS clusters that each authority needs
	refs     map[string]int      // how many authorities need an xDS cluster
	clusters map[string]*merged
	saved    bool // nothing worth keeping has changed since the last snapshot
}

// kind is the state of one resource type.
type kind struct {
	url      string
	wanted   map[string]struct{}
	held     map[string]*resource
	absent   map[string]struct{} // wanted, and answered: does not exist
	rejected map[string]*rejection
	changed  map[string]struct{} // since the last Table
}

// resource is the last good one.
type resource struct {
	version string
	any     *anypb.Any // for StateDir; nil where it is not kept
	value   any
}

// rejection is a resource that did not decode.
type rejection struct {
	version string
	err     error
	since   time.Time
}

// name is an authority that was asked for.
type name struct {
	authority string
	next      *outbound // newest; may wait for what it leads to
	current   *outbound // in the Table
}

// merged is a Cluster of the Table, and what it was made of.
type merged struct {
	cluster, endpoints *resource
	absent             bool // the endpoints are
	made               *proxy.Cluster
}

const (
	listeners = iota
	clusters
	endpoints
	services
	trust
	faults
)

func newStore(gateway bool, inbound []string) *store {
	s := &store{
		gateway: gateway, inbound: inbound, byURL: map[string]*kind{}, names: map[string]*name{}, hosts: map[string]struct{}{}, pending: map[string]*name{},
		unknown: map[string]time.Time{}, clusters: map[string]*merged{}, saved: true,
		touched: map[string]struct{}{}, moved: map[string]struct{}{}, leads: map[string][]string{}, refs: map[string]int{},
		table: &proxy.Table{
			Listeners: map[string]*proxy.Listener{}, Unknown: map[string]time.Time{}, Clusters: map[string]*proxy.Cluster{},
			SNI: map[string][]proxy.Target{}, Trust: map[string]uint64{},
		},
	}
	for i, url := range []string{listenerType, clusterType, endpointType, serviceType, trustType, faultsType} {
		s.kinds[i] = &kind{
			url: url, wanted: map[string]struct{}{}, held: map[string]*resource{}, absent: map[string]struct{}{},
			rejected: map[string]*rejection{}, changed: map[string]struct{}{},
		}
		s.byURL[url] = s.kinds[i]
	}
	for _, n := range inbound {
		s.kinds[listeners].wanted[n] = struct{}{}
	}
	s.kinds[trust].wanted[trustName] = struct{}{}
	s.kinds[faults].wanted[faultsName] = struct{}{}
	if gateway {
		s.kinds[endpoints].wanted["*"] = struct{}{}
	}
	return s
}

// want asks for an authority. The xDS cluster of the same name, to which most routes lead, is asked for with it, so that one
// round trip does.
func (s *store) want(authority string) {
	if s.names[authority] != nil {
		return
	}
	delete(s.unknown, authority)
	s.names[authority] = &name{authority: authority}
	s.renamed = true
	s.touched[authority] = struct{}{}
}

// wantHost asks for a Service.
func (s *store) wantHost(host string) {
	if _, ok := s.hosts[host]; ok {
		return
	}
	s.hosts[host] = struct{}{}
	s.moved[host] = struct{}{}
}

// forgetHost gives a Service up.
func (s *store) forgetHost(host string) {
	if _, ok := s.hosts[host]; !ok {
		return
	}
	delete(s.hosts, host)
	s.moved[host] = struct{}{}
	if s.kinds[services].held[host] != nil {
		s.saved = false
	}
}

// forget gives an authority up.
func (s *store) forget(authority string) {
	if s.names[authority] == nil {
		return
	}
	delete(s.names, authority)
	s.renamed = true
	delete(s.pending, authority)
	s.kinds[listeners].changed[authority] = struct{}{}
	s.touched[authority] = struct{}{}
	s.saved = false
}

// subscribe makes the wanted names follow from the touched authorities, and returns what is to be sent.
func (s *store) subscribe() []*discoveryv3.DeltaDiscoveryRequest {
	out := s.subscribeHosts()
	if len(s.touched) == 0 {
		return out
	}
	ls, moved := map[string]bool{}, map[string]bool{} // those to look at, and whether they are wanted
	for authority := range s.touched {
		n := s.names[authority]
		ls[authority] = n != nil
		for _, c := range s.leads[authority] {
			s.refs[c]--
			moved[c] = true
		}
		if n == nil {
			delete(s.leads, authority)
			continue
		}
		s.leads[authority] = n.leads()
		for _, c := range s.leads[authority] {
			s.refs[c]++
			moved[c] = true
		}
	}
	clear(s.touched)
	for c := range moved {
		if moved[c] = s.refs[c] > 0; !moved[c] {
			delete(s.refs, c)
		}
	}
	for i, wanted := range []map[string]bool{ls, moved, moved} {
		if r := s.kinds[i].follow(wanted); r != nil {
			out = append(out, r)
		}
	}
	return out
}

func (s *store) subscribeHosts() []*discoveryv3.DeltaDiscoveryRequest {
	if len(s.moved) == 0 {
		return nil
	}
	wanted := make(map[string]bool, len(s.moved))
	for h := range s.moved {
		_, wanted[h] = s.hosts[h]
	}
	clear(s.moved)
	if r := s.kinds[services].follow(wanted); r != nil {
		return []*discoveryv3.DeltaDiscoveryRequest{r}
	}
	return nil
}

// leads are the xDS clusters that a name needs.
func (n *name) leads() []string {
	if n.next == nil {
		return []string{n.authority}
	}
	if n.current == nil || n.current == n.next {
		return n.next.clusters
	}
	out := slices.Concat(n.next.clusters, n.current.clusters)
	slices.Sort(out)
	return slices.Compact(out)
}

// follow subscribes to names and unsubscribes from others; nil where nothing changes.
func (k *kind) follow(wanted map[string]bool) *discoveryv3.DeltaDiscoveryRequest {
	r := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: k.url}
	for n, want := range wanted {
		_, have := k.wanted[n]
		switch {
		case want && !have:
			k.wanted[n] = struct{}{}
			r.ResourceNamesSubscribe = append(r.ResourceNamesSubscribe, n)
		case !want && have:
			delete(k.wanted, n)
			k.drop(n)
			r.ResourceNamesUnsubscribe = append(r.ResourceNamesUnsubscribe, n)
		}
	}
	if len(r.ResourceNamesSubscribe)+len(r.ResourceNamesUnsubscribe) == 0 {
		return nil
	}
	slices.Sort(r.ResourceNamesSubscribe)
	slices.Sort(r.ResourceNamesUnsubscribe)
	return r
}

// drop forgets what is known of a name.
func (k *kind) drop(n string) {
	if k.held[n] != nil {
		k.changed[n] = struct{}{}
	}
	delete(k.held, n)
	delete(k.absent, n)
	delete(k.rejected, n)
}

// connect begins a stream: everything that is wanted, with the versions that are held.
func (s *store) connect() []*discoveryv3.DeltaDiscoveryRequest {
	s.subscribe() // the requests below say it all
	var out []*discoveryv3.DeltaDiscoveryRequest
	for i, k := range s.kinds {
		if s.gateway && (i == listeners || i == clusters || i == services) || len(k.wanted) == 0 {
			continue
		}
		r := &discoveryv3.DeltaDiscoveryRequest{
			TypeUrl: k.url, ResourceNamesSubscribe: slices.Sorted(maps.Keys(k.wanted)), InitialResourceVersions: map[string]string{},
		}
		for n, res := range k.held {
			if res.any != nil { // trust and faults are told anew on each stream
				r.InitialResourceVersions[n] = res.version
			}
		}
		clear(k.absent) // to be answered anew
		out = append(out, r)
	}
	return out
}

// receive takes a response. What decodes is in force from the next Table on; the error is what must be said in a NACK. For trust the
// caller answers only after loading.
func (s *store) receive(r *discoveryv3.DeltaDiscoveryResponse, now time.Time) (bad error) {
	k := s.byURL[r.TypeUrl]
	if k == nil {
		return fmt.Errorf("type_url %q was not asked for", shorten(r.TypeUrl))
	}
	var errs []error
	for _, res := range r.Resources {
		if _, ok := k.wanted[res.Name]; !ok && !k.all() {
			continue // unsubscribed meanwhile
		}
		if err := s.take(k, res.Name, res.Version, res.Resource, now); err != nil {
			errs = append(errs, fmt.Errorf("%s %q: %w", shortType(k.url), shorten(res.Name), err))
		}
	}
	for _, n := range r.RemovedResources {
		if _, ok := k.wanted[n]; !ok && !k.all() {
			continue
		}
		s.remove(k, n, now)
	}
	return errors.Join(errs...)
}

// all reports a wildcard subscription.
func (k *kind) all() bool {
	_, ok := k.wanted["*"]
	return ok
}

// take stores one resource, if it decodes.
func (s *store) take(k *kind, n, version string, a *anypb.Any, now time.Time) error {
	value, err := decode(k.url, n, a, s.gateway)
	if err != nil {
		k.rejected[n] = &rejection{version: version, err: err, since: now}
		delete(k.absent, n)
		k.changed[n] = struct{}{}
		return err
	}
	if fs, ok := value.([]proxy.Fault); ok {
		stamp(fs, k.held[n], now)
	}
	delete(k.rejected, n)
	delete(k.absent, n)
	k.changed[n] = struct{}{}
	res := &resource{version: version, value: value}
	if k.url != faultsType && k.url != trustType {
		res.any = a
		s.saved = false
	}
	k.held[n] = res
	if o, ok := value.(*outbound); ok {
		if at := s.names[n]; at != nil {
			at.next = o
			s.pending[n] = at
			s.touched[n] = struct{}{}
		}
	}
	return nil
}

// stamp notes when each order was received; one that is told again keeps its time.
func stamp(fs []proxy.Fault, held *resource, now time.Time) {
	var old []proxy.Fault
	if held != nil {
		old = held.value.([]proxy.Fault)
	}
	for i := range fs {
		fs[i].Received = now
		for _, o := range old {
			if o.Drill == fs[i].Drill && o.Mode == fs[i].Mode && o.Renewal == fs[i].Renewal {
				fs[i].Received = o.Received
			}
		}
	}
}

// remove takes the server's word that there is no such resource.
func (s *store) remove(k *kind, n string, now time.Time) {
	_, known := k.absent[n]
	if k.held[n] != nil || k.rejected[n] != nil || k.url == endpointType && !known || k.url == serviceType {
		k.changed[n] = struct{}{}
	}
	if k.held[n] != nil {
		s.saved = false
	}
	delete(k.rejected, n)
	delete(k.held, n)
	if !k.all() {
		k.absent[n] = struct{}{}
	}
	if k.url == listenerType && s.names[n] != nil {
		s.unknown[n] = now
		s.forget(n)
	}
}

// answered reports whether the server has said what an xDS cluster is, or that there is none.
func (s *store) answered(cluster string) bool {
	c, e := s.kinds[clusters], s.kinds[endpoints]
	known := func(k *kind) bool {
		_, absent := k.absent[cluster]
		return absent || k.held[cluster] != nil || k.rejected[cluster] != nil
	}
	return known(c) && (c.held[cluster] == nil || known(e))
}

// promote lets those Listeners into the Table whose Clusters have all been answered.
func (s *store) promote() {
	for authority, n := range s.pending {
		if !slices.ContainsFunc(n.next.clusters, func(c string) bool { return !s.answered(c) }) {
			n.current = n.next
			delete(s.pending, authority)
			s.kinds[listeners].changed[authority] = struct{}{}
			s.touched[authority] = struct{}{}
		}
	}
}

// next returns the Table after all that was received, or nil where nothing differs, and what is to be sent because of it.
func (s *store) next(now time.Time) (*proxy.Table, []*discoveryv3.DeltaDiscoveryRequest) {
	s.promote()
	requests := s.subscribe()
	changed := s.trustChanged()
	for i, k := range s.kinds {
		changed = changed || len(k.changed) > 0 && i != services // which are beside the Table
	}
	if !changed && maps.Equal(s.unknown, s.table.Unknown) {
		return nil, requests
	}
	t := *s.table
	t.Version++
	t.Unknown = maps.Clone(s.unknown)
	t.Trust = s.trusted
	for n := range s.kinds[clusters].changed {
		s.kinds[listeners].changed[n] = struct{}{} // for its protocol
	}
	if k := s.kinds[listeners]; len(k.changed) > 0 {
		s.placeListeners(&t, k.changed)
	}
	if s.gateway {
		if k := s.kinds[endpoints]; len(k.changed) > 0 {
			t.SNI = maps.Clone(t.SNI)
			for n := range k.changed {
				if r := k.held[n]; r != nil {
					t.SNI[n] = r.value.([]proxy.Target)
				} else {
					delete(t.SNI, n)
				}
			}
		}
	} else if len(s.kinds[clusters].changed)+len(s.kinds[endpoints].changed) > 0 {
		s.placeClusters(&t)
	}
	if len(s.kinds[faults].changed) > 0 {
		t.Faults = nil
		if r := s.kinds[faults].held[faultsName]; r != nil {
			t.Faults = r.value.([]proxy.Fault)
		}
	}
	for i, k := range s.kinds {
		if i != services {
			clear(k.changed)
		}
	}
	s.table = &t
	return s.table, requests
}

func (s *store) trustChanged() bool { return !maps.Equal(s.trusted, s.table.Trust) }

func (s *store) placeListeners(t *proxy.Table, changed map[string]struct{}) {
	t.Listeners = maps.Clone(t.Listeners)
	inbound := false
	for n := range changed {
		if strings.HasPrefix(n, inboundPrefix) {
			inbound = true
			continue
		}
		if at := s.names[n]; at != nil && at.current != nil {
			t.Listeners[n] = s.finished(at.current.listener)
		} else {
			delete(t.Listeners, n)
		}
	}
	if inbound {
		t.Inbound = s.mergeInbound()
	}
}

// finished gives a Listener the protocol of its own Cluster, which a Listener does not tell beyond HTTP and TCP.
func (s *store) finished(l *proxy.Listener) *proxy.Listener {
	r := s.kinds[clusters].held[l.Authority]
	if l.Protocol != proxy.HTTP || r == nil || r.value.(*proxy.Cluster).Protocol == proxy.TCP {
		return l
	}
	c := *l
	c.Protocol = r.value.(*proxy.Cluster).Protocol
	return &c
}

// mergeInbound joins the inbound Listeners of one workload's addresses. Where two declare a port, the first address counts.
func (s *store) mergeInbound() *proxy.Inbound {
	var out *proxy.Inbound
	for _, n := range s.inbound {
		r := s.kinds[listeners].held[n]
		if r == nil {
			continue
		}
		in := r.value.(*proxy.Inbound)
		if out == nil {
			out = &proxy.Inbound{Address: in.Address}
		}
		for _, p := range in.Ports {
			if !slices.ContainsFunc(out.Ports, func(q proxy.InboundPort) bool { return q.Port == p.Port }) {
				out.Ports = append(out.Ports, p)
			}
		}
	}
	return out
}

func (s *store) placeClusters(t *proxy.Table) {
	t.Clusters = maps.Clone(t.Clusters)
	c, e := s.kinds[clusters], s.kinds[endpoints]
	for _, k := range []*kind{c, e} {
		for n := range k.changed {
			cr, er := c.held[n], e.held[n]
			_, absent := e.absent[n]
			switch m := s.clusters[n]; {
			case cr == nil:
				delete(s.clusters, n)
				delete(t.Clusters, n)
				continue
			case m != nil && m.cluster == cr && m.endpoints == er && m.absent == absent:
				continue
			}
			m := &merged{cluster: cr, endpoints: er, absent: absent, made: merge(cr, er, absent)}
			s.clusters[n] = m
			t.Clusters[n] = m.made
		}
	}
}

func merge(cr, er *resource, absent bool) *proxy.Cluster {
	out := *cr.value.(*proxy.Cluster)
	out.EndpointsReceived = absent
	if er != nil {
		a := er.value.(*assignment)
		out.EndpointsReceived, out.Levels = true, a.levels
		if a.overprovisioning != 0 {
			out.Overprovisioning = a.overprovisioning
		}
	}
	return &out
}

// announced returns the newest trust that the control plane has announced.
func (s *store) announced() Trust {
	if r := s.kinds[trust].held[trustName]; r != nil {
		return r.value.(Trust)
	}
	return Trust{}
}

// failure says why an authority cannot be used though it exists: a NACK without a last good one.
func (s *store) failure(authority string) error {
	n := s.names[authority]
	if n == nil || n.current != nil {
		return nil
	}
	if r := s.kinds[listeners].rejected[authority]; r != nil && n.next == nil {
		return fmt.Errorf("the Listener %q was rejected: %w", authority, r.err)
	}
	return nil
}

// expire drops what unknown names were answered before.
func (s *store) expire(before time.Time) {
	maps.DeleteFunc(s.unknown, func(_ string, at time.Time) bool { return at.Before(before) })
}

// ack answers a response; a NACK says which resources were rejected and why.
func ack(r *discoveryv3.DeltaDiscoveryResponse, bad error) *discoveryv3.DeltaDiscoveryRequest {
	out := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: r.TypeUrl, ResponseNonce: r.Nonce}
	if bad != nil {
		const limit = 8 << 10
		message := bad.Error()
		if len(message) > limit {
			message = strings.ToValidUTF8(message[:limit], "") + "…"
		}
		out.ErrorDetail = &status.Status{Code: int32(codes.InvalidArgument), Message: strings.ToValidUTF8(message, "?")}
	}
	return out
}

// shortType is "Listener" for a type URL that ends in ".Listener".
func shortType(url string) string { return url[strings.LastIndexByte(url, '.')+1:] }
