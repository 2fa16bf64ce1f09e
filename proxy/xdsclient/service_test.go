package xdsclient

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hanse-mesh/hanse/discovery/xdspb"
	"github.com/hanse-mesh/hanse/proxy"
)

const paymentsHost = "payments.shop.svc.clusterset.local"

var clusterIP = netip.MustParseAddr("10.43.0.7")

func someService() *xdspb.Service {
	return &xdspb.Service{Host: paymentsHost, Ports: []*xdspb.ServicePort{{Port: 8080, Name: "http", Protocol: "http"}}, Headless: true,
		Endpoints: []*xdspb.ServiceEndpoint{{Id: "e1", Hostname: "payments-0", Cluster: "west", Address: "10.0.0.2", Flat: true, Targets: map[string]uint32{"http": 9090}}}}
}

func TestServices(t *testing.T) {
	bubble(t, func(t *testing.T, cp *controlPlane) {
		c, _ := start(t, cp)
		if _, err := c.Service(t.Context(), paymentsHost); !errors.Is(err, ErrUnknown) {
			t.Fatalf("before there is one: %v", err)
		}
		if _, err := c.ServiceAt(t.Context(), clusterIP); !errors.Is(err, proxy.ErrUnknown) {
			t.Fatalf("before there is one: %v", err)
		}
		cp.set(t, serviceType, paymentsHost, someService())
		cp.set(t, serviceType, addressPrefix+clusterIP.String(), &xdspb.Service{Host: paymentsHost, Ports: []*xdspb.ServicePort{{Port: 8080, Protocol: "tcp", Target: 9090}}, Endpoint: "e1"})
		time.Sleep(unknownFor - time.Millisecond)
		if _, err := c.Service(t.Context(), paymentsHost); !errors.Is(err, ErrUnknown) {
			t.Errorf("before 5 s: %v", err)
		}
		time.Sleep(time.Millisecond)
		s, err := c.Service(t.Context(), paymentsHost)
		if err != nil || s.Host != paymentsHost || !s.Headless || s.Endpoints[0].Targets["http"] != 9090 || s.Endpoints[0].Hostname != "payments-0" || !s.Endpoints[0].Flat {
			t.Fatalf("%+v, %v", s, err)
		}
		at, err := c.ServiceAt(t.Context(), netip.AddrFrom16(clusterIP.As16())) // IPv4-mapped, as a dual-stack listener sees it
		if err != nil || at.Endpoint != "e1" || at.Port(9090) == nil || at.Port(9090).Number != 8080 || at.Port(8080) == nil || at.Port(1) != nil {
			t.Fatalf("%+v, %v", at, err)
		}
		changed := someService()
		changed.Ports[0].Port = 81
		cp.set(t, serviceType, paymentsHost, changed)
		synctest.Wait()
		if s, err = c.Service(t.Context(), paymentsHost); err != nil || s.Ports[0].Number != 81 {
			t.Errorf("after a change: %+v, %v", s, err)
		}
		cp.set(t, serviceType, paymentsHost, nil)
		synctest.Wait()
		if _, err = c.Service(t.Context(), paymentsHost); !errors.Is(err, ErrUnknown) {
			t.Errorf("deleted: %v", err)
		}
		for _, bad := range []string{"", "*", "hanse/inbound/10.0.0.1", addressPrefix + "10.0.0.1", payments, strings.Repeat("x", 600)} {
			if _, err := c.Service(t.Context(), bad); !errors.Is(err, ErrUnknown) {
				t.Errorf("%.20q: %v", bad, err)
			}
		}
	})
}

func TestServicesAreGivenUpAndBounded(t *testing.T) {
	bubble(t, func(t *testing.T, cp *controlPlane) {
		cp.service(t, payments, "e1")
		c, _ := start(t, cp)
		for i := range maxNames + 1 {
			host := fmt.Sprintf("s%d.shop.svc.clusterset.local", i)
			m := someService()
			m.Host = host
			cp.set(t, serviceType, host, m)
			_, err := c.Service(t.Context(), host)
			if i < maxNames && err != nil || i == maxNames && !errors.Is(err, ErrTooMany) {
				t.Fatalf("service %d: %v", i, err)
			}
		}
		resolve(t, c, payments) // whose names are counted apart
		time.Sleep(defaultIdle + 2*sweepEvery)
		synctest.Wait()
		if st := c.Status(); st.Names != 0 || st.Hosts != 0 {
			t.Errorf("%d names and %d hosts are followed after a long silence", st.Names, st.Hosts)
		}
	})
}

func remembered(c *Client) int {
	c.hosts.mu.RLock()
	defer c.hosts.mu.RUnlock()
	return len(c.hosts.known)
}

// TestManyUnknownHosts: what an application asks about and is not there costs neither room nor a Table each.
func TestManyUnknownHosts(t *testing.T) {
	bubble(t, func(t *testing.T, cp *controlPlane) {
		c, _ := start(t, cp)
		synctest.Wait()
		version := c.Table().Version
		for i := range 5 * maxNames {
			if _, err := c.ServiceAt(t.Context(), netip.AddrFrom4([4]byte{192, byte(i >> 16), byte(i >> 8), byte(i)})); !errors.Is(err, proxy.ErrUnknown) {
				t.Fatalf("address %d: %v", i, err)
			}
		}
		if v := c.Table().Version; v != version {
			t.Errorf("%d new Tables", v-version)
		}
		if n := remembered(c); n > 4*maxNames {
			t.Errorf("%d answers are remembered", n)
		}
		time.Sleep(unknownFor + sweepEvery)
		synctest.Wait()
		if n := remembered(c) + c.hosts.count(); n != 0 {
			t.Errorf("%d are remembered after a while", n)
		}
		// One that is there now is found, again and again.
		for range 3 {
			if _, err := c.ServiceAt(t.Context(), clusterIP); !errors.Is(err, proxy.ErrUnknown) {
				t.Fatalf("%v", err)
			}
			time.Sleep(unknownFor)
			cp.set(t, serviceType, addressPrefix+clusterIP.String(), someService())
			if _, err := c.ServiceAt(t.Context(), clusterIP); err != nil {
				t.Fatal(err)
			}
			cp.set(t, serviceType, addressPrefix+clusterIP.String(), nil)
			synctest.Wait()
		}
	})
}

func TestServicesWithoutControlPlane(t *testing.T) {
	bubble(t, func(t *testing.T, cp *controlPlane) {
		dir := t.TempDir()
		kept := func(cfg *Config) { cfg.StateDir = dir }
		cp.set(t, serviceType, paymentsHost, someService())
		c, stop := start(t, cp, kept)
		if _, err := c.Service(t.Context(), paymentsHost); err != nil {
			t.Fatal(err)
		}
		stop()
		cp.stop()
		c, _ = start(t, cp, kept)
		synctest.Wait()
		if s, err := c.Service(t.Context(), paymentsHost); err != nil || s.Endpoints[0].ID != "e1" {
			t.Errorf("what was kept: %+v, %v", s, err)
		}
		before := time.Now()
		if _, err := c.ServiceAt(t.Context(), clusterIP); !errors.Is(err, ErrUnavailable) || time.Since(before) > 0 {
			t.Errorf("what was not kept: %v after %s", err, time.Since(before))
		}
	})
}

func TestServicesThatDoNotDecode(t *testing.T) {
	for field, change := range map[string]func(*xdspb.Service){
		"host":                    func(m *xdspb.Service) { m.Host = "" },
		"ports[0].port":           func(m *xdspb.Service) { m.Ports[0].Port = 65536 },
		"ports[0].target":         func(m *xdspb.Service) { m.Ports[0].Target = 65536 },
		"ports[0].protocol":       func(m *xdspb.Service) { m.Ports[0].Protocol = "udp" },
		"ports":                   func(m *xdspb.Service) { m.Ports = make([]*xdspb.ServicePort, maxPorts+1) },
		"endpoints[0].address":    func(m *xdspb.Service) { m.Endpoints[0].Address = "x" },
		"endpoints[0]: id":        func(m *xdspb.Service) { m.Endpoints[0].Id = "" },
		"endpoints[0].targets[p]": func(m *xdspb.Service) { m.Endpoints[0].Targets["p"] = 0 },
		"endpoints: ":             func(m *xdspb.Service) { m.Endpoints = make([]*xdspb.ServiceEndpoint, maxHosts+1) },
	} {
		m := someService()
		change(m)
		if _, err := decodeService(m); err == nil || !strings.Contains(err.Error(), field) {
			t.Errorf("%s: %v", field, err)
		}
	}
	if _, err := decodeService(someService()); err != nil {
		t.Error(err)
	}
}
