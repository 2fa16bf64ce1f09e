// Package fault carries out a drill's orders in one proxy.
//
//	proxy.Table.Faults ─► Injector ─► Conn: silence below TLS, PINGs included
//	                              └─► Request: delay, status, refusal by target port
//
// Every fault heals by itself: at its end, counted by this process's monotonic clock from the first receipt, or when its lease runs
// out unrenewed, whichever comes first. What a Table does not name any more heals at once.
package fault

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hanse-mesh/hanse/proxy"
)

// Injector holds the faults in force. It is safe for concurrent use.
type Injector struct {
	log  *slog.Logger
	wake chan struct{}

	state atomic.Pointer[state]

	mu    sync.Mutex
	known map[string]*known // guarded by mu
}

// known is a fault that the Table names, in force or healed by itself.
type known struct {
	fault proxy.Fault
	end   time.Time // zero: none
	until time.Time // zero: none
}

// state is immutable once stored.
type state struct {
	active  []proxy.Fault
	changed chan struct{} // closed when replaced
}

// New builds an Injector without faults. It heals only while Run runs.
func New(log *slog.Logger) *Injector {
	i := &Injector{log: log, wake: make(chan struct{}, 1), known: map[string]*known{}}
	i.state.Store(&state{changed: make(chan struct{})})
	return i
}

// Set takes the faults of a new Table.
func (i *Injector) Set(faults []proxy.Fault) {
	i.mu.Lock()
	now := time.Now()
	named := map[string]bool{}
	for _, f := range faults {
		key := fmt.Sprint(f.Drill, f.Mode, f.Ports)
		named[key] = true
		k := i.known[key]
		switch {
		case k == nil:
			k = &known{}
			if f.End > 0 {
				k.end = now.Add(f.End)
			}
			i.known[key] = k
		case k.fault.Renewal == f.Renewal:
			continue
		}
		k.fault, k.until = f, k.end
		if lease := now.Add(f.Lease); f.Lease > 0 && (k.end.IsZero() || lease.Before(k.end)) {
			k.until = lease
		}
	}
	for key := range i.known {
		if !named[key] {
			delete(i.known, key)
		}
	}
	i.publish(now)
	i.mu.Unlock()
	select {
	case i.wake <- struct{}{}:
	default:
	}
}

// publish needs mu.
func (i *Injector) publish(now time.Time) {
	next := &state{changed: make(chan struct{})}
	for _, k := range i.known {
		if k.until.IsZero() || now.Before(k.until) {
			next.active = append(next.active, k.fault)
		}
	}
	old := i.state.Load()
	for _, f := range next.active {
		if !slices.ContainsFunc(old.active, func(o proxy.Fault) bool { return o.Drill == f.Drill && o.Mode == f.Mode }) {
			i.log.Warn("fault in force", "drill", f.Drill, "mode", f.Mode, "share", f.Share, "ports", f.Ports, "end", f.End.String())
		}
	}
	for _, o := range old.active {
		if !slices.ContainsFunc(next.active, func(f proxy.Fault) bool { return o.Drill == f.Drill && o.Mode == f.Mode }) {
			i.log.Warn("fault healed", "drill", o.Drill, "mode", o.Mode)
		}
	}
	i.state.Store(next)
	close(old.changed)
}

// Run heals faults when their time is up, until ctx ends; then it heals all.
func (i *Injector) Run(ctx context.Context) error {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		i.mu.Lock()
		now := time.Now()
		wait, due := time.Hour, false
		for _, k := range i.known {
			switch left := k.until.Sub(now); {
			case k.until.IsZero():
			case left > 0:
				wait = min(wait, left)
			default:
				due = due || slices.ContainsFunc(i.state.Load().active, func(f proxy.Fault) bool {
					return f.Drill == k.fault.Drill && f.Mode == k.fault.Mode && slices.Equal(f.Ports, k.fault.Ports)
				})
			}
		}
		if due {
			i.publish(now)
		}
		i.mu.Unlock()
		timer.Reset(wait)
		select {
		case <-timer.C:
		case <-i.wake:
		case <-ctx.Done():
			i.mu.Lock()
			clear(i.known)
			i.publish(time.Now())
			i.mu.Unlock()
			return nil
		}
	}
}

// Active returns the faults in force and a channel that is closed when they change. Neither may be changed.
func (i *Injector) Active() ([]proxy.Fault, <-chan struct{}) {
	s := i.state.Load()
	return s.active, s.changed
}

// Verdict is what happens to one request.
type Verdict struct {
	Drill  string
	Hold   bool // no answer until Changed is closed, then ask again
	Refuse bool // as not processed: the caller tries elsewhere
	Status int
	Delay  time.Duration

	Changed <-chan struct{}
}

// Request decides for a request to a target port of the workload.
func (i *Injector) Request(port uint16) Verdict {
	s := i.state.Load()
	v := Verdict{Changed: s.changed}
	for _, f := range s.active {
		if len(f.Ports) > 0 && !slices.Contains(f.Ports, port) || rand.Uint32N(100) >= f.Share {
			continue
		}
		switch f.Mode {
		case proxy.FaultDrain:
			v.Refuse = true
		case proxy.FaultErrors:
			v.Status = f.Status
		case proxy.FaultSlow:
			v.Delay += f.Latency
		case proxy.FaultBlackhole:
			if len(f.Ports) == 0 {
				continue // Conn does it
			}
			v.Hold = true
		default:
			continue
		}
		v.Drill = f.Drill
	}
	return v
}

// Draw returns a connection's lot for Holed.
func Draw() uint32 { return rand.Uint32N(100) }

// Holed reports whether a connection of that lot is silenced now; changed is closed when that may have changed.
func (i *Injector) Holed(lot uint32) (holed bool, changed <-chan struct{}) {
	s := i.state.Load()
	for _, f := range s.active {
		if f.Mode == proxy.FaultBlackhole && len(f.Ports) == 0 && lot < f.Share {
			return true, s.changed
		}
	}
	return false, s.changed
}

// Wrap returns a connection that carries nothing while it is silenced. What was under way arrives after healing, as TCP would
// retransmit it.
func (i *Injector) Wrap(c net.Conn) net.Conn {
	return &conn{Conn: c, injector: i, lot: Draw(), closed: make(chan struct{})}
}

type conn struct {
	net.Conn
	injector *Injector
	lot      uint32
	once     sync.Once
	closed   chan struct{}
}

func (c *conn) wait() error {
	for {
		holed, changed := c.injector.Holed(c.lot)
		if !holed {
			return nil
		}
		select {
		case <-changed:
		case <-c.closed:
			return net.ErrClosed
		}
	}
}

func (c *conn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if waitErr := c.wait(); waitErr != nil {
		return 0, waitErr
	}
	return n, err
}

func (c *conn) Write(p []byte) (int, error) {
	if err := c.wait(); err != nil {
		return 0, err
	}
	return c.Conn.Write(p)
}

func (c *conn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}
