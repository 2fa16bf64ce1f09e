package main

import (
	"context"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

var errCut = errors.New("federation link cut by a drill")

// switchboard stands between the control plane and its sockets, so that a drill can silence it or cut its federation links.
// It implements drill.ControlPlane. A silenced connection stays open and says nothing; a cut one is closed, and no new one is made.
type switchboard struct {
	gate atomic.Pointer[gate] // nil: open
	cut  atomic.Bool

	mu    sync.Mutex
	timer *time.Timer            // guarded by mu; heals by itself
	links map[*switched]struct{} // guarded by mu; open federation connections
}

// gate is closed while the control plane is silent.
type gate struct{ opened chan struct{} }

func newSwitchboard() *switchboard { return &switchboard{links: map[*switched]struct{}{}} }

// Silence stops every answer for d, or until Heal.
func (s *switchboard) Silence(d time.Duration) {
	s.gate.CompareAndSwap(nil, &gate{opened: make(chan struct{})})
	s.healAfter(d)
}

// CutFederation closes the links to all peers and makes none for d, or until Heal.
func (s *switchboard) CutFederation(d time.Duration) {
	s.cut.Store(true)
	s.mu.Lock()
	links := make([]*switched, 0, len(s.links))
	for c := range s.links {
		links = append(links, c)
	}
	s.mu.Unlock()
	for _, c := range links {
		c.Close()
	}
	s.healAfter(d)
}

func (s *switchboard) healAfter(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.timer != nil {
		s.timer.Stop()
	}
	s.timer = time.AfterFunc(d, s.Heal)
}

// Heal ends both. It may be called at any time.
func (s *switchboard) Heal() {
	s.cut.Store(false)
	if g := s.gate.Swap(nil); g != nil {
		close(g.opened)
	}
}

// listen wraps a listener. federation says that its connections are links to peers.
func (s *switchboard) listen(l net.Listener, federation bool) net.Listener {
	return &switchedListener{Listener: l, board: s, federation: federation}
}

// dial opens a link to a peer.
func (s *switchboard) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	if s.cut.Load() {
		return nil, errCut
	}
	d := net.Dialer{Timeout: 5 * time.Second}
	c, err := d.DialContext(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	return s.wrap(c, true), nil
}

func (s *switchboard) wrap(c net.Conn, federation bool) *switched {
	w := &switched{Conn: c, board: s, closed: make(chan struct{})}
	if federation {
		s.mu.Lock()
		s.links[w] = struct{}{}
		s.mu.Unlock()
	}
	return w
}

type switchedListener struct {
	net.Listener
	board      *switchboard
	federation bool
}

func (l *switchedListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if l.federation && l.board.cut.Load() {
			c.Close()
			continue
		}
		return l.board.wrap(c, l.federation), nil
	}
}

type switched struct {
	net.Conn
	board  *switchboard
	once   sync.Once
	closed chan struct{}
	exempt atomic.Bool
}

// Exempt takes a connection out of every drill: it is between replicas of this control plane, which go on together while all others hear
// nothing of them.
func (c *switched) Exempt() {
	c.exempt.Store(true)
	c.board.mu.Lock()
	delete(c.board.links, c)
	c.board.mu.Unlock()
}

// pass waits while the control plane is silent.
func (c *switched) pass() error {
	for {
		g := c.board.gate.Load()
		if g == nil || c.exempt.Load() {
			return nil
		}
		select {
		case <-g.opened:
		case <-c.closed:
			return net.ErrClosed
		}
	}
}

func (c *switched) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if perr := c.pass(); perr != nil {
		return 0, perr
	}
	return n, err
}

func (c *switched) Write(b []byte) (int, error) {
	if err := c.pass(); err != nil {
		return 0, err
	}
	return c.Conn.Write(b)
}

func (c *switched) Close() error {
	c.once.Do(func() {
		close(c.closed)
		c.board.mu.Lock()
		delete(c.board.links, c)
		c.board.mu.Unlock()
	})
	return c.Conn.Close()
}
