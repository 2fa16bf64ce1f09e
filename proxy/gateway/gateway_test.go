package gateway

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/proxy"
	"github.com/hanse-mesh/hanse/proxy/proxytest"
)

// control is a control plane of one Table at a time.
type control struct {
	mu      sync.Mutex
	table   *proxy.Table
	changed chan struct{}
}

func (c *control) Table() *proxy.Table {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.table
}

func (c *control) Changed() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.changed
}

func (c *control) set(t *proxy.Table) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.table = t
	close(c.changed)
	c.changed = make(chan struct{})
}

type harness struct {
	control *control
	g       *Gateway
	addr    string
	west    *proxytest.Domain
	src     *identity.Source
	stop    func()
	metrics *prometheus.Registry
}

// start runs a gateway before one TLS echo server, which is "e1".
func start(t *testing.T, change ...func(*Config)) *harness {
	t.Helper()
	h := &harness{west: proxytest.NewDomain(t, "west.test"), metrics: prometheus.NewRegistry()}
	h.src = h.west.Source("/ns/shop/sa/payments")
	target := listen(t)
	go func() {
		for {
			c, err := target.Accept()
			if err != nil {
				return
			}
			go func() {
				tc := tls.Server(c, identity.ServerTLS(h.src, identity.AuthorizeAny()))
				defer tc.Close()
				if _, err := io.Copy(tc, tc); err == nil {
					_ = tc.CloseWrite()
				}
			}()
		}
	}()
	dead := listen(t)
	_ = dead.Close()
	h.control = &control{changed: make(chan struct{}), table: &proxy.Table{Version: 1, SNI: map[string][]proxy.Target{
		"e1.endpoint.hanse":                  {{ID: "e1", Address: addrOf(target), Weight: 1}},
		"dead.endpoint.hanse":                {{ID: "dead", Address: addrOf(dead), Weight: 1}},
		"payments.shop.svc.clusterset.local": {{ID: "dead", Address: addrOf(dead), Weight: 1}, {ID: "e1", Address: addrOf(target), Weight: 1}},
	}}}
	cfg := Config{Source: h.west.Source("/hanse/gateway"), Control: h.control, Log: slog.New(slog.DiscardHandler), Metrics: h.metrics,
		DrainTimeout: 10 * time.Second, DrainIdle: 30 * time.Millisecond}
	for _, f := range change {
		f(&cfg)
	}
	h.g = New(cfg)
	ln := listen(t)
	h.addr = ln.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- h.g.Serve(ctx, ln) }()
	var once sync.Once
	h.stop = func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
	}
	t.Cleanup(h.stop)
	return h
}

func listen(t *testing.T) net.Listener {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	return ln
}

func addrOf(ln net.Listener) netip.AddrPort { return netip.MustParseAddrPort(ln.Addr().String()) }

// dial makes the TLS connection of a caller in the same trust domain.
func (h *harness) dial(t *testing.T, sni string) (*tls.Conn, error) {
	t.Helper()
	raw, err := net.Dial("tcp", h.addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = raw.Close() })
	_ = raw.SetDeadline(time.Now().Add(10 * time.Second))
	cfg := identity.ClientTLS(h.west.Source("/ns/shop/sa/frontend"), identity.AuthorizeAny())
	cfg.ServerName = sni
	c := tls.Client(raw, cfg)
	return c, c.Handshake()
}

func TestSplice(t *testing.T) {
	h := start(t)
	for _, sni := range []string{"e1.endpoint.hanse", "E1.endpoint.hanse", "payments.shop.svc.clusterset.local"} {
		c, err := h.dial(t, sni)
		if err != nil {
			t.Fatalf("%s: %v", sni, err)
		}
		if id, err := identity.PeerID(c.ConnectionState()); err != nil || id.String() != "spiffe://west.test/ns/shop/sa/payments" {
			t.Errorf("%s: the peer is %s, %v", sni, id, err)
		}
		data := bytes.Repeat([]byte("sealed "), 100_000)
		go func() {
			_, _ = c.Write(data)
			_ = c.CloseWrite()
		}()
		if b, err := io.ReadAll(c); err != nil || !bytes.Equal(b, data) {
			t.Errorf("%s: %d bytes, %v", sni, len(b), err)
		}
	}
	h.stop()
	var m dto.Metric
	if err := h.g.metrics.bytes.WithLabelValues("e1.endpoint.hanse", "in").Write(&m); err != nil || m.GetCounter().GetValue() < 1_400_000 {
		t.Errorf("counted %v bytes, %v", m.GetCounter().GetValue(), err)
	}
}

func TestAlerts(t *testing.T) {
	h := start(t)
	for sni, want := range map[string]string{
		"nobody.endpoint.hanse": "unrecognized name",
		"dead.endpoint.hanse":   "internal error",
		"":                      "unrecognized name",
	} {
		if _, err := h.dial(t, sni); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want the alert %q", sni, err, want)
		}
	}
}

// TestWithdrawnName: a name that the Table no longer has is unknown at once, and what is open goes on.
func TestWithdrawnName(t *testing.T) {
	h := start(t)
	c, err := h.dial(t, "e1.endpoint.hanse")
	if err != nil {
		t.Fatal(err)
	}
	h.control.set(&proxy.Table{Version: 2})
	if _, err := h.dial(t, "e1.endpoint.hanse"); err == nil {
		t.Error("dialled a withdrawn name")
	}
	if _, err := c.Write([]byte("x")); err != nil {
		t.Error(err)
	}
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Errorf("open connection: %v", err)
	}
}

func TestProbe(t *testing.T) {
	h := start(t)
	c, err := h.dial(t, "probe.0123abcd")
	if err != nil {
		t.Fatal(err)
	}
	if id, _ := identity.PeerID(c.ConnectionState()); id.String() != "spiffe://west.test/hanse/gateway" {
		t.Errorf("the prober saw %s", id)
	}
	if b, err := io.ReadAll(c); err != nil || string(b) != "ok\n" {
		t.Errorf("answer %q, %v", b, err)
	}
	raw, err := net.Dial("tcp", h.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	stranger := tls.Client(raw, &tls.Config{ServerName: "probe.x", InsecureSkipVerify: true})
	_ = stranger.Handshake()
	if b, err := io.ReadAll(stranger); err == nil {
		t.Errorf("somebody without an SVID got %q", b)
	}
}

func TestRubbish(t *testing.T) {
	h := start(t, func(c *Config) { c.HandshakeTimeout = 300 * time.Millisecond })
	for name, sent := range map[string]string{
		"http":            "GET / HTTP/1.1\r\nHost: x\r\n\r\n",
		"silence":         "",
		"half a header":   "\x16\x03",
		"endless records": strings.Repeat("\x16\x03\x01\x00\x01\x01", 40),
		"too long":        "\x16\x03\x01\x40\x00\x01\xff\xff\xff" + strings.Repeat("x", 16<<10),
		"not a hello":     "\x16\x03\x01\x00\x04\x02\x00\x00\x00",
	} {
		t.Run(name, func(t *testing.T) {
			c, err := net.Dial("tcp", h.addr)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			_, _ = io.WriteString(c, sent)
			_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
			b, err := io.ReadAll(c)
			if len(b) > 7 || (err != nil && !errors.Is(err, io.EOF) && strings.Contains(err.Error(), "timeout")) {
				t.Errorf("got %q, %v", b, err)
			}
		})
	}
}

func TestLimit(t *testing.T) {
	h := start(t, func(c *Config) { c.MaxConns = 1 })
	if _, err := h.dial(t, "e1.endpoint.hanse"); err != nil {
		t.Fatal(err)
	}
	if _, err := h.dial(t, "e1.endpoint.hanse"); err == nil {
		t.Error("a connection above the limit was served")
	}
}

// TestBlackhole: a drill silences open and new connections, which go on when it ends.
func TestBlackhole(t *testing.T) {
	h := start(t)
	c, err := h.dial(t, "e1.endpoint.hanse")
	if err != nil {
		t.Fatal(err)
	}
	table := *h.control.Table()
	table.Faults = []proxy.Fault{{Drill: "d", Mode: proxy.FaultBlackhole, Share: 100}}
	h.control.set(&table)
	for {
		if holed, _ := h.g.faults.Holed(0); holed {
			break
		}
		time.Sleep(time.Millisecond)
	}
	time.Sleep(20 * time.Millisecond)
	_, _ = c.Write([]byte("x"))
	_ = c.SetReadDeadline(time.Now().Add(150 * time.Millisecond))
	if n, err := c.NetConn().Read(make([]byte, 1)); n > 0 || err == nil {
		t.Error("a byte came through")
	}
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	healed := table
	healed.Faults = nil
	h.control.set(&healed)
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Errorf("after healing: %v", err)
	}
}

// TestDrain: silent connections are closed, busy ones go on until they are over.
func TestDrain(t *testing.T) {
	t.Parallel() // it waits
	h := start(t, func(c *Config) { c.DrainIdle = 2 * time.Second })
	idle, err := h.dial(t, "e1.endpoint.hanse")
	if err != nil {
		t.Fatal(err)
	}
	busy, err := h.dial(t, "e1.endpoint.hanse")
	if err != nil {
		t.Fatal(err)
	}
	stopped := make(chan struct{})
	go func() { h.stop(); close(stopped) }()
	idleClosed := make(chan struct{})
	go func() { _, _ = idle.Read(make([]byte, 1)); close(idleClosed) }()
	rounds := 0
	for open := true; open; rounds++ {
		if _, err := fmt.Fprint(busy, "x"); err != nil {
			t.Fatalf("round %d: %v", rounds, err)
		}
		if _, err := io.ReadFull(busy, make([]byte, 1)); err != nil {
			t.Fatalf("round %d: %v", rounds, err)
		}
		select {
		case <-idleClosed:
			open = false
		case <-time.After(5 * time.Millisecond):
		}
	}
	_ = busy.Close()
	<-stopped
}

// hello returns what crypto/tls sends first.
func hello(t testing.TB, sni string) []byte {
	t.Helper()
	a, b := net.Pipe()
	defer b.Close()
	go func() { _ = tls.Client(a, &tls.Config{ServerName: sni, InsecureSkipVerify: true}).Handshake() }()
	_ = b.SetReadDeadline(time.Now().Add(5 * time.Second))
	head := make([]byte, 5)
	if _, err := io.ReadFull(b, head); err != nil {
		t.Fatal(err)
	}
	body := make([]byte, int(head[3])<<8|int(head[4]))
	if _, err := io.ReadFull(b, body); err != nil {
		t.Fatal(err)
	}
	return append(head, body...)
}

// TestFragments: a hello may be spread over several records (RFC 8446 §5.1).
func TestFragments(t *testing.T) {
	whole := hello(t, "e1.endpoint.hanse")
	var split []byte
	for body := whole[5:]; len(body) > 0; {
		n := min(len(body), 200)
		split = append(split, 22, 3, 1, byte(n>>8), byte(n))
		split = append(split, body[:n]...)
		body = body[n:]
	}
	raw, name, err := ReadHello(bytes.NewReader(append(split, "next"...)))
	if err != nil || name != "e1.endpoint.hanse" || !bytes.Equal(raw, split) {
		t.Errorf("name %q, %d of %d bytes, %v", name, len(raw), len(split), err)
	}
}

// FuzzReadHello: never a panic, never more bytes than given.
func FuzzReadHello(f *testing.F) {
	const head = "\x03\x03" + "12345678901234567890123456789012" + "\x00" + "\x00\x02\x13\x01" + "\x01\x00"
	sni := "\x00\x00\x00\x0e" + "\x00\x0c" + "\x00\x00\x09" + "e1.ep.han"
	for _, extensions := range []string{"", "\x00\x00", "\x00\x12" + sni, "\x00\x19" + "\x00\x2b\x00\x03\x02\x03\x04" + sni} {
		n := len(head) + len(extensions)
		f.Add([]byte("\x16\x03\x01\x00" + string(rune(n+4)) + "\x01\x00\x00" + string(rune(n)) + head + extensions))
	}
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		raw, name, err := ReadHello(bytes.NewReader(b))
		if !bytes.HasPrefix(b, raw) {
			t.Fatal("raw is not what was read")
		}
		if err == nil && !validName([]byte(name)) {
			t.Fatalf("name %q", name)
		}
	})
}

// TestReadsAsCryptoTLS: a damaged hello is refused, or read as crypto/tls reads it. (Not a fuzz target: crypto/tls is random.)
func TestReadsAsCryptoTLS(t *testing.T) {
	whole, rnd := hello(t, "e1.endpoint.hanse"), rand.New(rand.NewPCG(1, 2))
	at := bytes.Index(whole, []byte("e1.endpoint.hanse"))
	accepted := 0
	for range 3000 {
		b := bytes.Clone(whole)
		for range 1 + rnd.IntN(2) {
			if rnd.IntN(2) == 0 { // around the name, where lengths are
				b[at-9+rnd.IntN(30)] = byte(rnd.IntN(256))
			} else {
				b[rnd.IntN(len(b))] = byte(rnd.IntN(256))
			}
		}
		_, name, err := ReadHello(bytes.NewReader(b))
		if err != nil {
			continue
		}
		accepted++
		std := ""
		server := tls.Server(readOnly{bytes.NewReader(b)}, &tls.Config{GetConfigForClient: func(h *tls.ClientHelloInfo) (*tls.Config, error) {
			std = strings.ToLower(h.ServerName)
			return nil, errors.New("enough")
		}})
		_ = server.Handshake()
		if std != "" && std != strings.TrimSuffix(name, ".") {
			t.Fatalf("we read %q, crypto/tls %q", name, std)
		}
	}
	if accepted < 100 {
		t.Errorf("only %d were accepted", accepted)
	}
}

type readOnly struct{ r io.Reader }

func (c readOnly) Read(p []byte) (int, error)     { return c.r.Read(p) }
func (readOnly) Write(p []byte) (int, error)      { return len(p), nil }
func (readOnly) Close() error                     { return nil }
func (readOnly) LocalAddr() net.Addr              { return &net.TCPAddr{} }
func (readOnly) RemoteAddr() net.Addr             { return &net.TCPAddr{} }
func (readOnly) SetDeadline(time.Time) error      { return nil }
func (readOnly) SetReadDeadline(time.Time) error  { return nil }
func (readOnly) SetWriteDeadline(time.Time) error { return nil }
