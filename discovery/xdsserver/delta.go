package xdsserver

import (
	"context"
	"errors"
	"io"
	"maps"
	"slices"
	"strconv"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/discovery/xdsgen"
)

var errShutdown = status.Error(codes.Unavailable, "the control plane is shutting down")

// receive reads a stream until it ends. The goroutine ends with the stream, whose handler has then returned.
func receive[T any](ctx context.Context, recv func() (T, error)) (<-chan T, <-chan error) {
	requests, failed := make(chan T), make(chan error, 1)
	go func() {
		for {
			req, err := recv()
			if err != nil {
				failed <- err
				return
			}
			select {
			case requests <- req:
			case <-ctx.Done():
				return
			}
		}
	}()
	return requests, failed
}

// cause is why a stream ends: nil where the client went away.
func cause(ctx context.Context, err error) error {
	if why := context.Cause(ctx); why != nil && !errors.Is(why, context.Canceled) {
		return why
	}
	if err == nil || errors.Is(err, io.EOF) || status.Code(err) == codes.Canceled {
		return nil
	}
	return err
}

// DeltaAggregatedResources serves the incremental variant of ADS.
func (s *Server) DeltaAggregatedResources(stream grpc.BidiStreamingServer[discoveryv3.DeltaDiscoveryRequest, discoveryv3.DeltaDiscoveryResponse]) error {
	ctx, ss, err := s.open(stream.Context(), "delta")
	if err != nil {
		return err
	}
	defer ss.close("delta")
	d := &delta{session: ss, send: stream.Send}
	requests, failed := receive(ctx, stream.Recv)
	for {
		select {
		case req := <-requests:
			err = d.request(req)
		case <-ss.wake:
			err = d.refresh()
		case err := <-failed:
			return cause(ctx, err)
		case <-ctx.Done():
			return cause(ctx, nil)
		}
		if err != nil {
			return cause(ctx, err)
		}
	}
}

// delta is the incremental protocol over a session.
type delta struct {
	*session
	send func(*discoveryv3.DeltaDiscoveryResponse) error
}

// batch is what one type's response will hold.
type batch struct {
	resources []*discoveryv3.Resource
	removed   []string
}

func (d *delta) request(req *discoveryv3.DeltaDiscoveryRequest) error {
	d.begin(req.GetNode())
	typeURL := req.GetTypeUrl()
	t, first := d.of(typeURL)
	if t == nil {
		return status.Errorf(codes.ResourceExhausted, "more than %d resource types on one stream", maxTypes)
	}
	if nonce := req.GetResponseNonce(); nonce != "" {
		d.answered(typeURL, nonce, t, req.GetErrorDetail())
	}
	out := make(map[string]*batch)
	wild := first && len(req.GetResourceNamesSubscribe()) == 0 // the legacy way to ask for everything
	for _, name := range req.GetResourceNamesUnsubscribe() {
		if name == "*" {
			t.wildcard, t.wild, t.byService = false, nil, nil
		}
		d.unsubscribe(typeURL, name, t)
	}
	for _, name := range req.GetResourceNamesSubscribe() {
		if name == "*" {
			wild = true
			continue
		}
		old := t.names[name]
		sub, ok := d.subscribe(typeURL, name, t)
		switch {
		case !ok:
			d.s.log.Warn("xds stream has too many names; the name is answered as unknown", "proxy", d.viewer.ID, "limit", maxNames)
			in(out, typeURL).removed = append(in(out, typeURL).removed, name)
			continue
		case old != nil && old.implied: // it came with its Listener
			sub.implied = false
			continue
		case old != nil: // asking again means: send again
			sub.version, sub.told = "", false
		case first:
			sub.version = req.GetInitialResourceVersions()[name]
		}
		d.add(out, typeURL, name, sub)
	}
	if wild && !t.wildcard {
		t.wildcard = true
		d.wildcard(out, typeURL, t, req.GetInitialResourceVersions())
	}
	return d.flush(out, time.Time{})
}

// in returns the batch of a type.
func in(out map[string]*batch, typeURL string) *batch {
	b := out[typeURL]
	if b == nil {
		b = &batch{}
		out[typeURL] = b
	}
	return b
}

// add puts a resource into the batch if the client lacks its version.
func (d *delta) add(out map[string]*batch, typeURL, name string, sub *subscription) {
	r := d.resource(typeURL, name)
	if r == nil {
		if !sub.told {
			in(out, typeURL).removed = append(in(out, typeURL).removed, name)
			sub.version, sub.told = "", true
		}
		return
	}
	if d.client.push && typeURL == xdsgen.ListenerType {
		d.dependencies(out, name)
	}
	if r.Version == sub.version {
		return
	}
	sub.version, sub.told = r.Version, false
	b := in(out, typeURL)
	b.resources = append(b.resources, &discoveryv3.Resource{Name: name, Version: r.Version, Resource: r.Any})
}

// dependencies sends what a Listener refers to along with it, to clients that keep what they did not ask for.
func (d *delta) dependencies(out map[string]*batch, listener string) {
	for _, name := range d.s.View().Dependencies(&d.viewer, listener) {
		for _, typeURL := range [...]string{xdsgen.ClusterType, xdsgen.EndpointType} {
			t, _ := d.of(typeURL)
			if t == nil || t.names[name] != nil {
				continue
			}
			if sub, ok := d.subscribe(typeURL, name, t); ok {
				sub.implied = true
				d.add(out, typeURL, name, sub)
			}
		}
	}
}

// wildcard begins a wildcard subscription: a gateway's table, or the one resource of its type. Others have none, and are told so.
func (d *delta) wildcard(out map[string]*batch, typeURL string, t *subscriptions, have map[string]string) {
	b := in(out, typeURL)
	switch {
	case typeURL == xdsgen.TrustType || typeURL == xdsgen.FaultsType:
		name := trustName
		if typeURL == xdsgen.FaultsType {
			name = faultsName
		}
		if sub, ok := d.subscribe(typeURL, name, t); ok {
			sub.version = have[name]
			d.add(out, typeURL, name, sub)
		}
	case typeURL == xdsgen.EndpointType && d.viewer.Kind == xdsgen.Gateway:
		t.wild = make(map[string]*wild)
		t.byService = make(map[discovery.Name][]string)
		view := d.s.View()
		for _, n := range slices.SortedFunc(view.Exported(), discovery.Name.Compare) {
			d.table(b, t, view, n, have)
		}
		for name := range have {
			if t.wild[name] == nil {
				b.removed = append(b.removed, name)
			}
		}
		slices.Sort(b.removed)
	}
}

// table brings one service's part of a gateway's table up to date.
func (d *delta) table(b *batch, t *subscriptions, view *xdsgen.View, service discovery.Name, have map[string]string) {
	made, err := view.GatewayResources(service)
	if err != nil {
		d.s.metrics.failures.WithLabelValues(shortType(xdsgen.EndpointType)).Inc()
		d.s.log.Error("gateway table cannot be made; gateways keep what they have", "service", service.String(), "error", err)
		return
	}
	old := t.byService[service]
	names := make([]string, 0, len(made))
	for _, r := range made {
		names = append(names, r.Name)
		w := t.wild[r.Name]
		if w == nil {
			w = &wild{version: have[r.Name]}
			t.wild[r.Name] = w
		}
		if _, had := slices.BinarySearch(old, r.Name); !had {
			w.owners++
		}
		if w.version != r.Version {
			w.version = r.Version
			b.resources = append(b.resources, &discoveryv3.Resource{Name: r.Name, Version: r.Version, Resource: r.Any})
		}
	}
	for _, name := range old {
		if _, has := slices.BinarySearch(names, name); !has {
			if w := t.wild[name]; w.owners == 1 {
				delete(t.wild, name)
				b.removed = append(b.removed, name)
			} else {
				w.owners--
			}
		}
	}
	if len(names) == 0 {
		delete(t.byService, service)
	} else {
		t.byService[service] = names
	}
}

// refresh sends what a new view, trust or drill has changed.
func (d *delta) refresh() error {
	if d.viewer.SPIFFEID == "" {
		return nil // nothing asked for yet
	}
	names, services, all, applied := d.dirty()
	out := make(map[string]*batch)
	for typeURL, list := range names {
		t := d.types[typeURL]
		slices.Sort(list)
		for _, name := range list {
			if sub := t.names[name]; sub != nil {
				d.add(out, typeURL, name, sub)
			}
		}
	}
	if t := d.types[xdsgen.EndpointType]; t != nil && t.wild != nil && (all || len(services) > 0) {
		view := d.s.View()
		if all {
			services = make(map[discovery.Name]struct{})
			for n := range t.byService {
				services[n] = struct{}{}
			}
			for n := range view.Exported() {
				services[n] = struct{}{}
			}
		}
		b := &batch{}
		for _, n := range slices.SortedFunc(maps.Keys(services), discovery.Name.Compare) {
			d.table(b, t, view, n, nil)
		}
		if len(b.resources)+len(b.removed) > 0 {
			out[xdsgen.EndpointType] = b
		}
	}
	return d.flush(out, applied)
}

// flush sends the batches in order, in responses of bounded size.
func (d *delta) flush(out map[string]*batch, applied time.Time) error {
	for _, typeURL := range sendOrder {
		if b := out[typeURL]; b != nil {
			delete(out, typeURL)
			if err := d.sendBatch(typeURL, b, applied); err != nil {
				return err
			}
		}
	}
	for typeURL, b := range out { // types that nobody here makes
		if err := d.sendBatch(typeURL, b, applied); err != nil {
			return err
		}
	}
	return nil
}

func (d *delta) sendBatch(typeURL string, b *batch, applied time.Time) error {
	t := d.types[typeURL]
	version := strconv.FormatUint(d.seq, 10)
	for first := true; first || len(b.resources) > 0; first = false {
		n, bytes := 0, 0
		for n < len(b.resources) && (n == 0 || bytes+len(b.resources[n].Resource.Value) <= maxResponse) {
			bytes += len(b.resources[n].Resource.Value)
			n++
		}
		resp := &discoveryv3.DeltaDiscoveryResponse{
			SystemVersionInfo: version,
			TypeUrl:           typeURL,
			Resources:         b.resources[:n],
			Nonce:             d.sent(typeURL, t, version, bytes, len(t.names)+len(t.wild)),
		}
		if first {
			resp.RemovedResources = b.removed
		}
		b.resources = b.resources[n:]
		if err := d.send(resp); err != nil {
			return err
		}
	}
	if !applied.IsZero() {
		d.s.metrics.delay.Observe(d.s.now().Sub(applied).Seconds())
	}
	return nil
}
