package sidecar

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/hanse-mesh/hanse/proxy"
	"github.com/hanse-mesh/hanse/proxy/hop"
	"github.com/hanse-mesh/hanse/proxy/message"
)

// Capture is how connections are served that the kernel led here, package capture's doing. Without listeners there is none.
type Capture struct {
	Outbound []net.Listener // what the application calls
	Inbound  []net.Listener // what calls the application, but for the hop

	Original  func(net.Conn) (netip.AddrPort, error) // where a connection was made to; its local address where it was made to the listener
	Addresses proxy.Addresses                        // nil: no address is the mesh's

	DenyOutside bool          // refuse what is none of the mesh's
	Sniff       time.Duration // how long a caller may take to show what it speaks, where nothing is declared; default 100 ms
	Permissive  bool          // let callers without identity in, where no AccessPolicy asks who they are
	Exempt      []uint16      // ports of the workload open to everybody: health checks, metrics
}

// captured is the state of it.
type captured struct {
	Capture
	outsideTotal *prometheus.CounterVec
	plainTotal   *prometheus.CounterVec
	destinations bounded
	sources      bounded
	ports        bounded

	mu      sync.Mutex
	own     map[netip.AddrPort]struct{} // guarded by mu: local ends of our connections to the outside
	outside map[netip.Addr]struct{}     // guarded by mu: addresses that the control plane said are none of the mesh's
	loops   time.Time                   // guarded by mu: when one was logged
}

// outsideTimeout bounds a connect to what may be far away.
const outsideTimeout = 10 * time.Second

// maxOutside bounds the addresses that are remembered for when no control plane answers.
const maxOutside = 4096

func newCaptured(cfg Capture, reg prometheus.Registerer) *captured {
	if cfg.Sniff == 0 {
		cfg.Sniff = 100 * time.Millisecond
	}
	c := &captured{
		Capture: cfg, own: map[netip.AddrPort]struct{}{}, outside: map[netip.Addr]struct{}{},
		outsideTotal: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hanse_outside_connections_total",
			Help: "Captured connections to what is none of the mesh's, by destination (256 of them, then \"other\") and whether they were allowed or denied."}, []string{"destination", "decision"}),
		plainTotal: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hanse_plaintext_inbound_total",
			Help: "Requests and TCP connections to the application without mutual TLS, by source address (256 of them, then \"other\"), port and whether they were refused, permitted or exempt."}, []string{"source", "port", "decision"}),
	}
	if reg != nil {
		reg.MustRegister(c.outsideTotal, c.plainTotal)
	}
	return c
}

// bounded makes labels of what others choose.
type bounded struct {
	mu    sync.Mutex
	known map[string]struct{} // guarded by mu
}

const maxLabels = 256

func (b *bounded) label(s string) string {
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, ok := b.known[s]; ok {
		return s
	}
	if len(b.known) >= maxLabels {
		return "other"
	}
	if b.known == nil {
		b.known = map[string]struct{}{}
	}
	b.known[s] = struct{}{}
	return s
}

// arrival is where a captured connection comes from and was made to.
type arrival struct{ from, to netip.AddrPort }

// arrive refuses connections that were not captured, and our own.
func (s *Sidecar) arrive(nc net.Conn) (arrival, bool) {
	var a arrival
	reason := ""
	to, err := s.captured.Original(nc)
	if err == nil {
		a.from, err = addrPortOf(nc.RemoteAddr())
	}
	local, localErr := addrPortOf(nc.LocalAddr())
	a.to = netip.AddrPortFrom(to.Addr().Unmap(), to.Port())
	switch {
	case err != nil || localErr != nil:
		reason = "no_destination"
	case a.to == local:
		reason = "not_captured"
	case s.captured.isOwn(a.from):
		reason = "loop"
		s.captured.warnOfLoop(s, a)
	default:
		return a, true
	}
	s.metrics.rejects.WithLabelValues("captured", reason).Inc()
	s.log.Debug("a connection to a captured port is refused", "reason", reason, "from", nc.RemoteAddr(), "to", nc.LocalAddr(), "error", err)
	reset(nc)
	return a, false
}

func (c *captured) warnOfLoop(s *Sidecar, a arrival) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if time.Since(c.loops) > time.Minute {
		c.loops = time.Now()
		s.log.Error("the sidecar's own connections are captured: let the rules exempt its user or its mark (hanse-proxy capture show)", "from", a.from, "to", a.to)
	}
}

func addrPortOf(a net.Addr) (netip.AddrPort, error) {
	if tcp, ok := a.(*net.TCPAddr); ok {
		ap := tcp.AddrPort()
		return netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port()), nil
	}
	return netip.ParseAddrPort(a.String())
}

// reset ends a connection so that the peer sees a failure, not an end.
func reset(nc net.Conn) {
	if replayed, ok := nc.(*replayedConn); ok {
		nc = replayed.Conn
	}
	if c, ok := nc.(syscall.Conn); ok {
		if raw, err := c.SyscallConn(); err == nil {
			_ = raw.Control(dropUnsent)
		}
	}
	_ = nc.Close()
}

// serveCaptured serves a connection that the application made to an address.
func (s *Sidecar) serveCaptured(all *conns, nc net.Conn) {
	a, ok := s.arrive(nc)
	if !ok {
		return
	}
	svc, f := s.serviceAt(a.to.Addr())
	if f != nil {
		s.refuseConn(nc, reporterSource, a, f)
		return
	}
	if svc == nil {
		s.serveOutside(all, nc, a)
		return
	}
	port := svc.Port(a.to.Port())
	if port == nil {
		if svc.Headless || svc.Endpoint != "" { // an endpoint's own address has other ports, too
			s.serveOutside(all, nc, a)
			return
		}
		s.refuseConn(nc, reporterSource, a, failWith(codeUnknownService, "%s (%s) has no port %d", svc.Host, a.to.Addr(), a.to.Port()))
		return
	}
	authority := svc.Host + ":" + strconv.Itoa(int(port.Number))
	protocol := port.Protocol
	if protocol == "" {
		var speaks spoken
		if nc, speaks = sniff(nc, s.captured.Sniff); speaks == speaksHTTP {
			protocol = proxy.HTTP
		} else {
			protocol = proxy.TCP
		}
	}
	if protocol != proxy.TCP {
		s.serveConn(all, nc, "app", func(st message.ServerStream, h2 bool) { s.outboundCaptured(st, authority, svc.Endpoint, h2) })
		return
	}
	table, listener, f := s.resolve(authority)
	if f != nil {
		s.refuseConn(nc, reporterSource, a, f)
		return
	}
	s.addTCP(all, nc, func(ctx context.Context) { s.tcp(ctx, nc, table, listener, svc.Endpoint) })
}

// serviceAt is nil without failure for what is none of the mesh's. Where no control plane answers, that is said only of what it was
// known of before: plaintext to a service of the mesh would be the alternative.
func (s *Sidecar) serviceAt(address netip.Addr) (*proxy.Service, *failure) {
	c := s.captured
	if c.Addresses == nil {
		return nil, nil
	}
	ctx, cancel := context.WithTimeout(s.coreCtx, resolveTimeout)
	defer cancel()
	svc, err := c.Addresses.ServiceAt(ctx, address)
	c.mu.Lock()
	defer c.mu.Unlock()
	_, known := c.outside[address]
	switch {
	case err == nil:
		delete(c.outside, address)
		return svc, nil
	case errors.Is(err, proxy.ErrUnknown):
		if !known {
			if len(c.outside) >= maxOutside {
				for old := range c.outside { // any
					delete(c.outside, old)
					break
				}
			}
			c.outside[address] = struct{}{}
		}
		return nil, nil
	case known:
		return nil, nil
	}
	return nil, failWith(codeNoConfig, "whether %s is a service of the mesh: %v", address, err)
}

// refuseConn records and resets.
func (s *Sidecar) refuseConn(nc net.Conn, reporter string, a arrival, f *failure) {
	rec := s.begin(reporter, "tcp")
	rec.endpoint = a.to.String()
	if reporter == reporterSource {
		rec.source = s.ownID()
	} else {
		rec.peer, rec.dest = a.from.String(), s.ownID()
	}
	rec.fail(f)
	s.finish(rec)
	reset(nc)
}

// outboundCaptured serves an exchange on a captured connection. The address has said whom it is for; the host that the application names
// is passed on as it is. endpoint, if not empty, is the only one meant.
func (s *Sidecar) outboundCaptured(st message.ServerStream, authority, endpoint string, h2 bool) {
	r := st.Request()
	rec := s.begin(reporterSource, requestProtocol(r, h2))
	defer s.finish(rec)
	rec.source, rec.service, rec.only, rec.method = s.ownID(), authority, endpoint, r.Method
	rec.path, _, _ = strings.Cut(r.Path, "?")
	table, listener, f := s.resolve(authority)
	switch {
	case f != nil:
	case r.Method == http.MethodConnect:
		f = failWith(codeBadRequest, "%s is declared to speak HTTP, and is no proxy: a port that is one is declared as tcp", authority)
	case listener.Protocol == proxy.TCP:
		f = failWith(codeBadRequest, "%s is a TCP service", authority)
	}
	if f != nil {
		s.refuse(st, rec, f)
		return
	}
	s.serveHTTP(st, rec, table, direct(listener, table, endpoint), false)
}

// direct is the way to one endpoint: routes are of the service, not of its endpoints' own addresses.
func direct(l *proxy.Listener, table *proxy.Table, endpoint string) *proxy.Listener {
	if endpoint == "" || table.Clusters[l.Authority] == nil {
		return l
	}
	return &proxy.Listener{Authority: l.Authority, Protocol: l.Protocol, Cluster: l.Authority,
		Routes: []*proxy.Route{{Name: "endpoint " + endpoint, Backends: []proxy.Backend{{Cluster: l.Authority, Weight: 1}}}}}
}

// serveOutside passes a connection on as it is, to where it was made to.
func (s *Sidecar) serveOutside(all *conns, nc net.Conn, a arrival) {
	c := s.captured
	count := func(decision string) {
		c.outsideTotal.WithLabelValues(c.destinations.label(a.to.String()), decision).Inc()
	}
	if c.DenyOutside {
		count("denied")
		s.refuseConn(nc, reporterSource, a, failWith(codeDenied, "%s is none of the mesh's, and capture.outside is deny", a.to))
		return
	}
	count("allowed")
	s.addTCP(all, nc, func(ctx context.Context) {
		rec := s.begin(reporterSource, "tcp")
		defer s.finish(rec)
		rec.source, rec.service, rec.endpoint = s.ownID(), "outside", a.to.String()
		dialCtx, cancel := context.WithTimeout(ctx, outsideTimeout)
		up, err := s.cfg.Dial(dialCtx, "tcp", a.to.String())
		cancel()
		if err != nil {
			rec.fail(failWith(codeUnreachable, "%v", err))
			reset(nc)
			return
		}
		defer up.Close()
		local, err := addrPortOf(up.LocalAddr())
		if err == nil {
			c.setOwn(local, true)
			defer c.setOwn(local, false)
		}
		if err != nil || c.isOwn(a.from) { // known too late for arrive
			c.warnOfLoop(s, a)
			rec.fail(failWith(codeUnreachable, "loop: the sidecar's own connection was captured"))
			reset(nc)
			return
		}
		rec.status, rec.firstByte = http.StatusOK, time.Since(rec.start)
		rec.in, rec.out = relay(ctx, connEnd{nc}, connEnd{up}, s.cfg.IdleTimeout)
	})
}

func (c *captured) setOwn(local netip.AddrPort, open bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if open {
		c.own[local] = struct{}{}
	} else {
		delete(c.own, local)
	}
}

func (c *captured) isOwn(from netip.AddrPort) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, ok := c.own[from]
	return ok
}

// Decisions on callers without identity.
const (
	plainRefused   = "refused"
	plainPermitted = "permitted"
	plainExempt    = "exempt"
)

func (s *Sidecar) countPlain(a arrival, decision string) {
	c := s.captured
	c.plainTotal.WithLabelValues(c.sources.label(a.from.Addr().String()), c.ports.label(strconv.Itoa(int(a.to.Port()))), decision).Inc()
}

// serveInboundCaptured serves a connection that somebody made to the workload without mutual TLS.
func (s *Sidecar) serveInboundCaptured(all *conns, nc net.Conn) {
	a, ok := s.arrive(nc)
	if !ok {
		return
	}
	decision := plainRefused
	switch {
	case slices.Contains(s.captured.Exempt, a.to.Port()):
		decision = plainExempt
	case s.captured.Permissive:
		decision = plainPermitted
	}
	if decision == plainRefused {
		s.countPlain(a, decision)
		s.refuseConn(nc, reporterDestination, a, failWith(codePlaintext, "%s calls without mutual TLS", a.from))
		return
	}
	port := s.declared(a.to.Port())
	to := s.apps.of(a.to.Port())
	if to == nil {
		to = s.newApp(a.to.String())
		defer to.close()
	}
	protocol := proxy.Protocol("")
	if port != nil {
		protocol = port.Protocol
	}
	if protocol == "" {
		protocol = proxy.TCP
		var speaks spoken
		if nc, speaks = sniff(nc, s.captured.Sniff); speaks == speaksHTTP {
			protocol = proxy.HTTP
		}
	}
	if protocol == proxy.TCP {
		s.addTCP(all, nc, func(ctx context.Context) { s.inboundPlainTCP(ctx, nc, a, port, to, decision) })
		return
	}
	s.serveConn(all, nc, "plaintext", func(st message.ServerStream, h2 bool) { s.inboundPlain(st, a, port, protocol, to, decision, h2) })
}

func (s *Sidecar) declared(number uint16) *proxy.InboundPort {
	in := s.cfg.Control.Table().Inbound
	if in == nil {
		return nil
	}
	for i := range in.Ports {
		if in.Ports[i].Port == number {
			return &in.Ports[i]
		}
	}
	return nil
}

// beginPlain records one request or connection, and decides on it. The decision is counted.
func (s *Sidecar) beginPlain(protocol string, a arrival, port *proxy.InboundPort, decision string) (*record, *failure) {
	rec := s.begin(reporterDestination, protocol)
	rec.peer, rec.endpoint, rec.dest, rec.policy = a.from.String(), a.to.String(), s.ownID(), "plaintext "+decision
	rec.cluster, rec.region, rec.zone = s.cfg.Locality.Cluster, s.cfg.Locality.Region, s.cfg.Locality.Zone
	if port != nil && len(port.Services) > 0 {
		rec.service = port.Services[0]
	}
	var f *failure
	switch {
	case s.draining.Load():
		f = failWith(codeDraining, "this workload is shutting down")
	case decision == plainPermitted && port != nil && (!port.Access.DefaultAllow || len(port.Access.Deny) > 0):
		decision = plainRefused
		f = failWith(codePlaintext, "an AccessPolicy of %s asks who calls, and a caller without mutual TLS cannot say", rec.service)
	}
	s.countPlain(a, decision)
	return rec, f
}

// inboundPlain serves an exchange of a caller without identity.
func (s *Sidecar) inboundPlain(st message.ServerStream, a arrival, port *proxy.InboundPort, protocol proxy.Protocol, to *app, decision string, h2 bool) {
	r := st.Request()
	rec, f := s.beginPlain(requestProtocol(r, h2), a, port, decision)
	defer s.finish(rec)
	rec.method = r.Method
	rec.path, _, _ = strings.Cut(r.Path, "?")
	if f == nil && r.Method == http.MethodConnect {
		f = failWith(codeBadRequest, "CONNECT is not for applications")
	}
	if f == nil && decision != plainExempt {
		f = s.suffer(st, a.to.Port())
	}
	if f != nil {
		s.refuse(st, rec, f)
		return
	}
	if h2 && port == nil {
		protocol = proxy.HTTP2 // as it came
	}
	s.inboundHTTP(st, rec, to, hop.Caller{Address: net.TCPAddrFromAddrPort(a.from)}, protocol)
}

func (s *Sidecar) inboundPlainTCP(ctx context.Context, nc net.Conn, a arrival, port *proxy.InboundPort, to *app, decision string) {
	rec, f := s.beginPlain("tcp", a, port, decision)
	defer s.finish(rec)
	var up net.Conn
	if f == nil {
		var err error
		if up, err = to.dial(ctx); err != nil {
			f = failWith(codeNoApp, "%v", err)
		}
	}
	if f != nil {
		rec.fail(f)
		reset(nc)
		return
	}
	defer up.Close()
	rec.status, rec.firstByte = http.StatusOK, time.Since(rec.start)
	rec.in, rec.out = relay(ctx, connEnd{nc}, connEnd{up}, s.cfg.IdleTimeout)
}
