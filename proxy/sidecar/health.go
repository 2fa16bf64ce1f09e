package sidecar

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/hanse-mesh/hanse/proxy"
	"github.com/hanse-mesh/hanse/proxy/balance"
	"github.com/hanse-mesh/hanse/proxy/hop"
)

// Health checks for a Balancer what it cannot see itself: Probe and Suspect are made for balance.Config.
type Health struct {
	client   *hop.Client
	dial     Dial
	suspects chan netip.AddrPort
}

// NewHealth builds a Health over the hop. dial may be nil.
func NewHealth(client *hop.Client, dial Dial) *Health {
	if dial == nil {
		dial = (&net.Dialer{}).DialContext
	}
	return &Health{client: client, dial: dial, suspects: make(chan netip.AddrPort, 64)}
}

// Probe connects to an endpoint and waits for a PING's answer; of one without identity a connection is all that can be asked for. An unreachable
// gateway is balance.ErrGateway.
func (h *Health) Probe(ctx context.Context, e *proxy.Endpoint, gateway netip.AddrPort) error {
	if e.Transport == proxy.TransportPlaintext && !gateway.IsValid() {
		conn, err := h.dial(ctx, "tcp", e.Address.String())
		if err == nil {
			_ = conn.Close()
		}
		return err
	}
	peer, err := peerOf(e)
	if err != nil {
		return err
	}
	peer.Gateway = gateway
	err = h.client.Ping(ctx, peer)
	var hopErr *hop.Error
	if errors.As(err, &hopErr) && hopErr.Stage == hop.StageGateway {
		return fmt.Errorf("%w: %w", balance.ErrGateway, err)
	}
	return err
}

// Suspect asks Run to look at a gateway. It does not block.
func (h *Health) Suspect(gateway netip.AddrPort) {
	select {
	case h.suspects <- gateway:
	default:
	}
}

// Run checks suspected gateways by a TCP connection and tells b, until ctx ends.
func (h *Health) Run(ctx context.Context, b *balance.Balancer) error {
	var checks sync.WaitGroup
	defer checks.Wait()
	under := make(map[netip.AddrPort]bool)
	done := make(chan netip.AddrPort)
	for {
		select {
		case g := <-h.suspects:
			if under[g] {
				continue
			}
			under[g] = true
			checks.Go(func() {
				dialCtx, cancel := context.WithTimeout(ctx, time.Second)
				conn, err := h.dial(dialCtx, "tcp", g.String())
				cancel()
				if err == nil {
					_ = conn.Close()
				}
				if ctx.Err() == nil {
					b.Gateway(g, err)
				}
				select {
				case done <- g:
				case <-ctx.Done():
				}
			})
		case g := <-done:
			delete(under, g)
		case <-ctx.Done():
			return nil
		}
	}
}
