package peercred

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// of is SO_PEERCRED and SO_PEERGROUPS, socket(7).
func of(fd int) (Caller, error) {
	c, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return Caller{}, err
	}
	groups, err := supplementary(fd)
	return Caller{UID: c.Uid, GID: c.Gid, Groups: groups, PID: int(c.Pid)}, err
}

const maxGroups = 65536 // NGROUPS_MAX, credentials(7)

// supplementary is SO_PEERGROUPS: nil where the kernel, or what stands for it, does not know that option.
func supplementary(fd int) ([]uint32, error) {
	for n := 32; ; n = maxGroups {
		buf := make([]uint32, n)
		size := uint32(4 * n)
		_, _, no := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_PEERGROUPS, uintptr(unsafe.Pointer(&buf[0])), uintptr(unsafe.Pointer(&size)), 0)
		switch {
		case no == unix.ERANGE && n < maxGroups:
			continue
		case no == unix.ENOPROTOOPT:
			return nil, nil
		case no != 0:
			return nil, os.NewSyscallError("getsockopt SO_PEERGROUPS", no)
		}
		return buf[:size/4], nil
	}
}
