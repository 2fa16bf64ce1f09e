package main

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hanse-mesh/hanse/cmd/echo/echopb"
)

// TestCallServe: the client understands the server in every protocol.
func TestCallServe(t *testing.T) {
	s := &server{who: Who{Service: "payments", Cluster: "west", Zone: "a", Instance: "1"}}
	free := func() string {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		return ln.Addr().String()
	}
	web, raw, datagrams := free(), free(), free()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- s.run(ctx, []string{web}, []string{raw}, []string{datagrams}, nil) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	for {
		if c, err := net.Dial("tcp", raw); err == nil {
			_ = c.Close()
			break
		}
	}
	for _, tc := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"http://" + web + "/a?b=c", "-body", "hi", "-method", "POST", "-header", "x-forwarded-client-cert: URI=spiffe://west.test/ns/shop/sa/frontend"}, 0, `"caller":"spiffe://west.test/ns/shop/sa/frontend"`},
		{[]string{"http://" + web + "/status/503"}, 1, `503`},
		{[]string{"ws://" + web + "/ws", "-body", "hi"}, 0, `"service":"payments"`},
		{[]string{"grpc://" + web, "-body", "hi"}, 0, `"zone":"a"`},
		{[]string{"grpc://" + web, "-body", "hi", "-stream", "client"}, 0, `hi,hi,hi`},
		{[]string{"grpc://" + web, "-body", "hi", "-stream", "server"}, 0, `"ok":true`},
		{[]string{"grpc://" + web, "-body", "hi", "-stream", "bidi"}, 0, `"ok":true`},
		{[]string{"tcp://" + raw, "-body", "hi"}, 0, `"ok":true`},
		{[]string{"udp://" + datagrams, "-body", "hi"}, 0, `"text":"hi"`},
	} {
		var out, errs bytes.Buffer
		args := append([]string{"call", "-proxy", ""}, append(tc.args[1:], tc.args[0])...)
		code := run(args, &out, &errs)
		if code != tc.code || !strings.Contains(out.String(), tc.want) || !json.Valid(out.Bytes()) {
			t.Errorf("%v: exit %d\n%s%s", tc.args, code, out.String(), errs.String())
		}
	}
}

func TestUsage(t *testing.T) {
	for _, args := range [][]string{{}, {"serve"}, {"call"}, {"call", "payments"}, {"dance"}} {
		var out, errs bytes.Buffer
		if code := run(args, &out, &errs); code != 2 || errs.Len() == 0 {
			t.Errorf("%v: exit %d, %q", args, code, errs.String())
		}
	}
}

// ended is a stream that the server has ended before anything was sent.
type ended struct {
	grpc.BidiStreamingClient[echopb.Request, echopb.Reply]
}

func (ended) Send(*echopb.Request) error   { return io.EOF }
func (ended) Recv() (*echopb.Reply, error) { return nil, status.Error(codes.PermissionDenied, "no") }
func (ended) CloseSend() error             { return nil }

type endedClient struct{ echopb.EchoClient }

func (endedClient) BidiStream(context.Context, ...grpc.CallOption) (grpc.BidiStreamingClient[echopb.Request, echopb.Reply], error) {
	return ended{}, nil
}

// TestEndedStream: a call whose stream was refused before the first message could be sent has failed.
func TestEndedStream(t *testing.T) {
	c := &caller{stream: "bidi"}
	if reply, err := c.exchange(t.Context(), endedClient{}); status.Code(err) != codes.PermissionDenied {
		t.Errorf("%v, %v; want the server's refusal", reply, err)
	}
}
