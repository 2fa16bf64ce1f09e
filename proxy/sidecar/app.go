package sidecar

import (
	"context"
	"errors"
	"maps"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hanse-mesh/hanse/proxy/http1"
	"github.com/hanse-mesh/hanse/proxy/http2"
	"github.com/hanse-mesh/hanse/proxy/message"
	"github.com/hanse-mesh/hanse/proxy/sock"
)

// app is an application behind one address, in the clear.
type app struct {
	network, address string
	connect          Dial
	connectTimeout   time.Duration
	http1            *http1.Client
	h2c              h2cPool
}

func (s *Sidecar) newApp(address string) *app {
	a := &app{network: "tcp", address: address, connect: s.cfg.Dial, connectTimeout: s.cfg.ConnectTimeout}
	if path, ok := strings.CutPrefix(address, "unix:"); ok {
		a.network, a.address = "unix", path
	}
	a.http1 = http1.NewClient(http1.ClientConfig{Dial: a.dial, ConnectTimeout: a.connectTimeout})
	a.h2c.dial, a.h2c.idle = a.dial, h2cIdle
	return a
}

func (a *app) dial(ctx context.Context) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, a.connectTimeout)
	defer cancel()
	nc, err := a.connect(ctx, a.network, a.address)
	if err != nil {
		return nil, err
	}
	return sock.Wrap(nc), nil
}

// open begins an exchange; h2 says in which protocol.
func (a *app) open(ctx context.Context, r *message.Request, o message.Options, h2 bool) (message.ClientStream, error) {
	if h2 {
		return a.h2c.open(ctx, r, o)
	}
	return a.http1.Open(ctx, r, o)
}

func (a *app) close() {
	a.http1.Close()
	a.h2c.close()
}

// apps are the workload's applications by port.
type apps struct {
	mu    sync.Mutex // held to add
	ports atomic.Pointer[map[uint16]*app]
}

func (as *apps) open(s *Sidecar) {
	m := make(map[uint16]*app, len(s.cfg.Apps))
	for port, address := range s.cfg.Apps {
		m[port] = s.newApp(address)
	}
	as.ports.Store(&m)
}

// of is the application of a port, if it is known by now.
func (as *apps) of(port uint16) *app { return (*as.ports.Load())[port] }

// declared is the application of a port that the control plane knows: their number is bounded by it.
func (as *apps) declared(s *Sidecar, port uint16) *app {
	if a := as.of(port); a != nil || !s.cfg.AnyPort {
		return a
	}
	as.mu.Lock()
	defer as.mu.Unlock()
	old := *as.ports.Load()
	if a := old[port]; a != nil {
		return a
	}
	next := maps.Clone(old)
	next[port] = s.newApp(netip.AddrPortFrom(s.cfg.Workload, port).String())
	as.ports.Store(&next)
	return next[port]
}

func (as *apps) close() {
	for _, a := range *as.ports.Load() {
		a.close()
	}
}

// h2cPool keeps HTTP/2 connections to one address.
type h2cPool struct {
	dial func(ctx context.Context) (net.Conn, error)
	idle time.Duration // without streams for so long, connections are closed

	mu      sync.Mutex
	conns   []*h2cConn    // guarded by mu
	sweep   *time.Timer   // guarded by mu; nil: there are no connections
	dialing chan struct{} // guarded by mu; closed when the dial under way has ended
	err     error         // guarded by mu: of the last dial
	closed  bool          // guarded by mu
}

// h2cConn is one connection.
type h2cConn struct {
	*http2.ClientConn
	used bool // guarded by h2cPool.mu: since the last sweep
}

const (
	h2cConns   = 16
	h2cStreams = 100 // of a connection before another is opened
	h2cIdle    = 30 * time.Second
)

// open uses the connection with the fewest streams.
func (p *h2cPool) open(ctx context.Context, r *message.Request, o message.Options) (message.ClientStream, error) {
	for {
		p.mu.Lock()
		var best *h2cConn
		least, usable := 0, p.conns[:0]
		for _, c := range p.conns {
			if !c.Usable() {
				continue
			}
			usable = append(usable, c)
			if open, limit := c.Streams(); open < limit && (best == nil || open < least) {
				best, least = c, open
			}
		}
		clear(p.conns[len(usable):])
		p.conns = usable
		wait := p.dialing
		if best == nil || least >= h2cStreams && len(p.conns) < h2cConns && wait == nil {
			if wait == nil {
				if p.closed || len(p.conns) >= h2cConns {
					p.mu.Unlock()
					return nil, &message.Error{Err: errors.New("the application takes no more streams")}
				}
				wait = make(chan struct{})
				p.dialing = wait
				go p.add(wait)
			}
		}
		if best != nil {
			best.used = true
		}
		p.mu.Unlock()
		if best != nil {
			s, err := best.Open(r, o)
			if err == nil || errors.Is(err, message.ErrUnsupported) {
				return s, err
			}
			continue
		}
		select {
		case <-wait:
		case <-ctx.Done():
			return nil, &message.Error{Err: context.Cause(ctx)}
		}
		p.mu.Lock()
		err := p.err
		p.mu.Unlock()
		if err != nil {
			return nil, &message.Error{Err: err}
		}
	}
}

// add dials for all who wait.
func (p *h2cPool) add(done chan struct{}) {
	nc, err := p.dial(context.Background())
	p.mu.Lock()
	defer p.mu.Unlock()
	defer close(done)
	p.dialing, p.err = nil, err
	switch {
	case err != nil:
	case p.closed:
		_ = nc.Close()
		p.err = http2.ErrClosed
	default:
		p.conns = append(p.conns, &h2cConn{ClientConn: http2.NewClientConn(nc, http2.Config{MaxHeadBytes: 256 << 10}), used: true})
		if p.sweep == nil {
			p.sweep = time.AfterFunc(p.idle, p.closeIdle)
		}
	}
}

// closeIdle closes what nobody has used since it was last called.
func (p *h2cPool) closeIdle() {
	p.mu.Lock()
	var rest, idle []*h2cConn
	for _, c := range p.conns {
		if open, _ := c.Streams(); open > 0 || c.used {
			rest = append(rest, c)
		} else {
			idle = append(idle, c)
		}
		c.used = false
	}
	p.conns = rest
	if len(rest) > 0 {
		p.sweep.Reset(p.idle)
	} else {
		p.sweep = nil
	}
	p.mu.Unlock()
	for _, c := range idle {
		c.Shutdown() // who has chosen it meanwhile chooses again
	}
}

func (p *h2cPool) close() {
	p.mu.Lock()
	conns := p.conns
	p.conns, p.closed = nil, true
	if p.sweep != nil {
		p.sweep.Stop()
	}
	p.mu.Unlock()
	for _, c := range conns {
		c.Close(nil)
	}
}
