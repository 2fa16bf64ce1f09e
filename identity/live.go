package identity

import (
	"crypto/tls"
	"crypto/x509"
	"net"
	"time"
)

// Resting is a connection whose owner closes it when the bundles no longer verify the chain that it rests on.
type Resting interface {
	RestsOn(chain []*x509.Certificate)
}

// Report tells the connection below a TLS session, if it is Resting, on whose chain it rests. Call it after the handshake.
func Report(below net.Conn, state tls.ConnectionState) {
	if r, ok := below.(Resting); ok && len(state.PeerCertificates) > 0 {
		r.RestsOn(state.PeerCertificates)
	}
}

// Reporting returns a server's configuration that does what cfg does, and Reports each connection that was verified.
func Reporting(cfg *tls.Config) *tls.Config {
	out := cfg.Clone()
	out.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		next := cfg
		if cfg.GetConfigForClient != nil {
			switch c, err := cfg.GetConfigForClient(hello); {
			case err != nil:
				return nil, err
			case c != nil:
				next = c
			}
		}
		mine, below := next.Clone(), hello.Conn
		mine.VerifyConnection = func(state tls.ConnectionState) error {
			if next.VerifyConnection != nil {
				if err := next.VerifyConnection(state); err != nil {
					return err
				}
			}
			Report(below, state)
			return nil
		}
		return mine, nil
	}
	return out
}

// StillTrusts checks a chain again, as a change of bundles demands for open connections. That the SVID has expired since is not
// held against it: what is open may go on, and expiry refuses new ones.
func (s *Source) StillTrusts(chain []*x509.Certificate, now time.Time) error {
	at := now
	if last := chain[0].NotAfter.Add(-time.Second); last.Before(at) {
		at = last
	}
	_, err := Verify(chain, s, at)
	return err
}
