package interop

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/hanse-mesh/hanse/test/netns"
)

// Where make builds the programs.
const (
	programs = "../../bin"
	tools    = "../../bin/tools"
)

const hansedYAML = `
cluster: {NAME}
trustDomain: {NAME}.test
mesh: test
region: eu
network: {NAME}
gateways: [{GATEWAYS}]
dataDir: data
socket: hansed.sock
federation: {listen: "{IP}:7443"}
identity: {listen: "{IP}:7444"{IDENTITY}}
xds: {listen: "{IP}:7445"}
bundleEndpoint: {listen: "{IP}:7446"}
admin: {listen: "{ADMIN}:7440"}
`

const gatewayYAML = `
role: gateway
cluster: {NAME}
trustDomain: {NAME}.test
controlPlane: {identity: ["{IP}:7444"], xds: ["{IP}:7445"], trustBundle: bundle.json, tokenFile: gateway.token}
stateDir: gateway
gateway: {listen: "{IP}:15443"}
admin: {listen: "{ADMIN}:15020"}
drainTimeout: 1s
`

const sidecarYAML = `
cluster: {NAME}
trustDomain: {NAME}.test
namespace: shop
controlPlane: {identity: ["{IP}:7444"], xds: ["{IP}:7445"], trustBundle: bundle.json, tokenFile: {POD}.token}
stateDir: {POD}
capture: {enabled: true, dns: true}
dns: {upstreams: [{UPSTREAM}], shortNames: always}
log: {access: {POD}.access.log}
drainTimeout: 1s
`

// shortLives let SVIDs be renewed while a test looks.
const shortLives = ", x509Life: 6s, jwtLife: 30s, rootLife: 2h"

const agentYAML = `
role: agent
cluster: {NAME}
trustDomain: {NAME}.test
namespace: shop
controlPlane: {identity: ["{IP}:7444"], xds: ["{IP}:7445"], trustBundle: bundle.json, tokenFile: {ACCOUNT}.token}
stateDir: {ACCOUNT}
socket: {ACCOUNT}/w.sock
admin: {listen: "{ADMIN}:15021"}
timers: {sync: 1s}
`

// pod is a workload's network namespace, and the sidecar in it.
type pod struct {
	l       *lab
	cluster string
	name    string
	ns      *netns.NS
	ip      string
	sidecar *process
}

// lab is two clusters, whose control planes and the gateway of east share the namespace core.
type lab struct {
	t    *testing.T
	dir  string
	core *netns.NS
	stop []func()

	hansed   map[string]*process
	resolver []*dns.Server // the upstream
}

// process is one that was started.
type process struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
}

// kill is kill -9, and waits for the end.
func (p *process) kill() {
	_ = p.cmd.Process.Kill()
	<-p.done
}

var ips = map[string]string{"west": "10.9.0.1", "east": "10.9.0.2"}

// newLab starts the clusters; identity is more of that section of their configuration.
func newLab(t *testing.T, identity string) *lab {
	t.Helper()
	dir, err := os.MkdirTemp("", "h") // short: Unix sockets' paths are
	must(t, err)
	must(t, os.Chmod(dir, 0o755)) // postgres is another user
	l := &lab{t: t, dir: dir, core: netns.New(t), hansed: map[string]*process{}}
	t.Cleanup(func() {
		for i := len(l.stop) - 1; i >= 0; i-- {
			l.stop[i]()
		}
		if t.Failed() {
			l.tails()
		}
		_ = os.RemoveAll(dir)
	})
	l.core.Address(t, "10.9.0.1/32,10.9.0.2/32,10.9.0.53/32")
	l.upstream()
	for i, name := range []string{"west", "east"} {
		gateways := ""
		if name == "east" {
			gateways = `"10.9.0.2:15443"`
		}
		l.file(name, "hansed.yaml", hansedYAML, "{IDENTITY}", identity, "{GATEWAYS}", gateways, "{ADMIN}", fmt.Sprintf("127.0.%d.1", i+1))
		l.hansed[name] = l.run(l.core, name+"-hansed", "hansed", "--config", l.path(name, "hansed.yaml"))
		l.ready(l.core, fmt.Sprintf("127.0.%d.1:7440", i+1))
		l.save(l.path(name, "bundle.json"), l.hanse(name, "", "trust", "show", name+".test", "-o", "bundle"))
	}
	l.hanse("west", l.hanse("east", "", "token", "create", "--for", "west"), "join", "-")
	l.save(l.path("east", "gateway.token"), l.hanse("east", "", "token", "create", "--gateway"))
	l.file("east", "gateway.yaml", gatewayYAML, "{ADMIN}", "127.0.2.1")
	l.run(l.core, "east-gateway", "hanse-proxy", "--config", l.path("east", "gateway.yaml"))
	return l
}

// pod makes a namespace that reaches core only, installs the rules in it and starts a sidecar there.
func (l *lab) pod(cluster, name, net string, more string) *pod {
	l.t.Helper()
	p := l.plainPod(cluster, name, net, sidecarYAML+more, map[bool]string{false: "client", true: "server"}[more != ""])
	if out, err := p.output("hanse-proxy", "capture", "install", "--config", l.path(cluster, name+".yaml")); err != nil {
		l.t.Fatalf("%v: %s", err, out)
	}
	p.start()
	return p
}

// plainPod makes the namespace, and the sidecar's file.
func (l *lab) plainPod(cluster, name, net, config, account string) *pod {
	l.t.Helper()
	p := &pod{l: l, cluster: cluster, name: name, ns: netns.New(l.t), ip: net + "2"}
	net6 := "fd00:" + strings.ReplaceAll(strings.TrimSuffix(net, "."), ".", ":") + "::"
	if haveIPv6() {
		netns.Join(l.t, l.core, p.ns, net+"1/24,"+net6+"1/64", net+"2/24,"+net6+"2/64")
		p.ns.Route(l.t, "default", net6+"1")
	} else {
		netns.Join(l.t, l.core, p.ns, net+"1/24", net+"2/24")
	}
	p.ns.Route(l.t, "default", net+"1")
	l.save(l.path(cluster, name+".token"), l.hanse(cluster, "", "token", "create", "--agent", "shop/"+account))
	l.file(cluster, name+".yaml", config, "{POD}", name)
	return p
}

// start starts the sidecar.
func (p *pod) start() {
	p.l.t.Helper()
	p.sidecar = p.l.run(p.ns, p.name+"-sidecar", "hanse-proxy", "--config", p.l.path(p.cluster, p.name+".yaml"))
	p.l.ready(p.ns, "127.0.0.1:15020")
}

// agents starts one for west's client and one for east's server, in core, and returns the sockets of their Workload APIs.
func (l *lab) agents() map[string]string {
	l.t.Helper()
	sockets := map[string]string{}
	for i, cluster := range []string{"west", "east"} {
		account := []string{"client", "server"}[i]
		l.save(l.path(cluster, account+".token"), l.hanse(cluster, "", "token", "create", "--agent", "shop/"+account))
		admin := fmt.Sprintf("127.0.%d.1", i+1)
		l.file(cluster, "agent.yaml", agentYAML, "{ACCOUNT}", account, "{ADMIN}", admin)
		l.run(l.core, cluster+"-agent", "hanse-proxy", "--config", l.path(cluster, "agent.yaml"))
		l.ready(l.core, admin+":15021")
		sockets[cluster] = l.path(cluster, account+"/w.sock")
	}
	return sockets
}

func haveIPv6() bool {
	_, err := os.Stat("/proc/net/if_inet6")
	return err == nil
}

// upstream is the resolver of before, which knows a name of its own and the pods' resolv.conf.
func (l *lab) upstream() {
	handler := dns.HandlerFunc(func(w dns.ResponseWriter, r *dns.Msg) {
		m := new(dns.Msg)
		if m.SetReply(r); strings.EqualFold(r.Question[0].Name, "outside.example.") && r.Question[0].Qtype == dns.TypeA {
			m.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: r.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 60}, A: net.IPv4(10, 9, 0, 53)}}
		} else if !strings.EqualFold(r.Question[0].Name, "outside.example.") {
			m.Rcode = dns.RcodeNameError
		}
		_ = w.WriteMsg(m)
	})
	udp, err := l.core.ListenPacket("udp", "10.9.0.53:53")
	must(l.t, err)
	tcp, err := l.core.Listen("tcp", "10.9.0.53:53")
	must(l.t, err)
	for _, s := range []*dns.Server{{PacketConn: udp, Handler: handler}, {Listener: tcp, Handler: handler}} {
		ready := make(chan struct{})
		s.NotifyStartedFunc = func() { close(ready) }
		go func() { _ = s.ActivateAndServe() }() // ends with Shutdown
		<-ready
		l.resolver = append(l.resolver, s)
		l.stop = append(l.stop, func() { _ = s.Shutdown() }) // a second time is no harm
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (l *lab) path(cluster, name string) string { return filepath.Join(l.dir, cluster, name) }

func (l *lab) save(path, content string) {
	l.t.Helper()
	must(l.t, os.MkdirAll(filepath.Dir(path), 0o755))
	must(l.t, os.WriteFile(path, []byte(content), 0o600))
}

func (l *lab) file(cluster, name, text string, replace ...string) {
	l.t.Helper()
	l.save(l.path(cluster, name), strings.NewReplacer(append(replace, "{NAME}", cluster, "{UPSTREAM}", "10.9.0.53", "{IP}", ips[cluster])...).Replace(text))
}

// program finds our own programs, and gRPC's, where make puts them; others are on the PATH.
func program(name string) string {
	for _, dir := range []string{programs, tools} {
		path, err := filepath.Abs(filepath.Join(dir, name))
		if err != nil {
			continue
		}
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	return name
}

// run starts a process that lives until the test ends.
func (l *lab) run(ns *netns.NS, name string, argv ...string) *process {
	return l.runAs(ns, nil, name, argv...)
}

func (l *lab) runAs(ns *netns.NS, who *syscall.Credential, name string, argv ...string) *process {
	l.t.Helper()
	log, err := os.OpenFile(filepath.Join(l.dir, name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	must(l.t, err)
	defer log.Close()
	cmd := exec.Command(program(argv[0]), argv[1:]...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = l.dir, log, log
	if who != nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: who}
	}
	if err := ns.Start(cmd); err != nil {
		l.t.Fatalf("start %s: %v", name, err)
	}
	p := &process{cmd, make(chan struct{})}
	go func() { _ = cmd.Wait(); close(p.done) }() // it is ended by a signal
	l.stop = append(l.stop, func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-p.done:
		case <-time.After(5 * time.Second):
			p.kill()
		}
	})
	return p
}

// tails prints the ends of the logs of a failed test.
func (l *lab) tails() {
	logs, _ := filepath.Glob(filepath.Join(l.dir, "*.log"))
	access, _ := filepath.Glob(filepath.Join(l.dir, "*", "*.access.log"))
	for _, path := range append(logs, access...) {
		b, err := os.ReadFile(path)
		if err != nil || len(b) == 0 {
			continue
		}
		lines := strings.Split(strings.TrimSpace(string(b)), "\n")
		l.t.Logf("%s:\n%s", filepath.Base(path), strings.Join(lines[max(0, len(lines)-10):], "\n"))
	}
}

// hanse runs the command against a cluster.
func (l *lab) hanse(cluster, stdin string, args ...string) string {
	l.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, program("hanse"), append([]string{"--socket", l.path(cluster, "hansed.sock")}, args...)...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		l.t.Fatalf("hanse %s: %v: %s%s", strings.Join(args, " "), err, out, exit.Stderr)
	}
	must(l.t, err)
	return string(out)
}

func (l *lab) eventually(within time.Duration, what string, f func() error) {
	l.t.Helper()
	deadline := time.Now().Add(within)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			l.t.Fatalf("%s: not within %s: %v", what, within, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func (l *lab) ready(ns *netns.NS, admin string) {
	l.t.Helper()
	client := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			return ns.Dial(ctx, nil, network, address)
		}}}
	l.eventually(time.Minute, admin+" is ready", func() error {
		resp, err := client.Get("http://" + admin + "/readyz")
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			b, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
			return fmt.Errorf("%s: %s", resp.Status, b)
		}
		return nil
	})
}

// output runs a program in the pod, and says what it printed.
func (p *pod) output(argv ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, program(argv[0]), argv[1:]...)
	cmd.Dir = p.l.dir
	out, err := p.ns.Output(cmd)
	return strings.TrimSpace(out), err
}

// ask puts a question to a resolver far away; the rules lead it to the sidecar.
func (p *pod) ask(name string, qtype uint16, network string) (*dns.Msg, error) {
	return p.askAt("192.0.2.53:53", name, qtype, network)
}

func (p *pod) askAt(resolver, name string, qtype uint16, network string) (*dns.Msg, error) {
	c, err := p.ns.Dial(context.Background(), nil, network, resolver)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	conn := &dns.Conn{Conn: c}
	m := new(dns.Msg)
	if err := conn.WriteMsg(m.SetQuestion(name, qtype)); err != nil {
		return nil, err
	}
	return conn.ReadMsg()
}

// dial connects to a name as an application does: it looks it up, then connects to the first address.
func (p *pod) dial(ctx context.Context, network, address string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	if _, err := netip.ParseAddr(host); err != nil {
		m, err := p.ask(host+".", dns.TypeA, "udp")
		if err != nil {
			return nil, err
		}
		for _, rr := range m.Answer {
			if a, ok := rr.(*dns.A); ok {
				return p.ns.Dial(ctx, nil, "tcp", net.JoinHostPort(a.A.String(), port))
			}
		}
		return nil, fmt.Errorf("look up %s: %s, no address", host, dns.RcodeToString[m.Rcode])
	}
	return p.ns.Dial(ctx, nil, network, address)
}

// greeter serves a protocol whose server speaks first: it says who it is, then sends everything back until the client has ended.
func (p *pod) greeter(address string) {
	ln, err := p.ns.Listen("tcp", address)
	must(p.l.t, err)
	var running sync.WaitGroup
	running.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			running.Go(func() {
				defer c.Close()
				if _, err := io.WriteString(c, p.name+"\n"); err == nil {
					_, _ = io.Copy(c, c)
				}
			})
		}
	})
	p.l.stop = append(p.l.stop, func() { _ = ln.Close(); running.Wait() })
}
