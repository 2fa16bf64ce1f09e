package capture

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/hashicorp/go-multierror"
)

// Config says what is captured, and what is not. Lists hold at most MaxEntries.
type Config struct {
	Table string // of family inet

	OutboundPort uint16 // where the sidecar takes what the application calls; 0: nothing is captured
	InboundPort  uint16 // where it takes what calls the application; 0: nothing is captured
	DNSPort      uint16 // where it answers DNS, UDP and TCP; 0: DNS is not captured

	Mark     uint32   // of the sidecar's own connections; 0: none
	UIDs     []uint32 // users whose connections are not captured: the sidecar's own, if it sets no mark
	OnlyUIDs []uint32 // not empty: only these users' connections are captured

	Outbound Selection      // addresses are destinations
	Always   []netip.Prefix // destinations captured whatever Outbound includes: the mesh's own addresses
	Inbound  Selection      // addresses are sources
	OwnPorts []uint16       // of the sidecar, never captured inbound: the hop, admin
}

// Selection is what of a direction is captured: what is included, which is all where nothing is listed, less what is excluded.
type Selection struct {
	IncludePorts, ExcludePorts []PortRange
	Include, Exclude           []netip.Prefix
}

// PortRange is inclusive.
type PortRange struct{ First, Last uint16 }

// MaxEntries of each list.
const MaxEntries = 64

// ParsePorts reads "8080" or "8000-8100".
func ParsePorts(s string) (PortRange, error) {
	first, last, isRange := strings.Cut(s, "-")
	if !isRange {
		last = first
	}
	f, err := parsePort(first)
	if err == nil {
		var l uint16
		if l, err = parsePort(last); err == nil && l >= f {
			return PortRange{f, l}, nil
		}
	}
	return PortRange{}, fmt.Errorf("%q is neither a port nor a range such as 8000-8100", s)
}

func parsePort(s string) (uint16, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || n == 0 || s[0] == '+' {
		return 0, errors.New("not a port")
	}
	return uint16(n), nil
}

// String is as ParsePorts reads it.
func (r PortRange) String() string {
	if r.First == r.Last {
		return strconv.Itoa(int(r.First))
	}
	return fmt.Sprintf("%d-%d", r.First, r.Last)
}

// ParsePrefix reads "10.0.0.0/8" or one address. Bits beyond the length must be zero.
func ParsePrefix(s string) (netip.Prefix, error) {
	if a, err := netip.ParseAddr(s); err == nil && a.Zone() == "" && !a.Is4In6() {
		return netip.PrefixFrom(a, a.BitLen()), nil
	}
	p, err := netip.ParsePrefix(s)
	switch {
	case err != nil || p.Addr().Is4In6():
		return netip.Prefix{}, fmt.Errorf("%q is neither an address nor a range of them such as 10.0.0.0/8 or fd00::/8", s)
	case p != p.Masked():
		return netip.Prefix{}, fmt.Errorf("%q has bits beyond its length: %s is meant?", s, p.Masked())
	}
	return p, nil
}

var tableName = regexp.MustCompile(`^[a-z][a-z0-9_-]{0,31}$`)

// Validate reports every fault together.
func (c *Config) Validate() error {
	var faults *multierror.Error
	bad := func(format string, args ...any) { faults = multierror.Append(faults, fmt.Errorf(format, args...)) }
	if !tableName.MatchString(c.Table) {
		bad("table %q: want a lower-case letter, then letters, digits, - and _, at most 32", c.Table)
	}
	if c.OutboundPort == 0 && c.InboundPort == 0 && c.DNSPort == 0 {
		bad("nothing to capture: neither an outbound nor an inbound nor a DNS port")
	}
	if c.Mark == 0 && len(c.UIDs) == 0 {
		bad("neither a mark nor a user is exempt: the sidecar would capture itself")
	}
	ports := map[uint16]string{}
	for _, p := range []struct {
		name string
		port uint16
	}{{"outbound port", c.OutboundPort}, {"inbound port", c.InboundPort}, {"DNS port", c.DNSPort}} {
		if p.port == 0 {
			continue
		}
		if other := ports[p.port]; other != "" {
			bad("%s %d is also the %s", p.name, p.port, other)
		}
		ports[p.port] = p.name
	}
	for _, uid := range c.OnlyUIDs {
		if slices.Contains(c.UIDs, uid) {
			bad("user %d is both captured and exempt", uid)
		}
	}
	for _, d := range []struct {
		name string
		s    *Selection
	}{{"outbound", &c.Outbound}, {"inbound", &c.Inbound}} {
		for _, l := range []struct {
			name string
			n    int
		}{{"included ports", len(d.s.IncludePorts)}, {"excluded ports", len(d.s.ExcludePorts)}, {"included addresses", len(d.s.Include)}, {"excluded addresses", len(d.s.Exclude)}} {
			if l.n > MaxEntries {
				bad("%s: %d %s, at most %d", d.name, l.n, l.name, MaxEntries)
			}
		}
	}
	if len(c.UIDs) > MaxEntries || len(c.OnlyUIDs) > MaxEntries || len(c.OwnPorts) > MaxEntries {
		bad("more than %d users or own ports", MaxEntries)
	}
	return faults.ErrorOrNil()
}

// State is what is installed, beside what is wanted.
type State struct {
	Table     string  `json:"table"`
	Installed bool    `json:"installed"`
	Matches   bool    `json:"matches"`
	Chains    []Chain `json:"chains"`
	Missing   []Line  `json:"missing"` // wanted and not installed
	Surplus   []Line  `json:"surplus"` // installed and not wanted
}

// Chain is one chain as installed, in the words of nft.
type Chain struct {
	Name  string `json:"name"`
	Hook  string `json:"hook,omitempty"` // "type nat hook output priority -110; policy accept;"; empty: jumped to
	Rules []Rule `json:"rules"`
}

// Rule is one rule.
type Rule struct {
	Text    string  `json:"text"`
	Packets *uint64 `json:"packets,omitempty"` // first packets counted, which is connections; nil: not counted
}

// Line is one line of a difference.
type Line struct {
	Chain string `json:"chain"`
	Text  string `json:"text"`
}

// Errors to branch on.
var (
	ErrPermission  = errors.New("CAP_NET_ADMIN is needed in this network namespace")
	ErrUnsupported = errors.New("not supported by this kernel")
)

// compare fills in Matches, Missing and Surplus. Order matters within a chain; that of chains does not.
func (s *State) compare(want []Chain) {
	s.Missing, s.Surplus = []Line{}, []Line{}
	have := map[string]*Chain{}
	for i := range s.Chains {
		have[s.Chains[i].Name] = &s.Chains[i]
	}
	s.Matches = s.Installed && len(want) == len(s.Chains)
	lines := func(c *Chain) (out []string) {
		if c == nil {
			return nil
		}
		out = append(out, strings.TrimSpace("chain "+c.Hook))
		for _, r := range c.Rules {
			out = append(out, r.Text)
		}
		return out
	}
	for i := range want {
		w, h := lines(&want[i]), lines(have[want[i].Name])
		delete(have, want[i].Name)
		if !slices.Equal(w, h) {
			s.Matches = false
			s.Missing = append(s.Missing, less(want[i].Name, w, h)...)
			s.Surplus = append(s.Surplus, less(want[i].Name, h, w)...)
		}
	}
	for i := range s.Chains {
		if c := &s.Chains[i]; have[c.Name] != nil {
			s.Surplus = append(s.Surplus, less(c.Name, lines(c), nil)...)
		}
	}
}

// less returns what a has beyond b. Lines that are only in another order are in neither.
func less(chain string, a, b []string) (out []Line) {
	left := map[string]int{}
	for _, l := range b {
		left[l]++
	}
	for _, l := range a {
		if left[l] > 0 {
			left[l]--
			continue
		}
		out = append(out, Line{chain, l})
	}
	return out
}
