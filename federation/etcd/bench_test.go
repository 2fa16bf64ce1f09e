package etcd_test

import (
	"bufio"
	"context"
	"crypto/x509"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/pprof"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/hanse-mesh/hanse/federation"
	"github.com/hanse-mesh/hanse/federation/etcd"
	"github.com/hanse-mesh/hanse/identity"
)

// The benchmarks measure each side in a process of its own, which is this test binary with a role. It obeys lines on its standard
// input and answers each with one line. With HANSE_BENCH_PROFILE=DIR each side writes DIR/<benchmark>-<side>.{cpu,heap}.

const (
	roleEnv      = "HANSE_BENCH_ROLE"
	profileEnv   = "HANSE_BENCH_PROFILE"
	benchSlot    = 50 // endpoints of a slot in the sync benchmark
	flapSlot     = 32
	endpointSize = 80 // bytes of an endpoint in a slot
)

func TestMain(m *testing.M) {
	role := os.Getenv(roleEnv)
	if role == "" {
		os.Exit(m.Run())
	}
	b := &benchSide{dir: os.Args[len(os.Args)-1]}
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		f := strings.Fields(in.Text())
		args := make([]int, len(f)-1)
		for i, a := range f[1:] {
			args[i], _ = strconv.Atoi(a)
		}
		fmt.Println(b.obey(f[0], args, f[1:]))
	}
}

// benchSide is one side of a benchmark, in its own process.
type benchSide struct {
	dir      string
	etcd     *etcd.Embedded
	exporter *etcd.Exporter
	keys     []string
	profile  *os.File

	mu        sync.Mutex
	seen      map[string]bool
	latencies []time.Duration
	events    int
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func (b *benchSide) source(name string) *identity.Source {
	s := identity.NewSource()
	all := map[spiffeid.TrustDomain]*spiffebundle.Bundle{}
	for _, td := range []string{"west.test", "east.test"} {
		t := spiffeid.RequireTrustDomainFromString(td)
		block, _ := pem.Decode(must(os.ReadFile(filepath.Join(b.dir, td+".ca"))))
		all[t] = spiffebundle.FromX509Authorities(t, []*x509.Certificate{must(x509.ParseCertificate(block.Bytes))})
	}
	s.Set(must(x509svid.Load(filepath.Join(b.dir, name+".crt"), filepath.Join(b.dir, name+".key"))), all)
	return s
}

// slot returns what stands for n endpoints; what is not random in real slots does not matter here.
func slot(n int, seed uint64) []byte {
	rnd := rand.NewPCG(seed, seed)
	v := make([]byte, 0, n*endpointSize)
	for len(v) < n*endpointSize {
		v = binary.NativeEndian.AppendUint64(v, rnd.Uint64())
	}
	return v
}

// flapped is a slot that says when it was made, by the clock that both sides share.
func flapped(n int) []byte {
	v := slot(n, rand.Uint64())
	binary.BigEndian.PutUint64(v, uint64(time.Now().UnixNano()))
	return v
}

func (b *benchSide) obey(verb string, n []int, s []string) string {
	ctx := context.Background()
	switch verb {
	case "start":
		start := time.Now()
		b.etcd = must(etcd.StartEmbedded(ctx, etcd.EmbeddedConfig{Dir: filepath.Join(b.dir, s[0]), Name: s[0], QuotaBytes: 4 << 30}))
		return fmt.Sprint(time.Since(start).Microseconds())
	case "export": // services, slots of each, endpoints of a slot, milliseconds to linger
		b.exporter = etcd.NewExporter(etcd.ExporterConfig{Store: b.etcd.Store(), Linger: time.Duration(n[3]) * time.Millisecond})
		go b.exporter.Run(ctx)
		sums := map[string]etcd.Sum{}
		value := func(k string) ([]byte, error) { // as hansed does, values are encoded again where they are needed
			h := fnv.New64a()
			h.Write([]byte(k))
			if strings.HasPrefix(k, "svc/") {
				return slot(1, h.Sum64()), nil
			}
			return slot(n[2], h.Sum64()), nil
		}
		for i := range n[0] {
			k := fmt.Sprintf("svc/shop/s%05d", i)
			sums[k] = etcd.SumOf(must(value(k)))
			for j := range n[1] {
				k := fmt.Sprintf("ep/shop/s%05d/%d", i, j)
				sums[k] = etcd.SumOf(must(value(k)))
				b.keys = append(b.keys, k)
			}
		}
		b.exporter.Set("all", etcd.Scope{Sums: sums, Value: value, Endpoints: n[0] * n[1] * n[2], Complete: true})
		b.exporter.Set("members", etcd.Scope{Complete: true})
		b.exporter.Set("acks", etcd.Scope{Complete: true})
		b.exporter.Set("peers/"+self, scopeList("all"))
		if err := b.exporter.Flush(ctx); err != nil {
			return err.Error()
		}
		return "ok"
	case "serve":
		src := b.source("west")
		kv, watch := b.etcd.Servers()
		g := etcd.NewGuard(etcd.GuardConfig{KV: kv, Watch: watch, Source: src, Authorize: func(spiffeid.ID) ([]string, bool) {
			return []string{"exports/v1/all/", "exports/v1/members/", "exports/v1/acks/", "exports/v1/peers/" + self + "/"}, true
		}})
		srv := grpc.NewServer(append(etcd.ServerOptions(rand.New(rand.NewPCG(1, 1))), grpc.Creds(credentials.NewTLS(identity.ServerTLS(src, identity.AuthorizeAny(), "h2"))))...)
		g.Register(srv)
		l := must(net.Listen("tcp", "127.0.0.1:0"))
		go srv.Serve(l)
		return l.Addr().String()
	case "flap": // per second (0: as fast as may be), for milliseconds, slot endpoints, so many at once
		end := time.Now().Add(time.Duration(n[1]) * time.Millisecond)
		count := 0
		for next := time.Now(); time.Now().Before(end); {
			for range n[3] {
				update(b.exporter, map[string][]byte{b.keys[rand.IntN(len(b.keys))]: flapped(n[2])}, len(b.keys)*n[2], 0)
				count++
			}
			if n[0] > 0 {
				next = next.Add(time.Second / time.Duration(n[0]) * time.Duration(n[3]))
				time.Sleep(time.Until(next))
			} else if count%100 == 0 {
				_ = b.exporter.Flush(ctx)
			}
		}
		_ = b.exporter.Flush(ctx)
		return fmt.Sprint(count)
	case "mirror": // address
		src := b.source("east")
		b.seen = map[string]bool{}
		m := etcd.NewMirror(etcd.MirrorConfig{Peer: "west", Self: self, Local: b.etcd.Store(), QuotaBytes: 4 << 30, Dial: b.dial(src, s[0])})
		go m.Run(ctx)
		go etcd.FollowImports(ctx, b.etcd.Store(), "west", func(changes []federation.Change, _ bool) { b.observe(changes) })
		return "ok"
	case "wait": // keys of the scope
		for {
			b.mu.Lock()
			done := len(b.seen) >= n[0]
			b.mu.Unlock()
			if done {
				return "ok"
			}
			time.Sleep(time.Millisecond)
		}
	case "watchers": // how many, address
		src := b.source("east")
		for range n[0] {
			r := must(b.dial(src, s[1])(ctx))
			w := must(r.Watch(ctx, "exports/v1/all/", 0))
			go func() {
				for {
					resp, err := w.Recv()
					if err != nil {
						return
					}
					b.mu.Lock()
					b.events += len(resp.Events)
					b.mu.Unlock()
				}
			}()
		}
		return "ok"
	case "profile": // path without extension
		b.profile = must(os.Create(s[0] + ".cpu"))
		if err := pprof.StartCPUProfile(b.profile); err != nil {
			return err.Error()
		}
		return "ok"
	case "profiled":
		pprof.StopCPUProfile()
		heap := must(os.Create(strings.TrimSuffix(b.profile.Name(), ".cpu") + ".heap"))
		if err := errors.Join(b.profile.Close(), pprof.WriteHeapProfile(heap), heap.Close()); err != nil {
			return err.Error()
		}
		return "ok"
	case "sizes": // of the database in KB: the file, and of it what is in use
		file, inUse := b.etcd.Sizes()
		return fmt.Sprint(file>>10, " ", inUse>>10)
	case "figures": // of latency since the last time, in microseconds, and the events seen
		b.mu.Lock()
		defer b.mu.Unlock()
		l := b.latencies
		b.latencies = nil
		slices.Sort(l)
		out := "0 0 "
		if len(l) > 0 {
			out = fmt.Sprint(l[len(l)/2].Microseconds(), " ", l[len(l)*99/100].Microseconds(), " ")
		}
		return out + fmt.Sprint(b.events)
	}
	return "what?"
}

func (b *benchSide) dial(src *identity.Source, addr string) func(context.Context) (etcd.Remote, error) {
	return func(ctx context.Context) (etcd.Remote, error) {
		return etcd.DialPeer(ctx, etcd.PeerConfig{Addresses: []string{addr}, TLS: identity.ClientTLS(src, identity.AuthorizeAny(), "h2")})
	}
}

func (b *benchSide) observe(changes []federation.Change) {
	now := time.Now()
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, c := range changes {
		if c.Scope != "all" {
			continue
		}
		b.events++
		if b.seen[c.Key] {
			b.latencies = append(b.latencies, now.Sub(time.Unix(0, int64(binary.BigEndian.Uint64(c.Value)))))
		}
		b.seen[c.Key] = true
	}
}

// process is a benchSide seen from outside.
type process struct {
	b   testing.TB
	cmd *exec.Cmd
	in  io.Writer
	out *bufio.Scanner
}

func newProcess(b testing.TB, dir string) *process {
	p := &process{b: b, cmd: exec.Command(os.Args[0], dir)}
	p.cmd.Env = append(os.Environ(), roleEnv+"=side")
	p.cmd.Stderr = os.Stderr
	p.in = must(p.cmd.StdinPipe())
	p.out = bufio.NewScanner(must(p.cmd.StdoutPipe()))
	if err := p.cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		_ = p.cmd.Process.Kill()
		_ = p.cmd.Wait()
	})
	return p
}

func (p *process) say(format string, args ...any) string {
	p.b.Helper()
	fmt.Fprintf(p.in, format+"\n", args...)
	if !p.out.Scan() {
		p.b.Fatalf("no answer to %s", fmt.Sprintf(format, args...))
	}
	return p.out.Text()
}

func (p *process) number(format string, args ...any) float64 {
	return must(strconv.ParseFloat(p.say(format, args...), 64))
}

// use is what a process has used so far.
type use struct {
	cpu       time.Duration
	rss, peak float64 // MB
	anon      float64 // MB of rss that are not pages of the database file
	written   float64 // bytes that reached the disk
}

// memory takes over what later holds of memory.
func (u *use) memory(later use) { u.rss, u.peak, u.anon = later.rss, later.peak, later.anon }

func (p *process) use() use {
	pid := strconv.Itoa(p.cmd.Process.Pid)
	var u use
	stat := string(must(os.ReadFile("/proc/" + pid + "/stat")))
	f := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	u.cpu = time.Duration(must(strconv.Atoi(f[11]))+must(strconv.Atoi(f[12]))) * 10 * time.Millisecond // USER_HZ is 100
	for line := range strings.Lines(string(must(os.ReadFile("/proc/"+pid+"/status"))) + string(must(os.ReadFile("/proc/"+pid+"/io")))) {
		name, value, _ := strings.Cut(line, ":")
		v, _ := strconv.ParseFloat(strings.Fields(value + " 0")[0], 64)
		switch name {
		case "VmRSS":
			u.rss = v / 1024
		case "RssAnon":
			u.anon = v / 1024
		case "VmHWM":
			u.peak = v / 1024
		case "write_bytes":
			u.written = v
		}
	}
	return u
}

// profiled writes profiles of what f does, if they are asked for.
func profiled(b testing.TB, west, east *process, f func()) {
	dir := os.Getenv(profileEnv)
	if dir == "" {
		f()
		return
	}
	west.say("profile %s", filepath.Join(dir, b.Name()+"-west"))
	east.say("profile %s", filepath.Join(dir, b.Name()+"-east"))
	f()
	west.say("profiled")
	east.say("profiled")
}

// pair starts both sides, with west exporting.
func pair(b *testing.B, services, slots, endpoints, linger int) (west, east *process, addr string) {
	dir := b.TempDir()
	for _, name := range []string{"west", "east"} {
		ca := newAuthority(b, name+".test")
		writePEM(b, filepath.Join(dir, name+".test.ca"), "CERTIFICATE", ca.cert.Raw)
		svid := ca.svid(b, identity.ControlPlaneID(ca.td))
		writePEM(b, filepath.Join(dir, name+".crt"), "CERTIFICATE", svid.Certificates[0].Raw)
		writePEM(b, filepath.Join(dir, name+".key"), "PRIVATE KEY", must(x509.MarshalPKCS8PrivateKey(svid.PrivateKey)))
	}
	west, east = newProcess(b, dir), newProcess(b, dir)
	west.say("start west-data")
	east.say("start east-data")
	if got := west.say("export %d %d %d %d", services, slots, endpoints, linger); got != "ok" {
		b.Fatal(got)
	}
	return west, east, west.say("serve")
}

func writePEM(b *testing.B, path, kind string, der []byte) {
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		b.Fatal(err)
	}
}

// BenchmarkSync is a first list of 10,000 services with 100 endpoints each.
func BenchmarkSync(b *testing.B) {
	for range b.N {
		const services, slots = 10_000, 2
		west, east, addr := pair(b, services, slots, benchSlot, 100)
		time.Sleep(2 * time.Second)
		w0, e0, start := west.use(), east.use(), time.Now()
		var wall time.Duration
		profiled(b, west, east, func() {
			east.say("mirror %s", addr)
			east.say("wait %d", services*(slots+1))
			wall = time.Since(start)
			time.Sleep(time.Second)
		})
		b.Log("exporter's database, KB (file, in use): " + west.say("sizes") + "; mirror's: " + east.say("sizes"))
		w, e := west.use(), east.use()
		time.Sleep(45 * time.Second) // until what the sync has left behind is given back; the peak is a figure of its own
		w.memory(west.use())
		e.memory(east.use())
		b.ReportMetric(wall.Seconds(), "wall-s")
		b.ReportMetric((w.cpu - w0.cpu).Seconds(), "exporter-cpu-s")
		b.ReportMetric((e.cpu - e0.cpu).Seconds(), "mirror-cpu-s")
		b.ReportMetric(w.rss, "exporter-rss-MB")
		b.ReportMetric(w.peak, "exporter-peak-MB")
		b.ReportMetric(w.anon, "exporter-anon-MB")
		b.ReportMetric(e.anon, "mirror-anon-MB")
		b.ReportMetric(e.rss, "mirror-rss-MB")
		b.ReportMetric(e.peak, "mirror-peak-MB")
		b.ReportMetric(0, "ns/op")
	}
}

// BenchmarkFlap is the cost of changed endpoints in slots of 32, at 1,000 per second, with the usual debounce.
func BenchmarkFlap(b *testing.B) {
	west, east, addr := pair(b, 1000, 3, flapSlot, 100)
	east.say("mirror %s", addr)
	east.say("wait 4000")
	time.Sleep(2 * time.Second)
	for range b.N {
		w0, e0 := west.use(), east.use()
		var n float64
		profiled(b, west, east, func() {
			n = west.number("flap 1000 5000 %d 50", flapSlot)
			time.Sleep(time.Second)
		})
		w, e := west.use(), east.use()
		b.ReportMetric(float64((w.cpu-w0.cpu).Microseconds())/n, "exporter-µs/flap")
		b.ReportMetric(float64((e.cpu-e0.cpu).Microseconds())/n, "mirror-µs/flap")
		b.ReportMetric((w.written-w0.written)/n/1000, "exporter-KB/flap")
		b.ReportMetric((e.written-e0.written)/n/1000, "mirror-KB/flap")
		b.ReportMetric(0, "ns/op")
	}
}

// BenchmarkLatency is from an Update in one cluster to the follower of another's imports, without the debounce.
func BenchmarkLatency(b *testing.B) {
	for _, rate := range []int{20, 1000} {
		b.Run(fmt.Sprintf("%d-per-s", rate), func(b *testing.B) {
			west, east, addr := pair(b, 1000, 3, flapSlot, 1)
			east.say("mirror %s", addr)
			east.say("wait 4000")
			time.Sleep(2 * time.Second)
			for range b.N {
				east.say("figures")
				west.say("flap %d 5000 %d 1", rate, flapSlot)
				time.Sleep(time.Second)
				f := strings.Fields(east.say("figures"))
				b.ReportMetric(must(strconv.ParseFloat(f[0], 64))/1000, "p50-ms")
				b.ReportMetric(must(strconv.ParseFloat(f[1], 64))/1000, "p99-ms")
				b.ReportMetric(0, "ns/op")
			}
		})
	}
}

// BenchmarkThroughput is how many changes per second arrive when the exporter writes without a pause.
func BenchmarkThroughput(b *testing.B) {
	west, east, addr := pair(b, 1000, 3, flapSlot, 1)
	east.say("mirror %s", addr)
	east.say("wait 4000")
	for range b.N {
		before := must(strconv.Atoi(strings.Fields(east.say("figures"))[2]))
		start := time.Now()
		west.say("flap 0 5000 %d 1", flapSlot)
		after := must(strconv.Atoi(strings.Fields(east.say("figures"))[2]))
		b.ReportMetric(float64(after-before)/time.Since(start).Seconds(), "changes/s")
		b.ReportMetric(0, "ns/op")
	}
}

// BenchmarkFanOut is the cost of a change for the exporter with 50 peers.
func BenchmarkFanOut(b *testing.B) {
	const peers = 50
	west, east, addr := pair(b, 1000, 3, flapSlot, 1)
	time.Sleep(time.Second)
	before := west.use()
	east.say("watchers %d %s", peers, addr)
	time.Sleep(time.Second)
	for range b.N {
		w0 := west.use()
		b.ReportMetric((w0.rss-before.rss)/peers, "exporter-MB/peer")
		seen := must(strconv.Atoi(strings.Fields(east.say("figures"))[2]))
		west.say("flap 500 5000 %d 1", flapSlot)
		time.Sleep(time.Second)
		w := west.use()
		n := must(strconv.Atoi(strings.Fields(east.say("figures"))[2])) - seen
		b.ReportMetric(float64((w.cpu-w0.cpu).Microseconds())/float64(n), "exporter-µs/delivery")
		b.ReportMetric(0, "ns/op")
	}
}

// BenchmarkIdle is an embedded etcd that nobody uses.
func BenchmarkIdle(b *testing.B) {
	for range b.N {
		p := newProcess(b, b.TempDir())
		ready := p.number("start data")
		time.Sleep(3 * time.Second)
		u0 := p.use()
		time.Sleep(20 * time.Second)
		u := p.use()
		b.ReportMetric(ready/1e6, "ready-s")
		b.ReportMetric(u.rss, "rss-MB")
		b.ReportMetric((u.cpu-u0.cpu).Seconds()/20*100, "cpu-%")
		b.ReportMetric(0, "ns/op")
	}
}

// BenchmarkExporterSet is a Set of 20,000 keys that have not changed.
func BenchmarkExporterSet(b *testing.B) {
	e := etcd.NewExporter(etcd.ExporterConfig{Store: startEmbedded(b, b.TempDir()).Store(), Linger: time.Millisecond})
	background(b, e.Run)
	s := services(10_000, "v1")
	e.Set("all", s)
	if err := e.Flush(context.Background()); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		e.Set("all", s) // unchanged slices, as from Encode
	}
}
