// Package h2spec runs the conformance suite of that name, unmodified and in strict mode, against both sides of a sidecar: what its
// application speaks to (HTTP/2 with prior knowledge), and what its callers speak to (HTTP/2 over mutual TLS, for which a small
// forwarder here presents an X509-SVID). `make h2spec` runs it. It is a module of its own, so that nobody else needs the suite.
package h2spec

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/summerwind/h2spec/config"
	"github.com/summerwind/h2spec/generic"
	"github.com/summerwind/h2spec/hpack"
	"github.com/summerwind/h2spec/http2"
	"github.com/summerwind/h2spec/spec"

	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/proxy"
	"github.com/hanse-mesh/hanse/proxy/balance"
	"github.com/hanse-mesh/hanse/proxy/hop"
	"github.com/hanse-mesh/hanse/proxy/proxytest"
	"github.com/hanse-mesh/hanse/proxy/sidecar"
)

// cases is how many the suite has in strict mode.
const cases = 146

const authority = "app.shop.svc.clusterset.local:8080"

// table is a control plane with one answer.
type table struct{ t *proxy.Table }

func (c table) Resolve(context.Context, string) (*proxy.Listener, error) {
	return c.t.Listeners[authority], nil
}
func (c table) Table() *proxy.Table      { return c.t }
func (c table) Changed() <-chan struct{} { return nil }

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func listen(t *testing.T) net.Listener {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	t.Cleanup(func() { _ = ln.Close() })
	return ln
}

func address(ln net.Listener) netip.AddrPort { return netip.MustParseAddrPort(ln.Addr().String()) }

// start runs a sidecar until the test ends.
func start(t *testing.T, src *identity.Source, tab *proxy.Table, change func(*sidecar.Config)) {
	cfg := sidecar.Config{
		Source: src, Control: table{tab}, Hop: hop.NewClient(hop.ClientConfig{Source: src}), Balancer: balance.New(balance.Config{}), Namespace: "shop",
		Locality: proxy.Locality{Cluster: "west"}, Workload: netip.MustParseAddr("127.0.0.1"), DrainTimeout: time.Second,
	}
	change(&cfg)
	s, err := sidecar.New(cfg)
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

func TestStrict(t *testing.T) {
	path := filepath.Join(t.TempDir(), "app.sock")
	appListener, err := net.Listen("unix", path)
	must(t, err)
	app := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		_, _ = io.WriteString(w, "hello")
	}))
	app.Listener = appListener
	app.Start()
	t.Cleanup(app.Close)

	d := proxytest.NewDomain(t, "west.test")
	inbound, outbound, front := listen(t), listen(t), listen(t)
	server := d.Source("/ns/shop/sa/app")
	access := proxy.Access{TrustDomain: "west.test", DefaultAllow: true}
	start(t, server, &proxy.Table{Version: 1, Inbound: &proxy.Inbound{Address: netip.MustParseAddr("127.0.0.1"), Ports: []proxy.InboundPort{
		{Services: []string{authority}, Port: address(front).Port(), Protocol: proxy.HTTP, Access: access}, // the suite asks for the address that it dials
	}}}, func(c *sidecar.Config) {
		c.Inbound, c.Apps = inbound, map[uint16]string{address(front).Port(): "unix:" + path}
	})
	client := d.Source("/ns/shop/sa/caller")
	endpoint := &proxy.Endpoint{ID: "e1", Address: address(inbound), SNI: "e1.endpoint.hanse", SPIFFEID: "spiffe://west.test/ns/shop/sa/app", Transport: proxy.TransportHop,
		Weight: 1, Locality: proxy.Locality{Cluster: "west"}}
	start(t, client, &proxy.Table{Version: 1,
		Listeners: map[string]*proxy.Listener{authority: {Authority: authority, Protocol: proxy.HTTP,
			Routes: []*proxy.Route{{Name: "default", Backends: []proxy.Backend{{Cluster: authority, Weight: 1}}}}}},
		Clusters: map[string]*proxy.Cluster{authority: {Name: authority, Protocol: proxy.HTTP, EndpointsReceived: true,
			Levels: []proxy.Level{{Localities: []proxy.LocalityEndpoints{{Weight: 1, Endpoints: []*proxy.Endpoint{endpoint}}}}}}},
	}, func(c *sidecar.Config) {
		c.Local = []sidecar.LocalListener{{Listener: outbound, Authority: "app.shop:8080"}}
	})
	go forward(front, client, endpoint)

	for _, side := range []struct {
		name string
		at   netip.AddrPort
	}{{"inbound, mutual TLS", address(front)}, {"outbound", address(outbound)}} {
		t.Run(side.name, func(t *testing.T) {
			cfg := &config.Config{Host: "127.0.0.1", Port: int(side.at.Port()), Path: "/", Timeout: 2 * time.Second, MaxHeaderLen: 4000, Strict: true}
			passed := 0
			for _, group := range []*spec.TestGroup{generic.Spec(), http2.Spec(), hpack.Spec()} {
				group.Test(cfg)
				passed += group.PassedCount
				failures(t, group)
			}
			t.Logf("%d of %d passed", passed, cases)
			if passed != cases {
				t.Errorf("%d passed, want all %d", passed, cases)
			}
		})
	}
}

// failures names what failed or was skipped.
func failures(t *testing.T, g *spec.TestGroup) {
	for i, c := range g.Tests {
		if c.Result == nil || c.Result.Failed || c.Result.Skipped {
			t.Errorf("%s %s/%d: %s: %s", g.Key, g.Section, i+1, c.Desc, why(c.Result))
		}
	}
	for _, sub := range g.Groups {
		failures(t, sub)
	}
}

// forward passes bytes to the hop, as the client's SVID.
func forward(ln net.Listener, src *identity.Source, e *proxy.Endpoint) {
	want, err := spiffeid.FromString(e.SPIFFEID)
	if err != nil {
		return
	}
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			cfg := identity.ClientTLS(src, identity.AuthorizeID(want), "h2")
			cfg.ServerName = e.SNI
			far, err := tls.Dial("tcp", e.Address.String(), cfg)
			if err != nil {
				return
			}
			defer far.Close()
			go func() {
				_, _ = io.Copy(far, c)
				_ = far.CloseWrite()
			}()
			_, _ = io.Copy(c, far)
		}()
	}
}

func why(r *spec.TestResult) string {
	switch {
	case r == nil:
		return "not run"
	case r.Skipped:
		return "skipped"
	}
	return strings.Join(strings.Fields(fmt.Sprint(r.Error)), " ")
}
