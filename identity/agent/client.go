package agent

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"

	"github.com/hanse-mesh/hanse/identity"
)

// client is one connection to one server.
type client struct {
	addr      string
	trust     atomic.Pointer[spiffebundle.Bundle] // by which servers are verified
	server    atomic.Pointer[[]*x509.Certificate] // of the last handshake
	conn      *grpc.ClientConn
	agents    agentv1.AgentClient
	svids     svidv1.SVIDClient
	entries   entryv1.EntryClient
	bundleAPI bundlev1.BundleClient
}

func (c *client) close() {
	if c != nil {
		_ = c.conn.Close() // it fails only when closed already
	}
}

// believes goes on with a newer bundle, unless the server could not be verified by it.
func (c *client) believes(b *spiffebundle.Bundle, now time.Time) bool {
	server := c.server.Load()
	if server == nil {
		return false
	}
	if _, err := identity.Verify(*server, b, now); err != nil {
		return false
	}
	c.trust.Store(b)
	return true
}

// connect makes the client for the first address. It trusts exactly spiffe://<td>/spire/server by the given bundle, and
// presents cred if there is one.
func (a *Agent) connect(trust *spiffebundle.Bundle, cred *credential) (*client, error) {
	addr := a.addrs[0]
	server := identity.SPIREServerID(a.cfg.TrustDomain)
	c := &client{addr: addr}
	c.trust.Store(trust)
	tlsConfig := &tls.Config{
		MinVersion:             tls.VersionTLS12, // SPIRE's own servers
		InsecureSkipVerify:     true,             // no host names: VerifyConnection verifies chain and ID
		SessionTicketsDisabled: true,
		NextProtos:             []string{"h2"},
		VerifyConnection: func(state tls.ConnectionState) error {
			if len(state.PeerCertificates) == 0 {
				return errors.New("the server presented no certificate")
			}
			id, err := identity.Verify(state.PeerCertificates, c.trust.Load(), a.cfg.Now())
			if err != nil {
				return fmt.Errorf("verify server: %w", err)
			}
			if id != server {
				return fmt.Errorf("the server is %s, want %s", id, server)
			}
			c.server.Store(&state.PeerCertificates)
			return nil
		},
	}
	if cred != nil {
		cert := tls.Certificate{PrivateKey: cred.key, Leaf: cred.chain[0]}
		for _, c := range cred.chain {
			cert.Certificate = append(cert.Certificate, c.Raw)
		}
		tlsConfig.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil }
	}
	conn, err := grpc.NewClient("passthrough:///"+addr,
		grpc.WithUserAgent(identity.AgentUserAgent),
		grpc.WithTransportCredentials(credentials.NewTLS(tlsConfig)),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) { return a.cfg.Dial(ctx, addr) }),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 5 * time.Second},
			MinConnectTimeout: 10 * time.Second,
		}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}),
	)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", addr, err)
	}
	c.conn, c.agents, c.svids = conn, agentv1.NewAgentClient(conn), svidv1.NewSVIDClient(conn)
	c.entries, c.bundleAPI = entryv1.NewEntryClient(conn), bundlev1.NewBundleClient(conn)
	a.client = c
	return c, nil
}

// mutual returns the client that presents the agent's SVID.
func (a *Agent) mutual() (*client, error) {
	if a.client != nil {
		return a.client, nil
	}
	trust, ok := a.state.bundles[a.cfg.TrustDomain]
	if !ok {
		return nil, fmt.Errorf("no bundle of %s", a.cfg.TrustDomain)
	}
	return a.connect(trust, a.state.agent)
}

// dropClient closes the connection, if any; with next, another address is tried the next time.
func (a *Agent) dropClient(next bool) {
	a.client.close()
	a.client = nil
	if next {
		a.addrs = append(a.addrs[1:], a.addrs[0])
	}
}
