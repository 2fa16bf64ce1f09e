package capture

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ip6tOriginalDst is IP6T_SO_ORIGINAL_DST of linux/netfilter_ipv6/ip6_tables.h.
const ip6tOriginalDst = 80

// Original is where a captured connection was made to. For one that was made to the listener itself it is the listener's address.
func Original(c net.Conn) (netip.AddrPort, error) {
	local, err := netip.ParseAddrPort(c.LocalAddr().String())
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("original destination: %s is no TCP address", c.LocalAddr())
	}
	local = unmap(local)
	sc, ok := c.(syscall.Conn)
	if !ok {
		return netip.AddrPort{}, fmt.Errorf("original destination: %T is no socket", c)
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("original destination: %w", err)
	}
	var original netip.AddrPort
	var failed error
	err = raw.Control(func(fd uintptr) {
		if local.Addr().Is4() {
			var sa unix.RawSockaddrInet4
			if failed = getsockopt(fd, unix.SOL_IP, unix.SO_ORIGINAL_DST, unsafe.Pointer(&sa), unsafe.Sizeof(sa)); failed == nil {
				original = netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), networkOrder(sa.Port))
			}
			return
		}
		var sa unix.RawSockaddrInet6
		if failed = getsockopt(fd, unix.SOL_IPV6, ip6tOriginalDst, unsafe.Pointer(&sa), unsafe.Sizeof(sa)); failed == nil {
			original = unmap(netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), networkOrder(sa.Port)))
		}
	})
	switch err = errors.Join(err, failed); {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOPROTOOPT): // nobody translated it
		return local, nil
	case err != nil:
		return netip.AddrPort{}, fmt.Errorf("original destination: %w", err)
	}
	return original, nil
}

func unmap(ap netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port()) }

// networkOrder reads a port as the kernel lays it down.
func networkOrder(port uint16) uint16 {
	var b [2]byte
	binary.NativeEndian.PutUint16(b[:], port)
	return binary.BigEndian.Uint16(b[:])
}

func getsockopt(fd uintptr, level, name int, p unsafe.Pointer, size uintptr) error {
	n := uint32(size)
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, fd, uintptr(level), uintptr(name), uintptr(p), uintptr(unsafe.Pointer(&n)), 0)
	if errno != 0 {
		return errno
	}
	if uintptr(n) < size {
		return fmt.Errorf("%d bytes of an address", n)
	}
	return nil
}

// Control returns a net.Dialer's Control function that marks sockets as the sidecar's own. Where the process may set no mark its user
// must be exempt: Exempt says so in time.
func Control(mark uint32) func(network, address string, c syscall.RawConn) error {
	return func(network, _ string, c syscall.RawConn) error {
		if mark == 0 || network == "unix" {
			return nil
		}
		return c.Control(func(fd uintptr) { _ = setMark(int(fd), mark) })
	}
}

func setMark(fd int, mark uint32) error {
	return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(mark))
}

// Exempt is nil where this process's connections are exempt under cfg, by mark or by user.
func Exempt(cfg *Config) error {
	uid := uint32(unix.Geteuid())
	for _, u := range cfg.UIDs {
		if u == uid {
			return nil
		}
	}
	if cfg.Mark == 0 {
		return fmt.Errorf("this process runs as user %d, which is not exempt from capture", uid)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if errors.Is(err, unix.EAFNOSUPPORT) {
		fd, err = unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := setMark(fd, cfg.Mark); err != nil {
		return fmt.Errorf("this process can set no mark (%w), and runs as user %d, which is not exempt from capture", err, uid)
	}
	return nil
}
