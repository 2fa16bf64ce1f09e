package sidecar

import (
	"net"
	"testing"
	"time"

	"github.com/hanse-mesh/hanse/proxy/http2"
	"github.com/hanse-mesh/hanse/proxy/message"
)

// TestIdleHTTP2ConnectionsToApplicationsAreClosed, those in use are not, and the next call opens another.
func TestIdleHTTP2ConnectionsToApplicationsAreClosed(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	ended := make(chan struct{}, 10)
	leave := make(chan struct{})
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				_ = http2.NewServerConn(c, http2.Config{}, func(s message.ServerStream) {
					if s.Request().Path == "/hang" {
						<-leave
					}
					_ = s.Respond(&message.Response{Status: 204}, true)
				}).Serve()
				ended <- struct{}{}
			}()
		}
	}()
	a := (&Sidecar{cfg: Config{Dial: (&net.Dialer{}).DialContext, ConnectTimeout: time.Second}}).newApp(ln.Addr().String())
	a.h2c.idle = 20 * time.Millisecond
	defer a.close()
	call := func(path string) {
		s, err := a.open(t.Context(), &message.Request{Method: "GET", Scheme: "http", Authority: "app", Path: path}, message.Options{End: true}, true)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		if r, err := s.Response(); err != nil || r.Status != 204 {
			t.Fatal(r, err)
		}
	}
	for range 2 {
		call("/")
		select {
		case <-ended:
		case <-time.After(10 * time.Second):
			t.Fatal("an idle connection stays")
		}
	}
	go func() {
		time.Sleep(200 * time.Millisecond) // ten times idle
		select {
		case <-ended:
			t.Error("a connection in use was closed")
		default:
		}
		close(leave)
	}()
	call("/hang")
}
