package sidecar

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/hanse-mesh/hanse/proxy"
	"github.com/hanse-mesh/hanse/proxy/hop"
)

// plaintext calls endpoints without identity. There are none unless a service of the own cluster permits them
// (annotation hanse.mesh/plaintext); whatever a Table says, no byte leaves the cluster this way.
type plaintext struct {
	cluster    string
	dialer     net.Dialer
	http1, h2c *http.Transport
}

func newPlaintext(cluster string, connectTimeout time.Duration) *plaintext {
	p := &plaintext{cluster: cluster, dialer: net.Dialer{Timeout: connectTimeout}}
	p.http1, p.h2c = newTransports(p.dialer.DialContext)
	return p
}

func (p *plaintext) close() {
	p.http1.CloseIdleConnections()
	p.h2c.CloseIdleConnections()
}

func (p *plaintext) permitted(e *proxy.Endpoint) error {
	if e.Locality.Cluster != p.cluster || len(e.Gateways) > 0 {
		return &hop.Error{Address: e.Address, Stage: hop.StageConnect, Err: errors.New("plaintext to another cluster is refused")}
	}
	return nil
}

func (p *plaintext) roundTrip(e *proxy.Endpoint, c *proxy.Cluster, req *http.Request) (*http.Response, error) {
	if err := p.permitted(e); err != nil {
		return nil, err
	}
	transport := p.http1
	if c != nil && (c.Protocol == proxy.HTTP2 || c.Protocol == proxy.GRPC) || isGRPC(req.Header) {
		transport = p.h2c
	}
	u := *req.URL
	u.Scheme, u.Host = "http", e.Address.String()
	req.URL = &u
	stripOwn(req.Header)
	req.Header.Del(headerClientCert) // nobody vouches for it
	var sent atomic.Bool
	trace := &httptrace.ClientTrace{WroteHeaders: func() { sent.Store(true) }}
	resp, err := transport.RoundTrip(req.WithContext(httptrace.WithClientTrace(req.Context(), trace)))
	if err != nil {
		return nil, &hop.Error{Address: e.Address, Stage: stageOf(sent.Load()), Sent: sent.Load(), Err: err}
	}
	stripOwn(resp.Header)
	return resp, nil
}

func stageOf(sent bool) hop.Stage {
	if sent {
		return hop.StageStream
	}
	return hop.StageConnect
}

// open connects for raw bytes, or asks for the upgrade that header describes.
func (p *plaintext) open(ctx context.Context, e *proxy.Endpoint, header http.Header) (*opened, error) {
	if err := p.permitted(e); err != nil {
		return nil, err
	}
	conn, err := p.dialer.DialContext(ctx, "tcp", e.Address.String())
	if err != nil {
		return nil, &hop.Error{Address: e.Address, Stage: hop.StageConnect, Err: err}
	}
	protocol := header.Get(headerUpgrade)
	if protocol == "" {
		return &opened{&appConn{Conn: conn, r: conn}, nil}, nil
	}
	u, err := url.ParseRequestURI(header.Get(headerPath))
	if err != nil {
		_ = conn.Close()
		return nil, &hop.Error{Address: e.Address, Stage: hop.StageConnect, Err: err}
	}
	out := &http.Request{Method: http.MethodGet, URL: u, Host: header.Get(headerHost), Header: header.Clone()}
	stripOwn(out.Header)
	out.Header.Del(headerClientCert)
	out.Header.Set("Connection", "Upgrade")
	out.Header.Set("Upgrade", protocol)
	resp, rest, err := askUpgrade(ctx, conn, out)
	if err != nil {
		_ = conn.Close()
		return nil, &hop.Error{Address: e.Address, Stage: hop.StageStream, Sent: true, Err: err}
	}
	answered := upgradeAnswer(resp)
	var r io.Reader = resp.Body
	if resp.StatusCode == http.StatusSwitchingProtocols {
		r = rest
	}
	return &opened{&appConn{Conn: conn, r: r}, answered}, nil
}

// upgradeAnswer is an application's answer to an upgrade as it travels between sidecars.
func upgradeAnswer(resp *http.Response) http.Header {
	h := resp.Header.Clone()
	protocol := h.Get("Upgrade")
	stripHopByHop(h)
	stripOwn(h)
	delete(h, "Content-Length") // of the answer, not of the stream
	h.Set(headerStatus, strconv.Itoa(resp.StatusCode))
	if protocol != "" {
		h.Set(headerUpgrade, protocol)
	}
	return h
}
