package join

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/hanse-mesh/hanse/identity"
)

// ProbeName is the SNI under which control planes and gateways of a member answer a probe: a handshake and nothing else.
func ProbeName(memberID string) string { return "probe." + memberID }

const patience = 200 * time.Millisecond // for an alert, beside the round trip

// ProbeConfig is one probe.
type ProbeConfig struct {
	Dial       func(ctx context.Context, network, address string) (net.Conn, error)
	Source     *identity.Source
	Address    string
	ServerName string
	NextProtos []string
	Verify     func(chain []*x509.Certificate) error // the server's certificates, leaf first
}

// Probe makes one mTLS handshake, waits until the server has accepted this side's certificate, and closes. It returns how long the
// handshake took. The context bounds it.
func Probe(ctx context.Context, cfg ProbeConfig) (time.Duration, error) {
	fail := func(err error) (time.Duration, error) { return 0, fmt.Errorf("probe %s: %w", cfg.Address, err) }
	conn, err := cfg.Dial(ctx, "tcp", cfg.Address)
	if err != nil {
		return fail(err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	t := identity.ClientTLS(cfg.Source, identity.AuthorizeAny(), cfg.NextProtos...)
	t.ServerName = cfg.ServerName
	t.VerifyConnection = func(state tls.ConnectionState) error { return cfg.Verify(state.PeerCertificates) }
	tc := tls.Client(conn, t)
	start := time.Now()
	if err := tc.HandshakeContext(ctx); err != nil {
		return fail(err)
	}
	rtt := time.Since(start)
	// In TLS 1.3 the server judges the client's certificate after the client's handshake is over: only its next bytes tell. It closes
	// (a control plane), sends (a gateway, HTTP/2 settings) or waits (then it has accepted); a refusal is an alert.
	conn.SetReadDeadline(time.Now().Add(3*rtt + patience))
	_, err = tc.Read(make([]byte, 1))
	var timeout net.Error
	if err != nil && !errors.Is(err, io.EOF) && (ctx.Err() != nil || !errors.As(err, &timeout) || !timeout.Timeout()) {
		return fail(err)
	}
	return rtt, nil
}
