package xdsclient

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hanse-mesh/hanse/proxy"
)

// hosts are the Services that were asked for, by resource name. They are beside the Table: an application looks up, and connects to, much
// that is none of the mesh's, and none of it must cost what a new Table does.
type hosts struct {
	mu     sync.RWMutex
	known  map[string]*host    // guarded by mu; those that do not exist, too, for a while
	wanted map[string]struct{} // guarded by mu; not yet seen by Run
	inUse  int                 // guarded by mu; of known, without those that do not exist
}

// host is one of them.
type host struct {
	used    atomic.Int64 // Unix time in ns of the last look
	service atomic.Pointer[proxy.Service]
	done    chan struct{} // closed when there was an answer; what follows is set before
	err     error         // where there is no service
	at      time.Time     // of err
}

func newHosts() hosts {
	return hosts{known: map[string]*host{}, wanted: map[string]struct{}{}}
}

// gone reports whether the answer was that there is no such name. It is called after done.
func (h *host) gone() bool { return h.service.Load() == nil && errors.Is(h.err, ErrUnknown) }

// answered reports whether there was an answer.
func (h *host) answered() bool {
	select {
	case <-h.done:
		return true
	default:
		return false
	}
}

// follow returns what is known of a name. It is new, and Run is to be woken, where that is nothing, or too old an absence.
func (hs *hosts) follow(name string, now time.Time) (h *host, isNew bool, err error) {
	hs.mu.RLock()
	h = hs.known[name]
	hs.mu.RUnlock()
	if h != nil && (!h.answered() || !h.gone() || now.Sub(h.at) < unknownFor) {
		return h, false, nil
	}
	hs.mu.Lock()
	defer hs.mu.Unlock()
	if again := hs.known[name]; again != nil && again != h {
		return again, false, nil // somebody else was here
	}
	if hs.inUse >= maxNames {
		return nil, false, ErrTooMany
	}
	if len(hs.known) >= 4*maxNames {
		hs.forgetGone(now)
	}
	h = &host{done: make(chan struct{})}
	hs.known[name] = h
	hs.wanted[name] = struct{}{}
	hs.inUse++
	return h, true, nil
}

// forgetGone drops the names that did not exist long enough ago, or all of them. mu is held.
func (hs *hosts) forgetGone(now time.Time) {
	for _, age := range [...]time.Duration{unknownFor, 0} {
		for n, h := range hs.known {
			if h.answered() && h.gone() && now.Sub(h.at) >= age {
				delete(hs.known, n)
			}
		}
		if len(hs.known) < 2*maxNames {
			return
		}
	}
}

func (hs *hosts) takeWanted() map[string]struct{} {
	hs.mu.Lock()
	defer hs.mu.Unlock()
	w := hs.wanted
	hs.wanted = map[string]struct{}{}
	return w
}

// answer notes what came of a name: a service, or an error. Both nil: it is not followed any more.
func (hs *hosts) answer(name string, s *proxy.Service, err error, now time.Time) {
	hs.mu.Lock()
	defer hs.mu.Unlock()
	h := hs.known[name]
	counted := h != nil && !(h.answered() && h.gone())
	switch {
	case s == nil && err == nil:
		delete(hs.known, name)
	case s != nil && h != nil && !h.gone() && h.answered():
		h.service.Store(s)
	default:
		if h == nil || h.answered() { // what others hold stays as it was
			h = &host{done: make(chan struct{})}
			h.used.Store(now.UnixNano())
			hs.known[name] = h
		}
		h.service.Store(s)
		h.err, h.at = err, now
		close(h.done)
	}
	h = hs.known[name]
	counts := h != nil && !(h.answered() && h.gone())
	switch {
	case counts && !counted:
		hs.inUse++
	case counted && !counts:
		hs.inUse--
	}
}

// idle lists the names that nobody has looked at since, and forgets those that do not exist.
func (hs *hosts) idle(since, now time.Time) (out []string) {
	hs.mu.Lock()
	defer hs.mu.Unlock()
	hs.forgetGone(now)
	for n, h := range hs.known {
		if h.answered() && !h.gone() && h.used.Load() < since.UnixNano() {
			out = append(out, n)
		}
	}
	return out
}

func (hs *hosts) count() int {
	hs.mu.RLock()
	defer hs.mu.RUnlock()
	return hs.inUse
}

// Service returns what a host name of the mesh stands for, "payments.shop.svc.clusterset.local", and asks the control plane where this
// proxy does not follow it yet. It waits until ctx ends (ErrUnavailable). ErrUnknown, which is proxy.ErrUnknown too, is remembered for 5 s.
func (c *Client) Service(ctx context.Context, host string) (*proxy.Service, error) {
	if host == "" || host == "*" || len(host) > maxName || strings.HasPrefix(host, "hanse/") || strings.Contains(host, ":") {
		return nil, fmt.Errorf("look up %q: %w: %w", shorten(host), proxy.ErrUnknown, ErrUnknown)
	}
	return c.service(ctx, host)
}

// ServiceAt returns the service of this cluster that has an address as a ClusterIP, or whose endpoint has it, as Service does.
// It implements proxy.Addresses.
func (c *Client) ServiceAt(ctx context.Context, address netip.Addr) (*proxy.Service, error) {
	return c.service(ctx, addressPrefix+address.Unmap().WithZone("").String())
}

// service does not wait for a control plane that is gone.
func (c *Client) service(ctx context.Context, name string) (*proxy.Service, error) {
	if c.gateway() {
		return nil, fmt.Errorf("look up %s: %w: %w", name, proxy.ErrUnknown, ErrUnknown)
	}
	now := c.now()
	h, isNew, err := c.hosts.follow(name, now)
	if err != nil {
		return nil, fmt.Errorf("look up %s: %w", name, err)
	}
	if isNew {
		select {
		case c.wake <- struct{}{}:
		default:
		}
	}
	if at := now.UnixNano(); at-h.used.Load() > int64(time.Second) {
		h.used.Store(at)
	}
	if !h.answered() {
		if st := c.Status(); !st.Connected && (st.Kept || !st.Received.IsZero()) {
			return nil, c.unavailable("look up "+name, errors.New("not connected"))
		}
		select {
		case <-h.done:
		case <-ctx.Done():
			return nil, c.unavailable("look up "+name, ctx.Err())
		}
	}
	if s := h.service.Load(); s != nil {
		return s, nil
	}
	if errors.Is(h.err, ErrUnknown) {
		return nil, fmt.Errorf("look up %s: %w: %w", name, proxy.ErrUnknown, h.err)
	}
	return nil, fmt.Errorf("look up %s: %w", name, h.err)
}

// unavailable says why there is no answer.
func (c *Client) unavailable(what string, why error) error {
	err := fmt.Errorf("%s: %w: %w", what, ErrUnavailable, why)
	if last := c.Status().LastError; last != "" {
		err = fmt.Errorf("%w (last: %s)", err, last)
	}
	return err
}

// takeHosts asks for what Service and ServiceAt want.
func (r *run) takeHosts() {
	for n := range r.hosts.takeWanted() {
		r.store.wantHost(n)
	}
}

// publishHosts tells what has come, and gives up what does not exist.
func (r *run) publishHosts(now time.Time) {
	k := r.store.kinds[services]
	for n := range k.changed {
		_, absent := k.absent[n]
		switch {
		case k.held[n] != nil:
			r.hosts.answer(n, k.held[n].value.(*proxy.Service), nil, now)
		case absent:
			r.hosts.answer(n, nil, ErrUnknown, now)
			r.store.forgetHost(n)
		case k.rejected[n] != nil:
			r.hosts.answer(n, nil, fmt.Errorf("the Service was rejected: %w", k.rejected[n].err), now)
		} // else it was given up, and that is told already
		delete(k.changed, n)
	}
}

// sweepHosts gives up what nobody has looked at for a while.
func (r *run) sweepHosts(now time.Time) {
	for _, n := range r.hosts.idle(now.Add(-r.idle), now) {
		r.store.forgetHost(n)
		r.hosts.answer(n, nil, nil, now)
	}
}
