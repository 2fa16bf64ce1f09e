package sidecar

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/hanse-mesh/hanse/proxy"
	"github.com/hanse-mesh/hanse/proxy/balance"
	"github.com/hanse-mesh/hanse/proxy/hop"
)

// opened is the way to an endpoint, and what its sidecar answered.
type opened struct {
	halfCloser
	header http.Header
}

// open opens a CONNECT stream to one endpoint of a cluster, trying others while nothing reached an application.
// The caller ends the pick.
func (s *Sidecar) open(ctx context.Context, rec *record, cluster string, header http.Header) (*opened, balance.Pick, *failure) {
	var tried []string
	for {
		pick, f := s.pick(cluster, balance.PickInfo{Exclude: tried})
		if f != nil {
			return nil, pick, f
		}
		rec.setEndpoint(pick)
		rec.tries++
		tried = append(tried, pick.Endpoint.ID)
		way, err := s.openOne(ctx, cluster, pick, header)
		if err == nil {
			pick.Connected()
			return way, pick, nil
		}
		var refused *hop.StatusError
		result, again := balance.Result{Outcome: outcomeOf(err), Reason: err.Error()}, !hop.Sent(err)
		f = failWith(codeUnreachable, "%v", err)
		switch {
		case errors.As(err, &refused):
			_ = refused.Body.Close()
			result = balance.Result{Outcome: balance.Responded, Status: refused.Status}
			f = failWith(codeUnreachable, "%s answered %d", pick.Endpoint.ID, refused.Status)
			if code := refused.Header.Get(headerError); code != "" {
				f = failWith(code, "said by the sidecar of %s", pick.Endpoint.ID)
			}
			if again = refused.Header.Get(headerUnprocessed) == "true"; again {
				result = balance.Result{Outcome: balance.Refused, Reason: f.code}
			}
		case ctx.Err() != nil:
			result, again = balance.Result{Outcome: balance.Canceled}, false
			f = failWith(codeCanceled, "the caller went away")
		}
		again = again && len(tried) < maxConnTries
		result.Retried = again
		pick.Done(result)
		if !again {
			return nil, pick, f
		}
	}
}

func (s *Sidecar) openOne(ctx context.Context, cluster string, pick balance.Pick, header http.Header) (*opened, error) {
	if pick.Endpoint.Transport == proxy.TransportPlaintext {
		return s.plaintext.open(ctx, pick.Endpoint, header)
	}
	peer, err := s.peer(cluster, pick)
	if err != nil {
		return nil, err
	}
	stream, err := s.hop.Open(ctx, peer, cluster, header)
	if err != nil {
		return nil, err
	}
	return &opened{stream, stream.Header}, nil
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

// tunnel answers the application's CONNECT.
func (s *Sidecar) tunnel(w http.ResponseWriter, r *http.Request, rec *record, table *proxy.Table, l *proxy.Listener) {
	ctx, cancel := context.WithTimeout(r.Context(), 10*time.Second)
	defer cancel()
	stream, pick, f := s.open(ctx, rec, tcpCluster(table, l), nil)
	if f != nil {
		s.refuse(w, r, rec, f)
		return
	}
	defer stream.Close()
	rec.status, rec.firstByte = http.StatusOK, time.Since(rec.start)
	defer pick.Done(balance.Result{Outcome: balance.Responded, Status: http.StatusOK, Latency: rec.firstByte})
	var app halfCloser
	if r.ProtoMajor == 2 {
		local, err := hop.Accept(w, r, nil)
		if err != nil {
			return
		}
		app = local
	} else {
		conn, err := hijack(w, "HTTP/1.1 200 Connection established\r\n\r\n")
		if err != nil {
			return
		}
		app = conn
	}
	defer app.Close()
	defer s.track(app)()
	rec.in, rec.out = relay(app, stream, s.cfg.IdleTimeout)
}

// tcp serves one connection of a local listener.
func (s *Sidecar) tcp(ctx context.Context, conn net.Conn, table *proxy.Table, l *proxy.Listener) {
	rec := s.begin(reporterSource, "tcp")
	defer s.finish(rec)
	rec.source, rec.service = s.ownID(), l.Authority
	openCtx, cancel := context.WithTimeout(ctx, 10*time.Second)
	stream, pick, f := s.open(openCtx, rec, tcpCluster(table, l), nil)
	cancel()
	if f != nil {
		rec.fail(f)
		return
	}
	defer stream.Close()
	rec.status, rec.firstByte = http.StatusOK, time.Since(rec.start)
	defer pick.Done(balance.Result{Outcome: balance.Responded, Status: http.StatusOK, Latency: rec.firstByte})
	app := &appConn{Conn: conn, r: conn}
	defer s.track(app)()
	rec.in, rec.out = relay(app, stream, s.cfg.IdleTimeout)
}

// appConn is a connection whose first bytes may have been read already.
type appConn struct {
	net.Conn
	r io.Reader
}

func (c *appConn) Read(p []byte) (int, error) { return c.r.Read(p) }

func (c *appConn) CloseWrite() error {
	if w, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return w.CloseWrite()
	}
	return errors.ErrUnsupported
}

// hijack takes the connection over and writes head as the answer.
func hijack(w http.ResponseWriter, head string) (*appConn, error) {
	conn, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return nil, fmt.Errorf("take over the connection: %w", err)
	}
	_ = conn.SetDeadline(time.Time{})
	if _, err := io.WriteString(conn, head); err != nil {
		_ = conn.Close()
		return nil, err
	}
	var r io.Reader = conn
	if n := rw.Reader.Buffered(); n > 0 {
		early, _ := rw.Reader.Peek(n)
		r = io.MultiReader(bytes.NewReader(bytes.Clone(early)), conn)
	}
	return &appConn{Conn: conn, r: r}, nil
}

// upgrade carries WebSocket and other upgraded connections as a CONNECT stream; docs/adr says why and how.
func (t *transfer) upgrade(ctx context.Context, protocol string) {
	s, rec := t.s, t.rec
	rec.protocol = "upgrade"
	if t.r.ProtoMajor != 1 || t.r.Method != http.MethodGet || t.r.ContentLength != 0 {
		s.refuse(t.w, t.r, rec, failWith(codeBadRequest, "only a GET over HTTP/1.1 without body can be upgraded"))
		return
	}
	h := t.out.Header.Clone()
	h.Set(headerUpgrade, protocol)
	h.Set(headerPath, t.out.URL.RequestURI())
	h.Set(headerHost, t.out.Host)
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	stream, pick, f := s.open(ctx, rec, t.backend.Cluster, h)
	if f != nil {
		t.route.Response.Apply(t.w.Header())
		s.refuse(t.w, t.r, rec, f)
		return
	}
	defer stream.Close()
	status, err := strconv.Atoi(stream.header.Get(headerStatus))
	if err != nil || status < 100 || status > 599 {
		pick.Done(balance.Result{Outcome: balance.Reset, Reason: "no hanse-status"})
		s.refuse(t.w, t.r, rec, failWith(codeLost, "the peer does not know upgrades"))
		return
	}
	rec.status, rec.firstByte = status, time.Since(rec.start)
	defer pick.Done(balance.Result{Outcome: balance.Responded, Status: status, Latency: rec.firstByte})
	header := stream.header.Clone()
	answered := header.Get(headerUpgrade)
	stripHopByHop(header)
	stripOwn(header)
	t.backend.Response.Apply(header)
	t.route.Response.Apply(header)
	if status != http.StatusSwitchingProtocols {
		resp := &http.Response{StatusCode: status, Header: header, Body: stream, ContentLength: -1}
		if rec.out, err = writeResponse(t.w, resp); err != nil {
			panic(http.ErrAbortHandler)
		}
		return
	}
	header.Set("Connection", "Upgrade")
	header.Set("Upgrade", cmp.Or(answered, protocol))
	var head strings.Builder
	head.WriteString("HTTP/1.1 101 Switching Protocols\r\n")
	_ = header.Write(&head) // replaces CR and LF in values
	head.WriteString("\r\n")
	app, err := hijack(t.w, head.String())
	if err != nil {
		return
	}
	defer app.Close()
	defer s.track(app)()
	rec.in, rec.out = relay(app, stream, s.cfg.IdleTimeout)
}
