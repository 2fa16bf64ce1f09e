package probe

import (
	"encoding/binary"
	"encoding/hex"
	"net/netip"
	"slices"
	"strings"
)

// fromNode says whether a caller is the kubelet, whose address is the node's or, seen from a pod, that of the gateway: hooks change what the application does.
func fromNode(remote, node string, gateways []netip.Addr) bool {
	ap, err := netip.ParseAddrPort(remote)
	if err != nil {
		return false
	}
	from := ap.Addr().Unmap().WithZone("")
	if slices.Contains(gateways, from) {
		return true
	}
	own, err := netip.ParseAddr(node)
	return err == nil && own == from
}

// gateways are those of the default routes in what Linux has as /proc/net/route and /proc/net/ipv6_route.
func gateways(route, route6 string) (out []netip.Addr) {
	for line := range strings.Lines(route) {
		f := strings.Fields(line)
		if len(f) > 7 && f[1] == "00000000" && f[7] == "00000000" {
			if b, err := hex.DecodeString(f[2]); err == nil && len(b) == 4 {
				a := netip.AddrFrom4([4]byte(binary.NativeEndian.AppendUint32(nil, binary.BigEndian.Uint32(b)))) // the number is in the machine's order
				if !a.IsUnspecified() {
					out = append(out, a)
				}
			}
		}
	}
	for line := range strings.Lines(route6) {
		f := strings.Fields(line)
		if len(f) > 4 && strings.Trim(f[0], "0") == "" && f[1] == "00" {
			if b, err := hex.DecodeString(f[4]); err == nil && len(b) == 16 {
				if a := netip.AddrFrom16([16]byte(b)); !a.IsUnspecified() {
					out = append(out, a)
				}
			}
		}
	}
	return out
}
