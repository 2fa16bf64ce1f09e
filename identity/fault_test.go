package identity_test

import (
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hanse-mesh/hanse/identity"
)

// A drill's expired SVID fails handshakes of both roles as a real one would, and nothing but handshakes knows of it.
func TestFaultExpired(t *testing.T) {
	west := newParty(t, "west.demo", "spiffe://west.demo/ns/shop/sa/frontend")
	east := newParty(t, "east.demo", "spiffe://east.demo/ns/shop/sa/payments")
	trust(west.src, west.ca, east.ca)
	trust(east.src, west.ca, east.ca)
	meet := func() (server, client error) {
		_, server, client = handshake(t, identity.ServerTLS(east.src, identity.AuthorizeAny(), "h2"), identity.ClientTLS(west.src, identity.AuthorizeAny(), "h2"))
		return server, client
	}
	own, err := east.src.GetX509SVID()
	check(t, err)
	changed := east.src.Changed()
	east.src.SetFault(identity.Fault{Expired: true})
	select {
	case <-changed:
	default:
		t.Error("nobody hears of the fault")
	}
	if _, client := meet(); client == nil || !strings.Contains(client.Error(), "expired") {
		t.Errorf("the client of an expired server says %v", client)
	}
	if svid, err := east.src.GetX509SVID(); err != nil || svid != own || !east.src.Expired() {
		t.Errorf("what the source hands out changed: %v, %v", svid, err)
	}
	renewed, err := east.ca.NewSVID(own.ID, 0)
	check(t, err)
	east.src.SetSVID(renewed)
	if _, client := meet(); client == nil {
		t.Error("a renewal healed the drill")
	}
	east.src.SetFault(identity.Fault{})
	if server, client := meet(); server != nil || client != nil {
		t.Errorf("healed: %v, %v", server, client)
	}
	west.src.SetFault(identity.Fault{Expired: true})
	if server, _ := meet(); server == nil || !strings.Contains(server.Error(), "expired") {
		t.Errorf("the server of an expired client says %v", server)
	}
}

// A drill's distrust refuses what rests on a trust domain, or on one authority, new and open, survives new bundles, and is gone with its end.
func TestFaultDistrusted(t *testing.T) {
	west := newParty(t, "west.demo", "spiffe://west.demo/ns/shop/sa/frontend")
	east := newParty(t, "east.demo", "spiffe://east.demo/ns/shop/sa/payments")
	trust(west.src, west.ca, east.ca)
	svid, err := east.src.GetX509SVID()
	check(t, err)
	root := identity.AuthorityID(east.ca.Bundle().X509Authorities()[0])
	for _, c := range []struct {
		what    string
		refused bool
	}{{"east.demo", true}, {"east.demo/" + root, true}, {"east.demo/0123456789", false}, {"north.demo", false}, {"west.demo/" + root, false}} {
		west.src.SetFault(identity.Fault{Distrusted: []string{c.what}})
		trust(west.src, west.ca, east.ca) // bundles come all the time
		if _, err := west.src.Verify(svid.Certificates); (err != nil) != c.refused {
			t.Errorf("%s: %v", c.what, err)
		}
		if err := west.src.StillTrusts(svid.Certificates, time.Now()); (err != nil) != c.refused {
			t.Errorf("%s, open: %v", c.what, err)
		}
		if b := west.src.Bundles()[spiffeid.RequireTrustDomainFromString("east.demo")]; b == nil || len(b.X509Authorities()) != 1 {
			t.Errorf("%s: what the source hands out changed", c.what)
		}
		west.src.SetFault(identity.Fault{})
		if _, err := west.src.Verify(svid.Certificates); err != nil {
			t.Errorf("%s, healed: %v", c.what, err)
		}
	}
}
