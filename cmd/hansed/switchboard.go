package main

import (
	"context"
	"crypto/x509"
	"errors"
	"log/slog"
	"maps"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hanse-mesh/hanse/identity"
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
	rests map[*switched]resting  // guarded by mu; connections whose peer was verified
	ended []time.Time            // guarded by mu; when connections were closed for their peers, the newest last
	src   *identity.Source       // that verified them; read-only
}

// resting is what an open connection rests on.
type resting struct{ chain []*x509.Certificate }

// gate is closed while the control plane is silent.
type gate struct{ opened chan struct{} }

func newSwitchboard(src *identity.Source) *switchboard {
	return &switchboard{links: map[*switched]struct{}{}, rests: map[*switched]resting{}, src: src}
}

// watch closes each connection as soon as the bundles no longer verify its peer, until ctx ends.
func (s *switchboard) watch(ctx context.Context, log *slog.Logger) error {
	for {
		changed := s.src.Changed()
		if n := s.reverify(); n > 0 {
			log.Warn("connections closed: their peers are no longer trusted", "connections", n)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
}

// reverify closes the connections whose peer is no longer trusted, and says how many.
func (s *switchboard) reverify() int {
	s.mu.Lock()
	open := maps.Clone(s.rests)
	s.mu.Unlock()
	now, closed := time.Now(), 0
	for c, r := range open {
		if s.src.StillTrusts(r.chain, now) != nil && c.Close() == nil {
			closed++
		}
	}
	if closed == 0 {
		return 0
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for range closed {
		s.ended = append(s.ended, time.Now())
	}
	s.ended = s.ended[max(0, len(s.ended)-maxEnded):]
	return closed
}

// maxEnded is how many closed connections are remembered.
const maxEnded = 10000

// closed says how many connections were closed for their peers since.
func (s *switchboard) closed(since time.Time) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, at := range s.ended {
		if !at.Before(since) {
			n++
		}
	}
	return n
}

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

// RestsOn notes whose chain the connection rests on. A bundle may have changed since it was verified, unseen by watch.
func (c *switched) RestsOn(chain []*x509.Certificate) {
	c.board.mu.Lock()
	select {
	case <-c.closed:
	default:
		c.board.rests[c] = resting{chain}
	}
	c.board.mu.Unlock()
	if c.board.src.StillTrusts(chain, time.Now()) != nil {
		c.Close()
	}
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
	err := net.ErrClosed
	c.once.Do(func() {
		close(c.closed)
		c.board.mu.Lock()
		delete(c.board.links, c)
		delete(c.board.rests, c)
		c.board.mu.Unlock()
		err = c.Conn.Close()
	})
	return err
}
