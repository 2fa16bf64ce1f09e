package main

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"testing"
)

func TestReach(t *testing.T) {
	names := map[string][]netip.Addr{"gw.example": {netip.MustParseAddr("192.0.2.7"), netip.MustParseAddr("2001:db8::7")}}
	exposed := []string{"198.51.100.1:443", "lb.example:15443"}
	var broken error
	r := &reach{gateways: []string{"192.0.2.9:15443", "gw.example:15443"}, gateway: "hanse-system/hanse-gateway",
		lookup: func(_ context.Context, _, host string) ([]netip.Addr, error) {
			if ips, ok := names[host]; ok {
				return ips, nil
			}
			return nil, errors.New("no such host " + host)
		},
		exposed: func(_ context.Context, service, port string) ([]string, error) {
			if service != "hanse-system/hanse-gateway" || port != "mesh" {
				t.Errorf("asked for %s %s", service, port)
			}
			return exposed, broken
		}}
	known := map[string][]netip.AddrPort{}
	look := func(wantErr bool, want ...string) {
		t.Helper()
		got, err := r.addresses(t.Context(), known)
		if (err != nil) != wantErr || !slices.Equal(addrPorts(got), want) {
			t.Errorf("%v, %v; want %v", got, err, want)
		}
	}
	// Every address of every name, and those of names that cannot be looked up are an error that takes nothing away.
	look(true, "192.0.2.7:15443", "192.0.2.9:15443", "198.51.100.1:443", "[2001:db8::7]:15443")
	names["lb.example"] = []netip.Addr{netip.MustParseAddr("203.0.113.5")}
	look(false, "192.0.2.7:15443", "192.0.2.9:15443", "198.51.100.1:443", "203.0.113.5:15443", "[2001:db8::7]:15443")
	// A name that moves is followed; one that cannot be looked up now keeps what it had.
	names["lb.example"] = []netip.Addr{netip.MustParseAddr("203.0.113.6")}
	delete(names, "gw.example")
	look(true, "192.0.2.7:15443", "192.0.2.9:15443", "198.51.100.1:443", "203.0.113.6:15443", "[2001:db8::7]:15443")
	// A Service that cannot be asked: the caller keeps what it has.
	broken = errors.New("API server is away")
	look(true)

	if r.fixed() || (&reach{gateways: []string{"gw.example:1"}}).fixed() || !(&reach{gateways: []string{"192.0.2.9:15443"}}).fixed() {
		t.Error("what has to be followed is told wrongly")
	}
}
