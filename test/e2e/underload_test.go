package e2e

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
	"testing"
	"time"
)

// stampsProgram is this test binary under another name: an application whose bodies say all over whose they are.
const stampsProgram = "stamps"

// stamped is a body of n bytes that repeats an ID; as a Writer it wants to be given just that.
type stamped struct {
	line string
	n    int64
	at   int64
}

func newStamped(id string, n int64) *stamped {
	return &stamped{line: strings.Repeat(id+"\n", 1+(32<<10)/(len(id)+1)), n: n} // the period divides the length
}

func (s *stamped) next() string { return s.line[s.at%int64(len(s.line)):] }

// Read implements io.Reader.
func (s *stamped) Read(p []byte) (int, error) {
	if s.at == s.n {
		return 0, io.EOF
	}
	n := copy(p[:min(int64(len(p)), s.n-s.at)], s.next())
	s.at += int64(n)
	return n, nil
}

// Write implements io.Writer.
func (s *stamped) Write(p []byte) (int, error) {
	for rest := p; len(rest) > 0; {
		want := s.next()
		n := min(len(want), len(rest))
		if string(rest[:n]) != want[:n] {
			return 0, fmt.Errorf("the body of another at byte %d: %.60q, want %.60q", s.at, rest[:n], want[:n])
		}
		rest = rest[n:]
		s.at += int64(n)
	}
	return len(p), nil
}

// stamps serves /?id=…&n=… on a Unix socket: it compares what it is sent, and answers with n bytes.
func stamps(socket string) int {
	_ = os.Remove(socket)
	ln, err := net.Listen("unix", socket)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	err = http.Serve(ln, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id := r.URL.Query().Get("id")
		n, _ := strconv.ParseInt(r.URL.Query().Get("n"), 10, 64)
		if got, err := io.Copy(newStamped(id, 0), r.Body); err != nil {
			fmt.Fprintln(os.Stderr, id, err)
			w.WriteHeader(http.StatusBadRequest)
			return
		} else if r.ContentLength >= 0 && got != r.ContentLength { // -1: a body without a length, over HTTP/2 also an empty one
			return
		}
		w.Header().Set("X-Id", id)
		w.Header().Set("Content-Length", strconv.FormatInt(n, 10))
		_, _ = io.Copy(w, newStamped(id, n))
	}))
	fmt.Fprintln(os.Stderr, err)
	return 1
}

// stampedLab is one cluster whose payments are stamps.
func stampedLab(t *testing.T) *lab {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(exe, filepath.Join(bin, stampsProgram)); err != nil && !errors.Is(err, os.ErrExist) {
		t.Fatal(err)
	}
	l := newLab(t, "", "west")
	l.up()
	// By default a sidecar sends 1,024 requests at the same time to one service, and refuses more. Nobody has asked for the service yet.
	l.must("west", manyRequests, "apply", "-f", "-")
	for _, w := range l.clusters[0].Workloads {
		if w.Serves {
			l.kill("west/" + w.Name + "-app")
			l.start("west/"+w.Name+"-app", stampsProgram, w.App)
		}
	}
	l.eventually(20*time.Second, "an answer", func() error { return exchange(l, "first", 0, 1000) })
	return l
}

// exchange sends and receives so many bytes, on a connection of its own.
func exchange(l *lab, id string, sends, wants int64) error {
	c, err := net.Dial("tcp", l.cluster("west").workload("frontend").Outbound)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(3 * time.Minute))
	if err := ask(c, id, sends, wants); err != nil {
		return err
	}
	return answered(c, id, wants)
}

func ask(c net.Conn, id string, sends, wants int64) error {
	if _, err := fmt.Fprintf(c, "PUT /?id=%s&n=%d HTTP/1.1\r\nHost: payments.shop:8080\r\nContent-Length: %d\r\n\r\n", id, wants, sends); err != nil {
		return err
	}
	_, err := io.CopyBuffer(struct{ io.Writer }{c}, newStamped(id, sends), make([]byte, 32<<10))
	return err
}

func answered(c net.Conn, id string, wants int64) error {
	resp, err := http.ReadResponse(bufio.NewReaderSize(c, 1<<10), nil)
	if err != nil {
		return err
	}
	return judge(resp, id, wants)
}

// judge compares an answer.
func judge(resp *http.Response, id string, wants int64) error {
	defer resp.Body.Close()
	if got := resp.Header.Get("X-Id"); resp.StatusCode != 200 || got != id {
		b, _ := io.ReadAll(io.LimitReader(resp.Body, 300))
		return fmt.Errorf("%s, id %q: %s", resp.Status, got, b)
	}
	n, err := io.CopyBuffer(struct{ io.Writer }{newStamped(id, wants)}, struct{ io.Reader }{resp.Body}, make([]byte, 32<<10))
	if err == nil && n != wants {
		err = fmt.Errorf("%d of %d bytes", n, wants)
	}
	return err
}

// tunnelled is a connection through a CONNECT: raw bytes on the hop.
func tunnelled(l *lab) (net.Conn, error) {
	c, err := net.Dial("tcp", l.cluster("west").workload("frontend").Outbound)
	if err != nil {
		return nil, err
	}
	_ = c.SetDeadline(time.Now().Add(5 * time.Minute))
	if _, err = io.WriteString(c, "CONNECT payments.shop:8080 HTTP/1.1\r\nHost: payments.shop:8080\r\n\r\n"); err == nil {
		const want = "HTTP/1.1 200"
		head := make([]byte, 0, 512)
		for one := make([]byte, 1); err == nil && !bytes.HasSuffix(head, []byte("\r\n\r\n")); head = append(head, one...) {
			_, err = io.ReadFull(c, one)
		}
		if err == nil && !bytes.HasPrefix(head, []byte(want)) {
			err = fmt.Errorf("CONNECT was answered %q", head)
		}
	}
	if err != nil {
		_ = c.Close()
	}
	return c, err
}

// overHTTP2 is exchange on a stream of HTTP/2.
func overHTTP2(l *lab, id string, sends, wants int64) error {
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	tr := &http.Transport{Protocols: protocols, DisableCompression: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", l.cluster("west").workload("frontend").Outbound)
	}}
	defer tr.CloseIdleConnections()
	req, err := http.NewRequestWithContext(l.t.Context(), http.MethodPut, fmt.Sprintf("http://payments.shop:8080/?id=%s&n=%d", id, wants), newStamped(id, sends))
	if err != nil {
		return err
	}
	req.ContentLength = sends
	resp, err := tr.RoundTrip(req)
	if err != nil {
		return err
	}
	return judge(resp, id, wants)
}

// memory is what the kernel says of a process: resident now, and at most since resetPeak; in KiB.
func (l *lab) memory(name string) (now, peak int64) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", l.proc(name).cmd.Process.Pid))
	if err != nil {
		l.t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		switch f[0] {
		case "VmRSS:":
			now, _ = strconv.ParseInt(f[1], 10, 64)
		case "VmHWM:":
			peak, _ = strconv.ParseInt(f[1], 10, 64)
		}
	}
	return now, peak
}

func (l *lab) resetPeak(name string) {
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", l.proc(name).cmd.Process.Pid), []byte("5"), 0); err != nil {
		l.t.Fatal(err)
	}
}

// TestManyTunnels: ten thousand tunnels are open at the same time, and each carries its own bytes.
func TestManyTunnels(t *testing.T) {
	const tunnels, dialers = 10_000, 50
	l := stampedLab(t)
	var failed atomic.Int64
	lose := func(i int, err error) {
		if failed.Add(1) <= 10 {
			t.Errorf("tunnel %d: %v", i, err)
		}
	}
	open := make([]net.Conn, tunnels)
	each := func(f func(i int) error) {
		var all sync.WaitGroup
		for d := range dialers {
			all.Go(func() {
				for i := d; i < tunnels; i += dialers {
					if err := f(i); err != nil {
						lose(i, err)
					}
				}
			})
		}
		all.Wait()
	}
	began := time.Now()
	each(func(i int) (err error) {
		open[i], err = tunnelled(l)
		return err
	})
	each(func(i int) error {
		if open[i] == nil {
			return nil
		}
		defer open[i].Close()
		if err := ask(open[i], fmt.Sprintf("t-%d", i), 10, 1000); err != nil {
			return err
		}
		return answered(open[i], fmt.Sprintf("t-%d", i), 1000)
	})
	now, peak := l.memory("west/frontend")
	t.Logf("%d tunnels in %s, %d lost; the caller's sidecar holds %d MiB, at most %d", tunnels, time.Since(began).Round(time.Millisecond), failed.Load(), now>>10, peak>>10)
}

const manyRequests = `
apiVersion: hanse.mesh/v1alpha1
kind: TrafficPolicy
metadata: {name: payments, namespace: shop}
spec:
  targetRefs: [{kind: Service, name: payments}]
  maxRequests: 20000
`

// TestManyConnections: ten thousand connections that are opened at once are all served, and none gets the answer of another.
func TestManyConnections(t *testing.T) {
	const conns, dialers = 10_000, 100
	l := stampedLab(t)
	before, _ := l.memory("west/frontend")
	var failed atomic.Int64
	lose := func(id string, err error) {
		if failed.Add(1) <= 10 {
			t.Errorf("%s: %v", id, err)
		}
	}
	open := make([]net.Conn, conns)
	each := func(f func(i int)) {
		var all sync.WaitGroup
		for d := range dialers {
			all.Go(func() {
				for i := d; i < conns; i += dialers {
					f(i)
				}
			})
		}
		all.Wait()
	}
	id := func(i int) string { return fmt.Sprintf("c-%d", i) }
	began := time.Now()
	to := l.cluster("west").workload("frontend").Outbound
	each(func(i int) {
		c, err := net.Dial("tcp", to)
		if err != nil {
			lose(id(i), err)
			return
		}
		open[i] = c
		_ = c.SetDeadline(time.Now().Add(2 * time.Minute))
		if err := ask(c, id(i), 10, 1000); err != nil {
			lose(id(i), err)
		}
	})
	each(func(i int) {
		if open[i] != nil {
			if err := answered(open[i], id(i), 1000); err != nil {
				lose(id(i), err)
			}
		}
	})
	took := time.Since(began)
	now, peak := l.memory("west/frontend")
	t.Logf("%d connections and answers in %s, %d lost; the caller's sidecar holds %d MiB (before: %d, at most %d): %.1f KiB a connection", conns, took.Round(time.Millisecond), failed.Load(), now>>10, before>>10, peak>>10, float64(now-before)/conns)
	if per := (peak - before) / conns; per > 64 { // with a request on each; an idle one costs far less (docs/benchmarks.md)
		t.Errorf("%d KiB a connection at most, want at most 64", per)
	}
	for _, c := range open {
		if c != nil {
			_ = c.Close()
		}
	}
	if err := exchange(l, "after", 1000, 1000); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

// TestLongBodies: a gibibyte (128 MiB without HANSE_SOAK) each way takes no more memory in the sidecars than a few buffers, also when it is read slowly.
func TestLongBodies(t *testing.T) {
	size := int64(128 << 20)
	if soak() {
		size = 1 << 30
	}
	l := stampedLab(t)
	sidecars := []string{"west/frontend", "west/pay-a", "west/pay-b"}
	for range 3 { // what the runtime takes once
		if err := exchange(l, "warm", 32<<20, 32<<20); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name         string
		sends, wants int64
		streams      int
		way          string
	}{
		{"up", size, 10, 1, ""},
		{"down", 0, size, 1, ""},
		{"up over HTTP2", size, 10, 1, "h2"},
		{"down over HTTP2", 0, size, 1, "h2"},
		{"up a tunnel", size, 10, 1, "tcp"},
		{"down a tunnel", 0, size, 1, "tcp"},
		{"eight down, read slowly", 0, 16 << 20, 8, "slow"},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := map[string]int64{}
			for _, s := range sidecars {
				before[s], _ = l.memory(s)
				l.resetPeak(s)
			}
			began := time.Now()
			var all sync.WaitGroup
			for i := range c.streams {
				id := fmt.Sprintf("long-%d", i)
				all.Go(func() {
					if err := long(l, c.way, id, c.sends, c.wants); err != nil {
						t.Errorf("%s: %v", id, err)
					}
				})
			}
			all.Wait()
			for _, s := range sidecars {
				_, peak := l.memory(s)
				grown := peak - before[s]
				t.Logf("%s: %d KiB at most, %d more than before; %d MiB each way in %s", s, peak, grown, max(c.sends, c.wants)>>20, time.Since(began).Round(time.Millisecond))
				if grown > 16<<10 {
					t.Errorf("%s took %d KiB more", s, grown)
				}
			}
		})
	}
}

func long(l *lab, way, id string, sends, wants int64) error {
	dial := func() (net.Conn, error) {
		return net.Dial("tcp", l.cluster("west").workload("frontend").Outbound)
	}
	switch way {
	case "h2":
		return overHTTP2(l, id, sends, wants)
	case "tcp":
		dial = func() (net.Conn, error) { return tunnelled(l) }
	}
	c, err := dial()
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(5 * time.Minute))
	if err := ask(c, id, sends, wants); err != nil {
		return err
	}
	if way == "slow" {
		c = slowly{c}
	}
	return answered(c, id, wants)
}

// slowly reads with pauses.
type slowly struct{ net.Conn }

func (c slowly) Read(p []byte) (int, error) {
	time.Sleep(2 * time.Millisecond)
	return c.Conn.Read(p[:min(len(p), 16<<10)])
}
