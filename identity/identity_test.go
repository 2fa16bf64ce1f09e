package identity_test

import (
	"crypto/tls"
	"crypto/x509"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/test/bufconn"

	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/identity/ca"
)

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestIDs(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("west.demo")
	id, err := identity.WorkloadID(td, "shop", "frontend")
	check(t, err)
	if got := id.String(); got != "spiffe://west.demo/ns/shop/sa/frontend" {
		t.Errorf("WorkloadID = %s", got)
	}
	if ns, sa, ok := identity.ParseWorkloadID(id); !ok || ns != "shop" || sa != "frontend" {
		t.Errorf("ParseWorkloadID = %q, %q, %v", ns, sa, ok)
	}
	for _, s := range []string{"spiffe://west.demo", "spiffe://west.demo/ns/shop", "spiffe://west.demo/ns/shop/sa/a/b", "spiffe://west.demo/hanse/gateway"} {
		if _, _, ok := identity.ParseWorkloadID(spiffeid.RequireFromString(s)); ok {
			t.Errorf("ParseWorkloadID(%s) accepts", s)
		}
	}
	for _, ns := range []string{"", "a/b", "..", "ä"} {
		if id, err := identity.WorkloadID(td, ns, "x"); err == nil {
			t.Errorf("WorkloadID of namespace %q is %s", ns, id)
		}
	}
	admin, err := identity.AdminID(td, "anna")
	check(t, err)
	for id, want := range map[spiffeid.ID]bool{
		admin: true, identity.ControlPlaneID(td): true, identity.GatewayID(td): true, identity.SPIREServerID(td): true,
		spiffeid.RequireFromString("spiffe://west.demo/hanse"): true, spiffeid.RequireFromString("spiffe://west.demo/hanseatic/x"): false,
		id: false,
	} {
		if got := identity.Reserved(id); got != want {
			t.Errorf("Reserved(%s) = %v", id, got)
		}
	}
	if !identity.IsAdminID(td, admin) || identity.IsAdminID(spiffeid.RequireTrustDomainFromString("east.demo"), admin) || identity.IsAdminID(td, id) {
		t.Error("IsAdminID mistakes")
	}
}

func TestPatterns(t *testing.T) {
	for _, c := range []struct {
		pattern, id string
		want        bool
	}{
		{"spiffe://west.demo/ns/shop/sa/frontend", "spiffe://west.demo/ns/shop/sa/frontend", true},
		{"spiffe://west.demo/ns/shop/sa/*", "spiffe://west.demo/ns/shop/sa/frontend", true},
		{"spiffe://west.demo/ns/shop/sa/*", "spiffe://east.demo/ns/shop/sa/frontend", false},
		{"spiffe://*/ns/shop/sa/*", "spiffe://east.demo/ns/shop/sa/frontend", true},
		{"spiffe://west.demo/ns/*", "spiffe://west.demo/ns/shop/sa/frontend", false},
		{"spiffe://west.demo/ns/**", "spiffe://west.demo/ns/shop/sa/frontend", true},
		{"spiffe://west.demo/**", "spiffe://west.demo", true},
		{"spiffe://west.demo/ns/shop/sa/front*", "spiffe://west.demo/ns/shop/sa/frontend", false},
		{"*", "spiffe://west.demo/ns/shop/sa/frontend", false},
		{"spiffe://west.demo/ns/shop", "spiffe://west.demo/ns/shop/sa/frontend", false},
		{"spiffe://west.demo/ns/shop/sa/frontend/x", "spiffe://west.demo/ns/shop/sa/frontend", false},
	} {
		if got := identity.MatchPattern(c.pattern, spiffeid.RequireFromString(c.id)); got != c.want {
			t.Errorf("MatchPattern(%s, %s) = %v", c.pattern, c.id, got)
		}
	}
	for pattern, want := range map[string]string{
		"spiffe://west.demo/ns/shop/sa/*": "", "spiffe://*/**": "", "spiffe://west.demo": "",
		"west.demo/x": "must begin", "spiffe://west.demo//x": "empty segment", "spiffe://west.demo/a*": "whole segment",
		"spiffe://west.demo/**/x": "whole segment", "spiffe://WEST/x": "trust domain", "spiffe://west.demo/ä": "path segment", "spiffe://**": "whole segment",
	} {
		err := identity.ValidatePattern(pattern)
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("ValidatePattern(%s) = %v, want %q", pattern, err, want)
		}
	}
}

// party is a trust domain with a Source of its own.
type party struct {
	ca  *ca.Authority
	src *identity.Source
}

func newParty(t *testing.T, td, id string) party {
	t.Helper()
	a, err := ca.Open(ca.Config{Dir: t.TempDir(), TrustDomain: spiffeid.RequireTrustDomainFromString(td)})
	check(t, err)
	svid, err := a.NewSVID(spiffeid.RequireFromString(id), 0)
	check(t, err)
	src := identity.NewSource()
	src.SetSVID(svid)
	return party{a, src}
}

func trust(src *identity.Source, as ...*ca.Authority) {
	m := map[spiffeid.TrustDomain]*spiffebundle.Bundle{}
	for _, a := range as {
		m[a.TrustDomain()] = a.Bundle()
	}
	src.SetBundles(m)
}

// handshake connects over bufconn and returns what each side says, and the client's view of the connection.
func handshake(t *testing.T, server, client *tls.Config) (state tls.ConnectionState, serverErr, clientErr error) {
	t.Helper()
	lis := bufconn.Listen(1 << 16)
	defer lis.Close()
	done := make(chan error, 1)
	go func() {
		conn, err := lis.Accept()
		if err != nil {
			done <- err
			return
		}
		defer conn.Close()
		c := tls.Server(conn, server)
		err = c.Handshake()
		if err == nil {
			_, err = c.Write([]byte("x"))
		}
		done <- err
	}()
	var conn net.Conn
	conn, err := lis.Dial()
	check(t, err)
	defer conn.Close()
	c := tls.Client(conn, client)
	clientErr = c.Handshake()
	if clientErr == nil { // a TLS 1.3 client learns of its refusal with the first byte
		_, clientErr = io.ReadFull(c, make([]byte, 1))
	}
	return c.ConnectionState(), <-done, clientErr
}

func TestMutualTLS(t *testing.T) {
	west := newParty(t, "west.demo", "spiffe://west.demo/ns/shop/sa/frontend")
	east := newParty(t, "east.demo", "spiffe://east.demo/ns/shop/sa/payments")
	trust(west.src, west.ca, east.ca)
	trust(east.src, west.ca, east.ca)
	westID, eastID := spiffeid.RequireFromString("spiffe://west.demo/ns/shop/sa/frontend"), spiffeid.RequireFromString("spiffe://east.demo/ns/shop/sa/payments")

	state, serverErr, clientErr := handshake(t, identity.ServerTLS(east.src, identity.AuthorizeID(westID), "h2"), identity.ClientTLS(west.src, identity.AuthorizeID(eastID), "h2"))
	if serverErr != nil || clientErr != nil {
		t.Fatalf("server: %v, client: %v", serverErr, clientErr)
	}
	if id, err := identity.PeerID(state); err != nil || id != eastID || state.Version != tls.VersionTLS13 || state.NegotiatedProtocol != "h2" {
		t.Errorf("peer %v, %v, version %x, ALPN %q", id, err, state.Version, state.NegotiatedProtocol)
	}

	t.Run("the whole ID is compared", func(t *testing.T) {
		same := spiffeid.RequireFromString("spiffe://east.demo/ns/shop/sa/frontend") // another trust domain's frontend
		if _, serverErr, clientErr := handshake(t, identity.ServerTLS(east.src, identity.AuthorizeID(same)), identity.ClientTLS(west.src, identity.AuthorizeAny())); serverErr == nil || clientErr == nil {
			t.Errorf("server: %v, client: %v", serverErr, clientErr)
		}
		if _, _, clientErr := handshake(t, identity.ServerTLS(east.src, identity.AuthorizeAny()), identity.ClientTLS(west.src, identity.AuthorizeID(westID))); clientErr == nil {
			t.Error("the client accepts a server with another ID")
		}
	})
	t.Run("no SVID, no connection", func(t *testing.T) {
		if _, serverErr, _ := handshake(t, identity.ServerTLS(east.src, identity.AuthorizeAny()), &tls.Config{InsecureSkipVerify: true}); serverErr == nil {
			t.Error("the server accepts a client without certificate")
		}
	})
	t.Run("not federated", func(t *testing.T) {
		trust(east.src, east.ca)
		_, serverErr, clientErr := handshake(t, identity.ServerTLS(east.src, identity.AuthorizeAny()), identity.ClientTLS(west.src, identity.AuthorizeAny()))
		if serverErr == nil || clientErr == nil || !strings.Contains(serverErr.Error(), "west.demo") {
			t.Errorf("server: %v, client: %v", serverErr, clientErr)
		}
	})
	t.Run("another authority under the same name", func(t *testing.T) {
		impostor := newParty(t, "west.demo", "spiffe://west.demo/ns/shop/sa/frontend")
		trust(impostor.src, impostor.ca, east.ca)
		trust(east.src, west.ca, east.ca)
		if _, serverErr, _ := handshake(t, identity.ServerTLS(east.src, identity.AuthorizeAny()), identity.ClientTLS(impostor.src, identity.AuthorizeAny())); serverErr == nil {
			t.Error("the server accepts an impostor")
		}
	})
}

// A withdrawn root must not come back through session resumption (design note 16).
func TestWithdrawnRoot(t *testing.T) {
	west := newParty(t, "west.demo", "spiffe://west.demo/ns/shop/sa/frontend")
	east := newParty(t, "east.demo", "spiffe://east.demo/ns/shop/sa/payments")
	trust(west.src, west.ca, east.ca)
	trust(east.src, west.ca, east.ca)
	server := identity.ServerTLS(east.src, identity.AuthorizeAny())
	client := identity.ClientTLS(west.src, identity.AuthorizeAny())
	client.SessionTicketsDisabled = false // a client that would resume
	client.ClientSessionCache = tls.NewLRUClientSessionCache(8)
	for range 2 {
		state, serverErr, clientErr := handshake(t, server, client)
		if serverErr != nil || clientErr != nil || state.DidResume {
			t.Fatalf("server: %v, client: %v, resumed: %v", serverErr, clientErr, state.DidResume)
		}
	}
	trust(east.src, east.ca)
	if _, serverErr, clientErr := handshake(t, server, client); serverErr == nil || clientErr == nil {
		t.Errorf("after the withdrawal, server: %v, client: %v", serverErr, clientErr)
	}
}

func TestExpired(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		west := newParty(t, "west.demo", "spiffe://west.demo/ns/shop/sa/frontend")
		trust(west.src, west.ca)
		config := func() (*tls.Config, *tls.Config) {
			return identity.ServerTLS(west.src, identity.AuthorizeAny()), identity.ClientTLS(west.src, identity.AuthorizeAny())
		}
		server, client := config()
		if _, serverErr, clientErr := handshake(t, server, client); serverErr != nil || clientErr != nil {
			t.Fatalf("server: %v, client: %v", serverErr, clientErr)
		}
		time.Sleep(time.Hour + time.Second)
		if _, _, clientErr := handshake(t, server, client); clientErr == nil || !strings.Contains(clientErr.Error(), "expired") {
			t.Errorf("client with an expired server: %v", clientErr)
		}
	})
}

func TestSource(t *testing.T) {
	src := identity.NewSource()
	if _, err := src.GetX509SVID(); err == nil {
		t.Error("an empty Source has an SVID")
	}
	west := newParty(t, "west.demo", "spiffe://west.demo/ns/shop/sa/frontend")
	svid, err := west.src.GetX509SVID()
	check(t, err)
	changed := src.Changed()
	go src.Set(svid, map[spiffeid.TrustDomain]*spiffebundle.Bundle{west.ca.TrustDomain(): west.ca.Bundle()})
	check(t, src.Wait(t.Context()))
	<-changed
	if id, err := src.Verify(svid.Certificates); err != nil || id != svid.ID {
		t.Errorf("Verify = %v, %v", id, err)
	}
	if _, err := src.GetX509BundleForTrustDomain(spiffeid.RequireTrustDomainFromString("east.demo")); err == nil || !strings.Contains(err.Error(), "east.demo") {
		t.Errorf("bundle of a stranger: %v", err)
	}
	if _, err := src.Verify(nil); err == nil {
		t.Error("Verify accepts nothing")
	}
	if _, err := src.Verify([]*x509.Certificate{west.ca.Bundle().X509Authorities()[0]}); err == nil {
		t.Error("Verify accepts a CA certificate as an SVID (X509-SVID §5.2)")
	}
}

// Handshakes read while the Source rotates: what go-spiffe's X509Source fails under -race.
func TestSourceRotatesWhileRead(t *testing.T) {
	west := newParty(t, "west.demo", "spiffe://west.demo/ns/shop/sa/frontend")
	trust(west.src, west.ca)
	svid, err := west.src.GetX509SVID()
	check(t, err)
	var wg sync.WaitGroup
	stop := make(chan struct{})
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				west.src.Set(svid, map[spiffeid.TrustDomain]*spiffebundle.Bundle{west.ca.TrustDomain(): west.ca.Bundle()})
			}
		}
	})
	for range 20 {
		if _, serverErr, clientErr := handshake(t, identity.ServerTLS(west.src, identity.AuthorizeAny()), identity.ClientTLS(west.src, identity.AuthorizeAny())); serverErr != nil || clientErr != nil {
			t.Fatalf("server: %v, client: %v", serverErr, clientErr)
		}
	}
	close(stop)
	wg.Wait()
}

func FuzzPattern(f *testing.F) {
	for _, s := range []string{"spiffe://west.demo/ns/*/sa/**", "spiffe://*", "**"} {
		f.Add(s)
	}
	id := spiffeid.RequireFromString("spiffe://west.demo/ns/shop/sa/frontend")
	f.Fuzz(func(t *testing.T, pattern string) {
		if identity.ValidatePattern(pattern) == nil {
			return
		}
		if identity.MatchPattern(pattern, id) && !strings.Contains(pattern, "*") {
			t.Errorf("invalid pattern %q matches", pattern)
		}
	})
}
