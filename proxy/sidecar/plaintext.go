package sidecar

import (
	"context"
	"errors"
	"net/netip"
	"sync"

	"github.com/hanse-mesh/hanse/proxy"
	"github.com/hanse-mesh/hanse/proxy/hop"
	"github.com/hanse-mesh/hanse/proxy/message"
)

// plaintext calls endpoints without identity. There are none unless a service of the own cluster permits them
// (annotation hanse.mesh/plaintext); whatever a Table says, no byte leaves the cluster this way.
type plaintext struct {
	cluster string
	newApp  func(address string) *app

	mu   sync.Mutex
	apps map[netip.AddrPort]*app // guarded by mu
}

// maxPlaintext bounds the addresses whose connections are kept.
const maxPlaintext = 256

func newPlaintext(cluster string, newApp func(address string) *app) *plaintext {
	return &plaintext{cluster: cluster, newApp: newApp, apps: map[netip.AddrPort]*app{}}
}

func (p *plaintext) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, a := range p.apps {
		a.close()
	}
}

func (p *plaintext) permitted(e *proxy.Endpoint) error {
	if e.Locality.Cluster != p.cluster || len(e.Gateways) > 0 {
		return &hop.Error{Address: e.Address, Stage: hop.StageConnect, Err: errors.New("plaintext to another cluster is refused")}
	}
	return nil
}

func (p *plaintext) app(address netip.AddrPort) *app {
	p.mu.Lock()
	defer p.mu.Unlock()
	a := p.apps[address]
	if a == nil {
		if len(p.apps) >= maxPlaintext {
			for k, old := range p.apps { // any
				old.http1.CloseIdle()
				delete(p.apps, k)
				break
			}
		}
		a = p.newApp(address.String())
		p.apps[address] = a
	}
	return a
}

// open begins an exchange, or connects for raw bytes where r is a CONNECT.
func (p *plaintext) open(ctx context.Context, e *proxy.Endpoint, c *proxy.Cluster, r *message.Request, o message.Options) (message.ClientStream, error) {
	if err := p.permitted(e); err != nil {
		return nil, err
	}
	a := p.app(e.Address)
	if r.Method == "CONNECT" {
		conn, err := a.dial(ctx)
		if err != nil {
			return nil, &hop.Error{Address: e.Address, Stage: hop.StageConnect, Err: err}
		}
		return &connStream{connEnd: connEnd{conn}}, nil
	}
	out := *r
	out.Scheme, out.Fields = "http", append(message.Fields(nil), r.Fields...)
	stripOwn(&out.Fields)
	out.Fields.Del(headerClientCert) // nobody vouches for it
	h2 := r.Protocol == "" && (c != nil && (c.Protocol == proxy.HTTP2 || c.Protocol == proxy.GRPC) || isGRPC(r.Fields))
	s, err := a.open(ctx, &out, o, h2)
	if err != nil {
		return nil, plainError(e.Address, err)
	}
	return &plainStream{s, e.Address}, nil
}

// plainStream names the address in its errors, as the hop does.
type plainStream struct {
	message.ClientStream
	address netip.AddrPort
}

func (s *plainStream) Response() (*message.Response, error) {
	r, err := s.ClientStream.Response()
	if err != nil {
		return nil, plainError(s.address, err)
	}
	stripOwn(&r.Fields)
	return r, nil
}

func plainError(address netip.AddrPort, err error) error {
	stage := hop.StageConnect
	if message.Sent(err) {
		stage = hop.StageStream
	}
	return &hop.Error{Address: address, Stage: stage, Sent: message.Sent(err), Err: err}
}

// connStream is a connection as the exchange that a CONNECT would have given.
type connStream struct{ connEnd }

// Response implements message.ClientStream, as do the others.
func (s *connStream) Response() (*message.Response, error) {
	return &message.Response{Status: 200, Length: message.Unknown}, nil
}
func (s *connStream) End(message.Fields) error { return s.CloseWrite() }
func (s *connStream) Ready() bool              { return false }
func (s *connStream) Trailers() message.Fields { return nil }
func (s *connStream) Cancel(error)             { s.Break() }
func (s *connStream) Close()                   { s.Break() }
