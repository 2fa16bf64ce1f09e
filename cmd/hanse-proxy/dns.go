package main

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/hanse-mesh/hanse/proxy/capture"
	"github.com/hanse-mesh/hanse/proxy/dns"
)

// DNS is the resolver of the workload. It serves where listen is given, or capture leads DNS to it.
type DNS struct {
	Listen     []string `json:"listen"`     // UDP and TCP, loopback only; default: with capture.dns 127.0.0.1 and ::1 at capture.dnsPort, else nowhere
	Upstreams  []string `json:"upstreams"`  // resolvers of everything else, ip or ip:port, in order; default: those of resolvConf
	ResolvConf string   `json:"resolvConf"` // default /etc/resolv.conf
	Timeout    Duration `json:"timeout"`    // of one try at one upstream; default 1s
	Addresses  string   `json:"addresses"`  // handed out for services; default 240.0.0.0/4 with capture, else "none"
	Addresses6 string   `json:"addresses6"` // default fd68:616e:7365::/64 with capture, else "none"
	ShortNames string   `json:"shortNames"` // "payments.shop" means the mesh: always, never, or auto (default): not on Kubernetes
}

const (
	poolDefault  = "240.0.0.0/4"
	poolDefault6 = "fd68:616e:7365::/64"
)

func (c *Config) fillDNS() {
	d := &c.DNS
	led := c.Capture.Enabled && c.Capture.DNS
	if led && d.Listen == nil {
		for _, host := range []string{"127.0.0.1", "::1"} {
			d.Listen = append(d.Listen, netip.AddrPortFrom(netip.MustParseAddr(host), c.Capture.DNSPort).String())
		}
	}
	pool, pool6 := none, none
	if c.Capture.Enabled {
		pool, pool6 = poolDefault, poolDefault6
	}
	d.Addresses, d.Addresses6 = cmp.Or(d.Addresses, pool), cmp.Or(d.Addresses6, pool6)
	d.ResolvConf = cmp.Or(d.ResolvConf, "/etc/resolv.conf")
	d.Timeout.Duration = cmp.Or(d.Timeout.Duration, time.Second)
	d.ShortNames = cmp.Or(d.ShortNames, "auto")
}

func (c *Config) validateDNS(bad report) {
	d := &c.DNS
	for i, l := range d.Listen {
		if ap, err := netip.ParseAddrPort(l); err != nil {
			bad(fmt.Sprintf("dns.listen[%d]", i), "%q is not ip:port", l)
		} else if !ap.Addr().IsLoopback() {
			bad(fmt.Sprintf("dns.listen[%d]", i), "%q is not a loopback address: a resolver that everybody reaches is used against others", l)
		}
	}
	if c.Capture.Enabled && c.Capture.DNS && !slices.ContainsFunc(d.Listen, func(l string) bool {
		ap, err := netip.ParseAddrPort(l)
		return err == nil && ap.Port() == c.Capture.DNSPort
	}) {
		bad("dns.listen", "capture.dns leads questions to port %d, and nothing listens there", c.Capture.DNSPort)
	}
	for i, u := range d.Upstreams {
		ap, err := upstream(u)
		if err != nil {
			bad(fmt.Sprintf("dns.upstreams[%d]", i), "%v", err)
		} else if slices.Contains(d.Listen, ap.String()) {
			bad(fmt.Sprintf("dns.upstreams[%d]", i), "%s is this resolver itself (dns.listen)", u)
		}
	}
	if _, err := c.pool(); err != nil {
		bad("dns.addresses", "%v", err)
	}
	if t := d.Timeout.Duration; t < 10*time.Millisecond || t > 10*time.Second {
		bad("dns.timeout", "%s: want from 10ms to 10s", t)
	}
	if !slices.Contains([]string{"auto", "always", "never"}, d.ShortNames) {
		bad("dns.shortNames", "%q: want auto, always or never", d.ShortNames)
	}
}

func upstream(s string) (netip.AddrPort, error) {
	if a, err := netip.ParseAddr(s); err == nil {
		return netip.AddrPortFrom(a, 53), nil
	}
	ap, err := netip.ParseAddrPort(s)
	if err != nil || ap.Port() == 0 {
		return netip.AddrPort{}, fmt.Errorf("%q is neither an IP address nor ip:port", s)
	}
	return ap, nil
}

// pool makes the Pool. Without ranges it hands nothing out, and still remembers the addresses of others that DNS has told.
func (c *Config) pool() (*dns.Pool, error) {
	text := c.DNS.Addresses
	if text == none {
		text = poolDefault
	}
	v4, err := netip.ParsePrefix(text)
	if err != nil {
		return nil, fmt.Errorf("%q is not a range such as %s, nor none", text, poolDefault)
	}
	var v6 netip.Prefix
	if text := c.DNS.Addresses6; text != none {
		if v6, err = netip.ParsePrefix(text); err != nil {
			return nil, fmt.Errorf("dns.addresses6: %q is not a range such as %s, nor none", text, poolDefault6)
		}
	}
	return dns.NewPool(v4, v6, time.Now)
}

// resolver opens the ports and builds the DNS server; nil where there is to be none. It also makes addresses of its answers known.
func (p *process) resolver(reg prometheus.Registerer) (s *dns.Server, err error) {
	p.addresses = p.xds
	c := p.cfg
	if len(c.DNS.Listen) == 0 {
		return nil, nil
	}
	dial := p.dial
	if c.Capture.Enabled {
		dial = capture.Apart(c.dialer())
	}
	sc := dns.Config{
		Control: p.xds, NoAssign: c.DNS.Addresses == none, Timeout: c.DNS.Timeout.Duration, Dial: dial, StateFile: filepath.Join(c.StateDir, "dns.json"),
		Log: p.log, Registerer: reg,
	}
	if c.DNS.ShortNames == "always" || c.DNS.ShortNames == "auto" && os.Getenv("KUBERNETES_SERVICE_HOST") == "" {
		sc.Namespace = c.Namespace
	}
	if sc.Pool, err = c.pool(); err != nil {
		return nil, err
	}
	if sc.NoAssign {
		sc.Fixed = c.fixed()
	}
	if sc.Upstreams, err = c.upstreams(); err != nil {
		return nil, err
	}
	if len(c.DNS.Upstreams) == 0 {
		sc.Resolvers = c.upstreams
	}
	if len(sc.Upstreams) == 0 {
		p.log.Warn("there is no upstream resolver: only names of the mesh are answered", "resolvConf", c.DNS.ResolvConf)
	}
	defer func() {
		if err != nil {
			for _, u := range sc.UDP {
				_ = u.Close()
			}
			for _, t := range sc.TCP {
				_ = t.Close()
			}
		}
	}()
	for _, address := range c.DNS.Listen {
		udp, err := net.ListenPacket("udp", address)
		if (errors.Is(err, syscall.EADDRNOTAVAIL) || errors.Is(err, syscall.EAFNOSUPPORT)) && len(c.DNS.Listen) > 1 {
			continue // a machine without this family
		}
		if err != nil {
			return nil, fmt.Errorf("dns: %w", err)
		}
		sc.UDP = append(sc.UDP, udp)
		tcp, err := net.Listen("tcp", address)
		if err != nil {
			return nil, fmt.Errorf("dns: %w", err)
		}
		sc.TCP = append(sc.TCP, tcp)
	}
	if len(sc.UDP) == 0 {
		return nil, fmt.Errorf("dns: none of %s is an address of this machine", strings.Join(c.DNS.Listen, ", "))
	}
	p.pool = sc.Pool
	p.addresses = dns.Addresses{Pool: sc.Pool, Control: p.xds}
	return dns.New(sc)
}

// upstreams are as configured, or those of resolv.conf, without this resolver itself.
func (c *Config) upstreams() (out []netip.AddrPort, err error) {
	list := c.DNS.Upstreams
	if len(list) == 0 {
		if list, err = dns.Nameservers(c.DNS.ResolvConf); err != nil {
			return nil, fmt.Errorf("dns.resolvConf: %w", err)
		}
	}
	for _, u := range list {
		if ap, err := upstream(u); err == nil && !slices.Contains(c.DNS.Listen, ap.String()) {
			out = append(out, ap)
		}
	}
	return out, nil
}

// fixed are the services that a local listener leads to at their own port: without capture, its address is the service's.
func (c *Config) fixed() map[string][]netip.Addr {
	out := map[string][]netip.Addr{}
	for _, l := range c.Listeners {
		at, err := netip.ParseAddrPort(l.Listen)
		if err != nil {
			continue // Validate has said so
		}
		host, port, err := net.SplitHostPort(l.To)
		if err != nil || port != fmt.Sprint(at.Port()) {
			continue
		}
		if host = dns.Host(host, c.Namespace); host != "" && !slices.Contains(out[host], at.Addr()) {
			out[host] = append(out[host], at.Addr())
		}
	}
	return out
}
