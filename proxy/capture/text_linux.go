package capture

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/bits"
	"net/netip"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// text is a rule in the words of nft, as far as this package has them; anything else is told apart by its type and fields. Rules with
// the same text do the same.
func text(rule []expr.Any) Rule {
	var r Rule
	var words []string
	say := func(format string, args ...any) { words = append(words, fmt.Sprintf(format, args...)) }
	left, value := "", func(b []byte) string { return fmt.Sprintf("%#x", b) }
	transport, immediate := "th", []byte(nil)
	for _, e := range rule {
		switch e := e.(type) {
		case *expr.Meta:
			left, value = metaText(e)
		case *expr.Fib:
			left, value = fmt.Sprintf("fib %+v", *e), host32
			if *e == (expr.Fib{Register: e.Register, FlagDADDR: true, ResultADDRTYPE: true}) {
				left = "fib daddr type"
				value = func(b []byte) string {
					if bytes.Equal(b, binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)) {
						return "local"
					}
					return host32(b)
				}
			}
		case *expr.Payload:
			left, value = payloadText(e, transport)
		case *expr.Bitwise:
			switch {
			case !zero(e.Xor):
				left += fmt.Sprintf(" & %#x ^ %#x", e.Mask, e.Xor)
			case strings.HasPrefix(left, "ip ") || strings.HasPrefix(left, "ip6 "):
				ones := prefixLength(e.Mask)
				of := value
				value = func(b []byte) string {
					if ones < 0 {
						return fmt.Sprintf("%s & %#x", of(b), e.Mask)
					}
					return fmt.Sprintf("%s/%d", of(b), ones)
				}
			case left == "tcp flags" && bytes.Equal(e.Mask, []byte{flagsMask}):
				left = "tcp flags & (fin | syn | rst | ack)"
			default:
				left += fmt.Sprintf(" & %#x", e.Mask)
			}
		case *expr.Cmp:
			v := value(e.Data)
			switch e.Op {
			case expr.CmpOpEq:
				say("%s %s", left, v)
			case expr.CmpOpNeq:
				say("%s != %s", left, v)
			case expr.CmpOpLt:
				say("%s < %s", left, v)
			case expr.CmpOpLte:
				say("%s <= %s", left, v)
			case expr.CmpOpGt:
				say("%s > %s", left, v)
			case expr.CmpOpGte:
				say("%s >= %s", left, v)
			default:
				say("%s op%d %s", left, e.Op, v)
			}
			if e.Op == expr.CmpOpEq && left == "meta l4proto" {
				transport = v
			}
		case *expr.Counter:
			r.Packets = &e.Packets
			say("counter")
		case *expr.Immediate:
			immediate = e.Data
		case *expr.Redir:
			if len(immediate) >= 2 {
				say("redirect to :%d", binary.BigEndian.Uint16(immediate))
			} else {
				say("redirect")
			}
		case *expr.Verdict:
			say("%s", verdictText(e))
		default:
			say("%s%+v", strings.TrimPrefix(fmt.Sprintf("%T", e), "*expr."), e)
		}
	}
	r.Text = strings.Join(words, " ")
	return r
}

func host32(b []byte) string {
	if len(b) != 4 {
		return fmt.Sprintf("%#x", b)
	}
	return fmt.Sprint(binaryutil.NativeEndian.Uint32(b))
}

func metaText(e *expr.Meta) (string, func([]byte) string) {
	one := func(names map[byte]string) func([]byte) string {
		return func(b []byte) string {
			if len(b) == 1 && names[b[0]] != "" {
				return names[b[0]]
			}
			return fmt.Sprintf("%#x", b)
		}
	}
	quoted := func(b []byte) string { return fmt.Sprintf("%q", strings.TrimRight(string(b), "\x00")) }
	switch e.Key {
	case expr.MetaKeyMARK:
		return "meta mark", func(b []byte) string {
			if len(b) != 4 {
				return fmt.Sprintf("%#x", b)
			}
			return fmt.Sprintf("0x%08x", binaryutil.NativeEndian.Uint32(b))
		}
	case expr.MetaKeySKUID:
		return "meta skuid", host32
	case expr.MetaKeyOIFNAME:
		return "oifname", quoted
	case expr.MetaKeyIIFNAME:
		return "iifname", quoted
	case expr.MetaKeyL4PROTO:
		return "meta l4proto", one(map[byte]string{unix.IPPROTO_TCP: "tcp", unix.IPPROTO_UDP: "udp"})
	case expr.MetaKeyNFPROTO:
		return "meta nfproto", one(map[byte]string{unix.NFPROTO_IPV4: "ipv4", unix.NFPROTO_IPV6: "ipv6"})
	}
	return fmt.Sprintf("meta %d", e.Key), func(b []byte) string { return fmt.Sprintf("%#x", b) }
}

func payloadText(e *expr.Payload, transport string) (string, func([]byte) string) {
	address := func(b []byte) string {
		if a, ok := netip.AddrFromSlice(b); ok {
			return a.String()
		}
		return fmt.Sprintf("%#x", b)
	}
	type place struct {
		base        expr.PayloadBase
		offset, len uint32
	}
	switch (place{e.Base, e.Offset, e.Len}) {
	case place{expr.PayloadBaseNetworkHeader, 16, 4}:
		return "ip daddr", address
	case place{expr.PayloadBaseNetworkHeader, 12, 4}:
		return "ip saddr", address
	case place{expr.PayloadBaseNetworkHeader, 24, 16}:
		return "ip6 daddr", address
	case place{expr.PayloadBaseNetworkHeader, 8, 16}:
		return "ip6 saddr", address
	case place{expr.PayloadBaseTransportHeader, 2, 2}:
		return transport + " dport", func(b []byte) string {
			if len(b) != 2 {
				return fmt.Sprintf("%#x", b)
			}
			return fmt.Sprint(binary.BigEndian.Uint16(b))
		}
	case place{expr.PayloadBaseTransportHeader, 13, 1}:
		return "tcp flags", func(b []byte) string {
			if len(b) == 1 && b[0] == flagSyn {
				return "syn"
			}
			return fmt.Sprintf("%#x", b)
		}
	}
	return fmt.Sprintf("payload %d,%d,%d", e.Base, e.Offset, e.Len), func(b []byte) string { return fmt.Sprintf("%#x", b) }
}

func verdictText(e *expr.Verdict) string {
	switch e.Kind {
	case expr.VerdictReturn:
		return "return"
	case expr.VerdictAccept:
		return "accept"
	case expr.VerdictDrop:
		return "drop"
	case expr.VerdictGoto:
		return "goto " + e.Chain
	case expr.VerdictJump:
		return "jump " + e.Chain
	}
	return fmt.Sprintf("verdict %d", e.Kind)
}

func zero(b []byte) bool {
	for _, x := range b {
		if x != 0 {
			return false
		}
	}
	return true
}

// prefixLength is -1 where the mask is none of a prefix.
func prefixLength(mask []byte) (n int) {
	for i, b := range mask {
		ones := bits.LeadingZeros8(^b)
		n += ones
		if ones < 8 {
			if b<<ones != 0 || !zero(mask[i+1:]) {
				return -1
			}
			break
		}
	}
	return n
}

// hookText is a base chain's head.
func hookText(c *nftables.Chain) string {
	if c.Hooknum == nil {
		return ""
	}
	hook := fmt.Sprint(*c.Hooknum)
	switch *c.Hooknum {
	case *nftables.ChainHookOutput:
		hook = "output"
	case *nftables.ChainHookPrerouting:
		hook = "prerouting"
	}
	p, policy := nftables.ChainPriority(0), "accept"
	if c.Priority != nil {
		p = *c.Priority
	}
	if c.Policy != nil && *c.Policy != nftables.ChainPolicyAccept {
		policy = "drop"
	}
	return fmt.Sprintf("type %s hook %s priority %d; policy %s;", c.Type, hook, p, policy)
}
