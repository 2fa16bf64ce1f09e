package sidecar

import (
	"bufio"
	"cmp"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/trace"

	"github.com/hanse-mesh/hanse/proxy"
	"github.com/hanse-mesh/hanse/proxy/hop"
)

// app is the application behind one declared port.
type app struct {
	network, address string
	http1, h2c       *http.Transport
}

func newApp(address string, connectTimeout time.Duration) *app {
	a := &app{network: "tcp", address: address}
	if path, ok := strings.CutPrefix(address, "unix:"); ok {
		a.network, a.address = "unix", path
	}
	a.http1, a.h2c = newTransports(func(ctx context.Context, _, _ string) (net.Conn, error) {
		ctx, cancel := context.WithTimeout(ctx, connectTimeout)
		defer cancel()
		return a.dial(ctx)
	})
	return a
}

// newTransports speak HTTP/1.1, and HTTP/2 with prior knowledge, in the clear.
func newTransports(dial func(ctx context.Context, network, address string) (net.Conn, error)) (http1, h2c *http.Transport) {
	transport := func(set func(*http.Protocols)) *http.Transport {
		p := new(http.Protocols)
		set(p)
		return &http.Transport{
			Protocols: p, DialContext: dial, DisableCompression: true, Proxy: nil,
			TLSClientConfig:        &tls.Config{MinVersion: tls.VersionTLS13}, // never used: the scheme is http
			MaxIdleConns:           256,
			MaxIdleConnsPerHost:    256,
			IdleConnTimeout:        30 * time.Second,
			MaxResponseHeaderBytes: 256 << 10,
		}
	}
	return transport(func(p *http.Protocols) { p.SetHTTP1(true) }), transport(func(p *http.Protocols) { p.SetUnencryptedHTTP2(true) })
}

func (a *app) dial(ctx context.Context) (net.Conn, error) {
	return (&net.Dialer{}).DialContext(ctx, a.network, a.address)
}

func (a *app) close() {
	a.http1.CloseIdleConnections()
	a.h2c.CloseIdleConnections()
}

// inbound serves what comes over the hop.
func (s *Sidecar) inbound(w http.ResponseWriter, r *http.Request) {
	caller, ok := hop.CallerOf(r.Context())
	if !ok {
		panic("inbound request without a verified caller")
	}
	rec := s.begin(reporterDestination, requestProtocol(r))
	defer s.finish(rec)
	rec.source, rec.dest, rec.endpoint = caller.ID.String(), s.ownID(), s.cfg.Workload.String()
	rec.cluster, rec.region, rec.zone = s.cfg.Locality.Cluster, s.cfg.Locality.Region, s.cfg.Locality.Zone
	rec.method, rec.path = r.Method, requestPath(r.URL)
	upgrade := ""
	if r.Method == http.MethodConnect {
		rec.path = ""
		if upgrade = r.Header.Get(headerUpgrade); upgrade != "" {
			rec.protocol, rec.method = "upgrade", http.MethodGet
			u, err := url.ParseRequestURI(r.Header.Get(headerPath))
			if err != nil || u.Host != "" || !strings.HasPrefix(u.Path, "/") {
				s.refuse(w, r, rec, failWith(codeBadRequest, "bad hanse-path"))
				return
			}
			r.URL = u
			rec.path = requestPath(u)
		}
	}
	target := r.Host
	if t := r.Header.Get(headerTarget); t != "" && r.Method != http.MethodConnect {
		target = t
	}
	if s.draining.Load() {
		w.Header().Set("Connection", "close") // GOAWAY
		s.refuse(w, r, rec, failWith(codeDraining, "this workload is shutting down"))
		return
	}
	port := s.portOf(s.cfg.Control.Table().Inbound, target)
	if port == nil {
		s.refuse(w, r, rec, failWith(codeWrongTarget, "%s is not a declared port of this workload", target))
		return
	}
	rec.service = strings.ToLower(target) // not before: a caller's invention must not become a label
	method, path := rec.method, rec.path
	if r.Method == http.MethodConnect && upgrade == "" {
		method, path = "", ""
	}
	d := port.Access.Check(rec.source, method, path)
	rec.policy = d.Policy
	if d.Audit != "" {
		would := "deny"
		if d.AuditAllow {
			would = "allow"
		}
		if d.AuditAllow != d.Allow {
			s.metrics.audit.WithLabelValues(d.Audit, would).Inc()
			s.log.Info("audit: a policy would decide otherwise", "policy", d.Audit, "would", would, "caller", rec.source, "service", target, "method", method, "path", path)
		}
	}
	if !d.Allow {
		s.refuse(w, r, rec, failWith(codeDenied, "%s may not call %s: %s", rec.source, target, d.Reason))
		return
	}
	if f := s.suffer(r.Context(), w, port.Port); f != nil {
		s.refuse(w, r, rec, f)
		return
	}
	to := s.apps[port.Port]
	if to == nil {
		s.refuse(w, r, rec, failWith(codeNoApp, "no application is configured for port %d", port.Port))
		return
	}
	switch {
	case r.Method == http.MethodConnect && upgrade == "":
		s.inboundTCP(w, r, rec, to)
	case upgrade != "":
		s.inboundUpgrade(w, r, rec, to, caller, upgrade)
	case port.Protocol == proxy.TCP:
		s.refuse(w, r, rec, failWith(codeWrongTarget, "%s is a TCP port", target))
	default:
		s.inboundHTTP(w, r, rec, to, caller, port.Protocol)
	}
}

// portOf finds the declared port that a target names: a service, or this workload's own address. Where several workloads share the
// address, it is the one that has an application here.
func (s *Sidecar) portOf(in *proxy.Inbound, target string) *proxy.InboundPort {
	if in == nil {
		return nil
	}
	var found *proxy.InboundPort
	target = onlyPort(in, strings.ToLower(target))
	address, err := netip.ParseAddrPort(target)
	for i := range in.Ports {
		p := &in.Ports[i]
		if err == nil && address.Addr() == in.Address && address.Port() == p.Port || slices.Contains(p.Services, target) {
			if s.apps[p.Port] != nil {
				return p
			}
			found = cmp.Or(found, p)
		}
	}
	return found
}

// onlyPort completes a service name without port, as other peers may send it, where the service has one port here.
func onlyPort(in *proxy.Inbound, target string) string {
	if strings.IndexByte(target, ':') >= 0 {
		return target
	}
	only := target
	for i := range in.Ports {
		for _, service := range in.Ports[i].Services {
			if strings.HasPrefix(service, target+":") && service != only {
				if only != target {
					return target // several
				}
				only = service
			}
		}
	}
	return only
}

// suffer carries out the faults in force for one request.
func (s *Sidecar) suffer(ctx context.Context, w http.ResponseWriter, port uint16) *failure {
	gone := failWith(codeCanceled, "the caller went away")
	v := s.faults.Request(port)
	for v.Hold {
		select {
		case <-v.Changed:
			v = s.faults.Request(port)
		case <-ctx.Done():
			return gone
		}
	}
	if v.Delay > 0 {
		timer := time.NewTimer(v.Delay)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-ctx.Done():
			return gone
		}
	}
	switch {
	case v.Refuse:
		w.Header().Set("Connection", "close")
		return failWith(codeDraining, "drill %s", v.Drill)
	case v.Status != 0:
		f := failWith(codeFault, "drill %s", v.Drill)
		f.status = v.Status
		return f
	}
	return nil
}

// toApp prepares a request for the application: nothing of the caller's making that speaks in a proxy's name is left.
func (s *Sidecar) toApp(r *http.Request, rec *record, caller hop.Caller) (context.Context, *http.Request) {
	out := &http.Request{Method: rec.method, Header: r.Header.Clone(), Host: r.Host, ContentLength: r.ContentLength, Trailer: r.Trailer,
		URL: &url.URL{Scheme: "http", Host: "app", Path: r.URL.Path, RawPath: r.URL.RawPath, Opaque: r.URL.Opaque, RawQuery: r.URL.RawQuery, ForceQuery: r.URL.ForceQuery}}
	stripHopByHop(out.Header)
	stripOwn(out.Header)
	delete(out.Header, "Expect")
	if host := r.Header.Get(headerHost); host != "" && r.Method == http.MethodConnect {
		out.Host = host
	}
	out.Header.Set(headerClientCert, "URI="+caller.ID.String())
	if s.cfg.ReportPeerAddress {
		out.Header.Set(headerPeerAddress, caller.Address.String())
	}
	keepUserAgent(out.Header)
	ctx := s.trace(r.Context(), rec, out.Header, trace.SpanKindServer)
	return ctx, out
}

func (s *Sidecar) inboundHTTP(w http.ResponseWriter, r *http.Request, rec *record, to *app, caller hop.Caller, protocol proxy.Protocol) {
	ctx, out := s.toApp(r, rec, caller)
	transport := to.http1
	if protocol == proxy.HTTP2 || protocol == proxy.GRPC || isGRPC(out.Header) { // gRPC is HTTP/2, whatever the port is called
		transport = to.h2c
	}
	counted := &countingBody{ReadCloser: r.Body}
	if r.ContentLength != 0 {
		out.Body = counted
	}
	defer func() { rec.in = counted.n.Load() }()
	informational, settled := passInformational(w)
	var sent atomic.Bool
	informational.WroteHeaders = func() { sent.Store(true) }
	resp, err := transport.RoundTrip(out.WithContext(httptrace.WithClientTrace(ctx, informational)))
	settled()
	if err != nil {
		s.refuse(w, r, rec, appFailure(r, err, sent.Load()))
		return
	}
	defer resp.Body.Close()
	rec.firstByte, rec.status = time.Since(rec.start), resp.StatusCode
	if resp.StatusCode == http.StatusSwitchingProtocols {
		s.refuse(w, r, rec, failWith(codeAppFailed, "the application switched protocols unasked"))
		return
	}
	stripHopByHop(resp.Header)
	stripOwn(resp.Header)
	rec.out, err = writeResponse(w, resp)
	rec.noteGRPC(resp)
	if err != nil {
		f := failWith(codeCanceled, "the caller went away")
		if r.Context().Err() == nil {
			f = failWith(codeAppFailed, "the answer broke off: %v", err)
		}
		rec.code, rec.detail = f.code, f.detail
		panic(http.ErrAbortHandler)
	}
}

// appFailure tells an application that cannot be reached from one that broke off.
func appFailure(r *http.Request, err error, sent bool) *failure {
	switch {
	case r.Context().Err() != nil:
		return failWith(codeCanceled, "the caller went away")
	case sent:
		return failWith(codeAppFailed, "%v", err)
	}
	return failWith(codeNoApp, "%v", err)
}

type countingBody struct {
	io.ReadCloser
	n atomic.Int64
}

func (b *countingBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.n.Add(int64(n))
	return n, err
}

func (s *Sidecar) inboundTCP(w http.ResponseWriter, r *http.Request, rec *record, to *app) {
	ctx, cancel := context.WithTimeout(r.Context(), s.cfg.ConnectTimeout)
	conn, err := to.dial(ctx)
	cancel()
	if err != nil {
		s.refuse(w, r, rec, failWith(codeNoApp, "%v", err))
		return
	}
	defer conn.Close()
	stream, err := hop.Accept(w, r, nil)
	if err != nil {
		rec.fail(failWith(codeCanceled, "%v", err))
		return
	}
	defer stream.Close()
	rec.status, rec.firstByte = http.StatusOK, time.Since(rec.start)
	rec.in, rec.out = relay(stream, &appConn{Conn: conn, r: conn}, s.cfg.IdleTimeout)
}

// inboundUpgrade asks the application to switch protocols and joins both connections if it does.
func (s *Sidecar) inboundUpgrade(w http.ResponseWriter, r *http.Request, rec *record, to *app, caller hop.Caller, protocol string) {
	ctx, out := s.toApp(r, rec, caller)
	out.ContentLength = 0
	out.Header.Set("Connection", "Upgrade")
	out.Header.Set("Upgrade", protocol)
	dialCtx, cancel := context.WithTimeout(ctx, s.cfg.ConnectTimeout)
	conn, err := to.dial(dialCtx)
	cancel()
	if err != nil {
		s.refuse(w, r, rec, failWith(codeNoApp, "%v", err))
		return
	}
	defer conn.Close()
	resp, rest, err := askUpgrade(ctx, conn, out)
	if err != nil {
		s.refuse(w, r, rec, appFailure(r, err, true))
		return
	}
	defer resp.Body.Close()
	rec.firstByte, rec.status = time.Since(rec.start), resp.StatusCode
	stream, err := hop.Accept(w, r, upgradeAnswer(resp))
	if err != nil {
		rec.fail(failWith(codeCanceled, "%v", err))
		return
	}
	defer stream.Close()
	if resp.StatusCode != http.StatusSwitchingProtocols {
		if rec.out, err = io.Copy(stream, resp.Body); err == nil {
			_ = stream.CloseWrite()
			return
		}
		panic(http.ErrAbortHandler)
	}
	rec.in, rec.out = relay(stream, &appConn{Conn: conn, r: rest}, s.cfg.IdleTimeout)
}

// askUpgrade sends the request on a connection of its own, which stays open after a 101; rest then reads what follows the head.
func askUpgrade(ctx context.Context, conn net.Conn, out *http.Request) (resp *http.Response, rest io.Reader, err error) {
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer func() {
		if !stop() && err == nil {
			err = ctx.Err()
		}
	}()
	_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
	if err := out.Write(conn); err != nil {
		return nil, nil, err
	}
	head := &io.LimitedReader{R: conn, N: 256 << 10}
	br := bufio.NewReader(head)
	for {
		if resp, err = http.ReadResponse(br, out); err != nil {
			return nil, nil, err
		}
		if resp.StatusCode >= 200 || resp.StatusCode == http.StatusSwitchingProtocols {
			break
		}
	}
	head.N = math.MaxInt64
	return resp, br, conn.SetDeadline(time.Time{})
}

// admit refuses hop connections that come from elsewhere than the configured addresses.
func (s *Sidecar) admit(from net.Addr) error {
	if len(s.cfg.GatewaysOnly) == 0 {
		return nil
	}
	ap, err := netip.ParseAddrPort(from.String())
	if err == nil && slices.Contains(s.cfg.GatewaysOnly, ap.Addr().Unmap()) {
		return nil
	}
	return fmt.Errorf("hop connections are accepted from %v only", s.cfg.GatewaysOnly)
}
