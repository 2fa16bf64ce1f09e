package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// backend answers GET /<bytes> with so many bytes and the request's x-id, cheaply, so that the proxies dominate.
type backend struct {
	address string
	ln      net.Listener
}

func newBackend() (*backend, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go serve(c)
		}
	}()
	return &backend{ln.Addr().String(), ln}, nil
}

func (b *backend) close() { _ = b.ln.Close() }

var filling = bytes.Repeat([]byte("0123456789abcdef"), 1<<16)

func serve(c net.Conn) {
	defer c.Close()
	br := bufio.NewReader(c)
	var out []byte
	for {
		size, id, fill := 0, "", false
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
			if len(line) > 6 && (line[0] == 'x' || line[0] == 'X') && bytes.EqualFold(line[:5], []byte("x-id:")) {
				id = strings.TrimSpace(string(line[5:]))
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
			out = append(out, filling[:min(size, len(filling))]...)
		}
		if _, err := c.Write(out); err != nil {
			return
		}
	}
}

// measure runs a closed loop: each connection sends its next request when the answer to the last one is whole.
func measure(ctx context.Context, p *product, l load, length time.Duration) (result, error) {
	var r result
	begin, end := make(chan struct{}), make(chan struct{})
	type tally struct {
		took []time.Duration
		err  error
	}
	tallies := make([]tally, l.Conns)
	var all sync.WaitGroup
	for i := range l.Conns {
		all.Go(func() { tallies[i].took, tallies[i].err = call(p, l, i, begin, end) })
	}
	time.Sleep(300 * time.Millisecond) // connections, pools, caches
	cpu, start := cpuTime(p.pids), time.Now()
	close(begin)
	select {
	case <-time.After(length):
	case <-ctx.Done():
	}
	cpu = cpuTime(p.pids) - cpu
	took := time.Since(start)
	close(end)
	all.Wait()
	if ctx.Err() != nil {
		return r, ctx.Err()
	}
	var times []time.Duration
	for _, t := range tallies {
		if t.err != nil {
			return r, t.err
		}
		times = append(times, t.took...)
	}
	if len(times) == 0 {
		return r, fmt.Errorf("no answer in %s", length)
	}
	slices.Sort(times)
	r.MicrosCPU = cpu.Seconds() * 1e6 / float64(len(times))
	r.PerSecond = float64(len(times)) / took.Seconds()
	r.P50, r.P99 = times[len(times)/2], times[len(times)*99/100]
	return r, nil
}

// call is one connection's loop; it returns how long each answer took between begin and end.
func call(p *product, l load, n int, begin, end <-chan struct{}) ([]time.Duration, error) {
	c, err := net.Dial("tcp", p.entry)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(5 * time.Minute))
	br := bufio.NewReaderSize(c, 16<<10)
	var took []time.Duration
	var req []byte
	for i := 0; ; i++ {
		counts := false
		select {
		case <-end:
			return took, nil
		case <-begin:
			counts = true
		default:
		}
		id := strconv.Itoa(n) + "-" + strconv.Itoa(i)
		req = fmt.Appendf(req[:0], "GET /%d HTTP/1.1\r\nHost: %s\r\nUser-Agent: bench\r\nAccept: */*\r\nX-Id: %s\r\n\r\n", l.Size, p.host, id)
		start := time.Now()
		if _, err := c.Write(req); err != nil {
			return nil, err
		}
		if err := check(br, id, l.Size); err != nil {
			return nil, err
		}
		if counts {
			took = append(took, time.Since(start))
		}
	}
}

// check reads one answer.
func check(br *bufio.Reader, id string, size int) error {
	if err := checkHead(br, id, size); err != nil {
		return err
	}
	_, err := br.Discard(size)
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// checkFilled is check of all bytes.
func checkFilled(br *bufio.Reader, id string, size int) error {
	if err := checkHead(br, id, size); err != nil {
		return err
	}
	body := make([]byte, size)
	if _, err := io.ReadFull(br, body); err != nil {
		return err
	}
	if !bytes.Equal(body, filled(id, size)) {
		return fmt.Errorf("wrong answer to %s: %d bytes that begin with %.40q", id, size, body)
	}
	return nil
}

func checkHead(br *bufio.Reader, id string, size int) error {
	length, got, first := -1, "", ""
	for {
		line, err := br.ReadSlice('\n')
		if err != nil {
			return err
		}
		line = bytes.TrimRight(line, "\r\n")
		if first == "" {
			first = string(line)
			continue
		}
		if len(line) == 0 {
			break
		}
		name, value, _ := bytes.Cut(line, []byte(":"))
		switch {
		case bytes.EqualFold(name, []byte("x-id")):
			got = string(bytes.TrimSpace(value))
		case bytes.EqualFold(name, []byte("content-length")):
			length, _ = strconv.Atoi(string(bytes.TrimSpace(value)))
		}
	}
	if !strings.HasPrefix(first, "HTTP/1.1 200") || got != id || length != size {
		return fmt.Errorf("wrong answer to %s: %s, id %q, %d bytes", id, first, got, length)
	}
	return nil
}
