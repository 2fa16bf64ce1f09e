package identity_test

import (
	"crypto/tls"
	"crypto/x509"
	"net"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/test/bufconn"

	"github.com/hanse-mesh/hanse/identity"
)

type restingConn struct {
	net.Conn
	chain atomic.Pointer[[]*x509.Certificate]
}

func (c *restingConn) RestsOn(chain []*x509.Certificate) { c.chain.Store(&chain) }

// A server's connection knows on whose chain it rests once, and only if, that was verified.
func TestReporting(t *testing.T) {
	west := newParty(t, "west.demo", "spiffe://west.demo/ns/shop/sa/frontend")
	east := newParty(t, "east.demo", "spiffe://east.demo/ns/shop/sa/payments")
	trust(west.src, west.ca, east.ca)
	accept := func(server *tls.Config) (*restingConn, error) {
		lis := bufconn.Listen(1 << 16)
		defer lis.Close()
		go func() {
			conn, err := lis.Dial()
			if err == nil {
				c := tls.Client(conn, identity.ClientTLS(west.src, identity.AuthorizeAny(), "h2"))
				_ = c.Handshake()
				_, _ = c.Read(make([]byte, 1))
				c.Close()
			}
		}()
		raw, err := lis.Accept()
		check(t, err)
		defer raw.Close()
		below := &restingConn{Conn: raw}
		return below, tls.Server(below, identity.Reporting(server)).Handshake()
	}
	trust(east.src, east.ca)
	if below, err := accept(identity.ServerTLS(east.src, identity.AuthorizeAny(), "h2")); err == nil || below.chain.Load() != nil {
		t.Errorf("not federated: %v, chain %v", err, below.chain.Load())
	}
	trust(east.src, west.ca, east.ca)
	inner := identity.ServerTLS(east.src, identity.AuthorizeAny(), "h2")
	outer := inner.Clone()
	outer.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) { return inner, nil }
	for _, cfg := range []*tls.Config{inner, outer} {
		below, err := accept(cfg)
		check(t, err)
		if chain := below.chain.Load(); chain == nil || (*chain)[0].URIs[0].String() != "spiffe://west.demo/ns/shop/sa/frontend" {
			t.Errorf("chain %v", chain)
		}
	}
}

// What is open survives the end of the SVID, and not that of its root's trust.
func TestStillTrusts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		west := newParty(t, "west.demo", "spiffe://west.demo/ns/shop/sa/frontend")
		east := newParty(t, "east.demo", "spiffe://east.demo/ns/shop/sa/payments")
		trust(east.src, west.ca, east.ca)
		svid, err := west.src.GetX509SVID()
		check(t, err)
		check(t, east.src.StillTrusts(svid.Certificates, time.Now()))
		time.Sleep(2 * time.Hour)
		if _, err := east.src.Verify(svid.Certificates); err == nil {
			t.Error("an expired SVID opens a connection")
		}
		check(t, east.src.StillTrusts(svid.Certificates, time.Now()))
		trust(east.src, east.ca)
		if err := east.src.StillTrusts(svid.Certificates, time.Now()); err == nil {
			t.Error("rests on what is not trusted")
		}
	})
}
