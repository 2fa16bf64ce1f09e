package hop

import (
	"crypto/tls"
	"crypto/x509"
	"net"
	"sync/atomic"
	"time"

	"github.com/hanse-mesh/hanse/identity"
)

// meteredConn notes when the last byte came, below TLS.
type meteredConn struct {
	net.Conn
	lastRead atomic.Int64 // Unix nanoseconds
	read     atomic.Uint64
	written  atomic.Uint64
	broken   atomic.Bool // reading or writing has failed
}

func (c *meteredConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n > 0 {
		c.lastRead.Store(time.Now().UnixNano())
		c.read.Add(uint64(n))
	}
	if err != nil {
		c.broken.Store(true)
	}
	return n, err
}

func (c *meteredConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.written.Add(uint64(n))
	if err != nil {
		c.broken.Store(true)
	}
	return n, err
}

// verifyNow checks a chain again as a bundle change demands. An expired SVID alone does not fail here: its streams may go on,
// and expiry refuses new ones.
func verifyNow(bundles *identity.Source, chain []*x509.Certificate, now time.Time) error {
	return bundles.StillTrusts(chain, now)
}

// expiry is the earlier end of own and peer's SVID.
func expiry(own time.Time, state tls.ConnectionState) time.Time {
	peer := state.PeerCertificates[0].NotAfter
	if own.IsZero() || peer.Before(own) {
		return peer
	}
	return own
}
