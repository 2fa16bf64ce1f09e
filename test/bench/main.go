// Command bench measures a chain of two proxies with mutual TLS between them (client ─► proxy ═► proxy ─► server): Hanse's sidecars as
// shipped, with a control plane, routing, authorisation, metrics, access log and trace IDs, beside nginx, HAProxy and Envoy where they are
// installed, with mutual TLS 1.3, the caller's name checked, connections kept, and an access log. `make bench-proxy` runs it.
//
//	requests     closed loop over HTTP/1.1                 rate         open loop at a fixed rate, timed from when each call was due
//	grpc         grpc-go at both ends                      bytes        long downloads and uploads
//	connections  a new connection for each small exchange  memory       resident, and per idle connection
//	gateway      one gateway, which passes sealed bytes on by server name
//	mesh         Hanse alone: what 10,000 services cost that nobody calls
//
// The products take turns, round by round; each answer is checked for the ID of its request; CPU is that of both proxies, by
// /proc. What is printed are medians, and medians of the ratios within a round, which a noisy machine disturbs least.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// bench is what was asked for, and what runs.
type bench struct {
	rounds   int
	length   time.Duration
	bin, dir string
	envoy    string
	conns    []int
	sizes    []int
	rate     int
	products []*product
	report   report
}

// product is a running chain.
type product struct {
	name    string
	version string
	http    string // where clients connect, by protocol
	grpc    string // HTTP/2 with prior knowledge
	tcp     string // raw
	host    string // what an HTTP client asks for
	pids    []int  // processes of the proxies; their children count too
	fresh   int64  // bytes resident when it had answered its first request
	stop    func()

	// Hanse only.
	admins   []string // the sidecars' admin ports
	explicit string   // the caller's HTTP proxy
	control  int      // the control plane's process

	roots []byte // gateways only: PEM, of the server behind
}

// all parts, in the order in which they run.
var all = []part{
	{"requests", (*bench).requests}, {"rate", (*bench).openLoop}, {"grpc", (*bench).grpcCalls}, {"bytes", (*bench).bytes}, {"connections", (*bench).connections},
	{"gateway", (*bench).gateway}, {"memory", (*bench).memory}, {"mesh", (*bench).mesh},
}

type part struct {
	name string
	run  func(*bench, context.Context) error
}

func main() {
	b := &bench{}
	flag.IntVar(&b.rounds, "rounds", 5, "rounds of each load")
	flag.DurationVar(&b.length, "for", 1500*time.Millisecond, "length of one measurement")
	flag.StringVar(&b.bin, "bin", "bin", "where hanse, hansed and hanse-proxy are")
	flag.StringVar(&b.envoy, "envoy", "", "Envoy's binary; default: envoy on PATH, or bin/tools/envoy (make bench-envoy)")
	flag.IntVar(&b.rate, "rate", 2000, "requests per second of the open loop")
	products := flag.String("products", "hanse,nginx,haproxy,envoy", "what to measure, in this order")
	only := flag.String("only", "", "parts to run, separated by commas; default all: requests,rate,grpc,bytes,connections,gateway,memory,mesh")
	conns := flag.String("conns", "1,16,128", "connections of the closed loop")
	sizes := flag.String("sizes", "100,10240", "bytes of an answer")
	write := flag.String("write", "", "a Markdown file whose part between the markers of bench is replaced by the tables")
	many := flag.Int64("soak", 0, "instead of measuring, send so many requests through Hanse's sidecars, and watch memory and goroutines")
	flag.Parse()
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()
	var err error
	if *many > 0 {
		err = soak(ctx, *many, b.bin)
	} else {
		err = b.main(ctx, *products, *only, *conns, *sizes, *write)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

func (b *bench) main(ctx context.Context, products, only, conns, sizes, write string) (err error) {
	if b.conns, err = numbers("--conns", conns); err != nil {
		return err
	}
	if b.sizes, err = numbers("--sizes", sizes); err != nil {
		return err
	}
	parts, err := choose(only)
	if err != nil {
		return err
	}
	if b.dir, err = os.MkdirTemp("", "hanse-bench"); err != nil {
		return err
	}
	defer os.RemoveAll(b.dir)
	began := time.Now()
	backends, err := newBackends()
	if err != nil {
		return err
	}
	defer backends.close()
	defer func() {
		for _, p := range b.products {
			p.stop()
		}
	}()
	if err := b.start(ctx, strings.Split(products, ","), backends); err != nil {
		return err
	}
	b.report.head(b)
	for _, p := range parts {
		from := time.Now()
		if err := p.run(b, ctx); err != nil {
			fmt.Fprintln(os.Stderr)
			fmt.Print(b.report.text.String()) // what was measured so far
			return fmt.Errorf("%s: %w", p.name, err)
		}
		fmt.Fprintf(os.Stderr, "\r%-60s\n", fmt.Sprintf("%s: %s", p.name, time.Since(from).Round(time.Second)))
	}
	b.report.foot(time.Since(began))
	fmt.Print(b.report.text.String())
	if write != "" {
		return b.report.write(write)
	}
	return nil
}

func numbers(flag, list string) (out []int, err error) {
	for s := range strings.SplitSeq(list, ",") {
		var n int
		if _, err := fmt.Sscanf(s, "%d", &n); err != nil || n < 1 {
			return nil, fmt.Errorf("%s %q: want numbers above 0, separated by commas", flag, list)
		}
		out = append(out, n)
	}
	return out, nil
}

func choose(only string) ([]part, error) {
	if only == "" {
		return all, nil
	}
	var out []part
	for name := range strings.SplitSeq(only, ",") {
		i := slices.IndexFunc(all, func(p part) bool { return p.name == name })
		if i < 0 {
			return nil, fmt.Errorf("--only: there is no part %q: want some of requests, rate, grpc, bytes, connections, gateway, memory, mesh", name)
		}
		out = append(out, all[i])
	}
	return out, nil
}

func (b *bench) start(ctx context.Context, names []string, to *backends) error {
	starts := map[string]func(context.Context, string, *backends) (*product, error){
		"hanse": func(ctx context.Context, dir string, to *backends) (*product, error) {
			return startHanse(ctx, dir, b.bin, to, 0)
		},
		"nginx":   startNginx,
		"haproxy": startHAProxy,
		"envoy": func(ctx context.Context, dir string, to *backends) (*product, error) {
			return startEnvoy(ctx, dir, b.envoy, to)
		},
	}
	for _, name := range names {
		start := starts[name]
		if start == nil {
			return fmt.Errorf("--products: %q is none of %s", name, strings.Join(slices.Sorted(maps.Keys(starts)), ", "))
		}
		p, err := start(ctx, filepath.Join(b.dir, name), to)
		if errors.Is(err, exec.ErrNotFound) {
			b.report.missing = append(b.report.missing, name)
			continue
		}
		if err != nil {
			return fmt.Errorf("start %s: %w\n%s", name, err, lastWords(filepath.Join(b.dir, name)))
		}
		b.products = append(b.products, p)
	}
	if len(b.products) == 0 {
		return errors.New("nothing to measure is installed")
	}
	return nil
}

// result is what one product did in one round. Where a unit is not a request, its name says so.
type result struct {
	CPU       float64 // of both proxies, per unit: seconds
	PerSecond float64 // units
	P50, P99  time.Duration
}

// rounds lets the products take turns.
func (b *bench) take(ctx context.Context, what string, measure func(*product) (result, error)) (map[string][]result, error) {
	out := map[string][]result{}
	for round := range b.rounds {
		for _, p := range b.products {
			fmt.Fprintf(os.Stderr, "\r%-60s", fmt.Sprintf("%s, round %d of %d: %s", what, round+1, b.rounds, p.name))
			r, err := measure(p)
			if errors.Is(err, errNone) { // a machine that is busy otherwise
				was := b.length
				b.length *= 5
				r, err = measure(p)
				b.length = was
			}
			if err == nil {
				err = ctx.Err()
			}
			if err != nil {
				return nil, fmt.Errorf("%s, %s: %w", p.name, what, err)
			}
			out[p.name] = append(out[p.name], r)
		}
	}
	return out, nil
}
