package sidecar_test

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hanse-mesh/hanse/proxy"
	"github.com/hanse-mesh/hanse/proxy/proxytest"
	"github.com/hanse-mesh/hanse/proxy/sidecar"
)

// eventually waits for what happens at the other end of a call.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
	}
}

func (n *node) faults(faults ...proxy.Fault) {
	n.control.change(func(t *proxy.Table) { t.Faults = faults })
}

// TestBlackhole: an endpoint that falls silent, PINGs included, is found by the hop, and calls shift.
func TestBlackhole(t *testing.T) {
	front, pays := local(t, says("0"), says("1"))
	front.calls(proxy.HTTP, authority, []*proxy.Endpoint{pays[0].endpoint("e0")}, []*proxy.Endpoint{pays[1].endpoint("e1")})
	if _, got := get(t, front, "/"); got != "0" {
		t.Fatalf("got %q before the fault", got)
	}
	pays[0].faults(proxy.Fault{Drill: "d", Mode: proxy.FaultBlackhole, Share: 100, End: time.Minute})
	eventually(t, "shift to e1", func() bool {
		resp, got := get(t, front, "/")
		if resp.StatusCode != 200 {
			t.Fatalf("a call failed: %s %q", resp.Status, got) // GET: sent again
		}
		return got == "1"
	})
	pays[0].faults()
	eventually(t, "return to e0", func() bool { _, got := get(t, front, "/"); return got == "0" })
}

// TestOneBlackHoleIsEnough: endpoints fall silent at once. A call loses the time in which one silence is noticed, and is answered by the second endpoint
// that it tries. Where connections are open, it is known by then who else is silent; where none is, the place of the first is left.
func TestOneBlackHoleIsEnough(t *testing.T) {
	for _, c := range []struct {
		name     string
		protocol proxy.Protocol
		open     bool // connections to the nearest
		silent   int  // so many of e0 and e1 in west/a, e2 in west/b, e3 in east/a
		answers  string
	}{
		{"HTTP, a cluster", proxy.HTTP, true, 3, "e3"},
		{"TCP, a cluster", proxy.TCP, true, 3, "e3"},
		{"HTTP, a zone, nothing open", proxy.HTTP, false, 2, "e2"},
		{"TCP, a zone, nothing open", proxy.TCP, false, 2, "e2"},
	} {
		t.Run(c.name, func(t *testing.T) {
			west := proxytest.NewDomain(t, "west.test")
			front := start(t, west.Source("/ns/shop/sa/frontend"))
			var levels [3][]*proxy.Endpoint
			var pays []*node
			for i, at := range []struct {
				level         int
				cluster, zone string
			}{{0, "west", "a"}, {0, "west", "a"}, {1, "west", "b"}, {2, "east", "a"}} {
				address := tcpApp(t)
				if c.protocol == proxy.HTTP {
					address = app(t, says("ok"))
				}
				pay := start(t, west.Source("/ns/shop/sa/payments"), func(c *sidecar.Config) { c.Apps[8080] = address })
				pay.serves(c.protocol, authority)
				e := pay.endpoint(fmt.Sprintf("e%d", i))
				e.Locality = proxy.Locality{Cluster: at.cluster, Region: "eu", Zone: at.zone}
				levels[at.level], pays = append(levels[at.level], e), append(pays, pay)
			}
			front.calls(c.protocol, authority, levels[:]...)
			call := func() {
				if c.protocol == proxy.HTTP {
					if resp, got := get(t, front, "/"); resp.StatusCode != 200 {
						t.Errorf("a call failed: %s %q", resp.Status, got)
					}
					return
				}
				conn, err := net.Dial("tcp", front.outbound)
				if err != nil {
					t.Error(err)
					return
				}
				defer conn.Close()
				fmt.Fprint(conn, "CONNECT payments.shop:8080 HTTP/1.1\r\nHost: payments.shop:8080\r\n\r\n")
				if line, err := bufio.NewReader(conn).ReadString('\n'); err != nil || !strings.Contains(line, " 200 ") {
					t.Errorf("a tunnel failed: %q, %v", line, err)
				}
			}
			if c.open {
				for i := 0; i < 50 && len(front.client.Connections()) < 2; i++ {
					call()
				}
			}
			for i := c.silent - 1; i >= 0; i-- {
				pays[i].faults(proxy.Fault{Drill: "d", Mode: proxy.FaultBlackhole, Share: 100, End: time.Minute})
			}
			for i := range c.silent {
				eventually(t, "silence", func() bool { return mute(pays[i]) })
			}
			tries := map[string]int{} // of a call, at most, by who answered in the end
			eventually(t, "an answer after a silence", func() bool {
				var callers sync.WaitGroup
				for range 4 {
					callers.Go(call)
				}
				callers.Wait()
				for line := range strings.Lines(front.log.String()) {
					var l struct {
						Endpoint string
						Tries    int
					}
					if err := json.Unmarshal([]byte(line), &l); err != nil {
						t.Fatalf("%v: %s", err, line)
					}
					tries[l.Endpoint] = max(tries[l.Endpoint], l.Tries)
				}
				return tries[c.answers] > 1
			})
			for id, n := range tries {
				if n > 2 || n > 1 && id != c.answers {
					t.Errorf("a call met more than one silence: tries %v", tries)
				}
			}
			for i := range c.silent {
				pays[i].faults() // it drains
			}
		})
	}
}

// mute reports whether a node answers no TLS handshake.
func mute(of *node) bool {
	c, err := tls.DialWithDialer(&net.Dialer{Timeout: 100 * time.Millisecond}, "tcp", of.hop.String(), &tls.Config{InsecureSkipVerify: true})
	if err == nil {
		_ = c.Close()
	}
	var late net.Error
	return errors.As(err, &late) && late.Timeout()
}

// TestExpiredAndDistrusted: what a drill does to identities is refused by the other end's handshake; open connections take no new streams, or
// end; calls shift, and come back when the fault goes.
func TestExpiredAndDistrusted(t *testing.T) {
	front, pays := local(t, says("0"), says("1"))
	front.calls(proxy.HTTP, authority, []*proxy.Endpoint{pays[0].endpoint("e0")}, []*proxy.Endpoint{pays[1].endpoint("e1")})
	shifts := func(want string) {
		t.Helper()
		eventually(t, "shift to "+want, func() bool {
			resp, got := get(t, front, "/")
			if resp.StatusCode != 200 {
				t.Fatalf("a call failed: %s %q", resp.Status, got) // GET: sent again
			}
			return got == want
		})
	}
	shifts("0")
	pays[0].faults(proxy.Fault{Drill: "d", Mode: proxy.FaultExpire, Share: 100, End: time.Minute})
	shifts("1")
	pays[0].faults()
	shifts("0")
	pays[0].faults(proxy.Fault{Drill: "e", Mode: proxy.FaultExpire, Share: 100, End: 500 * time.Millisecond})
	shifts("1")
	shifts("0") // by its own clock
	pays[0].faults(proxy.Fault{Drill: "f", Mode: proxy.FaultDistrust, Root: "west.test", Share: 100, End: time.Minute, Lease: time.Second})
	shifts("1")
	shifts("0") // nobody renewed it
	front.faults(proxy.Fault{Drill: "g", Mode: proxy.FaultDistrust, Root: "west.test", Share: 100, End: time.Minute})
	eventually(t, "the caller refuses all", func() bool { resp, _ := get(t, front, "/"); return resp.StatusCode == 503 })
	front.faults()
	eventually(t, "the caller trusts again", func() bool { resp, _ := get(t, front, "/"); return resp.StatusCode == 200 })
}

// TestFaults of requests: errors, slowness and drain by target port.
func TestFaults(t *testing.T) {
	front, pays := local(t, says("0"), says("1"))
	front.calls(proxy.HTTP, authority, []*proxy.Endpoint{pays[0].endpoint("e0")}, []*proxy.Endpoint{pays[1].endpoint("e1")})
	pays[0].faults(proxy.Fault{Drill: "d", Mode: proxy.FaultErrors, Share: 100, Status: 502, Ports: []uint16{8080}})
	eventually(t, "injected errors", func() bool {
		resp, _ := get(t, front, "/")
		return resp.StatusCode == 502 && resp.Header.Get("Hanse-Error") == "fault"
	})
	pays[0].faults(proxy.Fault{Drill: "e", Mode: proxy.FaultSlow, Share: 100, Latency: 80 * time.Millisecond})
	eventually(t, "slowness", func() bool {
		began := time.Now()
		resp, got := get(t, front, "/")
		return resp.StatusCode == 200 && got == "0" && time.Since(began) >= 80*time.Millisecond
	})
	pays[0].faults(proxy.Fault{Drill: "f", Mode: proxy.FaultDrain, Share: 100})
	eventually(t, "drained", func() bool {
		resp, got := get(t, front, "/")
		if resp.StatusCode != 200 {
			t.Fatalf("a call failed while draining: %s", resp.Status)
		}
		return got == "1"
	})
	pays[0].faults()
	eventually(t, "served again", func() bool { _, got := get(t, front, "/"); return got == "0" })
}

// TestDrain: a stopping sidecar finishes what is open, loses nothing, and lets the application call out meanwhile.
func TestDrain(t *testing.T) {
	entered, leave := make(chan struct{}), make(chan struct{})
	front, pays := local(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/hang" {
			close(entered)
			<-leave
		}
		fmt.Fprint(w, "0")
	}), says("1"))
	front.calls(proxy.HTTP, authority, []*proxy.Endpoint{pays[0].endpoint("e0")}, []*proxy.Endpoint{pays[1].endpoint("e1")})
	pays[0].calls(proxy.HTTP, authority, []*proxy.Endpoint{pays[1].endpoint("e1")})
	open := make(chan string, 1)
	go func() {
		resp, err := front.http().Get("http://payments:8080/hang")
		if err != nil {
			open <- err.Error()
			return
		}
		defer resp.Body.Close()
		b, _ := io.ReadAll(resp.Body)
		open <- resp.Status + " " + string(b)
	}()
	<-entered
	stopped := make(chan struct{})
	go func() { pays[0].stop(); close(stopped) }()
	eventually(t, "new calls go elsewhere", func() bool {
		resp, err := front.http().Post("http://payments:8080/", "text/plain", strings.NewReader("x"))
		got := text(t, resp, err)
		if resp.StatusCode != 200 {
			t.Fatalf("a call failed: %s %q", resp.Status, got)
		}
		return got == "1"
	})
	// pays[0] may not call pays[1] as the policy is about frontend: the answer shows that the way out is still open.
	if resp, _ := get(t, pays[0], "/"); resp.Header.Get("Hanse-Error") != "denied" {
		t.Errorf("the draining workload's own call: %s", resp.Status)
	}
	close(leave)
	if got := <-open; got != "200 OK 0" {
		t.Errorf("the open call: %s", got)
	}
	<-stopped
}

// TestTableSwap: a new Table touches no open stream, and the next request obeys it.
func TestTableSwap(t *testing.T) {
	step := make(chan struct{})
	front, pays := local(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for range 3 {
			fmt.Fprint(w, "0")
			_ = http.NewResponseController(w).Flush()
			<-step
		}
	}), says("1"))
	front.calls(proxy.HTTP, authority, []*proxy.Endpoint{pays[0].endpoint("e0")})
	resp, err := front.http().Get("http://payments:8080/")
	if err != nil {
		t.Fatal(err)
	}
	front.calls(proxy.HTTP, authority, []*proxy.Endpoint{pays[1].endpoint("e1")})
	pays[0].control.change(func(t *proxy.Table) { t.Inbound = nil })
	if _, got := get(t, front, "/"); got != "1" {
		t.Errorf("new request: %q", got)
	}
	close(step)
	if got := text(t, resp, nil); got != "000" {
		t.Errorf("open stream: %q", got)
	}
}

// TestGatewayKilled: calls go through the other gateway, and endpoints are not blamed.
func TestGatewayKilled(t *testing.T) {
	west, east := proxytest.NewDomain(t, "west.test"), proxytest.NewDomain(t, "east.test")
	pay := start(t, east.Source("/ns/shop/sa/payments", west), func(c *sidecar.Config) { c.Apps[8080] = app(t, says("east")) })
	pay.serves(proxy.HTTP, authority)
	front := start(t, west.Source("/ns/shop/sa/frontend", east))
	e := pay.endpoint("e1")
	a, _, stopA := withGateway(t, east, e)
	b, _, _ := withGateway(t, east, e)
	e.Gateways = []netip.AddrPort{a, b}
	front.calls(proxy.HTTP, authority, []*proxy.Endpoint{e})
	for i := range 30 {
		if i == 10 {
			stopA()
		}
		if resp, got := get(t, front, "/"); got != "east" {
			t.Fatalf("call %d: %s %q", i, resp.Status, got)
		}
	}
}

// TestGatewaySeesNothing: what passes the gateway's wire is TLS, in which neither the request nor the answer can be found.
func TestGatewaySeesNothing(t *testing.T) {
	west, east := proxytest.NewDomain(t, "west.test"), proxytest.NewDomain(t, "east.test")
	pay := start(t, east.Source("/ns/shop/sa/payments", west), func(c *sidecar.Config) { c.Apps[8080] = app(t, says(strings.Repeat("secret answer ", 100))) })
	pay.serves(proxy.HTTP, authority)
	front := start(t, west.Source("/ns/shop/sa/frontend", east))
	e := pay.endpoint("e1")
	behind, _, _ := withGateway(t, east, e)
	wire := &tap{to: behind.String()}
	ln := listen(t)
	defer ln.Close()
	go wire.serve(ln)
	e.Gateways = []netip.AddrPort{netip.MustParseAddrPort(ln.Addr().String())}
	front.calls(proxy.HTTP, authority, []*proxy.Endpoint{e})
	resp, err := front.http().Post("http://payments:8080/secret-path", "text/plain", strings.NewReader(strings.Repeat("secret question ", 100)))
	if got := text(t, resp, err); !strings.HasPrefix(got, "secret answer") {
		t.Fatalf("got %q", got)
	}
	wire.mu.Lock()
	defer wire.mu.Unlock()
	if !bytes.Contains(wire.seen.Bytes(), []byte("e1.endpoint.hanse")) {
		t.Error("the SNI was not on the wire: the test looks at the wrong bytes")
	}
	for _, s := range []string{"secret", "payments", "spiffe://", "frontend"} {
		if bytes.Contains(wire.seen.Bytes(), []byte(s)) {
			t.Errorf("%q was on the wire in the clear", s)
		}
	}
}

// tap forwards and remembers.
type tap struct {
	to   string
	mu   sync.Mutex
	seen bytes.Buffer
}

func (w *tap) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.seen.Write(p)
}

func (w *tap) serve(ln net.Listener) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		out, err := net.Dial("tcp", w.to)
		if err != nil {
			_ = c.Close()
			continue
		}
		go func() { _, _ = io.Copy(io.MultiWriter(out, w), c); _ = out.Close() }()
		go func() { _, _ = io.Copy(io.MultiWriter(c, w), out); _ = c.Close() }()
	}
}

// TestRotationUnderLoad: SVIDs of both ends change all the time, and no call fails.
func TestRotationUnderLoad(t *testing.T) {
	west, east := proxytest.NewDomain(t, "west.test"), proxytest.NewDomain(t, "east.test")
	pay := start(t, east.Source("/ns/shop/sa/payments", west), func(c *sidecar.Config) { c.Apps[8080] = app(t, says("ok")) })
	pay.serves(proxy.HTTP, authority)
	front := start(t, west.Source("/ns/shop/sa/frontend", east))
	front.calls(proxy.HTTP, authority, []*proxy.Endpoint{pay.endpoint("e1")})
	var calls, failed atomic.Int64
	done := make(chan struct{})
	var workers sync.WaitGroup
	for range 4 {
		workers.Go(func() {
			c := front.http()
			for {
				select {
				case <-done:
					return
				default:
				}
				resp, err := c.Post("http://payments:8080/", "text/plain", strings.NewReader("x"))
				if err != nil || resp.StatusCode != 200 {
					failed.Add(1)
				}
				if err == nil {
					_, _ = io.Copy(io.Discard, resp.Body)
					_ = resp.Body.Close()
				}
				calls.Add(1)
			}
		})
	}
	const life = 2250 * time.Millisecond // NotAfter has whole seconds: at least 1.25 s
	for range 12 {
		front.src.SetSVID(west.SVID("/ns/shop/sa/frontend", life))
		pay.src.SetSVID(east.SVID("/ns/shop/sa/payments", life))
		time.Sleep(250 * time.Millisecond)
	}
	close(done)
	workers.Wait()
	if failed.Load() > 0 || calls.Load() < 20 {
		t.Errorf("%d of %d calls failed", failed.Load(), calls.Load())
	}
}
