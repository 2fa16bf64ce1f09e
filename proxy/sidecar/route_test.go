package sidecar_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/proxy"
	"github.com/hanse-mesh/hanse/proxy/hop"
	"github.com/hanse-mesh/hanse/proxy/message"
	"github.com/hanse-mesh/hanse/proxy/proxytest"
	"github.com/hanse-mesh/hanse/proxy/sidecar"
)

// local starts a frontend and n payments of one trust domain, without gateways.
func local(t *testing.T, handlers ...http.Handler) (front *node, pays []*node) {
	t.Helper()
	west := proxytest.NewDomain(t, "west.test")
	front = start(t, west.Source("/ns/shop/sa/frontend"))
	var endpoints []*proxy.Endpoint
	for i, h := range handlers {
		pay := start(t, west.Source("/ns/shop/sa/payments"), func(c *sidecar.Config) { c.Apps[8080] = app(t, h) })
		pay.serves(proxy.HTTP, authority)
		pays = append(pays, pay)
		endpoints = append(endpoints, pay.endpoint(fmt.Sprintf("e%d", i)))
	}
	front.calls(proxy.HTTP, authority, endpoints)
	return front, pays
}

func says(what string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, what) })
}

func get(t *testing.T, n *node, path string) (*http.Response, string) {
	t.Helper()
	resp, err := n.http().Get("http://payments:8080" + path)
	return resp, text(t, resp, err)
}

func TestRouting(t *testing.T) {
	front, _ := local(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-App", "1")
		fmt.Fprintf(w, "%s|%s|%s|%s", r.Host, r.URL.RequestURI(), r.Header.Get("X-Set"), r.Header.Get("X-Gone"))
	}))
	prefix := "/v2"
	front.route(func(r *proxy.Route) {
		r.Match = proxy.Match{PathPrefix: "/v1", Headers: []proxy.ValueMatch{{Name: "x-want", Exact: "yes"}}}
		r.Request = proxy.HeaderEdits{Set: []proxy.Header{{Name: "X-Set", Value: "route"}}, Remove: []string{"X-Gone"}}
		r.Backends[0].Request = proxy.HeaderEdits{Add: []proxy.Header{{Name: "X-Set", Value: "backend"}}}
		r.Response = proxy.HeaderEdits{Set: []proxy.Header{{Name: "X-Resp", Value: "edited"}}, Remove: []string{"X-App"}}
		r.Rewrite = proxy.Rewrite{Host: "internal.example", ReplacePrefix: &prefix}
	})
	req, _ := http.NewRequestWithContext(t.Context(), "GET", "http://payments:8080/v1/a%2Fb?q=1", nil)
	req.Header.Set("X-Want", "yes")
	req.Header.Set("X-Gone", "x")
	resp, err := front.http().Do(req)
	if got := text(t, resp, err); got != "internal.example|/v2/a%2Fb?q=1|route|" {
		t.Errorf("got %q", got)
	}
	if resp.Header.Get("X-Resp") != "edited" || resp.Header.Get("X-App") != "" {
		t.Errorf("header %v", resp.Header)
	}
	if resp, _ := get(t, front, "/v1"); resp.StatusCode != 404 || resp.Header.Get("Hanse-Error") != "no_route" {
		t.Errorf("no match: %s", resp.Status)
	}
	front.route(func(r *proxy.Route) {
		*r = proxy.Route{Name: "redirect", Redirect: &proxy.Redirect{Host: "other.example", Status: 302}}
	})
	if resp, _ := get(t, front, "/x?y=z"); resp.StatusCode != 302 || resp.Header.Get("Location") != "http://other.example:8080/x?y=z" {
		t.Errorf("redirect: %s to %q", resp.Status, resp.Header.Get("Location"))
	}
	front.route(func(r *proxy.Route) { *r = proxy.Route{Name: "none"} })
	if resp, _ := get(t, front, "/"); resp.StatusCode != 500 {
		t.Errorf("no backend: %s", resp.Status)
	}
	front.route(func(r *proxy.Route) {
		*r = proxy.Route{Name: "invalid", Backends: []proxy.Backend{{Weight: 1, DirectStatus: 500}}}
	})
	if resp, _ := get(t, front, "/"); resp.StatusCode != 500 {
		t.Errorf("invalid backend: %s", resp.Status)
	}
}

// TestDeadEndpoint: a killed endpoint costs no call, also of those that cannot be repeated, as nothing reached it.
func TestDeadEndpoint(t *testing.T) {
	front, pays := local(t, says("0"), says("1"))
	pays[0].stop()
	c := front.http()
	for i := range 40 {
		resp, err := c.Post("http://payments:8080/", "text/plain", strings.NewReader(strings.Repeat("x", 1000*i)))
		if got := text(t, resp, err); got != "1" || resp.StatusCode != 200 {
			t.Fatalf("call %d: %s %q", i, resp.Status, got)
		}
	}
}

// TestKilledUnderway: a call that may have been processed is repeated only if its method allows it.
func TestKilledUnderway(t *testing.T) {
	for method, want := range map[string]int{"GET": 200, "DELETE": 200, "POST": 502} {
		t.Run(method, func(t *testing.T) {
			died := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				panic(http.ErrAbortHandler)
			})
			front, pays := local(t, died, says("1"))
			front.calls(proxy.HTTP, authority, []*proxy.Endpoint{pays[0].endpoint("e0")}, []*proxy.Endpoint{pays[1].endpoint("e1")})
			req, _ := http.NewRequestWithContext(t.Context(), method, "http://payments:8080/", nil)
			resp, err := front.http().Do(req)
			_ = text(t, resp, err)
			if resp.StatusCode != want || want == 502 && resp.Header.Get("Hanse-Error") != "app_failed" {
				t.Errorf("application that breaks off: %s %s, want %d", resp.Status, resp.Header.Get("Hanse-Error"), want)
			}
			entered := make(chan struct{}, 1)
			hang := start(t, pays[0].src, func(c *sidecar.Config) {
				c.DrainTimeout = time.Millisecond
				c.Apps[8080] = app(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					entered <- struct{}{}
					<-r.Context().Done()
				}))
			})
			hang.serves(proxy.HTTP, authority)
			front.calls(proxy.HTTP, authority, []*proxy.Endpoint{hang.endpoint("e2")}, []*proxy.Endpoint{pays[1].endpoint("e1")})
			go func() { <-entered; hang.stop() }()
			req, _ = http.NewRequestWithContext(t.Context(), method, "http://payments:8080/", nil)
			resp, err = front.http().Do(req)
			if _ = text(t, resp, err); resp.StatusCode != want {
				t.Errorf("killed endpoint: %s, want %d (%s)", resp.Status, want, resp.Header.Get("Hanse-Error"))
			}
		})
	}
}

// TestRetryCodes: the route's retries, with the body again, within their number.
func TestRetryCodes(t *testing.T) {
	var calls atomic.Int32
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		if calls.Add(1) < 3 {
			w.WriteHeader(503)
			return
		}
		_, _ = w.Write(b)
	})
	front, _ := local(t, h, h, h)
	front.route(func(r *proxy.Route) {
		r.Retry = proxy.Retry{Attempts: 2, Codes: []int{503}, Backoff: time.Millisecond}
	})
	resp, err := front.http().Post("http://payments:8080/", "text/plain", strings.NewReader("again"))
	if got := text(t, resp, err); got != "again" || calls.Load() != 3 {
		t.Errorf("%s %q after %d calls", resp.Status, got, calls.Load())
	}
	calls.Store(-10)
	resp, err = front.http().Post("http://payments:8080/", "text/plain", strings.NewReader("again"))
	if _ = text(t, resp, err); resp.StatusCode != 503 || calls.Load() != -7 {
		t.Errorf("%s after %d calls, want 503 after 3", resp.Status, calls.Load()+10)
	}
	calls.Store(0) // a body that was not kept is not sent again
	resp, err = front.http().Post("http://payments:8080/", "text/plain", strings.NewReader(strings.Repeat("x", 200_000)))
	if _ = text(t, resp, err); resp.StatusCode != 503 || calls.Load() != 1 {
		t.Errorf("long body: %s after %d calls", resp.Status, calls.Load())
	}
}

func TestTimeouts(t *testing.T) {
	var slow atomic.Bool
	slow.Store(true)
	front, _ := local(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if slow.Swap(false) || r.URL.Path == "/always" {
			<-r.Context().Done()
		}
		fmt.Fprint(w, "fast")
	}))
	front.route(func(r *proxy.Route) { r.TryTimeout, r.RequestTimeout = time.Second, 20*time.Second })
	if resp, body := get(t, front, "/"); body != "fast" {
		t.Errorf("second try: %s %q", resp.Status, body)
	}
	front.route(func(r *proxy.Route) { r.TryTimeout, r.RequestTimeout = 0, 100*time.Millisecond })
	if resp, _ := get(t, front, "/always"); resp.StatusCode != 504 || resp.Header.Get("Hanse-Error") != "timeout" {
		t.Errorf("timeout: %s", resp.Status)
	}
}

func TestMirror(t *testing.T) {
	mirrored := make(chan string, 1)
	front, pays := local(t, says("main"), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		mirrored <- r.Method + " " + string(b)
	}))
	front.calls(proxy.HTTP, authority, []*proxy.Endpoint{pays[0].endpoint("e0")})
	const shadow = "shadow.shop.svc.clusterset.local:8080"
	front.calls(proxy.HTTP, shadow, []*proxy.Endpoint{pays[1].endpoint("e1")})
	pays[1].serves(proxy.HTTP, shadow)
	front.route(func(r *proxy.Route) { r.Mirror = &proxy.Backend{Cluster: shadow} })
	resp, err := front.http().Post("http://payments:8080/", "text/plain", strings.NewReader("body"))
	if got := text(t, resp, err); got != "main" {
		t.Errorf("got %q", got)
	}
	select {
	case got := <-mirrored:
		if got != "POST body" {
			t.Errorf("mirrored %q", got)
		}
	case <-time.After(5 * time.Second):
		t.Error("nothing was mirrored")
	}
}

// TestAccess: who may not call, gets nothing.
func TestAccess(t *testing.T) {
	west, other := proxytest.NewDomain(t, "west.test"), proxytest.NewDomain(t, "other.test")
	reached := atomic.Int32{}
	pay := start(t, west.Source("/ns/shop/sa/payments"), func(c *sidecar.Config) {
		c.Apps[8080] = app(t, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { reached.Add(1) }))
	})
	pay.serves(proxy.HTTP, authority)
	for name, tc := range map[string]struct {
		src  *identity.Source
		code string
	}{
		"not allowed":   {west.Source("/ns/shop/sa/intruder"), "denied"},
		"not federated": {other.Source("/ns/shop/sa/frontend", west), "unreachable"},
	} {
		t.Run(name, func(t *testing.T) {
			n := start(t, tc.src)
			n.calls(proxy.HTTP, authority, []*proxy.Endpoint{pay.endpoint("e1")})
			if resp, body := get(t, n, "/"); resp.Header.Get("Hanse-Error") != tc.code || !strings.HasPrefix(body, "hanse: "+tc.code+": ") {
				t.Errorf("%s: %s %q", resp.Status, resp.Header.Get("Hanse-Error"), body)
			}
		})
	}
	t.Run("somebody else at the address", func(t *testing.T) {
		n := start(t, west.Source("/ns/shop/sa/frontend"))
		e := pay.endpoint("e1")
		e.SPIFFEID = "spiffe://west.test/ns/shop/sa/catalog"
		n.calls(proxy.HTTP, authority, []*proxy.Endpoint{e})
		if resp, _ := get(t, n, "/"); resp.Header.Get("Hanse-Error") != "unreachable" {
			t.Errorf("%s", resp.Status)
		}
	})
	t.Run("wrong target", func(t *testing.T) {
		n := start(t, west.Source("/ns/shop/sa/frontend"))
		const wrong = "catalog.shop.svc.clusterset.local:8080"
		n.calls(proxy.HTTP, wrong, []*proxy.Endpoint{pay.endpoint("e1")})
		resp, err := n.http().Get("http://catalog:8080/")
		if _ = text(t, resp, err); resp.StatusCode != 421 || resp.Header.Get("Hanse-Error") != "wrong_target" {
			t.Errorf("%s", resp.Status)
		}
	})
	t.Run("plaintext in another cluster", func(t *testing.T) {
		n := start(t, west.Source("/ns/shop/sa/frontend"))
		e := pay.endpoint("e1")
		e.Transport = proxy.TransportPlaintext
		n.calls(proxy.HTTP, authority, []*proxy.Endpoint{e})
		if resp, _ := get(t, n, "/"); resp.Header.Get("Hanse-Error") != "unreachable" {
			t.Errorf("%s", resp.Status)
		}
	})
	t.Run("not from a gateway", func(t *testing.T) {
		guarded := start(t, west.Source("/ns/shop/sa/payments"), func(c *sidecar.Config) { c.GatewaysOnly = append(c.GatewaysOnly, mustAddr("127.9.9.9")) })
		n := start(t, west.Source("/ns/shop/sa/frontend"))
		n.calls(proxy.HTTP, authority, []*proxy.Endpoint{guarded.endpoint("e1")})
		if resp, _ := get(t, n, "/"); resp.Header.Get("Hanse-Error") != "unreachable" {
			t.Errorf("%s", resp.Status)
		}
	})
	if reached.Load() != 0 {
		t.Errorf("the application was reached %d times", reached.Load())
	}
}

// TestForeignPeer: a caller without our headers is served by authority, and cannot speak in a proxy's name.
func TestForeignPeer(t *testing.T) {
	west := proxytest.NewDomain(t, "west.test")
	pay := start(t, west.Source("/ns/shop/sa/payments"), func(c *sidecar.Config) {
		c.ReportPeerAddress = true
		c.Apps[8080] = app(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Hanse-Unprocessed", "true")
			fmt.Fprint(w, r.Header.Get("X-Forwarded-Client-Cert"), " ", r.Header.Get("Hanse-Peer-Address") != "")
		}))
	})
	pay.serves(proxy.HTTP, authority)
	src := west.Source("/ns/shop/sa/frontend")
	c := hop.NewClient(hop.ClientConfig{Source: src, ConnectTimeout: 5 * time.Second})
	run(t, c.Run)
	e := pay.endpoint("e1")
	for _, host := range []string{authority, "127.0.0.1:8080", "payments.shop.svc.clusterset.local"} {
		req, _ := http.NewRequestWithContext(t.Context(), "GET", "https://"+host+"/", nil)
		req.Header.Set("X-Forwarded-Client-Cert", "URI=spiffe://evil")
		resp, err := roundTrip(c, hop.Peer{Address: e.Address, SPIFFEID: e.SPIFFEID}, req)
		if got := text(t, resp, err); got != "URI=spiffe://west.test/ns/shop/sa/frontend true" || resp.Header.Get("Hanse-Unprocessed") != "" {
			t.Errorf("%s: %s %q", host, resp.Status, got)
		}
	}
	for host, want := range map[string]int{"127.0.0.1:22": 421, "10.0.0.1:8080": 421, "payments.shop.svc.clusterset.local:22": 421} {
		req, _ := http.NewRequestWithContext(t.Context(), "GET", "https://"+host+"/", nil)
		resp, err := roundTrip(c, hop.Peer{Address: e.Address, SPIFFEID: e.SPIFFEID}, req)
		if _ = text(t, resp, err); resp.StatusCode != want {
			t.Errorf("%s: %s", host, resp.Status)
		}
	}
}

// TestSmuggling: what two readers could frame differently is refused at the door.
func TestSmuggling(t *testing.T) {
	var paths []string
	var mu sync.Mutex
	front, _ := local(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		mu.Lock()
		defer mu.Unlock()
		paths = append(paths, r.URL.Path)
	}))
	for name, req := range map[string]string{
		"CL and TE":  "POST /a HTTP/1.1\r\nHost: payments:8080\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: payments:8080\r\n\r\n",
		"two CL":     "POST /a HTTP/1.1\r\nHost: payments:8080\r\nContent-Length: 0\r\nContent-Length: 44\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: payments:8080\r\n\r\n",
		"refused ws": "GET /a HTTP/1.1\r\nHost: other:8080\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nPOST /smuggled HTTP/1.1\nHost: payments:8080\n\n",
	} {
		t.Run(name, func(t *testing.T) {
			c, err := net.Dial("tcp", front.outbound)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(5 * time.Second))
			_, _ = io.WriteString(c, req)
			br := bufio.NewReader(c)
			resp, err := http.ReadResponse(br, nil)
			if err != nil || resp.StatusCode < 400 {
				t.Fatalf("%v, %v", resp, err)
			}
			_, _ = io.Copy(io.Discard, resp.Body)
			if rest, err := io.ReadAll(br); len(rest) > 0 || err != nil {
				t.Errorf("the connection goes on: %q, %v", rest, err)
			}
		})
	}
	mu.Lock()
	defer mu.Unlock()
	if len(paths) > 0 {
		t.Errorf("the application saw %v", paths)
	}
}

func mustAddr(s string) netip.Addr { return netip.MustParseAddr(s) }

// TestPlaintext: an endpoint of the own cluster without identity, where the control plane gives it one.
func TestPlaintext(t *testing.T) {
	west := proxytest.NewDomain(t, "west.test")
	n := start(t, west.Source("/ns/shop/sa/frontend"))
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") != "" {
			c, err := websocket.Accept(w, r, &websocket.AcceptOptions{InsecureSkipVerify: true})
			if err == nil {
				_ = c.Write(r.Context(), websocket.MessageText, []byte(r.URL.Path))
				_ = c.Close(websocket.StatusNormalClosure, "")
			}
			return
		}
		fmt.Fprint(w, r.Host, r.URL.Path, r.Header.Get("Hanse-Target"))
	}))
	defer srv.Close()
	e := &proxy.Endpoint{ID: "p1", Address: netip.MustParseAddrPort(srv.Listener.Addr().String()), Transport: proxy.TransportPlaintext, Weight: 1, Locality: proxy.Locality{Cluster: "west"}}
	n.calls(proxy.HTTP, authority, []*proxy.Endpoint{e})
	if resp, got := get(t, n, "/x"); got != "payments:8080/x" {
		t.Errorf("%s %q", resp.Status, got)
	}
	c, _, err := websocket.Dial(t.Context(), "ws://payments:8080/ws", &websocket.DialOptions{HTTPClient: n.http()})
	if err != nil {
		t.Fatal(err)
	}
	defer c.CloseNow()
	if _, b, err := c.Read(t.Context()); err != nil || string(b) != "/ws" {
		t.Errorf("%q, %v", b, err)
	}
}

// TestPlaintextComesBack: an endpoint without identity that was dead is found well again by a connection.
func TestPlaintextComesBack(t *testing.T) {
	n := start(t, proxytest.NewDomain(t, "west.test").Source("/ns/shop/sa/frontend"))
	plain := func(id, zone string, ln net.Listener) *proxy.Endpoint {
		return &proxy.Endpoint{ID: id, Address: netip.MustParseAddrPort(ln.Addr().String()), Transport: proxy.TransportPlaintext, Weight: 1,
			Locality: proxy.Locality{Cluster: "west", Zone: zone}}
	}
	near, far := listen(t), listen(t)
	e := plain("near", "a", near)
	n.calls(proxy.HTTP, authority, []*proxy.Endpoint{e}, []*proxy.Endpoint{plain("far", "b", far)})
	_ = near.Close()
	other := &http.Server{Handler: says("far")}
	defer other.Close()
	go func() { _ = other.Serve(far) }()
	if resp, got := get(t, n, "/"); got != "far" {
		t.Fatalf("%s %q while near is away", resp.Status, got)
	}
	near, err := net.Listen("tcp", e.Address.String())
	if err != nil {
		t.Fatal(err)
	}
	back := &http.Server{Handler: says("near")}
	defer back.Close()
	go func() { _ = back.Serve(near) }()
	eventually(t, "calls to near", func() bool { _, got := get(t, n, "/"); return got == "near" })
}

func roundTrip(c *hop.Client, peer hop.Peer, req *http.Request) (*http.Response, error) {
	return proxytest.RoundTrip(func(ctx context.Context, r *message.Request, o message.Options) (message.ClientStream, error) {
		return c.Open(ctx, peer, r, o)
	}, req)
}
