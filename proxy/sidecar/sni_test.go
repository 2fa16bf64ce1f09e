package sidecar_test

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hanse-mesh/hanse/proxy"
	"github.com/hanse-mesh/hanse/proxy/proxytest"
	"github.com/hanse-mesh/hanse/proxy/sidecar"
)

// TestSNI: TLSRoutes lead connections by the server name that their clients send; the bytes are the application's own TLS.
func TestSNI(t *testing.T) {
	west := proxytest.NewDomain(t, "west.test")
	const v1, v2 = "v1.shop.svc.clusterset.local:8080", "v2.shop.svc.clusterset.local:8080"
	local := listen(t)
	front := start(t, west.Source("/ns/shop/sa/frontend"), func(c *sidecar.Config) {
		c.Local = []sidecar.LocalListener{{Listener: local, Authority: authority}}
	})
	roots := x509.NewCertPool()
	for i, name := range []string{v1, v2} {
		app := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprintf(w, "%s for %s", name[:2], r.TLS.ServerName) }))
		t.Cleanup(app.Close)
		roots.AddCert(app.Certificate())
		pay := start(t, west.Source("/ns/shop/sa/payments"), func(c *sidecar.Config) { c.Apps[8080] = app.Listener.Addr().String() })
		pay.serves(proxy.TCP, authority, name)
		front.calls(proxy.TCP, name, []*proxy.Endpoint{pay.endpoint(fmt.Sprint("e", i))})
	}
	to := func(cluster string) []proxy.Backend { return []proxy.Backend{{Cluster: cluster, Weight: 1}} }
	set := func(l *proxy.Listener) {
		l.Authority, l.Protocol = authority, proxy.TCP
		front.control.change(func(table *proxy.Table) {
			table.Listeners = map[string]*proxy.Listener{authority: l}
		})
	}
	call := func(name string) string {
		c, err := net.Dial("tcp", local.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		client := tls.Client(c, &tls.Config{RootCAs: roots, ServerName: name, InsecureSkipVerify: true})
		if _, err := fmt.Fprintf(client, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"); err != nil {
			return "refused"
		}
		b, err := io.ReadAll(client)
		if err != nil {
			return "refused"
		}
		_, body, _ := strings.Cut(string(b), "\r\n\r\n")
		return body
	}
	named := []proxy.SNIRoute{{Name: "exact", Hosts: []string{"a.example"}, Split: to(v2)}, {Name: "wild", Hosts: []string{"*.example"}, Split: to(v1)}}
	set(&proxy.Listener{SNI: named})
	for name, want := range map[string]string{"a.example": "v2 for a.example", "b.example": "v1 for b.example", "x.b.example": "v1 for x.b.example", "example": "refused", "other.test": "refused", "": "refused"} {
		if got := call(name); got != want {
			t.Errorf("%q: %q, want %q", name, got, want)
		}
	}
	set(&proxy.Listener{SNI: named, Cluster: v1}) // a TCPRoute beside it
	for name, want := range map[string]string{"a.example": "v2 for a.example", "other.test": "v1 for other.test", "": "v1 for "} {
		if got := call(name); got != want {
			t.Errorf("beside a TCPRoute, %q: %q, want %q", name, got, want)
		}
	}
	set(&proxy.Listener{SNI: []proxy.SNIRoute{{Hosts: []string{"a.example"}, Split: slices.Concat(to(v1), to(v2))}}})
	seen := map[string]int{}
	for range 60 {
		seen[call("a.example")[:2]]++
	}
	if seen["v1"] < 10 || seen["v2"] < 10 {
		t.Errorf("weights of 1 to 1 gave %v", seen)
	}
	set(&proxy.Listener{SNI: named})
	c, err := net.Dial("tcp", front.outbound)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	fmt.Fprint(c, "CONNECT payments.shop:8080 HTTP/1.1\r\nHost: payments.shop:8080\r\nConnection: close\r\n\r\n")
	if b, _ := io.ReadAll(c); !strings.Contains(string(b), "not for CONNECT") {
		t.Errorf("CONNECT: %q", b)
	}
}
