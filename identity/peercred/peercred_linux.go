package peercred

import "golang.org/x/sys/unix"

// of is SO_PEERCRED, socket(7).
func of(fd int) (Caller, error) {
	c, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return Caller{}, err
	}
	return Caller{UID: c.Uid, GID: c.Gid, PID: int(c.Pid)}, nil
}
