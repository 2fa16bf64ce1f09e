package sidecar

import (
	"context"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"time"

	"github.com/hanse-mesh/hanse/proxy"
	"github.com/hanse-mesh/hanse/proxy/balance"
	"github.com/hanse-mesh/hanse/proxy/hop"
	"github.com/hanse-mesh/hanse/proxy/message"
)

// openTimeout bounds how long somebody may take to answer a CONNECT or an upgrade.
const openTimeout = 15 * time.Second

// opened is a tunnel to one endpoint, and how it was answered.
type opened struct {
	up   message.ClientStream
	resp *message.Response
	pick balance.Pick
}

// open opens a tunnel, a CONNECT or an upgrade, to one endpoint of a cluster, trying others while nothing reached an application.
// The caller closes it and ends the pick.
func (s *Sidecar) open(rec *record, cluster string, r *message.Request, abort func(func(error))) (*opened, *failure) {
	t := &transfer{s: s, rec: rec}
	abort(func(error) { t.cancel(errCallerGone) })
	defer abort(nil)
	timer := time.AfterFunc(openTimeout, func() { t.cancel(errRequestTimeout) })
	defer timer.Stop()
	var tried []string
	silent := false // a try met silence
	for {
		pick, f := s.pick(cluster, balance.PickInfo{Exclude: tried, Only: rec.only, Silent: silent})
		if f != nil {
			return nil, f
		}
		rec.setEndpoint(pick)
		rec.tries++
		tried = append(tried, pick.Endpoint.ID)
		up, err := s.openTo(t, cluster, pick, r, message.Options{})
		var resp *message.Response
		if err == nil {
			t.watch(up)
			resp, err = up.Response()
		}
		if err == nil && (resp.Status/100 == 2 || resp.Status == http.StatusSwitchingProtocols || r.Protocol != "" && resp.Fields.Value(headerError) == "") {
			t.watch(nil)
			pick.Connected()
			return &opened{up, resp, pick}, nil
		}
		result, again := balance.Result{}, false
		switch ended := t.why(); {
		case ended == errCallerGone:
			result.Outcome = balance.Canceled
			f = failWith(codeCanceled, "the caller went away")
		case ended != nil:
			result = balance.Result{Outcome: balance.TimedOut, Reason: ended.Error()}
			f = failWith(codeTimeout, "no answer within %s", openTimeout)
		case err != nil:
			result = balance.Result{Outcome: outcomeOf(err), Reason: err.Error()}
			// Of raw bytes none has left before the answer: an application that lost its sidecar has seen a connection come and go.
			again = !hop.Sent(err) || r.Protocol == "" && result.Outcome == balance.Dead
			if hop.Silent(err) {
				silent = true
				pick.Doubt(result.Outcome)
			}
			f = failWith(codeUnreachable, "%v", err)
		default:
			result = balance.Result{Outcome: balance.Responded, Status: resp.Status}
			f = failWith(codeUnreachable, "%s answered %d", pick.Endpoint.ID, resp.Status)
			if code := resp.Fields.Value(headerError); code != "" {
				f = failWith(code, "said by the sidecar of %s", pick.Endpoint.ID)
			}
			if again = resp.Fields.Value(headerUnprocessed) == "true"; again {
				result = balance.Result{Outcome: balance.Refused, Reason: f.code}
			}
		}
		if up != nil {
			t.watch(nil)
			up.Close()
		}
		again = again && len(tried) < maxConnTries
		result.Retried = again
		pick.Done(result)
		if !again {
			return nil, f
		}
	}
}

// tcpCluster returns the xDS cluster of a tunnel: by weight for TCP services; for others the tunnel carries raw bytes to the
// service itself, or to the first backend where the service has none.
func tcpCluster(table *proxy.Table, l *proxy.Listener) string {
	if l.Protocol == proxy.TCP {
		if b := l.PickTCP(rand.Uint64()); b != nil {
			return b.Cluster
		}
		return ""
	}
	if _, ok := table.Clusters[l.Authority]; ok {
		return l.Authority
	}
	for _, route := range l.Routes {
		if b := route.Pick(rand.Uint64()); b != nil && b.DirectStatus == 0 {
			return b.Cluster
		}
	}
	return ""
}

// connect opens a tunnel of raw bytes.
func (s *Sidecar) connect(rec *record, cluster string, abort func(func(error))) (*opened, *failure) {
	return s.open(rec, cluster, &message.Request{Method: http.MethodConnect, Authority: cluster, Length: message.Unknown}, abort)
}

// tunnel answers the application's CONNECT.
func (s *Sidecar) tunnel(st message.ServerStream, rec *record, table *proxy.Table, l *proxy.Listener) {
	cluster := tcpCluster(table, l)
	if cluster == "" && len(l.SNI) > 0 {
		s.refuse(st, rec, failWith(codeNoRoute, "%s has TLSRoutes only, which are for captured connections and local listeners, not for CONNECT", l.Authority))
		return
	}
	way, f := s.connect(rec, cluster, st.OnAbort)
	if f != nil {
		s.refuse(st, rec, f)
		return
	}
	defer way.up.Close()
	rec.status, rec.firstByte = http.StatusOK, time.Since(rec.start)
	defer way.pick.Done(balance.Result{Outcome: balance.Responded, Status: http.StatusOK, Latency: rec.firstByte})
	if st.Respond(&message.Response{Status: http.StatusOK, Length: message.Unknown}, false) != nil || st.Flush() != nil {
		return
	}
	rec.in, rec.out = relay(context.Background(), serverEnd{st}, clientEnd{way.up}, s.cfg.IdleTimeout)
}

// tcp serves one connection of a local listener, or a captured one. only, if not empty, is the one endpoint that is meant.
func (s *Sidecar) tcp(ctx context.Context, conn net.Conn, table *proxy.Table, l *proxy.Listener, only string) {
	rec := s.begin(reporterSource, "tcp")
	defer s.finish(rec)
	rec.source, rec.service, rec.only = s.ownID(), l.Authority, only
	if len(l.SNI) > 0 && only == "" {
		limit := helloTimeout
		if l.Cluster != "" || len(l.Split) > 0 { // the caller may wait for the server to speak first
			limit = s.captured.Sniff
		}
		var name string
		conn, name = serverName(conn, limit)
		if l = l.ForSNI(name); l.Cluster == "" && len(l.Split) == 0 {
			rec.fail(failWith(codeNoRoute, "no TLSRoute of %s is for the server name %q", l.Authority, name))
			reset(conn)
			return
		}
	}
	cluster := ""
	if only != "" && table.Clusters[l.Authority] != nil {
		cluster = l.Authority
	} else {
		cluster = tcpCluster(table, l)
	}
	way, f := s.connect(rec, cluster, func(func(error)) {})
	if f != nil {
		rec.fail(f)
		reset(conn)
		return
	}
	defer way.up.Close()
	rec.status, rec.firstByte = http.StatusOK, time.Since(rec.start)
	defer way.pick.Done(balance.Result{Outcome: balance.Responded, Status: http.StatusOK, Latency: rec.firstByte})
	rec.in, rec.out = relay(ctx, connEnd{conn}, clientEnd{way.up}, s.cfg.IdleTimeout)
}

// upgrade carries WebSocket and other upgraded connections as an extended CONNECT (RFC 8441). An application that answers with success
// but does not switch cannot be told by that: its sidecar says 101, and the true status in hanse-status; docs/adr.
func (t *transfer) upgrade() {
	s, rec, st := t.s, t.rec, t.st
	way, f := s.open(rec, t.backend.Cluster, &t.out, st.OnAbort)
	if f != nil {
		t.refuse(f)
		return
	}
	defer way.up.Close()
	resp := way.resp
	if v, ok := resp.Fields.Get(headerStatus); ok && resp.Status == http.StatusSwitchingProtocols {
		status, err := strconv.Atoi(v)
		if err != nil || status < 200 || status > 599 {
			way.pick.Done(balance.Result{Outcome: balance.Reset, Reason: "bad hanse-status"})
			t.refuse(failWith(codeLost, "the peer's answer to the upgrade makes no sense"))
			return
		}
		resp.Status, resp.Length = status, message.Unknown
	}
	rec.status, rec.firstByte = resp.Status, time.Since(rec.start)
	result := balance.Result{Outcome: balance.Responded, Status: resp.Status, Latency: rec.firstByte}
	defer func() { way.pick.Done(result) }()
	stripOwn(&resp.Fields)
	t.editResponse(&resp.Fields)
	if st.Respond(resp, false) != nil {
		return
	}
	if resp.Status != http.StatusSwitchingProtocols {
		var err error
		if rec.out, err = copyBody(st, way.up); err != nil {
			st.Abort(err)
		}
		return
	}
	_ = st.Flush()
	rec.in, rec.out = relay(context.Background(), serverEnd{st}, clientEnd{way.up}, s.cfg.IdleTimeout)
}
