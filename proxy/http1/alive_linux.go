package http1

import (
	"net"
	"syscall"
	"unsafe"
)

// alive looks at an idle connection without waiting, and without the scheduler's notice: its peer may have closed it, or have sent what
// nobody asked for.
func alive(c net.Conn) bool {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return true
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return false
	}
	quiet := false
	err = raw.Read(func(fd uintptr) bool {
		var b [1]byte
		_, _, errno := syscall.RawSyscall6(syscall.SYS_RECVFROM, fd, uintptr(unsafe.Pointer(&b[0])), 1, syscall.MSG_PEEK|syscall.MSG_DONTWAIT, 0, 0)
		quiet = errno == syscall.EAGAIN
		return true
	})
	return err == nil && quiet
}
