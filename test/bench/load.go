package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// settle is how long a load runs before it is measured: connections, pools, caches.
const settle = 300 * time.Millisecond

// errNone is of a measurement without a single answer that counts.
var errNone = errors.New("no answer within the time of the measurement")

// window is the time that counts.
type window struct{ begin, end chan struct{} }

func (w *window) counts() (counts, over bool) {
	select {
	case <-w.end:
		return false, true
	default:
	}
	select {
	case <-w.begin:
		return true, false
	default:
		return false, false
	}
}

// loop runs n callers until the time is up. Each calls one after the other, and returns how long those took that counted.
func loop(ctx context.Context, p *product, n int, length time.Duration, caller func(i int, w *window) ([]time.Duration, error)) (result, error) {
	var r result
	w := &window{make(chan struct{}), make(chan struct{})}
	type tally struct {
		took []time.Duration
		err  error
	}
	tallies := make([]tally, n)
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() { tallies[i].took, tallies[i].err = caller(i, w) })
	}
	time.Sleep(settle)
	cpu, start := cpuTime(p.pids), time.Now()
	close(w.begin)
	select {
	case <-time.After(length):
	case <-ctx.Done():
	}
	cpu = cpuTime(p.pids) - cpu
	took := time.Since(start)
	close(w.end)
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
		return r, errNone
	}
	slices.Sort(times)
	r.CPU = cpu.Seconds() / float64(len(times))
	r.PerSecond = float64(len(times)) / took.Seconds()
	r.P50, r.P99 = times[len(times)/2], times[len(times)*99/100]
	return r, nil
}

// call is one connection of the closed loop: it sends its next request when the answer to the last one is whole.
func call(p *product, size, n int, w *window) ([]time.Duration, error) {
	c, err := dial(p.http)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	br := bufio.NewReaderSize(c, 16<<10)
	var took []time.Duration
	var req []byte
	for i := 0; ; i++ {
		counts, over := w.counts()
		if over {
			return took, nil
		}
		id := strconv.Itoa(n) + "-" + strconv.Itoa(i)
		req = get(req[:0], size, p.host, id)
		start := time.Now()
		if _, err := c.Write(req); err != nil {
			return nil, err
		}
		if err := check(br, id, size); err != nil {
			return nil, err
		}
		if counts {
			took = append(took, time.Since(start))
		}
	}
}

func dial(address string) (net.Conn, error) {
	c, err := net.Dial("tcp", address)
	if err == nil {
		_ = c.SetDeadline(time.Now().Add(5 * time.Minute))
	}
	return c, err
}

func get(to []byte, size int, host, id string) []byte {
	return fmt.Appendf(to, "GET /%d HTTP/1.1\r\nHost: %s\r\nUser-Agent: bench\r\nAccept: */*\r\nX-Id: %s\r\n\r\n", size, host, id)
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
