package kube

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/federation"
)

// coreDNS serves clusterset.local by what s holds, until the test ends, and returns its address.
func coreDNS(t *testing.T, s *server) string {
	t.Helper()
	need(t, "coredns", "nobody else asks by what Hanse wrote")
	dir := t.TempDir()
	address := freePorts(t, 1)[0]
	host, port, _ := net.SplitHostPort(address)
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	kubeconfig := write("kubeconfig", fmt.Sprintf(`
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: %q, certificate-authority: %q}}]
users: [{name: u, user: {token: admintoken}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
current-context: x
`, s.config.Host, s.config.CAFile))
	corefile := write("Corefile", fmt.Sprintf(`.:%s {
	bind %s
	errors
	kubernetes cluster.local clusterset.local {
		kubeconfig %s x
		multicluster clusterset.local
		ttl 1
	}
}
`, port, host, kubeconfig))
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(tools+"coredns", "-conf", corefile)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			b, _ := os.ReadFile(log.Name())
			t.Logf("coredns:\n%s", b[max(0, len(b)-3000):])
		}
	})
	return address
}

// ask returns a name's records, sorted, or the code of an answer without any.
func ask(server, name string, qtype uint16) string {
	m := new(dns.Msg)
	m.SetQuestion(name, qtype)
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	r, err := dns.ExchangeContext(ctx, m, server)
	if err != nil {
		return err.Error()
	}
	if len(r.Answer) == 0 {
		return dns.RcodeToString[r.Rcode]
	}
	var out []string
	for _, rr := range r.Answer {
		switch rr := rr.(type) {
		case *dns.A:
			out = append(out, rr.A.String())
		case *dns.AAAA:
			out = append(out, rr.AAAA.String())
		case *dns.SRV:
			out = append(out, fmt.Sprintf("%d %s", rr.Port, rr.Target))
		}
	}
	slices.Sort(out)
	return strings.Join(out, ", ")
}

// TestMCSNamesByCoreDNS: the unmodified CoreDNS answers the names of the multicluster DNS specification by what Hanse wrote.
func TestMCSNamesByCoreDNS(t *testing.T) {
	t.Parallel()
	c := newClusterset(t, "--service-cluster-ip-range=10.96.0.0/16,fd00:96::/112")
	c.hello("ip", "")
	c.elsewhere("east", "ip", remote(1, nil, "10.2.0.1"))
	c.hello("headless", `{clusterIP: None, ports: [{name: http, port: 80}]}`)
	c.elsewhere("east", "headless", remote(1, func(e *federation.Export) {
		e.Headless, e.IPFamilies = true, []discovery.IPFamily{discovery.IPv4, discovery.IPv6}
		second := netip.MustParseAddr("fd00:2::1")
		e.Endpoints[0].Second = &second
	}, "10.2.0.1", "10.2.0.2"))
	ip := ipsOf(c.ready("ip"))[0]
	until(t, "all endpoints are there", func() bool {
		return c.addresses("headless") == "east: 10.2.0.1, east: 10.2.0.2, east: fd00:2::1, west: 10.1.0.1"
	})
	server := coreDNS(t, c.server)
	behind := c.list(services, "ip", "app.kubernetes.io/managed-by=hanse.mesh")[0].GetName()
	for _, q := range []struct {
		name  string
		qtype uint16
		want  string
	}{
		{"hello.ip.svc.clusterset.local.", dns.TypeA, ip},
		{"_http._tcp.hello.ip.svc.clusterset.local.", dns.TypeSRV, "80 hello.ip.svc.clusterset.local."},
		{"east.hello.ip.svc.clusterset.local.", dns.TypeA, "NXDOMAIN"}, // no cluster by itself
		{"hello.headless.svc.clusterset.local.", dns.TypeA, "10.1.0.1, 10.2.0.1, 10.2.0.2"},
		{"hello.headless.svc.clusterset.local.", dns.TypeAAAA, "fd00:2::1"},
		{"hello-0.west.hello.headless.svc.clusterset.local.", dns.TypeA, "10.1.0.1"},
		{"hello-0.east.hello.headless.svc.clusterset.local.", dns.TypeA, "10.2.0.1"},
		{"hello-0.east.hello.headless.svc.clusterset.local.", dns.TypeAAAA, "fd00:2::1"},
		{"hello-1.east.hello.headless.svc.clusterset.local.", dns.TypeA, "10.2.0.2"},
		{"hello.ip.svc.cluster.local.", dns.TypeA, at[string](c.get(services, "ip", "hello"), "spec", "clusterIP")}, // as ever
		{behind + ".ip.svc.cluster.local.", dns.TypeA, ip},
	} {
		got := ""
		for deadline := time.Now().Add(20 * time.Second); got != q.want && time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
			got = ask(server, q.name, q.qtype)
		}
		if got != q.want {
			t.Errorf("%s %s: %s, want %s", q.name, dns.TypeToString[q.qtype], got, q.want)
		}
	}
	if got := ask(server, "_http._tcp.hello.headless.svc.clusterset.local.", dns.TypeSRV); strings.Count(got, ".clusterset.local.") < 3 {
		t.Errorf("SRV of a headless service: %s", got)
	}
}
