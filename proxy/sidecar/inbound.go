package sidecar

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"go.opentelemetry.io/otel/trace"
	"golang.org/x/net/http2"
	"google.golang.org/grpc/codes"

	"github.com/hanse-mesh/hanse/proxy"
	"github.com/hanse-mesh/hanse/proxy/hop"
	"github.com/hanse-mesh/hanse/proxy/message"
)

// inbound serves one exchange that comes over the hop.
func (s *Sidecar) inbound(caller hop.Caller, st message.ServerStream) {
	r := st.Request()
	rec := s.begin(reporterDestination, requestProtocol(r, true))
	defer s.finish(rec)
	rec.source, rec.dest, rec.endpoint = caller.ID.String(), s.ownID(), s.workload
	rec.cluster, rec.region, rec.zone = s.cfg.Locality.Cluster, s.cfg.Locality.Region, s.cfg.Locality.Zone
	rec.method = r.Method
	rec.path, _, _ = strings.Cut(r.Path, "?")
	target := r.Authority
	if t := r.Fields.Value(headerTarget); t != "" && r.Method != http.MethodConnect {
		target = t
	}
	if s.draining.Load() {
		s.refuse(st, rec, failWith(codeDraining, "this workload is shutting down"))
		return
	}
	port := s.portOf(s.cfg.Control.Table().Inbound, target)
	if port == nil {
		s.refuse(st, rec, failWith(codeWrongTarget, "%s is not a declared port of this workload", target))
		return
	}
	rec.service = strings.ToLower(target) // not before: a caller's invention must not become a label
	method, path := rec.method, rec.path
	if r.Method == http.MethodConnect {
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
		s.refuse(st, rec, failWith(codeDenied, "%s may not call %s: %s", rec.source, target, d.Reason))
		return
	}
	if f := s.suffer(st, port.Port); f != nil {
		s.refuse(st, rec, f)
		return
	}
	to := s.apps.declared(s, port.Port)
	if to == nil {
		s.refuse(st, rec, failWith(codeNoApp, "no application is configured for port %d", port.Port))
		return
	}
	switch {
	case r.Method == http.MethodConnect:
		s.inboundTCP(st, rec, to)
	case port.Protocol == proxy.TCP:
		s.refuse(st, rec, failWith(codeWrongTarget, "%s is a TCP port", target))
	default:
		s.inboundHTTP(st, rec, to, caller, port.Protocol)
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
	var address netip.AddrPort
	var err error
	if target == "" || target[0] != '[' && (target[0] < '0' || target[0] > '9') {
		err = errNoAddress // the common case, without parsing
	} else {
		address, err = netip.ParseAddrPort(target)
	}
	for i := range in.Ports {
		p := &in.Ports[i]
		if err == nil && address.Addr() == in.Address && address.Port() == p.Port || slices.Contains(p.Services, target) {
			if s.cfg.AnyPort || s.apps.of(p.Port) != nil {
				return p
			}
			found = cmp.Or(found, p)
		}
	}
	return found
}

var errNoAddress = fmt.Errorf("not an address")

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
func (s *Sidecar) suffer(st message.ServerStream, port uint16) *failure {
	v := s.faults.Request(port)
	if v.Hold || v.Delay > 0 {
		gone := make(chan struct{})
		st.OnAbort(func(error) { close(gone) })
		defer st.OnAbort(nil)
		for v.Hold {
			select {
			case <-v.Changed:
				v = s.faults.Request(port)
			case <-gone:
				return failWith(codeCanceled, "the caller went away")
			}
		}
		if v.Delay > 0 {
			timer := time.NewTimer(v.Delay)
			defer timer.Stop()
			select {
			case <-timer.C:
			case <-gone:
				return failWith(codeCanceled, "the caller went away")
			}
		}
	}
	switch {
	case v.Refuse:
		return failWith(codeDraining, "drill %s", v.Drill)
	case v.Status != 0:
		f := failWith(codeFault, "drill %s", v.Drill)
		f.status = v.Status
		return f
	}
	return nil
}

// serving is an exchange between a caller and the application.
type serving struct {
	st  message.ServerStream
	out message.Request // as the application is asked

	abort    func(error) // these two are made once
	informed func(status int, fields message.Fields)

	mu   sync.Mutex
	gone bool                 // guarded by mu: the caller
	up   message.ClientStream // guarded by mu
}

// servings are reused: abort is not called any more when inboundHTTP has ended it.
var servings = sync.Pool{New: func() any {
	v := &serving{}
	v.abort, v.informed = v.leave, func(status int, fields message.Fields) { _ = v.st.Inform(status, fields) }
	return v
}}

// leave is called when the caller has gone away.
func (v *serving) leave(error) {
	v.mu.Lock()
	v.gone = true
	up := v.up
	v.mu.Unlock()
	if up != nil {
		up.Cancel(errCallerGone)
	}
}

func (v *serving) left() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.gone
}

// watch sets what ends when the caller goes away.
func (v *serving) watch(up message.ClientStream) {
	v.mu.Lock()
	v.up = up
	gone := v.gone
	v.mu.Unlock()
	if gone {
		up.Cancel(errCallerGone)
	}
}

// inboundHTTP asks the application. Nothing of the caller's making that speaks in a proxy's name is left in the request.
func (s *Sidecar) inboundHTTP(st message.ServerStream, rec *record, to *app, caller hop.Caller, protocol proxy.Protocol) {
	v := servings.Get().(*serving)
	v.st, v.out = st, *st.Request()
	s.serveInbound(v, rec, to, caller, protocol)
	*v = serving{abort: v.abort, informed: v.informed}
	servings.Put(v)
}

func (s *Sidecar) serveInbound(v *serving, rec *record, to *app, caller hop.Caller, protocol proxy.Protocol) {
	st, out := v.st, &v.out
	out.Scheme = "http"
	stripOwn(&out.Fields)
	if rec.source != "" {
		out.Fields.Set(headerClientCert, s.certs.of(rec.source))
	} else {
		out.Fields.Del(headerClientCert) // nobody vouches for a caller in plaintext
	}
	if s.cfg.ReportPeerAddress {
		out.Fields.Set(headerPeerAddress, caller.Address.String())
	}
	s.trace(rec, &out.Fields, trace.SpanKindServer)
	// gRPC is HTTP/2, whatever the port is called; upgrades are HTTP/1.1's.
	h2 := out.Protocol == "" && (protocol == proxy.HTTP2 || protocol == proxy.GRPC || isGRPC(out.Fields))
	st.OnAbort(v.abort)
	defer st.OnAbort(nil)
	upgrade := out.Protocol != ""
	end := !upgrade && out.Length == 0
	up, err := to.open(s.coreCtx, out, message.Options{End: end, Inform: v.informed}, h2)
	if err != nil {
		s.refuse(st, rec, appFailure(v, rec.start, err))
		return
	}
	defer up.Close()
	v.watch(up)
	if !end && !upgrade {
		body := newReplay(st)
		sent, _ := body.send(up)
		defer func() {
			rec.in = body.finish()
			sent.stop(up)
		}()
	}
	resp, err := up.Response()
	if err != nil {
		s.refuse(st, rec, appFailure(v, rec.start, err))
		return
	}
	rec.firstByte, rec.status = time.Since(rec.start), resp.Status
	stripOwn(&resp.Fields)
	if upgrade && s.upgraded(st, rec, up, resp) {
		return
	}
	if err = st.Respond(resp, false); err != nil {
		err = &callerError{err}
	} else {
		rec.out, err = copyBody(st, up)
	}
	rec.noteGRPC(resp.Fields, up.Trailers())
	if err == nil {
		return
	}
	f := failWith(codeAppFailed, "the answer broke off: %v", err)
	if _, caller := err.(*callerError); caller || v.left() {
		f = failWith(codeCanceled, "the caller went away")
	}
	rec.code, rec.detail = f.code, f.detail
	st.Abort(err)
}

// upgraded joins both connections if the application switched. It is false for an answer that can be passed on as it is.
func (s *Sidecar) upgraded(st message.ServerStream, rec *record, up message.ClientStream, resp *message.Response) bool {
	switch {
	case resp.Status == http.StatusSwitchingProtocols:
		if st.Respond(resp, false) == nil && st.Flush() == nil {
			rec.in, rec.out = relay(context.Background(), serverEnd{st}, clientEnd{up}, s.cfg.IdleTimeout)
		}
		return true
	case resp.Status/100 != 2 || rec.source == "": // or the caller is no sidecar
		return false
	}
	// Success without switching: on the hop a 2xx would say that it has.
	resp.Fields.Set(headerStatus, strconv.Itoa(resp.Status))
	if st.Respond(&message.Response{Status: http.StatusSwitchingProtocols, Fields: resp.Fields, Length: message.Unknown}, false) == nil {
		var err error
		if rec.out, err = copyBody(st, up); err != nil {
			st.Abort(err)
		}
	}
	return true
}

// appFailure tells an application that cannot be reached from one that broke off. What a gRPC server says by a reset is its caller's to hear in
// gRPC's words (gRPC over HTTP/2, Errors); a server whose timer ends with the caller's deadline is often the first to give up.
func appFailure(v *serving, start time.Time, err error) *failure {
	switch {
	case v.left():
		return failWith(codeCanceled, "the caller went away")
	case !message.Sent(err):
		return failWith(codeNoApp, "%v", err)
	}
	f := failWith(codeAppFailed, "%v", err)
	if e := (*message.Error)(nil); errors.As(err, &e) && isGRPC(v.out.Fields) {
		switch http2.ErrCode(e.Code) {
		case http2.ErrCodeCancel:
			f.grpc = codes.Canceled
			if timeout, ok := grpcTimeout(v.out.Fields); ok && time.Since(start) >= timeout {
				return failWith(codeTimeout, "the caller's deadline has passed: %v", err)
			}
		case http2.ErrCodeEnhanceYourCalm:
			f.grpc = codes.ResourceExhausted
		}
	}
	return f
}

// grpcTimeout is how long the caller waits (gRPC over HTTP/2, Requests: at most 8 digits and a unit).
func grpcTimeout(fields message.Fields) (time.Duration, bool) {
	v, _ := fields.Get("grpc-timeout")
	if len(v) < 2 || len(v) > 9 {
		return 0, false
	}
	unit, ok := map[byte]time.Duration{'H': time.Hour, 'M': time.Minute, 'S': time.Second, 'm': time.Millisecond, 'u': time.Microsecond, 'n': 1}[v[len(v)-1]]
	n, err := strconv.ParseUint(v[:len(v)-1], 10, 32)
	if !ok || err != nil || n > uint64(math.MaxInt64/unit) {
		return 0, false
	}
	return time.Duration(n) * unit, true
}

func (s *Sidecar) inboundTCP(st message.ServerStream, rec *record, to *app) {
	ctx, cancel := context.WithTimeout(s.coreCtx, s.cfg.ConnectTimeout)
	conn, err := to.dial(ctx)
	cancel()
	if err != nil {
		s.refuse(st, rec, failWith(codeNoApp, "%v", err))
		return
	}
	defer conn.Close()
	if err = st.Respond(&message.Response{Status: http.StatusOK, Length: message.Unknown}, false); err == nil {
		err = st.Flush()
	}
	if err != nil {
		rec.fail(failWith(codeCanceled, "%v", err))
		return
	}
	rec.status, rec.firstByte = http.StatusOK, time.Since(rec.start)
	rec.in, rec.out = relay(context.Background(), serverEnd{st}, connEnd{conn}, s.cfg.IdleTimeout)
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

// certs remembers the values of x-forwarded-client-cert.
type certs struct {
	mu   sync.Mutex
	last [2]string // guarded by mu: a caller, and its value
}

func (c *certs) of(id string) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.last[0] != id {
		c.last = [2]string{id, "URI=" + id}
	}
	return c.last[1]
}
