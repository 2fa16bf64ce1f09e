package capture

import (
	"strings"
	"testing"
)

func TestParsePorts(t *testing.T) {
	for in, want := range map[string]string{
		"80": "80", "8000-8100": "8000-8100", "1-65535": "1-65535", "5-5": "5",
		"": "", "0": "", "65536": "", "-1": "", "80-": "", "90-80": "", "+80": "", "80-90-100": "", "http": "", " 80": "",
	} {
		r, err := ParsePorts(in)
		if (err == nil) != (want != "") || err == nil && r.String() != want {
			t.Errorf("%q: %v, %v; want %q", in, r, err, want)
		}
	}
}

func TestParsePrefix(t *testing.T) {
	for in, want := range map[string]string{
		"10.0.0.0/8": "10.0.0.0/8", "10.1.2.3": "10.1.2.3/32", "fd00::/8": "fd00::/8", "::1": "::1/128", "0.0.0.0/0": "0.0.0.0/0",
		"": "", "10.0.0.1/8": "", "10.0.0.0/33": "", "fe80::1%eth0": "", "::ffff:10.0.0.1": "", "::ffff:10.0.0.0/104": "", "example.org": "",
	} {
		p, err := ParsePrefix(in)
		if (err == nil) != (want != "") || err == nil && p.String() != want {
			t.Errorf("%q: %v, %v; want %q", in, p, err, want)
		}
	}
}

func TestValidate(t *testing.T) {
	err := (&Config{Table: "Not a name", OnlyUIDs: []uint32{1}}).Validate()
	for _, want := range []string{"table", "nothing to capture", "would capture itself"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("no %q in %v", want, err)
		}
	}
	err = (&Config{Table: "t", OutboundPort: 1, InboundPort: 1, UIDs: []uint32{5}, OnlyUIDs: []uint32{5}, Inbound: Selection{ExcludePorts: make([]PortRange, MaxEntries+1)}}).Validate()
	for _, want := range []string{"inbound port 1 is also the outbound port", "user 5 is both", "inbound: 65 excluded ports"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("no %q in %v", want, err)
		}
	}
}
