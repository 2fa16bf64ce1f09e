package sidecar

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/hanse-mesh/hanse/proxy"
	"github.com/hanse-mesh/hanse/proxy/http1"
	"github.com/hanse-mesh/hanse/proxy/http2"
	"github.com/hanse-mesh/hanse/proxy/message"
	"github.com/hanse-mesh/hanse/proxy/sock"
)

// maxAppConns bounds the connections of the application to one listener.
const maxAppConns = 20_000

// conns are the connections of one listener. They drain by themselves, or end.
type conns struct {
	running sync.WaitGroup

	mu     sync.Mutex
	open   map[conn]struct{} // guarded by mu
	ending bool              // guarded by mu
}

// conn is what a shutdown does to a connection.
type conn interface {
	Shutdown() // end when nothing is open
	Close()
}

// add is false where no more are taken.
func (c *conns) add(x conn) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ending || len(c.open) >= maxAppConns {
		return false
	}
	if c.open == nil {
		c.open = map[conn]struct{}{}
	}
	c.open[x] = struct{}{}
	return true
}

func (c *conns) remove(x conn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.open, x)
}

// drain returns when all connections have ended; what is left after limit is closed.
func (c *conns) drain(limit time.Duration) {
	each := func(f func(conn)) {
		c.mu.Lock()
		c.ending = true
		all := make([]conn, 0, len(c.open))
		for x := range c.open {
			all = append(all, x)
		}
		c.mu.Unlock()
		for _, x := range all {
			f(x)
		}
	}
	each(conn.Shutdown)
	late := time.AfterFunc(limit, func() { each(conn.Close) })
	defer late.Stop()
	c.running.Wait()
}

// appConn is an application's connection: HTTP/1.1, or HTTP/2 with prior knowledge.
type appConn struct {
	nc net.Conn
	h1 *http1.ServerConn

	mu   sync.Mutex
	h2   *http2.ServerConn // guarded by mu
	last bool              // guarded by mu: Shutdown was called
}

func (c *appConn) Shutdown() {
	c.mu.Lock()
	c.last = true
	h2 := c.h2
	c.mu.Unlock()
	if h2 != nil {
		h2.GoAway()
	} else {
		c.h1.Shutdown()
	}
}

func (c *appConn) Close() { c.h1.Close() } // HTTP/2 sees its connection end

// serveConn serves one connection of an application until it ends. from is who is counted where it is malformed.
func (s *Sidecar) serveConn(all *conns, nc net.Conn, from string, handle func(st message.ServerStream, h2 bool)) {
	c := &appConn{nc: nc}
	reject := func(reason string) { s.metrics.rejects.WithLabelValues(from, reason).Inc() }
	c.h1 = http1.NewServerConn(nc, &http1.ServerConfig{
		HeadTimeout: 10 * time.Second, OnReject: reject, Log: s.log,
		HTTP2: func(nc net.Conn) {
			h2 := http2.NewServerConn(nc, http2.Config{IdleTimeout: 5 * time.Minute, OnReject: reject, Log: s.log}, func(st message.ServerStream) { handle(st, true) })
			c.mu.Lock()
			c.h2 = h2
			last := c.last
			c.mu.Unlock()
			if last {
				h2.GoAway()
			}
			_ = h2.Serve()
		},
	}, func(st message.ServerStream) { handle(st, false) })
	if !all.add(c) {
		_ = nc.Close()
		return
	}
	defer all.remove(c)
	_ = c.h1.Serve()
}

// serveApp serves a listener of the application until ctx ends, then waits for open requests. fixed is the one service that it leads to,
// which may be a TCP service, or "".
func (s *Sidecar) serveApp(ctx context.Context, ln net.Listener, fixed string) error {
	return s.accept(ctx, ln, func(all *conns, nc net.Conn) {
		if fixed != "" && s.serveTCP(all, nc, fixed) {
			return
		}
		// Also where there is no such service: HTTP can say so.
		s.serveConn(all, nc, "app", func(st message.ServerStream, h2 bool) { s.outbound(st, fixed, h2) })
	})
}

// accept serves a listener until ctx ends, then waits for what is open.
func (s *Sidecar) accept(ctx context.Context, ln net.Listener, serve func(*conns, net.Conn)) error {
	stop := context.AfterFunc(ctx, func() { _ = ln.Close() })
	defer stop()
	var all conns
	var result error
	for {
		nc, err := ln.Accept()
		if err != nil {
			if ctx.Err() != nil {
				break
			}
			if errors.Is(err, net.ErrClosed) {
				result = fmt.Errorf("serve applications on %s: %w", ln.Addr(), err)
				break
			}
			s.log.Warn("accept", "listener", ln.Addr(), "error", err) // out of file descriptors, or a caller that is gone already
			select {
			case <-time.After(50 * time.Millisecond):
			case <-ctx.Done():
			}
			continue
		}
		nc = sock.Wrap(nc)
		all.running.Go(func() { serve(&all, nc) })
	}
	all.drain(s.cfg.DrainTimeout)
	return result
}

// serveTCP serves a connection to a TCP service. It is false where the service is none.
func (s *Sidecar) serveTCP(all *conns, nc net.Conn, authority string) bool {
	table, listener, f := s.resolve(authority)
	if f != nil || listener.Protocol != proxy.TCP {
		return false
	}
	s.addTCP(all, nc, func(ctx context.Context) { s.tcp(ctx, nc, table, listener, "") })
	return true
}

// addTCP runs f, whose ctx ends when the connection is to, and closes the connection.
func (s *Sidecar) addTCP(all *conns, nc net.Conn, f func(ctx context.Context)) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	c := &tcpConn{nc, cancel}
	if !all.add(c) {
		reset(nc)
		return
	}
	defer all.remove(c)
	defer nc.Close()
	f(ctx)
}

// tcpConn goes on until it ends, or time is up.
type tcpConn struct {
	net.Conn
	stop context.CancelFunc
}

// Shutdown implements conn.
func (*tcpConn) Shutdown() {}

// Close implements conn.
func (c *tcpConn) Close() {
	c.stop()
	_ = c.Conn.Close()
}
