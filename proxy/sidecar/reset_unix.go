//go:build unix

package sidecar

import "syscall"

// dropUnsent makes closing a socket a reset.
func dropUnsent(fd uintptr) {
	_ = syscall.SetsockoptLinger(int(fd), syscall.SOL_SOCKET, syscall.SO_LINGER, &syscall.Linger{Onoff: 1})
}
