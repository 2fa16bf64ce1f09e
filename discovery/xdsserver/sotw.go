package xdsserver

import (
	"crypto/sha256"
	"encoding/hex"
	"maps"
	"slices"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hanse-mesh/hanse/discovery/xdsgen"
)

// StreamAggregatedResources serves the state-of-the-world variant of ADS, which gRPC speaks.
func (s *Server) StreamAggregatedResources(stream grpc.BidiStreamingServer[discoveryv3.DiscoveryRequest, discoveryv3.DiscoveryResponse]) error {
	ctx, ss, err := s.open(stream.Context(), "sotw")
	if err != nil {
		return err
	}
	defer ss.close("sotw")
	w := &sotw{session: ss, send: stream.Send}
	requests, failed := receive(ctx, stream.Recv)
	for {
		select {
		case req := <-requests:
			err = w.request(req)
		case <-ss.wake:
			err = w.refresh()
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

// sotw is the state-of-the-world protocol over a session.
type sotw struct {
	*session
	send func(*discoveryv3.DiscoveryResponse) error
}

// whole reports whether every response of a type holds all that is subscribed, so that absence means "does not exist".
func whole(typeURL string) bool {
	return typeURL == xdsgen.ListenerType || typeURL == xdsgen.ClusterType
}

func (w *sotw) request(req *discoveryv3.DiscoveryRequest) error {
	w.begin(req.GetNode())
	typeURL := req.GetTypeUrl()
	t, first := w.of(typeURL)
	if t == nil {
		return status.Errorf(codes.ResourceExhausted, "more than %d resource types on one stream", maxTypes)
	}
	if nonce := req.GetResponseNonce(); nonce != "" {
		w.answered(typeURL, nonce, t, req.GetErrorDetail())
		if nonce != t.last {
			return nil // the client has not yet seen our newest response; its answer to that holds its names
		}
	}
	wanted := make(map[string]struct{}, len(req.GetResourceNames()))
	var added []string
	for _, name := range req.GetResourceNames() {
		if name == "*" {
			continue // nobody who speaks this variant has a use for it
		}
		wanted[name] = struct{}{}
		if t.names[name] != nil {
			continue
		}
		if _, ok := w.subscribe(typeURL, name, t); !ok {
			w.s.log.Warn("xds stream has too many names; the name is answered as unknown", "proxy", w.viewer.ID, "limit", maxNames)
			continue
		}
		added = append(added, name)
	}
	for name := range maps.Clone(t.names) {
		if _, ok := wanted[name]; !ok {
			w.unsubscribe(typeURL, name, t)
		}
	}
	if !first && len(added) == 0 {
		return nil
	}
	return w.respond(typeURL, t, added, true, time.Time{})
}

func (w *sotw) refresh() error {
	if w.viewer.SPIFFEID == "" {
		return nil
	}
	names, _, _, applied := w.dirty()
	for _, typeURL := range sendOrder {
		if t := w.types[typeURL]; t != nil && len(names[typeURL]) > 0 {
			if err := w.respond(typeURL, t, names[typeURL], false, applied); err != nil {
				return err
			}
		}
	}
	return nil
}

// respond sends the named resources, if any of them differs from what was sent or always is set; of Listeners and Clusters
// it sends all.
func (w *sotw) respond(typeURL string, t *subscriptions, names []string, always bool, applied time.Time) error {
	made := make(map[string]*xdsgen.Resource)
	changed := false
	for _, name := range names {
		sub := t.names[name]
		if sub == nil {
			continue
		}
		version := ""
		r := w.resource(typeURL, name)
		if r != nil {
			version = r.Version
		}
		if version != sub.version {
			changed = true
			sub.version = version
		} else if !always {
			continue
		}
		if r != nil {
			made[name] = r
		}
	}
	if !changed && !always {
		return nil
	}
	if whole(typeURL) {
		for name, sub := range t.names {
			if made[name] != nil {
				continue
			}
			if r := w.resource(typeURL, name); r != nil {
				made[name], sub.version = r, r.Version
			}
		}
	} else if len(made) == 0 {
		return nil // absence says nothing for these types
	}
	resp := &discoveryv3.DiscoveryResponse{TypeUrl: typeURL}
	hash := sha256.New()
	bytes := 0
	for _, name := range slices.Sorted(maps.Keys(made)) {
		r := made[name]
		hash.Write([]byte(name + "\x00" + r.Version + "\x00"))
		bytes += len(r.Any.Value)
		resp.Resources = append(resp.Resources, r.Any)
	}
	resp.VersionInfo = hex.EncodeToString(hash.Sum(nil)[:8])
	resp.Nonce = w.sent(typeURL, t, resp.VersionInfo, bytes, len(t.names))
	if err := w.send(resp); err != nil {
		return err
	}
	if !applied.IsZero() {
		w.s.metrics.delay.Observe(w.s.now().Sub(applied).Seconds())
	}
	return nil
}
