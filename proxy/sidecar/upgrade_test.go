package sidecar_test

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"github.com/coder/websocket"

	"github.com/hanse-mesh/hanse/proxy"
	"github.com/hanse-mesh/hanse/proxy/http2"
	"github.com/hanse-mesh/hanse/proxy/message"
)

// TestWebSocketOverHTTP2: an application that speaks HTTP/2 to its sidecar upgrades by extended CONNECT (RFC 8441); the application at
// the other end sees HTTP/1.1's Upgrade, with a key that its answer is held to.
func TestWebSocketOverHTTP2(t *testing.T) {
	front, _ := pair(t, proxy.HTTP, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c, err := websocket.Accept(w, r, nil)
		if err != nil {
			t.Error(err)
			return
		}
		kind, b, err := c.Read(r.Context())
		if err != nil {
			t.Error(err)
			return
		}
		_ = c.Write(r.Context(), kind, append([]byte(r.URL.Path+" "), b...))
		_ = c.Close(websocket.StatusNormalClosure, "")
	}))
	nc, err := net.Dial("tcp", front.outbound)
	if err != nil {
		t.Fatal(err)
	}
	c := http2.NewClientConn(nc, http2.Config{})
	defer c.Close(nil)
	s, err := c.Open(&message.Request{Method: "GET", Scheme: "http", Authority: "payments:8080", Path: "/ws", Protocol: "websocket", Length: message.Unknown,
		Fields: message.Fields{{Name: "sec-websocket-version", Value: "13"}}}, message.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	resp, err := s.Response()
	if err != nil || resp.Status != http.StatusSwitchingProtocols {
		t.Fatalf("%+v %v", resp, err)
	}
	// RFC 6455 §5.2: a final text frame, masked with zeros.
	if _, err := s.Write([]byte("\x81\x85\x00\x00\x00\x00hello")); err != nil {
		t.Fatal(err)
	}
	if err := s.Flush(); err != nil {
		t.Fatal(err)
	}
	want := "\x81\x09/ws hello"
	got := make([]byte, len(want))
	if _, err := io.ReadFull(s, got); err != nil || string(got) != want {
		t.Errorf("%q, %v", got, err)
	}
}

// TestUpgradeIgnored: an application may answer an upgrade as if nobody had asked for it.
func TestUpgradeIgnored(t *testing.T) {
	front, _ := pair(t, proxy.HTTP, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Hanse-Status", "404") // not an application's to say
		fmt.Fprintf(w, "plain %s", r.URL.Path)
	}))
	nc, err := net.Dial("tcp", front.outbound)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	_, _ = io.WriteString(nc, "GET /ws HTTP/1.1\r\nHost: payments:8080\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
	b, err := io.ReadAll(nc)
	if err != nil || !strings.HasPrefix(string(b), "HTTP/1.1 200 OK\r\n") || !strings.Contains(string(b), "plain /ws") || strings.Contains(string(b), "hanse-status") {
		t.Errorf("%q, %v", b, err)
	}
}
