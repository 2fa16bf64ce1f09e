package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/user"
	"slices"
	"strconv"
	"syscall"
	"time"

	"github.com/hanse-mesh/hanse/proxy/capture"
	"github.com/hanse-mesh/hanse/proxy/sidecar"
)

// Capture is what of the workload's traffic the kernel leads to the sidecar, by the rules that "hanse-proxy capture install" installs.
type Capture struct {
	Enabled bool   `json:"enabled"` // serve what is captured; default false
	Table   string `json:"table"`   // nftables table of family inet; default hanse

	OutboundPort uint16 `json:"outboundPort"` // loopback; default 15002
	InboundPort  uint16 `json:"inboundPort"`  // all addresses; default 15006
	DNS          bool   `json:"dns"`          // lead DNS to dnsPort, too
	DNSPort      uint16 `json:"dnsPort"`      // default 15053

	Mark        uint32   `json:"mark"`        // of the sidecar's own connections, where it may set one; default 1503
	ExemptUsers []UserID `json:"exemptUsers"` // users whose connections are not captured, the sidecar's own among them; default [1503]
	OnlyUsers   []UserID `json:"onlyUsers"`   // if given, only theirs are

	Outbound CaptureOutbound `json:"outbound"`
	Inbound  CaptureInbound  `json:"inbound"`
	Sniff    Duration        `json:"sniff"` // how long a caller may take to show what it speaks, where nothing is declared; default 100ms
}

// CaptureOutbound is about what the application calls.
type CaptureOutbound struct {
	Outside      string   `json:"outside"`      // what is none of the mesh's: allow (default) or deny
	IncludePorts []Ports  `json:"includePorts"` // only to these; default all
	ExcludePorts []Ports  `json:"excludePorts"` // none to these
	Include      []string `json:"include"`      // only to these destinations, "10.0.0.0/8"; default all
	Exclude      []string `json:"exclude"`      // none to these
}

// CaptureInbound is about what calls the application.
type CaptureInbound struct {
	Mode         string   `json:"mode"`         // strict (default): callers without mutual TLS are refused; or permissive
	ExemptPorts  []uint16 `json:"exemptPorts"`  // open to everybody: health checks, metrics
	IncludePorts []Ports  `json:"includePorts"` // only at these; default all
	ExcludePorts *[]Ports `json:"excludePorts"` // none at these; default [22]
	Include      []string `json:"include"`      // only from these sources; default all
	Exclude      []string `json:"exclude"`      // none from these
}

// Ports is one port or a range, as number or string.
type Ports struct{ capture.PortRange }

// UnmarshalJSON reads 8080 or "8000-8100".
func (p *Ports) UnmarshalJSON(b []byte) (err error) {
	p.PortRange, err = capture.ParsePorts(string(bytes.Trim(b, `"`)))
	return err
}

// MarshalJSON writes what UnmarshalJSON reads.
func (p Ports) MarshalJSON() ([]byte, error) { return json.Marshal(p.String()) }

// UserID is a number or a name.
type UserID string

// UnmarshalJSON reads 1000 or "payments".
func (u *UserID) UnmarshalJSON(b []byte) error {
	*u = UserID(bytes.Trim(b, `"`))
	if *u == "" {
		return errors.New("a user is a number or a name")
	}
	return nil
}

// id looks a name up on this machine.
func (u UserID) id() (uint32, error) {
	s := string(u)
	if n, err := strconv.ParseUint(s, 10, 32); err == nil {
		return uint32(n), nil
	}
	found, err := user.Lookup(s)
	if err != nil {
		return 0, fmt.Errorf("user %q is not known here: give a number", s)
	}
	n, err := strconv.ParseUint(found.Uid, 10, 32)
	return uint32(n), err
}

const (
	outsideAllow   = "allow"
	outsideDeny    = "deny"
	modeStrict     = "strict"
	modePermissive = "permissive"

	defaultExempt = 1503
)

func (c *Capture) fill() {
	c.Table = cmp.Or(c.Table, "hanse")
	c.OutboundPort = cmp.Or(c.OutboundPort, 15002)
	c.InboundPort = cmp.Or(c.InboundPort, 15006)
	c.DNSPort = cmp.Or(c.DNSPort, 15053)
	c.Mark = cmp.Or(c.Mark, defaultExempt)
	if len(c.ExemptUsers) == 0 {
		c.ExemptUsers = []UserID{UserID(strconv.Itoa(defaultExempt))}
	}
	c.Outbound.Outside = cmp.Or(c.Outbound.Outside, outsideAllow)
	c.Inbound.Mode = cmp.Or(c.Inbound.Mode, modeStrict)
	if c.Inbound.ExcludePorts == nil {
		c.Inbound.ExcludePorts = &[]Ports{{capture.PortRange{First: 22, Last: 22}}}
	}
	c.Sniff.Duration = cmp.Or(c.Sniff.Duration, 100*time.Millisecond)
}

// rules are what the kernel is told. Every fault goes to bad. Names of users are looked up if resolve is true.
func (c *Config) rules(bad report, resolve bool) *capture.Config {
	cc := &c.Capture
	r := &capture.Config{Table: cc.Table, OutboundPort: cc.OutboundPort, Mark: cc.Mark}
	if cc.DNS {
		r.DNSPort = cc.DNSPort
		for _, s := range []string{c.DNS.Addresses, c.DNS.Addresses6} {
			if p, err := netip.ParsePrefix(s); err == nil { // else it is none, or validateDNS says what is wrong with it
				r.Always = append(r.Always, p)
			}
		}
	}
	if len(c.Workloads) > 0 { // else nobody is to call it
		r.InboundPort = cc.InboundPort
	}
	users := func(field string, list []UserID) (out []uint32) {
		for i, u := range list {
			if !resolve {
				if n, err := strconv.ParseUint(string(u), 10, 32); err == nil {
					out = append(out, uint32(n))
				}
				continue
			}
			id, err := u.id()
			if err != nil {
				bad(fmt.Sprintf("%s[%d]", field, i), "%v", err)
			}
			out = append(out, id)
		}
		return out
	}
	r.UIDs, r.OnlyUIDs = users("capture.exemptUsers", cc.ExemptUsers), users("capture.onlyUsers", cc.OnlyUsers)
	ports := func(list []Ports) (out []capture.PortRange) {
		for _, p := range list {
			out = append(out, p.PortRange)
		}
		return out
	}
	prefixes := func(field string, list []string) (out []netip.Prefix) {
		for i, s := range list {
			p, err := capture.ParsePrefix(s)
			if err != nil {
				bad(fmt.Sprintf("%s[%d]", field, i), "%v", err)
			}
			out = append(out, p)
		}
		return out
	}
	o, in := &cc.Outbound, &cc.Inbound
	r.Outbound = capture.Selection{IncludePorts: ports(o.IncludePorts), ExcludePorts: ports(o.ExcludePorts),
		Include: prefixes("capture.outbound.include", o.Include), Exclude: prefixes("capture.outbound.exclude", o.Exclude)}
	r.Inbound = capture.Selection{IncludePorts: ports(in.IncludePorts), ExcludePorts: ports(*in.ExcludePorts),
		Include: prefixes("capture.inbound.include", in.Include), Exclude: prefixes("capture.inbound.exclude", in.Exclude)}
	own := func(p uint16) {
		if !slices.Contains(r.OwnPorts, p) {
			r.OwnPorts = append(r.OwnPorts, p)
		}
	}
	for _, w := range c.Workloads {
		own(w.HopPort)
		if ap, err := netip.ParseAddrPort(w.Listen); err == nil {
			own(ap.Port())
		}
	}
	for _, listen := range []string{c.Admin.Listen, c.Health.Listen} {
		if _, port, err := net.SplitHostPort(listen); err == nil {
			if n, err := strconv.ParseUint(port, 10, 16); err == nil {
				own(uint16(n))
			}
		}
	}
	return r
}

func (c *Config) validateCapture(bad report) {
	cc := &c.Capture
	r := c.rules(bad, false)
	if err := r.Validate(); err != nil {
		bad("capture", "%v", err)
	}
	if cc.Outbound.Outside != outsideAllow && cc.Outbound.Outside != outsideDeny {
		bad("capture.outbound.outside", "%q: want allow or deny", cc.Outbound.Outside)
	}
	if cc.Inbound.Mode != modeStrict && cc.Inbound.Mode != modePermissive {
		bad("capture.inbound.mode", "%q: want strict or permissive", cc.Inbound.Mode)
	}
	if d := cc.Sniff.Duration; d < 0 || d > 5*time.Second {
		bad("capture.sniff", "%s: want more than 0 and at most 5s", d)
	}
	for i, p := range cc.Inbound.ExemptPorts {
		if p == 0 {
			bad(fmt.Sprintf("capture.inbound.exemptPorts[%d]", i), "0 is not a port")
		}
	}
	taken := map[uint16]string{cc.OutboundPort: "capture.outboundPort", cc.InboundPort: "capture.inboundPort", cc.DNSPort: "capture.dnsPort"}
	for field, address := range map[string]string{"outbound.listen": c.Outbound.Listen, "admin.listen": c.Admin.Listen} {
		if ap, err := netip.ParseAddrPort(address); err == nil && taken[ap.Port()] != "" {
			bad(taken[ap.Port()], "%d is also the port of %s", ap.Port(), field)
		}
	}
}

// dialer is for all our own connections, so that they are not captured.
func (c *Config) dialer() *net.Dialer {
	d := &net.Dialer{Timeout: 10 * time.Second, KeepAlive: 15 * time.Second}
	if c.Capture.Enabled {
		d.Control = capture.Control(c.Capture.Mark)
		asks := &net.Dialer{Control: d.Control}
		d.Resolver = &net.Resolver{PreferGo: true, Dial: capture.Apart(asks)}
	}
	return d
}

// captureConfig opens the ports that connections are led to.
func (c *Config) captureConfig(open func(address string) (net.Listener, error)) (sidecar.Capture, error) {
	cc := &c.Capture
	sc := sidecar.Capture{Original: capture.Original, DenyOutside: cc.Outbound.Outside == outsideDeny, Sniff: cc.Sniff.Duration,
		Permissive: cc.Inbound.Mode == modePermissive, Exempt: cc.Inbound.ExemptPorts}
	var faults error
	rules := c.rules(func(field, format string, args ...any) {
		faults = errors.Join(faults, fmt.Errorf("%s: %s", field, fmt.Sprintf(format, args...)))
	}, true)
	if faults != nil {
		return sc, faults
	}
	if err := capture.Exempt(rules); err != nil {
		return sc, fmt.Errorf("%w: name its user in capture.exemptUsers, or give it CAP_NET_ADMIN", err)
	}
	for _, host := range []string{"127.0.0.1", "::1"} {
		ln, err := open(netip.AddrPortFrom(netip.MustParseAddr(host), cc.OutboundPort).String())
		switch {
		case err == nil:
			sc.Outbound = append(sc.Outbound, ln)
		case errors.Is(err, syscall.EADDRNOTAVAIL) || errors.Is(err, syscall.EAFNOSUPPORT): // a machine without this family
		default:
			return sc, fmt.Errorf("captured connections: %w", err)
		}
	}
	if len(sc.Outbound) == 0 {
		return sc, errors.New("captured connections: there is no loopback address, neither 127.0.0.1 nor ::1")
	}
	if rules.InboundPort != 0 {
		ln, err := open(":" + strconv.Itoa(int(rules.InboundPort)))
		if err != nil {
			return sc, fmt.Errorf("captured callers: %w", err)
		}
		sc.Inbound = append(sc.Inbound, ln)
	}
	return sc, nil
}
