// Package peercred tells who is at the other end of a Unix socket, as the kernel has it.
package peercred

import (
	"fmt"
	"net"
	"strconv"
)

// Caller is a process. It was what it is when it connected.
type Caller struct {
	UID, GID uint32   // effective
	Groups   []uint32 // supplementary; nil where the system does not tell them
	PID      int      // 0: not known, as of a process in another PID namespace
}

func (c Caller) String() string {
	s := "uid " + strconv.FormatUint(uint64(c.UID), 10)
	if c.PID != 0 {
		s += " pid " + strconv.Itoa(c.PID)
	}
	return s
}

// Of returns who connected. It is an error where c is no Unix socket, and on systems that cannot tell.
func Of(c net.Conn) (caller Caller, err error) {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return caller, fmt.Errorf("peer of a %T: it is no Unix socket", c)
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return caller, fmt.Errorf("peer of a Unix socket: %w", err)
	}
	var failed error
	if err := raw.Control(func(fd uintptr) { caller, failed = of(int(fd)) }); err != nil {
		failed = err
	}
	if failed != nil {
		return caller, fmt.Errorf("peer of a Unix socket: %w", failed)
	}
	return caller, nil
}
