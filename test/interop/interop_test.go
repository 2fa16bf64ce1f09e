package interop

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/miekg/dns"

	"github.com/hanse-mesh/hanse/test/netns"
)

const domain = ".shop.svc.clusterset.local"

// offer is what east offers: a service on one pod, and a headless one of two. Only clients may call them.
const offer = `
apiVersion: v1
kind: Service
metadata: {namespace: shop, name: app}
spec: {ports: {APP}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {namespace: shop, name: app, labels: {kubernetes.io/service-name: app}, annotations: {hanse.mesh/service-account: server}}
addressType: IPv4
ports: {APP}
endpoints: [{addresses: [10.2.1.2]}]
---
apiVersion: multicluster.x-k8s.io/v1alpha1
kind: ServiceExport
metadata: {namespace: shop, name: app}
---
apiVersion: v1
kind: Service
metadata: {namespace: shop, name: set}
spec: {clusterIP: None, ports: {SET}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {namespace: shop, name: set, labels: {kubernetes.io/service-name: set}, annotations: {hanse.mesh/service-account: server}}
addressType: IPv4
ports: {SET}
endpoints: [{addresses: [10.2.1.2], hostname: set-0}, {addresses: [10.2.2.2], hostname: set-1}]
---
apiVersion: multicluster.x-k8s.io/v1alpha1
kind: ServiceExport
metadata: {namespace: shop, name: set}
---
apiVersion: hanse.mesh/v1alpha1
kind: AccessPolicy
metadata: {namespace: shop, name: app}
spec:
  targetRefs: [{kind: Service, name: app}, {kind: Service, name: set}]
  rules: [{from: ["spiffe://*/ns/shop/sa/client"]}]
`

const (
	appPorts = `[{name: grpc, port: 10000}, {name: http, port: 8080}, {name: tcp-redis, port: 6379}, {name: tcp-sql, port: 5432}]`
	setPorts = `[{name: tcp-greet, port: 7000}]`
)

// grpcCases are all that need no account at a cloud.
var grpcCases = []string{
	"empty_unary", "large_unary", "client_streaming", "server_streaming", "ping_pong", "empty_stream", "timeout_on_sleeping_server", "cancel_after_begin",
	"cancel_after_first_response", "status_code_and_message", "special_status_message", "custom_metadata", "unimplemented_method", "unimplemented_service",
	"orca_per_rpc", "orca_oob",
}

func TestInterop(t *testing.T) {
	netns.Test(t, func(t *testing.T) {
		l := newLab(t, "")
		l.file("east", "mesh.yaml", offer, "{APP}", appPorts, "{SET}", setPorts)
		l.hanse("east", "", "apply", "-f", l.path("east", "mesh.yaml"))
		set0 := l.pod("east", "set-0", "10.2.1.", `
workloads:
- address: 10.2.1.2
  ports: {10000: "127.0.0.1:10000", 8080: "127.0.0.1:8080", 6379: "127.0.0.1:6379", 5432: "127.0.0.1:5432", 7000: "127.0.0.1:7000"}
`)
		set1 := l.pod("east", "set-1", "10.2.2.", `
workloads:
- address: 10.2.2.2
  ports: {7000: "127.0.0.1:7000"}
`)
		client := l.pod("west", "client", "10.1.0.", "")
		near := l.pod("east", "near", "10.2.3.", "")
		for i, p := range []*pod{set0, set1} { // core forwards nothing: between the networks there is only the gateway
			link := fmt.Sprintf("10.2.%d.", 101+i)
			netns.Join(t, near.ns, p.ns, link+"1/30", link+"2/30")
			near.ns.Route(t, p.ip+"/32", link+"2")
		}
		set0.greeter("127.0.0.1:7000")
		set1.greeter("127.0.0.1:7000")
		l.run(set0.ns, "grpc-server", "grpc-interop-server", "-port", "10000")
		serveWeb(set0)
		l.eventually(30*time.Second, "west calls east", func() error {
			out, err := client.output("curl", "-sS", "--fail-with-body", "--max-time", "5", "http://app"+domain+":8080/")
			if err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
			return nil
		})

		t.Run("dns", func(t *testing.T) { testDNS(t, client) })
		t.Run("curl", func(t *testing.T) { testCurl(t, client) })
		t.Run("grpc", func(t *testing.T) { testGRPC(t, client) })
		t.Run("websocket", func(t *testing.T) { testWebSocket(t, client) })
		t.Run("headless", func(t *testing.T) { testHeadless(t, client) })
		t.Run("near", func(t *testing.T) { testNear(t, near) })
		t.Run("unprivileged", func(t *testing.T) { testUnprivileged(t, l) })
		t.Run("redis", func(t *testing.T) { testRedis(t, client, set0) })
		t.Run("postgres", func(t *testing.T) { testPostgres(t, client, set0) })
		t.Run("ipv6", func(t *testing.T) { testIPv6(t, client) })
		t.Run("sealed", func(t *testing.T) { testSealed(t, l, set0) })
		t.Run("alone", func(t *testing.T) { testAlone(t, l, client) })
	})
}

func testDNS(t *testing.T, client *pod) {
	for _, network := range []string{"udp", "tcp"} {
		for _, c := range []struct {
			name  string
			qtype uint16
			want  string
		}{
			{"app" + domain + ".", dns.TypeA, "240."},
			{"app.shop.", dns.TypeA, "240."},
			{"_http._tcp.app" + domain + ".", dns.TypeSRV, "0 100 8080 app" + domain + "."},
			{"nobody" + domain + ".", dns.TypeA, "NXDOMAIN"},
			{"outside.example.", dns.TypeA, "10.9.0.53"},
			{"nowhere.example.", dns.TypeA, "NXDOMAIN"},
		} {
			m, err := client.ask(c.name, c.qtype, network)
			if err != nil {
				t.Errorf("%s over %s: %v", c.name, network, err)
				continue
			}
			got := dns.RcodeToString[m.Rcode]
			if len(m.Answer) > 0 {
				got = strings.TrimPrefix(m.Answer[0].String(), m.Answer[0].Header().String())
			}
			if !strings.HasPrefix(got, c.want) {
				t.Errorf("%s over %s: %s, want %s", c.name, network, got, c.want)
			}
		}
	}
	// As every program of this machine asks, by its C library.
	if out, err := client.output("getent", "ahostsv4", "app"+domain); err != nil || !strings.HasPrefix(out, "240.") {
		t.Errorf("getent: %s %v", out, err)
	}
}

// serveWeb answers with who called, and echoes on WebSockets.
func serveWeb(p *pod) {
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(io.LimitReader(r.Body, 8<<20))
		fmt.Fprintf(w, "%s %s %d %s", r.Proto, r.Host, len(b), r.Header.Get("X-Forwarded-Client-Cert"))
	})
	mux.HandleFunc("/ws", func(w http.ResponseWriter, r *http.Request) {
		c, err := websocket.Accept(w, r, nil)
		if err != nil {
			return
		}
		defer c.CloseNow()
		c.SetReadLimit(4 << 20)
		for {
			kind, b, err := c.Read(r.Context())
			if err != nil || c.Write(r.Context(), kind, b) != nil {
				return
			}
		}
	})
	ln, err := p.ns.Listen("tcp", "127.0.0.1:8080")
	must(p.l.t, err)
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	go func() { _ = srv.Serve(ln) }() // ends with Close
	p.l.stop = append(p.l.stop, func() { _ = srv.Close() })
}

func testCurl(t *testing.T, client *pod) {
	body := filepath.Join(client.l.dir, "body")
	must(t, os.WriteFile(body, make([]byte, 3<<20), 0o600))
	for _, version := range []string{"--http1.1", "--http2-prior-knowledge"} {
		url := "http://app" + domain + ":8080/x"
		out, err := client.output("curl", "-sS", "--fail-with-body", "--max-time", "20", version, "--data-binary", "@"+body, url)
		if err != nil || !strings.Contains(out, " app"+domain+":8080 3145728 ") || !strings.Contains(out, "spiffe://west.test/ns/shop/sa/client") {
			t.Errorf("curl %s: %s %v", version, out, err)
		}
	}
	if out, err := client.output("curl", "-sS", "--max-time", "10", "http://app"+domain+":8081/"); err == nil {
		t.Errorf("a port that is not declared: %s", out)
	}
	if out, err := client.output("curl", "-sS", "--max-time", "20", "http://nobody"+domain+":8080/"); err == nil || !strings.Contains(out, "resolve") {
		t.Errorf("a service that does not exist: %s %v", out, err)
	}
}

func testGRPC(t *testing.T, client *pod) {
	run := func(name string, more ...string) {
		t.Run(name, func(t *testing.T) {
			args := append([]string{"grpc-interop-client", "-server_host", "app" + domain, "-server_port", "10000", "-test_case", name}, more...)
			if out, err := client.output(args...); err != nil {
				t.Errorf("%v: %s", err, out)
			}
		})
	}
	for _, name := range grpcCases {
		var more []string
		if strings.HasPrefix(name, "orca") {
			more = []string{"-service_config_json", `{"loadBalancingConfig": [{"test_backend_metrics_load_balancer": {}}]}`}
		}
		run(name, more...)
	}
	run("rpc_soak", "-soak_iterations", "100", "-soak_num_threads", "2", "-soak_overall_timeout_seconds", "25", "-soak_per_iteration_max_acceptable_latency_ms", "5000")
	run("channel_soak", "-soak_iterations", "50", "-soak_num_threads", "2", "-soak_overall_timeout_seconds", "25", "-soak_per_iteration_max_acceptable_latency_ms", "5000")
}

func testWebSocket(t *testing.T, client *pod) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	web := &http.Client{Transport: &http.Transport{DialContext: client.dial}}
	c, _, err := websocket.Dial(ctx, "ws://app"+domain+":8080/ws", &websocket.DialOptions{HTTPClient: web})
	must(t, err)
	defer c.CloseNow()
	c.SetReadLimit(4 << 20)
	for _, n := range []int{0, 1, 125, 126, 65535, 65536, 1 << 20} {
		sent := []byte(strings.Repeat("x", n))
		must(t, c.Write(ctx, websocket.MessageBinary, sent))
		kind, got, err := c.Read(ctx)
		if err != nil || kind != websocket.MessageBinary || string(got) != string(sent) {
			t.Fatalf("%d bytes: %d came back, %v", n, len(got), err)
		}
	}
	reading := c.CloseRead(ctx)
	must(t, c.Ping(ctx))
	if err := c.Close(websocket.StatusNormalClosure, "done"); err != nil {
		t.Errorf("close: %v", err)
	}
	<-reading.Done()
}

// testHeadless calls endpoints one by one, on another network: each by an address of its own, which leads to it and no other.
func testHeadless(t *testing.T, client *pod) {
	m, err := client.ask("set"+domain+".", dns.TypeA, "udp")
	if err != nil || len(m.Answer) != 2 {
		t.Fatalf("two endpoints: %v, %v", m, err)
	}
	var said []string
	for _, rr := range m.Answer {
		c, err := client.ns.Dial(t.Context(), nil, "tcp", rr.(*dns.A).A.String()+":7000")
		must(t, err)
		hello, err := greeting(c)
		must(t, err)
		said = append(said, hello)
	}
	if slices.Sort(said); fmt.Sprint(said) != "[set-0 set-1]" {
		t.Errorf("behind the two addresses are %v", said)
	}
	for i := range 10 {
		name := fmt.Sprintf("set-%d", i%2)
		c, err := client.dial(t.Context(), "tcp", name+".east.set"+domain+":7000")
		must(t, err)
		if hello, err := greeting(c); err != nil || hello != name {
			t.Errorf("%s answered for %s: %v", hello, name, err)
		}
	}
}

// greeting is what the server at the other end calls itself, before it was sent a word. The connection is closed by halves.
func greeting(c net.Conn) (string, error) {
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	r := bufio.NewReader(c)
	hello, err := r.ReadString('\n')
	if err != nil {
		return "", err
	}
	if _, err := io.WriteString(c, "half"); err != nil {
		return "", err
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		return "", err
	}
	rest, err := io.ReadAll(r)
	if string(rest) != "half" {
		return "", fmt.Errorf("%q came back, %v", rest, err)
	}
	return strings.TrimSpace(hello), err
}

// testNear calls from the endpoints' own network: they have their own addresses, which are no way past the mesh all the same.
func testNear(t *testing.T, near *pod) {
	c, err := near.ns.Dial(t.Context(), nil, "tcp", "10.2.2.2:7000") // nobody has asked for its name yet
	must(t, err)
	if hello, err := greeting(c); err != nil || hello != "set-1" {
		t.Errorf("by its address: %s %v", hello, err)
	}
	for name, address := range map[string]string{"set-0": "10.2.1.2", "set-1": "10.2.2.2"} {
		m, err := near.ask(name+".east.set"+domain+".", dns.TypeA, "udp")
		if err != nil || len(m.Answer) != 1 || m.Answer[0].(*dns.A).A.String() != address {
			t.Errorf("%s: %v %v", name, m, err)
		}
		c, err := near.dial(t.Context(), "tcp", name+".east.set"+domain+":7000")
		must(t, err)
		if hello, err := greeting(c); err != nil || hello != name {
			t.Errorf("%s: %s %v", name, hello, err)
		}
	}
	out, err := near.output("curl", "-sS", "--max-time", "10", "http://app"+domain+":8080/")
	if err != nil || !strings.Contains(out, "spiffe://east.test/ns/shop/sa/client") {
		t.Errorf("curl: %s %v", out, err)
	}
	near.l.eventually(10*time.Second, "the sidecar's access log names what it carried", func() error { // it is written in pieces
		log, err := os.ReadFile(near.l.path("east", "near.access.log"))
		if err != nil || strings.Count(string(log), `"set.shop.svc.cluster`) < 3 || strings.Contains(string(log), `"outside"`) {
			return fmt.Errorf("%v: %s", err, log)
		}
		return nil
	})
}

// testUnprivileged: without capture, a service with a local listener is found by its name, at that listener.
func testUnprivileged(t *testing.T, l *lab) {
	p := l.plainPod("west", "plain", "10.1.1.", strings.Replace(sidecarYAML, "capture: {enabled: true, dns: true}\ndns: {", "dns: {listen: ['127.0.0.1:5353'], ", 1)+`
listeners:
- {listen: "127.0.1.1:8080", to: "app.shop:8080"}
- {listen: "127.0.1.2:7000", to: "set.shop:7000"}
`, "client")
	p.start()
	for name, want := range map[string]string{
		"app" + domain + ".": "127.0.1.1", "set" + domain + ".": "127.0.1.2", "set-0.east.set" + domain + ".": "no address", "nobody" + domain + ".": "NXDOMAIN", "outside.example.": "10.9.0.53",
	} {
		m, err := p.askAt("127.0.0.1:5353", name, dns.TypeA, "udp")
		must(t, err)
		got := "no address"
		if m.Rcode != dns.RcodeSuccess {
			got = dns.RcodeToString[m.Rcode]
		} else if len(m.Answer) > 0 {
			got = m.Answer[0].(*dns.A).A.String()
		}
		if got != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
	}
	out, err := p.output("curl", "-sS", "--max-time", "10", "--resolve", "app"+domain+":8080:127.0.1.1", "http://app"+domain+":8080/")
	if err != nil || !strings.Contains(out, "spiffe://west.test/ns/shop/sa/client") {
		t.Errorf("curl: %s %v", out, err)
	}
}

// need fails where a program is missing and nothing may be skipped; without names what may be, remedy how to get the program.
func need(t *testing.T, without, remedy string, programs ...string) {
	t.Helper()
	for _, name := range programs {
		if _, err := exec.LookPath(name); err != nil {
			if os.Getenv("HANSE_NO_SKIP") != "" && os.Getenv(without) == "" {
				t.Fatalf("%s is needed: %s", name, remedy)
			}
			t.Skipf("SKIPPED, NOT TESTED: there is no %s", name)
		}
	}
}

func testRedis(t *testing.T, client, server *pod) {
	need(t, "HANSE_WITHOUT_REDIS", "apt-get install redis", "redis-server", "redis-cli")
	client.l.run(server.ns, "redis", "redis-server", "--port", "6379", "--bind", "127.0.0.1", "--save", "", "--appendonly", "no")
	redis := func(args ...string) (string, error) {
		return client.output(append([]string{"redis-cli", "-h", "app" + domain}, args...)...)
	}
	client.l.eventually(10*time.Second, "redis answers", func() error {
		if out, err := redis("PING"); err != nil || out != "PONG" {
			return fmt.Errorf("%s %v", out, err)
		}
		return nil
	})
	for _, c := range []struct{ command, want string }{{"SET key value", "OK"}, {"GET key", "value"}, {"LPUSH list a b c", "3"}, {"LRANGE list 0 -1", "c\nb\na"}} {
		if out, err := redis(strings.Fields(c.command)...); err != nil || out != c.want {
			t.Errorf("%s: %q %v", c.command, out, err)
		}
	}
}

func testPostgres(t *testing.T, client, server *pod) {
	if u, err := os.ReadFile("/proc/self/uid_map"); err != nil || strings.Fields(string(u))[2] == "1" {
		t.Skip("NOT TESTED: postgres refuses to run as root, and this user namespace has nobody else; redis stands for TCP")
	}
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin") // Debian's place
	if len(found) > 0 {
		must(t, os.Setenv("PATH", os.Getenv("PATH")+":"+found[len(found)-1]))
	}
	need(t, "HANSE_WITHOUT_POSTGRES", "apt-get install postgresql", "postgres", "initdb", "psql")
	who, err := user.Lookup("postgres")
	must(t, err)
	uid, _ := strconv.Atoi(who.Uid)
	gid, _ := strconv.Atoi(who.Gid)
	as := &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
	data := filepath.Join(client.l.dir, "pg")
	must(t, os.Mkdir(data, 0o700))
	must(t, os.Chown(data, uid, gid))
	init := exec.Command("initdb", "-D", data, "-A", "trust", "-U", "app", "--no-sync", "--no-locale", "-E", "UTF8")
	init.SysProcAttr, init.Dir = &syscall.SysProcAttr{Credential: as}, client.l.dir
	if out, err := init.CombinedOutput(); err != nil {
		t.Fatalf("initdb: %v: %s", err, out)
	}
	client.l.runAs(server.ns, as, "postgres", "postgres", "-D", data, "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "fsync=off")
	psql := func(sql string) (string, error) {
		return client.output("psql", "-X", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-d", "host=app"+domain+" user=app dbname=postgres sslmode=disable connect_timeout=5", "-c", sql)
	}
	client.l.eventually(20*time.Second, "postgres answers", func() error {
		if out, err := psql("select 1"); err != nil || out != "1" {
			return fmt.Errorf("%s %v", out, err)
		}
		return nil
	})
	for _, c := range []struct{ sql, want string }{
		{"create table t as select g as n, repeat(md5(g::text), 100) as s from generate_series(1, 2000) g", "SELECT 2000"},
		{"select count(*), sum(length(s)) from t", "2000|6400000"},
		{"select length(string_agg(s, '')) from t", "6400000"},
	} {
		if out, err := psql(c.sql); err != nil || out != c.want {
			t.Errorf("%s: %.100s %v", c.sql, out, err)
		}
	}
	if out, err := psql("select s from t"); err != nil || len(out) != 2000*3201-1 {
		t.Errorf("%d bytes of rows, %v", len(out), err)
	}
}

// testSealed makes sure that nothing of all this went past the mesh: who calls without it is refused.
func testSealed(t *testing.T, l *lab, server *pod) {
	for _, port := range []string{"8080", "10000", "6379"} {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		c, err := l.core.Dial(ctx, nil, "tcp", server.ip+":"+port)
		if err == nil {
			_ = c.SetDeadline(time.Now().Add(5 * time.Second))
			_, _ = io.WriteString(c, "PING\r\n\r\n")
			if n, err := c.Read(make([]byte, 100)); err == nil {
				t.Errorf("port %s answers %d bytes to a caller without identity", port, n)
			}
			_ = c.Close()
		}
		cancel()
	}
}

// testIPv6 calls by the other family's addresses, of which the sidecar hands out its own, too.
func testIPv6(t *testing.T, client *pod) {
	if !haveIPv6() {
		t.Skip("SKIPPED, NOT TESTED: this machine has no IPv6")
	}
	m, err := client.ask("app"+domain+".", dns.TypeAAAA, "udp")
	if err != nil || len(m.Answer) != 1 || !strings.HasPrefix(m.Answer[0].(*dns.AAAA).AAAA.String(), "fd68:616e:7365::") {
		t.Fatalf("%v, %v", m, err)
	}
	out, err := client.output("curl", "-sS", "-6", "--max-time", "10", "http://app"+domain+":8080/")
	if err != nil || !strings.Contains(out, "spiffe://west.test/ns/shop/sa/client") {
		t.Errorf("curl -6: %s %v", out, err)
	}
}

// testAlone: with both control planes dead, the upstream resolver gone and the sidecar started again, the names of the mesh are answered with
// the addresses of before, and lead where they led.
func testAlone(t *testing.T, l *lab, client *pod) {
	answer := func(name string) string {
		m, err := client.ask(name, dns.TypeA, "udp")
		if err != nil {
			return err.Error()
		}
		if len(m.Answer) == 0 {
			return dns.RcodeToString[m.Rcode]
		}
		return m.Answer[0].(*dns.A).A.String()
	}
	names := []string{"app" + domain + ".", "set-0.east.set" + domain + ".", "set-1.east.set" + domain + "."}
	var before []string
	for _, n := range names {
		before = append(before, answer(n))
	}
	l.eventually(20*time.Second, "the sidecar has kept what it knows", func() error {
		b, err := os.ReadFile(l.path("west", "client/xds/xds.state"))
		for _, name := range []string{"app" + domain + ":8080", "set" + domain + ":7000"} {
			if !strings.Contains(string(b), name) {
				return fmt.Errorf("%s is not kept (%v)", name, err)
			}
		}
		return nil
	})
	for _, h := range l.hansed {
		h.kill()
	}
	for _, r := range l.resolver {
		must(t, r.Shutdown())
	}
	client.sidecar.kill()
	client.start()
	for i, n := range names {
		if got := answer(n); got != before[i] || !strings.HasPrefix(got, "240.") {
			t.Errorf("%s is %s, and was %s", n, got, before[i])
		}
	}
	for name, want := range map[string]string{"outside.example.": "SERVFAIL", "other" + domain + ".": "SERVFAIL"} {
		began := time.Now()
		if got := answer(name); got != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
		if d := time.Since(began); d > 4*time.Second {
			t.Errorf("%s took %s", name, d)
		}
	}
	testCurl(t, client)
	testHeadless(t, client)
}
