package sidecar_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hanse-mesh/hanse/proxy"
	"github.com/hanse-mesh/hanse/proxy/proxytest"
	"github.com/hanse-mesh/hanse/proxy/sidecar"
)

// mesh is a frontend and two payments, which serve HTTP/1.1, HTTP/2 and TCP, each behind a cable that can be cut.
type mesh struct {
	t         *testing.T
	west      *proxytest.Domain
	front     *node
	pays      []*node
	cables    []*cable
	tcp       string            // front's listener of the TCP service
	addressed []*proxy.Endpoint // of pays
	callers   *traffic
}

const (
	overHTTP1 = "payments.shop.svc.clusterset.local:8080"
	overHTTP2 = "payments.shop.svc.clusterset.local:8081"
	overTCP   = "payments.shop.svc.clusterset.local:9000"
)

func newMesh(t *testing.T) *mesh {
	t.Helper()
	m := &mesh{t: t, west: proxytest.NewDomain(t, "west.test")}
	local := listen(t)
	m.tcp = local.Addr().String()
	for i := range 2 {
		web, raw := app(t, http.HandlerFunc(m.answer)), m.stamps()
		pay := start(t, m.west.Source("/ns/shop/sa/payments"), func(c *sidecar.Config) {
			c.Apps[8080], c.Apps[8081], c.Apps[9000] = web, web, raw
		})
		m.pays = append(m.pays, pay)
		m.open(pay)
		cut := newCable(t, pay.hop.String())
		m.cables = append(m.cables, cut)
		e := pay.endpoint(fmt.Sprintf("e%d", i))
		e.Address = cut.address
		m.addressed = append(m.addressed, e)
	}
	m.front = start(t, m.west.Source("/ns/shop/sa/frontend"), func(c *sidecar.Config) {
		c.Local = []sidecar.LocalListener{{Listener: local, Authority: "payments.shop:9000"}}
	})
	m.route(m.addressed...)
	return m
}

// open declares the ports of a payments.
func (m *mesh) open(pay *node) {
	access := proxy.Access{TrustDomain: "west.test", Allow: []proxy.AccessRule{{Policy: "AccessPolicy shop/test", From: []string{"spiffe://*/ns/shop/sa/frontend"}}}}
	pay.control.change(func(t *proxy.Table) {
		t.Inbound = &proxy.Inbound{Address: netip.MustParseAddr("127.0.0.1"), Ports: []proxy.InboundPort{
			{Services: []string{overHTTP1}, Port: 8080, Protocol: proxy.HTTP, Access: access},
			{Services: []string{overHTTP2}, Port: 8081, Protocol: proxy.HTTP2, Access: access},
			{Services: []string{overTCP}, Port: 9000, Protocol: proxy.TCP, Access: access},
		}}
	})
}

// route lets all three services have these endpoints.
func (m *mesh) route(endpoints ...*proxy.Endpoint) {
	m.front.calls(proxy.HTTP, overHTTP1, endpoints)
	m.front.calls(proxy.HTTP2, overHTTP2, endpoints)
	m.front.calls(proxy.TCP, overTCP, endpoints)
}

// stamped is a body that says all over whose it is.
func stamped(id string, n int) []byte {
	return bytes.Repeat([]byte(id+"\n"), n/(len(id)+1)+1)[:n]
}

// answer is the application: it checks the body that it is sent, and answers with as many bytes as it is asked for.
//
//	?id=…&n=bytes of the answer &abort=break off half way &slow=in small pieces &head=bytes of a field
func (m *mesh) answer(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	id := q.Get("id")
	n, _ := strconv.Atoi(q.Get("n"))
	body, err := io.ReadAll(r.Body)
	if !bytes.Equal(body, stamped(id, len(body))) {
		m.t.Errorf("request %s came with the body of another: %.60q", id, body)
	}
	if err != nil {
		return
	}
	if want := q.Get("sent"); want != "" && want != strconv.Itoa(len(body)) {
		m.t.Errorf("request %s came with %d of %s bytes", id, len(body), want)
	}
	w.Header().Set("X-Id", id)
	if size, _ := strconv.Atoi(q.Get("head")); size > 0 {
		w.Header().Set("X-Long", strings.Repeat("x", size))
	}
	out := stamped(id, n)
	switch {
	case q.Has("abort"):
		_, _ = w.Write(out[:n/2])
		_ = http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	case q.Has("slow"):
		for piece := range slices.Chunk(out, 1+n/50) {
			_, _ = w.Write(piece)
			_ = http.NewResponseController(w).Flush()
			time.Sleep(5 * time.Millisecond)
		}
	default:
		_, _ = w.Write(out)
	}
}

// stamps is the TCP application: once the caller has closed its half, it sends back all that came.
func (m *mesh) stamps() string {
	ln, err := net.Listen("unix", filepath.Join(m.t.TempDir(), "raw.sock"))
	if err != nil {
		m.t.Fatal(err)
	}
	accept(m.t, ln, func(c net.Conn) {
		br := bufio.NewReader(c)
		id, err := br.ReadString('\n')
		if err != nil {
			return
		}
		_, _ = io.WriteString(c, id) // and now the rest, as it comes
		if _, err := io.Copy(c, br); err != nil {
			return
		}
		_, _ = io.WriteString(c, "the end of "+id)
	})
	return "unix:" + ln.Addr().String()
}

// patience is how long an exchange may take before it is one that hangs. Nothing is measured by it.
const patience = time.Minute

// traffic goes on while something happens to the mesh.
type traffic struct {
	m       *mesh
	over    chan struct{}
	workers sync.WaitGroup
	whole   atomic.Int64
	turns   [12]atomic.Int64 // exchanges that have ended, of each caller

	mu   sync.Mutex
	lost map[string]int // guarded by mu: answers that did not come, or not whole, by what was asked and what was said
}

// traffic starts four callers of each protocol.
func (m *mesh) traffic() *traffic {
	tr := &traffic{m: m, over: make(chan struct{}), lost: map[string]int{}}
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	h2 := &http.Transport{Protocols: protocols, DisableCompression: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", m.front.outbound)
	}}
	m.t.Cleanup(h2.CloseIdleConnections)
	for i := range 4 {
		tr.workers.Go(func() { tr.http1(fmt.Sprintf("one-%d", i), &tr.turns[3*i]) })
		tr.workers.Go(func() { tr.http2(fmt.Sprintf("two-%d", i), h2, &tr.turns[3*i+1]) })
		tr.workers.Go(func() { tr.raw(fmt.Sprintf("raw-%d", i), &tr.turns[3*i+2]) })
	}
	m.callers = tr
	return tr
}

// end stops the callers and fails the test if anything was lost that lost does not allow, or little was done.
func (tr *traffic) end(lost ...string) {
	t := tr.m.t
	t.Helper()
	for deadline := time.Now().Add(patience); tr.whole.Load() < 50 && time.Now().Before(deadline); { // a busy machine takes its time
		time.Sleep(2 * time.Millisecond)
	}
	close(tr.over)
	tr.workers.Wait()
	tr.mu.Lock()
	defer tr.mu.Unlock()
	sum := 0
	for what, n := range tr.lost {
		sum += n
		if !slices.ContainsFunc(lost, func(p string) bool { return strings.HasPrefix(what, p) }) {
			t.Errorf("%d × %s", n, what)
		}
	}
	if tr.whole.Load() < 50 {
		t.Errorf("only %d exchanges", tr.whole.Load())
	}
	t.Logf("%d whole, %d not: %v", tr.whole.Load(), sum, slices.Sorted(maps.Keys(tr.lost)))
}

func (tr *traffic) done() bool {
	select {
	case <-tr.over:
		return true
	default:
		return false
	}
}

func (tr *traffic) lose(what string, err any) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	tr.lost[fmt.Sprintf("%s: %.200v", what, err)]++
}

// round waits until what every caller is at now has ended.
func (tr *traffic) round() {
	var from [len(tr.turns)]int64
	for i := range from {
		from[i] = tr.turns[i].Load()
	}
	for i := range from {
		for deadline := time.Now().Add(patience); tr.turns[i].Load() == from[i]; time.Sleep(2 * time.Millisecond) {
			if time.Now().After(deadline) {
				tr.m.t.Fatalf("caller %d is at one exchange for %s", i, patience)
			}
		}
	}
}

// methods and sizes vary: the first two may be sent again, the third may not.
func shape(i int) (method string, sends, wants int) {
	method = [...]string{"GET", "PUT", "POST"}[i%3]
	sizes := [...]int{0, 100, 5_000, 60_000, 200_000}
	if method != "GET" {
		sends = sizes[i%4]
	}
	return method, sends, sizes[(i/3)%5]
}

// judge notes what became of an exchange.
func (tr *traffic) judge(what, id string, wants int, resp *http.Response, err error) (whole bool) {
	t := tr.m.t
	if err != nil {
		tr.lose(what+" unanswered", err)
		return false
	}
	body, err := io.ReadAll(resp.Body)
	_ = resp.Body.Close()
	if code := resp.Header.Get("Hanse-Error"); code != "" || resp.StatusCode != 200 {
		tr.lose(what+" refused", fmt.Sprint(resp.StatusCode, " ", code, " ", string(body)))
		return false
	}
	if got := resp.Header.Get("X-Id"); got != id || !bytes.Equal(body, stamped(id, len(body))) {
		t.Errorf("%s got the answer of another: id %q, %.60q", id, got, body)
	}
	if err != nil {
		tr.lose(what+" cut", err)
		return false
	}
	if len(body) != wants {
		t.Errorf("%s: %d of %d bytes without an error", id, len(body), wants)
	}
	tr.whole.Add(1)
	return true
}

func (tr *traffic) http1(name string, turns *atomic.Int64) {
	var c net.Conn
	var br *bufio.Reader
	for i := 0; !tr.done(); i++ {
		id := fmt.Sprintf("%s-%d", name, i)
		method, sends, wants := shape(i)
		if c == nil {
			var err error
			if c, err = net.Dial("tcp", tr.m.front.outbound); err != nil {
				tr.lose("dial", err)
				return
			}
			br = bufio.NewReader(c)
		}
		_ = c.SetDeadline(time.Now().Add(patience))
		head := fmt.Sprintf("%s /?id=%s&n=%d&sent=%d HTTP/1.1\r\nHost: payments.shop:8080\r\nContent-Length: %d\r\n\r\n", method, id, wants, sends, sends)
		sent := make(chan struct{})
		go func() {
			defer close(sent)
			_, _ = c.Write(append([]byte(head), stamped(id, sends)...)) // a failure shows in the answer
		}()
		resp, err := http.ReadResponse(br, &http.Request{Method: method})
		whole := tr.judge("http/1.1 "+method, id, wants, resp, err)
		turns.Add(1)
		if !whole || resp.Close {
			_ = c.Close()
			<-sent
			c = nil
		} else {
			<-sent
		}
	}
	if c != nil {
		_ = c.Close()
	}
}

func (tr *traffic) http2(name string, via *http.Transport, turns *atomic.Int64) {
	for i := 0; !tr.done(); i++ {
		id := fmt.Sprintf("%s-%d", name, i)
		method, sends, wants := shape(i)
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		var body io.Reader
		if sends > 0 {
			body = io.NopCloser(bytes.NewReader(stamped(id, sends))) // net/http shall not send it again by itself
		}
		req, err := http.NewRequestWithContext(ctx, method, fmt.Sprintf("http://payments.shop:8081/?id=%s&n=%d&sent=%d", id, wants, sends), body)
		if err != nil {
			tr.m.t.Error(err)
		}
		resp, err := via.RoundTrip(req)
		tr.judge("http/2 "+method, id, wants, resp, err)
		turns.Add(1)
		cancel()
	}
}

// raw sends over TCP, closes its half, and wants all of it back, and the end after it.
func (tr *traffic) raw(name string, turns *atomic.Int64) {
	for i := 0; !tr.done(); i++ {
		id := fmt.Sprintf("%s-%d", name, i)
		_, _, size := shape(i)
		want := append([]byte(id+"\n"), stamped(id, size)...)
		want = append(want, "the end of "+id+"\n"...)
		got, err := tr.once(want[:len(id)+1+size])
		turns.Add(1)
		switch {
		case !bytes.HasPrefix(want, got):
			tr.m.t.Errorf("%s got bytes of another: %.80q", id, got)
		case len(got) < len(want):
			if err == nil {
				err = errors.New("ended early")
			}
			tr.lose("tcp cut", err)
		default:
			tr.whole.Add(1)
		}
	}
}

func (tr *traffic) once(send []byte) ([]byte, error) {
	c, err := net.Dial("tcp", tr.m.tcp)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(patience))
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		_, _ = c.Write(send)
		_ = c.(*net.TCPConn).CloseWrite()
	}()
	got, err := io.ReadAll(c)
	_ = c.Close()
	<-sent
	return got, err
}

// cable carries connections to an address until it is cut.
type cable struct {
	address netip.AddrPort

	mu    sync.Mutex
	dead  bool                // guarded by mu
	conns map[net.Conn]func() // guarded by mu
}

func newCable(t *testing.T, to string) *cable {
	t.Helper()
	ln := listen(t)
	c := &cable{address: netip.MustParseAddrPort(ln.Addr().String()), conns: map[net.Conn]func(){}}
	t.Cleanup(func() { _ = ln.Close(); c.cut() })
	go func() {
		for {
			in, err := ln.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", to)
			if err != nil {
				_ = in.Close()
				continue
			}
			reset := func() {
				for _, x := range []net.Conn{in, out} {
					_ = x.(*net.TCPConn).SetLinger(0)
					_ = x.Close()
				}
			}
			c.mu.Lock()
			if c.dead {
				reset()
			} else {
				c.conns[in] = reset
			}
			c.mu.Unlock()
			carry := func(dst, src net.Conn) {
				_, _ = io.Copy(dst, src)
				_ = dst.(*net.TCPConn).CloseWrite()
			}
			go carry(out, in)
			go carry(in, out)
		}
	}()
	return c
}

// cut resets all connections, and those that come from now on: as when the process at the far end was killed.
func (c *cable) cut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.dead = true
	for in, reset := range c.conns {
		reset()
		delete(c.conns, in)
	}
}

func (c *cable) mend() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.dead = false
}
