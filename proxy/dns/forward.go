package dns

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
)

// An upstream that failed is left alone for a while: tries at it would make every query wait. The pause doubles.
const (
	minPause = 500 * time.Millisecond
	maxPause = 4 * time.Second
)

var errNoUpstream = errors.New("no upstream resolver, or none that has answered of late")

// forwarder asks upstream resolvers.
type forwarder struct {
	// read-only after New
	cfg     *Config
	log     *slog.Logger
	metrics *metrics

	upstreams atomic.Pointer[[]*upstream]

	mu    sync.Mutex
	own   map[netip.AddrPort]struct{} // guarded by mu: local ends of what is asked now
	loops time.Time                   // guarded by mu: when one was logged
}

type upstream struct {
	address netip.AddrPort
	name    string

	mu    sync.Mutex
	pause time.Duration // guarded by mu; 0: the last try was answered
	until time.Time     // guarded by mu
}

func newForwarder(cfg *Config, log *slog.Logger, m *metrics) *forwarder {
	f := &forwarder{cfg: cfg, log: log, metrics: m, own: map[netip.AddrPort]struct{}{}}
	f.set(cfg.Upstreams)
	return f
}

// set replaces the upstreams. What is known of one that stays is kept. It reports whether that is a change.
func (f *forwarder) set(list []netip.AddrPort) bool {
	var old []*upstream
	if p := f.upstreams.Load(); p != nil {
		old = *p
	}
	if slices.EqualFunc(old, list, func(u *upstream, a netip.AddrPort) bool { return u.address == a }) && old != nil {
		return false
	}
	next := make([]*upstream, len(list))
	for i, a := range list {
		next[i] = &upstream{address: a, name: a.String()}
		if j := slices.IndexFunc(old, func(u *upstream) bool { return u.address == a }); j >= 0 {
			next[i] = old[j]
		}
	}
	f.upstreams.Store(&next)
	return true
}

const watchEvery = 5 * time.Second

// watch follows what the upstreams are, until ctx ends.
func (f *forwarder) watch(ctx context.Context) {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	told := ""
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		list, err := f.cfg.Resolvers()
		switch {
		case err != nil:
			if err.Error() != told {
				told = err.Error()
				f.log.Warn("upstream resolvers stay as they are", "error", err)
			}
		case f.set(list):
			f.log.Info("upstream resolvers changed", "upstreams", list)
			told = ""
		}
	}
}

// usable reports whether an upstream is to be asked. Of one that failed that is so for one query after each pause.
func (u *upstream) usable(now time.Time) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.pause == 0 {
		return true
	}
	if now.Before(u.until) {
		return false
	}
	u.until = now.Add(u.pause)
	return true
}

// told notes how a try went, and reports whether that is a change.
func (u *upstream) told(ok bool, now time.Time) (changed bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	was := u.pause
	switch {
	case ok:
		u.pause = 0
		return was != 0
	case was != 0 && now.Before(u.until): // asked before that was known
		return false
	}
	u.pause = min(max(2*u.pause, minPause), maxPause)
	u.until = now.Add(u.pause)
	return was == 0
}

// ask returns the answer of the first upstream that gives one, as it came but for the ID. What refuses, or fails itself, is a last resort.
func (f *forwarder) ask(ctx context.Context, r *dns.Msg, tcp bool) ([]byte, error) {
	query := *r
	query.Id = uint16(rand.Uint32())
	raw, err := query.Pack()
	if err != nil {
		return nil, fmt.Errorf("pack the query: %w", err)
	}
	var last []byte
	var errs []error
	for _, u := range *f.upstreams.Load() {
		if !u.usable(f.cfg.Now()) {
			continue
		}
		started := time.Now()
		back, err := f.try(ctx, u, raw, tcp)
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		changed := u.told(err == nil, f.cfg.Now())
		if err != nil {
			f.metrics.upstream.WithLabelValues(u.name).Inc()
			if changed {
				f.log.Warn("upstream resolver does not answer", "upstream", u.name, "error", err)
			}
			errs = append(errs, fmt.Errorf("%s: %w", u.name, err))
			continue
		}
		if changed {
			f.log.Info("upstream resolver answers again", "upstream", u.name)
		}
		f.metrics.seconds.Observe(time.Since(started).Seconds())
		binary.BigEndian.PutUint16(back, r.Id)
		if code := back[3] & 0xf; code != dns.RcodeServerFailure && code != dns.RcodeRefused {
			return back, nil
		}
		last = back
	}
	if last != nil {
		return last, nil
	}
	return nil, errors.Join(append(errs, errNoUpstream)...)
}

// try asks one upstream.
func (f *forwarder) try(ctx context.Context, u *upstream, raw []byte, tcp bool) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, f.cfg.Timeout)
	defer cancel()
	network := "udp"
	if tcp {
		network = "tcp"
	}
	c, err := f.cfg.Dial(ctx, network, u.name)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if local, err := netip.ParseAddrPort(c.LocalAddr().String()); err == nil {
		f.setOwn(local, true)
		defer f.setOwn(local, false)
	}
	if tcp {
		return exchangeTCP(c, raw)
	}
	if _, err := c.Write(raw); err != nil {
		return nil, err
	}
	again := time.AfterFunc(f.cfg.Timeout/2, func() { _, _ = c.Write(raw) }) // one datagram may get lost
	defer again.Stop()
	buf := make([]byte, dns.MaxMsgSize)
	for { // what does not answer this is somebody's forgery
		n, err := c.Read(buf)
		if err != nil {
			return nil, err
		}
		if answers(raw, buf[:n]) {
			return bytes.Clone(buf[:n]), nil
		}
	}
}

func exchangeTCP(c net.Conn, raw []byte) ([]byte, error) {
	if _, err := c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(raw))), raw...)); err != nil {
		return nil, err
	}
	var size [2]byte
	if _, err := io.ReadFull(c, size[:]); err != nil {
		return nil, err
	}
	back := make([]byte, binary.BigEndian.Uint16(size[:]))
	if _, err := io.ReadFull(c, back); err != nil {
		return nil, err
	}
	if !answers(raw, back) {
		return nil, errors.New("the answer is to another question")
	}
	return back, nil
}

const headerSize = 12

// answers reports whether back is a response to the query: the same ID and question, whatever the case of its letters.
func answers(query, back []byte) bool {
	if len(back) < headerSize || query[0] != back[0] || query[1] != back[1] || back[2]&0x80 == 0 {
		return false
	}
	if code := back[3] & 0xf; binary.BigEndian.Uint16(back[4:]) == 0 { // some leave the question out where they fail
		return code == dns.RcodeFormatError || code == dns.RcodeServerFailure || code == dns.RcodeNotImplemented || code == dns.RcodeRefused
	}
	end := questionEnd(query)
	return end > 0 && binary.BigEndian.Uint16(back[4:]) == 1 && len(back) >= end &&
		bytes.EqualFold(query[headerSize:end-4], back[headerSize:end-4]) && bytes.Equal(query[end-4:end], back[end-4:end])
}

// questionEnd is where the one question of a query ends, or 0. Nothing before it can be pointed to, so there are no pointers.
func questionEnd(query []byte) int {
	for i := headerSize; i < len(query); i += int(query[i]) + 1 {
		if query[i] == 0 {
			if end := i + 5; end <= len(query) {
				return end
			}
			return 0
		}
	}
	return 0
}

func (f *forwarder) setOwn(local netip.AddrPort, open bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if open {
		f.own[local] = struct{}{}
	} else {
		delete(f.own, local)
	}
}

// isOwn reports whether a query comes from this forwarder: it would go round for ever.
func (f *forwarder) isOwn(from net.Addr) bool {
	ap, err := netip.ParseAddrPort(from.String())
	if err != nil {
		return false
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	_, ok := f.own[netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())]
	return ok
}

func (f *forwarder) warnOfLoop() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if time.Since(f.loops) > time.Minute {
		f.loops = time.Now()
		f.log.Error("an upstream resolver leads back to this one: set dns.upstreams, or let the capture's rules exempt the sidecar's user or mark")
	}
}
