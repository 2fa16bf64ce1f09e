package probe

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"
)

func TestGateways(t *testing.T) {
	got := gateways("Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"+
		"eth0\t00000000\t0101F40A\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"+
		"eth0\t0000F40A\t0101F40A\t0003\t0\t0\t0\t0000FFFF\t0\t0\t0\n",
		"fd000000000000000000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 00000001 00000000 00000001     eth0\n"+
			"00000000000000000000000000000000 00 00000000000000000000000000000000 00 fd000000000000000000000000000002 00000400 00000001 00000000 00000003     eth0\n")
	want := []netip.Addr{netip.MustParseAddr("10.244.1.1"), netip.MustParseAddr("fd00::2")}
	if binary.NativeEndian.Uint16([]byte{1, 0}) == 1 && !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}
