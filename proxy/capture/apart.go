package capture

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"syscall"
)

// Apart dials as d does, UDP from ports that nobody is given who does not ask for one. The kernel decides about NAT once for two addresses and their ports, and remembers it for half a
// minute and more: after the sidecar has asked a resolver itself, an application's query from the same port would go past the rules.
func Apart(d *net.Dialer) func(ctx context.Context, network, address string) (net.Conn, error) {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		if first, last := apart(); network == "udp" && first != 0 {
			for range 16 {
				own := *d
				own.LocalAddr = &net.UDPAddr{Port: first + rand.IntN(last-first+1)}
				c, err := own.DialContext(ctx, network, address)
				if !errors.Is(err, syscall.EADDRINUSE) {
					return c, err
				}
			}
		}
		return d.DialContext(ctx, network, address)
	}
}

// Enough of them that a forger has to guess more than the ID of a query.
const minApart = 1024

// apart are ports beside those that the kernel hands out; 0 where there are too few. Those above are preferred: servers are rather below.
func apart() (first, last int) {
	b, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range")
	var low, high int
	if _, scan := fmt.Sscan(string(b), &low, &high); err != nil || scan != nil {
		return 0, 0
	}
	return besides(low, high)
}

func besides(low, high int) (first, last int) {
	switch {
	case high+minApart <= 65535:
		return high + 1, 65535
	case low-minApart >= 1024:
		return max(1024, low-16384), low - 1
	}
	return 0, 0
}
