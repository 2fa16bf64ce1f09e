package main

import (
	"context"
	"net"
	"testing"
	"time"
)

func TestSwitchboardSilencesAndCuts(t *testing.T) {
	board := newSwitchboard()
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
