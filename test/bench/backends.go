package main

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"net"
	"strconv"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// backends are the servers at the end of each chain, as cheap as they can be, so that the proxies dominate.
type backends struct {
	http, grpc, tcp string
	close           func()
}

func newBackends() (*backends, error) {
	var lns []net.Listener
	for range 3 {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		lns = append(lns, ln)
	}
	srv := grpc.NewServer()
	srv.RegisterService(&echoService, nil)
	go func() { _ = srv.Serve(lns[1]) }()
	go each(lns[0], serveHTTP)
	go each(lns[2], serveTCP)
	return &backends{lns[0].Addr().String(), lns[1].Addr().String(), lns[2].Addr().String(), func() {
		srv.Stop()
		_ = lns[0].Close()
		_ = lns[2].Close()
	}}, nil
}

func each(ln net.Listener, serve func(net.Conn)) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		go serve(c)
	}
}

// echoService gives back what it is sent.
var echoService = grpc.ServiceDesc{ServiceName: "bench.Echo", HandlerType: (*any)(nil), Methods: []grpc.MethodDesc{{MethodName: "Call",
	Handler: func(_ any, _ context.Context, dec func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
		in := new(wrapperspb.StringValue)
		err := dec(in)
		return in, err
	}}}}

// serveTCP gives back each line.
func serveTCP(c net.Conn) {
	defer c.Close()
	br := bufio.NewReaderSize(c, 512)
	for {
		line, err := br.ReadSlice('\n')
		if err != nil {
			return
		}
		if _, err := c.Write(line); err != nil {
			return
		}
	}
}

var filling = bytes.Repeat([]byte("0123456789abcdef"), 1<<16)

// serveHTTP answers any request for /<bytes> with so many bytes and the request's x-id; with ?fill they repeat the ID.
func serveHTTP(c net.Conn) {
	defer c.Close()
	br := bufio.NewReaderSize(c, 64<<10)
	var out []byte
	for {
		size, id, fill, length := 0, "", false, 0
		for first := true; ; first = false {
			line, err := br.ReadSlice('\n')
			if err != nil {
				return
			}
			if len(line) <= 2 {
				break
			}
			if first {
				_, rest, _ := strings.Cut(string(line), "/")
				n, _, _ := strings.Cut(rest, " ")
				n, _, fill = strings.Cut(n, "?")
				size, _ = strconv.Atoi(n)
				continue
			}
			name, value, _ := bytes.Cut(line, []byte(":"))
			switch {
			case bytes.EqualFold(name, []byte("x-id")):
				id = string(bytes.TrimSpace(value))
			case bytes.EqualFold(name, []byte("content-length")):
				length, _ = strconv.Atoi(string(bytes.TrimSpace(value)))
			}
		}
		if length > 0 {
			if _, err := br.Discard(length); err != nil {
				return
			}
		}
		out = append(out[:0], "HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\nx-id: "...)
		out = append(out, id...)
		out = append(out, "\r\ncontent-length: "...)
		out = strconv.AppendInt(out, int64(size), 10)
		out = append(out, "\r\n\r\n"...)
		if fill {
			out = append(out, filled(id, size)...)
		} else {
			out = append(out, filling[:min(size, 64<<10)]...)
		}
		if _, err := c.Write(out); err != nil {
			return
		}
		if fill {
			continue
		}
		if _, err := io.Copy(c, repeated(size-min(size, 64<<10))); err != nil {
			return
		}
	}
}

// repeated is n bytes of the filling, from a multiple of its period on.
func repeated(n int) io.Reader { return io.LimitReader(endless{}, int64(n)) }

type endless struct{}

func (endless) Read(p []byte) (int, error) {
	n := len(p) &^ 15
	for at := 0; at < n; at += len(filling) {
		copy(p[at:n], filling)
	}
	return n, nil
}

// WriteTo implements io.WriterTo for io.Copy's sake: a mebibyte at a time.
func (endless) WriteTo(w io.Writer) (n int64, err error) {
	for {
		m, err := w.Write(filling)
		n += int64(m)
		if err != nil {
			return n, err
		}
	}
}
