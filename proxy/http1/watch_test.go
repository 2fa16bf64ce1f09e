package http1

import (
	"bufio"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/hanse-mesh/hanse/proxy/message"
)

// TestLookingOutLosesNothing: while a handler takes about as long as it takes until somebody looks out for the caller, the caller sends what comes
// next, in one piece or several, or leaves. Nothing of it is lost or given to another exchange, and who stays is never taken for gone.
func TestLookingOutLosesNothing(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	var serving sync.WaitGroup
	defer serving.Wait()
	handle := func(s message.ServerStream) {
		gone := make(chan struct{})
		s.OnAbort(func(error) { close(gone) })
		defer s.OnAbort(nil)
		body, err := io.ReadAll(readerOf{s})
		if err != nil {
			return
		}
		select {
		case <-time.After(watchAfter - 15*time.Millisecond + rand.N(30*time.Millisecond)):
		case <-gone:
			if s.Request().Path != "/leaves" {
				t.Error("taken for gone")
			}
			return
		}
		answer := s.Request().Path + string(body)
		if s.Respond(&message.Response{Status: 200, Length: int64(len(answer))}, false) == nil {
			_, _ = s.Write([]byte(answer))
			_ = s.End(nil)
		}
	}
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			serving.Go(func() { _ = NewServerConn(c, &ServerConfig{}, handle).Serve() })
		}
	}()
	var callers sync.WaitGroup
	for i := range 24 {
		callers.Go(func() {
			c, err := net.Dial("tcp", ln.Addr().String())
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(30 * time.Second))
			br := bufio.NewReader(c)
			var sent sync.WaitGroup
			defer sent.Wait()
			const calls = 12
			sent.Go(func() {
				for j := range calls {
					text := fmt.Sprintf("POST /%d-%d HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello", i, j)
					if j%3 == 0 {
						text = fmt.Sprintf("GET /%d-%d HTTP/1.1\r\nHost: a\r\n\r\n", i, j)
					}
					for at := rand.IntN(len(text)); len(text) > 0; at = len(text) {
						time.Sleep(rand.N(80 * time.Millisecond))
						_, _ = io.WriteString(c, text[:at])
						text = text[at:]
					}
				}
				if i%2 == 0 {
					_, _ = io.WriteString(c, "GET /leaves HTTP/1.1\r\nHost: a\r\n\r\n")
				}
			})
			for j := range calls {
				resp, err := http.ReadResponse(br, nil)
				if err != nil {
					t.Errorf("%d-%d: %v", i, j, err)
					return
				}
				got, err := io.ReadAll(resp.Body)
				want := fmt.Sprintf("/%d-%d", i, j)
				if j%3 != 0 {
					want += "hello"
				}
				if err != nil || string(got) != want {
					t.Errorf("%q, %v; want %q", got, err, want)
					return
				}
			}
		})
	}
	callers.Wait()
}

// readerOf reads the body of a request.
type readerOf struct{ s message.ServerStream }

func (r readerOf) Read(p []byte) (int, error) { return r.s.Read(p) }
