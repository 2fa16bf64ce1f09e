//go:build linux

package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hanse-mesh/hanse/test/kube/lab"
)

// TestAddresses: Services of type LoadBalancer, as clouds have them: west is reached by two addresses, east by names. An address that dies and a name that moves cost no call.
func TestAddresses(t *testing.T) {
	s := up(t, lab.Config{Hosts: []string{"lb-1", "lb-2", "lb-3", "lb-4"}})
	west, east := s.west, s.east
	lb := map[string]*exec.Cmd{}
	s.step("load balancers are given", func() {
		for _, c := range s.both() {
			s.install(c, "federation.service.type=LoadBalancer", "gateway.service.type=LoadBalancer")
			if out, _ := s.tryHanse("check", "--context", c.Name); strings.Count(out, "other clusters have no address to reach it") != 2 {
				s.t.Errorf("%s has addresses of nobody:\n%s", c.Name, out)
			}
		}
		for _, name := range []string{"lb-1", "lb-2"} {
			lb[name] = s.balance(name, west)
		}
		for _, name := range []string{"lb-3", "lb-4"} {
			lb[name] = s.balance(name, east)
		}
		s.name("gateway.east.test", "lb-3")
		s.name("federation.east.test", "lb-3")
		west.give("hanse-gateway", fmt.Sprintf(`{"ip":%q},{"ip":%q}`, s.hosts["lb-1"].IP, s.hosts["lb-2"].IP))
		west.give("hanse-federation", fmt.Sprintf(`{"ip":%q},{"ip":%q}`, s.hosts["lb-1"].IP, s.hosts["lb-2"].IP))
		east.give("hanse-gateway", `{"hostname":"gateway.east.test"}`)
		east.give("hanse-federation", `{"hostname":"federation.east.test"}`)
		s.hanse("join", "--context", "east", "--to-context", "west")
		s.openShop()
		s.until(time.Minute, func() error { return s.joined(west, east) })
		s.until(time.Minute, func() error { return s.joined(east, west) })
		s.until(30*time.Second, func() error { return s.reaches("east", "west", "lb-1", "lb-2") })
		s.until(30*time.Second, func() error { return s.reaches("west", "east", "lb-3") })
	})
	s.step("a name moves", func() {
		west.kubectl("-n", "shop", "scale", "deployment/payments", "--replicas=0")
		s.until(30*time.Second, func() error { return west.answered("frontend", paymentsURL, "east") })
		west.kubectl("-n", "shop", "scale", "deployment/load", "--replicas=1")
		west.kubectl("-n", "shop", "rollout", "status", "deployment/load", "--timeout=60s")
		load, began := west.load(), time.Now()
		s.name("gateway.east.test", "lb-4")
		s.name("federation.east.test", "lb-4")
		s.until(time.Minute, func() error { return s.reaches("west", "east", "lb-4") })
		s.t.Logf("the other cluster knows after %.1f s", time.Since(began).Seconds())
		s.end(lb["lb-3"])
		s.until(time.Minute, func() error { return s.joined(west, east) })
		s.until(30*time.Second, func() error { return west.answered("frontend", paymentsURL, "east") })
		load.mustHaveServed(100)
		west.kubectl("-n", "shop", "scale", "deployment/load", "--replicas=0")
	})
	s.step("one of two addresses dies, and then the other", func() {
		west.kubectl("-n", "shop", "scale", "deployment/payments", "--replicas=2")
		west.kubectl("-n", "shop", "rollout", "status", "deployment/payments", "--timeout=60s")
		east.kubectl("-n", "shop", "scale", "deployment/payments", "--replicas=0")
		s.until(30*time.Second, func() error { return east.answered("frontend", paymentsURL, "west") })
		east.kubectl("-n", "shop", "scale", "deployment/load", "--replicas=1")
		east.kubectl("-n", "shop", "rollout", "status", "deployment/load", "--timeout=60s")
		load := east.load()
		for i, name := range []string{"lb-1", "lb-2"} { // whichever was in use
			if i == 1 {
				lb["lb-1"] = s.balance("lb-1", west)
			}
			s.end(lb[name])
			s.until(30*time.Second, func() error { return east.answered("frontend", paymentsURL, "west") })
			s.until(time.Minute, func() error { return s.joined(east, west) })
		}
		load.mustHaveServed(50) // it takes but a few seconds
	})
}

// forwarding makes the test's own program a load balancer: pairs of address=address, separated by commas.
const forwarding = "HANSE_E2E_FORWARD"

// forward passes connections on, until it is ended.
func forward(pairs string) error {
	failed := make(chan error)
	for pair := range strings.SplitSeq(pairs, ",") {
		at, to, _ := strings.Cut(pair, "=")
		l, err := net.Listen("tcp", at)
		if err != nil {
			return err
		}
		go func() {
			for {
				in, err := l.Accept()
				if err != nil {
					failed <- err
					return
				}
				go func() {
					defer in.Close()
					out, err := net.DialTimeout("tcp", to, 5*time.Second)
					if err != nil {
						return
					}
					defer out.Close()
					go func() { _, _ = io.Copy(out, in); _ = out.(*net.TCPConn).CloseWrite() }()
					_, _ = io.Copy(in, out)
				}()
			}
		}()
	}
	fmt.Println("ready")
	return <-failed
}

// balance makes a host a load balancer in front of a cluster, by the ports of its node.
func (s *scene) balance(host string, c *cluster) *exec.Cmd {
	s.t.Helper()
	port := func(service, name string) string {
		return c.kubectl("-n", system, "get", "service", service, "-o", `jsonpath={.spec.ports[?(@.name=="`+name+`")].nodePort}`)
	}
	h := s.hosts[host]
	exe, err := os.Executable()
	if err != nil {
		s.t.Fatal(err)
	}
	cmd := h.Command(context.WithoutCancel(s.ctx), exe)
	cmd.Env = append(os.Environ(), fmt.Sprintf("%[1]s=%[2]s:7443=%[3]s:%[4]s,%[2]s:7446=%[3]s:%[5]s,%[2]s:15443=%[3]s:%[6]s", forwarding, h.IP, c.IP,
		port("hanse-federation", "federation"), port("hanse-federation", "bundle"), port("hanse-gateway", "mesh")))
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		s.t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		s.t.Fatalf("%s says %q: %v", host, line, err)
	}
	return cmd
}

// end kills a program.
func (s *scene) end(cmd *exec.Cmd) {
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
}

// name makes a name lead to a host, in the DNS of both clusters.
func (s *scene) name(name, host string) {
	s.t.Helper()
	for _, c := range s.both() {
		if err := c.SetName(name, s.hosts[host].IP); err != nil {
			s.t.Fatal(err)
		}
	}
}

// give is what a cloud's controller writes.
func (c *cluster) give(service, ingress string) {
	c.s.t.Helper()
	c.kubectl("-n", system, "patch", "service", service, "--subresource=status", "--type=merge", "-p", `{"status":{"loadBalancer":{"ingress":[`+ingress+`]}}}`)
}

// reaches: a cluster knows another one's gateways at these hosts, and at no other.
func (s *scene) reaches(context, other string, hosts ...string) error {
	out, err := s.tryHanse("--context", context, "clusters", "-o", "json")
	var all struct {
		Clusters []struct {
			Name     string
			Gateways []string
		}
	}
	if err == nil {
		err = json.Unmarshal([]byte(out), &all)
	}
	if err != nil {
		return err
	}
	var want []string
	for _, h := range hosts {
		want = append(want, s.hosts[h].IP+":15443")
	}
	for _, m := range all.Clusters {
		if slices.Sort(m.Gateways); m.Name == other && !slices.Equal(m.Gateways, want) {
			return fmt.Errorf("%s knows %s at %v, want %v", context, other, m.Gateways, want)
		}
	}
	return nil
}
