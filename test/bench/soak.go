package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"text/tabwriter"
	"time"

	"github.com/hanse-mesh/hanse/proxy/http2"
	"github.com/hanse-mesh/hanse/proxy/message"
)

// sample is what both sidecars held at one moment of a soak.
type sample struct {
	Requests   int64
	Elapsed    time.Duration
	Resident   int64 // bytes
	Heap       float64
	Goroutines float64
}

// soak sends n requests through Hanse's sidecars, HTTP/1.1 and HTTP/2, small and larger, on connections that come and go. Each answer is
// compared byte by byte. It fails if an answer is wrong or missing, or if memory or goroutines at rest have grown.
func soak(ctx context.Context, n int64, bin string) error {
	dir, err := os.MkdirTemp("", "hanse-soak")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	b, err := newBackends()
	if err != nil {
		return err
	}
	defer b.close()
	p, err := startHanse(ctx, filepath.Join(dir, "hanse"), bin, b, 0)
	if err != nil {
		return err
	}
	defer p.stop()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)

	var done atomic.Int64
	var samples []sample
	began := time.Now()
	take := func() error {
		s := sample{Requests: done.Load(), Elapsed: time.Since(began), Resident: resident(p.pids)}
		for _, a := range p.admins {
			m, err := metrics(ctx, a, "go_memstats_heap_inuse_bytes", "go_goroutines")
			if err != nil {
				return err
			}
			s.Heap += m[0]
			s.Goroutines += m[1]
		}
		samples = append(samples, s)
		fmt.Fprintf(os.Stderr, "%10d requests, %6.0f/s, %d MiB resident, %.0f MiB heap, %.0f goroutines\n", s.Requests, float64(s.Requests)/max(1, s.Elapsed.Seconds()), s.Resident>>20, s.Heap/(1<<20), s.Goroutines)
		return nil
	}
	// part sends k requests and returns when nothing is under way.
	part := func(k int64) error {
		left := atomic.Int64{}
		left.Store(k)
		more := func() bool { return ctx.Err() == nil && left.Add(-1) >= 0 }
		var all sync.WaitGroup
		for i := range 12 {
			all.Go(func() {
				if err := soak1(p, i, more, &done); err != nil {
					cancel(fmt.Errorf("HTTP/1.1, caller %d: %w", i, err))
				}
			})
		}
		for i := range 3 {
			all.Go(func() {
				if err := soak2(ctx, p, 100+i, more, &done); err != nil {
					cancel(fmt.Errorf("HTTP/2, caller %d: %w", i, err))
				}
			})
		}
		all.Wait()
		return context.Cause(ctx)
	}
	const parts = 20
	for range parts {
		if err := part(n / parts); err != nil {
			return err
		}
		logs, _ := filepath.Glob(filepath.Join(dir, "hanse", "*.access.log"))
		for _, l := range logs { // a gigabyte each million
			if err := os.Truncate(l, 0); err != nil {
				return err
			}
		}
		if err := take(); err != nil { // with nothing under way
			return err
		}
	}
	return flat(samples)
}

// flat prints samples, and fails unless what is held at the end is what was held after a tenth.
func flat(samples []sample) error {
	w := tabwriter.NewWriter(os.Stdout, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "REQUESTS\tAFTER\tRESIDENT\tHEAP IN USE\tGOROUTINES")
	for i, s := range samples {
		if i == 0 || (i+1)%4 == 0 || i == 1 {
			fmt.Fprintf(w, "%d\t%s\t%d MiB\t%.1f MiB\t%.0f\n", s.Requests, s.Elapsed.Round(time.Second), s.Resident>>20, s.Heap/(1<<20), s.Goroutines)
		}
	}
	if err := w.Flush(); err != nil {
		return err
	}
	warm := samples[max(0, len(samples)/10-1)]
	last := samples[len(samples)-1]
	switch {
	case last.Goroutines > warm.Goroutines+20:
		return fmt.Errorf("goroutines grew from %.0f to %.0f", warm.Goroutines, last.Goroutines)
	case float64(last.Resident) > 1.15*float64(warm.Resident)+8<<20:
		return fmt.Errorf("memory grew from %d to %d bytes", warm.Resident, last.Resident)
	}
	return nil
}

// metrics reads values of an admin port, summed over labels.
func metrics(ctx context.Context, admin string, names ...string) ([]float64, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+admin+"/metrics", nil)
	if err != nil {
		return nil, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	out := make([]float64, len(names))
	sc := bufio.NewScanner(resp.Body)
	for sc.Scan() {
		for i, name := range names {
			if rest, ok := strings.CutPrefix(sc.Text(), name); ok && (rest[0] == ' ' || rest[0] == '{') {
				v, _ := strconv.ParseFloat(rest[strings.LastIndexByte(rest, ' ')+1:], 64)
				out[i] += v
			}
		}
	}
	return out, sc.Err()
}

// sizeOf is what the i-th request of a caller asks for.
func sizeOf(i int) int {
	switch {
	case i%100 == 99:
		return 100_000
	case i%10 == 9:
		return 10_240
	}
	return 100
}

func soak1(p *product, n int, more func() bool, done *atomic.Int64) error {
	var c net.Conn
	defer func() {
		if c != nil {
			_ = c.Close()
		}
	}()
	var br *bufio.Reader
	for i := 0; more(); i++ {
		if i%5000 == 0 {
			if c != nil {
				_ = c.Close()
			}
			var err error
			if c, err = net.Dial("tcp", p.http); err != nil {
				return err
			}
			br = bufio.NewReaderSize(c, 16<<10)
			_ = c.SetDeadline(time.Now().Add(10 * time.Minute))
		}
		id, size := fmt.Sprintf("%d-%d", n, i), sizeOf(i)
		if _, err := fmt.Fprintf(c, "GET /%d?fill HTTP/1.1\r\nHost: %s\r\nX-Id: %s\r\n\r\n", size, p.host, id); err != nil {
			return err
		}
		if err := checkFilled(br, id, size); err != nil {
			return err
		}
		done.Add(1)
	}
	return nil
}

func soak2(ctx context.Context, p *product, n int, more func() bool, done *atomic.Int64) error {
	for round := 0; ; round++ {
		nc, err := net.Dial("tcp", p.http)
		if err != nil {
			return err
		}
		cc := http2.NewClientConn(nc, http2.Config{})
		var streams sync.WaitGroup
		var over atomic.Bool
		errs := make([]error, 4)
		for k := range errs {
			streams.Go(func() {
				for i := range 5000 {
					if !more() {
						over.Store(true)
						return
					}
					if errs[k] = soakStream(cc, p.host, fmt.Sprintf("%d-%d-%d-%d", n, round, k, i), sizeOf(i)); errs[k] != nil {
						return
					}
					done.Add(1)
				}
			})
		}
		streams.Wait()
		cc.Close(nil)
		if err := errors.Join(errs...); err != nil {
			return err
		}
		if over.Load() {
			return nil
		}
	}
}

func soakStream(cc *http2.ClientConn, host, id string, size int) error {
	s, err := cc.Open(&message.Request{Method: "GET", Scheme: "http", Authority: host, Path: fmt.Sprintf("/%d?fill", size), Fields: message.Fields{{Name: "x-id", Value: id}}}, message.Options{End: true})
	if err != nil {
		return err
	}
	defer s.Close()
	stop := time.AfterFunc(time.Minute, func() { s.Cancel(errors.New("no answer within a minute")) })
	defer stop.Stop()
	r, err := s.Response()
	if err != nil {
		return err
	}
	body, err := io.ReadAll(s)
	if err != nil {
		return err
	}
	if got := r.Fields.Value("x-id"); r.Status != 200 || got != id || !bytes.Equal(body, filled(id, size)) {
		return fmt.Errorf("wrong answer to %s: %d, id %q, %d bytes that begin with %.40q", id, r.Status, got, len(body), body)
	}
	return nil
}

// filled is the body that the backend answers ?fill with: the ID, over and over.
func filled(id string, size int) []byte {
	return bytes.Repeat([]byte(id+"\n"), size/(len(id)+1)+1)[:size]
}
