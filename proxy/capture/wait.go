package capture

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"
)

// canaryTimeout is how long a try may take. A connection that is captured is accepted at once.
const canaryTimeout = 250 * time.Millisecond

// documentation are addresses that nobody has (RFC 5737, RFC 3849).
var documentation = []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("2001:db8::1")}

// canaries are destinations, one a family, that lead nowhere but where cfg captures them.
func (c *Config) canaries() (out []netip.AddrPort) {
	s := &c.Outbound
	port := uint16(0)
	for p := uint16(1024); p != 0 && port == 0; p++ {
		in := func(r PortRange) bool { return p >= r.First && p <= r.Last }
		if !slices.ContainsFunc(s.ExcludePorts, in) && (len(s.IncludePorts) == 0 || slices.ContainsFunc(s.IncludePorts, in)) {
			port = p
		}
	}
	if port == 0 {
		return nil
	}
	addresses := documentation
	for _, p := range s.Include { // where only some are captured
		addresses = append([]netip.Addr{p.Addr()}, addresses...)
	}
	for _, p := range c.Always { // the mesh's own first: nobody else's packets are sent there
		addresses = append([]netip.Addr{p.Addr().Next()}, addresses...)
	}
	have := map[bool]bool{}
	for _, a := range addresses {
		in := func(p netip.Prefix) bool { return p.Contains(a) }
		captured := len(s.Include) == 0 || slices.ContainsFunc(s.Include, in) || len(s.IncludePorts) == 0 && slices.ContainsFunc(c.Always, in)
		if captured && !slices.ContainsFunc(s.Exclude, in) && !have[a.Is4()] {
			have[a.Is4()] = true
			out = append(out, netip.AddrPortFrom(a, port))
		}
	}
	return out
}

// Wait returns nil once what this process connects to is captured as cfg says, which somebody else sees to. It needs no privilege: it connects to where nobody is, and looks whether the
// connection comes to OutboundPort. Rules are installed as a whole, so that inbound connections are captured by then, too. The process must not be exempt.
func Wait(ctx context.Context, cfg *Config) error {
	if err := cfg.Validate(); err != nil {
		return err
	}
	if cfg.OutboundPort == 0 {
		return errors.New("nothing outbound is captured: there is nothing to wait for")
	}
	to := cfg.canaries()
	if len(to) == 0 {
		return errors.New("everything outbound is excluded: there is nothing to wait for")
	}
	unmarked, uid := *cfg, uint32(os.Geteuid())
	if unmarked.Mark = 0; Exempt(&unmarked) == nil || len(cfg.OnlyUIDs) > 0 && !slices.Contains(cfg.OnlyUIDs, uid) {
		return errors.New("this process runs as a user that is exempt: it would not see that others are captured")
	}
	came := make(chan netip.AddrPort)
	end := make(chan struct{})
	var wg sync.WaitGroup
	defer wg.Wait()
	defer close(end)
	listening := false
	for _, host := range []string{"127.0.0.1", "::1"} {
		ln, err := net.Listen("tcp", net.JoinHostPort(host, strconv.Itoa(int(cfg.OutboundPort))))
		if err != nil {
			continue // no such family, or a sidecar has it
		}
		defer ln.Close()
		listening = true
		wg.Go(func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				at, err := Original(c)
				_ = c.Close()
				if err != nil {
					continue
				}
				select {
				case came <- at:
				case <-end:
					return
				}
			}
		})
	}
	for {
		for _, a := range to {
			d := net.Dialer{Timeout: canaryTimeout}
			c, err := d.DialContext(ctx, "tcp", a.String())
			if err == nil {
				_ = c.Close()
				if !listening { // a sidecar is there, and took it: nobody else could
					return nil
				}
			}
			wait := time.NewTimer(canaryTimeout / 5)
			select {
			case at := <-came:
				if slices.Contains(to, at) {
					return nil
				}
			case <-wait.C:
			case <-ctx.Done():
				return fmt.Errorf("connections to %s are not captured: %w", a, context.Cause(ctx))
			}
		}
	}
}
