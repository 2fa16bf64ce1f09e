// Command bench measures a chain of two proxies with mutual TLS between them (client ─► proxy ═► proxy ─► server): Hanse's sidecars as
// shipped, with a control plane, routing, authorisation, metrics, access log and trace IDs, beside nginx and HAProxy where they are on PATH,
// with mutual TLS 1.3, connections kept, and an access log. `make bench-proxy` runs it.
//
// The products take turns, round by round; each answer is checked for the ID of its request; CPU is that of both proxies, by
// /proc. What is printed are medians, and medians of the ratios within a round, which a noisy machine disturbs least.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"
)

// load is one kind of traffic.
type load struct {
	Conns int
	Size  int // bytes of an answer
}

func (l load) String() string { return fmt.Sprintf("%d B, %d conns", l.Size, l.Conns) }

// result is what one product did in one round.
type result struct {
	MicrosCPU float64 // of both proxies, per request
	PerSecond float64
	P50, P99  time.Duration
}

// product is a running chain.
type product struct {
	name   string
	entry  string   // where the client connects
	host   string   // what it asks for
	pids   []int    // processes of the proxies; their children count too
	admins []string // Hanse: the admin ports
	stop   func()
}

func main() {
	rounds := flag.Int("rounds", 5, "rounds of each load")
	length := flag.Duration("for", 2*time.Second, "length of one measurement")
	only := flag.String("products", "hanse,nginx,haproxy", "what to measure, in this order")
	bin := flag.String("bin", "bin", "where hanse, hansed and hanse-proxy are")
	asJSON := flag.Bool("json", false, "print JSON")
	conns := flag.String("conns", "1,16,128", "connections")
	sizes := flag.String("sizes", "100,10240", "bytes of an answer")
	many := flag.Int64("soak", 0, "instead of measuring, send so many requests through Hanse's sidecars, and watch memory and goroutines")
	flag.Parse()
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()
	loads, err := parseLoads(*conns, *sizes)
	switch {
	case err != nil:
	case *many > 0:
		err = soak(ctx, *many, *bin)
	default:
		err = run(ctx, strings.Split(*only, ","), loads, *rounds, *length, *bin, *asJSON)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

func parseLoads(conns, sizes string) (out []load, err error) {
	for s := range strings.SplitSeq(sizes, ",") {
		for c := range strings.SplitSeq(conns, ",") {
			var l load
			if _, err := fmt.Sscanf(s+" "+c, "%d %d", &l.Size, &l.Conns); err != nil || l.Size < 1 || l.Conns < 1 {
				return nil, fmt.Errorf("--sizes %q, --conns %q: want numbers, separated by commas", sizes, conns)
			}
			out = append(out, l)
		}
	}
	return out, nil
}

func run(ctx context.Context, names []string, loads []load, rounds int, length time.Duration, bin string, asJSON bool) error {
	dir, err := os.MkdirTemp("", "hanse-bench")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	backend, err := newBackend()
	if err != nil {
		return err
	}
	defer backend.close()
	var products []*product
	defer func() {
		for _, p := range products {
			p.stop()
		}
	}()
	for _, name := range names {
		start := map[string]func(context.Context, string, string, string) (*product, error){"hanse": startHanse, "nginx": startNginx, "haproxy": startHAProxy}[name]
		if start == nil {
			return fmt.Errorf("--products: %q is none of hanse, nginx, haproxy", name)
		}
		p, err := start(ctx, filepath.Join(dir, name), bin, backend.address)
		if errors.Is(err, exec.ErrNotFound) {
			fmt.Fprintf(os.Stderr, "%s is not installed here: it is left out\n", name)
			continue
		}
		if err != nil {
			return fmt.Errorf("start %s: %w", name, err)
		}
		products = append(products, p)
	}
	measured := map[string]map[string][]result{} // load → product → rounds
	for _, l := range loads {
		measured[l.String()] = map[string][]result{}
		for round := range rounds {
			for _, p := range products {
				fmt.Fprintf(os.Stderr, "\r%-20s round %d of %d: %-10s", l, round+1, rounds, p.name)
				r, err := measure(ctx, p, l, length)
				if err != nil {
					return fmt.Errorf("%s, %s: %w", p.name, l, err)
				}
				measured[l.String()][p.name] = append(measured[l.String()][p.name], r)
			}
		}
	}
	fmt.Fprintln(os.Stderr)
	if asJSON {
		e := json.NewEncoder(os.Stdout)
		e.SetIndent("", "  ")
		return e.Encode(measured)
	}
	fmt.Printf("%s, %d CPUs, %s; medians of %d rounds of %s\n\n", time.Now().UTC().Format("2006-01-02"), runtime.NumCPU(), runtime.Version(), rounds, length)
	w := tabwriter.NewWriter(os.Stdout, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "LOAD\tPRODUCT\tCPU µs\tREQUESTS/s\tp50 ms\tp99 ms\tCPU OF HANSE TO THIS")
	for _, l := range loads {
		by := measured[l.String()]
		for _, p := range products {
			rs := by[p.name]
			ratio := "-"
			if hanse := by["hanse"]; p.name != "hanse" && len(hanse) == len(rs) {
				var ratios []float64
				for i := range rs {
					ratios = append(ratios, hanse[i].MicrosCPU/rs[i].MicrosCPU)
				}
				ratio = fmt.Sprintf("%.2f", median(ratios))
			}
			fmt.Fprintf(w, "%s\t%s\t%.1f\t%.0f\t%.2f\t%.2f\t%s\n", l, p.name, of(rs, func(r result) float64 { return r.MicrosCPU }),
				of(rs, func(r result) float64 { return r.PerSecond }), of(rs, func(r result) float64 { return r.P50.Seconds() * 1000 }),
				of(rs, func(r result) float64 { return r.P99.Seconds() * 1000 }), ratio)
		}
	}
	if err := w.Flush(); err != nil {
		return err
	}
	fmt.Println()
	fmt.Fprintln(w, "MEMORY OF BOTH PROXIES\tRESIDENT\tPER IDLE CONNECTION OF AN APPLICATION")
	for _, p := range products {
		before := resident(p.pids)
		per, err := idle(p, idleConns)
		if err != nil {
			return fmt.Errorf("%s, %d idle connections: %w", p.name, idleConns, err)
		}
		fmt.Fprintf(w, "%s\t%d MiB\t%.1f KiB\n", p.name, before>>20, float64(per)/1024)
	}
	return w.Flush()
}

// idleConns is how many connections idle holds. One request was made on each, one after the other.
const idleConns = 1000

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
		c, err := net.Dial("tcp", p.entry)
		if err != nil {
			return 0, err
		}
		conns = append(conns, c)
		_ = c.SetDeadline(time.Now().Add(time.Minute))
		if _, err := fmt.Fprintf(c, "GET /100 HTTP/1.1\r\nHost: %s\r\nX-Id: 1\r\n\r\n", p.host); err != nil {
			return 0, err
		}
		if err := check(bufio.NewReader(c), "1", 100); err != nil {
			return 0, err
		}
	}
	time.Sleep(time.Second)
	return max(0, resident(p.pids)-before) / int64(n), nil
}

func of(rs []result, f func(result) float64) float64 {
	var vs []float64
	for _, r := range rs {
		vs = append(vs, f(r))
	}
	return median(vs)
}

func median(vs []float64) float64 {
	vs = slices.Sorted(slices.Values(vs))
	if len(vs) == 0 {
		return 0
	}
	if n := len(vs); n%2 == 0 {
		return (vs[n/2-1] + vs[n/2]) / 2
	}
	return vs[len(vs)/2]
}
