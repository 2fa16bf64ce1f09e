//go:build !linux

package capture

import (
	"net"
	"net/netip"
	"syscall"
)

// Rules works on one network namespace. There is none but on Linux.
type Rules struct{}

// In returns Rules that fail with ErrUnsupported.
func In(string) *Rules { return &Rules{} }

// Install implements what Linux has, as do the others.
func (*Rules) Install(*Config) (bool, error)                     { return false, ErrUnsupported }
func (*Rules) Remove(string) (bool, error)                       { return false, ErrUnsupported }
func (*Rules) Show(*Config) (*State, error)                      { return nil, ErrUnsupported }
func Plan(cfg *Config) *State                                    { return &State{Table: cfg.Table} }
func Original(net.Conn) (netip.AddrPort, error)                  { return netip.AddrPort{}, ErrUnsupported }
func Exempt(*Config) error                                       { return ErrUnsupported }
func Control(uint32) func(string, string, syscall.RawConn) error { return nil }
