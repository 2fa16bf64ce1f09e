package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// requests is the closed loop over HTTP/1.1.
func (b *bench) requests(ctx context.Context) error {
	var rows []string
	for _, size := range b.sizes {
		for _, conns := range b.conns {
			what := fmt.Sprintf("%d B, %d connections", size, conns)
			by, err := b.take(ctx, what, func(p *product) (result, error) {
				return loop(ctx, p, conns, b.length, func(i int, w *window) ([]time.Duration, error) { return call(p, size, i, w) })
			})
			if err != nil {
				return err
			}
			rows = append(rows, b.latencies(what, by)...)
		}
	}
	b.report.table("HTTP/1.1, CLOSED LOOP\tPRODUCT\tCPU µs\tREQUESTS/s\tp50 ms\tp99 ms\tRATIO", rows)
	return nil
}

func (b *bench) latencies(what string, by map[string][]result) (rows []string) {
	for _, p := range b.products {
		rs := by[p.name]
		rows = append(rows, fmt.Sprintf("%s\t%s\t%.1f\t%.0f\t%.2f\t%.2f\t%s", what, p.name, 1e6*of(rs, cpuOf), of(rs, perSecondOf), of(rs, p50Of), of(rs, p99Of), ratio(by, p.name)))
	}
	return rows
}

// openLoop sends at a fixed rate, whatever the answers do. A call's time runs from when it was due, so that a stall counts for all that
// waited for it.
func (b *bench) openLoop(ctx context.Context) error {
	const conns, size = 16, 100
	what := fmt.Sprintf("%d/s, %d B, %d connections", b.rate, size, conns)
	by, err := b.take(ctx, what, func(p *product) (result, error) {
		every := time.Second * conns / time.Duration(b.rate)
		start := time.Now()
		return loop(ctx, p, conns, b.length, func(n int, w *window) ([]time.Duration, error) {
			c, err := dial(p.http)
			if err != nil {
				return nil, err
			}
			defer c.Close()
			br := bufio.NewReaderSize(c, 16<<10)
			var took []time.Duration
			for i := 0; ; i++ {
				due := start.Add(time.Duration(i)*every + time.Duration(n)*every/conns)
				time.Sleep(time.Until(due))
				counts, over := w.counts()
				if over {
					return took, nil
				}
				id := strconv.Itoa(n) + "-" + strconv.Itoa(i)
				if _, err := c.Write(get(nil, size, p.host, id)); err != nil {
					return nil, err
				}
				if err := check(br, id, size); err != nil {
					return nil, err
				}
				if counts {
					took = append(took, time.Since(due))
				}
			}
		})
	})
	if err != nil {
		return err
	}
	b.report.table("HTTP/1.1, OPEN LOOP\tPRODUCT\tCPU µs\tREQUESTS/s\tp50 ms\tp99 ms\tRATIO", b.latencies(what, by))
	return nil
}

// grpcCalls are unary calls of 100 bytes each way.
func (b *bench) grpcCalls(ctx context.Context) error {
	var rows []string
	for _, l := range [][2]int{{1, 1}, {16, 1}, {16, 8}} {
		what := fmt.Sprintf("%d × %d", l[0], l[1])
		by, err := b.take(ctx, "gRPC "+what, func(p *product) (result, error) {
			var conns []*grpc.ClientConn
			for range l[0] {
				c, err := grpcDial(p)
				if err != nil {
					return result{}, err
				}
				defer c.Close()
				conns = append(conns, c)
			}
			return loop(ctx, p, l[0]*l[1], b.length, func(n int, w *window) (took []time.Duration, err error) {
				for i := 0; ; i++ {
					counts, over := w.counts()
					if over {
						return took, nil
					}
					start := time.Now()
					if err := grpcCall(ctx, conns[n%l[0]], strconv.Itoa(n)+"-"+strconv.Itoa(i)); err != nil {
						return nil, err
					}
					if counts {
						took = append(took, time.Since(start))
					}
				}
			})
		})
		if err != nil {
			return err
		}
		rows = append(rows, b.latencies(what, by)...)
	}
	b.report.table("gRPC, CONNECTIONS × STREAMS\tPRODUCT\tCPU µs\tCALLS/s\tp50 ms\tp99 ms\tRATIO", rows)
	return nil
}

func grpcDial(p *product) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///"+p.grpc, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy())
}

func grpcCall(ctx context.Context, c *grpc.ClientConn, id string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	in, out := wrapperspb.String(id+strings.Repeat(".", 100-len(id))), new(wrapperspb.StringValue)
	err := c.Invoke(ctx, "/bench.Echo/Call", in, out)
	if err == nil && out.Value != in.Value {
		err = fmt.Errorf("wrong answer to %s: %q", id, out.Value)
	}
	return err
}

func onceGRPC(ctx context.Context, p *product) error {
	c, err := grpcDial(p)
	if err != nil {
		return err
	}
	defer c.Close()
	return grpcCall(ctx, c, "once")
}

const bulk = 256 << 20

// bytes moves bulk, on one connection; a unit is a GiB.
func (b *bench) bytes(ctx context.Context) error {
	var rows []string
	for _, kind := range []struct {
		what string
		move func(*product) error
	}{{"download", download}, {"upload", upload}} {
		what, move := kind.what, kind.move
		by, err := b.take(ctx, what, func(p *product) (result, error) {
			cpu, start := cpuTime(p.pids), time.Now()
			err := move(p)
			const gib = float64(bulk) / (1 << 30)
			return result{CPU: (cpuTime(p.pids) - cpu).Seconds() / gib, PerSecond: gib / time.Since(start).Seconds()}, err
		})
		if err != nil {
			return err
		}
		for _, p := range b.products {
			rows = append(rows, fmt.Sprintf("%s\t%s\t%.2f\t%.2f\t%s", what, p.name, of(by[p.name], cpuOf), of(by[p.name], perSecondOf), ratio(by, p.name)))
		}
	}
	b.report.table("256 MiB OVER HTTP/1.1\tPRODUCT\tCPU s PER GiB\tGiB/s\tRATIO", rows)
	return nil
}

func download(p *product) error {
	c, err := dial(p.http)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := c.Write(get(nil, bulk, p.host, "bulk")); err != nil {
		return err
	}
	br := bufio.NewReaderSize(c, 256<<10)
	if err := checkHead(br, "bulk", bulk); err != nil {
		return err
	}
	buf := make([]byte, 256<<10)
	for left := bulk; left > 0; left -= len(buf) {
		if _, err := io.ReadFull(br, buf); err != nil {
			return err
		}
		if !bytes.Equal(buf, filling[:len(buf)]) {
			return fmt.Errorf("wrong bytes, %d before the end", left)
		}
	}
	return nil
}

func upload(p *product) error {
	c, err := dial(p.http)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := fmt.Fprintf(c, "PUT /100 HTTP/1.1\r\nHost: %s\r\nX-Id: bulk\r\nContent-Length: %d\r\n\r\n", p.host, bulk); err != nil {
		return err
	}
	for sent := 0; sent < bulk; sent += 256 << 10 {
		if _, err := c.Write(filling[:256<<10]); err != nil {
			return err
		}
	}
	return check(bufio.NewReader(c), "bulk", 100)
}

// connections opens one for each small exchange, eight at a time.
func (b *bench) connections(ctx context.Context) error {
	var rows []string
	for _, kind := range []struct {
		what string
		once func(*product) error
	}{{"HTTP/1.1", once}, {"TCP tunnel", onceTCP}} {
		by, err := b.take(ctx, "new connections, "+kind.what, func(p *product) (result, error) {
			return loop(ctx, p, 8, b.length, func(_ int, w *window) (took []time.Duration, err error) {
				for {
					counts, over := w.counts()
					if over {
						return took, nil
					}
					start := time.Now()
					if err := kind.once(p); err != nil {
						return nil, err
					}
					if counts {
						took = append(took, time.Since(start))
					}
				}
			})
		})
		if err != nil {
			return err
		}
		rows = append(rows, b.latencies(kind.what, by)...)
	}
	b.report.table("NEW CONNECTION, ONE SMALL EXCHANGE\tPRODUCT\tCPU µs\tCONNECTIONS/s\tp50 ms\tp99 ms\tRATIO", rows)
	return nil
}

// abrupt closes without leaving a port in TIME_WAIT: there are tens of thousands of connections, and not as many ports.
func abrupt(c net.Conn) {
	_ = c.(*net.TCPConn).SetLinger(0)
	_ = c.Close()
}

func once(p *product) error {
	c, err := dial(p.http)
	if err != nil {
		return err
	}
	defer abrupt(c)
	if _, err := c.Write(get(nil, 100, p.host, "once")); err != nil {
		return err
	}
	return check(bufio.NewReaderSize(c, 1<<10), "once", 100)
}

func onceTCP(p *product) error {
	c, err := dial(p.tcp)
	if err != nil {
		return err
	}
	defer abrupt(c)
	line := append(bytes.Repeat([]byte("."), 99), '\n')
	if _, err := c.Write(line); err != nil {
		return err
	}
	got := make([]byte, 100)
	if _, err := io.ReadFull(c, got); err != nil {
		return err
	}
	if !bytes.Equal(got, line) {
		return fmt.Errorf("wrong answer %q", got)
	}
	return nil
}

// idleConns is how many connections rest. One request was made on each, one after the other.
const idleConns = 1000

// memory is what both proxies hold: when they had just begun, after the loads, and per connection that rests.
func (b *bench) memory(context.Context) error {
	var rows []string
	for _, p := range b.products {
		now := resident(p.pids)
		per, err := idle(p, idleConns)
		if err != nil {
			return fmt.Errorf("%s, %d idle connections: %w", p.name, idleConns, err)
		}
		rows = append(rows, fmt.Sprintf("%s\t%d MiB\t%d MiB\t%.1f MiB", p.name, p.fresh>>20, now>>20, float64(per*1000)/(1<<20)))
	}
	b.report.table("MEMORY OF BOTH PROXIES\tAT FIRST\tAFTER THE LOADS\t1,000 IDLE CONNECTIONS MORE", rows)
	return nil
}

// idle returns how much memory of the proxies a connection without requests costs.
func idle(p *product, n int) (int64, error) {
	var conns []net.Conn
	defer func() {
		for _, c := range conns {
			_ = c.Close()
		}
	}()
	before := resident(p.pids)
	for range n {
		c, err := dial(p.http)
		if err != nil {
			return 0, err
		}
		conns = append(conns, c)
		if _, err := c.Write(get(nil, 100, p.host, "1")); err != nil {
			return 0, err
		}
		if err := check(bufio.NewReaderSize(c, 1<<10), "1", 100); err != nil {
			return 0, err
		}
	}
	time.Sleep(time.Second)
	return max(0, resident(p.pids)-before) / int64(n), nil
}

// others is how many services the larger mesh has that nobody calls.
const others = 10_000

// mesh compares two meshes in which a workload calls ten services.
func (b *bench) mesh(ctx context.Context) error {
	var rows []string
	for _, n := range []int{0, others} {
		to, err := newBackends()
		if err != nil {
			return err
		}
		defer to.close()
		p, err := startHanse(ctx, fmt.Sprintf("%s/mesh-%d", b.dir, n), b.bin, to, n)
		if err != nil {
			return err
		}
		defer p.stop()
		var all sync.WaitGroup
		errs := make([]error, called)
		for i := range called {
			all.Go(func() {
				to := *p
				to.http, to.host = p.explicit, fmt.Sprintf("called-%d.shop:8080", i)
				for range 200 {
					if errs[i] = once(&to); errs[i] != nil {
						return
					}
				}
			})
		}
		all.Wait()
		for _, err := range errs {
			if err != nil {
				return err
			}
		}
		time.Sleep(3 * time.Second)
		var heap float64
		m, err := metrics(ctx, p.admins[0], "go_memstats_heap_inuse_bytes")
		if err != nil {
			return err
		}
		heap = m[0]
		rows = append(rows, fmt.Sprintf("%d\t%d\t%.1f MiB\t%.1f MiB\t%.1f MiB\t%.0f MiB", n+called+1, called, mib(resident(p.pids[:1])), heap/(1<<20), mib(resident(p.pids[1:])), mib(resident([]int{p.control}))))
		p.stop()
	}
	b.report.table("SERVICES IN THE MESH\tCALLED\tCALLER'S SIDECAR, RESIDENT\tITS HEAP\tCALLED SIDECAR\tCONTROL PLANE", rows)
	return nil
}

func mib(n int64) float64 { return float64(n) / (1 << 20) }
