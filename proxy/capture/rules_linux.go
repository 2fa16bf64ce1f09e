package capture

import (
	"encoding/binary"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// chain is one chain as wanted.
type chain struct {
	name  string
	hook  *nftables.ChainHook // nil: jumped to
	rules [][]expr.Any
}

// priority is before other NAT (-100), such as Docker's for its DNS server.
const priority = nftables.ChainPriority(-110)

// Names of chains.
const (
	chainOutput     = "output"
	chainApp        = "app"      // what the application calls
	chainTake       = "app-take" // of it, what was included by address
	chainPrerouting = "prerouting"
	chainTakeIn     = "prerouting-take"
)

// chains are the whole table.
func (c *Config) chains() (out []chain) {
	if c.OutboundPort != 0 || c.DNSPort != 0 {
		out = c.output()
	}
	if c.InboundPort != 0 {
		out = append(out, c.prerouting()...)
	}
	return out
}

// output captures what local processes call. Jumps go forward only, and chains that are jumped to come first.
func (c *Config) output() []chain {
	app := chain{name: chainApp}
	if c.DNSPort != 0 { // wherever it goes: resolvers on loopback too
		app.add(rule(udp, port(53), redirect(c.DNSPort))...)
		app.add(rule(tcp, syn, port(53), redirect(c.DNSPort))...)
	}
	app.add(rule(outInterface("lo"), verdict(expr.VerdictReturn, ""))...) // to loopback, and to an address of our own
	app.add(rule(notProtocol(unix.IPPROTO_TCP), verdict(expr.VerdictReturn, ""))...)
	app.add(rule(notSyn, verdict(expr.VerdictReturn, ""))...)
	chains := []chain{}
	if c.OutboundPort != 0 {
		chains = c.Outbound.capture(&app, chainTake, daddr, c.Always, c.OutboundPort)
	}
	out := chain{name: chainOutput, hook: nftables.ChainHookOutput}
	if c.Mark != 0 {
		out.add(rule(meta(expr.MetaKeyMARK, c.Mark), verdict(expr.VerdictReturn, ""))...)
	}
	for _, uid := range c.UIDs {
		out.add(rule(meta(expr.MetaKeySKUID, uid), verdict(expr.VerdictReturn, ""))...)
	}
	for _, uid := range c.OnlyUIDs {
		out.add(rule(meta(expr.MetaKeySKUID, uid), verdict(expr.VerdictGoto, chainApp))...)
	}
	if len(c.OnlyUIDs) == 0 {
		out.add(rule(verdict(expr.VerdictGoto, chainApp))...)
	}
	return append(chains, app, out)
}

// prerouting captures what comes from elsewhere to an address of this machine.
func (c *Config) prerouting() []chain {
	in := chain{name: chainPrerouting, hook: nftables.ChainHookPrerouting}
	in.add(rule(inInterface("lo"), verdict(expr.VerdictReturn, ""))...)
	in.add(rule(notProtocol(unix.IPPROTO_TCP), verdict(expr.VerdictReturn, ""))...)
	in.add(rule(notSyn, verdict(expr.VerdictReturn, ""))...)
	in.add(rule(notLocal, verdict(expr.VerdictReturn, ""))...) // forwarded, of containers say
	for _, p := range append([]uint16{c.InboundPort}, c.OwnPorts...) {
		in.add(rule(port(p), verdict(expr.VerdictReturn, ""))...)
	}
	return append(c.Inbound.capture(&in, chainTakeIn, saddr, nil, c.InboundPort), in)
}

// capture adds the rules of a selection to a chain that only first TCP packets reach.
func (s *Selection) capture(c *chain, take string, address func(netip.Prefix) []expr.Any, always []netip.Prefix, to uint16) []chain {
	for _, p := range s.ExcludePorts {
		c.add(rule(ports(p), verdict(expr.VerdictReturn, ""))...)
	}
	for _, p := range s.Exclude {
		c.add(rule(address(p), verdict(expr.VerdictReturn, ""))...)
	}
	if len(s.Include) > 0 || len(s.IncludePorts) > 0 {
		for _, p := range always {
			c.add(rule(address(p), protocol(unix.IPPROTO_TCP), redirect(to))...)
		}
	}
	final := func(c *chain) {
		for _, p := range s.IncludePorts {
			c.add(rule(protocol(unix.IPPROTO_TCP), ports(p), redirect(to))...)
		}
		if len(s.IncludePorts) == 0 {
			c.add(rule(protocol(unix.IPPROTO_TCP), redirect(to))...)
		}
	}
	if len(s.Include) == 0 {
		final(c)
		return nil
	}
	taken := chain{name: take}
	final(&taken)
	for _, p := range s.Include {
		c.add(rule(address(p), verdict(expr.VerdictGoto, take))...)
	}
	return []chain{taken}
}

func (c *chain) add(e ...expr.Any) { c.rules = append(c.rules, e) }

func rule(parts ...[]expr.Any) (out []expr.Any) {
	for _, p := range parts {
		out = append(out, p...)
	}
	return out
}

var (
	udp    = protocol(unix.IPPROTO_UDP)
	tcp    = protocol(unix.IPPROTO_TCP)
	syn    = flags(expr.CmpOpEq)
	notSyn = flags(expr.CmpOpNeq)
	// notLocal is for other machines.
	notLocal = []expr.Any{
		&expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)},
	}
)

func meta(key expr.MetaKey, v uint32) []expr.Any {
	return []expr.Any{&expr.Meta{Key: key, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(v)}}
}

func protocol(p byte) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{p}}}
}

func notProtocol(p byte) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: []byte{p}}}
}

// TCP's flags byte.
const (
	flagSyn   = 0x02
	flagsMask = 0x17 // FIN, SYN, RST, ACK
)

// flags compares with those of a first packet.
func flags(op expr.CmpOp) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{flagsMask}, Xor: []byte{0}},
		&expr.Cmp{Op: op, Register: 1, Data: []byte{flagSyn}},
	}
}

func outInterface(name string) []expr.Any { return iface(expr.MetaKeyOIFNAME, name) }
func inInterface(name string) []expr.Any  { return iface(expr.MetaKeyIIFNAME, name) }

func iface(key expr.MetaKey, name string) []expr.Any {
	padded := make([]byte, unix.IFNAMSIZ)
	copy(padded, name)
	return []expr.Any{&expr.Meta{Key: key, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: padded}}
}

var dport = expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2}

func port(p uint16) []expr.Any { return ports(PortRange{p, p}) }

func ports(r PortRange) []expr.Any {
	load := dport
	if r.First == r.Last {
		return []expr.Any{&load, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: bigEndian(r.First)}}
	}
	return []expr.Any{
		&load,
		&expr.Cmp{Op: expr.CmpOpGte, Register: 1, Data: bigEndian(r.First)},
		&expr.Cmp{Op: expr.CmpOpLte, Register: 1, Data: bigEndian(r.Last)},
	}
}

func bigEndian(p uint16) []byte { return binary.BigEndian.AppendUint16(nil, p) }

func daddr(p netip.Prefix) []expr.Any { return address(p, 16, 24) }
func saddr(p netip.Prefix) []expr.Any { return address(p, 12, 8) }

// address compares what is at an offset of the IPv4 or the IPv6 header.
func address(p netip.Prefix, offset4, offset6 uint32) []expr.Any {
	family, offset := byte(unix.NFPROTO_IPV4), offset4
	if p.Addr().Is6() {
		family, offset = unix.NFPROTO_IPV6, offset6
	}
	n := p.Addr().BitLen() / 8
	mask := make([]byte, n)
	for i := range p.Bits() {
		mask[i/8] |= 0x80 >> (i % 8)
	}
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{family}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: uint32(n)},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: uint32(n), Mask: mask, Xor: make([]byte, n)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: p.Addr().AsSlice()},
	}
}

func verdict(kind expr.VerdictKind, to string) []expr.Any {
	return []expr.Any{&expr.Verdict{Kind: kind, Chain: to}}
}

// redirect counts, too.
func redirect(to uint16) []expr.Any {
	return []expr.Any{
		&expr.Counter{},
		&expr.Immediate{Register: 1, Data: bigEndian(to)},
		&expr.Redir{RegisterProtoMin: 1},
	}
}
