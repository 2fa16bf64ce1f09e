package main

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"os"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/identity/ca"
)

func TestSwitchboardSilencesAndCuts(t *testing.T) {
	board := newSwitchboard(identity.NewSource())
	raw, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := board.listen(raw, true)
	defer l.Close()
	go func() { // echoes, connection by connection
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				b := make([]byte, 1)
				for {
					if _, err := c.Read(b); err != nil {
						return
					}
					if _, err := c.Write(b); err != nil {
						return
					}
				}
			}()
		}
	}()
	dial := func() net.Conn {
		c, err := net.Dial("tcp", raw.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	answers := func(c net.Conn, within time.Duration) error {
		if _, err := c.Write([]byte("x")); err != nil {
			return err
		}
		if err := c.SetReadDeadline(time.Now().Add(within)); err != nil {
			return err
		}
		_, err := c.Read(make([]byte, 1))
		return err
	}
	c := dial()
	if err := answers(c, 5*time.Second); err != nil {
		t.Fatalf("open: %v", err)
	}

	board.Silence(time.Hour)
	if err := answers(c, 50*time.Millisecond); err == nil {
		t.Error("a silenced control plane answered")
	}
	board.Heal()
	if err := c.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 1)); err != nil {
		t.Errorf("healed, the held answer does not come: %v", err)
	}

	board.CutFederation(30 * time.Millisecond)
	if err := answers(c, 5*time.Second); err == nil {
		t.Error("a cut link answered")
	}
	if _, err := board.dial(context.Background(), "tcp", raw.Addr().String()); err == nil {
		t.Error("a link was made while cut")
	}
	for deadline := time.Now().Add(5 * time.Second); ; { // it heals by itself
		if conn, err := board.dial(context.Background(), "tcp", raw.Addr().String()); err == nil {
			defer conn.Close()
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("still cut: %v", err)
		}
		time.Sleep(time.Millisecond)
	}
	if err := answers(dial(), 5*time.Second); err != nil {
		t.Errorf("after the cut healed: %v", err)
	}
}

// A connection ends when the bundles no longer verify its peer, whichever side opened it; others stay.
func TestSwitchboardClosesWhatIsDistrusted(t *testing.T) {
	authority := func(td string) (*ca.Authority, *identity.Source) {
		a, err := ca.Open(ca.Config{Dir: t.TempDir(), TrustDomain: spiffeid.RequireTrustDomainFromString(td)})
		if err != nil {
			t.Fatal(err)
		}
		svid, err := a.NewSVID(identity.ControlPlaneID(a.TrustDomain()), 0)
		if err != nil {
			t.Fatal(err)
		}
		src := identity.NewSource()
		src.SetSVID(svid)
		return a, src
	}
	west, src := authority("west.test")
	east, eastSource := authority("east.test")
	north, northSource := authority("north.test")
	trust := func(src *identity.Source, as ...*ca.Authority) {
		m := map[spiffeid.TrustDomain]*spiffebundle.Bundle{}
		for _, a := range as {
			m[a.TrustDomain()] = a.Bundle()
		}
		src.SetBundles(m)
	}
	trust(src, west, east, north)
	trust(eastSource, west)
	trust(northSource, west)

	board := newSwitchboard(src)
	raw, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := board.listen(raw, false)
	defer l.Close()
	accepted := make(chan *tls.Conn, 2)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			s := tls.Server(c, identity.Reporting(identity.ServerTLS(src, identity.AuthorizeAny(), "h2")))
			if s.Handshake() == nil {
				accepted <- s
			}
		}
	}()
	connect := func(src *identity.Source) (client, server *tls.Conn) {
		c, err := net.Dial("tcp", raw.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		client = tls.Client(c, identity.ClientTLS(src, identity.AuthorizeAny(), "h2"))
		if err := client.Handshake(); err != nil {
			t.Fatal(err)
		}
		return client, <-accepted
	}
	fromEast, _ := connect(eastSource)
	fromNorth, north1 := connect(northSource)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- board.watch(ctx, slog.New(slog.DiscardHandler)) }()

	start := time.Now()
	trust(src, west, north)
	_ = fromEast.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := fromEast.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the connection of one who is no longer trusted: %v", err)
	}
	for deadline := time.Now().Add(5 * time.Second); board.closed(start) != 1; time.Sleep(10 * time.Millisecond) { // it is counted after it was closed
		if time.Now().After(deadline) {
			t.Fatalf("%d connections closed, want 1", board.closed(start))
		}
	}
	if _, err := north1.Write([]byte("x")); err != nil {
		t.Errorf("the connection of another: %v", err)
	}
	if _, err := fromNorth.Read(make([]byte, 1)); err != nil {
		t.Errorf("the connection of another: %v", err)
	}
	cancel()
	<-done
}
